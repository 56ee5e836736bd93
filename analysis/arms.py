"""Arms: runs that differ in nothing but the seed."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from analysis.curves import RecordedRun, read_curves, read_run
from dqn_injection_atari import Args
from support.flags import RunFlags
from support.usage import UsageError, conditions, unused_fields

TRAINING_RETURN = "charts/episodic_return"
# These change the returns of evaluations, and nothing that is learned
EVALUATION = ("eval_frequency", "eval_episodes", "eval_steps", "eval_epsilon")
# These name a run, choose its hardware, or change what is logged, filmed and evaluated, but not what is learned
BOOKKEEPING = {"seed", "exp_name", *(field.name for field in fields(RunFlags))}
CONDITIONS = conditions(Args)
OF_INTERVENTION = ("intervention", "injection", "injection_trigger", *CONDITIONS)
REWRITTEN = ("total_timesteps", "exploration_fraction", "injection_step", *OF_INTERVENTION)
IN_WORDS = {
    "env_id",
    "intervention",
    "injection",
    "injection_trigger",
    "injection_norm_ratio",
    "freeze_heads",
}
IN_WORDS |= {"moments"}  # what an arm's name says in words of its own
ARM_NAMES = {  # one and several
    "injection": ("injection", "injections"),
    "reset-head": ("head reset", "head resets"),
    "shrink-perturb": ("shrink and perturb", "shrink and perturb"),
}
MOST_STEPS = 4  # of one arm that are named one by one
LONGEST_FILE_NAME = 240  # characters; file systems allow 255, and a number and the ending come after it


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed; `setting` is what they share."""

    name: str
    setting: dict[str, Any]
    runs: list[RecordedRun]

    @property
    def game(self) -> str:
        return self.setting["env_id"]

    @property
    def injection(self) -> tuple[int, ...]:
        return self.setting["injection"]

    def injections(self, run: RecordedRun) -> tuple[int, ...]:
        """Steps of a run's injections: those planned or, where the norm decides, those logged so far."""
        return self.injection or tuple(map(int, run.between("injection/step", -1, math.inf)[0]))


def runs_in(folders: Iterable[str]) -> tuple[tuple[str, ...], Path]:
    """The folders of runs, in the place of a sweep's folder those in it; and where what is made of them goes by default."""
    given = list(folders)
    sweeps = {folder: Path(folder, "runs") for folder in given if Path(folder, "sweep.json").is_file()}
    of_sweeps = {
        folder: sorted(map(str, runs.glob("[!.]*"))) if runs.is_dir() else []
        for folder, runs in sweeps.items()
    }
    runs = tuple(run for folder in given for run in of_sweeps.get(folder, [folder]))
    return runs, Path(given[0]) if len(given) == len(sweeps) == 1 else Path()


def evaluation(args: Args, metric: str) -> dict[str, Any]:
    """The arguments that change `metric` and nothing that is learned: none for the return of training."""
    names = EVALUATION if metric.startswith("eval/") else ()
    return {name: getattr(args, name) for name in names}


def setting(args: Args, metric: str = TRAINING_RETURN) -> dict[str, Any]:
    """The arguments that change what is learned or `metric`.

    They are in a form in which those that come to the same are equal.
    "intervention" is what the run does, "injection" the steps at which, () where it does nothing or the norm decides; what
    the run does not look at is None.
    """
    by_norm, planned = args.injection_trigger == "norm", args.planned_interventions
    what = args.intervention if by_norm or planned else "none"
    unused = CONDITIONS if what == "none" else unused_fields(args)
    shared = {
        name: value
        for name, value in asdict(args).items()
        if name not in BOOKKEEPING and name not in REWRITTEN
    }
    shared["exploration_steps"] = round(
        args.exploration_fraction * args.total_timesteps
    )  # a longer run only goes on
    shared |= {"intervention": what, "injection": () if what == "none" else planned}
    shared |= {"injection_trigger": "norm" if by_norm and what != "none" else None}
    shared |= evaluation(args, metric)
    asked = asdict(args) | {"injected_head_width": args.injected_head_width or args.head_width}
    return shared | {name: None if name in unused else asked[name] for name in CONDITIONS}


def short(step: float) -> str:
    """A number of steps as figures show it: 0, 802, 400k, 12.5M."""
    unit, letter = (1e6, "M") if step >= 1e6 else (1e3, "k")
    if step >= unit and step % (unit / 1e3) == 0:
        return f"{step / unit:.3f}".rstrip("0").rstrip(".") + letter
    return f"{step:,.10g}"


def at_steps(intervention: str, steps: tuple[int, ...]) -> str:
    """An intervention and its steps: injections at 1k and 2k.

    Of many in equal distances the first two and the last.
    """
    one, several = ARM_NAMES[intervention]
    shown = [short(step) for step in steps]
    if len(steps) == 1:
        return f"{one} at {shown[0]}"
    distances = {after - before for before, after in itertools.pairwise(steps)}
    if len(steps) > MOST_STEPS and len(distances) == 1:
        return f"{several} at {shown[0]}, {shown[1]}, … {shown[-1]}"
    return f"{several} at {' and '.join(shown)}"


def describe(setting: dict[str, Any], differing: Iterable[str], baseline: str) -> str:
    """An arm's name: its intervention, `baseline` if there is none, and what else sets it apart."""
    what = setting["intervention"]
    if what == "none":
        words = [baseline]
    elif setting["injection"]:
        words = [at_steps(what, setting["injection"])]
    else:
        words = [f"{ARM_NAMES[what][0]} where the norm has grown {setting['injection_norm_ratio']:.15g}×"]
    shown = list(differing)
    other_width = setting["injected_head_width"] not in (None, setting["head_width"])
    if other_width and "injected_head_width" not in shown:
        shown.append("injected_head_width")  # another network than its baseline's
    for name in shown:
        value, plain = setting[name], name.replace("_", " ")
        if isinstance(value, bool):
            words.append(plain if value else f"no {plain}")
        elif value is not None:
            words.append(f"{plain} {value:,}" if isinstance(value, int) else f"{plain} {value}")
    words += ["optimizer state copied"] if setting["moments"] == "keep" else []
    words += ["all heads trained"] if setting["freeze_heads"] is False else []
    return ", ".join(words)


def file_names(arms: Iterable[Arm]) -> list[str]:
    """A name for a file of each arm, short enough for any file system, and no two alike."""
    names: list[str] = []
    for arm in arms:
        name = whole = readable(f"{arm.game}_{arm.name}")[:LONGEST_FILE_NAME]
        number = 1
        while name in names:
            number += 1
            name = f"{whole}-{number}"
        names.append(name)
    return names


def group(runs: list[RecordedRun], metric: str = TRAINING_RETURN) -> tuple[list[Arm], dict[str, str]]:
    """Arms, those of a game together, the one without injection first; and {folder: reason} of runs left out.

    Runs whose `metric` was measured in different ways are different arms.
    """
    members: dict[tuple, dict[int, RecordedRun]] = defaultdict(dict)
    left_out = {}
    for run in runs:
        arm = members[tuple(setting(run.args, metric).items())]
        shorter, longer = sorted((run, arm.get(run.args.seed, run)), key=lambda run: run.last_step)
        arm[run.args.seed] = longer
        if shorter is not longer:
            twin = f"{longer.folder}, which has got to step {longer.last_step:,}"
            left_out[shorter.folder] = (
                f"{shorter.folder} has the arm and the seed of {twin}: the run is left out"
            )
    settings = [dict(key) for key in members]
    names = [name for name in settings[0] if name not in IN_WORDS]
    differing = [name for name in names if len({shared[name] for shared in settings} - {None}) > 1]
    only_injections = {shared["intervention"] for shared in settings} <= {"injection", "none"}
    baseline = "no injection" if only_injections else "no intervention"
    arms = [
        Arm(describe(dict(key), differing, baseline), dict(key), list(arm.values()))
        for key, arm in members.items()
    ]
    games = list(dict.fromkeys(arm.game for arm in arms))

    def order(arm: Arm) -> tuple:
        return games.index(arm.game), arm.setting["intervention"] != "none", arm.injection, arm.name

    return sorted(arms, key=order), left_out


def read_arms(folders: Iterable[str], metric: str) -> tuple[list[Arm], dict[str, dict[str, str]]]:
    """The arms, and {"left_out": {folder: reason}, "unfinished": {folder: how far it is}}.

    Raises:
        UsageError: no run is usable.
    """
    runs, left_out = [], {}
    for folder in dict.fromkeys(folders):
        try:
            if folder.lower().endswith(".csv"):
                runs += read_curves(Path(folder), metric)
            else:
                runs.append(read_run(folder, metric))
        except UsageError as error:
            left_out[folder] = str(error)
    if not runs:
        first = next(iter(left_out.values()))
        raise UsageError(
            f"none of {len(left_out)} runs can be compared, give folders of runs, those under runs/; {first}"
        )
    arms, duplicates = group(runs, metric)
    going = [run for arm in arms for run in arm.runs if run.last_step < run.args.total_timesteps]
    unfinished = {
        run.folder: f"{run.folder} is at step {run.last_step:,} of {run.args.total_timesteps:,}"
        for run in going
    }
    return arms, {"left_out": left_out | duplicates, "unfinished": unfinished}


def readable(text: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")
