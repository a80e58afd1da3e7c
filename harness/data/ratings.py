"""Ratings beside a pair -> whether they are equal, or contradict the label; found under every usual spelling.

A rating is a number under a name of a side (`chosen`, `loser`, `positive`) and a measure (`score`, `win_rate`), in any
order, with any separator or none: `score_chosen`, `chosen-avg-rating`, `rejectedScore`, `chosenscore`, `scores.chosen`,
`chosen[-1].score`. Two numbers under a measure alone (`scores: [1, 2]`) are those of the chosen and the rejected
answer. A difference of both is `margin`, `score_diff`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from statistics import fmean

from harness.data.conversations import RowError, shown
from harness.study.files import Json

Words = frozenset[str]

_SIDES = ("chosen", "rejected")
_SIDE_OF = {
    **dict.fromkeys(("chosen", "winner", "win", "winning", "w", "yw", "preferred", "better", "best"), "chosen"),
    **dict.fromkeys(("accepted", "accept", "positive", "pos", "good", "superior", "selected", "picked"), "chosen"),
    **dict.fromkeys(("rejected", "loser", "lose", "losing", "loss", "lost", "l", "yl", "dispreferred"), "rejected"),
    **dict.fromkeys(("worse", "worst", "reject", "negative", "neg", "bad", "inferior", "unpreferred"), "rejected"),
    **dict.fromkeys(("nonpreferred", "unselected", "unchosen", "discarded"), "rejected"),
}
_WIN_RATE = "winrate"
_RATES = {"rate", "rates", "ratio", "probability", "prob", "percentage", "percent", "pct", "share"}  # behind `win`
_RATINGS = {
    *("score", "scores", "rating", "ratings", "reward", "rewards", "grade", "grades", "points", "point", "quality"),
    *("likert", "stars", "star", "elo", "votes", "vote", "upvotes", "likes", "marks", "utility", _WIN_RATE, "winrates"),
}
_RANKS = {"rank", "ranks", "ranking"}  # the best is the first
_DIFFERENCES = {"margin", "diff", "difference", "gap", "delta"}
_QUALIFIERS = {
    *("avg", "average", "mean", "overall", "final", "total", "aggregate", "aggregated", "weighted", "raw"),
    *("normalized", "normalised", "rm", "model", "judge", "gpt", "gpt4", "4", "llm", "human", "annotator", "critic"),
    *("preference", "armorm", "value", "pref", "y", "o"),  # y_w, gpt4o
    *("response", "responses", "answer", "answers", "completion", "output", "generation", "text"),
    *(
        "metadata",
        "meta",
        "info",
        "extra",
        "annotation",
        "annotations",
        "attributes",
        "evaluation",
    ),  # what they stand in
}
_KNOWN = frozenset({*_SIDE_OF, *_RATINGS, *_RANKS, *_DIFFERENCES, *_QUALIFIERS})
# Names whose value must be a number where it is there at all.
_PLAIN_NAMES = re.compile(r"(score|rating)[_-](chosen|rejected)|(chosen|rejected)[_-](score|rating)")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_OF_A_WHOLE = re.compile(r"\s*(/\s*\d+|%)\s*$")  # 8/10, 80%
_DEPTH = 3  # of mappings in a column
_SHORTEST = 3  # letters of a word that is looked for in names without separators


def is_rating(column: str) -> bool:
    """Return whether a column may hold ratings, of itself or in a mapping."""
    words = _words(column)
    return bool(words & (_RATINGS | _RANKS | _DIFFERENCES)) and words <= _KNOWN


def is_tie(row: Mapping[str, Json]) -> bool:
    """Return True where ratings are there, and all of them are the same for both answers.

    Raises:
        RowError: for ratings that contradict the labels.
    """
    found: dict[Words, dict[str, tuple[str, float]]] = {}
    differences = []
    for name, words, value in _numbers(row):
        sides = sorted({_SIDE_OF[word] for word in words if word in _SIDE_OF})
        rest = words - set(_SIDE_OF)
        if not words <= _KNOWN:
            continue
        if rest & _DIFFERENCES:
            differences.append((name, value))
        elif len(sides) == 1 and rest & (_RATINGS | _RANKS):
            found.setdefault(rest, {}).setdefault(sides[0], (name, value))
    compared = [both for both in found.items() if len(both[1]) == len(_SIDES)]
    for rest, both in compared:
        (chosen, high), (rejected, low) = both["chosen"], both["rejected"]
        is_rank = bool(rest & _RANKS)
        if (low < high) if is_rank else (high < low):
            worse = "behind" if is_rank else "lower than"
            raise RowError(f"`{chosen}`={high:g} is {worse} `{rejected}`={low:g}: which answer is better?")
    for name, value in differences:
        if value < 0:
            raise RowError(f"`{name}`={value:g} is below 0, for a chosen answer that is worse: which answer is better?")
    gaps = [both["chosen"][1] - both["rejected"][1] for _, both in compared] or [value for _, value in differences]
    return bool(gaps) and not any(gaps)


@functools.lru_cache(maxsize=1024)  # of a pure function: a file has few names and many rows
def _words(name: str) -> Words:
    found: list[str] = []
    for word in map(str.lower, _WORD.findall(name)):
        for part in [word] if word in _KNOWN else _parts(word) or [word]:
            if part in _RATES and found and found[-1] == "win":
                found[-1] = _WIN_RATE  # which is no side
            else:
                found.append(part)
    return frozenset(found)


def _parts(word: str) -> list[str]:
    """Return the known words that a word without separators consists of, long ones first; none where it does not."""
    for end in range(len(word), _SHORTEST - 1, -1):
        if word[:end] in _KNOWN or word[:end] in _RATES:
            rest = _parts(word[end:])
            if rest or end == len(word):
                return [word[:end], *rest]
    return []


def _numbers(row: Mapping[str, Json]) -> Iterator[tuple[str, Words, float]]:
    """Yield each number of a row with its name and the words in it; of turns, the keys of the last one."""
    for column, value in row.items():
        last = value[-1] if isinstance(value, list) and value and column in _SIDES else value
        yield from _numbers_in(last, column, _words(column), _DEPTH)


def _numbers_in(value: Json, name: str, words: Words, depth: int) -> Iterator[tuple[str, Words, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items() if depth else ():
            yield from _numbers_in(item, f"{name}.{key}", words | _words(str(key)), depth - 1)
        return
    if isinstance(value, list) and value and all(_as_number(item) is not None for item in value):
        if len(value) == len(_SIDES) and not words & set(_SIDE_OF):
            for i, side in enumerate(_SIDES):
                yield from _numbers_in(value[i], f"{name}[{i}]", words | {side}, depth)
            return
        value = fmean(number for item in value if (number := _as_number(item)) is not None)  # by several annotators
    if value is None or value == "" or isinstance(value, bool) or not isinstance(value, str | int | float):
        if _PLAIN_NAMES.fullmatch(name) and value not in (None, ""):
            raise RowError(f"`{name}`={shown(value)}; allowed: a number")
        return
    if not (words & (_RATINGS | _RANKS | _DIFFERENCES)):
        return
    number = _as_number(value)
    if number is None and _PLAIN_NAMES.fullmatch(name):
        raise RowError(f"`{name}`={shown(value)}; allowed: a number")
    if number is not None and not math.isnan(number):
        yield name, words, number


def _as_number(value: Json) -> float | None:
    """Return the number that a value is or says; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(_OF_A_WHOLE.sub("", value) if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None
