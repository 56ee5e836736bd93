"""The film of img/draw_film.py: which game of an agent it shows, and what of that."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SHORT_GAMES, TINY_GAMES, status_of, variant
from PIL import Image, ImageFont
from saved_agents import ACTIONS, STEP, run_with_agent

from dqn_injection_atari import Args, evaluate, load_agent, make_envs
from img import draw_film
from img.draw_film import FilmedGame, as_gif, draw_picture, median_game, middle_game
from support import evaluation

MARGIN, TOP = (
    draw_film.GAP,
    draw_film.GAP + 2 * draw_film.LINE,
)  # of the first screen, below two lines of text


def three_arms():
    return [
        run_with_agent("c", intervention="none"),
        run_with_agent("a", intervention="injection", env_backend="ale"),
        run_with_agent("b", intervention="reset-head"),
    ]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script with these words; returns its status, what it printed, and its error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["draw_film.py", *words])
        status = status_of(draw_film.main)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def short(monkeypatch):
    """Two games of an agent, and a film of one second."""
    monkeypatch.setattr(draw_film, "GAMES", 2)
    monkeypatch.setattr(draw_film, "SECONDS", 1)


@pytest.fixture
def at_random(monkeypatch):
    """Agents play at random, so that their games differ."""

    def player(q_network, num_actions, epsilon, seed):
        assert epsilon == 0.01
        return evaluation.player(q_network, num_actions, 1.0, seed)

    monkeypatch.setattr(draw_film, "player", player)


# which game


@pytest.mark.parametrize(
    ("scores", "number"), [([7], 0), ([5, 9], 0), ([30, 10, 20], 2), ([40, 10, 30, 20], 3), ([2, 2, 1, 9], 0)]
)
def test_the_game_is_the_median_or_the_lower_middle_one(scores, number):
    assert middle_game(np.array(scores, float)) == number


def games_with_pictures(q_network, settings, num_envs, seed):
    """Of each of these games, all played with pictures: scores before each decision, and the pictures."""
    envs = make_envs(settings, num_envs, "rgb_array")
    act = evaluation.player(q_network, ACTIONS, 1.0, seed)
    obs, _ = envs.reset(seed=seed)
    scores, pictures = [], []
    ended = False
    while not ended:  # at their frame limit they end together
        scores.append(envs.env.episode_returns.copy())
        pictures.append(envs.render())
        obs, _, _, _, infos = envs.step(act(obs))
        ended = "_episode" in infos
    assert infos["_episode"].all()
    scores.append(infos["episode"]["r"])
    return np.array(scores).T, [list(of_game) for of_game in zip(*pictures, strict=True)]


def test_the_film_shows_the_screen_of_one_of_the_games_that_evaluate_plays(monkeypatch, capsys, at_random):
    monkeypatch.setattr(draw_film, "GAMES", 4)
    monkeypatch.setattr(draw_film, "SECONDS", 4)
    run_with_agent("run", env_id=SHORT_GAMES, env_backend="ale", seed=9)
    agent = load_agent(Path("run/agent.pt"), "cpu")
    game = median_game(*agent)

    settings = Args(env_id=SHORT_GAMES, eval_episodes=4, eval_epsilon=1.0)
    evaluated = evaluate(agent[0], settings, STEP)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"injection at 10, seed 9, step {STEP}, ε 0.01: scores of 4 games"
    assert printed[1] == " ".join(f"{score:g}" for score in evaluated)
    assert printed[3] == f"median {game.scores[-1]:g}: a game of 6.7 s, 4.0 s of it in the film"
    assert len(set(evaluated)) > 1
    assert game.title == ["injection at 10", f"score {game.scores[-1]:,.0f}, the median of 4 games"]

    seed = draw_film.stream_seed(1, draw_film.Stream.EVALUATION, STEP)
    scores, pictures = games_with_pictures(agent[0], settings, 4, seed)
    assert scores[:, -1].tolist() == evaluated.tolist()
    number = middle_game(evaluated)
    assert game.scores == scores[number].tolist() and len(set(game.scores)) > 1
    assert len(game.pictures) == 60 and game.pictures[0].shape == (210, 160, 3)
    assert np.array_equal(game.pictures, pictures[number][:60])


def test_a_game_that_does_not_repeat_itself_is_noticed(monkeypatch, short):
    monkeypatch.setattr(draw_film, "play_again", lambda *_: ([], [0.0, -5.0]))
    run_with_agent("run")
    with pytest.raises(AssertionError, match="does not repeat itself"):
        median_game(*load_agent(Path("run/agent.pt"), "cpu"))


def test_a_long_name_stands_above_the_screen_in_several_lines(short):
    run_with_agent("run", freeze_heads=False, injected_head_width=32)
    *name, score = median_game(*load_agent(Path("run/agent.pt"), "cpu")).title
    words = "injection at 10, injected head width 32, all heads trained"
    assert len(name) > 1 and " ".join(name) == words
    font = ImageFont.load_default(draw_film.FONT_SIZE)
    assert max(map(font.getlength, (*name, score))) < 320


@pytest.mark.parametrize(("seconds", "shown"), [(1, 15), (20, 30)])
def test_of_a_game_nothing_is_shown_after_its_end_or_after_the_films(monkeypatch, seconds, shown):
    monkeypatch.setattr(draw_film, "SECONDS", seconds)
    pictures, scores = draw_film.play_again(Args(env_id=TINY_GAMES), 3, np.zeros(50, np.uint8))
    assert len(pictures) == shown and len(scores) == 30 + 1


# what a film consists of


def made_up_game(length, colour):
    """Two bars move, one up and one down, over noise that stays; a decision scores 1,000."""
    noise = np.random.default_rng(0).integers(2, size=(210, 160, 1)) * np.array([66, 72, 200])
    pictures = []
    for decision in range(min(length, 15)):
        screen = noise.astype(np.uint8)
        for row in (10 * decision, 200 - 10 * decision):
            screen[row : row + 10] = colour
        pictures.append(screen)
    return FilmedGame(["arm", "score"], pictures, [1_000.0 * decision for decision in range(length + 1)])


def test_a_game_that_is_over_stands_still_and_says_so():
    game = made_up_game(5, (200, 72, 72))
    assert [game.at(number)[1] for number in (0, 4)] == ["score so far: 0", "score so far: 4,000"]
    assert np.array_equal(game.at(4)[0], game.pictures[4])
    for number in (5, 14):
        screen, line = game.at(number)
        assert np.array_equal(screen, game.pictures[4]) and line == "game over: 5,000"


def test_screens_are_side_by_side_twice_as_large_below_their_titles():
    games = [made_up_game(9, (200, 72, 72)), made_up_game(9, (72, 72, 200))]
    games[0].title.pop()
    picture = np.asarray(draw_picture(games, 3))
    for column, game in enumerate(games):
        left = MARGIN + column * (320 + MARGIN)
        screen = picture[TOP : TOP + 420, left : left + 320]
        assert np.array_equal(screen[::2, ::2], game.pictures[3])
        assert np.array_equal(screen[1::2, 1::2], game.pictures[3])
        for text in (picture[:TOP], picture[TOP + 420 :]):
            assert text[:, left : left + 320].min() < 50
    assert (picture[:, :MARGIN] == 255).all()


def local_palettes(film):
    """How many pictures of a GIF there are, and how many of them have a palette of their own."""
    pictures, own, at = 0, 0, 13 + 3 * 256
    assert film[10] & 0x87 == 0x87, "a global palette of 256 colours"
    while film[at] != 0x3B:
        if film[at] == 0x2C:
            pictures += 1
            flags = film[at + 9]
            if flags & 0x80:
                own += 1
                at += 3 * 2 ** ((flags & 7) + 1)
            at += 11
        else:
            at += 2
        while film[at] > 0:  # blocks of data
            at += film[at] + 1
        at += 1
    return pictures, own


def test_a_film_lasts_as_long_as_the_game_and_keeps_its_colours_with_one_palette(short):
    games = [made_up_game(40, (200, 72, 72)), made_up_game(6, (66, 158, 130))]
    film = as_gif(games)
    assert local_palettes(film) == (15, 0)
    still = as_gif([made_up_game(1, (200, 72, 72))] * 2)
    assert len(film) < 4 * len(still), "what stays as it was is stored once"
    read = Image.open(io.BytesIO(film))
    assert read.info["loop"] == 0 and read.n_frames == 15
    milliseconds = []
    for number in range(15):
        read.seek(number)
        milliseconds.append(read.info["duration"])
        shown = np.asarray(read.convert("RGB")).astype(int)
        drawn = np.asarray(draw_picture(games, number))
        assert np.abs(shown - drawn).max() < 10  # text has few greys
        screens = slice(TOP, TOP + 420)
        assert np.abs(shown - drawn)[screens].max() <= 4
    assert milliseconds == [70, 60, 70] * 5


# the command


def test_the_agents_of_three_arms_are_in_one_film_in_the_order_given(command, short, monkeypatch):
    drawn = []
    as_film = draw_film.as_gif
    monkeypatch.setattr(draw_film, "as_gif", lambda games: drawn.extend(games) or as_film(games))
    status, printed, _ = command("x.gif", *three_arms())
    assert status == 0
    assert [game.title[0] for game in drawn] == ["no intervention", "injection at 10", "head reset at 10"]
    assert all(game.pictures[0].shape == (210, 160, 3) for game in drawn)
    assert printed.count("scores of 2 games") == printed.count("median ") == 3
    size = Path("x.gif").stat().st_size / 1e6
    assert printed.splitlines()[-1] == f"x.gif: 1 seconds, {size:.2f} MB"
    assert Image.open("x.gif").size[0] == 3 * 320 + 4 * MARGIN


def test_a_film_that_is_too_large_is_not_written(command, short, monkeypatch):
    monkeypatch.setattr(draw_film, "MOST_BYTES", 5_000)
    Path("x.gif").write_bytes(b"before")
    status, _, error = command("x.gif", run_with_agent("run"))
    assert status == 1
    assert error.endswith("must be below 0.005 MB: give fewer runs, or lower SECONDS in img/draw_film.py\n")
    assert error.startswith("error: the film has 0.") and error.count("\n") == 1
    assert Path("x.gif").read_bytes() == b"before"


OTHER = variant("OtherTinyPhoenix-v5", TINY_GAMES)


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ([], "give a film and runs: python img/draw_film.py"),
        (["x.gif"], "give a film and runs: python img/draw_film.py"),
        (["x.png", "c"], "the film is x.png, but must end in .gif: give another name"),
        (["away/x.gif", "c"], "there is no folder away: make it, or give another name"),
        (["x.gif", "c", "nowhere"], "nowhere cannot be read as an agent"),
        (["x.gif", "c", "without"], "give an agent.pt from --save-model"),
        (["x.gif", "c", "a", "elsewhere"], f"play {OTHER} and {TINY_GAMES}: give runs of one game"),
        (["x.gif", "c", "a", "c"], "several agents would be called 'no intervention': give one of each name"),
        (
            ["x.gif", "c", "a", "another"],
            "several agents would be called 'injection at 10': give one of each name",
        ),
    ],
)
def test_what_cannot_be_filmed_is_said_in_one_line_before_any_game(command, monkeypatch, words, fix):
    monkeypatch.setattr(draw_film, "play_games", lambda *_: pytest.fail("it played"))
    three_arms()
    run_with_agent("elsewhere", env_id=OTHER, intervention="reset-all")
    run_with_agent("another", seed=2)
    Path("without").mkdir()
    status, printed, error = command(*words)
    assert (status, printed) == (1, "")
    assert error.startswith("error: ") and error.count("\n") == 1 and fix in error
    assert not Path("x.gif").exists()
