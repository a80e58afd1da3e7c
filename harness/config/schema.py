"""Every config key: its type, its default and its range. Who needs a key stands in the docstring of its section.

Keys that are null take their value from the defaults of the model in `conf/profile/`. The keys of the arms are in
`harness.config.arms`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from harness.config.arms import Limits, MethodConfig, bounded
from harness.study.registration import ALPHA, MARGIN

EMBEDDED = "embedded"
MAX_SEED = 2**32 - 1  # NumPy's global generator takes no larger one
SEEDS = Limits(at_least=0, at_most=MAX_SEED, distinct=True)
GUARD = "{metric: NAME, margin: a number between 0 and 1}"


@dataclass
class ModelConfig:
    """The SFT checkpoint that all arms start from.

    Attributes:
        path: a folder, a Hub id, or `embedded`: to train on your own checkpoint.
        revision: commit, tag or branch of a Hub id: to pin what is downloaded.
        chat_template: file of a Jinja chat template: for a tokenizer without one, or with a wrong one.
    """

    path: str = EMBEDDED
    revision: str | None = None
    chat_template: str | None = None


class Template(Enum):
    """Whether plain-text prompts are put through the chat template: `auto` does so where the tokenizer has one."""

    auto = "auto"
    never = "never"


@dataclass
class DataConfig:
    """The preference pairs and their splits.

    Attributes:
        path: a file, folder or Hub data set: for data that come as one file. It is split by prompt into those of train,
            dev and golden that are not given.
        revision: of the Hub data sets: to pin what is downloaded.
        train: training pairs. Where neither dev nor path is given, dev is taken out of them by prompt.
        dev: prompts with checks, pairs, or both, on which configs are selected.
        golden: prompts with checks, pairs, or both, on which the study is decided.
        dev_fraction: share of the prompts that become dev, where dev is taken out of another file.
        golden_fraction: share of the prompts that become golden, where golden is taken out of another file.
        split_seed: of the split by prompt: to repeat a study on another split.
        max_bad_fraction: share of a file's rows that may be unusable: for files with known defects.
        label_noise: share of the training pairs whose labels are flipped: to study wrong labels.
        label_noise_seed: selects the pairs whose labels are flipped.
        max_train_pairs: number of training pairs to keep, a fixed random subset: for short trials.
        max_dev_prompts: number of dev prompts to keep: where answers or judges are expensive.
        max_golden_prompts: number of golden prompts to keep: where answers or judges are expensive.
        max_length: tokens of prompt and longer answer; longer pairs are dropped: to bound memory.
        template: see `Template`: for base models trained on raw text.
        turns: turns of MT-Bench that are answered: `both`, or the `first` alone, which takes half the time.
        answer_check: kind of check that the column `answer` (or `label`, `target`, `gold`) of dev and golden becomes:
            for questions with answers, such as GSM8K's.
    """

    path: str | None = None
    revision: str | None = None
    train: str | None = None
    dev: str | None = None
    golden: str | None = None
    dev_fraction: float = bounded(0.1, above=0.0, below=1.0)
    golden_fraction: float = bounded(0.2, above=0.0, below=1.0)
    split_seed: int = bounded(0, at_least=0)
    max_bad_fraction: float = bounded(0.01, at_least=0.0, at_most=1.0)
    label_noise: float = bounded(0.0, at_least=0.0, at_most=1.0)
    label_noise_seed: int = bounded(0, at_least=0)
    max_train_pairs: int | None = bounded(None, at_least=1)
    max_dev_prompts: int | None = bounded(None, at_least=1)
    max_golden_prompts: int | None = bounded(None, at_least=1)
    max_length: int = bounded(1024, at_least=8)
    template: Template = Template.auto
    turns: str = bounded("both", choices=("both", "first"))
    answer_check: str | None = bounded(None, choices=("contains", "equals", "number"))


class Engine(Enum):
    """Engine of the training step: `paired`, thin subclasses of TRL's trainers, or `stock`, TRL's own."""

    paired = "paired"
    stock = "stock"


class Tuning(Enum):
    """Weights to train: a LoRA adapter, a LoRA adapter on a base in 4 bits (QLoRA), or all weights."""

    lora = "lora"
    qlora = "qlora"
    full = "full"


class Reference(Enum):
    """Source of the SFT base's log-probs in DPO's loss.

    `cached` computes them once and stores them. `adapter_off` switches the adapter off in each step, as TRL does with
    LoRA. `separate` holds a second model.
    """

    cached = "cached"
    adapter_off = "adapter_off"
    separate = "separate"


class Precision(Enum):
    """Arithmetic of training; `auto` is fp32 on a CPU and bf16 on a GPU that has it."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Optimizer(Enum):
    """AdamW of all arms: `auto` is torch's fused one on a GPU and its plain one (`adamw`) on a CPU.

    `adamw_8bit` is bitsandbytes': its state takes a quarter of the memory (arXiv 2110.02861).
    """

    auto = "auto"
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"


class Kernels(Enum):
    """Kernels of the model's norms and gated layers: transformers' own, or those of Liger (arXiv 2410.10989)."""

    none = "none"
    liger = "liger"


ALL_LINEAR = "all-linear"
TARGETS = Limits(distinct=True, items="different names of layers, such as [q_proj,v_proj], or [all-linear]")


def is_pattern(target: str) -> bool:
    """Return whether an item of `train.lora_targets` is a regular expression, and no end of a layer's name."""
    return target != ALL_LINEAR and re.fullmatch(r"[A-Za-z0-9_.]+", target) is None


@dataclass
class LeversConfig:
    """Switches of the paired engine, for benchmarks only: each turns off one saving that `harness.bench` measures.

    Losses and gradients stay the same up to rounding, so that no study needs another value.

    Attributes:
        share_prefix: compute each prompt once for both answers.
        completion_head: run the LM head on answer tokens only.
        fuse_adapters: compute LoRA layers with fused kernels in place of PEFT's own layers.
        group_lengths: sort the rows of each optimiser step by length into micro-batches.
        reuse_base: keep the base loaded from one trial to the next.
        metrics_steps: optimiser steps between two computations of the metrics that need the whole LM head.
    """

    share_prefix: bool = True
    completion_head: bool = True
    fuse_adapters: bool = True
    group_lengths: bool = True
    reuse_base: bool = True
    metrics_steps: int = bounded(10, at_least=1)


@dataclass
class TrainConfig:
    """Training settings, equal for all arms.

    Attributes:
        engine: see `Engine`: to compare with TRL's own trainers.
        tuning: see `Tuning`: what fits into memory, and what will be shipped.
        lora_rank, lora_alpha: of the adapter: to repeat a recipe, or to learn more at more cost.
        lora_targets: the adapted layers: ends of names (`[q_proj,v_proj]`), or regular expressions of whole names;
            `[all-linear]` is all linear layers but the head: to repeat a published recipe.
        lora_dropout: of the adapter's input, equal in all arms: to repeat a published recipe.
        epochs: passes over the training pairs: few for many pairs, more for few.
        batch_size: pairs per optimiser step: to repeat a recipe, together with its learning rate.
        micro_batch_size: pairs per forward pass: to fit the memory. It must divide batch_size.
        optimizer: see `Optimizer`: to train all weights in less memory, or to repeat a recipe.
        scheduler: of the learning rate: to repeat a published recipe; likewise the next three keys.
        warmup_ratio: share of the steps in which the learning rate rises.
        weight_decay: of AdamW: to repeat a published recipe.
        max_grad_norm: gradients are clipped to it: to repeat a published recipe.
        precision: see `Precision`: to repeat a GPU's arithmetic on a CPU, or the other way round.
        kernels: see `Kernels`: to train faster on a GPU.
        gradient_checkpointing: recompute activations to save memory; null decides by the memory that is free.
        threads: of torch on a CPU; null takes torch's own number: for several trials on one machine.
        checkpoint_minutes: time between two checkpoints: the most that a killed trial loses.
        checkpoint_steps: optimiser steps between two, in place of minutes: for tests, and trials of equal speed.
        reference: see `Reference`: to compare what they cost.
        levers: for benchmarks only.
    """

    engine: Engine = Engine.paired
    tuning: Tuning = Tuning.lora
    lora_rank: int = bounded(16, at_least=1)
    lora_alpha: int = bounded(32, at_least=1)
    lora_dropout: float = bounded(0.0, at_least=0.0, below=1.0)
    lora_targets: list[str] = field(default_factory=lambda: [ALL_LINEAR], metadata={"limits": TARGETS})
    epochs: int | None = bounded(None, at_least=1)
    batch_size: int | None = bounded(None, at_least=1)
    micro_batch_size: int | None = bounded(None, at_least=1)
    optimizer: Optimizer = Optimizer.auto
    scheduler: str = bounded("cosine", choices=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup_ratio: float = bounded(0.1, at_least=0.0, below=1.0)
    weight_decay: float = bounded(0.0, at_least=0.0)
    max_grad_norm: float = bounded(1.0, above=0.0)
    precision: Precision = Precision.auto
    kernels: Kernels = Kernels.none
    gradient_checkpointing: bool | None = None
    threads: int | None = bounded(None, at_least=1, at_most=1024)
    checkpoint_minutes: float = bounded(10.0, above=0.0)
    checkpoint_steps: int | None = bounded(None, at_least=1)
    reference: Reference = Reference.cached
    levers: LeversConfig = field(default_factory=LeversConfig)


@dataclass
class AccelerateConfig:
    """Processes that train one trial together on one machine, started by `accelerate launch`; see `conf/accelerate/`.

    The batch plan and the result stay the same up to rounding, so that no key is part of a trial id.

    Attributes:
        num_processes: per trial, one GPU each where there are GPUs: for models that train too slowly on one.
        distributed_type: MULTI_GPU is DDP, which also runs on CPUs; FSDP and DEEPSPEED split models too large for one.
        fsdp_config, deepspeed_config: settings in accelerate's own config file.
    """

    num_processes: int = bounded(1, at_least=1, at_most=64)
    distributed_type: str = bounded("NO", choices=("NO", "MULTI_GPU", "FSDP", "DEEPSPEED"))
    fsdp_config: dict[str, Any] = field(default_factory=dict)
    deepspeed_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class GenerateConfig:
    """Decoding, identical for all arms and for the SFT base.

    Attributes:
        backend: null is vLLM where it is installed, a GPU is there and adapters are trained; else transformers.
        max_new_tokens: tokens per answer: as many as answers of the product may have.
        batch_size: prompts per batch: to fit the memory.
        temperature: 0 is greedy; a higher one answers as a product that samples.
        top_p: probability mass to sample from, with a temperature.
        seed: of the sampling: to see how much the answers vary.
        reasoning: blocks as `<think>`. `auto` and `drop` cut them off before answers are scored; `drop` also takes them
            out of both answers of each pair. `keep` scores and trains on them: to decide on the reasoning, too.
        vllm_python: the Python interpreter that has vLLM: where vLLM needs another version of torch than training.
    """

    backend: str | None = bounded(None, choices=("transformers", "vllm"))
    max_new_tokens: int | None = bounded(None, at_least=1)
    batch_size: int | None = bounded(None, at_least=1)
    temperature: float = bounded(0.0, at_least=0.0, at_most=10.0)
    top_p: float = bounded(1.0, above=0.0, at_most=1.0)
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)
    reasoning: str = bounded("auto", choices=("auto", "keep", "drop"))
    vllm_python: str | None = None


class Structured(Enum):
    """Whether the judge's reply must follow a JSON schema: `auto` where the endpoint accepts one."""

    auto = "auto"
    always = "always"
    never = "never"


@dataclass
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint that compares two answers.

    Attributes:
        model: name of the model at the endpoint; pin a dated one.
        base_url: address of the endpoint; null is the client's default (api.openai.com, or OPENAI_BASE_URL).
        api_key_env: environment variable with the key; `harness.score.judge_endpoint` lists the allowed names. An
            endpoint without keys needs none.
        template: prompt template: a name in `conf/judge/`, or a file of that form.
        structured: see `Structured`: for endpoints that wrongly claim, or hide, support for schemas.
        max_tokens, temperature: of the reply: longer for templates that reason first.
        concurrency: simultaneous requests: within the endpoint's rate limit.
        timeout_seconds: per request: longer for slow models.
        max_retries: of a request that was refused for now (429), failed (5xx) or got no reply. Waits double, or follow
            the endpoint's Retry-After.
        input_price, output_price: US dollars per million tokens, for `plan=true` and score.max_cost_usd; null is free.
    """

    model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    template: str = "alpacaeval"
    structured: Structured = Structured.auto
    max_tokens: int = bounded(512, at_least=1)
    temperature: float = bounded(0.0, at_least=0.0, at_most=2.0)
    concurrency: int = bounded(8, at_least=1, at_most=256)
    timeout_seconds: float = bounded(60.0, above=0.0)
    max_retries: int = bounded(5, at_least=0, at_most=20)
    input_price: float | None = bounded(None, at_least=0.0)
    output_price: float | None = bounded(None, at_least=0.0)


@dataclass
class RewardModelConfig:
    """A sequence-classification reward model with safetensors.

    Attributes:
        path: a folder or a Hub id: to score answers without a judge.
        revision: of a Hub id: to pin what is downloaded.
        batch_size: answers per forward pass: to fit the memory.
        max_length: tokens of prompt and answer, beyond which they are unscored: what the model was trained on.
    """

    path: str | None = None
    revision: str | None = None
    batch_size: int = bounded(8, at_least=1)
    max_length: int = bounded(4096, at_least=8)


@dataclass
class LengthControlConfig:
    """Length-controlled win rates.

    Attributes:
        of: the scorer whose preferences are controlled; null is the judge where there is one, else the reward model.
        difficulty: AlpacaEval's instruction difficulty, a CSV with one number per golden prompt, in the file's order:
            to compare with AlpacaEval's leaderboard.
        gamed: AlpacaEval's comparisons of gamed baselines, df_gamed.csv: to compare with AlpacaEval's leaderboard.
    """

    of: str | None = bounded(None, choices=("judge", "reward_model"))
    difficulty: str | None = None
    gamed: str | None = None


@dataclass
class BenchmarkConfig:
    """Benchmarks of lm-evaluation-harness, run on the base and on every policy that answers golden.

    Attributes:
        tasks: names of tasks; each adds the scorer `lm_eval:TASK`, mostly as a guard.
        include_path: a folder of your own task files; with it only these are known.
        metric: of tasks that have several; null takes the task's first.
        limit: documents per task, the first ones: for short runs; null for all.
        num_fewshot: examples in front of each document: to repeat a published setting; null for the task's own.
        batch_size: documents per batch: to fit the memory.
        chat_template: apply the tokenizer's chat template; false for base models.
    """

    tasks: list[str] = field(default_factory=list, metadata={"limits": Limits(distinct=True, may_be_empty=True)})
    include_path: str | None = None
    metric: str | None = None
    limit: int | None = bounded(None, at_least=2)
    num_fewshot: int | None = bounded(None, at_least=0)
    batch_size: int = bounded(8, at_least=1)
    chat_template: bool = True


@dataclass
class ScoreConfig:
    """Scorers in addition to the metric and the guards, and the answers that they compare with.

    Attributes:
        scorers: names of scorers, or Python files with your own scorer.
        baseline: answers that judge and reward model compare with: a file of completions (ours, AlpacaEval's
            model_outputs.json or Arena-Hard's model_answer); null is the SFT base's.
        calibration_pairs: pairs with known labels: to measure the judge's own error.
        max_cost_usd: limit on the judge's cost per command.
        labeller: who labelled the training pairs, such as `gpt-4`; a judge of the same name raises a warning.
        judge, reward_model, length_control, lm_eval: settings of these scorers.
    """

    scorers: list[str] = field(default_factory=list, metadata={"limits": Limits(distinct=True, may_be_empty=True)})
    baseline: str | None = None
    calibration_pairs: str | None = None
    max_cost_usd: float | None = bounded(None, at_least=0.0)
    labeller: str | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    length_control: LengthControlConfig = field(default_factory=LengthControlConfig)
    lm_eval: BenchmarkConfig = field(default_factory=BenchmarkConfig)


@dataclass
class DecideConfig:
    """The decision rule, registered before the first trial.

    Attributes:
        metric: the scorer that decides: for a golden set with several; null is its own.
        margin: the smallest difference that matters to you.
        alpha: error rate: smaller where a wrong winner is expensive.
        guards: metrics on which the winner must not be worse, each with a margin.
        looks: numbers of seeds after which golden is decided on, such as [3,5,8], each at alpha / number of looks: to
            stop at the first winner or tie. Null: one look, with all seeds.
    """

    metric: str | None = None
    margin: float = bounded(MARGIN, above=0.0, below=1.0)
    alpha: float = bounded(ALPHA, above=0.0, below=0.5)
    guards: list[dict[str, Any]] = field(default_factory=list, metadata={"limits": Limits(items=GUARD)})
    looks: list[int] | None = field(default=None, metadata={"limits": Limits(at_least=2, at_most=1000, distinct=True)})


@dataclass
class SearchConfig:
    """Search for an arm's config on dev where its space has several; the same for all arms.

    Attributes:
        sampler: `grid` (all combinations), `random`, or `tpe` (Optuna's): for spaces too large for a grid.
        trials: configs per arm, with `random` and `tpe`.
        seed: of the sampler.
        keep: share of the configs that go on from one tuning seed to the next (successive halving: 0.5): to save
            trials. 1 trains all configs with all tuning seeds.
        batch: configs per arm that `tpe` suggests at once: as many as run beside each other.
    """

    sampler: str = bounded("grid", choices=("grid", "random", "tpe"))
    trials: int | None = bounded(None, at_least=2, at_most=10_000)
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)
    keep: float = bounded(1.0, above=0.0, at_most=1.0)
    batch: int = bounded(4, at_least=1)


@dataclass
class FamilyConfig:
    """Studies that differ in one key: one study per value, all else equal.

    Attributes:
        key: the key that differs, such as `data.label_noise`: to see how the verdict depends on it.
        values: its values, one study each.
    """

    key: str | None = None
    values: list[float] = field(default_factory=list, metadata={"limits": Limits(distinct=True, may_be_empty=True)})


@dataclass
class TrackingConfig:
    """Experiment tracker that mirrors the trials.

    Attributes:
        backend: `none` where no W&B files are wanted.
        project, entity: of the W&B runs: to find them among those of a team.
        mode: `online` sends while trials run; `offline` keeps files for `wandb sync`.
    """

    backend: str = bounded("wandb", choices=("wandb", "none"))
    project: str = "dpo-vs-simpo"
    entity: str | None = None
    mode: str = bounded("offline", choices=("offline", "online"))


@dataclass
class RunConfig:
    """One trial, or, with `arms` and `seeds`, the study that it belongs to.

    Attributes:
        method: the arm; chosen on the command line with `+method=`, one or several.
        model, data, train, generate, score, decide, tracking, accelerate: sections, see their classes.
        seed: of the LoRA initialisation and of the order of the data; the same for all arms of a study.
        seeds: seeds of the sweep, for presets in `sweeps/`; `seed=` on the command line replaces them.
        tuning_seeds: seeds that configs are selected with, where an arm has several; none of them may decide.
        search: search for the configs of an arm.
        family: several studies that differ in one key.
        arms: search space per arm, `{arm: {key: value or list of values}}`.
        study: name of the study's folder: to add seeds or arms to it; null derives one from the question.
        results_dir: folder of the studies: for a disk with room.
        question: one sentence for the report: for those who read it without you.
        plan: print the trials and their expected cost, then stop: before an expensive sweep.
        measure_costs: train DPO also with each other reference mode, to compare their costs.
        allow_unequal_budgets: let one arm have more configs than another; the verdict then warns.
        keep: whose weights stay on disk: of all trials, of those that decide (`confirmed`), or of none once scored.
        expect: the verdict that a script counts on, such as `simpo` or `tie`: another one exits with 3.
        retry_failed: run trials again whose error came back when they ran a second time; the others run again anyway.
    """

    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    decide: DecideConfig = field(default_factory=DecideConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    accelerate: AccelerateConfig = field(default_factory=AccelerateConfig)
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)
    seeds: list[int] | None = field(default=None, metadata={"limits": SEEDS})
    tuning_seeds: list[int] | None = field(default=None, metadata={"limits": SEEDS})
    search: SearchConfig = field(default_factory=SearchConfig)
    family: FamilyConfig = field(default_factory=FamilyConfig)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    study: str | None = None
    results_dir: str = "results"
    question: str = "Which of the two should be shipped?"
    plan: bool = False
    measure_costs: bool = False
    keep: str = bounded("all", choices=("all", "confirmed", "none"))
    retry_failed: bool = False
    expect: str | None = None
    allow_unequal_budgets: bool = False

    @property
    def study_folder(self) -> Path:
        """The study's folder; its name is known."""
        return Path(self.results_dir) / str(self.study)
