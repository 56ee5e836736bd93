"""What is done against lost plasticity, when, and to which tensors; and the paper's settings around it."""

import contextlib
import copy
import io
import math
import re
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ACTIONS, BRIEF, make_learner, random_batch, scalars, trained

from alternatives import ALTERNATIVES
from dqn_injection_atari import PRESETS, Args, Learner, Stream, Training, plasticity_measures, train
from support.environments import LearnerView
from support.optimizers import moments_by_name
from support.replay import FrameReplayBuffer
from support.runs import Run

# 20 updates before the injection and as many after it
SMALL = replace(BRIEF, total_timesteps=240, learning_starts=60, checkpoint_frequency=0, injection_step=(141,))
PAPER = PRESETS["paper"] | {
    "total_timesteps": 240,
    "buffer_size": 250,
    "learning_starts": 60,
    "exploration_start": 60,
}
PAPER |= {"injection_step": (142,), "checkpoint_frequency": 0, "eval_frequency": 200, "eval_steps": 40}
PAPER |= {"batch_size": Args.batch_size, "head_width": Args.head_width}


def parameters(learner):
    return {name: parameter.detach().clone() for name, parameter in learner.q_network.named_parameters()}


def moments(learner):
    """{parameter: {moment: tensor}} of those that have any, as copies."""
    return copy.deepcopy(moments_by_name(learner.optimizer, learner.q_network))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names(network, module):
    return {f"{module}.{name}" for name, _ in network.get_submodule(module).named_parameters()}


# the optimizer at an injection


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("choice", ["fresh", "keep"])
@pytest.mark.parametrize("freeze_heads", [True, False])
def test_an_injection_leaves_all_moments_and_gives_the_new_head_those_that_the_flag_says(
    choice, optimizer, freeze_heads
):
    learner = trained(moments=choice, optimizer=optimizer, freeze_heads=freeze_heads)
    before = moments(learner)
    learner.inject()
    after = moments(learner)
    encoder = names(learner.q_network, "encoder")
    theta = names(learner.q_network, "head.theta")
    new = names(learner.q_network, "head.theta_prime_1.0")
    assert set(before) == encoder | theta
    assert all(same(after[name], before[name]) for name in before)
    if choice == "fresh":
        assert set(after) == encoder | theta
    else:
        assert set(after) == encoder | theta | new
        for name in new:
            assert same(after[name], before[name.replace("theta_prime_1.0", "theta")])
    learner.update(random_batch(9))
    after_update = moments(learner)
    if optimizer == "adam":
        assert {after_update[name]["step"].item() for name in encoder} == {4}
        assert {after_update[name]["step"].item() for name in theta} == {3 if freeze_heads else 4}
        assert {after_update[name]["step"].item() for name in new} == {1 if choice == "fresh" else 4}
    kept = same(after_update["head.theta.hidden.weight"], before["head.theta.hidden.weight"])
    assert kept == freeze_heads, "the new head's copy is its own, and frozen heads rest"


def test_at_a_second_injection_the_moments_copied_are_those_of_the_head_that_learned():
    learner = trained(moments="keep")
    learner.inject()
    learner.update(random_batch(9))
    learner.inject()
    after = moments(learner)
    assert same(after["head.theta_prime_1.1.hidden.weight"], after["head.theta_prime_1.0.hidden.weight"])
    assert not same(after["head.theta_prime_1.1.hidden.weight"], after["head.theta.hidden.weight"])


def test_copied_moments_move_the_new_head_where_none_would_not():
    steps = {}
    for choice in ("fresh", "keep"):
        learner = trained(moments=choice)
        learner.inject()
        before = parameters(learner)["head.theta_prime_1.0.hidden.weight"]
        learner.update(random_batch(9))
        steps[choice] = parameters(learner)["head.theta_prime_1.0.hidden.weight"] - before
    assert not torch.allclose(steps["fresh"], steps["keep"], atol=1e-5)


# whatever the intervention

ONCE = ["injection", *(name for name, alternative in ALTERNATIVES.items() if alternative.period is None)]
DRAWING = ["injection", *(name for name, alternative in ALTERNATIVES.items() if alternative.draws_head)]


@pytest.mark.parametrize("intervention", ONCE)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_target_mirrors_whatever_was_done_and_learning_goes_on(intervention, bf16):
    learner = trained(intervention=intervention, bf16=bf16, tau=0.5)  # which counts for syncs alone
    learner.intervene(step=10)
    assert learner.interventions == [10]
    assert same(learner.target_network.state_dict(), learner.q_network.state_dict())
    assert not any(parameter.requires_grad for parameter in learner.target_network.parameters())
    obs = random_batch(1).observations
    with torch.no_grad():
        assert torch.equal(learner.online(obs), learner.target(obs)), "the working copies, too"
    before = parameters(learner)
    learner.update(random_batch(5))
    moved = {name for name, value in parameters(learner).items() if not torch.equal(value, before[name])}
    newest_head = learner.q_network.newest_head()
    assert moved == names(learner.q_network, "encoder") | names(learner.q_network, newest_head)


def in_a_run(intervention, **settings):
    """A run without games, whose replay holds noise; its learner has learned."""
    learner = trained(intervention=intervention, **settings)
    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(ACTIONS)
    replay = FrameReplayBuffer(
        100, observation_space, action_space, "cpu", generator=np.random.default_rng(0)
    )
    rng = np.random.default_rng(1)
    for _ in range(100):
        frames = rng.integers(0, 256, (1, 5, 84, 84), dtype=np.uint8)
        action = rng.integers(ACTIONS, size=1)
        replay.add(frames[:, :-1], frames[:, 1:], action, np.zeros(1), np.zeros(1, bool), [{}])
    log = SimpleNamespace(scalar=lambda *_: None, say=lambda _: None)
    run = SimpleNamespace(step=10, log=log)
    return Training(learner.args, cast(Run, run), cast(LearnerView, None), learner, replay)


@pytest.mark.parametrize(
    ("intervention", "settings"),
    [*((name, {}) for name in ONCE), ("reset-moments", {"reset_moments_of": "all"}), ("redo", {})],
)
def test_replay_exploration_losses_and_the_optimizers_settings_stay_whatever_is_done(intervention, settings):
    training = in_a_run(intervention, injection_step=(10,), **settings)
    learner = training.learner
    learner.act(random_batch().observations.numpy(), epsilon=0.5)
    training.replay.sample(4)

    def untouched():
        groups = []
        for group in learner.optimizer.param_groups:
            groups.append({name: value for name, value in group.items() if name != "params"})
        return copy.deepcopy(
            {
                "optimizer": groups,
                "exploration": learner.rng.bit_generator.state,
                "losses": {name: value.tolist() for name, value in learner.losses.state_dict().items()},
                "transitions": training.replay.size(),
                "replay": training.replay.generator.bit_generator.state,
                "step": training.run.step,
            }
        )

    before = untouched()
    (group,) = learner.optimizer.param_groups
    assert before["losses"]["counts"] == [3, 3] and before["transitions"] == 100
    if intervention == "redo":
        training.repeat()
    else:
        training.intervene()
    assert untouched() == before
    for parameter, known in zip(learner.q_network.parameters(), group["params"], strict=True):
        assert parameter is known, "the optimizer's own"


@pytest.mark.parametrize("intervention", DRAWING)
def test_what_is_drawn_depends_on_seed_and_count_alone(intervention):
    def drawn(updates, seed, times):
        learner = make_learner(intervention=intervention, seed=seed)
        for k in range(updates):
            learner.update(random_batch(k))
        for _ in range(times):
            torch.rand(updates + 1)  # the global generator is not asked
            learner.intervene(step=10)
        return parameters(learner)[f"{learner.q_network.newest_head()}.hidden.weight"]

    assert torch.equal(drawn(1, 1, 1), drawn(3, 1, 1))
    assert not torch.equal(drawn(1, 1, 1), drawn(1, 2, 1)) and not torch.equal(drawn(1, 1, 1), drawn(1, 1, 2))


INTERVENTIONS = {
    "injection": "plasticity injected",
    "reset-moments": "optimizer's moments emptied",
    "reset-head": "head drawn anew",
    "shrink-perturb": "encoder shrunk and perturbed, head drawn anew",
    "reset-all": "whole network drawn anew",
    "fire": r"convolutions made near orthogonal, head drawn anew \(FIRE\)",
}


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """{intervention: (curves, printed text, [(step, parameters) when it began])}, of runs with one seed."""
    runs = {}
    for intervention in ("none", *INTERVENTIONS):
        begun = []
        printed = io.StringIO()
        intervene = Training.intervene

        def noted(run, begun=begun, intervene=intervene):
            begun.append((run.run.step, parameters(run.learner)))
            intervene(run)

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.chdir(tmp_path_factory.mktemp(intervention))
            patch.setattr(Training, "intervene", noted)
            folder = train(replace(SMALL, intervention=intervention, total_timesteps=200))
            runs[intervention] = (scalars(folder), printed.getvalue(), begun)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_a_run_does_at_its_step_what_was_asked_for_and_says_so(arms, intervention):
    curves, out, begun = arms[intervention]
    assert [step for step, _ in begun] == [142], "141 lies in the vector step that ends at 142"
    assert curves["injection/step"] == [(142, 142)]
    ((step, delta),) = curves["injection/max_abs_delta_q"]
    assert step == 142 and (delta == 0) == (intervention in ("injection", "reset-moments"))
    line = f"^step 142: {INTERVENTIONS[intervention]}, largest change of Q .* observations: (.*)$"
    (printed,) = re.findall(line, out, re.MULTILINE)
    assert float(printed) == pytest.approx(delta, rel=1e-3) and "baseline arm" not in out


@pytest.mark.slow
def test_a_baseline_does_nothing_and_says_so(arms):
    curves, out, begun = arms["none"]
    assert not begun and "injection/step" not in curves and "baseline arm" in out


@pytest.mark.slow
def test_arms_with_one_seed_are_bitwise_equal_up_to_the_intervention_and_differ_after_it(arms):
    first, *others = (begun[0][1] for _, _, begun in arms.values() if begun)
    shared = {name: value for name, value in first.items() if "theta_prime_" not in name}
    assert all(same(shared, other) for other in others)
    new_heads = [value for name, value in first.items() if name not in shared]
    assert new_heads and not any(value.any() for value in new_heads), "they are not in use"
    losses = [dict(curves["losses/td_loss"]) for curves, *_ in arms.values()]
    assert len({curve[120] for curve in losses}) == 1
    assert len({curve[200] for curve in losses}) == 1 + len(INTERVENTIONS)


# when the norm has grown


@pytest.mark.parametrize("intervention", DRAWING)
def test_norms_of_what_was_drawn_anew_count_from_then_on_and_those_of_the_encoder_from_its_first_draw(
    intervention,
):
    learner = trained(intervention=intervention)
    encoder = learner.norms.initial["encoder"]
    learner.intervene(step=10)
    measures = plasticity_measures(learner, random_batch())
    assert learner.norms.growth(learner.growing()) == measures["weight_norm_ratio/head"] == 1
    drawn_anew = intervention == "reset-all"
    assert (learner.norms.initial["encoder"] != encoder) == drawn_anew
    assert (measures["weight_norm_ratio/encoder"] == 1) == drawn_anew


@pytest.mark.parametrize("freeze_heads", [True, False])
def test_growth_is_the_norm_of_encoder_and_head_over_what_it_was_when_the_head_began(freeze_heads):
    learner = make_learner(freeze_heads=freeze_heads)
    assert learner.norms.growth(learner.growing()) == 1
    learned = [*learner.q_network.encoder.parameters(), *learner.q_network.head.theta.parameters()]
    numbers = torch.cat([parameter.detach().double().flatten() for parameter in learned])
    assert learner.norms.norm(learner.growing()) == pytest.approx(numbers.norm().item(), rel=1e-6)
    with torch.no_grad():
        for parameter in learned:
            parameter.mul_(2)
    assert learner.norms.growth(learner.growing()) == pytest.approx(2, rel=1e-6)
    learner.inject()
    assert learner.norms.growth(learner.growing()) == 1, "the new head begins"
    with torch.no_grad():
        for parameter in learner.q_network.head.theta.parameters():
            parameter.mul_(5)
    assert learner.norms.growth(learner.growing()) == 1, "an earlier head does not count, frozen or not"


NORM = replace(
    SMALL,
    injection_step=(),
    injection_trigger="norm",
    injection_norm_ratio=1.0001,
    injection_check_frequency=15,
    max_injections=2,
    learning_rate=1e-3,
)


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 4])
def test_an_injection_is_made_at_the_first_check_at_which_the_norm_has_grown_enough(num_envs):
    checkpoint_frequency = 240 if num_envs == 4 else 0
    args = replace(NORM, num_envs=num_envs, checkpoint_frequency=checkpoint_frequency)
    folder = train(args)
    curves = scalars(folder)
    growth = dict(curves["injection/norm_growth"])
    ends = [args.end_of_vector_step(step) for step in range(15, 241, 15)]
    assert list(growth) == ends, "checked in every vector step that holds a multiple"
    assert growth[ends[3]] == 1, "learning begins"
    due = [step for step, value in growth.items() if value > 1.0001][:2]
    assert [step for step, _ in curves["injection/step"]] == due and len(due) == 2
    assert {value for _, value in curves["injection/max_abs_delta_q"]} == {0}
    kept = {int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")}
    assert kept == ({due[0], 240} if num_envs == 4 else set()), "from which a baseline can be forked"


@pytest.mark.parametrize(("ratio", "due"), [(1.0, False), (0.999, True)])
def test_a_norm_that_has_come_to_the_ratio_and_not_beyond_it_triggers_nothing(ratio, due):
    """As before anything is learned, where it is exactly what it was."""
    how = {"injection_trigger": "norm", "injection_norm_ratio": ratio, "injection_check_frequency": 10}
    learner = make_learner(injection_step=(), **how)
    run = cast(Run, SimpleNamespace(step=10, due=lambda period: 1))
    training = Training(learner.args, run, *cast(Any, (None, learner, None)))
    assert training.intervention_due() == due


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"injection_norm_ratio": 3.0}, {"intervention": "none"}], ids=str)
def test_no_injection_is_made_below_the_ratio_or_in_a_baseline(changes):
    curves = scalars(train(replace(NORM, total_timesteps=150, **changes)))
    assert "injection/step" not in curves
    assert max(value for _, value in curves["injection/norm_growth"]) > 1.0001


@pytest.mark.slow
def test_the_norm_triggers_any_intervention_no_more_than_max_injections_times():
    curves = scalars(train(replace(NORM, intervention="reset-head", max_injections=1)))
    assert len(curves["injection/step"]) == 1 and curves["injection/max_abs_delta_q"][0][1] > 0
    first_step, _ = curves["injection/step"][0]
    _, last_growth = curves["injection/norm_growth"][-1]
    assert first_step < 200 and last_growth > 1.0001, "it had grown enough for another one"


@pytest.mark.slow
def test_the_norm_triggers_nothing_at_the_end_of_a_run():
    args = replace(NORM, injection_check_frequency=240, intervention="reset-head")
    curves = scalars(train(args))
    assert curves["injection/norm_growth"][-1][1] > args.injection_norm_ratio
    assert "injection/step" not in curves


# the paper's settings


def test_an_injection_with_a_shared_bias_changes_nothing_and_learns():
    learner = trained(shared_bias=True)
    obs = random_batch().observations
    with torch.no_grad():
        before = learner.q_network(obs)
        learner.inject()
        assert torch.equal(learner.q_network(obs), before)
    bias = learner.q_network.head.theta_prime_1[0].output.bias.item()
    learner.update(random_batch(7))
    assert learner.q_network.head.theta_prime_1[0].output.bias.item() != bias


@pytest.mark.slow
def test_a_short_run_in_the_papers_settings_trains_injects_and_evaluates():
    curves = scalars(train(replace(SMALL, **PAPER)))
    assert curves["injection/max_abs_delta_q"] == [(142, 0.0)] and len(curves["eval/episodic_return"]) == 1
    assert len(curves["losses/td_loss"]) == 3


# growth


@pytest.mark.slow
def test_a_run_that_grows_says_from_how_many_trainable_parameters_to_how_many(capsys):
    """Phoenix has 8 actions; the encoder 77,984 parameters."""
    train(replace(SMALL, head_width=16, injected_head_width=32, total_timesteps=150))
    small, large = (77_984 + width * (3_136 + 1 + 8) + 8 for width in (16, 32))
    line = next(line for line in capsys.readouterr().out.splitlines() if "plasticity injected" in line)
    assert line == (
        "step 142: plasticity injected, largest change of Q over 48 observations: 0.0, "
        f"trainable parameters {small:,} → {large:,}"
    )
    train(replace(SMALL, head_width=16, total_timesteps=150))
    assert "trainable parameters" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"freeze_heads": False},
        PAPER | {"moments": "fresh"},
        asdict(NORM) | {"max_injections": 1},
    ],
    ids=("bf16", "all heads", "paper", "norm"),
)
def test_an_agent_grows_and_goes_on_learning_in_every_setting(changes):
    curves = scalars(train(replace(SMALL, **changes | {"head_width": 16, "injected_head_width": 32})))
    ((step, change),) = curves["injection/max_abs_delta_q"]
    assert change == 0.0
    last_step, last_loss = curves["losses/td_loss"][-1]
    assert last_step > step and math.isfinite(last_loss)


def test_moments_are_not_copied_to_a_head_of_another_width():
    with pytest.raises(ValueError, match="give --moments fresh"):
        Args(injected_head_width=1024, moments="keep")
    Args(injected_head_width=512, moments="keep")
    paper = PRESETS["paper"]
    with pytest.raises(ValueError, match="fresh"):
        Args(**paper, injected_head_width=1024)
    Args(**paper | {"moments": "fresh"}, head_width=128, injected_head_width=1024)


def test_what_is_measured_of_a_head_is_measured_at_its_own_width():
    learner = trained(head_width=16, injected_head_width=32)
    learner.inject()
    for k in range(3):
        learner.update(random_batch(k))
    measures = plasticity_measures(learner, random_batch())
    assert 1 <= measures["srank/head"] <= 32 and 1 <= measures["effective_rank/head"] <= 32
    assert math.isfinite(measures["dormant_fraction/theta"]) and measures["weight_norm_ratio/head"] > 0


# what goes on every so often

REDO: dict[str, Any] = {"intervention": "redo", "redo_frequency": 20, "redo_threshold": 0.5}
RECYCLING = replace(SMALL, learning_rate=1e-3, **REDO)


def order_of_calls(args):
    """(step, what was called) of a run, from its first recycling on."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:

        def watch(kind, name):
            original = getattr(kind, name)

            def called(self, *given, **named):
                calls.append(name)
                return original(self, *given, **named)

            patch.setattr(kind, name, called)

        watch(Learner, "update")
        watch(Learner, "sync_target")
        watch(Learner, "repeat")
        watch(Training, "advance")
        watch(Training, "measure_churn")
        train(args)
    steps = []
    step = 0
    for name in calls:
        if name == "advance":
            step = min(step + args.num_envs, args.total_timesteps)
        else:
            steps.append((step, name))
    first = [name for _, name in steps].index("repeat")
    while steps[first - 1][0] == steps[first][0]:
        first -= 1
    return steps[first:]


@pytest.mark.slow
def test_units_are_recycled_after_the_updates_and_before_a_sync_that_is_due_then():
    args = replace(RECYCLING, injection_step=(160,), target_network_frequency=40, plasticity_frequency=80)
    calls = order_of_calls(args)
    at_steps = {}
    for step, name in calls:
        at_steps.setdefault(step, []).append(name)
    assert at_steps[160] == at_steps[240] == ["update", "measure_churn", "repeat", "sync_target"]
    assert at_steps[200] == ["update", "repeat", "sync_target"]
    assert at_steps[180] == at_steps[220] == ["update", "repeat"]
    assert [step for step, name in calls if name == "repeat"] == [160, 180, 200, 220, 240]


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 2, 3, 8])
@pytest.mark.parametrize("overlap", [False, True])
def test_recycling_is_due_at_the_injection_step_and_then_every_so_often_rounded_up_to_a_vector_step(
    num_envs, overlap
):
    args = replace(RECYCLING, num_envs=num_envs, overlap=overlap, buffer_size=240, plasticity_frequency=0)
    curves = scalars(train(args))
    expected = [args.end_of_vector_step(step) for step in range(141, 241, 20)]
    for name in ("conv1", "conv2", "conv3", "head"):
        assert [step for step, _ in curves[f"injection/recycled/{name}"]] == expected
    counts = [value for _, value in curves["injection/recycled/head"]]
    assert max(counts) > 0 and all(value == int(value) for value in counts)
    assert "injection/step" not in curves and "injection/max_abs_delta_q" not in curves


@pytest.mark.slow
def test_a_run_that_recycles_says_so_once_writes_no_checkpoint_for_it_and_is_the_baseline_before(capsys):
    curves = scalars(train(RECYCLING))
    lines = [line for line in capsys.readouterr().out.splitlines() if "recycled" in line]
    counts = ", ".join(
        f"recycled/{name} {curves[f'injection/recycled/{name}'][0][1]:.0f}"
        for name in ("conv1", "conv2", "conv3", "head")
    )
    assert lines == [f"step 142: dormant units recycled (ReDo), {counts}; again every 20 steps"]
    folder = train(replace(RECYCLING, checkpoint_frequency=200))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-240"]
    baseline = scalars(train(replace(RECYCLING, intervention="none")))
    for tag in ("losses/td_loss", "losses/q_values"):
        pairs = zip(curves[tag], baseline[tag], strict=True)
        assert [ours == theirs for ours, theirs in pairs] == [True, True, False, False][-len(curves[tag]) :]


def test_units_are_judged_by_64_transitions_drawn_by_seed_and_step(monkeypatch):
    judged_by = []

    def repeat(learner, obs, step):
        judged_by.append((obs, step))
        return {}

    monkeypatch.setattr(Learner, "repeat", repeat)
    training = in_a_run("redo", injection_step=(10,), seed=5)
    for step in (10, 30):
        training.run.step = step
        training.repeat()
        expected = training.replayed(Stream.PERTURBATION, step, 64).observations
        obs, step_given = judged_by.pop()
        assert obs.shape == (64, 4, 84, 84) and torch.equal(obs, expected) and step_given == step


def test_one_that_looks_at_no_observations_and_counts_nothing_is_logged_as_applied(monkeypatch):
    seen = []
    blind = replace(ALTERNATIVES["redo"], batch_size=0, apply=lambda parts, _: seen.append(parts.activations))
    monkeypatch.setitem(ALTERNATIVES, "redo", blind)
    curves = scalars(train(RECYCLING))
    assert curves["injection/applied"] == [(step, 1) for step in (142, 162, 182, 202, 222)]
    assert seen == [{}] * 5 and not any(tag.startswith("injection/recycled/") for tag in curves)


@pytest.mark.parametrize("num_envs", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("begin", "period"), [(141, 20), (142, 20), (7, 8), (24, 9)])
def test_recycling_is_due_in_each_vector_step_in_which_a_period_after_the_first_step_ends(
    num_envs, begin, period
):
    args = Args(intervention="redo", injection_step=(begin,), redo_frequency=period, num_envs=num_envs)
    learner = SimpleNamespace(last_repeat=-1)
    due_at = []
    for step in range(num_envs, 400, num_envs):
        training = Training(args, cast(Run, SimpleNamespace(step=step)), *cast(Any, (None, learner, None)))
        if training.repeat_due():
            due_at.append(step)
            learner.last_repeat = step
            assert not training.repeat_due(), "once"
    expected = [args.end_of_vector_step(step) for step in range(begin, 400, period)]
    assert due_at == [step for step in expected if step < 400]


# settings of the agent, beside any intervention


@pytest.mark.slow
@pytest.mark.parametrize("intervention", [*ONCE, "redo", "none"])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_intervention_runs_with_layer_norm_and_weight_decay(intervention, bf16):
    args = replace(SMALL, intervention=intervention, layer_norm=True, weight_decay=1e-3, bf16=bf16)
    if intervention == "redo":
        args = replace(args, redo_frequency=20)
    curves = scalars(train(replace(args, plasticity_frequency=60)))
    last_step, last_loss = curves["losses/td_loss"][-1]
    assert last_step == 240 and math.isfinite(last_loss)
    assert [step for step, _ in curves["plasticity/dormant_fraction"]] == [60, 120, 180, 240]
    if intervention == "injection":
        assert curves["injection/max_abs_delta_q"] == [(142, 0.0)]


# policy churn


def test_policy_churn_compares_both_float32_networks_on_the_states_that_are_measured(monkeypatch):
    compared = []

    def compare(online, target):
        compared.append((online, target))
        return torch.tensor(0.25)

    monkeypatch.setattr("support.measures.policy_churn", compare)
    training = in_a_run("none", bf16=True)
    for step in (10, 30):
        training.run.step = step
        training.measure_churn()
        obs = training.replayed(Stream.PLASTICITY, step).observations
        online, target = compared.pop()
        with torch.no_grad():
            assert torch.equal(online, training.learner.q_network(obs))
            assert torch.equal(target, training.learner.target_network(obs))
        assert len(online) == Training.MEASURED


@pytest.mark.parametrize("num_envs", [1, 2, 3, 8])
@pytest.mark.parametrize(("sync_every", "measure_every"), [(20, 50), (20, 27), (24, 10), (9, 100)])
def test_policy_churn_is_due_at_the_first_sync_at_or_after_each_multiple_of_its_frequency(
    num_envs, sync_every, measure_every
):
    args = Args(num_envs=num_envs, target_network_frequency=sync_every, plasticity_frequency=measure_every)
    due_at = []
    for sync in range(sync_every, 400, sync_every):
        step = args.end_of_vector_step(sync)
        training = Training(args, cast(Run, SimpleNamespace(step=step)), *cast(Any, (None, None, None)))
        if training.churn_due():
            due_at.append(sync)
    expected = set()
    for multiple in range(measure_every, 400, measure_every):
        expected.add(math.ceil(multiple / sync_every) * sync_every)
    assert due_at == [sync for sync in sorted(expected) if sync < 400]


@pytest.mark.slow
def test_policy_churn_is_measured_just_before_the_first_sync_after_measures_were_due():
    measured = {}
    original = Learner.sync_target

    def noted(learner):
        pairs = zip(learner.q_network.parameters(), learner.target_network.parameters(), strict=True)
        measured[learner] = any(not torch.equal(online, target) for online, target in pairs)
        original(learner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "sync_target", noted)
        args = replace(SMALL, target_network_frequency=20, plasticity_frequency=50, learning_rate=3e-3)
        curves = scalars(train(replace(args, intervention="none")))
    # multiples of 50 lie in 41 to 60, 81 to 100, 141 to 160 and 181 to 200; learning begins after 60
    assert [step for step, _ in curves["plasticity/policy_churn"]] == [100, 160, 200]
    assert all(0 <= value <= 1 for _, value in curves["plasticity/policy_churn"])
    assert any(value > 0 for _, value in curves["plasticity/policy_churn"]), "not after the sync"
    assert list(measured.values()) == [True]
    assert "plasticity/policy_churn" not in scalars(train(replace(args, plasticity_frequency=0)))
