"""What a study can find: a design -> the difference that it detects, and how often its guards pass; before training."""

from __future__ import annotations

from harness.decide.planning import power
from harness.decide.simulate import Setting, components_of, detectable_before
from harness.decide.words import plural
from harness.study.errors import UnreachableError
from harness.sweep.design import Design


def findable(design: Design) -> str:
    """Return a sentence on the difference that a study could find."""
    seeds = len(design.seeds)
    prompts = _golden_prompts(design)
    if prompts is None:
        return "what difference the study could find is not known without its golden prompts"
    least = 100 * detectable_before(seeds, prompts, alpha=design.base_config.decide.alpha)
    level = "" if seeds > 1 else "; with one seed it compares two checkpoints and not the methods"
    if design.tuned:
        level = "; it compares the configs that dev selects: how they are selected is not in the interval"
    return (
        f"with {seeds} seeds an arm and {prompts} golden prompts, a difference of about {least:.1f} points is found "
        f"with 80% power (assumed spreads; python -m harness.calibrate has them and more){level}"
    )


def guard_lines(design: Design) -> list[str]:
    """Return a line per guard: how often a winner that is truly equal on it passes, and turns a trade-off otherwise."""
    prompts, decide = _golden_prompts(design), design.base_config.decide
    if prompts is None:
        return []
    seeds, alpha = len(design.seeds), decide.alpha / max(1, len(decide.looks or []))
    size = f"{plural(seeds, 'seed')} an arm, {prompts} golden prompts"
    lines = []
    for guard in decide.guards:
        margin = float(guard["margin"])
        passes = guard_passes(seeds, prompts, margin=margin, alpha=alpha)
        advice = "; a wider margin, more seeds or more prompts let it pass" if passes < 0.8 else ""
        lines.append(
            f"guard {guard['metric']}: a winner that is truly equal on it passes a margin of {100 * margin:g} points "
            f"in about {passes:.0%} of such studies ({size}, assumed spreads); "
            f"in the others the verdict is trade-off{advice}"
        )
    return lines


def guard_passes(seeds: int, prompts: int, *, margin: float, alpha: float) -> float:
    """Return how often an arm that is truly equal on a guard passes it.

    It does where the lower bound at 1 - alpha is above -margin: as often as a true difference of `margin` is found by
    the two-sided test at 2 alpha.
    """
    return power(components_of(Setting(seeds=(seeds, seeds), prompts=prompts)), margin, 2 * alpha)


def _golden_prompts(design: Design) -> int | None:
    try:
        return len(design.inputs.splits(design.any).golden_prompts)
    except UnreachableError:
        return None
