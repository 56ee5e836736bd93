"""FrameReplayBuffer holds, transition by transition, what Stable-Baselines3's own ReplayBuffer holds."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation, ReshapeObservation, TimeLimit
from stable_baselines3 import DQN
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv

from support.replay import FrameReplayBuffer

STACK, SIDE = 4, 6
OBS_SPACE = spaces.Box(0, 255, (STACK, SIDE, SIDE), np.uint8)
ACTIONS = spaces.Discrete(5)


def random_stream(rng, n_envs, length, reset_padding):
    """What `add` receives of games with life losses (stack kept or restarted), ends and truncations."""

    def frame():
        # every sixth frame is black, as games' screens sometimes are
        return rng.integers(0, 256, (SIDE, SIDE), np.uint8) * np.uint8(rng.random() > 1 / 6)

    def first_obs():
        first = frame()
        padding = [np.zeros_like(first)] * (STACK - 1) if reset_padding == "zero" else [first] * (STACK - 1)
        return np.stack([*padding, first])

    obs = np.stack([first_obs() for _ in range(n_envs)])
    for _ in range(length):
        next_obs = np.stack([np.concatenate([o[1:], frame()[None]]) for o in obs])
        event = rng.choice(
            [
                "none",
                "life lost, stack kept",
                "life lost, stack restarted",
                "game over",
                "truncated",
                "reset unannounced",
            ],
            size=n_envs,
            p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1],
        )
        done = ~np.isin(event, ["none", "reset unannounced"])
        infos = [{"TimeLimit.truncated": True} if e == "truncated" else {} for e in event]
        yield obs, next_obs, rng.integers(5, size=n_envs), rng.normal(size=n_envs), done, infos
        restarts = ~np.isin(event, ["none", "life lost, stack kept"])
        obs = np.stack([first_obs() if restart else o for restart, o in zip(restarts, next_obs, strict=True)])


def both_buffers(buffer_size, n_envs, **kwargs):
    ours = FrameReplayBuffer(buffer_size, OBS_SPACE, ACTIONS, "cpu", n_envs=n_envs, **kwargs)
    return ours, ReplayBuffer(buffer_size, OBS_SPACE, ACTIONS, "cpu", n_envs=n_envs, **kwargs)


def assert_same_transitions(ours, theirs):
    """Every row and environment, gathered through each buffer's own path."""
    assert (ours.size(), ours.pos, ours.full) == (theirs.size(), theirs.pos, theirs.full)
    rows, columns = (index.ravel() for index in np.indices((theirs.size(), theirs.n_envs)))
    got = ours.transitions(rows, columns)
    assert np.array_equal(got.observations.numpy(), theirs.observations[rows, columns])
    assert np.array_equal(got.next_observations.numpy(), theirs.next_observations[rows, columns])
    assert np.array_equal(got.actions.numpy(), theirs.actions[rows, columns])
    assert np.array_equal(got.rewards.numpy()[:, 0], theirs.rewards[rows, columns])
    assert np.array_equal(got.dones.numpy()[:, 0], (theirs.dones * (1 - theirs.timeouts))[rows, columns])


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("buffer_size", [3, 24, 51])
@pytest.mark.parametrize("reset_padding", ["zero", "repeat"])
def test_equals_sb3_after_every_add_with_ends_of_all_kinds_and_wrap_around(
    n_envs, buffer_size, reset_padding
):
    for seed in range(2):
        ours, theirs = both_buffers(buffer_size, n_envs)
        for transition in random_stream(
            np.random.default_rng(seed), n_envs, 4 * buffer_size // n_envs + 5, reset_padding
        ):
            ours.add(*transition)
            theirs.add(*transition)
            assert_same_transitions(ours, theirs)
        assert ours.full


def test_arrays_may_be_used_again_for_the_next_transition():
    ours, theirs = both_buffers(24, 2)
    reused = None
    for transition in random_stream(np.random.default_rng(0), 2, 30, "zero"):
        arrays = transition[:5]
        reused = [np.array(array) for array in arrays] if reused is None else reused
        for stored, array in zip(reused, arrays, strict=True):
            stored[:] = array
        ours.add(*reused, transition[5])
        theirs.add(*transition)
    assert_same_transitions(ours, theirs)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_samples_are_sb3_transitions_drawn_uniformly(n_envs):
    ours, theirs = both_buffers(30, n_envs)
    for transition in random_stream(np.random.default_rng(0), n_envs, 40, "zero"):
        ours.add(*transition)
        theirs.add(*transition)
    ours.generator = np.random.default_rng(7)
    batch = ours.sample(20_000)
    rewards = theirs.rewards.ravel()  # distinct, so each names its transition
    which = np.array([np.flatnonzero(rewards == r)[0] for r in batch.rewards.numpy()[:, 0]])
    flat = (theirs.size() * n_envs, *OBS_SPACE.shape)
    assert np.array_equal(batch.observations.numpy(), theirs.observations.reshape(flat)[which])
    assert np.array_equal(batch.next_observations.numpy(), theirs.next_observations.reshape(flat)[which])
    counts = np.bincount(which, minlength=rewards.size)
    expected = 20_000 / rewards.size
    assert ((counts - expected) ** 2 / expected).sum() < rewards.size + 6 * np.sqrt(
        2 * rewards.size
    )  # χ², six sigma


def test_several_batches_in_one_call_are_the_batches_of_several_calls():
    first, second = (both_buffers(20, 2)[0] for _ in range(2))
    for buffer in (first, second):
        buffer.generator = np.random.default_rng(3)
        for transition in random_stream(np.random.default_rng(0), 2, 10, "zero"):
            buffer.add(*transition)
    one_by_one = [first.sample(7)[:5] for _ in range(3)]
    for together, parts in zip(second.sample(7, batches=3)[:5], zip(*one_by_one, strict=True), strict=True):
        assert torch.equal(together, torch.cat(parts)) and not torch.equal(parts[0], parts[1])
    assert first.generator.bit_generator.state == second.generator.bit_generator.state


def test_batches_have_sb3_shapes_and_dtypes():
    ours, theirs = both_buffers(20, 2)
    for transition in random_stream(np.random.default_rng(0), 2, 10, "zero"):
        ours.add(*transition)
        theirs.add(*transition)
    for name in ("observations", "actions", "next_observations", "dones", "rewards"):
        mine, reference = getattr(ours.sample(7), name), getattr(theirs.sample(7), name)
        assert (mine.shape, mine.dtype) == (reference.shape, reference.dtype), name


def test_sampling_uses_its_own_generator_and_leaves_the_global_ones_alone():
    buffers = [both_buffers(20, 2)[0] for _ in range(2)]
    for buffer in buffers:
        buffer.generator = np.random.default_rng(3)
        for transition in random_stream(np.random.default_rng(0), 2, 10, "zero"):
            buffer.add(*transition)
    np.random.seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = [buffers[0].sample(8).rewards for _ in range(3)]
    np.random.seed(1)
    assert all(torch.equal(a, buffers[1].sample(8).rewards) for a in first)
    np.random.seed(0)
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())


def test_timeouts_bootstrap_unless_told_otherwise():
    obs = np.zeros((1, *OBS_SPACE.shape), np.uint8)
    for handle, expected in ((True, 0.0), (False, 1.0)):
        buffer, theirs = both_buffers(4, 1, handle_timeout_termination=handle)
        for b in (buffer, theirs):
            b.add(obs, obs, np.array([0]), np.array([0.0]), np.array([True]), [{"TimeLimit.truncated": True}])
        assert buffer.sample(1).dones.item() == expected == theirs.sample(1).dones.item()


def test_each_frame_of_a_game_is_stored_once():
    rng = np.random.default_rng(0)
    buffer, _ = both_buffers(320, 1)
    frames = rng.integers(1, 256, (201, SIDE, SIDE), np.uint8)
    padded = np.concatenate([np.zeros((3, SIDE, SIDE), np.uint8), frames])
    for t in range(200):
        obs, next_obs = padded[None, t : t + 4], padded[None, t + 1 : t + 5]
        buffer.add(obs, next_obs, np.array([0]), np.array([0.0]), np.array([False]), [{}])
    assert buffer._used - 1 == 201


def test_the_pool_stays_as_large_as_the_transitions_it_serves():
    buffer, _ = both_buffers(3_200, 1)
    frame = np.random.default_rng(0).integers(1, 256, (9_601 + 3, SIDE, SIDE), np.uint8)
    for t in range(9_600):
        end = t % 100 == 99
        obs = frame[None, t : t + 4].copy()
        obs[0, : max(0, 3 - t % 100)] = 0
        next_obs = np.concatenate([obs[:, 1:], frame[None, t + 4 : t + 5]], axis=1)
        buffer.add(obs, next_obs, np.array([0]), np.array([0.0]), np.array([end]), [{}])
    assert buffer._used <= 3_200 + 3_200 // 100 + 10
    assert len(buffer.frames) == FrameReplayBuffer.pool_size(3_200, 1, STACK)


def test_a_million_atari_transitions_fit_in_7_6_gb():
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    for n_envs in (1, 16):
        assert FrameReplayBuffer.bytes_needed(1_000_000, space, n_envs) <= 7.6e9
    buffer = FrameReplayBuffer(50_000, space, ACTIONS, "cpu", n_envs=8)
    held = sum(
        array.nbytes for array in vars(buffer).values() if isinstance(array, np.ndarray | torch.Tensor)
    )
    assert held <= 7.6e9 * 0.05
    assert held == FrameReplayBuffer.bytes_needed(50_000, space, 8)


def test_a_stack_that_does_not_shift_is_refused():
    rng = np.random.default_rng(0)
    buffer, _ = both_buffers(8, 1)
    obs, next_obs = rng.integers(0, 256, (2, 1, *OBS_SPACE.shape), np.uint8)
    with pytest.raises(ValueError, match="shifted by one frame"):
        buffer.add(obs, next_obs, np.array([0]), np.array([0.0]), np.array([False]), [{}])


def test_what_it_does_not_do_is_refused():
    with pytest.raises(ValueError, match="optimize_memory_usage"):
        FrameReplayBuffer(8, OBS_SPACE, ACTIONS, "cpu", 1, True)
    buffer, _ = both_buffers(8, 1)
    for transition in random_stream(np.random.default_rng(0), 1, 4, "zero"):
        buffer.add(*transition)
    with pytest.raises(ValueError, match="normalise"):
        buffer.sample(2, env=object())


@pytest.mark.slow
def test_sb3s_own_dqn_trains_with_it():
    def make_env():
        env = gym.make("PhoenixNoFrameskip-v4", frameskip=1, max_num_frames_per_episode=None)
        env = ReshapeObservation(AtariWrapper(env), (84, 84))
        return FrameStackObservation(TimeLimit(env, 60), 4, padding_type="zero")

    envs = DummyVecEnv([make_env] * 2)
    settings = {"learning_starts": 50, "batch_size": 4, "buffer_size": 300, "device": "cpu", "seed": 0}
    model = DQN("CnnPolicy", envs, replay_buffer_class=FrameReplayBuffer, **settings).learn(400)
    assert isinstance(model.replay_buffer, FrameReplayBuffer) and model.replay_buffer.full
    assert model.replay_buffer.timeouts.sum() > 0


def test_reset_forgets_everything():
    buffer, fresh = (both_buffers(24, 3)[0] for _ in range(2))
    reference = ReplayBuffer(24, OBS_SPACE, ACTIONS, "cpu", n_envs=3)
    stream = list(random_stream(np.random.default_rng(0), 3, 45, "zero"))
    for transition in stream[:40]:
        buffer.add(*transition)
    buffer.reset()
    for transition in stream[40:]:
        for b in (buffer, fresh, reference):
            b.add(*transition)
    assert_same_transitions(buffer, reference)
    assert np.array_equal(buffer.slots, fresh.slots)


@pytest.mark.parametrize("length", [0, 5, 40, 400])
def test_it_comes_back_from_its_state_and_goes_on_the_same(length):
    stream = list(random_stream(np.random.default_rng(0), 3, length + 30, "zero"))
    first, second = both_buffers(60, 3)[0], both_buffers(60, 3)[0]
    for transition in stream[:length]:
        first.add(*transition)
    if length:
        first.sample(5)
    second.load_state_dict(first.state_dict())
    for mine, theirs in zip(second.tensors(), first.tensors(), strict=True):
        mine.copy_(theirs)
    for transition in stream[length:]:
        first.add(*transition)
        second.add(*transition)
        assert all(torch.equal(a, b) for a, b in zip(first.sample(6)[:5], second.sample(6)[:5], strict=True))
    assert (first._free, first._used, first.pos, first.full) == (
        second._free,
        second._used,
        second.pos,
        second.full,
    )
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))
    assert torch.equal(first.frames, second.frames) and (length < 400 or len(first.frames) > 60 + 30)


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_size", [24, 51])
def test_frames_on_a_gpu_are_the_frames_on_the_cpu(buffer_size):
    """Over wrap-around and growth of the pool, and after coming back from a state."""

    def buffer_on(where):
        return FrameReplayBuffer(buffer_size, OBS_SPACE, ACTIONS, "cpu", 3, storage=where)

    there = buffer_on("cuda")
    here = buffer_on("cpu")
    for transition in random_stream(np.random.default_rng(0), 3, 4 * buffer_size, "repeat"):
        for buffer in (there, here):
            buffer.add(*transition)
    back = buffer_on("cuda")
    back.load_state_dict(here.state_dict())
    for mine, theirs in zip(back.tensors(), here.tensors(), strict=True):
        mine.copy_(theirs)
    rows, columns = (index.ravel() for index in np.indices((here.size(), 3)))
    expected = here.transitions(rows, columns)
    for on_gpu in (there, back):
        assert on_gpu.frames.is_cuda and torch.equal(on_gpu.frames.cpu(), here.frames)
        found = on_gpu.transitions(rows, columns)
        assert all(torch.equal(a, b) for a, b in zip(found[:5], expected[:5], strict=True))
