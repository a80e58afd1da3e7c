"""The top of a report: the two kinds of score, and the runs that decide where looks are registered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from harness.decide.study import decide_study
from harness.report.page import render_report
from harness.report.study import read_study
from harness.report.summary import disagreement, warnings
from harness.study.files import read_json, write_json
from tests.study_fixture import build_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_study(tmp_path / "study", bare=True)


def controlled(folder: Path, shift: float) -> None:
    """Add length-controlled scores: the raw ones, moved for SimPO."""
    scores = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    raw = scores[(scores["scorer"] == "checks") & (scores["split"] == "golden")]
    level = np.where(raw["arm"] == "simpo", 0.5 + shift, 0.5) + 0.001 * raw["prompt_id"].rank(method="dense") / len(raw)
    more = raw.assign(scorer="length_controlled", score=level)
    pd.concat([scores, more]).to_csv(folder / "scores.csv", index=False)


def test_a_length_controlled_verdict_that_differs_is_in_the_first_paragraph(folder: Path) -> None:
    write_json(folder / "verdict.json", read_json(folder / "verdict.json") | {"verdict": "simpo", "margin": 0.05})
    controlled(folder, -0.2)
    (said,) = disagreement(read_study(folder))
    assert "the length-controlled scores (length_controlled) say otherwise than the raw ones (checks): DPO wins" in said
    assert "-20.0 points" in said
    render_report(folder)
    text = (folder / "report.md").read_text()
    assert text.index("say otherwise") < text.index("## ")


def test_a_length_controlled_verdict_that_agrees_is_not_mentioned(folder: Path) -> None:
    write_json(folder / "verdict.json", read_json(folder / "verdict.json") | {"verdict": "simpo", "margin": 0.05})
    controlled(folder, 0.2)
    assert disagreement(read_study(folder)) == []


@pytest.fixture
def looked(tmp_path: Path) -> Path:
    """A study with looks at 3 and 5 seeds, of which 4 are scored: the fourth does not decide yet."""
    folder = build_study(tmp_path / "study", seeds=(0, 1, 2, 3), bare=True)
    settings = yaml.safe_load((folder / "study.yaml").read_text())
    settings |= {"looks": [3, 5], "seeds": {arm: [0, 1, 2, 3, 4] for arm in ("simpo", "dpo")}}
    (folder / "study.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_the_other_kind_of_score_is_decided_on_the_seeds_that_decide(looked: Path) -> None:
    """On three seeds the other kind finds SimPO, too; the length-controlled scores of the fourth would turn it round."""
    controlled(looked, 0.2)
    scores = pd.read_csv(looked / "scores.csv", keep_default_na=False)
    fourth = (scores["scorer"] == "length_controlled") & (scores["seed"] == 3)
    scores.loc[fourth, "score"] = scores.loc[fourth, "arm"].map({"simpo": 0.0, "dpo": 1.0, "sft": 0.5})
    scores.to_csv(looked / "scores.csv", index=False)
    assert read_json(looked / "verdict.json")["verdict"] == "simpo"
    assert disagreement(read_study(looked)) == []
    settings = yaml.safe_load((looked / "study.yaml").read_text())
    (looked / "study.yaml").write_text(yaml.safe_dump(settings | {"looks": []}))
    assert "say otherwise" in disagreement(read_study(looked))[0], "all four seeds together do"


def test_a_verdict_at_a_look_is_one_of_these_scores(looked: Path) -> None:
    """Its means are over the seeds that decide; those over all scored seeds are others."""
    decided = decide_study(looked)
    study = read_study(looked)
    every = study.run_means(study.configs[0], "checks", "golden")
    assert len(every) == 4
    assert every.mean() != pytest.approx(decided["means"]["simpo"])
    assert not any("not of these scores" in text for text in warnings(study, {}))
