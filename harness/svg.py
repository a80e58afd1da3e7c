"""matplotlib's SVG made fit for a page: described for those who cannot see it, and coloured by the page's theme."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_COLOUR = re.compile("#[0-9a-f]{6}")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        name: the file's name without `.svg`.
        title: what it shows, in a few words.
        description: its content with the numbers, for those who do not see it.
        caption: how to read it.
        svg: the file's text.
        wide: takes the page's width; others stand beside each other.
    """

    name: str
    title: str
    description: str
    caption: str
    svg: str
    wide: bool

    def _repr_svg_(self) -> str:
        """Show the figure in a notebook."""
        return self.svg


def describe(raw: str, *, name: str, title: str, description: str) -> str:
    """Return a figure file: with title and description, without metadata, its ids prefixed with the figure's name.

    Several such figures can stand in one page, since no id occurs twice.
    """
    root = ET.fromstring(raw)
    _drop(root, "metadata")
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.attrib['id']}")
        for key, value in element.attrib.items():
            if key == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))
    for number, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(number, element)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode") + "\n"


def inline(figure: str, colours: Mapping[str, str]) -> Markup:
    """Return a described figure for use inside a page.

    Args:
        figure: what `describe` returned.
        colours: {colour in the figure: name of the CSS variable that takes its place}.
    """
    root = ET.fromstring(figure)
    _drop(root, "style")  # it would style the whole page
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


def _drop(root: ET.Element, tag: str) -> None:
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag == f"{{{_SVG}}}{tag}"]:
            parent.remove(child)
