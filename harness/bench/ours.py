"""Trials by the harness in one process, as a sweep's worker runs them, with plan, hashes, manifest and tracking.

Command: `python -m harness.bench.ours TRIALS.json`; prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Train the trials in the file in turn; generate nothing."""
    from transformers import trainer

    from harness.bench.stock import StepClock
    from harness.study.files import read_json, read_jsonl
    from harness.study.log import prepare_process
    from harness.sweep.design import single_trial
    from harness.sweep.problems import load_run
    from harness.sweep.stages import run_trial
    from harness.sweep.trial import Context

    prepare_process()
    for module in ("wandb", "harness.train.trainers", "harness.train.logps"):
        importlib.import_module(module)  # once per worker, so no part of a trial's time
    trials, context, clock = [], Context(), StepClock()
    trainer.DEFAULT_CALLBACKS.append(clock)  # of every trainer in this process
    for overrides in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        trial = single_trial(load_run(overrides), splits=())
        began = time.perf_counter()
        outcome = run_trial(trial, context)
        if outcome.status != "complete":
            raise SystemExit(f"{outcome.status}: {outcome.message}")
        manifest = read_json(trial.folder / "manifest.json")
        steps = read_jsonl(trial.folder / "train.jsonl")
        trials.append(
            {
                "seconds": manifest["seconds"],
                "trial_seconds": time.perf_counter() - began,
                "peak_memory_bytes": manifest["peak_memory_bytes"],
                "losses": [step["loss"] for step in steps],
                "step_ends": clock.ends,
            }
        )
    peak = max(max(trial["peak_memory_bytes"].values()) for trial in trials)
    print(json.dumps({"trials": trials, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
