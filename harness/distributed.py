"""Train one trial with several processes by `accelerate launch`: DDP, FSDP or DeepSpeed ZeRO (`conf/accelerate/`).

The trial's own process writes a job folder, starts the launcher and follows it; each process trains its share of the
batch plan (`harness.consumption`), and the first one writes weights, steps and result. Processes die with their parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from harness.arms import ARMS
from harness.config import plain
from harness.plan import BatchPlan
from harness.records import DivergedError, WorkerDiedError, read_json, write_json
from harness.schema import RunConfig
from harness.train import TrainResult

_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # prctl(2)
OnStep = Callable[[int, dict[str, Any]], None]


def train_in_processes(
    config: RunConfig, plan: BatchPlan, *, folder: Path, reference: Any, on_step: OnStep
) -> TrainResult:
    """Train one arm as `harness.train.train_arm` does, with `accelerate.num_processes` processes.

    Args:
        config: the trial.
        plan: the order of the rows, of which each process takes its share.
        folder: its folder; job files lie with the checkpoints and go with them.
        reference: the base's log-probs, shape (num_rows, 2), or None.
        on_step: called after each step, while the processes run.

    Raises:
        DivergedError: as in `train_arm`.
        torch.OutOfMemoryError: where a process ran out of memory.
        WorkerDiedError: where a process was killed.
        RuntimeError: where a process failed otherwise; names it.
    """
    job = folder / "checkpoints" / "job"
    shutil.rmtree(job, ignore_errors=True)
    _write_job(job, config, plan, reference)
    print(f"accelerate launch: {config.accelerate.num_processes} processes, {config.accelerate.distributed_type}")
    with (job / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "harness.distributed", "launch", str(job)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        seen = 0
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            seen = _pass_on(job, seen, on_step)
        _pass_on(job, seen, on_step)
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its processes
            process.wait()
    print((job / "log.txt").read_text(errors="replace"))
    return _read_result(job, process.returncode)


def _write_job(job: Path, config: RunConfig, plan: BatchPlan, reference: Any) -> None:
    from safetensors.torch import save_file

    write_json(job / "config.json", plain(config))
    write_json(job / "plan.json", {"micro_batch_size": plan.micro_batch_size, "sha256": plan.sha256})
    if reference is not None:
        save_file({"reference": reference.contiguous()}, job / "reference.safetensors")
    accelerate = config.accelerate
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": accelerate.distributed_type,
        "num_processes": accelerate.num_processes,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_port": 0,  # a free one: several trials may run on one machine
        "mixed_precision": "no",  # the trainer's own arguments say what runs in bf16
        "use_cpu": False,
    }
    if accelerate.fsdp_config:
        settings["fsdp_config"] = plain(accelerate.fsdp_config)
    if accelerate.deepspeed_config:
        steps = plan.batch_size // (plan.micro_batch_size * accelerate.num_processes)
        settings["deepspeed_config"] = plain(accelerate.deepspeed_config) | {"gradient_accumulation_steps": steps}
    (job / "accelerate.yaml").write_text(yaml.safe_dump(settings))


def _pass_on(job: Path, seen: int, on_step: OnStep) -> int:
    """Pass on the steps that were written since the last look; return how many there are."""
    path = job / "steps.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # without a line that is not whole yet
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
        return TrainResult(**found)
    errors = [read_json(path) for path in sorted(job.glob("error-*.json"))]
    for error in errors:
        if error["out_of_memory"]:
            raise torch.OutOfMemoryError(f"process {error['process']}: {error['message']}")
    if errors:
        raise RuntimeError(f"process {errors[0]['process']}: {errors[0]['message']}")
    tail = (job / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
    raise WorkerDiedError(f"accelerate launch ended with status {status} and without a result: {' '.join(tail)}")


def launch(job: Path) -> None:
    """Be `accelerate launch`, and die with the trial's process."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    _die_with_parent(signal.SIGTERM)  # on which the launcher ends its processes
    config = read_config(job / "config.json")
    threads = config.train.threads or max(1, len(os.sched_getaffinity(0)) // config.accelerate.num_processes)
    arguments = ["--config_file", str(job / "accelerate.yaml"), "--num_cpu_threads_per_process", str(threads)]
    arguments += ["-m", "harness.distributed", "process", str(job)]
    launch_command(launch_command_parser().parse_args(arguments))


def run_process(job: Path) -> None:
    """Be one of the processes: train its share; the first one writes what came out."""
    import torch

    _die_with_parent(signal.SIGKILL)
    rank = int(os.environ["RANK"])
    try:
        found = _train_share(job, rank)
    except DivergedError as error:  # in all processes, at the same step
        found = {"diverged": str(error)}
    except BaseException as error:
        about = {"process": rank, "message": f"{type(error).__name__}: {error}"}
        about["out_of_memory"] = isinstance(error, torch.OutOfMemoryError)
        write_json(job / f"error-{rank}.json", about)
        traceback.print_exc()
        raise SystemExit(1) from error
    if rank == 0:
        write_json(job / "result.json", found)


def _train_share(job: Path, rank: int) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    from harness.checkpoint import has_gpu, load_base, set_threads
    from harness.inputs import plan_of, tokens_of
    from harness.train import train_arm

    config = read_config(job / "config.json")
    set_threads(config)
    if has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    tokens = tokens_of(config)
    path = job / "reference.safetensors"
    steps = (job / "steps.jsonl").open("w", encoding="utf-8") if rank == 0 else None

    def on_step(step: int, logs: dict[str, Any]) -> None:
        if steps is not None:
            steps.write(json.dumps({"step": step, **logs}) + "\n")
            steps.flush()

    planned = read_json(job / "plan.json")  # not the study's: another trial may have made that smaller by now
    plan = plan_of(config, tokens.train.rows, micro=planned["micro_batch_size"])
    if plan.sha256 != planned["sha256"]:
        raise RuntimeError("the training data have changed since the trial began: the batch plan is another one")
    result = train_arm(
        config,
        tokens.train.rows,
        plan,
        model=load_base(config),
        chat=tokens.chat,
        folder=job.parent.parent,
        reference=load_file(path)["reference"] if path.is_file() else None,
        on_step=on_step,
    )
    return asdict(result)


def read_config(path: Path) -> RunConfig:
    """Read a config that `plain` wrote."""
    values = read_json(path)
    declared = OmegaConf.structured(RunConfig(method=ARMS[values["method"]["name"]].config()))
    return cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(declared, values)))


def _die_with_parent(sign: signal.Signals) -> None:
    """Ask Linux for a signal when the parent dies, however it dies; elsewhere a lost process ends with its pipe."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(sign))


if __name__ == "__main__":
    from harness.sweep import prepare_process

    prepare_process()
    {"launch": launch, "process": run_process}[sys.argv[1]](Path(sys.argv[2]))
