"""Draws how agents go on with an injection, with a head reset, and without either.

    python img/draw_injection.py img/NAME.png RUNS_OR_FILES_OF_THE_THREE_ARMS ...

Mean return over seeds and its 95% interval, in stretches of steps. Up to the injection the arms are one.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.arms import TRAINING_RETURN, Arm, print_remarks, read_arms, short
from analysis.canvas import DASHED, Figure, check_name, drawing, look, plot_broken, save
from analysis.figures import bin_edges, curve
from analysis.intervals import MIN_SEEDS, interval
from analysis.verdict import counterparts
from support.process import ends_in_one_line
from support.usage import UsageError, words_given

STRETCHES = 32  # from step 0 to the end
LOOKS = {
    "none": ("no intervention", look(0)),
    "injection": ("plasticity injection", look(1)),
    "reset-head": ("head reset", look(2)),
}


@drawing()
def draw(target: str, arms: list[Arm], at: int) -> None:
    """The figure of arms that are one up to step `at`."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    ax = figure.subplots()
    edges = bin_edges(arms, STRETCHES)
    middles = (edges[:-1] + edges[1:]) / 2
    for arm in arms:
        label, style = LOOKS[arm.intervention]
        curves = [curve(run.scalars[TRAINING_RETURN], edges) for run in arm.runs]
        mean, low, high = interval(np.array(curves))
        if arm.intervention != "none":
            mean[edges[1:] < at] = np.nan  # it begins in the last stretch of what the arms share
        drawn = ~np.isnan(mean)
        if not drawn.any():
            beyond = f"in one stretch beyond step {at:,} ({edges[1]:,.0f} steps each)"
            raise UsageError(f"{arm.name}: not all runs have games {beyond}: give runs that are further")
        plot_broken(ax, middles, mean, **style.line, lw=2.5)
        ax.fill_between(middles[drawn], low[drawn], high[drawn], color=style.colour, alpha=0.15, lw=0)
        ax.text(1.005 * edges[-1], mean[drawn][-1], label, color=style.colour, fontsize=13, va="center")
    ax.axvline(at, **DASHED)
    intervened = f"injection or reset \nat step {at:,} "
    ax.text(at, 1, intervened, transform=ax.get_xaxis_transform(), fontsize=12, ha="right", va="top")
    ax.set_xlabel("training step (1 step = 4 frames)", fontsize=12)
    ax.set_ylabel("score of a game", fontsize=12)
    ax.set_xlim(0, edges[-1])
    if ax.dataLim.ymin >= 0:
        ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(lambda step, _: short(step))
    ax.yaxis.set_major_formatter(lambda score, _: f"{score:,.0f}")
    ax.tick_params(labelsize=11)
    counts = sorted({len(arm.runs) for arm in arms})
    seeds = "1 seed" if counts == [1] else f"{'–'.join(map(str, counts))} seeds"
    title = f"{arms[0].game}: mean of {seeds}"
    if counts[-1] >= MIN_SEEDS:
        title += "; shaded: 95% interval"
    ax.set_title(title, fontsize=12, loc="left")
    save(figure, target)


def main() -> None:
    with ends_in_one_line():
        target, *files = words_given() or [""]
        if not files:
            example = "python img/draw_injection.py NAME.png ARM.csv ARM.csv ARM.csv"
            raise UsageError(f"give a figure and the files of three arms: {example}")
        check_name(target)
        arms, remarks = read_arms(files, TRAINING_RETURN)
        print_remarks(remarks)
        games = {arm.game for arm in arms}
        steps: set[int] = set()
        for arm in arms:
            steps.update(arm.planned_steps)
        interventions = sorted(arm.intervention for arm in arms)
        if len(games) != 1 or len(steps) != 1 or interventions != sorted(LOOKS):
            raise UsageError(f"give one arm each of {', '.join(LOOKS)}, of one game and at one step")
        if len(counterparts(arms)) < len(arms) - 1:
            raise UsageError(
                "the arms differ in more than the intervention: give three that differ in that alone"
            )
        draw(target, arms, steps.pop())


if __name__ == "__main__":
    main()
