"""Jobs: processes that begin or go on, and end with the one that started them."""

import errno
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestration import jobs
from orchestration.jobs import Job, find_folder, run

# writes what it was asked into a new folder, or into the one that it goes on in
BEGIN = "mkdir runs/x__7; echo began $SETTING"
# waits for SIGTERM, and takes half a second over its end
SLOW = "import signal, sys, time\n" + (
    "def end(*_):\n    time.sleep(0.5); open('saved', 'a').write('x'); sys.exit(143)\n"
    "signal.signal(signal.SIGTERM, end)\nopen('up', 'w').write('x')\nfor _ in range(200): time.sleep(0.05)"
)


def job(*begin, name="x", go_on=("echo", "goes on in")):
    Path("runs").mkdir(exist_ok=True)
    return Job(name, begin, go_on, str(Path().absolute()), "x.log", {"SETTING": "3"})


def slow_job():
    return job(sys.executable, "-c", SLOW)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def in_a_process(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def test_a_job_begins_where_it_has_no_folder_and_goes_on_where_it_has_with_one_log():
    assert run(job("sh", "-c", BEGIN)) == 0
    assert run(job("sh", "-c", BEGIN)) == 0
    first, second, third, fourth = Path("x.log").read_text(encoding="utf-8").splitlines()
    assert (second, fourth) == ("began 3", "goes on in runs/x__7")
    assert all(line.startswith(jobs.STARTED) for line in (first, third)) and third.endswith(
        "echo 'goes on in' runs/x__7"
    )


def test_no_other_variable_overrules_the_threads_that_a_job_is_told(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "8")
    assert run(job("sh", "-c", "echo threads: $MKL_NUM_THREADS")) == 0
    assert Path("x.log").read_text(encoding="utf-8").endswith("\nthreads:\n")


def test_a_job_is_none_of_several_equal_ones_whatever_started_its_parent(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run(job("sh", "-c", "echo $SETTING-$SLURM_STEP_NUM_TASKS-$SLURM_JOB_ID")) == 0
    assert Path("x.log").read_text(encoding="utf-8").splitlines()[1] == "3--7"


def test_a_folder_belongs_to_the_job_of_that_name_alone():
    for name in ("x__9", "x__10", "x__10-1", "x__1__99", "xx__99", ".x__99", "x__y", "a.b__1", "aXb__2"):
        Path("runs", name).mkdir(parents=True)
    assert [find_folder(Path(), name) for name in ("x", "x__1", "a.b", "y")] == [
        *(Path("runs", name) for name in ("x__10-1", "x__1__99", "a.b__1")),
        None,
    ]
    assert find_folder(Path("nowhere"), "x") is None


def test_a_job_whose_folders_cannot_be_listed_does_not_begin_anew(monkeypatch):
    """Its own may be among them, with days of work."""

    def fail(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(PermissionError):
        run(job("touch", "begun"))
    assert not Path("begun").exists()


@pytest.mark.parametrize(
    ("command", "status"), [("exit 3", 3), ("exit 143", 143), ("kill -9 $$", -signal.SIGKILL)]
)
def test_a_job_returns_how_its_process_ended(command, status):
    assert run(job("sh", "-c", command)) == status


@pytest.mark.parametrize(
    ("number", "ignored"), [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, True)]
)
def test_what_ends_the_wait_ends_the_process_and_waits_for_it(number, ignored):
    def wait():
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        run(slow_job())

    waiting = in_a_process(wait)
    wait_for(Path("up").exists)
    os.kill(waiting.pid, number)
    waiting.join(30)
    assert Path("saved").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize(
    ("command", "good"),
    [
        *(
            (command, True)
            for command in ("exit 143", "exit 130", "exit 0", "kill -TERM $$", "kill -KILL $$")
        ),
        ("exit 1", False),
    ],
)
def test_one_that_fails_when_it_is_stopped_is_an_error(command, good, monkeypatch):
    def interrupt(_):
        wait_for(Path("up").exists)
        raise SystemExit

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=interrupt))
    ends = f"trap 'trap - TERM; {command}' TERM; touch up; while :; do read -t 0.02 line < /dev/zero; done"
    with pytest.raises(SystemExit if good else OSError) as caught:
        run(job("bash", "-c", ends))
    assert good or str(caught.value) == "exit status 1 when it was stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_process_whose_parent_is_killed_gets_sigterm_and_the_next_one_waits_until_it_has_ended():
    waiting = in_a_process(run, slow_job())
    wait_for(Path("up").exists)
    waiting.kill()
    assert run(job("sh", "-c", "cp saved found")) == 0 and Path("found").read_text(encoding="utf-8") == "x"
    waits = f"\n{socket.gethostname()} waits for the process that has this log, of an earlier attempt\n"
    assert Path("x.log").read_text(encoding="utf-8").count(waits) == 1


def test_signals_that_the_parent_holds_back_reach_the_process():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        interrupted = (
            "import os, time; os.kill(os.getpid(), 2); time.sleep(1)"  # a shell would lift the mask itself
        )
        assert run(job(sys.executable, "-c", interrupted)) == -signal.SIGINT
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def test_what_a_job_is_told_overrules_what_it_inherits_and_all_that_it_says_is_logged(monkeypatch):
    monkeypatch.setenv("SETTING", "8")
    assert run(job("sh", "-c", "echo $SETTING; echo trouble >&2")) == 0
    assert Path("x.log").read_text(encoding="utf-8").splitlines()[1:] == ["3", "trouble"]


def test_an_interrupt_at_a_terminal_does_not_reach_a_job():
    assert run(job(sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())")) == 0
    assert Path("x.log").read_text(encoding="utf-8").endswith("\nTrue\n")


def test_a_file_system_without_locks_keeps_no_job_from_its_log(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(jobs.fcntl, "flock", flock)
    assert run(job("true")) == 0
