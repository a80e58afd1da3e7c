"""Reads a folder's files as far as they can be read, and keeps a note on what cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from harness.records import read_json, read_jsonl


class Reader:
    """What is read of one folder.

    Attributes:
        problems: what could not be read, one sentence each.
    """

    def __init__(self, study: Path) -> None:
        self.study = study
        self.problems: list[str] = []

    def note(self, path: Path, error: object) -> None:
        """Add a problem."""
        where = path.relative_to(self.study)
        self.problems.append(f"{where} cannot be read: {str(error).removeprefix(f'{path}: ')}")

    def mapping(self, path: Path) -> dict[str, Any]:
        """Read a JSON or YAML file that holds a mapping; empty where it is absent or broken."""
        if not path.exists():
            return {}
        try:
            value = read_json(path) if path.suffix == ".json" else yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.note(path, error)
            return {}
        if isinstance(value, dict):
            return _writable(value)
        self.note(path, f"a mapping is expected, not {type(value).__name__}")
        return {}

    def rows(self, path: Path) -> list[dict[str, Any]]:
        """Read a JSONL file up to its first broken line."""
        rows: list[dict[str, Any]] = []
        if not path.exists():
            return rows
        try:
            for row in read_jsonl(path):
                if not isinstance(row, dict):
                    raise ValueError(f"row {len(rows) + 1} is not a mapping")
                rows.append(_writable(row))
        except (OSError, ValueError) as error:
            self.note(path, f"{error}; the {len(rows)} rows before it are shown")
        return rows


def _writable(value: Any) -> Any:
    """Return a JSON value with lone surrogates as escapes: JSON allows them, UTF-8 (and so pandas) does not."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_writable(key): _writable(item) for key, item in value.items()}
    return [_writable(item) for item in value] if isinstance(value, list) else value
