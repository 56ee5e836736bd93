"""Random numbers: streams that are unrelated, and layers drawn anew."""

import math

import pytest
import torch
import torch.nn as nn

from dqn_injection_atari import QNetwork, Stream
from support.randomness import redraw, stream_seed


def test_random_streams_of_a_run_and_of_neighbouring_seeds_are_unrelated():
    used = [stream_seed(seed, Stream.ENVIRONMENTS) + i for seed in range(200) for i in range(16)]
    assert len(set(used)) == len(used), "no environment seed is shared"
    seeds = {stream_seed(seed, stream, key) for seed in range(20) for stream in Stream for key in range(20)}
    assert len(seeds) == 20 * len(Stream) * 20 and all(0 <= seed < 2**30 for seed in seeds)
    assert (
        list(Stream)[:4]
        == [Stream.NETWORK, Stream.EXPLORATION, Stream.REPLAY, Stream.ENVIRONMENTS]
        == [0, 1, 2, 3]
    )


def drawn(seed, module, keep=0.0):
    redraw(module, torch.Generator().manual_seed(seed), keep)
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("layer", [nn.Linear(300, 400), nn.Conv2d(4, 32, 8)])
def test_a_layer_is_drawn_anew_from_the_distribution_that_pytorch_draws_it_from(layer):
    bound = layer.weight[0].numel() ** -0.5
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    drawn(0, layer)
    for name, parameter in layer.named_parameters():
        assert not torch.equal(parameter, before[name]) and parameter.abs().max() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert layer.weight.std().item() == pytest.approx(before["weight"].std().item(), rel=0.03)
    assert abs(layer.weight.mean().item()) < 0.02 * bound


def test_what_is_drawn_depends_on_the_generator_alone():
    module = QNetwork(6).theta
    torch.manual_seed(1)
    first, state = drawn(5, module), torch.get_rng_state()
    assert torch.equal(first, drawn(5, module)) and not torch.equal(first, drawn(6, module))
    assert torch.equal(state, torch.get_rng_state()), "the global one does not move"


def test_a_share_of_the_old_weights_is_kept():
    module = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    old = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    mixed = drawn(3, module, keep=0.8)
    new = drawn(3, module)
    torch.testing.assert_close(mixed, 0.8 * old + 0.2 * new)
