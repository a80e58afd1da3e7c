"""Config -> trial id: a hash of all settings and contents that determine a trial's result, and of nothing else.

A trial id never changes. It is computed over the keys as they were named at commit b4b16c8 (`FIRST_KEYS`). A key that
was renamed or moved since then is hashed under its first name (`RENAMED`). A key that was added since then is hashed
only where it differs from the default that it had then (`ADDED`), so that stored trials keep their ids, also after a
default has changed. Settings in study.yaml have the same form.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Any

from harness.config.arms import declared_limits
from harness.config.schema import RunConfig
from harness.study.files import Json, digest

# Keys of each section at commit b4b16c8, in the order of study.yaml; `method` has one row per arm. Never change a row.
_BETA = ("name", "learning_rate", "beta")
_SIMPO = (*_BETA, "gamma_beta_ratio", "length_norm", "sft_weight")
FIRST_KEYS: dict[str, tuple[str, ...]] = {
    "method.dpo": _BETA,
    "method.dpo_norm": _BETA,
    "method.dpo_margin": (*_BETA, "gamma_beta_ratio"),
    "method.dpo_norm_margin": (*_BETA, "gamma_beta_ratio"),
    "method.simpo": _SIMPO,
    "method.simpo_no_margin": _SIMPO,
    "method.simpo_sum": _SIMPO,
    "method.simpo_sum_no_margin": _SIMPO,
    "method.sft": ("name", "learning_rate"),
    "train": (
        *("engine", "tuning", "lora_rank", "lora_alpha", "epochs", "batch_size", "micro_batch_size", "scheduler"),
        *("warmup_ratio", "weight_decay", "max_grad_norm", "precision", "gradient_checkpointing"),
        *("share_prefix", "completion_head", "fuse_adapters", "group_lengths"),
    ),
    "generate": ("backend", "max_new_tokens", "batch_size", "temperature", "top_p", "seed"),
    "data": (
        *("dev_fraction", "golden_fraction", "split_seed", "max_bad_fraction", "label_noise", "label_noise_seed"),
        *("max_train_pairs", "max_dev_prompts", "max_golden_prompts", "max_length", "template", "turns"),
    ),
    "search": ("sampler", "trials", "seed", "keep", "batch"),
}
# Path of today -> path at commit b4b16c8. A renamed key is added here; its first name stays in `FIRST_KEYS`.
RENAMED = {
    "train.levers.share_prefix": "train.share_prefix",
    "train.levers.completion_head": "train.completion_head",
    "train.levers.fuse_adapters": "train.fuse_adapters",
    "train.levers.group_lengths": "train.group_lengths",
    "train.levers.reuse_base": "train.reuse_base",
    "train.levers.metrics_steps": "train.metrics_steps",
}
# Path of a key that was added since -> its default then: what trials before it ran with. Never change a row.
ADDED: dict[str, Json] = {
    "generate.reasoning": "auto",
    "data.answer_check": None,
    "train.lora_dropout": 0.0,
    "train.lora_targets": ["all-linear"],
    "train.optimizer": "auto",
    "train.kernels": "none",
}
# Never hashed, under their first names: these change a trial's cost or its warnings, or name what `contents` holds.
NOT_HASHED = {
    *("train.threads", "train.checkpoint_minutes", "train.checkpoint_steps"),
    *("train.collapse_learning_rate", "train.reference"),
    *("train.reuse_base", "train.metrics_steps", "generate.vllm_python"),
    *("method.learning_rates", "method.learning_rate_factor"),  # learning_rate holds the product
    *("data.path", "data.train", "data.dev", "data.golden", "data.revision"),
}
# Section -> first names of the keys that study.yaml registers and that do not change a trial.
_HASHED_SECTIONS: dict[str, tuple[str, ...]] = {
    "method": (), "train": (), "generate": (), "data": ("max_bad_fraction",),
}  # fmt: skip


def trial_id(config: RunConfig, contents: Mapping[str, str]) -> str:
    """Return the trial id: the first 12 hex digits of a SHA-256.

    Args:
        config: a resolved config, with no open default.
        contents: SHA-256 by name of all files that the config only names: base weights, data files, chat template.
    """
    return _hash(plain(config), contents)


def stored_trial_id(values: Mapping[str, Any], contents: Mapping[str, str]) -> str:
    """Return the trial id of a config.yaml, as written by this version or by an older one.

    Raises:
        KeyError, TypeError, AttributeError: for values that are no config of a trial.
    """
    return _hash(values, contents)


def registered_section(config: RunConfig, section: str) -> dict[str, Json]:
    """Return a section of the config as study.yaml registers it: in the same form as in a trial id."""
    return stable_settings(section, plain(getattr(config, section)))


def _hash(values: Mapping[str, Any], contents: Mapping[str, str]) -> str:
    parts = {
        section: stable_settings(section, values[section], without=without)
        for section, without in _HASHED_SECTIONS.items()
    }
    found = digest({**parts, "seed": values["seed"], "contents": contents})[:12]
    sys.audit("harness.trial_id", found)
    return found


def stable_settings(section: str, values: Mapping[str, Json], *, without: Collection[str] = ()) -> dict[str, Json]:
    """Return a section's settings by first name: all of `FIRST_KEYS`, and each later key that differs from `ADDED`.

    Args:
        section: name of the section, such as `train`.
        values: plain settings of the section, under the names of today or of any older version.
        without: first names to leave out in addition to `NOT_HASHED`.
    """
    found = _by_first_name(section, values)
    first = FIRST_KEYS[f"method.{values['name']}"] if section == "method" else FIRST_KEYS[section]
    kept = [key for key in first if key in found]
    kept += [key for key in found if key not in first and not _is_as_before(f"{section}.{key}", found[key])]
    return {key: found[key] for key in kept if key not in without and f"{section}.{key}" not in NOT_HASHED}


def _is_as_before(path: str, value: Json) -> bool:
    """Return whether a later key has the value that trials before it ran with."""
    return path in ADDED and value == ADDED[path]


def _by_first_name(section: str, values: Mapping[str, Json]) -> dict[str, Json]:
    """Return the settings of a section and of the groups in it, each under the name that it had first."""
    start = f"{section}."
    return {RENAMED.get(path, path).removeprefix(start): value for path, value in _leaves(values, start)}


def _leaves(values: Mapping[str, Json], start: str) -> Iterator[tuple[str, Json]]:
    for key, value in values.items():
        path = f"{start}{key}"
        if isinstance(value, Mapping) and path not in NOT_HASHED:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def plain(value: Any) -> Any:
    """Turn config objects into JSON values; an enum becomes its value."""
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
    """Name a config by the hyperparameters of its arm, for example `beta=2,gamma_beta_ratio=0.5,lr=0.0001`."""
    method, parts = config.method, []
    for key in dataclasses.fields(method):
        value = getattr(method, key.name)
        if key.name in ("name", "learning_rates", "learning_rate_factor") or value is None:
            continue
        if not (declared_limits(key).quiet and value == key.default):
            name = "lr" if key.name == "learning_rate" else key.name
            parts.append(f"{name}={value:g}")
    return ",".join(sorted(parts, key=lambda part: part.startswith("lr="))) or "base"
