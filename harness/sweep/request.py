"""From the command line to what it asks for: a space for each arm, the seeds, and what all trials share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from harness.config.arms import ARMS
from harness.config.compose import load_profile, profile_name
from harness.config.overrides import explain, parse, selected_arms, values_of
from harness.config.schema import FamilyConfig, Reference, RunConfig, Tuning
from harness.config.search import Params, Space, is_interval, overrides_of
from harness.config.trial_id import config_label, plain
from harness.study.errors import UsageError
from harness.study.files import digest
from harness.sweep.problems import resolve


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


_NONE = FamilyConfig()


class Composer:
    """Composes configs, and remembers by which overrides."""

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        self._loader, self._config = loader, config
        self._shared: dict[tuple[str, ...], DictConfig] = {}
        self._known: dict[str, list[str]] = {}

    def compose(self, common: Sequence[str], params: Params | None = None) -> RunConfig:
        """Compose and validate one trial.

        Args:
            common: overrides that many trials share.
            params: the keys of its method.

        Raises:
            UsageError: names each problem.
        """
        typed = overrides_of(params or {})
        with explain():
            config = resolve(self._with(common, typed) or self._load([*common, *typed]))
        self._known[_key(config)] = [*common, *typed]
        return config

    def compose_all(self, jobs: Sequence[tuple[Sequence[str], Params]]) -> list[RunConfig]:
        """Compose many; a UsageError names the problems of all of them."""
        configs, problems = [], []
        for common, params in jobs:
            try:
                configs.append(self.compose(common, params))
            except UsageError as error:
                problems += str(error).splitlines()
        if problems:
            raise UsageError("\n".join(dict.fromkeys(problems)))
        return configs

    def overrides(self, trial: RunConfig) -> list[str]:
        """Return the overrides that composed a trial's config; its seed may be another by now."""
        return self._known[_key(trial)]

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        return self._loader.load_sweep_config(self._config, list(overrides))

    def _with(self, common: Sequence[str], typed: Sequence[str]) -> DictConfig | None:
        """Set keys in a copy of what is shared; None where they cannot be set: Hydra then says why."""
        if tuple(common) not in self._shared:
            shared = self._load(common)
            with open_dict(shared):
                shared.pop("hydra")
            self._shared[tuple(common)] = shared
        found = copy.deepcopy(self._shared[tuple(common)])
        try:
            for override in OverridesParser.create().parse_overrides(list(typed)):
                OmegaConf.update(found, override.key_or_group, override.value(), merge=True)
        except (HydraException, OmegaConfBaseException):
            return None
        return found


def _key(trial: RunConfig) -> str:
    """Name what distinguishes the configs of one command; the protocol sets the other keys of each trial."""
    train, generate = replace(trial.train, reference=Reference.cached), replace(trial.generate, backend=None)
    given = replace(trial, train=train, generate=generate, seed=0, study=None, evaluate=[], cost_name="", family=_NONE)
    return digest(plain(given))


Make = Callable[[str, Params], RunConfig]


@dataclass
class Design:
    """The plan of a study; configs that a sampler suggests later are added while it tunes.

    Attributes:
        base: the SFT base as a trial of its own.
        arms: the configs of each arm, with whatever seed.
        spaces: what they were taken from, by arm.
        seeds: those that decide; fresh ones where configs are tuned.
        tuning_seeds: those that configs are selected with.
        make: composes a config of an arm.
    """

    base: RunConfig
    arms: dict[str, list[RunConfig]]
    spaces: Mapping[str, Space]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    make: Make
    evaluate: Sequence[str] = field(default=("dev", "golden"))

    @property
    def any(self) -> RunConfig:
        """A config that stands for all: what is not the method's is equal in all of them."""
        return next((configs[0] for configs in self.arms.values() if configs), self.base)

    @property
    def suggests(self) -> bool:
        """Whether a sampler suggests configs while others are trained."""
        return self.any.search.sampler == "tpe"

    @property
    def tuned(self) -> list[str]:
        """The arms whose config is selected on dev."""
        return [arm for arm, configs in self.arms.items() if self.suggests or len(configs) > 1]

    def labels(self) -> dict[str, list[str]]:
        """Return the configs' labels by arm."""
        return {arm: [config_label(config) for config in configs] for arm, configs in self.arms.items()}

    def tuning(self, configs: Mapping[str, Sequence[RunConfig]], seeds: Sequence[int]) -> list[RunConfig]:
        """Return trials that answer dev only: seed by seed, the arms side by side."""
        return _trials(configs, seeds, ["dev"])

    def deciding(self, configs: Mapping[str, RunConfig], seeds: Sequence[int]) -> list[RunConfig]:
        """Return the trials that decide: one config an arm; those that were tuned have had their look at dev."""
        found = []
        for trial in _trials({arm: [config] for arm, config in configs.items()}, seeds, list(self.evaluate)):
            splits = [split for split in self.evaluate if split == "golden" or trial.method.name not in self.tuned]
            found += [replace(trial, evaluate=splits)] if splits else []
        return found


def _trials(configs: Mapping[str, Sequence[RunConfig]], seeds: Iterable[int], evaluate: list[str]) -> list[RunConfig]:
    longest = max(map(len, configs.values()), default=0)
    return [
        replace(configs[arm][i], seed=seed, evaluate=evaluate)
        for seed in dict.fromkeys(seeds)
        for i in range(longest)
        for arm in configs
        if i < len(configs[arm])
    ]


def cost_trials(design: Design, selected: Mapping[str, RunConfig]) -> list[RunConfig]:
    """Return the trials, with the first deciding seed; none where `measure_costs` is off.

    They train and answer nothing. Full fine-tuning has no adapter to switch off.
    """
    if not design.any.measure_costs:
        return []
    found = []
    for arm, config in selected.items():
        ways = list(Reference) if ARMS[arm].uses_reference else [Reference.cached]
        if config.train.tuning is Tuning.full:
            ways = [way for way in ways if way is not Reference.adapter_off]
        for way in ways:
            train = replace(config.train, reference=way)
            name = f"{arm}-{way.value}" if ARMS[arm].uses_reference else arm
            found.append(replace(config, train=train, seed=design.seeds[0], evaluate=[], cost_name=name))
    return found
