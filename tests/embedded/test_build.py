"""The embedded study as shipped: its files, its tasks, its tokenizer; and that a seed builds the same again.

The answers are computed here a second time, from the text of the prompts alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from harness.config.paths import embedded_dir as study_dir
from harness.data.checks import failed_checks
from harness.embedded.build import (
    answer_tasks,
    build,
    demonstrations,
    draw_tasks,
    sample_pairs,
    score_base,
    select_train,
    train_base,
    write_study,
)
from harness.embedded.tasks import AFTER, BEFORE, KINDS, demonstrate, make_task, make_tasks, rank
from harness.score.trial_scores import completion_flags
from harness.study.collapse import degenerate_shares
from harness.study.files import file_sha256, read_json, read_jsonl

SPLITS = ("train", "dev", "golden")
ROWS = {split: list(read_jsonl(study_dir() / f"{split}.jsonl")) for split in SPLITS}
CARD = read_json(study_dir() / "card.json")
ALL_ROWS = [row for split in SPLITS for row in ROWS[split]]


def solve(prompt: str) -> str:
    """Answer a prompt by reading it, with code that shares nothing with the package's."""
    kind, _, question = prompt.partition(" ")
    if kind == "sort":
        letters = list(question)
        for end in range(len(letters), 1, -1):
            for i in range(end - 1):
                if ord(letters[i]) > ord(letters[i + 1]):
                    letters[i], letters[i + 1] = letters[i + 1], letters[i]
        return "".join(letters)
    if kind == "reverse":
        return "".join(question[-1 - i] for i in range(len(question)))
    if kind == "add":
        left, right = re.fullmatch(r"(\d+)\+(\d+)", question).groups()
        return str(len(range(int(left))) + len(range(int(right))))
    if kind == "largest":
        numbers = [int(word) for word in question.split()]
        return next(str(n) for n in numbers if all(n >= other for other in numbers))
    if kind == "count":
        letter, text = re.fullmatch(r"([a-z]) in ([a-z]+)", question).groups()
        return str(sum(character == letter for character in text))
    assert kind == "spell", prompt
    return re.sub(r"(?<=.)(?=.)", " ", question)


def passes(row: dict, answer: str) -> bool:
    return not failed_checks(answer, row["checks"], ended=True)


def folded(prompt: str) -> str:
    return "".join(prompt.split()).casefold()


def test_splits_have_their_sizes_and_columns() -> None:
    assert 200 <= len(ROWS["train"]) <= 400
    assert len(ROWS["dev"]) >= 150
    assert len(ROWS["golden"]) >= 600
    assert all(set(row) == {"id", "prompt", "chosen", "rejected"} for row in ROWS["train"])
    assert all(set(row) - {"chosen", "rejected"} == {"id", "prompt", "checks"} for row in ROWS["dev"])
    assert all(set(row) == {"id", "prompt", "checks"} for row in ROWS["golden"])
    assert sum("chosen" in row for row in ROWS["dev"]) >= len(ROWS["dev"]) / 2


def test_no_prompt_occurs_twice_in_any_split_or_across_splits() -> None:
    for key in (lambda row: row["prompt"], lambda row: folded(row["prompt"]), lambda row: row["id"]):
        assert [value for value, count in Counter(map(key, ALL_ROWS)).items() if count > 1] == []


def test_every_split_has_every_kind() -> None:
    for split, rows in ROWS.items():
        counts = Counter(row["prompt"].split()[0] for row in rows)
        assert set(counts) == set(KINDS)
        # A kind that the base rarely gets right yields few pairs to train on; the other splits are drawn evenly.
        share = {"train": 0.03, "dev": 0.1, "golden": 0.13}[split]
        assert min(counts.values()) >= share * len(rows), (split, counts)


@pytest.mark.parametrize("split", ["dev", "golden"])
def test_the_right_answer_passes_and_wrong_or_padded_ones_fail(split: str) -> None:
    for row in ROWS[split]:
        answer = solve(row["prompt"])
        assert passes(row, answer), row
        for padded in (BEFORE[0] + answer, answer + AFTER[0], f"{answer} {answer}", f"it is {answer}"):
            assert not passes(row, padded), (row, padded)
        for wrong in ("", f"{answer}0", f"x{answer}", answer[:-1], answer[::-1] + "?", answer.replace(" ", "") + "z"):
            assert not passes(row, wrong), (row, wrong)


def test_chosen_answers_are_right_and_concise_and_rejected_ones_are_not() -> None:
    pairs = [row for split in ("train", "dev") for row in ROWS[split] if "chosen" in row]
    right_but_padded = 0
    for row in pairs:
        answer = solve(row["prompt"])
        assert row["chosen"] == answer, row
        assert row["rejected"] != answer, row
        right_but_padded += f" {answer} " in f" {row['rejected']} "
    assert 0.2 < right_but_padded / len(pairs) < 0.8, "both faults, wrong and padded, must be there to learn from"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tasks_agree_with_a_second_solver_and_slips_are_wrong(kind: str) -> None:
    rng = np.random.default_rng(1)
    tasks = [task for task in (make_task(rng) for _ in range(1500)) if task.kind == kind]
    assert len(tasks) > 100
    for task in tasks:
        assert task.answer == solve(task.prompt)
        assert rank(task, task.answer) > rank(task, BEFORE[0] + task.answer) > rank(task, task.slip)
        assert failed_checks(task.slip, task.checks, ended=True)


def test_drawn_tasks_never_repeat_and_avoid_those_taken() -> None:
    taken: set[str] = set()
    first = make_tasks(np.random.default_rng(0), 700, taken=taken)
    second = make_tasks(np.random.default_rng(0), 700, taken=taken)
    assert len({task.prompt for task in first + second}) == 1400 == len(taken)


def test_demonstrations_are_sloppy_but_mostly_right() -> None:
    rng = np.random.default_rng(2)
    tasks = [make_task(rng) for _ in range(2000)]
    answers = [demonstrate(task, rng) for task in tasks]
    right = np.mean([rank(task, answer)[0] for task, answer in zip(tasks, answers, strict=True)])
    perfect = np.mean([answer == task.answer for task, answer in zip(tasks, answers, strict=True)])
    assert 0.65 < right < 0.9
    assert 0.2 < perfect < 0.5


def test_tokenizer_round_trips_every_text_and_ends_the_turn_once(chat) -> None:
    tokenizer = chat.tokenizer
    assert tokenizer.is_fast
    assert len({tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id}) == 3
    assert chat.stop_ids == {tokenizer.eos_token_id}
    texts = [row[column] for row in ALL_ROWS for column in ("prompt", "chosen", "rejected") if column in row]
    for text in [*texts, *(solve(row["prompt"]) for row in ALL_ROWS), 'Any ASCII: {text}?\n"it\'s" ~well~ welladay']:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text
    row = ROWS["train"][0]
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert whole.count(tokenizer.eos_token_id) == 1
    assert whole[-1] == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt


@pytest.fixture(scope="module")
def base():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(study_dir(), use_safetensors=True, local_files_only=True)


@pytest.fixture(scope="module")
def chat():
    from harness.data.tokens import load_chat_format

    return load_chat_format(study_dir(), revision=None, template=None, auto=True)


def test_the_base_is_small_and_safe(base) -> None:
    assert (study_dir() / "model.safetensors").stat().st_size <= 4_000_000
    assert {path.suffix for path in study_dir().iterdir()} == {".json", ".jsonl", ".jinja", ".safetensors"}
    assert base.num_parameters() == CARD["parameters"] < 1_000_000
    assert base.config.model_type == "llama"


def test_the_base_scores_as_the_card_says_and_leaves_room_both_ways(base, chat) -> None:
    tasks = draw_tasks(CARD["seed"])
    scores = score_base(base, chat, tasks)
    assert scores == pytest.approx(CARD["base"], abs=0.01)
    assert 0.3 <= scores["golden_score"] <= 0.65
    assert scores["golden_right"] - scores["golden_score"] > 0.05, "no padding left to unlearn"


def test_the_base_is_not_degenerate(base, chat) -> None:
    answers = answer_tasks(base, chat, draw_tasks(CARD["seed"])["dev"])
    rows = [{"completion": a.completion, "flags": completion_flags(a.completion, ended=a.ended)} for a in answers]
    shares = degenerate_shares(rows)
    assert shares["degenerate"] + shares["cut_off"] < 0.05
    assert shares["same_answer"] < 0.2


def test_the_card_lists_every_file_with_its_hash() -> None:
    files = {path.name for path in study_dir().iterdir()} - {"card.json"}
    assert files == set(CARD["sha256"]) == set(CARD["bytes"])
    for name in files:
        assert file_sha256(study_dir() / name) == CARD["sha256"][name], f"{name} is not what the card was written for"
    assert {split: len(ROWS[split]) for split in SPLITS} == CARD["rows"]


def test_prompts_and_demonstrations_come_from_the_seed_alone() -> None:
    np.random.seed(5)
    tasks = draw_tasks(CARD["seed"])
    np.random.seed(6)
    assert tasks == draw_tasks(CARD["seed"]) != draw_tasks(CARD["seed"] + 1)
    assert [task.prompt for task in tasks["golden"]] == [row["prompt"] for row in ROWS["golden"]]
    assert [task.checks for task in tasks["golden"]] == [row["checks"] for row in ROWS["golden"]]
    assert [task.prompt for task in tasks["dev"]] == [row["prompt"] for row in ROWS["dev"]]
    assert demonstrations(0, 50, held_out=set()) == demonstrations(0, 50, held_out=set())


def test_demonstrations_avoid_every_prompt_of_the_study() -> None:
    held_out = {row["prompt"] for row in ALL_ROWS}
    drawn = {task.prompt for task, _ in demonstrations(CARD["seed"], 5000, held_out=set())}
    assert drawn & held_out, "the test would pass without the rule"
    assert not {task.prompt for task, _ in demonstrations(CARD["seed"], 5000, held_out=held_out)} & held_out


def test_the_same_seed_writes_the_same_bytes(base, chat, tmp_path: Path) -> None:
    tasks = {split: rows[:30] for split, rows in draw_tasks(3).items()}
    written = []
    for name in ("first", "second"):
        pairs = sample_pairs(base, chat, [*tasks["train"], *tasks["dev"]], seed=3)
        write_study(tmp_path / name, base, chat, tasks=tasks, pairs=pairs)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert any("chosen" in json.loads(line) for line in written[0]["dev.jsonl"].splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"], "temporary files were left behind"


def test_sampled_pairs_are_on_policy_and_ranked(base, chat) -> None:
    tasks = draw_tasks(4)["dev"][:40]
    pairs = sample_pairs(base, chat, tasks, seed=4)
    assert len(pairs) >= 10
    for task in tasks:
        if task.prompt in pairs:
            chosen, rejected = pairs[task.prompt]
            assert chosen == solve(task.prompt)
            assert failed_checks(rejected, task.checks, ended=True)


def test_too_few_pairs_are_an_error_that_says_so() -> None:
    tasks = draw_tasks(0)["train"]
    with pytest.raises(RuntimeError, match=r"yields 1 training pairs out of \d+ prompts, \d+ are needed"):
        select_train(tasks, {tasks[0].prompt: ("a", "b")})


@pytest.mark.slow
def test_sft_is_deterministic(chat) -> None:
    import torch

    rows = demonstrations(0, 256, held_out=set())
    first, second, other = (train_base(chat, rows, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(weights, second[name]) for name, weights in first.items())
    assert not all(torch.equal(weights, other[name]) for name, weights in first.items())


@pytest.mark.slow
def test_a_few_steps_of_sft_teach_the_form(chat) -> None:
    rows = demonstrations(0, 2560, held_out=set())
    answers = answer_tasks(train_base(chat, rows, seed=1), chat, [task for task, _ in rows[:64]])
    assert np.mean([answer.ended for answer in answers]) > 0.9


@pytest.mark.slow
def test_a_base_that_learned_nothing_is_not_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("harness.embedded.build.SAMPLES", 1)
    with pytest.raises(RuntimeError, match="training pairs"):
        build(tmp_path / "study", 0, sft_demonstrations=128)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_found_without_heavy_imports() -> None:
    code = (
        "import sys; from harness.config.paths import embedded_dir as study_dir; assert (study_dir() / 'card.json').is_file(); "
        "print([m for m in ('torch', 'transformers', 'trl', 'numpy', 'pandas') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_shows_an_example() -> None:
    command = [sys.executable, "-m", "harness.embedded", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Example: python -m harness.embedded --out" in shown
