"""What the machine offers: GPU, memory, processors, disk, locks, and what the bits of a run depend on."""

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import re
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from support.process import say
from support.usage import UsageError, out_of_resources, reading
from support.versions import installed

Written = TypeVar("Written")
# packages that the bits of a run depend on
PACKAGES = ("torch", "numpy", "gymnasium", "ale-py", "opencv", "stable-baselines3")


def pick_device(cuda: bool, deterministic: bool, tf32: bool) -> torch.device:
    """The GPU if it is wanted and there, UsageError if it can run nothing; also sets PyTorch's switches."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if not cuda or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda")
    try:
        try_out(device)
    except (RuntimeError, AssertionError) as error:  # held by another job, full, or not in the wheel
        reason = str(error).partition("\n")[0].partition(". ")[0]
        if not out_of_resources(error) and "not compiled with CUDA" not in reason:
            raise
        message = f"a GPU is listed, but cannot be used ({type(error).__name__}: {reason})"
        fix = "choose another one by CUDA_VISIBLE_DEVICES, or hide it by CUDA_VISIBLE_DEVICES= to use the CPU"
        raise UsageError(f"{message}: free it, {fix}") from error
    return device


def try_out(device: torch.device) -> None:
    """A convolution and a product, waited for: what a GPU that can run nothing fails at."""
    one = torch.ones(1, 1, 1, 1, device=device)
    convolved = torch.nn.functional.conv2d(one, one)
    (convolved[0, 0] @ one[0, 0]).item()


def slow_bfloat16(device: torch.device) -> str | None:
    """What makes bfloat16 slower than float32 on a device, where that is so (docs/speed.md); else None."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        fast = False
    else:  # oneDNN says yes to AVX-512 of any kind; without its BF16 that takes twice as long as float32
        fast = torch.cpu._is_avx512_bf16_supported() or not torch.cpu._is_avx512_supported()
    if fast:
        return None
    kind = "GPU" if device.type == "cuda" else "processor"
    return f"--bf16 is much slower than float32 here: PyTorch has no instructions for bfloat16 on this {kind}"


def idle_gpu(root: Path = Path("/")) -> str | None:
    """What shows that there is a GPU here, where PyTorch sees none although nobody hid it; else None."""
    if torch.cuda.is_available():
        return None
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if os.environ.get(name) in ("", "-1", "NoDevFiles"):
            return None
    signs = [*root.glob("dev/nvidia[0-9]*"), *root.glob("proc/driver/nvidia/gpus/*"), *root.glob("dev/kfd")]
    for card in root.glob("sys/bus/pci/devices/*"):  # also where no driver is loaded
        with contextlib.suppress(OSError):
            vendor = (card / "vendor").read_text(encoding="utf-8")
            kind = (card / "class").read_text(encoding="utf-8")
            if vendor.strip() == "0x10de" and kind.startswith("0x03"):
                signs.append(card)
    if signs:
        return f"/{signs[0].relative_to(root)}"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "-L"]
        listed = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True).stdout
        if "no devices" not in listed.lower():
            first_line = listed.partition("\n")[0]
            return first_line.partition(" (")[0] or "nvidia-smi"
    return None


def control_groups(root: Path) -> Iterator[tuple[str, Path]]:
    """(controller, folder) of this process's control groups and those around them; "" in version 2."""
    groups = root / "proc/self/cgroup"
    if not groups.exists():
        return
    for line in groups.read_text(encoding="utf-8").splitlines():
        _, controllers, name = line.split(":", 2)
        for controller in controllers.split(","):  # version 1 has several in one folder, with a link for each
            for place in {controller, controllers}:
                group = root / "sys/fs/cgroup" / place / name.lstrip("/")
                for folder in (group, *group.parents):
                    yield controller, folder


def free_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: the machine's, or its control group's where that is less."""
    files = {  # limit, usage, and what of the usage is file cache, which the kernel gives back but for tmpfs
        "": ("memory.max", "memory.current", "file", "shmem"),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
    }
    free = psutil.virtual_memory().available
    for controller, folder in control_groups(root):
        # there may be no control group, another controller's, or "max": no limit
        with contextlib.suppress(OSError, ValueError, KeyError):
            limit, usage, cache, tmpfs = files[controller]
            lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            statistics = dict(line.split() for line in lines)
            cached = int(statistics[cache]) - int(statistics.get(tmpfs, 0))
            used = int((folder / usage).read_text(encoding="utf-8")) - cached
            free = min(free, int((folder / limit).read_text(encoding="utf-8")) - used)
    return free


def usable_processors(root: Path = Path("/")) -> int:
    """How many processors this process may keep busy, by its affinity and its control group's quota."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    files = {"": ["cpu.max"], "cpu": ["cpu.cfs_quota_us", "cpu.cfs_period_us"]}
    for controller, folder in control_groups(root):
        # there may be no control group, another controller's, or "max" or -1: no quota
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = " ".join((folder / name).read_text(encoding="utf-8") for name in files[controller])
            quota, period = [int(number) for number in text.split()]
            if quota > 0:
                count = min(count, max(1, quota // period))
    return count


def limit_threads() -> None:
    """Has PyTorch compute in a thread per processor to use, unless OMP_NUM_THREADS says in how many."""
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(min(torch.get_num_threads(), usable_processors()))


def place_for(needed: int, steps: int, device: torch.device) -> torch.device:
    """Where a replay of so many bytes goes: to `device`, or to the CPU; UsageError if neither has room."""
    for_learning = 2 * 10**9  # networks, moments, graphs and the libraries' workspaces take less
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= needed + for_learning:
        return device
    free = free_memory()
    if needed > free:
        sizes = f"needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free"
        # a tenth is left for what else a run takes, and for room that does not shrink with the steps
        fits = int(0.9 * steps * free / needed)
        fix = "free some"
        if fits >= 1_000:
            fix += f", or in a new run lower --buffer-size to {fits}"
        raise UsageError(f"a replay of {steps:,} steps {sizes}: {fix}")
    return torch.device("cpu")


def code_version(script: Path, *folders: Path) -> str:
    """Hash of a script, of this folder's modules and of those in others, as they are on disk now."""
    code = hashlib.sha256(script.read_bytes())
    for folder in (Path(__file__).parent, *folders):
        for module in sorted(folder.glob("*.py")):
            code.update(module.read_bytes())
    return code.hexdigest()[:12]


def circumstances(device: torch.device, script: str) -> dict[str, str]:
    """What the bits of a run depend on besides its arguments; `script` is the version of its code."""
    versions = {package: installed(package) for package in PACKAGES}
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    else:
        model = platform.processor()
        with contextlib.suppress(OSError):
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
            named = re.search(r"model name\s*: (.*)", cpuinfo)
            if named is not None:
                model = named[1]
        capability = torch.backends.cpu.get_cpu_capability()
        processor = f"{model}, {capability}, {torch.get_num_threads()} threads"
    return {"script": script, "python": platform.python_version(), **versions, "device": processor}


# what network file systems say of folders that they cannot flush, or not even open
CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a disk, a quota, the largest file that is allowed
CANNOT_OPEN = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTTY}


def flush_to_disk(path: Path) -> None:
    """Writes a file, or a folder's list of names, to the disk itself; OSError where that fails."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        harmless = CANNOT | CANNOT_OPEN if path.is_dir() else CANNOT
        if error.errno not in harmless:
            raise


class FolderGone(FileNotFoundError):
    """A folder that this process writes to is nowhere to be found."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write, which then takes the place of `path`. That stays as it was where this fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def way_out(error: BaseException) -> str:
    """What to do where something cannot be written: only what the error itself tells."""
    if isinstance(error, FolderGone):
        return "if it was moved to another disk, stop this run and --resume it there"
    if isinstance(error, MemoryError):
        return "free some memory"
    if isinstance(error, OSError) and error.errno in FULL:
        return "make room"
    return "see to that"


def path_of(descriptor: int) -> Path | None:
    """Where the file or folder of an open descriptor is now; None where no one can tell."""
    with contextlib.suppress(OSError):
        if hasattr(fcntl, "F_GETPATH"):  # macOS
            name = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))
            return Path(os.fsdecode(name.rstrip(b"\0")))
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    return None


class HeldFolder:
    """A folder that is found again where it was moved within its file system; `path` is where it was last."""

    def __init__(self, path: Path):
        self.path = path
        self.descriptor: int | None = None
        # not every file system opens folders: there, it is what has the name
        with contextlib.suppress(OSError):
            self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            weakref.finalize(self, os.close, self.descriptor)

    def find(self) -> Path | None:
        """Its present path, relative if it was given so; None where it is gone, or another has its name."""
        if self._is_at(self.path):
            return self.path
        moved = None if self.descriptor is None else path_of(self.descriptor)
        if moved is None or not self._is_at(moved):
            return None
        self.path = moved if self.path.is_absolute() else Path(os.path.relpath(moved))
        return self.path

    def here(self) -> Path:
        """Its present path, see `find`. Raises FolderGone where there is none."""
        found = self.find()
        if found is None:
            raise FolderGone(f"{self.path} is no longer there")
        return found

    def write(self, write_to: Callable[[Path], Written]) -> Written:
        """What write_to(its present path) returns; begins once more where it was moved in the meantime."""
        folder = self.here()
        try:
            return write_to(folder)
        except OSError:
            if self.here() == folder:
                raise
            return self.write(write_to)

    def _is_at(self, path: Path) -> bool:
        if self.descriptor is None:
            return path.is_dir()
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.descriptor))
        except OSError:
            return False


@contextlib.contextmanager
def alone_in(
    folder: Path, file: str = "run.json", kind: str = "a run's folder", fix: str = "give one to --resume"
) -> Iterator[None]:
    """Keeps other processes from running in `folder` during this block; UsageError where one is.

    The lock is on a file there, opened for writing, because NFS locks nothing else. It ends with the process.
    Where there are no locks, a warning says so.
    """
    with reading(folder, kind, fix):
        descriptor = os.open(folder / file, os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                message = f"another process is running {folder}: wait for it, or stop it first"
                raise UsageError(message) from None
            say(f"warning: {folder} cannot be locked ({error}): see to it that no other process resumes it")
        yield
    finally:
        os.close(descriptor)
