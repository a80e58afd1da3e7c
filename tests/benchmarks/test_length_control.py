"""Length control against AlpacaEval's published values, where the shared data are there, and on data of known truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.length_control import main, measured
from tests.conftest import SHARED

DATA = SHARED / "data" / "alpacaeval_lc"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data of AlpacaEval's annotations")
def test_published_length_controlled_win_rates_are_reproduced_with_both_files_and_not_without() -> None:
    """Three models of the 22 in benchmarks/length_control.md, among them those that are furthest away."""
    table = measured(DATA, ["claude-2", "gemma-7b-it", "jina-chat"])
    gaps = table.sub(table["published"], axis=0).abs()
    assert (table["raw"] - table["published raw"]).abs().max() < 1e-4
    assert gaps["with both"].mean() < 1.1
    assert gaps["with both"].max() < 2
    assert gaps["with difficulty"].mean() < 1.6
    assert gaps["minimal"].mean() > 5
    assert (table["with both"] - table["alpaca-eval's routine"]).abs().max() < 0.15


def known_folder(folder: Path) -> float:
    """Write data of one model that follow AlpacaEval's equation; return the true win rate at equal length."""
    rng, count = np.random.default_rng(0), 805
    difficulty = rng.normal(0, 1, count)
    baseline = rng.integers(1000, 3000, count)
    gap = rng.normal(-400, 500, count).astype(int)
    scaled = np.tanh(gap / gap.std(ddof=1))
    wins = 1 / (1 + np.exp(-(-0.5 + 1.0 * scaled + 0.6 * difficulty)))
    columns = {"model": "known", "prompt": range(count), "preference": 1 + wins}
    lengths = {"baseline_characters": baseline, "model_characters": baseline + gap}
    pd.DataFrame({**columns, **lengths}).to_csv(folder / "preferences.csv", index=False)
    truth = float((1 / (1 + np.exp(-(-0.5 + 0.6 * difficulty)))).mean())
    published = {"model": ["known"], "win_rate": [100 * wins.mean()], "length_controlled_winrate": [100 * truth]}
    pd.DataFrame(published).to_csv(folder / "published.csv", index=False)
    pd.DataFrame({"prompt": range(count), "instruction_difficulty": difficulty}).to_csv(
        folder / "difficulty.csv", index=False
    )
    lengths_of_gamed = rng.normal(0, 1, 2 * count)
    twice = np.tile(difficulty, 2)
    follows = 1 / (1 + np.exp(-(-1.0 * np.tanh(lengths_of_gamed) + 0.6 * twice)))
    gamed = {"y": follows.tolist(), "s": lengths_of_gamed.tolist(), "d": twice.tolist()}
    (folder / "gamed.json").write_text(json.dumps(gamed))
    return 100 * truth


def test_a_model_of_known_coefficients_has_its_win_rate_at_equal_length(tmp_path: Path, capsys) -> None:
    truth = known_folder(tmp_path)
    row = measured(tmp_path).loc["known"]
    assert row["with both"] == pytest.approx(truth, abs=0.05)
    assert row["with difficulty"] == pytest.approx(truth, abs=0.05)
    assert abs(row["raw"] - truth) > 5
    assert main([str(tmp_path), "--out", str(tmp_path / "page.md")]) == 0
    assert "| known |" in (tmp_path / "page.md").read_text()
