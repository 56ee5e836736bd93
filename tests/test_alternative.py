"""What an injection is compared with: one list gives flags, words and what a fork may change."""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from conftest import make_learner, random_batch, status_of

import dqn_injection_atari as script
from alternatives import ALTERNATIVES, SETTINGS
from alternatives.alternative import (
    AgentParts,
    Alternative,
    NoSettings,
    Words,
    by_name,
    refuse_shared_fields,
)
from dqn_injection_atari import FORKABLE, INTERVENTIONS, OF_INTERVENTION, Args, Intervention
from support.optimizers import moments_by_name
from support.usage import OnlyWith, UsageError, conditions

ROOT = Path(script.__file__).resolve().parent
LIST = tuple(ALTERNATIVES.values())
CHOICES = ("injection", *(alternative.name for alternative in LIST), "none")

each_alternative = pytest.mark.parametrize("alternative", LIST, ids=lambda alternative: alternative.name)


# the list


def test_the_list_gives_the_choices_of_the_flag_to_its_help_and_its_refusal(monkeypatch, capsys):
    assert get_args(Intervention) == CHOICES
    assert list(ALTERNATIVES) == [alternative.name for alternative in LIST]
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    monkeypatch.setenv("COLUMNS", "200")  # or the list goes over two lines
    assert status_of(script.main) == 0
    assert f"--intervention {{{','.join(CHOICES)}}}" in capsys.readouterr().out
    with pytest.raises(UsageError, match=f"must be one of {', '.join(CHOICES)}: change --intervention"):
        Args(intervention="nothing", injection_step=(5,))


def test_no_word_is_used_twice():
    for word in ("log", "noun", "plural", "deed"):
        assert len({getattr(words, word) for words in INTERVENTIONS.values()}) == len(INTERVENTIONS), word


@pytest.mark.parametrize("name", ["injection", "none", "redo"])
def test_a_name_that_is_taken_is_refused(name):
    another = replace(ALTERNATIVES["reset-head"], name=name)
    with pytest.raises(UsageError, match=f"^the name {name} is taken: give the alternative another$"):
        by_name([ALTERNATIVES["redo"], another])
    assert by_name([ALTERNATIVES["fire"], replace(another, name="mine")]).keys() == {"fire", "mine"}


@dataclass(frozen=True)
class AnotherFactor:
    """Has a setting that shrink and perturb has, too."""

    shrink_factor: float = 0.1


@dataclass(frozen=True)
class AnotherRate:
    """Has a setting that every run has."""

    learning_rate: float = 0.1


def test_a_setting_whose_name_is_taken_is_refused():
    """Or the one would get the other's default, in all runs, without a word."""
    both = "ShrinkPerturbSettings and AnotherFactor have a setting shrink_factor each: rename one"
    with pytest.raises(UsageError, match=f"^{both}$"):
        refuse_shared_fields(*SETTINGS, AnotherFactor)
    both = "Experiment and AnotherRate have a setting learning_rate each: rename one"
    with pytest.raises(UsageError, match=f"^{both}$"):
        refuse_shared_fields(script.Experiment, AnotherRate)


def test_moments_are_a_choice_where_layers_are_drawn_anew():
    """Also where the encoder alone is."""
    drawing = [alternative.name for alternative in LIST if alternative.draws_layers]
    assert conditions(Args)["moments"] == OnlyWith("intervention", ("injection", *drawing, "none"))
    for head, encoder in ((False, False), (True, False), (False, True), (True, True)):
        alternative = replace(ALTERNATIVES["reset-head"], draws_head=head, draws_encoder=encoder)
        assert alternative.draws_layers == (head or encoder)


@each_alternative
def test_words_come_from_the_list(alternative):
    assert INTERVENTIONS[alternative.name] is alternative.words
    for word in fields(Words):
        text = getattr(alternative.words, word.name)
        assert text and text == text.strip() and "\n" not in text and not text.endswith(".")


@each_alternative
def test_settings_are_flags_that_a_fork_may_change_and_that_only_this_alternative_and_a_baseline_take(
    alternative,
):
    names = {field.name for field in fields(alternative.settings)}
    assert names <= {field.name for field in fields(Args)}
    assert names <= set(FORKABLE) and names <= set(OF_INTERVENTION)
    assert conditions(alternative.settings) == dict.fromkeys(
        names, OnlyWith("intervention", (alternative.name, "none"))
    )


@each_alternative
def test_an_alternative_without_a_step_is_refused(alternative):
    with pytest.raises(UsageError, match=f"^intervention {alternative.name} would never happen: give "):
        Args(intervention=alternative.name)
    with pytest.raises(UsageError) as error:
        Args(intervention=alternative.name)
    assert ("--injection-trigger norm" in str(error.value)) == (alternative.period is None)
    if alternative.period is None:
        Args(intervention=alternative.name, injection_trigger="norm")


@pytest.mark.parametrize("drawn", [{"draws_head": True}, {"draws_head": False, "draws_encoder": True}])
def test_one_that_goes_on_every_so_often_and_draws_layers_anew_is_refused(drawn):
    with pytest.raises(
        UsageError, match=r"redo draws layers anew, .+: give several steps to --injection-step"
    ):
        replace(ALTERNATIVES["redo"], **drawn)
    replace(ALTERNATIVES["redo"], **drawn, period=None)


# its settings


@dataclass(frozen=True)
class NoOps:
    """--no-op-share would take back a flag --op-share."""

    no_op_share: float = 0.1


def test_a_setting_whose_flag_would_take_one_back_is_refused():
    with pytest.raises(
        UsageError, match=r"^no_op_share would be a flag like --no-\.\.\., .+: call it otherwise$"
    ):
        replace(ALTERNATIVES["reset-head"], settings=NoOps)


@dataclass(frozen=True)
class Halves:
    """Settings that may contradict each other."""

    first: float = 0.5
    second: float = 0.5

    def __post_init__(self):
        if self.first + self.second != 1:
            raise UsageError("first and second are not 1 together: change one")


def do_nothing(parts, settings):
    pass


WORDS = Words(log="nothing done", noun="nothing", plural="nothings", deed="doing nothing")


def test_settings_are_picked_from_whatever_has_them_as_attributes_and_checked():
    alternative = Alternative(name="halves", words=WORDS, apply=do_nothing, draws_head=False, settings=Halves)
    flags = SimpleNamespace(first=0.25, second=0.75, seed=3)
    assert alternative.settings_in(flags) == Halves(0.25, 0.75)
    flags.second = 0.5
    with pytest.raises(UsageError, match="change one"):
        alternative.settings_in(flags)
    with pytest.raises(AttributeError, match="second"):
        alternative.settings_in(SimpleNamespace(first=0.25))


def test_by_default_there_are_no_settings():
    alternative = Alternative(name="nothing", words=WORDS, apply=do_nothing, draws_head=False)
    assert alternative.settings_in(SimpleNamespace(seed=3)) == NoSettings()


# what it gets, and what is done for it


def intervening(monkeypatch, alternative, **settings):
    """A learner that has learned, with this alternative in the place of head reset."""
    monkeypatch.setitem(ALTERNATIVES, "reset-head", alternative)
    learner = make_learner(intervention="reset-head", **settings)
    for k in range(3):
        learner.update(random_batch(k))
    return learner


def numbers(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_it_gets_what_learns_and_makers_of_new_parts_that_move_no_other_random_number(monkeypatch):
    drawn = []
    given = []

    def apply(parts, settings):
        given.append(parts)
        assert not torch.is_grad_enabled() and settings == NoSettings()
        for _ in range(2):
            drawn.append((numbers(parts.draw_encoder()), numbers(parts.draw_head())))

    learner = intervening(
        monkeypatch, Alternative(name="reset-head", words=WORDS, apply=apply, draws_head=True)
    )
    state = torch.get_rng_state()
    learner.intervene(step=10)
    assert torch.equal(torch.get_rng_state(), state)
    (parts,) = given
    assert isinstance(parts, AgentParts) and parts.optimizer is learner.optimizer
    assert parts.encoder is learner.q_network.encoder and parts.head is learner.q_network.head.theta
    for first, second in zip(*drawn, strict=True):
        assert first.shape == second.shape and not torch.equal(first, second), "each is another one"
    assert drawn[0][0].shape == numbers(parts.encoder).shape
    assert drawn[0][1].shape == numbers(parts.head).shape
    learner.intervene(step=20)
    assert not torch.equal(drawn[0][1], drawn[2][1]), "and another one at the next intervention"

    again = intervening(
        monkeypatch, Alternative(name="reset-head", words=WORDS, apply=apply, draws_head=True)
    )
    again.intervene(step=10)
    for first, second in zip(drawn[0], drawn[4], strict=True):
        assert torch.equal(first, second), "which depends on the seed and their number alone"


@pytest.mark.parametrize("moments", ["fresh", "keep"])
def test_where_it_does_not_draw_the_head_anew_the_heads_moments_and_initial_norm_stay(monkeypatch, moments):
    def halve(parts, settings):
        for parameter in parts.head.parameters():
            parameter.mul_(0.5)

    alternative = Alternative(name="reset-head", words=WORDS, apply=halve, draws_head=False)
    learner = intervening(monkeypatch, alternative, moments=moments)
    before = numbers(learner.q_network.head.theta)
    known = set(moments_by_name(learner.optimizer, learner.q_network))
    initial = dict(learner.norms.initial)
    learner.intervene(step=10)
    assert torch.equal(numbers(learner.q_network.head.theta), 0.5 * before)
    assert torch.equal(numbers(learner.target_network.head.theta), 0.5 * before)
    assert set(moments_by_name(learner.optimizer, learner.q_network)) == known
    assert learner.norms.initial == initial
