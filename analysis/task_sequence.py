"""Does a network that fits random targets in a sequence get worse at it, and an injection mend that (§3)?"""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from alternatives import ALTERNATIVES
from analysis import canvas, fitting
from analysis.fitting import ProbeSettings
from analysis.intervals import geometric_interval, interval
from analysis.probe import each_probed, judged, plain, times, write_json
from dqn_injection_atari import Learner
from support.checkpoints import Checkpoint
from support.measures import activations, active_fraction, dormant_units
from support.usage import UsageError

SAME = "one network"
INJECTED = "injected"
RESET = "head reset"
EACH_FRESH = "a fresh network for each task"
BRANCHES = (INJECTED, RESET)
NAMES = (SAME, *BRANCHES, EACH_FRESH)
MEASURED = ("start", "error", "dormant", "encoder_active")
DRAWN = {
    "error": "error at the end of the task",
    "dormant": "head: share of\nunits dormant",
    "encoder_active": "encoder: share of\nfeatures ≠ 0",
}
LOOKS = {
    SAME: canvas.Look(canvas.INK, "-", ""),
    INJECTED: canvas.Look(canvas.COLOURS[0], "-", "s"),
    RESET: canvas.Look(canvas.COLOURS[1], "-.", "^", shift=0.5),
    EACH_FRESH: canvas.Look("#999999", "--", ""),
}
LEARNED = 0.9  # a network that leaves more than this of its error has not learned the task


def early(inject_at: int) -> slice:
    """The one network's first five tasks before the injection; from the second, as it may begin fresh."""
    return slice(min(1, inject_at - 2), min(6, inject_at - 1))


def twin(learner: Learner) -> Learner:
    """A learner in the same state, optimizer included, that shares nothing with it."""
    copy = Learner(learner.args, learner.num_actions, learner.device)
    copy.load_state_dict(learner.state_dict())
    return copy


def measured_shares(learner: Learner, obs: torch.Tensor) -> dict[str, float]:
    """The shares of the learning head's hidden units that are dormant, and of the encoder's features ≠ 0."""
    network = learner.q_network
    _, layers = activations(network, {f"{network.newest_head()}.relu": "head", "encoder": "encoder"}, obs)
    return {
        "dormant": dormant_units(layers["head"]).mean().item(),
        "encoder_active": active_fraction(layers["encoder"]).item(),
    }


def run_tasks(
    subject: Checkpoint, obs: torch.Tensor, tasks: int, inject_at: int, updates: int, seed: int
) -> Iterator[dict[str, dict[str, float]]]:
    """One network through a sequence of tasks, and those that it is compared with.

    A task is a random target of its own, and `fit`'s updates towards it. All networks get the same tasks and
    batches. Before task `inject_at`, counted from 1, the one network is copied, moments included; one copy is
    injected, and of another the head is reset. `seed` decides targets, batches, and all weights drawn.

    Yields:
        of each task {network's name: what is `MEASURED`}: "start" and "error" are the mean squared error at
        its start and at its end, where `unit_measures` are taken
    """
    rng = np.random.default_rng(seed)
    network = fitting.make_contender("agent", subject, seed, obs.device)
    copies: dict[str, Learner] = {}
    for task in range(1, tasks + 1):
        targets, batches, for_fresh = fitting.next_task(subject, obs, updates, rng)
        if task == inject_at:
            copies = {name: twin(network) for name in BRANCHES}
            copies[INJECTED].inject()
            copies[RESET].apply(ALTERNATIVES["reset-head"])
        fresh = fitting.make_contender(fitting.FRESH, subject, for_fresh, obs.device)
        measured = {}
        for name, learner in {SAME: network, **copies, EACH_FRESH: fresh}.items():
            start, end = fitting.fit(learner, obs, targets, batches)
            measured[name] = {"start": start, "error": end} | measured_shares(learner, obs)
        yield measured


def run_sequence(
    path: Path, env_id: str, tasks: int, inject_at: int, settings: ProbeSettings
) -> dict[str, Any]:
    """`run_tasks` with several seeds, for an agent, or for fresh networks on frames of random play.

    Returns:
        plain data: what is `MEASURED` {name: (seeds, tasks)}, None where there is none or it is not finite;
        "relative" {name: {"at", "since"}}, see `relative_error`: its error in task `inject_at`, and its mean
        from there on, as a multiple of the one network's mean in its `early` tasks; "relative_to_fresh"
        {name: ...}, its mean as a multiple of the fresh networks'; "sentence"; and `measured_on`
    """
    seeds = settings.seeds
    if path == Path(fitting.NO_CHECKPOINT):
        subjects = [fitting.fresh_subject(env_id, seed, settings.learning_rate) for seed in range(seeds)]
    else:
        subjects = [fitting.read_subject(path, settings.learning_rate)] * seeds
    obs = fitting.observations_for(subjects[0], settings.observations)
    curves: dict[str, dict[str, np.ndarray]] = {}
    for measure in MEASURED:
        curves[measure] = {name: np.full((seeds, tasks), math.nan) for name in NAMES}
    with tqdm(total=seeds * tasks, desc=f"tasks of {path}", leave=False, disable=None) as progress:
        for seed, subject in enumerate(subjects):
            course = run_tasks(subject, obs, tasks, inject_at, settings.updates, seed)
            for task, measured in enumerate(course):
                for name, measure in itertools.product(measured, MEASURED):
                    curves[measure][name][seed, task] = measured[name][measure]
                progress.update()
    result = fitting.measured_on(subjects[0], settings)
    result |= {"probe_tasks": tasks, "probe_inject_at": inject_at}
    for measure, by_name in curves.items():
        result[measure] = {name: plain(values.tolist()) for name, values in by_name.items()}
    early_error = curves["error"][SAME][:, early(inject_at)].mean(axis=1)
    fresh_error = curves["error"][EACH_FRESH][:, inject_at - 1 :].mean(axis=1)
    result |= {"relative": {}, "relative_to_fresh": {}}
    for name, error in curves["error"].items():
        at = fitting.relative_error(error[:, inject_at - 1], early_error)
        error_since = error[:, inject_at - 1 :].mean(axis=1)
        result["relative"][name] = {"at": at, "since": fitting.relative_error(error_since, early_error)}
        if name != EACH_FRESH:
            result["relative_to_fresh"][name] = fitting.relative_error(error_since, fresh_error)
    return result | {"sentence": sequence_in_words(result)}


def sequence_in_words(result: dict[str, Any]) -> str:
    """What a result of `run_sequence` says, in one sentence."""
    relative = result["relative"]
    at = result["probe_inject_at"]
    tasks = result["probe_tasks"]
    for name in (SAME, *BRANCHES):
        if None in relative[name].values():
            return "no answer: a network diverged, lower --probe-learning-rate"
    first = early(at)
    error = np.array(result["error"][SAME], float)[:, first].mean()
    if error > LEARNED * np.array(result["start"][EACH_FRESH], float)[:, first].mean():
        fix = "raise --probe-updates or change --probe-learning-rate"
        return f"no answer: {result['probe_updates']:,} updates hardly fit a target, {fix}"

    def against_early(name: str, when: str, *words: str) -> str:
        return f"{times(relative[name][when])} ({judged(relative[name][when], *words)})"

    loss = against_early(SAME, "since", "plasticity was lost", "no clear loss of plasticity")
    standard = f"the one network's own error in tasks {first.start + 1} to {first.stop}"
    injected = f"{against_early(INJECTED, 'at')} in that task and {against_early(INJECTED, 'since')}"
    reset = f"{against_early(RESET, 'at')} and {against_early(RESET, 'since')}"
    return (
        f"relative to {standard}: in tasks {at} to {tasks} it is {loss}; "
        f"with an injection before task {at} it is {injected} in tasks {at} to {tasks}, "
        f"with the head reset there {reset}"
    )


def sequence_table(result: dict[str, Any]) -> str:
    """Markdown: each network's error at the end of tasks, and what its units still do in the end."""
    tasks = result["probe_tasks"]
    at = result["probe_inject_at"]
    spans = sorted({(early(at).start + 1, early(at).stop), (max(1, at - 5), at - 1), (at, at), (at, tasks)})
    titles = [f"task {a}" if a == b else f"tasks {a}–{b}" for a, b in spans]
    units = ["head dormant in the end", "encoder active in the end"]
    lines = [["mean squared error at the end of", *titles, *units]]
    lines.append(["---"] * len(lines[0]))
    for name in NAMES:
        errors = np.array(result["error"][name], float)
        cells = [in_cell(errors[:, a - 1 : b].mean(axis=1)) for a, b in spans]
        for measure in ("dormant", "encoder_active"):
            share = np.array(result[measure][name], float)[:, -1].mean()
            cells.append(f"{share:.0%}" if math.isfinite(share) else "–")
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_cell(errors: np.ndarray) -> str:
    """`0.123 [0.1, 0.146]`: geometric mean and its interval of one error per seed; – where there is none."""
    if not np.isfinite(errors).all():
        return "–"
    centre, low, high = geometric_interval(np.log(errors))
    return f"{centre:.3g}" if math.isnan(low) else f"{centre:.3g} [{low:.3g}, {high:.3g}]"


def draw_panel(ax: canvas.Axes, result: dict[str, Any], measure: str) -> None:
    """Of each network the seeds' values at the end of each task, their mean and its interval."""
    task = np.arange(1, result["probe_tasks"] + 1)
    for name in NAMES:
        values = np.array(result[measure][name], float)
        if measure == "error":
            centre, low, high = geometric_interval(np.log(values))
        else:
            centre, low, high = np.clip(interval(values), 0, 1)  # a share is no less and no more
        style = LOOKS[name]
        canvas.plot_broken(ax, task, centre, **style.line, lw=2, label=name)
        ax.fill_between(task, low, high, color=style.colour, alpha=0.18, lw=0)
        ax.plot(task, values.T, color=style.colour, lw=0.6, alpha=0.4)
    ax.axvline(result["probe_inject_at"], **canvas.DASHED, label="injection or reset, before this task")
    if measure == "error":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(canvas.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    else:
        ax.set_ylim(0, 1)
    ax.set_ylabel(DRAWN[measure])


@canvas.drawing()
def draw_sequences(results: list[dict[str, Any]], path: Path) -> None:
    """A column per result, a row per measure in `DRAWN`."""
    figure = canvas.Figure(figsize=(max(7.5, 5.5 * len(results)), 6.6), layout="constrained")
    axes = figure.subplots(3, len(results), sharex="col", squeeze=False, height_ratios=(2, 1, 1))
    for result, column in zip(results, axes.T, strict=True):
        for ax, measure in zip(column, DRAWN, strict=True):
            draw_panel(ax, result, measure)
        fresh = result["checkpoint"] == fitting.NO_CHECKPOINT
        network = "a fresh network" if fresh else f"the agent of step {result['step']:,}"
        title = f"{result['env_id']}: {network}, one random target after another"
        column[0].set_title(title, loc="left", fontweight="bold", fontsize=10)
        column[-1].set_xlim(0.5, result["probe_tasks"] + 0.5)
        column[-1].xaxis.set_major_locator(canvas.MaxNLocator(integer=True))
        column[-1].set_xlabel(f"task ({result['probe_updates']:,} updates each)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=3, loc="outside lower left")
    canvas.save(figure, path)


def probe_sequence(
    paths: Iterable[str], env_id: str, tasks: int, inject_at: int | None, settings: ProbeSettings, out: Path
) -> list[dict[str, Any]]:
    """Prints, draws, writes and returns `run_sequence` of every checkpoint."""
    at = max(2, tasks * 2 // 3) if inject_at is None else inject_at
    if not 1 < at <= tasks:
        fix = "change --probe-inject-at or --probe-tasks"
        raise UsageError(f"probe_inject_at is {at}, but must be 2 to {tasks}: {fix}")

    def measure(path: Path) -> dict[str, Any]:
        return run_sequence(path, env_id, tasks, at, settings)

    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    parts: list[str] = []
    for result in each_probed(paths, measure):
        results.append(result)
        name = result["checkpoint"]
        table = sequence_table(result)
        learned_at = f"learning rate {result['learning_rate']:g}"
        print(f"{name}: {result['env_id']}, step {result['step']:,}, {learned_at}")
        print(f"{table}\n{result['sentence']}", flush=True)
        parts.append(f"{name}: {result['sentence']}\n\n{table}\n")
        draw_sequences(results, out)  # all after each, so that none is lost
        # a path may hold bytes that are no letters in the user's locale; they are written as they are
        out.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8", errors="surrogateescape")
        write_json(results, out.with_suffix(".json"))
    print(f"wrote {out}, {out.with_suffix('.md')}, {out.with_suffix('.json')}")
    return results
