"""The rule's arithmetic: by hand, against the definition, and by its error rates in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness.decide.deciding import decide_interval
from harness.decide.stats import Arm, Components, against_base, compare, compare_runs, mean_variance
from harness.decide.version_1 import compare_version_1

# 2 seeds x 4 prompts, 0 or 1, small enough for paper and pencil.
A = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=float)
B = np.array([[0, 1, 0, 0], [0, 0, 0, 1]], dtype=float)


def test_components_and_interval_by_hand() -> None:
    """Run means A: .75, .5; B: .25, .25. D = .625 - .25 = .375.

    V_A = var(.75, .5)/2 = .03125/2 = .015625; V_B = 0; A = .015625; nu = .015625**2 / .015625**2 = 1.
    Seed-averaged differences: 1, 0, 0, .5 (mean .375): squares .390625 + .140625 + .140625 + .015625 = .6875;
    c = .6875 / (4 * 3) = .0572917.
    Residuals of A: row means .75 .5, column means 1 .5 0 1, grand .625: +-[-.125, .375, -.125, -.125], squares sum
    2 * (.015625 * 3 + .140625) = .375; mean square .375 / (1 * 3) = .125; noise of A .125 / 8 = .015625.
    Residuals of B: row means .25 .25, columns 0 .5 0 .5, grand .25: +-[0, .5, 0, -.5]: sum 1; mean square 1/3; 1/24.
    A is below the noise of .0572917: V = c.
    One arm varies and the other does not, so that the interval is at least Banerjee's bound, at t_1 = 12.7062 and
    t_3 = 3.18245. With two seeds a quarter of the noise counts at t_1**2 = 161.448, the rest at t_3**2 = 10.1280:
    off = 47.958; 10.1280 * .0572917 + (161.448 - 47.958) * .015625 = 2.35353, whose root is 1.53412.
    """
    found = compare(A, B)
    assert found.difference == pytest.approx(0.375)
    assert found.seed_variance == pytest.approx(0.015625)
    assert found.seed_df == pytest.approx(1.0)
    assert found.noise == pytest.approx(0.0572917, abs=1e-6)
    assert found.prompt_variance == pytest.approx(0.0, abs=1e-12)
    assert found.variance == pytest.approx(0.0572917, abs=1e-6)
    assert found.half_width(0.975) == pytest.approx(1.53412, abs=1e-4)


def test_satterthwaites_degrees_of_freedom_by_hand() -> None:
    """V_a = .0003 and .0002, noise .0001 each, c = .0004: A = .0005, V = .0004 + .0005 - .0002 = .0007.

    The seeds' share is 5/7; 1/nu = (.0003**2 + .0002**2) / 2 / .0005**2 = .26; 1/df = (5/7)**2 * .26 + (2/7)**2 / 299 =
    .132926; df = 7.5230. The run variances have the ratio 1.5 (p = .8): they may be equal.
    """
    arms = (Arm(1.0, 3, 0.0009, 0.0003), Arm(-1.0, 3, 0.0006, 0.0003))
    found = Components(0.0, arms, 0.0004, 299.0, (3, 3), 300, 300, 300.0)
    assert found.half_width(0.975) == pytest.approx(scipy_stats.t.ppf(0.975, 7.5230) * math.sqrt(0.0007), rel=1e-4)


def test_one_seed_an_arm_is_the_paired_t_interval_over_prompts() -> None:
    found = compare(A[:1], B[:1])
    expected = scipy_stats.ttest_rel(A[0], B[0]).confidence_interval(0.95)
    assert found.interval(0.95) == pytest.approx((expected.low, expected.high))
    assert found.seed_variance == 0.0


def welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    ends = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return ends.low, ends.high


def test_runs_without_prompts_are_welchs_test_where_the_arms_may_vary_alike() -> None:
    a, b = np.array([0.61, 0.64, 0.60]), np.array([0.55, 0.59, 0.56])
    assert compare_runs(a, b).interval(0.95) == pytest.approx(welch(a, b))


def test_runs_by_prompt_are_welchs_test_where_prompts_do_not_vary() -> None:
    a, b = np.array([0.61, 0.64, 0.60]), np.array([0.55, 0.59, 0.56])
    found = compare(np.repeat(a[:, None], 50, axis=1), np.repeat(b[:, None], 50, axis=1))
    assert found.interval(0.95) == pytest.approx(welch(a, b))


@pytest.mark.parametrize("b", [[0.55, 0.59, 0.52, 0.58], [0.55, 0.551, 0.55]])
def test_with_other_numbers_of_seeds_or_other_variances_the_interval_is_banerjees(b: list[float]) -> None:
    """Each arm's variance with its own t: it holds for every ratio of variances, where Welch's does not."""
    a = np.array([0.61, 0.64, 0.50])
    found = compare_runs(a, np.array(b))
    parts = [(values.var(ddof=1) / len(values), len(values) - 1) for values in (a, np.array(b))]
    bound = math.sqrt(sum(variance * scipy_stats.t.ppf(0.975, df) ** 2 for variance, df in parts))
    assert found.half_width(0.975) == pytest.approx(bound)
    assert found.half_width(0.975) > (welch(a, np.array(b))[1] - found.difference)


def test_the_number_of_prompts_behind_one_score_bounds_their_sampling() -> None:
    """Rates .6 and .5 on 100 prompts: .6 * .4 / 100 + .5 * .5 / 100 = .0049 more variance."""
    a, b = np.array([0.60, 0.61, 0.59]), np.array([0.50, 0.51, 0.49])
    assert compare_runs(a, b, 100).variance == pytest.approx(compare_runs(a, b).variance + 0.0049)
    assert compare_runs(a[:1], b[:1], 100).half_width(0.975) == pytest.approx(
        scipy_stats.t.ppf(0.975, 99) * math.sqrt(0.0049)
    )
    with pytest.raises(ValueError, match="at least 2 prompts"):
        compare_runs(a, b, 1)


def test_clustered_variance_against_the_definition_of_cr2() -> None:
    """Bell and McCaffrey: each cluster's residuals times (I - H)**(-1/2), H the hat matrix of the mean, 1/N all over."""
    values = np.random.default_rng(0).normal(size=12)
    clusters = np.array([0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 4, 5])  # lopsided on purpose
    residuals, total = values - values.mean(), 0.0
    for label in range(6):
        mine = residuals[clusters == label]
        roots, vectors = np.linalg.eigh(np.eye(len(mine)) - 1 / 12)
        adjusted = vectors @ np.diag(roots**-0.5) @ vectors.T @ mine
        total += adjusted.sum() ** 2
    variance, effective = mean_variance(values, clusters)
    assert variance == pytest.approx(total / 144)
    assert effective == pytest.approx(144 / (25 + 4 + 1 + 4 + 1 + 1))


def test_clusters_of_one_size_are_their_means() -> None:
    values = np.random.default_rng(1).normal(size=12)
    means = values.reshape(4, 3).mean(1)
    assert mean_variance(values, np.arange(12) // 3) == pytest.approx((means.var(ddof=1) / 4, 4.0))


def test_clusters_of_one_are_no_clusters() -> None:
    values = np.random.default_rng(1).normal(size=9)
    assert mean_variance(values, np.arange(9)) == pytest.approx(mean_variance(values))
    assert mean_variance(values)[0] == pytest.approx(values.var(ddof=1) / 9)


UNEQUAL = {
    "one of eight has half": [150, 60, 30, 20, 15, 10, 8, 7],
    "one of eight has most": [250, 10, 10, 8, 7, 6, 5, 4],
    "one of thirty has a third": [100, *[7] * 29],
}


@pytest.mark.parametrize("sizes", UNEQUAL.values(), ids=UNEQUAL.keys())
def test_clusters_of_unequal_size_keep_5_percent(sizes: list[int]) -> None:
    """Arms that differ by topic alone, on seeds and answers that hardly vary: the worst case. Version 1: 9 to 68%."""
    rng, labels = np.random.default_rng(11), np.arange(len(sizes)).repeat(sizes)
    found = {"now": 0, "before": 0}
    for _ in range(400):
        own = rng.normal(0, 0.25, len(sizes))[labels]
        arms = [side * own / 2 + rng.normal(0, 0.01, (3, len(labels))) for side in (1, -1)]
        for name, one in (("now", compare(*arms, labels)), ("before", compare_version_1(*arms, labels))):
            low, high = one.interval(0.95)
            found[name] += low > 0 or high < 0
    assert found["now"] <= 400 * (0.05 + slack(0.05, 400))
    assert found["before"] > 400 * 0.06


ROUNDED = {
    "thirds of a point": (0.2608, 0.3397),
    "binary fractions": (0.25, 0.5),
    "percent over 100": (26.08 / 100, 33.97 / 100),
    "three decimals": (0.261, 0.34),
    "sevenths": (1 / 7, 2 / 7),
}


@pytest.mark.parametrize("number", [float, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("rates", ROUNDED.values(), ids=ROUNDED.keys())
def test_equal_runs_prove_nothing_whatever_their_digits(rates: tuple[float, float], number: type) -> None:
    runs = [np.array([number(rate)] * 3, float) for rate in rates]
    runs[0][1] += 1e-9  # what a mean in another order, or a percent scale, leaves
    low, high = compare_runs(*runs).interval(0.95)
    assert low < 0 < high
    same = compare(*(np.repeat(one[:, None], 300, axis=1) for one in runs))
    assert same.variance == 0.0
    share = 1 - 0.025 ** (1 / 300)
    assert same.half_width(0.975) == pytest.approx(share * (1 + abs(same.difference)))


def test_a_base_is_one_given_model_and_its_run_no_sample() -> None:
    """Only the arm's runs vary: with one arm's seeds, the interval is wider than over prompts alone, and not Welch's."""
    rng = np.random.default_rng(5)
    arm, base = rng.normal(0.6, 0.3, (3, 100)) + rng.normal(0, 0.05, (3, 1)), rng.normal(0.5, 0.3, (1, 100))
    found = against_base(arm, base)
    assert found.seed_variance == pytest.approx(arm.mean(1).var(ddof=1) / 3)
    assert found.half_width(0.975) > compare(arm[:1], base).half_width(0.975)
    assert against_base(arm[:1], base).interval(0.95) == compare(arm[:1], base).interval(0.95)


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
        arms = draw(rng, seeds=3, prompts=300, seed_sd=0.04)
        low, high = compare(*(scores.mean(0, keepdims=True) for scores in arms)).interval(0.95)
        naive.append(low > 0 or high < 0)
    assert np.mean(naive) > 0.15
