"""Rows of a study's JSONL files: prompts.jsonl, and per trial completions.jsonl, pairs.jsonl, scores.jsonl."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from harness.study.files import Json


class TrialName(TypedDict):
    """What names a trial in its files: its id, arm, label of the config, and seed."""

    trial_id: str
    arm: str
    config: str
    seed: int


class ChatMessage(TypedDict):
    """One turn of a conversation; it may have further keys, as chat templates take them (`name`, `reasoning_content`).

    Attributes:
        content: text; empty where an assistant's turn only calls tools.
        tool_calls: the calls, in the form that the chat template expects.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Json]]]


class PromptRow(TypedDict):
    """One row of prompts.jsonl: an evaluation prompt, as scorers need it.

    Attributes:
        split: `dev` or `golden`.
        prompt_id: the first 16 hex digits of the hash of roles and contents.
        prompt: the turns, the last one to be answered.
        checks: checks of the answer, one mapping each (`{"regex": ...}`); empty where the golden set has none.
        cluster: prompts of one cluster are not independent; empty where each prompt stands for itself.
        pairs: number of held-out pairs with this prompt.
        about: other columns of the golden set (`category`, `instructions`, `reference`).
        follows: id of the prompt whose answer comes before the last turn; None for single turns.
    """

    split: str
    prompt_id: str
    prompt: list[ChatMessage]
    checks: list[dict[str, Json]]
    cluster: str
    pairs: int
    about: dict[str, Json]
    follows: str | None


class CompletionRow(TypedDict):
    """One row of completions.jsonl: the answer to one prompt.

    Attributes:
        completion: the answer, without thinking.
        tokens: of the answer, the one that ends the turn included.
        thinking, thinking_tokens: what the policy thought beside it; absent where it did not.
    """

    split: str
    prompt_id: str
    prompt: str
    completion: str
    tokens: int
    ended: bool
    flags: list[str]
    thinking: NotRequired[str]
    thinking_tokens: NotRequired[int]


class PairRow(TypedDict):
    """One row of pairs.jsonl: summed log-probs (nats) of a held-out pair under the policy and the base (`ref`)."""

    split: str
    prompt_id: str
    pair_id: str
    chosen_sum_logps: float
    rejected_sum_logps: float
    chosen_ref_sum_logps: float
    rejected_ref_sum_logps: float
    chosen_tokens: int
    rejected_tokens: int


class ScoreRow(TypedDict):
    """One row of scores.jsonl and scores.csv: one score of one prompt.

    Attributes:
        score: in [0, 1], higher is better; None where it is unscored, with `unscored_reason`.
        cluster: as in `PromptRow`.
        tokens, chars: length of the answer; None where the scorer looks at pairs and there is no answer.
        stage: `select` (dev) or `confirm` (golden).
        flag: `diverged` or `collapsed` for a trial that scores as worst, else empty.
    """

    arm: str
    config: str
    seed: int
    split: str
    prompt_id: str
    scorer: str
    score: float | None
    cluster: str
    tokens: int | None
    chars: int | None
    unscored_reason: str
    stage: str
    flag: str
