"""Size, time and memory of a checkpoint whose replay is full of real frames.

    python benchmarks/checkpoint_size.py --agent runs/FOLDER/agent.pt

Plays a game until the replay is full (with a saved agent if one is given: a good player's frames are more
varied), writes checkpoints, reads the last one back, and compares every array. Prints the figures as JSON;
exits with 1 where one is missed. A million transitions need 22 GB of memory, most of it for the
comparison.
"""

import contextlib
import json
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dqn_injection_atari as script
from benchmarks.throughput import begin_run
from support.acceleration import prepare_process
from support.checkpoints import load_checkpoint, save_checkpoint
from support.machine import pick_device, usable_processors
from support.process import ends_in_one_line
from support.usage import UsageError, words_given


@dataclass
class Settings:
    env_id: str = "PhoenixNoFrameskip-v4"
    """game"""
    steps: int = 1_000_000
    """transitions in the replay"""
    num_envs: int = 8
    """games in parallel"""
    agent: Path | None = None
    """an agent.pt to play with; without it an untrained network does"""
    repeats: int = 3
    """checkpoints written; medians are reported"""


@contextlib.contextmanager
def peak_memory(figures: dict[str, float]) -> Iterator[None]:
    """Adds "extra_memory_GB": how far the process's resident memory rises in the block."""
    process = psutil.Process()
    done = threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    figures["extra_memory_GB"] = (peak - before) / 1e9


def make_run(settings: Settings, folder: Path, stack: contextlib.ExitStack) -> script.Training:
    """A run that only plays; its network is like that of the agent that it plays with.

    Raises:
        UsageError: that agent plays another game.
    """
    trained = script.Args()
    injections = 0
    if settings.agent is not None:
        network, trained, _ = script.load_agent(settings.agent, "cpu")
        injections = network.num_injections
        if trained.env_id != settings.env_id:
            raise UsageError(f"{settings.agent} plays {trained.env_id}: give --env-id {trained.env_id}")
    args = script.Args(
        env_id=settings.env_id,
        env_backend="ale",
        num_envs=settings.num_envs,
        buffer_size=settings.steps,
        total_timesteps=settings.steps,
        learning_starts=settings.steps,
        injection_step=tuple(settings.num_envs * k for k in range(1, injections + 1)),
        head_width=trained.head_width,
        injected_head_width=trained.injected_head_width,
        shared_bias=trained.shared_bias,
        layer_norm=trained.layer_norm,
        plasticity_frequency=0,
        end_e=0.05,
    )
    prepare_process()
    return begin_run(args, torch.device("cpu"), folder, stack)


def write(training: script.Training) -> tuple[Path, dict[str, float]]:
    """Writes a checkpoint; returns its path, "seconds" and "extra_memory_GB"."""
    run = training.run
    figures: dict[str, float] = {}
    meta = {"run": run.id, "args": run.args, "circumstances": run.circumstances}
    shutil.rmtree(run.folder / f"checkpoint-{run.step}", ignore_errors=True)
    start = time.perf_counter()
    with peak_memory(figures):
        path = save_checkpoint(run.folder, run.step, run.parts | {"log": run.log}, meta)
    figures["seconds"] = time.perf_counter() - start
    return path, figures


def measure(settings: Settings, folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """All figures."""
    training = make_run(settings, folder, stack)
    run = training.run
    replay = training.replay
    if settings.agent is not None:
        trained, _, _ = script.load_agent(settings.agent, "cpu")
        training.learner.q_network.load_state_dict(trained.state_dict())
    training.envs.reset(seed=0)
    while run.step < settings.steps:
        training.advance()
    transitions = replay.size() * run.num_envs
    print(f"{transitions:,} transitions, {replay._used:,} frames", file=sys.stderr, flush=True)

    writes = []
    for _ in range(settings.repeats):
        _, figures = write(training)
        writes.append(figures)
    # reading is timed as at a multiple of --checkpoint-frequency: no steps to be played again
    training.envs.reset(seed=0)
    path, _ = write(training)
    sizes = {file.name: file.stat().st_size / 1e6 for file in path.iterdir()}

    copy = make_run(settings, folder, stack)
    start = time.perf_counter()
    load_checkpoint(path).restore(copy.run.parts)
    read_seconds = time.perf_counter() - start
    pairs = zip(replay.tensors(), copy.replay.tensors(), strict=True)
    return {
        "checkpoint_GB": sum(sizes.values()) / 1e3,
        "files_MB": sizes,
        "write_seconds": median(figures["seconds"] for figures in writes),
        "extra_memory_GB": max(figures["extra_memory_GB"] for figures in writes),
        "read_seconds": read_seconds,
        "bitwise_equal": all(torch.equal(a, b) for a, b in pairs),
        "frames_GB": replay.frames[: replay._used].nbytes / 1e9,
        "cores": usable_processors(),
        "machine": platform.machine(),
        "settings": {name: str(value) for name, value in vars(settings).items()},
    }


def main(settings: Settings) -> None:
    pick_device(script.Args.cuda, script.Args.torch_deterministic, script.Args.tf32)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="."))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # what the run says is no figure
        result = measure(settings, Path(folder), stack)
    print(json.dumps(result, indent=1))
    limits = {"checkpoint_GB": 0.5, "write_seconds": 20, "extra_memory_GB": 1}  # for a million transitions
    missed = [name for name, limit in limits.items() if result[name] > limit]
    if not result["bitwise_equal"]:
        missed.append("bitwise equality")
    if missed:
        sys.exit(f"not met: {', '.join(missed)}")


if __name__ == "__main__":
    with ends_in_one_line():
        main(tyro.cli(Settings, description=__doc__, args=words_given()))
