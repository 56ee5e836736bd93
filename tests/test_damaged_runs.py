"""Runs with damaged files, processes that are killed, and folders that are renamed, moved or deleted."""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from interruptions import (
    END,
    LATER,
    PLAYING,
    SMALL,
    all_files,
    assert_same_end,
    at_step,
    copy_of,
    flags_of,
    killed_in,
    main,
    names,
    new_folder,
    send,
    uninterrupted_runs,  # noqa: F401 (a fixture)
    until_signal,
)

import dqn_injection_atari as script
import support.runs as runs
from benchmarks import kill_test
from dqn_injection_atari import Args, train
from support.checkpoints import (
    CHECKSUMS,
    checksums,
    create_run_folder,
    save_checkpoint,
)
from support.run_log import Curves, RunLog
from support.runs import find_origin
from support.usage import UsageError


@pytest.mark.slow
def test_resume_falls_back_to_the_older_good_checkpoint_says_so_and_ends_the_same(uninterrupted, capsys):
    """The newer one may be unreadable for a moment only: it goes once the run has come past it."""
    folder = copy_of(uninterrupted(SMALL), "damaged")
    newest, older = folder / END, folder / "checkpoint-142"
    damaged = bytearray((newest / "state.pt").read_bytes())
    damaged[len(damaged) // 3] ^= 4
    (newest / "state.pt").write_bytes(damaged)
    until_signal(150, Args(resume=str(folder)))
    out = capsys.readouterr().out
    assert (
        f"warning: {newest} cannot be read as a checkpoint (" in out
        and f"resumed at step 142 from {older}" in out
    )
    assert names(folder) == ["checkpoint-142", "checkpoint-150", END]
    train(Args(resume=str(folder)))
    assert "resumed at step 150" in capsys.readouterr().out
    assert_same_end(folder, uninterrupted(SMALL))
    assert not list(folder.glob(".*"))


class Nothing:
    def state_dict(self):
        return {}


def bare_run(args=SMALL, checkpoint=True):
    """A run's folder as far as `find_origin` looks at it."""
    identity = {"run": "1f2e3d", "args": json.loads(json.dumps(asdict(args)))}
    folder = create_run_folder(Path("runs/bare"), identity)
    if checkpoint:
        save_checkpoint(folder, 240, {"learner": Nothing()}, identity)
    return folder, identity


def test_a_damaged_run_json_never_leads_to_a_different_run():
    folder, identity = bare_run()
    path = folder / "run.json"
    whole = path.read_bytes()
    rng = random.Random(1)
    refused = found = 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with contextlib.ExitStack() as stack:
            try:
                origin = find_origin(str(folder), None, stack)
            except UsageError as error:
                assert "\n" not in str(error)
                refused += 1
            else:
                assert (origin.args, origin.run_id, origin.checkpoint.step) == (
                    identity["args"],
                    "1f2e3d",
                    240,
                )
                found += 1
    assert refused > 50 and found > 50


def test_a_run_with_curves_but_without_checkpoints_cannot_be_resumed():
    folder, _ = bare_run(checkpoint=False)
    with contextlib.ExitStack() as stack:
        assert find_origin(str(folder), None, stack).checkpoint is None, "it begins anew"
    log = RunLog(folder, 0, 240)
    log.scalar("charts/epsilon", 0.5, 40)
    log.close()
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(
            UsageError,
            match="runs/bare holds no checkpoint to go on from: start the run again without --resume",
        ),
    ):
        find_origin(str(folder), None, stack)


def test_another_runs_checkpoint_is_not_gone_on_from(uninterrupted, capsys):
    folder, _ = bare_run(checkpoint=False)
    shutil.copytree(uninterrupted(SMALL) / END, folder / END)
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(UsageError, match="runs/bare holds no good checkpoint"),
    ):
        find_origin(str(folder), None, stack)
    assert f"{folder / END} belongs to another run" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["nothing", "empty folder", "file", "agent", "other format"])
def test_what_is_no_checkpoint_is_refused_by_name(monkeypatch, given):
    path = Path("given")
    if given == "empty folder":
        path.mkdir()
    elif given == "file":
        path.write_bytes(b"no checkpoint")
    elif given == "agent":
        torch.save({"q_network": {}}, path)
    elif given == "other format":
        folder, _ = bare_run()
        shutil.copytree(folder / END, path)
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}), encoding="utf-8")
        (path / CHECKSUMS).write_text(checksums(path), encoding="utf-8")
        shutil.rmtree("runs")
    for flag in ("--fork", "--resume"):
        message = main(monkeypatch, flag, str(path))
        assert message.startswith("error: given") and "cannot be read as" in message and "\n" not in message
        assert given != "other format" or flag == "--resume" or "its format is 99" in message
    assert not Path("runs").exists()


def without(state, *keys):
    for key in keys[:-1]:
        state = state[key]
    del state[keys[-1]]


FOREIGN_STATES = {
    "no learner": lambda state: without(state, "learner"),
    "no generator": lambda state: without(state, "replay", "generator"),
    "other layers": lambda state: state["learner"]["q_network"].update({"encoder.0.weight": torch.zeros(3)}),
    "more games": lambda state: state["envs"].update(actions=torch.zeros(5, 7, dtype=torch.uint8)),
    "other games": lambda state: state["envs"].update(seed=state["envs"]["seed"] + 1),
}


@pytest.mark.slow
def test_a_checkpoint_that_fits_its_checksums_but_not_this_script_is_refused_before_anything_changes(
    uninterrupted,
):
    folder = copy_of(uninterrupted(SMALL), "foreign")
    path = folder / END
    for name, change in FOREIGN_STATES.items():
        state = torch.load(uninterrupted(SMALL) / END / "state.pt", weights_only=True)
        change(state)
        torch.save(state, path / "state.pt")
        (path / CHECKSUMS).write_text(checksums(path), encoding="utf-8")
        before = all_files(folder)
        given = [{"resume": str(folder)}, {"fork": str(path), **LATER}]
        for args in given[: 1 if "games" in name else 2]:
            with pytest.raises(
                UsageError, match=r"read as this run's checkpoint \(.+\): go on with the script, the packages"
            ) as error:
                train(replace(SMALL, **args))
            assert "\n" not in str(error.value)
        assert before == all_files(folder)
    assert [folder.name for folder in Path("runs").iterdir()] == ["foreign"]


# SIGKILL


@pytest.mark.slow
def test_killed_while_files_are_exchanged(uninterrupted):
    """Before and after a checkpoint appears, while it is flushed, and as a resumed run begins its curves."""
    killed_in(
        Path, "rename", 4, SMALL
    )  # run.json, checkpoint-0, checkpoint-130 and then the removal of checkpoint-0
    folder = new_folder(set())
    assert names(folder) == ["checkpoint-0", "checkpoint-130"]
    resumed = Args(resume=str(folder))
    killed_in(Path, "rename", 1, resumed)
    assert names(folder) == ["checkpoint-0", "checkpoint-130"] and list(
        folder.glob(".checkpoint-142.partial")
    )
    killed_in(os, "fsync", 5, resumed)
    killed_in(Curves, "_new_file", 1, resumed)
    killed_in(runs, "save_checkpoint", 2, resumed)
    train(resumed)
    assert_same_end(folder, uninterrupted(SMALL))
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_a_killed_process_resumed_equals_one_that_nobody_touched(monkeypatch):
    """The short form of benchmarks/kill_test.py."""
    flags = " ".join(kill_test.FLAGS).replace("--checkpoint-frequency 200", "--checkpoint-frequency 800")
    monkeypatch.setattr(kill_test, "FLAGS", [*flags.split(), *"--train-frequency 20 --head-width 16".split()])
    where, different = kill_test.kill_and_compare("ale", ["injection"], random.Random(0))
    assert different == [] and not where["(had ended)"], where


# a folder that is moved, or goes


MOVED = replace(PLAYING, total_timesteps=80, checkpoint_frequency=20, log_frequency=10)


def moved_at(patch, step, to):
    """Has a run's folder renamed once it comes to a step; the returned list gets the name that it had."""
    before = []

    def move():
        before.append(new_folder(set()))
        before[0].rename(to)

    at_step(patch, step, move)
    return before


@pytest.mark.slow
def test_a_run_whose_folder_is_renamed_goes_on_in_it_and_names_it_as_it_is_now(
    uninterrupted, monkeypatch, capsys
):
    """Also where another folder gets its old name."""
    to = "else where"
    before = moved_at(monkeypatch, 30, to)
    at_step(monkeypatch, 34, lambda: before[0].mkdir())
    at_step(monkeypatch, 64, send(signal.SIGTERM))
    args = replace(MOVED, eval_frequency=50, eval_episodes=1, capture_video=True, save_model=True)
    assert train(args) == Path(to)
    assert list(before[0].iterdir()) == [], "nothing of it is written where it was"
    assert names(Path(to)) == ["checkpoint-64"] and (Path(to) / "videos/step-50.mp4").exists()
    printed = capsys.readouterr().out.partition("go on with: ")[2].strip()
    assert main(monkeypatch, *shlex.split(printed)[2:]) == 0
    assert f"--evaluate {shlex.quote(to)}\n" in capsys.readouterr().out and (Path(to) / "agent.pt").exists()
    before[0].rmdir()
    assert_same_end(Path(to), uninterrupted(replace(args, capture_video=False)), "checkpoint-80")


def test_a_folder_that_is_moved_while_a_checkpoint_is_written_has_it_all_the_same(monkeypatch, capsys):
    original, moved = runs.save_checkpoint, []

    def save(folder, step, *given):
        if step == 20 and not moved:
            moved.append(folder.rename("runs/renamed"))
        return original(folder, step, *given)

    monkeypatch.setattr(runs, "save_checkpoint", save)
    assert train(replace(MOVED, total_timesteps=30)) == Path("runs/renamed")
    assert os.listdir("runs") == ["renamed"] and names(Path("runs/renamed")) == ["checkpoint-30"]
    assert "no checkpoint" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_that_is_deleted_is_not_made_anew_and_the_run_says_so_and_ends_with_an_error(
    monkeypatch, capsys
):
    at_step(monkeypatch, 30, lambda: shutil.rmtree(new_folder(set())))
    at_step(monkeypatch, 74, send(signal.SIGTERM))
    message = main(
        monkeypatch, *flags_of(replace(MOVED, eval_frequency=50, eval_episodes=1, capture_video=True))
    )
    out = capsys.readouterr().out
    folder = out.partition("curves in ")[2].partition("\n")[0]
    assert os.listdir("runs") == []
    fix = "if it was moved to another disk, stop this run and --resume it there"
    gone = f"({folder} is no longer there)"
    assert f"warning: the curves cannot be written for now {gone}: {fix}, training goes on\n" in out
    for step in (40, 60):
        lost = f"the last one, checkpoint-{20}, was in it"
        assert f"warning: no checkpoint at step {step} {gone}: {fix}, the run will try again; {lost}\n" in out
    assert f"warning: no video at step 50 {gone}\n" in out
    assert (
        message
        == f"error: stopped at step 74 without a checkpoint {gone}: the last one, checkpoint-20, was in it"
    )


@pytest.mark.parametrize("frequency", [0, 20])
def test_a_complete_run_whose_folder_was_deleted_is_no_success(monkeypatch, frequency):
    at_step(monkeypatch, 30, lambda: shutil.rmtree(new_folder(set())))
    message = main(monkeypatch, *flags_of(replace(MOVED, total_timesteps=40, checkpoint_frequency=frequency)))
    assert (
        message.startswith("error: runs/") and "is no longer there: the run is complete, and all" in message
    )
    assert os.listdir("runs") == []


@pytest.mark.slow
def test_a_real_run_is_renamed_stopped_and_gone_on_with_as_its_last_line_says(request):
    flags = "--env-backend ale --buffer-size 500 --checkpoint-frequency 0 --learning-starts 500"
    flags += " --log-frequency 50"
    process = subprocess.Popen(
        [sys.executable, "-u", script.__file__, *flags.split()], stdout=subprocess.PIPE, encoding="utf-8"
    )
    request.addfinalizer(process.kill)
    process.stdout.readline()
    new_folder(set()).rename("runs/a new name")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    command = out.partition("go on with: ")[2].strip()
    assert process.returncode == 143 and command.endswith("--resume 'runs/a new name'")
    assert os.listdir("runs") == ["a new name"]
    process = subprocess.Popen(
        command, shell=True, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )
    request.addfinalizer(lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
    assert "curves in runs/a new name" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
