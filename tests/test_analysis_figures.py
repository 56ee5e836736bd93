"""What the figures show."""

import math
from pathlib import Path

import numpy as np
import pytest
from simulated_runs import INJECTION, RETURN, TOTAL, games, make_arms, make_games, make_norm_arms, make_run

from analysis.arms import group
from analysis.canvas import COLOURS, Figure, drawing, look, plot_broken
from analysis.curves import POLICY_CHURN
from analysis.figures import (
    bin_edges,
    curve,
    draw,
    draw_differences,
    draw_plasticity,
    draw_returns,
    looks_of,
)
from analysis.verdict import comparisons

PLASTICITY = {
    "plasticity/dormant_fraction": 0.2,
    "plasticity/srank/encoder": 90.0,
    "plasticity/weight_norm_ratio/head": 1.5,
}


def arms_of(*runs):
    return group(list(runs))[0]


@pytest.fixture
def saved(monkeypatch):
    """Figures by the names they would be saved under."""
    figures = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: figures.update({Path(path).name: figure})
    )
    return figures


def panel(arms, aggregate="mean"):
    """One drawn panel of the returns."""
    ax = Figure().subplots()
    draw(ax, arms, looks_of(arms), RETURN, 30, aggregate)
    return ax


def test_curves_are_means_of_bins_whose_upper_edge_belongs_to_them():
    edges = np.linspace(0, 40, 5)
    points = np.array([[1, 10, 11, 31, 32], [1, 3, 10, 20, np.nan]], float)
    np.testing.assert_array_equal(
        curve(points, edges), [2, 10, 15, 20]
    )  # the third is between its neighbours
    np.testing.assert_array_equal(
        curve(points[:, 2:3], edges), [np.nan, 10, np.nan, np.nan]
    )  # never beyond them
    np.testing.assert_array_equal(curve(np.array([[0.0], [5.0]]), edges), [5, np.nan, np.nan, np.nan])
    assert np.isnan(curve(points[:, 4:], edges)).all()


def test_a_curve_has_a_gap_where_steps_are_undefined_from_the_value_before_to_the_one_after():
    edges = np.linspace(0, 80, 9)
    points = np.array([[5, 25, 65], [1.0, 2, 4]])
    np.testing.assert_array_equal(curve(points, edges), [1, 1.5, 2, 2.5, 3, 3.5, 4, np.nan])
    gap = [1, 1.5, 2, np.nan, np.nan, np.nan, 4, np.nan]
    np.testing.assert_array_equal(curve(points, edges, np.array([45.0])), gap)
    np.testing.assert_array_equal(curve(points, edges, np.array([35.0, 55.0])), gap)
    mixed = [1, np.nan, np.nan, np.nan, np.nan, np.nan, 4, np.nan]
    np.testing.assert_array_equal(
        curve(points, edges, np.array([28.0])), mixed, "a bin that holds such a step has no value"
    )
    np.testing.assert_array_equal(curve(points, edges, np.array([75.0])), curve(points, edges))


def test_no_bin_of_a_curve_holds_what_comes_before_the_first_intervention_and_after_it():
    lines = panel(arms_of(*make_arms(injection_step=(1_050,)))).lines
    without, injected = (line.get_ydata() for line in lines if line.get_linewidth() == 2)
    shared = 10  # of 30 bins
    assert np.array_equal(without[:shared], injected[:shared])
    assert (without[shared:] != injected[shared:]).all()
    for bins, steps in ((7, (INJECTION,)), (20, (1_237,)), (3, (2_990,))):
        arms = arms_of(*make_arms(injection_step=steps))
        edges = bin_edges(arms, bins)
        assert len(edges) == bins + 1 and (np.diff(edges) > 0).all() and edges[[0, -1]].tolist() == [0, TOTAL]
        assert (steps[0] in edges) == (steps[0] < 2_990), "a bin that short would hold hardly any game"
    norm = arms_of(*make_norm_arms({1: [1_200, 2_600], 2: [1_700]}))
    assert 1_200 in bin_edges(norm, 7) and 1_700 not in bin_edges(norm, 7)
    without = arms_of(*make_arms()[::2])
    assert np.array_equal(bin_edges(without, 7), np.linspace(0, TOTAL, 8))


def test_an_axis_goes_below_zero_only_where_a_return_does():
    for offset, below in ((100, False), (math.nan, False), (-100, True)):
        runs = []
        for seed in (1, 2, 3):
            points = [(step, 10.0**seed + offset - 10) for step in range(100, 3_001, 100)]
            runs.append(make_run(f"{seed}", {RETURN: points}, seed=seed))
        assert (panel(arms_of(*runs)).get_ylim()[0] < 0) == below


def test_single_runs_are_drawn_where_there_are_few_arms():
    for rates, drawn in (((1e-4, 1e-3), 12), ((1e-4, 5e-4, 1e-3), 0)):
        runs = []
        for rate in rates:
            runs += make_arms(prefix=f"{rate}-", learning_rate=rate)
        lines = panel(arms_of(*runs)).lines
        assert sum(line.get_linewidth() == 0.6 for line in lines) == drawn
        assert sum(line.get_linewidth() == 2 for line in lines) == 2 * len(rates)


def test_an_injection_looks_the_same_whatever_it_is_compared_with():
    runs = make_arms()
    for seed in (1, 2, 3):
        runs.append(make_run(f"head-{seed}", {RETURN: games(seed, 2)}, seed=seed, intervention="reset-head"))
    arms = arms_of(*runs)
    assert [arm.intervention for arm in arms] == ["none", "reset-head", "injection"]
    found = looks_of(arms)
    assert [found[arm.name] for arm in arms] == [look(0), look(2), look(1)]


MEASURE, OTHER = "plasticity/srank/head", "plasticity/weight_norm/head"
MEASURED = range(100, 3_001, 100)


@pytest.mark.parametrize("by", ["no point", "a point that is not finite"])
def test_a_measure_that_breaks_down_is_visibly_broken(by):
    dead = range(1_000, 1_500, 100)
    dying = [(s, 90.0 if s not in dead else np.nan) for s in MEASURED if by != "no point" or s not in dead]
    healthy = [(s, 80.0) for s in MEASURED]
    other = [(s, 1.0) for s in MEASURED]
    runs = [
        make_run(
            f"r{seed}",
            {RETURN: games(seed, 0), MEASURE: dying if seed == 1 else healthy, OTHER: other},
            seed=seed,
        )
        for seed in (1, 2, 3)
    ]
    ax, arms = Figure().subplots(), arms_of(*runs)
    draw(ax, arms, looks_of(arms), MEASURE, 100, "mean")
    thick = next(line for line in ax.lines if line.get_linewidth() == 2)
    x, y = thick.get_data()
    inside = (x > 930) & (x < 1_470)
    assert np.isnan(y[inside]).all() and inside.sum() > 10, "no line across the gap"
    assert np.isfinite(y[(x > 100) & (x < 880)]).all() and np.isfinite(y[(x > 1_520) & (x < 2_950)]).all()
    thin = [line.get_ydata() for line in ax.lines if line.get_linewidth() == 0.6]
    assert sorted(int(np.isnan(line[inside]).sum()) for line in thin) == [0, 0, inside.sum()]
    (crosses,) = (line for line in ax.lines if line.get_marker() == "x")
    assert crosses.get_xdata().tolist() == list(dead) and crosses.get_label() == "undefined"


def test_a_measure_that_begins_late_is_not_undefined_before_and_returns_never_are():
    points = {
        RETURN: games(1, 0),
        MEASURE: [(s, 1.0) for s in MEASURED if s > 1_000],
        OTHER: [(s, 1.0) for s in MEASURED],
    }
    run = make_run("r", points, seed=1)
    assert run.undefined(MEASURE).tolist() == [] and run.undefined(RETURN).tolist() == []


def test_churn_which_is_measured_at_other_steps_makes_no_measure_undefined_and_is_never_so():
    churn = [(step + 50, 0.5) for step in MEASURED]
    points = {RETURN: games(1, 0), MEASURE: [(s, 1.0) for s in MEASURED], POLICY_CHURN: churn}
    run = make_run("r", points, seed=1)
    assert run.undefined(MEASURE).tolist() == [] and run.undefined(POLICY_CHURN).tolist() == []


@pytest.mark.parametrize(("tag", "highest"), [(POLICY_CHURN, 1), ("plasticity/srank/head", 2)])
def test_the_band_of_a_share_ends_at_1_and_that_of_another_measure_does_not(tag, highest):
    runs = []
    for seed, value in ((1, 0.2), (2, 0.9), (3, 1.0)):
        points = {RETURN: games(seed, 0), tag: [(step, value) for step in MEASURED]}
        runs.append(make_run(f"r{seed}", points, seed=seed))
    ax, arms = Figure().subplots(), arms_of(*runs)
    draw(ax, arms, looks_of(arms), tag, 30, "mean")
    (band,) = ax.collections
    top = band.get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(1) if highest == 1 else top > 1.2


def test_a_value_between_two_gaps_is_a_dot():
    ax = Figure().subplots()
    plot_broken(ax, np.arange(6), np.array([1, 2, np.nan, 3, np.nan, 4.0]))
    assert ax.lines[0].get_markevery() == [3, 5] and ax.lines[0].get_marker() == "."


def test_an_arm_has_a_thin_line_per_run_and_a_thick_one_that_ends_where_one_of_its_runs_does():
    brief = make_run("brief", {RETURN: games(4, 1, upto=2_000)}, last=2_000, seed=4)
    ax = panel(arms_of(*make_arms((1, 2, 3, 4))[:-2], brief))
    drawn = {line.get_label(): np.array(line.get_data()) for line in ax.lines if line.get_label()[0] != "_"}
    ends = {
        name: points[0, np.isfinite(points[1])].max()
        for name, points in drawn.items()
        if np.isfinite(points[1]).any()
    }
    assert ends["no injection (n = 3)"] > 2_900 and 1_900 < ends["injection at 1k (n = 4)"] <= 2_000
    assert sum(line.get_linewidth() == 0.6 for line in ax.lines) == 7 and ax.get_xlim() == (0, TOTAL)


@pytest.mark.parametrize("aggregate", ["mean", "iqm"])
def test_the_thick_line_is_the_mean_or_interquartile_mean_inside_its_shaded_interval(aggregate):
    runs = [
        make_run(f"b{seed}", {RETURN: [(s, 10.0**seed) for s in range(1, 3_001)]}, seed=seed)
        for seed in (1, 2, 3, 4)
    ]
    ax = panel(arms_of(*runs), aggregate)
    (line,) = (line for line in ax.lines if line.get_linewidth() == 2)
    np.testing.assert_allclose(line.get_ydata(), {"mean": 11_110 / 4, "iqm": 550}[aggregate])
    (band,) = ax.collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert low < line.get_ydata()[0] < high and (low < 0) == (aggregate == "mean")


def test_figures_mark_every_injection_that_was_logged_where_the_norm_decides_and_those_planned_otherwise():
    def marks(*runs):
        ax = panel(arms_of(*runs))
        return [
            line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2
        ], ax.get_legend_handles_labels()[1][-1]

    assert marks(*make_norm_arms({1: [1_200, 2_600], 2: [1_700], 3: []})) == (
        [1_200, 1_700, 2_600],
        "injection",
    )
    assert marks(*make_arms()) == ([INJECTION], "injection")
    reset = make_run("reset", {RETURN: games(7, 1)}, seed=7, intervention="reset-head")
    assert marks(reset) == ([INJECTION], "intervention")


def test_a_long_name_is_folded_to_the_width_of_its_figure(saved):
    steps = (INJECTION, *range(1_101, 2_500, 50))
    arms = arms_of(*make_arms(injection_step=steps))
    draw_returns(arms, comparisons(arms, RETURN, 500), Path("x.png"), RETURN, "mean")
    figure = saved["x.png"]
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert ax.get_legend().get_window_extent().width < figure.bbox.width
    assert ax.get_window_extent().height > figure.bbox.height / 3


def test_every_game_has_a_panel_with_a_legend_and_the_window_of_its_verdict(saved):
    arms = arms_of(*make_games("PhoenixNoFrameskip-v4", "PongNoFrameskip-v4"))
    draw_returns(arms, comparisons(arms, RETURN, 500), Path("x.png"), RETURN, "mean")
    axes = saved["x.png"].axes
    assert [ax.get_title(loc="left") for ax in axes] == ["PhoenixNoFrameskip-v4", "PongNoFrameskip-v4"]
    for ax in axes:
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels == [
            "no injection (n = 3)",
            "injection at 1k (n = 3)",
            "injection",
            "window of the verdict",
        ]
        (window,) = ax.patches
        assert (window.get_x(), window.get_x() + window.get_width()) == (INJECTION, INJECTION + 500)
        assert ax.get_ylabel() == "return of a training game"
    colours = [
        {line.get_label(): line.get_color() for line in ax.lines if "(n = 3)" in line.get_label()}
        for ax in axes
    ]
    assert (
        colours[0]
        == colours[1]
        == dict(zip(("no injection (n = 3)", "injection at 1k (n = 3)"), COLOURS, strict=False))
    )


@pytest.mark.parametrize(("aggregate", "level"), [("mean", 11_110 / 4), ("iqm", 550)])
def test_both_figures_show_what_was_asked_for(saved, aggregate, level):
    tag = "plasticity/dormant_fraction"
    arms = arms_of(
        *(
            make_run(f"{s}", {t: [(1, 10.0**s), (TOTAL, 10.0**s)] for t in (RETURN, tag)}, seed=s)
            for s in (1, 2, 3, 4)
        )
    )
    draw_returns(arms, [], Path("x.png"), RETURN, aggregate)
    draw_plasticity(arms, Path("y.png"), aggregate)
    for figure in saved.values():
        (line,) = (line for line in figure.axes[0].lines if line.get_linewidth() == 2)
        np.testing.assert_allclose(line.get_ydata(), level)


@pytest.mark.parametrize(("num_games", "points"), [(30, 20), (500, 50), (3_000, 100)])
def test_curves_of_return_have_20_to_100_points_of_ten_games_on_average(saved, num_games, points):
    steps = np.linspace(TOTAL / num_games, TOTAL, num_games)
    arms = arms_of(make_run("a", {RETURN: [(step, 1.0) for step in steps]}))
    draw_returns(arms, [], Path("x.png"), RETURN, "mean")
    assert len(saved["x.png"].axes[0].lines[0].get_xdata()) == points


def test_no_window_is_shaded_where_one_side_has_no_run(saved):
    for name, firsts in (("early", {1: []}), ("injected", {2: [1_500]})):
        arms = arms_of(*make_norm_arms(firsts))
        draw_returns(arms, comparisons(arms, RETURN, None), Path(name), RETURN, "mean")
    shaded = {name: len(figure.axes[0].patches) for name, figure in saved.items()}
    assert shaded == {"early": 0, "injected": 1}


def test_differences_are_drawn_with_their_intervals_against_the_number_that_varies(saved):
    rates = (1e-3, 1e-4, 5e-4)
    runs = [
        run for rate in rates for run in make_arms(effect=1e5 * rate, prefix=f"{rate}-", learning_rate=rate)
    ]
    pairs = comparisons(arms_of(*runs), RETURN, None)
    draw_differences(pairs, "learning_rate", Path("x.png"))
    (ax,) = saved["x.png"].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.0001", "0.0005", "0.001"]
    assert ax.get_xlabel() == "learning rate" and ax.get_title(loc="left") == "PhoenixNoFrameskip-v4"
    expected = {pair.arms[1].setting["learning_rate"]: pair.judgement for pair in pairs}
    (container,) = ax.containers
    drawn, _, (bars,) = container
    assert drawn.get_ydata().tolist() == [expected[rate].difference for rate in sorted(rates)]
    spans = [segment[:, 1].tolist() for segment in bars.get_segments()]
    np.testing.assert_allclose(spans, [(expected[rate].low, expected[rate].high) for rate in sorted(rates)])
    assert [text.get_text() for text in saved["x.png"].legends[0].get_texts()] == ["injection at 1k (n = 3)"]
    seeds = []
    for pair in sorted(pairs, key=lambda pair: pair.arms[1].setting["learning_rate"]):
        seeds += pair.differences.values()
    assert next(line for line in ax.lines if line.get_marker() == ".").get_ydata().tolist() == seeds


def test_a_difference_without_an_interval_has_no_bar_that_would_look_certain(saved):
    few, enough = make_arms((1, 2), prefix="few-", learning_rate=1e-3), make_arms(learning_rate=1e-4)
    draw_differences(comparisons(arms_of(*few, *enough), RETURN, None), "learning_rate", Path("x.png"))
    (ax,) = saved["x.png"].axes
    ((drawn, caps, (bars,)),) = ax.containers
    assert np.isfinite(drawn.get_ydata()).all()
    ends = np.array([cap.get_ydata() for cap in caps]).T
    spans = np.array([segment[:, 1] if len(segment) else (np.nan, np.nan) for segment in bars.get_segments()])
    assert np.isfinite(ends).all(axis=1).tolist() == np.isfinite(spans).all(axis=1).tolist() == [True, False]


def test_what_arms_share_is_drawn_as_the_arm_without_an_intervention(saved):
    arms = arms_of(*make_arms())
    draw_returns(arms, comparisons(arms, RETURN, None), Path("x.png"), RETURN, "mean")
    lines = {line.get_label().split(" (")[0]: line.get_zorder() for line in saved["x.png"].axes[0].lines}
    assert lines["no injection"] > lines["injection at 1k"]


def test_differences_are_drawn_against_the_step_of_the_injection(saved):
    runs = [run for step in (2_000, 1_000) for run in make_arms(prefix=f"{step}-", injection_step=(step,))]
    draw_differences(comparisons(arms_of(*runs), RETURN, None), "injection", Path("x.png"))
    (ax,) = saved["x.png"].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1k", "2k"]
    assert ax.get_xlabel() == "step of the injection"
    assert [text.get_text() for text in saved["x.png"].legends[0].get_texts()] == ["injection (n = 3)"]


def test_an_interventions_own_number_is_on_the_axis_and_in_no_name(saved):
    runs = make_arms()[::2]
    for factor in (0.5, 0.8):
        how = {"intervention": "shrink-perturb", "shrink_factor": factor}
        runs += [
            make_run(f"{factor}-{seed}", {RETURN: games(seed, 2)}, seed=seed, **how) for seed in (1, 2, 3)
        ]
    draw_differences(comparisons(arms_of(*runs), RETURN, None), "shrink_factor", Path("x.png"))
    (ax,) = saved["x.png"].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.5", "0.8"]
    names = [text.get_text() for text in saved["x.png"].legends[0].get_texts()]
    assert names == ["shrink and perturb at 1k (n = 3)"]


@pytest.mark.parametrize(
    ("injected", "name"),
    [
        ({}, "injection at 1k (n = 3)"),
        ({"injected_head_width": 1024}, "injection at 1k, injected head width 1,024 (n = 3)"),
        ({"injected_head_width": 512}, "injection at 1k, injected head width 512 (n = 3)"),
    ],
)
def test_an_injection_is_one_arm_at_all_widths_of_the_first_head(saved, injected, name):
    runs = []
    for width in (256, 512):
        runs += make_arms(prefix=f"{width}-", head_width=width, **injected)
    draw_differences(comparisons(arms_of(*runs), RETURN, None), "head_width", Path("x.png"))
    assert [text.get_text() for text in saved["x.png"].legends[0].get_texts()] == [name]


@pytest.mark.parametrize(("number_of_games", "title"), [(1, "Game0NoFrameskip-v4"), (9, "9 games")])
def test_a_figure_of_differences_grows_with_its_games_and_not_its_panel(saved, number_of_games, title):
    runs = []
    for number in range(number_of_games):
        for rate in (1e-4, 1e-3):
            how = {"env_id": f"Game{number}NoFrameskip-v4", "learning_rate": rate}
            runs += make_arms(prefix=f"{number}-{rate}-", **how)
    draw_differences(comparisons(arms_of(*runs), RETURN, None), "learning_rate", Path("x.png"))
    figure = saved["x.png"]
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert ax.get_title(loc="left") == title
    assert len(figure.legends[0].get_texts()) == number_of_games
    assert 2.5 < ax.get_position().height * figure.get_figheight() < 3.5  # inches


def test_a_game_of_which_nothing_was_measured_yet_has_no_legend(saved):
    measured = make_arms()
    for run in measured:
        run.scalars.update({tag: np.array([[100.0], [value]]) for tag, value in PLASTICITY.items()})
    others = make_arms(prefix="pong-", env_id="PongNoFrameskip-v4")[::2]
    assert draw_plasticity(arms_of(*measured, *others), Path("x.png"), "mean")
    phoenix, pong = saved["x.png"].subfigs
    assert len(phoenix.legends) == 1 and not pong.legends


def test_plasticity_is_drawn_per_game_and_measure_that_any_run_has(saved):
    runs = make_games("PhoenixNoFrameskip-v4", "PongNoFrameskip-v4")
    assert not draw_plasticity(arms_of(*runs), Path("x.png"), "mean") and not saved
    for run in runs[1:]:
        run.scalars.update(
            {
                tag: np.array([[100.0, 200.0, 300.0], [value, value, np.nan]])
                for tag, value in PLASTICITY.items()
            }
        )
    assert draw_plasticity(arms_of(*runs), Path("x.png"), "iqm")
    titles = [ax.get_title(loc="left") for ax in saved["x.png"].axes]
    measures = [
        "dormant fraction",
        "srank of the encoder's features",
        "learning head's weight norm ÷ initial",
    ]
    assert titles == 2 * measures


def drawn_as(line):
    """What tells a line from others without its colour."""
    return line.get_linestyle(), line.get_marker()


@pytest.mark.parametrize("count", [2, 8, 12])
def test_every_arm_is_told_from_all_others_without_colours_also_in_the_legends(saved, count):
    runs = [
        run
        for rate in range(1, count // 2 + 1)
        for run in make_arms((1,), prefix=f"{rate}-", learning_rate=rate / 1e4)
    ]
    for run in runs:
        run.scalars.update(
            {tag: np.array([[100.0, 200.0], [value, value]]) for tag, value in PLASTICITY.items()}
        )
    arms = arms_of(*runs)
    draw_returns(arms, [], Path("returns.png"), RETURN, "mean")
    draw_plasticity(arms, Path("plasticity.png"), "mean")
    (ax,) = saved["returns.png"].axes
    for panel, legend in (
        (ax, ax.get_legend()),
        (saved["plasticity.png"].axes[0], saved["plasticity.png"].subfigs[0].legends[0]),
    ):
        means = {str(line.get_label()): drawn_as(line) for line in panel.lines if line.get_linewidth() == 2}
        assert len(means) == len(set(means.values())) == count
        shown = {
            text.get_text(): drawn_as(line)
            for text, line in zip(legend.get_texts(), legend.get_lines(), strict=False)
        }
        assert means.items() <= shown.items()
        assert all(line.get_linewidth() == 0.6 for line in panel.lines if line.get_alpha() == 0.45), (
            "one run's stay thin"
        )


def test_a_figure_grows_with_its_legend(saved):
    runs = [
        run for rate in range(1, 7) for run in make_arms((1,), prefix=f"{rate}-", learning_rate=rate / 1e4)
    ]
    for name, shown in (("few", runs[:2]), ("many", runs)):
        draw_returns(arms_of(*shown), [], Path(name), RETURN, "mean")
    heights = []
    for figure in saved.values():
        with drawing():
            figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]


def test_arms_that_are_compared_side_by_side_differ_in_their_markers(saved):
    runs = []
    for rate in (1e-4, 1e-3):
        for subject in ("none", "injection", "reset-head", "shrink-perturb"):
            for seed in (1, 2):
                points = {RETURN: games(seed, len(subject))}
                runs.append(
                    make_run(
                        f"{rate}-{subject}-{seed}",
                        points,
                        seed=seed,
                        learning_rate=rate,
                        intervention=subject,
                    )
                )
    draw_differences(comparisons(arms_of(*runs), RETURN, None), "learning_rate", Path("x.png"))
    (ax,) = saved["x.png"].axes
    points = [container[0] for container in ax.containers]
    assert len({line.get_marker() for line in points}) == len(points) == 3
    assert len({x for line in points for x in line.get_xdata()}) == 6, "none hides another"
