"""Arms: runs that differ in nothing but the seed."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from alternatives import ALTERNATIVES, AlternativeSettings
from analysis.curves import TRAINING_RETURN, RecordedRun, check_metric, read_curves, read_run
from dqn_injection_atari import INTERVENTIONS, OF_INTERVENTION, OF_NORM, Args
from support.flags import RunFlags
from support.usage import UsageError, unused_fields

# These change the returns of evaluations, and nothing that is learned
EVALUATION = ("eval_frequency", "eval_episodes", "eval_steps", "eval_epsilon")
# These change a run's name, its hardware, or what is logged, filmed and evaluated, not what is learned
BOOKKEEPING = {"seed", "exp_name", *(field.name for field in fields(RunFlags))}
# These matter only with some interventions or triggers
CONDITIONAL = tuple(
    name for name in (*OF_INTERVENTION, *OF_NORM) if name not in ("intervention", "injection_trigger")
)
KEYS_OF_INTERVENTION = ("intervention", "injection", "injection_trigger", *CONDITIONAL)
# These stand in a setting in another form
REWRITTEN = ("total_timesteps", "exploration_fraction", "injection_step", *KEYS_OF_INTERVENTION)
# These an arm's name tells of in words of its own
IN_WORDS = {"env_id", "intervention", "injection", "injection_trigger", "injection_norm_ratio"}
IN_WORDS |= {"freeze_heads", "moments"}
# Curves of injections that are not of one that happens every so often
OF_ONE_TIME = ("injection/step", "injection/max_abs_delta_q", "injection/norm_growth")
MOST_STEPS = 4  # of one arm that are named one by one


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
    def intervention(self) -> str:
        return self.setting["intervention"]

    @property
    def planned_steps(self) -> tuple[int, ...]:
        """Steps of its interventions; () where it has none, or the norm decides."""
        return self.setting["injection"]

    @property
    def control(self) -> dict[str, str]:
        """What its control does, as in a setting: to the optimizer what this arm does, to weights nothing.

        Empty where that is the arm without an intervention.
        """
        if self.setting["moments"] != "fresh":
            return {}
        control = {"intervention": "reset-moments", "reset_moments_of": "head"}
        if self.intervention in ALTERNATIVES and ALTERNATIVES[self.intervention].draws_encoder:
            control["reset_moments_of"] = "all"
        return control

    def intervention_steps(self, run: RecordedRun) -> tuple[int, ...]:
        """Those planned or, where the norm decides, those that a run has logged so far."""
        if self.planned_steps:
            return self.planned_steps
        steps, _ = run.between("injection/step", -1, math.inf)
        return tuple(map(int, steps))


def setting(args: Args, metric: str = TRAINING_RETURN) -> dict[str, Any]:
    """The arguments that change what is learned or `metric`; those that come to the same are equal here.

    "injection" has the steps of what it does, () where the norm decides; what it does not look at is None.
    """
    by_norm = args.injection_trigger == "norm"
    planned = args.planned_interventions
    happens = args.intervention != "none" and (by_norm or len(planned) > 0)
    unused = set(CONDITIONAL)
    if happens:
        unused = set(unused_fields(args)) | settings_of_others(args.intervention)
    values = asdict(args)
    values["injected_head_width"] = args.new_head_width
    shared = {name: values[name] for name in values if name not in BOOKKEEPING and name not in REWRITTEN}
    # a longer run only goes on
    shared["exploration_steps"] = round(args.exploration_fraction * args.total_timesteps)
    shared["intervention"] = args.intervention if happens else "none"
    shared["injection"] = planned if happens else ()
    shared["injection_trigger"] = "norm" if by_norm and happens else None
    if metric.startswith("eval/"):
        shared |= {name: values[name] for name in EVALUATION}
    for name in CONDITIONAL:
        shared[name] = None if name in unused else values[name]
    return shared


def settings_of_others(intervention: str) -> set[str]:
    """Settings of the alternatives that an intervention is not."""
    of_others = {field.name for field in fields(AlternativeSettings)}
    if intervention in ALTERNATIVES:
        of_others -= {field.name for field in fields(ALTERNATIVES[intervention].settings)}
    return of_others


def goes_on(intervention: str) -> bool:
    """Whether it happens every so often from a step on."""
    return intervention in ALTERNATIVES and ALTERNATIVES[intervention].period is not None


def recycled_from(run: RecordedRun) -> int | None:
    """From which step on a periodic intervention ran before a fork, whose arguments do not tell of it."""
    steps: list[float] = []
    for tag, points in run.scalars.items():
        if tag.startswith("injection/") and tag not in OF_ONE_TIME:
            steps += points[0].tolist()
    if goes_on(run.args.intervention):
        steps = [step for step in steps if step < run.args.injection_step[0]]
    return int(min(steps)) if steps else None


def short(step: float) -> str:
    """A number of steps as figures show it: 0, 802, 400k, 12.5M."""
    unit, letter = (1e6, "M") if step >= 1e6 else (1e3, "k")
    if step >= unit and step % (unit / 1e3) == 0:
        return f"{step / unit:.3f}".rstrip("0").rstrip(".") + letter
    return f"{step:,.10g}"


def at_steps(intervention: str, steps: tuple[int, ...]) -> str:
    """Injections at 1k and 2k; of many in equal distances the first two and the last; ReDo from 1k on."""
    words = INTERVENTIONS[intervention]
    shown = [short(step) for step in steps]
    if goes_on(intervention):
        return f"{words.noun} from {shown[0]} on"
    if len(steps) == 1:
        return f"{words.noun} at {shown[0]}"
    distances = {after - before for before, after in itertools.pairwise(steps)}
    if len(steps) > MOST_STEPS and len(distances) == 1:
        return f"{words.plural} at {shown[0]}, {shown[1]}, … {shown[-1]}"
    return f"{words.plural} at {' and '.join(shown)}"


def has_other_width(setting: dict[str, Any]) -> bool:
    """Whether an arm's injections add heads of another width than the first."""
    return setting["injected_head_width"] not in (None, setting["head_width"])


def describe(setting: dict[str, Any], differing: Iterable[str], baseline: str) -> str:
    """An arm's name: its intervention, `baseline` if there is none, and what else sets it apart."""
    intervention = setting["intervention"]
    if intervention == "none":
        words = [baseline]
    elif setting["injection"]:
        words = [at_steps(intervention, setting["injection"])]
    else:
        ratio = setting["injection_norm_ratio"]
        words = [f"{INTERVENTIONS[intervention].noun} where the norm has grown {ratio:.15g}×"]
    shown = [name for name in differing if name != "injected_head_width"]
    if has_other_width(setting):
        shown.append("injected_head_width")  # another network than its baseline's
    if intervention in ALTERNATIVES:
        for field in fields(ALTERNATIVES[intervention].settings):
            if setting[field.name] != field.default and field.name not in shown:
                shown.append(field.name)
    if "recycled_from" not in shown:
        shown.append("recycled_from")  # another past than its arguments tell of
    for name in shown:
        value = setting[name]
        plain = name.replace("_", " ")
        if isinstance(value, bool):
            words.append(plain if value else f"no {plain}")
        elif isinstance(value, int):
            words.append(f"{plain} {value:,}")
        elif value is not None:
            words.append(f"{plain} {value}")
    if setting["moments"] == "keep":
        words.append("moments kept")
    if setting["freeze_heads"] is False:
        words.append("all heads trained")
    return ", ".join(words)


def runs_of(arms: Iterable[Arm]) -> list[RecordedRun]:
    runs: list[RecordedRun] = []
    for arm in arms:
        runs += arm.runs
    return runs


def by_game(arms: Iterable[Arm]) -> dict[str, list[Arm]]:
    """{game: its arms}, in order of appearance."""
    games: dict[str, list[Arm]] = defaultdict(list)
    for arm in arms:
        games[arm.game].append(arm)
    return games


def group(runs: list[RecordedRun], metric: str = TRAINING_RETURN) -> tuple[list[Arm], dict[str, str]]:
    """Arms, those of a game together, the one without injection first; and {folder: reason} of runs left out.

    Runs whose `metric` was measured in different ways are different arms.
    """
    members: dict[tuple, dict[int, RecordedRun]] = defaultdict(dict)  # {setting: {seed: run}}
    left_out = {}
    for run in runs:
        shared = setting(run.args, metric) | {"recycled_from": recycled_from(run)}
        by_seed = members[tuple(shared.items())]
        other = by_seed.get(run.args.seed)
        if other is None:
            by_seed[run.args.seed] = run
            continue
        shorter, longer = sorted((run, other), key=lambda run: run.last_step)
        by_seed[run.args.seed] = longer
        twin = f"{longer.folder}, which has got to step {longer.last_step:,}"
        reason = f"has the arm and the seed of {twin}: the run is left out"
        left_out[shorter.folder] = f"{shorter.folder} {reason}"
    settings = [dict(key) for key in members]
    differing = []
    for name in settings[0] if settings else ():
        values = {shared[name] for shared in settings} - {None}
        if name not in IN_WORDS and len(values) > 1:
            differing.append(name)
    only_injections = {shared["intervention"] for shared in settings} <= {"injection", "none"}
    baseline = "no injection" if only_injections else "no intervention"
    arms = []
    for shared, by_seed in zip(settings, members.values(), strict=True):
        name = describe(shared, differing, baseline)
        arms.append(Arm(name, shared, list(by_seed.values())))
    games = list(dict.fromkeys(arm.game for arm in arms))

    def order(arm: Arm) -> tuple:
        return games.index(arm.game), arm.intervention != "none", arm.planned_steps, arm.name

    return sorted(arms, key=order), left_out


def read_arms(folders: Iterable[str], metric: str) -> tuple[list[Arm], dict[str, dict[str, str]]]:
    """The arms, and {"left_out": {folder: reason}, "unfinished": {folder: how far}}; UsageError if none."""
    runs: list[RecordedRun] = []
    left_out = {}
    for folder in dict.fromkeys(folders):
        try:
            if not folder.lower().endswith(".csv"):
                runs.append(read_run(folder, metric))
                continue
            in_file = read_curves(Path(folder))
        except UsageError as error:
            left_out[folder] = str(error)
            continue
        for run in in_file:
            try:
                runs.append(check_metric(run, metric))
            except UsageError as error:
                left_out[run.folder] = str(error)
    if not runs and not left_out:
        raise UsageError("no runs are given: give folders of runs, or files of compare.py --export")
    if not runs:
        reason = next(iter(left_out.values()))
        fix = f"give folders of runs, those under runs/, that have logged {metric}"
        raise UsageError(f"none of {len(left_out)} runs can be compared, {fix}; {reason}")
    arms, duplicates = group(runs, metric)
    unfinished = {}
    for arm in arms:
        for run in arm.runs:
            if run.last_step < run.args.total_timesteps:
                how_far = f"is at step {run.last_step:,} of {run.args.total_timesteps:,}"
                unfinished[run.folder] = f"{run.folder} {how_far}"
    return arms, {"left_out": left_out | duplicates, "unfinished": unfinished}


def print_remarks(remarks: dict[str, dict[str, str]]) -> None:
    """A line for each, {kind: {what it is about: remark}}."""
    for kind, of_kind in remarks.items():
        for remark in of_kind.values():
            print(f"{kind.replace('_', ' ')}: {remark}")


def readable(text: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")
