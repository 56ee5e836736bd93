"""Ray as the engine of sweeps: its start, what it keeps free, how a job has ended. Sweeps: test_sweep.py."""

import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

import ray
from ray._private import ray_constants

from dqn_injection_atari import Args
from orchestration import engine, jobs
from orchestration.engine import resources
from orchestration.plan import PlannedRun
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


def test_a_cluster_that_answers_is_joined_at_its_address(no_cluster, monkeypatch):
    tried = []
    answered = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(socket, "create_connection", lambda place, timeout: tried.append(place) or answered)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: tried.append(command[-1]))
    engine.join("there:6379")
    engine.join("auto")
    assert tried == [("there", 6379), "there:6379", "auto"]
    assert no_cluster == [("there:6379", engine.QUIET), ("auto", engine.QUIET)]


def test_ray_has_the_processors_that_this_process_may_use(no_cluster, monkeypatch):
    monkeypatch.setattr(engine, "usable_processors", lambda: 3)
    with engine.cluster(None):
        assert no_cluster[0][-1]["num_cpus"] == 3


def test_ray_has_the_memory_that_this_process_may_take(no_cluster, monkeypatch):
    monkeypatch.setattr(engine, "free_memory", lambda: 2**32)
    with engine.cluster(None):
        given = no_cluster[0][-1]
        assert given["_memory"] + given["object_store_memory"] == 2**32


def test_a_signal_while_no_run_is_going_ends_it_with_the_status_of_that_signal(no_cluster, monkeypatch):
    def init(*_, **__):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does first of all

    monkeypatch.setattr(ray, "init", init)
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


def test_importing_changes_nothing_in_the_process_and_needs_no_ray(monkeypatch):
    for name in {**engine.SETTINGS, **engine.SETTINGS_UNLESS_THE_USER_HAS, "RAY_AUTH_MODE": ""}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    before = dict(os.environ), [signal.getsignal(number) for number in signal.valid_signals()]
    runpy.run_path(engine.__file__)
    assert (dict(os.environ), [signal.getsignal(number) for number in signal.valid_signals()]) == before


def test_rays_settings_are_ours_unless_the_user_has_set_them(monkeypatch):
    """By Ray's own name of the setting that has workers started by uv, which it reads when it is imported."""
    name = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
    assert hasattr(ray_constants, name)
    for given, found in ((None, "0"), ("1", "1")):
        monkeypatch.setenv(name, given or "")
        if given is None:
            monkeypatch.delenv(name)
        engine.ray_module()
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
    engine.ray_module()
    assert os.environ.get("RAY_AUTH_MODE") == found


RUN = PlannedRun("none", Args(), ())
GB = 1e9
LARGE = {"CPU": 64, "GPU": 8, "memory": 500 * GB}


@pytest.mark.parametrize(
    ("given", "nodes", "needs"),
    [
        ((None, None, None), [{"CPU": 2, "memory": 20 * GB}], (1, 0)),
        ((None, None, None), [LARGE], (8, 1)),
        ((None, 0.5, None), [LARGE], (4, 0.5)),
        ((None, 0, None), [LARGE], (1, 0)),
        ((None, 0.1, None), [{"CPU": 18, "GPU": 1, "memory": 500 * GB}], (1, 0.1)),
        ((None, 0.6, None), [LARGE], (8, 0.6)),
        ((None, 3, None), [LARGE], (32, 3)),
        ((3, 2, 1), [{"CPU": 4, "memory": 9 * GB}, LARGE], (3, 2)),
        ((None, None, None), [LARGE | {"CPU": 2}], (1, 1)),
    ],
)
def test_a_run_gets_what_it_needs_and_the_machine_has(given, nodes, needs):
    found = resources(RUN, *given, nodes)
    assert (found["num_cpus"], found["num_gpus"]) == needs
    assert found["memory"] == (GB if given[2] else RUN.memory + 1.5 * GB)


def test_a_fork_that_needs_too_much_memory_is_not_told_to_have_another_replay():
    for begins, told in ((0, True), (5, False)):
        with pytest.raises(UsageError) as refusal:
            resources(PlannedRun("none", Args(), (), begins), None, None, 900, [LARGE])
        assert ("--buffer-size" in str(refusal.value)) == told


def test_a_run_that_is_told_to_use_no_gpu_gets_none():
    assert resources(PlannedRun("none", Args(cuda=False), ()), None, None, None, [LARGE])["num_gpus"] == 0


@pytest.mark.parametrize("given", [(3, None, None), (None, 1, None), (None, None, 21)])
def test_a_run_that_needs_more_than_any_machine_has_is_refused(given):
    with pytest.raises(UsageError, match=r"no machine has that, but 2, 0 and 20\.0 GB.*lower --cpus-per-run"):
        resources(RUN, *given, [{"CPU": 2, "memory": 20 * GB}])


# a job that fails when it gets SIGTERM, cancelled; Ray has a process of its own, and nothing of it is left
CANCEL = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, {"heard": signal.default_int_handler, "ignored": signal.SIG_IGN}[sys.argv[1]])
from orchestration import engine, jobs
here = Path().absolute()
waits = "touch up; while :; do read -t 0.02 line < /dev/zero; done"
fails = ("bash", "-c", "trap 'exit 1' TERM; " + waits)
with engine.cluster(None):
    job = jobs.Job("x", fails, fails, str(here), str(here / "x.log"))
    ray = engine.ray_module()
    ref = ray.remote(max_retries=0)(jobs.run).remote(job)
    while not Path("up").exists():
        time.sleep(0.05)
    ray.cancel(ref)
    print(engine.outcome(ref) if ray.wait([ref], timeout=20)[0] else "it was not told")
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


def test_a_run_takes_no_more_processors_than_the_smallest_machine_with_gpus_has_for_it():
    assert resources(RUN, None, None, None, [LARGE, LARGE | {"CPU": 16}])["num_cpus"] == 2
