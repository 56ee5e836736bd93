"""The command line: every flag explained, bad input refused in one line, the README's commands valid."""

import ast
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest

import dqn_injection_atari
from dqn_injection_atari import Args, UsageError, main, parse_args, train

SCRIPT = Path(dqn_injection_atari.__file__)
README = SCRIPT.with_name("README.md")
CLEANRL = """exp_name seed torch_deterministic cuda track wandb_project_name wandb_entity capture_video save_model env_id
total_timesteps learning_rate num_envs buffer_size gamma tau target_network_frequency batch_size start_e end_e
exploration_fraction learning_starts train_frequency""".split()


def parse(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["dqn_injection_atari.py", *flags])
    return parse_args()


def test_flags_reach_args(monkeypatch):
    args = parse(monkeypatch, *"--env-id ALE/Pong-v5 --injection-step 5000000 10000000 --no-apply-injection".split())
    assert args == Args(env_id="ALE/Pong-v5", injection_step=(5_000_000, 10_000_000), apply_injection=False)
    args = parse(monkeypatch, *"--injection-step 7 --no-freeze-heads --env-backend ale --no-cuda --tau 0.5".split())
    assert args == Args(injection_step=(7,), freeze_heads=False, env_backend="ale", cuda=False, tau=0.5)
    assert parse(monkeypatch) == Args()


def test_cleanrls_knobs_keep_their_names():
    assert set(CLEANRL) <= {field.name for field in fields(Args)}


def test_defaults_are_the_default_setting():
    args = Args()
    assert (args.learning_rate, args.target_network_frequency, args.train_frequency, args.batch_size) == (1e-4, 8_000, 4, 32)
    assert (args.buffer_size, args.learning_starts, args.total_timesteps) == (1_000_000, 80_000, 15_000_000)
    assert (args.start_e, args.end_e, args.exploration_fraction, args.gamma) == (1.0, 0.01, 0.1, 0.99)
    learner = dqn_injection_atari.Learner(args, 6, "cpu")
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
}


def test_a_preset_sets_the_flags_that_are_not_given(monkeypatch):
    assert parse(monkeypatch, "--preset", "default") == Args() == parse(monkeypatch)
    paper = parse(monkeypatch, "--preset", "paper")
    assert all(getattr(paper, name) == value for name, value in PAPER.items())
    assert paper.exploration_fraction * paper.total_timesteps == 1_000_000 and paper.end_e == paper.eval_epsilon == 0.01
    assert (paper.batch_size, paper.train_frequency, paper.buffer_size, paper.gamma) == (32, 4, 1_000_000, 0.99)


@pytest.mark.parametrize("order", [1, -1])
def test_single_flags_override_a_preset_also_with_values_that_are_defaults(monkeypatch, order):
    flags = ["--preset=paper", "--target-network-frequency=8000", "--no-shared-bias", "--optimizer=adam"][::order]
    args = parse(monkeypatch, *flags, "--env-id", "PongNoFrameskip-v4")
    assert (args.target_network_frequency, args.shared_bias, args.optimizer) == (8_000, False, "adam")
    assert args.learning_rate == 2.5e-4 and args.env_id == "PongNoFrameskip-v4"


@pytest.mark.parametrize("flag", ["--resume", "--fork"])
def test_a_run_that_goes_on_takes_no_preset(monkeypatch, flag):
    with pytest.raises(UsageError, match="leave out --preset"):
        parse(monkeypatch, flag, "runs/x", "--preset", "paper")


@pytest.mark.parametrize(
    ("args", "fix"),
    [
        ({"intervention": "reset-head", "injection_step": (5,), "apply_injection": False}, "give --intervention none"),
        ({"intervention": "shrink-perturb"}, "give --injection-step, or --injection-trigger norm"),
        ({"injection_trigger": "norm", "injection_step": (5,)}, "give --injection-step without a number"),
        ({"injection_norm_ratio": 2.0, "injection_step": (5,)}, "only --injection-trigger norm looks at"),
        ({"max_injections": 2}, "only --injection-trigger norm looks at"),
        ({"injection_check_frequency": 5}, "only --injection-trigger norm looks at"),
        ({"intervention": "reset-head", "injection_step": (5,), "freeze_heads": False}, "only --intervention injection"),
        (
            {"intervention": "reset-head", "injection_step": (5,), "injection_optimizer_state": "copy"},
            "only --intervention injection",
        ),
        ({"shrink_factor": 0.5, "injection_step": (5,)}, "only --intervention shrink-perturb"),
        ({"shrink_factor": 1.5}, "between 0 and 1"),
        ({"injection_norm_ratio": 0.0, "injection_trigger": "norm"}, "positive and finite"),
        ({"intervention": "reset"}, "one of injection, reset-head, shrink-perturb, none"),
        ({"optimizer": "sgd"}, "one of adam, rmsprop"),
        ({"eval_steps": 100}, "give --eval-episodes 0 with --eval-steps"),
        ({"eval_episodes": 0}, "give --eval-episodes 0 with --eval-steps"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_or_would_do_nothing_are_refused_with_the_fix(args, fix):
    with pytest.raises(UsageError, match=fix):
        Args(**args)


def fork_of(monkeypatch, origin, *flags):
    Path("runs/o/checkpoint-5").mkdir(parents=True, exist_ok=True)
    Path("runs/o/checkpoint-5/manifest.json").write_text(json.dumps({"args": asdict(origin)}))
    return parse(monkeypatch, "--fork", "runs/o/checkpoint-5", *flags)


@pytest.mark.parametrize(
    ("origin", "flags", "applied"),
    [
        ({"apply_injection": False}, "--intervention injection", "injection"),
        ({"apply_injection": False}, "--intervention reset-head", "reset-head"),
        ({"apply_injection": False}, "--apply-injection", "injection"),
        ({"apply_injection": False}, "--exp-name other", "none"),
        ({"intervention": "none"}, "--apply-injection", "injection"),
        ({"intervention": "none"}, "--intervention shrink-perturb", "shrink-perturb"),
        ({"intervention": "reset-head"}, "--no-apply-injection", "none"),
        ({"intervention": "reset-head"}, "--exp-name other", "reset-head"),
        ({}, "--no-apply-injection", "none"),
        ({}, "--intervention none", "none"),
    ],
)
def test_what_a_fork_says_of_its_intervention_goes_before_what_it_takes_over(monkeypatch, origin, flags, applied):
    origin = Args(**{"injection_step": (5,)} | origin)
    assert fork_of(monkeypatch, origin, *flags.split()).applied_intervention == applied


@pytest.mark.parametrize(
    ("origin", "flags"),
    [
        ({"freeze_heads": False, "injection_optimizer_state": "copy"}, "--intervention reset-head"),
        ({"intervention": "shrink-perturb", "shrink_factor": 0.5}, "--intervention injection"),
        (
            {"injection_step": (), "injection_trigger": "norm", "max_injections": 3, "injection_norm_ratio": 2.0},
            "--injection-trigger step --injection-step 9",
        ),
        ({}, "--injection-trigger norm"),
    ],
)
def test_a_fork_does_not_take_over_what_its_intervention_or_trigger_would_pass_over(monkeypatch, origin, flags):
    fork_of(monkeypatch, Args(**{"injection_step": (5,)} | origin), *flags.split())


@pytest.mark.parametrize("flags", ["--intervention none --apply-injection", "--intervention injection --no-apply-injection"])
def test_an_intervention_that_is_asked_for_and_denied_is_refused(monkeypatch, flags):
    with pytest.raises(UsageError, match="contradict each other: give one of them"):
        parse(monkeypatch, "--injection-step", "5", *flags.split())


@pytest.mark.parametrize(
    ("flags", "steps"), [("", 1e6), ("--total-timesteps 20000000", 1e6), ("--exploration-fraction 0.5", 25e6)]
)
def test_epsilon_falls_over_as_many_steps_in_the_paper_however_long_the_run(monkeypatch, flags, steps):
    args = parse(monkeypatch, "--preset", "paper", *flags.split())
    assert args.exploration_fraction * args.total_timesteps == pytest.approx(steps)


def test_a_baseline_may_have_the_flags_of_the_arm_it_belongs_to():
    baselines = [
        Args(apply_injection=False, injection_step=(5,), freeze_heads=False),
        Args(intervention="none", injection_step=(5,), shrink_factor=0.5, injection_optimizer_state="copy"),
        Args(intervention="none", apply_injection=False),
    ]
    assert {args.applied_intervention for args in baselines} == {"none"}
    assert Args(intervention="reset-head", injection_step=(5,)).applied_intervention == "reset-head"


def field_docstrings():
    """{field: docstring} of Args, read off the source."""
    body = next(
        node for node in ast.parse(SCRIPT.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Args"
    ).body
    return {
        field.target.id: doc.value.value
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


def test_help_explains_every_flag():
    command, environment = [sys.executable, str(SCRIPT), "--help"], {**os.environ, "COLUMNS": "160"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    explanations = field_docstrings()
    assert list(explanations) == [field.name for field in fields(Args)]
    for name, explanation in explanations.items():
        assert f"--{name.replace('_', '-')}" in plain
        assert " ".join(explanation.split()) in plain, name


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
    "injection past the end": ("--injection-step 20000000", "injection_step is (20000000,)"),
    "injection before the start": ("--injection-step 0", "injection_step is (0,)"),
    "injections not increasing": ("--injection-step 10 10", "increasing"),
    "replay larger than memory": ("--buffer-size 1000000000", "GB of memory are free"),
    "wandb missing": ("--track --buffer-size 100", "pip install wandb"),
    "video without evaluation": ("--capture-video", "--eval-frequency"),
    "checkpoints within a vector step": ("--checkpoint-frequency 4 --num-envs 8", "checkpoint_frequency is 4"),
    "checkpoint frequency": ("--checkpoint-frequency -1", "checkpoint_frequency is -1"),
    "resuming nothing": ("--resume nowhere", "nowhere/run.json cannot be read as"),
    "forking nothing": ("--fork nowhere", "nowhere/manifest.json cannot be read as"),
    "resuming and forking": ("--resume a --fork b", "give one of --resume, --fork and --evaluate"),
    "resuming and evaluating": ("--resume a --evaluate b", "give one of --resume, --fork and --evaluate"),
    "graphs without a GPU": ("--cuda-graphs --no-cuda --buffer-size 100", "--cuda-graphs needs a GPU"),
    "compiling without a compiler": ("--compile --no-cuda --buffer-size 100", "--compile needs a C++ compiler"),
    "evaluating nothing": ("--evaluate nowhere.pt", "nowhere.pt"),
    "evaluating an unset shell variable": ("--evaluate=", "agent.pt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(monkeypatch, case):
    flags, message = BAD[case]
    monkeypatch.setattr(dqn_injection_atari, "training_loop", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(dqn_injection_atari.importlib.util, "find_spec", lambda _: None)  # as where wandb is missing
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(sys, "argv", ["", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    error = str(stop.value.code)
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not list(Path().iterdir())


def test_the_shell_sees_one_line_and_a_status():
    run = subprocess.run([sys.executable, str(SCRIPT), "--num-envs", "0"], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == "error: num_envs is 0, but must be at least 1: change --num-envs\n"


def test_a_replay_that_does_not_fit_names_needed_free_and_what_would_fit(monkeypatch):
    monkeypatch.setattr(dqn_injection_atari, "free_memory", lambda: 2_000_000_000)
    with pytest.raises(UsageError, match=r"needs 7\.3 GB and 2\.0 GB of memory are free") as error:
        train(Args())
    fits = int(re.search(r"lower --buffer-size to (\d+)$", str(error.value)).group(1))
    space = dqn_injection_atari.make_envs(Args()).single_observation_space
    needed = dqn_injection_atari.FrameReplayBuffer.bytes_needed
    assert 1.7e9 < needed(fits, space) <= 2e9


@pytest.mark.parametrize(
    "line,folder,limit,usage,cache",
    [
        ("0::/job/step", "job/step", "memory.max", "memory.current", "file"),
        ("0::/job/step", "job", "memory.max", "memory.current", "file"),
        ("0::/../outside", "", "memory.max", "memory.current", "file"),
        ("4:memory:/job", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ],
)
def test_free_memory_is_the_control_groups_where_that_is_less(tmp_path, line, folder, limit, usage, cache):
    machine = dqn_injection_atari.free_memory(tmp_path / "no control groups")
    assert machine > 2e8
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/job\n{line}\n")
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    (group / limit).write_text("150000000\n")
    (group / usage).write_text("80000000\n")
    (group / "memory.stat").write_text(f"anon 50000000\n{cache} 30000000\n")
    assert dqn_injection_atari.free_memory(tmp_path) == 100_000_000
    (group / limit).write_text("max\n")
    assert dqn_injection_atari.free_memory(tmp_path) > 2e8


def test_a_run_folder_that_cannot_be_written_is_refused(monkeypatch):
    Path("runs").write_text("a file is in the way")
    monkeypatch.setattr(sys, "argv", ["", "--buffer-size", "100"])
    with pytest.raises(SystemExit, match=r"^error: cannot write run folder .*runs/Phoenix"):
        main()
    assert Path("runs").read_text() == "a file is in the way"


@pytest.mark.parametrize("given,kept", [(5, (5,)), (np.int64(5), (5,)), ([5], (5,)), ((5, 9), (5, 9)), ((), ())])
def test_args_takes_one_injection_step_or_several(given, kept):
    assert Args(injection_step=given).injection_step == kept


def test_args_refuses_with_a_value_error():
    with pytest.raises(ValueError, match="num_envs"):
        Args(num_envs=0)
    with pytest.raises(ValueError, match="env_backend"):
        Args(env_backend="gym")


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README.read_text(), re.DOTALL)
    commands = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    return [command.split(" #")[0].strip() for line in commands for command in line.split("&&")]


def test_every_training_command_of_the_readme_parses(monkeypatch):
    commands = [c for c in readme_commands() if "dqn_injection_atari.py" in c and "--help" not in c]
    assert len(commands) >= 5
    names = dict.fromkeys(("run.json", "checkpoint-5000000/manifest.json", "checkpoint-100000/manifest.json"), Args())
    names["checkpoint-12500000/manifest.json"] = Args(**dqn_injection_atari.PRESETS["paper"])
    for name, args in names.items():
        Path("runs/FOLDER", name).parent.mkdir(parents=True, exist_ok=True)
        Path("runs/FOLDER", name).write_text(json.dumps({"args": asdict(args)}))
    for command in commands:
        words = shlex.split(command)
        parse(monkeypatch, *words[words.index("dqn_injection_atari.py") + 1 :])


def test_every_file_the_readme_names_exists():
    text = README.read_text()
    named = set(re.findall(r"\]\(((?!http|#)[^)]+)\)", text)) | set(re.findall(r'src="((?!http)[^"]+)"', text))
    assert named and all((README.parent / name).exists() for name in named)


def test_the_readme_names_every_curve_and_leaves_no_blank():
    text = README.read_text()
    tags = set(re.findall(r'"((?:charts|injection|eval)/\w+)"', SCRIPT.read_text())) | {"losses/td_loss", "losses/q_values"}
    assert len(tags) == 11 and all(f"`{tag}`" in text for tag in tags)
    assert not re.search(r"^[A-Z_]+$", text, re.MULTILINE), "a placeholder"


def test_the_other_commands_of_the_readme_use_what_is_there():
    for command in readme_commands():
        for name in re.findall(r"\S+\.(?:txt|py|png)\b", command):
            assert (README.parent / name).exists(), command
        assert re.match(r"(python3? |\. \.venv/bin/activate|pip install -r |pytest$|tensorboard --logdir runs|#|$)", command), (
            command
        )


def test_a_folder_named_wandb_does_not_pass_for_the_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="pip install wandb"):
        train(Args(track=True, buffer_size=100))


def test_what_is_no_flag_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, "--no-such-flag")
    assert stop.value.code == 2 and "--no-such-flag" in capsys.readouterr().err


def test_interrupting_an_evaluation_of_a_saved_agent_is_no_traceback(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dqn_injection_atari, "evaluate_saved", interrupted)
    monkeypatch.setattr(sys, "argv", ["", "--evaluate", "agent.pt"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
