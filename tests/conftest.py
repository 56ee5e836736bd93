import copy
import gc
import os
import shutil
import signal
import sys
import time
import types
from typing import ClassVar

# before torch is imported; processes that tests start take it over
os.environ.setdefault("OMP_NUM_THREADS", "1")
# read at a GPU's first product, whichever test makes it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import gymnasium as gym
import numpy as np
import pytest
import torch
from recorded_graphs import stand_in  # noqa: F401, a fixture of all tests
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dqn_injection_atari import Args, Learner, Training, train  # registers the games, too
from support import environments, run_log
from support.machine import slow_bfloat16
from support.optimizers import moments_by_name

# tests compute on the CPU, also where there is a GPU: see `gpu_where_marked`
GPU_AVAILABLE = torch.cuda.is_available()
torch.cuda.is_available = lambda: False

# tests train in bfloat16 on any processor, on some of them slowly
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: True  # type: ignore[attr-defined]
torch.cpu._is_avx512_bf16_supported = lambda: True

gc.disable()  # until all is collected: it need not look at a million objects of modules again and again
# tests in the background, and so their runs, would ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# of a process, a locale that has no letters but ASCII's
WITHOUT_LETTERS = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def variant(env_id, of, **kwargs):
    """Registers an Atari game that differs from `of` in some keyword arguments; returns its id."""
    if env_id not in gym.registry:
        gym.register(env_id, "ale_py.env:AtariEnv", kwargs={**gym.spec(of).kwargs, **kwargs})
    return env_id


SHORT_GAMES = variant("BriefPhoenix-v5", "PhoenixNoFrameskip-v4", max_num_frames_per_episode=400)
TINY_GAMES = variant("TinyPhoenix-v5", "PhoenixNoFrameskip-v4", max_num_frames_per_episode=120)  # 30 steps


class ReusedAtariVectorEnv(environments.EagerAtariVectorEnv):
    """ALE's vectoriser; where one in the same settings was closed before, that one.

    Loading a ROM takes 0.1 s a game. A run seeds its games before it plays, and that loads their ROMs anew.
    """

    closed_before: ClassVar[dict[tuple, list]] = {}

    def __new__(cls, **settings):
        waiting = cls.closed_before.setdefault(tuple(sorted(settings.items())), [])
        return waiting.pop() if waiting else super().__new__(cls)

    def __init__(self, **settings):
        if "settings" not in vars(self):
            super().__init__(**settings)
        self.settings = tuple(sorted(settings.items()))
        self.is_open = True

    def close(self, **_):
        if self.is_open and not self.sent:  # or its games are still playing
            self.closed_before[self.settings].append(self)
        self.is_open = False


def pytest_unconfigure():
    # emulators that live to the interpreter's end are reported as leaks
    ReusedAtariVectorEnv.closed_before.clear()


environments.EagerAtariVectorEnv = ReusedAtariVectorEnv  # type: ignore[misc, assignment]


MEASURED = Training.MEASURED
Training.MEASURED = 48  # a measurement takes a second on 512


BRIEF = Args(  # a whole run, in seconds
    env_id=TINY_GAMES,
    env_backend="ale",
    num_envs=2,
    total_timesteps=360,
    buffer_size=250,
    learning_starts=100,
    batch_size=4,
    head_width=16,  # checkpoints of 4 MB, not 50
    target_network_frequency=50,
    log_frequency=60,
    checkpoint_frequency=120,
)


def pytest_collection_modifyitems(items):
    if not GPU_AVAILABLE:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def needs_bfloat16_on_the_gpu():
    """Skips a test where the GPU has no instructions for bfloat16, with which a run refuses --bf16."""
    slow = slow_bfloat16(torch.device("cuda"))
    if slow:
        pytest.skip(slow)


@pytest.fixture(autouse=True)
def gpu_where_marked(request, monkeypatch):
    """The GPU for those tests that are marked gpu, and for none of the processes that others start."""
    if request.node.get_closest_marker("gpu") is not None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    elif GPU_AVAILABLE:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def tick(monkeypatch):
    """Moves the clock of a run's speed by some seconds. Nothing else does."""
    clock = [0.0]

    def tick(seconds):
        clock[0] += seconds

    on_it = types.SimpleNamespace(perf_counter=lambda: clock[0], time=time.time)
    monkeypatch.setattr(run_log, "time", on_it)
    return tick


def scalars(folder):
    """{tag: [(step, value), ...]} of a run's TensorBoard files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        curves[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return curves


ACTIONS = 6


def make_learner(**kwargs):
    settings = {"injection_step": (10, 20), "batch_size": 8, "learning_rate": 1e-3, "head_width": 64}
    return Learner(Args(**settings | kwargs), ACTIONS, "cpu")


def trained(**settings):
    """A learner after three updates."""
    learner = make_learner(**settings)
    for k in range(3):
        learner.update(random_batch(k))
    return learner


def random_batch(rng=0, size=8):
    """What replay would give, of noise from a seed or generator."""
    rng = np.random.default_rng(rng)
    stacks = torch.from_numpy(rng.integers(0, 256, (size, 5, 84, 84), dtype=np.uint8))
    return ReplayBufferSamples(
        observations=stacks[:, :-1],
        actions=torch.from_numpy(rng.integers(ACTIONS, size=(size, 1))),
        next_observations=stacks[:, 1:],
        dones=torch.from_numpy(rng.integers(2, size=(size, 1)).astype(np.float32)),
        rewards=torch.from_numpy(rng.normal(size=(size, 1)).astype(np.float32) * 2),
    )


def joined(batches):
    """Several batches as one."""
    fields = zip(*(batch[:5] for batch in batches), strict=True)
    return ReplayBufferSamples(*map(torch.cat, fields))


def status_of(main):
    """The exit status that a script's `main` ends with; its message goes to stderr, as Python has it."""
    try:
        main()
    except SystemExit as error:
        print(error.code, file=sys.stderr)
        return 1 if isinstance(error.code, str) else error.code
    return 0


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    """The folder of the run of `saved_agents.SMALL`."""
    from saved_agents import SMALL

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("saved"))
        return train(SMALL).absolute()


@pytest.fixture
def checkpoint(saved_run, tmp_path):
    """A copy of the checkpoint before that run's one injection."""
    return shutil.copytree(saved_run / "checkpoint-180", tmp_path / "checkpoint-180")


@pytest.fixture
def injected_checkpoint(saved_run):
    """The one at the run's end, in which all pairs of heads are in use."""
    return saved_run / "checkpoint-240"


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moments_of(learner, path):
    """{parameter: its moments}, as copies, of the module at this path."""
    state = copy.deepcopy(moments_by_name(learner.optimizer, learner.q_network))
    return {name: state[name] for name in state if name.startswith(f"{path}.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def all_same(a, b):
    """Whether two dictionaries of moments are the same."""
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
