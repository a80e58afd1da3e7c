"""Records that the stages exchange: pairs, prompts, completions, log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.study.files import Json, digest
from harness.study.rows import ChatMessage as Message

__all__ = [
    "NOTHING",
    "BadRow",
    "Check",
    "Completion",
    "EvalPrompt",
    "Given",
    "Message",
    "Pair",
    "PairLogps",
    "meaning",
    "prompt_id",
]

Check = dict[str, Json]  # one key: the kind of the check

# Keys of a turn, beside role and content, in which two turns may say different things.
_SAID = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Given:
    """What a row gives the chat template beside its turns: the columns `tools` and `chat_template_kwargs` of TRL."""

    tools: Sequence[Json] = ()
    kwargs: Mapping[str, Json] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Return whether there is anything."""
        return bool(self.tools or self.kwargs)

    @property
    def names(self) -> list[str]:
        """The names under which the template gets it."""
        return [*(["tools"] if self.tools else []), *self.kwargs]

    @property
    def plain(self) -> list[Json]:
        """It as JSON values; empty where there is nothing, so that hashes of other rows stay as they were."""
        return [{"tools": list(self.tools), "kwargs": dict(self.kwargs)}] if self else []


NOTHING = Given()


@dataclass(frozen=True)
class Pair:
    """A preference pair: two answers to one prompt.

    Attributes:
        pair_id: id given in the file, or `row-N`.
        prompt: the conversation before the answer, oldest turn first.
        chosen: the preferred answer: assistant turns, or several turns that end in one by the assistant.
        rejected: the other answer.
        conversational: False where the file holds plain text without turns (TRL's standard form); the text is
            then the content of one user and one assistant message.
        row: row in the file, counted from 1 (the line number in a JSONL file).
        given: what the chat template gets beside the turns.
    """

    pair_id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    conversational: bool
    row: int
    given: Given = NOTHING

    @property
    def prompt_id(self) -> str:
        """Identify the prompt by its content: pairs of one prompt share it, in whatever file they stand."""
        return prompt_id(self.prompt, self.given)


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt of `dev` or `golden` that is answered and scored.

    Attributes:
        prompt_id: hash of the content, see `prompt_id`.
        prompt: the conversation to answer.
        checks: verifiable checks, each a mapping with one key (`{"max_words": 3}`); empty where there are none.
        cluster: prompts that are not independent of each other share it; None means a cluster of its own.
        conversational: as in `Pair`.
        row: row in the file, counted from 1.
        about: columns that a published golden set's own tools need: `form`, `id`, and more.
        follows: the prompt_id of the turn before, whose answer goes in front of the last turn; None for a first turn.
        given: what the chat template gets beside the turns.
    """

    prompt_id: str
    prompt: tuple[Message, ...]
    checks: tuple[Check, ...]
    cluster: str | None
    conversational: bool
    row: int
    about: dict[str, Any] = field(default_factory=dict)
    follows: str | None = None
    given: Given = NOTHING

    def conversation(self, said: str) -> tuple[Message, ...]:
        """Return the turns to answer; `said` is the answer to the prompt that this one follows."""
        if self.follows is None:
            return self.prompt
        answer: Message = {"role": "assistant", "content": said}
        return (*self.prompt[:-1], answer, self.prompt[-1])


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, with the reason for the user."""

    path: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.row}: {self.reason}"


@dataclass(frozen=True)
class Completion:
    """A policy's answer to a prompt.

    Attributes:
        completion: the answer without its thinking.
        tokens: number of its tokens, the one that ends the turn included.
        ended: True where the policy ended its turn; False where it was cut off at `generate.max_new_tokens`, or where
            its thinking does not end.
        thinking: what the policy thought, without marks; see `harness.data.reasoning`.
        thinking_tokens: number of tokens before and between the answer's, marks included.
    """

    split: str
    prompt_id: str
    prompt: str
    completion: str
    tokens: int
    ended: bool
    thinking: str = ""
    thinking_tokens: int = 0


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of one held-out pair under the policy and under the SFT base, in nats.

    `sum` is over the completion's tokens (the turn's end included); a mean is `sum / tokens`.
    """

    split: str
    prompt_id: str
    pair_id: str
    chosen_sum_logps: float
    rejected_sum_logps: float
    chosen_ref_sum_logps: float
    rejected_ref_sum_logps: float
    chosen_tokens: int
    rejected_tokens: int


def meaning(turn: Message) -> list[Json]:
    """Return what a turn says: role, content, and a mapping of the other keys that say something, where there are."""
    more: dict[str, Any] = {key: value for key, value in turn.items() if key in _SAID}
    return [turn["role"], turn["content"], *([more] if more else [])]


def prompt_id(prompt: Iterable[Message], given: Given = NOTHING) -> str:
    """Return the first 16 hex digits of the SHA-256 of what the turns say, in order, and of what the template gets."""
    return digest([*map(meaning, prompt), *given.plain])[:16]
