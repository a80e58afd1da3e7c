"""What a study will train: its configs by arm, the seeds that tune and the seeds that decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from harness.config import config_label
from harness.schema import RunConfig
from harness.search import Params, Space

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
