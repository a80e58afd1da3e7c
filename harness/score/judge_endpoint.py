"""Ask a judge behind an OpenAI-compatible endpoint: many requests at once, bounded in number, retries, time and cost.

The `openai` client (an extra) sends, waits and retries; here are the cache, the budget, and what becomes of a request
that gets no answer: a reason, never an exception that loses the others.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.config.schema import JudgeConfig, Structured
from harness.data.records import Message
from harness.study.errors import UsageError
from harness.study.files import digest
from harness.study.text import one_line, redact

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
        schema: response format that holds a reply to one of the verdicts, see `Template.schema`.
        cache: of replies.
        budget: counts what is used, and ends it.

    Raises:
        UsageError: where the client is not installed, no model is named, or the key is missing or no judge's.
    """

    def __init__(self, config: JudgeConfig, schema: dict[str, Any], cache: Cache, budget: Budget) -> None:
        self.config = config
        self._cache, self._budget = cache, budget
        self._client = _client(config)
        self._schema = None if config.structured is Structured.never else schema
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


# Its name says neither KEY nor TOKEN: `harness.study.text` would hide what it lists, in the very message about it.
LISTED = "HARNESS_JUDGE_VARIABLES"
_JUDGES = re.compile(r"OPENAI_API_KEY|\w+_JUDGE_KEY")


def key_problem(variable: str) -> str | None:
    """Say why an environment variable may not be sent to a judge as its key, or None where it may."""
    listed = [name.strip() for name in os.environ.get(LISTED, "").split(",")]
    if _JUDGES.fullmatch(variable) or variable in listed:
        return None
    name = one_line(variable, 80)
    return (
        f"score.judge.api_key_env={name}: not a judge's key, and what it holds would be sent to the judge; allowed: "
        f"OPENAI_API_KEY, a name that ends in _JUDGE_KEY, or one that the environment variable {LISTED} lists "
        f"(NAME,NAME): put it there only if it is a judge's"
    )


def judge_key(variable: str) -> str | None:
    """Return the key that a variable holds, or None where it holds none.

    Raises:
        UsageError: for a variable that may not be sent to a judge.
    """
    problem = key_problem(variable)
    if problem:
        raise UsageError(problem)
    return os.environ.get(variable) or None


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


class Cache:
    """A store of JSON objects, by key.

    Args:
        path: the SQLite file; made where it is not there.

    Raises:
        UsageError: for a file that is damaged or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS found (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise UsageError(
                f"{path}: not usable as a cache ({error}); delete it (what it holds is asked for or computed again) or "
                "make its folder writable"
            ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the value of a key, or None."""
        with self._lock:
            row = self._database.execute("SELECT value FROM found WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep a value; the first one stays where two processes have found it."""
        with self._lock:
            self._database.execute("INSERT OR IGNORE INTO found VALUES (?, ?)", (key, json.dumps(value)))

    def close(self) -> None:
        """Close the file."""
        self._database.close()
