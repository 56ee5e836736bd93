"""Both backends play the same games and show the learner the same things."""

import inspect

import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import AtariEnv
from conftest import SHORT_GAMES, variant
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.atari_wrappers import NoopResetEnv

from support import environments
from support.environments import LearnerView, atari_spec, make_atari_envs
from support.usage import UsageError

PHOENIX = "PhoenixNoFrameskip-v4"
EVERY_GAME = sorted(env_id for env_id in gym.registry if env_id.endswith("NoFrameskip-v4"))
both_backends = pytest.mark.parametrize("backend", ["sb3", "ale"])
sb3_in_full_runs = pytest.mark.parametrize("backend", [pytest.param("sb3", marks=pytest.mark.slow), "ale"])


def noop_wrapper(env):
    while not isinstance(env, NoopResetEnv):
        env = env.env
    return env


def lockstep(env_id, num_envs, steps, actions_of):
    """Plays both backends with the same actions from the same starts; yields both `step` results."""
    sb3, ale = (make_atari_envs(env_id, backend, num_envs) for backend in ("sb3", "ale"))
    sub_envs = sb3.unwrapped.envs
    game = gym.make(env_id)
    game.reset()
    before_noops = game.unwrapped.ale.getEpisodeFrameNumber()  # some games press a key to begin

    def copy_starts(infos):
        # the number of no-ops is the one thing the two draw from different generators
        for env, frames in zip(sub_envs, infos["episode_frame_number"], strict=True):
            noop_wrapper(env).override_num_noops = max(int(frames) - before_noops, 1)

    # a start without any no-op exists in ale only
    seed = next(s for s in range(100) if (ale.reset(seed=s)[1]["episode_frame_number"] > before_noops).all())
    _, infos = ale.reset(seed=seed)
    copy_starts(infos)
    sb3.reset(seed=0)
    for t in range(steps):
        actions = actions_of(t)
        ours = ale.step(actions)
        over = ours[4].get("_episode", np.zeros(num_envs, bool))
        if (ours[4]["episode_frame_number"][over] == before_noops).any():
            return
        copy_starts(ours[4])
        yield sb3.step(actions), ours
    sb3.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id,num_envs", [(PHOENIX, 2), ("BreakoutNoFrameskip-v4", 2), ("ALE/Qbert-v5", 1)]
)
def test_backends_agree_on_rewards_ends_and_raw_returns(env_id, num_envs):
    if env_id.startswith("ALE/"):  # without its sticky actions, whose generators differ
        env_id = variant("SteadyQbert-v5", env_id, repeat_action_probability=0.0)
    rng = np.random.default_rng(0)
    num_actions = make_atari_envs(env_id, "ale", 1).single_action_space.n
    games = lives_lost = 0
    for sb3, ale in lockstep(env_id, num_envs, 1500, lambda t: rng.integers(num_actions, size=num_envs)):
        for name, mine, theirs in zip(
            ("rewards", "terminations", "truncations"), sb3[1:4], ale[1:4], strict=True
        ):
            assert np.array_equal(mine, theirs), name
            assert mine.dtype == theirs.dtype, name
        assert np.abs(sb3[0].astype(int) - ale[0]).mean() < 2, "a few grey levels in places"
        assert np.abs(sb3[4]["final_obs"].astype(int) - ale[4]["final_obs"]).mean() < 2
        over = sb3[4].get("_episode", np.zeros(num_envs, bool))
        assert np.array_equal(over, ale[4].get("_episode", np.zeros(num_envs, bool)))
        if over.any():
            for key in "rl":
                assert np.array_equal(sb3[4]["episode"][key], ale[4]["episode"][key])
        games += over.sum()
        lives_lost += (sb3[2] & ~over).sum()
        if games >= 2 and lives_lost >= 4:
            return
    pytest.fail("too few ends to compare")


@pytest.mark.slow
@pytest.mark.parametrize("env_id", EVERY_GAME)
def test_both_backends_play_every_game_and_show_the_same(env_id):
    num_actions = make_atari_envs(env_id, "ale", 1).single_action_space.n
    rng = np.random.default_rng(0)
    differences = []
    for sb3, ale in lockstep(env_id, 1, 100, lambda t: rng.integers(num_actions, size=1)):
        for mine, theirs in zip(sb3[1:4], ale[1:4], strict=True):
            assert np.array_equal(mine, theirs), f"decision {len(differences)}"
        differences.append(np.abs(sb3[0].astype(int) - ale[0]).mean())
    assert len(differences) == 100
    assert np.median(differences) < 1, "a few grey levels in places, but for a frame that flashes"


@pytest.mark.slow
@sb3_in_full_runs
def test_returns_are_raw_scores_of_whole_games_while_rewards_are_signs(backend):
    envs, rng = make_atari_envs(PHOENIX, backend, 2), np.random.default_rng(1)
    envs.reset(seed=3)
    clipped, length, lives_lost, checked = np.zeros(2), np.zeros(2, int), np.zeros(2, int), 0
    while checked < 2:
        _, rewards, terminations, _, infos = envs.step(rng.integers(8, size=2))
        assert set(np.unique(rewards)) <= {-1, 0, 1} and rewards.dtype == np.float32
        over = infos.get("_episode", np.zeros(2, bool))
        clipped, length, lives_lost = clipped + rewards, length + 1, lives_lost + (terminations & ~over)
        for i in np.flatnonzero(over):
            assert lives_lost[i] == 4  # Phoenix gives five lives; the fifth ends the game
            assert terminations[i] and infos["episode"]["l"][i] == length[i]
            # every hit in Phoenix scores 20 points or more
            assert infos["episode"]["r"][i] >= 20 * clipped[i] > 0
            clipped[i] = length[i] = lives_lost[i] = 0
            checked += 1


class Scripted(VectorEnv):
    """Plays rows of (score, terminated, truncated, lives afterwards), one game."""

    num_envs, metadata, render_mode = 1, {}, None

    def __init__(self, lives, *rows):
        self.lives, self.rows = lives, iter(rows)

    def reset(self, seed=None, options=None):
        return np.zeros((1, 4, 84, 84), np.uint8), {"lives": np.array([self.lives])}

    def step(self, actions):
        score, terminated, truncated, lives = next(self.rows)
        obs = np.full((1, 4, 84, 84), lives, np.uint8)
        infos = {"lives": np.array([lives])}
        if terminated or truncated:
            infos["final_obs"] = np.array([np.full((4, 84, 84), 99, np.uint8)])
        return obs, np.array([float(score)]), np.array([terminated]), np.array([truncated]), infos


@pytest.mark.parametrize(
    ("lives", "row", "reward", "termination", "truncation", "last_pixel"),
    [
        (3, (0, False, False, 3), 0, False, False, 3),
        (3, (700, False, False, 2), 1, True, False, 2),  # a life lost
        (3, (-5, False, False, 4), -1, False, False, 4),  # a life won
        (1, (0.5, True, False, 5), 1, True, False, 99),  # the game is over, the next one begins
        (3, (0, False, True, 5), 0, False, True, 99),  # the game is cut
        (6, (0, False, True, 5), 0, False, True, 99),  # cut, and the next game has fewer lives
        (1, (0, True, True, 5), 0, True, False, 99),  # over at the frame limit
    ],
)
def test_the_learner_sees_lives_ends_and_signs(lives, row, reward, termination, truncation, last_pixel):
    view = LearnerView(Scripted(lives, row))
    view.reset(seed=0)
    obs, rewards, terminations, truncations, infos = view.step(np.zeros(1, int))
    assert (rewards.item(), terminations.item(), truncations.item()) == (reward, termination, truncation)
    assert infos["final_obs"][0, 3, 0, 0] == last_pixel and obs[0, 3, 0, 0] == row[3] == view.obs[0, 3, 0, 0]


@pytest.mark.slow
@sb3_in_full_runs
def test_stacks_shift_by_one_survive_life_losses_and_restart_on_zeros_after_games(backend):
    envs, rng = make_atari_envs(PHOENIX, backend, 2), np.random.default_rng(2)
    obs, _ = envs.reset(seed=5)
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
    assert not obs[:, :3].any() and obs[:, 3].any(axis=(1, 2)).all()
    games = lives_lost = 0
    while games < 2:
        next_obs, _, terminations, _, infos = envs.step(rng.integers(8, size=2))
        over = infos.get("_episode", np.zeros(2, bool))
        assert np.array_equal(infos["final_obs"][:, :3], obs[:, 1:])
        assert np.array_equal(infos["final_obs"][~over], next_obs[~over])
        assert not next_obs[over, :3].any()
        for i in np.flatnonzero(over):
            assert not np.array_equal(infos["final_obs"][i, 3], next_obs[i, 3]), (
                "the last frame is its own game's"
            )
        games, lives_lost = games + over.sum(), lives_lost + (terminations & ~over).sum()
        obs = next_obs
    assert lives_lost >= 8


@both_backends
def test_a_game_at_its_frame_limit_is_truncated_and_not_terminal(backend):
    envs = make_atari_envs(variant("ShortPhoenix-v5", PHOENIX, max_num_frames_per_episode=120), backend, 3)
    envs.reset(seed=1)
    for t in range(1, 61):
        _, _, terminations, truncations, infos = envs.step(np.zeros(3, int))
        assert not terminations.any()
        assert truncations.all() == truncations.any() == (t % 30 == 0)
    assert infos["episode"]["l"].tolist() == [30, 30, 30]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "num_envs", "seed"), [("sb3", 3, 22), ("ale", 3, 6)])
def test_v5_keeps_its_sticky_actions_and_skips_four_frames_once(backend, num_envs, seed):
    """With these seeds two of three games start on the same frame, and go one way but for sticky actions."""

    def equal_courses(env_id):
        envs = make_atari_envs(env_id, backend, num_envs)
        _, infos = envs.reset(seed=seed)
        starts, screens = infos["episode_frame_number"].copy(), []
        for t in range(25):
            obs, _, _, _, infos = envs.step(np.full(num_envs, 2 + t % 2))  # right, left, right, ...
            assert np.array_equal(infos["episode_frame_number"], starts + 4 * (t + 1))
            screens.append(obs[:, -1].copy())
        courses = np.array(screens).swapaxes(0, 1)  # (num_envs, 25, 84, 84)
        pairs = np.argwhere(np.triu(starts[:, None] == starts, k=1))
        return [np.array_equal(courses[a], courses[b]) for a, b in pairs]

    assert equal_courses(PHOENIX) == [True] and equal_courses("ALE/Phoenix-v5") == [False]


@pytest.mark.slow
@sb3_in_full_runs
def test_a_seed_fixes_every_game_and_another_seed_changes_them(backend):
    def play(seed):
        envs, rng = make_atari_envs("ALE/Phoenix-v5", backend, 2), np.random.default_rng(0)
        frames = [envs.reset(seed=seed)[0]]
        frames += [envs.step(rng.integers(8, size=2))[0] for _ in range(60)]
        return np.array(frames)

    first = play(11)
    assert np.array_equal(first, play(11))
    assert not np.array_equal(first, play(12))
    assert not np.array_equal(first[:, 0], first[:, 1]), "nor does one game of a seed go as another"


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id", ["PongNoFrameskip-v4", "ALE/MontezumaRevenge-v5", "Enduro-v4", "Freeway-v4", "ALE/Surround-v5"]
)
@both_backends
def test_any_atari_id_plays(env_id, backend):
    envs = make_atari_envs(env_id, backend, 1)
    obs, _ = envs.reset(seed=0)
    for _ in range(5):
        obs, *_ = envs.step(np.array([1]))
    assert obs.shape == (1, 4, 84, 84)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert envs.single_action_space.n == gym.make(env_id).action_space.n


@pytest.mark.parametrize(
    "env_id", ["NoSuchGame-v4", "ALE/NoSuchGame-v5", "CartPole-v1", "Pendulum-v1", "Phoenix NoFrameskip", ""]
)
def test_ids_that_are_no_atari_games_are_refused(env_id):
    with pytest.raises(UsageError, match=f"try {PHOENIX}$") as error:
        atari_spec(env_id)
    assert "\n" not in str(error.value)


@both_backends
def test_what_dqn_cannot_play_is_refused(backend):
    with pytest.raises(UsageError, match="continuous actions"):
        make_atari_envs(variant("ContinuousPhoenix-v5", "ALE/Phoenix-v5", continuous=True), backend, 1)
    with pytest.raises(UsageError, match="not the screen"):
        make_atari_envs(variant("RamPhoenix-v5", "ALE/Phoenix-v5", obs_type="ram"), backend, 1)
    if "LimitedPhoenix-v5" not in gym.registry:  # one backend would count frames, the other ignores it
        kwargs = {"game": "phoenix"}
        gym.register("LimitedPhoenix-v5", "ale_py.env:AtariEnv", max_episode_steps=400, kwargs=kwargs)
    with pytest.raises(UsageError, match=r"register it with max_num_frames_per_episode instead$"):
        make_atari_envs("LimitedPhoenix-v5", backend, 1)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("setting", ["difficulty", "mode"])
def test_what_a_backend_cannot_do_is_refused_not_ignored(setting, value):
    other = variant(f"Freeway-{setting}-{value}-v5", "ALE/Freeway-v5", **{setting: value})
    make_atari_envs(other, "sb3", 1)
    with pytest.raises(UsageError, match="--env-backend sb3"):
        make_atari_envs(other, "ale", 1)


@pytest.mark.parametrize("env_id", ["ALE/Backgammon-v5", "ALE/VideoCheckers-v5"])
def test_a_game_in_which_every_action_does_something_is_played_by_ales_vectoriser_alone(env_id):
    with pytest.raises(
        UsageError, match=f"^{env_id} has no action that does nothing, .*give --env-backend ale"
    ):
        make_atari_envs(env_id, "sb3", 1)
    registered = variant(f"Full{env_id.removeprefix('ALE/')}", env_id, full_action_space=True)
    for backend, name in (("ale", env_id), ("sb3", registered)):
        envs = make_atari_envs(name, backend, 1)
        envs.reset(seed=0)
        assert envs.step(np.array([0]))[0].shape == (1, 4, 84, 84)


@both_backends
def test_an_id_registered_with_nothing_but_a_game_plays(backend):
    if "BarePhoenix-v5" not in gym.registry:
        gym.register("BarePhoenix-v5", "ale_py.env:AtariEnv", kwargs={"game": "phoenix"})
    envs = make_atari_envs("BarePhoenix-v5", backend, 1)
    envs.reset(seed=0)
    assert envs.step(np.array([0]))[0].shape == (1, 4, 84, 84)


def test_what_an_id_leaves_open_is_with_ales_vectoriser_as_in_their_environment(monkeypatch):
    if "BarePhoenix-v5" not in gym.registry:
        gym.register("BarePhoenix-v5", "ale_py.env:AtariEnv", kwargs={"game": "phoenix"})
    given = {}
    original = environments.EagerAtariVectorEnv

    def note(**settings):
        given.update(settings)
        return original(**settings)

    monkeypatch.setattr(environments, "EagerAtariVectorEnv", note)
    make_atari_envs("BarePhoenix-v5", "ale", 1)
    defaults = inspect.signature(AtariEnv).parameters
    for name in ("repeat_action_probability", "full_action_space"):
        assert given[name] == defaults[name].default
    for env_id, sticky in ((PHOENIX, 0.0), ("ALE/Phoenix-v5", 0.25)):
        make_atari_envs(env_id, "ale", 1)
        assert given["repeat_action_probability"] == sticky
        assert given["reward_clipping"] is False, "scores are raw, and learning clips them"


@both_backends
def test_a_decision_is_four_frames(backend):
    envs = make_atari_envs(PHOENIX, backend, 1)
    _, infos = envs.reset(seed=0)
    start = int(infos["episode_frame_number"][0])
    for decision in range(1, 4):
        *_, infos = envs.step(np.zeros(1, int))
        assert infos["episode_frame_number"][0] == start + 4 * decision


def test_a_lost_life_is_one_end():
    view = LearnerView(Scripted(3, *[(0, False, False, lives) for lives in (2, 2, 1)]))
    view.reset(seed=0)
    assert [view.step(np.zeros(1, int))[2].item() for _ in range(3)] == [True, False, True]


@both_backends
def test_an_id_with_all_actions_has_all_of_them(backend):
    every = variant("FullPhoenix-v5", "ALE/Phoenix-v5", full_action_space=True)
    assert make_atari_envs(every, backend, 1).single_action_space.n == 18


@sb3_in_full_runs
def test_a_step_in_two_halves_is_a_step(backend):
    whole, halves = (make_atari_envs(SHORT_GAMES, backend, 2) for _ in range(2))
    rng = np.random.default_rng(0)
    for envs in (whole, halves):
        envs.reset(seed=3)
    for _ in range(110):
        actions = rng.integers(4, size=2)
        expected = whole.step(actions)
        before = halves.obs
        halves.send(actions)
        assert halves.obs is before
        assert backend == "sb3" or halves.unwrapped.sent, "ALE's vectoriser is playing"
        got = halves.receive()
        assert all(np.array_equal(a, b) for a, b in zip(expected[:4], got[:4], strict=True))
        assert np.array_equal(expected[4]["final_obs"], got[4]["final_obs"]) and np.array_equal(
            halves.obs, got[0]
        )
    state, reference = halves.state_dict(), whole.state_dict()
    assert torch.equal(state["actions"], reference["actions"]) and torch.equal(state["obs"], reference["obs"])
    assert state["actions"].shape == (110, 2)


@both_backends
def test_a_picture_of_every_game_can_be_drawn(backend):
    envs = make_atari_envs(PHOENIX, backend, 2, render_mode="rgb_array")
    envs.reset(seed=0)
    envs.step(np.zeros(2, int))
    pictures = envs.render()
    assert len(pictures) == 2 and {picture.dtype for picture in pictures} == {np.dtype(np.uint8)}
    if backend == "sb3":
        assert pictures[0].shape == (210, 160, 3) and (pictures[0][..., 0] != pictures[0][..., 2]).any(), (
            "in colour"
        )
    else:
        assert pictures[0].shape == (336, 336, 3)
        assert np.array_equal(pictures[1][::4, ::4, 1], envs.obs[1, -1]), "the agent's newest frame, larger"


@sb3_in_full_runs
@pytest.mark.parametrize("env_id", [SHORT_GAMES, pytest.param("ALE/Breakout-v5", marks=pytest.mark.slow)])
def test_games_come_back_from_their_state_and_go_on_the_same(backend, env_id):
    rng = np.random.default_rng(0)
    first, second = (make_atari_envs(env_id, backend, 2) for _ in range(2))
    first.reset(seed=3)
    for _ in range(20):
        first.step(rng.integers(4, size=2))
    first.reset(seed=11)  # environments that have played and new ones begin alike
    for _ in range(130):
        first.step(rng.integers(4, size=2))
    second.load_state_dict(first.state_dict())
    assert np.array_equal(first.obs, second.obs) and np.array_equal(first.lives, second.lives)
    ends = 0
    for _ in range(130):
        actions = rng.integers(4, size=2)
        mine, theirs = first.step(actions), second.step(actions)
        assert all(np.array_equal(a, b) for a, b in zip(mine[:4], theirs[:4], strict=True))
        assert np.array_equal(mine[4]["final_obs"], theirs[4]["final_obs"])
        assert ("episode" in mine[4]) == ("episode" in theirs[4])
        if "episode" in mine[4]:
            ends += mine[4]["_episode"].sum()
            assert all(np.array_equal(mine[4]["episode"][key], theirs[4]["episode"][key]) for key in "rl")
    assert ends or env_id != SHORT_GAMES
    assert torch.equal(first.state_dict()["actions"], second.state_dict()["actions"])


def test_both_backends_are_asked_for_up_to_30_no_ops_at_a_games_start():
    sb3, ale = (make_atari_envs(PHOENIX, backend, 1) for backend in ("sb3", "ale"))
    assert noop_wrapper(sb3.unwrapped.envs[0]).noop_max == 30
    starts = [int(ale.reset(seed=seed)[1]["episode_frame_number"][0]) for seed in range(40, 46)]
    assert len(set(starts)) > 3 and max(starts) == starts[-1] == 30


def test_games_that_do_not_repeat_themselves_are_no_way_back():
    envs = make_atari_envs(PHOENIX, "ale", 2)
    envs.reset(seed=3)
    envs.step(np.zeros(2, int))
    state = envs.state_dict()
    state["obs"][1, 3, 40, 40] += 1
    with pytest.raises(ValueError, match="the games do not repeat themselves"):
        envs.load_state_dict(state)


@pytest.mark.parametrize("decisions", [10_000, 10_001])
def test_a_long_way_back_is_announced(decisions, monkeypatch, capsys):
    envs = make_atari_envs(PHOENIX, "ale", 1)
    envs.reset(seed=3)
    state, played = envs.state_dict(), []
    monkeypatch.setattr(LearnerView, "step", lambda _, actions: played.append(actions))
    envs.load_state_dict(state | {"actions": torch.zeros(decisions, 1, dtype=torch.uint8)})
    assert len(played) == decisions
    assert ("playing 10,001 decisions again" in capsys.readouterr().out) == (decisions > 10_000)
