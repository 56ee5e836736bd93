"""A network that fits one random target after another: compare.py --probe CHECKPOINT --probe-tasks ..."""

import json
from dataclasses import make_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_GAMES
from saved_agents import CPU, SMALL, change, kill_encoder, kill_head

from analysis import fitting, task_sequence
from analysis.fitting import (
    ProbeSettings,
    make_contender,
    read_subject,
    relative_error,
    replayed_observations,
)
from analysis.task_sequence import (
    EACH_FRESH,
    INJECTED,
    NAMES,
    RESET,
    SAME,
    probe_sequence,
    run_sequence,
    twin,
)
from dqn_injection_atari import Args, Learner
from support.usage import UsageError

TWICE = ProbeSettings(observations=16, updates=3, seeds=2, learning_rate=5e-4)
ONCE = replace(TWICE, seeds=1)
HOW = {"env_id": "", "tasks": 3, "inject_at": 2, "settings": TWICE}


@pytest.fixture
def narrow_heads(monkeypatch):
    """Fresh networks are as wide as those of the checkpoints here."""
    narrow = make_dataclass("Narrow", [("head_width", int, SMALL.head_width)], bases=(Args,), frozen=True)
    monkeypatch.setattr(fitting, "Args", narrow)


@pytest.fixture
def fits(monkeypatch):
    """Of every call of `fit`: weights before it, learner, observations, targets, batches, and its errors."""
    calls = []
    original = fitting.fit

    def fit(learner, *arguments):
        before = {
            name: parameter.detach().clone() for name, parameter in learner.q_network.named_parameters()
        }
        errors = original(learner, *arguments)
        calls.append((before, learner, *arguments, errors))
        return errors

    monkeypatch.setattr(fitting, "fit", fit)
    return calls


def test_the_copies_branch_off_where_the_injection_is_and_all_get_the_same_tasks(checkpoint, fits):
    result = run_sequence(checkpoint, **HOW | {"settings": ONCE})
    first, second, third = fits[:2], fits[2:6], fits[6:]
    same, injected, reset, fresh = (learner for _, learner, *_ in second)
    assert [learner for _, learner, *_ in third[:3]] == [same, injected, reset] and first[0][1] is same
    assert len({id(fits[i][1]) for i in (1, 5, 9)}) == 3 and fresh is fits[5][1], (
        "a fresh network for each task"
    )
    for task in (first, second, third):
        for call in task[1:]:
            assert all(
                torch.equal(torch.as_tensor(a), torch.as_tensor(b))
                for a, b in zip(call[2:5], task[0][2:5], strict=True)
            )
    assert not torch.equal(first[0][3], second[0][3]) and not np.array_equal(first[0][4], second[0][4])
    assert [learner.q_network.num_injections for _, learner, *_ in second] == [0, 1, 0, 0]
    starts = [errors[0] for *_, errors in second]
    assert starts[0] == starts[1] != starts[2], "an injection does not change Q, a reset does"
    head, encoder = "head.theta.hidden.weight", "encoder.0.weight"
    before = [weights for weights, *_ in second]
    assert torch.equal(before[0][head], before[1][head]) and not torch.equal(before[0][head], before[2][head])
    assert torch.equal(before[0][encoder], before[1][encoder]) and torch.equal(
        before[0][encoder], before[2][encoder]
    )
    assert [result["error"][name][0].count(None) for name in NAMES] == [0, 1, 1, 0]
    assert result["error"][SAME] == [[errors[1] for *_, errors in (first[0], second[0], third[0])]]


def test_the_units_that_are_measured_are_those_of_the_head_that_learns_and_of_the_encoder(checkpoint):
    subject = read_subject(checkpoint, 1e-3)
    obs = replayed_observations(subject, 16, CPU)
    learner = make_contender("agent", subject, 0, CPU)
    learner.inject()
    with torch.no_grad():
        learner.q_network.head.theta.hidden.bias.fill_(-1e3)
        learner.q_network.head.theta_prime_1[0].hidden.bias[:16] = -1e3
        learner.q_network.encoder[4].bias[:16], learner.q_network.encoder[4].bias[16:] = -1e3, 1e3
    measured = task_sequence.measured_shares(learner, obs)
    assert measured["encoder_active"] == 48 / 64 and 16 / 64 <= measured["dormant"] < 1


@pytest.mark.slow
def test_the_one_network_goes_its_way_whatever_is_done_to_its_copies(checkpoint):
    early, late = (run_sequence(checkpoint, **HOW | {"inject_at": at}) for at in (2, 3))
    assert (
        early["error"][SAME] == late["error"][SAME]
        and early["error"][EACH_FRESH] == late["error"][EACH_FRESH]
    )
    assert early["error"][INJECTED] != late["error"][INJECTED]


def test_a_twin_has_all_of_the_state_and_shares_none(checkpoint):
    saved = read_subject(checkpoint, 1e-3)
    obs, batches = replayed_observations(saved, 16, CPU), np.arange(16).reshape(2, 8)
    one = make_contender("agent", saved, 0, CPU)
    fitting.fit(one, obs, torch.rand(16, one.num_actions), batches)
    other = twin(one)
    before = {name: parameter.detach().clone() for name, parameter in one.q_network.named_parameters()}
    targets = torch.rand(16, one.num_actions)
    after = fitting.fit(other, obs, targets, batches)
    assert all(torch.equal(parameter, before[name]) for name, parameter in one.q_network.named_parameters())
    assert fitting.fit(one, obs, targets, batches) == after, "moments included"


@pytest.mark.slow
def test_seeds_differ_and_twice_gives_the_same_numbers(checkpoint):
    once, again = (run_sequence(checkpoint, **HOW) for _ in range(2))
    assert once == again and once["error"][SAME][0] != once["error"][SAME][1]
    assert json.loads(json.dumps(once, allow_nan=False)) == once
    since = {name: np.mean([errors[1:] for errors in once["error"][name]], axis=1) for name in NAMES}
    single = np.array(once["error"][SAME])[:, 0].tolist()
    for name in NAMES:
        at = [errors[1] for errors in once["error"][name]]
        expected = {"at": relative_error(at, single), "since": relative_error(since[name].tolist(), single)}
        assert once["relative"][name] == expected, "to the tasks before the injection"
    fresh = since[EACH_FRESH].tolist()
    assert once["relative_to_fresh"] == {
        name: relative_error(since[name].tolist(), fresh) for name in NAMES[:-1]
    }


@pytest.mark.slow
def test_fresh_networks_go_through_tasks_on_frames_of_random_play(fits, narrow_heads):
    result = run_sequence(Path("fresh"), **HOW | {"env_id": TINY_GAMES, "tasks": 2})
    agents = (
        [call for call in fits if call[1] is fits[0][1]],
        [call for call in fits if call[1] is fits[6][1]],
    )
    assert [len(calls) for calls in agents] == [2, 2]
    assert not torch.equal(
        agents[0][0][0]["head.theta.hidden.weight"], agents[1][0][0]["head.theta.hidden.weight"]
    ), "one for each seed"
    assert not torch.equal(fits[0][0]["head.theta.hidden.weight"], fits[1][0]["head.theta.hidden.weight"]), (
        "and another than the fresh one beside it"
    )
    assert (result["checkpoint"], result["run_seed"], result["step"], result["learning_rate"]) == (
        "fresh",
        None,
        0,
        5e-4,
    )


def test_agents_and_fresh_networks_learn_at_one_rate_whatever_the_runs_was(checkpoint, monkeypatch):
    rates = []
    for name in ("read_subject", "fresh_subject"):
        monkeypatch.setattr(fitting, name, lambda *given: rates.append(given[-1]))
    for path in (checkpoint, Path("fresh")):
        with pytest.raises(AttributeError):  # there is no agent
            run_sequence(path, **HOW | {"settings": ONCE})
    assert rates == [5e-4, 5e-4] != [SMALL.learning_rate] * 2


@pytest.mark.slow
def test_a_dead_head_has_lost_plasticity_and_an_injection_restores_it_but_not_where_the_encoder_is_dead(
    checkpoint,
):
    settings = ProbeSettings(observations=8, updates=60, seeds=1, learning_rate=1e-3)
    how = HOW | {"tasks": 2, "settings": settings}
    for kill, restored in ((kill_head, True), (kill_encoder, False)):
        change(checkpoint, kill)
        result = run_sequence(checkpoint, **how)
        ratios = {name: entries["ratio"] for name, entries in result["relative_to_fresh"].items()}
        assert ratios[SAME] > 5 and (ratios[INJECTED] < 2.5) == (ratios[RESET] < 2.5) == restored
        assert (result["dormant"][INJECTED][0][-1] < 0.8 < result["dormant"][SAME][0][-1]) == restored
        assert (min(result["encoder_active"][SAME][0]) > 0) == restored


def test_an_agent_that_has_grown_goes_on_with_its_wider_head(checkpoint, fits):
    grown = replace(SMALL, head_width=32, injected_head_width=96)
    learner = Learner(grown, 8, CPU)
    learner.inject(180)
    change(checkpoint, learner=learner, head_width=32, injected_head_width=96)
    run_sequence(checkpoint, **HOW | {"settings": ONCE})
    injected = fits[3][1].q_network
    assert [head.hidden.out_features for head in injected.head.theta_prime_1] == [
        96,
        96,
    ] and injected.num_injections == 2
    assert injected.head.theta.hidden.out_features == 32


@pytest.mark.slow
def test_a_network_that_diverges_is_said_to_and_has_no_number(checkpoint):
    change(checkpoint, lambda q_network: q_network["head.theta.output.weight"].fill_(1e30))
    result = run_sequence(checkpoint, **HOW)
    assert result["error"][SAME] == [[None] * 3] * 2 and "diverged" in result["sentence"]
    assert "| one network | – |" in task_sequence.sequence_table(result)
    task_sequence.draw_sequences([result], Path("x.png"))
    json.dumps(result, allow_nan=False)


def words(lost, injected=(0.5, [0.4, 0.6]), reset=(1.0, [0.9, 1.1]), end=0.1):
    """The sentence on ratios and intervals from the injection on; in its task all are ten times as large."""
    relative = {}
    for name, (ratio, bounds) in ((SAME, lost), (INJECTED, injected), (RESET, reset)):
        since = {"per_seed": [ratio], "ratio": ratio, "interval": bounds}
        relative[name] = {
            "since": since,
            "at": since | {"ratio": 10 * ratio, "interval": bounds and [10 * b for b in bounds]},
        }
    numbers = {"probe_tasks": 9, "probe_inject_at": 5, "probe_updates": 1_000}
    curves = {"error": {SAME: [[0.5, end, end, end, 0.4]]}, "start": {EACH_FRESH: [[0.5] * 5]}}
    return task_sequence.sequence_in_words({"relative": relative, **numbers, **curves})


def test_the_sentence_claims_what_the_intervals_support():
    assert words((4.0, [2, 8.0])) == (
        "relative to the one network's own error in tasks 2 to 4: in tasks 5 to 9 it is "
        "4× [2, 8] (plasticity was lost); with an injection before task 5 it is 5× [4, 6] (worse) in that "
        "task and 0.5× [0.4, 0.6] (better) in tasks 5 to 9, with the head reset there "
        "10× [9, 11] (worse) and 1× [0.9, 1.1] (no clear difference)"
    )
    assert "4× [0.9, 9] (no clear loss of plasticity)" in words((4.0, [0.9, 9]))
    assert "4× (one seed, no interval)" in words((4.0, None))
    assert words((4.0, [2, 8.0]), end=0.46).startswith(
        "no answer: 1,000 updates hardly fit a target, raise --probe-updates"
    )


@pytest.mark.parametrize(("at", "tasks"), [(2, [1]), (3, [2]), (5, [2, 3, 4]), (20, [2, 3, 4, 5, 6])])
def test_it_is_compared_with_its_own_first_tasks(at, tasks):
    assert list(range(1, 40))[task_sequence.early(at)] == tasks


@pytest.mark.slow
def test_it_is_drawn_printed_and_written(checkpoint, capsys, recwarn, narrow_heads):
    results = probe_sequence(
        [str(checkpoint), f"{checkpoint}/", "nowhere", "fresh"],
        **HOW | {"env_id": TINY_GAMES},
        out=Path("a", "b.png"),
    )
    printed, table = capsys.readouterr().out, Path("a", "b.md").read_text(encoding="utf-8")
    assert len(results) == 2 and json.loads(Path("a", "b.json").read_text(encoding="utf-8")) == results
    for result in results:
        assert result["sentence"] in printed and result["sentence"] in table
    warnings = [str(found.message) for found in recwarn if "layout" in str(found.message)]
    assert not warnings, "nothing is drawn outside of the figure"
    assert (
        printed.endswith("wrote a/b.png, a/b.md, a/b.json\n") and Path("a", "b.png").stat().st_size > 20_000
    )
    header, rule, *rows = (line for line in printed.splitlines() if line.startswith("|"))
    titles = ["mean squared error at the end of", "task 1", "task 2", "tasks 2–3", "head dormant in the end"]
    assert header.strip("| ").split(" | ") == [*titles, "encoder active in the end"]
    assert "left out: nowhere" in printed
    shares = [
        np.mean([of_seed[-1] for of_seed in results[0][item][SAME]]) for item in ("dormant", "encoder_active")
    ]
    assert [cell.strip() for cell in rows[0].split("|")[5:7]] == [
        f"{share:.0%}" for share in shares
    ] and shares[0] != shares[1]
    assert {row.count("|") for row in (header, rule, *rows)} == {7} and [
        row.split("|")[1].strip() for row in rows[:4]
    ] == [*NAMES]


@pytest.mark.parametrize("at", [1, 4, 0, -1])
def test_an_injection_outside_of_the_sequence_is_refused(checkpoint, at):
    with pytest.raises(UsageError, match=f"probe_inject_at is {at}, but must be 2 to 3"):
        probe_sequence([str(checkpoint)], **HOW | {"inject_at": at}, out=Path("x.png"))


def test_intervals_of_an_error_are_on_the_log_scale_and_what_is_dashed_has_a_name(monkeypatch):
    folder = Path(__file__).parent.parent / "results"
    results = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    row = task_sequence.sequence_table(results[0]).splitlines()[2]
    assert row.startswith("| one network | 0.132 [0.0954, 0.184] | 0.155 [0.0524, 0.456] |")
    drawn = []
    monkeypatch.setattr("analysis.canvas.save", lambda figure, path: drawn.append(figure))
    task_sequence.draw_sequences(results, Path("x.png"))
    error, *shares = drawn[0].axes
    for ax in shares:
        of_shares = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in ax.collections])
        assert of_shares.min() >= 0 and of_shares.max() <= 1
    bands = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in error.collections])
    assert error.get_yscale() == "log" and 0 < bands.min() < 0.02
    dashed = {line.get_label() for line in error.lines if line.get_linestyle() == "--"}
    named = {text.get_text() for text in drawn[0].legends[0].get_texts()}
    assert dashed == {EACH_FRESH, "injection or reset, before this task"} and dashed <= named


def test_networks_are_told_apart_without_colours():
    assert task_sequence.LOOKS.keys() == set(NAMES)
    assert len({(look.dashes, look.marker) for look in task_sequence.LOOKS.values()}) == len(NAMES)
