"""What the arms cost: seconds by stage, memory, tokens and speed, on one engine."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from harness.palette import BASE, title
from harness.study import COMPLETE, Config, Study, Trial, mapping
from harness.tables import Table, build, columns
from harness.wording import MISSING, listing, number, plural

_STAGES = ("load", "reference", "train", "generate", "heldout", "score")
_NAMES = {"heldout": "held-out log-probs", "reference": "reference log-probs"}


def engines(study: Study) -> dict[str, set[str]]:
    """Return the engines of each arm's complete trials."""
    found: dict[str, set[str]] = {arm: set() for arm in study.arms}
    for trial in study.trials:
        if trial.state == COMPLETE and trial.arm in found:
            found[trial.arm].add(str(trial.manifest.get("engine") or "unknown"))
    return {arm: names for arm, names in found.items() if names}


def cost_table(study: Study) -> Table | None:
    """Compare the configs' costs over their complete trials on the engine that all arms have in common."""
    used = engines(study)
    common = sorted(set.intersection(*used.values())) if used else []
    engine = common[0] if common else None
    chosen = [Config(c.arm, c.label, _complete(c, engine)) for c in study.configs]
    chosen = [config for config in chosen if config.trials]
    if not chosen:
        return None
    rows: dict[str, dict[str, str]] = {}
    for name, values, digits in _quantities(study, chosen):
        cells = {label: MISSING if value is None else f"{value:,.{digits}f}" for label, value in values.items()}
        rows[name] = cells | (_ratio(list(values.values())) if common else {})
    rows["Engine"] = {study.label(c): listing(sorted({_engine(t) for t in c.trials})) for c in chosen}
    first, second = [*map(title, (c.arm for c in chosen[:2])), "", ""][:2]
    frame_rows = {name: {key.replace("ratio", f"{first} / {second}"): cell for key, cell in row.items()} for name, row in rows.items()}
    return build(
        "Costs of one trial: mean over " + listing(f"{plural(len(c.trials), 'seed')} of {title(c.arm)}" for c in chosen),
        "Cost",
        frame_rows,
        columns(study, chosen),
        *_notes(study, used, engine, chosen),
    )


def _quantities(study: Study, configs: Sequence[Config]) -> list[tuple[str, dict[str, float | None], int]]:
    """Return (name, {column: mean over trials}, digits) for all that is measured."""
    stages = {stage for c in configs for t in c.trials for stage in mapping(t.manifest.get("seconds"))}
    order = [*(s for s in _STAGES if s in stages), *sorted(stages - set(_STAGES))]
    found = [(f"Seconds: {_NAMES.get(s, s)}", _over(study, configs, lambda t, s=s: _at(t, "seconds", s) or 0.0), 1) for s in order]
    found.append(("Seconds in all", _over(study, configs, _total), 1))
    found.append(("Peak memory of training (GiB)", _over(study, configs, lambda t: _gib(_at(t, "peak_memory_bytes", "train"))), 2))
    found.append(("Tokens trained on", _over(study, configs, lambda t: _at(t, "tokens", "train")), 0))
    found.append(("Training tokens per second", _over(study, configs, lambda t: _rate(t, "train", "train")), 0))
    found.append(("Tokens generated", _over(study, configs, lambda t: _at(t, "tokens", "generated")), 0))
    found.append(("Generated tokens per second", _over(study, configs, lambda t: _rate(t, "generated", "generate")), 0))
    return [row for row in found if any(value is not None for value in row[1].values())]
