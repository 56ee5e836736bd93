"""How far a run is, for programs: progress.json in its folder. None of them reads what it says to people."""

import contextlib
import json
import os
import socket
import time
from typing import Any

from support.machine import HeldFolder, replacing

PROGRESS = "progress.json"


class ProgressFile:
    """A run's progress.json, whole at any moment. Where it cannot be written, the run goes on without."""

    PAUSE_SECONDS = 2

    def __init__(self, place: HeldFolder, first: int, total: int):
        self.place = place
        self.written = -float("inf")  # on the monotonic clock
        self.state: dict[str, Any] = {
            "step": first,
            "total_timesteps": total,
            "steps_per_second": None,  # of late
            "return": None,  # mean of late games
            "device": None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": time.time(),  # this process, seconds since 1970
            "first": first,  # step at which this process began
            "time": None,  # of what is said here, seconds since 1970
        }

    def note(self, changes: dict[str, Any]) -> None:
        """Takes up what has changed, and writes it if the last time is a while ago."""
        self.state |= changes | {"time": time.time()}
        if time.monotonic() - self.written >= self.PAUSE_SECONDS:
            self.write()

    def write(self) -> None:
        """Writes all that was noted, in place of what is there; not flushed, since nothing depends on it."""
        self.written = time.monotonic()
        with contextlib.suppress(OSError), replacing(self.place.here() / PROGRESS) as partial:
            partial.write_text(json.dumps(self.state) + "\n", encoding="utf-8")
