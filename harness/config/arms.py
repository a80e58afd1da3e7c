"""The table of arms: for each its typed keys, its TRL trainer, and the arguments to that trainer.

Adding an arm is one row here and one file in `conf/method/`. No other code asks for an arm's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field
from typing import Any, TypeVar

from harness.study.text import one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Allowed values of a config key; of a list, those of its items.

    Attributes:
        above, at_least, below, at_most: range of a number.
        choices: allowed words.
        distinct: a list without repeats, not empty unless `may_be_empty`.
        items: description of a list's items, for messages.
        quiet: leave the key out of a config's label while it has its default.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    distinct: bool = False
    may_be_empty: bool = False
    items: str = ""
    quiet: bool = False


def bounded(
    default: T,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    quiet: bool = False,
) -> T:
    """Declare a config key with a default and `Limits`; keys that hold lists use `field` and its metadata."""
    limits = Limits(above, at_least, below, at_most, choices, quiet=quiet)
    return field(default=default, metadata={"limits": limits})


def declared_limits(key: Field[Any]) -> Limits:
    """Return the limits that a config key was declared with."""
    return key.metadata.get("limits", Limits())


@dataclass
class MethodConfig:
    """Keys that every arm has.

    Attributes:
        name: of the arm, as `+method=` gives it.
        learning_rate: peak learning rate; null takes `learning_rates[train.tuning]`.
        learning_rates: the arm's published rate for each tuning, `lora` (also for qlora) and `full`.
        learning_rate_factor: multiplies the rate: for one grid that suits arms with different rates.
    """

    name: str = "???"
    learning_rate: float | None = bounded(None, above=0.0, at_most=1.0)
    learning_rates: dict[str, float] = field(default_factory=dict)
    learning_rate_factor: float = bounded(1.0, above=0.0, at_most=1000.0)


@dataclass
class BetaConfig(MethodConfig):
    """Keys of DPO and of length-normalised DPO.

    Attributes:
        beta: scale of the reward, against drift from the base: the first key to tune.
    """

    beta: float = bounded(0.1, above=0.0, at_most=1000.0)


@dataclass
class DPOMarginConfig(BetaConfig):
    """Keys of DPO with SimPO's target margin, for the ablation.

    Attributes:
        gamma_beta_ratio: target margin over beta, in nats (per token where the reward is length-normalised).
    """

    gamma_beta_ratio: float = bounded(0.5, at_least=0.0, at_most=10.0)


@dataclass
class SimPOConfig(BetaConfig):
    """Keys of SimPO.

    Attributes:
        beta: scale of the reward, per token and so larger than DPO's: the first key to tune.
        gamma_beta_ratio: target margin over beta, in nats per token (the SimPO code's name for it).
        length_norm: reward = log-prob / length**length_norm; 1.0 is SimPO, 0.0 the plain sum.
        sft_weight: weight of the cross-entropy on the chosen answer (TRL's `cpo_alpha`); 0.0 is SimPO.
    """

    beta: float = bounded(2.0, above=0.0, at_most=1000.0)
    gamma_beta_ratio: float = bounded(0.5, at_least=0.0, at_most=10.0)
    length_norm: float = bounded(1.0, at_least=0.0, at_most=2.0, quiet=True)
    sft_weight: float = bounded(0.0, at_least=0.0, at_most=100.0, quiet=True)


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        title: the name in prose.
        config: the typed keys of `conf/method/NAME.yaml`.
        trainer: TRL's trainer class by name; None for the SFT base, which is scored and not trained.
        trl_arguments: converts the arm's keys to keyword arguments of that trainer's config class.
        uses_reference: True where the loss needs log-probs of the SFT base.
        per_token: True where rewards are means over an answer's tokens, False where they are sums.
        has_margin: True where the chosen answer must win by a target margin.
    """

    title: str
    config: type[MethodConfig]
    trainer: str | None
    trl_arguments: Callable[[Any], Mapping[str, str | float | list[str]]]  # its argument is of the class `config`
    uses_reference: bool
    per_token: bool = False
    has_margin: bool = False


TRLArguments = dict[str, str | float | list[str]]


def _simpo_arguments(method: SimPOConfig) -> TRLArguments:
    return {
        "loss_type": "simpo",
        "beta": method.beta,
        # TRL's simpo_gamma is absolute; people tune its ratio to beta. This is the only place that converts.
        "simpo_gamma": method.gamma_beta_ratio * method.beta,
        # TRL's default of 1.0 trains CPO-SimPO, which is another method.
        "cpo_alpha": method.sft_weight,
    }


def _dpo_arguments(method: BetaConfig) -> TRLArguments:
    return {"loss_type": ["sigmoid"], "beta": method.beta}


def _dpo_norm_arguments(method: BetaConfig) -> TRLArguments:
    return {"loss_type": ["sigmoid_norm"], "beta": method.beta}


# The rows below `simpo` are for the ablation: which part of SimPO makes the difference. Reference or none, sum or mean,
# margin or none make eight arms with `dpo`, `simpo` and `dpo_norm`.
ARMS: dict[str, Arm] = {
    "dpo": Arm("DPO", BetaConfig, "DPOTrainer", _dpo_arguments, uses_reference=True),
    "simpo": Arm(
        "SimPO", SimPOConfig, "CPOTrainer", _simpo_arguments, uses_reference=False, per_token=True, has_margin=True
    ),
    "dpo_norm": Arm(
        "length-normalised DPO", BetaConfig, "DPOTrainer", _dpo_norm_arguments, uses_reference=True, per_token=True
    ),
    "dpo_margin": Arm(
        "DPO with margin", DPOMarginConfig, "DPOTrainer", _dpo_arguments, uses_reference=True, has_margin=True
    ),
    "dpo_norm_margin": Arm(
        "length-normalised DPO with margin",
        DPOMarginConfig,
        "DPOTrainer",
        _dpo_norm_arguments,
        uses_reference=True,
        per_token=True,
        has_margin=True,
    ),
    "simpo_no_margin": Arm(
        "SimPO without margin", SimPOConfig, "CPOTrainer", _simpo_arguments, uses_reference=False, per_token=True
    ),
    "simpo_sum": Arm(
        "SimPO by sums", SimPOConfig, "CPOTrainer", _simpo_arguments, uses_reference=False, has_margin=True
    ),
    "simpo_sum_no_margin": Arm(
        "SimPO by sums without margin", SimPOConfig, "CPOTrainer", _simpo_arguments, uses_reference=False
    ),
    "sft": Arm("SFT base", MethodConfig, None, lambda _: {}, uses_reference=False),
}

BASE = "sft"


def title(arm: str) -> str:
    """Return an arm's name in prose; one that the table of arms does not know keeps its own."""
    return ARMS[arm].title if arm in ARMS else one_line(arm, 60)
