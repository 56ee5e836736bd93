"""The probe of fitting capacity: python compare.py --probe CHECKPOINT ..."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_agents import SMALL, change, kill_encoder, kill_head, make_fresh

from analysis import fitting
from analysis import probe as probing
from analysis.fitting import CONTENDERS, FRESH, ProbeSettings, num_actions, random_targets
from analysis.probe import probe, probe_checkpoint
from dqn_injection_atari import Learner
from support.checkpoints import load_checkpoint
from support.usage import UsageError

AGENT, INJECTED, _ = CONTENDERS
CPU = torch.device("cpu")
QUICK = ProbeSettings(observations=16, updates=5, seeds=2, learning_rate=1e-4)
ONCE = replace(QUICK, seeds=1)
ENOUGH = ProbeSettings(observations=8, updates=60, seeds=1, learning_rate=1e-3)


def ratios(result):
    return [result["relative_to_fresh"][name]["ratio"] for name in (AGENT, INJECTED)]


# what it measures


@pytest.mark.slow
def test_a_network_like_a_fresh_one_has_a_ratio_of_about_1(checkpoint):
    change(checkpoint, make_fresh)
    result = probe_checkpoint(checkpoint, ENOUGH)
    assert np.mean(result["errors"][FRESH]["end"]) < 0.5 * np.mean(result["errors"][FRESH]["start"])
    assert 0.5 < ratios(result)[0] < 2


@pytest.mark.slow
def test_a_dead_head_has_lost_capacity_and_an_injection_restores_it(checkpoint):
    change(checkpoint, kill_head)
    agent, injected = ratios(probe_checkpoint(checkpoint, ENOUGH))
    assert agent > 3.5 and injected < 2.5


@pytest.mark.slow
def test_no_injection_helps_where_the_encoder_is_dead(checkpoint):
    change(checkpoint, kill_encoder)
    assert min(ratios(probe_checkpoint(checkpoint, ENOUGH))) > 5


def test_a_level_of_the_values_does_not_count(checkpoint):
    def lift(q_network):
        make_fresh(q_network)
        q_network["head.theta.output.bias"] += 100 * torch.arange(8)

    change(checkpoint, lift)
    errors = probe_checkpoint(checkpoint, QUICK)["errors"]
    assert errors[AGENT]["start"] == pytest.approx(errors[FRESH]["start"], rel=0.1)


# the same conditions for all


@pytest.fixture
def fits(monkeypatch):
    """Of every call of `fit`: weights by name before it, learner, observations, targets, batches, errors."""
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


def test_contenders_share_observations_targets_and_batches_and_seeds_differ(checkpoint, fits):
    probe_checkpoint(checkpoint, QUICK)
    (first, *others), (second, *_) = fits[:3], fits[3:]
    assert len(fits) == 6
    for other in others:
        for given, same in zip(first[2:5], other[2:5], strict=True):
            assert np.array_equal(given, same)
    assert np.array_equal(first[2], second[2])
    assert not np.array_equal(first[3], second[3]) and not np.array_equal(first[4], second[4])
    before, learner, obs, targets, *_ = others[-1]
    learner.q_network.load_state_dict(before, strict=False)
    assert not torch.allclose(random_targets(learner.q_network, obs), targets, atol=0.1), (
        "its own would be easier"
    )


def test_seeds_differ_in_fresh_weights_and_injection(checkpoint, fits):
    probe_checkpoint(checkpoint, QUICK)
    agent, injected, fresh = ((fits[i][0], fits[i + 3][0]) for i in range(3))
    assert all(torch.equal(agent[0][name], agent[1][name]) for name in agent[0])
    assert not torch.equal(fresh[0]["head.theta.hidden.weight"], fresh[1]["head.theta.hidden.weight"])
    assert not torch.equal(*(before["head.theta_prime_1.0.hidden.weight"] for before in injected))


@pytest.mark.slow
def test_an_injection_does_not_change_the_first_error(checkpoint, injected_checkpoint):
    for path in (checkpoint, injected_checkpoint):
        errors = probe_checkpoint(path, QUICK)["errors"]
        assert errors[AGENT]["start"] == errors[INJECTED]["start"] != errors[INJECTED]["end"]


def test_only_what_the_agent_would_train_moves(injected_checkpoint, fits):
    probe_checkpoint(injected_checkpoint, ONCE)
    learning = (
        "head.theta_prime_1.0.",
        "head.theta_prime_1.1.",
        "head.theta.",
    )  # the heads of agent, injected agent, fresh network
    for (before, learner, *_), head in zip(fits, learning, strict=True):
        moved = {name for name, p in learner.q_network.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if name.startswith(("encoder.", head))}


@pytest.mark.parametrize("rate", [1e-4, 5e-5, 1e-3])
def test_the_learning_rate_is_the_probes_own_and_a_high_one_is_remarked_on(
    checkpoint, capsys, monkeypatch, rate
):
    rates = []

    def fit(learner, *_):
        rates.append(learner.args.learning_rate)
        return 1.0, 0.5

    monkeypatch.setattr(fitting, "fit", fit)
    (result,) = probe([str(checkpoint)], replace(ONCE, learning_rate=rate))
    assert result["learning_rate"] == rate and rates == 3 * [rate], "the run's does not matter"
    printed = capsys.readouterr().out
    if rate == 1e-3:
        assert printed.splitlines()[-1] == f"remark: {result['remark']}"
        assert result["remark"].startswith("at learning rate 0.001 ") and result["remark"].endswith(
            "-rate for 0.0001"
        )
    else:
        assert result["remark"] is None and "remark" not in printed


def test_runs_in_bfloat16_are_probed_in_float32(checkpoint, fits):
    change(checkpoint, bf16=True)
    probe_checkpoint(checkpoint, ONCE)
    assert all(p.dtype == torch.float32 for _, learner, *_ in fits for p in learner.online.parameters())


def test_runs_that_the_norm_injects_are_probed(checkpoint, fits):
    change(checkpoint, injection_trigger="norm", injection_norm_ratio=2.0, injection_step=())
    assert probe_checkpoint(checkpoint, ONCE)["injections"] == 0
    assert [learner.q_network.num_injections for _, learner, *_ in fits] == [0, 1, 0]


def test_interventions_that_are_no_injections_are_not_counted_as_such(checkpoint, fits):
    learner = Learner(
        replace(SMALL, intervention="reset-head"), num_actions(load_checkpoint(checkpoint)), CPU
    )
    learner.intervene(180)
    change(checkpoint, learner=learner, intervention="reset-head")
    assert probe_checkpoint(checkpoint, ONCE)["injections"] == 0
    assert [learner.q_network.num_injections for _, learner, *_ in fits] == [0, 1, 0]


def test_a_bias_that_all_actions_share_does_not_make_them_one(checkpoint, fits):
    actions = num_actions(load_checkpoint(checkpoint))
    change(checkpoint, learner=Learner(replace(SMALL, shared_bias=True), actions, CPU), shared_bias=True)
    probe_checkpoint(checkpoint, ONCE)
    assert [targets.shape for _, _, _, targets, *_ in fits] == 3 * [(16, actions)]


# as a user sees it


@pytest.mark.slow
def test_twice_gives_the_same_numbers_and_leaves_the_checkpoint_as_it_is(checkpoint, capsys):
    content = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in checkpoint.iterdir()}
    torch.use_deterministic_algorithms(False)
    once, again = (probe([str(checkpoint), f"{checkpoint}/"], QUICK) for _ in range(2))
    assert once == again and len(once) == 1 and torch.are_deterministic_algorithms_enabled()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in checkpoint.iterdir()} == content
    assert json.loads(json.dumps(once, allow_nan=False)) == once
    out = capsys.readouterr().out
    assert all(name in out for name in CONTENDERS) and once[0]["sentence"] in out


def test_damaged_and_missing_checkpoints_are_named_and_left_out(checkpoint, tmp_path, capsys):
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    with open(damaged / "replay.zst", "r+b") as file:
        file.write(b"?")
    given = (str(damaged), str(tmp_path / "missing"), str(checkpoint))
    (result,) = probe(given, QUICK)
    assert result["checkpoint"] == str(checkpoint)
    left_out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(left_out) == 2 and "replay.zst is damaged" in left_out[0] and "missing" in left_out[1]
    with pytest.raises(UsageError, match=r"no checkpoint to probe.*replay\.zst is damaged"):
        probe(given[:2], QUICK)


def test_what_was_found_is_kept_where_a_later_checkpoint_fails(checkpoint, monkeypatch):
    result = {"checkpoint": "a", "env_id": "b", "step": 1, "injections": 0, "sentence": "c", "remark": None}
    result |= {"errors": {}, "relative_to_fresh": {}}
    probed = []

    def out_of_memory_at_the_second(path, settings):
        probed.append(path)
        if len(probed) == 2:
            raise MemoryError
        return result

    monkeypatch.setattr(probing, "probe_checkpoint", out_of_memory_at_the_second)
    with pytest.raises(MemoryError):
        probe(["a", "b"], QUICK, Path("new/x.png"))
    assert json.loads(Path("new/x.json").read_text(encoding="utf-8")) == [result]


def test_too_few_observations_are_refused(checkpoint):
    with pytest.raises(
        UsageError, match="holds 180 observations and not 181: lower --probe-observations to 180"
    ):
        probe_checkpoint(checkpoint, replace(QUICK, observations=181))


def test_without_checkpoints_there_is_nothing_to_probe():
    with pytest.raises(UsageError, match="no checkpoint to probe; give checkpoints"):
        probe((), QUICK)


def test_a_checkpoint_of_another_scripts_run_is_refused(checkpoint):
    change(checkpoint, colour="red")
    with pytest.raises(
        UsageError, match=r"checkpoint-180 cannot be read as a checkpoint \(TypeError: .*colour.*take another"
    ):
        probe_checkpoint(checkpoint, QUICK)


def test_a_network_that_diverges_is_said_to_and_has_no_number(checkpoint):
    def spoil(q_network):
        q_network["head.theta.output.weight"].fill_(1e30)

    change(checkpoint, spoil)
    result = probe_checkpoint(checkpoint, QUICK)
    assert result["errors"][AGENT]["end"] == [None, None] and result["relative_to_fresh"][AGENT] is None
    assert "diverged" in probing.probe_table(result)
    json.dumps(result, allow_nan=False)


def words(agent, injected=(1.0, [0.9, 1.1]), start=0.5, end: float | None = 0.1):
    """The sentence on one seed's errors, with relative errors (ratio, interval)."""
    compared = {
        name: relative and {"per_seed": [relative[0]], "ratio": relative[0], "interval": relative[1]}
        for name, relative in ((AGENT, agent), (INJECTED, injected))
    }
    errors = {
        name: {"start": [start], "end": [end if compared.get(name, True) else None]} for name in CONTENDERS
    }
    return probing.probe_in_words({"errors": errors, "relative_to_fresh": compared, "probe_updates": 1000})


def test_the_sentence_claims_what_the_interval_supports():
    assert "the agent's error is 2× [1.5, 2.6] a fresh network's (worse)" in words((2.0, [1.5, 2.6]))
    assert "0.8× [0.7, 0.9] a fresh network's (better)" in words((0.8, [0.7, 0.9]))
    assert "2× [0.9, 4] a fresh network's (no clear difference)" in words((2.0, [0.9, 4.0]))
    assert "injection it is 1× [0.9, 1.1] a fresh network's (no clear difference)" in words((2.0, [1.5, 2.6]))
    assert "2× a fresh network's (one seed, no interval)" in words((2.0, None))
    assert "the agent's error is not to be compared (diverged with 1 of 1 seeds)" in words(None)
    assert "own error fell by 80%" in words((2.0, None))
    assert "no answer: a fresh network loses only 4% of its error" in words((2.0, [1.5, 2.6]), end=0.48)
    result = {"errors": {FRESH: {"start": [0.5, 0.1], "end": [0.5, 0.0]}}, "probe_updates": 1000}
    result["errors"] |= {name: {"start": [0.5] * 2, "end": [None] * 2} for name in (AGENT, INJECTED)}
    result["relative_to_fresh"] = {AGENT: None, INJECTED: None}
    assert "fell by 17%" in probing.probe_in_words(result), "of the errors of all seeds together"
    grown = words((2.0, [1.5, 2.6]), end=0.9)
    assert (
        grown
        == "no answer: a fresh network's error grew by 80% in 1,000 updates, lower --probe-learning-rate"
    )
    assert "loses only 0% of its error in 1,000 updates, raise --probe-updates" in words(
        (2.0, None), end=0.5001
    )
    assert words(None, end=None) == "no answer: a fresh network diverges, lower --probe-learning-rate"


@pytest.mark.parametrize(("end", "answers"), [(0.455, False), (0.445, True)])
def test_there_is_an_answer_where_a_fresh_network_loses_a_tenth_of_its_error(end, answers):
    assert words((2.0, None), end=end).startswith("no answer: a fresh network loses only 9%") != answers
