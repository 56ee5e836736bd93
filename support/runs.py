"""A run and its folder: begun, resumed or forked, saved, interrupted."""

import contextlib
import math
import os
import secrets
import shlex
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.checkpoints import (
    BEGIN_AGAIN,
    WRITE_ERRORS,
    Checkpoint,
    create_run_folder,
    load_checkpoint,
    newest_good_checkpoint,
    read_identity,
    save_checkpoint,
)
from support.evaluation import require_film
from support.machine import FolderGone, HeldFolder, alone_in, idle_gpu, way_out
from support.process import Signals, group_of_equals
from support.run_log import RunLog, read_scalars
from support.usage import UsageError, out_of_resources
from support.versions import unsupported_versions
from support.weights_and_biases import finish_wandb, let_go, require_wandb, start_wandb


def check_machine(device: torch.device, cuda_graphs: bool, track: bool, film: bool) -> None:
    """Raises UsageError where something that a run is to use is not here."""
    if cuda_graphs and device.type == "cpu":
        fix = "--no-cuda-graphs, with --fork if it has begun"
        raise UsageError(f"--cuda-graphs needs a GPU, and this run is on the CPU: {fix}")
    if track:
        require_wandb()
    if film:
        require_film()


@dataclass(frozen=True)
class Origin:
    """What a run goes on from; nothing for a new one."""

    folder: Path | None = None  # of a run that is resumed
    run_id: str | None = None  # of that run
    args: dict[str, Any] = field(default_factory=dict)  # of that run, also where it is a fork
    checkpoint: Checkpoint | None = None
    curves: dict[str, np.ndarray] = field(default_factory=dict)  # of the run that is forked

    @property
    def nothing(self) -> bool:
        """Whether a new run begins."""
        return self.folder is None and self.checkpoint is None

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def forked(self) -> bool:
        """Whether the checkpoint is another run's."""
        return self.checkpoint is not None and self.checkpoint.meta["run"] != self.run_id

    @property
    def history(self) -> list[dict[str, Any]]:
        """The runs that this one was, newest first: "run" (an id), "folder" (a name), "seed", last "step"."""
        if self.checkpoint is None:
            return []
        meta = self.checkpoint.meta
        if not self.forked:
            return meta["history"]
        folder = self.checkpoint.path.resolve().parent.name
        forked_run = {"run": meta["run"], "folder": folder, "step": self.step, "seed": meta["args"]["seed"]}
        return [forked_run, *meta["history"]]


def find_origin(resume: str | None, fork: str | None, stack: contextlib.ExitStack) -> Origin:
    """Reads what a run goes on from; a folder that is resumed is locked until the stack unwinds.

    A run that was killed before its first checkpoint begins once more, at the one that it was forked from, if
    any. Raises UsageError where it cannot be read, or another process is running it.
    """
    if resume is None:
        return _fork_point(fork)
    folder = Path(resume)
    stack.enter_context(alone_in(folder))
    identity = read_identity(folder / "run.json")
    newest = newest_good_checkpoint(folder, identity["run"])
    if newest is not None:  # whose arguments have a checksum
        return Origin(folder, identity["run"], newest.meta["args"], newest)
    begins_at = identity["args"].get("fork")
    try:
        beginning = _fork_point(begins_at)
    except UsageError as error:
        cannot = (
            f"{folder} holds no checkpoint to go on from, and nothing can be read where it began ({error})"
        )
        raise UsageError(f"{cannot}: {BEGIN_AGAIN}") from error
    if any(steps.max() > beginning.step for steps, _, _ in read_scalars(folder).values()):
        raise UsageError(f"{folder} holds no checkpoint to go on from: {BEGIN_AGAIN}")
    return replace(beginning, folder=folder, run_id=identity["run"], args=identity["args"])


def _fork_point(path: str | None) -> Origin:
    """What a run goes on from that is forked from a checkpoint; nothing for a run that is not."""
    if path is None:
        return Origin()
    checkpoint = load_checkpoint(Path(path))
    fix = "move that file away, and the fork's curves begin at the checkpoint"
    return Origin(checkpoint=checkpoint, curves=read_scalars(checkpoint.path.resolve().parent, fix))


class Run:
    """A run in progress.

    Args:
        name: of its folder under `runs`, if it is new; the time comes after it
        version: of the script, for `run.json`
        args: its arguments as plain data, for `run.json` and checkpoints
        parts: what checkpoints hold, by name, besides the log; restored here, in this order
        stack: takes what is to be undone in the end
    """

    def __init__(
        self,
        origin: Origin,
        name: str,
        version: str,
        args: dict[str, Any],
        parts: dict[str, Any],
        circumstances: dict[str, str],
        signals: Signals,
        stack: contextlib.ExitStack,
    ):
        self.args = args
        self.parts = parts
        self.circumstances = circumstances
        self.signals = signals
        self.num_envs = args["num_envs"]
        self.id = origin.run_id or secrets.token_hex(8)
        self.history = origin.history
        self.first = origin.step  # the step at which this process begins
        self.step = origin.step
        checkpoint = origin.checkpoint
        self.saved: int | None = None  # step of its newest checkpoint
        if checkpoint is not None and not origin.forked:
            self.saved = checkpoint.step
        self.way_out = ""  # of what kept the last checkpoint from being written
        self.complete = False

        # its folder: that of a new run has only a name, until all that could refuse the run has been done
        folder = origin.folder
        if folder is None:
            folder = Path("runs") / f"{name}__{int(time.time())}"
        else:
            self.place = HeldFolder(folder)

        # what it goes on from, and its mirror in Weights & Biases
        mirror = None
        with signals.nothing_to_save():
            if checkpoint is not None:
                checkpoint.restore(parts)
            if args["track"]:
                mirror = self._start_mirror(folder.name, stack)

        # the folder of a new run, in which no other process may run
        if origin.folder is None:
            identity = {"run": self.id, "version": version, "args": args, "history": self.history}
            folder = create_run_folder(folder, identity)
            self.place = HeldFolder(folder)
            stack.enter_context(alone_in(folder))

        # its log, with the curves that neither the folder nor the mirror has yet
        stack.push(self._name_what_is_left)
        log = RunLog(self.folder, self.step, args["total_timesteps"])
        self.log = stack.enter_context(contextlib.closing(log))
        if checkpoint is not None:
            checkpoint.restore({"log": self.log})
        if self.saved is None or (mirror is not None and not mirror.resumed):
            if checkpoint is not None:
                earlier = origin.curves if origin.forked else read_scalars(self.folder)
                self.log.take_over(earlier, self.step)
            self.log.hyperparameters(args, self.step)
        if mirror is not None:
            self.log.flush()
            let_go()

    def _start_mirror(self, name: str, stack: contextlib.ExitStack) -> Any:
        """The run in Weights & Biases; it ends there with this one's exit status."""
        args = self.args
        mirror = start_wandb(args["wandb_project_name"], args["wandb_entity"], name, self.id, args)

        def finish(_: Any, error: BaseException | None, __: Any) -> None:
            if isinstance(error, SystemExit):
                status = error.code
            elif error is not None:
                status = 1
            else:
                stop = None if self.complete else self.signals.stop
                status = 0 if stop is None else 128 + stop
            finish_wandb(mirror, status)

        if mirror is not None:
            stack.push(finish)
        return mirror

    @property
    def folder(self) -> Path:
        """Where it is now: it may be moved while the run goes on. Raises FolderGone where it is nowhere."""
        return self.place.here()

    @property
    def previous(self) -> int:
        """The step at which the vector step that ends at `step` began."""
        return (self.step - 1) // self.num_envs * self.num_envs

    def due(self, period: int, after: int = 0) -> int:
        """How many multiples of `period` lie in this vector step, previous < it ≤ step, beyond `after`."""
        if period == 0:
            return 0
        return max(0, self.step // period - max(self.previous, after) // period)

    @property
    def interrupted(self) -> bool:
        """Whether a signal waits for an answer."""
        return self.signals.stop is not None or (self.signals.checkpoint and self.saved != self.step)

    def save(self, keep: Collection[int]) -> None:
        """Writes a checkpoint, unless there is one of this step, and says so, or says why it could not.

        Those of the steps in `keep` stay. Raises OSError where it cannot be written and the run is to stop.
        """
        self.signals.checkpoint = False
        if self.saved == self.step:
            return
        step = f"step {self.step:,}"
        say = self.log.say
        if self.signals.stop is not None:
            say(f"{step}: {self.signals.stop.name}, writing a checkpoint; once more ends the run without it")
        self.log.flush(to_disk=True)
        parts = self.parts | {"log": self.log}
        meta = {"run": self.id, "args": self.args, "history": self.history}
        meta["circumstances"] = self.circumstances
        start = time.perf_counter()
        try:
            with self.log.pause():
                path = self.place.write(lambda folder: save_checkpoint(folder, self.step, parts, meta, keep))
        except WRITE_ERRORS as error:
            if self.signals.stop is not None:  # it may have come just now
                message = f"stopped at {step} without a checkpoint ({error}): {self.kept}"
                raise OSError(message) from error
            self.way_out = way_out(error)
            fix = f"{self.way_out}, the run will try again"
            say(f"warning: no checkpoint at {step} ({error}): {fix}; {self.kept}")
            return
        seconds = time.perf_counter() - start
        self.saved = self.step
        self.log.progress.note({"step": self.step})
        self.log.progress.write()
        megabytes = math.nan
        with contextlib.suppress(OSError):
            megabytes = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        say(f"{step}: {path.name}, {megabytes:,.0f} MB in {seconds:.1f} s")

    @property
    def kept(self) -> str:
        """What is left of the run where it ends now."""
        if self.saved is None:
            return "there is none yet"
        if self.place.find() is None:
            return f"the last one, checkpoint-{self.saved}, was in it"
        return f"checkpoint-{self.saved} is still good"

    def _name_what_is_left(self, _: Any, error: BaseException | None, __: Any) -> None:
        """Where memory or a GPU gives out in mid-run, says so in one line, with what can be gone on from."""
        reason = None if error is None else out_of_resources(error)
        if reason is not None:
            folder = self.place.find()
            if self.saved is None:
                left = f"there is no checkpoint yet: {BEGIN_AGAIN}"
            elif folder is None:
                left = f"{self.place.path} is gone, {self.kept}"
            else:
                left = f"{self.kept}: go on with --resume {folder}"
            raise OSError(f"stopped at step {self.step:,}, {reason}; {left}") from error

    def evaluate(self, play: Callable[[Path | None, Callable[[], bool]], np.ndarray], film: bool) -> bool:
        """Logs the mean score of play(film's path, whether to stop); False, with no log, if it stopped."""
        with self.log.pause():
            try:
                path = self.folder / "videos" / f"step-{self.step}.mp4" if film else None
                scores = play(path, lambda: self.interrupted)
            except (UsageError, OSError) as error:
                if not film:
                    raise
                self.log.say(f"warning: no video at step {self.step:,} ({error})")
                scores = play(None, lambda: self.interrupted)
        if np.isnan(scores).any():
            return False
        self.log.evaluation(scores, self.step)
        return True

    def introduce(self, games: str, device: torch.device, origin: Origin) -> None:
        """Says what runs where, and what of the circumstances is not as it should be, or as it was."""
        self.log.progress.note({"device": device.type})
        self.log.progress.write()
        count = torch.get_num_threads()
        threads = "1 thread" if count == 1 else f"{count} threads"
        self.log.say(f"{games} on {device} with {threads}, curves in {self.folder}")
        for remark in unsupported_versions():
            self.log.say(f"warning: {remark}")
        group = group_of_equals()
        if group is not None:
            name, size = group
            equal = f"{size} processes were started alike, and those with one seed are one and the same run"
            fix = "start one (srun -n 1)"
            if origin.folder is None:  # a run that goes on has its seed
                fix += ", or give each a --seed of its own"
            self.log.say(f"warning: {name} is {size}: {equal}; {fix}")
        sign = idle_gpu() if self.args["cuda"] else None
        if sign is not None:
            cannot = f"there is a GPU ({sign}), but PyTorch {torch.__version__} cannot use it"
            fix = "see to driver, PyTorch's build, CUDA_VISIBLE_DEVICES; or give --no-cuda"
            self.log.say(f"warning: {cannot}, and the CPU takes days: {fix}")
        if origin.checkpoint is not None:
            begun = "forked" if origin.forked else "resumed"
            self.log.say(f"{begun} at step {self.step:,} from {origin.checkpoint.path}")
            if origin.forked and self.step > 0 and not origin.curves:
                self.log.say(
                    "remark: its run's curves do not lie beside that checkpoint, earlier ones are missing"
                )
            before = origin.checkpoint.meta["circumstances"]
            changed = []
            for name, value in self.circumstances.items():
                if name in before and value != before[name]:
                    changed.append(f"{name} was {before[name]} and is {value}")
            if changed:
                reasons = ", ".join(changed)
                self.log.say(f"warning: bits may differ from an uninterrupted run, because {reasons}")

    def command(self, script: str, flag: str) -> str:
        """What to type to have the script do something with this run."""
        paths = []
        for path in (os.path.relpath(script), str(self.folder)):
            if path.startswith(("-", "~")):  # it would be a flag, or somebody's home
                path = os.path.join(os.curdir, path)
            paths.append(shlex.quote(path))
        return f"python {paths[0]} --{flag} {paths[1]}"

    def finish(self, complete: bool, script: str) -> None:
        """Says how to go on with a run that was stopped; makes sure of one that is complete.

        Raises OSError where the curves or the last checkpoint of a complete run are not on disk.
        """
        if not complete:
            how = f"go on with: {self.command(script, 'resume')}"
            self.log.say(f"stopped at step {self.step:,} of {self.log.total:,}, {how}")
            return
        self.complete = True
        self.signals.stop = None  # it came too late
        self.log.flush(to_disk=True)
        try:
            folder = self.folder
        except FolderGone as gone:
            raise OSError(f"{gone}: the run is complete, and all that it saved was in there") from None
        unsaved = self.args["checkpoint_frequency"] > 0 and self.saved != self.step
        missing = []
        if unsaved:
            missing.append("last checkpoint")
        if self.log.way_out:
            missing.append("curves")
        if missing:
            lacking = " and ".join(missing)
            fix = self.way_out if unsaved else self.log.way_out
            raise OSError(f"{folder} is complete but for its {lacking}: {fix}, and --resume it if you can")
