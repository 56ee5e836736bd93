"""FIRE: each position of a kernel becomes near orthogonal, the head is drawn anew."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import all_same, moments_of, same, trained, weights

from alternatives.fire import ALTERNATIVE, near_isometry, orthogonalise
from dqn_injection_atari import Head, Stream
from support.randomness import stream_seed


def naive(weight):
    """The same in NumPy, one position after the other, from singular values."""
    weight = weight.double().numpy()
    result = np.empty_like(weight)
    num_out, num_in, height, width = weight.shape
    for row in range(height):
        for column in range(width):
            u, sigma, v = np.linalg.svd(weight[:, :, row, column], full_matrices=False)
            sigma = sigma / np.sqrt((sigma**2).sum())
            for _ in range(10):
                sigma = 1.5 * sigma - 0.5 * sigma**3
            result[:, :, row, column] = u @ np.diag(sigma) @ v
    return result * math.sqrt(num_out / num_in) / (height * width)


@pytest.mark.parametrize(
    ("num_in", "num_out", "size"), [(4, 32, 8), (32, 64, 4), (64, 64, 3), (8, 3, 2)], ids=str
)
def test_a_convolution_gets_what_a_naive_reference_gives_and_keeps_its_bias(num_in, num_out, size):
    convolution = nn.Conv2d(num_in, num_out, size).to(memory_format=torch.channels_last)
    weight, bias = (parameter.detach().clone() for parameter in convolution.parameters())
    tensor = convolution.weight
    with torch.no_grad():
        orthogonalise(convolution)
    # so near in float64 alone, which no setting for GPUs rounds
    np.testing.assert_allclose(convolution.weight.detach().numpy(), naive(weight), rtol=1e-6, atol=1e-10)
    assert torch.equal(convolution.bias, bias)
    assert convolution.weight is tensor and tensor.is_contiguous(memory_format=torch.channels_last)


def test_singular_values_come_near_one_and_zeros_stay_zeros():
    matrices = torch.stack([torch.eye(3, 5), torch.zeros(3, 5), 100 * torch.eye(3, 5)])
    near = near_isometry(matrices)
    sigma = torch.linalg.svdvals(near)
    torch.testing.assert_close(sigma[0], torch.ones(3), rtol=0, atol=1e-4)
    assert not near[1].any() and torch.isfinite(near).all()
    torch.testing.assert_close(near[2], near[0])


def test_small_singular_values_of_a_fresh_layer_do_not_get_to_one_in_ten_iterations():
    torch.manual_seed(0)
    sigma = torch.linalg.svdvals(near_isometry(nn.Conv2d(64, 64, 3).weight.detach()[:, :, 0, 0]))
    assert sigma[0] == pytest.approx(1, abs=1e-3) and 0 < sigma[-1] < 0.9


@pytest.mark.parametrize("choice", ["fresh", "keep"])
def test_a_learner_has_its_convolutions_changed_and_its_head_drawn_anew(choice):
    learner = trained(intervention="fire", moments=choice, seed=3, layer_norm=True)
    before = weights(learner.q_network.encoder)
    of_encoder = moments_of(learner, "encoder")
    of_head = moments_of(learner, "head.theta")
    learner.intervene(step=10)
    for name, value in weights(learner.q_network.encoder).items():
        if value.dim() == 4:
            np.testing.assert_allclose(value.numpy(), naive(before[name]), rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(value, before[name]), name
    torch.manual_seed(stream_seed(3, Stream.INJECTION, 0))
    assert same(weights(learner.q_network.head.theta), weights(Head(64, 6, layer_norm=True)))
    assert all_same(moments_of(learner, "encoder"), of_encoder)
    assert all_same(moments_of(learner, "head.theta"), {} if choice == "fresh" else of_head)
    assert same(weights(learner.target_network), weights(learner.q_network))
    assert ALTERNATIVE.draws_head and not ALTERNATIVE.draws_encoder


def test_an_encoder_without_a_convolution_is_refused():
    parts = SimpleNamespace(encoder=nn.Sequential(nn.Linear(4, 4)), head=None)
    with pytest.raises(ValueError, match="this encoder has none"):
        ALTERNATIVE.apply(parts, None)
