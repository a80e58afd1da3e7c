"""A study that is killed, cut off, doubled or starved of disk ends as if nothing had happened: a short campaign.

`make faults` is the long one.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.servers import command


@pytest.mark.slow
def test_a_disturbed_study_ends_with_the_scores_and_the_verdict_of_an_undisturbed_one(tmp_path: Path) -> None:
    done = command.run("tests.faults", "--short", "--work", str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    counts = {
        name: int(count) for name, count in re.findall(r"^([^:\n]+): (\d+), all equal", done.stdout, re.MULTILINE)
    }
    assert counts["kill -9"] == 2
    assert counts["damaged"] >= 50
    assert counts["file-size limits"] == 4
    if not counts["full disk"]:
        pytest.skip("no full disk: a tmpfs cannot be mounted here; all else passed")
