"""The table and figure of img/draw_effects.py: what each arm changes against no intervention."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import status_of
from simulated_runs import ALIEN, INJECTION, PHOENIX, RETURN, TOTAL, games, make_run

from analysis.curves import write_curves
from img import draw_effects

SEEDS = (1, 2, 3)
DORMANT = "plasticity/dormant_fraction/head"
GAIN = 50.0
LATE_GAIN = 200.0  # in the last 500 steps
PHASES = ("first 500", "all 2,000", "last 500")


def arm(name, intervention, gain=0.0, late_gain=0.0, dormant=0.5, seeds=SEEDS, upto=TOTAL, **args):
    """Runs that were one up to the injection; a game every 100 steps, up to the last."""
    runs = []
    for seed in seeds:
        points = []
        for step, value in games(seed, len(intervention), upto=upto):
            effect = late_gain if step > TOTAL - 500 else gain * (step > INJECTION)
            points.append((step, value + effect))
        shares = [(INJECTION, 0.9), (1_500, 0.1), (upto - 1, dormant + seed / 100), (upto, 0.0)]
        measured = {RETURN: points, DORMANT: shares}
        runs.append(make_run(f"{name}-{seed}", measured, upto, seed=seed, intervention=intervention, **args))
    return runs


def write(name, runs):
    write_curves(runs, Path(f"{name}.csv"))
    return runs


def write_both(**of_injection):
    write("none", arm("none", "none"))
    return write("injection", arm("injection", "injection", GAIN, LATE_GAIN, dormant=0.3, **of_injection))


def write_scores(scores):
    """Two games of each run's agent, of {folder: mean}."""
    rows = ["run,game,score"]
    for folder, mean in scores.items():
        rows += [f"{folder},1,{mean - 10}", f"{folder},2,{mean + 10}"]
    Path("games.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script; returns its status, what it printed as {arm: cells}, other lines, its error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["draw_effects.py", *words])
        status = status_of(draw_effects.main)
        printed, error = capsys.readouterr()
        table = {}
        others = []
        for line in printed.splitlines():
            if line.startswith("|"):
                name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
                table[name] = cells
            else:
                others.append(line)
        return status, table, others, error

    return run


@pytest.fixture
def drawn(monkeypatch):
    """{name: figure} of those that would be saved."""
    figures = {}
    monkeypatch.setattr(draw_effects, "save", lambda figure, path: figures.update({path: figure}))
    return figures


def files():
    return sorted(str(path) for path in Path().glob("*.csv"))


def mean_of(cell):
    return float(cell.partition(" ")[0].replace(",", "").replace("−", "-"))


def test_each_number_is_of_its_own_steps(command):
    runs = write_both()
    status, table, _, _ = command("x.png", "500", *files())
    assert status == 0 and Path("x.png").stat().st_size > 5_000
    assert table["arm"] == [f"return, {phase} steps" for phase in PHASES] + ["dormant units of the head, end"]
    first, whole, last, dormant = map(mean_of, table["injection at 1k: change"])
    assert first == pytest.approx(GAIN, abs=2) and last == pytest.approx(LATE_GAIN, abs=2)
    assert whole == pytest.approx((15 * GAIN + 5 * LATE_GAIN) / 20, abs=2)
    assert dormant == pytest.approx(-0.2, abs=1e-3)
    assert mean_of(table["no injection"][3]) == pytest.approx(0.52, abs=1e-3)
    # the bounds are steps after which a part begins, and steps that belong to it
    assert draw_effects.mean_return(runs[0], 1_000, 1_100) == runs[0].scalars[RETURN][1][10]


def test_units_that_have_just_been_recycled_are_not_the_dormant_ones_of_the_end(command):
    """ReDo has recycled at the step of the last measure. Both arms have the one before it, 0.1 and 0.3."""
    write("none", arm("none", "none"))
    recycling = arm("redo", "redo", dormant=0.0)
    for run in recycling:
        run.scalars["injection/recycled/head"] = np.array([[INJECTION, TOTAL - 1], [5.0, 7.0]])
        run.scalars[DORMANT][1, 1] = 0.3
    write("redo", recycling)
    status, table, _, _ = command("x.png", "500", *files())
    (name,) = [name for name in table if name.endswith(": change")]
    assert status == 0 and mean_of(table[name][3]) == pytest.approx(0.2, abs=1e-3)
    assert mean_of(table["no intervention"][3]) == pytest.approx(0.1, abs=1e-3)


def test_the_figure_is_of_the_game_that_is_compared_and_arms_in_no_comparison_are_named(command, drawn):
    write_both()
    write("alien", arm("alien", "none", env_id=ALIEN))
    write("other", arm("other", "injection", learning_rate=1e-2))
    status, table, others, _ = command("x.png", "500", "alien.csv", "injection.csv", "none.csv", "other.csv")
    assert status == 0 and len(table) == 4
    assert drawn["x.png"].get_suptitle() == PHOENIX
    reasons = [line for line in others if line.endswith("has no counterpart here")]
    assert len(reasons) == 2 and all(line.startswith("left out: ") for line in reasons)
    assert ALIEN in reasons[0] + reasons[1] and "learning rate 0.01" in reasons[0] + reasons[1]


def test_the_window_is_that_of_the_verdict(command):
    write_both()
    _, table, _, _ = command("x.png", "500", *files())
    (pair,) = draw_effects.comparisons(draw_effects.read_files(files())[0], RETURN, None)
    judged = pair.judgement
    assert table["injection at 1k: change"][1] == draw_effects.show(
        judged.difference, judged.low, judged.high
    )


def test_intervals_are_of_the_differences_within_seeds(command):
    write("none", arm("none", "none"))
    write("injection", arm("injection", "injection"))
    offsets = {1: 1_000.0, 2: 2_000.0, 3: 3_000.0}
    scores = {f"none-{seed}": offset for seed, offset in offsets.items()}
    scores |= {f"injection-{seed}": offset + 100 + seed for seed, offset in offsets.items()}
    write_scores(scores)
    _, table, _, _ = command("x.png", "500", *files())
    assert table["arm"][-1] == "final agent, whole games"
    assert table["injection at 1k: change"][-1] == "102 [100, 104]"
    assert table["no injection"][-1] == "2,000 [−484, 4,484]"


def test_a_seed_without_a_value_is_left_out_and_the_others_are_counted(command):
    runs = write_both()
    silent = next(run for run in runs if run.args.seed == 2)
    steps = silent.scalars[RETURN][0]
    silent.scalars[RETURN] = silent.scalars[RETURN][:, steps <= TOTAL - 500]
    write("injection", runs)
    write_scores({"none-1": 10.0, "injection-1": 20.0, "injection-2": 30.0, "elsewhere": 40.0})
    _, table, others, _ = command("x.png", "500", *files())
    cells = table["injection at 1k: change"]
    assert cells[2].endswith("(2 seeds)") and "seeds" not in cells[1]
    assert cells[-1] == "10.0 (1 seed)"
    assert others == ["left out: the scores of elsewhere, a run that is in no arm here"]


def test_a_run_that_does_not_count_in_the_comparison_changes_nothing(command):
    write("none", arm("none", "none", seeds=(1, 2, 3, 4)))
    runs = arm("injection", "injection", GAIN, LATE_GAIN)
    write("injection", runs)
    _, table, _, _ = command("x.png", "500", *files())
    (elsewhere,) = arm("elsewhere", "injection", 10 * GAIN, seeds=(4,))
    elsewhere.scalars[RETURN][1] += 1  # also of the games before the injection
    write("injection", [*runs, elsewhere])
    _, with_another, _, _ = command("x.png", "500", *files())
    assert with_another == table


@pytest.mark.parametrize("side", ["none", "injection"])
def test_a_run_that_ended_early_is_left_out_and_named(command, side):
    arms = {name: arm(name, name, seeds=(1, 2, 3)) for name in ("none", "injection")}
    for name, runs in arms.items():
        write(name, runs)
    _, expected, _, _ = command("x.png", "500", *files())
    for name, runs in arms.items():
        upto = TOTAL
        if name == side:
            upto = INJECTION + 600
        write(name, [*runs, *arm(name, name, seeds=(4,), upto=upto)])
    _, table, others, _ = command("x.png", "500", *files())
    assert table == expected
    assert others[0] == f"unfinished: {side}.csv (seed 4) is at step 1,600 of 3,000"
    assert others[1].startswith(
        f"left out: {side}.csv (seed 4) is at step 1,600, 600 steps beyond the injection"
    )
    assert len(others) == 3, "and the one that it has no run to be compared with"


def continued(seeds):
    """Runs with and without an injection that go on from one checkpoint of seed 1, in other ways."""
    for name in ("none", "injection"):
        runs = arm(
            name, name, GAIN * (name == "injection"), seeds=seeds, fork=f"runs/a/checkpoint-{INJECTION}"
        )
        for run in runs:
            before = run.scalars[RETURN][0] <= INJECTION
            run.scalars[RETURN][1, before] = [value for _, value in games(1, 0, upto=INJECTION)]
        write(name, runs)


def test_of_one_agent_it_is_said(command, drawn):
    continued((1, 2, 3))
    name = "injection at 1k, continuations of one agent"
    _, table, others, _ = command("x.png", "500", *files())
    assert others == [] and "seed" not in table[f"{name}: change"][1]
    (label,) = drawn["x.png"].axes[0].get_yticklabels()
    assert label.get_text().replace("\n", " ") == name


def test_also_where_other_agents_have_gone_on_in_one_way_only(command):
    continued((1, 2, 3))
    write("others", arm("others", "none", seeds=(4, 5, 6)))
    _, table, _, _ = command("x.png", "500", *files())
    assert "injection at 1k, continuations of one agent: change" in table


def test_beside_other_agents_each_agent_counts_once(command):
    continued((1, 5, 6))
    for name in ("none", "injection"):
        Path(f"{name}.csv").rename(f"continued_{name}.csv")
    write("none", arm("none", "none", seeds=(2, 3)))
    write("injection", arm("injection", "injection", GAIN, seeds=(2, 3)))
    _, table, others, _ = command("x.png", "500", *files())
    assert sorted(others) == [
        f"left out: continued_{name}.csv (seed {seed}) continues the agent of seed 1, "
        "which counts once beside other agents"
        for name in ("injection", "none")
        for seed in (5, 6)
    ]
    (pair,) = draw_effects.comparisons(draw_effects.read_files(files())[0], RETURN, None)
    judged = pair.judgement
    assert list(pair.means[0]) == [1, 2, 3]
    assert table["injection at 1k: change"][1] == draw_effects.show(
        judged.difference, judged.low, judged.high
    )


def test_a_run_none_of_whose_games_ended_still_has_its_other_numbers(command):
    write_both()
    runs = arm("injection", "injection", GAIN, LATE_GAIN, dormant=0.3, seeds=(1, 2, 3, 4))
    longest = runs[3]
    longest.scalars[RETURN] = longest.scalars[RETURN][:, :10]  # up to the injection
    write("none", arm("none", "none", seeds=(1, 2, 3, 4)))
    write("injection", runs)
    write_scores({f"{name}-{seed}": seed for name in ("none", "injection") for seed in (1, 2, 3, 4)})
    _, table, others, _ = command("x.png", "500", *files())
    assert others == []
    *of_return, dormant, final = table["injection at 1k: change"]
    assert all(cell.endswith(" (3 seeds)") for cell in of_return)
    assert not dormant.endswith(")") and final == "0"


def test_a_run_that_is_given_twice_counts_once(command):
    runs = write_both()
    write("again", runs[:1])
    _, table, others, _ = command("x.png", "500", *files())
    assert others == [
        "left out: injection.csv (seed 1) has the arm and the seed of again.csv (seed 1), "
        "which has got to step 3,000: the run is left out"
    ]
    assert "seeds" not in table["injection at 1k: change"][1]


def test_scores_may_be_in_several_files(command):
    write_both()
    write_scores({f"none-{seed}": 10.0 * seed for seed in SEEDS})
    Path("games.csv").rename("others.csv")
    write_scores({f"injection-{seed}": 10.0 * seed + seed for seed in SEEDS})
    _, table, _, _ = command("x.png", "500", *files())
    assert mean_of(table["injection at 1k: change"][-1]) == 2


def test_an_arm_without_any_value_has_a_dash(command, drawn):
    write_both()
    write_scores({f"none-{seed}": 10.0 * seed for seed in SEEDS})
    _, table, _, _ = command("x.png", "500", *files())
    assert table["injection at 1k: change"][-1] == "–" and table["no injection"][-1].startswith("20.0 [")
    zero = drawn["x.png"].axes[-1].lines
    assert len(zero) == 1


def test_the_figure_says_of_how_many_seeds_a_panel_is_where_some_have_no_value(command, drawn):
    write_both()
    write_scores({f"{name}-{seed}": 10.0 * seed for name in ("none", "injection") for seed in (1, 3)})
    assert command("x.png", "500", *files())[0] == 0
    labels = [ax.get_xlabel() for ax in drawn["x.png"].axes]
    assert labels[-1] == "change; without: 20.0 (2 seeds)"
    assert not any("seeds" in label for label in labels[:-1])


def test_every_arm_has_a_row_in_the_figure(command, drawn):
    write_both()
    write("head", arm("head", "reset-head", -GAIN))
    assert command("x.png", "500", *files())[0] == 0
    axes = drawn["x.png"].axes
    assert [ax.get_title(loc="left") for ax in axes] == command("x.png", "500", *files())[1]["arm"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [
        "injection at 1k",
        "head reset at 1k",
    ]
    assert axes[0].get_xlim() == axes[1].get_xlim() == axes[2].get_xlim() != axes[3].get_xlim()
    for row, mean in enumerate((0.75 * GAIN + 0.25 * LATE_GAIN, -0.75 * GAIN)):
        interval, centre, seeds = (line.get_xydata() for line in axes[1].lines[3 * row : 3 * row + 3])
        assert centre.tolist() == [[pytest.approx(mean, abs=2), row]]
        assert interval[:, 0].mean() == pytest.approx(centre[0, 0]) and np.ptp(interval[:, 0]) > 0.1
        assert len(seeds) == 3 and seeds[:, 0].mean() == pytest.approx(centre[0, 0])
        assert np.all(interval[:, 1] == row) and np.all(seeds[:, 1] == row + 0.25)
    assert axes[1].yaxis_inverted()
    assert axes[3].get_xlabel() == "change; without: 0.520"


def test_what_cannot_be_compared_is_refused(command):
    write_both()
    write("head", arm("head", "reset-head", injection_step=(1_500,)))
    assert "begins at another step than the arms before it" in command("x.png", "500", *files())[3]


def test_arms_that_have_got_to_different_steps_are_drawn_over_what_both_have(command):
    write_both()
    write("head", arm("head", "reset-head", upto=TOTAL - 500))
    _, table, _, _ = command("x.png", "500", *files())
    assert "return, all 1,500 steps" in table["arm"] and "head reset at 1k: change" in table


def test_a_final_agent_of_a_step_beyond_the_window_is_not_compared(command):
    write("none", arm("none", "none", upto=TOTAL - 500))
    write("injection", arm("injection", "injection"))
    write_scores({f"{name}-{seed}": 100.0 for name in ("none", "injection") for seed in SEEDS})
    _, table, others, _ = command("x.png", "500", *files())
    assert table["injection at 1k: change"][-1] == "–" and table["no injection"][-1].startswith("100")
    reason = f"the window ends at {TOTAL - 500:,}, and it is the agent of step {TOTAL:,}"
    assert sum(reason in line for line in others) == len(SEEDS)


def test_one_quantity_alone_is_drawn(command, drawn):
    for name in ("none", "injection"):
        runs = arm(name, name)
        for run in runs:
            del run.scalars[DORMANT]
            run.scalars[RETURN] = run.scalars[RETURN][:, :-1]
        write(name, runs)
    status, table, _, _ = command("x.png", "50", *files())
    assert status == 0 and table["arm"] == ["return, all 2,000 steps"] and len(drawn["x.png"].axes) == 1


@pytest.mark.parametrize("seeds", [(1, 2), (4, 5, 6)])
def test_arms_that_share_no_history_are_refused(command, seeds):
    write("none", arm("none", "none"))
    write("injection", arm("injection", "injection", seeds=seeds))
    forks = len(set(seeds) & set(SEEDS))
    problem = (
        f"injection at 1k: {forks} agents have gone on with it and without it up to the window's end: give 3"
    )
    assert problem in command("x.png", "500", *files())[3]


def test_two_settings_are_refused(command):
    write_both()
    write("other", arm("other", "none", learning_rate=1e-3))
    write("others", arm("others", "injection", learning_rate=1e-3))
    assert "is compared with other runs than the arms before it" in command("x.png", "500", *files())[3]


def test_scores_without_curves_are_nothing_to_compare(command):
    write_scores({"none-1": 100})
    status, _, _, error = command("x.png", "500", "games.csv")
    assert status != 0 and "scores of games alone: give the files of compare.py --export, too" in error


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "give a figure, a number of steps, and files: python img/draw_effects.py"),
        (["x.png", "0", "none.csv", "injection.csv"], "give a figure, a number of steps, and files"),
        (["x.png", "none.csv", "injection.csv"], "give a figure, a number of steps, and files"),
        (["x.gif", "500", "none.csv"], "must end in .png, .pdf or .svg"),
        (
            ["x.png", "500", "none.csv"],
            "no two arms differ in the intervention alone: give the files of both",
        ),
        (["x.png", "500", "nowhere.csv"], "nowhere.csv cannot be read as a file (FileNotFoundError"),
        (["x.png", "500", "empty.csv"], "empty.csv cannot be read as curves of runs"),
        (["x.png", "500", "bad.csv"], "bad.csv cannot be read as scores of games"),
        (["x.png", "2000", "none.csv", "injection.csv"], "has 2,000 steps: give fewer of them than 2,000"),
    ],
)
def test_bad_input_is_refused_in_one_line(command, words, problem):
    write_both()
    Path("empty.csv").write_text("", encoding="utf-8")
    Path("bad.csv").write_text("run,game,points\na,1,2\n", encoding="utf-8")
    status, table, _, error = command(*words)
    assert status == 1 and table == {} and problem in error
    assert error.startswith("error: ") and error.count("\n") == 1 and not Path("x.png").exists()
