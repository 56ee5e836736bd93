"""Does a network that fits random targets in a sequence get worse at it, and an injection mend that (§3)?"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from alternatives import ALTERNATIVES
from analysis import canvas, fitting
from analysis.figures import labelled
from analysis.fitting import FRESH, ProbeSettings
from analysis.intervals import geometric_interval, interval
from analysis.markdown import markdown_table
from analysis.probe import each_probed, judged, plain, times, write_json
from dqn_injection_atari import Learner
from support.checkpoints import Checkpoint
from support.measures import activations, active_fraction, dormant_units
from support.usage import UsageError

SAME = "one network"
INJECTED = "injected"
RESET = "head reset"
COPIES = (INJECTED, RESET)
NAMES = (SAME, *COPIES, FRESH)
MEASURED = ("start", "error", "dormant", "encoder_active")
DRAWN = {
    "error": "error at the end of the task",
    "dormant": "head: share of\nunits dormant",
    "encoder_active": "encoder: share of\nfeatures ≠ 0",
}
LOOKS = {
    SAME: canvas.look(0),
    INJECTED: canvas.look(1),
    RESET: canvas.look(2),
    FRESH: canvas.Look("#999999", "--", ""),
}
LOST = 5  # times its own smallest error: a network that is above that has lost plasticity,
IN_A_ROW = 2  # if it is in as many tasks, one after the other, since one task may be harder than others
FOLLOWED = 5  # tasks of all networks from there on
SHOWN_BEFORE = 14  # tasks before the copies were made that a figure has room for
LEARNED = 0.9  # a network that leaves more than this of its error has not learned the task


def has_lost(errors: Sequence[float]) -> bool:
    """Whether a network's last errors, one per task, say that it has lost plasticity by its own standard."""
    before = errors[:-IN_A_ROW]
    last = errors[-IN_A_ROW:]
    return len(before) > 0 and min(last) > LOST * min(before)


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
    subject: Checkpoint, obs: torch.Tensor, tasks: int, inject_at: int | None, updates: int, seed: int
) -> Iterator[dict[str, dict[str, float]]]:
    """One network through a sequence of tasks, and those that it is compared with.

    A task is a random target of its own, and `fit`'s updates towards it. Before task `inject_at`, counted
    from 1, the one network is copied, moments included; one copy is injected, and of another the head is
    reset. With None that is as soon as the network `has_lost`, and the sequence ends `FOLLOWED` tasks later.
    All get the same tasks and batches. A fresh network fits the first task alone, since tasks are alike.
    `seed` decides targets, batches, and all weights drawn.

    Yields:
        of each task {network's name: what is `MEASURED`}: "start" and "error" are the mean squared error at
        its start and at its end, where `measured_shares` are taken
    """
    rng = np.random.default_rng(seed)
    network = fitting.make_contender("agent", subject, seed, obs.device)
    copies: dict[str, Learner] = {}
    errors: list[float] = []
    last = tasks
    task = 0
    while task < last:
        task += 1
        targets, batches, for_fresh = fitting.next_task(subject, obs, updates, rng)
        learners = {SAME: network}
        if task == 1:
            learners[FRESH] = fitting.make_contender(FRESH, subject, for_fresh, obs.device)
        measured = {}
        for name, learner in (learners | copies).items():
            start, end = fitting.fit(learner, obs, targets, batches)
            measured[name] = {"start": start, "error": end} | measured_shares(learner, obs)
        yield measured
        errors.append(measured[SAME]["error"])
        due = has_lost(errors) if inject_at is None else task == inject_at - 1
        if due and not copies:
            copies = {name: twin(network) for name in COPIES}
            copies[INJECTED].inject()
            copies[RESET].apply(ALTERNATIVES["reset-head"])
            if inject_at is None:
                last = task + FOLLOWED


def run_sequence(
    path: Path, env_id: str, tasks: int, inject_at: int | None, settings: ProbeSettings
) -> dict[str, Any]:
    """`run_tasks` with several seeds, for an agent, or for fresh networks on frames of random play.

    Returns:
        plain data: what is `MEASURED` {name: a list for each seed, with a number for each task}, None where
        there is none or it is not finite; "copied_before", a task for each seed, or None; what
        `compare_copies` says; "sentence"; and `measured_on`
    """
    if path == Path(fitting.NO_CHECKPOINT):
        how = (settings.learning_rate, settings.head_width)
        subjects = [fitting.fresh_checkpoint(env_id, seed, *how) for seed in range(settings.seeds)]
    else:
        subjects = [fitting.read_subject(path, settings.learning_rate)] * settings.seeds
    obs = fitting.observations_for(subjects[0], settings.observations)
    result = fitting.measured_on(subjects[0], settings)
    result |= {"probe_tasks": tasks, "probe_inject_at": inject_at, "copied_before": []}
    for measure in MEASURED:
        result[measure] = {name: [] for name in NAMES}
    with tqdm(unit=" tasks", leave=False, disable=None) as progress:
        for seed, subject in enumerate(subjects):
            progress.set_description_str(f"{path}: network {seed + 1} of {settings.seeds}")
            course = []
            for measured in run_tasks(subject, obs, tasks, inject_at, settings.updates, seed):
                course.append(measured)
                progress.update()
            for name in NAMES:
                for measure in MEASURED:
                    values = [task[name][measure] if name in task else math.nan for task in course]
                    result[measure][name].append(plain(values))
            with_copies = [number for number, task in enumerate(course, start=1) if INJECTED in task]
            result["copied_before"].append(min(with_copies, default=None))
    result |= compare_copies(result)
    return result | {"sentence": sequence_in_words(result)}


def copied_seeds(result: dict[str, Any]) -> list[int]:
    """The seeds whose network was copied."""
    return [seed for seed, task in enumerate(result["copied_before"]) if task is not None]


def fresh_errors(result: dict[str, Any]) -> np.ndarray:
    """A fresh network's error at the end of the first task, (seeds,), NaN where it is not finite."""
    return np.array([of_seed[0] for of_seed in result["error"][FRESH]], float)


def compare_copies(result: dict[str, Any]) -> dict[str, Any]:
    """What the networks did from the task on before which the copies were made.

    Returns:
        "best" (seeds,), the one network's smallest error up to there; "since" {name: (seeds,)}, mean errors
        from there on, None where nothing was copied; and these as multiples of others, see `relative_error`,
        of the seeds with copies: "relative_to_best" and "relative_to_fresh" {name: ...}, and of the copies
        "relative_to_one", to the one network's
    """
    copied = copied_seeds(result)
    best = []
    since = {name: np.full(len(result["copied_before"]), math.nan) for name in (SAME, *COPIES)}
    for seed, task in enumerate(result["copied_before"]):
        errors = np.array(result["error"][SAME][seed], float)
        until = len(errors) if task is None else task - 1
        best.append(errors[:until].min())
        for name, mean_errors in since.items():
            if task is not None:
                mean_errors[seed] = np.array(result["error"][name][seed][task - 1 :], float).mean()
    standards = {"best": np.array(best), "fresh": fresh_errors(result), "one": since[SAME]}
    found: dict[str, Any] = {"best": plain(best)}
    found["since"] = {name: plain(mean_errors.tolist()) for name, mean_errors in since.items()}
    for standard, reference in standards.items():
        relative = {}
        for name in COPIES if standard == "one" else (SAME, *COPIES):
            relative[name] = fitting.relative_error(since[name][copied], reference[copied])
        found[f"relative_to_{standard}"] = relative
    return found


def num_below(result: dict[str, Any]) -> int:
    """How many networks that had lost plasticity are, left alone, no longer so bad in the last task."""
    count = 0
    for seed in copied_seeds(result):
        if result["error"][SAME][seed][-1] <= LOST * result["best"][seed]:
            count += 1
    return count


def in_a_list(numbers: list[int]) -> str:
    """`3, 5 and 8`"""
    if len(numbers) == 1:
        return str(numbers[0])
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def no_answer(result: dict[str, Any]) -> str | None:
    """Why the tasks do not tell anything, and what to change; None where they do."""
    errors = [np.array(of_seed, float) for of_seed in result["error"][SAME]]
    if not all(np.isfinite(of_seed).all() for of_seed in errors):
        return "a network diverged, lower --probe-learning-rate"
    copied = any(result["copied_before"])
    start = np.mean([of_seed[0] for of_seed in result["start"][FRESH]])
    enough = LEARNED * start
    if not copied:
        enough = start / LOST  # or no error could ever say that plasticity is lost
    if np.mean(result["best"]) > enough:
        fix = "raise --probe-updates or change --probe-learning-rate"
        return f"{result['probe_updates']:,} updates hardly fit a target, {fix}"
    if copied and None in result["relative_to_one"].values():
        return "a copy diverged, lower --probe-learning-rate"
    return None


def sequence_in_words(result: dict[str, Any]) -> str:
    """What a result of `run_sequence` says, in one sentence."""
    reason = no_answer(result)
    if reason is not None:
        return f"no answer: {reason}"
    subjects = "networks" if result["checkpoint"] == fitting.NO_CHECKPOINT else "repetitions"
    everything = f"{len(result['copied_before'])} {subjects}"
    copied = [result["copied_before"][seed] for seed in copied_seeds(result)]
    standard = f"error above {LOST}× its own best, {IN_A_ROW} tasks in a row"
    if not copied:
        way = f"on the way through {result['probe_tasks']} tasks"
        return f"none of {everything} lost plasticity {way} ({standard})"
    alone = f"{times(result['relative_to_best'][SAME])} its own best"
    if result["probe_inject_at"] is None:
        tasks = "tasks" if len(copied) > 1 else "task"
        begin = f"{len(copied)} of {everything} lost plasticity on the way, "
        begin += f"before {tasks} {in_a_list(copied)} ({standard})"
        alone += f", in the last task that of {num_below(result)} is below {LOST}×"
    else:
        begin = f"{everything}, copied before task {copied[0]}"
    parts = [f"{begin}; from there on the error of one that is left alone is {alone}"]
    for name, deed in ((INJECTED, "with an injection"), (RESET, "with the head reset")):
        relative = result["relative_to_one"][name]
        better = sum(ratio < 1 for ratio in relative["per_seed"])
        verdict = f"{judged(relative)}, lower in {better} of {len(copied)}"
        parts.append(f"{deed} it is {times(relative)} that ({verdict})")
    return "; ".join(parts)


def cell(errors: np.ndarray) -> str:
    """`0.123 [0.1, 0.146]`: geometric mean and its interval of one error per seed; – where one is missing."""
    if not len(errors) or not np.isfinite(errors).all():
        return "–"
    centre, low, high = geometric_interval(np.log(errors))
    return f"{centre:.3g}" if math.isnan(low) else f"{centre:.3g} [{low:.3g}, {high:.3g}]"


def sequence_table(result: dict[str, Any]) -> str:
    """Markdown: a row for each network, then geometric means of those that were copied."""
    columns = {
        "best error": np.array(result["best"], float),
        "then: left alone": np.array(result["since"][SAME], float),
        "injected": np.array(result["since"][INJECTED], float),
        "head reset": np.array(result["since"][RESET], float),
        "a fresh network": fresh_errors(result),
    }
    header = ["network", "copied before task", *columns, "head dormant by then", "encoder active by then"]
    lines = []
    for seed, task in enumerate(result["copied_before"]):
        line = [f"seed {seed}", "–" if task is None else str(task)]
        line += [cell(errors[[seed]]) for errors in columns.values()]
        for measure in ("dormant", "encoder_active"):
            share = result[measure][SAME][seed][-1 if task is None else task - 2]
            line.append("–" if share is None else f"{share:.0%}")
        lines.append(line)
    copied = copied_seeds(result)
    if len(copied) > 1:
        means = [cell(errors[copied]) for errors in columns.values()]
        lines.append([f"{len(copied)} that were copied", "", *means, "", ""])
    return markdown_table(header, lines)


def aligned(result: dict[str, Any], measure: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tasks counted from that before which the copies were made, which is 0; and a row for each network.

    Networks without copies have no row. But where none has any, all have, and tasks count from 1.
    """
    rows = copied_seeds(result)
    firsts = [result["copied_before"][seed] for seed in rows]
    if not rows:
        rows = list(range(len(result["copied_before"])))
        firsts = [0] * len(rows)
    lengths = [len(result[measure][name][seed]) for seed in rows]
    begin = 1 - max(firsts)
    end = max(length - first for length, first in zip(lengths, firsts, strict=True))
    values = np.full((len(rows), end - begin + 1), math.nan)
    for row, (seed, first) in enumerate(zip(rows, firsts, strict=True)):
        place = 1 - first - begin
        values[row, place : place + lengths[row]] = np.array(result[measure][name][seed], float)
    return np.arange(begin, end + 1), values


def draw_panel(ax: canvas.Axes, result: dict[str, Any], measure: str) -> None:
    """Of each network its values at the end of each task, and where all have one their mean and interval."""
    for name in (SAME, *COPIES):
        task, values = aligned(result, measure, name)
        if measure == "error":
            centre, low, high = geometric_interval(np.log(values))
        else:
            centre, low, high = np.clip(interval(values), 0, 1)  # a share is no less and no more
        style = LOOKS[name]
        label = "left alone" if name == SAME else name
        canvas.plot_broken(ax, task, centre, **style.line, lw=2, label=label)
        ax.fill_between(task, low, high, color=style.colour, alpha=0.18, lw=0)
        ax.plot(task, values.T, color=style.colour, lw=0.6, alpha=0.4)
    if any(result["copied_before"]):
        ax.axvline(-0.5, **canvas.DASHED, label="injection or reset")
    if measure == "error":
        fresh, _, _ = geometric_interval(np.log(fresh_errors(result)))
        ax.axhline(
            float(fresh),
            color=LOOKS[FRESH].colour,
            ls=LOOKS[FRESH].dashes,
            label=FRESH,
        )
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
        subject = "fresh networks" if fresh else f"the agent of step {result['step']:,}"
        copied = [result["copied_before"][seed] for seed in copied_seeds(result)]
        title = f"{result['env_id']}: {subject}, one random target after another"
        counted = "task"
        if copied:
            counted = "task, 0 is the first after the injection or the reset"
            column[-1].set_xlim(left=max(-SHOWN_BEFORE, 1 - max(copied)) - 0.5)
        if copied and result["probe_inject_at"] is None:
            lost = f"{len(copied)} of {len(result['copied_before'])}"
            title += f"\n{lost} lost plasticity on the way, and are shown"
        column[0].set_title(title, loc="left", fontweight="bold", fontsize=10)
        column[-1].xaxis.set_major_locator(canvas.MaxNLocator(integer=True))
        column[-1].set_xlabel(f"{counted} ({result['probe_updates']:,} updates each)")
    lines: dict[str, canvas.Artist] = {}
    for ax in axes[0]:
        lines |= labelled(ax)
    figure.legend(lines.values(), lines.keys(), ncols=3, loc="outside lower left")
    canvas.save(figure, path)


def probe_sequence(
    paths: Iterable[str], env_id: str, tasks: int, inject_at: int | None, settings: ProbeSettings, out: Path
) -> list[dict[str, Any]]:
    """Prints, draws, writes and returns `run_sequence` of every checkpoint."""
    if inject_at is None and tasks <= IN_A_ROW:
        least = IN_A_ROW + 1
        fix = f"give --probe-tasks {least} or more, or a task for the injection by --probe-inject-at"
        raise UsageError(f"probe_tasks is {tasks}, but it takes {least} to see a loss of plasticity: {fix}")
    if inject_at is not None and not 1 < inject_at <= tasks:
        fix = "change --probe-inject-at or --probe-tasks"
        raise UsageError(f"probe_inject_at is {inject_at}, but must be 2 to {tasks}: {fix}")

    def measure(path: Path) -> dict[str, Any]:
        return run_sequence(path, env_id, tasks, inject_at, settings)

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
