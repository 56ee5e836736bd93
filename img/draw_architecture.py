"""Draws the network before and after an injection: python img/draw_architecture.py"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.canvas import INK, Axes, Circle, FancyArrowPatch, FancyBboxPatch, Figure, drawing, save

Point = tuple[float, float]
Style = str | tuple[float, tuple[float, ...]]  # a name, or (offset, (on, off, ...))
# As greys they differ, too
TRAINED = "#fbc48a"
FROZEN = "#79a5d2"
ABSENT = "#efefef"
RADIUS = 0.26  # of the sum


def box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, ink: str = INK
) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec=INK, lw=1.1
        )
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, linespacing=1.35)


def arrow(ax: Axes, start: Point, end: Point, style: Style = "-") -> None:
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, lw=1.2, ls=style, color=INK, shrinkA=0, shrinkB=0
        )
    )


def network(ax: Axes, y: float, title: str, heads: list[tuple[str, str, str]]) -> None:
    """One row: observation → encoder → heads → Q; heads are (label, colour, sign) from top to bottom."""
    ax.text(0, y + 2.05, title, fontsize=12, fontweight="bold", va="center")
    box(ax, 0, y - 0.55, 1.45, 1.1, "4 frames\n84 × 84\nuint8", "white")
    layers = ("encoder φ", "conv 32, 8×8, stride 4", "conv 64, 4×4, stride 2", "conv 64, 3×3, stride 1")
    box(ax, 2.05, y - 0.85, 2.95, 1.7, "\n".join(layers), TRAINED)
    arrow(ax, (1.45, y), (2.05, y))
    ax.text(5.38, y + 0.15, "3136", ha="center", fontsize=8.5)
    ax.plot([5.0, 5.7], [y, y], color=INK, lw=1.2)
    ax.add_patch(Circle((9.75, y), RADIUS, fc="white", ec=INK, lw=1.1))
    ax.text(9.75, y, "Σ", ha="center", va="center", fontsize=12)
    for (label, colour, sign), above in zip(heads, (1.25, 0, -1.25), strict=True):
        live = colour != ABSENT
        head_y = y + above
        box(ax, 6.1, head_y - 0.45, 2.6, 0.9, label, colour, INK if live else "#9a9a9a")
        style: Style = "-" if live else (0, (3, 3))
        ax.plot([5.7, 5.7], [y, head_y], color=INK, lw=1.2, ls=style)
        arrow(ax, (5.7, head_y), (6.1, head_y), style)
        if not live:
            continue
        ax.text(9.0, head_y + 0.17, sign, ha="center", fontsize=13)
        if above == 0:
            arrow(ax, (8.7, y), (9.75 - RADIUS, y))
        else:
            ax.plot([8.7, 9.75], [head_y, head_y], color=INK, lw=1.2)
            arrow(ax, (9.75, head_y), (9.75, y + math.copysign(RADIUS, above)))
    arrow(ax, (10.01, y), (10.5, y))
    box(ax, 10.5, y - 0.4, 1.3, 0.8, "Q(s, ·)", "white")


@drawing()
def main() -> None:
    figure = Figure(figsize=(9.4, 7.0))
    ax = figure.subplots()
    layers = "linear 512, linear |A|"
    network(
        ax,
        4.9,
        "before the injection:  Q = θ(φ)",
        [
            (f"head θ\n{layers}", TRAINED, "+"),
            ("θ′₁: not in use yet", ABSENT, ""),
            ("θ′₂: not in use yet", ABSENT, ""),
        ],
    )
    network(
        ax,
        0,
        "after it:  Q = θ(φ) + (θ′₁(φ) − θ′₂(φ)),  and θ′₁ = θ′₂ at that instant",
        [
            (f"head θ\n{layers}", FROZEN, "+"),
            (f"fresh head θ′₁\n{layers}", TRAINED, "+"),
            (f"frozen twin θ′₂\n{layers}", FROZEN, "−"),
        ],
    )
    for x, colour, text in (
        (0.0, TRAINED, "trained"),
        (1.7, FROZEN, "frozen, still passes gradient to φ"),
        (6.6, ABSENT, "dashed: not in use yet, not evaluated"),
    ):
        ax.add_patch(
            FancyBboxPatch(
                (x, -2.5), 0.32, 0.32, boxstyle="round,pad=0,rounding_size=0.06", fc=colour, ec=INK, lw=1
            )
        )
        ax.text(x + 0.45, -2.34, text, va="center")
    ax.set(xlim=(-0.15, 11.95), ylim=(-2.7, 7.3), aspect="equal")
    ax.axis("off")
    save(figure, Path(__file__).with_name("architecture.png"), bbox_inches="tight")


if __name__ == "__main__":
    main()
