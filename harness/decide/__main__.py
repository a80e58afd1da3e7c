"""Command `python -m harness.decide`: a study or a scores file -> the verdict, as JSON on stdout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.decide.beside import choice_caveats, length_caveats_of
from harness.decide.notes import add_notes, source_lines, without_bad_scorers
from harness.decide.recommend import last_lines
from harness.decide.rule import expectation_problem, verdict
from harness.decide.scores_file import read_scores
from harness.decide.study import decide_study
from harness.decide.words import ranking_lines, table_lines, warning_lines
from harness.study.decision import Verdict
from harness.study.errors import UsageError, in_one_sentence
from harness.study.files import locked
from harness.study.registration import ALPHA, CONTRAST, MARGIN, Guard


@in_one_sentence("harness.decide")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: JSON on stdout, a table on stderr.

    Exit status 2 with a message for unusable scores, and 3 where the verdict is not the expected one.
    """
    arms = ",".join(CONTRAST)
    parser = argparse.ArgumentParser(
        prog="python -m harness.decide",
        description="Print the verdict on a study, or on any scores file, as JSON.",
        epilog=f"Example: python -m harness.decide scores.csv --metric checks --margin 0.03 --arms {arms}",
    )
    parser.add_argument("source", type=Path, help="results/STUDY, or a .csv, .parquet or .jsonl file of scores")
    parser.add_argument("--metric", help="the scorer to decide on")
    parser.add_argument("--margin", type=float, help=f"smallest difference that matters (default {MARGIN})")
    parser.add_argument("--alpha", type=float, help=f"error rate (default {ALPHA})")
    parser.add_argument("--arms", help=f"two arms; the difference is first minus second (default {arms})")
    parser.add_argument("--cluster", help="column that holds clusters of prompts (default: cluster, where it exists)")
    parser.add_argument("--guard", action="append", type=_guard_option, default=[], metavar="METRIC:MARGIN")
    parser.add_argument("--n-prompts", type=int, help="prompts behind each score, where a run has one score")
    parser.add_argument(
        "--expect", metavar="VERDICT", help="an arm, tie, inconclusive or trade-off: exit with 3 where it is another"
    )
    options = parser.parse_args(argv)
    try:
        if options.source.is_dir():
            _refuse_rule(options)
            with locked(options.source):
                result = decide_study(options.source)
        else:
            result = _decide_file(options)
        problem = expectation_problem(result, options.expect) if options.expect else ""
    except UsageError as error:
        print(f"harness.decide: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2))
    sys.stdout.flush()
    # For people: on stderr, apart from the JSON.
    lines = [*table_lines(result), *ranking_lines(result), *source_lines(result), *warning_lines(result)]
    print("\n".join(lines), file=sys.stderr)
    if problem:
        print(f"harness.decide: {problem}", file=sys.stderr)
    print("\n".join(last_lines(result)), file=sys.stderr)
    return 3 if problem else 0


def _guard_option(text: str) -> Guard:
    metric, _, margin = text.rpartition(":")
    try:
        return {"metric": metric, "margin": float(margin)}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: write METRIC:MARGIN, such as gsm8k:0.02") from error


def _decide_file(options: argparse.Namespace) -> Verdict:
    scores = read_scores(options.source)
    if options.n_prompts is not None:
        if "prompt_id" in scores:
            raise UsageError(f"--n-prompts {options.n_prompts}: the scores have a row per prompt; leave it out")
        scores = scores.assign(n_prompts=options.n_prompts)
    arms = CONTRAST if options.arms is None else tuple(options.arms.split(","))
    margin = MARGIN if options.margin is None else options.margin
    alpha = ALPHA if options.alpha is None else options.alpha
    if len(arms) != 2 or arms[0] == arms[1]:
        raise UsageError(f"--arms {options.arms}: give two different arms, such as {','.join(CONTRAST)}")
    if not 0 < margin < 1 or not 0 < alpha < 0.5:
        raise UsageError(f"--margin {margin} --alpha {alpha}: allowed: 0 < margin < 1 and 0 < alpha < 0.5")
    left_out: list[str] = []
    if options.metric is not None:
        needed = [options.metric, *(guard["metric"] for guard in options.guard)]
        scores, left_out = without_bad_scorers(scores, needed)
    result = verdict(
        scores,
        metric=options.metric,
        margin=margin,
        alpha=alpha,
        arms=(arms[0], arms[1]),
        cluster=options.cluster,
        guards=options.guard,
    )
    add_notes(scores, result)
    result["caveats"] += [*choice_caveats(scores, result["metric"]), *length_caveats_of(scores, result)]
    result["warnings"] += left_out
    return result


def _refuse_rule(options: argparse.Namespace) -> None:
    """Refuse options that would change a registered rule after its scores are known."""
    given = [
        name
        for name in ("metric", "margin", "alpha", "arms", "cluster", "guard", "n_prompts")
        if getattr(options, name)
    ]
    if given:
        raise UsageError(
            f"--{' --'.join(given)}: {options.source} is decided by the rule in its study.yaml, registered before the "
            f"trial; to explore another rule, give the scores themselves: {options.source / 'scores.csv'}"
        )


if __name__ == "__main__":
    sys.exit(main())
