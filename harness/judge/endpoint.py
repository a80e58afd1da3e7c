"""Ask a judge behind an OpenAI-compatible endpoint: many requests at once, bounded in number, retries, time and cost.

The `openai` client (an extra) sends, waits and retries; here are the cache, the budget, and what becomes of a request
that gets no answer: a reason, never an exception that loses the others.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from harness.cache import Cache
from harness.judge.budget import Budget
from harness.judge.key import judge_key
from harness.judge.template import Template
from harness.records import Message, UsageError, digest
from harness.redaction import redact
from harness.scoreconfig import JudgeConfig, Structured
from harness.untrusted import one_line

_FAILURES_IN_A_ROW = 10  # after so many nobody is asked any more: the endpoint is down


@dataclass(frozen=True)
class Reply:
    """What came of one request: the text, or the reason why there is none."""

    text: str | None
    reason: str = ""


class Endpoint:
    """A judge that can be asked.

    Args:
        config: which model, where, and how it is asked.
        template: for the schema of its replies.
        cache: of replies.
        budget: counts what is used, and ends it.

    Raises:
        UsageError: where the client is not installed, no model is named, or the key is missing or no judge's.
    """

    def __init__(self, config: JudgeConfig, template: Template, cache: Cache, budget: Budget) -> None:
        self.config = config
        self._cache, self._budget = cache, budget
        self._client = _client(config)
        self._schema = None if config.structured is Structured.never else template.schema
        self._limit_key = "max_tokens"
        self._lock = threading.Lock()
        self._failures = 0
        self._last_failure = ""

    def ask(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Return the reply to each prompt; one that is there already is not asked for again."""
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            replies = pool.map(self._ask, prompts)
            return list(tqdm(replies, total=len(prompts), desc="judge", unit=" replies", delay=5, leave=False))

    def stored(self, messages: Sequence[Message]) -> str | None:
        """Return the reply that is in the cache, or None."""
        schemas = [self._schema, None] if self.config.structured is Structured.auto else [self._schema]
        for schema in schemas:
            found = self._cache.get(self._key(messages, schema))
            if found:
                return str(found["text"])
        return None

    def _key(self, messages: Sequence[Message], schema: Any) -> str:
        config = self.config
        address = str(self._client.base_url)
        return digest([address, config.model, list(messages), config.temperature, config.max_tokens, schema])

    def _ask(self, messages: Sequence[Message]) -> Reply:
        text = self.stored(messages)
        if text is not None:
            self._budget.count_cached()
            return Reply(text)
        if self._failures >= _FAILURES_IN_A_ROW:
            return Reply(None, f"not asked: the last {_FAILURES_IN_A_ROW} requests failed ({self._last_failure})")
        reserved = self._budget.reserve(messages)
        if reserved is None:
            return Reply(None, "not asked: score.max_cost_usd is used up")
        usage = (0, 0)
        try:
            text, usage = self._send(messages)
        except UsageError as error:  # what one is refused for, all are: nobody else is asked
            with self._lock:
                self._failures, self._last_failure = _FAILURES_IN_A_ROW, one_line(error, 160)
            raise
        except Exception as error:  # whatever the client or the network raises, the other requests go on
            return Reply(None, self._failed(error))
        finally:
            self._budget.settle(reserved, *usage)
        with self._lock:
            self._failures = 0
        return Reply(text) if text else Reply(None, "the judge's reply is empty")

    def _send(self, messages: Sequence[Message]) -> tuple[str, tuple[int, int]]:
        """Send one request, in the form that the endpoint understands, and keep the reply."""
        import openai

        while True:
            schema, limit_key = self._schema, self._limit_key
            more = {limit_key: self.config.max_tokens} | ({"response_format": schema} if schema else {})
            try:
                answer = self._client.chat.completions.create(
                    model=self.config.model, messages=list(messages), temperature=self.config.temperature, **more
                )
                break
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise UsageError(self._refused(error)) from error
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not self._adapts(str(error), schema, limit_key):
                    raise
        choice = answer.choices[0].message.content or ""
        usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens) if answer.usage else (0, 0)
        if choice:
            self._cache.put(self._key(messages, schema), {"text": choice, "usage": usage, "model": answer.model})
        return choice, usage

    def _adapts(self, message: str, schema: Any, limit_key: str) -> bool:
        """Leave out of the requests what the endpoint does not know; False where there is nothing left to leave out."""
        with self._lock:
            if "max_completion_tokens" in message and limit_key == "max_tokens":
                self._limit_key = "max_completion_tokens"
                return True
            is_about_schema = any(word in message for word in ("response_format", "schema", "structured"))
            if schema is not None and self.config.structured is Structured.auto and is_about_schema:
                self._schema = None
                return True
            return schema is not self._schema or limit_key != self._limit_key  # another thread has adapted

    def _failed(self, error: Exception) -> str:
        with self._lock:
            self._failures += 1
            self._last_failure = f"{type(error).__name__}: {one_line(self._without_key(error), 160)}"
        return f"no answer after {self.config.max_retries + 1} attempts ({self._last_failure})"

    def _refused(self, error: Exception) -> str:
        config = self.config
        return (
            f"score.judge.model={config.model}: the endpoint {self._client.base_url} refuses "
            f"({one_line(self._without_key(error), 200)}); check the model's name, score.judge.base_url and the key in "
            f"the environment variable {config.api_key_env}"
        )

    def _without_key(self, error: Exception) -> str:
        return redact(error, self.config.api_key_env)


def _client(config: JudgeConfig) -> Any:
    try:
        import openai
    except ImportError as error:
        raise UsageError(
            "score.judge: the `openai` client is not installed; pip install 'dpo-simpo-harness[judge]'"
        ) from error
    if config.model is None:
        raise UsageError("score.judge.model=null: name the model that judges, as the endpoint knows it")
    key = judge_key(config.api_key_env)
    if key is None and config.base_url is None:
        raise UsageError(
            f"score.judge: the environment variable {config.api_key_env} holds no key; set it, name another one with "
            "score.judge.api_key_env, or give an endpoint without keys as score.judge.base_url"
        )
    return openai.OpenAI(
        api_key=key or "none",
        base_url=config.base_url,
        timeout=config.timeout_seconds,
        max_retries=config.max_retries,
    )
