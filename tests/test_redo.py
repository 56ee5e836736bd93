"""ReDo: which units are recycled, what becomes of their weights and moments, and of nothing else."""

import copy

import pytest
import torch
from conftest import make_learner, moments_of, random_batch, trained

from alternatives.redo import ALTERNATIVE
from dqn_injection_atari import Args, InjectableHead, Stream
from support import measures
from support.randomness import stream_seed
from support.usage import UsageError

NAMES = ("conv1", "conv2", "conv3", "head")
SILENT = {"conv1": (3, 17), "conv2": (0,), "conv3": (5, 63), "head": (1, 2, 40)}


def layers(network):
    """{name: (what makes its units, what takes them in)}."""
    convolutions = [module for module in network.encoder if isinstance(module, torch.nn.Conv2d)]
    head = network.head.theta
    chain = [*convolutions, head.hidden, head.output]
    return {name: chain[i : i + 2] for i, name in enumerate(NAMES)}


def norms(network):
    """{name: the normalisation of its units}, of a network that has them."""
    found = [module for module in network.encoder if isinstance(module, torch.nn.GroupNorm)]
    return dict(zip(NAMES, [*found, network.head.theta.norm], strict=True))


def silence(network, silent=SILENT):
    """Makes these units silent, without weights and with a bias far below zero, and all others active."""
    with torch.no_grad():
        for name in NAMES:
            incoming, _ = layers(network)[name]
            incoming.weight.abs_().mul_(0.1)
            incoming.bias[:] = 0.1
            for unit in silent.get(name, ()):
                incoming.weight[unit] = 0
                incoming.bias[unit] = -10


def recycling(silent=SILENT, step=40, threshold=0.0, **settings):
    """A learner with silent units, a copy of it as it was, and what recycling says that it did."""
    settings = {"injection_step": (40,), "redo_threshold": threshold} | settings
    learner = trained(intervention="redo", **settings)
    silence(learner.q_network, silent)
    before = copy.deepcopy(learner.q_network)
    counts = learner.repeat(random_batch(7, size=64).observations, step)
    return learner, before, counts


def drawn(learner, step):
    """The new encoder and head from which the weights of recycled units come."""
    parts = []
    for stream, make in (
        (Stream.PERTURBATION, learner.q_network.make_new_encoder),
        (Stream.INJECTION, learner.q_network.head.make_head),
    ):
        generator = torch.Generator().manual_seed(stream_seed(learner.args.seed, stream, step))
        parts.append(InjectableHead.draw(make, generator))
    encoder, head = parts
    convolutions = [module for module in encoder if isinstance(module, torch.nn.Conv2d)]
    return dict(zip(NAMES, [*convolutions, head.hidden], strict=True))


def expected_weights(before, new, silent):
    """Every weight and bias, entry by entry: incoming ones from `new`, then outgoing ones zero."""
    expected = copy.deepcopy(before)
    with torch.no_grad():
        for name, units in silent.items():
            incoming, _ = layers(expected)[name]
            for unit in units:
                incoming.weight[unit] = new[name].weight[unit]
                incoming.bias[unit] = 0
        for name, units in silent.items():
            _, outgoing = layers(expected)[name]
            for unit in units:
                if name == "conv3":
                    for position in range(49):  # of 7 × 7, flattened channel first
                        outgoing.weight[:, unit * 49 + position] = 0
                else:
                    outgoing.weight[:, unit] = 0
    return dict(expected.named_parameters())


def test_weights_are_those_of_a_naive_reference_and_in_the_same_tensors():
    learner, before, counts = recycling()
    expected = expected_weights(before, drawn(learner, 40), SILENT)
    for name, parameter in learner.q_network.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert counts == {f"recycled/{name}": len(units) for name, units in SILENT.items()}
    known = {id(parameter) for group in learner.optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in learner.q_network.parameters()} <= known


def test_a_weight_between_two_recycled_units_is_zero():
    learner, *_ = recycling()
    _, outgoing = layers(learner.q_network)["conv1"]
    assert not outgoing.weight[0, [3, 17]].any() and outgoing.weight[0].any()
    assert not outgoing.weight[0].isnan().any()


def test_q_does_not_change_where_silent_units_are_recycled():
    learner, before, _ = recycling()
    obs = random_batch(8).observations
    with torch.no_grad():
        assert torch.equal(learner.q_network(obs), before(obs))


def test_recycled_units_are_active_again_after_they_have_learned():
    learner, *_ = recycling()
    obs = random_batch(7, size=64).observations
    _, activations = measures.activations(learner.q_network, learner.q_network.relus(), obs)
    assert (activations["conv1"][:, [3, 17]] > 0).any()
    _, outgoing = layers(learner.q_network)["head"]
    learner.update(random_batch(9))
    assert outgoing.weight[:, list(SILENT["head"])].any(), "and reach Q again"


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_moments_of_their_weights_become_zero_and_all_others_stay(optimizer):
    learner = trained(
        intervention="redo", injection_step=(40,), redo_threshold=0.0, optimizer=optimizer, learning_rate=1e-4
    )
    silence(learner.q_network)
    before = {path: moments_of(learner, path) for path in ("encoder", "head.theta")}
    learner.repeat(random_batch(7, size=64).observations, 40)
    names = {id(parameter): name for name, parameter in learner.q_network.named_parameters()}
    empty = {name: torch.zeros_like(tensor).bool() for name, tensor in learner.q_network.named_parameters()}
    for name, units in SILENT.items():
        incoming, outgoing = layers(learner.q_network)[name]
        for unit in units:
            empty[names[id(incoming.weight)]][unit] = True
            columns = range(unit * 49, unit * 49 + 49) if name == "conv3" else (unit,)
            for column in columns:
                empty[names[id(outgoing.weight)]][:, column] = True
    for path in before:
        after = moments_of(learner, path)
        for name, moments in before[path].items():
            for kind, moment in moments.items():
                expected = moment.clone()
                if moment.shape == empty[name].shape:
                    assert moment.any()
                    expected[empty[name]] = 0
                assert torch.equal(after[name][kind], expected), (name, kind)


def test_a_unit_is_recycled_up_to_the_threshold_as_a_share_of_its_layers_mean():
    learner = trained(intervention="redo", injection_step=(40,))
    obs = random_batch(7, size=64).observations
    _, activations = measures.activations(learner.q_network, learner.q_network.relus(), obs)
    for threshold in (0.025, 0.1, 0.7):
        expected = {}
        for name, values in activations.items():
            of_units = [values[:, unit].abs().mean().item() for unit in range(values.shape[1])]
            mean = sum(of_units) / len(of_units)
            expected[f"recycled/{name}"] = sum(value / mean <= threshold for value in of_units)
        other = make_learner(intervention="redo", injection_step=(40,), redo_threshold=threshold)
        other.load_state_dict(copy.deepcopy(learner.state_dict()))
        assert other.repeat(obs, 40) == expected
    assert sum(expected.values()) > 20, "the threshold counts"


def test_a_layer_that_is_wholly_silent_is_wholly_drawn_anew():
    learner, before, counts = recycling({"conv2": tuple(range(64))})
    assert counts["recycled/conv2"] == 64
    expected = expected_weights(before, drawn(learner, 40), {"conv2": tuple(range(64)), "conv3": ()})
    weight = learner.q_network.get_parameter("encoder.2.weight")
    assert torch.equal(weight, expected["encoder.2.weight"])


def test_units_whose_activity_is_not_finite_stay():
    learner = trained(intervention="redo", injection_step=(40,))
    with torch.no_grad():
        learner.q_network.encoder[0].bias[0] = float("nan")
    assert set(learner.repeat(random_batch(7, size=64).observations, 40).values()) == {0}


def test_what_is_drawn_depends_on_seed_and_step_and_moves_no_other_random_number():
    state = torch.get_rng_state()
    first, *_ = recycling()
    again, *_ = recycling()
    later, *_ = recycling(step=44)
    other, *_ = recycling(seed=2)
    torch.set_rng_state(state)
    rng = copy.deepcopy(first.rng.bit_generator.state)
    first.repeat(random_batch(7, size=64).observations, 80)
    assert first.rng.bit_generator.state == rng and torch.equal(torch.get_rng_state(), state)
    rows = [learner.q_network.head.theta.hidden.weight[1] for learner in (again, later, other)]
    same, *_ = recycling()
    assert torch.equal(rows[0], same.q_network.head.theta.hidden.weight[1])
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_a_normalised_unit_gets_a_fresh_scale_and_shift_too():
    settings = {"injection_step": (40,), "redo_threshold": 0.0, "layer_norm": True}
    learner = trained(intervention="redo", **settings)
    with torch.no_grad():
        for name, units in SILENT.items():
            norm = norms(learner.q_network)[name]
            norm.bias[:] = 5  # all others are active
            norm.weight[list(units)] = 0
            norm.bias[list(units)] = -1
    counts = learner.repeat(random_batch(7, size=64).observations, 40)
    assert counts == {f"recycled/{name}": len(units) for name, units in SILENT.items()}
    for name, units in SILENT.items():
        norm = norms(learner.q_network)[name]
        assert (norm.weight[list(units)] == 1).all() and not norm.bias[list(units)].any()
        assert (norm.weight != 1).any(), "of those alone"


def test_activity_is_that_of_the_float32_network_also_with_bf16():
    learner = trained(intervention="redo", injection_step=(40,), redo_threshold=0.0, bf16=True)
    silence(learner.q_network)  # and not the working copy
    counts = learner.repeat(random_batch(7, size=64).observations, 40)
    assert counts == {f"recycled/{name}": len(units) for name, units in SILENT.items()}


def test_norms_count_on_from_where_they_began():
    learner = trained(intervention="redo", injection_step=(40,))
    before = learner.norms.state_dict()
    silence(learner.q_network)
    learner.repeat(random_batch(7, size=64).observations, 40)
    assert learner.norms.state_dict() == before


def test_the_target_waits_for_its_sync_bf16_copies_follow_and_there_is_no_entry_among_interventions():
    learner = trained(intervention="redo", injection_step=(40,), redo_threshold=0.0, bf16=True)
    silence(learner.q_network)
    target = copy.deepcopy(learner.target_network.state_dict())
    working = list(learner.online.parameters())
    learner.repeat(random_batch(7, size=64).observations, 40)
    for name, value in learner.target_network.state_dict().items():
        assert torch.equal(value, target[name]), name
    for copied, tensor, parameter in zip(
        learner.online.parameters(), working, learner.q_network.parameters(), strict=True
    ):
        assert copied is tensor and torch.equal(copied, parameter.to(copied.dtype))
    assert learner.interventions == []


def test_captured_graphs_stay_and_go_on_with_the_recycled_weights(stand_in):
    eager, captured = (
        make_learner(intervention="redo", injection_step=(40,), redo_threshold=0.5, cuda_graphs=graphs)
        for graphs in (False, True)
    )
    batch = random_batch(1)
    obs = random_batch(7, size=64).observations
    for learner in (eager, captured):
        learner.update(batch)
    captures = len(stand_in.captures)
    for k in range(2):
        for learner in (eager, captured):
            assert sum(learner.repeat(obs, 40 + 4 * k).values()) > 0
            learner.update(batch)
        for name, parameter in eager.q_network.named_parameters():
            assert torch.equal(parameter, captured.q_network.get_parameter(name)), name
    assert len(stand_in.captures) == captures


def test_its_settings_are_its_own_and_a_baselines():
    assert ALTERNATIVE.period == "redo_frequency" and ALTERNATIVE.batch_size == 64
    args = Args(intervention="redo", injection_step=(5,))
    assert (args.redo_frequency, args.redo_threshold, args.intervention_period) == (4_000, 0.025, 4_000)
    assert Args(intervention="reset-head", injection_step=(5,)).intervention_period == 0
    for settings in ({"redo_frequency": 8}, {"redo_threshold": 0.1}):
        for intervention in ("redo", "none"):
            Args(intervention=intervention, injection_step=(5,), **settings)
        with pytest.raises(UsageError, match="which only --intervention redo looks at"):
            Args(intervention="injection", injection_step=(5,), **settings)
    with pytest.raises(UsageError, match="at least num_envs"):
        Args(intervention="redo", injection_step=(5,), redo_frequency=4, num_envs=8)
    by_norm = {"injection_trigger": "norm"}
    for settings in (by_norm, by_norm | {"injection_step": (5,)}, {"injection_step": (5, 9)}):
        with pytest.raises(
            UsageError, match="redo goes on from one step: give --injection-trigger step, and"
        ):
            Args(intervention="redo", **settings)
    with pytest.raises(
        UsageError, match=r"which only --intervention injection, reset-head, .+ or fire looks at"
    ):
        Args(intervention="redo", injection_step=(5,), moments="keep")
