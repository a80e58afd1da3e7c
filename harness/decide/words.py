"""A verdict in words: its reason, headline and next step, and lines for a terminal; numbers for people.

Contents of verdict.json -> text. Files hold rates in [0, 1]; percent and points appear here and nowhere before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from harness.config.arms import BASE, title
from harness.study.decision import GuardResult, Verdict
from harness.study.files import Json, bounds, mapping, number
from harness.study.registration import ALPHA
from harness.study.text import one_line

MISSING = "–"
LEVELS = {
    "checkpoint": "Checkpoint level: this compares the trained models at hand, with one seed for at least one arm. It "
    "does not say which method is better; another seed may reverse it.",
    "method": "Method level: the interval counts the differences between seeds as well as those between prompts, so it "
    "is about the methods with these settings on this data, not about one lucky run.",
}


def reason(result: Verdict, winner: str | None, failed: Sequence[GuardResult]) -> str:
    """Return the sentence `reason` of verdict.json.

    Args:
        result: the verdict, complete but for `reason`.
        winner: the arm ahead, also where a guard makes it a trade-off; None for a tie or too little evidence.
        failed: the guards that the winner failed.
    """
    first, second = map(title, result["arms"])
    low, high = (100 * bound for bound in result["ci95"])
    difference, margin = 100 * result["difference"], 100 * result["margin"]
    seeds = "/".join(str(count) for count in dict.fromkeys(result["n_seeds"].values()))
    over = f" over {result['n_prompts']} golden prompts" if result["n_prompts"] else ""
    runs = "1 seed" if seeds == "1" else f"{seeds} seeds"
    interval_text = f"{confidence(result['alpha'])} interval {low:+.1f} to {high:+.1f}"
    basis = f"on {result['metric']} ({interval_text}){over}, {runs} an arm"
    if result["level"] == "checkpoint":
        first, second = f"this {first} checkpoint", f"this {second} checkpoint"
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
    return text[0].upper() + text[1:] + "."


def headline(verdict: Mapping[str, Json], arms: Sequence[str]) -> str:
    """Return the verdict in a few words; with one seed per arm they name checkpoints, never methods.

    Args:
        verdict: as read from verdict.json, whatever it holds; empty where there is none.
        arms: the two arms of the difference, as the caller knows them.
    """
    word = _word(verdict)
    if not word:
        return "No verdict yet"
    if word in ("tie", "inconclusive", "trade-off"):
        trade = f"Trade-off: {title(_ahead(verdict, arms))} scores better and fails a guard"
        return {"tie": "Tie", "inconclusive": "Inconclusive: not enough evidence", "trade-off": trade}[word]
    first, second = _pair(arms)
    other = second if word == first else first
    if verdict.get("level") == "checkpoint":
        return f"This {title(word)} checkpoint beats this {title(other)} checkpoint"
    return f"{title(word)} beats {title(other)}"


def next_step(verdict: Mapping[str, Json], arms: Sequence[str]) -> str:
    """Return the advice that follows from the verdict; arguments as for `headline`."""
    word = _word(verdict)
    if not word:
        return "Finish the sweep: running the same command again does what is missing and repeats nothing."
    worse = below_base(verdict)
    if word in worse or (worse and worse.keys() == set(arms[:2])):
        each = listing(
            f"{title(arm)} scores {percent(mean)}, the base {percent(base)}" for arm, (mean, base) in worse.items()
        )
        return f"Ship the SFT base: {each}. Look at the learning rate and at the pairs before you train again."
    if word == "tie":
        return (
            f"Ship either: the difference is smaller than the {_margin(verdict)} points that matter. Let cost, answer "
            "length and the side-by-side completions below decide."
        )
    if word == "trade-off":
        failed = listing(str(guard.get("metric")) for guard in guards(verdict) if guard.get("passed") is False)
        return (
            f"Do not ship {title(_ahead(verdict, arms))} before you have looked at the guard that it fails"
            f"{f' ({failed})' if failed else ''}: decide which of the two matters more."
        )
    return _more_evidence(verdict) if word == "inconclusive" else _ship(verdict)


def _ship(verdict: Mapping[str, Json]) -> str:
    winner = title(_word(verdict))
    if verdict.get("level") == "checkpoint":
        return (
            f"If one of these two models must be shipped today, ship the {winner} one. To choose the method, train "
            "both arms with at least 3 seeds (`seed=1,2,3`)."
        )
    return f"Ship {winner}. Read the completions below first: a score is no substitute for looking."


def _more_evidence(verdict: Mapping[str, Json]) -> str:
    text = "Ship neither on this evidence."
    settle = mapping(verdict.get("to_settle"))
    seeds, prompts = number(settle.get("seeds")), number(settle.get("prompts"))
    ways = [f"about {seeds:,.0f} seeds an arm"] if seeds else []
    ways += [f"about {prompts:,.0f} golden prompts"] if prompts else []
    margin = _margin(verdict)
    if ways:
        text += f" A difference of {margin} points would be found with {' or '.join(ways)}, all else as it is."
    elif settle:
        text += f" Neither more seeds nor more prompts alone would find a difference of {margin} points: add both."
    else:
        text += " Add seeds or golden prompts."
    if verdict.get("level") == "checkpoint":
        text += " At checkpoint level that is about these two models; for the methods, train at least 3 seeds an arm."
    return text


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


def _ahead(verdict: Mapping[str, Json], arms: Sequence[str]) -> str:
    first, second = _pair(arms)
    return first if (number(verdict.get("difference")) or 0.0) >= 0 else second


def _margin(verdict: Mapping[str, Json]) -> str:
    return points(verdict.get("margin"), signed=False)


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


def warning_lines(verdict: Verdict) -> list[str]:
    """Return one line per warning."""
    return [f"warning: {one_line(warning, 1000)}" for warning in verdict["warnings"]]


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


def listing(items: Iterable[str]) -> str:
    """Join words: `a, b and c`."""
    words = list(items)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Format a count with its noun."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
