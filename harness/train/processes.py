"""Train one trial with several processes by `accelerate launch`: DDP, FSDP or DeepSpeed ZeRO (`conf/accelerate/`).

The trial's own process writes a job folder, starts the launcher and reads the steps from there. Each process trains its
share of the batch plan (`harness.train.trainers`); the first one writes weights, steps and result. Processes die with
their parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import yaml

from harness.config.compose import config_from
from harness.config.machine import has_gpu
from harness.config.schema import RunConfig
from harness.config.trial_id import plain
from harness.data.plan import BatchPlan
from harness.study.errors import DivergedError, NoRoomError, WorkerDiedError, is_outside
from harness.study.files import read_json, write_json
from harness.study.log import prepare_process, trial_log
from harness.study.text import redact
from harness.train.base import import_logging_libraries, load_base, threads
from harness.train.layout import Layout
from harness.train.memory import out_of_memory_as_no_room, peak_memory_bytes, plan_of
from harness.train.run import OnStep, TrainResult, train_arm

if TYPE_CHECKING:
    from torch import Tensor

_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before a fork needs it
_LOG_CHARS = 200_000  # of the end of each process's log, copied to the trial's, which needs room for later stages
_LAUNCHER = "HARNESS_LAUNCHER_PID"
_ERRORS: dict[str, type[Exception]] = {"outside": OSError, "lost": WorkerDiedError}  # by kind; `own` is a RuntimeError


class ProcessError(TypedDict):
    """Contents of an error file of a process; the kinds are those of `_kind_of`."""

    process: int
    message: str
    kind: str


def train_in_processes(
    config: RunConfig,
    plan: BatchPlan,
    *,
    folder: Path,
    reference: Tensor | None,
    on_step: OnStep,
    layout: Layout | None = None,
) -> TrainResult:
    """Train one arm as `harness.train.run.train_arm` does, with `accelerate.num_processes` processes.

    Args:
        config: the trial.
        plan: the order of the rows; each process trains its share.
        folder: of the trial; job files are deleted with its checkpoints.
        reference: the base's log-probs, shape (num_rows, 2), or None.
        on_step: called after each step, while the processes run.
        layout: as in `train_arm`.

    Raises:
        DivergedError: as in `train_arm`.
        torch.OutOfMemoryError: where a process ran out of memory.
        WorkerDiedError: where a process was killed.
        RuntimeError: where a process failed otherwise; names the process.
    """
    job = folder / "checkpoints" / "job"
    shutil.rmtree(job, ignore_errors=True)
    _write_job(job, config, plan, reference)
    write_json(job / "layout.json", asdict(layout) if layout else None)
    print(f"accelerate launch: {config.accelerate.num_processes} processes, {config.accelerate.distributed_type}")
    with (job / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "harness.train.processes", "launch", str(job)]
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one call of the C library, loaded already
        )
    try:
        seen = 0
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            seen = _report_steps(job, seen, on_step)
        _report_steps(job, seen, on_step)
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its processes
            process.wait()
        for path in [job / "log.txt", *sorted(job.glob("process-*/log.txt"))]:
            print(path.read_text(errors="replace")[-_LOG_CHARS:])  # into the trial's own log
    try:
        return _read_result(job, process.returncode)
    finally:
        shutil.rmtree(job)


def _write_job(job: Path, config: RunConfig, plan: BatchPlan, reference: Tensor | None) -> None:
    from safetensors.torch import save_file

    write_json(job / "config.json", plain(config))
    write_json(job / "plan.json", {"micro_batch_size": plan.micro_batch_size, "sha256": plan.sha256})
    if reference is not None:
        save_file({"reference": reference.contiguous()}, job / "reference.safetensors")
    accelerate = config.accelerate
    settings: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": accelerate.distributed_type,
        "num_processes": accelerate.num_processes,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_port": 0,  # a free one: several trials may run on one machine
        "mixed_precision": "no",  # bf16 is set by the trainer's own arguments
        "use_cpu": False,
    }
    if accelerate.fsdp_config:
        settings["fsdp_config"] = plain(accelerate.fsdp_config)
    if accelerate.deepspeed_config:
        steps = plan.batch_size // (plan.micro_batch_size * accelerate.num_processes)
        settings["deepspeed_config"] = plain(accelerate.deepspeed_config) | {"gradient_accumulation_steps": steps}
    (job / "accelerate.yaml").write_text(yaml.safe_dump(settings))


def _report_steps(job: Path, seen: int, on_step: OnStep) -> int:
    """Report the steps written since the last call, when there were `seen`; return their number now."""
    path = job / "steps.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # without an incomplete last line
    for line in lines[seen:]:
        row = json.loads(line)
        on_step(row.pop("step"), row)
    return len(lines)


def _read_result(job: Path, status: int) -> TrainResult:
    import torch

    if (job / "result.json").is_file():
        found = read_json(job / "result.json")
        if "diverged" in found:
            raise DivergedError(found["diverged"])
        return TrainResult(**found)  # with the memory of all processes, which a parent cannot measure
    errors: list[ProcessError] = [read_json(path) for path in sorted(job.glob("error-*.json"))]
    for error in errors:
        if error["kind"] == "memory":
            raise torch.OutOfMemoryError(f"process {error['process']}: {error['message']}")
    for error in sorted(errors, key=lambda error: error["kind"] == "lost"):  # a lost neighbour is a consequence
        raise _ERRORS.get(error["kind"], RuntimeError)(f"process {error['process']}: {error['message']}")
    lines = [line for line in (job / "log.txt").read_text(errors="replace").splitlines() if re.search(r"\w", line)]
    raise WorkerDiedError(f"accelerate launch ended with status {status} and without a result: {''.join(lines[-1:])}")


def launch(job: Path) -> None:
    """Run `accelerate launch` in this process; the processes are its children, and die with it."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    os.environ[_LAUNCHER] = str(os.getpid())
    config = config_from(read_json(job / "config.json"))
    threads = config.train.threads or max(1, len(os.sched_getaffinity(0)) // config.accelerate.num_processes)
    arguments = ["--config_file", str(job / "accelerate.yaml"), "--num_cpu_threads_per_process", str(threads)]
    arguments += ["-m", "harness.train.processes", "process", str(job)]
    launch_command(launch_command_parser().parse_args(arguments))


def run_process(job: Path) -> None:
    """Train one process's share; the first process writes the result."""
    _die_with_parent()
    if os.getppid() != int(os.environ[_LAUNCHER]):  # it died while this process was importing
        raise SystemExit(1)
    rank = int(os.environ["RANK"])
    import_logging_libraries()
    with trial_log(job / f"process-{rank}", f"process {rank}"):
        try:
            found: dict[str, object] = asdict(_train_share(job, rank))
        except DivergedError as error:  # in all processes, at the same step
            found = {"diverged": str(error)}
        except BaseException as error:
            message = redact(f"{type(error).__name__}: {error}")
            content: ProcessError = {"process": rank, "message": message, "kind": _kind_of(error)}
            write_json(job / f"error-{rank}.json", content)
            traceback.print_exc()
            raise SystemExit(1) from error
    if rank == 0:
        write_json(job / "result.json", found)


def _kind_of(error: BaseException) -> str:
    """Classify an error: `memory` (a smaller micro-batch may help), `outside`, `lost` (a neighbour died), or `own`."""
    if isinstance(error, NoRoomError):
        return "memory"
    is_lost = type(error).__name__ == "DistBackendError" or re.search(
        r"gloo|nccl|[Cc]onnection (reset|closed)", str(error)
    )
    if is_lost:
        return "lost"
    return "outside" if is_outside(error) else "own"


def _train_share(job: Path, rank: int) -> TrainResult:
    config = config_from(read_json(job / "config.json"))
    with threads(config):
        return _train_config(config, job, rank)


def _train_config(config: RunConfig, job: Path, rank: int) -> TrainResult:
    import torch
    from accelerate.utils import gather_object
    from safetensors.torch import load_file

    from harness.data.inputs import Inputs

    if has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    inputs = Inputs()
    tokens = inputs.tokens(config)
    path = job / "reference.safetensors"
    steps = (job / "steps.jsonl").open("w", encoding="utf-8") if rank == 0 else None

    def on_step(step: int, logs: dict[str, float]) -> None:
        if steps is not None:
            steps.write(json.dumps({"step": step, **logs}) + "\n")
            steps.flush()

    planned = read_json(job / "plan.json")  # not the study's: another trial may have made that smaller by now
    plan = plan_of(config, tokens.train.rows, micro=planned["micro_batch_size"])
    if plan.sha256 != planned["sha256"]:
        raise RuntimeError("the training data have changed since the trial began: the batch plan is another one")
    folder = inputs.checkpoints.folder(config.model, config.results_dir)
    base = load_base(config, folder, on_gpu=config.accelerate.distributed_type == "MULTI_GPU")  # else sharded from here
    with out_of_memory_as_no_room():
        result = train_arm(
            config,
            tokens.train.rows,
            plan,
            model=base,
            chat=tokens.chat,
            folder=job.parent.parent,
            reference=load_file(path)["reference"] if path.is_file() else None,
            layout=Layout(**found) if (found := read_json(job / "layout.json")) else None,
            on_step=on_step,
        )
    return replace(result, peak_memory_bytes=sum(gather_object([peak_memory_bytes()])))


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere a process ends when its neighbours have ended."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    prepare_process()
    {"launch": launch, "process": run_process}[sys.argv[1]](Path(sys.argv[2]))
