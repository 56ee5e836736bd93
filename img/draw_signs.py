"""Draws what an injection gained beside what was measured of the agent when it was injected.

    python img/draw_signs.py img/signs.png results/dose/*.csv results/dose/probe_*.json

A point is an agent. Its measures are those of the run without an injection, at the step of the other's; its gain is the
difference in mean return that compare.py finds for its seed. The JSON files are of compare.py --probe, at checkpoints of that
step. Prints for every measure its range at each learning rate, and Spearman's correlation with the gain: over all agents; and
within learning rates, where every agent has its rank among those of its own, since what goes with the learning rate goes with
a gain that does, whatever it measures. Then what the largest of so many correlations is by chance.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.arms import group
from analysis.canvas import Figure, MaxNLocator, check_name, drawing, look, save
from analysis.curves import read_curves
from analysis.fitting import CONTENDERS
from analysis.task_sequence import INJECTED, SAME
from analysis.verdict import comparisons
from support.process import ends_in_one_line
from support.usage import UsageError, reading, words_given

RETURN = "charts/episodic_return"
DRAWN = (
    "dormant_fraction/head",
    "active_fraction/conv3",
    "srank/head",
    "effective_rank/head",
)  # and all probes
SHUFFLES = 500


@dataclass
class Agent:
    """`gain` is the return with an injection − without; `measures` those at the injection."""

    learning_rate: float
    step: int
    gain: float
    measures: dict[str, float] = field(default_factory=dict)


Agents = dict[tuple[str, ...], Agent]  # by exp_name and seed of the run without an injection


def agents_in(files: list[str]) -> Agents:
    """The agents in files of curves that went on both with an injection and without."""
    arms, _ = group([run for path in files for run in read_curves(Path(path), RETURN)])
    agents: Agents = {}
    for pair in comparisons(arms, RETURN, None):
        for run in pair.arms[0].runs if pair.intervention == "injection" else ():
            key = run.args.exp_name, str(run.args.seed)
            if run.args.seed in pair.differences:
                if key in agents:
                    raise UsageError(
                        f"two agents have the exp_name {key[0]} and seed {key[1]}: draw them one by one"
                    )
                agents[key] = agent = Agent(
                    run.args.learning_rate, pair.after, pair.differences[run.args.seed]
                )
                for tag, (steps, values) in run.scalars.items():
                    if tag.startswith("plasticity/") and pair.after in steps:
                        agent.measures[tag.removeprefix("plasticity/")] = float(
                            values[steps == pair.after][0]
                        )
    return agents


def add_probe(agents: Agents, path: Path) -> None:
    """Adds to agents what a file of probes says of them: error ÷ a fresh network's, and what an injection makes of it."""
    probed = []
    with reading(path, "what was probed", "give a file that compare.py --probe wrote"):
        for result in json.loads(path.read_text(encoding="utf-8")):
            names = (SAME, INJECTED) if "probe_tasks" in result else CONTENDERS[:2]
            probed.append((Path(result["checkpoint"]), [result["relative_to_fresh"][name] for name in names]))
    for checkpoint, ratios in probed:
        parts = checkpoint.parent.name.split("__")  # game, exp_name, seed, time of a run's folder
        agent = agents.get(("__".join(parts[1:-2]), *parts[-2:-1]))
        if agent is None or checkpoint.name != f"checkpoint-{agent.step}":
            print(f"left out of {path}: {checkpoint}, no gain is known from there on")
        elif None in ratios:
            print(f"left out of {path}: {checkpoint}, it diverged")
        else:
            own, injected = (ratio["ratio"] for ratio in ratios)
            agent.measures |= {f"{path.stem}, agent": own, f"{path.stem}, injected ÷ agent": injected / own}


def points(by_rate: Sequence[Sequence[Agent]], name: str) -> list[np.ndarray]:
    """For each learning rate the values of a measure and the gains, (2, n), of the n agents that have it."""
    having = [
        [(agent.measures[name], agent.gain) for agent in agents if name in agent.measures]
        for agents in by_rate
    ]
    return [np.array(pairs).reshape(-1, 2).T for pairs in having]


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}" if len(values) else "–"


def correlation(groups: list[np.ndarray]) -> float:
    """Spearman's of values and gains, (2, n) each, ranked within groups; NaN for fewer than three points, or all equal."""
    ranks = np.hstack([scipy.stats.rankdata(points, axis=1) - (points.shape[1] + 1) / 2 for points in groups])
    return float(np.corrcoef(ranks)[0, 1]) if ranks.shape[1] > 2 and np.ptp(ranks, axis=1).all() else math.nan


def largest_by_chance(by_rate: Sequence[Sequence[Agent]], names: list[str]) -> np.ndarray:
    """(SHUFFLES,) sizes of the largest correlation within learning rates, of all measures, with the gains shuffled in each."""
    random, largest = np.random.default_rng(0), np.empty(SHUFFLES)
    for i in range(SHUFFLES):
        mixed = [
            [
                replace(agent, gain=gain)
                for agent, gain in zip(agents, random.permutation([a.gain for a in agents]), strict=True)
            ]
            for agents in by_rate
        ]
        largest[i] = np.nanmax([abs(correlation(points(mixed, name))) for name in names])
    return largest


@drawing()
def draw(target: str, by_rate: dict[float, list[Agent]], drawn: list[str]) -> None:
    """The figure: a panel for each measure, and a colour and marker for each learning rate."""
    rows = max(1, math.ceil(len(drawn) / 4))
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, sharey=True, squeeze=False)
    for ax, name in zip(axes.flat, drawn, strict=False):
        groups = points(list(by_rate.values()), name)
        for number, (rate, of_one) in enumerate(zip(by_rate, groups, strict=True)):
            ax.scatter(*of_one, **look(number).point, s=22, label=f"learning rate {rate:g}")
        ax.axhline(0, color="#999999", lw=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_title(name, fontsize=9, loc="left")
    for ax in axes.flat[len(drawn) :]:
        ax.set_visible(False)
    figure.supylabel("gain in return by the injection")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), ncols=len(by_rate), loc="outside lower left")
    save(figure, target)


def print_table(by_rate: dict[float, list[Agent]], names: list[str]) -> None:
    header = [
        "at the injection",
        "agents",
        *(f"{rate:g}" for rate in by_rate),
        "correlation, all",
        "within learning rates",
    ]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    gains = [[agent.gain for agent in agents] for agents in by_rate.values()]
    print(f"| gain | {sum(map(len, gains))} | {' | '.join(map(spread, gains))} | – | – |")
    for name in names:
        groups = points(list(by_rate.values()), name)
        together = np.hstack(groups)
        found = (
            "–" if math.isnan(rho) else f"{rho:.2f}" for rho in (correlation([together]), correlation(groups))
        )
        cells = [*(spread(of_one[0]) for of_one in groups), *found]
        print(f"| {name} | {together.shape[1]} | {' | '.join(cells)} |")


def main() -> None:
    with ends_in_one_line():
        target, *files = words_given() or [""]
        curves = [path for path in files if path.endswith(".csv")]
        agents = agents_in(curves) if curves else {}
        if not agents:
            raise UsageError("no agent has runs with and without an injection: give the files of both arms")
        check_name(target)
        own = {name for agent in agents.values() for name in agent.measures}
        for path in (Path(path) for path in files if path.endswith(".json")):
            add_probe(agents, path)
        names = list(dict.fromkeys(name for agent in agents.values() for name in agent.measures))
        rates = sorted({agent.learning_rate for agent in agents.values()})
        by_rate = {}
        for rate in rates:
            by_rate[rate] = [agent for agent in agents.values() if agent.learning_rate == rate]
        print_table(by_rate, names)
        draw(target, by_rate, [name for name in names if name.startswith(DRAWN) or name not in own])
        half, rare = np.quantile(largest_by_chance(list(by_rate.values()), names), (0.5, 0.95))
        largest = f"by chance the largest of {len(names)} within learning rates is beyond ±{half:.2f} in half of all cases"
        how = f"({SHUFFLES} times with gains shuffled among the agents of a learning rate)"
        print(f"\n{largest}, beyond ±{rare:.2f} in 1 of 20 {how}")


if __name__ == "__main__":
    main()
