"""The same runs by the harness: one process, as a sweep's worker runs them, with plan, hashes, manifest and tracking.

Command: `python -m harness.bench.ours TRIALS.json`; prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

start = time.perf_counter()


def main() -> None:
    """Train the trials in the file, one after the other; nothing is generated."""
    from harness.study.files import read_json, read_jsonl
    from harness.study.log import prepare_process
    from harness.sweep.design import single_trial
    from harness.sweep.problems import load_run
    from harness.sweep.stages import run_trial
    from harness.sweep.trial import Context

    prepare_process()
    for module in ("wandb", "harness.train.trainers", "harness.train.reference"):
        importlib.import_module(module)  # once in a worker: not time around a trial
    trials, context = [], Context()
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
            }
        )
    ended = time.perf_counter()
    peak = max(max(trial["peak_memory_bytes"].values()) for trial in trials)
    print(json.dumps({"trials": trials, "seconds": ended - start, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
