"""Figures of runs: return against step, and the measures of plasticity."""

import math
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from analysis.arms import Arm, describe, short
from analysis.canvas import (
    INK,
    Artist,
    Axes,
    Figure,
    Look,
    ScaledTranslation,
    SubFigure,
    drawing,
    look,
    plot_broken,
    save,
)
from analysis.intervals import interval
from analysis.verdict import Comparison, noun, number_in
from dqn_injection_atari import INTERVENTIONS
from support.run_log import SIDE_BY_SIDE

MAX_BINS = 100  # points of a curve
NOWHERE = np.empty(0)
LETTERS, BESIDE_LABEL = 16, 12  # of a legend's small type: in an inch, and as wide as a line's sample
LEGEND_ROW = 0.17  # inches; a figure has room for two, and grows by those that are more
GAMES_PER_BIN = 10  # at least, on average, in the curves of return


def curve(points: np.ndarray, edges: np.ndarray, undefined: np.ndarray = NOWHERE) -> np.ndarray:
    """Mean of the values of (2, K) points in each of B bins edges[i] < step ≤ edges[i + 1], (B,).

    Empty bins are interpolated between full ones. They are NaN before the first full one, after the last, and where a step of
    `undefined` lies between the two, as are bins that hold such a step.
    """
    size, (steps, values) = len(edges) - 1, points[:, np.isfinite(points[1])]
    bins, broken = (np.searchsorted(edges, at).clip(1) - 1 for at in (steps, undefined))
    counts, sums, breaks = (
        np.bincount(at, weights, size) for at, weights in ((bins, None), (bins, values), (broken, None))
    )
    full = np.flatnonzero((counts > 0) & (breaks == 0))
    if not len(full):
        return np.full(size, np.nan)
    means = np.interp(np.arange(size), full, sums[full] / counts[full], left=np.nan, right=np.nan)
    before = full[np.searchsorted(full, np.arange(size), "right").clip(1) - 1]
    behind = full[np.searchsorted(full, np.arange(size)).clip(max=len(full) - 1)]
    passed = np.cumsum(breaks)
    return np.where(passed[before] == passed[behind], means, np.nan)


def draw(ax: Axes, arms: list[Arm], looks: dict[str, Look], tag: str, bins: int, aggregate: str) -> None:
    """One panel: a thin line per run; per arm a thick one and its interval, where all its runs have values; injections.

    Crosses at the bottom are where a measure is undefined.
    """
    edges = np.linspace(0, max(run.last_step for arm in arms for run in arm.runs), bins + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    for arm in arms:
        runs = [run for run in arm.runs if tag in run.scalars]
        style = looks[arm.name]
        undefined = [run.undefined(tag) for run in runs]
        curves = np.array(
            [curve(run.scalars[tag], edges, at) for run, at in zip(runs, undefined, strict=True)]
        )
        if len(curves):
            common = ~np.isnan(curves).any(axis=0)
            centre, low, high = np.full((3, bins), np.nan)
            centre[common], low[common], high[common] = interval(curves[:, common], aggregate)
            above = 2 + (
                arm.setting["intervention"] == "none"
            )  # what arms share is drawn as without intervention
            for own in curves:
                plot_broken(ax, middles, own, color=style.colour, lw=0.6, alpha=0.45, zorder=above)
            name = f"{arm.name} (n = {len(curves)})"
            plot_broken(ax, middles, centre, **style.line, lw=2, label=name, zorder=above)
            ax.fill_between(middles, low, high, color=style.colour, alpha=0.18, lw=0)
        if any(map(len, undefined)):
            at = np.concatenate(undefined)
            label = "undefined" if "undefined" not in ax.get_legend_handles_labels()[1] else None
            ax.plot(
                at,
                0 * at,
                "x",
                color=style.colour,
                ms=4,
                transform=ax.get_xaxis_transform(),
                clip_on=False,
                label=label,
            )
    kinds = {arm.setting["intervention"] for arm in arms} - {"none"}
    label = noun(*kinds) if len(kinds) == 1 else "intervention"
    for i, step in enumerate(
        sorted({step for arm in arms for run in arm.runs for step in arm.injections(run)})
    ):
        ax.axvline(step, color=INK, lw=1, ls=(0, (4, 3)), label="_" * (i > 0) + label)
    ax.set_xlim(0, edges[-1])
    ax.xaxis.set_major_formatter(lambda step, _: short(step))


def folded(label: str, inches: float) -> str:
    """A label in as many lines as it takes to fit into a legend of that width."""
    return textwrap.fill(label, int(LETTERS * inches) - BESIDE_LABEL)


def legend(target: Axes | SubFigure, lines: dict[str, Artist], inches: float, **where: Any) -> int:
    """A legend of {label: line} in as many columns as fit into a width; returns how many rows it has."""
    labels = [folded(label, inches) for label in lines]
    fitting = int(LETTERS * inches / (max(map(len, lines)) + BESIDE_LABEL))
    columns = min(max(1, fitting), len(lines))
    target.legend(lines.values(), labels, ncols=columns, **where)
    return math.ceil(len(lines) / columns) + sum(label.count("\n") for label in labels)


def by_game(arms: list[Arm]) -> dict[str, list[Arm]]:
    games: dict[str, list[Arm]] = defaultdict(list)
    for arm in arms:
        games[arm.game].append(arm)
    return games


def looks_of(arms: list[Arm]) -> dict[str, Look]:
    """{name: look}, the same in every game."""
    names = dict.fromkeys(arm.name for arm in arms)
    return {name: look(number) for number, name in enumerate(names)}


@drawing()
def draw_returns(arms: list[Arm], pairs: list[Comparison], path: Path, metric: str, aggregate: str) -> None:
    """The figure of return against step, a panel per game, with the windows of the verdicts shaded."""
    games, looks = by_game(arms), looks_of(arms)
    columns = min(3, len(games))
    rows = math.ceil(len(games) / columns)
    size = (8, 4.6) if len(games) == 1 else (4.6 * columns, 4.4 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    legend_rows = [0]
    below = ScaledTranslation(0, -0.45, figure.dpi_scale_trans)  # inches, below the label of the axis
    played = "a training game" if metric == "charts/episodic_return" else "an evaluation game"
    for ax, (game, shown) in zip(axes.flat, games.items(), strict=False):
        num_points = np.mean([run.scalars[metric].shape[1] for arm in shown for run in arm.runs])
        bins = int(np.clip(num_points / GAMES_PER_BIN, 20, MAX_BINS))
        draw(ax, shown, looks, metric, bins, aggregate)
        windows = {(pair.after, pair.upto) for pair in pairs if pair.game == game and all(pair.counts)}
        for i, (after, upto) in enumerate(sorted(windows)):
            ax.axvspan(
                after, upto, color=INK, alpha=0.06, lw=0, label="_" * (i > 0) + "window of the verdict"
            )
        ax.set(xlabel="step (1 step = 4 frames)", ylabel=f"return of {played}")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,g}".replace("-", "−"))
        ax.set_title(game, loc="left", fontweight="bold", fontsize=10)
        handles, labels = ax.get_legend_handles_labels()
        inches = size[0] / columns - 0.6
        where = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": ax.transAxes + below}
        legend_rows.append(legend(ax, dict(zip(labels, handles, strict=True)), inches, **where))
    for ax in axes.flat[len(games) :]:
        ax.set_axis_off()
    figure.set_figheight(size[1] + rows * LEGEND_ROW * max(0, max(legend_rows) - 2))
    save(figure, path)


@drawing()
def draw_plasticity(arms: list[Arm], path: Path, aggregate: str) -> bool:
    """The figure of the plasticity measures that TensorBoard's custom scalars show too; False, and none, if no run has any."""
    games, looks = by_game(arms), looks_of(arms)
    logged = {tag for arm in arms for run in arm.runs for tag in run.scalars}
    titles = {
        tag: title for title, tag in SIDE_BY_SIDE.items() if tag.startswith("plasticity/") and tag in logged
    }
    if not titles:
        return False
    columns = min(4, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(max(6, 3 * columns), (2.3 * rows + 1) * len(games)), layout="constrained")
    legend_rows = [0]
    for block, (game, shown) in zip(
        figure.subfigures(len(games), 1, squeeze=False).flat, games.items(), strict=True
    ):
        axes, lines = block.subplots(rows, columns, squeeze=False), dict[Any, Artist]()
        for ax, (tag, title) in zip(axes.flat, titles.items(), strict=False):
            draw(ax, shown, looks, tag, MAX_BINS, aggregate)
            ax.set_title(title, fontsize=9, loc="left")
            ax.locator_params(axis="x", nbins=4)
            lines |= {line.get_label(): line for line in ax.get_legend_handles_labels()[0]}
        for ax in axes.flat[len(titles) :]:
            ax.set_axis_off()
        block.suptitle(game, x=0.01, ha="left", fontweight="bold", fontsize=10)
        for ax in axes.flat[: len(titles)][-columns:]:
            ax.set_xlabel("step (1 step = 4 frames)")
        legend_rows.append(legend(block, lines, figure.get_figwidth(), loc="outside lower center"))
    figure.set_figheight(figure.get_figheight() + len(games) * LEGEND_ROW * max(0, max(legend_rows) - 2))
    save(figure, path)
    return True


@drawing()
def draw_differences(pairs: list[Comparison], number: str, path: Path) -> None:
    """The figure of differences in return, with − without, their 95% intervals, and each seed's, against what varies."""
    games, lines = {pair.game for pair in pairs}, defaultdict[str, list[Comparison]](list)
    values = sorted({number_in(pair.arms[1].setting, number) for pair in pairs})
    for pair in pairs:
        setting = pair.arms[1].setting
        what = INTERVENTIONS[setting["intervention"]].noun if number == "injection" else describe(setting, (), "")
        lines[f"{pair.game}, {what}" if len(games) > 1 else what].append(pair)
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    apart = min(0.08, 0.8 / len(lines))  # between the lines at one value, which is 1 from the next
    for i, (label, of_one) in enumerate(lines.items()):
        of_one.sort(key=lambda pair: number_in(pair.arms[1].setting, number))
        at = [
            values.index(number_in(pair.arms[1].setting, number)) + apart * (i - (len(lines) - 1) / 2)
            for pair in of_one
        ]
        found = np.array(
            [(pair.judgement.difference, pair.judgement.low, pair.judgement.high) for pair in of_one]
        )
        bars = np.abs(found[:, 1:] - found[:, :1]).T  # NaN, and not drawn, where there is no interval
        seeds = "–".join(map(str, sorted({len(means) for pair in of_one for means in pair.means})))
        point = look(i).point
        name = folded(f"{label} (n = {seeds})", figure.get_figwidth())
        ax.errorbar(at, found[:, 0], bars, **point, ls="", lw=1.5, capsize=4, label=name)
        own = [
            (x + 0.6 * apart, d)
            for x, pair in zip(at, of_one, strict=True)
            if pair.paired
            for d in pair.differences.values()
        ]
        ax.plot(*np.array(own).reshape(-1, 2).T, ".", color=point["color"], alpha=0.5)
    ax.axhline(0, color=INK, lw=0.8)
    ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    ax.margins(x=0.15)
    ax.set(
        xlabel="step of the injection" if number == "injection" else number.replace("_", " "),
        ylabel="difference in return, with − without (small: one seed)",
    )
    ax.set_title(", ".join(sorted(games)), loc="left", fontweight="bold", fontsize=10)
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.13))
    save(figure, path)
