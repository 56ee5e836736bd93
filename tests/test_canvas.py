"""Figures depend on nothing that the user has set, and what is drawn is told apart without colours."""

import ast
import itertools
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from cycler import cycler

from analysis.canvas import COLOURS, DASHES, MARKERS, Figure, drawing, look, plot_broken, save

ROOT = Path(__file__).resolve().parent.parent
OTHER = {
    "text.usetex": True,
    "font.family": ["serif"],
    "font.size": 20,
    "axes.prop_cycle": cycler(color=["red"]),
    "axes.grid": True,
    "figure.dpi": 33,
    "figure.autolayout": True,
    "savefig.bbox": "tight",
    "savefig.dpi": 50,
    "savefig.format": "svg",
    "savefig.transparent": True,
    "lines.linewidth": 9,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


@drawing()
def draw(path):
    figure = Figure(figsize=(3, 2), layout="constrained")
    ax = figure.subplots()
    plot_broken(ax, np.arange(30), np.arange(30) ** 0.5, **look(1).line, label="−1 % of {a} $b_1$")
    ax.legend()
    save(figure, path)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_a_figure_is_the_same_file_whatever_the_user_has_set(ending):
    draw(f"plain.{ending}")
    with matplotlib.rc_context(OTHER):
        draw(f"other.{ending}")
        assert matplotlib.rcParams["font.size"] == 20, "what the user has set stays"
    assert Path(f"plain.{ending}").read_bytes() == Path(f"other.{ending}").read_bytes()


DRAWS = """
import os, sys
before, folder = dict(os.environ), os.getcwd()
sys.path[:0] = sys.argv[1:]
import analysis.canvas, test_canvas
assert (dict(os.environ), os.getcwd()) == (before, folder), "what the user has set stays"
test_canvas.draw("there.png")
assert "matplotlib.pyplot" not in sys.modules
"""


def test_matplotlib_is_imported_whatever_backend_is_asked_for_and_whatever_its_files_hold():
    Path("matplotlibrc").write_bytes(b"\xff\xfe: not even text")
    Path("settings").write_text("text.usetex: True\nbackend: TkAgg\n", encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "none that there is", "MATPLOTLIBRC": "settings"}
    command = [sys.executable, "-c", DRAWS, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    draw("here.png")
    assert Path("there.png").read_bytes() == Path("here.png").read_bytes()


def test_matplotlib_is_imported_in_one_place():
    sources = [
        *ROOT.glob("*.py"),
        *(
            path
            for name in ("analysis", "img", "benchmarks", "support")
            for path in (ROOT / name).glob("*.py")
        ),
    ]
    importing = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            if any(name.partition(".")[0] == "matplotlib" for name in names):
                importing.add(path.name)
    assert importing == {"canvas.py"}


@pytest.mark.parametrize("name", ["$", "a $x_1$", r"$\frac{$", "100 % {} {0} %s", "_hidden"])
def test_a_name_is_drawn_as_it_is(name):
    with drawing():
        figure = Figure()
        ax = figure.subplots()
        ax.set_title(name)
        save(figure, "x.svg")
    assert f"<!-- {name} -->" in Path("x.svg").read_text(encoding="utf-8")


def test_44_looks_differ_without_their_colours_and_those_beside_each_other_in_all():
    looks = [look(number) for number in range(len(DASHES) * len(MARKERS))]
    assert len({(one.dashes, one.marker) for one in looks}) == len(looks) == 44
    assert len({one.point["marker"] for one in looks[: len(MARKERS)]}) == len(MARKERS), (
        "points have no dashes"
    )
    for one, other in itertools.pairwise(looks):
        assert one.colour != other.colour and one.dashes != other.dashes and one.marker != other.marker


def test_every_colour_is_seen_on_white():
    for colour in COLOURS:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = np.dot(linear, [0.2126, 0.7152, 0.0722])
        assert 1.05 / (luminance + 0.05) > 2, colour


def test_a_line_has_its_marker_at_about_eight_places_and_those_of_two_lines_lie_apart():
    ax, y = Figure().subplots(), np.arange(100.0)
    y[:20] = np.nan
    for number in (1, 2):
        plot_broken(ax, np.arange(100), y, **look(number).line)
    first, second = (line.get_markevery() for line in ax.lines)
    assert len(first) == len(second) == 8 and min(first + second) >= 20 and not set(first) & set(second)
    plot_broken(ax, np.arange(3), np.arange(3.0), **look(1).line)
    assert ax.lines[-1].get_markevery() == [0, 1, 2], "every point of a few"
    plot_broken(ax, np.arange(3), np.arange(3.0), **look(0).line)
    assert ax.lines[-1].get_marker() == "", "the first has none, in the legend neither"
