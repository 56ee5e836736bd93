"""Measures of plasticity and learning, against answers known in closed form; measuring changes nothing."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BRIEF, make_learner, random_batch, scalars

from benchmarks.kill_test import content, differences, flat
from dqn_injection_atari import plasticity_measures, td_loss, train
from support.measures import (
    LossMeter,
    NormTracker,
    active_fraction,
    dormant_units,
    effective_rank,
    joint_norm,
    policy_churn,
    share_of_q,
    singular_values,
    srank,
)

SMALL = replace(
    BRIEF, num_envs=3, total_timesteps=240, learning_starts=60, log_frequency=120, injection_step=(150,)
)


# the measures


def test_a_unit_is_dormant_when_its_mean_activation_is_at_most_tau_of_the_layers():
    # means 2, 0.25, 2, 0 and 1.0625 over all
    layer = torch.tensor([[2.0, 0.5, 0.0, 0.0], [2.0, 0.0, 4.0, 0.0]])
    assert dormant_units(layer).tolist() == [0, 0, 0, 1]
    assert dormant_units(layer, tau=0.25).tolist() == [0, 1, 0, 1], "0.25 / 1.0625 is 0.235"
    quiet_and_loud = torch.tensor([[0.25, 1.75]])
    assert dormant_units(quiet_and_loud, tau=0.25).tolist() == [1, 0], "at most: the bound belongs to it"
    assert dormant_units(quiet_and_loud, tau=0.24).tolist() == [0, 0]
    assert dormant_units(torch.tensor([[3.0, 1.0], [-3.0, 1.0]])).tolist() == [0, 0], "sizes count, not signs"
    by_default = dormant_units(torch.tensor([[0.024, 0.026, 2.95]]))  # mean 1
    assert by_default.tolist() == [1, 0, 0], "tau is 0.025"
    quiet = 1e-6 * quiet_and_loud
    assert dormant_units(quiet, tau=0.25).tolist() == [1, 0], "as loud as a layer is does not matter"
    assert dormant_units(1e-6 * torch.tensor([[0.4, 1.6]]), tau=0.25).tolist() == [0, 0]


def test_a_channel_is_one_unit_averaged_over_batch_and_space():
    layer = torch.zeros(2, 3, 5, 5)
    layer[1, 0, 4, 4] = 50.0  # mean 1
    layer[:, 1] = 1.0
    layer[0, 2, 0, 0] = 0.5  # mean 0.01
    assert dormant_units(layer).tolist() == [0, 0, 1]
    assert dormant_units(layer).shape == (3,)


@pytest.mark.parametrize("tau", [0.0, 0.025, 0.1])
@pytest.mark.parametrize("shape", [(4, 7), (4, 7, 2, 2)])
def test_a_layer_that_is_never_active_is_wholly_dormant(shape, tau):
    assert dormant_units(torch.zeros(shape), tau).tolist() == [1] * 7


def test_a_unit_that_alone_is_active_is_not_dormant():
    assert dormant_units(torch.eye(7)[:1]).tolist() == [0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_beside_a_unit_that_is_not_finite_none_is_called_dormant(value):
    assert dormant_units(torch.tensor([[1.0, 2.0, value]])).isnan().tolist() == [True] * 3


def test_of_activations_that_are_not_finite_no_dormant_units_are_known():
    assert dormant_units(torch.full((4, 7), math.nan)).isnan().all()


def test_the_active_fraction_counts_what_is_not_zero():
    assert active_fraction(torch.tensor([[0.0, 1.0, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]])).item() == 3 / 8
    assert active_fraction(torch.zeros(3, 3)).item() == 0
    assert active_fraction(torch.tensor([math.nan, 1.0])).isnan()


def test_singular_values_are_those_of_a_matrix_made_of_them():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(8, 3, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(5, 3, generator=generator))
    sigma = singular_values(left @ torch.diag(torch.tensor([7.0, 2.0, 0.5])) @ right.T)
    assert sigma.dtype == torch.float64 and sigma.shape == (5,)
    assert torch.allclose(sigma, torch.tensor([7.0, 2.0, 0.5, 0, 0], dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize(
    "features", [torch.zeros(4, 3), torch.full((4, 3), math.nan), torch.full((4, 3), math.inf)]
)
def test_ranks_of_nothing_are_not_numbers(features):
    sigma = singular_values(features)
    assert sigma.shape == (3,) and sigma.isnan().all()
    assert math.isnan(srank(sigma)) and math.isnan(effective_rank(sigma))


def test_ranks_are_not_numbers_where_singular_values_are_not_found(monkeypatch):
    def svdvals(_):
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svdvals", svdvals)
    sigma = singular_values(torch.ones(4, 3))
    assert sigma.shape == (3,) and sigma.isnan().all()


def test_srank_is_the_smallest_number_that_reaches_one_minus_delta_of_the_sum():
    ones = torch.ones(100, dtype=torch.float64)
    assert srank(ones) == 99, "99 of 100 are 1 - 0.01 already"
    assert srank(ones, delta=0.5) == 50
    assert srank(torch.tensor([90.0, 8.0, 1.5, 0.5], dtype=torch.float64)) == 3
    assert srank(torch.tensor([90.0, 8.0, 1.5, 0.5], dtype=torch.float64), delta=0.02) == 2
    assert srank(torch.tensor([1.0, 0, 0], dtype=torch.float64)) == 1
    assert math.isnan(srank(torch.zeros(3)))


def test_effective_rank_is_the_exponential_of_the_entropy():
    assert effective_rank(torch.ones(64, dtype=torch.float64)) == pytest.approx(64)
    assert effective_rank(torch.tensor([5.0, 0, 0], dtype=torch.float64)) == pytest.approx(1)
    assert effective_rank(torch.tensor([2.0, 1, 1], dtype=torch.float64)) == pytest.approx(2**1.5)
    assert math.isnan(effective_rank(torch.zeros(3)))


def test_share_of_q_is_the_part_of_the_sizes():
    old = torch.tensor([[3.0, -3.0]])
    new = torch.tensor([[-1.0, 1.0]])
    assert share_of_q(old, new).item() == 0.25 and share_of_q(old, torch.zeros(1, 2)).item() == 0
    assert share_of_q(torch.zeros(1, 2), torch.zeros(1, 2)).isnan()


def test_policy_churn_is_the_share_of_states_with_another_greedy_action():
    rng = np.random.default_rng(0)
    online = rng.normal(size=(300, 4)).astype(np.float32)
    target = online + rng.normal(size=(300, 4)).astype(np.float32)
    changed = 0
    for ours, theirs in zip(online.tolist(), target.tolist(), strict=True):
        changed += ours.index(max(ours)) != theirs.index(max(theirs))
    assert 0 < changed < 300
    churn = policy_churn(torch.from_numpy(online), torch.from_numpy(target))
    assert churn.item() == pytest.approx(changed / 300)
    assert policy_churn(torch.from_numpy(online), 2 * torch.from_numpy(online)) == 0


def test_joint_norm_is_that_of_all_numbers_together():
    assert joint_norm([torch.tensor([2.0, 4.0]), torch.tensor([[5.0], [6.0]])]).item() == 9


def test_the_norm_tracker_counts_from_when_a_module_was_drawn_and_growth_from_when_it_began_to_learn():
    body, old, new = (torch.nn.Linear(1, 1, bias=False) for _ in range(3))
    for module, weight in ((body, 3.0), (old, 4.0), (new, 12.0)):
        torch.nn.init.constant_(module.weight, weight)
    norms = NormTracker()
    norms.begin({"body": body, "head": old}, [body, old])
    torch.nn.init.constant_(body.weight, 5.0)
    assert norms.initial == {"body": 3, "head": 4}
    assert norms.norm([body, old]) == pytest.approx(41**0.5)
    assert norms.growth([body, old]) == pytest.approx(41**0.5 / 5)
    norms.begin({"body": body, "head": old, "new": new}, [body, new])
    assert norms.initial == {"body": 3, "head": 4, "new": 12} and norms.growth([body, new]) == 1
    norms.forget("head")
    norms.begin({"body": body, "head": body}, [body])
    assert norms.initial == {"body": 3, "head": 5, "new": 12}
    other = NormTracker()
    other.load_state_dict(norms.state_dict())
    assert other.initial == norms.initial and other.at_begin == norms.at_begin == 5


def test_the_loss_meter_gives_means_since_the_last_call_and_nothing_where_nothing_was():
    meter = LossMeter(torch.device("cpu"))
    assert meter.means(100, 4) == {}
    for loss, q_values in ((1.0, 5.0), (2.0, 7.0), (6.0, 9.0)):
        meter.add(torch.tensor(loss), torch.tensor(q_values))
    other = LossMeter(torch.device("cpu"))
    other.load_state_dict(meter.state_dict())
    assert meter.means(112, 4) == other.means(112, 4) == {"td_loss": 3, "q_values": 7}
    assert meter.means(112, 4) == {} == other.means(112, 4)
    meter.add(torch.tensor(4.0), torch.tensor(8.0))
    assert meter.means(116, 4) == {"td_loss": 4, "q_values": 8}


@pytest.mark.parametrize(("bad", "first"), [(0, 104), (1, 108), (3, 116)])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_loss_meter_names_the_step_from_which_no_loss_is_finite(bad, first, loss):
    meter = LossMeter(torch.device("cpu"))
    for update in range(4):  # at steps 104, 108, 112 and 116
        meter.add(torch.tensor(loss if update >= bad else 1.0), torch.tensor(0.0))
    message = f"^td_loss is not finite from step {first}: lower --learning-rate, in a new run$"
    for ask in (meter.check_finite, meter.means):
        with pytest.raises(FloatingPointError, match=message):
            ask(118, 4)


# of a network


def only_biases(layer, active):
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_((torch.arange(len(layer.bias)) < active).float())


@pytest.mark.parametrize("injections", [0, 1, 2])
def test_measures_of_a_network_made_to_have_them(injections):
    learner = make_learner(head_width=512)
    for _ in range(injections):
        learner.inject()
    network = learner.q_network
    newest = network.head.theta_prime_1[injections - 1] if injections else network.head.theta
    for layer, active in (
        (network.encoder[0], 24),
        (network.encoder[2], 64),
        (network.encoder[4], 32),
        (newest.hidden, 384),
    ):
        only_biases(layer, active)
    with torch.no_grad():
        newest.hidden.bias[0] = 0.05  # more than 0.025 of the mean
    measures = plasticity_measures(learner, random_batch())
    dormant = {name: measures[f"dormant_fraction/{name}"] for name in ("conv1", "conv2", "conv3", "head")}
    assert dormant == {"conv1": 8 / 32, "conv2": 0, "conv3": 32 / 64, "head": 128 / 512}
    assert measures["dormant_fraction"] == (8 + 32 + 128) / (32 + 64 + 64 + 512)
    active = {name: measures[f"active_fraction/{name}"] for name in ("conv1", "conv2", "conv3", "head")}
    assert active == {"conv1": 0.75, "conv2": 1, "conv3": 0.5, "head": 0.75}
    counts = np.array([32 * 400, 64 * 81, 64 * 49, 512])
    assert measures["active_fraction"] == pytest.approx(counts @ [0.75, 1, 0.5, 0.75] / counts.sum())
    for name in ("encoder", "head"):  # whose rows are all equal
        assert measures[f"srank/{name}"] == 1
        assert measures[f"effective_rank/{name}"] == pytest.approx(1)
    assert measures["weight_norm/encoder"] == pytest.approx((24 + 64 + 32) ** 0.5)


def test_logged_ranks_are_those_of_the_singular_values_of_features():
    """Not of their squares, and at δ = 0.01, of networks that have learned a little."""
    learner = make_learner(head_width=48)
    for k in range(5):
        learner.update(random_batch(k))
    batch = random_batch(size=64)
    measures = plasticity_measures(learner, batch)
    network = learner.q_network
    with torch.no_grad():
        features = network.encoder(batch.observations.float() / 255)
        hidden = network.head.theta.relu(network.head.theta.hidden(features))
    for name, matrix in (("encoder", features), ("head", hidden)):
        sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        shares = sigma / sigma.sum()
        assert measures[f"srank/{name}"] == 1 + np.flatnonzero(np.cumsum(shares) >= 0.99)[0] > 2
        present = shares[shares > 1e-12]
        entropy = -(present * np.log(present)).sum()
        assert measures[f"effective_rank/{name}"] == pytest.approx(np.exp(entropy), rel=1e-3)


def test_the_heads_ranks_are_those_of_the_head_that_learns():
    learner = make_learner(head_width=512)
    learner.inject()
    batch = random_batch(size=64)
    before = plasticity_measures(learner, batch)
    only_biases(learner.q_network.head.theta.hidden, 384)
    assert plasticity_measures(learner, batch)["srank/head"] == before["srank/head"] > 1
    only_biases(learner.q_network.head.theta_prime_1[0].hidden, 384)
    measures = plasticity_measures(learner, batch)
    assert measures["srank/head"] == 1 < measures["srank/encoder"]


def test_a_silent_layer_is_wholly_dormant_and_what_is_undefined_is_left_out():
    learner = make_learner(head_width=512)
    only_biases(learner.q_network.head.theta.hidden, 0)
    measures = plasticity_measures(learner, random_batch())
    assert measures["dormant_fraction/head"] == 1 and measures["active_fraction/head"] == 0
    layers = {"conv1": 32, "conv2": 64, "conv3": 64, "head": 512}
    dormant = sum(measures[f"dormant_fraction/{name}"] * units for name, units in layers.items())
    share = dormant / sum(layers.values())
    assert measures["dormant_fraction"] == pytest.approx(share) and 0.7 < share < 1
    assert not {"srank/head", "effective_rank/head"} & measures.keys() and "srank/encoder" in measures


def test_a_network_that_is_dead_is_wholly_dormant_and_not_active():
    learner = make_learner()
    for parameter in learner.q_network.parameters():
        parameter.data.zero_()
    measures = plasticity_measures(learner, random_batch())
    assert measures["dormant_fraction"] == 1 and measures["active_fraction"] == 0
    assert all(math.isfinite(value) for value in measures.values())


@pytest.mark.parametrize("freeze_heads", [True, False])
@pytest.mark.parametrize("injections", [0, 1, 2])
def test_norms_are_those_of_the_modules_and_their_gradients(injections, freeze_heads):
    learner = make_learner(freeze_heads=freeze_heads)
    batch = random_batch()
    network = learner.q_network
    initial = {"encoder": joint_norm(network.encoder.parameters()).item()}
    initial["head.theta"] = joint_norm(network.head.theta.parameters()).item()
    for k in range(injections):
        learner.update(random_batch(k))
        learner.inject()
        for path in (f"head.theta_prime_1.{k}", f"head.theta_prime_2.{k}"):
            initial[path] = joint_norm(network.get_submodule(path).parameters()).item()
    learner.update(random_batch(9))
    loss, _ = td_loss(network, learner.target_network, batch, learner.args.gamma)
    network.zero_grad()
    loss.backward()
    newest = f"head.theta_prime_1.{injections - 1}" if injections else "head.theta"
    measures = plasticity_measures(learner, batch)
    for path, start in initial.items():
        label = path.removeprefix("head.").replace(".", "_")
        if path == newest:
            label = "head"
        parameters = list(network.get_submodule(path).parameters())
        numbers = torch.cat([parameter.detach().double().flatten() for parameter in parameters])
        norm = numbers.norm().item()
        assert measures[f"weight_norm/{label}"] == pytest.approx(norm, rel=1e-5)
        assert measures[f"weight_norm_ratio/{label}"] == pytest.approx(norm / start, rel=1e-5)
        learns = path in ("encoder", newest) or not freeze_heads
        assert (f"gradient_norm/{label}" in measures) == learns
        if learns:
            gradient = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
            assert measures[f"gradient_norm/{label}"] == pytest.approx(gradient, rel=1e-4)
    assert sum(name.startswith("weight_norm/") for name in measures) == len(initial)


def test_gradient_norms_are_those_of_the_loss_with_the_runs_own_discount():
    batch = random_batch()
    found = []
    for gamma in (0.99, 0.5):
        learner = make_learner(gamma=gamma)
        found.append(plasticity_measures(learner, batch)["gradient_norm/encoder"])
        loss, _ = td_loss(learner.q_network, learner.target_network, batch, gamma)
        loss.backward()
        gradients = [parameter.grad for parameter in learner.q_network.encoder.parameters()]
        assert found[-1] == pytest.approx(joint_norm(gradients).item(), rel=1e-4)
    assert found[0] != found[1]


def test_the_new_heads_share_of_q_begins_at_zero_and_grows():
    learner = make_learner()
    batch = random_batch()
    assert "new_heads_share_of_q" not in plasticity_measures(learner, batch)
    learner.inject()
    assert plasticity_measures(learner, batch)["new_heads_share_of_q"] == 0
    learner.update(batch)
    head = learner.q_network.head
    features = learner.q_network.features(batch.observations)
    old = head.theta(features).abs().mean().item()
    new = (head.theta_prime_1[0](features) - head.theta_prime_2[0](features)).abs().mean().item()
    share = plasticity_measures(learner, batch)["new_heads_share_of_q"]
    assert 0 < share == pytest.approx(new / (old + new), rel=1e-3)


def test_the_new_heads_share_of_q_is_that_of_all_pairs():
    learner = make_learner(injection_step=(10, 20))
    batch = random_batch()
    for _ in range(2):
        learner.inject()
        learner.update(batch)
    head = learner.q_network.head
    features = learner.q_network.features(batch.observations)
    old = head.theta(features)
    new = sum(head.theta_prime_1[k](features) - head.theta_prime_2[k](features) for k in range(2))
    old, new = (part.abs().mean().item() for part in (old, new))
    assert plasticity_measures(learner, batch)["new_heads_share_of_q"] == pytest.approx(
        new / (old + new), rel=1e-3
    )


def test_the_ratio_to_initialisation_outlives_a_state_dict():
    learner = make_learner()
    other = make_learner(seed=8)
    learner.inject()
    learner.update(random_batch())
    other.load_state_dict(learner.state_dict())
    assert plasticity_measures(other, random_batch()) == plasticity_measures(learner, random_batch())
    other.inject()
    assert plasticity_measures(other, random_batch())["weight_norm_ratio/head"] == 1


@pytest.mark.parametrize("bf16", [False, True])
def test_measuring_changes_nothing_in_the_learner(bf16):
    learner = make_learner(bf16=bf16)
    learner.update(random_batch())
    learner.inject()
    learner.update(random_batch())
    before = flat(learner.state_dict())
    gradients = [copy.deepcopy(parameter.grad) for parameter in learner.q_network.parameters()]
    first = plasticity_measures(learner, random_batch())
    assert differences(before, flat(learner.state_dict())) == []
    for gradient, parameter in zip(gradients, learner.q_network.parameters(), strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            assert torch.equal(gradient, parameter.grad)
    assert not any(module._forward_hooks for module in learner.q_network.modules())
    assert plasticity_measures(learner, random_batch()) == first
    in_float32 = make_learner(bf16=False)
    in_float32.load_state_dict(learner.state_dict())
    assert plasticity_measures(in_float32, random_batch()) == first, "whatever the learner computes in"


# of a run


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a run that measures in every vector step that holds a multiple of 100."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("measured"))
        return train(replace(SMALL, checkpoint_frequency=240, plasticity_frequency=100)).absolute()


@pytest.mark.slow
def test_training_is_bitwise_the_same_with_measures_on_or_off(measured):
    """All that a run saves, and all its other curves."""
    unmeasured = train(replace(SMALL, checkpoint_frequency=240, plasticity_frequency=0))
    on = content(measured, "checkpoint-240")
    off = content(unmeasured, "checkpoint-240")
    curves = "curves in the run folder"
    assert [point for point in on.pop(curves) if not point[0].startswith("plasticity/")] == off.pop(curves)
    assert differences(on, off) == []


@pytest.mark.slow
def test_measures_are_logged_at_the_end_of_each_vector_step_with_a_multiple_of_their_frequency(measured):
    curves = scalars(measured)
    assert [step for step, _ in curves["plasticity/dormant_fraction"]] == [102, 201]
    assert [step for step, _ in curves["plasticity/new_heads_share_of_q"]] == [201]
    modules = {tag.split("/")[2] for tag in curves if tag.startswith("plasticity/weight_norm/")}
    assert modules == {"encoder", "head", "theta", "theta_prime_2_0"}
    second = {tag: dict(points).get(102) for tag, points in curves.items()}
    assert second["plasticity/weight_norm_ratio/head"] != 1, "learning has begun"
    assert 1 < second["plasticity/srank/encoder"] <= 48 and second["plasticity/gradient_norm/encoder"] > 0
    # θ was frozen at 150 and is named as itself from then on, θ′₂ is as it was drawn
    assert curves["plasticity/weight_norm/theta"][0][0] == 201
    assert curves["plasticity/weight_norm/theta"][0][1] > 0
    assert curves["plasticity/weight_norm/head"][0][1] > 0
    assert [value for _, value in curves["plasticity/weight_norm_ratio/theta_prime_2_0"]] == [1.0]


def test_without_a_frequency_nothing_is_measured():
    folder = train(
        replace(SMALL, total_timesteps=60, injection_step=(), checkpoint_frequency=0, plasticity_frequency=0)
    )
    assert not any(tag.startswith("plasticity/") for tag in scalars(folder))
