"""Human-normalised scores, and what is said over several games."""

import gymnasium as gym
import numpy as np
import pytest
from simulated_runs import (
    ALIEN,
    INJECTION,
    PHOENIX,
    RETURN,
    TETRIS,
    TOTAL,
    games,
    make_arms,
    make_games,
    make_run,
)

from analysis.arms import group
from analysis.games import (
    HUMAN_SCORES,
    aggregate_scores,
    aggregates,
    balanced_means,
    human_normalised,
    normalised_mean,
)
from analysis.verdict import Window, comparisons


def compared(*runs):
    return comparisons(group(list(runs))[0], RETURN, None)


def test_the_human_scores_are_of_the_57_games_and_every_one_is_registered():
    registered = {spec.kwargs["game"] for spec in gym.registry.values() if "game" in spec.kwargs}
    assert len(HUMAN_SCORES) == 57 and set(HUMAN_SCORES) <= registered
    assert all(random < human for random, human in HUMAN_SCORES.values())
    assert sum(map(sum, HUMAN_SCORES.values())) == pytest.approx(657_359.1)  # of the source's table
    weighted = sum(
        i * (random + human) for i, (_, (random, human)) in enumerate(sorted(HUMAN_SCORES.items()))
    )
    assert round(weighted, 1) == 18480979.4, "rows were not swapped"
    assert HUMAN_SCORES["phoenix"] == (761.4, 7242.6) and HUMAN_SCORES["skiing"] == (-17098.1, -4336.9)


def test_human_normalised_scores_put_random_play_at_0_and_a_human_at_1_whatever_the_id():
    for env_id in (PHOENIX, "ALE/Phoenix-v5"):
        assert human_normalised(env_id, 761.4) == 0 and human_normalised(env_id, 7242.6) == 1
        assert human_normalised(env_id, 4002.0) == pytest.approx(0.5)
    assert human_normalised("ALE/YarsRevenge-v5", 3092.9 + 2 * 51484) == pytest.approx(2)
    assert human_normalised(TETRIS, 100.0) is None and human_normalised("NotAGame-v0", 100.0) is None


def test_the_mean_of_a_side_is_normalised_where_it_has_one():
    (phoenix,) = compared(*make_games(PHOENIX))
    for side in (0, 1):
        score = (np.mean(list(phoenix.means[side].values())) - 761.4) / (7242.6 - 761.4)
        assert normalised_mean(phoenix.sides[side]) == pytest.approx(score)
    (early,) = compared(
        *(
            make_run(str(i), {RETURN: [(1, 1.0)]}, last=1, intervention="injection" if i else "none")
            for i in (False, True)
        )
    )
    (tetris,) = compared(*make_games(TETRIS))
    assert normalised_mean(early.sides[0]) is None and normalised_mean(tetris.sides[1]) is None


def plain_iqm(values):
    cut = len(values) // 4
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept)


def test_aggregates_are_those_of_a_plain_loop_over_resamples_and_games(monkeypatch):
    monkeypatch.setattr("analysis.games.RESAMPLES", 300)
    source, rng = np.random.default_rng(1), np.random.default_rng(0)
    without, injected = ([source.normal(size=n) for n in sizes] for sizes in ((3, 5, 1, 4), (3, 5, 2, 4)))
    joint = [True, False, False, True]
    tables = []
    for ours, theirs, together in zip(without, injected, joint, strict=True):
        rows = rng.integers(len(ours), size=(300, len(ours)))
        tables.append((rows, rows if together else rng.integers(len(theirs), size=(300, len(theirs)))))
    samples = []
    for i in range(300):
        sides = [[], []]
        for game, rows in enumerate(tables):
            for side, scores in enumerate((without, injected)):
                sides[side] += [scores[game][row] for row in rows[side][i]]
        a, b = map(plain_iqm, sides)
        samples.append((a, b, b - a))
    a, b = (plain_iqm(np.concatenate(side)) for side in (without, injected))
    expected = np.column_stack(((a, b, b - a), np.percentile(samples, (2.5, 97.5), axis=0).T))
    np.testing.assert_allclose(aggregate_scores(without, injected, joint), expected)


def test_aggregates_of_runs_that_do_not_spread_within_their_games_have_no_width():
    levels = [0.0, 1.0, 2.0, 3.0, 100.0]
    one_each = aggregate_scores(
        [np.array([x]) for x in levels], [np.array([x + 0.5]) for x in levels], [False] * 5
    )
    np.testing.assert_allclose(one_each, np.repeat([[2.0], [2.5], [0.5]], 3, axis=1))  # 0 and 100 are cut off
    equal = aggregate_scores([np.full(4, 0.2)] * 3, [np.full(3, 0.2)] * 3, [False] * 3)
    np.testing.assert_allclose(equal, np.repeat([[0.2], [0.2], [0.0]], 3, axis=1), atol=1e-15)
    strata = aggregate_scores([np.zeros(4), np.ones(4)], [np.ones(4), np.ones(4)], [False] * 2)
    np.testing.assert_allclose(strata, np.repeat([[0.5], [1.0], [0.5]], 3, axis=1))


def test_of_two_runs_half_of_the_resamples_draw_one_twice():
    (value, low, high), *_ = aggregate_scores([np.array([0.0, 1.0])], [np.zeros(1)], [False])
    assert (value, low, high) == (0.5, 0, 1)


def test_seeds_drawn_together_take_their_level_out_of_the_difference():
    without = [np.array([0.0, 10, 20, 30]), np.array([5.0, 50])]
    injected = [scores + 1 for scores in without]
    together, apart = (aggregate_scores(without, injected, [joint] * 2) for joint in (True, False))
    np.testing.assert_allclose(together[2], 1)
    assert apart[2, 1] < -5 and apart[2, 2] > 7 and together[0, 2] - together[0, 1] > 10


def test_comparisons_of_several_games_are_aggregated_with_the_runs_of_a_seed_drawn_together():
    pairs = compared(*make_games(PHOENIX, seeds=(1, 2, 3, 4)), *make_games(ALIEN))
    (total,) = aggregates(pairs)
    sides = [
        [np.array([human_normalised(p.game, m) for m in p.means[side].values()]) for p in pairs]
        for side in (0, 1)
    ]
    np.testing.assert_array_equal(total.scores, aggregate_scores(*sides, [True, True]))
    assert total.games == [PHOENIX, ALIEN] and total.runs == (7, 7) and not total.left_out
    assert total.names == ("no injection", "injection at 1k") and total.windows == 2 * [
        Window(INJECTION, TOTAL)
    ]


@pytest.mark.parametrize(("seeds", "others"), [((1,), (1,)), ((1, 2), (1, 2, 3)), ((1, 2, 3), (1, 2))])
def test_of_games_with_few_runs_on_a_side_there_is_no_interval_however_many_the_others_have(seeds, others):
    runs = [*make_games(ALIEN), *make_games(PHOENIX, seeds=(1, 2, 3))]
    keep = {False: seeds, True: others}
    few = [
        run
        for run in runs
        if run.args.env_id == ALIEN or run.args.seed in keep[(run.args.intervention == "injection")]
    ]
    (total,) = aggregates(compared(*few))
    assert np.isnan(total.scores[:, 1:]).all() and np.isfinite(total.scores[:, 0]).all()
    (total,) = aggregates(compared(*runs))
    assert np.isfinite(total.scores).all()


def test_seeds_that_all_gain_the_same_tell_nothing_of_how_sure_that_is():
    runs = make_games(PHOENIX)
    for run in runs:
        run.scalars[RETURN] = make_run("", {RETURN: games(run.args.seed, 0)}).scalars[RETURN]
        run.scalars[RETURN][1, 10:] += 7.0 * (run.args.intervention == "injection")
    (total,) = aggregates(compared(*runs))
    assert np.isfinite(total.scores[:2]).all() and np.isnan(total.scores[2, 1:]).all()


def test_runs_without_a_shared_history_are_drawn_apart():
    runs = [
        make_run(f"b{seed}", {RETURN: games(seed, 0)}, seed=seed, intervention="none") for seed in (1, 2, 3)
    ]
    runs += [make_run(f"i{seed}", {RETURN: games(seed + 3, 1)}, seed=seed) for seed in (1, 2, 3)]
    (pair,) = compared(*runs)
    (total,) = aggregates([pair])
    sides = [[np.array([human_normalised(PHOENIX, mean) for mean in means.values()])] for means in pair.means]
    np.testing.assert_array_equal(total.scores, aggregate_scores(*sides, [False]))


def test_where_some_seeds_share_a_history_and_others_do_not_all_are_drawn_apart():
    """Drawn by their places, strangers would be taken for the two runs of a seed."""
    strangers = [
        make_run("b9", {RETURN: games(9, 0)}, seed=9, intervention="none"),
        make_run("i8", {RETURN: games(8, 1)}, seed=8),
    ]
    (pair,) = compared(*make_arms((1, 2)), *strangers)
    assert pair.shared == 2
    (total,) = aggregates([pair])
    sides = [[np.array([human_normalised(PHOENIX, mean) for mean in means.values()])] for means in pair.means]
    np.testing.assert_array_equal(total.scores, aggregate_scores(*sides, [False]))
    assert not np.array_equal(total.scores, aggregate_scores(*sides, [True]))


@pytest.mark.parametrize(
    ("others", "counted", "surplus"),
    [((1, 2, 3), [1, 2, 3], "4, 5"), ((6, 7, 8), [1, 2, 3], "4, 5"), ((1, 4, 9), [1, 2, 4], "3, 5")],
)
def test_no_game_has_more_runs_on_one_side_of_an_aggregate_than_on_the_other(others, counted, surplus):
    """One game has five runs without and three with, the other three and five; nothing has any effect."""
    runs = []
    for game, left, right in ((ALIEN, (1, 2, 3, 4, 5), others), (PHOENIX, others, (1, 2, 3, 4, 5))):
        for seed in left:
            points = {RETURN: games(seed, 0)}
            runs.append(make_run(f"b{game}{seed}", points, seed=seed, env_id=game, intervention="none"))
        for seed in right:  # games of its own from the first on: nothing is shared
            points = {RETURN: games(seed + 20, 0)}
            runs.append(make_run(f"i{game}{seed}", points, seed=seed, env_id=game))
    pairs = compared(*runs)
    (total,) = aggregates(pairs)
    assert total.runs == (6, 6) and total.fewest == 3 and total.scores[2, 1] < 0 < total.scores[2, 2]
    assert [*balanced_means(pairs[0])[0]] == counted and [*balanced_means(pairs[0])[1]] == [*others]
    reason = f"seeds {surplus}, since the other side has 3 runs"
    assert total.left_out == {f"{ALIEN} without": reason, f"{PHOENIX} with": reason}


def test_games_without_a_human_score_or_a_run_on_one_side_are_left_out_of_the_aggregate_and_named():
    pong = make_run("pong", {RETURN: games(1, 0)}, env_id="PongNoFrameskip-v4", intervention="none")
    early = make_run("early", {RETURN: games(1, 1, upto=900)}, last=900, env_id="PongNoFrameskip-v4")
    (total,) = aggregates(compared(*make_games(PHOENIX, ALIEN, TETRIS), pong, early))
    reasons = {"PongNoFrameskip-v4": "no run in the window on one side", TETRIS: "no human score is known"}
    assert total.games == [PHOENIX, ALIEN] and total.left_out == reasons
    assert aggregates(compared(*make_games(TETRIS))) == []


def test_two_ids_of_one_game_count_once():
    other = "Phoenix-v4"  # differs in the frames per step alone, which this project sets
    (total,) = aggregates(compared(*make_games(PHOENIX, ALIEN, other)))
    assert total.games == [PHOENIX, ALIEN] and total.runs == (6, 6)
    assert total.left_out == {other: f"it is the game of {PHOENIX}, which counts once"}


def test_only_comparisons_that_differ_in_nothing_but_the_game_are_aggregated():
    sticky = make_games("ALE/Pong-v5")  # its actions may be repeated
    totals = aggregates(
        compared(*make_games(PHOENIX, ALIEN), *make_games(PHOENIX, ALIEN, learning_rate=1e-3), *sticky)
    )
    found = sorted((total.games, "learning rate 0.001" in total.names[1]) for total in totals)
    assert found == sorted([(["ALE/Pong-v5"], False), ([PHOENIX, ALIEN], False), ([PHOENIX, ALIEN], True)])


def test_one_game_alone_is_an_aggregate_of_one():
    (total,) = aggregates(compared(*make_arms()))
    assert total.games == [PHOENIX] and total.runs == (3, 3)
