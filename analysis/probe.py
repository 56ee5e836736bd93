"""How well does a saved agent still fit random targets, next to a fresh network (Lyle et al. 2023)?"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis.fitting import (
    CONTENDERS,
    FRESH,
    PROBE_LEARNING_RATE,
    fit,
    make_contender,
    num_injections,
    random_targets,
    read_subject,
    relative_error,
    replayed_observations,
    saved_args,
)
from support.machine import pick_device
from support.usage import UsageError


def probe_checkpoint(
    path: Path, observations: int, updates: int, seeds: int, rate: float | None = None
) -> dict[str, Any]:
    """Fitting capacity of the agent in a checkpoint, with and without a fresh injection, against a fresh network's.

    With each seed all three get the same observations, targets (but for `fit`'s offset) and batches. The agent's and the
    injected agent's errors before the first update are one number, since an injection does not change Q. They learn
    at `rate`, by default `PROBE_LEARNING_RATE`, whatever the run's was.

    Returns:
        plain data: "errors" {contender: {"start": (seeds,), "end": (seeds,)}}, mean squared, None where not finite;
        "relative_to_fresh" {contender: see `relative_error`}, of the errors at the end; "sentence"; "remark", None where
        there is none; what it was measured on

    Raises:
        UsageError: the checkpoint is damaged or cannot be probed.
    """
    checkpoint = read_subject(path, PROBE_LEARNING_RATE if rate is None else rate)
    args = saved_args(checkpoint)
    device = pick_device(args.cuda, deterministic=True, tf32=args.tf32)
    obs = replayed_observations(checkpoint, observations, device)
    errors: dict[str, dict[str, list[float]]] = {name: {"start": [], "end": []} for name in CONTENDERS}
    for seed in tqdm(range(seeds), desc=f"probing {path}", leave=False, disable=None):
        rng = np.random.default_rng(seed)
        for_targets, for_contenders = rng.integers(2**30, size=2).tolist()
        batches = rng.integers(len(obs), size=(updates, args.batch_size))
        targets = random_targets(make_contender(FRESH, checkpoint, for_targets, device).q_network, obs)
        for name, of_one in errors.items():
            start, end = fit(make_contender(name, checkpoint, for_contenders, device), obs, targets, batches)
            of_one["start"].append(start)
            of_one["end"].append(end)
    result = {
        "checkpoint": str(path),
        "env_id": args.env_id,
        "run_seed": args.seed,
        "step": checkpoint.step,
        "injections": num_injections(checkpoint),
        "learning_rate": args.learning_rate,
        "probe_observations": observations,
        "probe_updates": updates,
        "probe_seeds": seeds,
        "errors": {
            name: {when: [e if math.isfinite(e) else None for e in values] for when, values in of_one.items()}
            for name, of_one in errors.items()
        },
        "relative_to_fresh": {
            name: relative_error(errors[name]["end"], errors[FRESH]["end"])
            for name in CONTENDERS
            if name != FRESH
        },
    }
    return result | {"sentence": probe_in_words(result), "remark": remark(args.learning_rate)}


def times(relative: dict[str, Any]) -> str:
    """`1.23× [1.01, 1.50]`, without brackets where there is no interval."""
    interval = "" if relative["interval"] is None else " [{:.3g}, {:.3g}]".format(*relative["interval"])
    return f"{relative['ratio']:.3g}×{interval}"


def remark(rate: float) -> str | None:
    """What to know of the learning rate of a probe of one target; None at the default and below."""
    if rate <= PROBE_LEARNING_RATE:
        return None
    return (
        f"at learning rate {rate:g} an agent may fit well that has lost plasticity: with enough updates a high rate "
        f"fits anything; leave out --probe-learning-rate for {PROBE_LEARNING_RATE:g}"
    )


def probe_in_words(result: dict[str, Any]) -> str:
    """What a result of `probe_checkpoint` says, and what it cannot say, in one sentence."""

    def against_fresh(name: str) -> str:
        relative, ends = result["relative_to_fresh"][name], result["errors"][name]["end"]
        if relative is None:
            return f"not to be compared (diverged with {ends.count(None)} of {len(ends)} seeds)"
        if (interval := relative["interval"]) is None:
            return f"{times(relative)} a fresh network's (one seed, no interval)"
        verdict = "worse" if interval[0] > 1 else "better" if interval[1] < 1 else "no clear difference"
        return f"{times(relative)} a fresh network's ({verdict})"

    fresh, updates = result["errors"][FRESH], result["probe_updates"]
    if None in fresh["end"]:
        return "no answer: a fresh network diverges, lower --probe-learning-rate"
    removed = 1 - sum(fresh["end"]) / sum(fresh["start"])
    if removed < -0.1:
        grown = f"a fresh network's error grew by {-removed:.0%} in {updates:,} updates"
        return f"no answer: {grown}, lower --probe-learning-rate"
    if removed < 0.1:
        little = f"a fresh network loses only {max(removed, 0):.0%} of its error in {updates:,} updates"
        return f"no answer: {little}, raise --probe-updates"
    return (
        f"after {updates:,} updates towards random targets the agent's error is {against_fresh('agent')}, with a fresh "
        f"injection it is {against_fresh('agent, injected')}; the fresh network's own error fell by {removed:.0%}"
    )


def probe_table(result: dict[str, Any]) -> str:
    """One line per contender: error at start and end, averaged over seeds, its multiple of a fresh network's, and per seed."""

    def mean(errors: list[float | None]) -> str:
        finite = [error for error in errors if error is not None]
        return f"{np.mean(finite):.3g}" if len(finite) == len(errors) else "diverged"

    rows = [("", "error at start", "at end", "relative to fresh [95%]", "per seed")]
    for name, of_one in result["errors"].items():
        relative = result["relative_to_fresh"].get(name)
        ratios = (
            (times(relative), ", ".join(f"{ratio:.3g}" for ratio in relative["per_seed"]))
            if relative
            else ("–", "–")
        )
        rows.append((name, mean(of_one["start"]), mean(of_one["end"]), *ratios))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def each_probed(paths: Iterable[str], measure: Callable[[Path], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is measured at each checkpoint, once; those that cannot be probed are named and left out.

    Raises:
        UsageError: no checkpoint can be probed.
    """
    left_out, found = [], False
    for path in dict.fromkeys(map(Path, paths)):
        try:
            result = measure(path)
        except UsageError as error:
            left_out.append(str(error))
            print(f"left out: {error}", flush=True)
            continue
        found = True
        yield result
    if not found:
        reason = left_out[0] if left_out else "give checkpoints, runs/FOLDER/checkpoint-STEP"
        raise UsageError(f"no checkpoint to probe; {reason}")


def probe(
    paths: Iterable[str],
    observations: int,
    updates: int,
    seeds: int,
    rate: float | None = None,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Prints and returns `probe_checkpoint` of every checkpoint; those that cannot be probed are named and left out.

    With `out`, they are also written beside it, as JSON.

    Raises:
        UsageError: no checkpoint can be probed.
        OSError: the results cannot be written.
    """
    results = []
    for result in each_probed(paths, lambda path: probe_checkpoint(path, observations, updates, seeds, rate)):
        results.append(result)
        injections = f"{result['injections']} injection{'s' * (result['injections'] != 1)}"
        print(f"{result['checkpoint']}: {result['env_id']}, step {result['step']:,}, {injections} so far")
        print(f"{probe_table(result)}\n{result['sentence']}", flush=True)
        if result["remark"] is not None:
            print(f"remark: {result['remark']}", flush=True)
    if out is not None:
        write_json(results, out.with_suffix(".json"))
        print(f"wrote {out.with_suffix('.json')}")
    return results


def write_json(results: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
