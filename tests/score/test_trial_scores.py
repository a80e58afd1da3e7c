"""Scoring of stored outputs: definitions by hand, worst scores for what diverged or collapsed, nothing dropped."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from harness.score.__main__ import main
from harness.score.answers import TrialOutputs
from harness.score.scorers import TRIAL_SCORERS
from harness.score.trial_scores import score_trial
from harness.study.files import read_json, read_jsonl, write_json, write_jsonl

PROMPTS = [
    {
        "split": "golden",
        "prompt_id": f"p{i}",
        "prompt": [],
        "checks": [{"equals": "1"}, {"max_words": 2}],
        "cluster": "c",
        "pairs": 1,
    }
    for i in range(3)
]


def completion(prompt_id: str, text: str) -> dict:
    return {
        "split": "golden",
        "prompt_id": prompt_id,
        "prompt": "q",
        "completion": text,
        "tokens": 3,
        "ended": True,
        "flags": [],
    }


def logps(prompt_id: str, chosen: float, rejected: float, *, ref=(0.0, 0.0), tokens=(1, 1)) -> dict:
    return {
        "split": "golden",
        "prompt_id": prompt_id,
        "pair_id": f"{prompt_id}-{chosen}",
        "chosen_sum_logps": chosen,
        "rejected_sum_logps": rejected,
        "chosen_ref_sum_logps": ref[0],
        "rejected_ref_sum_logps": ref[1],
        "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1],
    }


def scores(scorer: str, *, completions=(), pairs=()) -> dict[str, float | None]:
    found = TRIAL_SCORERS[scorer](TrialOutputs(PROMPTS, list(completions), list(pairs)))
    return {score.prompt_id: score.score for score in found if score.score is not None}


def test_checks_need_all_and_the_fraction_counts_each() -> None:
    answers = [completion("p0", "1"), completion("p1", "2"), completion("p2", "2 3 4")]
    assert scores("checks", completions=answers) == {"p0": 1.0, "p1": 0.0, "p2": 0.0}
    assert scores("checks_fraction", completions=answers) == {"p0": 1.0, "p1": 0.5, "p2": 0.0}


def test_the_sum_is_dpos_reward_and_the_mean_is_simpos() -> None:
    """Chosen -10 over 10 tokens (mean -1), rejected -6 over 3 (mean -2); base -12 and -5: log-ratios 2 and -1."""
    pair = logps("p0", -10.0, -6.0, ref=(-12.0, -5.0), tokens=(10, 3))
    assert scores("preference_accuracy_sum", pairs=[pair]) == {"p0": 1.0}
    assert scores("preference_accuracy_mean", pairs=[pair]) == {"p0": 1.0}
    pair["chosen_ref_sum_logps"] = -8.0  # log-ratios -2 and -1: only the reference's view changes
    assert scores("preference_accuracy_sum", pairs=[pair]) == {"p0": 0.0}
    assert scores("preference_accuracy_mean", pairs=[pair]) == {"p0": 1.0}
    assert scores("preference_accuracy", pairs=[pair]) == {"p0": 0.5}


def test_the_base_prefers_nothing_by_its_own_log_ratio() -> None:
    assert scores("preference_accuracy_sum", pairs=[logps("p0", -3.0, -9.0, ref=(-3.0, -9.0))]) == {"p0": 0.5}


def test_pairs_of_one_prompt_are_averaged() -> None:
    pairs = [logps("p0", -1.0, -2.0), logps("p0", -3.0, -2.0), logps("p0", -4.0, -2.0), logps("p1", -1.0, -2.0)]
    assert scores("preference_accuracy_mean", pairs=pairs) == {"p0": pytest.approx(1 / 3), "p1": 1.0}


def trial(folder: Path, *, status: str = "running", answers=("1", "2", "1")) -> Path:
    folder.mkdir(parents=True)
    write_json(
        folder / "manifest.json",
        {"trial_id": folder.name, "arm": "dpo", "config": "beta=0.1", "seed": 3, "status": status}
        | {"done": ["golden"], "warnings": []},
    )
    if status != "diverged":
        write_jsonl(folder / "completions.jsonl", [completion(f"p{i}", text) for i, text in enumerate(answers)])
        write_jsonl(folder / "pairs.jsonl", [logps("p0", -1.0, -2.0)])
    return folder


def test_rows_name_their_trial_and_prompt(tmp_path: Path) -> None:
    rows = score_trial(trial(tmp_path / "t"), PROMPTS, ["checks"], base=None)
    assert rows[0] == {
        "arm": "dpo",
        "config": "beta=0.1",
        "seed": 3,
        "split": "golden",
        "prompt_id": "p0",
        "scorer": "checks",
        "score": 1.0,
        "cluster": "c",
        "tokens": 3,
        "chars": 1,
        "unscored_reason": "",
        "stage": "confirm",
        "flag": "",
    }
    assert [row["score"] for row in rows] == [1.0, 0.0, 1.0]


def test_a_diverged_trial_scores_worst_wherever_the_base_has_a_score(tmp_path: Path) -> None:
    base = trial(tmp_path / "base")
    rows = score_trial(trial(tmp_path / "t", status="diverged"), PROMPTS, list(TRIAL_SCORERS), base=base)
    assert {(row["score"], row["flag"]) for row in rows if not row["unscored_reason"]} == {(0.0, "diverged")}
    without_instructions = {name for name in TRIAL_SCORERS if not name.startswith("ifeval")}
    assert {row["scorer"] for row in rows} == without_instructions
    assert {row["prompt_id"] for row in rows} == {"p0", "p1", "p2"}


def test_a_prompt_whose_pairs_were_all_dropped_is_unscored_with_a_reason(tmp_path: Path) -> None:
    rows = score_trial(trial(tmp_path / "t"), PROMPTS, ["preference_accuracy_mean"], base=None)
    assert {row["prompt_id"]: row["score"] for row in rows} == {"p0": 1.0, "p1": None, "p2": None}
    assert all("dropped at tokenisation" in row["unscored_reason"] for row in rows if row["score"] is None)


def test_a_collapsed_trial_scores_worst_however_well_it_ranks_pairs(tmp_path: Path) -> None:
    prompts = [dict(PROMPTS[0], prompt_id=f"p{i}") for i in range(12)]
    folder = trial(tmp_path / "t", answers=["0"] * 12)
    base = trial(tmp_path / "base", answers=[str(i) for i in range(12)])
    rows = score_trial(folder, prompts, ["checks", "preference_accuracy"], base=base)
    assert {(row["score"], row["flag"]) for row in rows if not row["unscored_reason"]} == {(0.0, "collapsed")}
    assert {row["scorer"] for row in rows if row["score"] == 0.0} == {"checks", "preference_accuracy"}
    assert read_json(folder / "manifest.json")["flags"] == ["collapsed"]
    assert read_json(folder / "manifest.json")["degenerate"]["golden"]["same_answer"] == 1.0


def test_scoring_with_one_scorer_keeps_the_others_rows(tmp_path: Path) -> None:
    folder = trial(tmp_path / "t")
    score_trial(folder, PROMPTS, ["checks", "checks_fraction"], base=None)
    rows = score_trial(folder, PROMPTS, ["checks"], base=None)
    assert sorted({row["scorer"] for row in rows}) == ["checks", "checks_fraction"]
    assert len(rows) == 6


def test_the_command_scores_a_study_again_and_trains_nothing(tmp_path: Path, capsys) -> None:
    study = scored_study(tmp_path)
    assert main([str(study), "checks"]) == 0
    table = pd.read_csv(study / "scores.csv")
    assert table["score"].tolist() == [1.0, 0.0, 1.0] * 2
    assert "harness.decide" in capsys.readouterr().out


def scored_study(tmp_path: Path) -> Path:
    """Write what harness.score needs of a study: the registration, the prompts, the base and one trial."""
    for folder in ("base", "trials/a"):
        trial(tmp_path / "s" / folder, status="complete")
        (tmp_path / "s" / folder / "adapter").mkdir()
    write_jsonl(tmp_path / "s" / "prompts.jsonl", PROMPTS)
    (tmp_path / "s" / "study.yaml").write_text("{metric: checks, arms: [dpo], command: python -m harness.sweep X}")
    return tmp_path / "s"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trials/a/manifest.json", '{"arm": ', "trials/a/manifest.json: is lost, damaged or was changed"),
        ("trials/a/completions.jsonl", '{"split": "gol', "trials/a: the files of golden are damaged or lost"),
        ("base/pairs.jsonl", None, "base: the files of golden are damaged or lost"),
        ("base/manifest.json", None, "base: the SFT base, which every arm is measured against, is not there"),
        ("prompts.jsonl", "{\n", "prompts.jsonl:1: not JSON"),
        ("study.yaml", "{arms: [", "study.yaml: not readable as YAML"),
    ],
)
def test_the_command_names_a_damaged_file_and_what_mends_it(name, content, message, tmp_path: Path, capsys) -> None:
    study = scored_study(tmp_path)
    (study / name).unlink()
    if content is not None:
        (study / name).write_text(content)
    assert main([str(study), "checks"]) == 2
    said = capsys.readouterr().err
    assert message in said
    if name != "study.yaml":
        assert "run the study's command again: python -m harness.sweep X" in said
    assert not (study / "scores.csv").exists()


def test_a_diverged_trial_scores_only_the_splits_that_it_was_asked_for(tmp_path: Path) -> None:
    """A config of a grid that diverged and was not selected has no business on golden."""
    base = trial(tmp_path / "base")
    for name in ("completions.jsonl", "pairs.jsonl"):
        rows = [row | {"split": split} for row in read_jsonl(base / name) for split in ("dev", "golden")]
        write_jsonl(base / name, rows)
    prompts = [row | {"split": split} for row in PROMPTS for split in ("dev", "golden")]
    folder = trial(tmp_path / "t", status="diverged")
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | {"done": ["train", "dev"]})
    assert {row["split"] for row in score_trial(folder, prompts, list(TRIAL_SCORERS), base=base)} == {"dev"}


def test_an_arm_whose_answers_are_cut_off_warns_once(tmp_path: Path) -> None:
    base, folder = trial(tmp_path / "base"), trial(tmp_path / "t")
    endless = [row | {"ended": False, "flags": ["cut_off"]} for row in read_jsonl(folder / "completions.jsonl")]
    write_jsonl(folder / "completions.jsonl", endless)
    for _ in range(2):
        score_trial(folder, PROMPTS, ["checks"], base=base)
    (warning,) = read_json(folder / "manifest.json")["warnings"]
    assert "100% of the answers to golden were cut off" in warning


def test_the_command_refuses_an_unknown_scorer_and_a_folder_without_scores(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path), "vibes"]) == 2
    assert "unknown scorer vibes; allowed: checks" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "no scored study" in capsys.readouterr().err
