"""Command line -> parsed overrides, or one `UsageError` that names each wrong key or value and the allowed ones.

Hydra's own messages hide the real error of a sweep behind "Ambiguous value ... add --multirun", advise `+key` for a
key of another arm, and exit with status 1.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.keys import (
    SET_BY_SWEEP,
    TRAINED,
    Value,
    close_match,
    find_declared,
    shown,
    unknown_key,
    value_problem,
)
from harness.config.launchers import LAUNCHERS
from harness.config.paths import CONF, SWEEPS
from harness.config.search import interval_problem, is_interval
from harness.study.errors import UsageError

AXES = "method, arms.ARM.KEY, method.KEY and seed"


def check_overrides(overrides: list[str]) -> list[Override]:
    """Return the parsed overrides.

    Raises:
        UsageError: lists every override with an unknown key or a value that is not allowed.
    """
    parsed = parse(overrides)
    arms = selected_arms(parsed)
    problems = [*_repeated_keys(parsed), *(line for override in parsed for line in _override_problems(override, arms))]
    if not arms:
        problems.append(f"no method: add +method=simpo,dpo (arms: {', '.join(TRAINED)}) or +sweep=NAME")
    _refuse(problems)
    return parsed


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)))


def check_single(overrides: list[str]) -> None:
    """Raise a UsageError where overrides ask for more than one trial: `harness.train` runs one."""
    _refuse(
        [f"{override.input_line}: {line}" for override in parse(overrides) if (line := _single_trial_problem(override))]
    )


def _single_trial_problem(override: Override) -> str | None:
    key = override.key_or_group
    if override.is_sweep_override():
        return "harness.train runs one trial; give one value, or use harness.sweep"
    if key.startswith("arms."):
        return f"harness.train runs one arm; write method.{key.split('.', 2)[-1]}=... instead"
    if key in ("sweep", "seeds", "plan") or is_hydra(key):
        return f"{key} belongs to harness.sweep; harness.train runs one trial"
    if key == "method" and not override.is_add():
        return f"write +method={override.value()}"
    return None


def _repeated_keys(parsed: list[Override]) -> Iterator[str]:
    """Name keys that are given twice: Hydra would silently keep the last value."""
    lines: dict[str, list[str]] = {}
    for override in parsed:
        lines.setdefault(override.key_or_group, []).append(str(override.input_line))
    for key, found in lines.items():
        if len(found) > 1:
            several = f", or list the values: {key}=a,b" if key in ("method", "seed") else ""
            yield f"{' '.join(found)}: {key} is given {len(found)} times; give it once{several}"
        _, arm, name = key.split(".", 2) if key.count(".") > 1 and key.startswith("arms.") else ("", "", "")
        if arm and f"method.{name}" in lines:
            both = f"{lines[f'method.{name}'][0]} {found[0]}"
            yield f"{both}: {name} of {arm} is given twice; give it for each arm, or once for all"


def parse(overrides: list[str]) -> list[Override]:
    """Parse overrides with Hydra's grammar."""
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            problems.append(_grammar_problem(text))
    _refuse(problems)
    return parsed


def _grammar_problem(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals or not key:
        return f"{text or repr(text)}: write KEY=VALUE, such as seed=1"
    return f"{text}: its value has characters with a meaning of their own; {_quoting_hint(key, value)}"


def _quoting_hint(key: str, value: str) -> str:
    return f"""write a text in quotes of its own: '{key}="{value}"'"""


def values_of(override: Override) -> list[Any]:
    """Return the values of an override, unquoted: one, or several where it is a sweep."""
    value = override.value()
    if override.is_sweep_override():
        if not override.is_discrete_sweep() or isinstance(value, Glob):
            kind = "a pattern" if isinstance(value, Glob) else "an interval"
            raise UsageError(f"{override.input_line}: {kind} cannot be planned; list the values: {AXES}")
        return [_unquoted(item) for item in override.sweep_iterator()]
    return [_unquoted(value)]


def _unquoted(value: Any) -> Any:
    return value.text if hasattr(value, "text") and hasattr(value, "quote") else value


def selected_arms(parsed: list[Override]) -> list[str]:
    """Return the requested arms: those of `+method=`, or those of the `+sweep=` preset."""
    for override in parsed:
        if override.key_or_group == "method":
            return [str(value) for value in values_of(override)]
    for override in parsed:
        if override.key_or_group == "sweep":
            return list(preset_arms(str(values_of(override)[0])))
    return []


def preset_arms(name: str) -> dict[str, dict[str, Any]]:
    """Return the space per arm of `sweeps/NAME.yaml`."""
    known = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    if name not in known:
        raise UsageError(f"+sweep={name}: no such sweep; sweeps/ has: {', '.join(known)}")
    preset = OmegaConf.to_container(OmegaConf.load(SWEEPS / f"{name}.yaml"))
    assert isinstance(preset, dict)
    return preset.get("arms", {})


def is_hydra(key: str) -> bool:
    """Return whether a key configures Hydra, such as its launcher."""
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def is_axis(key: str) -> bool:
    """Return whether a key may have several values in a sweep."""
    return key == "seed" or key.startswith(("method.", "arms."))


def _form_problem(override: Override, arms: list[str]) -> str | None:
    """Say why an override is refused for its key or its form, whatever its value."""
    key = override.key_or_group
    if key in SET_BY_SWEEP:
        return f"set by the sweep, cannot be typed: {SET_BY_SWEEP[key]}"
    if override.type is OverrideType.DEL:
        return "a key cannot be taken away; give it another value, or leave it out to take the default"
    if is_hydra(key):
        return _hydra_problem(override)
    return _plus_problem(override) or _arm_problem(key, arms) or _axis_problem(override)


def _plus_problem(override: Override) -> str | None:
    key, line = override.key_or_group, str(override.input_line)
    if key == "sweep" and not override.is_add():
        return f"write +{line}"
    if key in ("tracking", "accelerate") and override.type is not OverrideType.CHANGE:
        return f"write {line.lstrip('+')}"
    return None


def _axis_problem(override: Override) -> str | None:
    key, line = override.key_or_group, str(override.input_line)
    if override.is_sweep_override() and not is_axis(key) and key not in ("method", "sweep"):
        quote = f"; {_quoting_hint(key, line.partition('=')[2])}" if " " in line else ""
        return f"only {AXES} may have several values; all else is equal for all trials of a study{quote}"
    return None


def _arm_problem(key: str, arms: list[str]) -> str | None:
    if key == "arms" or (key.startswith("arms.") and key.count(".") == 1):
        return "each key of an arm is given by itself, as arms.ARM.KEY=VALUE, such as arms.dpo.beta=0.1,0.5"
    arm = key.split(".")[1] if key.startswith("arms.") else None
    if arm in TRAINED and arm not in arms:
        return f"{arm} is not among the arms of this sweep ({', '.join(arms) or 'none'})"
    return None


def _hydra_problem(override: Override) -> str | None:
    """Refuse another sweeper or working folder, with which no study would be checked; launchers may be chosen."""
    key = override.key_or_group
    own = ("hydra/sweeper", "hydra.sweeper", "hydra.mode", "hydra.job.chdir")
    if key == "hydra" or any(key == name or key.startswith(f"{name}.") for name in own):
        return "the sweeper plans paired trials and cannot be changed; hydra/launcher=NAME and hydra.launcher.KEY can"
    if key == "hydra/launcher":
        return _launcher_problem(str(values_of(override)[0]))
    return None


def _launcher_problem(name: str) -> str | None:
    Plugins.instance()  # finds the launchers that are installed
    found = {known.removesuffix(".yaml") for known in ConfigStore.instance().list("hydra/launcher")}
    shipped = {path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")}
    if name not in found | shipped:
        return f"no such launcher; known: {', '.join(sorted(found | shipped))}; a Hydra plugin adds others"
    row = LAUNCHERS.get(name)
    if row and row.module and importlib.util.find_spec(row.module) is None:
        return f"not installed; pip install 'dpo-simpo-harness[{row.extra}]'"
    return None


def _override_problems(override: Override, arms: list[str]) -> Iterator[str]:
    key, line = override.key_or_group, override.input_line
    form = _form_problem(override, arms)
    if form or is_hydra(key):
        yield from [f"{line}: {form}"] if form else []
        return
    values = values_of(override)
    if key in ("method", "tracking", "accelerate", "sweep"):
        yield from _group_problems(key, values)
        return
    if is_axis(key):
        flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
        if None in flat:
            yield f"{key}=null: must not be null; leave it out to take the default"
            return
        if not flat:
            yield f"{line}: an empty list makes no trial; list one value or more"
        if len(set(map(str, flat))) < len(flat):
            yield f"{line}: a value is listed twice; each makes one trial"
    for target, path, scope in find_declared(key, arms):
        if target is None:
            yield f"{line}: {unknown_key(path, scope)}"
            return
        for item in _space_items(values) if scope.is_space else values:
            problem = interval_problem(item) if scope.is_space and is_interval(item) else value_problem(target, item)
            if problem:
                yield f"{key}={shown(item)}: {problem}"


def _space_items(values: list[Value]) -> Iterator[Value]:
    """Yield each value of an arm's space; for an interval itself and, where its form is right, its two ends."""
    for value in values:
        if is_interval(value):
            yield value
            yield from [] if interval_problem(value) else [value["low"], value["high"]]
        else:
            yield from value if isinstance(value, list) else [value]


def _group_problems(group: str, values: list[Value]) -> Iterator[str]:
    if group == "sweep":
        preset_arms(str(values[0]))
        if len(values) > 1:
            yield f"+sweep={','.join(map(str, values))}: a study has one question; give one sweep"
        return
    known = TRAINED if group == "method" else tuple(sorted(p.stem for p in (CONF / group).glob("*.yaml")))
    for value in values:
        if value not in known:
            prefix = "+" if group == "method" else ""
            allowed = f"allowed: {', '.join(known)}{close_match(str(value), known)}"
            yield f"{prefix}{group}={shown(value)}: no such {group}; {allowed}"
    if group == "method" and len(set(map(str, values))) < len(values):
        yield f"+method={','.join(map(str, values))}: an arm is named twice"


@contextlib.contextmanager
def explain() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into a UsageError of one message."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        causes = [error]
        while isinstance(causes[-1].__cause__, HydraException | OmegaConfBaseException):
            causes.append(causes[-1].__cause__)
        lines = [line.strip() for cause in causes for line in str(cause).splitlines() if line.strip()]
        wanted = [line for line in lines if not line.startswith(("object_type", "reference_type", "See http"))]
        raise UsageError("; ".join(dict.fromkeys(wanted))) from error
