"""The learner: Double DQN's update, acting, target syncs, and what an injection does to the optimizer."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import ACTIONS, joined, make_learner, random_batch

from benchmarks.kill_test import differences, flat
from dqn_injection_atari import PRESETS, Args, Learner, QNetwork, Stream, exploration_epsilon, td_loss
from support.optimizers import CenteredRMSProp
from support.randomness import stream_seed


def updates(learner, count, seed=0):
    rng = np.random.default_rng(seed)
    return [learner.update(random_batch(rng)) for _ in range(count)]


def snapshot(learner):
    return {name: parameter.detach().clone() for name, parameter in learner.q_network.named_parameters()}


def changed(learner, before):
    return {
        name
        for name, parameter in learner.q_network.named_parameters()
        if not torch.equal(parameter, before[name])
    }


def names(learner, *prefixes):
    return {name for name, _ in learner.q_network.named_parameters() if name.startswith(prefixes)}


def moments(learner, module):
    """Copies of the optimizer's state, a dictionary for each of the module's parameters."""
    return [copy.deepcopy(learner.optimizer.state[parameter]) for parameter in module.parameters()]


class Table(torch.nn.Module):
    """Q-values looked up by the observation's first pixel."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, obs):
        return self.values[obs[:, 0, 0, 0].long()]


def test_td_loss_is_double_dqns_huber_loss_written_out_in_numpy():
    rng = np.random.default_rng(0)
    online, target = rng.normal(size=(2, 256, ACTIONS)) * 2
    batch = random_batch(rng, 64)
    network = Table(online)
    loss, q_mean = td_loss(network, Table(target), batch, gamma=0.9)
    loss.backward()

    terms = []
    gradient = np.zeros_like(online)
    taken = []
    for i in range(64):
        s = int(batch.observations[i, 0, 0, 0])
        s_next = int(batch.next_observations[i, 0, 0, 0])
        action = batch.actions[i].item()
        reward = batch.rewards[i].item()
        done = batch.dones[i].item()
        bootstrap = target[s_next][np.argmax(online[s_next])]
        error = online[s][action] - (reward + 0.9 * (1 - done) * bootstrap)
        terms.append(0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5)
        gradient[s, action] += np.clip(error, -1, 1) / 64
        taken.append(online[s][action])
    assert np.isclose(loss.item(), np.mean(terms))
    assert np.isclose(q_mean.item(), np.mean(taken))
    assert np.allclose(network.values.grad.numpy(), gradient)
    assert max(terms) > 0.5 > min(terms), "both branches of the Huber loss were taken"


@pytest.mark.parametrize("gamma", [0.99, 0.5])
def test_an_update_is_one_adam_step_on_that_loss(gamma):
    learner = make_learner(gamma=gamma)
    reference = make_learner()
    batch = random_batch(0)
    loss, _ = td_loss(reference.q_network, reference.target_network, batch, gamma)
    parameters = [p for p in reference.q_network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    losses = learner.update(batch)
    assert losses["td_loss"].item() == loss.item()
    trained = [p for p in learner.q_network.parameters() if p.requires_grad]
    for before, gradient, after in zip(parameters, gradients, trained, strict=True):
        # bias-corrected first Adam step: m̂ = g, v̂ = g²
        expected = before - 1e-3 * gradient / (gradient.abs() + 1.5e-4)
        assert torch.allclose(after, expected, atol=1e-6)


@pytest.mark.parametrize("injections", [1, 2])
def test_updates_after_an_injection_move_only_the_encoder_and_the_newest_head(injections):
    learner = make_learner()
    for k in range(injections):
        updates(learner, 5, seed=k)  # momentum for the heads that are about to be frozen
        learner.inject()
    before = snapshot(learner)
    updates(learner, 15, seed=9)
    assert changed(learner, before) == names(learner, "encoder", f"head.theta_prime_1.{injections - 1}")


def test_before_the_injection_only_the_encoder_and_theta_move():
    learner = make_learner()
    before = snapshot(learner)
    updates(learner, 5)
    assert changed(learner, before) == names(learner, "encoder", "head.theta.")


def test_without_freezing_all_live_heads_move():
    learner = make_learner(freeze_heads=False)
    updates(learner, 5)
    learner.inject()
    before = snapshot(learner)
    updates(learner, 5)
    first_pair = ("head.theta_prime_1.0", "head.theta_prime_2.0")
    assert changed(learner, before) == names(learner, "encoder", "head.theta.", *first_pair)
    learner.inject()
    before = snapshot(learner)
    updates(learner, 5)
    assert changed(learner, before) == names(learner, "")


def test_injection_leaves_every_optimizer_moment_alone_and_starts_the_new_head_without_any():
    learner = make_learner()
    updates(learner, 5)
    had_learned = torch.nn.ModuleList([learner.q_network.encoder, learner.q_network.head.theta])
    kept = moments(learner, had_learned)
    learner.inject()
    for before, after in zip(kept, moments(learner, had_learned), strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert after["step"].item() == 5 and after["exp_avg"].abs().max() > 0
    new_head = list(learner.q_network.head.theta_prime_1[0].parameters())
    assert all(not learner.optimizer.state.get(parameter) for parameter in new_head)
    updates(learner, 3)
    assert all(learner.optimizer.state[parameter]["step"].item() == 3 for parameter in new_head)


def test_injection_leaves_q_bitwise_unchanged_and_mirrors_it_in_the_target():
    learner = make_learner()
    obs = random_batch(np.random.default_rng(5), 32).observations
    for k in range(2):
        updates(learner, 10, seed=k)
        before = learner.q_network(obs)
        assert not torch.equal(learner.target_network(obs), before)
        learner.inject()
        assert torch.equal(learner.q_network(obs), before)
        assert torch.equal(learner.target_network(obs), before)
        online = learner.q_network.state_dict()
        target = learner.target_network.state_dict()
        assert online.keys() == target.keys() and all(torch.equal(online[key], target[key]) for key in online)
        assert learner.target_network.num_injections == k + 1
    frozen = {name: p.clone() for name, p in learner.target_network.named_parameters()}
    updates(learner, 5)
    assert all(torch.equal(p, frozen[name]) for name, p in learner.target_network.named_parameters())
    assert not any(p.requires_grad for p in learner.target_network.parameters())


def test_the_kth_head_depends_on_seed_and_k_alone():
    def fresh_heads(seed, updates_before):
        learner = make_learner(seed=seed)
        for _ in range(2):
            updates(learner, updates_before)
            learner.act(np.zeros((3, 4, 84, 84), np.uint8), 0.5)
            torch.rand(updates_before + 1)
            learner.inject()
        return [head.hidden.weight.clone() for head in learner.q_network.head.theta_prime_2]

    first = fresh_heads(1, 0)
    same = fresh_heads(1, 4)
    other = fresh_heads(2, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("injections", [0, 1])
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_a_sync_moves_the_target_by_tau(tau, injections):
    learner = make_learner(tau=tau)
    if injections:
        learner.inject()
    old = [p.clone() for p in learner.target_network.parameters()]
    updates(learner, 5)
    learner.sync_target()
    online = list(learner.q_network.parameters())
    for before, now, p in zip(old, learner.target_network.parameters(), online, strict=True):
        assert torch.allclose(now, tau * p + (1 - tau) * before, atol=1e-7)
    if tau == 1:
        for p, now in zip(online, learner.target_network.parameters(), strict=True):
            assert torch.equal(now, p)


def test_acting_is_greedy_at_epsilon_0_uniform_at_1_and_mixed_between():
    learner = make_learner()
    obs = np.random.default_rng(0).integers(0, 256, (150, 4, 84, 84), np.uint8)
    greedy = learner.q_network(torch.from_numpy(obs)).argmax(1).numpy()
    assert np.array_equal(learner.act(obs, 0.0), greedy)
    actions = np.concatenate([learner.act(obs, 1.0) for _ in range(10)])
    assert actions.dtype == np.int64 and actions.shape == (1500,)
    assert np.abs(np.bincount(actions, minlength=ACTIONS) / 1500 - 1 / ACTIONS).max() < 0.04
    # a random action is the greedy one in a sixth of the cases
    mixed = np.array([learner.act(obs, 0.3) for _ in range(10)])
    assert abs((mixed == greedy).mean() - (0.7 + 0.3 / ACTIONS)) < 0.04


def test_acting_takes_the_same_random_numbers_whatever_it_decides():
    obs = np.zeros((4, 4, 84, 84), np.uint8)
    learners = [make_learner() for _ in range(3)]
    for learner, epsilon in zip(learners, (0.0, 0.5, 1.0), strict=True):
        learner.act(obs, epsilon)
    assert len({str(learner.rng.bit_generator.state) for learner in learners}) == 1


def test_a_seed_fixes_the_networks_and_the_number_of_planned_injections_does_not_move_them():
    one = make_learner(seed=1)
    same = make_learner(seed=1, injection_step=(5,))
    other = make_learner(seed=2)
    weights = [learner.q_network.head.theta.hidden.weight for learner in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(one.q_network.head.theta.hidden.weight, one.target_network.head.theta.hidden.weight)


def test_the_first_weights_have_the_bits_of_the_seeds_stream_for_networks():
    torch.manual_seed(stream_seed(3, Stream.NETWORK))
    drawn = QNetwork(ACTIONS, max_injections=2, head_width=64)
    learner = make_learner(seed=3)
    for name, parameter in drawn.named_parameters():
        assert torch.equal(learner.q_network.get_parameter(name), parameter), name


def test_epsilon_falls_linearly_from_its_start_on_and_stays():
    args = Args(total_timesteps=1000, start_e=1.0, end_e=0.1, exploration_fraction=0.5)
    assert exploration_epsilon(args, 0) == 1.0, "by default from the first step"
    assert exploration_epsilon(args, 250) == pytest.approx(0.55)
    assert exploration_epsilon(args, 500) == exploration_epsilon(args, 999) == pytest.approx(0.1)
    assert exploration_epsilon(Args(exploration_fraction=0.0), 0) == pytest.approx(0.01)
    at_once = Args(exploration_fraction=0.0, exploration_start=10)
    assert [exploration_epsilon(at_once, step) for step in (9, 10)] == pytest.approx([1.0, 0.01])
    steps = {0: 1.0, 50_000: 1.0, 550_000: 0.505, 1_050_000: 0.01, 50_000_000: 0.01}
    paper = Args(**PRESETS["paper"])
    assert {step: exploration_epsilon(paper, step) for step in steps} == pytest.approx(steps)


@pytest.mark.parametrize(("args", "optimizer"), [({}, torch.optim.Adam), (PRESETS["paper"], CenteredRMSProp)])
def test_the_optimizer_is_the_one_that_was_asked_for_and_holds_all_heads(args, optimizer):
    learner = Learner(Args(**args), ACTIONS, "cpu")
    assert type(learner.optimizer) is optimizer
    (group,) = learner.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in learner.q_network.parameters()]
    assert (group["lr"], group["eps"]) == ((2.5e-4, 0.01 / 32**2) if args else (1e-4, 1.5e-4))
    if optimizer is torch.optim.Adam:
        assert group["betas"] == (0.9, 0.999)
    else:
        assert group["decay"] == 0.95
    assert len(learner.q_network.head.theta.output.bias) == (1 if args else ACTIONS)


@pytest.mark.parametrize("injections", [0, 1, 2])
@pytest.mark.parametrize("freeze_heads", [True, False])
def test_a_learner_comes_back_from_its_state_and_goes_on_the_same(injections, freeze_heads):
    first, second = (make_learner(freeze_heads=freeze_heads, seed=seed) for seed in (1, 9))
    updates(first, 1)
    updates(second, 1, seed=3)
    for k in range(injections):
        first.inject(step=7 * k)
        updates(first, 2)
    first.act(np.zeros((3, 4, 84, 84), np.uint8), 0.5)
    second.load_state_dict(first.state_dict())
    assert differences(flat(first.state_dict()), flat(second.state_dict())) == []
    assert second.norms.growth(second.growing()) == first.norms.growth(first.growing())
    assert len(second.interventions) == injections
    for one, other in zip(updates(first, 3, seed=5), updates(second, 3, seed=5), strict=True):
        assert float(one["td_loss"]) == float(other["td_loss"])
    assert differences(flat(first.state_dict()), flat(second.state_dict())) == []
    for learner in (first, second):
        learner.sync_target()
    assert differences(flat(first.state_dict()), flat(second.state_dict())) == []
    for name, parameter in second.q_network.named_parameters():
        assert parameter.requires_grad == first.q_network.get_parameter(name).requires_grad, name
    assert not any(parameter.requires_grad for parameter in second.target_network.parameters())
    assert np.array_equal(first.rng.random(4), second.rng.random(4))


@pytest.mark.parametrize("planned", [(10,), (10, 20, 30)])
def test_a_learner_takes_up_a_state_with_another_number_of_heads_to_come(planned):
    first = make_learner()
    second = make_learner(injection_step=planned)
    updates(first, 2)
    updates(second, 1, seed=3)
    second.load_state_dict(first.state_dict())
    for learner in (first, second):
        learner.inject()
        updates(learner, 2)
    ours = flat(first.state_dict())
    theirs = flat(second.state_dict())
    shared = set(ours) & set(theirs)
    assert differences({n: ours[n] for n in shared}, {n: theirs[n] for n in shared}) == []
    assert all(re.search(r"theta_prime_[12]\.[12]\.", name) for name in set(ours) ^ set(theirs))


@pytest.mark.parametrize(
    "changes",
    [
        {"injection_step": ()},
        {"intervention": "none"},
        {"intervention": "reset-head"},
        {"intervention": "none", "optimizer": "rmsprop", "shared_bias": True},
        {"intervention": "none", "bf16": True},
    ],
    ids=str,
)
def test_a_learner_without_room_for_heads_learns_as_one_that_has_it_and_leads_to_it_and_back(changes):
    same = {name: value for name, value in changes.items() if name in ("optimizer", "shared_bias", "bf16")}
    bare = make_learner(**changes)
    roomy = make_learner(**same)
    assert not [name for name, _ in bare.q_network.named_parameters() if "prime" in name]
    for learner in (bare, roomy):
        updates(learner, 2)
    injecting = make_learner(**same)
    back = make_learner(**changes)
    injecting.load_state_dict(bare.state_dict())
    back.load_state_dict(roomy.state_dict())
    assert differences(flat(injecting.state_dict()), flat(roomy.state_dict())) == []
    assert differences(flat(back.state_dict()), flat(bare.state_dict())) == []
    for learner in (injecting, roomy):
        learner.inject()
        updates(learner, 2)
    assert differences(flat(injecting.state_dict()), flat(roomy.state_dict())) == []
    with pytest.raises(RuntimeError, match=r"^head\.theta_prime_1\.0 is in use, and there are 0 pairs"):
        bare.load_state_dict(roomy.state_dict())


def test_a_state_that_lacks_a_head_in_use_is_refused():
    learner = make_learner()
    learner.inject()
    state = learner.q_network.state_dict()
    del state["head.theta_prime_1.0.hidden.weight"]
    with pytest.raises(RuntimeError, match=r"head\.theta_prime_1\.0\.hidden\.weight"):
        make_learner().q_network.load_state_dict(state)


@pytest.mark.parametrize("bf16", [False, True])
def test_several_updates_in_one_call_are_as_many_updates(bf16):
    one_by_one, at_once = (make_learner(bf16=bf16) for _ in range(2))
    rng = np.random.default_rng(0)
    batches = [random_batch(rng) for _ in range(3)]
    losses = [one_by_one.update(batch) for batch in batches]
    last = at_once.update(joined(batches), 3)
    assert differences(flat(one_by_one.state_dict()), flat(at_once.state_dict())) == []
    assert last.keys() == losses[-1].keys() and all(
        torch.equal(last[name], losses[-1][name]) for name in last
    )
    sum_of_losses = sum(float(loss["td_loss"]) for loss in losses)
    sum_of_q_values = sum(float(loss["q_values"]) for loss in losses)
    assert at_once.losses.sums.tolist() == pytest.approx([sum_of_losses, sum_of_q_values])
    assert at_once.losses.counts.tolist() == [3, 3]
