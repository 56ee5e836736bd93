"""Full reset: encoder and head are new ones, the moments of both are emptied or kept."""

import pytest
import torch
from conftest import all_same, moments_of, random_batch, same, trained, weights

from alternatives.reset_all import ALTERNATIVE
from dqn_injection_atari import Head, QNetwork, Stream, plasticity_measures
from support.randomness import stream_seed


@pytest.mark.parametrize("layer_norm", [False, True])
def test_both_parts_get_the_bits_of_their_seed_and_number_in_place(layer_norm):
    learner = trained(intervention="reset-all", seed=3, layer_norm=layer_norm)
    tensors = list(learner.q_network.parameters())
    for count in range(2):
        learner.intervene(step=10)
        torch.manual_seed(stream_seed(3, Stream.PERTURBATION, count))
        assert same(weights(learner.q_network.encoder), weights(QNetwork.make_encoder(layer_norm)))
        torch.manual_seed(stream_seed(3, Stream.INJECTION, count))
        assert same(weights(learner.q_network.head.theta), weights(Head(64, 6, layer_norm=layer_norm)))
        assert same(weights(learner.target_network), weights(learner.q_network))
        learner.update(random_batch(9))
    for tensor, parameter in zip(tensors, learner.q_network.parameters(), strict=True):
        assert tensor is parameter, "the optimizer's own"


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("choice", ["fresh", "keep"])
def test_moments_of_both_parts_are_emptied_or_kept(optimizer, choice):
    learner = trained(intervention="reset-all", optimizer=optimizer, moments=choice)
    before = {path: moments_of(learner, path) for path in ("encoder", "head.theta")}
    assert len(before["encoder"]) == 6 and len(before["head.theta"]) == 4
    learner.intervene(step=10)
    for path, moments in before.items():
        assert all_same(moments_of(learner, path), {} if choice == "fresh" else moments)


def test_norms_of_both_parts_count_from_then_on():
    assert ALTERNATIVE.draws_head and ALTERNATIVE.draws_encoder
    learner = trained(intervention="reset-all")
    learner.intervene(step=10)
    measures = plasticity_measures(learner, random_batch())
    assert measures["weight_norm_ratio/encoder"] == measures["weight_norm_ratio/head"] == 1
