"""Tokenise every pair once, before any trainer sees it: both arms train on these ids and on no others.

Input: pairs (text) -> output: token ids, with the pairs that do not fit dropped, for all arms alike.

Stock TRL trainers tokenise for themselves and disagree: `CPOTrainer` adds an EOS or a BOS and truncates differently.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.records import Message, Pair, UsageError


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids: the prompt's are shared by both answers; each answer ends the turn exactly once."""

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
    """Rows that fit, in the order given, and how many did not, by reason."""

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
    """Write one pair's ids as bytes: three lengths, then the ids, 32-bit little-endian. The lengths are the mask."""
    lengths = (len(prompt_ids), len(chosen_ids), len(rejected_ids))
    return np.array([*lengths, *prompt_ids, *chosen_ids, *rejected_ids], dtype="<i4").tobytes()


class ChatFormat:
    """Turn conversations into token ids in one way for training, held-out scoring and generation.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: ids at which generation stops; the tokenizer's EOS is always one of them.
        use_template: put plain-text prompts through the chat template, where there is one.
    """

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int] = (), *, use_template: bool = True) -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no eos_token; set one in the checkpoint's tokenizer_config.json")
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids) | {tokenizer.eos_token_id}
        self.use_template = use_template

    def prompt_ids(self, prompt: Sequence[Message], *, conversational: bool) -> list[int]:
        """Return the prompt's ids, up to where the assistant's turn begins; BOS stands once where it is used."""
        if self._templated(conversational):
            return self._once_bos(self._encode(self._render(prompt, add_generation_prompt=True)))
        ids = self.tokenizer(prompt[-1]["content"], add_special_tokens=True)["input_ids"]
        while ids and ids[-1] in self.stop_ids and ids[-1] != self.tokenizer.bos_token_id:
            ids = ids[:-1]  # some tokenizers add EOS as a special token; the prompt is not the end
        return self._once_bos(ids)

    def answer_ids(self, prompt: Sequence[Message], answer: Sequence[Message], *, conversational: bool) -> list[int]:
        """Return the answer's ids after the prompt's, ending in exactly one end-of-turn id.

        The answer is tokenised apart from the prompt, so that both answers, and generation, follow the same ids.
        """
        if self._templated(conversational):
            head = self._render(prompt, add_generation_prompt=True)
            whole = self._render([*prompt, *answer], add_generation_prompt=False)
            if not whole.startswith(head):
                raise UsageError(
                    "the chat template renders the prompt alone differently from the prompt within the conversation: "
                    f"{head[-80:]!r} is not how {whole[:200]!r} begins; give another template with model.chat_template"
                )
            text = whole[len(head) :]
        else:
            text = answer[-1]["content"]
        return self._end_once(self._encode(text))

    def _templated(self, conversational: bool) -> bool:
        has_template = bool(self.tokenizer.chat_template)
        if conversational and not has_template:
            raise UsageError(
                "the pairs are conversations and the tokenizer has no chat template; "
                "give one with model.chat_template=FILE"
            )
        return has_template and (conversational or self.use_template)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        turns = [dict(message) for message in messages]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _once_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        while len(ids) > 1 and bos is not None and ids[0] == bos and ids[1] == bos:
            ids = ids[1:]
        return ids

    def _end_once(self, ids: list[int]) -> list[int]:
        """Cut what the template puts behind the last end of turn (a newline), or add the EOS where there is none."""
        last = max((i for i, token in enumerate(ids) if token in self.stop_ids), default=None)
        if last is None or self.tokenizer.decode(ids[last + 1 :]).strip():
            ids, last = [*ids, self.tokenizer.eos_token_id], len(ids)
        while last > 0 and ids[last - 1] in self.stop_ids:
            last -= 1  # a template and a data set that both wrote the end
        return ids[: last + 1]


def tokenise_pairs(pairs: Iterable[Pair], chat: ChatFormat, *, max_length: int) -> TokenisedPairs:
    """Tokenise pairs and drop, never cut, those longer than `max_length` or alike after tokenisation."""
    rows, dropped = [], Counter[str]()
    for pair in pairs:
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
