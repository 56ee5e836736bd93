"""Ray, the engine of sweeps: a cluster for a while, what it keeps free for a run, and how a job has ended."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from orchestration.jobs import failed
from orchestration.plan import PlannedRun
from support.machine import free_memory, usable_processors
from support.usage import UsageError

OBJECT_STORE = 2**27  # bytes; jobs are small
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # runs are as urgent as those by hand, not by 15 less
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "(?s).",  # what Ray says of workers that are gone, the sweep says itself
}
# by these a Ray that starts with the sweep leaves the runs more of the processors
SETTINGS_UNLESS_THE_USER_HAS = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "60",  # seconds between searches for logs, which are shown nowhere
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # or under `uv run` every worker would be started by uv once more
}
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
SOCKET = "session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1"  # the longest in Ray's folder
Node = dict[str, float]  # what a machine has: "CPU", "GPU", and "memory" in bytes
FOR_LEARNING = 1.5e9  # bytes of memory besides the replay


def ray_module() -> Any:
    """Ray. It reads its settings from the environment when it is imported, so nobody else imports it."""
    os.environ.update(SETTINGS)
    for name, value in SETTINGS_UNLESS_THE_USER_HAS.items():
        os.environ.setdefault(name, value)
    # a cluster started by hand asks for Ray's token where there is one; ray.init shows it only if told to
    if os.path.exists(os.path.expanduser("~/.ray/auth_token")):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    return ray


def folder_for_sockets() -> str:
    """A new folder in which Ray's sockets can be, whose paths have 107 bytes at most. Raises UsageError."""
    wanted = [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
    if os.environ.get("RAY_TMPDIR"):
        wanted.insert(0, os.environ["RAY_TMPDIR"])
    places = list(dict.fromkeys(os.path.abspath(place) for place in wanted))  # each once
    for place in places:
        try:
            folder = tempfile.mkdtemp(prefix="ray-", dir=place)
        except OSError:
            continue
        trial = os.path.join(folder, SOCKET.replace("/", "-"))
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(trial)
            os.unlink(trial)
            return folder
        except OSError:  # it is too long, or this file system has none
            shutil.rmtree(folder, ignore_errors=True)
    tried = ", ".join(places)
    raise UsageError(f"Ray's sockets can be in none of {tried}: set TMPDIR to a folder with a short path")


def start(folder: str) -> None:
    """Ray on this machine, with its sockets and logs in this folder."""
    ray_module().init(
        "local",
        num_cpus=usable_processors(),
        object_store_memory=OBJECT_STORE,
        _memory=free_memory() - OBJECT_STORE,  # Ray does not see the limit of a scheduler's job
        include_dashboard=False,
        _temp_dir=folder,
        **QUIET,
    )


def join(address: str) -> None:
    """A cluster that is there."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not port.isdigit():
            raise ValueError("it is neither HOST:PORT nor auto")
        socket.create_connection((host, int(port)), timeout=5).close()
    # it may try for minutes; -P, since what lies in the working directory is none of Python's modules
    check = (sys.executable, "-P", "-c", "import ray, sys; ray.init(sys.argv[1])", address)
    subprocess.run(check, capture_output=True, encoding="utf-8", timeout=60, check=True)
    ray_module().init(address, **QUIET)


def refusal(error: Exception, address: str | None) -> UsageError:
    """Why Ray does not start, or answer at an address, and what to do. Raises what is no error of Ray's."""
    errors = (OSError, RuntimeError, ValueError, OverflowError, subprocess.SubprocessError)
    if type(error) is not Exception and not isinstance(error, (*errors, ray_module().exceptions.RayError)):
        raise error
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, subprocess.TimeoutExpired):
        first_line = "timed out"
    elif isinstance(error, subprocess.CalledProcessError):
        first_line = error.stderr.strip().rpartition("\n")[2]  # of a trace the last
    reason = first_line.partition(". ")[0] or type(error).__name__
    if isinstance(error, UnicodeError):  # a folder's name in a locale that has no such letters
        return UsageError(f"Ray cannot take a path here ({reason}): set PYTHONUTF8=1, or a locale in UTF-8")
    if address is None:
        fix = "try once more, or see what ray start --head says, and give its address to --address"
        return UsageError(f"Ray does not start here ({reason}): {fix} (docs/sweeps.md)")
    fix = "leave out --address to use this machine, or start one: ray start --head (docs/sweeps.md)"
    return UsageError(f"no Ray cluster answers at {address} ({reason}): {fix}")


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Ray, running for the time of this block. Raises UsageError where it does not start or answer."""

    def end(number: int, _: Any) -> None:
        sys.exit(128 + number)  # not with 15, as Ray has it

    ray = ray_module()
    signal.signal(signal.SIGTERM, end)
    folder = folder_for_sockets() if address is None else None
    try:
        try:
            if folder is not None:
                start(folder)
            elif address is not None:
                join(address)
        except SystemExit:  # Ray sets its own handler while it starts
            sys.exit(128 + signal.SIGTERM)
        except Exception as error:
            raise refusal(error, address) from None
        signal.signal(signal.SIGTERM, end)
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def machines() -> list[Node]:
    """What each machine of the cluster has."""
    return [node["Resources"] for node in ray_module().nodes() if node["Alive"]]


def runs_on(gpus: float, share: float) -> int:
    """How many runs fit on so many GPUs. A share below 1 lies on one GPU."""
    if share < 1:
        return int(gpus) * int(1 / share + 1e-9)  # 1 / 0.1 may be a little less than 10
    return int(gpus // share)


def resources(
    run: PlannedRun, cpus: float | None, gpus: float | None, memory: float | None, nodes: list[Node]
) -> dict[str, float]:
    """What is to be kept free for a run on one of these machines: num_cpus, num_gpus, and memory in bytes.

    What is not given, memory in GB, is what the run needs and the machines have. Raises UsageError where no
    machine has that much.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) > 0]
    if gpus is None:
        gpus = 1 if with_gpus and run.args.cuda else 0
    if cpus is None:
        cpus = 1
        if gpus and with_gpus:  # all processors, divided by the runs that fit on the GPUs
            shares = [node.get("CPU", 0) // max(1, runs_on(node["GPU"], gpus)) for node in with_gpus]
            cpus = max(1, min(shares))
    memory = run.memory + FOR_LEARNING if memory is None else memory * 1e9
    for node in nodes:
        if node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus and node.get("memory", 0) >= memory:
            return {"num_cpus": cpus, "num_gpus": gpus, "memory": int(memory)}
    sizes = [f"{n.get('CPU', 0):g}, {n.get('GPU', 0):g} and {n.get('memory', 0) / 1e9:.1f} GB" for n in nodes]
    needed = f"{run.name} needs {cpus:g} processors, {gpus:g} GPUs and {memory / 1e9:.1f} GB of memory"
    fix = "lower --cpus-per-run, --gpus-per-run, or --memory-per-run"
    if run.begins == 0:  # a fork has the replay of its origin
        fix += ", or --buffer-size after --"
    raise UsageError(f"{needed}, and no machine has that, but {', '.join(sizes)}: {fix}")


def outcome(ref: Any) -> tuple[str, str]:
    """The state of a run whose job has ended, and why."""
    ray = ray_module()
    try:
        status = ray.get(ref)
    except ray.exceptions.TaskCancelledError:
        return "stopped", ""
    except ray.exceptions.RayTaskError as error:
        return "failed", str(error.cause)
    except ray.exceptions.RayError as error:  # a worker or a machine is gone
        return "killed", type(error).__name__
    if status == 0:
        return "finished", ""
    state = "failed" if failed(status) else "killed"
    return state, f"exit status {status}"
