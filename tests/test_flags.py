"""Flags of any run: which there are, and which contradict each other."""

from dataclasses import fields

import pytest

from alternatives import AlternativeSettings
from dqn_injection_atari import Args, Experiment
from support.flags import RunFlags
from support.usage import UsageError


def names(settings):
    return [field.name for field in fields(settings)]


def test_the_fields_of_a_run_are_those_of_the_experiment_of_the_alternatives_and_of_every_run():
    assert names(Args) == [*names(Experiment), *names(AlternativeSettings), *names(RunFlags)]
    assert len(set(names(Args))) == len(names(Args))
    first = ["env_id", "seed", "exp_name", "total_timesteps", "num_envs", "env_backend"]
    assert names(Experiment)[:6] == first
    assert names(Experiment)[6] == "injection_step", "what this script is about comes next"


CONTRADICTIONS = [
    ({"eval_steps": 100}, "give --eval-episodes 0 with --eval-steps, or the other way round"),
    ({"eval_episodes": 0}, "give --eval-episodes 0 with --eval-steps, or the other way round"),
    ({"capture_video": True}, "give --eval-frequency"),
    ({"resume": "a", "fork": "b"}, "give one of --resume, --fork and --evaluate"),
    ({"resume": "a", "evaluate": "b"}, "give one of --resume, --fork and --evaluate"),
    ({"fork": "a", "evaluate": "b"}, "give one of --resume, --fork and --evaluate"),
]


@pytest.mark.parametrize(("flags", "fix"), CONTRADICTIONS, ids=str)
def test_flags_that_contradict_each_other_are_refused_with_the_fix(flags, fix):
    with pytest.raises(UsageError, match=f"{fix}$"):
        RunFlags(**flags).check_flags()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"eval_steps": 100, "eval_episodes": 0},
        {"capture_video": True, "eval_frequency": 9},
        {"capture_video": True, "evaluate": "a"},
        {"fork": "a"},
        {"resume": ""},
    ],
    ids=str,
)
def test_flags_that_go_together_are_taken(flags):
    RunFlags(**flags).check_flags()
