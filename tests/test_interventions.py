"""What is done against lost plasticity, when, and to which tensors; and the paper's settings around it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ACTIONS, BRIEF, TINY_GAMES, make_learner, random_batch, scalars

import dqn_injection_atari as script
from dqn_injection_atari import PRESETS, Args, CenteredRMSProp, Learner, QNetwork, evaluate, exploration_epsilon, train

SMALL = replace(BRIEF, plasticity_frequency=0)


def trained(count=3, **args):
    learner = make_learner(**args)
    for k in range(count):
        learner.update(random_batch(k))
    return learner


def parameters(learner):
    return {name: parameter.detach().clone() for name, parameter in learner.q_network.named_parameters()}


def moments(learner):
    """{parameter: {moment: tensor}} of those that have any."""
    names = {parameter: name for name, parameter in learner.q_network.named_parameters()}
    return {
        names[parameter]: {name: value.clone() for name, value in of_one.items()}
        for parameter, of_one in learner.optimizer.state.items()
        if of_one
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names(network, module):
    return {f"{module}.{name}" for name, _ in network.get_submodule(module).named_parameters()}


# the optimizer at an injection


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("choice", ["keep", "copy", "reset"])
def test_the_moments_that_survive_an_injection_are_those_the_flag_says(choice, optimizer):
    learner = trained(injection_optimizer_state=choice, optimizer=optimizer)
    before = moments(learner)
    learner.inject()
    after, network = moments(learner), learner.q_network
    encoder, theta, new = (names(network, module) for module in ("encoder", "theta", "theta_prime_1.0"))
    assert set(before) == encoder | theta
    assert set(after) == {"keep": encoder | theta, "copy": encoder | theta | new, "reset": encoder}[choice]
    assert all(same(after[name], before[name]) for name in after if name in before)
    if choice == "copy":
        for name in new:
            assert same(after[name], before[name.replace("theta_prime_1.0", "theta")])
        learner.update(random_batch(9))
        assert same(moments(learner)["theta.0.weight"], before["theta.0.weight"]), "a copy of its own"


def test_at_a_second_injection_the_moments_copied_are_those_of_the_head_that_learned():
    learner = trained(injection_optimizer_state="copy")
    learner.inject()
    learner.update(random_batch(9))
    learner.inject()
    after = moments(learner)
    assert same(after["theta_prime_1.1.0.weight"], after["theta_prime_1.0.0.weight"])
    assert not same(after["theta_prime_1.1.0.weight"], after["theta.0.weight"])


def test_copied_moments_move_the_new_head_where_none_would_not():
    steps = {}
    for choice in ("keep", "copy"):
        learner = trained(injection_optimizer_state=choice)
        learner.inject()
        before = parameters(learner)["theta_prime_1.0.0.weight"]
        learner.update(random_batch(9))
        steps[choice] = parameters(learner)["theta_prime_1.0.0.weight"] - before
    assert not torch.allclose(steps["keep"], steps["copy"], atol=1e-5)


# resets


def test_resetting_the_head_draws_its_two_layers_anew_and_nothing_else():
    learner = trained(intervention="reset-head")
    before, moments_before = parameters(learner), moments(learner)
    learner.intervene()
    after, network = parameters(learner), learner.q_network
    assert {name for name in after if not torch.equal(after[name], before[name])} == names(network, "theta")
    for layer, fan_in in ((0, 3136), (2, 512)):
        weight = after[f"theta.{layer}.weight"]
        assert weight.abs().max() <= fan_in**-0.5 and weight.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
    assert set(moments(learner)) == names(network, "encoder")
    assert all(same(moments(learner)[name], moments_before[name]) for name in names(network, "encoder"))
    assert network.num_injections == 0 and all(parameter.requires_grad for parameter in network.theta.parameters())


def test_shrink_and_perturb_mixes_the_encoder_with_a_new_one_and_resets_the_head():
    learner = trained(intervention="shrink-perturb", shrink_factor=0.7)
    before, moments_before = parameters(learner), moments(learner)
    learner.intervene()
    after, network = parameters(learner), learner.q_network
    for name in names(network, "encoder"):
        fan_in = after[name.replace("bias", "weight")][0].numel()
        new = (after[name] - 0.7 * before[name]) / 0.3
        assert new.abs().max() <= fan_in**-0.5 * (1 + 1e-4) and not torch.equal(after[name], before[name])
        if "weight" in name:
            assert new.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
    assert all(not torch.equal(after[name], before[name]) for name in names(network, "theta"))
    assert set(moments(learner)) == names(network, "encoder")
    assert all(same(moments(learner)[name], moments_before[name]) for name in names(network, "encoder"))


def test_shrinking_by_nothing_leaves_the_encoder_as_it_is():
    learner = trained(intervention="shrink-perturb", shrink_factor=1.0)
    before = parameters(learner)
    learner.intervene()
    assert all(torch.equal(parameters(learner)[name], before[name]) for name in names(learner.q_network, "encoder"))


@pytest.mark.parametrize("intervention", ["injection", "reset-head", "shrink-perturb"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_target_mirrors_whatever_was_done_and_learning_goes_on(intervention, bf16):
    learner = trained(intervention=intervention, bf16=bf16)
    learner.intervene()
    assert same(learner.target_network.state_dict(), learner.q_network.state_dict())
    assert not any(parameter.requires_grad for parameter in learner.target_network.parameters())
    obs = random_batch(1).observations
    with torch.no_grad():
        assert torch.equal(learner.online(obs), learner.target(obs)), "the working copies, too"
    before, head = parameters(learner), learner.q_network.newest_head()
    learner.update(random_batch(5))
    moved = {name for name, value in parameters(learner).items() if not torch.equal(value, before[name])}
    assert moved == names(learner.q_network, "encoder") | names(learner.q_network, head)


@pytest.mark.parametrize("intervention", ["injection", "reset-head", "shrink-perturb"])
def test_what_is_drawn_depends_on_seed_and_count_alone(intervention):
    def drawn(updates, seed, times):
        learner = trained(updates, intervention=intervention, seed=seed)
        for _ in range(times):
            torch.rand(updates + 1)  # the global generator is not asked
            learner.intervene()
        return parameters(learner)[f"{learner.q_network.newest_head()}.0.weight"]

    assert torch.equal(drawn(1, 1, 1), drawn(3, 1, 1))
    assert not torch.equal(drawn(1, 1, 1), drawn(1, 2, 1)) and not torch.equal(drawn(1, 1, 1), drawn(1, 1, 2))


@pytest.mark.parametrize("intervention", ["reset-head", "shrink-perturb", "injection", "none"])
def test_a_run_does_at_its_step_what_was_asked_for_and_says_so(intervention, capsys, monkeypatch):
    seen = []
    original = script.intervene
    monkeypatch.setattr(script, "intervene", lambda run: (seen.append(parameters(run.learner)), original(run)))
    folder = train(replace(SMALL, intervention=intervention, injection_step=(202, 270)))
    curves, out = scalars(folder), capsys.readouterr().out
    if intervention == "none":
        assert not seen and "injection/step" not in curves and "baseline arm" in out
        return
    assert curves["injection/step"] == [(202, 202), (270, 270)]
    deltas = [value for _, value in curves["injection/max_abs_delta_q"]]
    assert deltas == [0, 0] if intervention == "injection" else min(deltas) > 0
    said = {"injection": "plasticity injected", "reset-head": "head drawn anew", "shrink-perturb": "shrunk and perturbed"}
    assert said[intervention] in out and "baseline arm" not in out


def test_arms_with_one_seed_are_bitwise_equal_up_to_the_intervention(monkeypatch):
    states = {}
    for intervention in ("injection", "reset-head", "shrink-perturb"):

        def noted(run, name=intervention):
            states[name] = parameters(run.learner)

        monkeypatch.setattr(script, "intervene", noted)
        train(replace(SMALL, intervention=intervention, injection_step=(202,)))
    assert same(states["injection"], states["reset-head"]) and same(states["injection"], states["shrink-perturb"])


# when the norm has grown


def test_growth_is_the_norm_of_encoder_and_head_over_what_it_was_when_the_head_began():
    learner = make_learner()
    assert learner.norm_growth() == 1
    learned = [*learner.q_network.encoder.parameters(), *learner.q_network.theta.parameters()]
    expected = math.sqrt(sum(parameter.detach().double().square().sum().item() for parameter in learned))
    assert learner.learning_norm() == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        for parameter in learned:
            parameter.mul_(2)
    assert learner.norm_growth() == pytest.approx(2, rel=1e-6)
    learner.inject()
    assert learner.norm_growth() == 1, "the new head begins"
    with torch.no_grad():
        for parameter in learner.q_network.theta.parameters():
            parameter.mul_(5)
    assert learner.norm_growth() == 1, "a frozen head does not count"


NORM = replace(
    SMALL,
    injection_trigger="norm",
    injection_norm_ratio=1.0001,
    injection_check_frequency=30,
    max_injections=2,
    learning_rate=3e-4,
)


def test_an_injection_is_made_at_the_first_check_at_which_the_norm_has_grown_enough():
    folder = train(NORM)
    curves = scalars(folder)
    growth = dict(curves["injection/norm_growth"])
    assert list(growth) == list(range(30, 361, 30)) and growth[90] == 1, "checked at every multiple"
    due = [step for step, value in growth.items() if value > 1.0001][:2]
    assert [step for step, _ in curves["injection/step"]] == due and len(due) == 2
    assert {value for _, value in curves["injection/max_abs_delta_q"]} == {0}
    kept = {int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")}
    assert kept == {*due, 360}, "from which a baseline can be forked"


@pytest.mark.parametrize(
    "changes", [{"injection_norm_ratio": 3.0}, {"apply_injection": False}, {"intervention": "none"}], ids=str
)
def test_no_injection_is_made_below_the_ratio_or_in_a_baseline(changes):
    assert "injection/step" not in scalars(train(replace(NORM, **changes)))


def test_the_norm_triggers_no_more_than_max_injections():
    assert len(scalars(train(replace(NORM, max_injections=1)))["injection/step"]) == 1


def test_the_norm_is_looked_at_within_a_vector_step_too():
    curve = scalars(train(replace(NORM, num_envs=7)))["injection/norm_growth"]
    assert [step for step, _ in curve] == list(range(30, 361, 30))


def test_the_norm_triggers_nothing_at_the_end_of_a_run():
    args = replace(NORM, injection_check_frequency=360, intervention="reset-head")
    curves = scalars(train(args))
    assert curves["injection/norm_growth"][-1][1] > args.injection_norm_ratio and "injection/step" not in curves


def test_the_norm_may_trigger_any_intervention():
    folder = train(replace(NORM, intervention="reset-head"))
    assert scalars(folder)["injection/max_abs_delta_q"][0][1] > 0


# the paper's settings


def test_centered_rmsprop_is_the_formula_written_out_in_numpy():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape) for shape in ((5, 3), (4,), (2, 2))]
    tensors = [torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in values]
    optimizer = CenteredRMSProp(tensors, lr=2.5e-4)
    means, squares = ([np.zeros_like(value) for value in values] for _ in range(2))
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
    own, torchs = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizers = CenteredRMSProp([own], lr=1.0), torch.optim.RMSprop([torchs], 1.0, 0.95, 0.01 / 32**2, centered=True)
    for parameter, optimizer in zip((own, torchs), optimizers, strict=True):
        parameter.grad = torch.full((1,), 1e-5)
        optimizer.step()
    assert torchs.item() / own.item() > 100


def test_the_optimizer_is_the_one_that_was_asked_for():
    adam, rmsprop = (make_learner(optimizer=name).optimizer for name in ("adam", "rmsprop"))
    assert type(adam) is torch.optim.Adam and type(rmsprop) is CenteredRMSProp and rmsprop.defaults["lr"] == 1e-3


def test_a_shared_bias_adds_one_number_to_every_action():
    plain, shared = QNetwork(ACTIONS), QNetwork(ACTIONS, shared_bias=True)
    assert shared.theta[2].bias.shape == (1,) and plain.theta[2].bias.shape == (ACTIONS,)
    obs = random_batch().observations
    with torch.no_grad():
        before = shared(obs)
        shared.theta[2].bias += 1
        assert torch.allclose(shared(obs), before + 1, atol=1e-6)


def test_an_injection_with_a_shared_bias_changes_nothing_and_learns():
    learner = trained(shared_bias=True)
    obs = random_batch().observations
    with torch.no_grad():
        before = learner.q_network(obs)
        learner.inject()
        assert torch.equal(learner.q_network(obs), before)
    bias = learner.q_network.theta_prime_1[0][2].bias.item()
    learner.update(random_batch(7))
    assert learner.q_network.theta_prime_1[0][2].bias.item() != bias


def test_epsilon_falls_from_its_start_on():
    args = Args(**PRESETS["paper"])
    steps = {0: 1.0, 50_000: 1.0, 550_000: 0.505, 1_050_000: 0.01, 50_000_000: 0.01}
    assert {step: exploration_epsilon(args, step) for step in steps} == pytest.approx(steps)
    assert exploration_epsilon(Args(), 40_000) < 1, "by default from the first step"
    at_once = Args(exploration_fraction=0.0, exploration_start=10)
    assert [exploration_epsilon(at_once, step) for step in (9, 10)] == pytest.approx([1.0, 0.01])


@pytest.mark.parametrize(("steps", "games"), [(100, 3), (5, 1)])
def test_an_evaluation_of_so_many_steps_counts_the_games_that_ended_in_them(steps, games):
    args = Args(env_id=TINY_GAMES, env_backend="ale", eval_episodes=0, eval_steps=steps, eval_epsilon=1.0)
    assert evaluate(QNetwork(8), args, 0).shape == (games,)  # games of 30 steps


def test_an_evaluation_by_steps_is_logged_as_the_mean_of_its_games(monkeypatch):
    scores = []
    monkeypatch.setattr(script, "evaluate", lambda *args: scores.append(evaluate(*args)) or scores[-1])
    folder = train(replace(SMALL, eval_frequency=200, eval_episodes=0, eval_steps=70, eval_epsilon=1.0))
    assert len(scores[0]) == 2 and scalars(folder)["eval/episodic_return"] == [(200, pytest.approx(scores[0].mean()))]


def test_a_short_run_in_the_papers_settings_trains_injects_and_evaluates():
    small = {name: getattr(SMALL, name) for name in ("env_id", "env_backend", "num_envs", "total_timesteps", "buffer_size")}
    sizes = {
        "learning_starts": 100,
        "exploration_start": 100,
        "injection_step": (202,),
        "eval_frequency": 200,
        "eval_steps": 40,
    }
    folder = train(Args(**PRESETS["paper"] | small | sizes | {"checkpoint_frequency": 0}))
    curves = scalars(folder)
    assert curves["injection/max_abs_delta_q"] == [(202, 0.0)] and len(curves["eval/episodic_return"]) == 1


@pytest.mark.parametrize(
    "changes", [{"shared_bias": True, "optimizer": "rmsprop"}, {"intervention": "reset-head"}, {}], ids=str
)
def test_a_saved_agent_of_any_kind_plays_as_it_did(changes):
    args = NORM if not changes else replace(SMALL, injection_step=(202,), **changes)
    folder = train(replace(args, save_model=True))
    network, _, step = script.load_agent(folder / "agent.pt", "cpu")
    saved = script.load_checkpoint(folder / "checkpoint-360").state["learner"]["q_network"]
    assert step == 360 and all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    scores = script.evaluate_saved(Args(evaluate=str(folder), eval_episodes=0, eval_steps=70, eval_epsilon=1.0))
    assert len(scores) == 2


def test_the_learner_of_the_paper_has_its_optimizer_and_bias():
    learner = Learner(Args(**PRESETS["paper"]), ACTIONS, "cpu")
    assert type(learner.optimizer) is CenteredRMSProp and learner.optimizer.defaults["lr"] == 2.5e-4
    assert learner.optimizer.defaults["eps"] == 0.01 / 32**2 and len(learner.q_network.theta[2].bias) == 1
