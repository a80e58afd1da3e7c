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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.judge.key import key_problem
from harness.judge.template import shipped_templates
from harness.keys import find_declared, shown, value_problem
from harness.records import UsageError
from harness.schema import ModelConfig
from harness.scoreconfig import ScoreConfig
from harness.untrusted import one_line

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
