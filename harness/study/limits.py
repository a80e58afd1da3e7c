"""A limit on the CPU time of a computation: `with time_limit(seconds)` -> the block ends, or raises `TooSlowError`."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class TooSlowError(Exception):
    """A computation took longer than it may."""


def can_limit() -> bool:
    """Return whether `time_limit` works here: in the main thread, on a system with interval timers."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop the block after so many seconds of the process's CPU time; a busy machine does not shorten it.

    Python's own loops and its regular expressions can be stopped; they look for signals while they run. Without effect
    where `can_limit` is False.

    Raises:
        TooSlowError: where the block takes longer.
    """
    if not can_limit():
        yield
        return
    is_running = True

    def stop(number: int, frame: FrameType | None) -> None:
        if is_running:  # else the timer ran out after the block had ended
            raise TooSlowError

    before = signal.signal(signal.SIGVTALRM, stop)
    # It strikes again and again: a library may swallow one exception.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        yield
    finally:
        is_running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
