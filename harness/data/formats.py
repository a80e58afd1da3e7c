"""One row of a file -> `ParsedRow`s: pairs and prompts in the forms of public data sets, recognised by their columns.

A row that cannot be used is a `RowError` with the reason. Published golden sets (AlpacaEval, Arena-Hard, MT-Bench,
IFEval) keep the columns that their own tools need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from harness.data.checks import final_number, read_checks
from harness.data.conversations import (
    IMPLICIT_TEXT,
    MEDIA,
    Conversation,
    RowError,
    Turns,
    as_turns,
    check_turns,
    check_unicode,
    from_texts,
    from_turns,
    prompt_key,
    says,
    shown,
    text_or_turns,
    without_nulls,
)
from harness.data.ratings import is_rating, is_tie
from harness.data.records import NOTHING, Check, EvalPrompt, Given, Message, Pair, prompt_id
from harness.data.unicode import is_decimal_comma
from harness.study.files import Json

Row = Mapping[str, Json]

GOLDEN_FORMS = (
    "AlpacaEval: `instruction`, `dataset`",
    "Arena-Hard: `question_id`, `turns` of {content} (v0.1), or `uid`, `prompt` (v2.0)",
    "MT-Bench: `question_id`, `turns` as two texts, `category`",
    "IFEval: `prompt`, `instruction_id_list`, `kwargs`",
    "questions with answers (GSM8K): `question`, `answer`, with data.answer_check",
    "prompts alone: `prompt`, for a judge, a reward model or a scorer of your own",
)
PAIR_FORMS = (
    "TRL standard: `prompt`, `chosen`, `rejected` as text (without `prompt`: the common beginning is the prompt)",
    "TRL conversational: the same as lists of {role, content}; the prompt may be called `messages`",
    "UltraFeedback-binarized: `prompt` as text, `chosen` and `rejected` as conversations that repeat it, scores",
    "HH-RLHF: `chosen`, `rejected` as transcripts (\\n\\nHuman: ... \\n\\nAssistant: ...)",
    "ShareGPT or LLaMA-Factory: `conversations` of {from, value}, `chosen`, `rejected`, optional `system`",
    "`question` or `instruction` (with `input`) in place of `prompt`, optional `system`",
)
EVAL_FORMS = (
    *PAIR_FORMS,
    "prompts with `checks`: `prompt` and `checks`, optional `id`, `cluster`",
    *GOLDEN_FORMS,
)

_SCORED = {"checks", "chosen", "rejected"}  # a file that has one of them is scored by it
_PROMPT_COLUMNS = ("prompt", "conversations", "messages", "question", "instruction", "input")
ANSWER_COLUMNS = (
    *("answer", "answers", "label", "target", "gold", "gold_answer", "final_answer", "ground_truth"),
    *("reference_answer", "expected_answer", "expected"),
)
_NO_NUMBER = re.compile(r"\d\s*[/:]\s*\d|\\[dt]?frac\b")  # what its last number is not
_DECIMAL_COMMA = re.compile(r"\d\.\d+[.,]\d")  # 1.000,5 and 1.000.000
# What `chat_template_kwargs` may not set: arguments of the rendering itself.
_RESERVED = {
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}
_READ_COLUMNS = {
    *_SCORED,
    *_PROMPT_COLUMNS,
    *MEDIA,
    *("system", "history", "id", "cluster", "tools", "chat_template_kwargs"),
    *("dataset", "question_id", "turns", "category", "subcategory", "uid", "instruction_id_list", "kwargs", "key"),
}


@dataclass(frozen=True)
class ParsedRow:
    """One usable row.

    Attributes:
        form: name of the form that was recognised.
        row: row in the file, counted from 1.
        row_id: the `id` given in the file, or `row-N`.
        chosen: the preferred answer; None where the row has checks only.
        tie: the row gives both answers the same score.
        checks, cluster, about, follows, given: see `EvalPrompt`.
    """

    form: str
    row: int
    row_id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...] | None
    rejected: tuple[Message, ...] | None
    conversational: bool
    checks: tuple[Check, ...]
    cluster: str | None
    tie: bool
    about: dict[str, Any] = field(default_factory=dict)
    follows: str | None = None
    given: Given = NOTHING

    @cached_property
    def prompt_id(self) -> str:
        """Identify the prompt by its content."""
        return prompt_id(self.prompt, self.given)

    @cached_property
    def prompt_key(self) -> str:
        """Identify the prompt without regard to white space and case; see `conversations.prompt_key`."""
        return prompt_key(self.prompt)

    def pair(self) -> Pair | None:
        """Return the preference pair, where the row holds one."""
        if self.chosen is None or self.rejected is None:
            return None
        return Pair(self.row_id, self.prompt, self.chosen, self.rejected, self.conversational, self.row, self.given)

    def eval_prompt(self) -> EvalPrompt:
        """Return the prompt with its checks."""
        return EvalPrompt(
            self.prompt_id,
            self.prompt,
            self.checks,
            self.cluster,
            self.conversational,
            self.row,
            self.about,
            self.follows,
            self.given,
        )


def has_known_form(columns: frozenset[str], *, evaluation: bool) -> bool:
    """Return True where a file with these columns can hold pairs or, for evaluation, prompts."""
    if {"chosen", "rejected"} <= columns:
        return True
    return evaluation and (is_golden_set(columns) or bool(columns.intersection(_PROMPT_COLUMNS)))


def is_golden_set(columns: frozenset[str]) -> bool:
    """Return True where a file with these columns is a published golden set."""
    return any(needed <= columns for needed, _ in _GOLDEN_READERS)


def unread_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns that no reader takes, in order."""
    return sorted(name for name in columns if name not in _READ_COLUMNS and not is_rating(name))


def unread_prompts(row: Row) -> list[str]:
    """Return the columns of a row that could hold its prompt, beside the one that does."""
    given = [name for name in _PROMPT_COLUMNS if row.get(name) not in (None, "", [])]
    return [name for name in given[1:] if not (name == "input" and given[0] == "instruction")]


def parse_row(
    row: Row,
    number: int,
    columns: frozenset[str],
    *,
    needs_pair: bool,
    reads_checks: bool,
    answer_check: str | None = None,
) -> ParsedRow:
    """Read one row.

    Args:
        number: the row's number in the file, counted from 1.
        columns: columns of the file: one that this row lacks is missing, one that all rows lack is another form.
        needs_pair: refuse a row without `chosen` and `rejected` (training data).
        reads_checks: read and validate the column `checks` (evaluation data).
        answer_check: kind of the check that a row's answer column becomes, where it has neither checks nor a pair.

    Raises:
        RowError: with the reason, where the row cannot be used.
    """
    has_pair = any(row.get(column) is not None for column in ("chosen", "rejected"))
    conversation = _with_system(row, _read_pair(row, columns) if has_pair or needs_pair else _read_prompt(row, columns))
    checks = read_checks(row.get("checks")) if reads_checks else ()
    if answer_check and reads_checks and not checks and not has_pair:
        checks = read_checks([_answer_check(row, answer_check)])
    if conversation.chosen is None and not checks and _SCORED & columns:
        raise RowError("has neither `checks` nor `chosen` and `rejected`: an answer to it cannot be scored")
    check_turns(conversation)
    cluster = _label_of_column(row, "cluster")
    row_id = _label_of_column(row, "id")
    return ParsedRow(
        form=conversation.form,
        row=number,
        row_id=f"row-{number}" if row_id is None else row_id,
        prompt=tuple(conversation.prompt),
        chosen=None if conversation.chosen is None else tuple(conversation.chosen),
        rejected=None if conversation.rejected is None else tuple(conversation.rejected),
        conversational=conversation.conversational,
        checks=checks,
        cluster=cluster,
        tie=has_pair and is_tie(row),
        given=_given(row),
    )


def _given(row: Row) -> Given:
    """Read what a row gives the chat template beside its turns; images, which no turn holds as text, are refused."""
    media = next((name for name in MEDIA if row.get(name)), None)
    if media is not None:
        raise RowError(
            f"`{media}` is given, and only text is read; take such rows out, or the column where it is empty"
        )
    tools, kwargs = _from_text(row, "tools") or [], _from_text(row, "chat_template_kwargs") or {}
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) and tool for tool in tools):
        raise RowError(f"`tools` is {shown(tools)}; allowed: a list of JSON schemas, or that list as JSON text")
    if not isinstance(kwargs, Mapping):
        raise RowError(f"`chat_template_kwargs` is {shown(kwargs)}; allowed: a mapping of names to values")
    reserved = next((name for name in kwargs if name in _RESERVED), None)
    if reserved is not None:
        raise RowError(f"`chat_template_kwargs` sets `{reserved}`, which belongs to the rendering; take it out")
    return Given(tools, kwargs) if tools or kwargs else NOTHING


def _from_text(row: Row, column: str) -> Json:
    """Return a column's JSON value; one that is given as text is kept to the letter, with its nulls."""
    value = row.get(column)
    if not isinstance(value, str):
        return without_nulls(value)
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise RowError(f"`{column}` is text and not JSON ({error})") from error


def _answer_check(row: Row, kind: str) -> Check:
    """Return the check that an answer column stands for; several such columns must give the same check."""
    columns = [name for name in ANSWER_COLUMNS if row.get(name) not in (None, "", [])]
    if not columns:
        raise RowError(f"has no answer for data.answer_check={kind}; allowed columns: {', '.join(ANSWER_COLUMNS)}")
    first = columns[0]
    for other in columns[1:]:
        if not _say_the_same(row[first], row[other], kind):
            raise RowError(
                f"`{first}` is {shown(row[first])} and `{other}` is {shown(row[other])}: which is the right answer? "
                "keep one of these columns, or rename the other"
            )
    return _check_of_column(row, first, kind)


def _say_the_same(value: Json, other: Json, kind: str) -> bool:
    """Return whether two answers are one and the same: numbers by their value, texts by their final answers."""
    if kind == "number" and isinstance(value, str | int | float) and isinstance(other, str | int | float):
        numbers = [final_number(str(one)) for one in (value, other)]
        if None not in numbers:
            return numbers[0] == numbers[1]
    ours, theirs = (one if isinstance(one, list) else [one] for one in (value, other))
    return {_final(one) for one in ours} == {_final(one) for one in theirs}


def _check_of_column(row: Row, column: str, kind: str) -> Check:
    """Return the check that a column stands for; GSM8K's final answer stands behind ####."""
    value = row[column]
    if isinstance(value, list) and kind == "equals":
        return {kind: [_final(text) for text in value]}
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"`{column}` is {shown(value)}; allowed for data.answer_check={kind}: a text or a number")
    if kind != "number":
        return {kind: _final(value)}
    if isinstance(value, str):
        _refuse_ambiguous(column, value)
    number = final_number(str(value))
    if number is None:
        raise RowError(f"`{column}` is {shown(value)}; allowed for data.answer_check=number: a text with a number")
    return {kind: number}


def _refuse_ambiguous(column: str, text: str) -> None:
    """Refuse a text whose last number may be read in two ways."""
    if _NO_NUMBER.search(_final(text)):
        raise RowError(f"`{column}` is {shown(text)}; a fraction or a time is no number: use data.answer_check=equals")
    if _DECIMAL_COMMA.search(_final(text)) or is_decimal_comma(_final(text)):
        raise RowError(
            f"`{column}` is {shown(text)}; a point stands before decimals, and a comma between groups of three digits: "
            "write 3.5 for 3,5, and 1000.5 for 1.000,5; or use data.answer_check=equals"
        )


def _final(value: Json) -> str:
    return str(value).rpartition("####")[2].strip()


def _read_pair(row: Row, columns: frozenset[str]) -> Conversation:
    prompt = _prompt_value(row, columns)
    chosen, rejected = _answer_of_column(row, "chosen"), _answer_of_column(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        conversation = from_texts(prompt, chosen, rejected)
        if conversation.form == IMPLICIT_TEXT and columns.intersection(_PROMPT_COLUMNS):
            raise RowError(_missing_prompt(columns))
        return conversation
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError(
            "one of `chosen` and `rejected` is text, the other a list of turns; allowed: both text or both turns"
        )
    return from_turns(prompt, chosen, rejected, sharegpt=row.get("prompt") is None and "conversations" in row)


def _read_prompt(row: Row, columns: frozenset[str]) -> Conversation:
    prompt = _prompt_value(row, columns)
    if prompt is None:
        raise RowError(_missing_prompt(columns))
    turns, conversational = as_turns(prompt)
    return Conversation(
        "prompts with checks" if "checks" in columns else "prompts alone", turns, None, None, conversational
    )


def _missing_prompt(columns: frozenset[str]) -> str:
    return f"`{next((name for name in _PROMPT_COLUMNS if name in columns), 'prompt')}` is missing"


def _prompt_value(row: Row, columns: frozenset[str]) -> str | Turns | None:
    column = next((name for name in _PROMPT_COLUMNS if row.get(name) is not None), None)
    if column is None or (column == "input" and "instruction" in columns):
        return None
    value = text_or_turns(row[column], column)
    if row.get("history"):
        raise RowError(f"`history` is not read beside `{column}`; give all turns as `conversations`")
    if column == "instruction" and row.get("input"):
        return f"{value}\n{text_or_turns(row['input'], 'input')}"
    return value


def _answer_of_column(row: Row, column: str) -> str | Turns:
    if row.get(column) is None:
        raise RowError(f"`{column}` is missing")
    value = text_or_turns(row[column], column)
    if not value or (isinstance(value, str) and not value.strip()):
        raise RowError(f"`{column}` is empty")
    return value


def _with_system(row: Row, conversation: Conversation) -> Conversation:
    """Put the column `system` before the prompt, where there is one."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError(f"`system` is of type {type(system).__name__}; allowed: text")
    if not system or not system.strip():
        return conversation
    first = conversation.prompt[0] if conversation.prompt else None
    if first is not None and first["role"] == "system":
        if first["content"] != system:
            raise RowError("`system` differs from the system turn that the prompt begins with")
        return conversation
    return replace(conversation, prompt=[says("system", system), *conversation.prompt], conversational=True)


def _label_of_column(row: Row, column: str) -> str | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RowError(f"`{column}` is of type {type(value).__name__}; allowed: text or a whole number")
    check_unicode(str(value))
    return str(value)


def parse_golden(row: Row, number: int, columns: frozenset[str], *, both_turns: bool) -> list[ParsedRow]:
    """Read the prompts of a row of a published golden set; none for a file of another form.

    Raises:
        RowError: with the reason, where the row cannot be used.
    """
    if _SCORED & columns:
        return []
    rows = []
    prompts = golden_prompts(row, columns, both_turns=both_turns)
    given = _given(row) if prompts else NOTHING
    for found in prompts:
        follows = prompt_id(found.turns[:-1], given) if len(found.turns) > 1 else None
        rows.append(
            ParsedRow(
                form=f"{found.about['form']} prompts",
                row=number,
                row_id=f"row-{number}",
                prompt=found.turns,
                chosen=None,
                rejected=None,
                conversational=follows is not None,
                checks=(),
                cluster=found.cluster,
                tie=False,
                about=found.about,
                follows=follows,
                given=given,
            )
        )
    return rows


@dataclass(frozen=True)
class GoldenPrompt:
    """A prompt of a published golden set.

    Attributes:
        turns: the user's turns before the answer; a second one follows the answer to the first.
        about: `form`, `id`, and the other columns that the benchmark's own tools need.
        cluster: shared by prompts that are not independent.
    """

    turns: tuple[Message, ...]
    about: dict[str, Any] = field(default_factory=dict)
    cluster: str | None = None


def golden_prompts(row: Row, columns: frozenset[str], *, both_turns: bool) -> list[GoldenPrompt]:
    """Return the prompts of a row of a published set; none for columns of another form.

    Args:
        row: column -> value.
        columns: of the whole file.
        both_turns: for MT-Bench, also the second turn as a prompt that follows the first.

    Raises:
        RowError: for a row that lacks a value of its form.
    """
    for needed, reader in _GOLDEN_READERS:
        if needed <= columns:
            return reader(row, both_turns)
    return []


def _alpaca_eval(row: Row, both_turns: bool) -> list[GoldenPrompt]:
    about = {"form": "alpaca_eval", "id": "", "dataset": str(row.get("dataset") or "")}
    return [GoldenPrompt((says("user", _text_of_column(row, "instruction")),), about)]


def _arena_hard_1(row: Row, both_turns: bool) -> list[GoldenPrompt]:
    """Read v0.1 of Arena-Hard, or MT-Bench: both have `question_id`, `category` and `turns`."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise RowError(f"`turns` is {shown(turns)}; allowed: a list of texts or of {{content}}")
    texts = [turn.get("content") if isinstance(turn, Mapping) else turn for turn in turns]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise RowError("`turns` holds a turn that is empty or no text")
        check_unicode(text)
    name, category = str(_value_of_column(row, "question_id")), str(row.get("category") or "")
    said = tuple(says("user", str(text)) for text in texts)
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
    about = {"form": "arena_hard", "version": "v2.0", "id": str(_value_of_column(row, "uid"))}
    about |= {key: str(row.get(key) or "") for key in ("category", "subcategory")}
    return [GoldenPrompt((says("user", _text_of_column(row, "prompt")),), about)]


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
    return [GoldenPrompt((says("user", _text_of_column(row, "prompt")),), about)]


def _text_of_column(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"`{column}` is {shown(value)}; allowed: a text that is not empty")
    check_unicode(value)
    return value


def _value_of_column(row: Row, column: str) -> Json:
    if row.get(column) in (None, ""):
        raise RowError(f"`{column}` is missing")
    return row[column]


_GOLDEN_READERS: tuple[tuple[frozenset[str], Callable[[Row, bool], list[GoldenPrompt]]], ...] = (
    (frozenset({"instruction_id_list", "prompt"}), _ifeval),
    (frozenset({"uid", "prompt", "category"}), _arena_hard_2),
    (frozenset({"question_id", "turns"}), _arena_hard_1),
    (frozenset({"instruction", "dataset"}), _alpaca_eval),
)
