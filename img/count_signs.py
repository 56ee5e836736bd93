"""Counts how often a probe foretold whether an injection raises an agent's return.

    python img/count_signs.py 0.36 results/FOLDER/*.csv results/FOLDER/probe.json

The probe says that an agent gains where the injected copy's error is below 0.36 of the agent's own. It is
right where the difference in mean return that compare.py finds for that agent has this sign. An agent whose
difference is 0 has none, and is not counted. The JSON file, or each of several, is of compare.py --probe, at
checkpoints of the injection's step. Where a network diverged in it, where it says itself that there is no
answer, or where an agent is in none of them, the probe has no answer, and is not right.

Beside it stands what chance would give: were each sign a coin, and were the answers shuffled among the
agents, or among those of each game. The last says whether the probe tells agents apart, not only games. Last
comes what "all gain" and "none gains" would get right.
"""

import math
import sys
from pathlib import Path

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.markdown import markdown_table
from analysis.verdict import show
from img.draw_signs import Answer, agents_in, game_of, probed
from support.process import ends_in_one_line
from support.usage import UsageError, words_given

SETTINGS = ("learning_rate", "probe_observations", "probe_updates")  # of a probe


def chance_by_shuffling(said: list[bool], gained: list[bool], groups: list[str]) -> float:
    """Probability of as many right answers, or more, were they shuffled among the agents of each group.

    How many are said to gain, and how many do, stays what it is. So the more agents are both, the more
    answers are right.
    """
    both = sum(answer and came for answer, came in zip(said, gained, strict=True))
    chances = np.ones(1)  # of 0, 1, ... agents that are both
    for group in dict.fromkeys(groups):
        members = [i for i, other in enumerate(groups) if other == group]
        num_said = sum(said[i] for i in members)
        num_gained = sum(gained[i] for i in members)
        counts = np.arange(len(members) + 1)
        of_group = scipy.stats.hypergeom.pmf(counts, len(members), num_gained, num_said)
        chances = np.convolve(chances, of_group)
    return float(chances[both:].sum())


def signs_table(ratios: dict[str, float], gains: dict[str, float], below: float) -> str:
    """Markdown: of each agent what an injection leaves of its error, what that says, and what came."""
    header = ["agent", "error, injected ÷ agent", "the probe says", "gain in return", "right"]
    rows = []
    for name, gain in gains.items():
        ratio = ratios.get(name)
        if ratio is None:
            rows.append([name, "–", "no answer", show(gain), "no"])
            continue
        answer = "gains" if ratio < below else "does not gain"
        right = "yes" if (ratio < below) == (gain > 0) else "no"
        rows.append([name, f"{ratio:.3g}", answer, show(gain), right])
    return markdown_table(header, rows)


def signs_in_words(ratios: dict[str, float], gains: dict[str, float], below: float) -> str:
    """How many are as the probe says, and what chance would give where it has an answer."""
    said = [ratio < below for ratio in ratios.values()]
    gained = [gains[name] > 0 for name in ratios]
    games = [game_of(name) for name in ratios]
    right = sum(answer == came for answer, came in zip(said, gained, strict=True))
    coin = scipy.stats.binom.sf(right - 1, len(said), 0.5)
    shuffled = chance_by_shuffling(said, gained, ["all"] * len(said))
    within_games = chance_by_shuffling(said, gained, games)
    all_gained = sum(gain > 0 for gain in gains.values())
    lines = []
    if len(ratios) < len(gains):
        others = "which count as not right; the chances below are of the others"
        lines.append(f"the probe has no answer for {len(gains) - len(ratios)}, {others}")
    lines += [
        f"the probe is right for {right} of {len(gains)}: {sum(said)} gain by its answers, {all_gained} did",
        f"as many or more are right by chance: {coin:.3g} if each sign is a coin's",
        f"as many or more are right by chance: {shuffled:.3g} if answers are shuffled among the agents",
        f"as many or more are right by chance: {within_games:.3g} if among those of each game",
        f'"all gain" would be right for {all_gained}, "none gains" for {len(gains) - all_gained}',
    ]
    return "\n".join(lines)


def read_agents(files: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """What an injection leaves of agents' errors, where the probe has an answer, and what all agents gain.

    Raises:
        UsageError: no agent has both, an agent is probed twice, or agents are probed with other settings.
    """
    probes = [Path(path) for path in files if path.endswith(".json")]
    if not probes:
        raise UsageError("no file is of probes: give one that compare.py --probe wrote")
    agents = agents_in([path for path in files if not path.endswith(".json")])
    answers: dict[str, Answer] = {}
    for path in probes:
        for name, answer in probed(agents, path).items():
            if name in answers:
                raise UsageError(f"{name} is probed in {path}, and in another file: give one of them")
            answers[name] = answer
    check_settings(answers)
    gains: dict[str, float] = {}
    for name, agent in agents.items():
        if agent.gain == 0:
            print(f"left out: {name}, an injection changes its return by 0")
            answers.pop(name, None)
        else:
            gains[name] = agent.gain
    ratios: dict[str, float] = {}
    for name, answer in answers.items():
        sentence = answer.result["sentence"]
        if sentence.startswith("no answer"):
            print(f"left out: the probe of {name}, {sentence}")
        elif math.isfinite(answer.left):
            ratios[name] = answer.left
    if not ratios:
        raise UsageError(f"{probes[0]} says nothing of these agents: probe them at the injection")
    return ratios, gains


def check_settings(answers: dict[str, Answer]) -> None:
    """
    Raises:
        UsageError: not all agents were probed in the same way, so one share of the error cannot judge them.
    """
    for setting in SETTINGS:
        values = sorted({answer.result[setting] for answer in answers.values()})
        if len(values) > 1:
            shown = " and ".join(f"{value:g}" for value in values)
            raise UsageError(f"agents are probed with a {setting} of {shown}: give the files of one of them")


def threshold_in(word: str) -> float:
    """The share of its error below which an agent gains."""
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
        if all(path.endswith(".json") for path in files):
            example = "python img/count_signs.py 0.36 results/FOLDER/*.csv results/FOLDER/probe.json"
            raise UsageError(f"give a share of the error, the files of both arms, and a probe's: {example}")
        below = threshold_in(word)
        ratios, gains = read_agents(files)
        print(signs_table(ratios, gains, below))
        print(signs_in_words(ratios, gains, below))


if __name__ == "__main__":
    main()
