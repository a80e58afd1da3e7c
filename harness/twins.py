"""Second copies of the few files that nothing can make again: what was registered, what was selected, who looked.

A file that is a beginning of its twin was cut off (the disk was full, the machine went down), and is put back.
One that differs otherwise was changed by somebody, which is not for this module to judge.
"""

from __future__ import annotations

from pathlib import Path

from harness.records import write_text

NAMES = ("study.yaml", "selection.json", "ledger.jsonl")


def write_twice(path: Path, text: str) -> None:
    """Write the twin, then the file: a file that is there always has its twin."""
    write_text(_twin(path), text)
    write_text(path, text)


def put_back(study: Path) -> list[str]:
    """Put back what was cut off in a study's folder; return the names of these files."""
    mended = []
    for path in (study / name for name in NAMES):
        if not path.is_file() or not _twin(path).is_file():
            continue
        text, whole = path.read_bytes(), _twin(path).read_bytes()
        if len(text) < len(whole) and whole.startswith(text):
            write_text(path, whole.decode("utf-8"))
            mended.append(path.name)
    return mended


def _twin(path: Path) -> Path:
    return path.parent / ".twins" / path.name
