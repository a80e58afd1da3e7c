"""Build the embedded study: tokenizer -> sloppy SFT base -> on-policy pairs, ranked by the verifier -> files.

The pairs are sampled from the base itself, as in the SimPO paper's Instruct settings.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from tqdm import tqdm

from harness.config.machine import provenance
from harness.config.schema import GenerateConfig
from harness.data.checks import failed_checks
from harness.data.records import Completion, EvalPrompt, Message, prompt_id
from harness.data.tokens import ChatFormat
from harness.embedded.tasks import WORDS, Task, demonstrate, make_task, make_tasks, rank
from harness.generate.answers import generate_completions
from harness.study.files import Json, file_sha256, write_json, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIZES = {"golden": 900, "dev": 160, "train": 320}
SPARE = 2  # train prompts are drawn twice over: not every one yields a pair
SAMPLES = 8  # answers sampled from the base for each prompt
MAX_NEW_TOKENS = 32
SFT_DEMONSTRATIONS, SFT_BATCH_SIZE, SFT_LEARNING_RATE = 76_800, 128, 2e-3

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Chosen on dev out of 5e-5, 1e-4, 2e-4 and 4e-4 for both arms. From 1e-3 on DPO collapses.
RECOMMENDED: dict[str, Json] = {
    "learning_rate": {"dpo": 1e-4, "simpo": 2e-4},
    "epochs": 2,
    "batch_size": 8,
}

Pairs = dict[str, tuple[str, str]]  # by prompt: chosen, rejected


class Card(TypedDict):
    """card.json: the command, sizes, the base's scores, recommended settings, and the hash of each file."""

    built_by: str
    seed: int
    sft_demonstrations: int
    rows: dict[str, int]
    base: dict[str, float]
    recommended: dict[str, Json]
    parameters: int
    seconds: float
    versions: dict[str, str]
    bytes: dict[str, int]
    sha256: dict[str, str]


def build(out: Path, seed: int, *, sft_demonstrations: int = SFT_DEMONSTRATIONS) -> Card:
    """Build everything from a seed and write it to `out`; return card.json.

    Raises:
        RuntimeError: where the base is too poor to sample enough pairs from; nothing is written then.
    """
    start = time.perf_counter()
    chat = ChatFormat(build_tokenizer())
    tasks = draw_tasks(seed)
    held_out = {task.prompt for split in tasks.values() for task in split}
    model = train_base(chat, demonstrations(seed, sft_demonstrations, held_out=held_out), seed=seed)
    pairs = sample_pairs(model, chat, [*tasks["train"], *tasks["dev"]], seed=seed)
    tasks["train"] = select_train(tasks["train"], pairs)
    base = score_base(model, chat, tasks)
    write_study(out, model, chat, tasks=tasks, pairs=pairs)
    shipped = [path for path in sorted(out.iterdir()) if path.is_file() and path.name != "card.json"]
    card: Card = {
        "built_by": f"python -m harness.embedded --seed {seed}",
        "seed": seed,
        "sft_demonstrations": sft_demonstrations,
        "rows": {split: len(split_tasks) for split, split_tasks in tasks.items()},
        "base": base,
        "recommended": RECOMMENDED,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": provenance()["versions"],
        "bytes": {path.name: path.stat().st_size for path in shipped},
        "sha256": {path.name: file_sha256(path) for path in shipped},
    }
    write_json(out / "card.json", card)
    return card


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of characters, in which each word of the filler is one token: padded answers stay short."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    characters = ["\n", *map(chr, range(32, 127))]
    words = [start + word for start in ("", " ") for word in WORDS]
    pieces = dict.fromkeys([*special, *characters, *words])
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<|unk|>"))
    pattern = rf" ?\b(?:{'|'.join(WORDS)})\b|[\s\S]"
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
    """Draw the tasks of all splits; no prompt occurs twice."""
    taken: set[str] = set()
    counts = SIZES | {"train": SPARE * SIZES["train"]}
    return {
        split: make_tasks(np.random.default_rng([seed, i]), count, taken=taken)
        for i, (split, count) in enumerate(counts.items())
    }


def demonstrations(seed: int, count: int, *, held_out: set[str]) -> list[tuple[Task, str]]:
    """Return tasks with sloppy answers, on no prompt of the study."""
    rng = np.random.default_rng([seed, 10])
    rows: list[tuple[Task, str]] = []
    while len(rows) < count:
        task = make_task(rng)
        if task.prompt not in held_out:
            rows.append((task, demonstrate(task, rng)))
    return rows


def encode_demonstrations(chat: ChatFormat, rows: Sequence[tuple[Task, str]]) -> list[dict[str, list[int]]]:
    """Return `input_ids` and `completion_mask` for SFTTrainer, in the order of `rows`, which is random."""
    examples = []
    for task, answer in tqdm(rows, desc="tokenise demonstrations", delay=5, leave=False):
        prompt = chat.prompt_ids([_user_turn(task)], conversational=True)
        reply = chat.answer_ids([_user_turn(task)], [{"role": "assistant", "content": answer}], conversational=True)
        examples.append({"input_ids": prompt + reply, "completion_mask": [0] * len(prompt) + [1] * len(reply)})
    return examples


def train_base(chat: ChatFormat, rows: Sequence[tuple[Task, str]], *, seed: int) -> PreTrainedModel:
    """Train the tiny Llama once over the demonstrations with TRL's SFTTrainer, on the answers only; seeds torch."""
    import torch
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(seed)
    examples = Dataset.from_list(encode_demonstrations(chat, rows))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=SFT_BATCH_SIZE,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            learning_rate=SFT_LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=100,
            seed=seed,
        )
        model = build_model(chat.tokenizer)
        SFTTrainer(model=model, args=arguments, train_dataset=examples, processing_class=chat.tokenizer).train()
    return model.eval()


def build_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return an untrained Llama of 0.87M parameters; initialised from torch's global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,  # about 1/sqrt(2 * hidden_size): with the default 0.02 it learns three times slower
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts are of some 30 tokens, not thousands
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def sample_pairs(model: PreTrainedModel, chat: ChatFormat, tasks: Sequence[Task], *, seed: int) -> Pairs:
    """Sample answers from the base and pair, for each prompt, a right and concise one with one that is not.

    A prompt whose samples are all good, or all bad, yields no pair.
    """
    answers: dict[str, list[str]] = {task.prompt: [] for task in tasks}
    for i in tqdm(range(SAMPLES), desc="sample answers", delay=5, leave=False):
        for task, completion in zip(tasks, answer_tasks(model, chat, tasks, seed=seed + i), strict=True):
            if completion.ended and completion.completion.strip():
                answers[task.prompt].append(completion.completion.strip())
    rng = np.random.default_rng([seed, 12])
    pairs = {}
    for task in tasks:
        best = max(answers[task.prompt], key=lambda answer: rank(task, answer), default="")
        worse = [a for a in answers[task.prompt] if failed_checks(a, task.checks, ended=True)]
        if worse and not failed_checks(best, task.checks, ended=True):
            pairs[task.prompt] = (best, str(rng.choice(worse)))
    return pairs


def select_train(tasks: Sequence[Task], pairs: Pairs) -> list[Task]:
    """Return the first tasks that have a pair, as many as the study needs."""
    selected = [task for task in tasks if task.prompt in pairs][: SIZES["train"]]
    if len(selected) < SIZES["train"]:
        raise RuntimeError(
            f"the base yields {len(selected)} training pairs out of {len(tasks)} prompts, {SIZES['train']} are needed: "
            "its samples are nearly all wrong; train it on more demonstrations, or with another seed"
        )
    return selected


def answer_tasks(
    model: PreTrainedModel, chat: ChatFormat, tasks: Sequence[Task], *, seed: int | None = None
) -> list[Completion]:
    """Answer tasks in order: greedily, or, with a seed, at temperature 1."""
    prompts = [
        EvalPrompt(prompt_id([_user_turn(task)]), (_user_turn(task),), (), None, conversational=True, row=i)
        for i, task in enumerate(tasks)
    ]
    temperature = 0.0 if seed is None else 1.0
    decoding = GenerateConfig(max_new_tokens=MAX_NEW_TOKENS, batch_size=256, temperature=temperature, seed=seed or 0)
    return generate_completions(model, chat, prompts, split="embedded", decoding=decoding)


def score_base(model: PreTrainedModel, chat: ChatFormat, tasks: dict[str, list[Task]]) -> dict[str, float]:
    """Return the share of greedy answers that pass all checks, and of those with the right answer in them."""
    scores = {}
    for split in ("dev", "golden"):
        answered = list(zip(tasks[split], answer_tasks(model, chat, tasks[split]), strict=True))
        scores[f"{split}_score"] = fmean(
            not failed_checks(answer.completion, task.checks, ended=answer.ended) for task, answer in answered
        )
        scores[f"{split}_right"] = fmean(rank(task, answer.completion)[0] for task, answer in answered)
    return {name: round(score, 4) for name, score in scores.items()}


def write_study(
    out: Path, model: PreTrainedModel, chat: ChatFormat, *, tasks: dict[str, list[Task]], pairs: Pairs
) -> None:
    """Write the model, the tokenizer and the three splits beside `out`, then move them in: no half-written study."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        temporary = Path(folder)
        model.save_pretrained(temporary, safe_serialization=True)
        chat.tokenizer.save_pretrained(temporary)
        for split, split_tasks in tasks.items():
            write_jsonl(temporary / f"{split}.jsonl", (_study_row(task, split, pairs) for task in split_tasks))
        for path in sorted(temporary.iterdir()):
            path.chmod(0o644)  # safetensors writes for the owner alone
            path.replace(out / path.name)


def _study_row(task: Task, split: str, pairs: Pairs) -> dict[str, Json]:
    row: dict[str, Json] = {"id": prompt_id([_user_turn(task)]), "prompt": task.prompt}
    if split != "train":
        row["checks"] = task.checks
    if task.prompt in pairs:
        row |= dict(zip(("chosen", "rejected"), pairs[task.prompt], strict=True))
    return row


def _user_turn(task: Task) -> Message:
    return {"role": "user", "content": task.prompt}
