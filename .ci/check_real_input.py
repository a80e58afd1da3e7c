"""Fail loudly where the study of `.ci/run` lacks what it must have. Command: `check_real_input.py RESULTS`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.decide.scores_file import read_scores
from harness.study.manifest import data_identity

ARMS = ("simpo", "dpo")
ACCURACIES = ("preference_accuracy_sum", "preference_accuracy_mean")


def problems(study: Path) -> Iterator[str]:
    """Yield what is wrong with a study of one seed an arm, on data with pairs, tracked offline."""
    for name in ("report.html", "report.md", "verdict.json", "scores.csv"):
        if not (study / name).is_file():
            yield f"{name} is missing"
            return
    level = json.loads((study / "verdict.json").read_text(encoding="utf-8"))["level"]
    if level != "checkpoint":
        yield f"verdict.json: level is {level!r}; one seed an arm compares checkpoints"
    scores = read_scores(study / "scores.csv")
    golden = scores[scores["split"] == "golden"]
    for arm in ("sft", *ARMS):
        for scorer in ACCURACIES:
            rows = golden[(golden["arm"] == arm) & (golden["scorer"] == scorer)]
            if not rows["score"].between(0, 1).any():
                yield f"scores.csv: no held-out {scorer} of {arm}"
    identity = data_identity(study)
    if identity["status"] != "proved":
        yield f"identical data is {identity['status']}: {'; '.join(identity['reasons'])}"
    for seed, consumed in identity["by_seed"].items():
        if set(consumed) != set(ARMS) or len(set(consumed.values())) != 1:
            yield f"seed {seed}: consumed hashes {consumed}; expected one and the same for {', '.join(ARMS)}"
    runs = [path for path in study.glob("wandb/offline-run-*") if list(path.glob("*.wandb"))]
    trials = [path.parent for path in study.glob("trials/*/manifest.json")] + [study / "base"]
    if len(runs) < len(trials) + 1:
        yield f"wandb/: {len(runs)} offline runs for {len(trials)} trials and the study itself"


def main() -> int:
    """Check the one study in a results folder; exit status 1 where it is not as it must be."""
    studies = sorted(path.parent for path in Path(sys.argv[1]).glob("*/study.yaml"))
    if len(studies) != 1:
        print(f"real-input check: expected one study in {sys.argv[1]}, found {len(studies)}", file=sys.stderr)
        return 1
    found = list(problems(studies[0]))
    for text in found:
        print(f"real-input check: {text}", file=sys.stderr)
    if not found:
        print(f"real-input check passed: {studies[0] / 'report.html'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
