"""What a verdict claims, on which runs, and over which window."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from simulated_runs import (
    INJECTION,
    NORM,
    PHOENIX,
    RETURN,
    TOTAL,
    games,
    known,
    make_arms,
    make_norm_arms,
    make_run,
)

from analysis import verdict as verdicts
from analysis.arms import Arm, RecordedRun, group
from analysis.curves import lineage_in
from analysis.verdict import compare_arms, comparisons, holm, not_compared, share_history, show, varied
from dqn_injection_atari import INTERVENTIONS, Args

EVALUATED = "eval/episodic_return"


def compared(*runs, metric=RETURN, window=None):
    return comparisons(group(list(runs), metric)[0], metric, window)


def verdict(*runs, **settings):
    """The only comparison of these runs."""
    (comparison,) = compared(*runs, **settings)
    return comparison


# what the numbers say


def judge(without, intervened, paired, intervention="injection"):
    return verdicts.judge(without, intervened, paired, intervention, same_capacity=True)


def synthetic(rng, n, paired, effect):
    """Arms of n runs of 10 games before and 10 after the injection; `effect` is the truth.

    Seeds differ in level. In a paired experiment two runs of a seed share it and their history, else they
    share nothing, and the returns that rise also spread.
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
            lineage = lineage_in({"folder": f"{seed}"}, ARGS[seed])
            runs.append(RecordedRun(f"{seed}", ARGS[seed], {RETURN: points}, lineage))
        intervention = {"intervention": "injection", "injection": (INJECTION,)}
        arms.append(Arm("", intervention if injected else {"intervention": "none", "injection": ()}, runs))
    return arms


ARGS = [Args(seed=seed, total_timesteps=2 * INJECTION) for seed in range(5)]


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.0, 150.0])
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("paired", [True, False], ids=["paired", "welch"])
def test_intervals_cover_the_truth_and_verdicts_do_not_invent_effects(paired, n, effect):
    rng = np.random.default_rng(2)
    found = [compare_arms(*synthetic(rng, n, paired, effect), RETURN, None) for _ in range(500)]
    assert {pair.paired for pair in found} == {paired}
    judged = [pair.judgement for pair in found]
    assert 460 <= sum(one.low <= effect <= one.high for one in judged) <= 490
    if effect == 0:
        assert sum(one.verdict in ("raised", "lowered") for one in judged) <= 35
    elif paired and n == 5:
        assert (
            sum(one.verdict == "raised" for one in judged) >= 450
        )  # two standard deviations and a half are seen


def test_unpaired_intervals_of_a_paired_experiment_would_be_much_wider():
    rng = np.random.default_rng(0)
    without = 1_000 + 300 * rng.normal(size=5)
    injected = without + 100 + 20 * rng.normal(size=5)
    paired, welch = judge(without, injected, True), judge(without, injected, False)
    assert paired.verdict == "raised" and welch.verdict == "no evidence"
    assert paired.difference == pytest.approx(welch.difference) and welch.high - welch.low > 5 * (
        paired.high - paired.low
    )


def test_verdicts_say_what_the_interval_says():
    without, up = np.array([100.0, 110, 120]), np.array([203.0, 211, 219])
    raised = judge(without, up, True)
    assert raised.sentence == "injection raised the return by 101 [96, 106]: evidence of lost plasticity"
    assert (raised.verdict, raised.difference) == ("raised", 101)
    down = judge(up, without, True)
    assert down.sentence == "injection lowered the return by 101 [96, 106]"
    assert (down.verdict, down.difference, down.low, down.high) == (
        "lowered",
        -101,
        -raised.high,
        -raised.low,
    )
    same = judge(without, np.array([103.0, 109, 121]), True)
    assert same.sentence == "no evidence of lost plasticity: the return changed by 1.00 [−3.97, 5.97]"
    assert same.verdict == "no evidence"
    low, high = scipy.stats.ttest_ind(up, without, equal_var=False).confidence_interval(0.95)
    assert (judge(without, up, False).low, judge(without, up, False).high) == (low, high)


def test_verdicts_on_other_interventions_say_which_and_claim_nothing_about_plasticity():
    without, up, same = np.array([100.0, 110, 120]), np.array([203.0, 211, 219]), np.array([103.0, 109, 121])
    reset, shrink = "reset-head", "shrink-perturb"
    assert judge(without, up, True, reset).sentence == "resetting the head raised the return by 101 [96, 106]"
    assert (
        judge(up, without, True, shrink).sentence == "shrink and perturb lowered the return by 101 [96, 106]"
    )
    unclear = "changed the return: it changed by 1.00 [−3.97, 5.97]"
    assert judge(without, same, True, reset).sentence == f"no evidence that resetting the head {unclear}"
    assert judge(without, same, True, shrink).sentence == f"no evidence that shrink and perturb {unclear}"
    assert "3 without and 2 with intervention" in judge(without, up[:2], False, reset).sentence


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (0, 3), (2, 2)])
def test_below_three_seeds_of_either_arm_there_is_no_verdict(sizes):
    rng = np.random.default_rng(0)
    judged = judge(rng.normal(size=sizes[0]), 1e6 + rng.normal(size=sizes[1]), False)
    few = f"too few seeds to say: {sizes[0]} without and {sizes[1]} with injection, it takes 3 of each"
    assert judged.verdict == "too few seeds" and judged.sentence == few
    assert np.isnan(judged.low) and np.isnan(judged.high)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("change", [0.0, 0.3])
@pytest.mark.parametrize("paired", [True, False])
def test_without_any_spread_there_is_no_interval_rather_than_an_infinitely_sure_one(change, paired):
    without = np.array([0.1, 0.7, 1.3]) if paired else np.full(3, 0.1)
    judged = judge(without, without + change, paired)
    assert judged.verdict == "no interval" and f"changed by {show(change)} with every seed" in judged.sentence


@pytest.mark.filterwarnings("error")
def test_a_spread_that_rounding_makes_is_none():
    without = np.array([0.1, 0.7, 1.1])
    assert np.ptp(without + 0.2 - without) > 0
    assert judge(without, without + 0.2, True).verdict == "no interval"


@pytest.mark.parametrize(
    "how", [{"injected_head_width": 1024}, {"injected_head_width": 64}, {"freeze_heads": False}]
)
def test_where_other_parameters_learn_than_before_a_verdict_claims_nothing_about_plasticity(how):
    raised, same = verdict(*make_arms(**how)).judgement, verdict(*make_arms(effect=0.0, **how)).judgement
    assert raised.verdict == "raised" and raised.sentence.startswith("injection raised the return by ")
    assert same.verdict == "no evidence" and same.sentence.startswith(
        "no evidence that injection changed the return: it "
    )
    assert "plasticity" not in raised.sentence + same.sentence


@pytest.mark.parametrize(
    "how",
    [{"injected_head_width": 512}, {"moments": "keep"}, {"injection_step": (1_000, 2_000)}],
)
def test_where_as_many_parameters_learn_as_before_it_does(how):
    assert verdict(*make_arms(**how)).judgement.sentence.endswith(": evidence of lost plasticity")


def naive_holm(p):
    """The least level at which each falls, where one after the other is tested until the first that stays."""
    corrected = []
    for value in p:
        others = sorted(p)
        steps = [(len(p) - k) * other for k, other in enumerate(others) if other <= value]
        corrected.append(min(1.0, max(steps)))
    return corrected


def test_several_p_are_corrected_as_holm_says():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # by hand
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.3]) == [0.3] and holm([]) == []
    rng = np.random.default_rng(0)
    for n in range(1, 8):
        p = [*(rng.random(n) ** 3).tolist(), 0.01, 0.01]
        assert holm(p) == pytest.approx(naive_holm(p))


def test_each_verdict_has_its_p_and_those_given_at_once_are_corrected_for_their_number():
    arms = [*make_arms(effect=2.0), *make_arms(effect=0.3, prefix="x", learning_rate=1e-3)]
    few = make_arms((1, 2), prefix="few", learning_rate=5e-4)  # no verdict, no p
    found = compared(*arms, *few)
    assert [pair.verdicts for pair in found if pair.shared == 3] == [2, 2]
    judged = [pair for pair in found if pair.shared == 3]
    for pair in judged:
        without, injected = (list(side.values()) for side in pair.means)
        assert pair.judgement.p == pytest.approx(scipy.stats.ttest_rel(injected, without).pvalue)
    assert [pair.p_holm for pair in judged] == pytest.approx(holm([pair.judgement.p for pair in judged]))
    (other,) = [pair for pair in found if pair.shared == 2]
    assert np.isnan(other.judgement.p) and np.isnan(other.p_holm)
    alone = verdict(*make_arms(effect=2.0))
    assert (
        alone.verdicts == 1 and alone.p_holm == alone.judgement.p and alone.judgement == judged[0].judgement
    )


def test_numbers_are_shown_to_three_digits():
    assert show(1234.5, -0.5, 98765.4) == "1,234 [0, 98,765]"
    assert show(1.234, -0.5, 2) == "1.23 [−0.50, 2.00]" and show(0.01234) == "0.0123" and show(0.0) == "0"


# which arms


def continuations(seeds=(1, 2, 3), fork=f"runs/agent/checkpoint-{INJECTION}"):
    """Runs with and without injection, all forked from one checkpoint."""
    history = games(7, 0)[: INJECTION // 100]
    later = {
        (seed, injected): games(seed, injected, 50.0 * injected)[INJECTION // 100 :]
        for seed in seeds
        for injected in (0, 1)
    }
    return [
        make_run(
            f"c{seed}-{injected}",
            {RETURN: history + points},
            seed=seed,
            intervention="injection" if injected else "none",
            fork=fork,
        )
        for (seed, injected), points in later.items()
    ]


def test_a_verdict_on_continuations_of_one_agent_says_so():
    found = verdict(*continuations())
    assert found.one_agent and found.paired
    assert found.judgement.sentence.endswith("; over continuations of one agent, not over agents")
    found = verdict(*make_arms())
    assert not found.one_agent and "one agent" not in found.judgement.sentence
    assert not verdict(*make_arms((1,))).one_agent, "a single seed is no set of continuations"


@pytest.mark.parametrize(("separate_at", "one_agent"), [(900, True), (500, True), (400, False)])
def test_runs_that_separate_before_the_injection_are_one_agent_if_they_were_one_for_half_of_the_time(
    separate_at, one_agent
):
    runs = []
    for run in continuations(fork=f"runs/agent/checkpoint-{separate_at}"):
        later = run.scalars[RETURN][0] > separate_at
        run.scalars[RETURN][1, later] += run.args.seed  # every seed goes on in games of its own from there
        runs.append(run)
    found = verdict(*runs)
    assert found.one_agent == one_agent and set(found.means[0]) == {1, 2, 3} and found.paired


def test_where_the_norm_decides_one_agent_is_asked_for_at_the_earliest_first_injection():
    forked_at = 700  # more than half of 1,200 and less than half of 1,700
    runs = []
    for run in make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500]}):
        name = run.lineage[0].folder
        before = run.scalars[RETURN][0] <= forked_at
        run.scalars[RETURN][1, before] = 7.0
        points = {tag: list(pairs.T) for tag, pairs in run.scalars.items()}
        how = {"intervention": run.args.intervention, "seed": run.args.seed}
        if run.args.intervention == "injection":
            how |= NORM
        runs.append(make_run(name, points, identity=known(name, ("agent", forked_at, 9)), **how))
    assert verdict(*runs).one_agent


@pytest.mark.parametrize("games_before", [0, 1, 3, 10])
def test_agents_of_other_seeds_are_never_one_however_many_games_are_equal(games_before):
    runs = continuations(fork=None)
    for run in runs:
        run.scalars[RETURN] = run.scalars[RETURN][:, 10 - games_before :]
    found = verdict(*runs)
    assert not found.one_agent and set(found.means[0]) == {1, 2, 3} and not found.left_out
    assert found.paired == (games_before > 0), "of one seed they are one run, if their games say so, too"


def test_beside_other_agents_each_agent_counts_once():
    agents = make_arms((2, 3, 4))
    continued = continuations((1, 5, 6))
    found = verdict(*agents, *continued)
    assert (
        not found.one_agent
        and [set(means) for means in found.means] == [{1, 2, 3, 4}] * 2
        and found.shared == 4
    )
    assert found.left_out == {
        run.folder: f"{run.folder} continues the agent of seed 1, which counts once beside other agents"
        for run in continued[2:]
    }
    found = verdict(*agents, *continued[1:])
    assert [set(means) for means in found.means] == [{2, 3, 4, 5}] * 2, "the one of which both arms are there"


def test_an_agents_continuations_count_once_also_where_one_side_has_nothing_else():
    """Five agents without an injection; five continuations of the first of them with one."""
    whole = []
    continued = []
    for seed in (1, 2, 3, 4, 5):
        name = f"whole-{seed}"
        alone = {"seed": seed, "intervention": "none", "identity": known(name)}
        whole.append(make_run(name, {RETURN: games(seed, 0)}, **alone))
        points = {RETURN: games(1, 0)[:10] + games(seed, 1)[10:]}
        origin = known(f"c{seed}", ("whole-1", INJECTION, 1))
        continued.append(make_run(f"c{seed}", points, identity=origin, seed=seed))
    found = verdict(*whole, *continued)
    assert found.judgement.verdict == "too few seeds" and not found.one_agent
    assert [set(means) for means in found.means] == [{1, 2, 3, 4, 5}, {1}]
    reason = "continues the agent of seed 1, which counts once beside other agents"
    assert found.left_out == {run.folder: f"{run.folder} {reason}" for run in continued[1:]}


@pytest.mark.parametrize("intervention", ["none", "injection"])
def test_a_run_that_does_not_count_ends_no_window(intervention):
    points = {RETURN: games(4, intervention == "injection", upto=2_000)}
    alone = make_run("alone", points, last=2_050, seed=4, intervention=intervention)
    (expected,) = comparisons(group(make_arms())[0], RETURN, None)
    (found,) = comparisons(group([*make_arms(), alone])[0], RETURN, None)
    assert found.window == expected.window and found.means == expected.means
    assert list(found.left_out) == [alone.folder]


def test_a_run_that_does_not_count_decides_on_no_other_run():
    runs = make_norm_arms({1: [1_100], 2: [1_300], 3: [1_200], 4: [1_200]})
    for run in runs:
        if run.args.seed == 4:  # it counts, if a run that was injected later does not count
            run.scalars[RETURN] = run.scalars[RETURN][:, :25]
            run.scalars["losses/td_loss"] = np.array([[2_500.0], [0.1]])
    late = make_norm_arms({5: [2_900]})[0]
    (expected,) = comparisons(group(runs)[0], RETURN, None)
    (found,) = comparisons(group([*runs, late])[0], RETURN, None)
    assert found.window == expected.window and found.means == expected.means
    assert set(found.left_out) == {*expected.left_out, late.folder}


def test_a_run_that_ends_before_the_first_evaluation_does_not_end_the_window_of_all():
    evaluated = {}
    for run in make_arms():
        points = run.scalars[RETURN]
        evaluated[run.folder] = [(step, value) for step, value in points.T if step in (1_000, 2_200, 3_000)]
    runs = []
    for run in make_arms():
        how = {"seed": run.args.seed, "intervention": run.args.intervention, "eval_frequency": 100}
        points = {EVALUATED: evaluated[run.folder], RETURN: [*run.scalars[RETURN].T]}
        runs.append(make_run(run.lineage[0].folder, points, **how))
    short = make_run(
        "short", {EVALUATED: [(1_000, 1.0)]}, 2_050, seed=4, intervention="none", eval_frequency=100
    )
    found = verdict(*runs, short, metric=EVALUATED)
    assert (found.window.upto, found.window.ended_by) == (TOTAL, None)
    assert [set(means) for means in found.means] == [{1, 2, 3}] * 2
    reason = (
        f"has logged no {EVALUATED} in the window; with this run the window would be 1,000 < step ≤ 2,050"
    )
    assert found.left_out == {short.folder: f"{short.folder} {reason}"}


def test_a_run_without_a_game_after_the_latest_injection_of_all_does_not_begin_the_window():
    late = make_norm_arms({4: [2_600]})[0]
    late.scalars[RETURN] = late.scalars[RETURN][:, :25]
    found = verdict(*make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500]}), late)
    assert (found.window.after, found.window.upto) == (1_700, TOTAL)
    assert set(found.means[1]) == {1, 2, 3}
    would_be = "with this run the window would be 2,600 < step ≤ 3,000"
    assert found.left_out == {late.folder: f"{late.folder} has logged no {RETURN} in the window; {would_be}"}
    assert verdict(*make_norm_arms({4: [2_600]})[1:], late).window.after == 2_600, "where it is the only one"


def with_games_of_their_own(runs):
    """The same, but that those without an injection share nothing with the others."""
    for run in runs:
        if run.args.intervention == "none":
            run.scalars[RETURN][1] += 1
    return runs


def test_where_the_norm_decides_a_seed_counts_on_both_sides_or_on_neither():
    """Its run without an injection would be one of an agent whose norm grew late."""
    runs = make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500], 4: [2_600]})
    found = verdict(*with_games_of_their_own(runs), window=1_000)
    assert not found.paired and [set(means) for means in found.means] == [{1, 2, 3}] * 2
    assert found.left_out["runs/n4"].endswith("; with this run the window would be 2,600 < step ≤ 3,600")
    reason = "is of a seed whose run with the injection does not count"
    assert found.left_out["runs/b4"] == f"runs/b4 {reason}"


def test_a_run_that_counts_without_the_one_that_was_injected_late_counts():
    runs = make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500], 4: [2_950]})
    for run in runs:
        if run.args.intervention == "injection" and run.args.seed in (1, 4):
            steps = run.scalars[RETURN][0]
            run.scalars[RETURN] = run.scalars[RETURN][:, steps <= 2_950]
    found = verdict(*runs)
    assert (found.window.after, found.judgement.verdict) == (1_700, "raised")
    assert [set(means) for means in found.means] == [{1, 2, 3}] * 2


def test_where_a_seed_that_is_left_out_makes_another_run_a_short_one_that_ones_seed_is_left_out_too():
    """Without the baselines of seeds 3, 4, 6 and 7 the median run has more steps, seed 2 less than half."""
    runs = []
    firsts = {seed: [1_200] if seed in (1, 2, 5) else [] for seed in range(1, 8)}
    for run in with_games_of_their_own(make_norm_arms(firsts)):
        name = run.lineage[0].folder
        last = TOTAL
        if run.args.seed in (3, 4, 6, 7):
            last = 1_860
        elif name == "n2":
            last = 1_830
        points = {tag: [*pairs.T] for tag, pairs in run.scalars.items() if tag != "charts/SPS"}
        points[RETURN] = [(step, value) for step, value in points[RETURN] if step <= last]
        how = {"seed": run.args.seed, "intervention": run.args.intervention}
        if run.args.intervention == "injection":
            how |= NORM
        runs.append(make_run(name, points, last, **how))
    found = verdict(*runs)
    assert [set(means) for means in found.means] == [{1, 5}] * 2
    assert "where the median run" in found.left_out["runs/n2"]
    assert found.left_out["runs/b2"].endswith("of a seed whose run with the injection does not count")


def test_runs_are_of_one_agent_where_each_was_one_with_another_of_them(monkeypatch):
    """As where one of them lacks the curves of its origin, by which the third would know it."""
    related = ({"a", "c"}, {"b", "c"}, {"d", "e"})
    monkeypatch.setattr(verdicts, "share_history", lambda run, other, _: {run, other} in related)
    assert verdicts.group_by_agent(["a", "c", "b", "d", "e"], 10) == [["a", "c", "b"], ["d", "e"]]


def test_runs_that_are_left_out_are_named_in_the_order_in_which_they_are_given():
    agents = [*make_arms((1,)), *continuations((2, 3, 4, 5, 6, 7, 8))]
    names = [run.folder for run in agents if run.args.seed > 2]
    assert [*verdict(*agents).left_out] == sorted(names, key=lambda name: name[-1])


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ([{"learning_rate": 1e-4}, {"learning_rate": 5e-4}, {"learning_rate": 1e-3}], "learning_rate"),
        ([{"injection_step": (1_000,)}, {"injection_step": (2_000,)}], "injection"),
        ([{"injected_head_width": 64}, {"injected_head_width": 128}], "injected_head_width"),
        ([{"injected_head_width": 512}, {"injected_head_width": 128}], "injected_head_width"),
        ([{"head_width": 64}, {"head_width": 128, "injected_head_width": 256}], None),
        ([{"head_width": 64}, {"head_width": 128}], "head_width"),
        ([{"injection_step": (1_000,)}, {"injection_step": (1_000, 2_000)}], None),
        ([{}], None),
        ([{"learning_rate": 1e-4}, {"learning_rate": 5e-4, "gamma": 0.9}], None),
        ([{"bf16": False}, {"bf16": True}], None),
        ([{"batch_size": 8}, {"batch_size": 16, "env_id": "PongNoFrameskip-v4"}], "batch_size"),
    ],
)
def test_the_number_that_varies_between_comparisons_is_found_if_it_is_the_only_one(settings, number):
    runs = [run for k, setting in enumerate(settings) for run in make_arms(prefix=f"{k}-", **setting)]
    assert varied(compared(*runs)) == number


def test_a_number_that_some_arms_do_not_have_is_none_that_varies():
    runs = make_arms()
    of_shrinking = []
    for factor in (0.5, 0.8):
        how = {"intervention": "shrink-perturb", "shrink_factor": factor}
        for seed in (1, 2, 3):
            of_shrinking.append(make_run(f"{factor}-{seed}", {RETURN: games(seed, 2)}, seed=seed, **how))
    assert varied(compared(*runs, *of_shrinking)) is None
    assert varied(compared(*runs[::2], *of_shrinking)) == "shrink_factor"


def test_a_width_varies_also_beside_an_arm_that_injects_no_head():
    runs = []
    for width in (64, 128):
        runs += make_arms(prefix=f"{width}-", head_width=width)
        for seed in (1, 2, 3):
            how = {"intervention": "reset-head", "head_width": width}
            runs.append(make_run(f"reset-{width}-{seed}", {RETURN: games(seed, 2)}, seed=seed, **how))
    assert varied(compared(*runs)) == "head_width"


def test_what_only_one_of_two_interventions_looks_at_is_no_number_that_varies():
    runs = []
    for rate in (1e-4, 1e-3):
        runs += make_arms(prefix=f"{rate}-", learning_rate=rate)
        shrunk = [{RETURN: games(seed, 2)} for seed in (1, 2, 3)]
        how = {"intervention": "shrink-perturb", "learning_rate": rate}
        runs += [
            make_run(f"{rate}-s{seed}", points, seed=seed, **how) for seed, points in enumerate(shrunk, 1)
        ]
    found = compared(*runs)
    assert len(found) == 4 and varied(found) == "learning_rate"


def test_only_arms_that_differ_in_nothing_but_the_injection_are_compared():
    baselines = make_arms()[::2]
    faster = [
        make_run(f"b{seed}", {RETURN: games(seed, 1)}, seed=seed, learning_rate=1e-3) for seed in (1, 2, 3)
    ]
    assert compared(*baselines, *faster) == []
    others = [
        make_run(f"c{seed}", {RETURN: games(seed, 2)}, seed=seed, freeze_heads=False) for seed in (1, 2, 3)
    ]
    found = verdict(*baselines, *faster, *others)
    assert (
        set(found.means[1]) == {1, 2, 3}
        and found.arms[1].name == "injection at 1k, learning rate 0.0001, all heads trained"
    )
    assert found.arms[0].name == "no injection, learning rate 0.0001"


def test_every_intervention_is_compared_with_the_arm_without_any():
    runs = make_arms()
    for seed in (1, 2, 3):
        runs.append(
            make_run(f"r{seed}", {RETURN: games(seed, 2, -50.0)}, seed=seed, intervention="reset-head")
        )
    found = {pair.arms[1].name: pair for pair in compared(*runs)}
    injected, reset = found["injection at 1k"], found["head reset at 1k"]
    assert injected.judgement.sentence.startswith("injection raised") and injected.intervention == "injection"
    assert (
        reset.judgement.sentence.startswith("resetting the head lowered")
        and reset.intervention == "reset-head"
    )
    assert injected.arms[0] == reset.arms[0] and reset.arms[0].name == "no intervention"


def test_the_metric_may_be_the_return_of_evaluations():
    runs = []
    for seed in (1, 2, 3):
        for injected in (False, True):
            evaluations = [
                (500, 1e6),
                (1_500, seed + injected * (5.0 + seed)),
                (2_500, seed + injected * 5.0),
            ]
            points = {RETURN: games(seed, injected), "eval/episodic_return": evaluations}
            runs.append(
                make_run(
                    f"{seed}{injected}", points, seed=seed, intervention="injection" if injected else "none"
                )
            )
    found = verdict(*runs, metric="eval/episodic_return")
    assert found.means[1] == {1: 6.5, 2: 8.0, 3: 9.5} and found.paired


def evaluated(name, injected, **args):
    """Runs of seeds 1 to 3, each evaluated at two steps after the injection."""
    runs = []
    for seed in (1, 2, 3):
        points = {
            RETURN: games(seed, injected),
            EVALUATED: [(1_500, seed + injected * (5.0 + seed)), (2_500, seed)],
        }
        runs.append(
            make_run(
                f"{name}{seed}", points, seed=seed, intervention="injection" if injected else "none", **args
            )
        )
    return runs


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"eval_epsilon": 0.1}, "eval_epsilon 0.01 and 0.1"),
        ({"eval_steps": 500, "eval_episodes": 0}, "eval_episodes 10 and 0, eval_steps 0 and 500"),
        ({"eval_episodes": 3}, "eval_episodes 10 and 3"),
        ({"eval_frequency": 500}, "eval_frequency 0 and 500"),
    ],
)
def test_arms_that_were_evaluated_differently_get_no_verdict_on_evaluations_and_it_is_said_why(how, words):
    runs = [*evaluated("b", False), *evaluated("i", True, **how)]
    arms, _ = group(runs, EVALUATED)
    assert comparisons(arms, EVALUATED, None) == []
    (reason,) = not_compared(arms, []).values()
    assert reason.startswith(f"{PHOENIX}: injection at 1k, ") and reason.endswith(
        f", evaluated differently: {words}"
    )
    assert len({arm.name for arm in arms}) == 2 and all("eval " in arm.name for arm in arms)
    assert len(compared(*runs)) == 1 and not not_compared(group(runs)[0], compared(*runs)), (
        "of training games"
    )


def test_seeds_of_an_arm_that_were_evaluated_differently_are_not_averaged():
    runs = [*evaluated("b", False), *evaluated("i", True)[:2], *evaluated("j", True, eval_epsilon=0.1)[2:]]
    found = verdict(*runs, metric=EVALUATED)
    assert set(found.means[1]) == {1, 2} and found.judgement.verdict == "too few seeds"
    arms = group(runs, EVALUATED)[0]
    (reason,) = not_compared(arms, [found]).values()
    assert "injection at 1k, eval epsilon 0.1 against no injection" in reason
    everyone = [*runs, *evaluated("c", False, eval_epsilon=0.1)]
    found = compared(*everyone, metric=EVALUATED)
    assert len(found) == 2 and not not_compared(group(everyone, EVALUATED)[0], found)


# an arm and its control


def moment_resets(seeds=(1, 2, 3), effect=20.0, last=None, prefix="m", **args):
    """Runs whose moments are reset, of the histories that `make_arms` has."""
    runs = []
    for seed in seeds:
        points = {RETURN: games(seed, 3, effect, upto=last or TOTAL)}
        how = {"intervention": "reset-moments", "seed": seed, **args}
        runs.append(make_run(f"{prefix}{seed}", points, last, **how))
    return runs


def injected(found):
    """Of several comparisons that of the injection."""
    (comparison,) = [pair for pair in found if pair.intervention == "injection"]
    return comparison


@pytest.mark.parametrize("moments", ["fresh", "keep"])
@pytest.mark.parametrize("intervention", ["none", *INTERVENTIONS])
def test_the_control_empties_the_moments_that_the_arm_empties(intervention, moments):
    """As the table in docs/arms.md has it."""
    emptied = {
        "injection": "head",
        "reset-head": "head",
        "shrink-perturb": "head",
        "fire": "head",
        "reset-all": "all",
    }
    how = {"intervention": intervention}
    if intervention in emptied:
        how["moments"] = moments
    (arm,), _ = group([make_run("a", {RETURN: games(1, 1)}, **how)])
    wanted = {}
    if intervention in emptied and moments == "fresh":
        wanted = {"intervention": "reset-moments", "reset_moments_of": emptied[intervention]}
    assert arm.control == wanted


def test_an_arm_is_compared_with_its_control_within_seeds_over_the_verdicts_window():
    runs = [*make_arms((1, 2, 3, 4)), *moment_resets((1, 2, 3, 4))]
    found = injected(compared(*runs, window=1_500))
    contrast = found.beyond_control
    assert contrast.arms[1] is found.arms[1] and contrast.arms[0].name == "moment reset at 1k"
    assert contrast.window == found.window and contrast.window.upto == 2_500 and contrast.paired
    means = []
    for arm in (runs[8:], runs[1:8:2]):
        returns = [run.scalars[RETURN] for run in arm]
        means.append([values[(steps > 1_000) & (steps <= 2_500)].mean() for steps, values in returns])
    test = scipy.stats.ttest_rel(means[1], means[0])
    judged = contrast.judgement
    assert (judged.low, judged.high) == pytest.approx((*test.confidence_interval(0.95),))
    assert judged.p == pytest.approx(test.pvalue)
    difference = np.mean(means[1]) - np.mean(means[0])
    assert judged.difference == pytest.approx(difference) and 25 < difference < 35


def test_the_difference_to_the_control_and_the_controls_own_add_up_to_the_verdicts():
    found = compared(*make_arms(), *moment_resets())
    (control,) = [pair for pair in found if pair.intervention == "reset-moments"]
    total = control.judgement.difference + injected(found).beyond_control.judgement.difference
    assert injected(found).judgement.difference == pytest.approx(total)


def test_the_comparison_with_a_control_is_no_verdict():
    """Neither one on plasticity, nor one of those that Holm corrects for."""
    found = compared(*make_arms(), *moment_resets())
    assert [pair.arms[0].intervention for pair in found] == ["none", "none"]
    assert [pair.verdicts for pair in found] == [2, 2]
    assert [pair.p_holm for pair in found] == pytest.approx(holm([pair.judgement.p for pair in found]))
    raised = injected(found).beyond_control.judgement
    assert raised.verdict == "raised" and "plasticity" not in raised.sentence
    same = injected(compared(*make_arms(), *moment_resets(effect=50.0))).beyond_control.judgement
    assert same.sentence.startswith("no evidence that injection changed the return: it changed by ")
    few = injected(compared(*make_arms(), *moment_resets((1, 2)))).beyond_control.judgement
    assert few.sentence == "too few seeds to say: 2 of the control and 3 of the arm, it takes 3 of each"


@pytest.mark.parametrize(
    "how",
    [
        {"reset_moments_of": "all"},
        {"injection_step": (2_000,)},
        {"injection_step": (1_000, 2_000)},
        {"learning_rate": 1e-3},
        {"env_id": "AlienNoFrameskip-v4"},
        {"intervention": "reset-head"},
    ],
)
def test_what_differs_in_more_than_the_weights_is_no_control(how):
    assert injected(compared(*make_arms(), *moment_resets())).beyond_control is not None
    assert injected(compared(*make_arms(), *moment_resets(**how))).beyond_control is None


def test_kept_moments_and_interventions_that_the_norm_decides_have_no_control_but_none():
    kept = [run for run in make_arms(prefix="k", moments="keep") if run.args.intervention == "injection"]
    assert injected(compared(*make_arms()[::2], *kept, *moment_resets())).beyond_control is None
    by_norm = make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500]})
    assert injected(compared(*by_norm, *moment_resets(**NORM))).beyond_control is None


def test_of_two_resets_of_moments_each_arm_is_compared_with_its_own():
    whole = []
    for seed in (1, 2, 3):
        whole.append(make_run(f"a{seed}", {RETURN: games(seed, 2)}, seed=seed, intervention="reset-all"))
    both = [*moment_resets(), *moment_resets(prefix="all", reset_moments_of="all")]
    of = {}
    for pair in compared(*make_arms(), *whole, *both):
        if pair.beyond_control is not None:
            of[pair.intervention] = pair.beyond_control.arms[0].setting["reset_moments_of"]
    assert of == {"injection": "head", "reset-all": "all"}


def test_a_run_of_the_control_that_has_not_got_to_the_verdicts_window_end_is_left_out_and_named():
    found = injected(compared(*make_arms((1, 2, 3, 4)), *moment_resets(), *moment_resets((4,), last=2_050)))
    contrast = found.beyond_control
    assert contrast.window.upto == found.window.upto == TOTAL and set(contrast.means[0]) == {1, 2, 3}
    assert "has not got to the window's end at 3,000" in contrast.left_out["runs/m4"]
    assert set(found.means[1]) == {1, 2, 3, 4} and not found.left_out


def test_a_control_that_was_evaluated_differently_is_not_compared_and_it_is_said_why():
    runs = [*evaluated("b", False), *evaluated("i", True)]
    how = {"intervention": "reset-moments"}
    for seed in (1, 2, 3):
        points = {RETURN: games(seed, 3), EVALUATED: [(1_500, seed), (2_500, seed + 1.0)]}
        runs.append(make_run(f"m{seed}", points, seed=seed, eval_epsilon=0.1, **how))
    arms, _ = group(runs, EVALUATED)
    found = comparisons(arms, EVALUATED, None)
    assert injected(found).beyond_control is None
    assert any(
        "injection at 1k, eval epsilon 0.01 against moment reset at 1k, eval epsilon 0.1, " in reason
        for reason in not_compared(arms, found).values()
    )
    arms, _ = group(runs)
    found = comparisons(arms, RETURN, None)
    assert injected(found).beyond_control is not None and not not_compared(arms, found), "of training games"


# which runs are pairs


def test_runs_that_share_their_history_are_paired():
    found = verdict(*make_arms(effect=5.0))
    assert found.paired and found.shared == 3 and found.judgement.verdict == "raised"
    assert (
        found.judgement.low < found.judgement.difference < found.judgement.high < 8
    )  # though seeds spread by 10


def test_pairs_are_of_one_seed_in_whatever_order_runs_are_given():
    runs = make_arms((1, 2, 3, 4), effect=5.0)
    found, other = verdict(*runs), verdict(*runs[::2], *runs[:0:-2])
    assert list(other.means[0]) == list(other.means[1]) == [1, 2, 3, 4] and other.judgement == found.judgement


@pytest.mark.parametrize("change", ["value", "step", "missing", "all"])
def test_runs_whose_logs_differ_before_the_injection_are_not_paired(change):
    runs = []
    for seed in (1, 2, 3):
        points = games(seed, 1, 5.0)
        altered = {
            "value": [(points[0][0], points[0][1] + 1e-4), *points[1:]],
            "step": [(points[0][0] + 1, points[0][1]), *points[1:]],
            "missing": points[1:],
            "all": points[10:],
        }[change]
        baseline = games(seed, 0)[
            10 if change == "all" else 0 :
        ]  # nothing before the injection is no history
        runs.append(make_run(f"b{seed}", {RETURN: baseline}, seed=seed, intervention="none"))
        runs.append(make_run(f"i{seed}", {RETURN: altered}, seed=seed))
    found = verdict(*runs)
    assert not found.paired and found.shared == 0 and found.judgement.verdict == "no evidence"


@pytest.mark.parametrize(
    "place", ["", "sweeps/x/"]
)  # from which the runs were started; a fork's origin is named from there
@pytest.mark.parametrize(
    ("origin", "paired"), [("b{}", True), ("b9", False), (None, False), ("common", True), ("..", False)]
)
def test_where_no_game_ended_before_the_injection_lineage_decides(origin, paired, place):
    runs = []
    for seed in (1, 2, 3):
        source = {"common": f"runs/c{seed}/checkpoint-500", "..": "../checkpoint-500"}.get(origin)
        forked = source or (origin and f"runs/{origin.format(seed)}/checkpoint-{INJECTION}")
        runs.append(
            make_run(f"b{seed}", {RETURN: games(seed, 0)[10:]}, seed=seed, intervention="none", fork=source)
        )
        runs.append(make_run(f"i{seed}", {RETURN: games(seed, 1)[10:]}, seed=seed, fork=forked))
    runs = [replace(run, folder=place + run.folder) for run in runs]
    assert verdict(*runs).paired == paired


WHOLE = known("a")
FORKED = known("b", ("a", 1_000, 1))
SHARED = [  # what two runs were before, their seeds, up to where they are one
    (WHOLE, 1, FORKED, 1, 9_000),
    (WHOLE, 1, FORKED, 2, 1_000),  # another seed's streams from the fork on
    (FORKED, 1, known("c", ("a", 1_000, 1)), 1, 9_000),
    (FORKED, 3, known("c", ("a", 1_000, 1)), 2, 1_000),
    (FORKED, 3, known("c", ("a", 500, 1)), 2, 500),
    (FORKED, 3, known("c", ("a", 500, 1)), 3, 500),  # of one seed from other steps on
    (FORKED, 3, known("d", ("c", 2_000, 3), ("a", 1_000, 1)), 3, 9_000),  # a fork of a fork
    (FORKED, 3, known("d", ("c", 2_000, 4), ("a", 1_000, 1)), 3, 1_000),
    (known("e", ("b", 3_000, 3), ("a", 1_000, 1)), 5, known("f", ("b", 4_000, 3), ("a", 1_000, 1)), 6, 3_000),
    # of one seed, begun elsewhere maybe: without a game nothing shows that they are one
    (WHOLE, 1, known("z"), 1, 0),
    (WHOLE, 1, known("z", ("y", 1_000, 1)), 1, 0),
    (WHOLE, 1, known("z", ("y", 1_000, 2)), 1, 0),
    (known("b", ("a", 0, 1)), 2, known("c", ("a", 0, 1)), 3, 0),  # nothing but first weights
]


@pytest.mark.parametrize("case", SHARED)
def test_where_no_game_has_ended_two_runs_are_one_as_far_as_their_origins_say(case):
    identity, seed, other, other_seed, upto = case
    ours = make_run("a", {RETURN: [(9_500, 1.0)]}, 10_000, identity, seed=seed, total_timesteps=10_000)
    theirs = make_run("b", {RETURN: [(9_500, 2.0)]}, 10_000, other, seed=other_seed, total_timesteps=10_000)
    assert [step for step in range(500, 9_001, 500) if share_history(ours, theirs, step)] == list(
        range(500, upto + 1, 500)
    )
    assert all(share_history(ours, theirs, s) == share_history(theirs, ours, s) for s in (500, 1_000, 3_000))


def test_ids_say_more_than_games_and_games_more_than_names():
    """A fork's curves begin at its checkpoint, where the event files of its origin have gone."""
    whole = [(500, 1.0), (1_500, 2.0)]
    ours = make_run("a", {RETURN: whole}, identity=WHOLE)
    assert share_history(ours, make_run("b", {RETURN: whole[1:]}, identity=FORKED), INJECTION)
    (origin,) = FORKED["history"]
    named = {"folder": "b", "history": [origin | {"run": None}]}
    assert not share_history(ours, make_run("b", {RETURN: whole[1:]}, identity=named), INJECTION)
    assert share_history(ours, make_run("b", {RETURN: whole[:1]}, identity=named), INJECTION)


def test_of_whole_runs_of_one_seed_the_games_decide():
    ours = make_run("a", {RETURN: [(500, 1.0)]}, identity=known("a"))
    for points, one in (([(500, 1.0)], True), ([(500, 2.0)], False), ([(501, 1.0)], False)):
        assert share_history(ours, make_run("b", {RETURN: points}, identity=known("b")), INJECTION) == one
    assert not share_history(
        ours, make_run("b", {RETURN: [(500, 1.0)]}, identity=known("b"), seed=2), INJECTION
    )


@pytest.mark.parametrize(
    ("origins", "seeds", "one"),
    [
        ((None, "P__none__1__1700000000"), (1, 1), True),
        ((None, "P__none__1__1700000000"), (1, 9), True),  # another seed only from there on
        ((None, "P__none__2__1700000000"), (1, 2), False),
        (("P__none__1__1700000000", "P__none__2__1700000000"), (1, 2), False),
        ((None, "renamed"), (1, 1), True),
        ((None, "renamed"), (1, 2), False),
        (("renamed", "renamed"), (1, 2), True),
        (("renamed", "another"), (1, 2), False),
        (("renamed", "another"), (1, 1), True),
    ],
)
@pytest.mark.parametrize("identity", [None, {"folder": None}], ids=["folder", "file"])
def test_of_earlier_versions_runs_the_path_of_a_fork_and_equal_games_decide(origins, seeds, one, identity):
    runs = []
    for origin, seed in zip(origins, seeds, strict=True):
        fork = origin and f"runs/{origin}/checkpoint-{INJECTION}"
        runs.append(make_run(f"x{seed}", {RETURN: [(500, 1.0)]}, identity=identity, seed=seed, fork=fork))
    assert share_history(*runs, INJECTION) == share_history(*runs[::-1], INJECTION) == one


def test_runs_were_one_up_to_the_latest_of_the_steps_that_their_origins_have_in_common():
    one = known("e", ("b", 3_000, 3), ("a", 1_000, 1))
    other = known("f", ("b", 4_000, 3), ("a", 1_000, 1))
    ours = make_run("e", {RETURN: [(1, 1.0)]}, identity=one)
    theirs = make_run("f", {RETURN: [(1, 1.0)]}, identity=other)
    assert verdicts.common_step(ours, theirs) == verdicts.common_step(theirs, ours) == (3_000, True)


def test_three_paired_seeds_are_preferred_to_more_that_are_not_and_those_are_named():
    alone = make_run("alone", {RETURN: games(9, 1)}, seed=9)
    found = verdict(*make_arms(), alone)
    assert found.paired and set(found.means[1]) == {1, 2, 3}
    assert found.left_out == {alone.folder: f"{alone.folder} shares its history with no run of the other arm"}


def test_two_paired_seeds_are_not_preferred_to_more_that_are_not():
    runs = [*make_arms((1, 2)), make_run("b9", {RETURN: games(9, 0)}, seed=9, intervention="none")]
    found = verdict(*runs, make_run("i8", {RETURN: games(8, 1)}, seed=8))
    assert not found.paired and found.shared == 2 and not found.left_out
    assert (set(found.means[0]), set(found.means[1])) == ({1, 2, 9}, {1, 2, 8})


# which window


@pytest.mark.parametrize("window", [None, 500])
def test_the_window_begins_after_the_injection_and_ends_with_its_last_step(window):
    end = TOTAL if window is None else INJECTION + window
    points = [
        (500, 7.0),
        (INJECTION, 1e6),
        (INJECTION + 1, 10.0),
        (end, 20.0),
        *([(end + 1, 1e6)] if window else []),
    ]
    arms = [(seed, injected) for seed in (1, 2, 3) for injected in (False, True)]
    found = verdict(
        *(
            make_run(f"{s}{i}", {RETURN: points}, seed=s, intervention="injection" if i else "none")
            for s, i in arms
        ),
        window=window,
    )
    assert (found.window.after, found.window.upto, found.window.ended_by) == (INJECTION, end, None)
    assert found.means[0] == found.means[1] == {1: 15.0, 2: 15.0, 3: 15.0} and [
        side.points for side in found.sides
    ] == [6, 6]


def test_the_window_of_several_injections_begins_at_the_first():
    assert verdict(*make_arms(injection_step=(INJECTION, 2_000))).window.after == INJECTION


def test_the_window_begins_at_the_end_of_the_vector_step_in_which_the_injection_lies():
    runs = make_arms(injection_step=(INJECTION - 3,), num_envs=8)
    found = verdict(*runs)
    assert found.window.after == 1_000 and found.firsts == {1: 1_000, 2: 1_000, 3: 1_000}
    assert found.paired, "the game at step 1,000 is one that both runs played before"


def test_an_unfinished_run_ends_the_window_of_all_and_is_named():
    going = make_run("going", {RETURN: games(4, 1, upto=2_000)}, last=2_050, seed=4)
    whole = make_run("whole", {RETURN: games(4, 0)}, seed=4, intervention="none")
    found = verdict(*make_arms(), going, whole)
    assert (found.window.upto, found.window.ended_by) == (2_050, going.folder) and set(found.means[1]) == {
        1,
        2,
        3,
        4,
    }


def test_a_run_that_stopped_just_after_the_injection_is_left_out_and_named():
    stopped = make_run("stopped", {RETURN: games(4, 1, upto=1_100)}, last=1_110, seed=4)
    whole = make_run("whole", {RETURN: games(4, 0)}, seed=4, intervention="none")
    found = verdict(*make_arms(), stopped, whole)
    assert (found.window.upto, found.window.ended_by) == (TOTAL, None) and set(found.means[1]) == {1, 2, 3}
    where = "is at step 1,110, 110 steps beyond the injection at 1,000"
    median = "where the median run of an arm has 2,000 or more"
    fix = "let it go on, or give a --window of 110 or less"
    assert found.left_out[stopped.folder] == f"{stopped.folder} {where}, {median}: {fix}"
    found = verdict(*make_arms(), stopped, whole, window=110)
    assert set(found.means[1]) == {1, 2, 3, 4} and found.window.upto == 1_110, "the fix that is named"


def test_a_run_that_was_planned_too_short_cannot_go_on():
    short = make_run(
        "short",
        {RETURN: games(4, 1, upto=1_100)},
        seed=4,
        total_timesteps=1_110,
        exploration_fraction=300 / 1_110,
    )
    assert (
        verdict(*make_arms(), short)
        .left_out[short.folder]
        .endswith("has 2,000 or more: give a --window of 110 or less")
    )


@pytest.mark.parametrize(
    ("without", "injected", "upto", "left_out"),
    [
        ((3_000, 3_000, 3_000), (2_000, 2_000, 2_000), 2_000, []),
        (
            (3_000, 3_000, 3_000),
            (1_100, 1_100, 1_100),
            1_100,
            [],
        ),  # the arm is new: its window is what it has
        ((3_000, 3_000, 3_000), (3_000, 3_000, 1_010), 3_000, ["i3"]),
        ((1_001, 3_000, 3_000), (3_000, 3_000, 3_000), 3_000, ["b1"]),
        ((3_000, 2_600, 2_200), (2_800, 2_000, 1_900), 1_900, []),
        ((3_000, 2_000, 1_900), (1_500, 1_450, 1_100), 1_450, ["i3"]),  # a sweep under way
        # without the first two the median run has 1,900 steps, and the third is a short one
        ((3_000,) * 5, (1_150, 1_400, 1_900, 2_900, 3_000), 2_900, ["i1", "i2", "i3"]),
    ],
)
def test_runs_that_are_under_way_count_unless_they_would_take_most_of_the_window(
    without, injected, upto, left_out
):
    runs = []
    for seed, (b, i) in enumerate(zip(without, injected, strict=True), 1):
        runs.append(make_run(f"b{seed}", {RETURN: games(seed, 0, upto=b)}, b, seed=seed, intervention="none"))
        runs.append(make_run(f"i{seed}", {RETURN: games(seed, 1, 50.0, upto=i)}, i, seed=seed))
    found = verdict(*runs)
    late = [folder for folder, reason in found.left_out.items() if "the median run" in reason]
    assert found.window.upto == upto and late == [f"runs/{name}" for name in left_out]


def test_where_a_run_is_left_out_whose_norm_came_last_the_window_begins_at_the_latest_of_the_others():
    late = make_norm_arms({4: [2_000]}, upto=2_010)[0]
    found = verdict(*make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500]}), late)
    assert (found.window.after, found.window.upto) == (1_700, TOTAL) and list(found.left_out) == [late.folder]


def test_a_run_that_has_not_reached_the_end_of_a_stated_window_is_left_out_and_named():
    going = make_run("going", {RETURN: games(4, 1, upto=2_000)}, last=2_050, seed=4)
    found = verdict(*make_arms(), going, window=1_500)
    reason = f"{going.folder} is at step 2,050 and has not got to the window's end at 2,500"
    assert found.left_out == {going.folder: reason} and found.window.upto == 2_500
    assert (
        "shares its history with no run" in verdict(*make_arms(), going, window=1_050).left_out[going.folder]
    )


def test_a_run_before_its_injection_neither_counts_nor_shortens_the_window():
    early = make_run("early", {RETURN: games(4, 1, upto=900)}, last=INJECTION, seed=4)
    found = verdict(*make_arms(), early)
    reason = f"{early.folder} is at step 1,000 and has not got beyond the injection at 1,000"
    assert found.left_out == {early.folder: reason} and found.window.upto == TOTAL


def test_before_any_injection_there_are_too_few_seeds_and_every_run_is_named():
    runs = [
        make_run(
            str(i), {RETURN: games(1, 0, upto=900)}, last=INJECTION, intervention="injection" if i else "none"
        )
        for i in (False, True)
    ]
    found = verdict(*runs)
    assert (
        found.judgement.verdict == "too few seeds"
        and found.means == ({}, {})
        and np.isnan(found.judgement.difference)
    )
    assert all("not got beyond the injection" in found.left_out[run.folder] for run in runs)


@pytest.mark.parametrize("last", [TOTAL, 2_500])
def test_games_in_the_window_that_have_no_return_are_counted(last):
    """Those cut in it, and those still going at its end where the run is not complete."""
    runs = make_arms()
    for run in runs:
        run.scalars["charts/games_cut"] = np.array([[500, 1_000, 1_500, 2_000, 3_000], [9, 9, 1, 2, 4.0]])
    (comparison,) = comparisons(group(runs)[0], RETURN, None if last == TOTAL else last - INJECTION)
    of_a_run = 7 if last == TOTAL else 4
    assert [side.unreported for side in comparison.sides] == [3 * of_a_run, 3 * of_a_run]


def test_of_a_game_that_began_before_the_window_only_the_steps_in_it_count():
    lengths = {"charts/episodic_length": [(1_100, 900.0)], "charts/games_cut": [(3_000, 1.0)]}
    assert make_run("a", {RETURN: [(1_100, 1.0)], **lengths}).share_unreported(1_000, TOTAL) == pytest.approx(
        0.95
    )


def test_of_several_games_at_once_each_may_still_go_on_at_a_windows_end_and_a_step_of_each_is_one_of_all():
    lengths = {"charts/episodic_length": [(1_100, 900.0)], "charts/games_cut": [(2_000, 8.0)]}
    run = make_run("a", {RETURN: [(1_100, 1.0)], **lengths}, num_envs=8)
    assert run.unreported(1_000, 2_500) == 8 + 8
    assert run.unreported(1_000, 2_000) == 8, "new games begin there, none goes on"
    assert run.unreported(1_000, TOTAL) == 8, "the run ends there"
    # the game's last 100 / 8 decisions are of the window's 1,500 steps
    assert run.share_unreported(1_000, 2_500) == pytest.approx(1 - 12.5 / 1_500)


def test_games_without_a_return_are_a_share_of_games_where_that_is_more_than_their_share_of_steps():
    lengths = [(step, 100.0) for step, _ in games(1, 0)]
    cut = {"charts/episodic_length": lengths, "charts/games_cut": [(2_000, 5.0)]}
    run = make_run("a", {RETURN: games(1, 0)} | cut)
    assert run.share_unreported(INJECTION, TOTAL) == pytest.approx(5 / 25), "all steps are in some return"


def test_a_run_without_a_game_in_the_window_is_left_out_and_named():
    silent = make_run("silent", {RETURN: games(4, 1)[:10]}, seed=4)
    found = verdict(*make_arms(), silent)
    assert (
        found.left_out == {silent.folder: f"{silent.folder} has logged no {RETURN} in the window"}
        and found.window.upto == TOTAL
    )


def test_where_the_norm_decides_the_window_begins_at_the_latest_first_injection_of_all_runs():
    found = verdict(*make_norm_arms({1: [1_200, 2_600], 2: [1_700], 3: [1_500, 2_900]}))
    assert (found.window.after, found.window.upto, found.window.ended_by) == (
        1_700,
        TOTAL,
        None,
    ) and found.judgement.verdict == "raised"
    assert found.firsts == {1: 1_200, 2: 1_700, 3: 1_500}
    early = make_run(
        "early", {RETURN: games(4, 1, upto=1_600), "injection/step": [(1_100, 1_100)]}, 1_600, seed=4, **NORM
    )
    found = verdict(*make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500]}), early)
    assert "has not got beyond the latest first injection at 1,700" in found.left_out[early.folder]


def test_each_seed_shares_its_history_up_to_its_own_first_injection():
    runs = make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500]})
    assert verdict(*runs).paired  # though the runs of seeds 1 and 3 differ before the window
    runs[5] = make_run("other", {RETURN: [(100, 0.0), *games(3, 0)[1:]]}, seed=3, intervention="none")
    assert not verdict(*runs).paired


def test_a_run_that_the_norm_has_not_injected_yet_is_left_out_named_and_does_not_shorten_the_window():
    early = make_norm_arms({4: []}, upto=2_000)[0]
    found = verdict(*make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500]}), early)
    assert found.left_out == {
        early.folder: f"{early.folder} has not been injected yet: the verdict is on runs that had"
    }
    assert found.window.upto == TOTAL and set(found.means[1]) == {1, 2, 3}
    assert verdict(*make_norm_arms({5: []})).judgement.verdict == "too few seeds"
    # its seed's run without is left out as well, or that side alone would have such agents
    runs = make_norm_arms({1: [1_200], 2: [1_700], 3: [1_500], 4: []})
    found = verdict(*with_games_of_their_own(runs))
    assert not found.paired and [set(means) for means in found.means] == [{1, 2, 3}] * 2
    assert found.left_out["runs/b4"] == "runs/b4 is of a seed whose run with the injection does not count"
    reset = make_run("reset", {RETURN: games(1, 1)}, intervention="reset-head", **NORM)
    baseline = make_run("baseline", {RETURN: games(1, 0)}, intervention="none", **NORM)
    assert "had no intervention yet" in verdict(reset, baseline).left_out[reset.folder]
