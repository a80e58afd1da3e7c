"""Backup copies of files that cannot be regenerated: study.yaml, selection.json, ledger.jsonl.

A file that is a beginning of its backup was cut off (full disk, crash); one that is no text was damaged: both are put
back. A backup is put back where the file has the hash beside the backup. Any other difference is a change by a person
and is refused.
"""

from __future__ import annotations

from pathlib import Path

from harness.study.errors import UsageError
from harness.study.files import file_sha256, write_text

_SEALED = "study.yaml"  # its own seal shows a change: `harness.study.registration` refuses it
NAMES = (_SEALED, "selection.json", "ledger.jsonl")


def write_twice(path: Path, text: str) -> None:
    """Write the backup, its hash, then the file: an existing file always has its backup."""
    record = write_text(backup_of(path), text)
    write_text(_hash_of(path), record["sha256"])
    write_text(path, text)


def put_back(study: Path) -> list[str]:
    """Put back the cut off or damaged ones of a study's files, and their backups; return the names of the files.

    Raises:
        UsageError: for a file that a person changed.
    """
    mended = []
    for path in (study / name for name in NAMES):
        if not path.is_file() or not backup_of(path).is_file():
            continue
        found, backup = path.read_bytes(), backup_of(path).read_bytes()
        if _is_text(backup) and (_is_beginning(found, backup) or not _is_text(found)):
            write_text(path, backup.decode("utf-8"))
            mended.append(path.name)
        elif found == backup:
            continue
        elif _has_hash(path) or (path.name != _SEALED and _is_text(found) and _is_rest_of(backup, found)):
            write_twice(path, found.decode("utf-8"))
        elif path.name != _SEALED:
            raise UsageError(
                f"{path}: is not what the harness wrote; it says what was selected or looked at before the verdict: "
                f"put it back as it was (a backup copy is {backup_of(path)})"
            )
    return mended


def equals_backup(path: Path) -> bool:
    """Return whether a file equals its backup; True where there is no backup."""
    backup = backup_of(path)
    return not backup.is_file() or (path.is_file() and path.read_bytes() == backup.read_bytes())


def backup_of(path: Path) -> Path:
    """Return the path of a file's backup."""
    return path.parent / ".twins" / path.name


def _has_hash(path: Path) -> bool:
    """Return whether a file has the hash that was written beside its backup: the backup is the damaged one."""
    noted = _hash_of(path)
    return noted.is_file() and noted.read_bytes() == file_sha256(path).encode()


def _hash_of(path: Path) -> Path:
    return backup_of(path).with_name(f"{path.name}.sha256")


def _is_beginning(text: bytes, whole: bytes) -> bool:
    return len(text) < len(whole) and whole.startswith(text)


def _is_rest_of(backup: bytes, whole: bytes) -> bool:
    """Return True where a backup is cut off or damaged."""
    return _is_beginning(backup, whole) or not _is_text(backup)


def _is_text(content: bytes) -> bool:
    """Return True for UTF-8 without control characters, as the harness and editors write it."""
    try:
        return not any(ord(character) < 32 and character not in "\n\r\t" for character in content.decode("utf-8"))
    except UnicodeDecodeError:
        return False
