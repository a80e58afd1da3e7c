"""The tuning stage: train the configs of every arm on the tuning seeds, and select one an arm on dev.

All configs at once, in rungs that halve them from seed to seed, or as a sampler suggests; golden is never answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.config import RunConfig, config_label
from harness.design import Design
from harness.records import locked
from harness.registration import add_configs, read_study
from harness.score import collect_scores
from harness.search import Optuna
from harness.selection import dev_means, select

Finish = Callable[[Sequence[RunConfig]], object]


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
