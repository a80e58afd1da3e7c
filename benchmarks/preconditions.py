"""Plant a fault for each precondition that a study proves, see whether it is found, and measure what the proof costs.

`python benchmarks/preconditions.py MODEL_FOLDER|embedded [--pairs FILE]` prints one row per fault: precondition, fault,
what was said, seconds. Then the cost of the honest proof, of the first study and of a second one, in seconds of the
clock and of the CPU. Exit status 1: a fault was not found, or the honest model was blamed for it. `--page` keeps the
rows in benchmarks/preconditions.json and writes docs/preconditions.md from all models that are kept there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.config.schema import RunConfig
    from harness.data.inputs import Tokens

RECORD = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "preconditions.md"
NAMES = {
    1: "every parameter came from the files",
    2: "training is deterministic",
    3: "the loss is the arm's alone",
    4: "the engine computes what TRL's computes",
    5: "token ids",
    6: "end of turn",
}
_SHOWN = 330  # characters of what was said


@dataclass(frozen=True)
class Row:
    """A fault, and what the harness said of it; `said` is empty where it was not found."""

    precondition: int
    fault: str
    said: str
    seconds: float


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock and of the CPU."""

    step: str
    wall: float
    cpu: float


@dataclass
class Study:
    """An honest study, with a folder to plant faults in.

    Attributes:
        config: of its DPO trial; the model is given by its folder, so that it is checked as a user's.
        work: an empty folder.
    """

    config: RunConfig
    work: Path

    @classmethod
    def of(cls, model: str, pairs: Path | None, work: Path, *overrides: str) -> Study:
        """Return a study of a folder, or of `embedded`, on pairs of one file (None: the embedded study's)."""
        from harness.config.checkpoint import embedded_dir
        from harness.sweep.problems import load_run

        folder = embedded_dir() if model == "embedded" else Path(model).resolve()
        if pairs is None:
            data = [f"data.{split}={embedded_dir() / split}.jsonl" for split in ("train", "dev", "golden")]
        else:
            data = [f"data.path={pairs.resolve()}"]
        arguments = ["+method=dpo", f"model.path={folder}", f"results_dir={work / 'results'}", "tracking=none"]
        return cls(load_run([*arguments, "generate.max_new_tokens=64", *data, *overrides]), work)

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return Path(self.config.model.path)

    def with_model(self, folder: Path) -> RunConfig:
        """Return the config with another checkpoint."""
        return replace(self.config, model=replace(self.config.model, path=str(folder)))

    def copy(self) -> Path:
        """Return a copy of the checkpoint; its weights are links."""
        target = Path(tempfile.mkdtemp(dir=self.work))
        for path in self.folder.iterdir():
            if path.suffix == ".safetensors":
                (target / path.name).symlink_to(path)
            elif path.is_file():
                shutil.copy(path, target / path.name)
        return target

    @functools.cached_property
    def honest(self) -> list[str]:
        """What is said of the checkpoint as it is."""
        return [*_about_files(self.config), *_about_model(self.config)]

    @functools.cached_property
    def tokens(self) -> Tokens:
        """Token ids of the honest checkpoint."""
        from harness.data.inputs import Inputs

        return Inputs().tokens(self.config)


def _about_files(config: RunConfig) -> list[str]:
    """Return what is said before a model is loaded: of weights, tokenizer, template and lengths."""
    from harness.data.inputs import Inputs
    from harness.sweep.problems import checkpoint_warnings

    inputs = Inputs()
    said = checkpoint_warnings(config, inputs)
    return said + [f"{found.name}: {found.result}. {found.detail}" for found in inputs.tokens(config).findings]


def _about_model(config: RunConfig, plant: Callable[[PreTrainedModel], object] | None = None) -> list[str]:
    """Return what is said of a model in memory."""
    from harness.config.checkpoint import Checkpoints
    from harness.data.inputs import Inputs
    from harness.train.base import load_base
    from harness.train.preconditions import prove

    tokens = Inputs().tokens(config)
    base = load_base(config, Checkpoints().folder(config.model, config.results_dir))
    if plant:
        plant(base)
    proof = prove(config, tokens.train.rows, base, tokens.chat)
    return [f"{found.name}: {found.result}. {found.detail}" for found in proof.findings]


# Faults in the files of a checkpoint: a folder is changed.


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the tensors of a copy's first file of weights."""
    from safetensors.torch import load_file, save_file

    path = min(folder.glob("*.safetensors"))
    found = change(load_file(path.resolve()))
    path.unlink()
    save_file(found, path, metadata={"format": "pt"})


def _matrix(found: dict[str, Any]) -> str:
    """Return the name of a matrix inside of a layer."""
    return max(name for name in found if found[name].dim() == 2 and re.search(r"\.\d+\.", name))


def _taken_out(found: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in found.items() if name != _matrix(found)}


def _renamed(found: dict[str, Any]) -> dict[str, Any]:
    return {f"_orig_mod.{name}": tensor for name, tensor in found.items()}


def _cut(found: dict[str, Any]) -> dict[str, Any]:
    return found | {_matrix(found): found[_matrix(found)][:-1].contiguous()}


def _nan(found: dict[str, Any]) -> dict[str, Any]:
    found[_matrix(found)][0, 0] = float("nan")
    return found


def _setting(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def _template(folder: Path, change: Callable[[str, Any], str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = change(tokenizer.chat_template, tokenizer)
    tokenizer.save_pretrained(folder)


# The assistant's turns lose all but their last word, as templates take thinking out of them.
_CUTTING = (
    "{%- set at = namespace(turns=[]) -%}{%- for turn in messages -%}"
    "{%- if turn['role'] == 'assistant' -%}"
    "{%- set turn = dict(turn, content=turn['content'].split()|last) -%}{%- endif -%}"
    "{%- set at.turns = at.turns + [turn] -%}{%- endfor -%}{%- set messages = at.turns -%}"
)


def _ends_with(text: str | None) -> Callable[[str, Any], str]:
    """Return a change of the template: turns end with this text, or (None) with another special token."""

    def change(template: str, tokenizer: Any) -> str:
        out = {tokenizer.unk_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token}
        others = [str(token) for token in tokenizer.added_tokens_encoder if token not in out | set(template.split("'"))]
        end = others[-1] if text is None else text
        return template.replace(tokenizer.eos_token, end).replace("eos_token", repr(end))

    return change


def _word_without_row(folder: Path, study: Study) -> None:
    """Make the beginning of an answer a token of its own, for which the embedding has no row."""
    from transformers import AutoTokenizer

    from harness.data.inputs import Inputs

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Inputs().splits(study.config).train[0].chosen[-1]["content"].strip()
    begins = (text[:length] for length in range(2, len(text)))
    tokenizer.add_tokens([next(begin for begin in begins if len(tokenizer.tokenize(begin)) > 1)])
    tokenizer.save_pretrained(folder)


def _files(change: Callable[[Path, Study], None]) -> Callable[[Study], list[str]]:
    """Return a fault in a checkpoint's files."""

    def run(study: Study) -> list[str]:
        folder = study.copy()
        try:
            change(folder, study)
            return [
                line.replace(str(folder), "FOLDER") for line in _said(lambda: _about_files(study.with_model(folder)))
            ]
        finally:
            shutil.rmtree(folder)

    return run


def _dropout_in_config(study: Study) -> list[str]:
    folder = study.copy()
    try:
        _setting(folder, attention_dropout=0.1)
        return _said(lambda: _about_model(study.with_model(folder)))
    finally:
        shutil.rmtree(folder)


# Faults in a model or a trainer in memory.


def _said(ask: Callable[[], list[str]]) -> list[str]:
    from harness.study.errors import UsageError

    try:
        return ask()
    except UsageError as error:
        return [f"refused: {line}" for line in str(error).splitlines()]


def _model(plant: Callable[[PreTrainedModel], object]) -> Callable[[Study], list[str]]:
    """Return a fault that is planted in a loaded model."""
    return lambda study: _said(lambda: _about_model(study.config, plant))


def _code(patch: Callable[[], AbstractContextManager[None]]) -> Callable[[Study], list[str]]:
    """Return a fault that is planted in the code that trains."""

    def run(study: Study) -> list[str]:
        with patch():
            return _said(lambda: _about_model(study.config))

    return run


def _inner(model: PreTrainedModel, part: str = "") -> Any:
    """Return a module in the middle layer: the layer itself, or the first in it whose name has this part."""
    import torch

    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    layer = layers[len(layers) // 2]
    return next(module for name, module in layer.named_modules() if part in name.lower())


def _noise_in_hook(model: PreTrainedModel) -> None:
    import torch

    def hook(module: Any, _: object, output: Any) -> Any:
        return torch.nn.functional.dropout(output, 0.05) if module.training else output

    _inner(model, "mlp").register_forward_hook(hook)


def _noise_in_function(model: PreTrainedModel) -> None:
    import torch

    mlp = _inner(model, "mlp")
    real = mlp.forward
    mlp.forward = lambda *args, **kwargs: torch.nn.functional.dropout(real(*args, **kwargs), 0.05, training=True)


def _router_loss(model: PreTrainedModel) -> None:
    """Add a router, as of a mixture of experts: its logits, its loss, and the flag by which trainers add that loss."""
    kind, real = type(model), type(model).forward

    def hook(_: object, args: object, output: Any) -> Any:
        output["router_logits"] = (output.last_hidden_state[..., :2].flatten(0, -2),)
        return output

    def forward(self: Any, *args: Any, output_router_logits: object = None, **kwargs: Any) -> Any:
        output = real(self, *args, output_router_logits=False, **kwargs)
        output["aux_loss"] = output.logits.float().square().mean() if output.get("logits") is not None else 0.0
        return output

    # A class of its own: a forward on the instance counts as a trainer's patch and is taken off.
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    model.base_model.register_forward_hook(hook)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.01
    model.config.num_experts, model.config.num_experts_per_tok = 2, 1


def _gradient_of_its_own(model: PreTrainedModel) -> None:
    """Add the gradient of a penalty on activations, as a router does that never shows its loss."""

    def hook(_: object, args: object, output: Any) -> Any:
        values = output.detach()
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient + 1e-4 * values)
        return output

    _inner(model, "mlp").register_forward_hook(hook)


def _token_shift(model: PreTrainedModel) -> None:
    import torch

    def hook(_: object, args: object, output: Any) -> Any:
        return output + 0.01 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    _inner(model, "mlp").register_forward_hook(hook)


def _running_positions(model: PreTrainedModel) -> None:
    """Count positions through a packed row, instead of from each pair's start."""
    import torch

    def hook(_: object, args: Any, kwargs: dict[str, Any]) -> Any:
        found = kwargs.get("position_ids")
        if kwargs.get("packed") is not None and found is not None:
            kwargs["position_ids"] = torch.arange(found.shape[-1], device=found.device).expand_as(found)
        return args, kwargs

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)


@contextlib.contextmanager
def _patched(target: Any, name: str, value: object) -> Iterator[None]:
    real = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, real)


def _dpo_with_more() -> AbstractContextManager[None]:
    from harness.train.trainers import PairedDPOTrainer

    real = PairedDPOTrainer._compute_loss

    def compute(self: Any, *args: Any, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs) + 1e-3

    return _patched(PairedDPOTrainer, "_compute_loss", compute)


@contextlib.contextmanager
def _simpo_with_sft() -> Iterator[None]:
    from harness.config.arms import ARMS

    real = ARMS["simpo"]
    ARMS["simpo"] = replace(real, trl_arguments=lambda method: {**real.trl_arguments(method), "cpo_alpha": 1.0})
    try:
        yield
    finally:
        ARMS["simpo"] = real


def _answers_see_each_other() -> AbstractContextManager[None]:
    import torch

    from harness.train import attention

    def mask(prompt: int, answers: Sequence[int], window: int | None) -> Any:
        return torch.ones_like(real(prompt, answers, window)).tril()

    real = attention.answer_mask
    return _patched(attention, "answer_mask", mask)


def _gradient_of_fused_adapter() -> AbstractContextManager[None]:
    from harness.train import run

    real = run.fuse_adapters

    def fuse(model: Any) -> None:
        real(model)
        first = next(p for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad)
        first.register_hook(lambda gradient: gradient * 2)

    return _patched(run, "fuse_adapters", fuse)


@dataclass(frozen=True)
class Fault:
    """A fault of one precondition.

    Attributes:
        precondition: its number.
        name: what is planted.
        run: plants it, and returns what the harness says.
        says: what one line of that must match, and no line about the honest checkpoint.
    """

    precondition: int
    name: str
    run: Callable[[Study], list[str]]
    says: str


FAULTS = (
    Fault(1, "a tensor is not in the file", _files(lambda f, _: _rewrite(f, _taken_out)), "would be random"),
    Fault(
        1, "all tensors are renamed", _files(lambda f, _: _rewrite(f, _renamed)), "would be random.*unwrap the model"
    ),
    Fault(1, "a tensor has a row less", _files(lambda f, _: _rewrite(f, _cut)), "another shape"),
    Fault(1, "a number is NaN", _files(lambda f, _: _rewrite(f, _nan)), "NaN or infinite"),
    Fault(
        1,
        "the head is tied to nothing",
        _files(lambda f, _: _setting(f, tie_word_embeddings=False)),
        "lm_head.*would be random",
    ),
    Fault(2, "dropout by config.json", _dropout_in_config, r"switched off in all arms: attention_dropout=0\.1"),
    Fault(2, "dropout in a hook, in training mode", _model(_noise_in_hook), "draws random numbers in training mode"),
    Fault(2, "dropout in a function, always on", _model(_noise_in_function), "gives other values at each call"),
    Fault(
        3, "0.001 is added to DPO's loss", _code(_dpo_with_more), r"loss at step 0 is 0\.694147 instead of 0\.693147"
    ),
    Fault(3, "SimPO with TRL's own SFT term", _code(_simpo_with_sft), "SimPO's loss at step 0 is"),
    Fault(3, "the model returns a router's loss", _model(_router_loss), "loss .* instead of"),
    Fault(3, "the model adds a gradient going backward", _model(_gradient_of_its_own), "part that is not its loss's"),
    Fault(4, "a layer mixes each token with the one before", _model(_token_shift), "runs padded"),
    Fault(4, "positions of a pack count on", _model(_running_positions), "runs padded.*those of single rows"),
    Fault(4, "answers in a pack see each other", _code(_answers_see_each_other), "runs padded"),
    Fault(
        4,
        "an adapter's gradient is doubled in one matrix",
        _code(_gradient_of_fused_adapter),
        r"gradient norm is .* instead of|gradient differs from TRL's in",
    ),
    Fault(
        5,
        "the template cuts answers",
        _files(lambda f, _: _template(f, lambda text, _: _CUTTING + text)),
        "cuts or rewrites the answer",
    ),
    Fault(
        5,
        "the template writes the date",
        _files(lambda f, _: _template(f, lambda text, _: "{{ strftime_now('%d %B %Y') }}" + text)),
        "writes the date",
    ),
    Fault(
        5,
        "the template draws a number",
        _files(lambda f, _: _template(f, lambda text, _: "{{ range(9) | random }}" + text)),
        "same conversation twice",
    ),
    Fault(5, "a word of the data has no row", _files(_word_without_row), "tokens without a row"),
    Fault(
        5,
        "there are 16 positions",
        _files(lambda f, _: _setting(f, max_position_embeddings=16)),
        "the model has 16 positions",
    ),
    Fault(
        6,
        "turns end with a token that is no stop id",
        _files(lambda f, _: _template(f, _ends_with(None))),
        "this study stops at both",
    ),
    Fault(6, "turns end with plain text", _files(lambda f, _: _template(f, _ends_with("[/end]"))), "which is no token"),
    Fault(6, "turns do not end", _files(lambda f, _: _template(f, _ends_with(""))), "answers would never end"),
)


def plant(study: Study, faults: Sequence[Fault] = FAULTS) -> Iterator[Row]:
    """Plant each fault, and yield what was said of it."""
    honest = study.honest
    for fault in faults:
        start = time.perf_counter()
        lines = fault.run(study)
        found = [line for line in lines if re.search(fault.says, line)]
        if any(re.search(fault.says, line) for line in honest):
            found = []  # it is said of any model, and so of nothing
        said = re.sub(r"model\.path=\S+?: ", "", found[0]) if found else ""
        yield Row(fault.precondition, fault.name, said, round(time.perf_counter() - start, 2))


@contextlib.contextmanager
def _timed(step: str, costs: list[Cost]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    costs.append(Cost(step, round(time.perf_counter() - wall, 3), round(time.process_time() - cpu, 3)))


def costs_of(study: Study) -> list[Cost]:
    """Measure the preconditions of a study, and of a second one with another name and another seed."""
    from harness.config.checkpoint import Checkpoints
    from harness.data.inputs import Inputs
    from harness.sweep.problems import checkpoint_warnings
    from harness.train.base import load_base
    from harness.train.preconditions import proved_once

    costs: list[Cost] = []
    results = str(Path(tempfile.mkdtemp(dir=study.work)))
    one = replace(study.config, results_dir=results)
    folder = Checkpoints().folder(one.model, results)

    @contextlib.contextmanager
    def lend() -> Iterator[PreTrainedModel]:
        yield load_base(one, folder)

    for which, config in (("first study", one), ("second study", replace(one, study="another", seed=7))):
        inputs = Inputs()
        sha256 = inputs.checkpoints.base_sha256(folder)  # a study hashes its base in any case
        inputs.checkpoints.tokenizer_sha256(folder)
        with _timed(f"{which}: weights (1)", costs):
            checkpoint_warnings(config, inputs)
        with _timed(f"{which}: tokenising all pairs, with 5 and 6", costs):
            tokens = inputs.tokens(config)
        with _timed(f"{which}: model and engine (2, 3, 4)", costs):
            proved_once(config, tokens.train.rows, tokens.chat, base_sha256=sha256, lend=lend)
    return costs


def measure(study: Study, faults: Sequence[Fault] = FAULTS) -> dict[str, Any]:
    """Plant the faults, print the rows and the costs, and return them with the machine."""
    from harness.config.machine import provenance
    from harness.train.base import threads

    with threads(study.config):
        rows = []
        study.honest  # noqa: B018 - libraries are imported, and the honest checkpoint passes
        for row in plant(study, faults):
            rows.append(row)
            said = row.said[:_SHOWN] or "NOT FOUND"
            print(f"{row.precondition}  {row.fault:48} {row.seconds:7.1f} s  {said}", flush=True)
        costs = costs_of(study)
        for cost in costs:
            print(f"{cost.step:52} {cost.wall:8.2f} s  {cost.cpu:8.2f} CPU s", flush=True)
        return {
            "honest": study.honest,
            "pairs": len(study.tokens.train.rows),
            "rows": [asdict(row) for row in rows],
            "costs": [asdict(cost) for cost in costs],
            **provenance(),
        }


_WAYS = {
    1: "At the start of the command, from names, shapes and numbers in the files. Refused by name.",
    2: "Two equal calls in training mode. Where that mode alone is noisy, all arms train in evaluation mode; any other "
    "noise is refused.",
    3: "The loss at step 0 and with an adapter, against its equation on log-probs of single rows; and no gradient "
    "where the loss is multiplied by 0. Another layout is tried; where none passes, the model is refused. Then the "
    "loss of each arm, with its own hyperparameters and reference; an arm with another loss is refused.",
    4: "Log-probs, loss and gradient against single rows and TRL's trainers: packed, then padded, then each "
    "answer by itself. The first that passes is taken for all arms; where none does, the model is refused.",
    5: "While all pairs are tokenised. Pairs that fail are dropped and counted: the template cuts the answer, writes "
    "it twice, or leaves out the user's turn. Rows are counted and warned of where the template leaves out the system "
    "turn or an earlier one, or where text does not read back from its ids: unknown, other case, other characters. "
    "What fails for all is refused.",
    6: "On token ids, before anything is generated. Another token is added to the stop ids, and said; where there is "
    "none, the template is refused.",
}
_TOP = """# Preconditions

What a study proves on its own model before it trains. The findings stand in the manifest of each trial, and in the
report under "Identical data". 2 to 4 run on three pairs of the study, cut to unlike lengths, and forward on its longest
one. They run once per model, tokens, settings and versions: the result is kept in `results/.cache`.

| | what is proved | when and how; what happens where it fails |
|---|---|---|
"""
_FAULTS = """
## Planted faults

Made by `python benchmarks/preconditions.py MODEL --page`, which exits with 1 where a fault stays hidden. The words are
those on LAST. The seconds are those of checking the faulty study; a fault in memory takes all layouts that are tried.
An empty cell was not measured with the present code.

"""


def page_of(record: dict[str, Any]) -> str:
    """Return docs/preconditions.md."""
    names = list(record)
    found = {name: {row["fault"]: row for row in record[name]["rows"]} for name in names}
    last = names[-1]
    lines = [f"| {number} | {name} | {_WAYS[number]} |\n" for number, name in NAMES.items()]
    lines += [_FAULTS.replace("LAST", last), _line("", "fault", "what is said", *(f"{name}, s" for name in names))]
    lines.append("|---" * (3 + len(names)) + "|\n")
    for row in {row["fault"]: row for name in names for row in record[name]["rows"]}.values():
        seconds = []
        for name in names:
            other = found[name].get(row["fault"])
            seconds.append("" if other is None else f"{other['seconds']:.1f}" if other["said"] else "**not found**")
        lines.append(_line(str(row["precondition"]), row["fault"], _shown(row["said"]), *seconds))
    lines += ["\n## Cost\n\n", _line("", *(f"{name}, {unit}" for name in names for unit in ("s", "CPU s")))]
    lines.append("|---" * (1 + 2 * len(names)) + "|\n")
    for costs in zip(*(record[name]["costs"] for name in names), strict=True):
        lines.append(_line(costs[0]["step"], *(f"{cost[unit]:.2f}" for cost in costs for unit in ("wall", "cpu"))))
    lines.append("\n")
    for name in names:
        about, hardware = record[name], record[name]["hardware"]
        versions = ", ".join(f"{part} {about['versions'][part]}" for part in ("torch", "transformers", "trl", "peft"))
        lines.append(
            f"- {name}: {about['pairs']} training pairs; {hardware['cpu']}, {hardware['cores']} cores, "
            f"train.threads={hardware['threads']}; {versions}.\n"
        )
    lines.append("\nThe machine was shared with other work: CPU seconds are the steadier figure.\n")
    return _TOP + "".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _shown(said: str) -> str:
    """Return the beginning of what was said, for a cell of a table."""
    text = re.sub(r"\s+", " ", said).replace("|", "\\|") or "**not found**"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN].rpartition(' ')[0]} ..."


def main() -> None:
    """Plant the faults in one model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("model", help="folder of a checkpoint, or `embedded`")
    parser.add_argument("--pairs", type=Path, help="preference data in one file; the embedded study's where not given")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--only", type=int, nargs="+", choices=list(NAMES), default=list(NAMES), help="preconditions")
    parser.add_argument("--page", action="store_true", help=f"keep the rows, and write docs/{PAGE.name}")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        study = Study.of(given.model, given.pairs, Path(work), f"train.threads={given.threads}")
        found = measure(study, [fault for fault in FAULTS if fault.precondition in given.only])
    if given.page:
        record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
        name = Path(given.model).name
        kept = [row for row in record.get(name, found)["rows"] if row["precondition"] not in given.only]
        rows = sorted([*kept, *found["rows"]], key=lambda row: row["precondition"])
        record[name] = found | {"rows": rows}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page_of(record), encoding="utf-8")
    sys.exit(any(not row["said"] for row in found["rows"]))


if __name__ == "__main__":
    main()
