"""An injection in other agents: the examples run, and what their page says is so."""

import copy
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from torch import nn

from analysis.audit import Audited, audit, faults_of_injection
from dqn_injection_atari import InjectableHead
from examples import stable_baselines3_dqn as example
from support.optimizers import load_moments, moments_by_name

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "stable_baselines3_dqn.py"
PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def sum_of_heads(head, features):
    return head.theta(features) + (head.theta_prime_1[0](features) - head.theta_prime_2[0](features))


def parts_at(encoder, head):
    """The parts for the audit, by the paths of the encoder and of the injectable head."""
    return {
        "φ": encoder,
        "θ": f"{head}.theta",
        "θ′₁": f"{head}.theta_prime_1.0",
        "θ′₂": f"{head}.theta_prime_2.0",
    }


def blocks(language):
    return [text for name, text in BLOCK.findall(PAGE) if name == language]


# Stable-Baselines3


def without_numbers(text):
    return re.sub(r"\d+(\.\d+)?", "0", text)


@pytest.mark.slow
def test_the_script_learns_injects_is_loaded_and_prints_what_the_page_shows():
    ended = subprocess.run([sys.executable, SCRIPT], capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 0, ended.stderr
    shown, _ = blocks("")
    assert without_numbers(ended.stdout) == without_numbers(shown)
    assert "Q changed by 0.0," in ended.stdout
    first, _, last, _ = map(float, re.findall(r"return ([\d.]+)", ended.stdout))
    assert last > 3 * first


def test_the_script_has_at_most_120_lines():
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 120


def small_model(**settings):
    defaults = {"env": "CartPole-v1", "learning_starts": 8, "batch_size": 8, "target_update_interval": 10}
    return DQN(example.InjectablePolicy, **defaults | settings, seed=1, device="cpu")


def weights(module):
    return {name: values.clone() for name, values in module.state_dict().items()}


def changed(before, module):
    return {name for name, values in module.state_dict().items() if not torch.equal(values, before[name])}


OBS = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


def test_the_librarys_optimizer_holds_all_heads_from_the_start():
    model = small_model()
    (group,) = model.policy.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.q_net.parameters()]
    assert {name.partition(".")[0] for name, _ in example.head_of(model).named_parameters()} == {
        "theta",
        "theta_prime_1",
        "theta_prime_2",
    }


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh])
def test_the_encoder_and_the_head_together_are_the_librarys_own_layers(activation_fn):
    settings = {"net_arch": [16, 12, 8], "activation_fn": activation_fn}
    ours = small_model(policy_kwargs=settings).q_net
    theirs = DQN("MlpPolicy", "CartPole-v1", policy_kwargs=settings, device="cpu").q_net
    layers = [*ours.q_net[0], *ours.q_net[1].theta]
    assert [str(layer) for layer in layers] == [str(layer) for layer in theirs.q_net]
    for layer, other in zip(layers, theirs.q_net, strict=True):
        layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(OBS), theirs(OBS))


def test_an_injection_leaves_q_brings_the_target_along_and_draws_no_other_random_number():
    model = small_model().learn(33)
    before = model.q_net(OBS)
    assert not torch.equal(model.q_net_target(OBS), before)
    random_state = torch.get_rng_state()
    example.inject(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model.q_net(OBS), before)
    assert torch.equal(model.q_net_target(OBS), before)
    assert model.q_net_target.q_net[1].num_injections == 1


def test_runs_with_other_seeds_draw_other_heads():
    drawn = []
    for seed in (1, 2, 2):
        model = small_model()
        model.set_random_seed(seed)
        example.inject(model)
        drawn.append(example.head_of(model).theta_prime_1[0][0].weight)
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])


def test_each_of_several_injections_draws_another_head(monkeypatch):
    head_with_room = functools.partial(example.InjectableHead, max_injections=2)
    monkeypatch.setattr(example, "InjectableHead", head_with_room)
    model = small_model()
    example.inject(model)
    first = weights(example.head_of(model).theta_prime_1[0])
    example.inject(model)
    second = example.head_of(model).theta_prime_1[1].state_dict()
    assert not any(torch.equal(value, first[name]) for name, value in second.items())


def test_the_librarys_syncs_bring_the_new_head_to_the_target_from_then_on():
    model = small_model().learn(33)
    example.inject(model)
    # ends at a sync, before the update that comes after it
    model.learn(27, reset_num_timesteps=False)
    before = weights(model.q_net_target)
    model.learn(40, reset_num_timesteps=False)
    moved = changed(before, model.q_net_target)
    assert {name.rpartition(".")[0] for name in moved} == {
        "q_net.0.0",
        "q_net.1.theta_prime_1.0.0",
        "q_net.1.theta_prime_1.0.2",
    }


@pytest.mark.parametrize(("num_envs", "expected"), [(1, 25), (4, 28)])
def test_the_callback_injects_once_at_the_first_step_that_there_is(monkeypatch, num_envs, expected):
    steps = []

    def note(model):
        steps.append(model.num_timesteps)
        example.inject(model)

    monkeypatch.setattr(example, "audit_injection", note)
    monkeypatch.setattr(example, "mean_return", lambda model: None)
    model = small_model(env=make_vec_env("CartPole-v1", num_envs))
    model.learn(60, example.InjectAt(25))
    assert steps == [expected]


def test_a_loaded_agent_plays_the_same_is_frozen_still_and_is_not_injected_again(tmp_path):
    model = small_model().learn(33)
    example.inject(model)
    model.learn(40, reset_num_timesteps=False)
    model.save(tmp_path / "agent")
    model.save_replay_buffer(tmp_path / "replay")
    loaded = DQN.load(tmp_path / "agent", model.get_env())
    loaded.load_replay_buffer(tmp_path / "replay")
    assert torch.equal(loaded.q_net(OBS), model.q_net(OBS))
    assert torch.equal(loaded.q_net_target(OBS), model.q_net_target(OBS))
    for ours, theirs in zip(loaded.q_net.parameters(), model.q_net.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad
    states = (loaded.policy.optimizer.state_dict()["state"], model.policy.optimizer.state_dict()["state"])
    assert states[0].keys() == states[1].keys()

    before = weights(loaded.q_net)
    loaded.learn(40, example.InjectAt(33), reset_num_timesteps=False)
    assert {name.rpartition(".")[0] for name in changed(before, loaded.q_net)} == {
        "q_net.0.0",
        "q_net.1.theta_prime_1.0.0",
        "q_net.1.theta_prime_1.0.2",
    }


def test_the_script_stops_where_the_audit_finds_something_wrong(monkeypatch):
    model = small_model().learn(33)
    monkeypatch.setattr(example, "inject", lambda model: example.head_of(model).inject())
    with pytest.raises(SystemExit, match="the target stays behind"):
        example.audit_injection(model)


# the page


@pytest.fixture
def page(capsys):
    """The names that the page's code has made once it has run, and what it printed."""
    torch.manual_seed(0)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    return names | {"printed": capsys.readouterr().out}


def test_the_pages_code_runs_and_prints_what_the_page_shows(page):
    _, shown = blocks("")
    assert page["printed"] == shown


def test_the_pages_agent_learns_with_its_newest_head_alone(page):
    agent = page["Agent"]()
    agent.update()
    agent.inject()
    before = weights(agent.online)
    agent.update()
    moved = changed(before, agent.online)
    assert {name.rpartition(".")[0] for name in moved} == {
        "0.0",
        "1.theta_prime_1.0.0",
        "1.theta_prime_1.0.2",
    }


def without_new_heads(agent):
    """As an optimizer that was made before there were any."""
    trained = [*agent.online[0].parameters(), *agent.online[1].theta.parameters()]
    agent.optimizer = torch.optim.Adam(trained)
    agent.update()
    agent.inject()


def with_a_new_optimizer(agent):
    agent.inject()
    agent.optimizer = torch.optim.Adam(agent.online.parameters())


def without_the_target(agent):
    agent.online[1].inject()


def with_a_flag_that_no_state_has(agent):
    agent.inject()
    agent.online[1].num_injections = 0


def loaded_without_requires_grad(agent):
    agent.inject()
    agent.online.requires_grad_(True)


def thawed_at_the_second_update(agent):
    agent.inject()
    counted = iter(range(1, 3))
    update = type(agent).update

    def update_and_thaw():
        update(agent)
        if next(counted) == 2:
            agent.online.requires_grad_(True)

    agent.update = update_and_thaw


def with_the_difference_last(agent):
    agent.inject()
    head = agent.online[1]
    head.forward = lambda x: head.theta(x) + head.theta_prime_1[0](x) - head.theta_prime_2[0](x)
    agent.target[1].forward = copy.copy(head.forward)


def with_a_detached_twin(agent):
    agent.inject()
    head = agent.online[1]
    head.forward = lambda x: head.theta(x) + (head.theta_prime_1[0](x) - head.theta_prime_2[0](x).detach())


@pytest.mark.parametrize(
    ("inject", "fault"),
    [
        (without_new_heads, "θ′₁ is not in the optimizer, or not all of it"),
        (with_a_new_optimizer, "φ has lost its moments: the optimizer was made anew"),
        (
            without_the_target,
            "the target stays behind: it is no copy of the online network after the injection",
        ),
        (with_a_flag_that_no_state_has, "θ′₁ does not change at an update: it never learns"),
        (loaded_without_requires_grad, "θ changes at an update: it is not frozen"),
        (
            thawed_at_the_second_update,
            "after an update weights are to learn that were frozen: call set_trainable() there",
        ),
        (with_the_difference_last, "Q changes at the injection, by up to ..."),
        (with_a_detached_twin, "φ's gradient is not that of the whole sum, ...: is a head detached?"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_audit_says_of_each_mistake_what_the_page_says_that_it_says(page, inject, fault):
    assert f"`{fault}`" in PAGE
    agent = page["Agent"]()
    for _ in range(3):
        agent.update()
    page["look"].__globals__["agent"] = agent
    faults = faults_of_injection(audit(page["look"], lambda: inject(agent)))
    pattern = re.escape(fault).replace(r"\.\.\.", ".*")
    assert any(re.match(pattern, found) for found in faults), faults


def test_the_pages_audit_finds_nothing_wrong_with_an_injection_that_is_saved_and_loaded(page):
    agent = page["Agent"]()
    agent.update()

    def inject_save_and_load():
        agent.inject()
        network = agent.online.state_dict()
        optimizer = agent.optimizer.state_dict()
        agent.__init__()
        agent.online.load_state_dict(network)
        agent.target.load_state_dict(network)
        agent.optimizer.load_state_dict(optimizer)

    page["look"].__globals__["agent"] = agent
    assert faults_of_injection(audit(page["look"], inject_save_and_load)) == []


def wrapping(changes):
    """What the page's code for an agent that exists already leaves behind, with these {old: new} lines."""
    (code,) = [block for block in blocks("python") if "head.theta = network[1]" in block]
    for old, new in changes.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    names = {}
    exec(blocks("python")[0], names)
    exec(code, names)
    return names


def test_each_parameter_of_a_new_head_is_in_the_group_of_its_counterpart():
    groups = """[
        {"params": [network[0][0].weight, network[1][0].weight, network[1][2].weight]},
        {"params": [network[0][0].bias, network[1][0].bias, network[1][2].bias], "lr": 0.5},
    ]"""
    names = wrapping({"Adam(network.parameters())": f"Adam({groups})"})
    rates = {}
    for group in names["optimizer"].param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["lr"]
    named = dict(names["head"].named_parameters())
    assert len(named) == 3 * 4 and rates.keys() == set(names["network"].parameters())
    for name, parameter in named.items():
        assert rates[parameter] == (0.5 if name.endswith("bias") else 1e-3), name


def test_new_heads_have_the_dtype_of_the_head_before():
    names = wrapping({"make_head())  # with your weights": "make_head().double())"})
    assert {parameter.dtype for parameter in names["head"].parameters()} == {torch.float64}
    features = names["network"][0](OBS).double()
    before = names["head"](features)
    names["head"].inject()
    assert torch.equal(names["head"](features), before) and before.dtype == torch.float64


def test_a_wrapped_agent_is_loaded_by_wrapping_another_in_the_same_way():
    agents = [wrapping({}), wrapping({})]

    def update(agent):
        agent["optimizer"].zero_grad()
        agent["network"](OBS).square().mean().backward()
        agent["optimizer"].step()

    first, second = agents
    update(first)
    first["head"].inject()
    update(first)
    for part in ("network", "optimizer"):
        second[part].load_state_dict(copy.deepcopy(first[part].state_dict()))
    for agent in agents:
        update(agent)
    assert changed(weights(first["network"]), second["network"]) == set()


def test_an_agent_that_exists_already_takes_an_injection_as_the_page_says(page):
    """The page's code ends with a network, an optimizer that has made no update, and a head."""
    network = page["network"]
    head = page["head"]
    optimizer = page["optimizer"]
    target = copy.deepcopy(network)

    def update():
        optimizer.zero_grad()
        network(OBS).square().mean().backward()
        optimizer.step()

    def inject():
        head.inject()
        target.load_state_dict(network.state_dict())

    def formula(obs):
        return sum_of_heads(head, network[0](obs))

    update()
    agent = Audited(network, target, optimizer, parts_at("0", "1"), OBS, formula, update)
    findings = audit(lambda: agent, inject)
    assert faults_of_injection(findings) == [] and findings.parts["θ"].moments == "kept"


def test_an_agent_moves_to_a_network_with_more_room_with_its_moments(page):
    """As the page says; with an optimizer's state alone there is no way."""

    def agent_with_room_for(max_injections):
        agent = page["Agent"]()
        agent.online[1] = InjectableHead(page["make_head"], max_injections)
        agent.optimizer = torch.optim.Adam(agent.online.parameters())
        return agent

    agents = [agent_with_room_for(1), agent_with_room_for(3)]
    old, new = agents
    old.update()
    old.online[1].inject()
    old.update()
    new.online.load_state_dict(old.online.state_dict())
    new.target.load_state_dict(old.target.state_dict())
    with pytest.raises(ValueError, match="size"):
        new.optimizer.load_state_dict(old.optimizer.state_dict())
    load_moments(new.optimizer, new.online, moments_by_name(old.optimizer, old.online))
    for agent in agents:
        agent.update()
    in_use = old.online.state_dict()
    state = new.online.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in in_use.items())


def test_with_images_the_encoder_is_the_librarys_convolutions_and_the_hidden_layer_is_in_the_head(page):
    settings = {"buffer_size": 50, "learning_starts": 8, "batch_size": 4, "device": "cpu", "seed": 1}
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=4, discrete=True, channel_first=True)
    model = DQN(page["ImagePolicy"], env, policy_kwargs=page["policy_kwargs"], **settings).learn(13)
    theirs = DQN("CnnPolicy", env, **settings).q_net
    ours = model.q_net
    layers = [*ours.features_extractor.cnn, *ours.q_net.theta]
    of_theirs = [*theirs.features_extractor.cnn, *theirs.features_extractor.linear, *theirs.q_net]
    assert [str(layer) for layer in layers] == [str(layer) for layer in of_theirs]

    def formula(obs):
        return sum_of_heads(ours.q_net, ours.extract_features(obs, ours.features_extractor))

    def inject():
        ours.q_net.inject()
        model.q_net_target.load_state_dict(ours.state_dict())

    agent = Audited(
        network=ours,
        target=model.q_net_target,
        optimizer=model.policy.optimizer,
        parts=parts_at("features_extractor", "q_net"),
        obs=torch.randint(256, (8, 4, 36, 36), generator=torch.Generator().manual_seed(1)),
        formula=formula,
        update=lambda: model.train(gradient_steps=1, batch_size=4),
    )
    assert faults_of_injection(audit(lambda: agent, inject)) == []


def test_the_audit_takes_a_view_of_an_agent_that_is_no_function_of_obs(page):
    """An actor and a critic on one encoder, each injected and audited by itself."""
    encoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU())
    agent = nn.ModuleDict({"encoder": encoder})
    for name in ("actor", "critic"):
        agent[name] = InjectableHead(page["make_head"])
    copied = copy.deepcopy(agent)
    optimizer = torch.optim.Adam(agent.parameters())

    def update():
        optimizer.zero_grad()
        features = agent["encoder"](OBS)
        (
            agent["actor"](features).square().mean() + (agent["critic"](features) - 1).square().mean()
        ).backward()
        optimizer.step()

    update()
    for name in ("actor", "critic"):
        head = agent[name]

        def inject(head=head):
            head.inject()
            copied.load_state_dict(agent.state_dict())

        def formula(obs, head=head):
            return sum_of_heads(head, agent["encoder"](obs))

        audited = Audited(
            network=nn.Sequential(agent["encoder"], head),
            target=nn.Sequential(copied["encoder"], copied[name]),
            optimizer=optimizer,
            parts=parts_at("0", "1"),
            obs=OBS,
            formula=formula,
            update=update,
        )
        assert faults_of_injection(audit(lambda audited=audited: audited, inject)) == []


def test_a_target_takes_the_new_pair_alone_and_gives_what_it_gave_also_at_a_second_injection(page):
    agent = page["Agent"]()
    for network in (agent.online, agent.target):
        network[1] = InjectableHead(page["make_head"], max_injections=2)
    agent.target.load_state_dict(agent.online.state_dict())
    agent.optimizer = torch.optim.Adam(agent.online.parameters())
    for k in (1, 2):
        agent.update()
        before = agent.target(OBS)
        agent.online[1].inject()
        page["bring_new_pair"](agent.online, agent.target)
        assert torch.equal(agent.target(OBS), before) and agent.target[1].num_injections == k
        assert not torch.equal(agent.online(OBS), before)
        ours, theirs = (network[1].theta_prime_1[k - 1] for network in (agent.online, agent.target))
        assert changed(weights(ours), theirs) == set() and ours[0].weight.any()


def test_what_the_page_links_to_is_there():
    links = re.findall(r"\]\((?!https:)([^)#]+)", BLOCK.sub("", PAGE))
    assert links
    for link in links:
        assert (ROOT / "examples" / link).exists(), link
