"""Find what is wrong with a resolved config before anything is loaded: ranges, missing files, combinations."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from harness.config.arms import ARMS, DPOMarginConfig, SimPOConfig
from harness.config.checkpoint import checkpoint_problems, is_utf8
from harness.config.compose import fill_from_profile, profile_name, register_schemas, vllm_problem
from harness.config.keys import declared_keys, shown, value_problem
from harness.config.overrides import check_overrides, explain
from harness.config.paths import CONF
from harness.config.schema import EMBEDDED, GUARD, Engine, Reference, RunConfig, Tuning
from harness.score.available import known_scorers, run_names, score_problems, unknown_scorer
from harness.study.errors import UsageError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def find_problems(config: RunConfig) -> list[str]:
    """Return one message for every value that is out of range, missing, or impossible in combination."""
    return [*_range_problems(config), *_combination_problems(config)]


def find_warnings(config: RunConfig) -> list[str]:
    """Return what is allowed and yet likely to be regretted."""
    warnings = []
    rate, limit = config.method.learning_rate, config.train.collapse_learning_rate
    if rate is not None and limit is not None and config.train.tuning is Tuning.full and rate >= limit:
        warnings.append(
            f"method.learning_rate={rate:g} with train.tuning=full: at {limit:g} and above preference optimisation is "
            f"known to collapse a model (SimPO repository, README and issue 33); published rates are 3e-7 to 1e-6"
        )
    ratio = getattr(config.method, "gamma_beta_ratio", 0.0)
    if ratio > 1.5 and ARMS[config.method.name].per_token:
        warnings.append(
            f"method.gamma_beta_ratio={ratio:g}: published settings lie between 0 and 1; above 1.5 nats per token the "
            "loss hardly saturates"
        )
    return warnings


def _range_problems(config: Any, prefix: str = "") -> Iterator[str]:
    for name, declared in declared_keys(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _range_problems(value, f"{prefix}{name}.")
            continue
        problem = value_problem(declared, value)
        if problem:
            yield f"{prefix}{name}={shown(value)}: {problem}"


def _combination_problems(config: RunConfig) -> Iterator[str]:
    yield from _model_problems(config)
    yield from _data_problems(config)
    yield from _study_problems(config)
    yield from _rule_problems(config)
    yield from _decoding_problems(config)
    train = config.train
    batch, micro = train.batch_size, train.micro_batch_size
    if batch and micro and batch % micro:
        yield f"train.micro_batch_size={micro}: must divide train.batch_size={batch}"
    yield from _process_problems(config)
    if config.keep == "none" and config.score.lm_eval.tasks:
        yield "keep=none: score.lm_eval.tasks are run on the weights of the trials that decide; use keep=confirmed"
    if train.tuning is Tuning.qlora and find_spec("bitsandbytes") is None:
        yield "train.tuning=qlora: bitsandbytes is not installed; pip install 'dpo-simpo-harness[qlora]'"
    method = config.method
    if ARMS[method.name].trainer and method.learning_rate is None:
        tuning = train.tuning.value
        yield f"method.learning_rate=null: conf/method/{method.name}.yaml has none for train.tuning={tuning}"
    if isinstance(method, SimPOConfig) and train.engine is Engine.stock and method.length_norm != 1.0:
        yield f"method.length_norm={method.length_norm:g}: TRL's own trainer has 1.0 only; use train.engine=paired"
    yield from _reference_problems(config)


def _process_problems(config: RunConfig) -> Iterator[str]:
    count, kind = config.accelerate.num_processes, config.accelerate.distributed_type
    if (count > 1) != (kind != "NO"):
        yield (
            f"accelerate.num_processes={count} with accelerate.distributed_type={kind}: several processes need "
            "accelerate=ddp, fsdp, zero2 or zero3, and these need at least 2"
        )
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    if batch and micro and batch % micro == 0 and batch % (micro * count):
        yield (
            f"accelerate.num_processes={count}: a step of train.batch_size={batch} has {batch // micro} micro-batches "
            f"of train.micro_batch_size={micro}, which {count} processes cannot share evenly; make it smaller"
        )


def _reference_problems(config: RunConfig) -> Iterator[str]:
    train, method = config.train, config.method
    if train.reference is Reference.adapter_off and train.tuning is Tuning.full:
        yield "train.reference=adapter_off: train.tuning=full has no adapter; use cached or separate"
    if isinstance(method, DPOMarginConfig) and (
        train.engine is Engine.stock or train.reference is not Reference.cached
    ):
        yield (
            f"method.gamma_beta_ratio of {method.name}: TRL's DPO has no margin; it is put into the cached reference: "
            "use train.engine=paired and train.reference=cached"
        )


def _study_problems(config: RunConfig) -> Iterator[str]:
    name, project = config.study, config.tracking.project
    if name is not None and not _FOLDER_NAME.fullmatch(name):
        yield (
            f"study={name}: the name of a folder in results_dir: letters, digits, `_`, `-` and `.`, no `/`, "
            "no `.` or `-` at the beginning, at most 200 characters"
        )
    results = Path(config.results_dir)
    if not config.results_dir or (results.exists() and not results.is_dir()):
        yield f"results_dir={config.results_dir}: not a folder; give one, it is made where it does not exist"
    if not project.strip() or len(project) > 128 or set(project) & set("/\\#?%:"):
        yield (
            f"tracking.project={project}: W&B wants a name of at most 128 characters with no `/`, `\\`, `#`, `?`, "
            "`%` or `:` in it"
        )


def _rule_problems(config: RunConfig) -> Iterator[str]:
    decide, known = config.decide, known_scorers(config.score)
    yield from score_problems(config.score, run_names(config.score))
    if decide.metric is not None and decide.metric not in known:
        yield f"decide.metric={decide.metric}: {unknown_scorer(decide.metric, config.score)}"
    metrics = []
    for guard in decide.guards:
        metric, margin = guard.get("metric"), guard.get("margin")
        if set(guard) != {"metric", "margin"} or not isinstance(margin, int | float) or not 0 < margin < 1:
            yield f"decide.guards: {shown(guard)}: each guard is {GUARD}"
        elif not isinstance(metric, str) or metric not in known:
            yield f"decide.guards: {shown(guard)}: {unknown_scorer(str(metric), config.score)}"
        elif metric in metrics:
            yield f"decide.guards: {metric} is guarded twice; give it once"
        metrics.append(metric)


def _decoding_problems(config: RunConfig) -> Iterator[str]:
    temperature, top_p = config.generate.temperature, config.generate.top_p
    if temperature == 0 and top_p != 1:
        yield f"generate.top_p={top_p:g}: generate.temperature=0 is greedy and has no use for it; set a temperature"
    if 0 < temperature < 0.01:
        yield f"generate.temperature={temperature:g}: 0 (greedy) or at least 0.01; smaller ones overflow"
    if config.generate.backend == "vllm" and (problem := vllm_problem(config)):
        yield f"generate.backend=vllm: {problem}; use generate.backend=transformers"


def _model_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.path != EMBEDDED:
        folder = Path(model.path)
        if folder.is_dir():
            yield from (f"model.path={model.path}: {problem}" for problem in checkpoint_problems(folder))
            if model.revision is not None:
                yield f"model.revision={model.revision}: model.path={model.path} is a folder and has no revisions"
        elif folder.is_absolute() or model.path.startswith(".") or not _HUB_ID.fullmatch(model.path):
            yield f"model.path={model.path}: no such folder; allowed: a folder, a Hub id (owner/name) or `embedded`"
    elif model.revision is not None:
        yield f"model.revision={model.revision}: the embedded base has no revisions; only a Hub id has"
    if model.chat_template is not None:
        template = Path(model.chat_template)
        if not template.is_file():
            yield f"model.chat_template={model.chat_template}: no such file; give a Jinja chat template"
        elif not is_utf8(template):
            yield f"model.chat_template={model.chat_template}: not UTF-8 text; give a Jinja chat template"


def _data_problems(config: RunConfig) -> Iterator[str]:
    data = config.data
    given = [name for name in ("path", "train", "dev", "golden") if getattr(data, name) is not None]
    if profile_name(config) == "own" and not given:
        yield (
            f"model.path={config.model.path}: your own model needs your own pairs; set data.train, data.dev and "
            "data.golden, or data.path for one file that is split by prompt"
        )
    if data.path is None and given and "train" not in given:
        yield f"data.train=null: data.{given[0]} is given without pairs to train on; set data.train or data.path"
    if data.path is None and "train" in given and "golden" not in given:
        yield "data.golden=null: nothing to decide on; set data.golden, or data.path for one file that is split"
    if data.dev_fraction + data.golden_fraction >= 1:
        yield f"data.golden_fraction={data.golden_fraction:g}: dev and golden together leave nothing to train on"


def load_run(overrides: list[str]) -> RunConfig:
    """Compose one run from the command line's overrides; what `harness.sweep` would refuse is a UsageError."""
    check_overrides(overrides)
    return compose_run(overrides)


def compose_run(overrides: list[str]) -> RunConfig:
    """Compose and validate one run; the overrides themselves have been checked."""
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
    """Turn a composed config into a `RunConfig` with no open default left, or raise a `UsageError`."""
    composed = copy.deepcopy(composed)
    with open_dict(composed):
        composed.pop("hydra", None)
    config = cast(RunConfig, OmegaConf.to_object(composed))
    fill_from_profile(config)
    problems = find_problems(config)
    if problems:
        raise UsageError("\n".join(problems))
    return config
