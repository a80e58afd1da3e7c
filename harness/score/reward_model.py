"""The scorer `reward_model`: a Hugging Face sequence-classification reward model on stored answers.

Input: stored answers -> preferences per run. The model's chat template formats prompt and answer; its scalar output is
the reward. The score is the win against the baseline's answer to the same prompt (1, 0.5 for equal rewards, 0), since
rewards have no common scale. The raw rewards stand beside it in preferences.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from tqdm import tqdm

from harness.config.checkpoint import Checkpoints
from harness.config.checkpoint_files import checkpoint_problems
from harness.config.schema import ModelConfig, RewardModelConfig, ScoreConfig
from harness.data.records import Message
from harness.data.template import fix_date
from harness.score.answers import Preference, Stored, conversation
from harness.score.judge_endpoint import Cache
from harness.study.errors import UnreachableError, UsageError
from harness.study.files import Json, digest
from harness.study.registration import registered_date

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredReward(TypedDict):
    """A cached reward."""

    reward: float


def reward_model_problems(score: ScoreConfig) -> Iterator[str]:
    """Yield what the scorer lacks: a path, or the folder that it names."""
    path = score.reward_model.path
    if path is None:
        yield "score.reward_model.path=null: give the folder or Hub id of a reward model"
    elif (path.startswith((".", "/", "~")) or path.count("/") != 1) and not Path(path).is_dir():
        yield f"score.reward_model.path={path}: no such folder; allowed: a folder or a Hub id (owner/name)"


def reward_model_settings(score: ScoreConfig, checkpoints: Checkpoints) -> dict[str, Json]:
    """Return the registered settings of the reward model; empty where none is set up."""
    config = score.reward_model
    if not config.path:
        return {}
    folder = checkpoints.given_folder(ModelConfig(config.path, config.revision))
    return {"reward_model": {"weights_sha256": checkpoints.base_sha256(folder), "max_length": config.max_length}}


def reward_runs(stored: Stored, config: RewardModelConfig, cache: Path) -> dict[Path, list[Preference]]:
    """Score every run that does not score as worst already against the baseline."""
    model = RewardModel(config, cache)
    fix_date(model.tokenizer, registered_date(stored.study))
    cases = [(run, row, (row["split"], row["prompt_id"])) for run, row in stored.cases()]
    own = model.rewards([(conversation(row, run.answers), run.answers[key]) for run, row, key in cases])
    other = model.rewards([(conversation(row, stored.baseline), stored.baseline[key]) for _, row, key in cases])
    found: dict[Path, list[Preference]] = {run.folder: [] for run in stored.runs}
    for (run, _, key), reward, baseline in zip(cases, own, other, strict=True):
        wins, reason = _win(reward, baseline)
        lengths = (len(run.answers[key]), len(stored.baseline[key]))
        details: dict[str, float | str | None] = {"reward": reward, "baseline_reward": baseline}
        found[run.folder].append(Preference(*key, wins, *lengths, reason, details))
    return found


def _win(reward: float | None, baseline: float | None) -> tuple[float | None, str]:
    """Return 1 for the higher reward, 0.5 for equal rewards, 0 else; None with a reason where one is missing."""
    if reward is None or baseline is None:
        return None, "longer than score.reward_model.max_length"
    return (0.5 if reward == baseline else float(reward > baseline)), ""


class RewardModel:
    """A reward model; its weights are loaded for the first reward that is not cached.

    Args:
        config: path, revision, batch size and maximum length.
        cache: folder of cached rewards.

    Raises:
        UsageError: for a checkpoint that is not there, has no safetensors, or is of another kind.
    """

    def __init__(self, config: RewardModelConfig, cache: Path) -> None:
        from transformers import AutoTokenizer

        assert config.path is not None, "checked by `reward_model_problems`"
        checkpoints = Checkpoints()
        self.config = config
        try:
            self.folder = checkpoints.given_folder(ModelConfig(config.path, config.revision))
        except UnreachableError as error:
            raise UnreachableError(f"score.reward_{error}") from error  # the message begins with model.path
        problems = list(checkpoint_problems(self.folder))
        if problems:
            raise UsageError("\n".join(f"score.reward_model.path={config.path}: {problem}" for problem in problems))
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        self._cache: Cache[StoredReward] = Cache(cache / "rewards.sqlite")
        self._weights = checkpoints.base_sha256(self.folder)
        self._model: PreTrainedModel | None = None

    def rewards(self, texts: Sequence[tuple[list[Message], str]]) -> list[float | None]:
        """Return the reward of each answer to its conversation; None where it is longer than `max_length` tokens."""
        ids = [self._ids(turns, answer) for turns, answer in tqdm(texts, desc="tokenise", delay=5, leave=False)]
        dtype = _dtype_name()
        keys = [digest([self._weights, dtype, one]) for one in ids]
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

    def _compute(self, missing: Mapping[str, list[int]]) -> list[tuple[str, float]]:
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

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> PreTrainedModel:
        import torch
        from transformers import AutoModelForSequenceClassification

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
                f"outputs (allowed: 1) and lacks {', '.join(sorted(loaded['missing_keys'])) or 'no weights'}; missing "
                "weights would be random"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.pad_token_id = self.tokenizer.pad_token_id  # the model finds the last token of a row by it
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _dtype_name() -> str:
    import torch

    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
