"""Answer for all adapters of a study in one pass of vLLM, where it is installed and a GPU is there.

Runs in a process of its own (`python -m harness.generate.vllm WORK.json ANSWERS.json`), which frees the GPU's memory
before the trials go on. Output: `answers-SPLIT.jsonl` in each trial's folder, which the trial's own stage reads.

The call of vLLM itself has not been run by the harness's authors, who had no GPU; the tests run everything around it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.config.compose import vllm_problem
from harness.config.schema import RunConfig
from harness.data.records import Completion, EvalPrompt
from harness.data.splits import Splits
from harness.data.tokens import ChatFormat
from harness.study.files import read_json, read_jsonl, write_json, write_jsonl

_LAST_WORDS = 2000  # characters of vLLM's error output that are shown
_MAX_LORAS = 8  # adapters on the GPU at once; the others wait in vLLM's queue


def stored_answers(folder: Path, split: str, prompts: Sequence[EvalPrompt]) -> list[Completion]:
    """Return the answers that vLLM has left in a trial's folder, in the order of `prompts`; empty where it has not."""
    path = answers_path(folder, split)
    answers = {row["prompt_id"]: Completion(**row) for row in read_jsonl(path)} if path.is_file() else {}
    return [answers[prompt.prompt_id] for prompt in prompts] if answers else []


def drop_answers(folder: Path, split: str = "*") -> None:
    """Delete answers that were taken up, or that are of weights which are trained anew."""
    for path in folder.glob(answers_path(folder, split).name):
        path.unlink()


def answers_path(folder: Path, split: str) -> Path:
    """Return the file in which vLLM leaves a split's answers."""
    return folder / f"answers-{split}.jsonl"


def vllm_job(config: RunConfig, stop_ids: list[int]) -> dict[str, Any]:
    """Return the work file of the vLLM process: model, dtype, adapters' rank and decoding."""
    from harness.config.checkpoint import checkpoint_dir
    from harness.train.base import uses_bf16

    decoding = config.generate
    return {
        "model": str(checkpoint_dir(config.model)),
        "dtype": "bfloat16" if uses_bf16(config) else "float32",
        "max_lora_rank": 1 << max(3, (config.train.lora_rank - 1).bit_length()),  # vLLM knows 8, 16, 32, ...
        "sampling": {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_new_tokens,
            "seed": decoding.seed,
            "stop_token_ids": stop_ids,
        },
    }


def run_vllm(job: dict[str, Any], scratch: Path) -> list[list[int]]:
    """Run the vLLM process on a work file, and return the token ids of each answer."""
    given, answered = scratch / "vllm-work.json", scratch / "vllm-answers.json"
    write_json(given, job)
    command = [sys.executable, "-m", "harness.generate.vllm", str(given), str(answered)]
    ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    try:
        if ran.returncode:
            raise RuntimeError(
                "vLLM could not answer (generate.backend=transformers does without it):\n" + ran.stderr[-_LAST_WORDS:]
            )
        return list(json.loads(answered.read_text(encoding="utf-8")))
    finally:
        for path in (given, answered):
            path.unlink(missing_ok=True)


def _answers(job: dict[str, Any]) -> Iterator[list[int]]:
    """Yield the generated ids of each request, the end of turn included; without an adapter the base answers."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folders = dict.fromkeys(folder for folder, _ in job["requests"] if Path(folder).is_dir())
    adapters = {folder: LoRARequest(folder, number, folder) for number, folder in enumerate(folders, start=1)}
    longest = max(len(ids) for _, ids in job["requests"])
    engine = LLM(
        model=job["model"],
        dtype=job["dtype"],
        enable_lora=bool(adapters),
        max_lora_rank=job["max_lora_rank"],
        max_loras=max(1, min(len(adapters), _MAX_LORAS)),
        max_model_len=longest + job["sampling"]["max_tokens"],
        generation_config="vllm",  # not the checkpoint's: arms and base are decoded by our settings alone
    )
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for _, ids in job["requests"]],
        SamplingParams(**job["sampling"]),
        lora_request=[adapters.get(folder) for folder, _ in job["requests"]],
    )
    for output in outputs:
        yield list(output.outputs[0].token_ids)


def answer_folders(
    work: Sequence[tuple[Path, str]], config: RunConfig, chat: ChatFormat, splits: Splits, scratch: Path
) -> None:
    """Answer splits with the adapters in trial folders, all in one pass; leaves `answers-SPLIT.jsonl` in each folder.

    Args:
        work: trial folders, each with a split.
        config: of any of the trials: they share base model and decoding.
        chat: format of the prompts.
        splits: the prompts.
        scratch: folder for the files of vLLM's process.

    Raises:
        RuntimeError: if vLLM's process fails, with the end of its error output.
    """
    from harness.generate.answers import completion_of, prompt_ids, turns_of  # loads torch

    prompts = {"dev": turns_of(splits.dev_prompts), "golden": turns_of(splits.golden_prompts)}
    found: dict[tuple[Path, str], dict[str, Completion]] = {place: {} for place in work}
    for turn in range(max(len(turns) for turns in prompts.values())):  # second turns need the answers to the first
        asked = [(place, prompt) for place in work for prompt in (prompts[place[1]][turn : turn + 1] or [[]])[0]]
        requests = [[str(place[0] / "adapter"), prompt_ids(chat, prompt, found[place])] for place, prompt in asked]
        job = vllm_job(config, sorted(chat.stop_ids)) | {"requests": requests}
        for (place, prompt), answer in zip(asked, run_vllm(job, scratch), strict=True):
            found[place][prompt.prompt_id] = completion_of(chat, prompt, answer, place[1])
    for (folder, split), answers in found.items():
        write_jsonl(answers_path(folder, split), [asdict(answer) for answer in answers.values()])


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), list(_answers(read_json(Path(sys.argv[1])))))


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the section `generate`."""
    temperature, top_p = config.generate.temperature, config.generate.top_p
    if temperature == 0 and top_p != 1:
        yield f"generate.top_p={top_p:g}: generate.temperature=0 is greedy and has no use for it; set a temperature"
    if 0 < temperature < 0.01:
        yield f"generate.temperature={temperature:g}: 0 (greedy) or at least 0.01; smaller ones overflow"
    if config.generate.backend == "vllm" and (problem := vllm_problem(config)):
        yield f"generate.backend=vllm: {problem}; use generate.backend=transformers"
