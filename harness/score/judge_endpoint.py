"""Client of a judge behind an OpenAI-compatible endpoint: prompts in, replies or reasons out.

Requests run concurrently, with bounds on their number, retries, time and cost. The `openai` client (an extra) sends,
waits and retries. A request without an answer yields a reason, never an exception that loses the other replies.
Also the SQLite cache of judge replies and rewards.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar, cast

from tqdm import tqdm

from harness.config.schema import JudgeConfig, Structured
from harness.data.records import Message
from harness.study.errors import UsageError
from harness.study.files import digest
from harness.study.text import one_line, redact

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam
    from openai.types.shared_params import ResponseFormatJSONSchema

_FAILURES_IN_A_ROW = 10  # after these the endpoint counts as down, and gets no more requests
# The name holds neither KEY nor TOKEN: `harness.study.text` would redact its value in the message about it.
LISTED = "HARNESS_JUDGE_VARIABLES"
_JUDGE_KEYS = re.compile(r"OPENAI_API_KEY|\w+_JUDGE_KEY")
_CHARS_PER_TOKEN = 3  # English has about four; a cost limit needs an estimate that is too high
_TOKENS_PER_MESSAGE = 8


@dataclass(frozen=True)
class Reply:
    """The result of one request: the text, or the reason why there is none."""

    text: str | None
    reason: str = ""


class StoredReply(TypedDict):
    """A cached reply: text, tokens in and out, and the name of the model that answered."""

    text: str
    usage: tuple[int, int]
    model: str


class Endpoint:
    """A judge model behind an endpoint.

    Args:
        config: model, address and request settings.
        schema: response format that limits a reply to one of the verdicts, see `Template.schema`.
        cache: of replies.
        budget: counts requests and tokens, and stops requests at the cost limit.

    Raises:
        UsageError: for each of `endpoint_problems`.
    """

    def __init__(
        self, config: JudgeConfig, schema: ResponseFormatJSONSchema, cache: Cache[StoredReply], budget: Budget
    ) -> None:
        self.config = config
        self._cache, self._budget = cache, budget
        self._client = _client(config)
        self._schema: ResponseFormatJSONSchema | None = None if config.structured is Structured.never else schema
        self._limit_key = "max_tokens"
        self._lock = threading.Lock()
        self._failures = 0
        self._last_failure = ""

    def ask(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        """Return the reply to each prompt; cached replies are not requested again."""
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            replies = pool.map(self._ask, prompts)
            return list(tqdm(replies, total=len(prompts), desc="judge", unit=" replies", delay=5, leave=False))

    def stored(self, messages: Sequence[Message]) -> str | None:
        """Return the cached reply, or None."""
        schemas = [self._schema, None] if self.config.structured is Structured.auto else [self._schema]
        for schema in schemas:
            if found := self._cache.get(self._key(messages, schema)):
                return found["text"]
        return None

    def _key(self, messages: Sequence[Message], schema: ResponseFormatJSONSchema | None) -> str:
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
        except UsageError as error:  # the endpoint would refuse every other request for the same reason
            with self._lock:
                self._failures, self._last_failure = _FAILURES_IN_A_ROW, one_line(error, 160)
            raise
        except Exception as error:  # any error of the client or the network: the other requests go on
            return Reply(None, self._failed(error))
        finally:
            self._budget.settle(reserved, *usage)
        with self._lock:
            self._failures = 0
        return Reply(text) if text else Reply(None, "the judge's reply is empty")

    def _send(self, messages: Sequence[Message]) -> tuple[str, tuple[int, int]]:
        """Send one request without the parameters that the endpoint refuses, and cache the reply.

        Returns:
            The text, and the tokens in and out.
        """
        import openai

        assert self.config.model is not None, "checked by `endpoint_problems`"
        turns = [cast("ChatCompletionMessageParam", message) for message in messages]
        while True:
            schema, limit_key = self._schema, self._limit_key
            more: dict[str, Any] = {limit_key: self.config.max_tokens}
            more |= {"response_format": schema} if schema else {}
            try:
                answer = self._client.chat.completions.create(
                    model=self.config.model, messages=turns, temperature=self.config.temperature, **more
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

    def _adapts(self, message: str, schema: ResponseFormatJSONSchema | None, limit_key: str) -> bool:
        """Drop or rename the parameter that the endpoint refuses; False where none is left to change."""
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


def _client(config: JudgeConfig) -> OpenAI:
    problems = list(endpoint_problems(config))
    if problems:
        raise UsageError("\n".join(problems))
    import openai

    return openai.OpenAI(
        api_key=judge_key(config.api_key_env) or "none",
        base_url=config.base_url,
        timeout=config.timeout_seconds,
        max_retries=config.max_retries,
    )


def endpoint_problems(config: JudgeConfig) -> Iterator[str]:
    """Yield what an endpoint lacks: a model, the client, or a key that may be sent to it."""
    if config.model is None:
        yield "score.judge.model=null: name the model that judges, as its endpoint knows it"
    if find_spec("openai") is None:
        yield "score.judge: the `openai` client is not installed; pip install 'dpo-simpo-harness[judge]'"
    if config.base_url and re.search(r"://[^/]*@", config.base_url):
        yield (
            "score.judge.base_url: holds a name or a password, and configs are written to files; give the address "
            "without, and a key by the environment variable that score.judge.api_key_env names"
        )
    if problem := key_problem(config.api_key_env):
        yield problem
    elif config.base_url is None and not judge_key(config.api_key_env) and not os.environ.get("OPENAI_BASE_URL"):
        yield (
            f"score.judge: the environment variable {config.api_key_env} holds no key; set it, name another one with "
            "score.judge.api_key_env, or give an endpoint without keys as score.judge.base_url"
        )


def key_problem(variable: str) -> str | None:
    """Say why an environment variable must not be sent to a judge as its key, or None where it may."""
    listed = [name.strip() for name in os.environ.get(LISTED, "").split(",")]
    if _JUDGE_KEYS.fullmatch(variable) or variable in listed:
        return None
    name = one_line(variable, 80)
    return (
        f"score.judge.api_key_env={name}: not a judge's key, and its value would be sent to the judge; allowed: "
        f"OPENAI_API_KEY, a name that ends in _JUDGE_KEY, or one that the environment variable {LISTED} lists "
        f"(NAME,NAME): put it there only if it is a judge's"
    )


def judge_key(variable: str) -> str | None:
    """Return the key in an environment variable, or None where it holds none.

    Raises:
        UsageError: for a variable that must not be sent to a judge.
    """
    problem = key_problem(variable)
    if problem:
        raise UsageError(problem)
    return os.environ.get(variable) or None


@dataclass
class Spending:
    """Requests and tokens of one call of the command.

    Attributes:
        requests: number sent, without the client's retries.
        cached: number answered out of the cache.
        input_tokens, output_tokens: as the endpoint counts them.
    """

    requests: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def cost(self, config: JudgeConfig) -> float | None:
        """Return US dollars, or None where no price is given."""
        if config.input_price is None and config.output_price is None:
            return None
        return _dollars(config, self.input_tokens, self.output_tokens)


class Budget:
    """Cost limit: admits a request where its highest cost and that of all running requests stay within it.

    Args:
        config: with the prices.
        limit: US dollars; None for no limit.
    """

    def __init__(self, config: JudgeConfig, limit: float | None) -> None:
        self.spent = Spending()
        self._config, self._limit = config, limit
        self._reserved = 0.0
        self._lock = threading.Lock()

    def reserve(self, messages: Sequence[Message]) -> float | None:
        """Reserve and return the highest cost of a request in US dollars; None where the limit forbids it."""
        most = _dollars(self._config, estimated_tokens(messages), self._config.max_tokens)
        with self._lock:
            spent = self.spent.cost(self._config) or 0.0
            if self._limit is not None and spent + self._reserved + most > self._limit:
                return None
            self._reserved += most
            self.spent.requests += 1
        return most

    def settle(self, reserved: float, input_tokens: int, output_tokens: int) -> None:
        """Count the tokens of a request and release its reservation."""
        with self._lock:
            self._reserved -= reserved
            self.spent.input_tokens += input_tokens
            self.spent.output_tokens += output_tokens

    def count_cached(self) -> None:
        """Count a reply out of the cache."""
        with self._lock:
            self.spent.cached += 1


def estimated_tokens(messages: Sequence[Message]) -> int:
    """Estimate the tokens of a prompt by its characters, since the endpoint's tokenizer is not known."""
    return sum(len(message["content"]) // _CHARS_PER_TOKEN + _TOKENS_PER_MESSAGE for message in messages)


def estimate(config: JudgeConfig, prompts: Sequence[Sequence[Message]]) -> str:
    """Format an upper bound on the tokens and the cost of these requests."""
    tokens_in = sum(estimated_tokens(messages) for messages in prompts)
    tokens_out = len(prompts) * config.max_tokens
    text = f"{len(prompts):,} requests, about {tokens_in:,} tokens in and at most {tokens_out:,} out"
    if config.input_price is None and config.output_price is None:
        return text + " (no price is given: score.judge.input_price, output_price)"
    return f"{text}: at most about ${_dollars(config, tokens_in, tokens_out):.2f}"


def _dollars(config: JudgeConfig, tokens_in: int, tokens_out: int) -> float:
    return (tokens_in * (config.input_price or 0.0) + tokens_out * (config.output_price or 0.0)) / 1e6


V = TypeVar("V", bound=Mapping[str, Any])


class Cache(Generic[V]):
    """SQLite cache of judge replies and rewards, keyed by a hash of all inputs; values are JSON objects.

    Args:
        path: the SQLite file; made where it does not exist.

    Raises:
        UsageError: for a file that is damaged or not writable.
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
                f"{path}: not usable as a cache ({error}); delete it (its contents are requested or computed again) or "
                "make its folder writable"
            ) from error

    def get(self, key: str) -> V | None:
        """Return the value of a key, or None."""
        with self._lock:
            row = self._database.execute("SELECT value FROM found WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        value: V = json.loads(row[0])
        return value

    def put(self, key: str, value: V) -> None:
        """Store a value; where two processes store one key, the first value stays."""
        with self._lock:
            self._database.execute("INSERT OR IGNORE INTO found VALUES (?, ?)", (key, json.dumps(value)))
