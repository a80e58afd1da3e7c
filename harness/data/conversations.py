"""Values of `prompt`, `chosen`, `rejected` (texts, turns, transcripts) -> a `Conversation`, or a `RowError`.

A prompt that is not given is found as the common beginning of both answers. Text is taken unchanged: nothing is cut,
trimmed or repaired. Transcripts (HH-RLHF) are the exception: white space around a turn belongs to their markers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from harness.data.records import Message, meaning
from harness.study.files import Json, digest

Turns = list[Message]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
# Scripts that put no spaces between words: Thai to Khmer, kana, Han. A prompt may end anywhere in them.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[^\W{_UNSPACED}]+(?:[.,'’\-][^\W{_UNSPACED}]+)*")

MEDIA = ("images", "image", "videos", "video", "audios", "audio")  # columns and keys of turns that hold no text
# The form with a guessed prompt; `table_warnings` warns of it.
IMPLICIT_TEXT = "TRL standard, implicit prompt"


class RowError(ValueError):
    """A row that cannot be used, with the reason."""


@dataclass(frozen=True)
class Conversation:
    """A prompt with two answers or none, and the name of its form in the file.

    Attributes:
        chosen: the preferred answer; None where the row holds a prompt alone.
        conversational: False where prompt and answers are plain text without turns.
    """

    form: str
    prompt: Sequence[Message]
    chosen: Sequence[Message] | None
    rejected: Sequence[Message] | None
    conversational: bool


def shown(value: Json) -> str:
    """Return a value for a message: one short line without invisible characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def text_or_turns(value: Json, column: str) -> str | Turns:
    """Return a column's text unchanged, or its turns as {role, content}, from {from, value} as well."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return [_read_turn(value, column)]
    if isinstance(value, list):
        return [_read_turn(item, column) for item in value]
    raise RowError(f"`{column}` is of type {type(value).__name__}; allowed: text, or a list of {{role, content}}")


def _read_turn(turn: Json, column: str) -> Message:
    """Read one turn with all its keys; those that are null or empty count as absent: tables fill them in."""
    if not isinstance(turn, Mapping):
        raise RowError(
            f"`{column}` has a turn of type {type(turn).__name__}; allowed: {{role, content}} or {{from, value}}"
        )
    turn = {key: without_nulls(value) for key, value in turn.items() if value is not None}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(f"`{column}` has a turn of role {shown(role)}; allowed: {', '.join(_ROLES)}")
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) and call for call in calls):
        raise RowError(f"`{column}` has a turn whose `tool_calls` are {shown(calls)}; allowed: a list of mappings")
    if content is None and not calls:
        raise RowError(f"`{column}` has a {role} turn whose content is of type NoneType; allowed: text")
    text = _text_of_parts(content or "", f"`{column}` has a {role} turn")
    if not text.strip() and role != "system" and not calls:
        raise RowError(f"`{column}` has an empty {_ROLES[role]} turn")
    if media := next((name for name in MEDIA if turn.get(name)), None):
        raise RowError(f"`{column}` has a turn with `{media}`, and only text is read; take such rows out")
    read = ("role", "from", "content", "value")
    more = {str(key): value for key, value in turn.items() if key not in read and value not in ("", [], {})}
    return cast(Message, {"role": _ROLES[role], "content": text, **more})


def _text_of_parts(content: Json, place: str) -> str:
    """Return a content as text: it is text, or a list of parts that hold text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise RowError(f"{place} whose content is of type {type(content).__name__}; allowed: text")
        kind = part.get("type", "text" if "text" in part else None)
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text", ""), str):
            raise RowError(f"{place} with a part of type {shown(kind)}; allowed: text (images and sound are not read)")
        texts.append(str(part.get("text", "")))
    return "".join(texts)


def without_nulls(value: Json) -> Json:
    """Return a JSON value without the keys that are null, at any depth.

    Parquet files, and JSON files that `datasets` wrote, give every mapping of a column all keys of the column.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def from_texts(prompt: str | Turns | None, chosen: str, rejected: str) -> Conversation:
    """Read text answers: after a prompt, as transcripts, or with the prompt as their common beginning."""
    transcripts = [_TRANSCRIPT.match(text) is not None for text in (chosen, rejected)]
    if all(transcripts):
        turns = _transcript(chosen, "chosen"), _transcript(rejected, "rejected")
        return _repeated_prompt(prompt, *turns, form="HH-RLHF transcript")
    if prompt is not None:
        return _after_prompt(prompt, chosen, rejected)
    if any(transcripts):
        raise RowError("one of `chosen` and `rejected` is a transcript (Human: ... Assistant: ...), the other is not")
    start = _common_beginning(chosen, rejected)
    if not chosen[:start].strip():
        raise RowError("no `prompt`, and `chosen` and `rejected` have no beginning in common")
    answers = [says("assistant", chosen[start:])], [says("assistant", rejected[start:])]
    return Conversation(IMPLICIT_TEXT, [says("user", chosen[:start])], *answers, False)


def _after_prompt(prompt: str | Turns, chosen: str, rejected: str) -> Conversation:
    turns_before, conversational = as_turns(prompt)
    is_transcript = isinstance(prompt, str) and conversational
    chosen, rejected = (chosen.strip(), rejected.strip()) if is_transcript else (chosen, rejected)
    name = "HH-RLHF transcript" if is_transcript else "TRL conversational" if conversational else "TRL standard"
    answers = [says("assistant", chosen)], [says("assistant", rejected)]
    return Conversation(f"{name}, explicit prompt", turns_before, *answers, conversational)


def from_turns(prompt: str | Turns | None, chosen: Turns, rejected: Turns, *, sharegpt: bool) -> Conversation:
    """Read answers in turns: the answer alone, or the whole conversation."""
    repeats = [answer[0]["role"] != "assistant" for answer in (chosen, rejected)]
    if repeats[0] != repeats[1]:
        raise RowError("one of `chosen` and `rejected` begins with the prompt, the other does not")
    if repeats[0]:
        form = "UltraFeedback-binarized" if isinstance(prompt, str) else "TRL conversational, implicit prompt"
        return _repeated_prompt(prompt, chosen, rejected, form=form)
    if prompt is None:
        raise RowError("no `prompt`, and `chosen` and `rejected` begin with an assistant turn")
    form = "ShareGPT" if sharegpt else "TRL conversational, explicit prompt"
    return Conversation(form, as_turns(prompt)[0], chosen, rejected, True)


def _repeated_prompt(prompt: str | Turns | None, chosen: Turns, rejected: Turns, *, form: str) -> Conversation:
    """Split two conversations at the first different turn; a prompt that is also given must be the same."""
    _check_ends(chosen, rejected)
    shortest = min(len(chosen), len(rejected)) - 1  # each keeps an answer
    shared = next((i for i in range(shortest) if not _same(chosen[i], rejected[i])), shortest)
    if isinstance(prompt, list) and not _all_same(prompt, chosen):  # UltraFeedback's `messages` is a copy of `chosen`
        if not prompt or not _all_same(prompt, chosen[: len(prompt)]) or len(prompt) > shared:
            raise RowError("`chosen` and `rejected` are whole conversations that do not begin with the prompt given")
        shared = len(prompt)
    elif isinstance(prompt, str) and prompt.strip():
        _check_same_prompt(prompt, chosen[:shared])
    if {chosen[shared]["role"], rejected[shared]["role"]} != {"assistant"}:
        raise RowError(
            f"`chosen` and `rejected` answer different prompts: they part at turn {shared + 1}, before an answer"
        )
    return Conversation(form, chosen[:shared], chosen[shared:], rejected[shared:], True)


def _same(turn: Message, other: Message) -> bool:
    return meaning(turn) == meaning(other)


def _all_same(turns: Turns, others: Turns) -> bool:
    return [*map(meaning, turns)] == [*map(meaning, others)]


def _check_same_prompt(text: str, turns: Turns) -> None:
    """Refuse a prompt column that is neither one of the turns nor a rendering of all turns."""
    given = " ".join(text.split())
    contents = [" ".join(turn["content"].split()) for turn in turns]
    if given not in contents and not (contents and all(content in given for content in contents)):
        raise RowError(
            "`prompt` is not in the conversation that `chosen` and `rejected` repeat; "
            "remove the column `prompt` if they are right"
        )


def as_turns(prompt: str | Turns) -> tuple[Turns, bool]:
    """Return a prompt as turns, and whether it is conversational, as an open transcript (... Assistant:) is."""
    if isinstance(prompt, list):
        return prompt, True
    if not prompt.strip():
        raise RowError("the prompt is empty")
    if _TRANSCRIPT.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        return _transcript(prompt.rstrip().removesuffix("\n\nAssistant:"), "prompt"), True
    return [says("user", prompt)], False


def _transcript(text: str, column: str) -> Turns:
    parts = _MARKER.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [_read_turn({"role": roles[marker], "content": content.strip()}, column) for marker, content in turns]


def says(role: str, content: str) -> Message:
    """Return one turn."""
    return {"role": role, "content": content}


def _common_beginning(chosen: str, rejected: str) -> int:
    """Return the end of the common beginning: not inside a word, and before spaces.

    TRL's `extract_prompt` cuts at the first character that differs, so that "blue" and "black" become "ue" and "ack".
    """
    end = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    before = -1
    while end != before:
        before = end
        end = min(_word_start(text, end) for text in (chosen, rejected))
    return len(chosen[:end].rstrip(" "))


def _word_start(text: str, position: int) -> int:
    """Return the start of the word or grapheme around a position, or the position itself between words."""
    while 0 < position < len(text) and _continues(text, position):
        position -= 1
    start = max(text.rfind(space, 0, position) for space in " \n\t") + 1
    around = (match.start() for match in _WORD.finditer(text, start) if match.start() < position < match.end())
    return next(around, position)


def _continues(text: str, position: int) -> bool:
    """Return True where a combining mark or a joiner ties the character at a position to the one before."""
    return unicodedata.category(text[position])[0] == "M" or "\u200d" in text[position - 1 : position + 1]


def check_turns(conversation: Conversation) -> None:
    """Raise a `RowError` for a conversation that cannot be trained on or answered."""
    prompt, chosen, rejected = conversation.prompt, conversation.chosen, conversation.rejected
    if not any(turn["role"] == "user" for turn in prompt):
        raise RowError("the prompt is empty: it has no user turn")
    if prompt[-1]["role"] == "assistant":
        raise RowError("the prompt ends in an assistant turn; allowed: a turn that the assistant answers")
    if chosen is not None and rejected is not None:
        _check_answers(chosen, rejected)
    for turn in (*prompt, *(chosen or ()), *(rejected or ())):
        check_unicode(turn["content"])


def _check_answers(chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    _check_ends(chosen, rejected)
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer[-1]["content"].strip() and "tool_calls" not in answer[-1]:
            raise RowError(f"`{column}` is empty after what both answers have in common")
    said = [[meaning({**turn, "content": turn["content"].strip()}) for turn in answer] for answer in (chosen, rejected)]
    if said[0] == said[1]:
        raise RowError("`chosen` and `rejected` are identical")
    shortest = min(len(chosen), len(rejected))
    if said[0][:shortest] == said[1][:shortest]:
        raise RowError("one of `chosen` and `rejected` is the other with further turns: they are not two answers")


def _check_ends(chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != "assistant":
            raise RowError(f"`{column}` does not end in an assistant turn")


def check_unicode(text: str) -> None:
    """Raise a `RowError` for text that no file and no tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = f"\\u{ord(text[error.start]):04x}"
        raise RowError(
            f"invalid Unicode: a lone surrogate ({broken}) at character {error.start + 1} of a text"
        ) from error


def prompt_key(prompt: Sequence[Message]) -> str:
    """Return the hash of the normalised prompt (case and white space folded): equal keys mean the same prompt.

    The text is the user's turn where there is one only, without a system turn; else the whole conversation.
    """
    users = [turn["content"] for turn in prompt if turn["role"] == "user"]
    if len(users) == 1:
        return digest(_fold_text(users[0]))
    return digest([[turn["role"], _fold_text(turn["content"])] for turn in prompt])


def _fold_text(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
