"""What a run does on SIGTERM, Ctrl-C and the like, and what its exit status says."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import scalars
from interruptions import (
    PLAYING,
    SMALL,
    all_files,
    assert_same_end,
    at_step,
    flags_of,
    main,
    names,
    new_folder,
    send,
    train_until,
    uninterrupted_runs,  # noqa: F401 (a fixture)
    until_signal,
)

import dqn_injection_atari as script
import support.runs as runs
from dqn_injection_atari import Args, train
from support.environments import LearnerView
from support.process import Signals
from support.runs import Run


@pytest.mark.parametrize("place", ["a b", "it's", '"$HOME"', "~", "-x", "--y z", "größe", "a;b&c", "*"])
def test_the_command_to_go_on_means_this_script_and_this_run_when_it_is_pasted(monkeypatch, place):
    project, folder = Path(place).absolute(), Path(place, "runs", place).absolute()
    folder.mkdir(parents=True)
    (project / "script.py").touch()
    for here, run in (
        (project.parent, folder.relative_to(project.parent)),
        (folder.parent, Path(place)),
        (project, folder),
    ):
        monkeypatch.chdir(here)
        command = runs.Run.command(types.SimpleNamespace(folder=run), str(project / "script.py"), "resume")
        shown = subprocess.run(
            ["sh", "-c", f"printf '%s\\n' {command}"], stdout=subprocess.PIPE, encoding="utf-8", check=True
        )
        python, script_path, flag, found = shown.stdout.splitlines()
        assert (
            (python, flag) == ("python", "--resume") and script_path[0] not in "-~" and found[0] not in "-~"
        )
        assert Path(script_path).samefile(project / "script.py") and Path(found).samefile(folder)


@pytest.mark.slow
def test_a_stop_ends_the_run_with_a_checkpoint_from_which_it_goes_on_exactly(uninterrupted, capsys):
    args, resumed = replace(SMALL, save_model=True), {}
    for step, number in (
        (4, signal.SIGTERM),
        (152, signal.SIGINT),
        (160, signal.SIGTERM),
        (236, signal.SIGINT),
    ):
        folder = until_signal(step, replace(args, **resumed), number)
        resumed = {"resume": str(folder)}
        out = capsys.readouterr().out
        assert f"step {step}: {number.name}, writing a checkpoint; once more ends the run without it\n" in out
        command = f"python {os.path.relpath(script.__file__)} --resume {folder}"
        assert f"stopped at step {step} of 240, go on with: {command}\n" in out
        assert names(folder)[-1] == f"checkpoint-{step}" and not (folder / "agent.pt").exists()
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(SMALL))
    assert (folder / "agent.pt").exists()


@pytest.mark.slow
def test_the_exit_status_says_what_ended_a_run_and_0_that_it_is_complete(monkeypatch, capsys):
    args = replace(PLAYING, num_envs=2, total_timesteps=100, save_model=True)
    for step, number, status in (
        (20, signal.SIGTERM, 143),
        (40, signal.SIGINT, 130),
        (99, signal.SIGTERM, 143),
    ):
        with monkeypatch.context() as patch:
            at_step(patch, step, send(number))
            flags = ["--resume", str(new_folder(set()))] if Path("runs").exists() else flags_of(args)
            assert main(monkeypatch, *flags) == status
        folder = new_folder(set())
        assert names(folder) == [f"checkpoint-{step + step % 2}"] and not (folder / "agent.pt").exists()
        assert f"stopped at step {step + step % 2} of 100" in capsys.readouterr().out
    original = script.save_agent
    monkeypatch.setattr(script, "save_agent", lambda *given: (send(signal.SIGTERM)(), original(*given)))
    assert main(monkeypatch, "--resume", str(folder)) == 0, "the signal came too late"
    assert (folder / "agent.pt").exists() and "stopped" not in capsys.readouterr().out
    close = LearnerView.close
    monkeypatch.setattr(LearnerView, "close", lambda envs: (send(signal.SIGTERM)(), close(envs)))
    assert main(monkeypatch, "--resume", str(folder)) == 0, "files are being closed: too late, too"


@pytest.mark.parametrize(("complete", "status"), [(True, 0), (False, 143)])
def test_a_signal_at_the_very_end_does_not_make_a_complete_run_another_in_weights_and_biases(
    monkeypatch, complete, status
):
    ended = []
    monkeypatch.setattr(runs, "start_wandb", lambda *_: "a run there")
    monkeypatch.setattr(runs, "finish_wandb", lambda mirror, status: ended.append(status))
    run = Run.__new__(Run)
    run.args = {"wandb_project_name": "x", "wandb_entity": None}
    run.id = "1f"
    run.signals = Signals()
    run.complete = complete
    with contextlib.ExitStack() as stack:
        run._start_mirror("a", stack)
        run.signals.stop = signal.SIGTERM
    assert ended == [status]


@pytest.mark.slow
def test_the_shell_sees_the_exit_status_after_two_signals(request):
    slowly = "runs.save_checkpoint = lambda *_: (print('saving', flush=True), time.sleep(60))"
    code = f"import time, support.runs as runs, dqn_injection_atari as s\n{slowly}\ns.main()"
    flags = "--env-backend ale --buffer-size 500 --checkpoint-frequency 0 --head-width 16".split()
    flags += ["--log-frequency", "50"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(Path(script.__file__).parent)},
    )
    request.addfinalizer(process.kill)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    while process.poll() is None and "saving" not in process.stdout.readline():
        pass
    time.sleep(Signals.SAME_REQUEST + 0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""


def saved_steps(patch):
    """A list to which the step of every checkpoint that is written is added."""
    steps = []
    original = runs.save_checkpoint
    patch.setattr(
        runs,
        "save_checkpoint",
        lambda folder, step, *given: (steps.append(step), original(folder, step, *given))[1],
    )
    return steps


@pytest.mark.slow
def test_sigusr1_writes_a_checkpoint_and_the_run_goes_on_as_if_nothing_had_been(uninterrupted, monkeypatch):
    steps = saved_steps(monkeypatch)
    at_step(monkeypatch, 130, send(signal.SIGUSR1))  # where there is one anyway
    folder = train_until(78, SMALL, send(signal.SIGUSR1))
    assert steps == [0, 78, 130, 142, 240]
    assert_same_end(folder, uninterrupted(SMALL))


@pytest.mark.slow
def test_a_signal_while_the_games_are_played_again_ends_the_process_at_once(monkeypatch):
    folder = until_signal(31, PLAYING)
    before = all_files(folder)
    original = LearnerView.load_state_dict
    monkeypatch.setattr(
        LearnerView,
        "load_state_dict",
        lambda view, state: (send(signal.SIGTERM)(), original(view, state)),
    )
    with pytest.raises(SystemExit) as stop:
        train(Args(resume=str(folder)))
    assert stop.value.code == 143 and before == all_files(folder)


@pytest.mark.slow
def test_without_periodic_checkpoints_a_signal_still_saves_the_run():
    args = replace(SMALL, checkpoint_frequency=0)
    folder = until_signal(151, args)
    assert names(folder) == ["checkpoint-152"]
    until_signal(200, replace(args, resume=str(folder)))
    resumed, whole = until_signal(238, replace(args, resume=str(folder))), until_signal(238, args)
    assert_same_end(resumed, whole, "checkpoint-238")


@contextlib.contextmanager
def signal_in_the_first_evaluation(number):
    """Yields a list that grows with each evaluation: its step, and whether checkpoint-100 was there."""
    original, calls = script.evaluate, []

    def evaluate(*given):
        if not calls:
            send(number)()
        calls.append((given[2], bool(list(Path("runs").glob("*/checkpoint-100")))))
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "evaluate", evaluate)
        yield calls


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_an_evaluation_is_answered_at_once_and_the_evaluation_repeated(uninterrupted, number):
    args = replace(PLAYING, eval_frequency=100, eval_episodes=2)
    with signal_in_the_first_evaluation(number) as calls:
        folder = train(args)
        if number == signal.SIGTERM:
            assert names(folder) == ["checkpoint-100"] and "eval/episodic_return" not in scalars(folder)
            train(Args(resume=str(folder)))
    assert calls == [(100, False), (100, True), (200, False)]
    assert_same_end(folder, uninterrupted(args))


@pytest.mark.parametrize(("scores", "complete"), [([20.0, 40.0], True), ([20.0, math.nan], False)])
def test_an_evaluation_that_a_signal_cuts_short_is_not_logged_even_if_some_of_its_games_are_over(
    scores, complete
):
    run = Run.__new__(Run)
    run.step = 40
    logged = []
    run.log = types.SimpleNamespace()
    run.log.pause = contextlib.nullcontext
    run.log.evaluation = lambda *given: logged.append(given)
    assert run.evaluate(lambda *_: np.array(scores), film=False) == complete == bool(logged)


def test_a_run_in_a_thread_does_without_signals():
    results = []
    args = replace(PLAYING, total_timesteps=20, checkpoint_frequency=0)
    thread = threading.Thread(target=lambda: results.append(train(args)))
    thread.start()
    thread.join()
    assert len(results) == 1 and results[0].is_dir()


def test_who_calls_train_learns_which_signal_ended_it():
    signals = Signals()
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 10, send(signal.SIGTERM))
        train(replace(PLAYING, checkpoint_frequency=0), signals)
    assert signals.stop is signal.SIGTERM
