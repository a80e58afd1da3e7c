"""Command line -> validated `RunConfig`; every stage checks the config before anything is loaded."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from harness.config import checkpoint
from harness.config.checkpoint_files import has_chat_template
from harness.config.compose import fill_defaults, register_schemas
from harness.config.keys import range_problems
from harness.config.overrides import check_overrides, explain
from harness.config.paths import CONF, expand_home, typed_home
from harness.config.schema import ALL_LINEAR, EMBEDDED, RunConfig, Tuning
from harness.data import inputs
from harness.data.inputs import Inputs
from harness.decide import study as decide
from harness.generate import vllm
from harness.score import scorers
from harness.study.errors import UnreachableError, UsageError
from harness.track import tracker
from harness.train import stage as train
from harness.train.weights import check_weights

_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def find_problems(config: RunConfig) -> list[str]:
    """Return one message per value that is out of range, missing, or impossible in combination."""
    stages = (
        checkpoint.problems, inputs.problems, tracker.problems, scorers.problems, decide.problems, vllm.problems,
        train.problems,
    )  # fmt: skip
    found = [*range_problems(config), *_folder_problems(config)]
    return found + [problem for problems in stages for problem in problems(config)]


def find_warnings(config: RunConfig) -> list[str]:
    """Return a message per setting that is allowed and yet likely to be regretted."""
    return list(train.setting_warnings(config))


def checkpoint_warnings(config: RunConfig, inputs: Inputs) -> list[str]:
    """Refuse a checkpoint that is not whole, or has no layers as asked for, before anything is trained.

    See `harness.train.weights` and `harness.train.adapter.check_targets`.

    Returns:
        Warnings, none for the embedded base, and for a Hub id that a plan cannot fetch.

    Raises:
        UsageError: names the tensors, or the layers.
    """
    has_targets = config.train.lora_targets != [ALL_LINEAR] and config.train.tuning is not Tuning.full
    if config.model.path == EMBEDDED and not has_targets:
        return []
    try:
        folder = inputs.checkpoints.folder(config.model, config.results_dir)
    except UnreachableError:
        if not config.plan:
            raise
        return []
    if has_targets:
        from harness.train.adapter import check_targets

        check_targets(config, folder)
    if config.model.path == EMBEDDED:
        return []
    about = [inputs.checkpoints.base_sha256(folder), inputs.checkpoints.tokenizer_sha256(folder)]
    cache = Path(config.results_dir) / ".cache"
    named = f"model.path={config.model.path}"
    found = check_weights(folder, named=named, about=about, cache=cache)
    if config.model.chat_template is None and not has_chat_template(folder):
        found.append(
            f"{named}: its tokenizer has no chat template, so that prompts are plain text to the model; where it was "
            "trained on chats, give its template (model.chat_template=FILE)"
        )
    return found


def _folder_problems(config: RunConfig) -> Iterator[str]:
    if config.study is not None and not _FOLDER_NAME.fullmatch(config.study):
        yield (
            f"study={config.study}: the name of a folder in results_dir: letters, digits, `_`, `-` and `.`, no `/`, "
            "no `.` or `-` at the beginning, at most 200 characters"
        )
    results = Path(config.results_dir)
    if not config.results_dir or (results.exists() and not results.is_dir()):
        yield f"results_dir={config.results_dir}: not a folder; give one, it is made where it does not exist"


def load_run(overrides: list[str]) -> RunConfig:
    """Compose one run from the command line's overrides.

    Raises:
        UsageError: for overrides that `harness.sweep` would refuse.
    """
    overrides = typed_home(overrides)
    check_overrides(overrides)
    return compose_run(overrides)


def compose_run(overrides: list[str]) -> RunConfig:
    """Compose and validate one run from overrides that were checked already."""
    with composing(), explain():
        composed = compose("sweep", overrides=overrides)
    return resolve(composed)


@contextlib.contextmanager
def composing() -> Iterator[None]:
    """Make `conf/` known to Hydra, unless it is already."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    register_schemas()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="harness"):
        yield


def resolve(composed: DictConfig) -> RunConfig:
    """Turn a composed config into a validated `RunConfig` with no open default left.

    Raises:
        UsageError: names each problem.
    """
    composed = copy.deepcopy(composed)
    with open_dict(composed):
        composed.pop("hydra", None)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    expand_home(config)
    fill_defaults(config)
    problems = find_problems(config)
    if problems:
        raise UsageError("\n".join(problems))
    return config
