"""Plasticity measures: each against an answer known in closed form, and what measuring leaves alone."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BRIEF, make_learner, random_batch, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from benchmarks.kill_test import differences, flat
from dqn_injection_atari import (
    Args,
    active_fraction,
    dormant_units,
    effective_rank,
    joint_norm,
    plasticity_measures,
    share_of_q,
    singular_values,
    srank,
    td_loss,
    train,
)

SMALL = replace(
    BRIEF,
    num_envs=3,
    buffer_size=300,
    learning_starts=60,
    checkpoint_frequency=360,
    plasticity_frequency=80,
    injection_step=(200,),
)


# the measures


def test_a_unit_is_dormant_when_its_mean_activation_is_at_most_tau_of_the_layers():
    layer = torch.tensor([[2.0, 0.5, 0.0, 0.0], [2.0, 0.0, 4.0, 0.0]])  # means 2, 0.25, 2, 0 and 1.0625 over all
    assert dormant_units(layer).tolist() == [0, 0, 0, 1]
    assert dormant_units(layer, tau=0.25).tolist() == [0, 1, 0, 1], "0.25 / 1.0625 is 0.235"
    assert dormant_units(torch.tensor([[0.25, 1.75]]), tau=0.25).tolist() == [1, 0], "at most: the bound belongs to it"
    assert dormant_units(torch.tensor([[0.25, 1.75]]), tau=0.24).tolist() == [0, 0]
    assert dormant_units(torch.tensor([[3.0, 1.0], [-3.0, 1.0]])).tolist() == [0, 0], "sizes count, not signs"


def test_a_channel_is_one_unit_averaged_over_batch_and_space():
    layer = torch.zeros(2, 3, 5, 5)
    layer[1, 0, 4, 4] = 50.0  # mean 1
    layer[:, 1] = 1.0
    layer[0, 2, 0, 0] = 0.5  # mean 0.01
    assert dormant_units(layer).tolist() == [0, 0, 1]
    assert dormant_units(layer).shape == (3,)


def test_a_layer_that_is_never_active_has_no_dormant_fraction():
    assert dormant_units(torch.zeros(4, 7)).isnan().all() and dormant_units(torch.zeros(4, 7)).shape == (7,)
    assert dormant_units(torch.full((4, 7), math.nan)).isnan().all()


def test_the_active_fraction_counts_what_is_not_zero():
    assert active_fraction(torch.tensor([[0.0, 1.0, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]])).item() == 3 / 8
    assert active_fraction(torch.zeros(3, 3)).item() == 0
    assert active_fraction(torch.tensor([math.nan, 1.0])).isnan()


def test_singular_values_are_those_of_a_matrix_made_of_them():
    left, right = (torch.linalg.qr(torch.randn(n, 3, generator=torch.Generator().manual_seed(n)))[0] for n in (8, 5))
    sigma = singular_values(left @ torch.diag(torch.tensor([7.0, 2.0, 0.5])) @ right.T)
    assert sigma.dtype == torch.float64 and sigma.shape == (5,)
    assert torch.allclose(sigma, torch.tensor([7.0, 2.0, 0.5, 0, 0], dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("features", [torch.zeros(4, 3), torch.full((4, 3), math.nan), torch.full((4, 3), math.inf)])
def test_ranks_of_nothing_are_not_numbers(features):
    sigma = singular_values(features)
    assert sigma.shape == (3,) and sigma.isnan().all()
    assert math.isnan(srank(sigma)) and math.isnan(effective_rank(sigma))


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
    old, new = torch.tensor([[3.0, -3.0]]), torch.tensor([[-1.0, 1.0]])
    assert share_of_q(old, new).item() == 0.25 and share_of_q(old, torch.zeros(1, 2)).item() == 0
    assert share_of_q(torch.zeros(1, 2), torch.zeros(1, 2)).isnan()


def test_joint_norm_is_that_of_all_numbers_together():
    assert joint_norm([torch.tensor([2.0, 4.0]), torch.tensor([[5.0], [6.0]])]).item() == 9


# of a network


def only_biases(layer, active):
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_((torch.arange(len(layer.bias)) < active).float())


@pytest.mark.parametrize("injections", [0, 1, 2])
def test_measures_of_a_network_made_to_have_them(injections):
    learner = make_learner()
    for _ in range(injections):
        learner.inject()
    network = learner.q_network
    newest = network.theta_prime_1[injections - 1] if injections else network.theta
    for layer, active in ((network.encoder[0], 24), (network.encoder[2], 64), (network.encoder[4], 32), (newest[0], 384)):
        only_biases(layer, active)
    measures = plasticity_measures(learner, random_batch())
    dormant = {name: measures[f"dormant_fraction/{name}"] for name in ("conv1", "conv2", "conv3", "head")}
    assert dormant == {"conv1": 8 / 32, "conv2": 0, "conv3": 32 / 64, "head": 128 / 512}
    assert measures["dormant_fraction"] == (8 + 32 + 128) / (32 + 64 + 64 + 512)
    active = {name: measures[f"active_fraction/{name}"] for name in ("conv1", "conv2", "conv3", "head")}
    assert active == {"conv1": 0.75, "conv2": 1, "conv3": 0.5, "head": 0.75}
    counts = np.array([32 * 400, 64 * 81, 64 * 49, 512])
    assert measures["active_fraction"] == pytest.approx(counts @ [0.75, 1, 0.5, 0.75] / counts.sum())
    for name in ("encoder", "head"):
        assert measures[f"srank/{name}"] == 1 and measures[f"effective_rank/{name}"] == pytest.approx(1), "all rows equal"
    assert measures["weight_norm/encoder"] == pytest.approx((24 + 64 + 32) ** 0.5)


def test_a_silent_layer_is_no_layer_without_dormant_units():
    learner = make_learner()
    only_biases(learner.q_network.theta[0], 0)
    measures = plasticity_measures(learner, random_batch())
    for name in ("dormant_fraction/head", "dormant_fraction", "srank/head", "effective_rank/head"):
        assert math.isnan(measures[name]), name
    assert measures["active_fraction/head"] == 0 and measures["dormant_fraction/conv1"] < 1


@pytest.mark.parametrize("freeze_heads", [True, False])
@pytest.mark.parametrize("injections", [0, 1, 2])
def test_norms_are_those_of_the_modules_and_their_gradients(injections, freeze_heads):
    learner, batch = make_learner(freeze_heads=freeze_heads), random_batch()
    initial = {"theta": joint_norm(learner.q_network.theta.parameters()).item()}
    initial["encoder"] = joint_norm(learner.q_network.encoder.parameters()).item()
    for k in range(injections):
        learner.update(random_batch(k))
        learner.inject()
        for pair in ("theta_prime_1", "theta_prime_2"):
            initial[f"{pair}.{k}"] = joint_norm(getattr(learner.q_network, pair)[k].parameters()).item()
    learner.update(random_batch(9))
    loss, _ = td_loss(learner.q_network, learner.target_network, batch, learner.args.gamma)
    learner.q_network.zero_grad()
    loss.backward()
    newest = f"theta_prime_1.{injections - 1}" if injections else "theta"
    measures = plasticity_measures(learner, batch)
    for module, start in initial.items():
        label = "head" if module == newest else module.replace(".", "_")
        parameters = list(learner.q_network.get_submodule(module).parameters())
        norm = torch.cat([p.detach().double().flatten() for p in parameters]).norm().item()
        assert measures[f"weight_norm/{label}"] == pytest.approx(norm, rel=1e-5)
        assert measures[f"weight_norm_ratio/{label}"] == pytest.approx(norm / start, rel=1e-5)
        learns = module in ("encoder", newest) or not freeze_heads
        assert (f"gradient_norm/{label}" in measures) == learns
        if learns:
            gradient = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
            assert measures[f"gradient_norm/{label}"] == pytest.approx(gradient, rel=1e-4)
    assert sum(name.startswith("weight_norm/") for name in measures) == len(initial)


def test_the_new_heads_share_of_q_begins_at_zero_and_grows():
    learner, batch = make_learner(), random_batch()
    assert "new_heads_share_of_q" not in plasticity_measures(learner, batch)
    learner.inject()
    assert plasticity_measures(learner, batch)["new_heads_share_of_q"] == 0
    learner.update(batch)
    network, features = learner.q_network, learner.q_network.features(batch.observations)
    old = network.theta(features)
    new = network.theta_prime_1[0](features) - network.theta_prime_2[0](features)
    expected = (new.abs().mean() / (old.abs().mean() + new.abs().mean())).item()
    assert 0 < plasticity_measures(learner, batch)["new_heads_share_of_q"] == pytest.approx(expected, rel=1e-3)


def test_the_ratio_to_initialisation_outlives_a_state_dict():
    learner, other = make_learner(), make_learner(seed=8)
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
    gradients = [None if p.grad is None else p.grad.clone() for p in learner.q_network.parameters()]
    first = plasticity_measures(learner, random_batch())
    assert differences(before, flat(learner.state_dict())) == []
    for gradient, parameter in zip(gradients, learner.q_network.parameters(), strict=True):
        assert (gradient is None) == (parameter.grad is None) and (gradient is None or torch.equal(gradient, parameter.grad))
    assert not any(module._forward_hooks for module in learner.q_network.modules())
    assert plasticity_measures(learner, random_batch()) == first


# of a run


def end_of(folder):
    state = torch.load(folder / "checkpoint-360" / "state.pt", weights_only=True)
    state["log"] = {name: value for name, value in state["log"].items() if "seconds" not in name}
    return flat(state), (folder / "checkpoint-360" / "replay.zst").read_bytes()


def without_speed(curves):
    return {tag: points for tag, points in curves.items() if "SPS" not in tag and not tag.startswith("plasticity/")}


@pytest.mark.parametrize("overlap", [False, True])
def test_training_is_bitwise_the_same_with_measures_on_or_off(overlap):
    off, on = (train(replace(SMALL, overlap=overlap, plasticity_frequency=frequency)) for frequency in (0, 37))
    (state, replay), (expected_state, expected_replay) = end_of(on), end_of(off)
    for got, expected in zip(state.items(), expected_state.items(), strict=True):
        assert differences(dict([got]), dict([expected])) == []
    assert replay == expected_replay
    assert without_speed(scalars(on)) == without_speed(scalars(off))


def test_measures_are_logged_at_every_multiple_of_their_frequency():
    curves = scalars(train(SMALL))
    assert [step for step, _ in curves["plasticity/dormant_fraction"]] == [80, 160, 240, 320]
    assert [step for step, _ in curves["plasticity/new_heads_share_of_q"]] == [240, 320]
    modules = {tag.split("/")[2] for tag in curves if tag.startswith("plasticity/weight_norm/")}
    assert modules == {"encoder", "head", "theta", "theta_prime_2_0"}
    first = {tag: points[0][1] for tag, points in curves.items()}
    assert first["plasticity/weight_norm_ratio/head"] != 1, "learning has begun"
    assert 1 < first["plasticity/srank/encoder"] <= 512 and first["plasticity/gradient_norm/encoder"] > 0
    # θ is frozen, θ′₂ as it was drawn
    assert len({value for step, value in curves["plasticity/weight_norm/theta"]}) == 1
    assert {value for _, value in curves["plasticity/weight_norm_ratio/theta_prime_2_0"]} == {1.0}


def test_without_a_frequency_nothing_is_measured():
    assert not any(tag.startswith("plasticity/") for tag in scalars(train(replace(SMALL, plasticity_frequency=0))))


# in TensorBoard


def hparams(folder):
    metadata = EventAccumulator(str(folder)).Reload().summary_metadata["_hparams_/session_start_info"]
    content = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in content.session_start_info.hparams.items()}


def test_tensorboard_compares_hyperparameters_also_those_of_a_fork():
    baseline = train(replace(SMALL, apply_injection=False, total_timesteps=240, checkpoint_frequency=0))
    assert hparams(baseline)["apply_injection"] == "False" and hparams(baseline)["injection_step"] == "(200,)"
    assert hparams(baseline)["learning_rate"] == 1e-4 and set(hparams(baseline)) == set(Args.__dataclass_fields__)
    origin = train(replace(SMALL, apply_injection=False))
    checkpoint = origin / "checkpoint-200"
    saved = Args(**json.loads((checkpoint / "manifest.json").read_text())["args"])
    injected = train(replace(saved, fork=str(checkpoint), apply_injection=True))
    assert hparams(injected)["apply_injection"] == "True" and hparams(injected)["fork"] == str(checkpoint)
    assert scalars(injected)["plasticity/dormant_fraction"][:2] == scalars(origin)["plasticity/dormant_fraction"][:2]


@pytest.mark.parametrize("eval_frequency", [0, 360])
def test_tensorboard_shows_returns_and_plasticity_side_by_side(eval_frequency):
    folder = Path(train(replace(SMALL, eval_frequency=eval_frequency, eval_episodes=1)))
    tensor = EventAccumulator(str(folder)).Reload().Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    category, *others = layout_pb2.Layout.FromString(tensor).category
    shown = {chart.multiline.tag[0].strip("^$") for chart in category.chart}
    assert not others and {"charts/episodic_return", "plasticity/dormant_fraction"} < shown
    assert ("eval/episodic_return" in shown) == (eval_frequency > 0) and shown <= set(scalars(folder)), "all of it logged"
