"""A fault for each precondition is found on the embedded study's model, and a second study pays nothing for the proof.

All faults, on any checkpoint: `python benchmarks/preconditions.py MODEL`, which writes docs/preconditions.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.preconditions import FAULTS, NAMES, PAGE, Study, measure, page_of

# One for each precondition; the faults of 2 to 4 in the model's own code are in tests/train/test_preconditions.py.
TRIED = (
    "a tensor is not in the file",
    "dropout by config.json",
    "SimPO with TRL's own SFT term",
    "answers in a pack see each other",
    "a word of the data has no row",
    "turns end with a token that is no stop id",
)


@pytest.mark.slow
def test_a_fault_of_each_precondition_is_found_and_a_second_study_pays_nothing(tmp_path: Path) -> None:
    faults = [fault for fault in FAULTS if fault.name in TRIED]
    assert {fault.precondition for fault in faults} == set(NAMES)
    found = measure(Study.of("embedded", None, tmp_path, "data.max_train_pairs=40", "train.threads=1"), faults)
    assert [row["fault"] for row in found["rows"] if not row["said"]] == []
    costs = {cost["step"]: cost["cpu"] for cost in found["costs"]}
    first, second = (costs[f"{which} study: model and engine (2, 3, 4)"] for which in ("first", "second"))
    assert second < first / 5
    page = page_of({"embedded": found})
    assert page.count("\n| 4 |") == 2
    assert "not found" not in page
    assert str(tmp_path) not in page


def test_a_fault_that_is_not_found_is_said() -> None:
    rows = [{"precondition": 1, "fault": "a hole", "said": "", "seconds": 1.0}]
    about = {"pairs": 3, "costs": [], "hardware": {"cpu": "C", "cores": 2, "threads": 1}}
    versions = dict.fromkeys(("torch", "transformers", "trl", "peft"), "1")
    page = page_of({"one": {"rows": rows, "versions": versions, **about}})
    assert "| 1 | a hole | **not found** | **not found** |" in page


def test_the_page_has_a_line_for_each_fault() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for fault in FAULTS:
        assert f"| {fault.precondition} | {fault.name} | " in page
    assert "not found" not in page.replace("where a fault is not found", "")
