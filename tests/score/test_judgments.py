"""Arena-Hard's judgments get a verdict here: against a hand calculation, and the interval against simulated truth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.decide.rule import verdict
from harness.decide.scores_file import read_scores
from harness.exchange import main
from harness.score.judgments import read_judgments
from harness.study.errors import UsageError

# First game (answer A is the baseline's), second game (A is the model's), the model's score by hand.
BY_HAND = [
    ("B>>A", "A>>B", 1.0),
    ("A>>B", "B>>A", 0.0),
    ("B>A", "A=B", 0.75),  # (1 + 0.5) / 2
    ("B>>A", "A=B", 0.875),  # (3 * 1 + 0.5) / 4
    ("A>B", "A>>B", 0.75),  # (0 + 3 * 1) / 4
    ("A>>B", "A>B", 0.25),  # (3 * 0 + 1) / 4
    ("A>B", "A>B", 0.5),  # the judge prefers the first place
    ("A=B", "B=A", 0.5),
    ("A<<B", "B<A", 1.0),
    (None, "A>B", None),
    ("B>A", None, None),
]
OWN_SCORE = (6 + 0 + 1.5 + 3.5 + 3 + 1 + 1 + 1 + 4) / (6 + 6 + 2 + 4 + 4 + 4 + 2 + 2 + 4)


def row_1(number: int, first: str | None, second: str | None) -> dict:
    """A judgment of v0.1."""
    games = [{"user_prompt": "", "judgment": "[[...]]", "score": label} for label in (first, second)]
    return {"question_id": f"q{number}", "model": "mine", "judge": "gpt-4-1106-preview", "games": games}


def row_2(number: int, first: str | None, second: str | None, category: str = "hard_prompt") -> dict:
    """A judgment of v2.0; a game that failed is null as a whole."""
    games = [label and {"score": label, "judgment": {"answer": "..."}, "prompt": []} for label in (first, second)]
    about = {"uid": f"u{number}", "category": category, "judge": "gpt-4.1", "model": "mine"}
    return about | {"baseline": "o3-mini" if category == "hard_prompt" else "gemini-2.0-flash-001", "games": games}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def convert(folder: Path, *more: str, **runs: list[dict]) -> tuple[int, Path]:
    out = folder / "scores.csv"
    given = [f"{arm}:1={write(folder / f'{arm}.jsonl', rows)}" for arm, rows in runs.items()]
    return main(["judgments", *given, *more, "--out", str(out)]), out


@pytest.mark.parametrize("row", [row_1, row_2], ids=["v0.1", "v2.0"])
def test_the_games_of_a_prompt_are_one_score_as_by_hand(row, tmp_path: Path, capsys) -> None:
    rows = [row(number, *labels[:2]) for number, labels in enumerate(BY_HAND)]
    status, out = convert(tmp_path, simpo=rows, dpo=rows[::-1])  # threads write them in any order
    assert status == 0
    scores = read_scores(out)
    mine = scores[scores["arm"] == "simpo"].reset_index(drop=True)
    assert mine["scorer"].unique().tolist() == ["arena_hard"]
    wanted = [math.nan if score is None else score for *_, score in BY_HAND]
    assert mine["score"].to_numpy() == pytest.approx(wanted, nan_ok=True)
    assert mine["unscored_reason"].tolist() == [""] * 9 + ["a game has no verdict"] * 2
    assert (mine["cluster"] == mine["prompt_id"]).all()
    assert verdict(scores)["difference"] == 0
    assert f"Arena-Hard's own score, over weighted games: {OWN_SCORE:.1%}" in capsys.readouterr().out


def test_categories_are_not_mixed(tmp_path: Path, capsys) -> None:
    rows = [row_2(n, "B>A", "A>B") for n in range(4)]
    rows += [row_2(n + 4, "A>B", "B>A", "creative_writing") for n in range(4)]
    assert convert(tmp_path, simpo=rows, dpo=rows)[0] == 2
    assert "judgments of 2 categories (creative_writing 4, hard_prompt 4)" in capsys.readouterr().err
    assert convert(tmp_path, "--category", "poems", simpo=rows, dpo=rows)[0] == 2
    assert "--category poems" in capsys.readouterr().err
    status, out = convert(tmp_path, "--category", "creative_writing", simpo=rows, dpo=rows)
    assert status == 0
    assert read_scores(out)["score"].tolist() == [0.0] * 8


def changed(**columns):
    return lambda rows: [rows[0] | columns, *rows[1:]]


GAME = {"score": "A>B"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed(games=[GAME]), "line 1: games: 1 of them; needed: two"),
        (changed(games=None), "line 1: games: None; needed: two"),
        (changed(games=[GAME, {"score": "A>A"}]), "line 1: game 2: score 'A>A'; allowed: A>>B"),
        (changed(games=[GAME, {"score": 3}]), "line 1: game 2: score 3; allowed"),
        (changed(games=[GAME, "A>B"]), "line 1: game 2: 'A>B'; needed: an object with score, or null"),
        (changed(games=[GAME, {"label": "A>B"}]), "needed: an object with score"),
        (changed(model="other"), "judgments of several models (model: mine, other)"),
        (changed(judge="other"), "judgments of several judges"),
        (changed(baseline="other"), "judgments of several baselines"),
        (changed(uid=None), "the prompt's name is None"),
        (lambda rows: [*rows, rows[0]], "line 31: a second judgment of the prompt u0"),
        (lambda rows: [{"uid": "u0"}], "line 1: not Arena-Hard's judgment"),
        (lambda rows: [7], "line 1: not Arena-Hard's judgment"),
        (lambda rows: [], "no judgments"),
        (lambda rows: [row_2(n, None, "A>B") for n in range(30)], "no prompt has a verdict in both games (30 prompts)"),
        (lambda rows: [row | {"judge": "other"} for row in rows], "their judges differ: gpt-4.1 and other"),
        (lambda rows: [row | {"baseline": "other"} for row in rows], "their baselines differ: o3-mini and other"),
        (lambda rows: [row | {"category": "other"} for row in rows], "their categories differ: hard_prompt and other"),
        (lambda rows: rows[:20], "their prompts differ (10 of 30 are in one file alone; allowed: 10%)"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(change, said: str, tmp_path: Path, capsys) -> None:
    rows = [row_2(n, "B>A", "A>B") for n in range(30)]
    assert convert(tmp_path, simpo=rows, dpo=change(rows))[0] == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_cut_off_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row_2(0, "A>B", "A>B")])
    path.write_text(path.read_text() + '{"uid": "u1", "ga')
    with pytest.raises(UsageError, match="line 2: not JSON"):
        read_judgments(path)


def test_a_prompt_without_a_judgment_is_unscored(tmp_path: Path) -> None:
    rows = [row_2(n, "B>A", "A>B") for n in range(30)]
    status, out = convert(tmp_path, simpo=rows, dpo=rows[:10] + rows[12:])
    assert status == 0
    lacking = read_scores(out).query("score.isna()")
    assert lacking[["arm", "prompt_id"]].to_numpy().tolist() == [["dpo", "u10"], ["dpo", "u11"]]


def test_the_interval_by_prompts_has_the_simulated_spread() -> None:
    """Games of one prompt agree: the spread over prompts is the true one, and resampled games give half of it."""
    rng = np.random.default_rng(0)
    labels = [("A>>B", "B>>A"), ("A>B", "B>A"), ("B>A", "A>B"), ("B>>A", "A>>B")]
    found, widths, naive = [], [], []
    for _ in range(200):
        frames = []
        for arm in ("simpo", "dpo"):
            drawn = [labels[i] for i in rng.choice(4, 60, p=[0.3, 0.2, 0.2, 0.3])]
            scores = [1.0 if first.startswith("B") else 0.0 for first, _ in drawn]
            games = np.repeat(scores, [6 if ">>" in first else 2 for first, _ in drawn])
            naive.append(games.std() / len(games) ** 0.5)
            frames.append(pd.DataFrame({"arm": arm, "seed": 1, "score": scores, "prompt_id": range(60)}))
        result = verdict(pd.concat(frames).assign(prompt_id=lambda frame: frame["prompt_id"].astype(str)))
        found.append(result["difference"])
        widths.append((result["ci95"][1] - result["ci95"][0]) / 2)
    spread = np.std(found)
    assert np.mean(widths) == pytest.approx(1.96 * spread, rel=0.15)
    assert np.mean(naive) * 2**0.5 < 0.65 * spread
    assert np.mean(np.abs(found) <= widths) == pytest.approx(0.95, abs=0.04)
