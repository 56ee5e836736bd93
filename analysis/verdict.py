"""The verdict on two arms that differ in nothing but the intervention, over a window of steps after it."""

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.stats

from analysis.intervals import CONFIDENCE, MIN_SEEDS
from analysis.runs import OF_INTERVENTION, Arm, Run

DEEDS = {"injection": "injection", "reset-head": "resetting the head", "shrink-perturb": "shrink and perturb"}


@dataclass(frozen=True)
class Judgement:
    """Difference of mean returns, with − without, its 95% interval, NaN where there is none, and the verdict."""

    difference: float
    low: float
    high: float
    verdict: Literal["raised", "no evidence", "lowered", "too few seeds", "no interval"]
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """Two arms that differ in nothing but the intervention, over the steps after < step ≤ upto. Pairs are (without, with)."""

    arms: tuple[Arm, Arm]
    intervention: str
    firsts: dict[int, int]  # seed: step of its run's first injection
    after: int
    upto: int
    ended_by: str | None  # the run whose last step is `upto`, where others have got further
    means: tuple[dict[int, float], dict[int, float]]  # seed: mean return of its run
    counts: tuple[int, int]  # of the returns in those means
    unreported: tuple[int, int]  # training games in the window that have no return: cut by new ones, or going on at its end
    missing: tuple[dict[int, float], dict[int, float]]  # seed: share of its run's games, or steps, that is in no return
    reaches: tuple[float, float]  # by how much the mean over runs of an arm may be off for want of those
    shared: int  # seeds whose runs were one up to the injection
    paired: bool
    one_agent: bool  # all runs were one up to the injection: continuations of one agent, each with a seed of its own
    judgement: Judgement
    left_out: dict[str, str]  # folder: reason

    @property
    def game(self) -> str:
        return self.arms[0].game

    @property
    def differences(self) -> dict[int, float]:
        """{seed: with − without} of the seeds that both arms have."""
        without, injected = self.means
        return {seed: injected[seed] - mean for seed, mean in without.items() if seed in injected}


def show(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """`value [low, high]`, or the value alone where there is no interval, the largest of them with three digits or more."""
    values = [value, low, high] if low <= high else [value]
    largest = max(map(abs, values))
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 0
    centre, *bounds = (f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "−") for value in values)
    return f"{centre} [{', '.join(bounds)}]" if bounds else centre


def noun(intervention: str) -> str:
    return "injection" if intervention == "injection" else "intervention"


def judge(without: np.ndarray, injected: np.ndarray, paired: bool, intervention: str = "injection") -> Judgement:
    """The verdict, for an injection on plasticity, from one mean return per run.

    Args:
        without, injected: (n,) and (m,); if paired, n = m and the values at one index are of one seed
        intervention: what sets them apart, as in Args
    """
    counts, nothing, deed = (len(without), len(injected)), (math.nan, math.nan), DEEDS[intervention]
    difference = float(injected.mean() - without.mean()) if all(counts) else math.nan
    if min(counts) < MIN_SEEDS:
        few = f"{counts[0]} without and {counts[1]} with {noun(intervention)}, it takes {MIN_SEEDS} of each"
        return Judgement(difference, *nothing, "too few seeds", f"too few seeds to say: {few}")
    spread = np.ptp(injected - without) if paired else np.ptp(without) + np.ptp(injected)
    if spread <= 1e-9 * max(abs(without).max(), abs(injected).max()):
        sentence = f"no interval: the return changed by {show(difference)} with every seed, no spread to judge that by"
        return Judgement(difference, *nothing, "no interval", sentence)
    test = scipy.stats.ttest_rel if paired else functools.partial(scipy.stats.ttest_ind, equal_var=False)
    low, high = map(float, test(injected, without).confidence_interval(CONFIDENCE))
    if low > 0:
        meaning = ": evidence of lost plasticity" if intervention == "injection" else ""
        sentence = f"{deed} raised the return by {show(difference, low, high)}{meaning}"
        return Judgement(difference, low, high, "raised", sentence)
    if high < 0:
        sentence = f"{deed} lowered the return by {show(-difference, -high, -low)}"
        return Judgement(difference, low, high, "lowered", sentence)
    claim, what = (
        ("of lost plasticity", "the return") if intervention == "injection" else (f"that {deed} changed the return", "it")
    )
    sentence = f"no evidence {claim}: {what} changed by {show(difference, low, high)}"
    return Judgement(difference, low, high, "no evidence", sentence)


def share_history(run: Run, other: Run, upto: int) -> bool:
    """Whether two runs were one up to a step, as forks are: the same training games ended at the same steps.

    Where none ended by then: whether one was forked from the other, or both from one checkpoint.
    """
    points, others = (r.between("charts/episodic_return", -1, upto) for r in (run, other))
    if points.size or others.size:
        return np.array_equal(points, others)
    parts = [Path(r.args.fork or "").parts[-2:] for r in (run, other)]  # folder and checkpoint
    origins = [found if len(found) == 2 and found[0] != ".." else None for found in parts]
    folders = [Path(r.folder).resolve().name for r in (other, run)]
    forked = any(origin and origin[0] == folder for origin, folder in zip(origins, folders, strict=True))
    return forked or origins[0] == origins[1] is not None


def in_window(runs: list[Run], metric: str, after: int, upto: int, begin: str) -> tuple[dict[int, Run], dict[str, str]]:
    """{seed: run} of the runs that count in the window after < step ≤ upto, and {folder: reason} of the others."""
    side, left_out = {}, {}
    for run in runs:
        if run.last_step < max(upto, after + 1):
            end = f"beyond {begin}" if run.last_step <= after else f"to the window's end at {upto:,}"
            left_out[run.folder] = f"{run.folder} is at step {run.last_step:,} and has not got {end}"
        elif not run.between(metric, after, upto).size:
            games = f": its {n} training games there were cut or are still going" if (n := run.unreported(after, upto)) else ""
            left_out[run.folder] = f"{run.folder} has logged no {metric} in the window{games}"
        else:
            side[run.args.seed] = run
    return side, left_out


def leave(sides: list[dict[int, Run]], reasons: dict[int, str]) -> dict[str, str]:
    """Takes the runs of the seeds in {seed: reason} out of the sides, {seed: run}; {folder: reason} of those runs."""
    runs = [(side.pop(seed), reason) for side in sides for seed, reason in reasons.items() if seed in side]
    return {run.folder: f"{run.folder} {reason}" for run, reason in runs}


def count_agents_once(sides: list[dict[int, Run]], before: int) -> tuple[bool, dict[str, str]]:
    """Of several agents each counts once: where runs continue the same one, all but one of them leave the sides.

    Continuations of one agent differ less than agents do, and would make an interval over both too narrow.

    Args:
        sides: {seed: run} without and with injection, changed in place
        before: runs that were one up to this step continue one agent

    Returns:
        whether there are several seeds, and all of one agent; and {folder: reason} of the runs that left
    """
    runs = {seed: side[seed] for side in reversed(sides) for seed in side}
    order = sorted(runs, key=lambda seed: (any(seed not in side for side in sides), seed))
    agent = {
        seed: next(other for other in order if other == seed or share_history(runs[other], runs[seed], before)) for seed in runs
    }
    if len(set(agent.values())) < 2:
        return len(runs) > 1, {}
    same = {seed: first for seed, first in agent.items() if first != seed}
    why = "continues the agent of seed {}, which counts once beside other agents"
    return False, leave(sides, {seed: why.format(first) for seed, first in same.items()})


def pair_up(sides: list[dict[int, Run]], firsts: dict[int, int]) -> tuple[set[int], dict[str, str]]:
    """Seeds whose runs were one up to their first injection; if those are enough, all other runs leave the sides.

    Args:
        sides: {seed: run} without and with injection, changed in place

    Returns:
        the seeds, and {folder: reason} of the runs that left
    """
    shared = {seed for seed in sides[0].keys() & sides[1].keys() if share_history(sides[0][seed], sides[1][seed], firsts[seed])}
    others = sorted((sides[0].keys() | sides[1].keys()) - shared) if len(shared) >= MIN_SEEDS else ()
    return shared, leave(sides, dict.fromkeys(others, "shares its history with no run of the other arm"))


def reach(returns: np.ndarray, missing: float) -> float:
    """By how much the mean of a run's returns may be off, where a share of its play is missing from them.

    Where new games begin again and again, the reported ones are too short by about the share of those that are missing, if
    their lengths are as good as memoryless. Where half of it is missing, nothing is known: infinity.
    """
    return float(np.abs(returns).mean()) * missing / (1 - missing) if missing < 0.5 else math.inf


def compare(without: Arm, injected: Arm, metric: str, window: int | None) -> Comparison:
    """The verdict on two arms that differ in nothing but the intervention."""
    arms, what = (without, injected), injected.runs[0].args.intervention
    firsts = {run.args.seed: steps[0] for run in injected.runs if (steps := injected.injections(run))}
    yet = "not been injected yet" if what == "injection" else "had no intervention yet"
    left_out = {
        run.folder: f"{run.folder} has {yet}: the verdict is on runs that had"
        for run in injected.runs
        if run.args.seed not in firsts
    }
    used, after = [[run for run in arm.runs if run.folder not in left_out] for arm in arms], max(firsts.values(), default=0)
    reached = {run.folder: run.last_step for runs in used for run in runs if run.last_step > after}
    upto = min(reached.values(), default=after) if window is None else after + window
    cut = window is None and upto < max(reached.values(), default=after)
    ended_by = min(reached, key=lambda folder: reached[folder]) if cut else None
    begin = f"the {'' if injected.injection else 'latest first '}{noun(what)} at {after:,}"
    sides = []
    for runs in used:
        side, reasons = in_window(runs, metric, after, upto, begin)
        sides.append(side)
        left_out |= reasons
    one_agent, reasons = count_agents_once(sides, min(firsts.values(), default=after))
    left_out |= reasons
    shared, reasons = pair_up(sides, firsts)
    left_out |= reasons
    returns = [{seed: side[seed].between(metric, after, upto)[1] for seed in sorted(side)} for side in sides]
    means = [{seed: float(values.mean()) for seed, values in side.items()} for side in returns]
    counts = [sum(map(len, side.values())) for side in returns]
    cut_games = [sum(run.unreported(after, upto) for run in side.values()) for side in sides]
    missing = [{seed: side[seed].share_unreported(after, upto) for seed in sorted(side)} for side in sides]
    reaches = [
        sum(reach(values, shares[seed]) for seed, values in side.items()) / max(len(side), 1)
        for side, shares in zip(returns, missing, strict=True)
    ]
    paired = len(shared) >= MIN_SEEDS
    judgement = judge(np.array([*means[0].values()]), np.array([*means[1].values()]), paired, what)
    if one_agent:
        sentence = f"{judgement.sentence}; over continuations of one agent, not over agents"
        judgement = replace(judgement, sentence=sentence)
    found = (
        (means[0], means[1]),
        (counts[0], counts[1]),
        (cut_games[0], cut_games[1]),
        (missing[0], missing[1]),
        (reaches[0], reaches[1]),
        len(shared),
        paired,
        one_agent,
        judgement,
        left_out,
    )
    return Comparison(arms, what, firsts, after, upto, ended_by, *found)


def number_in(setting: dict[str, Any], name: str) -> Any:
    """The value of an argument; of "injection" the step, where there is one only."""
    value = setting[name]
    return value[0] if name == "injection" and len(value) == 1 else value


def varied(pairs: list[Comparison]) -> str | None:
    """The one number in which the settings of comparisons differ, beside game and intervention; None if it is not just one."""
    settings = [pair.arms[1].setting for pair in pairs]
    names = {name for shared in settings for name in shared if name not in ("env_id", "intervention")}
    differing = {name: {number_in(shared, name) for shared in settings} - {None} for name in names}
    differing = {name: values for name, values in differing.items() if len(values) > 1}
    numbers = [name for name, values in differing.items() if all(type(value) in (int, float) for value in values)]
    return numbers[0] if len(differing) == len(numbers) == 1 else None


def comparisons(arms: list[Arm], metric: str, window: int | None) -> list[Comparison]:
    """One for every arm with an intervention that has a counterpart without."""

    def rest(arm: Arm) -> dict[str, Any]:
        return {name: value for name, value in arm.setting.items() if name not in OF_INTERVENTION}

    baselines = [arm for arm in arms if arm.setting["intervention"] == "none"]
    pairs = [(a, b) for b in arms if b not in baselines for a in baselines if rest(a) == rest(b)]
    return [compare(*pair, metric, window) for pair in pairs]
