"""The declared config of scoring: what is compared with what, by which judge, reward model and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from harness.config.arms import MethodConfig, bounded


class Structured(Enum):
    """Whether a judge is held to a JSON schema: `auto` where the endpoint accepts one."""

    auto = "auto"
    always = "always"
    never = "never"


@dataclass
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint that compares two answers.

    Attributes:
        model: the name that the endpoint knows it by; pin a dated one.
        base_url: of the endpoint; null is the client's own default (api.openai.com, or OPENAI_BASE_URL).
        api_key_env: name of the environment variable that holds the key (`harness.score.judge_endpoint` lists the
            allowed names); an endpoint without keys needs none.
        template: a name in `conf/judge/`, or a file of that form.
        structured: see `Structured`.
        max_tokens, temperature: of its answer.
        concurrency: requests under way at once.
        timeout_seconds: of one request.
        max_retries: of a request that was refused for now (429), failed (5xx) or got no answer; waits double, or are
            what the endpoint asks for.
        input_price, output_price: US dollars for a million tokens; null where nobody pays.
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
    """A sequence-classification reward model: a folder or a Hub id, with safetensors.

    Attributes:
        max_length: tokens of prompt and answer; longer ones are unscored.
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
        difficulty: AlpacaEval's instruction difficulty, a CSV with one number a golden prompt, in the file's order.
        gamed: AlpacaEval's comparisons of gamed baselines, its df_gamed.csv.
    """

    of: str | None = bounded(None, choices=("judge", "reward_model"))
    difficulty: str | None = None
    gamed: str | None = None


@dataclass
class BenchmarkConfig:
    """Benchmarks of lm-evaluation-harness, run on the base and on every policy that answers golden.

    Attributes:
        tasks: names of tasks; each gives the scorer `lm_eval:TASK`.
        include_path: a folder of task files of your own; with it only these are known.
        metric: of each task that has several; null takes the task's first.
        limit: documents a task, the first ones; null for all.
        num_fewshot: null for the task's own.
        chat_template: apply the tokenizer's chat template.
    """

    tasks: list[str] = field(default_factory=list, metadata={"distinct": True, "may_be_empty": True})
    include_path: str | None = None
    metric: str | None = None
    limit: int | None = bounded(None, at_least=2)
    num_fewshot: int | None = bounded(None, at_least=0)
    batch_size: int = bounded(8, at_least=1)
    chat_template: bool = True


@dataclass
class ScoreConfig:
    """What is scored beside the metric and the guards, and against what.

    Attributes:
        scorers: names of scorers, or Python files with a scorer of your own.
        baseline: answers that judge and reward model compare with: a file of completions (ours, AlpacaEval's
            model_outputs.json or Arena-Hard's model_answer); null is the SFT base's.
        calibration_pairs: pairs with known labels that the judge is held against.
        max_cost_usd: what judging may cost in one call of the command.
        labeller: who labelled the training pairs, such as `gpt-4`; a judge that is the same raises a warning.
        head_to_head: let the judge also compare the two arms' answers with each other, seed by seed.
    """

    scorers: list[str] = field(default_factory=list, metadata={"distinct": True, "may_be_empty": True})
    baseline: str | None = None
    calibration_pairs: str | None = None
    max_cost_usd: float | None = bounded(None, at_least=0.0)
    labeller: str | None = None
    head_to_head: bool = False
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    length_control: LengthControlConfig = field(default_factory=LengthControlConfig)
    lm_eval: BenchmarkConfig = field(default_factory=BenchmarkConfig)


EMBEDDED = "embedded"
MAX_SEED = 2**32 - 1  # NumPy's global generator takes no larger one
GUARD = "{metric: NAME, margin: a number between 0 and 1}"


class Engine(Enum):
    """Who computes the loss: `paired`, the harness's thin subclasses of TRL's trainers, or `stock`, TRL's own."""

    paired = "paired"
    stock = "stock"


class Tuning(Enum):
    """Which weights are trained: a LoRA adapter, one on a base in 4 bits (QLoRA), or all."""

    lora = "lora"
    qlora = "qlora"
    full = "full"


class Reference(Enum):
    """Where the SFT base's log-probs come from: computed once and stored, or computed anew in each step.

    `adapter_off` runs the base by switching the adapter off (TRL's way with LoRA); `separate` holds a second model.
    """

    cached = "cached"
    adapter_off = "adapter_off"
    separate = "separate"


class Precision(Enum):
    """Arithmetic of training; `auto` is fp32 on a CPU and bf16 on a GPU that has it."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Template(Enum):
    """Whether plain-text prompts are put through the chat template: `auto` does so where the tokenizer has one."""

    auto = "auto"
    never = "never"


@dataclass
class ModelConfig:
    """The SFT checkpoint that both arms start from: a folder, a Hub id, or `embedded`."""

    path: str = EMBEDDED
    revision: str | None = None
    chat_template: str | None = None


@dataclass
class DataConfig:
    """The pairs, and how they are split; see `harness.data.splits.DataSpec` for the meaning of the keys it mirrors."""

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


@dataclass
class TrainConfig:
    """All that must be equal between arms. Keys that are null come from the profile (`conf/profile/`).

    `reference` to `metrics_steps` are what makes the paired engine fast, each to be switched off; losses stay the same
    up to rounding (see `benchmarks/`).
    """

    engine: Engine = Engine.paired
    tuning: Tuning = Tuning.lora
    lora_rank: int = bounded(16, at_least=1)
    lora_alpha: int = bounded(32, at_least=1)
    epochs: int | None = bounded(None, at_least=1)
    batch_size: int | None = bounded(None, at_least=1)
    micro_batch_size: int | None = bounded(None, at_least=1)
    scheduler: str = bounded("cosine", choices=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup_ratio: float = bounded(0.1, at_least=0.0, below=1.0)
    weight_decay: float = bounded(0.0, at_least=0.0)
    max_grad_norm: float = bounded(1.0, above=0.0)
    precision: Precision = Precision.auto
    gradient_checkpointing: bool | None = None
    threads: int | None = bounded(None, at_least=1, at_most=1024)
    checkpoint_steps: int | None = bounded(None, at_least=1)
    reference: Reference = Reference.cached
    share_prefix: bool = True
    completion_head: bool = True
    fuse_adapters: bool = True
    group_lengths: bool = True
    reuse_base: bool = True
    metrics_steps: int = bounded(10, at_least=1)
    collapse_learning_rate: float | None = bounded(None, above=0.0)


@dataclass
class GenerateConfig:
    """Decoding, identical for every arm and for the SFT base. Temperature 0 is greedy.

    A null `backend` is vLLM where it is installed, a GPU is there and adapters are trained; else transformers.
    """

    backend: str | None = bounded(None, choices=("transformers", "vllm"))
    max_new_tokens: int | None = bounded(None, at_least=1)
    batch_size: int | None = bounded(None, at_least=1)
    temperature: float = bounded(0.0, at_least=0.0, at_most=10.0)
    top_p: float = bounded(1.0, above=0.0, at_most=1.0)
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)


@dataclass
class SearchConfig:
    """How an arm's config is searched for on dev where its space has several; the same for every arm.

    Attributes:
        sampler: `grid` (all combinations), `random`, or `tpe` (Optuna's).
        trials: configs an arm; a grid has as many as it has.
        seed: of the sampler.
        keep: share of the configs that go on from one tuning seed to the next (successive halving: 0.5); 1 trains
            all configs with all tuning seeds.
        batch: configs an arm that `tpe` suggests at once.
    """

    sampler: str = bounded("grid", choices=("grid", "random", "tpe"))
    trials: int | None = bounded(None, at_least=2, at_most=10_000)
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)
    keep: float = bounded(1.0, above=0.0, at_most=1.0)
    batch: int = bounded(4, at_least=1)


@dataclass
class DecideConfig:
    """The decision rule, registered before the first trial. A null metric is the golden set's own (see `trial`).

    Attributes:
        metric: the scorer that decides.
        margin: the smallest difference that matters.
        alpha: error rate.
        guards: metrics on which the winner must not be worse.
        looks: numbers of seeds after which golden is decided on, such as [3,5,8], each at alpha / number of looks; the
            study ends at the first winner or tie. Null: one look, with all seeds.
    """

    metric: str | None = None
    margin: float = bounded(0.05, above=0.0, below=1.0)
    alpha: float = bounded(0.05, above=0.0, below=0.5)
    guards: list[dict[str, Any]] = field(default_factory=list, metadata={"items": GUARD})
    looks: list[int] | None = field(default=None, metadata={"at_least": 2, "at_most": 1000, "distinct": True})


@dataclass
class FamilyConfig:
    """Studies that differ in one key: one study for each of its values, all else equal.

    Attributes:
        key: such as `data.label_noise`.
        values: its values.
    """

    key: str | None = None
    values: list[float] = field(default_factory=list, metadata={"distinct": True, "may_be_empty": True})


@dataclass
class TrackingConfig:
    """Where runs are mirrored."""

    backend: str = bounded("wandb", choices=("wandb", "none"))
    project: str = "dpo-vs-simpo"
    entity: str | None = None
    mode: str = bounded("offline", choices=("offline", "online"))


@dataclass
class AccelerateConfig:
    """Several processes that train one trial together, on one machine, by `accelerate launch`; `conf/accelerate/`.

    The batch plan and what comes out stay the same (up to rounding), so that none of it is part of a trial's id.

    Attributes:
        num_processes: of a trial; with GPUs one each. 1 trains in the trial's own process.
        distributed_type: MULTI_GPU is DDP; it runs on CPUs, too, over gloo.
        fsdp_config, deepspeed_config: as in accelerate's own config file.
    """

    num_processes: int = bounded(1, at_least=1, at_most=64)
    distributed_type: str = bounded("NO", choices=("NO", "MULTI_GPU", "FSDP", "DEEPSPEED"))
    fsdp_config: dict[str, Any] = field(default_factory=dict)
    deepspeed_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunConfig:
    """One trial, or, with `arms` and `seeds`, the study that it belongs to.

    Attributes:
        method: the arm; chosen on the command line with `+method=`.
        seed: seed of the LoRA initialisation and of the order of the data; the same for all arms of a study.
        seeds: seeds of the sweep where the command line has no `seed=`; null takes the profile's.
        tuning_seeds: seeds that configs are selected with, where an arm has several; none of them may decide.
        search: how the configs of an arm are found.
        family: several studies that differ in one key.
        arms: per arm a space, `{arm: {key: value or list of values}}`, expanded for that arm only.
        study: name of the study's folder; null derives one from the question.
        results_dir: where studies are kept.
        question: one sentence for the report.
        plan: print the trials and stop.
        measure_costs: train DPO also with each other way to its reference, to compare what they cost.
        allow_unequal_budgets: let one arm have more configs to select from than another; the verdict then warns.
        keep: whose weights stay on disk: of all trials, of those that decide (`confirmed`), or of none once scored.
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
    seeds: list[int] | None = field(default=None, metadata={"at_least": 0, "at_most": MAX_SEED, "distinct": True})
    tuning_seeds: list[int] | None = field(
        default=None, metadata={"at_least": 0, "at_most": MAX_SEED, "distinct": True}
    )
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
    allow_unequal_budgets: bool = False
