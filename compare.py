"""Has the agent lost plasticity? Compares runs of dqn_injection_atari.py with and without an injection.

    python compare.py runs/A runs/B ... --out img/phoenix.png

Runs with the same arguments but for the seed are an arm. For two arms that differ in nothing but the injection, the verdict
is on the difference in mean return, with − without, over all that is logged in a window after the injection: one mean per
run, and a 95% t interval over seeds. Where the two arms' runs of a seed are one run up to the injection, as forks are, it is
the interval of the differences within seeds, else Welch's. There is one window: from the injection to the last step that all
these runs have reached, or --window steps long. Where the norm decided when to inject, it begins at the latest of the runs'
first injections. A head reset, or shrink and perturb, is compared in the same way. Comparisons that differ in the game alone
are also aggregated, as human-normalised scores.

Written beside --out: the figure of return, one of the plasticity measures (NAME_plasticity), a table (NAME.md) and all numbers
(NAME.json). Runs may still be going. 1 step = 1 decision of the agent in 1 environment = 4 emulator frames.

    python compare.py --probe runs/A/checkpoint-5000000 ...

asks saved agents, in minutes: how well does each fit random targets, as it is and after an injection, next to a fresh
network? That needs no second arm, but says nothing about the return.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge

try:
    from analysis.probe import probe
    from analysis.report import report
    from analysis.runs import runs_in
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: pip install -r requirements-dev.txt")

from support.process import ends_in_one_line
from support.usage import Count, UsageError, check_bounds


@dataclass(frozen=True)
class Settings:
    """What to compare, and how."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders of runs, those under runs/; or of sweeps, those under sweeps/"""
    out: str | None = None
    """where the figure goes (.png, .pdf or .svg); the other files have its name with another ending; by default comparison.png,
    for a sweep in its folder"""
    metric: Literal["charts/episodic_return", "eval/episodic_return"] = "charts/episodic_return"
    """which return is compared: that of every training game, or the mean of every evaluation"""
    window: Annotated[int | None, Ge(1)] = None
    """steps after the injection that count; by default up to the last step that all compared runs have reached"""
    aggregate: Literal["mean", "iqm"] = "mean"
    """what the figures show: mean over seeds and its 95% t interval, or interquartile mean and 95% bootstrap interval, which
    covers less than that with 3 to 5 seeds (Agarwal et al. 2021). The verdict is on means in either case"""
    probe: tuple[str, ...] = ()
    """checkpoints, runs/FOLDER/checkpoint-STEP: how well do these agents still fit random targets? (Lyle et al. 2023)"""
    probe_observations: Count = 512
    """replayed observations to fit targets at"""
    probe_updates: Count = 1_000
    """gradient steps of each network, with the run's batch size and learning rate"""
    probe_seeds: Count = 3
    """repetitions, each with its own targets, batches, fresh weights and injection"""


def main() -> None:
    with ends_in_one_line():
        settings = tyro.cli(Settings, description=__doc__)
        check_bounds(settings)
        if settings.runs and settings.probe:
            raise UsageError("runs and probe exclude each other: give folders of runs, or checkpoints after --probe")
        if settings.probe:
            probe(settings.probe, settings.probe_observations, settings.probe_updates, settings.probe_seeds)
        else:
            folders, place = runs_in(settings.runs)
            out = Path(settings.out) if settings.out is not None else place / "comparison.png"
            report(folders, out, settings.metric, settings.window, settings.aggregate)


if __name__ == "__main__":
    main()
