"""The rule's arithmetic: by hand, against the definition, and by its error rates in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness.decide.rule import decide_interval
from harness.decide.stats import Components, compare, compare_runs, mean_variance, needed, planned

# 2 seeds x 4 prompts, 0 or 1, small enough for paper and pencil.
A = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=float)
B = np.array([[0, 1, 0, 0], [0, 0, 0, 1]], dtype=float)


def test_components_by_hand() -> None:
    """Run means A: .75, .5; B: .25, .25. D = .625 - .25 = .375.

    a_A = var(.75, .5)/2 = .03125/2 = .015625; a_B = 0; A = .015625; nu = .015625**2 / .015625**2 = 1.
    Seed-averaged differences: 1, 0, 0, .5 (mean .375): squares .390625 + .140625 + .140625 + .015625 = .6875;
    v = .6875 / (4 * 3) = .0572917.
    Residuals of A: row means .75 .5, column means 1 .5 0 1, grand .625: +-[-.125, .375, -.125, -.125], squares sum
    2 * (.015625 * 3 + .140625) = .375; mean square .375 / (1 * 3) = .125; r_A = .125 / 8 = .015625.
    Residuals of B: row means .25 .25, columns 0 .5 0 .5, grand .25: +-[0, .5, 0, -.5]: sum 1; mean square 1/3; r_B = 1/24.
    c = max(.0572917 - .015625 - .0416667, 0) = 0.
    """
    found = compare(A, B)
    assert found.difference == pytest.approx(0.375)
    assert found.seed_variance == pytest.approx(0.015625)
    assert found.seed_df == pytest.approx(1.0)
    assert found.prompt_variance == pytest.approx(0.0, abs=1e-12)
    assert found.interval(0.95)[1] == pytest.approx(0.375 + 12.7062 * 0.125, rel=1e-4)


def test_one_seed_an_arm_is_the_paired_t_interval_over_prompts() -> None:
    found = compare(A[:1], B[:1])
    expected = scipy_stats.ttest_rel(A[0], B[0]).confidence_interval(0.95)
    assert found.interval(0.95) == pytest.approx((expected.low, expected.high))
    assert found.seed_variance == 0.0


def test_runs_without_prompts_are_welchs_test() -> None:
    a, b = np.array([0.61, 0.64, 0.60]), np.array([0.55, 0.59, 0.52, 0.58])
    found = compare_runs(a, b)
    expected = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert found.interval(0.95) == pytest.approx((expected.low, expected.high))


def test_clustered_variance_against_the_double_sum() -> None:
    """The definition: the sum over all pairs of prompts in one cluster of the product of their deviations."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    clusters = np.array([0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 4, 5])  # lopsided on purpose
    deviation = values - values.mean()
    double = sum(deviation[i] * deviation[j] for i in range(12) for j in range(12) if clusters[i] == clusters[j])
    variance, count = mean_variance(values, clusters)
    assert count == 6
    assert variance == pytest.approx(double * 6 / 5 / 144)


def test_clusters_of_one_are_no_clusters() -> None:
    values = np.random.default_rng(1).normal(size=9)
    assert mean_variance(values, np.arange(9)) == pytest.approx(mean_variance(values))
    assert mean_variance(values)[0] == pytest.approx(values.var(ddof=1) / 9)


def test_cochrans_quantile_lies_between_the_two_parts() -> None:
    found = Components(0.0, 0.0001, 3.0, 0.0003, 299.0, (5, 5), 300, 300)
    low, high = scipy_stats.t.ppf(0.975, 299), scipy_stats.t.ppf(0.975, 3)
    assert found.quantile(0.975) == pytest.approx((0.0001 * high + 0.0003 * low) / 0.0004)


def test_where_nothing_varied_the_interval_is_what_may_have_gone_unseen() -> None:
    """Rule of three: 300 prompts without one deviation leave at most 1 - .025**(1/300) = 1.22% unseen at 97.5%."""
    same = np.ones((3, 300))
    found = compare(same, same)
    assert found.interval(0.95) == pytest.approx((-0.012221, 0.012221), abs=1e-5)
    assert found.detectable(0.05) == pytest.approx(0.012221, abs=1e-5)
    assert compare(same[:1, :2], 0 * same[:1, :2]).interval(0.95)[0] < 0  # two prompts prove nothing
    low, high = compare_runs(np.array([0.6, 0.6]), np.array([0.5, 0.5])).interval(0.95)
    assert low < 0 < high  # runs that happen to be equal prove nothing


def test_exchanging_the_arms_flips_the_sign() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((3, 20)), rng.random((4, 20))
    low, high = compare(a, b).interval(0.95)
    assert compare(b, a).interval(0.95) == pytest.approx((-high, -low))


def test_the_order_of_seeds_and_prompts_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random((3, 20)), rng.random((4, 20))
    order = rng.permutation(20)
    assert compare(a[::-1][:, order], b[:, order]).interval(0.95) == pytest.approx(compare(a, b).interval(0.95))


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3,), (3,)), ((2, 1), (2, 1))])
def test_shapes_that_cannot_be_paired_are_errors(shapes) -> None:
    with pytest.raises(ValueError, match="expected"):
        compare(np.zeros(shapes[0]), np.zeros(shapes[1]))


def draw(rng, *, seeds: int, prompts: int, seed_sd: float, difference=0.0, discrete=False, cluster=1, unequal=1.0):
    """Draw two arms on common prompts: prompt effect, arm-by-prompt effect, run effect, noise."""
    groups = prompts // cluster
    common = rng.normal(0, 0.2 if discrete else 0.3, groups).repeat(cluster)

    def arm(mean: float, sd: float) -> np.ndarray:
        own = rng.normal(0, 0.07 if discrete else 0.17, groups).repeat(cluster)
        scores = mean + common + own + rng.normal(0, sd, seeds)[:, None]
        if discrete:
            return (rng.random((seeds, prompts)) < np.clip(scores, 0, 1)).astype(float)
        return scores + rng.normal(0, 0.35, (seeds, prompts))

    return arm(0.5 + difference / 2, seed_sd), arm(0.5 - difference / 2, seed_sd * unequal)


def simulate(rng, *, cluster: int = 1, **more):
    clusters = np.arange(more["prompts"]) // cluster if cluster > 1 else None
    return compare(*draw(rng, cluster=cluster, **more), clusters)


def decide(rng, **more) -> str:
    """Draw scores of 0 and 1, and return the rule's word; 100 prompts hardly ever suffice for a tie.

    That `verdict()` says this word of the same scores is tested in `test_rule.py`.
    """
    found = simulate(rng, discrete=True, **more)
    return decide_interval(found, arms=("simpo", "dpo"), margin=0.05, alpha=0.05)[0]


CASES = [
    (3, 300, 0.0, {}),
    (3, 300, 0.014, {"discrete": True}),
    (3, 300, 0.04, {}),
    (5, 300, 0.0, {"discrete": True}),
    (5, 300, 0.014, {}),
    (5, 300, 0.04, {"unequal": 3.0}),
    (5, 300, 0.014, {"cluster": 5}),
    (8, 100, 0.014, {}),
]
REPEATS = 2000


def slack(rate: float, repeats: int) -> float:
    """Return two and a half Monte Carlo standard errors of a rate."""
    return 2.5 * math.sqrt(rate * (1 - rate) / repeats)


@pytest.mark.parametrize(("seeds", "prompts", "seed_sd", "more"), CASES)
def test_two_equal_arms_seldom_have_a_winner(seeds: int, prompts: int, seed_sd: float, more: dict) -> None:
    """At most 5% of the time; and not never, which would waste seeds and prompts."""
    rng = np.random.default_rng(seeds * 1000 + prompts)
    found = [
        simulate(rng, seeds=seeds, prompts=prompts, seed_sd=seed_sd, **more).interval(0.95) for _ in range(REPEATS)
    ]
    rate = np.mean([low > 0 or high < 0 for low, high in found])
    assert 0.015 <= rate <= 0.05 + slack(0.05, REPEATS)


@pytest.mark.parametrize(("seeds", "seed_sd"), [(3, 0.028), (5, 0.0)])
def test_the_verdict_seldom_finds_a_winner_between_equal_arms(seeds: int, seed_sd: float) -> None:
    rng = np.random.default_rng(seeds)
    found = [decide(rng, seeds=seeds, prompts=100, seed_sd=seed_sd) for _ in range(1000)]
    won = {arm: found.count(arm) / len(found) for arm in ("simpo", "dpo")}
    assert sum(won.values()) <= 0.05 + slack(0.05, len(found))
    assert min(won.values()) > 0, "neither arm is favoured"
    assert found.count("inconclusive") > 0.8 * len(found)


def test_the_verdict_finds_the_minimum_detectable_difference_four_times_in_five() -> None:
    rng = np.random.default_rng(15)
    draws = {"seeds": 5, "prompts": 100, "seed_sd": 0.014}
    size = float(np.mean([simulate(rng, discrete=True, **draws).detectable(0.05) for _ in range(500)]))
    found = [decide(rng, difference=size, **draws) for _ in range(1000)]
    assert found.count("simpo") / len(found) == pytest.approx(0.8, abs=0.03 + slack(0.8, len(found)))
    assert "dpo" not in found


@pytest.mark.parametrize("seed_sd", [0.0, 0.014])
def test_a_difference_of_the_margin_is_seldom_a_tie(seed_sd: float) -> None:
    rng = np.random.default_rng(7)
    found = [
        simulate(rng, seeds=5, prompts=800, seed_sd=seed_sd, difference=0.05).interval(0.90) for _ in range(REPEATS)
    ]
    assert np.mean([low > -0.05 and high < 0.05 for low, high in found]) <= 0.05 + slack(0.05, REPEATS)


def test_the_minimum_detectable_difference_is_detected_four_times_in_five() -> None:
    rng = np.random.default_rng(8)
    draws = {"seeds": 5, "prompts": 400, "seed_sd": 0.014}
    size = float(np.mean([simulate(rng, **draws).detectable(0.05) for _ in range(500)]))
    found = [simulate(rng, **draws, difference=size).interval(0.95) for _ in range(REPEATS)]
    assert np.mean([low > 0 for low, _ in found]) == pytest.approx(0.8, abs=0.03)


def test_ignoring_seeds_would_find_winners_where_there_are_none() -> None:
    """Why the rule is what it is: the paired t-test over prompts alone, at a run SD of 4 points, is wrong far too often."""
    rng = np.random.default_rng(9)
    naive = []
    for _ in range(200):
        both = simulate(rng, seeds=3, prompts=300, seed_sd=0.04)
        only_prompts = Components(both.difference, 0.0, math.inf, both.prompt_variance, 299.0, (1, 1), 300, 300)
        low, high = only_prompts.interval(0.95)
        naive.append(low > 0 or high < 0)
    assert np.mean(naive) > 0.15


def test_more_seeds_or_prompts_detect_smaller_differences() -> None:
    found = simulate(np.random.default_rng(10), seeds=3, prompts=200, seed_sd=0.02)
    assert planned(found, seeds=6, prompts=200).detectable(0.05) < found.detectable(0.05)
    assert planned(found, seeds=3, prompts=800).detectable(0.05) < found.detectable(0.05)
    enough = needed(found, found.detectable(0.05) * 0.9, 0.05)
    assert enough["seeds"] is not None
    assert enough["seeds"] > 3
    assert planned(found, seeds=enough["seeds"], prompts=200).detectable(0.05) <= found.detectable(0.05) * 0.9


def test_prompts_alone_cannot_settle_what_seeds_leave_open() -> None:
    seeds_only = Components(0.0, 0.001, 4.0, 0.0001, 299.0, (3, 3), 300, 300)
    assert needed(seeds_only, 0.02, 0.05)["prompts"] is None
