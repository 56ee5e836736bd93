"""Does a network that fits one random target after another get worse at it, and does an injection mend that (paper, §3)?"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from analysis.canvas import COLOURS, INK, Figure, Look, MaxNLocator, drawing, plot_broken, save
from analysis.fitting import (
    FRESH,
    NO_CHECKPOINT,
    TASKS_LEARNING_RATE,
    fit,
    fresh_subject,
    make_contender,
    num_injections,
    random_play,
    random_targets,
    read_subject,
    relative_error,
    replayed_observations,
    saved_args,
)
from analysis.intervals import interval
from analysis.probe import each_probed, times, write_json
from dqn_injection_atari import Learner
from support.checkpoints import Checkpoint
from support.machine import pick_device
from support.measures import activations, active_fraction, dormant_units
from support.usage import UsageError

SAME, INJECTED, RESET, EACH_FRESH = "one network", "injected", "head reset", "a fresh network for each task"
BRANCHES = {INJECTED: Learner.inject, RESET: Learner.reset_head}
NAMES = (SAME, *BRANCHES, EACH_FRESH)
MEASURED = ("start", "error", "dormant", "encoder_active")
DRAWN = {
    "error": "error at the end of the task",
    "dormant": "head: share of\nunits dormant",
    "encoder_active": "encoder: share of\nfeatures ≠ 0",
}
LOOKS = {
    SAME: Look(INK, "-", ""),
    INJECTED: Look(COLOURS[0], "-", "s"),
    RESET: Look(COLOURS[1], "-.", "^", shift=0.5),
    EACH_FRESH: Look("#999999", "--", ""),
}
LEARNED = 0.9  # a network that leaves more than this of its error has not learned the task


def early(inject_at: int) -> slice:
    """The one network's first five tasks, from 0, before the injection; not the very first, in which it may be fresh itself."""
    return slice(min(1, inject_at - 2), min(6, inject_at - 1))


def twin(learner: Learner) -> Learner:
    """A learner in the same state, optimizer included, that shares nothing with it."""
    copy = Learner(learner.args, learner.num_actions, learner.device)
    copy.load_state_dict(learner.state_dict())
    return copy


def unit_measures(learner: Learner, obs: torch.Tensor) -> dict[str, float]:
    """Of the head that learns the share of hidden units that are dormant, of the encoder that of features ≠ 0, at `obs`."""
    network = learner.q_network
    _, layers = activations(network, {f"{network.newest_head()}.1": "head", "encoder": "encoder"}, obs)
    return {
        "dormant": dormant_units(layers["head"]).mean().item(),
        "encoder_active": active_fraction(layers["encoder"]).item(),
    }


def run_tasks(
    subject: Checkpoint,
    obs: torch.Tensor,
    tasks: int,
    inject_at: int,
    updates: int,
    seed: int,
    progress: tqdm,
) -> dict[str, dict[str, np.ndarray]]:
    """One network through a sequence of tasks, and those that it is compared with.

    A task is a random target of its own, and `fit`'s updates towards it. All networks get the same tasks and batches. Before
    task `inject_at`, counted from 1, the one network is copied, optimizer moments included; one copy is injected, and of
    another the head is reset. `seed` decides targets, batches, and all weights that are drawn.

    Returns:
        {what: {name: (tasks,)}}: "error", mean squared, and `unit_measures` at the end of each task, and "start", the error
        at its start; of the copies NaN before `inject_at`
    """
    rng = np.random.default_rng(seed)
    one, copies = make_contender("agent", subject, seed, obs.device), dict[str, Learner]()
    found = {what: {name: np.full(tasks, math.nan) for name in NAMES} for what in MEASURED}
    for task in range(1, tasks + 1):
        for_targets, for_fresh = rng.integers(2**30, size=2).tolist()
        batches = rng.integers(len(obs), size=(updates, one.args.batch_size))
        targets = random_targets(make_contender(FRESH, subject, for_targets, obs.device).q_network, obs)
        if task == inject_at:
            copies = {name: twin(one) for name in BRANCHES}
            for name, intervene in BRANCHES.items():
                intervene(copies[name])
        learners = {SAME: one, **copies, EACH_FRESH: make_contender(FRESH, subject, for_fresh, obs.device)}
        for name, learner in learners.items():
            start, end = fit(learner, obs, targets, batches)
            for what, value in ({"start": start, "error": end} | unit_measures(learner, obs)).items():
                found[what][name][task - 1] = value
        progress.update()
    return found


def run_sequence(
    path: Path,
    env_id: str,
    tasks: int,
    inject_at: int,
    observations: int,
    updates: int,
    seeds: int,
    rate: float | None,
) -> dict[str, Any]:
    """`run_tasks` with several seeds, for the agent in a checkpoint, or for fresh networks on frames of random play.

    All learn at `rate`, by default `TASKS_LEARNING_RATE`, whatever the run's was.

    Returns:
        plain data: what is `MEASURED` {name: (seeds, tasks)}, None where there is none or it is not finite;
        "relative" {name: {"at", "since"}}, see `relative_error`: its error in task `inject_at`, and its mean from there on,
        as a multiple of the one network's mean in its `early` tasks; "relative_to_fresh" {name: ...}, of the means from
        `inject_at` on, as a multiple of the fresh networks'; "sentence"; and what it was measured on

    Raises:
        UsageError: the checkpoint is damaged or cannot be probed, or there is no such game.
    """
    fresh = path == Path(NO_CHECKPOINT)
    rate = TASKS_LEARNING_RATE if rate is None else rate
    subjects = (
        [fresh_subject(env_id, seed, rate) for seed in range(seeds)]
        if fresh
        else [read_subject(path, rate)] * seeds
    )
    args = saved_args(subjects[0])
    device = pick_device(args.cuda, deterministic=True, tf32=args.tf32)
    obs = (
        random_play(env_id, observations, device)
        if fresh
        else replayed_observations(subjects[0], observations, device)
    )
    with tqdm(total=seeds * tasks, desc=f"tasks of {path}", leave=False, disable=None) as progress:
        found = [
            run_tasks(one, obs, tasks, inject_at, updates, seed, progress)
            for seed, one in enumerate(subjects)
        ]
    curves = {
        what: {name: np.array([of_seed[what][name] for of_seed in found]) for name in NAMES}
        for what in MEASURED
    }
    error = curves["error"]
    own = error[SAME][:, early(inject_at)].mean(axis=1).tolist()
    since = {name: errors[:, inject_at - 1 :].mean(axis=1).tolist() for name, errors in error.items()}
    at = {name: errors[:, inject_at - 1].tolist() for name, errors in error.items()}
    result = {
        "checkpoint": str(path),
        "env_id": args.env_id,
        "run_seed": None if fresh else args.seed,
        "step": subjects[0].step,
        "injections": num_injections(subjects[0]),
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "probe_observations": observations,
        "probe_updates": updates,
        "probe_seeds": seeds,
        "probe_tasks": tasks,
        "probe_inject_at": inject_at,
        **{
            what: {name: as_plain(values) for name, values in of_one.items()}
            for what, of_one in curves.items()
        },
        "relative": {
            name: {"at": relative_error(at[name], own), "since": relative_error(since[name], own)}
            for name in NAMES
        },
        "relative_to_fresh": {name: relative_error(since[name], since[EACH_FRESH]) for name in NAMES[:-1]},
    }
    return result | {"sentence": sequence_in_words(result)}


def as_plain(values: np.ndarray) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in of_seed] for of_seed in values.tolist()]


def sequence_in_words(result: dict[str, Any]) -> str:
    """What a result of `run_sequence` says, in one sentence."""
    relative, tasks, at, updates = (
        result[name] for name in ("relative", "probe_tasks", "probe_inject_at", "probe_updates")
    )
    if any(of_one is None for name in (SAME, *BRANCHES) for of_one in relative[name].values()):
        return "no answer: a network diverged, lower --probe-learning-rate"
    ends, starts = (
        np.array(result[what][name], float) for what, name in (("error", SAME), ("start", EACH_FRESH))
    )
    first = early(at)
    if ends[:, first].mean() > LEARNED * starts[:, first].mean():
        return f"no answer: {updates:,} updates hardly fit a target, raise --probe-updates or change --probe-learning-rate"

    def judged(name: str, when: str, above: str, neither: str) -> str:
        of_one = relative[name][when]
        bounds = of_one["interval"]
        word = (
            "one seed, no interval"
            if bounds is None
            else above
            if bounds[0] > 1
            else "better"
            if bounds[1] < 1
            else neither
        )
        return f"{times(of_one)} ({word})"

    after = [
        judged(name, when, "worse", "no clear difference") for when in ("at", "since") for name in BRANCHES
    ]
    loss = judged(SAME, "since", "plasticity was lost", "no clear loss of plasticity")
    return (
        f"relative to the one network's own error in tasks {first.start + 1} to {first.stop}: in tasks {at} to {tasks} it is "
        f"{loss}; with an injection before task {at} it is {after[0]} in that task and {after[2]} in tasks {at} to {tasks}, "
        f"with the head reset there {after[1]} and {after[3]}"
    )


def sequence_table(result: dict[str, Any]) -> str:
    """Markdown: of each network the mean error at the end of tasks, and in the end what its head and encoder still do."""
    tasks, at = result["probe_tasks"], result["probe_inject_at"]
    shown = sorted({(early(at).start + 1, early(at).stop), (max(1, at - 5), at - 1), (at, at), (at, tasks)})
    titles = [f"task {a}" if a == b else f"tasks {a}–{b}" for a, b in shown]
    titles = [
        "mean squared error at the end of",
        *titles,
        "head dormant in the end",
        "encoder active in the end",
    ]
    lines = [titles, ["---"] * len(titles)]
    for name in NAMES:
        errors, *units = (
            np.array(result[what][name], float) for what in ("error", "dormant", "encoder_active")
        )
        last = [of_one[:, -1].mean() for of_one in units]
        cells = [in_cell(errors[:, a - 1 : b].mean(axis=1)) for a, b in shown]
        lines.append([name, *cells, *(f"{share:.0%}" if math.isfinite(share) else "–" for share in last)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_cell(of_seeds: np.ndarray) -> str:
    """`0.123 [0.1, 0.146]`: mean and 95% t interval of one number per seed; – where there is none."""
    if not np.isfinite(of_seeds).all():
        return "–"
    centre, low, high = interval(of_seeds)
    return f"{centre:.3g}" if math.isnan(low) else f"{centre:.3g} [{low:.3g}, {high:.3g}]".replace("-", "−")


@drawing()
def draw_sequences(results: list[dict[str, Any]], path: Path) -> None:
    """A column per result: what is in `DRAWN` at the end of each task; mean, interval and seeds."""
    figure = Figure(figsize=(max(7.5, 5.5 * len(results)), 6.6), layout="constrained")
    axes = figure.subplots(3, len(results), sharex="col", squeeze=False, height_ratios=(2, 1, 1))
    for result, column in zip(results, axes.T, strict=True):
        number = np.arange(1, result["probe_tasks"] + 1)
        for ax, what in zip(column, DRAWN, strict=True):
            for name in reversed(NAMES):
                values = np.array(result[what][name], float)
                centre, low, high = interval(values)
                plot_broken(ax, number, centre, **LOOKS[name].line, lw=2, label=name)
                ax.fill_between(number, low, high, color=LOOKS[name].colour, alpha=0.18, lw=0)
                ax.plot(number, values.T, color=LOOKS[name].colour, lw=0.6, alpha=0.4)
            ax.axvline(result["probe_inject_at"], color=INK, lw=1, ls=(0, (4, 3)))
            top = (
                1
                if what != "error"
                else 1.2 * np.nanmax([np.array(of_one, float) for of_one in result[what].values()])
            )
            ax.set_ylim(0, top if math.isfinite(top) else None)
        who = (
            "a fresh network"
            if result["checkpoint"] == NO_CHECKPOINT
            else f"the agent of step {result['step']:,}"
        )
        column[0].set_title(
            f"{result['env_id']}: {who}, one random target after another",
            loc="left",
            fontweight="bold",
            fontsize=10,
        )
        where = {"xycoords": column[0].get_xaxis_transform(), "textcoords": "offset points", "va": "top"}
        column[0].annotate("injection, reset", (result["probe_inject_at"], 1), (4, 0), **where)
        column[-1].set_xlim(0.5, result["probe_tasks"] + 0.5)
        column[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        column[-1].set_xlabel(f"task ({result['probe_updates']:,} updates each)")
    for ax, label in zip(axes[:, 0], DRAWN.values(), strict=True):
        ax.set_ylabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], ncols=4, loc="outside lower left")
    save(figure, path)


def probe_sequence(
    paths: Iterable[str],
    env_id: str | None,
    tasks: int,
    inject_at: int | None,
    observations: int,
    updates: int,
    seeds: int,
    rate: float | None,
    out: Path,
) -> list[dict[str, Any]]:
    """Prints, draws, writes and returns `run_sequence` of every checkpoint.

    Raises:
        UsageError: a setting cannot work, or no checkpoint can be probed.
        OSError: something cannot be written.
    """
    first = max(2, tasks * 2 // 3) if inject_at is None else inject_at
    if not 1 < first <= tasks:
        raise UsageError(
            f"probe_inject_at is {first}, but must be 2 to {tasks}: change --probe-inject-at or --probe-tasks"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for result in each_probed(
        paths, lambda path: run_sequence(path, env_id or "", tasks, first, observations, updates, seeds, rate)
    ):
        results.append(result)
        print(
            f"{result['checkpoint']}: {result['env_id']}, step {result['step']:,}, learning rate {result['learning_rate']:g}"
        )
        print(f"{sequence_table(result)}\n{result['sentence']}", flush=True)
        draw_sequences(results, out)  # after each, so that none is lost
        parts = (
            f"{result['checkpoint']}: {result['sentence']}\n\n{sequence_table(result)}\n"
            for result in results
        )
        # a path may hold bytes that are no letters in the user's locale; they are written as they are
        out.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8", errors="surrogateescape")
        write_json(results, out.with_suffix(".json"))
    print(f"wrote {', '.join(str(out.with_suffix(ending)) for ending in (out.suffix, '.md', '.json'))}")
    return results
