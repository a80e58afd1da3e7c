"""The walk over architectures: six kinds train alike in both arms, adapters and full, by TRL's engine and the paired one.

All of them: `make walk`, which writes docs/architectures.md.
"""

from __future__ import annotations

import pytest

from benchmarks.walk import ARCHITECTURES, PAGE, SIX, TUNINGS, page_of, walk_one

WAYS = {
    "llama": "packed",
    "gpt2": "packed",
    "mixtral": "packed",
    "bloom": "padded",
    "gemma2": "packed",
    "mamba": "padded",
}


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_class_trains_alike_in_both_arms_and_both_engines(name: str, tuning: str) -> None:
    row = walk_one(name, tuning)
    assert row.way == WAYS[name], row.reason
    assert bool(row.reason) == (row.way != "packed")
    assert row.loss_gap < 1e-4
    assert row.norm_gap < 1e-3


def test_the_page_has_a_line_for_each_architecture_of_the_walk() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(ARCHITECTURES)
    page = page_of([walk_one("gpt2", "lora")])
    assert page.splitlines()[-1].startswith("| GPT2LMHeadModel | Conv1D, absolute positions | packed |")
