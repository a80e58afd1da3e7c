"""The memory that a training needs: a model's shape, settings and a micro-batch's size -> bytes by what holds them.

Counted before anything is loaded, from config.json and the headers of the weights. What autograd keeps of a layer is
compared with torch's own hooks, at the widths of an 8B model, in `tests/train/test_memory.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from harness.config.arms import ARMS
from harness.config.checkpoint_files import header, read_json_object, weight_files
from harness.config.schema import AccelerateConfig, Engine, Optimizer, Reference, RunConfig, TrainConfig, Tuning
from harness.study.files import Json, mapping

_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: 4 bits, and its block's constant, quantised once more
_TILE_ROWS, _TILE_COLUMNS = 4096, 32768  # of logits in TRL's kernel for the head
_LOGITS_BYTES = 14  # of a logit in a trainer that holds them all: in bf16 and fp32, their log-softmax, both gradients
_NOT_LINEAR = ("embed", "lm_head", "wte", "wpe")
_GATED = ("gate_proj", "gate_up_proj", "w1.weight")
_MOST_PROCESSES = 64
_SAFE_SHARE = 0.9  # of the memory, for what is advised: buffers and gaps between blocks are not counted


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model.

    Attributes:
        parameters: weights in all.
        linear: weights of the layers' matrices, which adapters are put on and 4 bits hold.
        sides: inputs plus outputs of these matrices, summed: times the rank, the weights of adapters on all of them.
        matrices: their number.
        layers: number of layers.
        hidden: width of the residual stream; `query` and `key` of all queries and of all keys of a layer.
        inner: width of the MLP, of those experts that one token meets.
        gated: whether the MLP multiplies two branches.
        normed: widths that a layer normalises, summed.
        vocabulary: rows of the head.
    """

    parameters: int
    linear: int
    sides: int
    matrices: int
    layers: int
    hidden: int
    query: int
    key: int
    inner: int
    gated: bool
    normed: int
    vocabulary: int


def shape_of_folder(folder: Path) -> ModelShape:
    """Read a checkpoint's shape from its config.json and the headers of its safetensors files."""
    tensors = {name: entry["shape"] for path in weight_files(folder) for name, entry in (header(path) or {}).items()}
    return shape_of(read_json_object(folder / "config.json") or {}, tensors)


def shape_of(config: Mapping[str, Json], tensors: Mapping[str, Sequence[int]]) -> ModelShape:
    """Return a model's shape.

    Args:
        config: contents of its config.json.
        tensors: the shapes of its weights, by name.
    """
    text = {**config, **mapping(config.get("text_config"))}
    layers, hidden = _number(text, "num_hidden_layers", "n_layer"), _number(text, "hidden_size", "n_embd", "d_model")
    heads = _number(text, "num_attention_heads", "n_head") or 1
    width = _number(text, "head_dim") or hidden // heads
    key = (_number(text, "num_key_value_heads") or heads) * width
    inner = _number(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    met = _number(text, "num_experts_per_tok")
    if met and (_number(text, "num_experts", "num_local_experts", "n_routed_experts")):
        inner = met * (_number(text, "moe_intermediate_size") or inner)
    if text.get("tie_word_embeddings"):
        tensors = {name: shape for name, shape in tensors.items() if not name.endswith("lm_head.weight")}
    linear = [shape for name, shape in tensors.items() if _is_linear(name, shape)]
    norms = [(name, shape[0]) for name, shape in tensors.items() if len(shape) == 1 and "norm" in name]
    by_head = {"q_norm": heads * width, "k_norm": key}
    normed = sum(
        next((size for part, size in by_head.items() if part in name and length == width), length)
        for name, length in norms
        if name.endswith("weight") and any(word.isdigit() for word in name.split("."))
    )
    return ModelShape(
        parameters=sum(map(math.prod, tensors.values())),
        linear=sum(map(math.prod, linear)),
        sides=sum(math.prod(shape[:-2]) * sum(shape[-2:]) for shape in linear),
        matrices=len(linear),
        layers=max(1, layers),
        hidden=hidden,
        query=heads * width,
        key=key,
        inner=inner,
        gated=any(part in name for name in tensors for part in _GATED),
        normed=normed // max(1, layers) or 2 * hidden,
        vocabulary=_number(text, "vocab_size"),
    )


def _number(values: Mapping[str, Json], *names: str) -> int:
    return next((value for name in names if isinstance(value := values.get(name), int)), 0)


def _is_linear(name: str, shape: Sequence[int]) -> bool:
    return len(shape) in (2, 3) and not any(word in name for word in _NOT_LINEAR)


class Load(NamedTuple):
    """What one micro-batch makes a model compute.

    Attributes:
        positions: tokens that go through the layers, padding included.
        predicted: rows that go through the head.
        all_logits: whether the logits of all rows are held at once.
    """

    positions: int
    predicted: int
    all_logits: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes that one process needs at the most, by what holds them."""

    weights: int = 0
    gradients: int = 0
    optimiser: int = 0
    copies: int = 0
    reference: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(astuple(self))

    @property
    def beside_weights(self) -> int:
        """What comes on top of a model that is loaded."""
        return self.total - self.weights

    def __str__(self) -> str:
        """Write the total, and the parts that count."""
        names = {"copies": "weights in bf16", "reference": "reference model"}
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = [f"{names.get(name, name)} {_gb(size)}" for name, size in parts.items() if size >= self.total / 200]
        return f"{_gb(self.total)} GB ({', '.join(shown)})"


def _gb(size: float) -> str:
    return f"{size / 1e9:.0f}" if size >= 1e10 else f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2g}"


def footprint(config: RunConfig, shape: ModelShape, load: Load, *, bf16: bool, checkpointing: bool) -> Footprint:
    """Return what training takes with a micro-batch of this load.

    Args:
        config: the trial.
        shape: of its model.
        load: of a micro-batch.
        bf16: whether matrix products run in bf16.
        checkpointing: whether activations are computed again in the backward pass.
    """
    train = config.train
    is_full = train.tuning is Tuning.full
    item = 2 if bf16 else 4
    trained = shape.parameters if is_full else train.lora_rank * shape.sides
    base = _base_bytes(shape, train.tuning, item)
    keeps, halves = _shards(config)
    return Footprint(
        weights=round((base + (0 if is_full else 4 * trained)) / keeps),
        gradients=round(4 * trained / halves),
        optimiser=round(_optimiser_bytes(train) * trained / halves),
        copies=2 * shape.linear // keeps if is_full and bf16 else 0,
        reference=round(base / keeps) if _has_reference_model(config) else 0,
        activations=_activation_bytes(train, shape, load.positions, bf16=bf16, checkpointing=checkpointing),
        logits=_logit_bytes(shape, load, item) + (4 * shape.vocabulary * shape.hidden if is_full else 0),
    )


def _base_bytes(shape: ModelShape, tuning: Tuning, item: int) -> float:
    """Return the bytes of the base: in fp32 where it is trained, its matrices in 4 bits for QLoRA."""
    if tuning is Tuning.qlora:
        return _NF4_BYTES * shape.linear + item * (shape.parameters - shape.linear)
    return (4 if tuning is Tuning.full else item) * shape.parameters


def _shards(config: RunConfig) -> tuple[int, int]:
    """Return over how many processes weights are split, and over how many gradients and optimiser are."""
    accelerate = config.accelerate
    count, stage = accelerate.num_processes, int(accelerate.deepspeed_config.get("zero_stage") or 0)
    if accelerate.distributed_type == "FSDP" or stage == 3:
        return count, count
    return 1, count if stage in (1, 2) else 1


def _optimiser_bytes(train: TrainConfig) -> float:
    """Return AdamW's bytes per trained weight: two states of fp32, or of 8 bits with a constant per 256 of them."""
    return 2 + 8 / 256 if train.optimizer is Optimizer.adamw_8bit else 8


def _has_reference_model(config: RunConfig) -> bool:
    train = config.train
    is_trls = train.engine is Engine.stock and train.tuning is Tuning.full
    return ARMS[config.method.name].uses_reference and (train.reference is Reference.separate or is_trls)


def _activation_bytes(train: TrainConfig, shape: ModelShape, positions: int, *, bf16: bool, checkpointing: bool) -> int:
    """Return what autograd keeps of the layers: of each one all, or its input with checkpointing, and all of one."""
    layer = positions * layer_bytes(train, shape, bf16=bf16)
    if not checkpointing:
        return shape.layers * layer
    residual = 2 if bf16 and train.tuning is not Tuning.full else 4
    return shape.layers * positions * shape.hidden * residual + layer


def layer_bytes(train: TrainConfig, shape: ModelShape, *, bf16: bool) -> int:
    """Return what autograd keeps of one layer for each token.

    Norms keep their input in fp32 (and its normalised form where their weight is trained). Each group of linear layers
    keeps one input; where it is rounded to bf16 for each of them, one per layer: in autocast with fp32 weights, and in
    PEFT's own LoRA layers. Attention keeps queries, keys, values and output; a gated MLP four tensors of its width.
    """
    is_full = train.tuning is Tuning.full
    is_fused = train.tuning is Tuning.lora and train.engine is Engine.paired and train.levers.fuse_adapters
    is_fused = is_fused and not train.lora_dropout
    each_rounds = bf16 and not is_fused
    inputs = (5 if each_rounds else 2) * shape.hidden + shape.query
    attention = 2 * shape.query + (3 if each_rounds else 2) * shape.key
    mlp = (4 if shape.gated else 2) * shape.inner
    inner = 0 if is_full else train.lora_rank * shape.matrices // shape.layers
    return (2 if bf16 else 4) * (inputs + attention + mlp + inner) + 4 * shape.normed * (2 if is_full else 1)


def _logit_bytes(shape: ModelShape, load: Load, item: int) -> int:
    """Return the logits in memory: all of them, or a tile of TRL's kernel, with the gradient of the hidden states."""
    if load.all_logits:
        return _LOGITS_BYTES * load.predicted * shape.vocabulary
    tile = min(load.predicted, _TILE_ROWS) * min(_TILE_COLUMNS, shape.vocabulary)
    return 2 * item * tile + (4 + item) * load.predicted * shape.hidden


def memory_problem(config: RunConfig, shape: ModelShape, load: Load, *, bf16: bool, room: int, is_gpu: bool) -> str:
    """Say why not even the smallest micro-batch can be trained in this memory; empty where it can be, or none is known.

    Args:
        config: the trial.
        shape: of its model.
        load: of the longest pair alone.
        bf16: whether matrix products run in bf16.
        room: bytes of the GPU, or of the machine; 0 where they are not known.
        is_gpu: whether they are a GPU's.
    """

    if not room:
        return ""
    needed, machine = _least(config, shape, load, bf16=bf16), "GPU" if is_gpu else "machine"
    has = f"this {machine} has {_gb(room)} GB"
    answers = _answer_bytes(config.train, shape, bf16=bf16)
    if needed.total > room:
        fits = [way for way, least in _ways(config, shape, load, bf16=bf16) if least <= _SAFE_SHARE * room]
        counts = range(2, _MOST_PROCESSES + 1) if is_gpu and answers <= room and _shards(config)[0] == 1 else ()
        for count in counts:
            if _least(_sharded(config, count), shape, load, bf16=bf16).total <= _SAFE_SHARE * room:
                fits.append(f"accelerate=fsdp accelerate.num_processes={count} (a GPU each)")
                break
        none = f"no setting makes it fit: take a smaller model or a larger {machine}"
        use = f"use {', or '.join(fits)}" if fits else none
        return (
            f"train.tuning={config.train.tuning.value} needs about {needed} to train {config.model.path} on one pair "
            f"of {load.positions:,} tokens, and {has}: {use}"
        )
    if answers > room:
        return (
            f"accelerate.distributed_type={config.accelerate.distributed_type}: {config.model.path} is split for its "
            f"training alone; it answers on one {machine}, where its weights need {_gb(answers)} GB, and {has}: use "
            "train.tuning=qlora, or a smaller model"
        )
    return ""


def _answer_bytes(train: TrainConfig, shape: ModelShape, *, bf16: bool) -> float:
    """Return the weights of a model that answers, which no process shares."""
    return _base_bytes(shape, Tuning.qlora if train.tuning is Tuning.qlora else Tuning.lora, 2 if bf16 else 4)


def _least(config: RunConfig, shape: ModelShape, load: Load, *, bf16: bool) -> Footprint:
    """Return what training takes with checkpointing, unless that is switched off."""
    return footprint(config, shape, load, bf16=bf16, checkpointing=config.train.gradient_checkpointing is not False)


def _ways(config: RunConfig, shape: ModelShape, load: Load, *, bf16: bool) -> Iterator[tuple[str, int]]:
    """Yield settings that take less memory in one process, each with the bytes that it needs."""
    train = config.train
    changed: dict[str, TrainConfig] = {}
    if train.gradient_checkpointing is False:
        changed["train.gradient_checkpointing=true"] = replace(train, gradient_checkpointing=True)
    if train.reference is Reference.separate:
        changed["train.reference=cached"] = replace(train, reference=Reference.cached)
    if train.tuning is Tuning.full:
        changed["train.tuning=lora"] = replace(train, tuning=Tuning.lora)
        if train.optimizer is not Optimizer.adamw_8bit:
            changed["train.optimizer=adamw_8bit"] = replace(train, optimizer=Optimizer.adamw_8bit)
    if train.tuning is not Tuning.qlora:
        changed["train.tuning=qlora"] = replace(train, tuning=Tuning.qlora)
    for way, other in changed.items():
        least = _least(replace(config, train=other), shape, load, bf16=bf16).total
        yield way, max(least, round(_answer_bytes(other, shape, bf16=bf16)))


def _sharded(config: RunConfig, count: int) -> RunConfig:
    return replace(config, accelerate=AccelerateConfig(num_processes=count, distributed_type="FSDP"))
