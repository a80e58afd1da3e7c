"""Untrusted text: secrets of the environment redacted, hidden characters shown, HTML and Markdown escaped."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup, escape

_NAMES = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL|JWT", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")  # http://user:password@host
MIN_LENGTH = 8  # a shorter value (TOKENIZERS_PARALLELISM=false) is no secret, but a word that messages are made of


def redact(text: object, *names: str) -> str:
    """Return the text with `***` in place of each secret: values of environment variables with a secret's name.

    Args:
        text: what is to be written; a secret that is cut in two (by a line break, or two writes) is not found.
        names: variables that hold a secret whatever they are called.
    """
    shown = str(text)
    for value in _secrets(names):
        shown = shown.replace(value, "***")
    return _IN_ADDRESS.sub(r"\1***@", shown)


def _secrets(names: tuple[str, ...]) -> list[str]:
    """Return the values, longest first: one may be a part of another."""
    found = {os.environ[name] for name in names if os.environ.get(name)}
    for name, value in os.environ.items():
        # A folder or a file (SSH_KEY_FILE) is where a secret is, and no secret.
        if len(value) >= MIN_LENGTH and _NAMES.search(name) and not _is_path(value):
            found.add(value)
    return sorted(found, key=len, reverse=True)


def _is_path(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # too long for a name, or no name at all
        return False


# Controls (all but tab and newline), soft hyphen, zero-width space, bidirectional marks, embeddings, overrides and
# isolates, line and paragraph separators, invisible operators, byte-order mark, lone surrogates, non-characters, tags.
# U+200C and U+200D stay: Persian, Hindi and emoji are spelt with them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff"
    "\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e0fff]"
)
# What Markdown, GitHub's extensions (tables, autolinks, mentions, math, emoji codes) and HTML give a meaning to; the
# rest of the punctuation has one at the start of a line only, or next to these.
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|~$#&@]|:(?=[/a-z+_])|(?<=www)\.|^[-+=](?=[\s=-]|$)", re.IGNORECASE)
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;", ":": "&#58;", "|": "&#124;", "$": "&#36;"}


def code_point(character: str) -> str:
    """Return a character's escape: `\\x1b`, `\\u202e` or `\\U000e0041`."""
    number = ord(character)
    width, letter = (2, "x") if number < 0x100 else (4, "u") if number < 0x10000 else (8, "U")
    return f"\\{letter}{number:0{width}x}"


def visible(text: object, show: Callable[[str], str] = lambda code: code) -> str:
    """Return the text with each hidden character replaced by `show(its escape)`; a Windows line end is a line end."""
    return _HIDDEN.sub(lambda match: show(code_point(match[0])), str(text).replace("\r\n", "\n"))


def one_line(text: object, limit: int = 300) -> str:
    """Return visible text without line breaks, cut at `limit` characters: for labels and table cells."""
    flat = " ".join(visible(cut(str(text).strip(), limit)).split())
    note = cut_note(str(text).strip(), limit)
    return f"{flat}… ({note})" if note else flat


def cut(text: str, limit: int) -> str:
    """Return at most `limit` characters."""
    return text[:limit]


def cut_note(text: str, limit: int) -> str:
    """Return a note on the characters that `cut` removes; empty where it removes none."""
    return f"cut: {limit:,} of {len(text):,} characters shown" if len(text) > limit else ""


def html(text: object, limit: int = 2000) -> Markup:
    """Return harmless HTML: escaped, direction isolated, hidden characters shown as escapes.

    The escapes stand in `<span class="escape">`, so that they differ from a text that holds a backslash.
    """
    whole = str(text)
    pieces = []
    last = 0
    shown = cut(whole, limit).replace("\r\n", "\n")
    for match in _HIDDEN.finditer(shown):
        pieces += [
            escape(shown[last : match.start()]),
            Markup('<span class="escape">{}</span>').format(code_point(match[0])),
        ]
        last = match.end()
    pieces.append(escape(shown[last:]))
    note = cut_note(whole, limit)
    tail = Markup('<span class="cut">… {}</span>').format(note) if note else Markup("")
    return Markup("<bdi>{}</bdi>{}").format(Markup("").join(pieces), tail)


def markdown(text: object, limit: int = 300) -> Markup:
    """Return the text as one line of Markdown without markup: for prose and table cells.

    It is `Markup` so that an autoescaping template does not escape it a second time.
    """
    flat = one_line(text, limit)
    return Markup(_MARKDOWN.sub(lambda match: _ENTITIES.get(match[0], "\\" + match[0]), flat))


def fence(text: object, limit: int = 2000) -> Markup:
    """Return a fenced Markdown block, with a fence longer than any run of backticks inside: for whole answers."""
    whole = str(text)
    shown = visible(cut(whole, limit))
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    ticks = "`" * max(3, longest + 1)
    note = cut_note(whole, limit)
    return Markup(f"{ticks}text\n{shown}\n{ticks}" + (f"\n\n({note})" if note else ""))
