"""The plan of a sweep: its runs, their flags, and what is refused before anything starts."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dqn_injection_atari import Args, parse_args
from orchestration import plan as planning
from orchestration.plan import Asked, all_arms, copies_in_words, default_name, plan, plan_in_words
from support.checkpoints import Checkpoint
from support.usage import UsageError, changed_fields

PHOENIX, PONG = "PhoenixNoFrameskip-v4", "ALE/Pong-v5"
FLAGS = ["--injection-step", "1001", "5000", "--num-envs", "4", "--total-timesteps", "9000"]
STEP = 1004  # at the end of the vector step


def asked(*interventions, custom=None, grid=(), flags=FLAGS, seeds=(1, 2), **changes):
    arms = all_arms(interventions or ("injection", "none"), custom or {})
    found = Asked(env_ids=(PHOENIX,), seeds=seeds, arms=arms, grid=list(grid), flags=list(flags))
    return replace(found, **changes)


def begun(run, monkeypatch, trunk=None):
    """What the training script makes of a planned run's command."""
    flags = list(run.flags)
    if trunk is not None:
        checkpoint = Path("runs", trunk.name, f"checkpoint-{run.begins}")
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "manifest.json").write_text(
            json.dumps({"run": "abc", "args": asdict(trunk.args)}), encoding="utf-8"
        )
        flags += ["--fork", str(checkpoint)]
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    return replace(parse_args(), fork=None)


def test_one_arm_per_game_and_seed_runs_whole_and_the_others_fork_from_it_at_the_first_injection():
    runs = plan(asked("injection", "reset-head", "none", env_ids=(PHOENIX, PONG)))
    assert len({run.name for run in runs}) == len(runs) == 12
    for run in runs:
        game, arm, seed = run.name.split("__")
        assert (game, arm, int(seed)) == (run.args.env_id.replace("/", "-"), run.arm, run.args.seed)
        assert run.trunk == (None if arm == "none" else f"{game}__none__{seed}")
        assert (run.begins, run.steps) == ((0, 9_000) if arm == "none" else (STEP, 9_000 - STEP))
    assert [run.args.seed for run in runs[:4]] == [1, 1, 1, 2]
    assert runs[0].arm == "none", "a trunk comes before its forks"
    assert plan(asked("injection", "reset-head"))[0].arm == "injection", "without a baseline, the first"


OWN = {
    "all heads": "--no-freeze-heads",
    "once": "--injection-step 1001",
    "not at all": "--intervention none",
}
EACH = {
    **OWN,
    "none": "--intervention none",
    "injection": "--intervention injection",
    "shrink-perturb": "--intervention shrink-perturb",
}


@pytest.mark.parametrize("first", EACH)
def test_a_fork_has_the_arguments_of_a_whole_run_in_its_arm(monkeypatch, first):
    custom = {"trunk": EACH[first], **{f"own {arm}": flags for arm, flags in EACH.items()}, **OWN}
    arms = {name: all_arms((), {name: flags})[name] for name, flags in custom.items()}
    runs = {run.name: run for run in plan(asked(arms=arms, grid=[["learning-rate", "1e-3"]], seeds=(3,)))}
    assert len(runs) == len(EACH) + len(OWN) + 1
    for run in runs.values():
        trunk = None if run.trunk is None else runs[run.trunk]
        assert begun(run, monkeypatch, trunk) == run.args and (trunk is None) == (run.arm == "trunk")
        assert run.args.learning_rate == 1e-3
    by_arm = {run.arm: run.args for run in runs.values()}
    assert [by_arm[arm].freeze_heads for arm in ("own injection", "all heads")] == [True, False]
    assert by_arm["once"].injection_step == (1001,) and by_arm["not at all"].intervention == "none"


def test_without_a_planned_injection_every_arm_runs_whole():
    assert {run.begins for run in plan(asked(flags=("--injection-trigger", "norm")))} == {0}
    wide = {"wide": "--intervention none --head-width 1024"}
    assert [run.begins for run in plan(asked("none", custom=wide, flags=(), seeds=(1,)))] == [0, 0]


def test_an_arm_that_differs_before_the_fork_runs_whole():
    custom = {"early": "--injection-step 500", "grown": "--injection-trigger norm --injection-step"}
    assert [run.begins for run in plan(asked("none", custom=custom, seeds=(1,)))] == [0, 0, 0]


def test_the_grid_multiplies_the_plan_and_each_setting_has_a_trunk_of_its_own():
    grid = [["learning-rate", "1e-4", "5e-4"], ["--bf16", "true", "false"], ["injection-step", "800 900"]]
    runs = plan(asked(grid=grid, seeds=(1,)))
    assert len(runs) == 8
    settings = [(run.args.learning_rate, run.args.bf16) for run in runs if run.trunk is None]
    assert settings == [(1e-4, True), (1e-4, False), (5e-4, True), (5e-4, False)]
    by_name = {run.name: run for run in runs}
    for run in runs:
        if run.trunk is not None:
            assert not {"exp_name", "intervention"} ^ set(changed_fields(run.args, by_name[run.trunk].args))
    assert runs[1].name == f"{PHOENIX}__injection_learning-rate-1e-4_bf16-true_injection-step-800-900__1"


@pytest.mark.parametrize(
    ("grid", "seeds", "count"),
    [
        (["injection-step", "800", "900"], (1,), "1 baseline learns"),
        (["injection-step", "800", "900 990"], (1, 2), "2 baselines learn"),
        (["freeze-heads", "true", "false"], (1,), "1 baseline learns"),
    ],
)
def test_baselines_that_learn_the_same_are_named(grid, seeds, count):
    flags = FLAGS[3:] if "injection-step" in grid else FLAGS
    (line,) = copies_in_words(plan(asked("none", "injection", flags=flags, seeds=seeds, grid=[grid])))
    value = grid[2].replace(" ", "-")
    of_one = [f"{PHOENIX}__none_{grid[0]}-{end}__{seeds[0]}" for end in (value, grid[1])]
    example = f"{of_one[0]} learns what {of_one[1]} does"
    assert line == f"remark: {count} the same as another one, {example}: see --grid in docs/sweeps.md"


@pytest.mark.parametrize(
    "grid",
    [["learning-rate", "1e-4", "1e-3"], ["total-timesteps", "8000", "9000"], ["log-frequency", "8", "9"]],
)
def test_baselines_that_differ_in_something_else_are_not(grid):
    assert copies_in_words(plan(asked("none", "injection", flags=FLAGS[:5], grid=[grid]))) == []


def test_a_plan_knows_its_memory_and_disk():
    run, small = (plan(asked(flags=[*FLAGS, "--buffer-size", size]))[0] for size in ("1000000", "1000"))
    assert 7.0e9 < run.memory < 7.4e9 and small.memory < 0.01e9


def test_the_disk_of_a_plan_counts_the_checkpoints_that_stay_and_the_heads_in_them():
    baseline = plan(asked("none", flags=[*FLAGS, "--buffer-size", "1000"]))[0]

    def disk(begins=0, **changes):
        return replace(baseline, begins=begins, args=replace(baseline.args, **changes)).disk

    three = disk()
    assert three == disk(injection_step=(1000,)) == disk(injection_step=tuple(range(4, 9000, 4)))
    one = three - disk(injection_step=())
    assert disk(keep_checkpoints=(0, 2000)) == three + 2 * one == disk(keep_checkpoints=(0, 1001, 2000))
    assert disk(begins=2000, keep_checkpoints=(0, 2000)) == three, "those before the fork are its origin's"
    assert one < 35e6 and disk(intervention="reset-head") == three
    norm = {"injection_step": (), "injection_trigger": "norm"}
    assert disk(**norm) == disk(injection_step=()) and disk(**norm, intervention="reset-head") == three
    two_pairs = disk(intervention="injection") - three
    one_pair = disk(intervention="injection", injection_step=(1000,)) - three
    assert two_pairs == 2 * one_pair >= 3 * 2 * 38e6


@pytest.fixture
def checkpoint(monkeypatch):
    """One at step 2,000 of a run of 4,000, of which ε falls over 400. Loading is another module's affair."""
    args = Args(
        total_timesteps=4_000, injection_step=(3_000,), intervention="none", learning_rate=1e-3, seed=7
    )
    path = Path("runs/X/checkpoint-2000").absolute()
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"run": "abc", "args": asdict(args)}), encoding="utf-8")
    found = Checkpoint(path, {"step": 2_000, "args": asdict(args)}, {"learner": {"interventions": ()}})
    monkeypatch.setattr(planning, "load_checkpoint", lambda _: found)
    return found


def continued(checkpoint, *interventions, **changes):
    given = {"flags": (), "env_ids": (), "from_checkpoint": str(checkpoint.path), "steps": 5_000, **changes}
    return asked(*interventions, **given)


def test_a_checkpoint_of_a_run_that_writes_none_is_not_continued(checkpoint):
    args = checkpoint.meta["args"]
    args["checkpoint_frequency"] = 0
    (checkpoint.path / "manifest.json").write_text(json.dumps({"run": "abc", "args": args}), encoding="utf-8")
    fix = r"nothing to go on from: give a checkpoint of a run that has another$"
    with pytest.raises(UsageError, match=fix):
        plan(continued(checkpoint, "none", "injection"))


@pytest.mark.parametrize(
    "flags", [("--injection-step", "6000"), ("--exploration-fraction", "0.5"), ("--preset", "paper")]
)
def test_what_a_checkpoint_decides_is_refused_and_not_passed_over(checkpoint, flags):
    with pytest.raises(UsageError, match=f"{flags[0]} after -- is what the sweep itself gives"):
        plan(continued(checkpoint, flags=flags))


def test_a_checkpoint_is_estimated_to_hold_no_more_frames_than_the_run_has_steps():
    baseline = plan(asked("none"))[0]
    disk = []
    for size in (1_000, 9_000, 1_000_000):
        disk.append(replace(baseline, args=replace(baseline.args, buffer_size=size)).disk)
    assert disk[0] < disk[1] == disk[2]


def test_arms_and_seeds_continue_one_checkpoint(checkpoint, monkeypatch):
    custom = {"all heads": "--no-freeze-heads"}
    runs = plan(continued(checkpoint, "none", "injection", custom=custom, seeds=(1, 2)))
    assert [(run.arm, run.args.seed) for run in runs[::3]] == [("none", 1), ("none", 2)]
    assert all(run.trunk is None for run in runs)
    assert len(runs) == 6 and {run.begins for run in runs} == {2_000}
    for run in runs:
        args = begun(run, monkeypatch)
        assert args == run.args and args.total_timesteps == 7_000 and args.injection_step == (2_000,)
        assert args.learning_rate == 1e-3 and args.exploration_fraction * 7_000 == pytest.approx(400)
        assert args.intervention == ("none" if run.arm == "none" else "injection")


def test_arms_continue_one_checkpoint_with_its_own_seed(checkpoint, monkeypatch):
    custom = {"all heads": "--no-freeze-heads", "not at all": "--intervention none"}
    flags = ("--eval-frequency", "500")
    runs = plan(continued(checkpoint, "none", "injection", custom=custom, flags=flags, seeds=(7,)))
    assert [begun(run, monkeypatch) for run in runs] == [run.args for run in runs]
    assert [run.args.intervention for run in runs] == ["none", "injection", "injection", "none"]
    assert [run.args.freeze_heads for run in runs] == [True, True, False, True]
    for run in runs:
        assert (run.begins, run.steps, run.args.injection_step) == (2_000, 5_000, (2_000,))
        assert run.args.eval_frequency == 500


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": None}, "give both --from-checkpoint and --steps"),
        ({"env_ids": (PHOENIX,)}, "leave out --env-ids"),
        ({"flags": ("--total-timesteps", "9000")}, "give --steps"),
        ({"flags": ("--injection-trigger", "norm")}, "--injection-trigger after --"),
        ({"grid": [["learning-rate", "1"]]}, "learning_rate is 1.0, there 0.001"),
    ],
)
def test_what_cannot_continue_a_checkpoint_is_refused(checkpoint, changes, words):
    with pytest.raises(UsageError, match=words):
        plan(continued(checkpoint, **changes))


def test_an_agent_that_was_injected_goes_on_with_another_injection_and_has_no_baseline(checkpoint):
    checkpoint.meta["args"] |= {"intervention": "injection", "injection_step": (1_000,)}
    identity = json.dumps({"run": "abc", "args": checkpoint.meta["args"]})
    (checkpoint.path / "manifest.json").write_text(identity, encoding="utf-8")
    checkpoint.state["learner"]["interventions"] = (1_000,)
    assert plan(continued(checkpoint, "injection"))[0].args.injection_step == (1_000, 2_000)
    for arm in ("none", "redo"):
        words = f"lies after an injection, so arm {arm} cannot go on from it: give an earlier checkpoint"
        with pytest.raises(UsageError, match=words):
            plan(continued(checkpoint, arm, "injection"))
    words = (
        "^arm reset-head: checkpoint .* lies after an injection: for another --intervention give an earlier"
    )
    with pytest.raises(UsageError, match=words):
        plan(continued(checkpoint, "reset-head"))


def test_a_checkpoint_before_the_end_of_the_fall_of_epsilon_needs_as_many_steps(checkpoint):
    checkpoint.meta["args"]["exploration_fraction"] = 1.0
    with pytest.raises(UsageError, match="--steps of 2001 or more"):
        plan(continued(checkpoint, steps=100))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env_ids": ("Foo",)}, "unknown env_id 'Foo'"),
        ({"env_ids": ()}, "give --env-ids"),
        ({"env_ids": (PHOENIX, PHOENIX)}, "given twice"),
        ({"seeds": (1, 1)}, "given twice"),
        ({"seeds": (-1,)}, "seed is -1"),
        ({"steps": 5}, "give both --from-checkpoint and --steps"),
        ({"flags": ("--foo", "1")}, "Unrecognized options: --foo"),
        ({"flags": ("--learning-rate", "fast")}, "Error parsing --learning-rate"),
        ({"flags": ("--learning-rate", "-1")}, "learning_rate is -1.0, but must be positive"),
        (
            {"flags": ("--seed", "3")},
            "--seed after -- is what the sweep itself gives: leave it out, and give --seeds",
        ),
        ({"flags": ("--intervention", "none")}, "give --arms"),
        ({"flags": ("--resume", "runs/X")}, "--resume after --"),
        ({"flags": ()}, "arm injection: intervention is given, and nothing .* give --injection-step"),
        ({"flags": (*FLAGS, "--checkpoint-frequency", "0")}, "leaves nothing to fork arms from"),
        (
            {"custom": {"x": "--learning-rate 1e-3"}},
            "another learning_rate than none.*give --grid learning-rate",
        ),
        ({"custom": {"x": "--total-timesteps 12000"}}, "give --exploration-fraction"),
        ({"custom": {"x": "--seed 3"}}, "--seed in arm x"),
        ({"custom": {"x y": "", "x-y": "--no-freeze-heads"}}, "two runs would have the name"),
        ({"grid": [["lerning-rate", "1"]]}, "is no flag and its values"),
        ({"grid": [["learning-rate"]]}, "is no flag and its values"),
        ({"grid": [["bf16", "maybe"]]}, "must be true or false"),
        ({"grid": [["seed", "1", "2"]]}, "--seed in --grid"),
        ({"grid": [["learning-rate", "1e-4"], ["--learning-rate", "1e-3"]]}, "grid has a flag twice"),
        ({"grid": [[]]}, "grid has a flag twice, or none"),
        (
            {"grid": [["moments", "fresh", "keep"]], "custom": {"late": "--moments keep"}},
            "--moments is in arm late and in --grid: leave it out of one of them",
        ),
        (
            {"grid": [["env-backend", "a'"]]},
            "a' is no part of a command line .No closing quotation.: change --arm or --grid",
        ),
        (
            {"flags": ("--checkpoint-frequency", "0"), "arms": all_arms(("none",), {})},
            "nothing to go on from",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line(changes, words):
    with pytest.raises(UsageError, match=words) as refusal:
        plan(asked(**changes))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"custom": {"x" * 300: ""}}, r"of \d+ bytes, but 255 are possible: give a shorter name to --arm"),
        ({"custom": {"ä" * 110: ""}}, r"of 26\d bytes, but 255"),
        (
            {"grid": [["injection-step", " ".join(map(str, range(1_001, 2_000, 16)))]]},
            "fewer flags and values to --grid",
        ),
        ({"custom": {"Wide": "", "wide": "--no-freeze-heads"}}, "two runs would have the name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_names_for_which_a_file_system_has_no_room_or_that_it_takes_for_one_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        plan(asked(seeds=(1,), **changes))


def test_a_name_that_just_fits_makes_folders_and_logs():
    room = 255 - len(f"{PHOENIX}____1__1234567890-1000")
    run = plan(asked(custom={"ä" * (room // 2): "--no-freeze-heads"}, seeds=(1,)))[-1]
    Path("runs", f"{run.name}__1234567890-1000").mkdir(parents=True)
    Path("runs", f"{run.name}.log").touch()
    with pytest.raises(UsageError, match="bytes, but 255 are possible"):
        plan(asked(custom={"ä" * (room // 2 + 1): "--no-freeze-heads"}, seeds=(1,)))


@pytest.mark.parametrize("name", ["", "///", "- -", "\udcff"], ids=ascii)
def test_a_name_of_which_nothing_is_left_in_a_folders_name_is_refused(name):
    with pytest.raises(UsageError, match="give another name to --arm"):
        all_arms((), {name: "--no-freeze-heads"})


def test_a_checkpoint_is_what_its_manifest_says_wherever_it_lies():
    assert planning.identity_of(None) is None
    for path in ("a/checkpoint-5", "b c/moved"):
        Path(path).mkdir(parents=True)
        identity = json.dumps({"run": "abc", "step": 5, "args": {}})
        Path(path, "manifest.json").write_text(identity, encoding="utf-8")
        assert planning.identity_of(path) == {"run": "abc", "step": 5}
    with pytest.raises(UsageError, match="gone cannot be read as a checkpoint"):
        planning.identity_of("gone")


def test_a_run_that_recycles_forks_from_a_baseline_and_is_no_trunk():
    flags = ["--injection-step", "1001", *FLAGS[3:]]
    runs = plan(asked("redo", "reset-all", "none", flags=flags, seeds=(1,)))
    assert [run.arm for run in runs] == ["none", "redo", "reset-all"]
    redo = runs[1]
    assert redo.trunk == runs[0].name and redo.begins == STEP
    assert "--redo-frequency" not in redo.flags
    alone = plan(asked("redo", "reset-all", flags=flags, seeds=(1,)))
    assert [run.trunk for run in alone] == [None, None], "the first has no checkpoint before it recycles"
    assert [run.begins for run in alone] == [0, 0]
    with pytest.raises(UsageError, match="redo goes on from one step"):
        plan(asked("redo", "none"))


def test_arms_without_a_meaning_are_refused():
    for interventions, custom, words in (
        (
            ("reset",),
            {},
            'arm reset is none of injection, reset-moments.*give --arm "reset" FLAGS',
        ),
        ((), {"injection": "--no-freeze-heads"}, "another name to --arm"),
        ((), {"x": "--exp-name 'a"}, "'a is no part of a command line"),
    ):
        with pytest.raises(UsageError, match=words):
            all_arms(interventions, custom)


def test_the_plan_in_words_has_steps_disk_and_hours():
    runs = plan(asked("none", "injection", flags=("--injection-step", "5000", "--total-timesteps", "9000")))
    lines = plan_in_words(runs, 1.0)
    trunk = f"{PHOENIX}__none__1"
    assert lines[:2] == [
        f"{trunk}: whole, from step 0, 9,000 steps to 9,000",
        f"{PHOENIX}__injection__1: forks from {trunk} at step 5,000, 4,000 steps to 9,000",
    ]
    assert lines[4] == "4 runs, 2 of them forks: 26,000 steps, 10,000 fewer than if each ran whole"
    assert lines[6] == "hours: 7.2 of one run at a time at 1 steps per second, 2.5 at least"
    assert "--speed" in plan_in_words(runs, None)[-1]


def test_the_plan_in_words_of_a_continuation_forks_from_the_checkpoint(checkpoint):
    lines = plan_in_words(plan(continued(checkpoint, "none", seeds=(1,))), 1.0)
    assert lines[0].endswith("forks from the checkpoint at step 2,000, 5,000 steps to 7,000")
    assert lines[-1].endswith("1.4 at least")


def test_the_default_name_is_made_of_games_and_arms():
    one = asked("none", "injection")
    assert default_name(one, PHOENIX) == "Phoenix-v4_none_injection"
    assert default_name(replace(one, env_ids=(PHOENIX, PONG)), PHOENIX) == "2-games_none_injection"
    continued = replace(one, env_ids=(), from_checkpoint="/x/checkpoint-5000", steps=5)
    assert default_name(continued, PONG) == "Pong-v5_checkpoint-5000_none_injection"
