"""Copies of one run do not count as independent seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from harness.decide.rule import verdict

PROMPTS = 60


def scores(arm: str, seed: int, values: np.ndarray, *, lengths: int | None = None) -> pd.DataFrame:
    frame = pd.DataFrame(
        {"arm": arm, "seed": seed, "prompt_id": [f"p{i}" for i in range(len(values))], "score": values}
    )
    return frame if lengths is None else frame.assign(tokens=lengths + np.arange(len(values)))


def drawn(rate: float, seed: int, prompts: int = PROMPTS) -> np.ndarray:
    return (np.random.default_rng(seed).random(prompts) < rate).astype(float)


def test_one_run_under_five_seeds_is_one_checkpoint() -> None:
    """The verdict, its interval and its level are those of the run given once; each arm is named."""
    one = {arm: drawn(rate, 1) for arm, rate in (("simpo", 0.9), ("dpo", 0.4))}
    five = verdict(pd.concat([scores(arm, seed, values) for arm, values in one.items() for seed in range(1, 6)]))
    once = verdict(pd.concat([scores(arm, 1, values) for arm, values in one.items()]))
    assert five["level"] == "checkpoint"
    for key in ("verdict", "difference", "ci95", "n_seeds", "run_means"):
        assert five[key] == once[key], key
    for arm in one:
        assert any(w.startswith(f"{arm}: seeds 1, 2, 3, 4, 5 are copies of one run") for w in five["warnings"])


def test_a_copy_among_real_seeds_is_left_out_and_the_others_count() -> None:
    """Two of three seeds are equal: the arm has two seeds, as if the copy had never been given."""
    simpo = [scores("simpo", seed, drawn(0.7, seed)) for seed in (1, 2)]
    dpo = [scores("dpo", seed, drawn(0.5, 10 + seed)) for seed in (1, 2, 3)]
    copied = verdict(pd.concat([*simpo, scores("simpo", 3, drawn(0.7, 2)), *dpo]))
    without = verdict(pd.concat([*simpo, *dpo]))
    assert copied["n_seeds"] == {"simpo": 2, "dpo": 3}
    assert copied["ci95"] == without["ci95"]
    assert [w for w in copied["warnings"] if "copies" in w] == [
        "simpo: seeds 2, 3 are copies of one run, or of a training that has changed nothing: their scores are equal on "
        "all 60 prompts; they are counted once"
    ]


@pytest.mark.parametrize(
    ("simpo", "why"),
    [
        ([scores("simpo", s, np.ones(PROMPTS)) for s in (1, 2, 3)], "all right: nothing tells two trainings apart"),
        ([scores("simpo", s, drawn(0.7, 1), lengths=10 * s) for s in (1, 2, 3)], "answers of other lengths"),
    ],
)
def test_runs_that_may_well_be_trainings_of_their_own_count_each(simpo: list[pd.DataFrame], why: str) -> None:
    dpo = [scores("dpo", s, drawn(0.5, 10 + s), lengths=5) for s in (1, 2, 3)]
    found = verdict(pd.concat([*simpo, *dpo]))
    assert found["n_seeds"] == {"simpo": 3, "dpo": 3}, why
    assert not any("copies" in w for w in found["warnings"])


def test_on_few_prompts_equal_scores_are_no_copies() -> None:
    few = [scores(arm, s, drawn(rate, 1, 12)) for arm, rate in (("simpo", 0.7), ("dpo", 0.5)) for s in (1, 2, 3)]
    assert verdict(pd.concat(few))["n_seeds"] == {"simpo": 3, "dpo": 3}


@pytest.mark.parametrize(("digits", "prompts"), [(4, PROMPTS), (3, PROMPTS), (16, 12)])
def test_a_copy_of_a_judges_scores_is_found_though_rounded_and_on_few_prompts(digits: int, prompts: int) -> None:
    values = np.random.default_rng(1).random(prompts)
    simpo = [scores("simpo", 1, values), scores("simpo", 2, values.round(digits))]
    dpo = [scores("dpo", seed, np.random.default_rng(10 + seed).random(prompts)) for seed in (1, 2)]
    assert verdict(pd.concat([*simpo, *dpo]))["n_seeds"] == {"simpo": 1, "dpo": 2}


def test_a_guard_is_tested_on_the_same_runs() -> None:
    """A copy is left out for every metric: the guard's interval is that without it, too."""
    arms = {"simpo": 0.9, "dpo": 0.4}
    given = [
        scores(arm, seed, drawn(rate, base)).assign(scorer=metric)
        for arm, rate in arms.items()
        for metric, offset in (("checks", 0), ("safety", 50))
        for seed, base in ((1, 1 + offset), (2, 2 + offset), (3, 2 + offset))
    ]
    frame = pd.concat(given)
    guards = [{"metric": "safety", "margin": 0.9}]
    copied = verdict(frame, metric="checks", guards=guards)
    without = verdict(frame[frame["seed"] != 3], metric="checks", guards=guards)
    assert copied["guards"] == without["guards"]


# One score a run


def runs(**means: list[float]) -> pd.DataFrame:
    rows = [{"arm": arm, "seed": i, "score": s} for arm, scores in means.items() for i, s in enumerate(scores, start=1)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "means",
    [
        {"simpo": [0.3397] * 3, "dpo": [0.2608] * 3},
        {"simpo": [0.5] * 3, "dpo": [0.25] * 3},
        {"simpo": [33.97 / 100, 0.3397, 0.3397], "dpo": [26.08 / 100, 0.2608, 0.2608]},
        {"simpo": [float(np.float32(0.3397))] * 2, "dpo": [float(np.float32(0.2608))] * 2},
    ],
)
def test_equal_runs_are_one_checkpoint_whatever_their_digits(means: dict[str, list[float]]) -> None:
    """No digits make a winner of them, and no digits make nothing of them: one run an arm, and so inconclusive."""
    found = verdict(runs(**means))
    assert (found["verdict"], found["level"]) == ("inconclusive", "checkpoint")
    assert found["n_seeds"] == {"simpo": 1, "dpo": 1}
    seeds = ", ".join(str(i) for i in range(1, len(means["dpo"]) + 1))
    for arm in means:
        assert (
            f"{arm}: seeds {seeds} are copies of one run, or of a training that has changed nothing: their scores"
            in (" ".join(found["warnings"]))
        )


def test_two_runs_that_share_17_digits_count_once() -> None:
    found = verdict(runs(simpo=[0.7384961738217931, 0.7384961738217931, 0.7211], dpo=[0.6512, 0.6731, 0.6402]))
    without = verdict(runs(simpo=[0.7384961738217931, 0.7211], dpo=[0.6512, 0.6731, 0.6402]))
    assert found["n_seeds"] == {"simpo": 2, "dpo": 3}
    assert found["ci95"] == without["ci95"]
    assert (
        "simpo: seeds 1, 2 are copies of one run, or of a training that has changed nothing: their scores are equal to "
        "the last digit; they are counted once" in found["warnings"]
    )


@pytest.mark.parametrize("score", [0.71, 0.613, 2 / 3, 61 / 97])
def test_short_scores_that_two_runs_share_by_chance_count_each_with_a_warning(score: float) -> None:
    found = verdict(runs(simpo=[score, score, 0.7], dpo=[0.5, 0.52, 0.51]))
    assert found["n_seeds"] == {"simpo": 3, "dpo": 3}
    assert any(
        "seeds 1, 2 have the same score, which is so short that chance may do it" in w for w in found["warnings"]
    )


def test_a_copy_of_a_third_arm_is_left_out_of_its_pairs() -> None:
    """A study of three arms: the third one's copies do not narrow its intervals either."""
    three = [scores(arm, s, drawn(rate, 10 * n + s)) for n, (arm, rate) in enumerate(RATES.items()) for s in (1, 2, 3)]
    copied = [part for part in three if not (part["arm"].iloc[0] == "orpo" and part["seed"].iloc[0] == 3)]
    copied.append(scores("orpo", 3, drawn(RATES["orpo"], 22)))
    found = verdict(pd.concat(copied))
    assert any(w.startswith("orpo: seeds 2, 3 are copies") for w in found["warnings"])
    without = pd.concat([part for part in copied if not (part["arm"].iloc[0] == "orpo" and part["seed"].iloc[0] == 3)])
    assert found["pairs"] == verdict(without)["pairs"]


RATES = {"simpo": 0.7, "dpo": 0.6, "orpo": 0.5}
