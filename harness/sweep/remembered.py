"""What a command leaves out and the study has registered already: its seeds, and its rule.

Without this, the defaults of the harness would add trials to a study, look at golden again, or ask another question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from harness.study.errors import UsageError
from harness.study.files import Json
from harness.study.log import say
from harness.study.registration import Registration, merged, read_study
from harness.sweep.design import Request


def with_registered_rule(request: Request, parsed: Sequence[Override], master: DictConfig) -> Request:
    """Return a request for a named study with the keys of the section `decide` that it leaves out, as registered.

    A preset (`+sweep=`) states its own rule, and so does a family of studies.
    """
    typed = {override.key_or_group for override in parsed}
    if master.study is None or master.family.key or "sweep" in typed:
        return request
    old = _registered(Path(master.results_dir) / str(master.study))
    if old is None:
        return request
    rule: dict[str, Json] = {
        "metric": old["metric"],
        "margin": old["margin"],
        "alpha": old["alpha"],
        "guards": [{"metric": guard["metric"], "margin": guard["margin"]} for guard in old.get("guards") or ()],
        "looks": list(old.get("looks") or ()),
    }
    left_out = {key: value for key, value in rule.items() if value and f"decide.{key}" not in typed}
    return replace(request, common=[*request.common, *(f"decide.{key}={_text(v)}" for key, v in left_out.items())])


def with_registered_seeds(request: Request, study: Path) -> Request:
    """Return a request with the registered seeds of a study in place of the default ones, where none were given."""
    old = _registered(study)
    if old is None or (request.has_seeds and request.has_tuning_seeds):
        return request
    known = [arm for arm in request.spaces if arm in old["seeds"]] or list(old["seeds"])
    seeds, tuning = request.seeds, request.tuning_seeds
    if not request.has_seeds:
        found = [seed for arm in known for seed in old["seeds"][arm]]
        seeds = merged([], found) or seeds
    if not request.has_tuning_seeds:
        tuning = old.get("tuning_seeds") or tuning
    if seeds != request.seeds:
        say(f"{study.name}: seed= is left out; the registered seeds are used: {','.join(map(str, seeds))}")
    return replace(request, seeds=seeds, tuning_seeds=tuning)


def _registered(study: Path) -> Registration | None:
    """Return a study's registration; None where there is none, or one that the sweep has to mend or to refuse."""
    try:
        return read_study(study / "study.yaml")
    except UsageError:
        return None


def _text(value: Json) -> str:
    """Return a value in the grammar of the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return repr(value)
