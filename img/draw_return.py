"""Draws one run's return against step: python img/draw_return.py runs/FOLDER img/NAME.png [RANDOM_SCORE]"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.arms import short
from analysis.canvas import Figure, check_name, drawing, save
from analysis.curves import TRAINING_RETURN, RecordedRun, read_run
from analysis.figures import labelled
from dqn_injection_atari import INTERVENTIONS
from support.process import ends_in_one_line
from support.usage import UsageError, words_given

GAMES_PER_POINT = 20


@drawing()
def draw(run: RecordedRun, target: str, random_score: float | None) -> None:
    nothing = np.empty((2, 0))
    steps, returns = run.scalars[TRAINING_RETURN]
    evaluations = run.scalars.get("eval/episodic_return", nothing)
    interventions = run.scalars.get("injection/step", nothing)[0]
    figure = Figure(figsize=(8, 4.2))
    ax = figure.subplots()
    ax.plot(steps, returns, ".", ms=2, color="#b9cfe4", label="one training game")
    window = min(GAMES_PER_POINT, len(returns))
    means = np.convolve(returns, np.ones(window) / window, mode="valid")
    label = f"mean of the last {window} training games"
    ax.plot(steps[window - 1 :], means, color="#1f5a92", lw=1.8, label=label)
    if evaluations.size:
        ax.plot(*evaluations, "D", ms=5, color="#d1495b", label="evaluation, mean of its games")
    if random_score is not None:
        ax.axhline(random_score, color="#666666", lw=1, ls=":", label=f"random play ({random_score:g})")
    for step in interventions:
        name = INTERVENTIONS[run.args.intervention].noun
        ax.axvline(step, color="#e08a1e", lw=1.5, ls="--", label=name)
    ax.set_xlabel("step (1 step = 4 frames)")
    ax.set_ylabel("return of a whole game, raw score")
    highest = [np.quantile(returns, 0.998), *evaluations[1:].flat]
    if random_score is not None:
        highest.append(random_score)
    ax.set_ylim(min(0, returns.min()), max(highest))
    ax.xaxis.set_major_formatter(lambda step, _: short(step))
    ax.margins(x=0.01)
    named = labelled(ax)
    ax.legend(named.values(), named.keys(), loc="upper left")
    ax.set_title(run.args.env_id, fontsize=10, loc="left")
    save(figure, target, bbox_inches="tight")


def number(word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        problem = f"RANDOM_SCORE is {word}, but must be a number"
        raise UsageError(f"{problem}: change it, or leave it out") from error


def main() -> None:
    with ends_in_one_line():
        words = words_given()
        if len(words) not in (2, 3):
            example = "python img/draw_return.py runs/FOLDER img/NAME.png [RANDOM_SCORE]"
            raise UsageError(f"give a run and a figure's name: {example}")
        random_score = number(words[2]) if len(words) == 3 else None
        check_name(words[1])
        draw(read_run(words[0], TRAINING_RETURN, "give another"), words[1], random_score)


if __name__ == "__main__":
    main()
