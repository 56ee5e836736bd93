"""Runs a sweep, 2 games × 2 seeds × 3 arms, with kills (SIGKILL), and compares it with runs started by hand.

    python benchmarks/sweep_kill_test.py --kills 20 --sweep-kills 3

At random moments a training or a Ray worker is killed; and sometimes the sweep itself, which is then
started again. At the end every run is compared bit by bit with the one that a user starts by hand, without
a sweep, and nobody touches. Exits with 1 where anything differs, a run was done twice, or the manifest has
a run as finished more or less than once.
"""

import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.kill_test import FLAGS, LAST, content, differences, finish
from orchestration.manifest import read_manifest
from support.process import ends_in_one_line
from support.usage import words_given

SWEEP = Path(__file__).resolve().parent.parent / "sweep.py"
GAMES = ("PhoenixNoFrameskip-v4", "BoxingNoFrameskip-v4")
SEEDS = ("1", "2")
FORKS = ("injection", "reset-head")


def trainings(place: Path) -> list[psutil.Process]:
    """Processes that train in a sweep's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            is_training = "dqn_injection_atari.py" in " ".join(process.cmdline())
            if is_training and Path(process.cwd()) == place.absolute():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def by_hand(place: Path, flags: list[str]) -> Iterator[tuple[str, Path]]:
    """Does the runs of the sweep one by one, without it: (name there, folder)."""

    def done(name: str, *arguments: str) -> Path:
        finish(place, *arguments, "--exp-name", name)
        (folder,) = (place / "runs").glob(f"*__{name}__*")
        return folder

    for game in GAMES:
        for seed in SEEDS:
            which = ("--env-id", game, "--seed", seed)
            trunk = done(f"{game}-{seed}-none", *flags, *which, "--intervention", "none")
            yield f"{game}__none__{seed}", trunk
            (checkpoint,) = trunk.glob("checkpoint-80[0-9]")  # at the injection, kept
            for arm in FORKS:
                fork = done(f"{game}-{seed}-{arm}", "--fork", str(checkpoint), "--intervention", arm)
                yield f"{game}__{arm}__{seed}", fork


def kill_something(place: Path, rng: random.Random) -> str | None:
    """Kills a "training" or its "worker", after a moment; returns which, None where there was none."""
    time.sleep(rng.uniform(0, 4))
    going = trainings(place)
    if not going:
        return None
    training = rng.choice(going)
    kind = rng.choice(("training", "worker"))
    try:
        victim = training if kind == "training" else training.parent()
        if victim is None or (kind == "worker" and "ray::" not in " ".join(victim.cmdline())):
            return None  # its worker has gone already
        victim.kill()
    except psutil.NoSuchProcess:
        return None
    return kind


@dataclass
class Settings:
    kills: int = 20
    """kills of trainings and workers in all, half of them on each backend"""
    sweep_kills: int = 3
    """kills of the sweep itself, on each backend"""
    seed: int = 0
    """of the random moments"""


def sweep_command(flags: list[str]) -> list[str]:
    command = [sys.executable, str(SWEEP), "--name", "x", "--env-ids", *GAMES, "--seeds", *SEEDS]
    command += ["--arms", "none", *FORKS, "--retries", "1000", "--retry-pause", "0.1"]
    command += ["--memory-per-run", "0.5", "--threads-per-run", "1"]
    return [*command, "--", *flags]


def sweep_and_compare(
    backend: str, kills: int, settings: Settings, rng: random.Random
) -> tuple[Counter[str], list[str]]:
    """Returns what was killed how often, and what is not as it should be."""
    killed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        hand = Path(name, "hand")
        place = Path(name, "sweeps", "x")
        output = Path(name, "output")
        hand.mkdir()
        flags = [*FLAGS, "--env-backend", backend]
        references = {run: content(folder, LAST) for run, folder in by_hand(hand, flags)}
        with open(output, "w", encoding="utf-8") as file:
            for part in range(settings.sweep_kills + 1):
                command = sweep_command(flags)
                sweep = subprocess.Popen(command, cwd=name, stdout=file, stderr=subprocess.STDOUT)
                due = kills * (part + 1) // (settings.sweep_kills + 1)
                while sweep.poll() is None and killed["training"] + killed["worker"] < due:
                    kind = kill_something(place, rng)
                    if kind is not None:
                        killed[kind] += 1
                if part < settings.sweep_kills:
                    time.sleep(rng.uniform(0, 6))
                    if sweep.poll() is None:
                        sweep.kill()
                        killed["sweep"] += 1
                sweep.wait()
        wrong = faults(place, references)
        if killed.total() < kills + settings.sweep_kills:
            wrong.append("it ended before all kills were made")
        if sweep.returncode:
            wrong.append(f"the sweep ended with {sweep.returncode}: {output.read_text(encoding='utf-8')}")
    return killed, wrong


def faults(place: Path, references: dict[str, dict[str, Any]]) -> list[str]:
    """What is not as it should be in a sweep's folder; `references` are the contents of the runs by hand."""
    wrong = []
    finished = Counter(change.run for change in read_manifest(place) if change.state == "finished")
    for run in references | finished:
        if finished[run] != 1:
            wrong.append(f"{run} finished {finished[run]} times")
    for run, reference in references.items():
        folders = list((place / "runs").glob(f"{run}__*"))
        log = (place / "logs" / f"{run}.log").read_text(encoding="utf-8")
        times = log.count(f": {LAST}, ")
        if len(folders) > 1 or times > 1:
            wrong.append(f"{run} was done {times} times, in {len(folders)} folders")
        wrong += [f"{run}: {name}" for name in differences(content(folders[0], LAST), reference)]
    return wrong


def main(settings: Settings) -> None:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that points are purged is as it should be
    os.environ |= {"OMP_NUM_THREADS": "1"}
    rng = random.Random(settings.seed)
    runs = len(GAMES) * len(SEEDS) * (1 + len(FORKS))
    kills_of_ale = settings.kills // 2
    failed = False
    for backend, kills in (("sb3", settings.kills - kills_of_ale), ("ale", kills_of_ale)):
        killed, wrong = sweep_and_compare(backend, kills, settings, rng)
        failed = failed or bool(wrong)
        print(f"{backend}: {runs} runs, killed {dict(killed)}; wrong: {wrong or 'nothing'}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    with ends_in_one_line():
        main(tyro.cli(Settings, description=__doc__, args=words_given()))
