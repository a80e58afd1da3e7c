"""What there is to be wary of in a judge: kinship with the policy or the labeller, a slot or length that it favours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from harness.registration import read_study
from harness.scoreconfig import ScoreConfig
from harness.stored import Stored

# Families of models, by what their names contain.
_FAMILIES = {
    "OpenAI": r"gpt|\bo[1-9]\b|\bo[1-9]-|davinci|chatgpt",
    "Anthropic": r"claude",
    "Google": r"gemini|gemma|palm",
    "Meta": r"llama",
    "Mistral": r"mi[sx]tral|ministral|magistral|codestral",
    "Qwen": r"qwen|qwq",
    "DeepSeek": r"deepseek",
    "Microsoft": r"\bphi\b|phi-?[1-9]",
    "Hugging Face": r"smollm|zephyr",
    "AI2": r"olmo|tulu",
    "Cohere": r"command-r|cohere|aya",
    "RLHFlow": r"armorm",
}
# Who labelled published preference sets, as far as their cards say so.
_LABELLERS = {
    "ultrafeedback-armorm": "ArmoRM",
    "ultrafeedback": "gpt-4",
    "distilabel": "gpt-4",
    "alpaca_farm": "gpt-4",
    "nectar": "gpt-4",
}
FLIPS = 0.4
SLOT = 0.2
LONGER = 0.75


def family(name: str | None) -> str | None:
    """Return the family that a model's name tells, or None."""
    found = (name or "").lower()
    return next((title for title, pattern in _FAMILIES.items() if re.search(pattern, found)), None)


def labeller_of(config: ScoreConfig, study: Mapping[str, Any]) -> str | None:
    """Return who labelled the training pairs: what the config says, or what is known of a published set."""
    if config.labeller:
        return config.labeller
    path = str((study.get("data", {}).get("train") or {}).get("path", "")).lower()
    return next((labeller for name, labeller in _LABELLERS.items() if name in path), None)


def kinship_warnings(name: str | None, kind: str, config: ScoreConfig, study: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning where who scores is of the policy's family, or is (of the family of) who labelled the pairs."""
    own = family(name)
    policy = str((study.get("model") or {}).get("path", ""))
    if own and own == family(policy):
        yield f"the {kind} {name} and the policy {policy} are of one family ({own}): models favour their own kind"
    labeller = labeller_of(config, study)
    if labeller and name and (labeller.lower() in name.lower() or (own and own == family(labeller))):
        yield (
            f"the {kind} {name} is, or is related to, {labeller}, which labelled the training pairs: what was trained "
            "to please it is judged by it"
        )


def judge_warnings(config: ScoreConfig, stored: Stored, facts: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the verdict must know of the judge."""
    study = read_study(stored.study / "study.yaml")
    found = list(kinship_warnings(config.judge.model, "judge", config, study))
    flips, slot, longer = facts["flip_rate"], facts["first_slot_rate"], facts["longer_wins_rate"]
    if flips is not None and flips > FLIPS:
        found.append(f"the judge contradicts itself on {flips:.0%} of the comparisons when the order changes")
    if slot is not None and abs(slot - 0.5) > SLOT:
        found.append(f"the judge prefers the answer shown first in {slot:.0%} of its verdicts (fair: 50%)")
    if longer is not None and not 1 - LONGER <= longer <= LONGER:
        found.append(f"the longer answer wins {longer:.0%} of the decided comparisons; see length_controlled")
    if facts["answers_to_the_judge"]:
        counts = ", ".join(f"{name} {count}" for name, count in facts["answers_to_the_judge"].items())
        found.append(f"answers that speak to the judge, by run: {counts}; read them before you trust its verdicts")
    known = facts.get("calibration")
    if known and known["ci95"] and known["ci95"][0] <= 0.5:
        found.append(
            f"on {known['pairs']} pairs with known labels the judge agrees in {known['agreement']:.0%} "
            f"({known['ci95'][0]:.0%} to {known['ci95'][1]:.0%}): not shown to be better than a coin"
        )
    return found
