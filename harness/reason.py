"""The verdict in one sentence that a manager understands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.arms import ARMS


def reason(result: Mapping[str, Any], winner: str | None, failed: Sequence[Mapping[str, Any]]) -> str:
    """Return the sentence.

    Args:
        result: the contents of verdict.json, all but `reason`.
        winner: the arm ahead, also where a guard makes it a trade-off; None for a tie or too little evidence.
        failed: the guards that it failed.
    """
    first, second = (ARMS[arm].title if arm in ARMS else arm for arm in result["arms"])
    low, high = (100 * bound for bound in result["ci95"])
    level = round(100 * (1 - result["alpha"]), 1)
    points, margin = 100 * result["difference"], 100 * result["margin"]
    seeds = "/".join(str(count) for count in dict.fromkeys(result["n_seeds"].values()))
    over = f" over {result['n_prompts']} golden prompts" if result["n_prompts"] else ""
    runs = "1 seed" if seeds == "1" else f"{seeds} seeds"
    basis = f"on {result['metric']} ({level:g}% interval {low:+.1f} to {high:+.1f}){over}, {runs} an arm"
    if result["level"] == "checkpoint":
        first, second = f"this {first} checkpoint", f"this {second} checkpoint"
    if winner:
        better, worse = (first, second) if points > 0 else (second, first)
        text = f"{better} beats {worse} by {abs(points):.1f} points {basis}"
        if failed:
            text += f"; but it may be worse on {', '.join(str(guard['metric']) for guard in failed)}"
    elif result["verdict"] == "tie":
        text = f"{first} and {second} differ by less than {margin:g} points: {points:+.1f} {basis}"
    else:
        least = 100 * result["minimum_detectable_difference"]
        text = f"Not enough evidence: {first} minus {second} is {points:+.1f} points {basis}; "
        text += f"a difference below {least:.1f} points cannot be told from noise here"
    if result["level"] == "checkpoint":
        text += "; with one seed this says nothing about the methods"
    return text[0].upper() + text[1:] + "."
