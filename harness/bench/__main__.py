"""`python -m harness.bench`: run, print and save the comparison."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.arms import ARMS
from harness.bench.page import page
from harness.bench.runs import Bench, Run
from harness.bench.work import matmul_rate, needed_flops
from harness.provenance import provenance
from harness.records import UsageError, write_json, write_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.bench",
        description="What DPO and SimPO runs cost by TRL's own scripts and by the harness, on the same pairs.",
        epilog="Example: python -m harness.bench --model DIR --pairs train.jsonl --num-pairs 64 --grid",
    )
    parser.add_argument("--model", default="embedded", help="a checkpoint's folder (default: the embedded study's)")
    parser.add_argument("--pairs", help="a file with prompt, chosen, rejected as text (default: the embedded study's)")
    parser.add_argument("--num-pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2, help="of each pair of runs, alternated (default 2)")
    parser.add_argument("--grid", action="store_true", help="also a grid of 4 DPO and 4 SimPO configs, once")
    parser.add_argument("--levers", action="store_true", help="also the harness with each lever switched off")
    parser.add_argument("--layout", action="store_true", help="also two trials in one process, and in two at once")
    parser.add_argument("--scale", action="store_true", help="also 1, 2, 4, 8 trials and 32 to 512 pairs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder for cost.json and cost.md")
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            result = _measure(options, Path(scratch))
    except UsageError as error:
        print(f"harness.bench: {error}", file=sys.stderr)
        return 2
    write_json(options.out / "cost.json", result)
    text = page(result)
    write_text(options.out / "cost.md", text)
    print(text)
    return 0


Job = Callable[[], Run]
LEVERS = ("cache_reference", "share_prefix", "completion_head", "fuse_adapters")


def _measure(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    bench = Bench(scratch, model=options.model, pairs=options.pairs, num_pairs=options.num_pairs)
    config = _model_config(bench)
    text = config.get_text_config()
    rate = matmul_rate(text.hidden_size, text.intermediate_size)
    jobs = _jobs(bench, options)
    runs: list[Run] = []
    for job in tqdm(jobs, desc="runs", unit="run"):
        runs.append(job())
        tqdm.write(f"{runs[-1].side:8}{runs[-1].name:40}{runs[-1].wall:8.1f} s", file=sys.stderr)
    if options.scale:
        runs += _scale(options, scratch)
    rows = bench.rows
    return {
        "model": Path(options.model).name,
        "num_pairs": options.num_pairs,
        "tokens": sum(len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows),
        "padded_tokens": sum(2 * len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in rows),
        "matmul_flops_per_second": [rate, matmul_rate(text.hidden_size, text.intermediate_size)],
        "needed_flops": needed_flops(config, rows, lora_rank=bench.config.train.lora_rank),
        "runs": [asdict(run) for run in runs],
        **provenance(),
    }


def _jobs(bench: Bench, options: argparse.Namespace) -> list[Job]:
    """Return the runs in the order in which they are made: stock and harness in turn, repeated."""
    once: list[Job] = [
        partial(bench.stock, "dpo", "dpo"),
        partial(bench.harness, "dpo", [bench.trial("dpo")]),
        partial(bench.stock, "dpo, precomputed", "dpo", precompute_ref_log_probs=True),
        partial(bench.harness, "simpo", [bench.trial("simpo")]),
        partial(bench.stock, "simpo", "simpo", simpo_gamma=1.0, beta=2.0),
    ]
    jobs = once * options.repeats
    if options.grid:
        jobs += [bench.harness_grid, bench.stock_grid]
    if options.layout:
        cores = os.cpu_count() or 2
        jobs += [partial(bench.layout, 1, cores), partial(bench.layout, 2, max(1, cores // 2))]
    for arm in ("dpo", "simpo") if options.levers else ():
        off = [f"train.{lever}=false" for lever in LEVERS if lever != "cache_reference" or ARMS[arm].uses_reference]
        jobs += [partial(bench.harness, f"{arm}, {key}", [bench.trial(arm)], key) for key in off]
        jobs.append(partial(bench.harness, f"{arm}, all of these off", [bench.trial(arm)], *off))
    return jobs


def _scale(options: argparse.Namespace, scratch: Path) -> list[Run]:
    bench = Bench(scratch / "scale", model=options.model, pairs=options.pairs, num_pairs=32)
    runs = [bench.harness_grid(size) for size in (1, 2, 4, 8)]
    for count in (32, 64, 128, 256, 512):
        try:
            bench = Bench(scratch / f"scale{count}", model=options.model, pairs=options.pairs, num_pairs=count)
        except UsageError:
            break
        runs.append(bench.harness(f"{count} pairs", [bench.trial("dpo")]))
    return runs


def _model_config(bench: Bench) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(bench.model_dir)


if __name__ == "__main__":
    sys.exit(main())
