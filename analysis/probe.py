"""How well does a saved agent still fit random targets, next to a fresh network (Lyle et al. 2023)?"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from analysis.intervals import t_interval
from analysis.runs import CONDITIONS
from dqn_injection_atari import Args, Learner, QNetwork
from support.checkpoints import Checkpoint, load_checkpoint
from support.environments import FRAME_SIZE, STACK
from support.machine import free_memory, pick_device
from support.replay import FrameReplayBuffer
from support.usage import UsageError, reading

FRESH = "fresh network"
CONTENDERS = ("agent", "agent, injected", FRESH)  # of a probe


def saved_args(checkpoint: Checkpoint) -> Args:
    """
    Raises:
        UsageError: they are not this script's.
    """
    with reading(checkpoint.path, "a checkpoint", "take another"):
        return Args(**checkpoint.meta["args"])


def num_injections(checkpoint: Checkpoint) -> int:
    return int(checkpoint.state["learner"]["q_network"]["_extra_state"])


def num_actions(checkpoint: Checkpoint) -> int:
    return len(checkpoint.state["learner"]["q_network"]["theta.2.weight"])


def probe_args(checkpoint: Checkpoint, seed: int = 0) -> Args:
    """The run's arguments for learning in float32, with this seed and room for one injection more than were made."""
    made = num_injections(checkpoint)
    changes: dict[str, Any] = {"seed": seed, "bf16": False, "cuda_graphs": False}
    changes |= {"injection_step": tuple(range(1, made + 2)), "total_timesteps": made + 2, "num_envs": 1}
    changes |= {"injection_trigger": "step"}
    changes |= {name: getattr(Args, name) for name, of in CONDITIONS.items() if of.field == "injection_trigger"}
    return replace(saved_args(checkpoint), **changes)


def replayed_observations(checkpoint: Checkpoint, count: int, device: torch.device) -> torch.Tensor:
    """Observations of `count` different transitions in a checkpoint's replay, always the same: (count, 4, 84, 84) uint8.

    Until it returns it takes the memory of the whole replay, 7.3 kB a step: 7.3 GB for 1M.

    Raises:
        UsageError: the replay holds fewer, does not fit in memory, or cannot be read.
    """
    path, args = checkpoint.path, saved_args(checkpoint)
    with reading(path, "a checkpoint", "take another"):
        needed, free = checkpoint.state["replay"]["used"] * FRAME_SIZE**2 + 40 * args.buffer_size, free_memory()
    if needed > free:
        sizes = f"needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free"
        raise UsageError(f"{path} cannot be probed, its replay {sizes}: free more, or probe it on another machine")
    obs_space = gym.spaces.Box(0, 255, (STACK, FRAME_SIZE, FRAME_SIZE), np.uint8)
    action_space = gym.spaces.Discrete(num_actions(checkpoint))
    replay = FrameReplayBuffer(args.buffer_size, obs_space, action_space, device, n_envs=args.num_envs)
    checkpoint.restore({"replay": replay})
    if (held := replay.size() * args.num_envs) < count:
        fix = f"lower --probe-observations to {held}" if held else "take a later one"
        raise UsageError(f"{path} cannot be probed, its replay holds {held:,} observations and not {count:,}: {fix}")
    chosen = np.random.default_rng(0).choice(held, size=count, replace=False)
    return replay.transitions(*np.divmod(chosen, args.num_envs)).observations


@torch.no_grad()
def random_targets(network: QNetwork, obs: torch.Tensor) -> torch.Tensor:
    """sin(10⁵ f(s)) of a freshly initialised `network` f (Lyle et al. 2023): (B, num_actions) float32, about 0 ± 0.7.

    A function of the observation, so that two that are equal have one target; independent draws would ask of every network
    what none can do. In float64, or the factor would turn rounding errors into other targets. Leaves `network` in float64.
    """
    network = network.double()
    return torch.cat([torch.sin(1e5 * network.theta(network.features(part))) for part in obs.split(64)]).float()


def make_contender(name: str, checkpoint: Checkpoint, seed: int, device: torch.device) -> Learner:
    """One of `CONTENDERS`, each with an optimizer that has no moments yet. `seed` decides the fresh weights, or the injection.

    Raises:
        UsageError: the checkpoint's network is not this script's.
    """
    learner = Learner(probe_args(checkpoint, seed), num_actions(checkpoint), device)
    if name != FRESH:
        with reading(checkpoint.path, "a checkpoint", "take another"):
            learner.load_state_dict(checkpoint.state["learner"])
        learner.optimizer.state.clear()
    if name == "agent, injected":
        learner.inject()
    return learner


@torch.no_grad()
def outputs(network: torch.nn.Module, obs: torch.Tensor) -> torch.Tensor:
    """(B, num_actions) float32, in portions that do not take much memory."""
    return torch.cat([network(part) for part in obs.split(512)])


def fit(learner: Learner, obs: torch.Tensor, targets: torch.Tensor, batches: np.ndarray) -> tuple[float, float]:
    """Regresses the online network on its own mean outputs plus `targets`, with whatever of it the agent itself would train.

    The mean over the observations, one per action, is added because the agent's values have some level and a fresh network's
    have none: to learn a level is easy, and not the question (Lyle et al. 2023). The loss is ½ Σ_a (Q(s, a) − y(s, a))²,
    averaged over a batch, whose gradient is for each output what the run's Huber loss has where |δ| ≤ 1.

    Args:
        obs: (B, 4, 84, 84) uint8
        targets: (B, num_actions) float32
        batches: (updates, batch size) int, rows of obs

    Returns:
        mean squared error over all obs and actions, before and after; NaN or infinite where the network diverged
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


def relative_error(errors: Sequence[float], fresh: Sequence[float]) -> dict[str, Any] | None:
    """Errors (seeds,) as multiples of a fresh network's, paired by seed.

    Returns:
        "per_seed" (seeds,), "ratio", their geometric mean, and "interval", the 95% t interval of the mean log-ratio as
        ratios, None for one seed; or None where an error is not finite or 0
    """
    if not all(0 < error < math.inf for error in (*errors, *fresh)):
        return None
    logs = np.log(errors) - np.log(fresh)
    interval = np.exp(t_interval(logs)).tolist() if len(logs) > 1 else None
    return {"per_seed": np.exp(logs).tolist(), "ratio": float(np.exp(logs.mean())), "interval": interval}


def probe_checkpoint(path: Path, observations: int, updates: int, seeds: int) -> dict[str, Any]:
    """Fitting capacity of the agent in a checkpoint, with and without a fresh injection, against a fresh network's.

    With each seed all three get the same observations, targets (but for `fit`'s offset) and batches. The agent's and the
    injected agent's errors before the first update are one number, since an injection does not change Q.

    Returns:
        plain data: "errors" {contender: {"start": (seeds,), "end": (seeds,)}}, mean squared, None where not finite;
        "relative_to_fresh" {contender: see `relative_error`}, of the errors at the end; "sentence"; what it was measured on

    Raises:
        UsageError: the checkpoint is damaged or cannot be probed.
    """
    checkpoint = load_checkpoint(path)
    args = saved_args(checkpoint)
    device = pick_device(args.cuda, deterministic=True, tf32=args.tf32)
    obs = replayed_observations(checkpoint, observations, device)
    errors: dict[str, dict[str, list[float]]] = {name: {"start": [], "end": []} for name in CONTENDERS}
    for seed in tqdm(range(seeds), desc=f"probing {path}", leave=False, disable=None):
        rng = np.random.default_rng(seed)
        for_targets, for_contenders = rng.integers(2**30, size=2).tolist()
        batches = rng.integers(len(obs), size=(updates, args.batch_size))
        targets = random_targets(make_contender(FRESH, checkpoint, for_targets, device).q_network, obs)
        for name, of_one in errors.items():
            start, end = fit(make_contender(name, checkpoint, for_contenders, device), obs, targets, batches)
            of_one["start"].append(start)
            of_one["end"].append(end)
    result = {
        "checkpoint": str(path),
        "env_id": args.env_id,
        "run_seed": args.seed,
        "step": checkpoint.step,
        "injections": num_injections(checkpoint),
        "probe_observations": observations,
        "probe_updates": updates,
        "probe_seeds": seeds,
        "errors": {
            name: {when: [e if math.isfinite(e) else None for e in values] for when, values in of_one.items()}
            for name, of_one in errors.items()
        },
        "relative_to_fresh": {
            name: relative_error(errors[name]["end"], errors[FRESH]["end"]) for name in CONTENDERS if name != FRESH
        },
    }
    return result | {"sentence": probe_in_words(result)}


def times(relative: dict[str, Any]) -> str:
    """`1.23× [1.01, 1.50]`, without brackets where there is no interval."""
    interval = "" if relative["interval"] is None else " [{:.3g}, {:.3g}]".format(*relative["interval"])
    return f"{relative['ratio']:.3g}×{interval}"


def probe_in_words(result: dict[str, Any]) -> str:
    """What a result of `probe_checkpoint` says, and what it cannot say, in one sentence."""

    def against_fresh(name: str) -> str:
        relative, ends = result["relative_to_fresh"][name], result["errors"][name]["end"]
        if relative is None:
            return f"not to be compared (diverged with {ends.count(None)} of {len(ends)} seeds)"
        if (interval := relative["interval"]) is None:
            return f"{times(relative)} a fresh network's (one seed, no interval)"
        verdict = "worse" if interval[0] > 1 else "better" if interval[1] < 1 else "no clear difference"
        return f"{times(relative)} a fresh network's ({verdict})"

    fresh, updates = result["errors"][FRESH], result["probe_updates"]
    if None in fresh["end"]:
        return "no answer: a fresh network diverges with this run's learning rate"
    if (removed := 1 - sum(fresh["end"]) / sum(fresh["start"])) < 0.1:
        return f"no answer: a fresh network loses only {removed:.0%} of its error in {updates:,} updates, raise --probe-updates"
    return (
        f"after {updates:,} updates towards random targets the agent's error is {against_fresh('agent')}, with a fresh "
        f"injection it is {against_fresh('agent, injected')}; the fresh network's own error fell by {removed:.0%}"
    )


def probe_table(result: dict[str, Any]) -> str:
    """One line per contender: error at start and end, averaged over seeds, its multiple of a fresh network's, and per seed."""

    def mean(errors: list[float | None]) -> str:
        finite = [error for error in errors if error is not None]
        return f"{np.mean(finite):.3g}" if len(finite) == len(errors) else "diverged"

    rows = [("", "error at start", "at end", "relative to fresh [95%]", "per seed")]
    for name, of_one in result["errors"].items():
        relative = result["relative_to_fresh"].get(name)
        ratios = (times(relative), ", ".join(f"{ratio:.3g}" for ratio in relative["per_seed"])) if relative else ("–", "–")
        rows.append((name, mean(of_one["start"]), mean(of_one["end"]), *ratios))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def probe(paths: Iterable[str], observations: int, updates: int, seeds: int) -> list[dict[str, Any]]:
    """Prints and returns `probe_checkpoint` of every checkpoint; those that cannot be probed are named and left out.

    Raises:
        UsageError: no checkpoint can be probed.
    """
    results, left_out = [], []
    for path in dict.fromkeys(map(Path, paths)):
        try:
            result = probe_checkpoint(path, observations, updates, seeds)
        except UsageError as error:
            left_out.append(str(error))
            print(f"left out: {error}", flush=True)
            continue
        results.append(result)
        injections = f"{result['injections']} injection{'s' * (result['injections'] != 1)}"
        print(f"{path}: {result['env_id']}, step {result['step']:,}, {injections} so far")
        print(f"{probe_table(result)}\n{result['sentence']}", flush=True)
    if not results:
        reason = left_out[0] if left_out else "give checkpoints, runs/FOLDER/checkpoint-STEP"
        raise UsageError(f"no checkpoint to probe; {reason}")
    return results
