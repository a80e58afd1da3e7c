"""Secrets of the environment, kept out of what is written: failure.json, log.txt, the judge's errors, the terminal."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAMES = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL|JWT", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")  # http://user:password@host
MIN_LENGTH = 8  # a shorter value (TOKENIZERS_PARALLELISM=false) is no secret, but a word that messages are made of


def redact(text: object, *names: str) -> str:
    """Return the text with `***` in place of each value of the environment that is a secret by its variable's name.

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
