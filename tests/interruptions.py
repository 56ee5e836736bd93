"""Ways to interrupt what writes files: before any of its lines, after a step, on a full disk."""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import math
import os
import resource
import signal
import sys
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BRIEF

import dqn_injection_atari as script
from benchmarks.kill_test import content, differences
from dqn_injection_atari import train
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
