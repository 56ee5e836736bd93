"""What runs have logged, read from their folders; and as small CSV files, kept where runs are too large."""

import codecs
import csv
import functools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dqn_injection_atari import Args
from support.machine import replacing
from support.run_log import read_scalars
from support.usage import UsageError, reading

TRAINING_RETURN = "charts/episodic_return"
LENGTH = "charts/episodic_length"
GAMES_CUT = "charts/games_cut"
SPEED = "charts/SPS"  # mean over the run, up to its last step
PLASTICITY = "plasticity/"  # how the tags of measures begin; in a CSV file they have six digits
POLICY_CHURN = "plasticity/policy_churn"  # is measured before a sync, at other steps than the others
COMPARED = (TRAINING_RETURN, LENGTH, GAMES_CUT, "eval/", "injection/", PLASTICITY)  # how their tags begin


@dataclass(frozen=True)
class Ancestor:
    """A run, by its id and its folder's name, as far as these are known; another run was it up to a step."""

    run: str | None
    folder: str | None
    step: float  # infinity for the run itself
    seed: int | None

    def is_run(self, other: "Ancestor") -> bool:
        """Whether both are known to be the same run."""
        if self.run is not None and other.run is not None:
            return self.run == other.run
        return self.folder is not None and self.folder == other.folder


def ancestors_on(path: str | None) -> tuple[Ancestor, ...]:
    """The run that one was forked from, as far as the path of the checkpoint tells; none without a path."""
    if path is None:
        return ()
    place = re.search(r"([^/]+)/checkpoint-(\d+)$", Path(path).as_posix())
    if place is None or place[1] == "..":
        return (Ancestor(run=None, folder=None, step=0, seed=None),)
    name = re.search(r"__(\d+)__\d+(-\d+)?$", place[1])  # game, exp_name, seed and time, as folders are named
    seed = int(name[1]) if name else None
    return (Ancestor(run=None, folder=place[1], step=int(place[2]), seed=seed),)


def lineage_in(written: dict[str, Any], args: Args) -> tuple[Ancestor, ...]:
    """A run, then those that it was before, from what a file holds, or from the path of a fork alone."""
    itself = Ancestor(written.get("run"), written.get("folder"), math.inf, args.seed)
    if "history" not in written:
        return (itself, *ancestors_on(args.fork))
    return (itself, *(Ancestor(**before) for before in written["history"]))


@dataclass(frozen=True)
class RecordedRun:
    """What a run has logged: {tag: (2, K) float64}, K steps and K values in the order of logging."""

    folder: str
    args: Args
    scalars: dict[str, np.ndarray]
    lineage: tuple[Ancestor, ...]
    """itself, then the runs that it was before, the newest first"""

    @functools.cached_property
    def last_step(self) -> int:
        return int(max(steps.max() for steps, _ in self.scalars.values()))

    def between(self, tag: str, after: int, upto: float) -> np.ndarray:
        """(2, K) points of `tag` with after < step ≤ upto."""
        points = self.scalars.get(tag, np.empty((2, 0)))
        return points[:, (points[0] > after) & (points[0] <= upto)]

    def undefined(self, tag: str) -> np.ndarray:
        """(K,) steps, after its first value, at which a measure of plasticity has none and others do."""
        if not tag.startswith(PLASTICITY) or tag == POLICY_CHURN:
            return np.empty(0)
        steps, values = self.scalars[tag]
        measured = []
        for name, points in self.scalars.items():
            if name.startswith(PLASTICITY) and name != POLICY_CHURN:
                measured.append(points[0])
        missing = np.setdiff1d(np.concatenate(measured), steps[np.isfinite(values)])
        return missing[missing > steps.min()]

    def unreported(self, after: int, upto: int) -> int:
        """How many training games in after < step ≤ upto have no return there: cut, or still going."""
        steps, games = self.between(GAMES_CUT, after, upto)
        cut = int(games.sum())
        if upto in steps or upto >= self.args.total_timesteps:
            return cut
        return cut + self.args.num_envs

    def share_unreported(self, after: int, upto: int) -> float:
        """Share of the games in after < step ≤ upto that have no return there; of steps, if that is more."""
        cut = self.unreported(after, upto)
        if cut == 0:
            return 0.0
        ended = self.between(TRAINING_RETURN, after, upto).shape[1]
        of_games = cut / (cut + ended)
        if LENGTH not in self.scalars:
            return of_games
        ends, lengths = self.between(LENGTH, after, upto)
        # of a game that began before, what lies in the window
        played = np.minimum(lengths, (ends - after) / self.args.num_envs)
        of_steps = 1 - float(played.sum()) / (upto - after)
        return max(of_games, of_steps)


def read_run(folder: str, metric: str, end: str = "the run is left out") -> RecordedRun:
    """What a run has logged. A UsageError where it is no run's folder, or damaged, or see `check_metric`.

    `end` is of the error's message: what becomes of the run, or what to do.
    """
    path = Path(folder) / "run.json"
    with reading(path, "a run's arguments", end):
        try:
            path.stat()
            is_run = True
        except (FileNotFoundError, NotADirectoryError):
            is_run = False
    if not is_run:
        raise UsageError(f"{folder} is no run's folder, it has no run.json: {end}")
    with reading(path, "a run's arguments", end):
        written = json.loads(path.read_text(encoding="utf-8"))
        args = Args(**written["args"])
        lineage = lineage_in(written | {"folder": path.resolve().parent.name}, args)
    scalars = {tag: points[:2] for tag, points in read_scalars(path.parent, end).items()}
    return check_metric(RecordedRun(folder, args, scalars, lineage), metric, end)


def check_metric(run: RecordedRun, metric: str, end: str = "the run is left out") -> RecordedRun:
    """The run; a UsageError where it has logged no `metric` yet, or one that is not finite."""
    if metric not in run.scalars:
        raise UsageError(f"{run.folder} has logged no {metric} yet: {end}")
    if not np.isfinite(run.scalars[metric]).all():
        raise UsageError(f"{run.folder} has logged a {metric} that is not finite: {end}")
    return run


def curves_to_write(run: RecordedRun) -> dict[str, np.ndarray]:
    """{tag: (2, K)} of the curves of a run that a file of `write_curves` holds."""
    curves = {tag: points for tag, points in run.scalars.items() if tag.startswith(COMPARED)}
    if SPEED in run.scalars:
        curves[SPEED] = run.scalars[SPEED][:, -1:]
    # so that it is known how far the run is
    if all(steps.max() < run.last_step for steps, _ in curves.values()):
        furthest = max(run.scalars, key=lambda tag: run.scalars[tag][0].max())
        curves[furthest] = run.scalars[furthest][:, -1:]
    return curves


def in_digits(tag: str, value: float) -> str:
    """A value as a CSV file has it: 464, 0.123457."""
    if tag.startswith(PLASTICITY):
        return f"{value:.6g}"
    return np.format_float_positional(value, trim="-")


def header_of(run: RecordedRun) -> dict[str, Any]:
    """What a file of `write_curves` says of a run beside its curves: its arguments and its lineage."""
    header = asdict(run.args)
    if run.args.fork is not None:
        header["fork"] = "/".join(Path(run.args.fork).parts[-2:])  # without the folders of this machine
    itself, *history = run.lineage
    return header | {"run": itself.run, "folder": itself.folder, "history": list(map(asdict, history))}


def rows_of(curves: dict[str, np.ndarray]) -> list[tuple[int, dict[str, str]]]:
    """(step, {tag: value in digits}) in order; several points of a curve at a step have a row each."""
    rows: dict[tuple[int, int], dict[str, str]] = defaultdict(dict)
    for tag, points in curves.items():
        seen = Counter[int]()
        for step, value in points.T:
            number = seen[int(step)]
            rows[int(step), number][tag] = in_digits(tag, value)
            seen[int(step)] += 1
    return [(step, rows[step, number]) for step, number in sorted(rows)]


def write_curves(runs: Sequence[RecordedRun], path: Path) -> None:
    """Writes the curves of an arm's runs, those that comparisons look at, and of the speed the last point.

    A line `# {...}` for each run holds its `header_of`, as JSON. Below them is a table: `seed`, `step`, and a
    column for each curve, those with most points first and the speed last, measures of plasticity with six
    digits. A field is empty where that curve has no point, and left out where all further ones are empty.
    """
    curves = [curves_to_write(run) for run in runs]
    points = Counter[str]()
    for curves_of_run in curves:
        points.update({tag: values.shape[1] for tag, values in curves_of_run.items() if tag != SPEED})
    tags = sorted(points, key=lambda tag: (-points[tag], tag))
    tags.append(SPEED)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the runs may have been read from the file itself
    with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        for run in runs:
            file.write(f"# {json.dumps(header_of(run))}\n")
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["seed", "step", *tags])
        for run, curves_of_run in zip(runs, curves, strict=True):
            for step, row in rows_of(curves_of_run):
                last = max(tags.index(tag) for tag in row)
                fields = [row.get(tag, "") for tag in tags[: last + 1]]
                table.writerow([run.args.seed, step, *fields])


def lines_of(path: Path) -> list[str]:
    """The lines of a file of `write_curves`, whatever ends them.

    They are without what changes no number: a byte-order mark, empty lines and columns, spaces around cells.
    A ValueError where a spreadsheet has saved it and may have changed numbers.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("a spreadsheet has saved it again, with the byte-order mark of UTF-16")
    stripped = (line.lstrip().rstrip(", \t") for line in content.decode("utf-8-sig").splitlines())
    lines = [line for line in stripped if line]
    for line in lines:
        if line.startswith(('"#', "'#")):
            raise ValueError("a spreadsheet has saved it again, with its first lines in quotes")
        if re.match(r"\W*seed\W*[;\t]", line):
            raise ValueError("a spreadsheet has saved it again, with other separators than commas")
    return lines


def run_in(line: str, path: Path) -> RecordedRun:
    """The run that a line `# {...}` tells of, still without curves."""
    header = json.loads(line.removeprefix("# "))
    written = {name: header.pop(name) for name in ("run", "folder", "history") if name in header}
    args = Args(**header)
    return RecordedRun(f"{path} (seed {args.seed})", args, {}, lineage_in(written, args))


def points_in(table: Iterable[str], seeds: Iterable[int]) -> dict[int, dict[str, np.ndarray]]:
    """{seed: {tag: (2, K) float64}} of the lines below those."""
    points: dict[int, dict[str, list[tuple[int, float]]]] = {seed: defaultdict(list) for seed in seeds}
    for row in csv.DictReader(table, skipinitialspace=True):
        if None in row:
            raise ValueError("a row has more fields than there are columns")
        seed = int(row.pop("seed"))
        step = int(row.pop("step"))
        for tag, field in row.items():
            if not field:
                continue
            if "," in field:
                raise ValueError(f"a spreadsheet has saved it again, with the number {field}")
            points[seed][tag].append((step, float(field)))
    curves = {}
    for seed, points_of_run in points.items():
        curves[seed] = {tag: np.array(pairs).T for tag, pairs in points_of_run.items()}
    return curves


def read_curves(path: Path) -> list[RecordedRun]:
    """The runs in a file of `write_curves`; a UsageError where it is none, or damaged."""
    fix = "give the file that compare.py --export wrote, in the version of this project that wrote it"
    with reading(path, "curves of runs", fix):
        lines = lines_of(path)
        runs = [run_in(line, path) for line in lines if line.startswith("# ")]
        if not runs:
            raise ValueError("it holds no runs")
        seeds = [run.args.seed for run in runs]
        if len(seeds) > len(set(seeds)):
            raise ValueError("it holds two runs of one seed")
        curves = points_in((line for line in lines if not line.startswith("#")), seeds)
    return [replace(run, scalars=curves[run.args.seed]) for run in runs]
