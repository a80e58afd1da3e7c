"""Verifiable checks and degenerate output: every check passes one answer and fails another."""

from __future__ import annotations

import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness.data.checks import CHECKS, UncheckedError, failed_checks, final_number, read_checks
from harness.data.conversations import RowError
from harness.score.trial_scores import (
    completion_flags,
    cut_off_warnings,
    unanswered_warnings,
    unchanged_warnings,
)
from harness.study.collapse import degenerate_shares, is_collapsed

CASES = [
    ({"equals": "42"}, " 42\n", "42."),
    ({"equals": ["yes", "Yes"]}, "Yes", "YES"),
    ({"contains": ["red", "blue"]}, "blue and red", "red"),
    ({"excludes": ["sorry", "cannot"]}, "of course", "I cannot"),
    ({"regex": r"^\d{3}$"}, "123", "1234"),
    ({"number": "1,250"}, "8 * 150 + 50 = 1,250.00 dollars.", "1,250 minus 1"),
    ({"max_words": 2}, "two words", "three words now"),
    ({"min_words": 2}, "two words", "one"),
    ({"number": 42}, "In all: 1,000 - 958 = 42.", "42 of 43"),
    ({"number": 1e-05}, "It is 1e-05.", "It is 5."),
    ({"number": 2.5e16}, "2.5E+16", "16"),
    ({"json": True}, '{"a": [1, 2]}', "{'a': 1}"),
    ({"ends_properly": True}, "It ends.", "It ends and"),
]


@pytest.mark.parametrize(("check", "good", "bad"), CASES, ids=lambda value: str(value)[:24])
def test_a_check_tells_right_from_wrong(check: dict, good: str, bad: str) -> None:
    assert failed_checks(good, [check], ended=True) == []
    kind, value = next(iter(check.items()))
    assert failed_checks(bad, [check], ended=True) == [f"{kind}: {value}"]


def test_every_kind_is_covered_here() -> None:
    assert {next(iter(check)) for check, _, _ in CASES} == set(CHECKS)


@pytest.mark.parametrize(
    "text",
    [
        *("هل هذا صحيح؟", "वह घर गया।", "وہ گھر گیا۔", "他回家了。", "ချစ်တယ်။", "Նա տուն գնաց։", "ቤት ሄደ።", "བོད་ཡིན།"),
        *(
            "彼は「はい」",
            "(oui)",
            "Он сказал «да»",
            "Er sagte „ja“",
            "She said ‘no’",
            "ほんと？！",
            "```\ncode\n```",
            "**bold**",
        ),
        *("هذا.\u200f", "Done.\ufeff\u200b", "Good luck 🎉", "With love ❤️", "เขากลับบ้านแล้ว"),
    ],
)
def test_answers_end_properly_in_every_script(text: str) -> None:
    assert failed_checks(text, [{"ends_properly": True}], ended=True) == []


@pytest.mark.parametrize(
    "text", ["وذهب إلى", "और फिर", "他回家", "and then,", "the ©", "so —", "\u200f", "a\x00", "x¿"]
)
def test_answers_that_stop_in_the_middle_do_not(text: str) -> None:
    assert failed_checks(text, [{"ends_properly": True}], ended=True) == ["ends_properly: True"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("two words", 2),
        ("one - two", 3),  # as white space parts them
        ("안녕하세요 여러분", 2),
        ("北京", 1),
        ("我喜欢吃苹果。", 4),  # estimated: 1.5 characters a word
        ("コンピューター", 1),
        ("私は猫が好きです", 5),
        ("ฉันชอบกินแอปเปิล", 4),  # estimated: 4 characters a word
        ("ខ្ញុំ\u200bស្រលាញ់\u200bកម្ពុជា", 3),  # parted by zero-width spaces
        ("Python是一种语言", 4),
        ("བོད་ཡིག་སྐད་ཆ་", 4),
        ("ꦱꦸꦒꦼꦁꦫꦮꦸꦃ", 2),
        ("ꆈꌠꁱꂷ", 3),
        ("", 0),
    ],
)
def test_words_are_counted_in_scripts_without_spaces(text: str, words: int) -> None:
    passed = [n for n in range(1, 8) if not failed_checks(text, [{"min_words": n}, {"max_words": n}], ended=True)]
    assert passed == ([words] if words else [])


def test_texts_are_compared_in_one_normal_form() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for answer, wanted in ((composed, decomposed), (decomposed, composed)):
        checks = [{"equals": wanted}, {"contains": wanted}, {"regex": f"^{wanted}$"}]
        assert failed_checks(answer, checks, ended=True) == []
        assert failed_checks(answer, [{"excludes": [wanted]}], ended=True) != []


def test_fold_takes_quotes_and_spaces_alike() -> None:
    answer = "He said “it’s\u00a0\u200bfine”"
    for check in ({"contains": "it's fine"}, {"equals": "He said  'it' or"}, {"regex": "it's fine"}):
        assert failed_checks(answer, [check], ended=True) != []
    folded = [{"contains": "it's fine", "fold": True}, {"equals": 'He said "it’s fine"', "fold": True}]
    folded += [{"regex": "it's fine", "fold": True}, {"excludes": "It's", "fold": True}]
    assert failed_checks(answer, folded, ended=True) == []


class TestReadingChecks:
    def test_fold_stands_beside_the_check(self) -> None:
        given = [{"contains": "a", "fold": True}, {"contains": "a", "fold": False}, {"contains": "a"}]
        assert read_checks(given) == ({"contains": "a", "fold": True}, {"contains": "a"}, {"contains": "a"})

    def test_parquet_fills_every_mapping_with_all_keys(self) -> None:
        filled = [{"contains": "a", "max_words": None, "fold": True}, {"contains": None, "max_words": 3, "fold": None}]
        assert read_checks(filled) == ({"contains": "a", "fold": True}, {"max_words": 3})

    @pytest.mark.parametrize(
        ("check", "said"),
        [
            ({"fold": True}, "a mapping with one key"),
            ({"contains": "a", "equals": "b", "fold": True}, "a mapping with one key"),
            ({"contains": "a", "fold": "yes"}, "`fold` is 'yes'; allowed: true or false"),
            ({"max_words": 2, "fold": True}, "`fold` changes nothing here; allowed with equals, contains"),
            ({"number": "twelve"}, "check `number`: 'twelve'; allowed: a number"),
            ({"number": True}, "check `number`: True; allowed: a number"),
            *(
                ({"number": text}, f"check `number`: '{text}'")
                for text in ("12:30", "3,5", "1.000.000", "1e999", "5 apples")
            ),
            ({"regex": "("}, "a regular expression that Python compiles"),
        ],
    )
    def test_what_is_no_check_is_named(self, check: dict, said: str) -> None:
        with pytest.raises(RowError, match=re.escape(said)):
            read_checks([check])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 boxes of 4\n#### 1,234", 1234),
        ("so 41 + 1 = 42.", 42),
        ("from -5 to −7.5", -7.5),
        ("10-3", 3),
        ("about .5", 0.5),
        ("**$1,000,000**", 1e6),
        ("٤٢", 42),
        ("1 and 2 #### none", None),
        ("no number", None),
        *(("-$5", -5), ("$-5", -5), ("−5 °C", -5), ("−€ 1,250", -1250), ("\\$-7$", -7), ("x^{2}-3", 3), ("–4", -4)),
        *(("1 000", 1000), ("1\u2009000\u2009000", 1e6), ("1\u202f234.5", 1234.5), ("1'250", 1250), ("1_000", 1000)),
        *(("1{,}000", 1000), ("1\\,000", 1000), ("12,34,567", 1234567), ("in 2020 300 people", 300), ("1 0000", 0)),
        *(("٣٬٥٠٠٫٥", 3500.5), ("1,000.5", 1000.5), ("5%", 5), ("50 %.", 50), ("5 m²", 5)),
        *(("1e3", 1000), ("1.5 × 10^3", 1500), ("2 \\times 10^{-3}", 0.002), ("3·10⁵", 3e5), ("1e999", None)),
        *(("½", 0.5), ("2½", 2.5), ("-2 ¾", -2.75), ("1/2", 0.5), ("2 1/2 cups", 2.5), ("1⁄4", 0.25), ("1/0", None)),
        *(("\\frac{3}{4}", 0.75), ("\\boxed{-\\dfrac12}", -0.5), ("5 at 12:30", None), ("on 11/28/2026", None)),
        *(
            ("10^3", 1000),
            ("10⁻²", 0.01),
            ("2^3", None),
            ("5²", None),
            ("1.5/2", 0.75),
            ("1,000/4", 250),
            ("1 / 4", 0.25),
        ),
        *(("1.2.3", None), ("1.000.000", None), ("(3,5)", 5), ("in 1 or 2\n300", 300)),
    ],
)
def test_the_last_number_counts(text: str, number: float | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "right"),
    [
        *(("1", True), ("-0.5e+3", True), ('"\\ud800"', True), ("[]", True), ('{"a":[1,{"b":null}],"a":true}', True)),
        *(("NaN", False), ("[Infinity]", False), ("01", False), ("+1", False), ("1.", False), ("[1,]", False)),
        *(('{"a" 1}', False), ("{1:2}", False), ('"\t"', False), ("'a'", False), ("[1 2]", False), ("[}", False)),
        *(("\ufeff1", False), ("1 2", False), ("", False), ("```json\n1\n```", False)),
        *(("[" * 3000, False), ("[" * 50_000 + "]" * 50_000, True), ('{"a":' * 9000 + "1" + "}" * 9000, True)),
        ("7" * 1_000_000, True),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_json_is_that_of_rfc_8259_at_any_depth_and_length(text: str, right: bool) -> None:
    assert (failed_checks(text, [{"json": True}], ended=True) == []) is right


HOSTILE = {
    "one word": "a" * 1_000_000,
    "spaces": " " * 99_999 + "x",
    "marks": "a" + "\u0301\u0316" * 50_000,
    "NULs": "\x00" * 100_000,
    "lone surrogates": "\ud83d" * 100_000,
    "right-to-left marks": "\u200f" * 100_000,
    "mixed scripts": "a漢ก" * 33_333,
    "numbers": "1," * 50_000,
    "groups of two": "11," * 33_000,
    "groups of three": "111," * 25_000 + "1111",
    "fractions": "1 1/" * 25_000,
    "one number": "7" * 1_000_000,
    "times": "1:" * 50_000,
    "slashes": "1 / " * 25_000,
    "groups before a slash": "111," * 25_000 + "111x",
    "powers": "10^" * 33_000,
    "quotes": '"\\' * 50_000,
    "brackets": '[{"a":' * 16_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_holds_a_check_for_long(text: str) -> None:
    for check in [*(check for check, _, _ in CASES), {"contains": "b", "fold": True}]:
        start = time.process_time()
        failed_checks(text, [check], ended=True)
        assert time.process_time() - start < 10  # a second, on a machine ten times slower


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(.*)(.*)(.*)x", r"(\w+\s?)+:", r"(?:a|aa)+$", r"(a*)\1!", r"[a-z]*!"])
def test_a_pattern_that_would_take_forever_is_unchecked_by_name(pattern: str) -> None:
    start = time.process_time()
    for _ in range(2):
        with pytest.raises(UncheckedError, match=re.escape(f"the check regex: {pattern!r} needs more than 0.3 s")):
            failed_checks("a" * 99_999 + "?\n.", [{"regex": pattern}], ended=True)
    assert time.process_time() - start < 20  # two seconds, on a machine ten times slower


def test_a_pattern_is_stopped_in_another_thread_too() -> None:
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(failed_checks, "a" * 50_000 + "!", [{"regex": r"(a+)+$"}], ended=True)
        with pytest.raises(UncheckedError):
            found.result(timeout=60)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"^[[:alpha:]]$", "a]"),
        (r"^a{e<=1}$", "a{e<=1}"),
        (r"^\w+$", "कि"),
        (r"a\sb", "a\x1cb"),
        (r"(?i)^straße$", "STRASSE"),
    ],
)
def test_patterns_mean_what_they_mean_to_python(pattern: str, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert (failed_checks(text, [{"regex": pattern}], ended=True) == []) is bool(re.search(pattern, text))


def test_an_answer_that_was_cut_off_does_not_end_properly() -> None:
    assert failed_checks("It ends.", [{"ends_properly": True}], ended=False) != []


def test_each_failed_check_is_named() -> None:
    checks = [{"contains": "a"}, {"max_words": 1}, {"excludes": "z"}]
    assert failed_checks("b z", checks, ended=True) == ["contains: a", "max_words: 1", "excludes: z"]


@pytest.mark.parametrize(
    ("text", "ended", "flags"),
    [
        ("A good answer.", True, []),
        (" \n", True, ["empty"]),
        ("It goes on", False, ["cut_off"]),
        ("spam " * 20, True, ["repetition"]),
        ("a" * 40, False, ["cut_off", "repetition"]),
        ("the cat sat on the mat. " * 8, True, ["repetition"]),
        ("75T7T7T7T7T7", False, ["cut_off", "repetition"]),
        ("na na na na na na", True, []),  # six repeats and yet short: a song, not a collapse
        (
            "| a | b |\n|" + "-" * 30 + "|\n" + "Some words of an answer that is longer than the rule above it.",
            True,
            [],
        ),
    ],
)
def test_degenerate_output_is_named(text: str, ended: bool, flags: list[str]) -> None:
    assert completion_flags(text, ended=ended) == flags


def test_hostile_text_does_not_slow_the_detector() -> None:
    start = time.perf_counter()
    completion_flags("ab" * 50_000 + "c", ended=True)
    completion_flags("".join(chr(97 + i % 26) for i in range(100_000)), ended=True)
    assert time.perf_counter() - start < 50  # quadratic growth would take minutes


def rows(*texts: str, ended: bool = True) -> list[dict]:
    return [{"completion": text, "flags": completion_flags(text, ended=ended)} for text in texts]


def test_shares_are_counted() -> None:
    shares = degenerate_shares(rows("x", "x", "", "word " * 30))
    assert shares == {"empty": 0.25, "cut_off": 0.0, "repetition": 0.25, "same_answer": 0.5, "degenerate": 0.5}


def test_a_collapse_is_measured_against_the_base() -> None:
    good = rows(*[f"answer {i}" for i in range(20)])
    same = rows(*["same"] * 19, "answer")
    looping = rows(*["spam " * 20] * 11, *[f"answer {i}" for i in range(9)])
    assert is_collapsed(same, good)
    assert is_collapsed(looping, good)
    assert not is_collapsed(good, good)
    assert not is_collapsed(same, same)  # the base was like that: the data's fault, not the arm's
    assert not is_collapsed(rows("same", "same"), good)  # too few prompts to say


def test_a_frequent_answer_is_no_collapse() -> None:
    """A base that says yes and no in halves, and a policy with a little more yes; or yes always, and rightly."""
    base = rows(*["yes"] * 50, *["no"] * 50)
    assert not is_collapsed(rows(*["yes"] * 52, *["no"] * 48), base)
    assert not is_collapsed(rows(*["yes"] * 80, *["no"] * 20), base)
    always = rows(*["yes"] * 100)
    assert is_collapsed(always, base)
    assert not is_collapsed([row | {"passed": True} for row in always], base)
    assert not is_collapsed([row | {"passed": i < 50} for i, row in enumerate(always)], base)


def test_answers_that_are_cut_off_warn_and_are_no_collapse() -> None:
    """An arm that lengthens its answers beyond the limit is not broken; its scores are of stumps."""
    good, endless = (rows(*[f"answer {i} and so on" for i in range(20)], ended=ended) for ended in (True, False))
    assert not is_collapsed(endless, good)
    shares = {"golden": degenerate_shares(endless)}
    (warning,) = cut_off_warnings(shares, {"golden": degenerate_shares(good)})
    assert warning.startswith("100% of the answers to golden were cut off at generate.max_new_tokens, of the base's 0%")
    assert "raise it where the score has not fallen" in warning
    assert cut_off_warnings(shares, shares) == []


def test_answers_that_run_to_the_limit_with_a_fallen_score_are_a_collapse() -> None:
    """A policy that babbles until it is cut off: a higher limit would not mend it."""
    short, endless = (rows(*[f"answer {i} and so on" for i in range(20)], ended=ended) for ended in (True, False))
    base = [row | {"passed": i < 14} for i, row in enumerate(short)]

    def policy(passes: int, cut_off: int = 20) -> list[dict]:
        mixed = [*endless[:cut_off], *short[cut_off:]]
        return [row | {"passed": i >= 20 - passes} for i, row in enumerate(mixed)]

    assert is_collapsed(policy(2), base)
    assert is_collapsed(policy(2, cut_off=12), base)
    assert not is_collapsed(policy(14), base)  # longer, and as often right
    assert not is_collapsed(policy(12), base)  # two fewer of twenty are chance
    assert not is_collapsed(policy(2, cut_off=8), base)  # most of them end
    assert not is_collapsed(policy(2), [row | {"flags": ["cut_off"]} for row in base])  # so did most of the base's
    shares = {"golden": degenerate_shares(endless)}
    (warning,) = cut_off_warnings(shares, {"golden": degenerate_shares(short)}, fallen=True)
    assert "the policy babbles, and a higher limit would not mend it; lower the learning rate" in warning


def test_a_policy_that_is_cut_off_while_it_thinks_has_not_collapsed() -> None:
    """It has given no answer, which is not the same answer each time."""
    good = rows(*[f"answer {i}" for i in range(20)])
    thinking = [{"completion": "", "flags": completion_flags("", ended=False, thought=True)} for _ in range(20)]
    assert thinking[0]["flags"] == ["cut_off"]
    assert not is_collapsed(thinking, good)
    assert not is_collapsed(thinking, [row | {"passed": True} for row in good])
    assert degenerate_shares(thinking)["same_answer"] == 0
    assert completion_flags("", ended=True, thought=True) == ["empty"]


def test_answers_that_stop_in_their_thinking_are_warned_of() -> None:
    stopped = {"split": "golden", "completion": "", "ended": False, "thinking": "hm"}
    answered = {"split": "golden", "completion": "Yes.", "ended": True, "thinking": "hm"}
    (warning,) = unanswered_warnings([stopped, stopped, answered])
    assert warning.startswith("67% of the answers to golden stop in their thinking and count as cut off; raise")
    assert unanswered_warnings([stopped, answered, answered]) == unanswered_warnings([]) == []


def test_a_policy_that_answers_as_the_base_does_is_warned_of() -> None:
    """Two steps of training change no greedy answer: a tie between such arms says nothing."""
    base = [{"split": "golden", "prompt_id": str(i), "completion": f"answer {i}"} for i in range(20)]
    (warning,) = unchanged_warnings(base, base)
    assert warning.startswith("100% of the answers to golden are the SFT base's own, word for word")
    half = [row | {"completion": "another"} if i % 2 else row for i, row in enumerate(base)]
    assert unchanged_warnings(half, base) == []
    assert unchanged_warnings(base, []) == []
    assert unchanged_warnings(base[:3], base) == []
