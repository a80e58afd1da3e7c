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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.arms import ARMS
from harness.folders import study_dir, trial_dir
from harness.manifest import read_manifest
from harness.records import Completion, EvalPrompt, read_json, read_jsonl, write_json, write_jsonl
from harness.schema import RunConfig
from harness.stages import done_stages

_LAST_WORDS = 2000  # characters of vLLM's error output that are shown
_MAX_LORAS = 8  # adapters on the GPU at once; the others wait in vLLM's queue


def answer_trials(trials: Sequence[RunConfig]) -> None:
    """Answer the splits that trained trials of one study (or its base) still lack, all in one pass.

    Args:
        trials: configs with one base model and one decoding; those that diverged or failed are left out.

    Raises:
        RuntimeError: where vLLM's process fails, with the end of its error output.
    """
    from harness.generate import completion_of, prompt_ids, turns_of
    from harness.inputs import splits_of, tokens_of

    work = [(folder, split) for trial in trials for folder, split in _lacking(trial)]
    if not work:
        return
    chat, splits = tokens_of(trials[0]).chat, splits_of(trials[0])
    prompts = {"dev": turns_of(splits.dev_prompts), "golden": turns_of(splits.golden_prompts)}
    found: dict[tuple[Path, str], dict[str, Completion]] = {place: {} for place in work}
    for turn in range(max(len(turns) for turns in prompts.values())):  # second turns need the answers to the first
        asked = [(place, prompt) for place in work for prompt in (prompts[place[1]][turn : turn + 1] or [[]])[0]]
        requests = [[str(place[0] / "adapter"), prompt_ids(chat, prompt, found[place])] for place, prompt in asked]
        job = _job(trials[0], sorted(chat.stop_ids)) | {"requests": requests}
        for (place, prompt), answer in zip(asked, _run(job, study_dir(trials[0])), strict=True):
            found[place][prompt.prompt_id] = completion_of(chat, prompt, answer, place[1])
    for (folder, split), answers in found.items():
        write_jsonl(_path(folder, split), [asdict(answer) for answer in answers.values()])


def _lacking(trial: RunConfig) -> list[tuple[Path, str]]:
    """Return the trial's folder with each split that it has neither scored nor answered."""
    folder = trial_dir(trial)
    manifest = read_manifest(folder)
    is_trained = "train" in manifest.get("done", []) and manifest["status"] != "diverged"
    if not is_trained and ARMS[trial.method.name].trainer:
        return []
    done = done_stages(folder, manifest)
    return [(folder, split) for split in trial.evaluate if split not in done and not _path(folder, split).is_file()]


def stored_answers(folder: Path, split: str, prompts: Sequence[EvalPrompt]) -> list[Completion]:
    """Return the answers that vLLM has left in a trial's folder, in the order of `prompts`; empty where it has not."""
    path = _path(folder, split)
    answers = {row["prompt_id"]: Completion(**row) for row in read_jsonl(path)} if path.is_file() else {}
    return [answers[prompt.prompt_id] for prompt in prompts] if answers else []


def drop_answers(folder: Path, split: str = "*") -> None:
    """Delete answers that were taken up, or that are of weights which are trained anew."""
    for path in folder.glob(_path(folder, split).name):
        path.unlink()


def _path(folder: Path, split: str) -> Path:
    return folder / f"answers-{split}.jsonl"


def _job(config: RunConfig, stop_ids: list[int]) -> dict[str, Any]:
    from harness.checkpoint import checkpoint_dir, uses_bf16

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


def _run(job: dict[str, Any], scratch: Path) -> list[list[int]]:
    given, answered = scratch / "vllm-work.json", scratch / "vllm-answers.json"
    write_json(given, job)
    command = [sys.executable, "-m", "harness.multilora", str(given), str(answered)]
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
