"""Pairs as token ids: one pair, and all pairs of a split over one buffer, in memory or in a file.

60,000 pairs of 780 tokens are 190 MB in a buffer, and gigabytes as Python's numbers. The buffer holds what is hashed
(`canonical_bytes`), pair after pair: the hash of the pairs is the hash of its bytes.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:
    from harness.data.written import Readback

_HEAD = 3  # numbers in front of a pair's ids: the lengths of prompt, chosen and rejected


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids: both answers share the prompt's ids, and each ends the turn exactly once."""

    pair_id: str
    prompt_id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of tokens of the prompt with the longer answer."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def canonical_bytes(prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> bytes:
    """Return one pair's ids as bytes: three lengths (the mask), then the ids, 32-bit little-endian."""
    numbers = array("i", (len(prompt_ids), len(chosen_ids), len(rejected_ids)))
    for ids in (prompt_ids, chosen_ids, rejected_ids):
        numbers.extend(ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


class TokenRows(Sequence[TokenPair]):
    """Pairs of token ids over one buffer; a `TokenPair` is made when it is asked for.

    Args:
        buffer: 32-bit little-endian integers, shape (num_ids + 3 num_pairs,): `canonical_bytes`, pair after pair.
        names: pair_id and prompt_id of each pair.

    Attributes:
        lengths: int64, shape (num_pairs, 3): number of tokens of prompt, chosen and rejected.

    Raises:
        ValueError: for a buffer that does not hold so many pairs.
    """

    def __init__(self, buffer: np.ndarray, names: Iterable[tuple[str, str]]) -> None:
        self.buffer, self.names = buffer, tuple(names)
        if buffer.dtype != np.dtype("<i4") or buffer.ndim != 1:
            raise ValueError(f"ids are 32-bit integers in one row, not {buffer.dtype} of shape {buffer.shape}")
        numbers, start, lengths = memoryview(buffer.data), 0, []
        while start < len(numbers):
            lengths.append(numbers[start : start + _HEAD].tolist())
            start += _HEAD + sum(max(length, 0) for length in lengths[-1])  # always onwards
        is_whole = start == len(numbers) and min(map(min, lengths), default=0) >= 0
        if not is_whole or len(lengths) != len(self.names):
            raise ValueError(f"{len(numbers)} numbers are not the ids of {len(self.names)} pairs")
        self.lengths = np.array(lengths, dtype=np.int64).reshape(-1, _HEAD)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths.sum(1) + _HEAD)]).tolist()

    @classmethod
    def of(cls, rows: Iterable[TokenPair]) -> TokenRows:
        """Copy the ids of pairs into one buffer."""
        content, names = bytearray(), []
        for row in rows:
            content += canonical_bytes(row.prompt_ids, row.chosen_ids, row.rejected_ids)
            names.append((row.pair_id, row.prompt_id))
        return cls(np.frombuffer(content, dtype="<i4"), names)

    @cached_property
    def sha256(self) -> str:
        """Identify the ids and masks of all pairs, in order."""
        return hashlib.sha256(self.buffer.data).hexdigest()

    @cached_property
    def distinct_ids(self) -> list[int]:
        """The ids that occur, in rising order."""
        is_id = np.ones(len(self.buffer), dtype=bool)
        for place in range(_HEAD):
            is_id[np.array(self._starts[:-1], dtype=np.int64) + place] = False
        return np.flatnonzero(np.bincount(self.buffer[is_id])).tolist()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.names)

    @overload
    def __getitem__(self, number: int) -> TokenPair: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[TokenPair, ...]: ...
    def __getitem__(self, number: int | slice) -> TokenPair | tuple[TokenPair, ...]:
        """Return one pair, or those of a slice."""
        if isinstance(number, slice):
            return tuple(self[each] for each in range(*number.indices(len(self))))
        number = range(len(self))[number]
        prompt, chosen, _ = self.lengths[number].tolist()
        ids = self._numbers(number)[_HEAD:].tolist()
        answers = prompt + chosen
        return TokenPair(*self.names[number], tuple(ids[:prompt]), tuple(ids[prompt:answers]), tuple(ids[answers:]))

    def __eq__(self, other: object) -> bool:
        """Return whether the pairs are those of another sequence, in order."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(TokenPair.__eq__, self, other))

    def __hash__(self) -> int:
        """Return a hash; equal pairs have equal ones."""
        return hash(self.names)

    def canonical_bytes(self, number: int) -> bytes:
        """Return what `canonical_bytes` gives for one pair."""
        return self._numbers(number).tobytes()

    def answer_bytes(self, number: int) -> tuple[bytes, bytes]:
        """Return `canonical_bytes` of a pair's prompt with each of its answers alone."""
        ids, (prompt, chosen, rejected) = self._numbers(number)[_HEAD:], self.lengths[number].tolist()
        before = ids[:prompt].tobytes()
        heads = np.array([[prompt, chosen, 0], [prompt, rejected, 0]], dtype="<i4")
        answers = ids[prompt : prompt + chosen], ids[prompt + chosen :]
        return heads[0].tobytes() + before + answers[0].tobytes(), heads[1].tobytes() + before + answers[1].tobytes()

    def _numbers(self, number: int) -> np.ndarray:
        return self.buffer[self._starts[number] : self._starts[number + 1]]


@dataclass(frozen=True)
class TokenisedPairs:
    """Rows that fit, in the given order, the number of dropped pairs by reason, and what does not read back."""

    rows: Sequence[TokenPair]
    dropped: dict[str, int]
    readback: Readback | None = field(default=None, compare=False)

    @property
    def sha256(self) -> str:
        """Identify the ids and masks of all rows, in order."""
        return as_rows(self.rows).sha256


def as_rows(rows: Sequence[TokenPair]) -> TokenRows:
    """Return pairs over one buffer, copied where they are not yet."""
    return rows if isinstance(rows, TokenRows) else TokenRows.of(rows)


def lengths_of(rows: Sequence[TokenPair]) -> np.ndarray:
    """Return the numbers of tokens of prompt, chosen and rejected: int64, shape (num_pairs, 3)."""
    if isinstance(rows, TokenRows):
        return rows.lengths
    found = [(len(row.prompt_ids), len(row.chosen_ids), len(row.rejected_ids)) for row in rows]
    return np.array(found, dtype=np.int64).reshape(-1, _HEAD)


def pair_lengths(rows: Sequence[TokenPair]) -> np.ndarray:
    """Return each pair's `length`: int64, shape (num_pairs,)."""
    lengths = lengths_of(rows)
    found: np.ndarray = lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0)
    return found
