"""Score one trial's stored outputs: completions.jsonl and pairs.jsonl -> scores.jsonl, flags and warnings.

A diverged or collapsed trial scores as worst (`harness.study.collapse`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.data.records import Completion
from harness.score.accuracy import score_checks
from harness.score.answers import Score, TrialOutputs, outputs_of, rows_if_any
from harness.score.scorers import TRIAL_SCORERS
from harness.study.collapse import (
    CUT_OFF_SHARE,
    MIN_PROMPTS,
    UNCHANGED_SHARE,
    CheckedRow,
    FlaggedRow,
    degenerate_shares,
    has_fallen,
    is_collapsed,
    runs_to_the_limit,
)
from harness.study.files import FileCache, to_jsonl
from harness.study.integrity import SPLITS
from harness.study.manifest import Manifest, load_manifest, write_manifest
from harness.study.rows import CompletionRow, PromptRow, ScoreRow
from harness.study.scores_csv import SCORES_FILE, write_scores

# A unit of up to 40 characters, repeated. The bounds keep hostile text from making the search slow.
_REPEATED = re.compile(r"(.{1,40}?)\1{5,}", re.DOTALL)
_REPEATED_TO_THE_LIMIT = re.compile(r"(.{1,40}?)\1{3,}", re.DOTALL)  # for an answer that was cut off in a loop
_SCANNED_CHARS = 2000


def score_trial(
    folder: Path, prompts: list[PromptRow], scorers: Sequence[str], *, base: Path | None, files: FileCache | None = None
) -> list[ScoreRow]:
    """Score one trial's stored outputs and write its scores.jsonl; notes flags and warnings in its manifest.

    Args:
        folder: the trial's folder, with manifest.json.
        prompts: rows of prompts.jsonl.
        scorers: names out of `TRIAL_SCORERS`.
        base: the SFT base's folder, whose answers tell a collapse; None for the base itself.
        files: cache of this process; None reads each file anew.
    """
    files = files or FileCache()
    manifest = load_manifest(folder, files)
    outputs = outputs_of(folder, prompts, files)
    before = outputs_of(base, prompts, files) if base is not None else TrialOutputs(prompts, [], [])
    flag = "diverged" if manifest["status"] == "diverged" else ""
    if not flag and is_collapsed(_checked(outputs), _checked(before)):
        flag = "collapsed"
    manifest["flags"] = [flag] if flag else []
    manifest["degenerate"] = _shares_by_split(outputs)
    warnings = manifest["warnings"] + unanswered_warnings(outputs.completions)
    if base is not None:
        fallen = has_fallen(_checked(outputs), _checked(before))
        warnings = warnings + cut_off_warnings(manifest["degenerate"], _shares_by_split(before), fallen=fallen)
        warnings = warnings + unchanged_warnings(outputs.completions, before.completions)
    manifest["warnings"] = list(dict.fromkeys(warnings))
    scored = _scored_outputs(manifest, outputs, before)
    new = [(name, score) for name in scorers for score in TRIAL_SCORERS[name](scored)]
    return _write_scores(folder, manifest, scorers, new, prompts, files=files)


def scores_again(folder: Path, prompts: list[PromptRow], base: Path) -> dict[tuple[str, str, str], float | None]:
    """Return the scores of the stored outputs, `{(split, prompt_id, scorer): score}`; writes nothing."""
    manifest = load_manifest(folder)
    flag = next(iter(manifest["flags"]), "")
    scored = _scored_outputs(manifest, outputs_of(folder, prompts), outputs_of(base, prompts))
    found = [(name, score) for name, scorer in TRIAL_SCORERS.items() for score in scorer(scored)]
    return {(s.split, s.prompt_id, name): 0.0 if flag and s.score is not None else s.score for name, s in found}


def _scored_outputs(manifest: Manifest, outputs: TrialOutputs, base: TrialOutputs) -> TrialOutputs:
    """Return the outputs to score: the base's for a diverged trial, which has none and gets 0 in their place."""
    if manifest["status"] != "diverged":
        return outputs
    done = manifest["done"]
    return TrialOutputs(
        [row for row in base.prompts if row["split"] in done],
        [row for row in base.completions if row["split"] in done],
        [row for row in base.pairs if row["split"] in done],
    )


def replace_scores(
    folder: Path, name: str, scores: Sequence[Score], prompts: list[PromptRow], splits: Sequence[str]
) -> list[ScoreRow]:
    """Write one scorer's scores of these splits into a run's scores.jsonl; they replace its earlier ones."""
    new = [(name, score) for score in scores if score.split in splits]
    return _write_scores(folder, load_manifest(folder), [name], new, prompts, splits, files=FileCache())


def _write_scores(
    folder: Path,
    manifest: Manifest,
    names: Sequence[str],
    new: Sequence[tuple[str, Score]],
    prompts: list[PromptRow],
    splits: Sequence[str] = SPLITS,
    *,
    files: FileCache,
) -> list[ScoreRow]:
    clusters = {(row["split"], row["prompt_id"]): row.get("cluster") or "" for row in prompts}
    completions: list[CompletionRow] = rows_if_any(folder / "completions.jsonl", files)
    answers = {(row["split"], row["prompt_id"]): row for row in completions}
    old: list[ScoreRow] = rows_if_any(folder / "scores.jsonl", files)
    rows = [row for row in old if row["scorer"] not in names or row["split"] not in splits]
    for name, score in new:
        key = (score.split, score.prompt_id)
        rows.append(_score_row(manifest, name, score, clusters.get(key, ""), answers.get(key)))
    record = files.write_text(folder / "scores.jsonl", to_jsonl(rows))
    if manifest.get("files"):
        manifest["files"]["scores.jsonl"] = record
    write_manifest(folder, manifest, files)  # after a kill before this line, the scores are made again
    return rows


def _score_row(manifest: Manifest, scorer: str, score: Score, cluster: str, answer: CompletionRow | None) -> ScoreRow:
    flag = next(iter(manifest["flags"]), "")
    return {
        "arm": manifest["arm"],
        "config": manifest["config"],
        "seed": manifest["seed"],
        "split": score.split,
        "prompt_id": score.prompt_id,
        "scorer": scorer,
        "score": 0.0 if flag and score.score is not None else score.score,
        "cluster": cluster,
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


def collect_scores(study: Path, files: FileCache | None = None) -> Path:
    """Write scores.csv from the scores.jsonl of the base and of all trials, and return its path."""
    rows = [row for folder in trial_folders(study) for row in rows_if_any(folder / "scores.jsonl", files)]
    write_scores(study / SCORES_FILE, rows)
    return study / SCORES_FILE


def completion_row(completion: Completion) -> CompletionRow:
    """Return a completion's row of completions.jsonl, with its flags; thinking has columns where there is any."""
    thought = completion.thinking_tokens > 0
    row: CompletionRow = {
        "split": completion.split,
        "prompt_id": completion.prompt_id,
        "prompt": completion.prompt,
        "completion": completion.completion,
        "tokens": completion.tokens,
        "ended": completion.ended,
        "flags": completion_flags(completion.completion, ended=completion.ended, thought=thought),
    }
    if thought:
        row |= {"thinking": completion.thinking, "thinking_tokens": completion.thinking_tokens}
    return row


def completion_flags(completion: str, *, ended: bool, thought: bool = False) -> list[str]:
    """Return the flags of one completion, out of `empty`, `cut_off` and `repetition`.

    An answer whose policy `thought`, and was cut off before it could answer, is not `empty`.
    `repetition` needs a run of at least 20 characters (8 where the answer was cut off) that makes up half of the last
    2,000 characters. A table's rule or a list of zeros in a long answer is not degenerate.
    """
    text = completion.strip()
    flags = [] if text or (thought and not ended) else ["empty"]
    if not ended:
        flags.append("cut_off")
    pattern, shortest = (_REPEATED, 20) if ended else (_REPEATED_TO_THE_LIMIT, 8)
    tail = text[-_SCANNED_CHARS:]
    longest = max((len(match.group()) for match in pattern.finditer(tail)), default=0)
    if longest >= shortest and longest >= len(tail) / 2:
        flags.append("repetition")
    return flags


def _shares_by_split(outputs: TrialOutputs) -> dict[str, dict[str, float]]:
    splits = sorted({row["split"] for row in outputs.completions})
    return {
        split: degenerate_shares([_flagged(row) for row in outputs.completions if row["split"] == split])
        for split in splits
    }


def _flagged(row: CompletionRow) -> FlaggedRow:
    return {"completion": row["completion"], "flags": row["flags"]}


def _checked(outputs: TrialOutputs) -> list[CheckedRow]:
    passed = {(score.split, score.prompt_id) for score in score_checks(outputs) if score.score == 1.0}
    return [{**_flagged(row), "passed": (row["split"], row["prompt_id"]) in passed} for row in outputs.completions]


def unchanged_warnings(completions: Sequence[CompletionRow], base: Sequence[CompletionRow]) -> list[str]:
    """Warn of each split on which the answers equal the base's: training has hardly changed the policy."""
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


def unanswered_warnings(completions: Sequence[CompletionRow]) -> list[str]:
    """Warn of each split on which most answers stop in their thinking."""
    warnings = []
    for split in sorted({row["split"] for row in completions}):
        rows = [row for row in completions if row["split"] == split]
        share = sum("thinking" in row and not row["ended"] and not row["completion"].strip() for row in rows) / len(
            rows
        )
        if share > CUT_OFF_SHARE:
            warnings.append(
                f"{share:.0%} of the answers to {split} stop in their thinking and count as cut off; raise "
                "generate.max_new_tokens, or see whether the chat template opens a block that the model does not close"
            )
    return warnings


def cut_off_warnings(
    shares: Mapping[str, Mapping[str, float]], base: Mapping[str, Mapping[str, float]], *, fallen: bool = False
) -> list[str]:
    """Warn of each split on which most answers were cut off and the base's were not.

    Args:
        shares: `degenerate_shares` by split.
        base: the same of the base.
        fallen: whether fewer answers pass their checks than the base's: a higher limit would not mend that.
    """
    then = (
        "and fewer pass their checks than the base's: the policy babbles, and a higher limit would not mend it; lower "
        "the learning rate, and look at the pairs"
        if fallen
        else "raise it where the score has not fallen, or this arm is judged on stumps; where it has, the policy "
        "babbles: look at the learning rate"
    )
    return [
        f"{found['cut_off']:.0%} of the answers to {split} were cut off at generate.max_new_tokens, of the base's "
        f"{base.get(split, {}).get('cut_off', 0.0):.0%}; {then}"
        for split, found in shares.items()
        if runs_to_the_limit(found["cut_off"], base.get(split, {}).get("cut_off", 0.0))
    ]
