"""The table of scorers: name, title, needs, problems, registered settings and run function of each.

Adding a scorer is one row here and one file beside this one. No other module compares a scorer's name.
A Python file of the user is a scorer, too: `find_scorer` makes its row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from harness.config.checkpoint import Checkpoints
from harness.config.keys import shown
from harness.config.schema import RunConfig, ScoreConfig
from harness.data.records import EvalPrompt
from harness.score.accuracy import (
    score_checks,
    score_checks_fraction,
    score_preference,
    score_preference_mean,
    score_preference_sum,
)
from harness.score.alpaca_files import MINIMAL, WITHOUT_GAMED
from harness.score.answers import Preference, Score, Scoring, Stored, TrialOutputs, outputs_of, write_preferences
from harness.score.judge import (
    PlannedAnswer,
    judge_problems,
    judge_runs,
    judge_settings,
    other_judge_problem,
    planned_judging,
)
from harness.score.length_control import (
    SOURCES,
    control_runs,
    length_control_problems,
    length_control_settings,
    name_by_files,
    stored_name,
)
from harness.score.lm_eval import (
    PREFIX,
    benchmark_problem,
    benchmark_settings,
    ifeval_problem,
    run_benchmarks,
    score_ifeval,
    score_ifeval_loose,
)
from harness.score.own_scorers import check_scores
from harness.score.reward_model import reward_model_problems, reward_model_settings, reward_runs
from harness.study.errors import UsageError
from harness.study.files import Json, file_sha256, read_jsonl
from harness.study.log import saying_while

TrialScorer = Callable[[TrialOutputs], list[Score]]
ScoresByName = Mapping[str, Mapping[Path, Sequence[Score]]]  # by name in the scores, by folder of the run
StudyScorer = Callable[[Stored, Scoring], ScoresByName]


class Needs(Enum):
    """What a scorer reads."""

    CHECKS = "rows with checks"
    INSTRUCTIONS = "rows with IFEval's instructions"
    PAIRS = "rows with chosen and rejected"
    ANSWERS = "the answers of the whole study"
    WEIGHTS = "the weights of the base and of all runs that answered golden"


@dataclass(frozen=True)
class Scorer:
    """One row of the table. A scorer of one trial has `score_trial`, a scorer of the whole study `score_study`.

    Attributes:
        name: in the scores, and on the command line.
        title: the name in prose.
        needs: what it reads.
        score_trial: stored outputs of one run -> scores.
        score_study: stored answers of the study -> scores by name and run.
        is_set_up: whether a config sets it up.
        names: the names of its scores for a config; empty stands for the row's own name.
        variants: other names that its scores may have, by title.
        setup: how to set it up, for messages; `{task}` is the part of a name after the colon.
        problems: what keeps it from working with a config.
        keys: config keys, or groups of keys, that it reads.
        settings: registered settings: a change of one makes another question.
        registered_problem: refuses other settings than the registered ones when a study is scored again.
        sources: scorers whose preferences it reads; they run before it.
        planned_cost: upper bound on its cost for planned answers of `max_new_tokens` tokens.
    """

    name: str
    title: str
    needs: Needs
    score_trial: TrialScorer | None = None
    score_study: StudyScorer | None = None
    is_set_up: Callable[[ScoreConfig], bool] = lambda score: True
    names: Callable[[ScoreConfig], Sequence[str]] = lambda score: ()
    variants: Mapping[str, str] = field(default_factory=dict)
    setup: str = ""
    problems: Callable[[ScoreConfig], Iterable[str]] = lambda score: ()
    keys: tuple[str, ...] = ()
    settings: Callable[[ScoreConfig, Checkpoints], dict[str, Json]] = lambda score, checkpoints: {}
    registered_problem: Callable[[Mapping[str, Any], ScoreConfig], str | None] = lambda registered, score: None
    sources: tuple[str, ...] = ()
    planned_cost: Callable[[ScoreConfig, Sequence[PlannedAnswer], int], str] | None = None

    @property
    def has_tasks(self) -> bool:
        """Whether its scores are named NAME:TASK."""
        return "{task}" in self.setup

    def reads(self, key: str) -> bool:
        """Return whether the scorer reads a config key."""
        return any(key == own or key.startswith(f"{own}.") for own in self.keys)


def _comparing(
    name_of: str | Callable[[Stored, Scoring], str], compare: Callable[[Stored, Scoring], dict[Path, list[Preference]]]
) -> StudyScorer:
    """Turn a comparison with the baseline into a scorer; its preferences are stored beside the scores."""

    def run(stored: Stored, scoring: Scoring) -> ScoresByName:
        name = name_of if isinstance(name_of, str) else name_of(stored, scoring)
        found = compare(stored, scoring)
        for folder, preferences in found.items():
            write_preferences(folder, name, preferences, stored.splits)
        return {
            name: {
                folder: [Score(one.split, one.prompt_id, one.preference, one.reason) for one in preferences]
                for folder, preferences in found.items()
            }
        }

    return run


def _score_benchmarks(stored: Stored, scoring: Scoring) -> ScoresByName:
    assert scoring.base is not None, "`Scoring` has a base where a scorer needs weights"
    return run_benchmarks(stored, scoring.config.lm_eval, scoring.base)


# The first scorer that a golden set allows decides by default. Scorers of the whole study run in this order.
SCORERS: dict[str, Scorer] = {
    row.name: row
    for row in (
        Scorer("checks", "All checks passed", Needs.CHECKS, score_checks),
        Scorer("checks_fraction", "Share of checks passed", Needs.CHECKS, score_checks_fraction),
        Scorer("ifeval", "All instructions followed (IFEval, strict)", Needs.INSTRUCTIONS, score_ifeval),
        Scorer("ifeval_loose", "All instructions followed (IFEval, loose)", Needs.INSTRUCTIONS, score_ifeval_loose),
        Scorer("preference_accuracy", "Preference accuracy, both rewards", Needs.PAIRS, score_preference),
        Scorer("preference_accuracy_sum", "Preference accuracy by DPO's reward", Needs.PAIRS, score_preference_sum),
        Scorer("preference_accuracy_mean", "Preference accuracy by SimPO's reward", Needs.PAIRS, score_preference_mean),
        Scorer(
            "judge",
            "Win rate by the judge against the baseline",
            Needs.ANSWERS,
            score_study=_comparing("judge", lambda stored, scoring: judge_runs(stored, scoring.config, scoring.cache)),
            is_set_up=lambda score: bool(score.judge.model),
            setup="set score.judge.model",
            problems=judge_problems,
            keys=("score.judge", "score.baseline", "score.calibration_pairs"),
            settings=judge_settings,
            registered_problem=other_judge_problem,
            planned_cost=planned_judging,
        ),
        Scorer(
            "reward_model",
            "Win rate by the reward model against the baseline",
            Needs.ANSWERS,
            score_study=_comparing(
                "reward_model",
                lambda stored, scoring: reward_runs(stored, scoring.config.reward_model, scoring.cache),
            ),
            is_set_up=lambda score: bool(score.reward_model.path),
            setup="set score.reward_model.path",
            problems=reward_model_problems,
            keys=("score.reward_model", "score.baseline"),
            settings=reward_model_settings,
        ),
        Scorer(
            "length_controlled",
            "Length-controlled win rate",
            Needs.ANSWERS,
            score_study=_comparing(
                lambda stored, scoring: stored_name(stored, scoring.config.length_control),
                lambda stored, scoring: control_runs(stored, scoring.config.length_control),
            ),
            names=lambda score: [name_by_files(score.length_control)],
            variants={
                WITHOUT_GAMED: "Length-controlled win rate, without AlpacaEval's gamed baselines",
                MINIMAL: "Length-controlled win rate, minimal form",
            },
            problems=lambda score: length_control_problems(score.length_control),
            is_set_up=lambda score: any(SCORERS[source].is_set_up(score) for source in SOURCES),
            setup="set score.judge.model or score.reward_model.path",
            keys=("score.length_control",),
            settings=length_control_settings,
            sources=SOURCES,
        ),
        Scorer(
            "lm_eval",
            "Benchmarks of lm-evaluation-harness",
            Needs.WEIGHTS,
            score_study=_score_benchmarks,
            is_set_up=lambda score: bool(score.lm_eval.tasks),
            names=lambda score: [f"{PREFIX}{task}" for task in score.lm_eval.tasks],
            setup="add {task} to score.lm_eval.tasks",
            problems=lambda score: filter(None, [benchmark_problem(score.lm_eval)]),
            keys=("score.lm_eval", "model", "train.tuning"),
            settings=benchmark_settings,
        ),
    )
}
TRIAL_SCORERS: dict[str, TrialScorer] = {row.name: row.score_trial for row in SCORERS.values() if row.score_trial}


def is_file(name: str) -> bool:
    """Return whether a scorer is given as a Python file."""
    return name.endswith(".py")


def titles() -> dict[str, str]:
    """Return the titles of all scores by name."""
    return {name: text for row in SCORERS.values() for name, text in {row.name: row.title, **row.variants}.items()}


def scorer_name(name: str) -> str:
    """Return a scorer's name in the scores: for a file, its name without `.py`."""
    return Path(name).stem if is_file(name) else name


def find_scorer(name: str) -> Scorer | None:
    """Return the row of a scorer: by its own name, by the name of one of its scores (`lm_eval:TASK`), or of a file."""
    if is_file(name):
        return _own_scorer(name)
    own_name, colon, _ = name.partition(":")
    row = SCORERS.get(own_name) or next((row for row in SCORERS.values() if own_name in row.variants), None)
    return row if not colon or name.startswith(PREFIX) else None


def _own_scorer(path: str) -> Scorer:
    name = scorer_name(path)

    def run(stored: Stored, scoring: Scoring) -> ScoresByName:
        with saying_while(f"{path}: scoring {len(stored.runs)} runs"):
            scorer = load_scorer(path)
            prompts = list(read_jsonl(stored.study / "prompts.jsonl"))
            found = {}
            for run in stored.runs:
                if not run.failed:
                    outputs = outputs_of(run.folder, prompts)
                    given = scorer(deepcopy(outputs))  # it may change what it is given
                    found[run.folder] = check_scores(path, run, given, outputs, stored.splits)
            return {name: found}

    return Scorer(
        name,
        name,
        Needs.ANSWERS,
        score_study=run,
        problems=lambda score: filter(None, [own_scorer_problem(path)]),
        settings=lambda score, checkpoints: {name: file_sha256(Path(path))},
    )


def own_scorer_problem(path: str) -> str | None:
    """Say why a file cannot be a scorer, without running it; None where it may be one."""
    if not Path(path).is_file():
        return f"{path}: no such file; give a Python file with a function `score`"
    if not scorer_name(path).isidentifier() or scorer_name(path) in SCORERS:
        return f"{path}: a scorer is named by its file; choose a name that is an identifier and not yet a scorer's"
    return None


def load_scorer(path: str) -> TrialScorer:
    """Load the function `score` of a Python file.

    Raises:
        UsageError: for no such file, a file that fails, or one without the function. The returned function raises it
            where `score` fails or returns anything but `Score`s.
    """
    problem = own_scorer_problem(path)
    if problem:
        raise UsageError(problem)
    spec = importlib.util.spec_from_file_location(f"own_scorer_{scorer_name(path)}", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path}: fails when it is loaded ({type(error).__name__}: {error})") from error
    score = getattr(module, "score", None)
    if not callable(score):
        raise UsageError(f"{path}: has no function `score(outputs)`; see docs/scorers.md")

    def checked(outputs: TrialOutputs) -> list[Score]:
        try:
            found = list(score(outputs))
        except (Exception, SystemExit) as error:  # an exit of its own would pass for success
            raise UsageError(f"{path}: score() failed ({type(error).__name__}: {error})") from error
        wrong = next((one for one in found if not isinstance(one, Score)), None)
        if wrong is not None:
            raise UsageError(f"{path}: score() returned {wrong!r}; allowed: a list of harness.scorers.Score")
        return found

    return checked


def study_scorers(score: ScoreConfig) -> list[str]:
    """Return the scorers of the whole study that a config sets up, by their names in the scores."""
    rows = [row for row in SCORERS.values() if row.score_study and row.is_set_up(score)]
    return [name for row in rows for name in _score_names(row, score)] + _own_names(score)


def _score_names(row: Scorer, score: ScoreConfig) -> Sequence[str]:
    return row.names(score) or [row.name]


def _own_names(score: ScoreConfig) -> list[str]:
    return [scorer_name(name) for name in score.scorers if is_file(name)]


def known_scorers(score: ScoreConfig) -> list[str]:
    """Return every scorer that a metric or a guard may name.

    Among them a row's own name where its scores have another one: studies of an earlier version are registered by it.
    """
    found = [*TRIAL_SCORERS, *study_scorers(score)]
    rows = [row for row in SCORERS.values() if row.score_study and row.is_set_up(score) and not row.has_tasks]
    return list(dict.fromkeys([*found, *(row.name for row in rows)]))


def unknown_scorer(name: str, score: ScoreConfig) -> str:
    """Say what a scorer lacks to be set up, or that there is none of this name."""
    row, task = find_scorer(name), name.partition(":")[2]
    if row and row.setup and bool(task) == row.has_tasks:
        return f"{name} is not set up; {row.setup.format(task=task)}"
    others = [f"{row.name}:TASK" if row.has_tasks else row.name for row in SCORERS.values() if row.setup]
    return (
        f"no such scorer; scorers: {', '.join(known_scorers(score))}; also {', '.join(others)} and files of your own "
        "(docs/scorers.md)"
    )


def run_names(score: ScoreConfig, names: Sequence[str] = ()) -> list[str]:
    """Return the study-level scorers to run: all configured ones, or the requested ones; files by their paths."""
    files = {scorer_name(path): path for path in [*score.scorers, *names] if is_file(path)}
    found = []
    for name in names or study_scorers(score):
        row = find_scorer(name)
        if scorer_name(name) in files:
            found.append(files[scorer_name(name)])
        elif row and row.score_study:
            found.append(row.name)
    return list(dict.fromkeys(found))


def with_sources(score: ScoreConfig, names: Sequence[str]) -> list[str]:
    """Add the configured scorers whose preferences these scorers read."""
    set_up = study_scorers(score)
    sources = [source for row in _rows(names) for source in row.sources if source in set_up and source not in names]
    return [*dict.fromkeys(sources), *names]


def in_order(names: Sequence[str]) -> list[str]:
    """Sort scorers so that each runs after its sources; files come last."""
    order = {name: place for place, name in enumerate(SCORERS)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _rows(names: Iterable[str]) -> list[Scorer]:
    return [row for name in names if (row := find_scorer(name))]


def reads(names: Iterable[str], key: str) -> bool:
    """Return whether one of these scorers reads a config key."""
    return any(row.reads(key) for row in _rows(names))


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what keeps the scorers of a study from working, and metrics that no scorer has."""
    score, known = config.score, known_scorers(config.score)
    yield from score_problems(score, run_names(score))
    metric = config.decide.metric
    if metric is not None and metric not in known:
        yield f"decide.metric={metric}: {unknown_scorer(metric, score)}"
    for guard in config.decide.guards:
        if set(guard) == {"metric", "margin"} and guard["metric"] not in known:
            yield f"decide.guards: {shown(guard)}: {unknown_scorer(str(guard['metric']), score)}"
    if config.keep == "none" and score.lm_eval.tasks:
        yield "keep=none: score.lm_eval.tasks are run on the weights of the trials that decide; use keep=confirmed"


def score_problems(score: ScoreConfig, names: Sequence[str]) -> Iterator[str]:
    """Yield what keeps these scorers from working: a missing package, key, file or setting."""
    for row in _rows(in_order(names)):
        yield from row.problems(score)
    for name in score.scorers:
        if not is_file(name) and name not in known_scorers(score):
            yield f"score.scorers: {name}: {unknown_scorer(name, score)}"
    for key, path in (("baseline", score.baseline), ("calibration_pairs", score.calibration_pairs)):
        if path is not None and not Path(path).exists():
            yield f"score.{key}={path}: no such file"


def allowed_scorers(score: ScoreConfig, prompts: Sequence[EvalPrompt], *, has_pairs: bool, split: str) -> list[str]:
    """Return the scorers that a split's rows allow, the default one first.

    Checks come first, then IFEval's instructions, then pairs, then the configured scorers of the whole study.
    """
    is_there = {
        Needs.CHECKS: any(prompt.checks for prompt in prompts),
        Needs.INSTRUCTIONS: has_instructions(prompts) and ifeval_problem() is None,
        Needs.PAIRS: has_pairs,
        Needs.ANSWERS: True,
        Needs.WEIGHTS: split == "golden",
    }
    rows = [row for row in SCORERS.values() if is_there[row.needs] and row.is_set_up(score)]
    return [name for row in rows for name in _score_names(row, score)] + _own_names(score)


def is_among(name: str, allowed: Sequence[str]) -> bool:
    """Return whether a scorer is allowed: by its name in the scores, or as a row whose scores have another name."""
    row = SCORERS.get(name)
    return name in allowed or (row is not None and any(variant in allowed for variant in row.variants))


def has_instructions(prompts: Sequence[EvalPrompt]) -> bool:
    """Return whether some prompts have IFEval's instructions."""
    return any(prompt.about.get("instructions") for prompt in prompts)


def needs_instructions(name: str) -> bool:
    """Return whether a scorer checks IFEval's instructions."""
    row = find_scorer(name)
    return row is not None and row.needs is Needs.INSTRUCTIONS


def registered_settings(score: ScoreConfig, metrics: Sequence[str], checkpoints: Checkpoints) -> dict[str, Json]:
    """Return the settings of the scorers of these metrics, for the registration: a change of one is another question.

    Where no metric is of a scorer of the whole study, those of all configured ones.
    """
    names = with_sources(score, run_names(score, [name for name in metrics if name not in TRIAL_SCORERS]))
    settings: dict[str, Json] = {}
    for row in _rows(in_order(names)):
        settings |= row.settings(score, checkpoints)
    if score.baseline and reads(names, "score.baseline"):
        settings["baseline_sha256"] = file_sha256(Path(score.baseline))
    return settings


def planned_costs(
    score: ScoreConfig,
    metric: str | None,
    golden: Sequence[PlannedAnswer],
    dev: Sequence[PlannedAnswer],
    max_new_tokens: int,
) -> list[str]:
    """Return one line per configured scorer that costs money; it scores dev only where the metric needs it."""
    selecting = with_sources(score, run_names(score, [metric])) if metric else []
    return [
        row.planned_cost(score, [*golden, *(dev if row.name in selecting else ())], max_new_tokens)
        for row in SCORERS.values()
        if row.planned_cost and row.is_set_up(score)
    ]
