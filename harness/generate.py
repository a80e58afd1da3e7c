"""Answer the evaluation prompts with one policy: the same decoding for every arm and for the SFT base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from harness.config import GenerateConfig
from harness.records import Completion, EvalPrompt
from harness.tokens import ChatFormat


@torch.no_grad()
def generate_completions(
    model: Any, chat: ChatFormat, prompts: Sequence[EvalPrompt], *, split: str, decoding: GenerateConfig
) -> list[Completion]:
    """Answer all prompts in batches of similar length; the result is in the order of `prompts`.

    Only `decoding` counts: what a checkpoint's generation_config.json says of sampling or penalties is not used, so
    that arms and base are decoded alike.
    """
    model.eval()
    model.generation_config = _generation_config(chat, decoding)
    ids = [chat.prompt_ids(p.prompt, conversational=p.conversational) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]), reverse=True)  # the largest batch first
    completions: dict[int, Completion] = {}
    size = decoding.batch_size or len(prompts)
    with torch.random.fork_rng(), tqdm(total=len(prompts), desc=f"answer {split}", delay=5, leave=False) as bar:
        torch.manual_seed(decoding.seed)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            for i, answer in zip(batch, _answer(model, chat, [ids[i] for i in batch]), strict=True):
                completions[i] = _completion(chat, prompts[i], answer, split)
            bar.update(len(batch))
    return [completions[i] for i in range(len(prompts))]


def _generation_config(chat: ChatFormat, decoding: GenerateConfig) -> GenerationConfig:
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p} if decoding.temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.temperature > 0,
        eos_token_id=sorted(chat.stop_ids),
        pad_token_id=chat.tokenizer.pad_token_id,
        bos_token_id=chat.tokenizer.bos_token_id,
        **({"top_k": 0} | sampling if sampling else {}),
    )


def _answer(model: Any, chat: ChatFormat, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the generated ids of each prompt, the end of turn included, padding left out."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), chat.tokenizer.pad_token_id)
    attended = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        attended[i, width - len(prompt) :] = 1
    output = model.generate(input_ids=ids.to(model.device), attention_mask=attended.to(model.device))
    answers = []
    for row in output[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in chat.stop_ids), None)
        answers.append(row if end is None else row[: end + 1])
    return answers


def _completion(chat: ChatFormat, prompt: EvalPrompt, answer: list[int], split: str) -> Completion:
    ended = bool(answer) and answer[-1] in chat.stop_ids
    text = chat.tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True)
    shown = "\n".join(f"{m['role']}: {m['content']}" for m in prompt.prompt) if len(prompt.prompt) > 1 else ""
    return Completion(
        split=split,
        prompt_id=prompt.prompt_id,
        prompt=shown or prompt.prompt[0]["content"],
        completion=text,
        tokens=len(answer),
        ended=ended,
    )
