"""What the sweep prints: the progress, and at the end a compact table and the verdict."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from harness.config.schema import RunConfig
from harness.decide.lines import table_lines, verdict_line, warning_lines
from harness.study.outcome import Outcome
from harness.study.text import redact, visible
from harness.sweep.protocol import StudyResult
from harness.sweep.registration import is_complete, trial_dir

POLL_SECONDS = 1.0


@contextlib.contextmanager
def show_progress(trials: Sequence[RunConfig]) -> Iterator[None]:
    """Show a bar of complete trials, read from their folders, whichever process or machine runs them."""
    done = threading.Event()
    with tqdm(total=len(trials), desc="trials", delay=2, unit="trial", leave=False) as bar:

        def watch() -> None:
            left = [(trial, trial_dir(trial) / "manifest.json") for trial in trials]
            while not done.wait(POLL_SECONDS):
                # Of hundreds of trials only those are looked into that have begun and were not complete before.
                left = [(t, path) for t, path in left if not (path.exists() and is_complete(t, tuple(t.evaluate)))]
                complete = len(trials) - len(left)
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
        print("\n".join(["", *table_lines(verdict), *warning_lines(verdict)]))
    for outcome in failed:
        print(f"failed: {_name(outcome)}: {visible(redact(outcome.message))}")
    for problem in result.problems:
        print(f"scorer failed: {visible(redact(problem))}")
    if failed:
        print(f"{len(failed)} of {len(result.outcomes)} trials failed; the rest is kept: {_again(failed)}")
    stages = ", ".join(f"{stage} {count}" for stage, count in result.stages.items() if count)
    print(f"trials run now: {result.launched}, complete before: {len(result.outcomes) - result.launched} ({stages})")
    if verdict:
        print(f"\n{verdict_line(verdict)}")
    else:
        print(f"\nno verdict: {redact(result.undecided)}")
    if result.report:
        print(f"report: {result.report}")
    if result.unreported:
        print(f"no report: {visible(result.unreported)}")
    is_missing = bool(result.unreported) or (result.is_comparison and not verdict)
    return 1 if failed or result.problems or is_missing else 0


def _again(failed: Sequence[Outcome]) -> str:
    """Say which command runs failed trials again."""
    standing = sum(not outcome.retries for outcome in failed)
    if not standing:
        return "mend the cause, and the same command runs them again"
    which = "them" if standing == len(failed) else f"all of them, and without it {len(failed) - standing},"
    return f"the same command with retry_failed=true runs {which} again"


def _name(outcome: Outcome) -> str:
    return f"{outcome.arm} {outcome.config} seed {outcome.seed} ({outcome.trial_id})"
