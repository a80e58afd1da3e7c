"""Scores files that others wrote: names stay the text they are, and what is wrong is named with its row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.decide.rule import verdict
from harness.decide.scores_file import read_scores
from harness.study.errors import UsageError

ODD_IDS = ("NA", "null", "nan", "None", "007", "7", "1e3", "TRUE")
SUFFIXES = [".csv", ".parquet", ".jsonl"]


def rows_of(ids=ODD_IDS, *, seeds=(0, 1, 2), arms=("simpo", "dpo"), score=None) -> list[dict]:
    """Return scores of two arms, the first better by about 0.2 on every prompt."""
    rng = np.random.default_rng(0)
    return [
        {
            "arm": arm,
            "seed": seed,
            "prompt_id": prompt,
            "score": round(float(rng.uniform(0.3, 0.5)) + 0.2 * (arm == arms[0]), 3) if score is None else score,
        }
        for arm in arms
        for seed in seeds
        for prompt in ids
    ]


def save(rows: list[dict] | pd.DataFrame, path: Path) -> Path:
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    return path


def decided(rows: list[dict] | pd.DataFrame, path: Path, **rule) -> dict:
    return verdict(read_scores(save(rows, path)), **rule)


def csv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scores.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_that_look_like_missing_values_or_numbers_stay_names(suffix: str, tmp_path: Path) -> None:
    path = save(rows_of(), tmp_path / f"s{suffix}")
    assert set(read_scores(path)["prompt_id"]) == set(ODD_IDS)
    assert verdict(read_scores(path))["n_prompts"] == len(ODD_IDS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arms_and_clusters_may_be_called_na(suffix: str, tmp_path: Path) -> None:
    rows = [row | {"cluster": "NA" if row["prompt_id"] in ("7", "007") else ""} for row in rows_of(arms=("NA", "null"))]
    found = decided(rows, tmp_path / f"s{suffix}", arms=("NA", "null"))
    assert found["verdict"] == "NA"
    assert found["n_clusters"] == len(ODD_IDS) - 1


def test_the_verdict_does_not_depend_on_the_files_kind_or_on_whether_ids_are_numbers(tmp_path: Path) -> None:
    found = [
        json.dumps(decided(rows_of(ids), tmp_path / f"s{suffix}"))
        for suffix in SUFFIXES
        for ids in (range(12), [str(i) for i in range(12)])
    ]
    assert len(set(found)) == 1
    assert json.loads(found[0])["verdict"] == "simpo"


def test_seeds_are_listed_in_the_order_of_numbers() -> None:
    found = verdict(pd.DataFrame(rows_of(seeds=(10, 9, 100))))
    assert list(found["run_means"]["dpo"]) == ["9", "10", "100"]
    as_floats = verdict(pd.DataFrame(rows_of(seeds=(10.0, 9.0, 100.0))))
    assert list(as_floats["run_means"]["dpo"]) == ["9", "10", "100"]


BLANK = [None, "", float("nan")]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("column", ["arm", "seed", "prompt_id"])
def test_a_row_without_arm_seed_or_prompt_is_refused_by_its_number(column: str, suffix: str, tmp_path: Path) -> None:
    rows = [{key: str(value) if key != "score" else value for key, value in row.items()} for row in rows_of()]
    rows[4][column] = ""
    with pytest.raises(UsageError, match=rf"row 5 .*{column} is empty.*\(1 such row\)"):
        decided(rows, tmp_path / f"s{suffix}")


@pytest.mark.parametrize("value", BLANK)
@pytest.mark.parametrize("column", ["arm", "seed", "prompt_id"])
def test_a_blank_name_in_a_data_frame_is_refused_too(column: str, value) -> None:
    frame = pd.DataFrame(rows_of()).astype({column: object})
    frame.loc[4, column] = value
    with pytest.raises(UsageError, match=rf"row 5 .*{column} is empty"):
        verdict(frame)


def test_an_empty_prompt_column_is_told_from_a_file_with_one_score_a_run() -> None:
    rows = [row | {"prompt_id": ""} for row in rows_of(["p"])]
    with pytest.raises(UsageError, match=r"prompt_id is empty.*leave the column out where a run has one score"):
        verdict(pd.DataFrame(rows))


def test_arms_that_are_not_in_the_file_are_told_which_ones_are() -> None:
    frame = pd.DataFrame(rows_of(arms=("kto", "orpo")))
    for metric in (None, "score"):
        with pytest.raises(UsageError, match=r"no rows of arms simpo, dpo; arms in the scores: kto, orpo;.*--arms"):
            verdict(frame, metric=metric)
    assert verdict(frame, arms=("kto", "orpo"))["verdict"] == "kto"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_scores_may_be_numbers_or_text_or_true_and_false(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    passed = [row | {"score": bool(rng.random() < row["score"])} for row in rows_of(range(40))]
    as_numbers = [row | {"score": float(row["score"])} for row in passed]
    as_text = [row | {"score": str(row["score"])} for row in as_numbers]
    found = [decided(rows, tmp_path / f"s{suffix}") for rows in (passed, as_numbers, as_text)]
    assert found[0] == found[1] == found[2]


def test_true_and_false_may_be_spelt_as_other_programs_spell_them(tmp_path: Path) -> None:
    rows = [row | {"score": word} for row, word in zip(rows_of(), ["TRUE", "false", "True", "FALSE"] * 12, strict=True)]
    assert decided(rows, tmp_path / "s.csv") == decided(
        [row | {"score": float(row["score"].lower() == "true")} for row in rows], tmp_path / "s.csv"
    )


BAD_SCORES = {
    "inf": r"score inf is outside \[0, 1\]",
    "-inf": r"score -inf is outside \[0, 1\]",
    "good": r"score 'good' is not a number",
    "NA": r"score 'NA' is not a number.*leave it empty.*unscored_reason",
    "nan": r"score 'nan' is not a number",
    "0,5": r"score '0,5' is not a number",
    "50%": r"score '50%' is not a number",
    "50": r"score 50 is outside \[0, 1\]; rescale it",
    "-0.1": r"score -0.1 is outside",
    "": r"the score is empty or NaN; a prompt without a score needs an unscored_reason",
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("score", BAD_SCORES)
def test_a_score_that_is_none_is_refused_with_arm_seed_and_prompt(score: str, suffix: str, tmp_path: Path) -> None:
    rows = [row | {"score": str(row["score"])} for row in rows_of()]
    rows[4]["score"] = score
    with pytest.raises(UsageError, match=rf"row 5 \(arm simpo, seed 0, prompt 007, .*{BAD_SCORES[score]}"):
        decided(rows, tmp_path / f"s{suffix}")


def test_a_score_is_not_given_together_with_a_reason_why_there_is_none() -> None:
    rows = [row | {"unscored_reason": ""} for row in rows_of()]
    rows[4] |= {"score": 0.0, "unscored_reason": "the judge was down"}
    with pytest.raises(UsageError, match=r"prompt 007.*score 0 and an unscored_reason \('the judge was down'\)"):
        verdict(pd.DataFrame(rows))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_prompt_without_a_score_is_counted_in_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    rows = [row | {"unscored_reason": ""} for row in rows_of()]
    rows[4] |= {"score": None, "unscored_reason": "NA"}
    found = decided(rows, tmp_path / f"s{suffix}")
    assert found["n_unscored"] == {"simpo": 1, "dpo": 0}
    assert found["n_prompts"] == len(ODD_IDS) - 1


HEADER = "arm,seed,prompt_id,score\n"
LINES = "".join(f"{arm},{seed},p{i},0.{5 + i}\n" for arm in ("simpo", "dpo") for seed in range(2) for i in range(3))
UNREADABLE = {
    "cut off between fields": (HEADER + LINES + "dpo,2,p0", r"line 14 has 3 fields, the header 4.*cut off"),
    "cut off before the last field": (HEADER + LINES + "dpo,2", r"line 14 has 2 fields, the header 4"),
    "cut off inside quotes": (HEADER + LINES + 'dpo,2,"p0', r"line 14.*unexpected end of data"),
    "a field too many": (HEADER + LINES + "dpo,2,p0,0.5,9\n", r"line 14 has 5 fields, the header 4"),
    "an unquoted comma": (HEADER + "dpo,2,Paris, France,0.5\n" + LINES, r"line 2 has 5 fields, the header 4"),
    "a column twice": ("arm,seed,score,score\ndpo,1,0.5,0.6\n", r"column score stands twice"),
    "nothing": ("", r"is empty"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_csv_that_is_not_whole_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    text, message = UNREADABLE[case]
    with pytest.raises(UsageError, match=rf"scores\.csv.*{message}"):
        verdict(read_scores(csv(tmp_path, text)))


def test_a_csv_may_lack_its_last_newline_and_have_empty_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    plain = verdict(read_scores(csv(tmp_path, HEADER + LINES)))
    assert verdict(read_scores(csv(tmp_path, "\ufeff" + HEADER + LINES.rstrip("\n")))) == plain
    assert verdict(read_scores(csv(tmp_path, (HEADER + LINES).replace("\n", "\r\n") + "\r\n\r\n"))) == plain


def test_a_csv_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_bytes((HEADER + LINES).encode() + b"dpo,2,\xff,0.5\n")
    with pytest.raises(UsageError, match=r"not readable as \.csv.*utf-8"):
        read_scores(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"arm": "dpo", "seed"', r"line 13: not JSON"),
        ("[1, 2]", r"line 13: expected an object with the columns as keys, found a list"),
    ],
)
def test_a_broken_line_of_jsonl_is_refused_with_its_number(line: str, message: str, tmp_path: Path) -> None:
    path = save(rows_of(["p", "q"]), tmp_path / "s.jsonl")
    path.write_text(path.read_text() + line)
    with pytest.raises(UsageError, match=message):
        read_scores(path)


def test_a_parquet_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = save(rows_of(), tmp_path / "s.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"s\.parquet: not readable as \.parquet"):
        read_scores(path)


def runs_of(**arms) -> pd.DataFrame:
    """Return scores with one a run; None is a run without a score."""
    return pd.DataFrame(
        [
            {"arm": arm, "seed": seed, "score": score, "unscored_reason": "" if score is not None else "out of memory"}
            for arm, scores in arms.items()
            for seed, score in enumerate(scores)
        ]
    )


def test_a_run_without_a_score_is_counted_left_out_and_bounded() -> None:
    found = verdict(runs_of(simpo=[0.60, 0.61, None, 0.59], dpo=[0.50, 0.51, 0.50, 0.49]))
    assert found["verdict"] == "simpo"
    assert found["n_unscored"] == {"simpo": 1, "dpo": 0}
    assert found["n_seeds"] == {"simpo": 3, "dpo": 4}
    assert list(found["run_means"]["simpo"]) == ["0", "1", "3"]
    text = " ".join(found["warnings"])
    assert "simpo: 1 of 4 runs is unscored and left out (seed 2; see unscored_reason)" in text
    assert "could change the verdict" in text


def test_an_arm_without_a_scored_run_is_refused_with_its_seeds_and_one_run_is_a_checkpoint() -> None:
    with pytest.raises(UsageError, match=r"arm dpo has no scored run of 2 \(unscored: seed 0, 1\)"):
        verdict(runs_of(simpo=[0.6, 0.61, 0.6], dpo=[None, None]))
    found = verdict(runs_of(simpo=[0.6, 0.61, 0.6], dpo=[None, 0.5, None]))
    assert (found["verdict"], found["level"]) == ("inconclusive", "checkpoint")


def test_several_scores_a_run_need_prompt_ids() -> None:
    frame = pd.DataFrame(rows_of()).drop(columns="prompt_id")
    with pytest.raises(UsageError, match=r"stands twice.*several scores a run need a prompt_id"):
        verdict(frame)


def test_a_prompt_scored_in_two_stages_of_one_run_is_refused() -> None:
    rows = [row | {"stage": stage} for row in rows_of() for stage in ("first", "second")]
    with pytest.raises(UsageError, match=r"prompt NA.*in several stages \(first, second\)"):
        verdict(pd.DataFrame(rows))


def test_messages_count_rows_in_plain_english() -> None:
    frame = pd.DataFrame(rows_of())
    frame.loc[[2, 4], "score"] = 3.0
    with pytest.raises(UsageError, match=re.escape("(2 such rows)")):
        verdict(frame)
