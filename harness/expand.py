"""From the command line to what it asks for: a space for each arm, the seeds, and what all trials share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.overrides import parse, selected_arms, values_of
from harness.profile import load_profile, profile_name
from harness.records import UsageError
from harness.search import is_interval


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        common: Hydra overrides that all trials share.
        spaces: for each arm its own keys: a list of values, or an interval.
        seeds: those that decide.
        tuning_seeds: those that configs are selected with, where an arm has several.
    """

    common: list[str]
    spaces: dict[str, dict[str, Any]]
    seeds: list[int]
    tuning_seeds: list[int]


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


def expand(arguments: Sequence[str], master: DictConfig) -> Request:
    """Read a study out of the command line and the master config, which holds the preset.

    Raises:
        UsageError: for seeds that would both tune and decide, or nothing to score.
    """
    parsed = parse(list(arguments))
    arms = selected_arms(parsed)
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {arm: _preset_space(master, arm) for arm in arms}
    profile = load_profile(profile_name(master))
    seeds: list[int] = list(master.seeds or profile["seeds"])
    common: list[str] = []
    for override in parsed:
        key = override.key_or_group
        if key == "method":
            continue
        if key == "seed":
            seeds = values_of(override)
        elif key.startswith("method."):
            shared[key.removeprefix("method.")] = _space(values_of(override))
        elif key.startswith("arms."):
            _, arm, name = key.split(".", 2)
            own[arm][name] = _space(values_of(override))
        else:
            common.append(str(override.input_line))
    if not master.evaluate:
        raise UsageError("evaluate=[]: nothing would be scored; give dev, golden or both, such as [dev,golden]")
    tuning_seeds = list(master.tuning_seeds or profile["tuning_seeds"])
    return Request(common, {arm: {**own[arm], **shared} for arm in arms}, list(dict.fromkeys(seeds)), tuning_seeds)


def _preset_space(master: DictConfig, arm: str) -> dict[str, Any]:
    space = OmegaConf.to_container(master.arms).get(arm) or {}  # type: ignore[union-attr]
    return {str(key): value if isinstance(value, list | dict) else [value] for key, value in space.items()}


def _space(values: Sequence[Any]) -> Any:
    """Return the values of one key as a list, or its interval."""
    if len(values) == 1 and is_interval(values[0]):
        return dict(values[0])
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def check_study(request: Request, sizes: Mapping[str, int], evaluate: Sequence[str], *, allow_unequal: bool) -> None:
    """Check what shows once the number of configs of each arm is known.

    Raises:
        UsageError: for arms with unequal or no configs, a selection without dev, or seeds that tune and decide.
    """
    for arm, size in sizes.items():
        if size == 0:
            raise UsageError(f"arms.{arm}: an empty list makes no trial; list one value or more, or leave the key out")
    if len(set(sizes.values())) > 1 and not allow_unequal:
        shown = ", ".join(f"{arm}: {size}" for arm, size in sizes.items())
        raise UsageError(
            f"unequal budgets ({shown} configs): the best of many beats the best of few by luck alone; give every arm "
            "the same number of configs, or set allow_unequal_budgets=true and the verdict will carry a warning"
        )
    tuned = [arm for arm, size in sizes.items() if size > 1]
    if tuned and "dev" not in evaluate:
        raise UsageError(
            f"evaluate=[{','.join(evaluate)}]: {tuned[0]} has {sizes[tuned[0]]} configs and they are selected on dev; "
            "add dev"
        )
    both = sorted(set(request.seeds) & set(request.tuning_seeds)) if tuned else []
    if both:
        raise UsageError(
            f"seed={','.join(map(str, request.seeds))} tuning_seeds=[{','.join(map(str, request.tuning_seeds))}]: "
            f"{', '.join(map(str, both))} would tune and decide; the selected config has been lucky with its tuning "
            "seeds, so that only fresh ones may decide: give other tuning_seeds"
        )
