"""The plan of a sweep: which runs there are, which of them fork from which, and what they take."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import gymnasium as gym
import numpy as np

from analysis.arms import readable
from dqn_injection_atari import FORKABLE, Args, check_fork
from orchestration.training_flags import as_flags, names_in, parsed, words_of
from support import usage
from support.checkpoints import Checkpoint, load_checkpoint
from support.environments import FRAME_SIZE, STACK, atari_spec
from support.replay import FrameReplayBuffer
from support.usage import UsageError, flag, reading

INTERVENTIONS: tuple[str, ...] = get_args(Args.__dataclass_fields__["intervention"].type)
INSTEAD = {  # flags of the training script that a sweep gives, and what to give to the sweep
    **{"env_id": "--env-ids", "seed": "--seeds", "intervention": "--arms"},
    **{"exp_name": "--name", "resume": "the same command once more", "fork": "--from-checkpoint"},
    **{"evaluate": "nothing, it plays one agent"},
}
OF_CONTINUATIONS = {  # those that it gives as well where runs continue one agent
    **{
        "total_timesteps": "--steps",
        "injection_step": "--from-checkpoint",
        "exploration_fraction": "--from-checkpoint",
    },
    **{"injection_trigger": "--from-checkpoint", "preset": "--from-checkpoint"},
}
LONGEST_NAME = 255  # bytes that file systems allow
AFTER_NAME = "__1234567890-1000"  # what a run's folder has after it: time and number; a log has less
# estimates of checkpoints and curves, see docs/sweeps.md.
# Of a pair of heads both networks have weights, and one has moments
NETWORK_BYTES, BYTES_PER_PAIR, BYTES_PER_FRAME, BYTES_PER_STEP = 30e6, 40e6, 120, 1.0


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
    """step of the checkpoint that it is forked from"""
    trunk: str | None = None
    """name of the run of this plan that it is forked from"""

    @property
    def name(self) -> str:
        """That of its folder, but for the time."""
        return f"{self.args.env_id}__{self.args.exp_name}__{self.args.seed}".replace("/", "-")

    @property
    def forks(self) -> bool:
        """Whether it goes on from a checkpoint of another run."""
        return self.trunk is not None or "--fork" in self.flags

    @property
    def steps(self) -> int:
        return self.args.total_timesteps - self.begins

    @property
    def memory(self) -> int:
        """Bytes of its replay, when it is full."""
        frames = gym.spaces.Box(0, 255, (STACK, FRAME_SIZE, FRAME_SIZE), np.uint8)
        return FrameReplayBuffer.bytes_needed(self.args.buffer_size, frames, self.args.num_envs)

    @property
    def disk(self) -> float:
        """Bytes of its checkpoints, one in the making included, and curves: an estimate."""
        args = self.args
        stay = sum(step >= self.begins for step in args.kept_checkpoints)
        if args.injection_trigger == "norm" and args.intervention != "none":
            stay += 1  # before the first one
        checkpoint = NETWORK_BYTES + BYTES_PER_PAIR * args.planned_pairs
        checkpoint += BYTES_PER_FRAME * min(args.buffer_size, args.total_timesteps)
        return (stay + 2) * checkpoint + BYTES_PER_STEP * args.total_timesteps


def plan(asked: Asked) -> list[PlannedRun]:
    """The runs, each behind the one that it is forked from.

    Raises:
        UsageError: something of it cannot work.
    """
    origin = None if asked.from_checkpoint is None else load_checkpoint(Path(asked.from_checkpoint))
    check(asked, origin)
    runs: list[PlannedRun] = []
    for setting in settings(asked.grid):
        family = arms_of(asked, setting, origin)
        games = asked.env_ids or (family[0].args.env_id,)
        for game, seed in itertools.product(games, asked.seeds):
            own = [of_game_and_seed(run, game, seed) for run in family]
            trunk = own[0].name
            runs += [replace(run, trunk=None if run.trunk is None else trunk) for run in own]
    if any(not run.args.checkpoint_frequency for run in runs):
        raise UsageError(
            "checkpoint_frequency 0 leaves nothing to fork arms from, and nothing to go on from: leave it out"
        )
    check_names([run.name for run in runs])
    return runs


def check_names(names: list[str]) -> None:
    """
    Raises:
        UsageError: a file system has no room for the name of a run, or may take two for one.
    """
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
    """What a checkpoint is, wherever it lies: the id of its run, and its step; None for none.

    Raises:
        UsageError: it cannot be read.
    """
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    with reading(path, "a checkpoint", "take another"):
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return {"run": manifest["run"], "step": manifest["step"]}


def check(asked: Asked, origin: Checkpoint | None) -> None:
    """
    Raises:
        UsageError: a part of what is asked contradicts another one, or is nothing that there is.
    """
    for env_id in asked.env_ids:
        atari_spec(env_id)
    if len(set(asked.env_ids)) < len(asked.env_ids) or len(set(asked.seeds)) < len(asked.seeds):
        raise UsageError("a game or a seed is given twice: give each once, in --env-ids and --seeds")
    if not asked.seeds or not asked.arms or not (asked.env_ids or origin):
        raise UsageError(
            "there is no run in this sweep: give --env-ids, --seeds and --arms, one of each at least"
        )
    if (origin is None) != (asked.steps is None):
        raise UsageError(
            "from_checkpoint and steps belong together: give both --from-checkpoint and --steps, or neither"
        )
    if origin is not None and asked.env_ids:
        raise UsageError(f"{origin.path} plays {origin.meta['args']['env_id']}: leave out --env-ids")
    own = INSTEAD | (OF_CONTINUATIONS if origin is not None else {})
    axes = [values[0].lstrip("-").replace("-", "_") for values in asked.grid if values]
    if len(set(axes)) < len(asked.grid):
        raise UsageError(
            "grid has a flag twice, or none: give --grid learning-rate 1e-4 5e-4, once for each flag"
        )
    named = [(name, "after --") for name in names_in(asked.flags)] + [(name, "in --grid") for name in axes]
    arm_flags = own.keys() - {"intervention"}
    named += [
        (name, f"in arm {arm}")
        for arm, flags in asked.arms.items()
        for name in names_in(flags)
        if name in arm_flags
    ]
    for name, where in named:
        if name in own:
            raise UsageError(
                f"{flag(name)} {where} is what the sweep itself gives: leave it out, and give {own[name]}"
            )


def all_arms(interventions: Sequence[str], own: dict[str, str]) -> dict[str, list[str]]:
    """{name: flags} of arms that are interventions, and of a user's own, which have one unless their flags say otherwise.

    Raises:
        UsageError: there is no such intervention, or an arm has the name of one.
    """
    if unknown := [arm for arm in interventions if arm not in INTERVENTIONS]:
        raise UsageError(
            f'arm {unknown[0]} is none of {", ".join(INTERVENTIONS)}: give --arm "{unknown[0]}" FLAGS for your own'
        )
    arms = {arm: ["--intervention", arm] for arm in interventions}
    for arm, flags in own.items():
        if not readable(arm):
            nothing = f'arm "{arm}" has no letter or digit that a folder\'s name could have'
            raise UsageError(f"{nothing}: give another name to --arm")
        if arm in INTERVENTIONS:
            raise UsageError(f"arm {arm} has flags already, --intervention {arm}: give another name to --arm")
        words = words_of(flags)
        if "intervention" not in names_in(words):
            words = ["--intervention", "injection", *words]
        arms[arm] = words
    return arms


def settings(grid: list[list[str]]) -> list[tuple[str, tuple[str, ...]]]:
    """(name, flags) of every combination of the grid's values; one without either where there is no grid.

    Raises:
        UsageError: a flag is none, or has no value.
    """
    axes = []
    for name, *values in grid:
        field = name.lstrip("-").replace("-", "_")
        if not values or len(set(values)) < len(values) or field not in Args.__dataclass_fields__:
            raise UsageError(
                f"grid {' '.join([name, *values])} is no flag and its values: give --grid learning-rate 1e-4 5e-4"
            )
        axes.append(
            [(f"{field.replace('_', '-')}-{readable(value)}", as_flags(field, value)) for value in values]
        )
    combined = itertools.product(*axes)
    return [
        ("_".join(name for name, _ in axis), tuple(word for _, words in axis for word in words))
        for axis in combined
    ]


def of_game_and_seed(run: PlannedRun, game: str, seed: int) -> PlannedRun:
    args = replace(run.args, env_id=game, seed=seed)
    own = ("--seed", str(seed), "--exp-name", args.exp_name)
    return replace(run, args=args, flags=(*run.flags, *(("--env-id", game) if run.begins == 0 else ()), *own))


def arms_of(
    asked: Asked, setting: tuple[str, tuple[str, ...]], origin: Checkpoint | None
) -> list[PlannedRun]:
    """A setting's run of each arm with the first seed, in the first game; that from which others are forked comes first."""
    names = sorted(asked.arms, key=lambda name: name != "none")
    family: list[PlannedRun] = []
    for name in names:
        exp_name = "_".join(part for part in (readable(name), setting[0]) if part)
        flags = (*asked.flags, *setting[1], *asked.arms[name])
        if origin is not None:
            family.append(continuation(asked, name, flags, exp_name, origin))
            continue
        first = ("--env-id", asked.env_ids[0], "--seed", str(asked.seeds[0]), "--exp-name", exp_name)
        run = PlannedRun(name, parsed((*flags, *first)), flags)
        family.append(run if not family else forked(run, family[0]))
    for arm, args in ((run.arm, run.args) for run in family[1:]):
        if (
            args.intervention != "none"
            and args.injection_trigger == "step"
            and not args.planned_interventions
        ):
            fix = "give --injection-step after --, or --injection-trigger norm"
            raise UsageError(
                f"arm {arm} would have no {args.intervention}, since no step is planned for it: {fix}"
            )
    return family


def forked(run: PlannedRun, trunk: PlannedRun) -> PlannedRun:
    """The run as a fork from the trunk's checkpoint at its first planned injection, or as it is where none can be.

    Raises:
        UsageError: a fork may not differ from the trunk as this one does.
    """
    step, planned = next(iter(trunk.args.planned_interventions), None), run.args.planned_interventions
    changed = [name for name in usage.changed_fields(run.args, trunk.args) if name != "exp_name"]
    if step is None or run.args.injection_trigger == "norm" or (planned and planned[0] < step):
        return run
    if refused := [name for name in changed if name not in FORKABLE]:
        fix = f"give --grid {refused[0].replace('_', '-')} with the values"
        raise UsageError(
            f"arm {run.arm} has another {', '.join(refused)} than {trunk.arm}, which arms share: {fix}"
        )
    path = Path("runs", trunk.name, f"checkpoint-{step}")
    check_fork(
        run.args,
        Checkpoint(path, {"step": step, "args": vars(trunk.args)}, {"learner": {"interventions": ()}}),
    )
    flags = tuple(word for name in changed for word in as_flags(name, getattr(run.args, name)))
    return replace(run, flags=flags, begins=step, trunk=trunk.name)


def continuation(
    asked: Asked, arm: str, flags: tuple[str, ...], exp_name: str, origin: Checkpoint
) -> PlannedRun:
    """The run that goes on from a checkpoint in an arm, with the first seed.

    Raises:
        UsageError: it cannot.
    """
    assert asked.steps is not None
    saved, step, total = origin.meta["args"], origin.step, origin.step + asked.steps
    falls = saved["exploration_fraction"] * saved["total_timesteps"]  # steps over which ε does
    if step == 0 or falls > total:
        least = (
            f"from step 1 on, and --steps of {int(falls) - step + 1} or more, over which ε falls as it did"
        )
        raise UsageError(
            f"{origin.path} at step {step} cannot be continued for {asked.steps} steps: give a checkpoint {least}"
        )
    made = origin.state["learner"]["interventions"]
    own = ["--total-timesteps", str(total), "--injection-step", *map(str, (*made, step))]
    own += ["--exploration-fraction", repr(falls / total), "--injection-trigger", "step"]
    begin = ("--fork", str(origin.path), *flags, *own)
    args = parsed((*begin, "--seed", str(asked.seeds[0]), "--exp-name", exp_name))
    if made and args.intervention == "none":
        raise UsageError(
            f"{origin.path} lies after an injection, so arm {arm} cannot go on from it: give an earlier checkpoint"
        )
    check_fork(args, origin)
    return PlannedRun(arm, replace(args, fork=None), begin, step)
