"""Draws what an injection gained beside what was measured of the agent when it was injected.

    python img/draw_signs.py img/signs.png results/dose/*.csv results/dose/probe_*.json

A point is an agent. Its measures are those of the run without an injection, at the step of the other's; its gain is the
difference in mean return that compare.py finds for its seed. The JSON files are of compare.py --probe, at checkpoints of that
step. Prints for every measure Spearman's correlation with the gain, over all agents and over those of one learning rate.
"""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.curves import read_curves
from analysis.figures import COLOURS, STYLE
from analysis.fitting import CONTENDERS
from analysis.runs import group
from analysis.task_sequence import INJECTED, SAME
from analysis.verdict import comparisons

RETURN = "charts/episodic_return"
DRAWN = (
    "dormant_fraction/head",
    "active_fraction/conv3",
    "srank",
    "weight_norm_ratio",
    "gradient_norm",
    "probe",
)
Agent = tuple[float, int]  # learning rate and seed


def gains_and_measures(files: list[str]) -> tuple[dict[Agent, float], dict[str, dict[Agent, float]]]:
    """{agent: gain} and {measure: {agent: value}}, of files of curves."""
    arms, _ = group([run for path in files for run in read_curves(Path(path), RETURN)])
    gains, measures = dict[Agent, float](), defaultdict[str, dict[Agent, float]](dict)
    for pair in comparisons(arms, RETURN, None):
        for run in pair.arms[0].runs if pair.intervention == "injection" else ():
            agent = run.args.learning_rate, run.args.seed
            if not all(agent[1] in means for means in pair.means):
                continue
            gains[agent] = pair.means[1][agent[1]] - pair.means[0][agent[1]]
            for tag, (steps, values) in run.scalars.items():
                if tag.startswith("plasticity/") and pair.after in steps:
                    measures[tag.removeprefix("plasticity/")][agent] = float(values[steps == pair.after][0])
    return gains, measures


def probed(path: Path) -> dict[str, dict[Agent, float]]:
    """{measure: {agent: value}} of a file of probes. The checkpoints' folders name the learning rate."""
    found = defaultdict[str, dict[Agent, float]](dict)
    for result in json.loads(path.read_text()):
        ((rate, seed),) = re.findall(r"learning-rate-([^_]+)__(\d+)__", result["checkpoint"])
        if "relative" in result:
            agent, injected = (result["relative"][name]["since"]["ratio"] for name in (SAME, INJECTED))
        else:
            agent, injected = (result["relative_to_fresh"][name]["ratio"] for name in CONTENDERS[:2])
        found[f"{path.stem}, agent"][float(rate), int(seed)] = agent
        found[f"{path.stem}, injected ÷ agent"][float(rate), int(seed)] = injected / agent
    return found


def correlation(values: np.ndarray, gains: np.ndarray) -> float:
    """NaN where there are fewer than three, or all are equal."""
    return float(scipy.stats.spearmanr(values, gains).statistic) if len(values) > 2 and np.ptp(values) else math.nan


def main() -> None:
    target, *files = sys.argv[1:]
    gains, measures = gains_and_measures([path for path in files if path.endswith(".csv")])
    for path in (Path(path) for path in files if path.endswith(".json")):
        measures |= probed(path)
    rates = sorted({rate for rate, _ in gains})
    print("| at the injection | all |", " | ".join(f"{rate:g}" for rate in rates), "|\n|---|" + "---|" * (len(rates) + 1))
    with plt.rc_context(STYLE):
        drawn = [name for name in measures if name.startswith(DRAWN)]
        rows = math.ceil(len(drawn) / 4)
        figure, axes = plt.subplots(rows, 4, figsize=(11, 2.6 * rows), sharey=True, squeeze=False, layout="constrained")
        for name, of_agents in measures.items():
            each = [np.array([(of_agents[a], gains[a]) for a in of_agents if a[0] == rate]).reshape(-1, 2).T for rate in rates]
            found = [correlation(*points) for points in (np.hstack(each), *each)]
            print(f"| {name} |", " | ".join("–" if math.isnan(rho) else f"{rho:.2f}" for rho in found), "|")
            if name in drawn:
                ax = axes.flat[drawn.index(name)]
                for rate, points, colour in zip(rates, each, COLOURS, strict=False):
                    ax.scatter(*points, color=colour, s=22, label=f"learning rate {rate:g}")
                ax.axhline(0, color="#999999", lw=0.8)
                ax.xaxis.set_major_locator(MaxNLocator(4))
                ax.set_title(name, fontsize=9, loc="left")
        for ax in axes.flat[len(drawn) :]:
            ax.set_visible(False)
        figure.supylabel("gain in return by the injection")
        figure.legend(*axes.flat[0].get_legend_handles_labels(), ncols=len(rates), loc="outside lower left")
        figure.savefig(target, dpi=160)


if __name__ == "__main__":
    main()
