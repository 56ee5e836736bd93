"""Over games: human-normalised scores, and comparisons that differ in the game alone taken together."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.intervals import CONFIDENCE, MIN_SEEDS, RESAMPLES, iqm, no_spread
from analysis.verdict import Comparison, Side, Window
from support.environments import atari_spec
from support.usage import UsageError

# Scores of random play and of a human tester, from no-op starts (DQN Zoo, dqn_zoo/atari_data.py)
HUMAN_SCORES: dict[str, tuple[float, float]] = {
    "alien": (227.8, 7127.7), "amidar": (5.8, 1719.5), "assault": (222.4, 742), "asterix": (210, 8503.3),
    "asteroids": (719.1, 47388.7), "atlantis": (12850, 29028.1), "bank_heist": (14.2, 753.1),
    "battle_zone": (2360, 37187.5), "beam_rider": (363.9, 16926.5), "berzerk": (123.7, 2630.4),
    "bowling": (23.1, 160.7), "boxing": (0.1, 12.1), "breakout": (1.7, 30.5), "centipede": (2090.9, 12017),
    "chopper_command": (811, 7387.8), "crazy_climber": (10780.5, 35829.4), "defender": (2874.5, 18688.9),
    "demon_attack": (152.1, 1971), "double_dunk": (-18.6, -16.4), "enduro": (0, 860.5),
    "fishing_derby": (-91.7, -38.7), "freeway": (0, 29.6), "frostbite": (65.2, 4334.7),
    "gopher": (257.6, 2412.5), "gravitar": (173, 3351.4), "hero": (1027, 30826.4), "ice_hockey": (-11.2, 0.9),
    "jamesbond": (29, 302.8), "kangaroo": (52, 3035), "krull": (1598, 2665.5),
    "kung_fu_master": (258.5, 22736.3), "montezuma_revenge": (0, 4753.3), "ms_pacman": (307.3, 6951.6),
    "name_this_game": (2292.3, 8049), "phoenix": (761.4, 7242.6), "pitfall": (-229.4, 6463.7),
    "pong": (-20.7, 14.6), "private_eye": (24.9, 69571.3), "qbert": (163.9, 13455),
    "riverraid": (1338.5, 17118), "road_runner": (11.5, 7845), "robotank": (2.2, 11.9),
    "seaquest": (68.4, 42054.7), "skiing": (-17098.1, -4336.9), "solaris": (1236.3, 12326.7),
    "space_invaders": (148, 1668.7), "star_gunner": (664, 10250), "surround": (-10, 6.5),
    "tennis": (-23.8, -8.3), "time_pilot": (3568, 5229.2), "tutankham": (11.4, 167.6),
    "up_n_down": (533.4, 11693.2), "venture": (0, 1187.5), "video_pinball": (16256.9, 17667.9),
    "wizard_of_wor": (563.5, 4756.5), "yars_revenge": (3092.9, 54576.9), "zaxxon": (32.5, 9173.3),
}  # fmt: skip


@dataclass(frozen=True)
class Aggregate:
    """Comparisons that differ in nothing but the game. Pairs are (without, with)."""

    names: tuple[str, str]
    games: list[str]
    windows: list[Window]  # of each game
    runs: tuple[int, int]
    scores: np.ndarray  # (3, 3), see `aggregate_scores`; NaN where there is no interval
    left_out: dict[str, str]  # game, or a side's runs of one: reason
    fewest: int  # runs of a game, on the side that has fewest
    of_one_agent: list[str]  # games whose runs continue one agent


def emulator(env_id: str) -> dict[str, Any]:
    """How an Atari id is registered, {"game": "phoenix", ...}; {} if it is not."""
    try:
        return atari_spec(env_id).kwargs
    except UsageError:
        return {}


def human_normalised(env_id: str, score: float) -> float | None:
    """A score where random play has 0 and a human 1; None for a game that is not in `HUMAN_SCORES`."""
    game = emulator(env_id).get("game")
    if game not in HUMAN_SCORES:
        return None
    random, human = HUMAN_SCORES[game]
    return (score - random) / (human - random)


def normalised_mean(side: Side) -> float | None:
    """Human-normalised mean over the runs of one side; None without runs."""
    means = list(side.means.values())
    return human_normalised(side.arm.game, float(np.mean(means))) if means else None


def aggregate_scores(
    without: Sequence[np.ndarray], intervened: Sequence[np.ndarray], joint: Sequence[bool]
) -> np.ndarray:
    """Interquartile means over the runs of all games, and 95% intervals (Agarwal et al. 2021).

    They are by stratified bootstrap: a resample draws from each game as many runs as it has.

    Args:
        without, intervened: per game g, scores (n_g,) and (m_g,), at least one each
        joint: per game, whether n_g = m_g and the scores at one index are drawn together

    Returns:
        (3, 3) float64: of without, of intervened and of their difference, the value and its interval
    """
    rng = np.random.default_rng(0)
    drawn_without = []
    drawn_intervened = []
    for ours, theirs, together in zip(without, intervened, joint, strict=True):
        rows = rng.integers(len(ours), size=(RESAMPLES, len(ours)))
        drawn_without.append(ours[rows])
        if not together:
            rows = rng.integers(len(theirs), size=(RESAMPLES, len(theirs)))
        drawn_intervened.append(theirs[rows])
    tail = (1 - CONFIDENCE) / 2
    values = [iqm(np.concatenate(side)) for side in (without, intervened)]
    values.append(values[1] - values[0])
    samples = [iqm(np.concatenate(side, axis=1), axis=1) for side in (drawn_without, drawn_intervened)]
    samples.append(samples[1] - samples[0])  # three of (RESAMPLES,)
    return np.column_stack((values, np.quantile(samples, (tail, 1 - tail), axis=1).T))


def without_points(scores: np.ndarray, fewest: int) -> np.ndarray:
    """Scores (3, 3) of `aggregate_scores`, with NaN where an interval would look certain and is not.

    Resampling one run draws that run again and again, two say hardly more; equal runs, and equal differences,
    do not vary. `fewest` are the runs of the game and the side that has fewest.
    """
    value, low, high = scores.T
    unsure = no_spread(low, high, np.abs(value).max()) | (fewest < MIN_SEEDS)
    return np.column_stack((value, np.where(unsure, np.nan, low), np.where(unsure, np.nan, high)))


def balanced_means(pair: Comparison) -> tuple[dict[int, float], dict[int, float]]:
    """Mean returns of as many runs on both sides, {seed: mean}, of seeds that both have before others.

    With more runs on one side a game would weigh more there, and games differ more than arms do.
    """
    count = min(map(len, pair.means))
    sides = []
    for means, others in (pair.means, pair.means[::-1]):
        seeds = sorted(means, key=lambda seed: (seed not in others, seed))
        sides.append({seed: means[seed] for seed in sorted(seeds[:count])})
    return sides[0], sides[1]


def name_surplus(pair: Comparison, counted: tuple[dict[int, float], dict[int, float]]) -> dict[str, str]:
    """{game and side: reason} where a side has runs that are not `counted`, the pair's `balanced_means`."""
    surplus = {}
    for means, of_side, side in zip(pair.means, counted, ("without", "with"), strict=True):
        seeds = ", ".join(str(seed) for seed in means if seed not in of_side)
        if seeds:
            surplus[f"{pair.game} {side}"] = f"seeds {seeds}, since the other side has {len(of_side)} runs"
    return surplus


def aggregates(pairs: list[Comparison]) -> list[Aggregate]:
    """One for every set of comparisons that differ in the game alone, of games with scores on both sides."""

    def scores(game: str, means: dict[int, float]) -> np.ndarray:
        return np.array([human_normalised(game, mean) for mean in means.values()])

    kinds: dict[tuple, list[Comparison]] = defaultdict(list)
    for pair in pairs:
        shared = pair.arms[1].setting | emulator(pair.game)
        key = [(name, value) for name, value in shared.items() if name not in ("env_id", "game", "frameskip")]
        kinds[tuple(key)].append(pair)
    found = []
    for pairs_of_kind in kinds.values():
        by_game: dict[str, Comparison] = {}
        left_out = {}
        for pair in pairs_of_kind:
            game = emulator(pair.game).get("game", "")
            if human_normalised(pair.game, 0.0) is None:
                left_out[pair.game] = "no human score is known"
            elif not all(pair.means):
                left_out[pair.game] = "no run in the window on one side"
            elif game in by_game:
                left_out[pair.game] = f"it is the game of {by_game[game].game}, which counts once"
            else:
                by_game[game] = pair
        usable = list(by_game.values())
        if not usable:
            continue
        without = []
        intervened = []
        joint = []
        for pair in usable:
            counted = balanced_means(pair)
            left_out |= name_surplus(pair, counted)
            without.append(scores(pair.game, counted[0]))
            intervened.append(scores(pair.game, counted[1]))
            joint.append(pair.shared == len(counted[0]))
        fewest = min(len(scores_of_game) for scores_of_game in (*without, *intervened))
        total = Aggregate(
            names=(usable[0].arms[0].name, usable[0].arms[1].name),
            games=[pair.game for pair in usable],
            windows=[pair.window for pair in usable],
            runs=(sum(map(len, without)), sum(map(len, intervened))),
            scores=without_points(aggregate_scores(without, intervened, joint), fewest),
            left_out=left_out,
            fewest=fewest,
            of_one_agent=[pair.game for pair in usable if pair.one_agent],
        )
        found.append(total)
    return found
