"""The decision of a study: its registered rule, its looks at golden, its warnings, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from harness.decide.__main__ import main
from harness.decide.study import decide_study
from harness.study.errors import UsageError
from harness.study.files import write_json
from tests.decide.test_rule import WIN, frame


def study(tmp_path: Path, *, hashes: tuple[str, str] = ("h", "h")) -> Path:
    """Write a study folder with scores and manifests."""
    folder = tmp_path / "study"
    for arm, consumed in zip(("simpo", "dpo"), hashes, strict=True):
        for seed in range(3):
            write_json(
                folder / "trials" / f"{arm}{seed}" / "manifest.json",
                {
                    "arm": arm,
                    "seed": seed,
                    "status": "complete",
                    "consumed_tokens_sha256": consumed,
                    "batch_plan_sha256": "plan",
                    "data_sha256": "data",
                    "base_sha256": "base",
                },
            )
    frame(WIN).to_csv(folder / "scores.csv", index=False)
    rule = {
        "metric": "checks",
        "margin": 0.05,
        "alpha": 0.05,
        "guards": [],
        "arms": ["simpo", "dpo"],
        "warnings": ["w"],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(rule))
    return folder


def test_a_study_is_decided_by_its_registered_rule(tmp_path: Path) -> None:
    found = decide_study(study(tmp_path))
    assert found["verdict"] == "simpo"
    assert found["warnings"] == ["w"]
    assert json.loads((tmp_path / "study" / "verdict.json").read_text()) == found


def test_a_verdict_warns_where_identical_data_is_not_proved(tmp_path: Path) -> None:
    found = decide_study(study(tmp_path, hashes=("h", "other")))
    assert found["verdict"] == "simpo"
    assert "identical data is NOT proved: seed 0: the consumed tokens differ between arms" in found["warnings"][0]


def register(folder: Path, **parts) -> None:
    """Change what study.yaml has registered."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | parts))


def test_looking_again_with_more_seeds_is_said_for_good(tmp_path: Path) -> None:
    """Adding seeds until a winner appears finds one far too often; deciding the same runs again teaches nothing."""
    folder = study(tmp_path)
    seeds = {arm: [0, 1, 2] for arm in ("simpo", "dpo")}
    whole = pd.read_csv(folder / "scores.csv")
    whole[whole["seed"] < 2].to_csv(folder / "scores.csv", index=False)
    register(folder, seeds={arm: found[:2] for arm, found in seeds.items()})
    for _ in range(2):
        assert not any("looked at" in text for text in decide_study(folder)["warnings"])
    whole.to_csv(folder / "scores.csv", index=False)
    register(folder, seeds=seeds)
    for _ in range(2):
        found = decide_study(folder)["warnings"]
        assert "golden was looked at 2 times with other runs (simpo 0 configs x 2 seeds and" in found[0]
        assert "then simpo 0 configs x 3 seeds" in found[0]


def test_an_arm_that_is_added_does_not_change_what_is_compared(tmp_path: Path) -> None:
    folder = study(tmp_path)
    register(folder, arms=["dpo_norm", "dpo", "simpo"], contrast=["dpo_norm", "dpo"])
    with pytest.raises(UsageError, match="no golden rows of checks for arm dpo_norm"):
        decide_study(folder)
    register(folder, contrast=["simpo", "dpo"])
    assert decide_study(folder)["arms"] == ["simpo", "dpo"]


def test_what_was_registered_and_is_not_scored_is_said(tmp_path: Path) -> None:
    folder = study(tmp_path)
    register(folder, seeds={"simpo": [0, 1, 2, 3], "dpo": [0, 1, 2]})
    assert "simpo: registered seed 3 has no scores" in decide_study(folder)["warnings"][0]


def test_unequal_budgets_and_the_edge_of_a_grid_are_said(tmp_path: Path) -> None:
    folder = study(tmp_path)
    labels = ["beta=2,lr=0.0001", "beta=5,lr=0.0001", "beta=10,lr=0.0001"]
    scores = pd.read_csv(folder / "scores.csv")
    scores.loc[scores["arm"] == "simpo", "config"] = labels[2]
    scores.to_csv(folder / "scores.csv", index=False)
    register(folder, configs={"simpo": labels, "dpo": ["c"]})
    found = " ".join(decide_study(folder)["warnings"])
    assert "unequal budgets (simpo 3, dpo 1 configs)" in found
    assert "SimPO: beta=10 was selected and is the largest that was tried (2, 5, 10)" in found
    assert "try 20 and 40 too" in found
    assert "lr=" not in found


def test_the_command_does_not_bend_a_registered_rule(tmp_path: Path, capsys) -> None:
    folder = study(tmp_path)
    assert main([str(folder), "--margin", "0.01", "--metric", "math"]) == 2
    said = capsys.readouterr().err
    assert "--metric --margin" in said
    assert "scores.csv" in said
    assert not (folder / "verdict.json").exists()
    assert main([str(folder)]) == 0


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_the_command_reads_any_scores_file(suffix: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / f"scores{suffix}"
    scores = frame(WIN)
    {
        ".csv": lambda: scores.to_csv(path, index=False),
        ".parquet": lambda: scores.to_parquet(path),
        ".jsonl": lambda: scores.to_json(path, orient="records", lines=True),
    }[suffix]()
    assert main([str(path), "--margin", "0.03"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["margin"]) == ("simpo", 0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.csv"], "no such file"),
        (["scores.csv", "--arms", "simpo"], "give two different arms"),
        (["scores.csv", "--alpha", "2"], "0 < alpha < 0.5"),
        (["."], "no scored study"),
    ],
)
def test_the_command_refuses_with_status_2(arguments, message, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    frame(WIN).to_csv("scores.csv", index=False)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_runs_as_a_module(tmp_path: Path) -> None:
    frame(WIN).to_csv(tmp_path / "s.csv", index=False)
    ran = subprocess.run(
        [sys.executable, "-m", "harness.decide", str(tmp_path / "s.csv")], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout)["verdict"] == "simpo"
