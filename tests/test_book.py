"""The book of a sweep under way: which runs may begin, what is noted of them, and what is said."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orchestration.book import Book, Task
from orchestration.manifest import read_manifest
from orchestration.plan import Asked, all_arms, plan

PHOENIX = "PhoenixNoFrameskip-v4"
TRUNK, FORK = f"{PHOENIX}__none__1", f"{PHOENIX}__injection__1"


ASKED = Asked(
    env_ids=(PHOENIX,),
    seeds=(1,),
    arms=all_arms(("none", "injection"), {}),
    grid=[],
    flags=["--injection-step", "5000", "--total-timesteps", "9000"],
)


@pytest.fixture
def book():
    for name in ("runs", "logs"):
        Path(name).mkdir(exist_ok=True)
    return make_book()


def make_book():
    return Book(Path(), [Task(run, Path(), resources={"num_cpus": 1, "num_gpus": 0}) for run in plan(ASKED)])


def say(name, process=1, **changes):
    """What a process of a run notes beside its checkpoints."""
    folder = Path("runs", f"{name}__7")
    folder.mkdir(exist_ok=True)
    output = {
        "step": 0,
        "total_timesteps": 9_000,
        "steps_per_second": None,
        "return": None,
        "device": "cpu",
        "host": "node3",
        "pid": process,
        "began": 1.5,
        "first": 0,
        "time": 2.5,
    }
    output |= changes
    (folder / "progress.json").write_text(json.dumps(output), encoding="utf-8")


def begin(book, name, words="", **output):
    """An attempt that has begun, as the job and its process would show it."""
    task = book.tasks[name]
    task.begin()
    task.state = "running"
    with open(task.log, "a", encoding="utf-8") as log:
        log.write(f"a line of the job's\n{words}\n")
    say(name, process=task.attempt, **output)
    return task


def states():
    return [(change.run, change.state) for change in read_manifest(Path())]


def test_a_fork_waits_for_its_checkpoint_and_begins_with_it(book):
    trunk, fork = book.tasks.values()
    assert book.fork_point(trunk) == (None, "ready") and book.fork_point(fork) == (None, "wait")
    begin(book, TRUNK)
    assert book.fork_point(fork) == (None, "wait")
    checkpoint = Path("runs", f"{TRUNK}__7", "checkpoint-5000")
    checkpoint.mkdir()
    assert book.fork_point(fork) == (checkpoint, "ready")
    trunk.state = "queued"
    assert book.fork_point(fork) == (None, "wait"), "no folder is looked for before it has begun"
    job = fork.job(checkpoint, 3)
    assert job.begin[2:5] == ("--fork", str(checkpoint), "--intervention")
    assert job.environment == {"OMP_NUM_THREADS": "3"}
    assert job.name == FORK and job.begin[-1] == "--no-cuda" and job.go_on == (*job.begin[:2], "--resume")
    fork.resources["num_gpus"] = 0.5
    assert "--no-cuda" not in fork.job(checkpoint, 3).begin
    book.record(trunk, "failed")
    assert book.fork_point(fork)[1] == "ready", "a trunk that fails after it has left the checkpoint"
    begin(book, FORK)
    assert book.fork_point(fork) == (checkpoint, "ready"), (
        "it has begun, or does so once more if that is gone"
    )
    checkpoint.rmdir()
    assert book.fork_point(fork) == (None, "ready"), "it has begun, and goes on"


def test_a_fork_of_a_trunk_that_fails_before_it_never_begins(book):
    book.record(book.tasks[TRUNK], "failed")
    assert book.fork_point(book.tasks[FORK]) == (None, "never")


@pytest.mark.parametrize("state", ["failed", "finished"])
def test_it_is_said_how_a_fork_can_begin_whose_trunk_is_not_done_once_more_by_itself(book, state):
    task = begin(book, TRUNK)
    book.look()
    book.record(task, state)
    assert book.fork_point(book.tasks[FORK]) == (None, "never")
    why = f"{TRUNK} left no checkpoint at step 5,000"
    if state == "finished":
        why += f": move runs/{TRUNK}__7 away, and the same command trains both"
    assert book.why_never(book.tasks[FORK]) == why
    if state == "finished":
        Path("runs", f"{TRUNK}__7").rename("elsewhere")
    again = make_book()
    assert again.fork_point(again.tasks[FORK]) == (None, "wait") and again.tasks[TRUNK].state == "queued"


def test_forks_that_have_begun_are_named_where_their_trunk_is_to_be_trained_anew():
    for name in ("runs", "logs"):
        Path(name).mkdir()
    runs = plan(replace(ASKED, arms=all_arms(("none", "injection", "reset-head"), {})))
    book = Book(Path(), [Task(run, Path(), resources={"num_cpus": 1, "num_gpus": 0}) for run in runs])
    book.record(begin(book, TRUNK), "finished")
    book.record(begin(book, FORK), "finished")
    (late,) = [task for task in book.tasks.values() if task.run.arm == "reset-head"]
    assert book.fork_point(late) == (None, "never")
    assert book.why_never(late).endswith(
        f"; its other forks are no pair with the new: move runs/{FORK}__7 away, too, once they have ended"
    )


def test_each_attempt_is_noted_with_the_code_that_it_began_with_and_other_code_is_said_once(
    book, monkeypatch, capsys
):
    warned = []
    for commit in ("abc", "abc", "def", "def", "abc", None):
        monkeypatch.setattr("orchestration.manifest.commit", lambda commit=commit: commit)
        book.begin(book.tasks[TRUNK])
        book.record(book.tasks[TRUNK], "queued")
        warned += re.findall(r"began at commit (.*), and it goes on at (\w+)[,;]", capsys.readouterr().out)
    assert warned == [("abc", "def"), ("abc, def", "none")]
    assert [change.commit for change in read_manifest(Path())] == ["abc", "abc", "def", "def", "abc", None]
    again = make_book()
    monkeypatch.setattr("orchestration.manifest.commit", lambda: "ghi")
    again.tasks[TRUNK].ref = object()
    begin(again, TRUNK)
    again.look()
    assert read_manifest(Path())[-1].commit == "ghi", "the code that is there when it leaves the queue"
    assert "began at commit abc, def, and it goes on at ghi" in capsys.readouterr().out
    again = make_book()
    monkeypatch.setattr("orchestration.manifest.commit", lambda: None)
    again.begin(again.tasks[TRUNK])
    assert "began at commit abc, def, ghi, and it goes on at none" in capsys.readouterr().out


def test_a_killed_run_goes_on_after_a_growing_pause_until_its_retries_are_used_up(book, capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("orchestration.book.time.monotonic", lambda: clock[0])
    pauses = []
    for _ in range(3):
        task = begin(book, TRUNK, "what is wrong")
        book.look()
        task.ref = object()
        book.look()
        book.settle(task, "killed", "exit status 137", 2, 10.0)
        pauses.append(task.after - clock[0])
    assert pauses[:2] == [10.0, 20.0]
    assert [state for _, state in states()] == ["running", "killed"] * 2 + ["running", "failed"]
    printed = capsys.readouterr().out
    assert printed.count("what is wrong") == 1
    assert "killed 3 times, with --retries 2; exit status 137" in printed
    assert [change.attempt for change in read_manifest(Path())] == [1, 1, 2, 2, 3, 3]
    assert book.open_tasks() == [book.tasks[FORK]]
    for kills, pause, longest in ((40, 10.0, 600), (9_000, 10.0, 600), (0, 900.0, 900), (1, 900.0, 900)):
        task.kills = kills
        book.settle(task, "killed", "", 10_000, pause)
        assert task.after - clock[0] == longest, "no pause is longer than ten minutes, or the first one"


def test_a_run_whose_end_is_not_to_be_seen_here_is_not_finished_nor_trained_anew(book, capsys):
    """As where a machine has another disk in the place of the sweep's folder, and all went well there."""
    task = begin(book, TRUNK)
    book.settle(task, "finished", "", 5, 10.0)
    assert (task.state, task.kills) == ("failed", 0)
    missing = f"its last checkpoint is not in {Path('runs').resolve()}: move its folder back, or share"
    assert missing in capsys.readouterr().out
    task = begin(book, TRUNK)
    Path("runs", f"{TRUNK}__7", "checkpoint-9000").mkdir()
    book.settle(task, "finished", "", 5, 10.0)
    assert task.state == "finished"


def test_an_attempt_looks_for_the_runs_folder_once_more(book):
    task = begin(book, TRUNK)
    assert task.run_folder == Path("runs", f"{TRUNK}__7")
    Path("runs", f"{TRUNK}__8").mkdir()
    assert task.run_folder == Path("runs", f"{TRUNK}__7")
    task.begin()
    assert task.run_folder == Path("runs", f"{TRUNK}__8")


def test_a_run_that_keeps_a_gpu_and_computes_on_the_cpu_is_named(book, capsys):
    for device, cuda, gpus, warned in (
        ("cpu", True, 1, True),
        ("cuda", True, 1, False),
        ("cpu", False, 1, False),
    ):
        task = begin(book, TRUNK, device=device)
        task.run = replace(task.run, args=replace(task.run.args, cuda=cuda))
        task.resources["num_gpus"] = gpus
        book.record(task, "running")
        book.look()
        task.ref = object()
        book.look()
        assert (f"warning: {TRUNK} keeps a GPU, and computes on the CPU" in capsys.readouterr().out) == warned


def test_the_manifest_holds_steps_speed_and_hours_over_attempts_and_sweeps(book, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("orchestration.book.time.monotonic", lambda: clock[0])

    def attempt(book, first, last, seconds, state):
        task = begin(book, TRUNK, first=first, step=last, steps_per_second=98.0)
        task.ref = object()
        book.look()
        clock[0] += seconds
        book.settle(task, state, "", 5, 1.0)
        return read_manifest(Path())[-1]

    found = attempt(book, 0, 3_600, 3_600, "killed")
    assert (found.step, found.steps_per_second, found.hours, found.host) == (3_600, 1.0, 1.0, "node3")
    book = make_book()
    Path("runs", f"{TRUNK}__7", "checkpoint-9000").mkdir()
    found = attempt(book, 3_600, 9_000, 1_800, "finished")
    assert (found.step, found.steps_per_second, found.hours, found.attempt) == (9_000, 3.0, 1.5, 2)
    assert [task.run.name for task in make_book().open_tasks()] == [FORK]
    begin(book, FORK, step=6_000).ref = object()
    book.look()
    say(FORK, time=read_manifest(Path())[-1].time + 7_200)
    assert make_book().tasks[FORK].hours == pytest.approx(2), "the sweep was killed, and its hours count"
    shutil.rmtree(Path("runs", f"{TRUNK}__7"))
    assert len(make_book().open_tasks()) == 2, "a finished run whose folder has gone is done once more"


def test_a_run_keeps_its_step_until_a_new_attempt_has_said_one(book):
    task = begin(book, TRUNK, step=4_000)
    task.ref = object()
    book.look()
    begun = read_manifest(Path())[-1]
    assert (begun.state, begun.steps_per_second) == ("running", None), "the clock has just been started"
    book.settle(task, "killed", "", 5, 0.0)
    assert read_manifest(Path())[-1].step == 4_000
    task.begin()
    task.ref = object()
    book.look()
    with open(task.log, "a", encoding="utf-8") as log:
        log.write("a line of the job's\n")
    say(TRUNK, process=1, step=4_100)
    book.look()
    assert states()[-1] == (TRUNK, "killed"), "the process before is still ending"
    say(TRUNK, process=2, device=None)
    book.look()
    assert states()[-1] == (TRUNK, "killed"), "it has not said yet where it computes"
    say(TRUNK, process=2, first=4_000, step=4_000, device="cuda", host="node4")
    book.look()
    last = read_manifest(Path())[-1]
    assert (last.state, last.step, last.device, last.host) == ("running", 4_000, "cuda", "node4")


def test_a_runs_folder_is_not_searched_for_among_many_before_its_process_has_begun(book, monkeypatch):
    task = book.tasks[TRUNK]
    task.begin()
    task.ref = object()
    monkeypatch.setattr("orchestration.book.find_folder", lambda *_: 1 / 0)
    book.look()
    task.log.write_text("a line of the job's\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        book.look()


def test_what_is_going_on_is_said_in_words_and_as_a_table(book):
    output = {"step": 6_000, "steps_per_second": 98.4, "return": 2.2}
    begin(book, FORK, "what it says to people, in any words", **output).ref = object()
    book.look()
    words = book.in_words()
    assert words.splitlines() == [
        "1 queued, 1 running",
        f"  {FORK}: step 6,000 of 9,000, 98 SPS, 00:30 left, return 2",
    ]
    waiting = book.tasks[TRUNK]
    waiting.ref = object()
    assert book.in_words() == words, "its machine may still be busy"
    waiting.log.write_text("node3 waits for the process that has this log\n", encoding="utf-8")
    line = f"  {TRUNK}: has not begun to train yet, see {waiting.log}"
    assert book.in_words().splitlines() == [words.splitlines()[0], line, words.splitlines()[1]]
    table = book.table(1)
    (row,) = zip(*(column.cells for column in table.columns), strict=True)
    assert row == (FORK, "running", "6,000 of 9,000", "98", "00:30", "2")
    assert table.caption == "1 queued, 1 running" and book.table(9).row_count == 2
