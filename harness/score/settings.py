"""Settings for scoring a study again: files of the results folder and typed words -> `Settings`, or a `UsageError`.

A results folder is data, maybe from somebody else. Rule: deny by default.

- A key in `HARMLESS` is used: it changes scores at most.
- A key in `SENSITIVE` is used only where the command line types it or says trust_study=true.
- Any other key is refused.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.keys import find_declared, shown, unknown_key, value_problem
from harness.config.paths import expand_home
from harness.config.schema import ModelConfig, ScoreConfig, Tuning
from harness.config.trial_id import plain
from harness.score.judge_endpoint import key_problem
from harness.score.judge_protocol import shipped_templates
from harness.score.scorers import reads
from harness.study.errors import UsageError
from harness.study.files import Json, read_json
from harness.study.text import one_line, redact

NOTE = "scoring.json"
TRUST = "trust_study"
_TUNING = "train.tuning"
_SHOWN = 500  # characters of a value in a message; an address is shown whole or marked as cut
_LINKS = 10  # links that a message lists

HARMLESS = frozenset(
    {
        *("score.max_cost_usd", "score.labeller", "score.length_control.of"),
        *(f"score.judge.{key}" for key in ("model", "structured", "max_tokens", "temperature", "concurrency")),
        *(f"score.judge.{key}" for key in ("timeout_seconds", "max_retries", "input_price", "output_price")),
        *("score.reward_model.batch_size", "score.reward_model.max_length"),
        *(f"score.lm_eval.{key}" for key in ("metric", "limit", "num_fewshot", "batch_size", "chat_template")),
        _TUNING,
    }
)
_IGNORED = frozenset({"score.head_to_head"})  # removed; stored settings may still hold it


def _is_shipped(value: Json) -> bool:
    return value in shipped_templates()


def _are_task_names(value: Json) -> bool:
    """Return whether these are names of tasks, and not files of tasks."""
    return isinstance(value, list) and all(re.fullmatch(r"[\w-]+", str(name)) for name in value)


@dataclass(frozen=True)
class Sensitive:
    """A sensitive key.

    Attributes:
        effect: of its value, for messages.
        is_harmless: returns True for the values that are harmless all the same.
    """

    effect: str
    is_harmless: Callable[[Json], bool] = lambda value: False


# A sensitive key is left out where no scorer that runs reads it; `Scorer.keys` says which scorer reads what.
SENSITIVE: Mapping[str, Sensitive] = {
    "score.judge.base_url": Sensitive("address that prompts and answers are sent to"),
    "score.judge.api_key_env": Sensitive("environment variable whose value is sent as the key"),
    "score.judge.template": Sensitive("file that is read and sent", _is_shipped),
    "score.baseline": Sensitive("file that is read and sent"),
    "score.calibration_pairs": Sensitive("file that is read and sent"),
    "score.reward_model.path": Sensitive("model that is downloaded or read, and run"),
    "score.reward_model.revision": Sensitive("version of the model that is run"),
    "score.length_control.difficulty": Sensitive("file that is read"),
    "score.length_control.gamed": Sensitive("file that is read"),
    "score.lm_eval.tasks": Sensitive("tasks that are run", _are_task_names),
    "score.lm_eval.include_path": Sensitive("folder whose code is run"),
    "score.scorers": Sensitive("files whose code is run"),  # no scorer reads it: only typed files run
    "model.path": Sensitive("model that is downloaded or read, and run"),
    "model.revision": Sensitive("version of the model that is run"),
    "model.chat_template": Sensitive("file that is read"),
}


@dataclass(frozen=True)
class Settings:
    """The settings for scoring a study again.

    Attributes:
        score: the group `score` of the config.
        model: the base of the policies, for benchmarks.
        is_quantised: whether to load the base in 4 bits.
        noted: the settings to store for the next time, unused ones included.
    """

    score: ScoreConfig
    model: ModelConfig
    is_quantised: bool
    noted: Json


@dataclass
class _Used:
    """The merged settings, with declared types for OmegaConf's conversion."""

    score: ScoreConfig = field(default_factory=ScoreConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


def read_settings(study: Path, overrides: Sequence[str], scorers: Sequence[str]) -> Settings:
    """Merge the study's settings and the typed ones; print to stderr the settings that need trust.

    Args:
        study: its folder.
        overrides: typed words: `score.KEY=VALUE`, `model.path=...`, `trust_study=true`.
        scorers: the requested scorers of the whole study.

    Raises:
        UsageError: for wrong settings, and for sensitive settings of the study that are neither typed nor trusted.
    """
    is_trusted, words = _split_trust(overrides)
    typed = _typed(words)
    links = links_out(study)
    if links and not is_trusted:
        raise UsageError(f"{links_problem(links)}, or say {TRUST}=true")
    needs_base = reads(scorers, "model.path")
    found = [*_of_score(study), *(_of_base(study) if needs_base else ())]
    admitted, trusted = admit(found, typed=typed, scorers=scorers, is_trusted=is_trusted)
    if trusted or links:
        lines = "\n".join([*trusted, *links])
        print(redact(f"{TRUST}=true: used as the results folder says:\n{lines}"), file=sys.stderr, flush=True)
    if needs_base and "model.path" not in {*typed, *admitted}:
        raise UsageError(f"{study / 'base'}: no config.yaml names the base of the policies; type model.path=FOLDER")
    is_quantised = admitted.pop(_TUNING, None) == Tuning.qlora.value
    noted = {one.key: one.value for one in found} | typed
    try:
        merged = OmegaConf.merge(OmegaConf.structured(_Used), _nested(admitted), _nested(typed))
        used = cast(_Used, OmegaConf.to_object(merged))
        expand_home(used)
    except OmegaConfBaseException as error:
        raise UsageError(f"{' '.join(words) or study}: {' '.join(str(error).split())}") from error
    return Settings(used.score, used.model, is_quantised, _nested(noted).get("score", {}))


def _split_trust(overrides: Sequence[str]) -> tuple[bool, list[str]]:
    """Return whether the study is trusted, and the other words."""
    given = [text for text in overrides if text.startswith(f"{TRUST}=")]
    wrong = [text for text in given if text not in (f"{TRUST}=true", f"{TRUST}=false")]
    if wrong:
        raise UsageError(f"{wrong[0]}: allowed: {TRUST}=true, {TRUST}=false")
    return given[-1:] == [f"{TRUST}=true"], [text for text in overrides if text not in given]


def _typed(words: Sequence[str]) -> dict[str, Json]:
    """Return the typed settings by key; refuse unknown keys and wrong values."""
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
    return {one.key: one.value for name in ("score", "model") for one in _settings_of(values, name, command)}


@dataclass(frozen=True)
class Found:
    """A setting in a file of the study."""

    key: str
    value: Json
    file: Path

    def __str__(self) -> str:
        """Format it as a typed word, in one line of visible characters."""
        return one_line(f"{self.key}={shown(self.value)}", _SHOWN)


def _of_score(study: Path) -> list[Found]:
    """Return the settings of the last scoring, else those of the sweep."""
    note = study / NOTE
    if note.is_file():
        return _settings_of({"score": _group(_read(note), "settings")}, "score", note)
    for path in sorted(study.glob("*/config.yaml")) + sorted(study.glob("trials/*/config.yaml")):
        if found := _settings_of(_read(path), "score", path):
            return found
    return []


def _of_base(study: Path) -> list[Found]:
    """Return the base model of the policies, and how they were trained."""
    path = study / "base" / "config.yaml"
    if not path.is_file():
        return []
    config = _read(path)
    tuning = [one for one in _settings_of(config, "train", path) if one.key == _TUNING]
    return [*_settings_of(config, "model", path), *tuning]


def _settings_of(values: Any, name: str, file: Path) -> list[Found]:
    """Return the settings of one group of a config."""
    return [one for one in settings_in(_group(values, name), name, file) if one.key not in _IGNORED]


def settings_in(values: Any, prefix: str, file: Path) -> Iterator[Found]:
    """Yield the settings below a key; `values` is the parsed content of a file."""
    if not isinstance(values, Mapping):
        yield Found(prefix, _to_json(values), file)
        return
    for key, value in values.items():
        yield from settings_in(value, f"{prefix}.{key}", file)


def _to_json(value: Any) -> Json:
    """Convert a YAML value to JSON: dates, NaN and infinities become text."""
    if isinstance(value, list):
        return [_to_json(one) for one in value]
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if value is None or is_number or isinstance(value, str) else str(value)


def _group(values: Any, name: str) -> dict[str, Any]:
    """Return a group of a file's content; empty where it has none."""
    found = values.get(name) if isinstance(values, dict) else None
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> Any:
    try:
        return read_json(path) if path.suffix == ".json" else yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not readable ({' '.join(str(error).split())})") from error


def _nested(values: Mapping[str, Json]) -> dict[str, Json]:
    """Turn `{a.b: 1}` into `{a: {b: 1}}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return found


def admit(
    found: Sequence[Found], *, typed: Collection[str], scorers: Collection[str], is_trusted: bool
) -> tuple[dict[str, Json], list[str]]:
    """Apply the rule to a study's settings.

    Args:
        found: the settings in the study's files.
        typed: keys that the command line sets; the study's values of these are left out.
        scorers: the scorers that will run.
        is_trusted: whether the command line says trust_study=true.

    Returns:
        The usable settings by key, and one line per setting that is used by trust alone.

    Raises:
        UsageError: for an unknown key, a wrong value, and a sensitive key that is neither typed nor trusted.
    """
    admitted, wrong, refused, trusted = {}, [], [], []
    for one in found:
        sensitive = SENSITIVE.get(one.key)
        if one.key in typed or (sensitive and not reads(scorers, one.key)):
            continue
        if problem := _problem(one):
            wrong.append(f"{one.file}: {problem}")
        elif not sensitive or one.value == _default(one.key) or sensitive.is_harmless(one.value):
            admitted[one.key] = one.value
        elif is_trusted:
            admitted[one.key] = one.value
            trusted.append(_line(one))
        else:
            refused.append(one)
    if wrong or refused:
        raise UsageError("\n".join([*wrong, *_refusal(refused)]))
    return admitted, trusted


def _default(key: str) -> Json:
    value: Json = plain(_Used())
    for part in key.split("."):
        assert isinstance(value, dict), "a sensitive key is declared"
        value = value[part]
    return value


def _problem(found: Found) -> str | None:
    """Say why a setting is unusable even in a trusted study; None where it is usable."""
    key = found.key
    if key not in HARMLESS and key not in SENSITIVE:
        return f"{one_line(key, 100)}: no setting that is taken from a results folder; take it out of the file"
    if "${" in str(found.value):  # OmegaConf would replace it, also by environment variables
        return f"{found}: holds an interpolation (${{...}}); allowed: plain values; type {key}=VALUE"
    declared = next(known for known, *_ in find_declared(key, []))
    assert declared is not None, "HARMLESS and SENSITIVE name declared keys"
    if problem := value_problem(declared, found.value):
        return f"{found}: {problem}; type {key}=VALUE"
    return key_problem(str(found.value)) if key == "score.judge.api_key_env" else None


def _line(found: Found) -> str:
    return f"  {found}  ({SENSITIVE[found.key].effect}; {found.file})"


def _refusal(refused: Sequence[Found]) -> list[str]:
    """Return the lines of the message about refused settings, with the words to type."""
    if not refused:
        return []
    return [
        "what a results folder says is not used to send, to read or to run anything unless you say so:",
        *map(_line, refused),
        f"allowed: what you type. Where it is right, add: {' '.join(shlex.quote(str(one)) for one in refused)}",
        f"or, to use all that this results folder says: {TRUST}=true",
    ]


def links_out(study: Path) -> list[str]:
    """Return one line per link of a study that leads out of its folder, whose target would be read and sent."""
    inside = [path for path in sorted(study.iterdir()) if path.name != "wandb"]  # W&B's links are not read here
    inside += [path for name in ("base", "trials") for path in sorted((study / name).rglob("*"))]
    return links_among(inside, study)


def links_among(paths: Sequence[Path], folder: Path) -> list[str]:
    """Return one line per path that is a link out of a folder."""
    root = os.path.realpath(folder)
    targets = {path: os.path.realpath(path) for path in paths if path.is_symlink()}
    return [
        f"  {one_line(f'{path} -> {target}', _SHOWN)}  (link out of the results folder)"
        for path, target in targets.items()
        if os.path.commonpath([root, target]) != root
    ]


def links_problem(links: Sequence[str]) -> str:
    """Return the message about links that lead out of a study."""
    listed = "\n".join(links[:_LINKS])
    return (
        f"links lead out of the results folder ({len(links)}), and their targets would be read:\n{listed}\n"
        "allowed: files in the folder itself; put them there in place of the links"
    )
