"""One process of many: begun or gone on with, watched, and ended together with the process that started it."""

import ctypes
import errno
import fcntl
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.process import GROUP_SIZES

POLL_SECONDS = 0.5
STARTED = "started on"  # how the line begins that a job writes into its log first
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What is to be done in a process of its own.

    Its folder, place/runs/{name}__{number}, is made by the process. Where there is one, the job goes on there.
    """

    name: str
    begin: tuple[str, ...]
    """command where it has no folder yet"""
    go_on: tuple[str, ...]
    """command where it has; the folder comes last"""
    place: str
    """working directory"""
    log: str
    """file that takes all that the process says, after what is there"""
    environment: Mapping[str, str] = field(default_factory=dict)
    """variables that are set besides those of this process"""


def find_folder(place: Path, name: str) -> Path | None:
    """The folder of the job `name`, the newest if there are several; None where it has not begun."""
    pattern = re.compile(re.escape(name) + r"__(\d+)(?:-(\d+))?")
    found = {match: path for path in place.glob("runs/[!.]*") if (match := pattern.fullmatch(path.name))}
    newest = max(found, key=lambda match: (int(match[1]), int(match[2] or 0)), default=None)
    return None if newest is None else found[newest]


def failed(status: int) -> bool:
    """Whether a process ended badly for its own reason: no signal has ended it, and it says of none that it has."""
    return 0 < status <= 128


def run(job: Job) -> int:
    """Does a job, and waits for its end; whatever ends the wait, as SIGINT, ends the process by SIGTERM and waits for that.

    Returns its exit status, or −n where signal n has killed it. From here on this process hears SIGINT.

    Raises:
        OSError: the log cannot be written, the process cannot be started, or it failed when the wait was ended.
    """
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where a script's shell had begun it all with &
    with _own_log(Path(job.log)) as log:
        folder = find_folder(Path(job.place), job.name)
        command = job.begin if folder is None else (*job.go_on, os.path.relpath(folder, job.place))
        log.write(f"{STARTED} {socket.gethostname()}: {shlex.join(command)}\n".encode())
        log.flush()
        parent = os.getpid()
        process = subprocess.Popen(
            command,
            cwd=job.place,
            env={**_own_environment(), **job.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is for the one who started it all
            preexec_fn=lambda: _begin_child(parent),
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)  # which KeyboardInterrupt gets through, unlike a wait
        finally:
            if process.returncode is None:
                process.terminate()
                if failed(status := process.wait()):  # as where a checkpoint cannot be written
                    raise OSError(f"exit status {status} when it was stopped")
        return process.returncode


def _own_environment() -> dict[str, str]:
    """The variables of this process, but for those by which a job would think itself one of several equal ones."""
    return {name: value for name, value in os.environ.items() if name not in GROUP_SIZES}


@contextmanager
def _own_log(path: Path) -> Iterator:
    """The log, opened to append and locked: its process keeps the lock, also where it outlives the one that started it."""
    with open(path, "ab") as log:
        while True:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
                    break
                time.sleep(POLL_SECONDS)
        yield log


def _begin_child(parent: int) -> None:
    """In the new process, before its program: it gets SIGTERM when its parent ends, and no signal is kept from it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended already
            os._exit(128 + signal.SIGTERM)
