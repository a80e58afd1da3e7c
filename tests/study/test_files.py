"""Files on disk: written whole or not at all, sealed, hashed once per state, and read as far as they can be."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.study.files import (
    FileCache,
    Reader,
    digest,
    drop_temporaries,
    file_sha256,
    is_broken,
    is_sealed,
    locked,
    locked_if_free,
    number,
    read_jsonl,
    seal,
    write_json,
    write_text,
)
from harness.study.integrity import changed_files, fingerprint


def test_a_write_returns_the_record_of_the_file_and_tells_the_audit_hooks(tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    listening = [True]
    sys.addaudithook(lambda event, args: told.append(args) if listening and event == "harness.write" else None)
    path = tmp_path / "a" / "notes.txt"
    record = write_text(path, "a\r\nb \udcff\n")
    listening.clear()  # a hook cannot be removed
    assert path.read_bytes() == b"a\r\nb \\udcff\n"
    assert record == fingerprint(path)
    assert told == [(str(path),)]
    assert [entry.name for entry in path.parent.iterdir()] == ["notes.txt"]


def test_a_write_that_fails_keeps_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*facts\.json"):
        write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_half_written_is_deleted_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.fsync", lambda number: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if not child:
        write_json(tmp_path / "manifest.json", {})
    os.waitpid(child, 0)
    (tmp_path / ".lock").touch()
    (tmp_path / "manifest.json").touch()
    assert len(list(tmp_path.iterdir())) == 3
    drop_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "manifest.json"}


def test_a_seal_holds_until_something_is_changed() -> None:
    sealed = seal({"b": [1, 2], "a": None})
    assert list(sealed) == ["b", "a", "sha256"]
    assert sealed["sha256"] == digest({"a": None, "b": [1, 2]})
    assert is_sealed(sealed)
    assert seal(sealed) == sealed
    for changed in (sealed | {"a": 0}, sealed | {"c": 0}, {"b": sealed["b"], "sha256": sealed["sha256"]}):
        assert not is_sealed(changed)
        assert is_broken(changed)
    assert not is_sealed({"a": None})
    assert not is_broken({"a": None})


def test_each_state_of_a_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    files = FileCache()
    record = files.write_text(path, '{"a": 1}\n')
    reads: list[str] = []
    listening = [True]
    sys.addaudithook(lambda event, args: reads.append(args[0]) if listening and event == "open" else None)
    assert files.sha256(path) == record["sha256"]
    assert list(read_jsonl(path, files)) == [{"a": 1}]
    assert str(path) not in reads, "what was written is known"
    write_text(path, '{"a": 2}\n')
    for _ in range(3):
        assert changed_files(tmp_path, {"rows.jsonl": record}, files=files) == {"rows.jsonl"}
        assert list(read_jsonl(path, files)) == [{"a": 2}]
    listening.clear()
    assert [str(name) for name in reads].count(str(path)) == 1
    assert files.sha256(path) == file_sha256(path)


def test_contents_are_kept_up_to_a_limit_and_read_again_beyond(tmp_path: Path) -> None:
    files = FileCache(max_bytes=10)
    for name in "abc":
        files.write_text(tmp_path / name, name * 6)
    assert [files.content(tmp_path / name) for name in "abc"] == [b"aaaaaa", b"bbbbbb", b"cccccc"]


def test_a_lock_is_free_again_after_its_block(tmp_path: Path) -> None:
    with locked(tmp_path / "s"), locked_if_free(tmp_path / "s") as free:
        assert not free
    with locked_if_free(tmp_path / "s") as free:
        assert free


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), 10**400, [1]])
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert number(value) is None


def test_a_reader_goes_on_after_a_broken_file_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": "\\ud800"}\n[1]\n{"a": 2}\n')
    (tmp_path / "facts.json").write_text("{")
    reader = Reader(tmp_path)
    assert reader.rows(tmp_path / "rows.jsonl") == [{"a": "\\ud800"}]
    assert reader.mapping(tmp_path / "facts.json") == {}
    assert reader.mapping(tmp_path / "absent.json") == {}
    assert [problem.partition(" cannot be read: ")[0] for problem in reader.problems] == ["rows.jsonl", "facts.json"]
