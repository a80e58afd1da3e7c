"""Benchmarks of lm-evaluation-harness on the SFT base and on every policy that answered golden: guards against a tax.

Runs in a process of its own (`python -m harness.benchmarks WORK.json OUT.json`), since lm-evaluation-harness seeds all
generators anew. Output: `benchmarks.jsonl` in each run's folder, a row a document; from it, scores of `lm_eval:TASK`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.config.schema import BenchmarkConfig
from harness.score.answers import Stored
from harness.score.scorers import Score
from harness.study.errors import UsageError
from harness.study.files import digest, file_sha256, read_json, read_jsonl, write_json, write_jsonl
from harness.study.integrity import DELETED
from harness.study.manifest import load_manifest

PREFIX = "lm_eval:"
EXTRA = "pip install 'dpo-simpo-harness[lm-eval]'"
_FILE = "benchmarks.jsonl"
_LAST_WORDS = 2000  # characters of its error output that are shown


def benchmark_problem(config: BenchmarkConfig) -> str | None:
    """Say why the benchmarks cannot be run, or None where they can."""
    if find_spec("lm_eval") is None:
        return f"score.lm_eval: lm-evaluation-harness is not installed ({EXTRA})"
    if not config.tasks:
        return "score.lm_eval.tasks=[]: name the tasks, such as [gsm8k]"
    if config.include_path and not Path(config.include_path).is_dir():
        return f"score.lm_eval.include_path={config.include_path}: no such folder"
    return None


def run_benchmarks(
    stored: Stored, config: BenchmarkConfig, model: dict[str, Any]
) -> dict[Path, dict[str, list[Score]]]:
    """Run the tasks on every run that has not been, and return the scores by folder and scorer.

    Args:
        stored: the runs; those that score worst anyway are not run.
        config: the tasks.
        model: `folder` of the base, `chat_template` (a file or None), `quantise`: whether it is run in 4 bits.

    Raises:
        UsageError: where lm-evaluation-harness refuses or fails, with the end of what it said.
    """
    tasks = [asdict(config), _task_files(config)]
    settings = {run.folder: digest([*tasks, _weights(run.folder)]) for run in stored.runs}
    missing = [run for run in stored.runs if not run.failed and not _is_done(run.folder, settings[run.folder])]
    for run in missing:
        if policy := load_manifest(run.folder).get(DELETED):
            raise UsageError(
                f"lm_eval: the weights of trial {run.folder.name} were deleted (keep={policy}), and a benchmark needs "
                "them; run the sweep with keep=confirmed in a study of its own"
            )
    if missing:
        job = {"model": model, "config": asdict(config), "runs": [str(run.folder) for run in missing]}
        for run, rows in zip(missing, _run(job), strict=True):
            head = {"settings": settings[run.folder]}
            write_jsonl(run.folder / _FILE, [head | row for row in rows])
    return {run.folder: _scores(run.folder) for run in stored.runs if not run.failed}


def _task_files(config: BenchmarkConfig) -> list[list[str]]:
    """Return names and contents of own task files, so that a change of one is noticed."""
    folder = Path(config.include_path) if config.include_path else None
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    return [[path.name, path.read_text(encoding="utf-8", errors="replace")] for path in files]


def _is_done(folder: Path, settings: str) -> bool:
    path = folder / _FILE
    try:
        first: dict[str, Any] = next(iter(read_jsonl(path)), {}) if path.is_file() else {}
    except ValueError:
        return False
    return bool(first.get("settings") == settings)


def _weights(folder: Path) -> list[str]:
    """Return the digests of what a run has trained: weights that are trained anew are run anew."""
    return [
        file_sha256(path) for name in ("adapter", "model") for path in sorted((folder / name).glob("*.safetensors"))
    ]


def _scores(folder: Path) -> dict[str, list[Score]]:
    found: dict[str, list[Score]] = {}
    for row in read_jsonl(folder / _FILE):
        score = Score("golden", f"{row['task']}#{row['doc_id']}", row["value"])
        found.setdefault(PREFIX + row["task"], []).append(score)
    return found


def _run(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as scratch:
        given, written = Path(scratch) / "work.json", Path(scratch) / "rows.json"
        write_json(given, job)
        command = [sys.executable, "-m", "harness.score.lm_eval", str(given), str(written)]
        ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if ran.returncode:
            tasks = ",".join(job["config"]["tasks"])
            raise UsageError(
                f"score.lm_eval.tasks=[{tasks}]: lm-evaluation-harness failed:\n{ran.stderr[-_LAST_WORDS:]}"
            )
        return list(read_json(written))


def _evaluate(job: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each run: task, metric, doc_id, value."""
    from lm_eval.tasks import TaskManager
    from peft import PeftModel

    config = job["config"]
    tokenizer, base = _load(job["model"])
    own = config["include_path"]
    manager = TaskManager(include_path=own, include_defaults=own is None)
    for folder in map(Path, job["runs"]):
        if (folder / "model").is_dir():
            policy = _load(job["model"] | {"folder": str(folder / "model"), "quantise": False})[1]
        elif (folder / "adapter").is_dir():
            policy = PeftModel.from_pretrained(base, folder / "adapter")
        else:
            policy = base
        yield list(_rows(policy.eval(), tokenizer, manager, config))
        if isinstance(policy, PeftModel):
            base = policy.unload()


def _load(model: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer

    from harness.train.base import load_model

    folder = Path(model["folder"])
    tokenizer = AutoTokenizer.from_pretrained(model.get("tokenizer") or folder, trust_remote_code=False)
    if model["chat_template"]:
        tokenizer.chat_template = Path(model["chat_template"]).read_text(encoding="utf-8")
    use_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return tokenizer, load_model(folder, torch.bfloat16 if use_bf16 else torch.float32, quantise=model["quantise"])


def _rows(policy: Any, tokenizer: Any, manager: Any, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=policy, tokenizer=tokenizer, batch_size=config["batch_size"]),
        tasks=list(config["tasks"]),
        task_manager=manager,
        num_fewshot=config["num_fewshot"],
        limit=config["limit"],
        apply_chat_template=config["chat_template"] and tokenizer.chat_template is not None,
        log_samples=True,
        bootstrap_iters=0,
    )
    for task, samples in result["samples"].items():
        metric = _metric(task, samples, config["metric"])
        filters = list(dict.fromkeys(sample.get("filter", "none") for sample in samples))
        for sample in samples:
            if sample.get("filter", "none") == filters[0]:
                yield {"task": task, "metric": metric, "doc_id": sample["doc_id"], "value": float(sample[metric])}


def _metric(task: str, samples: Sequence[dict[str, Any]], wanted: str | None) -> str:
    """Return the metric that counts: the one asked for, or the task's first whose values lie in [0, 1]."""
    names = list(samples[0]["metrics"])
    usable = [name for name in names if all(_is_share(sample.get(name)) for sample in samples)]
    if wanted is not None and wanted not in usable:
        raise SystemExit(f"score.lm_eval.metric={wanted}: not one of task {task}'s in [0, 1]: {', '.join(usable)}")
    if not usable:
        raise SystemExit(f"task {task}: none of its metrics ({', '.join(names)}) has one value in [0, 1] a document")
    return wanted or usable[0]


def _is_share(value: Any) -> bool:
    return isinstance(value, bool | int | float) and 0 <= value <= 1


def main() -> None:
    """Run the worker's part."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    rows = list(_evaluate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    write_json(Path(sys.argv[2]), rows)


if __name__ == "__main__":
    main()
