"""The nouns that stages exchange, and how they are read from and written to disk.

Every file is written to a temporary name in the same folder and renamed, so that a file which exists is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

SCORE_COLUMNS = (
    "arm",
    "config",
    "seed",
    "split",
    "prompt_id",
    "scorer",
    "score",
    "cluster",
    "tokens",
    "chars",
    "unscored_reason",
    "stage",
    "flag",
)


class UsageError(ValueError):
    """Wrong input of the user: the message says what, which value, what is allowed, what to do. Exit status 2."""


class UnreachableError(UsageError):
    """A model or data set on the Hub that cannot be fetched from here: a plan can do without, a run cannot."""


class DivergedError(RuntimeError):
    """A policy whose loss, gradient norm or log-probabilities are not finite numbers: it has no usable weights."""


class WorkerDiedError(RuntimeError):
    """A process that worked on a trial ended without a result: killed, or out of the machine's memory."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


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
    """

    pair_id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    conversational: bool
    row: int

    @property
    def prompt_id(self) -> str:
        """Identify the prompt by its content: pairs of one prompt share it, in whatever file they stand."""
        return prompt_id(self.prompt)


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
        about: what a published golden set's own tools call it: `form`, `id`, and more.
        follows: the prompt_id of the turn before, whose answer goes in front of the last turn; None for a first turn.
    """

    prompt_id: str
    prompt: tuple[Message, ...]
    checks: tuple[dict[str, Any], ...]
    cluster: str | None
    conversational: bool
    row: int
    about: dict[str, Any] = field(default_factory=dict)
    follows: str | None = None

    def conversation(self, said: str) -> tuple[Message, ...]:
        """Return the turns to answer; `said` is the answer to the prompt that this one follows."""
        if self.follows is None:
            return self.prompt
        answer: Message = {"role": "assistant", "content": said}
        return (*self.prompt[:-1], answer, self.prompt[-1])


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, with the reason that the user reads."""

    path: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.row}: {self.reason}"


@dataclass(frozen=True)
class Completion:
    """What a policy answered to a prompt.

    Attributes:
        tokens: number of generated tokens, the one that ends the turn included.
        ended: True where the policy ended its turn; False where it was cut off at `generate.max_new_tokens`.
    """

    split: str
    prompt_id: str
    prompt: str
    completion: str
    tokens: int
    ended: bool


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


def prompt_id(prompt: Iterable[Message]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the roles and contents, in order."""
    content = [[message["role"], message["content"]] for message in prompt]
    return digest(content)[:16]


def digest(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value; the order of keys does not matter, that of lists does."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a folder; the kernel frees the lock of a process that dies.

    Not to be nested: a second lock of one process on one folder waits for itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def locked_if_free(folder: Path) -> Iterator[bool]:
    """Lock a folder that is there, where nobody works on it; yield whether it is locked."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is complete or absent, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write that fails names no file by itself
        raise


def drop_temporaries(folder: Path) -> None:
    """Delete what `write_text` left of files that it was killed in; nobody may write into the folder meanwhile."""
    for path in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name) and path.is_file():
            path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; NaN is refused, since it does not survive other readers."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Return the text of an indented JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file; a truncated one is a ValueError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); delete it and run the same command again") from error


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_text(path, to_jsonl(rows))


def to_jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """Return the text of one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read one JSON object a line; a broken line is a ValueError that names file and line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
