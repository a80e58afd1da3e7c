"""What the sweep prints: the plan, the progress, and at the end a compact table and the verdict."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from tqdm import tqdm

from harness.config import RunConfig, config_label
from harness.inputs import identify, num_steps, splits_of
from harness.protocol import StudyResult
from harness.trial import is_complete, read_manifest, study_dir

POLL_SECONDS = 1.0


def print_plan(trials: Sequence[RunConfig], warnings: Sequence[str]) -> None:
    """Print the trials of a study, their number and their size; nothing is run."""
    print(f"study {study_dir(trials[0])}: {len(trials)} trials and the SFT base")
    print(_size_of_a_trial(trials[0]))
    print(f"{'trial':14}{'arm':10}{'seed':>5}  {'state':10}config")
    for trial in trials:
        state = "complete" if is_complete(trial, tuple(trial.evaluate)) else "to run"
        print(f"{identify(trial):14}{trial.method.name:10}{trial.seed:5}  {state:10}{config_label(trial)}")
    for warning in warnings:
        print(f"warning: {warning}")


def _size_of_a_trial(trial: RunConfig) -> str:
    """Say what one trial works through, and how long those took that are finished already."""
    splits = splits_of(trial)
    pairs = len(splits.train)
    steps = num_steps(trial, pairs)
    answers = {"dev": len(splits.dev_prompts), "golden": len(splits.golden_prompts)}
    text = f"each trial: {pairs} pairs x {trial.train.epochs} epochs = {steps} steps of {trial.train.batch_size}; "
    text += f"answers to {answers['dev']} dev and {answers['golden']} golden prompts"
    found = [read_manifest(path.parent) for path in study_dir(trial).glob("trials/*/manifest.json")]
    seconds = [sum(manifest["seconds"].values()) for manifest in found if manifest.get("status") == "complete"]
    return text + (f"; finished ones took {fmean(seconds):.0f} s on average" if seconds else "")


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
        _print_table(verdict)
        for warning in verdict["warnings"]:
            print(f"warning: {warning}")
    for outcome in failed:
        print(f"failed: {outcome.arm} {outcome.config} seed {outcome.seed} ({outcome.trial_id}): {outcome.message}")
    if failed:
        print(
            f"{len(failed)} of {len(result.outcomes)} trials failed; the rest is kept: the same command runs them again"
        )
    print(f"trials run now: {result.launched}, complete before: {len(result.outcomes) - result.launched}")
    if verdict:
        print(f"\nverdict: {verdict['verdict']} ({verdict['level']} level). {verdict['reason']}")
    else:
        print(f"\nno verdict: {result.undecided}")
    if result.report:
        print(f"report: {result.report}")
    return 1 if failed or (result.is_comparison and not verdict) else 0


def _print_table(verdict: dict[str, Any]) -> None:
    base = _base_mean(verdict)
    print(f"\n{verdict['metric']} on golden ({verdict['n_prompts']} prompts)")
    if base is not None:
        print(f"  {'SFT base':24}{100 * base:6.1f}")
    for arm, mean in verdict["means"].items():
        runs = [100 * value for value in verdict["run_means"][arm].values()]
        spread = f"  seeds {min(runs):.1f} to {max(runs):.1f}" if len(runs) > 1 else ""
        print(f"  {arm:24}{100 * mean:6.1f}{spread}")
    low, high = verdict["ci95"]
    points = f"{100 * verdict['difference']:+.1f} points, 95% interval {100 * low:+.1f} to {100 * high:+.1f}"
    print(f"  {' - '.join(verdict['arms']):24}{points}, margin {100 * verdict['margin']:.1f}")


def _base_mean(verdict: dict[str, Any]) -> float | None:
    value = verdict.get("base_mean")
    return float(value) if value is not None else None
