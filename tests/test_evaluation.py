"""Whole games played by an agent: which scores count, what is filmed, agents that come back from a file."""

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import BRIEF, SHORT_GAMES, TINY_GAMES, same

import dqn_injection_atari as script
from dqn_injection_atari import Args, Learner, QNetwork, evaluate, load_agent, main, train
from support import evaluation
from support.environments import LearnerView
from support.evaluation import open_film, play_games, player, print_scores, require_film, save_agent
from support.usage import UsageError


class Games:
    """Stands for environments: game k of environment i lasts `lengths[i][k]` steps and scores 100 · i + k."""

    def __init__(self, *lengths):
        self.lengths, self.num_envs = lengths, len(lengths)
        self.closed, self.seed, self.steps, self.actions = 0, None, 0, []

    def reset(self, seed):
        self.seed, self.steps, self.ended = seed, 0, [0] * self.num_envs
        return self.obs(), {}

    def obs(self):
        return np.full((self.num_envs, 4, 84, 84), self.steps, np.uint8)

    def step(self, actions):
        self.actions.append(actions)
        self.steps += 1
        ends = [np.cumsum(entries) for entries in self.lengths]
        over = np.array([self.steps in entries for entries in ends])
        infos = {}
        if over.any():
            scores = [100 * i + self.ended[i] for i in range(self.num_envs)]
            infos = {"_episode": over, "episode": {"r": np.where(over, scores, -1.0)}}
            self.ended = [count + bool(end) for count, end in zip(self.ended, over, strict=True)]
        return self.obs(), None, None, None, infos

    def render(self):
        return [np.full((32, 64, 3), 8 * self.steps, np.uint8) for _ in range(self.num_envs)]

    def close(self):
        self.closed += 1


def of_obs(obs):
    """Actions that tell which observation they were taken for."""
    return obs[:, 0, 0, 0].astype(np.int64)


# which scores count


def test_the_score_of_every_environments_first_game_counts_and_none_of_a_later_one():
    games = Games((2, 1, 1, 1), (5, 9), (3, 1))
    assert play_games(of_obs, games, seed=7).tolist() == [0, 100, 200]
    assert games.steps == 5 and games.seed == 7 and games.closed == 1
    assert [actions.tolist() for actions in games.actions] == [[step] * 3 for step in range(5)], (
        "each for what it then saw"
    )


@pytest.mark.parametrize(
    ("steps", "scores", "played"), [(3, [0], 4), (4, [0], 4), (9, [0, 1], 9), (10, [0, 1, 2], 10)]
)
def test_with_steps_the_first_environments_games_that_end_within_them_count_or_else_its_first(
    steps, scores, played
):
    games = Games((4, 4, 2, 50))
    assert play_games(of_obs, games, 0, steps=steps).tolist() == scores
    assert games.steps == played


@pytest.mark.parametrize(("steps", "left"), [(0, [0, np.nan]), (9, [np.nan])])
def test_what_is_not_over_when_it_is_told_to_stop_has_no_score(steps, left):
    games = Games((2, 1), (5, 1))
    got = play_games(of_obs, games, 0, steps, stop=lambda: games.steps >= 3)
    assert np.array_equal(got, left, equal_nan=True) and got.dtype == np.float64
    assert games.steps == 3 and games.closed == 1


def test_environments_are_closed_also_where_something_fails():
    games = Games((2, 1))
    with pytest.raises(ZeroDivisionError):
        play_games(lambda obs: 1 // 0, games, 0)
    assert games.closed == 1


def test_scores_are_printed_with_their_statistics(capsys):
    print_scores("agent", np.array([10.0, 30.0, 20.5]))
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "agent: scores of 3 games",
        "10 30 20.5",
        "mean 20.2, standard deviation 8.2, min 10, max 30",
    ]


# what is filmed


def pictures(path):
    video, read = cv2.VideoCapture(str(path)), []
    while (picture := video.read())[0]:
        read.append(picture[1])
    return video, read


def test_a_film_shows_every_step_of_the_first_game_and_nothing_of_the_second(tmp_path):
    path = tmp_path / "videos" / "film.mp4"
    play_games(of_obs, Games((10, 5), (25,)), 0, video=path)
    video, read = pictures(path)
    assert len(read) == 10 and read[0].shape == (32, 64, 3) and video.get(cv2.CAP_PROP_FPS) == 15
    assert [round(picture.mean() / 8) for picture in read] == list(range(10)), (
        "what each decision was taken for"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "size"), [("sb3", (210, 160, 3)), pytest.param("ale", (336, 336, 3), marks=pytest.mark.slow)]
)
def test_a_film_of_a_real_game_moves_and_has_its_colours(backend, size):
    args = Args(env_id=SHORT_GAMES, env_backend=backend, eval_episodes=1, eval_epsilon=1.0)
    evaluate(QNetwork(8), args, 0, video=Path("film.mp4"))
    _, read = pictures("film.mp4")
    assert len(read) == 100 and read[0].shape == size
    assert any(np.abs(a.astype(int) - b).max() > 50 for a, b in zip(read, read[20:], strict=False))
    means = np.array(read).mean(axis=(0, 1, 2))  # blue, green, red
    if backend == "sb3":
        envs = script.make_envs(args, 1, render_mode="rgb_array")
        envs.reset(seed=0)
        for _ in range(20):
            envs.step(np.zeros(1, int))
        expected = envs.render()[0].mean(axis=(0, 1))  # red, green, blue
        assert (expected.argsort() == means[::-1].argsort()).all() and np.ptp(means) > 1


class NoWriter:
    """OpenCV's writer where the build has no such encoder."""

    fourcc = staticmethod(lambda *letters: 0)

    def __init__(self, *_):
        pass

    def isOpened(self):
        return False


def test_without_an_encoder_a_film_is_refused_before_any_work_with_the_fix(monkeypatch, tmp_path):
    require_film()
    monkeypatch.setattr(evaluation.cv2, "VideoWriter", NoWriter)
    for attempt in (require_film, lambda: open_film(tmp_path / "film.mp4", 84, 84)):
        with pytest.raises(
            UsageError, match=r"^OpenCV \S+ writes no VP9 video here .*leave out --capture-video$"
        ) as error:
            attempt()
        assert "pip install" not in str(error.value), "it is there"
    assert not any(tmp_path.glob("film*"))
    with pytest.raises(FileNotFoundError):
        open_film(tmp_path / "nowhere" / "film.mp4", 84, 84)
    monkeypatch.setattr(script, "make_envs", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UsageError, match="leave out --capture-video"):
        train(replace(BRIEF, capture_video=True, eval_frequency=100))
    assert not Path("runs").exists()


# of an agent


@pytest.mark.slow
def test_an_evaluation_plays_the_given_network_at_the_given_epsilon(monkeypatch):
    network = QNetwork(8)
    torch.nn.init.zeros_(network.head.theta.output.weight)
    network.head.theta.output.bias.data = torch.arange(8.0) % 6  # action 5 is the greedy one
    played, step = [], LearnerView.step
    monkeypatch.setattr(
        LearnerView, "step", lambda envs, actions: played.extend(actions) or step(envs, actions)
    )
    args = Args(env_id=SHORT_GAMES, env_backend="ale", eval_episodes=0, eval_steps=200)
    for epsilon, greedy_share in ((0.0, 1.0), (0.4, 0.65), (1.0, 0.125)):
        played.clear()
        evaluate(network, replace(args, eval_epsilon=epsilon), 0)
        assert np.mean(np.array(played) == 5) == pytest.approx(greedy_share, abs=0.08 if epsilon else 0)


@pytest.mark.parametrize(("episodes", "steps", "num_games"), [(2, 0, 2), (0, 40, 1)])
def test_an_evaluation_plays_as_many_games_at_once_as_it_is_to_however_many_training_plays(
    monkeypatch, episodes, steps, num_games
):
    played = []

    def play(act, envs, seed, *_):
        played.append((seed, envs.num_envs))
        envs.close()

    monkeypatch.setattr(script, "play_games", play)
    how = {"num_envs": 3, "seed": 5, "eval_episodes": episodes, "eval_steps": steps}
    evaluate(QNetwork(8, head_width=16), Args(env_id=TINY_GAMES, env_backend="ale", **how), 40)
    assert played == [(script.stream_seed(5, script.Stream.EVALUATION, 40), num_games)]


@pytest.mark.slow
def test_an_evaluation_is_fixed_by_seed_and_key_and_touches_no_other_random_numbers():
    args = Args(env_id=TINY_GAMES, env_backend="ale", eval_episodes=2, eval_epsilon=1.0)
    network = QNetwork(8)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = evaluate(network, args, 5)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(
        before[1], np.random.get_state()[1]
    )
    again, other_key, other_seed = (
        evaluate(network, replace(args, seed=seed), key)
        for seed, key in ((args.seed, 5), (args.seed, 6), (2, 5))
    )
    assert first.shape == (2,) and np.array_equal(first, again)
    assert not np.array_equal(first, other_key) and not np.array_equal(first, other_seed)


@pytest.mark.parametrize(("steps", "games"), [(100, 3), (5, 1)])
def test_an_evaluation_of_so_many_steps_counts_the_games_that_ended_in_them(steps, games):
    args = Args(env_id=TINY_GAMES, env_backend="ale", eval_episodes=0, eval_steps=steps, eval_epsilon=1.0)
    assert evaluate(QNetwork(8), args, 0).shape == (games,)  # games of 30 steps


# agents in files


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_bias": True, "injection_step": (10, 20, 30)},
        {"injection_step": (), "injection_trigger": "norm", "max_injections": 2, "freeze_heads": False},
        {"intervention": "reset-head"},
        {"head_width": 16, "injected_head_width": 32},
    ],
    ids=str,
)
def test_a_saved_agent_of_any_kind_comes_back_with_its_arguments_and_plays_as_it_did(changes):
    settings = {
        "env_id": TINY_GAMES,
        "env_backend": "ale",
        "injection_step": (10, 20),
        "head_width": 24,
    } | changes
    learner = Learner(Args(**settings), 8, "cpu")
    learner.intervene(10)
    save_agent(Path("agent.pt"), learner.q_network, script.asdict(learner.args), 30)
    network, args, step = load_agent(Path("agent.pt"), "cpu")
    assert args == learner.args and step == 30 and network.num_injections == learner.q_network.num_injections
    obs = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(network(obs), learner.q_network(obs))
    scores = script.evaluate_saved(Args(evaluate="agent.pt", eval_episodes=0, eval_steps=40, seed=3))
    settings = replace(learner.args, eval_episodes=0, eval_steps=40, seed=3)
    assert np.array_equal(scores, evaluate(learner.q_network, settings, 30))


@pytest.fixture
def learners(monkeypatch):
    """Those of the runs that train."""
    found = []
    loop = script.Training.loop
    monkeypatch.setattr(
        script.Training, "loop", lambda training: found.append(training.learner) or loop(training)
    )
    return found


def test_what_is_evaluated_is_the_online_network_in_float32(monkeypatch, learners):
    evaluated = []
    monkeypatch.setattr(script, "slow_bfloat16", lambda device: None)
    monkeypatch.setattr(script, "evaluate", lambda *given: evaluated.append(given[0]) or np.zeros(1))
    train(replace(BRIEF, total_timesteps=120, eval_frequency=60, checkpoint_frequency=0, bf16=True))
    (learner,) = learners
    assert len(evaluated) == 2 and all(network is learner.q_network for network in evaluated)
    assert learner.online is not learner.q_network


@pytest.mark.slow
def test_a_runs_saved_agent_is_its_last_network_and_is_played_from_the_command_line(
    monkeypatch, capsys, learners
):
    args = replace(
        BRIEF, total_timesteps=120, learning_starts=60, injection_step=(80,), checkpoint_frequency=0
    )
    folder = train(replace(args, save_model=True))
    (learner,) = learners
    assert f"--evaluate {folder}" in capsys.readouterr().out
    network, of_agent, step = load_agent(folder / "agent.pt", "cpu")
    assert step == 120 and of_agent.injection_step == (80,) and network.num_injections == 1
    assert same(network.state_dict(), learner.q_network.state_dict())
    assert not same(network.state_dict(), learner.target_network.state_dict()), "synced at step 100"

    def play(*flags):
        capsys.readouterr()
        monkeypatch.setattr(
            sys, "argv", ["", "--evaluate", str(folder / "agent.pt"), "--eval-episodes", "2", *flags]
        )
        main()
        return capsys.readouterr().out

    out = play("--eval-epsilon", "0.5", "--capture-video")
    scores = [float(score) for score in out.splitlines()[1].split()]
    assert len(scores) == 2 and f"mean {np.mean(scores):.1f}" in out and "agent at step 120, ε 0.5" in out
    assert (
        out
        == play("--eval-epsilon", "0.5", "--evaluate", str(folder))
        != play("--eval-epsilon", "0.5", "--seed", "7")
    )
    assert sorted(path.name for path in Path("runs").iterdir()) == [folder.name], "playing starts no run"
    assert [path.name for path in (folder / "videos").iterdir()] == ["evaluate-seed-1.mp4"]
    with pytest.raises(SystemExit, match=f"plays {TINY_GAMES}, not PongNoFrameskip-v4: leave out --env-id"):
        play("--env-id", "PongNoFrameskip-v4")


@pytest.fixture
def agent():
    """The file of one that has learned nothing; it was to be reset at step 10 of its run."""
    settings = {
        "env_id": TINY_GAMES,
        "env_backend": "ale",
        "injection_step": (10,),
        "intervention": "reset-head",
    }
    args = Args(**settings, head_width=16, learning_rate=2e-4, bf16=True, eval_epsilon=0.5)
    save_agent(Path("agent.pt"), Learner(args, 8, "cpu").q_network, script.asdict(args), 30)
    return Path("agent.pt")


def played(monkeypatch, capsys, *flags):
    """What the script prints, and its error."""
    monkeypatch.setattr(sys, "argv", ["", "--evaluate", "agent.pt", *flags])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        (
            "--env-id PhoenixNoFrameskip-v4",
            f"plays {TINY_GAMES}, not PhoenixNoFrameskip-v4: leave out --env-id",
        ),
        ("--env-id=PongNoFrameskip-v4 --no-bf16", "leave out --env-id, --bf16"),
        ("--learning-rate 1e-4", "trained, with learning_rate 0.0002: leave out --learning-rate"),
        ("--no-bf16 --learning-rate 5", "leave out --learning-rate, --bf16"),
        ("--head-width 512", "leave out --head-width"),
        ("--env-backend sb3", "leave out --env-backend"),
        ("--num-envs 8 --exp-name x", "leave out --exp-name, --num-envs"),
        ("--intervention injection", "leave out --intervention"),
        ("--injection-step", "leave out --injection-step"),
        ("--eval-frequency 100 --save-model --track", "leave out --eval-frequency, --save-model, --track"),
        ("--keep-checkpoints 5", "leave out --keep-checkpoints"),
        (
            "--total-timesteps 100 --checkpoint-frequency 5",
            "leave out --total-timesteps, --checkpoint-frequency",
        ),
        ("--preset paper", "leave out --preset"),
        ("--preset default", "leave out --preset"),
    ],
)
def test_what_playing_would_pass_over_is_refused_also_where_it_is_the_scripts_default(
    agent, monkeypatch, capsys, flags, left_out
):
    monkeypatch.setattr(script, "play_games", lambda *_: pytest.fail("it played"))
    message = played(monkeypatch, capsys, *flags.split())
    assert message.startswith("error: ") and message.endswith(left_out) and "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "",
        f"--env-id {TINY_GAMES} --bf16 --head-width 16 --learning-rate 2e-4 --injection-step 10 "
        "--intervention reset-head",
        "--seed 3 --no-cuda --no-torch-deterministic --no-tf32",
        "--eval-episodes 0 --eval-steps 40 --eval-epsilon 0.01",
    ],
)
def test_what_playing_looks_at_or_what_is_the_agents_own_is_not_refused(agent, monkeypatch, capsys, flags):
    assert f"{TINY_GAMES}, agent at step 30, ε 0.01: scores of" in played(monkeypatch, capsys, *flags.split())


def test_whoever_calls_it_is_told_too_what_playing_would_pass_over(agent):
    with pytest.raises(UsageError, match=r"with gamma 0\.99, overlap False: leave out --gamma, --overlap"):
        script.evaluate_saved(Args(evaluate="agent.pt", gamma=0.5, overlap=True))


def test_where_an_agent_cannot_be_written_the_one_before_stays_and_the_fix_is_said(agent, monkeypatch):
    before = Path("agent.pt").read_bytes()
    network, args, _ = load_agent(Path("agent.pt"), "cpu")

    def full(path, content):
        with open(path, "wb") as file:
            file.write(bytes(content[:10]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    reason = r"^agent\.pt cannot be written \(.+No space left on device\): make room, and --resume \.$"
    with pytest.raises(OSError, match=reason):
        save_agent(Path("agent.pt"), network, script.asdict(args), 60)
    assert Path("agent.pt").read_bytes() == before and not list(Path().glob(".*"))


def test_an_agent_is_on_the_disk_itself_before_it_takes_the_place_of_another(monkeypatch, agent):
    """Or a power cut would leave an empty file."""
    written = []
    monkeypatch.setattr(
        evaluation, "flush_to_disk", lambda path: written.append((path.name, path.read_bytes()))
    )
    network, args, step = load_agent(agent, "cpu")
    save_agent(agent, network, script.asdict(args), step)
    assert written == [(".agent.pt.partial", agent.read_bytes())]


def test_an_agent_that_was_saved_with_heads_that_it_never_used_plays(agent):
    saved = torch.load(agent, weights_only=True)
    roomy = QNetwork(8, max_injections=2, head_width=16)
    roomy.load_state_dict(saved["q_network"])
    saved["q_network"] = roomy.state_dict()
    torch.save(saved, agent)
    network, _, _ = load_agent(agent, "cpu")
    obs = torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(network(obs), roomy(obs)) and len(network.head.theta_prime_1) == 0


@pytest.mark.parametrize("content", [None, b"", b"no agent", "other"])
def test_what_is_no_agent_is_refused_by_name(monkeypatch, content):
    path = Path("agent.pt")
    if content == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["", "--evaluate", str(path)])
    with pytest.raises(SystemExit, match=r"^error: agent.pt cannot be read as an agent .*--save-model$"):
        main()


def test_loading_an_agent_runs_no_code(monkeypatch):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, ("owned",))

    torch.save(Payload(), "agent.pt")
    monkeypatch.setattr(sys, "argv", ["", "--evaluate", "agent.pt"])
    with pytest.raises(SystemExit, match="cannot be read as an agent"):
        main()
    assert not Path("owned").exists()


def test_a_players_random_numbers_are_those_of_its_seed():
    obs = np.zeros((64, 4, 84, 84), np.uint8)
    network = QNetwork(8, head_width=16)
    first, again, other = (player(network, 8, 1.0, seed)(obs) for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
