"""Head reset: a new head in the place of the one that learns, and nothing else."""

import pytest
import torch
import torch.nn as nn
from conftest import all_same, moments_of, random_batch, same, trained, weights

from alternatives.alternative import AgentParts, NoSettings
from alternatives.reset_head import ALTERNATIVE, reset_head
from dqn_injection_atari import Head, Stream
from support.randomness import stream_seed


def test_the_head_gets_the_weights_of_a_new_one_in_place_and_the_encoder_is_left_alone():
    encoder = nn.Linear(3, 4)
    head = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    new_head = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()])
    parts = AgentParts(
        encoder=encoder,
        head=head,
        optimizer=optimizer,
        draw_encoder=lambda: pytest.fail("no new encoder is needed"),
        draw_head=lambda: new_head,
        generator=torch.Generator(),
    )
    tensors = list(head.parameters())
    before = weights(encoder)
    with torch.no_grad():
        reset_head(parts, NoSettings())
    assert same(weights(head), weights(new_head)) and same(weights(encoder), before)
    for tensor, parameter in zip(tensors, head.parameters(), strict=True):
        assert tensor is parameter, "the optimizer's own"


def test_it_draws_the_head_and_has_no_settings():
    assert ALTERNATIVE.draws_head and ALTERNATIVE.settings is NoSettings


def test_a_learners_head_is_drawn_anew_with_the_bits_of_its_seed_and_number_and_nothing_else_changes():
    learner = trained(intervention="reset-head", seed=3)
    for count in range(2):
        before = weights(learner.q_network.encoder)
        learner.intervene(step=10)
        torch.manual_seed(stream_seed(3, Stream.INJECTION, count))
        assert same(weights(learner.q_network.head.theta), weights(Head(64, 6)))
        assert same(weights(learner.q_network.encoder), before)
        assert learner.q_network.num_injections == 0
        assert all(parameter.requires_grad for parameter in learner.q_network.parameters())
        learner.update(random_batch(9))


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("choice", ["fresh", "keep"])
def test_moments_of_the_head_are_emptied_or_kept_and_those_of_the_encoder_stay(optimizer, choice):
    learner = trained(intervention="reset-head", optimizer=optimizer, moments=choice)
    encoder = moments_of(learner, "encoder")
    head = moments_of(learner, "head.theta")
    assert len(head) == 4
    learner.intervene(step=10)
    assert all_same(moments_of(learner, "encoder"), encoder)
    assert all_same(moments_of(learner, "head.theta"), {} if choice == "fresh" else head)
    learner.update(random_batch(9))
    if optimizer == "adam":
        steps = {state["step"].item() for state in moments_of(learner, "head.theta").values()}
        assert steps == {1 if choice == "fresh" else 4}, "the count of steps begins anew, too, or goes on"
