"""Nothing is lost: whole runs that are resumed, forked, stopped, killed, on full disks or damaged ones."""

import contextlib
import copy
import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from conftest import scalars
from interruptions import (
    END,
    SMALL,
    Killed,
    assert_same_end,
    at_step,
    fork,
    full_disk,
    kill,
    names,
    new_folder,
    send,
    train_until,
    uninterrupted_runs,  # noqa: F401 (a fixture)
    until_signal,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_injection_atari as script
import support.checkpoints as checkpoints
import support.run_log as run_log
import support.runs as runs
from benchmarks import kill_test
from benchmarks.kill_test import WALL_CLOCK, content, differences, flat
from dqn_injection_atari import FORKABLE, Args, Learner, Training, check_fork, train
from support.checkpoints import (
    CHECKSUMS,
    Checkpoint,
    checksums,
    create_run_folder,
    load_checkpoint,
    save_checkpoint,
)
from support.environments import LearnerView
from support.machine import alone_in, flush_to_disk
from support.process import Signals
from support.run_log import SIDE_BY_SIDE, Curves, RunLog
from support.runs import Origin, Run, find_origin
from support.usage import UsageError

slow = pytest.mark.slow
STOP = send(signal.SIGTERM)

OFTEN = replace(SMALL, checkpoint_frequency=80)  # which the end is a multiple of
BASELINE = replace(
    SMALL, intervention="none"
)  # keeps the checkpoint at step 142, where the injection would be
TWICE = replace(SMALL, injection_step=(142, 190))
# nothing is learned, in one game: for what does not depend on it
PLAYING = replace(SMALL, num_envs=1, learning_starts=240, injection_step=())
NORM = replace(
    SMALL,
    injection_step=(),
    injection_trigger="norm",
    injection_norm_ratio=1.0001,
    injection_check_frequency=20,
    max_injections=2,
    learning_rate=3e-4,
)


def all_files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def copy_of(folder, name):
    return Path(shutil.copytree(folder, f"runs/{name}"))


def created(checkpoint):
    """Steps of the interventions before a checkpoint."""
    return load_checkpoint(checkpoint).state["learner"]["interventions"]


def main(monkeypatch, *flags):
    """The script's exit status in these flags, or its error."""
    monkeypatch.setattr(sys, "argv", ["", *flags])
    try:
        script.main()
    except SystemExit as stop:
        return stop.code
    return 0


def write_no_checkpoints(patch):
    patch.setattr(Run, "save", lambda run, keep: setattr(run, "saved", run.step))


def flags_of(args):
    """The command line of a run."""
    flags = []
    for name, value in asdict(args).items():
        if value == getattr(Args, name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


# resume

COURSES = {  # what differs from SMALL, and where the run is killed or stopped
    "again and again": ({}, ((4, kill), (100, kill), (142, kill), (145, kill), (235, kill))),
    "one game of sb3's, three injections, all heads train": (
        {
            "env_backend": "sb3",
            "num_envs": 1,
            "tau": 0.5,
            "injection_step": (90, 120, 170),
            "freeze_heads": False,
        },
        ((100, kill), (121, STOP), (170, STOP), (200, kill)),
    ),
    "bf16 and copied moments": (
        {"bf16": True, "tau": 0.5, "moments": "keep"},
        ((190, kill),),
    ),
    "shrink-perturb and rmsprop": (
        {
            "intervention": "shrink-perturb",
            "optimizer": "rmsprop",
            "shared_bias": True,
            "exploration_start": 90,
        },
        ((143, kill), (170, STOP)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=slow if k else ()) for k, case in enumerate(COURSES)]
)
def test_interrupted_and_resumed_equals_uninterrupted(uninterrupted, case):
    changes, interruptions = COURSES[case]
    args, resumed = replace(SMALL, **changes), {}
    for step, action in interruptions:
        folder = train_until(step, replace(args, **resumed), action)
        resumed = {"resume": str(folder)}
    assert train(Args(resume=str(folder))) == folder
    assert_same_end(folder, uninterrupted(args))


OVERLAP = replace(
    SMALL, num_envs=4, overlap=True, total_timesteps=239
)  # step 142 lies within a vector step, the last is cut


@slow
@pytest.mark.parametrize(
    "args", [OVERLAP, replace(SMALL, env_backend="sb3", num_envs=3)], ids=["ale-4-True", "sb3-3-False"]
)
def test_a_vector_step_is_one_whole_to_a_checkpoint(uninterrupted, args):
    """Step 142 lies within one: the injection and its checkpoint come at that one's end."""
    step, num_envs = 144, args.num_envs
    folder = train_until(step + 1, args)
    assert names(folder)[-1] == f"checkpoint-{step}" and created(folder / f"checkpoint-{step}") == []
    until_signal(step + 3 * num_envs, replace(args, resume=str(folder)))
    assert names(folder)[-1] == f"checkpoint-{step + 3 * num_envs}" and created(
        folder / f"checkpoint-{step + 3 * num_envs}"
    ) == [step]
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(args), f"checkpoint-{args.total_timesteps}")


@slow
def test_resume_is_exact_where_the_norm_decides(uninterrupted):
    first, second = created(uninterrupted(NORM) / END)
    folder = until_signal(first, NORM)  # at its very step, and a little later
    until_signal(first + 3, replace(NORM, resume=str(folder)))
    train_until(second + 1, replace(NORM, resume=str(folder)))
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(NORM))


MEASURED = replace(  # everything is logged, much of it at the very step of a checkpoint, before and after it
    OFTEN,
    injection_step=(142, 160),
    plasticity_frequency=160,
    eval_frequency=80,
    eval_episodes=1,
    log_frequency=20,
)


@slow
def test_every_scalar_is_there_once_after_a_resume(uninterrupted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RunLog, "FLUSH_SECONDS", 0
        )  # or a run of seconds would write curves with its checkpoints only
        folder = train_until(185, MEASURED)
        view = EventAccumulator(
            str(folder)
        ).Reload()  # as in a browser, with points that the resumed run writes again
        assert [point.step for point in view.Scalars("injection/step")] == [142, 160]
        assert [point.step for point in view.Scalars("eval/episodic_return")] == [80, 160]
        train_until(230, replace(MEASURED, resume=str(folder)))
    train(Args(resume=str(folder)))
    resumed, whole = scalars(folder), scalars(uninterrupted(MEASURED))
    for tag in WALL_CLOCK:
        resumed[tag], whole[tag] = ([step for step, _ in curves[tag]] for curves in (resumed, whole))
    assert resumed == whole and set(SIDE_BY_SIDE.values()) <= set(whole)
    assert [step for step, _ in whole["plasticity/dormant_fraction"]] == [160] and whole["charts/SPS"] == [
        *range(20, 241, 20)
    ]
    assert [step for step, _ in whole["charts/episodic_return"]] == [59, 60, 139, 140, 219, 220], (
        "two games end at a time"
    )
    view.Reload()
    assert all(
        [(p.step, p.value) for p in view.Scalars(tag)] == points for tag, points in scalars(folder).items()
    )
    assert_same_end(folder, uninterrupted(MEASURED))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"bf16": True}])
def test_resume_is_exact_on_a_gpu_with_graphs(uninterrupted, changes):
    args = replace(SMALL, cuda_graphs=True, overlap=True, num_envs=7, **changes)
    folder = train_until(148, args)
    until_signal(168, replace(args, resume=str(folder)))
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(args))
    fork(folder / "checkpoint-147", args, cuda=False, cuda_graphs=False)


@slow
def test_the_comparison_sees_one_changed_bit(uninterrupted):
    """Guards the tests above: a single differing scalar, weight or moment is found."""
    a, b = (content(uninterrupted(SMALL), END) for _ in range(2))
    assert differences(a, b) == []
    assert {
        "replay",
        "/learner/rng/state/state",
        "/replay/generator/state/state",
        "curves in the run folder",
    } <= set(a)
    for name in (
        "/learner/q_network/encoder.0.weight",
        "/learner/optimizer/head.theta_prime_1.0.hidden.weight/exp_avg_sq",
    ):
        b[name] = a[name].clone()
        b[name][0] = torch.nextafter(a[name][0], torch.tensor(9.0))
    b["curves in the run folder"] = a["curves in the run folder"][:-1]
    assert len(differences(a, b)) == 3


@pytest.mark.slow
def test_a_finished_run_resumed_stays_as_it_is_and_other_software_is_named(
    uninterrupted, capsys, monkeypatch
):
    folder = copy_of(uninterrupted(SMALL), "done")
    before = content(folder, END)
    train(replace(SMALL, resume=str(folder)))
    out = capsys.readouterr().out
    assert f"resumed at step 240 from {folder / END}" in out and "warning" not in out
    version = torch.__version__
    code = script.CODE_VERSION
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(script, "CODE_VERSION", "other")
    train(Args(resume=str(folder)))
    expected = "warning: bits may differ from an uninterrupted run, because "
    expected += f"script was {code} and is other, torch was {version} and is 9.9.9\n"
    assert expected in capsys.readouterr().out
    assert differences(before, content(folder, END)) == []


def test_resume_takes_no_other_arguments_and_no_folder_in_which_another_process_runs(uninterrupted):
    folder = copy_of(uninterrupted(SMALL), "busy")
    before = all_files(folder)
    with pytest.raises(UsageError, match=r"seed, num_envs cannot change: leave out, or begin a new run$"):
        train(replace(SMALL, seed=5, num_envs=3, resume=str(folder)))
    with alone_in(folder), pytest.raises(UsageError, match="another process is running runs/busy"):
        train(Args(resume=str(folder)))
    assert all_files(folder) == before


def test_a_new_run_is_alone_in_its_folder_while_it_lasts(monkeypatch):
    refused = []

    def resume():
        (folder,) = Path("runs").iterdir()
        with pytest.raises(UsageError, match="another process is running"), alone_in(folder):
            pytest.fail("it came in")
        refused.append(folder)

    at_step(monkeypatch, 10, resume)
    folder = train(replace(PLAYING, total_timesteps=20, checkpoint_frequency=0))
    assert refused == [folder]
    with alone_in(folder):
        pass


def test_where_a_fork_without_a_checkpoint_of_its_own_has_lost_its_origin_the_way_out_is_named():
    Path("runs/x").mkdir(parents=True)
    args = asdict(replace(SMALL, fork="moved/checkpoint-5"))
    Path("runs/x/run.json").write_text(json.dumps({"run": "an id", "args": args}), encoding="utf-8")
    cannot = "runs/x holds no checkpoint to go on from, and nothing can be read where it began"
    reason = r"\(moved/checkpoint-5 cannot be read as a checkpoint .*\)"
    with pytest.raises(UsageError, match=f"^{cannot} {reason}: start the run again without --resume; of a"):
        train(Args(resume="runs/x"))


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_anew_in_place(uninterrupted):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunLog, "close", lambda log: log.bar.close())
        patch.setattr(runs, "save_checkpoint", lambda *_: kill())
        train(SMALL)
    folder = new_folder(set())
    assert names(folder) == [] and (folder / "run.json").exists()
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(SMALL))
    assert scalars(folder)["charts/epsilon"] == scalars(uninterrupted(SMALL))["charts/epsilon"]


# what is due, and what is kept


@pytest.mark.parametrize("num_envs", [1, 2, 3, 7])
@pytest.mark.parametrize("period,after", [(7, 0), (8, 0), (8, 50), (7, 49), (3, 1), (50, 1000), (0, 0)])
def test_multiples_of_a_period_fall_due_once_at_the_end_of_their_vector_step(num_envs, period, after):
    run = Run.__new__(Run)
    run.num_envs, run.step, run.total = num_envs, 0, 200
    due = []
    while run.step < run.total:
        run.step = min(run.step + num_envs, run.total)  # the last vector step may be cut
        assert run.previous == (run.step - 1) // num_envs * num_envs
        due += [run.step] * run.due(period, after)
    multiples = range(period, 201, period) if period else ()
    assert due == [min(-(-m // num_envs) * num_envs, 200) for m in multiples if m > after]


@pytest.mark.slow
def test_the_newest_checkpoint_and_the_one_before_the_first_injection_are_kept(monkeypatch):
    """Also in a baseline, which has no injection there."""
    seen = []
    original = runs.save_checkpoint

    def save(folder, *given):
        path = original(folder, *given)
        seen.append(names(folder))
        return path

    monkeypatch.setattr(runs, "save_checkpoint", save)
    folder = train(replace(PLAYING, injection_step=(80, 142), intervention="none", checkpoint_frequency=80))
    assert seen == [
        ["checkpoint-0"],
        ["checkpoint-80"],
        ["checkpoint-80", "checkpoint-142"],
        ["checkpoint-80", "checkpoint-160"],
        ["checkpoint-80", "checkpoint-240"],
    ]
    assert sorted(path.name[:6] for path in folder.iterdir() if "checkpoint" not in path.name) == [
        "events",
        "progre",
        "run.js",
    ]
    assert json.loads((folder / END / "manifest.json").read_text(encoding="utf-8")).keys() == {
        "format",
        "step",
        "run",
        "args",
        "circumstances",
        "history",
    }


def test_curves_are_on_the_disk_itself_before_a_checkpoint_leaves_them_out(monkeypatch):
    order = []
    monkeypatch.setattr(run_log, "flush_to_disk", lambda path: order.append(path.name[:6]))
    original = runs.save_checkpoint
    monkeypatch.setattr(runs, "save_checkpoint", lambda *given: (order.append(given[1]), original(*given))[1])
    train(replace(PLAYING, total_timesteps=20, checkpoint_frequency=10))
    assert order == ["events", 0, "events", 10, "events", 20]


def test_the_recent_speed_leaves_out_what_a_checkpoint_takes(monkeypatch, tick):
    """On a clock on which a tenth of a second passes in a decision, and three seconds in a checkpoint."""
    advance = Training.advance
    save = runs.save_checkpoint
    monkeypatch.setattr(Training, "advance", lambda run: (tick(0.1), advance(run)))
    monkeypatch.setattr(runs, "save_checkpoint", lambda *given: (tick(3), save(*given))[1])
    curves = scalars(train(replace(PLAYING, total_timesteps=20, checkpoint_frequency=10, log_frequency=10)))
    assert dict(curves["charts/SPS_recent"]) == pytest.approx({10: 10, 20: 10})
    assert dict(curves["charts/SPS"]) == {10: 10 // 4, 20: 20 // 8}, "one at step 0, one at 10"


@pytest.mark.slow
@pytest.mark.parametrize("frequency,expected", [(0, []), (200, ["checkpoint-142", END])])
def test_checkpoint_frequency_is_a_choice(frequency, expected):
    assert names(train(replace(PLAYING, injection_step=(142,), checkpoint_frequency=frequency))) == expected


@slow
def test_of_interventions_that_the_norm_triggers_the_first_keeps_its_checkpoint(uninterrupted):
    folder = uninterrupted(NORM)
    first, _ = created(folder / END)
    assert names(folder) == [f"checkpoint-{first}", END]
    assert created(folder / f"checkpoint-{first}") == []


@slow
@pytest.mark.parametrize("num_envs,boundaries", [(2, (0, 80, 160, 240)), (3, (0, 81, 162, 240))])
def test_games_begin_anew_at_every_boundary_with_a_seed_from_seed_and_step(monkeypatch, num_envs, boundaries):
    seeds = []
    original = LearnerView.reset
    monkeypatch.setattr(
        LearnerView, "reset", lambda view, seed: (seeds.append(seed), original(view, seed=seed))[1]
    )
    write_no_checkpoints(monkeypatch)
    args = replace(PLAYING, num_envs=num_envs, checkpoint_frequency=80)
    expected = [script.stream_seed(args.seed, script.Stream.ENVIRONMENTS, step) for step in boundaries]
    train(args)
    assert seeds == expected and len(set(expected)) == 4
    if num_envs == 3:
        return
    seeds.clear()
    train(replace(args, checkpoint_frequency=0, total_timesteps=100))
    assert seeds == expected[:1]
    train(replace(args, checkpoint_frequency=0, total_timesteps=10, seed=2))
    assert seeds[1] != expected[0]


def test_games_cut_at_a_boundary_bootstrap_and_are_no_returns(monkeypatch):
    trainings = []
    original = script.Training.loop
    monkeypatch.setattr(
        script.Training, "loop", lambda training: (trainings.append(training), original(training))[1]
    )
    write_no_checkpoints(monkeypatch)
    train(replace(PLAYING, checkpoint_frequency=50, total_timesteps=56, num_envs=1))
    replay, log = trainings[0].replay, trainings[0].run.log
    batch = replay.transitions(np.arange(45, 55), np.zeros(10, int))
    cut = 49 - 45
    assert not batch.dones[cut] and batch.next_observations[cut, :3].any(), (
        "the successor is the cut game's own frame"
    )
    assert not batch.observations[cut + 1, :3].any(), "the next game begins on an empty stack"
    assert len(log.returns) == 1, "of the game that ended at step 30"


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
@pytest.mark.parametrize("arm", [pytest.param(arm, marks=slow if k else ()) for k, arm in enumerate(ARMS)])
def test_an_arm_forked_from_a_baseline_equals_the_run_that_was_in_its_arguments_from_the_start(
    uninterrupted, arm
):
    folder = fork(uninterrupted(BASELINE) / "checkpoint-142", BASELINE, **ARMS[arm])
    same = replace(BASELINE, **ARMS[arm])
    assert_same_end(folder, uninterrupted(same))
    once = same.intervention not in ("none", "redo")
    assert created(folder / END) == (list(same.injection_step) if once else [])


REDO = replace(SMALL, **RECYCLING)


@slow
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


@slow
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


@slow
def test_units_are_recycled_on_and_on_in_a_run_that_is_killed_without_checkpoints_of_their_own(uninterrupted):
    whole = uninterrupted(REDO)
    assert names(whole) == [END]
    assert [step for step, _ in scalars(whole)["injection/recycled/conv1"]] == [142, 162, 182, 202, 222]
    folder = until_signal(162, REDO)  # recycled in this very step
    assert [step for step, _ in scalars(folder)["injection/recycled/conv1"]] == [142, 162]
    train(Args(resume=str(folder)))
    assert_same_end(folder, whole)


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


@slow
def test_an_injected_runs_checkpoint_leads_to_its_baseline(uninterrupted):
    forked = fork(uninterrupted(SMALL) / "checkpoint-142", SMALL, intervention="none")
    assert_same_end(forked, uninterrupted(BASELINE))


@slow
def test_a_fork_in_the_middle_of_overlap_equals_the_run_that_had_the_injection_from_the_start(uninterrupted):
    baseline = replace(OVERLAP, intervention="none")
    forked = fork(until_signal(144, baseline) / "checkpoint-144", baseline, intervention="injection")
    assert_same_end(forked, uninterrupted(OVERLAP), "checkpoint-239")


@slow
def test_a_checkpoint_where_the_norm_decided_leads_to_its_baseline_and_back(uninterrupted):
    baseline = replace(NORM, intervention="none")
    checkpoint = uninterrupted(NORM) / f"checkpoint-{created(uninterrupted(NORM) / END)[0]}"
    assert_same_end(fork(checkpoint, NORM, intervention="none"), uninterrupted(baseline))
    assert_same_end(fork(checkpoint, NORM), uninterrupted(NORM))


@slow
def test_a_longer_run_forked_from_a_finished_one_equals_it(uninterrupted):
    short = replace(OFTEN, total_timesteps=160)
    longer = replace(OFTEN, exploration_fraction=16 / 240)
    assert_same_end(fork(uninterrupted(short) / "checkpoint-160", longer), uninterrupted(longer))


@slow
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
LATER = {"total_timesteps": 480, "exploration_fraction": 0.05}
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
        checkpoint_of(replace(NORM, max_injections=1), 160, (120,)),
        {"injection_norm_ratio": 2.0},
        "after 1 injections, and max_injections is 1: give a --max-injections of 2",
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


@slow
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
        first = created(folder / END)[0]
        assert_same_end(fork(folder / f"checkpoint-{first}", NORM), uninterrupted(NORM))


# growth


@slow
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


@slow
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


@slow
def test_continuations_of_one_agent_differ_and_each_is_exact_however_it_is_interrupted(uninterrupted):
    origin = uninterrupted(BASELINE) / "checkpoint-142"
    arm = replace(SMALL, seed=2)
    second, third = fork(origin, arm), fork(origin, arm, seed=3)
    assert created(second / END) == [142]
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
    [pytest.param(case, marks=() if case == "before its streams begin" else slow) for case in FIRST_KILLS],
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


@slow
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
    assert created(forked / END) == [142, 190]
    capsys.readouterr()
    assert main(monkeypatch, "--evaluate", str(forked), "--eval-episodes", "2") == 0
    assert "scores of 2 games" in capsys.readouterr().out
    refusal = "error: --resume goes on as the run was, {} cannot change: leave out, or begin a new run"
    assert main(monkeypatch, "--resume", str(folder), "--num-envs", "1") == refusal.format("num_envs")


def test_a_flag_at_its_default_value_is_a_flag_like_others_to_resume(monkeypatch):
    """Against a run that differs from the defaults in nothing else."""
    monkeypatch.setattr(script, "make_parts", lambda *_: pytest.fail("work was begun"))
    create_run_folder(Path("runs/other"), {"run": "abc", "args": asdict(Args(seed=5))})
    message = main(monkeypatch, "--resume", "runs/other", "--seed", "1")
    assert message == "error: --resume goes on as the run was, seed cannot change: leave out, or use --fork"


def test_a_run_of_another_version_is_refused_in_one_line(monkeypatch):
    create_run_folder(Path("runs/older"), {"run": "abc", "args": asdict(SMALL) | {"compile": False}})
    message = main(monkeypatch, "--resume", "runs/older")
    assert message.startswith("error: runs/older") and "compile" in message and "\n" not in message


# signals


@pytest.mark.parametrize("place", ["a b", "it's", '"$HOME"', "~", "-x", "--y z", "größe", "a;b&c", "*"])
def test_the_command_to_go_on_means_this_script_and_this_run_when_it_is_pasted(monkeypatch, place):
    project, folder = Path(place).absolute(), Path(place, "runs", place).absolute()
    folder.mkdir(parents=True)
    (project / "script.py").touch()
    for here, run in (
        (project.parent, folder.relative_to(project.parent)),
        (folder.parent, Path(place)),
        (project, folder),
    ):
        monkeypatch.chdir(here)
        command = runs.Run.command(types.SimpleNamespace(folder=run), str(project / "script.py"), "resume")
        shown = subprocess.run(
            ["sh", "-c", f"printf '%s\\n' {command}"], stdout=subprocess.PIPE, encoding="utf-8", check=True
        )
        python, script_path, flag, found = shown.stdout.splitlines()
        assert (
            (python, flag) == ("python", "--resume") and script_path[0] not in "-~" and found[0] not in "-~"
        )
        assert Path(script_path).samefile(project / "script.py") and Path(found).samefile(folder)


@pytest.mark.slow
def test_a_stop_ends_the_run_with_a_checkpoint_from_which_it_goes_on_exactly(uninterrupted, capsys):
    args, resumed = replace(SMALL, save_model=True), {}
    for step, number in (
        (4, signal.SIGTERM),
        (152, signal.SIGINT),
        (160, signal.SIGTERM),
        (236, signal.SIGINT),
    ):
        folder = until_signal(step, replace(args, **resumed), number)
        resumed = {"resume": str(folder)}
        out = capsys.readouterr().out
        assert f"step {step}: {number.name}, writing a checkpoint; once more ends the run without it\n" in out
        command = f"python {os.path.relpath(script.__file__)} --resume {folder}"
        assert f"stopped at step {step} of 240, go on with: {command}\n" in out
        assert names(folder)[-1] == f"checkpoint-{step}" and not (folder / "agent.pt").exists()
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(SMALL))
    assert (folder / "agent.pt").exists()


@pytest.mark.slow
def test_the_exit_status_says_what_ended_a_run_and_0_that_it_is_complete(monkeypatch, capsys):
    args = replace(PLAYING, num_envs=2, total_timesteps=100, save_model=True)
    for step, number, status in (
        (20, signal.SIGTERM, 143),
        (40, signal.SIGINT, 130),
        (99, signal.SIGTERM, 143),
    ):
        with monkeypatch.context() as patch:
            at_step(patch, step, send(number))
            flags = ["--resume", str(new_folder(set()))] if Path("runs").exists() else flags_of(args)
            assert main(monkeypatch, *flags) == status
        folder = new_folder(set())
        assert names(folder) == [f"checkpoint-{step + step % 2}"] and not (folder / "agent.pt").exists()
        assert f"stopped at step {step + step % 2} of 100" in capsys.readouterr().out
    original = script.save_agent
    monkeypatch.setattr(script, "save_agent", lambda *given: (send(signal.SIGTERM)(), original(*given)))
    assert main(monkeypatch, "--resume", str(folder)) == 0, "the signal came too late"
    assert (folder / "agent.pt").exists() and "stopped" not in capsys.readouterr().out
    close = LearnerView.close
    monkeypatch.setattr(LearnerView, "close", lambda envs: (send(signal.SIGTERM)(), close(envs)))
    assert main(monkeypatch, "--resume", str(folder)) == 0, "files are being closed: too late, too"


@pytest.mark.parametrize(("complete", "status"), [(True, 0), (False, 143)])
def test_a_signal_at_the_very_end_does_not_make_a_complete_run_another_in_weights_and_biases(
    monkeypatch, complete, status
):
    ended = []
    monkeypatch.setattr(runs, "start_wandb", lambda *_: "a run there")
    monkeypatch.setattr(runs, "finish_wandb", lambda mirror, status: ended.append(status))
    run = Run.__new__(Run)
    run.args = {"wandb_project_name": "x", "wandb_entity": None}
    run.id = "1f"
    run.signals = Signals()
    run.complete = complete
    with contextlib.ExitStack() as stack:
        run._start_mirror("a", stack)
        run.signals.stop = signal.SIGTERM
    assert ended == [status]


@slow
def test_the_shell_sees_the_exit_status_after_two_signals(request):
    slowly = "runs.save_checkpoint = lambda *_: (print('saving', flush=True), time.sleep(60))"
    code = f"import time, support.runs as runs, dqn_injection_atari as s\n{slowly}\ns.main()"
    flags = "--env-backend ale --buffer-size 500 --checkpoint-frequency 0 --head-width 16".split()
    flags += ["--log-frequency", "50"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(Path(script.__file__).parent)},
    )
    request.addfinalizer(process.kill)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    while process.poll() is None and "saving" not in process.stdout.readline():
        pass
    time.sleep(Signals.SAME_REQUEST + 0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""


def saved_steps(patch):
    """A list to which the step of every checkpoint that is written is added."""
    steps = []
    original = runs.save_checkpoint
    patch.setattr(
        runs,
        "save_checkpoint",
        lambda folder, step, *given: (steps.append(step), original(folder, step, *given))[1],
    )
    return steps


@slow
def test_sigusr1_writes_a_checkpoint_and_the_run_goes_on_as_if_nothing_had_been(uninterrupted, monkeypatch):
    steps = saved_steps(monkeypatch)
    at_step(monkeypatch, 130, send(signal.SIGUSR1))  # where there is one anyway
    folder = train_until(78, SMALL, send(signal.SIGUSR1))
    assert steps == [0, 78, 130, 142, 240]
    assert_same_end(folder, uninterrupted(SMALL))


@slow
def test_a_signal_while_the_games_are_played_again_ends_the_process_at_once(monkeypatch):
    folder = until_signal(31, PLAYING)
    before = all_files(folder)
    original = LearnerView.load_state_dict
    monkeypatch.setattr(
        LearnerView,
        "load_state_dict",
        lambda view, state: (send(signal.SIGTERM)(), original(view, state)),
    )
    with pytest.raises(SystemExit) as stop:
        train(Args(resume=str(folder)))
    assert stop.value.code == 143 and before == all_files(folder)


@slow
def test_without_periodic_checkpoints_a_signal_still_saves_the_run():
    args = replace(SMALL, checkpoint_frequency=0)
    folder = until_signal(151, args)
    assert names(folder) == ["checkpoint-152"]
    until_signal(200, replace(args, resume=str(folder)))
    resumed, whole = until_signal(238, replace(args, resume=str(folder))), until_signal(238, args)
    assert_same_end(resumed, whole, "checkpoint-238")


@contextlib.contextmanager
def signal_in_the_first_evaluation(number):
    """Yields a list that grows with each evaluation: its step, and whether checkpoint-100 was there."""
    original, calls = script.evaluate, []

    def evaluate(*given):
        if not calls:
            send(number)()
        calls.append((given[2], bool(list(Path("runs").glob("*/checkpoint-100")))))
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "evaluate", evaluate)
        yield calls


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_an_evaluation_is_answered_at_once_and_the_evaluation_repeated(uninterrupted, number):
    args = replace(PLAYING, eval_frequency=100, eval_episodes=2)
    with signal_in_the_first_evaluation(number) as calls:
        folder = train(args)
        if number == signal.SIGTERM:
            assert names(folder) == ["checkpoint-100"] and "eval/episodic_return" not in scalars(folder)
            train(Args(resume=str(folder)))
    assert calls == [(100, False), (100, True), (200, False)]
    assert_same_end(folder, uninterrupted(args))


def test_a_run_in_a_thread_does_without_signals():
    results = []
    args = replace(PLAYING, total_timesteps=20, checkpoint_frequency=0)
    thread = threading.Thread(target=lambda: results.append(train(args)))
    thread.start()
    thread.join()
    assert len(results) == 1 and results[0].is_dir()


def test_who_calls_train_learns_which_signal_ended_it():
    signals = Signals()
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 10, send(signal.SIGTERM))
        train(replace(PLAYING, checkpoint_frequency=0), signals)
    assert signals.stop is signal.SIGTERM


# failed writes


@slow
def test_on_a_full_disk_the_run_goes_on_and_tries_again_and_in_the_end_nothing_is_missing(
    uninterrupted, capsys
):
    """First there is room for curves, but for no checkpoint, and later for neither."""
    with contextlib.ExitStack() as disk, pytest.MonkeyPatch.context() as patch:
        at_step(patch, 79, lambda: disk.enter_context(full_disk(1_000_000)))
        at_step(patch, 90, disk.close)
        at_step(patch, 159, lambda: disk.enter_context(full_disk(100)))
        at_step(patch, 170, lambda: present.extend(names(new_folder(set()))))
        at_step(patch, 180, disk.close)
        present = []
        folder = train(OFTEN)
    out = capsys.readouterr().out
    assert (
        "warning: no checkpoint at step 80 ([Errno 27] File too large" in out
        and "checkpoint-0 is still good" in out
    )
    assert (
        "warning: no checkpoint at step 160 ([Errno 27] File too large" in out
        and "checkpoint-142 is still good" in out
    )
    assert out.count("the curves cannot be written for now") == 1 and present == ["checkpoint-142"]
    assert_same_end(folder, uninterrupted(OFTEN))
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_whatever_keeps_a_checkpoint_from_being_written_does_not_end_the_run(monkeypatch, capsys):
    errors = iter(
        [OSError(errno.EIO, "Input/output error"), MemoryError(), zstandard.ZstdError("zstd cannot")]
    )
    original, saved = runs.save_checkpoint, []

    def save(folder, step, *given):
        if (error := next(errors, None)) is not None:
            raise error
        saved.append(step)
        return original(folder, step, *given)

    monkeypatch.setattr(runs, "save_checkpoint", save)
    train(replace(PLAYING, total_timesteps=50, checkpoint_frequency=10))
    assert saved == [30, 40, 50]
    out = capsys.readouterr().out
    fix = "see to that, the run will try again; there is none yet"
    assert f"warning: no checkpoint at step 0 ([Errno 5] Input/output error): {fix}" in out
    assert "warning: no checkpoint at step 10 ()" in out
    assert "warning: no checkpoint at step 20 (zstd cannot)" in out


@pytest.mark.parametrize("start", [True, False])
def test_a_disk_that_is_full_at_the_start_or_the_end_is_one_line(monkeypatch, start):
    args = replace(
        PLAYING, total_timesteps=60, learning_starts=60, save_model=True, checkpoint_frequency=1000
    )
    with contextlib.ExitStack() as disk:
        if start:
            disk.enter_context(full_disk(100))
        else:
            original = script.save_agent
            monkeypatch.setattr(script, "save_agent", lambda *given: (original(*given), disk.close()))
            at_step(monkeypatch, 59, lambda: disk.enter_context(full_disk(800_000)))
        message = main(monkeypatch, *flags_of(args))
    if start:
        assert message.startswith("error: cannot write run folder ") and "File too large" in message
        assert os.listdir("runs") == []
    else:
        folder = new_folder(set())
        fix = "make room, and --resume it if you can"
        assert message == f"error: {folder} is complete but for its last checkpoint: {fix}"
        assert names(folder) == ["checkpoint-0"] and (folder / "agent.pt").exists()
        train(Args(resume=str(folder)))
        assert names(folder) == ["checkpoint-60"]


def test_a_last_step_that_fails_once_the_checkpoint_is_in_place_does_not_report_that_there_is_none(
    monkeypatch, capsys
):
    def flush(path):
        if (path / "checkpoint-20").exists():
            raise OSError(errno.EIO, "Input/output error")
        flush_to_disk(path)

    at_step(
        monkeypatch,
        20,
        lambda: (monkeypatch.setattr(checkpoints, "flush_to_disk", flush), send(signal.SIGTERM)()),
    )
    folder = train(PLAYING)
    out = capsys.readouterr().out
    assert "step 20: checkpoint-20" in out and "go on with:" in out and "no checkpoint" not in out
    assert names(folder) == ["checkpoint-0", "checkpoint-20"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
            "the GPU's memory has run out",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "the GPU's memory has run out",
        ),
        (RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors"), "the GPU has failed"),
        (MemoryError(), "memory has run out"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you"
            ),
            "memory has run out",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_memory_or_a_gpu_that_gives_out_in_mid_run_is_one_line_that_names_the_last_checkpoint(
    monkeypatch, error, reason
):
    def fail():
        raise error

    at_step(monkeypatch, 30, fail)
    with pytest.raises(OSError) as refusal:
        train(replace(PLAYING, checkpoint_frequency=20))
    folder, message = new_folder(set()), str(refusal.value)
    assert message.startswith(f"stopped at step 30, {reason}") and "\n" not in message
    assert message.endswith(f"; checkpoint-20 is still good: go on with --resume {folder}")


def test_memory_that_runs_out_before_the_first_checkpoint_says_how_to_begin_again(monkeypatch):
    def fail():
        raise MemoryError

    at_step(monkeypatch, 30, fail)
    with pytest.raises(OSError, match="there is no checkpoint yet: start the run again without --resume"):
        train(replace(PLAYING, checkpoint_frequency=0))


def test_memory_that_runs_out_at_the_start_is_one_line_and_nothing_is_written(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    monkeypatch.setattr(script, "Learner", fail)
    message = main(monkeypatch, *flags_of(PLAYING))
    assert message.startswith(
        "error: the GPU's memory has run out (CUDA out of memory): free it of other jobs, or lower"
    )
    assert os.listdir() == []


def test_memory_that_runs_out_while_a_checkpoint_is_taken_up_is_no_fault_of_the_checkpoint(monkeypatch):
    folder = until_signal(20, PLAYING)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    monkeypatch.setattr(Learner, "load_state_dict", fail)
    message = main(monkeypatch, "--resume", str(folder))
    assert message.startswith("error: the GPU's memory has run out")


def test_a_signal_that_comes_while_a_checkpoint_fails_is_no_clean_stop(monkeypatch):
    def save(folder, step, *given):
        if step == 40:
            send(signal.SIGTERM)()
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_checkpoint(folder, step, *given)

    monkeypatch.setattr(runs, "save_checkpoint", save)
    with pytest.raises(
        OSError, match=r"^stopped at step 40 without a checkpoint .*: checkpoint-20 is still good$"
    ):
        train(replace(PLAYING, checkpoint_frequency=20))


def test_a_checkpoint_whose_size_cannot_be_told_is_still_one(monkeypatch, capsys):
    original = runs.save_checkpoint

    def save(*given):
        path = original(*given)
        path.rename(path.with_name("elsewhere")) if given[1] == 20 else None
        return path

    monkeypatch.setattr(runs, "save_checkpoint", save)
    train(replace(PLAYING, total_timesteps=40, checkpoint_frequency=20))
    assert "step 20: checkpoint-20, nan MB" in capsys.readouterr().out


@slow
def test_a_signal_delivered_several_times_ends_the_run_with_a_checkpoint_and_the_firsts_status(request):
    slowly = (
        "save = runs.save_checkpoint\nruns.save_checkpoint = lambda *given: (time.sleep(1), save(*given))[1]"
    )
    code = f"import time, support.runs as runs, dqn_injection_atari as s\n{slowly}\ns.main()"
    flags = "--env-backend ale --buffer-size 500 --checkpoint-frequency 0 --head-width 16".split()
    flags += ["--learning-starts", "500"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(Path(script.__file__).parent)},
    )
    request.addfinalizer(process.kill)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    for gap in (0.2, 0.4):
        time.sleep(gap)
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == "" and "dqn_injection_atari.py --resume runs/" in out
    assert list(new_folder(set()).glob("checkpoint-*"))


def test_a_stop_whose_checkpoint_cannot_be_written_is_an_error(monkeypatch):
    at_step(monkeypatch, 20, lambda: (disk.enter_context(full_disk(900_000)), send(signal.SIGTERM)()))
    with (
        contextlib.ExitStack() as disk,
        pytest.raises(OSError, match=r"^stopped at step 20 without a checkpoint \(.*too large"),
    ):
        train(PLAYING)
    assert names(new_folder(set())) == ["checkpoint-0"]


def test_curves_that_never_reached_the_disk_are_an_error(monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    at_step(monkeypatch, 30, lambda: monkeypatch.setattr(Curves, "flush", fail))
    with pytest.raises(OSError, match="is complete but for its curves: make room"):
        train(replace(PLAYING, total_timesteps=60, checkpoint_frequency=0))


def test_a_video_that_cannot_be_written_does_not_end_the_run(monkeypatch, capsys):
    args = replace(
        PLAYING,
        eval_frequency=40,
        eval_episodes=1,
        capture_video=True,
        total_timesteps=50,
        checkpoint_frequency=0,
    )
    at_step(
        monkeypatch, 20, lambda: (new_folder(set()) / "videos").write_text("in the way", encoding="utf-8")
    )
    folder = train(args)
    assert "warning: no video at step 40" in capsys.readouterr().out
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [40]


def test_parameters_that_are_not_finite_never_replace_a_good_checkpoint(monkeypatch):
    original = Learner.update

    def update(self, batch, count=1):
        for parameter in self.q_network.parameters():
            parameter.data.fill_(float("nan"))
        return original(self, batch, count)

    at_step(monkeypatch, 126, lambda: monkeypatch.setattr(Learner, "update", update))
    with pytest.raises(FloatingPointError, match="not finite from step 132"):
        train(replace(SMALL, log_frequency=300))
    assert names(new_folder(set())) == ["checkpoint-130"]


def test_a_stop_that_comes_when_the_loop_has_just_looked_for_one_has_its_checkpoint(monkeypatch):
    original = Training.checkpoint_due

    def checkpoint_due(training, notable):
        if training.run.step == 20:
            training.run.signals.stop = signal.SIGTERM
        return original(training, notable)

    monkeypatch.setattr(Training, "checkpoint_due", checkpoint_due)
    folder = train(SMALL)
    assert names(folder) == ["checkpoint-22"], "one vector step later"


# damaged files


@slow
def test_resume_falls_back_to_the_older_good_checkpoint_says_so_and_ends_the_same(uninterrupted, capsys):
    """The newer one may be unreadable for a moment only: it goes once the run has come past it."""
    folder = copy_of(uninterrupted(SMALL), "damaged")
    newest, older = folder / END, folder / "checkpoint-142"
    damaged = bytearray((newest / "state.pt").read_bytes())
    damaged[len(damaged) // 3] ^= 4
    (newest / "state.pt").write_bytes(damaged)
    until_signal(150, Args(resume=str(folder)))
    out = capsys.readouterr().out
    assert (
        f"warning: {newest} cannot be read as a checkpoint (" in out
        and f"resumed at step 142 from {older}" in out
    )
    assert names(folder) == ["checkpoint-142", "checkpoint-150", END]
    train(Args(resume=str(folder)))
    assert "resumed at step 150" in capsys.readouterr().out
    assert_same_end(folder, uninterrupted(SMALL))
    assert not list(folder.glob(".*"))


class Nothing:
    def state_dict(self):
        return {}


def bare_run(args=SMALL, checkpoint=True):
    """A run's folder as far as `find_origin` looks at it."""
    identity = {"run": "1f2e3d", "args": json.loads(json.dumps(asdict(args)))}
    folder = create_run_folder(Path("runs/bare"), identity)
    if checkpoint:
        save_checkpoint(folder, 240, {"learner": Nothing()}, identity)
    return folder, identity


def test_a_damaged_run_json_never_leads_to_a_different_run():
    folder, identity = bare_run()
    path = folder / "run.json"
    whole = path.read_bytes()
    rng = random.Random(1)
    refused = found = 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with contextlib.ExitStack() as stack:
            try:
                origin = find_origin(str(folder), None, stack)
            except UsageError as error:
                assert "\n" not in str(error)
                refused += 1
            else:
                assert (origin.args, origin.run_id, origin.checkpoint.step) == (
                    identity["args"],
                    "1f2e3d",
                    240,
                )
                found += 1
    assert refused > 50 and found > 50


def test_a_run_with_curves_but_without_checkpoints_cannot_be_resumed():
    folder, _ = bare_run(checkpoint=False)
    with contextlib.ExitStack() as stack:
        assert find_origin(str(folder), None, stack).checkpoint is None, "it begins anew"
    log = RunLog(folder, 0, 240)
    log.scalar("charts/epsilon", 0.5, 40)
    log.close()
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(
            UsageError,
            match="runs/bare holds no checkpoint to go on from: start the run again without --resume",
        ),
    ):
        find_origin(str(folder), None, stack)


def test_another_runs_checkpoint_is_not_gone_on_from(uninterrupted, capsys):
    folder, _ = bare_run(checkpoint=False)
    shutil.copytree(uninterrupted(SMALL) / END, folder / END)
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(UsageError, match="runs/bare holds no good checkpoint"),
    ):
        find_origin(str(folder), None, stack)
    assert f"{folder / END} belongs to another run" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["nothing", "empty folder", "file", "agent", "other format"])
def test_what_is_no_checkpoint_is_refused_by_name(monkeypatch, given):
    path = Path("given")
    if given == "empty folder":
        path.mkdir()
    elif given == "file":
        path.write_bytes(b"no checkpoint")
    elif given == "agent":
        torch.save({"q_network": {}}, path)
    elif given == "other format":
        folder, _ = bare_run()
        shutil.copytree(folder / END, path)
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}), encoding="utf-8")
        (path / CHECKSUMS).write_text(checksums(path), encoding="utf-8")
        shutil.rmtree("runs")
    for flag in ("--fork", "--resume"):
        message = main(monkeypatch, flag, str(path))
        assert message.startswith("error: given") and "cannot be read as" in message and "\n" not in message
        assert given != "other format" or flag == "--resume" or "its format is 99" in message
    assert not Path("runs").exists()


def without(state, *keys):
    for key in keys[:-1]:
        state = state[key]
    del state[keys[-1]]


FOREIGN_STATES = {
    "no learner": lambda state: without(state, "learner"),
    "no generator": lambda state: without(state, "replay", "generator"),
    "other layers": lambda state: state["learner"]["q_network"].update({"encoder.0.weight": torch.zeros(3)}),
    "more games": lambda state: state["envs"].update(actions=torch.zeros(5, 7, dtype=torch.uint8)),
    "other games": lambda state: state["envs"].update(seed=state["envs"]["seed"] + 1),
}


@slow
def test_a_checkpoint_that_fits_its_checksums_but_not_this_script_is_refused_before_anything_changes(
    uninterrupted,
):
    folder = copy_of(uninterrupted(SMALL), "foreign")
    path = folder / END
    for name, change in FOREIGN_STATES.items():
        state = torch.load(uninterrupted(SMALL) / END / "state.pt", weights_only=True)
        change(state)
        torch.save(state, path / "state.pt")
        (path / CHECKSUMS).write_text(checksums(path), encoding="utf-8")
        before = all_files(folder)
        given = [{"resume": str(folder)}, {"fork": str(path), **LATER}]
        for args in given[: 1 if "games" in name else 2]:
            with pytest.raises(
                UsageError, match=r"read as this run's checkpoint \(.+\): go on with the script, the packages"
            ) as error:
                train(replace(SMALL, **args))
            assert "\n" not in str(error.value)
        assert before == all_files(folder)
    assert [folder.name for folder in Path("runs").iterdir()] == ["foreign"]


# SIGKILL


def killed_in(owner, name, call, args):
    """A run that is killed as it calls a function for the `call`-th time."""
    original, tidy_up, calls = getattr(owner, name), shutil.rmtree, []

    def killed(*given, **options):
        calls.append(given)
        if len(calls) == call:
            raise Killed
        return original(*given, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunLog, "close", lambda log: log.bar.close())
        patch.setattr(
            shutil, "rmtree", lambda *given, **options: len(calls) < call and tidy_up(*given, **options)
        )
        patch.setattr(owner, name, killed)
        train(args)


@slow
def test_killed_while_files_are_exchanged(uninterrupted):
    """Before and after a checkpoint appears, while it is flushed, and as a resumed run begins its curves."""
    killed_in(
        Path, "rename", 4, SMALL
    )  # run.json, checkpoint-0, checkpoint-130 and then the removal of checkpoint-0
    folder = new_folder(set())
    assert names(folder) == ["checkpoint-0", "checkpoint-130"]
    resumed = Args(resume=str(folder))
    killed_in(Path, "rename", 1, resumed)
    assert names(folder) == ["checkpoint-0", "checkpoint-130"] and list(
        folder.glob(".checkpoint-142.partial")
    )
    killed_in(os, "fsync", 5, resumed)
    killed_in(Curves, "_new_file", 1, resumed)
    killed_in(runs, "save_checkpoint", 2, resumed)
    train(resumed)
    assert_same_end(folder, uninterrupted(SMALL))
    assert not list(folder.glob(".*"))


@slow
def test_a_killed_process_resumed_equals_one_that_nobody_touched(monkeypatch):
    """The short form of benchmarks/kill_test.py."""
    flags = " ".join(kill_test.FLAGS).replace("--checkpoint-frequency 200", "--checkpoint-frequency 800")
    monkeypatch.setattr(kill_test, "FLAGS", [*flags.split(), *"--train-frequency 20 --head-width 16".split()])
    where, different = kill_test.kill_and_compare("ale", ["injection"], random.Random(0))
    assert different == [] and not where["(had ended)"], where


# a folder that is moved, or goes


MOVED = replace(PLAYING, total_timesteps=80, checkpoint_frequency=20, log_frequency=10)


def moved_at(patch, step, to):
    """Has a run's folder renamed once it comes to a step; the returned list gets the name that it had."""
    before = []

    def move():
        before.append(new_folder(set()))
        before[0].rename(to)

    at_step(patch, step, move)
    return before


@pytest.mark.slow
def test_a_run_whose_folder_is_renamed_goes_on_in_it_and_names_it_as_it_is_now(
    uninterrupted, monkeypatch, capsys
):
    """Also where another folder gets its old name."""
    to = "else where"
    before = moved_at(monkeypatch, 30, to)
    at_step(monkeypatch, 34, lambda: before[0].mkdir())
    at_step(monkeypatch, 64, send(signal.SIGTERM))
    args = replace(MOVED, eval_frequency=50, eval_episodes=1, capture_video=True, save_model=True)
    assert train(args) == Path(to)
    assert list(before[0].iterdir()) == [], "nothing of it is written where it was"
    assert names(Path(to)) == ["checkpoint-64"] and (Path(to) / "videos/step-50.mp4").exists()
    printed = capsys.readouterr().out.partition("go on with: ")[2].strip()
    assert main(monkeypatch, *shlex.split(printed)[2:]) == 0
    assert f"--evaluate {shlex.quote(to)}\n" in capsys.readouterr().out and (Path(to) / "agent.pt").exists()
    before[0].rmdir()
    assert_same_end(Path(to), uninterrupted(replace(args, capture_video=False)), "checkpoint-80")


def test_a_folder_that_is_moved_while_a_checkpoint_is_written_has_it_all_the_same(monkeypatch, capsys):
    original, moved = runs.save_checkpoint, []

    def save(folder, step, *given):
        if step == 20 and not moved:
            moved.append(folder.rename("runs/renamed"))
        return original(folder, step, *given)

    monkeypatch.setattr(runs, "save_checkpoint", save)
    assert train(replace(MOVED, total_timesteps=30)) == Path("runs/renamed")
    assert os.listdir("runs") == ["renamed"] and names(Path("runs/renamed")) == ["checkpoint-30"]
    assert "no checkpoint" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_that_is_deleted_is_not_made_anew_and_the_run_says_so_and_ends_with_an_error(
    monkeypatch, capsys
):
    at_step(monkeypatch, 30, lambda: shutil.rmtree(new_folder(set())))
    at_step(monkeypatch, 74, send(signal.SIGTERM))
    message = main(
        monkeypatch, *flags_of(replace(MOVED, eval_frequency=50, eval_episodes=1, capture_video=True))
    )
    out = capsys.readouterr().out
    folder = out.partition("curves in ")[2].partition("\n")[0]
    assert os.listdir("runs") == []
    fix = "if it was moved to another disk, stop this run and --resume it there"
    gone = f"({folder} is no longer there)"
    assert f"warning: the curves cannot be written for now {gone}: {fix}, training goes on\n" in out
    for step in (40, 60):
        lost = f"the last one, checkpoint-{20}, was in it"
        assert f"warning: no checkpoint at step {step} {gone}: {fix}, the run will try again; {lost}\n" in out
    assert f"warning: no video at step 50 {gone}\n" in out
    assert (
        message
        == f"error: stopped at step 74 without a checkpoint {gone}: the last one, checkpoint-20, was in it"
    )


@pytest.mark.parametrize("frequency", [0, 20])
def test_a_complete_run_whose_folder_was_deleted_is_no_success(monkeypatch, frequency):
    at_step(monkeypatch, 30, lambda: shutil.rmtree(new_folder(set())))
    message = main(monkeypatch, *flags_of(replace(MOVED, total_timesteps=40, checkpoint_frequency=frequency)))
    assert (
        message.startswith("error: runs/") and "is no longer there: the run is complete, and all" in message
    )
    assert os.listdir("runs") == []


@slow
def test_a_real_run_is_renamed_stopped_and_gone_on_with_as_its_last_line_says(request):
    flags = "--env-backend ale --buffer-size 500 --checkpoint-frequency 0 --learning-starts 500"
    flags += " --log-frequency 50"
    process = subprocess.Popen(
        [sys.executable, "-u", script.__file__, *flags.split()], stdout=subprocess.PIPE, encoding="utf-8"
    )
    request.addfinalizer(process.kill)
    process.stdout.readline()
    new_folder(set()).rename("runs/a new name")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    command = out.partition("go on with: ")[2].strip()
    assert process.returncode == 143 and command.endswith("--resume 'runs/a new name'")
    assert os.listdir("runs") == ["a new name"]
    process = subprocess.Popen(
        command, shell=True, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )
    request.addfinalizer(lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
    assert "curves in runs/a new name" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)


# Weights & Biases


def test_weights_and_biases_starts_before_tensorboard_does(monkeypatch):
    """Or it would miss the beginning."""
    given = []
    monkeypatch.setattr(script, "check_machine", lambda *_: None)
    monkeypatch.setattr(
        runs, "start_wandb", lambda *args: given.append((*args, list(Path("runs").glob("*/events*"))))
    )
    args = replace(
        PLAYING,
        total_timesteps=20,
        checkpoint_frequency=0,
        track=True,
        wandb_project_name="p",
        wandb_entity="e",
    )
    folder = train(args)
    train(replace(args, track=False))
    run_id = json.loads((folder / "run.json").read_text(encoding="utf-8"))["run"]
    assert given == [("p", "e", folder.name, run_id, asdict(args), [])]


def test_what_a_run_needs_and_the_machine_lacks_is_refused(monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "require_wandb", lambda: asked.append("wandb"))
    monkeypatch.setattr(runs, "require_film", lambda: asked.append("film"))
    cpu = types.SimpleNamespace(type="cpu")
    runs.check_machine(cpu, False, False, False)
    assert asked == []
    runs.check_machine(cpu, False, True, True)
    assert asked == ["wandb", "film"]
    with pytest.raises(UsageError, match="--cuda-graphs needs a GPU"):
        runs.check_machine(cpu, True, False, False)
    runs.check_machine(types.SimpleNamespace(type="cuda"), True, False, False)
