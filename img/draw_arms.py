"""Draws evaluation curves of several arms: python img/draw_arms.py img/NAME.png runs/FOLDER runs/FOLDER ...

Runs with one --exp-name are an arm: a thin line per run, a thick one for their mean. Prints the means and ranges as a table.
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLOURS = ("#1f5a92", "#d1495b", "#e08a1e", "#4c956c")


def main() -> None:
    target, *folders = sys.argv[1:]
    arms = defaultdict(list)
    for folder in sorted(folders):
        points = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload().Scalars("eval/episodic_return")
        arms[Path(folder).name.split("__")[1]].append({point.step: point.value for point in points})
    shared = sorted(set.intersection(*(set(curve) for curves in arms.values() for curve in curves)))

    figure, ax = plt.subplots(figsize=(8, 4.2))
    print("| step | " + " | ".join(arms) + " |\n|" + "---|" * (len(arms) + 1))
    table = {}
    for (name, curves), colour in zip(arms.items(), COLOURS, strict=False):
        values = table[name] = np.array([[curve[step] for step in shared] for curve in curves])
        ax.plot(shared, values.T, color=colour, lw=0.8, alpha=0.5)
        ax.plot(shared, values.mean(axis=0), color=colour, lw=2.2, marker="D", ms=4, label=f"{name}, mean of {len(curves)}")
    for i, step in enumerate(shared):
        cells = (f"{v[:, i].mean():.1f} [{v[:, i].min():.1f}, {v[:, i].max():.1f}]" for v in table.values())
        print(f"| {step:,} | " + " | ".join(cells) + " |")
    ax.set(xlabel="step (1 step = 4 frames)", ylabel="mean score of an evaluation")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8.5)
    ax.set_title(Path(folders[0]).name.split("__")[0], fontsize=10, loc="left")
    figure.savefig(target, dpi=160, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
