"""Register a study before its first trial: study.yaml holds the question and all that must not change afterwards."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import yaml

from harness.checkpoint import contents_sha256
from harness.config import NOT_IN_RESULT, RunConfig, config_label, plain
from harness.inputs import default_metric, prompt_rows, splits_of
from harness.records import UsageError, digest, write_jsonl, write_text


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
        command: the command line, for the report.
        warnings: what the verdict must say of how the study was set up.
    """
    first = configs[0]
    folder = Path(first.results_dir) / study_name(first)
    fixed = fixed_parts(first)
    path = folder / "study.yaml"
    old = read_study(path) if path.is_file() else {}
    if old:
        _refuse_changes(path, old["fixed"], fixed)
    facts = splits_of(first).facts
    study = {
        "study": folder.name,
        "question": old.get("question", first.question),
        "arms": _merged(old.get("arms", []), [c.method.name for c in configs]),
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
        "command": old.get("command") or shlex.join(["python", "-m", "harness.sweep", *command]),
        "created": old.get("created", datetime.now(UTC).isoformat(timespec="seconds")),
        "fixed": fixed,
        "fixed_sha256": digest(fixed),
    }
    if study != old:
        write_text(path, yaml.safe_dump(study, sort_keys=False, allow_unicode=True))
        write_jsonl(folder / "prompts.jsonl", prompt_rows(splits_of(first)))
    return study


def read_study(path: Path) -> dict[str, Any]:
    """Read study.yaml."""
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(study, dict) or "fixed" not in study:
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
