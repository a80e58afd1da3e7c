"""A scorer of one's own is one file: the example of the documentation runs, and what a broken file does is named."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from harness.score.scorers import load_scorer
from harness.score.study_scores import rescore
from harness.study.errors import UsageError
from harness.study.files import read_jsonl
from harness.sweep.app import run_sweep
from tests.score.test_judge import tidy
from tests.study_fixture import build_study

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scorers.md"


@pytest.fixture
def brevity(tmp_path: Path) -> Path:
    """The documentation's example."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "brevity.py"
    path.write_text(code)
    return path


def test_the_documented_example_scores_a_study(brevity: Path, tmp_path: Path) -> None:
    study = build_study(tmp_path / "results" / "letters", prompts=10)
    tidy(study)
    path, failed = rescore(study, [str(brevity)])
    assert failed == []
    scores = pd.read_csv(path)
    mine = scores[scores["scorer"] == "brevity"]
    golden = [row for row in read_jsonl(study / "base" / "completions.jsonl") if row["split"] == "golden"]
    words = {row["prompt_id"]: len(row["completion"].split()) for row in golden}
    base = mine[mine["arm"] == "sft"].set_index("prompt_id")["score"]
    assert base.to_dict() == pytest.approx({name: 1 - count / 100 for name, count in words.items()})
    assert mine.groupby(["arm", "seed"]).ngroups == 7


@pytest.mark.slow
def test_it_decides_a_sweep_and_its_text_is_registered(brevity: Path, small: list[str]) -> None:
    command = [
        "+method=simpo,dpo",
        "seed=0",
        "study=s",
        *small,
        f"score.scorers=[{brevity}]",
        "decide.metric=brevity",
    ]
    (result,) = run_sweep(command)
    assert result.verdict is not None
    assert result.verdict["metric"] == "brevity"
    assert run_sweep(command)[0].launched == 0
    brevity.write_text(brevity.read_text().replace("100", "50"))
    with pytest.raises(UsageError, match=r"score\.brevity: registered"):
        run_sweep(command)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nothing_like_it", "fails when it is loaded (ModuleNotFoundError"),
        ("x = 1", "has no function `score(outputs)`"),
        ("def score(outputs):\n    return 1 / 0", "score() failed (ZeroDivisionError"),
        ("import sys\ndef score(outputs):\n    sys.exit(0)", "score() failed (SystemExit"),
        ("raise SystemExit", "fails when it is loaded (SystemExit"),
        ("def score(outputs):\n    return [0.5]", "score() returned 0.5"),
    ],
)
def test_a_broken_file_is_named(code: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    study = build_study(tmp_path / "results" / "letters", prompts=3)
    tidy(study)
    _, failed = rescore(study, [str(path)])
    assert len(failed) == 1
    assert failed[0].startswith("mine: ")
    assert said in failed[0]


def test_a_name_that_is_taken_or_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text("")
    with pytest.raises(UsageError, match="choose a name"):
        load_scorer(str(tmp_path / "checks.py"))
    with pytest.raises(UsageError, match="no such file"):
        load_scorer(str(tmp_path / "nowhere.py"))


def test_a_file_is_named_before_it_runs_so_that_one_that_hangs_is_known(
    brevity: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = build_study(tmp_path / "results" / "letters", prompts=3)
    tidy(study)
    rescore(study, [str(brevity)])
    assert f"{brevity}: scoring 7 runs" in capfd.readouterr().err
