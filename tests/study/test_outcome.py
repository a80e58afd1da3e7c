"""Whether a failed trial runs again: the outside world is never a trial's own fault, and one failure proves nothing."""

from __future__ import annotations

import concurrent.futures.process
import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from harness.study.errors import DivergedError, is_outside
from harness.study.files import read_json
from harness.study.outcome import describe, own_failure, set_aside, standing_failure, write_failure

TENSORS = {"weight": torch.zeros(20_000)}
WORDS = Tokenizer(WordLevel({f"word{number}": number for number in range(5_000)}, "word0"))


def raised(run: Callable[[], Any]) -> BaseException:
    """Return what a call raises."""
    try:
        run()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@contextmanager
def soft_limit(kind: int, value: int) -> Iterator[None]:
    """Lower a limit of this process for a moment."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def fill(path: Path) -> None:
    """Write a database that is too large for the limit."""
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE words (word TEXT)")
    database.executemany("INSERT INTO words VALUES (?)", [("x" * 1000,)] * 100)
    database.commit()


WRITERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": lambda path: save_file(TENSORS, path),
    "torch": lambda path: torch.save(TENSORS, str(path)),
    "tokenizers": lambda path: WORDS.save(str(path)),
    "sqlite": fill,
    "python": lambda path: path.write_bytes(bytes(100_000)),
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_file_size_limit_is_the_outside_world_in_every_library(library: str, tmp_path: Path) -> None:
    with soft_limit(resource.RLIMIT_FSIZE, 20_000):
        error = raised(lambda: WRITERS[library](tmp_path / "file"))
    assert is_outside(error), repr(error)


@pytest.mark.parametrize("library", WRITERS)
def test_no_more_descriptors_is_the_outside_world_in_every_library(library: str, tmp_path: Path) -> None:
    lowest_free = os.dup(0)
    os.close(lowest_free)
    with soft_limit(resource.RLIMIT_NOFILE, lowest_free):
        error = raised(lambda: WRITERS[library](tmp_path / "file"))
    assert is_outside(error), repr(error)


@pytest.mark.parametrize("load", [load_file, torch.load], ids=["safetensors", "torch"])
def test_a_file_that_was_cut_off_is_the_outside_world(load: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save_file(TENSORS, path) if load is load_file else torch.save(TENSORS, path)
    os.truncate(path, path.stat().st_size // 2)
    assert is_outside(raised(lambda: load(str(path))))


def chained(inner: BaseException, *, cause: bool) -> BaseException:
    """Return an error that another one led to."""

    def run() -> None:
        try:
            raise inner
        except type(inner) as error:
            if cause:
                raise ValueError("not saved") from error
            raise ValueError("not saved") from None

    return raised(run)


OUTSIDE = {
    "cause": chained(OSError(5, "Input/output error"), cause=True),
    "context": chained(MemoryError(), cause=False),
    "group": ExceptionGroup("two of them", [ValueError("a"), ExceptionGroup("inner", [OSError(28, "full")])]),
    "Rust": Exception("Error while serializing: IoError(StorageFull, os error 28)"),
    "thread": RuntimeError("can't start new thread"),
    "BLAS": RuntimeError("OpenBLAS blas_thread_init: pthread_create failed: Resource temporarily unavailable"),
    "torch's zip": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: Error code 12 (Cannot allocate memory)"),
    "GPU memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "worker": concurrent.futures.process.BrokenProcessPool("a process was terminated abruptly"),
    "loader": RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    "pipe": EOFError(),
    "SQLite": sqlite3.OperationalError("database or disk is full"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_outside_world_is_seen_whatever_class_it_comes_in(name: str) -> None:
    assert is_outside(OUTSIDE[name])


def test_a_circle_of_errors_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_outside(first)


OWN = [
    ValueError("x"),
    KeyError("weight"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    DivergedError(""),
]


@pytest.mark.parametrize("error", OWN, ids=lambda error: type(error).__name__)
def test_an_error_of_the_training_is_not_the_outside_world(error: Exception) -> None:
    assert not is_outside(error)


def attempt(folder: Path, error: BaseException, stage: str = "train") -> bool:
    """Fail once more, as a new run of the command; return whether the failure stands."""
    set_aside(folder)
    write_failure(folder, describe(error, stage, {}, folder))
    return bool(standing_failure(folder))


def test_an_unknown_error_stands_once_it_has_come_back(tmp_path: Path) -> None:
    assert not attempt(tmp_path, RuntimeError("bad value 0x7f01 in step 3"))
    assert "RuntimeError: bad value" in own_failure(tmp_path)
    assert attempt(tmp_path, RuntimeError("bad value 0x8a44 in step 4"))
    assert attempt(tmp_path, RuntimeError("bad value 0x8a44 in step 4")), "a third time, after retry_failed=true"


def test_another_error_or_stage_is_a_first_time_again(tmp_path: Path) -> None:
    assert not attempt(tmp_path, RuntimeError("bad value"))
    assert not attempt(tmp_path, RuntimeError("odd value"))
    assert not attempt(tmp_path, ValueError("odd value"))
    assert not attempt(tmp_path, ValueError("odd value"), "generate")


def test_a_worker_that_was_killed_in_between_is_no_reason_to_forget_the_error(tmp_path: Path) -> None:
    assert not attempt(tmp_path, RuntimeError("bad value"))
    set_aside(tmp_path)  # and the attempt leaves nothing
    assert attempt(tmp_path, RuntimeError("bad value"))


def test_a_second_launch_within_one_command_is_no_second_attempt(tmp_path: Path) -> None:
    for _ in range(2):
        write_failure(tmp_path, describe(RuntimeError("bad value"), "train", {}, tmp_path))
    assert not standing_failure(tmp_path)


def test_the_outside_world_never_stands(tmp_path: Path) -> None:
    for _ in range(3):
        assert not attempt(tmp_path, RuntimeError("unexpected pos 576 vs 534"))
    assert not own_failure(tmp_path)
    assert "a file could not be written whole" in read_json(tmp_path / "failure.json")["message"]


def test_a_failure_of_an_older_version_stands_as_it_did(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text('{"stage": "train", "error": "E", "message": "x", "retries": false}')
    assert standing_failure(tmp_path) == own_failure(tmp_path) == "train: E: x"


def test_a_failure_that_cannot_be_written_raises_nothing(tmp_path: Path) -> None:
    with soft_limit(resource.RLIMIT_FSIZE, 10):
        write_failure(tmp_path, describe(ValueError("x"), "train", {}, tmp_path))
    assert list(tmp_path.iterdir()) == []
