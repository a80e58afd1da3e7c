"""The forest plot: the difference of every decided study with its interval, one below the other."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.figures import drawing
from harness.overview import Overview
from harness.palette import INK, LINE, MUTED, PAPER, title
from harness.svg import Drawing
from harness.untrusted import one_line
from harness.wording import confidence, interval, points

WIDE = 7.2
MAX_STUDIES = 60


def draw_forest(rows: Sequence[Overview]) -> Drawing | None:
    """Draw the studies that compare the same two arms as the newest one; None where none is decided."""
    decided = [row for row in rows if row.difference is not None and row.interval is not None and len(row.arms) > 1]
    shown = [row for row in decided if row.arms[:2] == decided[0].arms[:2]][:MAX_STUDIES]
    if not shown:
        return None
    first, second = (title(arm) for arm in shown[0].arms[:2])
    said = " ".join(f"{one_line(row.name, 60)}: {points(row.difference)}, {interval(row.interval)}." for row in shown)
    left_out = len(decided) - len(shown)
    caption = (
        f"{first} minus {second} in points: the mean difference with the interval that decides ({_levels(shown)}); "
        "hatched: the study's margin. Studies on different data are not repetitions of each other."
        + (f" {left_out} more have other arms, or are older." if left_out else "")
    )

    def draw(figure: Figure) -> None:
        _draw(figure.subplots(), shown, f"{first} − {second}, percentage points")

    return drawing(
        "forest", f"{first} against {second} over studies", said, caption, WIDE, 0.34 * len(shown) + 1.0, draw
    )


def _levels(rows: Sequence[Overview]) -> str:
    return ", ".join(sorted({confidence(row.alpha or 0.05) for row in rows}))


def _draw(axes: Axes, rows: Sequence[Overview], label: str) -> None:
    for place, row in enumerate(reversed(rows)):
        if row.difference is None or row.interval is None:
            continue
        if row.margin:
            low, width = -100 * row.margin, 200 * row.margin
            axes.barh(place, width, left=low, height=0.7, color=LINE, alpha=0.45, hatch="////", edgecolor=PAPER, lw=0)
        axes.plot([100 * end for end in row.interval], [place, place], color=INK, linewidth=1.6)
        axes.plot([100 * row.difference], [place], marker="D", markersize=6, color=PAPER, markeredgecolor=INK)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(rows)), [one_line(row.name, 40) for row in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(label)
