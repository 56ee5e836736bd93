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
from support.machine import flush_to_disk, replacing, way_out
from support.usage import UsageError

Stop = Callable[[], bool]
Act = Callable[[np.ndarray], np.ndarray]  # observations (N, 4, 84, 84) uint8 to actions (N,) int64


@torch.no_grad()
def epsilon_greedy(
    q_values: Callable[[torch.Tensor], torch.Tensor],
    obs: np.ndarray,
    num_actions: int,
    epsilon: float,
    rng: np.random.Generator,
    device: torch.device,
) -> np.ndarray:
    """Actions (N,) int64 at obs (N, 4, 84, 84) uint8: random, or the best by `q_values`, (N, num_actions).

    `rng` moves by the same in any case. Where all are random nothing is computed.
    """
    explore = rng.random(len(obs)) < epsilon
    random_actions = rng.integers(num_actions, size=len(obs))
    if explore.all():
        return random_actions
    best_actions = q_values(upload(obs, device)).argmax(dim=1)
    return np.where(explore, random_actions, best_actions.cpu().numpy())


def player(q_network: nn.Module, num_actions: int, epsilon: float, seed: int) -> Act:
    """ε-greedy play of a network, with random numbers of its own."""
    rng = np.random.default_rng(seed)
    device = next(q_network.parameters()).device

    def act(obs: np.ndarray) -> np.ndarray:
        return epsilon_greedy(q_network, obs, num_actions, epsilon, rng, device)

    return act


def play_games(
    act: Act,
    envs: LearnerView,
    seed: int,
    steps: int = 0,
    video: Path | None = None,
    stop: Stop = lambda: False,
) -> np.ndarray:
    """Raw scores of whole games, (N,) float64, one per environment, so that short games are not favoured.

    With `steps`, they are instead the scores of the games that the first environment completes within so many
    steps; if none, of its first game (DQN Zoo reports that one's score so far). The first game is filmed to
    `video`. Once `stop` returns True, unfinished games score NaN. Environments are closed at the end.
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

    Raises OSError where there can be no such file, UsageError where OpenCV, as built here, has no encoder.
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
    """Raises UsageError where no film can be written."""
    with tempfile.TemporaryDirectory() as folder:
        open_film(Path(folder) / "probe.mp4", FRAME_SIZE, FRAME_SIZE).release()


def print_scores(title: str, scores: np.ndarray) -> None:
    print(f"{title}: scores of {len(scores)} games")
    print(" ".join(f"{score:g}" for score in scores))
    mean = f"mean {scores.mean():.1f}, standard deviation {scores.std():.1f}"
    print(f"{mean}, min {scores.min():g}, max {scores.max():g}")


def save_agent(path: Path, q_network: nn.Module, args: dict[str, Any], step: int) -> None:
    """Writes a network and the arguments it was trained with, for `torch.load` with `weights_only`.

    Raises OSError where that fails, and leaves the file that was there before.
    """
    saved = io.BytesIO()  # writing to `path` itself, PyTorch would turn a full disk into a RuntimeError
    torch.save({"q_network": q_network.state_dict(), "args": args, "step": step}, saved)
    try:
        with replacing(path) as partial:
            partial.write_bytes(saved.getbuffer())
            flush_to_disk(partial)
    except OSError as error:
        fix = f"{way_out(error)}, and --resume {path.parent}"
        raise OSError(f"{path} cannot be written ({error}): {fix}") from error
