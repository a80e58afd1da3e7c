"""Compose `conf/` into one typed, validated `RunConfig`, and compute `trial_id` from it.

Input: `conf/`, `sweeps/`, overrides -> output: `RunConfig`, or a `UsageError` with every problem. Imports no torch.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from harness.arms import ARMS, MethodConfig, bounded
from harness.records import UsageError, digest

EMBEDDED = "embedded"
MAX_SEED = 2**32 - 1  # NumPy's global generator takes no larger one
GUARD = "{metric: NAME, margin: a number between 0 and 1}"


def _shipped(folder: str, marker: str) -> Path:
    """Find a folder that stands at the top of a checkout and inside the package in a wheel."""
    here = Path(__file__).resolve().parent
    for place in (here.parent / folder, here / folder):
        if (place / marker).exists():
            return place
    raise UsageError(f"{folder}/{marker} is neither beside nor inside {here}; install the package again")


CONF = _shipped("conf", "sweep.yaml")
SWEEPS = _shipped("sweeps", "smoke.yaml")


class Engine(Enum):
    """Who computes the loss: `paired`, the harness's thin subclasses of TRL's trainers, or `stock`, TRL's own."""

    paired = "paired"
    stock = "stock"


class Tuning(Enum):
    """Which weights are trained: a LoRA adapter or all."""

    lora = "lora"
    full = "full"


class Precision(Enum):
    """Arithmetic of training; `auto` is fp32 on a CPU and bf16 on a GPU that has it."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Template(Enum):
    """Whether plain-text prompts are put through the chat template: `auto` does so where the tokenizer has one."""

    auto = "auto"
    never = "never"


@dataclass
class ModelConfig:
    """The SFT checkpoint that both arms start from: a folder, a Hub id, or `embedded`."""

    path: str = EMBEDDED
    revision: str | None = None
    chat_template: str | None = None


@dataclass
class DataConfig:
    """The pairs, and how they are split; see `harness.data.DataSpec` for the meaning of the keys it mirrors."""

    path: str | None = None
    revision: str | None = None
    train: str | None = None
    dev: str | None = None
    golden: str | None = None
    dev_fraction: float = bounded(0.1, above=0.0, below=1.0)
    golden_fraction: float = bounded(0.2, above=0.0, below=1.0)
    split_seed: int = bounded(0, at_least=0)
    max_bad_fraction: float = bounded(0.01, at_least=0.0, at_most=1.0)
    label_noise: float = bounded(0.0, at_least=0.0, at_most=1.0)
    label_noise_seed: int = bounded(0, at_least=0)
    max_train_pairs: int | None = bounded(None, at_least=1)
    max_dev_prompts: int | None = bounded(None, at_least=1)
    max_golden_prompts: int | None = bounded(None, at_least=1)
    max_length: int = bounded(1024, at_least=8)
    template: Template = Template.auto


@dataclass
class TrainConfig:
    """All that must be equal between arms. Keys that are null come from the profile (`conf/profile/`).

    `cache_reference` to `metrics_steps` are what makes the paired engine fast, each to be switched off;
    losses stay the same up to rounding (see `benchmarks/`).
    """

    engine: Engine = Engine.paired
    tuning: Tuning = Tuning.lora
    lora_rank: int = bounded(16, at_least=1)
    lora_alpha: int = bounded(32, at_least=1)
    epochs: int | None = bounded(None, at_least=1)
    batch_size: int | None = bounded(None, at_least=1)
    micro_batch_size: int | None = bounded(None, at_least=1)
    scheduler: str = bounded("cosine", choices=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup_ratio: float = bounded(0.1, at_least=0.0, below=1.0)
    weight_decay: float = bounded(0.0, at_least=0.0)
    max_grad_norm: float = bounded(1.0, above=0.0)
    precision: Precision = Precision.auto
    gradient_checkpointing: bool | None = None
    threads: int | None = bounded(None, at_least=1, at_most=1024)
    checkpoint_steps: int | None = bounded(None, at_least=1)
    cache_reference: bool = True
    share_prefix: bool = True
    completion_head: bool = True
    fuse_adapters: bool = True
    group_lengths: bool = True
    reuse_base: bool = True
    metrics_steps: int = bounded(10, at_least=1)
    collapse_learning_rate: float | None = bounded(None, above=0.0)


@dataclass
class GenerateConfig:
    """Decoding, identical for every arm and for the SFT base. Temperature 0 is greedy.

    A null `backend` is vLLM where it is installed, a GPU is there and adapters are trained; else transformers.
    """

    backend: str | None = bounded(None, choices=("transformers", "vllm"))
    max_new_tokens: int | None = bounded(None, at_least=1)
    batch_size: int | None = bounded(None, at_least=1)
    temperature: float = bounded(0.0, at_least=0.0, at_most=10.0)
    top_p: float = bounded(1.0, above=0.0, at_most=1.0)
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)


@dataclass
class DecideConfig:
    """The decision rule, registered before the first trial. A null metric is the golden set's own (see `trial`)."""

    metric: str | None = None
    margin: float = bounded(0.05, above=0.0, below=1.0)
    alpha: float = bounded(0.05, above=0.0, below=0.5)
    guards: list[dict[str, Any]] = field(default_factory=list, metadata={"items": GUARD})


@dataclass
class TrackingConfig:
    """Where runs are mirrored."""

    backend: str = bounded("wandb", choices=("wandb", "none"))
    project: str = "dpo-vs-simpo"
    entity: str | None = None
    mode: str = bounded("offline", choices=("offline", "online"))


@dataclass
class RunConfig:
    """One trial, or, with `arms` and `seeds`, the study that it belongs to.

    Attributes:
        method: the arm; chosen on the command line with `+method=`.
        seed: seed of the LoRA initialisation and of the order of the data; the same for all arms of a study.
        seeds: seeds of the sweep where the command line has no `seed=`; null takes the profile's.
        arms: per arm a space, `{arm: {key: value or list of values}}`, expanded for that arm only.
        study: name of the study's folder; null derives one from the question.
        results_dir: where studies are kept.
        question: one sentence for the report.
        plan: print the trials and stop.
        allow_unequal_budgets: let one arm have more configs to select from than another; the verdict then warns.
        evaluate: the splits that a trial answers; the sweep leaves `golden` out until a config is selected, and both
            where vLLM answers for all trials at once.
    """

    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    decide: DecideConfig = field(default_factory=DecideConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)
    seeds: list[int] | None = field(default=None, metadata={"at_least": 0, "at_most": MAX_SEED, "distinct": True})
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    study: str | None = None
    results_dir: str = "results"
    question: str = "Which of the two should be shipped?"
    plan: bool = False
    allow_unequal_budgets: bool = False
    evaluate: list[str] = field(
        default_factory=lambda: ["dev", "golden"],
        metadata={"choices": ("dev", "golden"), "distinct": True, "may_be_empty": True},
    )


def register_schemas() -> None:
    """Make the dataclasses known to Hydra, and every file in `sweeps/` selectable as `+sweep=NAME`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    store.store(group="tracking", name="schema", node=TrackingConfig)
    for name, arm in ARMS.items():
        store.store(group="method", name=f"schema_{name}", node=arm.config)
    for path in sorted(SWEEPS.glob("*.yaml")):
        node = cast(DictConfig, OmegaConf.load(path))
        store.store(group="sweep", name=path.stem, node=node, package="_global_", provider="sweeps/")


def load_run(overrides: list[str]) -> RunConfig:
    """Compose one run from the command line's overrides; what `harness.sweep` would refuse is a UsageError."""
    from harness.overrides import check_overrides  # it reads the dataclasses above

    check_overrides(overrides)
    return compose_run(overrides)


def compose_run(overrides: list[str]) -> RunConfig:
    """Compose and validate one run; the overrides themselves are taken to be checked."""
    from harness.overrides import explain

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"), explain():
        composed = compose("sweep", overrides=overrides)
    return resolve(composed)


def resolve(composed: DictConfig) -> RunConfig:
    """Turn a composed config into a `RunConfig` with no open default left, or raise a `UsageError`."""
    from harness.profile import fill_from_profile  # these read the dataclasses above
    from harness.validate import find_problems

    composed = copy.deepcopy(composed)
    with open_dict(composed):
        composed.pop("hydra", None)
    config = cast(RunConfig, OmegaConf.to_object(composed))
    fill_from_profile(config)
    problems = find_problems(config)
    if problems:
        raise UsageError("\n".join(problems))
    return config


def trial_id(config: RunConfig, contents: dict[str, str]) -> str:
    """Hash what determines a trial's result, and nothing else.

    `contents` is the SHA-256 by name of what the config only names: base weights, data files, chat template.
    """
    parts = {
        "method": plain(config.method),
        "train": {key: value for key, value in plain(config.train).items() if key not in NOT_IN_RESULT},
        "generate": plain(config.generate),
        "data": {key: value for key, value in plain(config.data).items() if key not in _PATHS},
        "seed": config.seed,
        "contents": contents,
    }
    parts["method"].pop("learning_rates")  # learning_rate holds the one that is used
    return digest(parts)[:12]


# Keys of `train` that change how long a trial takes, or what is warned of, and not what comes out.
NOT_IN_RESULT = {"threads", "checkpoint_steps", "collapse_learning_rate", "reuse_base", "metrics_steps"}
_PATHS = {"path", "train", "dev", "golden", "revision", "max_bad_fraction"}


def plain(value: Any) -> Any:
    """Turn config objects into JSON values (enums by name)."""
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
    """Name a config by what may differ between configs of one arm, e.g. `beta=2,gamma_beta_ratio=0.5,lr=0.0001`."""
    method, parts = config.method, []
    for key in dataclasses.fields(method):
        value = getattr(method, key.name)
        if key.name in ("name", "learning_rates") or value is None:
            continue
        if not (key.metadata.get("quiet") and value == key.default):
            name = "lr" if key.name == "learning_rate" else key.name
            parts.append(f"{name}={value:g}")
    return ",".join(sorted(parts, key=lambda part: part.startswith("lr="))) or "base"
