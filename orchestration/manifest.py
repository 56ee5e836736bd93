"""The folder of a sweep: what was asked, what became of every run, and how far those that go on have come."""

import json
import math
import os
import subprocess
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from orchestration.plan import Asked
from support.machine import flush_to_disk
from support.progress import PROGRESS
from support.usage import UsageError, reading

ROOT = Path(__file__).resolve().parent.parent  # of the project
MANIFEST = "manifest.jsonl"
PARTIAL = "sweep.json.partial"


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
        names = [name for name in {**before, **plain} if before.get(name, plain.get(name)) != plain.get(name)]
        if same_checkpoint(before, plain):
            names = [name for name in names if name not in ("from_checkpoint", "origin")]
        if names:
            changes = "; ".join(f"{name} is {plain.get(name)}, there {before.get(name)}" for name in names)
            raise UsageError(
                f"{folder} is the folder of another sweep ({changes}): give another --name, or what it was asked"
            )
        return
    own = {MANIFEST, "runs", "logs", PARTIAL}
    others = {
        entry.name for entry in folder.glob("[!.]*")
    } - own  # hidden files are other programs', as those of a file manager
    if others or any(folder.glob("runs/[!.]*")):
        raise UsageError(f"{folder} is no sweep's folder, it has no sweep.json: give another --name")


def same_checkpoint(before: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Whether two sweeps go on from one checkpoint, which may lie elsewhere by now, or both from none."""
    path_before = before.get("from_checkpoint")
    path = plain.get("from_checkpoint")
    if path_before is None or path is None:
        return path_before is path
    if before.get("origin") is not None and plain.get("origin") is not None:
        return before["origin"] == plain["origin"]
    # an older sweep noted the path alone; a run's folder and its checkpoint keep their names when moved
    return Path(path_before).parts[-2:] == Path(path).parts[-2:]


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
    with reading(folder / "sweep.json", "what a sweep was asked", "give another --name"):
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
    """How far a run has come; nothing of what nobody has said yet."""

    host: str | None = None
    device: str | None = None
    first: int = 0
    """step at which its process began"""
    step: int = 0
    total: int | None = None
    steps_per_second: float | None = None
    """of late"""
    mean_return: float | None = None
    """of late games"""
    time: float | None = None
    """of all this, seconds since 1970"""
    process: tuple[str, int, float] | None = None
    """host, number and beginning of the process that says so, which tell it from every other"""

    @property
    def speed(self) -> str:
        return "–" if self.steps_per_second is None else f"{self.steps_per_second:,.0f}"

    @property
    def left(self) -> str:
        """Time, hours:minutes:seconds."""
        if self.total is None or not self.steps_per_second or not math.isfinite(self.steps_per_second):
            return "–"
        return tqdm.format_interval((self.total - self.step) / self.steps_per_second)

    @property
    def score(self) -> str:
        return "–" if self.mean_return is None else f"{self.mean_return:,.0f}"

    def __str__(self) -> str:
        step = f"step {self.step:,}"
        if self.total is None or self.steps_per_second is None:
            return step
        return f"{step} of {self.total:,}, {self.speed} SPS, {self.left} left, return {self.score}"


def read_progress(folder: Path) -> Progress | None:
    """What a run's progress.json says; None where there is none, or none that is whole."""
    try:
        said = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        return Progress(
            host=str(said["host"]),
            device=None if said["device"] is None else str(said["device"]),
            first=int(said["first"]),
            step=int(said["step"]),
            total=int(said["total_timesteps"]),
            steps_per_second=None if said["steps_per_second"] is None else float(said["steps_per_second"]),
            mean_return=None if said["return"] is None else float(said["return"]),
            time=float(said["time"]),
            process=(str(said["host"]), int(said["pid"]), float(said["began"])),
        )
    except (OSError, ValueError, OverflowError, KeyError, TypeError):
        return None


def last_lines(log: Path, offset: int, count: int = 5) -> list[str]:
    """The last lines of a log beyond its first `offset` bytes, none if there is none."""
    return log.read_bytes()[offset:].decode(errors="replace").splitlines()[-count:] if log.exists() else []


def now() -> float:
    return round(time.time(), 3)


def commit(root: Path = ROOT) -> str | None:
    """Of the code in this folder; None where that is no repository of its own, as within another one."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # with its own .git named, git looks for no repository in the folders around it
    command = ("git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always", "--dirty")
    try:
        done = subprocess.run(command, cwd=root, env=own, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip()
