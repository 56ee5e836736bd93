"""Shrink and perturb: the encoder mixed with a new one, and a new head."""

import pytest
import torch
import torch.nn as nn
from conftest import all_same, moments_of, random_batch, same, trained, weights

from alternatives.alternative import AgentParts
from alternatives.shrink_perturb import ALTERNATIVE, ShrinkPerturbSettings, shrink_perturb
from dqn_injection_atari import Args, Head, QNetwork, Stream
from support.randomness import stream_seed
from support.usage import UsageError


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_the_encoder_is_mixed_with_a_new_one_in_place_and_the_head_is_a_new_one(factor):
    encoder = nn.Linear(3, 4)
    head = nn.Linear(4, 5)
    new_encoder = nn.Linear(3, 4)
    new_head = nn.Linear(4, 5)
    parts = AgentParts(
        encoder=encoder,
        head=head,
        optimizer=torch.optim.Adam([*encoder.parameters(), *head.parameters()]),
        draw_encoder=lambda: new_encoder,
        draw_head=lambda: new_head,
        generator=torch.Generator(),
    )
    tensors = [*encoder.parameters(), *head.parameters()]
    before = weights(encoder)
    with torch.no_grad():
        shrink_perturb(parts, ShrinkPerturbSettings(shrink_factor=factor))
    for name, parameter in encoder.named_parameters():
        expected = factor * before[name] + (1 - factor) * new_encoder.get_parameter(name)
        assert torch.equal(parameter, expected)
    assert same(weights(head), weights(new_head))
    for tensor, parameter in zip(tensors, [*encoder.parameters(), *head.parameters()], strict=True):
        assert tensor is parameter, "the optimizer's own"


def test_its_factor_is_a_share_that_only_it_and_a_baseline_take():
    assert ALTERNATIVE.draws_head and ALTERNATIVE.settings is ShrinkPerturbSettings
    assert Args(intervention="shrink-perturb", injection_step=(5,)).shrink_factor == 0.8
    for intervention in ("shrink-perturb", "none"):
        Args(intervention=intervention, injection_step=(5,), shrink_factor=0.5)
    for intervention in ("injection", "reset-head"):
        with pytest.raises(UsageError, match="which only --intervention shrink-perturb looks at"):
            Args(intervention=intervention, injection_step=(5,), shrink_factor=0.5)
    with pytest.raises(UsageError, match="must be 0 or more and at most 1: change --shrink-factor"):
        Args(intervention="shrink-perturb", injection_step=(5,), shrink_factor=1.5)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_learners_new_parts_have_the_bits_of_their_seed_and_number(layer_norm):
    learner = trained(intervention="shrink-perturb", seed=3, shrink_factor=0.7, layer_norm=layer_norm)
    for count in range(2):
        before = weights(learner.q_network.encoder)
        learner.intervene(step=10)
        torch.manual_seed(stream_seed(3, Stream.PERTURBATION, count))
        new_encoder = weights(QNetwork.make_encoder(layer_norm))
        torch.manual_seed(stream_seed(3, Stream.INJECTION, count))
        assert same(weights(learner.q_network.head.theta), weights(Head(64, 6, layer_norm=layer_norm)))
        for name, value in weights(learner.q_network.encoder).items():
            assert torch.equal(value, 0.7 * before[name] + (1 - 0.7) * new_encoder[name])
        assert learner.q_network.num_injections == 0
        learner.update(random_batch(9))


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("choice", ["fresh", "keep"])
def test_moments_of_the_head_are_emptied_or_kept_and_those_of_the_encoder_stay_in_both(optimizer, choice):
    learner = trained(intervention="shrink-perturb", optimizer=optimizer, moments=choice)
    encoder = moments_of(learner, "encoder")
    head = moments_of(learner, "head.theta")
    assert len(encoder) == 6 and len(head) == 4
    learner.intervene(step=10)
    assert all_same(moments_of(learner, "encoder"), encoder)
    assert all_same(moments_of(learner, "head.theta"), {} if choice == "fresh" else head)
    learner.update(random_batch(9))
    if optimizer == "adam":
        steps = {state["step"].item() for state in moments_of(learner, "head.theta").values()}
        assert steps == {1 if choice == "fresh" else 4}, "the count of steps begins anew, too, or goes on"
