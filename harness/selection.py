"""Select each arm's config on dev, and flag a selected value that lies on the edge of its grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.records import UsageError


def select_configs(scores: Path, metric: str, arms: set[str]) -> dict[str, str]:
    """Return each arm's config with the best mean dev score over its seeds; golden is not looked at.

    Args:
        scores: scores.csv.
        metric: the scorer to select on.
        arms: those with several configs.

    Raises:
        UsageError: where dev has no scores of an arm.
    """
    import pandas as pd

    table = pd.read_csv(scores, keep_default_na=False)
    dev = table[(table["split"] == "dev") & (table["scorer"] == metric) & table["arm"].isin(arms)]
    means = pd.to_numeric(dev["score"]).groupby([dev["arm"], dev["config"]]).mean()
    lacking = sorted(arms - set(means.index.get_level_values(0)))
    if lacking:
        raise UsageError(
            f"{scores}: {', '.join(lacking)} has several configs and dev has no scores of {metric} to select on; "
            "see which trials failed, or give dev rows with the same kind of scores as golden"
        )
    return {arm: str(means.loc[arm].idxmax()) for arm in sorted(arms)}


def edge_warnings(configs: Sequence[str], selected: str) -> list[str]:
    """Say which values of the selected config are the smallest or largest that were tried.

    Args:
        configs: labels of all configs of one arm, as `harness.config.config_label` writes them.
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
            end, shown = "smallest" if value == values[0] else "largest", ", ".join(f"{v:g}" for v in values)
            warnings.append(
                f"{key}={value:g} was selected and is the {end} that was tried ({shown}): the best may lie beyond "
                "the grid; widen it in a new study"
            )
    return warnings


def _values(label: str) -> dict[str, float]:
    return {key: float(value) for key, _, value in (part.partition("=") for part in label.split(",")) if value}
