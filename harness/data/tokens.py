"""Pairs (text) -> token ids, once, before any trainer; all arms train on these ids and on no others.

Pairs that do not fit are dropped for all arms alike. Stock TRL trainers tokenise for themselves and disagree:
`CPOTrainer` adds an EOS or a BOS and truncates differently.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.data.records import Message, Pair
from harness.study.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids: both answers share the prompt's ids, and each ends the turn exactly once."""

    pair_id: str
    prompt_id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of tokens of the prompt with the longer answer."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class TokenisedPairs:
    """Rows that fit, in the given order, and the number of dropped pairs by reason."""

    rows: tuple[TokenPair, ...]
    dropped: dict[str, int]

    @property
    def sha256(self) -> str:
        """Identify the ids and masks of all rows, in order."""
        hasher = hashlib.sha256()
        for row in self.rows:
            hasher.update(canonical_bytes(row.prompt_ids, row.chosen_ids, row.rejected_ids))
        return hasher.hexdigest()


def canonical_bytes(prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> bytes:
    """Return one pair's ids as bytes: three lengths (the mask), then the ids, 32-bit little-endian."""
    lengths = (len(prompt_ids), len(chosen_ids), len(rejected_ids))
    return np.array([*lengths, *prompt_ids, *chosen_ids, *rejected_ids], dtype="<i4").tobytes()


class ChatFormat:
    """Converts conversations to token ids, in the same way for training, held-out scoring and generation.

    BOS stands once, in front, where the chat template or the tokenizer's own encoding puts it. A template without BOS
    does not take it from a model that was trained with one.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: ids at which generation stops; the tokenizer's EOS is always one of them.
        use_template: put plain-text prompts through the chat template, where there is one.

    Raises:
        UsageError: for a tokenizer without `eos_token`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int] = (), *, use_template: bool = True
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no eos_token; set one in the checkpoint's tokenizer_config.json")
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids) | {tokenizer.eos_token_id}
        self.use_template = use_template
        self._encode_head = functools.lru_cache(maxsize=1)(self._encode)  # both answers follow one prompt
        first = self._encode("a")[:1] or [tokenizer.eos_token_id]
        self._opening = list(itertools.takewhile(lambda token: token not in first, tokenizer("a")["input_ids"]))
        ends = {text for text, token in tokenizer.added_tokens_encoder.items() if token in self.stop_ids}
        self._end = re.compile(rf"(?:(?:{_pattern_of(ends)})\s*)+\Z")
        self._control = re.compile(_pattern_of(_control_tokens(tokenizer) | ends))

    def prompt_ids(self, prompt: Sequence[Message], *, conversational: bool) -> list[int]:
        """Return the prompt's ids, up to the begin of the assistant's turn.

        A control token in the text acts as one, as in a served model. Pairs with one are not trained on (see
        `unusable`); an evaluation prompt with one is answered, by every arm from the same ids.
        """
        bos = self.tokenizer.bos_token_id
        ids = self._encode_head(self._text_of_prompt(prompt, conversational=conversational))
        body = list(itertools.dropwhile(lambda token: token == bos, ids))
        opening = [t for t in self._opening if t == bos] if self._templated(conversational) else self._opening
        written = ids[:1] if len(body) < len(ids) else []
        return [*(opening or written), *body]

    def answer_ids(self, prompt: Sequence[Message], answer: Sequence[Message], *, conversational: bool) -> list[int]:
        """Return the answer's ids after the prompt's; the last one, and in a single turn no other, ends the turn.

        Prompt and answer are encoded as one text. Where tokens merge across the boundary, and so change the prompt's
        ids, the answer is encoded apart: generation starts from the prompt's ids, too.
        """
        head = self._text_of_prompt(prompt, conversational=conversational)
        if self._templated(conversational):
            text = self._text_after_head(prompt, self._without_ends(answer), head)
        else:
            text = answer[-1]["content"]
        head_ids, whole_ids = self._encode_head(head), self._encode(head + text)
        kept = whole_ids[: len(head_ids)] == head_ids
        return self._end_once(whole_ids[len(head_ids) :] if kept else self._encode(text))

    def unusable(self, pair: Pair) -> str | None:
        """Return why a pair cannot be trained on: its text contains a control token, which would act as one.

        Allowed are an end of turn at the end of an answer, and control tokens in a plain-text prompt without a
        template around it: it may be written in the template's form.
        """
        templated = self._templated(pair.conversational)
        found = self._find_control(turn["content"] for turn in pair.prompt) if templated else None
        if found is not None:
            hint = "" if pair.conversational else " (is it in the template's form already? data.template=never)"
            return f"prompt contains the control token {found}{hint}"
        answers = [*self._without_ends(pair.chosen), *self._without_ends(pair.rejected)]
        found = self._find_control(turn["content"] for turn in answers)
        return None if found is None else f"answer contains the control token {found}"

    def goes_on(self, ids: Sequence[int], answer: Sequence[Message]) -> bool:
        """Return whether an answer of one turn has an end of turn before its last id."""
        return len(answer) == 1 and not self.stop_ids.isdisjoint(ids[:-1])

    def _templated(self, conversational: bool) -> bool:
        has_template = bool(self.tokenizer.chat_template)
        if conversational and not has_template:
            raise UsageError(
                "the pairs are conversations and the tokenizer has no chat template; "
                "give one with model.chat_template=FILE"
            )
        return has_template and (conversational or self.use_template)

    def _text_of_prompt(self, prompt: Sequence[Message], *, conversational: bool) -> str:
        """Return the text up to the begin of the assistant's turn."""
        if self._templated(conversational):
            return self._render(prompt, add_generation_prompt=True)
        return prompt[-1]["content"]

    def _text_after_head(self, prompt: Sequence[Message], answer: Sequence[Message], head: str) -> str:
        """Return the template's text after `head`, in which the assistant's header must not occur."""
        whole = self._render([*prompt, *answer], add_generation_prompt=False)
        if not whole.startswith(head):
            raise UsageError(
                "the chat template renders the prompt alone differently from the prompt within the conversation: "
                f"{head[-80:]!r} is not how {whole[:200]!r} begins; give another template with model.chat_template"
            )
        rest = whole[len(head) :]
        header = rest[: max(rest.find(answer[0]["content"].strip()), 0)]
        if header.strip() and head == self._render(prompt, add_generation_prompt=False):
            raise UsageError(
                "the chat template does nothing where add_generation_prompt is set, so that its header of the "
                f"assistant's turn, {header[:80]!r}, would count as a part of the answer; write the header at the "
                "template's end in {% if add_generation_prompt %} ... {% endif %} and give it with model.chat_template"
            )
        return rest

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        turns = [dict(message) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UsageError(
                f"the chat template refuses a conversation with the turns {roles}: {error}; "
                "take such rows out, or give another template with model.chat_template"
            ) from error

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find_control(self, texts: Iterable[str]) -> str | None:
        return next((found.group() for text in texts if (found := self._control.search(text))), None)

    def _without_ends(self, answer: Sequence[Message]) -> list[Message]:
        """Remove an end of turn that the data hold from the assistant's last turn."""
        return [*answer[:-1], {**answer[-1], "content": self._end.sub("", answer[-1]["content"])}]

    def _end_once(self, ids: list[int]) -> list[int]:
        """Keep the first of several ends of turn at the end, with white space between or without; else add the EOS."""
        end = None
        for i in range(len(ids) - 1, -1, -1):
            if ids[i] in self.stop_ids:
                end = i
            elif self.tokenizer.decode(ids[i : i + 1]).strip():
                break
        return [*ids, self.tokenizer.eos_token_id] if end is None else ids[: end + 1]


def _pattern_of(tokens: Iterable[str]) -> str:
    return "|".join(re.escape(token) for token in sorted(tokens, key=lambda token: (-len(token), token)))


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the texts of special tokens, without the one for unknown words, which has no effect."""
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | {str(token) for token in tokenizer.all_special_tokens}) - {tokenizer.unk_token, ""}


def tokenise_pairs(pairs: Iterable[Pair], chat: ChatFormat, *, max_length: int) -> TokenisedPairs:
    """Tokenise pairs; drop, and never cut, those that are too long, equal as tokens, or contain control tokens."""
    rows, dropped = [], Counter[str]()
    for pair in pairs:
        reason = chat.unusable(pair)
        if reason is not None:
            dropped[reason] += 1
            continue
        prompt, chosen, rejected = (
            chat.prompt_ids(pair.prompt, conversational=pair.conversational),
            chat.answer_ids(pair.prompt, pair.chosen, conversational=pair.conversational),
            chat.answer_ids(pair.prompt, pair.rejected, conversational=pair.conversational),
        )
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
            rows.append(row)
    return TokenisedPairs(tuple(rows), dict(dropped))


def load_chat_format(model_path: str | Path, *, revision: str | None, template: str | None, auto: bool) -> ChatFormat:
    """Load the tokenizer of a checkpoint and the ids at which its generation stops."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(str(model_path), revision=revision, trust_remote_code=False)
    if template is not None:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        stops = GenerationConfig.from_pretrained(str(model_path), revision=revision).eos_token_id
    except OSError:  # a checkpoint without generation_config.json
        stops = None
    stop_ids = [] if stops is None else stops if isinstance(stops, list) else [stops]
    return ChatFormat(tokenizer, stop_ids, use_template=auto)
