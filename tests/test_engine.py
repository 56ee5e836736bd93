"""Ray as the engine of sweeps: how a job has ended. Whole sweeps, and addresses where nothing answers, are in test_sweep.py."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from ray._private import ray_constants

from orchestration import engine
from orchestration import jobs
from orchestration.engine import ray
from support.usage import UsageError


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
        (
            lambda: raises(ray.exceptions.RayTaskError("run", "", OSError("disk full"))),
            ("failed", "disk full"),
        ),
        (lambda: raises(ray.exceptions.WorkerCrashedError()), ("killed", "WorkerCrashedError")),
        (lambda: raises(ray.exceptions.NodeDiedError("gone")), ("killed", "NodeDiedError")),
    ],
)
def test_the_end_of_a_job_is_its_own_fault_or_is_not(monkeypatch, job, found):
    monkeypatch.setattr(ray, "get", lambda ref: job())
    assert engine.outcome(None) == found


@pytest.fixture
def no_cluster(monkeypatch):
    """Ray's start and end, of which only what it was given is noted; the handler of SIGTERM is put back."""
    before, given = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(ray, "init", lambda *words, **named: given.append((*words, named)))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    yield given
    signal.signal(signal.SIGTERM, before)


def test_a_signal_while_no_run_is_going_ends_it_with_the_status_of_that_signal(no_cluster, monkeypatch):
    monkeypatch.setattr(
        ray, "init", lambda *_, **__: signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    )
    with pytest.raises(SystemExit) as ended, engine.cluster(None):
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


def test_sigterm_while_ray_starts_ends_with_143(no_cluster, monkeypatch):
    def init(*_, **__):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does first of all
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SystemExit) as ended, engine.cluster(None):
        pass
    assert ended.value.code == 143


def test_rays_sockets_are_in_a_folder_of_its_own_that_is_short_however_long_tmpdir_is(
    no_cluster, monkeypatch, tmp_path
):
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(engine.tempfile, "tempdir", str(deep))
    with engine.cluster(None):
        folder = Path(no_cluster[0][-1]["_temp_dir"])
        assert folder.is_dir() and folder.stat().st_mode & 0o777 == 0o700 and list(folder.iterdir()) == []
        assert len(os.fsencode(folder / engine.SOCKET)) <= 103 and deep not in folder.parents
    assert not folder.exists() and list(deep.iterdir()) == []


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_for_temporary_files_that_is_short_enough_is_kept_to(no_cluster, monkeypatch, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with engine.tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv(variable, short)
        monkeypatch.setattr(engine.tempfile, "tempdir", None)  # it is looked up once
        with engine.cluster(None):
            assert Path(no_cluster[0][-1]["_temp_dir"]).parent == Path(short)


def test_where_no_path_is_short_enough_tmpdir_is_named(no_cluster, monkeypatch):
    monkeypatch.setattr(engine, "SOCKET", "x" * 108)
    with pytest.raises(UsageError, match="set TMPDIR to a folder with a short path"), engine.cluster(None):
        pass
    assert no_cluster == []


OF_RAY = (
    Exception("The current node timed out during startup. This could happen because"),
    RuntimeError("no port is free"),
    OSError("AF_UNIX path length cannot exceed 107 bytes: /x"),
    ray.exceptions.RaySystemError("gone"),
    Exception(""),
)


@pytest.mark.parametrize("error", OF_RAY, ids=repr)
def test_what_ray_says_when_it_does_not_start_is_one_line_without_advice_on_what_was_not_given(
    no_cluster, monkeypatch, error
):
    monkeypatch.setattr(ray, "init", lambda *_, **__: raises(error))
    with pytest.raises(UsageError, match="Ray does not start here") as refused, engine.cluster(None):
        pass
    assert str(error).partition(". ")[0] in str(refused.value) and "leave out" not in str(refused.value)
    assert "\n" not in str(refused.value) and "()" not in str(refused.value)


@pytest.mark.parametrize(
    "error", [TypeError("x"), KeyError("x"), AttributeError("x"), AssertionError("x")], ids=repr
)
def test_a_mistake_of_ours_while_ray_starts_keeps_its_trace(no_cluster, monkeypatch, error):
    monkeypatch.setattr(ray, "init", lambda *_, **__: raises(error))
    with pytest.raises(type(error)), engine.cluster(None):
        pass


def test_a_path_that_the_locale_cannot_write_names_the_setting_that_helps(no_cluster, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda *_, **__: "\udcff".encode())
    with pytest.raises(UsageError, match="set PYTHONUTF8=1, or a locale in UTF-8"), engine.cluster(None):
        pass


def test_rays_settings_are_ours_unless_the_user_has_set_them(monkeypatch):
    """By Ray's own name of the setting that has workers started by uv, which it reads when it is imported."""
    name = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
    assert hasattr(ray_constants, name)
    for given, found in ((None, "0"), ("1", "1")):
        monkeypatch.setenv(name, given or "")
        if given is None:
            monkeypatch.delenv(name)
        runpy.run_path(engine.__file__)
        assert os.environ[name] == found


@pytest.mark.parametrize(
    ("given", "token", "found"), [(None, True, "token"), (None, False, None), ("disabled", True, "disabled")]
)
def test_a_cluster_that_asks_for_rays_token_gets_it_where_there_is_one(
    monkeypatch, tmp_path, given, token, found
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", given or "")
    if given is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").touch()
    runpy.run_path(engine.__file__)
    assert os.environ.get("RAY_AUTH_MODE") == found


# a job that fails when it gets SIGTERM, cancelled; Ray belongs into a process of its own, in which nothing of it is left
CANCEL = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, {"heard": signal.default_int_handler, "ignored": signal.SIG_IGN}[sys.argv[1]])
from orchestration import engine
from orchestration import jobs
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
@pytest.mark.slow
@pytest.mark.parametrize(
    "interrupts", ["heard", "ignored"]
)  # ignored where a script has begun the sweep with &
def test_a_job_that_is_cancelled_is_told_so_and_has_failed_if_it_fails_then(interrupts):
    Path("runs").mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(jobs.__file__).parent.parent)}
    command = (sys.executable, "-c", CANCEL, interrupts)
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", timeout=120, check=True
    )
    assert done.stdout == "('failed', 'exit status 1 when it was stopped')\n"
