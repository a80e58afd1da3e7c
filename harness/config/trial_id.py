"""Hash what determines a trial's result (`trial_id`), and name configs by their hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any

from harness.config.schema import RunConfig
from harness.study.files import digest


def trial_id(config: RunConfig, contents: dict[str, str]) -> str:
    """Hash what determines a trial's result, and nothing else.

    `contents` is the SHA-256 by name of what the config only names: base weights, data files, chat template.
    """
    return stored_trial_id(plain(config), contents)


def stored_trial_id(values: Mapping[str, Any], contents: Mapping[str, str]) -> str:
    """Return the same of a config as config.yaml holds it."""
    used = {key: value for key, value in values["method"].items() if key not in _DEFAULTS}
    parts = {
        "method": used,
        "train": {key: value for key, value in values["train"].items() if key not in NOT_IN_RESULT},
        "generate": values["generate"],
        "data": {key: value for key, value in values["data"].items() if key not in _PATHS},
        "seed": values["seed"],
        "contents": contents,
    }
    return digest(parts)[:12]


# Keys of `train` that change how long a trial takes, or what is warned of, and not what comes out.
NOT_IN_RESULT = {"threads", "checkpoint_steps", "collapse_learning_rate", "reuse_base", "metrics_steps", "reference"}
_DEFAULTS = {"learning_rates", "learning_rate_factor"}  # learning_rate holds the one that is used
_PATHS = {"path", "train", "dev", "golden", "revision", "max_bad_fraction"}


def plain(value: Any) -> Any:
    """Turn config objects into JSON values (enums by name)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def config_label(config: RunConfig) -> str:
    """Name a config by what may differ between configs of one arm, e.g. `beta=2,gamma_beta_ratio=0.5,lr=0.0001`."""
    method, parts = config.method, []
    for key in dataclasses.fields(method):
        value = getattr(method, key.name)
        if key.name in ("name", "learning_rates", "learning_rate_factor") or value is None:
            continue
        if not (key.metadata.get("quiet") and value == key.default):
            name = "lr" if key.name == "learning_rate" else key.name
            parts.append(f"{name}={value:g}")
    return ",".join(sorted(parts, key=lambda part: part.startswith("lr="))) or "base"
