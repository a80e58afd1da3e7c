"""Answers of all adapters of a study in one vLLM pass: requests -> `answers-SPLIT.jsonl` in each trial's folder.

vLLM runs in a process of its own (`vllm_process.py WORK.json ANSWERS.json`), so that the GPU's memory is free again
when the trials go on; with `generate.vllm_python` in an interpreter of its own, since vLLM pins a version of torch.
Each trial's own stage then reads its answers (`stored_answers`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from harness.config.compose import vllm_problem
from harness.config.schema import RunConfig
from harness.data.reasoning import AnswerReader
from harness.data.records import Completion, EvalPrompt
from harness.data.splits import Splits
from harness.data.tokens import ChatFormat
from harness.study.files import read_jsonl, write_json, write_jsonl
from harness.train.base import uses_bf16
from harness.train.memory import free_memory

_ERROR_CHARS = 2000  # of the end of vLLM's error output, shown in the message
_PROCESS = Path(__file__).with_name("vllm_process.py")
_MEMORY_SHARE = 0.9  # of what is free: vLLM's own default for a GPU that is empty
_MAX_LORAS = 8  # adapters on the GPU at once; the others wait in vLLM's queue


class Sampling(TypedDict):
    """Arguments of vLLM's SamplingParams."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_token_ids: list[int]


Request = tuple[str, list[int]]


class VllmJob(TypedDict):
    """Contents of the work file.

    Attributes:
        model: folder of the base.
        dtype: `bfloat16` or `float32`.
        max_lora_rank: of all adapters.
        max_loras: adapters on the GPU at once.
        memory_share: of the GPU's memory that vLLM may take; None is vLLM's own default.
        sampling: the decoding.
        requests: per answer the folder of its adapter (where there is none, the base answers) and the prompt's ids.
    """

    model: str
    dtype: str
    max_lora_rank: int
    max_loras: int
    memory_share: float | None
    sampling: Sampling
    requests: Sequence[Request]


def stored_answers(folder: Path, split: str, prompts: Sequence[EvalPrompt]) -> list[Completion]:
    """Return vLLM's answers in a trial's folder, in the order of `prompts`; empty where there are none."""
    path = answers_path(folder, split)
    answers = {row["prompt_id"]: Completion(**row) for row in read_jsonl(path)} if path.is_file() else {}
    return [answers[prompt.prompt_id] for prompt in prompts] if answers else []


def drop_answers(folder: Path, split: str = "*") -> None:
    """Delete answers that are stored with the trial, or that weights gave which are trained again."""
    for path in folder.glob(answers_path(folder, split).name):
        path.unlink()


def answers_path(folder: Path, split: str) -> Path:
    """Return the file of vLLM's answers to a split."""
    return folder / f"answers-{split}.jsonl"


def answer_folders(
    work: Sequence[tuple[Path, str]], config: RunConfig, chat: ChatFormat, splits: Splits, *, base: Path, scratch: Path
) -> None:
    """Answer splits with the adapters in trial folders, all in one pass; leaves `answers-SPLIT.jsonl` in each folder.

    Args:
        work: trial folders, each with a split.
        config: of any of the trials: they share base model and decoding.
        chat: format of the prompts.
        splits: the prompts.
        base: folder of the base.
        scratch: folder for the files of vLLM's process.

    Raises:
        RuntimeError: if vLLM's process fails, with the end of its error output.
    """
    from harness.generate.answers import completion_of, prompt_ids, turns_of  # loads torch

    reader = AnswerReader(chat.tokenizer, config.generate.reasoning)
    prompts = {"dev": turns_of(splits.dev_prompts), "golden": turns_of(splits.golden_prompts)}
    found: dict[tuple[Path, str], dict[str, Completion]] = {place: {} for place in work}
    for turn in range(max(len(turns) for turns in prompts.values())):  # second turns need the answers to the first
        asked = [(place, prompt) for place in work for prompt in (prompts[place[1]][turn : turn + 1] or [[]])[0]]
        requests = [(str(place[0] / "adapter"), prompt_ids(chat, prompt, found[place])) for place, prompt in asked]
        job = vllm_job(config, sorted(chat.stop_ids), requests, folder=base)
        answered = run_vllm(job, scratch, config.generate.vllm_python)
        for (place, prompt), request, answer in zip(asked, requests, answered, strict=True):
            ids = request[1]
            found[place][prompt.prompt_id] = completion_of(chat, prompt, answer, place[1], asked=ids, reader=reader)
    for (folder, split), answers in found.items():
        write_jsonl(answers_path(folder, split), [asdict(answer) for answer in answers.values()])


def vllm_job(config: RunConfig, stop_ids: list[int], requests: Sequence[Request], *, folder: Path) -> VllmJob:
    """Return the contents of the work file.

    Args:
        config: a trial; all trials share base and decoding.
        stop_ids: ids that end an answer.
        requests: as in `VllmJob`.
        folder: of the base.
    """
    decoding = config.generate
    assert decoding.max_new_tokens is not None, "the profile fills it"
    return {
        "model": str(folder),
        "dtype": "bfloat16" if uses_bf16(config) else "float32",
        "max_lora_rank": 1 << max(3, (config.train.lora_rank - 1).bit_length()),  # vLLM supports 8, 16, 32, ...
        "max_loras": _MAX_LORAS,
        "memory_share": memory_share(*free_memory()),
        "sampling": {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_new_tokens,
            "seed": decoding.seed,
            "stop_token_ids": stop_ids,
        },
        "requests": requests,
    }


def memory_share(free: int, total: int) -> float | None:
    """Return the share of a GPU's memory for vLLM, which refuses to start where less is free; None without a GPU.

    Args:
        free: bytes that are free now.
        total: bytes of the GPU.
    """
    return round(_MEMORY_SHARE * free / total, 3) if total else None


def run_vllm(job: VllmJob, scratch: Path, python: str | None = None) -> list[list[int]]:
    """Run the vLLM process on a work file, and return the token ids of each answer.

    Args:
        job: contents of the work file.
        scratch: folder for the files.
        python: the interpreter that has vLLM; None is this one.
    """
    given, answered = scratch / "vllm-work.json", scratch / "vllm-answers.json"
    write_json(given, job)
    command = [python or sys.executable, str(_PROCESS), str(given), str(answered)]
    ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    try:
        if ran.returncode:
            raise RuntimeError(
                "vLLM could not answer (generate.backend=transformers does without it):\n" + ran.stderr[-_ERROR_CHARS:]
            )
        return list(json.loads(answered.read_text(encoding="utf-8")))
    finally:
        for path in (given, answered):
            path.unlink(missing_ok=True)


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the section `generate`."""
    temperature, top_p = config.generate.temperature, config.generate.top_p
    if temperature == 0 and top_p != 1:
        yield f"generate.top_p={top_p:g}: generate.temperature=0 is greedy and has no use for it; set a temperature"
    if 0 < temperature < 0.01:
        yield f"generate.temperature={temperature:g}: 0 (greedy) or at least 0.01; smaller ones overflow"
    if config.generate.backend == "vllm" and (problem := vllm_problem(config)):
        yield f"generate.backend=vllm: {problem}; use generate.backend=transformers"
