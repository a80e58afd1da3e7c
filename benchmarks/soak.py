"""A soak: one sweep of more than 500 trials in one process; do its memory and its seconds a trial stay flat?

Command: `python benchmarks/soak.py [CONFIGS]`: 124 configs an arm are 506 trials, half an hour on one core. Writes
soak.json, soak.svg and soak.md beside this file. `python benchmarks/soak.py --page` draws them anew from soak.json.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import psutil
from matplotlib.figure import Figure

CONFIGS = 124  # an arm; with two tuning seeds 496 trials, and 5 an arm that decide
WARM_UP = 50  # trials whose memory and seconds are no part of a slope
WINDOW = 100  # trials at the end whose median is held against as many after the warm-up
RESULT = Path(__file__).with_suffix(".json")

# The embedded study, shrunk until a trial takes about two seconds (as in tests/conftest.py). W&B stays on, offline.
SMALL = [
    "data.max_train_pairs=16",
    "data.max_dev_prompts=12",
    "data.max_golden_prompts=24",
    "train.epochs=1",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "generate.max_new_tokens=12",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

# Milliseconds from a reader's act to the page's new layout, the slowest of some; null where a page has no such thing.
SEARCH = """() => Math.max(...["a", "the word", "zzz", ""].map((words) => {
    const search = document.querySelector("input[type=search]"), start = performance.now();
    search.value = words;
    search.dispatchEvent(new Event("input"));
    document.body.offsetHeight;
    return performance.now() - start;
}))"""
SORT = """() => {
    const buttons = [...document.querySelectorAll("th button")];
    return buttons.length ? Math.max(...buttons.map((button) => {
        const start = performance.now();
        button.click();
        document.body.offsetHeight;
        return performance.now() - start;
    })) : null;
}"""


def harness(module: str, *arguments: str) -> list[str]:
    """Return the command line of one of the harness's modules."""
    return [sys.executable, "-m", f"harness.{module}", *arguments]


def sweep_command(configs: int, results: Path) -> list[str]:
    """Return the sweep's command line: a grid of betas for each arm."""
    dpo = ",".join(f"{0.01 + 0.004 * n:.3f}" for n in range(configs))
    simpo = ",".join(f"{1 + 0.05 * n:.2f}" for n in range(configs))
    grid = [f"arms.dpo.beta={dpo}", f"arms.simpo.beta={simpo}"]
    return harness("sweep", "+method=simpo,dpo", *SMALL, *grid, f"results_dir={results}")


class Soak:
    """What is seen of a running sweep: once a second its memory, and when each trial ended."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.ends: dict[str, float] = {}
        self.samples: list[dict[str, float]] = []

    def watch(self, command: Sequence[str]) -> float:
        """Run the sweep to its end, and return its seconds."""
        start = time.time()
        with subprocess.Popen(command, env=ENVIRONMENT) as running:
            process = psutil.Process(running.pid)
            while running.poll() is None:
                self._see_ends(start)
                self._sample(process, start)
                time.sleep(1)
        if running.returncode:
            sys.exit(f"the sweep ended with {running.returncode}")
        return round(time.time() - start, 1)

    def _see_ends(self, start: float) -> None:
        for path in self.results.glob("*/trials/*/manifest.json"):
            if path.parent.name not in self.ends:  # what has ended is not read again: the watcher's own work stays flat
                ended = path.stat().st_mtime - start
                if json.loads(path.read_text(encoding="utf-8"))["status"] in ("complete", "diverged"):
                    self.ends[path.parent.name] = round(ended, 3)

    def _sample(self, process: psutil.Process, start: float) -> None:
        try:
            times, memory = process.cpu_times(), process.memory_info().rss
            children = sum(child.memory_info().rss for child in process.children(recursive=True))
        except psutil.NoSuchProcess:  # a child, or the sweep itself, has just ended
            return
        sample = {"at": time.time() - start, "cpu_seconds": times.user + times.system}
        sample |= {"memory_mb": memory / 1e6, "children_mb": children / 1e6}
        scheduled = Path(f"/proc/{process.pid}/schedstat")  # Linux: how long the main thread ran, and waited for a core
        if scheduled.exists():
            sample["waited_seconds"] = int(scheduled.read_text(encoding="utf-8").split()[1]) / 1e9
        self.samples.append({key: round(value, 2) for key, value in sample.items()} | {"trials": len(self.ends)})


def seconds_of(command: Sequence[str]) -> float:
    """Return the seconds that a command takes, start of the process included."""
    start = time.perf_counter()
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return round(time.perf_counter() - start, 1)


def opened(path: Path) -> dict[str, Any]:
    """Return a page's size, and its milliseconds in headless Chromium where that is installed."""
    found: dict[str, Any] = {"megabytes": round(path.stat().st_size / 1e6, 2)}
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=FLAGS).new_page()
        page.goto(f"file://{path.resolve()}")
        found["elements"] = page.evaluate("document.querySelectorAll('*').length")
        found["load_ms"] = page.evaluate("performance.getEntriesByType('navigation')[0].duration")
        return found | {"search_ms": page.evaluate(SEARCH), "sort_ms": page.evaluate(SORT)}


def measure(configs: int, results: Path) -> dict[str, Any]:
    """Run the sweep and all that comes after it; return the contents of soak.json."""
    soak, command = Soak(results), sweep_command(configs, results)
    seconds = soak.watch(command)
    study = next(results.glob("*/study.yaml")).parent
    after = {
        "report": seconds_of(harness("report", str(study))),
        "decide": seconds_of(harness("decide", str(study))),
        "dashboard": seconds_of(harness("dashboard", str(results))),
        "the same sweep again, nothing to do": seconds_of(command),
    }
    names = ("torch", "transformers", "trl", "peft", "wandb", "pandas", "matplotlib")
    manifest = json.loads(next(study.glob("trials/*/manifest.json")).read_text(encoding="utf-8"))
    return {
        "machine": f"{manifest['hardware']['cpu']}, {manifest['hardware']['cores']} cores",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "configs": configs,
        "trials": len(soak.ends),
        "sweep_seconds": seconds,
        "commands": after,
        "pages": {"report.html": opened(study / "report.html"), "dashboard.html": opened(results / "dashboard.html")},
        "ends": sorted(soak.ends.values()),
        "samples": soak.samples,
        "remarks": [],  # written by hand: what this run shows; `--page` puts them into the page
    }


class Curves:
    """Memory and seconds over the number of the trial, and how flat they are."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        ends = np.array(result["ends"])
        at, memory, children, cpu = (
            np.array([sample[key] for sample in result["samples"]])
            for key in ("at", "memory_mb", "children_mb", "cpu_seconds")
        )
        self.number = np.arange(2, len(ends) + 1)  # a trial's seconds begin at the end of the one before
        self.seconds = np.diff(ends)
        self.cpu = np.diff(np.interp(ends, at, cpu))
        waited = [sample.get("waited_seconds", np.nan) for sample in result["samples"]]
        self.unhindered = self.seconds - np.diff(np.interp(ends, at, waited))
        inside = (at >= ends[0]) & (at <= ends[-1])
        self.sampled = np.searchsorted(ends, at[inside], side="right")
        self.memory, self.children = memory[inside], children[inside]

    def slope(self, numbers: np.ndarray, values: np.ndarray) -> float:
        """Return what a line by least squares rises in 100 trials, those of the warm-up left out."""
        kept = numbers >= WARM_UP
        return float(100 * np.polyfit(numbers[kept], values[kept], 1)[0])

    def ratio(self, values: np.ndarray) -> float:
        """Return the median of the last trials over that of the first ones after the warm-up."""
        first = values[(self.number > WARM_UP) & (self.number <= WARM_UP + WINDOW)]
        return float(np.median(values[-WINDOW:]) / np.median(first))

    def row(self, name: str, values: np.ndarray) -> str:
        """Return a table's row of seconds a trial: medians, slope in percent of the median, ratio."""
        first = np.median(values[(self.number > WARM_UP) & (self.number <= WARM_UP + WINDOW)])
        slope = self.slope(self.number, values) / np.median(values[self.number >= WARM_UP])
        return (
            f"| {name} | {first:.2f} s | {np.median(values[-WINDOW:]):.2f} s | {100 * slope:+.1f}% "
            f"| {self.ratio(values):.2f} |"
        )

    def memory_row(self, name: str, values: np.ndarray) -> str:
        """Return a table's row of resident memory."""
        last = self.sampled[-1]
        first = np.median(values[(self.sampled > WARM_UP) & (self.sampled <= WARM_UP + WINDOW)])
        end = np.median(values[self.sampled > last - WINDOW])
        slope = self.slope(self.sampled, values)
        return f"| {name} | {first:.0f} MB | {end:.0f} MB | {slope:+.1f} MB | {end / first:.2f} |"


def draw(curves: Curves, path: Path) -> None:
    """Draw memory and seconds a trial over the number of the trial; the same file for the same numbers."""
    with mpl.rc_context({"svg.hashsalt": "soak", "svg.fonttype": "none", "font.size": 9, "axes.grid": True}):
        figure = Figure(figsize=(7, 5), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        above.plot(curves.sampled, curves.memory, label="the sweep")
        above.plot(curves.sampled, curves.children, label="W&B's processes")
        above.set(ylabel="resident memory, MB", ylim=(0, None))
        below.plot(curves.number, curves.seconds, ".", markersize=3, alpha=0.4, label="by the clock")
        below.plot(curves.number, curves.cpu, ".", markersize=3, alpha=0.4, label="of the processor")
        top = 1.5 * float(np.quantile(curves.seconds, 0.98))
        below.set(ylabel="seconds a trial", xlabel="number of the trial", ylim=(0, top))
        for axes, place in ((above, "center right"), (below, "upper left")):
            axes.legend(frameon=False, loc=place)
        figure.savefig(path, metadata={"Date": None})


_UNHINDERED = "a trial, by the clock less what it waited for a core"


def page(result: Mapping[str, Any], curves: Curves) -> str:
    """Return the page for the contents of soak.json."""
    versions = ", ".join(f"{name} {found}" for name, found in result["versions"].items())
    parts = [
        "# A soak: one sweep of many trials",
        f"`python benchmarks/soak.py`: {result['trials']} trials of the embedded model in one process "
        f"(`+method=simpo,dpo`, {result['configs']} betas an arm with two tuning seeds, five deciding seeds an arm), "
        f"W&B on, offline. {result['machine']}, one thread; {versions}. Other jobs ran on the machine's "
        "cores, so that seconds by the clock scatter; the processor's seconds are those of the sweep's own process.",
        "\n".join(
            [
                f"| what | trials {WARM_UP + 1} to {WARM_UP + WINDOW} | last {WINDOW} | slope in 100 trials | ratio |",
                "|---|---|---|---|---|",
                curves.memory_row("memory of the sweep", curves.memory),
                curves.memory_row("memory of W&B's processes", curves.children),
                curves.row("a trial, by the clock", curves.seconds),
                curves.row("a trial, of the processor", curves.cpu),
                *([] if np.isnan(curves.unhindered).any() else [curves.row(_UNHINDERED, curves.unhindered)]),
            ]
        ),
        f"Medians; slopes by least squares over the trials from {WARM_UP} on, those of seconds in percent of their "
        "median.",
        "![Memory and seconds a trial over the number of the trial](soak.svg)",
        "\n".join(
            [
                "| afterwards | seconds |\n|---|---|",
                f"| the sweep as a whole | {result['sweep_seconds']:.0f} |",
                f"| of it: up to the end of the first trial | {result['ends'][0]:.1f} |",
                f"| of it: after the last trial | {result['sweep_seconds'] - result['ends'][-1]:.1f} |",
                *(f"| {name} | {seconds:.1f} |" for name, seconds in result["commands"].items()),
            ]
        ),
        "\n".join(
            [
                "| page | MB | elements | load, ms | slowest search, ms | slowest sort, ms |",
                "|---|---|---|---|---|---|",
                *(_page_row(name, found) for name, found in result["pages"].items()),
            ]
        ),
        "" if "load_ms" in result["pages"]["report.html"] else "No Chromium was on the machine: no page was opened.",
        "\n".join(["## What it means", "", *(f"- {remark}" for remark in result["remarks"])]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _page_row(name: str, found: Mapping[str, Any]) -> str:
    numbers = [found.get(key) for key in ("load_ms", "search_ms", "sort_ms")]
    shown = " | ".join("–" if number is None else f"{number:.0f}" for number in numbers)
    return f"| {name} | {found['megabytes']} | {found.get('elements', '–')} | {shown} |"


def main() -> None:
    """Run the command."""
    arguments = sys.argv[1:]
    if arguments != ["--page"]:
        with tempfile.TemporaryDirectory() as scratch:
            result = measure(int(arguments[0]) if arguments else CONFIGS, Path(scratch) / "results")
        RESULT.write_text(json.dumps(result) + "\n", encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    curves = Curves(result)
    draw(curves, RESULT.with_suffix(".svg"))
    RESULT.with_suffix(".md").write_text(page(result, curves), encoding="utf-8")


if __name__ == "__main__":
    main()
