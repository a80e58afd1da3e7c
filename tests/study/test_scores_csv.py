"""CSV files do nothing in a spreadsheet program, and say the same when they are read back."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.decide.rule import verdict
from harness.decide.scores_file import read_scores
from harness.report.study import read_study
from harness.study.files import write_text
from harness.study.scores_csv import to_csv, written_and_read

FORMULAS = ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://evil.example")']


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_written_as_text(text: str) -> None:
    cell = next(csv.reader(io.StringIO(to_csv(pd.DataFrame({"a": [text]})).partition("\n")[2], newline="")))[0]
    assert cell == f"'{text}"


@given(st.text(alphabet="'=+-@ab\t,\"", max_size=6))
def test_every_text_comes_back_as_it_was(text: str) -> None:
    assert written_and_read(pd.DataFrame({"a": [text], "b": ["x"]})).to_numpy().tolist() == [[text, "x"]]


def test_numbers_stay_numbers() -> None:
    assert to_csv(pd.DataFrame({"score": [-0.25, 1.0]})) == "score\n-0.25\n1.0\n"


def scores(prompts: list[str]) -> pd.DataFrame:
    rows = [
        {"arm": arm, "config": "c", "seed": seed, "split": "golden", "prompt_id": prompt, "scorer": "checks"}
        | {"score": float((number + seed + (arm == "dpo")) % 3 == 0)}
        for arm in ("simpo", "dpo")
        for seed in (1, 2, 3)
        for number, prompt in enumerate(prompts)
    ]
    return pd.DataFrame(rows)


def test_prompts_named_like_formulas_are_decided_as_under_any_other_name(tmp_path: Path) -> None:
    hostile, plain = scores(FORMULAS), scores([f"p{number}" for number in range(len(FORMULAS))])
    write_text(tmp_path / "scores.csv", to_csv(hostile))
    found = read_scores(tmp_path / "scores.csv")
    assert sorted(set(found["prompt_id"])) == sorted(FORMULAS)
    rule = {"metric": "checks", "margin": 0.05}
    assert verdict(found, **rule)["ci95"] == verdict(plain, **rule)["ci95"]
    assert set(read_study(tmp_path).scores["prompt_id"]) == set(FORMULAS)
