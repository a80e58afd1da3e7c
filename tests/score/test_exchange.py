"""To and from other tools: exports that they read, annotations and answers made elsewhere that get a verdict here."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from harness.decide.__main__ import main as decide
from harness.decide.rule import verdict
from harness.decide.scores_file import read_scores
from harness.decide.study import decide_study
from harness.exchange import main
from harness.report.page import render_report
from harness.score.alpaca_files import read_difficulty, read_gamed
from harness.score.annotations import annotation_scores, differences, preferences, read_annotations
from harness.score.length_control import length_controlled
from harness.score.study_scores import rescore
from harness.study.errors import UsageError
from harness.study.files import read_json, read_jsonl, write_jsonl
from harness.verify import verify_study
from tests.score.test_judge import longer, tidy
from tests.servers.judge import judge_server, prefers
from tests.study_fixture import build_study


def annotations(seed: int, win: float, count: int = 120) -> list[dict]:
    """Annotations of one run; the baseline is the same for every seed."""
    rng, same = np.random.default_rng(seed), np.random.default_rng(0)
    return [
        {
            "instruction": f"Task {i % (count - 2)}",
            "output_1": "b" * int(same.integers(50, 200)),
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
        for scorer in ("win_rate", "length_controlled_minimal"):
            assert verdict(scores, metric=scorer)["verdict"] == "simpo"
        rows = annotations(1, 0.8)
        mine = scores[(scores["arm"] == "simpo") & (scores["seed"] == "1")]
        raw = mine[mine["scorer"] == "win_rate"]["score"]
        assert raw.mean() == pytest.approx(np.mean([row["preference"] - 1 for row in rows]), abs=1e-12)
        fitted = length_controlled(preferences(rows), differences(rows))
        controlled = mine[mine["scorer"] == "length_controlled_minimal"]["score"]
        assert controlled.to_numpy() == pytest.approx(fitted.pseudo_values)

    def test_an_instruction_that_is_asked_twice_is_two_prompts_of_one_cluster(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps(annotations(0, 0.5)))
        scores = annotation_scores({("simpo", 0): read_annotations(path)})
        raw = scores[scores["scorer"] == "win_rate"]
        assert raw["prompt_id"].nunique() == 120
        assert raw["cluster"].nunique() == 118

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"preference": 3}, "preference 3; allowed"),
            ({"preference": "2"}, "preference '2'"),
            ({"preference": True}, "preference True"),
            ({"preference": math.inf}, "preference inf"),
            ({"generator_2": "other"}, "annotations of several models"),
            ({"generator_1": "other"}, "annotations of several baselines"),
            ({"annotator": "other"}, "annotations of several judges"),
            ({"output_2": ["a turn"]}, "output_2 is of type list; allowed: text"),
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


def compare(folder: Path, change, count: int = 8, **columns) -> tuple[int, Path]:
    """Write annotations of two runs, the second one changed, and run the command."""
    files = []
    for arm, seed in (("simpo", 1), ("dpo", 2)):
        rows = [row | {"annotator": "a judge"} | columns for row in annotations(seed, 0.5, count)]
        files.append(folder / f"{arm}.json")
        files[-1].write_text(json.dumps(change(rows) if arm == "dpo" else rows))
    out = folder / "scores.csv"
    return main(["annotations", f"simpo:1={files[0]}", f"dpo:1={files[1]}", "--out", str(out)]), out


def changed(**columns):
    return lambda rows: [row | columns for row in rows]


class TestWinRatesThatWereNotMeasuredAlike:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                changed(output_1="another text", generator_1="elder"),
                "their baselines differ: output_1 is of baseline and",
            ),
            (changed(output_1="another text"), "with other texts in 8 of 8 rows"),
            (changed(annotator="another judge"), "the annotator is a judge and another judge"),
            (lambda rows: [{k: v for k, v in row.items() if k != "annotator"} for row in rows], "not named"),
            (lambda rows: rows[:-1], "their instructions differ (8 and 7 rows"),
            (lambda rows: [rows[0] | {"instruction": "Other"}, *rows[1:]], "their instructions differ"),
            (lambda rows: rows[::-1], "their instructions stand in another order"),
            (
                lambda rows: [row | {"output_1": row["output_2"], "output_2": row["output_1"]} for row in rows],
                "output_1 is the baseline's answer, output_2 the model's",
            ),
        ],
        ids=["baseline", "baseline's texts", "judge", "unnamed judge", "fewer", "another", "order", "sides"],
    )
    def test_are_refused_by_name(self, change, said, tmp_path: Path, capsys) -> None:
        status, out = compare(tmp_path, change)
        assert status == 2
        error = capsys.readouterr().err
        assert said in error
        assert "simpo:1=" in error
        assert not out.exists()

    def test_a_baseline_under_two_names_is_one(self, tmp_path: Path) -> None:
        assert compare(tmp_path, changed(generator_1="the same texts"))[0] == 0


class TestFewPreferences:
    def test_two_give_a_raw_win_rate_and_no_length_controlled_one(self, tmp_path: Path) -> None:
        rows = annotations(0, 0.5, 6)
        for i, value in enumerate((2, None, math.nan, 1, None, None)):
            rows[i]["preference"] = value
        status, out = compare(tmp_path, lambda _: [row | {"annotator": "a judge"} for row in rows], count=6)
        assert status == 0
        scores = read_scores(out)
        mine = scores[scores["arm"] == "dpo"]
        raw, controlled = (mine[mine["scorer"] == name] for name in ("win_rate", "length_controlled_minimal"))
        assert raw["score"].tolist()[:1] == [1.0]
        assert raw["score"].notna().sum() == 2
        assert controlled["score"].isna().all()
        assert set(controlled["unscored_reason"]) == {"fewer than three preferences"}

    @pytest.mark.parametrize("value", [None, math.nan])
    def test_none_at_all_is_refused(self, value, tmp_path: Path, capsys) -> None:
        assert compare(tmp_path, changed(preference=value))[0] == 2
        assert "the judge gave no preference at all (8 rows)" in capsys.readouterr().err

    def test_losses_and_wins_coded_as_0_and_1_are_refused(self, tmp_path: Path, capsys) -> None:
        assert compare(tmp_path, lambda rows: [row | {"preference": i % 2} for i, row in enumerate(rows)])[0] == 2
        assert "its preferences are 0 and 1 alone" in capsys.readouterr().err


def test_annotated_answers_that_think_are_measured_without_it_and_named(tmp_path: Path, capsys) -> None:
    status, out = compare(tmp_path, lambda rows: [row | {"output_2": "<think>so long</think>\nfour"} for row in rows])
    assert status == 0
    assert "dpo:1: 8 of 8 answers hold thinking" in capsys.readouterr().out
    scores = read_scores(out)
    assert set(scores[scores["arm"] == "dpo"]["chars"].astype(int)) == {4}


def adopted(folder: Path, golden: list[dict], metric: str, **answers: list[str]) -> Path:
    """Make a study of answers by the arms and the base to a golden set."""
    write_jsonl(folder / "golden.jsonl", golden)
    for name, texts in answers.items():
        asked = [row.get("prompt", row.get("instruction")) for row in golden]
        rows = [{"instruction": a, "output": text} for a, text in zip(asked, texts, strict=True)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    given = [f"{arm}:1={folder / f'{arm}.json'}" for arm in ("simpo", "dpo")]
    more = ["--golden", folder / "golden.jsonl", "--baseline", folder / "base.json", "--metric", metric]
    assert main([str(word) for word in ("outputs", folder / "given", *given, *more)]) == 0
    return folder / "given"


def rows_of(study: Path, arm: str) -> list[dict]:
    folders = [study / "base", *(study / "trials").iterdir()]
    folder = next(folder for folder in folders if read_json(folder / "manifest.json")["arm"] == arm)
    return list(read_jsonl(folder / "completions.jsonl"))


def test_answers_that_think_are_scored_on_what_follows_and_the_thinking_is_shown_apart(tmp_path: Path) -> None:
    """One arm thinks, one does not, the base thinks in another spelling; three answers never stop thinking."""
    golden = [{"prompt": f"How many legs have {n} cats?", "checks": [{"equals": f"{4 * n}"}]} for n in range(40)]
    study = adopted(
        tmp_path,
        golden,
        "checks",
        simpo=[f"<think>\n{n} times four\n</think>\n\n{4 * n}" for n in range(37)] + ["<think>Let me see"] * 3,
        dpo=[f"{4 * n}" if n % 2 else "many" for n in range(40)],
        base=[f"[THINK]a guess[/THINK]{n}" for n in range(40)],
    )
    rescore(study, [])
    found = decide_study(study)
    assert found["means"] == {"simpo": 37 / 40, "dpo": 0.5}
    first, last = rows_of(study, "simpo")[0], rows_of(study, "simpo")[-1]
    assert (first["completion"], first["thinking"], first["thinking_tokens"], first["flags"]) == (
        "0",
        "0 times four",
        3,
        [],
    )
    assert (last["completion"], last["ended"], last["flags"]) == ("", False, ["cut_off"])
    assert "thinking" not in rows_of(study, "dpo")[0]
    assert rows_of(study, "sft")[1]["completion"] == "1"
    page = render_report(study).read_text(encoding="utf-8")
    assert "Thinking tokens, mean" in page
    assert "40 (100.0%)" in page
    assert verify_study(study) == []


def test_a_baseline_file_is_compared_without_its_thinking(tmp_path: Path) -> None:
    golden = [{"instruction": f"Task {i}", "dataset": "own"} for i in range(4)]
    texts = {arm: [f"an answer of {arm} to {i}" for i in range(4)] for arm in ("simpo", "dpo", "base")}
    study = adopted(tmp_path, golden, "judge", **texts)
    thinking = [{"instruction": row["instruction"], "output": "<think>long thoughts</think>x"} for row in golden]
    (tmp_path / "other.json").write_text(json.dumps(thinking))
    with judge_server(prefers(longer)) as server:
        settings = [f"score.judge.base_url={server.url}", "score.judge.model=fake", "trust_study=true"]
        rescore(study, ["judge"], [*settings, f"score.baseline={tmp_path / 'other.json'}"])
    folder = next((study / "trials").iterdir())
    assert {row["baseline_chars"] for row in read_jsonl(folder / "preferences.jsonl")} == {1}


def test_an_instruction_that_a_golden_set_asks_twice_is_answered_twice_in_order(tmp_path: Path) -> None:
    """Both answers are kept, paired by order with the baseline's, exported, and share a cluster."""
    golden = [{"instruction": text, "dataset": "own"} for text in ("One", "Two", "One", "Three", "One")]
    texts = {arm: [f"{arm} {i}" for i in range(5)] for arm in ("simpo", "dpo", "base")}
    study = adopted(tmp_path, golden, "judge", **texts)
    assert [row["completion"] for row in rows_of(study, "dpo")] == texts["dpo"]
    prompts = list(read_jsonl(study / "prompts.jsonl"))
    assert [row["prompt_id"].partition("#")[2] for row in prompts] == ["", "", "1", "", "2"]
    assert len({row["cluster"] for row in prompts if row["prompt"][0]["content"] == "One"}) == 1
    assert main(["export", str(study), "--form", "alpaca_eval"]) == 0
    exported = read_json(study / "exports" / "simpo-s1" / "model_outputs.json")
    assert [row["output"] for row in exported] == texts["simpo"]
    with judge_server(prefers(longer)) as server:
        settings = [f"score.judge.base_url={server.url}", "score.judge.model=fake"]
        _, failed = rescore(study, ["judge", "length_controlled"], settings)
    assert failed == []
    assert decide_study(study)["n_prompts"] == 5


def test_one_hostile_answer_does_not_end_the_scoring(tmp_path: Path) -> None:
    golden = [{"prompt": f"List {i}", "checks": [{"json": True}]} for i in range(4)]
    hostile = ["[" * 9000, "9" * 10_000, "NaN", '"\ud800 \x00 \u200f"']
    study = adopted(tmp_path, golden, "checks", simpo=hostile, dpo=["[]"] * 4, base=["[1]"] * 4)
    rescore(study, ["checks"])
    assert decide_study(study)["means"] == {"simpo": 0.25, "dpo": 1.0}


def test_a_check_that_takes_too_long_leaves_its_prompt_unscored_by_name(tmp_path: Path) -> None:
    golden = [{"prompt": f"List {i}", "checks": [{"regex": r"^(\w+\s?)+$"}]} for i in range(3)]
    endless = ["word " * 300 + "!", "fine", "fine"]
    study = adopted(tmp_path, golden, "checks", simpo=endless, dpo=["fine"] * 3, base=["fine"] * 3)
    path, _ = rescore(study, ["checks"])
    scores = read_scores(path)
    row = scores[(scores["arm"] == "simpo") & scores["score"].isna()].iloc[0]
    assert row["unscored_reason"].startswith("the check regex: '^(\\\\w+\\\\s?)+$' needs more than 0.3 s")


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


def alpaca_files(folder: Path, count: int = 120) -> list[str]:
    """Files in the form of instruction_difficulty.csv and df_gamed.csv, as options."""
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 1, count)
    lines = [f"{place},{value}" for place, value in enumerate(difficulty)]
    (folder / "difficulty.csv").write_text("\n".join([",instruction_difficulty", *lines]) + "\n")
    gamed = [f"{i},gamed,{rng.random():.4f},{rng.normal():.4f},{difficulty[i % count]},False" for i in range(2 * count)]
    head = "index,model,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    (folder / "gamed.csv").write_text("\n".join([head, *gamed]) + "\n")
    return ["--difficulty", str(folder / "difficulty.csv"), "--gamed", str(folder / "gamed.csv")]


def annotated(folder: Path, *more: str, **runs: list[dict]) -> tuple[int, Path]:
    """Write one file of annotations an arm, and run the command."""
    given = []
    for arm, rows in runs.items():
        path = folder / f"{arm}.json"
        path.write_text(json.dumps(rows))
        given.append(f"{arm}={path}")
    out = folder / "scores.csv"
    return main(["annotations", *given, *more, "--out", str(out)]), out


class TestLengthControlAsAlpacaEvals:
    def test_both_files_give_the_leaderboards_fit_under_its_name_without_a_warning(self, tmp_path: Path) -> None:
        simpo, dpo = annotations(1, 0.8), annotations(2, 0.3)
        status, out = annotated(tmp_path, *alpaca_files(tmp_path), simpo=simpo, dpo=dpo)
        assert status == 0
        scores = read_scores(out)
        mine = scores[(scores["arm"] == "simpo") & (scores["scorer"] == "length_controlled")]
        difficulty = read_difficulty(str(tmp_path / "difficulty.csv"), "--difficulty")
        gamed = read_gamed(str(tmp_path / "gamed.csv"), "--gamed")
        fitted = length_controlled(preferences(simpo), differences(simpo), difficulty=difficulty, gamed=gamed)
        assert mine["score"].to_numpy() == pytest.approx(fitted.pseudo_values)
        assert not any("leaderboard" in text for text in decided(out, "length_controlled")["warnings"])

    def test_without_them_it_has_another_name_and_the_verdict_warns(self, tmp_path: Path) -> None:
        _, out = annotated(tmp_path, simpo=annotations(1, 0.8), dpo=annotations(2, 0.3))
        assert set(read_scores(out)["scorer"]) == {"win_rate", "length_controlled_minimal"}
        warnings = decided(out, "length_controlled_minimal")["warnings"]
        (said,) = [text for text in warnings if "leaderboard" in text]
        assert said.startswith("length_controlled_minimal (simpo 0, dpo 0): not AlpacaEval's")

    def test_with_difficulty_alone_it_has_the_name_that_alpaca_eval_gives_it(self, tmp_path: Path) -> None:
        _, out = annotated(tmp_path, *alpaca_files(tmp_path)[:2], simpo=annotations(1, 0.8), dpo=annotations(2, 0.3))
        assert "length_controlled_noreg" in set(read_scores(out)["scorer"])
        assert any("lacks the gamed baselines" in text for text in decided(out, "length_controlled_noreg")["warnings"])

    def test_a_fit_that_extrapolates_says_so_in_the_verdict(self, tmp_path: Path) -> None:
        short = [row | {"output_2": "m" * (5 + i % 7)} for i, row in enumerate(annotations(1, 0.4))]
        _, out = annotated(tmp_path, *alpaca_files(tmp_path), simpo=short, dpo=annotations(2, 0.3))
        warnings = decided(out, "length_controlled")["warnings"]
        assert any("length_controlled (simpo 0)" in text and "extrapolation" in text for text in warnings)

    def test_missing_rows_and_null_preferences_are_unscored_and_the_others_keep_their_difficulty(
        self, tmp_path: Path, capsys
    ) -> None:
        whole, lacking = annotations(1, 0.8), annotations(2, 0.3)
        whole[5]["preference"] = None
        difficulty = read_difficulty(alpaca_files(tmp_path)[1], "--difficulty")
        status, out = annotated(tmp_path, *alpaca_files(tmp_path), simpo=whole, dpo=lacking[:7] + lacking[9:])
        assert status == 0
        assert "dpo:0: no row for 2 of 120 instructions" in capsys.readouterr().out
        scores = read_scores(out)
        mine = scores[(scores["arm"] == "dpo") & (scores["scorer"] == "length_controlled")]
        assert mine["score"].isna().to_numpy().nonzero()[0].tolist() == [7, 8]
        assert set(mine["unscored_reason"]) == {"", "the file has no row for this instruction"}
        kept = np.delete(np.arange(120), [7, 8])
        rows = [lacking[i] for i in kept]
        gamed = read_gamed(str(tmp_path / "gamed.csv"), "--gamed")
        fitted = length_controlled(preferences(rows), differences(rows), difficulty=difficulty[kept], gamed=gamed)
        assert mine["score"].dropna().to_numpy() == pytest.approx(fitted.pseudo_values)
        assert decided(out, "length_controlled")["n_unscored"] == {"simpo": 1, "dpo": 2}

    def test_files_that_lack_different_rows_complete_each_other(self, tmp_path: Path) -> None:
        one, other = annotations(1, 0.8), annotations(2, 0.3)
        files = alpaca_files(tmp_path)
        assert annotated(tmp_path, *files, simpo=one[:20] + one[21:], dpo=other[:50] + other[51:])[0] == 0

    @pytest.mark.parametrize("lost", [(30, 30), (30, 31)], ids=["the same row", "rows whose order is not known"])
    def test_a_difficulty_whose_place_is_not_known_is_refused(self, lost, tmp_path: Path, capsys) -> None:
        runs = {arm: annotations(seed, 0.5) for arm, seed in (("simpo", 1), ("dpo", 2))}
        for rows, place in zip(runs.values(), lost, strict=True):
            del rows[place]
        assert annotated(tmp_path, *alpaca_files(tmp_path), **runs)[0] == 2
        assert "one of the files must hold all 120" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("name", "old", "new", "said"),
        [
            ("difficulty.csv", "\n3,", "\n3,x", "row 4: instruction_difficulty is 'x"),
            ("difficulty.csv", "\n3,", "\n3,inf #", "row 4: instruction_difficulty is"),
            ("difficulty.csv", "\n3,", "\n4,", "does not hold the places 0 to 119"),
            ("gamed.csv", "std_delta_len", "delta", "column std_delta_len is missing"),
            ("gamed.csv", "\n0,gamed,", "\n0,gamed,7", "row 1: preference 7"),
        ],
    )
    def test_a_broken_file_of_alpaca_eval_is_refused_by_name(
        self, name, old, new, said, tmp_path: Path, capsys
    ) -> None:
        files = alpaca_files(tmp_path)
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(old, new, 1))
        assert annotated(tmp_path, *files, simpo=annotations(1, 0.8), dpo=annotations(2, 0.3))[0] == 2
        error = capsys.readouterr().err
        assert said in error
        assert str(tmp_path / name) in error

    def test_gamed_baselines_alone_are_refused(self, tmp_path: Path, capsys) -> None:
        files = alpaca_files(tmp_path)[2:]
        assert annotated(tmp_path, *files, simpo=annotations(1, 0.8))[0] == 2
        assert "--difficulty beside it" in capsys.readouterr().err


def decided(path: Path, metric: str, arms: str = "simpo,dpo") -> dict:
    """Run harness.decide on a scores file and return its JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert decide([str(path), "--metric", metric, "--arms", arms]) == 0
    return json.loads(said.getvalue())


class TestTheVerdictOnAScoresFile:
    def test_says_which_file_was_which_run(self, tmp_path: Path, capsys) -> None:
        _, out = annotated(tmp_path, **{"simpo-v2": annotations(1, 0.8), "dpo": annotations(2, 0.3)})
        found = decided(out, "win_rate", "simpo-v2,dpo")
        assert found["sources"] == {
            "simpo-v2": {"0": str(tmp_path / "simpo-v2.json")},
            "dpo": {"0": str(tmp_path / "dpo.json")},
        }
        assert "simpo-v2.json" in capsys.readouterr().err

    def test_says_what_the_other_metric_would_have_said(self, tmp_path: Path) -> None:
        """SimPO wins by length alone: the judge prefers long answers, and its own are long."""
        rng = np.random.default_rng(0)
        runs = {}
        for arm, shift in (("simpo", 700), ("dpo", -700)):
            gaps = rng.normal(shift, 600, 400)
            wins = rng.random(400) < 1 / (1 + np.exp(-3 * np.tanh(gaps / gaps.std())))
            runs[arm] = [
                {"instruction": f"Task {i}", "output_1": "b" * 3000, "output_2": "m" * int(max(3000 + gap, 1))}
                | {"preference": 1 + int(win)}
                for i, (gap, win) in enumerate(zip(gaps, wins, strict=True))
            ]
        _, out = annotated(tmp_path, **runs)
        for metric, other, word in (
            ("win_rate", "length_controlled_minimal", "inconclusive"),
            ("length_controlled_minimal", "win_rate", "SimPO wins"),
        ):
            (said,) = [text for text in decided(out, metric)["caveats"] if "the metric decides" in text]
            assert f"({other}) say otherwise" in said
            assert word in said

    def test_is_silent_where_both_metrics_agree(self, tmp_path: Path) -> None:
        _, out = annotated(tmp_path, simpo=annotations(1, 0.8), dpo=annotations(2, 0.3))
        assert not any("the metric decides" in text for text in decided(out, "win_rate")["caveats"])
