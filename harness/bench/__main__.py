"""Command `python -m harness.bench`: make the runs, save cost.json and cost.md, print the page."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from harness.bench.page import Result, page
from harness.bench.runs import STEP_PAIRS, Bench, FailedRunError, Run, warm_steps
from harness.config.machine import has_gpu, provenance
from harness.study.errors import UsageError
from harness.study.files import read_json, write_json, write_text
from harness.sweep.products import forward_flops, needed, training_flops

Job = Callable[[], Run]
LEVERS = (
    "train.levers.share_prefix=false",
    "train.levers.completion_head=false",
    "train.levers.fuse_adapters=false",
    "train.levers.group_lengths=false",
    "train.levers.metrics_steps=1",
)
ARMS = ("dpo", "simpo")
MORE = ("grid", "levers", "layout", "scale")  # options that add runs
SAME_WORK = ("model", "num_pairs", "tokens", "hardware", "versions")  # keys that --append compares


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    try:
        options = _options(argv)
        with tempfile.TemporaryDirectory() as scratch:
            print(_measure(options, Path(scratch)))
    except UsageError as error:
        print(f"harness.bench: {error}", file=sys.stderr)
        return 2
    except FailedRunError as error:  # the runs before it are saved
        print(f"harness.bench: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out / 'cost.json'} and {options.out / 'cost.md'}", file=sys.stderr)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; nothing is written or run before all of it holds."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.bench",
        description="Compare the cost of DPO and SimPO by TRL's own scripts and by the harness, on the same pairs.",
        epilog="Example: python -m harness.bench --model DIR --pairs train.jsonl --num-pairs 64 --grid",
    )
    parser.add_argument("--model", default="embedded", help="a checkpoint's folder (default: the embedded study's)")
    parser.add_argument("--pairs", help="a file with prompt, chosen, rejected as text (default: the embedded study's)")
    parser.add_argument("--num-pairs", type=int, default=64, help=f"a multiple of {STEP_PAIRS} (default 64)")
    parser.add_argument("--arms", default="dpo,simpo", help="dpo, simpo or both (default); none: what options add")
    parser.add_argument("--repeats", type=int, default=2, help="of each pair of runs, alternated (default 2)")
    parser.add_argument("--grid", action="store_true", help="also a grid of 4 DPO and 4 SimPO configs, once")
    parser.add_argument("--levers", action="store_true", help="also the harness with each lever switched off")
    parser.add_argument("--layout", action="store_true", help="also two trials in one process, and in two at once")
    parser.add_argument("--scale", action="store_true", help="also 1, 2, 4, 8 trials and 32 to 512 pairs")
    parser.add_argument(
        "--append", action="store_true", help="keep the runs in cost.json of --out; runs of --scale once each"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for cost.json and cost.md, whose old ones are lost (default: a new one)"
    )
    options = parser.parse_args(argv)
    options.arms = _arms(options)
    if options.model != "embedded" and options.pairs is None:
        raise UsageError(f"--model {options.model}: give its pairs as well, by --pairs FILE")
    least = 2 * STEP_PAIRS
    if options.num_pairs < least or options.num_pairs % STEP_PAIRS:
        raise UsageError(
            f"--num-pairs {options.num_pairs}: a step has {STEP_PAIRS} pairs; give a multiple of {STEP_PAIRS}, at "
            f"least {least}"
        )
    if options.repeats < 1:
        raise UsageError(f"--repeats {options.repeats}: give 1 or more; --arms none makes no such runs")
    if options.append and (options.out is None or not (options.out / "cost.json").is_file()):
        where = "no --out" if options.out is None else f"no cost.json in {options.out}"
        raise UsageError(f"--append: there is {where}; give the folder of the cost.json that gets more runs")
    options.out = out_folder(options.out)
    there = next(path for path in (options.out, *options.out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"--out {options.out}: {there} is not a folder that can be written to; give another one")
    return options


def _arms(options: argparse.Namespace) -> list[str]:
    """Return the arms that are asked for."""
    if options.arms == "none":
        if not any(getattr(options, name) for name in MORE):
            raise UsageError(f"--arms none: there is nothing to run; give one of --{', --'.join(MORE)}")
        return []
    asked = [name.strip() for name in options.arms.split(",")]
    if unknown := [name for name in asked if name not in ARMS]:
        raise UsageError(f"--arms: there is no arm {unknown[0]!r}; there are {', '.join(ARMS)}, and none")
    return list(dict.fromkeys(asked))


def out_folder(typed: Path | None) -> Path:
    """Return the folder that was typed, else one under results/ that is not there yet."""
    if typed is not None:
        return typed
    named = Path("results") / time.strftime("bench-%Y%m%d-%H%M%S")
    found, number = named, 1
    while found.exists():
        number += 1
        found = Path(f"{named}-{number}")
    return found


def _measure(options: argparse.Namespace, scratch: Path) -> str:
    """Make the runs, save after each, and return the page."""
    bench = Bench(scratch, model=options.model, pairs=options.pairs, num_pairs=options.num_pairs)
    result = _result(bench, options)
    if options.append:
        _take_earlier(options.out / "cost.json", result)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {options.out}: cannot be made ({error.strerror}); give another folder") from error
    made = {run["name"] for run in result["runs"]}
    for job in [*_jobs(bench, options), *(_scale(options, scratch, made) if options.scale else [])]:
        result["matmul_flops_per_second"].append(bench.matmul_rate())
        run = job()
        result["runs"].append(run)
        print(f"{run['side']:8} {run['name']:45} {run['wall']:8.1f} s", file=sys.stderr)
        _save(options.out, result)
    _save(options.out, result)
    return page(result)


def _result(bench: Bench, options: argparse.Namespace) -> Result:
    """Return a result without runs: the work, its needed products, and the machine."""
    shape, rows, rank = bench.shape, bench.rows, bench.config.train.lora_rank
    steady = rows[warm_steps(len(rows) // STEP_PAIRS) * STEP_PAIRS :]
    about = provenance()
    return {
        "model": Path(options.model).name,
        "num_pairs": options.num_pairs,
        "tokens": sum(len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows),
        "padded_tokens": sum(2 * len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in rows),
        "matmul_flops_per_second": [],
        "needed_flops": training_flops(shape, needed(rows), rank=rank),
        "needed_reference_flops": forward_flops(shape, needed(rows)),
        "steady_pair_flops": training_flops(shape, needed(steady), rank=rank) / len(steady),
        "runs": [],
        "versions": about["versions"],
        "commit": about["commit"],
        "hardware": about["hardware"],
    }


def _save(folder: Path, result: Result) -> None:
    write_json(folder / "cost.json", result)
    write_text(folder / "cost.md", page(result))


def _take_earlier(path: Path, result: Result) -> None:
    """Take over the runs in a file.

    Raises:
        UsageError: where they are of other work or another machine, or the file is no cost.json.
    """
    try:
        found: Result = read_json(path)
        runs, rates = found["runs"], found["matmul_flops_per_second"]
        page(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"--append: {path} is not a cost.json of this command; give another --out") from error
    now = {**result}
    for key, value in found.items():
        if key in SAME_WORK and value != now[key]:
            raise UsageError(f"--append: {path} has {key}={value}, this run {now[key]}; give another --out")
    result["runs"], result["matmul_flops_per_second"] = runs, rates


def _jobs(bench: Bench, options: argparse.Namespace) -> list[Job]:
    """Return the runs in order: those of the arms, stock and harness in turn and repeated, then what options add."""
    by_arm = {"dpo": _dpo_jobs(bench), "simpo": _simpo_jobs(bench)}
    jobs = [job for arm in options.arms for job in by_arm[arm]] * options.repeats
    if options.grid:
        jobs += [partial(bench.harness_grid, name="grid"), bench.stock_grid]
    if options.layout:
        cores = os.cpu_count() or 2
        jobs += [partial(bench.layout, 1, cores), partial(bench.layout, 2, max(1, cores // 2))]
    return jobs + (_lever_jobs(bench) if options.levers else [])


def _dpo_jobs(bench: Bench) -> list[Job]:
    jobs: list[Job] = [
        partial(bench.stock, "dpo", "dpo"),
        partial(bench.harness, "dpo", [bench.trial("dpo")]),
        partial(bench.stock, "dpo, precomputed", "dpo", precompute_ref_log_probs=True),
    ]
    if has_liger():
        jobs.append(partial(bench.stock, "dpo, Liger", "dpo", use_liger_kernel=True))
    return jobs


def _simpo_jobs(bench: Bench) -> list[Job]:
    stock = {"simpo_gamma": 1.0, "beta": 2.0}
    jobs: list[Job] = [
        partial(bench.harness, "simpo", [bench.trial("simpo")]),
        partial(bench.stock, "simpo", "simpo", **stock),
    ]
    if has_liger():
        jobs.append(partial(bench.stock, "simpo, Liger", "simpo", use_liger_kernel=True, **stock))
    return jobs


def has_liger() -> bool:
    """Return whether TRL can use Liger's kernels here: they are installed, and there is a GPU."""
    return importlib.util.find_spec("liger_kernel") is not None and has_gpu()


def _lever_jobs(bench: Bench) -> list[Job]:
    """Return runs of each arm with all levers on, with each one off, and with all of them off."""
    dpo, simpo = bench.trial("dpo"), bench.trial("simpo")
    jobs: list[Job] = [partial(bench.harness, "simpo, all levers on", [simpo])]
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


if __name__ == "__main__":
    sys.exit(main())
