"""study.yaml, the registered question: read it, write it sealed, and add configs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar, cast

import yaml

from harness.study.backup import write_twice
from harness.study.errors import UsageError
from harness.study.files import Json, is_broken, locked, read_json, seal

MARGIN = 0.05  # the smallest difference that matters, where a user gives none
ALPHA = 0.05  # error rate of the decision
RULE_VERSION = 2  # of the decision rule; studies that register none were registered under version 1
CONTRAST = ("simpo", "dpo")  # first minus second, where a study has both arms

Item = TypeVar("Item")


class Guard(TypedDict):
    """A second metric on which the winner must not be worse by `margin`."""

    metric: str
    margin: float


class ModelSources(TypedDict, total=False):
    """What the checkpoint was made of, where an adapter was merged or a text part taken: kind, folders, hashes."""

    made_of: dict[str, str]


class RegisteredModel(ModelSources):
    """The SFT base; `revision` is None for a folder, `base_sha256` is of the weights."""

    path: str
    revision: str | None
    base_sha256: str


class Registration(TypedDict):
    """study.yaml: the question, registered before the first trial. Arms, configs and seeds may be added.

    Attributes:
        contrast: the two arms of the difference, first minus second; empty with one arm.
        configs: labels of the configs by arm; seeds: of the confirmation, by arm.
        tuned: arms whose config is selected on dev, with `tuning_seeds`.
        looks: numbers of seeds at which golden is looked at; empty for one look with all seeds.
        rule_version: of the decision rule; absent where a study was registered before version 2.
        family: `name` and `value` of this study in a family of studies; empty outside one.
        data: facts of the splits, with hashes.
        fixed: all that must not change; `fixed_sha256`: its hash.
        sha256: the seal.
    """

    study: str
    question: str
    arms: list[str]
    contrast: list[str]
    configs: dict[str, list[str]]
    seeds: dict[str, list[int]]
    tuned: list[str]
    tuning_seeds: list[int]
    metric: str
    margin: float
    alpha: float
    guards: list[Guard]
    looks: list[int]
    rule_version: NotRequired[int]
    family: dict[str, Json]
    model: RegisteredModel
    data: dict[str, Any]
    warnings: list[str]
    command: str
    created: str
    fixed: dict[str, Any]
    fixed_sha256: str
    sha256: NotRequired[str]


def read_study(path: Path) -> Registration:
    """Read study.yaml.

    Raises:
        UsageError: where it is damaged, changed, or not a study's.
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
    if is_broken(study):
        raise UsageError(
            f"{path}: was changed after it was registered; a verdict on a changed question means nothing: put the file "
            "back as it was, or register the new question as a study of its own, study=NAME"
        )
    return cast(Registration, study)


def registered_date(folder: Path, *, otherwise: str = "") -> datetime:
    """Return when a study was registered (UTC): what chat templates take for now, in all its commands.

    Args:
        folder: of the study.
        otherwise: the date, in ISO form, of a study that is not registered yet; empty for now.
    """
    date = otherwise or datetime.now(UTC).isoformat(timespec="seconds")
    with contextlib.suppress(UsageError):  # none yet, or one that the sweep has to put back first
        date = read_study(folder / "study.yaml").get("created", date)
    return datetime.fromisoformat(date).replace(tzinfo=None)


def write_study(path: Path, study: Registration) -> None:
    """Write study.yaml with its seal, so that a change by hand shows."""
    write_twice(path, yaml.safe_dump(seal(study), sort_keys=False, allow_unicode=True))


def add_configs(folder: Path, labels: Mapping[str, Sequence[str]]) -> None:
    """Register configs that a sampler has suggested, before they are trained.

    Raises:
        UsageError: where golden was scored already.
    """
    path = folder / "study.yaml"
    with locked(folder):
        old = read_study(path)
        configs = {arm: merged(old["configs"].get(arm, []), found) for arm, found in labels.items()}
        study: Registration = {**old, "configs": old["configs"] | configs}
        refuse_late_configs(path, old, study)
        if study != old:
            write_study(path, study)


def refuse_late_configs(path: Path, old: Registration | None, new: Registration) -> None:
    """Refuse configs and tuning seeds that are added after golden was scored: their selection has seen it."""
    if old is None:
        return
    added = {
        f"{arm} {label}": None
        for arm, labels in new["configs"].items()
        for label in labels
        if old["configs"].get(arm) and label not in old["configs"][arm]
    }
    added |= {f"tuning seed {seed}": None for seed in new["tuning_seeds"] if seed not in old["tuning_seeds"]}
    if added and _has_golden_scores(path.parent):
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
    ordered = [arm for arm in CONTRAST if arm in arms]
    ordered += [arm for arm in arms if arm not in ordered]
    return ordered[:2] if len(ordered) > 1 else []


def merged(old: Sequence[Item], new: Sequence[Item]) -> list[Item]:
    """Return the items of both lists in order, each once."""
    return list(dict.fromkeys([*old, *new]))


def facts_warnings(study: Path) -> list[str]:
    """Return the warnings that study-level scorers left for readers of the verdict."""
    files = [study / name for name in ("judge.json", "length_controlled.json", "own_scorers.json")]
    return [str(text) for path in files if path.is_file() for text in read_json(path).get("warnings", [])]
