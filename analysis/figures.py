"""Figures of runs: return against step, and the measures of plasticity."""

import itertools
import math
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from analysis import canvas
from analysis.arms import TRAINING_RETURN, Arm, by_game, describe, has_other_width, runs_of, short
from analysis.curves import POLICY_CHURN
from analysis.intervals import interval
from analysis.verdict import Comparison, event, number_in
from dqn_injection_atari import INTERVENTIONS
from support.run_log import SIDE_BY_SIDE

MAX_BINS = 100  # points of a curve
MOST_WITH_RUNS = 4  # arms in a panel; of more, lines of single runs could not be told apart
GAMES_PER_BIN = 10  # at least, on average, in the curves of return
SHARES = (
    "plasticity/dormant_fraction",
    "plasticity/active_fraction",
    POLICY_CHURN,
    "plasticity/new_heads_share_of_q",
)
NOWHERE = np.empty(0)
LETTERS = 16  # of a legend, in an inch
SAMPLE = 12  # letters that are as wide as a line's sample in it
ROW = 0.17  # its height, in inches
ROWS = 2  # for which a figure has room; it grows by those that are more
STEP = "step (1 step = 4 frames)"


def curve(points: np.ndarray, edges: np.ndarray, undefined: np.ndarray = NOWHERE) -> np.ndarray:
    """Mean of the values of (2, K) points in each of B bins edges[i] < step ≤ edges[i + 1], (B,).

    Empty bins are interpolated between full ones. They are NaN before the first full one, after the last, and
    where a step of `undefined` lies between the two, as are bins that hold such a step.
    """
    size = len(edges) - 1
    steps, values = points[:, np.isfinite(points[1])]
    bins = np.searchsorted(edges, steps).clip(1) - 1
    counts = np.bincount(bins, minlength=size)
    sums = np.bincount(bins, values, minlength=size)
    broken = np.zeros(size, bool)
    broken[np.searchsorted(edges, undefined).clip(1) - 1] = True
    full = np.flatnonzero((counts > 0) & ~broken)
    if not len(full):
        return np.full(size, np.nan)
    means = np.interp(np.arange(size), full, sums[full] / counts[full], left=np.nan, right=np.nan)
    for before, behind in itertools.pairwise(full):
        if broken[before:behind].any():
            means[before + 1 : behind] = np.nan
    return means


def bin_edges(arms: list[Arm], bins: int) -> np.ndarray:
    """(bins + 1,) steps from 0 to the end of the longest run; the first intervention of all is one of them.

    So no bin holds both what the arms share and what they do not. But where that intervention is less than
    half a bin from either end, all bins are of one length.
    """
    last = max(run.last_step for run in runs_of(arms))
    firsts = [last]
    for arm in arms:
        for run in arm.runs:
            firsts += arm.intervention_steps(run)[:1]
    first = min(firsts)
    before = round(bins * first / last)
    if not 0 < before < bins:
        return np.linspace(0, last, bins + 1)
    shared = np.linspace(0, first, before + 1)
    return np.append(shared[:-1], np.linspace(first, last, bins - before + 1))


def draw_arm(
    ax: canvas.Axes,
    arm: Arm,
    style: canvas.Look,
    tag: str,
    edges: np.ndarray,
    aggregate: str,
    with_runs: bool,
) -> None:
    """A thick line for the arm, and its interval, where all its runs have values; a thin line per run.

    Crosses at the bottom are where a measure is undefined.
    """
    runs = [run for run in arm.runs if tag in run.scalars]
    if not runs:
        return
    middles = (edges[:-1] + edges[1:]) / 2
    undefined = [run.undefined(tag) for run in runs]
    curves = np.empty((len(runs), len(middles)))
    for i, run in enumerate(runs):
        curves[i] = curve(run.scalars[tag], edges, undefined[i])
    common = ~np.isnan(curves).any(axis=0)
    aggregated = np.full((3, len(middles)), np.nan)
    aggregated[:, common] = interval(curves[:, common], aggregate)
    centre, low, high = aggregated
    if tag in SHARES:
        low, high = np.clip((low, high), 0, 1)  # a share is no less and no more
    above = 3 if arm.intervention == "none" else 2  # it also shows what the arms share
    if with_runs:
        for one_run in curves:
            canvas.plot_broken(ax, middles, one_run, color=style.colour, lw=0.6, alpha=0.45, zorder=above)
    label = f"{arm.name} (n = {len(curves)})"
    canvas.plot_broken(ax, middles, centre, **style.line, lw=2, label=label, zorder=above)
    ax.fill_between(middles, low, high, color=style.colour, alpha=0.18, lw=0)
    steps = np.concatenate(undefined)
    if len(steps):
        bottom: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        ax.plot(steps, 0 * steps, "x", color=style.colour, ms=4, label="undefined", **bottom)


def draw(
    ax: canvas.Axes, arms: list[Arm], looks: dict[str, canvas.Look], tag: str, bins: int, aggregate: str
) -> None:
    """One panel: the arms, and a dashed line at every step of an intervention."""
    edges = bin_edges(arms, bins)
    few = len(arms) <= MOST_WITH_RUNS
    steps: set[int] = set()
    for arm in arms:
        draw_arm(ax, arm, looks[arm.name], tag, edges, aggregate, with_runs=few)
        for run in arm.runs:
            steps.update(arm.intervention_steps(run))
    interventions = {arm.intervention for arm in arms} - {"none"}
    label = event(*interventions) if len(interventions) == 1 else "intervention"
    for step in sorted(steps):
        ax.axvline(step, **canvas.DASHED, label=label)
    ax.set_xlim(0, edges[-1])
    ax.xaxis.set_major_formatter(lambda step, _: short(step))
    values = [run.scalars[tag][1] for run in runs_of(arms) if tag in run.scalars]
    bottom, _ = ax.get_ylim()
    if bottom < 0 and not (np.concatenate(values) < 0).any():
        ax.set_ylim(bottom=0)  # an interval may reach below what there is


def labelled(ax: canvas.Axes) -> dict[str, canvas.Artist]:
    """{label: line} of what is named in a panel, once each."""
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def folded(label: str, inches: float) -> str:
    """A label in as many lines as it takes to fit into a legend of that width."""
    return textwrap.fill(label, int(LETTERS * inches) - SAMPLE)


def legend(
    target: canvas.Axes | canvas.Figure | canvas.SubFigure,
    lines: dict[str, canvas.Artist],
    inches: float,
    **where: Any,
) -> int:
    """A legend of {label: line} in as many columns as fit into a width; returns how many rows it has."""
    if not lines:
        return 0
    labels = [folded(label, inches) for label in lines]
    longest = max(len(label) for label in lines)
    fitting = int(LETTERS * inches / (longest + SAMPLE))
    columns = min(max(1, fitting), len(lines))
    target.legend(lines.values(), labels, ncols=columns, **where)
    return math.ceil(len(lines) / columns) + sum(label.count("\n") for label in labels)


def looks_of(arms: list[Arm]) -> dict[str, canvas.Look]:
    """{name: look}, the same in every game.

    Arms without an intervention come first, then injections: where there is one of each, they look as they
    do beside any others.
    """
    ordered = sorted(arms, key=lambda arm: (arm.intervention != "none", arm.intervention != "injection"))
    names = dict.fromkeys(arm.name for arm in ordered)
    return {name: canvas.look(number) for number, name in enumerate(names)}


@canvas.drawing()
def draw_returns(arms: list[Arm], pairs: list[Comparison], path: Path, metric: str, aggregate: str) -> None:
    """The figure of return against step, a panel per game, with the windows of the verdicts shaded."""
    games = by_game(arms)
    looks = looks_of(arms)
    columns = min(3, len(games))
    rows = math.ceil(len(games) / columns)
    width, height = (8, 4.6) if len(games) == 1 else (4.6 * columns, 4.4 * rows)
    figure = canvas.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    legend_rows = ROWS
    below = canvas.ScaledTranslation(0, -0.45, figure.dpi_scale_trans)  # inches, below the label of the axis
    played = "a training game" if metric == TRAINING_RETURN else "an evaluation game"
    for ax, (game, shown) in zip(axes.flat, games.items(), strict=False):
        num_points = np.mean([run.scalars[metric].shape[1] for run in runs_of(shown)])
        draw(ax, shown, looks, metric, int(np.clip(num_points / GAMES_PER_BIN, 20, MAX_BINS)), aggregate)
        judged = [pair for pair in pairs if pair.game == game and all(pair.means)]
        for after, upto in sorted({(pair.window.after, pair.window.upto) for pair in judged}):
            ax.axvspan(after, upto, color=canvas.INK, alpha=0.06, lw=0, label="window of the verdict")
        ax.set(xlabel=STEP, ylabel=f"return of {played}")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,g}".replace("-", "−"))
        ax.set_title(game, loc="left", fontweight="bold", fontsize=10)
        where = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": ax.transAxes + below}
        legend_rows = max(legend_rows, legend(ax, labelled(ax), width / columns - 0.6, **where))
    for ax in axes.flat[len(games) :]:
        ax.set_axis_off()
    figure.set_figheight(height + rows * ROW * (legend_rows - ROWS))
    canvas.save(figure, path)


@canvas.drawing()
def draw_plasticity(arms: list[Arm], path: Path, aggregate: str) -> bool:
    """The figure of the measures of plasticity in `SIDE_BY_SIDE`; False, and none, if no run has any."""
    games = by_game(arms)
    looks = looks_of(arms)
    logged: set[str] = set()
    for run in runs_of(arms):
        logged.update(run.scalars)
    titles = {
        title: tag for title, tag in SIDE_BY_SIDE.items() if tag.startswith("plasticity/") and tag in logged
    }
    if not titles:
        return False
    columns = min(4, len(titles))
    rows = math.ceil(len(titles) / columns)
    width = max(6, 3 * columns)
    height = (2.3 * rows + 1) * len(games)
    figure = canvas.Figure(figsize=(width, height), layout="constrained")
    blocks = figure.subfigures(len(games), 1, squeeze=False)
    legend_rows = ROWS
    for block, (game, shown) in zip(blocks.flat, games.items(), strict=True):
        axes = block.subplots(rows, columns, squeeze=False).flat
        lines: dict[str, canvas.Artist] = {}
        for ax, (title, tag) in zip(axes, titles.items(), strict=False):
            draw(ax, shown, looks, tag, MAX_BINS, aggregate)
            ax.set_title(title, fontsize=9, loc="left")
            ax.locator_params(axis="x", nbins=4)
            lines |= labelled(ax)
        for ax in axes[len(titles) :]:
            ax.set_axis_off()
        for ax in axes[: len(titles)][-columns:]:
            ax.set_xlabel(STEP)
        block.suptitle(game, x=0.01, ha="left", fontweight="bold", fontsize=10)
        legend_rows = max(legend_rows, legend(block, lines, width, loc="outside lower center"))
    figure.set_figheight(height + len(games) * ROW * (legend_rows - ROWS))
    canvas.save(figure, path)
    return True


@canvas.drawing()
def draw_differences(pairs: list[Comparison], number: str, path: Path) -> None:
    """The figure of differences in return, with − without, against the number in which settings differ."""

    def value_of(pair: Comparison) -> Any:
        return number_in(pair.arms[1].setting, number)

    games = sorted({pair.game for pair in pairs})
    values = sorted({value_of(pair) for pair in pairs})
    hidden: dict[str, Any] = {number: None}
    if number == "head_width" and not any(has_other_width(pair.arms[1].setting) for pair in pairs):
        hidden["injected_head_width"] = None  # which follows it
    lines: dict[str, list[Comparison]] = defaultdict(list)
    for pair in pairs:
        if number in ("injection", "injection_norm_ratio"):
            name = INTERVENTIONS[pair.intervention].noun
        else:
            name = describe(pair.arms[1].setting | hidden, (), "")
        lines[f"{pair.game}, {name}" if len(games) > 1 else name].append(pair)
    width = 6.0
    height = 4.0
    figure = canvas.Figure(figsize=(width, height), layout="constrained")
    ax = figure.subplots()
    apart = min(0.08, 0.8 / len(lines))  # between the lines at one value, which is 1 from the next
    for i, (label, line) in enumerate(lines.items()):
        line.sort(key=value_of)
        x = np.array([values.index(value_of(pair)) for pair in line]) + apart * (i - (len(lines) - 1) / 2)
        difference = np.array([pair.judgement.difference for pair in line])
        below = difference - [pair.judgement.low for pair in line]  # NaN, and not drawn, without an interval
        above = [pair.judgement.high for pair in line] - difference
        counts: set[int] = set()
        for pair in line:
            counts.update(map(len, pair.means))
        seeds = "–".join(map(str, sorted(counts)))
        point = canvas.look(i).point
        name = f"{label} (n = {seeds})"
        ax.errorbar(x, difference, np.array([below, above]), **point, ls="", lw=1.5, capsize=4, label=name)
        seed_points: list[tuple[float, float]] = []
        for at, pair in zip(x + 0.6 * apart, line, strict=True):
            if pair.paired:
                seed_points += [(at, seed_difference) for seed_difference in pair.differences.values()]
        ax.plot(*np.reshape(seed_points, (-1, 2)).T, ".", color=point["color"], alpha=0.5)
    ax.axhline(0, color=canvas.INK, lw=0.8)
    shown = short if number == "injection" else "{:g}".format
    ax.set_xticks(range(len(values)), [shown(value) for value in values])
    ax.margins(x=0.15)
    ax.set_xlabel("step of the injection" if number == "injection" else number.replace("_", " "))
    ax.set_ylabel("difference in return, with − without (small: one seed)")
    title = games[0] if len(games) == 1 else f"{len(games)} games"
    ax.set_title(title, loc="left", fontweight="bold", fontsize=10)
    legend_rows = legend(figure, labelled(ax), width, loc="outside lower left")
    figure.set_figheight(height + ROW * max(0, legend_rows - ROWS))
    canvas.save(figure, path)
