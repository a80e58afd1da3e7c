"""Make the project's own Hydra plugins known: the sweeper, and the launcher for Ray.

Hydra accepts plugin classes under `hydra_plugins.*` only, and does not find an installed package of that name in an
editable install (hydra issue 2359): the classes are put there when the command starts.
"""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from harness.raylauncher import RayLauncher
from harness.sweeper import PairedSweeper

_PLUGINS = {"harness_sweeper": PairedSweeper, "harness_launcher": RayLauncher}


@dataclass
class SweeperConfig:
    """Selects the sweeper in Hydra's config."""

    _target_: str = "hydra_plugins.harness_sweeper.PairedSweeper"


def register_plugins() -> None:
    """Put the classes where Hydra looks, and the sweeper's config into its store."""
    try:
        parent = importlib.import_module("hydra_plugins")
    except ImportError:
        parent = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        parent.__path__ = []
    for name, plugin in _PLUGINS.items():
        alias = f"hydra_plugins.{name}"
        module = types.ModuleType(alias)
        setattr(module, plugin.__name__, plugin)
        sys.modules[alias] = module
        setattr(parent, name, module)
        plugin.__module__ = alias
        Plugins.instance().register(plugin)
    ConfigStore.instance().store(group="hydra/sweeper", name="paired", node=SweeperConfig, provider="harness")
