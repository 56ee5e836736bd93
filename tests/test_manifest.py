"""A sweep's folder: what was asked, what became of every run, and how far its log says it is."""

import dataclasses
import json
import resource
from pathlib import Path

import pytest

from analysis.manifest import (
    Change,
    Manifest,
    Progress,
    begin,
    last_lines,
    measured_speed,
    newest,
    read_asked,
    read_manifest,
    read_progress,
    refuse_another,
)
from support.jobs import STARTED
from support.usage import UsageError

HERE = Path()
ASKED: dict = {"env_ids": ("A",), "seeds": (1,), "arms": {}, "grid": [], "flags": [], "from_checkpoint": None, "steps": None}
ASKED |= {"threads": 2}
LOG = f"""{STARTED} node3: python script --seed 1
PhoenixNoFrameskip-v4 × 8 (ale) on cpu with 2 threads, curves in runs/x
resumed at step 18,000 from runs/x/checkpoint-18000
step 21,000 of 30,000, 1,139 SPS, 01:04 left, ε 0.01, return 180
step 24,000 of 30,000, 98 SPS, 1:00:04 left, ε 0.01, return -
step 25,000: checkpoint-25000, 69 MB in 0.3 s
"""


def change(run="x", state="finished", speed=None):
    return Change(1.5, run, "none", 1, "A", state, 10, 1, "node3", "cpu", speed, 0.25, "abc", "runs/x")


def test_changes_are_read_back_in_their_order():
    changes = [change(state="queued"), change("y"), change(speed=12.5)]
    for each in changes:
        Manifest(HERE).add(each)
    assert read_manifest(HERE) == changes and newest(changes) == {"x": changes[2], "y": changes[1]}
    names = "time run arm seed game state step attempt host device steps_per_second hours commit folder".split()
    assert [list(json.loads(line)) for line in Path("manifest.jsonl").read_text(encoding="utf-8").splitlines()] == [names] * 3


@pytest.mark.parametrize("tail", [b'{"time": 1.5, "ru', bytes(4_096), b'{"time": 1.5' + bytes(7), b"\xff\xfe"])
def test_a_line_that_a_kill_or_a_power_cut_has_torn_is_passed_over_and_the_next_one_is_whole(tail):
    Manifest(HERE).add(change())
    with open("manifest.jsonl", "ab") as file:
        file.write(tail)
    assert read_manifest(HERE) == [change()]
    Manifest(HERE).add(change("y"))
    assert read_manifest(HERE) == [change(), change("y")]


def test_of_a_line_that_did_not_fit_on_the_disk_nothing_is_left():
    manifest = Manifest(HERE)
    manifest.add(change())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (manifest.path.stat().st_size + 20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            manifest.add(change("y"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not manifest.path.read_text(encoding="utf-8").endswith("\n")
    manifest.add(change("z"))
    assert read_manifest(HERE) == [change(), change("z")]


def test_a_damaged_manifest_is_refused():
    Path("manifest.jsonl").write_text("[]\n", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read as a sweep's manifest"):
        read_manifest(HERE)


def test_the_measured_speed_is_the_mean_over_finished_runs():
    changes = [change(speed=10.0), change(speed=20.0), change(state="killed", speed=900.0), change()]
    assert measured_speed(changes) == 15.0 and measured_speed(changes[2:]) is None


def test_a_folder_keeps_what_was_asked_and_refuses_what_is_not_that():
    folder = HERE / "x"
    refuse_another(folder, ASKED)
    begin(folder, ASKED)
    refuse_another(folder, ASKED)
    begin(folder, ASKED)
    assert read_asked(folder).env_ids == ["A"] and {"runs", "logs"} < {path.name for path in folder.iterdir()}
    with pytest.raises(UsageError, match=r"\(steps is 5, there None; seeds is \[1, 2\], there \[1\]\)|seeds is .*steps is 5"):
        refuse_another(folder, ASKED | {"seeds": (1, 2), "steps": 5})
    (folder / "sweep.json").write_text("{", encoding="utf-8")
    for attempt in (lambda: refuse_another(folder, ASKED), lambda: read_asked(folder)):
        with pytest.raises(UsageError, match="cannot be read as what a sweep was asked"):
            attempt()


def test_a_folder_that_a_killed_sweep_has_only_made_is_taken_over():
    for name in ("runs", "logs"):
        Path("x", name).mkdir(parents=True)
    Path("x/sweep.json.partial").write_text("{", encoding="utf-8")
    for hidden in ("x/.DS_Store", "x/._runs", "x/runs/.DS_Store"):
        Path(hidden).touch()
    refuse_another(Path("x"), ASKED)
    begin(Path("x"), ASKED)
    assert read_asked(Path("x")).seeds == [1] and not Path("x/sweep.json.partial").exists()


def test_progress_is_what_the_newest_attempt_has_said():
    log = Path("x.log")
    assert read_progress(log, 0) == Progress()
    log.write_text(LOG, encoding="utf-8")
    found = read_progress(log, 0)
    assert found == Progress("node3", "cpu", 18_000, 25_000, 30_000, "98", "1:00:04", "-")
    assert str(found) == "step 25,000 of 30,000, 98 SPS, 1:00:04 left, return -"
    offset = log.stat().st_size
    assert read_progress(log, offset) == Progress(), "nothing of the attempt before"
    with open(log, "a", encoding="utf-8") as file:
        file.write(LOG.splitlines()[0] + "\n")
    assert read_progress(log, offset) == Progress("node3")
    with open(log, "a", encoding="utf-8") as file:
        file.write(
            "forked at step 5 from runs/y/checkpoint-5\n"
            + "noise\n" * 10_000
            + "step 7 of 9, 3 SPS, 00:01 left, ε 1.00, return 4\n"
        )
    late = read_progress(log, offset)
    assert dataclasses.astuple(late) == ("node3", None, 5, 7, 9, "3", "00:01", "4")
    assert len(last_lines(log, offset, 20_000)) == 10_003, "nothing of the attempt before"
    assert (
        last_lines(log, offset, 1) == ["step 7 of 9, 3 SPS, 00:01 left, ε 1.00, return 4"]
        and last_lines(Path("y.log"), 0) == []
    )
