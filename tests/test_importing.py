"""Importing the script changes nothing in the process: what a run needs is set where it begins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WITHOUT_LETTERS

ROOT = Path(__file__).resolve().parent.parent

# what other packages do when they are imported is theirs, so they come first
OBSERVED = """
import atexit, ctypes, gc, json, locale, logging, os, random, signal, sys, threading, warnings
import ale_py, annotated_types, cv2, gymnasium, numpy, psutil, stable_baselines3, torch, tqdm, tyro
import stable_baselines3.common.atari_wrappers, stable_baselines3.common.buffers
import torch.utils.tensorboard
from tensorboard.backend.event_processing import event_accumulator, event_file_loader


def state():
    halves = torch.full((8,), torch.finfo(torch.float32).tiny) * 0.5
    streams = (sys.stdout, sys.stderr, sys.stdin)
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads()],
        "denormals": halves.count_nonzero().item(),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
        "streams": [(str(stream), stream.encoding, stream.errors) for stream in streams],
        "locale": locale.setlocale(locale.LC_ALL),
        "warnings": [str(given) for given in warnings.filters],
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "determinism": [
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ],
        "precision": [
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
        ],
        "gradients": torch.is_grad_enabled(),
        "random numbers": [
            torch.get_rng_state().tolist(), str(numpy.random.get_state()), str(random.getstate())
        ],
        "hooks": [str(sys.excepthook), str(threading.excepthook), str(sys.unraisablehook)],
        "exits": atexit._ncallbacks(),
        "logging": [logging.root.level, str(logging.root.handlers), logging.raiseExceptions],
        "running": [str(thread) for thread in threading.enumerate()],
        "games": sorted(gymnasium.registry),
        "numpy": [str(numpy.geterr()), str(numpy.get_printoptions())],
        "interpreter": [sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_threshold()],
        "places": [os.getcwd(), os.listdir(), sys.path, sys.argv],
    }


def no_library(*given):
    raise AssertionError("the allocator is set where a run begins")


print("begun", flush=True)
before = state()
ctypes.CDLL = no_library
import dqn_injection_atari
after = state()
print(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))
"""


def run(code, folder):
    # nothing of this process, which has imported the script: a change would be there before
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    # where the locale's letters are ASCII, the script itself begins once more in UTF-8
    environment |= WITHOUT_LETTERS | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_importing_the_script_changes_nothing_in_the_process(tmp_path):
    ended = run(OBSERVED, tmp_path)
    assert ended.returncode == 0, ended.stderr
    begun, changes = ended.stdout.splitlines()
    assert begun == "begun" and json.loads(changes) == {} and ended.stderr == ""


WRONG = """
import gymnasium
gymnasium.__version__ = "0.29.1"
import {module}
print("imported", {module}.__name__)
"""


@pytest.mark.parametrize("module", ["dqn_injection_atari", "support.versions"])
def test_importing_never_exits_with_a_version_that_a_run_refuses_either(tmp_path, module):
    ended = run(WRONG.format(module=module), tmp_path)
    assert ended.stderr == "" and ended.stdout == f"imported {module}\n"
