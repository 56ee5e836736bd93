"""Replay: Stable-Baselines3's buffer with every frame stored once."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from support.acceleration import upload


class FrameReplayBuffer(ReplayBuffer):
    """Stable-Baselines3's replay buffer with each frame held once: 7.3 GB, not 56.4 GB, for 1M transitions.

    An observation is a stack of S frames that shifts by one each step, so a transition spans S + 1 frames.
    They lie in a pool, and a transition holds the S + 1 slot numbers of its frames. If its obs equals the
    next_obs added before it, both share those slots. Any other obs starts a new stack, whatever `done` was.
    Slot 0 is the all-zero frame that stacks start on. Every sample equals what Stable-Baselines3's buffer
    holds, games' last frames included.

    Args, besides those that Stable-Baselines3's buffer has:
        observation_space: Box of shape (S, H, W), e.g. (4, 84, 84) uint8
        optimize_memory_usage: Stable-Baselines3's way to save memory, refused: it loses games' last frames
        generator: source of the sampled indices (Stable-Baselines3 takes NumPy's global one)
        storage: device of the frames; what else makes a transition stays in the CPU's memory, 40 bytes each
    """

    SLACK = 32  # one spare slot per so many transitions, for stack starts; the pool grows if need be

    def __init__(
        self,
        buffer_size: int,
        observation_space: gym.spaces.Box,
        action_space: gym.spaces.Discrete,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        generator: np.random.Generator | None = None,
        storage: torch.device | str = "cpu",
    ):
        if optimize_memory_usage:
            message = "FrameReplayBuffer stores each frame once as it is: leave out optimize_memory_usage"
            raise ValueError(message)
        # not ReplayBuffer's own constructor: it allocates every stack, twice
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.generator = np.random.default_rng() if generator is None else generator
        self.stack, *self.frame_shape = self.obs_shape
        rows = (self.buffer_size, n_envs)
        self.storage = torch.device(storage)
        self.frames = self._pool(self.pool_size(buffer_size, n_envs, self.stack))
        self.slots = np.zeros((*rows, self.stack + 1), dtype=np.int32)
        self.actions = np.zeros((*rows, self.action_dim), dtype=action_space.dtype)
        self.rewards = np.zeros(rows, dtype=np.float32)
        self.dones = np.zeros(rows, dtype=np.float32)
        self.timeouts = np.zeros(rows, dtype=np.float32)
        self.reset()

    @classmethod
    def pool_size(cls, buffer_size: int, n_envs: int, stack: int) -> int:
        return buffer_size + buffer_size // cls.SLACK + 2 * (stack + 1) * n_envs

    @classmethod
    def bytes_needed(cls, buffer_size: int, observation_space: gym.spaces.Box, n_envs: int = 1) -> int:
        """Memory of a full buffer in bytes, of games that are not shorter than `SLACK` steps on average."""
        stack, *frame_shape = observation_space.shape
        frames = cls.pool_size(buffer_size, n_envs, stack) + n_envs * stack  # of _last_next_obs
        frame = int(np.prod(frame_shape)) * observation_space.dtype.itemsize
        transition = 4 * (stack + 1) + 8 + 3 * 4  # slots, action; reward, done, timeout
        return frames * frame + buffer_size * transition

    def _pool(self, slots: int) -> torch.Tensor:
        """Zeros; on the CPU NumPy's, which take memory only as they are filled."""
        frames = torch.from_numpy(np.zeros((slots, *self.frame_shape), self.observation_space.dtype))
        if self.storage.type == "cpu":
            return frames
        return torch.zeros_like(frames, device=self.storage)

    def reset(self) -> None:
        """Forgets every transition."""
        super().reset()
        self._used = 1  # slots ever handed out; slot 0 stays all zero
        self._free: list[int] = []
        self._last_next_obs = np.zeros((self.n_envs, *self.obs_shape), self.observation_space.dtype)
        self.slots[:] = 0  # also those of what came before the first transition, an all-zero stack

    def state_dict(self) -> dict[str, Any]:
        """The small part of the state; `tensors` is the large one."""
        return {
            "pos": self.pos,
            "full": self.full,
            "pool": len(self.frames),
            "used": self._used,
            "free": torch.tensor(self._free, dtype=torch.int32),
            "last_next_obs": torch.from_numpy(self._last_next_obs),
            "generator": self.generator.bit_generator.state,
        }

    def tensors(self) -> list[torch.Tensor]:
        """The frames in use and all transitions' rows, contiguous, to be filled after `load_state_dict`."""
        rows = (self.slots, self.actions, self.rewards, self.dones, self.timeouts)
        return [self.frames[: self._used], *(torch.from_numpy(row) for row in rows)]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(self.frames) != state["pool"]:
            self.frames = self._pool(state["pool"])
        self.pos = state["pos"]
        self.full = state["full"]
        self._used = state["used"]
        self._free = state["free"].tolist()
        self._last_next_obs = state["last_next_obs"].numpy()
        self.generator.bit_generator.state = state["generator"]

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict],
    ) -> None:
        """Adds a transition per environment: obs, next_obs (n_envs, S, H, W), the others (n_envs,)."""
        if not np.array_equal(next_obs[:, :-1], obs[:, 1:]):
            message = "next_obs must be obs shifted by one frame, also at a game's end: pass final_obs there"
            raise ValueError(message)
        slots = np.empty((self.n_envs, self.stack + 1), dtype=np.int32)
        new: dict[int, np.ndarray] = {}  # frames by their slots
        for i in range(self.n_envs):
            if np.array_equal(obs[i], self._last_next_obs[i]):
                slots[i, :-1] = self.slots[self.pos - 1, i, 1:]
            else:
                slots[i, :-1] = [self._take_slot(frame, new) for frame in obs[i]]
            slots[i, -1] = self._take_slot(next_obs[i, -1], new)
        if new:
            # one by one: a GPU's deterministic way to write by index waits for everything before it
            frames = upload(np.stack(list(new.values())), self.storage)
            for slot, frame in zip(new, frames, strict=True):
                self.frames[slot].copy_(frame)
        self._last_next_obs = np.array(next_obs)

        # free the overwritten row's slots, except those that the next row, now the oldest, still uses
        overwritten = self.slots[self.pos].copy()
        self.slots[self.pos] = slots
        oldest = self.slots[(self.pos + 1) % self.buffer_size]
        still_used = (overwritten[:, :, None] == oldest[:, None, :]).any(axis=2)
        self._free.extend(overwritten[~still_used & (overwritten != 0)].tolist())

        self.actions[self.pos] = np.reshape(action, (self.n_envs, self.action_dim))
        self.rewards[self.pos] = reward
        self.dones[self.pos] = done
        if self.handle_timeout_termination:
            self.timeouts[self.pos] = [info.get("TimeLimit.truncated", False) for info in infos]
        self.pos = (self.pos + 1) % self.buffer_size
        self.full = self.full or self.pos == 0

    def _take_slot(self, frame: np.ndarray, new: dict[int, np.ndarray]) -> int:
        """The number of a free slot for this frame, which is noted in `new`."""
        if not frame.any():
            return 0
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._used
            self._used += 1
            if slot == len(self.frames):  # many short games: more stack starts than the slack holds
                self.frames = torch.cat([self.frames, self._pool(slot // 4 + 1)])
        new[slot] = frame
        return slot

    def sample(
        self,
        batch_size: int,
        env: VecNormalize | None = None,
        batches: int = 1,
        generator: np.random.Generator | None = None,
    ) -> ReplayBufferSamples:
        """A uniform batch, with replacement, on `device`; or several.

        Args:
            generator: draws them; the buffer's own if not given

        Returns:
            observations, next_observations (B, S, H, W) uint8, channels last in memory; actions (B, 1) int64;
            rewards, dones (B, 1) float32; with B = batches · batch_size

        Raises ValueError where `env` is given: what is stored is never normalised.
        """
        if env is not None:
            raise ValueError("FrameReplayBuffer does not normalise: leave out env")
        if generator is None:
            generator = self.generator
        rows = []
        columns = []
        for _ in range(batches):
            rows.append(generator.integers(self.size(), size=batch_size))
            columns.append(generator.integers(self.n_envs, size=batch_size))
        return self.transitions(np.concatenate(rows), np.concatenate(columns))

    def transitions(self, rows: np.ndarray, columns: np.ndarray) -> ReplayBufferSamples:
        """The transitions at these rows of these environments, both (B,) int, in the form of `sample`."""
        slots = upload(self.slots[rows, columns].ravel(), self.storage)
        frames = upload(self.frames.index_select(0, slots), self.device)
        stacks = frames.view(-1, self.stack + 1, *self.frame_shape)
        dones = self.dones[rows, columns] * (1 - self.timeouts[rows, columns])
        return ReplayBufferSamples(
            observations=stacks[:, :-1].contiguous(memory_format=torch.channels_last),
            actions=upload(self.actions[rows, columns], self.device),
            next_observations=stacks[:, 1:].contiguous(memory_format=torch.channels_last),
            dones=upload(dones[:, None], self.device),
            rewards=upload(self.rewards[rows, columns, None], self.device),
        )
