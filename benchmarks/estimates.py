"""How near `plan=true` comes: estimates of time, memory and disk beside what the same studies took.

Command: `python benchmarks/estimates.py FOLDER [MODEL TRAIN DEV GOLDEN]`: some minutes; with a checkpoint and its pairs
that study is measured, too. FOLDER must not be there yet. Writes estimates.md beside this file.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.study.manifest import read_manifest
from harness.sweep import estimate as planning
from harness.sweep.app import run_sweep
from harness.sweep.estimate import Estimate

EMBEDDED = {
    "embedded, LoRA": ["+method=simpo,dpo"],
    "embedded, full fine-tuning": ["+method=simpo,dpo", "train.tuning=full", "seed=1,2"],
    "embedded, gamma_beta": ["+sweep=gamma_beta"],
}


def estimated(overrides: Sequence[str]) -> tuple[Estimate, int, int]:
    """Run `plan=true`, and return its estimate with the numbers of trials that tune and that decide."""
    found: list[Any] = []
    real = planning.estimate

    def keep(design: Any, machine: Any, *, tune: int, confirm: int, **given: Any) -> Estimate:
        found.append((real(design, machine, tune=tune, confirm=confirm, **given), tune, confirm))
        return found[-1][0]

    planning.estimate = keep
    try:
        run_sweep([*overrides, "plan=true"])
    finally:
        planning.estimate = real
    return found[-1]


def row(name: str, overrides: Sequence[str], folder: Path) -> str:
    """Estimate a study, run it, and return its line of the table."""
    given = [*overrides, f"results_dir={folder}"]
    expected, tune, confirm = estimated(given)
    began = time.perf_counter()
    (result,) = run_sweep(given)
    took = time.perf_counter() - began
    assert result.report is not None
    peaks = [read_manifest(path)["peak_memory_bytes"]["train"] for path in result.report.parent.glob("trials/*")]
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    seconds = tune * expected.tune_seconds + confirm * expected.confirm_seconds + expected.reference_seconds
    pairs = [(seconds, took, 1), (expected.memory_bytes, max(peaks), 1e6), (expected.disk_bytes, disk, 1e6)]
    cells = [f"{guess / unit:.0f} / {real / unit:.0f} ({guess / real:.1f})" for guess, real, unit in pairs]
    return f"| {name} | {tune + confirm} | " + " | ".join(cells) + " |"


def main() -> None:
    """Run the command."""
    folder, own = Path(sys.argv[1]), sys.argv[2:]
    settings = dict(EMBEDDED)
    if own:
        keys = ("model.path", "data.train", "data.dev", "data.golden")
        small = ["data.max_train_pairs=32", "data.max_dev_prompts=4", "data.max_golden_prompts=16"]
        study = [f"{key}={value}" for key, value in zip(keys, own, strict=True)]
        settings[Path(own[0]).name] = ["+method=simpo,dpo", *study, *small, "generate.max_new_tokens=64"]
    rows = [row(name, overrides, folder / str(number)) for number, (name, overrides) in enumerate(settings.items())]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    text = [
        "# Estimates of `plan=true`, and what studies took",
        "",
        f"`python benchmarks/estimates.py`, Python {platform.python_version()}, {versions}, CPU.",
        "Estimated / measured (ratio). Memory is the peak of a process while it trains; disk is all that lies under",
        "`results_dir` at the end, W&B's files included.",
        "",
        "| study | trials | seconds | memory, MB | disk, MB |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Seconds assume that all answers are as long as they may be and leave out the SFT base and the report; disk is",
        "what the largest moment needs, with two checkpoints of a trial. On a GPU nothing of this was measured.",
        "",
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
