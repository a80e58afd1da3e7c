"""Register a study before its first trial: study.yaml holds the question and all that must not change afterwards."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import yaml

from harness.checkpoint import contents_sha256
from harness.config import NOT_IN_RESULT, plain
from harness.design import Design
from harness.ifeval import unchecked
from harness.inputs import default_metric, prompt_rows, scorers_of, splits_of, tokens_of
from harness.records import EvalPrompt, UsageError, digest, locked, read_json, to_jsonl, write_text
from harness.schema import RunConfig
from harness.scoring import registered_settings
from harness.triallog import say
from harness.twins import put_back, write_twice
from harness.unscored import MAX_UNSCORED

_HASH = "sha256"


def fixed_parts(config: RunConfig) -> dict[str, Any]:
    """Return what all trials of a study share and what its verdict depends on; a change makes another study."""
    splits = splits_of(config)
    data = {k: v for k, v in plain(config.data).items() if k not in ("path", "train", "dev", "golden", "revision")}
    metric = config.decide.metric or default_metric(config, splits)
    return {
        "question": config.question,
        "metric": metric,
        "margin": config.decide.margin,
        "alpha": config.decide.alpha,
        "guards": plain(config.decide.guards),
        "looks": list(config.decide.looks or []),
        "search": plain(config.search),
        "score": registered_settings(config, [metric, *(str(guard["metric"]) for guard in config.decide.guards)]),
        "contents": contents_sha256(config, splits.facts),
        "data": data,
        "train": {key: value for key, value in plain(config.train).items() if key not in NOT_IN_RESULT},
        "generate": plain(config.generate),
    }


def study_name(config: RunConfig) -> str:
    """Return the study's name: the one given, or the model's with a hash of the question."""
    if config.study is not None:
        return config.study
    return f"{Path(config.model.path).name}-{digest(fixed_parts(config))[:8]}"


def register(design: Design, command: Sequence[str], *, warnings: Sequence[str]) -> dict[str, Any]:
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
    folder = Path(config.results_dir) / study_name(config)
    fixed = fixed_parts(config)
    path = folder / "study.yaml"
    for name in put_back(folder):
        say(f"{folder / name} was cut off or damaged and is put back from its twin")
    if not path.is_file():
        check_answerable(design, fixed)
        tokens_of(config)  # what is wrong with tokenizer, template or lengths shows here, and not in the first trial
    with locked(folder):
        old = read_study(path) if path.is_file() else {}
        if old:
            _refuse_changes(path, old.get("fixed", {}), fixed)
        study = _study(folder.name, design, fixed, old, command=shlex.join(command), warnings=warnings)
        _refuse_late_configs(path, old, study)
        _write_prompts(folder / "prompts.jsonl", to_jsonl(prompt_rows(splits_of(config))))
        if study != old:
            write_study(path, study)
    return study


def _write_prompts(path: Path, text: str) -> None:
    """Write what scorers need to know of the prompts, where it is not there as it should be."""
    if not path.is_file() or path.read_bytes() != text.encode("utf-8", errors="backslashreplace"):
        write_text(path, text)


def add_configs(folder: Path, labels: Mapping[str, Sequence[str]]) -> None:
    """Register configs that a sampler has suggested, before they are trained.

    Raises:
        UsageError: where golden was scored already.
    """
    path = folder / "study.yaml"
    with locked(folder):
        old = read_study(path)
        configs = {arm: _merged(old["configs"].get(arm, []), found) for arm, found in labels.items()}
        study = old | {"configs": old["configs"] | configs}
        _refuse_late_configs(path, old, study)
        if study != old:
            write_study(path, study)


def write_study(path: Path, study: dict[str, Any]) -> None:
    """Write study.yaml with the hash of its contents, so that a change by hand shows."""
    parts = {key: value for key, value in study.items() if key != _HASH}
    text = yaml.safe_dump(parts | {_HASH: digest(parts)}, sort_keys=False, allow_unicode=True)
    write_twice(path, text)


def _study(
    name: str, design: Design, fixed: dict[str, Any], old: dict[str, Any], *, command: str, warnings: Sequence[str]
) -> dict[str, Any]:
    """Return the contents of study.yaml: what is registered already stays, arms, configs and seeds are added."""
    config, labels = design.any, design.labels()
    facts = splits_of(config).facts
    arms = _merged(old.get("arms", []), list(labels))
    configs = dict(old.get("configs", {}))
    seeds = dict(old.get("seeds", {}))
    for arm, found in labels.items():
        configs[arm] = _merged(configs.get(arm, []), found)
        seeds[arm] = _merged(seeds.get(arm, []), list(design.seeds))
    tuned = [arm for arm in arms if arm in old.get("tuned", []) or arm in design.tuned or len(configs[arm]) > 1]
    study = {
        "study": name,
        "question": fixed["question"],
        "arms": arms,
        "contrast": old.get("contrast") or contrast_of(arms),
        "configs": configs,
        "seeds": seeds,
        "tuned": tuned,
        "tuning_seeds": _merged(old.get("tuning_seeds", []), list(design.tuning_seeds) if tuned else []),
        **{key: fixed[key] for key in ("metric", "margin", "alpha", "guards", "looks")},
        "family": plain(config.family) if config.family.name else {},
        "model": {
            "path": config.model.path,
            "revision": config.model.revision,
            "base_sha256": fixed["contents"]["base"],
        },
        "data": facts,
        "warnings": _merged(old.get("warnings", []), [*facts.get("warnings", []), *warnings]),
        "command": old.get("command") or command,
        "created": old.get("created", datetime.now(UTC).isoformat(timespec="seconds")),
        "fixed": fixed,
        "fixed_sha256": digest(fixed),
    }
    return study | ({_HASH: old[_HASH]} if _HASH in old else {})


def _refuse_late_configs(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse configs and tuning seeds that are added once golden was scored: what is selected then has seen it."""
    added = {
        f"{arm} {label}": None
        for arm, labels in new["configs"].items()
        for label in labels
        if old.get("configs", {}).get(arm) and label not in old["configs"][arm]
    }
    added |= {f"tuning seed {seed}": None for seed in new["tuning_seeds"] if seed not in old.get("tuning_seeds", [])}
    if old and added and _has_golden_scores(path.parent):
        raise UsageError(
            f"{path}: golden was scored in this study already, and this command adds {', '.join(added)}; a selection "
            "that comes after a look at golden is worth nothing: give it a study of its own, study=NAME"
        )


def _has_golden_scores(folder: Path) -> bool:
    for path in (folder / "trials").glob("*/manifest.json"):
        try:
            if "golden" in read_json(path).get("done", []):
                return True
        except ValueError:
            continue
    return False


def contrast_of(arms: Sequence[str]) -> list[str]:
    """Return the two arms that a study compares, the difference being first minus second; empty with one arm.

    SimPO minus DPO where both are there, else the first two; once registered, an arm that is added does not change it.
    """
    ordered = [arm for arm in ("simpo", "dpo") if arm in arms]
    ordered += [arm for arm in arms if arm not in ordered]
    return ordered[:2] if len(ordered) > 1 else []


def check_answerable(design: Design, fixed: dict[str, Any]) -> None:
    """Raise a UsageError where the splits cannot be scored on the metric or a guard."""
    splits = splits_of(design.any)
    needed = [("decide.metric", "golden", fixed["metric"])]
    needed += [("decide.guards", "golden", guard["metric"]) for guard in fixed["guards"]]
    needed += [("decide.metric", "dev", fixed["metric"])] if design.tuned else []
    for key, split, metric in needed:
        allowed = scorers_of(design.any, splits, split)
        if metric not in allowed:
            why = "; configs are selected on dev" if split == "dev" else ""
            raise UsageError(
                f"{key}={metric}: {split} cannot be scored on it{why}; "
                f"scorers that {split} allows: {', '.join(allowed) or 'none'}; "
                f"`checks` need rows with checks, `preference_accuracy` rows with chosen and rejected"
            )
        if metric.startswith("ifeval"):
            _check_instructions(splits.dev_prompts if split == "dev" else splits.golden_prompts, f"{key}={metric}")


def _check_instructions(prompts: Sequence[EvalPrompt], key: str) -> None:
    """Refuse instructions of which too many cannot be checked on this machine, before anything is trained."""
    asked = [(p.about["instructions"], p.prompt[-1]["content"]) for p in prompts if p.about.get("instructions")]
    lost = unchecked(asked)
    if lost.total() > MAX_UNSCORED * len(asked):
        reason, count = lost.most_common(1)[0]
        raise UsageError(f"{key}: {count} of {len(asked)} prompts cannot be scored: {reason}; or leave these out")


def read_study(path: Path) -> dict[str, Any]:
    """Read study.yaml.

    Raises:
        UsageError: where it is damaged, or is not a study's.
    """
    try:
        study = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{path}: not readable as YAML ({reason}); put back the file as it was registered, or choose another "
            "study=NAME: without it the finished trials have no question to answer"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: not readable ({error.strerror}); give a folder that harness.sweep wrote") from error
    if not isinstance(study, dict) or "metric" not in study or "arms" not in study:
        raise UsageError(f"{path}: not a study that harness.sweep registered; choose another study=NAME")
    if _HASH in study and study[_HASH] != digest({key: value for key, value in study.items() if key != _HASH}):
        raise UsageError(
            f"{path}: was changed after it was registered; a verdict on a changed question means nothing: put the file "
            "back as it was, or register the new question as a study of its own, study=NAME"
        )
    return cast(dict[str, Any], study)


def _refuse_changes(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
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


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def _merged(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys([*old, *new]))
