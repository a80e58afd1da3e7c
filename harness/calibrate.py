"""Command `python -m harness.calibrate [results/STUDY]`: error rates and power of the decision rule, by simulation.

A study's own seeds, prompts and variances, or given ones -> false winners, false ties, power, and the numbers of seeds
and prompts that a difference needs. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypedDict

from tqdm import tqdm

from harness.decide.deciding import deciding_scores
from harness.decide.notes import without_bad_scorers
from harness.decide.planning import detectable, needed
from harness.decide.scores_file import ArmScores, checked, read_scores
from harness.decide.simulate import NOISE_SD, PROMPT_SD, RUN_SD, Setting, components_of, halves, observed, simulate
from harness.study.errors import UsageError, in_one_sentence
from harness.study.registration import ALPHA, MARGIN, contrast_of, read_study

DIFFERENCES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08)  # true differences with a row of power each
_DIFFERENCE, _REPEATS = 0.03, 1000


class Rate(TypedDict):
    """A simulated share, with its Monte Carlo standard error."""

    share: float
    standard_error: float


class PowerRow(TypedDict):
    """The shares of verdicts at a true difference; `simpo` is the better arm."""

    difference: float
    simpo: float
    dpo: float
    tie: float
    inconclusive: float


class Needed(TypedDict):
    """A number of seeds or prompts that detects the target, with its power in simulation; None where none does."""

    count: int | None
    simulated_power: float | None


class SameAgainstSame(TypedDict):
    """Splits of one arm's seeds into halves, and those with a (false) winner."""

    splits: int
    winners: int


class Calibration(TypedDict):
    """The rule at a setting.

    Attributes:
        setting: fields of `harness.decide.simulate.Setting`.
        repeats: simulated studies per rate.
        level: `checkpoint` with one seed in an arm, else `method`.
        false_winners: with no true difference; false_ties: with a true difference of the margin.
        power: one row per true difference.
        detectable: the smallest difference that is found with 80% power, by formula.
        target: the difference to find.
        needed: `seeds` per arm and `prompts` that find the target.
    """

    setting: Setting
    repeats: int
    level: str
    false_winners: Rate
    false_ties: Rate
    power: list[PowerRow]
    detectable: float
    target: float
    needed: dict[str, Needed]


def calibrate(setting: Setting, *, target: float, repeats: int, seed: int = 0) -> Calibration:
    """Simulate the rule at a setting.

    Args:
        setting: the study.
        target: the difference to find.
        repeats: simulated studies per rate.
        seed: of the simulation.
    """
    components = components_of(setting)
    wanted = needed(components, target, setting.alpha)
    sizes = {name: _resized(setting, name, count) for name, count in wanted.items() if count}
    with tqdm(total=len(DIFFERENCES) + 1 + len(sizes), desc="simulate", delay=5, leave=False) as bar:

        def run(one: Setting, difference: float) -> PowerRow:
            shares = simulate(one, difference, repeats=repeats, seed=seed)
            bar.update()
            return {
                "difference": difference,
                "simpo": shares["simpo"],
                "dpo": shares["dpo"],
                "tie": shares["tie"],
                "inconclusive": shares["inconclusive"],
            }

        power = [run(setting, difference) for difference in DIFFERENCES]
        ties = run(setting, setting.margin)["tie"]
        checks = {name: run(one, target)["simpo"] for name, one in sizes.items()}
    winners = power[0]["simpo"] + power[0]["dpo"]
    return {
        "setting": setting,
        "repeats": repeats,
        "level": "checkpoint" if min(setting.seeds) < 2 else "method",
        "false_winners": _rate(winners, repeats),
        "false_ties": _rate(ties, repeats),
        "power": power,
        "detectable": detectable(components, setting.alpha / max(1, len(setting.looks))),
        "target": target,
        "needed": {name: {"count": count, "simulated_power": checks.get(name)} for name, count in wanted.items()},
    }


def _resized(setting: Setting, name: str, count: int) -> Setting:
    if name == "seeds":
        return replace(setting, seeds=(count, count), looks=())
    return replace(setting, prompts=count, looks=())


def _rate(share: float, repeats: int) -> Rate:
    return {"share": share, "standard_error": math.sqrt(share * (1 - share) / repeats)}


def read_setting(study: Path) -> tuple[Setting, dict[str, ArmScores]]:
    """Return a study's setting and its two arms' golden scores.

    Raises:
        UsageError: a folder without scores of two arms, or with one seed in an arm.
    """
    if not (study / "study.yaml").is_file() or not (study / "scores.csv").is_file():
        raise UsageError(f"{study}: no scored study; give a folder under results/ that harness.sweep wrote, or options")
    registered = read_study(study / "study.yaml")
    names = registered.get("contrast") or contrast_of(registered["arms"])
    if len(names) < 2:
        raise UsageError(f"{study}: one arm only; a decision needs two")
    scores, _ = without_bad_scorers(read_scores(study / "scores.csv"), [registered["metric"]])
    arms = deciding_scores(checked(scores), registered["metric"], names).arms
    try:
        setting = observed(
            arms, margin=registered["margin"], alpha=registered["alpha"], looks=registered.get("looks") or ()
        )
    except ValueError as error:
        raise UsageError(f"{study}: {error}") from error
    return setting, arms


def same_against_same(arms: Mapping[str, ArmScores], setting: Setting) -> dict[str, SameAgainstSame]:
    """Compare each arm with at least four seeds with itself: one half of its seeds against the other."""
    found: dict[str, SameAgainstSame] = {}
    for name, arm in arms.items():
        if len(arm.seeds) >= 4:
            splits, winners = halves(arm.values, setting)
            found[name] = {"splits": splits, "winners": winners}
    return found


def _report(result: Calibration, same: Mapping[str, SameAgainstSame]) -> str:
    """Return the result as text for a terminal."""
    setting = result["setting"]
    lines = [
        f"{setting.seeds[0]} and {setting.seeds[1]} seeds, {setting.prompts} prompts"
        + (f" in clusters of {setting.cluster_size}" if setting.cluster_size > 1 else "")
        + f"; SD of runs {100 * setting.run_sd[0]:.1f} and {100 * setting.run_sd[1]:.1f} points, "
        f"of the difference over prompts {100 * setting.prompt_sd:.0f}, "
        f"of one answer {100 * setting.noise_sd:.0f}; "
        f"margin {100 * setting.margin:g}, alpha {setting.alpha:g}"
        + (f", looks at {', '.join(map(str, setting.looks))} seeds" if setting.looks else ""),
        f"false winners, no true difference: {_rate_text(result['false_winners'])} (allowed {setting.alpha:.0%})",
        f"false ties, true difference of the margin: {_rate_text(result['false_ties'])} (allowed {setting.alpha:.0%})",
        "",
        f"{'true difference':>16}{'right':>9}{'wrong':>9}{'tie':>9}{'inconclusive':>14}",
    ]
    for row in result["power"]:
        cells = [f"{share:.1%}" for share in (row["simpo"], row["dpo"], row["tie"], row["inconclusive"])]
        lines.append(f"{100 * row['difference']:14.0f} p{cells[0]:>9}{cells[1]:>9}{cells[2]:>9}{cells[3]:>14}")
    lines += ["", f"smallest difference found with 80% power, by formula: {100 * result['detectable']:.1f} points"]
    for name, found in result["needed"].items():
        what = f"{name} an arm" if name == "seeds" else "golden prompts"
        if found["count"] is None or found["simulated_power"] is None:
            lines.append(f"{100 * result['target']:g} points: more {what} alone are not enough")
        else:
            shown = f"{found['count']} {what}, all else as it is (simulated power {found['simulated_power']:.0%})"
            lines.append(f"{100 * result['target']:g} points need {shown}")
    if result["target"] < setting.margin:
        lines.append(
            f"a difference of {100 * result['target']:g} points is within the margin of {100 * setting.margin:g}: "
            "the better it is measured, the surer the verdict is a tie; set --margin below what should win"
        )
    if result["level"] == "checkpoint":
        lines.append("one seed in an arm: such a study compares two checkpoints and says nothing of the methods")
    for arm, halves_of in same.items():
        lines.append(
            f"{arm} against itself, its seeds in halves: {halves_of['winners']} of {halves_of['splits']} splits have a "
            "winner (they share runs, so this is a check and not a rate)"
        )
    return "\n".join(lines)


def _rate_text(found: Rate) -> str:
    return f"{found['share']:.1%} ± {found['standard_error']:.1%}"


@in_one_sentence("harness.calibrate")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    default = Setting()
    parser = argparse.ArgumentParser(
        prog="python -m harness.calibrate",
        description="Simulate the decision rule: false winners, false ties, power, and the seeds and prompts needed.",
        epilog="Example: python -m harness.calibrate --seeds 5 --prompts 500 --difference 0.03",
    )
    parser.add_argument(
        "study", type=Path, nargs="?", help="results/STUDY: its numbers are the defaults of the options"
    )
    parser.add_argument("--seeds", type=int, help=f"per arm (default {default.seeds[0]})")
    parser.add_argument("--prompts", type=int, help=f"golden prompts (default {default.prompts})")
    parser.add_argument("--cluster-size", type=int, help=f"prompts per cluster (default {default.cluster_size})")
    parser.add_argument("--run-sd", type=float, help=f"SD of a run's mean over seeds (default {RUN_SD})")
    parser.add_argument("--prompt-sd", type=float, help=f"SD of the difference over prompts (default {PROMPT_SD})")
    parser.add_argument("--noise-sd", type=float, help=f"SD of one answer's score (default {NOISE_SD})")
    parser.add_argument("--passes", action="store_true", help="scores are 0 or 1")
    parser.add_argument("--margin", type=float, help=f"smallest difference that matters (default {MARGIN})")
    parser.add_argument("--alpha", type=float, help=f"error rate (default {ALPHA})")
    parser.add_argument("--looks", help="numbers of seeds at which golden is looked at, such as 3,5,8")
    parser.add_argument(
        "--difference", type=float, default=_DIFFERENCE, help=f"the one to find (default {_DIFFERENCE})"
    )
    parser.add_argument(
        "--repeats", type=int, default=_REPEATS, help=f"simulated studies per rate (default {_REPEATS})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        setting, arms = read_setting(options.study) if options.study else (default, {})
        setting = _with_options(setting, options)
        result = calibrate(setting, target=options.difference, repeats=options.repeats)
    except UsageError as error:
        print(f"harness.calibrate: {error}", file=sys.stderr)
        return 2
    same = same_against_same(arms, setting)
    if options.json:
        found = {**result, "setting": asdict(setting)} | ({"same_against_same": same} if arms else {})
        print(json.dumps(found, indent=2))
    else:
        print(_report(result, same))
    return 0


def _with_options(setting: Setting, options: argparse.Namespace) -> Setting:
    """Return the setting with the given options in place of its values.

    Raises:
        UsageError: a value that is not allowed.
    """
    names = ("prompts", "cluster_size", "prompt_sd", "noise_sd", "margin", "alpha")
    found = replace(setting, **{name: value for name in names if (value := getattr(options, name)) is not None})
    if options.passes:
        found = replace(found, passes=True)
    if options.seeds is not None:
        found = replace(found, seeds=(options.seeds, options.seeds))
    if options.run_sd is not None:
        found = replace(found, run_sd=(options.run_sd, options.run_sd))
    if options.looks:
        try:
            found = replace(found, looks=tuple(int(look) for look in options.looks.split(",")))
        except ValueError as error:
            raise UsageError(f"--looks {options.looks}: write numbers of seeds, such as 3,5,8") from error
    for name, wrong, allowed in (
        ("seeds", min(found.seeds) < 1, "at least 1"),
        ("prompts", found.prompts < 2 * found.cluster_size, "at least two clusters"),
        ("cluster-size", found.cluster_size < 1, "at least 1"),
        ("run-sd", min(found.run_sd) < 0, "at least 0"),
        ("prompt-sd", found.prompt_sd < 0, "at least 0"),
        ("noise-sd", found.noise_sd < 0, "at least 0"),
        ("margin", not 0 < found.margin < 1, "between 0 and 1"),
        ("alpha", not 0 < found.alpha < 0.5, "between 0 and 0.5"),
        ("difference", not 0 < options.difference < 1, "between 0 and 1"),
        ("repeats", options.repeats < 10, "at least 10"),
        ("looks", bool(found.looks) and list(found.looks) != sorted(set(found.looks)), "rising numbers"),
        ("looks", bool(found.looks) and found.looks[-1] != min(found.seeds), "the last one is all seeds"),
    ):
        if wrong:
            raise UsageError(f"--{name}: allowed: {allowed}; the others being {asdict(found)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
