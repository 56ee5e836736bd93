"""A network that fits one random target after another: compare.py --probe CHECKPOINT --probe-tasks ..."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_GAMES
from saved_agents import CPU, SMALL, change, kill_encoder, kill_head

from analysis import fitting, task_sequence
from analysis.fitting import (
    FRESH,
    ProbeSettings,
    make_contender,
    read_subject,
    relative_error,
    replayed_observations,
)
from analysis.task_sequence import (
    COPIES,
    FOLLOWED,
    INJECTED,
    NAMES,
    RESET,
    SAME,
    has_lost,
    probe_sequence,
    run_sequence,
    sequence_in_words,
    sequence_table,
    twin,
)
from dqn_injection_atari import Learner
from support.usage import UsageError

TWICE = ProbeSettings(observations=16, updates=3, seeds=2, learning_rate=5e-4, head_width=16)
ONCE = replace(TWICE, seeds=1)
HOW = {"env_id": "", "tasks": 3, "inject_at": 2, "settings": TWICE}


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


@pytest.fixture
def scripted(monkeypatch):
    """Lets `fit` give the one network these errors, one per task, injected copies 0.01, and others 0.02."""

    def script(*errors):
        left = iter(errors)
        first = []

        def fit(learner, *arguments):
            first.append(learner)
            if learner is first[0]:
                return 0.5, next(left)
            return 0.5, 0.01 if learner.q_network.num_injections else 0.02

        monkeypatch.setattr(fitting, "fit", fit)

    return script


@pytest.mark.parametrize(
    ("errors", "lost"),
    [
        ([], False),
        ([0.1], False),
        ([0.1, 0.6], False),
        ([0.1, 0.6, 0.6], True),
        ([0.1, 0.6, 0.4], False),
        ([0.1, 0.4, 0.6], False),
        ([0.1, 0.5, 0.5], False),
        ([0.6, 0.1, 0.2, 0.1, 0.51, 0.52], True),
        ([0.1, 0.6, 0.2, 0.6], False),
        ([0.6, 0.6, 0.1], False),
    ],
)
def test_plasticity_is_lost_where_two_errors_in_a_row_are_above_five_times_the_best_before(errors, lost):
    assert has_lost(errors) == lost


def test_copies_branch_off_as_soon_as_plasticity_is_lost_and_all_are_followed_for_five_tasks(
    checkpoint, scripted
):
    before, since = [0.1, 0.05, 0.3, 0.1, 0.3, 0.4], [0.02, 0.7, 0.4, 0.5, 0.63]
    scripted(*before, *since, *[0.45] * 9)
    result = run_sequence(checkpoint, "", 30, None, ONCE)
    assert result["copied_before"] == [7]
    assert result["error"][SAME] == [before + since]
    assert result["error"][INJECTED] == [[None] * 6 + [0.01] * 5]
    assert result["error"][RESET] == [[None] * 6 + [0.02] * 5]
    assert result["error"][FRESH] == [[0.02] + [None] * 10], "in the first task alone"
    assert result["best"] == [0.05] and result["since"][SAME] == [pytest.approx(0.45)]
    assert result["relative_to_best"][SAME]["ratio"] == pytest.approx(0.45 / 0.05)
    assert result["relative_to_one"][INJECTED]["ratio"] == pytest.approx(0.01 / 0.45)
    assert result["relative_to_fresh"][INJECTED]["ratio"] == pytest.approx(0.5)


def test_a_network_that_keeps_its_plasticity_is_not_copied_and_not_compared(checkpoint, scripted):
    scripted(0.1, 0.05, 0.3, 0.1, 0.3, 0.2)
    result = run_sequence(checkpoint, "", 6, None, ONCE)
    assert result["copied_before"] == [None] and result["best"] == [0.05]
    assert result["since"] == {name: [None] for name in (SAME, *COPIES)}
    assert set(result["relative_to_one"].values()) == {None}
    assert result["sentence"] == (
        "none of 1 repetitions lost plasticity on the way through 6 tasks "
        "(error above 5× its own best, 2 tasks in a row)"
    )
    task_sequence.draw_sequences([result], Path("x.png"))
    assert sequence_table(result).splitlines()[2].startswith("| seed 0 | – | 0.05 | – | – | – | 0.02 |")


@pytest.mark.parametrize("tasks", [3, 4, 9])
def test_a_loss_that_shows_in_the_last_task_is_followed_all_the_same(checkpoint, scripted, tasks):
    scripted(0.05, 0.3, 0.3, *[0.3] * FOLLOWED)
    result = run_sequence(checkpoint, "", tasks, None, ONCE)
    assert result["copied_before"] == [4] and len(result["error"][INJECTED][0]) == 3 + FOLLOWED


def test_a_task_for_the_injection_can_be_given_and_then_all_go_on_to_the_end(checkpoint, scripted):
    scripted(0.05, 0.3, 0.3, *[0.3] * 9)
    result = run_sequence(checkpoint, "", 12, 3, ONCE)
    assert result["copied_before"] == [3] and result["error"][INJECTED] == [[None] * 2 + [0.01] * 10]


def test_the_copies_are_the_network_of_that_moment_and_all_get_the_same_tasks(checkpoint, fits):
    result = run_sequence(checkpoint, **HOW | {"settings": ONCE})
    first, second, third = fits[:2], fits[2:5], fits[5:]
    same, fresh = (learner for _, learner, *_ in first)
    assert [learner for _, learner, *_ in second] == [learner for _, learner, *_ in third]
    assert second[0][1] is same and fresh not in [learner for _, learner, *_ in second]
    for task in (first, second, third):
        for call in task[1:]:
            for ours, theirs in zip(call[2:5], task[0][2:5], strict=True):
                assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert not torch.equal(first[0][3], second[0][3]) and not np.array_equal(first[0][4], second[0][4])
    assert [learner.q_network.num_injections for _, learner, *_ in second] == [0, 1, 0]
    starts = [errors[0] for *_, errors in second]
    assert starts[0] == starts[1] != starts[2], "an injection does not change Q, a reset does"
    head, encoder = "head.theta.hidden.weight", "encoder.0.weight"
    one, injected, reset = (weights for weights, *_ in second)
    assert torch.equal(one[head], injected[head]) and not torch.equal(one[head], reset[head])
    assert torch.equal(one[encoder], injected[encoder]) and torch.equal(one[encoder], reset[encoder])
    assert [result["error"][name][0].count(None) for name in NAMES] == [0, 1, 1, 2]
    assert result["error"][SAME] == [[errors[1] for *_, errors in (first[0], second[0], third[0])]]


@pytest.mark.parametrize(("moments", "updates"), [("fresh", 2 * 3), ("keep", 3 * 3)])
def test_new_heads_of_copies_begin_with_moments_as_those_of_the_agents_run_do(
    checkpoint, fits, moments, updates
):
    change(checkpoint, moments=moments)
    run_sequence(checkpoint, **HOW | {"settings": ONCE})
    for _, learner, *_ in fits[3:5]:
        bias = learner.learning_head().output.bias
        assert learner.optimizer.state[bias]["step"] == updates, "of two tasks, or of the one before, too"


def test_the_units_that_are_measured_are_those_of_the_head_that_learns_and_of_the_encoder(checkpoint):
    subject = read_subject(checkpoint, 1e-3)
    obs = replayed_observations(subject, 16, CPU)
    learner = make_contender("agent", subject, 0, CPU)
    learner.inject()
    with torch.no_grad():
        learner.q_network.head.theta.hidden.bias.fill_(-1e3)
        newest = learner.q_network.head.theta_prime_1[0].hidden
        newest.weight.zero_()
        newest.bias.copy_(torch.arange(len(newest.bias)) >= 16)  # no unit is between 0 and 1
        newest.bias[-2] = 0.3
        newest.bias[-1] = 0.005  # dormant, and active all the same
        learner.q_network.encoder[4].bias[:16], learner.q_network.encoder[4].bias[16:] = -1e3, 1e3
    measured = task_sequence.measured_shares(learner, obs)
    assert measured == {"encoder_active": 48 / 64, "dormant": 17 / len(newest.bias)}


@pytest.mark.slow
def test_the_one_network_goes_its_way_whatever_is_done_to_its_copies(checkpoint):
    early, late = (run_sequence(checkpoint, **HOW | {"inject_at": at}) for at in (2, 3))
    assert early["error"][SAME] == late["error"][SAME]
    assert early["error"][FRESH] == late["error"][FRESH]
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
    since = {name: [np.mean(errors[1:]) for errors in once["error"][name]] for name in (SAME, *COPIES)}
    standards = {
        "best": [errors[0] for errors in once["error"][SAME]],
        "fresh": [errors[0] for errors in once["error"][FRESH]],
        "one": since[SAME],
    }
    for standard, reference in standards.items():
        for name, relative in once[f"relative_to_{standard}"].items():
            assert relative == relative_error(since[name], reference), (standard, name)
    assert once["relative_to_one"].keys() == {*COPIES}


@pytest.mark.slow
def test_fresh_networks_go_through_tasks_on_frames_of_random_play(fits):
    result = run_sequence(Path("fresh"), **HOW | {"env_id": TINY_GAMES, "tasks": 2})
    weights = [before["head.theta.hidden.weight"] for before, *_ in fits]
    assert {of_one.shape for of_one in weights} == {(16, weights[0].shape[1])}, "as wide as they are to be"
    networks, beside = (weights[0], weights[5]), (weights[1], weights[6])
    assert not torch.equal(*networks), "one for each seed"
    assert not torch.equal(*beside) and not torch.equal(networks[0], beside[0]), "and another beside it"
    injected = [fits[k][0]["head.theta_prime_1.0.hidden.weight"] for k in (3, 8)]
    reset = [fits[k][0]["head.theta.hidden.weight"] for k in (4, 9)]
    assert not torch.equal(*injected) and not torch.equal(*reset), "each seed draws others"
    measured_on = [result[name] for name in ("checkpoint", "run_seed", "step", "learning_rate", "head_width")]
    assert measured_on == ["fresh", None, 0, 5e-4, 16]


def test_agents_and_fresh_networks_learn_at_one_rate_whatever_the_runs_was(checkpoint, monkeypatch):
    rates = []
    monkeypatch.setattr(fitting, "read_subject", lambda path, rate: rates.append(rate))
    monkeypatch.setattr(fitting, "fresh_checkpoint", lambda *given: rates.append(given[2]))
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
    for at in (2, None):
        result = run_sequence(checkpoint, **HOW | {"inject_at": at})
        assert result["error"][SAME] == [[None] * 3] * 2
        assert result["sentence"] == "no answer: a network diverged, lower --probe-learning-rate"
        assert sequence_table(result).splitlines()[2].split(" | ")[2] == "–"
        task_sequence.draw_sequences([result], Path("x.png"))
        json.dumps(result, allow_nan=False)


def test_a_copy_that_diverges_is_said_to(checkpoint, scripted, monkeypatch):
    scripted(0.05, 0.3, 0.3, *[0.3] * FOLLOWED)
    fit = fitting.fit

    def diverge(learner, *arguments):
        start, end = fit(learner, *arguments)
        return start, np.inf if learner.q_network.num_injections else end

    monkeypatch.setattr(fitting, "fit", diverge)
    result = run_sequence(checkpoint, "", 9, None, ONCE)
    assert result["copied_before"] == [4] and result["error"][INJECTED][0][3:] == [None] * FOLLOWED
    assert result["sentence"] == "no answer: a copy diverged, lower --probe-learning-rate"


def relative(*ratios, bounds=None):
    return {"per_seed": list(ratios), "ratio": ratios[0], "interval": bounds}


def lost_by_three(**changes):
    """What makes the sentence of a sequence: 3 of 4 networks lost plasticity."""
    result = {"checkpoint": "fresh", "probe_tasks": 9, "probe_inject_at": None, "probe_updates": 200}
    result |= {"copied_before": [4, None, 5, 6], "best": [0.05, 0.05, 0.04, 0.06]}
    result["start"] = {FRESH: [[0.5], [0.5], [0.5], [0.5]]}
    result["error"] = {SAME: [[0.05, 0.4], [0.05, 0.05], [0.04, 0.4], [0.06, 0.2]]}
    result["relative_to_best"] = {SAME: relative(7, 8, 6, bounds=[5, 9])}
    result["relative_to_one"] = {
        INJECTED: relative(0.1, 0.2, 0.3, bounds=[0.05, 0.5]),
        RESET: relative(0.9, 0.8, 1.1, bounds=[0.5, 1.5]),
    }
    return result | changes


def test_the_sentence_claims_what_the_intervals_support():
    assert sequence_in_words(lost_by_three()) == (
        "3 of 4 networks lost plasticity on the way, before tasks 4, 5 and 6 (error above 5× its own best, "
        "2 tasks in a row); from there on the error of one that is left alone is 7× [5, 9] its own best, "
        "in the last task that of 1 is below 5×; "
        "with an injection it is 0.1× [0.05, 0.5] that (better, lower in 3 of 3); "
        "with the head reset it is 0.9× [0.5, 1.5] that (no clear difference, lower in 2 of 3)"
    )
    at_once = lost_by_three(probe_inject_at=4, copied_before=[4] * 4, best=[0.05] * 4)
    assert sequence_in_words(at_once).startswith(
        "4 networks, copied before task 4; from there on the error of one that is left alone is 7× [5, 9] "
        "its own best; with an injection"
    )
    one = lost_by_three(copied_before=[None, 7, None, None])
    assert "1 of 4 networks lost plasticity on the way, before task 7 (" in sequence_in_words(one)
    agent = lost_by_three(checkpoint="runs/a/checkpoint-100")
    assert sequence_in_words(agent).startswith("3 of 4 repetitions lost plasticity"), "of one agent"


@pytest.mark.parametrize(
    ("copied", "best", "answers"),
    [(None, 0.09, True), (None, 0.11, False), (4, 0.44, True), (4, 0.46, False)],
)
def test_there_is_no_answer_where_a_target_is_hardly_learned(copied, best, answers):
    result = lost_by_three(copied_before=[copied] * 4, best=[best] * 4)
    assert sequence_in_words(result).startswith("no answer: 200 updates hardly fit a target") != answers


@pytest.mark.slow
def test_it_is_drawn_printed_and_written(checkpoint, capsys, recwarn):
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
    titles = ["network", "copied before task", "best error", "then: left alone", "injected", "head reset"]
    titles += ["a fresh network", "head dormant by then", "encoder active by then"]
    assert header.strip("| ").split(" | ") == titles
    assert {row.count("|") for row in (header, rule, *rows)} == {10}
    assert "left out: nowhere" in printed
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    (first, second, third), (injected, *_) = results[0]["error"][SAME][0], results[0]["since"][INJECTED]
    assert cells[:5] == ["seed 0", "2", f"{first:.3g}", f"{(second + third) / 2:.3g}", f"{injected:.3g}"]
    shares = [results[0][measure][SAME][0] for measure in ("dormant", "encoder_active")]
    assert cells[7:] == [f"{of_tasks[0]:.0%}" for of_tasks in shares] and shares[0][0] != shares[1][0]
    assert rows[2].startswith("| 2 that were copied |  | ")


@pytest.mark.parametrize("at", [1, 4, 0, -1])
def test_an_injection_outside_of_the_sequence_is_refused(checkpoint, at):
    with pytest.raises(UsageError, match=f"probe_inject_at is {at}, but must be 2 to 3"):
        probe_sequence([str(checkpoint)], **HOW | {"inject_at": at}, out=Path("x.png"))


def found_in_four():
    """A result of four networks, of which three were copied, before tasks 4, 6 and 3."""
    copied = [4, 6, None, 3]
    result = {"checkpoint": "fresh", "env_id": TINY_GAMES, "probe_tasks": 9, "probe_updates": 200}
    result |= {"copied_before": copied, "probe_inject_at": None}
    rng = np.random.default_rng(0)
    for measure in task_sequence.MEASURED:
        result[measure] = {name: [] for name in NAMES}
        for task in copied:
            length = 9 if task is None else task + 4
            values = rng.uniform(0.01, 1, size=(4, length))
            for name in COPIES:
                values[NAMES.index(name), : length if task is None else task - 1] = np.nan
            values[NAMES.index(FRESH), 1:] = np.nan
            for name, of_name in zip(NAMES, values, strict=True):
                result[measure][name].append([None if np.isnan(value) else value for value in of_name])
    return result | task_sequence.compare_copies(result)


def test_errors_are_compared_within_the_networks_that_were_copied():
    result = found_in_four()
    of_copied = {name: [result["since"][name][seed] for seed in (0, 1, 3)] for name in (SAME, *COPIES)}
    fresh = [result["error"][FRESH][seed][0] for seed in (0, 1, 3)]
    best = [result["best"][seed] for seed in (0, 1, 3)]
    for name in COPIES:
        assert result["relative_to_one"][name] == relative_error(of_copied[name], of_copied[SAME])
        assert result["relative_to_fresh"][name] == relative_error(of_copied[name], fresh)
        assert result["relative_to_best"][name] == relative_error(of_copied[name], best)
    assert result["since"][SAME][2] is None and result["best"][2] == min(result["error"][SAME][2])


def test_networks_are_aligned_at_the_task_before_which_they_were_copied():
    result = found_in_four()
    tasks, values = task_sequence.aligned(result, "error", SAME)
    assert tasks.tolist() == list(range(-5, 5)) and values.shape == (3, 10)
    for row, seed in zip(values, (0, 1, 3), strict=True):
        own = result["error"][SAME][seed]
        assert row[-len(own) :].tolist() == own and np.isnan(row[: -len(own)]).all()
    _, injected = task_sequence.aligned(result, "error", INJECTED)
    assert np.isnan(injected[:, :5]).all() and not np.isnan(injected[:, 5:]).any()


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_sequence_too_short_to_see_a_loss_is_refused(checkpoint, tasks):
    with pytest.raises(UsageError, match=f"probe_tasks is {tasks}, but it takes 3 to see a loss"):
        probe_sequence([str(checkpoint)], "", tasks, None, ONCE, out=Path("x.png"))


def test_intervals_of_an_error_are_on_the_log_scale_and_what_is_dashed_has_a_name(monkeypatch):
    result = found_in_four()
    errors = np.array([result["since"][INJECTED][seed] for seed in (0, 1, 3)])
    centre, low, high = task_sequence.geometric_interval(np.log(errors))
    row = sequence_table(result).splitlines()[-1]
    assert row.startswith("| 3 that were copied |") and f"{centre:.3g} [{low:.3g}, {high:.3g}]" in row
    drawn = []
    monkeypatch.setattr("analysis.canvas.save", lambda figure, path: drawn.append(figure))
    task_sequence.draw_sequences([result], Path("x.png"))
    error, *shares = drawn[0].axes
    for ax in shares:
        of_shares = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in ax.collections])
        assert of_shares.min() >= 0 and of_shares.max() <= 1
    bands = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in error.collections])
    assert error.get_yscale() == "log" and bands.min() > 0
    dashed = {line.get_label() for line in error.lines if line.get_linestyle() == "--"} - {INJECTED}
    named = {text.get_text() for text in drawn[0].legends[0].get_texts()}
    assert dashed == {FRESH, "injection or reset"} and dashed <= named


def test_what_is_drawn_in_one_column_only_has_a_name_too(monkeypatch):
    lost = found_in_four()
    kept = lost | {"copied_before": [None] * 4}
    drawn = []
    monkeypatch.setattr("analysis.canvas.save", lambda figure, path: drawn.append(figure))
    task_sequence.draw_sequences([kept, lost], Path("x.png"))
    assert "injection or reset" in {text.get_text() for text in drawn[0].legends[0].get_texts()}


def test_networks_are_told_apart_without_colours():
    assert task_sequence.LOOKS.keys() == set(NAMES)
    assert len({(look.dashes, look.marker) for look in task_sequence.LOOKS.values()}) == len(NAMES)
