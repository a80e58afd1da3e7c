"""The benchmark's page: the contents of cost.json -> Markdown, ratios and their ranges first, losses side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NotRequired, TypedDict

from harness.bench.runs import Run

# Per row the harness's run, TRL's run, and the targets for the ratio of seconds: of whole runs on a CPU, of pairs in
# steady state with their reference on a GPU.
TARGETS: tuple[tuple[str, str, float | None, float | None], ...] = (
    ("dpo", "dpo", 1 / 3, 1 / 3),
    ("dpo", "dpo, precomputed", 0.45, 0.4),
    ("dpo", "dpo, Liger", None, None),
    ("simpo", "simpo", 0.6, 0.4),
    ("simpo", "simpo, Liger", None, None),
    ("grid", "grid", 1 / 3, None),
)
MEMORY_TARGETS = {"cpu": 0.65, "gpu": 0.7}
RATE_TARGET = 0.45  # of a GPU's measured rate, in the training loop
GRID = 4  # settings of each arm
LOOP_TARGET = 1.5
OVERHEAD_TARGET = 0.05
_WORK = ("train", "reference", "import")  # stages that are no overhead around a trial


class Result(TypedDict):
    """The contents of cost.json; files of earlier versions have no `steady_pair_flops`."""

    model: str
    num_pairs: int
    tokens: int
    padded_tokens: int
    matmul_flops_per_second: list[float]
    needed_flops: float
    needed_reference_flops: float
    steady_pair_flops: NotRequired[float]
    runs: list[Run]
    versions: dict[str, str]
    commit: str | None
    hardware: Mapping[str, object]


def page(result: Result) -> str:
    """Return the page for the contents of cost.json."""
    runs = result["runs"]
    on_gpu = result["hardware"]["device"] != "cpu"
    parts = [
        "# What a paired sweep costs",
        f"`python -m harness.bench` over {result['num_pairs']} pairs of {result['model']}: {result['tokens']:,} tokens "
        f"with each prompt once, {result['padded_tokens']:,} with it before both answers. "
        f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores, device {result['hardware']['device']}; "
        + ", ".join(f"{name} {result['versions'][name]}" for name in ("python", "torch", "trl", "transformers", "peft"))
        + ".",
        _ratio_table(runs, on_gpu=on_gpu),
        _steady_table(result, on_gpu=on_gpu),
        _computed_grid(runs),
        _loop_table(result),
        _overhead_table(runs),
        _lever_table(runs),
        _layout_table(runs),
        _growth_tables(runs),
        _stage_table(runs),
        _loss_table(runs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _runs_of(runs: Sequence[Run], side: str, name: str) -> list[Run]:
    return [run for run in runs if run["side"] == side and run["name"] == name]


def _ratio_table(runs: Sequence[Run], *, on_gpu: bool) -> str:
    """Compare whole runs, start and end of the process included."""
    lines = [
        "| work | TRL's script, s | harness, s | ratio (range) | target | memory ratio | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for ours, theirs, target, _ in TARGETS:
        a, b = _runs_of(runs, "harness", ours), _runs_of(runs, "stock", theirs)
        if not a or not b:
            continue
        ratios = [x["wall"] / y["wall"] for x in a for y in b]
        memory = median(x["peak_memory_bytes"] for x in a) / median(y["peak_memory_bytes"] for y in b)
        walls = [_range_text([run["wall"] for run in side]) for side in (b, a)]
        lines.append(
            f"| {ours} against {theirs} | {walls[0]} | {walls[1]} | {_ratio_text(ratios)} "
            f"| {_target_text(None if on_gpu else target)} | {memory:.2f} "
            f"| {MEMORY_TARGETS['gpu' if on_gpu else 'cpu']} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def _ratio_text(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _target_text(target: float | None) -> str:
    return "–" if target is None else f"{target:.2f}"


def _steady_table(result: Result, *, on_gpu: bool) -> str:
    """Compare seconds a pair in the training loop, without its first steps, with a reference pass where there is one.

    The share of the rate is that of the loop alone: its needed products over the rate measured before the run.
    """
    runs, pairs = result["runs"], result["num_pairs"]
    needed = result.get("steady_pair_flops")
    if needed is None:
        return ""
    lines = [
        "In steady state: seconds a pair in the loop without its first steps, plus the reference pass. The share of "
        "the measured rate counts needed products only: no padding, no recomputation, no reference pass.",
        "",
        "| work | TRL's script, ms | harness, ms | ratio (range) | target | TRL's share | harness's share | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ours, theirs, _, target in TARGETS:
        sides = [_steady(_runs_of(runs, "harness", ours), pairs), _steady(_runs_of(runs, "stock", theirs), pairs)]
        if ours == "grid" or not all(sides):
            continue
        named = (("stock", theirs), ("harness", ours))
        shares = [_share_text(result, _runs_of(runs, side, name), needed) for side, name in named]
        ratios = [x / y for x in sides[0] for y in sides[1]]
        texts = [_range_text([1e3 * seconds for seconds in side]) for side in reversed(sides)]
        lines.append(
            f"| {ours} against {theirs} | {texts[0]} | {texts[1]} | {_ratio_text(ratios)} "
            f"| {_target_text(target if on_gpu else None)} | {shares[0]} | {shares[1]} "
            f"| {f'{RATE_TARGET:.0%}' if on_gpu else '–'} |"
        )
    return "\n".join(lines) if len(lines) > 4 else ""


def _share_text(result: Result, runs: Sequence[Run], needed: float) -> str:
    """Return what a pair's needed products are of the rate measured before each run, in the loop's seconds a pair."""
    shares = [needed / run["pair_seconds"] / _rate_of(result, run) for run in runs if "pair_seconds" in run]
    return f"{median(shares):.0%}"


def _steady(runs: Sequence[Run], pairs: int) -> list[float]:
    """Return each run's seconds a pair: in the loop without its first steps, and in a reference pass of its own."""
    return [run["pair_seconds"] + run["seconds"].get("reference", 0.0) / pairs for run in runs if "pair_seconds" in run]


def _rate_of(result: Result, run: Run) -> float:
    """Return the rate measured before a run."""
    return next(
        rate for each, rate in zip(result["runs"], result["matmul_flops_per_second"], strict=False) if each is run
    )


def _computed_grid(runs: Sequence[Run]) -> str:
    """Compute a grid's seconds from the parts of single runs, where none was run."""
    parts = {(side, arm): _runs_of(runs, side, arm) for side in ("stock", "harness") for arm in ("dpo", "simpo")}
    if not all(parts.values()) or (_runs_of(runs, "stock", "grid") and _runs_of(runs, "harness", "grid")):
        return ""

    def once(side: str, arm: str, *, without: Sequence[str] = ()) -> float:
        return median(run["wall"] - sum(run["seconds"].get(name, 0.0) for name in without) for run in parts[side, arm])

    theirs = GRID * (once("stock", "dpo") + once("stock", "simpo"))
    shared = ("import", "reference")  # once for a grid
    ours = GRID * (once("harness", "dpo", without=shared) + once("harness", "simpo", without=shared))
    ours += median(sum(run["seconds"].get(name, 0.0) for name in shared) for run in parts["harness", "dpo"])
    return (
        f"**Computed** from the runs above, not run: a grid of {GRID} DPO and {GRID} SimPO settings takes "
        f"{theirs:,.0f} s by TRL's scripts, one after the other, and {ours:,.0f} s by the harness in one process "
        f"with one reference pass: a ratio of {ours / theirs:.2f}."
    )


def _range_text(values: Sequence[float], form: str = ".1f") -> str:
    return f"{values[0]:{form}}" if len(values) == 1 else f"{min(values):{form}} to {max(values):{form}}"


def _loop_table(result: Result) -> str:
    """Compare the training loop with the needed matrix products at the measured rate."""
    rates = dict(zip(map(id, result["runs"]), result["matmul_flops_per_second"], strict=False))
    shown = _range_text([value / 1e9 for value in result["matmul_flops_per_second"]], ".0f")
    lines = [
        f"Needed: {result['needed_flops'] / 1e12:.2f} TFLOP for one pass; this machine multiplies matrices at "
        f"{shown} GFLOP/s (it shares its processor; measured before each run, which is compared with its own rate).",
        "",
        "| training loop | seconds | times the least | share of the rate | tokens/s | target |",
        "|---|---|---|---|---|---|",
    ]
    for side, name in (
        ("harness", "dpo"),
        ("harness", "simpo"),
        ("stock", "dpo"),
        ("stock", "dpo, precomputed"),
        ("stock", "simpo"),
    ):
        found = _runs_of(result["runs"], side, name)
        if found:
            target = f"{LOOP_TARGET}" if side == "harness" else ""
            lines.append(_loop_row(f"{side}: {name}", found, "train", result["needed_flops"], rates, result, target))
    passes = _runs_of(result["runs"], "harness", "dpo")
    if passes:
        name, needed = "harness: DPO's reference pass, once for a grid", result["needed_reference_flops"]
        lines.append(_loop_row(name, passes, "reference", needed, rates, result, ""))
    return "\n".join(lines) if len(lines) > 4 else lines[0]


def _loop_row(
    name: str,
    runs: Sequence[Run],
    stage: str,
    needed: float,
    rates: Mapping[int, float],
    result: Result,
    target: str,
) -> str:
    """Return a row: a stage's seconds against its needed products at the rate measured before each run."""
    seconds = [run["seconds"][stage] for run in runs]
    times = [run["seconds"][stage] * rates[id(run)] / needed for run in runs]
    return (
        f"| {name} | {_range_text(seconds)} | {_range_text(times, '.2f')} | {1 / median(times):.0%} "
        f"| {result['tokens'] / median(seconds):,.0f} | {target or '–'} |"
    )


def _overhead_table(runs: Sequence[Run]) -> str:
    """Show a trial's time beside training and reference pass, as a share of the training loop."""
    lines = [
        "Around the training loop: tokens, plan, hashes, manifest, scores, tracking (W&B offline, started once).",
        "",
        f"| trial | seconds around | share of the loop (target under {OVERHEAD_TARGET:.0%}) |",
        "|---|---|---|",
    ]
    for name in ("dpo", "simpo", "grid"):
        found = _runs_of(runs, "harness", name)
        around = [sum(s for stage, s in run["seconds"].items() if stage not in _WORK) for run in found]
        shares = [x / run["seconds"]["train"] * 100 for x, run in zip(around, found, strict=True)]
        if found:
            lines.append(f"| {name} | {_range_text(around)} | {_range_text(shares)}% |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _lever_table(runs: Sequence[Run]) -> str:
    """Compare runs with a lever switched off with the runs of all levers."""
    lines = [
        "The effect of each lever: the same trial with one switched off, and with all that are listed for its arm.",
        "",
        "| trial | loop, s | loop against all levers | reference pass, s | whole run, s | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ("simpo", "dpo"):
        whole = _runs_of(runs, "harness", f"{arm}, all levers on")
        off = [run for run in runs if run["side"] == "harness" and run["name"].startswith(f"{arm}, ")]
        loop = median(run["seconds"]["train"] for run in whole) if whole else 0.0
        for name in dict.fromkeys(run["name"] for run in off if whole):
            found = _runs_of(runs, "harness", name)
            loops = [run["seconds"]["train"] for run in found]
            reference = [run["seconds"].get("reference", 0.0) for run in found]
            lines.append(
                f"| {name} | {_range_text(loops)} | {median(loops) / loop:.2f} | {_range_text(reference)} "
                f"| {_range_text([run['wall'] for run in found])} "
                f"| {_range_text([run['peak_memory_bytes'] / 1e9 for run in found], '.2f')} |"
            )
    return "\n".join(lines) if len(lines) > 4 else ""


def _layout_table(runs: Sequence[Run]) -> str:
    found = [run for run in runs if run["name"].startswith("2 trials, ")]
    lines = ["| layout of two trials (one DPO, one SimPO) | wall, s | memory, GB |", "|---|---|---|"]
    lines += [f"| {run['name'][10:]} | {run['wall']:.1f} | {run['peak_memory_bytes'] / 1e9:.2f} |" for run in found]
    return "\n".join(lines) if found else ""


def _growth_tables(runs: Sequence[Run]) -> str:
    """Show seconds and memory for more trials and for more pairs."""
    tables = []
    for unit, title in (("trials", "trials of 32 pairs in one sweep"), ("pairs", "pairs, one DPO trial")):
        found = [run for run in runs if run["side"] == "harness" and run["name"].split()[1:] == [unit]]
        found.sort(key=lambda run: int(run["name"].split()[0]))
        lines = [
            f"| {title} | wall, s | loops, s | loop per {unit[:-1]}, s | peak memory, GB |",
            "|---|---|---|---|---|",
        ]
        for run in found:
            count, loop = int(run["name"].split()[0]), run["seconds"]["train"]
            memory = run["peak_memory_bytes"] / 1e9
            lines.append(f"| {count} | {run['wall']:.1f} | {loop:.1f} | {loop / count:.2f} | {memory:.2f} |")
        tables += ["\n".join(lines)] if found else []
    return "\n\n".join(tables)


def _stage_table(runs: Sequence[Run]) -> str:
    lines = ["| run | wall, s | peak memory, GB | seconds by stage |", "|---|---|---|---|"]
    for run in runs:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run["seconds"].items() if seconds >= 0.05)
        peak = run["peak_memory_bytes"] / 1e9
        lines.append(f"| {run['side']}: {run['name']} | {run['wall']:.1f} | {peak:.2f} | {stages} |")
    return "\n".join(lines)


def _loss_table(runs: Sequence[Run]) -> str:
    """Show the losses side by side: the scripts tokenise for themselves, so that these are alike and not equal."""
    columns = [
        (side, name)
        for side, name in (("stock", "dpo"), ("harness", "dpo"), ("stock", "simpo"), ("harness", "simpo"))
        if _runs_of(runs, side, name)
    ]
    if not columns:
        return ""
    losses = [_runs_of(runs, side, name)[0]["losses"] for side, name in columns]
    lines = [
        "Losses of the first steps. TRL tokenises for itself (with ChatML its answers end in one more token), so these "
        "are alike and not equal; on the same ids they are equal (`tests/train/test_packed_engine.py`).",
        "",
        "| step | " + " | ".join(f"{side}: {name}" for side, name in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for step in range(min(8, *map(len, losses))):
        lines.append(f"| {step + 1} | " + " | ".join(f"{column[step]:.4f}" for column in losses) + " |")
    return "\n".join(lines)
