"""Score stored completions and held-out log-probs: completions.jsonl, pairs.jsonl -> scores.jsonl, scores.csv.

The command `python -m harness.score` is in `harness.score.study_scores`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.score.scorers import SCORERS, Rows, Score, TrialOutputs, score_checks
from harness.study.files import read_jsonl, write_jsonl
from harness.study.manifest import Manifest, load_manifest, write_manifest
from harness.study.scores_csv import SCORES_FILE, write_scores


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
    manifest: Manifest,
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
    record = write_jsonl(folder / "scores.jsonl", rows)
    if manifest.get("files"):  # a kill before the manifest is written: the scores are made again
        manifest["files"]["scores.jsonl"] = record
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
    manifest: Manifest, scorer: str, score: Score, cluster: str | None, answer: dict[str, Any] | None, flag: str
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
    rows = [row for folder in trial_folders(study) for row in _rows(folder / "scores.jsonl")]
    write_scores(study / SCORES_FILE, rows)
    return study / SCORES_FILE


# A unit of up to 40 characters, several times in a row. Bounded, so that hostile text cannot make it slow. An answer
# that was cut off in the middle of a loop needs fewer repeats: what came before the limit is all that there is to see.
_REPEATED = re.compile(r"(.{1,40}?)\1{5,}", re.DOTALL)
_CUT_LOOP = re.compile(r"(.{1,40}?)\1{3,}", re.DOTALL)
_SCANNED_CHARS = 2000
COLLAPSED_SHARES = {"degenerate": 0.5, "same_answer": 0.9}
MIN_RISE = 0.4
CUT_OFF_SHARE = 0.5
UNCHANGED_SHARE = 0.9
MIN_PROMPTS = 10


def completion_flags(completion: str, *, ended: bool) -> list[str]:
    """Name what is wrong with one completion: `empty`, `cut_off`, `repetition`; an empty list where nothing is.

    `repetition` needs a run of at least 20 characters (8 where the answer was cut off) that makes up half of the last
    2,000 characters: a table's rule or a list of zeros in a long answer is not degenerate.
    """
    text = completion.strip()
    flags = [] if text else ["empty"]
    if not ended:
        flags.append("cut_off")
    pattern, shortest = (_REPEATED, 20) if ended else (_CUT_LOOP, 8)
    tail = text[-_SCANNED_CHARS:]
    longest = max((len(match.group()) for match in pattern.finditer(tail)), default=0)
    if longest >= shortest and longest >= len(tail) / 2:
        flags.append("repetition")
    return flags


def degenerate_shares(completions: Sequence[Any]) -> dict[str, float]:
    """Return the share of completions with each flag, and of the most frequent answer (`same_answer`).

    Args:
        completions: rows with `completion` and `flags`.
    """
    if not completions:
        return {}
    total = len(completions)
    counts = Counter(flag for row in completions for flag in row["flags"])
    shares = {flag: counts[flag] / total for flag in ("empty", "cut_off", "repetition")}
    answers = Counter(row["completion"].strip() for row in completions)
    shares["same_answer"] = answers.most_common(1)[0][1] / total
    shares["degenerate"] = sum(1 for row in completions if {"empty", "repetition"} & set(row["flags"])) / total
    return shares


def is_collapsed(completions: Sequence[Any], base: Sequence[Any]) -> bool:
    """Say whether a policy collapsed: most answers degenerate, or nearly all the same, and far more so than the base's.

    An answer that passes its checks (`passed`) never counts: ninety times "yes" is right where yes is the answer.
    Answers that are cut off do not count either, only warn: an arm may lengthen answers (see `cut_off_warnings`).
    """
    if len(completions) < MIN_PROMPTS:
        return False
    policy, before = _failed_shares(completions), _failed_shares(base)
    return any(
        policy.get(kind, 0.0) >= limit and policy[kind] - before.get(kind, 0.0) >= MIN_RISE
        for kind, limit in COLLAPSED_SHARES.items()
    )


def _failed_shares(completions: Sequence[Any]) -> dict[str, float]:
    """Return `degenerate_shares` of the answers that do not pass their checks, as shares of all answers."""
    failed = [row for row in completions if not row.get("passed")]
    return {kind: share * len(failed) / len(completions) for kind, share in degenerate_shares(failed).items()}


def unchanged_warnings(completions: Sequence[Any], base: Sequence[Any]) -> list[str]:
    """Warn of each split on which the answers are the base's, word for word: training has hardly changed the policy."""
    before = {(row["split"], row["prompt_id"]): row["completion"] for row in base}
    warnings = []
    for split in sorted({row["split"] for row in completions}):
        same = [
            row["completion"] == before[split, row["prompt_id"]]
            for row in completions
            if row["split"] == split and (split, row["prompt_id"]) in before
        ]
        share = sum(same) / len(same) if len(same) >= MIN_PROMPTS else 0.0
        if share >= UNCHANGED_SHARE:
            warnings.append(
                f"{share:.0%} of the answers to {split} are the SFT base's own, word for word: training has hardly "
                "changed the policy; look at the learning rate, the number of pairs and of epochs"
            )
    return warnings


def cut_off_warnings(shares: dict[str, dict[str, float]], base: dict[str, dict[str, float]]) -> list[str]:
    """Warn of each split on which most answers were cut off and the base's were not: their scores are of stumps."""
    return [
        f"{found['cut_off']:.0%} of the answers to {split} were cut off at generate.max_new_tokens, of the base's "
        f"{base.get(split, {}).get('cut_off', 0.0):.0%}; raise it, or this arm is judged on stumps"
        for split, found in shares.items()
        if found["cut_off"] > CUT_OFF_SHARE and found["cut_off"] - base.get(split, {}).get("cut_off", 0.0) > MIN_RISE
    ]
