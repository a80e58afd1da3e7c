"""Files on disk: atomic writes, hashes, seals, locks, and a tolerant reader of folders that may be damaged."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import yaml

SEAL = "sha256"
_State: TypeAlias = tuple[Path, int, int, int, int]

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"  # as read from a file


class FileRecord(TypedDict):
    """A file as its stage left it: size and SHA-256 (hex)."""

    bytes: int
    sha256: str


def digest(value: object) -> str:
    """Return the SHA-256 (hex) of a JSON value; the order of keys does not matter, that of lists does."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with its seal as the last item: the hash of all other items, so that a later change shows."""
    parts = unsealed(content)
    return parts | {SEAL: digest(parts)}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Return whether the seal of a mapping holds; False where it has none."""
    return content.get(SEAL) == digest(unsealed(content))


def is_broken(content: Mapping[str, Any]) -> bool:
    """Return whether a mapping has a seal that does not hold: it was changed after it was written."""
    return SEAL in content and not is_sealed(content)


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping without its seal."""
    return {key: value for key, value in content.items() if key != SEAL}


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
    """Lock an existing folder unless another process holds its lock; yield whether it is locked now."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write_text(path: Path, text: str) -> FileRecord:
    """Write a text file atomically and durably: it is complete or absent, even after a crash of the machine.

    A lone surrogate, which UTF-8 cannot hold, is written as its escape. Raises the audit event `harness.write`.

    Raises:
        OSError: with the file's name, where it cannot be written.
    """
    sys.audit("harness.write", str(path))
    content = _encoded(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # the system's error names no file
        raise
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def drop_temporaries(folder: Path) -> None:
    """Delete the temporary files of killed `write_text` calls; no process may write into the folder meanwhile."""
    for path in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name) and path.is_file():
            path.unlink()


def write_json(path: Path, value: object) -> FileRecord:
    """Write indented JSON; NaN is refused, since other readers do not accept it."""
    return write_text(path, to_json(value))


def to_json(value: object) -> str:
    """Return the text of an indented JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


class FileCache:
    """Contents and hashes of files: each state of a file (inode, size, times) is read once.

    The driver of a command makes one and passes it down.

    Args:
        max_bytes: of contents that are kept, those that were used last; a file above a quarter is hashed as a stream.
    """

    def __init__(self, max_bytes: int = 64 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._contents: OrderedDict[_State, bytes] = OrderedDict()
        self._hashes: dict[_State, str] = {}

    def content(self, path: Path) -> bytes:
        """Return the bytes of a file."""
        state = _state(path)
        if state not in self._contents:
            self._keep(state, path.read_bytes())
        self._contents.move_to_end(state)
        return self._contents[state]

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 (hex) of a file."""
        state = _state(path)
        if state not in self._hashes:
            is_small = path.stat().st_size <= self._max_bytes // 4
            found = hashlib.sha256(self.content(path)).hexdigest() if is_small else file_sha256(path)
            self._hashes[state] = found
        return self._hashes[state]

    def write_text(self, path: Path, text: str) -> FileRecord:
        """Write a file as `write_text` does, and keep its content."""
        record, state = write_text(path, text), _state(path)
        self._hashes[state] = record["sha256"]
        self._keep(state, _encoded(text))
        return record

    def _keep(self, state: _State, content: bytes) -> None:
        self._contents[state] = content
        while sum(map(len, self._contents.values())) > self._max_bytes and len(self._contents) > 1:
            self._contents.popitem(last=False)


def _state(path: Path) -> _State:
    about = path.stat()
    return path, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return a sealed mapping without its seal; None where the file is absent, damaged or was changed."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return unsealed(found) if isinstance(found, dict) and is_sealed(found) else None


def read_json(path: Path, files: FileCache | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        files: cache of this process; None reads the file anew.

    Raises:
        ValueError: with the file's name, where it is truncated or damaged.
    """
    try:
        return json.loads((files.content(path) if files else path.read_bytes()).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); delete it and run the same command again") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> FileRecord:
    """Write one JSON object per line."""
    return write_text(path, to_jsonl(rows))


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_jsonl(path: Path, files: FileCache | None = None) -> Iterator[Any]:
    """Yield the JSON value of each line; `files` as in `read_json`.

    Raises:
        ValueError: with file and line, at a broken line.
    """
    with io.StringIO(files.content(path).decode()) if files else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error


class Reader:
    """Reads the files of one folder as far as possible.

    Attributes:
        problems: one sentence per file that could not be read.
    """

    def __init__(self, study: Path, files: FileCache | None = None) -> None:
        self.study, self.files = study, files
        self.problems: list[str] = []

    def note(self, path: Path, error: Exception | str) -> None:
        """Add a problem."""
        where = path.relative_to(self.study)
        self.problems.append(f"{where} cannot be read: {str(error).removeprefix(f'{path}: ')}")

    def mapping(self, path: Path) -> dict[str, Any]:
        """Read a JSON or YAML file that holds a mapping; empty where it is absent or broken."""
        if not path.exists():
            return {}
        try:
            value = (
                read_json(path, self.files)
                if path.suffix == ".json"
                else yaml.safe_load(path.read_text(encoding="utf-8"))
            )
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.note(path, error)
            return {}
        if isinstance(value, dict):
            return _without_surrogates(value)
        self.note(path, f"a mapping is expected, not {type(value).__name__}")
        return {}

    def rows(self, path: Path) -> list[dict[str, Any]]:
        """Read a JSONL file up to its first broken line."""
        rows: list[dict[str, Any]] = []
        if not path.exists():
            return rows
        try:
            for row in read_jsonl(path, self.files):
                if not isinstance(row, dict):
                    raise ValueError(f"row {len(rows) + 1} is not a mapping")
                rows.append(_without_surrogates(row))
        except (OSError, ValueError) as error:
            self.note(path, f"{error}; the {len(rows)} rows before it are shown")
        return rows


def _without_surrogates(value: Any) -> Any:
    """Return a JSON value with lone surrogates as escapes: JSON allows them, UTF-8 (and so pandas) does not."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


def mapping(value: object) -> dict[str, Any]:
    """Return a mapping from an untrusted file unchanged, and any other value as an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def strings(value: Json) -> list[str]:
    """Return a list from an untrusted file as texts, and any other value as an empty list."""
    return [str(item) for item in value] if isinstance(value, list | tuple) else []


def number(value: object) -> float | None:
    """Return a finite number from an untrusted file, and None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def bounds(value: Json) -> tuple[float, float] | None:
    """Return the two ends of an interval from an untrusted file, and None for any other value."""
    ends = [number(end) for end in value] if isinstance(value, list | tuple) else []
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None
