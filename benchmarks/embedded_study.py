"""What the embedded study measures: run it as shipped, with wrong labels and at a rate that is too high.

Command: `python benchmarks/embedded_study.py [FOLDER]`: seven minutes on one core; writes embedded_study.md beside this
file. Finished trials in FOLDER (default: results/benchmark) are not run again.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.sweep.app import run_sweep

COMMAND = ["+method=simpo,dpo", "tracking=none"]
SETTINGS = {
    "as shipped": [],
    "40% of the labels flipped": ["data.label_noise=0.4"],
    "all labels flipped": ["data.label_noise=1.0"],
    "learning rate 1e-3 in both arms": ["arms.dpo.learning_rate=1e-3", "arms.simpo.learning_rate=1e-3"],
}


def row(name: str, found: dict[str, Any]) -> str:
    """Return a setting's row: means of `checks` on golden in percent, differences in points."""
    cells = [name, f"{100 * found['base_mean']:.1f}"]
    for arm in ("simpo", "dpo"):
        seeds = " ".join(f"{100 * mean:.1f}" for mean in found["run_means"][arm].values())
        cells.append(f"{100 * found['means'][arm]:.1f} ({seeds})")
    low, high = (100 * bound for bound in found["ci95"])
    cells += [found["verdict"], f"{100 * found['difference']:+.1f} ({low:+.1f} to {high:+.1f})"]
    return "| " + " | ".join([*cells, f"{100 * found['minimum_detectable_difference']:.1f}"]) + " |"


def main() -> None:
    """Run the command."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/benchmark")
    rows, commands, found = [], [], {}
    for number, (name, overrides) in enumerate(SETTINGS.items()):
        # A folder each: two learning rates in one study would be a search with a selection on dev.
        (result,) = run_sweep([*COMMAND, *overrides, f"results_dir={folder / str(number)}"])
        assert result.verdict is not None, result.undecided
        found = result.verdict
        rows.append(row(name, found))
        commands.append(" ".join(["python -m harness.sweep", *COMMAND, *overrides]))
    names = ("torch", "transformers", "trl", "peft", "numpy", "scipy", "pandas")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    text = "\n".join(
        [
            "# The embedded study, measured",
            "",
            f"`python benchmarks/embedded_study.py`, Python {platform.python_version()}, {versions}, CPU, one thread.",
            f"{found['n_prompts']} golden prompts; `{found['metric']}`: the percentage of them whose checks all pass;",
            f"one value for each of the seeds {', '.join(found['run_means']['dpo'])} in brackets.",
            "MDD: minimum detectable difference at 80% power, in points.",
            "A tie: the 90% interval lies within the margin of 5 points.",
            "",
            "| setting | base | simpo (seeds) | dpo (seeds) | verdict | simpo − dpo (95% interval) | MDD |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "Each row is one command, with a `results_dir` of its own:",
            "",
            "```",
            *commands,
            "```",
            "",
        ]
    )
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
