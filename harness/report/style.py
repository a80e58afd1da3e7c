"""Names and looks: an arm's name, colour, marker and line style, a scorer's title, and the SVG text of figures.

The same in every figure, table and page.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from harness.config.arms import BASE, title
from harness.score.scorers import titles

PREFERENCE = "preference_accuracy"
DEFINITIONS = {f"{PREFERENCE}_sum": "DPO's reward", f"{PREFERENCE}_mean": "SimPO's reward"}
SCORERS = titles()

# The page's own colours in figure files; in a page each becomes the CSS variable of this name, which has a dark form.
INK, MUTED, LINE, PAPER = "#1f2328", "#59636e", "#c8d1da", "#ffffff"
THEME = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "card"}


@dataclass(frozen=True)
class Look:
    """An arm's looks.

    Attributes:
        title: name in prose.
        key: suffix of the CSS colour variable, `--arm-KEY`.
        light, dark: colour on white and on black paper.
        marker, dash: matplotlib's marker and line style.
        glyph: the marker as a character, for headings and Markdown.
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


def looks(arms: Iterable[str]) -> Mapping[str, Look]:
    """Return the looks of arms and of the base; unknown arms take the spare ones in the order of their names."""
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


_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_COLOUR = re.compile("#[0-9a-f]{6}")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        name: file name without `.svg`.
        title: content in a few words.
        alt_text: content with its numbers, for readers who do not see the figure.
        caption: how to read it.
        svg: text of the file.
        wide: True for a figure of the page's width; others are placed side by side.
    """

    name: str
    title: str
    alt_text: str
    caption: str
    svg: str
    wide: bool

    def _repr_svg_(self) -> str:
        """Show the figure in a notebook."""
        return self.svg


def with_alt_text(raw: str, *, name: str, title: str, alt_text: str) -> str:
    """Return a figure file with title and alt text, without metadata, its ids prefixed with the figure's name.

    One page can hold several such figures, since no id occurs twice.
    """
    root = ET.fromstring(raw)
    _remove_elements(root, "metadata")
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.attrib['id']}")
        for key, value in element.attrib.items():
            if key == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))
    for number, (tag, text) in enumerate((("title", title), ("desc", alt_text))):
        element = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(number, element)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode") + "\n"


def inline(figure: str, colours: Mapping[str, str]) -> Markup:
    """Return a figure for use inside a page.

    Args:
        figure: result of `with_alt_text`.
        colours: {colour in the figure: name of the CSS variable that replaces it}.
    """
    root = ET.fromstring(figure)
    _remove_elements(root, "style")  # it would style the whole page
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            themed = _COLOUR.sub(
                lambda match: f"var(--{colours[match[0]]})" if match[0] in colours else match[0], value
            )
            if key in ("fill", "stroke") and "var(" in themed:  # variables work in styles, not in attributes
                element.set("style", f"{key}: {themed};" + element.get("style", ""))
            else:
                element.set(key.rpartition("}")[2], themed)
    return Markup(ET.tostring(root, encoding="unicode"))


def _remove_elements(root: ET.Element, tag: str) -> None:
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag == f"{{{_SVG}}}{tag}"]:
            parent.remove(child)
