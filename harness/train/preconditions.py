"""What a study proves on its own model before it trains: a base and pairs -> `Proof`: findings, and the layout.

On three of the study's pairs, cut to unlike lengths, and on its longest pair: the model is deterministic in training
mode; no token sees later ones; the loss of each trainer at step 0 is the value of `harness.train.losses`, on log-probs
of single rows, and alone has a gradient; and loss and gradient of the paired engine are those of TRL's own, with an
adapter that is no longer zero. The layout is the first of packed, padded and alone that passes. Then each arm of the
study, with its own hyperparameters and reference, has the loss of its equation. A result is kept per model, tokens,
settings and versions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.arms import MethodConfig, title
from harness.config.schema import Kernels, Reference, RunConfig, Tuning
from harness.data.token_rows import TokenPair, canonical_bytes, pair_lengths
from harness.data.tokens import ChatFormat
from harness.study.errors import UsageError, is_out_of_memory
from harness.study.files import digest, locked, read_sealed, seal, write_json
from harness.study.manifest import Finding
from harness.train.layout import Layout, processes_problem
from harness.train.memory import free_unused_memory
from harness.train.prover import LOSS, Proof, Prover, checked_of, is_general, settings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 3  # of what is proved; results of another version are not used


def proved_once(
    config: RunConfig,
    rows: Sequence[TokenPair],
    chat: ChatFormat,
    *,
    base_sha256: str,
    lend: Callable[[], AbstractContextManager[PreTrainedModel]],
    methods: Sequence[MethodConfig] = (),
) -> Proof:
    """Return the proof for a trial's study: computed where no earlier trial or study has done so.

    Args:
        config: any trial of the study, the base included.
        rows: the training pairs.
        chat: the tokenizer, for padding.
        base_sha256: of the base's weights.
        lend: lends the base.
        methods: trained arms with their hyperparameters; that their losses are their own is proved as well.

    Raises:
        UsageError: where the model cannot be compared in this way; nothing is trained.
    """
    folder = Path(config.results_dir) / ".cache" / "preconditions" / _key(config, rows, base_sha256)
    arms = {_arm_file(method): method for method in methods if not is_general(method)}
    with locked(folder):
        proof = _read_proof(folder)
        missing = [name for name in arms if read_sealed(folder / name) is None]
        if proof is None or (missing and _has_losses(proof)):
            with lend() as base, _prover(config, rows, base, chat) as prover:
                proof = proof or prover.run()
                _write_proof(folder, proof)
                for name in missing if _has_losses(proof) else ():
                    write_json(folder / name, seal(asdict(prover.prove_method(arms[name], proof.layout))))
    if problem := processes_problem(proof.layout, config.accelerate):
        raise UsageError(problem)
    if not _has_losses(proof):
        return proof
    return replace(proof, findings=(*proof.findings, *_of_arms(methods)))


def _has_losses(proof: Proof) -> bool:
    """Return whether losses could be measured: with finite numbers, and in the memory that there is."""
    return (LOSS, "proved") in [(finding.name, finding.result) for finding in proof.findings]


def _read_proof(folder: Path) -> Proof | None:
    if (found := read_sealed(folder / "proof.json")) is None:
        return None
    return Proof(Layout(**found["layout"]), tuple(Finding(**row) for row in found["findings"]))


def _write_proof(folder: Path, proof: Proof) -> None:
    facts = {"layout": asdict(proof.layout), "findings": [asdict(row) for row in proof.findings]}
    write_json(folder / "proof.json", seal(facts))


def _arm_file(method: MethodConfig) -> str:
    """Return the file of an arm's proof: named by all that its loss depends on, and so not by its learning rate."""
    return f"{method.name}-{digest([method.name, settings_of(method)])[:16]}.json"


def _of_arms(methods: Sequence[MethodConfig]) -> Iterator[Finding]:
    """Yield a finding for each arm; its text is that of all configs, so that a report has it once."""
    for arm in dict.fromkeys(method.name for method in methods):
        detail = (
            "with each of its configs the trainer's loss is that of its equation on single rows, at step 0 and with "
            "other weights"
        )
        yield Finding(f"the loss of {title(arm)}", "proved", detail)


def _key(config: RunConfig, rows: Sequence[TokenPair], base_sha256: str) -> str:
    """Return the name of a proof: all that it depends on."""
    from importlib.metadata import version
    from importlib.util import find_spec

    import torch

    from harness.config.machine import has_gpu

    train, levers = config.train, config.train.levers
    ids = [canonical_bytes([*row.prompt_ids], [*row.chosen_ids], [*row.rejected_ids]).hex() for row in checked_of(rows)]
    settings = [train.engine.value, train.tuning.value, train.precision.value, train.reference.value, train.lora_rank]
    settings += [str(train.lora_dropout), train.kernels.value, *train.lora_targets]
    if has_gpu():  # whose kernels of attention differ
        settings += [torch.cuda.get_device_name(), str(find_spec("flash_attn") is not None)]
    settings += [levers.share_prefix, levers.completion_head, levers.fuse_adapters]
    libraries = ["torch", "transformers", "trl", "peft", *(["liger-kernel"] if train.kernels is Kernels.liger else [])]
    versions = [version(name) for name in libraries]
    return digest([VERSION, base_sha256, ids, int(pair_lengths(rows).max()), settings, versions, has_gpu()])[:32]


def prove(config: RunConfig, rows: Sequence[TokenPair], base: PreTrainedModel, chat: ChatFormat) -> Proof:
    """Prove the preconditions on a base, which stays as it was.

    Args:
        config: a trial of the study; its arm does not matter.
        rows: the training pairs.
        base: the base, without an adapter.
        chat: the tokenizer.

    Raises:
        UsageError: as in `proved_once`.
    """
    with _prover(config, rows, base, chat) as prover:
        return prover.run()


@contextmanager
def _prover(config: RunConfig, rows: Sequence[TokenPair], base: PreTrainedModel, chat: ChatFormat) -> Iterator[Prover]:
    """Yield a prover on a base, which stays as it was."""
    import torch

    from harness.train.base import reset_model

    attention = base.config._attn_implementation
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        model = _in_fp32(config, base) or base
        prover = Prover(config, rows, model, chat, Path(folder))
        try:
            _refuse_dropout(config, base)
            yield prover
        finally:
            prover.reset()
            reset_model(base)
            base.set_attn_implementation(attention)


def _refuse_dropout(config: RunConfig, base: PreTrainedModel) -> None:
    """Raise a UsageError where `train.lora_dropout` is set and the adapter on this base cannot have any."""
    from peft import get_peft_model

    from harness.train.adapter import adapter_config
    from harness.train.base import reset_model

    if not config.train.lora_dropout or config.train.tuning is Tuning.full:
        return
    try:
        get_peft_model(base, adapter_config(config, base))
    except ValueError as error:
        raise UsageError(
            f"train.lora_dropout={config.train.lora_dropout:g}: the adapter on a {type(base).__name__} has layers "
            f"without dropout ({error}); use train.lora_dropout=0"
        ) from error
    finally:
        reset_model(base)


def _in_fp32(config: RunConfig, base: PreTrainedModel) -> PreTrainedModel | None:
    """Return a copy of a base of lower precision in fp32, where there is one and it fits into memory."""
    import torch

    from harness.train.base import is_quantised, load_model, use_kernels

    if base.dtype == torch.float32 or is_quantised(base) or config.train.reference is Reference.separate:
        return None
    if base.device.type == "cuda":
        needed = 6 * sum(parameter.numel() for parameter in base.parameters())  # 4 bytes each, and activations
        if torch.cuda.mem_get_info()[0] < needed:
            return None
    try:
        return use_kernels(load_model(Path(base.name_or_path), torch.float32), config.train.kernels)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_unused_memory()  # behind the error, whose traceback held the copy
    return None
