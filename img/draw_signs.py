"""Draws what an injection gained beside what was measured of the agent when it was injected.

    python img/draw_signs.py img/signs.png results/dose/*.csv results/dose/probe_*.json

A point is an agent. Its measures are those of the run without an injection, at the step of the other's. Its
gain is the difference in mean return that compare.py finds for its seed. The JSON files are of
compare.py --probe, at checkpoints of that step.

Prints for every measure its range at each learning rate, and Spearman's correlation with the gain: over all
agents; and within learning rates, where an agent has its rank among those of its own. What goes with the
learning rate goes with a gain that does, whatever it measures. Then what the largest of so many correlations
is by chance.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.arms import TRAINING_RETURN, print_remarks, read_arms
from analysis.canvas import Figure, MaxNLocator, check_name, drawing, look, save
from analysis.curves import RecordedRun
from analysis.fitting import CONTENDERS
from analysis.markdown import markdown_table
from analysis.task_sequence import INJECTED, SAME
from analysis.verdict import comparisons, in_no_comparison, share_history
from support.process import ends_in_one_line
from support.usage import UsageError, reading, words_given

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
    measures: dict[str, float]
    folders: set[str] = field(default_factory=set)
    """names of the folders of runs that it was at that step; none where a file does not tell its own"""


Agents = dict[str, Agent]  # by the name of the run without an injection
ByRate = dict[float, list[Agent]]  # by learning rate


@dataclass
class Answer:
    """What a probe says of an agent: its errors, NaN where a network diverged, or no copy was made."""

    error: float  # the agent's ÷ a fresh network's
    left: float  # the share of its own error that an injection leaves
    result: dict[str, Any]  # all that compare.py --probe wrote of it


def measures_at(run: RecordedRun, step: int) -> dict[str, float]:
    """{measure: value} of what was measured of a run's plasticity at a step."""
    measures = {}
    for tag, (steps, values) in run.scalars.items():
        if tag.startswith("plasticity/") and step in steps:
            measures[tag.removeprefix("plasticity/")] = float(values[steps == step][0])
    return measures


def folders_at(run: RecordedRun, step: int) -> set[str]:
    """Names of the folders of runs that a run was at a step; none where its own is not known."""
    if run.lineage[0].folder is None:
        return set()
    return {past.folder for past in run.lineage if past.folder is not None and past.step >= step}


def agents_in(files: list[str]) -> Agents:
    """The agents in files of curves that went on both with an injection and without.

    Pairs of runs that were not one up to the injection are no agents, nor are continuations of one agent.

    Raises:
        UsageError: there is none, or two have one name.
    """
    arms, remarks = read_arms(files, TRAINING_RETURN)
    print_remarks(remarks)
    agents: Agents = {}
    pairs = comparisons(arms, TRAINING_RETURN, None)
    left_out = in_no_comparison(arms, pairs)
    for pair in pairs:
        if pair.intervention != "injection":
            continue
        if pair.one_agent:
            left_out.append(f"{pair.arms[1].name}, all its runs continue one agent")
            continue
        left_out += pair.left_out.values()
        injected = {run.args.seed: run for run in pair.arms[1].runs}
        for run in pair.arms[0].runs:
            seed = run.args.seed
            if seed not in pair.differences:
                continue
            step = pair.firsts[seed]
            name = run.args.run_name
            if not share_history(run, injected[seed], step):
                left_out.append(f"{name}, its run with an injection is of another agent")
                continue
            if name in agents:
                raise UsageError(f"two agents are called {name}: give the files of one of them")
            gain = pair.differences[seed]
            measures = measures_at(run, step)
            agents[name] = Agent(run.args.learning_rate, step, gain, measures, folders_at(run, step))
    for reason in left_out:
        print(f"left out: {reason}")
    if not agents:
        fix = "give the files of both arms, with runs that have gone beyond it"
        raise UsageError(f"no agent has runs with and without an injection: {fix}")
    return agents


def game_of(name: str) -> str:
    """The game of an agent of that name."""
    game, _, _ = name.partition("__")
    return game


def agent_at(checkpoint: Path, agents: Agents) -> str | None:
    """The agent of a checkpoint that was written just before its injection, if it is one of these."""
    folder = checkpoint.parent.name
    without_time, _, _ = folder.rpartition("__")
    for name, agent in agents.items():
        if checkpoint.name != f"checkpoint-{agent.step}":
            continue
        if folder in agent.folders or (not agent.folders and without_time == name):
            return name
    return None


def probed(agents: Agents, path: Path) -> dict[str, Answer]:
    """What a file of probes says of these agents, of those that were probed at their injection.

    Raises:
        UsageError: it is no such file, or has an agent twice.
    """
    results = []
    with reading(path, "what was probed", "give a file that compare.py --probe wrote"):
        for result in json.loads(path.read_text(encoding="utf-8")):
            names = (SAME, INJECTED) if "probe_tasks" in result else CONTENDERS[:2]
            ratios = [result["relative_to_fresh"][name] for name in names]
            results.append((Path(result["checkpoint"]), ratios, result))
    found: dict[str, Answer] = {}
    for checkpoint, ratios, result in results:
        name = agent_at(checkpoint, agents)
        if name is None:
            print(f"left out of {path}: {checkpoint}, no gain is known from there on")
            continue
        if name in found:
            raise UsageError(f"{name} is probed twice in {path}: give a file with one of them")
        if None in ratios:
            print(f"left out of {path}: {checkpoint}, it diverged, or no copy was made")
            found[name] = Answer(math.nan, math.nan, result)
            continue
        error, injected = (ratio["ratio"] for ratio in ratios)
        found[name] = Answer(error, injected / error, result)
    return {name: found[name] for name in agents if name in found}


def points(by_rate: ByRate, name: str) -> list[np.ndarray]:
    """For each learning rate the values of a measure and the gains, (2, n), of the n agents that have it."""
    groups = []
    for agents in by_rate.values():
        pairs = [(agent.measures[name], agent.gain) for agent in agents if name in agent.measures]
        groups.append(np.array(pairs).reshape(-1, 2).T)
    return groups


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}" if len(values) else "–"


def correlation(groups: list[np.ndarray]) -> float:
    """Spearman's of values and gains, (2, n) each, ranked within groups.

    NaN for fewer than three points, and where all are equal.
    """
    centred = []
    for group_points in groups:
        ranks = scipy.stats.rankdata(group_points, axis=1)
        centred.append(ranks - (group_points.shape[1] + 1) / 2)
    together = np.hstack(centred)
    if together.shape[1] < 3 or not np.ptp(together, axis=1).all():
        return math.nan
    return float(np.corrcoef(together)[0, 1])


def largest_by_chance(by_rate: ByRate, names: list[str]) -> np.ndarray:
    """(SHUFFLES,) sizes of the largest correlation within learning rates, of all measures.

    The gains are shuffled among the agents of a learning rate.
    """
    random = np.random.default_rng(0)
    largest = np.empty(SHUFFLES)
    for i in range(SHUFFLES):
        mixed: ByRate = {}
        for rate, agents in by_rate.items():
            gains = random.permutation([agent.gain for agent in agents])
            mixed[rate] = [replace(agent, gain=gain) for agent, gain in zip(agents, gains, strict=True)]
        correlations = [correlation(points(mixed, name)) for name in names]
        largest[i] = np.nanmax(np.abs(correlations))
    return largest


@drawing()
def draw(target: str, by_rate: ByRate, drawn: list[str]) -> None:
    """The figure: a panel for each measure, and a colour and marker for each learning rate."""
    rows = max(1, math.ceil(len(drawn) / 4))
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, sharey=True, squeeze=False)
    for ax, name in zip(axes.flat, drawn, strict=False):
        for number, (rate, group_points) in enumerate(zip(by_rate, points(by_rate, name), strict=True)):
            ax.scatter(*group_points, **look(number).point, s=22, label=f"learning rate {rate:g}")
        ax.axhline(0, color="#999999", lw=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_title(name, fontsize=9, loc="left")
    for ax in axes.flat[len(drawn) :]:
        ax.set_visible(False)
    figure.supylabel("gain in return by the injection")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), ncols=len(by_rate), loc="outside lower left")
    save(figure, target)


def print_table(by_rate: ByRate, names: list[str]) -> None:
    rates = [f"{rate:g}" for rate in by_rate]
    header = ["at the injection", "agents", *rates, "correlation, all", "within learning rates"]
    gains: list[list[float]] = []
    for agents in by_rate.values():
        gains.append([agent.gain for agent in agents])
    count = sum(map(len, gains))
    rows = [["gain", str(count), *map(spread, gains), "–", "–"]]
    for name in names:
        groups = points(by_rate, name)
        together = np.hstack(groups)
        row = [name, str(together.shape[1]), *(spread(values) for values, _ in groups)]
        for rho in (correlation([together]), correlation(groups)):
            row.append("–" if math.isnan(rho) else f"{rho:.2f}")
        rows.append(row)
    print(markdown_table(header, rows))


def add_probes(agents: Agents, paths: list[Path]) -> None:
    """Adds to the agents' measures what files of probes say of them."""
    for path in paths:
        for name, answer in probed(agents, path).items():
            if math.isfinite(answer.left):
                agents[name].measures[f"{path.stem}, agent"] = answer.error
                agents[name].measures[f"{path.stem}, injected ÷ agent"] = answer.left


def by_learning_rate(agents: Agents) -> ByRate:
    groups: ByRate = {}
    for agent in sorted(agents.values(), key=lambda agent: agent.learning_rate):
        groups.setdefault(agent.learning_rate, []).append(agent)
    return groups


def all_measures(agents: Agents) -> list[str]:
    """Their names, in order of appearance."""
    names: dict[str, None] = {}
    for agent in agents.values():
        names.update(dict.fromkeys(agent.measures))
    return list(names)


def main() -> None:
    with ends_in_one_line():
        target, *files = words_given() or [""]
        agents = agents_in([path for path in files if not path.endswith(".json")])
        check_name(target)
        games = sorted({game_of(name) for name in agents})
        if len(games) > 1:
            raise UsageError(f"the agents play {' and '.join(games)}: give the files of one game")
        measured = all_measures(agents)
        add_probes(agents, [Path(path) for path in files if path.endswith(".json")])
        names = all_measures(agents)
        if not names:
            fix = "give runs with a --plasticity-frequency, or a file that compare.py --probe wrote"
            raise UsageError(f"nothing is known of these agents at the injection: {fix}")
        by_rate = by_learning_rate(agents)
        print_table(by_rate, names)
        draw(target, by_rate, [name for name in names if name.startswith(DRAWN) or name not in measured])
        if all(math.isnan(correlation(points(by_rate, name))) for name in names):
            return  # too few agents to correlate
        half, rare = np.quantile(largest_by_chance(by_rate, names), (0.5, 0.95))
        largest = f"by chance the largest of {len(names)} within learning rates is beyond ±{half:.2f}"
        how = f"({SHUFFLES} times with gains shuffled among the agents of a learning rate)"
        print(f"\n{largest} in half of all cases, beyond ±{rare:.2f} in 1 of 20 {how}")


if __name__ == "__main__":
    main()
