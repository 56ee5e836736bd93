"""compare.py as a user runs it: whole reports on folders of runs, and what the command line refuses."""

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import WITHOUT_LETTERS, status_of
from simulated_runs import ALIEN, PHOENIX, RETURN, games, make_arms, make_games, make_run, write, write_run

import compare
from analysis.curves import lineage_in, read_curves, write_curves
from analysis.fitting import ProbeSettings
from dqn_injection_atari import INTERVENTIONS

SCRIPT = Path(compare.__file__)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script's `main` with these arguments; returns its status, and its stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        return status_of(compare.main), *capsys.readouterr()

    return run


def write_all(runs):
    return [write(run) for run in runs]


@pytest.mark.slow
def test_a_sweeps_folder_stands_for_the_runs_in_it(command, monkeypatch):
    runs = [run for rate in (1e-4, 1e-3) for run in make_arms(prefix=f"{rate}-", learning_rate=rate)]
    Path("sweeps/x").mkdir(parents=True)
    Path("sweeps/x/sweep.json").write_text("{}", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.chdir("sweeps/x")
        write_all(runs)
    Path("sweeps/x/runs/.5f3e").mkdir()  # of a process that was killed before its run was there
    status, out, err = command("sweeps/x")
    assert (
        status == 0 and err == "" and ".5f3e" not in out and out.count("injection raised the return by") == 2
    )
    files = {path.name for path in Path("sweeps/x").iterdir() if path.is_file()}
    assert files == {
        "sweep.json",
        "comparison.png",
        "comparison_by_learning_rate.png",
        "comparison.md",
        "comparison.json",
    }
    status, out, _ = command("sweeps/x", "--out", "elsewhere.png")
    assert status == 0 and Path("elsewhere_by_learning_rate.png").exists()
    write_run("more", {RETURN: games(1, 1)}, learning_rate=1e-4, seed=9)
    assert command("sweeps/x", "runs/more")[0] == 0 and Path("comparison.png").exists()


def test_exported_curves_are_compared_as_the_runs_are(command):
    status, printed, _ = command(*write_all(make_arms()), "--export", "results/x")
    files = sorted(map(str, Path("results/x").iterdir()))
    assert status == 0 and all(f"wrote {file}, " in printed for file in files)
    assert files == [f"results/x/{PHOENIX}_{arm}.csv" for arm in ("injection-at-1k", "no-injection")]
    found = json.loads(Path("comparison.json").read_text(encoding="utf-8"))["comparisons"]
    status, printed, errors = command(*files, "nowhere.csv", "--out", "again.png")
    assert (status, errors) == (0, "") and "nowhere.csv cannot be read as curves of runs" in printed
    (comparison,) = json.loads(Path("again.json").read_text(encoding="utf-8"))["comparisons"]
    assert comparison["difference"] == pytest.approx(found[0]["difference"], rel=1e-5)
    assert (
        comparison["paired"]
        and comparison["verdict"] == found[0]["verdict"]
        and comparison["window"] == found[0]["window"]
    )


def test_an_export_replaces_what_it_was_given_and_what_has_gone_on(command):
    folders = write_all(make_arms())
    assert command(*folders, "--export", "kept")[0] == 0
    files = sorted(map(str, Path("kept").iterdir()))
    before = [Path(file).read_bytes() for file in files]
    status, _, error = command(*files, *write_all(make_arms((4,))), "--export", "kept")
    assert (status, error) == (0, "")
    assert [Path(file).read_bytes() for file in files] != before
    for file in files:
        assert sorted(run.args.seed for run in read_curves(Path(file))) == [1, 2, 3, 4]
    # from their folders, of which one has gone on since
    brief = make_run("injected-6", {RETURN: games(6, True, upto=2_000)}, 2_000, seed=6)
    with_brief = [*folders, "runs/baseline-4", "runs/injected-4", write(brief)]
    assert command(*with_brief, "--export", "kept")[0] == 0
    shutil.rmtree(brief.folder)
    write_run("injected-6", {RETURN: games(6, True)}, seed=6)
    status, _, error = command(*with_brief, "--export", "kept")
    assert (status, error) == (0, "")
    (longer,) = [run for run in read_curves(Path(files[0])) if run.args.seed == 6]
    assert longer.last_step == 3_000


def test_an_export_refuses_to_replace_a_run_that_another_one_takes_the_place_of(command):
    """It is given, and left out, since the other has its arm and its seed, and has got further."""
    brief = make_run("brief", {RETURN: games(1, True, upto=2_000)}, 2_000, seed=1)
    folders = write_all(make_arms((2, 3, 4)))
    assert command(*folders, write(brief), "--export", "kept")[0] == 0
    files = sorted(map(str, Path("kept").iterdir()))
    again = write_run("again", {RETURN: games(1, True)}, seed=1)
    status, printed, error = command(*files, again, "--export", "kept")
    assert status == 1 and "has the arm and the seed of runs/again" in printed
    assert error.endswith(" and is not among the runs here: give another folder to --export\n")


def test_an_exported_fork_of_an_early_version_is_known_by_its_arguments(command):
    runs = make_arms()
    for run in runs[1::2]:
        fork = f"/data/runs/baseline-{run.args.seed}/checkpoint-1000"
        write(replace(run, args=replace(run.args, fork=fork)))
    folders = [*write_all(runs[::2]), *(run.folder for run in runs[1::2])]
    assert command(*folders, "--export", "kept")[0] == 0
    for file in sorted(Path("kept").iterdir()):
        write_curves([replace(run, lineage=lineage_in({}, run.args)) for run in read_curves(file)], file)
    status, _, error = command(*folders, "--export", "kept")
    assert (status, error) == (0, "")


@pytest.mark.parametrize("identity", ["known", "of an early version"])
def test_an_export_refuses_to_replace_runs_that_it_was_not_given(command, identity):
    assert command(*write_all(make_arms()), "--export", "kept")[0] == 0
    files = sorted(Path("kept").iterdir())
    if identity != "known":
        for file in files:
            runs = [replace(run, lineage=lineage_in({}, run.args)) for run in read_curves(file)]
            write_curves(runs, file)
    before = [file.read_bytes() for file in files]
    status, _, error = command(*write_all(make_arms((4, 5))), "--export", "kept")
    assert status == 1 and error.count("\n") == 1
    fix = "give that file, too, or another folder to --export"
    assert error.startswith("error: kept/PhoenixNoFrameskip-v4_no-injection.csv (seed 1) would be replaced")
    assert error.endswith(f"and is not among the runs here: {fix}\n")
    assert [file.read_bytes() for file in files] == before


def test_an_export_refuses_to_replace_what_it_cannot_read(command):
    folders = write_all(make_arms())
    assert command(*folders, "--export", "kept")[0] == 0
    damaged = sorted(Path("kept").iterdir())[0]
    damaged.write_text("seed;step\n", encoding="utf-8")
    status, printed, error = command(*folders, damaged, "--export", "kept")
    fix = "give another folder to --export, or move that file away"
    assert status == 1 and f"left out: {damaged} cannot be read" in printed
    assert error == f"error: {damaged} would be replaced, and cannot be read as curves: {fix}\n"
    assert damaged.read_text(encoding="utf-8") == "seed;step\n"


@pytest.mark.parametrize("aggregate", ["mean", "iqm"])
def test_a_report_prints_its_verdict_and_writes_figures_table_and_numbers_that_agree(command, aggregate):
    folders = write_all(make_arms())
    measured = {RETURN: games(4, 1), "plasticity/dormant_fraction": [(100, 0.5), (200, float("nan"))]}
    folders.append(write_run("measured", measured, seed=4))
    status, printed, errors = command(
        *folders, "--out", "img/new/x.png", "--aggregate", aggregate, "--window", 1_500
    )
    assert (status, errors) == (0, "")
    files = ["x.png", "x_plasticity.png", "x.md", "x.json"]
    assert {path.name for path in Path("img/new").iterdir()} == set(files)
    assert printed.splitlines()[-1] == f"wrote {', '.join(f'img/new/{file}' for file in files)}"
    (found,) = json.loads(Path("img/new/x.json").read_text(encoding="utf-8"))["comparisons"]
    text = Path("img/new/x.md").read_text(encoding="utf-8")
    assert (
        found["verdict"] == "raised" and found["sentence"] in text and f"\n  {found['sentence']}\n" in printed
    )
    assert all(f"\n  {line}\n" in printed for line in found["other_causes"]) and found["other_causes"]
    assert "window 1,000 < step ≤ 2,500" in printed and f"- {printed.splitlines()[0]}; " in text
    assert all(Path(f"img/new/{file}").read_bytes().startswith(b"\x89PNG") for file in files[:2])


def test_a_report_says_what_an_arm_does_beyond_its_control(command):
    runs = make_arms()
    for seed in (1, 2, 3):
        points = {RETURN: games(seed, 3, 20.0)}
        runs.append(make_run(f"m{seed}", points, seed=seed, intervention="reset-moments"))
    status, printed, errors = command(*write_all(runs))
    assert (status, errors) == (0, "")
    beyond = [line for line in printed.splitlines() if "beyond its control" in line]
    assert len(beyond) == 1 and "fresh optimizer moments" not in printed
    assert f"\n  - {beyond[0].strip()}.\n" in Path("comparison.md").read_text(encoding="utf-8")
    found = json.loads(Path("comparison.json").read_text(encoding="utf-8"))["comparisons"]
    sentences = [one["beyond_control"]["sentence"] for one in found if one["beyond_control"] is not None]
    assert len(found) == 2 and len(sentences) == 1 and sentences[0] in beyond[0]


def test_what_is_wrong_or_missing_is_named_and_the_rest_is_compared(command):
    good = write_all(make_arms())
    going = write_run("going", {RETURN: games(4, 1, upto=2_000)}, last=2_050, seed=4)
    status, printed, _ = command("runs/nowhere", *good, going)
    lines = printed.splitlines()
    assert status == 0 and lines[0].startswith(
        "left out: runs/nowhere is no run's folder, it has no run.json"
    )
    assert lines[1] == f"unfinished: {going} is at step 2,050 of 3,000"
    assert lines[2].endswith("injection at 1k against no injection")
    assert f"  not in this comparison: {going} shares its history with no run of the other arm" in lines
    assert lines[-2] == "no figure of plasticity: no run has measured it"
    assert (
        lines[-1] == "wrote comparison.png, comparison.md, comparison.json"
        and not Path("comparison_plasticity.png").exists()
    )
    content = json.loads(Path("comparison.json").read_text(encoding="utf-8"))
    assert content["left_out"].keys() == {"runs/nowhere"} and content["unfinished"].keys() == {going}


def test_without_two_arms_to_compare_there_are_figures_but_no_verdict(command):
    evaluations = {RETURN: games(1, 0), "eval/episodic_return": [(500, 1.0), (1_500, 2.0)]}
    status, printed, _ = command(
        write_run("a", evaluations), "--metric", "eval/episodic_return", "--out", "y.svg"
    )
    assert status == 0 and printed.lstrip().startswith(
        "no verdict: no two arms differ in the injection alone; --fork makes"
    )
    assert json.loads(Path("y.json").read_text(encoding="utf-8"))["metric"] == "eval/episodic_return"
    assert "nothing to compare with" in Path("y.md").read_text(
        encoding="utf-8"
    ) and "evaluation game" in Path("y.svg").read_text(encoding="utf-8")


def test_what_sets_an_arm_apart_from_its_nearest_counterpart_is_said(command):
    baselines = [make_run(f"b{n}", {RETURN: games(1, 0)}, num_envs=n, intervention="none") for n in (1, 8)]
    injected = make_run("i", {RETURN: games(1, 1)}, num_envs=4)
    other = make_run("o", {RETURN: games(1, 1)}, num_envs=8, learning_rate=1e-3)
    status, printed, _ = command(*write_all([*baselines, injected, other]))
    assert status == 0 and "no verdict: no two arms differ in the injection alone" in printed
    lines = [line for line in printed.splitlines() if line.startswith("not compared: ")]
    assert len(lines) == 2
    assert f"not compared: {PHOENIX}: injection at 1k, num envs 4, learning rate 0.0001 against" in printed
    assert sorted(line.partition(", which ")[2] for line in lines) == [
        "differ in learning rate, too",
        "differ in num envs, too",
    ]
    content = json.loads(Path("comparison.json").read_text(encoding="utf-8"))
    assert len(content["not_compared"]) == 2


def test_a_folder_that_cannot_be_looked_into_is_left_out(command):
    """As a colleague's: a name that is too long fails in the same way, also for root."""
    unreadable = "x" * 300
    status, printed, _ = command(*write_all(make_arms()), unreadable)
    assert status == 0 and "injection raised the return by" in printed
    (line,) = [line for line in printed.splitlines() if unreadable in line]
    assert line.startswith(f"left out: {unreadable}/run.json cannot be read as a run's arguments (OSError: ")


def test_a_comparison_that_cannot_be_written_leaves_the_one_before(command, monkeypatch):
    folders = write_all(make_arms())
    assert command(*folders)[0] == 0
    before = Path("comparison.json").read_bytes()
    write_text = Path.write_text

    def on_a_full_disk(path, text, encoding, errors):
        if ".json" not in path.name:
            return write_text(path, text, encoding=encoding, errors=errors)
        write_text(path, text[:10], encoding=encoding, errors=errors)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", on_a_full_disk)
    assert command(*folders[:4])[0] == 1
    assert Path("comparison.json").read_bytes() == before and not [*Path().glob(".comparison*")]


def test_arms_that_were_evaluated_differently_get_figures_and_the_reason_why_there_is_no_verdict(command):
    runs = make_arms()
    for run in runs:
        evaluations = [
            (step, float(run.args.seed + (run.args.intervention == "injection")))
            for step in (500, 1_500, 2_500)
        ]
        run.scalars["eval/episodic_return"] = np.array(evaluations).T
    runs = [
        replace(run, args=replace(run.args, eval_epsilon=0.1))
        if (run.args.intervention == "injection")
        else run
        for run in runs
    ]
    folders = write_all(runs)
    status, printed, _ = command(*folders, "--metric", "eval/episodic_return")
    names = "injection at 1k, eval epsilon 0.1 against no injection, eval epsilon 0.01"
    assert (
        status == 0
        and f"not compared: {PHOENIX}: {names}, evaluated differently: eval_epsilon 0.01 and 0.1\n" in printed
    )
    assert "no verdict: arms that were evaluated differently have none" in printed and "raised" not in printed
    content = json.loads(Path("comparison.json").read_text(encoding="utf-8"))
    assert content["comparisons"] == [] and list(content["not_compared"]) == [f"{PHOENIX}: {names}"]
    _, printed, _ = command(*folders)
    assert "injection raised the return by" in printed and "not compared" not in printed


def test_several_games_are_aggregated_everywhere_and_one_game_in_the_numbers_only(command):
    folders = write_all(make_games(PHOENIX, ALIEN))
    _, printed, _ = command(*folders)
    over = f"over 2 games ({PHOENIX} in 1,000 < step ≤ 3,000, {ALIEN} in 1,000 < step ≤ 3,000)"
    assert over in printed and over in Path("comparison.md").read_text(encoding="utf-8")
    _, printed, _ = command(*folders[:6])
    (total,) = json.loads(Path("comparison.json").read_text(encoding="utf-8"))["aggregates"]
    assert total["games"] == [PHOENIX] and "games (" not in printed + Path("comparison.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ([], "give folders of runs"),
        (["runs/a", "--window", 0], "window is 0, but must be at least 1: change --window"),
        (["runs/a", "--out", "x.jpeg"], "must end in .png, .pdf or .svg: change --out"),
        (["runs/a", "--out", "runs"], "must end in .png, .pdf or .svg: change --out"),
        (["runs/nowhere"], "give folders of runs"),
        (["runs/a", "--probe", "b"], "runs and probe exclude each other"),
        (["--probe", "a", "--probe-observations", 0], "must be at least 1: change --probe-observations"),
        (["--probe", "a", "--probe-updates", 0], "must be at least 1: change --probe-updates"),
        (["--probe", "a", "--probe-seeds", 0], "must be at least 1: change --probe-seeds"),
        (["--probe", "a", "--probe-learning-rate", 0], "must be positive"),
        (["--probe", "a", "--probe-tasks", 1], "must be at least 2: change --probe-tasks"),
        (
            ["--probe", "a", "--probe-tasks", 4, "--probe-inject-at", 5],
            "must be 2 to 4: change --probe-inject-at",
        ),
        (["--probe", "a", "--probe-inject-at", 5], "give --probe-tasks"),
        (["--probe-inject-at", 8], "probe_inject_at is given, but nothing to probe: give --probe runs/"),
        (["--probe", "a", "fresh", "--env-id", PHOENIX], "give --probe fresh by itself"),
        (
            ["--probe", "a", "--probe-tasks", 2],
            "it takes 3 to see a loss of plasticity: give --probe-tasks 3",
        ),
        (["--probe", "a", "--probe-head-width", 9], "an agent has its own: leave out --probe-head-width"),
        (["--probe", "a", "--probe-tasks", 4], "a cannot be read as a checkpoint"),
        (["--probe", "a", "--env-id", PHOENIX], "give --probe fresh --env-id"),
        (["--probe", "fresh"], "give --probe fresh --env-id"),
        (["--probe", "fresh", "--env-id", "Foo"], "unknown env_id 'Foo'"),
        (["--probe", "a", "--window", 5], "window is of comparisons, a probe makes none: leave out --window"),
        (
            ["--probe", "a", "--metric", "charts/episodic_return"],
            "metric is of comparisons, a probe makes none",
        ),
        (["--probe", "a", "--export", "x"], "export keeps curves of runs"),
        (["--probe", "a", "--out", "x"], "must end in .png, .pdf or .svg: change --out"),
        (["runs/a", "--probe-updates", 5], "probe_updates is given, but nothing to probe"),
        (["runs/a", "--probe-observations", 512], "probe_observations is given, but nothing to probe"),
        (["--probe", "nowhere"], "no checkpoint to probe; nowhere cannot be read as a checkpoint"),
        (["runs/a", "--audit", "b"], "give folders of runs, or one checkpoint after --audit"),
        (["--audit", "a", "b"], "give folders of runs, or one checkpoint after --audit"),
        (["--audit", "a", "--probe", "b"], "probe and audit exclude each other: leave out --probe"),
        (
            ["--audit", "a", "--probe-seeds", 3],
            "probe_seeds and audit exclude each other: leave out --probe-seeds",
        ),
        (["--audit", "a", "--out", "x.png"], "out and audit exclude each other: leave out --out"),
        (["--audit", "a", "--window", 5], "window and audit exclude each other: leave out --window"),
        (["--audit", "a", "--aggregate", "mean"], "aggregate and audit exclude each other"),
        (["--audit", "fresh"], "an audit of a fresh agent needs a game: give --env-id PhoenixNoFrameskip-v4"),
        (["--audit", "fresh", "--env-id", "Foo"], "unknown env_id 'Foo'"),
        (["--audit", "a", "--env-id", PHOENIX], "a checkpoint has its own: leave out --env-id"),
        (["--audit", "nowhere"], "there is no folder nowhere: give runs/FOLDER/checkpoint-STEP"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_with_the_fix(command, arguments, fix):
    status, printed, errors = command(*arguments)
    assert status == 1 and errors.startswith("error: ") and errors.count("\n") == 1 and fix in errors
    assert all(line.startswith("left out: ") for line in printed.splitlines()) and not list(Path().iterdir())


def test_a_file_that_cannot_be_written_is_named_in_one_line(command):
    folders = write_all(make_arms((1,)))
    Path("img").write_text("not a folder", encoding="utf-8")
    status, _, errors = command(*folders, "--out", "img/x.png")
    assert status == 1 and errors.startswith("error: ") and "img" in errors and errors.count("\n") == 1


def test_reports_and_probes_are_given_their_settings(command, monkeypatch):
    given = []
    for name in ("report", "probe", "probe_sequence"):
        monkeypatch.setattr(compare, name, lambda *settings: given.append(settings))
    command(
        "a", "b", "--out", "c.pdf", "--metric", "eval/episodic_return", "--window", 5, "--aggregate", "iqm"
    )
    command("a")
    evaluated = (("a", "b"), Path("c.pdf"), "eval/episodic_return", 5, "iqm")
    assert given == [evaluated, (("a",), Path("comparison.png"), RETURN, None, "mean")]
    given.clear()
    command("--probe", "a", "b", "--probe-observations", 5, "--probe-updates", 6, "--probe-seeds", 7)
    command("--probe", "a")
    command("--probe", "a", "--probe-learning-rate", 0.1, "--out", "d.png")
    assert given == [
        (("a", "b"), ProbeSettings(5, 6, 7, 1e-4), None),
        (("a",), ProbeSettings(512, 1_000, 3, 1e-4), None),
        (("a",), ProbeSettings(512, 1_000, 3, 0.1), Path("d.png")),
    ]
    given.clear()
    command(
        "--probe",
        "a",
        "--probe-tasks",
        4,
        "--probe-inject-at",
        3,
        "--probe-observations",
        5,
        "--probe-learning-rate",
        0.1,
    )
    command("--probe", "fresh", "--env-id", PHOENIX, "--out", "d.png")
    assert given == [
        (("a",), "", 4, 3, ProbeSettings(5, 200, 3, 0.1), Path("tasks.png")),
        (("fresh",), PHOENIX, 40, None, ProbeSettings(256, 200, 6, 1e-3, 64), Path("d.png")),
    ]
    given.clear()
    command("--probe", "fresh", "--env-id", PHOENIX, "--probe-tasks", 9, "--probe-head-width", 7)
    assert given == [
        (("fresh",), PHOENIX, 9, None, ProbeSettings(256, 200, 6, 1e-3, 7), Path("tasks.png")),
    ]


def rows_of_an_audit(printed):
    """{arm: its other cells}"""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {arm: others for arm, *others in cells[2:]}


def test_a_checkpoint_is_audited(command, checkpoint):
    status, printed, errors = command("--audit", checkpoint)
    assert status == 0 and printed.startswith(f"{checkpoint}: TinyPhoenix-v5, step 180\n\n| arm ")
    assert "|" not in errors, "nothing but progress"
    rows = rows_of_an_audit(printed)
    assert {name.partition(",")[0] for name in rows} == {*INTERVENTIONS, "none"}
    assert rows["injection"][0] == "θ′₁ θ′₂" and rows["reset-head"][0] == "θ"
    assert printed.endswith("\nno fault in injections; recycling is judged in a fresh agent only\n")
    assert len(list(Path().iterdir())) == 1, "nothing is written"


def test_a_checkpoint_behind_an_injection_is_not_audited(command, injected_checkpoint):
    status, printed, errors = command("--audit", injected_checkpoint)
    assert status == 1 and printed == ""
    assert (
        errors.startswith(f"error: {injected_checkpoint} lies behind an injection")
        and errors.count("\n") == 1
    )


@pytest.mark.slow
def test_a_fresh_agent_is_audited_with_the_whole_network():
    words = [sys.executable, SCRIPT, "--audit", "fresh", "--env-id", PHOENIX]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0
    rows = rows_of_an_audit(done.stdout)
    assert rows["redo"][0] == "φ* θ*" and rows["injection"][4] == "0" != rows["reset-all"][4]
    assert done.stdout.endswith("\nno fault in injections and recycling\n")


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "analysis"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    fix = f"pip install -r requirements-sweep.txt, in {SCRIPT.parent}"
    with pytest.raises(SystemExit, match=f"error: {package} is not installed: {fix}$"):
        runpy.run_path(str(SCRIPT), run_name="without it")


@pytest.mark.parametrize("folder", ["analysis", "alternatives"])
def test_a_missing_folder_is_named_with_what_to_do(folder, monkeypatch):
    imported_again = ("analysis", "dqn_injection_atari", "alternatives")
    for name in [name for name in sys.modules if name.split(".")[0] in imported_again]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, folder, None)
    with pytest.raises(SystemExit, match=f"error: {folder}.* is not beside this script: clone or copy"):
        runpy.run_path(str(SCRIPT), run_name="without it")


def test_the_users_home_stands_for_itself_in_every_path(command, monkeypatch):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    (Path("home")).mkdir()
    with monkeypatch.context() as patch:
        patch.chdir("home")
        folders = write_all(make_arms())
    given = [f"~/{folder}" for folder in folders]
    status, printed, _ = command(*given, "--out=~/x.png", "--export=~/curves")
    assert status == 0 and "difference" in Path("home/x.json").read_text(encoding="utf-8")
    assert len(list(Path("home/curves").iterdir())) == 2 and [path.name for path in Path().iterdir()] == [
        "home"
    ]
    status, printed, _ = command("--probe=~/runs/nowhere")
    assert status == 1 and f"left out: {Path('home/runs/nowhere').absolute()} cannot" in printed


def test_runs_are_found_in_folders_of_any_name(command):
    odd = Path("a b [x] $y_%{} é")
    odd.mkdir()
    folders = write_all(make_arms())
    shutil.move("runs", odd)
    (odd / "link").symlink_to("runs", target_is_directory=True)
    given = [f"{odd / folder}/" for folder in folders[:3]]
    given += [odd / "link" / Path(folder).name for folder in folders[3:]]
    status, printed, _ = command(*given, "--out", odd / "x.svg", "--export", odd)
    assert status == 0 and "left out" not in printed and (odd / "x.svg").exists()


@pytest.mark.slow
def test_the_script_runs_from_any_folder_in_a_shell_without_unicode_and_with_a_notebooks_backend():
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment |= WITHOUT_LETTERS
    folders = [folder.replace("runs", "läufe ε") for folder in write_all(make_arms())]
    shutil.move("runs", "läufe ε")
    command = [sys.executable, str(SCRIPT), *folders, "--out", "y.pdf"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert (done.returncode, done.stderr) == (0, "") and "window 1,000 < step ? 3,000" in done.stdout
    assert {path.name for path in Path().iterdir()} == {"läufe ε", "y.pdf", "y.md", "y.json"}
