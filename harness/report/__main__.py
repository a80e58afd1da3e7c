"""Command `python -m harness.report`: write the report of a study."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.report.page import render_report
from harness.report.study import read_study
from harness.study.errors import UsageError, in_one_sentence


@in_one_sentence("harness.report")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.report",
        description="Write the report of a study: report.html, report.md and figures/. Trains and scores nothing.",
        epilog="Example: python -m harness.report results/my-study",
    )
    parser.add_argument("study", type=Path, help="a folder under results/ that harness.sweep wrote, finished or not")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="upload the runs to W&B, with a workspace and a report (needs an account)",
    )
    parser.add_argument("--entity", help="account or team of W&B to publish to (default: WANDB_ENTITY, else your own)")
    arguments = parser.parse_args(argv)
    try:
        print(render_report(arguments.study))
        return _publish(arguments.study, arguments.entity) if arguments.publish else 0
    except UsageError as error:
        print(f"harness.report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"harness.report: cannot write the report: {error}; free the disk or the folder, and run again",
            file=sys.stderr,
        )
        return 1


def _publish(study: Path, entity: str | None) -> int:
    from harness.track.publish import NotPublishedError, publish_study

    try:
        for name, url in publish_study(read_study(study), entity).items():
            print(f"{name}: {url}")
    except NotPublishedError as error:
        print(f"harness.report: not published: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
