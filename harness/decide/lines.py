"""A verdict as lines for a terminal: a compact table, and one line that says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.config.arms import BASE, title
from harness.study.text import one_line


def table_lines(verdict: Mapping[str, Any]) -> list[str]:
    """Return the means of base and arms with the range of their seeds, and their difference with its interval.

    Args:
        verdict: as in verdict.json; names out of a scores file are shown on one line, without control characters.
    """
    rows = [] if verdict.get("base_mean") is None else [(title(BASE), f"{100 * verdict['base_mean']:6.1f}")]
    for arm, mean in verdict["means"].items():
        runs = [100 * value for value in verdict["run_means"][arm].values()]
        seeds = f"  {len(runs)} seeds, {min(runs):.1f} to {max(runs):.1f}" if len(runs) > 1 else "  1 seed"
        rows.append((title(arm), f"{100 * mean:6.1f}{seeds}"))
    low, high = verdict["ci95"]
    interval = f"{confidence(verdict['alpha'])} interval {100 * low:+.1f} to {100 * high:+.1f}"
    points = f"{100 * verdict['difference']:+6.1f}  {interval}, margin {100 * verdict['margin']:.1f}"
    rows.append((" - ".join(map(title, verdict["arms"])), points))
    width = max(len(name) for name, _ in rows) + 2
    unit = "points" if verdict.get("n_prompts") is None else f"points, {verdict['n_prompts']} golden prompts"
    head = f"{one_line(str(verdict['metric']), 80)} ({unit})"
    return [head, *(f"  {name:{width}}{text}" for name, text in rows)]


def warning_lines(verdict: Mapping[str, Any]) -> list[str]:
    """Return the warnings, a line each."""
    return [f"warning: {one_line(warning, 1000)}" for warning in verdict["warnings"]]


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """Return the verdict with its reason in one line."""
    return one_line(f"verdict: {verdict['verdict']} ({verdict['level']} level). {verdict['reason']}", 1000)


def confidence(alpha: float) -> str:
    """Write the confidence of an interval at 1 - alpha: `95%`, `98.3%`."""
    return f"{round(100 * (1 - alpha), 1):g}%"
