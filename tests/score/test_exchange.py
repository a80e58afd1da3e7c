"""To and from other tools: exports that they read, annotations and answers made elsewhere that get a verdict here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from harness.decide.rule import verdict
from harness.decide.scores_file import read_scores
from harness.decide.study import decide_study
from harness.exchange import annotation_scores, differences, main, preferences, read_annotations
from harness.report.page import render_report
from harness.score.length_control import length_controlled
from harness.score.study_scores import rescore
from harness.study.errors import UsageError
from harness.study.files import read_json, read_jsonl, write_jsonl
from harness.verify import verify_study
from tests.score.test_judge import longer, tidy
from tests.servers.judge import judge_server, prefers
from tests.study_fixture import build_study


def annotations(seed: int, win: float, count: int = 120) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "instruction": f"Task {i % (count - 2)}",
            "output_1": "b" * int(rng.integers(50, 200)),
            "output_2": "m" * int(rng.integers(50, 200)),
            "generator_1": "baseline",
            "generator_2": "mine",
            "preference": float(np.clip(1 + (rng.random() < win) + rng.normal(0, 0.05), 1, 2)),
        }
        for i in range(count)
    ]


class TestAnnotations:
    def test_the_win_rate_is_alpacaevals_definition(self) -> None:
        """In percent: 100 * mean(preference - 1), with 0 and 1.5 as draws and null left out."""
        rows = [{"preference": value} for value in (1, 2, 1.5, 0, 1.25, None)]
        found = preferences(rows)
        assert found[:5].tolist() == [0, 1, 0.5, 0.5, 0.25]
        assert math.isnan(found[5])

    def test_they_become_scores_that_get_a_verdict(self, tmp_path: Path) -> None:
        command = []
        for arm, win in (("simpo", 0.8), ("dpo", 0.3)):
            for seed in (1, 2, 3):
                path = tmp_path / f"{arm}{seed}.json"
                path.write_text(json.dumps(annotations(seed + (arm == "dpo") * 10, win)))
                command.append(f"{arm}:{seed}={path}")
        out = tmp_path / "scores.csv"
        assert main(["annotations", *command, "--out", str(out)]) == 0
        scores = read_scores(out)
        for scorer in ("win_rate", "length_controlled"):
            assert verdict(scores, metric=scorer)["verdict"] == "simpo"
        rows = annotations(1, 0.8)
        mine = scores[(scores["arm"] == "simpo") & (scores["seed"] == "1")]
        raw = mine[mine["scorer"] == "win_rate"]["score"]
        assert raw.mean() == pytest.approx(np.mean([row["preference"] - 1 for row in rows]), abs=1e-12)
        fitted = length_controlled(preferences(rows), differences(rows))
        controlled = mine[mine["scorer"] == "length_controlled"]["score"]
        assert controlled.to_numpy() == pytest.approx(fitted.pseudo_values)

    def test_an_instruction_that_is_asked_twice_is_two_prompts_of_one_cluster(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps(annotations(0, 0.5)))
        scores = annotation_scores({("simpo", 0): path})
        raw = scores[scores["scorer"] == "win_rate"]
        assert raw["prompt_id"].nunique() == 120
        assert raw["cluster"].nunique() == 118

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"preference": 3}, "preference 3; allowed"),
            ({"preference": "2"}, "preference '2'"),
            ({"generator_2": "other"}, "annotations of several models"),
            ({"instruction": None, "x": 1}, None),
        ],
    )
    def test_broken_ones_are_named(self, change, said, tmp_path: Path) -> None:
        rows = annotations(0, 0.5, 6)
        rows[3] |= change
        path = tmp_path / "a.json"
        path.write_text(json.dumps(rows))
        if said is None:
            assert len(read_annotations(path)) == 6
            return
        with pytest.raises(UsageError, match=said):
            read_annotations(path)

    def test_the_command_refuses_what_it_cannot_use(self, tmp_path: Path, capsys) -> None:
        (tmp_path / "a.json").write_text("{}")
        for given, said in (
            (["simpo"], "write ARM=FILE"),
            ([f"simpo={tmp_path / 'b.json'}"], "no such file"),
            ([f"simpo={tmp_path / 'a.json'}"] * 2, "given twice"),
            ([f"simpo={tmp_path / 'a.json'}"], "not AlpacaEval's annotations"),
        ):
            assert main(["annotations", *given, "--out", str(tmp_path / "o.csv")]) == 2
            assert said in capsys.readouterr().err


def test_a_studys_answers_are_exported_for_alpaca_eval(tmp_path: Path) -> None:
    study = build_study(tmp_path / "letters", prompts=5)
    tidy(study)
    assert main(["export", str(study), "--form", "alpaca_eval"]) == 0
    found = sorted(path.parent.name for path in (study / "exports").rglob("model_outputs.json"))
    assert found == ["dpo-s0", "dpo-s1", "dpo-s2", "sft", "simpo-s0", "simpo-s1", "simpo-s2"]
    rows = read_json(study / "exports" / "simpo-s1" / "model_outputs.json")
    assert len(rows) == 5
    assert set(rows[0]) == {"dataset", "instruction", "output", "generator"}
    trial = next(
        p
        for p in (study / "trials").iterdir()
        if (m := read_json(p / "manifest.json"))["arm"] == "simpo" and m["seed"] == 1
    )
    answers = {
        row["prompt"]: row["completion"] for row in read_jsonl(trial / "completions.jsonl") if row["split"] == "golden"
    }
    assert {row["instruction"]: row["output"] for row in rows} == answers


def test_a_study_that_is_not_arena_hards_is_not_exported_as_one(tmp_path: Path, capsys) -> None:
    study = build_study(tmp_path / "letters", prompts=5)
    tidy(study)
    assert main(["export", str(study), "--form", "arena_hard"]) == 2
    assert "its golden set is not Arena-Hard's" in capsys.readouterr().err


def test_a_run_whose_name_leads_out_of_the_folder_is_not_written(tmp_path: Path, capsys) -> None:
    study = build_study(tmp_path / "results" / "letters", prompts=3)
    tidy(study)
    path = next((study / "trials").iterdir()) / "manifest.json"
    path.write_text(json.dumps(read_json(path) | {"arm": "../../../../outside"}))
    assert main(["export", str(study), "--form", "alpaca_eval"]) == 2
    assert "outside-s" in capsys.readouterr().err
    assert not any("outside" in found.name for found in tmp_path.rglob("*"))


def test_answers_made_elsewhere_are_judged_decided_and_reported(tmp_path: Path, capsys) -> None:
    golden = [{"instruction": f"Task {i}", "dataset": "own"} for i in range(30)]
    write_jsonl(tmp_path / "golden.jsonl", golden)

    def outputs(name: str, length: int) -> str:
        rng = np.random.default_rng(length)
        rows = [
            {"instruction": row["instruction"], "output": "x" * int(length + rng.integers(0, 40)), "generator": name}
            for row in golden
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        return str(tmp_path / f"{name}.json")

    study = tmp_path / "results" / "given"
    runs = [
        f"{arm}:{seed}={outputs(f'{arm}{seed}', 100 + 30 * (arm == 'simpo') + seed)}"
        for arm in ("simpo", "dpo")
        for seed in (1, 2, 3)
    ]
    command = [
        "outputs",
        str(study),
        *runs,
        "--golden",
        str(tmp_path / "golden.jsonl"),
        "--baseline",
        outputs("base", 115),
    ]
    assert main(command) == 0
    with judge_server(prefers(longer)) as server:
        _, failed = rescore(
            study, ["judge", "length_controlled"], [f"score.judge.base_url={server.url}", "score.judge.model=fake"]
        )
    assert failed == []
    found = decide_study(study)
    assert (found["verdict"], found["level"], found["n_prompts"]) == ("simpo", "method", 30)
    assert any("made elsewhere" in text for text in found["warnings"])
    assert any("longer answer wins 100%" in text for text in found["warnings"])
    assert "SimPO" in render_report(study).read_text(encoding="utf-8")
    assert verify_study(study) == []
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["simpo={a}"], "give answers of two arms"),
        (["simpo={a}", "other={a}"], "give answers of two arms"),
        (["simpo={a}", "dpo={short}"], "no answer to 1 of 3 golden prompts"),
    ],
)
def test_answers_that_do_not_fit_are_refused_before_anything_is_written(runs, said, tmp_path: Path, capsys) -> None:
    golden = [{"prompt": f"Task {i}"} for i in range(3)]
    write_jsonl(tmp_path / "golden.jsonl", golden)
    full = [{"instruction": row["prompt"], "output": "x"} for row in golden]
    write_jsonl(tmp_path / "a.jsonl", full)
    write_jsonl(tmp_path / "short.jsonl", full[:2])
    given = [run.format(a=tmp_path / "a.jsonl", short=tmp_path / "short.jsonl") for run in runs]
    more = ["--golden", str(tmp_path / "golden.jsonl"), "--baseline", str(tmp_path / "a.jsonl")]
    assert main(["outputs", str(tmp_path / "given"), *given, *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "given").exists()
