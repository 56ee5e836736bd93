"""Agents and fresh networks that fit random targets: what they start from, and what they are given."""

import copy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import TINY_GAMES
from saved_agents import CPU, SMALL, change

from alternatives import ALTERNATIVES
from analysis import fitting
from analysis.fitting import CONTENDERS, FRESH, fresh_checkpoint, random_play, read_subject, saved_args
from dqn_injection_atari import Learner, make_parts
from support.checkpoints import Checkpoint, load_checkpoint
from support.environments import LearnerView
from support.usage import UsageError


def test_the_relative_error_is_the_paired_t_interval_of_log_ratios():
    relative = fitting.relative_error([0.2, 0.9, 0.4], [0.1, 0.3, 0.4])
    assert relative["per_seed"] == pytest.approx([2, 3, 1])
    assert relative["ratio"] == pytest.approx(6 ** (1 / 3))
    half = 4.30265 * np.std(np.log([2, 3, 1]), ddof=1) / 3**0.5  # t of 97.5% at 2 degrees of freedom
    assert np.log(relative["interval"]) == pytest.approx(
        [np.log(6) / 3 - half, np.log(6) / 3 + half], rel=1e-4
    )
    two = fitting.relative_error([0.2, 0.9], [0.1, 0.3])
    low, high = scipy.stats.ttest_1samp(np.log([2, 3]), 0).confidence_interval()
    assert two["interval"] == pytest.approx([np.exp(low), np.exp(high)])
    assert fitting.relative_error([0.5], [0.5]) == {"per_seed": [1.0], "ratio": 1.0, "interval": None}
    assert fitting.relative_error([0.2, float("nan")], [0.1, 0.1]) is None


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_there_is_no_relative_error_where_one_is_no_number_or_0_on_either_side(bad):
    assert fitting.relative_error([0.2, bad], [0.1, 0.1]) is None
    assert fitting.relative_error([0.2, 0.2], [0.1, bad]) is None


def test_targets_are_spread_as_a_sine_and_equal_for_equal_observations(checkpoint):
    obs = fitting.replayed_observations(load_checkpoint(checkpoint), 64, CPU)
    obs[1] = obs[0]
    network = Learner(SMALL, 8, CPU).q_network
    targets = fitting.random_targets(network, obs)
    assert targets.shape == (64, 8) and targets.dtype == torch.float32
    assert targets.square().mean() == pytest.approx(0.5, abs=0.1) and targets.mean() == pytest.approx(
        0, abs=0.15
    )
    assert torch.equal(targets[0], targets[1]) and not torch.equal(targets[0], targets[2])
    one_by_one = torch.cat([fitting.random_targets(network, one) for one in obs.split(1)])
    assert torch.allclose(one_by_one, targets, atol=1e-5), "they are no rounding errors"


def test_targets_are_the_sine_of_a_hundred_thousand_times_a_networks_outputs(checkpoint):
    obs = fitting.replayed_observations(load_checkpoint(checkpoint), 8, CPU)
    network = Learner(SMALL, 8, CPU).q_network
    targets = fitting.random_targets(network, obs)
    network = network.double()
    with torch.no_grad():
        outputs = network.head.theta(network.encoder(obs.double() / 255))
    torch.testing.assert_close(targets, torch.sin(100_000 * outputs).float(), atol=1e-4, rtol=0)


def test_a_tasks_batches_have_the_runs_size_and_are_drawn_from_all_observations(checkpoint):
    saved = load_checkpoint(checkpoint)
    obs = fitting.replayed_observations(saved, 16, CPU)
    _, batches, _ = fitting.next_task(saved, obs, 50, np.random.default_rng(0))
    assert batches.shape == (50, SMALL.batch_size) and set(batches.ravel()) == set(range(16))


def test_a_fit_is_gradient_descent_on_half_the_squared_error_to_mean_outputs_plus_targets(checkpoint):
    learner = fitting.make_contender(FRESH, load_checkpoint(checkpoint), 0, CPU)
    obs = fitting.replayed_observations(load_checkpoint(checkpoint), 8, CPU)
    targets = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    batch = [1, 1, 4]
    reference = copy.deepcopy(learner.q_network)
    outputs = reference(obs)
    wanted = outputs.detach().mean(dim=0) + targets
    loss = sum(0.5 * (outputs[row] - wanted[row]).square().sum() for row in batch) / len(batch)
    loss.backward()
    learner.optimizer = torch.optim.SGD(learner.q_network.parameters(), lr=0.1)
    start, end = fitting.fit(learner, obs, targets, np.array([batch]))
    assert start == pytest.approx((outputs - wanted).square().mean().item())
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    for name, value in learner.q_network.named_parameters():
        torch.testing.assert_close(value, reference.get_parameter(name), atol=1e-6, rtol=1e-4)
    assert end == pytest.approx((reference(obs) - wanted).square().mean().item(), rel=1e-4) and end < start


def test_every_contender_starts_without_moments(checkpoint):
    saved = load_checkpoint(checkpoint)
    assert saved.state["learner"]["optimizer"]
    for name in CONTENDERS:
        assert not fitting.make_contender(name, saved, 0, CPU).optimizer.state


def test_a_fresh_networks_head_is_as_wide_as_the_one_that_the_agent_learns_with(checkpoint):
    learner = Learner(replace(SMALL, head_width=32, injected_head_width=96), 8, CPU)
    for width, injections in ((32, 0), (96, 1)):
        if injections:
            learner.inject(180)
        change(checkpoint, learner=learner, head_width=32, injected_head_width=96)
        saved = load_checkpoint(checkpoint)
        assert fitting.num_injections(saved) == injections
        assert fitting.make_contender(FRESH, saved, 0, CPU).q_network.head.theta.hidden.out_features == width


def test_observations_come_from_replay_and_none_twice(checkpoint):
    saved = load_checkpoint(checkpoint)
    envs, _, replay = make_parts(SMALL, CPU)
    envs.close()
    saved.restore({"replay": replay})
    rows, columns = np.divmod(np.arange(replay.size() * replay.n_envs), replay.n_envs)
    held = replay.transitions(rows, columns).observations.flatten(1)
    drawn = fitting.replayed_observations(saved, len(held), CPU).flatten(1)

    def in_order(obs):
        return sorted(row.numpy().tobytes() for row in obs)

    assert in_order(drawn) == in_order(held)


def test_a_few_observations_come_from_the_whole_replay_and_are_always_the_same(checkpoint, monkeypatch):
    chosen = []
    original = fitting.FrameReplayBuffer.transitions

    def note(replay, rows, columns):
        chosen.append((rows, columns))
        return original(replay, rows, columns)

    monkeypatch.setattr(fitting.FrameReplayBuffer, "transitions", note)
    for _ in range(2):
        fitting.replayed_observations(load_checkpoint(checkpoint), 30, CPU)
    (rows, columns), again = chosen
    assert rows.min() < 15 and rows.max() >= 75 and set(columns) == {0, 1}, "of 90 rows"
    assert np.array_equal((rows, columns), again)


def test_a_replay_that_does_not_fit_in_memory_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(fitting, "free_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"needs 0\.0 GB and 0\.0 GB of memory are free"):
        fitting.replayed_observations(load_checkpoint(checkpoint), 16, CPU)


def test_the_learning_rate_is_the_one_that_is_given_and_no_weight_decays(checkpoint):
    change(checkpoint, weight_decay=0.1)
    learner = fitting.make_contender("agent", read_subject(checkpoint, 0.5), 0, CPU)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [0.5]
    assert [group["weight_decay"] for group in learner.optimizer.param_groups] == [0]
    for subject in (read_subject(checkpoint, 0.5), fresh_checkpoint(TINY_GAMES, 0, 0.5)):
        assert saved_args(subject).learning_rate == 0.5


def test_fresh_networks_differ_by_seed_and_have_the_actions_of_their_game():
    one, same, other = (fresh_checkpoint(TINY_GAMES, seed, 5e-4) for seed in (1, 1, 2))
    networks = [subject.state["learner"]["q_network"] for subject in (one, same, other)]
    weights = [network["head.theta.hidden.weight"] for network in networks]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert fitting.num_actions(one) == 8 and fitting.num_injections(one) == 0 and one.step == 0


@pytest.mark.slow
def test_random_play_shows_many_observations_and_always_the_same():
    obs = random_play("PhoenixNoFrameskip-v4", 20, CPU)
    assert (
        obs.shape == (20, 4, 84, 84) and obs.dtype == torch.uint8 and len(obs.flatten(1).unique(dim=0)) > 18
    )
    assert torch.equal(obs, random_play("PhoenixNoFrameskip-v4", 20, CPU))


def test_observations_of_random_play_are_16_steps_apart(monkeypatch):
    played = []
    step = LearnerView.step
    monkeypatch.setattr(LearnerView, "step", lambda envs, actions: played.append(1) or step(envs, actions))
    random_play(TINY_GAMES, 20, CPU)
    assert len(played) == 3 * 16, "20 are 3 times 8 games, and a part"


@pytest.mark.parametrize(
    "changes",
    [
        {"intervention": "reset-head", "keep_checkpoints": (4, 60)},
        {"intervention": "shrink-perturb", "shrink_factor": 0.5},
        {"intervention": "none", "moments": "keep", "shrink_factor": 0.5},
        {"intervention": "none", "injection_step": ()},
        {
            "intervention": "reset-head",
            "injection_step": (),
            "injection_trigger": "norm",
            "injection_norm_ratio": 2.0,
        },
        {"intervention": "none", "freeze_heads": False},
    ],
    ids=str,
)
def test_an_agent_of_a_run_that_adds_no_heads_can_be_injected_in_a_probe(changes):
    args = replace(SMALL, **changes)
    learner = Learner(args, 8, CPU)
    learner.apply(ALTERNATIVES["reset-head"], 180)
    saved = Checkpoint(Path("x"), {"step": 200, "args": asdict(args)}, {"learner": learner.state_dict()})
    obs = torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8)
    injected = fitting.make_contender("agent, injected", saved, 0, CPU)
    assert injected.q_network.num_injections == 1 and injected.q_network.head.freeze == args.freeze_heads
    assert torch.equal(injected.q_network(obs), learner.q_network(obs))
