"""Compose `conf/` into one typed, validated `RunConfig`, and compute `trial_id` from it.

Input: `conf/`, `sweeps/`, overrides -> output: `RunConfig`, or a `UsageError` with every problem. Imports no torch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from harness.arms import ARMS
from harness.devices import workers_here
from harness.records import UsageError, digest
from harness.schema import AccelerateConfig, RunConfig, TrackingConfig


def _shipped(folder: str, marker: str) -> Path:
    """Find a folder that stands at the top of a checkout and inside the package in a wheel."""
    here = Path(__file__).resolve().parent
    for place in (here.parent / folder, here / folder):
        if (place / marker).exists():
            return place
    raise UsageError(f"{folder}/{marker} is neither beside nor inside {here}; install the package again")


CONF = _shipped("conf", "sweep.yaml")
SWEEPS = _shipped("sweeps", "smoke.yaml")


def register_schemas() -> None:
    """Make the dataclasses known to Hydra, and every file in `sweeps/` selectable as `+sweep=NAME`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    store.store(group="tracking", name="schema", node=TrackingConfig)
    store.store(group="accelerate", name="schema", node=AccelerateConfig)
    for name, arm in ARMS.items():
        store.store(group="method", name=f"schema_{name}", node=arm.config)
    OmegaConf.register_new_resolver("harness_workers", workers_here, replace=True)
    for path in sorted(SWEEPS.glob("*.yaml")):
        node = cast(DictConfig, OmegaConf.load(path))
        store.store(group="sweep", name=path.stem, node=node, package="_global_", provider="sweeps/")


def load_run(overrides: list[str]) -> RunConfig:
    """Compose one run from the command line's overrides; what `harness.sweep` would refuse is a UsageError."""
    from harness.overrides import check_overrides  # it reads this module

    check_overrides(overrides)
    return compose_run(overrides)


def compose_run(overrides: list[str]) -> RunConfig:
    """Compose and validate one run; the overrides themselves are taken to be checked."""
    from harness.overrides import explain

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"), explain():
        composed = compose("sweep", overrides=overrides)
    return resolve(composed)


def resolve(composed: DictConfig) -> RunConfig:
    """Turn a composed config into a `RunConfig` with no open default left, or raise a `UsageError`."""
    from harness.profile import fill_from_profile  # these read this module
    from harness.validate import find_problems

    composed = copy.deepcopy(composed)
    with open_dict(composed):
        composed.pop("hydra", None)
    config = cast(RunConfig, OmegaConf.to_object(composed))
    fill_from_profile(config)
    problems = find_problems(config)
    if problems:
        raise UsageError("\n".join(problems))
    return config


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
