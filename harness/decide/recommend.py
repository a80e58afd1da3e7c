"""The recommendation of a verdict: what to ship, why, and what to do next, in the same words for all readers.

Contents of verdict.json -> `recommendation`, and its line. Terminal, report, dashboard and W&B show these words alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from harness.config.arms import title
from harness.decide.words import (
    ahead,
    caveat_lines,
    confidence,
    interval,
    listing,
    of_level,
    percent,
    plain_minus,
    points,
    verdict_line,
    winner_of,
)
from harness.study.collapse import UNCHANGED_SHARE
from harness.study.decision import AgainstBase, Recommendation, Verdict
from harness.study.files import Json, mapping, number, strings
from harness.study.text import one_line

BASE_WINS, EITHER, NOTHING = "base", "either", "nothing_yet"
_MADE_BEFORE = (
    "No recommendation: this verdict was made before there were any. Run `python -m harness.decide` on this folder."
)
_NO_RECOMMENDATION = (
    "No recommendation yet. Finish the study: the sweep's command again does what is missing, and "
    "`python -m harness.decide` on this folder decides what is there."
)


def recommend(verdict: Verdict) -> Recommendation:
    """Return what to ship.

    An arm that wins and is not below the SFT base; either, where they tie and neither is below it; the base, where
    every arm is below it or has collapsed; and else nothing yet, with what would settle it.

    Args:
        verdict: complete but for the recommendation.
    """
    arms = verdict["arms"]
    candidates = _candidates(verdict)
    if found := _base(verdict, candidates) or _unmoved(verdict, candidates or arms):
        return found
    if not candidates:
        return _undecided(verdict)
    missing = [arm for arm in candidates if arm not in verdict["against_base"]]
    if missing:
        return _recommendation(
            NOTHING,
            f"{_sentence(verdict)} Whether training has helped at all is not known: the scores hold no rows of the SFT "
            f"base by prompt to compare {_titles(missing)} with.",
            "Score the SFT base on the same prompts, as the arm `sft`; a study of harness.sweep does.",
        )
    below = [arm for arm in candidates if _is_down(verdict["against_base"][arm])]
    if below:
        return _recommendation(
            NOTHING,
            f"{_sentence(verdict)} But {_standings(verdict, below)}.",
            f"{_more(verdict)} Until then the SFT base is at least as good as {_titles(below)}.",
        )
    return _arm(verdict, candidates[0]) if len(candidates) == 1 else _either(verdict)


def in_one_line(found: Recommendation, arms: Sequence[str]) -> str:
    """Return what to ship, why and what to do next in one line; `arms` are the two of the contrast."""
    first, second = [*map(title, arms), "", ""][:2]
    named = {
        EITHER: f"Ship either {first} or {second}",
        BASE_WINS: "Ship the SFT base",
        NOTHING: "Ship nothing yet",
    }
    ship = named.get(found["ship"], f"Ship {title(found['ship'])}")
    return one_line(f"{ship}. {found['why']} {found['next']}", 2000)


def recommendation_line(verdict: Mapping[str, Json]) -> str:
    """Return the recommendation of a verdict.json in one line, whatever that file holds."""
    found = mapping(verdict.get("recommendation"))
    if found.get("ship"):
        texts = {key: str(found.get(key) or "") for key in ("ship", "why", "next")}
        return in_one_line(
            {"ship": texts["ship"], "why": texts["why"], "next": texts["next"]}, strings(verdict.get("arms"))
        )
    if verdict.get("verdict"):
        return _MADE_BEFORE
    return _NO_RECOMMENDATION


def last_lines(verdict: Verdict) -> list[str]:
    """Return the last lines of a terminal: the verdict, what stands beside it, and the recommendation."""
    return [
        verdict_line(verdict),
        *caveat_lines(verdict),
        f"recommendation: {in_one_line(verdict['recommendation'], verdict['arms'])}",
    ]


def _candidates(verdict: Verdict) -> list[str]:
    """Return the arms that the evidence leaves to ship, the base aside: one that beats the others, or two that tie."""
    best = verdict["best_set"]
    if len(best) == 1:
        return list(best)
    if verdict["verdict"] == "tie" and set(verdict["arms"]) <= set(best):
        return list(verdict["arms"])
    return [verdict["verdict"]] if verdict["verdict"] in verdict["arms"] and verdict["verdict"] in best else []


def _is_down(found: AgainstBase) -> bool:
    return found["collapsed"] or found["ci95"][1] < 0


def _base(verdict: Verdict, candidates: Sequence[str]) -> Recommendation | None:
    """Recommend the base where every arm is below it or has collapsed, or the one arm that beats the others is."""
    against = verdict["against_base"]
    everyone = list(dict.fromkeys(arm for pair in verdict["pairs"] for arm in pair["arms"]))
    down = [arm for arm in everyone if arm in against and _is_down(against[arm])]
    if not down or not (down == everyone or (len(candidates) == 1 and candidates[0] in down)):
        return None
    why = f"{_standings(verdict, down)}."
    if down != everyone:
        why = f"{_sentence(verdict)} But {why}"
    more = "Look at the learning rate and at the pairs before you train again."
    if any(against[arm]["collapsed"] for arm in down):
        more = (
            "Lower the learning rate, and look at the pairs, before you train again; a higher generate.max_new_tokens "
            "would not mend a policy that has collapsed."
        )
    return _recommendation(BASE_WINS, why, more)


def _unmoved(verdict: Verdict, arms: Sequence[str]) -> Recommendation | None:
    """Recommend nothing where the arms to choose from answer as the base does."""
    shares = verdict.get("same_as_base", {})
    still = [arm for arm in arms if shares.get(arm, 0.0) >= UNCHANGED_SHARE]
    if not still:
        return None
    each = listing(f"{percent(shares[arm], 0)} of the golden answers of {title(arm)}" for arm in still)
    return _recommendation(
        NOTHING,
        f"Training has hardly moved {'these policies' if len(still) > 1 else 'this policy'}: {each} are the SFT "
        "base's own, word for word.",
        "Raise the learning rate (method.learning_rate), or train for more steps (more pairs, or train.epochs), and "
        "compare again.",
    )


def _arm(verdict: Verdict, arm: str) -> Recommendation:
    open_ones = [other for other in verdict["best_set"] if other != arm]
    why = f"{_sentence(verdict, arm)} {_standings(verdict, [arm])}."
    if open_ones:
        why += f" {_titles(open_ones)} {'are' if len(open_ones) > 1 else 'is'} not told apart from it by this evidence."
    more = {
        "checkpoint": "This is about these two models: to choose the method, train each arm with at least 3 seeds "
        "(seed=1,2,3).",
        "config": "This is about the selected configs, not the methods: read the completions side by side before you "
        "ship.",
    }
    return _recommendation(
        arm,
        why,
        more.get(
            verdict["level"], "Read the completions side by side before you ship: a score is no substitute for looking."
        ),
    )


def _either(verdict: Verdict) -> Recommendation:
    return _recommendation(
        EITHER,
        f"{_sentence(verdict)} {_standings(verdict, verdict['arms'])}.",
        "Let cost, answer length and the completions side by side decide.",
    )


def _undecided(verdict: Verdict) -> Recommendation:
    """Recommend nothing yet after a trade-off, or without enough evidence, and say what would settle it."""
    if verdict["verdict"] == "trade-off":
        failed = listing(guard["metric"] for guard in verdict["guards"] if not guard["passed"])
        arm = title(ahead(verdict["difference"], verdict["arms"]))
        return _recommendation(
            NOTHING,
            f"{_sentence(verdict)} {arm} scores better and may be worse on {failed}.",
            f"Decide which of the two matters more; more seeds or prompts narrow the interval of {failed}.",
        )
    down = [arm for arm in verdict["arms"] if arm in verdict["against_base"] and _is_down(verdict["against_base"][arm])]
    but = f" {_standings(verdict, down)}." if down else ""
    return _recommendation(NOTHING, f"{_sentence(verdict)}{but}", _more(verdict))


def _sentence(verdict: Verdict, arm: str = "") -> str:
    """Return what the evidence says of the arms; with `arm`, of this one, which no other arm beats."""
    first, second = (of_level(verdict, name) for name in verdict["arms"])
    winner = winner_of(verdict)
    if arm and arm != winner:
        return f"{title(arm)} is the one arm that no other arm beats, in the ranking of all arms."
    if winner:
        better, worse = (first, second) if winner == verdict["arms"][0] else (second, first)
        text = f"{better} beats {worse} by {points(abs(verdict['difference']), signed=False)} points"
        return _capital(f"{text} ({confidence(verdict['alpha'])} {interval(verdict['ci95'])}).")
    found = f"{points(verdict['difference'])} points"
    if verdict["verdict"] == "tie":
        return _capital(
            f"{first} and {second} differ by less than the {_margin(verdict)} points that matter ({found}, "
            f"{confidence(2 * verdict['alpha'])} {interval(verdict['ci90'])})."
        )
    ranked = len(verdict["best_set"]) > 1 and len(verdict["pairs"]) > 1
    none = " No arm beats all others." if ranked else ""
    return _capital(
        f"the evidence does not tell {first} from {second} ({found}, {confidence(verdict['alpha'])} "
        f"{interval(verdict['ci95'])}).{none}"
    )


def _standings(verdict: Verdict, arms: Sequence[str]) -> str:
    """Return where arms stand against the SFT base, one after the other."""
    return "; ".join(_standing(verdict, arm) for arm in arms)


def _standing(verdict: Verdict, arm: str) -> str:
    found = verdict["against_base"][arm]
    low, high = found["ci95"]
    where = "is above" if low > 0 else "is below" if high < 0 else "is not told apart from"
    size = f"{points(found['difference'])} points, {confidence(verdict['alpha'])} {interval(found['ci95'])}"
    if found["collapsed"]:
        return f"{title(arm)} has collapsed ({size} against the SFT base)"
    return f"{title(arm)} {where} the SFT base ({size})"


def _more(verdict: Verdict) -> str:
    """Return what would settle an open question."""
    if not verdict["to_settle"]:
        return "More seeds or golden prompts narrow the intervals."
    seeds, prompts = (number(verdict["to_settle"].get(name)) for name in ("seeds", "prompts"))
    ways = [f"about {seeds:,.0f} seeds an arm"] if seeds else []
    ways += [f"about {prompts:,.0f} golden prompts"] if prompts else []
    text = f"A difference of {_margin(verdict)} points would be found with {' or '.join(ways)}, all else as it is."
    if not ways:
        text = (
            f"Neither more seeds nor more prompts alone would find a difference of {_margin(verdict)} points: add both."
        )
    if verdict["level"] == "checkpoint":
        text += " At checkpoint level that is about these two models; for the methods, train at least 3 seeds an arm."
    return text


def _margin(verdict: Verdict) -> str:
    return points(verdict["margin"], signed=False)


def _titles(arms: Iterable[str]) -> str:
    return listing(map(title, arms))


def _capital(text: str) -> str:
    """Begin a sentence that does not begin with the name of an arm."""
    return f"{text[:1].upper()}{text[1:]}" if text.startswith(("this ", "the ")) else text


def _recommendation(ship: str, why: str, more: str) -> Recommendation:
    return {"ship": ship, "why": plain_minus(why), "next": more}
