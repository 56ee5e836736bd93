"""Ray, the engine of sweeps: a cluster for the time of a block, and how a job has ended."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import FrameType
from typing import Any

# no statistics; runs as urgent as those by hand, not by 15 less; what Ray says of workers that are gone, the sweep says itself
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "(?s)."}
# a Ray that starts with the sweep leaves the runs more of the processors: it does not measure itself, reports resources once a
# second, and looks once a minute for logs that are shown nowhere; unless the user has set it otherwise
os.environ |= {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "LOG_NAME_UPDATE_INTERVAL_S": "60",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # or under `uv run` every worker would be started by uv once more
    **os.environ,
}
# a cluster started by hand asks for Ray's token where there is one; ray.init shows it only if told to
if os.path.exists(os.path.expanduser("~/.ray/auth_token")):
    os.environ.setdefault("RAY_AUTH_MODE", "token")
import ray

from orchestration.jobs import failed
from support.machine import usable_processors
from support.usage import UsageError

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
SOCKET = "session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1"  # the longest in Ray's folder


def folder_for_sockets() -> str:
    """A new folder, for Ray alone, in which its sockets can be: paths of 107 bytes at most, on Linux.

    Raises:
        UsageError: there is no place for it.
    """
    wanted = (os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")
    places = dict.fromkeys(os.path.abspath(place) for place in wanted if place)
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
    ray.init(
        "local",
        num_cpus=usable_processors(),
        object_store_memory=2**27,
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
    ray.init(address, **QUIET)


def reason(error: Exception) -> str:
    """Why Ray does not start, or is not there, in its own words.

    Raises:
        Exception: the error itself, where it is none of Ray's.
    """
    expected = (
        subprocess.SubprocessError,
        OSError,
        RuntimeError,
        ValueError,
        OverflowError,
        ray.exceptions.RayError,
    )
    if type(error) is not Exception and not isinstance(error, expected):
        raise error
    if isinstance(error, subprocess.TimeoutExpired):
        return "timed out"
    words = str(error).strip().partition("\n")[0]
    if isinstance(error, subprocess.CalledProcessError):
        words = error.stderr.strip().rpartition("\n")[2]
    return words.partition(". ")[0] or type(error).__name__


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Ray, running for the time of this block.

    Raises:
        UsageError: there is none at this address, or it does not start here.
    """

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)  # not with 15, as Ray has it

    signal.signal(signal.SIGTERM, end)
    folder = folder_for_sockets() if address is None else ""
    try:
        try:
            if address is None:
                start(folder)
            else:
                join(address)
        except SystemExit:  # Ray sets its own handler while it starts
            sys.exit(128 + signal.SIGTERM)
        except Exception as error:
            why = reason(error)
            if isinstance(error, UnicodeError):  # a folder's name in a locale that has no such letters
                fix = "set PYTHONUTF8=1, or a locale in UTF-8"
                raise UsageError(f"Ray cannot take a path here ({why}): {fix}") from None
            if address is None:
                fix = "try once more, or see what ray start --head says, and give its address to --address"
                raise UsageError(f"Ray does not start here ({why}): {fix} (docs/sweeps.md)") from None
            fix = "leave out --address to use this machine, or start one: ray start --head (docs/sweeps.md)"
            raise UsageError(f"no Ray cluster answers at {address} ({why}): {fix}") from None
        signal.signal(signal.SIGTERM, end)
        yield
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def outcome(ref: Any) -> tuple[str, str]:
    """The state of a run whose job has ended, and why."""
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
    return ("failed" if failed(status) else "killed"), f"exit status {status}"
