"""The curves and probes under results/ can be read, and give the numbers that the documents print."""

import json
from pathlib import Path

import numpy as np
import pytest
from simulated_runs import RETURN

from analysis.arms import read_arms
from analysis.intervals import t_interval
from analysis.verdict import comparisons

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/results.md")


@pytest.mark.parametrize(
    ("files", "seeds", "verdicts"),
    [
        (("dose/*.csv",), [2, 3, 4, 5, 6], ["no evidence", "no evidence", "raised"]),
        (("dose/*no-injection*0.001.csv", "alternatives/*"), [2, 3, 4, 5, 6], ["lowered", "lowered"]),
        (("one_agent/*",), [101, 102, 103], ["no evidence"]),
    ],
)
def test_documents_print_what_the_curves_give(files, seeds, verdicts):
    paths = [str(path) for pattern in files for path in sorted((ROOT / "results").glob(pattern))]
    arms, remarks = read_arms(paths, RETURN)
    pairs = comparisons(arms, RETURN, None)
    assert [pair.judgement.verdict for pair in pairs] == verdicts and not any(remarks.values())
    for pair in pairs:
        judged = pair.judgement
        assert list(pair.means[0]) == list(pair.means[1]) == seeds and (
            pair.window.after,
            pair.window.upto,
        ) == (
            160_000,
            320_000,
        )
        printed = f"{judged.difference:,.0f} [{judged.low:,.0f}, {judged.high:,.0f}]".replace("-", "−")
        for name in DOCUMENTS:
            assert printed in (ROOT / name).read_text(encoding="utf-8"), (
                f"{name} lacks {pair.arms[1].name}: {printed}"
            )


def test_documents_print_what_stays_after_correction_for_all_five_verdicts():
    paths = [
        str(path)
        for folder in ("dose", "alternatives")
        for path in sorted((ROOT / "results" / folder).glob("*.csv"))
    ]
    pairs = comparisons(read_arms(paths, RETURN)[0], RETURN, None)
    assert [pair.verdicts for pair in pairs] == [5] * 5
    (stays,) = [pair for pair in pairs if pair.p_holm < 0.05]
    assert (
        stays.arms[1].name == "injection at 160k, learning rate 0.001" and stays.judgement.verdict == "raised"
    )
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for pair in pairs:
        assert f"| {pair.judgement.p:.2g} | {pair.p_holm:.2g} |" in text, pair.arms[1].name


@pytest.mark.parametrize("name", ["run", "100", "1e-4", "tasks"])
def test_documents_print_what_the_probes_give(name):
    rows = (ROOT / "docs/results.md").read_text(encoding="utf-8").splitlines()
    found = json.loads((ROOT / "results" / "dose" / f"probe_{name}.json").read_text(encoding="utf-8"))
    agent, injected = ("one network", "injected") if name == "tasks" else ("agent", "agent, injected")
    ranges = []
    for rate in ("1e-4", "5e-4", "1e-3"):
        ratios = [
            result["relative_to_fresh"]
            for result in found
            if f"learning-rate-{rate}__" in result["checkpoint"]
        ]
        left = [ratio[injected]["ratio"] / ratio[agent]["ratio"] for ratio in ratios]
        assert len(left) == 5
        ranges.append(f"{min(left):.3g} to {max(left):.3g}")
    assert any(" | ".join(ranges) in row for row in rows), f"no row of docs/results.md has {ranges}"


def with_interval(centre, interval, unit=""):
    low, high = interval
    return f"{centre:.3g}{unit} [{low:.3g}, {high:.3g}]"


def test_documents_print_geometric_means_of_the_tasks_errors_with_the_intervals_of_their_logarithms():
    (result,) = json.loads((ROOT / "results" / "tasks.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for name in ("one network", "injected", "head reset", "a fresh network for each task"):
        errors = np.array(result["error"][name], float)
        cells = []
        for first, last in ((2, 6), (9, 13), (14, 14), (14, 21)):
            logs = np.log(errors[:, first - 1 : last].mean(axis=1))
            if np.isnan(logs).any():
                cells.append("–")
            else:
                cells.append(with_interval(np.exp(logs.mean()), np.exp(t_interval(logs))))
        assert f"| {name} | {' | '.join(cells)} |" in text


@pytest.mark.parametrize(("file", "times"), [("tasks", ("at", "since")), ("tasks_six_seeds", ("since",))])
def test_documents_print_the_tasks_errors_relative_to_the_one_networks_early_ones(file, times):
    (result,) = json.loads((ROOT / "results" / f"{file}.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for name in ("one network", "injected", "head reset"):
        for time in times:
            relative = result["relative"][name][time]
            assert with_interval(relative["ratio"], relative["interval"], unit="×") in text, (name, time)
