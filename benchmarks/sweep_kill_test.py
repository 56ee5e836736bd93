"""Runs a small sweep, 2 games × 2 seeds × 3 arms, with kills (SIGKILL), and compares all of it with runs started by hand.

    python benchmarks/sweep_kill_test.py --kills 20 --sweep-kills 3

At random moments a training or a Ray worker is killed; and some times the sweep itself, which is then started again. At the
end every run is compared bit by bit with the one that a user starts by hand, without a sweep, and nobody touches. Exits with
1 where anything differs, a run was done twice, or the manifest has a run as finished more or less than once.
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

import psutil
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.kill_test import FLAGS, content, differences, finish
from orchestration.manifest import read_manifest
from support.process import ends_in_one_line
from support.usage import words_given

SWEEP = Path(__file__).resolve().parent.parent / "sweep.py"
GAMES, SEEDS, FORKS = (
    ("PhoenixNoFrameskip-v4", "BoxingNoFrameskip-v4"),
    ("1", "2"),
    ("injection", "reset-head"),
)
LAST = "checkpoint-1600"


def trainings(place: Path) -> list[psutil.Process]:
    """Processes that train in a sweep's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == place.absolute() and "dqn_injection_atari.py" in " ".join(
                process.cmdline()
            ):
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
            own = f"{game}-{seed}"
            trunk = done(f"{own}-none", *flags, "--env-id", game, "--seed", seed, "--intervention", "none")
            yield f"{game}__none__{seed}", trunk
            (checkpoint,) = (path for path in trunk.glob("checkpoint-80[0-9]"))  # at the injection, kept
            for arm in FORKS:
                yield (
                    f"{game}__{arm}__{seed}",
                    done(f"{own}-{arm}", "--fork", str(checkpoint), "--intervention", arm),
                )


def kill_something(place: Path, sweep: subprocess.Popen, rng: random.Random) -> list[str]:
    """Kills a training or its worker, after a moment; returns which, nothing where there was none."""
    time.sleep(rng.uniform(0, 4))
    if sweep.poll() is not None or not (going := trainings(place)):
        return []
    victim, what = rng.choice(going), rng.choice(("training", "worker"))
    try:
        process = victim if what == "training" else victim.parent()
        if process is None or (what == "worker" and "ray::" not in " ".join(process.cmdline())):
            return []  # its worker has gone already
        process.kill()
    except psutil.NoSuchProcess:
        return []
    return [what]


@dataclass
class Settings:
    kills: int = 20
    """kills of trainings and workers in all, half of them on each backend"""
    sweep_kills: int = 3
    """kills of the sweep itself, on each backend"""
    seed: int = 0
    """of the random moments"""


def sweep_and_compare(
    backend: str, kills: int, settings: Settings, rng: random.Random
) -> tuple[Counter[str], list[str]]:
    """Returns what was killed how often, and what is not as it should be."""
    killed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        hand, place = Path(name, "hand"), Path(name, "sweeps", "x")
        hand.mkdir()
        flags = [*FLAGS, "--env-backend", backend]
        references = {name: content(folder, LAST) for name, folder in by_hand(hand, flags)}
        arguments = ["--name", "x", "--env-ids", *GAMES, "--seeds", *SEEDS, "--arms", "none", *FORKS]
        arguments += [
            "--retries",
            "1000",
            "--retry-pause",
            "0.1",
            "--memory-per-run",
            "0.5",
            "--threads-per-run",
            "1",
        ]
        command = [sys.executable, str(SWEEP), *arguments, "--", *flags]
        with open(Path(name, "said"), "w", encoding="utf-8") as said:
            for part in range(settings.sweep_kills + 1):
                sweep = subprocess.Popen(command, cwd=name, stdout=said, stderr=subprocess.STDOUT)
                due = kills * (part + 1) // (settings.sweep_kills + 1)
                while sweep.poll() is None and killed["training"] + killed["worker"] < due:
                    killed.update(kill_something(place, sweep, rng))
                time.sleep(rng.uniform(0, 6) if part < settings.sweep_kills else 0)
                if part < settings.sweep_kills and sweep.poll() is None:
                    sweep.kill()
                    killed["sweep"] += 1
                sweep.wait()
        wrong = ["it ended before all kills were made"] * (killed.total() < kills + settings.sweep_kills)
        wrong += [
            f"the sweep ended with {sweep.returncode}: {Path(name, 'said').read_text(encoding='utf-8')}"
        ] * bool(sweep.returncode)
        finished = Counter(change.run for change in read_manifest(place) if change.state == "finished")
        wrong += [
            f"{run} finished {finished[run]} times"
            for run in {**references, **finished}
            if finished[run] != 1
        ]
        for run, reference in references.items():
            folders, log = (
                list((place / "runs").glob(f"{run}__*")),
                (place / "logs" / f"{run}.log").read_text(encoding="utf-8"),
            )
            if max(len(folders), times := log.count(f": {LAST}, ")) > 1:
                wrong.append(f"{run} was done {times} times, in {len(folders)} folders")
            wrong += [f"{run}: {what}" for what in differences(content(folders[0], LAST), reference)]
    return killed, wrong


def main(settings: Settings) -> None:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that points are purged is as it should be
    os.environ |= {"OMP_NUM_THREADS": "1"}
    rng, failures = random.Random(settings.seed), 0
    for backend, kills in (("sb3", settings.kills - settings.kills // 2), ("ale", settings.kills // 2)):
        killed, wrong = sweep_and_compare(backend, kills, settings, rng)
        failures += bool(wrong)
        counts = len(GAMES) * len(SEEDS) * (1 + len(FORKS))
        print(f"{backend}: {counts} runs, killed {dict(killed)}; wrong: {wrong or 'nothing'}", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    with ends_in_one_line():
        main(tyro.cli(Settings, description=__doc__, args=words_given()))
