"""The scorer `reward_model`: any Hugging Face sequence-classification reward model, on stored answers.

Prompt and answer are put through the reward model's own chat template once; its scalar output is the reward. A score is
the win against the baseline's answer to the same prompt (1, 0.5 for equal rewards, 0): rewards have no scale of their
own, so their means over prompts say little. The raw rewards stand beside it in preferences.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.config.checkpoint import base_sha256, checkpoint_dir, checkpoint_problems
from harness.config.schema import ModelConfig, RewardModelConfig, ScoreConfig
from harness.data.records import Message
from harness.score.answers import Preference, Stored, conversation
from harness.score.judge_endpoint import Cache
from harness.study.errors import UnreachableError, UsageError
from harness.study.files import digest


class RewardModel:
    """A reward model, loaded when the first reward that is not in the cache is asked for.

    Args:
        config: which one.
        cache: folder of the rewards that are known.

    Raises:
        UsageError: for no model, one without safetensors, or one that is no reward model.
    """

    def __init__(self, config: RewardModelConfig, cache: Path) -> None:
        if config.path is None:
            raise UsageError("score.reward_model.path=null: give the folder or Hub id of a reward model")
        from transformers import AutoTokenizer

        self.config = config
        try:
            self.folder = checkpoint_dir(ModelConfig(config.path, config.revision))
        except UnreachableError as error:
            raise UnreachableError(f"score.reward_{error}") from error  # it says what is wrong with a model.path
        problems = list(checkpoint_problems(self.folder))
        if problems:
            raise UsageError("\n".join(f"score.reward_model.path={config.path}: {problem}" for problem in problems))
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        self._cache = Cache(cache / "rewards.sqlite")
        self._weights = base_sha256(self.folder)
        self._model: Any = None

    def rewards(self, texts: Sequence[tuple[list[Message], str]]) -> list[float | None]:
        """Return the reward of each answer to its conversation; None where it is longer than `max_length` tokens."""
        ids = [self._ids(turns, answer) for turns, answer in tqdm(texts, desc="tokenise", delay=5, leave=False)]
        keys = [digest([self._weights, _dtype_name(), one]) for one in ids]
        known = {key: found["reward"] for key in set(keys) if (found := self._cache.get(key))}
        missing = {key: one for key, one in zip(keys, ids, strict=True) if key not in known}
        fits = {key: one for key, one in missing.items() if len(one) <= self.config.max_length}
        for key, reward in self._compute(fits):
            self._cache.put(key, {"reward": reward})
            known[key] = reward
        return [known.get(key) for key in keys]

    def _ids(self, turns: list[Message], answer: str) -> list[int]:
        if self.tokenizer.chat_template:
            whole = [*turns, {"role": "assistant", "content": answer}]
            encoded = self.tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)
            return list(encoded["input_ids"])
        prompt = "\n\n".join(turn["content"] for turn in turns)
        return list(self.tokenizer(prompt, answer)["input_ids"])

    def _compute(self, missing: dict[str, list[int]]) -> list[tuple[str, float]]:
        import torch

        if not missing:
            return []
        model = self._loaded()
        keys = sorted(missing, key=lambda key: len(missing[key]), reverse=True)
        found: list[tuple[str, float]] = []
        size = self.config.batch_size
        with torch.no_grad():
            for start in tqdm(range(0, len(keys), size), desc="reward model", delay=5, leave=False):
                batch = [missing[key] for key in keys[start : start + size]]
                padded = self.tokenizer.pad({"input_ids": batch}, return_tensors="pt", padding_side="right")
                rewards = model(**padded.to(model.device)).logits[:, 0].float().tolist()
                found += zip(keys[start : start + size], rewards, strict=True)
        bad = [key for key, reward in found if math.isnan(reward)]
        if bad:
            raise UsageError(f"score.reward_model.path={self.config.path}: {len(bad)} rewards are no numbers (NaN)")
        return found

    def _loaded(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        if self._model is None:
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                self.folder,
                dtype=getattr(torch, _dtype_name()),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            if loaded["missing_keys"] or model.config.num_labels != 1:
                raise UsageError(
                    f"score.reward_model.path={self.config.path}: no reward model: it has {model.config.num_labels} "
                    f"outputs (allowed: 1) and lacks {', '.join(sorted(loaded['missing_keys'])) or 'no weights'}; what "
                    "lacks would be random"
                )
            self._model = model.to(device)
            if self.tokenizer.pad_token is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
            self._model.config.pad_token_id = self.tokenizer.pad_token_id  # finds the last token of each row
            self._model.eval()
        return self._model


def _dtype_name() -> str:
    import torch

    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def reward_runs(stored: Stored, config: ScoreConfig, cache: Path) -> dict[Path, list[Preference]]:
    """Score every run that is not scored as worst already against the baseline."""
    model = RewardModel(config.reward_model, cache)
    cases = [(run, row) for run in stored.runs if not run.failed for row in stored.of_run(run)]
    keys = [(row["split"], row["prompt_id"]) for _, row in cases]
    own = model.rewards(
        [(conversation(row, run.answers), run.answers[key]) for (run, row), key in zip(cases, keys, strict=True)]
    )
    other = model.rewards(
        [(conversation(row, stored.baseline), stored.baseline[key]) for (_, row), key in zip(cases, keys, strict=True)]
    )
    found: dict[Path, list[Preference]] = {run.folder: [] for run in stored.runs}
    for (run, _), key, reward, baseline in zip(cases, keys, own, other, strict=True):
        found[run.folder].append(_preference(key, reward, baseline, run.answers[key], stored.baseline[key]))
    return found


def _preference(
    key: tuple[str, str], reward: float | None, baseline: float | None, answer: str, other: str
) -> Preference:
    known = reward is not None and baseline is not None
    wins = None if not known else 0.5 if reward == baseline else float(reward > baseline)  # type: ignore[operator]
    reason = "" if known else "longer than score.reward_model.max_length"
    raw = {"reward": reward, "baseline_reward": baseline}
    return Preference(*key, wins, len(answer), len(other), reason, raw)
