"""Rows as people have them, and what is made of each: one behaviour a test."""

import itertools
import json
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harness.data.checks import CHECKS
from harness.data.conversations import RowError
from harness.data.formats import ANSWER_COLUMNS, ParsedRow, has_known_form, parse_row

SKY = "What color is the sky?"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def parse(row, columns=None, *, needs_pair=True, reads_checks=False) -> ParsedRow:
    return parse_row(row, 7, frozenset(columns or row), needs_pair=needs_pair, reads_checks=reads_checks)


def parse_eval(row, columns=None) -> ParsedRow:
    return parse(row, columns, needs_pair=False, reads_checks=True)


def refuses(row, *parts, columns=None, evaluation=False):
    with pytest.raises(RowError) as error:
        (parse_eval if evaluation else parse)(row, columns)
    for part in parts:
        assert part in str(error.value)


def standard(**changes):
    return {"prompt": SKY, "chosen": "It is blue.", "rejected": "It is green."} | changes


def conversational(**changes):
    return {
        "prompt": [user(SKY)],
        "chosen": [assistant("It is blue.")],
        "rejected": [assistant("It is green.")],
    } | changes


class TestForms:
    def test_standard_text_becomes_one_user_and_one_assistant_turn_and_is_not_conversational(self):
        pair = parse(standard(id="a")).pair()
        assert (pair.prompt, pair.chosen, pair.rejected) == (
            (user(SKY),),
            (assistant("It is blue."),),
            (assistant("It is green."),),
        )
        assert (pair.pair_id, pair.conversational, pair.row) == ("a", False, 7)

    def test_text_is_taken_as_it_stands_white_space_included(self):
        pair = parse(standard(prompt=" Q:\n", chosen=" yes\n", rejected=" no")).pair()
        assert [pair.prompt[0]["content"], pair.chosen[0]["content"], pair.rejected[0]["content"]] == [
            " Q:\n",
            " yes\n",
            " no",
        ]

    def test_conversational_turns_are_kept_with_the_system_turn_and_earlier_turns(self):
        prompt = [system("Be brief."), user("Hi"), assistant("Hello."), user(SKY)]
        pair = parse(conversational(prompt=prompt)).pair()
        assert pair.prompt == tuple(prompt)
        assert pair.conversational

    def test_the_prompt_may_be_called_messages(self):
        row = {"messages": [user(SKY)], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]}
        assert parse(row).prompt == (user(SKY),)

    def test_an_implicit_conversational_prompt_is_what_both_conversations_share(self):
        turns = [user("Hi"), assistant("Hello."), user(SKY)]
        parsed = parse({"chosen": [*turns, assistant("Blue.")], "rejected": [*turns, assistant("Green.")]})
        assert (parsed.prompt, parsed.chosen, parsed.rejected) == (
            tuple(turns),
            (assistant("Blue."),),
            (assistant("Green."),),
        )
        assert parsed.form == "TRL conversational, implicit prompt"

    def test_answers_of_several_turns_begin_where_the_conversations_part(self):
        chosen = [user("Hi"), assistant("Hello."), user(SKY), assistant("Blue.")]
        rejected = [user("Hi"), assistant("Hey."), user(SKY), assistant("Green.")]
        parsed = parse({"chosen": chosen, "rejected": rejected})
        assert (parsed.prompt, parsed.chosen, parsed.rejected) == (
            (user("Hi"),),
            tuple(chosen[1:]),
            tuple(rejected[1:]),
        )

    def test_ultrafeedback_binarized_repeats_its_prompt_only_once(self):
        chosen, rejected = [user(SKY), assistant("Blue.")], [user(SKY), assistant("Green.")]
        row = {"prompt": SKY, "prompt_id": "f0", "chosen": chosen, "rejected": rejected, "messages": chosen}
        parsed = parse(row | {"score_chosen": 8.0, "score_rejected": 5.0})
        assert (parsed.prompt, parsed.chosen, parsed.rejected) == (
            (user(SKY),),
            (assistant("Blue."),),
            (assistant("Green."),),
        )
        assert (parsed.form, parsed.conversational) == ("UltraFeedback-binarized", True)

    def test_ultrafeedback_without_its_prompt_column_is_not_misled_by_messages_being_a_copy_of_chosen(self):
        chosen, rejected = [user(SKY), assistant("Blue.")], [user(SKY), assistant("Green.")]
        assert parse({"chosen": chosen, "rejected": rejected, "messages": chosen}).prompt == (user(SKY),)

    def test_a_prompt_in_turns_that_the_answers_repeat_is_split_where_the_prompt_ends(self):
        prompt = [user("Hi")]
        shared = [*prompt, assistant("Hello."), user(SKY)]
        row = {"prompt": prompt, "chosen": [*shared, assistant("Blue.")], "rejected": [*shared, assistant("Green.")]}
        assert parse(row).chosen == (assistant("Hello."), user(SKY), assistant("Blue."))

    def test_a_prompt_in_turns_that_the_answers_repeat_stands_once(self):
        row = conversational(chosen=[user(SKY), assistant("Blue.")], rejected=[user(SKY), assistant("Green.")])
        parsed = parse(row)
        assert (parsed.prompt, parsed.chosen) == ((user(SKY),), (assistant("Blue."),))

    @pytest.mark.parametrize("prompt", ["Hi", SKY, f"User: Hi\nBot: Hello.\nUser: {SKY}", "", " "])
    def test_a_prompt_text_beside_whole_conversations_may_be_any_user_turn_or_all_turns_or_empty(self, prompt):
        shared = [user("Hi"), assistant("Hello."), user(SKY)]
        row = {"prompt": prompt, "chosen": [*shared, assistant("Blue.")], "rejected": [*shared, assistant("Green.")]}
        assert parse(row).prompt == tuple(shared)

    def test_hh_transcripts_become_real_turns(self):
        start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nAnd welcome.\n\nHuman: What color is the sky?\n\nAssistant:"
        parsed = parse({"chosen": start + " Blue.", "rejected": start + " Green."})
        assert parsed.prompt == (user("Hi"), assistant("Hello.\n\nAnd welcome."), user(SKY))
        assert (parsed.chosen, parsed.rejected) == ((assistant("Blue."),), (assistant("Green."),))
        assert (parsed.form, parsed.conversational) == ("HH-RLHF transcript", True)

    def test_hh_transcripts_that_part_early_are_answers_of_several_turns(self):
        chosen = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Bye."
        rejected = "\n\nHuman: Hi\n\nAssistant: What?"
        parsed = parse({"chosen": chosen, "rejected": rejected})
        assert parsed.prompt == (user("Hi"),)
        assert parsed.chosen == (assistant("Hello."), user("Bye"), assistant("Bye."))

    @pytest.mark.parametrize("end", ["", " ", "\n"])
    def test_an_open_transcript_as_prompt_becomes_turns_too(self, end):
        row = {"prompt": f"\n\nHuman: Hi\n\nAssistant:{end}", "chosen": " Hello.", "rejected": " What?"}
        parsed = parse(row)
        assert (parsed.prompt, parsed.conversational) == ((user("Hi"),), True)
        assert (parsed.chosen, parsed.rejected) == ((assistant("Hello."),), (assistant("What?"),))

    def test_a_prompt_that_only_quotes_a_transcript_stays_text(self):
        prompt = "Human: Hi\n\nAssistant: Hello.\n\nHow many words are that?"
        parsed = parse(standard(prompt=prompt))
        assert (parsed.prompt, parsed.conversational) == ((user(prompt),), False)

    def test_sharegpt_roles_are_translated(self):
        turns = [{"from": "system", "value": "Be brief."}, human("Hi"), gpt("Hello."), human(SKY)]
        parsed = parse({"conversations": turns, "chosen": gpt("Blue."), "rejected": gpt("Green.")})
        assert parsed.prompt == (system("Be brief."), user("Hi"), assistant("Hello."), user(SKY))
        assert (parsed.chosen, parsed.form) == ((assistant("Blue."),), "ShareGPT")

    def test_a_tool_result_stays_a_turn_of_its_own(self):
        turns = [human("Weather?"), gpt("call"), {"from": "observation", "value": "sunny"}]
        parsed = parse({"conversations": turns, "chosen": gpt("Sunny."), "rejected": gpt("Rain.")})
        assert parsed.prompt[-1] == {"role": "tool", "content": "sunny"}

    def test_a_system_column_becomes_the_first_turn(self):
        parsed = parse(
            {"system": "Be brief.", "conversations": [human(SKY)], "chosen": gpt("Blue."), "rejected": gpt("No.")}
        )
        assert parsed.prompt == (system("Be brief."), user(SKY))

    def test_a_system_column_makes_plain_text_a_conversation(self):
        parsed = parse(standard(system="Be brief."))
        assert (parsed.prompt, parsed.conversational) == ((system("Be brief."), user(SKY)), True)

    @pytest.mark.parametrize("empty", [None, "", " "])
    def test_an_empty_system_column_is_no_turn(self, empty):
        assert parse(standard(system=empty)).prompt == (user(SKY),)

    def test_a_system_column_that_the_prompt_repeats_stands_once(self):
        parsed = parse(conversational(prompt=[system("Be brief."), user(SKY)], system="Be brief."))
        assert parsed.prompt == (system("Be brief."), user(SKY))

    def test_text_answers_to_a_prompt_in_turns_become_assistant_turns(self):
        parsed = parse(conversational(chosen="Blue.", rejected="Green."))
        assert (parsed.chosen, parsed.conversational) == ((assistant("Blue."),), True)

    def test_answers_in_turns_to_a_prompt_in_text_make_a_conversation(self):
        parsed = parse(conversational(prompt=SKY))
        assert (parsed.prompt, parsed.conversational) == ((user(SKY),), True)

    def test_an_orca_row_has_its_prompt_in_question(self):
        row = {"system": "Be brief.", "question": SKY, "chosen": "Blue.", "rejected": "Green."}
        assert parse(row).prompt == (system("Be brief."), user(SKY))

    def test_an_alpaca_row_has_its_prompt_in_instruction_and_input(self):
        row = {"instruction": "Translate.", "input": "Himmel", "chosen": "sky", "rejected": "himmel"}
        assert parse(row).prompt == (user("Translate.\nHimmel"),)

    def test_without_an_id_the_row_is_the_id(self):
        assert parse(standard()).row_id == "row-7"

    @pytest.mark.parametrize("number", [0, 12])
    def test_an_id_may_be_a_number(self, number):
        assert parse(standard(id=number)).row_id == str(number)


class TestImplicitTextPrompt:
    """TRL's extract_prompt cuts at the first character that differs; here, never inside a word."""

    @pytest.mark.parametrize(
        ("prompt", "chosen", "rejected"),
        [
            ("The sky is", " blue", " green"),
            ("The sky is", " blue", " black"),
            ("Is it?\nAnswer:", " yes", " yesterday"),
            ("Say it.", " don't", " donut"),
            ("Pi is", " 3.14", " 3.15"),
            ("Q: sky?\n", "Blue", "Green"),
            ("天空是", "蓝色", "绿色"),
            ("Sing ", "é", "è"),
        ],
    )
    def test_the_prompt_ends_before_the_first_word_that_differs(self, prompt, chosen, rejected):
        parsed = parse({"chosen": prompt + chosen, "rejected": prompt + rejected})
        spaces = len(prompt) - len(prompt.rstrip(" "))
        assert parsed.prompt == (user(prompt.rstrip(" ")),)
        assert parsed.chosen == (assistant(" " * spaces + chosen),)
        assert parsed.rejected == (assistant(" " * spaces + rejected),)
        assert not parsed.conversational

    def test_an_emoji_of_several_characters_is_not_torn(self):
        parsed = parse({"chosen": "Draw 👩\u200d🔬", "rejected": "Draw 👩\u200d🚀"})
        assert (parsed.chosen, parsed.rejected) == ((assistant(" 👩\u200d🔬"),), (assistant(" 👩\u200d🚀"),))

    def test_an_accent_is_not_torn_from_its_letter(self):
        parsed = parse({"chosen": "Sing 字e\u0301", "rejected": "Sing 字e\u0300"})
        assert parsed.chosen == (assistant("e\u0301"),)

    @given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
    def test_prompt_and_answers_put_together_are_the_texts_that_were_given(self, shared, chosen, rejected):
        try:
            parsed = parse({"chosen": shared + chosen, "rejected": shared + rejected})
        except RowError:
            assume(False)
        prompt = parsed.prompt[0]["content"]
        assert prompt + parsed.chosen[0]["content"] == shared + chosen
        assert prompt + parsed.rejected[0]["content"] == shared + rejected


class TestRefusedPairs:
    @pytest.mark.parametrize("column", ["chosen", "rejected"])
    def test_a_missing_answer(self, column):
        row = standard()
        del row[column]
        refuses(row, f"`{column}` is missing")

    @pytest.mark.parametrize("absent", [{}, {"prompt": None}])
    def test_a_missing_prompt_is_not_guessed_where_the_file_has_a_prompt_column(self, absent):
        row = {"chosen": "It is blue.", "rejected": "It is green."} | absent
        refuses(row, "`prompt` is missing", columns=["prompt", "chosen", "rejected"])

    def test_a_missing_instruction_is_not_replaced_by_its_input(self):
        row = {"input": "It", "chosen": "It is blue.", "rejected": "It is green."}
        refuses(row, "`instruction` is missing", columns=["instruction", *row])

    @pytest.mark.parametrize("prompt", ["", " \n"])
    def test_an_empty_prompt(self, prompt):
        refuses(standard(prompt=prompt), "prompt is empty")

    @pytest.mark.parametrize("prompt", [[], [system("Be brief.")]])
    def test_a_prompt_without_a_user_turn(self, prompt):
        refuses(conversational(prompt=prompt), "prompt is empty", "no user turn")

    @pytest.mark.parametrize("column", ["chosen", "rejected"])
    @pytest.mark.parametrize("empty", ["", "  \n"])
    def test_an_empty_answer(self, column, empty):
        refuses(standard(**{column: empty}), f"`{column}` is empty")

    @pytest.mark.parametrize("column", ["chosen", "rejected"])
    @pytest.mark.parametrize(("empty", "reason"), [([], "is empty"), ([assistant(" ")], "has an empty assistant turn")])
    def test_an_empty_answer_in_turns(self, column, empty, reason):
        refuses(conversational(**{column: empty}), f"`{column}` {reason}")

    @pytest.mark.parametrize("rejected", ["It is blue.", " It is blue.\n"])
    def test_identical_answers_even_with_other_outer_white_space(self, rejected):
        refuses(standard(rejected=rejected), "identical")

    def test_identical_conversations(self):
        turns = [user(SKY), assistant("Blue.")]
        refuses({"chosen": turns, "rejected": turns}, "identical")

    def test_answers_that_differ_in_case_are_not_identical(self):
        assert parse(standard(rejected="it is blue.")).rejected == (assistant("it is blue."),)

    @pytest.mark.parametrize("column", ["chosen", "rejected"])
    def test_an_answer_that_does_not_end_in_an_assistant_turn(self, column):
        changed = {column: [assistant("Blue."), user("Why?")]}
        refuses(conversational(**changed), f"`{column}` does not end in an assistant turn")

    def test_conversations_without_an_assistant_turn(self):
        refuses({"chosen": [user("Hi")], "rejected": [user("Hi")]}, "`chosen` does not end in an assistant turn")

    def test_a_transcript_that_ends_with_the_human(self):
        start = "\n\nHuman: Hi\n\nAssistant:"
        refuses(
            {"chosen": f"{start} Hello.\n\nHuman: Bye", "rejected": f"{start} What?"},
            "does not end in an assistant turn",
        )

    def test_a_transcript_with_an_empty_turn(self):
        start = "\n\nHuman: Hi\n\nAssistant:"
        refuses({"chosen": f"{start} Hello.", "rejected": start}, "`rejected` has an empty assistant turn")

    def test_a_transcript_beside_a_text_that_is_none(self):
        refuses(
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nRobot: Yo"}, "is a transcript"
        )

    def test_transcripts_of_different_questions(self):
        chosen, rejected = "\n\nHuman: Hi\n\nAssistant: A", "\n\nHuman: Ho\n\nAssistant: B"
        refuses({"chosen": chosen, "rejected": rejected}, "answer different prompts", "part at turn 1")

    def test_an_answer_that_is_the_other_with_further_turns(self):
        shared = [user("Hi"), assistant("Hello.")]
        refuses({"chosen": [*shared, user("Bye"), assistant("Bye.")], "rejected": shared}, "further turns")

    @pytest.mark.parametrize(
        ("chosen", "rejected"),
        [("Blue.", "Green."), ("\nBlue.", "\nGreen."), ("\u0301a", "\u0300a"), ("blue", "black")],
    )
    def test_texts_that_share_no_beginning(self, chosen, rejected):
        refuses({"chosen": chosen, "rejected": rejected}, "no `prompt`", "no beginning in common")

    def test_texts_of_which_one_is_the_beginning_of_the_other(self):
        refuses({"chosen": "The sky is", "rejected": "The sky is blue."}, "`chosen` is empty after what both")

    def test_answers_in_turns_without_any_prompt(self):
        refuses(
            {"chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
            "no `prompt`",
            "begin with an assistant turn",
        )

    def test_a_prompt_that_the_conversations_do_not_repeat(self):
        chosen, rejected = [user(SKY), assistant("Blue.")], [user(SKY), assistant("Green.")]
        refuses(
            {"prompt": "Why?", "chosen": chosen, "rejected": rejected}, "`prompt` is not in the conversation", "remove"
        )
        refuses(
            {"prompt": [user("Why?")], "chosen": chosen, "rejected": rejected}, "do not begin with the prompt given"
        )

    def test_only_one_answer_repeats_the_prompt(self):
        row = {"prompt": SKY, "chosen": [user(SKY), assistant("Blue.")], "rejected": [assistant("Green.")]}
        refuses(row, "one of `chosen` and `rejected` begins with the prompt")

    def test_a_prompt_that_ends_in_an_assistant_turn(self):
        refuses(conversational(prompt=[user("Hi"), assistant("Hello.")]), "prompt ends in an assistant turn")

    def test_a_system_column_that_contradicts_the_prompt(self):
        refuses(conversational(prompt=[system("Be long."), user(SKY)], system="Be brief."), "`system` differs")

    def test_text_beside_turns(self):
        refuses(standard(chosen=[assistant("Blue.")]), "both text or both turns")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompt": 5}, "`prompt` is of type int; allowed: text, or a list of {role, content}"),
            ({"chosen": 1.5}, "`chosen` is of type float"),
            ({"chosen": ["Blue."]}, "`chosen` has a turn of type str"),
            ({"chosen": [{"role": "bot", "content": "Blue."}]}, "role 'bot'; allowed: system, user"),
            ({"chosen": [{"content": "Blue."}]}, "role None"),
            ({"chosen": [{"role": "assistant", "content": None}]}, "content is of type NoneType; allowed: text"),
            ({"chosen": [assistant("x") | {"tool_calls": [{}]}]}, "`tool_calls`"),
            ({"system": ["Be brief."]}, "`system` is of type list"),
            ({"id": [1]}, "`id` is of type list"),
            ({"id": True}, "`id` is of type bool"),
        ],
    )
    def test_a_value_of_the_wrong_type(self, changes, message):
        refuses(standard(**changes), message)

    def test_an_alpaca_history(self):
        refuses(
            {"instruction": "Go", "history": [["a", "b"]], "chosen": "x", "rejected": "y"},
            "`history`",
            "`conversations`",
        )

    @pytest.mark.parametrize("column", ["prompt", "chosen", "rejected", "id"])
    def test_a_lone_surrogate(self, column):
        refuses(standard(**{column: "It \ud800"}), "invalid Unicode", "\\ud800", "character 4")

    def test_a_long_value_is_cut_in_the_message(self):
        with pytest.raises(RowError) as error:
            parse(conversational(prompt=[{"role": "x" * 5000, "content": "Hi"}]))
        assert len(str(error.value)) < 300


class TestScores:
    COLUMNS = (
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_rating", "rejected_rating"),
    )

    @pytest.mark.parametrize(("better", "worse"), COLUMNS)
    def test_a_score_order_that_contradicts_the_labels_is_refused(self, better, worse):
        refuses(standard(**{better: 3.0, worse: 7.5}), f"`{better}`=3 is lower than `{worse}`=7.5")

    @pytest.mark.parametrize(("better", "worse"), COLUMNS)
    def test_equal_scores_are_a_tie_which_is_kept_and_marked(self, better, worse):
        assert parse(standard(**{better: 7, worse: 7})).tie

    @pytest.mark.parametrize("scores", [(8, 7), (None, 7), (float("nan"), 7), ("", "7"), ("8", "7")])
    def test_ordered_or_missing_scores_are_no_tie(self, scores):
        assert not parse(standard(score_chosen=scores[0], score_rejected=scores[1])).tie

    def test_a_score_that_is_no_number_is_refused(self):
        refuses(standard(score_chosen="good", score_rejected=1), "`score_chosen`='good'; allowed: a number")


class TestEvaluationRows:
    def test_a_prompt_with_checks_needs_no_pair(self):
        parsed = parse_eval({"prompt": SKY, "checks": [{"contains": "blue"}, {"max_words": 3}], "cluster": 4})
        prompt = parsed.eval_prompt()
        assert prompt.checks == ({"contains": "blue"}, {"max_words": 3})
        assert (prompt.prompt, prompt.cluster, prompt.conversational, prompt.row) == ((user(SKY),), "4", False, 7)
        assert parsed.pair() is None

    def test_a_prompt_with_a_pair_needs_no_checks(self):
        parsed = parse_eval(standard())
        assert parsed.eval_prompt().checks == ()
        assert parsed.pair().chosen == (assistant("It is blue."),)

    def test_a_row_may_have_both(self):
        parsed = parse_eval(standard(checks=[{"json": True}]))
        assert parsed.eval_prompt().checks == ({"json": True},)
        assert parsed.pair() is not None

    def test_the_prompt_of_a_pair_and_of_a_row_with_checks_has_one_identity(self):
        assert parse_eval({"prompt": SKY, "checks": [{"json": True}]}).prompt_id == parse(standard()).pair().prompt_id

    def test_a_prompt_in_turns_is_conversational(self):
        prompt = parse_eval({"messages": [system("Be brief."), user(SKY)], "checks": [{"json": True}]}).eval_prompt()
        assert (prompt.conversational, prompt.prompt) == (True, (system("Be brief."), user(SKY)))

    def test_nulls_that_parquet_puts_into_a_check_do_not_count(self):
        row = {"prompt": SKY, "checks": [{"contains": None, "max_words": 3}, {"contains": ["a"], "max_words": None}]}
        assert parse_eval(row).checks == ({"max_words": 3}, {"contains": ["a"]})

    @pytest.mark.parametrize("checks", [None, []])
    def test_neither_checks_nor_a_pair_is_refused(self, checks):
        refuses({"prompt": SKY, "checks": checks}, "neither `checks` nor", "cannot be scored", evaluation=True)

    def test_half_a_pair_beside_checks_is_refused(self):
        refuses(
            {"prompt": SKY, "checks": [{"json": True}], "chosen": "Blue."}, "`rejected` is missing", evaluation=True
        )

    def test_checks_without_a_prompt_are_refused(self):
        refuses({"checks": [{"json": True}]}, "`prompt` is missing", columns=["prompt", "checks"], evaluation=True)

    def test_training_rows_are_not_refused_for_their_checks(self):
        assert parse(standard(checks="nonsense")).checks == ()


class TestChecks:
    @pytest.mark.parametrize(
        "check",
        [
            {"equals": "blue"},
            {"equals": ["blue", "Blue"]},
            {"contains": ["blue"]},
            {"excludes": "green"},
            {"regex": r"^\d+$"},
            {"max_words": 1},
            {"min_words": 10},
            {"json": True},
            {"ends_properly": True},
        ],
    )
    def test_every_kind_is_read(self, check):
        assert parse_eval({"prompt": SKY, "checks": [check]}).checks == (check,)

    @pytest.mark.parametrize(
        ("check", "parts"),
        [
            ({"equals": ""}, ("`equals`", "''", "a text or a list of texts")),
            ({"equals": 4}, ("`equals`", "4", "a text or a list of texts")),
            ({"contains": []}, ("`contains`", "[]")),
            ({"excludes": ["a", ""]}, ("`excludes`", "['a', '']")),
            ({"regex": "("}, ("`regex`", "'('", "a regular expression that Python compiles")),
            ({"regex": ""}, ("`regex`", "''")),
            ({"max_words": 0}, ("`max_words`", "0", "a positive whole number")),
            ({"max_words": 2.5}, ("`max_words`", "2.5")),
            ({"min_words": True}, ("`min_words`", "True")),
            ({"min_words": "3"}, ("`min_words`", "'3'")),
            ({"json": False}, ("`json`", "False", "allowed: true")),
            ({"ends_properly": 1}, ("`ends_properly`", "1", "allowed: true")),
            ({"equal": "blue"}, ("'equal'", "not known", "equals, contains, excludes")),
            ({"equals": "a", "json": True}, ("one key",)),
            ({}, ("one key",)),
            ("json", ("'json'", "one key")),
            ({"contains": "\ud800"}, ("invalid Unicode",)),
        ],
    )
    def test_a_malformed_check_is_refused_with_its_name_value_and_what_is_allowed(self, check, parts):
        refuses({"prompt": SKY, "checks": [check]}, *parts, evaluation=True)

    def test_checks_that_are_no_list_are_refused(self):
        refuses({"prompt": SKY, "checks": {"json": True}}, "`checks` is of type dict", "list", evaluation=True)

    def test_the_kinds_that_are_read_are_those_that_are_scored(self):
        with pytest.raises(RowError) as error:
            parse_eval({"prompt": SKY, "checks": [{"unknown": 1}]})
        assert re.search("allowed: (.*)$", str(error.value))[1].split(", ") == list(CHECKS)


@pytest.mark.parametrize(
    ("columns", "for_training", "for_evaluation"),
    [
        ({"prompt", "chosen", "rejected"}, True, True),
        ({"chosen", "rejected"}, True, True),
        ({"prompt", "checks"}, False, True),
        ({"messages", "checks"}, False, True),
        ({"checks"}, False, False),
        ({"prompt", "completion", "label"}, False, True),
        ({"prompt"}, False, True),
        ({"uid", "prompt", "category"}, False, True),
        ({"question_id", "turns"}, False, True),
        ({"text"}, False, False),
    ],
)
def test_a_form_is_known_by_its_columns(columns, for_training, for_evaluation):
    assert has_known_form(frozenset(columns), evaluation=False) == for_training
    assert has_known_form(frozenset(columns), evaluation=True) == for_evaluation


SKY_TOOL = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "default": None}}}


class TestWhatTheTemplateGets:
    """Columns and keys that change what the model sees, in TRL's format and as tables write them."""

    @pytest.mark.parametrize("tools", [[SKY_TOOL], json.dumps([SKY_TOOL])])
    def test_tools_as_a_list_or_as_json_text(self, tools):
        parsed = parse(conversational(tools=tools))
        assert [tool["function"]["name"] for tool in parsed.given.tools] == ["sky"]
        assert parsed.pair().given == parsed.eval_prompt().given == parsed.given

    def test_nulls_of_a_table_go_and_those_of_json_text_stay(self):
        of_table, of_text = (parse(conversational(tools=tools)).given for tools in ([SKY_TOOL], json.dumps([SKY_TOOL])))
        assert "default" not in of_table.tools[0]["function"]["parameters"]
        assert of_text.tools[0]["function"]["parameters"]["default"] is None

    @pytest.mark.parametrize("kwargs", [{"enable_thinking": False, "date_string": None}, '{"enable_thinking": false}'])
    def test_arguments_of_the_template(self, kwargs):
        assert parse(conversational(chat_template_kwargs=kwargs)).given.kwargs == {"enable_thinking": False}

    @pytest.mark.parametrize("empty", [None, "", [], {}])
    def test_empty_columns_give_nothing(self, empty):
        parsed = parse(conversational(tools=empty, chat_template_kwargs=empty, images=empty))
        assert not parsed.given
        assert parsed.prompt_id == parse(conversational()).prompt_id

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"images": ["a.png"]}, "`images` is given, and only text is read"),
            ({"prompt": [user(SKY) | {"images": ["a.png"]}]}, "`prompt` has a turn with `images`"),
            ({"history": [["a", "b"]]}, "`history` is not read beside `prompt`"),
            ({"image": {"bytes": "x"}}, "`image` is given"),
            ({"audio": "a.wav"}, "`audio` is given"),
            ({"videos": [["a.mp4"]]}, "`videos` is given"),
            ({"tools": {"name": "sky"}}, "`tools` is {'name': 'sky'}; allowed: a list of JSON schemas"),
            ({"tools": ["sky"]}, "allowed: a list of JSON schemas"),
            ({"tools": "sky"}, "`tools` is text and not JSON"),
            ({"chat_template_kwargs": ["x"]}, "allowed: a mapping of names to values"),
            ({"chat_template_kwargs": {"tokenize": True}}, "sets `tokenize`, which belongs to the rendering"),
            ({"chat_template_kwargs": {"add_generation_prompt": False}}, "sets `add_generation_prompt`"),
        ],
    )
    def test_what_no_template_can_take_is_refused_by_name(self, changes, message):
        refuses(conversational(**changes), message)
        refuses({"prompt": "x", "checks": [{"json": True}], **changes}, message, evaluation=True)

    @pytest.mark.parametrize(
        "content",
        [
            [{"type": "text", "text": SKY}],
            [{"type": "text", "text": SKY, "image_url": None}],
            [{"text": "What color is "}, {"type": "text", "text": "the sky?"}],
            [SKY],
            {"type": "text", "text": SKY},
            [{"type": "input_text", "text": SKY}],
        ],
    )
    def test_parts_that_hold_text_are_read_as_text(self, content):
        parsed = parse(conversational(prompt=[{"role": "user", "content": content}]))
        assert parsed.prompt == (user(SKY),)
        assert parsed.prompt_id == parse(conversational()).prompt_id

    @pytest.mark.parametrize(
        "part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "audio"}]
    )
    def test_parts_of_another_kind_are_refused_by_name(self, part):
        refuses(
            conversational(prompt=[{"role": "user", "content": [{"type": "text", "text": SKY}, part]}]),
            f"with a part of type {part['type']!r}; allowed: text",
        )

    def test_other_keys_of_turns_stay_with_the_turn(self):
        named = user(SKY) | {"name": "Ada", "weight": 0, "tool_calls": None, "notes": ""}
        parsed = parse(conversational(prompt=[named]))
        assert parsed.prompt == (user(SKY) | {"name": "Ada", "weight": 0},)
        assert parsed.prompt_id != parse(conversational()).prompt_id
        assert parsed.prompt_key == parse(conversational()).prompt_key

    def test_keys_that_say_nothing_do_not_make_another_prompt(self):
        weighted = parse(conversational(prompt=[user(SKY) | {"weight": 0}]))
        assert weighted.prompt_id == parse(conversational()).prompt_id

    def test_answers_that_differ_in_the_tool_they_call_are_two_answers(self):
        calls = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": n}}]} for n in "ab"]
        parsed = parse(conversational(chosen=[calls[0]], rejected=[calls[1]]))
        assert parsed.chosen[0]["tool_calls"] == [{"function": {"name": "a"}}]
        assert parsed.chosen[0]["content"] == ""
        refuses(conversational(chosen=[calls[0]], rejected=[calls[0]]), "identical")

    def test_a_table_that_gives_every_turn_the_keys_of_all(self):
        """What `datasets` writes where some turns are {role, content} and others {from, value}."""

        def filled(turn):
            return dict.fromkeys(("role", "content", "from", "value", "tool_calls")) | turn

        parsed = parse(
            {"conversations": [filled(human(SKY))], "chosen": filled(gpt("Blue.")), "rejected": filled(gpt("Red."))}
        )
        assert (parsed.prompt, parsed.chosen) == ((user(SKY),), (assistant("Blue."),))
        parsed = parse(conversational(prompt=[filled(user(SKY))]))
        assert parsed.prompt == (user(SKY),)


class TestAnswers:
    """Questions with answers, as GSM8K has them, become checks."""

    @pytest.mark.parametrize(
        ("row", "kind", "check"),
        [
            ({"question": "1 + 41?", "answer": "1 + 41 = <<1+41=42>>42\n#### 42"}, "number", {"number": 42.0}),
            ({"question": "How many?", "answer": "#### 1,250"}, "number", {"number": 1250.0}),
            ({"question": "How many?", "target": -3.5}, "number", {"number": -3.5}),
            ({"question": "How small?", "target": 0.00001}, "number", {"number": 1e-05}),
            ({"question": "Half of 3?", "answer": "3/2 is 1.5\n#### 1.5"}, "number", {"number": 1.5}),
            ({"question": "Capital?", "gold": "Paris"}, "contains", {"contains": "Paris"}),
            ({"prompt": "Entailed?", "label": 1}, "equals", {"equals": "1"}),
            ({"prompt": "Yes or no?", "answers": ["yes", "Yes"]}, "equals", {"equals": ["yes", "Yes"]}),
            ({"instruction": "Say it", "target": "it\n"}, "equals", {"equals": "it"}),
            ({"question": "Loss?", "answer": "-$1 250"}, "number", {"number": -1250.0}),
            ({"question": "Both", "answer": "6 * 7\n#### 42", "final_answer": 42}, "number", {"number": 42.0}),
            ({"question": "Both", "label": 1, "target": "1 "}, "equals", {"equals": "1"}),
            ({"question": "Both", "gold": "Paris", "answers": ["Paris"]}, "equals", {"equals": ["Paris"]}),
        ],
    )
    def test_an_answer_is_a_check(self, row, kind, check):
        parsed = parse_row(row, 1, frozenset(row), needs_pair=False, reads_checks=True, answer_check=kind)
        assert parsed.checks == (check,)

    def test_checks_of_the_row_itself_come_first(self):
        row = {"prompt": "x", "answer": "y", "checks": [{"json": True}]}
        parsed = parse_row(row, 1, frozenset(row), needs_pair=False, reads_checks=True, answer_check="contains")
        assert parsed.checks == ({"json": True},)

    @pytest.mark.parametrize(
        ("row", "kind", "message"),
        [
            ({"question": "x"}, "number", "has no answer for data.answer_check=number; allowed columns: answer"),
            (
                {"question": "x", "answer": "none"},
                "number",
                "allowed for data.answer_check=number: a text with a number",
            ),
            ({"question": "x", "answer": "3/4"}, "number", "a fraction or a time is no number"),
            ({"question": "x", "answer": r"\dfrac{1}{2}"}, "number", "a fraction or a time is no number"),
            ({"question": "x", "answer": "#### 12:30"}, "number", "a fraction or a time is no number"),
            ({"question": "x", "answer": "3,5"}, "number", "write 3.5 for 3,5"),
            ({"question": "x", "answer": "1.000,5"}, "number", "write 3.5 for 3,5"),
            ({"question": "x", "answer": "1.000.000"}, "number", "write 3.5 for 3,5"),
            ({"question": "x", "answer": {"a": 1}}, "contains", "a text or a number"),
            ({"question": "x", "answers": ["a"]}, "contains", "a text or a number"),
        ],
    )
    def test_an_answer_that_cannot_be_checked_is_refused(self, row, kind, message):
        with pytest.raises(RowError, match=re.escape(message)):
            parse_row(row, 1, frozenset(row), needs_pair=False, reads_checks=True, answer_check=kind)

    @pytest.mark.parametrize("kind", ["contains", "equals", "number"])
    @pytest.mark.parametrize(("first", "other"), [*itertools.combinations(ANSWER_COLUMNS, 2)])
    def test_two_columns_with_unlike_answers_are_refused_by_name(self, first, other, kind):
        row = {"question": "x", other: "43", first: "42"}
        said = f"`{first}` is '42' and `{other}` is '43': which is the right answer? keep one of these columns"
        with pytest.raises(RowError, match=re.escape(said)):
            parse_row(row, 1, frozenset(row), needs_pair=False, reads_checks=True, answer_check=kind)

    @pytest.mark.parametrize(
        ("row", "kind"),
        [
            ({"answer": "B", "label": 1}, "contains"),
            ({"answer": "yes", "answers": ["yes", "Yes"]}, "equals"),
            ({"answer": "no number here", "final_answer": "42"}, "number"),
            ({"answer": "42", "target": {"value": 42}}, "number"),
        ],
    )
    def test_answers_of_unlike_kinds_are_refused_too(self, row, kind):
        row = {"question": "x", **row}
        with pytest.raises(RowError, match=r"`\w+` is .* and `\w+` is .*: which is the right answer\?"):
            parse_row(row, 1, frozenset(row), needs_pair=False, reads_checks=True, answer_check=kind)
