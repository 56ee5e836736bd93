"""How much longer do two runs take in a sweep than when they are started by hand at the same time?

    python benchmarks/sweep_overhead.py --steps 50000 --pairs 3

By hand and as a sweep they run in turn, with the same flags, one thread each. Prints the wall time of both
until all is done, a sweep's comparison included; and how long the runs themselves took, from the first
point of their curves to the last, whose ratio shows what Ray takes while they run. What is left is what a
sweep takes once, however long its runs are.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.curves import SPEED
from support.process import ends_in_one_line
from support.run_log import read_scalars
from support.usage import words_given

ROOT = Path(__file__).resolve().parent.parent
GAME = "PhoenixNoFrameskip-v4"
SEEDS = ("1", "2")
FLAGS = """--env-backend ale --num-envs 8 --buffer-size 50000 --learning-starts 2000
--exploration-fraction 0.1 --no-cuda""".split()


@dataclass
class Settings:
    steps: int = 50_000
    """of each run"""
    pairs: int = 3
    """how often by hand and as a sweep"""


def by_hand(place: Path, flags: list[str]) -> None:
    script = (sys.executable, str(ROOT / "dqn_injection_atari.py"), "--env-id", GAME)
    runs = []
    for seed in SEEDS:
        command = [*script, "--seed", seed, "--intervention", "none", *flags]
        runs.append(subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL))
    statuses = [run.wait() for run in runs]
    if any(statuses):
        raise RuntimeError("a run by hand has failed")


def as_sweep(place: Path, flags: list[str]) -> None:
    script = (sys.executable, str(ROOT / "sweep.py"), "--name", "x", "--threads-per-run", "1")
    command = [*script, "--env-ids", GAME, "--seeds", *SEEDS, "--arms", "none", "--", *flags]
    subprocess.run(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def seconds_of_runs(place: Path) -> float:
    """Mean seconds from the first to the last point of the runs below a folder."""
    seconds = []
    for path in place.rglob("run.json"):
        _, _, times = read_scalars(path.parent)[SPEED]
        seconds.append(times[-1] - times[0])
    return statistics.mean(seconds)


def main(settings: Settings) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    flags = [*FLAGS, "--total-timesteps", str(settings.steps)]
    wall_ratios = []
    run_ratios = []
    ways = [by_hand, as_sweep]
    for _ in range(settings.pairs):
        found = {}
        for way in ways:
            with tempfile.TemporaryDirectory() as name:
                begun = time.perf_counter()
                way(Path(name), flags)
                found[way] = time.perf_counter() - begun, seconds_of_runs(Path(name))
        ways.reverse()  # the other one is first in the next pair
        hand, hand_runs = found[by_hand]
        sweep, sweep_runs = found[as_sweep]
        wall_ratios.append(sweep / hand)
        run_ratios.append(sweep_runs / hand_runs)
        ratios = f"{wall_ratios[-1]:.3f} times as long, the runs {run_ratios[-1]:.3f} times"
        once = (sweep - sweep_runs) - (hand - hand_runs)
        line = f"by hand {hand:.1f} s, as a sweep {sweep:.1f} s: {ratios}; once {once:.1f} s more"
        print(line, flush=True)
    medians = f"wall time {statistics.median(wall_ratios):.3f}, runs {statistics.median(run_ratios):.3f}"
    print(f"medians: {medians}")


if __name__ == "__main__":
    with ends_in_one_line():
        main(tyro.cli(Settings, description=__doc__, args=words_given()))
