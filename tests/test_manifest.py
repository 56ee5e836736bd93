"""A sweep's folder: what was asked, what became of every run, and how far it says it is."""

import json
import math
import os
import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from orchestration import manifest
from orchestration.manifest import (
    Change,
    Manifest,
    Progress,
    begin,
    commit,
    last_lines,
    measured_speed,
    read_asked,
    read_manifest,
    read_progress,
    refuse_another,
)
from support.usage import UsageError

HERE = Path()
ASKED: dict = {
    "env_ids": ("A",),
    "seeds": (1,),
    "arms": {},
    "grid": [],
    "flags": [],
    "from_checkpoint": None,
    "steps": None,
}
ASKED |= {"threads": 2}
SAID = {
    **{"step": 25_000, "total_timesteps": 30_000, "steps_per_second": 98.4, "return": -3.2, "device": "cpu"},
    **{"host": "node3", "pid": 42, "began": 1.5, "first": 18_000, "time": 9.5},
}


def change(run="x", state="finished", speed=None):
    return Change(1.5, run, "none", 1, "A", state, 10, 1, "node3", "cpu", speed, 0.25, "abc", "runs/x")


def test_changes_are_read_back_in_their_order():
    changes = [change(state="queued"), change("y"), change(speed=12.5)]
    for each in changes:
        Manifest(HERE).add(each)
    assert read_manifest(HERE) == changes
    names = (
        "time run arm seed game state step attempt host device steps_per_second hours commit folder".split()
    )
    assert [
        list(json.loads(line)) for line in Path("manifest.jsonl").read_text(encoding="utf-8").splitlines()
    ] == [names] * 3


@pytest.mark.parametrize(
    "tail", [b'{"time": 1.5, "ru', bytes(4_096), b'{"time": 1.5' + bytes(7), b"\xff\xfe"]
)
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
    with pytest.raises(
        UsageError, match=r"\(steps is 5, there None; seeds is \[1, 2\], there \[1\]\)|seeds is .*steps is 5"
    ):
        refuse_another(folder, ASKED | {"seeds": (1, 2), "steps": 5})
    begin(folder, ASKED | {"gpu": True})
    for gpu, fix in (
        (True, "go on where there is a GPU, and without --gpus-per-run 0"),
        (False, "leave out --gpus-per-run"),
    ):
        begin(folder, ASKED | {"gpu": gpu})
        with pytest.raises(UsageError, match=rf"there {gpu}\): give another --name, or {fix}$"):
            refuse_another(folder, ASKED | {"gpu": not gpu})
    (folder / "sweep.json").write_text("{", encoding="utf-8")
    for attempt in (lambda: refuse_another(folder, ASKED), lambda: read_asked(folder)):
        with pytest.raises(UsageError, match="cannot be read as what a sweep was asked"):
            attempt()


def test_a_folder_that_a_killed_sweep_has_only_made_is_taken_over():
    for name in ("runs", "logs"):
        Path("x", name).mkdir(parents=True)
    Path("x/.sweep.json.partial").write_text("{", encoding="utf-8")
    for hidden in ("x/.DS_Store", "x/._runs", "x/runs/.DS_Store"):
        Path(hidden).touch()
    refuse_another(Path("x"), ASKED)
    begin(Path("x"), ASKED)
    assert read_asked(Path("x")).seeds == [1] and not Path("x/.sweep.json.partial").exists()


def test_progress_is_what_the_runs_own_file_says():
    assert read_progress(HERE) is None
    Path("progress.json").write_text(json.dumps(SAID), encoding="utf-8")
    found = read_progress(HERE)
    assert found == Progress("node3", "cpu", 18_000, 25_000, 30_000, 98.4, -3.2, 9.5, ("node3", 42, 1.5))
    assert str(found) == "step 25,000 of 30,000, 98 SPS, 00:50 left, return -3"
    assert str(replace(found, mean_return=None)) == "step 25,000 of 30,000, 98 SPS, 00:50 left, return –"
    assert str(replace(found, steps_per_second=None)) == "step 25,000" and str(Progress()) == "step 0"


def test_progress_without_a_finite_speed_has_no_time_left():
    for speed in (math.nan, math.inf, 0.0, None):
        assert Progress(step=5, total=9, steps_per_second=speed).left == "–"


NOT_WHOLE = ["", "{", "[]", "\0\0", json.dumps({"step": 5}), json.dumps(SAID | {"time": None})]
NOT_WHOLE += [json.dumps(SAID | {"step": math.inf}), json.dumps(SAID | {"time": 10**400})]


@pytest.mark.parametrize("content", NOT_WHOLE, ids=range(len(NOT_WHOLE)))
def test_progress_that_is_not_whole_is_none(content):
    Path("progress.json").write_text(content, encoding="utf-8")
    assert read_progress(HERE) is None


def test_the_last_lines_of_a_log_are_those_of_the_newest_attempt():
    log = Path("x.log")
    assert last_lines(log, 0) == []
    log.write_text("noise\n" * 10_000, encoding="utf-8")
    offset = log.stat().st_size
    with open(log, "a", encoding="utf-8") as file:
        file.write("one\ntwo\n")
    assert last_lines(log, offset, 20_000) == ["one", "two"] and last_lines(log, offset, 1) == ["two"]


CONTINUED = ASKED | {
    "from_checkpoint": "/a/runs/X__1/checkpoint-5",
    "steps": 9,
    "origin": {"run": "abc", "step": 5},
}
MOVED = CONTINUED | {"from_checkpoint": "/b/c/Y/checkpoint-five"}


def test_a_checkpoint_that_was_moved_is_the_same_and_one_that_took_its_place_is_not():
    begin(HERE / "x", CONTINUED)
    refuse_another(HERE / "x", MOVED)
    for other in (
        CONTINUED | {"origin": {"run": "abd", "step": 5}},
        MOVED | {"origin": {"run": "abc", "step": 6}},
        CONTINUED | {"from_checkpoint": None, "origin": None},
    ):
        with pytest.raises(UsageError, match="is the folder of another sweep"):
            refuse_another(HERE / "x", other)
    begin(HERE / "x", MOVED)
    assert read_asked(HERE / "x").from_checkpoint == "/b/c/Y/checkpoint-five"


def git(place, *words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", "user.name=a", "-c", "user.email=b", "-c", "commit.gpgsign=false", *words]
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, encoding="utf-8", check=True
    ).stdout.strip()


@pytest.fixture
def around():
    """A repository with one commit, and a project in a folder of it."""
    Path("it's a repository/project").mkdir(parents=True)
    Path("it's a repository/project/code.py").write_text("1\n", encoding="utf-8")
    git("it's a repository", "init", "-q")
    git("it's a repository", "add", ".")
    git("it's a repository", "commit", "-q", "-m", "one")
    return Path("it's a repository").absolute()


def test_the_commit_is_the_projects_own_and_never_that_of_a_repository_around_it(around, monkeypatch):
    whole = git(around, "rev-parse", "HEAD")
    assert (
        whole.startswith(commit(around))
        and commit(around / "project") is None
        and commit(HERE.absolute()) is None
    )
    (around / "project" / "code.py").write_text("2\n", encoding="utf-8")
    assert commit(around).endswith("-dirty")
    git(around / "project", "init", "-q")
    assert commit(around / "project") is None, "a repository without a commit"
    git(around / "project", "add", ".")
    git(around / "project", "commit", "-q", "-m", "two")
    assert git(around / "project", "rev-parse", "HEAD").startswith(commit(around / "project"))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.setenv(name, str(around / ".git"))
    assert git(around / "project", "rev-parse", "HEAD").startswith(commit(around / "project"))
    assert commit(HERE.absolute()) is None
    monkeypatch.setenv("PATH", "")
    assert commit(around) is None, "without git"


def test_the_commit_of_a_work_tree_of_its_own_is_that_of_the_project(around):
    git(around, "worktree", "add", "-q", "../tree")
    assert git(around, "rev-parse", "HEAD").startswith(commit(around.parent / "tree"))


def test_what_is_noted_is_on_the_disk_itself(monkeypatch):
    flushed = []
    monkeypatch.setattr(manifest, "flush_to_disk", lambda path: flushed.append(path.name))
    begin(HERE / "x", ASKED)
    Manifest(HERE / "x").add(change())
    assert flushed == [".sweep.json.partial", "x", "manifest.jsonl"]
