"""Command `python -m harness.dashboard`: one page over all studies of a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.report.dashboard import render_dashboard, serve
from harness.study.errors import UsageError, in_one_sentence


@in_one_sentence("harness.dashboard")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.dashboard",
        description="One page over all studies of a folder: dashboard.html in it.",
        epilog="Example: python -m harness.dashboard results/ --serve",
    )
    parser.add_argument("results", type=Path, help="the folder that holds the studies")
    parser.add_argument(
        "--serve", action="store_true", help="serve it on loopback, and show a running sweep's progress"
    )
    parser.add_argument("--port", type=int, default=8765, help="for --serve (default 8765; 0 takes a free one)")
    options = parser.parse_args(argv)
    try:
        if options.serve:
            return serve(options.results, options.port)
        print(render_dashboard(options.results))
    except UsageError as error:
        print(f"harness.dashboard: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"harness.dashboard: cannot write the page: {error}; free the disk or the folder", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
