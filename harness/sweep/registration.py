"""Register a study before its first trial: study.yaml holds the question and all that must not change afterwards."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.config.trial_id import plain, registered_section
from harness.data.inputs import Inputs, prompt_rows
from harness.data.records import EvalPrompt
from harness.data.splits import Splits
from harness.score.lm_eval import unchecked
from harness.score.scorers import allowed_scorers, is_among, needs_instructions, registered_settings
from harness.study.backup import put_back
from harness.study.errors import UnreachableError, UsageError
from harness.study.files import Json, Reader, digest, locked, to_jsonl, write_text
from harness.study.log import say
from harness.study.registration import (
    RULE_VERSION,
    ModelSources,
    Registration,
    contrast_of,
    merged,
    read_study,
    refuse_late_configs,
    write_study,
)
from harness.study.scores_csv import MAX_UNSCORED
from harness.study.text import one_line
from harness.sweep.design import Design

_SHOWN = 3  # prompts that a message lists


def fixed_parts(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Return what all trials of a study share and what its verdict depends on; a change makes another study."""
    splits = inputs.splits(config)
    metric = config.decide.metric or default_metric(config, splits)
    metrics = [metric, *(str(guard["metric"]) for guard in config.decide.guards)]
    return {
        "question": config.question,
        "metric": metric,
        "margin": config.decide.margin,
        "alpha": config.decide.alpha,
        "guards": plain(config.decide.guards),
        "looks": list(config.decide.looks or []),
        "search": registered_section(config, "search"),
        "score": registered_settings(config.score, metrics, inputs.checkpoints),
        "contents": inputs.contents(config),
        "data": registered_section(config, "data"),
        "train": registered_section(config, "train"),
        "generate": registered_section(config, "generate"),
    }


def study_name(config: RunConfig, inputs: Inputs) -> str:
    """Return the study's name: the one given, or the model's with a hash of the question."""
    if config.study is not None:
        return config.study
    return f"{Path(config.model.path).name}-{digest(fixed_parts(config, inputs))[:8]}"


def folder_name(config: RunConfig, inputs: Inputs) -> str:
    """Return the name of a config's study as a folder.

    A plan of a model or data set that cannot be fetched here goes without the hash of the question.
    """
    try:
        name = study_name(config, inputs)
    except UnreachableError:
        if not config.plan:
            raise
        name = Path(config.model.path).name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[-200:].lstrip(".-")


def register(design: Design, command: Sequence[str], *, warnings: Sequence[str]) -> Registration:
    """Register a study, see `_register`; a folder that cannot be written to is a UsageError."""
    try:
        return _register(design, ["python", "-m", *command], warnings=warnings)
    except OSError as error:
        results = design.base_config.results_dir
        if not str(error.filename).startswith(str(Path(results))):
            raise
        raise UsageError(
            f"results_dir={results}: {error.filename} cannot be written ({error.strerror}); give a folder that can"
        ) from error


def _register(design: Design, command: Sequence[str], *, warnings: Sequence[str]) -> Registration:
    """Write study.yaml and prompts.jsonl; where the study exists, refuse another question and add arms and seeds.

    Args:
        design: what this command trains.
        command: the whole command line, for the report.
        warnings: what the verdict must say of how the study was set up.

    Raises:
        UsageError: for another question than the registered one, one that the data cannot answer, or configs that
            are added after golden was scored.
    """
    config = design.any
    folder = design.study
    inputs = design.inputs
    fixed = fixed_parts(config, inputs)
    path = folder / "study.yaml"
    for name in put_back(folder):
        say(f"{folder / name} was cut off or damaged and is put back from its backup copy")
    if not path.is_file():
        check_answerable(design, fixed)
        # A wrong tokenizer, template or length is refused here, not in the first trial.
        warnings = [*warnings, *inputs.tokens(config).warnings]
    with locked(folder):
        old = read_study(path) if path.is_file() else None
        if old:
            _refuse_changes(path, old["fixed"], fixed)
            _refuse_repeats(path, old, inputs.splits(config))
        study = _study(folder.name, design, fixed, old or {}, command=shlex.join(command), warnings=warnings)
        refuse_late_configs(path, old, study)
        _write_prompts(folder / "prompts.jsonl", to_jsonl(prompt_rows(inputs.splits(config))))
        if study != old:
            write_study(path, study)
    return study


def _write_prompts(path: Path, text: str) -> None:
    """Write what scorers need to know of the prompts, where it is not there as it should be."""
    if not path.is_file() or path.read_bytes() != text.encode("utf-8", errors="backslashreplace"):
        write_text(path, text)


def _study(
    name: str, design: Design, fixed: dict[str, Any], old: Mapping[str, Any], *, command: str, warnings: Sequence[str]
) -> Registration:
    """Return the contents of study.yaml: what is registered already stays, arms, configs and seeds are added."""
    config, labels = design.any, design.labels()
    facts = design.inputs.splits(config).facts
    arms = merged(old.get("arms", []), list(labels))
    configs = dict(old.get("configs", {}))
    seeds = dict(old.get("seeds", {}))
    for arm, found in labels.items():
        configs[arm] = merged(configs.get(arm, []), found)
        seeds[arm] = merged(seeds.get(arm, []), list(design.seeds))
    tuned = [arm for arm in arms if arm in old.get("tuned", []) or arm in design.tuned or len(configs[arm]) > 1]
    study: Registration = {
        "study": name,
        "question": fixed["question"],
        "arms": arms,
        "contrast": old.get("contrast") or contrast_of(arms),
        "configs": configs,
        "seeds": seeds,
        "tuned": tuned,
        "tuning_seeds": merged(old.get("tuning_seeds", []), list(design.tuning_seeds) if tuned else []),
        "metric": fixed["metric"],
        "margin": fixed["margin"],
        "alpha": fixed["alpha"],
        "guards": fixed["guards"],
        "looks": fixed["looks"],
        "family": _family(design) or old.get("family", {}),
        "model": {
            "path": config.model.path,
            "revision": config.model.revision,
            "base_sha256": fixed["contents"]["base"],
            **_made_of(config, design.inputs),
        },
        "data": {**facts},
        "warnings": merged(old.get("warnings", []), [*facts.get("warnings", []), *warnings]),
        "command": old.get("command") or command,
        "created": old.get("created", design.inputs.date),  # chat templates take it for now
        "fixed": fixed,
        "fixed_sha256": digest(fixed),
    }
    if not old or "rule_version" in old:
        study["rule_version"] = old.get("rule_version", RULE_VERSION)
    if "sha256" in old:
        study["sha256"] = old["sha256"]
    return study


def _family(design: Design) -> dict[str, Json]:
    return asdict(design.family) if design.family else {}


def check_answerable(design: Design, fixed: dict[str, Any]) -> None:
    """Raise a UsageError where the splits cannot be scored on the metric or a guard."""
    splits = design.inputs.splits(design.any)
    needed = [("decide.metric", "golden", fixed["metric"])]
    needed += [("decide.guards", "golden", guard["metric"]) for guard in fixed["guards"]]
    needed += [("decide.metric", "dev", fixed["metric"])] if design.tuned else []
    for key, split, metric in needed:
        allowed = scorers_of(design.any, splits, split)
        if not is_among(metric, allowed):
            why = "; configs are selected on dev" if split == "dev" else ""
            raise UsageError(
                f"{key}={metric}: {split} cannot be scored on it{why}; "
                f"scorers that {split} allows: {', '.join(allowed) or 'none'}; "
                f"`checks` need rows with checks, `preference_accuracy` rows with chosen and rejected"
            )
        if needs_instructions(metric):
            _check_instructions(splits.dev_prompts if split == "dev" else splits.golden_prompts, f"{key}={metric}")


def _check_instructions(prompts: Sequence[EvalPrompt], key: str) -> None:
    """Refuse instructions of which too many cannot be checked on this machine, before anything is trained."""
    asked = [(p.about["instructions"], p.prompt[-1]["content"]) for p in prompts if p.about.get("instructions")]
    lost = unchecked(asked)
    if lost.total() > MAX_UNSCORED * len(asked):
        reason, count = lost.most_common(1)[0]
        raise UsageError(f"{key}: {count} of {len(asked)} prompts cannot be scored: {reason}; or leave these out")


def _refuse_changes(path: Path, old: Mapping[str, Json], new: Mapping[str, Json]) -> None:
    before, after = _flat(old), _flat(new)
    changes = [
        f"  {key}: registered {before.get(key)}, now {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if changes:
        raise UsageError(
            f"{path}: this study was registered with another question; a verdict on a changed question means nothing\n"
            + "\n".join(changes)
            + "\nGive the new question a study of its own: study=NAME, or leave study= out"
        )


def _refuse_repeats(path: Path, old: Mapping[str, Any], splits: Splits) -> None:
    """Refuse to go on with a study that was registered when a prompt that stands several times counted once."""
    rows = Reader(path.parent).rows(path.with_name("prompts.jsonl"))
    for split, prompts in (("dev", splits.dev_prompts), ("golden", splits.golden_prompts)):
        registered = old["data"][split]["prompts"]
        known = {row.get("prompt_id") for row in rows if row.get("split") == split}
        is_whole = len(known) == registered  # a damaged file is written again
        again = [one for one in prompts if "#" in one.prompt_id and not (is_whole and one.prompt_id in known)]
        if again and (is_whole or registered != len(prompts)):
            texts = list(dict.fromkeys(one_line(one.prompt[-1]["content"], 60) for one in again))
            shown = ", ".join(map(repr, texts[:_SHOWN])) + (", ..." if len(texts) > _SHOWN else "")
            raise UsageError(
                f"{path}: this study counted each prompt once, and {len(texts)} {split} prompts that stand more than "
                f"once ({shown}) are now asked each time; harness.decide and harness.report read it as it is; to go "
                "on, give the question a study of its own: study=NAME"
            )


def _made_of(config: RunConfig, inputs: Inputs) -> ModelSources:
    """Return what the checkpoint of a study was made of, where it is not the given one itself."""
    found = inputs.checkpoints.made_of(inputs.checkpoints.folder(config.model, config.results_dir))
    return {"made_of": found} if found else {}


def _flat(value: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def scorers_of(config: RunConfig, splits: Splits, split: str) -> list[str]:
    """Return the scorers that a split's rows allow, and those that the config sets up; the default one first."""
    is_dev = split == "dev"
    prompts, pairs = (splits.dev_prompts, splits.dev_pairs) if is_dev else (splits.golden_prompts, splits.golden_pairs)
    return allowed_scorers(config.score, prompts, has_pairs=bool(pairs), split=split)


def default_metric(config: RunConfig, splits: Splits) -> str:
    """Return the metric that a golden set is decided on where none is given: checks, else pairs, else a judge."""
    found = scorers_of(config, splits, "golden")
    if found:
        return found[0]
    raise UsageError(
        "data.golden: its rows have neither `checks` nor `chosen` and `rejected`, so that nothing can be scored; "
        "add checks (see README, Golden sets; data.answer_check makes checks of answers), give held-out pairs, or set "
        "up a judge (score.judge.model) or a reward model (score.reward_model.path); IFEval's instructions need "
        "pip install 'dpo-simpo-harness[lm-eval]'"
    )
