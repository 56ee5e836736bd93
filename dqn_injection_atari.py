"""Double DQN with plasticity injection on Atari, in one file (Nikishin et al. 2023, arXiv 2305.15555).

    Q(s) = h_θ(φ(s)) + Σ_k [h_θ′₁ₖ(φ(s)) − h_θ′₂ₖ(φ(s))]

φ is the Nature CNN's convolutional encoder, h a head of two linear layers. Before an injection Q = h_θ. An injection
draws one fresh head, installs it twice (θ′₁ = θ′₂), and freezes θ and θ′₂: the output and the number of trainable
parameters stay as they were, and θ′₁ learns with the plasticity of a new head.

    python dqn_injection_atari.py --env-id PhoenixNoFrameskip-v4 --injection-step 5000000     # train, inject, log
    python dqn_injection_atari.py --env-id PhoenixNoFrameskip-v4 --injection-step 5000000 --no-apply-injection  # baseline
    python dqn_injection_atari.py --resume runs/FOLDER                                         # go on, bit for bit
    python dqn_injection_atari.py --fork runs/FOLDER/checkpoint-5000000 --no-apply-injection   # its baseline, from there
    tensorboard --logdir runs                                                                  # read the curves

Unit everywhere: 1 step = 1 decision of the agent in 1 environment = 4 emulator frames.
"""

import contextlib
import copy
import ctypes
import errno
import fcntl
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, get_args

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import psutil
import stable_baselines3
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
import zstandard
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import FrameStackObservation, ReshapeObservation, TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, NoopResetEnv, WarpFrame
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter, summary
from tqdm import tqdm

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner per emulator
# Dead units leave denormal moments, which halve Adam's speed on a CPU. Here, since PyTorch's worker threads take the setting
# over from the main thread when they start, and not later
torch.set_flush_denormal(True)
if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    # glibc gives freed blocks of over 128 kB back to the system, whose pages each update would then have to fault in again
    libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: smaller blocks, all but replay's frames, come from the heap
    libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: which keeps so many bytes of what was freed

FRAME_SKIP = 4  # emulator frames per step
FRAME_SIZE = 84  # pixels, both sides
STACK = 4  # frames per observation
MAX_NOOPS = 30
SCRIPT_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # of the code that runs, edits come later


class UsageError(ValueError):
    """Something the user gave cannot work; the message is one line and names the fix."""


@dataclass(frozen=True)
class Args:
    """Every knob of a run. `(DQN Zoo ...)` and `(cleanRL ...)` name where a value or a knob comes from."""

    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run folder's name (cleanRL)"""
    seed: int = 1
    """seed of every random stream: network, exploration, replay, environments, injection (cleanRL)"""
    torch_deterministic: bool = True
    """choose deterministic GPU kernels, so that a seed fixes the run bit by bit (cleanRL)"""
    cuda: bool = True
    """train on the GPU when there is one; --no-cuda trains on the CPU (cleanRL)"""
    tf32: bool = True
    """on a GPU, multiply fp32 numbers with TF32's 10-bit mantissas, about twice as fast; the CPU ignores it"""
    bf16: bool = False
    """act and learn with encoder and hidden layers in bfloat16; weights, moments, output layers, TD targets and evaluation
    stay fp32"""
    overlap: bool = False
    """let the games play on while the network learns: the newest num_envs transitions enter replay after the updates that
    fall due among them. Pays where games and network run on different hardware"""
    cuda_graphs: bool = False
    """keep replay's frames on the GPU if they fit, and act and learn through captured CUDA graphs. Needs a GPU, and has not
    been run on one yet"""
    compile: bool = False
    """compile the loss with torch.compile, which takes minutes at the start and after an injection"""
    track: bool = False
    """mirror TensorBoard to Weights & Biases, which must be installed (cleanRL)"""
    wandb_project_name: str = "plasticity-injection"
    """Weights & Biases project (cleanRL)"""
    wandb_entity: str | None = None
    """Weights & Biases entity, i.e. team or user (cleanRL)"""
    capture_video: bool = False
    """write an mp4 of the first game of each evaluation to the run's folder `videos` (cleanRL)"""
    save_model: bool = False
    """save the final agent as `agent.pt` in the run's folder, for --evaluate (cleanRL)"""

    env_id: str = "PhoenixNoFrameskip-v4"
    """any Atari id of Gymnasium, e.g. PhoenixNoFrameskip-v4 or ALE/Phoenix-v5 (with its sticky actions); 4 frames a step"""
    env_backend: Literal["sb3", "ale"] = "sb3"
    """who runs the games: sb3 = gymnasium + Stable-Baselines3's wrappers, ale = ALE's multi-threaded C++ vectoriser"""
    num_envs: int = 1
    """games played in parallel, each adding 1 step per decision; updates per step do not depend on it (cleanRL)"""
    total_timesteps: int = 15_000_000
    """length of the run in steps (paper: 50_000_000 = 200M frames)"""

    injection_step: tuple[int, ...] = ()
    """steps at which plasticity is injected, increasing; none by default (paper: 12_500_000 = 50M frames)"""
    apply_injection: bool = True
    """--no-apply-injection leaves out the injections and nothing else: the baseline arm of a comparison (paper)"""
    freeze_heads: bool = True
    """freeze θ and θ′₂ at injection; --no-freeze-heads trains all three heads (paper, appendix)"""
    injection_optimizer_state: Literal["keep", "copy", "reset"] = "keep"
    """the optimizer at injection: keep = the new head starts without moments, all others stay; copy = it starts with those of
    the head that learned before; reset = no head has any (paper, Fig. 9)"""
    injection_trigger: Literal["step", "norm"] = "step"
    """when to inject: step = at --injection-step; norm = when the weights of encoder and learning head together have grown to
    more than --injection-norm-ratio times their norm at the start, or right after the last injection (paper, appendix)"""
    injection_norm_ratio: float = 3.0
    """growth of the norm that triggers an injection (paper)"""
    injection_check_frequency: int = 1_000
    """steps between checks of the norm"""
    max_injections: int = 1
    """most injections that the norm may trigger; those of the run that a fork comes from count"""
    intervention: Literal["injection", "reset-head", "shrink-perturb", "none"] = "injection"
    """what is done at those steps: injection; reset-head = draw the head anew (Nikishin et al. 2022); shrink-perturb = that,
    and mix the encoder with a new one (Ash & Adams 2020, D'Oro et al. 2023); none = what --no-apply-injection does"""
    shrink_factor: float = 0.8
    """share of the encoder that shrink-perturb keeps: encoder ← factor · encoder + (1 − factor) · new (D'Oro et al. 2023)"""

    optimizer: Literal["adam", "rmsprop"] = "adam"
    """adam, eps 1.5e-4; or rmsprop, centered, decay 0.95, eps 0.01/32² inside the root (paper, DQN Zoo)"""
    learning_rate: float = 1e-4
    """the optimizer's step size (cleanRL; paper: 2.5e-4)"""
    shared_bias: bool = False
    """one bias for all actions in the output layers (paper, DQN Zoo)"""
    buffer_size: int = 1_000_000
    """replay capacity in steps over all environments, 7.3 kB each (DQN Zoo)"""
    gamma: float = 0.99
    """discount per step (DQN Zoo)"""
    tau: float = 1.0
    """share of the online network copied into the target network at a sync: target ← τ·online + (1−τ)·target (cleanRL)"""
    target_network_frequency: int = 8_000
    """steps between target syncs (paper: 30_000)"""
    batch_size: int = 32
    """transitions per update (DQN Zoo)"""
    start_e: float = 1.0
    """ε, the probability of a random action, at step 0 (cleanRL)"""
    end_e: float = 0.01
    """ε at the end of its linear schedule and from then on (DQN Zoo double_q)"""
    exploration_fraction: float = 0.10
    """share of total_timesteps over which ε falls from start_e to end_e (cleanRL; paper: 1_000_000 steps)"""
    exploration_start: int = 0
    """step at which ε begins to fall (paper: 50_000)"""
    learning_starts: int = 80_000
    """steps of random and exploring play before the first update (paper: 50_000)"""
    train_frequency: int = 4
    """steps per update (DQN Zoo)"""

    log_frequency: int = 1_000
    """steps between points of the losses, speed and ε curves; losses are means over that interval (cleanRL: 100)"""
    plasticity_frequency: int = 50_000
    """steps between points of the plasticity curves, measured on 512 replayed transitions; 0 = none"""
    eval_frequency: int = 0
    """steps between evaluations; 0 = none (DQN Zoo: 250_000)"""
    eval_episodes: int = 10
    """whole games per evaluation, played in parallel (cleanRL); 0 with --eval-steps"""
    eval_steps: int = 0
    """steps per evaluation, of one game after the other, of which those that ended count; 0 with --eval-episodes (DQN Zoo,
    paper: 125_000)"""
    eval_epsilon: float = 0.01
    """ε during evaluation (DQN Zoo double_q)"""

    checkpoint_frequency: int = 1_000_000
    """steps between checkpoints, which are also written at injection steps and at the end; 0 = only on SIGTERM, SIGINT or
    SIGUSR1. At every multiple new games begin, resumed or not, so it is part of the experiment (DQN Zoo)"""
    resume: str | None = None
    """go on with the run in this folder from its newest good checkpoint, as if it had never stopped; takes no other flag"""
    fork: str | None = None
    """start a new run from this checkpoint, in its arguments but for those given. Only these may differ: exp_name, cuda,
    cuda_graphs, compile, track, wandb_project_name, wandb_entity, capture_video, save_model, total_timesteps,
    exploration_fraction, injection_step, apply_injection, freeze_heads, injection_optimizer_state, injection_trigger,
    injection_norm_ratio, injection_check_frequency, max_injections, intervention, shrink_factor, plasticity_frequency,
    eval_frequency, eval_episodes, eval_steps, eval_epsilon"""
    evaluate: str | None = None
    """train nothing, but play --eval-episodes games, or --eval-steps, with the agent that --save-model left in this run's
    folder and print the scores. Game and backend are the agent's own; seed, cuda, capture_video and the eval flags this
    command line's"""

    def __post_init__(self) -> None:
        steps = self.injection_step
        steps = (steps,) if isinstance(steps, int | np.integer) else steps
        object.__setattr__(self, "injection_step", tuple(int(step) for step in steps))
        sizes = ("num_envs", "total_timesteps", "buffer_size", "batch_size", "max_injections")
        for name in (*sizes, "target_network_frequency", "train_frequency", "injection_check_frequency"):
            self._require(name, lambda value: value >= 1, "at least 1")
        counts = ("learning_starts", "exploration_start", "eval_episodes", "eval_steps")
        for name in ("seed", "plasticity_frequency", "eval_frequency", *counts):
            self._require(name, lambda value: value >= 0, "0 or more")
        for name in ("gamma", "start_e", "end_e", "exploration_fraction", "eval_epsilon", "shrink_factor"):
            self._require(name, lambda value: 0 <= value <= 1, "between 0 and 1")
        for name in ("learning_rate", "injection_norm_ratio"):
            self._require(name, lambda value: 0 < value < float("inf"), "positive and finite")
        self._require("tau", lambda value: 0 < value <= 1, "above 0 and at most 1")
        for knob in fields(Args):
            if choices := [choice for choice in get_args(knob.type) if isinstance(choice, str)]:
                self._require(knob.name, lambda value, among=choices: value in among, f"one of {', '.join(choices)}")
        for name in ("buffer_size", "log_frequency"):
            self._require(name, lambda value: value >= self.num_envs, f"at least num_envs ({self.num_envs})")
        enough = f"0 or at least num_envs ({self.num_envs})"
        self._require("checkpoint_frequency", lambda value: value == 0 or value >= self.num_envs, enough)
        self._require(
            "injection_step",
            lambda steps: all(a < b for a, b in zip((0, *steps), (*steps, self.total_timesteps), strict=True)),
            f"increasing and within 1 ... {self.total_timesteps - 1}, before the run's end at --total-timesteps",
        )
        self._check_intervention()
        if (self.eval_episodes > 0) == (self.eval_steps > 0):
            given = f"eval_episodes is {self.eval_episodes} and eval_steps {self.eval_steps}, but one of them says how long an"
            raise UsageError(f"{given} evaluation is: give --eval-episodes 0 with --eval-steps, or the other way round")
        if self.capture_video and self.eval_frequency == 0 and self.evaluate is None:
            raise UsageError("capture_video films evaluation games and there are none: give --eval-frequency")
        if sum(value is not None for value in (self.resume, self.fork, self.evaluate)) > 1:
            raise UsageError("resume, fork and evaluate exclude each other: give one of --resume, --fork and --evaluate")

    @property
    def applied_intervention(self) -> str:
        """What this run does when the time has come: `intervention`, or "none" in a baseline."""
        return self.intervention if self.apply_injection else "none"

    def _check_intervention(self) -> None:
        """Refuses flags that contradict each other, or that this intervention or trigger would pass over in silence."""
        what, when = self.intervention, self.injection_trigger
        if not self.apply_injection and what not in ("injection", "none"):
            raise UsageError(
                f"intervention is {what}, and --no-apply-injection says none: for a baseline give --intervention none"
            )
        if when == "norm" and self.injection_step:
            raise UsageError("injection_trigger norm decides when to inject: give --injection-step without a number")
        if what in ("reset-head", "shrink-perturb") and when == "step" and not self.injection_step:
            raise UsageError(f"intervention {what} would never happen: give --injection-step, or --injection-trigger norm")
        for name, use in self.passed_over().items():
            if (value := getattr(self, name)) != getattr(Args, name):
                raise UsageError(f"{name} is {value}, which only {use} looks at: give that, or leave the flag out")

    def passed_over(self) -> dict[str, str]:
        """{field: the flag that would look at it} of what this intervention and trigger do not look at."""
        what, norm = self.intervention, ("injection_norm_ratio", "injection_check_frequency", "max_injections")
        unused = dict.fromkeys(norm, "--injection-trigger norm") if self.injection_trigger == "step" else {}
        if what in ("reset-head", "shrink-perturb"):
            unused |= dict.fromkeys(("freeze_heads", "injection_optimizer_state"), "--intervention injection")
        if what in ("reset-head", "injection"):
            unused["shrink_factor"] = "--intervention shrink-perturb"
        return unused

    def _require(self, name: str, holds: Callable[[Any], bool], rule: str) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise UsageError(f"{name} is {value}, but must be {rule}: change --{name.replace('_', '-')}")


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {  # DQN Zoo's Double DQN (tuned), injected after 50M frames
        "total_timesteps": 50_000_000,
        "injection_step": (12_500_000,),
        "optimizer": "rmsprop",
        "learning_rate": 2.5e-4,
        "shared_bias": True,
        "target_network_frequency": 30_000,
        "learning_starts": 50_000,
        "exploration_start": 50_000,
        "exploration_fraction": 0.02,
        "eval_frequency": 250_000,
        "eval_episodes": 0,
        "eval_steps": 125_000,
    },
}


@dataclass(frozen=True)
class CommandLine(Args):
    """What the command line gives, before `Args` checks it: tyro would draw a box around what is refused."""

    preset: Literal["default", "paper"] = "default"
    """values of the flags that are not given: this script's own, or the paper's, 50M steps with an injection at 12.5M"""

    def __post_init__(self) -> None:
        pass

    def checked(self) -> Args:
        return Args(**{knob.name: getattr(self, knob.name) for knob in fields(Args)})


class Stream(IntEnum):
    """The independent random streams of a run."""

    NETWORK = 0
    EXPLORATION = 1
    REPLAY = 2
    ENVIRONMENTS = 3
    INJECTION = 4
    EVALUATION = 5
    PLASTICITY = 6
    PERTURBATION = 7


def stream_seed(seed: int, stream: Stream, key: int = 0) -> int:
    """A seed in [0, 2³⁰) for one use; neighbouring run seeds, streams and keys give unrelated ones."""
    return int(np.random.SeedSequence([seed, stream, key]).generate_state(1)[0]) >> 2


def atari_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """The registration of an Atari id.

    Raises:
        UsageError: the id is unknown, not an Atari game, or has continuous actions or observations other than the screen.
    """
    try:
        spec = gym.spec(env_id)
    except (gym.error.Error, ImportError) as error:
        raise UsageError(f"unknown env_id {env_id!r} ({error}): try PhoenixNoFrameskip-v4") from None
    if spec.entry_point not in ("ale_py.env:AtariEnv", "ale_py:AtariEnv"):
        raise UsageError(f"env_id {env_id!r} is not an Atari game: try PhoenixNoFrameskip-v4")
    if spec.kwargs.get("continuous", False):
        raise UsageError(f"env_id {env_id!r} has continuous actions, DQN needs discrete ones: register it without them")
    if spec.kwargs.get("obs_type", "rgb") != "rgb":
        raise UsageError(f"env_id {env_id!r} shows {spec.kwargs['obs_type']}, not the screen: register it without obs_type")
    return spec


class LearnerView(VectorWrapper):
    """What the learner sees of Atari games: clipped rewards, and life losses as terminal while the game goes on.

    `step` returns
        obs (N, 4, 84, 84) uint8: of the next decision; a row whose game ended shows the next game
        rewards (N,) float32: −1, 0 or 1, the sign of the change in score
        terminations (N,) bool: the game is over, or a life was lost and the game goes on
        truncations (N,) bool: the game was cut at its frame limit
        infos: "final_obs" (N, 4, 84, 84) uint8, the true successor, also where obs shows the next game;
            where "_episode" is set, infos["episode"]["r"] is the whole game's raw score, ["l"] its length in steps

    ALE's vectoriser cannot be saved, but games repeat themselves: `state_dict` is the seed of the last reset and the
    actions since, and `load_state_dict` plays them again.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.obs, infos = self.env.reset(seed=seed, options=options)
        self.lives = infos["lives"]
        self.seed, self.actions = seed, bytearray()
        self.outcome: tuple | None = None
        return self.obs, infos

    def state_dict(self) -> dict[str, Any]:
        if self.actions:
            self.receive()
        actions = np.frombuffer(self.actions, np.uint8).reshape(-1, self.num_envs)
        return {"seed": self.seed, "actions": torch.from_numpy(actions.copy()), "obs": torch.from_numpy(self.obs.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset(seed=state["seed"])
        for actions in state["actions"].numpy():
            self.step(actions.astype(np.int64))
        if not np.array_equal(self.obs, state["obs"].numpy()):
            raise ValueError("the games do not repeat themselves")

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.send(actions)
        return self.receive()

    def send(self, actions: np.ndarray) -> None:
        """The first half of a step. ALE's vectoriser begins to play, in threads of its own."""
        self.actions += np.asarray(actions, np.uint8).tobytes()
        self.decision, self.outcome = (self.obs, actions), None
        if isinstance(self.unwrapped, EagerAtariVectorEnv):
            self.unwrapped.send(actions)

    def receive(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """The second half: what `step` returns, again and again until the next `send`."""
        if self.outcome is None:
            self.outcome = self._play()
        return self.outcome

    def _play(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.obs, scores, terminations, truncations, infos = self.env.step(self.decision[1])
        ended = terminations | truncations
        # where a game ended, "lives" is already the next game's
        life_lost = ~ended & (infos["lives"] < self.lives)
        self.lives = infos["lives"]
        final_obs = self.obs.copy()
        for i in np.flatnonzero(ended):
            final_obs[i] = infos["final_obs"][i]
        infos["final_obs"] = final_obs
        rewards = np.sign(scores).astype(np.float32)
        return self.obs, rewards, terminations | life_lost, truncations & ~terminations, infos

    def render(self) -> tuple[np.ndarray, ...]:
        """One RGB picture per game: the screen, or the agent's newest frame where ALE's vectoriser has no renderer."""
        if not isinstance(self.unwrapped, AtariVectorEnv):
            return self.env.render()
        zoom = 4
        newest = self.obs[:, -1].repeat(zoom, axis=1).repeat(zoom, axis=2)
        return tuple(np.repeat(newest[..., None], 3, axis=-1))


class EagerAtariVectorEnv(AtariVectorEnv):
    """ALE's vectoriser, whose `step` only receives where `send` has gone ahead."""

    sent = False

    def send(self, actions: np.ndarray) -> None:
        super().send(actions)
        self.sent = True

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        if not self.sent:
            self.send(actions)
        self.sent = False
        return self.recv()


def make_envs(args: Args, num_envs: int | None = None, render_mode: str | None = None) -> VectorEnv:
    """`num_envs` (default: `args.num_envs`) games behind a `LearnerView`; one that ends is replaced in the same step.

    Both backends preprocess as DQN Zoo does: up to 30 no-ops at the start, each action for 4 frames, maximum of the
    last two, grey, 84×84, 4 frames stacked on zeros, a limit on the frames of one game (108,000), no FIRE on reset.

    Raises:
        UsageError: see `atari_spec`; or the id asks for a game mode or difficulty, which ALE's vectoriser cannot set.
    """
    spec = atari_spec(args.env_id)
    num_envs = args.num_envs if num_envs is None else num_envs
    max_frames = spec.kwargs.get("max_num_frames_per_episode") or 108_000

    def make_env() -> gym.Env:
        # the id's own frame skip and frame limit are undone, because the wrappers below apply them
        own = {"frameskip": 1, "max_num_frames_per_episode": None, "render_mode": render_mode}
        env = gym.make(spec, disable_env_checker=True, **own)
        env = NoopResetEnv(env, noop_max=MAX_NOOPS)
        env = MaxAndSkipEnv(env, skip=FRAME_SKIP)
        env = WarpFrame(env, width=FRAME_SIZE, height=FRAME_SIZE)  # (84, 84, 1)
        env = ReshapeObservation(env, (FRAME_SIZE, FRAME_SIZE))
        env = FrameStackObservation(env, STACK, padding_type="zero")  # (4, 84, 84)
        return TimeLimit(env, max_episode_steps=-(-max_frames // FRAME_SKIP))

    if args.env_backend == "sb3":
        envs = SyncVectorEnv([make_env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    else:
        if spec.kwargs.get("mode") is not None or spec.kwargs.get("difficulty") is not None:
            raise UsageError(
                f"env_id {args.env_id!r} sets a mode or difficulty, which ALE's vectoriser cannot: --env-backend sb3"
            )
        envs = EagerAtariVectorEnv(
            game=spec.kwargs["game"],
            num_envs=num_envs,
            max_num_frames_per_episode=max_frames,
            repeat_action_probability=spec.kwargs.get("repeat_action_probability", 0.25),
            full_action_space=spec.kwargs.get("full_action_space", False),
            frameskip=FRAME_SKIP,
            noop_max=MAX_NOOPS + 1,  # draws from 0 ... noop_max − 1
            use_fire_reset=False,
            reward_clipping=False,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
    return LearnerView(RecordEpisodeStatistics(envs))


class OneDNNLinear(torch.autograd.Function):
    """x @ weight.T + bias by oneDNN. PyTorch gives fp32 to MKL, which leaves half of an AMD processor's arithmetic unused."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        multiply = torch.ops.mkldnn._linear_pointwise
        return (
            multiply(grad, weight.t(), None, "none", [], "") if of_x else None,
            multiply(grad.t(), x.t(), None, "none", [], "") if of_weight else None,
            grad.sum(dim=0) if of_bias else None,
        )


class HiddenLayer(nn.Linear):
    """A linear layer, by the faster of PyTorch's two libraries."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
        if fp32_on_cpu and torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling():
            return OneDNNLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


class SharedBiasLinear(nn.Linear):
    """A linear layer with one bias for all its outputs (DQN Zoo)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.bias = nn.Parameter(self.bias.detach()[:1].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.bias


@torch.no_grad()
def redraw(module: nn.Module, generator: torch.Generator | None = None, keep: float = 0.0) -> None:
    """w ← keep · w + (1 − keep) · new for every layer in `module`, the new ones distributed as PyTorch's own: U(±1/√fan_in)."""
    device = "cpu" if generator is None else generator.device
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters():
                new = torch.empty(parameter.shape, device=device).uniform_(-bound, bound, generator=generator)
                parameter.copy_(keep * parameter + (1 - keep) * new.to(parameter.device))


class QNetwork(nn.Module):
    """Nature CNN (Mnih et al. 2015) whose head can be injected with plasticity `max_injections` times.

    Q = θ(φ) + Σ_k (θ′₁[k](φ) − θ′₂[k](φ)) over the injections made so far, each difference taken first: at injection
    it is exactly 0, where (θ(φ) + θ′₁(φ)) − θ′₂(φ) would be off by rounding. All heads exist from the start, so that
    an optimizer holds them all and a state dict has one shape; those not injected yet are zero and not evaluated.
    """

    def __init__(self, num_actions: int, max_injections: int = 1, freeze_heads: bool = True, shared_bias: bool = False):
        super().__init__()

        def head() -> nn.Sequential:
            output = SharedBiasLinear if shared_bias else nn.Linear
            return nn.Sequential(HiddenLayer(3136, 512), nn.ReLU(inplace=True), output(512, num_actions))

        self.encoder = nn.Sequential(
            nn.Conv2d(STACK, 32, 8, stride=4),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )
        self.theta = head()
        self.theta_prime_1 = nn.ModuleList(head() for _ in range(max_injections))
        self.theta_prime_2 = nn.ModuleList(head() for _ in range(max_injections))
        for parameter in (*self.theta_prime_1.parameters(), *self.theta_prime_2.parameters()):
            nn.init.zeros_(parameter)
        self.freeze_heads = freeze_heads
        self.num_injections = 0
        self._set_trainable()

    def features(self, obs: torch.Tensor) -> torch.Tensor:
        """φ: uint8 (B, 4, 84, 84) → (B, 3136), float32 or the encoder's dtype."""
        obs = obs.contiguous(memory_format=torch.channels_last)
        return self.encoder(obs.to(self.encoder[0].weight.dtype, copy=True).div_(255))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Q-values: uint8 (B, 4, 84, 84) → float32 (B, num_actions)."""
        features = self.features(obs)

        def q(head: nn.Sequential) -> torch.Tensor:
            hidden, relu, output = head
            return output(relu(hidden(features)).float())

        q_values = q(self.theta)
        for k in range(self.num_injections):
            q_values = q_values + (q(self.theta_prime_1[k]) - q(self.theta_prime_2[k]))
        return q_values

    def in_bfloat16(self) -> "QNetwork":
        """A copy that computes in bfloat16 up to the output layers, whose sums stay float32."""
        network = copy.deepcopy(self)
        for module in (network.encoder, *(h[0] for h in (network.theta, *network.theta_prime_1, *network.theta_prime_2))):
            module.to(torch.bfloat16)
        return network

    @torch.no_grad()
    def inject(self, generator: torch.Generator | None = None) -> None:
        """Draws the next pair θ′₁ = θ′₂ from `generator`, makes it live, and freezes every head but that θ′₁.

        θ′ is distributed as θ was.

        Raises:
            ValueError: `max_injections` pairs are in use already.
        """
        k = self.num_injections
        if k == len(self.theta_prime_1):
            raise ValueError(f"all {k} pairs of heads are in use: build QNetwork with a larger max_injections")
        redraw(self.theta_prime_1[k], generator)
        self.theta_prime_2[k].load_state_dict(self.theta_prime_1[k].state_dict())
        self.num_injections += 1
        self._set_trainable()

    def live(self) -> dict[str, nn.Module]:
        """The modules that are evaluated, by name: encoder, theta, theta_prime_1.0, theta_prime_2.0, ..."""
        pairs = ("theta_prime_1", "theta_prime_2")
        return {"encoder": self.encoder, "theta": self.theta} | {
            f"{pair}.{k}": getattr(self, pair)[k] for k in range(self.num_injections) for pair in pairs
        }

    def newest_head(self) -> str:
        """The name of the head that learns, whatever else does."""
        return f"theta_prime_1.{self.num_injections - 1}" if self.num_injections else "theta"

    def _set_trainable(self) -> None:
        """Sets `requires_grad` of every head from the number of injections; gradients of frozen ones become None.

        A zero gradient would not do: Adam still moves such a parameter by its momentum.
        """
        live, all_train = self.num_injections, not self.freeze_heads
        self.theta.requires_grad_(live == 0 or all_train)
        for k, (theta_prime_1, theta_prime_2) in enumerate(zip(self.theta_prime_1, self.theta_prime_2, strict=True)):
            theta_prime_1.requires_grad_(k == live - 1 or (all_train and k < live))
            theta_prime_2.requires_grad_(all_train and k < live)
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.grad = None

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.num_injections)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.num_injections = int(state)
        self._set_trainable()


def make_q_network(args: Args, num_actions: int, device: torch.device | str) -> QNetwork:
    """The network of a run, with room for its injections, or for one where none is planned."""
    injections = args.max_injections if args.injection_trigger == "norm" else max(1, len(args.injection_step))
    q_network = QNetwork(num_actions, injections, args.freeze_heads, args.shared_bias)
    return q_network.to(device, memory_format=torch.channels_last)


def upload(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`array` on the device. Nothing waits for the copy: PyTorch keeps the pinned memory from other use until it is done."""
    tensor = torch.as_tensor(array)
    return tensor if tensor.is_cuda or device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class FrameReplayBuffer(ReplayBuffer):
    """Stable-Baselines3's replay buffer, holding each frame once: 7.3 GB instead of 56.4 GB for 1M transitions.

    An observation is a stack of S frames that shifts by one each step, so a transition spans S + 1 frames. They lie
    in a pool, and a transition holds their S + 1 slot numbers. A transition whose obs equals the next_obs added before
    it shares those slots; any other obs starts a new stack, whatever `done` said. Slot 0 is the all-zero frame that
    stacks start on. Every sample equals what Stable-Baselines3's buffer holds, last frames of games included.

    Args:
        buffer_size: capacity in transitions over all environments
        observation_space: Box of shape (S, H, W), e.g. (4, 84, 84) uint8
        action_space: Discrete
        device: where samples go
        n_envs: environments per `add`
        optimize_memory_usage: Stable-Baselines3's way to save memory, refused: it loses the last frames of games
        handle_timeout_termination: sample done = 0 where infos[i]["TimeLimit.truncated"] is set
        generator: source of the sampled indices (Stable-Baselines3 takes NumPy's global one)
        storage: device of the frames; what else makes a transition stays in the CPU's memory, 40 bytes each
    """

    SLACK = 32  # one spare slot per so many transitions holds the extra frames of stack starts; the pool grows if need be

    def __init__(
        self,
        buffer_size: int,
        observation_space: gym.spaces.Box,
        action_space: gym.spaces.Discrete,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        generator: np.random.Generator | None = None,
        storage: torch.device | str = "cpu",
    ):
        if optimize_memory_usage:
            raise ValueError("FrameReplayBuffer stores each frame once as it is: leave out optimize_memory_usage")
        # not ReplayBuffer's own constructor: it allocates every stack, twice
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.generator = np.random.default_rng() if generator is None else generator
        self.stack, *self.frame_shape = self.obs_shape
        rows = (self.buffer_size, n_envs)
        self.storage = torch.device(storage)
        self.frames = self._pool(self.pool_size(buffer_size, n_envs, self.stack))
        self.slots = np.zeros((*rows, self.stack + 1), dtype=np.int32)
        self.actions = np.zeros((*rows, self.action_dim), dtype=action_space.dtype)
        self.rewards = np.zeros(rows, dtype=np.float32)
        self.dones = np.zeros(rows, dtype=np.float32)
        self.timeouts = np.zeros(rows, dtype=np.float32)
        self.reset()

    @classmethod
    def pool_size(cls, buffer_size: int, n_envs: int, stack: int) -> int:
        return buffer_size + buffer_size // cls.SLACK + 2 * (stack + 1) * n_envs

    @classmethod
    def bytes_needed(cls, buffer_size: int, observation_space: gym.spaces.Box, n_envs: int = 1) -> int:
        """Memory of a full buffer in bytes, of games that are not shorter than `SLACK` steps on average."""
        stack, *frame_shape = observation_space.shape
        frames = cls.pool_size(buffer_size, n_envs, stack) * int(np.prod(frame_shape)) * observation_space.dtype.itemsize
        return frames + buffer_size * (4 * (stack + 1) + 8 + 3 * 4)

    def _pool(self, slots: int) -> torch.Tensor:
        """Zeros; on the CPU NumPy's, which take memory only as they are filled."""
        frames = torch.from_numpy(np.zeros((slots, *self.frame_shape), self.observation_space.dtype))
        return frames if self.storage.type == "cpu" else torch.zeros_like(frames, device=self.storage)

    def reset(self) -> None:
        """Forgets every transition."""
        super().reset()
        self._used = 1  # slots ever handed out; slot 0 stays all zero
        self._free: list[int] = []
        self._last_next_obs: np.ndarray | None = None
        self.slots[:] = 0

    def state_dict(self) -> dict[str, Any]:
        """The small part of the state; the large one is in `arrays`."""
        return {
            "pos": self.pos,
            "full": self.full,
            "pool": len(self.frames),
            "used": self._used,
            "free": torch.tensor(self._free, dtype=torch.int32),
            "last_next_obs": None if self._last_next_obs is None else torch.from_numpy(self._last_next_obs),
            "generator": self.generator.bit_generator.state,
        }

    def tensors(self) -> list[torch.Tensor]:
        """The frames in use and every transition's row, as contiguous views; filled after `load_state_dict`, they restore."""
        rows = (self.slots, self.actions, self.rewards, self.dones, self.timeouts)
        return [self.frames[: self._used], *map(torch.from_numpy, rows)]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(self.frames) != state["pool"]:
            self.frames = self._pool(state["pool"])
        self.pos, self.full, self._used, self._free = state["pos"], state["full"], state["used"], state["free"].tolist()
        self._last_next_obs = None if state["last_next_obs"] is None else state["last_next_obs"].numpy()
        self.generator.bit_generator.state = state["generator"]

    def add(
        self, obs: np.ndarray, next_obs: np.ndarray, action: np.ndarray, reward: np.ndarray, done: np.ndarray, infos: list[dict]
    ) -> None:
        """Adds one transition per environment: obs, next_obs (n_envs, S, H, W), the others (n_envs,).

        Raises:
            ValueError: next_obs is not obs shifted by one frame.
        """
        if not np.array_equal(next_obs[:, :-1], obs[:, 1:]):
            raise ValueError("next_obs must be obs shifted by one frame, also at a game's end: pass final_obs there")
        slots = np.empty((self.n_envs, self.stack + 1), dtype=np.int32)
        new: dict[int, np.ndarray] = {}
        for i in range(self.n_envs):
            if self._last_next_obs is not None and np.array_equal(obs[i], self._last_next_obs[i]):
                slots[i, :-1] = self.slots[self.pos - 1, i, 1:]
            else:
                slots[i, :-1] = [self._slot(frame, new) for frame in obs[i]]
            slots[i, -1] = self._slot(next_obs[i, -1], new)
        if new:
            # one by one: a GPU's deterministic way to write by index waits for everything before it
            for slot, frame in zip(new, upload(np.stack(list(new.values())), self.storage), strict=True):
                self.frames[slot].copy_(frame)
        self._last_next_obs = np.array(next_obs)

        overwritten, self.slots[self.pos] = self.slots[self.pos].copy(), slots
        oldest = self.slots[(self.pos + 1) % self.buffer_size]
        still_used = (overwritten[:, :, None] == oldest[:, None, :]).any(axis=2)
        self._free.extend(overwritten[~still_used & (overwritten != 0)].tolist())

        self.actions[self.pos] = np.reshape(action, (self.n_envs, self.action_dim))
        self.rewards[self.pos] = reward
        self.dones[self.pos] = done
        if self.handle_timeout_termination:
            self.timeouts[self.pos] = [info.get("TimeLimit.truncated", False) for info in infos]
        self.pos = (self.pos + 1) % self.buffer_size
        self.full = self.full or self.pos == 0

    def _slot(self, frame: np.ndarray, new: dict[int, np.ndarray]) -> int:
        """The number of a free slot for this frame, which is noted in `new`."""
        if not frame.any():
            return 0
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._used = self._used, self._used + 1
            if slot == len(self.frames):  # many short games: more stack starts than the slack holds
                self.frames = torch.cat([self.frames, self._pool(slot // 4 + 1)])
        new[slot] = frame
        return slot

    def sample(self, batch_size: int, env: None = None, batches: int = 1) -> ReplayBufferSamples:
        """A uniform batch, with replacement, on `device`, drawn from the buffer's own generator; or several in a row.

        Returns:
            observations, next_observations (B, S, H, W) uint8, channels last in memory; actions (B, 1) int64;
            rewards, dones (B, 1) float32; with B = batches · batch_size

        Raises:
            ValueError: `env` was given; what is stored is never normalised.
        """
        if env is not None:
            raise ValueError("FrameReplayBuffer does not normalise: leave out env")
        limits = (self.size(), self.n_envs)
        draws = [[self.generator.integers(limit, size=batch_size) for limit in limits] for _ in range(batches)]
        return self.transitions(*np.concatenate(draws, axis=1))

    def transitions(self, rows: np.ndarray, columns: np.ndarray) -> ReplayBufferSamples:
        """The transitions at these rows of these environments, both (B,) int, in the form that `sample` returns."""
        slots = upload(self.slots[rows, columns].ravel(), self.storage)
        stacks = upload(self.frames.index_select(0, slots), self.device).view(-1, self.stack + 1, *self.frame_shape)
        dones = self.dones[rows, columns] * (1 - self.timeouts[rows, columns])
        return ReplayBufferSamples(
            observations=stacks[:, :-1].contiguous(memory_format=torch.channels_last),
            actions=upload(self.actions[rows, columns], self.device),
            next_observations=stacks[:, 1:].contiguous(memory_format=torch.channels_last),
            dones=upload(dones[:, None], self.device),
            rewards=upload(self.rewards[rows, columns, None], self.device),
        )


def td_loss(
    q_network: nn.Module, target_network: nn.Module, batch: ReplayBufferSamples, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Double DQN's loss (van Hasselt et al. 2016): Huber, δ = 1, mean over the batch.

    Returns:
        the loss, and the mean of the Q-values it was taken at, both 0-d
    """
    with torch.no_grad():
        next_actions = q_network(batch.next_observations).argmax(dim=1, keepdim=True)  # (B, 1)
        next_values = target_network(batch.next_observations).gather(1, next_actions)  # (B, 1)
        td_target = batch.rewards + gamma * (1 - batch.dones) * next_values
    q_values = q_network(batch.observations)  # (B, num_actions)
    taken = torch.arange(q_values.shape[1], device=q_values.device) == batch.actions
    q_values = q_values.where(taken, 0).sum(dim=1, keepdim=True)  # (B, 1); on a GPU gather's gradient needs atomics
    return F.huber_loss(q_values, td_target), q_values.detach().mean()


@torch.no_grad()
def greedy_actions(q_network: nn.Module, obs: torch.Tensor) -> torch.Tensor:
    """(N,) int64 for obs (N, 4, 84, 84) uint8."""
    return q_network(obs).argmax(dim=1)


def epsilon_greedy(
    greedy: Callable[[np.ndarray], torch.Tensor],
    num_actions: int,
    obs: np.ndarray,
    epsilon: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Actions (N,) int64 for obs (N, 4, 84, 84) uint8: `greedy(obs)` or random ones. `rng` moves by the same in any case."""
    explore = rng.random(len(obs)) < epsilon
    actions = rng.integers(num_actions, size=len(obs))
    return actions if explore.all() else np.where(explore, actions, greedy(obs).cpu().numpy())


def joint_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """L2 norm, 0-d float64, of all numbers in these tensors together."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]))


class CenteredRMSProp(torch.optim.Optimizer):
    """w ← w − lr · g / √(E[g²] − E[g]² + eps) with running means of g and g² that start at zero (Graves 2013; DQN Zoo).

    `torch.optim.RMSprop` adds eps outside the root, where 0.01/32² is a 320 times smaller floor.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, decay: float = 0.95, eps: float = 0.01 / 32**2):
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if not self.state[parameter]:
                    self.state[parameter] = {name: torch.zeros_like(parameter) for name in ("mean", "square")}
            grads = [parameter.grad for parameter in trained]
            means, squares = ([self.state[parameter][name] for parameter in trained] for name in ("mean", "square"))
            torch._foreach_lerp_(means, grads, 1 - group["decay"])
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, value=1 - group["decay"])
            roots = torch._foreach_sub(squares, torch._foreach_mul(means, means))
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_addcdiv_(trained, grads, roots, value=-group["lr"])


def make_optimizer(args: Args, network: nn.Module) -> torch.optim.Optimizer:
    """Over every head from the start: it passes over parameters without a gradient."""
    if args.optimizer == "rmsprop":
        return CenteredRMSProp(network.parameters(), args.learning_rate)
    return torch.optim.Adam(network.parameters(), args.learning_rate, eps=1.5e-4, fused=True, capturable=args.cuda_graphs)


class Learner:
    """Owns the online and target networks, the optimizer and the exploration stream.

    With `args.bf16` both networks have a working copy in bfloat16, which acts and gives the gradients; it follows every
    change of the float32 one. With `args.cuda_graphs` acting and updating are captured once and replayed from then on.

    Args:
        args: uses seed, gamma, tau, bf16, cuda_graphs, compile, and what is about the network, optimizer and interventions
        num_actions: size of the discrete action space
        device: of both networks
    """

    def __init__(self, args: Args, num_actions: int, device: torch.device | str):
        self.args, self.num_actions, self.device = args, num_actions, torch.device(device)
        torch.manual_seed(stream_seed(args.seed, Stream.NETWORK))
        self.q_network = make_q_network(args, num_actions, device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        self.optimizer = make_optimizer(args, self.q_network)
        self.rng = np.random.default_rng(stream_seed(args.seed, Stream.EXPLORATION))
        self.td_loss = torch.compile(td_loss) if args.compile else td_loss
        self.totals = torch.zeros(3, device=device)  # of td_loss, q_values and finite losses, until they are logged
        self.initial_norms: dict[str, float] = {}  # of every live module when it was drawn
        self.num_interventions = 0
        self._begin()

    def _begin(self) -> None:
        """To be called when the head that learns is new."""
        for name, module in self.q_network.live().items():
            self.initial_norms.setdefault(name, joint_norm(module.parameters()).item())
        self.norm_at_begin = self.learning_norm()
        self._renew()

    def learning_norm(self) -> float:
        """‖w‖ of the encoder and the head that learns, together."""
        network = self.q_network
        head = network.get_submodule(network.newest_head())
        return joint_norm([*network.encoder.parameters(), *head.parameters()]).item()

    def norm_growth(self) -> float:
        """That norm as a multiple of what it was when this head began to learn: the adaptive criterion (paper, appendix)."""
        return self.learning_norm() / self.norm_at_begin

    def _renew(self) -> None:
        """To be called whenever the networks or the optimizer's state are not what they were made of."""
        self.graphs: dict[Any, Callable] = {}
        self.online, self.target = self.q_network, self.target_network
        if self.args.bf16:
            self.online, self.target = self.q_network.in_bfloat16(), self.target_network.in_bfloat16()

    def act(self, obs: np.ndarray, epsilon: float) -> np.ndarray:
        """ε-greedy actions (N,) int64 for obs (N, 4, 84, 84) uint8."""

        def greedy(obs: np.ndarray) -> torch.Tensor:
            return self._run("act", functools.partial(greedy_actions, self.online), upload(obs, self.device))

        return epsilon_greedy(greedy, self.num_actions, obs, epsilon, self.rng)

    def update(self, batch: ReplayBufferSamples, count: int = 1) -> dict[str, torch.Tensor]:
        """`count` gradient steps, each on its share of the batch, one after the other.

        Returns:
            0-d tensors of the last one, left on the device: "td_loss", and "q_values", its share's mean Q
        """
        tensors = (tensor for tensor in batch if tensor is not None)  # Stable-Baselines3's n-step discounts are
        return self._run(("update", count), functools.partial(self._update, count), *tensors)

    def _update(self, count: int, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        trained, working = ([p for p in net.parameters() if p.requires_grad] for net in (self.q_network, self.online))
        for share in zip(*(tensor.chunk(count) for tensor in batch), strict=True):
            loss, q_values = self.td_loss(self.online, self.target, ReplayBufferSamples(*share), self.args.gamma)
            self.online.zero_grad(set_to_none=True)
            loss.backward()
            if self.args.bf16:
                for parameter in trained:
                    if parameter.grad is None:  # once, then kept: new memory for every update costs a tenth of its time
                        parameter.grad = torch.empty_like(parameter)
                torch._foreach_copy_([p.grad for p in trained], [p.grad for p in working])
            self.optimizer.step()
            loss = loss.detach()
            with torch.no_grad():
                if self.args.bf16:
                    torch._foreach_copy_(working, trained)
                self.totals += torch.stack((loss, q_values, loss.isfinite()))
        return {"td_loss": loss, "q_values": q_values}

    def _run(self, name: Any, function: Callable, *inputs: torch.Tensor) -> Any:
        """function(*inputs); with `cuda_graphs` through a graph, whose output is overwritten by the next call."""
        if not self.args.cuda_graphs:
            return function(*inputs)
        key = (name, *(given.shape for given in inputs))
        if key not in self.graphs:
            self.graphs[key] = self._capture(function, [given.clone() for given in inputs])
        return self.graphs[key](*inputs)

    def _capture(self, function: Callable, inputs: list[torch.Tensor]) -> Callable:
        """`function` as one CUDA graph. It has to run a few times before, which trains, so that is undone."""

        def state() -> list[torch.Tensor]:
            moments = (value for of_one in self.optimizer.state.values() for value in of_one.values())
            return [*self.q_network.parameters(), *self.online.parameters(), self.totals, *moments]

        before = {tensor: tensor.detach().clone() for tensor in state()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor in state():  # moments that are new began at zero
                tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(*inputs)

        def replay(*given: torch.Tensor) -> Any:
            for own, new in zip(inputs, given, strict=True):
                own.copy_(new)
            graph.replay()
            return outputs

        return replay

    @torch.no_grad()
    def sync_target(self) -> None:
        """target ← τ·online + (1 − τ)·target."""
        online, target = list(self.q_network.parameters()), list(self.target_network.parameters())
        if self.args.tau == 1:
            torch._foreach_copy_(target, online)
        else:
            torch._foreach_lerp_(target, online, self.args.tau)
        if self.args.bf16:
            torch._foreach_copy_(list(self.target.parameters()), target)

    def intervene(self) -> None:
        """Does what `args.intervention` names. What is drawn depends on the seed and the number of interventions before."""
        {"injection": self.inject, "reset-head": self.reset_head, "shrink-perturb": self.shrink_perturb}[
            self.args.intervention
        ]()

    def inject(self) -> None:
        """Injects plasticity into the online network and mirrors it in the target network.

        The encoder keeps its moments. The new head, which has had no gradient yet, starts without any, or with a copy of
        those of the head that learned before; with "reset" that one loses its own (paper, Fig. 9).
        """
        network, moments = self.q_network, self.optimizer.state
        before = network.get_submodule(network.newest_head())
        network.inject(self._generator())
        if self.args.injection_optimizer_state == "copy":
            for new, old in zip(network.get_submodule(network.newest_head()).parameters(), before.parameters(), strict=True):
                if old in moments:
                    moments[new] = copy.deepcopy(moments[old])
        if self.args.injection_optimizer_state == "reset":
            self._forget_moments(*(module for name, module in network.live().items() if name != "encoder"))
        self._intervened()

    def reset_head(self) -> None:
        """Draws the learning head's two layers anew, without moments, and mirrors them (Nikishin et al. 2022)."""
        name = self.q_network.newest_head()
        head = self.q_network.get_submodule(name)
        redraw(head, self._generator())
        self._forget_moments(head)
        del self.initial_norms[name]
        self._intervened()

    def shrink_perturb(self) -> None:
        """encoder ← factor · encoder + (1 − factor) · new, its moments stay (Ash & Adams 2020); and `reset_head`, as D'Oro
        et al. (2023) combine them."""
        generator = self._generator(Stream.PERTURBATION)
        redraw(self.q_network.encoder, generator, keep=self.args.shrink_factor)
        self.reset_head()

    def _generator(self, stream: Stream = Stream.INJECTION) -> torch.Generator:
        return torch.Generator().manual_seed(stream_seed(self.args.seed, stream, self.num_interventions))

    def _forget_moments(self, *modules: nn.Module) -> None:
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            self.optimizer.state.pop(parameter, None)

    def _intervened(self) -> None:
        self.target_network.load_state_dict(self.q_network.state_dict())
        self.target_network.requires_grad_(False)
        self.num_interventions += 1
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """Both networks with their numbers of live heads, the optimizer's moments by parameter name, the stream's state."""
        names = [name for name, _ in self.q_network.named_parameters()]
        return {
            "q_network": self.q_network.state_dict(),
            "target_network": self.target_network.state_dict(),
            "optimizer": {names[i]: moments for i, moments in self.optimizer.state_dict()["state"].items()},
            "totals": self.totals,
            "initial_norms": self.initial_norms,
            "norm_at_begin": self.norm_at_begin,
            "num_interventions": self.num_interventions,
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state, also one with more or fewer pairs of heads that were not injected yet: those are zero."""
        for network, saved in ((self.q_network, state["q_network"]), (self.target_network, state["target_network"])):
            pairs = {n: torch.zeros_like(value) for n, value in network.state_dict().items() if n.startswith("theta_prime_")}
            saved = {n: value for n, value in saved.items() if n in pairs or not n.startswith("theta_prime_")}
            network.load_state_dict(pairs | saved)
        self.target_network.requires_grad_(False)
        moments, optimizer = state["optimizer"], self.optimizer.state_dict()
        names = [name for name, _ in self.q_network.named_parameters()]
        optimizer["state"] = {i: copy.deepcopy(moments[name]) for i, name in enumerate(names) if name in moments}
        self.optimizer.load_state_dict(optimizer)
        self.totals.copy_(state["totals"])
        self.initial_norms, self.norm_at_begin = dict(state["initial_norms"]), state["norm_at_begin"]
        self.num_interventions = state["num_interventions"]
        self._renew()
        self.rng.bit_generator.state = state["rng"]


def dormant_units(activations: torch.Tensor, tau: float = 0.025) -> torch.Tensor:
    """Which units of a layer are dormant (Sokar et al. 2023): E|h_i| at most τ times its mean over the layer's units.

    Args:
        activations: (B, units), or (B, channels, H, W), where a channel is a unit, averaged over batch and space

    Returns:
        (units,) float32 of 1 and 0; all NaN where no unit of the layer is ever active, because the score is 0 / 0
    """
    sizes = activations.abs().transpose(0, 1).flatten(start_dim=1).mean(dim=1)  # (units,)
    scores = sizes / sizes.mean()
    return (scores <= tau).float().where(scores.isfinite(), math.nan)


def active_fraction(activations: torch.Tensor) -> torch.Tensor:
    """1 − mean(h = 0), 0-d, of activations of any shape; NaN where they are not finite."""
    return (activations != 0).float().where(activations.isfinite(), math.nan).mean()


def singular_values(features: torch.Tensor) -> torch.Tensor:
    """(min(B, d),) float64 in descending order, of features (B, d); all NaN where features are not finite or all 0."""
    if not features.isfinite().all() or not features.any():
        return torch.full((min(features.shape),), math.nan, dtype=torch.float64, device=features.device)
    return torch.linalg.svdvals(features.double())


def srank(sigma: torch.Tensor, delta: float = 0.01) -> float:
    """The number of largest singular values, of all given (r,), that make up 1 − δ of their sum (Kumar et al. 2021)."""
    if not sigma.sum() > 0:
        return math.nan
    return 1 + int((sigma.cumsum(0) < (1 - delta) * sigma.sum()).sum())


def effective_rank(sigma: torch.Tensor) -> float:
    """exp(−Σ p ln p) with p = σ / Σσ, of singular values (r,) (Roy & Vetterli 2007); NaN where they are NaN or all 0."""
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item()


def share_of_q(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """E|new| / (E|old| + E|new|), 0-d: how much of Q = old + new, both (B, num_actions), the second part contributes."""
    return new.abs().mean() / (old.abs().mean() + new.abs().mean())


def plasticity_measures(learner: Learner, batch: ReplayBufferSamples) -> dict[str, float]:
    """The state of a learner's online network, in float32, on one batch; see the README for what each name means.

    `head` is the newest head, the one that learns; other live heads have the names of their modules. A measure that is
    undefined is NaN. Nothing in the learner changes.
    """
    network, newest = learner.q_network, learner.q_network.newest_head()
    layers: dict[str, torch.Tensor] = {}

    def label(module: str) -> str:
        return "head" if module == newest else module.replace(".", "_")

    def watch(name: str, relu: nn.Module) -> Any:
        return relu.register_forward_hook(lambda _, __, output: layers.update({name: output}))

    names = {"encoder.1": "conv1", "encoder.3": "conv2", "encoder.5": "conv3"}
    names |= {f"{head}.1": label(head) for head in network.live() if head != "encoder"}
    hooks = [watch(name, network.get_submodule(path)) for path, name in names.items()]
    with torch.no_grad():
        q_values = network(batch.observations)
    for hook in hooks:
        hook.remove()

    measures: dict[str, Any] = {}
    dormant = {name: dormant_units(layer) for name, layer in layers.items()}
    learning = ("conv1", "conv2", "conv3", "head")
    measures["dormant_fraction"] = torch.cat([dormant[name] for name in learning]).mean()
    measures["active_fraction"] = active_fraction(torch.cat([layers[name].flatten() for name in learning]))
    for name, layer in layers.items():
        measures[f"dormant_fraction/{name}"] = dormant[name].mean()
        measures[f"active_fraction/{name}"] = active_fraction(layer)
    for name, features in (("encoder", layers["conv3"].flatten(start_dim=1)), ("head", layers["head"])):
        sigma = singular_values(features)
        measures |= {f"srank/{name}": srank(sigma), f"effective_rank/{name}": effective_rank(sigma)}

    loss, _ = td_loss(network, learner.target_network, batch, learner.args.gamma)
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    for module, parameters in network.live().items():
        norm = joint_norm(parameters.parameters()).detach()
        measures[f"weight_norm/{label(module)}"] = norm
        measures[f"weight_norm_ratio/{label(module)}"] = norm / learner.initial_norms[module]
        if own := [gradient for name, gradient in gradients.items() if name.startswith(f"{module}.")]:
            measures[f"gradient_norm/{label(module)}"] = joint_norm(own)
    if network.num_injections:
        old = network.theta[-1](layers["theta"]).detach()
        measures["new_heads_share_of_q"] = share_of_q(old, q_values - old)
    return {name: float(value) for name, value in measures.items()}


def open_film(path: Path, width: int, height: int) -> cv2.VideoWriter:
    """A writer of an mp4 (VP9, which browsers play) with one picture per step, in the game's own time.

    Raises:
        UsageError: this build of OpenCV has no such encoder.
    """
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"vp09"), 60 / FRAME_SKIP, (width, height))
    if not film.isOpened():
        raise UsageError("OpenCV cannot write VP9 video here: pip install opencv-python-headless, or leave out --capture-video")
    return film


def evaluate(
    q_network: QNetwork, args: Args, key: int, video: Path | None = None, stop: Callable[[], bool] = lambda: False
) -> np.ndarray:
    """Raw scores of whole games, (eval_episodes,) float64, one per parallel environment, so that none is favoured; or with
    `eval_steps` those of one environment's games that end within so many steps, or else of the first (DQN Zoo).

    Environments and random numbers are its own, from (seed, key): evaluating changes nothing in training.
    The first game is filmed to `video`. Once `stop` returns True, what is not over is left at NaN.
    """
    seed = stream_seed(args.seed, Stream.EVALUATION, key)
    rng = np.random.default_rng(seed)
    device = q_network.theta[-1].weight.device
    games: list[list[float]] = [[] for _ in range(max(1, args.eval_episodes))]  # scores, per environment
    played = 0

    def over() -> bool:
        return all(games) and played >= args.eval_steps

    def greedy(obs: np.ndarray) -> torch.Tensor:
        return greedy_actions(q_network, upload(obs, device))

    with contextlib.ExitStack() as stack:
        envs = make_envs(args, len(games), render_mode="rgb_array" if video else None)
        stack.callback(envs.close)
        obs, _ = envs.reset(seed=seed)
        if video:
            video.parent.mkdir(parents=True, exist_ok=True)
            height, width, _ = envs.render()[0].shape
            film = open_film(video, width, height)
            stack.callback(film.release)
        while not over() and not stop():
            if video and not games[0]:
                film.write(np.ascontiguousarray(envs.render()[0][..., ::-1]))  # OpenCV's order is BGR
            actions = epsilon_greedy(greedy, envs.single_action_space.n, obs, args.eval_epsilon, rng)
            obs, _, _, _, infos = envs.step(actions)
            played += 1
            for i in np.flatnonzero(infos.get("_episode", ())):
                games[i].append(float(infos["episode"]["r"][i]))
    if args.eval_steps:
        return np.array(games[0] if over() else [np.nan])
    return np.array([scores[0] if scores else np.nan for scores in games])


def save_agent(path: Path, q_network: QNetwork, args: Args, step: int) -> None:
    """Writes what `load_agent` reads: the online network and the arguments it was trained with."""
    saved = io.BytesIO()  # writing to `path` itself, PyTorch would turn a full disk into a RuntimeError
    torch.save({"q_network": q_network.state_dict(), "args": asdict(args), "step": step}, saved)
    path.write_bytes(saved.getbuffer())


@contextlib.contextmanager
def reading(path: Path, kind: str, fix: str) -> Iterator[None]:
    """Turns all that a foreign or damaged file makes its reader stumble over into a UsageError of one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UsageError(f"{path} cannot be read as {kind} ({type(error).__name__}: {reason}): {fix}") from error


def load_agent(path: Path, device: torch.device | str) -> tuple[QNetwork, Args, int]:
    """The network, arguments and step of a saved agent. Runs no code from the file.

    Raises:
        UsageError: `path` is not an agent that `save_agent` wrote.
    """
    with reading(path, "an agent", "give an agent.pt from --save-model"):
        saved = torch.load(path, map_location=device, weights_only=True)
        args = Args(**saved["args"])
        q_network = make_q_network(args, len(saved["q_network"]["theta.2.weight"]), device)
        q_network.load_state_dict(saved["q_network"])
        step = int(saved["step"])
    return q_network, args, step


def evaluate_saved(args: Args) -> np.ndarray:
    """Plays with the agent in `args.evaluate`, prints and returns its scores (eval_episodes,) float64.

    Raises:
        UsageError: the file holds no agent, or --env-id asks for another game than the agent's.
    """
    path = Path(args.evaluate)
    path = path / "agent.pt" if path.is_dir() else path
    q_network, trained, step = load_agent(path, pick_device(args))
    if args.env_id not in (trained.env_id, Args.env_id):
        raise UsageError(f"the agent in {path} plays {trained.env_id}, not {args.env_id}: leave out --env-id")
    own = ("seed", "cuda", "capture_video", "eval_episodes", "eval_steps", "eval_epsilon", "evaluate")
    settings = replace(trained, fork=None, **{name: getattr(args, name) for name in own})
    video = path.parent / "videos" / f"evaluate-seed-{args.seed}.mp4" if args.capture_video else None
    scores = evaluate(q_network, settings, step, video)
    print(f"{trained.env_id}, agent at step {step:,}, ε {settings.eval_epsilon:g}: scores of {len(scores)} games")
    print(" ".join(f"{score:g}" for score in scores))
    print(f"mean {scores.mean():.1f}, standard deviation {scores.std():.1f}, min {scores.min():g}, max {scores.max():g}")
    return scores


def exploration_epsilon(args: Args, step: int) -> float:
    """ε at `step`: start_e until exploration_start, from there linear to end_e over exploration_fraction of the run."""
    duration, since = args.exploration_fraction * args.total_timesteps, step - args.exploration_start
    progress = min(max(since / duration, 0.0), 1.0) if duration else float(since >= 0)
    return args.start_e + progress * (args.end_e - args.start_e)


def record_spans(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of every content in a TFRecord file, which is length (8 bytes), its checksum (4), content, its checksum
    (4), and so on. The last may reach beyond `data`, where it is just being written."""
    start = 12
    while start <= len(data):
        end = start + int.from_bytes(data[start - 12 : start - 4], "little")
        yield start, end
        start = end + 16


def without_hparams(events: bytes) -> bytes:
    """The records of an event file but for HPARAMS, of which TensorBoard shows a run's first, not its last."""
    spans = (slice(start - 12, end + 4) for start, end in record_spans(events))
    return b"".join(events[span] for span in spans if b"_hparams_/" not in events[span])


class EventFile:
    """A TensorBoard event file that can be taken up again, and that a full disk does not break.

    All its events are in memory as well (60 bytes a point), so that a checkpoint can hold them, and what could not be
    written is written at the next `flush`.

    Args:
        folder: where the file goes
        events: how it begins: the events of an earlier part of the run. The folder's other event files are then emptied
    """

    def __init__(self, folder: Path, events: bytes = b""):
        # sorts after the file of a SummaryWriter, which --track leaves here: readers go from one to the next
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.1"
        self.path, self.written = folder / name, 0
        self.memory = io.BytesIO()
        self.records = RecordWriter(self.memory)
        if events:
            self.memory.write(events)
            older = set(folder.glob("events.out.tfevents.*")) - {self.path}
            self.path.unlink(missing_ok=True)
            self.flush()
            for path in older:
                os.truncate(path, 0)  # were it removed, a TensorBoard that is reading it would never go on to this one
        else:
            # the second record makes a TensorBoard that is open on this folder forget what it has read before
            self._add(file_version="brain.Event:2")
            self._add(session_log=SessionLog(status=SessionLog.START), step=0)

    def _add(self, **event: Any) -> None:
        self.records.write(Event(wall_time=time.time(), **event).SerializeToString())

    def add(self, content: Summary, step: int) -> None:
        self._add(summary=content, step=step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.add(summary.scalar(tag, value), step)

    def flush(self) -> None:
        """Appends to the file what is not in it yet.

        Raises:
            OSError: it cannot be written; the next call tries again.
        """
        with open(self.path, "ab") as file:
            self.written = min(self.written, file.tell())  # less than before where someone deleted the file
            file.truncate(self.written)  # what an earlier attempt wrote in part
            file.write(self.memory.getbuffer()[self.written :])
        self.written = self.memory.tell()


class RunLog:
    """What a run says: TensorBoard curves, the progress bar, lines on the terminal.

    Args:
        args: of the run
        folder: of the run
        events, step: the curves so far and their length, of a run that goes on
    """

    PLAIN_LINE_SECONDS = 30
    FLUSH_SECONDS = 10
    SIDE_BY_SIDE = {  # noqa: RUF012, never changed
        "return of training games": "charts/episodic_return",
        "return of evaluation games": "eval/episodic_return",
        "dormant fraction": "plasticity/dormant_fraction",
        "active fraction": "plasticity/active_fraction",
        "srank of the encoder's features": "plasticity/srank/encoder",
        "srank of the learning head's features": "plasticity/srank/head",
        "encoder's weight norm ÷ initial": "plasticity/weight_norm_ratio/encoder",
        "learning head's weight norm ÷ initial": "plasticity/weight_norm_ratio/head",
        "encoder's gradient norm": "plasticity/gradient_norm/encoder",
        "new heads' share of Q": "plasticity/new_heads_share_of_q",
    }

    def __init__(self, args: Args, folder: Path, events: bytes = b"", step: int = 0):
        self.args = args
        self.writer = EventFile(folder, events)
        silent = not sys.stderr.isatty()
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", dynamic_ncols=True, disable=silent)
        self.returns: deque[float] = deque(maxlen=100)
        self.first_update, self.num_updates = 0, 0  # since the last interval
        self.start = self.interval_start = self.last_line = self.last_flush = time.perf_counter()
        self.interval_step = 0
        self.disk_full = False

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        return {
            "returns": list(self.returns),
            "first_update": self.first_update,
            "num_updates": self.num_updates,
            "interval_step": self.interval_step,
            "interval_seconds": now - self.interval_start,
            "seconds": now - self.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.returns.extend(state["returns"])
        self.first_update, self.num_updates = state["first_update"], state["num_updates"]
        self.interval_step = state["interval_step"]
        now = time.perf_counter()
        self.start, self.interval_start = now - state["seconds"], now - state["interval_seconds"]

    def hyperparameters(self, step: int) -> None:
        """Writes the arguments, as a text and for TensorBoard's HPARAMS, and what its CUSTOM SCALARS show."""
        args = asdict(self.args)
        table = "\n".join(f"|{name}|{value}|" for name, value in args.items())
        self.writer.add(summary.text("hyperparameters", f"|param|value|\n|-|-|\n{table}"), step)
        plain = {name: value if type(value) in (int, float) else str(value) for name, value in args.items()}
        for content in summary.hparams(plain, dict.fromkeys(("charts/episodic_return", "eval/episodic_return"))):
            self.writer.add(content, step)
        shown = {title: tag for title, tag in self.SIDE_BY_SIDE.items() if self.args.eval_frequency or "eval" not in tag}
        charts = {title: ["Multiline", [f"^{tag}$"]] for title, tag in shown.items()}
        self.writer.add(summary.custom_scalars({"return and plasticity": charts}), step)

    def games(self, infos: dict[str, Any], step: int) -> None:
        """Logs the games that ended at `step`."""
        for i in np.flatnonzero(infos.get("_episode", ())):
            self.returns.append(float(infos["episode"]["r"][i]))
            self.writer.add_scalar("charts/episodic_return", self.returns[-1], step)
            self.writer.add_scalar("charts/episodic_length", int(infos["episode"]["l"][i]), step)

    def updates(self, first: int, count: int) -> None:
        """Takes note of `count` updates, of which the first fell due at step `first`."""
        if self.num_updates == 0:
            self.first_update = first
        self.num_updates += count

    def check_finite(self, num_finite: int) -> None:
        """Compares the number of finite losses since the last interval with that of updates.

        Raises:
            FloatingPointError: one was not.
        """
        if num_finite < self.num_updates:
            # once a loss is not finite, neither are the parameters, nor any later loss
            step = self.first_update + num_finite * self.args.train_frequency
            raise FloatingPointError(f"td_loss is not finite from step {step}: lower --learning-rate")

    def interval(self, step: int, totals: torch.Tensor) -> None:
        """Logs ε, speed and mean losses since the last call, and sets these `totals` of the learner to zero.

        Raises:
            FloatingPointError: a loss was not finite.
        """
        now, epsilon = time.perf_counter(), exploration_epsilon(self.args, step)
        recent = (step - self.interval_step) / (now - self.interval_start)
        self.writer.add_scalar("charts/epsilon", epsilon, step)
        self.writer.add_scalar("charts/SPS", int(step / (now - self.start)), step)
        self.writer.add_scalar("charts/SPS_recent", recent, step)
        if self.num_updates:
            td_loss, q_values, num_finite = totals.tolist()
            self.writer.add_scalar("losses/td_loss", td_loss / self.num_updates, step)
            self.writer.add_scalar("losses/q_values", q_values / self.num_updates, step)
            self.check_finite(int(num_finite))
            totals.zero_()
        total = self.args.total_timesteps
        score = f"{np.mean(self.returns):,.0f}" if self.returns else "-"
        self.bar.set_postfix_str(f"{recent:,.0f} SPS, ε {epsilon:.2f}, return {score}", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (now - self.last_line > self.PLAIN_LINE_SECONDS or step == total):
            left = tqdm.format_interval((total - step) / recent)
            self.say(f"step {step:,} of {total:,}, {recent:,.0f} SPS, {left} left, ε {epsilon:.2f}, return {score}")
            self.last_line = now
        if now - self.last_flush > self.FLUSH_SECONDS:
            self.flush()
        self.first_update, self.num_updates = 0, 0
        self.interval_start, self.interval_step = now, step

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what happens in this block out of the recent speed and the time left."""
        start = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - start

    def evaluation(self, scores: np.ndarray, step: int) -> None:
        """Logs the mean of one evaluation's scores."""
        self.writer.add_scalar("eval/episodic_return", scores.mean(), step)
        self.say(f"step {step:,}: mean score of {len(scores)} evaluation games {scores.mean():,.1f}")

    def flush(self) -> None:
        """Writes the curves to the disk. A full one is reported once; the points are kept until it has room again."""
        self.last_flush = time.perf_counter()
        try:
            self.writer.flush()
            self.disk_full = False
        except OSError as error:
            if not self.disk_full:
                self.say(f"warning: the curves cannot be written for now ({error}): make room, training goes on")
            self.disk_full = True

    def say(self, line: str) -> None:
        """Prints a line without tearing the progress bar."""
        with contextlib.suppress(OSError):  # a log on a full disk, or a closed pipe, is no reason to stop training
            self.bar.write(line)
            sys.stdout.flush()

    def close(self) -> None:
        """Writes out the curves."""
        self.bar.close()
        self.flush()


def pick_device(args: Args) -> torch.device:
    """The GPU when there is one and --no-cuda was not given; also sets PyTorch's switches for determinism and precision.

    Raises:
        UsageError: the arguments ask for what this device cannot do.
    """
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda_graphs and device.type == "cpu":
        raise UsageError("--cuda-graphs needs a GPU, and this run is on the CPU: --no-cuda-graphs, with --fork if it has begun")
    if args.compile and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UsageError("--compile needs a C++ compiler on a CPU, and there is no g++: install it, or give --no-compile")
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    return device


def free_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: the machine's, or its control group's where that is less (Slurm, Docker)."""
    versions = {  # limit, usage, and what of the usage is file cache that the kernel gives back
        "": ("memory.max", "memory.current", "file"),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    }
    free = psutil.virtual_memory().available
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controller, name = line.split(":", 2)
        if controller in versions:
            limit, usage, cache = versions[controller]
            group = root / "sys/fs/cgroup" / controller / name.lstrip("/")
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError, KeyError):  # no control group, or "max": no limit
                    statistics = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                    used = int((folder / usage).read_text()) - int(statistics[cache])
                    free = min(free, int((folder / limit).read_text()) - used)
    return free


def check_resources(args: Args, observation_space: gym.spaces.Box, device: torch.device) -> torch.device:
    """Refuses what would end the run later. Returns where replay's frames go: with `cuda_graphs` to the GPU if they fit.

    Raises:
        UsageError: the replay does not fit in free memory, wandb is missing, or video cannot be written.
    """
    needed = FrameReplayBuffer.bytes_needed(args.buffer_size, observation_space, args.num_envs)
    for_learning = 2 * 10**9  # networks, moments, graphs and the libraries' workspaces take less
    on_gpu = args.cuda_graphs and torch.cuda.mem_get_info(device)[0] >= needed + for_learning
    free = free_memory()
    if needed > free and not on_gpu:
        raise UsageError(
            f"a replay of {args.buffer_size:,} steps needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory "
            f"are free: lower --buffer-size to {int(0.9 * args.buffer_size * free / needed)}"
        )
    wandb = importlib.util.find_spec("wandb")
    if args.track and (wandb is None or wandb.origin is None):  # a folder named wandb is found, without an origin
        raise UsageError("--track needs Weights & Biases, which is not installed: pip install wandb, or leave out --track")
    if args.capture_video:
        with tempfile.TemporaryDirectory() as folder:
            open_film(Path(folder) / "probe.mp4", FRAME_SIZE, FRAME_SIZE).release()
    return device if on_gpu else torch.device("cpu")


def flush_to_disk(path: Path) -> None:
    """Has the operating system write a file, or a folder's list of names, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def create_run_folder(args: Args, run_id: str) -> Path:
    """A new folder under `runs`, of this run alone, also when another starts in the same second.

    Its `run.json`, there as soon as the folder is, holds the arguments and the number that tells this run's checkpoints
    from another's.

    Raises:
        UsageError: it cannot be written.
    """
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
    folder, draft = Path("runs") / name, Path("runs") / f".{run_id}"
    try:
        draft.mkdir(parents=True)
        (draft / "run.json").write_text(json.dumps({"run": run_id, "args": asdict(args)}, indent=1) + "\n")
        flush_to_disk(draft / "run.json")
        for attempt in itertools.count(1):
            try:
                return draft.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                folder = folder.with_name(f"{name}-{attempt}")
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise UsageError(f"cannot write run folder {folder.absolute()} ({error.strerror}): start elsewhere") from None


def make_parts(args: Args, device: torch.device) -> tuple[LearnerView, Learner, FrameReplayBuffer]:
    """The environments, the learner and the replay of a new run.

    Raises:
        UsageError: see `make_envs` and `check_resources`.
    """
    envs = make_envs(args)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    storage = check_resources(args, obs_space, device)
    learner = Learner(args, int(action_space.n), device)
    rng = np.random.default_rng(stream_seed(args.seed, Stream.REPLAY))
    options = {"n_envs": args.num_envs, "generator": rng, "storage": storage}
    replay = FrameReplayBuffer(args.buffer_size, obs_space, action_space, device, **options)
    return envs, learner, replay


@dataclass
class Run:
    """A run in progress."""

    args: Args
    id: str  # drawn when the run began
    folder: Path
    envs: LearnerView
    learner: Learner
    replay: FrameReplayBuffer
    log: RunLog
    step: int = 0  # steps learned from
    played: int = 0  # steps decided on: with several environments more than learned from
    in_flight: bool = False  # the outcome of the last decision is not in replay yet
    saved: int | None = None  # step of the newest checkpoint
    interventions: list[int] = field(default_factory=list)  # their steps


CHECKPOINT_FORMAT = 4
CHECKPOINT_FILES = ("manifest.json", "state.pt", "replay.zst", "events")
CHECKSUMS = "SHA256SUMS"  # of those files, to be checked with `sha256sum -c` as well


def circumstances(device: torch.device) -> dict[str, str]:
    """What the bits of a run depend on besides its arguments."""
    modules = {"torch": torch, "numpy": np, "gymnasium": gym, "ale-py": ale_py, "stable-baselines3": stable_baselines3}
    versions = {name: module.__version__ for name, module in (*modules.items(), ("opencv", cv2))}
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    model = models[0] if models else platform.processor()
    cpu = f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "script": SCRIPT_VERSION,
        "python": platform.python_version(),
        **versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
    }


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """{step: path} of the checkpoints in a run's folder, good or not, newest first."""
    steps = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return dict(sorted(((int(step), path) for step, path in steps.items() if step.isdigit()), reverse=True))


def checksums(checkpoint: Path) -> str:
    """One line a file, in the form that `sha256sum` writes and checks."""
    lines = []
    for name in CHECKPOINT_FILES:
        with open(checkpoint / name, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def chunks(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The memory of contiguous tensors, one after the other, in views of 16 MB."""
    for tensor in tensors:
        yield from tensor.view(-1).view(torch.uint8).split(2**24)


def remove_leftovers(folder: Path) -> None:
    """Removes what an interrupted `save_checkpoint` left behind, as far as possible."""
    for leftover in folder.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def save_checkpoint(run: Run) -> Path:
    """Writes `checkpoint-{step}` into the run's folder, then removes older ones but for those at injection steps.

    It is written under another name, flushed to disk and renamed, so that a checkpoint is whole or not there.

    Raises:
        OSError, MemoryError, zstandard.ZstdError: it cannot be written; all that was there before still is.
    """
    final = run.folder / f"checkpoint-{run.step}"
    manifest = {"format": CHECKPOINT_FORMAT, "run": run.id, "step": run.step, "played": run.played}
    manifest |= {"in_flight": run.in_flight, "interventions": run.interventions}
    manifest |= {"args": asdict(run.args), "circumstances": circumstances(run.replay.device)}
    state = io.BytesIO()
    parts = {"envs": run.envs, "learner": run.learner, "replay": run.replay, "log": run.log}
    torch.save({name: part.state_dict() for name, part in parts.items()}, state)
    remove_leftovers(run.folder)
    partial = run.folder / f".{final.name}.partial"
    partial.mkdir()
    try:
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        (partial / "state.pt").write_bytes(state.getbuffer())
        (partial / "events").write_bytes(run.log.writer.memory.getbuffer())
        compressor = zstandard.ZstdCompressor(level=1, threads=torch.get_num_threads())
        with open(partial / "replay.zst", "wb") as file, compressor.stream_writer(file) as stream:
            for chunk in chunks(run.replay.tensors()):
                stream.write(chunk.cpu().numpy())
        (partial / CHECKSUMS).write_text(checksums(partial))
        for path in (*partial.iterdir(), partial):
            flush_to_disk(path)
        if final.exists():  # a damaged one, or the run would have gone on from it
            final.rename(run.folder / f".{final.name}.damaged")
        partial.rename(final)
        flush_to_disk(run.folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # the new one is safe: what cannot be removed now goes the next time
        for step, old in list_checkpoints(run.folder).items():
            if step < run.step and step not in (*run.args.injection_step, *run.interventions):
                old.rename(old.with_name(f".{old.name}.old"))
    remove_leftovers(run.folder)
    return final


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in memory but for its replay and curves."""

    path: Path
    args: Args
    manifest: dict[str, Any]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def restore(self, envs: LearnerView, learner: Learner, replay: FrameReplayBuffer) -> None:
        """Brings the parts of a new run into the state they were saved in.

        Raises:
            UsageError: the checkpoint does not fit them: another version of this script wrote it.
        """
        with reading(self.path, "this run's checkpoint", "move it away, and go on from another"):
            learner.load_state_dict(self.state["learner"])
            self.restore_replay(replay)
            envs.load_state_dict(self.state["envs"])

    def restore_replay(self, replay: FrameReplayBuffer) -> None:
        """Raises EOFError, zstandard.ZstdError or what loading another version's state does, where it does not fit."""
        replay.load_state_dict(self.state["replay"])
        with open(self.path / "replay.zst", "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            for chunk in chunks(replay.tensors()):
                content = torch.empty(len(chunk), dtype=torch.uint8)
                rest = memoryview(content.numpy())
                while rest:
                    if not (count := stream.readinto(rest)):
                        raise EOFError("its replay is too short")
                    rest = rest[count:]
                chunk.copy_(content)

    def differences(self, device: torch.device) -> str:
        """Which circumstances are not as they were when it was written, in words."""
        then, now = self.manifest["circumstances"], circumstances(device)
        return ", ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in now if now[name] != then.get(name))


def read_args(path: Path) -> tuple[Args, dict[str, Any]]:
    """The arguments in a `run.json` or `manifest.json`, and all that is in it.

    Raises:
        UsageError: it is not one, or its arguments are not this script's.
    """
    with reading(path, "a run's arguments", "give a run's folder to --resume, one of its checkpoints to --fork"):
        content = json.loads(path.read_text())
        return Args(**content["args"]), content


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint after checking every byte of it. Runs no code from it.

    Raises:
        UsageError: it is truncated, damaged, incomplete, or no checkpoint of this script; the message says which.
    """
    with reading(path, "a checkpoint", "take another"):
        recorded, found = (path / CHECKSUMS).read_bytes(), checksums(path).encode()
        if recorded != found:
            damaged = [line.split()[1].decode() for line in found.splitlines() if line not in recorded.splitlines()]
            raise ValueError(f"{' and '.join(damaged) or CHECKSUMS} is damaged, the checksum is another")
        args, manifest = read_args(path / "manifest.json")
        if manifest["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this script reads {CHECKPOINT_FORMAT}")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return Checkpoint(path, args, manifest, state)


FORKABLE = """exp_name cuda cuda_graphs compile track wandb_project_name wandb_entity capture_video save_model
total_timesteps exploration_fraction injection_step apply_injection freeze_heads injection_optimizer_state
injection_trigger injection_norm_ratio injection_check_frequency max_injections intervention shrink_factor
plasticity_frequency eval_frequency eval_episodes eval_steps eval_epsilon""".split()


def changed_flags(args: Args, saved: Args) -> list[str]:
    """Names of the arguments that are not as in `saved`, where a run comes from left out."""
    names = (knob.name for knob in fields(Args) if knob.name not in ("resume", "fork"))
    return [name for name in names if getattr(args, name) != getattr(saved, name)]


def check_fork(args: Args, origin: Checkpoint) -> None:
    """Refuses a fork that no single run in its arguments could have come to, so that its curves mean what they say.

    Raises:
        UsageError: see above; the message lists what may differ, or says what about it cannot.
    """
    saved, path, step, played = origin.args, origin.path, origin.step, origin.manifest["played"]
    if refused := [name for name in changed_flags(args, saved) if name not in FORKABLE]:
        values = ", ".join(f"{name} is {getattr(args, name)}, there {getattr(saved, name)}" for name in refused)
        raise UsageError(f"not as in checkpoint {path}: {values}; a fork may differ in {', '.join(FORKABLE)} only")
    saved_past = tuple(origin.manifest["interventions"])
    past = saved_past if args.injection_trigger == "norm" else tuple(k for k in args.injection_step if k < step)
    if args.applied_intervention == "none":
        past = ()
    if past != saved_past:
        raise UsageError(
            f"checkpoint {path} lies after injections at {saved_past or 'no step'}, but the arguments say {past or 'none'} "
            f"before step {step}: give an --injection-step of {step} or later, or an earlier checkpoint"
        )
    kinds = ("intervention", "freeze_heads", "injection_optimizer_state", "shrink_factor")
    if past and (other := [name for name in kinds if getattr(args, name) != getattr(saved, name)]):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in other)
        raise UsageError(f"checkpoint {path} lies after an injection: for another {flags} give an earlier checkpoint")
    changed = args.injection_trigger != saved.injection_trigger or args.max_injections != saved.max_injections
    if args.injection_trigger == "norm" and past and len(past) >= args.max_injections + (not changed):
        raise UsageError(
            f"checkpoint {path} lies after {len(past)} injections, and max_injections is {args.max_injections}: give a "
            f"--max-injections of {len(past) + 1} or more, or an earlier checkpoint"
        )
    if args.total_timesteps < max(step + 1, played):
        raise UsageError(f"checkpoint {path} lies at step {step}: give a --total-timesteps of {max(step + 1, played)} or more")
    if step == saved.total_timesteps and (step % saved.num_envs or step % saved.log_frequency):
        raise UsageError(
            f"checkpoint {path} ends a run whose length is no multiple of num_envs and log_frequency, so no longer run "
            "passes through it: give an earlier checkpoint"
        )
    duration, saved_duration = (a.exploration_fraction * a.total_timesteps for a in (args, saved))
    if step > 0 and not math.isclose(duration, saved_duration):
        raise UsageError(
            f"ε would fall over {duration:,.0f} steps, but before checkpoint {path} over {saved_duration:,.0f}: give "
            f"--exploration-fraction {saved_duration / args.total_timesteps} with this --total-timesteps"
        )


def check_resume(args: Args, saved: Args) -> None:
    """Refuses to resume with other arguments than the run's own.

    Raises:
        UsageError: see above.
    """
    if changed := changed_flags(args, saved):
        raise UsageError(f"--resume goes on as the run was, {', '.join(changed)} cannot change: leave out, or use --fork")


def newest_good_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of the run in `folder`; one that is damaged or another run's is named and passed over.

    None where the run was killed before its first one, and so before its first step.

    Raises:
        UsageError: there is no good one, and something to lose.
    """
    args, identity = read_args(folder / "run.json")
    paths = list_checkpoints(folder)
    begun = any(path.stat().st_size for path in folder.glob("events.out.tfevents.*"))
    if not paths and not begun and args.checkpoint_frequency:
        return None
    for step, path in paths.items():
        try:
            checkpoint = load_checkpoint(path)
            if checkpoint.manifest["run"] != identity["run"]:
                raise UsageError(f"{path} belongs to another run")
            if checkpoint.step != step:
                raise UsageError(f"{path} holds step {checkpoint.step}, it was renamed")
            return checkpoint
        except UsageError as error:
            print(f"warning: {error}; falling back to an older one", flush=True)
    found = "no good checkpoint" if paths else "no checkpoint"
    raise UsageError(f"{folder} holds {found} to go on from: start the run again without --resume")


def start_wandb(args: Args, folder: Path) -> None:
    """Mirrors to Weights & Biases everything that is written to TensorBoard from now on."""
    import wandb

    names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": folder.name}
    wandb.init(**names, config=asdict(args), sync_tensorboard=True, save_code=True)
    SummaryWriter(str(folder)).close()  # wandb takes note of where such a writer writes


class Signals:
    """Signals as requests to the training loop, for the time of a `with` block.

    SIGTERM and SIGINT ask it to stop, a second one ends the process with 128 + its number; SIGUSR1, which Slurm can send
    ahead of a time limit, asks for a checkpoint.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.checkpoint = False
        self.nothing_to_save = False  # while a checkpoint is loaded: the first signal ends the process then

    def __enter__(self) -> "Signals":
        wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
        self.previous = {number: signal.signal(number, self._note) for number in wanted if in_main}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if number == signal.SIGUSR1:
            self.checkpoint = True
        elif self.stop is None and not self.nothing_to_save:
            self.stop = signal.Signals(number)
        else:
            sys.exit(128 + number)


def lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Keeps other processes from running in `folder` until the stack unwinds, or this process ends in any other way.

    Raises:
        UsageError: another process holds it, or there is no such folder.
    """
    with reading(folder, "a run's folder", "give one to --resume"):
        descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another process is running {folder}: wait for it, or stop it first") from None
    except OSError:  # a file system without locks
        pass


def replayed(run: Run, stream: Stream, key: int) -> ReplayBufferSamples:
    """512 of the replayed transitions, drawn by a generator from (seed, stream, key): training's own does not move."""
    rng = np.random.default_rng(stream_seed(run.args.seed, stream, key))
    return run.replay.transitions(rng.integers(run.replay.size(), size=512), rng.integers(run.replay.n_envs, size=512))


def checks_norm(args: Args, step: int) -> bool:
    """Whether the adaptive criterion is looked at at this step."""
    return args.injection_trigger == "norm" and step % args.injection_check_frequency == 0


def intervention_due(run: Run) -> bool:
    """Whether `run.step` is one of --injection-step, or the norm has grown beyond --injection-norm-ratio."""
    args, learner = run.args, run.learner
    if args.applied_intervention == "none":
        return False
    if args.injection_trigger == "step":
        return run.step in args.injection_step
    possible = (
        0 < run.step < args.total_timesteps and len(run.interventions) < args.max_injections and checks_norm(args, run.step)
    )
    return possible and learner.norm_growth() > args.injection_norm_ratio


def intervene(run: Run) -> None:
    """Injects plasticity, or what else --intervention names, measures on replayed observations how far that changed Q (an
    injection: not at all), and logs both."""
    learner, log, step = run.learner, run.log, run.step
    obs = replayed(run, Stream.INJECTION, len(run.interventions)).observations
    with torch.no_grad():
        before = learner.online(obs)
        learner.intervene()
        delta = (learner.online(obs) - before).abs().max().item()
    run.interventions.append(step)
    log.writer.add_scalar("injection/step", step, step)
    log.writer.add_scalar("injection/max_abs_delta_q", delta, step)
    done = {
        "injection": "plasticity injected",
        "reset-head": "head drawn anew",
        "shrink-perturb": "encoder shrunk and perturbed, head drawn anew",
    }[run.args.intervention]
    log.say(f"step {step:,}: {done}, largest change of Q over {len(obs)} observations: {float(f'{delta:.4g}')}")


def measure(run: Run) -> None:
    """Logs the plasticity measures."""
    for name, value in plasticity_measures(run.learner, replayed(run, Stream.PLASTICITY, run.step)).items():
        run.log.writer.add_scalar(f"plasticity/{name}", value, run.step)


def decide(run: Run) -> None:
    """One decision in every environment. What comes of it is for `finish`."""
    run.envs.send(run.learner.act(run.envs.obs, exploration_epsilon(run.args, run.played)))
    run.played += run.args.num_envs
    run.in_flight = True


def finish(run: Run) -> None:
    """Puts what came of the last decision into replay, unless it is there."""
    if run.in_flight:
        _, rewards, terminations, truncations, infos = run.envs.receive()
        obs, actions = run.envs.decision
        cut = [{"TimeLimit.truncated": bool(truncated)} for truncated in truncations]
        run.replay.add(obs, infos["final_obs"], actions, rewards, terminations | truncations, cut)
        run.log.games(infos, min(run.played, run.args.total_timesteps))  # num_envs need not divide the run's length
        run.in_flight = False


def next_stop(run: Run) -> int:
    """The next step at which there is more to do than updates."""
    args, step = run.args, run.step
    periods = (args.target_network_frequency, args.log_frequency, args.plasticity_frequency)
    periods += (args.checkpoint_frequency, args.eval_frequency)
    periods += (args.injection_check_frequency,) if args.injection_trigger == "norm" else ()
    multiples = (step - step % period + period for period in periods if period)
    injections = (injection for injection in args.injection_step if injection > step)
    return min(run.played, args.total_timesteps, *multiples, *injections)


def learn(run: Run, stop: int) -> None:
    """All the updates that fall due after `run.step` and up to `stop`."""
    args, log = run.args, run.log
    done = max(run.step, args.learning_starts) // args.train_frequency
    count = stop // args.train_frequency - done
    if count > 0:
        run.learner.update(run.replay.sample(args.batch_size, batches=count), count)
        log.updates((done + 1) * args.train_frequency, count)


def after_step(run: Run) -> None:
    """What else is learned and logged at `run.step`."""
    args, step = run.args, run.step
    if step > args.learning_starts and step % args.target_network_frequency == 0:
        run.learner.sync_target()
    if step % args.log_frequency == 0 or step == args.total_timesteps:
        run.log.interval(step, run.learner.totals)
    if args.plasticity_frequency and step % args.plasticity_frequency == 0 and run.replay.size():
        measure(run)
    if checks_norm(args, step):
        run.log.writer.add_scalar("injection/norm_growth", run.learner.norm_growth(), step)


def advance(run: Run) -> None:
    """Plays and learns up to the next stop."""
    if run.step == run.played:
        decide(run)
    if not run.args.overlap or run.replay.size() == 0:
        finish(run)
    stop = next_stop(run)
    learn(run, stop)
    run.step = stop
    if stop in (run.played, run.args.total_timesteps):
        finish(run)
    after_step(run)


def attempt_checkpoint(run: Run, signals: Signals) -> None:
    """Writes a checkpoint and says so; where it cannot, says that instead and leaves the run as it is.

    Raises:
        FloatingPointError: a loss was not finite, so the checkpoint before is worth more.
        OSError: it cannot be written, and the run was asked to stop.
    """
    run.log.check_finite(int(run.learner.totals[2]))
    if signals.stop is not None:
        run.log.say(f"step {run.step:,}: {signals.stop.name}, writing a checkpoint; once more ends the run without it")
    start = time.perf_counter()
    try:
        with run.log.pause():
            path = save_checkpoint(run)
            size = sum(file.stat().st_size for file in path.iterdir())
    except (OSError, MemoryError, zstandard.ZstdError) as error:
        kept = f"checkpoint-{run.saved} is still good" if run.saved is not None else "there is none yet"
        if signals.stop is not None:
            raise OSError(f"stopped at step {run.step:,} without a checkpoint ({error}): {kept}") from error
        run.log.say(f"warning: no checkpoint at step {run.step:,} ({error}): make room, the run will try again; {kept}")
    else:
        run.saved = run.step
        run.log.say(f"step {run.step:,}: {path.name}, {size / 1e6:,.0f} MB in {time.perf_counter() - start:.1f} s")
    run.log.flush()


def attempt_evaluation(run: Run, signals: Signals) -> np.ndarray:
    """Scores of `evaluate`; some are NaN where a signal that needs an answer cut it short."""

    def stop() -> bool:
        return signals.stop is not None or (signals.checkpoint and run.saved != run.step)

    game = run.learner.q_network, run.args, run.step
    with run.log.pause():
        if run.args.capture_video:
            try:
                return evaluate(*game, run.folder / "videos" / f"step-{run.step}.mp4", stop)
            except (UsageError, OSError) as error:
                run.log.say(f"warning: no video at step {run.step:,} ({error})")
        return evaluate(*game, None, stop)


def training_loop(run: Run, signals: Signals) -> bool:
    """Plays and learns from `run.step` to `total_timesteps`, or until a signal. Returns whether the run is complete.

    Raises:
        FloatingPointError: a loss stopped being finite.
        OSError: the run was asked to stop and its checkpoint cannot be written.
    """
    args, log, first = run.args, run.log, run.step
    while True:
        step = run.step
        boundary = args.checkpoint_frequency > 0 and step % args.checkpoint_frequency == 0
        if step == 0 or boundary:
            # ALE's vectoriser cannot be saved, so games begin anew here, whether the run was resumed or not. Those that
            # this cuts bootstrap from their last frames, since no `done` was stored
            finish(run)
            run.envs.reset(seed=stream_seed(args.seed, Stream.ENVIRONMENTS, step))
        intervening = intervention_due(run)
        saves = boundary or intervening or step in (first, *args.injection_step, args.total_timesteps)
        due = args.checkpoint_frequency > 0 and saves
        if signals.checkpoint:
            signals.checkpoint, due = False, True
        if (due or signals.stop) and run.saved != step:
            attempt_checkpoint(run, signals)
        if signals.stop:
            return False
        if args.eval_frequency and step and step % args.eval_frequency == 0:
            scores = attempt_evaluation(run, signals)
            if np.isnan(scores).any():
                continue  # to the checkpoint that a signal asked for; the evaluation is repeated after it, or after --resume
            log.evaluation(scores, step)
        if intervening:
            intervene(run)
        if step == args.total_timesteps:
            return True
        advance(run)


def train(args: Args) -> Path:
    """One whole run, or what is left of it. Returns its folder: TensorBoard curves, checkpoints, what the flags ask for.

    Raises:
        UsageError: something in `args` cannot work on this machine; nothing was written.
        FloatingPointError: a loss stopped being finite.
        OSError: nothing can be written where the run should go.
    """
    origin = resumed = None
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        if args.resume is not None:
            resumed = Path(args.resume)
            lock(resumed, stack)
            saved, identity = read_args(resumed / "run.json")
            origin = newest_good_checkpoint(resumed)
            saved = saved if origin is None else origin.args  # of the two files, only checkpoints have checksums
            if args != Args(resume=args.resume):
                check_resume(args, saved)
            args = saved
        elif args.fork is not None:
            origin = load_checkpoint(Path(args.fork))
            check_fork(args, origin)
        device = pick_device(args)
        envs, learner, replay = make_parts(args, device)
        stack.callback(envs.close)
        events, step, run_id = b"", 0, secrets.token_hex(8)
        if origin is not None:
            if (count := len(origin.state["envs"]["actions"])) > 10_000:
                print(f"playing {count:,} decisions again, since the last multiple of --checkpoint-frequency", flush=True)
            signals.nothing_to_save = True
            origin.restore(envs, learner, replay)
            signals.nothing_to_save = False
            events, step = (origin.path / "events").read_bytes(), origin.step
        if resumed is None:
            events = without_hparams(events)  # its arguments are others
            folder = create_run_folder(args, run_id)
            lock(folder, stack)
        else:
            folder, run_id = resumed, identity["run"]
        if args.track:
            start_wandb(args, folder)
        log = stack.enter_context(contextlib.closing(RunLog(args, folder, events, step)))
        log.say(f"{args.env_id} × {args.num_envs} ({args.env_backend}) on {device}, curves in {folder}")
        continues = origin is not None and resumed is not None
        if not continues:
            log.hyperparameters(step)
        if origin is not None:
            log.load_state_dict(origin.state["log"])
            log.say(f"{'resumed' if continues else 'forked'} at step {step:,} from {origin.path}")
            if differences := origin.differences(device):
                log.say(f"warning: bits may differ from an uninterrupted run, because {differences}")
        run = Run(args, run_id, folder, envs, learner, replay, log, step, saved=step if continues else None)
        if origin is not None:
            run.played, run.in_flight = origin.manifest["played"], origin.manifest["in_flight"]
            run.interventions = origin.manifest["interventions"]
        del origin, events  # and with them a copy of every parameter
        baseline = args.applied_intervention == "none"
        if baseline or (args.injection_trigger == "step" and not args.injection_step):
            log.say("no plasticity injection in this run" + ": baseline arm" * baseline)
        if args.learning_starts >= args.total_timesteps:
            log.say(f"warning: nothing is learned, the run ends before --learning-starts {args.learning_starts}")
        command = f"python {os.path.relpath(__file__)}"
        if not training_loop(run, signals):
            done = f"stopped at step {run.step:,} of {args.total_timesteps:,}"
            log.say(f"{done}, go on with: {command} --resume {shlex.quote(str(folder))}")
            return folder
        if args.save_model:
            save_agent(folder / "agent.pt", learner.q_network, args, args.total_timesteps)
            log.say(f"agent saved, play with it: {command} --evaluate {shlex.quote(str(folder))}")
        log.flush()
        missing = ["last checkpoint"] * (args.checkpoint_frequency > 0 and run.saved != run.step) + ["curves"] * log.disk_full
        if missing:
            raise OSError(f"{folder} is complete but for its {' and '.join(missing)}: make room, and --resume it if you can")
    return folder


def flags_given() -> set[str]:
    """Names of the fields that the command line sets, also to what they were anyway."""
    words = (word.partition("=")[0][2:].replace("-", "_") for word in sys.argv[1:] if word.startswith("--"))
    return {word.removeprefix("no_") for word in words}


def preset_args(name: str) -> Args:
    """The command line of a new run, with a preset's values for flags that are not given."""
    preset = CommandLine(**PRESETS[name], preset=name)
    args = tyro.cli(CommandLine, description=__doc__, default=preset)
    if "exploration_fraction" in PRESETS[name].keys() - flags_given():  # ε falls over so many steps, however long the run is
        steps = preset.exploration_fraction * preset.total_timesteps
        args = replace(args, exploration_fraction=min(1.0, steps / max(1, args.total_timesteps)))
    return args.checked()


def fork_args(origin: Args) -> Args:
    """The command line of a fork. What it says of the intervention goes before what it takes over from `origin`."""
    args, given = tyro.cli(CommandLine, description=__doc__, default=CommandLine(**asdict(origin))), flags_given()
    if "intervention" in given and "apply_injection" not in given:
        args = replace(args, apply_injection=True)
    if "apply_injection" in given and "intervention" not in given:
        if args.apply_injection and args.intervention == "none":
            args = replace(args, intervention="injection")
        if not args.apply_injection and args.intervention != "injection":
            args = replace(args, intervention="none")
    inherited = {*args.passed_over(), *(["injection_step"] if args.injection_trigger == "norm" else [])} - given
    return replace(args, **{name: getattr(Args, name) for name in inherited}).checked()


def parse_args() -> Args:
    """The command line as `Args`; with --resume or --fork, flags that are not given are as in that run."""
    given = tyro.cli(CommandLine, description=__doc__)
    if {"intervention", "apply_injection"} <= flags_given() and given.apply_injection != (given.intervention != "none"):
        flag = "apply" if given.apply_injection else "no-apply"
        raise UsageError(f"--intervention {given.intervention} and --{flag}-injection contradict each other: give one of them")
    if given.resume is None and given.fork is None:
        return preset_args(given.preset)
    Args(resume=given.resume, fork=given.fork, evaluate=given.evaluate)  # one of them
    if given.preset != "default":
        raise UsageError("--preset is for a new run, and --resume and --fork have that run's settings: leave out --preset")
    path = Path(given.resume, "run.json") if given.resume is not None else Path(given.fork, "manifest.json")
    origin = replace(read_args(path)[0], resume=given.resume, fork=given.fork)
    if given.fork is not None:
        return fork_args(origin)
    check_resume(tyro.cli(CommandLine, description=__doc__, default=CommandLine(**asdict(origin))), origin)
    return Args(resume=given.resume)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # ε on a terminal or in a log that has no Greek
    try:
        args = parse_args()
        if args.evaluate is not None:
            evaluate_saved(args)
        else:
            train(args)
    except (UsageError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
