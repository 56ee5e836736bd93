"""A sweep under way, engine aside: what each run is about, which may begin, and all of it in words."""

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
from analysis.arms import readable
from analysis.report import report
from orchestration.jobs import Job, find_folder
from orchestration.manifest import (
    Change,
    Manifest,
    Progress,
    last_lines,
    newest,
    now,
    read_manifest,
    read_progress,
)
from orchestration.plan import Asked, PlannedRun
from support.process import Unfailing, say
from support.usage import UsageError

ENDED = ("finished", "failed", "not started")
FOR_LEARNING = 1.5e9  # bytes of memory besides the replay
TRAIN = (sys.executable, str(Path(script.__file__).resolve()))


@dataclass
class Task:
    """A run of the plan in the hands of a sweep."""

    run: PlannedRun
    folder: Path
    """of the sweep"""
    commit: str | None
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

    def read(self) -> Progress | None:
        """What its process says of itself; None before it has a folder."""
        return None if self.run_folder is None else read_progress(self.run_folder)

    def take_up(self, last: Change) -> None:
        """Goes on from what a manifest says. A run whose folder has gone is to be done once more.

        Where the sweep was killed while it ran, nobody noted its hours: it counts up to its last word.
        """
        self.attempt, self.hours = last.attempt, last.hours
        if last.state == "running":
            said = self.read()
            if said is not None and said.time is not None:
                self.hours += max(0.0, said.time - last.time) / 3600
        self.progress = Progress(step=last.step)
        if last.state == "finished" and self.run_folder is not None:
            self.state = "finished"

    def begin(self) -> None:
        """Notes that a new attempt begins."""
        self.attempt += 1
        self.began, self.progress = None, Progress(step=self.progress.step)
        self.offset = self.log.stat().st_size if self.log.exists() else 0
        said = self.read()
        self.before = None if said is None else said.process

    def look(self) -> bool:
        """Reads how far it has come. Returns whether it has begun since the last look."""
        if not self.log.exists() or self.log.stat().st_size <= self.offset:
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
        args, progress = self.run.args, self.progress
        seconds = 0.0 if self.began is None else time.monotonic() - self.began
        step = args.total_timesteps if state == "finished" else progress.step
        speed = (step - progress.first) / seconds if seconds and step > progress.first else None
        folder = self.run_folder
        if state not in ("queued", "running"):
            self.hours, self.began = self.hours + seconds / 3600, None
        return Change(
            time=now(),
            run=self.run.name,
            arm=self.run.arm,
            seed=args.seed,
            game=args.env_id,
            state=state,
            step=step,
            attempt=self.attempt,
            host=progress.host,
            device=progress.device,
            steps_per_second=None if speed is None else round(speed, 1),
            hours=round(self.hours, 5),
            commit=self.commit,
            folder=None if folder is None else str(folder.relative_to(self.folder)),
        )

    def job(self, fork: Path | None, threads: int) -> Job:
        """What is to be done: begin, with a checkpoint to fork if there is one, or go on where it has begun."""
        origin = () if fork is None else ("--fork", os.path.relpath(fork, self.folder))
        no_gpu = (
            () if self.resources["num_gpus"] else ("--no-cuda",)
        )  # one that is kept for nobody is visible all the same
        begin, place = (*TRAIN, *origin, *self.run.flags, *no_gpu), self.folder.resolve()
        variables = {"OMP_NUM_THREADS": str(threads)}
        return Job(
            self.run.name,
            begin,
            (*TRAIN, "--resume"),
            str(place),
            str(place / "logs" / self.log.name),
            variables,
        )


class Book:
    """The runs of a sweep by name, and its manifest, which is written by nobody else."""

    def __init__(self, folder: Path, tasks: list[Task]):
        self.folder, self.manifest = folder, Manifest(folder)
        self.tasks = {task.run.name: task for task in tasks}
        changes = newest(read_manifest(folder))
        for name in self.tasks.keys() & changes.keys():
            self.tasks[name].take_up(changes[name])

    def open_tasks(self) -> list[Task]:
        return [task for task in self.tasks.values() if task.state not in ENDED]

    def fork_point(self, task: Task) -> tuple[Path | None, str]:
        """The checkpoint of its trunk that a run begins with, None for one that has none; and "ready", "wait" or "never"."""
        if task.run.trunk is None or task.run_folder is not None:
            return None, "ready"
        trunk = self.tasks[task.run.trunk]
        folder = (
            None if trunk.state == "queued" else trunk.run_folder
        )  # a search, in a folder that may be large
        if folder is not None and (path := folder / f"checkpoint-{task.run.begins}").exists():
            return path, "ready"
        return None, "never" if trunk.state in ENDED else "wait"

    def record(self, task: Task, state: str, why: str = "") -> None:
        """Brings a run into a state, notes it and says so.

        Raises:
            OSError: the manifest cannot be written.
        """
        self.manifest.add(task.change(state))
        where = f", attempt {task.attempt} on {task.progress.host}" if state == "running" else ""
        say(f"{task.run.name}: {state}{f' ({why})' * bool(why)}{where}, {task.progress}")

    def look(self) -> None:
        """Reads how far those have come that the engine has."""
        for task in self.open_tasks():
            if task.ref is not None and task.look():
                self.record(task, "running")

    def settle(self, task: Task, state: str, why: str, retries: int, pause: float) -> None:
        """Takes note of how an attempt has ended. A run that was killed goes on after a pause, which grows, in seconds."""
        if task.look():
            self.record(task, "running")
        if state == "killed":
            task.kills += 1
            task.after = time.monotonic() + pause * 2 ** (task.kills - 1)
            if task.kills > retries:
                state, why = "failed", f"killed {task.kills} times, with --retries {retries}; {why}"
        self.record(task, state, why)
        if state == "failed":
            say("\n  ".join((f"last lines of {task.log}:", *last_lines(task.log, task.offset))))

    def in_words(self) -> str:
        """How many runs are in which state, and how far those have come that are running."""
        running = (
            f"{task.run.name}: {task.progress}" for task in self.tasks.values() if task.state == "running"
        )
        return "\n  ".join((self.counts(), *running))

    def counts(self) -> str:
        return ", ".join(
            f"{count} {state}" for state, count in Counter(task.state for task in self.tasks.values()).items()
        )

    def table(self, most: int) -> Table:
        """At most so many runs, those that matter most at the moment first."""
        order = ("running", "killed", "failed", "not started", "queued", "stopped", "finished")
        table = Table(
            Column("run", overflow="fold"),
            "state",
            "step",
            "steps/s",
            "left",
            "return",
            caption=self.counts(),
        )
        for task in sorted(self.tasks.values(), key=lambda task: order.index(task.state))[: max(1, most)]:
            at, total = task.progress, task.run.args.total_timesteps
            table.add_row(task.run.name, task.state, f"{at.step:,} of {total:,}", at.speed, at.left, at.score)
        return table


def resources(
    run: PlannedRun,
    cpus: float | None,
    gpus: float | None,
    memory: float | None,
    nodes: list[dict[str, float]],
) -> dict[str, float]:
    """What is to be kept free for a run on one of these machines: num_cpus, num_gpus, and memory in bytes.

    Args:
        cpus, gpus, memory: as the user says, memory in GB; None for what the run needs and the machines have
        nodes: of each machine, "CPU", "GPU", and "memory" in bytes

    Raises:
        UsageError: none of them has that much.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) > 0]
    if gpus is None:
        gpus = 1 if with_gpus and run.args.cuda else 0
    if cpus is None:
        at_once = [(node.get("CPU", 0), max(1, node["GPU"] // gpus)) for node in with_gpus] if gpus else []
        cpus = max(1, min((processors // runs for processors, runs in at_once), default=1))
    memory = run.memory + FOR_LEARNING if memory is None else memory * 1e9
    needs = {"CPU": cpus, "GPU": gpus, "memory": memory}
    if not any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes):
        most = ", ".join(
            f"{n.get('CPU', 0):g}, {n.get('GPU', 0):g} and {n.get('memory', 0) / 1e9:.1f} GB" for n in nodes
        )
        needed = f"{run.name} needs {cpus:g} processors, {gpus:g} GPUs and {memory / 1e9:.1f} GB of memory"
        fix = "lower --cpus-per-run, --gpus-per-run, --memory-per-run, or --buffer-size after --"
        raise UsageError(f"{needed}, and no machine has that, but {most}: {fix}")
    return {"num_cpus": cpus, "num_gpus": gpus, "memory": int(memory)}


def default_name(asked: Asked, game: str) -> str:
    """A sweep's name, of its games and arms."""
    short = game.removeprefix("ALE/").replace("NoFrameskip", "").replace("/", "-")
    origin = () if asked.from_checkpoint is None else (Path(asked.from_checkpoint).name,)
    games = short if len(asked.env_ids) < 2 else f"{len(asked.env_ids)}-games"
    return readable("_".join((games, *origin, *asked.arms)))


def plan_in_words(runs: list[PlannedRun], speed: float | None) -> list[str]:
    """Lines on a plan; hours are estimated where a speed in steps per second is known."""
    lines = []
    for run in runs:
        origin = (
            f"forks from {run.trunk} at"
            if run.trunk
            else "forks from the checkpoint at"
            if run.begins
            else "whole, from"
        )
        lines.append(
            f"{run.name}: {origin} step {run.begins:,}, {run.steps:,} steps to {run.args.total_timesteps:,}"
        )
    forks, steps, saved = (
        sum(run.begins > 0 for run in runs),
        sum(run.steps for run in runs),
        sum(run.begins for run in runs),
    )
    lines.append(
        f"{len(runs)} runs, {forks} of them forks: {steps:,} steps, {saved:,} fewer than if each ran whole"
    )
    lines.append(f"disk: about {sum(run.disk for run in runs) / 1e9:,.1f} GB, an estimate")
    if speed is None:
        lines.append("hours: give --speed, in steps per second of one run")
    else:
        longest = max(run.args.total_timesteps if run.trunk else run.steps for run in runs)
        hours, least = steps / speed / 3600, longest / speed / 3600
        lines.append(
            f"hours: {hours:,.1f} of one run at a time at {speed:,.0f} steps per second, {least:,.1f} at least"
        )
    return lines


def conclude(book: Book, metric: str) -> None:
    """Compares the runs that are finished.

    Raises:
        SystemExit: with status 1, some are not.
        OSError: the comparison cannot be written.
    """
    tasks = book.tasks.values()
    folders = [
        str(folder) for task in tasks if task.state == "finished" and (folder := task.run_folder) is not None
    ]
    if folders:
        try:
            with contextlib.redirect_stdout(Unfailing(sys.stdout)):  # type: ignore[type-var]
                report(folders, book.folder / "comparison.png", metric, None, "mean")
        except UsageError as error:
            say(f"no comparison: {error}")
    if missing := [task.run.name for task in tasks if task.state != "finished"]:
        fix = "mend what the last lines above say, and give the same command once more"
        raise SystemExit(
            f"error: {len(missing)} of {len(tasks)} runs are not finished ({', '.join(missing)}): {fix}"
        )
