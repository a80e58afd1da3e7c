"""Backup copies: a file that was cut off or damaged is put back, one that somebody changed is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.study.backup import put_back, write_twice
from harness.study.errors import UsageError


def test_a_file_that_was_cut_off_is_put_back_from_its_backup(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    write_twice(path, "question: which?\narms: [simpo, dpo]\n")
    path.write_text("question: which?\n")  # cut at the end of a line: still YAML
    assert put_back(tmp_path) == ["study.yaml"]
    assert path.read_text() == "question: which?\narms: [simpo, dpo]\n"
    assert put_back(tmp_path) == []


def test_a_file_that_somebody_changed_is_left_for_the_checks_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    write_twice(path, "margin: 0.05\n")
    path.write_text("margin: 0.01\n")
    assert put_back(tmp_path) == []
    assert path.read_text() == "margin: 0.01\n"


def test_a_file_that_was_deleted_stays_deleted(tmp_path: Path) -> None:
    write_twice(tmp_path / "study.yaml", "margin: 0.05\n")
    (tmp_path / "study.yaml").unlink()
    assert put_back(tmp_path) == []


def test_a_file_that_is_no_text_any_more_is_put_back_though_its_size_is_right(tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    write_twice(path, '{"selected": "beta=0.1"}\n')
    for damaged in (b'{"selected\x00\x00\x00eta=0.1"}\n', b'{"selected\xff\xfe: "beta=0.1"}\n', bytes(25)):
        path.write_bytes(damaged)
        assert put_back(tmp_path) == ["selection.json"]
        assert path.read_text() == '{"selected": "beta=0.1"}\n'


@pytest.mark.parametrize("name", ["selection.json", "ledger.jsonl"])
def test_what_was_selected_or_looked_at_is_refused_by_name_once_it_was_changed(name: str, tmp_path: Path) -> None:
    write_twice(tmp_path / name, '{"selected": "beta=0.1"}\n')
    (tmp_path / name).write_text('{"selected": "beta=0.2"}\n')
    with pytest.raises(UsageError, match=rf"{name}: is not what the harness wrote; .* put it back as it was"):
        put_back(tmp_path)


@pytest.mark.parametrize("name", ["study.yaml", "selection.json", "ledger.jsonl"])
def test_a_damaged_backup_is_written_again_where_the_file_is_right(name: str, tmp_path: Path) -> None:
    path, backup = tmp_path / name, tmp_path / ".twins" / name
    write_twice(path, '{"look": 1}\n')
    for damaged in (b'{"look', bytes(12), b'{"look": 7}\n'):
        backup.write_bytes(damaged)
        assert put_back(tmp_path) == []
        assert backup.read_bytes() == path.read_bytes()


def test_text_that_is_no_utf8_is_written_twice_as_it_is_once(tmp_path: Path) -> None:
    """Regression: a lone surrogate, as of a path on the command line that is no UTF-8, could not be hashed."""
    write_twice(tmp_path / "study.yaml", "command: \udcff\n")
    (tmp_path / ".twins" / "study.yaml").write_text("command: x\n")
    assert put_back(tmp_path) == []
    assert (tmp_path / ".twins" / "study.yaml").read_text() == "command: \\udcff\n"
