"""Counts how often a probe foretold whether an injection raises an agent's return.

    python img/count_signs.py 0.36 results/FOLDER/*.csv results/FOLDER/probe.json

The probe says that an agent gains where the injected copy's error is below 0.36 of the agent's own. It is
right where the difference in mean return that compare.py finds for that agent has this sign. The JSON file is
of compare.py --probe, at checkpoints of the injection's step.

What chance would give stands beside it: were each sign a coin, and were what the probe says shuffled among
the agents. So does what "all gain" and "none gains" would get right.
"""

import math
import sys
from pathlib import Path

import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.verdict import show
from img.draw_signs import Agents, add_probe, agents_in
from support.process import ends_in_one_line
from support.usage import UsageError, words_given


def signs_table(left: dict[str, float], gains: dict[str, float], below: float) -> str:
    """Markdown: of each agent what an injection left of its error, what that says, and what came."""
    lines = ["| agent | error, injected ÷ agent | the probe says | gain in return | right |"]
    lines.append("|---|---|---|---|---|")
    for name, ratio in left.items():
        said = "gains" if ratio < below else "does not gain"
        right = "yes" if (ratio < below) == (gains[name] > 0) else "no"
        lines.append(f"| {name} | {ratio:.3g} | {said} | {show(gains[name])} | {right} |")
    return "\n".join(lines)


def signs_in_words(said: list[bool], gained: list[bool]) -> str:
    """How many are as the probe says, and what chance would give.

    Args:
        said, gained: of each agent whether it gains, as the probe says and as it came
    """
    agents = len(said)
    num_said = sum(said)
    num_gained = sum(gained)
    right = sum(word == came for word, came in zip(said, gained, strict=True))
    coin = scipy.stats.binom.sf(right - 1, agents, 0.5)
    # with these numbers of words and gains, what is right is decided by how many of both are of one agent
    both = sum(word and came for word, came in zip(said, gained, strict=True))
    shuffled = scipy.stats.hypergeom.sf(both - 1, agents, num_gained, num_said)
    lines = [
        f"{right} of {agents} are as the probe says: {num_said} gain by the probe, {num_gained} gained",
        f"by chance as many or more: {coin:.3g}, were each sign a coin",
        f"by chance as many or more: {shuffled:.3g}, were what the probe says shuffled among the agents",
        f'"all gain" would be right of {num_gained}, "none gains" of {agents - num_gained}',
    ]
    return "\n".join(lines)


def read_agents(files: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Of each agent what an injection left of its error, and what it gained; by the agent's name.

    Raises:
        UsageError: no agent has both, or one lacks a probe, or there are several files of probes.
    """
    probes = [Path(path) for path in files if path.endswith(".json")]
    if len(probes) != 1:
        raise UsageError(f"{len(probes)} files of probes: give one that compare.py --probe wrote")
    agents: Agents = agents_in([path for path in files if path.endswith(".csv")])
    if not agents:
        raise UsageError("no agent has runs with and without an injection: give the files of both arms")
    add_probe(agents, probes[0])
    left = {}
    gains = {}
    for name, agent in agents.items():
        measure = f"{probes[0].stem}, injected ÷ agent"
        if measure not in agent.measures:
            raise UsageError(f"{probes[0]} says nothing of {name}: probe all agents, at the injection")
        left[name] = agent.measures[measure]
        gains[name] = agent.gain
    return left, gains


def number(word: str) -> float:
    try:
        below = float(word)
    except ValueError:
        below = math.nan
    if not 0 < below < math.inf:
        raise UsageError(f"{word} is no share of the error below which an agent gains: give one like 0.36")
    return below


def main() -> None:
    with ends_in_one_line():
        word, *files = words_given() or [""]
        if not any(path.endswith(".csv") for path in files):
            example = "python img/count_signs.py 0.36 results/FOLDER/*.csv results/FOLDER/probe.json"
            raise UsageError(f"give a share of the error, the files of both arms, and a probe's: {example}")
        below = number(word)
        left, gains = read_agents(files)
        print(signs_table(left, gains, below))
        said = [ratio < below for ratio in left.values()]
        print(signs_in_words(said, [gain > 0 for gain in gains.values()]))


if __name__ == "__main__":
    main()
