"""The folder of a sweep: what was asked, what became of every run, and how far those that go on have come."""

import json
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from orchestration.plan import Asked
from support.machine import flush_to_disk, replacing
from support.progress import PROGRESS
from support.usage import UsageError, reading

ROOT = Path(__file__).resolve().parent.parent  # of the project
MANIFEST = "manifest.jsonl"


def refuse_another(folder: Path, asked: dict[str, Any]) -> None:
    """Raises UsageError where the folder is another sweep's, or no sweep's."""
    if not (folder / "sweep.json").exists():
        known = {MANIFEST, "runs", "logs"}
        # hidden files are other programs', as those of a file manager
        others = {entry.name for entry in folder.glob("[!.]*")} - known
        if others or any(folder.glob("runs/[!.]*")):
            raise UsageError(f"{folder} is no sweep's folder, it has no sweep.json: give another --name")
        return
    before = vars(read_asked(folder))
    asked = json.loads(json.dumps(asked))  # in which tuples are lists, as they are there
    names = [name for name in before if asked.get(name) != before[name]]
    if before["origin"] is not None and asked.get("origin") == before["origin"]:
        # the checkpoint is the same, wherever it lies by now
        names = [name for name in names if name != "from_checkpoint"]
    if names:
        changes = "; ".join(f"{name} is {asked.get(name)}, there {before[name]}" for name in names)
        fix = "give another --name, or what it was asked"
        if names == ["gpu"] and before["gpu"]:
            fix = "give another --name, or go on where there is a GPU, and without --gpus-per-run 0"
        elif names == ["gpu"]:
            fix = "give another --name, or leave out --gpus-per-run"
        raise UsageError(f"{folder} is the folder of another sweep ({changes}): {fix}")


def prepare(folder: Path) -> None:
    """Makes what a sweep's folder holds before anything was asked."""
    for part in (folder / "runs", folder / "logs"):
        part.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).touch()


def begin(folder: Path, asked: dict[str, Any]) -> None:
    """Notes in a sweep's folder what was asked; it is whole there, or not there."""
    prepare(folder)
    with replacing(folder / "sweep.json") as partial:
        partial.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        flush_to_disk(partial)
    flush_to_disk(folder)


def read_asked(folder: Path) -> Asked:
    """What a sweep was asked. Raises UsageError where the folder is no sweep's."""
    with reading(folder / "sweep.json", "what a sweep was asked", "give another --name"):
        return Asked(**json.loads((folder / "sweep.json").read_text(encoding="utf-8")))


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
    """manifest.jsonl, to be written by one process. The next line overwrites a torn one."""

    def __init__(self, folder: Path):
        self.path = folder / MANIFEST
        self.path.touch()
        self.end = self.path.read_bytes().rfind(b"\n") + 1  # of the whole lines

    def add(self, change: Change) -> None:
        """Appends a line and flushes it to the disk. Raises OSError where that is impossible."""
        line = json.dumps(vars(change)).encode() + b"\n"
        with open(self.path, "r+b") as file:
            file.truncate(self.end)
            file.seek(self.end)
            file.write(line)
        flush_to_disk(self.path)
        self.end += len(line)


def read_manifest(folder: Path) -> list[Change]:
    """All changes, oldest first, but for a torn last line. Raises UsageError where more is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    with reading(path, "a sweep's manifest", "move it away, the runs will be gone on with"):
        return [Change(**json.loads(line)) for line in path.read_bytes().split(b"\n")[:-1]]


def measured_speed(changes: list[Change]) -> float | None:
    """Mean steps per second of the attempts that finished a run; None if there is none."""
    finished = [change for change in changes if change.state == "finished"]
    speeds = [change.steps_per_second for change in finished if change.steps_per_second]
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
        values = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        speed = values["steps_per_second"]
        mean_return = values["return"]
        return Progress(
            host=str(values["host"]),
            device=None if values["device"] is None else str(values["device"]),
            first=int(values["first"]),
            step=int(values["step"]),
            total=int(values["total_timesteps"]),
            steps_per_second=None if speed is None else float(speed),
            mean_return=None if mean_return is None else float(mean_return),
            time=float(values["time"]),
            process=(str(values["host"]), int(values["pid"]), float(values["began"])),
        )
    except (OSError, ValueError, OverflowError, KeyError, TypeError):
        return None


def last_lines(log: Path, offset: int, count: int = 5) -> list[str]:
    """The last lines of a log beyond its first `offset` bytes, none if there is none."""
    if not log.exists():
        return []
    lines = log.read_bytes()[offset:].decode(errors="replace").splitlines()
    return lines[-count:]


def commit(root: Path = ROOT) -> str | None:
    """Of the code in this folder; None where that is no repository of its own, as within another one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # with its own .git named, git looks for no repository in the folders around it
    command = ("git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always", "--dirty")
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip()
