"""A report on runs: verdicts in words, a table, all numbers, and the figures beside them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.arms import Arm, RecordedRun, read_arms
from analysis.figures import draw_differences, draw_plasticity, draw_returns
from analysis.games import Aggregate, aggregates, normalised_mean
from analysis.intervals import MIN_SEEDS, interval
from analysis.verdict import LEAST_SHARE, Comparison, comparisons, not_compared, noun, show, varied
from support.usage import UsageError


def carried(pair: Comparison) -> bool:
    """Whether the games without a return could carry the verdict, were one arm's mean off by its reach and the other's not."""
    judged, reach = pair.judgement, max(pair.reaches)
    low, high = (judged.difference,) * 2 if math.isnan(judged.low) else (judged.low, judged.high)
    changed = (
        low - reach <= 0
        if low > 0
        else high + reach >= 0
        if high < 0
        else low + reach > 0 or high - reach < 0
    )
    return bool(reach > 0 and changed)


def caution(pair: Comparison, metric: str) -> list[str]:
    """A line where training games that have no return could carry the verdict, and where to look instead."""
    if metric != "charts/episodic_return" or not carried(pair):
        return []
    without, injected = (
        f"{cut:,} of {cut + ended:,} games" for cut, ended in zip(pair.unreported, pair.counts, strict=True)
    )
    most = " and ".join(f"{max(shares.values(), default=0):.0%}" for shares in pair.missing)
    counted = [
        run
        for arm, means in zip(pair.arms, pair.means, strict=True)
        for run in arm.runs
        if run.args.seed in means
    ]
    fix = "compare --metric eval/episodic_return"
    if not all(run.between("eval/episodic_return", pair.after, pair.upto).size for run in counted):
        fix = f"give runs an --eval-frequency, and {fix}"
    return [
        f"caution: {without} without and {injected} with {noun(pair.intervention)} were cut or still going, up to {most} of a "
        f"run's games or steps; they are the long ones, and what they lack could carry this: {fix}"
    ]


def ending(pair: Comparison) -> str:
    """Which run ends the window, and how much of the others' runs is lost by that."""
    if pair.ended_by is None:
        return ""
    more = f", and the median run has {pair.beyond - 1:.0%} more steps" if pair.beyond > 1.005 else ""
    return f", where {pair.ended_by} is (a longer --window leaves it out){more}"


def correction(pair: Comparison) -> list[str]:
    """A line on how many verdicts are given at once, if there are several: of many, some come by chance."""
    if pair.verdicts < 2 or math.isnan(pair.judgement.p):
        return []
    numbers = f"p = {pair.judgement.p:.2g}, corrected for them (Holm) {pair.p_holm:.2g}"
    return [f"one of {pair.verdicts} verdicts here: {numbers}"]


def late_injection(pair: Comparison) -> list[str]:
    """A line where the norm injected one run so late that little is left of what others have after theirs."""
    firsts = [step for seed, step in pair.firsts.items() if seed in pair.means[1]]
    if not firsts:
        return []
    window, available = pair.upto - pair.after, pair.upto - float(np.median(firsts))
    if window >= LEAST_SHARE * available:
        return []
    since = f"since the median run's first {noun(pair.intervention)}"
    return [f"caution: of the {available:,.0f} steps {since}, the window has the last {window:,}"]


def in_words(pair: Comparison, metric: str) -> list[str]:
    """A comparison in four lines, what, verdict, window and method.

    Then how many verdicts there are, cautions, and one line per run left out of it.
    """
    word = noun(pair.intervention)
    seeds = [f"{len(means)} seeds ({', '.join(map(str, means)) or 'none'})" for means in pair.means]
    if pair.paired and pair.one_agent:
        how = f"95% t interval of the differences within {seeds[0]}, continuations of one agent from the {word} on"
    elif pair.paired:
        how = f"95% t interval of the differences within {seeds[0]}, whose runs share their history up to the {word}"
    else:
        few = f"of which {pair.shared} share{'s' * (pair.shared == 1)} a history, too few to pair"
        related = few if pair.shared else "which do not share their history"
        how = f"95% Welch interval, {seeds[0]} without and {seeds[1]} with {word}, {related}"
    points = f"{pair.counts[0]:,} points of {metric} without and {pair.counts[1]:,} with {word}"
    begins = ", ".join(f"{step:,} with seed {seed}" for seed, step in sorted(pair.firsts.items()))
    points += f"; first {word} at {begins}" if pair.firsts and not pair.arms[1].injection else ""
    return [
        f"{pair.game}: {pair.arms[1].name} against {pair.arms[0].name}",
        pair.judgement.sentence,
        f"window {pair.after:,} < step ≤ {pair.upto:,}{ending(pair)}, {points}",
        how if pair.judgement.verdict in ("raised", "no evidence", "lowered") else "no interval",
        *correction(pair),
        *late_injection(pair),
        *caution(pair, metric),
        *(f"not in this comparison: {reason}" for reason in pair.left_out.values()),
    ]


def aggregate_in_words(total: Aggregate) -> list[str]:
    """An aggregate in four lines, what, scores, difference and method; then one per game that was left out of it."""
    without, injected, difference = (show(*row) if row[1] < row[2] else show(row[0]) for row in total.scores)
    if np.isfinite(total.scores).all(axis=1).any():
        kind = "95% stratified bootstrap intervals"
        brackets = f"brackets are {kind}, which cover less than that with few runs per game"
    elif total.fewest < MIN_SEEDS:
        brackets = f"no interval: it takes {MIN_SEEDS} runs of each game on either side"
    else:
        brackets = "no interval: runs of a game do not differ"
    runs = f"{total.runs[0]} runs without and {total.runs[1]} with"
    spans = zip(total.games, total.windows, strict=True)
    games = ", ".join(f"{game} in {after:,} < step ≤ {upto:,}" for game, (after, upto) in spans)
    return [
        f"{len(total.games)} games: {total.names[1]} against {total.names[0]}",
        f"human-normalised return, interquartile mean over runs: {without} without and {injected} with",
        f"difference {difference}, where 0 is random play and 1 a human's",
        f"over {len(total.games)} games ({games}) and {runs}; {brackets}",
        *(f"not in this aggregate: {game}, {reason}" for game, reason in total.left_out.items()),
    ]


def table(arms: list[Arm], pairs: list[Comparison], totals: list[Aggregate], metric: str) -> str:
    """The comparisons in Markdown: two rows each, one per arm that is in none, and below them each one in words."""
    head = (
        "game",
        "arm",
        "seeds",
        "n",
        "mean return in the window",
        "difference",
        "verdict",
        "human-normalised",
    )
    rows = [head, ("---",) * len(head)]
    for pair in pairs:
        judged = pair.judgement
        difference = show(judged.difference, judged.low, judged.high) if all(pair.counts) else "–"
        for side, cells in enumerate((("", ""), (difference, judged.verdict))):
            arm, means, score = pair.arms[side], pair.means[side], normalised_mean(pair, side)
            mean = show(*interval(np.array(list(means.values())))) if means else "–"
            normalised = "–" if score is None else show(score)
            rows.append(
                (arm.game, arm.name, ", ".join(map(str, means)), str(len(means)), mean, *cells, normalised)
            )
    for arm in (arm for arm in arms if not any(arm in pair.arms for pair in pairs)):
        seeds = sorted(str(run.args.seed) for run in arm.runs)
        rows.append(
            (arm.game, arm.name, ", ".join(seeds), str(len(seeds)), "–", "–", "nothing to compare with", "–")
        )
    words = ["", "Brackets are 95% intervals.", ""] + [
        f"- {'; '.join(in_words(pair, metric))}." for pair in pairs
    ]
    if totals:
        words += [
            "",
            "## Over games",
            "",
            *(f"- {'; '.join(aggregate_in_words(total))}." for total in totals),
        ]
    return "\n".join([f"| {' | '.join(row)} |" for row in rows] + words) + "\n"


def aggregate_as_json(total: Aggregate) -> dict[str, Any]:
    values = total.scores[:, 0].tolist()
    bounds = [[None, None] if math.isnan(low) else [low, high] for low, high in total.scores[:, 1:].tolist()]
    sides = zip(total.names, total.runs, values, bounds, strict=False)
    without, injected = (
        {"arm": name, "runs": runs, "iqm": iqm, "interval": bound} for name, runs, iqm, bound in sides
    )
    difference = {"difference": values[2], "interval": bounds[2]}
    windows = [{"after": after, "upto": upto} for after, upto in total.windows]
    return {
        "games": total.games,
        "windows": windows,
        "without": without,
        "with": injected,
        **difference,
        "left_out": total.left_out,
    }


def as_json(
    arms: list[Arm],
    pairs: list[Comparison],
    totals: list[Aggregate],
    remarks: dict[str, dict[str, str]],
    metric: str,
) -> str:
    """All that was found; null stands for what is not a number."""

    def of_run(run: RecordedRun) -> dict[str, Any]:
        return {
            "run": run.folder,
            "seed": run.args.seed,
            "step": run.last_step,
            "of": run.args.total_timesteps,
        }

    def of_pair(pair: Comparison) -> dict[str, Any]:
        judged = pair.judgement
        numbers = judged.difference, judged.low, judged.high, judged.p, pair.p_holm
        difference, low, high, p, p_holm = (number if math.isfinite(number) else None for number in numbers)
        without, injected = (
            {
                "arm": arm.name,
                "means": means,
                "points": points,
                "games_unreported": cut,
                "share_unreported": missing,
                "human_normalised": normalised_mean(pair, side),
            }
            for side, (arm, means, points, cut, missing) in enumerate(
                zip(pair.arms, pair.means, pair.counts, pair.unreported, pair.missing, strict=True)
            )
        )
        return {
            "game": pair.game,
            "without": without,
            "with": injected,
            "first_injections": pair.firsts,
            "window": {"after": pair.after, "upto": pair.upto, "ended_by": pair.ended_by},
            "paired": pair.paired,
            "one_agent": pair.one_agent,
            "difference": difference,
            "interval": [low, high],
            "p": p,
            "p_holm": p_holm,
            "verdict": judged.verdict,
            "sentence": judged.sentence,
            "left_out": pair.left_out,
        }

    described = [
        {"name": arm.name, "setting": arm.setting, "runs": [of_run(run) for run in arm.runs]} for arm in arms
    ]
    found = {
        "comparisons": [of_pair(pair) for pair in pairs],
        "aggregates": [aggregate_as_json(total) for total in totals],
    }
    content = {"metric": metric, "arms": described, **found, **remarks}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def report(folders: Sequence[str], out: Path, metric: str, window: int | None, aggregate: str) -> list[Arm]:
    """Compares runs, prints the verdicts and writes figures, table and numbers. Returns the arms.

    Args:
        folders: of runs, or files of `write_curves`
        out: where the figure goes, a .png, .pdf or .svg; the other files have its name with another ending
        metric: tag of the returns that are compared
        window: steps after the injection that count, None for as many as all compared runs have
        aggregate: "mean" or "iqm", of the figures

    Raises:
        UsageError: a setting cannot work, or no run is usable.
        OSError: something cannot be written.
    """
    if not folders:
        raise UsageError("nothing to compare: give folders of runs, python compare.py runs/A runs/B ...")
    arms, remarks = read_arms(folders, metric)
    pairs = comparisons(arms, metric, window)
    remarks["not_compared"] = not_compared(arms, pairs, metric)
    totals = aggregates(pairs)
    over_games = [total for total in totals if len(total.games) > 1]
    lines = [
        f"{kind.replace('_', ' ')}: {line}" for kind, of_kind in remarks.items() for line in of_kind.values()
    ]
    words = [in_words(pair, metric) for pair in pairs] + [aggregate_in_words(total) for total in over_games]
    print(*lines, *("\n  ".join(of_one) for of_one in words), sep="\n")
    if not pairs and remarks["not_compared"]:
        fix = "compare --metric charts/episodic_return, or runs with the same eval_ settings"
        print(f"no verdict: arms that were evaluated differently have none; {fix}")
    elif not pairs:
        print("no verdict: no two arms differ in the injection alone; --fork makes the counterpart of a run")
    out.parent.mkdir(parents=True, exist_ok=True)
    written = [
        out,
        plasticity := out.with_stem(f"{out.stem}_plasticity"),
        out.with_suffix(".md"),
        out.with_suffix(".json"),
    ]
    draw_returns(arms, pairs, out, metric, aggregate)
    if number := varied(pairs):
        written.insert(1, by_number := out.with_stem(f"{out.stem}_by_{number}"))
        draw_differences(pairs, number, by_number)
    if not draw_plasticity(arms, plasticity, aggregate):
        written.remove(plasticity)
        print("no figure of plasticity: no run has measured it")
    out.with_suffix(".md").write_text(table(arms, pairs, over_games, metric), encoding="utf-8")
    out.with_suffix(".json").write_text(as_json(arms, pairs, totals, remarks, metric), encoding="utf-8")
    print(f"wrote {', '.join(map(str, written))}")
    return arms
