"""Draws one run's return against step: python img/draw_return.py runs/FOLDER img/NAME.png [RANDOM_SCORE]"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

GAMES_PER_POINT = 20


def scalar(events: EventAccumulator, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (K,) and values (K,) of a TensorBoard scalar; empty where the run has none."""
    points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    return np.array([point.step for point in points]), np.array([point.value for point in points])


def main() -> None:
    folder, target, *random_score = sys.argv[1:]
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    steps, returns = scalar(events, "charts/episodic_return")
    eval_steps, eval_returns = scalar(events, "eval/episodic_return")
    injections, _ = scalar(events, "injection/step")

    figure, ax = plt.subplots(figsize=(8, 4.2))
    ax.plot(steps, returns, ".", ms=2, color="#b9cfe4", label="one training game")
    window = min(GAMES_PER_POINT, len(returns))
    means = np.convolve(returns, np.ones(window) / window, mode="valid")
    ax.plot(steps[window - 1 :], means, color="#1f5a92", lw=1.8, label=f"mean of the last {window} training games")
    if len(eval_steps):
        ax.plot(eval_steps, eval_returns, "D", ms=5, color="#d1495b", label="evaluation, mean of its games")
    if random_score:
        ax.axhline(float(random_score[0]), color="#666666", lw=1, ls=":", label=f"random play ({random_score[0]})")
    for i, step in enumerate(injections):
        ax.axvline(step, color="#e08a1e", lw=1.5, ls="--", label=None if i else "plasticity injection")
    ax.set(xlabel="step (1 step = 4 frames)", ylabel="return of a whole game, raw score", ylim=(0, np.quantile(returns, 0.998)))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    ax.margins(x=0.01)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8.5, loc="upper left")
    ax.set_title(Path(folder).name.split("__")[0], fontsize=10, loc="left")
    figure.savefig(target, dpi=160, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
