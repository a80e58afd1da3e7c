"""Check the command line before Hydra composes it, so that one message names the key, the value and what is allowed.

Hydra's own messages hide the real error of a sweep behind "Ambiguous value ... add --multirun", advise `+key` for a
key of another arm, and exit with status 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.arms import ARMS
from harness.records import UsageError

AXES = "method, arms.ARM.KEY, method.KEY and seed"
TRAINED = tuple(name for name, arm in ARMS.items() if arm.trainer)


def check_overrides(overrides: list[str]) -> None:
    """Raise a UsageError that lists every override which names an unknown key or a value that is not allowed."""
    parsed = parse(overrides)
    arms = selected_arms(parsed)
    problems = [*_repeated(parsed), *(message for override in parsed for message in _problems(override, arms))]
    if not arms:
        problems.append(f"no method: add +method=simpo,dpo (arms: {', '.join(TRAINED)}) or +sweep=NAME")
    if problems:
        raise UsageError("\n".join(problems))


def check_single(overrides: list[str]) -> None:
    """Raise a UsageError where overrides ask for more than one trial, which is what `harness.train` runs."""
    for override in parse(overrides):
        key, line = override.key_or_group, override.input_line
        if len(values_of(override)) > 1:
            raise UsageError(f"{line}: harness.train runs one trial; give one value, or use harness.sweep")
        if key.startswith("arms."):
            name = key.split(".", 2)[-1]
            raise UsageError(f"{line}: harness.train runs one arm; write method.{name}=... instead")
        if key in ("sweep", "seeds", "plan"):
            raise UsageError(f"{line}: {key} belongs to harness.sweep; harness.train runs one trial")


def _repeated(parsed: list[Override]) -> Iterator[str]:
    """Name what stands twice: Hydra would silently keep the last."""
    lines: dict[str, list[str]] = {}
    for override in parsed:
        lines.setdefault(override.key_or_group, []).append(str(override.input_line))
    for key, found in lines.items():
        if len(found) > 1:
            several = f", or list the values: {key}=a,b" if key in ("method", "seed") else ""
            yield f"{' '.join(found)}: {key} is given {len(found)} times; give it once{several}"


def parse(overrides: list[str]) -> list[Override]:
    """Parse overrides with Hydra's grammar."""
    with explain():
        return OverridesParser.create().parse_overrides(overrides)


def values_of(override: Override) -> list[Any]:
    """Return the value, or the values where the override is a sweep, unquoted."""
    value = override.value()
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise UsageError(f"{override.input_line}: an interval cannot be planned; list the values: {AXES}")
        return [_unquoted(item) for item in override.sweep_iterator()]
    return [_unquoted(value)]


def _unquoted(value: Any) -> Any:
    return value.text if hasattr(value, "text") and hasattr(value, "quote") else value


def selected_arms(parsed: list[Override]) -> list[str]:
    """Return the arms that the command line asks for, by `+method=` or by the arms of its `+sweep=` preset."""
    for override in parsed:
        if override.key_or_group == "method":
            return [str(value) for value in values_of(override)]
    for override in parsed:
        if override.key_or_group == "sweep":
            return list(preset_arms(str(values_of(override)[0])))
    return []


def preset_arms(name: str) -> dict[str, dict[str, Any]]:
    """Return the space per arm of `sweeps/NAME.yaml`."""
    from harness.config import SWEEPS

    path = SWEEPS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SWEEPS.glob("*.yaml")))
        raise UsageError(f"+sweep={name}: no such sweep; sweeps/ has: {known}")
    preset = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path)))
    return preset.get("arms", {})


def _problems(override: Override, arms: list[str]) -> Iterator[str]:
    key, values = override.key_or_group, values_of(override)
    line = override.input_line
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return
    if key in ("method", "tracking", "sweep"):
        yield from _group_problems(key, values)
        return
    if len(values) > 1 and not key.startswith(("method.", "arms.")) and key != "seed":
        yield f"{line}: only {AXES} may have several values; all else is equal for all trials of a study"
        return
    arm = key.split(".")[1] if key.startswith("arms.") else None
    if arm in TRAINED and arm not in arms:
        yield f"{line}: {arm} is not among the arms of this sweep ({', '.join(arms) or 'none'})"
        return
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    if key == "seed" or key.startswith(("method.", "arms.")):
        if None in flat:
            yield f"{key}=null: must not be null; leave it out to take the default"
            return
        if len(set(map(str, flat))) < len(flat):
            yield f"{line}: a value is listed twice; each makes one trial"
    for target, path, scope in _lookup(key, arms):
        if target is None:
            yield f"{line}: {_unknown_key(path, scope)}"
            return
        for value in values:
            for item in value if scope.is_space and isinstance(value, list) else [value]:
                problem = value_problem(target, item)
                if problem:
                    yield f"{key}={_shown(item)}: {problem}"


def _group_problems(group: str, values: list[Any]) -> Iterator[str]:
    from harness.config import CONF

    if group == "sweep":
        preset_arms(str(values[0]))
        if len(values) > 1:
            yield f"+sweep={','.join(map(str, values))}: a study has one question; give one sweep"
        return
    known = TRAINED if group == "method" else tuple(sorted(p.stem for p in (CONF / group).glob("*.yaml")))
    for value in values:
        if value not in known:
            prefix = "+" if group == "method" else ""
            allowed = f"allowed: {', '.join(known)}{_close(str(value), known)}"
            yield f"{prefix}{group}={_shown(value)}: no such {group}; {allowed}"
    if group == "method" and len(set(map(str, values))) < len(values):
        yield f"+method={','.join(map(str, values))}: an arm is named twice"


@dataclasses.dataclass(frozen=True)
class _Scope:
    """Where a key was looked for: the prefix, the keys that exist there, and the other arms that have the key."""

    prefix: str
    known: tuple[str, ...]
    others: tuple[str, ...] = ()
    arm: str | None = None
    is_space: bool = False


@dataclasses.dataclass(frozen=True)
class Declared:
    """What is declared of a key: its type and its limits (see `harness.arms.bounded`)."""

    hint: Any
    limits: typing.Mapping[str, Any]


def declared_keys(owner: type) -> dict[str, Declared]:
    """Return the declared keys of a config dataclass by name."""
    hints = typing.get_type_hints(owner)
    return {f.name: Declared(hints[f.name], f.metadata) for f in dataclasses.fields(owner)}


def _lookup(key: str, arms: list[str]) -> Iterator[tuple[Declared | None, str, _Scope]]:
    """Find what is declared of a key, once for each arm that it would apply to."""
    from harness.config import RunConfig

    head, _, rest = key.partition(".")
    if head == "method" and rest:
        for arm in arms:
            if arm in ARMS:
                yield _arm_field(arm, rest, prefix="method.", is_space=False)
        return
    if head == "arms" and rest:
        arm, _, name = rest.partition(".")
        if arm not in TRAINED:
            yield None, key, _Scope("arms.", TRAINED)
            return
        yield _arm_field(arm, name, prefix=f"arms.{arm}.", is_space=True)
        return
    owner: Any = RunConfig
    found, walked = Declared(RunConfig, {}), ""
    for part in key.split("."):
        known = declared_keys(owner) if isinstance(owner, type) and dataclasses.is_dataclass(owner) else {}
        if part not in known:
            yield None, key, _Scope(walked, tuple(known))
            return
        found, walked, owner = known[part], f"{walked}{part}.", known[part].hint
    is_section = dataclasses.is_dataclass(owner)
    yield (
        (None if is_section else found),
        key,
        _Scope(walked, tuple(declared_keys(owner)) if is_section else ()),
    )


def _arm_field(arm: str, name: str, *, prefix: str, is_space: bool) -> tuple[Declared | None, str, _Scope]:
    keys = {k: v for k, v in declared_keys(ARMS[arm].config).items() if k not in ("name", "learning_rates")}
    others = tuple(n for n in TRAINED if n != arm and name in declared_keys(ARMS[n].config))
    return keys.get(name), f"{prefix}{name}", _Scope(prefix, tuple(keys), others, arm, is_space)


def _unknown_key(path: str, scope: _Scope) -> str:
    name = path.removeprefix(scope.prefix)
    allowed = ", ".join(f"{scope.prefix}{key}" for key in scope.known) or "none"
    if scope.arm and scope.others:
        return (
            f"{name} is a key of {', '.join(scope.others)}, not of {scope.arm}; "
            f"to set it for one arm only write arms.{scope.others[0]}.{name}=...; allowed for {scope.arm}: {allowed}"
        )
    return f"unknown key {path}; allowed: {allowed}{_close(path, [scope.prefix + k for k in scope.known])}"


def _close(word: str, known: typing.Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean {matches[0]}?" if matches else ""


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def value_problem(declared: Declared, value: Any) -> str | None:
    """Say what is wrong with a value for a declared key, or None: its type first, then its range."""
    hint = declared.hint
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        return None if type(None) in options else "must not be null"
    kind = next(option for option in options if option is not type(None))
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.name for member in kind]
        return None if getattr(value, "name", value) in names else f"allowed: {', '.join(names)}"
    if kind is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if kind in (int, float):
        return _number_problem(kind, declared.limits, value)
    choices = declared.limits.get("choices")
    return f"allowed: {', '.join(choices)}" if choices and value not in choices else None


def _number_problem(kind: type, limits: typing.Mapping[str, Any], value: Any) -> str | None:
    signs = {"above": ">", "at_least": ">=", "below": "<", "at_most": "<="}
    parts = [f"{sign} {limits[name]:g}" for name, sign in signs.items() if name in limits]
    allowed = f"; allowed: {' and '.join(parts)}" if parts else ""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return ("must be a whole number" if kind is int else "must be a number") + allowed
    inside = (
        math.isfinite(value)
        and ("above" not in limits or value > limits["above"])
        and ("at_least" not in limits or value >= limits["at_least"])
        and ("below" not in limits or value < limits["below"])
        and ("at_most" not in limits or value <= limits["at_most"])
    )
    return None if inside else "out of range" + allowed


@contextlib.contextmanager
def explain() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise about a config into a UsageError of one message."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        causes = [error]
        while isinstance(causes[-1].__cause__, HydraException | OmegaConfBaseException):
            causes.append(causes[-1].__cause__)
        lines = [line.strip() for cause in causes for line in str(cause).splitlines() if line.strip()]
        wanted = [line for line in lines if not line.startswith(("object_type", "reference_type", "See http"))]
        raise UsageError("; ".join(dict.fromkeys(wanted))) from error
