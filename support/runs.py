"""A run and its folder: begun, resumed or forked, saved, interrupted."""

import contextlib
import math
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.checkpoints import (
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
from support.versions import refuse_wrong_versions, unsupported_versions
from support.weights_and_biases import finish_wandb, let_go, require_wandb, start_wandb


def check_machine(device: torch.device, cuda_graphs: bool, track: bool, film: bool) -> None:
    """
    Raises:
        UsageError: something that a run is to use is not here, or gives wrong numbers.
    """
    refuse_wrong_versions()
    if cuda_graphs and device.type == "cpu":
        raise UsageError(
            "--cuda-graphs needs a GPU, and this run is on the CPU: --no-cuda-graphs, with --fork if it has begun"
        )
    if track:
        require_wandb()
    if film:
        require_film()


@dataclass(frozen=True)
class Origin:
    """What a run goes on from; nothing for a new one."""

    folder: Path | None = None  # of a run that is resumed
    run_id: str | None = None  # of that run
    args: dict[str, Any] = field(default_factory=dict)  # of that run: its own, never those of another one
    checkpoint: Checkpoint | None = None
    curves: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # of the run that is forked, see `read_scalars`

    @property
    def nothing(self) -> bool:
        """Whether a new run begins."""
        return self.folder is None and self.checkpoint is None

    @property
    def forked(self) -> bool:
        """Whether the checkpoint is another run's."""
        return self.checkpoint is not None and self.checkpoint.meta["run"] != self.run_id

    @property
    def forked_args(self) -> dict[str, Any]:
        """The arguments of the run that is forked, when the fork begins and whenever it begins again."""
        if self.checkpoint is None or not self.forked:
            return {}
        return self.checkpoint.meta["args"]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The runs that this one was before it had a folder of its own, see `history_of`."""
        if self.checkpoint is None:
            return []
        meta = self.checkpoint.meta
        if not self.forked:
            return history_of(meta)
        folder = self.checkpoint.path.resolve().parent.name
        seed = meta["args"]["seed"]
        forked_from = {"run": meta["run"], "folder": folder, "step": self.checkpoint.step, "seed": seed}
        return [forked_from, *history_of(meta)]


def history_of(identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a run was before, newest first: "run" (an id), "folder" (its name), "seed", and "step", up to which.

    Empty for a run that was begun whole. Earlier versions noted no more than the path given to --fork: what is not
    known is None there.

    Args:
        identity: what a run.json holds, or a checkpoint's manifest
    """
    if "history" in identity:
        return list(identity["history"])
    fork = identity["args"].get("fork")
    if fork is None:
        return []
    unknown = {"run": None, "folder": None, "step": 0, "seed": None}
    folder, _, step = "/".join(Path("..", fork).parts[-2:]).partition("/checkpoint-")
    if folder == ".." or not step.isdigit():
        return [unknown]
    named = re.search(r"__(\d+)__\d+(-\d+)?$", folder)  # as `Run` names folders
    return [unknown | {"folder": folder, "step": int(step), "seed": int(named[1]) if named else None}]


def find_origin(resume: str | None, fork: str | None, stack: contextlib.ExitStack) -> Origin:
    """Reads what a run goes on from; a folder that is resumed is this process's own until the stack unwinds.

    A run that was killed before its first checkpoint begins once more, at the checkpoint that it was forked from, if any.

    Raises:
        UsageError: it cannot be read, or another process is running it.
    """
    if resume is None and fork is None:
        return Origin()
    if resume is None:
        return Origin(**_fork_point(fork))
    folder = Path(resume)
    stack.enter_context(alone_in(folder))
    identity = read_identity(folder / "run.json")
    newest = newest_good_checkpoint(folder, identity["run"])
    if newest is not None:  # whose arguments have a checksum
        return Origin(folder, identity["run"], newest.meta["args"], newest)
    fork_point = _fork_point(identity["args"].get("fork"))
    begun = fork_point["checkpoint"].step if fork_point else 0
    if any(points[0].max() > begun for points in read_scalars(folder).values()):
        raise UsageError(f"{folder} holds no checkpoint to go on from: start the run again without --resume")
    return Origin(**fork_point | {"folder": folder, "run_id": identity["run"], "args": identity["args"]})


def _fork_point(path: str | None) -> dict[str, Any]:
    """What `Origin` holds of the checkpoint that a run is forked from; nothing for a run that is not."""
    if path is None:
        return {}
    checkpoint = load_checkpoint(Path(path))
    curves = read_scalars(
        checkpoint.path.parent, "move that file away, and the fork's curves begin at the checkpoint"
    )
    return {"checkpoint": checkpoint, "curves": curves}


class Run:
    """A run in progress.

    Args:
        origin: what it goes on from
        name: of its folder under `runs`, if it is new; the time comes after it
        version: of the script, for `run.json`
        args: its arguments as plain data, for `run.json` and checkpoints; here "total_timesteps", "num_envs" and what is about
            Weights & Biases are looked at
        parts: what checkpoints hold, by name, besides the log; restored here, in this order
        circumstances: what its bits depend on besides its arguments
        signals: what it is asked
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
        self.args, self.signals = args, signals
        self.total, self.num_envs = args["total_timesteps"], args["num_envs"]
        self.parts, self.circumstances = parts, circumstances
        folder = origin.folder or Path("runs") / f"{name}__{int(time.time())}".replace("/", "-")
        if origin.folder is not None:
            self.place = HeldFolder(folder)
        checkpoint = origin.checkpoint
        self.first = self.step = 0 if checkpoint is None else checkpoint.step
        if checkpoint is not None:
            with signals.nothing_to_save():
                checkpoint.restore(parts)
        self.id = origin.run_id or secrets.token_hex(8)
        self.history = origin.history
        with signals.nothing_to_save():
            mirror = self._mirror(folder.name, stack) if args["track"] else None
        if origin.folder is None:
            identity = {"run": self.id, "version": version, "args": args, "history": self.history}
            folder = create_run_folder(folder, identity)
            self.place = HeldFolder(folder)
            stack.enter_context(alone_in(folder))
        self.way_out = ""  # of what kept the last checkpoint from being written
        self.saved = (
            self.step if checkpoint is not None and not origin.forked else None
        )  # step of the newest checkpoint
        stack.push(self._name_what_is_left)
        self.log = stack.enter_context(contextlib.closing(RunLog(self.folder, self.step, self.total)))
        if checkpoint is not None:
            checkpoint.restore({"log": self.log})
        anew = self.saved is None or (
            mirror is not None and not mirror.resumed
        )  # that mirror has none of the curves yet
        if checkpoint is not None and anew:
            self.log.take_over(origin.curves if origin.forked else read_scalars(self.folder), self.step)
        if anew:
            self.log.hyperparameters(args, self.step)
        if mirror is not None:
            self.log.flush()
            let_go()

    def _mirror(self, name: str, stack: contextlib.ExitStack) -> Any:
        """The run in Weights & Biases; it ends there with this one's exit status."""
        mirror = start_wandb(
            self.args["wandb_project_name"], self.args["wandb_entity"], name, self.id, self.args
        )

        def finish(_: Any, error: BaseException | None, __: Any) -> None:
            status = 0 if self.signals.stop is None else 128 + self.signals.stop
            code = error.code if isinstance(error, SystemExit) else 1
            finish_wandb(mirror, status if error is None else code)

        if mirror is not None:
            stack.push(finish)
        return mirror

    @property
    def folder(self) -> Path:
        """Where it is now; it may be renamed or moved while the run goes on.

        Raises:
            FolderGone: it is nowhere, and nothing can be written.
        """
        return self.place.here()

    @property
    def previous(self) -> int:
        """The step at which the vector step that ends at `step` began."""
        return (self.step - 1) // self.num_envs * self.num_envs

    def due(self, period: int, after: int = 0) -> int:
        """How many multiples of `period` lie in this vector step, previous < multiple ≤ step, and beyond `after`."""
        return max(0, self.step // period - max(self.previous, after) // period) if period else 0

    @property
    def interrupted(self) -> bool:
        """Whether a signal waits for an answer."""
        return self.signals.stop is not None or (self.signals.checkpoint and self.saved != self.step)

    def save(self, keep: Collection[int]) -> None:
        """Writes a checkpoint, unless there is one of this step, and says so; where it cannot, says that and changes nothing.

        Args:
            keep: steps whose checkpoints stay when this one is there

        Raises:
            OSError: it cannot be written, and the run was asked to stop.
        """
        self.signals.checkpoint = False
        if self.saved == self.step:
            return
        stop, say = self.signals.stop, self.log.say
        if stop is not None:
            say(f"step {self.step:,}: {stop.name}, writing a checkpoint; once more ends the run without it")
        self.log.flush(to_disk=True)
        start = time.perf_counter()
        try:
            with self.log.pause():
                path = self._write_checkpoint(keep)
        except WRITE_ERRORS as error:
            if self.signals.stop is not None:  # it may have come just now
                raise OSError(
                    f"stopped at step {self.step:,} without a checkpoint ({error}): {self.kept}"
                ) from error
            self.way_out = way_out(error)
            say(
                f"warning: no checkpoint at step {self.step:,} ({error}): {self.way_out}, the run will try again; {self.kept}"
            )
        else:
            self.saved = self.step
            self.log.progress.note(step=self.step)
            self.log.progress.write()
            seconds, size = time.perf_counter() - start, math.nan
            with contextlib.suppress(OSError):
                size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
            say(f"step {self.step:,}: {path.name}, {size:,.0f} MB in {seconds:.1f} s")

    def _write_checkpoint(self, keep: Collection[int]) -> Path:
        """Writes it to the run's folder, and begins once more where that is moved in the meantime."""
        folder = self.folder
        meta = {
            "run": self.id,
            "args": self.args,
            "history": self.history,
            "circumstances": self.circumstances,
        }
        try:
            return save_checkpoint(folder, self.step, self.parts | {"log": self.log}, meta, keep)
        except OSError:
            if self.folder == folder:
                raise
            return self._write_checkpoint(keep)

    @property
    def kept(self) -> str:
        """What is left of the run where it ends now."""
        if self.saved is None:
            return "there is none yet"
        if self.place.find() is None:
            return f"the last one, checkpoint-{self.saved}, was in it"
        return f"checkpoint-{self.saved} is still good"

    def _name_what_is_left(self, _: Any, error: BaseException | None, __: Any) -> None:
        """Where memory or a GPU gives out in mid-run, says so in one line, with what there is to go on from."""
        if error is not None and (reason := out_of_resources(error)):
            folder = self.place.find() or self.place.path
            raise OSError(
                f"stopped at step {self.step:,}, {reason}; of {folder}, to --resume, {self.kept}"
            ) from error

    def evaluate(self, play: Callable[[Path | None, Callable[[], bool]], np.ndarray], film: bool) -> bool:
        """Logs the mean score of play(film's path, whether to stop). False where a signal cut it short, nothing logged then."""
        with self.log.pause():
            try:
                scores = play(self._film() if film else None, lambda: self.interrupted)
            except (UsageError, OSError) as error:
                if not film:
                    raise
                self.log.say(f"warning: no video at step {self.step:,} ({error})")
                scores = play(None, lambda: self.interrupted)
        if np.isnan(scores).any():
            return False
        self.log.evaluation(scores, self.step)
        return True

    def _film(self) -> Path:
        """Where this evaluation is filmed to, in a folder that is there.

        Raises:
            OSError: it cannot be made.
        """
        videos = self.folder / "videos"
        videos.mkdir(exist_ok=True)
        return videos / f"step-{self.step}.mp4"

    def introduce(self, what: str, device: torch.device, origin: Origin) -> None:
        """Says what runs where, and what of the circumstances is not as it should be, or as it was."""
        threads = torch.get_num_threads()
        self.log.progress.note(device=device.type)
        self.log.progress.write()
        where = f"{what} on {device}"
        self.log.say(f"{where} with {threads} thread{'s' * (threads > 1)}, curves in {self.folder}")
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
        if self.args["cuda"] and (sign := idle_gpu()):
            cannot = f"there is a GPU ({sign}), but PyTorch {torch.__version__} cannot use it"
            self.log.say(
                f"warning: {cannot}, and the CPU takes days: see to driver, PyTorch's build, CUDA_VISIBLE_DEVICES"
            )
        if origin.checkpoint is not None:
            self.log.say(
                f"{'forked' if origin.forked else 'resumed'} at step {self.step:,} from {origin.checkpoint.path}"
            )
            then, now = origin.checkpoint.meta["circumstances"], self.circumstances
            changed = [
                f"{name} was {then.get(name)} and is {now[name]}"
                for name in now
                if now[name] != then.get(name)
            ]
            if changed:
                self.log.say(
                    f"warning: bits may differ from an uninterrupted run, because {', '.join(changed)}"
                )

    def command(self, script: str, flag: str) -> str:
        """What to type to have the script do something with this run."""
        paths = (os.path.relpath(script), str(self.folder))
        # what begins with a dash would be a flag, with a ~ somebody's home
        plain = [os.path.join(os.curdir, path) if path[0] in "-~" else path for path in paths]
        return f"python {shlex.quote(plain[0])} --{flag} {shlex.quote(plain[1])}"

    def finish(self, complete: bool, script: str) -> None:
        """Says how to go on with a run that was stopped; makes sure of one that is complete.

        Raises:
            OSError: the curves or the last checkpoint of a complete run are not on disk.
        """
        if not complete:
            self.log.say(
                f"stopped at step {self.step:,} of {self.total:,}, go on with: {self.command(script, 'resume')}"
            )
            return
        self.signals.stop = None  # it came too late
        self.log.flush()
        folder = self.place.find()
        if folder is None:
            raise OSError(
                f"{FolderGone(self.place.path)}: the run is complete, and all that it saved was in there"
            )
        unsaved = self.args["checkpoint_frequency"] > 0 and self.saved != self.step
        if missing := ["last checkpoint"] * unsaved + ["curves"] * self.log.disk_full:
            lacking = " and ".join(missing)
            fix = self.way_out if unsaved else self.log.way_out
            raise OSError(f"{folder} is complete but for its {lacking}: {fix}, and --resume it if you can")
