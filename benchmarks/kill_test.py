"""Kills small runs (SIGKILL) again and again, resumes them, and compares each with one left alone.

    python benchmarks/kill_test.py --kills 40

A run is killed while it begins, at a random moment, while it writes a checkpoint, right around its
injection, or as it begins a new event file after it was resumed; then resumed and killed again. At the end
every parameter, optimizer moment, replay array, generator and every scalar that TensorBoard shows is
compared bit by bit. Exits with 1 where anything differs or a curve shows a point twice.
"""

import itertools
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
import zstandard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary

SCRIPT = Path(__file__).resolve().parent.parent / "dqn_injection_atari.py"
INJECTION = 804  # planned for 802, inside a vector step, it happens at its end; losses are logged there, too
LAST = "checkpoint-1600"
FLAGS = """--no-cuda --num-envs 4 --total-timesteps 1600 --buffer-size 600 --learning-starts 200
--batch-size 8 --target-network-frequency 100 --log-frequency 67 --checkpoint-frequency 200
--injection-step 802""".split()
WALL_CLOCK = ("charts/SPS", "charts/SPS_recent")  # the only scalars that may differ
MOMENTS = ("beginning", "anywhere", "writing", "injection", "resuming")


def read_events(folder: Path) -> list[tuple[str, int, float]]:
    """All points of a run as TensorBoard shows them, wall-clock ones left out: (tag, step, value)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    points = []
    for tag in sorted(events.Tags()["scalars"]):
        if tag not in WALL_CLOCK:
            points += [(tag, point.step, point.value) for point in events.Scalars(tag)]
    return points


def shown_twice(folder: Path) -> list[str]:
    """What TensorBoard shows more than once in a run's curves."""
    counts = Counter((tag, step) for tag, step, _ in read_events(folder))
    return [f"{tag} at step {step} {count} times" for (tag, step), count in counts.items() if count > 1]


def waiting(points: list[tuple[int, float, str]]) -> list[tuple[int, str]]:
    """What of the curves waits in a checkpoint: (step, content), without wall-clock times and scalars."""
    kept = []
    for step, _, content in points:
        summary = Summary.FromString(bytes.fromhex(content))
        if not any(value.tag in WALL_CLOCK for value in summary.value):
            kept.append((step, summary.SerializeToString().hex()))
    return kept


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """{path: leaf} of nested dicts."""
    if not isinstance(tree, dict):
        return {name: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{name}/{key}")
    return leaves


def content(run_folder: Path, checkpoint: str) -> dict[str, Any]:
    """Everything that must be equal, by name: a checkpoint but for wall-clock times, and the run's curves."""
    folder = run_folder / checkpoint
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    log = state["log"]
    del log["seconds"], log["interval_seconds"]
    log["points"] = waiting(log["points"])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    with zstandard.open(folder / "replay.zst") as stream:
        replay = stream.read()
    found = flat(state)
    found["step"] = manifest["step"]
    found["circumstances"] = manifest["circumstances"]
    found["replay"] = replay
    curves = read_events(run_folder)
    found["curves in the run folder"] = [(tag, step, value.hex()) for tag, step, value in curves]
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what is not the same in both, bit by bit."""

    def bits(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.dtype, value.shape, value.stride(), value.cpu().contiguous().numpy().tobytes()

    missing = object()
    return [name for name in {**a, **b} if bits(a.get(name, missing)) != bits(b.get(name, missing))]


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, encoding="utf-8")


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def run_folder(folder: Path) -> Path:
    return next((folder / "runs").glob("[!.]*"))  # a name with a dot is a run's folder in the making


def finish(folder: Path, *flags: str) -> float:
    """Runs to the end; returns how long that took after the first line of output, in seconds."""
    process = start(folder, *flags)
    first_line(process)
    begun = time.perf_counter()
    output, _ = process.communicate()
    if process.returncode or "warning" in output:
        raise RuntimeError(f"the run ended with {process.returncode}: {output}")
    return time.perf_counter() - begun


def kill_one(folder: Path, flags: list[str], moment: str, seconds: float, rng: random.Random) -> str | None:
    """Starts (or resumes) the run and kills it. Returns where it was then, None where it had ended by itself.

    Args:
        moment: one of `MOMENTS`
        seconds: how long it may go on before it is killed "anywhere"
    """
    fresh = not list((folder / "runs").glob("[!.]*"))
    curves: set[Path] = set() if fresh else set(run_folder(folder).glob("events*"))
    if not fresh:
        for leftover in run_folder(folder).glob(".checkpoint-*"):
            shutil.rmtree(leftover)  # or the kill before would count for this one
    process = start(folder, *flags)
    while fresh and not list((folder / "runs").glob("[!.]*")):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode}: {process.communicate()[0]}")
        time.sleep(0.001)
    if moment not in ("resuming", "beginning"):
        first_line(process)
    run = run_folder(folder)
    seen = {path.name for path in run.glob("checkpoint-*")}
    longest = {"anywhere": seconds, "resuming": 0.01, "beginning": 0.6}.get(moment, 0.15)
    delay = rng.uniform(0, longest)

    def come() -> bool:
        if moment == "resuming":
            return set(run.glob("events*")) != curves
        if moment == "writing":
            return any(run.glob(".checkpoint-*.partial"))
        if moment == "injection" and f"checkpoint-{INJECTION}" not in seen:
            return (run / f"checkpoint-{INJECTION}").exists()
        return True

    while process.poll() is None and not come():
        time.sleep(0.001)
    time.sleep(delay)
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    if "warning" in output or (ended and process.returncode != 0):
        raise RuntimeError(f"the run ended with {process.returncode}: {output}")
    if ended:
        return None
    if moment == "resuming":
        return "as it began an event file"
    if not list(run.glob("checkpoint-*")):
        return "before the first checkpoint"
    if any(run.glob(".checkpoint-*.partial")):
        return "while writing a checkpoint"
    if "plasticity injected" in output:
        return "after the injection, in the same process"
    steps = [int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")]
    return "before the injection" if max(steps) < INJECTION else "at or after the injection"


def kill_and_compare(backend: str, moments: list[str], rng: random.Random) -> tuple[Counter[str], list[str]]:
    """A run killed at all of `moments` against one that is not: how often it was hit where, what differs."""
    where: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        killed = Path(name, "killed")
        whole.mkdir()
        killed.mkdir()
        flags = [*FLAGS, "--env-backend", backend]
        seconds = finish(whole, *flags)
        for moment in moments:
            place = kill_one(killed, flags, moment, seconds / 2, rng)
            where[place or "(had ended)"] += 1
            flags = ["--resume", str(run_folder(killed))]
        finish(killed, *flags)
        different = differences(content(run_folder(whole), LAST), content(run_folder(killed), LAST))
        different += shown_twice(run_folder(whole)) + shown_twice(run_folder(killed))
    return where, different


@dataclass
class Settings:
    kills: int = 40
    """kills in all, half of them on each backend"""
    kills_per_run: int = 5
    """kills that one run survives, one of each kind in turn"""
    seed: int = 0
    """of the random moments"""


def main(settings: Settings) -> None:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that points are purged is as it should be
    rng = random.Random(settings.seed)
    total: Counter[str] = Counter()
    failures = 0
    for backend in ("sb3", "ale"):
        moments = itertools.cycle(MOMENTS)
        hits = 0
        while hits < settings.kills / 2:
            some_moments = list(itertools.islice(moments, settings.kills_per_run))
            where, different = kill_and_compare(backend, some_moments, rng)
            hits += settings.kills_per_run - where["(had ended)"]
            if different:
                failures += 1
            for place, count in where.items():
                total[f"{backend}: {place}"] += count
            print(f"{backend}: {dict(where)}; different: {different or 'nothing'}", flush=True)
    print()
    for place, count in sorted(total.items()):
        print(f"{count:4d}  {place}")
    killed = sum(count for place, count in total.items() if "(had ended)" not in place)
    print(f"{killed} kills, {failures} runs that differ from their uninterrupted twins")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
