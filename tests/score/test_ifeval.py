"""IFEval's verifiable instructions, checked by lm-evaluation-harness's own code; nothing is downloaded."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pandas as pd
import pytest

from harness.config.paths import embedded_dir as study_dir
from harness.score.answers import TrialOutputs
from harness.score.lm_eval import follows_instructions, ifeval_problem, score_ifeval, unchecked
from harness.study.errors import UsageError
from harness.study.files import write_jsonl
from harness.sweep.app import run_sweep

NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
TWO_BULLETS = {
    "instruction_id_list": ["detectable_format:number_bullet_lists", "punctuation:no_comma"],
    "kwargs": [{"num_bullets": 2}, {}],
}
SENTENCES = {
    "instruction_id_list": ["length_constraints:number_sentences"],
    "kwargs": [{"relation": "at least", "num_sentences": 2}],
}


@pytest.mark.parametrize(
    ("instructions", "answer", "strict", "loose"),
    [
        (NO_COMMA, "No comma here.", 1, 1),
        (NO_COMMA, "Well, one here.", 0, 0),
        (NO_COMMA, "Sure, here it is:\nno comma at all", 0, 1),
        (NO_COMMA, "", 0, 0),
        (TWO_BULLETS, "* one\n* two", 1, 1),
        (TWO_BULLETS, "* one\n* two, and more", 0, 1),  # each instruction may choose what is left out
        (TWO_BULLETS, "* one", 0, 0),
    ],
)
def test_all_instructions_must_be_followed_and_loose_forgives_a_first_line(instructions, answer, strict, loose) -> None:
    assert follows_instructions(instructions, "Write.", answer, strict=True) == strict
    assert follows_instructions(instructions, "Write.", answer, strict=False) == loose


def test_no_answer_reaches_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    """As the library does where an answer is in no language."""
    german = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]}
    follows_instructions(german, "Write.", "\x1b[[[", strict=True)
    assert not caplog.text


def test_the_process_is_left_as_it_was(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    follows_instructions(NO_COMMA, "Write.", "x", strict=True)
    assert os.environ["LOCAL_RANK"] == "3"
    assert ifeval_problem() is None


def has_sentences() -> bool:
    return not unchecked([(SENTENCES, "Write.")])


@pytest.mark.skipif(has_sentences(), reason="NLTK's sentence data are installed here")
def test_an_instruction_that_needs_data_which_is_not_there_has_no_score_and_says_what_to_do() -> None:
    (reason,) = unchecked([(SENTENCES, "Write."), (NO_COMMA, "Write.")])
    assert reason == "an instruction needs NLTK's sentence data (python -m nltk.downloader punkt_tab)"


def test_an_unknown_instruction_is_named() -> None:
    (reason,) = unchecked([({"instruction_id_list": ["new:thing"], "kwargs": [{}]}, "Write.")])
    assert "'new:thing' is not known to the installed lm-evaluation-harness" in reason


HOSTILE = {
    "deep JSON": ({"instruction_id_list": ["detectable_format:json_format"], "kwargs": [{}]}, "[" * 50_000),
    "a number of a million digits": (
        {"instruction_id_list": ["detectable_format:json_format"], "kwargs": [{}]},
        "9" * 1_000_000,
    ),
    "one keyword": (
        {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["a" * 50]}]},
        "a" * 100_000,
    ),
    "many languages": (
        {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "kn"}]},
        "aक漢" * 33_333,
    ),
    "lone surrogates": (
        {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "kn"}]},
        "\ud800" * 100_000,
    ),
    "asterisks": (
        {"instruction_id_list": ["detectable_format:number_highlighted_sections"], "kwargs": [{"num_highlights": 2}]},
        "*" * 100_000,
    ),
    "brackets": (
        {"instruction_id_list": ["detectable_content:number_placeholders"], "kwargs": [{"num_placeholders": 2}]},
        "[" * 100_000,
    ),
    "angles": ({"instruction_id_list": ["detectable_format:title"], "kwargs": [{}]}, "<" * 100_000),
}


@pytest.mark.parametrize(("instructions", "answer"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_answer_gets_a_score_or_a_reason_in_time(instructions, answer) -> None:
    prompt = {"split": "golden", "prompt_id": "p", "prompt": [{"role": "user", "content": "Write."}]}
    completion = {"split": "golden", "prompt_id": "p", "completion": answer, "ended": True}
    outputs = TrialOutputs([prompt | {"about": {"instructions": instructions}}], [completion], [])
    score_ifeval(TrialOutputs(outputs.prompts, [completion | {"completion": "x"}], []))  # loads the library
    start = time.process_time()
    (score,) = score_ifeval(outputs)
    assert time.process_time() - start < 10  # a second, on a machine ten times slower
    assert (
        score.score in (0, 1)
        or "IFEval's checks" in score.unscored_reason
        or "cannot be checked" in score.unscored_reason
    )


def golden(folder: Path, rows: list[dict]) -> list[str]:
    write_jsonl(folder / "golden.jsonl", rows)
    data = [f"data.{split}={study_dir()}/{split}.jsonl" for split in ("train", "dev")]
    return [*data, f"data.golden={folder / 'golden.jsonl'}", "data.max_train_pairs=8", "data.max_dev_prompts=4"]


@pytest.mark.slow
def test_an_ifeval_golden_set_decides_a_sweep(small: list[str], tmp_path: Path) -> None:
    rows = [{"key": i, "prompt": f"Sort the letters {chr(97 + i)}cb", **NO_COMMA} for i in range(8)]
    small = [line for line in small if not line.startswith("data.")]
    (result,) = run_sweep(["+method=simpo,dpo", "seed=0", "study=s", *small, *golden(tmp_path, rows)])
    assert result.verdict is not None
    assert (result.verdict["metric"], result.verdict["n_prompts"]) == ("ifeval", 8)
    scores = pd.read_csv(tmp_path / "results" / "s" / "scores.csv")
    assert set(scores["scorer"]) >= {"ifeval", "ifeval_loose"}


@pytest.mark.skipif(has_sentences(), reason="NLTK's sentence data are installed here")
def test_a_golden_set_of_which_too_much_cannot_be_checked_is_refused_before_training(small, tmp_path) -> None:
    rows = [{"key": i, "prompt": f"Write {i}", **(SENTENCES if i % 2 else NO_COMMA)} for i in range(8)]
    small = [line for line in small if not line.startswith("data.")]
    with pytest.raises(
        UsageError, match=r"decide\.metric=ifeval: 4 of 8 prompts cannot be scored: an instruction needs"
    ):
        run_sweep(["+method=simpo,dpo", "seed=0", *small, *golden(tmp_path, rows)])
