"""The count of img/count_signs.py: how often a probe foretold the sign of a gain."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simulated_runs
from conftest import status_of
from simulated_runs import ALIEN, INJECTION, PHOENIX, RETURN, games, make_run

from analysis.curves import read_curves, write_curves
from img import count_signs
from img.count_signs import chance_by_shuffling, game_of

GAINS = {(PHOENIX, 1): 100, (PHOENIX, 2): 100, (PHOENIX, 3): -100}
GAINS |= {(ALIEN, 1): 100, (ALIEN, 2): -100, (ALIEN, 3): 100}
LEFT = {(PHOENIX, 1): 0.1, (PHOENIX, 2): 0.36, (PHOENIX, 3): 0.9}  # of the error
LEFT |= {(ALIEN, 1): 0.359, (ALIEN, 2): 0.3, (ALIEN, 3): 2.0}


def write_games():
    """Both arms of two games; every agent gains what `GAINS` says."""
    for game, arm in itertools.product((PHOENIX, ALIEN), ("none", "injection")):
        runs = []
        for seed in (1, 2, 3):
            gain = GAINS[game, seed] if arm == "injection" else 0
            points = {RETURN: games(seed, len(arm), gain)}
            folder = f"{game}__{arm}__{seed}__1795760000"
            runs.append(make_run(folder, points, seed=seed, env_id=game, intervention=arm, exp_name=arm))
        write_curves(runs, Path(f"{game}_{arm}.csv"))


def write_probe(path="probe.json", left=LEFT, step=INJECTION, **changes):
    """What a probe found, an agent's own error being half of a fresh network's; None where it diverged."""
    found = []
    for (game, seed), share in left.items():
        ratios = {"agent": {"ratio": 0.5}, "agent, injected": share and {"ratio": share / 2}}
        result = {
            "checkpoint": f"sweeps/x/runs/{game}__none__{seed}__1795760000/checkpoint-{step}",
            "relative_to_fresh": ratios,
            "learning_rate": 1e-4,
            "probe_observations": 512,
            "probe_updates": 1_000,
            "sentence": "after 1,000 updates ...",
        }
        found.append(result | changes)
    Path(path).write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script; returns its status, the lines that it printed, and its error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["count_signs.py", *words])
        status = status_of(count_signs.main)
        printed, error = capsys.readouterr()
        return status, printed.splitlines(), error

    return run


def files():
    return sorted(str(path) for path in Path().glob("*.*"))


def test_each_agent_of_each_game_is_counted_once(command):
    write_games()
    write_probe()
    status, printed, _ = command("0.36", *files())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed[2:-5]]
    found = {row[0]: row[1:] for row in rows}
    assert status == 0 and len(rows) == 6
    says = {(PHOENIX, 1): ("gains", "yes"), (PHOENIX, 2): ("does not gain", "no")}
    says |= {(PHOENIX, 3): ("does not gain", "yes"), (ALIEN, 1): ("gains", "yes")}
    says |= {(ALIEN, 2): ("gains", "no"), (ALIEN, 3): ("does not gain", "no")}
    for (game, seed), (said, right) in says.items():
        left, *words = found[f"{game}__none__{seed}"]
        assert float(left) == LEFT[game, seed] and (words[0], words[2]) == (said, right)
        assert float(words[1].replace("−", "-")) == pytest.approx(GAINS[game, seed], abs=3)
    by_chance = "as many or more are right by chance"
    assert printed[-5:] == [
        "the probe is right for 3 of 6: 3 gain by its answers, 4 did",
        f"{by_chance}: 0.656 if each sign is a coin's",
        f"{by_chance}: 0.8 if answers are shuffled among the agents",
        f"{by_chance}: 0.778 if among those of each game",
        '"all gain" would be right for 4, "none gains" for 2',
    ]


def test_agents_may_be_probed_in_several_files_of_one_name(command):
    write_games()
    write_probe()
    curves = [path for path in files() if path.endswith(".csv")]
    _, at_once, _ = command("0.36", *curves, "probe.json")
    probes = []
    for game in (PHOENIX, ALIEN):
        Path(game).mkdir()
        probes.append(f"{game}/probe.json")
        write_probe(probes[-1], left={agent: LEFT[agent] for agent in LEFT if agent[0] == game})
    status, printed, _ = command("0.36", *curves, *probes)
    assert status == 0 and printed == at_once


def test_an_agent_of_which_the_probe_says_nothing_counts_as_not_right(command):
    write_games()
    write_probe(left=LEFT | {(PHOENIX, 1): None})
    status, printed, _ = command("0.36", *files())
    name = f"{PHOENIX}__none__1"
    assert status == 0 and printed[0].startswith("left out of probe.json: ") and "diverged" in printed[0]
    (row,) = [line for line in printed if line.startswith(f"| {name} ")]
    assert row.startswith(f"| {name} | – | no answer | ") and row.endswith(" | no |")
    of_others = "which count as not right; the chances below are of the others"
    assert printed[-6] == f"the probe has no answer for 1, {of_others}"
    assert printed[-5] == "the probe is right for 2 of 6: 2 gain by its answers, 4 did"
    # of the five with an answer
    assert printed[-4].endswith("0.812 if each sign is a coin's")
    assert printed[-1] == '"all gain" would be right for 4, "none gains" for 2'


def test_an_agent_whose_probe_says_that_there_is_no_answer_counts_as_not_right(command):
    """As where a fresh network hardly loses any of its error."""
    write_games()
    others = {agent: share for agent, share in LEFT.items() if agent != (PHOENIX, 1)}
    write_probe(left=others)
    write_probe("little.json", {(PHOENIX, 1): 0.1}, sentence="no answer: a fresh network loses only 3%")
    status, printed, _ = command("0.36", *files())
    assert status == 0
    assert (
        printed[0] == f"left out: the probe of {PHOENIX}__none__1, no answer: a fresh network loses only 3%"
    )
    assert printed[-5] == "the probe is right for 2 of 6: 2 gain by its answers, 4 did"


def test_an_agent_that_gains_nothing_at_all_has_no_sign(command, monkeypatch):
    monkeypatch.setitem(GAINS, (PHOENIX, 3), 0)
    monkeypatch.setitem(globals(), "games", lambda seed, after, gain: simulated_runs.games(seed, 1, gain))
    write_games()
    write_probe()
    status, printed, _ = command("0.36", *files())
    assert status == 0 and printed[0] == f"left out: {PHOENIX}__none__3, an injection changes its return by 0"
    assert printed[-5].startswith("the probe is right for 2 of 5: ")


def test_a_run_that_stopped_early_is_named_with_its_agent_uncounted(command):
    write_games()
    write_probe()
    path = Path(f"{PHOENIX}_injection.csv")
    *others, last = sorted(read_curves(path), key=lambda run: run.args.seed)
    early = {tag: points[:, points[0] <= 1_500] for tag, points in last.scalars.items()}
    early["charts/SPS"] = np.array([[1_500.0], [100.0]])
    write_curves([*others, replace(last, scalars=early)], path)
    status, printed, _ = command("0.36", *files())
    assert status == 0 and printed[-5].startswith("the probe is right for 2 of 5: ")
    (reason,) = [line for line in printed if line.startswith("left out: ") and "seed 3" in line]
    assert "is at step 1,500" in reason


def test_an_arm_without_a_counterpart_is_named(command):
    write_games()
    write_probe()
    Path(f"{ALIEN}_none.csv").unlink()
    status, printed, _ = command("0.36", *files())
    assert status == 0 and f"left out: {ALIEN}: injection at 1k has no counterpart here" in printed
    assert printed[-5].startswith("the probe is right for 2 of 3: ")


GAINED = [True, True, True, False, False]


def num_right(said):
    return sum(answer == came for answer, came in zip(said, GAINED, strict=True))


@pytest.mark.parametrize("said", [[True] * 2 + [False] * 3, [True] * 5, [False, True, False, False, True]])
@pytest.mark.parametrize("groups", ["aaaaa", "aabbb", "abbba"])
def test_chance_is_that_of_all_ways_to_shuffle(said, groups):
    ways = []
    for order in itertools.permutations(range(5)):
        if all(groups[i] == groups[other] for i, other in enumerate(order)):
            ways.append([said[other] for other in order])
    as_many = [way for way in ways if num_right(way) >= num_right(said)]
    assert chance_by_shuffling(said, GAINED, list(groups)) == pytest.approx(len(as_many) / len(ways))


def test_agents_of_a_game_may_have_several_names():
    assert game_of(f"{ALIEN}__none_learning-rate__1e-3__7") == ALIEN


def test_a_probe_that_only_tells_games_apart_is_told_from_one_that_tells_agents_apart():
    said = [True] * 5 + [False] * 5
    assert chance_by_shuffling(said, said, ["x"] * 10) == pytest.approx(1 / 252)
    assert chance_by_shuffling(said, said, [*"aaaaabbbbb"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "give a share of the error, the files of both arms, and a probe's: python img/count_signs.py"),
        (["0.36", "probe.json"], "give a share of the error, the files of both arms"),
        (["many"], "give a share of the error, the files of both arms"),
        (["0.36", "a", "probe.json"], "none of 1 runs can be compared, give folders of runs"),
        (["many", "both"], "many is no share of the error below which an agent gains: give one like 0.36"),
        (["0", "both"], "0 is no share of the error"),
        (["nan", "both"], "nan is no share of the error"),
        (["0.36", "both"], "no file is of probes: give one that compare.py --probe wrote"),
        (
            ["0.36", "both", "probe.json", "again.json"],
            f"{ALIEN}__none__1 is probed in again.json, and in another file: give one of them",
        ),
        (
            ["0.36", "both", "one.json", "other_rate.json"],
            "agents are probed with a learning_rate of 0.0001 and 0.001: give the files of one of them",
        ),
        (
            ["0.36", "both", "diverged.json", "again.json"],
            f"{ALIEN}__none__1 is probed in again.json, and in another file: give one of them",
        ),
        (
            ["0.36", "both", "twice.json"],
            f"{PHOENIX}__none__1 is probed twice in twice.json: give a file with one of them",
        ),
        (
            ["0.36", "both", "late.json"],
            "late.json says nothing of these agents: probe them at the injection",
        ),
        (["0.36", f"{PHOENIX}_none.csv", "probe.json"], "no agent has runs with and without an injection"),
    ],
)
def test_bad_input_is_refused_in_one_line(command, words, problem):
    write_games()
    write_probe()
    write_probe("late.json", step=2 * INJECTION)
    write_probe("again.json", {(ALIEN, 1): 0.1})
    write_probe("one.json", {(ALIEN, 2): 0.1})
    write_probe("diverged.json", {(ALIEN, 1): None})
    write_probe("other_rate.json", {(ALIEN, 1): 0.1}, learning_rate=1e-3)
    once = json.loads(Path("probe.json").read_text(encoding="utf-8"))
    Path("twice.json").write_text(json.dumps(once + once[:1]), encoding="utf-8")
    given = []
    for word in words:
        given += sorted(str(path) for path in Path().glob("*.csv")) if word == "both" else [word]
    status, printed, error = command(*given)
    assert status == 1 and problem in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(line.startswith("left out") for line in printed)
