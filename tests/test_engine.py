"""Ray as the engine of sweeps: how a job has ended. Whole sweeps, and addresses where nothing answers, are in test_sweep.py."""

import pytest

pytest.importorskip("ray")

from analysis import engine
from analysis.engine import ray


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
