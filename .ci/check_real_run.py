"""Check what the real-input run of CI left behind: python .ci/check_real_run.py RESULTS_DIR."""

import json
import sys
from pathlib import Path

import pandas as pd

(study,) = (path for path in Path(sys.argv[1]).iterdir() if (path / "study.yaml").is_file())
verdict = json.loads((study / "verdict.json").read_text())
assert verdict["level"] == "checkpoint", verdict["level"]
assert verdict["metric"] == "preference_accuracy", verdict["metric"]
assert set(verdict["means"]) == {"simpo", "dpo"}
assert not any("NOT proved" in warning for warning in verdict["warnings"]), verdict["warnings"]

scores = pd.read_csv(study / "scores.csv", keep_default_na=False)
means = (
    scores.assign(score=pd.to_numeric(scores["score"])).groupby(["split", "scorer", "arm"])["score"].mean().unstack()
)
print((100 * means).round(1).to_string())
for split in ("dev", "golden"):
    for definition in ("sum", "mean"):
        found = means.loc[(split, f"preference_accuracy_{definition}")]
        assert found.index.tolist() == ["dpo", "sft", "simpo"], (split, definition, found)
        assert found.between(0, 1).all(), found
assert means.loc[("golden", "preference_accuracy_sum"), "sft"] == 0.5  # its log-ratio to itself is 0

trials = [json.loads(path.read_text()) for path in study.glob("trials/*/manifest.json")]
assert sorted(trial["arm"] for trial in trials) == ["dpo", "simpo"]
assert len({trial["consumed_tokens_sha256"] for trial in trials}) == 1, "the arms consumed other tokens"
for folder in [study / "base", *study.glob("trials/*")]:
    answers = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert any(answer["completion"].strip() for answer in answers), f"{folder}: nothing but empty answers"
runs = list(study.glob("wandb/offline-run-*/run-*.wandb"))
assert len(runs) == len(trials) + 2, f"offline W&B runs: {len(runs)}"  # the base's and the study's own
assert (study / "report.html").is_file()
print(f"real-input check: {verdict['reason']} W&B offline runs: {len(runs)}")
