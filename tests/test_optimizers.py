"""The paper's optimizer against its formula, and moments that are known by their parameter's name."""

import copy

import numpy as np
import pytest
import torch

from support.optimizers import (
    CenteredRMSProp,
    copy_moments,
    empty_moments,
    load_moments,
    moments_by_name,
    num_trainable,
)


def test_centered_rmsprop_is_the_formula_written_out_in_numpy():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape) for shape in ((5, 3), (4,), (2, 2))]
    tensors = [torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in values]
    optimizer = CenteredRMSProp(tensors, lr=2.5e-4)
    means = [np.zeros_like(value) for value in values]
    squares = [np.zeros_like(value) for value in values]
    for step in range(200):
        for i, tensor in enumerate(tensors):
            tensor.grad = None
            if i == 2 and step < 50:
                continue  # a frozen head, later trained
            gradient = rng.normal(size=values[i].shape) * 10 ** rng.uniform(-4, 0)
            means[i] = 0.95 * means[i] + 0.05 * gradient
            squares[i] = 0.95 * squares[i] + 0.05 * gradient**2
            values[i] = values[i] - 2.5e-4 * gradient / np.sqrt(squares[i] - means[i] ** 2 + 0.01 / 32**2)
            tensor.grad = torch.tensor(gradient)
        optimizer.step()
        for tensor, value in zip(tensors, values, strict=True):
            np.testing.assert_allclose(tensor.detach().numpy(), value, rtol=1e-12, atol=1e-12)


def test_at_small_gradients_torchs_own_rmsprop_would_step_much_further():
    ours, torchs = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizers = (
        CenteredRMSProp([ours], lr=1.0),
        torch.optim.RMSprop([torchs], 1.0, 0.95, 0.01 / 32**2, centered=True),
    )
    for parameter, optimizer in zip((ours, torchs), optimizers, strict=True):
        parameter.grad = torch.full((1,), 1e-5)
        optimizer.step()
    assert torchs.item() / ours.item() > 100


def test_the_rmsprop_optimizer_has_the_papers_constants_and_leaves_gradients_alone():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = CenteredRMSProp([parameter], lr=0.5)
    assert optimizer.defaults == {"lr": 0.5, "decay": 0.95, "eps": 0.01 / 32**2, "weight_decay": 0}
    parameter.grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    assert parameter.grad.tolist() == [3, -4] and set(optimizer.state[parameter]) == {"mean", "square"}


def test_weight_decay_adds_its_share_of_the_weight_to_the_gradient_and_to_no_other_number():
    start = torch.tensor([3.0, -4.0, 0.0])
    gradient = torch.tensor([1e-3, 2e-3, -1e-3])
    decayed, by_hand, frozen = (torch.nn.Parameter(start.clone()) for _ in range(3))
    optimizers = (
        CenteredRMSProp([decayed, frozen], lr=0.1, weight_decay=0.01),
        CenteredRMSProp([by_hand], lr=0.1),
    )
    for _ in range(3):
        decayed.grad = gradient.clone()
        by_hand.grad = gradient + 0.01 * by_hand.detach()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(decayed, by_hand)
        assert torch.equal(decayed.grad, gradient), "gradients stay what they are"
    assert torch.equal(frozen, start), "what has no gradient is not trained, and does not decay"
    assert not torch.equal(decayed, start)


MAKERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "rmsprop": lambda p: CenteredRMSProp(p, lr=0.1),
}


class Parts(torch.nn.Module):
    """A network of several layers of one shape, by name."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, torch.nn.Linear(2, 2))


def trained(maker, names, learning, seed=0):
    """A network and its optimizer after three steps of some of its layers."""
    network = Parts(*names)
    generator = torch.Generator().manual_seed(seed)
    optimizer = MAKERS[maker](network.parameters())
    for _ in range(3):
        for name in learning:
            for parameter in network.get_submodule(name).parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return network, optimizer


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("maker", MAKERS)
def test_moments_are_known_by_the_names_of_the_parameters_that_have_any(maker):
    network, optimizer = trained(maker, ("a", "b", "c"), ("a", "c"))
    moments = moments_by_name(optimizer, network)
    assert set(moments) == {"a.weight", "a.bias", "c.weight", "c.bias"}
    for name, state in moments.items():
        assert same(state, optimizer.state[network.get_parameter(name)])


@pytest.mark.parametrize("maker", MAKERS)
def test_moments_find_their_parameters_in_a_network_with_other_layers_besides(maker):
    network, optimizer = trained(maker, ("a", "b", "c"), ("a", "c"))
    other, taker = trained(maker, ("c", "d", "a"), ("d",), seed=1)
    load_moments(taker, other, moments_by_name(optimizer, network))
    taken = moments_by_name(taker, other)
    assert set(taken) == {"a.weight", "a.bias", "c.weight", "c.bias"}, "those that it had are gone"
    for name, state in moments_by_name(optimizer, network).items():
        assert same(taken[name], state)
    assert taker.param_groups[0]["lr"] == 0.1
    before = copy.deepcopy(taken["a.weight"])
    network.a.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert same(moments_by_name(taker, other)["a.weight"], before), "copies of their own"


@pytest.mark.parametrize("maker", MAKERS)
def test_moments_come_back_and_go_on_the_same(maker):
    network, optimizer = trained(maker, ("a",), ("a",))
    other = copy.deepcopy(network)
    taker = MAKERS[maker](other.parameters())
    load_moments(taker, other, moments_by_name(optimizer, network))
    for trained_network, its_optimizer in ((network, optimizer), (other, taker)):
        trained_network.a.weight.grad = torch.full((2, 2), 0.3)
        trained_network.a.bias.grad = torch.full((2,), -0.2)
        its_optimizer.step()
    assert torch.equal(network.a.weight, other.a.weight) and torch.equal(network.a.bias, other.a.bias)


@pytest.mark.parametrize("maker", MAKERS)
def test_copied_moments_are_the_old_ones_and_independent_of_them(maker):
    network, optimizer = trained(maker, ("a", "b"), ("a",))
    before = copy.deepcopy(moments_by_name(optimizer, network))
    copy_moments(optimizer, network.a, network.b)
    after = moments_by_name(optimizer, network)
    for kind in ("weight", "bias"):
        assert same(after[f"b.{kind}"], before[f"a.{kind}"]) and same(after[f"a.{kind}"], before[f"a.{kind}"])
    network.a.zero_grad()
    network.b.weight.grad = torch.ones(2, 2)
    optimizer.step()
    after = moments_by_name(optimizer, network)
    assert same(after["a.weight"], before["a.weight"]) and not same(after["b.weight"], before["a.weight"])


def test_where_nothing_has_moments_none_are_copied():
    network, optimizer = trained("adam", ("a", "b"), ())
    copy_moments(optimizer, network.a, network.b)
    assert moments_by_name(optimizer, network) == {}


@pytest.mark.parametrize("maker", MAKERS)
def test_emptied_moments_begin_anew_with_the_count_of_steps_and_others_stay(maker):
    network, optimizer = trained(maker, ("a", "b"), ("a", "b"))
    before = copy.deepcopy(moments_by_name(optimizer, network))
    empty_moments(optimizer, network.a)
    empty_moments(optimizer, network.a)  # which has none any more
    after = moments_by_name(optimizer, network)
    assert set(after) == {"b.weight", "b.bias"} and all(same(after[name], before[name]) for name in after)
    fresh = Parts("a")
    fresh.load_state_dict({"a.weight": network.a.weight, "a.bias": network.a.bias})
    fresh_optimizer = MAKERS[maker](fresh.parameters())
    for layer, its_optimizer in ((network.a, optimizer), (fresh.a, fresh_optimizer)):
        layer.weight.grad = torch.full((2, 2), 0.3)
        layer.bias.grad = torch.full((2,), -0.2)
        its_optimizer.step()
    assert torch.equal(network.a.weight, fresh.a.weight) and torch.equal(network.a.bias, fresh.a.bias)
    assert same(optimizer.state[network.a.weight], fresh_optimizer.state[fresh.a.weight])


def test_trainable_parameters_are_counted_in_numbers():
    network = Parts("a", "b")
    assert num_trainable(network) == 2 * (4 + 2)
    network.b.weight.requires_grad_(False)
    assert num_trainable(network) == 4 + 2 + 2
