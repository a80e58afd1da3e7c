"""Keep prompts apart: split a file by prompt, and refuse golden prompts that models were trained or selected on.

One definition of the same prompt (`conversations.prompt_key`) serves both, so that a file which was split never leaks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from harness.formats import ParsedRow
from harness.records import UsageError, digest
from harness.untrusted import one_line

_SHOWN = 10  # prompts that a message lists; the rest is counted


class Leak(NamedTuple):
    """A prompt that stands in two splits: the row in each, and whether it is the same to the character."""

    row: ParsedRow
    other: ParsedRow
    exact: bool


def assign_split(key: str, shares: Mapping[str, float], seed: int) -> str:
    """Return the split of a prompt: a hash of its key and the seed, so that no other row and no order matters.

    Args:
        key: see `conversations.prompt_key`.
        shares: share of the prompts by split, in order; they are scaled to sum to one.
    """
    point = int(digest([seed, key])[:13], 16) / 16**13 * sum(shares.values())
    for split, share in shares.items():
        point -= share
        if point < 0:
            return split
    return split


def find_leaks(rows: Iterable[ParsedRow], others: Iterable[ParsedRow]) -> list[Leak]:
    """Return one leak for each prompt of `rows` that occurs among `others`, an exact one where there is one."""
    by_id: dict[str, ParsedRow] = {}
    by_key: dict[str, ParsedRow] = {}
    for other in others:
        if other.prompt_id not in by_id:
            by_id[other.prompt_id] = other
            by_key.setdefault(other.prompt_key, other)
    leaks = {}
    for row in rows:
        same = by_id.get(row.prompt_id)
        alike = same or by_key.get(row.prompt_key)
        if row.prompt_id not in leaks and alike is not None:
            leaks[row.prompt_id] = Leak(row, alike, exact=same is not None)
    return list(leaks.values())


def refuse_leaks(rows: Mapping[str, Sequence[ParsedRow]], paths: Mapping[str, str]) -> None:
    """Raise a `UsageError` that names the golden prompts which occur in train or dev.

    Args:
        rows: by split.
        paths: of the file that each split comes from.
    """
    leaks = [(split, leak) for split in ("train", "dev") for leak in find_leaks(rows["golden"], rows[split])]
    if not leaks:
        return
    lines = "".join(
        f"\n  {paths['golden']}:{leak.row.row} = {paths[split]}:{leak.other.row} ({split}, "
        f"{'same text' if leak.exact else 'same after folding white space and case'}): "
        f"{one_line(leak.row.prompt[-1]['content'], 60)}"
        for split, leak in leaks[:_SHOWN]
    )
    number = len({leak.row.prompt_id for _, leak in leaks})
    raise UsageError(
        f"data.golden={paths['golden']}: {number} golden {'prompt occurs' if number == 1 else 'prompts occur'} in the "
        f"data that models are trained or selected on; allowed: none. The first {min(_SHOWN, len(leaks))}:{lines}\n"
        "Remove them from data.train and data.dev, or from data.golden; or give one file as data.path: it is split by "
        "prompt."
    )
