"""Nothing is lost: checkpoints, resume, fork, signals, full disks, damaged files."""

import contextlib
import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from conftest import BRIEF, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_injection_atari as script
from benchmarks.kill_test import content, differences, kill_and_compare, read_events
from dqn_injection_atari import Args, Learner, UsageError, load_checkpoint, train

SMALL = replace(BRIEF, train_frequency=6, plasticity_frequency=90, injection_step=(202,))
END = "checkpoint-360"


class Killed(BaseException):
    """Stands for SIGKILL within this process: nothing of the script handles it."""


def at_step(patch, step, action):
    """Has `action` called once, when `step` and what follows it without a pause have been played and learned from."""
    original = script.after_step
    done = []

    def after_step(run):
        original(run)
        if run.step >= step and not done:
            done.append(step)
            action()

    patch.setattr(script, "after_step", after_step)


def kill():
    raise Killed


def train_until(step, args, action=kill):
    """The folder of a run in which `action` happened after `step`, by default its end."""
    before = set(Path("runs").glob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.RunLog, "close", lambda log: log.bar.close())  # a killed run writes nothing more
        at_step(patch, step, action)
        if action is kill:
            with pytest.raises(Killed):
                train(args)
        else:
            train(args)
    if args.resume is not None:
        return Path(args.resume)
    (folder,) = set(Path("runs").glob("*")) - before
    return folder


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The folder of a run in these arguments that nobody touched; runs are kept for the tests that share them."""
    runs = {}

    def run(args):
        if args not in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("uninterrupted"))
                runs[args] = train(args).absolute()
        return runs[args]

    return run


def names(folder):
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name[11:]))


def event_files(folder):
    """Those with something in them: a resumed run empties the older ones."""
    return [path for path in folder.glob("events*") if path.stat().st_size]


def assert_same_end(folder, reference, end=END):
    assert differences(content(folder, end), content(reference, end)) == []


# resume


@pytest.mark.parametrize(
    "backend,num_envs,step",
    [*(("ale", 2, step) for step in (5, 202, 241, 355)), *(("sb3", 2, step) for step in (250,)), ("ale", 7, 203)],
)
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, backend, num_envs, step):
    args = replace(SMALL, env_backend=backend, num_envs=num_envs)
    folder = train_until(step, args)
    assert train(replace(args, resume=str(folder))) == folder
    assert_same_end(folder, uninterrupted(args))


def test_killed_again_and_again(uninterrupted):
    folder = train_until(150, SMALL)
    for step in (210, 238, 241, 290):
        train_until(step, replace(SMALL, resume=str(folder)))
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(SMALL))


@pytest.mark.parametrize(
    "changes",
    [
        {"tau": 0.5},
        {"injection_step": (130, 170, 255)},
        {"num_envs": 1},
        {"bf16": True, "tau": 0.5},
        {"injection_optimizer_state": "reset", "freeze_heads": False},
        {"intervention": "shrink-perturb", "injection_step": (202, 250)},
        {"optimizer": "rmsprop", "shared_bias": True, "exploration_start": 150, "injection_optimizer_state": "copy"}
        | {"eval_frequency": 270, "eval_episodes": 0, "eval_steps": 40},
    ],
    ids=str,
)
def test_resume_is_exact_with_other_settings(uninterrupted, changes):
    args = replace(SMALL, **changes)
    folder = train_until(260, args)
    train(replace(args, resume=str(folder)))
    assert_same_end(folder, uninterrupted(args))


NORM = {"injection_step": (), "injection_trigger": "norm", "injection_norm_ratio": 1.0001, "injection_check_frequency": 30}
NORM |= {"max_injections": 2, "learning_rate": 3e-4}


@pytest.mark.parametrize("after", [0, 3])
def test_resume_is_exact_where_the_norm_decides(uninterrupted, after):
    args = replace(SMALL, **NORM)
    first, second, *_ = load_checkpoint(uninterrupted(args) / END).manifest["interventions"]
    folder = train_until(first + after, args, send(signal.SIGTERM))
    train_until(second + 1, replace(args, resume=str(folder)))
    train(replace(args, resume=str(folder)))
    assert_same_end(folder, uninterrupted(args))
    assert content(folder, END)["/learner/num_interventions"] >= 2


@pytest.mark.parametrize("backend", ["ale", "sb3"])
def test_resume_is_exact_while_the_games_play_on(uninterrupted, backend):
    """With 7 games step 202 lies within a vector step, so that its checkpoint is written while the games are being played."""
    args = replace(SMALL, overlap=True, num_envs=7, env_backend=backend)
    folder = train_until(203, args)
    assert load_checkpoint(folder / "checkpoint-202").manifest["in_flight"]
    train_until(245, replace(args, resume=str(folder)), send(signal.SIGTERM))
    train(replace(args, resume=str(folder)))
    assert_same_end(folder, uninterrupted(args))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"compile": True}])
def test_resume_is_exact_on_a_gpu_with_graphs(uninterrupted, changes):
    args = replace(SMALL, cuda_graphs=True, overlap=True, num_envs=7, **changes)
    folder = train_until(203, args)
    train_until(245, replace(args, resume=str(folder)), send(signal.SIGTERM))
    train(replace(args, resume=str(folder)))
    assert_same_end(folder, uninterrupted(args))
    train(replace(args, fork=str(folder / "checkpoint-202"), cuda=False, cuda_graphs=False))


def test_a_fork_while_the_games_play_on_equals_the_run_that_had_the_injection_from_the_start(uninterrupted):
    injected = replace(SMALL, overlap=True, num_envs=7)
    baseline = replace(injected, apply_injection=False)
    folder = train_until(230, baseline)
    assert_same_end(fork(folder / "checkpoint-202", baseline, apply_injection=True), uninterrupted(injected))


def test_the_comparison_sees_one_changed_bit(uninterrupted):
    """Guards the tests above: a single differing scalar, weight or generator is found."""
    a, b = (content(uninterrupted(SMALL), END) for _ in range(2))
    assert differences(a, b) == []
    assert {"replay", "/learner/rng/state/state", "/replay/generator/state/state", "curves in the run folder"} <= set(a)
    for name in ("/learner/q_network/encoder.0.weight", "/learner/optimizer/theta_prime_1.0.0.weight/exp_avg_sq"):
        b[name] = a[name].clone()
        b[name][0] = torch.nextafter(a[name][0], torch.tensor(9.0))
    b["curves in the run folder"] = a["curves in the run folder"][:-1]
    assert len(differences(a, b)) == 3


def test_every_scalar_is_there_once_after_a_resume(uninterrupted):
    folder = train_until(230, SMALL)
    train_until(290, replace(SMALL, resume=str(folder)))
    train(replace(SMALL, resume=str(folder)))
    resumed, whole = scalars(folder), scalars(uninterrupted(SMALL))
    assert [step for step, _ in resumed["charts/SPS"]] == [60, 120, 180, 240, 300, 360]
    for tag in ("charts/SPS", "charts/SPS_recent"):
        resumed[tag], whole[tag] = ([step for step, _ in curve[tag]] for curve in (resumed, whole))
    assert resumed == whole and "injection/step" in whole and len(whole["charts/episodic_return"]) >= 2
    assert len(event_files(folder)) == 1


def test_a_tensorboard_that_is_open_during_a_resume_shows_the_run_as_it_went_on(monkeypatch):
    monkeypatch.setattr(script.RunLog, "FLUSH_SECONDS", 0)
    folder = train_until(310, SMALL)
    view = EventAccumulator(str(folder)).Reload()  # as in a browser, with a point that the resumed run writes again
    assert [event.step for event in view.Scalars("charts/epsilon")] == [60, 120, 180, 240, 300]
    other_process = os.getpid() + 1
    monkeypatch.setattr(script.os, "getpid", lambda: other_process)
    train(replace(SMALL, resume=str(folder)))
    view.Reload()
    points = [(event.step, event.value) for event in view.Scalars("charts/epsilon")]
    fresh = EventAccumulator(str(folder)).Reload().Scalars("charts/epsilon")
    assert points == [(event.step, event.value) for event in fresh] and len(points) == 6


def test_speed_over_all_counts_the_time_before_the_resume(monkeypatch):
    folder = train_until(290, SMALL)
    state = load_checkpoint(folder / "checkpoint-240").state
    state["log"]["seconds"] = 1000.0
    original = script.load_checkpoint
    monkeypatch.setattr(script, "load_checkpoint", lambda path: replace(original(path), state=state))
    train(replace(SMALL, resume=str(folder)))
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("charts/SPS")[-1].value == 0, "360 steps in more than 1000 seconds"


def test_a_finished_run_resumed_stays_as_it_is(uninterrupted, capsys):
    folder = Path(shutil.copytree(uninterrupted(SMALL), "runs/done"))
    before = content(folder, END)
    train(replace(SMALL, resume=str(folder)))
    assert differences(before, content(folder, END)) == []
    assert "resumed at step 360" in capsys.readouterr().out


def test_resume_takes_no_other_arguments(uninterrupted):
    folder = uninterrupted(SMALL)
    with pytest.raises(UsageError, match="seed, num_envs cannot change: leave out, or use --fork"):
        train(replace(SMALL, seed=5, num_envs=3, resume=str(folder)))


def test_a_run_that_goes_on_elsewhere_is_not_resumed(uninterrupted):
    folder = Path(shutil.copytree(uninterrupted(SMALL), "runs/busy"))
    with contextlib.ExitStack() as elsewhere:
        script.lock(folder, elsewhere)
        with pytest.raises(UsageError, match="another process is running runs/busy"):
            train(replace(SMALL, resume=str(folder)))
    train(replace(SMALL, resume=str(folder)))


def test_other_software_is_named(uninterrupted, capsys, monkeypatch):
    folder = Path(shutil.copytree(uninterrupted(SMALL), "runs/older"))
    version = torch.__version__
    monkeypatch.setattr(script.torch, "__version__", "9.9.9")
    train(replace(SMALL, resume=str(folder)))
    expected = f"warning: bits may differ from an uninterrupted run, because torch was {version} and is 9.9.9\n"
    assert expected in capsys.readouterr().out


def test_nothing_is_said_of_software_that_is_the_same(uninterrupted, capsys):
    train(replace(SMALL, resume=str(shutil.copytree(uninterrupted(SMALL), "runs/same"))))
    assert "warning" not in capsys.readouterr().out


# what is kept


def test_the_newest_checkpoint_and_those_at_injection_steps_are_kept():
    args = replace(SMALL, injection_step=(120, 202), apply_injection=False)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = script.save_checkpoint
        patch.setattr(script, "save_checkpoint", lambda run: (original(run), seen.append(names(run.folder)))[0])
        folder = train(args)
    assert seen == [
        ["checkpoint-0"],
        ["checkpoint-120"],
        ["checkpoint-120", "checkpoint-202"],
        ["checkpoint-120", "checkpoint-202", "checkpoint-240"],
        ["checkpoint-120", "checkpoint-202", "checkpoint-360"],
    ]
    assert sorted(path.name[:6] for path in folder.iterdir() if "checkpoint" not in path.name) == ["events", "run.js"]


def test_older_checkpoints_go_only_after_the_new_one_is_safe(monkeypatch):
    order = []
    monkeypatch.setattr(script.os, "fsync", lambda _, original=os.fsync: (order.append("flush"), original(_))[1])
    original = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (order.append(path.name), original(path, to))[1])
    folder = train_until(130, SMALL)
    assert names(folder) == ["checkpoint-120"]
    new = order.index(".checkpoint-120.partial")
    # five files and their folder before the rename, the run's folder after it
    assert order[new - 6 : new] == ["flush"] * 6 and order[new + 1 : new + 3] == ["flush", "checkpoint-0"]


@pytest.mark.parametrize("frequency,expected", [(0, []), (200, ["checkpoint-202", "checkpoint-360"])])
def test_checkpoint_frequency_is_a_choice(frequency, expected):
    assert names(train(replace(SMALL, checkpoint_frequency=frequency))) == expected


@pytest.mark.parametrize("num_envs", [2, 7])
def test_games_begin_anew_at_every_boundary_with_a_seed_from_seed_and_step(monkeypatch, num_envs):
    seeds = []
    original = script.LearnerView.reset
    monkeypatch.setattr(
        script.LearnerView, "reset", lambda view, **kwargs: (seeds.append(kwargs["seed"]), original(view, **kwargs))[1]
    )
    args = replace(SMALL, num_envs=num_envs)
    expected = [script.stream_seed(args.seed, script.Stream.ENVIRONMENTS, step) for step in (0, 120, 240, 360)]
    train(args)
    assert seeds == expected and len(set(expected)) == 4
    seeds.clear()
    train(replace(args, checkpoint_frequency=0))
    assert seeds == expected[:1]
    train(replace(args, checkpoint_frequency=0, seed=2))
    assert seeds[1] != expected[0]


def test_games_cut_at_a_boundary_bootstrap_and_are_no_returns(uninterrupted):
    run = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "save_checkpoint", lambda r: run.append(r) or r.folder)
        train(replace(SMALL, checkpoint_frequency=50, total_timesteps=56, injection_step=(), num_envs=1, learning_starts=56))
    replay = run[0].replay
    batch = replay.transitions(np.arange(45, 55), np.zeros(10, int))
    cut = 49 - 45
    assert not batch.dones[cut] and batch.next_observations[cut, :3].any(), "the successor is the cut game's own frame"
    assert not batch.observations[cut + 1, :3].any(), "the next game begins on an empty stack"
    assert len(run[0].log.returns) == 1, "of the game that ended at step 30"


# fork


def fork(checkpoint, args, **changes):
    return train(replace(args, fork=str(checkpoint), **changes))


def test_forked_arms_equal_the_run_continued_and_the_run_that_had_the_injection_from_the_start(uninterrupted):
    baseline, single = replace(SMALL, injection_step=()), replace(SMALL, injection_step=(240, 280))
    original = train_until(250, baseline)
    checkpoint = original / "checkpoint-240"
    assert_same_end(fork(checkpoint, baseline), uninterrupted(baseline))
    arm = fork(checkpoint, baseline, injection_step=(240, 280))
    assert_same_end(arm, uninterrupted(single))
    assert content(arm, END)["/learner/q_network/_extra_state"] == 2


def test_an_injected_runs_checkpoint_leads_to_its_baseline(uninterrupted):
    injected, baseline = (replace(SMALL, injection_step=(240, 280), apply_injection=apply) for apply in (True, False))
    folder = train_until(250, injected)
    assert_same_end(fork(folder / "checkpoint-240", injected, apply_injection=False), uninterrupted(baseline))


def test_a_checkpoint_where_the_norm_decided_leads_to_its_baseline_and_back(uninterrupted):
    injected, baseline = (replace(SMALL, **NORM, apply_injection=apply) for apply in (True, False))
    step = load_checkpoint(uninterrupted(injected) / END).manifest["interventions"][0]
    checkpoint = uninterrupted(injected) / f"checkpoint-{step}"
    assert_same_end(fork(checkpoint, injected, apply_injection=False), uninterrupted(baseline))
    assert_same_end(fork(checkpoint, injected), uninterrupted(injected))


@pytest.mark.parametrize("intervention", ["reset-head", "shrink-perturb"])
def test_arms_with_other_interventions_fork_from_one_checkpoint(uninterrupted, intervention):
    args = replace(SMALL, injection_step=(240,))
    checkpoint = train_until(250, args) / "checkpoint-240"
    assert_same_end(fork(checkpoint, args, intervention=intervention), uninterrupted(replace(args, intervention=intervention)))
    assert_same_end(fork(checkpoint, args, intervention="none"), uninterrupted(replace(args, intervention="none")))


def test_a_fork_after_an_intervention_keeps_its_kind(uninterrupted):
    args = replace(SMALL, injection_step=(202, 280))
    checkpoint = train_until(250, args) / "checkpoint-240"
    for changes in ({"intervention": "reset-head"}, {"injection_optimizer_state": "copy"}, {"freeze_heads": False}):
        flag = f"--{next(iter(changes)).replace('_', '-')}"
        with pytest.raises(UsageError, match=f"after an injection: for another {flag} give an earlier checkpoint"):
            fork(checkpoint, args, **changes)
    with pytest.raises(UsageError, match="but the arguments say none"):
        fork(checkpoint, args, intervention="none")


def test_a_fork_after_as_many_injections_as_the_norm_may_trigger_is_refused(uninterrupted):
    args = replace(SMALL, injection_step=(202, 230))
    checkpoint = train_until(250, args) / "checkpoint-240"
    norm = {"injection_step": (), "injection_trigger": "norm"}
    with pytest.raises(UsageError, match="give a --max-injections of 3 or more"):
        fork(checkpoint, args, **norm, max_injections=2)
    assert content(fork(checkpoint, args, **norm, max_injections=3), END)["/learner/num_interventions"] == 2


def test_a_fork_from_between_two_boundaries_and_after_an_injection(uninterrupted):
    folder = train_until(231, SMALL, send(signal.SIGTERM))
    arm = replace(SMALL, injection_step=(202, 280))
    forked = train_until(235, replace(arm, fork=str(folder / "checkpoint-232")))
    assert names(forked) == ["checkpoint-232"], "it can be resumed from its first step on"
    train(Args(resume=str(forked)))
    assert_same_end(forked, uninterrupted(arm))


def test_a_fork_is_a_run_of_its_own_that_can_be_killed_at_once(uninterrupted):
    origin = train_until(250, SMALL)
    arm = replace(SMALL, injection_step=(202, 280), exp_name="arm", fork=str(origin / "checkpoint-240"))
    before = {path: path.read_bytes() for path in origin.rglob("*") if path.is_file()}
    folder = train_until(245, arm)
    assert folder != origin and "__arm__" in folder.name and names(folder) == ["checkpoint-240"]
    assert before == {path: path.read_bytes() for path in origin.rglob("*") if path.is_file()}
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(replace(arm, fork=None)))
    texts = EventAccumulator(str(folder)).Reload().Tensors("hyperparameters/text_summary")
    shown = [text.tensor_proto.string_val[0].decode() for text in texts]
    assert [text.step for text in texts] == [0, 240] and "|exp_name|arm|" in shown[1] and "checkpoint-240|" in shown[1]


REFUSED_FORKS = {
    "another game": ({"env_id": "PongNoFrameskip-v4"}, "env_id is PongNoFrameskip-v4, there Tiny"),
    "two differences": ({"seed": 2, "batch_size": 8}, "seed is 2, there 1, batch_size is 8, there 4; a fork may differ in exp"),
    "an injection undone": ({"apply_injection": False}, "lies after injections at (202,), but the arguments say none before"),
    "an injection moved into the past": ({"injection_step": (130, 202)}, "say (130, 202) before step 240"),
    "freezing after the fact": ({"freeze_heads": False}, "for another --freeze-heads give an earlier checkpoint"),
    "an end that has passed": ({"total_timesteps": 230}, "give a --total-timesteps of 241 or more"),
    "another ε schedule": ({"exploration_fraction": 0.1}, "over 24: give --exploration-fraction 0.06666666666666667"),
}


@pytest.mark.parametrize("case", REFUSED_FORKS)
def test_a_fork_that_no_single_run_could_have_come_to_is_refused(uninterrupted, case):
    changes, message = REFUSED_FORKS[case]
    folder = uninterrupted(replace(SMALL, total_timesteps=240))
    longer = replace(SMALL, exploration_fraction=24 / 360)
    with pytest.raises(UsageError) as error:
        fork(folder / "checkpoint-240", longer, **changes)
    assert message in str(error.value) and "\n" not in str(error.value) and not Path("runs").exists()


def test_a_longer_run_forked_from_a_finished_one_equals_it(uninterrupted):
    short = replace(SMALL, total_timesteps=240)
    longer = replace(SMALL, exploration_fraction=24 / 360)
    assert_same_end(fork(uninterrupted(short) / "checkpoint-240", longer), uninterrupted(longer))


@pytest.mark.parametrize("changes", [{"num_envs": 7}, {"log_frequency": 100}])
def test_a_finished_run_that_no_longer_run_passes_through_is_not_forked(changes):
    short = replace(SMALL, total_timesteps=240, **changes)
    folder = train(short)
    with pytest.raises(UsageError, match="no multiple of num_envs and log_frequency"):
        fork(folder / "checkpoint-240", short, total_timesteps=480, exploration_fraction=0.05)


def test_the_agent_of_a_forked_run_plays(uninterrupted, monkeypatch, capsys):
    folder = fork(uninterrupted(SMALL) / "checkpoint-202", SMALL, injection_step=(210,), save_model=True)
    monkeypatch.setattr(sys, "argv", ["", "--evaluate", str(folder), "--eval-episodes", "2"])
    script.main()
    assert "scores of 2 games" in capsys.readouterr().out


def test_help_and_readme_list_what_a_fork_may_differ_in():
    source = Path(script.__file__).read_text()
    listed = re.search(r"Only these may differ: ([^\"]+)\"", source).group(1)
    assert re.split(r",\s+", listed) == script.FORKABLE
    readme = Path(script.__file__).with_name("README.md").read_text()
    assert re.findall(r"`(\w+)`", readme[readme.index("Only these may differ") :])[: len(script.FORKABLE)] == script.FORKABLE


def test_on_the_command_line_a_fork_takes_over_what_is_not_given(monkeypatch):
    args = replace(SMALL, env_id="PhoenixNoFrameskip-v4", apply_injection=False, total_timesteps=240, buffer_size=100)
    folder = train(args)
    for flags, changes in {
        "--apply-injection": {"apply_injection": True},
        "--injection-step 210 220 --exp-name b": {"injection_step": (210, 220), "exp_name": "b"},
    }.items():
        checkpoint = str(folder / "checkpoint-202")
        monkeypatch.setattr(sys, "argv", ["", "--fork", checkpoint, *flags.split()])
        assert script.parse_args() == replace(args, fork=checkpoint, **changes)
    script.main()
    (forked,) = set(Path("runs").iterdir()) - {folder}
    assert json.loads((forked / "checkpoint-240/manifest.json").read_text())["args"]["injection_step"] == [210, 220]
    monkeypatch.setattr(sys, "argv", ["", "--resume", str(folder), "--num-envs", "1"])
    with pytest.raises(SystemExit, match=r"^error: --resume goes on as the run was, num_envs cannot change"):
        script.main()
    # a flag at its default value, against a run that differs from the defaults in nothing else
    Path("runs/other").mkdir()
    (Path("runs/other/run.json")).write_text(json.dumps({"run": "", "args": asdict(Args(seed=5))}))
    monkeypatch.setattr(sys, "argv", ["", "--resume", "runs/other", "--seed", "1"])
    with pytest.raises(SystemExit, match=r"^error: --resume goes on as the run was, seed cannot change"):
        script.main()


# signals


@pytest.mark.parametrize(
    "step,number", [(4, signal.SIGTERM), (232, signal.SIGINT), (240, signal.SIGTERM), (356, signal.SIGTERM)]
)
def test_a_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on_exactly(uninterrupted, capsys, step, number):
    folder = train_until(step, SMALL, send(number))
    out = capsys.readouterr().out
    assert number.name in out and names(folder)[-1] == f"checkpoint-{step}"
    assert f"stopped at step {step} of 360, go on with: python {os.path.relpath(script.__file__)} --resume {folder}\n" in out
    assert not (folder / "agent.pt").exists()
    train(replace(SMALL, resume=str(folder)))
    assert_same_end(folder, uninterrupted(SMALL))


@pytest.mark.parametrize("backend,num_envs", [("sb3", 3), ("ale", 1)])
def test_stopped_many_times_between_boundaries_equals_uninterrupted(uninterrupted, backend, num_envs):
    args = replace(SMALL, env_backend=backend, num_envs=num_envs)
    folder = train_until(31, args, send(signal.SIGTERM))
    for step in (110, 121, 202, 203, 290):
        train_until(step, replace(args, resume=str(folder)), send(signal.SIGTERM))
    train(replace(args, resume=str(folder)))
    assert_same_end(folder, uninterrupted(args))


def test_sigusr1_writes_a_checkpoint_and_the_run_goes_on_as_if_nothing_had_been(uninterrupted):
    written = []
    with pytest.MonkeyPatch.context() as patch:
        original = script.save_checkpoint
        patch.setattr(script, "save_checkpoint", lambda run: (written.append(run.step), original(run))[1])
        folder = train_until(78, SMALL, send(signal.SIGUSR1))
    assert written == [0, 78, 120, 202, 240, 360]
    assert_same_end(folder, uninterrupted(SMALL))


def test_a_signal_while_the_games_are_played_again_ends_the_process_at_once(monkeypatch):
    folder = train_until(231, SMALL, send(signal.SIGTERM))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    original = script.LearnerView.load_state_dict
    monkeypatch.setattr(
        script.LearnerView, "load_state_dict", lambda view, state: (send(signal.SIGTERM)(), original(view, state))
    )
    with pytest.raises(SystemExit) as stop:
        train(replace(SMALL, resume=str(folder)))
    assert stop.value.code == 143 and before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_curves_that_never_reached_the_disk_are_an_error(monkeypatch):
    at_step(monkeypatch, 200, lambda: monkeypatch.setattr(script.EventFile, "flush", lambda _: fail()))

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="is complete but for its curves: make room"):
        train(replace(SMALL, checkpoint_frequency=0))


def test_without_periodic_checkpoints_a_signal_still_saves_the_run(uninterrupted):
    args = replace(SMALL, checkpoint_frequency=0)
    folder = train_until(231, args, send(signal.SIGTERM))
    assert names(folder) == ["checkpoint-232"]
    train_until(300, replace(args, resume=str(folder)), send(signal.SIGTERM))
    resumed = train_until(357, replace(args, resume=str(folder)), send(signal.SIGTERM))
    whole = train_until(357, args, send(signal.SIGTERM))
    assert_same_end(resumed, whole, "checkpoint-358")


@contextlib.contextmanager
def signal_in_the_first_evaluation(number):
    """Yields what is added to with each evaluation: its step, and whether there was a checkpoint of step 160 then."""
    original, calls = script.evaluate, []

    def evaluate(*given):
        if not calls:
            os.kill(os.getpid(), number)
        calls.append((given[2], bool(list(Path("runs").glob("*/checkpoint-160")))))
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "evaluate", evaluate)
        yield calls


def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(uninterrupted):
    args = replace(SMALL, eval_frequency=160, eval_episodes=2)
    with signal_in_the_first_evaluation(signal.SIGTERM) as calls:
        folder = train(args)
        assert names(folder) == ["checkpoint-160"]
        train(replace(args, resume=str(folder)))
    assert [step for step, _ in calls] == [160, 160, 320]
    assert_same_end(folder, uninterrupted(args))


def test_sigusr1_during_an_evaluation_is_answered_at_once_and_the_evaluation_repeated(uninterrupted):
    args = replace(SMALL, eval_frequency=160, eval_episodes=2)
    with signal_in_the_first_evaluation(signal.SIGUSR1) as calls:
        folder = train(args)
    assert calls == [(160, False), (160, True), (320, False)]
    assert_same_end(folder, uninterrupted(args))


def test_signal_handlers_are_put_back_and_threads_do_without():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    results = []
    thread = threading.Thread(target=lambda: results.append(train(replace(SMALL, total_timesteps=220))))
    thread.start()
    thread.join()
    assert len(results) == 1
    train_until(130, SMALL, send(signal.SIGTERM))
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize("numbers,status", [(["SIGTERM"], 0), (["SIGINT"], 0), (["SIGTERM"] * 2, 143), (["SIGINT"] * 2, 130)])
def test_exit_status_after_one_signal_and_after_two(numbers, status):
    slow = "s.save_checkpoint = lambda run: (print('saving', flush=True), time.sleep(60))" if len(numbers) == 2 else ""
    code = f"import time, dqn_injection_atari as s\n{slow}\ns.main()"
    flags = "--env-backend ale --buffer-size 500 --checkpoint-frequency 0 --log-frequency 50".split()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(script.__file__).parent)},
    )
    process.stdout.readline()
    for number in numbers:
        process.send_signal(getattr(signal, number))
        if slow:
            while process.poll() is None and "saving" not in process.stdout.readline():
                pass
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and err == ""
    if status == 0:
        assert "dqn_injection_atari.py --resume runs/" in out


# failed writes


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes: writing fails in earnest, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size,curves", [(1_000_000, True), (100, False)])
def test_a_full_disk_is_reported_and_the_run_goes_on_and_tries_again(uninterrupted, capsys, size, curves):
    with contextlib.ExitStack() as disk, pytest.MonkeyPatch.context() as patch:
        at_step(patch, 239, lambda: disk.enter_context(full_disk(size)))
        at_step(patch, 260, disk.close)
        at_step(patch, 250, lambda: present.extend(path.name for path in Path("runs").glob("*/*checkpoint-*")))
        present = []
        folder = train(SMALL)
    out = capsys.readouterr().out
    assert "warning: no checkpoint at step 240 ([Errno 27] File too large" in out and "checkpoint-202 is still good" in out
    assert present == ["checkpoint-202"]
    assert ("the curves cannot be written for now" in out) != curves
    assert_same_end(folder, uninterrupted(SMALL))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("call", [0, 4, 5, 6])
def test_whichever_write_fails_the_previous_checkpoint_stays_good(uninterrupted, call):
    """Five files, their folder and the run's folder are flushed to disk: each of these may be what fails."""
    original, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 1 + 7 * 2 + call + 1:  # after run.json, in the third checkpoint, at 202
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.os, "fsync", fsync)
        folder = train_until(230, SMALL)
    assert load_checkpoint(folder / "checkpoint-120").step == 120
    assert names(folder) == ["checkpoint-120"] + ["checkpoint-202"] * (call == 6)
    train(replace(SMALL, resume=str(folder)))
    assert_same_end(folder, uninterrupted(SMALL))


def test_a_stop_whose_checkpoint_cannot_be_written_is_an_error(monkeypatch):
    with pytest.MonkeyPatch.context() as patch, full_disk(1_000_000):
        at_step(patch, 50, send(signal.SIGTERM))
        with pytest.raises(OSError, match="File too large"):
            train(SMALL)


def test_an_event_file_survives_a_full_disk_and_its_own_removal(tmp_path):
    def points():
        return [(tag, step, value) for tag, step, value in read_events(file.path)]

    file = script.EventFile(tmp_path)
    expected = []
    for k in range(40):
        file.add_scalar("a", k / 2, k)
        expected.append(("a", k, k / 2))
        if 10 < k < 20:
            with full_disk(500), pytest.raises(OSError, match="File too large"):
                file.flush()
        elif k % 3 == 0:
            file.flush()
            assert points() == expected
        if k == 25:
            file.path.unlink()
    file.flush()
    assert points() == expected
    again = script.EventFile(tmp_path, file.memory.getvalue())
    again.add_scalar("a", 7.0, 41)
    again.flush()
    assert event_files(tmp_path) == [again.path] and read_events(again.path) == [*expected, ("a", 41, 7.0)]


@pytest.mark.parametrize("start", [True, False])
def test_a_disk_that_is_full_at_the_start_or_the_end_is_one_line(monkeypatch, start):
    flags = "--env-backend ale --buffer-size 250 --total-timesteps 120 --learning-starts 100 --save-model".split()
    monkeypatch.setattr(sys, "argv", ["", *flags])
    with contextlib.ExitStack() as disk:
        if start:
            disk.enter_context(full_disk(100))
        else:
            original = script.save_agent
            monkeypatch.setattr(script, "save_agent", lambda *given: (original(*given), disk.close()))
            at_step(monkeypatch, 119, lambda: disk.enter_context(full_disk(20_000_000)))
        with pytest.raises(SystemExit) as stop:
            script.main()
    message = str(stop.value.code)
    if start:
        assert message.startswith("error: cannot write run folder ") and "File too large" in message
    else:
        (folder,) = Path("runs").iterdir()
        assert message.endswith("is complete but for its last checkpoint: make room, and --resume it if you can")
        assert names(folder) == ["checkpoint-0"] and (folder / "agent.pt").exists()
        train(Args(resume=str(folder)))
        assert names(folder) == ["checkpoint-120"]


def test_a_video_that_cannot_be_written_does_not_end_the_run(monkeypatch, capsys):
    args = replace(SMALL, eval_frequency=160, eval_episodes=1, capture_video=True, total_timesteps=230)
    at_step(monkeypatch, 100, lambda: Path("runs", os.listdir("runs")[0], "videos").write_text("in the way"))
    folder = train(args)
    assert "warning: no video at step 160" in capsys.readouterr().out
    assert [point for point in read_events(next(folder.glob("events*"))) if point[0] == "eval/episodic_return"]


def test_parameters_that_are_not_finite_never_replace_a_good_checkpoint(monkeypatch):
    original = Learner.update

    def update(self, batch, count=1):
        for parameter in self.q_network.parameters():
            parameter.data.fill_(float("nan"))
        return original(self, batch, count)

    at_step(monkeypatch, 190, lambda: monkeypatch.setattr(Learner, "update", update))
    with pytest.raises(FloatingPointError, match="not finite from step 192"):
        train(replace(SMALL, log_frequency=300))
    assert names(next(Path("runs").iterdir())) == ["checkpoint-120"]


# damaged files


@pytest.fixture
def two_checkpoints(uninterrupted):
    """A run's folder with checkpoint-202 and checkpoint-360, copied, since tests damage it."""
    return Path(shutil.copytree(uninterrupted(SMALL), "runs/damaged"))


def damages(folder, other, rng):
    """(name, damage) of at least 200 ways to damage the checkpoint in `folder`; each returns how to undo it."""
    files = [*script.CHECKPOINT_FILES, script.CHECKSUMS]

    def patched(path, offset, change):
        def damage():
            with open(path, "r+b") as file:
                file.seek(offset)
                old = file.read(1)
                file.seek(offset)
                file.write(bytes([old[0] ^ change]))
            return lambda: patched(path, offset, change)[1]()

        return f"{path.name}: bit flipped at {offset}", damage

    def cut(path, length):
        def damage():
            content = path.read_bytes()
            os.truncate(path, length)
            return lambda: path.write_bytes(content)

        return f"{path.name}: cut to {length} bytes", damage

    def replaced(path, by, name):
        def damage():
            path.rename("aside")
            by(path)

            def undo():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                Path("aside").rename(path)

            return undo

        return f"{path.name}: {name}", damage

    for path in (folder / name for name in files):
        size = path.stat().st_size
        offsets = [0, size // 2, size - 1, *(rng.randrange(size) for _ in range(21))]
        yield from (patched(path, offset, 1 << rng.randrange(8)) for offset in offsets)
        yield from (cut(path, length) for length in (0, 1, size - 1, *(rng.randrange(size) for _ in range(5))))
        yield replaced(path, lambda _: None, "deleted")
        yield replaced(path, Path.mkdir, "a folder")
        yield replaced(path, lambda path: path.write_bytes(b""), "empty")
        yield replaced(path, lambda path, size=size: path.write_bytes(rng.randbytes(min(size, 10_000))), "noise")
        yield replaced(path, lambda path: shutil.copy(other / path.name, path), "another checkpoint's")
        yield replaced(path, lambda path: path.write_bytes(Path("aside").read_bytes() + b"\0"), "a byte too long")
    for one, two in itertools.permutations(files, 2):
        yield replaced(folder / one, lambda path, two=two: shutil.copy(folder / two, path), f"what should be {two}")


def test_a_damaged_checkpoint_is_refused_by_name_and_reason_whatever_the_damage(two_checkpoints, capsys):
    rng = random.Random(0)
    newest, older = two_checkpoints / END, two_checkpoints / "checkpoint-202"
    cases = 0
    for name, damage in damages(newest, older, rng):
        undo = damage()
        with pytest.raises(UsageError) as error:
            load_checkpoint(newest)
        message = str(error.value)
        assert (
            message.startswith(f"{newest} cannot be read as a checkpoint (") and "\n" not in message and len(message) < 300
        ), name
        cases += 1
        if cases % 20 == 0:
            capsys.readouterr()
            assert script.newest_good_checkpoint(two_checkpoints).path == older, name
            assert f"warning: {message}; falling back to an older one\n" == capsys.readouterr().out
        undo()
    assert cases >= 200
    assert load_checkpoint(newest).step == 360, "every damage was undone"


@pytest.mark.parametrize("damage", ["flip", "delete", "swap names"])
def test_resume_falls_back_to_the_older_good_checkpoint_says_so_and_ends_the_same(
    uninterrupted, two_checkpoints, capsys, damage
):
    newest, older = two_checkpoints / END, two_checkpoints / "checkpoint-202"
    state = newest / "state.pt"
    if damage == "flip":
        content = bytearray(state.read_bytes())
        content[len(content) // 3] ^= 4
        state.write_bytes(content)
    elif damage == "delete":
        state.unlink()
    else:
        newest.rename("aside")
        older.rename(newest)
        Path("aside").rename(older)
        with pytest.raises(UsageError, match="holds no good checkpoint to go on from: start the run again"):
            train(replace(SMALL, resume=str(two_checkpoints)))
        out = capsys.readouterr().out
        assert "checkpoint-360 holds step 202, it was renamed" in out and "checkpoint-202 holds step 360" in out
        return
    train(replace(SMALL, resume=str(two_checkpoints)))
    out = capsys.readouterr().out
    assert f"warning: {newest} cannot be read as a checkpoint (" in out and f"resumed at step 202 from {older}" in out
    assert_same_end(two_checkpoints, uninterrupted(SMALL))
    assert not list(two_checkpoints.glob(".*"))


def test_checkpoints_that_lie_ahead_survive_a_fallback(uninterrupted, two_checkpoints, monkeypatch):
    """A newer one may be unreadable for a moment only: it goes when the run has come past it, not before."""
    with pytest.MonkeyPatch.context() as patch:
        original = script.load_checkpoint

        def unreadable(path):
            if path.name == END:
                raise UsageError("the network is down")
            return original(path)

        patch.setattr(script, "load_checkpoint", unreadable)
        train_until(210, replace(SMALL, resume=str(two_checkpoints)), send(signal.SIGTERM))
    assert names(two_checkpoints) == ["checkpoint-202", "checkpoint-210", "checkpoint-360"]
    train(replace(SMALL, resume=str(two_checkpoints)))
    assert_same_end(two_checkpoints, uninterrupted(SMALL))


def test_another_runs_checkpoint_is_refused(uninterrupted, two_checkpoints, capsys):
    for foreign in (uninterrupted(replace(SMALL, seed=2)), train(SMALL)):
        shutil.rmtree(two_checkpoints / END)
        shutil.copytree(foreign / END, two_checkpoints / END)
        assert script.newest_good_checkpoint(two_checkpoints).step == 202
        assert f"{two_checkpoints / END} belongs to another run" in capsys.readouterr().out


def test_a_damaged_run_json_never_leads_to_a_different_run(two_checkpoints, monkeypatch):
    played = []
    rng = random.Random(1)
    path = two_checkpoints / "run.json"
    content = path.read_bytes()
    refused = 0
    for _ in range(100):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            monkeypatch.setattr(script, "training_loop", lambda run, _: played.append(run))
            train(Args(resume=str(two_checkpoints)))
            assert played[-1].args == SMALL and played[-1].step == 360
        except UsageError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused + len(played) == 100 and refused > 50 and played


@pytest.mark.parametrize("content", ["nothing", "empty folder", "file", "agent", "other format"])
def test_what_is_no_checkpoint_is_refused_by_name(two_checkpoints, monkeypatch, content):
    path = Path("given")
    if content == "empty folder":
        path.mkdir()
    elif content == "file":
        path.write_bytes(b"no checkpoint")
    elif content == "agent":
        torch.save({"q_network": {}}, path)
    elif content == "other format":
        shutil.copytree(two_checkpoints / END, path)
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
        seal(path)
    with pytest.raises(
        UsageError, match="format is 99" if content == "other format" else r"^given cannot be read as a checkpoint \(.+\)"
    ):
        train(replace(SMALL, fork=str(path)))
    for flag in ("--fork", "--resume"):
        monkeypatch.setattr(sys, "argv", ["", flag, str(path)])
        with pytest.raises(SystemExit, match=r"^error: given") as stop:
            script.main()
        assert "\n" not in str(stop.value.code)
    assert [folder.name for folder in Path("runs").iterdir()] == ["damaged"]


def seal(checkpoint):
    """Makes the checksums right again, as someone would who tampers with a checkpoint."""
    (checkpoint / script.CHECKSUMS).write_text(script.checksums(checkpoint))


def test_loading_a_checkpoint_runs_no_code(two_checkpoints):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, ("owned",))

    torch.save(Payload(), two_checkpoints / END / "state.pt")
    seal(two_checkpoints / END)
    assert script.newest_good_checkpoint(two_checkpoints).step == 202
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    "damage", ["replay cut", "replay empty", "replay not zstd", "no learner", "no generator", "shape", "games", "seed"]
)
def test_a_checkpoint_that_fits_its_checksums_but_not_this_script_is_refused_before_anything_changes(two_checkpoints, damage):
    path = two_checkpoints / END
    state = torch.load(path / "state.pt", weights_only=True)
    replay = (path / "replay.zst").read_bytes()
    if damage == "replay cut":
        replay = replay[: len(replay) // 2]
    elif damage == "replay empty":
        replay = zstandard.ZstdCompressor().compress(b"too short")
    elif damage == "replay not zstd":
        replay = b"no replay"
    elif damage == "no learner":
        del state["learner"]
    elif damage == "no generator":
        del state["replay"]["generator"]
    elif damage == "shape":
        state["learner"]["q_network"]["encoder.0.weight"] = torch.zeros(3)
    elif damage == "games":
        state["envs"]["actions"] = torch.zeros(5, 7, dtype=torch.uint8)
    else:
        state["envs"]["seed"] += 1
    (path / "replay.zst").write_bytes(replay)
    torch.save(state, path / "state.pt")
    seal(path)
    before = {file: file.read_bytes() for file in two_checkpoints.rglob("*") if file.is_file()}
    for given in ({"resume": str(two_checkpoints)}, {"fork": str(path), "total_timesteps": 720, "exploration_fraction": 0.05}):
        with pytest.raises(
            UsageError, match=r"cannot be read as this run's checkpoint \(.+\): move it away, and go on from another$"
        ) as error:
            train(replace(SMALL, **given))
        assert "\n" not in str(error.value)
    assert before == {file: file.read_bytes() for file in two_checkpoints.rglob("*") if file.is_file()}
    assert [folder.name for folder in Path("runs").iterdir()] == ["damaged"]


@pytest.mark.parametrize("backend", ["sb3", "ale"])
def test_a_run_killed_before_its_first_checkpoint_begins_anew_in_place(uninterrupted, monkeypatch, backend):
    args = replace(SMALL, env_backend=backend)
    with monkeypatch.context() as patch:
        patch.setattr(script.RunLog, "close", lambda log: log.bar.close())
        patch.setattr(script, "save_checkpoint", lambda run: kill())
        with pytest.raises(Killed):
            train(args)
    (folder,) = Path("runs").iterdir()
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(args))


def test_a_run_folder_appears_with_everything_in_it_or_not_at_all(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "flush_to_disk", lambda _: kill())
        script.create_run_folder(SMALL, "number")
    assert not list(Path("runs").glob("[!.]*"))
    folder = script.create_run_folder(SMALL, "another")
    assert script.read_args(folder / "run.json") == (SMALL, {"run": "another", "args": json.loads(json.dumps(asdict(SMALL)))})


def test_a_run_without_checkpoints_but_with_curves_cannot_be_resumed(two_checkpoints):
    for path in two_checkpoints.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(UsageError, match="runs/damaged holds no checkpoint to go on from: start the run again without"):
        train(replace(SMALL, resume=str(two_checkpoints)))


# SIGKILL


@pytest.mark.parametrize("owner,name,call", [(os, "truncate", 1), (Path, "rename", 1), (Path, "rename", 2), (os, "fsync", 5)])
def test_killed_while_files_are_exchanged(uninterrupted, monkeypatch, owner, name, call):
    """Between writing the resumed curves and removing the old ones; around the renaming of checkpoints."""
    folder = train_until(130, SMALL)
    original, calls = getattr(owner, name), []

    def killed(*given, **options):
        calls.append(given)
        if len(calls) == call:
            raise Killed
        return original(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.RunLog, "close", lambda log: log.bar.close())
        patch.setattr(script.shutil, "rmtree", lambda *given, **options: None)  # nor does it tidy up
        patch.setattr(owner, name, killed)
        other_process = os.getpid() + 1  # so that its curves have a file of their own, also within the same second
        patch.setattr(script.os, "getpid", lambda: other_process)
        with pytest.raises(Killed):
            train(replace(SMALL, resume=str(folder)))
    assert len(calls) == call
    train(replace(SMALL, resume=str(folder)))
    assert_same_end(folder, uninterrupted(SMALL))
    assert not list(folder.glob(".*")) and len(event_files(folder)) == 1


@pytest.mark.parametrize("backend,moments", [("sb3", ["beginning", "writing"]), ("ale", ["injection", "resuming"])])
def test_a_killed_process_resumed_equals_one_that_nobody_touched(backend, moments):
    """The short form of benchmarks/kill_test.py."""
    where, different = kill_and_compare(backend, moments, random.Random(0))
    assert different == [] and where["(had ended)"] < 2, where
