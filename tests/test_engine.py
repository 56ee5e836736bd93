"""Ray as the engine of sweeps: how a job has ended. Whole sweeps, and addresses where nothing answers, are in test_sweep.py."""

import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")

from analysis import engine
from analysis.engine import ray
from support import jobs
from support.jobs import Job


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


@pytest.fixture(params=["heard", "ignored"])
def interrupts(request):
    """SIGINT in this process and all that it starts; it is ignored where a script has begun the sweep with &."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler if request.param == "heard" else signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.cluster
@pytest.mark.usefixtures("interrupts")
def test_a_job_that_is_cancelled_is_told_so_and_has_failed_if_it_fails_then(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(jobs.__file__).parent.parent))  # for Ray's workers
    Path("runs").mkdir()
    fails = ("bash", "-c", "trap 'exit 1' TERM; touch up; while :; do read -t 0.02 line < /dev/zero; done")
    here = Path().absolute()
    with engine.cluster(None):
        ref = ray.remote(max_retries=0)(jobs.run).remote(Job("x", fails, fails, str(here), str(here / "x.log")))
        deadline = time.monotonic() + 60
        while not Path("up").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        ray.cancel(ref)
        assert ray.wait([ref], timeout=20)[0], "it was not told"
        assert engine.outcome(ref) == ("failed", "exit status 1 when it was stopped")
