"""The declared config of scoring: what is compared with what, by which judge, reward model and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from harness.arms import bounded


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
        api_key_env: name of the environment variable that holds the key (see `harness.judge.key` for which may); an
            endpoint without keys needs none.
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
