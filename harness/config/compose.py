"""Values for config keys that are left null: those of the embedded study, or of your own model (`conf/profile/`)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from harness.config.arms import ARMS
from harness.config.machine import workers_here
from harness.config.paths import CONF, SWEEPS
from harness.config.schema import EMBEDDED, AccelerateConfig, RunConfig, TrackingConfig, Tuning


def profile_name(config: RunConfig | DictConfig) -> str:
    """Name the profile whose values fill keys that were left null: `embedded`, or `own` for your model."""
    return "embedded" if config.model.path == EMBEDDED else "own"


def load_profile(name: str) -> dict[str, Any]:
    """Read `conf/profile/NAME.yaml`."""
    return copy.deepcopy(_read(name))


@cache  # each config of a sweep is filled from it
def _read(name: str) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(CONF / "profile" / f"{name}.yaml")))


def fill_from_profile(config: RunConfig) -> None:
    """Set every key that is null from the profile, then the learning rate from the arm's published ones."""
    profile = load_profile(profile_name(config))
    rates = profile.pop("learning_rates", {}).get(config.method.name, config.method.learning_rates)
    for section, values in profile.items():
        target = getattr(config, section)
        if not dataclasses.is_dataclass(target):
            if target is None:
                setattr(config, section, values)
            continue
        for key, value in values.items():
            if getattr(target, key) is None:
                setattr(target, key, value)
    if config.generate.backend is None:
        config.generate.backend = "vllm" if vllm_problem(config) is None else "transformers"
    if config.method.learning_rate is None:
        config.method.learning_rate = rates.get("full" if config.train.tuning is Tuning.full else "lora")
    if config.method.learning_rate is not None:
        config.method.learning_rate *= config.method.learning_rate_factor
        config.method.learning_rate_factor = 1.0  # it is in the rate now


def vllm_problem(config: RunConfig) -> str | None:
    """Say why vLLM cannot answer for this config, or None where it can; imports neither vLLM nor torch."""
    if config.train.tuning is Tuning.qlora:
        return "vLLM would answer with the whole base, and train.tuning=qlora trains on one in 4 bits"
    if config.train.tuning is not Tuning.lora:
        return "vLLM loads all adapters of a study onto one base, and train.tuning=full makes no adapters"
    if config.model.path == EMBEDDED:
        return "the embedded model is too small for vLLM's kernels"
    if find_spec("vllm") is None:
        return "vLLM is not installed (pip install 'dpo-simpo-harness[vllm]')"
    if not (Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()):
        return "no GPU is there"
    return None


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


def config_from(values: Mapping[str, Any]) -> RunConfig:
    """Return the config that `plain` turned into JSON values."""
    declared = OmegaConf.structured(RunConfig(method=ARMS[values["method"]["name"]].config()))
    return cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(declared, dict(values))))
