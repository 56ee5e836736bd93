"""How well does a saved agent still fit random targets, next to a fresh network (Lyle et al. 2023)?"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis import fitting
from analysis.fitting import ProbeSettings
from support.acceleration import prepare_process
from support.machine import replacing
from support.usage import UsageError


def probe_checkpoint(path: Path, settings: ProbeSettings) -> dict[str, Any]:
    """Fitting capacity of the agent in a checkpoint, as it is and injected anew, against a fresh network's.

    With each seed all three get the same observations, targets (but for `fit`'s offset) and batches. An
    injection does not change Q, so both errors of the agent before the first update are one number.

    Returns:
        plain data: "errors" {contender: {"start": (seeds,), "end": (seeds,)}}, mean squared, None where not
        finite; "relative_to_fresh" {contender: see `relative_error`}, of the errors at the end; "sentence";
        "remark", None where there is none; and `measured_on`
    """
    checkpoint = fitting.read_subject(path, settings.learning_rate)
    obs = fitting.observations_for(checkpoint, settings.observations)
    errors: dict[str, dict[str, list[float]]] = {}
    for name in fitting.CONTENDERS:
        errors[name] = {"start": [], "end": []}
    for seed in tqdm(range(settings.seeds), desc=f"probing {path}", leave=False, disable=None):
        rng = np.random.default_rng(seed)
        targets, batches, for_contenders = fitting.next_task(checkpoint, obs, settings.updates, rng)
        for name in fitting.CONTENDERS:
            learner = fitting.make_contender(name, checkpoint, for_contenders, obs.device)
            start, end = fitting.fit(learner, obs, targets, batches)
            errors[name]["start"].append(start)
            errors[name]["end"].append(end)
    relative = {}
    for name in ("agent", "agent, injected"):
        relative[name] = fitting.relative_error(errors[name]["end"], errors[fitting.FRESH]["end"])
    result = fitting.measured_on(checkpoint, settings)
    result |= {"errors": plain(errors), "relative_to_fresh": relative}
    return result | {"sentence": probe_in_words(result), "remark": remark(settings.learning_rate)}


def plain(data: Any) -> Any:
    """Dictionaries and lists of numbers as JSON can hold them: with None for those that are not finite."""
    if isinstance(data, dict):
        return {name: plain(value) for name, value in data.items()}
    if isinstance(data, list):
        return [plain(value) for value in data]
    return data if math.isfinite(data) else None


def times(relative: dict[str, Any]) -> str:
    """`1.23× [1.01, 1.50]`, without brackets where there is no interval."""
    ratio = f"{relative['ratio']:.3g}×"
    if relative["interval"] is None:
        return ratio
    low, high = relative["interval"]
    return f"{ratio} [{low:.3g}, {high:.3g}]"


def judged(relative: dict[str, Any]) -> str:
    """What the interval of a relative error says: which side of 1 it lies on, if on one."""
    if relative["interval"] is None:
        return "one seed, no interval"
    low, high = relative["interval"]
    if low > 1:
        return "worse"
    return "better" if high < 1 else "no clear difference"


def remark(rate: float) -> str | None:
    """What to know of the learning rate of a probe of one target; None at the default and below."""
    if rate <= fitting.ONE_TARGET.learning_rate:
        return None
    doubt = f"at learning rate {rate:g} an agent may fit well that has lost plasticity"
    reason = "with enough updates a high rate fits anything"
    return f"{doubt}: {reason}; leave out --probe-learning-rate for {fitting.ONE_TARGET.learning_rate:g}"


def probe_in_words(result: dict[str, Any]) -> str:
    """What a result of `probe_checkpoint` says, and what it cannot say, in one sentence."""

    def against_fresh(name: str) -> str:
        relative = result["relative_to_fresh"][name]
        if relative is None:
            ends = result["errors"][name]["end"]
            return f"not to be compared (diverged with {ends.count(None)} of {len(ends)} seeds)"
        return f"{times(relative)} a fresh network's ({judged(relative)})"

    fresh = result["errors"][fitting.FRESH]
    if None in fresh["end"]:
        return "no answer: a fresh network diverges, lower --probe-learning-rate"
    removed = 1 - sum(fresh["end"]) / sum(fresh["start"])
    updates = f"{result['probe_updates']:,} updates"
    if removed < -0.1:
        grown = f"a fresh network's error grew by {-removed:.0%} in {updates}"
        return f"no answer: {grown}, lower --probe-learning-rate"
    if removed < 0.1:
        little = f"a fresh network loses only {max(removed, 0):.0%} of its error in {updates}"
        return f"no answer: {little}, raise --probe-updates"
    agent = f"after {updates} towards random targets the agent's error is {against_fresh('agent')}"
    injected = f"with a fresh injection it is {against_fresh('agent, injected')}"
    return f"{agent}, {injected}; the fresh network's own error fell by {removed:.0%}"


def probe_table(result: dict[str, Any]) -> str:
    """A line per contender: error at start and end, averaged over seeds, as a multiple of a fresh one's."""

    def mean(errors: list) -> str:
        return "diverged" if None in errors else f"{np.mean(errors):.3g}"

    rows = [["", "error at start", "at end", "relative to fresh [95%]", "per seed"]]
    for name, errors in result["errors"].items():
        ratios = ["–", "–"]
        relative = result["relative_to_fresh"].get(name)
        if relative is not None:
            ratios = [times(relative), ", ".join(f"{ratio:.3g}" for ratio in relative["per_seed"])]
        rows.append([name, mean(errors["start"]), mean(errors["end"]), *ratios])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def each_probed(paths: Iterable[str], measure: Callable[[Path], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is measured at each checkpoint, once; those that fail are named, and a UsageError if all do."""
    prepare_process()
    reasons = []
    checkpoints = list(dict.fromkeys(map(Path, paths)))
    for path in checkpoints:
        try:
            result = measure(path)
        except UsageError as error:
            reasons.append(str(error))
            print(f"left out: {error}", flush=True)
        else:
            yield result
    if len(reasons) == len(checkpoints):
        reason = reasons[0] if reasons else "give checkpoints, runs/FOLDER/checkpoint-STEP"
        raise UsageError(f"no checkpoint to probe; {reason}")


def probe(paths: Iterable[str], settings: ProbeSettings, out: Path | None = None) -> list[dict[str, Any]]:
    """Prints and returns `probe_checkpoint` of every checkpoint; with `out`, also as JSON beside it."""
    results = []
    for result in each_probed(paths, lambda path: probe_checkpoint(path, settings)):
        results.append(result)
        count = result["injections"]
        injections = "1 injection" if count == 1 else f"{count} injections"
        print(f"{result['checkpoint']}: {result['env_id']}, step {result['step']:,}, {injections} so far")
        print(f"{probe_table(result)}\n{result['sentence']}", flush=True)
        if result["remark"] is not None:
            print(f"remark: {result['remark']}", flush=True)
        if out is not None:
            write_json(results, out.with_suffix(".json"))  # after each, so that none is lost
    if out is not None:
        print(f"wrote {out.with_suffix('.json')}")
    return results


def write_json(results: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
