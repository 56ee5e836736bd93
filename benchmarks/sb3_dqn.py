"""Stable-Baselines3's DQN on Atari, one window of learning after the other: what throughput.py compares with.

    # game, N, replay, first update, device
    python benchmarks/sb3_dqn.py PhoenixNoFrameskip-v4 8 50000 4000 auto

In a process of its own, as its users run it: a run of the training script sets PyTorch, the memory
allocator and denormal numbers up for its whole process. Fills its replay and writes a line; then, for
every line with a number of seconds on standard input, learns for so long and writes the steps per second.
"""

import os
import sys
import time

import ale_py
import gymnasium
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack


class StopAfter(BaseCallback):
    """Ends `learn` after so many seconds."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def _on_training_start(self) -> None:
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        return time.perf_counter() - self.start < self.seconds


def make_model(env_id: str, num_envs: int, buffer_size: int, learning_starts: int, device: str) -> DQN:
    """One update per 4 steps with a batch of 32, as in the training script; the games one after the other."""
    # the library's wrappers skip frames, so the id's own frame skip is undone
    envs = make_atari_env(env_id, n_envs=num_envs, seed=0, env_kwargs={"frameskip": 1})
    return DQN(
        "CnnPolicy",
        VecFrameStack(envs, 4),
        learning_rate=1e-4,
        buffer_size=buffer_size,
        learning_starts=learning_starts,
        batch_size=32,
        target_update_interval=8_000,
        exploration_initial_eps=0.01,
        exploration_final_eps=0.01,
        device=device,
        seed=0,
        train_freq=max(4 // num_envs, 1),  # vector steps
        gradient_steps=max(num_envs // 4, 1),
    )


def window(model: DQN, seconds: float) -> float:
    """Steps per second of a window of so many seconds."""
    first = model.num_timesteps
    start = time.perf_counter()
    model.learn(10**9, callback=StopAfter(seconds), reset_num_timesteps=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return (model.num_timesteps - first) / (time.perf_counter() - start)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    gymnasium.register_envs(ale_py)
    env_id, num_envs, buffer_size, fill, device = sys.argv[1:]
    model = make_model(env_id, int(num_envs), int(buffer_size), int(fill), device)
    model.learn(int(fill))
    print("ready", file=answers)
    for line in sys.stdin:
        print(window(model, float(line)), file=answers)


if __name__ == "__main__":
    main()
