"""Score stored completions and held-out log-probs: completions.jsonl, pairs.jsonl -> scores.jsonl, scores.csv.

Command: `python -m harness.score results/STUDY [SCORER ...]`. Trains nothing and generates nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.checks import failed_checks
from harness.degenerate import degenerate_shares, is_collapsed
from harness.records import SCORE_COLUMNS, UsageError, read_json, read_jsonl, write_json, write_jsonl, write_text

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TrialOutputs:
    """What a scorer may look at.

    Attributes:
        prompts: rows of the study's prompts.jsonl (`split`, `prompt_id`, `prompt`, `checks`, `cluster`, `pairs`).
        completions: rows of completions.jsonl.
        pairs: rows of pairs.jsonl (`harness.records.PairLogps`).
    """

    prompts: Rows
    completions: Rows
    pairs: Rows


@dataclass(frozen=True)
class Score:
    """A score in [0, 1] for one prompt; None with a reason where there is none."""

    split: str
    prompt_id: str
    score: float | None
    unscored_reason: str = ""


def _checks(outputs: TrialOutputs) -> Iterable[tuple[dict[str, Any], int, int]]:
    by_prompt = {(row["split"], row["prompt_id"]): row["checks"] for row in outputs.prompts}
    for row in outputs.completions:
        checks = by_prompt.get((row["split"], row["prompt_id"])) or []
        if checks:
            yield row, len(failed_checks(row["completion"], checks, ended=row["ended"])), len(checks)


def score_checks(outputs: TrialOutputs) -> list[Score]:
    """Score 1 where a completion passes all checks of its prompt, else 0."""
    return [Score(row["split"], row["prompt_id"], float(failed == 0)) for row, failed, _ in _checks(outputs)]


def score_checks_fraction(outputs: TrialOutputs) -> list[Score]:
    """Score the share of a prompt's checks that the completion passes."""
    return [Score(row["split"], row["prompt_id"], 1 - failed / total) for row, failed, total in _checks(outputs)]


def _preference(outputs: TrialOutputs, accuracy: Callable[[dict[str, Any]], float]) -> list[Score]:
    """Average the accuracies of the pairs of one prompt: prompts are what is sampled, not pairs.

    A prompt of which no pair has log-probs, since all were dropped at tokenisation, is unscored and says so.
    """
    by_prompt: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in outputs.pairs:
        by_prompt[row["split"], row["prompt_id"]].append(accuracy(row))
    answered = {split for split, _ in by_prompt}
    dropped = [
        Score(row["split"], row["prompt_id"], None, "all its pairs were dropped at tokenisation (see dropped_pairs)")
        for row in outputs.prompts
        if row["pairs"] and row["split"] in answered and (row["split"], row["prompt_id"]) not in by_prompt
    ]
    return [Score(split, prompt_id, fmean(values)) for (split, prompt_id), values in by_prompt.items()] + dropped


def _prefers(chosen: float, rejected: float) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _sum_accuracy(row: dict[str, Any]) -> float:
    chosen = row["chosen_sum_logps"] - row["chosen_ref_sum_logps"]
    return _prefers(chosen, row["rejected_sum_logps"] - row["rejected_ref_sum_logps"])


def _mean_accuracy(row: dict[str, Any]) -> float:
    chosen = row["chosen_sum_logps"] / row["chosen_tokens"]
    return _prefers(chosen, row["rejected_sum_logps"] / row["rejected_tokens"])


def score_preference_sum(outputs: TrialOutputs) -> list[Score]:
    """Score whether the policy prefers the chosen answer by DPO's reward: the summed log-ratio to the base."""
    return _preference(outputs, _sum_accuracy)


def score_preference_mean(outputs: TrialOutputs) -> list[Score]:
    """Score whether the policy prefers the chosen answer by SimPO's reward: the mean log-prob."""
    return _preference(outputs, _mean_accuracy)


def score_preference(outputs: TrialOutputs) -> list[Score]:
    """Score the mean of both definitions, so that neither arm is judged by its own reward alone."""
    return _preference(outputs, lambda row: (_sum_accuracy(row) + _mean_accuracy(row)) / 2)


SCORERS: dict[str, Callable[[TrialOutputs], list[Score]]] = {
    "checks": score_checks,
    "checks_fraction": score_checks_fraction,
    "preference_accuracy": score_preference,
    "preference_accuracy_sum": score_preference_sum,
    "preference_accuracy_mean": score_preference_mean,
}


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
    if not flag and is_collapsed(outputs.completions, before.completions):
        flag = "collapsed"
    # A diverged trial has no policy: it gets the lowest score wherever the base has one.
    scored = before if flag == "diverged" else outputs
    manifest["flags"] = [flag] if flag else []
    manifest["degenerate"] = {
        split: degenerate_shares([row for row in outputs.completions if row["split"] == split])
        for split in sorted({row["split"] for row in outputs.completions})
    }
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
    """Write scores.csv out of the scores.jsonl of the base and of all trials."""
    import pandas as pd

    rows = [row for folder in trial_folders(study) for row in _rows(folder / "scores.jsonl")]
    path = study / "scores.csv"
    write_text(path, pd.DataFrame(rows, columns=list(SCORE_COLUMNS)).to_csv(index=False))
    return path


def rescore(study: Path, scorers: Sequence[str]) -> Path:
    """Score all stored outputs of a study again."""
    folders = trial_folders(study)
    if not folders or not (study / "prompts.jsonl").is_file():
        raise UsageError(f"{study}: no scored study; give a folder under results/ that harness.sweep wrote")
    prompts = _rows(study / "prompts.jsonl")
    base = study / "base"
    for folder in folders:
        if read_json(folder / "manifest.json")["status"] != "running":
            score_trial(folder, prompts, scorers, base=base if folder != base else None)
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
