"""Double DQN with plasticity injection on Atari, in one file (Nikishin et al. 2023, arXiv 2305.15555).

    Q(s) = h_θ(φ(s)) + Σ_k [h_θ′₁ₖ(φ(s)) − h_θ′₂ₖ(φ(s))]

φ is the Nature CNN's convolutional encoder, h a head of two linear layers. Before an injection Q = h_θ. An injection
draws one fresh head, installs it twice (θ′₁ = θ′₂), and freezes θ and θ′₂: the output and the number of trainable
parameters stay as they were, and θ′₁ learns with the plasticity of a new head.

    python dqn_injection_atari.py --env-id PhoenixNoFrameskip-v4 --injection-step 5000000     # train, inject, log
    python dqn_injection_atari.py --env-id PhoenixNoFrameskip-v4 --injection-step 5000000 --no-apply-injection  # baseline
    tensorboard --logdir runs                                                                  # read the curves

Unit everywhere: 1 step = 1 decision of the agent in 1 environment = 4 emulator frames.
"""

import contextlib
import copy
import importlib.util
import itertools
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import FrameStackObservation, ReshapeObservation, TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, NoopResetEnv, WarpFrame
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner per emulator

FRAME_SKIP = 4  # emulator frames per step
FRAME_SIZE = 84  # pixels, both sides
STACK = 4  # frames per observation
MAX_NOOPS = 30


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

    learning_rate: float = 1e-4
    """Adam's step size; its eps is 1.5e-4 (cleanRL; paper: RMSProp, 2.5e-4)"""
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
    """share of total_timesteps over which ε falls from start_e to end_e (cleanRL)"""
    learning_starts: int = 80_000
    """steps of random and exploring play before the first update (paper: 50_000)"""
    train_frequency: int = 4
    """steps per update (DQN Zoo)"""

    log_frequency: int = 1_000
    """steps between points of the losses, speed and ε curves; losses are means over that interval (cleanRL: 100)"""
    eval_frequency: int = 0
    """steps between evaluations; 0 = none (DQN Zoo: 250_000)"""
    eval_episodes: int = 10
    """whole games per evaluation, played in parallel (cleanRL)"""
    eval_epsilon: float = 0.01
    """ε during evaluation (DQN Zoo double_q)"""
    evaluate: str | None = None
    """train nothing, but play --eval-episodes games with the agent that --save-model left in this run's folder and print
    the scores. Game and backend are the agent's own; seed, cuda, capture_video and the eval flags this command line's"""

    def __post_init__(self) -> None:
        steps = self.injection_step
        object.__setattr__(self, "injection_step", (steps,) if isinstance(steps, int | np.integer) else tuple(steps))
        sizes = ("num_envs", "total_timesteps", "buffer_size", "batch_size", "eval_episodes")
        for name in (*sizes, "target_network_frequency", "train_frequency"):
            self._require(name, lambda value: value >= 1, "at least 1")
        for name in ("seed", "learning_starts", "eval_frequency"):
            self._require(name, lambda value: value >= 0, "0 or more")
        for name in ("gamma", "start_e", "end_e", "exploration_fraction", "eval_epsilon"):
            self._require(name, lambda value: 0 <= value <= 1, "between 0 and 1")
        self._require("learning_rate", lambda value: 0 < value < float("inf"), "positive and finite")
        self._require("tau", lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._require("env_backend", lambda value: value in ("sb3", "ale"), "sb3 or ale")
        for name in ("buffer_size", "log_frequency"):
            self._require(name, lambda value: value >= self.num_envs, f"at least num_envs ({self.num_envs})")
        self._require(
            "injection_step",
            lambda steps: all(a < b for a, b in zip((0, *steps), (*steps, self.total_timesteps), strict=True)),
            f"increasing and within 1 ... {self.total_timesteps - 1}, before the run's end at --total-timesteps",
        )
        if self.capture_video and self.eval_frequency == 0 and self.evaluate is None:
            raise UsageError("capture_video films evaluation games and there are none: give --eval-frequency")

    def _require(self, name: str, holds: Callable[[Any], bool], rule: str) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise UsageError(f"{name} is {value}, but must be {rule}: change --{name.replace('_', '-')}")


class Stream(IntEnum):
    """The independent random streams of a run."""

    NETWORK = 0
    EXPLORATION = 1
    REPLAY = 2
    ENVIRONMENTS = 3
    INJECTION = 4
    EVALUATION = 5


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
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.obs, infos = self.env.reset(seed=seed, options=options)
        self.lives = infos["lives"]
        return self.obs, infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.obs, scores, terminations, truncations, infos = self.env.step(actions)
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
        envs = AtariVectorEnv(
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


class QNetwork(nn.Module):
    """Nature CNN (Mnih et al. 2015) whose head can be injected with plasticity `max_injections` times.

    Q = θ(φ) + Σ_k (θ′₁[k](φ) − θ′₂[k](φ)) over the injections made so far, each difference taken first: at injection
    it is exactly 0, where (θ(φ) + θ′₁(φ)) − θ′₂(φ) would be off by rounding. All heads exist from the start, so that
    an optimizer holds them all and a state dict has one shape; those not injected yet are zero and not evaluated.
    """

    def __init__(self, num_actions: int, max_injections: int = 1, freeze_heads: bool = True):
        super().__init__()

        def head() -> nn.Sequential:
            return nn.Sequential(nn.Linear(3136, 512), nn.ReLU(inplace=True), nn.Linear(512, num_actions))

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
        """φ: uint8 (B, 4, 84, 84) → float32 (B, 3136)."""
        return self.encoder(obs.to(torch.float32, copy=True).div_(255))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Q-values: uint8 (B, 4, 84, 84) → float32 (B, num_actions)."""
        features = self.features(obs)
        q_values = self.theta(features)
        for k in range(self.num_injections):
            q_values = q_values + (self.theta_prime_1[k](features) - self.theta_prime_2[k](features))
        return q_values

    @torch.no_grad()
    def inject(self, generator: torch.Generator | None = None) -> None:
        """Draws the next pair θ′₁ = θ′₂ from `generator`, makes it live, and freezes every head but that θ′₁.

        The draw is PyTorch's own default for linear layers, U(±1/√fan_in), so θ′ is distributed as θ was.

        Raises:
            ValueError: `max_injections` pairs are in use already.
        """
        k = self.num_injections
        if k == len(self.theta_prime_1):
            raise ValueError(f"all {k} pairs of heads are in use: build QNetwork with a larger max_injections")
        device = "cpu" if generator is None else generator.device
        for layer in self.theta_prime_1[k]:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                for parameter in layer.parameters():
                    parameter.copy_(torch.empty(parameter.shape, device=device).uniform_(-bound, bound, generator=generator))
        self.theta_prime_2[k].load_state_dict(self.theta_prime_1[k].state_dict())
        self.num_injections += 1
        self._set_trainable()

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
    q_network = QNetwork(num_actions, max(1, len(args.injection_step)), args.freeze_heads)
    return q_network.to(device, memory_format=torch.channels_last)


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
        self.frames = np.zeros((self.pool_size(buffer_size, n_envs, self.stack), *self.frame_shape), observation_space.dtype)
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

    def reset(self) -> None:
        """Forgets every transition."""
        super().reset()
        self._used = 1  # slots ever handed out; slot 0 stays all zero
        self._free: list[int] = []
        self._last_next_obs: np.ndarray | None = None
        self.slots[:] = 0

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
        for i in range(self.n_envs):
            if self._last_next_obs is not None and np.array_equal(obs[i], self._last_next_obs[i]):
                slots[i, :-1] = self.slots[self.pos - 1, i, 1:]
            else:
                slots[i, :-1] = [self._store(frame) for frame in obs[i]]
            slots[i, -1] = self._store(next_obs[i, -1])
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

    def _store(self, frame: np.ndarray) -> int:
        """Copies a frame into a free slot and returns its number."""
        if not frame.any():
            return 0
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._used = self._used, self._used + 1
            if slot == len(self.frames):  # many short games: more stack starts than the slack holds
                self.frames = np.concatenate([self.frames, np.zeros((slot // 4 + 1, *self.frame_shape), self.frames.dtype)])
        self.frames[slot] = frame
        return slot

    def sample(self, batch_size: int, env: None = None) -> ReplayBufferSamples:
        """A uniform batch, with replacement, on `device`, drawn from the buffer's own generator.

        Returns:
            observations, next_observations (B, S, H, W) uint8; actions (B, 1) int64; rewards, dones (B, 1) float32

        Raises:
            ValueError: `env` was given; what is stored is never normalised.
        """
        return self._get_samples(self.generator.integers(self.size(), size=batch_size), env)

    def _get_samples(self, batch_inds: np.ndarray, env: None = None) -> ReplayBufferSamples:
        if env is not None:
            raise ValueError("FrameReplayBuffer does not normalise: leave out env")
        return self.transitions(batch_inds, self.generator.integers(self.n_envs, size=len(batch_inds)))

    def transitions(self, rows: np.ndarray, columns: np.ndarray) -> ReplayBufferSamples:
        """The transitions at these rows of these environments, both (B,) int, in the form that `sample` returns."""
        stacks = torch.from_numpy(self.frames[self.slots[rows, columns]]).to(self.device)  # (B, S + 1, H, W)
        dones = self.dones[rows, columns] * (1 - self.timeouts[rows, columns])
        return ReplayBufferSamples(
            observations=stacks[:, :-1],
            actions=self.to_torch(self.actions[rows, columns]),
            next_observations=stacks[:, 1:],
            dones=self.to_torch(dones[:, None]),
            rewards=self.to_torch(self.rewards[rows, columns, None]),
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
    q_values = q_network(batch.observations).gather(1, batch.actions)  # (B, 1)
    return F.huber_loss(q_values, td_target), q_values.detach().mean()


@torch.no_grad()
def epsilon_greedy(q_network: QNetwork, obs: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Actions (N,) int64 for obs (N, 4, 84, 84) uint8. Takes the same numbers from `rng` whatever it decides."""
    explore = rng.random(len(obs)) < epsilon
    actions = rng.integers(q_network.theta[-1].out_features, size=len(obs))
    if not explore.all():
        device = q_network.theta[-1].weight.device
        greedy = q_network(torch.as_tensor(obs, device=device)).argmax(dim=1).cpu().numpy()
        actions = np.where(explore, actions, greedy)
    return actions


class Learner:
    """Owns the online and target networks, the optimizer and the exploration stream.

    Args:
        args: uses seed, injection_step (how many), freeze_heads, learning_rate, gamma, tau
        num_actions: size of the discrete action space
        device: of both networks
    """

    def __init__(self, args: Args, num_actions: int, device: torch.device | str):
        self.args = args
        torch.manual_seed(stream_seed(args.seed, Stream.NETWORK))
        self.q_network = make_q_network(args, num_actions, device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        # every head is in the optimizer from the start; it passes over parameters without a gradient
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), lr=args.learning_rate, eps=1.5e-4, fused=True)
        self.rng = np.random.default_rng(stream_seed(args.seed, Stream.EXPLORATION))

    def act(self, obs: np.ndarray, epsilon: float) -> np.ndarray:
        """ε-greedy actions (N,) int64 for obs (N, 4, 84, 84) uint8."""
        return epsilon_greedy(self.q_network, obs, epsilon, self.rng)

    def update(self, batch: ReplayBufferSamples) -> dict[str, torch.Tensor]:
        """One gradient step. Returns 0-d tensors, left on the device: "td_loss", and "q_values", the batch's mean Q."""
        loss, q_values = td_loss(self.q_network, self.target_network, batch, self.args.gamma)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"td_loss": loss.detach(), "q_values": q_values}

    @torch.no_grad()
    def sync_target(self) -> None:
        """target ← τ·online + (1 − τ)·target."""
        online, target = list(self.q_network.parameters()), list(self.target_network.parameters())
        if self.args.tau == 1:
            torch._foreach_copy_(target, online)
        else:
            torch._foreach_lerp_(target, online, self.args.tau)

    def inject(self) -> None:
        """Injects plasticity into the online network and mirrors it in the target network.

        The k-th θ′ depends on (seed, k) alone. The optimizer is left as it is: the encoder keeps its moments, and the
        new head, which has had no gradient yet, starts without any.
        """
        key = self.q_network.num_injections
        generator = torch.Generator().manual_seed(stream_seed(self.args.seed, Stream.INJECTION, key))
        self.q_network.inject(generator)
        self.target_network.load_state_dict(self.q_network.state_dict())
        self.target_network.requires_grad_(False)


def open_film(path: Path, width: int, height: int) -> cv2.VideoWriter:
    """A writer of an mp4 (VP9, which browsers play) with one picture per step, in the game's own time.

    Raises:
        UsageError: this build of OpenCV has no such encoder.
    """
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"vp09"), 60 / FRAME_SKIP, (width, height))
    if not film.isOpened():
        raise UsageError("OpenCV cannot write VP9 video here: pip install opencv-python-headless, or leave out --capture-video")
    return film


def evaluate(q_network: QNetwork, args: Args, key: int, video: Path | None = None) -> np.ndarray:
    """Raw scores (eval_episodes,) float64 of whole games, one per parallel environment, so that none is favoured.

    Environments and random numbers are its own, from (seed, key): evaluating changes nothing in training.
    The first game is filmed to `video`.
    """
    seed = stream_seed(args.seed, Stream.EVALUATION, key)
    rng = np.random.default_rng(seed)
    scores = np.full(args.eval_episodes, np.nan)
    with contextlib.ExitStack() as stack:
        envs = make_envs(args, args.eval_episodes, render_mode="rgb_array" if video else None)
        stack.callback(envs.close)
        obs, _ = envs.reset(seed=seed)
        if video:
            video.parent.mkdir(parents=True, exist_ok=True)
            height, width, _ = envs.render()[0].shape
            film = open_film(video, width, height)
            stack.callback(film.release)
        while np.isnan(scores).any():
            if video and np.isnan(scores[0]):
                film.write(np.ascontiguousarray(envs.render()[0][..., ::-1]))  # OpenCV's order is BGR
            obs, _, _, _, infos = envs.step(epsilon_greedy(q_network, obs, args.eval_epsilon, rng))
            if "episode" in infos:
                first = infos["_episode"] & np.isnan(scores)
                scores[first] = infos["episode"]["r"][first]
    return scores


def save_agent(path: Path, q_network: QNetwork, args: Args, step: int) -> None:
    """Writes what `load_agent` reads: the online network and the arguments it was trained with."""
    torch.save({"q_network": q_network.state_dict(), "args": asdict(args), "step": step}, path)


def load_agent(path: Path, device: torch.device | str) -> tuple[QNetwork, Args, int]:
    """The network, arguments and step of a saved agent. Runs no code from the file.

    Raises:
        UsageError: `path` is not an agent that `save_agent` wrote.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        args = Args(**saved["args"])
        q_network = make_q_network(args, len(saved["q_network"]["theta.2.bias"]), device)
        q_network.load_state_dict(saved["q_network"])
        step = int(saved["step"])
    except Exception as error:  # whatever a foreign or damaged file makes the loader stumble over
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(
            f"{path} cannot be read as an agent ({type(error).__name__}: {reason}): give an agent.pt from --save-model"
        ) from error
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
    own = ("seed", "cuda", "capture_video", "eval_episodes", "eval_epsilon", "evaluate")
    settings = replace(trained, **{name: getattr(args, name) for name in own})
    video = path.parent / "videos" / f"evaluate-seed-{args.seed}.mp4" if args.capture_video else None
    scores = evaluate(q_network, settings, step, video)
    print(f"{trained.env_id}, agent at step {step:,}, ε {settings.eval_epsilon:g}: scores of {len(scores)} games")
    print(" ".join(f"{score:g}" for score in scores))
    print(f"mean {scores.mean():.1f}, standard deviation {scores.std():.1f}, min {scores.min():g}, max {scores.max():g}")
    return scores


def exploration_epsilon(args: Args, step: int) -> float:
    """ε at `step`: linear from start_e to end_e over the first exploration_fraction of the run, then constant."""
    duration = args.exploration_fraction * args.total_timesteps
    progress = min(step / duration, 1.0) if duration else 1.0
    return args.start_e + progress * (args.end_e - args.start_e)


class RunLog:
    """What a run says: TensorBoard curves, the progress bar, lines on the terminal."""

    PLAIN_LINE_SECONDS = 30

    def __init__(self, args: Args, folder: Path):
        self.args, self.folder = args, folder
        self.writer = SummaryWriter(str(folder))
        table = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        self.bar = tqdm(total=args.total_timesteps, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self.returns: deque[float] = deque(maxlen=100)
        self._forget_losses()
        self.start = self.interval_start = self.last_line = time.perf_counter()
        self.interval_step = 0

    def games(self, infos: dict[str, Any], step: int) -> None:
        """Logs the games that ended at `step`."""
        for i in np.flatnonzero(infos.get("_episode", ())):
            self.returns.append(float(infos["episode"]["r"][i]))
            self.writer.add_scalar("charts/episodic_return", self.returns[-1], step)
            self.writer.add_scalar("charts/episodic_length", int(infos["episode"]["l"][i]), step)

    def _forget_losses(self) -> None:
        self.update_steps: list[int] = []
        self.sums: dict[str, torch.Tensor] = {}
        self.num_finite: torch.Tensor | int = 0

    def update(self, losses: dict[str, torch.Tensor], step: int) -> None:
        """Takes note of one update's losses without reading them off the device."""
        self.update_steps.append(step)
        self.sums = {name: self.sums.get(name, 0) + value for name, value in losses.items()}
        self.num_finite = self.num_finite + losses["td_loss"].isfinite()

    def interval(self, step: int) -> None:
        """Logs ε, speed and mean losses since the last call.

        Raises:
            FloatingPointError: a loss was not finite.
        """
        now, epsilon = time.perf_counter(), exploration_epsilon(self.args, step)
        recent = (step - self.interval_step) / (now - self.interval_start)
        self.writer.add_scalar("charts/epsilon", epsilon, step)
        self.writer.add_scalar("charts/SPS", int(step / (now - self.start)), step)
        self.writer.add_scalar("charts/SPS_recent", recent, step)
        for name, total in self.sums.items():
            self.writer.add_scalar(f"losses/{name}", float(total) / len(self.update_steps), step)
        num_finite = int(self.num_finite)
        if num_finite < len(self.update_steps):
            # once a loss is not finite, neither are the parameters, nor any later loss
            raise FloatingPointError(f"td_loss is not finite from step {self.update_steps[num_finite]}: lower --learning-rate")
        total = self.args.total_timesteps
        score = f"{np.mean(self.returns):,.0f}" if self.returns else "-"
        self.bar.set_postfix_str(f"{recent:,.0f} SPS, ε {epsilon:.2f}, return {score}", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (now - self.last_line > self.PLAIN_LINE_SECONDS or step == total):
            left = tqdm.format_interval((total - step) / recent)
            self.say(f"step {step:,} of {total:,}, {recent:,.0f} SPS, {left} left, ε {epsilon:.2f}, return {score}")
            self.last_line = now
        self._forget_losses()
        self.interval_start, self.interval_step = now, step

    def evaluation(self, scores: np.ndarray, step: int, seconds: float) -> None:
        """Logs the mean of one evaluation's scores; what it took is left out of the recent speed and the time left."""
        self.interval_start += seconds
        self.writer.add_scalar("eval/episodic_return", scores.mean(), step)
        self.say(f"step {step:,}: mean score of {len(scores)} evaluation games {scores.mean():,.1f}")

    def say(self, line: str) -> None:
        """Prints a line without tearing the progress bar."""
        self.bar.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        """Writes out what TensorBoard still holds in memory."""
        self.bar.close()
        self.writer.close()


def pick_device(args: Args) -> torch.device:
    """The GPU when there is one and --no-cuda was not given; also sets PyTorch's determinism switches."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    torch.set_flush_denormal(True)  # dead units leave denormal moments, which halve Adam's speed on a CPU
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


def check_resources(args: Args, observation_space: gym.spaces.Box) -> None:
    """Refuses what would end the run later.

    Raises:
        UsageError: the replay does not fit in free memory, wandb is missing, or video cannot be written.
    """
    needed = FrameReplayBuffer.bytes_needed(args.buffer_size, observation_space, args.num_envs)
    free = free_memory()
    if needed > free:
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


def create_run_folder(args: Args) -> Path:
    """A new folder under `runs`, of this run alone, also when another starts in the same second.

    Raises:
        UsageError: it cannot be written.
    """
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
    for attempt in itertools.count():
        folder = Path("runs") / (f"{name}-{attempt}" if attempt else name)
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not folder.is_dir():
                raise UsageError(f"cannot write run folder {folder.absolute()} ({error.strerror}): start elsewhere") from None


def inject(learner: Learner, replay: FrameReplayBuffer, log: RunLog, step: int) -> None:
    """Injects plasticity, measures on replayed observations that Q did not change, and logs both."""
    key = learner.q_network.num_injections
    rng = np.random.default_rng(stream_seed(learner.args.seed, Stream.INJECTION, key))
    obs = replay.transitions(rng.integers(replay.size(), size=512), rng.integers(replay.n_envs, size=512)).observations
    with torch.no_grad():
        before = learner.q_network(obs)
        learner.inject()
        delta = (learner.q_network(obs) - before).abs().max().item()
    log.writer.add_scalar("injection/step", step, step)
    log.writer.add_scalar("injection/max_abs_delta_q", delta, step)
    log.say(f"step {step:,}: plasticity injected, largest change of Q over {len(obs)} observations: {delta}")


def start_wandb(args: Args, folder: Path) -> None:
    """Mirrors to Weights & Biases everything that is written to TensorBoard from now on."""
    import wandb

    names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": folder.name}
    wandb.init(**names, config=asdict(args), sync_tensorboard=True, save_code=True)


def after_step(step: int, args: Args, learner: Learner, replay: FrameReplayBuffer, log: RunLog) -> None:
    """All that happens every so many steps or at a certain one, in this order, called once for every single step.

    A vector step of N environments calls it N times, so none of it depends on N.
    """
    if step > args.learning_starts:
        if step % args.train_frequency == 0:
            log.update(learner.update(replay.sample(args.batch_size)), step)
        if step % args.target_network_frequency == 0:
            learner.sync_target()
    if args.apply_injection and step in args.injection_step:
        inject(learner, replay, log, step)
    if step % args.log_frequency == 0 or step == args.total_timesteps:
        log.interval(step)
    if args.eval_frequency and step % args.eval_frequency == 0:
        video = log.folder / "videos" / f"step-{step}.mp4" if args.capture_video else None
        start = time.perf_counter()
        scores = evaluate(learner.q_network, args, step, video)
        log.evaluation(scores, step, time.perf_counter() - start)


def training_loop(args: Args, envs: VectorEnv, learner: Learner, replay: FrameReplayBuffer, log: RunLog) -> None:
    """Plays and learns from step 0 to `total_timesteps`.

    Raises:
        FloatingPointError: a loss stopped being finite.
    """
    step = 0
    obs, _ = envs.reset(seed=stream_seed(args.seed, Stream.ENVIRONMENTS))
    while step < args.total_timesteps:
        actions = learner.act(obs, exploration_epsilon(args, step))
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        cut = [{"TimeLimit.truncated": bool(truncated)} for truncated in truncations]
        replay.add(obs, infos["final_obs"], actions, rewards, terminations | truncations, cut)
        obs = next_obs
        # num_envs need not divide the run's length: what the last vector step plays beyond it is not counted
        previous, step = step, min(step + args.num_envs, args.total_timesteps)
        log.games(infos, step)
        for now in range(previous + 1, step + 1):
            after_step(now, args, learner, replay, log)


def train(args: Args) -> Path:
    """One whole run. Returns its folder, which holds the TensorBoard curves and whatever the flags ask for.

    Raises:
        UsageError: something in `args` cannot work on this machine; nothing was written.
        FloatingPointError: a loss stopped being finite.
    """
    device = pick_device(args)
    with contextlib.closing(make_envs(args)) as envs:
        obs_space, action_space = envs.single_observation_space, envs.single_action_space
        check_resources(args, obs_space)
        learner = Learner(args, int(action_space.n), device)
        rng = np.random.default_rng(stream_seed(args.seed, Stream.REPLAY))
        replay = FrameReplayBuffer(args.buffer_size, obs_space, action_space, device, args.num_envs, generator=rng)
        folder = create_run_folder(args)
        if args.track:
            start_wandb(args, folder)
        with contextlib.closing(RunLog(args, folder)) as log:
            log.say(f"{args.env_id} × {args.num_envs} ({args.env_backend}) on {device}, curves in {folder}")
            if not args.injection_step or not args.apply_injection:
                log.say("no plasticity injection in this run" + ("" if args.apply_injection else ": baseline arm"))
            if args.learning_starts >= args.total_timesteps:
                log.say(f"warning: nothing is learned, the run ends before --learning-starts {args.learning_starts}")
            training_loop(args, envs, learner, replay, log)
            if args.save_model:
                save_agent(folder / "agent.pt", learner.q_network, args, args.total_timesteps)
                log.say(f"agent saved, play with it: python {Path(__file__).name} --evaluate {folder}")
    return folder


def parse_args() -> Args:
    """The command line as `Args`. What `Args` refuses is raised here, since tyro would draw a box around it."""

    class Unchecked(Args):
        def __post_init__(self) -> None:
            pass

    given = tyro.cli(Unchecked, description=__doc__)
    return Args(**{field.name: getattr(given, field.name) for field in fields(Args)})


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # ε on a terminal or in a log that has no Greek
    try:
        args = parse_args()
        if args.evaluate is not None:
            evaluate_saved(args)
        else:
            train(args)
    except (UsageError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
