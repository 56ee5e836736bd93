"""progress.json: what it holds of a run, when it is written, and that nothing depends on it."""

import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import BRIEF
from interruptions import full_disk

from dqn_injection_atari import train
from support import progress
from support.machine import HeldFolder
from support.progress import ProgressFile
from support.run_log import RunLog

HERE = Path()


def progress_in(folder=HERE):
    return json.loads((folder / "progress.json").read_text(encoding="utf-8"))


def test_a_process_says_who_it_is_where_it_began_and_how_far_it_is():
    file = ProgressFile(HeldFolder(HERE), 20, 100)
    file.note({"step": 60, "steps_per_second": 12.5, "return": -3.0, "device": "cpu"})
    assert progress_in() == {
        **{
            "step": 60,
            "total_timesteps": 100,
            "steps_per_second": 12.5,
            "return": -3.0,
            "device": "cpu",
            "first": 20,
        },
        **{
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": file.state["began"],
            "time": file.state["time"],
        },
    }
    assert time.time() - 60 < file.state["began"] <= file.state["time"] <= time.time()


def test_it_is_written_every_few_seconds_however_often_something_is_noted(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = ProgressFile(HeldFolder(HERE), 0, 100)
    seen = []
    for step in range(10):
        file.note({"step": step})
        seen.append(progress_in()["step"])
        now[0] += 0.5
    assert seen == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    file.write()
    assert progress_in()["step"] == 9, "at once where it is asked for"


def test_it_follows_a_folder_that_is_renamed_and_makes_none_of_the_old_name():
    before, after = Path("before"), Path("after")
    before.mkdir()
    file = ProgressFile(HeldFolder(before), 0, 100)
    before.rename(after)
    file.write()
    assert progress_in(after)["step"] == 0 and not before.exists()


def test_where_it_cannot_be_written_what_was_there_stays_and_the_run_goes_on(monkeypatch):
    ProgressFile(HeldFolder(HERE), 0, 100).write()
    with full_disk(10):
        ProgressFile(HeldFolder(HERE), 50, 100).write()
    ProgressFile(HeldFolder(Path("gone")), 0, 100).write()
    monkeypatch.setattr(progress.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ProgressFile(HeldFolder(HERE), 60, 100).write()
    assert progress_in()["step"] == 0 and not Path("gone").exists(), (
        "a file that is whole takes its place, or none does"
    )


def test_a_log_notes_steps_speed_and_return_as_it_says_them():
    log = RunLog(HERE, 0, 100)
    log.interval(40, 1.0, {})
    assert (
        progress_in()["step"] == 40
        and progress_in()["steps_per_second"] > 0
        and progress_in()["return"] is None
    )
    log.progress.PAUSE_SECONDS = 0
    log.games({"_episode": [True, True], "episode": {"r": np.array([3.0, 6.0]), "l": [5, 5]}}, 40)
    log.interval(60, 1.0, {})
    assert (progress_in()["step"], progress_in()["return"]) == (60, 4.5)
    log.progress.PAUSE_SECONDS = 1_000
    log.interval(80, 1.0, {})
    log.close()
    assert progress_in()["step"] == 80, "what was noted last is there in the end"


def test_a_run_says_how_far_it_is_from_its_first_moment_to_its_end(monkeypatch):
    written = []
    original = ProgressFile.write
    monkeypatch.setattr(
        ProgressFile, "write", lambda file: (original(file), written.append(progress_in(file.place.here())))
    )
    short = {
        "total_timesteps": 120,
        "learning_starts": 120,
        "checkpoint_frequency": 60,
        "plasticity_frequency": 0,
    }
    folder = train(replace(BRIEF, **short))
    first, last = written[0], progress_in(folder)
    assert (first["step"], first["total_timesteps"], first["device"], first["steps_per_second"]) == (
        0,
        120,
        "cpu",
        None,
    )
    assert {0, 60, 120} <= {each["step"] for each in written}, "at each checkpoint"
    assert last["step"] == 120 and last["steps_per_second"] > 0 and last["return"] is not None
    assert not list(folder.glob(".*"))
