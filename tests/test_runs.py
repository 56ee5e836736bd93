"""Nothing is lost: whole runs that are interrupted and resumed, and the checkpoints that they keep."""

import json
import signal
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_bfloat16_on_the_gpu, scalars
from interruptions import (
    END,
    NORM,
    OFTEN,
    OVERLAP,
    PLAYING,
    SMALL,
    Killed,
    all_files,
    assert_same_end,
    at_step,
    copy_of,
    fork,
    interventions_before,
    kill,
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
import support.run_log as run_log
import support.runs as runs
from benchmarks.kill_test import WALL_CLOCK, content, differences
from dqn_injection_atari import Args, Training, train
from support.checkpoints import create_run_folder
from support.environments import LearnerView
from support.machine import alone_in
from support.run_log import SIDE_BY_SIDE, RunLog
from support.runs import Run
from support.usage import UsageError

STOP = send(signal.SIGTERM)


def write_no_checkpoints(patch):
    patch.setattr(Run, "save", lambda run, keep: setattr(run, "saved", run.step))


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
@pytest.mark.parametrize("case", COURSES)
def test_interrupted_and_resumed_equals_uninterrupted(uninterrupted, case):
    changes, interruptions = COURSES[case]
    args, resumed = replace(SMALL, **changes), {}
    for step, action in interruptions:
        folder = train_until(step, replace(args, **resumed), action)
        resumed = {"resume": str(folder)}
    assert train(Args(resume=str(folder))) == folder
    assert_same_end(folder, uninterrupted(args))


@pytest.mark.slow
@pytest.mark.parametrize(
    "args", [OVERLAP, replace(SMALL, env_backend="sb3", num_envs=3)], ids=["ale-4-True", "sb3-3-False"]
)
def test_a_vector_step_is_one_whole_to_a_checkpoint(uninterrupted, args):
    """Step 142 lies within one: the injection and its checkpoint come at that one's end."""
    step = 144
    later = step + 3 * args.num_envs
    folder = train_until(step + 1, args)
    assert names(folder)[-1] == f"checkpoint-{step}"
    assert interventions_before(folder / f"checkpoint-{step}") == []
    until_signal(later, replace(args, resume=str(folder)))
    assert names(folder)[-1] == f"checkpoint-{later}"
    assert interventions_before(folder / f"checkpoint-{later}") == [step]
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(args), f"checkpoint-{args.total_timesteps}")


@pytest.mark.slow
def test_resume_is_exact_where_the_norm_decides(uninterrupted):
    first, second = interventions_before(uninterrupted(NORM) / END)
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


@pytest.mark.slow
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
@pytest.mark.parametrize(
    "changes",
    [
        {"plasticity_frequency": 80},
        {"bf16": True},
        {"cuda_graphs": True, "overlap": True},
        {"cuda_graphs": True, "overlap": True, "bf16": True},
    ],
)
def test_resume_is_exact_on_a_gpu(uninterrupted, changes):
    if "bf16" in changes:
        needs_bfloat16_on_the_gpu()
    args = replace(SMALL, num_envs=7, **changes)
    folder = train_until(148, args)
    until_signal(168, replace(args, resume=str(folder)))
    train(Args(resume=str(folder)))
    assert_same_end(folder, uninterrupted(args))
    fork(folder / "checkpoint-147", args, cuda=False, cuda_graphs=False)


@pytest.mark.gpu
def test_a_run_goes_from_the_cpu_to_a_gpu_and_its_agent_plays_there(uninterrupted):
    folder = uninterrupted(replace(SMALL, cuda=False))
    forked = fork(folder / "checkpoint-142", SMALL, cuda=True, save_model=True)
    assert len(script.evaluate_saved(Args(evaluate=str(forked), eval_episodes=2))) == 2


@pytest.mark.slow
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


def test_curves_are_on_the_disk_itself_before_a_checkpoint_leaves_them_out_and_when_a_run_ends(monkeypatch):
    """The last evaluation comes after the last checkpoint."""
    order = []
    monkeypatch.setattr(run_log, "flush_to_disk", lambda path: order.append(path.name[:6]))
    original = runs.save_checkpoint
    monkeypatch.setattr(runs, "save_checkpoint", lambda *given: (order.append(given[1]), original(*given))[1])
    train(replace(PLAYING, total_timesteps=20, checkpoint_frequency=10))
    assert order == ["events", 0, "events", 10, "events", 20, "events"]


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


@pytest.mark.slow
def test_of_interventions_that_the_norm_triggers_the_first_keeps_its_checkpoint(uninterrupted):
    folder = uninterrupted(NORM)
    first, _ = interventions_before(folder / END)
    assert names(folder) == [f"checkpoint-{first}", END]
    assert interventions_before(folder / f"checkpoint-{first}") == []


@pytest.mark.slow
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


# what a run needs of the machine, and of Weights & Biases


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
