"""What the machine offers and asks: device, memory, signals, locks, and what the bits of a run depend on."""

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ale_py
import cv2
import gymnasium
import numpy
import psutil
import stable_baselines3
import torch

from support.usage import UsageError, reading


def pick_device(cuda: bool, deterministic: bool, tf32: bool) -> torch.device:
    """The GPU when there is one and it is wanted; also sets PyTorch's switches for determinism and precision."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: the machine's, or its control group's where that is less (Slurm, Docker)."""
    versions = {  # limit, usage, and what of the usage is file cache that the kernel gives back
        "": ("memory.max", "memory.current", "file"),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    }
    free = psutil.virtual_memory().available
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controller, name = line.split(":", 2)
        if controller in versions:
            limit, usage, cache = versions[controller]
            group = root / "sys/fs/cgroup" / controller / name.lstrip("/")
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError, KeyError):  # no control group, or "max": no limit
                    statistics = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                    used = int((folder / usage).read_text()) - int(statistics[cache])
                    free = min(free, int((folder / limit).read_text()) - used)
    return free


def place_for(needed: int, steps: int, device: torch.device) -> torch.device:
    """Where a replay of `needed` bytes for so many steps goes: to `device`, or to the CPU if it does not fit on that GPU.

    Raises:
        UsageError: it does not fit in the CPU's free memory either.
    """
    for_learning = 2 * 10**9  # networks, moments, graphs and the libraries' workspaces take less
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= needed + for_learning:
        return device
    if needed > (free := free_memory()):
        sizes = f"needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free"
        raise UsageError(f"a replay of {steps:,} steps {sizes}: lower --buffer-size to {int(0.9 * steps * free / needed)}")
    return torch.device("cpu")


def code_version(script: Path) -> str:
    """Hash of a script and of this folder, as they are on disk now."""
    sources = (script, *sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def circumstances(device: torch.device, script: str) -> dict[str, str]:
    """What the bits of a run depend on besides its arguments; `script` is the version of its code."""
    modules = {"torch": torch, "numpy": numpy, "gymnasium": gymnasium, "ale-py": ale_py, "opencv": cv2}
    modules["stable-baselines3"] = stable_baselines3
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    model = models[0] if models else platform.processor()
    cpu = f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "script": script,
        "python": platform.python_version(),
        **{name: module.__version__ for name, module in modules.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
    }


def flush_to_disk(path: Path) -> None:
    """Has the operating system write a file, or a folder's list of names, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


class Signals:
    """Signals as requests to the training loop, for the time of a `with` block.

    SIGTERM and SIGINT ask it to stop, a second one ends the process with 128 + its number; SIGUSR1, which Slurm can send
    ahead of a time limit, asks for a checkpoint.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.checkpoint = False
        self.at_once = False

    def __enter__(self) -> "Signals":
        wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
        self.previous = {number: signal.signal(number, self._note) for number in wanted if in_main}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """While a checkpoint is loaded: the first signal ends the process then."""
        self.at_once = True
        yield
        self.at_once = False

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.checkpoint = True
        elif self.stop is None and not self.at_once:
            self.stop = signal.Signals(number)
        else:
            sys.exit(128 + number)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes from running in `folder` during this block, or until this process ends in any other way.

    Raises:
        UsageError: another process holds it, or there is no such folder.
    """
    with reading(folder, "a run's folder", "give one to --resume"):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process is running {folder}: wait for it, or stop it first") from None
        yield
    finally:
        os.close(descriptor)
