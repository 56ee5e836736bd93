"""Agents and fresh networks that fit random targets (Lyle et al. 2023), for probe.py and task_sequence.py."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F

from analysis.intervals import geometric_interval
from dqn_injection_atari import Args, Learner, QNetwork, make_envs
from support.checkpoints import Checkpoint, load_checkpoint
from support.environments import FRAME_SIZE, OBS_SPACE
from support.machine import free_memory, pick_device
from support.replay import FrameReplayBuffer
from support.usage import UsageError, conditions, reading

Errors = Sequence[float] | np.ndarray  # one per seed
FRESH = "fresh network"
CONTENDERS = ("agent", "agent, injected", FRESH)  # of a probe
NO_CHECKPOINT = "fresh"  # in its place: a fresh network and random play


@dataclass(frozen=True)
class ProbeSettings:
    """How networks are probed."""

    observations: int
    updates: int  # at each target
    seeds: int
    learning_rate: float  # of all networks, whatever the run's was
    head_width: int = Args.head_width  # of networks that are no agent's


# At a high rate 1,000 updates fit anything, whatever the agent was trained with, so those agents looked best
# that had most to gain; at 1e-4 the probe saw them (docs/results.md)
ONE_TARGET = ProbeSettings(observations=512, updates=1_000, seeds=3, learning_rate=1e-4)
# a task of a sequence has few updates, in which 1e-4 learns hardly anything
SEQUENCE = ProbeSettings(observations=512, updates=200, seeds=3, learning_rate=5e-4)
# chosen since networks lose plasticity in minutes (docs/results.md); of three, one that an injection does not
# help would leave no answer
FRESH_SEQUENCE = ProbeSettings(observations=256, updates=200, seeds=6, learning_rate=1e-3, head_width=64)


def saved_args(checkpoint: Checkpoint) -> Args:
    """The run's arguments; a UsageError where they are not this script's."""
    with reading(checkpoint.path, "a checkpoint", "take another"):
        return Args(**checkpoint.meta["args"])


def num_injections(checkpoint: Checkpoint) -> int:
    return int(checkpoint.state["learner"]["q_network"]["head._extra_state"])


def num_actions(checkpoint: Checkpoint) -> int:
    return QNetwork.num_actions_in(checkpoint.state["learner"]["q_network"])


def probe_args(checkpoint: Checkpoint, seed: int = 0, arm: dict[str, Any] | None = None) -> Args:
    """The run's arguments, for learning in float32 and with room for one injection more than there were.

    Args:
        arm: arguments that say what is done to the agent in the place of an injection
    """
    injections = num_injections(checkpoint) + 1
    steps = tuple(range(1, injections + 1))
    changes: dict[str, Any] = {"seed": seed, "bf16": False, "cuda_graphs": False, "keep_checkpoints": ()}
    changes |= {"intervention": "injection", "injection_trigger": "step", "injection_step": steps}
    changes |= {"total_timesteps": injections + 1, "num_envs": 1}
    changes |= arm or {}
    for name, condition in conditions(Args).items():  # what has no effect under these may not be set
        if condition.field in changes and changes[condition.field] not in condition.values:
            changes[name] = getattr(Args, name)
    return replace(saved_args(checkpoint), **changes)


def read_subject(path: Path, rate: float) -> Checkpoint:
    """A checkpoint of an agent to be probed, with this learning rate in the place of its own, undecayed."""
    checkpoint = load_checkpoint(path)
    args = asdict(saved_args(checkpoint)) | {"learning_rate": rate, "weight_decay": 0.0}
    return replace(checkpoint, meta=checkpoint.meta | {"args": args})


def fresh_checkpoint(env_id: str, seed: int, rate: float, head_width: int = Args.head_width) -> Checkpoint:
    """A network that has learned nothing, as if it were in a checkpoint, without replay."""
    args = Args(
        env_id=env_id,
        env_backend="ale",
        num_envs=8,
        seed=seed,
        learning_rate=rate,
        head_width=head_width,
    )
    with contextlib.closing(make_envs(args)) as envs:
        learner = Learner(args, int(envs.single_action_space.n), torch.device("cpu"))
    meta = {"step": 0, "args": asdict(args)}
    return Checkpoint(Path(NO_CHECKPOINT), meta, {"learner": learner.state_dict()})


def random_play(env_id: str, count: int, device: torch.device) -> torch.Tensor:
    """Observations of random play in 8 games, 16 steps apart, always the same: (count, 4, 84, 84) uint8."""
    rng = np.random.default_rng(0)
    seen: list[np.ndarray] = []
    with contextlib.closing(make_envs(Args(env_id=env_id, env_backend="ale", num_envs=8))) as envs:
        envs.reset(seed=0)
        while 8 * len(seen) < count:
            for _ in range(16):
                obs, *_ = envs.step(rng.integers(envs.single_action_space.n, size=8))
            seen.append(obs.copy())
    return torch.from_numpy(np.concatenate(seen)[:count]).to(device)


def replayed_observations(checkpoint: Checkpoint, count: int, device: torch.device) -> torch.Tensor:
    """Observations of `count` different transitions in a replay, always the same: (count, 4, 84, 84) uint8.

    Until it returns it takes the memory of the whole replay. A UsageError where the replay cannot be read, or
    holds fewer.
    """
    replay = read_replay(checkpoint, device)
    held = replay.size() * replay.n_envs
    if held < count:
        fix = f"lower --probe-observations to {held}" if held else "take a later one"
        raise UsageError(
            f"{checkpoint.path} cannot be probed, its replay holds {held:,} observations "
            f"and not {count:,}: {fix}"
        )
    chosen = np.random.default_rng(0).choice(held, size=count, replace=False)
    return replay.transitions(*np.divmod(chosen, replay.n_envs)).observations


def read_replay(checkpoint: Checkpoint, device: torch.device) -> FrameReplayBuffer:
    """The whole replay, which takes 7.3 GB for 1M steps; a UsageError where that is not free."""
    args = saved_args(checkpoint)
    with reading(checkpoint.path, "a checkpoint", "take another"):
        needed = checkpoint.state["replay"]["used"] * FRAME_SIZE**2 + 40 * args.buffer_size
    free = free_memory()
    if needed > free:
        sizes = f"needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free"
        raise UsageError(f"{checkpoint.path}: its replay {sizes}: free more, or go to another machine")
    action_space = gym.spaces.Discrete(num_actions(checkpoint))
    replay = FrameReplayBuffer(args.buffer_size, OBS_SPACE, action_space, device, n_envs=args.num_envs)
    checkpoint.restore({"replay": replay})
    return replay


def observations_for(subject: Checkpoint, count: int) -> torch.Tensor:
    """`replayed_observations`, or `random_play` for a fresh network, on the device that its run asks for."""
    args = saved_args(subject)
    device = pick_device(args.cuda, deterministic=True, tf32=args.tf32)
    if subject.path == Path(NO_CHECKPOINT):
        return random_play(args.env_id, count, device)
    return replayed_observations(subject, count, device)


def measured_on(subject: Checkpoint, settings: ProbeSettings) -> dict[str, Any]:
    """How a result begins: what was probed, and how."""
    args = saved_args(subject)
    return {
        "checkpoint": str(subject.path),
        "env_id": args.env_id,
        "run_seed": None if subject.path == Path(NO_CHECKPOINT) else args.seed,
        "step": subject.step,
        "injections": num_injections(subject),
        "learning_rate": settings.learning_rate,
        "head_width": args.head_width,
        "batch_size": args.batch_size,
        "probe_observations": settings.observations,
        "probe_updates": settings.updates,
        "probe_seeds": settings.seeds,
    }


@torch.no_grad()
def random_targets(network: QNetwork, obs: torch.Tensor) -> torch.Tensor:
    """sin(10⁵ f(s)) of a fresh `network` f (Lyle et al. 2023): (B, num_actions) float32, about 0 ± 0.7.

    Two observations that are equal have one target; independent draws would ask for what no network can do.
    In float64, or the factor would turn rounding errors into other targets. Leaves `network` in float64.
    """
    network = network.double()
    targets = [torch.sin(1e5 * network.head.theta(network.features(part))) for part in obs.split(64)]
    return torch.cat(targets).float()


def make_contender(name: str, checkpoint: Checkpoint, seed: int, device: torch.device) -> Learner:
    """One of `CONTENDERS`, with no moments yet. `seed` decides the fresh weights, or the injection.

    A fresh network's head is as wide as the one that the agent learns with.
    """
    args = probe_args(checkpoint, seed)
    if name == FRESH and num_injections(checkpoint):
        args = replace(args, head_width=args.new_head_width)
    learner = Learner(args, num_actions(checkpoint), device)
    if name != FRESH:
        with reading(checkpoint.path, "a checkpoint", "take another"):
            learner.load_state_dict(checkpoint.state["learner"])
        learner.optimizer.state.clear()
    if name == "agent, injected":
        learner.inject()
    return learner


def next_task(
    subject: Checkpoint, obs: torch.Tensor, updates: int, rng: np.random.Generator
) -> tuple[torch.Tensor, np.ndarray, int]:
    """Targets and batches of a task, see `fit`; and the seed of the weights that are drawn for it."""
    for_targets, for_contenders = rng.integers(2**30, size=2).tolist()
    batches = rng.integers(len(obs), size=(updates, saved_args(subject).batch_size))
    targets = random_targets(make_contender(FRESH, subject, for_targets, obs.device).q_network, obs)
    return targets, batches, for_contenders


@torch.no_grad()
def outputs(network: torch.nn.Module, obs: torch.Tensor) -> torch.Tensor:
    """(B, num_actions) float32, in portions that do not take much memory."""
    return torch.cat([network(part) for part in obs.split(512)])


def fit(
    learner: Learner, obs: torch.Tensor, targets: torch.Tensor, batches: np.ndarray
) -> tuple[float, float]:
    """Regresses the online network on its own mean outputs plus `targets`; what the agent trains, learns.

    The mean over the observations, one per action, is added because the agent's values have some level and a
    fresh network's have none: to learn a level is easy, and not the question (Lyle et al. 2023). The loss is
    ½ Σ_a (Q(s, a) − y(s, a))², averaged over a batch. Its gradient is that of the Huber loss where |δ| ≤ 1.

    Args:
        obs: (B, 4, 84, 84) uint8
        targets: (B, num_actions) float32
        batches: (updates, batch size) int, rows of obs

    Returns:
        mean squared error over all obs and actions, before and after; not finite where the network diverged
    """
    network = learner.q_network
    before = outputs(network, obs)
    targets = before.mean(dim=0) + targets
    for batch in torch.from_numpy(batches).to(obs.device):
        loss = 0.5 * (network(obs[batch]) - targets[batch]).square().sum(dim=1).mean()
        learner.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        learner.optimizer.step()
    return F.mse_loss(before, targets).item(), F.mse_loss(outputs(network, obs), targets).item()


def relative_error(errors: Errors, reference: Errors) -> dict[str, Any] | None:
    """Errors as multiples of other errors, paired by seed.

    Returns:
        "per_seed" (seeds,), and their "ratio" and "interval", see `geometric_interval`, None for one seed;
        or None where an error is not finite or 0, or there is none
    """
    if not len(errors) or not all(0 < error < math.inf for error in (*errors, *reference)):
        return None
    logs = np.log(errors) - np.log(reference)
    ratio, low, high = geometric_interval(logs, min_seeds=2).tolist()
    interval = None if math.isnan(low) else [low, high]
    return {"per_seed": np.exp(logs).tolist(), "ratio": ratio, "interval": interval}
