"""Reads a folder's files as far as they can be read, and keeps a note on what cannot."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import yaml

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"  # as read from a file


class FileRecord(TypedDict):
    """A file as its stage left it: size and SHA-256 (hex)."""

    bytes: int
    sha256: str


def digest(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value; the order of keys does not matter, that of lists does."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a folder; the kernel frees the lock of a process that dies.

    Not to be nested: a second lock of one process on one folder waits for itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def locked_if_free(folder: Path) -> Iterator[bool]:
    """Lock a folder that is there, where nobody works on it; yield whether it is locked."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is complete or absent, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write that fails names no file by itself
        raise


def drop_temporaries(folder: Path) -> None:
    """Delete what `write_text` left of files that it was killed in; nobody may write into the folder meanwhile."""
    for path in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name) and path.is_file():
            path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; NaN is refused, since it does not survive other readers."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Return the text of an indented JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file; a truncated one is a ValueError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); delete it and run the same command again") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_text(path, to_jsonl(rows))


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> Iterator[Any]:
    """Read one JSON object a line; a broken line is a ValueError that names file and line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error


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


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping from a file that others wrote as it is, and anything else as an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def strings(value: Any) -> list[str]:
    """Return a list of texts from a file that others wrote, and anything else as an empty one."""
    return [str(item) for item in value] if isinstance(value, list | tuple) else []


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else that a file may hold."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def bounds(value: Any) -> tuple[float, float] | None:
    """Return the two ends of an interval, or None where there is none."""
    ends = [number(end) for end in value] if isinstance(value, list | tuple) else []
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None
