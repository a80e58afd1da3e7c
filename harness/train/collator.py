"""A micro-batch on its way to a trainer: row numbers -> TRL's padded tensors, the packed row, and the pairs themselves.

`PairCollator` lays token ids out, once, on the host. `TensorComparison` proves that the tensors of a training step hold
the ids of the collated pairs: the consumption hash is then taken of the pairs, and no id is read back from a tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.data.tokens import TokenPair
from harness.train.packed import Group, Packed, groups_of, pack

ROW = "row"  # the only column of a trainer's dataset: row numbers
COLLATED = "collated"  # the batch's entry with the pairs
PACKED = "packed"  # the batch's entry with the packed row

Features = Mapping[str, Sequence[int] | float]  # TRL's columns of one pair


@dataclass(frozen=True)
class Collated:
    """The pairs of a micro-batch, as they were laid out.

    A class of its own and no list, so that data loaders pass it on as it is.

    Attributes:
        rows: the pairs.
        shares_prefix: whether each prompt stands once for both answers in the packed row; None where none is packed.
    """

    rows: tuple[TokenPair, ...]
    shares_prefix: bool | None = None

    @property
    def groups(self) -> list[Group]:
        """Return how the packed row has to hold the pairs."""
        return [] if self.shares_prefix is None else groups_of(self.rows, share_prefix=self.shares_prefix)


@dataclass
class PairCollator:
    """Collate a trainer's examples `{"row": number}`.

    Attributes:
        rows: the training pairs.
        features: TRL's columns of one pair, from its row number.
        pad: TRL's own collator, which pads those columns.
        packs: also lay the pairs out as one packed row.
        share_prefix: in that row each prompt stands once for both answers.
    """

    rows: Sequence[TokenPair]
    features: Callable[[int], Features]
    pad: Callable[[list[Features]], dict[str, Tensor]]
    packs: bool = False
    share_prefix: bool = True

    def __call__(self, examples: Sequence[Mapping[str, int]]) -> dict[str, Tensor | Packed | Collated]:
        """Return TRL's batch, with the pairs under `COLLATED` and the packed row under `PACKED`."""
        numbers = [example[ROW] for example in examples]
        rows = tuple(self.rows[number] for number in numbers)
        batch: dict[str, Tensor | Packed | Collated] = {**self.pad([self.features(number) for number in numbers])}
        if self.packs:
            batch[PACKED] = pack(groups_of(rows, share_prefix=self.share_prefix))
        return batch | {COLLATED: Collated(rows, self.share_prefix if self.packs else None)}


class PaddedRows(NamedTuple):
    """Rows of a padded batch, each of shape (num_rows, width): ids, which of them are attended, labels (-100: none)."""

    ids: Tensor
    attended: Tensor
    labels: Tensor


class TensorComparison:
    """Compare the tensors of each training step with the collated pairs.

    At once on a CPU. On a GPU, where reading a tensor waits for all work, by a checksum that is computed on the device
    and read by `settle` at the log line. (The GPU's way has not run on a GPU; its checksum is tested on a CPU.)

    Args:
        at_once: False collects checksums on a CPU, too.
    """

    def __init__(self, *, at_once: bool = True) -> None:
        self.at_once = at_once
        self._pending: list[tuple[Tensor, Tensor, Collated]] = []

    def compare(self, collated: Collated, padded: Sequence[PaddedRows], packed: Packed | None) -> None:
        """Compare one micro-batch.

        Args:
            collated: the pairs.
            padded: TRL's tensors, all chosen rows before all rejected ones.
            packed: the packed row, where the model runs packed.

        Raises:
            RuntimeError: where a tensor holds other ids than the pairs, or in another place.
        """
        expected = _expected_codes(collated)
        codes, counted = _codes(padded, packed)
        if self.at_once and codes.device.type == "cpu":
            if not torch.equal(codes[counted], expected):
                raise _other_ids(collated)
            return
        self._pending.append((checksum(codes, counted), checksum(expected, torch.ones_like(expected)), collated))

    def settle(self) -> None:
        """Read the checksums since the last call.

        Raises:
            RuntimeError: as in `compare`.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        found = torch.stack([sum_ for sum_, _, _ in pending]).tolist()
        for number, (_, expected, collated) in zip(found, pending, strict=True):
            if number != int(expected):
                raise _other_ids(collated)


def _other_ids(collated: Collated) -> RuntimeError:
    pairs = ", ".join(row.pair_id for row in collated.rows)
    return RuntimeError(
        f"the trainer got other token ids than the collator laid out for the pairs {pairs}: the arms' data cannot be "
        "proved identical; a library or the memory has changed them, so run the trial again, and report it if it recurs"
    )


def _codes(padded: Sequence[PaddedRows], packed: Packed | None) -> tuple[Tensor, Tensor]:
    """Return one number per place of the tensors, and which of them count; no padding does.

    The code of a padded token holds its id and its label, that of a packed token its id and its position, that of a
    target its id and the row that predicts it: id + 1 + 2^32 (the other number + 1).
    """
    codes, counted = [], []
    for rows in padded:
        labels = rows.labels.clamp(min=-1) + 1  # 0 where there is none
        codes.append((rows.ids + 1 + (labels << 32)).reshape(-1))
        counted.append(((rows.attended != 0) | (labels != 0)).reshape(-1))
    if packed is not None:
        ids = torch.cat([packed.input_ids[0], packed.targets])
        places = torch.cat([packed.position_ids[0], packed.predicting])
        codes.append(ids + 1 + ((places + 1) << 32))
        counted.append(torch.ones_like(ids, dtype=torch.bool))
    return torch.cat(codes), torch.cat(counted)


def _expected_codes(collated: Collated) -> Tensor:
    """Return the codes that count, from the pairs alone: padded rows, the packed row, its targets."""
    rows = collated.rows
    padded = [(row.prompt_ids, row.chosen_ids) for row in rows] + [(row.prompt_ids, row.rejected_ids) for row in rows]
    ids: list[Sequence[int]] = []
    others: list[np.ndarray] = []
    for one, other in padded:
        ids += [one, other]
        others += [np.full(len(one), -1), np.array(other)]  # a prompt has no labels
    targets, predicting, start = [], [], 0
    for prompt, answers in collated.groups:
        ids.append(prompt)
        others.append(np.arange(len(prompt)))
        end = start + len(prompt)
        for answer in answers:
            ids.append(answer[:-1])  # the last token predicts nothing
            others.append(np.arange(len(prompt), len(prompt) + len(answer) - 1))
            targets.append(answer)
            predicting.append(np.concatenate([[start + len(prompt) - 1], np.arange(end, end + len(answer) - 1)]))
            end += len(answer) - 1
        start = end
    ids += targets
    others += predicting
    flat = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int64, count=sum(map(len, ids)))
    return torch.from_numpy(flat + 1 + ((np.concatenate(others).astype(np.int64) + 1) << 32))


def checksum(codes: Tensor, counted: Tensor) -> Tensor:
    """Return a 64-bit sum of the numbers that count, each times an odd weight of its place among them: shape ().

    One number that changes always changes the sum; two that are exchanged do so but for chances of about 2^-64. Sums
    and products wrap around, on a CPU and on a GPU alike. Nothing waits for the device.
    """
    place = counted.to(torch.int64).cumsum(0)
    weights = place * 0x1B873593CC9E2D51
    weights = ((weights ^ (weights >> 29)) * 0x369DEA0F31A53F85) | 1
    return (codes * weights * counted).sum()
