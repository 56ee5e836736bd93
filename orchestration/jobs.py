"""A run's process: begun or gone on with, watched, and ended together with the process that started it."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from support.process import GROUP_SIZES

POLL_SECONDS = 0.5
# what would make a process think that it is one of several equal ones, or overrule OMP_NUM_THREADS
NOT_HANDED_ON = (*GROUP_SIZES, "MKL_NUM_THREADS")
STARTED = "started on"  # how the line begins that a job writes into its log first
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What a process is to do. It makes a folder, place/runs/{name}__{number}, or goes on in that."""

    name: str
    begin: tuple[str, ...]
    """command where it has no folder yet"""
    go_on: tuple[str, ...]
    """command where it has; the folder comes last"""
    place: str
    """working directory"""
    log: str
    """file that takes all that the process says, after what is there"""
    environment: dict[str, str] = field(default_factory=dict)
    """variables that are set besides those of this process"""


def find_folder(place: Path, name: str) -> Path | None:
    """The folder of the job `name`, the newest if there are several; None where it has not begun.

    Raises OSError where the folders cannot be listed: were that taken for None, a job that has one would
    begin anew.
    """
    try:
        paths = list((place / "runs").iterdir())
    except FileNotFoundError:
        return None  # nothing has begun
    pattern = re.compile(re.escape(name) + r"__(\d+)(?:-(\d+))?")  # the time, and a number if it was taken
    folders: dict[tuple[int, int], Path] = {}
    for path in paths:
        match = pattern.fullmatch(path.name)
        if match is not None:
            began, number = match.groups(default="0")
            folders[int(began), int(number)] = path
    return folders[max(folders)] if folders else None


def failed(status: int) -> bool:
    """Whether a process ended badly for its own reason, and not by a signal or in answer to one."""
    return 0 < status <= 128


def run(job: Job) -> int:
    """Does a job, and waits for its end. Returns its exit status, or −n where signal n has killed it.

    Whatever ends the wait, as SIGINT, also ends the process by SIGTERM, and waits for that.

    Raises OSError where the log cannot be written, the runs' folders cannot be listed, the process cannot be
    started, or it fails as the wait is ended.
    """
    # SIGINT is ignored where a script's shell has begun it all with &
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(job.log, "ab") as log:
        _lock(log)
        folder = find_folder(Path(job.place), job.name)
        command = job.begin
        if folder is not None:
            command = (*job.go_on, os.path.relpath(folder, job.place))
        log.write(f"{STARTED} {socket.gethostname()}: {shlex.join(command)}\n".encode())
        log.flush()
        env = {name: value for name, value in os.environ.items() if name not in NOT_HANDED_ON}
        parent = os.getpid()
        process = subprocess.Popen(
            command,
            cwd=job.place,
            env=env | job.environment,
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
                status = process.wait()
                if failed(status):  # as where a checkpoint cannot be written
                    raise OSError(f"exit status {status} when it was stopped")
        return process.returncode


def _lock(log: IO[bytes]) -> None:
    """Waits until no other process has the log. A job keeps the lock, also where it outlives this process."""
    waits = False
    while True:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
                return
        if not waits:
            line = f"{socket.gethostname()} waits for the process that has this log, of an earlier attempt\n"
            log.write(line.encode())
            log.flush()
            waits = True
        time.sleep(POLL_SECONDS)


def _begin_child(parent: int) -> None:
    """In the new process, before its program: it hears all signals, and gets SIGTERM when its parent ends."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended already
            os._exit(128 + signal.SIGTERM)
