"""compare.py: what a verdict claims and on what, which runs it uses and names, what it draws and writes, and how fast."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
import scipy.stats
from conftest import variant
from matplotlib import pyplot as plt

import compare
from compare import (
    HUMAN_SCORES,
    Arm,
    Run,
    Settings,
    UsageError,
    aggregate_scores,
    curve,
    group,
    human_normalised,
    interval,
    judge,
    read_run,
    report,
    setting,
    short,
    show,
)
from dqn_injection_atari import Args, EventFile

SCRIPT = Path(compare.__file__)
INJECTION, TOTAL = 1_000, 3_000
RETURN = "charts/episodic_return"


def write_run(name, points, last=None, **args):
    """A run's folder with `points` {tag: [(step, value), ...]}, whose log reaches step `last`, its end if not given."""
    args = Args(**{"total_timesteps": TOTAL, "injection_step": (INJECTION,), **args})
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run": name, "args": asdict(args)}))
    events = EventFile(folder)
    for tag, pairs in points.items():
        for step, value in pairs:
            events.add_scalar(tag, value, step)
    events.add_scalar("charts/SPS", 100.0, args.total_timesteps if last is None else last)
    events.flush()
    return str(folder)


def games(seed, after, effect=0.0, upto=TOTAL):
    """A game every 100 steps: the seed's own before the injection, of another generator (seed, after) later."""
    before, later = np.random.default_rng(seed), np.random.default_rng([seed, after])
    level = 10 * before.normal()
    return [
        (step, 100 + level + (before.normal() if step <= INJECTION else effect + later.normal()))
        for step in range(100, upto + 1, 100)
    ]


def write_arms(seeds=(1, 2, 3), effect=50.0, **args):
    """Runs with and without injection, of one history per seed."""
    return [
        write_run(f"{'injected' if injected else 'baseline'}-{seed}", {RETURN: games(seed, injected, effect * injected)},
                  seed=seed, apply_injection=injected, **args)
        for seed in seeds
        for injected in (False, True)
    ]  # fmt: skip


def compared(*folders, **settings):
    """What `report` writes about these runs, as JSON."""
    report(Settings(folders, **settings))
    return json.loads(Path("comparison.json").read_text())


def verdict(*folders, **settings):
    """The only comparison of these runs."""
    (comparison,) = compared(*folders, **settings)["comparisons"]
    return comparison


def synthetic(rng, n, paired, effect):
    """Arms of n runs of 10 games before and 10 after the injection, as their logs would read; `effect` is the truth.

    Seeds differ in level. In a paired experiment two runs of a seed share it and their history, else they share nothing,
    and the returns that rise also spread.
    """
    steps = np.arange(1, 21) * INJECTION / 10
    arms = []
    levels, histories = 300 * rng.normal(size=n), rng.normal(size=(n, 10))
    for injected in (False, True):
        if injected and not paired:
            levels, histories = 450 * rng.normal(size=n), rng.normal(size=(n, 10))
        changes = injected * (effect + 60 * paired * rng.normal(size=n))
        runs = []
        for seed in range(n):
            after = levels[seed] + changes[seed] + 50 * rng.normal(size=10)
            points = np.array([steps, np.concatenate((histories[seed], after))])
            runs.append(Run(f"{seed}", ARGS[seed], {RETURN: points}))
        arms.append(Arm("", {"injection": (INJECTION,) if injected else ()}, runs))
    return arms


ARGS = [Args(seed=seed, total_timesteps=2 * INJECTION) for seed in range(5)]


@pytest.mark.parametrize("effect", [0.0, 150.0])
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("paired", [True, False], ids=["paired", "welch"])
def test_intervals_cover_the_truth_and_verdicts_do_not_invent_effects(paired, n, effect):
    rng = np.random.default_rng(2)
    found = [compare.compare(*synthetic(rng, n, paired, effect), RETURN, None) for _ in range(1_000)]
    assert {pair.paired for pair in found} == {paired}
    judged = [pair.judgement for pair in found]
    assert 930 <= sum(one.low <= effect <= one.high for one in judged) <= 970
    if effect == 0:
        assert sum(one.verdict in ("raised", "lowered") for one in judged) <= 60
    elif paired and n == 5:
        assert sum(one.verdict == "raised" for one in judged) >= 900  # two standard deviations and a half are seen


def test_unpaired_intervals_of_a_paired_experiment_would_be_much_wider():
    rng = np.random.default_rng(0)
    without = 1_000 + 300 * rng.normal(size=5)
    injected = without + 100 + 20 * rng.normal(size=5)
    paired, welch = judge(without, injected, True), judge(without, injected, False)
    assert paired.verdict == "raised" and welch.verdict == "no evidence"
    assert paired.difference == pytest.approx(welch.difference) and welch.high - welch.low > 5 * (paired.high - paired.low)


def test_verdicts_say_what_the_interval_says():
    without, up = np.array([100.0, 110, 120]), np.array([203.0, 211, 219])
    assert judge(without, up, True).sentence == "injection raised the return by 101 [96, 106]: evidence of lost plasticity"
    down = judge(up, without, True)
    assert down.sentence == "injection lowered the return by 101 [96, 106]" and (down.verdict, down.difference) == (
        "lowered",
        -101,
    )
    same = judge(without, np.array([103.0, 109, 121]), True)
    assert same.sentence == "no evidence of lost plasticity: the return changed by 1.00 [−3.97, 5.97]"
    low, high = scipy.stats.ttest_ind(up, without, equal_var=False).confidence_interval(0.95)
    assert (judge(without, up, False).low, judge(without, up, False).high) == (low, high)


def test_verdicts_on_other_interventions_say_which_and_claim_nothing_about_plasticity():
    without, up, same = np.array([100.0, 110, 120]), np.array([203.0, 211, 219]), np.array([103.0, 109, 121])
    reset, shrink = "reset-head", "shrink-perturb"
    assert judge(without, up, True, reset).sentence == "resetting the head raised the return by 101 [96, 106]"
    assert judge(up, without, True, shrink).sentence == "shrink and perturb lowered the return by 101 [96, 106]"
    unclear = "changed the return: it changed by 1.00 [−3.97, 5.97]"
    assert judge(without, same, True, reset).sentence == f"no evidence that resetting the head {unclear}"
    assert judge(without, same, True, shrink).sentence == f"no evidence that shrink and perturb {unclear}"
    assert "3 without and 2 with intervention" in judge(without, up[:2], False, reset).sentence


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (0, 3), (2, 2)])
def test_below_three_seeds_of_either_arm_there_is_no_verdict(sizes):
    rng = np.random.default_rng(0)
    judged = judge(rng.normal(size=sizes[0]), 1e6 + rng.normal(size=sizes[1]), False)
    assert judged.verdict == "too few seeds" and judged.sentence.startswith("too few seeds to say")
    assert np.isnan(judged.low) and np.isnan(judged.high)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("change", [0.0, 0.3])
@pytest.mark.parametrize("paired", [True, False])
def test_without_any_spread_there_is_no_interval_rather_than_an_infinitely_sure_one(change, paired):
    without = np.array([0.1, 0.7, 1.3]) if paired else np.full(3, 0.1)
    judged = judge(without, without + change, paired)
    assert judged.verdict == "no interval" and f"changed by {show(change)} with every seed" in judged.sentence


def test_numbers_are_shown_to_three_digits():
    assert show(1234.5, -0.5, 98765.4) == "1,234 [0, 98,765]"
    assert show(1.234, -0.5, 2) == "1.23 [−0.50, 2.00]" and show(0.01234) == "0.0123" and show(0.0) == "0"


def test_steps_are_shown_in_thousands_and_millions():
    steps = (0, 802, 1_000, 400_000, 12_500_000, 12_345_678, 5_000_001)
    assert [short(step) for step in steps] == ["0", "802", "1k", "400k", "12.5M", "12,345,678", "5,000,001"]


def run_of(folder="a", **args):
    return Run(folder, Args(**args), {RETURN: np.array([[1.0], [0.0]])})


def test_arms_differ_in_what_is_learned_and_not_in_seed_names_logging_or_length():
    same = [{"seed": 2}, {"exp_name": "b"}, {"cuda": False}, {"eval_frequency": 10}, {"plasticity_frequency": 0},
            {"fork": "runs/x/checkpoint-5"}, {"eval_episodes": 0, "eval_steps": 100},
            {"total_timesteps": 30_000_000, "exploration_fraction": 0.05}]  # fmt: skip
    other = [
        {"injection_step": (5,)},
        {"learning_rate": 1e-3},
        {"num_envs": 2},
        {"total_timesteps": 30_000_000},
        {"bf16": True},
        {"optimizer": "rmsprop"},
        {"exploration_start": 5},
    ]
    assert all(setting(Args(**args)) == setting(Args()) for args in same)
    assert all(setting(Args(**args)) != setting(Args()) for args in other)


def test_what_a_baseline_does_not_use_does_not_make_it_another_arm():
    baseline = {"apply_injection": False, "injection_step": (5,)}
    arms, _ = group([run_of("a", **baseline), run_of("b", seed=2, injection_step=()), run_of("c", seed=3, freeze_heads=False)])
    assert [(arm.name, len(arm.runs)) for arm in arms] == [("no injection", 3)]
    arms, _ = group([run_of("a", injection_step=(5,)), run_of("b", injection_step=(5,), freeze_heads=False)])
    assert len(arms) == 2


NORM = {"injection_trigger": "norm", "injection_step": ()}


@pytest.mark.parametrize(
    "args",
    [
        {"intervention": "none", "injection_step": (5,), "injection_optimizer_state": "copy", "shrink_factor": 0.5},
        {"apply_injection": False, "injection_step": (5,), "freeze_heads": False},
        {"apply_injection": False, **NORM, "injection_norm_ratio": 2.0, "max_injections": 3, "injection_check_frequency": 7},
        {"intervention": "none", **NORM},
    ],
)
def test_everything_about_an_intervention_that_never_comes_is_no_difference(args):
    assert setting(Args(**args)) == setting(Args())


def test_human_scores_are_those_of_their_games():
    found = {game: compare.HUMAN_SCORES[game] for game in ("phoenix", "seaquest", "skiing", "double_dunk", "zaxxon", "alien")}
    assert found == {
        "phoenix": (761.4, 7242.6),
        "seaquest": (68.4, 42054.7),
        "skiing": (-17098.1, -4336.9),
        "double_dunk": (-18.6, -16.4),
        "zaxxon": (32.5, 9173.3),
        "alien": (227.8, 7127.7),
    }
    weighted = sum(i * (random + human) for i, (_, (random, human)) in enumerate(sorted(compare.HUMAN_SCORES.items())))
    assert round(weighted, 1) == 18480979.4, "rows were not swapped"


def test_what_an_intervention_and_its_trigger_look_at_is_a_difference():
    copied, reset = ({"injection_step": (5,), "injection_optimizer_state": state} for state in ("copy", "reset"))
    assert setting(Args(**reset)) == setting(Args(injection_step=(5,))), "with frozen heads it trains as keep"
    reset["freeze_heads"] = False
    arms = [{"injection_step": (5,)}, copied, reset, {"injection_step": (5,), "intervention": "reset-head"}]
    arms += [{"injection_step": (5,), "intervention": "shrink-perturb", "shrink_factor": factor} for factor in (0.5, 0.8)]
    arms += [NORM, NORM | {"injection_norm_ratio": 2.0}, NORM | {"injection_check_frequency": 7}, NORM | {"max_injections": 2}]
    arms += [NORM | {"intervention": "reset-head"}]
    settings = [setting(Args(**args)) for args in arms]
    assert all(one != other for i, one in enumerate(settings) for other in [*settings[:i], setting(Args())])
    assert settings[0]["injection"] == (5,) and settings[6]["injection"] == ()
    assert [settings[i]["intervention"] for i in (0, 3, 4, 6)] == ["injection", "reset-head", "shrink-perturb", "injection"]


def test_interventions_are_named_and_in_their_company_a_baseline_is_one_without_intervention():
    at, names = (
        {"injection_step": (5_000_000,)},
        lambda *runs: [arm.name for arm in group([run_of(**args) for args in runs])[0]],
    )
    reset, shrink = at | {"intervention": "reset-head"}, at | {"intervention": "shrink-perturb"}
    assert names(reset, {}, shrink, NORM, at) == [
        "no intervention",
        "injection where the norm has grown 3×",
        "head reset at 5M",
        "injection at 5M",
        "shrink and perturb at 5M",
    ]
    assert names(NORM | {"injection_norm_ratio": 2.5}, {}) == ["no injection", "injection where the norm has grown 2.5×"]
    assert names(shrink | {"shrink_factor": 0.5}, shrink)[0] == "shrink and perturb at 5M, shrink factor 0.5"
    several = {"injection_step": (5, 7), "intervention": "reset-head"}
    assert names(several) == ["head resets at 5 and 7"]
    copied, reset = (at | {"injection_optimizer_state": state, "freeze_heads": state == "copy"} for state in ("copy", "reset"))
    assert names({}, copied, reset)[1:] == [
        "injection at 5M, optimizer state copied",
        "injection at 5M, optimizer state reset, all heads trained",
    ]
    assert names(NORM, NORM | {"max_injections": 2})[1].endswith("3×, max injections 2")


def test_arms_are_named_by_what_sets_them_apart():
    runs = [
        run_of(injection_step=(5_000_000, 12_500_000)),
        run_of(injection_step=(5_000_000,)),
        run_of(injection_step=(5_000_000,), freeze_heads=False),
        run_of(),
    ]
    names = ["no injection", "injection at 5M", "injection at 5M, all heads trained", "injections at 5M and 12.5M"]
    assert [arm.name for arm in group(runs)[0]] == names
    names = ["no injection", "injection at 400k, all heads trained"]
    assert [arm.name for arm in group([run_of(injection_step=(400_000,), freeze_heads=False), run_of()])[0]] == names
    names = ["no injection, bf16, num envs 8", "no injection, no bf16, num envs 1"]
    assert [arm.name for arm in group([run_of(), run_of(bf16=True, num_envs=8)])[0]] == names


def test_a_seed_counts_once_per_arm_and_the_later_folder_is_named():
    folders = write_arms()
    again = write_run("again", {RETURN: games(1, 7)}, seed=1, apply_injection=False)
    content = compared(*folders, again)
    assert list(content["left_out"]) == [again] and folders[0] in content["left_out"][again]
    assert len(content["comparisons"][0]["without"]["means"]) == 3
    assert not compared(*folders, folders[0])["left_out"]  # one folder, given twice


def test_of_two_runs_with_one_arm_and_seed_the_longer_counts_whichever_comes_first():
    short, whole = (write_run(str(upto), {RETURN: games(1, 1, upto=upto)}, upto) for upto in (1_500, 2_000))
    for folders in ((short, whole), (whole, short)):
        arms, left_out = group([read_run(folder, RETURN) for folder in folders])
        assert [run.folder for run in arms[0].runs] == [whole] and list(left_out) == [short]


def test_only_arms_that_differ_in_nothing_but_the_injection_are_compared(capsys):
    runs = [write_run(f"a{seed}", {RETURN: games(seed, 0)}, seed=seed, apply_injection=False) for seed in (1, 2, 3)]
    runs += [write_run(f"b{seed}", {RETURN: games(seed, 1)}, seed=seed, learning_rate=1e-3) for seed in (1, 2, 3)]
    assert compared(*runs)["comparisons"] == []
    assert "no verdict" in capsys.readouterr().out and "nothing to compare with" in Path("comparison.md").read_text()
    runs += [write_run(f"c{seed}", {RETURN: games(seed, 2)}, seed=seed, freeze_heads=False) for seed in (1, 2, 3)]
    (comparison,) = compared(*runs)["comparisons"]
    assert set(comparison["with"]["means"]) == {"1", "2", "3"} and "learning rate 0.001" not in comparison["with"]["arm"]


def test_runs_that_share_their_history_are_paired():
    found = verdict(*write_arms(effect=5.0))
    assert found["paired"] and found["verdict"] == "raised"
    assert found["interval"][0] < found["difference"] < found["interval"][1] < 8  # though seeds spread by 10


@pytest.mark.parametrize("change", ["value", "step", "missing", "all"])
def test_runs_whose_logs_differ_before_the_injection_are_not_paired(change):
    folders = []
    for seed in (1, 2, 3):
        points = games(seed, 1, 5.0)
        altered = {
            "value": [(points[0][0], points[0][1] + 1e-4), *points[1:]],
            "step": [(points[0][0] + 1, points[0][1]), *points[1:]],
            "missing": points[1:],
            "all": points[10:],
        }[change]
        baseline = games(seed, 0)[10 if change == "all" else 0 :]  # nothing before the injection is no history
        folders.append(write_run(f"b{seed}", {RETURN: baseline}, seed=seed, apply_injection=False))
        folders.append(write_run(f"i{seed}", {RETURN: altered}, seed=seed))
    found = verdict(*folders)
    assert not found["paired"] and found["verdict"] == "no evidence"
    assert "Welch" in (text := Path("comparison.md").read_text()) and "which do not share their history" in text


@pytest.mark.parametrize(("origin", "paired"), [("b{}", True), ("b9", False), (None, False), ("common", True)])
def test_where_no_game_ended_before_the_injection_lineage_decides(origin, paired):
    folders = []
    for seed in (1, 2, 3):
        source = {"common": f"runs/c{seed}/checkpoint-500"}.get(origin)
        forked = source or (origin and f"runs/{origin.format(seed)}/checkpoint-{INJECTION}")
        baseline = {"seed": seed, "apply_injection": False, "fork": source}
        folders.append(write_run(f"b{seed}", {RETURN: games(seed, 0)[10:]}, **baseline))
        folders.append(write_run(f"i{seed}", {RETURN: games(seed, 1)[10:]}, seed=seed, fork=forked))
    assert verdict(*folders)["paired"] == paired


def test_three_paired_seeds_are_preferred_to_more_that_are_not_and_those_are_named():
    folders = write_arms((1, 2, 3))
    alone = write_run("alone", {RETURN: games(9, 1)}, seed=9)
    found = verdict(*folders, alone)
    assert found["paired"] and set(found["with"]["means"]) == {"1", "2", "3"} and list(found["left_out"]) == [alone]


def test_two_paired_seeds_are_not_preferred_to_more_that_are_not():
    folders = write_arms((1, 2))
    folders += [write_run("b9", {RETURN: games(9, 0)}, seed=9, apply_injection=False)]
    folders += [write_run("i8", {RETURN: games(8, 1)}, seed=8)]
    found = verdict(*folders)
    assert not found["paired"] and not found["left_out"]
    assert (set(found["without"]["means"]), set(found["with"]["means"])) == ({"1", "2", "9"}, {"1", "2", "8"})
    assert "of which 2 share a history, too few to pair" in Path("comparison.md").read_text()


@pytest.mark.parametrize("window", [None, 500])
def test_the_window_begins_after_the_injection_and_ends_with_its_last_step(window):
    end = TOTAL if window is None else INJECTION + window
    points = [(500, 7.0), (INJECTION, 1e6), (INJECTION + 1, 10.0), (end, 20.0), *([(end + 1, 1e6)] if window else [])]
    folders = [
        write_run(f"{seed}-{i}", {RETURN: points}, seed=seed, apply_injection=i) for seed in (1, 2, 3) for i in (False, True)
    ]
    found = verdict(*folders, window=window)
    assert found["window"] == {"after": INJECTION, "upto": end, "ended_by": None}
    assert found["without"]["means"] == {"1": 15.0, "2": 15.0, "3": 15.0} and found["without"]["points"] == 6


def test_the_window_of_several_injections_begins_at_the_first():
    folders = write_arms(injection_step=(INJECTION, 2_000))
    assert verdict(*folders)["window"]["after"] == INJECTION


def test_an_unfinished_run_ends_the_window_of_all_and_is_named(capsys):
    folders = write_arms()
    going = write_run("going", {RETURN: games(4, 1, upto=2_000)}, last=2_050, seed=4)
    whole = write_run("whole", {RETURN: games(4, 0)}, seed=4, apply_injection=False)
    content = compared(*folders, going, whole)
    (found,) = content["comparisons"]
    assert found["window"]["upto"] == 2_050 and set(found["with"]["means"]) == {"1", "2", "3", "4"}
    assert found["window"]["ended_by"] == going and f"2,050, where {going} is" in Path("comparison.md").read_text()
    assert content["unfinished"] == {going: f"{going} is at step 2,050 of 3,000"}
    assert "at step 2,050 of 3,000" in capsys.readouterr().out


def test_a_run_that_has_not_reached_the_end_of_a_stated_window_is_left_out_and_named():
    folders = write_arms()
    going = write_run("going", {RETURN: games(4, 1, upto=2_000)}, last=2_050, seed=4)
    found = verdict(*folders, going, window=1_500)
    assert list(found["left_out"]) == [going] and found["window"]["upto"] == 2_500
    assert verdict(*folders, going, window=1_050)["paired"]  # and named there for having no counterpart


def test_a_run_before_its_injection_neither_counts_nor_shortens_the_window():
    folders = write_arms()
    early = write_run("early", {RETURN: games(4, 1, upto=900)}, last=INJECTION, seed=4)
    found = verdict(*folders, early)
    assert list(found["left_out"]) == [early] and found["window"]["upto"] == TOTAL


def test_before_any_injection_there_are_too_few_seeds_and_every_run_is_named():
    folders = [write_run(str(i), {RETURN: games(1, 0, upto=900)}, last=INJECTION, apply_injection=i) for i in (False, True)]
    found = verdict(*folders)
    assert found["verdict"] == "too few seeds" and found["without"]["means"] == {}
    assert all("not got beyond the injection" in found["left_out"][folder] for folder in folders)


def test_a_run_without_a_game_in_the_window_is_left_out_and_named():
    folders = write_arms()
    silent = write_run("silent", {RETURN: games(4, 1)[:10]}, seed=4)
    found = verdict(*folders, silent)
    assert "in the window" in found["left_out"][silent] and found["window"]["upto"] == TOTAL


def test_every_intervention_is_compared_with_the_arm_without_any():
    folders = write_arms()
    for seed in (1, 2, 3):
        points = {RETURN: games(seed, 2, -50.0)}
        folders.append(write_run(f"reset-{seed}", points, seed=seed, intervention="reset-head"))
    injected, reset = sorted(compared(*folders)["comparisons"], key=lambda found: found["verdict"] == "lowered")
    assert injected["sentence"].startswith("injection raised") and injected["with"]["arm"] == "injection at 1k"
    assert reset["sentence"].startswith("resetting the head lowered") and reset["with"]["arm"] == "head reset at 1k"
    assert injected["without"] == reset["without"] and reset["without"]["arm"] == "no intervention"
    assert "up to the intervention" in Path("comparison.md").read_text()


def write_norm_arms(firsts, upto=TOTAL):
    """Runs without, and with injections {seed: steps} that the norm decided, of one history up to the seed's first."""
    folders = []
    for seed, steps in firsts.items():
        baseline, later, first = games(seed, 0, upto=upto), games(seed, 1, 50.0, upto=upto), min(steps, default=TOTAL)
        points = baseline[: first // 100] + later[first // 100 :]
        logged = {"injection/step": [(step, float(step)) for step in steps]} if steps else {}
        folders.append(write_run(f"n{seed}", {RETURN: points, **logged}, upto, seed=seed, **NORM))
        folders.append(write_run(f"b{seed}", {RETURN: baseline}, upto, seed=seed, apply_injection=False))
    return folders


def test_where_the_norm_decides_the_window_begins_at_the_latest_first_injection_of_all_runs():
    found = verdict(*write_norm_arms({1: [1_200, 2_600], 2: [1_700], 3: [1_500, 2_900]}))
    assert found["window"] == {"after": 1_700, "upto": TOTAL, "ended_by": None} and found["verdict"] == "raised"
    assert found["first_injections"] == {"1": 1_200, "2": 1_700, "3": 1_500}
    assert "first injection at 1,200 with seed 1, 1,700 with seed 2, 1,500 with seed 3" in Path("comparison.md").read_text()


def test_each_seed_shares_its_history_up_to_its_own_first_injection():
    folders = write_norm_arms({1: [1_200], 2: [1_700], 3: [1_500]})
    assert verdict(*folders)["paired"]  # though the runs of seeds 1 and 3 differ before the window
    other = [(100, 0.0), *games(3, 0)[1:]]
    folders[5] = write_run("other", {RETURN: other}, seed=3, apply_injection=False)
    assert not verdict(*folders)["paired"]


def test_a_run_that_the_norm_has_not_injected_yet_is_left_out_named_and_does_not_shorten_the_window():
    early = write_norm_arms({4: []}, upto=2_000)[0]
    found = verdict(*write_norm_arms({1: [1_200], 2: [1_700], 3: [1_500]}), early)
    assert (
        found["left_out"] == {early: f"{early} has not been injected yet: the verdict is on runs that had"}
        and found["window"]["upto"] == TOTAL
    )
    assert set(found["with"]["means"]) == {"1", "2", "3"}
    assert verdict(*write_norm_arms({5: []}))["verdict"] == "too few seeds"


def test_figures_mark_every_injection_that_was_logged_where_the_norm_decides_and_those_planned_otherwise():
    def marks(folders):
        arms, _ = compare.read_arms(folders, RETURN)
        figure, ax = plt.subplots()
        compare.draw(ax, arms, {arm.name: "k" for arm in arms}, RETURN, 30, "mean")
        plt.close(figure)
        return [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2], ax.get_legend_handles_labels()[1][-1]

    assert marks(write_norm_arms({1: [1_200, 2_600], 2: [1_700], 3: []})) == ([1_200, 1_700, 2_600], "injection")
    assert marks(write_arms()) == ([INJECTION], "injection")
    reset = write_run("reset", {RETURN: games(7, 1)}, seed=7, intervention="reset-head")
    assert marks([reset]) == ([INJECTION], "intervention")


def test_the_human_scores_are_of_the_57_games_and_every_one_is_registered():
    registered = {spec.kwargs["game"] for spec in gym.registry.values() if "game" in spec.kwargs}
    assert len(HUMAN_SCORES) == 57 and set(HUMAN_SCORES) <= registered
    assert all(random < human for random, human in HUMAN_SCORES.values())
    assert sum(map(sum, HUMAN_SCORES.values())) == pytest.approx(657_359.1)  # of the source's table


def test_human_normalised_scores_put_random_play_at_0_and_a_human_at_1_whatever_the_id():
    for env_id in ("PhoenixNoFrameskip-v4", "ALE/Phoenix-v5"):
        assert human_normalised(env_id, 761.4) == 0 and human_normalised(env_id, 7242.6) == 1
        assert human_normalised(env_id, 4002.0) == pytest.approx(0.5)
    assert human_normalised("ALE/YarsRevenge-v5", 3092.9 + 2 * 51484) == pytest.approx(2)
    assert human_normalised("ALE/Tetris-v5", 100.0) is None and human_normalised("NotAGame-v0", 100.0) is None


def plain_iqm(values):
    cut = len(values) // 4
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept)


def test_aggregates_are_those_of_a_plain_loop_over_resamples_and_games():
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
    np.testing.assert_allclose(aggregate_scores(without, injected, joint, 300), expected)


def test_aggregates_of_runs_that_do_not_spread_within_their_games_have_no_width():
    levels = [0.0, 1.0, 2.0, 3.0, 100.0]
    one_each = aggregate_scores([np.array([x]) for x in levels], [np.array([x + 0.5]) for x in levels], [False] * 5)
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


def write_games(*env_ids, seeds=(1, 2, 3), **args):
    """Runs with and without injection in every game."""
    return [
        write_run(f"{env_id.replace('/', '-')}-{seed}-{injected}-{len(args)}", {RETURN: games(seed, injected, 50.0 * injected)},
                  seed=seed, apply_injection=injected, env_id=env_id, **args)
        for env_id in env_ids for seed in seeds for injected in (False, True)
    ]  # fmt: skip


PHOENIX, ALIEN, TETRIS = "PhoenixNoFrameskip-v4", "AlienNoFrameskip-v4", "ALE/Tetris-v5"


def test_comparisons_of_several_games_are_aggregated_and_shown_everywhere(capsys):
    folders = write_games(PHOENIX, seeds=(1, 2, 3, 4)) + write_games(ALIEN)
    content = compared(*folders)
    (total,) = content["aggregates"]
    pairs = content["comparisons"]
    sides = [
        [
            np.array([human_normalised(found["game"], mean) for mean in found[side]["means"].values()])
            for found in pairs
        ]
        for side in ("without", "with")
    ]  # fmt: skip
    expected = aggregate_scores(*sides, [True, True])
    shown = [total["without"], total["with"], {"iqm": total["difference"], "interval": total["interval"]}]
    np.testing.assert_allclose([[one["iqm"], *one["interval"]] for one in shown], expected)
    assert total["games"] == [PHOENIX, ALIEN] and (total["without"]["runs"], total["with"]["runs"]) == (7, 7)
    assert (total["without"]["arm"], total["with"]["arm"]) == ("no injection", "injection at 1k")
    printed, text = capsys.readouterr().out, Path("comparison.md").read_text()
    windows = [f"{game} in 1,000 < step ≤ 3,000" for game in (PHOENIX, ALIEN)]
    line = f"over 2 games ({', '.join(windows)}) and 7 runs without and 7 with"
    assert total["windows"] == 2 * [{"after": INJECTION, "upto": TOTAL}]
    for output in (printed, text):
        assert line in output and "which cover less than that with few runs per game" in output
        assert all(show(*row) in output for row in expected)


def test_the_table_and_the_numbers_have_the_human_normalised_mean_of_every_arm():
    content = compared(*write_games(PHOENIX, TETRIS))
    phoenix, tetris = content["comparisons"]
    for side in ("without", "with"):
        score = (np.mean(list(phoenix[side]["means"].values())) - 761.4) / (7242.6 - 761.4)
        assert phoenix[side]["human_normalised"] == pytest.approx(score) and tetris[side]["human_normalised"] is None
        row = next(row for row in Path("comparison.md").read_text().splitlines() if phoenix[side]["arm"] in row)
        assert row.endswith(f"| {show(score)} |")
    rows = Path("comparison.md").read_text().splitlines()
    assert rows[0].endswith("| human-normalised |") and rows[4].startswith(f"| {TETRIS} ") and rows[4].endswith("| – |")


def test_one_game_is_aggregated_in_the_numbers_only(capsys):
    (total,) = compared(*write_games(PHOENIX))["aggregates"]
    assert total["games"] == [PHOENIX] and total["without"]["runs"] == 3
    assert "games (" not in capsys.readouterr().out + Path("comparison.md").read_text()


def test_games_without_a_human_score_or_a_run_on_one_side_are_left_out_of_the_aggregate_and_named(capsys):
    pong = write_run("pong", {RETURN: games(1, 0)}, env_id="PongNoFrameskip-v4", apply_injection=False)
    early = write_run("early", {RETURN: games(1, 1, upto=900)}, last=900, env_id="PongNoFrameskip-v4")
    tetris = variant("TetrisNoFrameskip-v5", PHOENIX, game="tetris")
    (total,) = compared(*write_games(PHOENIX, ALIEN, tetris), pong, early)["aggregates"]
    reasons = {"PongNoFrameskip-v4": "no run in the window on one side", tetris: "no human score is known"}
    assert total["games"] == [PHOENIX, ALIEN] and total["left_out"] == reasons
    printed = capsys.readouterr().out
    assert all(f"not in this aggregate: {game}, {reason}" in printed for game, reason in reasons.items())


def test_only_comparisons_that_differ_in_nothing_but_the_game_are_aggregated():
    folders = write_games(PHOENIX, ALIEN) + write_games(PHOENIX, ALIEN, learning_rate=1e-3) + write_games("ALE/Pong-v5")
    totals = compared(*folders)["aggregates"]
    found = sorted((total["games"], "0.001" in total["with"]["arm"]) for total in totals)
    sticky = ["ALE/Pong-v5"]  # its actions may be repeated
    assert found == sorted([(sticky, False), ([PHOENIX, ALIEN], False), ([PHOENIX, ALIEN], True)])


def test_the_metric_may_be_the_return_of_evaluations():
    folders = []
    for seed in (1, 2, 3):
        for injected in (False, True):
            evaluations = [(500, 1e6), (1_500, seed + injected * (5.0 + seed)), (2_500, seed + injected * 5.0)]
            points = {RETURN: games(seed, injected), "eval/episodic_return": evaluations}
            folders.append(write_run(f"{seed}{injected}", points, seed=seed, apply_injection=injected))
    found = verdict(*folders, metric="eval/episodic_return")
    assert found["with"]["means"] == {"1": 6.5, "2": 8.0, "3": 9.5} and found["paired"]


def event_file(folder):
    (path,) = Path(folder).glob("events.out.tfevents.*")
    return path


def test_every_scalar_is_read_several_at_one_step_included():
    points = {RETURN: [(100, 1.5), (100, -2.5), (100, 1.5), (2**40, 3.0)], "losses/td_loss": [(7, float("nan"))]}
    run = read_run(write_run("a", points), RETURN)
    assert run.scalars[RETURN].tolist() == [[100, 100, 100, 2**40], [1.5, -2.5, 1.5, 3.0]]
    assert run.last_step == 2**40 and np.isnan(run.scalars["losses/td_loss"][1]).all()


def test_several_event_files_are_one_log_in_the_order_of_their_names():
    folder = write_run("a", {RETURN: [(100, 1.0), (200, 2.0)]})
    data = event_file(folder).read_bytes()
    start = 0
    for _ in range(3):  # the file's version, the session's start, the first game
        start += 16 + int.from_bytes(data[start : start + 8], "little")
    event_file(folder).unlink()
    for name, content in (("2", data[start:]), ("1", data[:start]), ("0", b"")):
        Path(folder, f"events.out.tfevents.{name}").write_bytes(content)
    assert read_run(folder, RETURN).scalars[RETURN].tolist() == [[100, 200], [1.0, 2.0]]


def test_a_file_that_begins_the_run_again_replaces_the_older_ones():
    folder = write_run("a", {RETURN: [(100, 1.0)]})
    data = event_file(folder).read_bytes()
    Path(folder, "events.out.tfevents.9").write_bytes(data)
    assert read_run(folder, RETURN).scalars[RETURN].shape == (2, 1)


def test_a_log_cut_anywhere_is_read_up_to_its_last_whole_point():
    folder = write_run("a", {RETURN: [(step, float(step)) for step in range(1, 6)]})
    path, data = event_file(folder), event_file(folder).read_bytes()
    lengths = set()
    for size in range(len(data), 0, -1):
        path.write_bytes(data[:size])
        try:
            steps, values = read_run(folder, RETURN).scalars[RETURN]
        except UsageError as error:
            assert "no charts/episodic_return yet" in str(error)
        else:
            assert steps.tolist() == values.tolist() == list(range(1, len(steps) + 1))
            lengths.add(len(steps))
    assert lengths == {1, 2, 3, 4, 5}


def test_no_changed_byte_of_a_log_goes_unnoticed():
    folder = write_run("a", {RETURN: [(1, 1.0), (2, 2.0)]})
    path, data = event_file(folder), event_file(folder).read_bytes()
    whole = read_run(folder, RETURN).scalars[RETURN]
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(UsageError, match=r"TensorBoard event file \(ValueError: damaged at byte"):
            read_run(folder, RETURN)
    path.write_bytes(data)
    assert np.array_equal(read_run(folder, RETURN).scalars[RETURN], whole)


def broken(kind):
    """A run's folder with something wrong about it, and a word of the reason."""
    folder = Path(write_run("broken", {RETURN: [(100, 1.0)]}, seed=5))
    if kind == "no folder":
        return "runs/nowhere", "no run.json"
    if kind == "no run.json":
        (folder / "run.json").unlink()
    elif kind == "cut run.json":
        (folder / "run.json").write_text('{"run": "x", "args": {"se')
    elif kind == "foreign run.json":
        (folder / "run.json").write_text('{"run": "x", "args": {"colour": "red"}}')
    elif kind == "empty log":
        event_file(folder).write_bytes(b"")
    elif kind == "no log":
        event_file(folder).unlink()
    elif kind == "garbage":
        event_file(folder).write_bytes(bytes(range(256)))
    elif kind == "NaN":
        return write_run("nan", {RETURN: [(2_000, float("nan"))]}, seed=5), "not finite"
    reason = {"no run.json": "no run.json", "cut run.json": "JSONDecodeError", "foreign run.json": "TypeError"}
    return str(folder), reason.get(kind, "damaged at byte 0" if kind == "garbage" else "no charts/episodic_return yet")


KINDS = ("no folder", "no run.json", "cut run.json", "foreign run.json", "empty log", "no log", "garbage", "NaN")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_run_is_named_with_the_reason_and_the_others_are_compared(kind, capsys):
    folder, reason = broken(kind)
    content = compared(folder, *write_arms())
    assert list(content["left_out"]) == [folder] and reason in content["left_out"][folder]
    assert content["comparisons"][0]["verdict"] == "raised"
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: "))
    assert folder in line and reason in line
    with pytest.raises(UsageError, match="give folders of runs"):
        report(Settings((folder,)))


def test_curves_are_means_of_bins_whose_upper_edge_belongs_to_them():
    edges = np.linspace(0, 40, 5)
    points = np.array([[1, 10, 11, 31, 32], [1, 3, 10, 20, np.nan]], float)
    np.testing.assert_array_equal(curve(points, edges), [2, 10, 15, 20])  # the third is between its neighbours
    np.testing.assert_array_equal(curve(points[:, 2:3], edges), [np.nan, 10, np.nan, np.nan])  # never beyond them
    np.testing.assert_array_equal(curve(np.array([[0.0], [5.0]]), edges), [5, np.nan, np.nan, np.nan])
    assert np.isnan(curve(points[:, 4:], edges)).all()


def test_intervals_of_curves_are_scipys_at_every_point():
    values = np.random.default_rng(0).normal(size=(5, 4))
    mean, low, high = interval(values)
    for i in range(4):
        expected = scipy.stats.ttest_1samp(values[:, i], 0).confidence_interval(0.95)
        assert (mean[i], low[i], high[i]) == pytest.approx((values[:, i].mean(), *expected))
    iqm, low, high = interval(values, "iqm")
    np.testing.assert_allclose(iqm, np.sort(values, axis=0)[1:4].mean(axis=0))
    assert (low < iqm).all() and (iqm < high).all() and (low >= values.min(axis=0)).all()
    assert np.isnan(interval(values[:2])[1:]).all() and np.isnan(interval(values[:2], "iqm")[1:]).all()


PLASTICITY = {"plasticity/dormant_fraction": 0.2, "plasticity/srank/encoder": 90.0, "plasticity/weight_norm_ratio/head": 1.5}


def test_figures_table_and_numbers_are_written_and_agree(capsys, monkeypatch):
    figures = {}
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **_: figures.update({Path(path).name: figure}))
    monkeypatch.setattr(plt, "close", lambda figure: None)
    folders = []
    for game in ("PhoenixNoFrameskip-v4", "PongNoFrameskip-v4"):
        for seed in (1, 2, 3):
            for injected in (False, True):
                measures = {tag: [(step, value) for step in range(200, TOTAL, 200)] for tag, value in PLASTICITY.items()}
                points = {RETURN: games(seed, injected, 50.0 * injected), **measures}
                folders.append(write_run(f"{game}{seed}{injected}", points, seed=seed, apply_injection=injected, env_id=game))
    report(Settings(tuple(folders), out="img/x.png"))
    content, table = json.loads(Path("img/x.json").read_text()), Path("img/x.md").read_text()
    assert [found["game"] for found in content["comparisons"]] == ["PhoenixNoFrameskip-v4", "PongNoFrameskip-v4"]
    printed = capsys.readouterr().out
    for found in content["comparisons"]:
        without, injected = (np.array(list(found[side]["means"].values())) for side in ("without", "with"))
        assert found["difference"] == pytest.approx(np.mean(injected - without))
        assert found["sentence"] in table and found["sentence"] in printed
        row = f"| {found['game']} | injection at 1k | 1, 2, 3 | 3 | {show(*interval(injected))} "
        assert row + f"| {show(found['difference'], *found['interval'])} | raised |" in table
    assert set(figures) == {"x.png", "x_plasticity.png"}
    axes = figures["x.png"].axes
    assert [ax.get_title(loc="left") for ax in axes] == ["PhoenixNoFrameskip-v4", "PongNoFrameskip-v4"]
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels == ["no injection (n = 3)", "injection at 1k (n = 3)", "injection", "window of the verdict"]
    titles = [ax.get_title(loc="left") for ax in figures["x_plasticity.png"].axes]
    assert titles[:3] == titles[3:] and len(titles) == 6 and "dormant fraction" in titles


def test_no_window_is_shaded_where_one_side_has_no_run(monkeypatch):
    figures = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    report(Settings(tuple(write_norm_arms({1: []}))))
    report(Settings(tuple(write_norm_arms({2: [1_500]}))))
    shaded = ["window of the verdict" in ax.get_legend_handles_labels()[1] for figure in figures for ax in figure.axes]
    assert shaded == [False, True]


def test_the_thick_line_of_an_arm_ends_where_one_of_its_runs_does():
    folders = write_arms((1, 2, 3, 4))[:-2]
    folders.append(write_run("short", {RETURN: games(4, 1, upto=2_000)}, last=2_000, seed=4))
    arms, _ = compare.read_arms(folders, RETURN)
    figure, ax = plt.subplots()
    compare.draw(ax, arms, {arm.name: "k" for arm in arms}, RETURN, 30, "mean")
    ends = {line.get_label(): max(line.get_xdata()) for line in ax.lines if line.get_label()[0] != "_"}
    plt.close(figure)
    assert ends["no injection (n = 3)"] > 2_900 and 1_900 < ends["injection at 1k (n = 4)"] <= 2_000


@pytest.mark.parametrize("aggregate", ["mean", "iqm"])
def test_files_are_images_and_plasticity_is_drawn_only_where_it_was_measured(aggregate, capsys):
    report(Settings(tuple(write_arms()), aggregate=aggregate))
    assert plt.imread("comparison.png").shape[2] == 4 and not Path("comparison_plasticity.png").exists()
    printed = capsys.readouterr().out
    assert "no run has measured it" in printed
    assert printed.splitlines()[-1] == "wrote comparison.png, comparison.md, comparison.json"
    extra = write_run(
        "measured", {RETURN: games(4, 1), "plasticity/dormant_fraction": [(100, 0.5), (200, float("nan"))]}, seed=4
    )
    report(Settings((*write_arms((5,)), extra), aggregate=aggregate))
    assert plt.imread("comparison_plasticity.png").shape[2] == 4


def command(*arguments, code=None):
    """Runs the script, or `code` instead, as a user would."""
    start = ["-c", code] if code else [str(SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, env=environment)


def test_the_command_line_compares_and_refuses_in_one_line():
    done = command(*write_arms(), "--out", "new/folder/y.svg", "--window", "1500")
    assert done.returncode == 0 and done.stderr == ""
    assert "evidence of lost plasticity" in done.stdout and "window 1,000 < step ≤ 2,500" in done.stdout
    assert {path.name for path in Path("new/folder").iterdir()} == {"y.svg", "y.md", "y.json"}
    refused = command("runs/nowhere")
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1 and "give folders of runs" in refused.stderr


@pytest.mark.parametrize(
    ("settings", "fix"),
    [({"runs": ()}, "give folders"), ({"window": 0}, "--window"), ({"out": "x.jpeg"}, "--out"), ({"out": "runs"}, "--out")],
)
def test_settings_that_cannot_work_are_refused_with_the_fix(settings, fix):
    with pytest.raises(UsageError, match=fix):
        report(Settings(**{"runs": ("runs/a",), **settings}))


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package):
    done = command(code=f"import sys; sys.modules[{package!r}] = None; import compare")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {package}") and done.stderr.count("\n") == 1
    assert "pip install -r requirements-dev.txt" in done.stderr


def test_six_runs_of_a_tenth_of_full_length_are_read_in_a_tenth_of_the_time():
    tags = [f"losses/{i}" for i in range(5)]
    points = {tag: [(step, 1.0) for step in range(1_000, 1_500_001, 1_000)] for tag in tags}
    points |= {RETURN: points[tags[0]], "charts/episodic_length": points[tags[0]]}
    points |= {f"plasticity/{i}": [(step, 1.0) for step in range(50_000, 1_500_001, 50_000)] for i in range(30)}
    arms = [(seed, injected) for seed in (1, 2, 3) for injected in (False, True)]
    args = {"total_timesteps": 1_500_000, "injection_step": (500_000,)}
    folders = [write_run(f"{seed}{i}", points, seed=seed, apply_injection=i, **args) for seed, i in arms]
    memory, start = psutil.Process().memory_info().rss, time.process_time()
    runs = [read_run(folder, RETURN) for folder in folders]
    seconds, memory = time.process_time() - start, psutil.Process().memory_info().rss - memory
    assert sum(steps.shape[1] for run in runs for steps in run.scalars.values()) == 6 * (7 * 1_500 + 30 * 30 + 1)
    assert seconds < 2 and memory < 100e6
