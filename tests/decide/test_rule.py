"""The rule: which verdict for which scores, and every unusable table refused by name."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from harness.decide import verdict
from harness.decide.stats import compare
from harness.study.errors import UsageError


def frame(means: dict[str, list[float]], *, prompts: int = 200, scorer: str = "checks", noise: float = 0.1, **columns):
    """Return scores whose run means are as given, with prompts that are easy or hard for both arms alike."""
    rng = np.random.default_rng(0)
    easy = np.linspace(-0.25, 0.25, prompts)
    rows = []
    for arm, runs in means.items():
        for seed, mean in enumerate(runs):
            scores = mean + easy + noise * rng.choice([-1, 1], size=prompts)
            scores += mean - scores.mean()
            rows += [
                {
                    "arm": arm,
                    "config": "c",
                    "seed": seed,
                    "split": "golden",
                    "prompt_id": f"p{i}",
                    "scorer": scorer,
                    "score": s,
                }
                | columns
                for i, s in enumerate(scores.clip(0, 1))
            ]
    return pd.DataFrame(rows)


WIN = {"simpo": [0.60, 0.61, 0.59], "dpo": [0.50, 0.51, 0.50]}
TIE = {"simpo": [0.50, 0.505, 0.50], "dpo": [0.50, 0.50, 0.505]}
OPEN = {"simpo": [0.55, 0.45, 0.60], "dpo": [0.50, 0.40, 0.52]}


def test_a_winner() -> None:
    found = verdict(frame(WIN))
    assert (found["verdict"], found["level"]) == ("simpo", "method")
    assert found["difference"] == pytest.approx(0.0967, abs=1e-3)
    assert found["ci95"][0] > 0
    assert found["reason"].startswith("SimPO beats DPO by 9.7 points on checks")
    assert "200 golden prompts, 3 seeds an arm" in found["reason"]
    assert found["n_seeds"] == {"simpo": 3, "dpo": 3}
    json.dumps(found)


def test_exchanging_the_scores_exchanges_the_winner() -> None:
    found = verdict(frame({"simpo": WIN["dpo"], "dpo": WIN["simpo"]}))
    assert found["verdict"] == "dpo"
    assert found["difference"] < 0
    assert found["reason"].startswith("DPO beats SimPO")


def test_a_tie_and_not_enough_evidence_are_different_things() -> None:
    assert verdict(frame(TIE))["verdict"] == "tie"
    found = verdict(frame(OPEN))
    assert found["verdict"] == "inconclusive"
    assert found["minimum_detectable_difference"] > 0.05
    assert found["to_settle"]["seeds"] > 3
    assert "Not enough evidence" in found["reason"]


def test_a_significant_difference_below_the_margin_is_a_tie() -> None:
    means = {"simpo": [0.520, 0.521, 0.520], "dpo": [0.50, 0.501, 0.50]}
    found = verdict(frame(means, noise=0.0))
    assert found["ci95"][0] > 0
    assert found["verdict"] == "tie"


def test_one_seed_compares_checkpoints() -> None:
    found = verdict(frame({"simpo": [0.6], "dpo": [0.5]}))
    assert (found["verdict"], found["level"]) == ("simpo", "checkpoint")
    assert "checkpoint" in found["reason"]
    assert "says nothing about the methods" in found["reason"]


def test_a_failed_guard_is_a_trade_off() -> None:
    worse = frame({"simpo": [0.30, 0.31, 0.30], "dpo": [0.50, 0.51, 0.50]}, scorer="math")
    scores = pd.concat([frame(WIN), worse])
    found = verdict(scores, metric="checks", guards=[{"metric": "math", "margin": 0.02}])
    assert found["verdict"] == "trade-off"
    assert found["guards"][0]["passed"] is False
    assert found["guards"][0]["difference"] == pytest.approx(-0.2, abs=0.01)
    assert "may be worse on math" in found["reason"]
    equal = pd.concat([frame(WIN), frame(TIE, scorer="math")])
    assert verdict(equal, metric="checks", guards=[{"metric": "math", "margin": 0.05}])["verdict"] == "simpo"


def test_gemmas_published_win_rates_are_no_win() -> None:
    """AlpacaEval 2, Gemma-2-9b-it: DPO wins 536 of 805 prompts, SimPO 540 (leaderboard): 4 prompts are noise."""
    rng = np.random.default_rng(1)
    rows = []
    for arm, wins in (("dpo", 536), ("simpo", 540)):
        scores = rng.permutation([1.0] * wins + [0.0] * (805 - wins))
        rows += [{"arm": arm, "seed": 0, "prompt_id": i, "score": s} for i, s in enumerate(scores)]
    found = verdict(pd.DataFrame(rows))
    assert found["verdict"] in ("tie", "inconclusive")
    assert found["difference"] == pytest.approx(4 / 805)


def test_only_the_confirm_stage_decides() -> None:
    confirm = frame(TIE, stage="confirm")
    confirm["seed"] += 100
    found = verdict(pd.concat([frame(WIN, stage="select"), confirm]))
    assert found["verdict"] == "tie"
    assert set(found["run_means"]["simpo"]) == {"100", "101", "102"}


def test_several_configs_are_selected_on_dev_and_never_on_golden() -> None:
    """The config that is best on golden is poor on dev: it must not be chosen."""
    lucky, solid = frame({"simpo": WIN["simpo"]}), frame({"simpo": TIE["simpo"]})
    lucky["config"], solid["config"] = "lucky", "solid"
    dev = pd.concat([lucky.assign(split="dev", score=0.1), solid.assign(split="dev", score=0.9)])
    found = verdict(pd.concat([lucky, solid, frame({"dpo": TIE["dpo"]}), dev]))
    assert found["configs"]["simpo"] == "solid"
    assert found["verdict"] == "tie"
    assert any("selected on dev" in warning for warning in found["warnings"])
    with pytest.raises(UsageError, match="golden must not select"):
        verdict(pd.concat([lucky, solid, frame({"dpo": TIE["dpo"]})]))


def test_clusters_widen_the_interval() -> None:
    scores = frame(OPEN, noise=0.0)
    scores["score"] += np.where(scores["arm"] == "simpo", scores["prompt_id"].str[1:].astype(int) // 50 * 0.05, 0)
    alone = verdict(scores)
    together = verdict(scores.assign(topic=scores["prompt_id"].str[1:].astype(int) // 50), cluster="topic")
    assert together["n_clusters"] == 4
    assert together["prompt_variance"] > 5 * alone["prompt_variance"]


def test_one_score_a_run_uses_seeds_alone() -> None:
    rows = [{"arm": arm, "seed": i, "score": s} for arm, runs in WIN.items() for i, s in enumerate(runs)]
    found = verdict(pd.DataFrame(rows))
    assert (found["verdict"], found["n_prompts"], found["prompt_variance"]) == ("simpo", 0, 0.0)
    assert "golden prompts" not in found["reason"]
    assert any(text.startswith("a run has one score: the prompts were not sampled") for text in found["warnings"])


def test_the_prompts_behind_one_score_a_run_are_counted_where_their_number_is_known() -> None:
    """10 points on 100 prompts are noise, and on 10,000 they are not; the warning says that the count is a bound."""
    rows = [{"arm": arm, "seed": i, "score": s} for arm, runs in WIN.items() for i, s in enumerate(runs)]
    few, many = (verdict(pd.DataFrame(rows).assign(n_prompts=count)) for count in (100, 10_000))
    assert (few["verdict"], many["verdict"]) == ("inconclusive", "simpo")
    assert (few["n_prompts"], many["n_prompts"]) == (100, 10_000)
    assert few["prompt_variance"] == pytest.approx((0.6 * 0.4 + 0.50333 * 0.49667) / 100, rel=1e-4)
    for found in (few, many):
        assert not any("were not sampled" in text for text in found["warnings"])
        assert any("counts by a bound" in text for text in found["warnings"])


@pytest.mark.parametrize("numbers", [[100, 200], [1, 1], ["many", "many"], [99.5, 99.5]])
def test_a_number_of_prompts_that_makes_no_sense_is_refused(numbers: list) -> None:
    rows = [{"arm": arm, "seed": 0, "score": 0.5, "n_prompts": n} for arm, n in zip(WIN, numbers, strict=True)]
    with pytest.raises(UsageError, match=r"n_prompts is .*give one whole number of at least 2 for all runs"):
        verdict(pd.DataFrame(rows))


@pytest.mark.parametrize("runs", [{"simpo": [0.9], "dpo": [0.1]}, {"simpo": [0.9], "dpo": [0.1, 0.2, 0.15]}])
def test_one_run_without_prompts_is_inconclusive_and_no_error(runs: dict[str, list[float]]) -> None:
    rows = [{"arm": arm, "seed": i, "score": s} for arm, means in runs.items() for i, s in enumerate(means)]
    found = verdict(pd.DataFrame(rows))
    assert (found["verdict"], found["level"]) == ("inconclusive", "checkpoint")
    assert found["ci95"][0] < 0 < found["ci95"][1]
    assert found["minimum_detectable_difference"] == 1.0
    assert any(
        text.startswith("one run in an arm, and no scores by prompt: nothing tells a difference from noise")
        for text in found["warnings"]
    )


def test_one_unscored_run_of_two_leaves_a_checkpoint() -> None:
    rows = [{"arm": arm, "seed": i, "score": s} for arm, runs in WIN.items() for i, s in enumerate(runs[:2])]
    scores = pd.DataFrame(rows)
    scores.loc[0, "score"] = np.nan
    scores["unscored_reason"] = np.where(scores.index == 0, "the judge was down", "")
    assert verdict(scores)["level"] == "checkpoint"
    scores.loc[1, "score"] = np.nan
    scores["unscored_reason"] = np.where(scores.index < 2, "the judge was down", "")
    with pytest.raises(UsageError, match="arm simpo has no scored run of 2"):
        verdict(scores)


def test_unscored_prompts_are_counted_left_out_of_all_runs_and_bounded() -> None:
    scores = frame(WIN)
    gone = (scores["arm"] == "dpo") & (scores["seed"] == 0) & scores["prompt_id"].isin([f"p{i}" for i in range(80)])
    scores.loc[gone, "score"] = np.nan
    scores["unscored_reason"] = np.where(gone, "the judge was down", "")
    found = verdict(scores)
    assert found["n_unscored"] == {"simpo": 0, "dpo": 80}
    assert found["n_prompts"] == 120
    text = " ".join(found["warnings"])
    assert "80 of 200 prompts are unscored" in text
    assert "dpo: 13.3% of its scores are missing" in text
    assert "could change the verdict" in text


@pytest.mark.parametrize(("seeds", "run_sd", "cluster"), [(3, 0.04, 1), (5, 0.014, 5)])
def test_the_word_follows_from_the_interval_whose_error_rate_is_simulated(
    seeds: int, run_sd: float, cluster: int
) -> None:
    """Between equal arms, from a table of 0 and 1 to the word: `tests/decide/test_stats.py` simulates this very interval."""
    rng, prompts = np.random.default_rng(seeds), 120
    index = pd.MultiIndex.from_product(
        [("simpo", "dpo"), range(seeds), range(prompts)], names=["arm", "seed", "prompt_id"]
    )
    table = index.to_frame(index=False).assign(cluster=lambda rows: "c" + (rows["prompt_id"] // cluster).astype(str))
    for _ in range(12):
        easy = rng.normal(0.5, 0.3, prompts // cluster).repeat(cluster)
        chance = np.clip(easy + rng.normal(0, run_sd, (2, seeds, 1)), 0, 1)
        scores = (rng.random(chance.shape) < chance).astype(float)
        found = verdict(table.assign(score=scores.ravel()))
        expected = compare(scores[0], scores[1], np.arange(prompts) // cluster)
        assert found["ci95"] == pytest.approx(expected.interval(0.95))
        low, high = expected.interval(0.95)
        is_tie = max(map(abs, expected.interval(0.90))) < 0.05
        word = "tie" if is_tie else "simpo" if low > 0 else "dpo" if high < 0 else "inconclusive"
        assert found["verdict"] == word


def test_what_diverged_is_counted_and_not_dropped() -> None:
    scores = frame({"simpo": [0.6, 0.6, 0.0], "dpo": [0.5, 0.5, 0.5]})
    bad = (scores["arm"] == "simpo") & (scores["seed"] == 2)
    scores["score"] = scores["score"].where(~bad, 0.0)
    scores["flag"] = np.where(bad, "diverged", "")
    found = verdict(scores)
    assert found["n_seeds"]["simpo"] == 3
    assert "simpo seed 2 diverged: scored as worst, not dropped" in found["warnings"]


def broken(change) -> pd.DataFrame:
    scores = frame(WIN)
    return change(scores)


def with_score(value: float):
    def change(scores: pd.DataFrame) -> pd.DataFrame:
        scores.loc[7, "score"] = value
        return scores

    return change


REFUSED = {
    "a NaN": (with_score(float("nan")), r"arm simpo, seed 0, prompt p7.*NaN.*unscored_reason"),
    "a score above 1": (with_score(1.5), r"arm simpo, seed 0, prompt p7.*1\.5 is outside \[0, 1\]"),
    "a duplicated row": (lambda s: pd.concat([s, s.iloc[[7]]]), r"arm simpo, seed 0, prompt p7.*stands twice"),
    "a missing prompt in one seed": (lambda s: s.drop(index=7), r"arm simpo, seed 0 has no row for 1 prompts.*p7"),
    "other prompts for one arm": (
        lambda s: s[(s["arm"] == "dpo") | (s["prompt_id"] != "p7")],
        r"simpo and dpo were not scored on the same prompts.*p7, only in dpo",
    ),
    "a missing arm": (
        lambda s: s[s["arm"] == "dpo"],
        r"no golden rows of checks for arm simpo; arms that have some: dpo",
    ),
    "no rows": (lambda s: s.iloc[:0], r"no rows"),
    "a missing column": (lambda s: s.drop(columns="seed"), r"column seed is missing"),
    "several scorers": (
        lambda s: pd.concat([s, s.assign(scorer="judge")]),
        r"several scorers \(checks, judge\); choose one with --metric",
    ),
    "two clusters of one prompt": (
        lambda s: s.assign(cluster=np.where(s["seed"] == 0, "a", "b")),
        r"prompt p0 has several clusters: \['a', 'b'\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        verdict(broken(change))


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(UsageError, match=r"metric vibes: no such scorer.*found: checks"):
        verdict(frame(WIN), metric="vibes")


def test_a_small_sample_never_names_a_winner_for_sure() -> None:
    """Two prompts without variance, or two runs that happen to be equal, are no certainty."""
    rows = [
        {"arm": arm, "seed": 0, "prompt_id": i, "score": s}
        for arm, s in (("simpo", 1.0), ("dpo", 0.0))
        for i in range(2)
    ]
    found = verdict(pd.DataFrame(rows))
    assert found["verdict"] == "inconclusive"
    assert found["ci95"][0] < 0 < found["ci95"][1]
    runs = [{"arm": arm, "seed": i, "score": s} for arm, s in (("simpo", 0.6), ("dpo", 0.5)) for i in range(2)]
    assert verdict(pd.DataFrame(runs))["verdict"] == "inconclusive"


def test_small_samples_are_warned_of() -> None:
    few_seeds = verdict(frame({arm: runs[:2] for arm, runs in WIN.items()}))
    assert any("2 seeds an arm" in warning for warning in few_seeds["warnings"])
    few_prompts = verdict(frame(WIN, prompts=20))
    assert any("20 golden prompts: too few" in warning for warning in few_prompts["warnings"])
    assert verdict(frame(WIN))["warnings"] == []


def test_few_passes_or_fails_are_warned_of() -> None:
    """6 of 200 prompts passed, on average over the runs; scores with degrees have no passes."""
    rng = np.random.default_rng(0)
    rows = [
        {"arm": arm, "seed": seed, "prompt_id": i, "score": float(s)}
        for arm, passed in (("simpo", 6), ("dpo", 40))
        for seed in range(3)
        for i, s in enumerate(rng.permutation(np.arange(200) < passed))
    ]
    few = pd.DataFrame(rows)
    (warning,) = [text for text in verdict(few)["warnings"] if "golden prompts on average" in text]
    assert warning.startswith("SimPO passes 6 of 200 golden prompts on average: below 10 an interval is rough")
    most = verdict(few.assign(score=1 - few["score"]))["warnings"]
    assert any(text.startswith("SimPO fails 6 of 200 golden prompts") for text in most)
    assert not any("on average" in text for text in verdict(few.assign(score=few["score"] / 2))["warnings"])


def test_runs_of_one_arm_that_vary_far_more_are_said() -> None:
    wild = {"simpo": [0.60, 0.75, 0.41], "dpo": [0.50, 0.505, 0.50]}
    (warning,) = [text for text in verdict(frame(wild))["warnings"] if "vary far more" in text]
    assert warning.startswith("the runs of SimPO vary far more than those of DPO (SD 16.7 against 0.3 points)")
    assert not any("vary far more" in text for text in verdict(frame(OPEN))["warnings"])


def test_clusters_of_unequal_size_are_warned_of_by_what_they_are_worth() -> None:
    scores = frame(TIE)
    topic = np.minimum(scores["prompt_id"].str[1:].astype(int), 159) // 4  # 39 topics of 4, and one of 44
    found = verdict(scores.assign(cluster=topic.astype(str)))
    assert (found["n_clusters"], round(found["effective_clusters"], 1)) == (40, 15.6)
    assert any(
        text.startswith("40 golden clusters of prompts of unequal size, worth 15.6") for text in found["warnings"]
    )


def test_the_correlation_of_shared_seeds_is_said() -> None:
    together = verdict(frame({"simpo": [0.5, 0.6, 0.7], "dpo": [0.4, 0.5, 0.6]}))
    assert together["seed_correlation"] == pytest.approx(1.0, abs=1e-3)
    against = verdict(frame({"simpo": [0.5, 0.6, 0.7], "dpo": [0.6, 0.5, 0.4]}))
    assert against["seed_correlation"] == pytest.approx(-1.0, abs=1e-3)
    assert verdict(frame({"simpo": [0.5, 0.6], "dpo": [0.4, 0.5]}))["seed_correlation"] is None
    other = frame({"simpo": [0.5, 0.6, 0.7]})
    other["seed"] += 100
    assert verdict(pd.concat([other, frame({"dpo": [0.4, 0.5, 0.6]})]))["seed_correlation"] is None


# More than two arms, and the base

THREE = {"simpo": [0.60, 0.61, 0.59], "dpo": [0.50, 0.51, 0.50], "dpo_norm": [0.60, 0.605, 0.60]}


def test_two_arms_are_one_pair() -> None:
    found = verdict(frame(WIN))
    (pair,) = found["pairs"]
    assert pair == {
        "arms": ["simpo", "dpo"],
        "difference": found["difference"],
        "ci95": found["ci95"],
        "verdict": "simpo",
        "alpha": 0.05,
    }
    assert found["best_set"] == ["simpo"]
    assert verdict(frame(TIE))["best_set"] == ["simpo", "dpo"]


def test_three_arms_end_with_all_pairs_and_the_arms_that_none_beats() -> None:
    """The registered contrast keeps alpha. The clearer of the two others gets half of it (Holm), the last all."""
    found, alone = verdict(frame(THREE)), verdict(frame(WIN))
    pairs = {tuple(row["arms"]): row for row in found["pairs"]}
    assert list(pairs) == [("simpo", "dpo"), ("simpo", "dpo_norm"), ("dpo", "dpo_norm")]
    assert pairs["simpo", "dpo"]["alpha"] == 0.05
    assert found["ci95"] == alone["ci95"]
    assert {pairs["simpo", "dpo_norm"]["alpha"], pairs["dpo", "dpo_norm"]["alpha"]} == {0.025, 0.05}
    assert [row["verdict"] for row in pairs.values()] == ["simpo", "tie", "dpo_norm"]
    assert found["best_set"] == ["simpo", "dpo_norm"]


def test_without_clear_pairs_all_others_share_alpha() -> None:
    four = {arm: [mean, mean + 0.06, mean - 0.05] for arm, mean in zip("abcd", (0.5, 0.51, 0.52, 0.5), strict=True)}
    found = verdict(frame(four), arms=("a", "b"))
    assert [row["alpha"] for row in found["pairs"]] == pytest.approx([0.05] + [0.01] * 5)
    assert found["best_set"] == ["a", "b", "c", "d"]


def test_a_winner_that_fails_a_guard_beats_no_arm() -> None:
    worse = frame({**TIE, "simpo": [0.30, 0.31, 0.30], "dpo_norm": [0.5, 0.5, 0.505]}, scorer="math")
    found = verdict(pd.concat([frame(THREE), worse]), metric="checks", guards=[{"metric": "math", "margin": 0.05}])
    words = {tuple(row["arms"]): row["verdict"] for row in found["pairs"]}
    assert words == {("simpo", "dpo"): "trade-off", ("simpo", "dpo_norm"): "tie", ("dpo", "dpo_norm"): "dpo_norm"}
    assert found["best_set"] == ["simpo", "dpo_norm"]


def test_an_arm_that_cannot_be_compared_is_left_out_of_the_ranking_by_name() -> None:
    other = frame({"orpo": [0.5, 0.5, 0.51]}, prompts=150)
    found = verdict(pd.concat([frame(WIN), other]))
    assert len(found["pairs"]) == 1
    assert any(
        text.startswith("orpo is left out of the ranking: scores: simpo and orpo were not")
        for text in found["warnings"]
    )


def test_each_arm_is_compared_with_the_base_where_it_was_scored_on_the_same_prompts() -> None:
    base = frame({"sft": [0.55]}).assign(config="base")
    found = verdict(pd.concat([frame(WIN), base]))
    assert set(found["against_base"]) == {"simpo", "dpo"}
    assert found["against_base"]["simpo"]["difference"] == pytest.approx(0.05, abs=1e-3)
    assert found["against_base"]["simpo"]["ci95"][0] > 0 > found["against_base"]["dpo"]["ci95"][1]
    assert not found["against_base"]["dpo"]["collapsed"]
    assert [row["arms"] for row in found["pairs"]] == [["simpo", "dpo"]], "the base is ranked by no pair"
    assert verdict(frame(WIN))["against_base"] == {}
    elsewhere = frame({"sft": [0.55]}, prompts=100).assign(config="base")
    assert verdict(pd.concat([frame(WIN), elsewhere]))["against_base"] == {}


def test_an_arm_of_which_half_of_the_runs_collapsed_has_collapsed() -> None:
    scores = pd.concat([frame(WIN), frame({"sft": [0.55]}).assign(config="base")])
    bad = (scores["arm"] == "dpo") & (scores["seed"] > 0)
    scores["flag"] = np.where(bad, "collapsed", "")
    scores["score"] = scores["score"].where(~bad, 0.0)
    found = verdict(scores)["against_base"]
    assert {arm: row["collapsed"] for arm, row in found.items()} == {"simpo": False, "dpo": True}
