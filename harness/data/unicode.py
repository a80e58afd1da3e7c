"""Texts of any script -> what checks compare: normal form, folded spaces and quotes, words, numbers, how a text ends.

All of it is by Unicode's properties, and takes time in proportion to the text.
"""

from __future__ import annotations

import math
import unicodedata

import regex

# Unicode's "Stream-Safe Text Format" allows 30 marks in a row. Sorting a longer run takes quadratic time.
_MANY_MARKS = regex.compile(r"(\P{M}?\p{M}{31,}+)")

_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛‹›ʼ´′＇", "'") | dict.fromkeys("“”„‟«»″〝〞＂", '"'))
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}")

# Scripts without spaces between words, by the mean number of characters in a word.
_ONE = r"\p{Script=Katakana}ーｰ"  # a run is one word
_SHORT_WORDS = r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Bopomofo}\p{Script=Yi}"
_LONG_WORDS = r"\p{Line_Break=Complex_Context}\p{Script=Tibetan}\p{Script=Javanese}\p{Script=Balinese}"
_UNSPACED = regex.compile(f"[{_ONE}{_SHORT_WORDS}{_LONG_WORDS}]")
_SHORT, _LONG = 1.5, 4.0
_WORD = regex.compile(
    rf"(?P<one>[{_ONE}]+)|(?P<short>[{_SHORT_WORDS}]+)|(?P<long>[{_LONG_WORDS}]+)"
    rf"|(?P<spaced>(?:(?!{_UNSPACED.pattern})[\p{{L}}\p{{N}}\p{{M}}'’_-])+)"
)
_ZERO_WIDTH_SPACE = "\u200b"  # stands between words where Khmer, Thai or Burmese mark them

# Sentence ends, closing marks and emphasis; Tibetan's shad, which lacks the property. Thai and Lao write no sentence
# end: the end of the turn is all there is. A picture ends a message as a full stop does.
_ENDS = regex.compile(
    r"[\p{Sentence_Terminal}\p{Pe}\p{Pf}\p{Pi}\u0f0d-\u0f12…⋯:;：；>＞\"'＂＇`*＊|｜"
    r"\p{Emoji_Presentation}\p{Emoji_Modifier}\p{Regional_Indicator}\u20e3\p{Script=Thai}\p{Script=Lao}]"
)
_PICTURE = regex.compile(r"\p{Extended_Pictographic}")

# What a number is; docs/checks.md says it in words.
_SPACES = " \u00a0\u2007\u2009\u202f"  # that part groups of digits: among them the thin and the unbreakable ones
_SIGN = r"(?P<sign>(?<![\w)\]}])[-−–‑﹣－])(?:\\?[A-Z]{0,3}\p{Sc}[\u00a0\u202f ]?)?"  # -5, -$5
_COMMA = rf"(?P<comma>[,，٬'’_{_SPACES}]|\{{,\}}|\\,)"
_WESTERN = rf"(?!0)\d{{1,3}}{_COMMA}\d{{3}}(?!\d)(?:(?P=comma)\d{{3}}(?!\d))*+"
_INDIAN = r"\d{1,2}(?:,\d\d(?!\d)){1,5}+,\d{3}(?!\d)"
_DIGITS = rf"(?P<digits>(?:{_INDIAN}|{_WESTERN}|\d++)(?:[.٫]\d++)?|[.٫]\d++)"
_TEN = r"10(?:(?:\^|\*\*)\{?(?P<ten>[-+−]?\d{1,3}+)\}?|(?P<high>[⁻⁺]?[⁰¹²³⁴-⁹]{1,3}+))"
_POWER = rf"(?:[eE](?P<e>[-+−]?\d{{1,3}})(?!\w)|\s?(?:[×x*·]|\\times|\\cdot)\s?{_TEN})"
_PLAIN = r"(?:\d{1,3}(?:,\d{3}(?!\d))++|\d++)(?:\.\d++)?"
_SLASHED = rf"(?P<top>{_PLAIN})\s?[/⁄]\s?(?P<bottom>{_PLAIN})(?![/⁄.,]\d)"
_LATEX = r"\\[dtc]?frac\s?(?:\{(?P<top>\d++)\}|(?P<top>\d))\s?(?:\{(?P<bottom>\d++)\}|(?P<bottom>\d))"
_FRACTION = rf"(?:(?P<whole>\d++)(?: (?=\d)| ?(?!\d)))?(?:{_SLASHED}|{_LATEX}|(?P<one>[¼½¾⅐-⅞↉]))"
# Times, ratios, dates, versions, and powers of other numbers.
_OTHER = r"(?P<other>\d++(?:(?::\d++)++|(?:[.]\d++){2,}+|(?:/\d++){2,}+|\^\{?[-−]?\d++\}?|[⁻⁺]?[⁰¹²³⁴-⁹]++))"
_NUMBER = regex.compile(rf"(?:{_SIGN})?(?:{_TEN}|{_OTHER}|{_FRACTION}|{_DIGITS}{_POWER}?)")
_HIGH = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺−", "0123456789-+-")
_NOT_IN_FLOATS = regex.compile(r"[^\d.]")


def normal(text: str) -> str:
    """Return the text in NFC; letters with more than 30 marks stay as they are."""
    if text.isascii():
        return text
    parts = _MANY_MARKS.split(text)  # every second one is such a letter
    return "".join(part if i % 2 else unicodedata.normalize("NFC", part) for i, part in enumerate(parts))


def fold(text: str) -> str:
    """Return the text in NFC with straight quotes, one space for any white space, and no invisible characters."""
    return " ".join(_INVISIBLE.sub("", normal(text)).translate(_QUOTES).split())


def count_words(text: str) -> int:
    """Count words.

    What stands between white space is a word. In scripts that put no spaces between words, the number is estimated from
    the mean length of a word: 1.5 characters of Chinese, Japanese and Yi; 4 of Thai, Lao, Khmer, Burmese, Tibetan and
    their kin; a run of katakana is one word. Where zero-width spaces part the words of the latter, these are counted.
    """
    return sum(_words_of(token) if _UNSPACED.search(token) else 1 for token in text.split())


def _words_of(token: str) -> int:
    """Count the words of a text without white space that holds characters of an unspaced script."""
    is_parted = _ZERO_WIDTH_SPACE in token
    lengths = {"one": 0.0, "spaced": 0.0, "short": 1 / _SHORT, "long": 0.0 if is_parted else 1 / _LONG}
    words = sum(max(1, round(len(run.group()) * lengths[str(run.lastgroup)])) for run in _WORD.finditer(token))
    return max(1, words)


def ends_as_sentences_do(text: str) -> bool:
    """Return whether the last visible character ends a sentence, closes a quotation, or ends a message."""
    end = len(text)
    while end and (text[end - 1].isspace() or _INVISIBLE.match(text[end - 1])):
        end -= 1
    last, after = text[end - 1 : end], text[end : end + 1]
    return _ENDS.match(last) is not None or (after == "\ufe0f" and _PICTURE.match(last) is not None)


def last_number(text: str) -> float | None:
    """Return the last number of a text; None without one, or where its last digits are a time, a date or a version."""
    last = None
    for found in _NUMBER.finditer(text):
        last = found
    return None if last is None else _value(last)


def only_number(text: str) -> float | None:
    """Return the number that a text is; None where it is anything else."""
    found = _NUMBER.fullmatch(text)
    return None if found is None else _value(found)


def is_decimal_comma(text: str) -> bool:
    """Return whether the last two numbers of a text are joined by a comma, as `3,5`."""
    places = [found.span() for found in _NUMBER.finditer(text)][-2:]
    return len(places) == 2 and text[places[0][1] : places[1][0]] == ","


def _value(found: regex.Match[str]) -> float | None:
    """Return the value of a match of `_NUMBER`."""
    part = found.groupdict()
    if part["other"]:
        return None
    power = (part["e"] or part["ten"] or part["high"] or "0").translate(_HIGH)
    if part["top"]:
        bottom = _as_float(part["bottom"])
        size = _as_float(part["whole"] or "0") + _as_float(part["top"]) / bottom if bottom else math.inf
    elif part["one"]:
        size = _as_float(part["whole"] or "0") + unicodedata.numeric(part["one"])
    else:
        size = _as_float(part["digits"] or "1", power)
    if not math.isfinite(size):
        return None
    return -size if part["sign"] else size


def _as_float(digits: str, power: str = "0") -> float:
    return float(_NOT_IN_FLOATS.sub("", digits.replace("٫", ".")) + f"e{power}")
