"""What a study's own rows give the chat template reaches every split, or is refused or listed by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import RunConfig
from harness.data.inputs import Inputs, Tokens
from harness.data.template import ChatTemplate
from harness.generate.answers import prompt_ids
from harness.generate.vllm import vllm_job
from harness.study.errors import UsageError
from harness.study.files import write_jsonl
from harness.study.manifest import load_manifest
from harness.study.registration import registered_date
from harness.sweep.app import run_sweep
from harness.sweep.problems import compose_run, load_run
from tests.conftest import overriding, run_one
from tests.data.test_tokens import FAMILIES, build_tokenizer

TURNS = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] != 'assistant' else '<|assistant|>' }}{{ m['content'] }}"
    "{{ '<|end|>' if m['role'] == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TAKES_TOOLS = "{% for t in tools or [] %}<|user|>can {{ t['function']['name'] }}{% endfor %}" + TURNS
TAKES_KWARGS = "{% if shout is defined and shout %}<|user|>shout{% endif %}" + TURNS
TAKES_NAMES = TURNS.replace("{{ m['content'] }}", "{% if m.name %}{{ m.name }}: {% endif %}{{ m['content'] }}")
TOOL = [{"type": "function", "function": {"name": "count"}}]


def rows(**more: Any) -> dict[str, list[dict[str, Any]]]:
    """Return rows of the three splits, each with the columns given."""
    both = {"chosen": [{"role": "assistant", "content": "abc"}], "rejected": [{"role": "assistant", "content": "b"}]}
    words = {"train": ["sort cab", "sort bca", "sort cba"], "dev": ["sort bac"], "golden": ["sort acb"]}
    made = {
        split: [{"prompt": [{"role": "user", "content": w}], **both, **more} for w in of] for split, of in words.items()
    }
    made["golden"] = [{**row, "checks": [{"contains": "a"}]} for row in made["golden"]]
    return made


def config_of(tmp_path: Path, template: str, given: dict[str, list[dict[str, Any]]], *more: str) -> RunConfig:
    return load_run(["+method=dpo", *overrides(tmp_path, template, given), *more])


def overrides(tmp_path: Path, template: str, given: dict[str, list[dict[str, Any]]]) -> list[str]:
    path = tmp_path / "own.jinja"
    path.write_text(template, encoding="utf-8")
    for split, of in given.items():
        write_jsonl(tmp_path / f"{split}.jsonl", of)
    data = [f"data.{split}={tmp_path / split}.jsonl" for split in given]
    return [*data, f"model.chat_template={path}", f"results_dir={tmp_path / 'results'}"]


def shown(tokens: Tokens, ids: Any) -> str:
    return tokens.chat.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "column", "value", "begin"),
    [
        (TAKES_TOOLS, "tools", TOOL, "<|user|>can count"),
        (TAKES_KWARGS, "chat_template_kwargs", {"shout": True}, "<|user|>shout"),
    ],
)
def test_what_rows_give_reaches_training_held_out_pairs_and_answers(
    tmp_path: Path, template: str, column: str, value: Any, begin: str
) -> None:
    inputs, config = Inputs(), config_of(tmp_path, template, rows(**{column: value}))
    tokens, golden = inputs.tokens(config), inputs.splits(config).golden_prompts[0]
    for split in (tokens.train, tokens.dev, tokens.golden):
        assert shown(tokens, split.rows[0].prompt_ids).startswith(begin)
    assert tuple(prompt_ids(tokens.chat, golden, {})) == tokens.golden.rows[0].prompt_ids


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [("tools", TOOL, "tools"), ("chat_template_kwargs", {"shout": True}, r"chat_template_kwargs\.shout")],
)
def test_what_the_template_does_not_take_is_refused_by_name(
    tmp_path: Path, column: str, value: Any, named: str, small: list[str]
) -> None:
    given = rows()
    given["train"][1][column] = value
    with pytest.raises(
        UsageError, match=rf"`{named}`: 1 rows of the data have it, and the chat template does not take it"
    ):
        Inputs().tokens(config_of(tmp_path, TURNS, given))


def test_a_template_that_only_mentions_tools_does_not_take_them(tmp_path: Path) -> None:
    mentions = "{% if tools is defined and not tools %}x{% endif %}" + TURNS
    with pytest.raises(UsageError, match="does not take it"):
        Inputs().tokens(config_of(tmp_path, mentions, rows(tools=TOOL)))


def test_keys_of_turns_are_written_or_listed_with_their_count(tmp_path: Path) -> None:
    given = rows(prompt=None)
    for of in given.values():
        for i, row in enumerate(of):
            row["prompt"] = [
                {"role": "user", "content": f"sort {row['chosen'][0]['content']}{'abc'[i]}", "name": "bob"}
            ]
    given["dev"][0]["prompt"][0]["content"] = "sort bb"
    given["golden"][0]["prompt"][0]["content"] = "sort cc"
    given["train"][0]["prompt"][0]["weight"] = 1
    written = Inputs().tokens(config_of(tmp_path, TAKES_NAMES, given))
    assert shown(written, written.train.rows[0].prompt_ids).startswith("<|user|>bob: sort")
    assert written.warnings == ["the chat template does not write these keys of turns: `weight` (1 turns)"]
    (unwritten,) = Inputs().tokens(config_of(tmp_path, TURNS, given)).warnings
    assert "`name` (" in unwritten
    assert "`weight` (" in unwritten


def test_an_end_of_turn_that_the_checkpoint_does_not_know_reaches_both_ways_to_generate(tmp_path: Path) -> None:
    """The template ends turns with another control token than the embedded base's EOS."""
    config = config_of(tmp_path, TURNS.replace("<|end|>", "<|system|>"), rows(), "generate.max_new_tokens=4")
    tokens = Inputs().tokens(config)
    end = tokens.chat.tokenizer.convert_tokens_to_ids("<|system|>")
    assert tokens.train.rows[0].chosen_ids[-1] == end
    assert any("ends a turn with <|system|>" in warning for warning in tokens.warnings)
    job = vllm_job(config, sorted(tokens.chat.stop_ids), [], folder=tmp_path)
    assert end in job["sampling"]["stop_token_ids"]


def test_a_plan_says_what_was_found_and_which_columns_nothing_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = rows(source="web")
    given["train"].append({**given["train"][0], "chosen": [{"role": "assistant", "content": "x" * 9}]})
    cuts = TURNS.replace("{{ m['content'] }}", "{{ m['content'][:8] }}")
    run_sweep(["+method=simpo,dpo", "seed=1", "plan=true", *overrides(tmp_path, cuts, given)])
    said = capsys.readouterr().out
    assert "data.train: columns that nothing reads, with their rows: source (4)" in said
    assert "warning: train: 1 of 4 pairs are dropped: the chat template cuts or rewrites the answer" in said


def test_the_share_of_answers_that_end_by_themselves_is_recorded_and_never_refuses(
    tmp_path: Path, small: list[str]
) -> None:
    config = compose_run(overriding(["+method=sft", *small], "generate.max_new_tokens=1", "study=s"))
    assert run_one(config, ("dev",)).status == "complete"
    manifest = load_manifest(tmp_path / "results" / "s" / "base")
    assert manifest["ended"] == {"dev": 0.0}
    assert any(
        "the SFT base ends 0% of its answers to dev by itself, at <|end|>" in text for text in manifest["warnings"]
    )


def test_an_empty_template_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.chat_template=.*: is empty"):
        Inputs().tokens(config_of(tmp_path, " \n", rows()))


def test_several_templates_without_a_default_are_refused() -> None:
    tokenizer = build_tokenizer(FAMILIES["phi-3"])
    tokenizer.chat_template = {"tool_use": TURNS, "rag": TURNS}
    template = ChatTemplate(tokenizer, registered_date(Path("nowhere")))
    with pytest.raises(UsageError, match=r"chat templates tool_use, rag and none of the name `default`"):
        template.mentions("tools")
