"""Answer for all adapters of a study in one pass of vLLM, where it is installed and a GPU is there.

Runs in a process of its own (`python -m harness.multilora WORK.json`), so that the GPU's memory is free again when the
trials go on. Output: `answers-SPLIT.jsonl` in each trial's folder, which the trial's own stage then takes up.

The call of vLLM itself has not been run by the harness's authors, who had no GPU; the tests run everything around it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.data.records import Completion, EvalPrompt
from harness.study.files import read_json, read_jsonl, write_json

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


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), list(_answers(read_json(Path(sys.argv[1])))))
