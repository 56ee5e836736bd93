"""InjectableHead as somebody else takes it: its source alone, and heads of any layers."""

import ast
import copy
import functools
import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import make_learner

from dqn_injection_atari import Head, InjectableHead, QNetwork, Stream
from support.randomness import stream_seed


def copied_class():
    """The class, from its source, where nothing but torch is known."""
    namespace = {"torch": torch}
    exec(inspect.getsource(InjectableHead), namespace)
    return namespace["InjectableHead"]


CopiedHead = copied_class()


def test_python_3_9_evaluates_its_annotations():
    """It knows no unions of classes, but in quotes."""
    for function in ast.walk(ast.parse(inspect.getsource(InjectableHead))):
        if isinstance(function, ast.FunctionDef):
            arguments = [*function.args.args, *function.args.kwonlyargs]
            for annotation in (*(argument.annotation for argument in arguments), function.returns):
                if annotation is not None:
                    assert "|" not in re.sub(r"'.*?'", "", ast.unparse(annotation)), function.name


class Waves(nn.Module):
    """A layer of one's own: parameters and a buffer, each initialised in its own way."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.frequencies = nn.Parameter(torch.empty(inputs, outputs))
        self.amplitudes = nn.Parameter(torch.empty(outputs))
        self.register_buffer("phases", torch.empty(outputs))
        self.reset()

    def reset(self):
        nn.init.orthogonal_(self.frequencies)
        nn.init.constant_(self.amplitudes, 0.5)
        nn.init.uniform_(self.phases, 2, 3)

    def forward(self, x):
        return self.amplitudes * torch.sin(x @ self.frequencies + self.phases)


def normalised():
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def waving():
    return nn.Sequential(Waves(8, 16), nn.Linear(16, 3))


each_maker = pytest.mark.parametrize("make_head", [normalised, waving])


class Agent(nn.Module):
    """A linear encoder, a head, and an optimizer that was made once."""

    def __init__(self, *head, **settings):
        super().__init__()
        self.encoder = nn.Linear(5, 8)
        self.value_head = CopiedHead(*head, **settings)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.01)

    def forward(self, obs):
        return self.value_head(self.encoder(obs))

    def learn(self, steps=3):
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = (self(observations()) - 1).square().mean()
            loss.backward()
            self.optimizer.step()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def observations():
    return torch.randn(64, 5, generator=seeded(9))


def values(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trainable(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def names(module, *prefixes):
    return {name for name, _ in module.named_parameters() if name.startswith(prefixes)}


# injections


@each_maker
@pytest.mark.parametrize("freeze", [True, False])
def test_each_injection_leaves_the_output_as_it_is_and_then_the_newest_head_learns(make_head, freeze):
    agent = Agent(make_head, max_injections=3, freeze=freeze)
    head = agent.value_head
    generator = seeded()
    in_use = ["encoder", "value_head.theta."]
    for k in range(3):
        agent.learn()
        before = agent(observations())
        old_heads = values(head)
        head.inject(generator)
        assert torch.equal(agent(observations()), before)
        assert head.num_injections == k + 1
        assert same(values(head.theta_prime_1[k]), values(head.theta_prime_2[k]))
        drawn = names(head, f"theta_prime_1.{k}", f"theta_prime_2.{k}")
        assert all(torch.equal(head.get_parameter(name), old_heads[name]) for name in names(head, "") - drawn)

        in_use += [f"value_head.theta_prime_1.{k}.", f"value_head.theta_prime_2.{k}."]
        learning = names(agent, *in_use)
        if freeze:
            learning = names(agent, "encoder", f"value_head.theta_prime_1.{k}.")
        assert trainable(agent) == learning
        frozen = names(agent, "") - learning
        assert all(agent.get_parameter(name).grad is None for name in frozen), "not a zero one"
        parameters = values(agent)
        agent.learn()
        moved = {name for name in names(agent, "") if not torch.equal(parameters[name], values(agent)[name])}
        assert moved == learning
        assert not torch.equal(agent(observations()), before)


@each_maker
def test_heads_to_come_are_not_evaluated_and_get_no_gradient(make_head):
    agent = Agent(make_head, max_injections=2)
    agent.value_head.inject()
    for head in (agent.value_head.theta_prime_1[1], agent.value_head.theta_prime_2[1]):
        assert not any(parameter.any() for parameter in head.parameters())
        head.register_forward_hook(lambda *_: pytest.fail("it was evaluated"))
    agent.learn()
    for name, parameter in agent.named_parameters():
        assert (parameter.grad is None) == (name not in trainable(agent)), name


def test_every_layer_of_a_new_head_has_its_own_initialisation():
    head = CopiedHead(normalised)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(7)
    head.inject(seeded())
    for linear, norm, _, output in (head.theta_prime_1[0], head.theta_prime_2[0]):
        assert torch.equal(norm.weight, torch.ones(16)) and torch.equal(norm.bias, torch.zeros(16))
        for layer in (linear, output):
            assert layer.weight.std() > 0 and layer.weight.abs().max() <= layer.in_features**-0.5

    head = CopiedHead(waving)
    head.inject(seeded())
    for waves in (head.theta_prime_1[0][0], head.theta_prime_2[0][0]):
        assert torch.allclose(waves.frequencies @ waves.frequencies.T, torch.eye(8), atol=1e-5)
        assert torch.equal(waves.amplitudes, torch.full((16,), 0.5))
        assert 2 <= waves.phases.min() < waves.phases.max() <= 3


def test_heads_that_injections_add_may_be_larger():
    def large():
        return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3))

    agent = Agent(normalised, max_injections=1, make_new_head=large)
    before = agent(observations())
    agent.value_head.inject(seeded())
    assert torch.equal(agent(observations()), before)
    assert agent.value_head.theta_prime_1[0][0].out_features == 64
    assert same(
        values(agent.value_head.draw_like_newest(seeded())), values(agent.value_head.theta_prime_1[0])
    )


@pytest.mark.parametrize("max_injections", [0, 2])
def test_where_all_pairs_are_in_use_an_injection_is_refused_and_changes_nothing(max_injections):
    head = CopiedHead(normalised, max_injections=max_injections)
    for _ in range(max_injections):
        head.inject()
    generator = seeded()
    before = values(head)
    message = f"^all {max_injections} pairs of heads are in use: build it with a larger max_injections$"
    with pytest.raises(ValueError, match=message):
        head.inject(generator)
    assert same(values(head), before) and torch.equal(generator.get_state(), seeded().get_state())


# random numbers


@each_maker
def test_a_generator_moves_on_and_gives_each_injection_its_own_head(make_head):
    torch.manual_seed(5)
    heads = [CopiedHead(make_head, max_injections=2) for _ in range(3)]
    state = torch.get_rng_state()
    for head, seed in zip(heads, (0, 0, 1), strict=True):
        generator = seeded(seed)
        head.inject(generator)
        head.inject(generator)
    assert torch.equal(torch.get_rng_state(), state), "PyTorch's own stream stays where it was"
    first, same_seed, other_seed = heads
    assert same(values(first.theta_prime_1), values(same_seed.theta_prime_1))
    drawn = [
        values(first.theta_prime_1[0]),
        values(first.theta_prime_1[1]),
        values(other_seed.theta_prime_1[0]),
    ]
    random = [name for name in drawn[0] if drawn[0][name].std() > 0]
    assert len(random) >= 3
    for name in random:
        assert not torch.equal(drawn[0][name], drawn[1][name])
        assert not torch.equal(drawn[0][name], drawn[2][name])


@each_maker
def test_without_a_generator_a_head_comes_from_pytorchs_own_stream(make_head):
    head = CopiedHead(make_head, max_injections=2)
    torch.manual_seed(4)
    expected = [values(make_head()), values(make_head())]
    torch.manual_seed(4)
    head.inject()
    head.inject()
    assert [same(values(head.theta_prime_1[k]), expected[k]) for k in range(2)] == [True, True]


def test_a_new_head_is_what_its_maker_gives_with_the_generator_in_the_place_of_pytorchs_own():
    torch.manual_seed(11)
    expected = values(waving())
    head = CopiedHead(waving)
    head.inject(seeded(11))
    assert same(values(head.theta_prime_1[0]), expected)


def test_a_generator_that_is_not_the_cpus_is_refused():
    head = CopiedHead(normalised)
    with pytest.raises(
        ValueError, match=r"the generator is of cuda:0: give one of the CPU, torch\.Generator"
    ):
        head.inject(SimpleNamespace(device=torch.device("cuda:0")))
    assert head.num_injections == 0


@each_maker
def test_a_new_head_is_the_same_whatever_the_default_device(make_head):
    """The device meta stands in for a GPU: what is made there has no numbers."""
    there = CopiedHead(make_head)
    here = copy.deepcopy(there)
    here.inject(seeded())
    with torch.device("meta"):
        there.inject(seeded())
    assert same(values(there), values(here))


@each_maker
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_head_stays_in_its_own_precision_also_where_the_default_is_another(make_head, dtype):
    agent = Agent(make_head, max_injections=2).to(dtype)
    obs = observations().to(dtype)
    before = agent(obs)
    agent.value_head.inject(seeded(0))
    torch.set_default_dtype(torch.float64)
    try:
        agent.value_head.inject(seeded(1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in agent.parameters()} == {dtype}
    assert torch.equal(agent(obs), before)


# states


@each_maker
@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("room", [1, 2, 4])
def test_a_state_is_taken_up_with_more_or_fewer_pairs_to_come(make_head, root, room):
    agent = Agent(make_head, max_injections=2)
    agent.learn()
    agent.value_head.inject(seeded())
    agent.learn()
    other = Agent(make_head, max_injections=room)
    for _ in range(room):  # of these pairs all but the first are not in use afterwards
        other.value_head.inject(seeded(7))
    state = agent.state_dict()
    before = list(state)
    if root:
        other.encoder.load_state_dict(agent.encoder.state_dict())
        other.value_head.load_state_dict(agent.value_head.state_dict())
    else:
        other.load_state_dict(state)
    assert list(state) == before, "the state that was given is left alone"
    assert other.value_head.num_injections == 1
    assert torch.equal(other(observations()), agent(observations()))
    assert trainable(other) == trainable(agent) == names(agent, "encoder", "value_head.theta_prime_1.0.")
    to_come = [*other.value_head.theta_prime_1[1:], *other.value_head.theta_prime_2[1:]]
    assert len(to_come) == 2 * (room - 1)
    for head in to_come:
        assert not any(parameter.any() for parameter in head.parameters())
    if room > 1:
        agent.value_head.inject(seeded(1))
        other.value_head.inject(seeded(1))
        assert torch.equal(other(observations()), agent(observations()))
        assert same(values(other.value_head.theta_prime_1[1]), values(agent.value_head.theta_prime_1[1]))


@pytest.mark.parametrize("root", [True, False])
def test_a_state_with_more_injections_than_there_is_room_for_is_refused_with_the_fix(root):
    agent = Agent(normalised, max_injections=3)
    for _ in range(3):
        agent.value_head.inject()
    small = Agent(normalised, max_injections=2)
    name = "theta_prime_1.2" if root else "value_head.theta_prime_1.2"
    message = f"^{name} is in use, and there are 2 pairs of heads: build it with a larger max_injections$"
    with pytest.raises(RuntimeError, match=message):
        if root:
            small.value_head.load_state_dict(agent.value_head.state_dict())
        else:
            small.load_state_dict(agent.state_dict())
    assert small.value_head.num_injections == 0


@pytest.mark.parametrize("name", ["value_head.gamma", "value_head.theta.9.weight", "gamma"])
def test_names_that_are_none_of_its_own_are_refused_as_pytorch_does(name):
    agent = Agent(normalised)
    state = agent.state_dict() | {name: torch.zeros(1)}
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{name}"):
        agent.load_state_dict(state)


@pytest.mark.parametrize(
    "name", ["_extra_state", "theta.0.weight", "theta_prime_1.0.1.bias", "theta_prime_2.0.3.bias"]
)
def test_a_state_that_lacks_a_part_in_use_is_refused_as_pytorch_does(name):
    agent = Agent(normalised)
    agent.value_head.inject()
    state = agent.state_dict()
    del state[f"value_head.{name}"]
    with pytest.raises(RuntimeError, match=f"Missing key.*value_head.{name}"):
        agent.load_state_dict(state)


@pytest.mark.parametrize("shared", ["head", "layer"])
def test_a_function_that_gives_away_a_head_or_layer_that_it_has_is_refused(shared):
    head = normalised()
    makers = {"head": lambda: head, "layer": lambda: nn.Sequential(head[0], nn.Linear(16, 3))}
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(
        ValueError, match=r"^two heads have parameters in common: make_head has to make a new"
    ):
        CopiedHead(makers[shared])
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_an_average_of_states_is_refused_unless_it_is_as_good_as_one_of_them():
    injected = CopiedHead(normalised)
    injected.inject()
    state = injected.state_dict()
    average = {name: value.float() * 0.5 for name, value in state.items()}
    message = r"^this state has 0\.5 injections, an average of states: take _extra_state from one of them"
    with pytest.raises(ValueError, match=message):
        CopiedHead(normalised).load_state_dict(average)
    for share in (1e-4, 0.7, 0.998):
        part = {name: value.float() * share for name, value in state.items()}
        with pytest.raises(
            ValueError, match=rf"^this state has {share:.7g} injections, an average of states"
        ):
            CopiedHead(normalised).load_state_dict(part)
    nearly = {name: value.float() * 0.99997 for name, value in state.items()}
    loaded = CopiedHead(normalised)
    loaded.load_state_dict(nearly)
    assert loaded.num_injections == 1 and loaded.newest() == "theta_prime_1.0"
    assert torch.equal(loaded.theta_prime_1[0][0].weight, nearly["theta_prime_1.0.0.weight"])


def test_a_function_that_chooses_a_device_itself_cannot_take_its_numbers_from_a_generator():
    head = CopiedHead(lambda: nn.Linear(8, 3, device="meta"))
    with pytest.raises(
        ValueError, match=r"^make_head makes layers on meta, .* leave the device out there, and"
    ):
        head.inject(torch.Generator())
    assert head.num_injections == 0


@each_maker
def test_a_copy_is_independent(make_head):
    agent = Agent(make_head, max_injections=2)
    agent.learn()
    agent.value_head.inject(seeded())
    twin = copy.deepcopy(agent.value_head)
    features = agent.encoder(observations()).detach()
    before = twin(features)
    assert torch.equal(before, agent.value_head(features)) and trainable(twin) == trainable(agent.value_head)
    agent.learn()
    agent.value_head.inject(seeded(1))
    agent.learn()
    assert twin.num_injections == 1 and torch.equal(twin(features), before)
    twin.inject(seeded(2))
    assert torch.equal(twin(features), before) and twin.num_injections == 2


# the bits of this project's own networks


@torch.no_grad()
def redraw(module, generator):
    """How an earlier version drew layers anew: in place, by their bounds."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


MAKERS: dict[str, Callable[[], torch.nn.Module]] = {"encoder": QNetwork.make_encoder}
for width, num_actions, shared_bias in (
    (512, 18, False),
    (512, 6, True),
    (64, 4, False),
    (1, 1, True),
    (17, 9, False),
):
    name = f"{width} units, {num_actions} actions, shared bias {shared_bias}"
    MAKERS[name] = functools.partial(Head, width, num_actions, shared_bias)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seed", [0, 123])
def test_what_is_drawn_has_the_bits_that_it_had_when_it_was_drawn_in_place(name, seed):
    reference = MAKERS[name]()
    redraw(reference, seeded(seed))
    drawn = InjectableHead.draw(MAKERS[name], seeded(seed))
    assert same(values(drawn), values(reference))


def test_a_learners_injections_have_the_bits_of_their_seed_and_number():
    learner = make_learner(seed=3, head_width=512)
    for k in range(2):
        learner.inject()
        reference = Head(512, 6)
        redraw(reference, seeded(stream_seed(3, Stream.INJECTION, k)))
        assert same(values(learner.q_network.head.theta_prime_1[k]), values(reference))


def test_a_networks_first_weights_are_those_of_its_layers_made_in_the_order_of_the_equation():
    torch.manual_seed(2)
    network = QNetwork(6, max_injections=3)
    torch.manual_seed(2)
    assert same(values(QNetwork.make_encoder()), values(network.encoder))
    assert same(values(Head(512, 6)), values(network.head.theta))
