"""Draws what an injection gained beside what was measured of the agent when it was injected.

    python img/draw_signs.py img/signs.png results/dose/*.csv results/dose/probe_*.json

A point is an agent. Its measures are those of the run without an injection, at the step of the other's; its gain is the
difference in mean return that compare.py finds for its seed. The JSON files are of compare.py --probe, at checkpoints of that
step. Prints for every measure Spearman's correlation with the gain: over all agents; within learning rates, where every agent
has its rank among those of its own, since what goes with the learning rate goes with a gain that does, whatever it
measures; and at each one.
"""

import json
import math
import sys
from dataclasses import dataclass, field
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
DRAWN = ("dormant_fraction/head", "active_fraction/conv3", "srank", "weight_norm_ratio", "gradient_norm")  # and all probes


@dataclass
class Agent:
    """`gain` is the return with an injection − without; `measures` those at the injection."""

    learning_rate: float
    gain: float
    measures: dict[str, float] = field(default_factory=dict)


def agents_in(files: list[str]) -> dict[tuple[str, str], Agent]:
    """{(exp_name, seed) of its run without an injection: agent}, of files of curves."""
    arms, _ = group([run for path in files for run in read_curves(Path(path), RETURN)])
    agents = {}
    for pair in comparisons(arms, RETURN, None):
        without, injected = pair.means
        for run in pair.arms[0].runs if pair.intervention == "injection" else ():
            if run.args.seed in without.keys() & injected.keys():
                agent = Agent(run.args.learning_rate, injected[run.args.seed] - without[run.args.seed])
                for tag, (steps, values) in run.scalars.items():
                    if tag.startswith("plasticity/") and pair.after in steps:
                        agent.measures[tag.removeprefix("plasticity/")] = float(values[steps == pair.after][0])
                agents[run.args.exp_name, str(run.args.seed)] = agent
    return agents


def add_probe(agents: dict[tuple[str, str], Agent], path: Path) -> None:
    """Adds to agents what a file of probes says of them: error ÷ a fresh network's, and what an injection makes of it."""
    for result in json.loads(path.read_text()):
        _, exp_name, seed, _ = Path(result["checkpoint"]).parent.name.split("__")
        names = (SAME, INJECTED) if "probe_tasks" in result else CONTENDERS[:2]
        agent, ratios = agents.get((exp_name, seed)), [result["relative_to_fresh"][name] for name in names]
        if agent is None or None in ratios:
            print(f"left out of {path}: {result['checkpoint']}, {'no gain is known' if agent is None else 'it diverged'}")
            continue
        own, injected = (ratio["ratio"] for ratio in ratios)
        agent.measures |= {f"{path.stem}, agent": own, f"{path.stem}, injected ÷ agent": injected / own}


def correlation(groups: list[np.ndarray]) -> float:
    """Spearman's of values and gains, (2, n) each, ranked within groups; NaN for fewer than three points, or all equal."""
    ranks = np.hstack([scipy.stats.rankdata(points, axis=1) - (points.shape[1] + 1) / 2 for points in groups])
    return float(np.corrcoef(ranks)[0, 1]) if ranks.shape[1] > 2 and np.ptp(ranks, axis=1).all() else math.nan


def main() -> None:
    target, *files = sys.argv[1:]
    agents = agents_in([path for path in files if path.endswith(".csv")])
    if not agents:
        sys.exit("error: no agent has runs with and without an injection: give the files of both arms")
    own = {name for agent in agents.values() for name in agent.measures}
    for path in (Path(path) for path in files if path.endswith(".json")):
        add_probe(agents, path)
    names = list(dict.fromkeys(name for agent in agents.values() for name in agent.measures))
    rates = sorted({agent.learning_rate for agent in agents.values()})
    header = ["at the injection", "agents", "all", "within learning rates", *(f"{rate:g}" for rate in rates)]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    with plt.rc_context(STYLE):
        drawn = [name for name in names if name.startswith(DRAWN) or name not in own]
        rows = max(1, math.ceil(len(drawn) / 4))
        figure, axes = plt.subplots(rows, 4, figsize=(11, 2.6 * rows), sharey=True, squeeze=False, layout="constrained")
        for name in names:
            having = [agent for agent in agents.values() if name in agent.measures]
            of_rates = [[(a.measures[name], a.gain) for a in having if a.learning_rate == rate] for rate in rates]
            groups = [np.array(of_rate).reshape(-1, 2).T for of_rate in of_rates]
            found = [correlation([np.hstack(groups)]), correlation(groups), *(correlation([points]) for points in groups)]
            print(f"| {name} | {len(having)} |", " | ".join("–" if math.isnan(rho) else f"{rho:.2f}" for rho in found), "|")
            if name in drawn:
                ax = axes.flat[drawn.index(name)]
                for rate, points, colour in zip(rates, groups, COLOURS, strict=False):
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
