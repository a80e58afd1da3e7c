"""What is declared of each config key, its type and its limits, and what is wrong with a value for it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

from harness.config.arms import ARMS

_NOT_GIVEN = ("name", "learning_rates")  # keys of conf/method/*.yaml that are no hyperparameters
TRAINED = tuple(name for name, arm in ARMS.items() if arm.trainer)


@dataclasses.dataclass(frozen=True)
class Declared:
    """What is declared of a key: its type and its limits (see `harness.config.arms.bounded`).

    A list's limits are those of its items; `distinct`: not empty and without repeats; `items`: what they are, in words.
    """

    hint: Any
    limits: Mapping[str, Any]


def declared_keys(owner: type) -> dict[str, Declared]:
    """Return the declared keys of a config dataclass by name."""
    hints = typing.get_type_hints(owner)
    return {f.name: Declared(hints[f.name], f.metadata) for f in dataclasses.fields(owner)}


def close_match(word: str, known: Iterable[str]) -> str:
    """Return `. Did you mean X?` where a known word is like this one, else nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean {matches[0]}?" if matches else ""


def shown(value: Any) -> str:
    """Write a value as one types it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    return str(value)


def without_null(hint: Any) -> Any:
    """Return the type of a key that may be null as well."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next(option for option in options if option is not type(None))


def value_problem(declared: Declared, value: Any) -> str | None:
    """Say what is wrong with a value for a declared key, or None: its type first, then its range."""
    kind, limits = without_null(declared.hint), declared.limits
    if value is None:
        return None if kind is not declared.hint else "must not be null"
    if typing.get_origin(kind) is list:
        return _list_problem(typing.get_args(kind)[0], limits, value)
    if kind in (int, float):
        return _number_problem(kind, limits, value)
    return _word_problem(kind, limits, value)


def _word_problem(kind: Any, limits: Mapping[str, Any], value: Any) -> str | None:
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.name for member in kind]
        return None if getattr(value, "name", value) in names else f"allowed: {', '.join(names)}"
    if kind is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if kind is str and isinstance(value, list | dict):
        return "must be a text, without [ ] and { } around it"
    choices = limits.get("choices")
    return f"allowed: {', '.join(choices)}" if choices and value not in choices else None


def _list_problem(item: Any, limits: Mapping[str, Any], value: Any) -> str | None:
    if isinstance(value, list):
        is_mapping = typing.get_origin(item) is dict
        wrong = any(
            not isinstance(one, dict) if is_mapping else value_problem(Declared(item, limits), one) for one in value
        )
        is_set = len(set(map(str, value))) == len(value) and (bool(value) or limits.get("may_be_empty"))
        some = is_set or not limits.get("distinct")
        if some and not wrong:
            return None
    if limits.get("items"):
        return f"must be a list of {limits['items']}"
    words = {int: "whole numbers", float: "numbers"}.get(item, "words")
    several = "one or more different " if limits.get("distinct") else ""
    choices = limits.get("choices")
    example = f"[{choices[0]}]" if choices else "[0,1]"
    allowed = f"; allowed: {', '.join(choices)}" if choices else _allowed(limits)
    return f"must be a list of {several}{words}, such as {example}{allowed}"


_SIGNS = {"above": ">", "at_least": ">=", "below": "<", "at_most": "<="}


def _allowed(limits: Mapping[str, Any]) -> str:
    parts = [f"{sign} {_plain(limits[name])}" for name, sign in _SIGNS.items() if name in limits]
    return f"; allowed: {' and '.join(parts)}" if parts else ""


def _plain(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _number_problem(kind: type, limits: Mapping[str, Any], value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return ("must be a whole number" if kind is int else "must be a number") + _allowed(limits)
    inside = (
        (isinstance(value, int) or math.isfinite(value))
        and ("above" not in limits or value > limits["above"])
        and ("at_least" not in limits or value >= limits["at_least"])
        and ("below" not in limits or value < limits["below"])
        and ("at_most" not in limits or value <= limits["at_most"])
    )
    return None if inside else "out of range" + _allowed(limits)


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where a key was looked for: the prefix, the keys that exist there, and the other arms that have the key."""

    prefix: str
    known: tuple[str, ...]
    others: tuple[str, ...] = ()
    arm: str | None = None
    is_space: bool = False


def find_declared(key: str, arms: list[str]) -> Iterator[tuple[Declared | None, str, Scope]]:
    """Find what is declared of a key, once for each arm that it would apply to."""
    from harness.config.schema import RunConfig

    head, _, rest = key.partition(".")
    if head == "method" and rest:
        for arm in arms:
            if arm in ARMS:
                yield _arm_field(arm, rest, prefix="method.", is_space=False)
        return
    if head == "arms" and rest:
        arm, _, name = rest.partition(".")
        if arm not in TRAINED:
            yield None, key, Scope("arms.", TRAINED)
            return
        yield _arm_field(arm, name, prefix=f"arms.{arm}.", is_space=True)
        return
    owner: Any = RunConfig
    found, walked = Declared(RunConfig, {}), ""
    for part in key.split("."):
        known = declared_keys(owner) if isinstance(owner, type) and dataclasses.is_dataclass(owner) else {}
        if part not in known:
            yield None, key, Scope(walked, tuple(known))
            return
        found, walked, owner = known[part], f"{walked}{part}.", known[part].hint
    is_section = dataclasses.is_dataclass(owner)
    yield (
        (None if is_section else found),
        key,
        Scope(walked, tuple(declared_keys(owner)) if is_section else ()),
    )


def _arm_field(arm: str, name: str, *, prefix: str, is_space: bool) -> tuple[Declared | None, str, Scope]:
    keys = {k: v for k, v in declared_keys(ARMS[arm].config).items() if k not in _NOT_GIVEN}
    others = tuple(n for n in TRAINED if n != arm and name in declared_keys(ARMS[n].config) and name not in _NOT_GIVEN)
    return keys.get(name), f"{prefix}{name}", Scope(prefix, tuple(keys), others, arm, is_space)


def unknown_key(path: str, scope: Scope) -> str:
    """Say that a key is unknown, or another arm's, and which ones there are."""
    name = path.removeprefix(scope.prefix)
    allowed = ", ".join(f"{scope.prefix}{key}" for key in scope.known) or "none"
    if scope.arm and scope.others:
        return (
            f"{name} is a key of {', '.join(scope.others)}, not of {scope.arm}; "
            f"to set it for one arm only write arms.{scope.others[0]}.{name}=...; allowed for {scope.arm}: {allowed}"
        )
    return f"unknown key {path}; allowed: {allowed}{close_match(path, [scope.prefix + k for k in scope.known])}"
