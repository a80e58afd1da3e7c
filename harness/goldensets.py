"""Golden sets as people have them: AlpacaEval, Arena-Hard, MT-Bench, IFEval, and prompts alone, by their columns.

Input: one row -> output: its prompts, each with what the benchmark's own tools call it; none where it is another form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.conversations import RowError, check_unicode, says, shown
from harness.records import Message

Row = Mapping[str, Any]

GOLDEN_FORMS = (
    "AlpacaEval: `instruction`, `dataset`",
    "Arena-Hard: `question_id`, `turns` of {content} (v0.1), or `uid`, `prompt` (v2.0)",
    "MT-Bench: `question_id`, `turns` as two texts, `category`",
    "IFEval: `prompt`, `instruction_id_list`, `kwargs`",
    "prompts alone: `prompt`, for a judge, a reward model or a scorer of your own",
)


@dataclass(frozen=True)
class GoldenPrompt:
    """A prompt of a published golden set.

    Attributes:
        turns: the user's turns before the answer; a second one follows the answer to the first.
        about: `form`, `id`, and what else the benchmark's own tools ask for.
        cluster: prompts that are not independent share it.
    """

    turns: tuple[Message, ...]
    about: dict[str, Any] = field(default_factory=dict)
    cluster: str | None = None


def golden_prompts(row: Row, columns: frozenset[str], *, both_turns: bool) -> list[GoldenPrompt]:
    """Return the prompts of a row of a published set, or nothing where its columns are those of another form.

    Args:
        row: column -> value.
        columns: of the whole file.
        both_turns: for MT-Bench, also the second turn as a prompt that follows the first.

    Raises:
        RowError: where the row lacks what its form has.
    """
    for needed, reader in _FORMS:
        if needed <= columns:
            return reader(row, both_turns)
    return []


def is_golden_set(columns: frozenset[str]) -> bool:
    """Return True where a file with these columns is a published golden set."""
    return any(needed <= columns for needed, _ in _FORMS)


def _alpaca_eval(row: Row, both_turns: bool) -> list[GoldenPrompt]:
    about = {"form": "alpaca_eval", "id": "", "dataset": str(row.get("dataset") or "")}
    return [GoldenPrompt((says("user", _text(row, "instruction")),), about)]


def _arena_hard_1(row: Row, both_turns: bool) -> list[GoldenPrompt]:
    """Read v0.1 of Arena-Hard, or MT-Bench: both have `question_id`, `category` and `turns`."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise RowError(f"`turns` is {shown(turns)}; allowed: a list of texts or of {{content}}")
    texts: list[Any] = [turn.get("content") if isinstance(turn, Mapping) else turn for turn in turns]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowError("`turns` holds a turn that is empty or no text")
    for text in texts:
        check_unicode(text)
    name, category = str(_known(row, "question_id")), str(row.get("category") or "")
    said = tuple(says("user", text) for text in texts)
    if isinstance(turns[0], Mapping):
        about = {"form": "arena_hard", "version": "v0.1", "id": name, "category": category}
        topic = str(row["cluster"]) if row.get("cluster") else None
        return [GoldenPrompt(said[:1], about, topic)]
    about = {"form": "mt_bench", "id": name, "category": category}
    first = GoldenPrompt(said[:1], about | {"turn": 1}, f"question {name}")
    if len(said) < 2 or not both_turns:
        return [first]
    return [first, GoldenPrompt(said[:2], about | {"turn": 2}, f"question {name}")]


def _arena_hard_2(row: Row, both_turns: bool) -> list[GoldenPrompt]:
    about = {"form": "arena_hard", "version": "v2.0", "id": str(_known(row, "uid"))}
    about |= {key: str(row.get(key) or "") for key in ("category", "subcategory")}
    return [GoldenPrompt((says("user", _text(row, "prompt")),), about)]


def _ifeval(row: Row, both_turns: bool) -> list[GoldenPrompt]:
    names, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise RowError(f"`instruction_id_list` is {shown(names)}; allowed: a list of instruction names")
    if not isinstance(kwargs, list) or len(kwargs) != len(names):
        raise RowError(f"`kwargs` is {shown(kwargs)}; allowed: a list with one mapping for each instruction")
    # Parquet and the Hub give every mapping all keys of the column, null where they were not there.
    given = [{key: value for key, value in (one or {}).items() if value is not None} for one in kwargs]
    instructions = {"instruction_id_list": list(names), "kwargs": given}
    about = {"form": "ifeval", "id": str(row.get("key", "")), "instructions": instructions}
    return [GoldenPrompt((says("user", _text(row, "prompt")),), about)]


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"`{column}` is {shown(value)}; allowed: a text that is not empty")
    check_unicode(value)
    return value


def _known(row: Row, column: str) -> Any:
    if row.get(column) in (None, ""):
        raise RowError(f"`{column}` is missing")
    return row[column]


_FORMS: tuple[tuple[frozenset[str], Callable[[Row, bool], list[GoldenPrompt]]], ...] = (
    (frozenset({"instruction_id_list", "prompt"}), _ifeval),
    (frozenset({"uid", "prompt", "category"}), _arena_hard_2),
    (frozenset({"question_id", "turns"}), _arena_hard_1),
    (frozenset({"instruction", "dataset"}), _alpaca_eval),
)
