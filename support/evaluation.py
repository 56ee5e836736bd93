"""Whole games played by an agent: their scores, and a film of the first."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn as nn

from support.acceleration import upload
from support.environments import FRAME_SIZE, FRAME_SKIP, LearnerView
from support.usage import UsageError

Stop = Callable[[], bool]


@torch.no_grad()
def epsilon_greedy(
    q: Callable[[], torch.Tensor], shape: tuple[int, int], epsilon: float, rng: np.random.Generator
) -> np.ndarray:
    """Actions (N,) int64 from Q-values of shape (N, num_actions): the best, or random. `rng` moves by the same in any case."""
    explore = rng.random(shape[0]) < epsilon
    actions = rng.integers(shape[1], size=shape[0])
    return actions if explore.all() else np.where(explore, actions, q().argmax(dim=1).cpu().numpy())


def player(
    q_network: nn.Module, num_actions: int, epsilon: float, seed: int
) -> Callable[[np.ndarray], np.ndarray]:
    """ε-greedy actions (N,) int64 of a network for observations (N, 4, 84, 84) uint8, with random numbers of its own."""
    rng, device = np.random.default_rng(seed), next(q_network.parameters()).device

    def act(obs: np.ndarray) -> np.ndarray:
        return epsilon_greedy(lambda: q_network(upload(obs, device)), (len(obs), num_actions), epsilon, rng)

    return act


def play_games(
    act: Callable[[np.ndarray], np.ndarray],
    envs: LearnerView,
    seed: int,
    steps: int = 0,
    video: Path | None = None,
    stop: Stop = lambda: False,
) -> np.ndarray:
    """Raw scores of whole games, (N,) float64, one per environment, so that none is favoured; or with `steps` those of the
    first environment's games that end within so many steps, or else of the first (DQN Zoo).

    Args:
        act: actions (N,) int64 for observations (N, 4, 84, 84) uint8
        envs: N environments, which are closed in the end
        seed: of their games
        video: where the first game is filmed to
        stop: once it returns True, what is not over is left at NaN
    """
    games: list[list[float]] = [[] for _ in range(envs.num_envs)]  # scores, per environment
    played = 0

    def over() -> bool:
        return all(games) and played >= steps

    with contextlib.ExitStack() as stack:
        stack.callback(envs.close)
        obs, _ = envs.reset(seed=seed)
        if video:
            video.parent.mkdir(exist_ok=True)
            height, width, _ = envs.render()[0].shape
            film = open_film(video, width, height)
            stack.callback(film.release)
        while not over() and not stop():
            if video and not games[0]:
                film.write(np.ascontiguousarray(envs.render()[0][..., ::-1]))  # OpenCV's order is BGR
            obs, _, _, _, infos = envs.step(act(obs))
            played += 1
            for i in np.flatnonzero(infos.get("_episode", ())):
                games[i].append(float(infos["episode"]["r"][i]))
    if steps:
        return np.array(games[0] if over() else [np.nan])
    return np.array([scores[0] if scores else np.nan for scores in games])


def open_film(path: Path, width: int, height: int) -> cv2.VideoWriter:
    """A writer of an mp4 (VP9, which browsers play) with one picture per step, in the game's own time.

    Raises:
        UsageError: OpenCV writes none; builds and wheels differ in the encoders that they have.
        OSError: there can be no such file.
    """
    path.touch()
    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"vp09"), 60 / FRAME_SKIP, (width, height))
    if not film.isOpened():
        path.unlink()
        elsewhere = "with --save-model, --evaluate can film the agent on another machine"
        here = "give --no-capture-video with --fork if the run has begun, else leave out --capture-video"
        raise UsageError(f"OpenCV {cv2.__version__} writes no VP9 video here ({elsewhere}): {here}")
    return film


def require_film() -> None:
    """
    Raises:
        UsageError: no film can be written here.
    """
    with tempfile.TemporaryDirectory() as folder:
        open_film(Path(folder) / "probe.mp4", FRAME_SIZE, FRAME_SIZE).release()


def print_scores(title: str, scores: np.ndarray) -> None:
    print(f"{title}: scores of {len(scores)} games")
    print(" ".join(f"{score:g}" for score in scores))
    print(
        f"mean {scores.mean():.1f}, standard deviation {scores.std():.1f}, min {scores.min():g}, max {scores.max():g}"
    )


def save_agent(path: Path, q_network: nn.Module, args: dict[str, Any], step: int) -> None:
    """Writes a network and the arguments it was trained with to one file, which `torch.load` reads with `weights_only`."""
    saved = io.BytesIO()  # writing to `path` itself, PyTorch would turn a full disk into a RuntimeError
    torch.save({"q_network": q_network.state_dict(), "args": args, "step": step}, saved)
    path.write_bytes(saved.getbuffer())
