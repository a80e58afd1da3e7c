"""What a study can find: power, minimum detectable difference, and the seeds and prompts that a difference needs."""

from __future__ import annotations

import numpy as np
import pytest

from harness.decide.planning import POWER, detectable, needed, planned, power
from harness.decide.simulate import Setting, components_of, draw
from harness.decide.stats import Arm, Components, compare, compare_runs

STUDY = components_of(Setting((3, 3), 200, run_sd=(0.02, 0.02)))


def simulated_power(setting: Setting, difference: float, *, repeats: int = 1000) -> float:
    rng = np.random.default_rng(3)
    found = [compare(*draw(setting, difference, rng), setting.clusters) for _ in range(repeats)]
    return float(np.mean([one.difference > one.half_width(0.975) for one in found]))


def test_more_seeds_or_prompts_detect_smaller_differences() -> None:
    now = detectable(STUDY, 0.05)
    assert detectable(planned(STUDY, seeds=6, prompts=200), 0.05) < now
    assert detectable(planned(STUDY, seeds=3, prompts=800), 0.05) < now
    enough = needed(STUDY, now * 0.9, 0.05)
    assert enough["seeds"] is not None
    assert enough["seeds"] > 3
    assert power(planned(STUDY, seeds=enough["seeds"], prompts=200), now * 0.9, 0.05) >= POWER


@pytest.mark.parametrize(
    "setting",
    [Setting((3, 3), 100), Setting((5, 5), 100, run_sd=(0.03, 0.03)), Setting((1, 1), 150), Setting((3, 5), 100)],
)
def test_the_detectable_difference_is_found_four_times_in_five(setting: Setting) -> None:
    size = detectable(components_of(setting), 0.05)
    assert simulated_power(setting, size) == pytest.approx(POWER, abs=0.035)


def test_what_is_said_to_be_needed_has_the_power_that_it_promises() -> None:
    study, target = Setting((3, 3), 100, run_sd=(0.02, 0.02)), 0.08
    enough = needed(components_of(study), target, 0.05)
    assert enough["seeds"] is not None
    assert enough["prompts"] is not None
    for setting in (Setting((enough["seeds"],) * 2, 100), Setting((3, 3), enough["prompts"])):
        found = simulated_power(Setting(setting.seeds, setting.prompts, run_sd=(0.02, 0.02)), target)
        assert found == pytest.approx(POWER, abs=0.05)


def test_prompts_alone_cannot_settle_what_seeds_leave_open() -> None:
    arms = (Arm(1.0, 3, 0.0015, 0.0), Arm(-1.0, 3, 0.0015, 0.0))
    assert needed(Components(0.0, arms, 0.0001, 299.0, (3, 3), 300, 300, 300.0), 0.02, 0.05)["prompts"] is None


def test_no_difference_beyond_100_points_is_said_to_be_detectable() -> None:
    assert detectable(compare_runs(np.array([0.9, 0.1]), np.array([0.2, 0.8])), 0.05) == 1.0
    for runs in ([0.9], [0.9, 0.1]):
        found = compare_runs(np.array(runs), np.array([0.2]))
        assert found.detectable(0.05) == 1.0
        assert detectable(found, 0.05) == 1.0
    assert needed(compare_runs(np.array([0.9]), np.array([0.2])), 0.05, 0.05) == {"seeds": None, "prompts": None}
