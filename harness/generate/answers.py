"""Answers to the evaluation prompts: policy and prompts -> completions, decoded alike for every arm and the SFT base.

Prompts of similar length are answered in one batch, in rounds of `ROUND_TOKENS`. After each round the finished answers
leave the batch, so that one answer of full length does not keep the others' rows in the computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from harness.config.schema import GenerateConfig
from harness.data.reasoning import AnswerReader
from harness.data.records import Completion, EvalPrompt
from harness.data.tokens import ChatFormat

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ROUND_TOKENS = 8


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel | PeftModel,
    chat: ChatFormat,
    prompts: Sequence[EvalPrompt],
    *,
    split: str,
    decoding: GenerateConfig,
) -> list[Completion]:
    """Answer all prompts in batches of similar length; the result is in the order of `prompts`.

    Sampling and penalties in a checkpoint's generation_config.json are ignored: arms and base are decoded alike.
    """
    model.eval()
    model.generation_config = _generation_config(chat, decoding)
    completions: dict[str, Completion] = {}
    reader = AnswerReader(chat.tokenizer, decoding.reasoning)
    with torch.random.fork_rng(), tqdm(total=len(prompts), desc=f"answer {split}", delay=5, leave=False) as bar:
        torch.manual_seed(decoding.seed)
        for turn in turns_of(prompts):  # second turns need the answers to the first
            size = decoding.batch_size or len(turn)
            ids = {prompt.prompt_id: prompt_ids(chat, prompt, completions) for prompt in turn}
            order = sorted(turn, key=lambda prompt: len(ids[prompt.prompt_id]), reverse=True)  # the largest batch first
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                answers = _answer_batch(model, chat, [ids[prompt.prompt_id] for prompt in batch])
                for prompt, answer in zip(batch, answers, strict=True):
                    completions[prompt.prompt_id] = completion_of(
                        chat, prompt, answer, split, asked=ids[prompt.prompt_id], reader=reader
                    )
                bar.update(len(batch))
    return [completions[prompt.prompt_id] for prompt in prompts]


def turns_of(prompts: Sequence[EvalPrompt]) -> list[list[EvalPrompt]]:
    """Return the prompts without a predecessor, then those that follow one of them; no empty list."""
    turns = [[p for p in prompts if p.follows is None], [p for p in prompts if p.follows is not None]]
    return [turn for turn in turns if turn]


def prompt_ids(chat: ChatFormat, prompt: EvalPrompt, answered: Mapping[str, Completion]) -> list[int]:
    """Return a prompt's ids; `answered` must hold the answer to the prompt that it follows."""
    previous = answered[prompt.follows].completion if prompt.follows else ""
    return chat.prompt_ids(prompt.conversation(previous), conversational=prompt.conversational, given=prompt.given)


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


def _answer_batch(
    model: PreTrainedModel | PeftModel, chat: ChatFormat, prompts: Sequence[list[int]]
) -> list[list[int]]:
    """Return the generated ids per prompt, with the end of turn, without padding."""
    ids, attended = _left_padded(prompts, chat.tokenizer.pad_token_id, model.device)
    width, limit = ids.shape[1], model.generation_config.max_new_tokens
    cache = DynamicCache(config=model.config.get_text_config())
    can_leave = all(isinstance(layer, DynamicLayer) for layer in cache.layers)  # other caches cannot lose rows
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    while running:
        left = limit - (ids.shape[1] - width)
        output = model.generate(
            input_ids=ids,
            attention_mask=attended,
            past_key_values=cache if can_leave else None,
            max_new_tokens=min(ROUND_TOKENS, left) if can_leave else left,
            return_dict_in_generate=True,
        )
        new = output.sequences.shape[1] - ids.shape[1]
        ids, attended = output.sequences, torch.nn.functional.pad(attended, (0, new), value=1)
        for row, answer in zip(running, ids[:, width:].tolist(), strict=True):
            answers[row] = _until_stop(answer, chat)
        kept = [i for i, row in enumerate(running) if new < left and answers[row][-1] not in chat.stop_ids]
        if kept and len(kept) < len(running):
            ids, attended = ids[kept], attended[kept]
            cache.batch_select_indices(torch.tensor(kept, device=ids.device))
        running = [running[i] for i in kept]
    return answers


def _left_padded(prompts: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, both (num_prompts, longest)."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    attended = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        attended[i, width - len(prompt) :] = 1
    return ids.to(device), attended.to(device)


def _until_stop(answer: list[int], chat: ChatFormat) -> list[int]:
    end = next((i for i, token in enumerate(answer) if token in chat.stop_ids), None)
    return answer if end is None else answer[: end + 1]


def completion_of(
    chat: ChatFormat, prompt: EvalPrompt, answer: list[int], split: str, *, asked: list[int], reader: AnswerReader
) -> Completion:
    """Decode generated ids into a completion; it has ended if its last id is an end of turn and no thinking is open.

    Args:
        chat: the format of the prompts.
        prompt: what was asked.
        answer: generated ids, with the end of turn.
        split: of the prompt.
        asked: ids of the prompt.
        reader: parts the answer from its thinking.
    """
    ended = bool(answer) and answer[-1] in chat.stop_ids
    parted, thinking_tokens = reader.read(asked, answer[:-1] if ended else answer)
    shown = "\n".join(f"{m['role']}: {m['content']}" for m in prompt.prompt) if len(prompt.prompt) > 1 else ""
    return Completion(
        split=split,
        prompt_id=prompt.prompt_id,
        prompt=shown or prompt.prompt[0]["content"],
        completion=parted.answer,
        tokens=len(answer) - thinking_tokens,
        ended=ended and parted.closed,
        thinking=parted.thinking,
        thinking_tokens=thinking_tokens,
    )
