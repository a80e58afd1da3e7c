"""Import what the commands import; no thread is started before the forks."""

import importlib

for name in (
    *("sweep.app", "train.stage", "train.run", "train.trainers", "train.adapter", "train.packed", "train.logps"),
    *("generate.answers", "generate.heldout", "score.trial_scores", "report.page", "dashboard", "verify"),
):
    importlib.import_module(f"harness.{name}")
importlib.import_module("torch").set_num_threads(1)
