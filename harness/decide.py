"""Decide which arm to ship: scores in, verdict out (DESIGN, section 5: unpaired seeds, paired prompts).

Command: `python -m harness.decide results/STUDY | SCORES_FILE`. Imports no torch; reads scores, whoever wrote them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.arms import ARMS
from harness.identity import data_identity
from harness.ledger import enter_look
from harness.outside import in_one_sentence
from harness.records import UsageError, locked, write_json
from harness.registration import contrast_of, read_study
from harness.rule import verdict
from harness.scores_file import read_scores
from harness.selection import edge_warnings, golden_problem
from harness.stored import facts_warnings
from harness.verdictlines import table_lines, verdict_line, warning_lines

__all__ = ["decide_study", "verdict"]

MARGIN = 0.05
ALPHA = 0.05


def decide_study(study: Path) -> dict[str, Any]:
    """Decide a study by its registered rule, enter the look in its ledger, and write verdict.json.

    Raises:
        UsageError: where the folder holds no scored study.
    """
    result, registered, seeds = decision(study)
    result["warnings"] = [*enter_look(study, registered, result["arms"], seeds), *result["warnings"]]
    write_json(study / "verdict.json", result)
    return result


def decision(study: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[int]]]:
    """Return what the rule says of a study's scores, its registration, and the seeds that decide; write nothing.

    Raises:
        UsageError: where the folder holds no scored study.
    """
    path = study / "study.yaml"
    if not path.is_file() or not (study / "scores.csv").is_file():
        raise UsageError(
            f"{study}: no scored study (study.yaml and scores.csv); give a folder that harness.sweep wrote"
        )
    registered = read_study(path)
    arms = registered.get("contrast") or contrast_of(registered["arms"])
    if len(arms) < 2:
        raise UsageError(f"{study}: only the arm {', '.join(registered['arms'])}; a decision needs two")
    scores = read_scores(study / "scores.csv")
    _refuse_foreign(study, scores, arms, registered.get("seeds", {}))
    seeds, looks = _seeds_of_look(study, scores, registered, arms)
    result = verdict(
        _of_seeds(scores, seeds) if looks else scores,
        metric=registered["metric"],
        margin=registered["margin"],
        alpha=registered["alpha"] / max(1, len(looks)),
        arms=(arms[0], arms[1]),
        guards=registered.get("guards") or (),
    )
    if looks:
        result["look"] = {"seeds": len(seeds[arms[0]]), "registered": looks, "alpha": registered["alpha"]}
    identity = data_identity(study)
    if identity["status"] == "not proved":
        result["warnings"].append(f"identical data is NOT proved: {'; '.join(identity['reasons'])}")
    base = scores[(scores["arm"] == "sft") & (scores["split"] == "golden") & (scores["scorer"] == registered["metric"])]
    if len(base):
        result["base_mean"] = float(base["score"].mean())
    result["warnings"] += [
        *_plan_warnings(registered, result, seeds),
        *registered.get("warnings", []),
        *facts_warnings(study),
    ]
    return result, registered, seeds


def _refuse_foreign(study: Path, scores: pd.DataFrame, arms: Sequence[str], seeds: Mapping[str, Sequence[int]]) -> None:
    """Refuse golden scores of runs that were not registered or not selected, or that selected: they must not decide."""
    golden = scores[(scores["split"] == "golden") & scores["arm"].isin(list(arms))]
    runs = golden[["arm", "config", "seed"]].drop_duplicates().itertuples(index=False, name=None)
    for arm, config, seed in runs:
        number = int(seed) if str(seed).isdigit() else -1
        problem = golden_problem(study, str(arm), str(config), number)
        if not problem and arm in seeds and number not in seeds[arm]:
            problem = f"{arm} {config} seed {seed} is on golden and was not registered; take its trial's folder away"
        if problem:
            raise UsageError(f"{study / 'scores.csv'}: {problem}")


def _seeds_of_look(
    study: Path, scores: pd.DataFrame, registered: Mapping[str, Any], arms: Sequence[str]
) -> tuple[dict[str, list[int]], list[int]]:
    """Return the seeds that decide, and the registered looks.

    Where looks are registered, the decision is on the first seeds of the largest look that all arms have reached.
    """
    seeds = {arm: list(registered.get("seeds", {}).get(arm, [])) for arm in arms}
    looks = sorted(registered.get("looks") or [])
    if not looks:
        return seeds, []
    golden = scores[(scores["split"] == "golden") & (scores["scorer"] == registered["metric"])]
    reached = []
    for arm in arms:
        scored = set(golden[golden["arm"] == arm]["seed"].astype(str))
        reached.append(next((i for i, seed in enumerate(seeds[arm]) if str(seed) not in scored), len(seeds[arm])))
    count = max((look for look in looks if look <= min(reached)), default=0)
    if not count:
        raise UsageError(
            f"{study}: its first registered look at golden is with {looks[0]} seeds an arm, and {min(reached)} are "
            "scored; finish the study with the same command"
        )
    return {arm: found[:count] for arm, found in seeds.items()}, looks


def _of_seeds(scores: pd.DataFrame, seeds: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """Keep the golden rows of these seeds, and all other rows."""
    wanted = {(arm, str(seed)) for arm, found in seeds.items() for seed in found}
    runs = pd.Series(list(zip(scores["arm"], scores["seed"].astype(str), strict=True)), index=scores.index)
    return scores[(scores["split"] != "golden") | ~scores["arm"].isin(list(seeds)) | runs.isin(wanted)]


def _plan_warnings(
    registered: Mapping[str, Any], result: Mapping[str, Any], decided_by: Mapping[str, Sequence[int]]
) -> list[str]:
    """Warn where what was scored is less than what was registered, or what was registered was not fair."""
    warnings = []
    for arm in result["arms"]:
        missing = [seed for seed in decided_by[arm] if str(seed) not in result["run_means"][arm]]
        if missing:
            shown = ", ".join(map(str, missing))
            warnings.append(
                f"{arm}: registered seed {shown} has no scores (failed or unfinished); finish the study first"
            )
    configs = {arm: registered.get("configs", {}).get(arm, []) for arm in result["arms"]}
    if len({len(found) for found in configs.values()}) > 1:
        shown = ", ".join(f"{arm} {len(found)}" for arm, found in configs.items())
        warnings.append(f"unequal budgets ({shown} configs): the best of many beats the best of few by luck alone")
    for arm, found in configs.items():
        title = ARMS[arm].title if arm in ARMS else arm
        warnings += [f"{title}: {text}" for text in edge_warnings(found, result["configs"][arm])]
    return warnings


def _guard_option(text: str) -> dict[str, Any]:
    metric, _, margin = text.rpartition(":")
    try:
        return {"metric": metric, "margin": float(margin)}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: write METRIC:MARGIN, such as gsm8k:0.02") from error


@in_one_sentence("harness.decide")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: JSON on stdout, a table on stderr; exit status 2 with a message where scores cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.decide",
        description="Print the verdict on a study, or on any scores file, as JSON.",
        epilog="Example: python -m harness.decide scores.csv --metric checks --margin 0.03 --arms simpo,dpo",
    )
    parser.add_argument("source", type=Path, help="results/STUDY, or a .csv, .parquet or .jsonl file of scores")
    parser.add_argument("--metric", help="the scorer to decide on")
    parser.add_argument("--margin", type=float, help=f"smallest difference that matters (default {MARGIN})")
    parser.add_argument("--alpha", type=float, help=f"error rate (default {ALPHA})")
    parser.add_argument("--arms", help="two arms; the difference is first minus second (default simpo,dpo)")
    parser.add_argument("--cluster", help="column that holds clusters of prompts (default: cluster, where it exists)")
    parser.add_argument("--guard", action="append", type=_guard_option, default=[], metavar="METRIC:MARGIN")
    options = parser.parse_args(argv)
    try:
        if options.source.is_dir():
            _refuse_rule(options)
            with locked(options.source):
                result = decide_study(options.source)
        else:
            result = verdict(read_scores(options.source), **_rule(options))
    except UsageError as error:
        print(f"harness.decide: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2))
    sys.stdout.flush()
    # For people, and out of the way of whoever reads the JSON.
    print("\n".join([*table_lines(result), *warning_lines(result), verdict_line(result)]), file=sys.stderr)
    return 0


def _rule(options: argparse.Namespace) -> dict[str, Any]:
    arms = tuple((options.arms or "simpo,dpo").split(","))
    margin, alpha = (
        MARGIN if options.margin is None else options.margin,
        ALPHA if options.alpha is None else options.alpha,
    )
    if len(arms) != 2 or arms[0] == arms[1]:
        raise UsageError(f"--arms {options.arms}: give two different arms, such as simpo,dpo")
    if not 0 < margin < 1 or not 0 < alpha < 0.5:
        raise UsageError(f"--margin {margin} --alpha {alpha}: allowed: 0 < margin < 1 and 0 < alpha < 0.5")
    rule = {"metric": options.metric, "cluster": options.cluster, "guards": options.guard}
    return rule | {"margin": margin, "alpha": alpha, "arms": arms}


def _refuse_rule(options: argparse.Namespace) -> None:
    """Refuse options that would change a registered rule after its scores are known."""
    given = [name for name in ("metric", "margin", "alpha", "arms", "cluster", "guard") if getattr(options, name)]
    if given:
        raise UsageError(
            f"--{' --'.join(given)}: {options.source} is decided by the rule in its study.yaml, registered before the "
            f"trial; to explore another rule, give the scores themselves: {options.source / 'scores.csv'}"
        )


if __name__ == "__main__":
    sys.exit(main())
