"""Finish with one checkout the studies that another checkout was killed in, and compare with the undisturbed study.

`python benchmarks/half_finished.py BEFORE AFTER --work FOLDER` runs a tuned study of the embedded model with the
checkout BEFORE, undisturbed. Then it kills BEFORE's sweep in the training of a trial, at several moments, and runs the
same command with AFTER. Finished trials must be kept, scores.csv and verdict.json must be equal byte for byte, and
AFTER's `harness.verify` must find nothing. Prints a Markdown table; exit status 1 means that a row is not equal.
Both checkouts run on this Python's libraries. It takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

STUDY = [
    *("+method=simpo,dpo", "study=half", "arms.dpo.beta=0.05,0.1", "arms.simpo.beta=2,3", "method.learning_rate=1e-3"),
    *("tuning_seeds=[7]", "seed=1,2,3", "data.max_train_pairs=32", "data.max_dev_prompts=12"),
    *("data.max_golden_prompts=48", "train.epochs=2", "train.batch_size=4", "train.micro_batch_size=4"),
    *("train.checkpoint_steps=1", "generate.max_new_tokens=12", "tracking=none", "results_dir=results"),
]
FINISHED = (0, 1, 3, 4, 6, 9)  # trials that are finished when the sweep is killed; 4 of the 10 are for tuning
RESULTS = ("scores.csv", "verdict.json")


def start(checkout: Path, folder: Path, *command: str) -> subprocess.Popen[str]:
    """Start a command of a checkout in a folder."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(checkout: Path, folder: Path) -> str:
    """Run the study's command to its end, and return its output.

    Raises:
        RuntimeError: when it fails.
    """
    process = start(checkout, folder, "harness.sweep", *STUDY)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{checkout}: exit status {process.returncode} in {folder}\n{output[-3000:]}")
    return output


def finished_trials(study: Path) -> dict[Path, int]:
    """Return the scores.jsonl of finished trials, with the time of their last change in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in sorted(study.glob("trials/*/scores.jsonl"))}


def kill_in_training(checkout: Path, folder: Path, finished: int) -> None:
    """Run the command, and kill it when `finished` trials are done and the next one has a checkpoint.

    Raises:
        RuntimeError: when the command ends first.
    """
    process = start(checkout, folder, "harness.sweep", *STUDY)
    study = folder / "results" / "half"
    while process.poll() is None:
        if len(finished_trials(study)) >= finished and list(study.glob("trials/*/checkpoints/checkpoint-*")):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return
        time.sleep(0.001)
    raise RuntimeError(f"the sweep ended before it could be killed\n{process.communicate()[0][-3000:]}")


def compare(before: Path, after: Path, undisturbed: Path, folder: Path, finished: int) -> tuple[str, bool]:
    """Return one row of the table, and whether it is as it must be."""
    kill_in_training(before, folder, finished)
    study = folder / "results" / "half"
    kept = finished_trials(study)
    output = finish(after, folder)
    now = finished_trials(study)
    counts = re.search(r"trials run now: (\d+), complete before: (\d+)", output)
    ran, complete = counts.groups() if counts else ("?", "?")
    unchanged = sum(now.get(path) == changed for path, changed in kept.items())
    equal = [(study / name).read_bytes() == (undisturbed / name).read_bytes() for name in RESULTS]
    verify = start(after, folder, "harness.verify", str(study))
    verify.communicate()
    cells = [
        str(finished),
        f"{unchanged} of {len(kept)}",
        ran,
        complete,
        *("equal" if same else "DIFFERS" for same in equal),
        "nothing" if verify.returncode == 0 else "FINDINGS",
    ]
    return f"| {' | '.join(cells)} |", all(equal) and unchanged == len(kept) and verify.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run all comparisons, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout that starts the studies")
    parser.add_argument("after", type=Path, help="checkout that finishes them")
    parser.add_argument("--work", type=Path, required=True, help="a folder that does not exist yet")
    options = parser.parse_args(argv)
    before, after = options.before.resolve(), options.after.resolve()
    whole = options.work.resolve() / "undisturbed"
    whole.mkdir(parents=True)
    finish(before, whole)
    print("| finished trials at the kill | kept | run now | complete before | scores.csv | verdict.json | verify |")
    print("|---|---|---|---|---|---|---|", flush=True)
    right = True
    for finished in FINISHED:
        folder = options.work.resolve() / f"killed-{finished}"
        folder.mkdir()
        row, as_it_must_be = compare(before, after, whole / "results" / "half", folder, finished)
        right = right and as_it_must_be
        print(row, flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
