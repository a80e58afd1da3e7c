"""Score stored completions and held-out log-probs: completions.jsonl, pairs.jsonl -> scores.jsonl, scores.csv.

The command `python -m harness.score` is in `harness.rescore`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.degenerate import cut_off_warnings, degenerate_shares, is_collapsed, unchanged_warnings
from harness.fingerprints import fingerprint
from harness.manifest import load_manifest, write_manifest
from harness.records import SCORE_COLUMNS, read_jsonl, write_jsonl, write_text
from harness.scorers import SCORERS, Rows, Score, TrialOutputs, score_checks


def score_trial(folder: Path, prompts: Rows, scorers: Sequence[str], *, base: Path | None) -> Rows:
    """Score one trial's stored outputs and write its scores.jsonl; a collapsed or diverged trial scores worst.

    Args:
        folder: the trial's folder, with manifest.json.
        prompts: rows of prompts.jsonl.
        scorers: names out of `SCORERS`.
        base: the SFT base's folder, to tell a collapse from a base that was like that before.
    """
    manifest = load_manifest(folder)
    outputs = outputs_of(folder, prompts)
    before = outputs_of(base, prompts) if base is not None else TrialOutputs(prompts, [], [])
    flag = "diverged" if manifest["status"] == "diverged" else ""
    if not flag and is_collapsed(_judged(outputs), _judged(before)):
        flag = "collapsed"
    # A diverged trial has no policy: it gets the lowest score wherever the base has one.
    scored = _of_splits(before, manifest["done"]) if flag == "diverged" else outputs
    manifest["flags"] = [flag] if flag else []
    manifest["degenerate"] = _shares(outputs)
    warnings = cut_off_warnings(manifest["degenerate"], _shares(before)) if base is not None else []
    warnings += unchanged_warnings(outputs.completions, before.completions) if base is not None else []
    manifest["warnings"] = list(dict.fromkeys([*manifest["warnings"], *warnings]))
    write_manifest(folder, manifest)
    new = [(name, score) for name in scorers for score in SCORERS[name](scored)]
    return _replace(folder, manifest, scorers, new, prompts)


def scores_again(folder: Path, prompts: Rows, base: Path) -> dict[tuple[str, str, str], float | None]:
    """Return what the stored answers score now, `{(split, prompt_id, scorer): score}`; write nothing."""
    manifest = load_manifest(folder)
    flag = next(iter(manifest["flags"]), "")
    outputs = outputs_of(folder, prompts)
    scored = _of_splits(outputs_of(base, prompts), manifest["done"]) if flag == "diverged" else outputs
    found = [(name, score) for name, scorer in SCORERS.items() for score in scorer(scored)]
    return {(s.split, s.prompt_id, name): 0.0 if flag and s.score is not None else s.score for name, s in found}


def replace_scores(folder: Path, name: str, scores: Sequence[Score], prompts: Rows, splits: Sequence[str]) -> Rows:
    """Write one scorer's scores of a run into its scores.jsonl, in place of its earlier ones of these splits."""
    manifest = load_manifest(folder)
    new = [(name, score) for score in scores if score.split in splits]
    return _replace(folder, manifest, [name], new, prompts, splits)


def _replace(
    folder: Path,
    manifest: dict[str, Any],
    names: Sequence[str],
    new: Sequence[tuple[str, Score]],
    prompts: Rows,
    splits: Sequence[str] = ("dev", "golden"),
) -> Rows:
    clusters = {(row["split"], row["prompt_id"]): row.get("cluster") for row in prompts}
    answers = {(row["split"], row["prompt_id"]): row for row in _rows(folder / "completions.jsonl")}
    old = _rows(folder / "scores.jsonl")
    rows = [row for row in old if row["scorer"] not in names or row["split"] not in splits]
    flag = next(iter(manifest["flags"]), "")
    for name, score in new:
        key = (score.split, score.prompt_id)
        rows.append(_score_row(manifest, name, score, clusters.get(key), answers.get(key), flag))
    path = folder / "scores.jsonl"
    write_jsonl(path, rows)
    if manifest.get("files"):  # a kill before this line: the scores are made again
        manifest["files"][path.name] = fingerprint(path)
        write_manifest(folder, manifest)
    return rows


def _judged(outputs: TrialOutputs) -> Rows:
    """Return the completions, each with `passed`: True where it passes all checks of its prompt."""
    passed = {(score.split, score.prompt_id) for score in score_checks(outputs) if score.score == 1.0}
    return [row | {"passed": (row["split"], row["prompt_id"]) in passed} for row in outputs.completions]


def _of_splits(outputs: TrialOutputs, splits: Sequence[str]) -> TrialOutputs:
    return TrialOutputs(
        *(
            [row for row in rows if row["split"] in splits]
            for rows in (outputs.prompts, outputs.completions, outputs.pairs)
        )
    )


def _shares(outputs: TrialOutputs) -> dict[str, dict[str, float]]:
    splits = sorted({row["split"] for row in outputs.completions})
    return {s: degenerate_shares([row for row in outputs.completions if row["split"] == s]) for s in splits}


def _rows(path: Path) -> Rows:
    return list(read_jsonl(path)) if path.is_file() else []


def outputs_of(folder: Path, prompts: Rows) -> TrialOutputs:
    """Return what a run has stored, as scorers see it."""
    return TrialOutputs(prompts, _rows(folder / "completions.jsonl"), _rows(folder / "pairs.jsonl"))


def _score_row(
    manifest: dict[str, Any], scorer: str, score: Score, cluster: str | None, answer: dict[str, Any] | None, flag: str
) -> dict[str, Any]:
    return {
        "arm": manifest["arm"],
        "config": manifest["config"],
        "seed": manifest["seed"],
        "split": score.split,
        "prompt_id": score.prompt_id,
        "scorer": scorer,
        "score": 0.0 if flag and score.score is not None else score.score,
        "cluster": cluster or "",
        "tokens": answer["tokens"] if answer else None,
        "chars": len(answer["completion"]) if answer else None,
        "unscored_reason": score.unscored_reason,
        "stage": "select" if score.split == "dev" else "confirm",
        "flag": flag,
    }


def trial_folders(study: Path) -> list[Path]:
    """Return the folders of the base and of all trials that have a manifest, the base first."""
    folders = [study / "base", *sorted((study / "trials").glob("*"))]
    return [folder for folder in folders if (folder / "manifest.json").is_file()]


def collect_scores(study: Path) -> Path:
    """Write scores.csv out of the scores.jsonl of the base and of all trials.

    Dev rows are of the stage `select`, golden rows of the stage `confirm`.
    """
    import pandas as pd

    from harness.spreadsheet import to_csv

    rows = [row for folder in trial_folders(study) for row in _rows(folder / "scores.jsonl")]
    path = study / "scores.csv"
    write_text(path, to_csv(pd.DataFrame(rows, columns=list(SCORE_COLUMNS))))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `python -m harness.score`."""
    from harness.rescore import main as rescore_main  # it reads this module

    return rescore_main(argv)


if __name__ == "__main__":
    sys.exit(main())
