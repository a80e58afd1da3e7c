"""Length-controlled win rates of AlpacaEval 2: published, against the harness's. `benchmarks/length_control.py FOLDER`.

FOLDER holds numbers of AlpacaEval's annotations and no texts: preferences.csv (model, prompt, preference,
baseline_characters, model_characters), published.csv (model, win_rate, length_controlled_winrate), difficulty.csv
(instruction_difficulty), gamed.json (y, s, d). Writes length_control.md beside this file. The data are CC BY-NC 4.0 and
stay where they are. Each model goes through `harness.score.annotations`, as stand-in texts of these lengths.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from harness.score.annotations import AlpacaFiles, Annotation, RunKey, annotation_scores, read_alpaca_files
from harness.score.length_control import GAMED_WEIGHT

PAGE = Path(__file__).with_suffix(".md")
COLUMNS = ("raw", "minimal", "with difficulty", "with both", "alpaca-eval's routine")
HEAD = """# Length control on AlpacaEval's leaderboard

Written by `python benchmarks/length_control.py FOLDER`. Win rates in percent. Preferences, lengths and published values
are of tatsu-lab/alpaca_eval, commit cd543a1 (data CC BY-NC 4.0). Difficulty and gamed baselines are reconstructed, and
that leaves about 0.6 points on average. `alpaca-eval's routine` is the same likelihood with its L1 penalty, whose
strength scikit-learn's cross-validation chooses (`glm_winrate.py`), on the same inputs as `with both`.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    table = measured(options.folder)
    text = HEAD + "\n".join(page_lines(table)) + "\n"
    options.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


def measured(folder: Path, models: Sequence[str] = ()) -> pd.DataFrame:
    """Return the win rates of each model in percent: `published raw`, `published`, and `COLUMNS`.

    Args:
        folder: of the data.
        models: these alone; empty for all.
    """
    found = pd.read_csv(folder / "preferences.csv")
    found = found[found["model"].isin(models)] if models else found
    published = pd.read_csv(folder / "published.csv").set_index("model")
    with tempfile.TemporaryDirectory() as place:
        both = read_alpaca_files(str(folder / "difficulty.csv"), str(_gamed_csv(folder, Path(place))))
    kinds = dict(zip(COLUMNS[1:4], (AlpacaFiles(), both._replace(gamed=None), both), strict=True))
    rows = []
    for model, given in found.groupby("model"):
        runs: dict[RunKey, list[Annotation]] = {("model", 0): annotations(given)}
        row = {"model": model, "published raw": published.loc[model, "win_rate"]}
        row["published"] = published.loc[model, "length_controlled_winrate"]
        row["raw"] = 100 * float((given["preference"] - 1).mean())
        for kind, files in kinds.items():
            scores = annotation_scores(runs, files)
            values = scores[scores["scorer"] == files.scorer]["score"]
            row[kind] = 100 * float(values.mean())
        rows.append(row | {COLUMNS[4]: 100 * alpaca_routine(given, both)})
    return pd.DataFrame(rows).set_index("model")


def annotations(given: pd.DataFrame) -> list[Annotation]:
    """Return annotations with stand-in texts of a model's lengths."""
    return [
        {
            "instruction": f"Instruction {row.prompt}",
            "output_1": "b" * int(row.baseline_characters),
            "output_2": "m" * int(row.model_characters),
            "preference": float(row.preference),
        }
        for row in given.sort_values("prompt").itertuples()
    ]


def _gamed_csv(folder: Path, place: Path) -> Path:
    """Write gamed.json in the form of AlpacaEval's df_gamed.csv."""
    given = json.loads((folder / "gamed.json").read_text(encoding="utf-8"))
    path = place / "df_gamed.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["preference", "std_delta_len", "instruction_difficulty"])
        lines.writerows(zip(given["y"], given["s"], given["d"], strict=True))
    return path


def alpaca_routine(given: pd.DataFrame, files: AlpacaFiles) -> float:
    """Return the win rate by AlpacaEval's routine, with scikit-learn; NaN where that is not installed."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold
    except ImportError:
        return float("nan")
    assert files.difficulty is not None
    assert files.gamed is not None
    ordered = given.sort_values("prompt")
    gap = (ordered["model_characters"] - ordered["baseline_characters"]).to_numpy(float)
    own = np.stack([np.tanh(gap / gap.std(ddof=1)), files.difficulty, np.ones(len(gap))], axis=1)
    more = np.stack(
        [np.tanh(files.gamed.differences), files.gamed.difficulty, np.zeros(len(files.gamed.difficulty))], axis=1
    )
    features = np.concatenate([more, own])
    wins = np.concatenate([files.gamed.preferences, ordered["preference"].to_numpy(float) - 1])
    weights = np.concatenate([np.full(len(more), GAMED_WEIGHT), np.ones(len(own))])

    def fit(rows: np.ndarray, strength: float) -> np.ndarray:
        model = LogisticRegression(
            C=strength, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=123, tol=1e-4
        )
        doubled = np.concatenate([features[rows], features[rows]])
        labels = np.repeat([1, 0], len(rows))
        shares = np.concatenate([wins[rows] * weights[rows], (1 - wins[rows]) * weights[rows]])
        coefficients: np.ndarray = model.fit(doubled, labels, sample_weight=shares).coef_[0]
        return coefficients

    def loss(rows: np.ndarray, coefficients: np.ndarray) -> float:
        logits = features[rows] @ coefficients
        return float(np.sum(weights[rows] * (np.logaddexp(0, logits) - wins[rows] * logits)) / len(rows))

    everything = np.arange(len(wins))
    folds = list(GroupKFold(n_splits=5).split(everything, groups=everything))
    strengths = np.logspace(-4, 4, 10)
    losses = [np.mean([loss(held, fit(kept, one)) for kept, held in folds]) for one in strengths]
    chosen = fit(everything, float(strengths[int(np.argmin(losses))]))
    return float(np.mean(1 / (1 + np.exp(-(chosen[2] + chosen[1] * files.difficulty)))))


def page_lines(table: pd.DataFrame) -> list[str]:
    """Return the table, and the mean and the largest gap to the published values, as Markdown."""
    shown = ["published raw", "raw", "published", *COLUMNS[1:]]
    lines = [f"| model | {' | '.join(shown)} |", "|---|" + "---|" * len(shown)]
    for model, row in table.iterrows():
        lines.append(f"| {model} | " + " | ".join(f"{row[name]:.2f}" for name in shown) + " |")
    lines += ["", "| gap to the published value | mean | largest |", "|---|---|---|"]
    for name in COLUMNS:
        gap = (table[name] - table["published raw" if name == "raw" else "published"]).abs()
        lines.append(f"| {name} | {gap.mean():.2f} | {gap.max():.2f} ({gap.idxmax()}) |")
    gap = (table[COLUMNS[3]] - table[COLUMNS[4]]).abs()
    lines.append(f"| with both, to alpaca-eval's routine | {gap.mean():.2f} | {gap.max():.2f} ({gap.idxmax()}) |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
