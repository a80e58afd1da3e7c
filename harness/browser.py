"""The completions of all prompts as data in the page, and the page's own script that searches and filters them.

The script stands in the page and is allowed by its hash alone (Content-Security-Policy); it makes elements and sets
their text, and never parses what models or data sets wrote as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from harness.palette import Look
from harness.sidebyside import Answer, SideBySide
from harness.untrusted import cut, cut_note, visible

_LIMIT = 1500  # characters of a prompt or an answer that are shown
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def page_script(path: Path) -> tuple[Markup, str]:
    """Return a script as it stands in a page, and the source expression that allows it and nothing else."""
    text = path.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"'sha256-{digest}'"


def page_data(compared: SideBySide, looks: Mapping[str, Look]) -> Markup:
    """Return the comparisons as JSON that can stand in a script element.

    `arms` has [key, glyph, title] of each policy; a row is [prompt_id, prompt, answers], and an answer [text, score,
    number or null, flags, failed checks, tokens or null], in the order of `arms`.
    """
    first = compared.comparisons[0].answers if compared.comparisons else ()
    arms = [[looks[one.arm].key, looks[one.arm].glyph, visible(looks[one.arm].title)] for one in first]
    rows = [
        [one.prompt_id, _text(one.prompt), [_answer(answer) for answer in one.answers]] for one in compared.comparisons
    ]
    return json_in_page({"arms": arms, "rows": rows})


def json_in_page(value: object) -> Markup:
    """Return JSON that can stand in a script element: it holds nothing that HTML would read."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPES))


def _answer(answer: Answer) -> list[object]:
    flags, failed = ([visible(text) for text in texts] for texts in (answer.flags, answer.failed))
    return [_text(answer.text), answer.score, answer.value, flags, failed, answer.tokens]


def _text(text: str) -> str:
    note = cut_note(text, _LIMIT)
    return visible(cut(text, _LIMIT)) + (f"… ({note})" if note else "")
