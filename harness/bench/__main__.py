"""Command `python -m harness.bench`: make the runs, save cost.json and cost.md, print the page."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from harness.bench.page import Result, page
from harness.bench.runs import Bench, Run, needed_flops
from harness.config.machine import provenance
from harness.study.errors import UsageError
from harness.study.files import read_json, write_json, write_text
from harness.train.memory import matmul_rate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Job = Callable[[], Run]
LEVERS = (
    "train.levers.share_prefix=false",
    "train.levers.completion_head=false",
    "train.levers.fuse_adapters=false",
    "train.levers.group_lengths=false",
    "train.levers.metrics_steps=1",
)
SAME_WORK = ("model", "num_pairs", "tokens", "hardware", "versions")  # keys that --append compares


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.bench",
        description="Compare the cost of DPO and SimPO by TRL's own scripts and by the harness, on the same pairs.",
        epilog="Example: python -m harness.bench --model DIR --pairs train.jsonl --num-pairs 64 --grid",
    )
    parser.add_argument("--model", default="embedded", help="a checkpoint's folder (default: the embedded study's)")
    parser.add_argument("--pairs", help="a file with prompt, chosen, rejected as text (default: the embedded study's)")
    parser.add_argument("--num-pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2, help="of each pair of runs, alternated (default 2; 0: none)")
    parser.add_argument("--grid", action="store_true", help="also a grid of 4 DPO and 4 SimPO configs, once")
    parser.add_argument("--levers", action="store_true", help="also the harness with each lever switched off")
    parser.add_argument("--layout", action="store_true", help="also two trials in one process, and in two at once")
    parser.add_argument("--scale", action="store_true", help="also 1, 2, 4, 8 trials and 32 to 512 pairs")
    parser.add_argument(
        "--append", action="store_true", help="keep the runs in cost.json, add these; runs of --scale once each"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder for cost.json and cost.md")
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            print(_measure(options, Path(scratch)))
    except UsageError as error:
        print(f"harness.bench: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace, scratch: Path) -> str:
    """Make the runs, save after each, and return the page."""
    bench = Bench(scratch, model=options.model, pairs=options.pairs, num_pairs=options.num_pairs)
    config = _model_config(bench)
    text, rows = config.get_text_config(), bench.rows
    about = provenance()
    result: Result = {
        "model": Path(options.model).name,
        "num_pairs": options.num_pairs,
        "tokens": sum(len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows),
        "padded_tokens": sum(2 * len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in rows),
        "matmul_flops_per_second": [],
        "needed_flops": needed_flops(config, rows, lora_rank=bench.config.train.lora_rank),
        "needed_reference_flops": needed_flops(config, rows, lora_rank=0) / 2,
        "runs": [],
        "versions": about["versions"],
        "commit": about["commit"],
        "hardware": about["hardware"],
    }
    if options.append:
        _take_earlier(options.out / "cost.json", result)
    made = {run["name"] for run in result["runs"]}
    for job in [*_jobs(bench, options), *(_scale(options, scratch, made) if options.scale else [])]:
        result["matmul_flops_per_second"].append(matmul_rate(text.hidden_size, text.intermediate_size))
        run = job()
        result["runs"].append(run)
        print(f"{run['side']:8} {run['name']:45} {run['wall']:8.1f} s", file=sys.stderr)
        _save(options.out, result)
    _save(options.out, result)
    return page(result)


def _save(folder: Path, result: Result) -> None:
    write_json(folder / "cost.json", result)
    write_text(folder / "cost.md", page(result))


def _take_earlier(path: Path, result: Result) -> None:
    """Take over the runs in a file.

    Raises:
        UsageError: where they are of other work or another machine.
    """
    if not path.is_file():
        return
    found: Result = read_json(path)
    now = {**result}
    for key, value in found.items():
        if key in SAME_WORK and value != now[key]:
            raise UsageError(f"--append: {path} has {key}={value}, this run {now[key]}; give another --out")
    result["runs"] = found["runs"]
    result["matmul_flops_per_second"] = found["matmul_flops_per_second"]


def _jobs(bench: Bench, options: argparse.Namespace) -> list[Job]:
    """Return the runs in order: stock and harness in turn, repeated."""
    once: list[Job] = [
        partial(bench.stock, "dpo", "dpo"),
        partial(bench.harness, "dpo", [bench.trial("dpo")]),
        partial(bench.stock, "dpo, precomputed", "dpo", precompute_ref_log_probs=True),
        partial(bench.harness, "simpo", [bench.trial("simpo")]),
        partial(bench.stock, "simpo", "simpo", simpo_gamma=1.0, beta=2.0),
    ]
    jobs = once * options.repeats
    if options.grid:
        jobs += [partial(bench.harness_grid, name="grid"), bench.stock_grid]
    if options.layout:
        cores = os.cpu_count() or 2
        jobs += [partial(bench.layout, 1, cores), partial(bench.layout, 2, max(1, cores // 2))]
    if options.levers:
        dpo, simpo = bench.trial("dpo"), bench.trial("simpo")
        jobs.append(partial(bench.harness, "simpo, all levers on", [simpo]))
        jobs += [partial(bench.harness, f"simpo, {key}", [simpo], key) for key in LEVERS]
        jobs.append(partial(bench.harness, "simpo, all of these", [simpo], *LEVERS))
        jobs.append(partial(bench.harness, "dpo, all levers on", [dpo]))
        jobs += [partial(bench.harness, f"dpo, {key}", [dpo], key) for key in ("train.reference=adapter_off",)]
        jobs.append(partial(bench.harness, "dpo, all of these", [dpo], "train.reference=adapter_off", *LEVERS))
    return jobs


def _scale(options: argparse.Namespace, scratch: Path, made: set[str]) -> list[Job]:
    """Return runs of 1 to 8 trials over 32 pairs, and of one trial over 32 to 512 pairs or all of them.

    Runs whose names are in `made` (`--append`) are left out.
    """
    bench = Bench(scratch / "scale", model=options.model, pairs=options.pairs, num_pairs=32)
    jobs: list[Job] = [partial(bench.harness_grid, size) for size in (1, 2, 4, 8) if f"{size} trials" not in made]
    for count in (32, 64, 128, 256, 512):
        if f"{count} pairs" in made:
            continue
        try:
            bench = Bench(scratch / f"scale{count}", model=options.model, pairs=options.pairs, num_pairs=count)
        except UsageError:
            break
        jobs.append(partial(bench.harness, f"{count} pairs", [bench.trial("dpo")]))
    return jobs


def _model_config(bench: Bench) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(bench.model_dir)


if __name__ == "__main__":
    sys.exit(main())
