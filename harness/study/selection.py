"""selection.json, the selected config per arm: read it, and tell who may see golden."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.study.errors import UsageError
from harness.study.files import read_json
from harness.study.registration import read_study

SELECTION_FILE = "selection.json"
_SHOWN = 10  # values of a grid that a warning lists


def read_selection(study: Path) -> dict[str, Any]:
    """Return the contents of selection.json; empty where nothing is selected yet.

    Raises:
        UsageError: where it is damaged: golden may have been looked at, so that it cannot simply be made again.
    """
    path = study / SELECTION_FILE
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path))
    except ValueError as error:
        raise UsageError(
            f"{error}; it says which configs were selected before golden was looked at: put it back as it was"
        ) from error


def golden_problem(study: Path, arm: str, label: str, seed: int) -> str | None:
    """Say why a run of a study must not be scored on golden, or None where it may."""
    path = study / "study.yaml"
    registered = read_study(path) if path.is_file() else {}
    if arm not in registered.get("tuned", []):
        return None
    if seed in registered["tuning_seeds"]:
        return (
            f"seed={seed}: {study.name} selects its configs with this seed, so that golden would see its luck again; "
            f"golden is for fresh seeds: {', '.join(map(str, registered['seeds'][arm]))}"
        )
    selected = read_selection(study).get("arms", {}).get(arm, {}).get("selected")
    if selected is None:
        return f"{study.name}: no config of {arm} is selected yet; golden is scored for selected configs only"
    if label != selected:
        return (
            f"{arm} {label}: {study.name} has selected {selected} on dev, and golden is scored for selected configs "
            "only; give another config a study of its own: study=NAME"
        )
    return None


def edge_warnings(configs: Sequence[str], selected: str) -> list[str]:
    """Say which values of the selected config are the smallest or largest that were tried, and what to try next.

    Args:
        configs: labels of all configs of one arm, as `harness.config.trial_id.config_label` writes them.
        selected: the label of the one that was selected.
    """
    tried: dict[str, set[float]] = {}
    for label in configs:
        for key, value in _values(label).items():
            tried.setdefault(key, set()).add(value)
    warnings = []
    for key, value in _values(selected).items():
        values = sorted(tried.get(key, ()))
        if len(values) > 1 and value in (values[0], values[-1]):
            end = "smallest" if value == values[0] else "largest"
            some = f"{len(values)} values from {values[0]:g} to {values[-1]:g}"
            shown = some if len(values) > _SHOWN else ", ".join(f"{v:g}" for v in values)
            beyond = " and ".join(f"{v:g}" for v in _beyond(values if value == values[-1] else values[::-1]))
            more = f"try {beyond} too" if beyond else "it cannot be lower"
            warnings.append(
                f"{key}={value:g} was selected and is the {end} that was tried ({shown}): the best may lie beyond "
                f"the grid; {more}, in a new study"
            )
    return warnings


def _beyond(values: Sequence[float]) -> list[float]:
    """Return the next two values at the end of a grid: in equal ratios, or in equal steps where a zero is in it."""
    last, before = values[-1], values[-2]
    if min(values) > 0:
        found = [last * (last / before) ** n for n in (1, 2)]
    else:
        found = [last + n * (last - before) for n in (1, 2)]
    return [value for value in found if value >= 0]


def _values(label: str) -> dict[str, float]:
    return {key: float(value) for key, _, value in (part.partition("=") for part in label.split(",")) if value}
