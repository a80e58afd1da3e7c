"""The tuning stage: train the configs of every arm on the tuning seeds, and select one an arm on dev.

All configs at once, in rungs that halve them from seed to seed, or as a sampler suggests; golden is never answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig, SearchConfig
from harness.config.search import Params, Space, is_interval, rounded
from harness.config.trial_id import config_label
from harness.score.trial_scores import collect_scores
from harness.study.decision import SelectedArm, Selection, read_selection, write_selection
from harness.study.errors import UsageError
from harness.study.files import locked
from harness.study.registration import add_configs, read_study
from harness.study.scores_csv import read_scores_csv
from harness.sweep.design import Design
from harness.sweep.trial import Trial

Finish = Callable[[Sequence[Trial]], object]


def tune(design: Design, study: Path, finish: Finish, failed: Callable[[], int]) -> dict[str, RunConfig] | None:
    """Return the config that stands for each arm; None where trials failed, so that nothing can be selected.

    Args:
        design: the study's plan; what a sampler suggests is added to it.
        study: its folder.
        finish: trains and scores trials that are not complete.
        failed: counts the trials that have failed so far.
    """
    tuned = design.tuned
    search = _suggested if design.suggests else _rungs
    if tuned and not search(design, study, finish, failed):
        return None
    labels = {arm: [config_label(config) for config in design.arms[arm]] for arm in tuned}
    with locked(study):
        selected = select(study, _means(design, study), labels) if tuned else {}
    return {
        arm: next((c for c in configs if config_label(c) == selected.get(arm)), configs[0])
        for arm, configs in design.arms.items()
    }


def _rungs(design: Design, study: Path, finish: Finish, failed: Callable[[], int]) -> bool:
    """Train with one tuning seed after the other; from each to the next the best share `search.keep` goes on."""
    alive = {arm: list(design.arms[arm]) for arm in design.tuned}
    keep = design.any.search.keep
    for rung, seed in enumerate(design.tuning_seeds):
        if rung and keep < 1:
            with locked(study):
                means = _means(design, study)
            alive = {arm: _best(arm, configs, means, keep) for arm, configs in alive.items()}
        seeds = design.tuning_seeds if keep == 1 else [seed]
        finish(design.tuning(alive, seeds))
        if failed():
            return False
        if keep == 1:
            break
    return True


def _best(
    arm: str, configs: Sequence[RunConfig], means: dict[tuple[str, str], dict[int, float]], keep: float
) -> list[RunConfig]:
    """Return the best share of an arm's configs by their mean so far, at least one; of equal ones the first."""

    def mean(config: RunConfig) -> float:
        scores = means[arm, config_label(config)].values()
        return sum(scores) / len(scores)

    return sorted(configs, key=mean, reverse=True)[: max(1, math.ceil(keep * len(configs)))]


def _suggested(design: Design, study: Path, finish: Finish, failed: Callable[[], int]) -> bool:
    """Let the sampler of each arm suggest configs in batches, every arm as many, until its trials are used up."""
    search = design.any.search
    assert search.trials is not None, "the search is checked before"
    samplers = {arm: Optuna(arm, space, search) for arm, space in design.spaces.items()}
    for done in range(0, search.trials, search.batch):
        count = min(search.batch, search.trials - done)
        asked = {arm: [design.make(arm, params) for params in sampler.ask(count)] for arm, sampler in samplers.items()}
        for arm, configs in asked.items():
            known = {config_label(config) for config in design.arms[arm]}
            new = {config_label(config): config for config in configs}
            design.arms[arm] += [config for label, config in new.items() if label not in known]
        add_configs(study, design.labels())
        finish(design.tuning(asked, design.tuning_seeds))
        if failed():
            return False
        with locked(study):
            means = _means(design, study)
        for arm, sampler in samplers.items():
            scores = [means[arm, config_label(config)] for config in asked[arm]]
            sampler.tell([sum(by.values()) / len(by) for by in scores])
    return True


def _means(design: Design, study: Path) -> dict[tuple[str, str], dict[int, float]]:
    metric = read_study(study / "study.yaml")["metric"]
    return dev_means(collect_scores(study), metric, design.tuning_seeds)


def dev_means(scores: Path, metric: str, seeds: Sequence[int]) -> dict[tuple[str, str], dict[int, float]]:
    """Return `{(arm, config): {seed: mean dev score}}` over the tuning seeds; a diverged or collapsed run has 0.

    Args:
        scores: scores.csv.
        metric: the scorer to select on.
        seeds: the tuning seeds.
    """
    import pandas as pd

    table = read_scores_csv(scores)
    table["seed"] = pd.to_numeric(table["seed"])
    dev = table[(table["split"] == "dev") & (table["scorer"] == metric) & table["seed"].isin(list(seeds))]
    dev = dev.assign(score=pd.to_numeric(dev["score"]))
    means = dev.groupby(["arm", "config", "seed"], as_index=False)["score"].mean()
    found: dict[tuple[str, str], dict[int, float]] = {}
    for arm, config, seed, mean in means[["arm", "config", "seed", "score"]].itertuples(index=False, name=None):
        found.setdefault((str(arm), str(config)), {})[int(seed)] = float(mean)
    return found


def select(
    study: Path, means: Mapping[tuple[str, str], Mapping[int, float]], labels: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Record and return the config of each arm with the best mean over all tuning seeds; of equal ones the first.

    Args:
        study: the study's folder; what an earlier call recorded there is returned as it is.
        means: what `dev_means` returned; configs that were given up before the last seed are not selected.
        labels: the configs of the arms that are tuned, in the order of the space.

    Raises:
        UsageError: where an arm has no config that was scored with all seeds.
    """
    recorded = read_selection(study)
    if recorded:
        return {arm: found["selected"] for arm, found in recorded["arms"].items()}
    registered = read_study(study / "study.yaml")
    seeds = registered["tuning_seeds"]
    arms: dict[str, SelectedArm] = {}
    for arm, configs in labels.items():
        tried = {config: means.get((arm, config), {}) for config in configs}
        whole = {config: sum(by.values()) / len(by) for config, by in tried.items() if set(by) == set(seeds)}
        if not whole:
            raise UsageError(
                f"{study}: no config of {arm} has dev scores with all tuning seeds to select on; see which trials "
                "failed, or give dev rows with the same kind of scores as golden"
            )
        arms[arm] = {
            "selected": max(whole, key=lambda config: whole[config]),
            "dev_means": {config: sum(by.values()) / len(by) for config, by in tried.items() if by},
            "seeds": {config: len(by) for config, by in tried.items()},
        }
    found: Selection = {
        "metric": registered["metric"],
        "tuning_seeds": list(seeds),
        "arms": arms,
        "selected_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_selection(study, found)
    return {arm: found["selected"] for arm, found in arms.items()}


class Optuna:
    """Ask Optuna's TPE for an arm's next configs and tell it their dev scores; the same answers give the same asks.

    Optuna is called directly: Hydra's Optuna plugin holds back to a release without its fixes. Each arm has a study of
    its own with the same number of trials, and all are told the same method-neutral metric.
    """

    def __init__(self, arm: str, space: Space, search: SearchConfig) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UsageError(
                "search.sampler=tpe: Optuna is not installed; pip install 'dpo-simpo-harness[optuna]'"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = {key: _distribution(optuna, values) for key, values in space.items()}
        startup = max(search.batch, min(10, (search.trials or 1) // 2))  # random ones before the model of the space
        sampler = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=startup, constant_liar=True)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.asked: list[Any] = []

    def ask(self, count: int) -> list[Params]:
        """Return the next configs to train; they may repeat an earlier one."""
        self.asked = [self.study.ask(self.space) for _ in range(count)]
        return [{key: _plain(value) for key, value in trial.params.items()} for trial in self.asked]

    def tell(self, scores: Sequence[float]) -> None:
        """Enter the mean dev scores of the configs that were asked last."""
        for trial, score in zip(self.asked, scores, strict=True):
            self.study.tell(trial, score)


def _distribution(optuna: Any, values: Any) -> Any:
    if is_interval(values):
        return optuna.distributions.FloatDistribution(values["low"], values["high"], log=values.get("log", False))
    return optuna.distributions.CategoricalDistribution(list(values))


def _plain(value: Any) -> Any:
    return rounded(value) if isinstance(value, float) else value
