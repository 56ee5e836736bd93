"""The scores that img/play_agents.py keeps are those that --evaluate prints."""

import csv
import sys
from pathlib import Path

import pytest
from conftest import status_of
from saved_agents import run_with_agent

from dqn_injection_atari import Args, evaluate_saved
from img import play_agents


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script with two games; returns its status, what it printed, and its error."""
    monkeypatch.setattr(play_agents, "GAMES", 2)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["play_agents.py", *words])
        status = status_of(play_agents.main)
        return status, *capsys.readouterr()

    return run


def test_agents_play_as_many_games_as_the_plan_says():
    assert play_agents.GAMES == 30


def test_each_game_of_each_agent_has_a_row(command):
    Path("runs").mkdir()
    folders = [run_with_agent("runs/a", seed=1), run_with_agent("runs/b", seed=2, env_backend="ale")]
    status, printed, _ = command("new/games.csv", "runs/a", "runs/b/agent.pt")
    assert status == 0 and printed.splitlines()[0] == "a"
    with open("new/games.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = []
    for folder in folders:
        scores = evaluate_saved(Args(evaluate=folder, eval_episodes=2))
        name = Path(folder).name
        expected += [{"run": name, "game": str(i + 1), "score": f"{scores[i]:g}"} for i in range(2)]
    assert rows == expected


def test_a_file_grows_by_the_agents_that_it_lacks(command):
    Path("runs").mkdir()
    run_with_agent("runs/a", seed=1)
    run_with_agent("runs/b", seed=2)
    command("games.csv", "runs/a")
    first = Path("games.csv").read_text(encoding="utf-8")
    status, printed, _ = command("games.csv", "runs/a", "runs/b", "runs/b/agent.pt")
    assert status == 0 and "a has played" in printed and "b has played" in printed
    grown = Path("games.csv").read_text(encoding="utf-8")
    assert grown.startswith(first)
    assert [line.split(",")[:2] for line in grown.removeprefix(first).splitlines()] == [
        ["b", "1"],
        ["b", "2"],
    ]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "give a file and runs: python img/play_agents.py"),
        (["games.csv"], "give a file and runs"),
        (["games.txt", "a"], "the scores go to games.txt, but it must end in .csv: give another name"),
        (["games.csv", "a", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_before_any_agent_plays(command, words, problem):
    run_with_agent("a")
    status, printed, error = command(*words)
    assert status == 1 and printed == "" and problem in error
    assert error.startswith("error: ") and error.count("\n") == 1 and not Path("games.csv").exists()


def test_a_file_of_something_else_is_refused_and_stays_as_it_is(command):
    run_with_agent("a")
    Path("games.csv").write_text("seed,step\n1,2\n", encoding="utf-8")
    status, printed, error = command("games.csv", "a")
    assert status == 1 and printed == "" and "games.csv" in error and "or a new name" in error
    assert Path("games.csv").read_text(encoding="utf-8") == "seed,step\n1,2\n"
