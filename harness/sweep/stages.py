"""Run one trial from its config to its scores: train -> generate -> held-out log-probs -> score.

A stage that the manifest names as done is not run again; a killed trial resumes at the first missing stage.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any, Unpack

import yaml

from harness.config.arms import MethodConfig
from harness.config.machine import provenance
from harness.config.trial_id import plain
from harness.data.inputs import Tokens, num_steps, prompt_rows
from harness.generate.heldout import heldout_rows
from harness.generate.vllm import drop_answers, stored_answers
from harness.score.scorers import TRIAL_SCORERS
from harness.score.trial_scores import completion_row, score_trial
from harness.study.errors import DivergedError
from harness.study.files import FileRecord, locked, read_jsonl, to_jsonl
from harness.study.integrity import DELETED, delete_weights, fingerprints, resume_stages, without_weights
from harness.study.log import LOG, say, trial_log
from harness.study.manifest import Finding, Manifest, load_manifest, read_manifest, with_findings, write_manifest
from harness.study.outcome import SPLIT_PREFIX, STEP, Outcome, describe, end_log, forget, note_step, write_failure
from harness.sweep.problems import find_warnings
from harness.sweep.trial import Context, Trial
from harness.track.tracker import Tracker, track
from harness.train.base import import_logging_libraries, threads
from harness.train.checkpoints import drop_broken
from harness.train.layout import Layout
from harness.train.memory import Meter
from harness.train.preconditions import proved_once
from harness.train.stage import TrainStage

_FEW_ENDS = 0.5  # share of the base's answers that end by themselves, below which a warning says so


def run_trial(trial: Trial, context: Context) -> Outcome:
    """Run the missing stages of a trial; an error is written to failure.json and returned, never raised."""
    with locked(trial.folder):
        if trial.is_complete(context.files) and trial.is_proved(context.files):
            return trial.finished(context.files)
        running: _Running | None = None
        try:
            running = _Running(trial, context)
            trial.refuse_golden()
            import_logging_libraries()
            with trial_log(trial.folder, f"trial {trial.trial_id}"), threads(trial.config):
                running.run()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a library in Rust that panics (no more threads) raises no Exception
            failure = describe(error, running.stage if running else "load", trial.name, trial.folder)
            write_failure(trial.folder, failure)
            message = f"{failure['stage']}: {failure['error']}: {failure['message']}"
            return trial.outcome("failed", message, retries=failure["retries"])
        forget(trial.folder)
        return trial.outcome(running.manifest["status"], running.manifest.get("divergence", ""))


class _Running:
    """The state of a running trial: its manifest, its clock and the current stage."""

    def __init__(self, trial: Trial, context: Context) -> None:
        self.trial, self.context, self.files = trial, context, context.files
        self.config, self.folder, self.stage = trial.config, trial.folder, "load"
        self.meter = Meter()
        self.manifest = self._stored_manifest() or self._new_manifest()
        self.meter.seconds.update(self.manifest["seconds"])  # an earlier, interrupted run counts too
        self._policy: Any = None
        self._layout: Layout | None = None
        self._lent = contextlib.ExitStack()

    def _stored_manifest(self) -> Manifest:
        """Read how far an earlier run came; empty if nothing of it can be used."""
        found = read_manifest(self.folder, self.files)
        if not found and (self.folder / "manifest.json").is_file():
            say(f"{self.folder / 'manifest.json'} is damaged or was changed: the trial runs again")
        if found.get("trial_id") != self.trial.trial_id:
            return {}
        found["done"] = resume_stages(self.folder, found, self.files)
        if found.pop(DELETED, None) and not {"score", *self.trial.splits} <= set(found["done"]):
            found["done"] = []  # the missing stages need weights that are deleted: they are trained again
        return found

    def _new_manifest(self) -> Manifest:
        trial, config = self.trial, self.config
        return {
            **trial.name,
            "status": "running",
            "flags": [],
            "done": [],
            "method": plain(config.method),
            "engine": config.train.engine.value,
            "reference": config.train.reference.value,
            **provenance(),
            "warnings": [],
            "seconds": {},
            "peak_memory_bytes": {},
            "tokens": {},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def run(self) -> None:
        """Run the missing stages in order, mirrored to the tracker."""
        config, about = self.config, self.manifest
        self.files.write_text(
            self.folder / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
        )
        with track(
            config.tracking,
            folder=self.trial.study,
            name=f"{about['arm']}-{about['config']}-s{about['seed']}",
            group=str(config.study),
            job_type=about["arm"],
            tags=[about["arm"], about["engine"], config.train.tuning.value],
            config=plain(config) | {"trial_id": about["trial_id"]},
            trackers=self.context.trackers,
        ) as tracker:
            with self._stage("load"):
                tokens = self.context.inputs.tokens(config)
                self._describe_data(tokens)
                if self.trial.is_trained:  # imported once per process: no part of the training's seconds
                    importlib.import_module("harness.train.trainers")
            self.context.imports.freeze()
            self._prove(tokens)
            if self.trial.is_trained and "train" not in about["done"]:
                self._train(tokens, tracker)
            with self._lent:
                for split in self.trial.splits:
                    if split not in self.manifest["done"]:
                        self._evaluate(tokens, split)
            self._score(tracker)
        if drops_weights(self.trial):
            self._save(**without_weights(self.manifest, config.keep))
        delete_weights(self.folder, self.manifest)

    def _describe_data(self, tokens: Tokens) -> None:
        facts = self.context.inputs.splits(self.config).facts
        self.manifest |= {
            "base_sha256": self.context.inputs.contents(self.config)["base"],
            "data_sha256": tokens.train.sha256,
            "pairs": {"train": len(tokens.train.rows), "dev": len(tokens.dev.rows), "golden": len(tokens.golden.rows)},
            "dropped_pairs": {split: getattr(tokens, split).dropped for split in ("train", "dev", "golden")},
            "label_noise": {**facts["label_noise"]},
            "warnings": [
                *find_warnings(self.config),
                *tokens.warnings,
                *self._end_warnings(tokens, self.manifest.get("ended", {})),
            ],
        }

    def _prove(self, tokens: Tokens) -> None:
        """Prove the preconditions before the first answer and the first step; free where an earlier trial has done so.

        Raises:
            UsageError: where the study's model cannot be compared.
        """
        trains = self.trial.is_trained and "train" not in self.manifest["done"]
        is_answered = bool(self.trial.splits) and set(self.trial.splits) <= set(self.manifest["done"])
        if not trains and is_answered:  # a trial without splits is proved before vLLM answers for it
            return
        config, bases = self.config, self.context.bases
        with self._stage("preconditions"):
            proof = proved_once(
                config,
                tokens.train.rows,
                tokens.chat,
                base_sha256=self.manifest["base_sha256"],
                lend=lambda: bases.borrow_base(config),
                methods=self._methods(),
            )
        self._layout = proof.layout
        self.note([*proof.findings, *tokens.findings])
        self._save()  # a base that vLLM answers for is proved in a pass of its own

    def _methods(self) -> Sequence[MethodConfig]:
        """Return the arms whose losses are proved: of the study, and once more of the trial, which a sampler may add.

        The loss of a trial that is run for its cost decides nothing; its margin stands in a reference that it lacks.
        """
        if self.trial.cost_name:
            return ()
        return (self.config.method,) if self.trial.is_trained else self.trial.proves

    def note(self, findings: Iterable[Finding]) -> None:
        """Add what a stage has found out about the study's preconditions to the manifest."""
        self.manifest["preconditions"] = with_findings(self.manifest.get("preconditions", []), findings)

    def _train(self, tokens: Tokens, tracker: Tracker) -> None:
        end_log(self.folder)
        drop_broken(self.folder / "checkpoints")
        drop_answers(self.folder)  # and scores, of weights that are trained anew
        for name in ("scores.jsonl", "preferences.jsonl", "benchmarks.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        total = num_steps(self.config, len(tokens.train.rows))

        def on_step(step: int, logs: dict[str, Any]) -> None:
            note_step(self.folder, step, total, logs.get("loss"))
            tracker.log({STEP: step} | {f"train/{key}": value for key, value in logs.items()})

        base_sha256 = self.manifest["base_sha256"]
        stage = TrainStage(
            self.config,
            tokens,
            self.folder,
            base_sha256,
            on_step,
            self._stage,
            self.context.bases,
            self.context.machine,
            self._layout,
        )
        found = stage.run(is_cost_trial=bool(self.trial.cost_name))
        path = self.folder / "train.jsonl"
        self.files.write_text(path, to_jsonl(found.steps))
        end_log(self.folder)
        self.manifest["warnings"] += found.warnings
        peak = self.meter.peak_memory_bytes
        peak["train"] = max(peak.get("train", 0), found.peak_memory_bytes)
        files = fingerprints(self.folder, {}, self.files)
        found.facts |= {"done": [*self.manifest["done"], "train"], "files": files}
        self._save(**found.facts)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def _evaluate(self, tokens: Tokens, split: str) -> None:
        """Answer the prompts of a split and take the log-probs of its pairs; a diverged policy has neither."""
        if self.manifest["status"] != "diverged":
            try:
                self._answer(tokens, split)
            except DivergedError as error:
                self.manifest |= {"status": "diverged", "divergence": str(error)}
        self._save(done=[*self.manifest["done"], split], files=self._files())

    def _answer(self, tokens: Tokens, split: str) -> None:
        from harness.generate.answers import generate_completions  # loads torch

        config, splits = self.config, self.context.inputs.splits(self.config)
        prompts = splits.dev_prompts if split == "dev" else splits.golden_prompts
        rows = tokens.dev.rows if split == "dev" else tokens.golden.rows
        with self._stage("generate"):
            policy = self._borrow_policy()
            completions = stored_answers(self.folder, split, prompts) or generate_completions(
                policy, tokens.chat, prompts, split=split, decoding=config.generate
            )
        self._note_ends(tokens, split, [completion.ended for completion in completions])
        flagged = [completion_row(c) for c in completions]
        with self._stage("heldout"):
            base, pad_id = self.trial.study / "base", tokens.chat.tokenizer.pad_token_id
            about = {"base": base, "pad_id": pad_id, "files": self.files, "layout": self._layout}
            pairs = heldout_rows(config, policy, rows, split, **about) if rows else []
        for name, new in (("completions.jsonl", flagged), ("pairs.jsonl", pairs)):
            path = self.folder / name
            old = [row for row in read_jsonl(path, self.files) if row["split"] != split] if path.is_file() else []
            self.files.write_text(path, to_jsonl(old + new))
        drop_answers(self.folder, split)
        spent = self.manifest["tokens"]
        spent["generated"] = spent.get("generated", 0) + sum(c.tokens + c.thinking_tokens for c in completions)

    def _note_ends(self, tokens: Tokens, split: str, ended: Sequence[bool]) -> None:
        """Record the share of answers that end by themselves."""
        if ended:
            share = {split: sum(ended) / len(ended)}
            self.manifest["ended"] = self.manifest.get("ended", {}) | share
            self.manifest["warnings"] += self._end_warnings(tokens, share)

    def _end_warnings(self, tokens: Tokens, shares: Mapping[str, float]) -> list[str]:
        """Warn of a base that ends few of its answers; arms are compared with it in any case."""
        stops, limit = tokens.chat.named(sorted(tokens.chat.stop_ids)), self.config.generate.max_new_tokens
        return [
            f"the SFT base ends {share:.0%} of its answers to {split} by itself, at {stops}; the others were cut off "
            f"at generate.max_new_tokens={limit}: raise it, or see whether the base was taught to end its turns"
            for split, share in shares.items()
            if share < _FEW_ENDS and not self.trial.is_trained
        ]

    def _borrow_policy(self) -> Any:
        """Return what answers, the same for all splits; it is given back at the end of the run."""
        if self._policy is None:
            is_trained, bases = self.trial.is_trained, self.context.bases
            lent = (
                bases.borrow_policy(self.config, self.folder)
                if is_trained
                else bases.borrow_base(self.config, answers=True)
            )
            self._policy = self._lent.enter_context(lent)
        return self._policy

    def _score(self, tracker: Tracker) -> None:
        """Score what is stored, and mirror the means and the completions."""
        base = self.trial.study / "base" if self.trial.is_trained else None
        with self._stage("score"):
            prompts = prompt_rows(self.context.inputs.splits(self.config))
            rows = score_trial(self.folder, prompts, tuple(TRIAL_SCORERS), base=base, files=self.files)
            self.manifest = load_manifest(self.folder, self.files)  # score_trial has added flags to it
        status = "diverged" if self.manifest["status"] == "diverged" else "complete"
        self._save(status=status, done=sorted({*self.manifest["done"], "score"}), files=self._files())
        scores: dict[str, list[float]] = {}
        for row in rows:
            if row["score"] is not None:
                scores.setdefault(f"{SPLIT_PREFIX[row['split']]}/{row['scorer']}", []).append(row["score"])
        steps = num_steps(self.config, self.manifest["pairs"]["train"]) if "train" in self.manifest["done"] else 0
        tracker.log({STEP: steps} | {name: fmean(values) for name, values in scores.items()})
        tracker.summarise({"status": status})
        path = self.folder / "completions.jsonl"
        answers = list(read_jsonl(path, self.files)) if path.is_file() else []
        columns = ("split", "prompt_id", "prompt", "completion", "tokens", "ended")
        tracker.table("completions", columns, [[row[column] for column in columns] for row in answers])

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.stage = name
        LOG.info("%s", name)
        with self.meter.stage(name):
            yield
        if name == "reference":  # the save of their results has the clock of the other stages
            self._save()

    def _files(self) -> dict[str, FileRecord]:
        return fingerprints(self.folder, self.manifest.get("files", {}), self.files)

    def _save(self, **facts: Unpack[Manifest]) -> None:
        self.manifest["seconds"] |= dict(self.meter.seconds)
        self.manifest["peak_memory_bytes"] |= self.meter.peak_memory_bytes
        self.manifest |= facts
        write_manifest(self.folder, self.manifest, self.files)


def drops_weights(trial: Trial) -> bool:
    """Return whether a scored trial gives up its weights (`keep=`)."""
    if trial.cost_name:  # it was run for its seconds
        return True
    if trial.config.keep == "all" or not trial.is_trained:
        return False
    decides = "golden" in trial.splits
    return bool(trial.splits) and (trial.config.keep == "none" or not decides)
