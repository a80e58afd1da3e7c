"""Path or Hub reference -> a `Source`: unchanged rows with their numbers, and a SHA-256.

Reads JSONL, JSON, Parquet and CSV files, folders (also those of `save_to_disk`), and Hub data sets. A source of which
a part would stay unread (a split, a shard, a file of another kind) is a `UsageError` that names the part.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.data.records import BadRow
from harness.study.errors import UnreachableError, UsageError
from harness.study.files import Json

ALLOWED = "a .jsonl, .json, .parquet or .csv file (or one of them .gz), a folder, or a Hub data set owner/name[:split]"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<kind>\..*)?")
# Files that stand beside data and hold none: cards, licences, and what `datasets` notes for itself.
_NO_DATA = re.compile(
    r"(?i)(readme|license|licence|citation|notice|changelog)([._-].*)?|.*\.(md|rst|ya?ml|lock|sha256|py)"
)
_NOTES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_EVALUATES = re.compile(r"(test|dev|val|valid|validation|eval|evaluation)(_\w+)?")
_SHOWN_FILES = 5  # files that a message names
# The first key of a turn, written as JSON or, by pandas, as Python; the other key must follow.
_TURN_CELL = re.compile(r"\s*\[?\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
_OTHER_KEY = {"role": "content", "content": "role", "from": "value", "value": "from"}


@dataclass(frozen=True)
class Source:
    """The rows of one file or data set.

    Attributes:
        path: as the user wrote it.
        sha256: of the file's bytes; of the rows for a folder or a Hub data set.
        rows: number (counted from 1; the line where the file has lines) and columns of each row that could be read.
        bad_rows: those that could not.
        from_hub: the rows were downloaded.
    """

    path: str
    sha256: str
    rows: tuple[tuple[int, dict[str, Any]], ...]
    bad_rows: tuple[BadRow, ...]
    from_hub: bool = False

    @property
    def count(self) -> int:
        """Number of rows, those that could not be read included."""
        return len(self.rows) + len(self.bad_rows)

    @property
    def columns(self) -> frozenset[str]:
        """Names of all columns that any row has."""
        return frozenset(name for _, row in self.rows for name in row)


def read_source(reference: str, *, key: str, revision: str | None = None) -> Source:
    """Read all rows of a file, a folder or a Hub data set.

    Args:
        reference: a path, or `owner/name[:split]`; a split may be an expression that `datasets` knows (`train[:10%]`).
        key: the config key, for messages (`data.train`).
        revision: of a Hub data set.

    Raises:
        UsageError: where there is nothing of that name, or it cannot be read at all.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        _refuse_shard(reference, path, key)
        return _read_file(reference, path, key)
    folder, _, split = (reference, "", "") if path.is_dir() else reference.partition(":")
    is_folder = Path(folder).expanduser().is_dir()
    if not is_folder and (_file_kind(path) in _READERS or reference.startswith((".", "/", "~"))):
        raise UsageError(f"{key}={reference}: no such file; allowed: {ALLOWED}")
    if not is_folder and not _HUB_NAME.fullmatch(folder):
        raise UsageError(f"{key}={reference}: neither a file nor a Hub name; allowed: {ALLOWED}")
    name = str(Path(folder).expanduser()) if is_folder else folder
    if is_folder:
        _refuse_missing_shards(Path(name), key)
    rows = _load_dataset(name, split, key=key, revision=revision)
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return Source(reference, hasher.hexdigest(), tuple(enumerate(rows, start=1)), (), from_hub=not is_folder)


def _file_kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])


def _read_file(reference: str, path: Path, key: str) -> Source:
    kind = _file_kind(path)
    if kind not in _READERS:
        raise UsageError(
            f"{key}={reference}: files of kind {path.suffix or 'without suffix'} are not read; allowed: {ALLOWED}"
        )
    try:
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
        rows, bad_rows = [], []
        for number, row in _READERS[kind](content):
            if isinstance(row, str):
                bad_rows.append(BadRow(reference, number, row))
            else:
                rows.append((number, row))
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error) as error:
        raise UsageError(
            f"{key}={reference}: cannot be read as {kind[1:]} ({error}); write it again, or repair it where that says"
        ) from error
    return Source(reference, sha256, tuple(rows), tuple(bad_rows))


# Number of each row, and its columns, or the reason why it cannot be read.
NumberedRows = Iterator[tuple[int, dict[str, Json] | str]]


def _read_jsonl(content: bytes) -> NumberedRows:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, _json_row(line)


def _json_row(line: bytes) -> dict[str, Json] | str:
    try:
        row = json.loads(line.decode(), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start + 1} of the line)"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at character {error.pos + 1} of the line)"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else f"a JSON {type(row).__name__}; allowed: one object a line"


def _unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("an object has one key twice")
    return row


def _read_json(content: bytes) -> NumberedRows:
    """Read an array of rows, an object of columns, or one object per line, as many files called .json hold."""
    if not content.strip():
        return
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _read_jsonl(content)
        return
    for number, row in enumerate(value if isinstance(value, list) else _columns_to_rows(value), start=1):
        yield number, row if isinstance(row, dict) else f"a JSON {type(row).__name__}; allowed: an object"


def _columns_to_rows(value: Json) -> list[dict[str, Json]]:
    columns = value if isinstance(value, dict) else {}
    # pandas writes {"column": {"0": cell, "1": cell}}
    lists = {name: list(cells.values()) if isinstance(cells, dict) else cells for name, cells in columns.items()}
    if (
        not all(isinstance(cells, list) for cells in lists.values())
        or len({len(cells) for cells in lists.values()}) != 1
    ):
        raise ValueError("neither an array of rows nor an object of columns of one length")
    return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]


def _read_parquet(content: bytes) -> NumberedRows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
    yield from enumerate(rows, start=1)


def _read_csv(content: bytes) -> NumberedRows:
    """Read all cells as text, so that an answer such as `12`, `NA` or `null` stays unchanged."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        header = next(lines, [])
        start = lines.line_num + 1
        for cells in lines:
            if cells:
                yield start, _csv_row(header, cells)
            start = lines.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Json] | str:
    if len(cells) != len(header):
        return f"{len(cells)} cells under {len(header)} columns; is a comma or a quotation mark missing?"
    row: dict[str, Json] = {}
    for name, cell in zip(header, cells, strict=True):
        try:
            is_json = name == "checks" or _holds_turns(cell)
            row[name] = None if cell == "" else json.loads(cell) if is_json else cell
        except ValueError as error:
            return f"`{name}` looks like turns or checks and is not JSON ({error}); write such cells with json.dumps"
    return row


def _holds_turns(cell: str) -> bool:
    match = _TURN_CELL.match(cell)
    return match is not None and re.search(rf"['\"]{_OTHER_KEY[match[1]]}['\"]\s*:", cell) is not None


_READERS: dict[str, Callable[[bytes], NumberedRows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _refuse_shard(reference: str, path: Path, key: str) -> None:
    """Refuse one file of several that belong together."""
    found = _SHARD.fullmatch(path.name)
    if found and int(found["count"]) > 1:
        raise UsageError(
            f"{key}={reference}: is one of {int(found['count'])} files that belong together; give their folder "
            f"({path.parent}), or write them as one file"
        )


def _refuse_missing_shards(folder: Path, key: str) -> None:
    """Refuse a folder that lacks some of the files that belong together."""
    sets: dict[tuple[Path, str, str], set[int]] = {}
    for path in _files_in(folder, key):
        if found := _SHARD.fullmatch(path.name):
            sets.setdefault((path.parent, found["name"], found["count"]), set()).add(int(found["number"]))
    for (parent, name, count), numbers in sets.items():
        missing = sorted(set(range(int(count))) - numbers)
        if missing:
            shown = ", ".join(f"{name}-{number:05}-of-{count}" for number in missing[:_SHOWN_FILES])
            raise UsageError(f"{key}={folder}: {len(missing)} of {int(count)} files are missing in {parent} ({shown})")


def _refuse_unread_files(folder: Path, read: set[Path], key: str) -> None:
    """Refuse a folder with files that are not among those which were read."""
    unread = [
        path.relative_to(folder)
        for path in _files_in(folder, key)
        if path.resolve() not in read and not _is_beside_data(path.relative_to(folder))
    ]
    if unread:
        shown = ", ".join(map(str, unread[:_SHOWN_FILES])) + (", ..." if len(unread) > _SHOWN_FILES else "")
        raise UsageError(
            f"{key}={folder}: {len(unread)} of its files would not be read ({shown}); move them out, give one file, or "
            "name all files and their splits in README.md (`configs` of datasets)"
        )


def _files_in(folder: Path, key: str) -> list[Path]:
    """Return all files below a folder, links that lead nowhere included; a folder that cannot be read is refused."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"{key}={folder}: {error.filename} cannot be read ({error.strerror}); make it readable")

    found = os.walk(folder, onerror=refuse, followlinks=True)
    return sorted(Path(parent, name) for parent, _, names in found for name in names)


def _is_beside_data(path: Path) -> bool:
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    return hidden or path.name in _NOTES or _NO_DATA.fullmatch(path.name) is not None


def _load_dataset(name: str, split: str, *, key: str, revision: str | None) -> list[dict[str, Json]]:
    """Load one split of a folder or a Hub data set; `datasets` runs no code of the data set."""
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    folder = Path(name)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            data = _load_saved(folder, split, key)
        else:
            data = _load_files(name, split, key, revision)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, UsageError):
            raise
        is_local = folder.exists()
        raise (UsageError if is_local else UnreachableError)(
            f"{key}={name}{':' if split else ''}{split}: cannot be loaded with datasets ({error}); check the name, the "
            "split, data.revision and the connection (HF_HUB_OFFLINE unset; `hf auth login` for a gated set), or "
            "download the file and give its path"
        ) from error
    if isinstance(data, Dataset):
        return list(data)
    others = [name for name in data if name != "train"]
    if key == "data.train" and len(others) < len(data) and all(map(_EVALUATES.fullmatch, others)):
        return list(data["train"])  # what is kept for evaluation is no part of the training data
    if len(data) > 1:
        raise UsageError(
            f"{key}={name}: has the splits {', '.join(data)}; name one, as {name}:{next(iter(data))}, or several, as "
            f"{name}:{'+'.join(list(data)[:2])}"
        )
    return list(next(iter(data.values())))


def _load_files(name: str, split: str, key: str, revision: str | None) -> Any:
    """Load a folder of data files, all of which must be read, or a Hub data set."""
    from datasets import load_dataset, load_dataset_builder

    if Path(name).is_dir():
        files = load_dataset_builder(name).config.data_files or {}
        read = {Path(path).resolve() for paths in files.values() for path in paths}
        _refuse_unread_files(Path(name), read, key)
    return load_dataset(name, split=split or None, revision=revision)


def _load_saved(folder: Path, split: str, key: str) -> Any:
    """Load what `save_to_disk` wrote: a data set, or one for each split."""
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    data = load_from_disk(str(folder))
    splits = {folder / name: part for name, part in data.items()} if isinstance(data, DatasetDict) else {folder: data}
    read = {Path(file["filename"]).resolve() for part in splits.values() for file in part.cache_files}
    caches = {path.resolve() for path in folder.rglob("cache-*.arrow")}
    _refuse_unread_files(folder, read | caches, key)
    if not split:
        return data
    names = split.split("+")
    if not isinstance(data, DatasetDict) or not set(names) <= set(data):
        known = ", ".join(data) if isinstance(data, DatasetDict) else "none"
        raise UsageError(f"{key}={folder}:{split}: no such split; its splits: {known}")
    return concatenate_datasets([data[each] for each in names])
