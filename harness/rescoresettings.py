"""How a study is scored again: what this command line types, on top of what may be used of the study's own settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.keys import find_declared, shown, unknown_key, value_problem
from harness.records import UsageError, read_json
from harness.redaction import redact
from harness.schema import ModelConfig, Tuning
from harness.scoreconfig import ScoreConfig
from harness.trust import SENSITIVE, TRUST, Found, admit, links_out, links_problem, settings_in

NOTE = "scoring.json"
_TUNING = "train.tuning"


@dataclass
class _Used:
    """What is merged: declared types, so that OmegaConf converts the values."""

    score: ScoreConfig = field(default_factory=ScoreConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class Settings:
    """How a study is scored again.

    Attributes:
        score: the settings to use.
        model: the base of the policies, for benchmarks.
        is_quantised: whether the base is run in 4 bits.
        noted: the settings of `score` to keep for the next time, with what is not used this time.
    """

    score: ScoreConfig
    model: ModelConfig
    is_quantised: bool
    noted: dict[str, Any]


def read_settings(study: Path, overrides: Sequence[str], scorers: Sequence[str]) -> Settings:
    """Return the settings to score a study with, and say on stderr which are used because the study is trusted.

    Args:
        study: its folder.
        overrides: `score.KEY=VALUE`, `model.path=...`, `trust_study=true`, as typed.
        scorers: those that will run and have settings.

    Raises:
        UsageError: for wrong settings, and for settings of the study that nobody has typed or trusted.
    """
    is_trusted, words = _split_trust(overrides)
    typed = _typed(words)
    links = links_out(study)
    if links and not is_trusted:
        raise UsageError(f"{links_problem(links)}, or say {TRUST}=true")
    found = [*_of_score(study), *(_of_base(study) if "lm_eval" in scorers else ())]
    admitted, trusted = admit(found, typed=typed, scorers=scorers, is_trusted=is_trusted)
    if trusted or links:
        lines = "\n".join([*trusted, *links])
        print(redact(f"{TRUST}=true: used as the results folder says:\n{lines}"), file=sys.stderr, flush=True)
    if "lm_eval" in scorers and "model.path" not in {*typed, *admitted}:
        raise UsageError(f"{study / 'base'}: no config.yaml names the base of the policies; type model.path=FOLDER")
    is_quantised = admitted.pop(_TUNING, None) == Tuning.qlora.value
    noted = {one.key: one.value for one in found} | typed
    try:
        merged = OmegaConf.merge(OmegaConf.structured(_Used), _nested(admitted), _nested(typed))
        used = cast(_Used, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UsageError(f"{' '.join(words) or study}: {' '.join(str(error).split())}") from error
    return Settings(used.score, used.model, is_quantised, _nested(noted).get("score", {}))


def _split_trust(overrides: Sequence[str]) -> tuple[bool, list[str]]:
    given = [text for text in overrides if text.startswith(f"{TRUST}=")]
    wrong = [text for text in given if text not in (f"{TRUST}=true", f"{TRUST}=false")]
    if wrong:
        raise UsageError(f"{wrong[0]}: allowed: {TRUST}=true, {TRUST}=false")
    return given[-1:] == [f"{TRUST}=true"], [text for text in overrides if text not in given]


def _typed(words: Sequence[str]) -> dict[str, Any]:
    """Return what the command line sets, by key; refuse what is unknown or no value for its key."""
    of_model = [key for key in SENSITIVE if key.startswith("model.")]
    for text in words:
        key, _, value = text.partition("=")
        if not key.startswith("score.") and key not in of_model:
            allowed = ", ".join(["score.KEY", *of_model, TRUST])
            raise UsageError(f"{text}: {key} cannot be set here; allowed: {allowed}")
        for declared, path, scope in find_declared(key, []):
            if declared is None:
                raise UsageError(unknown_key(path, scope))
            problem = value_problem(declared, yaml.safe_load(value) if value else "")
            if problem:
                raise UsageError(f"{key}={shown(yaml.safe_load(value))}: {problem}")
    values = OmegaConf.to_container(OmegaConf.from_dotlist(list(words)))
    command = Path("command line")
    return {one.key: one.value for name in ("score", "model") for one in _below(values, name, command)}


def _of_score(study: Path) -> list[Found]:
    """Return the settings of the last scoring, else those of the sweep."""
    note = study / NOTE
    if note.is_file():
        return _below({"score": _section(_read(note), "settings")}, "score", note)
    for path in sorted(study.glob("*/config.yaml")) + sorted(study.glob("trials/*/config.yaml")):
        if found := _below(_read(path), "score", path):
            return found
    return []


def _of_base(study: Path) -> list[Found]:
    """Return the model that the policies were trained from, and how."""
    path = study / "base" / "config.yaml"
    if not path.is_file():
        return []
    config = _read(path)
    return [*_below(config, "model", path), *(one for one in _below(config, "train", path) if one.key == _TUNING)]


def _below(values: Any, name: str, file: Path) -> list[Found]:
    return list(settings_in(_section(values, name), name, file))


def _section(values: Any, name: str) -> dict[str, Any]:
    """Return a section of what a file holds; empty where it has none."""
    found = values.get(name) if isinstance(values, dict) else None
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> Any:
    try:
        return read_json(path) if path.suffix == ".json" else yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not readable ({' '.join(str(error).split())})") from error


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn `{a.b: 1}` into `{a: {b: 1}}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return found
