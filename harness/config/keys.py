"""A config key and a value -> the key's declaration (type, limits), or a sentence that says what is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

from harness.config.arms import ARMS, Limits, MethodConfig, declared_limits
from harness.config.schema import RunConfig
from harness.config.trial_id import RENAMED
from harness.study.files import Json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Value: TypeAlias = "Json | Enum"  # of a key, as composed or as typed

_NO_HYPERPARAMETERS = ("name", "learning_rates")  # keys of conf/method/*.yaml that no user sets
TRAINED = tuple(name for name, arm in ARMS.items() if arm.trainer)

# Keys that the sweep decides on, and what to do instead of typing them.
SET_BY_SWEEP = {
    "cost_name": "measure_costs=true runs trials for their cost",
    "evaluate": "golden is answered once a config is selected; harness.train --dev-only leaves it out",
    "family.name": "study=NAME names the family's studies",
    "family.value": "family.values lists the values, one study each",
}
_NEW_NAMES = {old: new for new, old in RENAMED.items()}


@dataclasses.dataclass(frozen=True)
class Declared:
    """The declaration of a key.

    Attributes:
        hint: its type, such as `int | None`.
        limits: its allowed values.
    """

    hint: Any
    limits: Limits


def declared_keys(owner: type) -> dict[str, Declared]:
    """Return the declared keys of a config dataclass by name."""
    hints = typing.get_type_hints(owner)
    return {f.name: Declared(hints[f.name], declared_limits(f)) for f in dataclasses.fields(owner)}


def close_match(word: str, known: Iterable[str]) -> str:
    """Return `. Did you mean X?` where a known word is similar, else nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean {matches[0]}?" if matches else ""


def shown(value: Value) -> str:
    """Write a value as typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    return str(value)


def range_problems(config: DataclassInstance, prefix: str = "") -> Iterator[str]:
    """Yield a message per value of a config dataclass that is not of its type or not in its range."""
    for name, declared in declared_keys(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from range_problems(value, f"{prefix}{name}.")
        elif problem := value_problem(declared, value):
            yield f"{prefix}{name}={shown(value)}: {problem}"


def value_problem(declared: Declared, value: Value) -> str | None:
    """Say what is wrong with a value for a declared key, or None: its type first, then its range."""
    kind, limits = _without_null(declared.hint), declared.limits
    if value is None:
        return None if kind is not declared.hint else "must not be null"
    if typing.get_origin(kind) is list:
        return _list_problem(typing.get_args(kind)[0], limits, value)
    if kind in (int, float):
        return _number_problem(kind, limits, value)
    return _word_problem(kind, limits, value)


def _without_null(hint: Any) -> Any:
    """Return the type of a key that may be null as well."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next(option for option in options if option is not type(None))


def _word_problem(kind: Any, limits: Limits, value: Value) -> str | None:
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.name for member in kind]
        return None if getattr(value, "name", value) in names else f"allowed: {', '.join(names)}"
    if kind is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if kind is str and isinstance(value, list | dict):
        return "must be a text, without [ ] and { } around it"
    return f"allowed: {', '.join(limits.choices)}" if limits.choices and value not in limits.choices else None


def _list_problem(item: Any, limits: Limits, value: Value) -> str | None:
    if isinstance(value, list):
        is_mapping = typing.get_origin(item) is dict
        wrong = any(
            not isinstance(one, dict) if is_mapping else value_problem(Declared(item, limits), one) for one in value
        )
        is_set = len(set(map(str, value))) == len(value) and (bool(value) or limits.may_be_empty)
        if (is_set or not limits.distinct) and not wrong:
            return None
    if limits.items:
        return f"must be a list of {limits.items}"
    words = {int: "whole numbers", float: "numbers"}.get(item, "words")
    several = "one or more different " if limits.distinct else ""
    example = f"[{limits.choices[0]}]" if limits.choices else "[0,1]"
    allowed = f"; allowed: {', '.join(limits.choices)}" if limits.choices else _allowed_range(limits)
    return f"must be a list of {several}{words}, such as {example}{allowed}"


def _number_problem(kind: type, limits: Limits, value: Value) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return ("must be a whole number" if kind is int else "must be a number") + _allowed_range(limits)
    is_inside = (
        (isinstance(value, int) or math.isfinite(value))
        and (limits.above is None or value > limits.above)
        and (limits.at_least is None or value >= limits.at_least)
        and (limits.below is None or value < limits.below)
        and (limits.at_most is None or value <= limits.at_most)
    )
    return None if is_inside else "out of range" + _allowed_range(limits)


def _allowed_range(limits: Limits) -> str:
    ends = ((">", limits.above), (">=", limits.at_least), ("<", limits.below), ("<=", limits.at_most))
    parts = [f"{sign} {end if isinstance(end, int) else f'{end:g}'}" for sign, end in ends if end is not None]
    return f"; allowed: {' and '.join(parts)}" if parts else ""


@dataclasses.dataclass(frozen=True)
class Scope:
    """The place where a key was looked up.

    Attributes:
        prefix: path of the section, with a dot at its end.
        known: keys of the section.
        others: other arms that have the key.
        arm: the arm, in a section of an arm's keys.
        is_space: the key takes several values, as a search space.
    """

    prefix: str
    known: tuple[str, ...]
    others: tuple[str, ...] = ()
    arm: str | None = None
    is_space: bool = False


def find_declared(key: str, arms: list[str]) -> Iterator[tuple[Declared | None, str, Scope]]:
    """Yield the declaration of a key (None: there is none), its path and its scope, once per arm that it applies to."""
    head, _, rest = key.partition(".")
    if head == "method" and rest:
        yield from (_find_in_arm(arm, rest, prefix="method.", is_space=False) for arm in arms if arm in ARMS)
    elif head == "arms" and rest:
        arm, _, name = rest.partition(".")
        if arm in TRAINED:
            yield _find_in_arm(arm, name, prefix=f"arms.{arm}.", is_space=True)
        else:
            yield None, key, Scope("arms.", TRAINED)
    else:
        yield _find_in_config(key)


def _find_in_config(key: str) -> tuple[Declared | None, str, Scope]:
    owner: Any = RunConfig
    found, walked = Declared(RunConfig, Limits()), ""
    for part in key.split("."):
        known = _typed_keys(owner, walked)
        if part not in known:
            return None, key, Scope(walked, tuple(known))
        found, walked, owner = known[part], f"{walked}{part}.", known[part].hint
    known = _typed_keys(owner, walked)
    return None if dataclasses.is_dataclass(owner) else found, key, Scope(walked, tuple(known))


def _typed_keys(owner: Any, walked: str) -> dict[str, Declared]:
    """Return the keys of a section that a user may type; none for a type that is no section."""
    known = declared_keys(owner) if isinstance(owner, type) and dataclasses.is_dataclass(owner) else {}
    return {name: declared for name, declared in known.items() if f"{walked}{name}" not in SET_BY_SWEEP}


def _find_in_arm(arm: str, name: str, *, prefix: str, is_space: bool) -> tuple[Declared | None, str, Scope]:
    keys = _hyperparameters(ARMS[arm].config)
    others = tuple(other for other in TRAINED if other != arm and name in _hyperparameters(ARMS[other].config))
    return keys.get(name), f"{prefix}{name}", Scope(prefix, tuple(keys), others, arm, is_space)


def _hyperparameters(owner: type[MethodConfig]) -> dict[str, Declared]:
    return {name: declared for name, declared in declared_keys(owner).items() if name not in _NO_HYPERPARAMETERS}


def unknown_key(path: str, scope: Scope) -> str:
    """Say that a key is unknown, moved, or another arm's, and name the known ones."""
    if path in _NEW_NAMES:
        return f"{path} was renamed: write {_NEW_NAMES[path]}"
    name = path.removeprefix(scope.prefix)
    allowed = ", ".join(f"{scope.prefix}{key}" for key in scope.known) or "none"
    if scope.arm and scope.others:
        return (
            f"{name} is a key of {', '.join(scope.others)}, not of {scope.arm}; "
            f"to set it for one arm only write arms.{scope.others[0]}.{name}=...; allowed for {scope.arm}: {allowed}"
        )
    return f"unknown key {path}; allowed: {allowed}{close_match(path, [scope.prefix + k for k in scope.known])}"
