"""Size, time and memory of a checkpoint whose replay is full of real frames.

    python benchmarks/checkpoint_size.py --agent runs/FOLDER/agent.pt

Plays a game until the replay is full (with a saved agent if one is given: a good player's frames are more varied), writes
checkpoints, reads the last one back, and compares every array. Prints the figures as JSON; exits with 1 where one is
missed. A million transitions need 22 GB of memory, most of it for the comparison.
"""

import contextlib
import json
import platform
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import psutil
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dqn_injection_atari as script


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
def peak_memory(figures: dict):
    """Adds "extra_memory_GB": how far the process's resident memory rises in the block above what it was before."""
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    figures["extra_memory_GB"] = (peak - before) / 1e9


def make_run(settings: Settings, folder: Path) -> script.Run:
    args = script.Args(env_id=settings.env_id, env_backend="ale", num_envs=settings.num_envs, buffer_size=settings.steps)
    args = replace(args, total_timesteps=settings.steps, end_e=0.05)
    envs, learner, replay = script.make_parts(args, torch.device("cpu"))
    return script.Run(args, "benchmark", folder, envs, learner, replay, script.RunLog(args, folder))


def main(settings: Settings) -> None:
    script.pick_device(script.Args())
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = make_run(settings, Path(folder))
        if settings.agent is not None:
            trained, _, _ = script.load_agent(settings.agent, "cpu")
            run.learner.q_network.load_state_dict(trained.state_dict())
        run.envs.reset(seed=0)
        while run.played < settings.steps:
            script.decide(run)
            script.finish(run)
        run.step = run.played
        print(
            f"{run.replay.size() * run.args.num_envs:,} transitions, {run.replay._used:,} frames", file=sys.stderr, flush=True
        )

        writes = []
        for _ in range(settings.repeats):
            figures: dict = {}
            start = time.perf_counter()
            with peak_memory(figures):
                path = script.save_checkpoint(run)
            figures["seconds"] = time.perf_counter() - start
            writes.append(figures)
        run.envs.reset(seed=0)  # reading is timed as at a multiple of --checkpoint-frequency: no steps to be played again
        path = script.save_checkpoint(run)
        sizes = {file.name: file.stat().st_size / 1e6 for file in path.iterdir()}

        copy = make_run(settings, Path(folder))
        start = time.perf_counter()
        script.load_checkpoint(path).restore(copy.envs, copy.learner, copy.replay)
        read_seconds = time.perf_counter() - start
        pairs = zip(run.replay.tensors(), copy.replay.tensors(), strict=True)
        result = {
            "checkpoint_GB": sum(sizes.values()) / 1e3,
            "files_MB": sizes,
            "write_seconds": median(figures["seconds"] for figures in writes),
            "extra_memory_GB": max(figures["extra_memory_GB"] for figures in writes),
            "read_seconds": read_seconds,
            "bitwise_equal": all(torch.equal(a, b) for a, b in pairs),
            "frames_GB": run.replay.frames[: run.replay._used].nbytes / 1e9,
            "cores": len(psutil.Process().cpu_affinity()),
            "machine": platform.machine(),
            "settings": {name: str(value) for name, value in vars(settings).items()},
        }
        print(json.dumps(result, indent=1))
        limits = {"checkpoint_GB": 0.5, "write_seconds": 20, "extra_memory_GB": 1}  # for a million transitions
        missed = [name for name, limit in limits.items() if result[name] > limit]
        if missed or not result["bitwise_equal"]:
            sys.exit(f"not met: {', '.join(missed) or 'bitwise equality'}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
