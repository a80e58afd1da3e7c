"""A scorer of one's own is one file: the example of the documentation runs, and what a broken file does is named."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pandas as pd
import pytest

from harness.decide.__main__ import main as decide
from harness.decide.study import decide_study
from harness.score.scorers import load_scorer
from harness.score.study_scores import rescore
from harness.score.trial_scores import collect_scores
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


PLAIN = """
from harness.scorers import Score


def score(outputs):
    rows = [Score(row["split"], row["prompt_id"], 0.5) for row in outputs.completions]
    CHANGE
    return rows
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rows[1] = Score('golden', rows[1].prompt_id, 7)", "score 7; allowed: a number from 0 to 1"),
        ("rows[1] = Score('golden', rows[1].prompt_id, -0.1)", "score -0.1; allowed"),
        ("rows[1] = Score('golden', rows[1].prompt_id, float('nan'))", "score nan; allowed"),
        ("rows[1] = Score('golden', rows[1].prompt_id, 10**400)", "score 1000"),
        ("rows[1] = Score('golden', rows[1].prompt_id, '0.5')", "score 0.5; allowed"),
        ("rows[1] = Score('golden', rows[1].prompt_id, [1])", "score [1]; allowed"),
        ("rows[1] = Score('golden', rows[1].prompt_id, None)", "score None without an unscored_reason"),
        ("rows[1] = Score('golden', rows[1].prompt_id, None, 3)", "unscored_reason is 3; allowed: text"),
        ("rows[1] = Score('golden', rows[1].prompt_id, 0.5, 'why')", "score 0.5 and an unscored_reason (why)"),
        ("rows[1] = Score('golden', 7, 0.5)", "prompt_id is 7; allowed: text"),
        ("rows[1] = Score('golden', 'unheard of', 0.5)", "golden prompt unheard of: no prompt of this study"),
        ("rows.append(rows[0])", "2 scores; return one"),
        ("rows.remove(next(one for one in rows if one.split == 'golden'))", "no score for 1 of "),
        ("rows.clear(); outputs.completions.clear(); outputs.prompts.clear()", "no score for "),
        ("rows = None", "score() failed (TypeError"),
    ],
)
def test_a_score_that_cannot_be_used_is_refused_by_name_and_the_registered_metric_decides(
    change: str, said: str, tmp_path: Path
) -> None:
    study = build_study(tmp_path / "results" / "letters", prompts=10)
    tidy(study)
    before = decide_study(study)
    path = tmp_path / "mine.py"
    path.write_text(PLAIN.replace("CHANGE", change))
    _, failed = rescore(study, [str(path)])
    assert len(failed) == 1
    assert failed[0].startswith(f"mine: {path}: ")
    assert said in failed[0]
    found = decide_study(study)
    assert (found["verdict"], found["difference"]) == (before["verdict"], before["difference"])
    (warned,) = [text for text in found["warnings"] if "its scores are left out" in text]
    assert said in warned
    path.write_text(PLAIN.replace("CHANGE", ""))
    assert rescore(study, [str(path)])[1] == []
    assert not any("its scores are left out" in text for text in decide_study(study)["warnings"])


@pytest.mark.parametrize("value", ["True", "__import__('numpy').float32(0.25)", "1", "__import__('numpy').bool_(0)"])
def test_truth_values_and_numbers_of_numpy_are_scores(value: str, tmp_path: Path) -> None:
    study = build_study(tmp_path / "results" / "letters", prompts=4)
    tidy(study)
    path = tmp_path / "mine.py"
    path.write_text(PLAIN.replace("0.5", value).replace("CHANGE", ""))
    scores, failed = rescore(study, [str(path)])
    assert failed == []
    assert pd.read_csv(scores).query("scorer == 'mine'")["score"].between(0, 1).all()


@pytest.mark.parametrize("value", ["7", "inf", "nan", "a word"])
def test_bad_scores_that_stand_in_a_study_already_do_not_block_its_metric(value: str, tmp_path: Path) -> None:
    study = build_study(tmp_path / "results" / "letters", prompts=10)
    tidy(study)
    path = collect_scores(study)
    before = decide_study(study)
    scores = pd.read_csv(path, dtype=str, keep_default_na=False)
    pd.concat([scores, scores.tail(1).assign(scorer="mine", score=value)]).to_csv(path, index=False)
    found = decide_study(study)
    assert (found["verdict"], found["difference"]) == (before["verdict"], before["difference"])
    assert any(text.startswith("scorer mine is left out of scores: ") for text in found["warnings"])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert decide([str(path), "--metric", found["metric"]]) == 0
    assert "scorer mine is left out" in said.getvalue()


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
