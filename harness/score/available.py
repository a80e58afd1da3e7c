"""Which scorers a study can have and will run, by its config; what is wrong with them before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.config.checkpoint import base_sha256, checkpoint_dir
from harness.config.keys import shown
from harness.config.schema import ModelConfig, RunConfig, ScoreConfig, Tuning
from harness.config.trial_id import plain
from harness.score.judge_endpoint import judge_key, key_problem
from harness.score.judge_protocol import load_template
from harness.score.length_control import SOURCES
from harness.score.lm_eval import PREFIX, benchmark_problem
from harness.score.scorers import SCORERS, ifeval_problem, is_file, own_scorer_problem, scorer_name
from harness.study.errors import UsageError
from harness.study.files import file_sha256

BENCHMARKS = "lm_eval"
COMPARING = ("judge", "reward_model", "length_controlled")
HINTS = {
    "judge": "set score.judge.model",
    "reward_model": "set score.reward_model.path",
    "length_controlled": "set score.judge.model or score.reward_model.path",
}


@dataclass(frozen=True)
class Scoring:
    """How a study is scored.

    Attributes:
        config: the settings.
        names: of the scorers: those of `COMPARING`, `lm_eval`, files of your own.
        splits: those that are scored.
        cache: folder of what was asked or computed before, shared by all studies.
        model: the base for benchmarks: `folder` and `chat_template`.
    """

    config: ScoreConfig
    names: Sequence[str]
    splits: Sequence[str]
    cache: Path
    model: dict[str, Any]


def study_scorers(score: ScoreConfig) -> list[str]:
    """Return the scorers of a whole study that a config sets up, by the name that they have in the scores."""
    found = ["judge"] if score.judge.model else []
    found += ["reward_model"] if score.reward_model.path else []
    found += ["length_controlled"] if found else []
    found += [f"{PREFIX}{task}" for task in score.lm_eval.tasks]
    return found + [scorer_name(name) for name in score.scorers if is_file(name)]


def known_scorers(score: ScoreConfig) -> list[str]:
    """Return every scorer that a metric or a guard may name."""
    return [*SCORERS, *study_scorers(score)]


def unknown_scorer(name: str, score: ScoreConfig) -> str:
    """Say that a scorer is unknown, or what it needs to be set up."""
    if name in HINTS:
        return f"{name} is not set up; {HINTS[name]}"
    if name.startswith(PREFIX):
        return f"{name} is not set up; add {name.removeprefix(PREFIX)} to score.lm_eval.tasks"
    more = "; also judge, reward_model, length_controlled, lm_eval:TASK and files of your own (docs/scorers.md)"
    return f"no such scorer; scorers: {', '.join(known_scorers(score))}{more}"


def run_names(score: ScoreConfig, names: Sequence[str] = ()) -> list[str]:
    """Return the study-level scorers to run: all configured ones, or the requested ones and their prerequisites."""
    wanted = list(names) or study_scorers(score)
    own = {scorer_name(path): path for path in [*score.scorers, *names] if is_file(path)}
    found = []
    for name in wanted:
        found += [BENCHMARKS] if name.startswith(PREFIX) or name == BENCHMARKS else []
        found += [name] if name in COMPARING else []
        found += [own[scorer_name(name)]] if scorer_name(name) in own else []
    return list(dict.fromkeys(found))


def _with_sources(score: ScoreConfig, names: list[str]) -> list[str]:
    """Add the scorers whose preferences are length-controlled."""
    sources = [name for name in SOURCES if name in study_scorers(score)] if "length_controlled" in names else []
    return [*(name for name in sources if name not in names), *names]


def score_problems(score: ScoreConfig, names: Sequence[str]) -> Iterator[str]:
    """Yield what would keep scorers from working: a missing package, key, file or setting."""
    if "judge" in names:
        yield from _judge_problems(score)
    reward_model = score.reward_model.path
    if "reward_model" in names and reward_model is None:
        yield "score.reward_model.path=null: give the folder or Hub id of a reward model"
    elif "reward_model" in names and _is_missing_folder(str(reward_model)):
        yield f"score.reward_model.path={reward_model}: no such folder; allowed: a folder or a Hub id (owner/name)"
    if BENCHMARKS in names and (problem := benchmark_problem(score.lm_eval)):
        yield problem
    yield from (problem for name in names if is_file(name) if (problem := own_scorer_problem(name)))
    yield from (
        f"score.scorers: {name}: {unknown_scorer(name, score)}"
        for name in score.scorers
        if not is_file(name) and name not in known_scorers(score)
    )
    for key in ("baseline", "calibration_pairs"):
        path = getattr(score, key)
        if path is not None and not Path(path).exists():
            yield f"score.{key}={path}: no such file"


def _judge_problems(score: ScoreConfig) -> Iterator[str]:
    judge = score.judge
    if judge.model is None:
        yield "score.judge.model=null: name the model that judges, as its endpoint knows it"
    if find_spec("openai") is None:
        yield "score.judge: the `openai` client is not installed; pip install 'dpo-simpo-harness[judge]'"
    if judge.base_url and re.search(r"://[^/]*@", judge.base_url):
        yield (
            "score.judge.base_url: holds a name or a password, and configs are written to files; give the address "
            "without, and a key by the environment variable that score.judge.api_key_env names"
        )
    if problem := key_problem(judge.api_key_env):
        yield problem
    elif judge.base_url is None and not judge_key(judge.api_key_env) and not os.environ.get("OPENAI_BASE_URL"):
        yield (
            f"score.judge: the environment variable {judge.api_key_env} holds no key; set it, name another one with "
            "score.judge.api_key_env, or give an endpoint without keys as score.judge.base_url"
        )
    if score.max_cost_usd is not None and judge.input_price is None and judge.output_price is None:
        yield "score.max_cost_usd: cannot be kept without score.judge.input_price and score.judge.output_price"
    try:
        load_template(judge.template)
    except UsageError as error:
        yield str(error)


def _is_missing_folder(path: str) -> bool:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    return looks_local and not Path(path).is_dir()


def allowed_scorers(config: RunConfig, prompts: Sequence[Any], *, has_pairs: bool, split: str) -> list[str]:
    """Return the scorers that a split's rows allow, the one that decides by default first.

    Its checks, else its instructions (IFEval), else its pairs; then those that any prompt allows.
    """
    found = ["checks", "checks_fraction"] if any(prompt.checks for prompt in prompts) else []
    if any(prompt.about.get("instructions") for prompt in prompts) and ifeval_problem() is None:
        found += ["ifeval", "ifeval_loose"]
    found += [name for name in SCORERS if name.startswith("preference")] if has_pairs else []
    return found + [name for name in study_scorers(config.score) if split == "golden" or not name.startswith(PREFIX)]


def registered_settings(config: RunConfig, metrics: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the scorers that decide: a change of one makes another question."""
    score = config.score
    parts: dict[str, Any] = {}
    names = run_names(score, [name for name in metrics if name not in SCORERS])
    names = _with_sources(score, names)
    if "judge" in names:
        kept = ("model", "base_url", "structured", "max_tokens", "temperature")
        parts["judge"] = {key: value for key, value in plain(score.judge).items() if key in kept}
        parts["judge"]["template_sha256"] = load_template(score.judge.template).sha256
    if "reward_model" in names and score.reward_model.path:
        folder = checkpoint_dir(ModelConfig(score.reward_model.path, score.reward_model.revision))
        parts["reward_model"] = {"weights_sha256": base_sha256(folder), "max_length": score.reward_model.max_length}
    if "length_controlled" in names:
        parts["length_control"] = plain(score.length_control)
    if BENCHMARKS in names:
        parts["lm_eval"] = plain(score.lm_eval)
    parts |= {scorer_name(name): file_sha256(Path(name)) for name in names if is_file(name)}
    if score.baseline and ("judge" in names or "reward_model" in names):
        parts["baseline_sha256"] = file_sha256(Path(score.baseline))
    return parts


def scoring_of(config: RunConfig, splits: Sequence[str], names: Sequence[str] = ()) -> Scoring | None:
    """Return how a study of this config is scored; None where no scorer of a whole study is set up."""
    found = _with_sources(config.score, run_names(config.score, names))
    if not found:
        return None
    template = config.model.chat_template
    model: dict[str, Any] = {"folder": str(checkpoint_dir(config.model)), "chat_template": template}
    model["quantise"] = config.train.tuning is Tuning.qlora
    return Scoring(config.score, found, splits, Path(config.results_dir) / ".cache", model)


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what would keep the scorers of a study from working, and metrics that no scorer gives."""
    known = known_scorers(config.score)
    yield from score_problems(config.score, run_names(config.score))
    metric = config.decide.metric
    if metric is not None and metric not in known:
        yield f"decide.metric={metric}: {unknown_scorer(metric, config.score)}"
    for guard in config.decide.guards:
        if set(guard) == {"metric", "margin"} and guard["metric"] not in known:
            yield f"decide.guards: {shown(guard)}: {unknown_scorer(str(guard['metric']), config.score)}"
    if config.keep == "none" and config.score.lm_eval.tasks:
        yield "keep=none: score.lm_eval.tasks are run on the weights of the trials that decide; use keep=confirmed"
