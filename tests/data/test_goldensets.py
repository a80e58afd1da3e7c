"""Golden sets as people have them: recognised by their columns, answered in turns, exported to the official tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.config.paths import embedded_dir as study_dir
from harness.config.schema import DataConfig
from harness.data.inputs import prompt_rows
from harness.data.splits import load_splits
from harness.generate.answers import generate_completions, turns_of
from harness.score.exchange import alpaca_eval_rows, arena_hard_rows, markdown_counts, read_outputs
from harness.study.errors import UsageError
from harness.study.files import write_jsonl
from harness.sweep.problems import load_run
from tests.conftest import borrowed_base, tokens_of

ALPACA = [
    {"instruction": f"Do task {i}.", "dataset": "helpful_base", "output": "x", "generator": "g"} for i in range(3)
]
ARENA_1 = [
    {
        "question_id": f"q{i}",
        "category": "arena-hard-v0.1",
        "cluster": f"topic {i // 2}",
        "turns": [{"content": f"Ask {i}"}],
    }
    for i in range(4)
]
ARENA_2 = [
    {"uid": f"u{i}", "category": "hard_prompt", "subcategory": "coding", "prompt": f"Code {i}"} for i in range(3)
]
MT_BENCH = [{"question_id": 80 + i, "category": "writing", "turns": [f"Write {i}", f"Shorten {i}"]} for i in range(3)]
IFEVAL = [
    {
        "key": i,
        "prompt": f"Write {i}. No commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"n": None}],
    }
    for i in range(3)
]


def golden_of(rows: list[dict], folder: Path, **keys):
    """Load rows as a golden set beside the embedded study's pairs."""
    write_jsonl(folder / "golden.jsonl", rows)
    train, dev = (str(study_dir() / f"{split}.jsonl") for split in ("train", "dev"))
    return load_splits(DataConfig(train=train, dev=dev, golden=str(folder / "golden.jsonl"), **keys))


@pytest.mark.parametrize(
    ("rows", "form", "count"),
    [
        (ALPACA, "alpaca_eval prompts", 3),
        (ARENA_1, "arena_hard prompts", 4),
        (ARENA_2, "arena_hard prompts", 3),
        (MT_BENCH, "mt_bench prompts", 6),
        (IFEVAL, "ifeval prompts", 3),
        ([{"prompt": "Say a."}, {"prompt": "Say b."}], "prompts alone", 2),
        ([{"prompt": "Say a.", "checks": [{"json": True}]}], "prompts with checks", 1),
        ([{"instruction": "Say a.", "dataset": "d", "chosen": "a", "rejected": "b"}], "TRL standard", 1),
    ],
)
def test_a_set_is_recognised_by_its_columns(rows, form, count, tmp_path) -> None:
    splits = golden_of(rows, tmp_path)
    assert splits.facts["golden"]["form"].startswith(form)
    assert len(splits.golden_prompts) == count


def test_what_the_official_tools_call_a_prompt_is_kept(tmp_path) -> None:
    assert [p.about["dataset"] for p in golden_of(ALPACA, tmp_path).golden_prompts] == ["helpful_base"] * 3
    first = golden_of(ARENA_1, tmp_path).golden_prompts
    assert [p.about["id"] for p in first] == ["q0", "q1", "q2", "q3"]
    assert [p.cluster for p in first] == ["topic 0", "topic 0", "topic 1", "topic 1"]
    second = golden_of(ARENA_2, tmp_path).golden_prompts
    assert [second[0].about[key] for key in ("id", "version", "subcategory")] == ["u0", "v2.0", "coding"]
    instructions = golden_of(IFEVAL, tmp_path).golden_prompts[0].about["instructions"]
    assert instructions == {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def test_second_turns_follow_the_answer_to_the_first_and_share_its_cluster(tmp_path) -> None:
    prompts = golden_of(MT_BENCH, tmp_path).golden_prompts
    first, second = prompts[0], prompts[1]
    assert second.follows == first.prompt_id
    assert first.cluster == second.cluster == "question 80"
    said = second.conversation("My answer.")
    assert [(turn["role"], turn["content"]) for turn in said] == [
        ("user", "Write 0"),
        ("assistant", "My answer."),
        ("user", "Shorten 0"),
    ]
    assert [len(turn) for turn in turns_of(prompts)] == [3, 3]
    assert len(golden_of(MT_BENCH, tmp_path, turns="first").golden_prompts) == 3


def test_a_subset_keeps_no_second_turn_without_its_first(tmp_path) -> None:
    for limit in range(1, 6):
        prompts = golden_of(MT_BENCH, tmp_path, max_golden_prompts=limit).golden_prompts
        ids = {p.prompt_id for p in prompts}
        assert all(p.follows in (None, *ids) for p in prompts)


def test_second_turns_are_answered_from_the_policys_own_first_answer(tmp_path) -> None:
    rows = [
        {"question_id": i, "turns": [f"Sort the letters {w}", f"Reverse {w}"]} for i, w in enumerate(("dcba", "hgfe"))
    ]
    prompts = golden_of(rows, tmp_path).golden_prompts
    config = load_run(["+method=dpo", "generate.max_new_tokens=12"])
    chat = tokens_of(config).chat
    with borrowed_base(config) as base:
        found = generate_completions(base, chat, prompts, split="golden", decoding=config.generate)
        answers = {one.prompt_id: one.completion for one in found}
        for prompt in prompts:
            if prompt.follows:
                whole = [{"prompt": list(prompt.conversation(answers[prompt.follows])), "checks": [{"json": True}]}]
                alone = golden_of(whole, tmp_path).golden_prompts
                again = generate_completions(base, chat, alone, split="golden", decoding=config.generate)
                assert again[0].completion == answers[prompt.prompt_id]
    assert [one.prompt_id for one in found] == [prompt.prompt_id for prompt in prompts]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": " ", "dataset": "d"}, "`instruction` is ' '; allowed: a text"),
        ({"question_id": "q", "turns": []}, "`turns` is []"),
        ({"question_id": "", "turns": ["a"]}, "`question_id` is missing"),
        ({"question_id": "q", "turns": [{"content": ""}]}, "holds a turn that is empty"),
        ({"prompt": "p", "instruction_id_list": [], "kwargs": []}, "`instruction_id_list` is []"),
        ({"prompt": "p", "instruction_id_list": ["a"], "kwargs": []}, "one mapping for each"),
    ],
)
def test_a_broken_row_is_named(row, said, tmp_path) -> None:
    with pytest.raises(UsageError) as caught:
        golden_of([row], tmp_path)
    assert said in str(caught.value)


class TestOfficialFiles:
    def rows(self, given: list[dict], tmp_path: Path) -> list[dict]:
        return [row for row in prompt_rows(golden_of(given, tmp_path)) if row["split"] == "golden"]

    def test_alpaca_eval_there_and_back(self, tmp_path) -> None:
        prompts = self.rows(ALPACA, tmp_path)
        answers = {row["prompt_id"]: f"answer {i}" for i, row in enumerate(prompts)}
        written = alpaca_eval_rows(prompts, answers, "simpo-s1")
        assert written[1] == {
            "dataset": "helpful_base",
            "instruction": "Do task 1.",
            "output": "answer 1",
            "generator": "simpo-s1",
        }
        (tmp_path / "model_outputs.json").write_text(json.dumps(written))
        assert read_outputs(str(tmp_path / "model_outputs.json"), prompts, key="x") == answers

    @pytest.mark.parametrize(
        ("given", "name", "model"), [(ARENA_1, "question_id", "model_id"), (ARENA_2, "uid", "model")]
    )
    def test_arena_hard_there_and_back(self, given, name, model, tmp_path) -> None:
        prompts = self.rows(given, tmp_path)
        answers = {row["prompt_id"]: f"answer {i}" for i, row in enumerate(prompts)}
        written = arena_hard_rows(prompts, answers, "dpo-s1", dict.fromkeys(answers, 7))
        assert [row[name] for row in written] == [row[name] for row in given]
        assert {row[model] for row in written} == {"dpo-s1"}
        write_jsonl(tmp_path / "dpo-s1.jsonl", written)
        assert read_outputs(str(tmp_path / "dpo-s1.jsonl"), prompts, key="x") == answers

    def test_style_is_counted_outside_of_code(self) -> None:
        text = "# A\n\n- one\n- two\n1. three\n\n**bold** and __more__\n```\n# no\n- no\n```\n### C"
        found = markdown_counts(text)
        assert found["header_count"] == {"h1": 1, "h2": 0, "h3": 1, "h4": 0, "h5": 0, "h6": 0}
        assert found["list_count"] == {"ordered": 1, "unordered": 2}
        assert found["bold_count"] == {"**": 1, "__": 1}

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"a": 1}, "is of no known form"),
            ({"instruction": "Do task 0.", "output": 3}, "the answer is of type int"),
            ({"instruction": "Something else.", "output": "x"}, "answers none of the study's prompts"),
        ],
    )
    def test_outputs_that_cannot_be_used_are_named(self, row, said, tmp_path) -> None:
        write_jsonl(tmp_path / "given.jsonl", [row])
        with pytest.raises(UsageError) as caught:
            read_outputs(str(tmp_path / "given.jsonl"), self.rows(ALPACA, tmp_path), key="score.baseline")
        assert said in str(caught.value)

    def test_two_answers_to_one_prompt_are_refused(self, tmp_path) -> None:
        rows = [{"instruction": "Do task 0.", "output": text} for text in ("a", "b")]
        write_jsonl(tmp_path / "given.jsonl", rows)
        with pytest.raises(UsageError, match="a second answer to the prompt"):
            read_outputs(str(tmp_path / "given.jsonl"), self.rows(ALPACA, tmp_path), key="score.baseline")
