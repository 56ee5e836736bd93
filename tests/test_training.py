"""Whole runs: what is counted, logged and written, and what leaves training untouched."""

import importlib.machinery
import itertools
import os
import pty
import subprocess
import sys
import termios
import time
import types
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import SHORT_GAMES, TINY_GAMES, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_injection_atari
from dqn_injection_atari import Args, FrameReplayBuffer, Learner, QNetwork, exploration_epsilon, load_agent, train

SCRIPT = Path(dqn_injection_atari.__file__)
SMALL = Args(
    total_timesteps=480,
    buffer_size=300,
    learning_starts=100,
    batch_size=4,
    target_network_frequency=50,
    log_frequency=60,
    exploration_fraction=0.5,
    env_backend="ale",
    checkpoint_frequency=0,
)

SMALL_FLAGS = """--total-timesteps 480 --buffer-size 300 --learning-starts 100 --batch-size 4 --log-frequency 60
--env-backend ale""".split()


@pytest.fixture
def record():
    """Runs `train`; returns its folder and its calls in order, each a kind followed by what the tests look at."""

    def run(args):
        calls = []

        def spy(owner, name, entry):
            original = getattr(owner, name)

            def wrapper(self, *positional, **named):
                result = original(self, *positional, **named)
                calls.append(entry(self, result, positional))
                return result

            patch.setattr(owner, name, wrapper)

        def checksum(network):
            return sum(parameter.detach().double().sum().item() for parameter in network.parameters())

        def everything(transition):
            return [zlib.crc32(np.ascontiguousarray(array).tobytes()) for array in transition[:5]]

        with pytest.MonkeyPatch.context() as patch:
            spy(Learner, "act", lambda learner, _, given: ("act", given[1]))
            # one call per gradient step
            spy(
                dqn_injection_atari,
                "td_loss",
                lambda network, loss, given: ("update", (loss[0].item(), checksum(network), len(given[1].rewards))),
            )
            spy(Learner, "sync_target", lambda learner, *_: ("sync",))
            spy(Learner, "inject", lambda learner, *_: ("inject", learner))
            spy(FrameReplayBuffer, "add", lambda buffer, _, given: ("add", everything(given), given, buffer))
            return calls, train(args)

    return run


def kinds(calls):
    return [call[0] for call in calls]


def course(calls):
    """What two equal runs share: every transition, every loss and the parameters it was taken at, every sync, in order."""
    return [call[:2] for call in calls if call[0] != "inject"]


@pytest.mark.parametrize("num_envs", [1, 2, 3, 7, 16, 50])
def test_updates_and_syncs_do_not_depend_on_the_number_of_environments(record, num_envs):
    args = replace(SMALL, num_envs=num_envs, learning_starts=102, target_network_frequency=32, batch_size=1)
    counts = kinds(record(args)[0])
    assert counts.count("update") == 480 // 4 - 102 // 4
    assert counts.count("sync") == 480 // 32 - 102 // 32
    assert counts.count("add") == -(-480 // num_envs)


@pytest.mark.parametrize("num_envs", [1, 40])
def test_updates_and_syncs_keep_their_order(record, num_envs):
    args = replace(SMALL, num_envs=num_envs, learning_starts=102, target_network_frequency=32, batch_size=1)
    got = [kind for kind in kinds(record(args)[0]) if kind in ("update", "sync")]
    expected = []
    for step in range(103, 481):
        expected += ["update"] * (step % 4 == 0) + ["sync"] * (step % 32 == 0)
    assert got == expected


@pytest.mark.parametrize("num_envs", [1, 7, 16])
@pytest.mark.parametrize("overlap", [False, True])
def test_with_overlap_the_updates_of_a_vector_step_come_before_its_transitions(record, num_envs, overlap):
    args = replace(SMALL, num_envs=num_envs, overlap=overlap, learning_starts=100, target_network_frequency=32)
    counts = kinds(record(args)[0])
    got = [kind for kind in counts if kind in ("act", "add", "update")]
    expected = []
    for first in range(0, 480, num_envs):
        due = sum(step > 100 and step % 4 == 0 for step in range(first + 1, min(first + num_envs, 480) + 1))
        expected += ["act"] + (["update"] * due + ["add"] if overlap else ["add"] + ["update"] * due)
    assert got == expected and counts.count("sync") == 480 // 32 - 100 // 32


def test_with_overlap_the_first_updates_have_something_to_learn_from(record):
    calls, _ = record(replace(SMALL, num_envs=16, overlap=True, learning_starts=0, total_timesteps=64))
    assert kinds(calls)[:3] == ["act", "add", "update"] and kinds(calls).count("update") == 16


def test_without_learning_overlap_changes_nothing(record):
    args = replace(SMALL, num_envs=7, learning_starts=480, env_id=TINY_GAMES)
    plain, overlapped = (record(replace(args, overlap=overlap)) for overlap in (False, True))
    assert course(plain[0]) == course(overlapped[0])
    assert scalars(plain[1])["charts/episodic_return"] == scalars(overlapped[1])["charts/episodic_return"]


def test_nothing_but_acting_waits_for_the_device_between_two_points_of_the_curves(monkeypatch):
    """Every way to turn a tensor into a Python number or a NumPy array makes a GPU's host wait."""
    reads = []
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "nonzero"):
        original = getattr(torch.Tensor, name)

        def spy(tensor, *given, name=name, original=original, **named):
            reads.append(name)
            return original(tensor, *given, **named)

        monkeypatch.setattr(torch.Tensor, name, spy)
    per_step = {}
    original = dqn_injection_atari.advance

    def advance(run):
        reads.clear()
        original(run)
        per_step[run.step] = list(reads)

    monkeypatch.setattr(dqn_injection_atari, "advance", advance)
    train(replace(SMALL, num_envs=4, log_frequency=160, end_e=0.0, exploration_fraction=0.0))
    assert per_step[160] and per_step[480], "logging reads the losses"
    quiet = [reads for step, reads in per_step.items() if step % 160]
    assert all(reads in ([], ["cpu", "numpy"]) for reads in quiet), "the actions, once per decision"
    assert sum(map(bool, quiet)) == 480 // 4 - 3


@pytest.mark.parametrize("train_frequency", [1, 5])
def test_train_frequency_is_the_number_of_steps_per_update(record, train_frequency):
    calls, _ = record(replace(SMALL, total_timesteps=200, train_frequency=train_frequency))
    assert kinds(calls).count("update") == 100 // train_frequency


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_run_acts_learns_and_remembers_as_its_arguments_say(record, num_envs):
    args = replace(SMALL, num_envs=num_envs, batch_size=5, exp_name="named", total_timesteps=240)
    calls, folder = record(args)
    epsilons = [call[1] for call in calls if call[0] == "act"]
    assert epsilons == [exploration_epsilon(args, step) for step in range(0, 240, num_envs)]
    assert {call[1][2] for call in calls if call[0] == "update"} == {5}
    assert next(call[3] for call in calls if call[0] == "add").buffer_size == 300 // num_envs
    assert folder.name.startswith("PhoenixNoFrameskip-v4__named__1__")


@pytest.mark.parametrize("num_envs", [1, 8])
@pytest.mark.parametrize("injection_step", [(1,), (203,), (240, 241), (120, 300), (479,)])
def test_each_injection_happens_once_at_its_step(record, num_envs, injection_step):
    calls, folder = record(replace(SMALL, num_envs=num_envs, injection_step=injection_step))
    at = [i for i, call in enumerate(calls) if call[0] == "inject"]
    assert [kinds(calls[:i]).count("add") for i in at] == [-(-step // num_envs) for step in injection_step]
    assert [kinds(calls[:i]).count("update") for i in at] == [max(step, 100) // 4 - 100 // 4 for step in injection_step]
    curves = scalars(folder)
    assert curves["injection/step"] == [(step, step) for step in injection_step]
    assert curves["injection/max_abs_delta_q"] == [(step, 0.0) for step in injection_step]


@pytest.mark.parametrize("backend", ["sb3", "ale"])
def test_replay_is_given_what_happened(record, backend):
    """Lost lives are terminal, truncations bootstrap, and a game's last frame is its own, not the next game's first."""
    args = replace(SMALL, env_backend=backend, env_id=SHORT_GAMES, num_envs=2, end_e=1.0, learning_starts=480)
    transitions = [call[2] for call in record(args)[0] if call[0] == "add"]
    ends = 0
    for (obs, next_obs, _, rewards, done, infos), (later_obs, *_) in itertools.pairwise(transitions):
        assert np.array_equal(next_obs[:, :-1], obs[:, 1:]) and set(rewards) <= {-1, 0, 1}
        for i in range(2):
            restarted = not later_obs[i, :3].any()
            if infos[i]["TimeLimit.truncated"]:
                assert done[i] and restarted
                assert not np.array_equal(next_obs[i, -1], later_obs[i, -1])
                ends += 1
            else:
                assert restarted <= done[i] and (restarted or np.array_equal(later_obs[i], next_obs[i]))
    assert ends >= 2
    dones = np.array([[done[i] and not infos[i]["TimeLimit.truncated"] for i in range(2)] for *_, done, infos in transitions])
    assert dones.any(), "lives were lost"


def test_the_logged_change_of_q_is_measured(monkeypatch):
    original = QNetwork.inject

    def broken(self, generator=None):
        original(self, generator)
        torch.nn.init.zeros_(self.theta_prime_2[0][2].bias)

    monkeypatch.setattr(QNetwork, "inject", broken)
    folder = train(replace(SMALL, injection_step=(200,)))
    assert scalars(folder)["injection/max_abs_delta_q"][0][1] > 0


def test_arms_with_and_without_injection_are_equal_until_it_and_differ_after_it(record):
    injected, _ = record(replace(SMALL, injection_step=(300,)))
    baseline, _ = record(replace(SMALL, injection_step=(300,), apply_injection=False))
    at = kinds(injected).index("inject")
    assert "inject" not in kinds(baseline)
    assert course(injected[:at]) == course(baseline[:at]) and kinds(injected[:at]).count("update") == 50
    assert course(injected[at:]) != course(baseline[at:])
    # and the arms go on sharing their random numbers
    replays = [next(call[3] for call in calls if call[0] == "add") for calls in (injected, baseline)]
    assert replays[0].generator.bit_generator.state == replays[1].generator.bit_generator.state


def test_a_seed_fixes_a_whole_run_and_another_seed_changes_it(record):
    args = replace(SMALL, injection_step=(200,), num_envs=2)
    first, same, other = (course(record(replace(args, seed=seed))[0]) for seed in (1, 1, 2))
    assert first == same != other


def test_evaluating_filming_and_saving_change_nothing_in_training(record):
    args = replace(SMALL, injection_step=(200,), total_timesteps=320, env_backend="sb3", env_id=SHORT_GAMES)
    plain, _ = record(args)
    evaluated, folder = record(
        replace(args, eval_frequency=150, eval_episodes=2, eval_epsilon=0.5, capture_video=True, save_model=True)
    )
    assert course(plain) == course(evaluated)
    curve = scalars(folder)["eval/episodic_return"]
    assert [step for step, _ in curve] == [150, 300] and all(value >= 0 for _, value in curve)


def test_more_evaluation_games_than_the_replay_holds_are_no_error():
    folder = train(replace(SMALL, env_id=SHORT_GAMES, buffer_size=4, eval_frequency=400, eval_episodes=6))
    assert len(scalars(folder)["eval/episodic_return"]) == 1


def test_an_evaluation_logs_the_mean_of_whole_games(record, capsys):
    scores = []
    original = dqn_injection_atari.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dqn_injection_atari, "evaluate", lambda *args: scores.append(original(*args)) or scores[-1])
        folder = train(replace(SMALL, env_id=SHORT_GAMES, eval_frequency=400, eval_episodes=5, eval_epsilon=1.0))
    assert len(scores[0]) == 5 and len(set(scores[0])) > 1 and not (scores[0] % 20).any()  # Phoenix counts in twenties
    assert scalars(folder)["eval/episodic_return"] == [(400, pytest.approx(scores[0].mean()))]


def test_the_recent_speed_leaves_evaluations_out(monkeypatch):
    def evaluate(*_):
        time.sleep(3)
        return np.zeros(2)

    monkeypatch.setattr(dqn_injection_atari, "evaluate", evaluate)
    curves = scalars(train(replace(SMALL, learning_starts=480, log_frequency=240, eval_frequency=300)))
    recent, overall = dict(curves["charts/SPS_recent"])[480], dict(curves["charts/SPS"])[480]
    assert overall < 480 / 3 < recent


def test_evaluation_plays_the_given_network_at_the_given_epsilon(monkeypatch):
    network = QNetwork(8)
    torch.nn.init.zeros_(network.theta[2].weight)
    network.theta[2].bias.data = torch.arange(8.0) % 6  # action 5 is the greedy one
    played = []
    original = dqn_injection_atari.LearnerView.step
    monkeypatch.setattr(
        dqn_injection_atari.LearnerView, "step", lambda self, actions: played.extend(actions) or original(self, actions)
    )
    for epsilon, greedy_share in ((0.0, 1.0), (0.4, 0.65), (1.0, 0.125)):
        played.clear()
        dqn_injection_atari.evaluate(network, Args(env_id=SHORT_GAMES, eval_episodes=6, eval_epsilon=epsilon), 0)
        assert np.mean(np.array(played) == 5) == pytest.approx(greedy_share, abs=0.06 if epsilon else 0)


@pytest.mark.parametrize("deterministic", [False, True])  # True, the default, last
def test_determinism_is_a_choice(deterministic):
    dqn_injection_atari.pick_device(Args(torch_deterministic=deterministic))
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark != deterministic


@pytest.mark.parametrize("tf32", [False, True])  # True, the default, last
def test_tf32_is_a_choice(tf32):
    dqn_injection_atari.pick_device(Args(tf32=tf32))
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


def test_denormals_are_flushed_in_every_thread():
    code = """
import dqn_injection_atari, torch
halves = torch.full((4_000_000,), torch.finfo(torch.float32).tiny) * 0.5
print(torch.get_num_threads(), halves.view(torch.int32).count_nonzero().item())
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "2"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout
    assert out == "2 0\n"


@pytest.mark.parametrize("cuda", [True, False])
def test_the_gpu_is_used_where_there_is_one_and_it_is_wanted(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dqn_injection_atari.pick_device(Args(cuda=cuda)).type == ("cuda" if cuda else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dqn_injection_atari.pick_device(Args(cuda=cuda)).type == "cpu"


def test_tensorboard_holds_every_promised_curve_and_the_hyperparameters():
    args = replace(SMALL, total_timesteps=1400, learning_starts=1200, log_frequency=100, injection_step=(1300,))
    args = replace(args, env_id=SHORT_GAMES, num_envs=2)
    folder = train(args)
    assert folder.parent == Path("runs") and folder.is_dir()
    curves = scalars(folder)
    assert set(curves) == {
        *("charts/episodic_return", "charts/episodic_length", "charts/epsilon", "charts/SPS", "charts/SPS_recent"),
        *("losses/td_loss", "losses/q_values", "injection/step", "injection/max_abs_delta_q"),
    }
    intervals = list(range(100, 1401, 100))
    for tag in ("charts/epsilon", "charts/SPS", "charts/SPS_recent"):
        assert [step for step, _ in curves[tag]] == intervals
    for tag in ("losses/td_loss", "losses/q_values"):
        assert [step for step, _ in curves[tag]] == [1300, 1400]
    assert curves["charts/epsilon"][-1][1] == pytest.approx(0.01)
    assert curves["charts/epsilon"][0][1] == pytest.approx(1 - 0.99 * 100 / 700)
    texts = EventAccumulator(str(folder)).Reload()
    hyperparameters = texts.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"|env_id|{SHORT_GAMES}|" in hyperparameters and "|injection_step|(1300,)|" in hyperparameters


def test_logged_losses_are_means_over_the_interval(record):
    calls, folder = record(SMALL)
    losses = [call[1][0] for call in calls if call[0] == "update"]
    curve = dict(scalars(folder)["losses/td_loss"])
    # 120 < updates at 124, 128, ... 180 ≤ 180
    assert curve[180] == pytest.approx(np.mean(losses[5:20]), rel=1e-5)


@pytest.mark.parametrize("backend", ["sb3", "ale"])
def test_logged_returns_are_raw_scores_of_whole_games(record, backend):
    args = replace(SMALL, env_backend=backend, total_timesteps=8000, learning_starts=8000, num_envs=2, end_e=1.0)
    calls, folder = record(args)
    envs = dqn_injection_atari.make_envs(args)
    envs.reset(seed=dqn_injection_atari.stream_seed(args.seed, dqn_injection_atari.Stream.ENVIRONMENTS))
    expected, step = [], 0
    scores = np.zeros(2)
    base = envs.env.env  # below the statistics and the learner's view: raw scores
    for _, _, (_, _, actions, *_), _ in (call for call in calls if call[0] == "add"):
        _, rewards, terminations, truncations, _ = base.step(actions)
        step, scores = step + 2, scores + rewards
        for i in np.flatnonzero(terminations | truncations):
            expected.append((step, scores[i]))
            scores[i] = 0
    assert scalars(folder)["charts/episodic_return"] == expected and len(expected) >= 2


def test_no_point_lies_beyond_the_end():
    folder = train(replace(SMALL, env_id=TINY_GAMES, num_envs=7, total_timesteps=205))  # games end in the 30th vector step
    curves = scalars(folder)
    assert {step for step, _ in curves["charts/episodic_return"]} == {205}
    assert max(step for curve in curves.values() for step, _ in curve) == 205


def test_video_of_an_evaluation_game_plays(capsys):
    for backend, size in (("sb3", (160, 210)), ("ale", (336, 336))):
        args = replace(SMALL, env_backend=backend, total_timesteps=120, eval_frequency=100, eval_episodes=2, capture_video=True)
        folder = train(replace(args, eval_epsilon=1.0))
        video = cv2.VideoCapture(str(folder / "videos" / "step-100.mp4"))
        pictures = []
        while (read := video.read())[0]:
            pictures.append(read[1])
        assert (pictures[0].shape[1], pictures[0].shape[0]) == size
        assert len(pictures) > 50 and video.get(cv2.CAP_PROP_FPS) == 15
        assert any(np.abs(a.astype(int) - b).max() > 50 for a, b in zip(pictures, pictures[20:], strict=False))


def test_a_saved_agent_loads_with_its_injection_and_plays(monkeypatch, capsys):
    saved = []
    original = dqn_injection_atari.save_agent
    monkeypatch.setattr(
        dqn_injection_atari, "save_agent", lambda path, network, *rest: (saved.append(network), original(path, network, *rest))
    )
    folder = train(replace(SMALL, env_id=SHORT_GAMES, injection_step=(300,), save_model=True))
    network, args, step = load_agent(folder / "agent.pt", "cpu")
    obs = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(network(obs), saved[0](obs)) and network.num_injections == 1
    assert step == 480 and args.injection_step == (300,)

    def play(*flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["", "--evaluate", str(folder / "agent.pt"), "--eval-episodes", "3", *flags])
        dqn_injection_atari.main()
        return capsys.readouterr().out

    out = play("--eval-epsilon", "0.5")
    scores = [float(score) for score in out.splitlines()[1].split()]
    assert len(scores) == 3 and f"mean {np.mean(scores):.1f}" in out
    assert out == play("--eval-epsilon", "0.5", "--evaluate", str(folder)) != play("--eval-epsilon", "0.5", "--seed", "7")
    assert sorted(path.name for path in Path("runs").iterdir()) == [folder.name], "playing starts no run"
    with pytest.raises(SystemExit, match=f"plays {SHORT_GAMES}, not PongNoFrameskip-v4"):
        play("--env-id", "PongNoFrameskip-v4")


@pytest.mark.parametrize("content", [None, b"", b"no agent", "other"])
def test_what_is_no_agent_is_refused_by_name(monkeypatch, content):
    path = Path("agent.pt")
    if content == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["", "--evaluate", str(path)])
    with pytest.raises(SystemExit, match=r"^error: agent.pt cannot be read as an agent .*--save-model$"):
        dqn_injection_atari.main()


def test_loading_an_agent_runs_no_code(monkeypatch):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, ("owned",))

    torch.save(Payload(), "agent.pt")
    monkeypatch.setattr(sys, "argv", ["", "--evaluate", "agent.pt"])
    with pytest.raises(SystemExit, match="cannot be read as an agent"):
        dqn_injection_atari.main()
    assert not Path("owned").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_step_and_loss_named(monkeypatch):
    original, losses = dqn_injection_atari.td_loss, []

    def td_loss(*given):
        losses.append(original(*given))
        return losses[-1] if len(losses) <= 7 else (losses[-1][0] * float("inf"), losses[-1][1])

    closed, close = [], dqn_injection_atari.RunLog.close
    monkeypatch.setattr(dqn_injection_atari.RunLog, "close", lambda log: closed.append(close(log)))
    monkeypatch.setattr(dqn_injection_atari, "td_loss", td_loss)
    with pytest.raises(FloatingPointError, match=r"^td_loss is not finite from step 132: lower --learning-rate$"):
        train(SMALL)  # updates at 104, 108, ... 128 are the seven good ones
    (folder,) = Path("runs").iterdir()
    assert "charts/epsilon" in scalars(folder) and len(closed) == 1, "the curves so far are on disk"


def test_a_diverging_run_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", *SMALL_FLAGS, "--learning-rate", "1e30"])
    with pytest.raises(SystemExit, match=r"^error: td_loss is not finite from step 1[0-9]{2}: lower --learning-rate$"):
        dqn_injection_atari.main()


def test_runs_started_in_the_same_second_get_folders_of_their_own(monkeypatch):
    monkeypatch.setattr(dqn_injection_atari.time, "time", lambda: 1_700_000_000.0)
    folders = [dqn_injection_atari.create_run_folder(Args(env_id="ALE/Phoenix-v5"), str(k)) for k in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.parent == Path("runs") and folder.is_dir() for folder in folders)


def test_progress_is_a_bar_on_a_terminal_and_plain_lines_elsewhere():
    command = [sys.executable, str(SCRIPT), *SMALL_FLAGS, "--injection-step", "200"]
    plain = subprocess.run(command, capture_output=True, text=True, check=True)
    assert plain.stderr == ""
    assert "step 480 of 480" in plain.stdout and "SPS" in plain.stdout and "left, ε 0.01, return" in plain.stdout
    assert "step 200: plasticity injected" in plain.stdout and "\r" not in plain.stdout

    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 120))
    process = subprocess.Popen(command, stdout=child, stderr=child)
    os.close(child)
    output = b""
    try:
        while part := os.read(parent, 4096):
            output += part
    except OSError:  # the terminal closes with the process
        pass
    assert process.wait() == 0
    text = output.decode()
    assert "480/480" in text and "\r" in text and "SPS, ε 0.01, return" in text and "step 480 of 480" not in text


def test_track_mirrors_tensorboard_to_weights_and_biases(monkeypatch):
    given = {}
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="somewhere")
    wandb.init = lambda **kwargs: given.update(kwargs, files=list(Path("runs", kwargs["name"]).iterdir()))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = train(replace(SMALL, track=True, wandb_project_name="p", wandb_entity="e"))
    assert (given["project"], given["entity"], given["name"]) == ("p", "e", folder.name)
    events = [file.name for file in given["files"] if "tfevents" in file.name]
    assert events == [], "it starts before TensorBoard does, or it would miss the beginning"
    assert given["sync_tensorboard"] is True and given["config"]["total_timesteps"] == 480
    # a reader goes on from the file of the SummaryWriter that tells wandb of this folder to the one with the curves
    assert max(folder.glob("events*")) == max(folder.glob("events*"), key=lambda path: path.stat().st_size)
    assert len(list(folder.glob("events*"))) == 2
    given.clear()
    train(SMALL)
    assert not given
