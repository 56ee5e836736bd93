"""Curves of runs as CSV files. How they are read from runs' folders is in test_analysis_runs.py."""

import csv
from pathlib import Path

import numpy as np
import pytest
from simulated_runs import RETURN, games, make_run

from analysis.curves import read_curves, write_curves
from support.usage import UsageError

DORMANT = "plasticity/dormant_fraction"


def runs():
    """Two of an arm, one of which has measured something; a curve that no comparison looks at."""
    more = {DORMANT: [(100, 0.1234567), (3_000, 0.5)], "losses/td_loss": [(100, 1.0)]}
    one, other = make_run("a", {RETURN: games(1, 0)}, seed=1), make_run("b", {RETURN: games(2, 0), **more}, seed=2)
    other.scalars["charts/SPS"] = np.array([[100.0, 3_000.0], [1.0, 7.0]])
    return [one, other]


def test_they_come_back_with_six_digits_and_their_arguments():
    one, other = runs()
    write_curves([one, other], path := Path("new", "x.csv"))
    back = read_curves(path, RETURN)
    assert [run.args for run in back] == [one.args, other.args] and [run.last_step for run in back] == [3_000, 3_000]
    for read, run in zip(back, (one, other), strict=True):
        assert np.array_equal(read.scalars[RETURN][0], run.scalars[RETURN][0])
        assert np.allclose(read.scalars[RETURN][1], run.scalars[RETURN][1], rtol=5e-6)
    assert read.scalars[DORMANT].tolist() == [[100, 3_000], [0.123457, 0.5]]
    assert read.scalars["charts/SPS"].tolist() == [[3_000], [7.0]], "the last"
    assert DORMANT not in back[0].scalars and "losses/td_loss" not in read.scalars
    assert [run.folder for run in back] == ["new/x.csv (seed 1)", "new/x.csv (seed 2)"]


@pytest.mark.parametrize(("fork", "kept"), [(None, None), ("/home/someone/runs/A/checkpoint-7", "A/checkpoint-7")])
def test_of_the_checkpoint_that_a_run_began_from_its_own_folders_are_kept(fork, kept):
    write_curves([make_run("a", {RETURN: games(1, 0)}, fork=fork)], path := Path("x.csv"))
    assert read_curves(path, RETURN)[0].args.fork == kept


def test_a_table_has_one_row_for_each_step_of_a_seed():
    write_curves(runs(), path := Path("x.csv"))
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
    assert [*rows[0]] == ["seed", "step", RETURN, DORMANT, "charts/SPS"] and len(rows) == 30 + 30
    assert rows[30]["seed"] == "2" and rows[30][DORMANT] == "0.123457"
    assert rows[31][DORMANT] is rows[30]["charts/SPS"] is None and lines[34].count(",") == 2, "no commas at a line's end"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no runs"),
        ("# {}\nseed,step,x\n7,2,3\n", "cannot be read as curves of runs.*KeyError"),
        ("seed,step\n", "holds no runs"),
        ("# {}\nstep\n1\n", "cannot be read as curves of runs"),
        ("# {'a': 1}\nseed,step\n", "cannot be read as curves of runs"),
        ("# {}\nseed,step\n", f"has logged no {RETURN} yet"),
    ],
)
def test_other_files_are_refused(content, words):
    Path("x.csv").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        read_curves(Path("x.csv"), RETURN)
