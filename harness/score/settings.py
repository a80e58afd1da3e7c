"""The one place through which settings of a results folder come in: what lies there is data.

A setting is used where its key is in `HARMLESS`. One that says where to send, which variable to read, which files to
read or which code to run (`SENSITIVE`) is used only where this command line types it, or says trust_study=true. Any
other key is refused. Input: what files of the study say -> output: what may be used, or a `UsageError`.
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
from harness.config.schema import ModelConfig, ScoreConfig, Tuning
from harness.score.judge_endpoint import key_problem
from harness.score.judge_protocol import shipped_templates
from harness.study.errors import UsageError
from harness.study.files import read_json
from harness.study.text import one_line, redact

TRUST = "trust_study"
_SHOWN = 500  # characters of a value: an address is shown whole, or it is said that it is cut
_LINKS = 10  # links that a message lists

# What changes scores at most, wherever it comes from.
HARMLESS = frozenset(
    {
        *("score.max_cost_usd", "score.labeller", "score.head_to_head", "score.length_control.of"),
        *(f"score.judge.{key}" for key in ("model", "structured", "max_tokens", "temperature", "concurrency")),
        *(f"score.judge.{key}" for key in ("timeout_seconds", "max_retries", "input_price", "output_price")),
        *("score.reward_model.batch_size", "score.reward_model.max_length"),
        *(f"score.lm_eval.{key}" for key in ("metric", "limit", "num_fewshot", "batch_size", "chat_template")),
        "train.tuning",
    }
)


def _is_shipped(value: Any) -> bool:
    return value in shipped_templates()


def _are_names(value: Any) -> bool:
    """Whether these are names of tasks, and not files of tasks."""
    return isinstance(value, list) and all(re.fullmatch(r"[\w-]+", str(name)) for name in value)


@dataclass(frozen=True)
class Sensitive:
    """What a key names.

    Attributes:
        what: in words.
        scorers: those that use it; where none of them runs, it is left out.
        is_harmless: tells the values that are harmless all the same.
    """

    what: str
    scorers: tuple[str, ...]
    is_harmless: Callable[[Any], bool] = lambda value: False


SENSITIVE: Mapping[str, Sensitive] = {
    "score.judge.base_url": Sensitive("address that prompts and answers are sent to", ("judge",)),
    "score.judge.api_key_env": Sensitive("environment variable whose value is sent as the key", ("judge",)),
    "score.judge.template": Sensitive("file that is read and sent", ("judge",), _is_shipped),
    "score.baseline": Sensitive("file that is read and sent", ("judge", "reward_model")),
    "score.calibration_pairs": Sensitive("file that is read and sent", ("judge",)),
    "score.reward_model.path": Sensitive("model that is downloaded or read, and run", ("reward_model",)),
    "score.reward_model.revision": Sensitive("version of the model that is run", ("reward_model",)),
    "score.length_control.difficulty": Sensitive("file that is read", ("length_controlled",)),
    "score.length_control.gamed": Sensitive("file that is read", ("length_controlled",)),
    "score.lm_eval.tasks": Sensitive("tasks that are run", ("lm_eval",), _are_names),
    "score.lm_eval.include_path": Sensitive("folder whose code is run", ("lm_eval",)),
    "score.scorers": Sensitive("files whose code is run", ()),  # only what the command line names is run
    "model.path": Sensitive("model that is downloaded or read, and run", ("lm_eval",)),
    "model.revision": Sensitive("version of the model that is run", ("lm_eval",)),
    "model.chat_template": Sensitive("file that is read", ("lm_eval",)),
}
_DEFAULTS = {"score": ScoreConfig(), "model": ModelConfig()}


@dataclass(frozen=True)
class Found:
    """A setting as a file of the study has it."""

    key: str
    value: Any
    file: Path

    def __str__(self) -> str:
        """Write it as it is typed, in one visible line."""
        return one_line(f"{self.key}={shown(self.value)}", _SHOWN)


def settings_in(values: Any, prefix: str, file: Path) -> Iterator[Found]:
    """Yield the settings below a section of a config, as a file of the study has them."""
    if not isinstance(values, Mapping):
        yield Found(prefix, _plain(values), file)
        return
    for key, value in values.items():
        yield from settings_in(value, f"{prefix}.{key}", file)


def _plain(value: Any) -> Any:
    """Return what JSON can hold: YAML has dates and numbers that it cannot."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if value is None or is_number or isinstance(value, str) else str(value)


def admit(
    found: Sequence[Found], *, typed: Collection[str], scorers: Collection[str], is_trusted: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return what may be used of a study's settings by key, and a line for each that is used by trust alone.

    Args:
        found: what the study's files say.
        typed: keys that this command line sets; what the study says of them does not matter.
        scorers: those that will run.
        is_trusted: whether this command line says trust_study=true.

    Raises:
        UsageError: for a key that is unknown, a value that is wrong, and a sensitive one that nobody has typed.
    """
    admitted, wrong, refused, trusted = {}, [], [], []
    for one in found:
        sensitive = SENSITIVE.get(one.key)
        if one.key in typed or (sensitive and not set(sensitive.scorers) & set(scorers)):
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


def _default(key: str) -> Any:
    section, *path = key.split(".")
    value: Any = _DEFAULTS[section]
    for part in path:
        value = getattr(value, part)
    return value


def _problem(found: Found) -> str | None:
    """Say why a setting cannot be used whoever trusts it, or None."""
    key = found.key
    if key not in HARMLESS and key not in SENSITIVE:
        return f"{one_line(key, 100)}: no setting that is taken from a results folder; take it out of the file"
    if "${" in str(found.value):  # OmegaConf would fill it in, also with what the environment holds
        return f"{found}: holds an interpolation (${{...}}); allowed: plain values; type {key}=VALUE"
    declared = next(known for known, *_ in find_declared(key, []))
    assert declared is not None, "HARMLESS and SENSITIVE name declared keys"
    if problem := value_problem(declared, found.value):
        return f"{found}: {problem}; type {key}=VALUE"
    return key_problem(str(found.value)) if key == "score.judge.api_key_env" else None


def _line(found: Found) -> str:
    return f"  {found}  ({SENSITIVE[found.key].what}; {found.file})"


def _refusal(refused: Sequence[Found]) -> list[str]:
    """Say what of a study is not used unasked, and what to type."""
    if not refused:
        return []
    return [
        "what a results folder says is not used to send, to read or to run anything unless you say so:",
        *map(_line, refused),
        f"allowed: what you type. Where it is right, add: {' '.join(shlex.quote(str(one)) for one in refused)}",
        f"or, to use all that this results folder says: {TRUST}=true",
    ]


def links_out(study: Path) -> list[str]:
    """Return a line for each link of a study that leads out of its folder: what it names would be read, and sent."""
    inside = [path for path in sorted(study.iterdir()) if path.name != "wandb"]  # W&B's own are not read here
    inside += [path for name in ("base", "trials") for path in sorted((study / name).rglob("*"))]
    return links_among(inside, study)


def links_among(paths: Sequence[Path], folder: Path) -> list[str]:
    """Return a line for each of the paths that is a link and leads out of a folder."""
    root = os.path.realpath(folder)
    targets = {path: os.path.realpath(path) for path in paths if path.is_symlink()}
    return [
        f"  {one_line(f'{path} -> {target}', _SHOWN)}  (link out of the results folder)"
        for path, target in targets.items()
        if os.path.commonpath([root, target]) != root
    ]


def links_problem(links: Sequence[str]) -> str:
    """Say that links lead out of a study."""
    shown_ones = "\n".join(links[:_LINKS])
    return (
        f"links lead out of the results folder ({len(links)}), and what they name would be read:\n{shown_ones}\n"
        "allowed: files in the folder itself; put them there in place of the links"
    )


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
