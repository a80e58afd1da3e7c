"""The runs of the benchmark: TRL's own scripts and the harness, on the same pairs, each run in a process -> `Run`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NotRequired, TypedDict

from harness.config.checkpoint import Checkpoints
from harness.config.schema import RunConfig
from harness.data.inputs import Inputs
from harness.study.errors import UsageError
from harness.study.files import write_json, write_jsonl
from harness.sweep.problems import load_run
from harness.sweep.products import Shape, shape_of_config
from harness.train.base import uses_bf16
from harness.train.derived import derive
from harness.train.memory import matmul_rate, plan_of

BETAS = (0.01, 0.05, 0.1, 0.5)
SIMPO = ((2.0, 0.3), (2.0, 0.5), (2.5, 0.5), (10.0, 0.5))  # beta, gamma over beta
RATES = {"dpo": 5e-6, "simpo": 5e-6}
STEP_PAIRS = 4
WARM_STEPS = 2  # at the start of a loop, which choose kernels and fill caches
GPU_WIDTHS = (4096, 14336)  # of Llama-3-8B: narrower products do not reach a GPU's rate
GPU_ROWS = 8192


class FailedRunError(Exception):
    """A run of the benchmark that ended with an error."""


class Run(TypedDict):
    """The cost of one run, as cost.json holds it.

    Attributes:
        name: of the work, such as `dpo`.
        side: `stock` or `harness`.
        wall: seconds from the start of the first process to the end of the last.
        seconds: by stage.
        pair_seconds: of a pair in the training loop without its first steps; the mean of several trials. Files of
            earlier versions have none.
        peak_memory_bytes: of the largest process: of torch's tensors on a GPU, of the resident set on a CPU.
        losses: per step; of the first trial where there are several.
    """

    name: str
    side: str
    wall: float
    seconds: dict[str, float]
    pair_seconds: NotRequired[float]
    peak_memory_bytes: int
    losses: list[float]


class TrialCost(TypedDict):
    """The cost of one trial, as `harness.bench.ours` prints it."""

    seconds: dict[str, float]
    trial_seconds: float
    peak_memory_bytes: dict[str, int]
    losses: list[float]
    step_ends: list[float]


class Printed(TypedDict, total=False):
    """The JSON that a run prints: `trials` by the harness; by TRL's script the same keys as one of these trials has."""

    peak_memory_bytes: int
    trials: list[TrialCost]
    seconds: dict[str, float]
    losses: list[float]
    step_ends: list[float]


class Bench:
    """The pairs, in one order for both sides, and the runs over them.

    Args:
        folder: for all files of the runs.
        model: a checkpoint's folder, or `embedded`.
        pairs: a file of pairs as text (`prompt`, `chosen`, `rejected`); None takes the embedded study's.
        num_pairs: number of pairs.
    """

    def __init__(self, folder: Path, *, model: str, pairs: str | None, num_pairs: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        only = [{"prompt": "Say yes.", "chosen": "yes", "rejected": "no"}]
        for split, prompt in (("dev", "Say yes."), ("golden", "Say no.")):
            write_jsonl(folder / f"{split}.jsonl", [only[0] | {"prompt": prompt}])
        train = pairs or "embedded"
        sizes = [f"train.{key}={STEP_PAIRS}" for key in ("batch_size", "micro_batch_size")]
        self.keys = [f"model.path={model}", *sizes, "train.epochs=1"]
        self.keys += [] if pairs is None else [f"data.train={Path(train).resolve()}"]
        self.keys += [f"data.{split}={folder / split}.jsonl" for split in ("dev", "golden")] if pairs else []
        self.keys += [f"data.max_train_pairs={num_pairs}"]
        self.config: RunConfig = load_run(["+method=dpo", *self.keys])
        self.inputs = Inputs(Checkpoints(derive))
        self.rows = self.inputs.tokens(self.config).train.rows
        if len(self.rows) < num_pairs:
            raise UsageError(f"--num-pairs {num_pairs}: {train} has {len(self.rows)} that can be trained on")
        self.rows = tuple(self.rows[i] for i in plan_of(self.config, self.rows).order)  # as they are trained on
        self._write_stock_pairs()

    def _write_stock_pairs(self) -> None:
        """Write the pairs as text in the order of the harness's plan, for the scripts."""
        by_id = {pair.pair_id: pair for pair in self.inputs.splits(self.config).train}
        ordered = [by_id[row.pair_id] for row in self.rows]
        write_jsonl(
            self.folder / "pairs.jsonl",
            [
                {
                    "prompt": pair.prompt[-1]["content"],
                    "chosen": pair.chosen[-1]["content"],
                    "rejected": pair.rejected[-1]["content"],
                }
                for pair in ordered
            ],
        )

    @property
    def model_dir(self) -> str:
        """Folder of the checkpoint, for the scripts."""
        return str(self.inputs.checkpoints.folder(self.config.model, self.config.results_dir))

    @property
    def shape(self) -> Shape:
        """The model's matrices."""
        from transformers import AutoConfig

        return shape_of_config(AutoConfig.from_pretrained(self.model_dir, trust_remote_code=False))

    def matmul_rate(self) -> float:
        """Measure this machine's matrix products in FLOP/s, in the precision that trains.

        A CPU multiplies by the model's widths, a GPU by at least those of a model of 8 billion weights.
        """
        import torch
        from transformers import AutoConfig

        text = AutoConfig.from_pretrained(self.model_dir, trust_remote_code=False).get_text_config()
        inner = text.hidden_size
        outer = getattr(text, "intermediate_size", None) or 4 * inner
        is_bf16 = uses_bf16(self.config)
        if not torch.cuda.is_available():
            return matmul_rate(inner, outer, bf16=is_bf16)
        inner, outer = max(inner, GPU_WIDTHS[0]), max(outer, GPU_WIDTHS[1])
        rate = matmul_rate(inner, outer, rows=GPU_ROWS, bf16=is_bf16)
        torch.cuda.empty_cache()  # for the runs, which are processes of their own
        return rate

    def stock(self, name: str, arm: str, **keys: float) -> Run:
        """Run one of TRL's scripts."""
        script = Path(__file__).with_name("stock.py")
        given = {"learning_rate": RATES[arm], **keys}
        command = [sys.executable, str(script), arm, self.model_dir, str(self.folder / "pairs.jsonl")]
        wall, found = _run_timed(
            [*command, str(self.folder / "stock"), *(f"{k}={json.dumps(v)}" for k, v in given.items())]
        )
        return {
            "name": name,
            "side": "stock",
            "wall": wall,
            "seconds": found["seconds"],
            "pair_seconds": steady_seconds(found["step_ends"]),
            "peak_memory_bytes": found["peak_memory_bytes"],
            "losses": found["losses"],
        }

    def stock_grid(self) -> Run:
        """Run the eight scripts of a grid one after the other."""
        runs = [self.stock("", "dpo", beta=beta) for beta in BETAS]
        runs += [self.stock("", "simpo", beta=beta, simpo_gamma=ratio * beta) for beta, ratio in SIMPO]
        return {
            **runs[0],
            "name": "grid",
            "wall": sum(run["wall"] for run in runs),
            "seconds": {key: sum(run["seconds"][key] for run in runs) for key in runs[0]["seconds"]},
            "pair_seconds": fmean(run["pair_seconds"] for run in runs),
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        }

    def harness(self, name: str, trials: list[list[str]], *more: str) -> Run:
        """Run trials by the harness in one process, with an empty cache of reference log-probs."""
        results = self.folder / f"results-{time.time_ns()}"
        shared = [*self.keys, f"results_dir={results}", "study=bench", *more]
        write_json(results / "trials.json", [[*trial, *shared] for trial in trials])
        wall, found = _run_timed([sys.executable, "-m", "harness.bench.ours", str(results / "trials.json")])
        stages: dict[str, float] = {}
        for trial in found["trials"]:
            for stage, seconds in trial["seconds"].items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        stages["import"] = wall - sum(trial["trial_seconds"] for trial in found["trials"])
        stages["around"] = sum(t["trial_seconds"] - sum(t["seconds"].values()) for t in found["trials"])
        return {
            "name": name,
            "side": "harness",
            "wall": wall,
            "seconds": stages,
            "pair_seconds": fmean(steady_seconds(trial["step_ends"]) for trial in found["trials"]),
            "peak_memory_bytes": found["peak_memory_bytes"],
            "losses": found["trials"][0]["losses"],
        }

    def trial(self, arm: str, **keys: float) -> list[str]:
        """Return the overrides of one trial at the benchmark's learning rate."""
        given = {"learning_rate": RATES[arm], **keys}
        return [f"+method={arm}", *(f"method.{key}={value}" for key, value in given.items())]

    def layout(self, workers: int, threads: int) -> Run:
        """Run two trials on all cores: in turn, or at once on a part of the cores each."""
        keys = f"train.threads={threads}"
        name = f"2 trials, {workers} worker{'s' * (workers > 1)} of {threads} threads"
        if workers == 1:
            return self.harness(name, [self.trial("dpo"), self.trial("simpo")], keys)
        start = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            runs = list(pool.map(lambda arm: self.harness(name, [self.trial(arm)], keys), ("dpo", "simpo")))
        stages = {**runs[0]["seconds"], **runs[1]["seconds"]}
        return {
            **runs[0],
            "wall": time.perf_counter() - start,
            "seconds": {key: max(run["seconds"].get(key, 0.0) for run in runs) for key in stages},
            "peak_memory_bytes": sum(run["peak_memory_bytes"] for run in runs),
        }

    def harness_grid(self, size: int = 8, name: str = "") -> Run:
        """Run the same grid, or its first trials, by the harness."""
        trials = [self.trial("dpo", beta=beta) for beta in BETAS]
        simpo = [self.trial("simpo", beta=beta, gamma_beta_ratio=ratio) for beta, ratio in SIMPO]
        both = [trial for pair in zip(trials, simpo, strict=True) for trial in pair]
        return self.harness(name or f"{size} trials", both[:size])


def warm_steps(num_steps: int) -> int:
    """Return how many steps at the start of a loop are left out of its seconds a pair."""
    return min(WARM_STEPS, num_steps - 1)


def steady_seconds(step_ends: Sequence[float]) -> float:
    """Return the seconds of a pair without the first steps.

    Args:
        step_ends: when training began and when each step ended, in seconds.
    """
    steps = len(step_ends) - 1
    first = warm_steps(steps)
    return (step_ends[-1] - step_ends[first]) / ((steps - first) * STEP_PAIRS)


def _run_timed(command: list[str]) -> tuple[float, Printed]:
    """Run a command; return its seconds and the JSON in its last line."""
    start = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if ran.returncode:
        raise FailedRunError(f"{' '.join(command[:4])} failed:\n{ran.stderr[-2000:]}")
    return wall, json.loads(ran.stdout.strip().splitlines()[-1])
