"""Whole runs that are small, and ways to interrupt them: before any line, after a step, on a full disk."""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import math
import os
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import BRIEF

import dqn_injection_atari as script
from benchmarks.kill_test import content, differences
from dqn_injection_atari import Args, train
from support.checkpoints import load_checkpoint
from support.run_log import RunLog

# 30 updates and a few games; the replay of 150 steps wraps around; no SVDs, which would take longest of all
SMALL = replace(
    BRIEF,
    total_timesteps=240,
    buffer_size=150,
    learning_starts=60,
    train_frequency=6,
    log_frequency=40,
    plasticity_frequency=0,
    checkpoint_frequency=130,  # new games begin there, each of which takes 0.1 s
    injection_step=(142,),
)
OFTEN = replace(SMALL, checkpoint_frequency=80)  # which the end is a multiple of
# step 142 lies within a vector step, the last is cut
OVERLAP = replace(SMALL, num_envs=4, overlap=True, total_timesteps=239)
# nothing is learned, in one game: for what does not depend on it
PLAYING = replace(SMALL, num_envs=1, learning_starts=240, injection_step=())
# its two injections come where the norm has grown, early in the run
NORM = replace(
    SMALL,
    injection_step=(),
    injection_trigger="norm",
    injection_norm_ratio=1.0001,
    injection_check_frequency=20,
    max_injections=2,
    learning_rate=3e-4,
)
LATER = {"total_timesteps": 480, "exploration_fraction": 0.05}
END = "checkpoint-240"


class Killed(BaseException):
    """Stands for SIGKILL within this process: nothing of the code handles it."""


def kill():
    raise Killed


def send(number):
    """An action: this process gets a signal."""
    return lambda: signal.raise_signal(number)


def before_line(number, module, action, most=math.inf):
    """Has `action` called before the `number`-th line that is run of a module, until `sys.settrace(None)`.

    Of a line that is run often its first `most` times count.
    """
    lines, times = itertools.count(1), Counter()

    def trace(frame, event, _):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            times[frame.f_lineno] += 1
            if times[frame.f_lineno] <= most and next(lines) == number:
                action()
        return trace

    sys.settrace(trace)


def dies(function):
    """Runs it in a process of its own; returns whether that was killed before it came to an end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def killed_before_every_line(function, *modules):
    """Yields after each of many processes; the k-th is killed before the k-th line that it runs of them."""
    for module in modules:
        for number in itertools.count(1):

            def process(module=module, number=number):
                before_line(number, module, send(signal.SIGKILL), most=2)
                function()
                sys.settrace(None)

            if not dies(process):
                assert number > 5, "it was killed often"
                break
            yield


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes: writing fails in earnest, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# whole runs


def at_step(patch, step, action):
    """Has `action` called once, at the end of the vector step that comes to `step`, before any saving."""
    original = script.Training.advance
    done = []

    def advance(training):
        original(training)
        if training.run.step >= step and not done:
            done.append(step)
            action()

    patch.setattr(script.Training, "advance", advance)


def new_folder(before):
    (folder,) = set(Path("runs").glob("[!.]*")) - before
    return folder


def train_until(step, args, action=kill):
    """The folder of a run in which `action` happened at `step`, by default its end."""
    before = set(Path("runs").glob("*"))
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, action)
        if action is kill:
            patch.setattr(RunLog, "close", lambda log: log.bar.close())  # a killed run writes nothing more
            with pytest.raises(Killed):
                train(args)
        else:
            train(args)
    return new_folder(before) if args.resume is None else Path(args.resume)


def until_signal(step, args, number=signal.SIGTERM):
    return train_until(step, args, send(number))


def fork(checkpoint, args, **changes):
    return train(replace(args, fork=str(checkpoint), **changes))


def names(folder):
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name[11:]))


def all_files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def copy_of(folder, name):
    return Path(shutil.copytree(folder, f"runs/{name}"))


def interventions_before(checkpoint):
    """Steps of the interventions before a checkpoint."""
    return load_checkpoint(checkpoint).state["learner"]["interventions"]


def main(monkeypatch, *flags):
    """The script's exit status with these flags, or its error."""
    monkeypatch.setattr(sys, "argv", ["", *flags])
    try:
        script.main()
    except SystemExit as stop:
        return stop.code
    return 0


def flags_of(args):
    """The command line of a run."""
    flags = []
    for name, value in asdict(args).items():
        if value == getattr(Args, name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


def killed_in(owner, name, call, args):
    """A run that is killed as it calls a function for the `call`-th time."""
    original, tidy_up, calls = getattr(owner, name), shutil.rmtree, []

    def killed(*given, **options):
        calls.append(given)
        if len(calls) == call:
            raise Killed
        return original(*given, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunLog, "close", lambda log: log.bar.close())
        patch.setattr(
            shutil, "rmtree", lambda *given, **options: len(calls) < call and tidy_up(*given, **options)
        )
        patch.setattr(owner, name, killed)
        train(args)


def assert_same_end(folder, reference, end=END):
    assert differences(content(folder, end), content(reference, end)) == []


def uninterrupted_run(shared, args):
    """The folder of a run in these arguments that nobody touched, made by the first process that asks."""
    place = shared / hashlib.sha256(repr(args).encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "made", "a+", encoding="utf-8") as created, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(created, fcntl.LOCK_EX)
        created.seek(0)
        name = created.read()
        if not name:
            patch.chdir(place)
            name = str(train(args).absolute())
            created.write(name)
    return Path(name)


@pytest.fixture(scope="session", name="uninterrupted")
def uninterrupted_runs(tmp_path_factory):
    """`uninterrupted(args)` is the folder of such a run, which tests share: to be read, not changed."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own in there
        shared = shared.parent
    return functools.partial(uninterrupted_run, shared / "uninterrupted")
