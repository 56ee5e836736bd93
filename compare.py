"""Has the agent lost plasticity? Compares runs of dqn_injection_atari.py with and without an injection.

    python compare.py runs/A runs/B ... --out phoenix.png

Runs with the same arguments, except for the seed, form an arm. For two arms that differ only in the
injection, the verdict is on the difference in mean return, with − without, in a window after the injection:
one mean per run, and a 95% t interval over seeds. If, for three seeds or more, the two runs of a seed were
one run up to the injection, as forks are, the interval is of the differences within seeds, otherwise it is
Welch's. The window runs from the injection to the last step that all these runs have reached, or is --window
steps long. Runs that have hardly gone beyond the injection do not set its end: they are left out. If the norm
decided when to inject, the window begins at the latest of the runs' first injections. Several verdicts at
once are also corrected for their number (Holm). Below a verdict stands what else could have caused it. Other
interventions, such as a head reset, are compared in the same way. If an arm's control is among the runs
(docs/arms.md), the difference to it is printed, too. Comparisons that differ only in the game are also
aggregated, as human-normalised scores.

Written beside --out: the figure of return, one of the plasticity measures (NAME_plasticity), a table
(NAME.md) and all numbers (NAME.json). Runs may still be going. 1 step = 1 decision of the agent in 1
environment = 4 emulator frames.

    python compare.py --probe runs/A/checkpoint-5000000 ...

asks saved agents, in minutes: how well does each fit random targets, as it is and after an injection, next to
a fresh network? That needs no second arm, but says nothing about the return.

    python compare.py --probe runs/A/checkpoint-5000000 --probe-tasks 40 --out tasks.png
    python compare.py --probe fresh --env-id PhoenixNoFrameskip-v4

takes each through a sequence of random targets, until it has lost its plasticity: until its error has been
above five times its own best, twice in a row. From there on it goes on as it is, as a copy that is injected,
and as one whose head is reset: does an injection restore it (paper, §3)? Without a checkpoint, six fresh
networks do that.

    python compare.py --audit runs/A/checkpoint-5000000
    python compare.py --audit fresh --env-id PhoenixNoFrameskip-v4

does what each arm does, to one agent, and shows what changes: tensors, the optimizer's state, Q, the target
network, what learns from then on. Without a checkpoint the agent has learned a little from random play.
"""

import math
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Interval

try:
    from support.versions import exit_with_wrong_versions

    if __name__ == "__main__":
        exit_with_wrong_versions()
    from analysis.arms import Arm, readable, runs_of
    from analysis.audited_arms import print_audit
    from analysis.canvas import FORMATS
    from analysis.curves import RecordedRun, read_curves, write_curves
    from analysis.fitting import FRESH_SEQUENCE, NO_CHECKPOINT, ONE_TARGET, SEQUENCE, ProbeSettings
    from analysis.probe import probe
    from analysis.report import report
    from analysis.task_sequence import probe_sequence
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    if package in ("analysis", "dqn_injection_atari", "alternatives", "support"):
        fix = "clone or copy the project's whole folder, and run it there"
        sys.exit(f"error: {error.name} is not beside this script: {fix}")
    fix = f"pip install -r requirements-sweep.txt, in {Path(__file__).resolve().parent}"
    sys.exit(f"error: {package} is not installed: {fix}")

from support.process import begin_in_utf8, ends_in_one_line
from support.usage import UsageError, changed_fields, check_bounds, flag, flags_given, words_given

LONGEST_FILE_NAME = 240  # characters; file systems allow 255, and a number and the ending come after it


@dataclass(frozen=True)
class Settings:
    """What to compare, and how."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders of runs, those under runs/; or of sweeps, those under sweeps/; or files that --export wrote"""
    out: str | None = None
    """file of the figure (.png, .pdf or .svg); other files get its name with another ending. By default
    comparison.png, in the sweep's folder for a single sweep; for a sequence of tasks tasks.png. A probe of
    one task draws no figure: it writes its numbers (.json), and only if this is given"""
    metric: Literal["charts/episodic_return", "eval/episodic_return"] = "charts/episodic_return"
    """which return is compared: that of every training game, or the mean of every evaluation"""
    window: Annotated[int | None, Ge(1)] = None
    """steps after the injection that count; by default up to the last that all compared runs have reached"""
    aggregate: Literal["mean", "iqm"] = "mean"
    """what the figures show: mean over seeds and its 95% t interval, or interquartile mean and 95% bootstrap
    interval, which covers less with 3 to 5 seeds (Agarwal et al. 2021). The verdict is always on means"""
    export: str | None = None
    """folder in which to keep each arm's curves as a CSV file; this command takes those in place of runs.
    What comparisons do not look at, such as losses, is left out"""
    probe: tuple[str, ...] = ()
    """checkpoints, runs/FOLDER/checkpoint-STEP, or fresh: how well do they still fit random targets?
    (Lyle et al. 2023)"""
    audit: str | None = None
    """a checkpoint, runs/FOLDER/checkpoint-STEP, or fresh: what does each arm change in the agent?"""
    env_id: str | None = None
    """the game of --probe fresh, whose observations are of random play; or of --audit fresh"""
    probe_tasks: Annotated[int | None, Ge(2)] = None
    """random targets that are fitted one after the other. A network that loses its plasticity on the way is
    followed for five tasks more, and no further. By default a single target, for fresh 40"""
    probe_inject_at: int | None = None
    """task before which a copy is injected, whatever the errors; by default the first one after the errors
    show that the network has lost its plasticity"""
    probe_observations: Annotated[int | None, Ge(1)] = None
    """how many observations to fit targets at: replayed ones, for fresh of random play; by default 512, for
    fresh 256"""
    probe_updates: Annotated[int | None, Ge(1)] = None
    """gradient steps at each target, with the run's batch size; by default 1,000, in a sequence 200"""
    probe_learning_rate: Annotated[float | None, Interval(gt=0, lt=math.inf)] = None
    """learning rate of all networks, whatever the run's was; by default 1e-4, in a sequence of tasks 5e-4,
    for fresh 1e-3. With a higher one, even an agent that has lost plasticity may fit a single target"""
    probe_head_width: Annotated[int | None, Ge(1)] = None
    """hidden units in the head of the networks of --probe fresh; by default 64"""
    probe_seeds: Annotated[int | None, Ge(1)] = None
    """repetitions, each with its own targets, batches, weights and injection; by default 3, for fresh 6"""


def check(settings: Settings, named: Collection[str] = ()) -> None:
    """
    Args:
        named: fields that the command line sets, even to their defaults

    Raises:
        UsageError: a setting contradicts another one, or would have no effect.
    """
    check_bounds(settings)
    if settings.audit is not None:
        check_audit(settings, named)
        return
    fresh = NO_CHECKPOINT in settings.probe
    if settings.runs and settings.probe:
        raise UsageError(
            "runs and probe exclude each other: give folders of runs, or checkpoints after --probe"
        )
    if fresh != (settings.env_id is not None):
        raise UsageError(
            "fresh and env_id belong together: give --probe fresh --env-id PhoenixNoFrameskip-v4, or neither"
        )
    if fresh and len(settings.probe) > 1:
        raise UsageError(
            "fresh networks are probed with other settings than agents: give --probe fresh by itself"
        )
    for name in sorted({*changed_fields(settings, Settings()), *named}):
        if settings.probe and name in ("metric", "window", "aggregate"):
            raise UsageError(f"{name} is of comparisons, a probe makes none: leave out --{name}")
        if not settings.probe and name.startswith("probe_"):
            raise UsageError(
                f"{name} is given, but nothing to probe: give --probe runs/FOLDER/checkpoint-STEP"
            )
    if settings.probe_head_width is not None and not fresh:
        raise UsageError(
            "probe_head_width is of fresh networks, an agent has its own: leave out --probe-head-width"
        )
    if settings.probe_inject_at is not None and not (settings.probe_tasks or fresh):
        raise UsageError("probe_inject_at is a task of a sequence: give --probe-tasks")
    if settings.export is not None and settings.probe:
        fix = "leave out --export, --out NAME.png writes its numbers"
        raise UsageError(f"export keeps curves of runs, a probe has none: {fix}")
    if settings.out is not None and Path(settings.out).suffix not in FORMATS:
        raise UsageError(f"out is {settings.out}, but must end in .png, .pdf or .svg: change --out")


def check_audit(settings: Settings, named: Collection[str]) -> None:
    """
    Raises:
        UsageError: an audit would pass over a setting.
    """
    others = set(changed_fields(settings, Settings())).union(named)
    for name in sorted(others.difference(("audit", "env_id"))):
        fix = f"leave out {flag(name)}"
        if name == "runs":
            fix = "give folders of runs, or one checkpoint after --audit"
        raise UsageError(f"{name} and audit exclude each other: {fix}")
    if settings.audit == NO_CHECKPOINT and settings.env_id is None:
        raise UsageError("an audit of a fresh agent needs a game: give --env-id PhoenixNoFrameskip-v4")
    if settings.audit != NO_CHECKPOINT and settings.env_id is not None:
        raise UsageError("env_id is of a fresh agent, a checkpoint has its own: leave out --env-id")


def runs_in(folders: Sequence[str]) -> tuple[tuple[str, ...], Path]:
    """The folders of runs, a sweep's standing for those in it; and the folder for a comparison of them."""
    runs: list[str] = []
    place = Path()
    for folder in folders:
        if not os.path.isfile(Path(folder, "sweep.json")):  # False, too, where it may not be looked for
            runs.append(folder)
            continue
        runs += sorted(map(str, Path(folder, "runs").glob("[!.]*")))
        if len(folders) == 1:
            place = Path(folder)
    return tuple(runs), place


def file_names(arms: Iterable[Arm]) -> list[str]:
    """A name for a file of each arm, short enough for any file system, and no two alike."""
    names: list[str] = []
    for arm in arms:
        first_choice = readable(f"{arm.game}_{arm.name}")[:LONGEST_FILE_NAME]
        name = first_choice
        number = 1
        while name in names:
            number += 1
            name = f"{first_choice}-{number}"
        names.append(name)
    return names


def is_among(run: RecordedRun, others: Sequence[RecordedRun]) -> bool:
    """Whether it is one of these. A file of an early version knows a run by its arguments alone."""
    itself = run.lineage[0]
    if itself.run is None and itself.folder is None:
        args = replace(run.args, fork=None)  # of which a file has the last folders alone
        return any(args == replace(other.args, fork=None) for other in others)
    return any(itself.is_run(other.lineage[0]) for other in others)


def check_export(files: Iterable[Path], arms: Sequence[Arm], given: Iterable[str]) -> None:
    """
    Args:
        files: to be written, and to be replaced where they are there
        arms: whose runs go into them
        given: files and folders that these were read from

    Raises:
        UsageError: a file that is there holds a run of none of these arms, or cannot be read.
    """
    exported = runs_of(arms)
    sources = {Path(path).resolve() for path in given}
    for path in filter(Path.exists, files):
        try:
            kept = read_curves(path)
        except UsageError as error:
            fix = "give another folder to --export, or move that file away"
            raise UsageError(f"{path} would be replaced, and cannot be read as curves: {fix}") from error
        for run in kept:
            if not is_among(run, exported):
                fix = "give another folder to --export"
                if path.resolve() not in sources:
                    fix = "give that file, too, or another folder to --export"
                raise UsageError(f"{run.folder} would be replaced, and is not among the runs here: {fix}")


def compare_runs(settings: Settings, out: Path | None) -> None:
    """Reports on runs, and keeps the curves of their arms where --export says."""
    folders, place = runs_in(settings.runs)
    out = out or place / "comparison.png"
    arms = report(folders, out, settings.metric, settings.window, settings.aggregate)
    if settings.export is None:
        return
    files = [Path(settings.export, f"{name}.csv") for name in file_names(arms)]
    check_export(files, arms, folders)
    for arm, path in zip(arms, files, strict=True):
        write_curves(arm.runs, path)
        print(f"wrote {path}, {path.stat().st_size / 1e3:,.0f} kB")


def probe_settings(settings: Settings, tasks: int | None) -> ProbeSettings:
    """How networks are probed: as the command line says, else as is usual for what is probed."""
    usual = ONE_TARGET if tasks is None else SEQUENCE
    if NO_CHECKPOINT in settings.probe:
        usual = FRESH_SEQUENCE
    return ProbeSettings(
        observations=settings.probe_observations or usual.observations,
        updates=settings.probe_updates or usual.updates,
        seeds=settings.probe_seeds or usual.seeds,
        learning_rate=settings.probe_learning_rate or usual.learning_rate,
        head_width=settings.probe_head_width or usual.head_width,
    )


def main() -> None:
    with ends_in_one_line():
        settings = tyro.cli(Settings, description=__doc__, args=words_given())
        check(settings, flags_given())
        if settings.audit is not None:
            print_audit(settings.audit, settings.env_id or "")
            return
        out = Path(settings.out) if settings.out is not None else None
        tasks = settings.probe_tasks
        if tasks is None and NO_CHECKPOINT in settings.probe:
            tasks = 40
        how = probe_settings(settings, tasks)
        if not settings.probe:
            compare_runs(settings, out)
        elif tasks is None:
            probe(settings.probe, how, out)
        else:
            env_id = settings.env_id or ""
            place = out or Path("tasks.png")
            probe_sequence(settings.probe, env_id, tasks, settings.probe_inject_at, how, place)


if __name__ == "__main__":
    begin_in_utf8()
    main()
