"""What a report says of the judge: how it was asked, how far it can be trusted, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.frames import Table, build
from harness.palette import title
from harness.reader import Reader
from harness.study import Study, mapping
from harness.wording import MISSING, number, percent, plural


def judge_table(study: Study) -> Table | None:
    """Show the facts of judge.json; None where no judge has scored."""
    facts = Reader(study.folder).mapping(study.folder / "judge.json")
    if not facts:
        return None
    rows = {
        "Judge": f"{facts.get('model')}, template {facts.get('template')}",
        "Comparisons": f"{_count(facts, 'comparisons')}, each in both orders; {_count(facts, 'unscored')} unscored, "
        f"{_count(facts, 'unreadable_replies')} replies that were no verdict",
        "Contradicts itself when the order changes": _share(facts, "flip_rate"),
        "Ties": _share(facts, "tie_rate"),
        "Verdicts for the answer shown first (fair: 50%)": _share(facts, "first_slot_rate"),
        "Decided comparisons that the longer answer wins": _share(facts, "longer_wins_rate"),
        "Agreement with known labels": _agreement(mapping(facts.get("calibration"))),
        "The arms compared with each other": _head_to_head(mapping(facts.get("head_to_head"))),
        "Cost of the last call": _cost(mapping(facts.get("cost"))),
    }
    shown = {name: {"Found": text} for name, text in rows.items() if text != MISSING}
    note = "A contradiction counts as a tie. What was judged before is not asked for again, and costs nothing."
    return build("The judge", "What", shown, {}, note)


def _count(facts: Mapping[str, Any], key: str) -> str:
    value = number(facts.get(key))
    return MISSING if value is None else f"{value:,.0f}"


def _share(facts: Mapping[str, Any], key: str) -> str:
    value = number(facts.get(key))
    return MISSING if value is None else percent(value)


def _agreement(known: Mapping[str, Any]) -> str:
    share, ends = number(known.get("agreement")), known.get("ci95")
    if share is None or not isinstance(ends, list):
        return MISSING
    return f"{percent(share)} of {known.get('pairs')} pairs, 95% {percent(ends[0])} to {percent(ends[1])}"


def _head_to_head(found: Mapping[str, Any]) -> str:
    rates, arms = mapping(found.get("win_rates")), found.get("arms") or []
    values = [value for value in map(number, rates.values()) if value is not None]
    if not values or len(arms) < 2:
        return MISSING
    spread = f" ({percent(min(values))} to {percent(max(values))} over {plural(len(values), 'seed')})"
    names = f"{title(str(arms[0]))} against {title(str(arms[1]))}"
    return (
        f"{names}: {percent(sum(values) / len(values))}{spread if len(values) > 1 else ''}; describes, does not decide"
    )


def _cost(cost: Mapping[str, Any]) -> str:
    dollars = number(cost.get("usd"))
    price = "" if dollars is None else f", ${dollars:.2f}"
    if not cost:
        return MISSING
    return (
        f"{_count(cost, 'requests')} requests ({_count(cost, 'cached')} known before), {_count(cost, 'input_tokens')} "
        f"tokens in and {_count(cost, 'output_tokens')} out{price}"
    )
