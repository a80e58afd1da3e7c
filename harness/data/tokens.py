"""Pairs (text) -> token ids, once, before any trainer; all arms train on these ids and on no others.

Ids of prompt and answer, joined, are the chat template's own rendering of the conversation. Pairs that do not fit are
dropped for all arms alike. Stock TRL trainers tokenise for themselves and disagree: `CPOTrainer` adds an EOS or a BOS
and truncates differently.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data.conversations import RowError
from harness.data.records import NOTHING, EvalPrompt, Given, Message, Pair
from harness.data.template import ChatTemplate, TurnEnd, end_of_turn
from harness.data.token_rows import TokenisedPairs, TokenPair, TokenRows, canonical_bytes
from harness.data.written import ASKED, NOT_ASKED, Readback, left_out
from harness.study.errors import UsageError
from harness.study.files import Json
from harness.study.manifest import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CHANGED",
    "ChatFormat",
    "TokenPair",
    "TokenisedPairs",
    "canonical_bytes",
    "load_chat_format",
    "tokenise_pairs",
]

# Put before an answer that is encoded apart, so that the tokenizer adds no space of its own in front of it.
_ANCHORS = ("", "\n", ".", ":", ")", "a")
# Why pairs are dropped whose answer is not what would be trained on.
CHANGED = (
    "the chat template cuts or rewrites the answer (two ways out: generate.reasoning=drop takes thinking out of both "
    "answers; model.chat_template gives a template that leaves answers as they are)"
)
TWICE = (
    "the chat template writes the answer more than once; give a template that writes it once with model.chat_template"
)
_PROBE = "qzvkxjw"  # an answer that no template holds


class ChatFormat:
    """Converts conversations to token ids, in the same way for training, held-out scoring and generation.

    BOS stands once, in front, where the chat template or the tokenizer's own encoding puts it. A template without BOS
    does not take it from a model that was trained with one.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: ids at which generation stops by the checkpoint's own settings.
        use_template: put plain-text prompts through the chat template, where there is one.
        date: what the template takes for the time of rendering; None is now.

    Attributes:
        stop_ids: those given, the tokenizer's EOS, and the token with which the chat template ends a turn.

    Raises:
        UsageError: for a tokenizer without `eos_token`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Iterable[int] = (),
        *,
        use_template: bool = True,
        date: datetime | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no eos_token; set one in the checkpoint's tokenizer_config.json")
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, date or datetime.now())
        self.end = end_of_turn(tokenizer, self.template) if tokenizer.chat_template else TurnEnd(None, "")
        self._own_stops = frozenset(stop_ids) | {tokenizer.eos_token_id}
        self.stop_ids = self._own_stops | ({self.end.token} if self.end.token is not None else set())
        self.use_template = use_template
        self._head: tuple[Sequence[Message], Given, str] | None = None  # the prompt that was rendered last
        self._encode_head = functools.lru_cache(maxsize=1)(self._encode)  # both answers follow one prompt
        first = self._encode("a")[:1] or [tokenizer.eos_token_id]
        self._opening = list(itertools.takewhile(lambda token: token not in first, tokenizer("a")["input_ids"]))
        ends = {text for text, token in tokenizer.added_tokens_encoder.items() if token in self.stop_ids}
        self._end = re.compile(rf"(?:(?:{_pattern_of(ends)})\s*)+\Z")
        self._control = re.compile(_pattern_of(_control_tokens(tokenizer) | ends))

    @property
    def reads_clock(self) -> bool:
        """Whether token ids may depend on the date."""
        return bool(self.tokenizer.chat_template) and self.template.reads_clock

    def prompt_ids(self, prompt: Sequence[Message], *, conversational: bool, given: Given = NOTHING) -> list[int]:
        """Return the prompt's ids, up to the begin of the assistant's turn.

        A control token in the text acts as one, as in a served model. Pairs with one are not trained on (see
        `unusable`); an evaluation prompt with one is answered, by every arm from the same ids.
        """
        bos = self.tokenizer.bos_token_id
        ids = self._encode_head(self._text_of_prompt(prompt, conversational=conversational, given=given))
        body = list(itertools.dropwhile(lambda token: token == bos, ids))
        opening = [t for t in self._opening if t == bos] if self.templated(conversational) else self._opening
        written = ids[:1] if len(body) < len(ids) else []
        return [*(opening or written), *body]

    def answer_ids(
        self, prompt: Sequence[Message], answer: Sequence[Message], *, conversational: bool, given: Given = NOTHING
    ) -> list[int]:
        """Return the answer's ids after the prompt's; the last one, and in a single turn no other, ends the turn.

        Prompt and answer are encoded as one text. Where tokens merge across the boundary, and so change the prompt's
        ids, the answer is encoded apart: generation starts from the prompt's ids, too.

        Raises:
            RowError: where the template does not write the answer as it is, or does not end its turn.
            UsageError: for a template with which no answer can be trained on.
        """
        head = self._text_of_prompt(prompt, conversational=conversational, given=given)
        if not self.templated(conversational):
            ids = self._ids_after(head, answer[-1]["content"])
            return self._end_once(ids, otherwise=self._end_of_text(head))
        if self.end.problem:
            raise UsageError(self.end.problem)
        text = self._text_after_head(prompt, self._without_ends(answer), head, given)
        return self._end_once(self._ids_after(head, text), otherwise=None)

    def unusable(self, pair: Pair) -> str | None:
        """Return why a pair cannot be trained on: its text contains a control token, which would act as one.

        Allowed are an end of turn at the end of an answer, and control tokens in a plain-text prompt without a
        template around it: it may be written in the template's form.
        """
        templated = self.templated(pair.conversational)
        found = self._find_control([*map(_said, pair.prompt), list(pair.given.tools)]) if templated else None
        if found is not None:
            hint = "" if pair.conversational else " (is it in the template's form already? data.template=never)"
            return f"prompt contains the control token {found}{hint}"
        answers = [*self._without_ends(pair.chosen), *self._without_ends(pair.rejected)]
        found = self._find_control(map(_said, answers))
        return None if found is None else f"answer contains the control token {found}"

    def left_out(self, prompt: Sequence[Message], *, conversational: bool, given: Given = NOTHING) -> dict[str, str]:
        """Return the turns of a prompt that the chat template leaves out or rewrites; see `written.left_out`."""
        if not self.templated(conversational):
            return {}
        return left_out(prompt, self._text_of_prompt(prompt, conversational=conversational, given=given))

    def look_at(self, row: Pair | EvalPrompt, ids: Sequence[Sequence[int]], readback: Readback) -> None:
        """Count what of a row does not read back from the ids of its prompt and its answers."""
        about: dict[str, Any] = {"conversational": row.conversational, "given": row.given}
        texts = [(self._text_of_prompt(row.prompt, **about), ids[0])]
        for answer, own in zip((row.chosen, row.rejected) if isinstance(row, Pair) else (), ids[1:], strict=True):
            texts += [(turn["content"], own) for turn in self._without_ends(answer) if turn["role"] == "assistant"]
        readback.look(texts, self.left_out(row.prompt, **about))

    def goes_on(self, ids: Sequence[int], answer: Sequence[Message]) -> bool:
        """Return whether an answer of one turn has an end of turn before its last id."""
        return len(answer) == 1 and not self.stop_ids.isdisjoint(ids[:-1])

    def findings(self, conversations: Sequence[tuple[Sequence[Message], Given]]) -> Iterator[Finding]:
        """Prove on prompts of a study that the template writes them the same on any day, and name its end of turn.

        Raises:
            UsageError: for a template that writes the same conversation in two ways.
        """
        for turns, given in conversations:
            self.template.refuse_chance(turns, given)
        dated = any(self.template.depends_on_date(turns, given) for turns, given in conversations)
        if dated:
            yield Finding(
                "date", "warned", "the chat template writes the date; all trials get that of the registration"
            )
        else:
            yield Finding("date", "proved", "the chat template writes the same on another day")
        if self.end.token is None:
            return
        end, own = (self.named([self.end.token]), self.named(sorted(self._own_stops)))
        if self.end.token in self._own_stops:
            yield Finding("end of turn", "proved", f"the chat template ends a turn with {end}, where generation stops")
        else:
            yield Finding(
                "end of turn",
                "warned",
                f"the chat template ends a turn with {end}, and the checkpoint stops at {own} alone; this study stops "
                "at both, and so must a server of the model (eos_token_id in generation_config.json)",
            )

    def templated(self, conversational: bool) -> bool:
        """Return whether a prompt goes through the chat template."""
        has_template = bool(self.tokenizer.chat_template)
        if conversational and not has_template:
            raise UsageError(
                "the pairs are conversations and the tokenizer has no chat template; "
                "give one with model.chat_template=FILE"
            )
        return has_template and (conversational or self.use_template)

    def named(self, ids: Iterable[int]) -> str:
        """Return tokens for a message, each with its id."""
        return ", ".join(f"{self.tokenizer.convert_ids_to_tokens(token)} (id {token})" for token in ids)

    def _text_of_prompt(self, prompt: Sequence[Message], *, conversational: bool, given: Given) -> str:
        """Return the text up to the begin of the assistant's turn."""
        if self.templated(conversational):
            if self._head and self._head[0] is prompt and self._head[1] is given:
                return self._head[2]
            text = self.template.render(prompt, given, add_generation_prompt=True)
            self._head = (prompt, given, text) if isinstance(prompt, tuple) else None  # a list may change
            return text
        if given:
            raise UsageError(
                f"the data give the chat template {', '.join(given.names)}, and prompts do not go through one; remove "
                "these columns, or give a template that takes them with model.chat_template (data.template=auto)"
            )
        return prompt[-1]["content"]

    def _text_after_head(self, prompt: Sequence[Message], answer: Sequence[Message], head: str, given: Given) -> str:
        """Return the template's text after `head`, in which the answer must stand, and the assistant's header not."""
        whole = self.template.render([*prompt, *answer], given, add_generation_prompt=False)
        if not whole.startswith(head):
            raise UsageError(
                "the chat template renders the prompt alone differently from the prompt within the conversation: "
                f"{head[-80:]!r} is not how {whole[:200]!r} begins; give another template with model.chat_template"
            )
        rest = whole[len(head) :]
        header = rest[: max(rest.find(answer[0]["content"].strip()), 0)]
        if header.strip() and head == self.template.render(prompt, given, add_generation_prompt=False):
            raise UsageError(
                "the chat template does nothing where add_generation_prompt is set, so that its header of the "
                f"assistant's turn, {header[:80]!r}, would count as a part of the answer; write the header at the "
                "template's end in {% if add_generation_prompt %} ... {% endif %} and give it with model.chat_template"
            )
        if not _stands_in(rest, answer):
            raise RowError(CHANGED)
        if len(answer) == 1 and self._writes_twice(prompt, answer[0], rest, head, given):
            raise RowError(TWICE)
        if any("tool_calls" in turn for turn in answer):
            without: list[Any] = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in answer]
            if whole == self.template.render([*prompt, *without], given, add_generation_prompt=False):
                raise RowError("the chat template leaves out the answer's `tool_calls` (model.chat_template)")
        return rest

    def _writes_twice(self, prompt: Sequence[Message], answer: Message, rest: str, head: str, given: Given) -> bool:
        """Return whether an answer stands in a rendering more often than in what the template writes around it."""
        said = answer["content"].strip()
        if not said or rest.count(said) < 2:
            return False
        probe: Message = {**answer, "content": _PROBE}
        around = self.template.render([*prompt, probe], given, add_generation_prompt=False)[len(head) :]
        return rest.count(said) > around.replace(_PROBE, "\0").count(said) + 1

    def _ids_after(self, head: str, text: str) -> list[int]:
        """Return the ids of a text that stand after those of `head`; joined they are the ids of the whole text."""
        head_ids, whole = self._encode_head(head), self._encode(head + text)
        if whole[: len(head_ids)] == head_ids:
            return whole[len(head_ids) :]
        written = (self._decode(whole), head + text)  # a decoder may know neither double spaces nor how it starts
        for anchor in _ANCHORS:
            before, ids = self._encode(anchor), self._encode(anchor + text)
            apart = ids[len(before) :]
            if ids[: len(before)] == before and self._decode([*head_ids, *apart]) in written:
                return apart
        raise RowError("the tokenizer cannot write the answer right behind the prompt: it puts a space between them")

    def _end_of_text(self, prompt: str) -> int:
        """Return what ends an answer to plain text: EOS, or the template's end where the text has its form already."""
        end = self.end.token
        if end is not None and self.tokenizer.decode([end]).strip() in prompt:
            return end
        return int(self.tokenizer.eos_token_id)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find_control(self, values: Iterable[Json]) -> str | None:
        texts = (text for value in values for text in _texts(value))
        return next((found.group() for text in texts if (found := self._control.search(text))), None)

    def _without_ends(self, answer: Sequence[Message]) -> list[Message]:
        """Remove an end of turn that the data hold from the assistant's last turn."""
        return [*answer[:-1], {**answer[-1], "content": self._end.sub("", answer[-1]["content"])}]

    def _end_once(self, ids: list[int], *, otherwise: int | None) -> list[int]:
        """Keep the first of several ends of turn at the end, with white space between or without; else add one."""
        end = None
        for i in range(len(ids) - 1, -1, -1):
            if ids[i] in self.stop_ids:
                end = i
            elif self.tokenizer.decode(ids[i : i + 1]).strip():
                break
        if end is not None:
            return ids[: end + 1]
        if otherwise is None:
            raise RowError("the chat template ends the answer with no token at which generation stops")
        return [*ids, otherwise]


def _stands_in(text: str, answer: Sequence[Message]) -> bool:
    """Return whether the assistant's turns stand in a text, in order and unchanged but for white space around them."""
    start = 0
    for turn in answer:
        if turn["role"] == "assistant":
            found = text.find(turn["content"].strip(), start)
            if found < 0:
                return False
            start = found + len(turn["content"].strip())
    return True


def _said(turn: Message) -> dict[str, Json]:
    values: Mapping[str, Any] = turn
    return {key: value for key, value in values.items() if key != "role"}


def _texts(value: Json) -> Iterator[str]:
    """Yield all texts of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in _texts(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in _texts(item))


def _pattern_of(tokens: Iterable[str]) -> str:
    return "|".join(re.escape(token) for token in sorted(tokens, key=lambda token: (-len(token), token)))


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the texts of special tokens, without the one for unknown words, which has no effect."""
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | {str(token) for token in tokenizer.all_special_tokens}) - {tokenizer.unk_token, ""}


def tokenise_pairs(pairs: Iterable[Pair], chat: ChatFormat, *, max_length: int) -> TokenisedPairs:
    """Tokenise pairs; drop, and never cut, those that are too long, equal as tokens, or contain control tokens."""
    dropped = Counter[str]()
    readback = Readback(chat.tokenizer, chat.stop_ids)
    rows = TokenRows.of(_usable_pairs(pairs, chat, max_length, dropped, readback))
    return TokenisedPairs(rows, dict(dropped), readback)


def _usable_pairs(
    pairs: Iterable[Pair], chat: ChatFormat, max_length: int, dropped: Counter[str], readback: Readback
) -> Iterator[TokenPair]:
    """Yield the pairs that fit, and look at what reads back from them; count the others by reason."""
    for pair in pairs:
        reason = chat.unusable(pair)
        if reason is not None:
            dropped[reason] += 1
            continue
        try:
            prompt, chosen, rejected = _ids_of(pair, chat)
        except RowError as error:
            dropped[str(error)] += 1
            continue
        row = TokenPair(pair.pair_id, pair.prompt_id, tuple(prompt), tuple(chosen), tuple(rejected))
        if row.length > max_length:
            dropped[f"longer than data.max_length={max_length}"] += 1
        elif not prompt:
            dropped["prompt has no tokens"] += 1
        elif min(len(chosen), len(rejected)) < 2:
            dropped["answer has no tokens"] += 1
        elif any(chat.goes_on(ids, answer) for ids, answer in ((chosen, pair.chosen), (rejected, pair.rejected))):
            dropped["answer goes on after an end of turn"] += 1
        elif chosen == rejected:
            dropped["answers are the same tokens"] += 1
        else:
            chat.look_at(pair, (prompt, chosen, rejected), readback)
            yield row


def _ids_of(pair: Pair, chat: ChatFormat) -> tuple[list[int], list[int], list[int]]:
    about: dict[str, Any] = {"conversational": pair.conversational, "given": pair.given}
    ids = (
        chat.prompt_ids(pair.prompt, **about),
        chat.answer_ids(pair.prompt, pair.chosen, **about),
        chat.answer_ids(pair.prompt, pair.rejected, **about),
    )
    if ASKED in chat.left_out(pair.prompt, **about):
        raise RowError(NOT_ASKED)
    return ids


def load_chat_format(
    model_path: str | Path,
    *,
    revision: str | None,
    template: str | None,
    auto: bool,
    date: datetime | None = None,
) -> ChatFormat:
    """Load the tokenizer of a checkpoint and the ids at which its generation stops."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(str(model_path), revision=revision, trust_remote_code=False)
    if template is not None:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        if not tokenizer.chat_template.strip():
            raise UsageError(f"model.chat_template={template}: is empty; give a Jinja chat template")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        stops = GenerationConfig.from_pretrained(str(model_path), revision=revision).eos_token_id
    except OSError as error:
        if (Path(model_path) / "generation_config.json").is_file():
            raise UsageError(
                f"{model_path}/generation_config.json is not readable; copy it again, or remove it"
            ) from error
        stops = None
    stop_ids = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not all(isinstance(stop, int) for stop in stop_ids):
        raise UsageError(
            f"{model_path}/generation_config.json: eos_token_id={stops!r}; allowed: the id of a token, or a list of ids"
        )
    return ChatFormat(tokenizer, stop_ids, use_template=auto, date=date)
