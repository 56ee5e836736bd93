"""How every figure is drawn, whatever the user has set: the only place that imports matplotlib."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.usage import UsageError


@contextlib.contextmanager
def settings_hidden() -> Iterator[None]:
    """While matplotlib is imported: it would read what the user has set for other work, and may fail at that.

    That is MPLBACKEND, as every command of a notebook inherits it, and a file matplotlibrc: in the working
    folder, at MATPLOTLIBRC, or in the user's folder of settings. MPLCONFIGDIR, that folder, stays what it is,
    since matplotlib keeps its list of fonts there.
    """
    instead = {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    if os.environ.get("MPLCONFIGDIR"):
        instead["MPLCONFIGDIR"] = os.path.abspath(os.environ["MPLCONFIGDIR"])
    before = dict(os.environ)
    os.environ.update(instead)
    elsewhere = contextlib.chdir(Path(__file__).parent)
    try:
        with elsewhere if os.path.lexists("matplotlibrc") else contextlib.nullcontext():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


with settings_hidden():
    import matplotlib
    from matplotlib.artist import Artist as Artist
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
    from matplotlib.figure import SubFigure as SubFigure
    from matplotlib.patches import Circle as Circle
    from matplotlib.patches import FancyArrowPatch as FancyArrowPatch
    from matplotlib.patches import FancyBboxPatch as FancyBboxPatch
    from matplotlib.ticker import LogLocator as LogLocator
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from matplotlib.transforms import ScaledTranslation as ScaledTranslation

INK = "#222222"
# Okabe and Ito's, safe for the colour-blind; wine in the place of their yellow, which is faint on white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#882255")
MARKERS = ("", "s", "^", "D", "v", "P", "X", "<", "*", ">", "p")
DASHES = ("-", "--", "-.", ":")  # with 11 markers that makes 44 different lines
DASHED: dict[str, Any] = {"color": INK, "lw": 1, "ls": (0, (4, 3))}  # where a step is marked
MARKED = 8  # places at which a line has its marker

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 4,  # two periods of the longest dashes
    "lines.markersize": 7,
    "svg.hashsalt": "the same names in every file",
    "text.parse_math": False,  # a $ in a name is a $
}
DEFAULTS: dict[Any, Any] = dict(matplotlib.rcParamsDefault)
del DEFAULTS["backend"]  # of windows, which nothing here opens
FORMATS = (".png", ".pdf", ".svg")
# a figure that is drawn twice is the same file
UNDATED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Around all that draws and saves, also as a decorator: matplotlib's defaults and `STYLE` alone."""
    with matplotlib.rc_context(DEFAULTS | STYLE):
        yield


def check_name(target: str) -> None:
    """Refuses, as a UsageError, a name that no figure can have."""
    if Path(target).suffix not in FORMATS:
        raise UsageError(f"the figure is {target}, but must end in .png, .pdf or .svg: give another name")


def save(figure: Figure, path: str | Path, **how: Any) -> None:
    """Writes a figure in the format that its name ends in."""
    figure.savefig(path, dpi=160, metadata=UNDATED.get(Path(path).suffix.lower()), **how)


@dataclass(frozen=True)
class Look:
    """How one of several things is drawn. Its dashes and marker are no other's: colours are not needed."""

    colour: str
    dashes: str
    marker: str  # "" for none
    shift: float = 0.0
    """where between two places the first marker is, 0 to 1, so that those of several lines lie apart"""

    @property
    def line(self) -> dict[str, Any]:
        """As `plot_broken` is given it."""
        line = {"color": self.colour, "ls": self.dashes, "marker": self.marker, "shift": self.shift}
        edge = {"mec": "white", "mew": 0.7}  # or a marker would vanish in its own line
        return line | edge

    @property
    def point(self) -> dict[str, Any]:
        """As what draws points is given it."""
        return {"color": self.colour, "marker": self.marker or "o"}


def look(number: int) -> Look:
    """That of the arm, or of whatever is drawn, with this number from 0."""
    return Look(
        colour=COLOURS[number % len(COLOURS)],
        dashes=DASHES[number % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        shift=number * 0.618 % 1,  # the golden ratio: they are spread evenly, however many there are
    )


def plot_broken(
    ax: Axes, x: np.ndarray, y: np.ndarray, marker: str = "", shift: float = 0.0, **style: Any
) -> None:
    """A line with gaps where `y` (B,) is NaN, dots between two gaps, and markers at about `MARKED` places."""
    gaps = np.pad(np.isnan(y), 1, constant_values=True)
    alone = ~gaps[1:-1] & gaps[:-2] & gaps[2:]
    marked = set(np.flatnonzero(alone).tolist())
    if marker:
        present = np.flatnonzero(~np.isnan(y))
        apart = max(1, len(present) // MARKED)
        marked.update(present[int(shift * apart) :: apart].tolist())
    shape = marker or "."
    ax.plot(x, y, marker=shape if marked else "", markevery=sorted(marked), **style)
