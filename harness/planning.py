"""What `plan=true` prints: the trials of a study by stage, their number and size, and what difference they can find."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.calibrate import detectable_before
from harness.config import config_label
from harness.design import Design
from harness.estimate import estimate, lines, machine_rate, refuse_full_disk
from harness.folders import is_complete, study_dir
from harness.inputs import identify, num_steps, splits_of
from harness.manifest import read_manifest
from harness.records import UnreachableError, UsageError
from harness.schema import RunConfig
from harness.selection import read_selection


def print_plan(design: Design, warnings: Sequence[str], at_once: int = 1) -> None:
    """Print the trials of a study, their number and their size; nothing is run."""
    try:
        splits_of(design.any)
        unknown = ""
        identify(design.any)
    except UnreachableError as error:
        unknown = str(error).splitlines()[0]
    print(f"study {study_dir(design.base)}: {_count(design)} and the SFT base")
    if unknown:
        print(f"ids and sizes are not known here: {unknown}")
    else:
        print(_size_of_a_trial(design.any))
    if not unknown:
        print("\n".join(_cost(design, at_once)))
    print(_findable(design))
    if design.any.score.judge.model and not unknown:
        print(_judging(design))
    print(f"{'trial':14}{'stage':9}{'arm':14}{'seed':>5}  {'state':10}config")
    for stage, trial in _trials(design):
        name = "-" if unknown else identify(trial)
        state = "-" if unknown else "complete" if is_complete(trial, tuple(trial.evaluate)) else "to run"
        print(f"{name:14}{stage:9}{trial.method.name:14}{trial.seed:5}  {state:10}{config_label(trial)}")
    for arm in design.tuned:
        for seed in design.seeds:
            print(f"{'-':14}{'confirm':9}{arm:14}{seed:5}  {'to run':10}the config that dev selects")
    for warning in warnings:
        print(f"warning: {warning}")


def to_run(design: Design) -> tuple[int, int]:
    """Count the trials of a design that are not complete: those that tune, and those that decide."""
    missing = [stage for stage, trial in _trials(design) if not is_complete(trial, tuple(trial.evaluate))]
    suggested = (design.any.search.trials or 0) * len(design.tuning_seeds) if design.suggests else 0
    tune = missing.count("tune") + suggested * len(design.arms)
    selected = {arm: found["selected"] for arm, found in _selection(design).get("arms", {}).items()}
    chosen = {arm: [c for c in design.arms[arm] if config_label(c) == selected.get(arm)] for arm in design.tuned}
    known = {arm: configs[0] for arm, configs in chosen.items() if configs}
    left = [trial for trial in design.deciding(known, design.seeds) if not is_complete(trial, tuple(trial.evaluate))]
    unknown = (len(design.tuned) - len(known)) * len(design.seeds)
    return tune, missing.count("confirm") + len(left) + unknown


def _selection(design: Design) -> dict[str, Any]:
    try:
        return read_selection(study_dir(design.base))
    except (UsageError, ValueError):  # a damaged one is for the sweep to mend or to refuse
        return {}


def _cost(design: Design, at_once: int) -> Sequence[str]:
    tune, confirm = to_run(design)
    found = estimate(design, tune=tune, confirm=confirm, rate=machine_rate(design.any), at_once=at_once)
    return lines(found, tune=tune, confirm=confirm, keep=design.any.keep)


def refuse_what_does_not_fit(design: Design, at_once: int) -> None:
    """Raise a UsageError where what is missing of a study does not fit on the disk."""
    tune, confirm = to_run(design)
    found = estimate(design, tune=tune, confirm=confirm, rate=1e9, at_once=at_once)  # seconds do not matter here
    may_keep_less = bool(tune) and design.any.keep == "all"
    refuse_full_disk(Path(design.any.results_dir), found.disk_bytes, may_keep_less=may_keep_less)


def _findable(design: Design) -> str:
    """Say what difference the study could find, before anything is trained."""
    seeds = len(design.seeds)
    try:
        prompts = len(splits_of(design.any).golden_prompts)
    except UnreachableError:
        return "what difference the study could find is not known without its golden prompts"
    least = 100 * detectable_before(seeds, prompts, alpha=design.base.decide.alpha)
    level = "" if seeds > 1 else "; with one seed it compares two checkpoints and not the methods"
    return (
        f"with {seeds} seeds an arm and {prompts} golden prompts, a difference of about {least:.1f} points is found "
        f"with 80% power (assumed spreads; python -m harness.calibrate has them and more){level}"
    )


def _judging(design: Design) -> str:
    """Say how often the judge will be asked at most, and what that may cost."""
    from harness.judge.budget import estimate
    from harness.judge.template import load_template

    config, splits = design.any, splits_of(design.any)
    prompts = [(p, len(design.arms) * len(design.seeds)) for p in splits.golden_prompts]
    if config.decide.metric in ("judge", "length_controlled"):
        tuned = len(design.tuning(design.arms, design.tuning_seeds)) if design.tuned else 0
        prompts += [(p, tuned) for p in splits.dev_prompts]
    template = load_template(config.score.judge.template)
    longest = "word " * (config.generate.max_new_tokens or 0)  # an answer that runs to its limit
    asked = [
        template.messages(prompt.prompt[-1]["content"], longest, longest)
        for prompt, times in prompts
        for _ in range(2 * times)
    ]
    most = estimate(config.score.judge, asked)
    return f"judge {config.score.judge.model}: at most {most}, were every answer as long as it may be"


def _trials(design: Design) -> list[tuple[str, RunConfig]]:
    tuned = {arm: design.arms[arm] for arm in design.tuned}
    others = {arm: configs[0] for arm, configs in design.arms.items() if arm not in tuned}
    found = [("tune", trial) for trial in design.tuning(tuned, design.tuning_seeds)]
    return found + [("confirm", trial) for trial in design.deciding(others, design.seeds)]


def _count(design: Design) -> str:
    sizes = {arm: design.any.search.trials or 0 if design.suggests else len(design.arms[arm]) for arm in design.tuned}
    confirm = len(design.arms) * len(design.seeds)
    if not sizes:
        return f"{confirm} trials"
    tune = sum(sizes.values()) * len(design.tuning_seeds)
    shown = ", ".join(f"{arm} {size}" for arm, size in sizes.items())
    at_most = "at most " if design.any.search.keep < 1 or design.suggests else ""
    return (
        f"{at_most}{tune} trials to tune ({shown} configs x {len(design.tuning_seeds)} seeds, on dev), "
        f"{confirm} to confirm (1 config an arm x {len(design.seeds)} fresh seeds, on golden)"
    )


def _size_of_a_trial(trial: RunConfig) -> str:
    """Say what one trial works through, and how long those took that are finished already."""
    splits = splits_of(trial)
    pairs = len(splits.train)
    steps = num_steps(trial, pairs)
    answers = {"dev": len(splits.dev_prompts), "golden": len(splits.golden_prompts)}
    text = f"each trial: {pairs} pairs x {trial.train.epochs} epochs = {steps} steps of {trial.train.batch_size}; "
    text += f"answers to {answers['dev']} dev and {answers['golden']} golden prompts"
    found = [read_manifest(path.parent) for path in study_dir(trial).glob("trials/*/manifest.json")]
    seconds = [sum(manifest["seconds"].values()) for manifest in found if manifest.get("status") == "complete"]
    return text + (f"; finished ones took {fmean(seconds):.0f} s on average" if seconds else "")
