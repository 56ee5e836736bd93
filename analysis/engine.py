"""Ray, the engine of sweeps: a cluster for the time of a block, and how a job has ended."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
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
    **os.environ,
}
import ray

from support.jobs import failed
from support.machine import usable_processors
from support.usage import UsageError


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Ray, running for the time of this block.

    Raises:
        UsageError: there is none at this address.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    try:
        if address is None:
            ray.init("local", num_cpus=usable_processors(), object_store_memory=2**27, include_dashboard=False, **quiet)
        else:
            if address != "auto":
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=5).close()
            check = (sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1])", address)  # it may try for minutes
            subprocess.run(check, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", timeout=60, check=True)
            ray.init(address, **quiet)
    except (subprocess.SubprocessError, OSError, RuntimeError, ValueError) as error:
        what = "Ray does not start here" if address is None else f"no Ray cluster answers at {address}"
        said = "timed out" if isinstance(error, subprocess.TimeoutExpired) else getattr(error, "stderr", "") or str(error)
        reason = said.strip().rpartition("\n")[2].partition(". ")[0]
        fix = "leave out --address to use this machine, or start one: ray start --head (docs/sweeps.md)"
        raise UsageError(f"{what} ({reason}): {fix}") from None
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # not with 15, as Ray has it
    try:
        yield
    finally:
        ray.shutdown()


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
