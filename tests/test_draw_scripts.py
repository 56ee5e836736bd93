"""The scripts in img/ that draw runs and the network, as a user runs them."""

import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import status_of
from simulated_runs import RETURN, games, make_run, write

FOLDER = Path(__file__).parent.parent / "img"
EVALUATED = "eval/episodic_return"


@pytest.fixture
def script(monkeypatch):
    """Runs one with these arguments in a terminal of ASCII alone; returns its status and what it printed."""

    def run(name, *arguments):
        printed = io.BytesIO()
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
        main = runpy.run_path(str(FOLDER / f"{name}.py"))["main"]
        return status_of(main), printed.getvalue().decode("ascii")

    return run


def write_arms(names):
    """Two runs of each arm, evaluated twice."""
    runs = []
    for name in names:
        for seed in (1, 2):
            evaluations = [(1_000, 1.0), (2_000, 2.0 + seed)]
            points = {RETURN: games(seed, 0), EVALUATED: evaluations, "injection/step": [(1_000, 1_000)]}
            runs.append(write(make_run(f"{len(runs):02}", points, seed=seed, exp_name=name)))
    return runs


def test_every_arm_is_in_the_table_and_in_the_figure_however_many_there_are(script):
    names = ["_a $x_1$", "δ", *"bcdefgh"]
    status, printed = script("draw_arms", "x.svg", *write_arms(names))
    header, _, *rows = printed.splitlines()
    assert status == 0
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["step", "_a $x_1$", "?", *"bcdefgh"]
    assert [row.count("3.5 [3.0, 4.0]") for row in rows] == [0, len(names)]
    figure = Path("x.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {name}, mean of 2 -->" in figure for name in names)


def three_ways(step):
    """Three runs each that go on with an injection at a step, with a head reset, and without either."""
    runs = []
    for intervention in ("injection", "reset-head", "none"):
        for seed in (1, 2, 3):
            points = {RETURN: games(seed, step * (intervention != "none"))}
            how = {"seed": seed, "intervention": intervention, "injection_step": (step,)}
            runs.append(write(make_run(f"{intervention}-{seed}", points, **how)))
    return runs


def test_three_ways_to_go_on_are_drawn_by_name_and_are_one_curve_before(script, monkeypatch):
    drawn = {}
    monkeypatch.setattr("analysis.canvas.save", lambda figure, path: drawn.update({path: figure}))
    assert script("draw_injection", "x.png", *three_ways(1_000)) == (0, "")
    ax = drawn["x.png"].axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert texts[:3] == ["no intervention", "head reset", "plasticity injection"]
    assert texts[3] == "injection or reset \nat step 1,000 "
    none, *others = [line for line in ax.lines if len(line.get_xdata()) > 2]
    shown = [np.flatnonzero(np.isfinite(line.get_ydata())) for line in (none, *others)]
    steps = [none.get_xdata()[of_line].min() for of_line in shown]
    assert steps[0] < 200 and all(900 < step < 1_000 for step in steps[1:])
    assert np.ptp([line.get_ydata()[shown[1][0]] for line in (none, *others)]) < 1e-9


def test_what_is_not_three_ways_to_go_on_from_one_step_is_refused(script, capsys):
    runs = three_ways(1_000)
    assert script("draw_injection", "x.png", *runs[:6])[0] == 1
    assert "give one arm each of none, injection, reset-head" in capsys.readouterr().err


def test_three_ways_that_differ_in_more_are_refused(script, capsys):
    runs = three_ways(1_000)
    others = []
    for seed in (1, 2, 3):
        how = {"seed": seed, "intervention": "reset-head", "learning_rate": 1e-3}
        others.append(write(make_run(f"other-{seed}", {RETURN: games(seed, 1)}, **how)))
    assert script("draw_injection", "x.png", *runs[:3], *others, *runs[6:])[0] == 1
    assert "the arms differ in more than the intervention" in capsys.readouterr().err


def test_three_ways_of_which_one_has_no_games_yet_are_refused(script, capsys):
    runs = three_ways(1_000)
    begun = write(make_run("begun", {RETURN: games(3, 1, upto=900)}, 900, seed=3))
    assert script("draw_injection", "x.png", *runs[:2], begun, *runs[3:])[0] == 1
    error = capsys.readouterr().err
    assert "injection at 1k: not all runs have games in one stretch beyond step 1,000" in error


@pytest.mark.parametrize(
    ("count", "title"), [(3, "mean of 3 seeds; shaded: 95% interval"), (1, "mean of 1 seed")]
)
def test_an_interval_is_named_where_there_is_one(script, monkeypatch, count, title):
    drawn = []
    monkeypatch.setattr("analysis.canvas.save", lambda figure, path: drawn.append(figure))
    runs = three_ways(1_000)
    few = [run for number, run in enumerate(runs) if number % 3 < count]
    assert script("draw_injection", "x.png", *few) == (0, "")
    assert drawn[0].axes[0].get_title(loc="left") == f"PhoenixNoFrameskip-v4: {title}"


def test_in_a_runs_return_its_intervention_has_its_name(script):
    points = {RETURN: games(1, 0), "injection/step": [(1_000, 1_000)]}
    run = write(make_run("a", points, intervention="reset-head"))
    assert script("draw_return", run, "x.svg") == (0, "")
    figure = Path("x.svg").read_text(encoding="utf-8")
    assert "<!-- head reset -->" in figure and "injection" not in figure


def test_a_runs_return_is_drawn(script, monkeypatch):
    monkeypatch.setenv("HOME", str(Path().absolute()))
    run, *_ = write_arms(["a"])
    assert script("draw_return", f"~/{run}", "~/x.svg", "20.5") == (0, "")
    figure = Path("x.svg").read_text(encoding="utf-8")
    means = ["mean of the last 20 training games", "evaluation, mean of its games"]
    for label in (*means, "random play (20.5)", "injection"):
        assert f"<!-- {label} -->" in figure


def test_a_mean_of_the_last_20_games_stands_at_the_last_of_them(script, monkeypatch):
    drawn = []
    monkeypatch.setattr("analysis.canvas.save", lambda figure, path, **_: drawn.append(figure))
    points = games(1, 0)
    assert script("draw_return", write(make_run("a", {RETURN: points})), "x.svg")[0] == 0
    (line,) = [line for line in drawn[0].axes[0].lines if line.get_label().startswith("mean of the last 20")]
    steps, returns = np.array(points).T
    assert np.array_equal(line.get_xdata(), steps[19:])
    assert line.get_ydata()[[0, -1]] == pytest.approx([returns[:20].mean(), returns[-20:].mean()])


@pytest.mark.parametrize(("offset", "evaluation", "highest"), [(-200.0, -150.0, 20.5), (0.0, 150.0, 150.0)])
def test_a_score_below_0_is_drawn_and_more_is_above_less(script, monkeypatch, offset, evaluation, highest):
    drawn = []
    monkeypatch.setattr("analysis.canvas.save", lambda figure, path, **_: drawn.append(figure))
    points = [(step, value + offset) for step, value in games(1, 0)]
    run = write(make_run("a", {RETURN: points, EVALUATED: [(1_000, evaluation)]}))
    assert script("draw_return", run, "x.svg", "20.5")[0] == 0
    lowest = min(0, min(value for _, value in points))
    assert drawn[0].axes[0].get_ylim() == (pytest.approx(lowest), highest)


@pytest.mark.parametrize("shift", [-9_000, 0])
def test_three_ways_are_drawn_from_0_on_or_below_it_where_they_score_less(script, monkeypatch, shift):
    drawn = []
    monkeypatch.setattr("analysis.canvas.save", lambda figure, path: drawn.append(figure))
    runs = []
    for intervention in ("injection", "reset-head", "none"):
        for seed in (1, 2, 3):
            gained = 5_000 if intervention == "injection" else 0
            scores = games(seed, intervention != "none", effect=gained)
            points = {RETURN: [(step, score + shift) for step, score in scores]}
            how = {"seed": seed, "intervention": intervention}
            runs.append(write(make_run(f"{intervention}-{seed}", points, **how)))
    assert script("draw_injection", "x.png", *runs, "nowhere") == (
        0,
        "left out: nowhere is no run's folder, it has no run.json: the run is left out\n",
    )
    low, high = drawn[0].axes[0].get_ylim()
    if shift < 0:
        assert low < high < 0
    else:
        assert low == 0 < high


def test_runs_of_two_games_are_not_averaged(script, capsys):
    others = write(
        make_run("pong", {RETURN: games(1, 0), EVALUATED: [(1_000, 1.0)]}, env_id="PongNoFrameskip-v4")
    )
    assert script("draw_arms", "x.png", *write_arms("a"), others)[0] == 1
    assert "the runs play PhoenixNoFrameskip-v4 and PongNoFrameskip-v4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "fix"),
    [
        ("draw_arms", [], "give a figure and runs"),
        ("draw_arms", ["x.png", "nowhere"], "nowhere is no run's folder"),
        ("draw_return", [], "give a run and a figure's name"),
        ("draw_return", ["nowhere", "x.png", "many"], "RANDOM_SCORE is many, but must be a number"),
        (
            "draw_arms",
            ["x.foo", "nowhere"],
            "the figure is x.foo, but must end in .png, .pdf or .svg: give another name",
        ),
        ("draw_arms", ["x.png", "nowhere"], "it has no run.json: leave it out"),
        (
            "draw_return",
            ["nowhere", "x"],
            "the figure is x, but must end in .png, .pdf or .svg: give another name",
        ),
        ("draw_return", ["nowhere", "x.png"], "nowhere is no run's folder, it has no run.json: give another"),
        ("draw_injection", ["x.png"], "give a figure and the files of three arms"),
        ("draw_signs", [], "no runs are given: give folders of runs, or files of compare.py --export"),
    ],
)
def test_what_is_missing_is_said_in_one_line(script, capsys, name, arguments, fix):
    assert script(name, *arguments) == (1, "")
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and fix in errors


def test_the_network_is_drawn_before_and_after_an_injection(script, monkeypatch):
    drawn = {}
    monkeypatch.setattr("analysis.canvas.save", lambda figure, path, **how: drawn.update({path.name: figure}))
    assert script("draw_architecture") == (0, "")
    texts = [text.get_text() for text in drawn["architecture.png"].axes[0].texts]
    assert "trained" in texts and any(text.startswith("after it:") for text in texts)
