"""A study that is killed, cut off, doubled or starved of disk ends as if nothing had happened: a short campaign.

`make faults` is the long one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.twins import put_back, write_twice

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_disturbed_study_ends_with_the_scores_and_the_verdict_of_an_undisturbed_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults", "--kills", "12", "--times", "2", "--work", str(tmp_path / "work")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    counts = {
        name: int(count) for name, count in re.findall(r"^([\w -]+): (\d+), all equal", done.stdout, re.MULTILINE)
    }
    assert counts["kill -9"] == 12
    assert counts["SIGTERM"] == 2
    assert counts["truncated"] >= 30
    assert counts["two at once"] == 1
    assert "full disk" in counts


def test_a_file_that_was_cut_off_is_put_back_from_its_twin(tmp_path: Path) -> None:
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
