"""Simulated studies through the decision rule: a setting -> shares of verdicts, error rates, detectable differences.

Y[arm, seed, prompt] = 1/2 ± D/2 + prompt + arm-by-prompt + run + noise: the layout of `harness.decide.stats`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.decide.deciding import decide_interval
from harness.decide.planning import detectable
from harness.decide.scores_file import ArmScores
from harness.decide.stats import Arm, Components, compare, mean_variance, residual_mean_square
from harness.study.registration import ALPHA, CONTRAST, MARGIN

# Assumptions before any measurement: the settings that the rule was chosen with (benchmarks/decision_rule.md).
RUN_SD, PROMPT_SD, NOISE_SD = 0.014, 0.25, 0.35
_COMMON_SD = 0.2  # of a prompt's difficulty, which both arms share: it leaves the difference alone
_DISCRETE_SDS = (0.12, 0.12)  # difficulty and arm-by-prompt SD of pass rates, which must stay within [0, 1]


@dataclass(frozen=True)
class Setting:
    """A study to simulate; SDs are in units of the score, which is in [0, 1].

    Attributes:
        seeds: per arm.
        prompts: golden prompts.
        cluster_size: prompts per cluster.
        cluster_share: share of the arm-by-prompt variance that is common to the prompts of a cluster.
        run_sd: SD of a run's mean over seeds at fixed prompts, per arm.
        prompt_sd: SD over prompts of the difference between the arms.
        noise_sd: SD of one answer's score around its run and its prompt; with `passes` it follows from the rate.
        passes: scores are 0 or 1.
        margin, alpha: of the rule.
        looks: numbers of seeds, each look at alpha over the number of looks; empty for one look with all seeds.
    """

    seeds: tuple[int, int] = (5, 5)
    prompts: int = 300
    cluster_size: int = 1
    cluster_share: float = 0.5
    run_sd: tuple[float, float] = (RUN_SD, RUN_SD)
    prompt_sd: float = PROMPT_SD
    noise_sd: float = NOISE_SD
    passes: bool = False
    margin: float = MARGIN
    alpha: float = ALPHA
    looks: tuple[int, ...] = ()

    @property
    def clusters(self) -> np.ndarray | None:
        """Label of each prompt's cluster; None where each prompt is one."""
        return np.arange(self.prompts) // self.cluster_size if self.cluster_size > 1 else None


def draw(setting: Setting, difference: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the scores of both arms, each of shape (num_seeds, num_prompts); arm A is better by `difference`."""
    common_sd, own_sd = _DISCRETE_SDS if setting.passes else (_COMMON_SD, setting.prompt_sd)
    common = rng.normal(0, common_sd, setting.prompts)
    labels = np.arange(setting.prompts) // setting.cluster_size
    share = setting.cluster_share if setting.cluster_size > 1 else 0.0
    scores = []
    for sign, seeds, run_sd in zip((1, -1), setting.seeds, setting.run_sd, strict=True):
        own = rng.normal(0, math.sqrt(1 - share), setting.prompts)
        own += rng.normal(0, math.sqrt(share), labels[-1] + 1)[labels]
        rate = 0.5 + sign * difference / 2 + common + own * own_sd / math.sqrt(2)
        rates = rate + rng.normal(0, run_sd, seeds)[:, None]
        if setting.passes:
            scores.append((rng.random(rates.shape) < rates).astype(float))
        else:
            scores.append(rates + rng.normal(0, setting.noise_sd, rates.shape))
    return scores


def verdict_of(scores: Sequence[np.ndarray], setting: Setting) -> str:
    """Apply the rule to drawn scores, look by look, until one decides."""
    looks = setting.looks or (max(setting.seeds),)
    name = "inconclusive"
    for look in looks:
        found = compare(scores[0][:look], scores[1][:look], setting.clusters)
        name, _ = decide_interval(found, arms=CONTRAST, margin=setting.margin, alpha=setting.alpha / len(looks))
        if name != "inconclusive":
            break
    return name


def simulate(setting: Setting, difference: float, *, repeats: int, seed: int = 0) -> dict[str, float]:
    """Return the shares of verdicts over `repeats` studies: `simpo` (arm A), `dpo`, `tie` and `inconclusive`.

    A share p has a Monte Carlo standard error of `sqrt(p (1 - p) / repeats)`.
    """
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys((*CONTRAST, "tie", "inconclusive"), 0)
    for _ in range(repeats):
        counts[verdict_of(draw(setting, difference, rng), setting)] += 1
    return {name: count / repeats for name, count in counts.items()}


def components_of(setting: Setting) -> Components:
    """Return the expected components of a setting's studies."""
    answers = 0.25 - sum(sd**2 for sd in _DISCRETE_SDS) if setting.passes else setting.noise_sd**2
    prompt_sd = _DISCRETE_SDS[1] if setting.passes else setting.prompt_sd
    noise, size = answers / setting.prompts, setting.cluster_size
    arms = tuple(
        Arm(sign, seeds, sd**2 + noise, noise)
        for sign, sd, seeds in zip((1.0, -1.0), setting.run_sd, setting.seeds, strict=True)
    )
    inflation = 1 + (size - 1) * setting.cluster_share if size > 1 else 1.0
    clusters = max(2, setting.prompts // size)
    return Components(
        difference=0.0,
        arms=arms if min(setting.seeds) > 1 else (),
        prompt_total=prompt_sd**2 * inflation / setting.prompts + sum(noise / seeds for seeds in setting.seeds),
        prompt_df=clusters - 1,
        num_seeds=setting.seeds,
        num_prompts=setting.prompts,
        num_clusters=clusters,
        effective_clusters=clusters,
    )


def observed(arms: Mapping[str, ArmScores], *, margin: float, alpha: float, looks: Sequence[int] = ()) -> Setting:
    """Estimate a study's setting from its golden scores, by moments of the two-way layout (Searle et al. 1992).

    Args:
        arms: the two arms' scores on the same prompts, each with at least two seeds.
        margin, alpha, looks: of the study's rule.

    Raises:
        ValueError: fewer than two seeds in an arm, so that runs and prompts cannot be separated.
    """
    first, second = (one.values for one in arms.values())
    if min(len(first), len(second)) < 2:
        raise ValueError("an arm has one seed, so that the noise of runs is not known; give the numbers as options")
    noise = [residual_mean_square(values) for values in (first, second)]
    runs = [
        values.mean(1).var(ddof=1) - ms / values.shape[1] for values, ms in zip((first, second), noise, strict=True)
    ]
    by_prompt = first.mean(0) - second.mean(0)
    own = by_prompt.var(ddof=1) - noise[0] / len(first) - noise[1] / len(second)
    clusters = next(iter(arms.values())).clusters
    size = len(by_prompt) / len(np.unique(clusters)) if len(clusters) else 1.0
    grouped = mean_variance(by_prompt, clusters if size > 1 else None)[0] - mean_variance(by_prompt)[0]
    share = min(max(grouped * len(by_prompt) / (size - 1) / own, 0.0), 1.0) if size > 1 and own > 0 else 0.0
    return Setting(
        seeds=(len(first), len(second)),
        prompts=len(by_prompt),
        cluster_size=round(size),
        cluster_share=share,
        run_sd=(math.sqrt(max(runs[0], 0.0)), math.sqrt(max(runs[1], 0.0))),
        prompt_sd=math.sqrt(max(own, 0.0)),
        noise_sd=math.sqrt(sum(noise) / 2),
        margin=margin,
        alpha=alpha,
        looks=tuple(looks),
    )


def halves(values: np.ndarray, setting: Setting, *, most: int = 200) -> tuple[int, int]:
    """Return the number of splits of one arm's seeds into two halves, and the number of splits with a winner.

    Both halves are the same method, so that a winner is false. The splits share runs: they are not independent.

    Args:
        values: shape (num_seeds, num_prompts), at least four seeds.
        setting: clusters, margin and alpha.
        most: upper limit of the splits; more are thinned evenly.
    """
    seeds = range(len(values))
    splits = [half for half in itertools.combinations(seeds, len(values) // 2) if len(values) % 2 or 0 in half]
    splits = splits[:: math.ceil(len(splits) / most)]
    one_look = replace(setting, looks=())
    found = 0
    for half in splits:
        other = [seed for seed in seeds if seed not in half]
        found += verdict_of([values[list(half)], values[other]], one_look) in CONTRAST
    return len(splits), found


def detectable_before(seeds: int, prompts: int, *, alpha: float) -> float:
    """Return the difference that a study detects with 80% power, under this module's assumptions."""
    return detectable(components_of(Setting(seeds=(seeds, seeds), prompts=prompts)), alpha)
