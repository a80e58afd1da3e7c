"""What the sweep prints: the progress, and at the end a compact table and the verdict."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from harness.folders import is_complete
from harness.protocol import StudyResult
from harness.schema import RunConfig
from harness.wording import confidence

POLL_SECONDS = 1.0


@contextlib.contextmanager
def show_progress(trials: Sequence[RunConfig]) -> Iterator[None]:
    """Show a bar of complete trials, read from their folders, whichever process or machine runs them."""
    done = threading.Event()
    with tqdm(total=len(trials), desc="trials", delay=2, unit="trial", leave=False) as bar:

        def watch() -> None:
            while not done.wait(POLL_SECONDS):
                complete = sum(is_complete(trial, tuple(trial.evaluate)) for trial in trials)
                if complete > bar.n:  # refreshing for its own sake fills a log with lines
                    bar.update(complete - bar.n)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def print_result(result: StudyResult) -> int:
    """Print the table, the warnings and the verdict; return the exit status: 1 where a trial failed."""
    failed = [outcome for outcome in result.outcomes if outcome.status == "failed"]
    verdict = result.verdict
    if verdict:
        print_table(verdict)
        for warning in verdict["warnings"]:
            print(f"warning: {warning}")
    for outcome in failed:
        print(f"failed: {outcome.arm} {outcome.config} seed {outcome.seed} ({outcome.trial_id}): {outcome.message}")
    for problem in result.problems:
        print(f"scorer failed: {problem}")
    if failed:
        print(
            f"{len(failed)} of {len(result.outcomes)} trials failed; the rest is kept: the same command runs them again"
        )
    stages = ", ".join(f"{stage} {count}" for stage, count in result.stages.items() if count)
    print(f"trials run now: {result.launched}, complete before: {len(result.outcomes) - result.launched} ({stages})")
    if verdict:
        print(f"\nverdict: {verdict['verdict']} ({verdict['level']} level). {verdict['reason']}")
    else:
        print(f"\nno verdict: {result.undecided}")
    if result.report:
        print(f"report: {result.report}")
    return 1 if failed or result.problems or (result.is_comparison and not verdict) else 0


def print_table(verdict: dict[str, Any]) -> None:
    """Print the means of base and arms, and their difference with its interval."""
    base = _base_mean(verdict)
    print(f"\n{verdict['metric']} on golden ({verdict['n_prompts']} prompts)")
    if base is not None:
        print(f"  {'SFT base':24}{100 * base:6.1f}")
    for arm, mean in verdict["means"].items():
        runs = [100 * value for value in verdict["run_means"][arm].values()]
        spread = f"  seeds {min(runs):.1f} to {max(runs):.1f}" if len(runs) > 1 else ""
        print(f"  {arm:24}{100 * mean:6.1f}{spread}")
    low, high = verdict["ci95"]
    level = confidence(verdict["alpha"])
    points = f"{100 * verdict['difference']:+.1f} points, {level} interval {100 * low:+.1f} to {100 * high:+.1f}"
    print(f"  {' - '.join(verdict['arms']):24}{points}, margin {100 * verdict['margin']:.1f}")


def _base_mean(verdict: dict[str, Any]) -> float | None:
    value = verdict.get("base_mean")
    return float(value) if value is not None else None
