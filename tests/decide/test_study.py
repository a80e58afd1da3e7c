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
        "rule_version": 2,
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


def test_a_study_of_before_version_2_is_decided_by_it_with_one_warning_of_what_version_1_says(tmp_path: Path) -> None:
    folder = study(tmp_path)
    now = decide_study(folder)
    rule = yaml.safe_load((folder / "study.yaml").read_text())
    del rule["rule_version"]
    (folder / "study.yaml").write_text(yaml.safe_dump(rule))
    found = decide_study(folder)
    (warning,) = [text for text in found["warnings"] if "version 1" in text]
    assert warning == (
        "this study was registered before version 2 of the decision rule, which decides it; version 1 says simpo, "
        "95% interval +7.6 to +11.7 points"
    )
    assert {**found, "warnings": []} == {**now, "warnings": []}
    assert found["rule_version"] == 2


def test_runs_with_equal_answers_are_copies_though_their_scores_tell_nothing(tmp_path: Path) -> None:
    """All answers right on every seed: the scores cannot tell two trainings apart, the answers' hashes can."""
    folder = study(tmp_path)
    scores = pd.read_csv(folder / "scores.csv")
    scores.loc[scores["arm"] == "simpo", "score"] = 1.0
    scores.to_csv(folder / "scores.csv", index=False)
    for seed, answers in enumerate(("a", "b", "a")):
        path = folder / "trials" / f"simpo{seed}" / "manifest.json"
        manifest = json.loads(path.read_text())
        files = {"completions.jsonl": {"bytes": 1, "sha256": answers}}
        write_json(path, manifest | {"config": "c", "files": files})
    found = decide_study(folder)
    assert found["n_seeds"] == {"simpo": 2, "dpo": 3}
    assert [text for text in found["warnings"] if "copies" in text] == [
        "simpo: seeds 0, 2 are copies of one run, or of a training that has changed nothing: their answers are equal on "
        "all 200 prompts; they are counted once"
    ]


@pytest.mark.parametrize(
    ("expected", "status", "said"),
    [
        ("simpo", 0, ""),
        ("dpo", 3, "expected dpo, and the verdict is simpo"),
        ("tie", 3, "expected tie, and the verdict is simpo"),
        (
            "orpo",
            2,
            "expect=orpo: no verdict on these arms can be that; allowed: simpo, dpo, tie, inconclusive, trade-off",
        ),
    ],
)
def test_the_command_says_by_its_status_whether_the_verdict_is_the_expected_one(
    expected: str, status: int, said: str, tmp_path: Path, capsys
) -> None:
    frame(WIN).to_csv(tmp_path / "s.csv", index=False)
    assert main([str(tmp_path / "s.csv"), "--expect", expected]) == status
    assert said in capsys.readouterr().err


def test_the_command_takes_the_number_of_prompts_behind_each_score(tmp_path: Path, capsys) -> None:
    runs = [{"arm": arm, "seed": i, "score": s} for arm, means in WIN.items() for i, s in enumerate(means)]
    pd.DataFrame(runs).to_csv(tmp_path / "runs.csv", index=False)
    assert main([str(tmp_path / "runs.csv"), "--n-prompts", "200"]) == 0
    assert json.loads(capsys.readouterr().out)["n_prompts"] == 200
    assert main([str(tmp_path / "runs.csv"), "--n-prompts", "1"]) == 2
    assert "n_prompts is '1'; give one whole number of at least 2" in capsys.readouterr().err
    frame(WIN).to_csv(tmp_path / "rows.csv", index=False)
    assert main([str(tmp_path / "rows.csv"), "--n-prompts", "200"]) == 2
    assert "--n-prompts 200: the scores have a row per prompt; leave it out" in capsys.readouterr().err


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
