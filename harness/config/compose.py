"""Schemas and defaults of configs: what Hydra composes from, and the values of keys that were left null."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from harness.config.arms import ARMS
from harness.config.machine import Machine
from harness.config.paths import CONF, SWEEPS
from harness.config.schema import EMBEDDED, AccelerateConfig, RunConfig, TrackingConfig, Tuning

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # twenty times faster; one file is read per config


class Defaults(TypedDict):
    """A file of `conf/profile/`: learning rates by arm and tuning, and values of the keys of two sections."""

    seeds: list[int]
    tuning_seeds: list[int]
    learning_rates: dict[str, dict[str, float]]
    train: dict[str, float]
    generate: dict[str, float]


def load_defaults(config: RunConfig | DictConfig) -> Defaults:
    """Read the defaults of a config's model: those of the embedded study, or those of your own model."""
    name = "embedded" if config.model.path == EMBEDDED else "own"
    values: Defaults = yaml.load((CONF / "profile" / f"{name}.yaml").read_text(encoding="utf-8"), _Loader)
    values.setdefault("learning_rates", {})
    return values


def fill_defaults(config: RunConfig) -> None:
    """Set every key that is null from the defaults, then the learning rate from the arm's published ones."""
    defaults = load_defaults(config)
    config.seeds = config.seeds or defaults["seeds"]
    config.tuning_seeds = config.tuning_seeds or defaults["tuning_seeds"]
    for target, values in ((config.train, defaults["train"]), (config.generate, defaults["generate"])):
        for key, value in values.items():
            if getattr(target, key) is None:
                setattr(target, key, value)
    if config.generate.backend is None:
        config.generate.backend = "vllm" if vllm_problem(config) is None else "transformers"
    method = config.method
    if method.learning_rate is None:
        rates = defaults["learning_rates"].get(method.name, method.learning_rates)
        method.learning_rate = rates.get("full" if config.train.tuning is Tuning.full else "lora")
    if method.learning_rate is not None:
        method.learning_rate *= method.learning_rate_factor
        method.learning_rate_factor = 1.0  # it is in the rate now


def vllm_problem(config: RunConfig) -> str | None:
    """Say why vLLM cannot answer for this config, or None where it can; imports neither vLLM nor torch."""
    if config.train.tuning is Tuning.qlora:
        return "vLLM would answer with the whole base, and train.tuning=qlora trains on one in 4 bits"
    if config.train.tuning is not Tuning.lora:
        return "vLLM loads all adapters of a study onto one base, and train.tuning=full makes no adapters"
    if config.model.path == EMBEDDED:
        return "the embedded model is too small for vLLM's kernels"
    return _vllm_missing(config.generate.vllm_python)


def _vllm_missing(python: str | None) -> str | None:
    if python is not None and shutil.which(python) is None:
        return f"generate.vllm_python={python} is no program; give the path of the interpreter that has vLLM"
    if python is None and find_spec("vllm") is None:
        return (
            "vLLM is not installed (pip install 'dpo-simpo-harness[vllm]', or in an environment of its own: "
            "generate.vllm_python=PATH)"
        )
    if not (Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()):
        return "no GPU is there"
    return None


def register_schemas() -> None:
    """Register the dataclasses with Hydra, and every file in `sweeps/` as a choice of `+sweep=NAME`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    store.store(group="tracking", name="schema", node=TrackingConfig)
    store.store(group="accelerate", name="schema", node=AccelerateConfig)
    for name, arm in ARMS.items():
        store.store(group="method", name=f"schema_{name}", node=arm.config)
    OmegaConf.register_new_resolver("harness_workers", lambda count: Machine.here().workers(count), replace=True)
    for path in sorted(SWEEPS.glob("*.yaml")):
        node = OmegaConf.load(path)
        assert isinstance(node, DictConfig)
        store.store(group="sweep", name=path.stem, node=node, package="_global_", provider="sweeps/")


def config_from(values: Mapping[str, Any]) -> RunConfig:
    """Return the config that `plain` turned into JSON values."""
    declared = OmegaConf.structured(RunConfig(method=ARMS[values["method"]["name"]].config()))
    config = OmegaConf.to_object(OmegaConf.merge(declared, dict(values)))
    assert isinstance(config, RunConfig)
    return config
