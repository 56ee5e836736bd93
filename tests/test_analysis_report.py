"""What is printed of comparisons, and written as a table and as numbers."""

import contextlib
import io
import json
import sys
from pathlib import Path

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
    make_norm_arms,
    make_run,
)

from analysis.arms import group
from analysis.curves import write_curves
from analysis.games import aggregates, normalised_mean
from analysis.intervals import interval
from analysis.report import aggregate_in_words, as_json, beyond_control, in_words, other_causes, report, table
from analysis.verdict import comparisons, reach, show


def compared(*runs, window=None, metric=RETURN):
    arms = group(list(runs))[0]
    return arms, comparisons(arms, metric, window)


def words(*runs, **settings):
    """A comparison's lines."""
    _, (pair,) = compared(*runs, **settings)
    return in_words(pair, RETURN)


def numbers(*runs, remarks=None):
    arms, pairs = compared(*runs)
    return json.loads(as_json(arms, pairs, aggregates(pairs), remarks or {}, RETURN))


def numbers_of(runs):
    return numbers(*runs)["comparisons"]


def test_a_comparison_in_words_says_what_is_compared_the_verdict_the_window_and_the_method():
    title, verdict, window, method = words(*make_arms())
    assert title == f"{PHOENIX}: injection at 1k against no injection"
    assert verdict.startswith("injection raised the return by ") and verdict.endswith(
        ": evidence of lost plasticity"
    )
    points = f"60 points of {RETURN} without and 60 with injection"
    assert window == f"window 1,000 < step ≤ 3,000, {points}"
    within = "95% t interval of the differences within 3 seeds (1, 2, 3)"
    assert method == f"{within}, whose runs share their history up to the injection"


@pytest.mark.parametrize(
    ("effect", "cut", "warned"),
    [
        (50.0, (0, 0), False),
        (50.0, (2, 1), False),  # 150 may be 7.5 too low
        (50.0, (1, 9), True),  # or 67.5
        (50.0, (15, 0), True),  # 100 may be 75 too low
        (50.0, (6, 3), False),  # 100 may be 30 too low or 150 22.5: not both, and not three runs' added up
        (-50.0, (2, 1), False),
        (-50.0, (15, 0), True),
        (0.0, (9, 9), True),  # no evidence, and 45 might be hidden
    ],
)
def test_words_warn_where_games_without_a_return_could_carry_the_verdict(effect, cut, warned):
    """Each arm has 3 runs of 20 games in the window."""
    runs = make_arms(effect=effect)
    for run in runs:
        run.scalars["charts/games_cut"] = np.array([[2_000.0], [cut[(run.args.intervention == "injection")]]])
    lines = [line for line in words(*runs) if line.startswith("caution")]
    without, injected = (f"{3 * games} of {3 * games + 60} games" for games in cut)
    assert len(lines) == warned
    if warned:
        assert f"{without} without and {injected} with injection were cut" in lines[0]
        assert lines[0].endswith(
            "carry this: give runs an --eval-frequency, and compare --metric eval/episodic_return"
        )
        for run in runs:
            run.scalars["eval/episodic_return"] = np.array([[2_000.0], [1.0]])
        assert words(*runs)[-1].endswith("carry this: compare --metric eval/episodic_return"), (
            "which they have logged"
        )
    _, (pair,) = compared(*runs)
    assert not [line for line in in_words(pair, "eval/episodic_return") if line.startswith("caution")], (
        "it has whole games"
    )
    sides = numbers(*runs)["comparisons"][0]
    assert (sides["without"]["games_unreported"], sides["with"]["games_unreported"]) == (
        3 * cut[0],
        3 * cut[1],
    )


def test_words_warn_where_returns_are_about_0_and_where_half_of_an_arms_games_are_missing():
    runs = make_arms(effect=0.5)
    for run in runs:
        run.scalars[RETURN] = run.scalars[RETURN] - np.array([[0.0], [100.0]])
        run.scalars["charts/games_cut"] = np.array([[2_000.0], [19.0]])
    assert any(line.startswith("caution") for line in words(*runs)), "games differ by more than their mean"
    runs = make_arms(effect=1e6)
    runs[0].scalars["charts/games_cut"] = np.array([[2_000.0], [61.0]])
    assert any(line.startswith("caution") for line in words(*runs))


def test_a_mean_near_0_is_no_surer_than_one_far_from_it():
    games = np.array([0.0] * 18 + [-21.0, 21.0])
    share = 0.4 / (1 - 0.4)
    assert reach(games, 0.4) == pytest.approx(games.std() * share)
    assert reach(games + 30, 0.4) == reach(games - 30, 0.4) == pytest.approx(30 * share)


def test_words_warn_where_one_run_lacks_its_long_games():
    """Few games may be missing, and much of what was played: steps count, and every run has its share."""
    runs = make_arms(effect=40.0)
    for run in runs:
        run.scalars["charts/games_cut"] = np.array([[3_000.0], [1.0]])
        run.scalars["charts/episodic_length"] = run.scalars[RETURN].copy()
        run.scalars["charts/episodic_length"][1] = 95.0  # of 20 games in 2,000 steps
    assert not [line for line in words(*runs) if line.startswith("caution")]
    runs[1].scalars["charts/episodic_length"][1] = 55.0
    (line,) = [line for line in words(*runs) if line.startswith("caution")]
    assert "3 of 63 games without and 3 of 63 games with injection were cut or still going" in line
    assert "up to 5% and 45% of a run's games" in line
    assert numbers(*runs)["comparisons"][0]["with"]["share_unreported"] == pytest.approx(
        {"1": 0.45, "2": 0.05, "3": 0.05}
    )


def test_words_warn_where_a_run_has_no_game_with_a_return_at_all():
    """It is left out, with all that it lacks."""
    runs = make_arms((1, 2, 3, 4))
    runs[-1].scalars[RETURN] = runs[-1].scalars[RETURN][:, :10]
    assert not [line for line in words(*runs) if line.startswith("caution")], "it did not play"
    runs[-1].scalars["charts/games_cut"] = np.array([[3_000.0], [8.0]])
    (line,) = [line for line in words(*runs) if line.startswith("caution")]
    assert "0 of 60 games without and 8 of 68 games with injection were cut or still going" in line
    assert "up to 0% and 100% of a run's games" in line
    assert words(*runs)[-2].startswith(f"not in this comparison: {runs[-1].folder} has logged no {RETURN}")
    early = make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500], 4: []})
    early[-2].scalars["charts/games_cut"] = np.array([[3_000.0], [8.0]])
    early[-2].scalars[RETURN] = early[-2].scalars[RETURN][:, :10]
    lines = words(*early)
    assert any("has not been injected yet" in line for line in lines)
    assert not [line for line in lines if line.startswith("caution")], "it would not count anyway"
    late = make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500], 4: [2_950]})
    late[-2].scalars["charts/games_cut"] = np.array([[3_000.0], [8.0]])
    late[-2].scalars[RETURN] = late[-2].scalars[RETURN][:, :29]
    lines = words(*late)
    assert any("with this run the window would be 2,950 < step" in line for line in lines)
    assert not [line for line in lines if line.startswith("caution")], "it was injected within the window"


def test_words_warn_of_a_run_without_a_return_that_would_have_ended_the_window():
    """It is left out first, so that the window is that of the others; what it lacks counts all the same."""
    points = {RETURN: games(4, 1)[:10], "charts/games_cut": [(2_050, 8)]}
    silent = make_run("silent", points, 2_050, seed=4)
    lines = words(*make_arms(), silent)
    assert lines[-1].endswith("; with this run the window would be 1,000 < step ≤ 2,050")
    (line,) = [line for line in lines if line.startswith("caution")]
    assert "up to 0% and 100% of a run's games" in line


def test_where_runs_were_evaluated_differently_the_caution_does_not_name_a_metric_that_has_no_verdict():
    runs = []
    for run in make_arms(effect=0.0):
        points = {tag: [*pairs.T] for tag, pairs in run.scalars.items()}
        points |= {"charts/games_cut": [(2_000, 9)], "eval/episodic_return": [(2_000, 1.0)]}
        frequency = 500 if run.args.intervention == "injection" else 1_000
        how = {"seed": run.args.seed, "intervention": run.args.intervention, "eval_frequency": frequency}
        runs.append(make_run(run.lineage[0].folder, points, **how))
    (line,) = [line for line in words(*runs) if line.startswith("caution")]
    fix = "give all runs the same eval_ settings, and compare --metric eval/episodic_return"
    assert line.endswith(f"carry this: {fix}")


def test_without_a_verdict_words_warn_where_the_difference_could_be_owed_to_missing_games():
    runs = make_arms(seeds=(1,))
    for cut, warned in ((2, False), (15, True)):
        runs[0].scalars["charts/games_cut"] = np.array([[2_000.0], [cut]])
        assert any(line.startswith("caution") for line in words(*runs)) == warned


def test_words_say_how_many_runs_share_a_history_where_they_are_too_few_to_pair():
    alone = [
        make_run("b9", {RETURN: games(9, 0)}, seed=9, intervention="none"),
        make_run("i8", {RETURN: games(8, 1)}, seed=8),
    ]
    seeds = "95% Welch interval, 3 seeds (1, 2, 9) without and 3 seeds (1, 2, 8) with injection"
    assert words(*make_arms((1, 2)), *alone)[3] == f"{seeds}, of which 2 share a history, too few to pair"
    strangers = [make_run(f"s{seed}", {RETURN: games(seed + 9, 1)}, seed=seed) for seed in (1, 2, 3)]
    assert words(*make_arms()[::2], *strangers)[3].endswith(
        "with injection, which do not share their history"
    )


def test_words_name_the_run_that_ends_the_window_and_those_that_are_left_out():
    baseline, _ = make_arms((4,))
    going = make_run("going", {RETURN: games(4, 1, upto=2_000)}, last=2_050, seed=4)
    ends = "step ≤ 2,050, where runs/going is (a longer --window leaves it out)"
    assert f"{ends}, and the median run has 90% more steps, " in words(*make_arms(), baseline, going)[2]
    almost = make_run("almost", {RETURN: games(4, 1, upto=2_900)}, last=TOTAL - 5, seed=4)
    lone = make_run("lone", {RETURN: games(5, 1)}, seed=5)
    strangers = [make_run(f"s{seed}", {RETURN: games(seed + 9, 1)}, seed=seed) for seed in (1, 2, 3)]
    window = words(*make_arms()[::2], *strangers, almost, lone)[2]
    assert "where runs/almost is (a longer --window leaves it out), 57 points" in window, (
        "five steps are nothing to speak of"
    )
    left_out = words(*make_arms(), going, window=1_500)[4:]
    assert left_out == [
        "not in this comparison: runs/going is at step 2,050 and has not got to the window's end at 2,500"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="such a path cannot be made there")
def test_a_file_whose_path_is_no_utf8_is_named_in_the_table_by_its_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    going = make_run("going", {RETURN: games(4, 1, upto=2_000)}, last=2_050, seed=4)
    files = []
    for arm in group([*make_arms(), going])[0]:
        files.append(f"curves\udcff/{arm.intervention}.csv")
        write_curves(arm.runs, Path(files[-1]))
    with contextlib.redirect_stdout(io.StringIO()):
        report(files, Path("x.png"), RETURN, 1_500, "mean")
    assert b"not in this comparison: curves\xff/injection.csv (seed 4)" in Path("x.md").read_bytes()


def test_words_warn_where_the_norm_injected_one_run_so_late_that_little_is_left():
    line = "caution: of the 1,700 steps since the median run's first injection, the window has the last 100"
    assert line in words(*make_norm_arms({1: [1_200], 2: [2_900], 3: [1_300]}))
    assert not [
        line for line in words(*make_norm_arms({1: [1_200], 2: [2_100], 3: [1_300]})) if "caution" in line
    ]


def test_little_is_left_where_it_is_less_than_half():
    line = "caution: of the 1,700 steps since the median run's first injection, the window has the last 700"
    assert line in words(*make_norm_arms({1: [1_200], 2: [2_300], 3: [1_300]}))


MOMENTS = "what else could have caused this: fresh optimizer moments, as the new layers began with none"
CAPACITY = "what else could have caused this: more capacity, as more parameters learn than before"
FROZEN = "what else could have caused this: more capacity, as the frozen heads stay in the sum"
CHANCE = "what else could have caused this: chance, as 1 of 20 such intervals over seeds excludes 0"
WITHIN = "what else could have caused this: chance, as any effect within the interval is still possible"
LIMIT = "what this does not show: that exploration, or anything else, is the limit; only that"


@pytest.mark.parametrize(
    ("effect", "how", "lines"),
    [
        (50.0, {}, [MOMENTS, FROZEN, CHANCE]),
        (50.0, {"moments": "keep"}, [FROZEN, CHANCE]),
        (50.0, {"injected_head_width": 1024}, [MOMENTS, CAPACITY, CHANCE]),
        (50.0, {"injected_head_width": 64}, [MOMENTS, FROZEN, CHANCE]),
        (50.0, {"freeze_heads": False, "moments": "keep"}, [CAPACITY, CHANCE]),
        (-50.0, {}, [MOMENTS, CHANCE]),
        (-50.0, {"freeze_heads": False}, [MOMENTS, CHANCE]),
        (0.0, {}, [MOMENTS, WITHIN, f"{LIMIT} no lost plasticity was seen here"]),
        (0.0, {"freeze_heads": False, "moments": "keep"}, [WITHIN, f"{LIMIT} no effect was seen here"]),
    ],
)
def test_every_conclusion_comes_with_what_else_could_have_caused_it_or_does_not_follow(effect, how, lines):
    arms, pairs = compared(*make_arms(effect=effect, **how))
    found = other_causes(pairs[0])
    assert len(found) == len(lines)
    assert all(line.startswith(begin) for line, begin in zip(found, lines, strict=True))
    text = table(arms, pairs, [], RETURN)
    assert all(f"\n  - {line}.\n" in text for line in found)
    assert numbers_of(make_arms(effect=effect, **how))[0]["other_causes"] == found


def test_other_causes_are_named_of_other_interventions_too_and_of_no_verdict():
    resets = []
    for seed in (1, 2, 3):
        resets.append(make_run(f"r{seed}", {RETURN: games(seed, 2)}, seed=seed, intervention="reset-head"))
    _, (pair,) = compared(*make_arms()[::2], *resets)
    assert other_causes(pair)[-1] == f"{LIMIT} no effect was seen here"
    assert other_causes(pair)[0].endswith("; --intervention reset-moments would tell")
    whole = []
    for seed in (1, 2, 3):
        whole.append(make_run(f"a{seed}", {RETURN: games(seed, 2)}, seed=seed, intervention="reset-all"))
    _, (pair,) = compared(*make_arms()[::2], *whole)
    assert other_causes(pair)[0].endswith("; --intervention reset-moments --reset-moments-of all would tell")
    _, (few,) = compared(*make_arms((1, 2)))
    assert other_causes(few) == []
    _, (by_norm,) = compared(*make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500]}))
    tells = "; --intervention reset-moments would tell, in two arms that are both planned by --injection-step"
    assert other_causes(by_norm)[0].endswith(tells)


def with_control(seeds=(1, 2, 3), effect=20.0, cut=0, **args):
    """Runs of `make_arms`, and such whose moments are reset, of whose games some are cut."""
    runs = make_arms()
    for seed in seeds:
        points = {RETURN: games(seed, 3, effect), "charts/games_cut": [(2_000, cut)]}
        runs.append(make_run(f"m{seed}", points, seed=seed, intervention="reset-moments", **args))
    return runs


def lines_beyond_control(runs):
    """Of the injection's comparison: those on its control, and on other causes."""
    (pair,) = [pair for pair in compared(*runs)[1] if pair.intervention == "injection"]
    return pair, beyond_control(pair, RETURN), other_causes(pair)


def test_what_the_control_tells_stands_in_the_place_of_fresh_moments():
    pair, (line,), causes = lines_beyond_control(with_control())
    judged = pair.beyond_control.judgement
    raised = f"injection raised the return by {show(judged.difference, judged.low, judged.high)}"
    within = "95% t interval of the differences within 3 seeds (1, 2, 3)"
    method = f"{within}, whose runs share their history up to the injection"
    assert line == f"beyond its control, moment reset at 1k: {raised}; {method}"
    assert [cause.startswith(begin) for cause, begin in zip(causes, (FROZEN, CHANCE), strict=True)] == [
        True
    ] * 2
    arms, pairs = compared(*with_control())
    text = table(arms, pairs, [], RETURN)
    assert f"\n  - {line}.\n  - {causes[0]}.\n" in text and text.count("beyond its control") == 1
    assert len(rows_of(text)) == 2 + 4, "two rows a verdict, and none for the control's comparison"


def test_fresh_moments_stay_a_cause_where_the_difference_to_the_control_says_something_else():
    """The control has gained as much, or a part of it."""
    for effect, found in ((50.0, "no evidence"), (90.0, "lowered")):
        pair, _, causes = lines_beyond_control(with_control(effect=effect))
        assert pair.judgement.verdict == "raised" and pair.beyond_control.judgement.verdict == found
        assert causes[0].startswith(MOMENTS) and causes[0].endswith(
            f"; against the control the verdict is: {found}"
        )


def test_a_control_that_cannot_tell_says_why_and_fresh_moments_stay_a_cause():
    _, lines, causes = lines_beyond_control(with_control(seeds=(1, 2)))
    few = "too few seeds to say: 2 of the control and 3 of the arm, it takes 3 of each"
    assert lines == [f"beyond its control, moment reset at 1k: {few}"]
    assert causes[0].startswith(MOMENTS)
    _, lines, causes = lines_beyond_control(make_arms())
    assert lines == [] and causes[0].startswith(MOMENTS)


def test_the_control_has_cautions_and_runs_left_out_of_its_own():
    _, lines, _ = lines_beyond_control(with_control(cut=15))
    assert len(lines) == 2 and lines[1].startswith(
        "caution: 45 of 105 games of the control and 0 of 60 games of the arm were cut or still going"
    )
    going = make_run(
        "m4", {RETURN: games(4, 3, upto=2_000)}, last=2_050, seed=4, intervention="reset-moments"
    )
    _, lines, _ = lines_beyond_control([*with_control(), going])
    assert len(lines) == 2
    reason = "runs/m4 is at step 2,050 and has not got to the window's end at 3,000"
    assert lines[1] == f"not in the comparison with its control: {reason}"
    lone = make_run("lone", {RETURN: games(5, 1)}, seed=5)
    _, lines, _ = lines_beyond_control([*with_control(), lone])
    assert len(lines) == 1, "it is named already, as one that the verdict leaves out"


def test_a_control_whose_runs_share_no_history_is_compared_by_welch():
    strangers = []
    for seed in (1, 2, 3):
        points = {RETURN: games(seed + 9, 3)}
        strangers.append(make_run(f"s{seed}", points, seed=seed, intervention="reset-moments"))
    _, (line,), _ = lines_beyond_control([*make_arms(), *strangers])
    sides = "3 seeds (1, 2, 3) of the control and 3 seeds (1, 2, 3) of the arm"
    assert line.endswith(f"; 95% Welch interval, {sides}, which do not share their history")


def test_the_numbers_hold_the_difference_to_the_control_or_null():
    runs = with_control()
    pair, (line,), _ = lines_beyond_control(runs)
    injection, reset = sorted(numbers_of(runs), key=lambda found: found["with"]["arm"])
    found = injection["beyond_control"]
    judged = pair.beyond_control.judgement
    assert (found["difference"], *found["interval"]) == (judged.difference, judged.low, judged.high)
    assert found["p"] == judged.p and found["paired"] and found["sentence"] in line
    assert found["without"]["arm"] == "moment reset at 1k" and found["with"]["arm"] == "injection at 1k"
    assert found["with"]["means"] == injection["with"]["means"] and found["window"] == injection["window"]
    assert found["without"]["means"] == reset["with"]["means"] and reset["beyond_control"] is None


def test_words_say_how_many_verdicts_there_are_and_what_remains_of_each():
    runs = [*make_arms(effect=50.0), *make_arms(effect=0.3, prefix="x", learning_rate=1e-3)]
    arms, pairs = compared(*runs)
    for pair in pairs:
        line = in_words(pair, RETURN)[4]
        numbers = f"p = {pair.judgement.p:.2g}, corrected for them (Holm) {pair.p_holm:.2g}"
        assert line == f"one of 2 verdicts here: {numbers}" and line in table(arms, pairs, [], RETURN)
    found = numbers_of(runs)
    assert [(one["p"], one["p_holm"]) for one in found] == [(pair.judgement.p, pair.p_holm) for pair in pairs]
    assert len(words(*make_arms())) == 4, "a single verdict stays as it is"
    (alone,) = numbers_of(make_arms())
    assert alone["p"] == alone["p_holm"] > 0
    (none,) = numbers_of(make_arms((1,)))
    assert none["p"] is none["p_holm"] is None


def test_words_say_when_the_norm_injected_and_which_intervention_it_was():
    lines = words(*make_norm_arms({1: [1_200, 2_600], 2: [1_700], 3: [1_500, 2_900]}))
    assert lines[2].endswith("; first injection at 1,200 with seed 1, 1,700 with seed 2, 1,500 with seed 3")
    reset = [
        make_run(f"r{seed}", {RETURN: games(seed, 2)}, seed=seed, intervention="reset-head")
        for seed in (1, 2, 3)
    ]
    title, _, window, method = words(*make_arms()[::2], *reset)
    assert title.endswith("head reset at 1k against no intervention") and window.endswith("with intervention")
    assert method.endswith("up to the intervention")


def test_words_say_that_an_interval_is_over_continuations_of_one_agent():
    history = games(7, 0)[: INJECTION // 100]
    runs = []
    for seed in (1, 2, 3):
        for injected, intervention in enumerate(("none", "injection")):
            later = games(seed, injected, 50.0 * injected)[INJECTION // 100 :]
            how = {"seed": seed, "intervention": intervention, "fork": f"runs/agent/checkpoint-{INJECTION}"}
            runs.append(make_run(f"c{seed}-{injected}", {RETURN: history + later}, **how))
    _, sentence, _, method = words(*runs)
    assert sentence.endswith("over continuations of one agent, not over agents")
    within = "95% t interval of the differences within 3 seeds (1, 2, 3)"
    assert method == f"{within}, continuations of one agent"
    assert numbers(*runs)["comparisons"][0]["one_agent"] is True
    assert numbers(*make_arms())["comparisons"][0]["one_agent"] is False
    (total,) = aggregates(compared(*runs, *make_games(ALIEN))[1])
    over = aggregate_in_words(total)[3]
    assert f"6 runs without and 6 with, of which those of {PHOENIX} continue one agent; brackets" in over
    assert numbers(*runs, *make_games(ALIEN))["aggregates"][0]["of_one_agent"] == [PHOENIX]
    (total,) = aggregates(compared(*make_arms())[1])
    assert "one agent" not in aggregate_in_words(total)[3]
    assert numbers(*make_arms())["aggregates"][0]["of_one_agent"] == []


def test_without_a_verdict_words_give_no_method():
    early = [
        make_run(
            str(i), {RETURN: games(1, 0, upto=900)}, last=INJECTION, intervention="injection" if i else "none"
        )
        for i in (False, True)
    ]
    _, verdict, window, method, *left_out = words(*early)
    assert verdict.startswith("too few seeds to say") and method == "no interval" and len(left_out) == 2
    assert "0 points" in window


def test_an_aggregate_in_words_gives_scores_difference_games_and_method():
    _, pairs = compared(*make_games(PHOENIX, seeds=(1, 2, 3, 4)), *make_games(ALIEN, TETRIS))
    (total,) = aggregates(pairs)
    title, scores, difference, over, left_out = aggregate_in_words(total)
    assert title == "2 games: injection at 1k against no injection"
    assert f"{show(*total.scores[0])} without and {show(*total.scores[1])} with" in scores
    assert show(*total.scores[2]) in difference
    windows = f"{PHOENIX} in 1,000 < step ≤ 3,000, {ALIEN} in 1,000 < step ≤ 3,000"
    assert over.startswith(
        f"over 2 games ({windows}) and 7 runs without and 7 with; brackets are 95% stratified bootstrap"
    )
    assert left_out == f"not in this aggregate: {TETRIS}, no human score is known"


@pytest.mark.parametrize(
    ("seeds", "effect", "why"),
    [
        ((1,), 50.0, "it takes 3 runs of each game on either side"),
        ((1, 2), 50.0, "it takes 3 runs of each game on either side"),
    ],
)
def test_an_aggregate_of_few_runs_has_no_interval_and_says_why(seeds, effect, why):
    runs = [*make_games(PHOENIX, seeds=seeds), *make_games(ALIEN)]
    (total,) = aggregates(compared(*runs)[1])
    lines = aggregate_in_words(total)
    assert "[" not in "".join(lines) and lines[3].endswith(f"; no interval: {why}")
    (found,) = numbers(*runs)["aggregates"]
    assert found["interval"] == found["without"]["interval"] == found["with"]["interval"] == [None, None]
    assert np.isfinite([found["difference"], found["without"]["iqm"], found["with"]["iqm"]]).all()


def test_an_aggregate_of_runs_that_do_not_differ_has_no_interval_and_says_why():
    runs = make_games(PHOENIX, ALIEN)
    for run in runs:
        run.scalars[RETURN][1] = 100.0 + (run.args.intervention == "injection")
    (total,) = aggregates(compared(*runs)[1])
    assert aggregate_in_words(total)[3].endswith("; no interval: runs of a game do not differ")
    (found,) = numbers(*runs)["aggregates"]
    assert found["interval"] == [None, None]


def rows_of(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_table_has_two_rows_a_comparison_with_means_difference_verdict_and_human_normalised_score():
    arms, pairs = compared(*make_games(PHOENIX, TETRIS))
    text = table(arms, pairs, [], RETURN)
    head, _, *rows = rows_of(text)
    assert head[0] == "game" and head[-1] == "human-normalised" and len(rows) == 4
    for i, pair in enumerate(pairs):
        for side in (0, 1):
            means, score = np.array(list(pair.means[side].values())), normalised_mean(pair.sides[side])
            normalised = "–" if score is None else show(score)
            judged = pair.judgement
            verdict = [show(judged.difference, judged.low, judged.high), "raised"] if side else ["", ""]
            name = ("no injection", "injection at 1k")[side]
            assert rows[2 * i + side] == [
                pair.game,
                name,
                "1, 2, 3",
                "3",
                show(*interval(means)),
                *verdict,
                normalised,
            ]
        assert f"- {'; '.join(in_words(pair, RETURN))}." in text.splitlines()
    assert rows[0][-1] != "–" and rows[2][-1] == "–" and "## Over games" not in text


def test_the_table_lists_arms_that_are_in_no_comparison_and_adds_what_is_said_over_games():
    arms, pairs = compared(
        *make_games(PHOENIX, ALIEN), make_run("alone", {RETURN: games(1, 1)}, seed=7, batch_size=64)
    )
    (total,) = aggregates(pairs)
    text = table(arms, pairs, [total], RETURN)
    name = "injection at 1k, batch size 64"
    assert rows_of(text)[-1] == [PHOENIX, name, "7", "1", "–", "–", "nothing to compare with", "–"]
    assert text.index("## Over games") < text.index(f"- {'; '.join(aggregate_in_words(total))}.")


def test_the_mean_of_runs_that_do_not_differ_has_no_brackets_in_the_table():
    runs = make_arms()
    for run in runs[::2]:
        run.scalars[RETURN][1, 10:] = 0.1
    arms, pairs = compared(*runs)
    assert rows_of(table(arms, pairs, [], RETURN))[2][4] == "0.100"


def test_a_side_without_runs_shows_as_dashes():
    arms, pairs = compared(*make_norm_arms({5: []}))
    *_, without, injected = rows_of(table(arms, pairs, [], RETURN))
    assert without[3:] == ["1", without[4], "", "", without[7]] and without[4] != "–"
    assert injected[3:] == ["0", "–", "–", "too few seeds", "–"]


def test_the_numbers_hold_every_arm_comparison_and_remark_and_null_where_there_is_none():
    remarks = {"left_out": {"runs/x": "why"}, "unfinished": {}}
    content = numbers(*make_arms(), *make_norm_arms({5: []}), remarks=remarks)
    assert (
        content["metric"] == RETURN
        and content["left_out"] == {"runs/x": "why"}
        and content["unfinished"] == {}
    )
    arm = content["arms"][1]
    assert (
        arm["name"] == "injection where the norm has grown 3×"
        and arm["setting"]["injection_trigger"] == "norm"
    )
    assert arm["runs"] == [{"run": "runs/n5", "seed": 5, "step": TOTAL, "of": TOTAL}]
    norm, found = content["comparisons"]
    assert (
        norm["difference"] is None and norm["interval"] == [None, None] and norm["verdict"] == "too few seeds"
    )
    assert norm["with"]["means"] == {} and norm["with"]["human_normalised"] is None
    _, pairs = compared(*make_arms(), *make_norm_arms({5: []}))
    judged = pairs[1].judgement
    assert (found["difference"], *found["interval"]) == (judged.difference, judged.low, judged.high)
    assert found["sentence"] == judged.sentence and found["paired"] and found["game"] == PHOENIX
    assert found["with"]["means"] == {str(seed): mean for seed, mean in pairs[1].means[1].items()}
    assert (found["without"]["arm"], found["without"]["points"], found["with"]["points"]) == (
        "no injection",
        60,
        60,
    )
    assert found["first_injections"] == {"1": INJECTION, "2": INJECTION, "3": INJECTION}
    assert found["window"] == {"after": INJECTION, "upto": TOTAL, "ended_by": None} and found[
        "left_out"
    ].keys() == {"runs/b5"}


def test_the_numbers_hold_every_aggregate():
    _, pairs = compared(*make_games(PHOENIX, ALIEN, TETRIS))
    (total,) = aggregates(pairs)
    (found,) = numbers(*make_games(PHOENIX, ALIEN, TETRIS))["aggregates"]
    for side, row, name in (
        (found["without"], total.scores[0], "no injection"),
        (found["with"], total.scores[1], "injection at 1k"),
    ):
        assert side == {"arm": name, "runs": 6, "iqm": row[0], "interval": row[1:].tolist()}
    assert (found["difference"], *found["interval"]) == tuple(total.scores[2])
    assert found["games"] == [PHOENIX, ALIEN] and found["windows"] == 2 * [
        {"after": INJECTION, "upto": TOTAL}
    ]
    assert found["left_out"] == {TETRIS: "no human score is known"}
