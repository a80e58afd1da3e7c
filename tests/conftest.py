"""Fixtures: the embedded study's real model and pairs, small configs of it, and a study folder in `tmp_path`."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the tiny model is faster on one thread, and far steadier on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"

# The embedded study, shrunk until a trial takes about two seconds.
SMALL = [
    "data.max_train_pairs=16",
    "data.max_dev_prompts=12",
    "data.max_golden_prompts=24",
    "train.epochs=1",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "generate.max_new_tokens=12",
    "tracking=none",
]


def overriding(defaults: list[str], *overrides: str) -> list[str]:
    """Return overrides with one for each key, the last: the command line refuses a key that stands twice."""
    return list({override.partition("=")[0]: override for override in [*defaults, *overrides]}.values())


def training_overrides(*overrides: str) -> list[str]:
    """Return the overrides of a run of some steps, two micro-batches each, and those given in their place."""
    defaults = ["train.epochs=1", "train.batch_size=4", "train.micro_batch_size=2", "tracking=none"]
    return overriding(defaults, *overrides)


def tiny_model(config_class: Any = None, model_class: Any = None, **more: Any) -> Any:
    """Return an untrained model of two layers (default: a Llama), the same each time; `more` changes its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = (config_class or LlamaConfig)(**{**sizes, **heads, **more})
    return (model_class or LlamaForCausalLM)(config).eval()


@functools.cache
def inputs() -> Any:
    """Return the inputs that all tests of this process share: a data set is read and tokenised once."""
    from harness.data.inputs import Inputs

    return Inputs()


def splits_of(config: Any) -> Any:
    """Return the splits of a config."""
    return inputs().splits(config)


def tokens_of(config: Any) -> Any:
    """Return the token ids of a config's splits."""
    return inputs().tokens(config)


def load_base(config: Any) -> Any:
    """Load the base of a config."""
    from harness.train import base

    return base.load_base(config, inputs().checkpoints.folder(config.model))


def new_bases() -> Any:
    """Return an empty base cache."""
    from harness.train.base import Bases

    return Bases(inputs().checkpoints.folder)


def borrowed_base(config: Any) -> Any:
    """Lend the base of a config, loaded for this purpose."""
    return new_bases().borrow_base(config)


def run_one(config: Any, splits: tuple[str, ...]) -> Any:
    """Run one config as a trial that answers these splits, in a context of its own."""
    from harness.sweep.design import single_trial
    from harness.sweep.stages import run_trial
    from harness.sweep.trial import Context

    return run_trial(single_trial(config, splits), Context())


@pytest.fixture
def shared() -> Path:
    """The folder of real data and models; tests that need it say so when it is not there."""
    if not SHARED.is_dir():
        pytest.skip("there is no shared folder beside this checkout: real data are not tested")
    return SHARED


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Overrides of a small study that writes below `tmp_path`."""
    return [*SMALL, f"results_dir={tmp_path / 'results'}"]
