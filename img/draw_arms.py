"""Draws evaluation curves of several arms: python img/draw_arms.py img/NAME.png runs/FOLDER runs/FOLDER ...

Runs with one --exp-name are an arm: a thin line per run, a thick one for their mean. Prints the means and ranges as a table.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.canvas import Figure, check_name, drawing, look, plot_broken, save
from analysis.curves import read_run
from support.process import ends_in_one_line
from support.usage import UsageError, words_given

RETURN = "eval/episodic_return"


@drawing()
def draw(target: str, title: str, arms: dict[str, np.ndarray], steps: np.ndarray) -> None:
    """The figure of {name: (runs, K) returns} at K steps."""
    figure = Figure(figsize=(8, 4.2))
    ax = figure.subplots()
    for number, (name, values) in enumerate(arms.items()):
        style = look(number)
        ax.plot(steps, values.T, color=style.colour, lw=0.8, alpha=0.5)
        label = f"{name}, mean of {len(values)}"
        plot_broken(ax, steps, values.mean(axis=0), **style.line, lw=2.2, label=label)
    ax.set(xlabel="step (1 step = 4 frames)", ylabel="mean score of an evaluation")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    means = [line for line in ax.lines if line.get_linewidth() == 2.2]
    ax.legend(means, [str(line.get_label()) for line in means])
    ax.set_title(title, fontsize=10, loc="left")
    save(figure, target, bbox_inches="tight")


def main() -> None:
    with ends_in_one_line():
        target, *folders = words_given() or [""]
        if not folders:
            raise UsageError("give a figure and runs: python img/draw_arms.py img/NAME.png runs/FOLDER ...")
        check_name(target)
        runs = [read_run(folder, RETURN, "leave it out") for folder in sorted(folders)]
        curves = defaultdict(list)  # of each arm {step: mean score}
        for run in runs:
            points = zip(*run.scalars[RETURN], strict=True)
            curves[run.args.exp_name].append({int(step): float(value) for step, value in points})
        every = [set(curve) for of_arm in curves.values() for curve in of_arm]
        steps = sorted(set.intersection(*every))
        if not steps:
            raise UsageError("the runs have no step in common at which each was evaluated: give others")
        arms = {}
        for name, of_arm in curves.items():
            arms[name] = np.array([[curve[step] for step in steps] for curve in of_arm])
        print(f"| step | {' | '.join(arms)} |")
        print(f"| --- | {' | '.join('---' for _ in arms)} |")
        for i, step in enumerate(steps):
            at_step = [values[:, i] for values in arms.values()]
            cells = [f"{values.mean():.1f} [{values.min():.1f}, {values.max():.1f}]" for values in at_step]
            print(f"| {step:,} | {' | '.join(cells)} |")
        draw(target, runs[0].args.env_id, arms, np.array(steps))


if __name__ == "__main__":
    main()
