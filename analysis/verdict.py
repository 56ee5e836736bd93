"""The verdict on two arms that differ in nothing but the intervention, over a window of steps after it."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import scipy.stats

from analysis.arms import EVALUATION, KEYS_OF_INTERVENTION, Arm, has_other_width
from analysis.curves import TRAINING_RETURN, RecordedRun
from analysis.intervals import CONFIDENCE, MIN_SEEDS
from dqn_injection_atari import INTERVENTIONS

LEAST_SHARE = 0.5  # of the steps that the median run has after the intervention: fewer would cut off too much


def conclusion(low: float, high: float) -> Literal["raised", "no evidence", "lowered"]:
    """What the 95% interval of a difference in return says."""
    if low > 0:
        return "raised"
    if high < 0:
        return "lowered"
    return "no evidence"


@dataclass(frozen=True)
class Judgement:
    """Difference of mean returns, with − without, and the verdict; 95% interval and p, NaN without them."""

    difference: float
    verdict: Literal["raised", "no evidence", "lowered", "too few seeds", "no interval"]
    sentence: str
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


@dataclass(frozen=True)
class Window:
    """The steps of a comparison, after < step ≤ upto."""

    after: int
    upto: int
    ended_by: str | None = None  # the run whose last step is `upto`, where others have got further
    beyond: float = 1.0  # steps that the median run has after the intervention, as a multiple of the window


@dataclass
class Side:
    """The runs of an arm that count in a comparison, and what they have in its window."""

    arm: Arm
    means: dict[int, float] = field(default_factory=dict)  # seed: mean return of its run
    points: int = 0  # returns in those means
    unreported: int = 0  # training games without a return: cut by new ones, or going on at the end
    missing: dict[int, float] = field(default_factory=dict)  # seed: share of games, or steps, in no return;
    # 1 of those that would count, had they any return
    reach: float = 0.0  # by how much the mean over runs may be off for want of those


@dataclass(frozen=True)
class Comparison:
    """Two arms that differ in the intervention alone; pairs are (without, with)."""

    sides: tuple[Side, Side]
    firsts: dict[int, int]  # seed: step of its run's first intervention
    window: Window
    shared: int  # seeds whose runs were one up to the intervention
    paired: bool
    one_agent: bool  # all runs continue one agent, each with a seed of its own
    judgement: Judgement
    left_out: dict[str, str]  # folder: reason
    verdicts: int = 1  # that are given together with this one, itself included
    p_holm: float = math.nan  # the judgement's p, corrected for them
    beyond_control: "Comparison | None" = None  # of the arm with its control; no verdict on plasticity

    @property
    def game(self) -> str:
        return self.arms[0].game

    @property
    def intervention(self) -> str:
        return self.arms[1].intervention

    @property
    def arms(self) -> tuple[Arm, Arm]:
        return self.sides[0].arm, self.sides[1].arm

    @property
    def sides_in_words(self) -> tuple[str, str]:
        return sides_in_words(self.arms[0].intervention, self.intervention)

    @property
    def means(self) -> tuple[dict[int, float], dict[int, float]]:
        return self.sides[0].means, self.sides[1].means

    @property
    def differences(self) -> dict[int, float]:
        """{seed: with − without} of the seeds that both arms have."""
        without, intervened = self.means
        return {seed: intervened[seed] - mean for seed, mean in without.items() if seed in intervened}

    @property
    def hinges_on_missing_games(self) -> bool:
        """Whether games without a return could carry the verdict: were one arm's mean off by its reach."""
        low = self.judgement.low
        high = self.judgement.high
        if math.isnan(low):
            low = high = self.judgement.difference
        reach = max(side.reach for side in self.sides)
        shifted = {conclusion(low + shift, high + shift) for shift in (-reach, reach)}
        return shifted != {conclusion(low, high)}


def show(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """`value [low, high]`, or the value alone without an interval; the largest has three digits or more."""
    values = [value, low, high] if low <= high else [value]
    largest = max(map(abs, values))
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 0
    shown = []
    for number in values:
        rounded = round(number, decimals) + 0.0  # no −0
        shown.append(f"{rounded:,.{decimals}f}".replace("-", "−"))
    if len(shown) == 1:
        return shown[0]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def event(intervention: str) -> str:
    return "injection" if intervention == "injection" else "intervention"


def sides_in_words(baseline: str, intervention: str) -> tuple[str, str]:
    """How a sentence tells the sides of a comparison apart, from what is done to each."""
    if baseline == "none":
        return "without", f"with {event(intervention)}"
    return "of the control", "of the arm"


def judge(
    without: np.ndarray,
    intervened: np.ndarray,
    paired: bool,
    intervention: str,
    same_capacity: bool,
    baseline: str = "none",
) -> Judgement:
    """The verdict, for an injection on plasticity, from one mean return per run.

    Args:
        without, intervened: (n,) and (m,); if paired, n = m and the values at one index are of one seed
        intervention: what sets them apart, as in Args
        same_capacity: whether as many parameters learn as before; where more do, a gain may come from those
        baseline: what is done to the runs without that; of a control, nothing is said of plasticity
    """
    counts = (len(without), len(intervened))
    difference = float(intervened.mean() - without.mean()) if min(counts) > 0 else math.nan
    if min(counts) < MIN_SEEDS:
        sides = sides_in_words(baseline, intervention)
        few = f"{counts[0]} {sides[0]} and {counts[1]} {sides[1]}, it takes {MIN_SEEDS} of each"
        return Judgement(difference, "too few seeds", f"too few seeds to say: {few}")
    spread = np.ptp(intervened - without) if paired else np.ptp(without) + np.ptp(intervened)
    if spread <= 1e-9 * max(abs(without).max(), abs(intervened).max()):
        same = f"the return changed by {show(difference)} with every seed, no spread to judge that by"
        return Judgement(difference, "no interval", f"no interval: {same}")
    if paired:
        result = scipy.stats.ttest_rel(intervened, without)
    else:
        result = scipy.stats.ttest_ind(intervened, without, equal_var=False)
    low, high = map(float, result.confidence_interval(CONFIDENCE))
    deed = INTERVENTIONS[intervention].deed
    on_plasticity = intervention == "injection" and same_capacity and baseline == "none"
    verdict = conclusion(low, high)
    if verdict == "raised":
        sentence = f"{deed} raised the return by {show(difference, low, high)}"
        if on_plasticity:
            sentence += ": evidence of lost plasticity"
    elif verdict == "lowered":
        sentence = f"{deed} lowered the return by {show(-difference, -high, -low)}"
    else:
        changed = f"changed by {show(difference, low, high)}"
        sentence = f"no evidence that {deed} changed the return: it {changed}"
        if on_plasticity:
            sentence = f"no evidence of lost plasticity: the return {changed}"
    return Judgement(difference, verdict, sentence, low, high, float(result.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """Each p corrected for their number (Holm 1979): if nothing differs, 1 time in 20 any is below 0.05."""
    corrected = [math.nan] * len(p)
    largest = 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def common_step(run: RecordedRun, other: RecordedRun) -> tuple[float, bool]:
    """The last step at which both are known to have been one run, or -1; and whether its id says so."""
    common = (-1.0, False)
    for ours, theirs in itertools.product(run.lineage, other.lineage):
        step = min(ours.step, theirs.step)
        if step < math.inf and ours.is_run(theirs):
            common = max(common, (step, ours.run is not None and theirs.run is not None))
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


def share_history(run: RecordedRun, other: RecordedRun, upto: int) -> bool:
    """Whether two runs, whose settings are the same up to a step, were one up to there.

    Their origins say so: one run was both up to there, or up to an earlier step from which they went on with
    one seed; or both were begun whole, with one seed. Names of folders and seeds say less than ids: then
    their games must not contradict, and of runs that were begun whole, maybe elsewhere, there must be some.
    """
    step, by_id = common_step(run, other)
    if step >= upto and by_id:
        return True
    games = run.between(TRAINING_RETURN, -1, upto)
    if not np.array_equal(games, other.between(TRAINING_RETURN, -1, upto)):
        return False
    if step >= upto:
        return True
    ours = seeds_between(run, step, upto)
    theirs = seeds_between(other, step, upto)
    one_course = ours == theirs
    if any(seed is None for _, seed in ours + theirs):  # a path did not tell the seed of what was forked
        one_course = run.args.seed == other.args.seed
    return one_course and (step >= 0 or games.size > 0)


@dataclass
class Candidates:
    """The runs that may count in a comparison, {seed: run} without and with the intervention."""

    sides: tuple[dict[int, RecordedRun], dict[int, RecordedRun]]
    left_out: dict[str, str] = field(default_factory=dict)  # folder of a run that does not count: reason
    silent: set[str] = field(default_factory=set)  # folders of those whose games in the window have no return

    @property
    def runs(self) -> list[RecordedRun]:
        return [*self.sides[0].values(), *self.sides[1].values()]

    def copy(self) -> "Candidates":
        return self.without(set())

    def without(self, folders: set[str]) -> "Candidates":
        """A copy that lacks the runs in these folders."""
        kept = []
        for side in self.sides:
            kept.append({seed: run for seed, run in side.items() if run.folder not in folders})
        return Candidates((kept[0], kept[1]), dict(self.left_out), set(self.silent))

    def leave_out(self, run: RecordedRun, reason: str) -> None:
        for side in self.sides:
            if side.get(run.args.seed) is run:
                del side[run.args.seed]
        self.left_out[run.folder] = f"{run.folder} {reason}"


def beyond_the_intervention(candidates: Candidates, firsts: dict[int, int]) -> tuple[int, dict[str, int]]:
    """The latest of the first interventions, and how far beyond it each run has got that has, by its folder.

    `firsts` is {seed: step} of the first interventions.
    """
    after = max((firsts[seed] for seed in candidates.sides[1]), default=0)
    return after, {run.folder: run.last_step - after for run in candidates.runs if run.last_step > after}


def leave_out_short(candidates: Candidates, firsts: dict[int, int], begin: str) -> None:
    """Leaves out runs that have come less than half as far as the median run of either side.

    They would shorten the window of all to what they have themselves. `begin` is the intervention in words.
    """
    after, beyond = beyond_the_intervention(candidates, firsts)
    medians = []
    for side in candidates.sides:
        beyond_of_side = [beyond[run.folder] for run in side.values() if run.folder in beyond]
        if beyond_of_side:
            medians.append(float(np.median(beyond_of_side)))
    least = min(medians, default=0)
    short = [run for run in candidates.runs if 0 < run.last_step - after < LEAST_SHARE * least]
    for run in short:
        steps = run.last_step - after
        far = f"is at step {run.last_step:,}, {steps:,} steps beyond {begin} at {after:,}"
        fix = f"give a --window of {steps} or less"
        if run.last_step < run.args.total_timesteps:
            fix = f"let it go on, or {fix}"
        candidates.leave_out(run, f"{far}, where the median run of an arm has {least:,.0f} or more: {fix}")
    if short:
        leave_out_short(candidates, firsts, begin)


def common_window(candidates: Candidates, firsts: dict[int, int]) -> Window:
    """From the latest of the first interventions to the last step that all these runs have reached."""
    after, beyond = beyond_the_intervention(candidates, firsts)
    if not beyond:
        return Window(after, after)
    last = min(beyond, key=lambda folder: beyond[folder])
    ended_by = last if beyond[last] < max(beyond.values()) else None
    median = float(np.median([*beyond.values()]))
    return Window(after, after + beyond[last], ended_by, median / beyond[last])


def keep_within(candidates: Candidates, metric: str, window: Window, begin: str) -> None:
    """Leaves out the runs that have not reached the window's end, or have logged no `metric` in it."""
    for run in candidates.runs:
        progress = f"is at step {run.last_step:,} and has not got"
        if run.last_step <= window.after:
            candidates.leave_out(run, f"{progress} beyond {begin} at {window.after:,}")
        elif run.last_step < window.upto:
            candidates.leave_out(run, f"{progress} to the window's end at {window.upto:,}")
        elif not run.between(metric, window.after, window.upto).size:
            reason = f"has logged no {metric} in the window"
            unreported = run.unreported(window.after, window.upto)
            if unreported and metric == TRAINING_RETURN:
                candidates.silent.add(run.folder)
                reason += f": its {unreported} training games there were cut or are still going"
            candidates.leave_out(run, reason)


def group_by_agent(runs: list[RecordedRun], before: int) -> list[list[RecordedRun]]:
    """The runs that continue one agent together: they were one run for half of `before` steps, or longer."""
    agents: list[list[RecordedRun]] = []
    for run in runs:
        own = []
        for agent in agents:
            if any(share_history(member, run, before // 2) for member in agent):
                own.append(agent)
        if own:
            own[0].append(run)
        else:
            agents.append([run])
    return agents


def count_agents_once(candidates: Candidates, before: int) -> bool:
    """Whether there are several seeds and all runs continue one agent.

    `before` is the step of the intervention. If not all continue one agent, each counts once on either side,
    and its other continuations are left out: they differ less than agents do, and would make an interval over
    both too narrow.
    """
    agents = group_by_agent(candidates.runs, before)
    if len(agents) < 2:
        return len({run.args.seed for run in candidates.runs}) > 1
    for agent in agents:
        on_sides = Counter(run.args.seed for run in agent)
        for side in candidates.sides:
            continuations = [run for run in agent if side.get(run.args.seed) is run]
            # the smallest seed counts, of those that both sides have where there are any
            continuations.sort(key=lambda run: (on_sides[run.args.seed] < 2, run.args.seed))
            for run in continuations[1:]:
                counts = f"seed {continuations[0].args.seed}, which counts once beside other agents"
                candidates.leave_out(run, f"continues the agent of {counts}")
    return False


def pair_up(candidates: Candidates, firsts: dict[int, int]) -> set[int]:
    """Seeds whose runs were one up to their first intervention; if they are enough, others are left out."""
    without, intervened = candidates.sides
    both = without.keys() & intervened.keys()
    shared = {seed for seed in both if share_history(without[seed], intervened[seed], firsts[seed])}
    if len(shared) >= MIN_SEEDS:
        for run in candidates.runs:
            if run.args.seed not in shared:
                candidates.leave_out(run, "shares its history with no run of the other arm")
    return shared


@dataclass(frozen=True)
class Selection:
    """The runs that count in a comparison, and over which window."""

    candidates: Candidates
    window: Window
    shared: set[int]  # seeds whose runs were one up to the intervention
    one_agent: bool  # whether all continue one agent


def window_of(candidates: Candidates, firsts: dict[int, int], steps: int | None) -> Window:
    """Of so many steps, or of as many as all of these runs have."""
    if steps is None:
        return common_window(candidates, firsts)
    after, _ = beyond_the_intervention(candidates, firsts)
    return Window(after, after + steps)


def set_an_end_alone(
    candidates: Candidates, window: Window, left_out: set[str], firsts: dict[int, int], steps: int | None
) -> set[str]:
    """Of these folders, those of runs that set the end of the candidates' window, or its begin, alone."""
    last = {run.folder for run in candidates.runs if run.last_step == window.upto}
    latest = {run.folder for seed, run in candidates.sides[1].items() if firsts[seed] == window.after}
    for folders in (latest & left_out, last & left_out):
        others = candidates.without(folders)
        other_window = window_of(others, firsts, steps)
        if all(others.sides) and (other_window.after, other_window.upto) != (window.after, window.upto):
            return folders
    return set()


def select(
    candidates: Candidates, firsts: dict[int, int], metric: str, steps: int | None, begin: str
) -> Selection:
    """Which of the runs count, over a window of so many steps, or as many as all of them have.

    `firsts` is {seed: step} of the first interventions, `begin` the intervention in words.
    """
    given = candidates.copy()
    if steps is None:
        leave_out_short(candidates, firsts, begin)
    window = window_of(candidates, firsts, steps)
    long_enough = candidates.copy()
    keep_within(candidates, metric, window, begin)
    undue = set_an_end_alone(long_enough, window, set(candidates.left_out), firsts, steps)
    for folder in undue:
        with_it = f"with this run the window would be {window.after:,} < step ≤ {window.upto:,}"
        candidates.left_out[folder] += f"; {with_it}"
    if not undue:
        before = min((firsts[seed] for seed in candidates.sides[1]), default=window.after)
        within = {run.folder for run in candidates.runs}
        one_agent = count_agents_once(candidates, before)
        shared = pair_up(candidates, firsts)
        undue = within.intersection(candidates.left_out)
        if not undue:
            return Selection(candidates, window, shared, one_agent)
    # these runs do not count: they decide neither on the window, nor on whether another run counts
    selection = select(given.without(undue), firsts, metric, steps, begin)
    for folder, reason in candidates.left_out.items():
        if folder in undue:
            selection.candidates.left_out[folder] = reason
    late = {run.folder for seed, run in given.sides[1].items() if firsts[seed] > selection.window.after}
    selection.candidates.silent.update((candidates.silent & undue) - late)
    return selection


def reach(returns: np.ndarray, missing: float) -> float:
    """By how much the mean of a run's returns may be off, where a share of its play is missing from them.

    Where new games begin again and again, the reported ones are too short by about the share of those that
    are missing, if lengths are as good as memoryless. A score that grows with the length is then too low by
    this share of its mean, which in such games is about its standard deviation. Scores around 0 do not grow
    so. There missing games are taken to lie a standard deviation from the others, and the factor is kept,
    which is a little too large then. Where half is missing, nothing is known: infinity.
    """
    if missing >= 0.5:
        return math.inf
    scale = max(np.abs(returns).mean(), returns.std())
    return float(scale) * missing / (1 - missing)


def measure(arm: Arm, runs: dict[int, RecordedRun], silent: set[str], metric: str, window: Window) -> Side:
    """What the runs of an arm that count, {seed: run}, have in a window, and what is missing there.

    `silent` are the folders of runs that would count, had any of their games in the window a return.
    """
    side = Side(arm)
    for seed in sorted(runs):
        run = runs[seed]
        _, returns = run.between(metric, window.after, window.upto)
        side.means[seed] = float(returns.mean())
        side.missing[seed] = run.share_unreported(window.after, window.upto)
        side.points += len(returns)
        side.unreported += run.unreported(window.after, window.upto)
        side.reach += reach(returns, side.missing[seed])
    side.reach /= max(len(runs), 1)
    for run in arm.runs:
        if run.folder in silent:
            side.missing[run.args.seed] = 1.0
            side.unreported += run.unreported(window.after, window.upto)
            side.reach = math.inf  # nothing is known of what it lacks
    return side


def without_counterpart(candidates: Candidates, intervened: Arm) -> set[str]:
    """The folders of runs without the intervention whose seed's run with it is left out, if not all are.

    Where the norm decides when to inject, agents whose norm grew late, or not yet, would be on one side only.
    """
    without, counted = candidates.sides
    if not counted:
        return set()
    left_out = {run.args.seed for run in intervened.runs} - counted.keys()
    return {run.folder for seed, run in without.items() if seed in left_out}


def compare_arms(without: Arm, intervened: Arm, metric: str, window: int | None) -> Comparison:
    """The verdict on two arms that differ in nothing but the intervention."""
    intervention = intervened.intervention
    baselines = {run.args.seed: run for run in without.runs}
    candidates = Candidates((baselines, {run.args.seed: run for run in intervened.runs}))
    firsts = {}
    for run in intervened.runs:
        steps = intervened.intervention_steps(run)
        if steps:
            firsts[run.args.seed] = steps[0]
        else:
            yet = "not been injected yet" if intervention == "injection" else "had no intervention yet"
            candidates.leave_out(run, f"has {yet}: the verdict is on runs that had")
    begin = f"the {event(intervention)}"
    if not intervened.planned_steps:
        begin = f"the latest first {event(intervention)}"
    lone: set[str] = set()
    while True:
        chosen = select(candidates.without(lone), firsts, metric, window, begin)
        more = without_counterpart(chosen.candidates, intervened)
        if intervened.planned_steps or not more:
            break
        lone |= more
    for folder in sorted(lone):
        reason = f"is of a seed whose run with the {event(intervention)} does not count"
        chosen.candidates.left_out[folder] = f"{folder} {reason}"
    paired = len(chosen.shared) >= MIN_SEEDS
    sides = (
        measure(without, chosen.candidates.sides[0], chosen.candidates.silent, metric, chosen.window),
        measure(intervened, chosen.candidates.sides[1], chosen.candidates.silent, metric, chosen.window),
    )
    means = [np.array([*side.means.values()]) for side in sides]
    args = intervened.runs[0].args
    same_capacity = args.freeze_heads and args.new_head_width == args.head_width
    judgement = judge(means[0], means[1], paired, intervention, same_capacity, without.intervention)
    if chosen.one_agent:
        sentence = f"{judgement.sentence}; over continuations of one agent, not over agents"
        judgement = replace(judgement, sentence=sentence)
    return Comparison(
        sides=sides,
        firsts=firsts,
        window=chosen.window,
        shared=len(chosen.shared),
        paired=paired,
        one_agent=chosen.one_agent,
        judgement=judgement,
        left_out=chosen.candidates.left_out,
    )


def number_in(setting: dict[str, Any], name: str) -> Any:
    """The value of an argument; of "injection" the step, where there is one only."""
    value = setting[name]
    return value[0] if name == "injection" and len(value) == 1 else value


def varied(pairs: list[Comparison]) -> str | None:
    """The only number in which comparisons differ, beside game and intervention; None where more differs."""
    settings = [pair.arms[1].setting for pair in pairs]
    differing = {}
    for name in settings[0] if settings else ():
        values = {number_in(shared, name) for shared in settings}
        if len(values - {None}) > 1 and name not in ("env_id", "intervention"):
            differing[name] = values  # an arm that has no such number has None
    if "head_width" in differing and not any(map(has_other_width, settings)):
        differing.pop("injected_head_width", None)  # new heads are as wide as the first
    if len(differing) != 1:
        return None
    name, values = differing.popitem()
    return name if all(type(value) in (int, float) for value in values) else None


def evaluated_differently(without: Arm, intervened: Arm) -> str:
    """`eval_epsilon 0.01 and 0.1`, where two arms' metric was evaluated differently; else nothing."""
    differing = []
    for name in EVALUATION:
        values = (without.setting.get(name), intervened.setting.get(name))
        if values[0] != values[1]:
            differing.append(f"{name} {values[0]} and {values[1]}")
    return ", ".join(differing)


def set_apart_by(arm: Arm, other: Arm) -> list[str]:
    """What differs, of all that changes what is learned beside the intervention."""
    differing = []
    for name in arm.setting:
        own = name in KEYS_OF_INTERVENTION or name in EVALUATION
        if not own and arm.setting[name] != other.setting[name]:
            differing.append(name)
    return differing


def differ_in_intervention_alone(arm: Arm, other: Arm) -> bool:
    """Whether everything else that changes what is learned is the same."""
    return not set_apart_by(arm, other)


def counterparts(arms: list[Arm]) -> list[tuple[Arm, Arm]]:
    """Pairs (without, with) of arms that differ in nothing that is learned but the intervention."""
    pairs = []
    for intervened, without in itertools.product(arms, arms):
        alike = differ_in_intervention_alone(without, intervened)
        if intervened.intervention != "none" and without.intervention == "none" and alike:
            pairs.append((without, intervened))
    return pairs


def controls(arms: list[Arm], intervened: Arm) -> list[Arm]:
    """The arms that are an arm's control, at the same planned steps, in whatever way they were evaluated."""
    if not intervened.control or not intervened.planned_steps:
        return []
    found = []
    for arm in arms:
        does_that = all(arm.setting[name] == value for name, value in intervened.control.items())
        at_these_steps = arm.planned_steps == intervened.planned_steps
        if does_that and at_these_steps and differ_in_intervention_alone(arm, intervened):
            found.append(arm)
    return found


def compare_with_control(pair: Comparison, arms: list[Arm], metric: str) -> Comparison | None:
    """A comparison's arm and its control, over the same window; None where that is not among the arms.

    So where seeds are the same, the verdict's difference is this one and the control's to no intervention.
    """
    intervened = pair.arms[1]
    for control in controls(arms, intervened):
        if not evaluated_differently(control, intervened):
            return compare_arms(control, intervened, metric, pair.window.upto - pair.window.after)
    return None


def comparisons(arms: list[Arm], metric: str, window: int | None) -> list[Comparison]:
    """One for every arm with an intervention that has a counterpart without, evaluated in the same way.

    Where the arm's control is among the arms, too, the difference to that is beside it, and counts as no
    verdict.
    """
    pairs = []
    for without, intervened in counterparts(arms):
        if not evaluated_differently(without, intervened):
            pair = compare_arms(without, intervened, metric, window)
            pairs.append(replace(pair, beyond_control=compare_with_control(pair, arms, metric)))
    judged = [i for i, pair in enumerate(pairs) if not math.isnan(pair.judgement.p)]
    corrected = holm([pairs[i].judgement.p for i in judged])
    for i, p in zip(judged, corrected, strict=True):
        pairs[i] = replace(pairs[i], verdicts=len(judged), p_holm=p)
    return pairs


def arms_in(pairs: list[Comparison]) -> list[Arm]:
    compared: list[Arm] = []
    for pair in pairs:
        compared += pair.arms
    return compared


def in_no_comparison(arms: list[Arm], pairs: list[Comparison]) -> list[str]:
    """A line for each arm that is in no comparison."""
    compared = arms_in(pairs)
    return [f"{arm.game}: {arm.name} has no counterpart here" for arm in arms if arm not in compared]


def missing_counterparts(arms: list[Arm]) -> dict[str, str]:
    """{arms: reason} of each arm with an intervention that has no counterpart, and the nearest one without.

    The reason is what else they differ in.
    """
    with_one = [intervened for _, intervened in counterparts(arms)]
    reasons = {}
    for arm in arms:
        candidates = [other for other in arms if other.game == arm.game and other.intervention == "none"]
        if arm.intervention == "none" or arm in with_one or not candidates:
            continue
        nearest = min(candidates, key=lambda other: len(set_apart_by(other, arm)))
        names = f"{arm.game}: {arm.name} against {nearest.name}"
        differing = [name.replace("_", " ") for name in set_apart_by(nearest, arm)]
        reasons[names] = f"{names}, which differ in {' and '.join(differing)}, too"
    return reasons


def not_compared(arms: list[Arm], pairs: list[Comparison]) -> dict[str, str]:
    """{arms: reason} of those that are not compared with no intervention, or with their control.

    The reason is that they were evaluated differently.
    """
    compared = arms_in(pairs)
    candidates = []
    for without, intervened in counterparts(arms):
        if without not in compared or intervened not in compared:
            candidates.append((without, intervened))
    for pair in pairs:
        if pair.beyond_control is None:
            candidates += [(control, pair.arms[1]) for control in controls(arms, pair.arms[1])]
    reasons = {}
    for without, intervened in candidates:
        difference = evaluated_differently(without, intervened)
        if difference:
            names = f"{intervened.game}: {intervened.name} against {without.name}"
            reasons[names] = f"{names}, evaluated differently: {difference}"
    return reasons
