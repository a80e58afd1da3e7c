"""What judging costs: an estimate before, a bound while it runs, the sum after. US dollars; prices a million tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from harness.records import Message
from harness.scoreconfig import JudgeConfig

_CHARS_A_TOKEN = 3  # English has about four; what is sent should rather be estimated too dear
_TOKENS_A_MESSAGE = 8


@dataclass
class Spending:
    """What was used.

    Attributes:
        requests: sent, retries by the client not counted.
        cached: answered out of the cache.
    """

    requests: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def cost(self, config: JudgeConfig) -> float | None:
        """Return the dollars, or None where no price is given."""
        if config.input_price is None and config.output_price is None:
            return None
        return _dollars(config, self.input_tokens, self.output_tokens)


class Budget:
    """Lets requests through while they are paid for, the most that the ones under way can cost included.

    Args:
        config: with the prices.
        limit: dollars; None for no limit.
    """

    def __init__(self, config: JudgeConfig, limit: float | None) -> None:
        self.spent = Spending()
        self._config, self._limit = config, limit
        self._reserved = 0.0
        self._lock = threading.Lock()

    def reserve(self, messages: Sequence[Message]) -> float | None:
        """Set aside what a request can cost at most, and return it; None where the limit does not allow it."""
        most = _dollars(self._config, estimated_tokens(messages), self._config.max_tokens)
        with self._lock:
            spent = self.spent.cost(self._config) or 0.0
            if self._limit is not None and spent + self._reserved + most > self._limit:
                return None
            self._reserved += most
            self.spent.requests += 1
        return most

    def settle(self, reserved: float, input_tokens: int, output_tokens: int) -> None:
        """Count what a request has used, and give back what was set aside for it."""
        with self._lock:
            self._reserved -= reserved
            self.spent.input_tokens += input_tokens
            self.spent.output_tokens += output_tokens

    def count_cached(self) -> None:
        """Count an answer that was not asked for again."""
        with self._lock:
            self.spent.cached += 1


def estimated_tokens(messages: Sequence[Message]) -> int:
    """Estimate the tokens of a prompt by its characters; it is not the endpoint's own tokenizer that counts."""
    return sum(len(message["content"]) // _CHARS_A_TOKEN + _TOKENS_A_MESSAGE for message in messages)


def estimate(config: JudgeConfig, prompts: Sequence[Sequence[Message]]) -> str:
    """Say what so many requests will use at most."""
    tokens_in = sum(estimated_tokens(messages) for messages in prompts)
    tokens_out = len(prompts) * config.max_tokens
    text = f"{len(prompts):,} requests, about {tokens_in:,} tokens in and at most {tokens_out:,} out"
    if config.input_price is None and config.output_price is None:
        return text + " (no price is given: score.judge.input_price, output_price)"
    return f"{text}: at most about ${_dollars(config, tokens_in, tokens_out):.2f}"


def _dollars(config: JudgeConfig, tokens_in: int, tokens_out: int) -> float:
    return (tokens_in * (config.input_price or 0.0) + tokens_out * (config.output_price or 0.0)) / 1e6
