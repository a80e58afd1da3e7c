"""Where the training loop's time goes that its matrix products do not need: torch's profiler over one SimPO trial.

Command: `python benchmarks/loop_profile.py MODEL PAIRS`; writes loop_profile.md beside this file. Some minutes.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from loop_compiled import compare
from torch.profiler import ProfilerActivity, profile

from harness.bench.runs import Bench
from harness.sweep.design import single_trial
from harness.sweep.problems import load_run
from harness.sweep.products import needed, training_flops
from harness.sweep.stages import run_trial
from harness.sweep.trial import Context

PAIRS = 32
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::linear", "aten::matmul")


def kind(event: Any, rank: int) -> str:
    """Name what an operator does, by its name and the shapes of its arguments."""
    name, shapes = event.key, [shape for shape in event.input_shapes if shape]
    if name in PRODUCTS:
        return "LoRA's products" if any(rank in shape for shape in shapes) else "products with the base's weights"
    if "attention" in name or "_flash" in name:
        return "attention"
    if "adam" in name.lower() or "foreach" in name or "Optimizer" in name:
        return "optimiser"
    if any(part in name for part in ("copy_", "cat", "clone", "index", "contiguous", "fill_", "zero_", "empty")):
        return "copies and indexing"
    if name.startswith("aten::"):
        return "elementwise, norms, softmax, sums"
    return "autograd, modules, Python"


def main() -> None:
    """Run the command."""
    model, pairs = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), model=model, pairs=pairs, num_pairs=PAIRS)
        more = [f"results_dir={scratch}/results", "study=profile", "tracking=none"]
        trial = load_run([*bench.trial("simpo"), *bench.keys, *more])
        rate = bench.matmul_rate()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            outcome = run_trial(single_trial(trial, splits=()), Context())
        assert outcome.status == "complete", outcome.message
        flops = training_flops(bench.shape, needed(bench.rows), rank=trial.train.lora_rank)
        finding = compare(bench)
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages(group_by_input_shape=True):
        spent[kind(event, trial.train.lora_rank)] += event.self_cpu_time_total / 1e6
    total = sum(spent.values())
    lines = [
        "# Where the training loop's time goes",
        f"`python benchmarks/loop_profile.py`: one SimPO trial over {PAIRS} pairs of {Path(model).name}, the paired "
        f"engine, under torch's profiler, start and end of the trial included. "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}. Needed: {flops / 1e12:.2f} TFLOP, "
        f"{flops / rate:.1f} s at the {rate / 1e9:.0f} GFLOP/s that this machine reached just before.",
        "| what | seconds | share |\n|---|---|---|\n"
        + "\n".join(
            f"| {name} | {seconds:.1f} | {seconds / total:.0%} |"
            for name, seconds in sorted(spent.items(), key=lambda item: -item[1])
        ),
        "## With compiled elementwise parts",
        finding,
    ]
    page = Path(__file__).with_suffix(".md")
    page.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
