"""Build the embedded study: tokenizer -> sloppy SFT base -> on-policy pairs, ranked by the verifier -> files.

The pairs are sampled from the base itself, as in the SimPO paper's Instruct settings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from harness.checks import failed_checks
from harness.config import GenerateConfig
from harness.embedded.tasks import LETTERS, WORDS, Task, demonstrate, make_task, make_tasks, rank
from harness.generate import generate_completions
from harness.records import EvalPrompt, Message, file_sha256, prompt_id, write_json, write_jsonl
from harness.tokens import ChatFormat

GOLDEN_PROMPTS, DEV_PROMPTS, TRAIN_PAIRS = 800, 160, 320
SAMPLES = 6  # answers sampled from the base for each prompt
MAX_NEW_TOKENS = 24
SFT_DEMONSTRATIONS, SFT_BATCH_SIZE, SFT_LEARNING_RATE = 64_000, 64, 2e-3

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build(out: Path, seed: int) -> dict[str, Any]:
    """Build everything from a seed and write it to `out`; return the card (what was made, how, and its score)."""
    import torch

    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tasks = draw_tasks(seed)
    model = train_base(tokenizer, seed, held_out={task.prompt for split in tasks.values() for task in split})
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    torch.manual_seed(seed)
    chat = ChatFormat(tokenizer)
    pairs = {split: sample_pairs(model, chat, tasks[split]) for split in ("train", "dev")}
    train_rows = [
        _pair_row(task, pairs["train"][task.prompt]) for task in tasks["train"] if task.prompt in pairs["train"]
    ]
    write_jsonl(out / "train.jsonl", train_rows[:TRAIN_PAIRS])
    write_jsonl(
        out / "dev.jsonl", [_check_row(task) | _answers(pairs["dev"].get(task.prompt)) for task in tasks["dev"]]
    )
    write_jsonl(out / "golden.jsonl", [_check_row(task) for task in tasks["golden"]])
    return _card(out, model, chat, tasks["golden"], seed=seed, start=start)


def build_tokenizer() -> Any:
    """Return a tokenizer of characters, in which each word of the filler is one token: padded answers stay short."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    words = sorted(WORDS, key=len, reverse=True)
    pieces = [*special, *LETTERS, *"0123456789 +", *words, *(f" {word}" for word in words)]
    tokenizer = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="<|unk|>")
    )
    pattern = rf" ?\b(?:{'|'.join(words)})\b|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def draw_tasks(seed: int) -> dict[str, list[Task]]:
    """Draw the tasks of all splits; no prompt occurs twice. Train has spare ones: not every task yields a pair."""
    taken: set[str] = set()
    sizes = {"golden": GOLDEN_PROMPTS, "dev": DEV_PROMPTS, "train": 2 * TRAIN_PAIRS}
    return {
        split: make_tasks(np.random.default_rng([seed, i]), size, taken=taken)
        for i, (split, size) in enumerate(sizes.items())
    }


def demonstrations(seed: int, count: int, held_out: set[str]) -> list[dict[str, Any]]:
    """Return sloppy demonstrations in TRL's prompt-completion form, on no prompt of the study."""
    rng = np.random.default_rng([seed, 99])
    rows = []
    while len(rows) < count:
        task = make_task(rng)
        if task.prompt not in held_out:
            completion = [{"role": "assistant", "content": demonstrate(task, rng)}]
            rows.append({"prompt": [_user(task)], "completion": completion})
    return rows


def train_base(tokenizer: Any, seed: int, *, held_out: set[str], count: int = SFT_DEMONSTRATIONS) -> Any:
    """Train the tiny Llama on the demonstrations with TRL's SFTTrainer; return it in eval mode."""
    import tempfile

    from datasets import Dataset, disable_progress_bars
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=SFT_BATCH_SIZE,
            num_train_epochs=1,
            learning_rate=SFT_LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=100,
            max_length=64,
            seed=seed,
        )
        rows = Dataset.from_list(demonstrations(seed, count, held_out))
        SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval()


def sample_pairs(model: Any, chat: ChatFormat, tasks: Sequence[Task]) -> dict[str, tuple[str, str]]:
    """Sample answers from the base and return, by prompt, the best and the worst where the verifier tells them apart."""
    answers: dict[str, list[str]] = {task.prompt: [] for task in tasks}
    for i in range(SAMPLES):
        decoding = GenerateConfig(max_new_tokens=MAX_NEW_TOKENS, batch_size=256, temperature=1.0, seed=i)
        for task, completion in zip(tasks, _generate(model, chat, tasks, decoding), strict=True):
            if completion.ended and completion.completion.strip():
                answers[task.prompt].append(completion.completion.strip())
    pairs = {}
    for task in tasks:
        ranked = sorted(answers[task.prompt], key=lambda answer: rank(task, answer))
        if ranked and rank(task, ranked[-1]) > rank(task, ranked[0]) and rank(task, ranked[-1])[0]:
            pairs[task.prompt] = (ranked[-1], ranked[0])
    return pairs


def _generate(model: Any, chat: ChatFormat, tasks: Sequence[Task], decoding: GenerateConfig) -> list[Any]:
    prompts = [
        EvalPrompt(prompt_id([_user(task)]), (_user(task),), (), None, conversational=False, row=i)
        for i, task in enumerate(tasks)
    ]
    return generate_completions(model, chat, prompts, split="sample", decoding=decoding)


def _user(task: Task) -> Message:
    return {"role": "user", "content": task.prompt}


def _pair_row(task: Task, answers: tuple[str, str]) -> dict[str, Any]:
    return {"id": prompt_id([_user(task)]), "prompt": task.prompt} | _answers(answers)


def _check_row(task: Task) -> dict[str, Any]:
    return {"id": prompt_id([_user(task)]), "prompt": task.prompt, "checks": task.checks}


def _answers(answers: tuple[str, str] | None) -> dict[str, Any]:
    return {"chosen": answers[0], "rejected": answers[1]} if answers else {}


def _card(
    out: Path, model: Any, chat: ChatFormat, golden: Sequence[Task], *, seed: int, start: float
) -> dict[str, Any]:
    """Score the base on golden and write card.json."""
    from harness.provenance import provenance

    greedy = GenerateConfig(max_new_tokens=MAX_NEW_TOKENS, batch_size=256)
    answers = list(zip(golden, _generate(model, chat, golden, greedy), strict=True))
    card = {
        "built_by": "python -m harness.embedded",
        "seed": seed,
        "base_golden_score": fmean(not failed_checks(a.completion, t.checks, ended=a.ended) for t, a in answers),
        "base_golden_right": fmean(rank(task, a.completion)[0] for task, a in answers),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": provenance()["versions"],
        "sha256": {path.name: file_sha256(path) for path in _shipped(out)},
    }
    write_json(out / "card.json", card)
    return card


def _shipped(out: Path) -> Iterator[Path]:
    return (path for path in sorted(out.iterdir()) if path.is_file() and path.name != "card.json")
