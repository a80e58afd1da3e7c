"""How often do decision rules find a winner between equal arms? Simulate, and write decision_rule.md beside this file.

Command: `python benchmarks/decision_rule.py [--repeats 2000]`: four minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from harness.decide.rule import verdict
from harness.decide.stats import compare

SETTINGS = [(seeds, run_sd) for seeds in (3, 5) for run_sd in (0.0, 0.02, 0.04)]
PROMPTS, ARM_BY_PROMPT_SD, PROMPT_SD, NOISE_SD = 300, 0.25, 0.2, 0.35
RESAMPLES, TAILS = 200, (0.025, 0.975)
Rule = Callable[[np.ndarray, np.ndarray, np.random.Generator], bool]


def draw(rng: np.random.Generator, seeds: int, run_sd: float, *, difference: float = 0.0, passed: bool = False) -> list:
    """Draw two arms, each of shape (seeds, prompts).

    `run_sd` is that of the difference between one run of each arm. `passed`: 0 or 1, as the scorer `checks` gives.
    """
    half = 1 / math.sqrt(2)  # each arm has half of the variance of the difference
    common = rng.normal(0, PROMPT_SD, PROMPTS)
    arms = []
    for mean in (0.5 + difference / 2, 0.5 - difference / 2):
        own = rng.normal(0, ARM_BY_PROMPT_SD * half * (0.4 if passed else 1), PROMPTS)
        scores = mean + common + own + rng.normal(0, run_sd * half, seeds)[:, None]
        if passed:
            arms.append((rng.random((seeds, PROMPTS)) < scores).astype(float))
        else:
            arms.append(scores + rng.normal(0, NOISE_SD, (seeds, PROMPTS)))
    return arms


def excludes_zero(interval: Iterable[float]) -> bool:
    """Return True where an interval leaves out zero."""
    low, high = interval
    return low > 0 or high < 0


def bootstrap_runs(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> bool:
    """Resample the run means of each arm."""
    picks = rng.integers(0, len(a), (2, 10 * RESAMPLES, len(a)))
    return excludes_zero(np.quantile(a.mean(1)[picks[0]].mean(1) - b.mean(1)[picks[1]].mean(1), TAILS))


def bootstrap_by_prompt(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> bool:
    """Resample the runs for each prompt apart, as rliable's stratified bootstrap does for tasks."""
    picks = rng.integers(0, len(a), (2, RESAMPLES, *a.shape))
    means = [arm[pick, np.arange(a.shape[1])].mean((1, 2)) for arm, pick in zip((a, b), picks, strict=True)]
    return excludes_zero(np.quantile(means[0] - means[1], TAILS))


RULES: dict[str, Rule] = {
    "this harness's interval": lambda a, b, _: excludes_zero(compare(a, b).interval(0.95)),
    "paired t over prompts, seeds averaged": lambda a, b, _: stats.ttest_rel(a.mean(0), b.mean(0)).pvalue < 0.05,
    "Welch's t over run means": lambda a, b, _: stats.ttest_ind(a.mean(1), b.mean(1), equal_var=False).pvalue < 0.05,
    "paired t over run means": lambda a, b, _: stats.ttest_rel(a.mean(1), b.mean(1)).pvalue < 0.05,
    "paired t over all seeds x prompts, pooled": lambda a, b, _: stats.ttest_rel(a.ravel(), b.ravel()).pvalue < 0.05,
    "percentile bootstrap over runs": bootstrap_runs,
    "bootstrap of runs within each prompt": bootstrap_by_prompt,
}


def frame_of(arms: list[np.ndarray]) -> pd.DataFrame:
    """Lay arrays out as a scores file."""
    seeds, prompts = arms[0].shape
    index = pd.MultiIndex.from_product([("simpo", "dpo"), range(seeds), range(prompts)])
    return pd.DataFrame({"score": np.stack(arms).ravel()}, index).reset_index(names=["arm", "seed", "prompt_id"])


def naive_table(repeats: int) -> str:
    """Return false-winner rates: a row a rule, a column a setting."""
    found = np.zeros((len(RULES), len(SETTINGS)))
    for column, (seeds, run_sd) in enumerate(SETTINGS):
        rng = np.random.default_rng(column)
        for a, b in (draw(rng, seeds, run_sd) for _ in range(repeats)):
            found[:, column] += [rule(a, b, rng) for rule in RULES.values()]
    head = [f"{seeds} seeds, run SD {100 * run_sd:g}" for seeds, run_sd in SETTINGS]
    rows = [[name, *(f"{100 * count / repeats:.1f}%" for count in row)] for name, row in zip(RULES, found, strict=True)]
    return table(["rule", *head], rows)


def verdict_table(repeats: int) -> str:
    """Return how often `verdict()`, at its defaults, says what, on scores of 0 and 1."""
    rows = []
    for number, (seeds, run_sd) in enumerate(SETTINGS):
        rng = np.random.default_rng(100 + number)
        size = float(np.mean([compare(*draw(rng, seeds, run_sd, passed=True)).detectable(0.05) for _ in range(500)]))
        for difference in (0.0, 0.05, size):
            studies = (draw(rng, seeds, run_sd, difference=difference, passed=True) for _ in range(repeats))
            said = [verdict(frame_of(study))["verdict"] for study in studies]
            label = f"{100 * difference:.1f}" + (" (the MDD)" if difference == size else "")
            shares = [f"{100 * said.count(word) / repeats:.1f}%" for word in ("simpo", "dpo", "tie", "inconclusive")]
            rows.append([str(seeds), f"{100 * run_sd:g}", label, *shares])
    return table(["seeds", "run SD", "true difference", "simpo", "dpo", "tie", "inconclusive"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000, help="simulated studies a setting (default 2000)")
    repeats = parser.parse_args().repeats
    through = repeats // 4  # a verdict takes a hundred times as long as an interval
    error, error_through = (100 * math.sqrt(0.05 * 0.95 / count) for count in (repeats, through))
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "pandas"))
    text = f"""# Error rates of decision rules

`python benchmarks/decision_rule.py --repeats {repeats}`, Python {platform.python_version()}, {versions}.

{PROMPTS} golden prompts. A score is a prompt effect (SD {PROMPT_SD}) common to both arms, an effect of arm and prompt
(SD of the difference {ARM_BY_PROMPT_SD}), a run effect and noise (SD {NOISE_SD}). "Run SD" is the standard deviation,
over trainings, of the difference between one run of each arm, in points.

## How often each rule finds a winner between equal arms, at a nominal 5%

{repeats} studies a column; the standard error of a rate of 5% is {error:.1f} points.

{naive_table(repeats)}

## What `harness.decide.study.verdict()` says, at its defaults (margin 5 points, alpha 0.05)

Scores are 0 or 1, with such a score as probability (and a smaller effect of arm and prompt). {through} studies a row:
the standard error of a rate of 5% is {error_through:.1f} points. At the minimum detectable difference (MDD, the mean of
what studies report) the right arm should win about 80% of the time; ties at the margin are errors, 5% at most.

{verdict_table(through)}
"""
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
