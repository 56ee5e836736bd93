"""Weights & Biases, the real package: without a login or a network, offline, resumed, stopped, killed."""

import functools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import BRIEF, scalars
from interruptions import new_folder, until_signal

import dqn_injection_atari as script
import support.weights_and_biases as weights_and_biases
from support.usage import UsageError
from support.weights_and_biases import require_wandb, start_wandb

TRACKED = replace(BRIEF, total_timesteps=240, plasticity_frequency=0, track=True)
OFFLINE = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {
    "WANDB_MODE": "offline",
    "CUDA_VISIBLE_DEVICES": "",
}


def all_there_is():
    return sorted(str(path) for path in Path().rglob("*"))


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """No login, no settings of whoever runs the tests; quick to give up."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path.parent / "home").mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(tmp_path.parent / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path.parent / "home"))
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    monkeypatch.setattr(sys, "stdin", open(os.devnull, encoding="utf-8"))  # noqa: SIM115
    yield
    if "wandb" in sys.modules and hasattr(sys.modules["wandb"], "teardown"):
        sys.modules["wandb"].teardown()


def test_a_folder_named_wandb_does_not_pass_for_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_and_biases.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install wandb, or leave out --track"):
        require_wandb()
    monkeypatch.undo()
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UsageError, match="pip install wandb"):
        require_wandb()


def test_it_is_asked_to_mirror_tensorboard_in_a_run_that_can_be_gone_on_with(monkeypatch):
    given = {}
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None, origin="somewhere")
    wandb.init = functools.partial(given.update)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    require_wandb()
    start_wandb("p", "e", "name", "abc", {"seed": 1})
    assert given.pop("sync_tensorboard") is True and given.pop("save_code") is True
    assert given == {
        "project": "p",
        "entity": "e",
        "name": "name",
        "id": "abc",
        "resume": "allow",
        "config": {"seed": 1},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "No API key configured"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, ""),  # nothing answers there
    ],
    ids=["no login", "no network"],
)
def test_a_service_that_cannot_be_used_is_one_line_and_no_run_begins(monkeypatch, settings, reason):
    """What is left is its own folder."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as refusal:
        script.train(TRACKED)
    message = str(refusal.value)
    assert message.startswith(f"--track: Weights & Biases cannot be used ({reason}") and "\n" not in message
    assert "wandb login" in message and "WANDB_MODE=offline" in message
    assert all(path.startswith("wandb") for path in all_there_is())


@pytest.mark.parametrize("place", [None, "elsewhere"])
def test_where_a_service_cannot_be_used_nothing_is_removed_that_this_process_did_not_make(monkeypatch, place):
    """Links that lead nowhere, empty folders, folders of this run's name: whose they are is not known."""
    for folder in ("wandb", "notwandb", "elsewhere/wandb", "elsewhere/my-wandb"):
        Path(folder, "empty").mkdir(parents=True)
        Path(folder, "run-1-abc").mkdir()
        Path(folder, "to-another-disk").symlink_to("/not/mounted/now")
    Path("an-empty-wandb").mkdir()
    if place is not None:
        monkeypatch.setenv("WANDB_DIR", place)

    def init(**_):
        raise RuntimeError("no network. And more\nof it")

    wandb = types.ModuleType("wandb")
    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    before = all_there_is()
    with pytest.raises(UsageError, match=r"cannot be used \(no network\. And more\): give a login"):
        start_wandb("p", "e", "name", "abc", {})
    assert all_there_is() == before


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (
            ImportError("no protobuf"),
            "): leave out --track, in a run that has begun by --fork with --no-track",
        ),
        (
            RuntimeError("no network"),
            "): give a login by `wandb login`, keep its curves here by WANDB_MODE=offline, or leave",
        ),
    ],
)
def test_what_to_do_without_the_service_is_what_can_help(monkeypatch, error, fix):
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **_: exec("raise error", {"error": error})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UsageError, match=re.escape(fix)):
        start_wandb("p", "e", "name", "abc", {})


def test_what_sends_a_run_there_can_be_pasted(monkeypatch, capsys):
    def fail(**_):
        raise OSError("it is gone")

    wandb_run = types.SimpleNamespace(
        offline=True, settings=types.SimpleNamespace(sync_dir="my runs/wandb/x"), finish=fail
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **_: wandb_run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    weights_and_biases.finish_wandb(start_wandb("p", "e", "name", "abc", {}), 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith("by: wandb sync 'my runs/wandb/x'") for line in lines)


@pytest.mark.parametrize(
    "error", [ImportError("cannot import name 'x' from 'google.protobuf'"), SystemExit(143)]
)
def test_a_package_that_is_broken_is_one_line_and_a_signal_leaves_nothing_behind(monkeypatch, error):
    class Finder:
        def find_spec(self, name, *_):
            if name == "wandb":
                raise error

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(type(error) if isinstance(error, SystemExit) else UsageError):
        start_wandb("p", "e", "name", "abc", {})
    assert all_there_is() == [] and sys.stdin.name == os.devnull


@pytest.mark.slow
def test_on_a_terminal_it_asks_nothing(monkeypatch):
    flags = "--env-backend ale --buffer-size 500 --track"
    terminal, inside = os.openpty()
    command = [sys.executable, script.__file__, *flags.split()]
    environment = {name: value for name, value in OFFLINE.items() if name != "WANDB_MODE"}
    environment |= {"HOME": os.environ["HOME"], "WANDB_CONFIG_DIR": os.environ["HOME"]}
    run = subprocess.run(command, stdin=inside, stdout=inside, stderr=inside, env=environment, timeout=60)
    printed = os.read(terminal, 100_000).decode()
    assert (
        run.returncode == 1
        and "error: --track: Weights & Biases cannot be used (No API key configured" in printed
    )
    assert all(path.startswith("wandb") for path in all_there_is())


def rows(folder):
    """{tag: [(step, value), ...]} in the file of one run there, and the exit status that it ended with.

    The file is LevelDB's log: blocks of 32 kB with records of a 7-byte head, (checksum, length, kind).
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # a process of its own writes the file, the last of it a moment after a run's finish
    (path,) = folder.glob("*.wandb")
    data, at, record, curves, status = path.read_bytes(), 7, b"", {}, None
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            parsed, record = Record.FromString(record), b""
            if parsed.WhichOneof("record_type") == "exit":
                status = parsed.exit.exit_code
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in parsed.history.item
            }
            for tag, value in row.items():
                curves.setdefault(tag, []).append((row.get("global_step"), value))
    return curves, status


def newest_run():
    return max(Path("wandb").glob("offline-run-*"))


def assert_whole(curves, folder):
    logged = scalars(folder)
    assert len(logged) >= 7
    for tag, points in logged.items():
        np.testing.assert_allclose(curves[tag], points, err_msg=tag)


@pytest.mark.slow
def test_offline_curves_are_whole_after_a_stop_and_a_resume(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = until_signal(130, TRACKED)
    _, status = rows(first := newest_run())
    assert status == 143
    time.sleep(1.1)  # the folders there are named by the second
    script.train(script.Args(resume=str(folder)))
    curves, status = rows(second := newest_run())
    assert status == 0 and first != second and first.name[-16:] == second.name[-16:], (
        "one run there, of two processes"
    )
    assert_whole(curves, folder)
    untouched = script.train(replace(TRACKED, track=False))
    expected, found = scalars(untouched), scalars(folder)
    assert {tag: points for tag, points in found.items() if "SPS" not in tag} == {
        tag: points for tag, points in expected.items() if "SPS" not in tag
    }


@pytest.mark.slow
def test_a_forks_curves_are_whole_there_too(monkeypatch):
    folder = script.train(replace(TRACKED, track=False))
    monkeypatch.setenv("WANDB_MODE", "offline")
    origin = str(folder / "checkpoint-240")
    forked = script.train(replace(TRACKED, fork=origin, total_timesteps=360, exploration_fraction=24 / 360))
    curves, status = rows(newest_run())
    assert status == 0
    assert_whole(curves, forked)


def begun(flags, request, **options):
    """A process that trains offline, once it has shown where its curves are; it ends with the test."""
    process = subprocess.Popen(
        [sys.executable, "-u", script.__file__, *flags.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=OFFLINE,
        **options,
    )
    request.addfinalizer(process.kill)
    while process.poll() is None and "curves in" not in process.stdout.readline():
        pass
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_a_job_ends_the_run_cleanly(number, request):
    flags = "--env-backend ale --buffer-size 500 --checkpoint-frequency 0 --log-frequency 50 --track"
    flags += " --learning-starts 100"
    flags += " --head-width 16"
    process = begun(flags, request, start_new_session=True)  # a group of its own
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    assert "--resume runs/" in out
    curves, status = rows(newest_run())
    assert status == 128 + number
    folder = new_folder(set())
    assert set(curves) >= set(scalars(folder)) and re.fullmatch(
        r"checkpoint-\d+", next(folder.glob("checkpoint-*")).name
    )


@pytest.mark.slow
def test_where_it_dies_in_mid_run_the_run_goes_on_and_ends_as_it_should(request):
    flags = "--env-backend ale --buffer-size 500 --total-timesteps 500 --log-frequency 50 --track"
    flags += " --learning-starts 100"
    flags += " --head-width 16"
    process = begun(flags, request)
    (core,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.name() == "wandb-core"
    )
    core.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert (
        "warning: Weights & Biases has failed" in out
        and "cannot be written" not in out
        and "script" not in err
    )
    curves = scalars(new_folder(set()))
    assert [step for step, _ in curves["losses/td_loss"]] == list(range(150, 501, 50))
