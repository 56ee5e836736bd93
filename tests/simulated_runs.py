"""Runs as their logs would read, in memory or as folders."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from conftest import variant
from torch.utils.tensorboard import summary

from analysis.arms import RecordedRun
from analysis.curves import lineage_in
from dqn_injection_atari import Args
from support.run_log import Curves

INJECTION, TOTAL = 1_000, 3_000
RETURN = "charts/episodic_return"
NORM = {"injection_trigger": "norm", "injection_step": ()}
PHOENIX, ALIEN = "PhoenixNoFrameskip-v4", "AlienNoFrameskip-v4"
TETRIS = variant("TetrisNoFrameskip-v5", PHOENIX, game="tetris")  # of which no human score is known


def make_run(name, points, last=None, identity=None, **args):
    """A run with `points` {tag: [(step, value), ...]}, whose log reaches step `last`, or its end.

    `identity` is what its run.json says of where it comes from; without one its folder is known.
    """
    args = Args(**{"total_timesteps": TOTAL, "injection_step": (INJECTION,), **args})
    points = points | {"charts/SPS": [(args.total_timesteps if last is None else last, 100.0)]}
    scalars = {tag: np.array(pairs, float).T for tag, pairs in points.items() if pairs}
    return RecordedRun(f"runs/{name}", args, scalars, lineage_in(identity or {"folder": name}, args))


def known(name, *history):
    """The identity of a run in a folder, that was others before: (name, step, seed), the newest first."""
    ancestors = []
    for origin, step, seed in history:
        ancestors.append({"run": f"id of {origin}", "folder": origin, "step": step, "seed": seed})
    return {"run": f"id of {name}", "folder": name, "history": ancestors}


def write(run):
    """Writes a run's folder as training does, and returns it."""
    folder = Path(run.folder)
    folder.mkdir(parents=True)
    itself, *history = run.lineage
    written = {"run": itself.run or folder.name, "args": asdict(run.args)}
    if itself.run is not None:
        written["history"] = [asdict(before) for before in history]
    (folder / "run.json").write_text(json.dumps(written), encoding="utf-8")
    curves = Curves(folder, 0)
    points = [(int(step), tag, value) for tag, pairs in run.scalars.items() for step, value in pairs.T]
    for step, tag, value in sorted(points, key=lambda point: point[0]):
        curves.add(summary.scalar(tag, value), step)
    curves.flush()
    curves.close()
    return run.folder


def write_run(name, points, last=None, **args):
    return write(make_run(name, points, last, **args))


def games(seed, after, effect=0.0, upto=TOTAL):
    """A game every 100 steps: the seed's own before the injection, later of the generator (seed, after)."""
    before = np.random.default_rng(seed)
    later = np.random.default_rng([seed, after])
    level = 100 + 10 * before.normal()
    points = []
    for step in range(100, upto + 1, 100):
        change = before.normal() if step <= INJECTION else effect + later.normal()
        points.append((step, level + change))
    return points


def make_arms(seeds=(1, 2, 3), effect=50.0, prefix="", **args):
    """Runs with and without injection, of one history per seed."""
    runs = []
    for seed in seeds:
        without = {RETURN: games(seed, False)}
        injected = {RETURN: games(seed, True, effect)}
        runs.append(make_run(f"{prefix}baseline-{seed}", without, seed=seed, intervention="none", **args))
        runs.append(make_run(f"{prefix}injected-{seed}", injected, seed=seed, **args))
    return runs


def make_games(*env_ids, seeds=(1, 2, 3), **args):
    """Those of several games."""
    return [
        run
        for env_id in env_ids
        for run in make_arms(seeds, prefix=f"{env_id}-{len(args)}-", env_id=env_id, **args)
    ]


def make_norm_arms(firsts, upto=TOTAL):
    """Runs without, and with injections {seed: steps} that the norm decided, one up to the seed's first."""
    runs = []
    for seed, steps in firsts.items():
        baseline = games(seed, 0, upto=upto)
        later = games(seed, 1, 50.0, upto=upto)
        first = min(steps, default=TOTAL)
        points = {
            RETURN: baseline[: first // 100] + later[first // 100 :],
            "injection/step": [(step, step) for step in steps],
        }
        runs.append(make_run(f"n{seed}", points, upto, seed=seed, **NORM))
        runs.append(make_run(f"b{seed}", {RETURN: baseline}, upto, seed=seed, intervention="none"))
    return runs
