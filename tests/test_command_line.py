"""The command line: every flag explained, presets and forks completed, bad input refused in one line."""

import ast
import inspect
import itertools
import json
import re
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_GAMES, status_of

import dqn_injection_atari as script
from alternatives import ALTERNATIVES
from dqn_injection_atari import (
    OF_INTERVENTION,
    PRESETS,
    Args,
    CommandLine,
    Learner,
    Training,
    main,
    make_q_network,
    parse_args,
)
from support import flags, weights_and_biases
from support.usage import UsageError

SCRIPT = Path(script.__file__)
CLEANRL = """exp_name seed torch_deterministic cuda track wandb_project_name wandb_entity capture_video
save_model env_id total_timesteps learning_rate num_envs buffer_size gamma tau target_network_frequency
batch_size start_e end_e exploration_fraction learning_starts train_frequency""".split()


def parse(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["dqn_injection_atari.py", *flags])
    return parse_args()


def test_flags_reach_args(monkeypatch):
    args = parse(
        monkeypatch, *"--env-id ALE/Pong-v5 --injection-step 5000000 10000000 --intervention none".split()
    )
    assert args == Args(env_id="ALE/Pong-v5", injection_step=(5_000_000, 10_000_000), intervention="none")
    args = parse(
        monkeypatch, *"--injection-step 7 --no-freeze-heads --env-backend ale --no-cuda --tau 0.5".split()
    )
    assert args == Args(injection_step=(7,), freeze_heads=False, env_backend="ale", cuda=False, tau=0.5)
    assert parse(monkeypatch) == Args()


def test_cleanrls_knobs_keep_their_names():
    assert set(CLEANRL) <= {field.name for field in fields(Args)}


def test_defaults_are_the_default_setting():
    args = Args()
    assert (args.learning_rate, args.target_network_frequency, args.train_frequency, args.batch_size) == (
        1e-4,
        8_000,
        4,
        32,
    )
    assert (args.buffer_size, args.learning_starts, args.total_timesteps) == (1_000_000, 80_000, 15_000_000)
    assert (args.start_e, args.end_e, args.exploration_fraction, args.gamma) == (1.0, 0.01, 0.1, 0.99)
    assert (args.injection_norm_ratio, args.injection_check_frequency, args.max_injections) == (3, 1_000, 1)
    assert (args.plasticity_frequency, args.eval_epsilon) == (50_000, 0.01)
    learner = Learner(args, 6, "cpu")
    assert learner.optimizer.defaults["eps"] == 1.5e-4 and learner.optimizer.defaults["lr"] == 1e-4


PAPER = {
    "total_timesteps": 50_000_000,
    "injection_step": (12_500_000,),
    "optimizer": "rmsprop",
    "learning_rate": 2.5e-4,
    "target_network_frequency": 30_000,
    "learning_starts": 50_000,
    "exploration_start": 50_000,
    "shared_bias": True,
    "eval_frequency": 250_000,
    "eval_episodes": 0,
    "eval_steps": 125_000,
    "moments": "keep",
}


def test_a_preset_sets_the_flags_that_are_not_given(monkeypatch):
    assert parse(monkeypatch, "--preset", "default") == Args() == parse(monkeypatch)
    paper = parse(monkeypatch, "--preset", "paper")
    assert all(getattr(paper, name) == value for name, value in PAPER.items())
    assert (
        paper.exploration_fraction * paper.total_timesteps == 1_000_000
        and paper.end_e == paper.eval_epsilon == 0.01
    )
    assert (paper.batch_size, paper.train_frequency, paper.buffer_size, paper.gamma) == (
        32,
        4,
        1_000_000,
        0.99,
    )


@pytest.mark.parametrize("order", [1, -1])
def test_single_flags_override_a_preset_also_with_values_that_are_defaults(monkeypatch, order):
    flags = ["--preset=paper", "--target-network-frequency=8000", "--no-shared-bias", "--optimizer=adam"][
        ::order
    ]
    args = parse(monkeypatch, *flags, "--env-id", "PongNoFrameskip-v4")
    assert (args.target_network_frequency, args.shared_bias, args.optimizer) == (8_000, False, "adam")
    assert args.learning_rate == 2.5e-4 and args.env_id == "PongNoFrameskip-v4"


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--intervention reset-head", {"intervention": "reset-head", "injection_step": (12_500_000,)}),
        (
            "--intervention shrink-perturb --shrink-factor 0.5",
            {"shrink_factor": 0.5, "injection_step": (12_500_000,)},
        ),
        (
            "--injection-trigger norm",
            {"injection_trigger": "norm", "injection_step": (), "moments": "keep"},
        ),
        ("--injection-trigger norm --max-injections 3", {"max_injections": 3, "injection_step": ()}),
        ("--intervention none", {"intervention": "none", "moments": "keep"}),
        ("--intervention reset-head", {"intervention": "reset-head", "moments": "keep"}),
        ("--eval-frequency 0 --num-envs 8", {"num_envs": 8, "eval_steps": 125_000}),
    ],
)
def test_a_preset_takes_another_intervention_or_trigger_and_leaves_out_what_nothing_would_look_at_then(
    monkeypatch, flags, kept
):
    args = parse(monkeypatch, "--preset", "paper", *flags.split())
    assert {name: getattr(args, name) for name in kept} == kept
    assert args.optimizer == "rmsprop" and args.shared_bias


def test_every_preset_is_one_of_arguments_that_work_and_names_no_default():
    for preset in PRESETS.values():
        args = Args(**preset)
        assert all(getattr(args, name) != getattr(Args, name) for name in preset)


@pytest.mark.parametrize("flag", ["--resume", "--fork"])
def test_a_run_that_goes_on_takes_no_preset(monkeypatch, flag):
    with pytest.raises(UsageError, match="leave out --preset"):
        parse(monkeypatch, flag, "runs/x", "--preset", "paper")


@pytest.mark.parametrize(
    ("args", "fix"),
    [
        ({"intervention": "shrink-perturb"}, "give --injection-step, or --injection-trigger norm"),
        ({"injection_trigger": "norm", "injection_step": (5,)}, "give --injection-step without a number"),
        ({"injection_norm_ratio": 2.0, "injection_step": (5,)}, "only --injection-trigger norm looks at"),
        ({"max_injections": 2}, "only --injection-trigger norm looks at"),
        ({"injection_check_frequency": 5}, "only --injection-trigger norm looks at"),
        (
            {"intervention": "reset-head", "injection_step": (5,), "freeze_heads": False},
            "only --intervention injection",
        ),
        (
            {"intervention": "reset-head", "injection_step": (5,), "injected_head_width": 1024},
            "only --intervention injection",
        ),
        ({"moments": "keep", "injected_head_width": 1024}, "give --moments fresh"),
        ({"shrink_factor": 0.5, "injection_step": (5,)}, "only --intervention shrink-perturb"),
        (
            {"intervention": "reset"},
            f"one of injection, {', '.join(ALTERNATIVES)}, none",
        ),
        ({"moments": "copy", "injection_step": (5,)}, "one of fresh, keep"),
        ({"optimizer": "sgd"}, "one of adam, rmsprop"),
        *(
            ({name: "caf\udce9"}, rf"must be text in UTF-8: change --{name.replace('_', '-')}$")
            for name in ("exp_name", "fork", "wandb_entity", "wandb_project_name")
        ),
        ({"eval_steps": 100}, "give --eval-episodes 0 with --eval-steps"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_or_would_do_nothing_are_refused_with_the_fix(args, fix):
    with pytest.raises(UsageError, match=fix):
        Args(**args)


@pytest.mark.parametrize("step", [2**63, 10**20])
@pytest.mark.parametrize("name", ["injection_step", "keep_checkpoints"])
def test_a_step_that_no_integer_of_a_machine_holds_is_refused_as_others_are(name, step):
    with pytest.raises(UsageError, match=rf"^{name} is \({step},\), but must be within"):
        Args(**{name: (step,)})


def fork_of(monkeypatch, origin, *flags):
    Path("runs/o/checkpoint-5").mkdir(parents=True, exist_ok=True)
    Path("runs/o/checkpoint-5/manifest.json").write_text(
        json.dumps({"args": asdict(origin)}), encoding="utf-8"
    )
    return parse(monkeypatch, "--fork", "runs/o/checkpoint-5", *flags)


@pytest.mark.parametrize(
    ("origin", "flags", "applied"),
    [
        ({"intervention": "none"}, "--intervention injection", "injection"),
        ({"intervention": "none"}, "--intervention reset-head", "reset-head"),
        ({"intervention": "none"}, "--exp-name other", "none"),
        ({"intervention": "none"}, "--intervention shrink-perturb", "shrink-perturb"),
        ({"intervention": "reset-head"}, "--intervention none", "none"),
        ({"intervention": "reset-head"}, "--exp-name other", "reset-head"),
        ({}, "--intervention none", "none"),
    ],
)
def test_what_a_fork_says_of_its_intervention_goes_before_what_it_takes_over(
    monkeypatch, origin, flags, applied
):
    origin = Args(**{"injection_step": (5,)} | origin)
    assert fork_of(monkeypatch, origin, *flags.split()).intervention == applied


@pytest.mark.parametrize(
    ("origin", "flags"),
    [
        ({"freeze_heads": False, "moments": "keep"}, "--intervention reset-head"),
        ({"intervention": "shrink-perturb", "shrink_factor": 0.5}, "--intervention injection"),
        (
            {
                "injection_step": (),
                "injection_trigger": "norm",
                "max_injections": 3,
                "injection_norm_ratio": 2.0,
            },
            "--injection-trigger step --injection-step 9",
        ),
        ({}, "--injection-trigger norm"),
    ],
)
def test_a_fork_does_not_take_over_what_its_intervention_or_trigger_would_pass_over(
    monkeypatch, origin, flags
):
    fork_of(monkeypatch, Args(**{"injection_step": (5,)} | origin), *flags.split())


@pytest.mark.parametrize(
    ("flags", "steps"), [("", 1e6), ("--total-timesteps 20000000", 1e6), ("--exploration-fraction 0.5", 25e6)]
)
def test_epsilon_falls_over_as_many_steps_in_the_paper_however_long_the_run(monkeypatch, flags, steps):
    args = parse(monkeypatch, "--preset", "paper", *flags.split())
    assert args.exploration_fraction * args.total_timesteps == pytest.approx(steps)


def test_a_baseline_may_have_the_flags_of_the_arm_it_belongs_to():
    baselines = [
        Args(intervention="none", injection_step=(5,), freeze_heads=False),
        Args(intervention="none", injection_step=(5,), shrink_factor=0.5, moments="keep"),
        Args(intervention="none"),
    ]
    assert {args.intervention for args in baselines} == {"none"}
    assert Args(intervention="reset-head", injection_step=(5,)).intervention == "reset-head"


def field_docstrings(source, name):
    """{field: docstring} of a class, read off its source."""
    docstrings = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for field, docstring in itertools.pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr):
                    docstrings[field.target.id] = docstring.value.value
    return docstrings


def test_help_explains_every_flag_in_the_order_in_which_a_user_meets_them(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    assert status_of(main) == 0
    out = capsys.readouterr().out
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    explanations = field_docstrings(SCRIPT, "Experiment")
    for alternative in ALTERNATIVES.values():
        source = Path(inspect.getfile(alternative.settings))
        explanations |= field_docstrings(source, alternative.settings.__name__)
    explanations |= field_docstrings(Path(flags.__file__), "RunFlags")
    assert list(explanations) == [field.name for field in fields(Args)]
    explanations |= field_docstrings(SCRIPT, "CommandLine")
    assert list(explanations) == [field.name for field in fields(CommandLine)]
    for name, explanation in explanations.items():
        assert f"--{name.replace('_', '-')}" in plain
        assert " ".join(explanation.split()) in plain, name
    shown = [
        name
        for name in re.findall(r"^[│|]? *--([a-z][a-z0-9-]+)", out, re.MULTILINE)
        if not name.startswith("no-")
    ]
    assert [name.replace("-", "_") for name in shown] == list(explanations)
    assert shown[:6] == ["env-id", "seed", "exp-name", "total-timesteps", "num-envs", "env-backend"]
    assert "Double DQN with plasticity injection" in plain and "1 step = 1 decision of the agent" in plain


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        ("--eval-epsilon 0.01", "--eval-frequency"),
        ("--eval-episodes 0 --eval-steps 500", "--eval-frequency"),
        ("--preset paper --eval-frequency 0 --eval-steps 500", "--eval-frequency"),
        ("--wandb-project-name x", "--track"),
        ("--wandb-entity me --no-track", "--track"),
        ("--intervention injection", "--injection-step"),
        ("--no-freeze-heads", "--injection-step"),
        ("--injected-head-width 1024", "--injection-step"),
        ("--moments keep", "--injection-step"),
        ("--preset paper --injection-step --moments keep", "--injection-step"),
        ("--intervention none --shrink-factor 0.5", "--injection-step"),
    ],
)
def test_a_flag_that_nothing_in_the_run_would_look_at_is_refused_with_the_one_that_is_missing(
    monkeypatch, flags, fix
):
    with pytest.raises(UsageError, match=f"nothing in this run looks at (it|them): give {fix}"):
        parse(monkeypatch, *flags.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--eval-frequency 500 --eval-epsilon 0.1",
        "--track --wandb-project-name x",
        "--intervention none",
        "--injection-step 5 --intervention none --no-freeze-heads",
        "--injection-trigger norm --injected-head-width 1024",
    ],
)
def test_and_with_that_it_is_taken(monkeypatch, flags):
    parse(monkeypatch, *flags.split())


BAD = {
    "unknown environment": ("--env-id NoSuchGame-v4", "env_id"),
    "no Atari environment": ("--env-id CartPole-v1", "not an Atari game"),
    "no environment to play in": ("--num-envs 0", "num_envs is 0"),
    "negative length": ("--total-timesteps -5", "total_timesteps is -5"),
    "empty replay": ("--buffer-size 0", "buffer_size is 0"),
    "replay smaller than one vector step": ("--buffer-size 4 --num-envs 8", "buffer_size is 4"),
    "empty batch": ("--batch-size 0", "batch_size is 0"),
    "target frequency": ("--target-network-frequency 0", "target_network_frequency is 0"),
    "train frequency": ("--train-frequency 0", "train_frequency is 0"),
    "log frequency": ("--log-frequency 0", "log_frequency is 0"),
    "log frequency below one vector step": ("--log-frequency 4 --num-envs 8", "log_frequency is 4"),
    "evaluation frequency": ("--eval-frequency -1", "eval_frequency is -1"),
    "evaluation episodes": ("--eval-episodes 0", "eval_episodes is 0"),
    "learning starts": ("--learning-starts -1", "learning_starts is -1"),
    "learning rate": ("--learning-rate 0", "learning_rate is 0"),
    "learning rate not a number": ("--learning-rate nan", "learning_rate is nan"),
    "discount": ("--gamma 1.5", "gamma is 1.5"),
    "tau": ("--tau 0", "tau is 0"),
    "epsilon": ("--end-e 2", "end_e is 2"),
    "exploration": ("--exploration-fraction -0.1", "exploration_fraction is -0.1"),
    "evaluation epsilon": ("--eval-epsilon 1.1", "eval_epsilon is 1.1"),
    "seed": ("--seed -1", "seed is -1"),
    "injection at the end": ("--total-timesteps 1000 --injection-step 1000", "within 1 ... 999"),
    "injection in the last vector step": (
        "--total-timesteps 100 --injection-step 97 --num-envs 8",
        "within 1 ... 96",
    ),
    "injections in one vector step": (
        "--injection-step 9 16 --num-envs 8",
        "increasing by num_envs (8) or more",
    ),
    "target frequency within a vector step": (
        "--target-network-frequency 4 --num-envs 8",
        "at least num_envs (8): raise",
    ),
    "measures within a vector step": ("--plasticity-frequency 4 --num-envs 8", "plasticity_frequency is 4"),
    "injection past the end": ("--injection-step 20000000", "injection_step is (20000000,)"),
    "injection before the start": ("--injection-step 0", "injection_step is (0,)"),
    "injections not increasing": ("--injection-step 10 10", "increasing"),
    "replay larger than memory": ("--buffer-size 1000000000", "GB of memory are free"),
    "wandb missing": ("--track --buffer-size 100", "pip install wandb"),
    "video without evaluation": ("--capture-video", "--eval-frequency"),
    "checkpoints within a vector step": (
        "--checkpoint-frequency 4 --num-envs 8",
        "checkpoint_frequency is 4",
    ),
    "checkpoint frequency": ("--checkpoint-frequency -1", "checkpoint_frequency is -1"),
    "resuming nothing": ("--resume nowhere", "nowhere/run.json cannot be read as a run's arguments"),
    "forking nothing": ("--fork nowhere", "nowhere/manifest.json cannot be read as"),
    "resuming and forking": ("--resume a --fork b", "give one of --resume, --fork and --evaluate"),
    "resuming and evaluating": ("--resume a --evaluate b", "give one of --resume, --fork and --evaluate"),
    "a checkpoint to keep beyond the end": (
        "--total-timesteps 90 --keep-checkpoints 5 91",
        "within 0 ... 90, the run's steps",
    ),
    "a checkpoint to keep before the start": ("--keep-checkpoints=-1", "keep_checkpoints is (-1,)"),
    "checkpoints to keep where there are none": (
        "--keep-checkpoints 5 --checkpoint-frequency 0",
        "give a --checkpoint-frequency, or --keep-checkpoints without",
    ),
    "graphs without a GPU": ("--cuda-graphs --no-cuda --buffer-size 100", "--cuda-graphs needs a GPU"),
    "evaluating nothing": ("--evaluate nowhere.pt", "nowhere.pt"),
    "evaluating an unset shell variable": ("--evaluate=", "agent.pt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(monkeypatch, case):
    flags, message = BAD[case]
    monkeypatch.setattr(Training, "loop", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(
        weights_and_biases.importlib.util, "find_spec", lambda _: None
    )  # as where wandb is missing
    monkeypatch.setattr(sys, "argv", ["", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    error = str(stop.value.code)
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_the_shell_sees_one_line_and_a_status():
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--num-envs", "0"], capture_output=True, encoding="utf-8", check=False
    )
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == "error: num_envs is 0, but must be at least 1: change --num-envs\n"


def test_a_run_folder_that_cannot_be_written_is_refused(monkeypatch):
    Path("runs").write_text("a file is in the way", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["", "--buffer-size", "100"])
    with pytest.raises(SystemExit, match=r"^error: cannot write run folder .*runs/Phoenix"):
        main()
    assert Path("runs").read_text(encoding="utf-8") == "a file is in the way"


@pytest.mark.parametrize(
    "given,kept", [(5, (5,)), (np.int64(5), (5,)), ([5], (5,)), ((5, 9), (5, 9)), ((), ())]
)
def test_args_takes_one_injection_step_or_several(given, kept):
    assert Args(injection_step=given).injection_step == kept


@pytest.mark.parametrize(
    ("num_envs", "total", "planned", "ends"),
    [
        (1, 100, (1, 99), (1, 99)),
        (8, 100, (1, 9, 96), (8, 16, 96)),
        (8, 104, (96,), (96,)),
        (7, 100, (92,), (98,)),
    ],
)
def test_interventions_are_planned_for_the_ends_of_their_vector_steps(num_envs, total, planned, ends):
    args = Args(num_envs=num_envs, total_timesteps=total, injection_step=planned)
    assert args.planned_interventions == ends
    with pytest.raises(
        UsageError, match="before the run's end at --total-timesteps: change --injection-step"
    ):
        Args(num_envs=num_envs, total_timesteps=total, injection_step=(*planned, ends[-1]))


@pytest.mark.parametrize(
    ("args", "pairs"),
    [
        ({}, 0),
        ({"injection_step": (5, 10, 20)}, 3),
        ({"injection_trigger": "norm"}, 1),
        ({"injection_trigger": "norm", "max_injections": 4}, 4),
        ({"injection_step": (5, 10), "intervention": "none"}, 0),
        ({"injection_step": tuple(range(1, 51)), "intervention": "reset-head"}, 0),
        ({"injection_step": (5,), "intervention": "shrink-perturb"}, 0),
        ({"injection_trigger": "norm", "max_injections": 4, "intervention": "reset-head"}, 0),
    ],
    ids=str,
)
def test_a_network_has_room_for_all_injections_that_will_be_made_and_for_no_other(args, pairs):
    assert len(make_q_network(Args(**args), 6, "cpu").head.theta_prime_1) == pairs


@pytest.mark.parametrize("given,kept", [(5, (5,)), ([5, 0], (5, 0)), ((), ())])
def test_args_keeps_one_checkpoint_or_several_each_at_the_end_of_its_vector_step(given, kept):
    args = Args(keep_checkpoints=given, total_timesteps=20, num_envs=3, injection_step=(7, 14))
    assert args.keep_checkpoints == kept and args.kept_checkpoints == {
        9,
        *(-(-step // 3) * 3 for step in kept),
    }
    assert Args(keep_checkpoints=20, total_timesteps=20, num_envs=3).kept_checkpoints == {20}


def test_what_may_differ_in_a_fork_are_fields():
    forkable = set(script.FORKABLE)
    assert len(forkable) == len(script.FORKABLE) and forkable <= {field.name for field in fields(Args)}
    assert forkable.issuperset(OF_INTERVENTION)
    assert not forkable & {"env_id", "num_envs", "learning_rate", "checkpoint_frequency", "log_frequency"}


def test_args_refuses_with_a_value_error():
    with pytest.raises(ValueError, match="num_envs"):
        Args(num_envs=0)
    with pytest.raises(ValueError, match="env_backend"):
        Args(env_backend="gym")


def test_what_is_no_flag_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, "--no-such-flag")
    assert stop.value.code == 2 and "--no-such-flag" in capsys.readouterr().err


def test_interrupting_an_evaluation_of_a_saved_agent_is_no_traceback(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "evaluate_saved", interrupted)
    monkeypatch.setattr(sys, "argv", ["", "--evaluate", "agent.pt"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130


@pytest.mark.parametrize(
    ("refused", "fix", "done"),
    [
        (
            "--num-envs 8 --total-timesteps 8 --injection-step 4",
            "give a --total-timesteps of 9 or more",
            "--num-envs 8 --total-timesteps 9 --injection-step 4",
        ),
        (
            "--total-timesteps 1 --injection-trigger norm",
            "give a --total-timesteps of 2 or more",
            "--total-timesteps 2 --injection-trigger norm",
        ),
        (
            "--eval-steps 9",
            "give --eval-episodes 0 with --eval-steps, or",
            "--eval-steps 9 --eval-episodes 0 --eval-frequency 9",
        ),
        (
            "--eval-steps 9 --eval-episodes 0",
            "eval_episodes and eval_steps are given, .* or leave them out",
            "",
        ),
        ("--no-freeze-heads", "leave it out", ""),
        (
            "--keep-checkpoints 5 --checkpoint-frequency 0",
            "give a --checkpoint-frequency",
            "--keep-checkpoints 5",
        ),
        (
            "--keep-checkpoints 5 --checkpoint-frequency 0",
            "or --keep-checkpoints without",
            "--checkpoint-frequency 0",
        ),
        ("--num-envs 8 --log-frequency 4", "raise --log-frequency", "--num-envs 8 --log-frequency 8"),
        ("--num-envs 8 --log-frequency 4", "lower --num-envs", "--num-envs 4 --log-frequency 4"),
        ("--fork F --gamma 5", r"gamma is 5\.0, there 0\.99; .*: leave out --gamma$", "--fork F"),
        (
            "--fork F --log-frequency 4 --seed 2",
            "log_frequency is 4, .*: leave out --log-frequency$",
            "--fork F --seed 2",
        ),
        (
            "--fork F --eval-frequency 4",
            "at least num_envs .8.: raise --eval-frequency$",
            "--fork F --eval-frequency 8",
        ),
        (
            "--fork F --keep-checkpoints 5",
            "writes none: give --keep-checkpoints without a number$",
            "--fork F --keep-checkpoints",
        ),
        ("--resume F --seed 2", "leave out, or use --fork$", "--fork F --seed 2"),
        ("--resume F --gamma 0.5 --seed 2", "leave out, or begin a new run$", "--gamma 0.5 --seed 2"),
    ],
)
def test_what_a_refusal_says_to_do_can_be_done_and_works(monkeypatch, refused, fix, done):
    """F is a run's folder, and for short a checkpoint of it."""
    args = asdict(Args(num_envs=8, checkpoint_frequency=0))
    Path("F").mkdir()
    for name in ("run.json", "manifest.json"):
        Path("F", name).write_text(json.dumps({"args": args}), encoding="utf-8")
    with pytest.raises(UsageError, match=fix):
        parse(monkeypatch, *refused.split())
    parse(monkeypatch, *done.split())


@pytest.mark.parametrize("flag", ["--resume", "--fork", "--evaluate"])
def test_of_a_run_of_another_version_it_is_said_that_that_version_reads_it(monkeypatch, flag):
    args = asdict(Args()) | {"apply_injection": True}
    Path("F").mkdir()
    for name in ("run.json", "manifest.json"):
        Path("F", name).write_text(json.dumps({"args": args}), encoding="utf-8")
    torch.save({"args": args}, "F/agent.pt")
    monkeypatch.setattr(sys, "argv", ["", flag, "F"])
    fix = "or go on with the version of this project that wrote it$"
    with pytest.raises(
        SystemExit, match=rf"^error: F/.* cannot be read as a run's arguments \(.*\): .*{fix}"
    ):
        main()


def test_where_memory_runs_out_as_an_agent_plays_no_flag_of_training_is_named(monkeypatch):
    def evaluate_saved(args):
        raise MemoryError

    monkeypatch.setattr(script, "evaluate_saved", evaluate_saved)
    monkeypatch.setattr(sys, "argv", ["", "--evaluate", "F"])
    with pytest.raises(SystemExit, match=r"^error: memory has run out \(MemoryError\): free some$"):
        main()


def test_a_run_to_resume_takes_no_other_flag(monkeypatch):
    Path("run").mkdir()
    Path("run/run.json").write_text(json.dumps({"args": asdict(Args(seed=7))}), encoding="utf-8")
    assert parse(monkeypatch, "--resume", "run") == Args(resume="run")
    assert parse(monkeypatch, "--resume", "run", "--seed", "7") == Args(resume="run"), "which is its own"
    with pytest.raises(UsageError, match=r"gamma cannot change: leave out, or begin a new run$"):
        parse(monkeypatch, "--resume", "run", "--gamma", "0.5")


@pytest.mark.parametrize("signals", [None, signal.SIGTERM, signal.SIGINT])
def test_the_status_tells_a_run_that_was_stopped_from_one_that_is_complete(monkeypatch, signals):
    given = []

    def train(args, asked):
        given.append(args)
        asked.stop = signals

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(sys, "argv", ["", "--env-id", TINY_GAMES])
    if signals is None:
        main()
    else:
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[signals]
    assert given == [Args(env_id=TINY_GAMES)]
