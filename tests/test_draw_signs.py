"""The table and figure of img/draw_signs.py: what was measured of agents beside what an injection gained."""

import itertools
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from simulated_runs import ALIEN, INJECTION, RETURN, games, known, make_arms, make_norm_arms, make_run

from analysis.curves import read_curves, write_curves
from analysis.task_sequence import INJECTED, SAME
from img import draw_signs

SCRIPT = str(Path(__file__).parent.parent / "img" / "draw_signs.py")
RATES = (1e-4, 1e-3)


def write_dose():
    """Three agents at one learning rate, four at a larger one. At each, gains fall as more is dormant.

    At the larger one both are larger.
    """
    for rate, seeds, offset in ((1e-4, (1, 2, 3), 0), (1e-3, (1, 2, 3, 4), 1)):
        for intervention, exp_name in (("none", f"none_{rate}"), ("injection", f"injection_{rate}")):
            injected = intervention == "injection"
            runs = []
            for seed in seeds:
                gain = 1_000 * offset - 100 * seed if injected else 0
                dormant = [(INJECTION, seed / 10 + offset), (2_000, 0.0)]
                measured = {RETURN: games(seed, injected, gain), "plasticity/dormant_fraction/head": dormant}
                how = {"learning_rate": rate, "intervention": intervention, "exp_name": exp_name}
                folder = f"PhoenixNoFrameskip-v4__{exp_name}__{seed}__1795760000"
                runs.append(make_run(folder, measured, seed=seed, **how))
            write_curves(runs, Path(f"{rate}_{injected}.csv"))


def probe(exp_name, seed, agent, injected, step=INJECTION, names=("agent", "agent, injected"), **more):
    folder = f"sweeps/x/runs/PhoenixNoFrameskip-v4__{exp_name}__{seed}__1795760000"
    relative = dict(zip(names, (agent and {"ratio": agent}, {"ratio": injected}), strict=True))
    return {"checkpoint": f"{folder}/checkpoint-{step}", "relative_to_fresh": relative, **more}


def draw(monkeypatch, capsys):
    """The table {measure: cells}, and what is said before it."""
    monkeypatch.setattr(
        sys, "argv", [SCRIPT, "x.png", *map(str, (*Path().glob("*.csv"), *Path().glob("*.json")))]
    )
    runpy.run_path(SCRIPT, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in rows}, [line for line in lines if not line.startswith("|")]


def test_what_goes_with_the_learning_rate_is_told_from_what_goes_with_the_gain(monkeypatch, capsys):
    write_dose()
    table, printed = draw(monkeypatch, capsys)
    assert table["at the injection"] == [
        "agents",
        "0.0001",
        "0.001",
        "correlation, all",
        "within learning rates",
    ]
    count, low, high, over_all, within = table["dormant_fraction/head"]
    assert (count, low, high, within) == ("7", "0.1 to 0.3", "1.1 to 1.4", "-1.00") and float(over_all) > 0.4
    assert printed[-1].startswith("by chance the largest of 1 within learning rates is beyond ±0.")
    assert Path("x.png").stat().st_size > 5_000


def test_chance_is_the_largest_correlation_within_learning_rates_of_all_shuffles():
    gains = {1e-4: (1.0, 2.0, 4.0), 1e-3: (30.0, 10.0, 20.0)}
    measured = {"one": {1e-4: (1, 3, 2), 1e-3: (5, 6, 9)}, "other": {1e-4: (2, 2, 1), 1e-3: (7, 5, 6)}}
    by_rate = {}
    for rate, of_rate in gains.items():
        by_rate[rate] = []
        for i, gain in enumerate(of_rate):
            measures = {name: values[rate][i] for name, values in measured.items()}
            by_rate[rate].append(draw_signs.Agent(rate, INJECTION, gain, measures))
    largest = []
    for low, high in itertools.product(
        itertools.permutations(gains[1e-4]), itertools.permutations(gains[1e-3])
    ):
        sizes = []
        for values in measured.values():
            ranks = [scipy.stats.rankdata(of_rate) - 2 for of_rate in (values[1e-4], values[1e-3], low, high)]
            rho = np.corrcoef(np.hstack(ranks[:2]), np.hstack(ranks[2:]))[0, 1]
            sizes.append(abs(rho))
        largest.append(max(sizes))
    found = draw_signs.largest_by_chance(by_rate, list(measured))
    assert len(found) == draw_signs.SHUFFLES
    for size in set(np.round(largest, 6)):
        share = np.mean(np.round(largest, 6) <= size)
        assert np.mean(np.round(found, 6) <= size) == pytest.approx(share, abs=0.07)


def test_of_what_chance_does_the_median_and_one_of_twenty_are_said(monkeypatch, capsys):
    write_dose()
    by_chance = np.arange(101) / 100
    monkeypatch.setattr(draw_signs, "largest_by_chance", lambda *given: by_chance)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "x.png", *map(str, Path().glob("*.csv"))])
    draw_signs.main()
    line = capsys.readouterr().out.splitlines()[-1]
    assert "beyond ±0.50 in half of all cases, beyond ±0.95 in 1 of 20" in line


def test_a_point_is_an_agents_measure_and_its_gain(monkeypatch):
    figures = []
    monkeypatch.setattr(draw_signs, "save", lambda figure, path: figures.append(figure))
    agents = [draw_signs.Agent(1e-3, INJECTION, gain, {"probe": value}) for gain, value in ((10, 1), (20, 3))]
    draw_signs.draw("x.png", {1e-3: agents}, ["probe"])
    (points,) = figures[0].axes[0].collections
    assert points.get_offsets().tolist() == [[1, 10], [3, 20]]


def test_probes_are_those_of_their_agents_and_what_cannot_be_used_is_named(monkeypatch, capsys):
    write_dose()
    probes = [
        probe(f"none_{rate}", seed, 1 + seed * (rate == 1e-3), 2.0) for rate in RATES for seed in (1, 2)
    ]
    probes += [
        probe("none_0.001", 3, None, 2.0),
        probe("none_0.001", 5, 1.0, 2.0),
        probe("none_0.001", 3, 1.0, 2.0, step=7),
    ]
    probes += [{**probes[0], "checkpoint": "agent/checkpoint-1000"}]
    Path("probe_100.json").write_text(json.dumps(probes), encoding="utf-8")
    table, printed = draw(monkeypatch, capsys)
    assert table["probe_100, agent"][0] == "4" and float(table["probe_100, agent"][3]) > 0.5
    assert float(table["probe_100, injected ÷ agent"][3]) < -0.5 and table["probe_100, agent"][2] == "2 to 3"
    assert ["diverged" if "diverged" in line else "no gain" in line for line in printed[:-2]] == [
        "diverged",
        True,
        True,
        True,
    ]


NAME = "PhoenixNoFrameskip-v4__none__1"


@pytest.mark.parametrize(
    ("identity", "folder", "is_its"),
    [
        ({"folder": f"{NAME}__111"}, f"{NAME}__111", True),
        ({"folder": f"{NAME}__111"}, f"{NAME}__999", False),
        # forked from one after the injection's step, and before
        (known(f"{NAME}__222", (f"{NAME}__111", INJECTION, 1)), f"{NAME}__111", True),
        (known(f"{NAME}__222", (f"{NAME}__111", INJECTION - 1, 1)), f"{NAME}__111", False),
        # a file of an early version does not tell
        ({"run": None}, f"{NAME}__999", True),
        ({"run": None}, "PhoenixNoFrameskip-v4__none__2__999", False),
    ],
)
def test_an_agents_probe_is_that_of_a_run_that_it_was(identity, folder, is_its):
    run = make_run("x", {RETURN: games(1, 1)}, identity=identity, intervention="none", exp_name="none")
    folders = draw_signs.folders_at(run, INJECTION)
    agents = {NAME: draw_signs.Agent(1e-4, INJECTION, 1.0, {}, folders)}
    found = draw_signs.agent_at(Path(f"runs/{folder}/checkpoint-{INJECTION}"), agents)
    assert found == (NAME if is_its else None)
    assert draw_signs.agent_at(Path(f"runs/{folder}/checkpoint-7"), agents) is None


def test_of_a_sequence_of_tasks_the_one_network_and_the_injected_one_count(monkeypatch, capsys):
    write_dose()
    sequences = [
        probe("none_0.001", seed, seed, 6 / seed, names=(SAME, INJECTED), probe_tasks=12)
        for seed in (1, 2, 3, 4)
    ]
    Path("probe_tasks.json").write_text(json.dumps(sequences), encoding="utf-8")
    table, _ = draw(monkeypatch, capsys)
    assert table["probe_tasks, agent"] == ["4", "–", "1 to 4", "-1.00", "-1.00"]
    assert table["probe_tasks, injected ÷ agent"][2:] == ["0.375 to 6", "1.00", "1.00"]


@pytest.mark.parametrize("content", ["[1", "[1]", "{}x", '[{"checkpoint": "a"}]', '{"a": 1}'])
def test_a_file_that_no_probe_wrote_is_named_in_one_line(monkeypatch, capsys, content):
    write_dose()
    Path("probe.json").write_text(content, encoding="utf-8")
    with pytest.raises(
        SystemExit, match=r"^error: probe.json cannot be read as what was probed \(.+\): give a file that"
    ):
        draw(monkeypatch, capsys)


def test_two_agents_of_one_name_and_seed_are_refused(monkeypatch, capsys):
    write_dose()
    for path in Path().glob("*.csv"):
        path.write_text(
            path.read_text(encoding="utf-8").replace("none_0.0001", "none_0.001"), encoding="utf-8"
        )
    with pytest.raises(
        SystemExit,
        match=r"two agents are called PhoenixNoFrameskip-v4__none_0.+: give the files of one of them",
    ):
        draw(monkeypatch, capsys)


def test_where_the_norm_injects_each_agent_is_measured_at_its_own_step(monkeypatch, capsys):
    firsts = {1: [1_100], 2: [1_400], 3: [1_200]}
    arms = {"none": [], "injection": []}
    for run in make_norm_arms(firsts):
        first = firsts[run.args.seed][0]
        measured = [(step, run.args.seed if step == first else 9.0) for step in range(1_100, 1_500, 100)]
        run.scalars["plasticity/dormant_fraction/head"] = np.transpose(measured)
        arms[run.args.intervention].append(run)
    for name, runs in arms.items():
        write_curves(runs, Path(f"{name}.csv"))
    table, _ = draw(monkeypatch, capsys)
    assert table["dormant_fraction/head"][:2] == ["3", "1 to 3"]


def test_agents_of_which_nothing_was_measured_are_refused(monkeypatch, capsys):
    for name, runs in (("none", make_arms()[::2]), ("injection", make_arms()[1::2])):
        write_curves(runs, Path(f"{name}.csv"))
    with pytest.raises(SystemExit, match=r"^error: nothing is known of these agents at the injection: give "):
        draw(monkeypatch, capsys)
    assert not Path("x.png").exists()


def test_of_too_few_agents_nothing_is_said_of_chance(monkeypatch, capsys):
    write_dose()
    Path("0.0001_False.csv").unlink()
    for path in Path().glob("0.001_*.csv"):
        runs = [run for run in read_curves(path) if run.args.seed < 3]
        write_curves(runs, path)
    _, printed = draw(monkeypatch, capsys)
    assert not [line for line in printed if "by chance" in line] and Path("x.png").exists()


def test_without_both_arms_there_is_nothing_to_draw(monkeypatch, capsys):
    write_dose()
    for path in Path().glob("*_True.csv"):
        path.unlink()
    with pytest.raises(SystemExit, match="no agent has runs with and without"):
        draw(monkeypatch, capsys)


def test_runs_that_were_not_one_up_to_the_injection_are_no_agent(monkeypatch, capsys):
    write_dose()
    runs = []
    for seed in (1, 2, 3):
        points = [(step, value + 100) for step, value in games(seed, 1)]  # also of the games before
        how = {"learning_rate": 1e-4, "intervention": "injection", "exp_name": "injection_0.0001"}
        runs.append(make_run(f"{seed}", {RETURN: points}, seed=seed, **how))
    write_curves(runs, Path("0.0001_True.csv"))
    table, printed = draw(monkeypatch, capsys)
    assert table["dormant_fraction/head"][0] == "4", "those at the larger learning rate"
    assert printed[:3] == [
        f"left out: PhoenixNoFrameskip-v4__none_0.0001__{seed}, its run with an injection is of another agent"
        for seed in (1, 2, 3)
    ]


def test_continuations_of_one_agent_are_not_agents(monkeypatch, capsys):
    for arm in ("none", "injection"):
        runs = []
        for seed in (1, 2, 3):
            points = [point for point in games(1, 0) if point[0] <= INJECTION]
            points += [point for point in games(seed, len(arm)) if point[0] > INJECTION]
            how = {"intervention": arm, "fork": f"runs/a/checkpoint-{INJECTION}"}
            runs.append(make_run(f"{seed}", {RETURN: points}, seed=seed, **how))
        write_curves(runs, Path(f"{arm}.csv"))
    with pytest.raises(SystemExit, match="no agent has runs with and without"):
        draw(monkeypatch, capsys)
    assert "left out: injection at 1k, all its runs continue one agent" in capsys.readouterr().out


def test_agents_of_two_games_are_not_ranked_together(monkeypatch, capsys):
    write_dose()
    for arm in ("none", "injection"):
        runs = []
        for seed in (1, 2, 3):
            how = {"seed": seed, "intervention": arm, "env_id": ALIEN}
            runs.append(make_run(f"{seed}", {RETURN: games(seed, len(arm))}, **how))
        write_curves(runs, Path(f"alien_{arm}.csv"))
    with pytest.raises(
        SystemExit, match=f"the agents play {ALIEN} and PhoenixNoFrameskip-v4: give the files"
    ):
        draw(monkeypatch, capsys)
