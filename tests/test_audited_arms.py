"""Every arm, done to one Atari agent: what the table says of each, and which agents it takes."""

import functools
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_GAMES, make_learner, random_batch
from saved_agents import CPU, SMALL, change

from alternatives import ALTERNATIVES, redo
from analysis import audited_arms
from analysis.audit import SAME_GRADIENT, table
from analysis.audited_arms import arms, audit_arm, print_audit, q_by_the_equation, saved_subject
from dqn_injection_atari import Learner
from support import measures
from support.optimizers import moments_by_name
from support.usage import UsageError

PAGE = Path(audited_arms.__file__).parent.parent / "docs" / "arms.md"
BEGIN, END = "<!-- audit -->", "<!-- end of audit -->"

fresh_subject = functools.partial(
    audited_arms.fresh_subject, TINY_GAMES, head_width=16, batch_size=8, cuda=False
)


@pytest.fixture(autouse=True, scope="module")
def fewer_observations():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audited_arms, "OBSERVATIONS", 16)
        yield


@pytest.fixture(scope="module")
def subject():
    return fresh_subject()


@pytest.fixture(scope="module")
def audits(subject):
    """{arm: (findings, faults)}"""
    return {name: found for name, *found in audited_arms.audit_arms(subject)}


def rows_of(text):
    """{arm: {column: cell}} of a table."""
    names, _, *lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    names = [name.strip() for name in names]
    rows = {}
    for line in lines:
        cells = dict(zip(names, [cell.strip() for cell in line], strict=True))
        rows[cells.pop("arm")] = cells
    return rows


@pytest.fixture(scope="module")
def rows(audits):
    return rows_of(table({name: findings for name, (findings, _) in audits.items()}))


# the equation


def test_the_encoder_is_written_out_with_all_that_its_layers_have():
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 5, stride=3, padding=2, dilation=2, groups=2),
        torch.nn.GroupNorm(4, 8, eps=0.1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
    )
    obs = random_batch(0).observations
    torch.testing.assert_close(audited_arms.encode(encoder, obs), encoder(obs / 255))


def test_a_layer_that_it_does_not_know_is_refused_by_name():
    for layer in (torch.nn.MaxPool2d(2), torch.nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")):
        encoder = torch.nn.Sequential(layer, torch.nn.Flatten())
        refusal = f"^the audit does not know the encoder's {re.escape(str(layer))}: write it out in encode"
        with pytest.raises(UsageError, match=refusal):
            audited_arms.encode(encoder, random_batch(0).observations)


# what each arm does


def test_there_is_a_row_for_each_arm_in_each_of_its_kinds(rows):
    assert list(rows) == list(arms()) and len(rows) == 15
    assert {name.partition(",")[0] for name in rows} == {"none", "injection", *ALTERNATIVES}
    for name, alternative in ALTERNATIVES.items():
        assert (f"{name}, keep" in rows) == alternative.draws_layers
    for name, arguments in arms().items():
        alternative = ALTERNATIVES.get(arguments["intervention"])
        if name.startswith("injection") or (alternative is not None and alternative.draws_layers):
            expected = "keep" if name.endswith(", keep") else "fresh"
            assert arguments["moments"] == expected, "not the run's own"
    assert {"injection, keep", "injection, all heads", "reset-moments, head", "reset-moments, all"} < set(
        rows
    )


@pytest.mark.parametrize(
    ("arm", "changed", "moments"),
    [
        ("none", "–", "kept φ θ"),
        ("injection", "θ′₁ θ′₂", "kept φ θ, empty θ′₁ θ′₂"),
        ("injection, keep", "θ′₁ θ′₂", "kept φ θ, copied θ′₁, empty θ′₂"),
        ("injection, all heads", "θ′₁ θ′₂", "kept φ θ, empty θ′₁ θ′₂"),
        ("reset-moments, head", "–", "kept φ, emptied θ"),
        ("reset-moments, all", "–", "emptied φ θ"),
        ("reset-head", "θ", "kept φ, emptied θ"),
        ("reset-head, keep", "θ", "kept φ θ"),
        ("shrink-perturb", "φ θ", "kept φ, emptied θ"),
        ("shrink-perturb, keep", "φ θ", "kept φ θ"),
        ("reset-all", "φ θ", "emptied φ θ"),
        ("reset-all, keep", "φ θ", "kept φ θ"),
        ("fire", "φ* θ", "kept φ, emptied θ"),
        ("fire, keep", "φ* θ", "kept φ θ"),
        ("redo", "φ* θ*", "zeroed in part φ θ"),
    ],
)
def test_the_table_says_what_an_arm_does(rows, arm, changed, moments):
    row = rows[arm]
    assert (row["changed"], row["moments"]) == (changed, moments)
    learning = "φ θ"
    if arm.startswith("injection"):
        learning = "φ θ′₁"
    if arm == "injection, all heads":
        learning = "φ θ θ′₁ θ′₂"
    assert row["updates"] == learning and row["optimizer"] == "all" and row["∇φ"] == "✓"
    assert row["target"] == ("–" if arm in ("none", "redo") else "copy")
    assert (row["ΔQ"] == "0") == arm.startswith(("none", "injection", "reset-moments"))
    assert ("→" in row["trained"]) == (arm == "injection, all heads")


def test_nothing_is_wrong_with_injections_and_recycling(audits):
    assert {name for name, (_, faults) in audits.items() if faults} == set()


def test_injections_into_a_network_with_layer_norm_have_no_fault(checkpoint):
    """Its bias is drawn as zeros, so θ′₁ changes in part at the injection, which is right."""
    args = replace(SMALL, layer_norm=True)
    change(checkpoint, learner=Learner(args, 8, CPU), **asdict(args))
    subject = saved_subject(checkpoint)
    for name in INJECTIONS:
        assert audited_arms.faults(subject, arms()[name], audit_arm(subject, arms()[name])) == [], name


def test_recycling_is_judged_in_a_fresh_agent_alone(subject, audits, checkpoint):
    nothing_recycled = audits["none"][0]
    assert audited_arms.faults(subject, arms()["redo"], nothing_recycled) == [
        "nothing was recycled: silence some units first"
    ]
    assert audited_arms.faults(saved_subject(checkpoint), arms()["redo"], nothing_recycled) == []


@pytest.mark.parametrize("batch_size", [0, 64])
def test_an_alternative_that_looks_at_no_observations_is_given_none(subject, monkeypatch, batch_size):
    seen = []
    other = replace(
        ALTERNATIVES["redo"],
        batch_size=batch_size,
        apply=lambda parts, _: seen.append(set(parts.activations)),
    )
    monkeypatch.setitem(ALTERNATIVES, "redo", other)
    audit_arm(subject, arms()["redo"])
    assert seen == [{"conv1", "conv2", "conv3", "head"} if batch_size else set()]


def test_recycled_units_reach_nothing_and_a_new_head_does(audits):
    assert not audits["redo"][0].new_reaches_q and audits["reset-head"][0].new_reaches_q


def test_every_arm_begins_with_the_same_agent(subject, audits):
    for name in ("redo", "reset-all", "none"):
        assert audit_arm(subject, arms()[name]) == audits[name][0]


def categories(rows):
    """Without floats: whether Q changed, and whether more is trained."""
    found = {}
    for name, row in rows.items():
        found[name] = row | {"ΔQ": row["ΔQ"] != "0", "trained": "→" in row["trained"]}
    return found


def test_the_page_of_arms_shows_what_an_audit_finds(rows):
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    shown = text[text.index(BEGIN) : text.index(END)]
    assert categories(rows_of(shown)) == categories(rows)
    assert audited_arms.LEGEND in shown


# wrong arms


INJECTIONS = ("injection", "injection, keep", "injection, all heads")
of_injections_and_redo = {name: arms()[name] for name in (*INJECTIONS, "redo")}


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def small_and_fresh(subject, monkeypatch):
    """A fresh agent that is small and there already."""
    monkeypatch.setattr(audited_arms, "fresh_subject", lambda env_id: subject)


def test_what_is_wrong_with_an_arm_stands_below_the_table(small_and_fresh, monkeypatch, capsys):
    monkeypatch.setattr(audited_arms, "arms", lambda: of_injections_and_redo)
    print_audit("fresh", TINY_GAMES)
    right = lines_of(capsys)
    assert right[0].startswith(f"{TINY_GAMES}, 100 updates on random play, 2 units of each layer silenced")
    assert right[-1] == "no fault in injections and recycling"
    assert rows_of("\n".join(right)).keys() == of_injections_and_redo.keys()

    choose = redo.choose

    def in_another_order(units, tensor, axis):
        if axis == 0:
            return choose(units, tensor, axis)
        mask = units.repeat(tensor.shape[1] // len(units))
        return mask.view(1, -1, *(1 for _ in tensor.shape[2:]))

    monkeypatch.setattr(redo, "choose", in_another_order)
    monkeypatch.setattr(Learner, "_after_intervention", lambda learner, step: None)
    with pytest.raises(SystemExit, match=r"^1$"):
        print_audit("fresh", TINY_GAMES)
    wrong = [line for line in lines_of(capsys) if line.startswith("wrong, ")]
    stays_behind = "the target stays behind: it is no copy of the online network after the injection"
    assert wrong[:3] == [f"wrong, {name}: {stays_behind}" for name in INJECTIONS]
    assert len(wrong) == 4 and wrong[3].startswith("wrong, redo: recycled units reach Q: ")


# the formula


@pytest.mark.parametrize(
    "settings", [{}, {"layer_norm": True}, {"shared_bias": True}, {"injected_head_width": 80}], ids=str
)
def test_the_written_out_formula_is_the_networks_q_whatever_the_network(settings):
    learner = make_learner(**settings)
    for seed in range(4):
        learner.update(random_batch(seed))
        if seed in (1, 2):
            learner.inject(10 * seed)
    obs = random_batch(9).observations
    by_network = learner.q_network(obs)
    by_hand = q_by_the_equation(learner.q_network, obs)
    assert torch.allclose(by_network, by_hand, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        learner.q_network.head.theta_prime_2[1].output.bias += 1
    assert torch.allclose(learner.q_network(obs), q_by_the_equation(learner.q_network, obs), atol=1e-5)
    assert torch.allclose(by_network - 1, q_by_the_equation(learner.q_network, obs), atol=1e-5)


# agents


def test_a_fresh_agent_has_learned_from_random_play_without_a_sync_and_has_two_silent_units_in_each_layer(
    subject,
):
    saved = subject.checkpoint
    learner = Learner(replace(SMALL, head_width=16, injection_step=()), 8, CPU)
    learner.load_state_dict(saved.state["learner"])
    steps = {
        float(moments["step"]) for moments in moments_by_name(learner.optimizer, learner.q_network).values()
    }
    assert steps == {100.0}

    batch = subject.replay.sample(64)
    assert batch.observations.float().std() > 1 and subject.replay.timeouts.any(), "games that were cut"
    assert not torch.equal(learner.q_network(batch.observations), learner.target_network(batch.observations))
    _, layers = measures.activations(learner.q_network, learner.q_network.relus(), batch.observations)
    for name, values in layers.items():
        silent = (values.transpose(0, 1).flatten(start_dim=1) == 0).all(dim=1)
        assert silent[:2].all(), name
    assert not layers["conv1"].transpose(0, 1).flatten(start_dim=1)[2:].eq(0).all()
    learner.update(batch)
    _, later = measures.activations(learner.q_network, learner.q_network.relus(), batch.observations)
    assert not later["conv1"][:, :2].any() and not later["head"][:, :2].any(), "they have momentum"
    assert (learner.q_network.encoder[0].bias[:2] < -0.5).all(), "and stay silent in any case"

    again = fresh_subject()
    for name, values in saved.state["learner"]["q_network"].items():
        assert torch.equal(values, again.checkpoint.state["learner"]["q_network"][name]), name


def test_a_checkpoints_own_agent_and_replay_are_audited(checkpoint, capsys):
    print_audit(str(checkpoint))
    lines = lines_of(capsys)
    assert lines[0] == f"{checkpoint}: {TINY_GAMES}, step 180"
    rows = rows_of("\n".join(lines))
    assert rows.keys() == arms().keys()
    assert {row["target"] for row in rows.values()} == {"–", "copy"}, "also where its last step was a sync"
    assert {row["∇φ"] for row in rows.values()} == {"✓"} and rows["injection"]["ΔQ"] == "0"
    subject = saved_subject(checkpoint)
    assert subject.replay.size() == 90 and not subject.is_fresh
    assert lines[-1] == "no fault in injections; recycling is judged in a fresh agent only"


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"intervention": "none"},
        {"intervention": "reset-head", "moments": "keep"},
        {"intervention": "shrink-perturb", "shrink_factor": 0.5},
        {"intervention": "redo", "redo_threshold": 0.1},
        {"injection_trigger": "norm", "injection_step": (), "injection_norm_ratio": 2.0},
        {"optimizer": "rmsprop", "shared_bias": True, "weight_decay": 1e-3},
        {"layer_norm": True},
        {"freeze_heads": False},
    ],
    ids=str,
)
def test_agents_of_all_kinds_of_runs_are_audited(checkpoint, settings):
    args = replace(SMALL, **settings)
    learner = Learner(args, 8, CPU)
    change(checkpoint, learner=learner, **asdict(args))
    for name in ("injection", "injection, all heads", "shrink-perturb, keep", "redo"):
        findings = audit_arm(saved_subject(checkpoint), arms()[name])
        assert findings.gradient_error < SAME_GRADIENT, name
        assert not findings.target_equal_before, "as it was in the checkpoint"
        if name == "injection":
            assert findings.parts["θ"].first_update == "none"


def test_the_agent_that_was_saved_is_audited_with_the_run_s_own_seed(checkpoint):
    def change_of_q():
        return audit_arm(saved_subject(checkpoint), arms()["reset-head"]).max_abs_delta_q

    def lift(q_network):
        q_network["head.theta.output.bias"] += 100

    before = change_of_q()
    change(checkpoint, seed=5)
    assert change_of_q() != before
    change(checkpoint, network=lift)
    assert change_of_q() > 50


def test_a_setting_of_the_run_counts_where_its_arm_is_audited(checkpoint):
    def change_of_q(factor):
        args = replace(SMALL, intervention="shrink-perturb", shrink_factor=factor)
        change(checkpoint, **asdict(args))
        return audit_arm(saved_subject(checkpoint), arms()["shrink-perturb"]).max_abs_delta_q

    assert change_of_q(0.8) != change_of_q(0.2)


def test_an_arm_that_the_runs_settings_do_not_allow_is_left_out_and_says_why(checkpoint, monkeypatch, capsys):
    args = replace(SMALL, injected_head_width=96)
    change(checkpoint, learner=Learner(args, 8, CPU), injected_head_width=96)
    monkeypatch.setattr(audited_arms, "arms", lambda: of_injections_and_redo)
    print_audit(str(checkpoint))
    lines = lines_of(capsys)
    assert lines[0].startswith("left out: injection, keep, a head of another width has no moments to copy")
    rows = rows_of("\n".join(lines))
    assert list(rows) == ["injection", "injection, all heads", "redo"]
    assert "→" in rows["injection"]["trained"]


def test_a_checkpoint_behind_an_injection_or_without_replay_is_refused(checkpoint, injected_checkpoint):
    with pytest.raises(UsageError, match=r"lies behind an injection, .*: give the checkpoint before it"):
        saved_subject(injected_checkpoint)
    with pytest.raises(UsageError, match="there is no folder nowhere: give runs/FOLDER/checkpoint-STEP"):
        saved_subject(Path("nowhere"))


def test_a_checkpoint_before_the_first_step_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(audited_arms.FrameReplayBuffer, "size", lambda replay: 0)
    with pytest.raises(UsageError, match="has an empty replay: take a later one"):
        saved_subject(checkpoint)


def test_the_replays_own_draws_do_not_depend_on_how_often_an_arm_is_audited(subject):
    audit_arm(subject, arms()["none"])
    first = subject.replay.generator.bit_generator.state
    audit_arm(subject, arms()["none"])
    assert subject.replay.generator.bit_generator.state == first
    assert isinstance(subject.replay.generator, np.random.Generator)
