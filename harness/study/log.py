"""log.txt of a trial: prints, warnings and log messages go to its folder and not to the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from harness.study.text import redact

LOG = logging.getLogger("harness.trial")
MAX_BYTES = 5_000_000  # a library that repeats itself must not fill the disk
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# These configure loggers of their own, which do not pass on to the root.
_LIBRARIES = ("transformers", "trl", "accelerate", "peft", "datasets", "huggingface_hub", "deepspeed")
_PACKAGE = str(Path(__file__).parents[1])  # shown as `harness`: a shared study must not show paths of this machine


class _Log(io.TextIOBase):
    """A stream into a file that never raises: a full disk, or a file that has grown too long, ends the log only.

    Attributes:
        terminal: the stream that stood in its place, for messages to the user.
    """

    def __init__(self, path: Path, replaced: TextIO) -> None:
        self.terminal: TextIO = replaced.terminal if isinstance(replaced, _Log) else replaced
        self._file: TextIO | None = path.open("a", encoding="utf-8", errors="backslashreplace")
        self._left = MAX_BYTES - path.stat().st_size

    def write(self, text: str) -> int:
        """Write; after the trial, pass text from a library that kept this stream on to the terminal."""
        text = redact(text)
        if self._file is None:
            return sys.stderr.write(text) if sys.stderr is not self else len(text)
        text = text.replace(_PACKAGE, "harness")
        with contextlib.suppress(OSError, ValueError):
            if self._left > 0:
                self._file.write(text[: self._left])
                if self._left <= len(text):
                    self._file.write("\n(the log ends here: it has reached its limit)\n")
                self._left -= len(text)
                self._file.flush()
        return len(text)

    def writable(self) -> bool:
        """Return True: this is a stream to write to."""
        return True

    def end(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


class _UtcFormatter(logging.Formatter):
    converter = time.gmtime  # type: ignore[assignment]  # as the library's documentation advises


@contextlib.contextmanager
def trial_log(folder: Path, name: str) -> Iterator[None]:
    """Send prints, warnings and log messages (information and worse) to `folder/log.txt`; another run adds to it.

    A library whose log is wanted must have been imported before: transformers sets up its logger at its first import.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = _Log(folder / "log.txt", sys.stderr)
    handler = logging.StreamHandler(log)
    handler.setFormatter(_UtcFormatter(_FORMAT))
    with contextlib.ExitStack() as stack:
        stack.callback(log.end)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")
        for logger in ("", "py.warnings", *_LIBRARIES):
            stack.enter_context(_only(handler, logging.getLogger(logger)))
        warnings.showwarning = _log_warning  # catch_warnings puts the old one back
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        _enable()
        LOG.info("%s", name)
        yield


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    where = "/".join(Path(filename).parts[-2:])  # no paths of this machine
    logging.getLogger("py.warnings").warning("%s:%s: %s: %s", where, lineno, category.__name__, message)


def _enable() -> None:
    """Enable the existing loggers: Hydra's set-up of logging disables them."""
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] in (*_LIBRARIES, "harness", "py"):
            logger.disabled = False


@contextlib.contextmanager
def _only(handler: logging.Handler, logger: logging.Logger) -> Iterator[None]:
    """Let a logger write to this handler alone."""
    kept = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = kept[0], kept[2]
        logger.setLevel(kept[1])


def say(message: str) -> None:
    """Print a line on the terminal (stderr) above a progress bar, and in the log where a trial runs."""
    from tqdm import tqdm

    message = redact(message)
    stream = sys.stderr
    if isinstance(stream, _Log):
        LOG.warning("%s", message)
        stream = stream.terminal
    tqdm.write(message, file=stream)


@contextlib.contextmanager
def saying_while(what: str, *, every: float = 60.0) -> Iterator[None]:
    """Say at once what the block does, and again each time that it has gone on for `every` seconds.

    What hangs is named even where it lets no other thread run, as a regular expression does.
    """
    say(what)
    ended, start = threading.Event(), time.monotonic()

    def repeat() -> None:
        while not ended.wait(every):
            say(f"{what}: still running after {(time.monotonic() - start) / 60:.0f} min; Ctrl-C ends it")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def prepare_process() -> None:
    """Set the environment that libraries read at import: a quiet terminal, and threads that sleep while they wait.

    Spinning threads (the default of GNU OpenMP) make two processes on one machine several times slower than one.
    """
    for name, value in {
        "OMP_WAIT_POLICY": "PASSIVE",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message=r"(?s).*is validated against ConfigStore schema")
    for package in ("transformers", "trl", "peft", "accelerate", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=rf"{package}\b")
