"""Whether a change has made training slower: one trial by two checkouts of the harness, in turn.

Command: `python benchmarks/loop_ratio.py BEFORE AFTER --model DIR --pairs FILE`; each checkout has its environment in
.venv. Prints CPU seconds and the loop's clock seconds of each run, and the ratios after/before. CPU seconds hold on a
machine that others use, too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Cost:
    """One trial: CPU seconds of its process, of which importing is a part, and clock seconds of its loop."""

    cpu: float
    loop: float


def run(checkout: Path, overrides: list[str], work: Path) -> Cost:
    """Train one trial with a checkout's own environment."""
    results = Path(tempfile.mkdtemp(dir=work))
    trials = results / "trials.json"
    trials.write_text(json.dumps([[*overrides, f"results_dir={results}", "study=ratio"]]), encoding="utf-8")
    command = [str(checkout / ".venv" / "bin" / "python"), "-m", "harness.bench.ours", str(trials)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=checkout, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (trial,) = json.loads(ran.stdout.strip().splitlines()[-1])["trials"]
    return Cost(cpu, trial["seconds"]["train"])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=Path, metavar="CHECKOUT", help="before and after")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--num-pairs", type=int, default=32)
    parser.add_argument("--arm", default="simpo")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[Cost]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        keys = [f"+method={options.arm}", "method.learning_rate=5e-6", f"model.path={options.model.resolve()}"]
        keys += ["train.batch_size=4", "train.micro_batch_size=4", "train.epochs=1", "tracking=none"]
        keys += [f"data.train={options.pairs.resolve()}", f"data.max_train_pairs={options.num_pairs}"]
        for number, split in enumerate(("dev", "golden")):
            row = {"prompt": f"Say {number}.", "chosen": "yes", "rejected": "no"}
            (work / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
            keys.append(f"data.{split}={work / split}.jsonl")
        for _ in range(options.rounds):
            for name, checkout in zip(found, options.checkouts, strict=True):
                cost = run(checkout.resolve(), keys, work)
                found[name].append(cost)
                print(f"{name:7} {cost.cpu:7.1f} s of CPU, loop {cost.loop:7.1f} s", flush=True)
    for what in ("cpu", "loop"):
        ratios = [getattr(b, what) / getattr(a, what) for a, b in zip(*found.values(), strict=True)]
        print(f"{what}: after/before {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
