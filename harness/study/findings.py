"""What a study has found before it trains: `Finding`s, kept in each trial's manifest under `preconditions`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    """One precondition and how it came out.

    Attributes:
        name: a few words, such as `training is deterministic`; unique within a trial.
        result: `proved`, `not proved`, or a word that says what follows (`padded`).
        detail: a sentence for the reader of the report, with its figures.
    """

    name: str
    result: str
    detail: str


def added(recorded: Sequence[dict[str, str]], found: Iterable[Finding]) -> list[dict[str, str]]:
    """Return the manifest's list with findings added; a finding of the same name is replaced."""
    rows = {row["name"]: row for row in recorded}
    return list((rows | {finding.name: asdict(finding) for finding in found}).values())
