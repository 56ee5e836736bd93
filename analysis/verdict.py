"""The verdict on two arms that differ in nothing but the intervention, over a window of steps after it."""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.stats

from analysis.arms import EVALUATION, OF_INTERVENTION, Arm, RecordedRun, evaluation
from analysis.intervals import CONFIDENCE, MIN_SEEDS

LEAST_SHARE = 0.5  # of the steps that the median run has after the intervention: fewer would cut off too much
DEEDS = {"injection": "injection", "reset-head": "resetting the head", "shrink-perturb": "shrink and perturb"}


@dataclass(frozen=True)
class Judgement:
    """Difference of mean returns, with − without, its 95% interval and p, and the verdict; NaN where there is none."""

    difference: float
    low: float
    high: float
    verdict: Literal["raised", "no evidence", "lowered", "too few seeds", "no interval"]
    sentence: str
    p: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """Two arms that differ in nothing but the intervention, over the steps after < step ≤ upto. Pairs are (without, with)."""

    arms: tuple[Arm, Arm]
    intervention: str
    firsts: dict[int, int]  # seed: step of its run's first injection
    after: int
    upto: int
    ended_by: str | None  # the run whose last step is `upto`, where others have got further
    beyond: float  # steps that the median run has after the intervention, as a multiple of the window
    means: tuple[dict[int, float], dict[int, float]]  # seed: mean return of its run
    counts: tuple[int, int]  # of the returns in those means
    unreported: tuple[
        int, int
    ]  # training games in the window that have no return: cut by new ones, or going on at its end
    missing: tuple[
        dict[int, float], dict[int, float]
    ]  # seed: share of its run's games, or steps, that is in no return
    reaches: tuple[float, float]  # by how much the mean over runs of an arm may be off for want of those
    shared: int  # seeds whose runs were one up to the injection
    paired: bool
    one_agent: (
        bool  # all runs were one up to the injection: continuations of one agent, each with a seed of its own
    )
    judgement: Judgement
    left_out: dict[str, str]  # folder: reason
    verdicts: int = 1  # that are given together with this one, itself included
    p_holm: float = math.nan  # the judgement's p, corrected for them

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


def judge(
    without: np.ndarray,
    injected: np.ndarray,
    paired: bool,
    intervention: str = "injection",
    nothing_else: bool = True,
) -> Judgement:
    """The verdict, for an injection on plasticity, from one mean return per run.

    Args:
        without, injected: (n,) and (m,); if paired, n = m and the values at one index are of one seed
        intervention: what sets them apart, as in Args
        nothing_else: whether as many parameters learn as before; where more do, a gain may come from those
    """
    counts, nothing, deed = (len(without), len(injected)), (math.nan, math.nan), DEEDS[intervention]
    on_plasticity = intervention == "injection" and nothing_else
    difference = float(injected.mean() - without.mean()) if all(counts) else math.nan
    if min(counts) < MIN_SEEDS:
        few = f"{counts[0]} without and {counts[1]} with {noun(intervention)}, it takes {MIN_SEEDS} of each"
        return Judgement(difference, *nothing, "too few seeds", f"too few seeds to say: {few}")
    spread = np.ptp(injected - without) if paired else np.ptp(without) + np.ptp(injected)
    if spread <= 1e-9 * max(abs(without).max(), abs(injected).max()):
        sentence = f"no interval: the return changed by {show(difference)} with every seed, no spread to judge that by"
        return Judgement(difference, *nothing, "no interval", sentence)
    test = scipy.stats.ttest_rel if paired else functools.partial(scipy.stats.ttest_ind, equal_var=False)
    result = test(injected, without)
    low, high = map(float, result.confidence_interval(CONFIDENCE))
    p = float(result.pvalue)
    if low > 0:
        meaning = ": evidence of lost plasticity" if on_plasticity else ""
        sentence = f"{deed} raised the return by {show(difference, low, high)}{meaning}"
        return Judgement(difference, low, high, "raised", sentence, p)
    if high < 0:
        sentence = f"{deed} lowered the return by {show(-difference, -high, -low)}"
        return Judgement(difference, low, high, "lowered", sentence, p)
    if on_plasticity:
        sentence = f"no evidence of lost plasticity: the return changed by {show(difference, low, high)}"
    else:
        sentence = f"no evidence that {deed} changed the return: it changed by {show(difference, low, high)}"
    return Judgement(difference, low, high, "no evidence", sentence, p)


def holm(p: Sequence[float]) -> list[float]:
    """Each p corrected for their number (Holm 1979): where nothing differs, any is below 0.05 in 1 of 20 cases."""
    corrected, largest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def common_step(run: RecordedRun, other: RecordedRun) -> tuple[float, bool]:
    """The last step at which both are known to have been one run, and whether its id says so, or only a name.

    -1 where no origin of theirs is known to be the same.
    """
    common = (-1.0, False)
    for mine, theirs in itertools.product(run.lineage, other.lineage):
        step = min(mine.step, theirs.step)
        if step < math.inf and mine.is_run(theirs):
            common = max(common, (step, mine.run is not None and theirs.run is not None))
    return common


def seeds_between(run: RecordedRun, after: float, upto: float) -> list[tuple[float, int | None]]:
    """Of which seed a run's random streams were in after < step ≤ upto, and from when on: (-1, 1), (500, 2).

    A fork with its origin's seed goes on as that one would, a fork with another seed in streams of its own.
    """
    oldest_first = run.lineage[::-1]
    begins = [-1.0, *(before.step for before in oldest_first[:-1])]
    course: list[tuple[float, int | None]] = []
    for begin, part in zip(begins, oldest_first, strict=True):
        if part.step <= after or begin >= upto:
            continue
        if not course or course[-1][1] != part.seed:
            course.append((max(begin, after), part.seed))
    return course


def same_games(run: RecordedRun, other: RecordedRun, upto: int) -> bool:
    """Whether the same training games ended at the same steps, up to this one."""
    games, others = run.games(upto), other.games(upto)
    if not np.array_equal(games[0], others[0]):
        return False
    if run.known_as.rounded or other.known_as.rounded:
        return all(f"{ours:.6g}" == f"{theirs:.6g}" for ours, theirs in zip(games[1], others[1], strict=True))
    return np.array_equal(games[1], others[1])


def share_history(run: RecordedRun, other: RecordedRun, upto: int) -> bool:
    """Whether two runs, whose settings are the same up to a step, were one up to there.

    Their origins say so: one run was both up to there, or up to an earlier step from which they went on with one
    seed; or both were begun whole, with one seed. Names of folders and seeds say less than ids: then their games
    must not contradict, and of runs that were begun whole, maybe elsewhere or by another version, there must be some.
    """
    step, by_id = common_step(run, other)
    if step >= upto:
        return by_id or same_games(run, other, upto)
    ours, theirs = (seeds_between(one, step, upto) for one in (run, other))
    one_course = ours == theirs
    if any(
        seed is None for _, seed in ours + theirs
    ):  # an earlier version did not note that of what was forked
        one_course = run.args.seed == other.args.seed
    if not one_course or not same_games(run, other, upto):
        return False
    return step >= 0 or run.games(upto).size > 0


def in_window(
    runs: list[RecordedRun], metric: str, after: int, upto: int, begin: str
) -> tuple[dict[int, RecordedRun], dict[str, str]]:
    """{seed: run} of the runs that count in the window after < step ≤ upto, and {folder: reason} of the others."""
    side, left_out = {}, {}
    for run in runs:
        if run.last_step < max(upto, after + 1):
            end = f"beyond {begin}" if run.last_step <= after else f"to the window's end at {upto:,}"
            left_out[run.folder] = f"{run.folder} is at step {run.last_step:,} and has not got {end}"
        elif not run.between(metric, after, upto).size:
            games = (
                f": its {n} training games there were cut or are still going"
                if (n := run.unreported(after, upto))
                else ""
            )
            left_out[run.folder] = f"{run.folder} has logged no {metric} in the window{games}"
        else:
            side[run.args.seed] = run
    return side, left_out


def leave(sides: list[dict[int, RecordedRun]], reasons: dict[int, str]) -> dict[str, str]:
    """Takes the runs of the seeds in {seed: reason} out of the sides, {seed: run}; {folder: reason} of those runs."""
    runs = [(side.pop(seed), reason) for side in sides for seed, reason in reasons.items() if seed in side]
    return {run.folder: f"{run.folder} {reason}" for run, reason in runs}


def count_agents_once(sides: list[dict[int, RecordedRun]], before: int) -> tuple[bool, dict[str, str]]:
    """Of several agents each counts once: where runs continue the same one, all but one of them leave the sides.

    Continuations of one agent differ less than agents do, and would make an interval over both too narrow.

    Args:
        sides: {seed: run} without and with injection, changed in place
        before: runs that were one up to this step continue one agent

    Returns:
        whether there are several seeds, and all of one agent; and {folder: reason} of the runs that left
    """
    runs: dict[int, list[RecordedRun]] = {}
    for side in sides:
        for seed, run in side.items():
            runs.setdefault(seed, []).append(run)

    def one_agent(seed: int, other: int) -> bool:
        pairs = itertools.product(runs[seed], runs[other])
        return seed == other or any(share_history(*pair, before) for pair in pairs)

    order = sorted(runs, key=lambda seed: (any(seed not in side for side in sides), seed))
    agent = {seed: next(other for other in order if one_agent(other, seed)) for seed in runs}
    if len(set(agent.values())) < 2:
        return len(runs) > 1, {}
    same = {seed: first for seed, first in agent.items() if first != seed}
    why = "continues the agent of seed {}, which counts once beside other agents"
    return False, leave(sides, {seed: why.format(first) for seed, first in same.items()})


def pair_up(sides: list[dict[int, RecordedRun]], firsts: dict[int, int]) -> tuple[set[int], dict[str, str]]:
    """Seeds whose runs were one up to their first injection; if those are enough, all other runs leave the sides.

    Args:
        sides: {seed: run} without and with injection, changed in place

    Returns:
        the seeds, and {folder: reason} of the runs that left
    """
    shared = {
        seed
        for seed in sides[0].keys() & sides[1].keys()
        if share_history(sides[0][seed], sides[1][seed], firsts[seed])
    }
    others = sorted((sides[0].keys() | sides[1].keys()) - shared) if len(shared) >= MIN_SEEDS else ()
    return shared, leave(sides, dict.fromkeys(others, "shares its history with no run of the other arm"))


def reach(returns: np.ndarray, missing: float) -> float:
    """By how much the mean of a run's returns may be off, where a share of its play is missing from them.

    Where new games begin again and again, the reported ones are too short by about the share of those that are missing, if
    their lengths are as good as memoryless. Where half of it is missing, nothing is known: infinity.
    """
    return float(np.abs(returns).mean()) * missing / (1 - missing) if missing < 0.5 else math.inf


@dataclass(frozen=True)
class Window:
    """The steps of a comparison, after < step ≤ upto."""

    after: int
    upto: int
    ended_by: str | None  # see `Comparison`
    beyond: float
    left_out: dict[str, str]  # folder: reason


def common_window(sides: Sequence[Sequence[RecordedRun]], firsts: dict[int, int], what: str) -> Window:
    """From the latest of the first interventions to the last step that all these runs have reached.

    A run that has come less than half as far beyond it as the median run of either side is left out: it would
    shorten the window of all to what it has itself.

    Args:
        sides: runs without and with an intervention
        firsts: {seed: step} of the first intervention of those with one
        what: the intervention in words
    """
    after = max((firsts[run.args.seed] for run in sides[1]), default=0)
    steps = {run.folder: run.last_step - after for runs in sides for run in runs if run.last_step > after}
    if not steps:
        return Window(after, after, None, 1.0, {})
    medians = []
    for runs in sides:
        of_side = [steps[run.folder] for run in runs if run.folder in steps]
        if of_side:
            medians.append(float(np.median(of_side)))
    least = min(medians)
    left_out = {}
    for run in itertools.chain(*sides):
        beyond = steps.get(run.folder, 0)
        if 0 < beyond < LEAST_SHARE * least:
            far = f"{run.folder} is at step {run.last_step:,}, {beyond:,} steps beyond {what} at {after:,}"
            resume = "let it go on, or " if run.last_step < run.args.total_timesteps else ""
            fix = f"{resume}give a --window of {beyond} or less"
            left_out[run.folder] = f"{far}, where the median run of an arm has {least:,.0f} or more: {fix}"
    if left_out:
        others = [[run for run in runs if run.folder not in left_out] for runs in sides]
        window = common_window(others, firsts, what)
        return replace(window, left_out=left_out | window.left_out)
    shortest = min(steps, key=lambda folder: steps[folder])
    ended_by = shortest if steps[shortest] < max(steps.values()) else None
    median = float(np.median([*steps.values()]))
    return Window(after, after + steps[shortest], ended_by, median / steps[shortest], {})


def compare_arms(without: Arm, injected: Arm, metric: str, window: int | None) -> Comparison:
    """The verdict on two arms that differ in nothing but the intervention."""
    arms, what = (without, injected), injected.runs[0].args.intervention
    firsts = {run.args.seed: steps[0] for run in injected.runs if (steps := injected.injections(run))}
    yet = "not been injected yet" if what == "injection" else "had no intervention yet"
    left_out = {
        run.folder: f"{run.folder} has {yet}: the verdict is on runs that had"
        for run in injected.runs
        if run.args.seed not in firsts
    }
    when = f"the {noun(what)}" if injected.injection else f"the latest first {noun(what)}"
    used = [[run for run in arm.runs if run.folder not in left_out] for arm in arms]
    if window is None:
        span = common_window(used, firsts, when)
    else:
        after = max(firsts.values(), default=0)
        span = Window(after, after + window, None, 1.0, {})
    left_out |= span.left_out
    sides = []
    for runs in used:
        compared = [run for run in runs if run.folder not in span.left_out]
        side, reasons = in_window(compared, metric, span.after, span.upto, f"{when} at {span.after:,}")
        sides.append(side)
        left_out |= reasons
    before = min((firsts[seed] for seed in sides[1]), default=span.after)
    one_agent, reasons = count_agents_once(sides, before)
    left_out |= reasons
    shared, reasons = pair_up(sides, firsts)
    left_out |= reasons
    after, upto = span.after, span.upto
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
    values = [np.array([*of_side.values()]) for of_side in means]
    judgement = judge(values[0], values[1], paired, what, nothing_else=not changes_capacity(injected))
    if one_agent:
        sentence = f"{judgement.sentence}; over continuations of one agent, not over agents"
        judgement = replace(judgement, sentence=sentence)
    return Comparison(
        arms=arms,
        intervention=what,
        firsts=firsts,
        after=after,
        upto=upto,
        ended_by=span.ended_by,
        beyond=span.beyond,
        means=(means[0], means[1]),
        counts=(counts[0], counts[1]),
        unreported=(cut_games[0], cut_games[1]),
        missing=(missing[0], missing[1]),
        reaches=(reaches[0], reaches[1]),
        shared=len(shared),
        paired=paired,
        one_agent=one_agent,
        judgement=judgement,
        left_out=left_out,
    )


def changes_capacity(injected: Arm) -> bool:
    """Whether more parameters, or fewer, learn after the injection than before it."""
    args = injected.runs[0].args
    return not args.freeze_heads or args.injected_head_width not in (None, args.head_width)


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
    numbers = [
        name for name, values in differing.items() if all(type(value) in (int, float) for value in values)
    ]
    return numbers[0] if len(differing) == len(numbers) == 1 else None


def evaluated_differently(arms: Iterable[Arm], metric: str) -> str:
    """`eval_epsilon 0.01 and 0.1`, where the runs of these arms were evaluated differently; else nothing."""
    found = [evaluation(run.args, metric) for arm in arms for run in arm.runs]
    differing = []
    for name in found[0]:
        values = dict.fromkeys(str(of_run[name]) for of_run in found)
        if len(values) > 1:
            differing.append(f"{name} {' and '.join(values)}")
    return ", ".join(differing)


def counterparts(arms: list[Arm]) -> list[tuple[Arm, Arm]]:
    """Pairs (without, with) of arms that differ in nothing that is learned but the intervention."""

    def rest(arm: Arm) -> dict[str, Any]:
        left_out = {*OF_INTERVENTION, *EVALUATION}
        return {name: value for name, value in arm.setting.items() if name not in left_out}

    baselines = [arm for arm in arms if arm.setting["intervention"] == "none"]
    return [(a, b) for b in arms if b not in baselines for a in baselines if rest(a) == rest(b)]


def comparisons(arms: list[Arm], metric: str, window: int | None) -> list[Comparison]:
    """One for every arm with an intervention that has a counterpart without, evaluated in the same way."""
    pairs = [
        compare_arms(*counterpart, metric, window)
        for counterpart in counterparts(arms)
        if not evaluated_differently(counterpart, metric)
    ]
    judged = [i for i, pair in enumerate(pairs) if not math.isnan(pair.judgement.p)]
    corrected = holm([pairs[i].judgement.p for i in judged])
    for i, p in zip(judged, corrected, strict=True):
        pairs[i] = replace(pairs[i], verdicts=len(judged), p_holm=p)
    return pairs


def not_compared(arms: list[Arm], pairs: list[Comparison], metric: str) -> dict[str, str]:
    """{arms: reason} of those that would be compared, had they been evaluated alike, one of them with no other."""
    compared = {(arm.game, arm.name) for pair in pairs for arm in pair.arms}
    reasons = {}
    for without, injected in counterparts(arms):
        how = evaluated_differently((without, injected), metric)
        both = {(arm.game, arm.name) for arm in (without, injected)}
        if how and not both <= compared:
            names = f"{injected.name} against {without.name}"
            reasons[f"{injected.game}: {names}"] = f"{injected.game}: {names}, evaluated differently: {how}"
    return reasons
