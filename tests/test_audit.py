"""The audit of an intervention: right ones have no fault, and wrong ones that which they have."""

import copy
import functools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from alternatives import redo
from alternatives.alternative import AgentParts
from analysis import audit as auditing
from analysis.audit import (
    Audited,
    audit,
    faults_of_injection,
    faults_of_recycling,
    table,
    what_became_of_moments,
)
from dqn_injection_atari import InjectableHead
from support.usage import UsageError

CHANNELS, WIDTH, ACTIONS = 6, 16, 3
HEADS = {"θ": "head.theta", "θ′₁": "head.theta_prime_1.0", "θ′₂": "head.theta_prime_2.0"}


def make_encoder():
    return nn.Sequential(nn.Conv2d(2, CHANNELS, 3), nn.ReLU(), nn.Flatten())


def make_head():
    return nn.Sequential(nn.Linear(CHANNELS * 9, WIDTH), nn.ReLU(), nn.Linear(WIDTH, ACTIONS))


class Network(nn.Module):
    """No Atari: observations are (B, 2, 5, 5)."""

    def __init__(self, head):
        super().__init__()
        self.encoder = make_encoder()
        self.head = head

    def forward(self, obs):
        return self.head(self.encoder(obs))


class Agent:
    """A right one: it learns random targets, and injects as it has to be. What follows it is wrong."""

    freeze = True
    head_class: type[nn.Module] = InjectableHead

    def __init__(self):
        torch.manual_seed(0)
        self.online = Network(self.head_class(make_head, freeze=self.freeze))
        self.target = copy.deepcopy(self.online)
        self.optimizer = torch.optim.Adam(self.trained_by_optimizer(), lr=1e-2)
        self.obs = torch.rand(32, 2, 5, 5)
        self.targets = torch.randn(32, ACTIONS)
        for _ in range(5):
            self.update()

    def trained_by_optimizer(self):
        return self.online.parameters()

    def update(self):
        self.optimizer.zero_grad()
        F.mse_loss(self.online(self.obs), self.targets).backward()
        self.optimizer.step()

    def inject(self):
        self.online.head.inject(torch.Generator().manual_seed(1))
        self.sync()

    def sync(self):
        self.target.load_state_dict(self.online.state_dict())

    def formula(self, obs):
        """By hand: θ(φ) + θ′₁(φ) − θ′₂(φ)."""
        of = dict(self.online.named_parameters())
        features = F.relu(F.conv2d(obs, of["encoder.0.weight"], of["encoder.0.bias"])).flatten(1)

        def head(path):
            hidden = F.relu(F.linear(features, of[f"{path}.0.weight"], of[f"{path}.0.bias"]))
            return F.linear(hidden, of[f"{path}.2.weight"], of[f"{path}.2.bias"])

        return head("head.theta") + (head("head.theta_prime_1.0") - head("head.theta_prime_2.0"))

    def look(self):
        return Audited(
            network=self.online,
            target=self.target,
            optimizer=self.optimizer,
            parts={"φ": "encoder"} | HEADS,
            obs=self.obs,
            formula=self.formula,
            update=self.update,
        )


def audited(agent, intervene):
    return audit(agent.look, intervene)


# right injections


def test_an_injection_done_right_has_no_fault_and_its_findings_say_what_it_does():
    agent = Agent()
    findings = audited(agent, agent.inject)
    assert faults_of_injection(findings) == []
    found = {part: list(vars(values).values()) for part, values in findings.parts.items()}
    assert found == {
        "φ": ["none", "all", "all", "all", "kept"],
        "θ": ["none", "none", "none", "all", "kept"],
        "θ′₁": ["all", "all", "all", "all", "empty"],
        "θ′₂": ["all", "none", "none", "all", "empty"],
    }
    assert findings.max_abs_delta_q == 0 and findings.gradient_error < 1e-5
    assert findings.target_outputs_equal and findings.target_state_equal
    assert findings.target_changed and not findings.target_equal_before
    assert not findings.thawed and not findings.moving_buffers
    size = sum(parameter.numel() for parameter in (*make_encoder().parameters(), *make_head().parameters()))
    assert findings.trainable_before == findings.trainable_after == size


class KeepsMoments(Agent):
    def inject(self):
        super().inject()
        for old, new in zip(
            self.online.head.theta.parameters(), self.online.head.theta_prime_1.parameters(), strict=True
        ):
            self.optimizer.state[new] = copy.deepcopy(self.optimizer.state[old])


class TrainsAllHeads(Agent):
    freeze = False


class SharesFrozenHeads(Agent):
    """A target may have the very heads that never change again."""

    def sync(self):
        super().sync()
        self.target.head.theta = self.online.head.theta
        self.target.head.theta_prime_2 = self.online.head.theta_prime_2


class MakesHeadsWhenItInjects(Agent):
    """Heads are no parameters before, and the optimizer gets to know them then."""

    class Head(nn.Module):
        def __init__(self, make_head, freeze):
            super().__init__()
            self.theta = make_head()
            self.theta_prime_1 = nn.ModuleList()
            self.theta_prime_2 = nn.ModuleList()

        def forward(self, features):
            q_values = self.theta(features)
            for new, frozen in zip(self.theta_prime_1, self.theta_prime_2, strict=True):
                q_values = q_values + (new(features) - frozen(features))
            return q_values

    head_class = Head

    def inject(self):
        head = self.online.head
        head.theta_prime_1.append(make_head())
        head.theta_prime_2.append(copy.deepcopy(head.theta_prime_1[0]))
        for module in (head.theta, head.theta_prime_2):
            module.requires_grad_(False)
            for parameter in module.parameters():
                parameter.grad = None
        self.optimizer.add_param_group({"params": head.theta_prime_1.parameters()})
        self.target = copy.deepcopy(self.online)

    def look(self):
        agent = super().look()
        if not self.online.head.theta_prime_1:
            del agent.parts["θ′₁"], agent.parts["θ′₂"]
        return agent


def test_frozen_heads_that_both_networks_share_are_right():
    agent = SharesFrozenHeads()
    assert faults_of_injection(audited(agent, agent.inject)) == []


def test_a_copy_of_moments_all_heads_trained_and_heads_that_come_late_are_right_too():
    agent = KeepsMoments()
    findings = audited(agent, agent.inject)
    assert findings.parts["θ′₁"].moments == "copied" and findings.parts["θ′₂"].moments == "empty"
    assert faults_of_injection(findings) == []

    agent = TrainsAllHeads()
    findings = audited(agent, agent.inject)
    assert faults_of_injection(findings, freeze=False) == []
    assert findings.trainable_after > findings.trainable_before
    of_frozen = [f"{part} changes at an update: it is not frozen" for part in ("θ", "θ′₂")]
    assert faults_of_injection(findings) == of_frozen

    agent = MakesHeadsWhenItInjects()
    findings = audited(agent, agent.inject)
    assert faults_of_injection(findings) == []
    assert findings.parts["θ′₁"].changed == "all" and findings.parts["θ′₂"].in_optimizer == "none"


@pytest.mark.parametrize("freeze", [True, False])
def test_a_second_injection_is_right_whether_the_first_pair_is_frozen_or_learns(monkeypatch, freeze):
    monkeypatch.setattr(Agent, "freeze", freeze)
    with_room = functools.partial(InjectableHead, max_injections=2)
    monkeypatch.setattr(Agent, "head_class", staticmethod(with_room))
    agent = Agent()
    agent.inject()
    agent.update()
    parts = {
        "φ": "encoder",
        "θ": "head.theta",
        "first pair's θ′₁": "head.theta_prime_1.0",
        "first pair's θ′₂": "head.theta_prime_2.0",
        "θ′₁": "head.theta_prime_1.1",
        "θ′₂": "head.theta_prime_2.1",
    }
    findings = audit(
        lambda: replace(agent.look(), parts=parts, formula=agent.online.forward),
        agent.inject,
    )
    assert faults_of_injection(findings, freeze) == []
    old = [fault for fault in faults_of_injection(findings, not freeze) if fault.startswith("first pair's")]
    assert len(old) == 2


def test_the_audit_changes_nothing_but_what_the_intervention_and_two_updates_change():
    agent, plain = Agent(), Agent()
    audited(agent, agent.inject)
    plain.inject()
    plain.update()
    plain.update()
    for network, other in ((agent.online, plain.online), (agent.target, plain.target)):
        assert auditing.equal_states(network.state_dict(), other.state_dict())
    for parameter, other in zip(agent.online.parameters(), plain.online.parameters(), strict=True):
        kept, expected = agent.optimizer.state[parameter], plain.optimizer.state[other]
        assert auditing.equal_states(kept, expected)


def test_where_nothing_is_done_nothing_but_the_updates_is_seen():
    agent = Agent()
    findings = audited(agent, lambda: None)
    assert {found.changed for found in findings.parts.values()} == {"none"}
    assert findings.parts["θ"].first_update == findings.parts["φ"].first_update == "all"
    assert findings.parts["θ′₁"].second_update == "none"
    assert findings.max_abs_delta_q == 0 and not findings.new_reaches_q
    assert not findings.target_changed and not findings.target_outputs_equal


# wrong injections


class HeadIsNeverTrained(Agent):
    """New heads are not in the optimizer."""

    def trained_by_optimizer(self):
        return [*self.online.encoder.parameters(), *self.online.head.theta.parameters()]


class TwinIsDetached(Agent):
    class Head(InjectableHead):
        def forward(self, features):
            output = self.theta(features)
            for k in range(self.num_injections):
                frozen = self.theta_prime_2[k](features.detach())
                output = output + (self.theta_prime_1[k](features) - frozen)
            return output

    head_class = Head


class NewHeadsAreDetached(Agent):
    """Both, so that their gradients are still equal at the injection, and no longer after an update."""

    class Head(InjectableHead):
        def forward(self, features):
            output = self.theta(features)
            for k in range(self.num_injections):
                detached = features.detach()
                output = output + (self.theta_prime_1[k](detached) - self.theta_prime_2[k](detached))
            return output

    head_class = Head


class OptimizerIsMadeAnew(Agent):
    def inject(self):
        super().inject()
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=1e-2)


class TargetStaysBehind(Agent):
    def sync(self):
        pass


class TargetGetsParametersAlone(Agent):
    """And not the number of injections, so that it goes on without the new heads. No output differs yet."""

    def sync(self):
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.data.copy_(online.data)


class TargetSharesTheNewHead(Agent):
    """Which then moves in both networks. What is frozen may be shared."""

    def sync(self):
        super().sync()
        self.target.head.theta = self.online.head.theta
        self.target.head.theta_prime_1 = self.online.head.theta_prime_1


class DifferenceComesLast(Agent):
    class Head(InjectableHead):
        def forward(self, features):
            output = self.theta(features)
            for k in range(self.num_injections):
                output = output + self.theta_prime_1[k](features) - self.theta_prime_2[k](features)
            return output

    head_class = Head


class FrozenHeadsFollowTheirMomentum(Agent):
    """Zero gradients in the place of none. Steps of the new head are counted before it is there, too."""

    def update(self):
        frozen = [parameter for parameter in self.online.parameters() if not parameter.requires_grad]
        self.optimizer.zero_grad()
        F.mse_loss(self.online(self.obs), self.targets).backward()
        for parameter in frozen:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()


class TwinIsAnotherDraw(Agent):
    def inject(self):
        super().inject()
        self.online.head.theta_prime_2[0].load_state_dict(make_head().state_dict())
        self.sync()


class HeadIsACopyOfTheOldOne(Agent):
    """In its first layer alone, and so is its twin."""

    def inject(self):
        super().inject()
        for new in (self.online.head.theta_prime_1[0], self.online.head.theta_prime_2[0]):
            new[0].load_state_dict(self.online.head.theta[0].state_dict())
        self.sync()


class HeadIsFrozenInPart(Agent):
    def inject(self):
        super().inject()
        self.online.head.theta_prime_1[0][0].requires_grad_(False)


class SharesMoments(Agent):
    """What was to be a copy is the same tensors."""

    def inject(self):
        super().inject()
        for old, new in zip(
            self.online.head.theta.parameters(), self.online.head.theta_prime_1.parameters(), strict=True
        ):
            self.optimizer.state[new] = self.optimizer.state[old]


class EncoderIsDetached(Agent):
    class Head(InjectableHead):
        def forward(self, features):
            return super().forward(features.detach())

    head_class = Head


class TargetWasACopy(Agent):
    def __init__(self):
        super().__init__()
        self.sync()


NOT_IN_OPTIMIZER = "is not in the optimizer, or not all of it"
OTHER_MOMENTS = "θ′₁'s moments are neither empty nor a copy of θ's"
NEVER_LEARNS = "does not change at an update: it never learns"
STAYS_BEHIND = "the target stays behind: it is no copy of the online network after the injection"
IS_A_HEAD_DETACHED = "φ's gradient is not that of the whole sum, it is off by 0%: is a head detached?"
Q_CHANGES = "Q changes at the injection, by up to 0: θ′₁ and θ′₂ must be equal, and their difference come"


@pytest.mark.parametrize(
    ("wrong", "faults"),
    [
        (HeadIsNeverTrained, [f"θ′₁ {NOT_IN_OPTIMIZER}", f"θ′₁ {NEVER_LEARNS}"]),
        (TwinIsDetached, [IS_A_HEAD_DETACHED]),
        (NewHeadsAreDetached, [IS_A_HEAD_DETACHED]),
        (OptimizerIsMadeAnew, ["φ has lost its moments: the optimizer was made anew"]),
        (EncoderIsDetached, [f"φ {NEVER_LEARNS}", "φ's moments are not kept: empty", IS_A_HEAD_DETACHED]),
        (TargetStaysBehind, [STAYS_BEHIND]),
        (TargetGetsParametersAlone, [STAYS_BEHIND]),
        (
            TargetSharesTheNewHead,
            ["the target has weights of the online network that learn: give it copies of them"],
        ),
        (DifferenceComesLast, [f"{Q_CHANGES} before the sum"]),
        (TwinIsAnotherDraw, [f"{Q_CHANGES} before the sum"]),
        (HeadIsACopyOfTheOldOne, ["θ′₁ has weights of θ: it is not drawn anew"]),
        (HeadIsFrozenInPart, ["θ′₁ changes in part at an update: is it frozen in part, or φ dead?"]),
        (FrozenHeadsFollowTheirMomentum, ["θ changes at an update: it is not frozen", OTHER_MOMENTS]),
        (SharesMoments, [OTHER_MOMENTS]),
        (TargetWasACopy, ["the target was a copy before: make an update after a sync, or it shows nothing"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_wrong_injection_is_named_by_what_is_wrong_with_it_and_by_nothing_else(wrong, faults):
    agent = wrong()
    found = faults_of_injection(audited(agent, agent.inject))
    assert [without_numbers(fault) for fault in found] == faults


def without_numbers(fault):
    """With 0 in the place of each."""
    return re.sub(r"\d[\d.e+-]*", "0", fault)


@pytest.mark.parametrize("update", ["first_update", "second_update"])
def test_what_was_drawn_has_to_learn_as_a_whole_and_what_may_have_died_has_not(update):
    agent = TrainsAllHeads()
    findings = audited(agent, agent.inject)
    for part, found in findings.parts.items():
        in_part = replace(found, **{update: "part"})
        faults = faults_of_injection(replace(findings, parts=findings.parts | {part: in_part}), freeze=False)
        if part in ("φ", "θ"):
            assert faults == []
        else:
            assert faults == [f"{part} changes in part at an update: is it frozen in part, or φ dead?"]


def test_a_new_head_may_begin_with_the_constants_of_the_old_one_and_with_no_other_tensor():
    constant, drawn = torch.ones(3), torch.arange(3.0)
    assert not auditing.shares_weights({"θ": {"norm": constant}, "θ′₁": {"norm": constant.clone()}})
    assert auditing.shares_weights({"θ": {"0": drawn}, "θ′₁": {"0": drawn.clone()}})
    assert not auditing.shares_weights({"θ": {"0": drawn}, "θ′₁": {"0": drawn + 1}})
    assert not auditing.shares_weights({"φ": {"0": drawn}, "θ′₁": {"0": drawn.clone()}}), (
        "before there is a θ"
    )


def test_dead_layers_are_no_fault_of_an_injection_but_behind_a_dead_encoder_it_cannot_be_judged():
    for layer, faults in (
        ("head.theta.0", []),
        ("encoder.0", ["θ′₁ changes in part at an update: is it frozen in part, or φ dead?"]),
    ):
        agent = Agent()
        with torch.no_grad():
            agent.online.get_submodule(layer).weight.zero_()
            agent.online.get_submodule(layer).bias.fill_(-1)
        assert faults_of_injection(audited(agent, agent.inject)) == faults


class EncoderIsFrozenInPart(Agent):
    def inject(self):
        super().inject()
        self.online.encoder[0].bias.requires_grad_(False)


def test_noise_is_refused_in_one_line_before_anything_is_changed():
    agent = Agent()
    agent.online.encoder.append(nn.Dropout())
    before = copy.deepcopy(agent.online.state_dict())
    fix = r"leave dropout and noise out of the audit, by network\.eval\(\)"
    with pytest.raises(UsageError, match=rf"^the network gives two outputs for the same obs: {fix}, also"):
        audited(agent, agent.inject)
    assert auditing.equal_states(agent.online.state_dict(), before)
    agent = Agent()
    with torch.no_grad():
        agent.online.head.theta[2].bias.fill_(math.nan)
    with pytest.raises(UsageError, match=r"^the network gives numbers that are not finite: audit one that"):
        audited(agent, agent.inject)


def agent_with_dropout(noisy_after):
    """It trains with dropout, and leaves it on after one of its updates, or after none."""
    agent = Agent()
    agent.online.encoder.append(nn.Dropout())
    agent.online.eval()
    agent.target = copy.deepcopy(agent.online)
    agent.formula = agent.online.forward
    agent.update()
    updates = iter([1, 2])

    def update_in_training():
        agent.online.train()
        Agent.update(agent)
        agent.online.train(next(updates) == noisy_after)

    agent.update = update_in_training
    return agent


@pytest.mark.parametrize("noisy_after", [1, 2])
def test_noise_that_an_update_leaves_behind_is_refused(noisy_after):
    agent = agent_with_dropout(noisy_after)
    with pytest.raises(UsageError, match=r"also at the end of an update that calls network\.train\(\)$"):
        audited(agent, agent.inject)


def test_updates_that_train_with_dropout_and_switch_it_off_at_their_end_have_no_fault():
    agent = agent_with_dropout(noisy_after=None)
    assert faults_of_injection(audited(agent, agent.inject)) == []


@pytest.mark.parametrize(("training", "moving"), [(True, ("θ", "θ′₂")), (False, ())])
def test_buffers_of_a_frozen_head_that_move_are_named(training, moving):
    """Batch norm takes the mean of its inputs, also where no parameter learns."""

    def make_head():
        return nn.Sequential(nn.Linear(CHANNELS * 9, ACTIONS), nn.BatchNorm1d(ACTIONS))

    agent = Agent()
    agent.online = Network(InjectableHead(make_head))
    agent.target = copy.deepcopy(agent.online)
    agent.optimizer = torch.optim.Adam(agent.online.parameters(), lr=1e-2)
    agent.formula = agent.online.forward
    agent.update()
    agent.online.train(training)
    agent.target.train(training)
    findings = audited(agent, agent.inject)
    assert findings.moving_buffers == moving
    faults = [fault for fault in faults_of_injection(findings) if "buffers" in fault]
    assert [fault.partition(" ")[0] for fault in faults] == [*moving]


@pytest.mark.parametrize("update", [1, 2])
def test_a_network_that_is_thawed_in_an_update_is_named_though_nothing_has_moved_yet(update):
    agent = Agent()
    counted = iter(range(1, 3))

    def update_and_thaw():
        Agent.update(agent)
        if next(counted) == update:
            agent.online.head.theta_prime_2.requires_grad_(True)

    def inject():
        agent.inject()
        agent.update = update_and_thaw

    findings = audited(agent, inject)
    assert findings.thawed
    assert "call set_trainable() there" in " ".join(faults_of_injection(findings))


def test_an_encoder_that_is_frozen_is_refused_in_one_line():
    agent = EncoderIsFrozenInPart()
    with pytest.raises(UsageError, match=r"^φ has frozen weights: .* set requires_grad of all of them$"):
        audited(agent, agent.inject)


def test_an_injection_that_does_nothing_or_too_much_is_no_injection():
    agent = Agent()
    found = faults_of_injection(audited(agent, agent.sync))
    assert found[:2] == ["θ′₁ is not drawn anew", "θ′₂ is not drawn anew"]
    agent = Agent()

    def draw_all():
        agent.inject()
        agent.online.encoder.load_state_dict(make_encoder().state_dict())
        agent.online.head.theta.load_state_dict(make_head().state_dict())
        for parameter in agent.online.encoder.parameters():
            agent.optimizer.state[parameter]["exp_avg"].mul_(2)
        agent.sync()

    found = faults_of_injection(audited(agent, draw_all))
    assert found[1:] == [
        "φ changes at the injection",
        "θ changes at the injection",
        "φ's moments are not kept: changed",
    ]


class LearnsInTurns(Agent):
    """Of the two updates after the injection θ′₁ moves in the first alone, θ in the second alone."""

    def inject(self):
        super().inject()
        self.turns = [self.online.head.theta_prime_1, self.online.head.theta]

    def update(self):
        super().update()
        if hasattr(self, "turns"):
            turn = self.turns.pop(0)
            self.online.head.load_state_dict(self.target.head.state_dict())
            for parameter in turn.parameters():
                parameter.data += 1
            self.target.head.load_state_dict(self.online.head.state_dict())


def test_the_two_updates_are_told_apart():
    agent = LearnsInTurns()
    findings = audited(agent, agent.inject)
    assert (findings.parts["θ′₁"].first_update, findings.parts["θ′₁"].second_update) == ("all", "none")
    assert (findings.parts["θ"].first_update, findings.parts["θ"].second_update) == ("none", "all")
    assert faults_of_injection(findings)[:2] == [
        "θ changes at an update: it is not frozen",
        "θ′₁ does not change at an update: it never learns",
    ]
    assert "| φ θ′₁; φ θ |" in table({"in turns": findings})


def test_a_part_that_learns_in_one_of_the_updates_alone_and_a_gradient_a_little_off_are_faults():
    agent = Agent()
    findings = audited(agent, agent.inject)
    for update in ("first_update", "second_update"):
        still = replace(findings.parts["θ′₁"], **{update: "none"})
        faults = faults_of_injection(replace(findings, parts=findings.parts | {"θ′₁": still}))
        assert faults == ["θ′₁ does not change at an update: it never learns"]
    (fault,) = faults_of_injection(replace(findings, gradient_error=0.002))
    assert fault.endswith("it is off by 0.2%: is a head detached?")


def test_a_target_is_as_before_only_where_its_state_is_too():
    agent = Agent()
    agent.sync()
    unused = agent.target.head.theta_prime_1[0][0].weight

    def change():
        unused.data += 1

    findings = audited(agent, change)
    assert findings.target_equal_before and findings.target_changed and not findings.target_state_equal
    assert findings.target_outputs_equal

    agent = Agent()
    agent.sync()
    agent.target.head.theta_prime_1[0][0].weight.data += 1
    findings = audited(agent, lambda: None)
    assert not findings.target_equal_before and findings.target_outputs_equal, "its unused heads differ"


# recycling


def recycle(agent):
    """ReDo, on the head that learns."""
    conv, relu, flatten = agent.online.encoder
    channels = relu(conv(agent.obs))
    hidden, relu, _ = agent.online.head.theta
    units = relu(hidden(flatten(channels)))
    parts = AgentParts(
        encoder=agent.online.encoder,
        head=agent.online.head.theta,
        optimizer=agent.optimizer,
        draw_encoder=make_encoder,
        draw_head=make_head,
        generator=torch.Generator(),
        activations={"conv": channels, "head": units},
    )
    with torch.no_grad():
        redo.recycle(parts, redo.RedoSettings())


@pytest.fixture
def agent_with_silent_units():
    agent = Agent()
    with torch.no_grad():
        for layer in (agent.online.encoder[0], agent.online.head.theta[0]):
            layer.weight[1:3] = 0
            layer.bias[1:3] = -1
    return agent


def test_recycling_done_right_has_no_fault(agent_with_silent_units):
    agent = agent_with_silent_units
    findings = audited(agent, functools.partial(recycle, agent))
    assert faults_of_recycling(findings) == [] and not findings.target_changed
    for part in ("φ", "θ"):
        assert findings.parts[part].changed == "part" and findings.parts[part].moments == "zeroed in part"


def forget_all(agent, _):
    agent.optimizer.state.clear()


def count_anew(agent, _):
    for state in agent.optimizer.state.values():
        state["step"].zero_()


def zero_all(agent, _):
    for state in agent.optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


def keep_moments(agent, before):
    agent.optimizer.load_state_dict(before)


@pytest.mark.parametrize(
    ("change", "became"),
    [(forget_all, "emptied"), (count_anew, "changed"), (zero_all, "zeroed"), (keep_moments, "kept")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_recycling_that_does_another_thing_to_moments_is_named(agent_with_silent_units, change, became):
    agent = agent_with_silent_units

    def recycle_and_change():
        before = copy.deepcopy(agent.optimizer.state_dict())
        recycle(agent)
        change(agent, before)

    assert faults_of_recycling(audited(agent, recycle_and_change)) == [
        f"{part}'s moments are {became}: those of recycled weights become zero" for part in ("φ", "θ")
    ]


def test_a_recycling_mask_with_the_channels_in_another_order_is_named(agent_with_silent_units, monkeypatch):
    choose = redo.choose

    def as_if_channels_came_last(units, tensor, axis):
        if axis == 0:
            return choose(units, tensor, axis)
        mask = units.repeat(tensor.shape[1] // len(units))
        return mask.view(1, -1)

    monkeypatch.setattr(redo, "choose", as_if_channels_came_last)
    agent = agent_with_silent_units
    (fault,) = faults_of_recycling(audited(agent, functools.partial(recycle, agent)))
    assert fault.startswith("recycled units reach Q: ") and fault.endswith(
        "channels and columns in one order?"
    )


def test_other_faults_of_a_recycling_are_named(agent_with_silent_units):
    agent = agent_with_silent_units

    def with_the_target():
        recycle(agent)
        agent.sync()

    assert faults_of_recycling(audited(agent, with_the_target)) == [
        "the target changes, which waits for its next sync"
    ]
    assert faults_of_recycling(audited(Agent(), lambda: None)) == [
        "nothing was recycled: silence some units first"
    ]

    def reset_head():
        agent.online.head.theta.load_state_dict(make_head().state_dict())

    whole, moments, reaches = faults_of_recycling(audited(agent, reset_head))
    assert whole == "θ changes as a whole, not just its dormant units"
    assert moments == "θ's moments are kept: those of recycled weights become zero"
    assert reaches.startswith("recycled units")


def test_a_unit_that_is_silent_with_one_sign_of_its_new_weights_is_not_missed():
    for unit in range(
        WIDTH
    ):  # half of them are silent, whatever they are read by, with the weights of a first draw
        agent = Agent()
        agent.online.head.theta[0].bias.data[unit] = 0

        def draw_one_unit(agent=agent, unit=unit):
            agent.online.head.theta[0].weight.data[unit] = torch.randn(CHANNELS * 9)

        assert audited(agent, draw_one_unit).new_reaches_q, unit


# moments, one by one


def moments_after(change):
    """What became of them, {part: words}, where `change` has had the agent."""
    agent = Agent()
    before = auditing.copy_moments_of(agent.look())
    change(agent)
    after = auditing.copy_moments_of(agent.look())
    return what_became_of_moments(agent.look(), before, after)


def states(agent):
    return [agent.optimizer.state[parameter] for parameter in agent.online.encoder.parameters()]


def zero(agent, *keys):
    for state in states(agent):
        for key in keys:
            state[key].zero_()


def zero_first_rows(agent):
    for state in states(agent):
        state["exp_avg"][0] = 0


def zero_first_and_forget_second(agent):
    zero(agent, "exp_avg", "exp_avg_sq")
    agent.optimizer.state.pop(agent.online.encoder[0].bias)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda agent: None, "kept"),
        (lambda agent: agent.optimizer.state.clear(), "emptied"),
        (lambda agent: zero(agent, "exp_avg", "exp_avg_sq"), "zeroed"),
        (lambda agent: zero(agent, "exp_avg"), "zeroed in part"),
        (zero_first_rows, "zeroed in part"),
        (lambda agent: zero(agent, "exp_avg", "exp_avg_sq", "step"), "changed"),
        (lambda agent: zero(agent, "step"), "changed"),
        (lambda agent: states(agent)[0]["exp_avg"].mul_(2), "changed, kept"),
        (lambda agent: states(agent)[0].update(exp_avg=torch.zeros(1)), "changed, kept"),
        (zero_first_and_forget_second, "emptied, zeroed"),
    ],
)
def test_what_became_of_moments_is_told_in_words(change, words):
    found = moments_after(change)
    assert found["φ"] == words and found["θ′₁"] == "empty"


def test_moments_of_another_shape_are_changed():
    weight = torch.zeros(2, 2)
    before, after = {"exp_avg": torch.zeros(3)}, {"exp_avg": torch.zeros(2, 2)}
    assert auditing.what_became_of(before, after, weight) == "changed"


def test_moments_that_come_from_nowhere_are_new():
    def fill(agent):
        for parameter in agent.online.head.theta_prime_1.parameters():
            agent.optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": parameter + 1}

    assert moments_after(fill)["θ′₁"] == "new"


def test_an_optimizer_whose_state_holds_none_is_read():
    agent = Agent()
    agent.optimizer = torch.optim.SGD(agent.online.parameters(), lr=1e-2)
    agent.update()
    for parameter in agent.online.parameters():
        agent.optimizer.state[parameter]["momentum_buffer"] = None
    assert faults_of_injection(audited(agent, agent.inject)) == ["φ's moments are not kept: empty"]


def test_a_count_of_steps_that_is_a_plain_number_is_shared_by_nobody():
    """As Stable-Baselines3's RMSpropTFLike has it. Tensors made of numbers may get one another's memory."""
    agent = Agent()
    for state in agent.optimizer.state.values():
        state["step"] = int(state["step"])
    made = torch.tensor(5.0)
    original = auditing.state_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "state_of", lambda *given: original(*given) | {"step": made})
        assert auditing.shared_moments(agent.look()) == set()


# gradients, and what cannot be audited


def test_the_gradients_error_is_a_share_of_the_formulas():
    agent = Agent()
    look = agent.look()
    assert auditing.gradient_error(look) < 1e-5
    for factor, error in ((2.0, 0.5), (0.5, 1.0), (0.0, math.inf)):
        scaled = Audited(**vars(look) | {"formula": lambda obs, factor=factor: factor * agent.online(obs)})
        assert auditing.gradient_error(scaled) == pytest.approx(error, rel=1e-4)


def test_a_gradient_that_is_not_a_number_is_a_fault_and_no_tick():
    agent = Agent()
    agent.formula = lambda obs: math.nan * agent.online(obs)
    findings = audited(agent, agent.inject)
    assert faults_of_injection(findings) == [
        "φ's gradient is not that of the whole sum, it is off by nan%: is a head detached?"
    ]
    assert "✓" not in table({"x": findings})


def test_parts_that_cannot_be_audited_are_refused_in_one_line_with_the_fix():
    agent = Agent()
    parts = {"φ": "encoder", "θ": "head.theta"}

    def look():
        return Audited(**vars(agent.look()) | {"parts": parts})

    findings = audit(look, lambda: None)
    with pytest.raises(UsageError, match=r"^there is no part θ′₁, θ′₂: name its path in the network$"):
        faults_of_injection(findings)
    parts["ReLU"] = "encoder.1"
    with pytest.raises(
        UsageError, match=r"^ReLU, at encoder\.1, has no parameters: name a part that has some$"
    ):
        audit(look, lambda: None)
    parts = {"θ": "head.theta"}
    with pytest.raises(UsageError, match=r"^the parts are θ: name the encoder's path, as φ$"):
        audit(look, lambda: None)


# the table


def test_a_table_shows_each_finding_in_a_word_or_two():
    agent = KeepsMoments()
    rows = {"keep": audited(agent, agent.inject)}
    agent = TrainsAllHeads()
    rows["all"] = audited(agent, agent.inject)
    agent = TargetGetsParametersAlone()
    rows["parameters alone"] = audited(agent, agent.inject)
    agent = TwinIsDetached()
    rows["detached"] = audited(agent, agent.inject)
    agent = HeadIsNeverTrained()
    rows["never trained"] = audited(agent, agent.inject)
    agent = Agent()
    rows["nothing"] = audited(agent, lambda: agent.optimizer.state.clear())
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + len(rows)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["arm", "changed", "updates", "optimizer", "moments", "ΔQ", "target", "∇φ", "trained"]
    assert set("".join(cells[1])) == {"-"}
    expected = ["keep", "θ′₁ θ′₂", "φ θ′₁", "all"]
    expected += ["kept φ θ, copied θ′₁, empty θ′₂", "0", "copy", "✓", "1.04k"]
    assert cells[2] == expected
    assert cells[3][2] == "φ θ θ′₁ θ′₂" and cells[3][8] == "1.04k → 2.91k"
    assert cells[4][6] == "copy but for its state" and cells[4][4] == "kept φ θ, empty θ′₁ θ′₂"
    assert cells[5][7].startswith("off by ")
    assert cells[6][2:4] == ["φ", "φ θ"]
    nothing = ["nothing", "–", "φ θ", "all", "emptied φ θ, empty θ′₁ θ′₂", "0", "–", "✓", "1.04k"]
    assert cells[7] == nothing
