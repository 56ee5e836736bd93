"""Draws what each arm changes against the runs without an intervention.

    python img/draw_effects.py img/NAME.png 20000 results/FOLDER/*.csv games.csv

The files are of compare.py --export, and of img/play_agents.py. A run has five numbers: its mean return in
the first 20,000 steps after the intervention, in the whole window, and in the last 20,000 steps; the share of
units that are dormant in the learning head when it was measured last; and the mean score of its final agent's
games. What an arm changes is the mean of the differences within seeds, with a 95% t interval.

Games that training cuts, or that never end, are in no mean return. The final agent's are whole.
"""

import csv
import math
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.arms import Arm, group
from analysis.canvas import INK, Figure, MaxNLocator, check_name, drawing, look, save
from analysis.curves import TRAINING_RETURN, RecordedRun, read_curves
from analysis.intervals import interval
from analysis.verdict import Comparison, Window, comparisons, show
from support.process import ends_in_one_line
from support.usage import UsageError, reading, words_given

DORMANT = "plasticity/dormant_fraction/head"
LETTERS = 30  # of an arm's name in a line

Scores = dict[str, float]  # by the name of a run's folder: mean score of its final agent's games
Quantity = Callable[[RecordedRun], float]  # NaN where a run has none
Values = dict[str, dict[int, float]]  # {quantity: {seed: value}} of an arm


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
    runs: list[RecordedRun] = []
    scores: Scores = {}
    for path in map(Path, paths):
        with reading(path, "a file", "give one of compare.py --export, or of img/play_agents.py"):
            content = path.read_text(encoding="utf-8")
        if content.startswith("run,"):
            scores |= read_scores(path)
        else:
            runs += read_curves(path, TRAINING_RETURN)
    known = {run.lineage[0].folder for run in runs}
    for name in scores:
        if name not in known:
            print(f"left out: the scores of {name}, whose curves are in none of these files")
    arms, _ = group(runs)
    return arms, scores


def mean_return(run: RecordedRun, after: int, upto: int) -> float:
    _, returns = run.between(TRAINING_RETURN, after, upto)
    return float(returns.mean()) if returns.size else math.nan


def dormant_in_the_end(run: RecordedRun) -> float:
    if DORMANT not in run.scalars:
        return math.nan
    return float(run.scalars[DORMANT][1, -1])


def quantities(window: Window, part: int, scores: Scores) -> dict[str, Quantity]:
    """What is compared, in the order of the figure's panels."""
    after = window.after
    upto = window.upto
    return {
        f"return, first {part:,} steps": lambda run: mean_return(run, after, after + part),
        f"return, all {upto - after:,} steps": lambda run: mean_return(run, after, upto),
        f"return, last {part:,} steps": lambda run: mean_return(run, upto - part, upto),
        "dormant units of the head, end": dormant_in_the_end,
        "final agent, whole games": lambda run: scores.get(run.lineage[0].folder or "", math.nan),
    }


def values_of(runs: list[RecordedRun], measured: dict[str, Quantity]) -> Values:
    """What each run has. A seed without a value is left out, and so is what no run has."""
    values: Values = {}
    for name, quantity in measured.items():
        of_seeds = {run.args.seed: quantity(run) for run in runs}
        finite = {seed: value for seed, value in of_seeds.items() if math.isfinite(value)}
        if finite:
            values[name] = finite
    return values


def changes(without: Values, intervened: Values) -> Values:
    """Differences within the seeds that both have, of all that the runs without an intervention have."""
    differences: Values = {}
    for name, values in without.items():
        others = intervened.get(name, {})
        differences[name] = {seed: others[seed] - values[seed] for seed in others if seed in values}
    return differences


def find_effects(arms: list[Arm], scores: Scores, part: int) -> dict[str, Values]:
    """{arm: its values} of the runs without an intervention, then {arm: its changes} of the others.

    Raises:
        UsageError: an arm cannot be compared within seeds, or not over the same window as the others.
    """
    pairs = comparisons(arms, TRAINING_RETURN, None)
    if not pairs:
        raise UsageError("no two arms differ in the intervention alone: give the files of both")
    without = pairs[0].arms[0]
    window = pairs[0].window
    for pair in pairs:
        check_pair(pair, without, window)
    if part >= window.upto - window.after:
        raise UsageError(
            f"the window has {window.upto - window.after:,} steps: give fewer of them than {part:,}"
        )
    measured = quantities(window, part, scores)
    baseline = values_of(without.runs, measured)
    effects = {without.name: baseline}
    for pair in pairs:
        arm = pair.arms[1]
        counted = [run for run in arm.runs if run.args.seed in pair.differences]
        effects[arm.name] = changes(baseline, values_of(counted, measured))
    return effects


def check_pair(pair: Comparison, without: Arm, window: Window) -> None:
    """
    Raises:
        UsageError: a comparison is none within seeds, has other runs to compare with, or another window.
    """
    name = pair.arms[1].name
    if not pair.paired:
        raise UsageError(f"{name}: its runs share no history with those without it: give forks, of 3 seeds")
    if pair.arms[0] is not without:
        raise UsageError(f"{name} is compared with other runs than the arms before it: draw them one by one")
    if (pair.window.after, pair.window.upto) != (window.after, window.upto):
        raise UsageError(f"{name} has another window than the arms before it: draw them one by one")


def cell(values: dict[int, float], seeds: int) -> str:
    """Mean and interval, and how many seeds they are of, if not all."""
    if not values:
        return "–"
    text = show(*interval(np.array([*values.values()])))
    if len(values) < seeds:
        noun = "seed" if len(values) == 1 else "seeds"
        text += f" ({len(values)} {noun})"
    return text


def effects_table(effects: dict[str, Values]) -> str:
    """Them in Markdown."""
    baseline, *_ = effects.values()
    rows = [["arm", *baseline], ["---"] * (1 + len(baseline))]
    for number, (arm, values) in enumerate(effects.items()):
        seeds = max(len(of_seeds) for of_seeds in values.values())
        cells = [cell(of_seeds, seeds) for of_seeds in values.values()]
        name = arm if number == 0 else f"{arm}: change"
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@drawing()
def draw(target: str, title: str, effects: dict[str, Values]) -> None:
    """The figure: a panel for each quantity, with a row for each arm; small points are seeds."""
    (_, baseline), *arms = effects.items()
    figure = Figure(figsize=(12, 1.4 + 0.5 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(baseline), sharey=True)
    for ax, quantity in zip(axes, baseline, strict=True):
        for row, (_, values) in enumerate(arms):
            differences = np.array([*values[quantity].values()])
            if not differences.size:
                continue
            point = look(row + 1).point
            centre, low, high = interval(differences)
            ax.plot([low, high], [row, row], color=point["color"], lw=2)
            ax.plot(centre, row, **point)
            ax.plot(differences, np.full(len(differences), row + 0.25), ".", color=point["color"], ms=4)
        ax.axvline(0, color=INK, lw=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_title(quantity, fontsize=9, loc="left")
        mean = np.mean([*baseline[quantity].values()])
        ax.set_xlabel(f"change; without: {show(float(mean))}")
    axes[0].set_yticks(range(len(arms)), [textwrap.fill(name, LETTERS) for name, _ in arms])
    axes[0].invert_yaxis()
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
    save(figure, target)


def main() -> None:
    with ends_in_one_line():
        words = words_given()
        if len(words) < 3 or not words[1].isdecimal():
            example = "python img/draw_effects.py img/NAME.png 20000 results/FOLDER/*.csv"
            raise UsageError(f"give a figure, a number of steps, and files: {example}")
        target, steps, *files = words
        check_name(target)
        arms, scores = read_files(files)
        effects = find_effects(arms, scores, int(steps))
        print(effects_table(effects))
        draw(target, arms[0].game, effects)


if __name__ == "__main__":
    main()
