"""Reasoning in answers: text or token ids -> the answer alone, and the thinking apart (`generate.reasoning`).

Reasoning is a block with which an answer opens, in one of the spellings of `_FORMS`. Blocks that follow it count where
they begin a line or a sentence. A mark in the middle of a sentence or in code is text. Where the prompt ends in an open
block, the answer begins inside of it. A block that does not end is an answer that was cut off.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import regex

from harness.data.records import Message, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEEP, DROP = "keep", "drop"
_TURN_KEYS = frozenset(
    {"thinking", "reasoning", "reasoning_content"}
)  # keys of a turn that templates render as a block


@dataclass(frozen=True)
class _Form:
    """A spelling of reasoning.

    Attributes:
        opens, closes: patterns of the marks.
        ends_prompt: pattern of a prompt that ends in an open block.
        tokens: special tokens of which the marks consist; the first one tells that a vocabulary has this form.
        closes_alone: its close mark is known without an open one.
        must_close: its open mark without a close one is text.
    """

    opens: re.Pattern[str]
    closes: re.Pattern[str]
    ends_prompt: re.Pattern[str]
    tokens: tuple[str, ...]
    closes_alone: bool
    must_close: bool


def _form(opens: str, closes: str, *tokens: str, closes_alone: bool = True, must_close: bool = False) -> _Form:
    begin, end, ends_prompt = (re.compile(pattern, re.IGNORECASE) for pattern in (opens, closes, rf"(?:{opens})\s*\Z"))
    return _Form(begin, end, ends_prompt, tokens, closes_alone, must_close)


def _tag(name: str) -> _Form:
    return _form(rf"<{name}(?:\s[^<>]{{0,80}})?>", rf"</{name}>", f"<{name}>", f"</{name}>")


_TAGS = ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think", "scratchpad", "reflection")
_CHANNEL = r"(?:(?:<\|start\|>\s*)?assistant\s*)?<\|channel\|>\s*"
_FORMS = (
    *map(_tag, _TAGS),
    _form(r"\[THINK\]", r"\[/THINK\]", "[THINK]", "[/THINK]"),  # Magistral
    _form("◁think▷", "◁/think▷", "◁think▷", "◁/think▷"),  # Kimi
    _form(r"<\|START_THINKING\|>", r"<\|END_THINKING\|>", "<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    _form(r"<\|inner_prefix\|>", r"<\|inner_suffix\|>", "<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    _form(r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>", "<|begin_of_thought|>", "<|end_of_thought|>"),
    _form(r"<\|thought_start\|>", r"<\|thought_end\|>", "<|thought_start|>", "<|thought_end|>"),
    _form(r"<\|channel>thought", r"<channel\|>", "<|channel>", "<channel|>"),  # Gemma 4
    _form(
        r"<\|think\|>",
        r"<\|/think\|>|<\|end_think\|>|</think>|<\|end\|>",
        *("<|think|>", "<|/think|>", "<|end_think|>", "</think>", "<|end|>"),
        closes_alone=False,
    ),
    _form(  # gpt-oss
        rf"{_CHANNEL}(?:analysis|commentary)[^<]{{0,80}}<\|message\|>",
        r"<\|end\|>|(?=<\|start\|>\s*assistant)|(?=<\|channel\|>)",
        *("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>"),
        closes_alone=False,
    ),
    _form(  # Granite 3.2
        r"Here(?:'s| is) my thought process:", r"Here(?:'s| is) my response:", closes_alone=False, must_close=True
    ),
    # gpt-oss decoded without its special tokens
    _form(r"analysis(?=\S)", "assistantfinal", closes_alone=False, must_close=True),
)
# What some forms put around the answer itself.
_FRAME_START = re.compile(
    rf"\s*(?:{_CHANNEL}final[^<]{{0,80}}<\|message\|>|<\|START_RESPONSE\|>|<\|begin_of_solution\|>)\s*"
)
_ANSWER_TAGS = re.compile(r"\s*<(answer|response)>(.*)</\1>\s*", re.DOTALL | re.IGNORECASE)  # after thinking alone
_FRAME_END = re.compile(r"<\|(?:return|end|END_RESPONSE|end_of_solution)\|>\Z")

_IGNORED = re.compile(r"[\s\ufeff\u200b\u2060]*")
_FENCE = "```"
_PROMPT_TOKENS = 24
_PROMPT_END = 200  # characters of a prompt in which an open mark is looked for
_SENTENCE_END = regex.compile(r"[\p{Sentence_Terminal}\p{Pe}\p{Pf}…:*]")
_OPEN = re.compile("|".join(form.opens.pattern for form in _FORMS if not form.must_close), re.IGNORECASE)
_CLOSE_ALONE = re.compile("|".join(form.closes.pattern for form in _FORMS if form.closes_alone), re.IGNORECASE)


@dataclass(frozen=True)
class Parted:
    """An answer without its thinking.

    Attributes:
        answer: the text; empty where the thinking does not end.
        thinking: the texts of the blocks, without marks.
        closed: False where the last block does not end.
        spans: places of the blocks in the whole text, with marks and the white space after them; empty without any.
    """

    answer: str
    thinking: str = ""
    closed: bool = True
    spans: tuple[tuple[int, int], ...] = ()


def part(text: str, *, before: str = "", unopened: bool = True) -> Parted:
    """Part an answer from its thinking.

    Args:
        text: the whole answer.
        before: the end of the prompt as the model saw it; where it opens a block, the answer begins with thinking.
        unopened: take a block that ends without having begun for one that began in a prompt which is not known.
    """
    blocks = list(_blocks(text, before, unopened=unopened))
    if not blocks:
        return Parted(_without_frame(text))
    starts = [0, *(block.start for block in blocks[1:])]  # the answer opens with the first one
    spans = tuple((start, block.end) for start, block in zip(starts, blocks, strict=True))
    kept = [text[end:start] for (_, end), (start, _) in zip([(0, 0), *spans], [*spans, (len(text), 0)], strict=True)]
    thinking = "\n\n".join(inner for block in blocks if (inner := text[block.inner : block.close].strip()))
    answer = _without_frame("".join(kept).lstrip())
    tagged = _ANSWER_TAGS.fullmatch(answer)
    return Parted(tagged.group(2).strip() if tagged else answer, thinking, blocks[-1].closed, spans)


def _without_frame(text: str) -> str:
    found = _FRAME_START.match(text)
    return text if found is None else _FRAME_END.sub("", text[found.end() :])


@dataclass(frozen=True)
class _Block:
    """Places of a block: of its open mark, its text, its close mark, and what follows it."""

    start: int
    inner: int
    close: int
    end: int
    closed: bool = True


def _blocks(text: str, before: str, *, unopened: bool) -> Iterator[_Block]:
    position = _skip_space(text, 0)
    form = next((form for form in _FORMS if form.ends_prompt.search(before[-_PROMPT_END:])), None)
    if form is not None:
        closed = form.closes.search(text)
        if closed is None:
            yield _Block(0, 0, len(text), len(text), closed=False)
            return
        yield _Block(0, 0, closed.start(), position := _skip_space(text, closed.end()))
    else:
        form = next((form for form in _FORMS if _opens(form, text, position)), None)
    if form is None and unopened and (alone := _close_alone(text)):
        yield _Block(0, 0, alone.start(), position := _skip_space(text, alone.end()))
        form = next(form for form in _FORMS if form.closes.fullmatch(alone.group()))
    if form is None:
        return
    while opened := form.opens.match(text, position):
        block = _block_from(form, text, opened)
        yield block
        position = block.end
    yield from _later_blocks(form, text, position)


def _opens(form: _Form, text: str, position: int) -> bool:
    opened = form.opens.match(text, position)
    return opened is not None and not (form.must_close and form.closes.search(text, opened.end()) is None)


def _block_from(form: _Form, text: str, opened: re.Match[str]) -> _Block:
    closed = form.closes.search(text, opened.end())
    if closed is None:
        return _Block(opened.start(), opened.end(), len(text), len(text), closed=False)
    return _Block(opened.start(), opened.end(), closed.start(), _skip_space(text, closed.end()))


def _later_blocks(form: _Form, text: str, position: int) -> Iterator[_Block]:
    """Yield the blocks after the first answer text: those that begin a line or a sentence, and not in code."""
    code = _Code(text, position)
    while found := form.opens.search(text, position):
        position = found.end()
        if not code.holds(found.start()) and _begins(text, found.start()):
            block = _block_from(form, text, found)
            yield block
            position = block.end


def _close_alone(text: str) -> re.Match[str] | None:
    """Return the first close mark without an open one before it, not in code and not in the middle of a sentence."""
    opened, code = _OPEN.search(text), _Code(text, 0)
    for found in _CLOSE_ALONE.finditer(text, 0, opened.start() if opened else len(text)):
        is_glued = text[found.start() - 1 : found.start()] not in ("", *" `'\"(“‘«")
        if not code.holds(found.start()) and (is_glued or _begins(text, found.start())):
            return found
    return None


def _begins(text: str, position: int) -> bool:
    """Return whether a place begins a line or a sentence."""
    before = text[max(0, position - 20) : position].rstrip(" \t")
    return not before or before[-1] in "\r\n" or _SENTENCE_END.match(before[-1]) is not None


def _skip_space(text: str, position: int) -> int:
    found = _IGNORED.match(text, position)
    return found.end() if found else position


class _Code:
    """Tells of growing places in a text whether they stand in a fenced block or right after a backtick."""

    def __init__(self, text: str, start: int) -> None:
        self.text, self._seen, self._fences = text, start, 0

    def holds(self, position: int) -> bool:
        self._fences += self.text.count(_FENCE, self._seen, position)
        self._seen = position
        return self._fences % 2 == 1 or self.text[position - 1 : position] == "`"


class AnswerReader:
    """Reads generated token ids: the answer, and the thinking apart.

    Args:
        tokenizer: a transformers tokenizer.
        reasoning: `generate.reasoning`: `auto`, `keep` or `drop`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reasoning: str) -> None:
        self._tokenizer, self._keeps = tokenizer, reasoning == KEEP
        known = [form for form in _FORMS if form.tokens and _has_token(tokenizer, form.tokens[0])]
        self._unopened = bool(known) or reasoning == DROP
        marks = {text for form in known for text in form.tokens}
        special = set(tokenizer.all_special_ids)
        special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        marked = {number for number in special if tokenizer.convert_ids_to_tokens(number) in marks}
        self._hidden = frozenset(special - marked) if marked else None

    def read(self, asked: Sequence[int], answer: Sequence[int]) -> tuple[Parted, int]:
        """Part generated ids.

        Args:
            asked: ids of the prompt.
            answer: generated ids, without the one that ends the turn.

        Returns:
            The parted text, and the number of tokens in its blocks.
        """
        text = self._text_of(answer)
        if self._keeps:
            return Parted(text), 0
        before = self._tokenizer.decode(list(asked[-_PROMPT_TOKENS:]))
        parted = part(text, before=before, unopened=self._unopened)
        places = [[self._tokens_before(answer, place) for place in span] for span in parted.spans]
        return parted, sum(end - start for start, end in places)

    def _text_of(self, ids: Sequence[int]) -> str:
        """Decode ids without special tokens, except those that mark reasoning."""
        if self._hidden is None or self._keeps:
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return self._tokenizer.decode([token for token in ids if token not in self._hidden])

    def _tokens_before(self, ids: Sequence[int], position: int) -> int:
        """Return how many tokens end before a place in the text, or at it."""
        counts = range(1, len(ids) + 1)
        return bisect.bisect_right(counts, position, key=lambda count: len(self._text_of(ids[:count])))


def close_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that ends reasoning in a vocabulary; None where there is none."""
    tokens = [form.tokens[1] for form in _FORMS if form.closes_alone and _has_token(tokenizer, form.tokens[0])]
    return next((tokenizer.convert_tokens_to_ids(text) for text in tokens if _has_token(tokenizer, text)), None)


def _has_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    found = tokenizer.convert_tokens_to_ids(text)
    return found is not None and found != tokenizer.unk_token_id


def without_reasoning(pairs: Iterable[Pair]) -> tuple[list[Pair], dict[str, int]]:
    """Take the thinking out of both answers of each pair; earlier turns stay as they are.

    Returns:
        The pairs, and the number of those that have no two different answers left, by reason.
    """
    kept, dropped = [], Counter[str]()
    for pair in pairs:
        chosen, rejected = _answers_alone(pair.chosen), _answers_alone(pair.rejected)
        if chosen is None or rejected is None:
            dropped["an answer is nothing but thinking"] += 1
        elif chosen == rejected and pair.chosen != pair.rejected:
            dropped["the answers differ in their thinking alone"] += 1
        else:
            kept.append(replace(pair, chosen=chosen, rejected=rejected))
    return kept, dict(dropped)


def _answers_alone(turns: Sequence[Message]) -> tuple[Message, ...] | None:
    """Return turns without thinking; None where one of the assistant's has nothing else."""
    found = tuple(_turn_alone(turn) for turn in turns)
    return found if all(turn["content"].strip() for turn in found) else None


def _turn_alone(turn: Message) -> Message:
    if turn["role"] != "assistant":
        return turn
    others = {key: value for key, value in turn.items() if key not in _TURN_KEYS}
    return cast("Message", others | {"content": part(turn["content"]).answer})
