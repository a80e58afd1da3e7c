"""How far the decision rule can be trusted here: false winners, false ties, power, and what a difference would need.

Command: `python -m harness.calibrate [results/STUDY]`: at a study's own seeds, prompts and variances, or at given ones.
Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.decide.scores_file import ArmScores, arm_scores, checked, read_scores, same_prompts
from harness.decide.simulate import NOISE_SD, PROMPT_SD, RUN_SD, Setting, components_of, halves, observed, simulate
from harness.decide.stats import needed
from harness.study.errors import UsageError, in_one_sentence
from harness.study.registration import ALPHA, MARGIN, contrast_of, read_study

DIFFERENCES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08)


def calibrate(setting: Setting, *, target: float, repeats: int, seed: int = 0) -> dict[str, Any]:
    """Simulate the rule at a setting.

    Args:
        setting: the study.
        target: the difference that is to be found.
        repeats: simulated studies for each figure.
        seed: of the simulation.

    Returns:
        `setting`; `false_winners` (no true difference) and `false_ties` (a true difference of the margin) as
        {share, standard_error}; `power`: a row a true difference; `detectable` by formula; `needed`: numbers of seeds
        and of prompts that detect `target`, each with the power that a simulation of it has.
    """
    components = components_of(setting)
    wanted = needed(components, target, setting.alpha)
    sizes = {name: _resized(setting, name, count) for name, count in wanted.items() if count}
    with tqdm(total=len(DIFFERENCES) + 1 + len(sizes), desc="simulate", delay=5, leave=False) as bar:

        def run(one: Setting, difference: float) -> dict[str, float]:
            found = simulate(one, difference, repeats=repeats, seed=seed)
            bar.update()
            return found

        power = [{"difference": d, **run(setting, d)} for d in DIFFERENCES]
        ties = run(setting, setting.margin)["tie"]
        checks = {name: run(one, target)["simpo"] for name, one in sizes.items()}
    winners = power[0]["simpo"] + power[0]["dpo"]
    return {
        "setting": asdict(setting),
        "repeats": repeats,
        "level": "checkpoint" if min(setting.seeds) < 2 else "method",
        "false_winners": _share(winners, repeats),
        "false_ties": _share(ties, repeats),
        "power": power,
        "detectable": components.detectable(setting.alpha / max(1, len(setting.looks))),
        "target": target,
        "needed": {name: {"count": count, "simulated_power": checks.get(name)} for name, count in wanted.items()},
    }


def _resized(setting: Setting, name: str, count: int) -> Setting:
    if name == "seeds":
        return replace(setting, seeds=(count, count), looks=())
    return replace(setting, prompts=count, looks=())


def _share(share: float, repeats: int) -> dict[str, float]:
    return {"share": share, "standard_error": math.sqrt(share * (1 - share) / repeats)}


def read_setting(study: Path) -> tuple[Setting, dict[str, ArmScores]]:
    """Return a study's setting and its two arms' golden scores.

    Raises:
        UsageError: for a folder without scores of two arms, or with one seed in an arm.
    """
    if not (study / "study.yaml").is_file() or not (study / "scores.csv").is_file():
        raise UsageError(f"{study}: no scored study; give a folder under results/ that harness.sweep wrote, or options")
    registered = read_study(study / "study.yaml")
    frame = checked(read_scores(study / "scores.csv"))
    frame = frame[(frame["split"] == "golden") & (frame["scorer"] == registered["metric"])]
    arms = {}
    for arm in registered.get("contrast") or contrast_of(registered["arms"]):
        configs = frame[frame["arm"] == arm]["config"].unique()
        if len(configs) != 1:
            raise UsageError(f"{study}: {len(configs)} configs of {arm} are scored on golden; finish the study first")
        arms[arm] = arm_scores(frame, arm, str(configs[0]), None)
    if len(arms) < 2:
        raise UsageError(f"{study}: one arm only; a decision needs two")
    same_prompts(arms)
    try:
        setting = observed(
            arms, margin=registered["margin"], alpha=registered["alpha"], looks=registered.get("looks") or ()
        )
    except ValueError as error:
        raise UsageError(f"{study}: {error}") from error
    return setting, arms


def same_against_same(arms: Mapping[str, ArmScores], setting: Setting) -> dict[str, dict[str, int]]:
    """Return, for each arm with at least four seeds, the splits of its seeds and those that found a (false) winner."""
    found = {}
    for name, arm in arms.items():
        if len(arm.seeds) >= 4:
            splits, winners = halves(arm.values, setting)
            found[name] = {"splits": splits, "winners": winners}
    return found


def _text(result: Mapping[str, Any]) -> str:
    setting = result["setting"]
    lines = [
        f"{setting['seeds'][0]} and {setting['seeds'][1]} seeds, {setting['prompts']} prompts"
        + (f" in clusters of {setting['cluster_size']}" if setting["cluster_size"] > 1 else "")
        + f"; SD of runs {100 * setting['run_sd'][0]:.1f} and {100 * setting['run_sd'][1]:.1f} points, "
        f"of the difference over prompts {100 * setting['prompt_sd']:.0f}, "
        f"of one answer {100 * setting['noise_sd']:.0f}; "
        f"margin {100 * setting['margin']:g}, alpha {setting['alpha']:g}"
        + (f", looks at {', '.join(map(str, setting['looks']))} seeds" if setting["looks"] else ""),
        f"false winners, no true difference: {_percent(result['false_winners'])} (allowed {setting['alpha']:.0%})",
        f"false ties, true difference of the margin: {_percent(result['false_ties'])} (allowed {setting['alpha']:.0%})",
        "",
        f"{'true difference':>16}{'right':>9}{'wrong':>9}{'tie':>9}{'inconclusive':>14}",
    ]
    for row in result["power"]:
        cells = [f"{row[name]:.1%}" for name in ("simpo", "dpo", "tie", "inconclusive")]
        lines.append(f"{100 * row['difference']:14.0f} p{cells[0]:>9}{cells[1]:>9}{cells[2]:>9}{cells[3]:>14}")
    lines += ["", f"smallest difference found with 80% power, by formula: {100 * result['detectable']:.1f} points"]
    for name, found in result["needed"].items():
        what = f"{name} an arm" if name == "seeds" else "golden prompts"
        if found["count"] is None:
            lines.append(f"{100 * result['target']:g} points: more {what} alone would not do")
        else:
            shown = f"{found['count']} {what}, all else as it is (simulated power {found['simulated_power']:.0%})"
            lines.append(f"{100 * result['target']:g} points need {shown}")
    if result["target"] < setting["margin"]:
        lines.append(
            f"a difference of {100 * result['target']:g} points is within the margin of {100 * setting['margin']:g}: "
            "the better it is measured, the surer the verdict is a tie; set --margin below what should win"
        )
    if result["level"] == "checkpoint":
        lines.append("one seed in an arm: such a study compares two checkpoints and says nothing of the methods")
    for arm, found in result.get("same_against_same", {}).items():
        lines.append(
            f"{arm} against itself, its seeds in halves: {found['winners']} of {found['splits']} splits have a winner "
            "(they share runs, so this is a check and not a rate)"
        )
    return "\n".join(lines)


def _percent(found: Mapping[str, float]) -> str:
    return f"{found['share']:.1%} ± {found['standard_error']:.1%}"


@in_one_sentence("harness.calibrate")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.calibrate",
        description="Simulate the decision rule: false winners, false ties, power, and what a difference would need.",
        epilog="Example: python -m harness.calibrate --seeds 5 --prompts 500 --difference 0.03",
    )
    parser.add_argument("study", type=Path, nargs="?", help="results/STUDY: take its numbers; options replace them")
    parser.add_argument("--seeds", type=int, help="of each arm (default 5)")
    parser.add_argument("--prompts", type=int, help="golden prompts (default 300)")
    parser.add_argument("--cluster-size", type=int, help="prompts of a cluster (default 1)")
    parser.add_argument("--run-sd", type=float, help=f"SD of a run's mean over seeds (default {RUN_SD})")
    parser.add_argument("--prompt-sd", type=float, help=f"SD of the difference over prompts (default {PROMPT_SD})")
    parser.add_argument("--noise-sd", type=float, help=f"SD of one answer's score (default {NOISE_SD})")
    parser.add_argument("--passes", action="store_true", help="scores are 0 or 1")
    parser.add_argument("--margin", type=float, help=f"smallest difference that matters (default {MARGIN})")
    parser.add_argument("--alpha", type=float, help=f"error rate (default {ALPHA})")
    parser.add_argument("--looks", help="numbers of seeds at which golden is looked at, such as 3,5,8")
    parser.add_argument("--difference", type=float, default=0.03, help="the one to find (default 0.03)")
    parser.add_argument("--repeats", type=int, default=1000, help="simulated studies for each figure (default 1000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        setting, arms = read_setting(options.study) if options.study else (Setting(), {})
        setting = _with_options(setting, options)
        result = calibrate(setting, target=options.difference, repeats=options.repeats)
    except UsageError as error:
        print(f"harness.calibrate: {error}", file=sys.stderr)
        return 2
    if arms:
        result["same_against_same"] = same_against_same(arms, setting)
    print(json.dumps(result, indent=2) if options.json else _text(result))
    return 0


def _with_options(setting: Setting, options: argparse.Namespace) -> Setting:
    """Return the setting with the options that were given in its place; a bad one is a UsageError."""
    given = {
        name: getattr(options, name) for name in ("prompts", "cluster_size", "prompt_sd", "noise_sd", "margin", "alpha")
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changes |= {"passes": True} if options.passes else {}
    changes |= {"seeds": (options.seeds, options.seeds)} if options.seeds is not None else {}
    changes |= {"run_sd": (options.run_sd, options.run_sd)} if options.run_sd is not None else {}
    if options.looks:
        try:
            changes["looks"] = tuple(int(look) for look in options.looks.split(","))
        except ValueError as error:
            raise UsageError(f"--looks {options.looks}: write numbers of seeds, such as 3,5,8") from error
    found = replace(setting, **changes)
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
