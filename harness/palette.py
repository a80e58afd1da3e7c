"""How an arm looks: one name, colour, marker and line style, the same in every figure, table and page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harness.arms import ARMS
from harness.untrusted import one_line

BASE = "sft"
# The page's own colours in figure files; in a page each becomes the CSS variable of this name, which has a dark form.
INK, MUTED, LINE, PAPER = "#1f2328", "#59636e", "#c8d1da", "#ffffff"
THEME = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "card"}


@dataclass(frozen=True)
class Look:
    """An arm's looks.

    Attributes:
        title: its name in prose.
        key: name of its CSS colour variable, `--arm-KEY`.
        light, dark: its colour on white and on black paper.
        marker, dash: matplotlib's marker and line style.
        glyph: the same marker as a character, for headings and Markdown.
    """

    title: str
    key: str
    light: str
    dark: str
    marker: str
    dash: str
    glyph: str


# Okabe and Ito's colour-blind-safe palette (2008); `light` is darkened where needed to 3:1 on white, `dark` lightened.
_COLOURS = {
    "blue": ("#0072b2", "#56b4e9"),
    "vermillion": ("#c2410c", "#f08a4b"),
    "green": ("#00795a", "#3cc9a0"),
    "purple": ("#a8528a", "#d993bf"),
    "ochre": ("#946300", "#e6b23c"),
    "teal": ("#007c89", "#4dc4d0"),
    "olive": ("#6b7300", "#c3cc4f"),
    "brown": ("#8a4b2a", "#d39a7a"),
    "grey": ("#5a636c", "#a3adb8"),
}
_SHAPES = {"o": "●", "s": "■", "^": "▲", "v": "▼", "P": "✚", "D": "◆", "<": "◀", ">": "▶", "X": "✖", "p": "⬟", "h": "⬢"}
_FIXED = {
    "simpo": ("blue", "o", "solid"),
    "dpo": ("vermillion", "s", "dashed"),
    "dpo_norm": ("green", "^", "dashdot"),
    "dpo_margin": ("brown", "<", "dashed"),
    "dpo_norm_margin": ("olive", ">", "dashdot"),
    "simpo_no_margin": ("teal", "X", "solid"),
    "simpo_sum": ("purple", "p", "solid"),
    "simpo_sum_no_margin": ("ochre", "h", "dotted"),
    BASE: ("grey", "D", "dotted"),
}
_SPARE = (("purple", "v", "solid"), ("ochre", "P", "dashed"))


def title(arm: str) -> str:
    """Return an arm's name in prose; one that the table of arms does not know keeps its own."""
    return ARMS[arm].title if arm in ARMS else one_line(arm, 60)


def looks(arms: Iterable[str]) -> Mapping[str, Look]:
    """Give every arm its looks; arms unknown to the table take the spare ones in the order of their names."""
    names = sorted(set(arms) | {BASE})
    unknown = [arm for arm in names if arm not in _FIXED]
    spare = {arm: _SPARE[number % len(_SPARE)] for number, arm in enumerate(unknown)}
    result = {}
    for number, arm in enumerate(names):
        colour, marker, dash = _FIXED.get(arm) or spare[arm]
        light, dark = _COLOURS[colour]
        key = arm.replace("_", "-") if arm in _FIXED else f"other-{number}"
        result[arm] = Look(title(arm), key, light, dark, marker, dash, _SHAPES[marker])
    return result
