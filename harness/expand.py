"""From the command line to the trials: an arm's keys are expanded for that arm only, seeds for all arms alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.overrides import parse, selected_arms, values_of
from harness.profile import load_profile, profile_name
from harness.records import UsageError

Space = dict[str, list[Any]]


@dataclass(frozen=True)
class Job:
    """One trial as Hydra overrides; `base_overrides` make the SFT base's own trial of the same study."""

    arm: str
    overrides: list[str]
    base_overrides: list[str]


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Prepare arguments for Hydra's multirun: options first, and what belongs to trials marked as an axis.

    Hydra applies an override with one value to the master config, which has no method yet; `choice(...)` keeps it for
    the trials.
    """
    options = [argument for argument in arguments if argument.startswith("-")]
    fixed = []
    for override in parse([argument for argument in arguments if not argument.startswith("-")]):
        key, line = override.key_or_group, override.input_line or ""
        if key == "method" or key.startswith(("method.", "arms.")) or key == "seed":
            name, _, value = line.partition("=")
            name = "+method" if key == "method" else name.lstrip("+")
            line = f"{name}={value}" if override.is_sweep_override() else f"{name}=choice({value})"
        fixed.append(line)
    return [*options, "hydra/sweeper=paired", *fixed]


def expand(arguments: Sequence[str], master: DictConfig) -> list[Job]:
    """Return all trials, seed by seed with the arms side by side, so that a sweep that stops early is still paired.

    Raises:
        UsageError: where arms have unequal numbers of configs and `allow_unequal_budgets` is not set.
    """
    parsed = parse(list(arguments))
    arms = selected_arms(parsed)
    shared: Space = {}
    own: dict[str, Space] = {arm: _preset_space(master, arm) for arm in arms}
    seeds: list[int] = list(master.seeds or load_profile(profile_name(master))["seeds"])
    common: list[str] = []
    for override in parsed:
        key = override.key_or_group
        if key == "method":
            continue
        if key == "seed":
            seeds = values_of(override)
        elif key.startswith("method."):
            shared[key.removeprefix("method.")] = _flat(values_of(override))
        elif key.startswith("arms."):
            _, arm, name = key.split(".", 2)
            own[arm][name] = _flat(values_of(override))
        else:
            common.append(str(override.input_line))
    configs = {arm: _configs({**own[arm], **shared}) for arm in arms}
    _check_budgets({arm: len(found) for arm, found in configs.items()}, allowed=bool(master.allow_unequal_budgets))
    _check_selectable(configs, list(master.evaluate))
    base = [*common, "+method=sft", "seed=0"]
    longest = max(map(len, configs.values()))
    return [
        Job(arm, [*common, f"+method={arm}", *configs[arm][i], f"seed={seed}"], base)
        for seed in dict.fromkeys(seeds)
        for i in range(longest)
        for arm in arms
        if i < len(configs[arm])
    ]


def _preset_space(master: DictConfig, arm: str) -> Space:
    space = OmegaConf.to_container(master.arms).get(arm) or {}  # type: ignore[union-attr]
    return {str(key): value if isinstance(value, list) else [value] for key, value in space.items()}


def _flat(values: Sequence[Any]) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _configs(space: Space) -> list[list[str]]:
    axes = [[f"method.{key}={value}" for value in dict.fromkeys(values)] for key, values in space.items()]
    return [list(config) for config in itertools.product(*axes)]


def _check_selectable(configs: dict[str, list[list[str]]], evaluate: list[str]) -> None:
    if not evaluate:
        raise UsageError("evaluate=[]: nothing would be scored; give dev, golden or both, such as [dev,golden]")
    for arm, found in configs.items():
        if len(found) > 1 and "dev" not in evaluate:
            raise UsageError(
                f"evaluate=[{','.join(evaluate)}]: {arm} has {len(found)} configs and they are selected on dev; add dev"
            )


def _check_budgets(sizes: dict[str, int], *, allowed: bool) -> None:
    for arm, size in sizes.items():
        if size == 0:
            raise UsageError(f"arms.{arm}: an empty list makes no trial; list one value or more, or leave the key out")
    if len(set(sizes.values())) > 1 and not allowed:
        shown = ", ".join(f"{arm}: {size}" for arm, size in sizes.items())
        raise UsageError(
            f"unequal budgets ({shown} configs): the best of many beats the best of few by luck alone; give every arm "
            "the same number of configs, or set allow_unequal_budgets=true and the verdict will warn"
        )
