"""Plasticity injection at the level of the Q-network."""

import pytest
import torch

from dqn_injection_atari import Args, QNetwork, make_optimizer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def observations(batch=16, seed=0):
    return torch.randint(0, 256, (batch, 4, 84, 84), dtype=torch.uint8, generator=seeded(seed))


def heads(q_network):
    return [q_network.head.theta, *q_network.head.theta_prime_1, *q_network.head.theta_prime_2]


def trained(q_network, steps=2):
    """A few steps of plain SGD on everything trainable, so that no head is at its initial value."""
    # at 0.1, seven trainable heads diverge now and then
    optimizer = torch.optim.SGD(q_network.parameters(), lr=0.01)
    device = next(q_network.parameters()).device
    for step in range(steps):
        optimizer.zero_grad()
        q_values = q_network(observations(seed=step).to(device))
        (q_values - 1).square().mean().backward()
        optimizer.step()
    return q_network


def snapshot(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(before, module):
    return all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def num_trainable(q_network):
    return sum(parameter.numel() for parameter in q_network.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("freeze_heads", [True, False])
def test_q_is_bitwise_equal_across_every_injection(device, freeze_heads):
    q_network = trained(QNetwork(6, max_injections=3, freeze_heads=freeze_heads).to(device))
    for k in range(3):
        batches = [observations(size, seed=k).to(device) for size in (1, 7, 33)]
        before = [q_network(obs) for obs in batches]
        q_network.inject(seeded(k))
        for obs, q_values in zip(batches, before, strict=True):
            assert torch.equal(q_network(obs), q_values)
        trained(q_network)
        assert not torch.equal(q_network(batches[1]), before[1])


def test_forward_maps_uint8_stacks_to_float32_q_values_and_leaves_them_alone():
    obs = observations(5)
    kept = obs.clone()
    q_values = QNetwork(9)(obs)
    assert q_values.shape == (5, 9) and q_values.dtype == torch.float32
    assert torch.equal(obs, kept)


def test_the_network_is_the_nature_cnn():
    q_network = QNetwork(6)
    parameters = [*q_network.encoder.parameters(), *q_network.head.theta.parameters()]
    assert [tuple(parameter.shape) for parameter in parameters] == [
        (32, 4, 8, 8),
        (32,),
        (64, 32, 4, 4),
        (64,),
        (64, 64, 3, 3),
        (64,),
        (512, 3136),
        (512,),
        (6, 512),
        (6,),
    ]
    features = q_network.features(observations(2))
    assert features.shape == (2, 3136)
    assert torch.allclose(features, q_network.encoder(observations(2) / 255), atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_q_is_the_written_out_sum_and_so_is_the_encoders_gradient(k):
    q_network = QNetwork(6, max_injections=2)
    for i in range(k):
        trained(q_network).inject(seeded(i))
    trained(q_network)
    obs = observations(8)
    weights = torch.randn(8, 6, generator=seeded(3))
    encoder = list(q_network.encoder.parameters())
    head = q_network.head
    got = torch.autograd.grad((weights * q_network(obs)).sum(), encoder)

    features = q_network.encoder(obs.float() / 255)
    written_out = head.theta(features)
    for i in range(k):
        written_out = written_out + head.theta_prime_1[i](features) - head.theta_prime_2[i](features)
    expected = torch.autograd.grad((weights * written_out).sum(), encoder)
    by_theta_alone = head.theta(q_network.encoder(obs.float() / 255))
    of_theta_alone = torch.autograd.grad((weights * by_theta_alone).sum(), encoder)
    assert torch.allclose(q_network(obs), written_out, atol=1e-6)
    for gradient, reference, old_head_only in zip(got, expected, of_theta_alone, strict=True):
        size = reference.abs().max().item()
        assert torch.allclose(gradient, reference, rtol=1e-4, atol=1e-5 * size)
        assert not torch.allclose(gradient, old_head_only, rtol=1e-2, atol=1e-3 * size)


def test_at_the_instant_of_injection_the_new_branches_gradients_to_the_encoder_cancel():
    q_network = trained(QNetwork(6))
    obs = observations(8)
    encoder = list(q_network.encoder.parameters())
    before = torch.autograd.grad(q_network(obs).sum(), encoder)
    q_network.inject(seeded())
    after = torch.autograd.grad(q_network(obs).sum(), encoder)
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_injection_draws_equal_fresh_heads_and_touches_nothing_else():
    q_network = trained(QNetwork(6, max_injections=2))
    others = [
        q_network.encoder,
        q_network.head.theta,
        q_network.head.theta_prime_1[1],
        q_network.head.theta_prime_2[1],
    ]
    before = [snapshot(module) for module in others]
    old_pair = snapshot(q_network.head.theta_prime_1[0])
    q_network.inject(seeded())
    assert q_network.num_injections == 1
    assert all(equal(saved, module) for saved, module in zip(before, others, strict=True))
    assert equal(snapshot(q_network.head.theta_prime_1[0]), q_network.head.theta_prime_2[0])
    assert not equal(old_pair, q_network.head.theta_prime_1[0])
    addresses = {parameter.data_ptr() for parameter in q_network.head.parameters()}
    assert len(addresses) == 5 * 4, "no two heads share memory"


def test_fresh_heads_follow_pytorchs_own_initialisation():
    q_network = QNetwork(18)
    q_network.inject(seeded())
    torch.manual_seed(0)
    reference = QNetwork(18).head.theta
    new_head = q_network.head.theta_prime_1[0]
    for fresh, default in zip(new_head.parameters(), reference.parameters(), strict=True):
        fan_in = 3136 if fresh.shape[0] == 512 else 512
        assert fresh.abs().max() <= fan_in**-0.5
        assert abs(fresh.std() / (fan_in**-0.5 / 3**0.5) - 1) < (0.1 if fresh.numel() > 100 else 0.6)
        assert default.abs().max() <= fan_in**-0.5


def test_heads_are_drawn_from_the_given_generator_and_from_no_other():
    first, second, other = (QNetwork(6) for _ in range(3))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first.inject(seeded(1))
    second.inject(seeded(1))
    other.inject(seeded(2))
    assert torch.equal(state, torch.get_rng_state())
    assert equal(snapshot(first.head.theta_prime_1[0]), second.head.theta_prime_1[0])
    assert not equal(snapshot(first.head.theta_prime_1[0]), other.head.theta_prime_1[0])


def test_without_a_generator_heads_come_from_the_global_one():
    torch.manual_seed(0)
    first = QNetwork(6)
    second = QNetwork(6)
    first.inject()
    second.inject()
    assert not equal(snapshot(first.head.theta_prime_1[0]), second.head.theta_prime_1[0])


def test_freezing_trains_the_encoder_and_the_newest_head_and_keeps_the_parameter_count():
    q_network = QNetwork(6, max_injections=2)
    count = num_trainable(q_network)
    expected = [
        [True, False, False, False, False],
        [False, True, False, False, False],
        [False, False, True, False, False],
    ]
    for injections, trainable in enumerate(expected):
        for head, flag in zip(heads(q_network), trainable, strict=True):
            assert all(parameter.requires_grad == flag for parameter in head.parameters())
        assert all(parameter.requires_grad for parameter in q_network.encoder.parameters())
        assert num_trainable(q_network) == count
        if injections < 2:
            q_network.inject(seeded())


def test_without_freezing_all_live_heads_train():
    q_network = QNetwork(6, max_injections=2, freeze_heads=False)
    q_network.inject(seeded())
    for head, trainable in zip(heads(q_network), [True, True, False, True, False], strict=True):
        assert all(parameter.requires_grad == trainable for parameter in head.parameters())


def test_frozen_parameters_have_no_gradient_not_a_zero_one():
    q_network = trained(QNetwork(6))
    assert all(p.grad is not None for p in q_network.head.theta.parameters())
    q_network.inject(seeded())
    for head in (q_network.head.theta, q_network.head.theta_prime_2[0]):
        assert all(parameter.grad is None for parameter in head.parameters())


def test_a_state_dict_carries_the_injections_and_what_they_froze(tmp_path):
    q_network = trained(QNetwork(6, max_injections=2))
    q_network.inject(seeded())
    trained(q_network)
    torch.save(q_network.state_dict(), tmp_path / "q.pt")
    loaded = QNetwork(6, max_injections=2)
    loaded.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
    assert loaded.num_injections == 1
    assert torch.equal(loaded(observations()), q_network(observations()))
    for name, parameter in q_network.named_parameters():
        assert loaded.get_parameter(name).requires_grad == parameter.requires_grad, name


@pytest.mark.parametrize("device", DEVICES)
def test_a_shared_bias_is_one_number_added_to_every_action(device):
    plain = QNetwork(6)
    shared = QNetwork(6, shared_bias=True).to(device)
    shared.inject(seeded())
    for head in heads(shared):
        assert head.output.bias.shape == (1,) and head.output.weight.shape == (6, 512)
    assert plain.head.theta.output.bias.shape == (6,)
    assert plain.head.theta.output.weight.shape == (6, 512)
    hidden = torch.randn(5, 512, generator=seeded(1)).to(device).requires_grad_()
    output = shared.head.theta_prime_1[0].output
    expected = hidden.detach() @ output.weight.T + output.bias
    assert expected.shape == (5, 6) and torch.allclose(output(hidden), expected, atol=1e-6)
    output(hidden).sum().backward()
    assert output.bias.grad.tolist() == [30], "one number, 5 · 6 times"
    assert 0 < output.bias.abs().item() <= 512**-0.5, "drawn at injection as PyTorch draws biases"
    obs = observations(4).to(device)
    with torch.no_grad():
        before = shared(obs)
        shared.head.theta.output.bias += 1
        assert torch.allclose(shared(obs), before + 1, atol=1e-6)


def test_heads_that_were_not_injected_yet_are_zero_and_named_by_no_one():
    q_network = QNetwork(6, max_injections=2)
    later = [*q_network.head.theta_prime_1.parameters(), *q_network.head.theta_prime_2.parameters()]
    assert not any(parameter.any() for parameter in later)
    assert list(q_network.in_use()) == ["encoder", "head.theta"]
    assert q_network.newest_head() == "head.theta"
    q_network.inject(seeded())
    assert list(q_network.in_use()) == [
        "encoder",
        "head.theta",
        "head.theta_prime_1.0",
        "head.theta_prime_2.0",
    ]
    assert q_network.in_use()["head.theta_prime_2.0"] is q_network.head.theta_prime_2[0]
    assert q_network.newest_head() == "head.theta_prime_1.0"


def test_one_injection_too_many_is_refused():
    q_network = QNetwork(6, max_injections=1)
    q_network.inject(seeded())
    with pytest.raises(ValueError, match="max_injections"):
        q_network.inject(seeded())


# growth


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("width", "injected"), [(64, 512), (512, 64), (32, None), (512, 512)])
def test_heads_may_have_other_widths_and_q_stays_bitwise_equal_across_every_injection(
    device, width, injected
):
    q_network = QNetwork(6, max_injections=2, head_width=width, injected_head_width=injected)
    trained(q_network.to(device))
    obs = observations(7).to(device)
    new = injected or width
    for k in range(2):
        before = q_network(obs)
        q_network.inject(seeded(k))
        assert torch.equal(q_network(obs), before)
        trained(q_network)
        assert not torch.equal(q_network(obs), before)
    theta = q_network.head.theta
    assert [theta.hidden.out_features, theta.output.out_features] == [width, 6]
    for head in (*q_network.head.theta_prime_1, *q_network.head.theta_prime_2):
        assert [head.hidden.in_features, head.hidden.out_features] == [3136, new]
        assert [head.output.in_features, head.output.out_features] == [new, 6]


def test_a_wider_head_changes_the_number_of_trainable_parameters_by_its_own():
    q_network = QNetwork(6, head_width=64, injected_head_width=512)
    small = num_trainable(q_network)
    q_network.inject(seeded())
    assert num_trainable(q_network) - small == (512 - 64) * (3136 + 1 + 6)


def test_the_width_changes_nothing_that_is_drawn_where_it_is_the_default():
    torch.manual_seed(3)
    plain = QNetwork(6)
    torch.manual_seed(3)
    named = QNetwork(6, head_width=512, injected_head_width=512)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), named.parameters(), strict=True))


# layer norm and weight decay


def test_layer_norm_stands_before_each_relu_and_takes_no_random_number():
    torch.manual_seed(0)
    plain = QNetwork(6)
    torch.manual_seed(0)
    normalised = QNetwork(6, layer_norm=True)
    matrices = [
        [value for value in network.parameters() if value.dim() > 1] for network in (plain, normalised)
    ]
    for value, with_norm in zip(*matrices, strict=True):
        assert torch.equal(value, with_norm)
    kinds = [type(module).__name__ for module in normalised.encoder]
    assert kinds == [*["Conv2d", "GroupNorm", "ReLU"] * 3, "Flatten"]
    added = sum(p.numel() for p in normalised.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 2 * (32 + 64 + 64) + 3 * 2 * 512, "the head's in θ, θ′₁ and θ′₂"
    assert not any("norm" in name for name, _ in plain.named_parameters())


def test_what_goes_into_each_relu_has_mean_0_and_variance_1_over_the_whole_layer():
    network = QNetwork(6, layer_norm=True)
    inputs = []
    for path in network.relus():
        module = network.get_submodule(path)
        module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().clone()))
    network(observations(5))
    assert [tuple(values.shape[1:]) for values in inputs] == [(32, 20, 20), (64, 9, 9), (64, 7, 7), (512,)]
    for values in inputs:
        flat = values.flatten(start_dim=1)
        torch.testing.assert_close(flat.mean(dim=1), torch.zeros(5), atol=1e-3, rtol=0)
        torch.testing.assert_close(flat.var(dim=1, correction=0), torch.ones(5), atol=0.05, rtol=0)


@torch.no_grad()
def test_a_convolution_is_normalised_over_all_channels_and_positions_of_an_observation_together():
    encoder = QNetwork(6, layer_norm=True).encoder
    values = observations(5) / 255
    for i in (0, 3, 6):
        convolution, norm, relu = encoder[i : i + 3]
        values = convolution(values)
        mean = values.mean(dim=(1, 2, 3), keepdim=True)
        variance = values.var(dim=(1, 2, 3), keepdim=True, correction=0)
        torch.testing.assert_close(norm(values), (values - mean) / (variance + 1e-5).sqrt())
        values = relu(norm(values))


def test_measured_layers_are_the_outputs_of_relus_with_and_without_layer_norm():
    for layer_norm in (False, True):
        network = QNetwork(6, layer_norm=layer_norm)
        assert list(network.relus().values()) == ["conv1", "conv2", "conv3", "head"]
        for path in network.relus():
            assert isinstance(network.get_submodule(path), torch.nn.ReLU)


def test_normalised_heads_are_injected_without_a_change_of_q_and_stay_in_channels_last():
    network = trained(QNetwork(6, layer_norm=True).to(memory_format=torch.channels_last))
    obs = observations(7)
    before = network(obs)
    network.inject(seeded())
    assert torch.equal(network(obs), before)
    features = network.encoder[:3](obs.float().contiguous(memory_format=torch.channels_last) / 255)
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_weight_decay_is_added_to_the_gradient_of_all_that_is_trained_and_off_by_default(optimizer):
    networks = {}
    for name, weight_decay, added_by_hand in (
        ("without", 0.0, 0.0),
        ("with", 1e-3, 0.0),
        ("by hand", 0.0, 1e-3),
    ):
        torch.manual_seed(0)
        network = QNetwork(6, max_injections=1, head_width=8)
        args = Args(optimizer=optimizer, learning_rate=0.01, weight_decay=weight_decay)
        chosen = make_optimizer(args, network)
        network.inject(seeded())
        frozen = [snapshot(head) for head in (network.head.theta, network.head.theta_prime_2)]
        for _ in range(2):
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.grad = 1e-5 + added_by_hand * parameter.detach()
            chosen.step()
        for before, head in zip(frozen, (network.head.theta, network.head.theta_prime_2), strict=True):
            assert equal(before, head)
        networks[name] = network
    for name, value in networks["with"].named_parameters():
        torch.testing.assert_close(value, networks["by hand"].get_parameter(name), atol=1e-6, rtol=0)
        if value.requires_grad:
            difference = (value - networks["without"].get_parameter(name)).abs().max()
            assert difference > 1e-5, "and that is far from none"
    assert Args().weight_decay == 0 and not Args().layer_norm
