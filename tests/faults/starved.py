"""A study under limits of the system, as `ulimit` sets them: each command ends in a sentence, the last one finishes."""

from __future__ import annotations

import collections
import re
import resource
from functools import partial
from pathlib import Path

from tests.faults.disturbed import Undisturbed, ended, log_of, start

# Of a file's size, in KiB: the study cannot be registered; no weights and no report; weights, but no state of the optimiser.
FILE_SIZES = (1, 40, 800)
PAGE_SIZE = 100  # the verdict can be written, the report's page cannot


def file_sizes(study: Undisturbed) -> collections.Counter[str]:
    """Run the command under limits of file size, one larger than the other, on one study; then without a limit."""
    folder = study.new("limited")
    for size in FILE_SIZES:
        _fails(folder, size)
    study.finishes(folder, what="after limits of file size")
    (folder / "results" / "faults" / "report.html").unlink()
    said = _fails(folder, PAGE_SIZE)
    assert "verdict: " in said, f"no verdict where only the report is missing\n{said}"
    assert "no report: OSError: [Errno 27] File too large: " in said, said
    study.finishes(folder, what="after a report that could not be written")
    return collections.Counter({"file-size limit": len(FILE_SIZES) + 1})


def _fails(folder: Path, size: int) -> str:
    """Require that the command fails under a limit, and says so without a traceback; return what it said."""
    (folder / "log.txt").unlink(missing_ok=True)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size * 1024, hard))
    status, said = ended(start(folder / "results", limit)), log_of(folder)
    assert status in (1, 2), f"exit status {status} under {size} KiB\n{said}"
    assert re.search("File too large|file-size limit", said), said
    assert "Traceback" not in said, said
    return said
