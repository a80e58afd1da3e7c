"""Composes a study's trials. Knows Hydra.

Hydra takes a quarter of a second a config, since it looks through all groups each time; what the configs of an arm
share is composed once here, and the arm's keys are set in a copy, by Hydra's own grammar and the same typed schema.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from harness.config import plain, resolve
from harness.overrides import explain
from harness.records import UsageError, digest
from harness.schema import FamilyConfig, Reference, RunConfig
from harness.search import Params, overrides_of

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
