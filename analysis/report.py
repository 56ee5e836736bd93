"""A report on runs: verdicts in words, a table, all numbers, and the figures beside them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.arms import EVALUATION, TRAINING_RETURN, Arm, print_remarks, read_arms
from analysis.figures import draw_differences, draw_plasticity, draw_returns
from analysis.games import Aggregate, aggregates, normalised_mean
from analysis.intervals import MIN_SEEDS, interval
from analysis.markdown import markdown_table
from analysis.verdict import (
    LEAST_SHARE,
    Comparison,
    Side,
    comparisons,
    event,
    missing_counterparts,
    not_compared,
    show,
    varied,
)
from dqn_injection_atari import Args
from support.machine import replacing
from support.usage import flag

HEAD = ["game", "arm", "seeds", "n", "mean return in the window", "difference", "verdict", "human-normalised"]


def caution(pair: Comparison, metric: str) -> list[str]:
    """A line where training games that have no return could carry the verdict, and where to look instead."""
    if metric != TRAINING_RETURN or not pair.hinges_on_missing_games:
        return []
    games = []
    shares = []
    fix = "compare --metric eval/episodic_return"
    evaluated = set()  # in how many ways
    for side in pair.sides:
        games.append(f"{side.unreported:,} of {side.unreported + side.points:,} games")
        shares.append(f"{max(side.missing.values(), default=0):.0%}")
        for run in side.arm.runs:
            if run.args.seed not in side.missing:
                continue
            evaluated.add(tuple(getattr(run.args, name) for name in EVALUATION))
            evaluations = run.between("eval/episodic_return", pair.window.after, pair.window.upto)
            if evaluations.size == 0:
                fix = "give runs an --eval-frequency, and compare --metric eval/episodic_return"
    if len(evaluated) > 1:
        fix = "give all runs the same eval_ settings, and compare --metric eval/episodic_return"
    words = pair.sides_in_words
    lacking = f"{games[0]} {words[0]} and {games[1]} {words[1]} were cut or still going"
    most = f"up to {shares[0]} and {shares[1]} of a run's games or steps"
    return [f"caution: {lacking}, {most}; they are the long ones, and what they lack could carry this: {fix}"]


def method(pair: Comparison) -> str:
    """Of which kind the interval is, and over which seeds."""
    if math.isnan(pair.judgement.low):
        return "no interval"
    word = event(pair.intervention)
    seeds = [f"{len(means)} seeds ({', '.join(map(str, means)) or 'none'})" for means in pair.means]
    if pair.paired:
        within = f"95% t interval of the differences within {seeds[0]}"
        if pair.one_agent:
            return f"{within}, continuations of one agent"
        return f"{within}, whose runs share their history up to the {word}"
    related = "which do not share their history"
    if pair.shared > 0:
        verb = "shares" if pair.shared == 1 else "share"
        related = f"of which {pair.shared} {verb} a history, too few to pair"
    words = pair.sides_in_words
    return f"95% Welch interval, {seeds[0]} {words[0]} and {seeds[1]} {words[1]}, {related}"


def beyond_control(pair: Comparison, metric: str) -> list[str]:
    """Lines on an arm and its control, if they are compared: difference, caution, runs left out."""
    contrast = pair.beyond_control
    if contrast is None:
        return []
    line = f"beyond its control, {contrast.arms[0].name}: {contrast.judgement.sentence}"
    if not math.isnan(contrast.judgement.low):
        line += f"; {method(contrast)}"
    lines = [line, *caution(contrast, metric)]
    for folder, reason in contrast.left_out.items():
        if folder not in pair.left_out:
            lines.append(f"not in the comparison with its control: {reason}")
    return lines


def other_causes(pair: Comparison) -> list[str]:
    """Where there is a conclusion, lines on what else could have caused it, and on what it does not show."""
    if math.isnan(pair.judgement.low):
        return []
    verdict = pair.judgement.verdict
    args = pair.arms[1].runs[0].args
    control = pair.arms[1].control
    contrast = pair.beyond_control
    causes = []
    moments = "fresh optimizer moments, as the new layers began with none (--moments fresh)"
    if contrast is not None and not math.isnan(contrast.judgement.low):
        if contrast.judgement.verdict != verdict:
            causes.append(f"{moments}; against the control the verdict is: {contrast.judgement.verdict}")
    elif control:
        flags = []
        for name, value in control.items():
            if value != getattr(Args(), name):
                flags.append(f"{flag(name)} {value}")
        tell = "would tell"
        if not pair.arms[1].planned_steps:
            tell += ", in two arms that are both planned by --injection-step"
        causes.append(f"{moments}; {' '.join(flags)} {tell}")
    wider = args.new_head_width > args.head_width
    if verdict == "raised" and (wider or not args.freeze_heads):
        causes.append("more capacity, as more parameters learn than before")
    elif verdict == "raised" and pair.intervention == "injection":
        causes.append("more capacity, as the frozen heads stay in the sum beside the new one")
    if verdict == "no evidence":
        causes.append("chance, as any effect within the interval is still possible")
    else:
        causes.append("chance, as 1 of 20 such intervals over seeds excludes 0 where nothing differs")
    lines = [f"what else could have caused this: {cause}" for cause in causes]
    if verdict == "no evidence":
        seen = "no lost plasticity" if "plasticity" in pair.judgement.sentence else "no effect"
        limit = "that exploration, or anything else, is the limit"
        lines.append(f"what this does not show: {limit}; only that {seen} was seen here")
    return lines


def ending(pair: Comparison) -> str:
    """Which run ends the window, and how much of the others' runs is lost by that."""
    if pair.window.ended_by is None:
        return ""
    end = f", where {pair.window.ended_by} is (a longer --window leaves it out)"
    if pair.window.beyond > 1.005:
        end += f", and the median run has {pair.window.beyond - 1:.0%} more steps"
    return end


def correction(pair: Comparison) -> list[str]:
    """A line on how many verdicts are given at once, if there are several: of many, some come by chance."""
    if pair.verdicts < 2 or math.isnan(pair.judgement.p):
        return []
    numbers = f"p = {pair.judgement.p:.2g}, corrected for them (Holm) {pair.p_holm:.2g}"
    return [f"one of {pair.verdicts} verdicts here: {numbers}"]


def late_intervention(pair: Comparison) -> list[str]:
    """A line where the norm injected one run so late that little is left of what others have after theirs."""
    firsts = [step for seed, step in pair.firsts.items() if seed in pair.means[1]]
    if not firsts:
        return []
    window = pair.window.upto - pair.window.after
    available = pair.window.upto - float(np.median(firsts))
    if window >= LEAST_SHARE * available:
        return []
    since = f"since the median run's first {event(pair.intervention)}"
    return [f"caution: of the {available:,.0f} steps {since}, the window has the last {window:,}"]


def in_words(pair: Comparison, metric: str) -> list[str]:
    """A comparison in four lines, arms, verdict, window, method; then cautions, and runs left out."""
    window = f"window {pair.window.after:,} < step ≤ {pair.window.upto:,}{ending(pair)}"
    counts = [side.points for side in pair.sides]
    words = pair.sides_in_words
    points = f"{counts[0]:,} points of {metric} {words[0]} and {counts[1]:,} {words[1]}"
    if pair.means[1] and not pair.arms[1].planned_steps:
        begins = [f"{pair.firsts[seed]:,} with seed {seed}" for seed in pair.means[1]]
        points += f"; first {event(pair.intervention)} at {', '.join(begins)}"
    return [
        f"{pair.game}: {pair.arms[1].name} against {pair.arms[0].name}",
        pair.judgement.sentence,
        f"{window}, {points}",
        method(pair),
        *correction(pair),
        *late_intervention(pair),
        *caution(pair, metric),
        *(f"not in this comparison: {reason}" for reason in pair.left_out.values()),
    ]


def aggregate_in_words(total: Aggregate) -> list[str]:
    """An aggregate in four lines, what, scores, difference and method; then one per game left out."""
    without, intervened, difference = (show(*row) for row in total.scores)
    if np.isfinite(total.scores).all(axis=1).any():
        kind = "95% stratified bootstrap intervals"
        brackets = f"brackets are {kind}, which cover less than that with few runs per game"
    elif total.fewest < MIN_SEEDS:
        brackets = f"no interval: it takes {MIN_SEEDS} runs of each game on either side"
    else:
        brackets = "no interval: runs of a game do not differ"
    games = []
    for game, window in zip(total.games, total.windows, strict=True):
        games.append(f"{game} in {window.after:,} < step ≤ {window.upto:,}")
    runs = f"{total.runs[0]} runs without and {total.runs[1]} with"
    if total.of_one_agent:
        runs += f", of which those of {' and '.join(total.of_one_agent)} continue one agent"
    return [
        f"{len(games)} games: {total.names[1]} against {total.names[0]}",
        f"human-normalised return, interquartile mean over runs: {without} without and {intervened} with",
        f"difference {difference}, where 0 is random play and 1 a human's",
        f"over {len(games)} games ({', '.join(games)}) and {runs}; {brackets}",
        *(f"not in this aggregate: {game}, {reason}" for game, reason in total.left_out.items()),
    ]


def row_of(side: Side, difference: str, verdict: str) -> list[str]:
    """The row of the table for one arm of a comparison."""
    means = side.means
    mean = "–"
    if means:
        mean = show(*interval(np.array([*means.values()])))
    score = normalised_mean(side)
    normalised = "–" if score is None else show(score)
    seeds = ", ".join(map(str, means))
    return [side.arm.game, side.arm.name, seeds, str(len(means)), mean, difference, verdict, normalised]


def table(arms: list[Arm], pairs: list[Comparison], totals: list[Aggregate], metric: str) -> str:
    """The comparisons in Markdown: two rows each, one per arm that is in none; below them each in words."""
    rows = []
    for pair in pairs:
        judged = pair.judgement
        difference = show(judged.difference, judged.low, judged.high) if all(pair.means) else "–"
        rows.append(row_of(pair.sides[0], "", ""))
        rows.append(row_of(pair.sides[1], difference, judged.verdict))
    for arm in arms:
        if not any(arm in pair.arms for pair in pairs):
            seeds = sorted(run.args.seed for run in arm.runs)
            cells = [", ".join(map(str, seeds)), str(len(seeds)), "–", "–", "nothing to compare with", "–"]
            rows.append([arm.game, arm.name, *cells])
    lines = [markdown_table(HEAD, rows), "", "Brackets are 95% intervals.", ""]
    for pair in pairs:
        lines.append(f"- {'; '.join(in_words(pair, metric))}.")
        lines += [f"  - {line}." for line in (*beyond_control(pair, metric), *other_causes(pair))]
    if totals:
        lines += ["", "## Over games", ""]
        lines += [f"- {'; '.join(aggregate_in_words(total))}." for total in totals]
    return "\n".join(lines) + "\n"


def finite(number: float) -> float | None:
    """A number as JSON has it: null where it is none."""
    return number if math.isfinite(number) else None


def aggregate_as_json(total: Aggregate) -> dict[str, Any]:
    rows = []
    for value, low, high in total.scores.tolist():
        rows.append({"iqm": value, "interval": [finite(low), finite(high)]})
    return {
        "games": total.games,
        "windows": [{"after": window.after, "upto": window.upto} for window in total.windows],
        "without": {"arm": total.names[0], "runs": total.runs[0], **rows[0]},
        "with": {"arm": total.names[1], "runs": total.runs[1], **rows[1]},
        "difference": rows[2]["iqm"],
        "interval": rows[2]["interval"],
        "of_one_agent": total.of_one_agent,
        "left_out": total.left_out,
    }


def side_as_json(side: Side) -> dict[str, Any]:
    return {
        "arm": side.arm.name,
        "means": side.means,
        "points": side.points,
        "games_unreported": side.unreported,
        "share_unreported": side.missing,
        "human_normalised": normalised_mean(side),
    }


def difference_as_json(pair: Comparison) -> dict[str, Any]:
    judged = pair.judgement
    return {
        "without": side_as_json(pair.sides[0]),
        "with": side_as_json(pair.sides[1]),
        "window": {"after": pair.window.after, "upto": pair.window.upto, "ended_by": pair.window.ended_by},
        "paired": pair.paired,
        "one_agent": pair.one_agent,
        "difference": finite(judged.difference),
        "interval": [finite(judged.low), finite(judged.high)],
        "p": finite(judged.p),
        "sentence": judged.sentence,
        "left_out": pair.left_out,
    }


def comparison_as_json(pair: Comparison) -> dict[str, Any]:
    contrast = pair.beyond_control
    return {
        "game": pair.game,
        "first_injections": pair.firsts,
        **difference_as_json(pair),
        "p_holm": finite(pair.p_holm),
        "verdict": pair.judgement.verdict,
        "beyond_control": None if contrast is None else difference_as_json(contrast),
        "other_causes": other_causes(pair),
    }


def arm_as_json(arm: Arm) -> dict[str, Any]:
    runs = []
    for run in arm.runs:
        args = run.args
        runs.append({"run": run.folder, "seed": args.seed, "step": run.last_step, "of": args.total_timesteps})
    return {"name": arm.name, "setting": arm.setting, "runs": runs}


def as_json(
    arms: list[Arm], pairs: list[Comparison], totals: list[Aggregate], remarks: dict[str, Any], metric: str
) -> str:
    """All that was found; null stands for what is not a number."""
    content = {
        "metric": metric,
        "arms": [arm_as_json(arm) for arm in arms],
        "comparisons": [comparison_as_json(pair) for pair in pairs],
        "aggregates": [aggregate_as_json(total) for total in totals],
        **remarks,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def report(folders: Sequence[str], out: Path, metric: str, window: int | None, aggregate: str) -> list[Arm]:
    """Compares runs, prints the verdicts and writes figures, table and numbers. Returns the arms.

    `folders` are of runs, or files of `write_curves`; the others are as in compare.py's `Settings`.
    """
    arms, remarks = read_arms(folders, metric)
    pairs = comparisons(arms, metric, window)
    differently = not_compared(arms, pairs)
    remarks["not_compared"] = differently | missing_counterparts(arms)
    totals = aggregates(pairs)
    over_games = [total for total in totals if len(total.games) > 1]
    print_remarks(remarks)
    for pair in pairs:
        print(*in_words(pair, metric), *beyond_control(pair, metric), *other_causes(pair), sep="\n  ")
    for total in over_games:
        print(*aggregate_in_words(total), sep="\n  ")
    if not pairs and differently:
        fix = "compare --metric charts/episodic_return, or runs with the same eval_ settings"
        print(f"no verdict: arms that were evaluated differently have none; {fix}")
    elif not pairs:
        print("no verdict: no two arms differ in the injection alone; --fork makes the counterpart of a run")

    out.parent.mkdir(parents=True, exist_ok=True)
    draw_returns(arms, pairs, out, metric, aggregate)
    written = [out]
    number = varied(pairs)
    if number is not None:
        by_number = out.with_stem(f"{out.stem}_by_{number}")
        draw_differences(pairs, number, by_number)
        written.append(by_number)
    plasticity = out.with_stem(f"{out.stem}_plasticity")
    if draw_plasticity(arms, plasticity, aggregate):
        written.append(plasticity)
    else:
        print("no figure of plasticity: no run has measured it")
    texts = {
        out.with_suffix(".md"): table(arms, pairs, over_games, metric),
        out.with_suffix(".json"): as_json(arms, pairs, totals, remarks, metric),
    }
    for path, text in texts.items():
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8", errors="surrogateescape")  # of paths that are no UTF-8
        written.append(path)
    print(f"wrote {', '.join(map(str, written))}")
    return arms
