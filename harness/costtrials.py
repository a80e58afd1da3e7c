"""Trials that are run for their cost alone: DPO with each way to its reference, and SimPO, side by side.

The claim that SimPO is cheaper has as many answers as DPO has ways to its reference; the sweep itself uses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from harness.arms import ARMS
from harness.config import RunConfig
from harness.design import Design
from harness.schema import Reference, Tuning


def cost_trials(design: Design, selected: Mapping[str, RunConfig]) -> list[RunConfig]:
    """Return the trials, with the first deciding seed; none where `measure_costs` is off.

    They train and answer nothing. Full fine-tuning has no adapter to switch off.
    """
    if not design.any.measure_costs:
        return []
    found = []
    for arm, config in selected.items():
        ways = list(Reference) if ARMS[arm].uses_reference else [Reference.cached]
        if config.train.tuning is Tuning.full:
            ways = [way for way in ways if way is not Reference.adapter_off]
        for way in ways:
            train = replace(config.train, reference=way)
            name = f"{arm}-{way.value}" if ARMS[arm].uses_reference else arm
            found.append(replace(config, train=train, seed=design.seeds[0], evaluate=[], cost_name=name))
    return found
