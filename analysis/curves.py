"""What runs have logged, read from their folders; and as small CSV files, to be kept where the runs are too large to be."""

import csv
import functools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dqn_injection_atari import Args
from support.run_log import read_scalars
from support.usage import UsageError, reading

SPEED = "charts/SPS"  # mean over the run, up to its last step
LENGTH = "charts/episodic_length"
COMPARED = ("charts/episodic_return", LENGTH, "charts/games_cut", "eval/", "injection/", "plasticity/")  # how their tags begin


@dataclass(frozen=True)
class Run:
    """What a run has logged: {tag: (2, K) float64}, K steps and K values in the order of logging."""

    folder: str
    args: Args
    scalars: dict[str, np.ndarray]

    @functools.cached_property
    def last_step(self) -> int:
        return int(max(steps.max() for steps, _ in self.scalars.values()))

    def between(self, tag: str, after: int, upto: float) -> np.ndarray:
        """(2, K) points of `tag` with after < step ≤ upto."""
        points = self.scalars.get(tag, np.empty((2, 0)))
        return points[:, (points[0] > after) & (points[0] <= upto)]

    def undefined(self, tag: str) -> np.ndarray:
        """(K,) steps at which a measure of plasticity had no value, after it once had one: others were logged there."""
        own, measured = (
            self.scalars[tag],
            [points[0] for name, points in self.scalars.items() if name.startswith("plasticity/")],
        )
        missing = np.setdiff1d(np.concatenate([*measured, own[0]]), own[0, np.isfinite(own[1])])
        return missing[missing > own[0].min()] if tag.startswith("plasticity/") else np.empty(0)

    def unreported(self, after: int, upto: int) -> int:
        """How many training games in after < step ≤ upto have no return there: cut by new games, or going on at its end."""
        steps, games = self.between("charts/games_cut", after, upto)
        return int(games.sum()) + (0 if upto in steps or upto >= self.args.total_timesteps else self.args.num_envs)

    def share_unreported(self, after: int, upto: int) -> float:
        """Share of the games in after < step ≤ upto that have no return there, or of the steps in them, if that is more."""
        ended, cut = self.between("charts/episodic_return", after, upto).shape[1], self.unreported(after, upto)
        shares = [cut / (cut + ended) if cut else 0.0]
        if cut and LENGTH in self.scalars:
            ends, lengths = self.between(LENGTH, after, upto)
            within = np.minimum(lengths, (ends - after) / self.args.num_envs)  # of a game that began before, what came after
            shares.append(1 - float(within.sum()) / (upto - after))
        return max(shares)


def read_run(folder: str, metric: str) -> Run:
    """The arguments and scalars of a run.

    Raises:
        UsageError: it is no run's folder, it is damaged, or it has logged no `metric` yet, or one that is not finite.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no run's folder, it has no run.json: the run is left out")
    with reading(path, "a run's arguments", "the run is left out"):
        args = Args(**json.loads(path.read_text(encoding="utf-8"))["args"])
    scalars = {tag: points[:2] for tag, points in read_scalars(path.parent, "the run is left out").items()}
    return check_metric(Run(folder, args, scalars), metric)


def check_metric(run: Run, metric: str) -> Run:
    """The run, if it can be compared.

    Raises:
        UsageError: it has logged no `metric` yet, or one that is not finite.
    """
    if metric not in run.scalars:
        raise UsageError(f"{run.folder} has logged no {metric} yet: the run is left out")
    if not np.isfinite(run.scalars[metric]).all():
        raise UsageError(f"{run.folder} has logged a {metric} that is not finite: the run is left out")
    return run


def write_curves(runs: Sequence[Run], path: Path) -> None:
    """Writes the curves of an arm's runs, those that comparisons look at, and of the speed the last point.

    A line `# {...}` for each run holds its arguments, as JSON. Below them is a table: `seed`, `step`, and a column for each
    curve, those with most points first and the speed last, with six digits of its values. A field is empty where that curve
    has no point, and left out where all further ones are empty, too.

    Raises:
        OSError: it cannot be written.
    """
    points = Counter[str]()
    for run in runs:
        points.update({tag: values.shape[1] for tag, values in run.scalars.items() if tag.startswith(COMPARED)})
    tags = [*sorted(points, key=lambda tag: (-points[tag], tag)), SPEED]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        for run in runs:
            fork = run.args.fork and "/".join(Path(run.args.fork).parts[-2:])  # without the folders of this machine
            file.write(f"# {json.dumps(asdict(run.args) | {'fork': fork})}\n")
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["seed", "step", *tags])
        for run in runs:
            rows: dict[int, dict[str, str]] = defaultdict(dict)
            for tag in tags:
                for step, value in run.scalars.get(tag, np.empty((2, 0))).T[-1 if tag == SPEED else 0 :]:
                    rows[int(step)][tag] = f"{value:.6g}"
            for step in sorted(rows):
                last = max(tags.index(tag) for tag in rows[step])
                table.writerow([run.args.seed, step, *(rows[step].get(tag, "") for tag in tags[: last + 1])])


def read_curves(path: Path, metric: str) -> list[Run]:
    """The runs in a file of `write_curves`.

    Raises:
        UsageError: it is none, or damaged, or a run in it has logged no `metric`.
    """
    with (
        reading(path, "curves of runs", "give a file that compare.py --export wrote"),
        open(path, encoding="utf-8", newline="") as file,
    ):
        lines = file.read().splitlines()
        every = [Args(**json.loads(line[2:])) for line in lines if line.startswith("# ")]
        points: dict[int, dict[str, list[tuple[float, float]]]] = {args.seed: defaultdict(list) for args in every}
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            seed, step = int(row.pop("seed")), int(row.pop("step"))
            for tag, value in row.items():
                if value:
                    points[seed][tag].append((step, float(value)))
    if not every:
        raise UsageError(f"{path} holds no runs: give a file that compare.py --export wrote")
    curves = [{tag: np.array(of_one).T for tag, of_one in points[args.seed].items()} for args in every]
    return [check_metric(Run(f"{path} (seed {a.seed})", a, scalars), metric) for a, scalars in zip(every, curves, strict=True)]
