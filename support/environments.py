"""Atari games as the learner sees them, from Stable-Baselines3's wrappers or from ALE's vectoriser.

1 step = 1 decision of the agent in 1 environment = 4 emulator frames.
"""

import math
from typing import Any, Literal

import ale_py  # which registers its games
import gymnasium as gym
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import FrameStackObservation, ReshapeObservation, TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, NoopResetEnv, WarpFrame

from support.machine import usable_processors
from support.process import say
from support.usage import UsageError

FRAME_SKIP = 4  # emulator frames per step
FRAME_SIZE = 84  # pixels, both sides
STACK = 4  # frames per observation
OBS_SPACE = gym.spaces.Box(0, 255, (STACK, FRAME_SIZE, FRAME_SIZE), np.uint8)
MAX_NOOPS = 30
MAX_FRAMES = 108_000  # of a game


def atari_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """The registration of an Atari id; UsageError where it is none, or plays in a way that is not ours."""
    try:
        spec = gym.spec(env_id)
    except (gym.error.Error, ImportError) as error:
        raise UsageError(f"unknown env_id {env_id!r} ({error}): try PhoenixNoFrameskip-v4") from None
    if spec.entry_point not in ("ale_py.env:AtariEnv", "ale_py:AtariEnv"):
        raise UsageError(f"env_id {env_id!r} is not an Atari game: try PhoenixNoFrameskip-v4")
    if spec.kwargs.get("continuous", False):
        kind = "continuous actions, DQN needs discrete ones"
        raise UsageError(f"env_id {env_id!r} has {kind}: register it without them")
    obs_type = spec.kwargs.get("obs_type", "rgb")
    if obs_type != "rgb":
        shown = f"{obs_type}, not the screen"
        raise UsageError(f"env_id {env_id!r} shows {shown}: register it without obs_type")
    if spec.max_episode_steps is not None:
        limit = "limits games by max_episode_steps"
        raise UsageError(f"env_id {env_id!r} {limit}: register it with max_num_frames_per_episode instead")
    return spec


class LearnerView(VectorWrapper):
    """What the learner sees of Atari games: clipped rewards, and lost lives as ends while the game goes on.

    `step`, or `send` and then `receive`, returns
        obs (N, 4, 84, 84) uint8: of the next decision; a row whose game ended shows the next game
        rewards (N,) float32: −1, 0 or 1, the sign of the change in score
        terminations (N,) bool: the game is over, or a life was lost and the game goes on
        truncations (N,) bool: the game was cut at its frame limit
        infos: "final_obs" (N, 4, 84, 84) uint8, the true successor, also where obs shows the next game
            (of a game that ALE's vectoriser cuts, the last picture is not quite it: docs/deviations.md);
            where "_episode" is set, infos["episode"]["r"] is the game's raw score, ["l"] its length in steps

    ALE's vectoriser cannot be saved, but games repeat themselves: `state_dict` is the seed of the last reset
    and the actions since, and `load_state_dict` plays them again.
    """

    single_observation_space: gym.spaces.Box
    single_action_space: gym.spaces.Discrete

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.obs, infos = self.env.reset(seed=seed, options=options)
        self.lives = infos["lives"]
        self.seed = seed
        self.played = bytearray()  # all actions since
        return self.obs, infos

    @property
    def going(self) -> int:
        """How many games are under way: at least one decision is taken, and they are not over."""
        return int(np.count_nonzero(self.env.episode_lengths))  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        actions = np.frombuffer(self.played, np.uint8).reshape(-1, self.num_envs)
        return {
            "seed": self.seed,
            "actions": torch.from_numpy(actions.copy()),
            "obs": torch.from_numpy(self.obs.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset(seed=state["seed"])
        if len(state["actions"]) > 10_000:
            say(f"playing {len(state['actions']):,} decisions again, since new games began")
        for actions in state["actions"].numpy():
            self.step(actions.astype(np.int64))
        if not np.array_equal(self.obs, state["obs"].numpy()):
            raise ValueError("the games do not repeat themselves")

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.send(actions)
        return self.receive()

    def send(self, actions: np.ndarray) -> None:
        """The first half of a step. ALE's vectoriser begins to play, in threads of its own."""
        self.played += np.asarray(actions, np.uint8).tobytes()
        self.actions = actions
        if isinstance(self.unwrapped, EagerAtariVectorEnv):
            self.unwrapped.send(actions)

    def receive(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """The second half: what came of the actions that were sent."""
        self.obs, scores, terminations, truncations, infos = self.env.step(self.actions)
        ended = terminations | truncations
        # where a game ended, "lives" is already the next game's
        life_lost = ~ended & (infos["lives"] < self.lives)
        self.lives = infos["lives"]
        final_obs = self.obs.copy()
        for i in np.flatnonzero(ended):
            final_obs[i] = infos["final_obs"][i]
        infos["final_obs"] = final_obs
        rewards = np.sign(scores).astype(np.float32)
        return self.obs, rewards, terminations | life_lost, truncations & ~terminations, infos

    def render(self) -> tuple[np.ndarray, ...]:
        """An RGB picture per game: the screen, or the newest frame where ALE's vectoriser shows none."""
        if not isinstance(self.unwrapped, AtariVectorEnv):
            return self.env.render()  # type: ignore[return-value]
        zoom = 4
        newest = self.obs[:, -1].repeat(zoom, axis=1).repeat(zoom, axis=2)
        return tuple(np.repeat(newest[..., None], 3, axis=-1))


class EagerAtariVectorEnv(AtariVectorEnv):
    """ALE's vectoriser, whose `step` only receives where `send` has gone ahead."""

    sent = False  # whether actions were sent whose outcome was not received yet

    def send(self, actions: np.ndarray) -> None:
        super().send(actions)
        self.sent = True

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        if not self.sent:
            self.send(actions)
        self.sent = False
        return self.recv()


def make_env(spec: gym.envs.registration.EnvSpec, max_frames: int, render_mode: str | None) -> gym.Env:
    """One game behind Stable-Baselines3's wrappers, with raw rewards and whole games."""
    # the id's own frame skip and frame limit are undone, because the wrappers below apply them
    raw = {"frameskip": 1, "max_num_frames_per_episode": None}
    env = gym.make(spec, disable_env_checker=True, render_mode=render_mode, **raw)
    if env.unwrapped.get_action_meanings()[0] != "NOOP":  # type: ignore[attr-defined]
        raise UsageError(
            f"{spec.id} has no action that does nothing, which --env-backend sb3 begins games with: "
            "give --env-backend ale, or register it with full_action_space=True"
        )
    env = NoopResetEnv(env, noop_max=MAX_NOOPS)
    env = MaxAndSkipEnv(env, skip=FRAME_SKIP)
    env = WarpFrame(env, width=FRAME_SIZE, height=FRAME_SIZE)  # (84, 84, 1)
    env = ReshapeObservation(env, (FRAME_SIZE, FRAME_SIZE))
    env = FrameStackObservation(env, STACK, padding_type="zero")  # (4, 84, 84)
    return TimeLimit(env, max_episode_steps=math.ceil(max_frames / FRAME_SKIP))


def make_atari_envs(
    env_id: str, backend: Literal["sb3", "ale"], num_envs: int, render_mode: str | None = None
) -> LearnerView:
    """`num_envs` games; one that ends is replaced in the same step.

    Both backends preprocess as DQN Zoo does, but for what docs/deviations.md names: up to 30 no-ops at the
    start, each action for 4 frames, maximum of the last two, grey, 84×84, 4 frames stacked on zeros, at most
    108,000 frames a game, no FIRE on reset.
    Emulators of this process say nothing but errors from now on. Raises UsageError as `atari_spec` does,
    where ALE's vectoriser cannot set the id's mode or difficulty, and where the wrappers find no action that
    does nothing.
    """
    spec = atari_spec(env_id)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    kwargs = spec.kwargs
    max_frames = kwargs.get("max_num_frames_per_episode") or MAX_FRAMES
    if backend == "sb3":
        games = [lambda: make_env(spec, max_frames, render_mode)] * num_envs
        envs: VectorEnv = SyncVectorEnv(games, autoreset_mode=AutoresetMode.SAME_STEP)
    else:
        if kwargs.get("mode") is not None or kwargs.get("difficulty") is not None:
            unable = "sets a mode or difficulty, which ALE's vectoriser cannot"
            raise UsageError(f"env_id {env_id!r} {unable}: --env-backend sb3")
        envs = EagerAtariVectorEnv(
            game=kwargs["game"],
            num_envs=num_envs,
            num_threads=min(num_envs, usable_processors()),
            max_num_frames_per_episode=max_frames,
            repeat_action_probability=kwargs.get("repeat_action_probability", 0.25),  # as AtariEnv
            full_action_space=kwargs.get("full_action_space", False),
            frameskip=FRAME_SKIP,
            noop_max=MAX_NOOPS + 1,  # draws from 0 ... noop_max − 1
            use_fire_reset=False,
            reward_clipping=False,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
    return LearnerView(RecordEpisodeStatistics(envs))
