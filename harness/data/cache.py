"""A results folder's cache of large data: what one process has read and tokenised, no later one does again.

Entries are named by the contents that they depend on, the sources of this package included, and sealed. An entry that
is missing, damaged or of another version is made anew; one that cannot be written is left out.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np

from harness.config.schema import DataConfig
from harness.config.trial_id import plain
from harness.data.records import NOTHING, EvalPrompt, Given, Pair
from harness.data.splits import Splits
from harness.data.token_rows import TokenisedPairs, TokenRows, as_rows
from harness.study.files import Json, digest, file_sha256, read_sealed, seal, write_json

Kept: TypeAlias = Mapping[str, Any]  # JSON values as read from a sealed file

KEPT_FROM = 1000  # training pairs; fewer are read and tokenised in a second, and nothing is written
_SPLITS = "splits.json"
_TOKENS = "tokens.json"
_EVALUATED = ("dev_prompts", "dev_pairs", "golden_prompts", "golden_pairs")
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow", "sentencepiece", "tiktoken")


class LatePairs(Sequence[Pair]):
    """Training pairs whose number is known; their texts are read where they are asked for, and not kept.

    Args:
        count: their number.
        read: reads them.
    """

    def __init__(self, count: int, read: Callable[[], Sequence[Pair]]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self._count

    @overload
    def __getitem__(self, number: int) -> Pair: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Pair]: ...
    def __getitem__(self, number: int | slice) -> Pair | Sequence[Pair]:
        """Return one pair, or those of a slice; all are read for it."""
        return self._read()[number]

    def __iter__(self) -> Iterator[Pair]:
        """Yield the pairs, read once."""
        return iter(self._read())


class DataCache:
    """The cache of one results folder.

    Args:
        results_dir: the results folder.
    """

    def __init__(self, results_dir: str) -> None:
        self._folder = Path(results_dir) / ".cache" / "data"

    def splits(self, data: DataConfig, read: Callable[[], Splits]) -> Splits:
        """Return splits: from the cache where they are large and their files unchanged, else as they are read.

        Args:
            data: the settings of the splits.
            read: reads them; it is also what reads the training pairs of kept splits.
        """
        hashes = _file_hashes(data)
        if hashes is None:
            return read()
        folder = self._entry(_SPLITS, [plain(data), hashes])
        if (kept := read_sealed(folder / _SPLITS)) is not None:
            return _to_splits(kept, LatePairs(kept["num_train"], lambda: read().train))
        splits = read()
        if len(splits.train) >= KEPT_FROM and set(hashes.values()) == _hashes_in(splits):
            facts = {"num_train": len(splits.train), "facts": splits.facts, **_rows_of(splits)}
            if _survives_json(facts, splits):
                whole = folder / _SPLITS
                self._write(folder, {}, _SPLITS, facts, is_whole=lambda: read_sealed(whole) is not None)
        return splits

    def tokens(self, about: Sequence[Json]) -> tuple[dict[str, TokenisedPairs], Kept] | None:
        """Return the token ids of each split, mapped from their files, and the facts that were kept with them.

        Args:
            about: JSON values that identify them.
        """
        return _read_tokens(self._entry(_TOKENS, about))

    def keep_tokens(self, about: Sequence[Json], splits: Mapping[str, TokenisedPairs], facts: Kept) -> None:
        """Keep the token ids of each split, with facts that are JSON values."""
        buffers = {split: as_rows(pairs.rows) for split, pairs in splits.items()}
        kept = {
            split: {"names": rows.names, "dropped": splits[split].dropped, "sha256": rows.sha256}
            for split, rows in buffers.items()
        }
        arrays = {f"{split}.npy": rows.buffer for split, rows in buffers.items()}
        folder, content = self._entry(_TOKENS, about), {"splits": kept, "facts": facts}
        self._write(folder, arrays, _TOKENS, content, is_whole=lambda: _read_tokens(folder) is not None)

    def _entry(self, kind: str, about: Sequence[Json]) -> Path:
        return self._folder / digest([kind, _version(), *about])[:32]

    def _write(
        self,
        folder: Path,
        arrays: Mapping[str, np.ndarray],
        name: str,
        facts: Kept,
        *,
        is_whole: Callable[[], bool],
    ) -> None:
        """Write an entry beside its place, and move it there; the first of two processes' stays: it may be mapped."""
        temporary = None
        with contextlib.suppress(OSError):  # no room, or no right to write: the next process makes it anew
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".", dir=self._folder))
            for file, array in arrays.items():
                np.save(temporary / file, array)
            write_json(temporary / name, seal(facts))
            if folder.is_dir() and not is_whole():
                shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _read_tokens(folder: Path) -> tuple[dict[str, TokenisedPairs], Kept] | None:
    """Return the contents of an entry of token ids; None where it is missing or damaged."""
    kept = read_sealed(folder / _TOKENS)
    if kept is None:
        return None
    found = {}
    for split, facts in kept["splits"].items():
        try:
            rows = TokenRows(np.load(folder / f"{split}.npy", mmap_mode="r"), map(tuple, facts["names"]))
        except (OSError, ValueError, EOFError):
            return None
        if rows.sha256 != facts["sha256"]:
            return None
        found[split] = TokenisedPairs(rows, facts["dropped"])
    return found, kept["facts"]


def _version() -> str:
    """Identify what makes entries: the sources of this package, and the libraries that read and tokenise."""
    sources = {path.name: file_sha256(path) for path in sorted(Path(__file__).parent.glob("*.py"))}
    libraries = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            libraries[name] = version(name)
    return digest([sources, libraries])


def _file_hashes(data: DataConfig) -> dict[str, str] | None:
    """Return the SHA-256 of each file that the splits are read from; None where one is no file, or cannot be read."""
    found = {}
    for name in ("path", "train", "dev", "golden"):
        reference: str | None = getattr(data, name)
        if reference is None:
            continue
        try:
            path = Path(reference).expanduser()
            if not path.is_file():  # a pipe can be read once only
                return None
            found[name] = file_sha256(path)
        except (OSError, ValueError, RuntimeError):  # no such user; reading says what is wrong
            return None
    return found


def _hashes_in(splits: Splits) -> set[str]:
    """Return the SHA-256 of the files that splits were read from."""
    facts = splits.facts
    return {facts["train"]["sha256"], facts["dev"]["sha256"], facts["golden"]["sha256"]}


def _rows_of(splits: Splits) -> Kept:
    """Return the rows of dev and golden as JSON values."""
    return {name: [asdict(row) for row in getattr(splits, name)] for name in _EVALUATED}


def _survives_json(facts: Kept, splits: Splits) -> bool:
    """Return whether rows and facts are read back as they are: a cell of a table may hold what JSON cannot."""
    try:
        again = _to_splits(json.loads(json.dumps(facts)), splits.train)
    except (TypeError, ValueError, RecursionError):
        return False
    return again == splits


def _to_splits(kept: Kept, train: Sequence[Pair]) -> Splits:
    """Return splits from the facts of an entry, with these training pairs."""
    return Splits(
        train,
        tuple(map(_to_prompt, kept["dev_prompts"])),
        tuple(map(_to_pair, kept["dev_pairs"])),
        tuple(map(_to_prompt, kept["golden_prompts"])),
        tuple(map(_to_pair, kept["golden_pairs"])),
        kept["facts"],
    )


def _to_prompt(row: Kept) -> EvalPrompt:
    turns = {"prompt": tuple(row["prompt"]), "checks": tuple(row["checks"])}
    return EvalPrompt(**{**row, **turns, "given": _to_given(row["given"])})


def _to_pair(row: Kept) -> Pair:
    turns = {name: tuple(row[name]) for name in ("prompt", "chosen", "rejected")}
    return Pair(**{**row, **turns, "given": _to_given(row["given"])})


def _to_given(row: Kept) -> Given:
    return Given(row["tools"], row["kwargs"]) if row["tools"] or row["kwargs"] else NOTHING
