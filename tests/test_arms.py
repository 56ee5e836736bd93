"""Which runs are read, which are named and left out, what makes an arm, and what it is called."""

import json
import re
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import psutil
import pytest
from simulated_runs import INJECTION, NORM, RETURN, games, make_arms, make_run, write, write_run
from torch.utils.tensorboard import summary

from alternatives import AlternativeSettings
from analysis.arms import (
    BOOKKEEPING,
    EVALUATION,
    RecordedRun,
    group,
    read_arms,
    read_run,
    setting,
    short,
)
from analysis.curves import lineage_in
from compare import file_names
from dqn_injection_atari import Args, Experiment
from support.flags import RunFlags
from support.run_log import Curves
from support.usage import UsageError

AT = {"injection_step": (5_000_000,)}


def arms_of(*args):
    """Arms of runs in memory, one for each of these arguments."""
    runs = []
    for i, one in enumerate(args):
        runs.append(RecordedRun(str(i), Args(**one), {RETURN: np.array([[1.0], [0.0]])}, lineage=()))
    return group(runs)[0]


def names(*args):
    return [arm.name for arm in arms_of(*args)]


# what makes an arm


OTHER = {  # another value of every field that may make another arm, and what it takes to matter
    "env_id": ("PongNoFrameskip-v4", {}),
    "total_timesteps": (30_000_000, {}),  # ε falls over more steps
    "num_envs": (2, {}),
    "env_backend": ("ale", {}),
    "injection_step": ((6,), {}),
    "intervention": ("reset-head", {}),
    "freeze_heads": (False, {}),
    "moments": ("keep", {}),
    "injection_trigger": ("norm", {"injection_step": ()}),
    "injection_norm_ratio": (2.0, NORM),
    "injection_check_frequency": (7, NORM),
    "max_injections": (2, NORM),
    "reset_moments_of": ("all", {"intervention": "reset-moments"}),
    "shrink_factor": (0.5, {"intervention": "shrink-perturb"}),
    "redo_frequency": (100, {"intervention": "redo"}),
    "redo_threshold": (0.1, {"intervention": "redo"}),
    "head_width": (64, {}),
    "injected_head_width": (64, {}),
    "optimizer": ("rmsprop", {}),
    "learning_rate": (1e-3, {}),
    "weight_decay": (1e-3, {}),
    "layer_norm": (True, {}),
    "shared_bias": (True, {}),
    "gamma": (0.9, {}),
    "tau": (0.5, {}),
    "target_network_frequency": (100, {}),
    "train_frequency": (8, {}),
    "batch_size": (64, {}),
    "buffer_size": (100_000, {}),
    "learning_starts": (5, {}),
    "start_e": (0.9, {}),
    "end_e": (0.1, {}),
    "exploration_fraction": (0.2, {}),
    "exploration_start": (5, {}),
    "bf16": (True, {}),
    "tf32": (False, {}),
    "overlap": (True, {}),
    "checkpoint_frequency": (5_000, {}),
}


def test_an_injected_width_that_is_the_heads_own_makes_no_other_arm():
    assert setting(Args(injection_step=(4,), injected_head_width=512)) == setting(Args(injection_step=(4,)))
    assert setting(Args(injected_head_width=64)) == setting(Args()), "where nothing is injected"


def test_whatever_changes_a_curve_makes_another_arm_but_for_the_seed():
    names = [field.name for kind in (Experiment, AlternativeSettings) for field in fields(kind)]
    assert OTHER.keys() == {*names} - {"seed", "exp_name"}
    for name, (value, needed) in OTHER.items():
        args = {"injection_step": (4,), **needed}
        assert setting(Args(**args)) != setting(Args(**args | {name: value})), name


def test_names_hardware_logging_evaluation_and_length_make_no_other_arm():
    same = [
        {"seed": 2},
        {"exp_name": "b"},
        {"cuda": False},
        {"cuda_graphs": True},
        {"eval_frequency": 10},
        {"eval_episodes": 0, "eval_steps": 100},
        {"plasticity_frequency": 0},
        {"fork": "runs/x/checkpoint-5"},
        {"total_timesteps": 30_000_000, "exploration_fraction": 0.05},
    ]
    assert all(setting(Args(**args)) == setting(Args()) for args in same)
    assert not BOOKKEEPING & OTHER.keys() and BOOKKEEPING | OTHER.keys() == {
        field.name for field in fields(Args)
    }


def test_how_a_run_is_evaluated_makes_another_arm_where_evaluations_are_compared():
    names = {field.name for field in fields(RunFlags) if field.name.startswith("eval_")}
    assert set(EVALUATION) == names, "whatever changes an evaluation"
    others = (
        {"eval_frequency": 500},
        {"eval_episodes": 3},
        {"eval_steps": 500, "eval_episodes": 0},
        {"eval_epsilon": 0.1},
    )
    for other in others:
        assert setting(Args(**other), "eval/episodic_return") != setting(Args(), "eval/episodic_return")
        assert setting(Args(**other), RETURN) == setting(Args())


@pytest.mark.parametrize(
    "args",
    [
        {
            "intervention": "none",
            "injection_step": (5,),
            "moments": "keep",
            "shrink_factor": 0.5,
        },
        {"intervention": "none", "injection_step": (5,), "freeze_heads": False},
        {
            "intervention": "none",
            **NORM,
            "injection_norm_ratio": 2.0,
            "max_injections": 3,
            "injection_check_frequency": 7,
        },
        {"intervention": "none", **NORM},
        {"freeze_heads": False},
    ],
)
def test_everything_about_an_intervention_that_never_comes_is_no_difference(args):
    assert setting(Args(**args)) == setting(Args())
    (arm,) = arms_of(args, {"seed": 2})
    assert (arm.name, len(arm.runs), arm.planned_steps) == ("no injection", 2, ())


def test_interventions_in_one_vector_step_come_to_the_same_and_stand_at_its_end():
    one, other = ({"injection_step": (step,), "num_envs": 8} for step in (1_001, 1_007))
    (arm,) = arms_of(one, other | {"seed": 2})
    assert (
        arm.planned_steps == (1_008,)
        and arm.intervention_steps(arm.runs[0]) == (1_008,)
        and arm.name == "injection at 1.008k"
    )


def test_what_the_norm_decided_stands_where_it_was_logged():
    run = make_run("a", {RETURN: [(1, 0.0)], "injection/step": [(1_200, 1_200.0), (2_600, 2_600.0)]}, **NORM)
    ((arm,), _) = group([run])
    assert arm.planned_steps == () and arm.intervention_steps(run) == (1_200, 2_600)


# what it is called


def test_arms_are_named_by_their_injections_and_by_what_else_sets_them_apart():
    several, one = {"injection_step": (5_000_000, 12_500_000)}, {"injection_step": (400_000,)}
    found = [
        "no injection",
        "injection at 5M",
        "injection at 5M, all heads trained",
        "injections at 5M and 12.5M",
    ]
    assert names(several, AT, AT | {"freeze_heads": False}, {}) == found
    assert names(one | {"freeze_heads": False}, {}) == [
        "no injection",
        "injection at 400k, all heads trained",
    ]
    assert names({}, {"num_envs": 8, "bf16": True}) == [
        "no injection, num envs 1, no bf16",
        "no injection, num envs 8, bf16",
    ]
    copied = AT | {"moments": "keep"}
    assert names(AT, copied)[1] == "injection at 5M, moments kept"
    kept = copied | {"intervention": "reset-head"}
    assert names(kept) == ["head reset at 5M, moments kept"]
    assert names(NORM, NORM | {"max_injections": 2})[1].endswith("3×, max injections 2")
    assert names({}, AT | {"injected_head_width": 1024})[1] == "injection at 5M, injected head width 1,024"
    assert names({}, AT | {"injected_head_width": 512})[1] == "injection at 5M"


def test_of_many_interventions_in_equal_distances_a_name_has_the_first_two_and_the_last():
    resets = {"intervention": "reset-head", "injection_step": tuple(range(100_000, 5_000_001, 100_000))}
    assert names(resets, {}) == ["no intervention", "head resets at 100k, 200k, … 5M"]
    others = {"injection_step": (1_000, 2_000, 3_000, 4_000, 6_000)}
    assert names(others)[0] == "injections at 1k and 2k and 3k and 4k and 6k"


def test_arms_that_differ_have_names_that_differ():
    ratios = (2.0, 2.0000001, 2.1)
    assert len(set(names(*(NORM | {"injection_norm_ratio": ratio} for ratio in ratios)))) == 3


def test_every_arm_has_a_file_of_its_own_with_a_name_that_a_file_system_takes():
    steps = [1_000 + 1_010 * k + k % 2 for k in range(60)]
    many = [{"injection_step": (*steps, last)} for last in (100_000, 100_001)]
    arms = arms_of({}, *many)
    arms.append(arms[0])
    found = file_names(arms)
    assert found[0] == "PhoenixNoFrameskip-v4_no-injection" and found[-1] == f"{found[0]}-2"
    assert len(set(found)) == 4 and all(len(f"{name}.csv") <= 255 for name in found)


def test_interventions_are_named_and_in_their_company_a_baseline_is_one_without_intervention():
    reset, shrink = AT | {"intervention": "reset-head"}, AT | {"intervention": "shrink-perturb"}
    assert names(reset, {}, shrink, NORM, AT) == [
        "no intervention",
        "injection where the norm has grown 3×",
        "head reset at 5M",
        "injection at 5M",
        "shrink and perturb at 5M",
    ]
    assert names(NORM | {"injection_norm_ratio": 2.5}, {}) == [
        "no injection",
        "injection where the norm has grown 2.5×",
    ]
    assert names(shrink | {"shrink_factor": 0.5}, shrink)[0] == "shrink and perturb at 5M, shrink factor 0.5"
    assert names({"injection_step": (5, 7), "intervention": "reset-head"}) == ["head resets at 5 and 7"]


def test_an_intervention_that_goes_on_is_named_by_where_it_begins():
    redo = AT | {"intervention": "redo"}
    moments = AT | {"intervention": "reset-moments"}
    assert names({}, redo, moments, moments | {"reset_moments_of": "all"}) == [
        "no intervention",
        "ReDo from 5M on",
        "moment reset at 5M, reset moments of all",
        "moment reset at 5M, reset moments of head",
    ]
    assert names({}, moments | {"reset_moments_of": "all"}) == [
        "no intervention",
        "moment reset at 5M, reset moments of all",
    ]
    assert names(redo, redo | {"redo_threshold": 0.1}) == [
        "ReDo from 5M on, redo threshold 0.025",
        "ReDo from 5M on, redo threshold 0.1",
    ]


@pytest.mark.parametrize("tag", ["injection/recycled/conv1", "injection/applied"])
def test_runs_that_recycled_units_before_a_fork_are_arms_of_their_own_and_say_so(tag):
    """Or in which something else was done every so often, counted or not."""
    recycled = {
        RETURN: np.array([[1.0], [0.0]]),
        "injection/norm_growth": np.array([[100.0, 200.0], [1, 1]]),
        tag: np.array([[300.0, 400.0], [1, 0]]),
    }
    plain = {RETURN: np.array([[1.0], [0.0]])}

    def run(folder, scalars, **args):
        return RecordedRun(folder, Args(**args), scalars, lineage=())

    redo = {"intervention": "redo", "injection_step": (300,)}
    arms, _ = group([run("a", plain), run("b", recycled), run("c", recycled, **redo)])
    assert [arm.name for arm in arms] == [
        "no intervention",
        "no intervention, recycled from 300",
        "ReDo from 300 on",
    ]
    arms, _ = group([run("c", recycled, **redo), run("d", recycled, **redo | {"injection_step": (400,)})])
    assert [arm.name for arm in arms] == ["ReDo from 300 on", "ReDo from 400 on, recycled from 300"]


def test_arms_of_a_game_stand_together_the_one_without_intervention_first():
    arms = arms_of(AT, AT | {"env_id": "PongNoFrameskip-v4"}, {}, {"env_id": "PongNoFrameskip-v4"})
    assert [(arm.game[:4], arm.name) for arm in arms] == [
        *[
            ("Phoe", "no injection"),
            ("Phoe", "injection at 5M"),
            ("Pong", "no injection"),
            ("Pong", "injection at 5M"),
        ]
    ]


def test_steps_are_shown_in_thousands_and_millions():
    steps = (0, 802, 1_000, 400_000, 12_500_000, 12_345_678, 5_000_001)
    assert [short(step) for step in steps] == ["0", "802", "1k", "400k", "12.5M", "12,345,678", "5,000,001"]


# one run per seed


def test_of_two_runs_with_one_arm_and_seed_the_longer_counts_whichever_comes_first_and_the_other_is_named():
    brief, whole = (make_run(str(upto), {RETURN: games(1, 1, upto=upto)}, upto) for upto in (1_500, 2_000))
    for runs in ((brief, whole), (whole, brief)):
        (arm,), left_out = group(runs)
        reason = "has the arm and the seed of runs/2000, which has got to step 2,000: the run is left out"
        assert arm.runs == [whole] and left_out == {brief.folder: f"{brief.folder} {reason}"}


def test_of_two_equally_long_runs_with_one_arm_and_seed_the_first_counts_and_a_folder_given_twice_is_one():
    folders = [write(run) for run in make_arms((1,))]
    again = write_run("again", {RETURN: games(1, 7)}, seed=1)
    arms, remarks = read_arms((*folders, again, folders[0]), RETURN)
    assert [[run.folder for run in arm.runs] for arm in arms] == [[folder] for folder in folders]
    assert list(remarks["left_out"]) == [again] and folders[1] in remarks["left_out"][again]


def test_a_run_that_has_not_reached_its_end_is_used_and_named():
    folder = write_run("going", {RETURN: games(4, 1, upto=2_000)}, last=2_050)
    (arm,), remarks = read_arms((folder,), RETURN)
    assert [run.folder for run in arm.runs] == [folder]
    assert remarks == {"left_out": {}, "unfinished": {folder: f"{folder} is at step 2,050 of 3,000"}}


# reading


def event_file(folder):
    (path,) = Path(folder).glob("events.out.tfevents.*")
    return path


def test_every_scalar_is_read_several_at_one_step_included():
    points = {
        RETURN: [(100, 1.5), (100, -2.5), (100, 1.5), (2**40, 3.0)],
        "losses/td_loss": [(7, float("nan"))],
    }
    run = read_run(write_run("a", points), RETURN)
    assert run.scalars[RETURN].tolist() == [[100, 100, 100, 2**40], [1.5, -2.5, 1.5, 3.0]]
    assert run.last_step == 2**40 and np.isnan(run.scalars["losses/td_loss"][1]).all()
    assert run.between(RETURN, 100, 2**40).tolist() == [[2**40], [3.0]] and run.between(
        "no/tag", 0, 1
    ).shape == (2, 0)


def test_a_resumed_run_shows_every_point_once_as_it_went_on_without_a_warning(caplog):
    folder = write_run("a", {RETURN: [(step, 1.0) for step in (100, 200, 300)]}, last=300)
    curves = Curves(Path(folder), 200)
    for step in (200, 300, 400):
        curves.add(summary.scalar(RETURN, 2.0), step)
    curves.flush()
    curves.close()
    assert len(list(Path(folder).glob("events.*"))) == 2
    assert read_run(folder, RETURN).scalars[RETURN].tolist() == [[100, 200, 300, 400], [1.0, 2.0, 2.0, 2.0]]
    assert not caplog.records


def test_several_event_files_are_one_log_in_the_order_of_their_names():
    folder = write_run("a", {RETURN: [(100, 1.0), (200, 2.0)]})
    data = event_file(folder).read_bytes()
    start = 0
    for _ in range(3):  # the file's version, the session's start, the first game
        start += 16 + int.from_bytes(data[start : start + 8], "little")
    event_file(folder).unlink()
    for name, content in (("2", data[start:]), ("1", data[:start]), ("0", b"")):
        Path(folder, f"events.out.tfevents.170000000{name}.host.1.0").write_bytes(content)
    assert read_run(folder, RETURN).scalars[RETURN].tolist() == [[100, 200], [1.0, 2.0]]


def test_a_log_cut_anywhere_is_read_up_to_its_last_whole_point():
    folder = write_run("a", {RETURN: [(step, float(step)) for step in range(1, 6)]})
    path, data = event_file(folder), event_file(folder).read_bytes()
    lengths = set()
    for size in range(len(data), 0, -1):
        path.write_bytes(data[:size])
        try:
            steps, values = read_run(folder, RETURN).scalars[RETURN]
        except UsageError as error:
            assert "no charts/episodic_return yet" in str(error)
        else:
            assert steps.tolist() == values.tolist() == list(range(1, len(steps) + 1))
            lengths.add(len(steps))
    assert lengths == {1, 2, 3, 4, 5}


def test_a_killed_runs_last_half_point_does_not_hide_what_the_resumed_run_logged():
    folder = write_run("a", {RETURN: [(100, 1.0), (200, 1.0)]}, last=200)
    event_file(folder).write_bytes(
        event_file(folder).read_bytes()[:-70]
    )  # of the game at 200, and all of the speed
    curves = Curves(Path(folder), 200)
    curves.add(summary.scalar(RETURN, 2.0), 200)
    curves.flush()
    curves.close()
    assert read_run(folder, RETURN).scalars[RETURN].tolist() == [[100, 200], [1.0, 2.0]]


def test_no_changed_byte_of_a_log_goes_unnoticed(capsys):
    """Of its last point that is said. Any other makes the run unusable: what follows would be missing."""
    folder = write_run("a", {RETURN: [(1, 1.0)]})
    path, data = event_file(folder), event_file(folder).read_bytes()
    whole = read_run(folder, RETURN).scalars[RETURN]
    last = data.index(b"charts/SPS") - 35  # where its record begins, at most
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        try:
            assert np.array_equal(read_run(folder, RETURN).scalars[RETURN], whole)
        except UsageError as error:
            assert re.search(rf"{path.name} is damaged, .*: the run is left out", str(error))
            assert at < len(data) - 40
        else:
            assert at > last and f"bytes of {path} are no whole point" in capsys.readouterr().out
    path.write_bytes(data)
    assert np.array_equal(read_run(folder, RETURN).scalars[RETURN], whole)


def broken(kind):
    """A run's folder with something wrong about it, and a word of the reason."""
    folder = Path(write_run("broken", {RETURN: [(100, 1.0)]}))
    if kind == "no folder":
        return "runs/nowhere", "no run.json"
    if kind == "no run.json":
        (folder / "run.json").unlink()
    elif kind == "cut run.json":
        (folder / "run.json").write_text('{"run": "x", "args": {"se', encoding="utf-8")
    elif kind == "foreign run.json":
        (folder / "run.json").write_text('{"run": "x", "args": {"colour": "red"}}', encoding="utf-8")
    elif kind == "empty log":
        event_file(folder).write_bytes(b"")
    elif kind == "no log":
        event_file(folder).unlink()
    elif kind == "garbage":
        event_file(folder).write_bytes(bytes(range(256)))
    elif kind == "NaN":
        return write_run("nan", {RETURN: [(2_000, float("nan"))]}), "not finite"
    reason = {
        "no run.json": "no run.json",
        "cut run.json": "JSONDecodeError",
        "foreign run.json": "TypeError",
    }
    return str(folder), reason.get(
        kind, "is damaged" if kind == "garbage" else "no charts/episodic_return yet"
    )


KINDS = (
    "no folder",
    "no run.json",
    "cut run.json",
    "foreign run.json",
    "empty log",
    "no log",
    "garbage",
    "NaN",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_run_is_named_with_the_reason_and_the_others_are_used(kind):
    (folder, reason), good = broken(kind), write(make_arms((9,))[0])
    (arm,), remarks = read_arms((folder, good), RETURN)
    assert [run.folder for run in arm.runs] == [good] and list(remarks["left_out"]) == [folder]
    message = remarks["left_out"][folder]
    assert folder in message and reason in message and message.endswith(": the run is left out")
    with pytest.raises(UsageError, match=f"none of 1 runs can be compared, give folders of runs.*{reason}"):
        read_arms((folder,), RETURN)


@pytest.mark.slow
def test_six_runs_of_a_twentieth_of_full_length_are_read_in_a_twentieth_of_the_time():
    total = 750_000
    steps = np.arange(1_000, total + 1, 1_000, dtype=float)
    tags = [*(f"losses/{i}" for i in range(5)), RETURN, "charts/episodic_length"]
    scalars = {tag: np.stack((steps, np.ones(len(steps)))) for tag in tags}
    scalars |= {f"plasticity/{i}": np.stack((steps, np.ones(len(steps))))[:, 49::50] for i in range(30)}
    arms = [(seed, injected) for seed in (1, 2, 3) for injected in (False, True)]
    runs = [
        RecordedRun(
            f"runs/{seed}{i}",
            Args(
                seed=seed,
                intervention="injection" if i else "none",
                total_timesteps=total,
                injection_step=(INJECTION,),
            ),
            scalars,
            lineage_in({}, Args()),
        )
        for seed, i in arms
    ]
    folders = [write(run) for run in runs]
    assert (
        json.loads(Path(folders[0], "run.json").read_text(encoding="utf-8"))["args"]["total_timesteps"]
        == total
    )
    memory, start = psutil.Process().memory_info().rss, time.process_time()
    read = [read_run(folder, RETURN) for folder in folders]
    seconds, memory = time.process_time() - start, psutil.Process().memory_info().rss - memory
    assert sum(points.shape[1] for run in read for points in run.scalars.values()) == 6 * (7 * 750 + 30 * 15)
    assert seconds < 30 / 20 and memory < 100e6
