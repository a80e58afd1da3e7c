"""study.yaml, the registered question: read, write with its hash, and add arms, configs and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from harness.study.backup import write_twice
from harness.study.errors import UsageError
from harness.study.files import digest, locked, read_json

STUDY_HASH = "sha256"


def add_configs(folder: Path, labels: Mapping[str, Sequence[str]]) -> None:
    """Register configs that a sampler has suggested, before they are trained.

    Raises:
        UsageError: where golden was scored already.
    """
    path = folder / "study.yaml"
    with locked(folder):
        old = read_study(path)
        configs = {arm: merged(old["configs"].get(arm, []), found) for arm, found in labels.items()}
        study = old | {"configs": old["configs"] | configs}
        refuse_late_configs(path, old, study)
        if study != old:
            write_study(path, study)


def write_study(path: Path, study: dict[str, Any]) -> None:
    """Write study.yaml with the hash of its contents, so that a change by hand shows."""
    parts = {key: value for key, value in study.items() if key != STUDY_HASH}
    text = yaml.safe_dump(parts | {STUDY_HASH: digest(parts)}, sort_keys=False, allow_unicode=True)
    write_twice(path, text)


def refuse_late_configs(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
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
    if STUDY_HASH in study and study[STUDY_HASH] != digest(
        {key: value for key, value in study.items() if key != STUDY_HASH}
    ):
        raise UsageError(
            f"{path}: was changed after it was registered; a verdict on a changed question means nothing: put the file "
            "back as it was, or register the new question as a study of its own, study=NAME"
        )
    return cast(dict[str, Any], study)


def merged(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """Return both lists in one, each item once."""
    return list(dict.fromkeys([*old, *new]))


def facts_warnings(study: Path) -> list[str]:
    """Return what the scorers of a study found that a reader of its verdict must know."""
    files = [study / name for name in ("judge.json", "length_controlled.json")]
    return [str(text) for path in files if path.is_file() for text in read_json(path).get("warnings", [])]
