"""Check the harness on one GPU, in under eight minutes: what breaks, what is equal, what is fast, what fits.

Command: `python benchmarks/gpu.py --out FOLDER`. Writes gpu.json and gpu.md there, after each part. Nothing is
downloaded: the large model has Llama-3-8B's shape and random weights. Exit status 1 where a part failed or a check does
not hold. `--tiny` runs every part with small shapes, on a CPU too: that tests this script and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_parts
import psutil
import torch
from gpu_harness import GPU, SHAPES
from gpu_parts import STEPS, Found, Row, Settings

IMPORT_SECONDS = max(0.0, time.time() - psutil.Process().create_time())
NOT_MEASURED = "no figure on this page was measured on a GPU"


@dataclass(frozen=True)
class Part:
    """A part: what runs it, and with how many seconds left on a GPU it is begun at all (guessed)."""

    run: Callable[[Settings, Found], None]
    needs: float


PARTS = {
    "machine": Part(gpu_parts.machine, 3),
    "attention": Part(gpu_parts.attention, 15),
    "equality": Part(gpu_parts.equality, 30),
    "speed": Part(gpu_parts.speed, 60),
    "memory": Part(gpu_parts.memory, 45),
    "study": Part(gpu_parts.study, 90),
    "smollm2": Part(gpu_parts.smollm2, 200),
}
ALWAYS = tuple(name for name in PARTS if name != "smollm2")  # which needs folders


@dataclass
class Result:
    """All that has been found, and where it is written.

    Attributes:
        folder: of gpu.json and gpu.md.
        settings: how much was measured.
        began: when, on the clock of `time.perf_counter`.
        found: by part.
        status: of each part: `done`, `failed`, or `skipped: no time left`.
        seconds: of each part.
    """

    folder: Path
    settings: Settings
    began: float
    found: dict[str, Found] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self) -> None:
        """Write both files anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gpu.json").write_text(json.dumps(_strict(self.contents()), indent=1) + "\n", encoding="utf-8")
        (self.folder / "gpu.md").write_text(page(self), encoding="utf-8")

    @property
    def total(self) -> float:
        """Seconds until now."""
        return time.perf_counter() - self.began

    def contents(self) -> dict[str, object]:
        """Return the contents of gpu.json."""
        parts = {
            name: {
                "status": status,
                "seconds": round(self.seconds.get(name, 0.0), 1),
                "facts": self.found[name].facts,
                "tables": self.found[name].tables,
                "checks": self.found[name].checks,
                "targets": self.found[name].targets,
                "errors": self.found[name].errors,
            }
            for name, status in self.status.items()
        }
        about = {"measured_on_a_gpu": GPU, "device": gpu_parts.device_name(), "tiny": self.settings.tiny}
        return about | {"seconds": round(self.total, 1), "parts": parts}

    @property
    def has_failed(self) -> bool:
        """Whether a part failed or a check does not hold."""
        return "failed" in self.status.values() or not all(
            holds for found in self.found.values() for holds in found.checks.values()
        )


def _strict(value: Any) -> Any:
    """Write numbers that JSON does not have as text."""
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_strict(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def measure(names: Sequence[str], settings: Settings, result: Result) -> None:
    """Run the parts in order; one that fails is noted, and the rest goes on."""
    for number, name in enumerate(names):
        found = Found(on_change=result.save)
        result.found[name] = found
        needs, later = PARTS[name].needs, sum(PARTS[after].needs for after in names[number + 1 :])
        if settings.left < (0 if settings.tiny else needs):
            result.status[name] = "skipped: no time left"
        else:
            print(f"{name}: after {result.total:.0f} s", file=sys.stderr)
            result.status[name] = "running"
            began = time.perf_counter()
            _run(name, replace(settings, later=0.0 if settings.tiny else later, before=result.found), found)
            result.seconds[name] = time.perf_counter() - began
            result.status[name] = "failed" if found.errors else "done"
        result.save()


def _run(name: str, settings: Settings, found: Found) -> None:
    try:
        PARTS[name].run(settings, found)
    except Exception as error:
        traceback.print_exc()
        found.errors.append(gpu_parts.described(error))


LABELS = {
    "allocated_gb": "tensors, GB",
    "reserved_gb": "held by torch, GB",
    "memory_gb": "memory, GB",
    "peak_gb": "peak, GB",
    "cap_gb": "cap, GB",
    "ms_fresh": "ms, new shapes",
    "ms_seen": "ms, shapes seen before",
    "ms_a_token": "ms a token",
    "gap_to_fp32": "gap to fp32",
    "loss_gap": "gap of losses",
    "grad_norm_gap": "gap of gradient norms",
    "largest_gap_nats": "largest gap, nats",
    "mean_gap_nats": "mean gap, nats",
    "ms_a_pair": "ms a pair",
    "reference_ms_a_pair": "reference pass, ms a pair",
    f"time_in_a_grid_of_{gpu_parts.GRID}_computed": f"computed: time a trial in a grid of {gpu_parts.GRID}",
    "pairs_per_s": "pairs/s",
    "tokens_per_s": "tokens/s",
    "build_s": "to build the trainer, s",
    "made_s": "to make the model, s",
    "share_of_the_rate": "of the measured rate",
    "matmul_tflops": "matrix products, TFLOP/s",
    "trls_hash_s": "TRL's hash of the model",
    "check_of_the_lent_base_s": "the harness's check of the lent base",
    "few_pairs_as_it_is": "fewer pairs for the harness's own attention",
    "tokens_of_the_micro_batches": "tokens of the micro-batches",
    "asked": "micro-batch asked for",
    "micro_batch_size": "trained with",
    "plan": "batch plan",
}
REMARKS = ("error", "skipped", "message")  # one column for all of them, where there are any


def page(result: Result) -> str:
    """Return the page: the machine, what has to hold, then what each part found."""
    where = f"on one {gpu_parts.device_name()}" if GPU else f"on a CPU: {NOT_MEASURED}"
    parts = [f"# The harness {where}", _about(result), _checks(result), _targets(result)]
    for name, found in result.found.items():
        seconds = f"{result.seconds.get(name, 0.0):.0f} s"
        status = "" if result.status[name] == "done" else f", {result.status[name]}"
        parts.append(f"## {name.capitalize()} ({seconds}{status})")
        parts.append(" ".join((PARTS[name].run.__doc__ or "").split()))
        parts += [f"**{_shown(error)}**" for error in found.errors]
        known = {label(key): _shown(value) for key, value in found.facts.items() if value is not None}
        parts.append("\n".join(f"- {name}: {value}" for name, value in known.items()))
        for title, rows in found.tables.items():
            parts.append(_table(title, rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(result: Result) -> str:
    tiny = "**Small shapes: this tests the script; its figures mean nothing.** " if result.settings.tiny else ""
    return (
        f"{tiny}`python benchmarks/gpu.py`, {result.total:.0f} s in all, torch {torch.__version__}. "
        "gpu.json holds every number, each step's loss and gradient norm with them."
    )


def _checks(result: Result) -> str:
    """Return the table of what has to hold before a figure below is believed."""
    rows = [(name, holds) for found in result.found.values() for name, holds in found.checks.items()]
    lines = ["| before a figure is believed | |", "|---|---|"]
    lines += [f"| {name} | {'holds' if holds else '**does not hold**'} |" for name, holds in rows]
    lines += [
        f"| part {name} | **{status}** |" for name, status in result.status.items() if status not in ("done", "running")
    ]
    return "\n".join(lines) if len(lines) > 2 else ""


def _targets(result: Result) -> str:
    """Return the table of targets: what was measured beside what is aimed at; a missed one is no failure."""
    rows = [(name, row) for found in result.found.values() for name, row in found.targets.items()]
    lines = ["| target | measured | aim | |", "|---|---|---|---|"]
    for name, row in rows:
        verdict = "reached" if row["reached"] else "**missed**"
        lines.append(f"| {name} | {_shown(row['measured'])} | {row['target']} | {verdict} |")
    return "\n".join(lines) if rows else ""


def _table(title: str, rows: Mapping[str, Row]) -> str:
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    columns = [key for key in keys if key not in (*REMARKS, *STEPS)]
    columns = [key for key in columns if any(row.get(key) not in (None, "") for row in rows.values())]
    has_remarks = any(row.get(key) for row in rows.values() for key in REMARKS)
    heads = [title, *map(label, columns), *(["remark"] if has_remarks else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        cells = [name, *(_shown(row.get(key)) for key in columns)]
        if has_remarks:
            cells.append("; ".join(_shown(row[key]) for key in REMARKS if row.get(key)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def label(key: str) -> str:
    """Return how the page calls a fact or a column."""
    return LABELS.get(key) or key.removesuffix("_s").replace("_", " ") + (", s" if key.endswith("_s") else "")


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).replace("|", "/").split())


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU too: to test this script")
    parser.add_argument("--parts", help=f"which of {', '.join(PARTS)}, separated by commas (default: all but the last)")
    parser.add_argument("--smollm2", type=Path, help="a checkpoint's folder: only a study of it, with --pairs")
    parser.add_argument("--pairs", type=Path, help="a folder with train.jsonl, dev.jsonl and golden.jsonl")
    parser.add_argument("--budget", type=float, default=470.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of 8 pairs in each run of the large model")
    parser.add_argument("--shape", default="8b", choices=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--cap", type=float, default=4.0, help="GB of the trial that must run out of memory")
    options = parser.parse_args(arguments)
    has_folders = options.smollm2 is not None and options.pairs is not None
    default = ("machine", "smollm2") if has_folders else ALWAYS
    options.parts = list(default) if options.parts is None else options.parts.split(",")
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"--parts: there is no part {', '.join(map(repr, unknown))}; there are {', '.join(PARTS)}")
    if "smollm2" in options.parts or options.smollm2 is not None or options.pairs is not None:
        if not has_folders:
            parser.error("part smollm2: give both --smollm2 FOLDER and --pairs FOLDER")
        wanted = [options.smollm2 / "config.json"]
        wanted += [options.pairs / f"{split}.jsonl" for split in ("train", "dev", "golden")]
        if missing := [path for path in wanted if not path.is_file()]:
            parser.error(f"part smollm2: there is no {missing[0]}")
    if options.steps < 1:
        parser.error("--steps: at least 1")
    if not (GPU or options.tiny):
        parser.error("torch sees no GPU here; --tiny tests the script on a CPU")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = _options(arguments)
    if options.tiny:
        torch.set_num_threads(1)  # small shapes are fastest so
    # The imports of this process are a part of the budget: on a fresh machine they take most of a minute.
    began = time.perf_counter() - IMPORT_SECONDS
    settings = Settings(
        options.tiny,
        options.steps,
        options.shape,
        options.cap,
        began + options.budget,
        folder=options.out.resolve(),
        smollm2=options.smollm2,
        pairs=options.pairs,
    )
    result = Result(options.out, settings, began)
    measure(options.parts, settings, result)
    print((options.out / "gpu.md").read_text(encoding="utf-8"))
    return int(result.has_failed)


if __name__ == "__main__":
    gc.freeze()  # what is loaded by now stays: looking through it takes half a second each time
    sys.exit(main())
