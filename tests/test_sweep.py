"""sweep.py as a user runs it: whole sweeps on a local Ray, interrupted ones, and what it refuses."""

import contextlib
import io
import json
import os
import pty
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import WITHOUT_LETTERS, status_of

pytest.importorskip("ray")

import ray

import dqn_injection_atari
import sweep
from benchmarks.kill_test import content, differences
from benchmarks.sweep_kill_test import trainings
from orchestration.manifest import begin, read_asked, read_manifest
from support.machine import alone_in

SCRIPT = Path(sweep.__file__)
GAME = "PhoenixNoFrameskip-v4"
FLAGS = """--injection-step 301 --total-timesteps 600 --buffer-size 300 --learning-starts 100
--batch-size 8 --head-width 16 --log-frequency 100 --plasticity-frequency 0 --no-cuda""".split()
NAMES = [f"{GAME}__none__1", f"{GAME}__injection__1"]
SMALL = ("--name", "x", "--env-ids", GAME, "--seeds", "1", "--retry-pause", "0.1", "--memory-per-run", "0.5")
FOLDER = Path("sweeps/x")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "120", "LINES": "40"}
ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""


def start(*arguments, flags=FLAGS, stdout=None, stderr=subprocess.STDOUT):
    """The sweep as a process, all that it says in a file, unless its output goes elsewhere."""
    command = [sys.executable, str(SCRIPT), *SMALL, *map(str, arguments), "--", *flags]
    with open("said", "a", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=stdout or output, stderr=stderr, env=ENVIRONMENT)


def finish(*arguments):
    """Runs it to its end; returns its status and what was said so far."""
    return start(*arguments).wait(600), Path("said").read_text(encoding="utf-8")


def wait_for(condition, process=None, seconds=300):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline and (process is None or process.poll() is None), Path(
            "said"
        ).read_text(encoding="utf-8")
        time.sleep(0.05)
    return found


def run_folder(name):
    (folder,) = (FOLDER / "runs").glob(f"{name}__*")
    return folder


def checkpoints(name):
    return lambda: list((FOLDER / "runs").glob(f"{name}__*/checkpoint-[1-9]*"))


def states():
    return [(change.run, change.state) for change in read_manifest(FOLDER)]


def finished():
    return Counter(name for name, state in states() if state == "finished")


def train(*flags):
    """As from the command line, but in this process, which has the same settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dqn_injection_atari.py", *flags])
        dqn_injection_atari.main()


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Contents at their ends of the runs as a user would start them one by one."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("by_hand"))
    try:
        train(*FLAGS, "--env-id", GAME, "--intervention", "none", "--exp-name", "a")
        (trunk,) = Path("runs").glob("*__a__*")
        train("--fork", str(trunk / "checkpoint-301"), "--intervention", "injection", "--exp-name", "b")
        (fork,) = Path("runs").glob("*__b__*")
        yield [content(folder.absolute(), "checkpoint-600") for folder in (trunk, fork)]
    finally:
        os.chdir(before)


def assert_as_by_hand(by_hand):
    for name, reference in zip(NAMES, by_hand, strict=True):
        assert differences(content(run_folder(name), "checkpoint-600"), reference) == []
    assert finished() == dict.fromkeys(NAMES, 1)


@pytest.mark.slow
def test_a_sweep_ends_with_the_bits_of_runs_started_by_hand_and_is_compared(by_hand, command, monkeypatch):
    """Also in a folder with a space and quotation marks, in a locale without letters, with a long TMPDIR."""
    place = Path('it\'s a "project" ε').absolute()
    temporary = place / ("x" * 100)
    temporary.mkdir(parents=True)
    monkeypatch.chdir(place)
    for name, value in {**WITHOUT_LETTERS, "TMPDIR": str(temporary)}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    status, output = finish()
    assert status == 0, output
    assert re.search(rf"{NAMES[0]}: finished, step 600 of 600, \d+ SPS, 00:00 left, return ", output)
    assert_as_by_hand(by_hand)
    last = read_manifest(FOLDER)[-1]
    assert (last.arm, last.seed, last.game) == ("injection", 1, GAME)
    assert (last.step, last.attempt, last.device) == (600, 1, "cpu")
    assert last.steps_per_second > 0 and last.hours > 0 and last.host == os.uname().nodename
    assert (FOLDER / last.folder).samefile(run_folder(NAMES[1])) and read_asked(FOLDER).seeds == [1]
    assert "with 1 thread" in (FOLDER / "logs" / f"{NAMES[0]}.log").read_text(encoding="utf-8")
    begun = {name: [state for run, state in states() if run == name] for name in NAMES}
    assert list(begun.values()) == [["queued", "running", "finished"]] * 2
    assert {path.suffix for path in FOLDER.glob("comparison*")} >= {".png", ".md", ".json"}
    before, logs = states(), [path.read_bytes() for path in (FOLDER / "logs").iterdir()]
    monkeypatch.setattr(
        sweep, "cluster", lambda _: contextlib.nullcontext()
    )  # there is nothing to do for Ray
    monkeypatch.setattr(sweep, "machines", lambda: [{"CPU": 2, "memory": 1e10}])
    assert command()[0] == 0 and states() == before, "what is finished is not run again"
    assert logs == [path.read_bytes() for path in (FOLDER / "logs").iterdir()]


def theta(checkpoint):
    """The first weights of the head that an agent was made with."""
    q_network = torch.load(checkpoint / "state.pt")["learner"]["q_network"]
    return next(tensor for name, tensor in q_network.items() if "theta." in name)


@pytest.mark.cluster
@pytest.mark.slow
def test_arms_and_seeds_continue_one_agent():
    train(*FLAGS, "--env-id", GAME, "--intervention", "none", "--exp-name", "a")
    (origin,) = Path("runs").glob("*/checkpoint-301")
    script = [sys.executable, str(SCRIPT), "--name", "x", "--from-checkpoint", str(origin), "--steps", "200"]
    custom = ["--arm", "all heads", "--no-freeze-heads"]
    more = ["--seeds", "5", "6", "--arms", "none", "injection", *custom, "--memory-per-run", "0.5"]
    done = subprocess.run([*script, *more], capture_output=True, encoding="utf-8", env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    names = [f"{GAME}__{arm}__{seed}" for seed in (5, 6) for arm in ("none", "injection", "all-heads")]
    assert finished() == dict.fromkeys(names, 1)
    for name in names:
        log = (FOLDER / "logs" / f"{name}.log").read_text(encoding="utf-8")
        assert "forked at step 301" in log and "step 501 of 501" in log
        assert ("plasticity injected" in log) == ("none" not in name)
    heads = [theta(run_folder(name) / "checkpoint-501") for name in names]
    assert not torch.equal(heads[0], heads[3]), "each seed goes its own way"
    assert torch.equal(heads[1], theta(origin))
    assert not torch.equal(heads[2], theta(origin)), "an arm of one's own lets this head learn on"


@pytest.mark.cluster
@pytest.mark.slow
def test_on_a_terminal_a_table_follows_the_runs():
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = start("--arms", "none", stderr=theirs)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := terminal.read(4096):
                shown += chunk
        assert process.wait(60) == 0
    frames = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode()).split("steps/s")[1:]
    going = [frame for frame in frames if NAMES[0] in frame and "of 600" in frame and "1 running" in frame]
    assert going
    assert "600 of 600" in frames[-1] and "1 finished" in frames[-1]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_terminal_that_is_closed_does_not_end_the_sweep():
    ours, theirs = pty.openpty()
    process = start("--arms", "none", stdout=theirs, stderr=theirs)
    os.close(theirs)
    wait_for(lambda: b"steps/s" in os.read(ours, 4096), process)
    os.close(ours)
    assert process.wait(120) == 0 and finished() == {NAMES[0]: 1} and (FOLDER / "comparison.json").exists()


@pytest.mark.cluster
@pytest.mark.slow
def test_runs_are_as_urgent_as_those_that_are_started_by_hand():
    process = start("--arms", "none")
    (training,) = wait_for(lambda: trainings(FOLDER), process)
    assert training.nice() == os.nice(0)
    process.terminate()
    process.wait(60)


@pytest.mark.cluster
@pytest.mark.slow
def test_killed_trainings_and_a_killed_worker_go_on_with_the_same_bits(by_hand):
    process = start()
    wait_for(lambda: list((FOLDER / "runs").glob(f"{NAMES[0]}__*")), process)
    trainings(FOLDER)[0].kill()
    wait_for(lambda: (NAMES[0], "killed") in states(), process)
    worker = wait_for(lambda: [training.parent() for training in trainings(FOLDER)], process)[0]
    worker.kill()
    wait_for(lambda: states().count((NAMES[0], "killed")) == 2, process)
    wait_for(checkpoints(NAMES[1]), process)
    next(training for training in trainings(FOLDER) if "injection" in training.cmdline()).kill()
    assert process.wait(600) == 0, Path("said").read_text(encoding="utf-8")
    assert_as_by_hand(by_hand)
    assert "raylet" not in Path("said").read_text(encoding="utf-8"), "Ray's own words on that"
    attempts = {change.run: change.attempt for change in read_manifest(FOLDER)}
    assert attempts == {NAMES[0]: 3, NAMES[1]: 2}


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_sweep_that_is_killed_or_stopped_and_started_again_ends_with_the_same_bits(by_hand, number, status):
    process = start()
    wait_for(checkpoints(NAMES[0]), process)
    process.kill()
    process.wait()
    process = start()
    wait_for(lambda: (run_folder(NAMES[0]) / "checkpoint-301").exists() and checkpoints(NAMES[1])(), process)
    process.send_signal(number)
    assert process.wait(120) == status
    assert trainings(FOLDER) == []
    last = {change.run: change for change in read_manifest(FOLDER)}
    assert last[NAMES[0]].state in ("stopped", "finished") and last[NAMES[1]].state == "stopped"
    log = (FOLDER / "logs" / f"{NAMES[1]}.log").read_text(encoding="utf-8")
    assert "SIGTERM, writing a checkpoint" in log and "stopped at step" in log
    status, output = finish()
    assert status == 0, output
    assert_as_by_hand(by_hand)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_that_fails_for_its_own_reason_is_reported_once_and_the_others_go_on():
    status, output = finish("--grid", "learning-rate", "1e-4", "1e30")
    good, bad = (f"{GAME}__{{}}_learning-rate-{rate}__1" for rate in ("1e-4", "1e30"))
    assert status == 1 and finished() == {good.format("none"): 1, good.format("injection"): 1}
    assert [entry for entry in states() if "1e30" in entry[0]][-2:] == [
        (bad.format("none"), "failed"),
        (bad.format("injection"), "not started"),
    ]
    log = FOLDER / "logs" / f"{bad.format('none')}.log"
    last_line = log.read_text(encoding="utf-8").splitlines()[-1]
    assert output.count(f"last lines of {log}") == output.count(last_line) == 1
    assert output.splitlines()[-1].startswith("error: 2 of 4 runs are not finished")
    assert (FOLDER / "comparison.png").exists()


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_that_is_killed_more_often_than_retries_fails():
    process = start("--retries", "0", "--arms", "none")
    wait_for(checkpoints(NAMES[0]), process)
    trainings(FOLDER)[0].kill()
    assert process.wait(120) == 1
    assert states()[-1] == (NAMES[0], "failed") and "--retries 0" in Path("said").read_text(encoding="utf-8")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script's `main` with these arguments; returns its status and what it wrote to both streams."""

    def run(*arguments, flags=FLAGS):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, *map(str, arguments), "--", *flags])
        return status_of(sweep.main), *capsys.readouterr()

    return run


@pytest.fixture
def no_ray(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)


def test_a_dry_run_prints_the_plan_and_writes_nothing(command, no_ray):
    status, printed, errors = command("--dry-run", "--arm", "all heads", "--no-freeze-heads", "--speed", "10")
    lines = printed.splitlines()
    assert (status, errors, list(Path().iterdir())) == (0, "", [])
    assert lines[0] == f"{NAMES[0]}: whole, from step 0, 600 steps to 600"
    assert lines[2] == f"{GAME}__all-heads__1: forks from {NAMES[0]} at step 301, 299 steps to 600"
    assert lines[3] == "3 runs, 2 of them forks: 1,198 steps, 602 fewer than if each ran whole"
    assert lines[4].startswith("disk: about 0.")
    assert lines[5].startswith("hours: 0.0 of one run at a time at 10 steps per second")
    assert "give --speed" in command("--dry-run")[1].splitlines()[-1]
    status, _, errors = command("--speed", "10")
    words = "speed is for the hours in a plan: give --dry-run as well, or leave it out"
    assert status == 1 and errors == f"error: {words}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--arms", "none", "reset"), "arm reset is none of"),
        (("--arm", "x"), "arm has a name and flags"),
        (("--arm", "x", "--no-freeze-heads", "--arm", "x", "--num-envs 4"), "arm x is given twice"),
        (("--grid",), "grid has a flag twice, or none"),
        (("--env-ids", "Foo"), "unknown env_id 'Foo'"),
        (("--from-checkpoint", "runs/X/checkpoint-1", "--steps", "5"), "cannot be read as a checkpoint"),
        (("--name", "../x"), "name is ../x"),
        (("--name", ""), "must be a folder's under sweeps/"),
        (("--name", ".."), "must be a folder's under sweeps/"),
        (("--name", "ö" * 128), "256 bytes, but 255 are possible: give a shorter --name"),
        (
            ("--arm", "x" * 300, "--no-freeze-heads"),
            "bytes, but 255 are possible: give a shorter name to --arm",
        ),
        (("--arm", "//", "--no-freeze-heads"), "give another name to --arm"),
        (("--metric", "eval/episodic_return"), "never evaluated: give --eval-frequency after --, or leave"),
        (("--gpus-per-run", "-1"), "gpus_per_run is -1.0, but must be 0 or more"),
        (("--gpus-per-run", "1.5"), "gpus_per_run is 1.5"),
        (
            ("--gpus-per-run", "0.00001"),
            "gpus_per_run is 1e-05, but must be 0 or at least 0.0001: change --gpus",
        ),
        (
            ("--cpus-per-run", "0.00009"),
            "cpus_per_run is 9e-05, but must be 0 or at least 0.0001: change --cpus",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_gets_one_line_and_nothing_is_started_or_written(command, no_ray, arguments, words):
    status, printed, errors = command(*arguments)
    assert (status, printed, list(Path().iterdir())) == (1, "", [])
    assert errors.startswith("error: ") and errors.count("\n") == 1 and words in errors


def test_flags_that_the_training_script_refuses_are_refused(command, no_ray):
    for flags, words in ((["--foo"], "Unrecognized options: --foo"), (["--num-envs", "0"], "num_envs is 0")):
        status, _, errors = command(flags=flags)
        assert status == 1 and errors.count("\n") == 1 and words in errors


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere.invalid:6379", "nowhere"])
def test_an_address_where_nothing_answers_gets_one_line(command, no_ray, address):
    begun = time.monotonic()
    status, printed, errors = command("--address", address)
    assert (status, printed, list(Path().iterdir())) == (1, "", []) and time.monotonic() - begun < 35
    assert errors.count("\n") == 1 and "ray start --head" in errors
    assert f"no Ray cluster answers at {address} (" in errors


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("automatic", [False, True])
def test_an_address_where_something_else_answers_gets_one_line_after_a_minute(
    command, no_ray, monkeypatch, automatic
):
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)  # that auto takes
        status, _, errors = command("--address", "auto" if automatic else address)
    assert status == 1 and time.monotonic() - begun < 90
    assert errors.count("\n") == 1 and "(timed out)" in errors


@pytest.mark.cluster
@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_in_mid_run_ends_with_the_same_bits(by_hand, monkeypatch):
    from ray.cluster_utils import Cluster

    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [machines.add_node(num_cpus=1) for _ in range(2)]
        process = start("--address", machines.address)
        wait_for(checkpoints(NAMES[0]), process)
        above = {parent.pid for training in trainings(FOLDER) for parent in training.parents()}
        lost = next(node for node in nodes if node.all_processes["raylet"][0].process.pid in above)
        machines.remove_node(lost, allow_graceful=False)
        assert process.wait(600) == 0, Path("said").read_text(encoding="utf-8")
        monkeypatch.setitem(ENVIRONMENT, "RAY_ADDRESS", machines.address)
        automatic, output = finish("--address", "auto")
    finally:
        machines.shutdown()
    assert "killed" in [state for _, state in states()]
    assert_as_by_hand(by_hand)
    assert automatic == 0, output


def asked(flags=FLAGS):
    _, found = sweep.command_line([*SMALL, "--", *flags])
    return asdict(found)


def test_the_folder_of_another_sweep_is_refused_and_the_difference_named(command, no_ray):
    FOLDER.mkdir(parents=True)
    begin(FOLDER, asked() | {"seeds": (1, 2)})
    before = sorted(Path().rglob("*"))
    status, _, errors = command()
    assert status == 1 and errors.count("\n") == 1
    assert "(seeds is [1], there [1, 2]): give another --name" in errors
    assert sorted(Path().rglob("*")) == before
    (FOLDER / "sweep.json").unlink()
    (FOLDER / "thesis.tex").touch()
    assert "is no sweep's folder" in command()[2]
    (FOLDER / "thesis.tex").rename(FOLDER / "runs" / "someone's")
    assert "is no sweep's folder" in command()[2], "nobody knows what its runs were asked"


def test_other_resources_are_no_other_sweep(command, no_ray):
    FOLDER.mkdir(parents=True)
    begin(FOLDER, asked())
    with pytest.raises(AssertionError, match="Ray was started"):
        command("--retries", "7", "--cpus-per-run", "2", "--gpus-per-run", "0.5")


def test_threads_decide_bits_and_stay_what_they_were(command, no_ray):
    FOLDER.mkdir(parents=True)
    begin(FOLDER, asked() | {"threads": 3})
    status, _, errors = command("--threads-per-run", "2")
    assert status == 1 and "(threads is 2, there 3): give another --name" in errors
    for given in ((), ("--threads-per-run", "3")):
        with pytest.raises(AssertionError, match="Ray was started"):
            command(*given)


def test_runs_stay_on_the_kind_of_device_that_they_began_on(command, monkeypatch):
    with_gpu, given = FLAGS[: FLAGS.index("--no-cuda")], []
    monkeypatch.setattr(sweep, "cluster", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ray, "remote", lambda **_: lambda run: run)
    monkeypatch.setattr(sweep, "conclude", lambda *_: None)
    monkeypatch.setattr(
        sweep.Sweep,
        "go",
        lambda self, _: given.append({task.resources["num_gpus"] for task in self.book.tasks.values()}),
    )

    def on(gpus, *arguments, flags=with_gpu):
        monkeypatch.setattr(sweep, "machines", lambda: [{"CPU": 2, "GPU": gpus, "memory": 1e12}])
        return command(*arguments, flags=flags)

    status, printed, _ = on(0)
    assert status == 0 and printed == "runs compute on the CPU, with --threads-per-run 1\n"
    assert on(1)[0] == 0 and given == [{0}, {0}]
    assert "(gpu is True, there False): give another --name" in on(1, "--gpus-per-run", "0.5")[2]
    (FOLDER / "sweep.json").unlink()
    status, printed, _ = on(1)
    assert status == 0 and given.pop() == {1}
    assert printed == "runs compute on the GPU, with --threads-per-run 2\n"
    assert "(gpu is False, there True): give another --name" in on(0)[2]
    assert "(gpu is False, there True): give another --name" in on(1, "--gpus-per-run", "0")[2]
    assert on(1, "--gpus-per-run", "0.5")[0] == 0 and given.pop() == {0.5}
    shutil.rmtree(FOLDER)
    for gpus in (0, 0.5):
        assert on(1, "--gpus-per-run", gpus, flags=FLAGS)[0] == 0, "other resources for runs with --no-cuda"


def test_a_sweep_that_was_moved_with_its_checkpoint_goes_on_and_another_checkpoint_in_its_place_is_refused(
    monkeypatch, capsys
):
    planned = sweep.plan.plan(sweep.command_line([*SMALL, "--arms", "none", "--", *FLAGS])[1])
    monkeypatch.setattr(sweep.plan, "plan", lambda asked: planned)  # which reads all of the checkpoint
    monkeypatch.setattr(sweep, "cluster", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ray, "remote", lambda **_: lambda run: run)
    monkeypatch.setattr(sweep, "machines", lambda: [{"CPU": 2, "memory": 1e12}])
    monkeypatch.setattr(sweep, "conclude", lambda *_: None)
    monkeypatch.setattr(sweep.Sweep, "go", lambda *_: None)

    def go_on_from(checkpoint):
        monkeypatch.setattr(
            sys, "argv", [str(SCRIPT), "--name", "x", "--from-checkpoint", checkpoint, "--steps", "9"]
        )
        return status_of(sweep.main), capsys.readouterr().err

    before = Path("before/runs/X__1/checkpoint-5")
    before.mkdir(parents=True)
    (before / "manifest.json").write_text(json.dumps({"run": "abc", "step": 5}), encoding="utf-8")
    monkeypatch.chdir("before")
    assert go_on_from("runs/X__1/checkpoint-5") == (0, "")
    monkeypatch.chdir("..")
    Path("before").rename("a new place")
    monkeypatch.chdir("a new place")
    assert go_on_from("runs/X__1/checkpoint-5") == (0, ""), "all of it was moved"
    Path("runs/X__1").rename("kept")
    monkeypatch.setenv("HOME", os.getcwd())
    assert go_on_from("~/kept/checkpoint-5") == (0, "")
    assert read_asked(FOLDER).from_checkpoint == str(Path("kept/checkpoint-5").absolute())
    Path("kept/checkpoint-5/manifest.json").write_text(
        json.dumps({"run": "other", "step": 5}), encoding="utf-8"
    )
    status, errors = go_on_from("kept/checkpoint-5")
    assert status == 1 and "is the folder of another sweep (" in errors and errors.count("\n") == 1


def test_slow_bfloat16_is_refused_before_a_sweep_begins_unless_other_machines_or_gpus_do_it(
    command, monkeypatch
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(sweep, "cluster", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ray, "remote", lambda **_: lambda run: run)
    monkeypatch.setattr(sweep, "conclude", lambda *_: None)
    monkeypatch.setattr(sweep.Sweep, "go", lambda *_: None)

    def on(gpus, *arguments, flags):
        monkeypatch.setattr(sweep, "machines", lambda: [{"CPU": 2, "GPU": gpus, "memory": 1e12}])
        return command(*arguments, flags=flags)

    status, _, errors = on(0, flags=[*FLAGS, "--bf16"])
    assert status == 1 and errors.startswith("error: --bf16 is much slower")
    assert errors.endswith("leave out --bf16\n")
    assert not FOLDER.exists()
    assert on(1, flags=[*FLAGS[: FLAGS.index("--no-cuda")], "--bf16"])[0] == 0
    shutil.rmtree(FOLDER)
    assert on(0, "--address", "here:1", flags=[*FLAGS, "--bf16"])[0] == 0, "each run speaks for its machine"
    fix = "go on where there are some, or leave out --bf16 and give another --name\n"
    assert on(0, flags=[*FLAGS, "--bf16"])[2].endswith(fix), "the sweep has begun, with that flag"
    for name in NAMES:
        (FOLDER / "runs" / f"{name}__1").mkdir(parents=True)
    assert on(0, flags=[*FLAGS, "--bf16"])[0] == 0, "what has begun goes on"


def test_two_sweeps_cannot_run_in_one_folder(command, no_ray):
    FOLDER.mkdir(parents=True)
    begin(FOLDER, asked())
    with alone_in(FOLDER, "manifest.jsonl"):
        status, _, errors = command()
    assert status == 1 and f"another process is running {FOLDER}: wait for it" in errors


def test_a_folder_that_cannot_be_a_sweeps_names_the_flag_for_another(command, no_ray):
    def refused():
        status, _, errors = command()
        return status == 1 and "cannot be read as" in errors and errors.endswith(": give another --name\n")

    (FOLDER / "manifest.jsonl").mkdir(parents=True)
    assert refused()
    (FOLDER / "manifest.jsonl").rmdir()
    (FOLDER / "sweep.json").write_text("[]", encoding="utf-8")
    assert refused()


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_that_needs_more_than_the_machine_has_is_refused():
    status, output = finish("--cpus-per-run", "1000")
    assert status == 1 and output.count("\n") == 1 and "needs 1000 processors" in output
    assert not FOLDER.exists()


@pytest.mark.parametrize("missing", ["ray", "rich", "matplotlib"])
def test_without_ray_it_says_in_one_line_how_to_get_it(monkeypatch, missing):
    for name in [
        name for name in sys.modules if name.startswith(("analysis", "orchestration", f"{missing}."))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    fix = "pip install -r requirements-sweep.txt"
    with pytest.raises(SystemExit, match=f"error: {missing} is not installed: {fix}"):
        runpy.run_path(str(SCRIPT))


@pytest.fixture
def one_run(monkeypatch):
    """A sweep of one run whose jobs are only noted."""
    monkeypatch.setattr(ray, "remote", lambda **_: lambda run: run)
    settings, found = sweep.command_line([*SMALL, "--arms", "none", "--", *FLAGS])
    begin(FOLDER, asdict(found))
    (run,) = sweep.plan.plan(found)
    task = sweep.Task(run, FOLDER, resources={"num_cpus": 1, "num_gpus": 0})
    going, submitted = sweep.Sweep(sweep.Book(FOLDER, [task]), settings, 1), []

    def options(**kept):
        assert kept == task.resources
        return SimpleNamespace(remote=lambda job: submitted.append(job) or object())

    going.job = SimpleNamespace(options=options)
    return going, task, submitted


def test_a_run_that_was_killed_waits_for_its_pause(one_run, monkeypatch):
    going, task, submitted = one_run
    monkeypatch.setattr(ray, "wait", lambda refs, **_: ([], refs))
    monkeypatch.setattr(sweep, "TICK", 0)
    task.after = time.monotonic() + 1_000
    going.advance()
    assert submitted == [] and states() == []
    task.after = time.monotonic()
    going.advance()
    going.advance()
    assert [job.name for job in submitted] == [NAMES[0]] and states() == [(NAMES[0], "queued")]


def test_away_from_a_terminal_there_is_a_line_each_minute_on_those_that_are_going(
    one_run, monkeypatch, capsys
):
    going, task, _ = one_run
    now = [0]

    def advance():
        now[0] += 25
        task.state = "running" if now[0] < 200 else "finished"

    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(going, "advance", advance)
    going.follow(SimpleNamespace(stop=None))
    assert capsys.readouterr().out == f"1 running\n  {NAMES[0]}: step 0\n" * 2  # after 75 and 150 seconds


def test_a_terminal_shows_a_table_while_runs_are_going_and_in_the_end(one_run, monkeypatch):
    going, task, _ = one_run
    terminal = io.StringIO()
    states = ["running", "finished"]

    def advance():
        task.state = states.pop(0)

    monkeypatch.setattr(going, "advance", advance)
    monkeypatch.setattr(sweep, "on_a_terminal", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")  # so that this is a terminal for the table
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    going.follow(SimpleNamespace(stop=None))
    frames = terminal.getvalue().split("steps/s")[1:]
    assert len(frames) >= 2 and all(NAMES[0] in frame for frame in frames)
    assert "1 running" in frames[0] and "1 finished" in frames[-1]


def test_where_the_manifest_cannot_be_written_every_run_is_stopped_and_waited_for(
    one_run, monkeypatch, capsys
):
    going, task, _ = one_run
    other = sweep.Task(replace(task.run, arm="other"), FOLDER, resources=task.resources)
    cancelled, waited = [], []
    going.book.tasks["other"] = other
    task.ref, other.ref = object(), object()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(going, "advance", fail)
    monkeypatch.setattr(going.book.manifest, "add", fail)
    monkeypatch.setattr(ray, "cancel", cancelled.append)
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs[:1], refs[1:]))
    monkeypatch.setattr(sweep, "outcome", lambda ref: waited.append(ref) or ("stopped", ""))
    with pytest.raises(OSError, match="disk full"):
        going.go(SimpleNamespace(stop=None))
    assert len(cancelled) == len(set(waited)) == 2
    assert "every run writes a checkpoint" in capsys.readouterr().out


def test_a_run_that_cannot_stop_with_a_checkpoint_has_failed_and_one_that_was_killed_has_stopped(
    one_run, monkeypatch
):
    going, task, _ = one_run
    task.attempt = 1
    (FOLDER / "runs" / f"{task.run.name}__7" / "checkpoint-600").mkdir(parents=True)
    for of_ray, state in (
        ("killed", "stopped"),
        ("stopped", "stopped"),
        ("finished", "finished"),
        ("failed", "failed"),
    ):
        monkeypatch.setattr(sweep, "outcome", lambda ref, of_ray=of_ray: (of_ray, "disk full"))
        going.settle(task, stopping=True)
        assert task.state == state


def test_a_dry_run_of_a_sweep_that_is_running_prints_its_plan(command, no_ray):
    begin(FOLDER, asked())
    with alone_in(FOLDER, "manifest.jsonl"):
        assert command("--dry-run")[::2] == (0, "")


def test_a_dry_run_takes_the_speed_that_this_sweep_has_measured(command, no_ray, one_run):
    going, task, _ = one_run
    task.begin()
    task.began, task.progress = time.monotonic() - 100, replace(task.progress, step=500)
    going.book.record(task, "running")
    going.book.record(task, "finished")
    assert "at 6 steps per second" in command("--dry-run", "--arms", "none")[1].splitlines()[-1]


def test_a_run_is_noted_with_the_code_that_is_there_when_it_begins(one_run, monkeypatch):
    going, task, submitted = one_run
    monkeypatch.setattr(sweep.manifest, "commit", lambda: "def")
    going.submit(task)
    assert len(submitted) == 1 and [change.commit for change in read_manifest(FOLDER)] == ["def"]


def test_of_two_sweeps_that_begin_at_once_the_later_one_is_refused(command, monkeypatch):
    @contextlib.contextmanager
    def meanwhile(_):
        begin(FOLDER, asked() | {"seeds": [7]})
        yield

    monkeypatch.setattr(sweep, "cluster", meanwhile)
    nodes = [
        {"Alive": True, "Resources": {"CPU": 2, "memory": 1e11}},
        {"Alive": False, "Resources": {"CPU": 64, "GPU": 8, "memory": 1e12}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    status, _, errors = command()
    assert status == 1
    assert "(seeds is [1], there [7]; threads is 1, there None; gpu is False, there None)" in errors
    assert read_asked(FOLDER).seeds == [7] and read_manifest(FOLDER) == []
