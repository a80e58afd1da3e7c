"""Command `python -m harness.score`: score stored answers again, or with more scorers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.score.scorers import SCORERS
from harness.score.study_scores import rescore
from harness.study.errors import UsageError, in_one_sentence
from harness.study.text import redact


@in_one_sentence("harness.score")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.score",
        description="Score the stored completions and log-probs of a study; trains nothing, generates nothing.",
        epilog="Example: python -m harness.score results/my-study judge length_controlled score.judge.model=NAME "
        "score.judge.base_url=http://127.0.0.1:8000/v1",
    )
    parser.add_argument("study", type=Path, help="a folder under results/")
    parser.add_argument(
        "scorers",
        nargs="*",
        metavar="SCORER",
        help=f"out of {', '.join(SCORERS)}, or a Python file of yours; default: the scorers of stored outputs alone; "
        "also score.KEY=VALUE, and trust_study=true to use addresses, variables and files that the study names",
    )
    arguments = parser.parse_args(argv)
    overrides = [text for text in arguments.scorers if "=" in text]
    names = [text for text in arguments.scorers if "=" not in text]
    try:
        path, failed = rescore(arguments.study, names, overrides)
    except UsageError as error:
        print(f"harness.score: {redact(error)}", file=sys.stderr)
        return 2
    for problem in failed:
        print(f"scorer failed: {redact(problem)}", file=sys.stderr)
    print(f"{path}\nNow: python -m harness.decide {arguments.study}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
