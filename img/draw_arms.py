"""Draws evaluation curves of several arms: python img/draw_arms.py img/NAME.png runs/FOLDER runs/FOLDER ...

Runs with one --exp-name are an arm: a thin line per run, a thick one for their mean. Prints means and ranges.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.arms import short
from analysis.canvas import Figure, check_name, drawing, look, plot_broken, save
from analysis.curves import read_run
from analysis.markdown import markdown_table
from support.process import ends_in_one_line
from support.usage import UsageError, words_given

RETURN = "eval/episodic_return"


@drawing()
def draw(target: str, title: str, arms: dict[str, np.ndarray], steps: np.ndarray) -> None:
    """The figure of {name: (runs, K) returns} at K steps."""
    figure = Figure(figsize=(8, 4.2))
    ax = figure.subplots()
    labels = []
    means = []
    for number, (name, values) in enumerate(arms.items()):
        style = look(number)
        ax.plot(steps, values.T, color=style.colour, lw=0.8, alpha=0.5)
        labels.append(f"{name}, mean of {len(values)}")
        plot_broken(ax, steps, values.mean(axis=0), **style.line, lw=2.2, label=labels[-1])
        means.append(ax.lines[-1])
    ax.set(xlabel="step (1 step = 4 frames)", ylabel="mean score of an evaluation")
    ax.xaxis.set_major_formatter(lambda step, _: short(step))
    ax.legend(means, labels)
    ax.set_title(title, fontsize=10, loc="left")
    save(figure, target, bbox_inches="tight")


def main() -> None:
    with ends_in_one_line():
        target, *folders = words_given() or [""]
        if not folders:
            raise UsageError("give a figure and runs: python img/draw_arms.py img/NAME.png runs/FOLDER ...")
        check_name(target)
        runs = [read_run(folder, RETURN, "leave it out") for folder in sorted(set(folders))]
        games = sorted({run.args.env_id for run in runs})
        if len(games) > 1:
            raise UsageError(f"the runs play {' and '.join(games)}: give runs of one game")
        steps = runs[0].scalars[RETURN][0]
        for run in runs[1:]:
            steps = np.intersect1d(steps, run.scalars[RETURN][0])
        if not len(steps):
            raise UsageError("the runs have no step in common at which each was evaluated: give others")
        curves = defaultdict(list)
        for run in runs:
            evaluated, scores = run.scalars[RETURN]
            curves[run.args.exp_name].append(scores[np.isin(evaluated, steps)])
        arms = {name: np.array(values) for name, values in curves.items()}
        rows = []
        for i, step in enumerate(steps):
            cells = [f"{step:,.0f}"]
            for values in arms.values():
                scores = values[:, i]
                cells.append(f"{scores.mean():.1f} [{scores.min():.1f}, {scores.max():.1f}]")
            rows.append(cells)
        print(markdown_table(["step", *arms], rows))
        draw(target, runs[0].args.env_id, arms, steps)


if __name__ == "__main__":
    main()
