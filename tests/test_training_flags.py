"""Flags of the training script: what it makes of them, and how a field becomes flags again."""

import sys

import pytest

from dqn_injection_atari import Args
from orchestration.training_flags import as_flags, parsed, words_of
from support.usage import UsageError, flags_given


def test_the_training_script_reads_the_flags_and_the_sweeps_own_command_line_is_as_before():
    before = list(sys.argv)
    assert parsed(["--seed", "3", "--no-cuda"]) == Args(seed=3, cuda=False)
    assert flags_given(["--seed", "3", "--no-cuda", "--tau=1.0"]) == {"seed", "cuda", "tau"}
    with pytest.raises(UsageError, match="num_envs is 0"):
        parsed(["--num-envs", "0"])
    assert sys.argv == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--foo", "1"], "Unrecognized options: --foo, 1"),
        (["--seed", "x"], "Error parsing --seed: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_what_it_refuses_is_one_line_without_the_box_around_it(flags, words, capsys):
    with pytest.raises(UsageError) as refusal:
        parsed(flags)
    script, _, fix = str(refusal.value).removeprefix(f"{words}: python ").partition(" ")
    assert script.endswith("dqn_injection_atari.py") and fix == "--help lists flags"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value", "flags"),
    [
        ("learning_rate", 5e-4, ("--learning-rate", "0.0005")),
        ("learning_rate", "5e-4", ("--learning-rate", "5e-4")),
        ("injection_step", (10, 20), ("--injection-step", "10", "20")),
        ("injection_step", ("10", "20"), ("--injection-step", "10", "20")),
        ("wandb_project_name", "it's mine", ("--wandb-project-name", "it's mine")),
        ("injection_step", (), ("--injection-step",)),
        ("freeze_heads", False, ("--no-freeze-heads",)),
        ("bf16", "True", ("--bf16",)),
        ("injected_head_width", 1024, ("--injected-head-width", "1024")),
    ],
)
def test_a_field_becomes_flags_by_its_value_or_by_a_users_words_for_it(name, value, flags):
    assert as_flags(name, value) == flags


def test_a_field_that_is_true_or_false_takes_no_other_word():
    with pytest.raises(UsageError, match="bf16 is maybe, but must be true or false: change it in --grid"):
        as_flags("bf16", "maybe")


def test_words_are_taken_as_a_shell_takes_them():
    assert words_of("--exp-name 'a b' --seed 3") == ["--exp-name", "a b", "--seed", "3"]
    with pytest.raises(UsageError, match=r"'a is no part of a command line \(No closing"):
        words_of("'a")
