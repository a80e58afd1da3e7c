"""A verdict in words: its reason and headline, and lines for a terminal; numbers for people.

Contents of verdict.json -> text. Files hold rates in [0, 1]; percent and points appear here and nowhere before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from harness.config.arms import BASE, title
from harness.study.decision import Verdict
from harness.study.files import Json, bounds, mapping, number
from harness.study.registration import ALPHA
from harness.study.text import one_line

MISSING = "–"
LEVELS = {
    "checkpoint": "Checkpoint level: this compares the trained models at hand, with one seed for at least one arm. It "
    "does not say which method is better; another seed may reverse it.",
    "config": "Config level: this compares the configs that were selected on dev, over seeds and prompts. How they "
    "were selected is not in the interval, so that it is about these configs and not about the methods.",
    "method": "Method level: the interval counts the differences between seeds as well as those between prompts, so it "
    "is about the methods with these settings on this data, not about one lucky run.",
}


def winner_of(result: Verdict) -> str:
    """Return the arm that the interval is beyond 0 for, also where a guard makes it a trade-off; empty without one."""
    if result["verdict"] == "trade-off":
        return ahead(result["difference"], result["arms"])
    return result["verdict"] if result["verdict"] in result["arms"] else ""


def of_level(result: Verdict, arm: str) -> str:
    """Return an arm's name, with what is compared where that is not the method: `this SimPO checkpoint`."""
    level = result["level"]
    return f"this {title(arm)} {level}" if level in ("checkpoint", "config") else title(arm)


def reason(result: Verdict) -> str:
    """Return the sentence `reason` of verdict.json, for a verdict that is complete but for it."""
    winner = winner_of(result)
    failed = [guard for guard in result["guards"] if winner and not guard["passed"]]
    first, second = (of_level(result, arm) for arm in result["arms"])
    low, high = (100 * bound for bound in result["ci95"])
    difference, margin = 100 * result["difference"], 100 * result["margin"]
    seeds = "/".join(str(count) for count in dict.fromkeys(result["n_seeds"].values()))
    over = f" over {result['n_prompts']} golden prompts" if result["n_prompts"] else ""
    runs = "1 seed" if seeds == "1" else f"{seeds} seeds"
    interval_text = f"{confidence(result['alpha'])} interval {low:+.1f} to {high:+.1f}"
    basis = f"on {result['metric']} ({interval_text}){over}, {runs} an arm"
    if winner:
        better, worse = (first, second) if difference > 0 else (second, first)
        text = f"{better} beats {worse} by {abs(difference):.1f} points {basis}"
        if failed:
            text += f"; but it may be worse on {', '.join(str(guard['metric']) for guard in failed)}"
    elif result["verdict"] == "tie":
        text = f"{first} and {second} differ by less than {margin:g} points: {difference:+.1f} {basis}"
    else:
        least = 100 * result["minimum_detectable_difference"]
        text = f"Not enough evidence: {first} minus {second} is {difference:+.1f} points {basis}; "
        text += f"a difference below {least:.1f} points cannot be told from noise here"
    if result["level"] == "checkpoint":
        text += "; with one seed this says nothing about the methods"
    if result["level"] == "config":
        text += "; this is about these two configs, and another search may select others"
    return text[0].upper() + text[1:] + "."


def headline(verdict: Mapping[str, Json], arms: Sequence[str]) -> str:
    """Return the verdict in a few words; they name checkpoints or configs where it is about those, not methods.

    Args:
        verdict: as read from verdict.json, whatever it holds; empty where there is none.
        arms: the two arms of the difference, as the caller knows them.
    """
    word = _word(verdict)
    if not word:
        return "No verdict yet"
    if word in ("tie", "inconclusive", "trade-off"):
        trade = f"Trade-off: {title(ahead(number(verdict.get('difference')), arms))} scores better and fails a guard"
        return {"tie": "Tie", "inconclusive": "Inconclusive: not enough evidence", "trade-off": trade}[word]
    first, second = _pair(arms)
    other = second if word == first else first
    level = verdict.get("level")
    if level in ("checkpoint", "config"):
        return f"This {title(word)} {level} beats this {title(other)} {level}"
    return f"{title(word)} beats {title(other)}"


def difference(verdict: Mapping[str, Json]) -> str:
    """Return the difference with its interval: `+3.4 points, 95% +1.0 to +5.8`."""
    return f"{points(verdict.get('difference'))} points, {confidences(verdict)[0]} {interval(verdict.get('ci95'))}"


def guards(verdict: Mapping[str, Json]) -> list[Mapping[str, Json]]:
    """Return the guards of a verdict."""
    rows = verdict.get("guards")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def below_base(verdict: Mapping[str, Json]) -> dict[str, tuple[float, float]]:
    """Return the arms whose mean is below that of the SFT base: `{arm: (its mean, the base's mean)}`."""
    base = number(verdict.get("base_mean"))
    means = {str(arm): number(mean) for arm, mean in mapping(verdict.get("means")).items()}
    return {arm: (mean, base) for arm, mean in means.items() if base is not None and mean is not None and mean < base}


def _word(verdict: Mapping[str, Json]) -> str:
    return str(verdict.get("verdict") or "")


def _pair(arms: Sequence[str]) -> tuple[str, str]:
    first, second = [*arms[:2], "", ""][:2]
    return first, second


def ahead(difference: float | None, arms: Sequence[str]) -> str:
    """Return the arm with the higher mean, by the difference of the first two arms."""
    first, second = _pair(arms)
    return first if (difference or 0.0) >= 0 else second


def table_lines(verdict: Verdict) -> list[str]:
    """Return the means of base and arms with the range over seeds, and the difference with its interval.

    Names from a scores file are shown on one line, without control characters.
    """
    base_mean = verdict.get("base_mean")
    rows = [] if base_mean is None else [(title(BASE), f"{100 * base_mean:6.1f}")]
    for arm, mean in verdict["means"].items():
        runs = [100 * value for value in verdict["run_means"][arm].values()]
        seeds = f"  {len(runs)} seeds, {min(runs):.1f} to {max(runs):.1f}" if len(runs) > 1 else "  1 seed"
        rows.append((title(arm), f"{100 * mean:6.1f}{seeds}"))
    low, high = verdict["ci95"]
    interval_text = f"{confidence(verdict['alpha'])} interval {100 * low:+.1f} to {100 * high:+.1f}"
    last = f"{100 * verdict['difference']:+6.1f}  {interval_text}, margin {100 * verdict['margin']:.1f}"
    rows.append((" - ".join(map(title, verdict["arms"])), last))
    width = max(len(name) for name, _ in rows) + 2
    unit = "points" if verdict.get("n_prompts") is None else f"points, {verdict['n_prompts']} golden prompts"
    head = f"{one_line(verdict['metric'], 80)} ({unit})"
    return [head, *(f"  {name:{width}}{text}" for name, text in rows)]


def ranking_lines(verdict: Verdict) -> list[str]:
    """Return the results of all pairs and the arms that none beats; empty with two arms."""
    pairs = verdict["pairs"]
    if len(pairs) < 2:
        return []
    rows = [(" - ".join(map(title, pair["arms"])), pair) for pair in pairs]
    width = max(len(name) for name, _ in rows) + 2
    lines = ["ranking: all pairs of arms (points); the first is the registered contrast, the others share alpha (Holm)"]
    for name, pair in rows:
        low, high = pair["ci95"]
        ends = f"{confidence(pair['alpha'])} interval {100 * low:+.1f} to {100 * high:+.1f}"
        lines.append(f"  {name:{width}}{100 * pair['difference']:+6.1f}  {ends}: {pair_word(pair['verdict'])}")
    return [*lines, f"  arms that no arm beats: {listing(map(title, verdict['best_set']))}"]


def pair_word(word: str) -> str:
    """Return the result of a pair of arms in words: `SimPO wins`, or `tie`."""
    return word if word in ("tie", "inconclusive", "trade-off") else f"{title(word)} wins"


def warning_lines(verdict: Verdict) -> list[str]:
    """Return one line per warning that is not said beside the recommendation."""
    beside = verdict["caveats"]
    return [f"warning: {one_line(warning, 1000)}" for warning in verdict["warnings"] if warning not in beside]


def caveat_lines(verdict: Verdict) -> list[str]:
    """Return one line per fact to read the recommendation with."""
    return [f"beside it: {one_line(caveat, 1000)}" for caveat in verdict["caveats"]]


def verdict_line(verdict: Verdict) -> str:
    """Return the verdict with its reason in one line."""
    return one_line(f"verdict: {verdict['verdict']} ({verdict['level']} level). {verdict['reason']}", 1000)


def confidence(alpha: float) -> str:
    """Format the confidence of an interval at 1 - alpha: `95%`, `98.3%`."""
    return f"{round(100 * (1 - alpha), 1):g}%"


def confidences(verdict: Mapping[str, Json]) -> tuple[str, str]:
    """Format the confidences of `ci95` and `ci90`, which are at 1 - alpha and 1 - 2 alpha for every alpha."""
    alpha = alpha_of(verdict)
    return confidence(alpha), confidence(2 * alpha)


def alpha_of(verdict: Mapping[str, Json]) -> float:
    """Return the error rate that a verdict was made at, or the default where it holds none."""
    alpha = number(verdict.get("alpha"))
    return ALPHA if alpha is None else alpha


def percent(value: Json, digits: int = 1) -> str:
    """Format a rate as percent."""
    rate = number(value)
    return MISSING if rate is None else f"{100 * rate:.{digits}f}%"


def points(value: Json, *, signed: bool = True) -> str:
    """Format a difference of rates in percentage points, with a real minus sign."""
    rate = number(value)
    if rate is None:
        return MISSING
    text = f"{100 * rate:+.1f}" if signed else f"{100 * rate:.1f}"
    return text.replace("-", "−") if float(text) else "0.0"


def interval(value: Json) -> str:
    """Format an interval of differences in percentage points."""
    ends = bounds(value)
    return MISSING if ends is None else f"{points(ends[0])} to {points(ends[1])}"


def plain_minus(text: str) -> str:
    """Return a text for verdict.json and terminals, some of which know no other minus sign."""
    return text.replace("−", "-")


def listing(items: Iterable[str]) -> str:
    """Join words: `a, b and c`."""
    words = list(items)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Format a count with its noun."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
