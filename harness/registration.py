"""Register a study before its first trial: study.yaml holds the question and all that must not change afterwards."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import yaml

from harness.checkpoint import contents_sha256
from harness.config import NOT_IN_RESULT, RunConfig, config_label, plain
from harness.inputs import default_metric, prompt_rows, scorers_of, splits_of, tokens_of
from harness.records import UsageError, digest, locked, write_jsonl, write_text


def fixed_parts(config: RunConfig) -> dict[str, Any]:
    """Return what all trials of a study share and what its verdict depends on; a change makes another study."""
    splits = splits_of(config)
    data = {k: v for k, v in plain(config.data).items() if k not in ("path", "train", "dev", "golden", "revision")}
    return {
        "metric": config.decide.metric or default_metric(splits),
        "margin": config.decide.margin,
        "alpha": config.decide.alpha,
        "guards": plain(config.decide.guards),
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


def register(configs: Sequence[RunConfig], command: Sequence[str], *, warnings: Sequence[str]) -> dict[str, Any]:
    """Write study.yaml and prompts.jsonl; where the study exists, refuse another question and add arms and seeds.

    Args:
        configs: the trained trials of this command; they share everything in `fixed_parts`.
        command: the whole command line, for the report.
        warnings: what the verdict must say of how the study was set up.

    Raises:
        UsageError: for another question than the registered one, or one that the data cannot answer.
    """
    first = configs[0]
    folder = Path(first.results_dir) / study_name(first)
    fixed = fixed_parts(first)
    path = folder / "study.yaml"
    if not path.is_file():
        check_answerable(configs, fixed)
        tokens_of(first)  # what is wrong with tokenizer, template or lengths shows here, and not in the first trial
    with locked(folder):
        old = read_study(path) if path.is_file() else {}
        if old:
            _refuse_changes(path, old.get("fixed", {}), fixed)
        study = _study(folder.name, configs, fixed, old, command=shlex.join(command), warnings=warnings)
        if study != old:
            write_jsonl(folder / "prompts.jsonl", prompt_rows(splits_of(first)))
            write_text(path, yaml.safe_dump(study, sort_keys=False, allow_unicode=True))
    return study


def _study(
    name: str,
    configs: Sequence[RunConfig],
    fixed: dict[str, Any],
    old: dict[str, Any],
    *,
    command: str,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Return the contents of study.yaml: what is registered already stays, arms, configs and seeds are added."""
    first = configs[0]
    facts = splits_of(first).facts
    arms = _merged(old.get("arms", []), [c.method.name for c in configs])
    return {
        "study": name,
        "question": old.get("question", first.question),
        "arms": arms,
        "contrast": old.get("contrast") or contrast_of(arms),
        "configs": _merged_by_arm(old.get("configs", {}), [(c.method.name, config_label(c)) for c in configs]),
        "seeds": _merged_by_arm(old.get("seeds", {}), [(c.method.name, c.seed) for c in configs]),
        **{key: fixed[key] for key in ("metric", "margin", "alpha", "guards")},
        "model": {
            "path": first.model.path,
            "revision": first.model.revision,
            "base_sha256": fixed["contents"]["base"],
        },
        "data": facts,
        "warnings": _merged(old.get("warnings", []), [*facts.get("warnings", []), *warnings]),
        "command": old.get("command") or command,
        "created": old.get("created", datetime.now(UTC).isoformat(timespec="seconds")),
        "fixed": fixed,
        "fixed_sha256": digest(fixed),
    }


def contrast_of(arms: Sequence[str]) -> list[str]:
    """Return the two arms that a study compares, the difference being first minus second; empty with one arm.

    SimPO minus DPO where both are there, else the first two; once registered, an arm that is added does not change it.
    """
    ordered = [arm for arm in ("simpo", "dpo") if arm in arms]
    ordered += [arm for arm in arms if arm not in ordered]
    return ordered[:2] if len(ordered) > 1 else []


def is_selected(study: Mapping[str, Any]) -> bool:
    """Return True where an arm has several configs, so that the golden runs are those that selected the config."""
    return any(len(configs) > 1 for configs in study.get("configs", {}).values())


def check_answerable(configs: Sequence[RunConfig], fixed: dict[str, Any]) -> None:
    """Raise a UsageError where the splits cannot be scored on the metric or a guard."""
    splits = splits_of(configs[0])
    several = any(len({config_label(c) for c in configs if c.method.name == arm}) > 1 for arm in _arms(configs))
    needed = [("decide.metric", "golden", fixed["metric"])]
    needed += [("decide.guards", "golden", guard["metric"]) for guard in fixed["guards"]]
    needed += [("decide.metric", "dev", fixed["metric"])] if several else []
    for key, split, metric in needed:
        allowed = scorers_of(splits, split)
        if metric not in allowed:
            why = "; configs are selected on dev" if split == "dev" else ""
            raise UsageError(
                f"{key}={metric}: {split} cannot be scored on it{why}; "
                f"scorers that {split} allows: {', '.join(allowed) or 'none'}; "
                f"`checks` need rows with checks, `preference_accuracy` rows with chosen and rejected"
            )


def _arms(configs: Sequence[RunConfig]) -> list[str]:
    return list(dict.fromkeys(config.method.name for config in configs))


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


def _merged_by_arm(old: dict[str, list[Any]], new: Sequence[tuple[str, Any]]) -> dict[str, list[Any]]:
    merged = {arm: list(values) for arm, values in old.items()}
    for arm, value in new:
        merged[arm] = _merged(merged.get(arm, []), [value])
    return merged
