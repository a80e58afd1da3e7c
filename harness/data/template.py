"""The chat template of a tokenizer: turns, tools and keyword arguments -> text, at a fixed date; how it ends a turn.

A template sees no clock but the date that it is given, so that it writes the same on another day. A template that
fails, or that does not write the same twice, is a `UsageError`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.data.records import NOTHING, Given, Message
from harness.study.errors import UsageError
from harness.study.limits import TooSlowError, time_limit
from harness.study.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = tuple[Sequence[Message], Given]  # turns, and what the template gets beside them

_SECONDS = 2.0  # of CPU time for one conversation; a real template needs some thousandths
_MOST_CHARS, _TIMES = 1_000_000, 20  # a text may have so many characters, and so many for each one of the conversation
_TRIED = 8  # conversations on which it is tried whether a template writes a key
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CHANCE = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
_DIRECTIVES = "aAbBcCdDeFfgGhHIjklmMnpPrRStTuUVwWxXyYzZ%"
_FLAGS = ("", "-", "_", "0", "^", "#")
# Two dates that differ in everything that a template may write of them.
_DATES = (datetime(2001, 2, 3, 4, 5, 6), datetime(2017, 11, 28, 19, 47, 58))
# Stands before a template in place of the clock; a macro, so that nothing of the library has to be exchanged.
_CLOCK = """{%- macro strftime_now(format) -%}
{%- set dates, at = DATES, namespace(directive=none) -%}
{%- for char in format -%}
{%- if at.directive is none -%}
{%- if char == "%" -%}{%- set at.directive = "" -%}{%- else -%}{{ char }}{%- endif -%}
{%- elif char in "-_0^#" and at.directive == "" -%}{%- set at.directive = char -%}
{%- else -%}{{ dates.get(at.directive ~ char, "%" ~ at.directive ~ char) }}{%- set at.directive = none -%}{%- endif -%}
{%- endfor -%}
{%- endmacro %}
"""


def at_date(template: str, date: datetime) -> str:
    """Return a template that writes this date where it would write that of the clock."""
    if not _mentions(template, "strftime_now"):
        return template
    said = {flag + letter: date.strftime(f"%{flag}{letter}") for flag in _FLAGS for letter in _DIRECTIVES}
    return _CLOCK.replace("DATES", json.dumps(said)) + template


def fix_date(tokenizer: PreTrainedTokenizerBase, date: datetime) -> None:
    """Let a tokenizer that is used for nothing else write this date in place of that of the clock."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        tokenizer.chat_template = {name: at_date(text, date) for name, text in found.items()}
    elif found:
        tokenizer.chat_template = at_date(found, date)


def _mentions(template: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", _COMMENT.sub("", template)) is not None


class ChatTemplate:
    """A tokenizer's chat template at a date.

    Args:
        tokenizer: with `chat_template`, one text or several by name.
        date: what the template takes for the time of rendering.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime) -> None:
        self._tokenizer, self._date = tokenizer, date
        self._texts: dict[tuple[bool, datetime], str] = {}

    def render(
        self, turns: Sequence[Message], given: Given, *, add_generation_prompt: bool, date: datetime | None = None
    ) -> str:
        """Return the text of a conversation.

        Raises:
            UsageError: where the template fails, whatever it raises.
        """
        date = date or self._date
        messages = [dict(turn) for turn in turns]
        key = (bool(given.tools), date)
        if key not in self._texts:
            self._texts[key] = at_date(self._source(given), date)
        try:
            with time_limit(_SECONDS):
                text: str = self._tokenizer.apply_chat_template(
                    messages,
                    tools=list(given.tools) or None,
                    chat_template=self._texts[key],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **dict(given.kwargs),
                )
        except Exception as error:  # a template can raise whatever Python can
            raise UsageError(_refusal(messages, error)) from error
        if len(text) > _MOST_CHARS and len(text) > _TIMES * len(str((messages, given))):
            raise UsageError(
                f"the chat template writes {len(text):,} characters for a conversation with the turns "
                f"{_roles(messages)}; mend it, or give another one with model.chat_template"
            )
        return text

    def mentions(self, word: str, given: Given = NOTHING) -> bool:
        """Return whether the template has a word, outside of comments: what it does not name it cannot take."""
        return _mentions(self._source(given), word)

    @property
    def reads_clock(self) -> bool:
        """Whether the template may write a date or a time."""
        return self.mentions("strftime_now")

    def refuse_chance(self, turns: Sequence[Message], given: Given) -> None:
        """Raise a UsageError for a template that may write the same conversation in two ways."""
        found = _CHANCE.search(_COMMENT.sub("", self._source(given)))
        texts = [self.render(turns, given, add_generation_prompt=True) for _ in range(2)]
        address = _ADDRESS.search(texts[0])
        if address and any(address.group() in turn["content"] for turn in turns):
            address = None
        what = found.group().strip("| (") if found else f"an address in memory ({address.group()})" if address else ""
        if what or texts[0] != texts[1]:
            raise UsageError(
                "the chat template does not write the same conversation twice in the same way"
                f"{f': it uses {what}' if what else ''}; the arms would be trained on other prompts than they are "
                "scored on; give a template without chance with model.chat_template"
            )

    def depends_on_date(self, turns: Sequence[Message], given: Given) -> bool:
        """Return whether a conversation is written in another way on another day."""
        texts = {self.render(turns, given, add_generation_prompt=True, date=date) for date in _DATES}
        return len(texts) > 1

    def _source(self, given: Given) -> str:
        try:
            return self._tokenizer.get_chat_template(tools=list(given.tools) or None)
        except ValueError as error:
            raise UsageError(
                f"the tokenizer has the chat templates {', '.join(self._tokenizer.chat_template)} and none of the name "
                "`default`; give one with model.chat_template"
            ) from error


def _roles(messages: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(message["role"]) for message in messages)


def _refusal(messages: Sequence[dict[str, Any]], error: Exception) -> str:
    from jinja2 import TemplateError

    roles = _roles(messages)
    if isinstance(error, TooSlowError):
        return (
            f"the chat template needs more than {_SECONDS:g} s for a conversation with the turns {roles}, as where a "
            "loop does not end; mend it, or give another one with model.chat_template"
        )
    if isinstance(error, TemplateError):
        return (
            f"the chat template refuses a conversation with the turns {roles}: {error}; "
            "take such rows out, or give another template with model.chat_template"
        )
    return (
        f"the chat template fails on a conversation with the turns {roles} "
        f"({type(error).__name__}: {one_line(str(error), 200)}); mend it, or give another one with model.chat_template"
    )


def takes(template: ChatTemplate, name: str, rows: Sequence[Conversation]) -> bool:
    """Return whether a template takes what rows give it under a name; it must write the names of tools."""
    turns, given = rows[0]
    if not template.mentions(name, given):
        return False
    if name != "tools":
        return True  # a value may be the template's own default
    render = template.render
    text = render(turns, given, add_generation_prompt=True)
    functions: list[Any] = [tool.get("function", tool) for tool in given.tools if isinstance(tool, Mapping)]
    names = [str(function["name"]) for function in functions if "name" in function]
    without = Given((), given.kwargs)
    return all(name in text for name in names) and text != render(turns, without, add_generation_prompt=True)


def unread_keys(template: ChatTemplate, rows: Sequence[tuple[Sequence[Message], Given, int]]) -> Counter[str]:
    """Count the turns with a key that does not change what the template writes, by key.

    Args:
        template: the template.
        rows: turns, what the template gets beside them, and the turn from which on they count.
    """
    found: dict[str, list[Conversation]] = {}
    counts = Counter[str]()
    for turns, given, start in rows:
        keys = Counter(key for turn in turns[start:] for key in turn if key not in ("role", "content"))
        counts += keys
        for key in keys:
            found.setdefault(key, []).append((turns, given))
    unread = [key for key, examples in found.items() if not _writes(template, key, examples[:_TRIED])]
    return Counter({key: counts[key] for key in unread})


def _writes(template: ChatTemplate, key: str, rows: Sequence[Conversation]) -> bool:
    for turns, given in rows:
        without: Any = [{name: value for name, value in turn.items() if name != key} for turn in turns]
        texts = [template.render(each, given, add_generation_prompt=False) for each in (turns, without)]
        if texts[0] != texts[1]:
            return True
    return False


class TurnEnd(NamedTuple):
    """How a template ends the assistant's turn: with a token, or why it is not known.

    Attributes:
        token: the token's id; None where there is no such token, or none was found.
        problem: why answers cannot end; empty where the template refuses the conversation that was tried.
    """

    token: int | None
    problem: str


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> TurnEnd:
    """Find the token with which a template ends the assistant's turn, from a short conversation."""
    after = _text_after_answer(template)
    if after is None:
        return TurnEnd(None, "")
    ids = [i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if tokenizer.decode([i]).strip()]
    # GPT-2 and GPT-NeoX have one token for the end of turns and for unknown text.
    known = bool(ids) and (ids[0] != tokenizer.unk_token_id or after.strip().startswith(str(tokenizer.unk_token)))
    if known and (ids[0] in tokenizer.added_tokens_decoder or len(ids) == 1):
        return TurnEnd(ids[0], "")
    way_out = (
        "end it with one token, such as {{ eos_token }} after the assistant's content, in a template of your own "
        "(model.chat_template)"
    )
    if not after.strip():
        return TurnEnd(None, f"the chat template does not end the assistant's turn: answers would never end; {way_out}")
    return TurnEnd(
        None,
        f"the chat template ends the assistant's turn with {after.strip()[:60]!r}, which is no token of this tokenizer "
        f"but {len(ids)} in a row, so that generation cannot stop there; {way_out}",
    )


def _text_after_answer(template: ChatTemplate) -> str | None:
    """Return what a template writes after an answer; None where it refuses, or rewrites, the conversations tried."""
    ask: Message = {"role": "user", "content": "say it"}
    said: Message = {"role": "assistant", "content": "quite so"}
    for before in ([], [Message(role="system", content="be brief")]):
        try:
            text = template.render([*before, ask, said], NOTHING, add_generation_prompt=False)
        except UsageError:
            continue
        if said["content"] in text:
            return text.rpartition(said["content"])[2]
    return None
