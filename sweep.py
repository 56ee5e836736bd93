"""Many runs of the training script, games × seeds × arms, on this machine or a Ray cluster (docs/sweeps.md).

    python sweep.py --env-ids PhoenixNoFrameskip-v4 --seeds 1 2 3 4 5 -- --injection-step 5000000
    python sweep.py --from-checkpoint runs/X/checkpoint-5000000 --seeds 1 2 3 4 5 --steps 1000000

Flags after -- go to the training script. For each game, seed and setting one arm runs whole, and the others
fork from it at the first injection. An arm is a value of --intervention, or your own: --arm "all heads"
"--no-freeze-heads" (repeatable). The same command once more goes on with what is not finished.
"""

import contextlib
import importlib.util
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from annotated_types import Ge

try:
    from support.versions import exit_with_wrong_versions

    if __name__ == "__main__":
        exit_with_wrong_versions()
    from rich.console import Console
    from rich.live import Live

    from orchestration import jobs, manifest, plan
    from orchestration.book import Book, Task, conclude
    from orchestration.engine import cluster, machines, outcome, ray_module, resources

    if importlib.util.find_spec("ray") is None:  # which is imported where it is started
        raise ModuleNotFoundError(name="ray")
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    if package in ("orchestration", "analysis", "dqn_injection_atari", "alternatives", "support"):
        fix = "clone or copy the project's whole folder, and run it there"
        sys.exit(f"error: {error.name} is not beside this script: {fix}")
    fix = f"pip install -r requirements-sweep.txt, in {Path(__file__).resolve().parent}"
    sys.exit(f"error: {package} is not installed: {fix}")

from support.machine import alone_in, slow_bfloat16
from support.process import Signals, Unfailing, begin_in_utf8, ends_in_one_line, on_a_terminal, say
from support.usage import Positive, Steps, UsageError, check_bounds, flag, words_given

TICK = 1.0  # seconds
MINUTE = 60.0
LEAST_RESERVED = 0.0001  # of a processor or a GPU, that Ray can set aside


@dataclass(frozen=True)
class Settings:
    """What to run, and with what."""

    env_ids: tuple[str, ...] = ()
    """games, Atari ids of Gymnasium"""
    seeds: tuple[Steps, ...] = (1, 2, 3)
    """seeds, each of them in each arm"""
    arms: tuple[str, ...] = ("none", "injection")
    """values of --intervention; those with another name come by --arm NAME FLAGS"""
    grid: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """a flag of the training script and values: learning-rate 1e-4 5e-4; each value has runs of its own"""
    from_checkpoint: str | None = None
    """a checkpoint that all arms and seeds continue"""
    steps: Annotated[int | None, Ge(1)] = None
    """steps that each run adds to the checkpoint's"""
    name: str | None = None
    """folder under sweeps/; by default made of games and arms"""
    address: str | None = None
    """of a running Ray cluster, or auto; without it, Ray starts and ends with this command"""
    cpus_per_run: Annotated[float | None, Ge(0)] = None
    """processors to reserve for a run; by default 1, with GPUs a machine's processors ÷ its runs on GPUs"""
    threads_per_run: Annotated[int | None, Ge(1)] = None
    """threads that each run computes with, on which its bits depend; by default as many as its processors.
    Fixed for as long as the sweep's folder exists"""
    memory_per_run: Annotated[float | None, Ge(0)] = None
    """GB of memory to keep free for a run; by default its full replay and 1.5 GB"""
    gpus_per_run: Annotated[float | None, Ge(0)] = None
    """GPUs to reserve for a run; with a fraction, several share one. By default 1 if there are any, unless
    the sweep began without"""
    retries: Steps = 3
    """how many times a run that was killed is started again"""
    retry_pause: Positive = 10.0
    """seconds before the first restart; doubled before each further one, up to ten minutes"""
    metric: Literal["charts/episodic_return", "eval/episodic_return"] = "charts/episodic_return"
    """which return is compared in the end, see compare.py"""
    dry_run: bool = False
    """print the plan, and start nothing"""
    speed: Annotated[float | None, Ge(1e-9)] = None
    """steps per second of one run, for the hours in the plan; by default as measured in this sweep before"""


def command_line(words: list[str]) -> tuple[Settings, plan.Asked]:
    """The settings and the sweep that a command line asks for. Raises UsageError where it cannot be run."""
    end = words.index("--") if "--" in words else len(words)
    flags_of_sweep, custom_arms = split_custom_arms(words[:end])
    settings = tyro.cli(Settings, description=__doc__, args=flags_of_sweep)
    check_bounds(settings)
    gpus = settings.gpus_per_run
    if gpus is not None and gpus > 1 and gpus % 1:
        raise UsageError(f"gpus_per_run is {gpus:g}, but must be whole above 1: change --gpus-per-run")
    for resource in ("cpus_per_run", "gpus_per_run"):
        share = getattr(settings, resource)
        if share is not None and 0 < share < LEAST_RESERVED:
            raise UsageError(
                f"{resource} is {share:g}, but must be 0 or at least {LEAST_RESERVED}: "
                f"change {flag(resource)}"
            )
    if settings.speed is not None and not settings.dry_run:
        raise UsageError("speed is for the hours in a plan: give --dry-run as well, or leave it out")
    name = settings.name
    if name is not None and (Path(name).name != name or name in ("", "..")):
        raise UsageError(f"name is {name}, but must be a folder's under sweeps/: change --name")
    checkpoint = settings.from_checkpoint
    asked = plan.Asked(
        env_ids=settings.env_ids,
        seeds=settings.seeds,
        arms=plan.all_arms(settings.arms, custom_arms),
        grid=[list(axis) for axis in settings.grid],
        flags=words[end + 1 :],
        from_checkpoint=None if checkpoint is None else str(Path(checkpoint).resolve()),
        steps=settings.steps,
    )
    return settings, asked


def split_custom_arms(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words without any --arm NAME FLAGS, which tyro does not know; and {name: flags} of those."""
    left = []
    custom_arms: dict[str, str] = {}
    remaining = iter(words)
    for word in remaining:
        if word != "--arm":
            left.append(word)
            continue
        name = next(remaining, None)
        flags = next(remaining, None)
        if name is None or flags is None:
            raise UsageError('arm has a name and flags: give --arm "all heads" "--no-freeze-heads"')
        if name in custom_arms:
            raise UsageError(f"arm {name} is given twice: give each another name")
        custom_arms[name] = flags
    return left, custom_arms


def refuse_slow_bfloat16(tasks: list[Task]) -> None:
    """Raises UsageError where a new run is to learn in bfloat16 on this processor, and would refuse that."""
    slow = slow_bfloat16(torch.device("cpu"))
    for task in tasks:
        on_cpu = task.resources["num_gpus"] == 0
        new = task.run.begins == 0 and jobs.find_folder(task.folder, task.run.name) is None
        if slow and task.run.args.bf16 and on_cpu and new:
            fix = "leave out --bf16"
            if (task.folder / "sweep.json").exists():  # it began with that flag
                fix = "go on where there are some, or leave out --bf16 and give another --name"
            raise UsageError(f"{slow}: {fix}")


class Sweep:
    """The runs of a plan in Ray's hands, from the first to the last."""

    def __init__(self, book: Book, settings: Settings, threads: int):
        self.book = book
        self.settings = settings
        self.threads = threads
        self.ray = ray_module()
        self.job = self.ray.remote(max_retries=0)(jobs.run)

    def submit(self, task: Task) -> None:
        """Begins a run, or goes on with it, if it may."""
        fork, when = self.book.fork_point(task)
        if when == "never":
            self.book.record(task, "not started", self.book.why_never(task))
        elif when == "ready" and time.monotonic() >= task.after:
            self.book.begin(task)
            task.ref = self.job.options(**task.resources).remote(task.job(fork, self.threads))
            self.book.record(task, "queued")

    def settle(self, task: Task, stopping: bool = False) -> None:
        """Takes note of how a run's job has ended."""
        state, why = outcome(task.ref)
        task.ref = None
        if stopping and state == "killed":
            state = "stopped"
            why = ""
        self.book.settle(task, state, why, self.settings.retries, self.settings.retry_pause)

    def advance(self) -> None:
        """Begins what may begin, waits a moment, and looks at all that goes on."""
        for task in self.book.open_tasks():
            if task.ref is None:
                self.submit(task)
        going = self.going()
        time.sleep(TICK)
        if going:
            ended, _ = self.ray.wait(list(going), num_returns=len(going), timeout=0)
            for ref in ended:
                self.settle(going[ref])
        self.book.look()

    def going(self) -> dict[Any, Task]:
        """The runs that Ray has, by what it calls them."""
        return {task.ref: task for task in self.book.open_tasks() if task.ref is not None}

    def stop(self) -> None:
        """Has every run write a checkpoint and end, and waits for that; then raises an OSError there was."""
        going = self.going()
        unwritten: OSError | None = None
        for ref in going:
            self.ray.cancel(ref)
        while going:
            ended, _ = self.ray.wait(list(going), timeout=TICK)
            for ref in ended:
                try:
                    self.settle(going.pop(ref), stopping=True)
                except OSError as error:  # the manifest cannot be written
                    unwritten = error
        if unwritten is not None:
            raise unwritten

    def go(self, signals: Signals) -> None:
        """Runs all to their ends, or until a signal.

        Raises:
            OSError: the sweep cannot go on, as where its manifest cannot be written. Every run has stopped.
        """
        try:
            self.follow(signals)
        except OSError:
            say("the sweep cannot go on: every run writes a checkpoint and ends")
            with contextlib.suppress(OSError):
                self.stop()
            raise

    def follow(self, signals: Signals) -> None:
        """The same, with a table on a terminal, and a line each minute elsewhere."""
        spoken = time.monotonic()
        console = Console(file=Unfailing(sys.stderr))  # type: ignore[arg-type]
        table = Live(console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
        with table if on_a_terminal() else contextlib.nullcontext() as live:
            while signals.stop is None and self.book.open_tasks():
                self.advance()
                if live is not None:
                    live.update(self.book.table(live.console.height - 6), refresh=True)
                elif time.monotonic() - spoken >= MINUTE:
                    spoken = time.monotonic()
                    say(self.book.in_words())
            if signals.stop is not None:
                ends = "every run writes a checkpoint and ends; once more ends them without it"
                say(f"{signals.stop.name}: {ends}")
                self.stop()
            if live is not None:
                live.update(self.book.table(len(self.book.tasks)))


def alone(folder: Path) -> contextlib.AbstractContextManager[None]:
    """No other sweep runs in this folder during the block, see `alone_in`."""
    return alone_in(folder, manifest.MANIFEST, "a sweep's folder", "give another --name")


def carry_out(settings: Settings, asked: plan.Asked, runs: list[plan.PlannedRun], folder: Path) -> Book:
    """Does the runs, and returns the book of them. Raises SystemExit where a signal has ended that."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster(settings.address))
        nodes = machines()
        gpus = settings.gpus_per_run
        if gpus is None and asked.gpu is False:
            gpus = 0
        tasks = []
        for run in runs:
            kept = resources(run, settings.cpus_per_run, gpus, settings.memory_per_run, nodes)
            tasks.append(Task(run, folder, resources=kept))
        threads = asked.threads or max(1, int(tasks[0].resources["num_cpus"]))
        on_gpu = any(task.resources["num_gpus"] and task.run.args.cuda for task in tasks)
        asked = replace(asked, threads=threads, gpu=on_gpu)
        if settings.address is None:  # other machines may be of other kinds: each run speaks for itself
            refuse_slow_bfloat16(tasks)
        manifest.prepare(folder)
        stack.enter_context(alone(folder))
        manifest.refuse_another(folder, asdict(asked))  # once more, now that no other sweep can begin here
        manifest.begin(folder, asdict(asked))
        processor = "GPU" if on_gpu else "CPU"
        say(f"runs compute on the {processor}, with --threads-per-run {threads}")
        book = Book(folder, tasks)
        with Signals() as signals:
            Sweep(book, settings, threads).go(signals)
    if signals.stop is not None:
        raise SystemExit(128 + signals.stop)
    return book


def main() -> None:
    with ends_in_one_line():
        settings, asked = command_line(words_given())
        runs = plan.plan(asked)
        asked = replace(asked, origin=plan.identity_of(asked.from_checkpoint))
        name = plan.default_name(asked, runs[0].args.env_id) if settings.name is None else settings.name
        length = len(os.fsencode(name))
        if length > plan.LONGEST_NAME:
            too_long = f"name is {name}, {length} bytes, but {plan.LONGEST_NAME} are possible"
            raise UsageError(f"{too_long}: give a shorter --name")
        folder = Path("sweeps", name)
        before = manifest.read_asked(folder) if (folder / "sweep.json").exists() else asked
        asked = replace(asked, threads=settings.threads_per_run or before.threads, gpu=before.gpu)
        may_be_running = (folder / manifest.MANIFEST).exists() and not settings.dry_run
        with alone(folder) if may_be_running else contextlib.nullcontext():
            manifest.refuse_another(folder, asdict(asked))
        unevaluated = [run.name for run in runs if run.args.eval_frequency == 0]
        if settings.metric.startswith("eval/") and unevaluated:
            fix = "give --eval-frequency after --, or leave out --metric"
            raise UsageError(f"{settings.metric} is compared, but {unevaluated[0]} never evaluated: {fix}")
        for line in plan.copies_in_words(runs):
            say(line)
        if settings.dry_run:
            speed = settings.speed or manifest.measured_speed(manifest.read_manifest(folder))
            print(*plan.plan_in_words(runs, speed), sep="\n")
            return
        book = carry_out(settings, asked, runs, folder)
        conclude(book, settings.metric)


if __name__ == "__main__":
    begin_in_utf8()
    main()
