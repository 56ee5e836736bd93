"""The curves and probes under results/ can be read, and give the numbers that the documents print."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from simulated_runs import RETURN

from analysis.arms import read_arms, runs_of
from analysis.games import HUMAN_SCORES, aggregates, emulator
from analysis.intervals import interval, t_interval
from analysis.task_sequence import has_lost, sequence_table
from analysis.verdict import comparisons, show
from img import count_signs, draw_effects, draw_signs

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/results.md")


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def flowing(name):
    """A document's text in one line."""
    return " ".join(text_of(name).split())


@functools.cache
def compared(*patterns):
    """The comparisons of the curves under results/ whose names match, of which there is nothing to remark."""
    paths = [str(path) for pattern in patterns for path in sorted((ROOT / "results").glob(pattern))]
    arms, remarks = read_arms(paths, RETURN)
    assert not any(remarks.values())
    return tuple(comparisons(arms, RETURN, None))  # kept for all tests, so it must not change


def with_and_without(folder):
    """The comparison of an injection with nothing."""
    (pair,) = [pair for pair in compared(f"{folder}/*.csv") if pair.arms[1].name == "injection at 160k"]
    return pair


def before_the_injection(pair):
    """Mean return of the agents in the 20,000 steps before it."""
    return np.mean([draw_effects.mean_return(run, 140_000, 160_000) for run in pair.arms[0].runs])


def by_seed(arm):
    return sorted(arm.runs, key=lambda run: run.args.seed)


def whole_points(value):
    return f"{value:,.0f}".replace("-", "−")


def change_between(pair, after, upto):
    """The mean difference in these steps, within seeds, as documents print it."""
    means = []
    for arm in pair.arms:
        means.append(np.array([draw_effects.mean_return(run, after, upto) for run in by_seed(arm)]))
    centre, low, high = map(whole_points, interval(means[1] - means[0]))
    return f"{centre} [{low}, {high}]"


def printed(pair):
    """A comparison's difference as documents print it."""
    judged = pair.judgement
    return f"{whole_points(judged.difference)} [{whole_points(judged.low)}, {whole_points(judged.high)}]"


def mean_over_seeds(means):
    """Of {seed: mean}, with its interval, as documents print it."""
    return show(*interval(np.array([*means.values()])))


def gains(pair):
    """The difference of each seed."""
    without, intervened = pair.means
    return [intervened[seed] - without[seed] for seed in without]


def in_words(pair):
    """The difference of each seed, as documents print them."""
    return [whole_points(gain) for gain in gains(pair)]


def assert_whole(pair, seeds):
    assert list(pair.means[0]) == list(pair.means[1]) == seeds
    assert (pair.window.after, pair.window.upto) == (160_000, 320_000)


@pytest.mark.parametrize(
    ("files", "seeds", "verdicts", "documents"),
    [
        (("dose/*.csv",), [2, 3, 4, 5, 6], ["no evidence", "no evidence", "raised"], DOCUMENTS),
        (
            ("dose/*no-injection*0.001.csv", "alternatives/*"),
            [2, 3, 4, 5, 6],
            ["lowered", "lowered"],
            DOCUMENTS,
        ),
        (("one_agent/*",), [101, 102, 103], ["no evidence"], ("docs/results.md",)),
        (
            ("fresh_head/*.csv",),
            [7, 8, 9, 10, 11],
            ["raised", "raised", "no evidence", "no evidence"],
            ("docs/results.md",),
        ),
        (
            ("what_helps/*.csv",),
            [7, 8, 9, 10, 11],
            ["lowered", "lowered", "lowered", "lowered", "raised"],
            ("docs/results.md",),
        ),
        (("layer_norm/*.csv",), [7, 8, 9, 10, 11], ["no evidence"], DOCUMENTS),
        (("other_games/*.csv",), [7, 8, 9, 10, 11], ["no evidence", "no evidence"], DOCUMENTS),
    ],
)
def test_documents_print_what_the_curves_give(files, seeds, verdicts, documents):
    pairs = compared(*files)
    assert [pair.judgement.verdict for pair in pairs] == verdicts
    for pair in pairs:
        assert_whole(pair, seeds)
        for name in documents:
            text = text_of(name)
            assert printed(pair) in text, f"{name} lacks {pair.arms[1].name}: {printed(pair)}"


def test_documents_print_what_a_fresh_head_brings_beyond_empty_moments():
    (injected,) = [pair for pair in compared("fresh_head/*.csv") if pair.beyond_control is not None]
    contrast = injected.beyond_control
    names = [arm.name for arm in contrast.arms]
    assert names == ["moment reset at 160k, reset moments of head", "injection at 160k"]
    assert_whole(contrast, [7, 8, 9, 10, 11])
    for name in DOCUMENTS:
        text = text_of(name)
        assert printed(injected) in text and printed(contrast) in text, f"{name}: {printed(contrast)}"
    *others, last = in_words(contrast)
    listed = f"({', '.join(others)} and {last}; p = {contrast.judgement.p:.2g})"
    text = flowing("docs/results.md")
    assert listed in text
    off = max(side.reach for pair in (injected, contrast) for side in pair.sides)
    lows = (injected.judgement.low, contrast.judgement.low)
    assert off < min(lows)
    assert (
        f"a mean may be off by {off:.0f}, and the intervals begin at {lows[0]:.0f} and {lows[1]:.0f}" in text
    )


def test_documents_print_each_arm_of_the_fresh_heads_experiment():
    text = text_of("docs/results.md")
    pairs = compared("fresh_head/*.csv")
    for pair in pairs:
        mean = mean_over_seeds(pair.means[1])
        (row,) = [row for row in text.splitlines() if f"| {mean} | {printed(pair)}" in row]
        assert f"| {', '.join(in_words(pair))} |" in row
    mean = mean_over_seeds(pairs[0].means[0])
    assert f"| no intervention | {mean} |" in text
    stay = [f"{pair.p_holm:.2g}" for pair in pairs if pair.p_holm < 0.05]
    assert f"p = {' and '.join(stay)})" in flowing("docs/results.md")


def test_documents_print_whether_the_gain_lasts():
    injected = with_and_without("fresh_head")
    lasting = [change_between(injected, after, 320_000) for after in (300_000, 310_000)]
    sentence = f"over the last 20,000 steps it is {lasting[0]}, over the last 10,000 it is {lasting[1]}."
    assert sentence in flowing("docs/results.md")


def test_documents_print_what_an_injection_brings_agents_with_layer_norm():
    text = flowing("docs/results.md")
    pair = with_and_without("layer_norm")
    without, injected = [mean_over_seeds(means) for means in pair.means]
    per_seed = in_words(pair)
    assert f"| no intervention | {without} |" in text
    assert f"| injection | {injected} | {printed(pair)}: no evidence | {', '.join(per_seed)} |" in text
    *others, last = per_seed
    assert f"**{printed(pair)}** ({', '.join(others)} and {last}; p = {pair.judgement.p:.2g})" in text
    mean_without, mean_injected = [whole_points(np.mean([*means.values()])) for means in pair.means]
    assert f"a return of {mean_injected} with an injection, and of {mean_without} without" in text
    high = pair.judgement.high
    other = with_and_without("fresh_head").judgement.difference
    assert 2 * high > other
    assert f"{high:.0f} is within the interval, more than half of the {other:.0f}" in text
    assert f"A gain of up to {high:.0f} is not excluded" in text
    assert f"where an injection brought {other:.0f}" in text


def test_documents_print_the_limits_of_what_agents_with_layer_norm_show():
    text = flowing("docs/results.md")
    pair = with_and_without("layer_norm")
    assert not pair.hinges_on_missing_games
    shares = [run.share_unreported(160_000, 320_000) for run in runs_of(pair.arms)]
    missing = f"{100 * min(shares):.0f} to {max(shares):.0%} is missing"
    off = max(side.reach for side in pair.sides)
    assert f"of single runs {missing}, so a mean may be off by {off:.0f}" in text
    assert f"they scored {before_the_injection(pair):.0f} points" in text
    others = before_the_injection(with_and_without("fresh_head"))
    assert f"than the agents without layer norm ({others:.0f})" in text


def dormant(arm, layer, step):
    """The share of dormant units in each agent of an arm, by seed."""
    tag = f"plasticity/dormant_fraction/{layer}"
    return np.array([run.between(tag, step - 1, step)[1].item() for run in by_seed(arm)])


def test_documents_say_how_many_units_are_dormant_with_and_without_layer_norm():
    text = flowing("docs/results.md")
    alone, injected = with_and_without("layer_norm").arms
    plain = with_and_without("fresh_head").arms[0]
    untrained = dormant(alone, "head", 10_000).mean()
    course = [dormant(alone, "head", step).mean() for step in (40_000, 160_000, 320_000)]
    plain_course = [dormant(plain, "head", step).mean() for step in (40_000, 160_000, 320_000)]
    early, halfway, end = [f"{share:.0%}" for share in course]
    assert f"{early} are dormant at step 40,000, {halfway} at step 160,000 and {end} at the end" in text
    assert f"(Before the first update it is {untrained:.0%}.)" in text
    early, halfway, end = [f"{share:.0%}" for share in plain_course]
    assert f"Without layer norm it is {early}, {halfway} and {end}." in text
    assert not dormant(alone, "conv3", 160_000).any()
    third = dormant(plain, "conv3", 160_000).mean()
    assert "In the third convolution none is dormant at step 160,000" in text
    assert f"and without layer norm {third:.0%} are" in text
    new_head = dormant(injected, "head", 320_000)
    assert np.all(new_head > dormant(alone, "head", 320_000))
    assert f"more dormant units at the end, {new_head.mean():.0%}, than" in text


def test_documents_compare_agents_with_and_without_layer_norm():
    text = flowing("docs/results.md")
    plain = with_and_without("fresh_head")
    normed = with_and_without("layer_norm")
    difference, low, high = welch(gains(plain), gains(normed))
    smaller = f"smaller than the {plain.judgement.difference:.0f} by {show(difference, low, high)}"
    assert smaller in text
    off = max(side.reach for side in plain.sides)
    assert off > low
    assert f"a mean may be off by {off:.0f} in the agents without layer norm" in text
    alone, injected = [
        welch([*with_norm.values()], [*without_norm.values()])
        for with_norm, without_norm in zip(normed.means, plain.means, strict=True)
    ]
    assert f"{show(*alone)} for agents that are left alone, and {show(*injected)} for" in text


def welch(first, second):
    """The difference of two means, first − second, and its interval."""
    low, high = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return np.mean(first) - np.mean(second), low, high


def filmed():
    """Scores of the games of each arm that img/draw_film.py printed, and of which game it is the film."""
    lines = text_of("results/film.txt").splitlines()
    scores = {}
    medians = {}
    assert len(lines) == 3 * 4 + 1
    for i in range(0, 12, 4):
        title, games, _, median = lines[i : i + 4]
        arm, _, how = title.partition(", ")
        assert how == "seed 7, step 320,000, ε 0.01: scores of 30 games"
        scores[arm] = np.array(games.split(), float)
        medians[arm] = float(median.partition(":")[0].removeprefix("median "))
    return scores, medians


def test_the_readme_says_which_effects_games_without_a_return_could_explain():
    text = flowing("README.md")
    shaky = []
    pairs = compared("dose/*.csv", "alternatives/*")
    pairs += compared("fresh_head/*.csv") + compared("what_helps/*.csv")
    for pair in pairs:
        if pair.judgement.verdict != "no evidence" and pair.hinges_on_missing_games:
            shaky.append(printed(pair))
    assert len(shaky) == 3
    for effect in shaky:
        before, _, after = text.partition(effect)
        assert "(uncertain)" in before[-80:] or after.startswith(", which is uncertain"), effect


def test_documents_print_what_the_filmed_agents_scored():
    text = flowing("docs/results.md")
    readme = flowing("README.md")
    scores, medians = filmed()
    assert list(scores) == ["no intervention", "injection at 160k", "head reset at 160k"]
    for arm, games in scores.items():
        median = whole_points(medians[arm])
        assert medians[arm] == sorted(games)[14] and f"with {median}" in readme
        cells = [arm.removesuffix(" at 160k"), median, whole_points(games.mean())]
        cells.append(f"{whole_points(games.min())} and {whole_points(games.max())}")
        assert f"| {' | '.join(cells)} |" in text
    without, *others = scores.values()
    for games, name in zip(others, ("Injection", "head reset"), strict=True):
        low, high = scipy.stats.ttest_ind(games, without, equal_var=False).confidence_interval(0.95)
        difference = games.mean() - without.mean()
        assert f"{name} minus none is {show(difference, low, high)}" in text
        assert f"{whole_points(-difference)} lower" in readme


def test_documents_print_what_the_filmed_agent_had_while_it_learned():
    text = flowing("docs/results.md")
    readme = flowing("README.md")
    pair = with_and_without("fresh_head")
    gain = in_words(pair)[0]
    assert f"its games was {gain} higher" in readme and f"320,000 was {gain} higher" in text
    last = []
    for arm in pair.arms:
        (run,) = [run for run in arm.runs if run.args.seed == 7]
        last.append(run.between(RETURN, 300_000, 320_000)[1])
    without, injected = last
    means = f"{whole_points(injected.mean())} with, and {whole_points(without.mean())} without"
    assert f"{means}, from {len(injected)} and {len(without)} games" in text


@pytest.mark.parametrize("folder", ["fresh_head", "what_helps"])
def test_documents_say_what_the_agents_had_just_before_the_injection(folder):
    assert f"scored {before_the_injection(with_and_without(folder)):.0f} points" in text_of("docs/results.md")


def what_helps():
    """{intervention: its comparison with none}, and {intervention: runs}."""
    pairs = {pair.arms[1].intervention: pair for pair in compared("what_helps/*.csv")}
    runs = {"none": pairs["redo"].arms[0].runs}
    for intervention, pair in pairs.items():
        runs[intervention] = pair.arms[1].runs
    return pairs, runs


def test_documents_print_what_else_helps():
    text = flowing("docs/results.md")
    readme = text_of("README.md")
    pairs, runs = what_helps()
    # by the command in the documents
    files = sorted(str(path) for path in (ROOT / "results" / "what_helps").glob("*.csv"))
    arms, scores = draw_effects.read_files([*files, str(ROOT / "results" / "what_helps_games.csv")])
    effects = draw_effects.find_effects(arms, scores, 20_000)
    assert not effects.left_out
    assert draw_effects.effects_table(effects) in text_of("docs/results.md")
    redo = pairs["redo"]
    judged = redo.judgement
    lowered = f"**{-judged.difference:.0f} [{-judged.high:.0f}, {-judged.low:.0f}]** on average"
    *others, last = in_words(redo)
    assert f"{lowered} ({', '.join(others)} and {last}; p = {judged.p:.2g})" in text
    assert f"each, by {printed(pairs['injection'])} on average" in text
    for pair in pairs.values():
        assert printed(pair) in readme
    (injected,) = [changed for name, changed in effects.changes.items() if name.startswith("injection")]
    gains_of_games = injected["final agent, whole games"]
    assert len(gains_of_games) == 4
    lasting = mean_over_seeds(gains_of_games)
    assert f"There is no evidence of a gain in these, {lasting}." in flowing("README.md")
    assert f"p = {pairs['fire'].p_holm:.2g} each," in text
    assert len({f"{pair.p_holm:.2g}" for pair in pairs.values()}) == 1
    first = [run.scalars["injection/recycled/head"][1][0] for run in runs["redo"]]
    assert f"first time it recycled {min(first):.0f} to {max(first):.0f} of the head's 512 units" in text
    counts = {}
    for layer in ("head", "conv3", "conv2"):
        tag = f"injection/recycled/{layer}"
        means = [run.between(tag, 160_000, 320_000)[1].mean() for run in runs["redo"]]
        counts[layer] = f"{min(means):.0f} to {max(means):.0f}"
    assert f"after that it recycled {counts['head']} of them" in text
    third, second = (f"{counts['conv3']} of the 64 of the third", f"and {counts['conv2']} of the second's")
    assert f"{third} convolution at a time, {second}" in text
    (fewer,) = [
        changed["dormant units of the head, end"]
        for name, changed in effects.changes.items()
        if name.startswith("ReDo")
    ]
    assert f"{-np.mean([*fewer.values()]):.3f} lower than without it" in text


def test_documents_say_where_the_arms_end():
    pairs, runs = what_helps()
    ends = {}
    for intervention, of_arm in runs.items():
        means = [draw_effects.mean_return(run, 300_000, 320_000) for run in of_arm]
        ends[intervention] = f"{np.mean(means):,.0f}"
    text = flowing("docs/results.md")
    resets = f"a head reset ends at {ends['reset-head']}, a full reset at {ends['reset-all']}"
    assert f"{resets}, FIRE at {ends['fire']}, and no intervention at {ends['none']}." in text
    more = pairs["reset-all"].judgement.difference - pairs["fire"].judgement.difference
    assert f"FIRE did, by {more:.0f} more" in text


def test_documents_say_how_much_of_the_games_has_no_return():
    pairs, runs = what_helps()
    text = flowing("docs/results.md")
    most = []
    for window in ((160_000, 180_000), (300_000, 320_000), (160_000, 320_000)):
        shares = [run.share_unreported(*window) for of_arm in runs.values() for run in of_arm]
        most.append(f"{max(shares):.0%}")
    first, last, whole = most
    assert (
        f"up to {first} and up to {last} are in no return. Over all 160,000 steps it is up to {whole}" in text
    )
    injected = pairs["injection"]
    off = max(side.reach for side in injected.sides)
    low = injected.judgement.low
    assert f"a mean may be off by {off:.0f}, which is close: its interval begins at {low:.0f}" in text


def test_documents_say_that_games_without_a_return_could_carry_what_redo_lowers():
    pairs, _ = what_helps()
    redo = pairs["redo"]
    off = max(side.reach for side in redo.sides)
    assert off > -redo.judgement.high
    text = flowing("docs/results.md")
    assert f"a mean may be off by {off:.0f}, and the interval begins at {-redo.judgement.high:.0f}" in text


def test_four_of_the_agents_with_and_without_an_injection_are_those_of_the_part_before():
    for name in ("no-intervention", "injection-at-160k"):
        found = []
        for folder in ("fresh_head", "what_helps"):
            arms, _ = read_arms([str(ROOT / f"results/{folder}/PhoenixNoFrameskip-v4_{name}.csv")], RETURN)
            found.append({run.args.seed: run.scalars[RETURN] for run in arms[0].runs})
        before, again = found
        equal = [seed for seed in before if np.array_equal(before[seed], again[seed])]
        assert sorted(equal) == [8, 9, 10, 11]


def test_documents_print_what_stays_after_correction_for_all_five_verdicts():
    pairs = compared("dose/*.csv", "alternatives/*.csv")
    assert [pair.verdicts for pair in pairs] == [5] * 5
    (stays,) = [pair for pair in pairs if pair.p_holm < 0.05]
    assert (
        stays.arms[1].name == "injection at 160k, learning rate 0.001" and stays.judgement.verdict == "raised"
    )
    text = text_of("docs/results.md")
    for pair in pairs:
        assert f"| {pair.judgement.p:.2g} | {pair.p_holm:.2g} |" in text, pair.arms[1].name
    (one_agent,) = compared("one_agent/*.csv")
    assert one_agent.judgement.p > stays.judgement.p
    of_six = f"With it the {stays.p_holm:.2g} would be {6 * stays.judgement.p:.2g}"
    assert of_six in flowing("docs/results.md")


@pytest.mark.parametrize("name", ["run", "100", "1e-4", "tasks"])
def test_documents_print_what_the_probes_give(name):
    rows = text_of("docs/results.md").splitlines()
    found = json.loads((ROOT / "results" / "dose" / f"probe_{name}.json").read_text(encoding="utf-8"))
    agent, injected = ("one network", "injected") if name == "tasks" else ("agent", "agent, injected")
    ranges = []
    for rate in ("1e-4", "5e-4", "1e-3"):
        ratios = [
            result["relative_to_fresh"]
            for result in found
            if f"learning-rate-{rate}__" in result["checkpoint"]
        ]
        left = [ratio[injected]["ratio"] / ratio[agent]["ratio"] for ratio in ratios]
        assert len(left) == 5
        ranges.append(f"{min(left):.3g} to {max(left):.3g}")
    assert any(" | ".join(ranges) in row for row in rows), f"no row of docs/results.md has {ranges}"


def with_interval(centre, interval, unit=""):
    low, high = interval
    return f"{centre:.3g}{unit} [{low:.3g}, {high:.3g}]"


@functools.cache
def agents_of_three_rates():
    """The fifteen agents of the first plan, with what was measured of them when they were injected."""
    folder = ROOT / "results" / "dose"
    agents = draw_signs.agents_in([str(path) for path in sorted(folder.glob("*.csv"))])
    draw_signs.add_probes(agents, sorted(folder.glob("probe_*.json")))
    return agents


def correlations(agents):
    """{measure: its rank correlation with the gain within learning rates}."""
    by_rate = draw_signs.by_learning_rate(agents)
    names = draw_signs.all_measures(agents)
    return {name: draw_signs.correlation(draw_signs.points(by_rate, name)) for name in names}


def two_digits(correlation):
    return f"{correlation:.2f}".replace("-", "−")


PROBE = "probe_1e-4, injected ÷ agent"


@pytest.mark.parametrize(
    ("row", "measure"),
    [
        ("dormant units of the head", "dormant_fraction/head"),
        ("its srank, of 512", "srank/head"),
        ("its effective rank", "effective_rank/head"),
        ("active outputs of the encoder", "active_fraction/conv3"),
        ("encoder's weight norm ÷ initial", "weight_norm_ratio/encoder"),
        ("probe, run's rate, 1,000 updates: agent ÷ fresh network", "probe_run, agent"),
        ("probe, run's rate, 100 updates: agent ÷ fresh network", "probe_100, agent"),
        ("**probe, rate 1e-4, 1,000 updates**: agent ÷ fresh network", "probe_1e-4, agent"),
        ("… **injected ÷ agent**", PROBE),
        ("12 tasks, rate 5e-4, the last five: agent ÷ fresh network", "probe_tasks, agent"),
    ],
)
def test_documents_print_what_was_measured_at_the_injection(row, measure):
    agents = agents_of_three_rates()
    by_rate = draw_signs.by_learning_rate(agents)
    ranges = [draw_signs.spread(values) for values, _ in draw_signs.points(by_rate, measure)]
    found = two_digits(correlations(agents)[measure])
    assert f"| {row} | {' | '.join(ranges)} | {found} |" in text_of("docs/results.md")


def test_documents_say_that_no_measure_tells_agents_of_one_rate_apart():
    agents = agents_of_three_rates()
    text = flowing("docs/results.md")
    found = correlations(agents)
    by_chance = draw_signs.largest_by_chance(draw_signs.by_learning_rate(agents), list(found))
    half, rare = np.quantile(by_chance, (0.5, 0.95))
    assert f"the largest of the {len(found)} is beyond ±{half:.2f} in half of all cases" in text
    assert f"and beyond ±{rare:.2f} in one of twenty" in text
    largest = max(found, key=lambda name: abs(found[name]))
    assert largest == "dormant_fraction/conv2" and abs(found[largest]) < rare
    assert f"The largest found is {two_digits(found[largest])}, of the dormant fraction" in text
    assert f"the probe at 1e-4 has {two_digits(found[PROBE])}" in text
    others = {name: agent for name, agent in agents.items() if f"{agent.gain:.0f}" != "-413"}
    assert len(others) == len(agents) - 1
    without = correlations(others)
    largest = max(without.values(), key=abs)
    sentence = f"the largest is {two_digits(largest)}, and the probe at 1e-4 has {two_digits(without[PROBE])}"
    assert f"Without that agent {sentence}" in text


OTHER_GAMES = ("Assault", "Space Invaders")
THRESHOLD = 0.36  # of the error: with less of it left by an injection the probe says that an agent gains


def other_games():
    """The comparisons of an injection with nothing in `OTHER_GAMES`."""
    pairs = compared("other_games/*.csv")
    assert [pair.game for pair in pairs] == ["AssaultNoFrameskip-v4", "SpaceInvadersNoFrameskip-v4"]
    return pairs


def over_other_games(found):
    """What was found in each of `OTHER_GAMES`, as documents print both."""
    return " and ".join(f"{what} in {game}" for what, game in zip(found, OTHER_GAMES, strict=True))


@functools.cache
def foretold():
    """What an injection leaves of the errors of the ten agents of other games, and what they gain."""
    files = []
    for kind in ("csv", "json"):
        files += sorted(str(path) for path in (ROOT / "results" / "other_games").glob(f"*.{kind}"))
    ratios, gained = count_signs.read_agents(files)
    assert len(ratios) == len(gained) == 10
    return ratios, gained


def foretold_by_game():
    """For each game the agents' (ratio, gain), (5, 2)."""
    ratios, gained = foretold()
    games = {}
    for name, ratio in ratios.items():
        games.setdefault(count_signs.game_of(name), []).append((ratio, gained[name]))
    return [np.array(agents) for agents in games.values()]


def test_documents_print_what_an_injection_brings_in_other_games():
    text = text_of("docs/results.md")
    readme = flowing("README.md")
    in_points = []
    for game, pair in zip(OTHER_GAMES, other_games(), strict=True):
        without, injected = [mean_over_seeds(means) for means in pair.means]
        cells = [game, without, injected, f"{printed(pair)}: no evidence", ", ".join(in_words(pair))]
        assert f"| {' | '.join(cells)} |" in text
        changed = f"{printed(pair)} in {game}"
        assert f"{changed} (p = {pair.judgement.p:.2g})" in flowing("docs/results.md")
        assert readme.count(changed) == 2, "in a paragraph, and in the table"
        in_points.append([whole_points(np.mean([*means.values()])) for means in pair.means])
    assault, space_invaders = in_points
    returns = f"a return of {assault[1]} with an injection and {assault[0]} without in Assault"
    assert f"{returns}, and of {space_invaders[1]} and {space_invaders[0]} in" in flowing("docs/results.md")


def test_documents_say_that_all_agents_of_other_games_gained():
    _, gained = foretold()
    assert min(gained.values()) > 0
    text = flowing("docs/results.md")
    assert text.count("All ten agents had a higher return with it, but not by much") == 1
    assert "All ten scored more" in flowing("README.md")
    p = scipy.stats.binomtest(len(gained), len(gained)).pvalue
    assert f"ten equal ones would have p = {p:.3f}" in text


def test_documents_say_how_large_the_gains_in_other_games_are():
    shares = []
    of_phoenix = with_and_without("fresh_head")
    for pair in (*other_games(), of_phoenix):
        without = np.mean([*pair.means[0].values()])
        shares.append(f"{pair.judgement.difference / without:.0%}")
    assault, space_invaders, phoenix = shares
    gain = f"The {of_phoenix.judgement.difference:.0f} of Phoenix, with the same settings, are {phoenix}."
    assert f"i.e. by {assault} and {space_invaders}. {gain}" in flowing("README.md")
    text = flowing("docs/results.md")
    beside = f"In Phoenix, with the same settings, it was {phoenix}."
    assert f"i.e. by {assault} and {space_invaders}. {beside}" in text
    highs = []
    highest_shares = []
    for pair in other_games():
        high = pair.judgement.high
        highs.append(whole_points(high))
        highest_shares.append(f"{high / np.mean([*pair.means[0].values()]):.0%}")
    within = f"gains of up to {' and '.join(highs)} are within the intervals"
    assert f"{within}, i.e. of {' and '.join(highest_shares)}." in text


def test_documents_say_that_games_without_a_return_could_explain_the_gains_in_other_games():
    text = flowing("docs/results.md")
    missing = []
    off = []
    for pair in other_games():
        assert pair.hinges_on_missing_games
        shares = [run.share_unreported(160_000, 320_000) for run in runs_of(pair.arms)]
        missing.append(f"{100 * min(shares):.0f} to {max(shares):.0%}")
        off.append(f"{max(side.reach for side in pair.sides):.0f}")
    assault, space_invaders = missing
    assert f"of single runs {assault} is missing in Assault, and {space_invaders} in Space" in text
    assert f"A mean may be off by {off[0]} and by {off[1]}, so" in text


def test_documents_say_what_agents_of_other_games_had_just_before_the_injection():
    scored = []
    random = []
    for pair in other_games():
        scored.append(before_the_injection(pair))
        random.append(HUMAN_SCORES[emulator(pair.game)["game"]][0])
        assert scored[-1] > random[-1]
    text = flowing("docs/results.md")
    assert f"they scored {scored[0]:.0f} points in Assault and {scored[1]:.0f} in Space Invaders" in text
    assert f"more than random play ({random[0]:.0f} and {random[1]:.0f}, DQN Zoo)" in text


def test_documents_print_how_often_the_probe_foretold_the_gain_in_other_games():
    ratios, gained = foretold()
    text = text_of("docs/results.md")
    assert count_signs.signs_table(ratios, gained, THRESHOLD) in text
    assert f"```\n{count_signs.signs_in_words(ratios, gained, THRESHOLD)}\n```" in text
    right = sum((ratios[name] < THRESHOLD) == (gained[name] > 0) for name in gained)
    count = f"{right} of {len(gained)}"
    assert f"so it was right for **{count}**" in flowing("docs/results.md")
    pages = {"README.md": 1, "docs/has-this-agent-lost-plasticity.md": 1, "docs/results.md": 2}
    for name, times in pages.items():
        assert flowing(name).count(f"right for {count} agents") == times, name
    assert right == 2
    by_coin = scipy.stats.binom.sf(1, len(gained), 0.5)
    assert f"right for two or more in {100 * by_coin:.0f} of 100 cases" in text


def test_documents_say_that_the_probes_threshold_parts_learning_rates_not_signs():
    for agent in agents_of_three_rates().values():
        assert (agent.measures[PROBE] < THRESHOLD) == (agent.learning_rate == 1e-3)
    text = flowing("docs/results.md")
    assert "Those of 1e-3, where alone a gain was found, lay below it, and all others above." in text
    gained = [agent for agent in agents_of_three_rates().values() if agent.gain > 0]
    at = [agent.learning_rate for agent in gained]
    assert (at.count(1e-3), at.count(5e-4), at.count(1e-4)) == (5, 4, 1)
    right = sum(
        (agent.measures[PROBE] < THRESHOLD) == (agent.gain > 0) for agent in agents_of_three_rates().values()
    )
    assert f"it would have been right for only {right}, as four of 5e-4 and one of 1e-4 gained" in text


def test_documents_say_that_the_probe_does_not_tell_how_much_an_agent_of_other_games_gains():
    found = [two_digits(draw_signs.correlation([agents.T])) for agents in foretold_by_game()]
    assert f"a rank correlation with the gain of {over_other_games(found)}" in flowing("docs/results.md")


def test_documents_print_what_the_probe_gives_beside_a_fresh_network_in_other_games():
    found = {}
    phoenix = ROOT / "results" / "dose" / "probe_1e-4.json"
    for path in (*(ROOT / "results" / "other_games").glob("*.json"), phoenix):
        for result in json.loads(path.read_text(encoding="utf-8")):
            if path != phoenix or "learning-rate-1e-3" in result["checkpoint"]:
                found.setdefault(result["env_id"], []).append(result)
    ratios = {}
    falls = {}
    for game, results in found.items():
        assert len(results) == 5
        of_game = [result["relative_to_fresh"]["agent"]["ratio"] for result in results]
        ratios[game] = f"{min(of_game):.2f} to {max(of_game):.2f}"
        falls[game] = []
        for result in results:
            _, _, fell = result["sentence"].partition("the fresh network's own error fell by ")
            falls[game].append(int(fell.split("%")[0]))
    text = flowing("docs/results.md")
    assault, space_invaders = [pair.game for pair in other_games()]
    others = f"{ratios[assault]} of its error in Assault, and {ratios[space_invaders]} in Space Invaders"
    assert f"{others}. Those of Phoenix at 1e-3 had {ratios['PhoenixNoFrameskip-v4']} times" in text
    here = falls[assault] + falls[space_invaders]
    there = falls["PhoenixNoFrameskip-v4"]
    fell = f"fell by {min(here)} to {max(here)}%, in Phoenix by {min(there)} to {max(there)}%"
    assert f"a fresh network's own error {fell}" in text


def test_documents_say_what_an_injection_brings_early_and_late_in_other_games():
    text = flowing("docs/results.md")
    first = (160_000, 180_000)
    last = (300_000, 320_000)
    early = [change_between(pair, *first) for pair in other_games()]
    late = [change_between(pair, *last) for pair in other_games()]
    assert f"Over the first 20,000 steps the change is {over_other_games(early)}" in text
    assert f"over the last 20,000 it is {' and '.join(late)}." in text
    shares = []
    for pair in other_games():
        for run in runs_of(pair.arms):
            shares += [run.share_unreported(*first), run.share_unreported(*last)]
    assert f"in these windows up to {max(shares):.0%} are in no return" in text


def test_documents_say_how_many_units_are_dormant_in_three_games():
    shares = []
    for pair in (*other_games(), with_and_without("fresh_head")):
        shares.append(f"{dormant(pair.arms[0], 'head', 160_000).mean():.0%}")
    assault, space_invaders, phoenix = shares
    others = f"{assault} of the head's units were dormant in Assault, and {space_invaders} in Space Invaders"
    assert f"{others}. In Phoenix it was {phoenix}." in flowing("docs/results.md")


def test_documents_print_the_aggregates_over_games():
    text = flowing("docs/results.md")
    totals = aggregates(compared("fresh_head/*.csv", "other_games/*.csv"))
    (three,) = [total for total in totals if len(total.games) > 1]
    assert three.runs == (15, 15) and not three.left_out
    without, injected, difference = [show(*row) for row in three.scores]
    assert f"is {without} without and {injected} with an injection." in text
    assert f"The difference is {difference}." in text
    (two,) = aggregates(other_games())
    assert f"without Phoenix the aggregate's difference is {show(*two.scores[2])}." in text


def test_documents_print_what_an_injection_brings_by_game_on_a_common_scale():
    found = []
    for pair in (with_and_without("fresh_head"), *other_games()):
        random, human = HUMAN_SCORES[emulator(pair.game)["game"]]
        judged = pair.judgement
        found.append(show(*np.array([judged.difference, judged.low, judged.high]) / (human - random)))
    phoenix, *others = found
    by_game = f"the mean difference is {phoenix} in Phoenix, {over_other_games(others)}, and"
    assert by_game in flowing("docs/results.md")


IN_TWO_THREADS = ("tasks_two_threads", "tasks_two_threads_xeon", "tasks_two_threads_xeon_avx2")
CHOSE_THE_SETTING = 3  # of the seeds of the sequences of tasks; the others decide


def sequence(file):
    (result,) = json.loads((ROOT / "results" / f"{file}.json").read_text(encoding="utf-8"))
    return result


def ratio(errors, reference):
    logs = np.log(errors) - np.log(reference)
    return np.exp(logs.mean()), np.exp(t_interval(logs))


@pytest.mark.parametrize("file", ["tasks", "tasks_avx2"])
def test_documents_print_what_the_sequences_of_tasks_give(file):
    result = sequence(file)
    text = text_of("docs/results.md")
    assert sequence_table(result) in text
    copied = result["copied_before"][CHOSE_THE_SETTING:]
    ratios = {}
    for name in ("one network", "injected", "head reset"):
        means = []
        standards = []
        for seed in range(CHOSE_THE_SETTING, 9):
            at = result["copied_before"][seed] - 1
            alone = result["error"]["one network"][seed]
            means.append(np.mean(result["error"][name][seed][at:]))
            standards.append(min(alone[:at]) if name == "one network" else np.mean(alone[at:]))
        ratios[name] = with_interval(*ratio(means, standards), unit="×")
    *first, last = map(str, copied)
    cells = ["6 of 6", f"{', '.join(first)} and {last}", ratios["one network"], f"**{ratios['injected']}**"]
    assert f"| {' | '.join([*cells, ratios['head reset']])} |" in text


@pytest.mark.parametrize("file", ["tasks", "tasks_avx2"])
def test_documents_print_what_an_injection_does_before_anything_is_lost(file):
    late = sequence(file)
    early = sequence(file.replace("tasks", "tasks_early"))
    for seed in range(9):
        shared = early["error"]["one network"][seed]
        assert late["error"]["one network"][seed][: len(shared)] == shared, "the same networks"
        assert late["copied_before"][seed] > early["copied_before"][seed] == 6
    found = {}
    for name in ("injected", "head reset"):
        before, after = (
            np.array(of["relative_to_one"][name]["per_seed"])[CHOSE_THE_SETTING:] for of in (early, late)
        )
        found[name] = [
            with_interval(*ratio(*pair), unit="×") for pair in ((before, 1), (after, 1), (after, before))
        ]
    before, after, contrast = found["injected"]
    text = text_of("docs/results.md")
    assert f"| {before} | {after} | **{contrast}** | {found['head reset'][2]} |" in text


def test_documents_say_how_many_networks_of_the_control_lost_plasticity_in_it():
    losing = 0
    for file in ("tasks_early", "tasks_early_avx2"):
        for errors in sequence(file)["error"]["one network"][CHOSE_THE_SETTING:]:
            if any(has_lost(errors[:tasks]) for tasks in range(6, 11)):
                losing += 1
    assert losing == 3
    sentence = "Three of these twelve networks lost plasticity within the five tasks"
    assert sentence in flowing("docs/results.md")


def test_documents_say_what_a_fresh_network_would_have_done():
    text = text_of("docs/results.md")
    for file in ("tasks", "tasks_avx2"):
        result = sequence(file)
        fresh = np.array([of_seed[0] for of_seed in result["error"]["fresh network"]])[CHOSE_THE_SETTING:]
        alone = np.array(result["since"]["one network"])[CHOSE_THE_SETTING:]
        centre, (low, high) = ratio(alone, fresh)
        assert f"{centre:.2g}× [{low:.2g}, {high:.2g}]" in text
        best, _ = ratio(np.array(result["best"])[CHOSE_THE_SETTING:], fresh)
        assert round(best, 1) == 0.1, "a tenth"


@pytest.mark.parametrize("file", ["tasks", "tasks_avx2"])
def test_documents_compare_the_error_with_the_median_of_the_tasks_before(file):
    result = sequence(file)
    alone = []
    medians = []
    for seed in range(CHOSE_THE_SETTING, 9):
        at = result["copied_before"][seed] - 1
        errors = result["error"]["one network"][seed]
        alone.append(np.mean(errors[at:]))
        medians.append(np.median(errors[: at - 2]))
    centre, _ = ratio(np.array(alone), np.array(medians))
    sentence = f"which decided that), the error is {centre:.1f} times as large, with both arithmetics."
    assert sentence in flowing("docs/results.md")


def test_documents_say_which_networks_an_injection_did_not_help():
    not_helped = []
    reset_left = []
    networks = 0
    for file in ("tasks", "tasks_avx2", *IN_TWO_THREADS):
        result = sequence(file)
        left = result["relative_to_one"]
        for seed in range(result["probe_seeds"]):
            networks += 1
            active = result["encoder_active"]["one network"][seed][result["copied_before"][seed] - 2]
            helped = left["injected"]["per_seed"][seed] < 0.5
            assert helped == (active > 0.01)
            if not helped:
                assert left["injected"]["per_seed"][seed] > 0.95, "nothing"
                not_helped.append((file, seed))
                reset_left.append(f"{left['head reset']['per_seed'][seed]:.0%}")
    first, *others = not_helped
    assert networks == 36 and first == ("tasks_avx2", 2)
    assert "It did nothing for four of the 36 networks" in flowing("docs/results.md")
    assert "For four of all 36 networks" in flowing("docs/results.md")
    assert "Of the 36 networks that were run at this setting, an injection did nothing for four" in flowing(
        "README.md"
    )
    assert len(others) == 3 and {file for file, _ in others} <= set(IN_TWO_THREADS)
    *some, last = reset_left
    assert f"A head reset left {', '.join(some)} and {last} of their errors." in flowing("docs/results.md")
    other = sequence("tasks_avx2")
    left = [other["since"][name][:CHOSE_THE_SETTING] for name in ("injected", "one network")]
    text = flowing("docs/results.md")
    assert f"seeds 0 to 2 alone have {with_interval(*ratio(*left), unit='×')}" in text


@pytest.mark.parametrize("file", IN_TWO_THREADS)
def test_documents_print_what_the_sequences_of_tasks_give_in_two_threads(file):
    result = sequence(file)
    injected, alone = [np.array(result["since"][name]) for name in ("injected", "one network")]
    *some, last = map(str, result["copied_before"])
    cells = [f"{', '.join(some)} and {last}", with_interval(*ratio(injected, alone), unit="×")]
    cells += [f"{(injected < alone / 2).sum()} of 6", f"[file](../results/{file}.json)"]
    assert f"| {' | '.join(cells)} |" in text_of("docs/results.md")


def test_the_first_points_say_what_an_injection_leaves_of_the_error_in_two_threads():
    left = []
    for file in IN_TWO_THREADS:
        since = sequence(file)["since"]
        centre, _ = ratio(since["injected"], since["one network"])
        left.append(centre)
    least, middle, most = [f"{100 * share:.0f}%" for share in sorted(left)]
    assert f"in three runs of it an injection left {least}, {middle} and {most}." in flowing(
        "docs/results.md"
    )


def test_documents_say_how_many_networks_come_back_by_themselves():
    found = {}
    for file in ("tasks", "tasks_avx2"):
        result = sequence(file)
        below = []
        for seed in range(CHOSE_THE_SETTING, 9):
            at = result["copied_before"][seed] - 1
            errors = np.array(result["error"]["one network"][seed][at:])
            below.append(errors <= 5 * result["best"][seed])
        found[file] = (np.any(below, axis=1).sum(), np.array(below)[:, -1].sum())
    assert found == {"tasks": (4, 1), "tasks_avx2": (2, 2)}
    result = sequence("tasks")
    course = np.array(result["error"]["one network"][6][12:]) / result["best"][6]
    text = flowing("docs/results.md")
    assert f"comes down to {course.min():.1f} times its best" in text and f"{course[-1]:.1f} times" in text


def test_the_first_points_say_what_copies_have_left_of_the_error():
    """In percent, the same with both arithmetics; and before anything is lost, of the processor's own."""
    left = {}
    for file in ("tasks", "tasks_avx2", "tasks_early"):
        for name in ("injected", "head reset"):
            per_seed = np.array(sequence(file)["relative_to_one"][name]["per_seed"])[CHOSE_THE_SETTING:]
            left[file, name], _ = ratio(per_seed, 1)
    percent = {key: f"{100 * value:.0f}%" for key, value in left.items()}
    assert percent["tasks", "injected"] == percent["tasks_avx2", "injected"]
    assert percent["tasks", "head reset"] == percent["tasks_avx2", "head reset"]
    text = flowing("docs/results.md")
    assert f"on average it left {percent['tasks', 'injected']} of the error over the next five tasks" in text
    assert f"A head reset left {percent['tasks', 'head reset']}" in text
    before, after = left["tasks_early", "injected"], left["tasks", "injected"]
    assert f"an injection leaves {before:.2f} of the error, after the loss {after:.3f}" in text


def test_the_readme_prints_what_an_injection_leaves_of_the_error_in_tasks():
    left = np.array(sequence("tasks")["relative_to_one"]["injected"]["per_seed"])[CHOSE_THE_SETTING:]
    centre, (low, high) = ratio(left, 1)
    text = text_of("README.md")
    assert f"{centre:.2g}× [{low:.2g}, {high:.2g}]" in text
