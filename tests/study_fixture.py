"""Build a small, complete study folder by the contract between the stages: two arms, three seeds, and the SFT base.

The answers, scores and curves are drawn from a seeded generator; verdict.json follows from the scores.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from harness.score.trial_scores import completion_flags
from harness.study.files import digest, write_json, write_jsonl, write_text
from harness.study.scores_csv import SCORE_COLUMNS

ARMS = ("simpo", "dpo")
LABELS = {
    "simpo": "beta=2,gamma_beta_ratio=0.5,length_norm=1,sft_weight=0,lr=0.0001",
    "dpo": "beta=0.1,lr=0.0001",
    "sft": "base",
}
SKILL = {"sft": 0.45, "dpo": 0.58, "simpo": 0.70}
FILLER = " Sure, here is the answer that you asked for, I hope that it helps you."
VERSIONS = {"python": "3.11.9", "torch": "2.13.0", "trl": "1.16.0", "transformers": "5.23.0", "peft": "0.21.0"}
HARDWARE = {"cpu": "Example CPU", "cores": 2, "memory_bytes": 25769803776, "device": "cpu"}


def make_prompts(count: int, split: str) -> list[dict]:
    rng = np.random.default_rng([count, len(split)])
    rows = []
    for number in range(count):
        letters = "".join(rng.choice(list("abcdefghij"), 4))
        prompt = f"Sort the letters {letters} (question {number})"
        rows.append(
            {
                "split": split,
                "prompt_id": digest([split, prompt])[:16],
                "prompt": prompt,
                "answer": "".join(sorted(letters)),
            }
        )
    return rows


def answer(arm: str, row: dict, rng: np.random.Generator) -> dict:
    """Draw a completion: right or wrong by the arm's skill, padded with filler more by the base than by the arms."""
    right = rng.random() < SKILL[arm]
    text = row["answer"] if right else row["answer"][::-1]
    if rng.random() < {"sft": 0.6, "dpo": 0.4, "simpo": 0.1}[arm]:
        text += FILLER
    ended = rng.random() > 0.03
    return {
        "split": row["split"],
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "completion": text,
        "tokens": len(text) + 1,
        "ended": ended,
        "flags": completion_flags(text, ended=ended),
        "right": right,
    }


def score_rows(arm: str, seed: int, answers: list[dict], rng: np.random.Generator) -> list[dict]:
    rows = []
    for row in answers:
        ranked = {"sum": float(rng.random() < SKILL[arm] + 0.1), "mean": float(rng.random() < SKILL[arm])}
        if arm == "sft":
            ranked["sum"] = 0.5
        scores = {
            "checks": float(row["right"]),
            "checks_fraction": 1.0 if row["right"] else 0.5,
            "preference_accuracy": (ranked["sum"] + ranked["mean"]) / 2,
            "preference_accuracy_sum": ranked["sum"],
            "preference_accuracy_mean": ranked["mean"],
        }
        for scorer, score in scores.items():
            rows.append(
                {
                    "arm": arm,
                    "config": LABELS[arm],
                    "seed": seed,
                    "split": row["split"],
                    "prompt_id": row["prompt_id"],
                    "scorer": scorer,
                    "score": score,
                    "cluster": "",
                    "tokens": row["tokens"],
                    "chars": len(row["completion"]),
                    "unscored_reason": "",
                    "stage": "select" if row["split"] == "dev" else "confirm",
                    "flag": "",
                }
            )
    return rows


def curve(arm: str, rng: np.random.Generator, steps: int = 24) -> list[dict]:
    start = {"dpo": math.log(2), "simpo": 1.31}[arm]
    rows = []
    for step in range(1, steps + 1):
        done = step / steps
        rows.append(
            {
                "step": step,
                "epoch": 2 * done,
                "loss": start * (1 - 0.5 * done) + float(rng.normal(0, 0.02)),
                "grad_norm": 2.0 + 3 * done + float(rng.normal(0, 0.3)),
                "learning_rate": 1e-4 * (1 - done),
                "rewards/accuracies": 0.5 + 0.4 * done + float(rng.normal(0, 0.03)),
                "rewards/margins": done,
            }
        )
    return rows


def manifest(arm: str, seed: int, trial_id: str, tokens: int) -> dict:
    trained = arm != "sft"
    plan = digest(["plan", seed])
    seconds = {
        "load": 1.9 + seed / 10,
        "train": {"simpo": 6.2, "dpo": 7.1, "sft": 0}[arm],
        "generate": 4.0,
        "heldout": 1.0,
        "score": 0.1,
    }
    if arm == "dpo":
        seconds["reference"] = 2.5 if seed == 0 else 0.1
    about = {
        "trial_id": trial_id,
        "arm": arm,
        "config": LABELS[arm],
        "seed": seed,
        "status": "complete",
        "flags": [],
        "method": {"name": arm, "beta": {"simpo": 2.0, "dpo": 0.1, "sft": None}[arm]},
        "engine": "paired",
        "versions": VERSIONS,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "hardware": HARDWARE,
        "base_sha256": digest("base"),
        "data_sha256": digest("data"),
        "label_noise": {"share": 0.0, "flipped": 0},
        "dropped_pairs": {"train": {"longer than data.max_length": 3}, "dev": {}, "golden": {}},
        "seconds": seconds,
        "peak_memory_bytes": {"load": 600 * 2**20, "generate": 700 * 2**20}
        | ({"train": 910 * 2**20} if trained else {}),
        "tokens": {"generated": tokens} | ({"train": 41000} if trained else {}),
        "warnings": [],
        "created": "2026-11-23T22:00:00+00:00",
    }
    if trained:
        hashes = ("batch_plan_sha256", "consumed_tokens_sha256", "expected_tokens_sha256")
        about |= dict(zip(hashes, (plan, digest(["tokens", seed]), digest(["tokens", seed])), strict=True))
    return about


def write_trial(folder: Path, arm: str, seed: int, prompts: list[dict], *, bare: bool = False) -> list[dict]:
    """Write one trial (or the base) and return its scores."""
    rng = np.random.default_rng([seed, len(arm)])
    answers = [answer(arm, row, rng) for row in prompts]
    tokens = sum(row["tokens"] for row in answers)
    if bare:
        answers = [row | {"tokens": None} for row in answers]
    scores = score_rows(arm, seed, answers, rng)
    write_json(folder / "manifest.json", manifest(arm, seed, folder.name, tokens))
    write_jsonl(folder / "completions.jsonl", [{k: v for k, v in row.items() if k != "right"} for row in answers])
    write_jsonl(folder / "scores.jsonl", scores)
    if arm != "sft":
        if not bare:
            write_jsonl(folder / "train.jsonl", curve(arm, rng))
        write_text(folder / "config.yaml", yaml.safe_dump({"method": {"name": arm}, "seed": seed}))
    return scores


def settings(metric: str, seeds: tuple[int, ...]) -> dict:
    split = {"path": "train.jsonl", "rows": 240, "pairs": 234, "prompts": 200, "sha256": digest("split")}
    return {
        "study": "letters",
        "question": "Which of SimPO and DPO sorts letters better?",
        "arms": list(ARMS),
        "configs": {arm: [LABELS[arm]] for arm in ARMS},
        "seeds": {arm: list(seeds) for arm in ARMS},
        "metric": metric,
        "margin": 0.05,
        "alpha": 0.05,
        "guards": [],
        "model": {"path": "embedded", "revision": None, "base_sha256": digest("base")},
        "data": {
            "train": split,
            "dev": split | {"path": "dev.jsonl", "rows": 20},
            "golden": split | {"path": "golden.jsonl", "rows": 60},
        },
        "command": "python -m harness.sweep +method=simpo,dpo seed=0,1,2",
        "created": "2026-11-23T22:00:00+00:00",
    }


def verdict_of(scores: pd.DataFrame, metric: str) -> dict:
    """Write down a verdict by hand: the difference of the means, and an interval of fixed width about it."""
    rows = scores[(scores["split"] == "golden") & (scores["scorer"] == metric)]
    run_means = {arm: rows[rows["arm"] == arm].groupby("seed")["score"].mean().to_dict() for arm in ARMS}
    means = {arm: sum(values.values()) / len(values) for arm, values in run_means.items()}
    difference = means["simpo"] - means["dpo"]
    return {
        "verdict": "simpo",
        "level": "method",
        "metric": metric,
        "arms": list(ARMS),
        "difference": difference,
        "ci95": [difference - 0.09, difference + 0.09],
        "ci90": [difference - 0.07, difference + 0.07],
        "margin": 0.05,
        "alpha": 0.05,
        "n_prompts": int(rows["prompt_id"].nunique()),
        "n_clusters": int(rows["prompt_id"].nunique()),
        "n_seeds": {arm: len(values) for arm, values in run_means.items()},
        "n_unscored": dict.fromkeys(ARMS, 0),
        "seed_variance": 0.0002,
        "prompt_variance": 0.001,
        "minimum_detectable_difference": 0.11,
        "guards": [],
        "warnings": [],
        "reason": f"SimPO answers {100 * difference:.1f} points more of the golden prompts correctly than DPO, more than chance explains.",
        "caveats": [],
        "recommendation": {
            "ship": "simpo",
            "why": f"SimPO beats DPO by {100 * difference:.1f} points. SimPO is above the SFT base.",
            "next": "Read the completions side by side before you ship: a score is no substitute for looking.",
        },
        "means": means,
        "run_means": {arm: {str(seed): mean for seed, mean in values.items()} for arm, values in run_means.items()},
    }


def build_study(
    folder: Path,
    *,
    prompts: int = 60,
    seeds: tuple[int, ...] = (0, 1, 2),
    metric: str = "checks",
    bare: bool = False,
) -> Path:
    """Write the study and return its folder.

    Args:
        folder: where to.
        prompts: golden prompts.
        seeds: of each arm.
        metric: what decides.
        bare: leave out learning curves and lengths in tokens, whose figures take most of the time of a report.
    """
    rows = make_prompts(prompts, "golden") + make_prompts(20, "dev")
    scores = write_trial(folder / "base", "sft", 0, rows, bare=bare)
    for arm in ARMS:
        for seed in seeds:
            scores += write_trial(folder / "trials" / digest([arm, seed])[:12], arm, seed, rows, bare=bare)
    frame = pd.DataFrame(scores, columns=list(SCORE_COLUMNS))
    write_text(folder / "scores.csv", frame.to_csv(index=False))
    write_text(folder / "study.yaml", yaml.safe_dump(settings(metric, seeds), sort_keys=False))
    write_json(folder / "verdict.json", verdict_of(frame, metric))
    return folder
