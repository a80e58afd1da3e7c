"""Command `python -m harness.sweep`: the main job."""

from __future__ import annotations

import os
import sys

from harness.study.errors import UsageError, in_one_sentence
from harness.study.text import redact
from harness.sweep.app import print_result, run_sweep


@in_one_sentence("harness.sweep")
def main() -> None:
    """Run the command."""
    try:
        results = run_sweep(sys.argv[1:])
    except BrokenPipeError:  # `plan=true | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except UsageError as error:
        print(f"harness.sweep: {redact(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(max((print_result(result) for result in results), default=0))


if __name__ == "__main__":
    main()
