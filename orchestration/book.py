"""The book of a sweep under way: the state of each run, which may begin, all in words, and the comparison."""

import contextlib
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Column, Table

import dqn_injection_atari as script
from analysis.report import report
from orchestration import manifest
from orchestration.jobs import Job, find_folder
from orchestration.manifest import Change, Manifest, Progress, last_lines, read_manifest, read_progress
from orchestration.plan import PlannedRun
from support.process import Unfailing, say
from support.usage import UsageError

ENDED = ("finished", "failed", "not started")
LONGEST_PAUSE = 600.0  # seconds
TRAIN = (sys.executable, str(Path(script.__file__).resolve()))


@dataclass
class Task:
    """A run of the plan in the hands of a sweep."""

    run: PlannedRun
    folder: Path
    """of the sweep"""
    commit: str | None = None
    """of the code that its last attempt began with"""
    resources: dict[str, float] = field(default_factory=dict)
    """what the engine is to keep free for it"""
    state: str = "queued"
    attempt: int = 0
    kills: int = 0
    """how often it was killed in this sweep's time"""
    after: float = 0.0
    """on the monotonic clock, when it may begin"""
    ref: Any = None
    """what the engine calls it, while it has it"""
    offset: int = 0
    """bytes of its log before this attempt"""
    before: tuple[str, int, float] | None = None
    """the process that said last how far the run is, before this attempt"""
    began: float | None = None
    """on the monotonic clock, this attempt"""
    hours: float = 0.0
    """of attempts before this one"""
    progress: Progress = field(default_factory=Progress)
    found: Path | None = None
    """its folder, once it was seen"""

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.run.name}.log"

    @property
    def run_folder(self) -> Path | None:
        if self.found is None and self.attempt:
            self.found = find_folder(self.folder, self.run.name)
        return self.found

    def checkpoint(self, step: int) -> Path | None:
        """Its checkpoint of that step, if it is there."""
        if self.run_folder is None:
            return None
        path = self.run_folder / f"checkpoint-{step}"
        return path if path.exists() else None

    @property
    def keeps_a_gpu_for_nothing(self) -> bool:
        wanted = self.resources.get("num_gpus", 0) > 0 and self.run.args.cuda
        return wanted and self.progress.device == "cpu"

    def read(self) -> Progress | None:
        """What its process says of itself; None before it has a folder."""
        return None if self.run_folder is None else read_progress(self.run_folder)

    def take_up(self, last: Change) -> None:
        """Goes on from what a manifest says. A run whose folder has gone is to be done once more.

        Where the sweep was killed while it ran, nobody noted its hours: it counts up to its last word.
        """
        self.attempt = last.attempt
        self.hours = last.hours
        if last.state == "running":
            last_word = self.read()
            if last_word is not None and last_word.time is not None:
                self.hours += max(0.0, last_word.time - last.time) / 3600
        self.progress = Progress(step=last.step)
        if last.state == "finished" and self.run_folder is not None:
            self.state = "finished"

    @property
    def has_said_something(self) -> bool:
        """Whether its log has grown since this attempt was to begin."""
        return self.log.exists() and self.log.stat().st_size > self.offset

    def begin(self) -> None:
        """Notes that a new attempt begins."""
        self.attempt += 1
        self.began = None
        self.found = None  # another machine may have begun it anew
        self.progress = Progress(step=self.progress.step)
        self.offset = self.log.stat().st_size if self.log.exists() else 0
        last_word = self.read()
        self.before = None if last_word is None else last_word.process

    def look(self) -> bool:
        """Reads how far it has come. Returns whether it has begun since the last look."""
        if not self.has_said_something:
            return False  # no process yet; to search for its folder among many would take long
        progress = self.read()
        if progress is None or progress.device is None or progress.process == self.before:
            return False  # it has not said yet where it computes, and from which step
        begun = self.began is None
        self.progress = progress
        if begun:
            self.began = time.monotonic()
        return begun

    def change(self, state: str) -> Change:
        """Brings it into a state. Returns the manifest's line about that."""
        self.state = state
        args = self.run.args
        progress = self.progress
        step = args.total_timesteps if state == "finished" else progress.step
        seconds = 0.0 if self.began is None else time.monotonic() - self.began
        speed = None
        if seconds > 1 and step > progress.first:  # else it has just been seen, and its clock begins
            speed = round((step - progress.first) / seconds, 1)
        if state not in ("queued", "running"):
            self.hours += seconds / 3600
            self.began = None
        folder = self.run_folder
        return Change(
            time=round(time.time(), 3),
            run=self.run.name,
            arm=self.run.arm,
            seed=args.seed,
            game=args.env_id,
            state=state,
            step=step,
            attempt=self.attempt,
            host=progress.host,
            device=progress.device,
            steps_per_second=speed,
            hours=round(self.hours, 5),
            commit=self.commit,
            folder=None if folder is None else str(folder.relative_to(self.folder)),
        )

    def job(self, fork: Path | None, threads: int) -> Job:
        """What is to be done: begin, with a checkpoint to fork where there is one, or go on."""
        begin = list(TRAIN)
        if fork is not None:
            begin += ["--fork", os.path.relpath(fork, self.folder)]
        begin += self.run.flags
        if not self.resources["num_gpus"]:
            begin.append("--no-cuda")  # a GPU that is kept for nobody is visible all the same
        place = self.folder.resolve()
        return Job(
            name=self.run.name,
            begin=tuple(begin),
            go_on=(*TRAIN, "--resume"),
            place=str(place),
            log=str(place / "logs" / self.log.name),
            environment={"OMP_NUM_THREADS": str(threads)},
        )


class Book:
    """The runs of a sweep by name, and its manifest, which is written by nobody else."""

    def __init__(self, folder: Path, tasks: list[Task]):
        self.folder = folder
        self.manifest = Manifest(folder)
        self.tasks = {task.run.name: task for task in tasks}
        changes = read_manifest(folder)
        last_changes = {change.run: change for change in changes}
        self.commits = list(dict.fromkeys(change.commit for change in changes))
        """of the code that runs have begun with, oldest first"""
        self.commits_of_now: list[str | None] = []
        """those since this process has the book"""
        for task in tasks:
            if task.run.name in last_changes:
                task.take_up(last_changes[task.run.name])

    def open_tasks(self) -> list[Task]:
        return [task for task in self.tasks.values() if task.state not in ENDED]

    def fork_point(self, task: Task) -> tuple[Path | None, str]:
        """The checkpoint to begin with, if any; and whether that can be: "ready", "wait" or "never"."""
        if task.run.trunk is None:
            return None, "ready"
        trunk = self.tasks[task.run.trunk]
        if trunk.state != "queued":  # no search of a large folder before
            checkpoint = trunk.checkpoint(task.run.begins)
            if checkpoint is not None:
                return checkpoint, "ready"
        if task.run_folder is not None:  # it has gone beyond that
            return None, "ready"
        return None, "never" if trunk.state in ENDED else "wait"

    def forks_of(self, trunk: Task) -> list[str]:
        """The folders of runs that have gone on from its checkpoint."""
        folders = []
        for task in self.tasks.values():
            if task.run.trunk == trunk.run.name and task.run_folder is not None:
                folders.append(str(task.run_folder))
        return folders

    def why_never(self, task: Task) -> str:
        """Why a fork cannot begin, and what to do where its trunk is not to be done once more anyway."""
        trunk = self.tasks[str(task.run.trunk)]
        why = f"{trunk.run.name} left no checkpoint at step {task.run.begins:,}"
        if trunk.state == "finished":
            why += f": move {trunk.run_folder} away, and the same command trains both"
            others = self.forks_of(trunk)
            if others:
                folders = ", ".join(others)
                why += f"; its other forks are no pair with the new: move {folders} away, too, "
                why += "once they have ended"
        return why

    def begin(self, task: Task) -> None:
        """Notes that a new attempt of a run begins, as soon as there is room for it."""
        self.note_code(task)
        task.begin()

    def note_code(self, task: Task) -> None:
        """Notes that a run begins with the code that is here now.

        Warns where runs have begun with other code, once for each commit.
        """
        task.commit = manifest.commit()
        if task.commit in self.commits_of_now:
            return
        self.commits_of_now.append(task.commit)
        others = [commit for commit in self.commits if commit not in (None, task.commit)]
        self.commits = list(dict.fromkeys([*self.commits, task.commit]))
        if others:
            now = task.commit or "none, as this folder is no repository"
            before = f"runs of this sweep began at commit {', '.join(others)}, and it goes on at {now}"
            effect = "where training has changed in between, arms may differ by that, too"
            say(f"warning: {before}; {effect}: go back to that commit, or give another --name")

    def record(self, task: Task, state: str, why: str = "") -> None:
        """Brings a run into a state, notes it and says so. Raises OSError where it cannot be noted."""
        self.manifest.add(task.change(state))
        line = f"{task.run.name}: {state}"
        if why:
            line += f" ({why})"
        if state == "running":
            line += f", attempt {task.attempt} on {task.progress.host}"
        say(f"{line}, {task.progress}")
        if state == "running" and task.keeps_a_gpu_for_nothing:
            fix = "see to that machine's driver, and to PyTorch's build"
            say(f"warning: {task.run.name} keeps a GPU, and computes on the CPU: {fix} ({task.log})")

    def look(self) -> None:
        """Reads how far those have come that the engine has."""
        for task in self.open_tasks():
            if task.ref is not None:
                self.look_at(task)

    def look_at(self, task: Task) -> None:
        """Reads how far one has come, and notes it where it has just begun."""
        if task.look():
            self.note_code(task)  # it may have waited for long since `begin`
            self.record(task, "running")

    def settle(self, task: Task, state: str, why: str, retries: int, pause: float) -> None:
        """Takes note of how a process has ended. A killed run goes on after a pause, each a longer one.

        One that ended well and whose last checkpoint is not here has failed: a retry could train it anew.
        """
        self.look_at(task)
        # every run of a sweep leaves a checkpoint of its end
        if state == "finished" and task.checkpoint(task.run.args.total_timesteps) is None:
            state = "failed"
            place = self.folder.resolve() / "runs"
            missing = f"it has ended well, but its last checkpoint is not in {place}"
            why = f"{missing}: move its folder back, or share that place between machines"
        if state == "killed":
            task.kills += 1
            longest = max(pause, LONGEST_PAUSE)
            task.after = time.monotonic() + min(pause * 2.0 ** min(task.kills - 1, 100), longest)
            if task.kills > retries:
                state = "failed"
                why = f"killed {task.kills} times, with --retries {retries}; {why}"
        self.record(task, state, why)
        if state == "failed":
            say("\n  ".join([f"last lines of {task.log}:", *last_lines(task.log, task.offset)]))

    def in_words(self) -> str:
        """How many runs are in which state, and how far those have come that are running."""
        lines = [self.counts()]
        for task in self.tasks.values():
            if task.state == "running":
                lines.append(f"{task.run.name}: {task.progress}")
            elif task.ref is not None and task.has_said_something:  # as where it waits for an earlier attempt
                lines.append(f"{task.run.name}: has not begun to train yet, see {task.log}")
        return "\n  ".join(lines)

    def counts(self) -> str:
        counts = Counter(task.state for task in self.tasks.values())
        return ", ".join(f"{count} {state}" for state, count in counts.items())

    def table(self, most: int) -> Table:
        """At most so many runs, those that matter most at the moment first."""
        order = ("running", "killed", "failed", "not started", "queued", "stopped", "finished")
        tasks = sorted(self.tasks.values(), key=lambda task: order.index(task.state))
        columns = (Column("run", overflow="fold"), "state", "step", "steps/s", "left", "return")
        table = Table(*columns, caption=self.counts())
        for task in tasks[: max(1, most)]:
            progress = task.progress
            step = f"{progress.step:,} of {task.run.args.total_timesteps:,}"
            table.add_row(task.run.name, task.state, step, progress.speed, progress.left, progress.score)
        return table


def conclude(book: Book, metric: str) -> None:
    """Compares the runs that are finished. Raises SystemExit where others are not."""
    folders = []
    missing = []
    for task in book.tasks.values():
        if task.state != "finished":
            missing.append(task.run.name)
        elif task.run_folder is not None:
            folders.append(str(task.run_folder))
    if folders:
        try:
            with contextlib.redirect_stdout(Unfailing(sys.stdout)):  # type: ignore[type-var]
                report(folders, book.folder / "comparison.png", metric, None, "mean")
        except UsageError as error:
            say(f"no comparison: {error}")
    if missing:
        unfinished = f"{len(missing)} of {len(book.tasks)} runs are not finished ({', '.join(missing)})"
        fix = "mend what the last lines above say, and give the same command once more"
        raise SystemExit(f"error: {unfinished}: {fix}")
