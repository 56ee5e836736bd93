"""Both backends play the same games and show the learner the same things."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SHORT_GAMES, variant
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.atari_wrappers import NoopResetEnv

from support.environments import atari_spec, make_envs
from support.usage import UsageError

BACKENDS = ("sb3", "ale")


def noop_wrapper(env):
    while not isinstance(env, NoopResetEnv):
        env = env.env
    return env


def lockstep(env_id, num_envs, steps, actions_of):
    """Plays both backends with the same actions from the same starts; yields both `step` results."""
    sb3, ale = (make_envs(Args(env_id=env_id, num_envs=num_envs, env_backend=backend)) for backend in BACKENDS)
    sub_envs = sb3.unwrapped.envs

    def copy_starts(infos):
        # the number of no-ops is the one thing the two draw from different generators
        for env, frames in zip(sub_envs, infos["episode_frame_number"], strict=True):
            noop_wrapper(env).override_num_noops = max(int(frames), 1)

    # a start without any no-op exists in ale only
    seed = next(s for s in range(100) if (ale.reset(seed=s)[1]["episode_frame_number"] > 0).all())
    _, infos = ale.reset(seed=seed)
    copy_starts(infos)
    sb3.reset(seed=0)
    for t in range(steps):
        actions = actions_of(t)
        ours = ale.step(actions)
        if "_episode" in ours[4] and (ours[4]["episode_frame_number"][ours[4]["_episode"]] == 0).any():
            return
        copy_starts(ours[4])
        yield sb3.step(actions), ours
    sb3.close()


@pytest.mark.parametrize("env_id,num_envs", [("PhoenixNoFrameskip-v4", 3), ("BreakoutNoFrameskip-v4", 2), ("ALE/Qbert-v5", 1)])
def test_backends_agree_on_rewards_ends_and_raw_returns(env_id, num_envs):
    if env_id.startswith("ALE/"):  # without its sticky actions, whose generators differ
        env_id = variant("SteadyQbert-v5", env_id, repeat_action_probability=0.0)
    rng = np.random.default_rng(0)
    num_actions = make_envs(Args(env_id=env_id)).single_action_space.n
    games = lives_lost = 0
    for sb3, ale in lockstep(env_id, num_envs, 1500, lambda t: rng.integers(num_actions, size=num_envs)):
        for name, mine, theirs in zip(("rewards", "terminations", "truncations"), sb3[1:4], ale[1:4], strict=True):
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
    assert games >= 2 and lives_lost >= 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_returns_are_raw_scores_of_whole_games_while_rewards_are_signs(backend):
    args = Args(num_envs=2, env_backend=backend)
    envs, rng = make_envs(args), np.random.default_rng(1)
    envs.reset(seed=3)
    clipped, length, lives_lost, checked = np.zeros(2), np.zeros(2, int), np.zeros(2, int), 0
    for _ in range(4000):
        _, rewards, terminations, _, infos = envs.step(rng.integers(8, size=2))
        assert set(np.unique(rewards)) <= {-1, 0, 1} and rewards.dtype == np.float32
        over = infos.get("_episode", np.zeros(2, bool))
        clipped, length, lives_lost = clipped + rewards, length + 1, lives_lost + (terminations & ~over)
        for i in np.flatnonzero(over):
            assert lives_lost[i] == 4  # Phoenix gives five lives; the fifth ends the game
            assert infos["episode"]["l"][i] == length[i]
            # every hit in Phoenix scores 20 points or more
            assert infos["episode"]["r"][i] >= 20 * clipped[i]
            clipped[i] = length[i] = lives_lost[i] = 0
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_stacks_shift_by_one_survive_life_losses_and_restart_on_zeros_after_games(backend):
    envs, rng = make_envs(Args(num_envs=2, env_backend=backend)), np.random.default_rng(2)
    obs, _ = envs.reset(seed=5)
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
    assert not obs[:, :3].any() and obs[:, 3].any(axis=(1, 2)).all()
    games = lives_lost = 0
    for _ in range(2500):
        next_obs, _, terminations, _, infos = envs.step(rng.integers(8, size=2))
        over = infos.get("_episode", np.zeros(2, bool))
        assert np.array_equal(infos["final_obs"][:, :3], obs[:, 1:])
        assert np.array_equal(infos["final_obs"][~over], next_obs[~over])
        assert not next_obs[over, :3].any()
        for i in np.flatnonzero(over):
            assert not np.array_equal(infos["final_obs"][i, 3], next_obs[i, 3]), "the last frame is its own game's"
        games, lives_lost = games + over.sum(), lives_lost + (terminations & ~over).sum()
        obs = next_obs
    assert games >= 2 and lives_lost >= 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_game_at_its_frame_limit_is_truncated_and_not_terminal(backend):
    env_id = variant("ShortPhoenix-v5", "PhoenixNoFrameskip-v4", max_num_frames_per_episode=120)
    envs = make_envs(Args(env_id=env_id, num_envs=3, env_backend=backend))
    envs.reset(seed=1)
    for t in range(1, 61):
        _, _, terminations, truncations, infos = envs.step(np.zeros(3, int))
        assert not terminations.any()
        assert truncations.all() == truncations.any() == (t % 30 == 0)
    assert infos["episode"]["l"].tolist() == [30, 30, 30]


@pytest.mark.parametrize("backend", BACKENDS)
def test_v5_keeps_its_sticky_actions_and_skips_four_frames_once(backend):
    def frames_and_scores(env_id, seed):
        envs = make_envs(Args(env_id=env_id, env_backend=backend))
        _, infos = envs.reset(seed=seed)
        frame, screens = int(infos["episode_frame_number"][0]), []
        for t in range(40):
            obs, _, _, _, infos = envs.step(np.array([2 + t % 2]))  # right, left, right, ...
            assert infos["episode_frame_number"][0] == frame + 4 * (t + 1)
            screens.append(obs[0, -1])
        return frame, np.array(screens)

    starts: dict[str, dict[int, list[np.ndarray]]] = {}
    for env_id in ("ALE/Phoenix-v5", "PhoenixNoFrameskip-v4"):
        starts[env_id] = {}
        for seed in range(60):
            frame, screens = frames_and_scores(env_id, seed)
            starts[env_id].setdefault(frame, []).append(screens)
    same_start = {
        env_id: [np.array_equal(group[0], other) for group in groups.values() for other in group[1:]]
        for env_id, groups in starts.items()
    }
    assert len(same_start["PhoenixNoFrameskip-v4"]) > 10 and all(same_start["PhoenixNoFrameskip-v4"])
    assert not any(same_start["ALE/Phoenix-v5"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_fixes_every_game_and_another_seed_changes_them(backend):
    def play(seed):
        envs, rng = make_envs(Args(env_id="ALE/Phoenix-v5", num_envs=3, env_backend=backend)), np.random.default_rng(0)
        frames = [envs.reset(seed=seed)[0]]
        frames += [envs.step(rng.integers(8, size=3))[0] for _ in range(300)]
        return np.array(frames)

    first = play(11)
    assert np.array_equal(first, play(11))
    assert not np.array_equal(first, play(12))


@pytest.mark.parametrize(
    "env_id", ["PongNoFrameskip-v4", "ALE/MontezumaRevenge-v5", "Enduro-v4", "Freeway-v4", "ALE/Surround-v5"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_atari_id_plays(env_id, backend):
    envs = make_envs(Args(env_id=env_id, num_envs=2, env_backend=backend))
    obs, _ = envs.reset(seed=0)
    for _ in range(5):
        obs, *_ = envs.step(np.array([0, 1]))
    assert obs.shape == (2, 4, 84, 84)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert envs.single_action_space.n == gym.make(env_id).action_space.n


@pytest.mark.parametrize(
    "env_id", ["NoSuchGame-v4", "ALE/NoSuchGame-v5", "CartPole-v1", "Pendulum-v1", "Phoenix NoFrameskip", ""]
)
def test_ids_that_are_no_atari_games_are_refused(env_id):
    with pytest.raises(UsageError, match="PhoenixNoFrameskip-v4") as error:
        make_envs(Args(env_id=env_id))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_continuous_actions_are_refused(backend):
    env_id = variant("ContinuousPhoenix-v5", "ALE/Phoenix-v5", continuous=True)
    with pytest.raises(UsageError, match="continuous actions"):
        make_envs(Args(env_id=env_id, env_backend=backend))


def test_what_a_backend_cannot_do_is_refused_not_ignored():
    hard = variant("HardFreeway-v5", "ALE/Freeway-v5", difficulty=1)
    make_envs(Args(env_id=hard, env_backend="sb3"))
    with pytest.raises(UsageError, match="--env-backend sb3"):
        make_envs(Args(env_id=hard, env_backend="ale"))
    with pytest.raises(UsageError, match="not the screen"):
        make_envs(Args(env_id=variant("RamPhoenix-v5", "ALE/Phoenix-v5", obs_type="ram")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_registered_with_nothing_but_a_game_plays(backend):
    if "BarePhoenix-v5" not in gym.registry:
        gym.register("BarePhoenix-v5", "ale_py.env:AtariEnv", kwargs={"game": "phoenix"})
    envs = make_envs(Args(env_id="BarePhoenix-v5", env_backend=backend))
    envs.reset(seed=0)
    assert envs.step(np.array([0]))[0].shape == (1, 4, 84, 84)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_in_two_halves_is_a_step_and_its_outcome_waits_to_be_received(backend):
    args = Args(env_id=SHORT_GAMES, env_backend=backend, num_envs=3)
    whole, halves = make_envs(args), make_envs(args)
    rng = np.random.default_rng(0)
    for envs in (whole, halves):
        envs.reset(seed=3)
    for i in range(150):
        obs, actions = halves.obs, rng.integers(4, size=3)
        expected = whole.step(actions)
        halves.send(actions)
        early = halves.state_dict() if i % 2 else None  # has to wait for the games
        assert halves.decision[0] is obs and halves.decision[1] is actions
        for _ in range(2):
            got = halves.receive()
            assert all(np.array_equal(a, b) for a, b in zip(expected[:4], got[:4], strict=True))
            assert np.array_equal(expected[4]["final_obs"], got[4]["final_obs"])
        state, reference = halves.state_dict(), whole.state_dict()
        for other in (reference, early or reference):
            assert torch.equal(state["actions"], other["actions"]) and torch.equal(state["obs"], other["obs"])


def test_neighbouring_seeds_share_no_environment_seeds():
    used = [stream_seed(seed, 3) + i for seed in range(200) for i in range(16)]
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("env_id", [SHORT_GAMES, "ALE/Breakout-v5"])
def test_games_come_back_from_their_state_and_go_on_the_same(backend, env_id):
    args = Args(env_id=env_id, env_backend=backend, num_envs=3)
    rng = np.random.default_rng(0)
    first, second = make_envs(args), make_envs(args)
    first.reset(seed=3)
    for _ in range(50):
        first.step(rng.integers(4, size=3))
    first.reset(seed=11)  # environments that have played and new ones begin alike
    for _ in range(230):
        first.step(rng.integers(4, size=3))
    second.load_state_dict(first.state_dict())
    assert np.array_equal(first.obs, second.obs) and np.array_equal(first.lives, second.lives)
    ends = 0
    for _ in range(230):
        actions = rng.integers(4, size=3)
        mine, theirs = first.step(actions), second.step(actions)
        assert all(np.array_equal(a, b) for a, b in zip(mine[:4], theirs[:4], strict=True))
        assert np.array_equal(mine[4]["final_obs"], theirs[4]["final_obs"])
        assert ("episode" in mine[4]) == ("episode" in theirs[4])
        if "episode" in mine[4]:
            ends += mine[4]["_episode"].sum()
            assert all(np.array_equal(mine[4]["episode"][key], theirs[4]["episode"][key]) for key in "rl")
    assert ends or env_id != SHORT_GAMES
