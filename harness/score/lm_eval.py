"""Scorers out of lm-evaluation-harness: IFEval's instructions on stored answers, and benchmarks on the runs' weights.

IFEval: rows of prompts.jsonl and completions.jsonl -> scores. Benchmarks: weights of the base and of every run that
answered golden -> benchmarks.jsonl per run, one row per document -> scores of `lm_eval:TASK`. Benchmarks run in a
process of their own (`python -m harness.score.lm_eval WORK.json ROWS.json`): the library seeds all generators anew.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from harness.config.checkpoint import Checkpoints
from harness.config.schema import BenchmarkConfig, ScoreConfig
from harness.config.trial_id import plain
from harness.data.reasoning import close_token
from harness.data.template import fix_date
from harness.score.answers import Base, Key, Run, Score, Stored, TrialOutputs, rows_if_any
from harness.study.errors import UsageError
from harness.study.files import Json, digest, file_sha256, mapping, read_json, write_json, write_jsonl
from harness.study.integrity import DELETED
from harness.study.limits import TooSlowError, time_limit
from harness.study.manifest import load_manifest
from harness.study.registration import registered_date

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTRA = "pip install 'dpo-simpo-harness[lm-eval]'"
SENTENCES = "python -m nltk.downloader punkt_tab"
PREFIX = "lm_eval:"
_FILE = "benchmarks.jsonl"
_IFEVAL_SECONDS = 0.5  # of CPU time for all instructions of one answer
_SHOWN = 2000  # characters of the library's error output in a message
_IFEVAL_METRICS = {True: "prompt_level_strict_acc", False: "prompt_level_loose_acc"}


def ifeval_problem() -> str | None:
    """Name the packages that IFEval lacks on this machine; None where it lacks none."""
    missing = [name for name in ("lm_eval", "langdetect", "immutabledict", "nltk") if find_spec(name) is None]
    return f"{', '.join(missing)} not installed ({EXTRA})" if missing else None


def score_ifeval(outputs: TrialOutputs) -> list[Score]:
    """Score 1 where a completion follows all verifiable instructions of its prompt, else 0."""
    return _score_instructions(outputs, strict=True)


def score_ifeval_loose(outputs: TrialOutputs) -> list[Score]:
    """Score as `ifeval`, also on copies of the answer without its first line, last line or asterisks."""
    return _score_instructions(outputs, strict=False)


def _score_instructions(outputs: TrialOutputs, *, strict: bool) -> list[Score]:
    asked: dict[Key, tuple[Mapping[str, Json], str]] = {
        (row["split"], row["prompt_id"]): (mapping(row["about"]["instructions"]), row["prompt"][-1]["content"])
        for row in outputs.prompts
        if row.get("about", {}).get("instructions")
    }
    scores = []
    for row in outputs.completions if asked and ifeval_problem() is None else ():
        key = (row["split"], row["prompt_id"])
        if key not in asked:
            continue
        try:
            scores.append(Score(*key, follows_instructions(*asked[key], row["completion"], strict=strict)))
        except Exception as error:  # the library's checks are not made for every text: one answer ends no scoring
            scores.append(Score(*key, None, _why_unchecked(error)))
    return scores


def follows_instructions(instructions: Mapping[str, Json], prompt: str, answer: str, *, strict: bool) -> float:
    """Return 1.0 where the answer follows all instructions, else 0.0 (Zhou et al. 2023, arXiv 2311.07911).

    Args:
        instructions: `instruction_id_list` and `kwargs` of an IFEval row.
        prompt: its text.
        answer: the completion.
        strict: False also accepts the answer without its first line, last line or asterisks.

    Raises:
        LookupError: where an instruction needs NLTK's sentence data and they are not installed.
        KeyError: for an instruction that the installed version does not know.
        TooSlowError: where the checks of this answer take longer than `_IFEVAL_SECONDS`.
    """
    process_results = _ifeval_checks()
    document = {"key": 0, "prompt": prompt, **instructions}
    with time_limit(_IFEVAL_SECONDS):
        return float(process_results(document, [answer])[_IFEVAL_METRICS[strict]])


@functools.cache
def _ifeval_checks() -> Callable[[Mapping[str, Any], Sequence[str]], Mapping[str, Any]]:
    """Load the library, and langdetect's profiles, once and before any clock runs."""
    with _no_download():
        from lm_eval.tasks.ifeval.utils import process_results
    import langdetect

    # It writes whole answers to the terminal, with what control characters they hold.
    logging.getLogger("lm_eval.tasks.ifeval.instructions").disabled = True

    langdetect.DetectorFactory.seed = 0  # else the detected language of a short answer changes between runs
    langdetect.detect("These profiles are loaded once.")
    return process_results


@contextlib.contextmanager
def _no_download() -> Iterator[None]:
    """Keep lm-evaluation-harness from downloading at import: only the process with LOCAL_RANK 0 does so."""
    rank = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        yield
    finally:
        if rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = rank


def _why_unchecked(error: Exception) -> str:
    if isinstance(error, TooSlowError):
        return f"IFEval's checks of this answer need more than {_IFEVAL_SECONDS:g} s"
    if isinstance(error, KeyError):
        return f"the instruction {error} is not known to the installed lm-evaluation-harness"
    if isinstance(error, LookupError) and not isinstance(error, IndexError):
        return f"an instruction needs NLTK's sentence data ({SENTENCES})"
    return f"the instructions cannot be checked ({type(error).__name__}: {error})"


def unchecked(asked: Iterable[tuple[Mapping[str, Json], str]]) -> Counter[str]:
    """Count the (instructions, prompt) that cannot be checked on this machine, by reason."""
    found: Counter[str] = Counter()
    for instructions, prompt in asked:
        try:
            follows_instructions(instructions, prompt, "Yes, it is.", strict=True)
        except Exception as error:  # as in scoring
            found[_why_unchecked(error)] += 1
    return found


class BenchmarkRow(TypedDict):
    """The metric's value in [0, 1] on one document of a task."""

    task: str
    metric: str
    doc_id: int
    value: float


class _ModelFiles(TypedDict):
    """A model to load: weights and tokenizer in one folder, a template file, its date, and whether in 4 bits."""

    folder: str
    chat_template: str | None
    date: str
    quantise: bool


class _Job(TypedDict):
    """The worker's input: the base, `BenchmarkConfig` as JSON, and the folders of the runs."""

    model: _ModelFiles
    config: dict[str, Any]
    runs: list[str]


def benchmark_problem(config: BenchmarkConfig) -> str | None:
    """Say why the benchmarks cannot run, or None where they can."""
    if find_spec("lm_eval") is None:
        return f"score.lm_eval: lm-evaluation-harness is not installed ({EXTRA})"
    if not config.tasks:
        return "score.lm_eval.tasks=[]: name the tasks, such as [gsm8k]"
    if config.include_path and not Path(config.include_path).is_dir():
        return f"score.lm_eval.include_path={config.include_path}: no such folder"
    return None


def benchmark_settings(score: ScoreConfig, checkpoints: Checkpoints) -> dict[str, Json]:
    """Return the registered settings of the benchmarks."""
    return {"lm_eval": plain(score.lm_eval)}


def run_benchmarks(stored: Stored, config: BenchmarkConfig, base: Base) -> dict[str, dict[Path, list[Score]]]:
    """Run the tasks on every run without current results.

    Args:
        stored: the runs; those that score as worst are left out.
        config: the tasks.
        base: the base that the adapters belong to.

    Returns:
        The scores by scorer (`lm_eval:TASK`) and folder.

    Raises:
        UsageError: where lm-evaluation-harness refuses or fails, with the end of its error output.
    """
    runs = [run for run in stored.runs if not run.failed]
    task_files = _task_files(config)
    settings = {run.folder: digest([asdict(config), task_files, _weights_sha256(run.folder)]) for run in runs}
    missing = [run for run in runs if not _is_done(run.folder, settings[run.folder])]
    for run in missing:
        _refuse_deleted_weights(run)
    if missing:
        model: _ModelFiles = {
            "folder": str(base.folder),
            "chat_template": base.chat_template,
            "date": registered_date(stored.study).isoformat(),
            "quantise": base.is_quantised,
        }
        job: _Job = {"model": model, "config": asdict(config), "runs": [str(run.folder) for run in missing]}
        for run, rows in zip(missing, _run_worker(job), strict=True):
            write_jsonl(run.folder / _FILE, [{"settings": settings[run.folder], **row} for row in rows])
    found: dict[str, dict[Path, list[Score]]] = {}
    for run in runs:
        for row in rows_if_any(run.folder / _FILE):
            score = Score("golden", f"{row['task']}#{row['doc_id']}", row["value"])
            found.setdefault(PREFIX + row["task"], {}).setdefault(run.folder, []).append(score)
    return found


def _task_files(config: BenchmarkConfig) -> list[list[str]]:
    """Return names and contents of the user's task files, so that a changed task runs again."""
    folder = Path(config.include_path) if config.include_path else None
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    return [[path.name, path.read_text(encoding="utf-8", errors="replace")] for path in files]


def _weights_sha256(folder: Path) -> list[str]:
    """Return the hashes of a run's weights, so that newly trained weights run again."""
    return [
        file_sha256(path) for name in ("adapter", "model") for path in sorted((folder / name).glob("*.safetensors"))
    ]


def _is_done(folder: Path, settings: str) -> bool:
    try:
        rows = rows_if_any(folder / _FILE)
    except ValueError:  # cut off
        return False
    return bool(rows) and rows[0].get("settings") == settings


def _refuse_deleted_weights(run: Run) -> None:
    if policy := load_manifest(run.folder).get(DELETED):
        raise UsageError(
            f"lm_eval: the weights of trial {run.folder.name} were deleted (keep={policy}), and a benchmark needs "
            "them; run the sweep with keep=confirmed in a study of its own"
        )


def _run_worker(job: _Job) -> list[list[BenchmarkRow]]:
    """Run the job in a process of its own; one list of rows per run."""
    with tempfile.TemporaryDirectory() as scratch:
        given, written = Path(scratch) / "work.json", Path(scratch) / "rows.json"
        write_json(given, job)
        command = [sys.executable, "-m", "harness.score.lm_eval", str(given), str(written)]
        ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if ran.returncode:
            tasks = ",".join(job["config"]["tasks"])
            raise UsageError(f"score.lm_eval.tasks=[{tasks}]: lm-evaluation-harness failed:\n{ran.stderr[-_SHOWN:]}")
        return list(read_json(written))


def main() -> None:
    """Run the worker: read the job from the first file, write its rows into the second."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    job: _Job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    write_json(Path(sys.argv[2]), list(_evaluate(job)))


def _evaluate(job: _Job) -> Iterator[list[BenchmarkRow]]:
    """Yield the rows of each run; the base is loaded once for all adapters."""
    from lm_eval.tasks import TaskManager
    from peft import PeftModel

    config, model = BenchmarkConfig(**job["config"]), job["model"]
    tokenizer = _load_tokenizer(model)
    base = _load_weights(Path(model["folder"]), quantise=model["quantise"])
    manager = TaskManager(include_path=config.include_path, include_defaults=config.include_path is None)
    for folder in map(Path, job["runs"]):
        if (folder / "model").is_dir():
            policy = _load_weights(folder / "model", quantise=False)
        elif (folder / "adapter").is_dir():
            policy = PeftModel.from_pretrained(base, folder / "adapter")
        else:
            policy = base
        yield list(_rows_of_policy(policy.eval(), tokenizer, manager, config))
        if isinstance(policy, PeftModel):
            base = policy.unload()


def _load_tokenizer(model: _ModelFiles) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model["folder"], trust_remote_code=False)
    if model["chat_template"]:
        tokenizer.chat_template = Path(model["chat_template"]).read_text(encoding="utf-8")
    fix_date(tokenizer, datetime.fromisoformat(model["date"]))
    return tokenizer


def _load_weights(folder: Path, *, quantise: bool) -> PreTrainedModel:
    import torch

    from harness.train.base import load_model  # imports torch, which only the worker needs

    use_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return load_model(folder, torch.bfloat16 if use_bf16 else torch.float32, quantise=quantise)


def _rows_of_policy(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, manager: TaskManager, config: BenchmarkConfig
) -> Iterator[BenchmarkRow]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    result = lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=policy,
            tokenizer=tokenizer,
            batch_size=config.batch_size,
            think_end_token=close_token(tokenizer),  # what is generated is scored without its reasoning
        ),
        tasks=list(config.tasks),
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.chat_template and tokenizer.chat_template is not None,
        log_samples=True,
        bootstrap_iters=0,
    )
    for task, samples in result["samples"].items():
        metric = _metric(task, samples, config.metric)
        filters = list(dict.fromkeys(sample.get("filter", "none") for sample in samples))
        for sample in samples:
            if sample.get("filter", "none") == filters[0]:
                yield {"task": task, "metric": metric, "doc_id": sample["doc_id"], "value": float(sample[metric])}


def _metric(task: str, samples: Sequence[Mapping[str, Any]], wanted: str | None) -> str:
    """Return the requested metric, or the task's first metric with one value in [0, 1] per document."""
    names = list(samples[0]["metrics"])
    usable = [name for name in names if all(_is_share(sample.get(name)) for sample in samples)]
    if wanted is not None and wanted not in usable:
        raise SystemExit(f"score.lm_eval.metric={wanted}: not one of task {task}'s in [0, 1]: {', '.join(usable)}")
    if not usable:
        raise SystemExit(f"task {task}: none of its metrics ({', '.join(names)}) has one value in [0, 1] per document")
    return wanted or usable[0]


def _is_share(value: float | str | None) -> bool:
    return isinstance(value, bool | int | float) and 0 <= value <= 1


if __name__ == "__main__":
    main()
