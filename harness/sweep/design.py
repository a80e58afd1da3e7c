"""From the command line to the trials of a study: Request (what is typed) -> Design (configs and trials with identity).

A command line asks for one study, or for a family of studies that differ in one key.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.arms import ARMS
from harness.config.compose import load_defaults
from harness.config.overrides import explain, is_axis, is_hydra, selected_arms, values_of
from harness.config.schema import Reference, RunConfig, Tuning
from harness.config.search import Params, Space, configs_of, is_interval, overrides_of
from harness.config.trial_id import config_label, trial_id
from harness.data.inputs import Inputs
from harness.study.errors import UsageError
from harness.study.integrity import SPLITS
from harness.sweep.problems import find_warnings, resolve
from harness.sweep.trial import Trial


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        common: Hydra overrides that all trials share.
        spaces: for each arm its own keys: a list of values, or an interval.
        seeds: those that decide.
        tuning_seeds: those that configs are selected with, where an arm has several.
        has_seeds, has_tuning_seeds: whether the command or its preset gives them; else they are defaults.
    """

    common: list[str]
    spaces: dict[str, dict[str, Any]]
    seeds: list[int]
    tuning_seeds: list[int]
    has_seeds: bool = False
    has_tuning_seeds: bool = False


def shared_overrides(parsed: Sequence[Override]) -> list[str]:
    """Return the overrides that all trials share: those that are no axis of the sweep."""
    return [
        str(override.input_line)
        for override in parsed
        if not is_axis(override.key_or_group) and override.key_or_group != "method"
    ]


def expand(parsed: Sequence[Override], master: DictConfig) -> Request:
    """Return the search space per arm, the seeds and the shared overrides of a command line.

    Args:
        parsed: the command line, parsed by Hydra's grammar.
        master: the config composed from the shared overrides, preset included.
    """
    arms = selected_arms(list(parsed))
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {arm: _preset_space(master, arm) for arm in arms}
    profile = load_defaults(master)
    seeds: list[int] = list(master.seeds or profile["seeds"])
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
    common = [line for line in shared_overrides(parsed) if not is_hydra(line.lstrip("+"))]
    tuning_seeds = list(master.tuning_seeds or profile["tuning_seeds"])
    return Request(
        common,
        {arm: {**own[arm], **shared} for arm in arms},
        list(dict.fromkeys(seeds)),
        tuning_seeds,
        has_seeds=bool(master.seeds) or any(override.key_or_group == "seed" for override in parsed),
        has_tuning_seeds=bool(master.tuning_seeds),
    )


def _preset_space(master: DictConfig, arm: str) -> dict[str, Any]:
    space = OmegaConf.to_container(master.arms).get(arm) or {}  # type: ignore[union-attr]
    return {str(key): value if isinstance(value, list | dict) else [value] for key, value in space.items()}


def _space(values: Sequence[Any]) -> Any:
    """Return the values of one key as a list, or its interval."""
    if len(values) == 1 and is_interval(values[0]):
        return dict(values[0])
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def check_sizes(sizes: Mapping[str, int], *, allow_unequal: bool) -> None:
    """Check the number of configs per arm.

    Raises:
        UsageError: for arms with unequal or no configs.
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


def check_seeds(design: Design) -> None:
    """Check the seeds of a study.

    Raises:
        UsageError: for seeds that tune and decide, or looks at other numbers of seeds than there are.
    """
    both = sorted(set(design.seeds) & set(design.tuning_seeds)) if design.tuned else []
    if both:
        raise UsageError(
            f"seed={','.join(map(str, design.seeds))} tuning_seeds=[{','.join(map(str, design.tuning_seeds))}]: "
            f"{', '.join(map(str, both))} would tune and decide; the selected config has been lucky with its tuning "
            "seeds, so that only fresh ones may decide: give other tuning_seeds"
        )
    _check_looks(design)


class Composer:
    """Compose the configs of a sweep; the part that configs of an arm share is composed by Hydra once."""

    def __init__(self) -> None:
        self._shared: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, common: Sequence[str], params: Params | None = None) -> RunConfig:
        """Compose and validate one config.

        Args:
            common: overrides that many configs share.
            params: the keys of its method.

        Raises:
            UsageError: names each problem.
        """
        typed = overrides_of(params or {})
        with explain():
            return resolve(self._with(common, typed) or compose("sweep", [*common, *typed]))

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

    def _with(self, common: Sequence[str], typed: Sequence[str]) -> DictConfig | None:
        """Set keys in a copy of the shared part; None if that fails: Hydra then says why."""
        if tuple(common) not in self._shared:
            self._shared[tuple(common)] = compose("sweep", list(common))
        found = copy.deepcopy(self._shared[tuple(common)])
        try:
            for override in OverridesParser.create().parse_overrides(list(typed)):
                OmegaConf.update(found, override.key_or_group, override.value(), merge=True)
        except (HydraException, OmegaConfBaseException):
            return None
        return found


@dataclass(frozen=True)
class Family:
    """The place of a study in a family of studies that differ in one key.

    Attributes:
        key: such as `data.label_noise`.
        values: of the family.
        name: of the family.
        value: of this study.
    """

    key: str
    values: list[float]
    name: str
    value: float


@dataclass
class Design:
    """The plan of a study; configs that a sampler suggests later are added while it tunes.

    Attributes:
        base_config: the SFT base as a config; its `study` is the study's name.
        arms: the configs per arm, with whatever seed.
        spaces: the search space per arm.
        seeds: those that decide; fresh ones where configs are tuned.
        tuning_seeds: those that configs are selected with.
        inputs: splits, token ids and hashes.
        composer: composes further configs.
        common: overrides that all trials share.
        family: None for a study of its own.
    """

    base_config: RunConfig
    arms: dict[str, list[RunConfig]]
    spaces: Mapping[str, Space]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    inputs: Inputs
    composer: Composer = field(default_factory=Composer)
    common: Sequence[str] = ()
    family: Family | None = None
    _trials: dict[tuple[str, str, int], Trial] = field(default_factory=dict)
    _contents: dict[str, str] = field(default_factory=dict)

    @property
    def any(self) -> RunConfig:
        """A config that stands for all: what is not the method's is equal in all of them."""
        return next((configs[0] for configs in self.arms.values() if configs), self.base_config)

    @property
    def study(self) -> Path:
        """The study's folder."""
        return self.base_config.study_folder

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

    def contents(self) -> dict[str, str]:
        """Return the hashes of what configs only name (base weights, data files), which all trials share.

        Raises:
            UnreachableError: if they cannot be fetched here.
        """
        if not self._contents:
            self._contents |= self.inputs.contents(self.any)
        return self._contents

    def trial(self, config: RunConfig, seed: int, splits: Sequence[str]) -> Trial:
        """Return a config with a seed as a trial; its identity is computed at the first call."""
        key = (config.method.name, config_label(config), seed)
        if key not in self._trials:
            config = replace(config, seed=seed)
            identity = trial_id(config, self.contents())
            folder = self.study / "trials" / identity if ARMS[config.method.name].trainer else self.study / "base"
            self._trials[key] = Trial(config, identity, folder, tuple(splits))
        return replace(self._trials[key], splits=tuple(splits))

    @property
    def base(self) -> Trial:
        """The SFT base as a trial, which proves the losses of all arms that are known by now."""
        base = self.trial(self.base_config, self.base_config.seed, SPLITS)
        return replace(base, proves=tuple(config.method for configs in self.arms.values() for config in configs))

    def make(self, arm: str, params: Params) -> RunConfig:
        """Compose a config that a sampler suggests."""
        return replace(self.composer.compose([*self.common, f"+method={arm}"], params), study=self.base_config.study)

    def tuning(self, configs: Mapping[str, Sequence[RunConfig]], seeds: Iterable[int]) -> list[Trial]:
        """Return trials that answer dev only: seed by seed, the arms side by side."""
        return [self.trial(config, seed, ["dev"]) for config, seed in ordered(configs, seeds)]

    def deciding(self, configs: Mapping[str, RunConfig], seeds: Iterable[int]) -> list[Trial]:
        """Return the trials that decide: one config per arm; tuned arms have answered dev already."""
        tuned = self.tuned
        return [
            self.trial(config, seed, ["golden"] if arm in tuned else SPLITS)
            for seed in dict.fromkeys(seeds)
            for arm, config in configs.items()
        ]

    def cost_trials(self, selected: Mapping[str, RunConfig]) -> list[Trial]:
        """Return the trials of `measure_costs`, with the first deciding seed: they train and answer nothing.

        An arm with a reference is trained with each way to it; full fine-tuning has no adapter to switch off.
        """
        if not self.any.measure_costs:
            return []
        found = []
        for arm, config in selected.items():
            ways = list(Reference) if ARMS[arm].uses_reference else [Reference.cached]
            if config.train.tuning is Tuning.full:
                ways = [way for way in ways if way is not Reference.adapter_off]
            trial = self.trial(config, self.seeds[0], [])
            for way in ways:
                name = f"{arm}-{way.value}" if ARMS[arm].uses_reference else arm
                changed = replace(trial.config, train=replace(config.train, reference=way))
                found.append(replace(trial, config=changed, folder=self.study / "costs" / name, cost_name=name))
        return found

    def in_study(self, name: str, family: Family | None = None) -> Design:
        """Return the same design under the name of a study."""
        arms = {arm: [replace(config, study=name) for config in found] for arm, found in self.arms.items()}
        base = replace(self.base_config, study=name)
        return replace(self, base_config=base, arms=arms, family=family, _trials={})


def single_trial(config: RunConfig, splits: Sequence[str] = SPLITS, *, inputs: Inputs | None = None) -> Trial:
    """Return one config with its seed as a trial, outside of any sweep; `config.study` names its study."""
    return Design(config, {}, {}, [], [], inputs or Inputs()).trial(config, config.seed, splits)


def ordered(configs: Mapping[str, Sequence[RunConfig]], seeds: Iterable[int]) -> list[tuple[RunConfig, int]]:
    """Return each config with each seed: seed by seed, the arms side by side."""
    longest = max(map(len, configs.values()), default=0)
    return [
        (configs[arm][i], seed)
        for seed in dict.fromkeys(seeds)
        for i in range(longest)
        for arm in configs
        if i < len(configs[arm])
    ]


def designs_of(
    request: Request,
    master: DictConfig,
    composer: Composer,
    inputs: Inputs,
    study_name: Callable[[RunConfig, Inputs], str],
    seeds_of: Callable[[Request, Path], Request] = lambda request, study: request,
) -> Iterator[Design]:
    """Yield the design of each study: one, or one per value of the family's key.

    Args:
        request: the command line.
        master: the composed config that trials share.
        composer: composes the configs.
        inputs: splits, token ids and hashes.
        study_name: names the study of a config.
        seeds_of: puts in what the request leaves out and the study of a folder has registered.
    """

    def seeded(design: Design) -> Design:
        found = seeds_of(request, design.study)
        design = replace(design, seeds=found.seeds, tuning_seeds=found.tuning_seeds)
        check_seeds(design)
        return design

    key, values = master.family.key, list(master.family["values"])
    if not key:
        design = _design(request, [], composer, inputs)
        yield seeded(design.in_study(study_name(design.any, inputs)))
        return
    family = ""
    for value in values:
        design = _design(request, [f"{key}={value}"], composer, inputs)
        family = family or f"{study_name(design.any, inputs)}-{str(key).rpartition('.')[2]}"
        yield seeded(design.in_study(f"{family}-{value:g}", Family(str(key), values, family, value)))


def _design(request: Request, fixed: Sequence[str], composer: Composer, inputs: Inputs) -> Design:
    common = [*request.common, *fixed]
    base = composer.compose([*common, "+method=sft", "seed=0"])
    arms = {}
    for arm, space in request.spaces.items():
        for key, values in space.items():
            if is_interval(values):  # values between two allowed ends are allowed
                rest = {k: v[0] if not is_interval(v) else v["low"] for k, v in space.items()}
                composer.compose([*common, f"+method={arm}"], rest | {key: values["high"]})
        found = configs_of(arm, space, base.search)
        arms[arm] = composer.compose_all([([*common, f"+method={arm}"], params) for params in found])
    suggested = base.search.trials or 0 if base.search.sampler == "tpe" else 0
    sizes = {arm: suggested or len(found) for arm, found in arms.items()}
    check_sizes(sizes, allow_unequal=base.allow_unequal_budgets)
    return Design(base, arms, request.spaces, request.seeds, request.tuning_seeds, inputs, composer, common)


def _check_looks(design: Design) -> None:
    looks = design.base_config.decide.looks
    if looks and (looks != sorted(looks) or looks[-1] != len(design.seeds)):
        raise UsageError(
            f"decide.looks=[{','.join(map(str, looks))}]: numbers of seeds in rising order, the last one all "
            f"{len(design.seeds)} seeds (seed={','.join(map(str, design.seeds))})"
        )


def warnings_of(design: Design) -> list[str]:
    """Return the warnings on a study's configs, each once."""
    configs = [config for found in design.arms.values() for config in found]
    return list(dict.fromkeys(warning for config in configs for warning in find_warnings(config)))
