"""Score stored completions and held-out log-probs: completions.jsonl, pairs.jsonl -> scores.jsonl, scores.csv.

Command: `python -m harness.score results/STUDY [SCORER ...]`. Trains nothing and generates nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.degenerate import cut_off_warnings, degenerate_shares, is_collapsed
from harness.records import SCORE_COLUMNS, UsageError, read_json, read_jsonl, write_json, write_jsonl, write_text
from harness.registration import read_study
from harness.scorers import SCORERS, Rows, Score, TrialOutputs, score_checks
from harness.stages import done_stages


def score_trial(folder: Path, prompts: Rows, scorers: Sequence[str], *, base: Path | None) -> Rows:
    """Score one trial's stored outputs and write its scores.jsonl; a collapsed or diverged trial scores worst.

    Args:
        folder: the trial's folder, with manifest.json.
        prompts: rows of prompts.jsonl.
        scorers: names out of `SCORERS`.
        base: the SFT base's folder, to tell a collapse from a base that was like that before.
    """
    manifest = read_json(folder / "manifest.json")
    outputs = _outputs(folder, prompts)
    before = _outputs(base, prompts) if base is not None else TrialOutputs(prompts, [], [])
    flag = "diverged" if manifest["status"] == "diverged" else ""
    if not flag and is_collapsed(_judged(outputs), _judged(before)):
        flag = "collapsed"
    # A diverged trial has no policy: it gets the lowest score wherever the base has one.
    scored = _of_splits(before, manifest["done"]) if flag == "diverged" else outputs
    manifest["flags"] = [flag] if flag else []
    manifest["degenerate"] = _shares(outputs)
    warnings = cut_off_warnings(manifest["degenerate"], _shares(before)) if base is not None else []
    manifest["warnings"] = list(dict.fromkeys([*manifest["warnings"], *warnings]))
    clusters = {(row["split"], row["prompt_id"]): row.get("cluster") for row in prompts}
    answers = {(row["split"], row["prompt_id"]): row for row in outputs.completions}
    rows = [row for row in _rows(folder / "scores.jsonl") if row["scorer"] not in scorers]
    for name in scorers:
        for score in SCORERS[name](scored):
            key = (score.split, score.prompt_id)
            rows.append(_score_row(manifest, name, score, clusters.get(key), answers.get(key), flag))
    write_jsonl(folder / "scores.jsonl", rows)
    write_json(folder / "manifest.json", manifest)
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


def _outputs(folder: Path, prompts: Rows) -> TrialOutputs:
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

    rows = [row for folder in trial_folders(study) for row in _rows(folder / "scores.jsonl")]
    path = study / "scores.csv"
    write_text(path, pd.DataFrame(rows, columns=list(SCORE_COLUMNS)).to_csv(index=False))
    return path


def rescore(study: Path, scorers: Sequence[str]) -> Path:
    """Score all stored outputs of a study again.

    Raises:
        UsageError: for a folder that is no study, or a file in it that is damaged or lost.
    """
    if not (study / "prompts.jsonl").is_file() or not (study / "study.yaml").is_file():
        raise UsageError(f"{study}: no scored study; give a folder under results/ that harness.sweep wrote")
    command = read_study(study / "study.yaml").get("command", "python -m harness.sweep ...")
    base = study / "base"
    try:
        prompts = list(read_jsonl(study / "prompts.jsonl"))
        manifests = {folder: read_json(folder / "manifest.json") for folder in trial_folders(study)}
        if base not in manifests:
            raise ValueError(f"{base}: the SFT base, which every arm is measured against, is not there")
        for folder, manifest in manifests.items():
            lost = set(manifest["done"]) - done_stages(folder, manifest) - {"score"}
            if lost:
                raise ValueError(f"{folder}: the files of {', '.join(sorted(lost))} are damaged or lost")
            if manifest["status"] != "running":
                score_trial(folder, prompts, scorers, base=base if folder != base else None)
    except ValueError as error:
        raise UsageError(f"{error}\nTo mend it, run the study's command again: {command}") from error
    return collect_scores(study)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.score",
        description="Score the stored completions and log-probs of a study; trains nothing, generates nothing.",
        epilog="Example: python -m harness.score results/my-study checks preference_accuracy",
    )
    parser.add_argument("study", type=Path, help="a folder under results/")
    parser.add_argument("scorers", nargs="*", metavar="SCORER", help=f"out of {', '.join(SCORERS)}; default: all")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.scorers if name not in SCORERS]
    try:
        if unknown:
            raise UsageError(f"unknown scorer {', '.join(unknown)}; allowed: {', '.join(SCORERS)}")
        path = rescore(arguments.study, arguments.scorers or list(SCORERS))
    except UsageError as error:
        print(f"harness.score: {error}", file=sys.stderr)
        return 2
    print(f"{path}\nNow: python -m harness.decide {arguments.study}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
