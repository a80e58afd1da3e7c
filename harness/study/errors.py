"""Exceptions of the harness, and the test for errors of the outside world: full disk, limits, memory, dead workers.

Compiled libraries raise their own classes for these: the texts of an error and of its causes count, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor

from harness.study.text import redact


class UsageError(ValueError):
    """Wrong input of the user: the message says what, which value, what is allowed, what to do. Exit status 2."""


class UnreachableError(UsageError):
    """A model or data set on the Hub that cannot be fetched from here: a plan works without it, a run does not."""


class DivergedError(RuntimeError):
    """A policy whose loss, gradient norm or log-probabilities are not finite numbers: it has no usable weights."""


class WorkerDiedError(RuntimeError):
    """A process that worked on a trial ended without a result: killed, or out of the machine's memory."""


class NoRoomError(RuntimeError):
    """Training ran out of memory, where a smaller micro-batch may help."""


class DoesNotFitError(RuntimeError):
    """A model that cannot be trained in this memory, however small the micro-batch."""


_CLASSES = (OSError, MemoryError, EOFError, BrokenExecutor, UsageError, WorkerDiedError)
_NAMES = ("OutOfMemoryError", "SafetensorError")  # of torch and safetensors, which are not imported here
_NUMBERS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ENOENT, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.ENOLCK, errno.ENODEV, errno.ENXIO),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN),
)
_NOT_WRITTEN = "a file could not be written whole (full disk, quota or file-size limit)"
_NOT_READ = "a file is cut off or damaged"
_NO_MEMORY = "this machine has too little memory"
_TEXTS = {  # messages of libraries that hide the system's message -> explanation
    "unexpected pos": _NOT_WRITTEN,
    "iostream error": _NOT_WRITTEN,
    "PytorchStreamWriter": _NOT_WRITTEN,
    "PytorchStreamReader": _NOT_READ,
    "disk I/O error": _NOT_WRITTEN,
    "database or disk is full": _NOT_WRITTEN,
    "unable to open database file": "a file could not be opened (permissions or too many open files)",
    "can't start new thread": "no thread could be started (limit of processes, or memory)",
    "can't allocate memory": _NO_MEMORY,
    "std::bad_alloc": _NO_MEMORY,
    "killed by signal": "a process was killed (often for want of memory)",
    "exited unexpectedly": "a process was killed (often for want of memory)",
}
_SYSTEM_ERROR = re.compile(r"\bos error \d+|\[[Ee]rrno \d+\]")  # as Rust and Python print one


_OUT_OF_MEMORY = re.compile(  # of torch on a GPU or CPU, of CUDA, its libraries (cuBLAS, cuDNN, NCCL) and of C++
    r"out of memory|not enough memory|(can't|cannot) allocate memory|_STATUS_ALLOC_FAILED|bad_alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, says that memory ran out: a GPU's or the machine's.

    Libraries have many names for it: torch's own class, and plain RuntimeErrors of CUDA and of what is built on it.
    """
    part: BaseException | None = error
    seen: set[int] = set()
    while part is not None and id(part) not in seen and not isinstance(part, UsageError | DoesNotFitError):
        seen.add(id(part))
        if isinstance(part, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(part).__mro__):
            return True
        if isinstance(part, RuntimeError | OSError) and _OUT_OF_MEMORY.search(str(part)):
            return True
        part = part.__cause__  # and no context: what failed in handling another error is an error of its own
    return False


def is_outside(error: BaseException) -> bool:
    """Return whether an error or one of its causes comes from the outside world, and not from the training."""
    return is_out_of_memory(error) or any(
        isinstance(part, _CLASSES) or _is_named(part) or _has_known_text(str(part)) for part in _with_causes(error)
    )


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its causes and contexts, and the members of groups."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        part = todo.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        todo += [part.__cause__, part.__context__]
        if isinstance(part, BaseExceptionGroup):
            todo += part.exceptions


def _is_named(error: BaseException) -> bool:
    return any(kind.__name__ in _NAMES for kind in type(error).__mro__)


def _has_known_text(message: str) -> bool:
    words = (*_TEXTS, *map(os.strerror, _NUMBERS))
    return bool(_SYSTEM_ERROR.search(message)) or any(word in message for word in words)


def meaning(error: BaseException) -> str:
    """Explain a library's message in plain words; empty for messages without an explanation."""
    return next((means for text, means in _TEXTS.items() if text in str(error)), "")


@contextlib.contextmanager
def in_one_sentence(command: str) -> Iterator[None]:
    """Print an error of the outside world as one sentence and exit with status 1; other errors pass."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if not is_outside(error):
            raise
        print(f"{command}: {problem(error)}", file=sys.stderr)
        sys.exit(1)


def problem(error: BaseException) -> str:
    """Return one sentence: which error stopped a command, and what to do."""
    means = f"; {meaning(error)}" if meaning(error) else ""
    what = f"{type(error).__name__}: {redact(error)}{means}"
    return f"{what}; what is done is kept: mend the cause and run the same command again"
