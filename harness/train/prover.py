"""The measurements behind a proof: single rows, TRL's own engine and the paired engine, on one model -> `Proof`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.arms import ARMS, BetaConfig, MethodConfig, title
from harness.config.schema import Engine, Precision, Reference, RunConfig, Tuning
from harness.data.plan import BatchPlan
from harness.data.token_rows import TokenPair, pair_lengths
from harness.data.tokens import ChatFormat
from harness.study.errors import UsageError, is_out_of_memory
from harness.study.manifest import Finding
from harness.study.text import one_line
from harness.train.layout import Layout, Way
from harness.train.memory import free_unused_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from harness.train.run import PairTrainer

PARAMETERS = "parameters are those of the files"
DETERMINISTIC = "training is deterministic"
LOSS = "the loss is the arm's alone"
ENGINE = "the engine computes what TRL's computes"
ALONE = Layout("alone")
_LOSS_KEYS = ("beta", "gamma_beta_ratio", "length_norm", "sft_weight")  # of an arm, that its loss depends on

# Tokens to which the pairs are cut: of the prompt, of the chosen answer, of the rejected one.
_CUTS = ((8, 6, 9), (20, 12, 7), (32, 16, 20))
_LONGEST_CUT = (192, 96, 96)
_TOKEN_GAP = 1e-4  # nats per token in fp32; noise between batch shapes is below 2e-5
_LEAK_GAP = 2e-6  # nats per token in fp32, between two batches of one shape: other rows only change
_LOOK_AHEAD_NOISE = 10  # times the noise that was measured, which a few rows show the size of alone
_LOSS_GAP = 1e-4  # in fp32
_TOKEN_NOISE = (2e-5, 1e-2)  # nats per token between batch shapes, in fp32 and below; a steep loss moves by more
_NORM_GAP = 1e-3  # relative, in fp32
_PART_GAP = 5e-3  # of one parameter's gradient, relative to its norm, in fp32
_LEAST_SHARE = 0.01  # of the root mean square over parameters
_NOISE_GAP = 1e-6  # nats per token between two equal calls in fp32, which a CPU computes bit by bit alike
_COARSER = 100  # times a tolerance where the model is not in fp32
_NUDGE = 0.02  # standard deviation of what is added to weights, so that policy and reference differ


@dataclass(frozen=True)
class Proof:
    """What was proved.

    Attributes:
        layout: how all arms, the reference and the held-out pairs of the study are run.
        findings: for the manifest.
        gaps: largest differences to TRL's own engine, of the loss and of the gradient norm (relative).
    """

    layout: Layout
    findings: tuple[Finding, ...]
    gaps: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Losses:
    """What an arm's trainer gives on the sample: at step 0, and with weights that are no longer the base's."""

    first: float
    nudged: float


def sample_of(rows: Sequence[TokenPair]) -> tuple[TokenPair, ...]:
    """Return up to three pairs: the shortest, one of middle length and the longest, cut to unlike lengths."""
    order = pair_lengths(rows).argsort(kind="stable").tolist()
    chosen = sorted({0, len(order) // 2, len(order) - 1})
    return tuple(_cut(rows[order[i]], cut) for i, cut in zip(chosen, _CUTS, strict=False))


def checked_of(rows: Sequence[TokenPair]) -> tuple[TokenPair, ...]:
    """Return the sample with the study's longest pair, which is run forward only."""
    return (*sample_of(rows), _cut(rows[int(pair_lengths(rows).argmax())], _LONGEST_CUT))


def _cut(row: TokenPair, lengths: tuple[int, int, int]) -> TokenPair:
    prompt, chosen, rejected = lengths
    return replace(
        row,
        prompt_ids=row.prompt_ids[:prompt],
        chosen_ids=row.chosen_ids[:chosen],
        rejected_ids=row.rejected_ids[:rejected],
    )


def _reversed(row: TokenPair) -> TokenPair:
    return replace(
        row, prompt_ids=row.prompt_ids[::-1], chosen_ids=row.chosen_ids[::-1], rejected_ids=row.rejected_ids[::-1]
    )


@dataclass(frozen=True)
class _Measured:
    """A trainer's loss at its start and with the nudged adapter, and the gradient's norm there.

    `own` is the gradient's norm at the start where the loss is multiplied by 0: what does not come from the loss.
    `parts` has each parameter's gradient in two numbers, by name (see `_gradient_parts`).
    """

    engine: Engine
    first: float
    own: float
    loss: float
    norm: float
    parts: dict[str, tuple[float, float]]


@dataclass
class Prover:
    """The state of one proof: the pairs, what single rows give, and what TRL's own engine gives."""

    config: RunConfig
    rows: Sequence[TokenPair]
    model: PreTrainedModel
    chat: ChatFormat
    folder: Path
    still: bool = False
    truth: list[Tensor] = field(default_factory=list)  # log-probs of single rows
    single: Way = "alone"  # the cheapest way that gives the log-probs of single rows
    gaps: tuple[float, float] = (0.0, 0.0)
    spread: tuple[float, float] = (0.0, 0.0)  # of TRL's engine with itself: of the loss, of the norm (relative)
    stock: dict[str, _Measured] = field(default_factory=dict)
    stock_problems: dict[str, str] = field(default_factory=dict)
    nudged: Tensor | None = None
    moved: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # weights that were nudged, as they were

    def __post_init__(self) -> None:
        import torch

        self.sample = sample_of(self.rows)
        self.checked = checked_of(self.rows)
        self.coarseness = 1 if self.model.dtype == torch.float32 else _COARSER
        self.attention = self.model.config._attn_implementation
        self.name = self.config.model.path

    def run(self) -> Proof:
        """Measure everything; the model is left without adapters and patches.

        Raises:
            UsageError: where the model cannot be run, is noisy, or trains with its arm's loss in no layout.
        """
        import torch

        self._run_single_rows()
        if not bool(torch.isfinite(torch.cat(self.truth)).all()):
            why = "the base's log-probs are not finite numbers"
            return Proof(Layout(self._ways()[0]), (Finding(ENGINE, "not proved", why),))
        deterministic = self._prove_deterministic()
        self._refuse_look_ahead()
        layout = None
        try:
            layout, loss, engine = self._prove_engine()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            loss = Finding(LOSS, "not proved", "memory ran out while it was measured")
            engine = Finding(ENGINE, "not proved", "memory ran out while it was measured")
        if layout is None:  # behind the error, whose traceback held what did not fit
            self.reset()
            free_unused_memory()
            layout = self._first_forward_layout()
        return Proof(layout, (self._parameters(), deterministic, loss, engine), self.gaps)

    def prove_method(self, method: MethodConfig, layout: Layout) -> Losses:
        """Prove that an arm trains with the loss of its row in the table of arms, at its own hyperparameters.

        Args:
            method: the arm.
            layout: of the proof.

        Raises:
            UsageError: where the loss is another one.
        """
        if not self.truth:
            self._run_single_rows()
        self.still = layout.still
        if self.nudged is None:  # under single rows, where the model attends as it did when it was loaded
            self._measure(_method("simpo"), Engine.paired, replace(ALONE, still=self.still), has_gradients=False)
        found = self._measure(method, self.config.train.engine, layout, has_gradients=False)
        if problem := self._loss_problem(method, found):
            raise UsageError(
                f"method={method.name} ({settings_of(method)}): a {type(self.model).__name__} does not train with the "
                f"loss of {title(method.name)} alone: its {problem}; leave this arm out, take another checkpoint, or "
                "report this model's class"
            )
        return Losses(found.first, found.loss)

    def _run_single_rows(self) -> None:
        """Take the log-probs of single rows, which all else is held to.

        Raises:
            UsageError: where the model cannot be run.
        """

        self.model.eval()
        try:
            self.truth = self._token_logps("alone", self.checked)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UsageError(
                f"model.path={self.name}: a {type(self.model).__name__} cannot be run on token ids alone "
                f"({type(error).__name__}: {error}); take a checkpoint of a causal language model"
            ) from error
        self.base_sums = self._sums(self.truth)

    def _refuse_look_ahead(self) -> None:
        """Raise a UsageError for a model whose tokens see later ones: it would not score the answers that it writes."""
        from harness.train.logps import look_ahead

        self.model.eval()
        gap = noise = 0.0
        for row in (self.sample[0], self.sample[-1]):
            found = look_ahead(self.model, [*row.prompt_ids, *row.chosen_ids])
            gap, noise = max(gap, found.gap), max(noise, found.noise)
        if gap > max(_LEAK_GAP * self.coarseness, _LOOK_AHEAD_NOISE * noise):
            raise UsageError(
                f"model.path={self.name}: a {type(self.model).__name__} lets tokens see later ones (log-probs before "
                f"a changed token change by up to {gap:.2g} nats, where the noise is {noise:.2g}), so that it is no "
                "causal language model; write is_decoder: true into config.json where it was trained as one, or take "
                "another checkpoint"
            )

    def _parameters(self) -> Finding:
        """Say that loading has found every parameter in the files, or it would have been refused (`load_checked`)."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        detail = f"every one of {total:,} parameters came from the checkpoint's files"
        unexpected = getattr(self.model, "unexpected_tensors", [])
        if unexpected:
            shown = one_line(", ".join(unexpected))
            detail += f"; {len(unexpected)} tensors of the files have no place in the model: {shown}"
        return Finding(PARAMETERS, "warned" if unexpected else "proved", detail)

    def _ways(self) -> list[Way]:
        from harness.train.run import uses_packing

        if self.config.train.engine is Engine.stock:
            return ["padded"]
        return ["packed", "padded", "alone"] if uses_packing(self.config) else ["padded", "alone"]

    def _token_logps(self, way: Way, rows: Sequence[TokenPair]) -> list[Tensor]:
        """Return the log-probs of each answer's tokens, chosen before rejected, in nats."""
        from harness.train.logps import answer_token_logps

        return answer_token_logps(
            self.model,
            rows,
            way,
            pad_id=self.chat.tokenizer.pad_token_id,
            share_prefix=self.config.train.levers.share_prefix,
        )

    def _sums(self, logps: Sequence[Tensor]) -> Tensor:
        """Return the sums of the sample's answers: shape (num_pairs, 2)."""
        import torch

        return torch.stack([part.double().sum() for part in logps[: 2 * len(self.sample)]]).view(-1, 2)

    def _prove_deterministic(self) -> Finding:
        """Compare two equal calls in training mode; where they differ, in evaluation mode.

        Raises:
            UsageError: where they differ there, too.
        """
        from harness.train.pure import switched_off

        gap = self._noise(still=False)
        detail = "two equal calls in training mode give equal log-probs"
        if gap > _NOISE_GAP * self.coarseness:
            who = self._first_noisy()
            self.still = True
            if self._noise(still=True) > _NOISE_GAP * self.coarseness:
                raise UsageError(
                    f"model.path={self.name}: {who} gives other values at each call of equal inputs, in training "
                    f"mode (up to {gap:.2g} nats per token) and in evaluation mode, so that the arms would differ in "
                    "more than their loss; remove the noise from the model's code, or take another checkpoint"
                )
            detail = f"{who} draws random numbers in training mode: all arms train in evaluation mode, where none does"
        self.model.eval()
        off = switched_off(self.model)
        if off:
            detail += f"; switched off in all arms: {', '.join(off)}"
        dropout = self.config.train.lora_dropout
        if dropout:
            detail += f"; train.lora_dropout={dropout:g} is on in all arms, and was off while this was measured"
        return Finding(DETERMINISTIC, "proved", detail)

    def _noise(self, *, still: bool) -> float:
        """Return the largest difference per token between two calls."""
        first, second = (self._in_training_mode(still) for _ in range(2))
        is_single = _largest_gap(second, self.truth[: len(second)]) <= _TOKEN_GAP * self.coarseness
        self.single = "padded" if is_single else "alone"
        return _largest_gap(first, second)

    def _in_training_mode(self, still: bool) -> list[Tensor]:
        from harness.train.pure import make_still

        self.model.train()
        if still:
            make_still(self.model)
        return self._token_logps("padded", self.sample)

    def _first_noisy(self) -> str:
        """Return the class and the name of the first module whose output differs between two equal calls."""
        calls: list[list[tuple[str, str, float]]] = []
        names = {module: name for name, module in self.model.named_modules()}

        def note(module: torch.nn.Module, _: object, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if hasattr(first, "double") and first.is_floating_point():
                calls[-1].append((type(module).__name__, names[module], float(first.double().abs().sum())))

        hooks = [module.register_forward_hook(note) for module in names]
        try:
            for _ in range(2):
                calls.append([])
                self._in_training_mode(still=False)
        finally:
            for hook in hooks:
                hook.remove()
        for one, other in zip(*calls, strict=False):
            if one != other:
                return f"{one[0]} ({one[1] or 'the model'})"
        return type(self.model).__name__

    def _prove_engine(self) -> tuple[Layout, Finding, Finding]:
        """Try the layouts in turn.

        Raises:
            UsageError: where none passes.
        """
        for arm in _TRAINERS:
            self._measure_stock(arm)
        if self.config.train.engine is Engine.stock:
            return self._stock_alone()
        failed: dict[str, str] = {}
        for way in self._ways():
            layout = Layout(way, next(iter(failed.values()), ""), self.still)
            problem, gaps = self._try(layout)
            self.reset()
            if not problem:
                self.gaps = gaps
                return layout, self._loss_finding(), self._engine_finding(layout, failed, gaps)
            failed[way] = problem
        tried = "; ".join(f"{way}: {problem}" for way, problem in failed.items())
        raise UsageError(
            f"model.path={self.name}: a {type(self.model).__name__} does not train with the loss of its arm alone, in "
            f"no way of running it ({tried}); take another checkpoint, or report this model's class"
        )

    def _stock_alone(self) -> tuple[Layout, Finding, Finding]:
        if self.stock_problems:
            problems = "; ".join(f"{arm}: {problem}" for arm, problem in self.stock_problems.items())
            raise UsageError(
                f"train.engine=stock: TRL's own trainers do not compute the arms' losses of a "
                f"{type(self.model).__name__} ({problems}); use train.engine=paired, which runs it in another way"
            )
        engine = Finding(ENGINE, "proved", "train.engine=stock: TRL's own trainers run")
        return Layout("padded", "", self.still), self._loss_finding(), engine

    def _measure_stock(self, arm: str) -> None:
        """Measure TRL's own trainer, and whether its loss is the one of single rows."""

        layout = Layout("padded", "", self.still)
        try:
            found = self._measure(_method(arm), Engine.stock, layout)
            if self.coarseness > 1:
                apart = self._measure(_method(arm), Engine.stock, layout, one_by_one=True)
                self.spread = (
                    max(self.spread[0], abs(found.loss - apart.loss)),
                    max(self.spread[1], _relative(found.norm, apart.norm)),
                )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.stock_problems[arm] = f"{type(error).__name__}: {error}"
        else:
            self.stock[arm] = found
            if problem := self._loss_problem(_method(arm), found):
                self.stock_problems[arm] = problem
        self.reset()

    def _try(self, layout: Layout) -> tuple[str, tuple[float, float]]:
        """Return why a layout fails, or nothing, with the largest gaps of loss and norm."""

        try:
            if problem := self._forward_problem(layout.way):
                return problem, (0.0, 0.0)
            gaps = [0.0, 0.0]
            for arm in _TRAINERS:
                found = self._measure(_method(arm), Engine.paired, layout)
                if problem := self._loss_problem(_method(arm), found):
                    return f"{title(arm)}'s {problem}", (0.0, 0.0)
                expected = self._expected(arm)
                gap, norm_gap = abs(found.loss - expected.loss), _relative(found.norm, expected.norm)
                if norm_gap > max(_NORM_GAP * self.coarseness / 2, 3 * self.spread[1]):
                    return (
                        f"{title(arm)}'s gradient norm is {found.norm:.6g} instead of {expected.norm:.6g}",
                        (0.0, 0.0),
                    )
                if self.coarseness == 1 and (problem := _parts_problem(found, expected)):
                    return f"{title(arm)}'s {problem}", (0.0, 0.0)
                gaps = [max(gaps[0], gap), max(gaps[1], norm_gap)]
            return "", (gaps[0], gaps[1])
        except Exception as error:  # a model may fail on packed input in any way; then it is run otherwise
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {error}", (0.0, 0.0)

    def _expected(self, arm: str) -> _Measured:
        """Return what TRL's engine gives; where that is not the arm's loss, what single rows give."""
        if arm in self.stock_problems:
            self.reset()
            self.stock[arm] = self._measure(_method(arm), Engine.paired, replace(ALONE, still=self.still))
        return self.stock[arm]

    def _forward_problem(self, way: Way) -> str:
        """Return why log-probs in a layout are not those of single rows, or nothing."""
        import torch

        from harness.train.base import uses_bf16
        from harness.train.logps import packing_problem

        in_training = torch.bfloat16 if uses_bf16(self.config) else self.model.dtype
        if way == "packed" and (problem := packing_problem(self.model, self.rows, in_training)):
            return problem
        self.model.eval()
        found = self._token_logps(way, self.checked)
        gap = _largest_gap(found, self.truth)
        if gap > _TOKEN_GAP * self.coarseness:
            return f"its log-probs differ by {gap:.2g} nats per token from those of single rows"
        leak = self._leak(way, found)
        if leak > _LEAK_GAP * self.coarseness:
            return f"its log-probs of an answer depend on the rows beside it (by {leak:.2g} nats per token)"
        return ""

    def _leak(self, way: Way, before: Sequence[Tensor]) -> float:
        """Return how far the last answer's log-probs change where all rows before it do, but for its own prompt.

        In random and in small models a leak can be weaker than the noise between two shapes; here the shapes are equal.
        """
        *others, last = self.checked
        changed = replace(_reversed(last), prompt_ids=last.prompt_ids, rejected_ids=last.rejected_ids)
        return _largest_gap(self._token_logps(way, [*map(_reversed, others), changed])[-1:], before[-1:])

    def _first_forward_layout(self) -> Layout:
        """Return the first layout whose log-probs are right, where more could not be measured."""
        why = ""
        for way in self._ways():
            try:
                problem = self._forward_problem(way)
            except Exception as error:
                if is_out_of_memory(error):  # it says nothing of this layout
                    raise
                problem = f"{type(error).__name__}: {error}"
            self.reset()
            if not problem:
                return Layout(way, why, self.still)
            why = why or problem
        return Layout("alone", why, self.still)

    def _loss_problem(self, method: MethodConfig, found: _Measured) -> str:
        assert self.nudged is not None, "it is measured with the first trainer"
        for loss, policy, when in (
            (found.first, self.base_sums, "at step 0"),
            (found.loss, self.nudged, "with an adapter" if self._is_adapted else "with other weights"),
        ):
            expected, steepness = self._oracle(method, policy)
            tolerance = max(_LOSS_GAP * self.coarseness, steepness * _TOKEN_NOISE[self.coarseness > 1])
            if when == "at step 0" and found.engine is not self.config.train.engine:
                continue
            if not abs(loss - expected) <= max(tolerance, 3 * self.spread[0]):
                return f"loss {when} is {loss:.6g} instead of {expected:.6g}"
        if found.own != 0:  # NaN is not 0 either
            return (
                "gradient has a part that is not its loss's, which the model adds going backward (a norm of "
                f"{found.own:.3g} where the loss is multiplied by 0)"
            )
        return ""

    @property
    def _is_adapted(self) -> bool:
        return self.config.train.tuning is not Tuning.full

    def _oracle(self, method: MethodConfig, policy: Tensor) -> tuple[float, float]:
        """Return an arm's loss by its equation, from log-probs of single rows, shape (num_pairs, 2).

        Returns:
            The loss, and how far it can change where each token's log-prob does by 1 nat (of policy or reference).
        """
        import torch

        from harness.train.losses import loss_of

        assert isinstance(method, BetaConfig), "every trained arm has a beta"
        lengths = policy.new_tensor([[len(row.chosen_ids), len(row.rejected_ids)] for row in self.sample])
        sums = policy.clone().requires_grad_()
        with torch.enable_grad():
            loss = loss_of(method, sums, self.base_sums, lengths)
            (slope,) = torch.autograd.grad(loss, sums)
        sides = 2 if ARMS[method.name].uses_reference else 1
        return float(loss.detach()), sides * float((slope.abs() * lengths).sum())

    def _measure(
        self,
        method: MethodConfig,
        engine: Engine,
        layout: Layout,
        *,
        one_by_one: bool = False,
        has_gradients: bool = True,
    ) -> _Measured:
        """Measure a trainer on the sample.

        Args:
            method: the arm, with its hyperparameters.
            engine: whose trainer.
            layout: how it runs the model.
            one_by_one: a micro-batch per pair.
            has_gradients: False measures the losses alone.
        """
        import torch

        count = len(self.sample)
        batches = [[i] for i in range(count)] if one_by_one else [list(range(count))]
        trainer = self._trainer(method, engine, layout)
        first, own = math.nan, 0.0  # of TRL's own engine only where it is the study's
        with torch.set_grad_enabled(has_gradients):
            if engine is self.config.train.engine:
                first = 0.0
                for batch in batches:
                    loss = _loss_of(trainer, batch)
                    if has_gradients:
                        (0 * loss).backward()
                    first += float(loss.detach()) / len(batches)
                own = _norm(_gradient_parts(trainer.model))
                trainer.model.zero_grad(set_to_none=True)
            self.moved += _nudge(trainer.model)
            if self.nudged is None:  # with normal attention, since TRL's engine or single rows are measured first
                trainer.model.eval()
                self.nudged = self._sums(self._token_logps(self.single, self.sample))
            total = 0.0
            for batch in batches:
                loss = _loss_of(trainer, batch) / len(batches)
                if has_gradients:
                    loss.backward()
                total += float(loss.detach())
        parts = _gradient_parts(trainer.model)
        self.reset()
        return _Measured(engine, first, own, total, _norm(parts), parts)

    def _trainer(self, method: MethodConfig, engine: Engine, layout: Layout) -> PairTrainer:
        """Build the trainer of a trial of the study over the sample, with the reference that the study gives it."""
        from harness.train.logps import pair_logps
        from harness.train.run import build_trainer

        self.model.eval()
        config, count = self._config(method, engine), len(self.sample)
        given = None
        if engine is Engine.paired and config.train.reference is Reference.cached and ARMS[method.name].uses_reference:
            pad_id, shares = self.chat.tokenizer.pad_token_id, config.train.levers.share_prefix
            given = pair_logps(self.model, self.sample, pad_id=pad_id, desc="", share_prefix=shares, layout=layout)
        return build_trainer(
            config,
            self.sample,
            BatchPlan(tuple(range(count)), count, count),
            model=self.model,
            chat=self.chat,
            output_dir=self.folder,
            reference=given,
            layout=layout,
        )

    def reset(self) -> None:
        """Leave the model without adapters and patches, and with its own weights."""
        from harness.train.base import reset_model

        while self.moved:
            weight, before = self.moved.pop()
            weight.data = before
        reset_model(self.model)
        self.model.set_attn_implementation(self.attention)

    def _config(self, method: MethodConfig, engine: Engine) -> RunConfig:
        """Return the trial's config for an arm, without dropout and in one process."""
        train = replace(
            self.config.train,
            engine=engine,
            lora_dropout=0.0,
            epochs=1,
            batch_size=len(self.sample),
            micro_batch_size=len(self.sample),
            gradient_checkpointing=False,
            checkpoint_steps=1,
        )
        if self.coarseness == 1 and train.tuning is not Tuning.qlora:
            train = replace(train, precision=Precision.fp32)
        one = replace(self.config.accelerate, num_processes=1, distributed_type="NO")
        return replace(self.config, method=method, train=train, accelerate=one)

    def _loss_finding(self) -> Finding:
        said = ", ".join(
            f"{title(arm)}'s is {self._oracle(_method(arm), self.base_sums)[0]:.6f}"
            + (" (log 2)" if ARMS[arm].uses_reference else "")
            for arm in _TRAINERS
        )
        return Finding(
            LOSS,
            "proved",
            f"at step 0 each trainer's loss is the one of its equation on single rows: {said}; nothing else has a "
            "part in its gradient",
        )

    def _engine_finding(self, layout: Layout, failed: dict[str, str], gaps: tuple[float, float]) -> Finding:
        lengths = [row.length for row in self.sample]
        precision = str(self.model.dtype).removeprefix("torch.")
        detail = (
            f"loss and gradient norm equal TRL's own within {gaps[0]:.1g} and {gaps[1]:.1g} (relative), on "
            f"{len(self.sample)} pairs of {min(lengths)} to {max(lengths)} tokens in {precision}"
        )
        if self.stock_problems:
            wrong = "; ".join(f"{title(arm)}'s {problem}" for arm, problem in self.stock_problems.items())
            detail += f"; where TRL's own engine fails, they equal those of single rows ({wrong})"
        if failed:
            reasons = "; ".join(f"not {way}: {problem}" for way, problem in failed.items())
            detail = f"{_WAYS[layout.way]} ({reasons}); {detail}"
        return Finding(ENGINE, layout.way if failed else "proved", detail)


_TRAINERS = ("dpo", "simpo")  # one arm for each of TRL's trainers
_WAYS: dict[Way, str] = {
    "packed": "the study runs packed",
    "padded": "the study runs padded",
    "alone": "the study runs each answer by itself, which is slow",
}


def _method(arm: str) -> MethodConfig:
    return ARMS[arm].config(name=arm, learning_rate=1e-6)


def _loss_of(trainer: PairTrainer, numbers: Sequence[int]) -> Tensor:
    """Return a trainer's loss on a micro-batch, in training mode."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.collated(numbers))
    assert not isinstance(loss, tuple)
    return loss


def _gradient_parts(model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """Return of each parameter's gradient its norm, and its product with a random vector, the same each time.

    Where two gradients differ by a vector, their products do by about its norm: a sign shows in them, too.
    """
    import torch

    parts = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.float().flatten()
            generator = torch.Generator(gradient.device).manual_seed(0)
            direction = torch.randn(gradient.shape, generator=generator, device=gradient.device)
            parts[name] = (float(gradient.double().norm()), float(gradient @ direction))
    return parts


def _norm(parts: Mapping[str, tuple[float, float]]) -> float:
    return math.sqrt(sum(norm**2 for norm, _ in parts.values()))


def _parts_problem(found: _Measured, expected: _Measured) -> str:
    """Return the parameter whose gradient differs most, relative to its norm; or nothing.

    In a large model a gradient that is wrong in one matrix hardly changes the norm of all of them.
    """
    least = _LEAST_SHARE * expected.norm / math.sqrt(max(len(expected.parts), 1))  # below it there is noise alone
    none = (0.0, 0.0)
    gaps = {}
    for name in found.parts.keys() | expected.parts.keys():
        ours, theirs = found.parts.get(name, none), expected.parts.get(name, none)
        gap = max(abs(ours[0] - theirs[0]), abs(ours[1] - theirs[1]))
        gaps[name] = gap / max(ours[0], theirs[0], least, 1e-30)
    worst = max(gaps, key=lambda name: gaps[name], default="")
    if worst and gaps[worst] > _PART_GAP:
        short = worst.removeprefix("base_model.model.")
        return f"gradient differs from TRL's in {short} (by {gaps[worst]:.2g} of its norm there)"
    return ""


def _nudge(model: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Move trained weights a little, the same way each time: an adapter's second matrices, or norms and biases.

    So policy and reference differ, and all weights of an adapter have gradients, though its second matrices start at 0.

    Returns:
        The weights that were moved, each with its values before.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    is_adapter = any("lora_B" in name for name, _ in trained)
    moved: list[tuple[Tensor, Tensor]] = []
    for name, parameter in trained:
        if "lora_B" in name or (not is_adapter and parameter.dim() == 1):
            moved.append((parameter, parameter.data))
            noise = torch.randn(parameter.shape, generator=generator) * _NUDGE
            parameter.data = noise.to(parameter) + parameter.data
    return moved


def settings_of(method: MethodConfig) -> str:
    """Return the hyperparameters that an arm's loss depends on, in words."""
    return ", ".join(f"{name}={getattr(method, name):g}" for name in _LOSS_KEYS if hasattr(method, name))


def is_general(method: MethodConfig) -> bool:
    """Return whether `Prover.run` itself proves this arm's loss, with these hyperparameters."""
    return method.name in _TRAINERS and settings_of(method) == settings_of(_method(method.name))


def _largest_gap(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _relative(value: float, other: float) -> float:
    return abs(value - other) / max(abs(value), abs(other), 1e-12)
