"""Draws what each arm changes against the runs without an intervention.

    python img/draw_effects.py img/NAME.png 20000 results/FOLDER/*.csv games.csv

The files are of compare.py --export, and of img/play_agents.py. A run has five numbers: its mean return in
the first 20,000 steps after the intervention, in the whole window, and in the last 20,000 steps; the share of
units that are dormant in the learning head when it was measured last before the window's end, at a step at
which ReDo recycled them in no run; and the mean score of its final agent's games, if that agent is of the
window's end. What an arm changes is the mean of the differences within seeds, with a 95% t interval.

Games that training cuts, or that never end, are in no mean return. Those of the final agent are whole.
"""

import csv
import math
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.arms import TRAINING_RETURN, Arm, print_remarks, read_arms, runs_of
from analysis.canvas import INK, Figure, MaxNLocator, check_name, drawing, look, save
from analysis.curves import RecordedRun
from analysis.intervals import MIN_SEEDS, interval
from analysis.markdown import markdown_table
from analysis.verdict import (
    Candidates,
    Comparison,
    Window,
    comparisons,
    count_agents_once,
    in_no_comparison,
    share_history,
    show,
)
from support.process import ends_in_one_line
from support.usage import UsageError, reading, words_given

DORMANT = "plasticity/dormant_fraction/head"
RECYCLED = "injection/recycled/head"
LETTERS = 30  # of an arm's name in a line

Scores = dict[str, float]  # by the name of a run's folder: mean score of its final agent's games
Quantity = Callable[[RecordedRun], float]  # NaN where a run has none
Values = dict[str, dict[int, float]]  # {quantity: {seed: value}} of an arm


@dataclass(frozen=True)
class Effects:
    """What the runs without an intervention have, and by how much those of the other arms differ.

    The name of an arm says where its runs continue one agent.
    """

    game: str
    without: str  # the arm's name
    values: Values  # its own
    changes: dict[str, Values]  # {arm: differences to those}
    left_out: dict[str, str]  # {folder: reason} of runs that count nowhere; and of games, and of arms


def read_scores(path: Path) -> Scores:
    """Mean scores of the agents in a file of img/play_agents.py."""
    games: dict[str, list[float]] = defaultdict(list)
    with (
        reading(path, "scores of games", "give the file that img/play_agents.py wrote"),
        open(path, encoding="utf-8", newline="") as file,
    ):
        for row in csv.DictReader(file):
            games[row["run"]].append(float(row["score"]))
    return {run: float(np.mean(scores)) for run, scores in games.items()}


def read_files(paths: list[str]) -> tuple[list[Arm], Scores]:
    """The arms of all files of curves, and the scores of all others."""
    curves: list[str] = []
    scores: Scores = {}
    for path in map(Path, paths):
        with reading(path, "a file", "give one of compare.py --export, or of img/play_agents.py"):
            content = path.read_text(encoding="utf-8")
        if content.startswith("run,"):
            scores |= read_scores(path)
        else:
            curves.append(str(path))
    if not curves:
        raise UsageError("these are scores of games alone: give the files of compare.py --export, too")
    arms, remarks = read_arms(curves, TRAINING_RETURN)
    print_remarks(remarks)
    known = {run.lineage[0].folder for run in runs_of(arms)}
    for name in scores:
        if name not in known:
            print(f"left out: the scores of {name}, a run that is in no arm here")
    return arms, scores


def mean_return(run: RecordedRun, after: int, upto: int) -> float:
    _, returns = run.between(TRAINING_RETURN, after, upto)
    return float(returns.mean()) if returns.size else math.nan


def steps_of_recycling(runs: list[RecordedRun], window: Window) -> np.ndarray:
    """Steps in the window at which ReDo recycled units of the head in any of these runs."""
    steps = [run.between(RECYCLED, window.after, window.upto)[0] for run in runs]
    return np.unique(np.concatenate(steps))


def last_dormant(run: RecordedRun, window: Window, recycled: np.ndarray) -> float:
    """The last measure before the window's end, at none of the steps at which units were recycled."""
    steps, shares = run.between(DORMANT, window.after, window.upto - 1)
    earlier = shares[~np.isin(steps, recycled)]
    return float(earlier[-1]) if earlier.size else math.nan


def score_of(run: RecordedRun, scores: Scores) -> float:
    """Mean score of its final agent, NaN if that has not played."""
    return scores.get(run.lineage[0].folder or "", math.nan)


def final_score(run: RecordedRun, window: Window, scores: Scores) -> float:
    """`score_of` an agent that is of the window's end."""
    return math.nan if run.last_step > window.upto else score_of(run, scores)


def quantities(window: Window, part: int, scores: Scores, recycled: np.ndarray) -> dict[str, Quantity]:
    """What is compared, in the order of the figure's panels; see `steps_of_recycling` for the last."""
    after = window.after
    upto = window.upto
    return {
        f"return, first {part:,} steps": lambda run: mean_return(run, after, after + part),
        f"return, all {upto - after:,} steps": lambda run: mean_return(run, after, upto),
        f"return, last {part:,} steps": lambda run: mean_return(run, upto - part, upto),
        "dormant units of the head, end": lambda run: last_dormant(run, window, recycled),
        "final agent, whole games": lambda run: final_score(run, window, scores),
    }


def values_of(runs: dict[int, RecordedRun], measured: dict[str, Quantity]) -> Values:
    """What each run, {seed: run}, has. A seed without a value is left out, and so is what no run has."""
    values: Values = {}
    for name, quantity in measured.items():
        of_seeds = {seed: quantity(run) for seed, run in runs.items()}
        finite = {seed: value for seed, value in of_seeds.items() if math.isfinite(value)}
        if finite:
            values[name] = finite
    return values


def changes(values_without: Values, intervened: Values) -> Values:
    """Differences within the seeds that both have, of all that the runs without an intervention have."""
    differences: Values = {}
    for name, values in values_without.items():
        others = intervened.get(name, {})
        differences[name] = {seed: others[seed] - values[seed] for seed in others if seed in values}
    return differences


def find_effects(arms: list[Arm], scores: Scores, part: int) -> Effects:
    """
    Raises:
        UsageError: an arm cannot be compared within seeds, or not from the same step on as the others.
    """
    pairs = comparisons(arms, TRAINING_RETURN, None)
    if not pairs:
        raise UsageError("no two arms differ in the intervention alone: give the files of both")
    without = pairs[0].arms[0]
    window = min((pair.window for pair in pairs), key=lambda window: window.upto)
    if part >= window.upto - window.after:
        raise UsageError(
            f"the window has {window.upto - window.after:,} steps: give fewer of them than {part:,}"
        )
    recycled = steps_of_recycling(runs_of(arms), window)
    measured = quantities(window, part, scores, recycled)
    origins: dict[int, RecordedRun] = {}
    forks: dict[str, dict[int, RecordedRun]] = {}
    left_out: dict[str, str] = {}
    for pair in sorted(pairs, key=lambda pair: pair.intervention != "injection"):
        candidates, one_agent = counting(pair, without, window)
        name = pair.arms[1].name
        if one_agent:
            name += ", continuations of one agent"
        origins |= candidates.sides[0]
        forks[name] = candidates.sides[1]
        left_out |= pair.left_out | candidates.left_out
    for reason in in_no_comparison(arms, pairs):
        left_out[reason] = reason
    for runs in (origins, *forks.values()):
        for run in runs.values():
            left_out.pop(run.folder, None)  # one without a game in the window has other numbers
            has_played = not math.isnan(score_of(run, scores))
            if has_played and run.last_step > window.upto:
                reason = f"the window ends at {window.upto:,}, and it is the agent of step {run.last_step:,}"
                left_out[f"games of {run.folder}"] = f"games of the final agent of {run.folder}: {reason}"
    values = values_of(origins, measured)
    changed = {name: changes(values, values_of(runs, measured)) for name, runs in forks.items()}
    return Effects(without.game, without.name, values, changed, left_out)


def counting(pair: Comparison, without: Arm, window: Window) -> tuple[Candidates, bool]:
    """The runs of an arm, and those without an intervention that they were one with up to the window.

    All have got to the window's end. They may be in no comparison, where none of their games in the window
    has ended. Each agent counts once, unless all continue one agent, which is the second value.

    Raises:
        UsageError: they are too few, or the arm is compared with other runs, or from another step on.
    """
    name = pair.arms[1].name
    if pair.arms[0] is not without:
        raise UsageError(f"{name} is compared with other runs than the arms before it: draw them one by one")
    if pair.window.after != window.after:
        raise UsageError(f"{name} begins at another step than the arms before it: draw them one by one")
    origins = {run.args.seed: run for run in without.runs}
    candidates = Candidates(({}, {}))
    for run in pair.arms[1].runs:
        seed = run.args.seed
        origin = origins.get(seed)
        if origin is None or min(origin.last_step, run.last_step) < window.upto:
            continue
        if share_history(origin, run, window.after):
            candidates.sides[0][seed] = origin
            candidates.sides[1][seed] = run
    one_agent = count_agents_once(candidates, window.after)
    count = len(candidates.sides[1])
    if count < MIN_SEEDS:
        raise UsageError(
            f"{name}: {count} agents have gone on with it and without it up to the window's end: "
            f"give {MIN_SEEDS}"
        )
    return candidates, one_agent


def most_seeds(effects: Effects) -> int:
    return max(len(of_seeds) for of_seeds in effects.values.values())


def if_fewer(values: dict[int, float], seeds: int) -> str:
    """How many seeds these are of, if not of so many."""
    if len(values) == seeds:
        return ""
    noun = "seed" if len(values) == 1 else "seeds"
    return f" ({len(values)} {noun})"


def cell(values: dict[int, float], seeds: int) -> str:
    """Mean and interval, and how many seeds they are of, if not all."""
    if not values:
        return "–"
    return show(*interval(np.array([*values.values()]))) + if_fewer(values, seeds)


def effects_table(effects: Effects) -> str:
    """In Markdown: a row for each arm, a column for each quantity."""
    seeds = most_seeds(effects)
    rows = [[effects.without, *(cell(of_seeds, seeds) for of_seeds in effects.values.values())]]
    for arm, changed in effects.changes.items():
        rows.append([f"{arm}: change", *(cell(of_seeds, seeds) for of_seeds in changed.values())])
    return markdown_table(["arm", *effects.values], rows)


@drawing()
def draw(target: str, effects: Effects) -> None:
    """The figure: a panel for each quantity, with a row for each arm; small points are seeds."""
    figure = Figure(figsize=(12, 1.4 + 0.5 * len(effects.changes)), layout="constrained")
    (axes,) = figure.subplots(1, len(effects.values), sharey=True, squeeze=False)
    seeds = most_seeds(effects)
    for ax, (quantity, values) in zip(axes, effects.values.items(), strict=True):
        if quantity.startswith("return") and ax is not axes[0]:
            ax.sharex(axes[0])
        for row, changed in enumerate(effects.changes.values()):
            differences = np.array([*changed[quantity].values()])
            if not differences.size:
                continue
            point = look(row + 1).point
            centre, low, high = interval(differences)
            ax.plot([low, high], [row, row], color=point["color"], lw=2)
            ax.plot(centre, row, **point, ms=5)
            ax.plot(differences, np.full(len(differences), row + 0.25), ".", color=point["color"], ms=7)
        ax.axvline(0, color=INK, lw=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        ax.set_title(quantity, fontsize=9, loc="left")
        mean = np.mean([*values.values()])
        ax.set_xlabel(f"change; without: {show(float(mean))}{if_fewer(values, seeds)}")
    names = [textwrap.fill(name, LETTERS) for name in effects.changes]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.suptitle(effects.game, x=0.01, ha="left", fontweight="bold", fontsize=10)
    save(figure, target)


def main() -> None:
    with ends_in_one_line():
        words = words_given()
        if len(words) < 3 or not words[1].isdecimal() or int(words[1]) == 0:
            example = "python img/draw_effects.py img/NAME.png 20000 results/FOLDER/*.csv"
            raise UsageError(f"give a figure, a number of steps, and files: {example}")
        target, steps, *files = words
        check_name(target)
        arms, scores = read_files(files)
        effects = find_effects(arms, scores, int(steps))
        for reason in effects.left_out.values():
            print(f"left out: {reason}")
        print(effects_table(effects))
        draw(target, effects)


if __name__ == "__main__":
    main()
