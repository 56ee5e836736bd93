"""The plan of a sweep: which runs there are, which of them fork from which, what they take; and in words."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.arms import readable
from dqn_injection_atari import FORKABLE, INTERVENTIONS, OF_INTERVENTION, Args, check_fork, check_past
from orchestration.training_flags import as_flags, parsed, words_of
from support import usage
from support.checkpoints import Checkpoint, load_checkpoint
from support.environments import OBS_SPACE, atari_spec
from support.replay import FrameReplayBuffer
from support.usage import UsageError, flag, reading

CHOICES = (*INTERVENTIONS, "none")  # of --intervention
INSTEAD = {  # flags of the training script that a sweep gives, and what to give to the sweep
    "env_id": "--env-ids",
    "seed": "--seeds",
    "intervention": "--arms",
    "exp_name": "--name",
    "resume": "the same command once more",
    "fork": "--from-checkpoint",
    "evaluate": "nothing, it plays one agent",
}
INSTEAD_WHERE_RUNS_CONTINUE = INSTEAD | {
    "total_timesteps": "--steps",
    "injection_step": "--from-checkpoint",
    "injection_trigger": "--from-checkpoint",
    "exploration_fraction": "--from-checkpoint",
    "preset": "--from-checkpoint",
}
UNSEEN_BY_BASELINES = {*OF_INTERVENTION, "injection_step", "exp_name"} - {"intervention"}
LONGEST_NAME = 255  # bytes that file systems allow
AFTER_NAME = "__1234567890-1000"  # what a run's folder has after it: time and number; a log has less
# estimates of checkpoints and curves, see docs/sweeps.md
NETWORK_BYTES = 30e6
BYTES_PER_PAIR = 40e6  # of heads: both networks have its weights, and one has moments
BYTES_PER_FRAME = 120
BYTES_PER_STEP = 1.0


@dataclass(frozen=True)
class Asked:
    """What a sweep is asked for. Its folder holds it, and it cannot change there."""

    env_ids: tuple[str, ...]
    seeds: tuple[int, ...]
    arms: dict[str, list[str]]
    """flags of the training script that make each arm, the names of interventions among them"""
    grid: list[list[str]]
    """of each: a flag's name, then its values"""
    flags: list[str]
    """flags that all runs share"""
    from_checkpoint: str | None = None
    steps: int | None = None
    """how many more, from that checkpoint"""
    origin: dict[str, Any] | None = None
    """what that checkpoint is, wherever it lies: its run's id and its step"""
    threads: int | None = None
    """that every run computes in; None as long as nobody has decided"""
    gpu: bool | None = None
    """whether there is a run that computes on one; None as long as nobody has decided"""


@dataclass(frozen=True)
class PlannedRun:
    """A run of the plan; `args` are its arguments but for what it is forked from."""

    arm: str
    args: Args
    flags: tuple[str, ...]
    """what begins it, but for --fork where it has a trunk"""
    begins: int = 0
    """step of the checkpoint that it is forked from; 0 where it is not"""
    trunk: str | None = None
    """name of the run of this plan that it is forked from"""

    @property
    def name(self) -> str:
        """That of its folder, but for the time."""
        return self.args.run_name

    @property
    def steps(self) -> int:
        return self.args.total_timesteps - self.begins

    @property
    def memory(self) -> int:
        """Bytes of its replay, when it is full."""
        return FrameReplayBuffer.bytes_needed(self.args.buffer_size, OBS_SPACE, self.args.num_envs)

    @property
    def disk(self) -> float:
        """Bytes of its checkpoints, one in the making included, and curves: an estimate."""
        args = self.args
        kept = len([step for step in args.kept_checkpoints if step >= self.begins])
        if args.injection_trigger == "norm" and args.intervention != "none":
            kept += 1  # before the first one
        checkpoint = NETWORK_BYTES + BYTES_PER_PAIR * args.planned_pairs
        checkpoint += BYTES_PER_FRAME * min(args.buffer_size, args.total_timesteps)
        return (kept + 2) * checkpoint + BYTES_PER_STEP * args.total_timesteps


def plan(asked: Asked) -> list[PlannedRun]:
    """The runs, each behind the one that it is forked from. Raises UsageError where something cannot work."""
    origin = None if asked.from_checkpoint is None else load_checkpoint(Path(asked.from_checkpoint))
    check_asked(asked, origin)
    if origin is not None:
        check_past(origin)
    runs: list[PlannedRun] = []
    for values in grid_settings(asked.grid):
        family = plan_arms(asked, values, origin)
        for game in asked.env_ids or (family[0].args.env_id,):
            for seed in asked.seeds:
                members = [with_game_and_seed(run, game, seed) for run in family]
                for run in members:
                    trunk = None if run.trunk is None else members[0].name
                    runs.append(replace(run, trunk=trunk))
    if any(run.args.checkpoint_frequency == 0 for run in runs):
        nothing = "nothing to fork arms from, and nothing to go on from"
        fix = "leave it out"
        if origin is not None:  # whose frequency its forks have
            fix = "give a checkpoint of a run that has another"
        raise UsageError(f"checkpoint_frequency 0 leaves {nothing}: {fix}")
    check_names([run.name for run in runs])
    return runs


def check_names(names: list[str]) -> None:
    """Raises UsageError where a file system has no room for the name of a run, or may take two for one."""
    longest = max(names, key=lambda name: len(name.encode()))
    length = len((longest + AFTER_NAME).encode())
    if length > LONGEST_NAME:
        fix = "give a shorter name to --arm, or fewer flags and values to --grid"
        too_long = f"{longest} makes a folder's name of {length} bytes, but {LONGEST_NAME} are possible"
        raise UsageError(f"{too_long}: {fix}")
    seen: set[str] = set()
    for name in names:
        if name.casefold() in seen:  # on macOS, capital letters make no other name
            fix = "give arms, games and values that are spelt differently, and not in capital letters alone"
            raise UsageError(f"two runs would have the name {name}: {fix}")
        seen.add(name.casefold())


def identity_of(checkpoint: str | None) -> dict[str, Any] | None:
    """What a checkpoint is, wherever it lies: the id of its run, and its step; None for none."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    with reading(path, "a checkpoint", "take another"):
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return {"run": manifest["run"], "step": manifest["step"]}


def check_asked(asked: Asked, origin: Checkpoint | None) -> None:
    """Raises UsageError where a part contradicts another one, or is nothing that there is."""
    for env_id in asked.env_ids:
        atari_spec(env_id)
    if len(set(asked.env_ids)) < len(asked.env_ids) or len(set(asked.seeds)) < len(asked.seeds):
        raise UsageError("a game or a seed is given twice: give each once, in --env-ids and --seeds")
    if not asked.seeds or not asked.arms or not (asked.env_ids or origin):
        fix = "give --env-ids, --seeds and --arms, one of each at least"
        raise UsageError(f"there is no run in this sweep: {fix}")
    if (origin is None) != (asked.steps is None):
        fix = "give both --from-checkpoint and --steps, or neither"
        raise UsageError(f"from_checkpoint and steps belong together: {fix}")
    if origin is not None and asked.env_ids:
        raise UsageError(f"{origin.path} plays {origin.meta['args']['env_id']}: leave out --env-ids")
    axes = [values[0].lstrip("-").replace("-", "_") for values in asked.grid if values]
    if len(set(axes)) < len(asked.grid):
        fix = "give --grid learning-rate 1e-4 5e-4, once for each flag"
        raise UsageError(f"grid has a flag twice, or none: {fix}")
    instead = INSTEAD if origin is None else INSTEAD_WHERE_RUNS_CONTINUE
    refuse_flags(usage.flags_given(asked.flags), "after --", instead)
    refuse_flags(axes, "in --grid", instead)
    for arm, flags in asked.arms.items():
        refuse_flags(usage.flags_given(flags) - {"intervention"}, f"in arm {arm}", instead)
        twice = usage.flags_given(flags).intersection(axes)
        if twice:
            # its own flag comes last: each of the grid's values would be the same runs
            raise UsageError(f"{flag(min(twice))} is in arm {arm} and in --grid: leave it out of one of them")


def refuse_flags(names: Iterable[str], where: str, instead: dict[str, str]) -> None:
    """Raises UsageError where the sweep itself gives one of these flags, which stand there."""
    for name in names:
        if name in instead:
            fix = f"leave it out, and give {instead[name]}"
            raise UsageError(f"{flag(name)} {where} is what the sweep itself gives: {fix}")


def all_arms(interventions: Sequence[str], custom: dict[str, str]) -> dict[str, list[str]]:
    """{name: flags} of the arms. A user's has an injection, unless its flags say what else is done."""
    arms = {}
    for arm in interventions:
        if arm not in CHOICES:
            fix = f'give --arm "{arm}" FLAGS for your own'
            raise UsageError(f"arm {arm} is none of {', '.join(CHOICES)}: {fix}")
        arms[arm] = ["--intervention", arm]
    for arm, flags in custom.items():
        if not readable(arm):
            nothing = f'arm "{arm}" has no letter or digit that a folder\'s name could have'
            raise UsageError(f"{nothing}: give another name to --arm")
        if arm in CHOICES:
            raise UsageError(f"arm {arm} has flags already, --intervention {arm}: give another name to --arm")
        words = words_of(flags)
        if "intervention" not in usage.flags_given(words):
            words = ["--intervention", "injection", *words]
        arms[arm] = words
    return arms


def grid_settings(grid: list[list[str]]) -> list[dict[str, str]]:
    """{field: value} of every combination, the last flag's values change first; one without a grid, empty."""
    axes: dict[str, list[str]] = {}
    for name, *values in grid:
        field = name.lstrip("-").replace("-", "_")
        if not values or len(set(values)) < len(values) or field not in Args.__dataclass_fields__:
            fix = "give --grid learning-rate 1e-4 5e-4"
            raise UsageError(f"grid {' '.join([name, *values])} is no flag and its values: {fix}")
        axes[field] = values
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def with_game_and_seed(run: PlannedRun, game: str, seed: int) -> PlannedRun:
    """The same run in another game, where it does not continue an agent, and with another seed."""
    flags = [*run.flags, "--seed", str(seed), "--exp-name", run.args.exp_name]
    if run.begins == 0:
        flags += ["--env-id", game]
    return replace(run, args=replace(run.args, env_id=game, seed=seed), flags=tuple(flags))


def plan_arms(asked: Asked, values: dict[str, str], origin: Checkpoint | None) -> list[PlannedRun]:
    """A run of each arm with these of the grid's values, the first seed and game.

    The others may fork from the first.
    """
    setting_names = []
    setting_flags: list[str] = []
    for field, value in values.items():
        setting_names.append(f"{field.replace('_', '-')}-{readable(value)}")
        words = words_of(value)
        setting_flags += as_flags(field, words[0] if len(words) == 1 else tuple(words))
    arms = [arm for arm in asked.arms if arm != "none"]
    if "none" in asked.arms:
        arms.insert(0, "none")
    family: list[PlannedRun] = []
    for arm in arms:
        exp_name = "_".join((readable(arm), *setting_names))
        flags = (*asked.flags, *setting_flags, *asked.arms[arm])
        if origin is not None:
            family.append(continuation(asked, arm, flags, exp_name, origin))
            continue
        first = ("--env-id", asked.env_ids[0], "--seed", str(asked.seeds[0]), "--exp-name", exp_name)
        with naming(arm):
            run = PlannedRun(arm, parsed((*flags, *first)), flags)
        if family:
            run = forked_from_trunk(run, family[0])
        family.append(run)
    return family


@contextlib.contextmanager
def naming(arm: str) -> Iterator[None]:
    """Names the arm in what is refused in this block."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"arm {arm}: {error}") from error


def forked_from_trunk(run: PlannedRun, trunk: PlannedRun) -> PlannedRun:
    """The run as a fork from the trunk's checkpoint at the first injection, or as it is where none can be."""
    if not trunk.args.one_time_interventions or run.args.injection_trigger == "norm":
        return run
    step = trunk.args.one_time_interventions[0]
    if run.args.planned_interventions and run.args.planned_interventions[0] < step:
        return run
    changed = [name for name in usage.changed_fields(run.args, trunk.args) if name != "exp_name"]
    refused = [name for name in changed if name not in FORKABLE]
    if refused:
        differs = f"arm {run.arm} has another {', '.join(refused)} than {trunk.arm}, which arms share"
        raise UsageError(f"{differs}: give --grid {refused[0].replace('_', '-')} with the values")
    # the checkpoint that will be there
    path = Path("runs", trunk.name, f"checkpoint-{step}")
    meta = {"step": step, "args": vars(trunk.args)}
    check_fork(run.args, Checkpoint(path, meta, {"learner": {"interventions": ()}}))
    flags: list[str] = []
    for name in changed:
        flags += as_flags(name, getattr(run.args, name))
    return replace(run, flags=tuple(flags), begins=step, trunk=trunk.name)


def continuation(
    asked: Asked, arm: str, flags: tuple[str, ...], exp_name: str, origin: Checkpoint
) -> PlannedRun:
    """The run that goes on from a checkpoint in an arm, with the first seed."""
    assert asked.steps is not None
    step = origin.step
    total = step + asked.steps
    saved = origin.meta["args"]
    falls = saved["exploration_fraction"] * saved["total_timesteps"]  # steps over which ε does
    if step == 0 or falls > total:
        fix = f"give a checkpoint from step 1 on, and --steps of {int(falls) - step + 1} or more"
        cannot = f"{origin.path} at step {step} cannot be continued for {asked.steps} steps"
        raise UsageError(f"{cannot}: {fix}, over which ε falls as it did")
    before = origin.state["learner"]["interventions"]
    flags = ("--fork", str(origin.path), *flags, "--total-timesteps", str(total))
    flags += (
        "--exploration-fraction",
        repr(falls / total),
        "--injection-trigger",
        "step",
        "--injection-step",
    )
    first = ("--seed", str(asked.seeds[0]), "--exp-name", exp_name)
    with naming(arm):
        args = parsed((*flags, str(step), *first))
    if before and (args.intervention == "none" or args.intervention_period > 0):
        cannot = f"{origin.path} lies after an injection, so arm {arm} cannot go on from it"
        raise UsageError(f"{cannot}: give an earlier checkpoint")
    flags += tuple(map(str, (*before, step)))
    with naming(arm):
        args = parsed((*flags, *first))
        check_fork(args, origin)
    return PlannedRun(arm, replace(args, fork=None), flags, step)


def copies_in_words(runs: list[PlannedRun]) -> list[str]:
    """A line where baselines learn the same, as those that differ in the step of an injection alone."""
    firsts: dict[tuple, PlannedRun] = {}
    copies: list[tuple[PlannedRun, PlannedRun]] = []
    for run in runs:
        if run.args.intervention == "none":
            seen = {name: value for name, value in vars(run.args).items() if name not in UNSEEN_BY_BASELINES}
            first = firsts.setdefault(tuple(seen.items()), run)
            if first is not run:
                copies.append((run, first))
    if not copies:
        return []
    copy, first = copies[0]
    verb = "baseline learns" if len(copies) == 1 else "baselines learn"
    example = f"{copy.name} learns what {first.name} does"
    return [f"remark: {len(copies)} {verb} the same as another one, {example}: see --grid in docs/sweeps.md"]


def default_name(asked: Asked, game: str) -> str:
    """A sweep's name, of its games and arms."""
    parts = [game.removeprefix("ALE/").replace("NoFrameskip", "").replace("/", "-")]
    if len(asked.env_ids) > 1:
        parts = [f"{len(asked.env_ids)}-games"]
    if asked.from_checkpoint is not None:
        parts.append(Path(asked.from_checkpoint).name)
    return readable("_".join((*parts, *asked.arms)))


def plan_in_words(runs: list[PlannedRun], speed: float | None) -> list[str]:
    """Lines on a plan; hours are estimated where a speed in steps per second is known."""
    lines = []
    for run in runs:
        origin = "whole, from"
        if run.trunk is not None:
            origin = f"forks from {run.trunk} at"
        elif run.begins:
            origin = "forks from the checkpoint at"
        total = run.args.total_timesteps
        lines.append(f"{run.name}: {origin} step {run.begins:,}, {run.steps:,} steps to {total:,}")
    forks = len([run for run in runs if run.begins])
    steps = sum(run.steps for run in runs)
    saved = sum(run.begins for run in runs)
    fewer = f"{saved:,} fewer than if each ran whole"
    lines.append(f"{len(runs)} runs, {forks} of them forks: {steps:,} steps, {fewer}")
    lines.append(f"disk: about {sum(run.disk for run in runs) / 1e9:,.1f} GB, an estimate")
    if speed is None:
        lines.append("hours: give --speed, in steps per second of one run")
        return lines
    longest = max(run.args.total_timesteps if run.trunk else run.steps for run in runs)
    hours = steps / speed / 3600
    least = longest / speed / 3600
    per_second = f"{speed:,.0f} steps per second"
    lines.append(f"hours: {hours:,.1f} of one run at a time at {per_second}, {least:,.1f} at least")
    return lines
