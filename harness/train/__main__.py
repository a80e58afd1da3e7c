"""Command `python -m harness.train`: run one trial."""

from __future__ import annotations

import sys

from harness.study.errors import in_one_sentence
from harness.sweep.app import run_single


@in_one_sentence("harness.train")
def main() -> None:
    """Run one trial from the command line; exit status as in `harness.sweep`."""
    sys.exit(run_single(sys.argv[1:]))


if __name__ == "__main__":
    main()
