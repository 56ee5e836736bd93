"""Runs that begin at a checkpoint of another: forks, and several continuations of one agent."""

import copy
import json
import os
import re
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import scalars
from interruptions import (
    END,
    LATER,
    NORM,
    OFTEN,
    OVERLAP,
    PLAYING,
    SMALL,
    Killed,
    all_files,
    assert_same_end,
    flags_of,
    fork,
    interventions_before,
    kill,
    killed_in,
    main,
    names,
    new_folder,
    send,
    train_until,
    uninterrupted_runs,  # noqa: F401 (a fixture)
    until_signal,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_injection_atari as script
import support.runs as runs
from benchmarks import kill_test
from benchmarks.kill_test import content, differences, flat
from dqn_injection_atari import FORKABLE, OF_NORM, Args, check_fork, train
from orchestration.plan import Asked, all_arms, plan
from support.checkpoints import Checkpoint, load_checkpoint
from support.environments import LearnerView
from support.run_log import RunLog
from support.runs import Origin, Run
from support.usage import UsageError

# keeps the checkpoint at step 142, where the injection would be
BASELINE = replace(SMALL, intervention="none")
TWICE = replace(SMALL, injection_step=(142, 190))


# fork


RECYCLING: dict[str, Any] = {"intervention": "redo", "redo_frequency": 20, "redo_threshold": 0.5}
ARMS = {
    "the injection": {"intervention": "injection"},
    "another one later": {"intervention": "injection", "injection_step": (142, 190)},
    "shrink-perturb": {"intervention": "shrink-perturb"},
    "reset of all moments": {"intervention": "reset-moments", "reset_moments_of": "all"},
    "full reset": {"intervention": "reset-all"},
    "FIRE": {"intervention": "fire"},
    "ReDo": RECYCLING,
    "the baseline itself": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_forked_from_a_baseline_equals_the_run_that_was_in_its_arguments_from_the_start(
    uninterrupted, arm
):
    folder = fork(uninterrupted(BASELINE) / "checkpoint-142", BASELINE, **ARMS[arm])
    same = replace(BASELINE, **ARMS[arm])
    assert_same_end(folder, uninterrupted(same))
    once = same.intervention not in ("none", "redo")
    assert interventions_before(folder / END) == (list(same.injection_step) if once else [])


REDO = replace(SMALL, **RECYCLING)


@pytest.mark.slow
def test_a_fork_from_where_units_are_recycled_first_and_the_target_is_synced_equals_the_whole_run(
    uninterrupted,
):
    baseline = replace(BASELINE, injection_step=(150,), plasticity_frequency=0)
    assert baseline.target_network_frequency == 50 and baseline.tau == 1
    folder = fork(uninterrupted(baseline) / "checkpoint-150", baseline, **RECYCLING)
    whole = uninterrupted(replace(baseline, **RECYCLING))
    assert_same_end(folder, whole)
    recycled = scalars(whole)["injection/recycled/head"]
    assert [step for step, _ in recycled] == [150, 170, 190, 210, 230]


@pytest.mark.slow
def test_where_syncs_are_soft_a_fork_that_recycles_at_once_does_not_make_one_again(
    uninterrupted, monkeypatch
):
    baseline = replace(BASELINE, injection_step=(150,), tau=0.5)
    checkpoint = uninterrupted(baseline) / "checkpoint-150"
    begun = []

    def note(training):
        begun.append(copy.deepcopy(training.learner.state_dict()))
        raise Killed

    monkeypatch.setattr(script.Training, "advance", note)
    with pytest.raises(Killed):
        fork(checkpoint, baseline, **RECYCLING)
    (state,) = begun
    saved = load_checkpoint(checkpoint).state["learner"]
    assert state["last_repeat"] == 150
    assert differences(flat(state["target_network"]), flat(saved["target_network"])) == []
    assert differences(flat(state["q_network"]), flat(saved["q_network"])) != [], "recycled"


@pytest.mark.slow
def test_units_are_recycled_on_and_on_in_a_run_that_is_killed_without_checkpoints_of_their_own(uninterrupted):
    whole = uninterrupted(REDO)
    assert names(whole) == [END]
    assert [step for step, _ in scalars(whole)["injection/recycled/conv1"]] == [142, 162, 182, 202, 222]
    folder = until_signal(162, REDO)  # recycled in this very step
    assert [step for step, _ in scalars(folder)["injection/recycled/conv1"]] == [142, 162]
    train(Args(resume=str(folder)))
    assert_same_end(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("intervention", ["none", "redo"])
def test_a_fork_without_the_curves_that_tell_since_when_units_were_recycled_is_refused(
    uninterrupted, intervention
):
    shutil.copytree(uninterrupted(REDO) / END, "alone/checkpoint-240")
    with pytest.raises(UsageError, match=r"put them there, or give a checkpoint from before it$"):
        train(replace(REDO, **LATER, fork="alone/checkpoint-240", intervention=intervention))
    assert not Path("runs").exists(), "nothing was begun"
    with pytest.raises(UsageError, match="which tell since when"):
        plan(
            Asked(
                env_ids=(),
                seeds=(2,),
                arms=all_arms((intervention,), {}),
                grid=[],
                flags=[],
                from_checkpoint="alone/checkpoint-240",
                steps=240,
            )
        )


@pytest.mark.parametrize(("begin", "num_envs"), [(162, 1), (161, 2)])
def test_where_units_have_just_been_recycled_a_fork_cannot_begin_to_do_so_with_other_settings(
    begin, num_envs
):
    origin = replace(REDO, num_envs=num_envs)
    checkpoint = checkpoint_of(origin, 162)
    checkpoint.state["learner"]["last_repeat"] = 162
    other = {"redo_threshold": 0.9, "injection_step": (begin,)}
    with pytest.raises(UsageError, match="give an --injection-step of 163 or later, or an earlier"):
        check_fork(replace(origin, **other), checkpoint)
    check_fork(replace(origin, **other | {"injection_step": (163,)}), checkpoint)
    check_fork(origin, checkpoint)


def test_recycling_does_not_follow_an_injection():
    with pytest.raises(UsageError, match="give an earlier checkpoint"):
        check_fork(replace(SMALL, intervention="redo", injection_step=(190,)), FORKED)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 2},
        {"intervention": "none"},
        {"intervention": "injection", "injection_step": (190,)},
        {"intervention": "reset-head", "injection_step": (160,)},
        {"injection_step": (160,), "redo_threshold": 0.1},
    ],
    ids=str,
)
def test_a_fork_later_than_where_units_were_first_recycled_is_possible(changes):
    origin = REDO
    if changes.get("intervention", "redo") not in ("redo", "none"):
        origin = replace(REDO, redo_frequency=Args.redo_frequency, redo_threshold=Args.redo_threshold)
    check_fork(replace(origin, **changes), checkpoint_of(origin, 160))


@pytest.mark.parametrize(
    ("origin", "changes"),
    [
        (BASELINE, {"intervention": "redo"}),
        (REDO, {"redo_threshold": 0.1}),
        (REDO, {"redo_frequency": 40}),
        (REDO, {"injection_step": (100,)}),
    ],
    ids=str,
)
def test_recycling_that_was_not_so_is_refused(origin, changes):
    checkpoint = checkpoint_of(origin, 160)
    with pytest.raises(UsageError, match="give an --injection-step of 160 or later, or an earlier"):
        check_fork(replace(origin, **changes), checkpoint)
    check_fork(replace(origin, **changes | {"injection_step": (160,)}), checkpoint)


@pytest.mark.slow
def test_an_injected_runs_checkpoint_leads_to_its_baseline(uninterrupted):
    forked = fork(uninterrupted(SMALL) / "checkpoint-142", SMALL, intervention="none")
    assert_same_end(forked, uninterrupted(BASELINE))


@pytest.mark.slow
def test_a_fork_in_the_middle_of_overlap_equals_the_run_that_had_the_injection_from_the_start(uninterrupted):
    baseline = replace(OVERLAP, intervention="none")
    forked = fork(until_signal(144, baseline) / "checkpoint-144", baseline, intervention="injection")
    assert_same_end(forked, uninterrupted(OVERLAP), "checkpoint-239")


@pytest.mark.slow
def test_a_checkpoint_where_the_norm_decided_leads_to_its_baseline_and_back(uninterrupted):
    baseline = replace(NORM, intervention="none")
    checkpoint = uninterrupted(NORM) / f"checkpoint-{interventions_before(uninterrupted(NORM) / END)[0]}"
    assert_same_end(fork(checkpoint, NORM, intervention="none"), uninterrupted(baseline))
    assert_same_end(fork(checkpoint, NORM), uninterrupted(NORM))


@pytest.mark.slow
def test_a_longer_run_forked_from_a_finished_one_equals_it(uninterrupted):
    short = replace(OFTEN, total_timesteps=160)
    longer = replace(OFTEN, exploration_fraction=16 / 240)
    assert_same_end(fork(uninterrupted(short) / "checkpoint-160", longer), uninterrupted(longer))


@pytest.mark.slow
def test_a_fork_is_a_run_of_its_own_that_can_be_killed_at_once(uninterrupted, capsys):
    """From between two boundaries, after an injection; killed before its first checkpoint it begins there."""
    origin = until_signal(151, SMALL)
    arm = replace(TWICE, exp_name="arm", fork=str(origin / "checkpoint-152"))
    before = all_files(origin)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunLog, "close", lambda log: log.bar.close())
        patch.setattr(runs, "save_checkpoint", lambda *_: kill())
        train(arm)
    folder = new_folder({origin})
    assert "__arm__" in folder.name and names(folder) == []
    begun = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    origin_id = json.loads((origin / "run.json").read_text(encoding="utf-8"))["run"]
    assert begun["history"] == [{"run": origin_id, "folder": origin.name, "step": 152, "seed": SMALL.seed}]
    capsys.readouterr()
    train_until(155, Args(resume=str(folder)))
    assert f"forked at step 152 from {origin / 'checkpoint-152'}" in capsys.readouterr().out
    assert names(folder) == ["checkpoint-152"], "from now on it does without its origin"
    shutil.move(origin, "elsewhere")
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(TWICE))
    assert load_checkpoint(folder / "checkpoint-240").meta["history"] == begun["history"]
    shutil.move("elsewhere", origin)
    assert all_files(origin) == before
    texts = EventAccumulator(str(folder)).Reload().Tensors("hyperparameters/text_summary")
    shown = {(text.step, text.tensor_proto.string_val[0].decode()) for text in texts}
    ((step, table),) = shown
    assert step == 152 and "|exp_name|arm|" in table and "checkpoint-152|" in table


def test_a_fork_knows_what_it_was_before_it_had_a_folder_of_its_own():
    def origin(folder, step, seed, run_id=None, **more):
        meta = {"run": f"id of {folder}", "step": step, "args": {"seed": seed, "fork": None}, **more}
        return Origin(
            run_id=run_id, checkpoint=Checkpoint(Path(f"runs/{folder}/checkpoint-{step}"), meta, {})
        )

    trunk = {"run": "id of trunk", "folder": "trunk", "step": 80, "seed": 1}
    branch = {"run": "id of branch", "folder": "branch", "step": 142, "seed": 2}
    assert Origin().history == origin("trunk", 80, 1, run_id="id of trunk", history=[]).history == []
    assert origin("trunk", 80, 1, history=[]).history == [trunk]
    assert origin("branch", 142, 2, run_id="id of branch", history=[trunk]).history == [trunk], "resumed"
    assert origin("branch", 142, 2, history=[trunk]).history == [branch, trunk]


@pytest.mark.slow
def test_a_fork_from_a_checkpoint_whose_run_is_gone_works_and_its_curves_begin_there(uninterrupted, capsys):
    shutil.copytree(uninterrupted(BASELINE) / "checkpoint-142", "alone/checkpoint-142")
    folder = fork("alone/checkpoint-142", BASELINE, intervention="injection")
    assert "\nremark: its run's curves do not lie beside that checkpoint" in capsys.readouterr().out
    ours, theirs = (content(run, END) for run in (folder, uninterrupted(SMALL)))
    assert differences(ours, theirs) == ["curves in the run folder"]
    expected = [
        point for point in theirs["curves in the run folder"] if point[1] >= 130
    ]  # those that the checkpoint holds
    assert ours["curves in the run folder"] == expected and "injection/step" in {tag for tag, *_ in expected}


@pytest.mark.slow
def test_a_fork_from_a_link_to_a_checkpoint_has_its_runs_curves(uninterrupted, capsys):
    checkpoint = uninterrupted(BASELINE) / "checkpoint-142"
    Path("agents").mkdir()
    Path("agents/best").symlink_to(checkpoint.absolute(), target_is_directory=True)
    folder = fork("agents/best", BASELINE, intervention="injection")
    assert_same_end(folder, uninterrupted(SMALL))
    assert "remark: its run's curves" not in capsys.readouterr().out


def checkpoint_of(args, step, interventions=()):
    meta = {"args": json.loads(json.dumps(asdict(args))), "step": step}
    return Checkpoint(
        Path(f"runs/x/checkpoint-{step}"), meta, {"learner": {"interventions": list(interventions)}}
    )


FORKED = checkpoint_of(SMALL, 160, (142,))
FINISHED = checkpoint_of(SMALL, 240, (142,))
AT_MOST_ONCE = checkpoint_of(replace(NORM, max_injections=1), 160, (120,))
BY_NORM = {"injection_step": (), "injection_trigger": "norm", "max_injections": 1}
REFUSED_FORKS = {
    "another game": (
        FORKED,
        {"env_id": "PongNoFrameskip-v4"},
        "env_id is PongNoFrameskip-v4, there TinyPhoenix-v5; a fork may",
    ),
    "two differences": (
        FORKED,
        {"gamma": 0.5, "batch_size": 8},
        "gamma is 0.5, there 0.99, batch_size is 8, there 4; a fork may differ",
    ),
    "an injection undone": (
        FORKED,
        {"intervention": "none"},
        "after injections at (142,), but the arguments say none before step 160: give an earlier checkpoint",
    ),
    "an injection moved into the past": (
        FORKED,
        {"injection_step": (130, 142)},
        "say (130, 142) before step 160: give an --injection-step of 142, or an earlier checkpoint",
    ),
    "an injection that never was": (
        checkpoint_of(BASELINE, 160),
        {"intervention": "injection"},
        "after injections at no step, but",
    ),
    "freezing after the fact": (
        FORKED,
        {"freeze_heads": False},
        "after an injection: for another --freeze-heads give an",
    ),
    "another kind": (
        FORKED,
        {"intervention": "reset-head"},
        "for another --intervention give an earlier checkpoint",
    ),
    "other moments": (
        FORKED,
        {"moments": "keep"},
        "for another --moments give an",
    ),
    "as many as the norm may trigger": (
        FORKED,
        BY_NORM,
        "after 1 injections, and max_injections is 1: give a --max-injections of 2",
    ),
    "another norm, where it may trigger no more": (
        AT_MOST_ONCE,
        {"injection_norm_ratio": 2.0},
        "after 1 injections, and max_injections is 1: give a --max-injections of 2",
    ),
    "another head reset": (
        checkpoint_of(replace(SMALL, intervention="reset-head"), 160, (142,)),
        {"injection_step": (130, 142)},
        "lies after head resets at (142,), but",
    ),
    "a head reset that never was": (
        checkpoint_of(BASELINE, 160),
        {"intervention": "reset-head"},
        "after head resets at no step, but",
    ),
    "more head resets than the norm may trigger": (
        checkpoint_of(replace(SMALL, intervention="reset-head"), 160, (142,)),
        BY_NORM,
        "lies after 1 head resets, and max_injections is 1",
    ),
    "an end that has passed": (FORKED, {"total_timesteps": 150}, "give a --total-timesteps of 161 or more"),
    "an end that is now": (FINISHED, {}, "give a --total-timesteps of 241 or more"),
    "another ε schedule": (
        FORKED,
        {"exploration_fraction": 0.2},
        "over 48 steps, but before checkpoint runs/x/checkpoint-160 over",
    ),
    "a longer run": (
        FORKED,
        {"total_timesteps": 480},
        "give --exploration-fraction 0.05 with this --total-timesteps",
    ),
    "the end of a cut vector step": (
        checkpoint_of(replace(SMALL, num_envs=7), 240, (147,)),
        LATER,
        "no multiple of num_envs",
    ),
    "the end within a log interval": (
        checkpoint_of(replace(SMALL, log_frequency=100), 240, (142,)),
        LATER,
        "and log_frequency",
    ),
}


@pytest.mark.parametrize("case", REFUSED_FORKS)
def test_a_fork_that_no_single_run_could_have_come_to_is_refused(case):
    checkpoint, changes, message = REFUSED_FORKS[case]
    with pytest.raises(UsageError) as error:
        check_fork(replace(Args(**checkpoint.meta["args"]), **changes), checkpoint)
    assert message in str(error.value) and "\n" not in str(error.value)


ENDS_LATE = checkpoint_of(replace(SMALL, exploration_fraction=1.0), 160, (142,))


@pytest.mark.parametrize(
    ("checkpoint", "changes", "fix", "done"),
    [
        (
            FORKED,
            {"injection_step": (200,)},
            "give an --injection-step of 142 200, or",
            {"injection_step": (142, 200)},
        ),
        (
            FORKED,
            {"injection_step": (130, 142)},
            "give an --injection-step of 142, or",
            {"injection_step": (142,)},
        ),
        (FORKED, {"injection_step": ()}, "give an --injection-step of 142, or", {"injection_step": (142,)}),
        (
            checkpoint_of(SMALL, 142),
            {"injection_step": (100,)},
            "give an --injection-step of 142 or later",
            {"injection_step": (142,)},
        ),
        (
            AT_MOST_ONCE,
            {"injection_norm_ratio": 2.0},
            "for none beyond these give --injection-trigger step --injection-step 120 "
            "in the place of --injection-norm-ratio",
            {name: getattr(Args, name) for name in OF_NORM} | {"injection_step": (120,)},
        ),
        (
            FINISHED,
            {"injection_step": (100,)},
            "lies at step 240: give a --total-timesteps of 241 or more",
            {"injection_step": (142,), "total_timesteps": 241, "exploration_fraction": 24 / 241},
        ),
        (
            ENDS_LATE,
            {"total_timesteps": 200},
            "give a --total-timesteps of 240 or more",
            {"total_timesteps": 240},
        ),
        (
            FORKED,
            {"total_timesteps": 241},
            "over 24.1 steps, but before checkpoint runs/x/checkpoint-160 over 24: "
            "give --exploration-fraction 0.09958506",
            {"total_timesteps": 241, "exploration_fraction": 0.0995850622406639},
        ),
    ],
)
def test_what_a_refused_fork_is_told_to_give_is_taken(checkpoint, changes, fix, done):
    origin = Args(**checkpoint.meta["args"])
    with pytest.raises(UsageError, match=re.escape(fix)):
        check_fork(replace(origin, **changes), checkpoint)
    check_fork(replace(origin, **done), checkpoint)


def test_an_arm_without_an_injection_that_was_made_is_told_of_earlier_checkpoints_only():
    baseline = replace(SMALL, intervention="none")
    with pytest.raises(UsageError, match=r"before step 160: give an earlier checkpoint$"):
        check_fork(baseline, FORKED)
    check_fork(baseline, checkpoint_of(SMALL, 142))


@pytest.mark.parametrize(
    "checkpoint,changes",
    [
        (FORKED, {}),
        (FORKED, {"injection_step": (142, 160)}),
        (FORKED, BY_NORM | {"max_injections": 2}),
        (FINISHED, LATER),
        (FINISHED, LATER | {"injection_step": (142, 240, 300)}),
        (checkpoint_of(SMALL, 0), {"intervention": "none", "exploration_fraction": 0.7}),
        (checkpoint_of(SMALL, 142), {"freeze_heads": False, "moments": "keep"}),
        (checkpoint_of(SMALL, 142), {"intervention": "shrink-perturb", "shrink_factor": 0.5}),
        (checkpoint_of(replace(SMALL, num_envs=7), 147), {"intervention": "none"}),
        (FORKED, {"eval_frequency": 20, "save_model": True, "exp_name": "b", "cuda": False}),
    ],
)
def test_a_fork_that_a_single_run_could_have_come_to_is_not_refused(checkpoint, changes):
    check_fork(replace(Args(**checkpoint.meta["args"]), **changes), checkpoint)


NOT_FORKABLE = {
    **{"env_id": "x", "num_envs": 1, "env_backend": "sb3", "optimizer": "rmsprop", "learning_rate": 1.0},
    **{
        "shared_bias": True,
        "layer_norm": True,
        "weight_decay": 0.1,
        "gamma": 0.5,
        "tau": 0.5,
        "target_network_frequency": 51,
        "train_frequency": 5,
        "batch_size": 5,
    },
    **{
        "head_width": 65,
        "buffer_size": 151,
        "learning_starts": 61,
        "start_e": 0.9,
        "end_e": 0.02,
        "exploration_start": 5,
        "bf16": True,
    },
    **{
        "tf32": False,
        "overlap": True,
        "checkpoint_frequency": 90,
        "torch_deterministic": False,
        "log_frequency": 50,
    },
}


def test_every_flag_is_one_that_a_fork_may_change_or_is_refused_by_name():
    assert {*FORKABLE} & {*NOT_FORKABLE} == set()
    assert {*FORKABLE} | {*NOT_FORKABLE} | {"resume", "fork", "evaluate"} == set(asdict(SMALL))
    for name, value in NOT_FORKABLE.items():
        with pytest.raises(
            UsageError, match=rf"not as in checkpoint .*: {name} is .*; a fork may differ in .* only"
        ):
            check_fork(replace(SMALL, **{name: value}), FORKED)


def test_a_refused_fork_leaves_nothing_behind(uninterrupted):
    with pytest.raises(UsageError, match=r"gamma is 0\.5, there 0\.99"):
        fork(uninterrupted(SMALL) / END, SMALL, gamma=0.5)
    assert os.listdir() == []


# checkpoints that stay


@pytest.mark.slow
def test_keep_checkpoints_has_more_of_them_written_and_stay_and_changes_nothing_else():
    args = replace(PLAYING, num_envs=2, total_timesteps=90, checkpoint_frequency=40)
    args = replace(args, injection_step=(50, 60), log_frequency=30)
    folder = train(replace(args, keep_checkpoints=(89, 13, 0)))
    assert names(folder) == [f"checkpoint-{step}" for step in (0, 14, 50, 90)]
    plain = train(args)
    assert names(plain) == ["checkpoint-50", "checkpoint-90"]
    assert_same_end(folder, plain, "checkpoint-90")
    arm = replace(args, keep_checkpoints=(0, 14, 60), intervention="none")
    forked = train(replace(arm, fork=str(folder / "checkpoint-14"), total_timesteps=90))
    assert names(forked) == [f"checkpoint-{step}" for step in (14, 50, 60, 90)]


def test_a_fork_is_not_asked_for_checkpoints_of_steps_that_have_passed():
    with pytest.raises(
        UsageError, match=r"checkpoint-160 lies beyond 20, 82, of .*: leave it out of --keep-checkpoints"
    ):
        check_fork(replace(SMALL, keep_checkpoints=(20, 82, 200)), FORKED)
    kept = checkpoint_of(replace(SMALL, keep_checkpoints=(20,)), 160, (142,))
    check_fork(replace(SMALL, keep_checkpoints=(20, 160, 200)), kept)


@pytest.mark.slow
@pytest.mark.parametrize("intervention", ["reset-head", "none"])
def test_the_norm_decides_also_in_a_network_without_room_for_heads(uninterrupted, intervention):
    """And from there an arm that injects equals the run that did so from the start."""
    args = replace(NORM, intervention=intervention)
    folder = uninterrupted(args)
    assert not [name for name in content(folder, END) if "prime" in name]
    resumed = until_signal(150, args)
    train(Args(resume=str(resumed)))
    assert_same_end(resumed, folder)
    if intervention == "reset-head":
        first = interventions_before(folder / END)[0]
        assert_same_end(fork(folder / f"checkpoint-{first}", NORM), uninterrupted(NORM))


# growth


@pytest.mark.slow
def test_a_run_that_grows_is_exact_when_interrupted_and_from_a_small_baseline_a_wide_head_may_be_forked(
    uninterrupted,
):
    args = replace(SMALL, head_width=16, injected_head_width=24)
    whole = uninterrupted(args)
    folder = until_signal(190, args)
    train(Args(resume=str(folder)))
    assert_same_end(folder, whole)
    for width in (None, 24):
        baseline = until_signal(142, replace(args, intervention="none", injected_head_width=width))
        forked = fork(baseline / "checkpoint-142", args)
        assert_same_end(forked, whole)
    with pytest.raises(UsageError, match="for another --injected-head-width give an earlier checkpoint"):
        fork(forked / END, args, injected_head_width=32, **LATER)


# one agent that goes on in several ways


@pytest.mark.slow
def test_a_fork_with_another_seed_is_the_same_agent_with_random_streams_of_its_own(
    uninterrupted, monkeypatch
):
    origin = uninterrupted(BASELINE) / "checkpoint-142"
    begun, games = {}, []
    reset = LearnerView.reset
    monkeypatch.setattr(
        LearnerView, "reset", lambda view, seed: (games.append(seed), reset(view, seed=seed))[1]
    )

    def first_state(args):
        training = {}

        def loop(self):
            training.update(
                learner=copy.deepcopy(self.learner.state_dict()),
                replay=copy.deepcopy(self.replay.state_dict()),
            )
            training.update(
                frames=[tensor.clone() for tensor in self.replay.tensors()],
                games=games[-1],
                played=len(self.envs.played),
            )
            return True

        with monkeypatch.context() as patch:
            patch.setattr(script.Training, "loop", loop)
            patch.setattr(Run, "finish", lambda *_: None)
            train(args)
        return training

    for seed in (1, 2, 3):
        begun[seed] = first_state(replace(BASELINE, fork=str(origin), seed=seed))
    saved = load_checkpoint(origin).state
    assert begun[1]["learner"]["rng"] == saved["learner"]["rng"] and begun[1]["played"] > 0, (
        "with its own seed it goes on"
    )
    for seed in (2, 3):
        for network in ("q_network", "target_network"):
            for name, value in saved["learner"][network].items():
                assert torch.equal(begun[seed]["learner"][network][name], value)
        assert all(map(torch.equal, begun[seed]["frames"], begun[1]["frames"]))
        for stream, state in ((script.Stream.EXPLORATION, "learner"), (script.Stream.REPLAY, "replay")):
            fresh = np.random.default_rng(script.stream_seed(seed, stream)).bit_generator.state
            assert begun[seed][state]["rng" if state == "learner" else "generator"] == fresh
        assert (
            begun[seed]["games"] == script.stream_seed(seed, script.Stream.ENVIRONMENTS, 142)
            and begun[seed]["played"] == 0
        )


@pytest.mark.slow
def test_continuations_of_one_agent_differ_and_each_is_exact_however_it_is_interrupted(uninterrupted):
    origin = uninterrupted(BASELINE) / "checkpoint-142"
    arm = replace(SMALL, seed=2)
    second, third = fork(origin, arm), fork(origin, arm, seed=3)
    assert interventions_before(second / END) == [142]
    curves = scalars(second)["losses/td_loss"], scalars(third)["losses/td_loss"]
    assert [point for point in curves[0] if point[0] <= 120] == [
        point for point in curves[1] if point[0] <= 120
    ]
    assert curves[0][-1] != curves[1][-1]
    assert (142, 2) in scalars(second)["charts/games_cut"], "the games of the agent's own run end here"
    killed = train_until(150, replace(arm, fork=str(origin)))
    train(Args(resume=str(killed)))
    assert_same_end(killed, second)
    early = train_until(143, replace(arm, fork=str(origin)), send(signal.SIGTERM))
    train(Args(resume=str(early)))
    assert_same_end(early, second)


CONTINUED = replace(
    SMALL,
    total_timesteps=70,
    buffer_size=60,
    learning_starts=20,
    train_frequency=10,
    log_frequency=20,
    checkpoint_frequency=40,
    injection_step=(50,),
)
FIRST_KILLS = {  # where a fork is killed in its first process
    "before its first checkpoint": (runs, "save_checkpoint", 1),
    "before its streams begin": (script.Training, "begin_streams", 1),
    "as its first checkpoint is in place but for its name": (Path, "rename", 2),
    "after its first checkpoint": (Run, "evaluate", 1),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case == "before its streams begin" else pytest.mark.slow)
        for case in FIRST_KILLS
    ],
)
def test_a_fork_with_another_seed_ends_the_same_wherever_its_first_process_was_killed(uninterrupted, case):
    origin = uninterrupted(replace(CONTINUED, intervention="none")) / "checkpoint-50"
    arm = replace(CONTINUED, seed=2, fork=str(origin), eval_frequency=50, eval_episodes=1)
    whole = uninterrupted(arm)
    killed_in(*FIRST_KILLS[case], arm)
    folder = new_folder(set())
    assert (names(folder) == []) == (not case.startswith("after"))
    train(Args(resume=str(folder)))
    assert_same_end(folder, whole, "checkpoint-70")


def beginning(args):
    """What a run holds as its loop begins, with which it is killed."""
    found = {}

    def loop(training):
        state = {
            name: part.state_dict() for name, part in (training.run.parts | {"log": training.run.log}).items()
        }
        del state["log"]["seconds"], state["log"]["interval_seconds"]
        state["log"]["points"] = kill_test.waiting(state["log"]["points"])
        found.update(kill_test.flat(copy.deepcopy(state)))
        found.update({f"frames {k}": tensor.clone() for k, tensor in enumerate(training.replay.tensors())})
        found["anew"] = training.run.saved is None
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunLog, "close", lambda log: log.bar.close())
        patch.setattr(script.Training, "loop", loop)
        train(args)
    return found


@pytest.mark.parametrize(("seed", "of_a_fork"), [(1, False), (2, False), (1, True)])
def test_what_a_fork_takes_from_its_origin_and_says_of_it_is_the_same_each_time_it_begins(
    uninterrupted, monkeypatch, capsys, seed, of_a_fork
):
    """Also of a fork of a fork, which with seed 1 has that of its origin's origin."""
    origin = uninterrupted(replace(CONTINUED, intervention="none")) / "checkpoint-50"
    if of_a_fork:
        origin = (
            uninterrupted(replace(CONTINUED, seed=2, fork=str(origin), eval_frequency=50, eval_episodes=1))
            / origin.name
        )
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    capsys.readouterr()
    first = beginning(replace(CONTINUED, seed=seed, fork=str(origin)))
    folder, output = new_folder(set()), capsys.readouterr().out
    assert differences(beginning(Args(resume=str(folder))), first) == []
    assert capsys.readouterr().out == output and "torch was" in output
    fresh = np.random.default_rng(script.stream_seed(seed, script.Stream.EXPLORATION)).bit_generator.state
    same_seed = load_checkpoint(origin).meta["args"]["seed"] == seed
    assert (first["/learner/rng/state/state"] == fresh["state"]["state"]) == (not same_seed)


@pytest.mark.slow
def test_on_the_command_line_a_fork_takes_over_what_is_not_given_and_its_agent_plays(monkeypatch, capsys):
    args = replace(SMALL, intervention="none", checkpoint_frequency=200)
    assert main(monkeypatch, *flags_of(args)) == 0
    folder = new_folder(set())
    checkpoint = str(folder / "checkpoint-142")
    changes = {"intervention": "injection", "injection_step": (142, 190), "exp_name": "b", "save_model": True}
    flags = "--intervention injection --injection-step 142 190 --exp-name b --save-model".split()
    assert main(monkeypatch, "--fork", checkpoint, *flags) == 0
    forked = new_folder({folder})
    assert Args(**load_checkpoint(forked / END).meta["args"]) == replace(args, fork=checkpoint, **changes)
    assert interventions_before(forked / END) == [142, 190]
    capsys.readouterr()
    assert main(monkeypatch, "--evaluate", str(forked), "--eval-episodes", "2") == 0
    assert "scores of 2 games" in capsys.readouterr().out
    refusal = "error: --resume goes on as the run was, {} cannot change: leave out, or begin a new run"
    assert main(monkeypatch, "--resume", str(folder), "--num-envs", "1") == refusal.format("num_envs")
