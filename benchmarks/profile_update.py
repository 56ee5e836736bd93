"""Where the time of one vector step goes, and how much of what the machine can do is reached.

    python benchmarks/profile_update.py --num-envs 8

Prints, per vector step of N steps and N / 4 updates: the time to act, to emulate, to write to and sample
from replay, and to update; then the update's arithmetic against the highest rate that large convolutions
and matrix products reach on this device in the same precision, the whole run's speed against that of the
emulators alone, and the memory the process took at most. On a GPU every part is waited for, so that parts
which otherwise run at the same time are told apart.

    python benchmarks/profile_update.py --buffer-size 1000000 --full-replay     # with a full replay
"""

import contextlib
import json
import resource
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dqn_injection_atari as script
from benchmarks.throughput import Settings, make_run, provenance, wait_for
from support.process import ends_in_one_line
from support.replay import FrameReplayBuffer
from support.usage import words_given


@dataclass(frozen=True)
class ProfileSettings(Settings):
    num_envs: int = 8
    """games in parallel"""
    bf16: bool = False
    """as in the training script"""
    inject: bool = False
    """profile the network after an injection"""
    full_replay: bool = False
    """begin with a full replay, of noise: what it costs does not depend on what it shows"""
    warm_up: int = 30
    """vector steps of learning before those that are timed"""
    vector_steps: int = 300
    """vector steps that are timed"""


def updates_per_vector_step(settings: ProfileSettings) -> float:
    return settings.num_envs / script.Args.train_frequency


def fill_up(replay: FrameReplayBuffer) -> None:
    rng = np.random.default_rng(0)
    obs = rng.integers(1, 256, (replay.n_envs, *replay.obs_shape), np.uint8)
    nothing = np.zeros(replay.n_envs)
    while not replay.full:
        new_frame = rng.integers(1, 256, obs[:, :1].shape, np.uint8)
        next_obs = np.concatenate([obs[:, 1:], new_frame], axis=1)
        replay.add(obs, next_obs, nothing, nothing, nothing, [{}] * replay.n_envs)
        obs = next_obs


def linear_flops(x: tuple[int, int], weight: tuple[int, int], *_: Any, **__: Any) -> int:
    """Of oneDNN's linear layer, unknown to PyTorch's counter: x (B, in) times weight (out, in) transposed."""
    return 2 * x[0] * x[1] * weight[0]


def update_flops(training: script.Training) -> int:
    """Floating-point operations of the convolutions and matrix products of one update, counted in one."""
    onednn = {torch.ops.mkldnn._linear_pointwise: linear_flops}
    counter = FlopCounterMode(display=False, custom_mapping=onednn)
    with counter:
        # as it is, without a graph
        script.Learner.update(training.learner, training.replay.sample(training.args.batch_size))
    return counter.get_total_flops()


def seconds_per_call(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def highest_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, or of a large convolution like the network's second if higher."""
    size = batch = 8192
    if device.type == "cpu":
        size = 1024
        batch = 256
    square = torch.randn(size, size, device=device, dtype=dtype)
    images = torch.randn(batch, 32, 20, 20, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    filters = torch.randn(64, 32, 4, 4, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    product_seconds = seconds_per_call(lambda: square @ square, device)
    convolution_seconds = seconds_per_call(lambda: F.conv2d(images, filters, stride=2), device)
    return max(2 * size**3 / product_seconds, 2 * batch * 81 * 64 * 512 / convolution_seconds)


def emulator_speed(args: script.Args, seconds: float = 3.0) -> float:
    """Steps per second of the games alone, played at random."""
    rng = np.random.default_rng(0)
    steps = 0
    envs = script.make_envs(args)
    envs.reset(seed=0)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        envs.step(rng.integers(envs.single_action_space.n, size=args.num_envs))
        steps += args.num_envs
    speed = steps / (time.perf_counter() - start)
    envs.close()
    return speed


def timed_parts(training: script.Training, vector_steps: int) -> dict[str, float]:
    """Seconds per vector step in each part of the loop, and in all of it."""
    run = training.run
    learner = training.learner
    envs = training.envs
    replay = training.replay
    parts: dict[str, list[tuple[object, str]]] = {
        "act": [(learner, "act")],
        "emulate": [(envs, "send"), (envs, "receive")],
        "replay": [(replay, "add"), (replay, "sample")],
        "update": [(learner, "update")],
    }
    spent = dict.fromkeys(parts, 0.0)

    def timed(part: str, original: Callable) -> Callable:
        def call(*positional: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = original(*positional, **named)
            wait_for(learner.device)
            spent[part] += time.perf_counter() - start
            return result

        return call

    with contextlib.ExitStack() as stack:
        for part, methods in parts.items():
            for owner, name in methods:
                watched = timed(part, getattr(owner, name))
                stack.enter_context(unittest.mock.patch.object(owner, name, watched))
        end = run.step + vector_steps * run.num_envs
        start = time.perf_counter()
        while run.step < end:
            training.advance()
        spent["all"] = time.perf_counter() - start
    return {part: seconds / vector_steps for part, seconds in spent.items()}


def measure(settings: ProfileSettings) -> dict[str, Any]:
    """All figures of one run, with where they come from."""
    with contextlib.ExitStack() as stack:
        training = make_run(settings, settings.num_envs, stack, settings.bf16)
        learner = training.learner
        replay = training.replay
        device = learner.device

        def measure_plasticity() -> None:
            batch = training.replayed(script.Stream.PLASTICITY, training.run.step)
            script.plasticity_measures(learner, batch)

        if settings.full_replay:
            fill_up(replay)
        if settings.inject:
            training.intervene()
        timed_parts(training, settings.warm_up)
        parts = timed_parts(training, settings.vector_steps)
        flops = update_flops(training)
        measuring = seconds_per_call(measure_plasticity, device, repeats=5)
        frames = replay.frames[: replay._used].nbytes
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kB elsewhere
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    rate = flops * updates_per_vector_step(settings) / parts["update"]
    limit = highest_rate(device, torch.bfloat16 if settings.bf16 else torch.float32)
    return {
        "seconds_per_vector_step": parts,
        "plasticity_measurement_seconds": measuring,
        "update_GFLOP": flops / 1e9,
        "update_GFLOP_per_second": rate / 1e9,
        "highest_GFLOP_per_second": limit / 1e9,
        "steps_per_second": settings.num_envs / parts["all"],
        "emulator_steps_per_second": emulator_speed(training.args),
        "memory_GB": memory / 1e9,
        "frames_GB": frames / 1e9,
        "frames_on": str(replay.storage),
        **provenance(settings, device),
    }


def print_figures(settings: ProfileSettings, result: dict[str, Any]) -> None:
    """What `measure` found."""
    device = result["circumstances"]["device"]
    updates = updates_per_vector_step(settings)
    print(f"{device}, commit {result['commit']}, N = {settings.num_envs}, {updates:g} updates each")
    parts = dict(result["seconds_per_vector_step"])
    parts["other"] = 2 * parts["all"] - sum(parts.values())
    for part in ("act", "emulate", "replay", "update", "other", "all"):
        print(f"{part:8}{1e3 * parts[part]:10.2f} ms{parts[part] / parts['all']:8.0%}")
    rate = result["update_GFLOP_per_second"]
    limit = result["highest_GFLOP_per_second"]
    reached = f"{rate:,.0f} GFLOP/s, {rate / limit:.0%} of {limit:,.0f}"
    print(f"update: {result['update_GFLOP']:.2f} GFLOP at {reached}")
    speed = result["steps_per_second"]
    emulators = result["emulator_steps_per_second"]
    print(f"run: {speed:,.0f} steps/s, {speed / emulators:.0%} of the emulators' {emulators:,.0f}")
    frequency = script.Args.plasticity_frequency
    measuring = result["plasticity_measurement_seconds"]
    share = f"{measuring * speed / frequency:.2%} of the time with one every {frequency:,} steps"
    print(f"plasticity: {1e3 * measuring:.0f} ms a measurement, {share}")
    frames = f"{result['frames_GB']:.2f} GB of frames on {result['frames_on']}"
    print(f"memory: {result['memory_GB']:.2f} GB at most on the CPU; {frames}")


def main(settings: ProfileSettings) -> None:
    result = measure(settings)
    print_figures(settings, result)
    if settings.json is not None:
        settings.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with ends_in_one_line():
        main(tyro.cli(ProfileSettings, description=__doc__, args=words_given()))
