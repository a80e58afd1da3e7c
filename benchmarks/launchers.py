"""The embedded `gamma_beta` study through each launcher: the same scores and verdict, byte for byte, and the seconds.

Command: `python benchmarks/launchers.py FOLDER`: about twenty minutes on two cores. FOLDER must not be there yet.
Writes launchers.md beside this file; fails where a launcher's scores differ.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

LAUNCHERS = ("basic", "joblib", "submitit_local", "ray")
COMMAND = ["+sweep=gamma_beta", "study=gamma-beta"]


def run(launcher: str, folder: Path) -> tuple[str, float, str]:
    """Run the study through a launcher; return its scores and verdict, the seconds and its last line but one."""
    chosen = [] if launcher == "basic" else [f"hydra/launcher={launcher}"]
    command = [sys.executable, "-m", "harness.sweep", *COMMAND, *chosen, f"results_dir={folder / launcher}"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, f"{launcher}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    study = folder / launcher / "gamma-beta"
    found = "".join((study / name).read_text(encoding="utf-8") for name in ("scores.csv", "verdict.json"))
    line = next(line for line in done.stdout.splitlines() if line.startswith("verdict:"))
    return found, seconds, line.removeprefix("verdict: ")


def main() -> None:
    """Run the command."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    rows, found, verdict = [], {}, ""
    for launcher in LAUNCHERS:
        found[launcher], seconds, verdict = run(launcher, folder)
        sha256 = hashlib.sha256(found[launcher].encode()).hexdigest()
        rows.append(f"| {launcher} | {seconds:.0f} | `{sha256[:16]}` |")
        print(rows[-1], flush=True)
    assert len(set(found.values())) == 1, "the launchers' scores differ"
    versions = ", ".join(f"{name} {version(name)}" for name in ("hydra-core", "joblib", "submitit", "ray", "torch"))
    text = [
        "# One study through each launcher",
        "",
        f"`python benchmarks/launchers.py FOLDER`: `{' '.join(COMMAND)}`, the embedded model, {os.cpu_count()} cores,",
        f"Python {platform.python_version()}, {versions}. `scores.csv` and `verdict.json` are equal, byte for byte.",
        "",
        "| launcher | seconds | SHA-256 of both files |",
        "|---|---|---|",
        *rows,
        "",
        f"Verdict: {verdict}",
        "",
        "One run each, with other jobs beside for part of the time: the files are the result, the seconds an",
        "indication. A trial of the embedded model takes some seconds: what submitit and Ray cost here is processes",
        "that start, each of which imports torch and TRL anew.",
        "",
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
