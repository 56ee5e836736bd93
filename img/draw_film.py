"""Films the final agents of runs side by side.

    python img/draw_film.py img/NAME.gif runs/FOLDER runs/FOLDER runs/FOLDER

A run has an agent.pt (--save-model). Its agent plays 30 whole games, as --evaluate has it play. In the film
are the first twenty seconds, in the game's own time, of the game whose score is the median of the 30. A game
that is over before stands still.

Games are played by the backend sb3, whichever one an agent was trained with: ale shows no screen, only grey
pictures of 84×84 pixels. For the same actions both give the same rewards and ends, and what an agent sees
differs by a few grey levels in places. Their games begin with other no-ops, so the scores of an agent that
was trained with ale are those of other games than --evaluate plays.
"""

import io
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.arms import describe, setting
from analysis.canvas import INK
from dqn_injection_atari import Args, QNetwork, Stream, agent_path, load_agent, make_envs
from support.acceleration import prepare_process
from support.environments import FRAME_SKIP
from support.evaluation import play_games, player, print_scores
from support.machine import pick_device
from support.process import ends_in_one_line
from support.randomness import stream_seed
from support.usage import UsageError, words_given

GAMES = 30
SECONDS = 20
RATE = 60 // FRAME_SKIP  # pictures per second: one per decision
MOST_BYTES = 4_000_000

ZOOM = 2
GAP = 12  # pixels
FONT_SIZE = 18  # pixels
LINE = 24  # pixels from one line of text to the next
LINE_LENGTH = 36  # letters that fit above a screen
TEXT_GREYS = range(int(INK[-2:], 16), 256, 13)  # of the edges of letters: from INK to white


@dataclass(frozen=True)
class FilmedGame:
    """The first seconds of a game.

    Args:
        title: lines that stand above it
        pictures: of the screen before each decision, (210, 160, 3) uint8
        scores: before each decision of the whole game, and in its end
    """

    title: list[str]
    pictures: list[np.ndarray]
    scores: list[float]

    def at(self, number: int) -> tuple[np.ndarray, str]:
        """The picture with this number, and the line below it."""
        if number < len(self.pictures):
            return self.pictures[number], f"score so far: {self.scores[number]:,.0f}"
        return self.pictures[-1], f"game over: {self.scores[-1]:,.0f}"


def arm_name(args: Args) -> str:
    """As comparisons call the arm of a run with these arguments."""
    shared = setting(args) | {"recycled_from": None}  # which curves tell, and an agent's file does not
    return describe(shared, differing=[], baseline="no intervention")


def middle_game(scores: np.ndarray) -> int:
    """The number of the game with the median of scores (N,); with an even N of the lower middle one."""
    by_score = np.argsort(scores, kind="stable")
    return int(by_score[(len(scores) - 1) // 2])


def median_game(q_network: QNetwork, trained: Args, step: int) -> FilmedGame:
    """Plays `GAMES` games at once; then the one whose score is their median once more, alone, to be seen.

    Args:
        q_network, trained, step: as `load_agent` returns them
    """
    settings = Args(env_id=trained.env_id, env_backend="sb3")  # and what --evaluate has by default
    seed = stream_seed(settings.seed, Stream.EVALUATION, step)
    envs = make_envs(settings, GAMES)
    act = player(q_network, int(envs.single_action_space.n), settings.eval_epsilon, seed)
    scores = play_games(act, envs, seed)
    name = arm_name(trained)
    print_scores(f"{name}, seed {trained.seed}, step {step:,}, ε {settings.eval_epsilon:g}", scores)

    number = middle_game(scores)
    actions = envs.state_dict()["actions"][:, number].numpy()
    pictures, running = play_again(settings, seed + number, actions)
    assert running[-1] == scores[number], "the game does not repeat itself"
    seconds = (len(running) - 1) / RATE
    print(
        f"median {running[-1]:g}: a game of {seconds:,.1f} s, {len(pictures) / RATE:.1f} s of it in the film"
    )
    title = [*textwrap.wrap(name, LINE_LENGTH), f"score {running[-1]:,.0f}, the median of {GAMES} games"]
    return FilmedGame(title, pictures, running)


def play_again(settings: Args, seed: int, actions: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
    """Pictures and scores, as `FilmedGame` has them, of the game with this seed that these actions play.

    Args:
        actions: (T,), of which those after the game's end belong to later games
    """
    view = make_envs(settings, 1, "rgb_array")
    envs = view.env  # with the rewards of which the learner sees the signs
    envs.reset(seed=seed)
    pictures: list[np.ndarray] = []
    scores = [0.0]
    for action in actions.astype(np.int64):
        if len(pictures) < SECONDS * RATE:
            pictures.append(view.render()[0])
        _, rewards, terminations, truncations, _ = envs.step(np.array([action]))
        scores.append(scores[-1] + float(rewards[0]))
        if terminations[0] or truncations[0]:
            break
    envs.close()
    return pictures, scores


def draw_picture(games: list[FilmedGame], number: int) -> Image.Image:
    """The picture of the film with this number."""
    font = ImageFont.load_default(FONT_SIZE)
    height, width, _ = games[0].pictures[0].shape
    screen_size = (ZOOM * width, ZOOM * height)
    top = GAP + LINE * max(len(game.title) for game in games)
    bottom = top + screen_size[1]
    right = GAP + len(games) * (screen_size[0] + GAP)
    picture = Image.new("RGB", (right, bottom + LINE + GAP), "white")
    pen = ImageDraw.Draw(picture)
    left = GAP
    for game in games:
        for line, text in enumerate(game.title):
            pen.text((left, GAP + line * LINE), text, fill=INK, font=font)
        screen, caption = game.at(number)
        picture.paste(Image.fromarray(screen).resize(screen_size, Image.Resampling.NEAREST), (left, top))
        pen.text((left, bottom), caption, fill=INK, font=font)
        left += screen_size[0] + GAP
    return picture


def palette_of(games: list[FilmedGame]) -> Image.Image:
    """A picture that has the palette of the film: the colours of its screens, and those of text."""
    colours: set[Any] = {(grey, grey, grey) for grey in TEXT_GREYS}
    for game in games:
        for screen in game.pictures:
            counts = Image.fromarray(screen).getcolors()
            assert counts is not None  # of an Atari's 128 colours
            colours.update(colour for _, colour in counts)
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = sorted(colours)
    picture = Image.new("P", (1, 1))
    picture.putpalette(table.tobytes())
    return picture


def as_gif(games: list[FilmedGame]) -> bytes:
    """The film of these games."""
    numbers = range(SECONDS * RATE)
    palette = palette_of(games)
    # a GIF counts in hundredths of a second: 7, 6 and 7 are three pictures of 1/15 s
    ends = [round(100 * (number + 1) / RATE) for number in numbers]
    milliseconds = [10 * int(hundredths) for hundredths in np.diff(ends, prepend=0)]

    drawn = (draw_picture(games, number) for number in numbers)
    pictures = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in drawn)
    film = io.BytesIO()
    next(pictures).save(
        film,
        "GIF",
        save_all=True,
        append_images=pictures,
        duration=milliseconds,
        loop=0,  # for ever
        palette=bytes(palette.getpalette() or []),  # or every picture would have one of its own
        optimize=True,  # stores of a picture what has changed
    )
    return film.getvalue()


def check_agents(trained: list[Args]) -> None:
    """
    Raises:
        UsageError: these agents cannot be told apart in one film, or play different games.
    """
    names = [arm_name(args) for args in trained]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"several agents would be called {name!r}: give one of each name")
    env_ids = sorted({args.env_id for args in trained})
    if len(env_ids) > 1:
        raise UsageError(f"the agents play {' and '.join(env_ids)}: give runs of one game")


def main() -> None:
    with ends_in_one_line():
        target, *folders = words_given() or [""]
        if not folders:
            raise UsageError("give a film and runs: python img/draw_film.py NAME.gif runs/FOLDER runs/FOLDER")
        path = Path(target)
        if path.suffix != ".gif":
            raise UsageError(f"the film is {target}, but must end in .gif: give another name")
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent}: make it, or give another name")
        prepare_process()
        device = pick_device(Args.cuda, Args.torch_deterministic, Args.tf32)
        agents = [load_agent(agent_path(folder), device) for folder in folders]
        check_agents([trained for _, trained, _ in agents])

        games = [median_game(*agent) for agent in agents]
        film = as_gif(games)
        size = f"{len(film) / 1e6:.2f} MB"
        if len(film) >= MOST_BYTES:
            limit = f"must be below {MOST_BYTES / 1e6:g} MB"
            fix = "give fewer runs, or lower SECONDS in img/draw_film.py"
            raise UsageError(f"the film has {size}, but {limit}: {fix}")
        path.write_bytes(film)
        print(f"{target}: {SECONDS} seconds, {size}")


if __name__ == "__main__":
    main()
