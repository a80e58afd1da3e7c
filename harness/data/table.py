"""Path or Hub reference -> a `Table`: the usable rows of one file of preference data, and the others with reasons.

A file of an unknown form, or with too many bad rows, is a `UsageError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

from tqdm import tqdm

from harness.data.conversations import IMPLICIT_TEXT, RowError
from harness.data.formats import (
    ANSWER_COLUMNS,
    EVAL_FORMS,
    PAIR_FORMS,
    ParsedRow,
    has_known_form,
    parse_golden,
    parse_row,
    unread_columns,
    unread_prompts,
)
from harness.data.records import BadRow
from harness.data.sources import Source, read_source
from harness.study.errors import UsageError
from harness.study.text import one_line

_SHOWN_ROWS = 10  # bad rows that a message lists; the rest is counted


class TableFacts(TypedDict):
    """A file for study.yaml: path, forms (most frequent first), hash, number of rows, bad rows with reasons."""

    path: str
    form: str
    sha256: str
    rows: int
    bad_rows: list[str]


@dataclass(frozen=True)
class Table:
    """The rows of one file.

    Attributes:
        key: the config key that names the file.
        source: the file.
        rows: usable rows.
        bad_rows: other rows, in order.
        answers_are_checks: whether answer columns were read, as checks.
    """

    key: str
    source: Source
    rows: tuple[ParsedRow, ...]
    bad_rows: tuple[BadRow, ...]
    answers_are_checks: bool = False

    @cached_property
    def unread(self) -> dict[str, int]:
        """The columns that nothing reads, each with the number of rows that have a value in it."""
        rows = [row for _, row in self.source.rows]
        counts = Counter(name for row in rows for name, value in row.items() if value not in (None, "", []))
        read = ANSWER_COLUMNS if self.answers_are_checks else ()
        found = {name: counts[name] for name in unread_columns(counts) if name not in read}
        return found | Counter(name for row in rows for name in unread_prompts(row))

    @property
    def facts(self) -> TableFacts:
        """The facts of the file for study.yaml."""
        forms = Counter(row.form for row in self.rows)
        return {
            "path": self.source.path,
            "form": "; ".join(form for form, _ in forms.most_common()),
            "sha256": self.source.sha256,
            "rows": self.source.count,
            "bad_rows": [str(bad) for bad in self.bad_rows],
        }


def read_table(
    reference: str,
    *,
    key: str,
    revision: str | None,
    max_bad_fraction: float,
    both_turns: bool = True,
    answer_check: str | None = None,
) -> Table:
    """Read one file.

    Args:
        reference: a path or a Hub reference.
        key: the config key of the file. `data.dev` and `data.golden` need no pairs; `data.train` has no checks.
        revision: of a Hub data set.
        max_bad_fraction: allowed share of bad rows.
        both_turns: also read the second turns of a golden set, each as a prompt that follows the first.
        answer_check: kind of the check that an answer column becomes (`data.answer_check`).

    Raises:
        UsageError: for a file that cannot be read, has no rows, has no known form or too many bad rows.
    """
    source = read_source(reference, key=key, revision=revision)
    is_evaluation = key in ("data.dev", "data.golden")
    if source.count == 0:
        raise UsageError(f"{key}={reference}: has no rows; give a file with at least one pair")
    if source.rows and not has_known_form(source.columns, evaluation=is_evaluation):
        forms = "".join(f"\n  {form}" for form in (EVAL_FORMS if is_evaluation else PAIR_FORMS))
        columns = ", ".join(one_line(name, 40) for name in sorted(source.columns)) or "none"
        raise UsageError(
            f"{key}={reference}: its columns match no form (found: {columns}); rename them to one of:{forms}"
        )
    rows, bad_rows = _parse_rows(source, key, evaluates=is_evaluation, both_turns=both_turns, answer_check=answer_check)
    if answer_check and key == "data.golden" and rows and not any(row.checks for row in rows):
        raise UsageError(
            f"data.answer_check={answer_check}: no row of {key}={reference} has an answer to check; remove the key, or "
            f"call the column one of {', '.join(ANSWER_COLUMNS)}"
        )
    kept, disagreeing = _drop_disagreeing(rows, reference)
    bad_rows = sorted([*source.bad_rows, *bad_rows, *disagreeing], key=lambda bad: bad.row)
    if len(bad_rows) > max_bad_fraction * source.count or not kept:
        raise UsageError(_bad_rows_message(source, key, bad_rows, max_bad_fraction))
    return Table(key, source, tuple(kept), tuple(bad_rows), bool(answer_check) and is_evaluation)


def _parse_rows(
    source: Source, key: str, *, evaluates: bool, both_turns: bool, answer_check: str | None
) -> tuple[list[ParsedRow], list[BadRow]]:
    rows: list[ParsedRow] = []
    bad_rows = []
    columns, reads_checks = source.columns, key != "data.train"
    for number, row in tqdm(source.rows, desc=f"reading {key}", unit=" rows", delay=5):
        try:
            golden = parse_golden(row, number, columns, both_turns=both_turns) if evaluates else []
            rows += golden or [
                parse_row(
                    row,
                    number,
                    columns,
                    needs_pair=not evaluates,
                    reads_checks=reads_checks,
                    answer_check=answer_check if evaluates else None,
                )
            ]
        except RowError as error:
            bad_rows.append(BadRow(source.path, number, str(error)))
    return rows, bad_rows


def _drop_disagreeing(rows: list[ParsedRow], path: str) -> tuple[list[ParsedRow], list[BadRow]]:
    """Drop rows whose checks or cluster differ from those of an earlier row with the same prompt."""
    kept, bad_rows = [], []
    first: dict[tuple[str, str], ParsedRow] = {}
    for row in rows:
        given = [name for name in ("checks", "cluster") if getattr(row, name)]
        earlier = {name: first.setdefault((row.prompt_id, name), row) for name in given}
        differing = next((name for name in given if getattr(earlier[name], name) != getattr(row, name)), None)
        if differing is None:
            kept.append(row)
        else:
            reason = f"`{differing}` is not that of row {earlier[differing].row}, which has the same prompt"
            bad_rows.append(BadRow(path, row.row, reason))
    return kept, bad_rows


def _bad_rows_message(source: Source, key: str, bad_rows: Sequence[BadRow], limit: float) -> str:
    shown = "".join(f"\n  {bad}" for bad in bad_rows[:_SHOWN_ROWS])
    return (
        f"{key}={source.path}: {len(bad_rows)} of {source.count} rows cannot be used "
        f"({len(bad_rows) / source.count:.1%}; data.max_bad_fraction allows {limit:.1%}). "
        f"The first {min(_SHOWN_ROWS, len(bad_rows))}:{shown}\n"
        "Repair or remove these rows, or raise data.max_bad_fraction to go on without them."
    )


def table_warnings(table: Table, *, revision: str | None) -> Iterator[str]:
    """Yield properties of a file that are odd and yet allowed."""
    key, rows = table.key, table.rows
    if table.bad_rows:
        yield f"{key}: {len(table.bad_rows)} of {table.source.count} rows cannot be used and were left out"
    if table.source.from_hub and revision is None:
        yield f"{key}={table.source.path}: no data.revision; the Hub's data may change between runs"
    ties = sum(row.tie for row in rows)
    if ties:
        yield f"{key}: {ties} of {len(rows)} rows score both answers the same: their labels are no preference (kept)"
    guessed = [row.prompt[-1]["content"] for row in rows if row.form == IMPLICIT_TEXT]
    if guessed:
        yield (
            f"{key}: {len(guessed)} rows have no prompt column; what both answers begin with was taken as the prompt, "
            f"the shortest being {one_line(min(guessed, key=len), 60)!r}"
        )
    several = sum(max(len(row.chosen or ()), len(row.rejected or ())) > 1 for row in rows)
    if several:
        yield f"{key}: the answers of {several} rows have several turns, and all of these turns count as the answer"
    has_answers = any(name in ANSWER_COLUMNS for name in table.unread)
    if has_answers and key != "data.train" and not any(row.checks or row.chosen for row in rows):
        yield (
            f"{key}: its rows have answers and no checks; data.answer_check=contains, equals or number makes checks of "
            "them"
        )
