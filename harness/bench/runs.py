"""The runs of the benchmark: TRL's own scripts and the harness, on the same pairs, each run in a process -> `Run`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from harness.config.checkpoint import Checkpoints
from harness.config.schema import RunConfig
from harness.data.inputs import Inputs
from harness.data.tokens import TokenPair
from harness.study.errors import UsageError
from harness.study.files import write_json, write_jsonl
from harness.sweep.problems import load_run
from harness.train.derived import derive
from harness.train.memory import plan_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BETAS = (0.01, 0.05, 0.1, 0.5)
SIMPO = ((2.0, 0.3), (2.0, 0.5), (2.5, 0.5), (10.0, 0.5))  # beta, gamma over beta
RATES = {"dpo": 5e-6, "simpo": 5e-6}


class Run(TypedDict):
    """The cost of one run, as cost.json holds it.

    Attributes:
        name: of the work, such as `dpo`.
        side: `stock` or `harness`.
        wall: seconds from the start of the first process to the end of the last.
        seconds: by stage.
        peak_memory_bytes: of the largest process.
        losses: per step; of the first trial where there are several.
    """

    name: str
    side: str
    wall: float
    seconds: dict[str, float]
    peak_memory_bytes: int
    losses: list[float]


class TrialCost(TypedDict):
    """The cost of one trial, as `harness.bench.ours` prints it."""

    seconds: dict[str, float]
    trial_seconds: float
    peak_memory_bytes: dict[str, int]
    losses: list[float]


class Printed(TypedDict, total=False):
    """The JSON that a run prints: `trials` by the harness, `seconds` per stage and `losses` by TRL's script."""

    peak_memory_bytes: int
    trials: list[TrialCost]
    seconds: dict[str, float]
    losses: list[float]


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
        self.keys = [f"model.path={model}", "train.batch_size=4", "train.micro_batch_size=4", "train.epochs=1"]
        self.keys += [] if pairs is None else [f"data.train={Path(train).resolve()}"]
        self.keys += [f"data.{split}={folder / split}.jsonl" for split in ("dev", "golden")] if pairs else []
        self.keys += [f"data.max_train_pairs={num_pairs}"]
        self.config: RunConfig = load_run(["+method=dpo", *self.keys])
        self.inputs = Inputs(Checkpoints(derive))
        self.rows = self.inputs.tokens(self.config).train.rows
        if len(self.rows) < num_pairs:
            raise UsageError(f"--num-pairs {num_pairs}: {train} has {len(self.rows)} that can be trained on")
        self._write_stock_pairs()

    def _write_stock_pairs(self) -> None:
        """Write the pairs as text in the order of the harness's plan, for the scripts."""
        by_id = {pair.pair_id: pair for pair in self.inputs.splits(self.config).train}
        ordered = [by_id[self.rows[i].pair_id] for i in plan_of(self.config, self.rows).order]
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


def _run_timed(command: list[str]) -> tuple[float, Printed]:
    """Run a command; return its seconds and the JSON in its last line."""
    start = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed:\n{ran.stderr[-2000:]}")
    return wall, json.loads(ran.stdout.strip().splitlines()[-1])


def needed_flops(model_config: PretrainedConfig, rows: Sequence[TokenPair], *, lora_rank: int) -> float:
    """Return the floating-point operations of one LoRA pass over the rows, each token computed once.

    `4 N_blk D + 4 N_head D_c + 6 N_lora D + 8 L h Σ s²/2`: forward and backward through frozen weights, the head on
    answer tokens only, adapters with their own gradient, and causal attention (PaLM, arXiv 2204.02311, appendix B,
    counts 6 N D for training all weights; frozen ones need no gradient of their own). With rank 0 half of it is the
    forward pass alone, as for DPO's reference.

    Args:
        model_config: the model's config.
        rows: the pairs of one pass; the prompt of a pair counts once.
        lora_rank: of the adapters on all linear layers.
    """
    text = model_config.get_text_config()
    tokens = sum(len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows)
    answers = sum(len(row.chosen_ids) + len(row.rejected_ids) for row in rows)
    squares = sum(
        len(row.prompt_ids) ** 2 / 2
        + sum(len(answer) * (len(row.prompt_ids) + len(answer) / 2) for answer in (row.chosen_ids, row.rejected_ids))
        for row in rows
    )
    blocks = 4 * block_parameters(text) * tokens
    head = 4 * text.vocab_size * text.hidden_size * answers
    adapters = 6 * lora_parameters(text, lora_rank) * tokens
    return float(blocks + head + adapters + 8 * text.num_hidden_layers * text.hidden_size * squares)


def lora_parameters(text: PretrainedConfig, rank: int) -> int:
    """Count the weights of adapters on all linear layers of a Llama-like model."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    shapes = [(text.hidden_size, queries), (text.hidden_size, keys), (text.hidden_size, keys)]
    shapes += [(queries, text.hidden_size)]
    shapes += [(text.hidden_size, text.intermediate_size)] * 2 + [(text.intermediate_size, text.hidden_size)]
    return text.num_hidden_layers * rank * sum(inputs + outputs for inputs, outputs in shapes)


def block_parameters(text: PretrainedConfig) -> int:
    """Count the weights of the matrices in the layers of a Llama-like model."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    attention = text.hidden_size * (2 * queries + 2 * keys)
    return int(text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size))
