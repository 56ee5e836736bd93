"""What the machine offers and asks: device, memory, signals, locks."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import BRIEF
from interruptions import dies, send

import dqn_injection_atari as script
import support.machine as machine
from support.machine import Signals, alone_in, circumstances, code_version, flush_to_disk, free_memory, pick_device, place_for
from support.replay import FrameReplayBuffer
from support.usage import UsageError

GB = 10**9
CPU, GPU = torch.device("cpu"), torch.device("cuda")


# device


@pytest.mark.parametrize("cuda", [True, False])
def test_the_gpu_is_used_where_there_is_one_and_it_is_wanted(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(cuda, True, True).type == ("cuda" if cuda else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(cuda, True, True).type == "cpu"


@pytest.mark.parametrize("deterministic", [False, True])  # True, the default, last
def test_determinism_is_a_choice(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    pick_device(False, deterministic, True)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark != deterministic
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    assert not torch.utils.deterministic.fill_uninitialized_memory, "it would fill what is written over anyway"


def test_a_workspace_that_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    pick_device(False, True, True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("tf32", [False, True])  # True, the default, last
def test_tf32_is_a_choice(tf32):
    pick_device(False, True, tf32)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


# memory


@pytest.mark.parametrize(
    "line,folder,limit,usage,cache",
    [
        ("0::/job/step", "job/step", "memory.max", "memory.current", "file"),
        ("0::/job/step", "job", "memory.max", "memory.current", "file"),
        ("0::/../outside", "", "memory.max", "memory.current", "file"),
        ("4:memory:/job", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ],
)
def test_free_memory_is_the_control_groups_where_that_is_less(tmp_path, line, folder, limit, usage, cache):
    assert free_memory(tmp_path / "no control groups") > 2e8
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/job\n{line}\n")
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    (group / limit).write_text("150000000\n")
    (group / usage).write_text("80000000\n")
    (group / "memory.stat").write_text(f"anon 50000000\n{cache} 30000000\n")
    assert free_memory(tmp_path) == 100_000_000
    (group / limit).write_text("max\n")
    assert free_memory(tmp_path) > 2e8


def test_of_nested_control_groups_the_tightest_counts(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    for folder, limit in (("job", 90_000_000), ("job/step", 100_000_000)):
        group = tmp_path / "sys/fs/cgroup" / folder
        group.mkdir(parents=True)
        for name, content in {"memory.max": limit, "memory.current": 20_000_000, "memory.stat": "file 0"}.items():
            (group / name).write_text(f"{content}\n")
    assert free_memory(tmp_path) == 70_000_000


def test_a_replay_goes_to_the_gpu_where_it_fits_beside_learning_and_else_to_the_cpu(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 50 * GB)
    for free, place in ((12 * GB, GPU), (10 * GB, GPU), (10 * GB - 1, CPU)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 80 * GB))
        assert place_for(8 * GB, 1_000_000, GPU) == place
    assert place_for(8 * GB, 1_000_000, CPU) == CPU


def test_a_replay_that_does_not_fit_names_needed_free_and_what_would_fit(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * GB)
    space = script.make_envs(BRIEF, 1).single_observation_space
    needed = FrameReplayBuffer.bytes_needed(1_000_000, space, 1)
    with pytest.raises(UsageError, match=r"^a replay of 1,000,000 steps needs 7\.3 GB and 2\.0 GB of memory are free") as error:
        place_for(needed, 1_000_000, CPU)
    fits = int(re.search(r"lower --buffer-size to (\d+)$", str(error.value)).group(1))
    assert 1.7e9 < FrameReplayBuffer.bytes_needed(fits, space, 1) <= 2e9
    assert place_for(FrameReplayBuffer.bytes_needed(fits, space, 1), fits, CPU) == CPU


# what the bits of a run depend on


def test_the_code_version_changes_with_every_file_of_the_code(tmp_path, monkeypatch):
    shutil.copy(script.__file__, tmp_path / "script.py")
    shutil.copytree(Path(machine.__file__).parent, tmp_path / "support", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "support/machine.py"))
    files = [tmp_path / "script.py", *(tmp_path / "support").glob("*.py")]
    version = code_version(files[0])
    assert version == script.CODE_VERSION and len(files) > 10
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert code_version(files[0]) != version, file.name
        file.write_bytes(content)
    assert code_version(files[0]) == version


def test_circumstances_name_packages_processor_and_threads(monkeypatch):
    now = circumstances(CPU, "abc")
    assert now["script"] == "abc" and now["python"] == sys.version.split()[0] and now["torch"] == torch.__version__
    assert {"numpy", "gymnasium", "ale-py", "opencv", "stable-baselines3"} < set(now)
    assert now["device"].endswith(f", {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    assert circumstances(CPU, "abc")["device"].endswith(", 99 threads") and circumstances(GPU, "abc")["device"] == "H100"


# disk


@pytest.mark.parametrize("path", ["file", "folder"])
def test_flushing_to_disk_reaches_the_disk_and_fails_where_that_fails(monkeypatch, path):
    Path("file").write_text("content")
    Path("folder").mkdir()
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    flush_to_disk(Path(path))
    assert flushed == [Path(path).stat().st_ino]
    open_before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for number, allowed in ((errno.EINVAL, True), (errno.ENOSPC, False), (errno.EIO, False)):

        def fsync(_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)
        with contextlib.nullcontext() if allowed else pytest.raises(OSError, match=os.strerror(number)):
            flush_to_disk(Path(path))
    assert not open_before or len(os.listdir("/proc/self/fd")) == open_before, "files are closed again"


def test_flushing_what_is_not_there_fails():
    with pytest.raises(FileNotFoundError):
        flush_to_disk(Path("nothing"))


# signals

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def test_signals_are_requests_while_the_block_lasts_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in ASKING]
    with pytest.raises(ZeroDivisionError), Signals() as signals:
        assert signals.stop is None and not signals.checkpoint
        send(signal.SIGUSR1)()
        assert signals.checkpoint and signals.stop is None
        send(signal.SIGUSR1)()
        send(signal.SIGTERM)()
        assert signals.stop is signal.SIGTERM
        raise ZeroDivisionError
    assert before == [signal.getsignal(number) for number in ASKING]


@pytest.mark.parametrize(
    "numbers,status",
    [(("SIGTERM",) * 2, 143), (("SIGINT",) * 2, 130), (("SIGTERM", "SIGINT"), 130), (("SIGINT", "SIGTERM"), 143)],
)
def test_a_second_signal_ends_the_process_with_its_own_status(numbers, status):
    first, second = (getattr(signal, number) for number in numbers)
    with Signals() as signals, pytest.raises(SystemExit) as stop:
        send(first)()
        assert signals.stop is first
        send(second)()
    assert stop.value.code == status


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_with_nothing_to_save_the_first_signal_ends_the_process(number, status):
    with Signals() as signals:
        with pytest.raises(SystemExit) as stop, signals.nothing_to_save():
            send(signal.SIGUSR1)()
            send(number)()
        assert stop.value.code == status and signals.checkpoint
    with Signals() as signals:
        with signals.nothing_to_save():
            pass
        send(number)()
        assert signals.stop is number, "afterwards it is a request again"


def test_a_thread_does_without_signals():
    before = [signal.getsignal(number) for number in ASKING]
    stops = []

    def work():
        with Signals() as signals:
            stops.append(signals.stop)
            assert before == [signal.getsignal(number) for number in ASKING]

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert stops == [None] and before == [signal.getsignal(number) for number in ASKING]


# locks


def test_two_processes_never_run_in_one_folder_at_once():
    folder = Path("run")
    folder.mkdir()
    ready, go = os.pipe(), os.pipe()

    def elsewhere():
        with alone_in(folder):
            os.write(ready[1], b".")
            os.read(go[0], 1)
            send(signal.SIGKILL)()

    other = threading.Thread(target=lambda: dies(elsewhere))
    other.start()
    os.read(ready[0], 1)
    with pytest.raises(UsageError, match=r"^another process is running run: wait for it, or stop it first$"), alone_in(folder):
        pytest.fail("it came in")
    os.write(go[1], b".")
    other.join()
    with alone_in(folder), pytest.raises(UsageError, match="another process is running run"), alone_in(folder):
        pytest.fail("it came in")
    with pytest.raises(ZeroDivisionError), alone_in(folder):
        raise ZeroDivisionError
    with alone_in(folder):
        assert os.listdir(folder) == [], "the lock is no file that might be left behind"


def test_a_file_system_without_locks_is_no_error(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(machine.fcntl, "flock", flock)
    with alone_in(Path()):
        pass


def test_a_folder_that_is_not_there_is_refused_by_name():
    with (
        pytest.raises(
            UsageError, match=r"^nowhere cannot be read as a run's folder \(FileNotFoundError.*: give one to --resume$"
        ),
        alone_in(Path("nowhere")),
    ):
        pytest.fail("it came in")
