"""Is "identical data" proved? Compare, seed by seed, what the arms' trainers really consumed.

Input: the manifests of a study -> output: a status with reasons, for the verdict's warnings and the report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.study.files import read_json
from harness.study.manifest import is_as_written

# What must be equal across the arms of a seed, and how a reader knows it.
_EQUAL = {
    "consumed_tokens_sha256": "consumed tokens",
    "batch_plan_sha256": "batch plan",
    "data_sha256": "token ids",
    "base_sha256": "base weights",
}


def data_identity(study: Path) -> dict[str, Any]:
    """Say whether all arms of a study consumed the same tokens in the same order, seed by seed.

    Returns:
        `status` (`proved`, `not proved`, or `not applicable` with fewer than two arms), `reasons`, and `by_seed`:
        the hash of the consumed tokens by seed and arm.
    """
    trials, reasons = [], []
    for path in sorted((study / "trials").glob("*/manifest.json")):
        try:
            manifest = read_json(path)
        except ValueError as error:
            reasons.append(f"manifest of trial {path.parent.name} is not readable: {error}")
            continue
        if is_as_written(manifest):
            trials.append(manifest)
        else:
            reasons.append(f"manifest of trial {path.parent.name} was changed after the trial wrote it")
    complete = [trial for trial in trials if trial.get("status") == "complete"]
    arms = sorted({str(trial["arm"]) for trial in complete})
    by_seed: dict[str, dict[str, str]] = {}
    for trial in complete:
        by_seed.setdefault(str(trial["seed"]), {})[trial["arm"]] = str(trial.get("consumed_tokens_sha256") or "missing")
    if len(arms) < 2:
        return {"status": "not applicable", "reasons": reasons, "by_seed": by_seed}
    diverged = {(str(t["seed"]), t["arm"]) for t in trials if t.get("status") == "diverged"}
    for seed in sorted(by_seed, key=_as_number):
        of_seed = [trial for trial in complete if str(trial["seed"]) == seed]
        lacking = [arm for arm in arms if arm not in by_seed[seed] and (seed, arm) not in diverged]
        if lacking:
            reasons.append(f"seed {seed} has no complete trial of {', '.join(lacking)}")
        reasons += _differences(seed, of_seed)
    return {"status": "not proved" if reasons else "proved", "reasons": reasons, "by_seed": by_seed}


def _differences(seed: str, trials: list[dict[str, Any]]) -> list[str]:
    reasons = []
    for key, name in _EQUAL.items():
        values = {trial.get(key) for trial in trials}
        if None in values or "" in values:
            arms = sorted({trial["arm"] for trial in trials if not trial.get(key)})
            reasons.append(f"seed {seed}: the {name} of {', '.join(arms)} are not recorded")
        elif len(values) > 1:
            reasons.append(f"seed {seed}: the {name} differ between arms")
    for trial in trials:
        expected = trial.get("expected_tokens_sha256")
        if expected and trial.get("consumed_tokens_sha256") not in (None, expected):
            reasons.append(f"seed {seed}: the trainer of {trial['arm']} did not consume the batch plan")
    return reasons


def _as_number(seed: str) -> tuple[int, str]:
    return (int(seed), "") if seed.lstrip("-").isdigit() else (1 << 62, seed)
