"""The folder of a sweep: what was asked, what became of every run, and how far those that go on have come."""

import contextlib
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from analysis.plan import Asked
from support.jobs import STARTED
from support.machine import flush_to_disk
from support.usage import UsageError, reading

TAIL_BYTES = 8_192
MANIFEST = "manifest.jsonl"
PARTIAL = "sweep.json.partial"
WHERE = re.compile(r" on (\w+)(?: with \d+ threads?)?, curves in ")
BEGINS = re.compile(r"^(?:resumed|forked) at step ([\d,]+) from ", re.MULTILINE)
STEP = re.compile(r"^step ([\d,]+)(?: of |: checkpoint-)", re.MULTILINE)
LINE = re.compile(r"^step [\d,]+ of ([\d,]+), ([\d,]+) SPS, (\S+) left, ε \S+ return (\S+)$", re.MULTILINE)


def refuse_another(folder: Path, asked: dict[str, Any]) -> None:
    """
    Raises:
        UsageError: the folder is another sweep's, or no sweep's.
    """
    path, plain = folder / "sweep.json", json.loads(json.dumps(asked))
    if path.exists():
        with reading(path, "what a sweep was asked", "give another --name"):
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        # what nobody had decided there, as in an older sweep's, is no difference
        if names := [name for name in {**before, **plain} if before.get(name, plain.get(name)) != plain.get(name)]:
            changes = "; ".join(f"{name} is {plain.get(name)}, there {before.get(name)}" for name in names)
            raise UsageError(f"{folder} is the folder of another sweep ({changes}): give another --name, or what it was asked")
        return
    own = {MANIFEST, "runs", "logs", PARTIAL}
    others = {
        entry.name for entry in folder.glob("[!.]*")
    } - own  # hidden files are other programs', as those of a file manager
    if others or any(folder.glob("runs/[!.]*")):
        raise UsageError(f"{folder} is no sweep's folder, it has no sweep.json: give another --name")


def prepare(folder: Path) -> None:
    """Makes what a sweep's folder holds before anything was asked.

    Raises:
        OSError: it cannot be written.
    """
    for part in (folder / "runs", folder / "logs"):
        part.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).touch()


def begin(folder: Path, asked: dict[str, Any]) -> None:
    """Notes in a sweep's folder what was asked; it is whole there, or not there.

    Raises:
        OSError: it cannot be written.
    """
    prepare(folder)
    (folder / PARTIAL).write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    flush_to_disk(folder / PARTIAL)
    (folder / PARTIAL).rename(folder / "sweep.json")
    flush_to_disk(folder)


def read_asked(folder: Path) -> Asked:
    """
    Raises:
        UsageError: the folder is no sweep's.
    """
    with reading(folder / "sweep.json", "what a sweep was asked", "give a folder under sweeps/"):
        values = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        return Asked(**{field.name: values[field.name] for field in fields(Asked) if field.name in values})


@dataclass(frozen=True)
class Change:
    """A line of the manifest: a run has come into a state."""

    time: float
    """seconds since 1970"""
    run: str
    arm: str
    seed: int
    game: str
    state: str
    """queued, running, finished, failed, stopped, killed, or not started"""
    step: int
    attempt: int
    """how often the run was begun or gone on with, this time included"""
    host: str | None
    device: str | None
    steps_per_second: float | None
    """mean over this attempt"""
    hours: float
    """of all attempts together"""
    commit: str | None
    folder: str | None
    """of the run, within that of the sweep"""


class Manifest:
    """manifest.jsonl, to be written by one process. The next line takes the place of a last one that is not whole."""

    def __init__(self, folder: Path):
        self.path = folder / MANIFEST
        self.path.touch()
        self.end = self.path.read_bytes().rfind(b"\n") + 1  # of the whole lines

    def add(self, change: Change) -> None:
        """Appends a line and flushes it to the disk.

        Raises:
            OSError: it cannot be written.
        """
        line = json.dumps(vars(change)).encode() + b"\n"
        with open(self.path, "r+b") as file:
            file.truncate(self.end)
            file.seek(self.end)
            file.write(line)
        flush_to_disk(self.path)
        self.end += len(line)


def read_manifest(folder: Path) -> list[Change]:
    """All changes, oldest first, but for a last line that is not whole; none where there is no manifest.

    Raises:
        UsageError: it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return []
    with reading(path, "a sweep's manifest", "move it away, the runs will be gone on with"):
        return [Change(**json.loads(line)) for line in path.read_bytes().split(b"\n")[:-1]]


def newest(changes: list[Change]) -> dict[str, Change]:
    """{run: its last change}"""
    return {change.run: change for change in changes}


def measured_speed(changes: list[Change]) -> float | None:
    """Mean steps per second of the attempts that finished a run; None if there is none."""
    speeds = [c.steps_per_second for c in changes if c.state == "finished" and c.steps_per_second]
    return sum(speeds) / len(speeds) if speeds else None


@dataclass(frozen=True)
class Progress:
    """What a run's log says of its newest attempt; nothing of what it has not said yet."""

    host: str | None = None
    device: str | None = None
    first: int = 0
    """step at which the attempt began"""
    step: int = 0
    total: int | None = None
    speed: str = "–"
    """steps per second, of late"""
    left: str = "–"
    """time, hours:minutes:seconds"""
    score: str = "–"
    """mean return of late"""

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total:,}, {self.speed} SPS, {self.left} left, return {self.score}"
        return f"step {self.step:,}{of}"


def read_progress(log: Path, offset: int) -> Progress:
    """How far the attempt has come whose lines begin at byte `offset` of a log.

    Raises:
        OSError: the log cannot be read, though it is there.
    """
    if not log.exists():
        return Progress()
    with open(log, "rb") as file:
        file.seek(offset)
        head = file.read(TAIL_BYTES).decode(errors="replace")
        size = file.seek(0, os.SEEK_END)
        file.seek(max(offset, size - TAIL_BYTES))
        tail = file.read().decode(errors="replace")
    host = re.search(rf"^{STARTED} (\S+): ", head, re.MULTILINE)
    if host is None:
        return Progress()
    where, begins, steps, lines = WHERE.search(head), BEGINS.search(head), STEP.findall(tail), LINE.findall(tail)
    first = number(begins[1]) if begins else 0
    total, speed, left, score = (number(lines[-1][0]), *lines[-1][1:]) if lines else (None, "–", "–", "–")
    step = max([first, *map(number, steps)])
    return Progress(host[1], where[1] if where else None, first, step, total, speed, left, score)


def number(text: str) -> int:
    return int(text.replace(",", ""))


def last_lines(log: Path, offset: int, count: int = 5) -> list[str]:
    """The last lines of a log beyond its first `offset` bytes, none if there is none."""
    return log.read_bytes()[offset:].decode(errors="replace").splitlines()[-count:] if log.exists() else []


def now() -> float:
    return round(time.time(), 3)


def commit() -> str | None:
    """Of this code; None where it is in no repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ("git", "-C", str(Path(__file__).resolve().parent.parent), "describe", "--always", "--dirty")
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    return None
