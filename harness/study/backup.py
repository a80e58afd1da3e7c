"""Second copies of the few files that nothing can make again: what was registered, what was selected, who looked.

A file that is a beginning of its twin was cut off (the disk was full, the machine went down), and one that is no text
was damaged: both are put back. So is a twin where the file has the hash that was noted beside it. A file that differs
otherwise was changed by somebody, and is refused.
"""

from __future__ import annotations

from pathlib import Path

from harness.study.errors import UsageError
from harness.study.files import FileRecord, file_sha256, write_text

_JUDGED = "study.yaml"  # holds a hash of itself: `harness.sweep.registration` refuses a change of it
NAMES = (_JUDGED, "selection.json", "ledger.jsonl")


def write_twice(path: Path, text: str) -> None:
    """Write the twin, its hash, then the file: a file that is there always has its twin."""
    write_text(twin_of(path), text)
    write_text(_hash_of(path), file_sha256(twin_of(path)))
    write_text(path, text)


def put_back(study: Path) -> list[str]:
    """Put back what was cut off or damaged in a study's folder, file or twin; return the names of the files.

    Raises:
        UsageError: where a file was changed by somebody.
    """
    mended = []
    for path in (study / name for name in NAMES):
        if not path.is_file() or not twin_of(path).is_file():
            continue
        found, twin = path.read_bytes(), twin_of(path).read_bytes()
        if _is_text(twin) and (_is_beginning(found, twin) or not _is_text(found)):
            write_text(path, twin.decode("utf-8"))
            mended.append(path.name)
        elif found == twin:
            continue
        elif _has_hash(path) or (path.name != _JUDGED and _is_text(found) and _is_rest_of(twin, found)):
            write_twice(path, found.decode("utf-8"))
        elif path.name != _JUDGED:
            raise UsageError(
                f"{path}: is not what the harness wrote; it says what was selected or looked at before the verdict: "
                f"put it back as it was (a second copy is {twin_of(path)})"
            )
    return mended


def put_back_known(path: Path, known: FileRecord | None) -> None:
    """Put back a file whose hash is known, where it is not that file any more and its twin is."""
    twin = twin_of(path)
    if known is None:
        return
    is_there = path.is_file() and file_sha256(path) == known["sha256"]
    if not is_there and twin.is_file() and file_sha256(twin) == known["sha256"]:
        write_text(path, twin.read_text(encoding="utf-8"))


def is_twin(path: Path) -> bool:
    """Return whether a file and its second copy are equal; those of older versions have none."""
    return not twin_of(path).is_file() or (path.is_file() and path.read_bytes() == twin_of(path).read_bytes())


def _has_hash(path: Path) -> bool:
    """Return whether a file is the one whose hash was noted beside its twin: then the twin was damaged."""
    noted = _hash_of(path)
    return noted.is_file() and noted.read_bytes() == file_sha256(path).encode()


def _hash_of(path: Path) -> Path:
    return twin_of(path).with_name(f"{path.name}.sha256")


def _is_beginning(text: bytes, whole: bytes) -> bool:
    return len(text) < len(whole) and whole.startswith(text)


def _is_rest_of(twin: bytes, whole: bytes) -> bool:
    """Return True where a twin is what damage left of the whole file."""
    return _is_beginning(twin, whole) or not _is_text(twin)


def _is_text(content: bytes) -> bool:
    """Return True for what the harness or an editor may have written: UTF-8 without control characters."""
    try:
        return not any(ord(character) < 32 and character not in "\n\r\t" for character in content.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def twin_of(path: Path) -> Path:
    """Return where a file's second copy is."""
    return path.parent / ".twins" / path.name
