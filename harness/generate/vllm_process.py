"""The process in which vLLM answers: `vllm_process.py WORK.json ANSWERS.json` -> the generated ids of each request.

It imports vLLM and nothing of the harness, which an interpreter with vLLM need not have. The call of vLLM itself has
not been run, for want of a GPU; the tests run everything around it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.generate.vllm import VllmJob


def generate(job: VllmJob) -> Iterator[list[int]]:
    """Yield the generated ids of each request, the end of turn included; without an adapter the base answers."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folders = dict.fromkeys(folder for folder, _ in job["requests"] if Path(folder).is_dir())
    adapters = {folder: LoRARequest(folder, number, folder) for number, folder in enumerate(folders, start=1)}
    longest = max(len(ids) for _, ids in job["requests"])
    share = job["memory_share"]
    engine = LLM(
        model=job["model"],
        dtype=job["dtype"],
        enable_lora=bool(adapters),
        max_lora_rank=job["max_lora_rank"],
        max_loras=max(1, min(len(adapters), job["max_loras"])),
        max_model_len=longest + job["sampling"]["max_tokens"],
        generation_config="vllm",  # not the checkpoint's: arms and base are decoded with `sampling` alone
        **({} if share is None else {"gpu_memory_utilization": share}),
    )
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for _, ids in job["requests"]],
        SamplingParams(**job["sampling"]),
        lora_request=[adapters.get(folder) for folder, _ in job["requests"]],
    )
    for output in outputs:
        yield list(output.outputs[0].token_ids)


if __name__ == "__main__":
    del sys.path[0]  # this folder, in which a module is named as vLLM's package
    work, answers = map(Path, sys.argv[1:])
    answers.write_text(json.dumps(list(generate(json.loads(work.read_text(encoding="utf-8"))))), encoding="utf-8")
