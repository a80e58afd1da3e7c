"""Chat templates: the same text on another day, no chance, no crash; and the study's own date in every process."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.data.inputs import Inputs
from harness.data.records import NOTHING
from harness.data.template import ChatTemplate, at_date
from harness.data.tokens import ChatFormat
from harness.study.errors import UsageError
from harness.study.manifest import Finding
from harness.study.registration import read_study
from harness.sweep.app import run_sweep
from harness.sweep.problems import load_run
from tests.data.test_tokens import NAMED, load

TURNS = NAMED.replace("CONTENT", "m['content']")
ASK: list[Any] = [{"role": "user", "content": "sort cab"}]
DAY, LATER = datetime(2024, 7, 26, 9, 5, 3), datetime(2025, 12, 31, 23, 59, 59)


def text(template: str, date: datetime, **given: Any) -> str:
    tokenizer = load("phi-3", template=template).tokenizer
    return ChatTemplate(tokenizer, date).render(ASK, NOTHING, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}", "2024-07-26 09:05:03"),
        ("{{ strftime_now('%A, %B %-d at %-H h, 100%%') }}", "Friday, July 26 at 9 h, 100%"),
        ("{% set at = '%Y' %}{{ (strftime_now(at) | int) + 1 }}", "2025"),
        ("{% macro day() %}{{ strftime_now(format='%j') }}{% endmacro %}{{ day() }}", "208"),
        (
            "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}{{ date_string }}",
            "26 Jul",
        ),
        ("{% for x in [1, 2] %}{{ strftime_now('%M') }} {% endfor %}{{ '' }}", "05 05 "),
    ],
)
def test_a_template_writes_the_date_that_it_is_given(written: str, expected: str) -> None:
    assert text(written + "\n" + TURNS, DAY) == expected + "\n" + text(TURNS, DAY)
    assert text(written + "\n" + TURNS, LATER) != text(written + "\n" + TURNS, DAY)


@pytest.mark.parametrize("start", ["", "\n", "\n\n  ", "  {% if true %}\nx{% endif %}", "{#- a note -#}\n"])
def test_the_given_date_changes_nothing_else(start: str) -> None:
    dated = start + "{% if false %}{{ strftime_now('%d') }}{% endif %}" + TURNS
    tokenizer = load("phi-3", template=dated).tokenizer
    theirs = tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    assert text(dated, DAY) == theirs


def test_a_template_without_a_date_stays_as_it_is() -> None:
    assert at_date(TURNS + "{# strftime_now #}", DAY) == TURNS + "{# strftime_now #}"


def findings(template: str) -> list[Finding]:
    return list(ChatFormat(load("phi-3", template=template).tokenizer).findings([(ASK, NOTHING)]))


def test_whether_prompts_depend_on_the_date_is_found_by_writing_them_on_two_days() -> None:
    for template, result in ((TURNS, "proved"), ("{{ strftime_now('%p') }}" + TURNS, "warned")):
        (found,) = [finding for finding in findings(template) if finding.name == "date"]
        assert found.result == result


@pytest.mark.parametrize(
    "template",
    [
        "{{ ['be short', 'be brief'] | random }}" + TURNS,
        "{{ range(9) | list | random }}" + TURNS,
        "{{ lipsum(n=1) }}" + TURNS,
        "{{ raise_exception }}" + TURNS,
        "{{ messages[0].keys }}" + TURNS,
    ],
)
def test_a_template_with_chance_in_it_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match=r"does not write the same conversation twice.*model\.chat_template"):
        findings(template)


def test_an_address_in_a_users_text_is_no_chance() -> None:
    turns: list[Any] = [{"role": "user", "content": "<object at 0x7f00>"}]
    ChatTemplate(load("phi-3").tokenizer, DAY).refuse_chance(turns, NOTHING)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "TypeError"),
        ("{{ 1 / (messages | length - messages | length) }}", "ZeroDivisionError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ messages[0]['content'].index('nowhere') }}", "ValueError"),
        ("{{ 'x'.encode('nonsense') }}", "LookupError"),
        ("{{ messages[0]['date'].year }}", "refuses a conversation"),
        ("{% for m in messages %}{{ m.content }", "refuses a conversation"),
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "needs more than 2 s .* turns user, as where a loop does not end",
        ),
        ("{{ 'x' * 2000000 }}", "writes 2,000,000 characters for a conversation with the turns user"),
    ],
)
def test_a_template_that_fails_is_refused_whatever_it_raises(template: str, error: str) -> None:
    with pytest.raises(UsageError, match=rf"the chat template.*{error}.*model\.chat_template"):
        text(template, DAY)


@pytest.fixture
def dated(tmp_path: Path, small: list[str]) -> list[str]:
    """Overrides of a small study whose template begins with the minute."""
    path = tmp_path / "minute.jinja"
    turns = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    path.write_text(
        "{{ strftime_now('%M') }}"
        + turns.replace("<|end|>", "{{ '<|end|>' if m['role'] == 'assistant' }}")
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        encoding="utf-8",
    )
    return [*small, "study=dated", f"model.chat_template={path}"]


def test_all_processes_and_later_commands_take_the_date_of_the_registration(
    dated: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trial that is run again on another day, here another minute, sees the prompts of the first day."""
    run_sweep(["+method=simpo,dpo", "seed=1", *dated])
    folder = tmp_path / "results" / "dated"
    study = read_study(folder / "study.yaml")
    assert any("writes the date" in warning for warning in study["warnings"])
    config = load_run(["+method=dpo", "seed=1", *dated])
    later = Inputs()
    later.date = "2031-01-01T00:59:00+00:00"
    ids = later.tokens(config).train.rows[0].prompt_ids
    minute = datetime.fromisoformat(study["created"]).strftime("%M")
    assert later.tokens(config).chat.tokenizer.decode(ids).startswith(minute)
    manifests = [yaml.safe_load(path.read_text()) for path in folder.glob("trials/*/manifest.json")]
    assert {manifest["data_sha256"] for manifest in manifests} == {later.tokens(config).train.sha256}


def test_a_new_study_takes_the_date_of_its_command(dated: list[str]) -> None:
    config = load_run(["+method=dpo", "seed=1", *dated])
    inputs = Inputs()
    for minute in ("07", "23"):
        inputs.date = f"2031-01-01T00:{minute}:00+00:00"
        tokens = inputs.tokens(config)
        assert tokens.chat.tokenizer.decode(tokens.train.rows[0].prompt_ids).startswith(minute)
