"""Ray as the engine of sweeps: how a job has ended. Whole sweeps, and addresses where nothing answers, are in test_sweep.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from analysis import engine
from analysis.engine import ray
from support import jobs


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("job", "found"),
    [
        (lambda: 0, ("finished", "")),
        (lambda: 1, ("failed", "exit status 1")),
        (lambda: 128, ("failed", "exit status 128")),
        (lambda: 143, ("killed", "exit status 143")),
        (lambda: -9, ("killed", "exit status -9")),
        (lambda: raises(ray.exceptions.TaskCancelledError()), ("stopped", "")),
        (lambda: raises(ray.exceptions.RayTaskError("run", "", OSError("disk full"))), ("failed", "disk full")),
        (lambda: raises(ray.exceptions.WorkerCrashedError()), ("killed", "WorkerCrashedError")),
        (lambda: raises(ray.exceptions.NodeDiedError("gone")), ("killed", "NodeDiedError")),
    ],
)
def test_the_end_of_a_job_is_its_own_fault_or_is_not(monkeypatch, job, found):
    monkeypatch.setattr(ray, "get", lambda ref: job())
    assert engine.outcome(None) == found


def test_a_signal_while_no_run_is_going_ends_it_with_the_status_of_that_signal(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", lambda *_, **__: signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number)))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    try:
        with pytest.raises(SystemExit) as ended, engine.cluster(None):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143


# a job that fails when it gets SIGTERM, cancelled; Ray belongs into a process of its own, in which nothing of it is left
CANCEL = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, {"heard": signal.default_int_handler, "ignored": signal.SIG_IGN}[sys.argv[1]])
from analysis import engine
from support import jobs
here, fails = Path().absolute(), ("bash", "-c", "trap 'exit 1' TERM; touch up; while :; do read -t 0.02 line < /dev/zero; done")
with engine.cluster(None):
    job = jobs.Job("x", fails, fails, str(here), str(here / "x.log"))
    ref = engine.ray.remote(max_retries=0)(jobs.run).remote(job)
    while not Path("up").exists():
        time.sleep(0.05)
    engine.ray.cancel(ref)
    print(engine.outcome(ref) if engine.ray.wait([ref], timeout=20)[0] else "it was not told")
"""


@pytest.mark.cluster
@pytest.mark.parametrize("interrupts", ["heard", "ignored"])  # ignored where a script has begun the sweep with &
def test_a_job_that_is_cancelled_is_told_so_and_has_failed_if_it_fails_then(interrupts):
    Path("runs").mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(jobs.__file__).parent.parent)}
    command = (sys.executable, "-c", CANCEL, interrupts)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", timeout=120, check=True)
    assert done.stdout == "('failed', 'exit status 1 when it was stopped')\n"
