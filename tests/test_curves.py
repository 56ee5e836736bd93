"""Curves of runs as CSV files. How they are read from runs' folders is in test_arms.py."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from simulated_runs import (
    ALIEN,
    INJECTION,
    PHOENIX,
    RETURN,
    games,
    known,
    make_arms,
    make_games,
    make_norm_arms,
    make_run,
    write,
)

from analysis import curves
from analysis.arms import group, read_arms
from analysis.curves import Ancestor, read_curves, read_run, write_curves
from analysis.games import aggregates
from analysis.report import as_json
from analysis.verdict import comparisons
from support.usage import UsageError

DORMANT = "plasticity/dormant_fraction"


def runs():
    """Two of an arm, one of which has measured something; a curve that no comparison looks at."""
    more = {DORMANT: [(100, 0.1234567), (3_000, 0.5)], "losses/td_loss": [(100, 1.0)]}
    one, other = (
        make_run("a", {RETURN: games(1, 0)}, seed=1),
        make_run("b", {RETURN: games(2, 0), **more}, seed=2),
    )
    other.scalars["charts/SPS"] = np.array([[100.0, 3_000.0], [1.0, 7.0]])
    return [one, other]


def test_they_come_back_as_they_were_measures_with_six_digits():
    one, other = runs()
    write_curves([one, other], path := Path("new", "x.csv"))
    back = read_curves(path)
    assert [run.args for run in back] == [one.args, other.args] and [run.last_step for run in back] == [
        3_000,
        3_000,
    ]
    for read, run in zip(back, (one, other), strict=True):
        assert np.array_equal(read.scalars[RETURN][0], run.scalars[RETURN][0])
        assert np.array_equal(read.scalars[RETURN][1], run.scalars[RETURN][1])
    assert read.scalars[DORMANT].tolist() == [[100, 3_000], [0.123457, 0.5]]
    assert read.scalars["charts/SPS"].tolist() == [[3_000], [7.0]], "the last"
    assert DORMANT not in back[0].scalars and "losses/td_loss" not in read.scalars
    assert [run.folder for run in back] == ["new/x.csv (seed 1)", "new/x.csv (seed 2)"]


def test_a_file_that_cannot_be_written_to_its_end_stays_as_it_was(monkeypatch):
    write_curves(runs(), path := Path("x.csv"))
    before = path.read_bytes()

    def full(of_run):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curves, "rows_of", full)
    with pytest.raises(OSError, match="No space left"):
        write_curves(read_curves(path), path)
    assert path.read_bytes() == before and not list(Path().glob(".*"))


@pytest.mark.parametrize(
    ("fork", "kept"), [(None, None), ("/home/someone/runs/A/checkpoint-7", "A/checkpoint-7")]
)
def test_of_the_checkpoint_that_a_run_began_from_its_own_folders_are_kept(fork, kept):
    write_curves([make_run("a", {RETURN: games(1, 0)}, fork=fork)], path := Path("x.csv"))
    assert read_curves(path)[0].args.fork == kept


def test_a_table_has_one_row_for_each_step_of_a_seed():
    write_curves(runs(), path := Path("x.csv"))
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
    assert [*rows[0]] == ["seed", "step", RETURN, DORMANT, "charts/SPS"] and len(rows) == 30 + 30
    assert rows[30]["seed"] == "2" and rows[30][DORMANT] == "0.123457"
    assert rows[31][DORMANT] is rows[30]["charts/SPS"] is None and lines[34].count(",") == 2, (
        "no commas at a line's end"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no runs"),
        ("# {}\nseed,step,x\n7,2,3\n", "cannot be read as curves of runs.*KeyError"),
        ("seed,step\n", "holds no runs"),
        ("seed,step,x\n7,2,3\n", "holds no runs"),
        ("# {}\nstep\n1\n", "cannot be read as curves of runs"),
        ("# {'a': 1}\nseed,step\n", "cannot be read as curves of runs"),
    ],
)
def test_other_files_are_refused(content, words):
    Path("x.csv").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        read_curves(Path("x.csv"))


UNKNOWN = Ancestor(run=None, folder=None, step=0, seed=None)


@pytest.mark.parametrize(
    ("path", "ancestors"),
    [
        (None, ()),
        ("runs/P__none__7__1700000000/checkpoint-5", (Ancestor(None, "P__none__7__1700000000", 5, 7),)),
        ("/x/P__none__7__1700000000-2/checkpoint-5/", (Ancestor(None, "P__none__7__1700000000-2", 5, 7),)),
        ("renamed/checkpoint-5", (Ancestor(None, "renamed", 5, None),)),
        ("/x/y/../A/./checkpoint-0", (Ancestor(None, "A", 0, None),)),
        ("runs/A/newest", (UNKNOWN,)),
        ("checkpoint-5", (UNKNOWN,)),
        ("../checkpoint-5", (UNKNOWN,)),
        ("runs/x", (UNKNOWN,)),
    ],
)
def test_the_path_of_a_fork_tells_what_it_can_of_its_origin(path, ancestors):
    assert make_run("a", {RETURN: [(1, 1.0)]}, fork=path).lineage[1:] == ancestors


# a verdict on files is the verdict on the runs


def forks(seeds, at, history, **args):
    """Baselines begun whole, and runs forked from them at step `at`; `history` games are before that."""
    runs = []
    for seed in seeds:
        points = [games(seed, injected, 50.0 * injected)[10 - history :] for injected in (0, 1)]
        whole, forked = known(f"b{seed}"), known(f"i{seed}", (f"b{seed}", at, seed))
        runs.append(
            make_run(f"b{seed}", {RETURN: points[0]}, identity=whole, seed=seed, intervention="none", **args)
        )
        runs.append(
            make_run(
                f"i{seed}",
                {RETURN: points[1]},
                identity=forked,
                seed=seed,
                fork=f"/x/b{seed}/checkpoint-{at}",
            )
        )
    return runs


def continuations(history, named):
    """Runs of one agent; without a name as earlier versions noted them, by a path."""
    runs = []
    for seed in (4, 5, 6):
        for injected in (0, 1):
            points = games(7, 0)[10 - history : 10] + games(seed, injected, 50.0 * injected)[10:]
            name = f"c{seed}{injected}"
            identity = known(name, ("agent", INJECTION, 1)) if named else None
            how = {
                "seed": seed,
                "intervention": "injection" if injected else "none",
                "fork": f"runs/agent/checkpoint-{INJECTION}",
            }
            runs.append(make_run(name, {RETURN: points}, identity=identity, **how))
    return runs


def cut_games():
    runs = make_arms()
    for run in runs:
        run.scalars["charts/games_cut"] = np.array([[500, 1_000, 2_000], [3.0, 1, 4]])
        run.scalars["charts/episodic_length"] = np.array([run.scalars[RETURN][0], np.full(30, 77.0)])
    return runs


def under_way():
    """One has logged nothing but a loss at its last step, one has just been injected."""
    late = make_run("late", {RETURN: games(4, 1, upto=1_100)}, 1_100, seed=4)
    going = make_run(
        "going", {RETURN: games(5, 1, upto=2_300), "losses/td_loss": [(2_400, 1.0)]}, 2_300, seed=5
    )
    return [
        *make_arms(),
        going,
        late,
        make_run("whole", {RETURN: games(5, 0)}, seed=5, intervention="none"),
    ]


def large_returns(change):
    """Returns of seven digits, of which an arm's may differ in the last before the injection."""
    runs = make_arms()
    for run in runs:
        run.scalars[RETURN][1] = np.round(1e6 + 1_000 * run.scalars[RETURN][1])
        run.scalars[RETURN][1, 2] += change * (run.args.intervention == "injection")
    return runs


def equal_games():
    """Three agents whose only game before the injection has one return."""
    runs = make_arms(effect=0.0)
    for run in runs:
        run.scalars[RETURN] = run.scalars[RETURN][:, 9:]
        run.scalars[RETURN][:, 0] = (100, 5.0)
    return runs


def several_points_at_a_step():
    runs = make_arms()
    for run in runs:
        more = np.array([[3_000, 3_000], [7.0, 8.0]])
        run.scalars[RETURN] = np.concatenate((run.scalars[RETURN], more), axis=1)
    return runs


EVALUATIONS = {"eval/episodic_return": [(1_500, 1 / 3), (2_500, 2e6 + 1 / 3)]}
CASES = {
    "pairs": lambda: make_arms(effect=5.0),
    "pairs without a game before": lambda: forks((1, 2, 3), INJECTION, 0),
    "pairs forked earlier": lambda: forks((1, 2, 3), 500, 0),
    "no pairs": lambda: forks((1, 2, 3), INJECTION, 0)[1::2] + make_arms((4, 5, 6))[::2],
    "one agent": lambda: continuations(10, True),
    "one agent without a game before": lambda: continuations(0, True),
    "one agent, noted by an earlier version": lambda: continuations(0, False),
    "agents counted once": lambda: make_arms((1, 2, 3)) + continuations(10, True),
    "other agents with equal games": equal_games,
    "norm": lambda: make_norm_arms({1: [1_200, 2_600], 2: [1_700], 3: [1_500], 4: []}),
    "cut games": cut_games,
    "under way": under_way,
    "large returns": lambda: large_returns(0),
    "large returns that differ": lambda: large_returns(1),
    "games": lambda: make_games(PHOENIX, ALIEN),
    "several points at a step": several_points_at_a_step,
}


def found_in(arms):
    pairs = comparisons(arms, RETURN, None)
    return pairs, as_json(arms, pairs, aggregates(pairs), {}, RETURN)


@pytest.mark.parametrize("case", CASES)
def test_files_give_the_verdict_that_the_runs_give(case):
    arms, left_out = group(CASES[case]())
    pairs, expected = found_in(arms)
    assert pairs and not left_out
    for i, arm in enumerate(arms):
        write_curves(arm.runs, Path(f"{i}.csv"))
    again, remarks = read_arms(sorted(map(str, Path().glob("*.csv"))), RETURN)
    _, found = found_in(again)
    for i, arm in enumerate(arms):
        for run in arm.runs:
            found = found.replace(f"{i}.csv (seed {run.args.seed})", run.folder)
    assert json.loads(found) == json.loads(expected) and not remarks["left_out"]


def test_the_cases_are_what_they_are_called():
    found = {case: found_in(group(make())[0])[0] for case, make in CASES.items()}
    paired = {case for case, (pair, *_) in found.items() if pair.paired}
    assert paired == CASES.keys() - {"no pairs", "large returns that differ"}
    assert {case for case, (pair, *_) in found.items() if pair.one_agent} == {
        case for case in CASES if case.startswith("one ")
    }


def test_what_a_folder_says_of_a_run_is_in_its_file():
    before = [{"run": "1f", "folder": "trunk", "step": INJECTION, "seed": 3}]
    folder = Path(
        write(make_run("fork", {RETURN: games(1, 1), **EVALUATIONS}, fork="runs/trunk/checkpoint-1000"))
    )
    written = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(written | {"run": "2e", "history": before}), encoding="utf-8")
    run = read_run(str(folder), RETURN)
    assert [asdict(ancestor) for ancestor in run.lineage[1:]] == before
    assert (run.lineage[0].run, run.lineage[0].folder) == ("2e", "fork")
    write_curves([run], Path("x.csv"))
    (back,) = read_curves(Path("x.csv"))
    assert back.lineage == run.lineage
    for tag in (RETURN, "eval/episodic_return"):
        assert np.array_equal(back.scalars[tag], run.scalars[tag])
    (folder / "run.json").write_text(json.dumps(written | {"history": [{"run": "x"}]}), encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read as a run's arguments"):
        read_run(str(folder), RETURN)


def as_earlier(path):
    """The file as earlier versions wrote it: arguments alone, six digits."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        if line.startswith("# "):
            header = json.loads(line[2:])
            for name in ("run", "folder", "history"):
                del header[name]
            lines[i] = f"# {json.dumps(header)}"
        elif not line.startswith("seed"):
            seed, step, *values = line.split(",")
            lines[i] = ",".join([seed, step, *(value and f"{float(value):.6g}" for value in values)])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    "case", ["pairs", "one agent", "agents counted once", "norm", "cut games", "large returns"]
)
def test_files_of_earlier_versions_are_read_as_far_as_they_say(case):
    arms, _ = group(CASES[case]())
    paths = [Path(f"{i}.csv") for i in range(len(arms))]
    for arm, path in zip(arms, paths, strict=True):
        write_curves(arm.runs, path)
        as_earlier(path)
    (expected,), (found,) = (found_in(of)[0] for of in (arms, read_arms(map(str, paths), RETURN)[0]))
    assert (found.paired, found.one_agent, found.shared) == (
        expected.paired,
        expected.one_agent,
        expected.shared,
    )
    assert found.judgement.difference == pytest.approx(expected.judgement.difference, rel=1e-4)


def test_of_a_file_only_the_runs_without_the_metric_are_left_out():
    evaluations = [(1_500, 1.0), (2_500, 2.0)]
    given = []
    for seed in (1, 2, 3):
        points = {RETURN: games(seed, 0)}
        if seed != 2:
            points["eval/episodic_return"] = evaluations
        given.append(make_run(f"r{seed}", points, seed=seed, intervention="none"))
    write_curves(given, Path("x.csv"))
    (arm,), remarks = read_arms(["x.csv"], "eval/episodic_return")
    assert [run.args.seed for run in arm.runs] == [1, 3]
    (reason,) = remarks["left_out"].values()
    assert reason == "x.csv (seed 2) has logged no eval/episodic_return yet: the run is left out"
    with pytest.raises(
        UsageError, match=r"none of 3 runs can be compared.* has logged no losses/td_loss yet"
    ):
        read_arms(["x.csv"], "losses/td_loss")


# what other programs make of them


def exported(path=Path("x.csv")):
    write_curves(runs(), path)
    return read_curves(path), path.read_text(encoding="utf-8")


def resaved(text, delimiter=","):
    """As a spreadsheet writes what it has read: every line with as many columns, some cells in quotes."""
    rows = list(csv.reader(io.StringIO(text)))
    width = max(map(len, rows))
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(row + [""] * (width - len(row)) for row in rows)
    return out.getvalue()


READ = {
    "byte-order mark": lambda text: "\ufeff" + text,
    "line ends of Windows": lambda text: text.replace("\n", "\r\n"),
    "both": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
    "no last line end": lambda text: text.rstrip("\n"),
    "empty columns and lines": lambda text: text.replace("\n", ",,,\n") + ",,,\n\n",
    "empty lines before it and between": lambda text: "\n" + text.replace("\n", "\n\n"),
    "spaces after commas and at ends of lines": lambda text: text.replace(",", ", ").replace("\n", " \n"),
    "numbers in quotes": lambda text: "\n".join(
        line if line.startswith("#") else ",".join(f'"{cell}"' for cell in line.split(","))
        for line in text.splitlines()
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_what_an_editor_changes_without_changing_a_number_is_read(kind):
    original, text = exported()
    Path("y.CSV").write_text(READ[kind](text), encoding="utf-8", newline="")
    back = read_curves(Path("y.CSV"))
    for run, first in zip(back, original, strict=True):
        assert (
            run.args == first.args
            and run.lineage == first.lineage
            and run.scalars.keys() == first.scalars.keys()
        )
        assert all(np.array_equal(run.scalars[tag], first.scalars[tag]) for tag in run.scalars)
    assert len(read_arms(["y.CSV"], RETURN)[0][0].runs) == 2


MARKED = {
    "a spreadsheet has saved it again, with its first lines in quotes": resaved,
    "a spreadsheet has saved it again, with its first lines in quotes.*": lambda text: resaved(text, ";"),
    "a spreadsheet has saved it again, with other separators than commas": lambda text: text.replace(
        ",", ";"
    ),
    "a spreadsheet has saved it again, with other separators than commas.*": lambda text: text.replace(
        ",", "\t"
    ),
    "a spreadsheet has saved it again, with the number 0,5": lambda text: text.replace(",0.5", ',"0,5"'),
    "a row has more fields than there are columns": lambda text: text.replace(",7\n", ",7,5\n"),
    "it holds two runs of one seed": lambda text: text.replace('"seed": 2', '"seed": 1'),
}


@pytest.mark.parametrize("reason", MARKED)
def test_what_a_spreadsheet_may_have_changed_is_refused_with_the_mark_and_the_fix(reason):
    _, text = exported()
    changed = MARKED[reason](text)
    assert changed != text
    Path("y.csv").write_text(changed, encoding="utf-8", newline="")
    with pytest.raises(
        UsageError, match=rf"y.csv cannot be read .*{reason}.*: give the file that compare.py --export wrote"
    ):
        read_curves(Path("y.csv"))


def test_a_file_of_runs_with_other_settings_asks_for_the_version_that_has_them():
    """As one of a sweep with an alternative that this machine's copy of the project does not have."""
    _, text = exported()
    Path("y.csv").write_text(text.replace('"seed": 2', '"seed": 2, "my_setting": 1'), encoding="utf-8")
    fix = "my_setting.*: give the file that .* wrote, in the version of this project that wrote it$"
    with pytest.raises(UsageError, match=fix):
        read_curves(Path("y.csv"))


def test_utf_16_is_named():
    _, text = exported()
    Path("y.csv").write_text(text, encoding="utf-16")
    with pytest.raises(UsageError, match="byte-order mark of UTF-16"):
        read_curves(Path("y.csv"))
