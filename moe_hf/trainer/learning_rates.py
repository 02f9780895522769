"""Learning rates for a run that names none: measured, by the size of the model and by what trains.

The sweeps that they come from are in docs/training.md; `benchmarks/learning_rates.py` makes them.
"""

from dataclasses import dataclass

from torch import nn

from moe_hf.errors import MoEError
from moe_hf.finetuning.moe_blocks import find_moe_blocks, whole_shape
from moe_hf.finetuning.scopes import scope_parameter_names
from moe_hf.finetuning.trained_tensors import inner_model
from moe_hf.inspection import used_shares


ADAPTERS = "expert_lora"
# Which measurement a scope takes its rate from.
PARTS = {
    "moe": "moe",
    "experts": "experts",
    "selected": "experts",
    "expert_lora": ADAPTERS,
    "router": "router",
    "shared": "moe",
    "ffn": "ffn",
    "attention": "all",
    "non_moe": "all",
    "all": "all",
}
# Without a scope: that of the first of these that holds all that trains.
NARROW_TO_WIDE = ("router", "experts", "moe", "ffn")


@dataclass(frozen=True)
class MeasuredRates:
    """Rates that sweeps over factors of 3 led to.

    Attributes:
        below: active parameters of the models that they are for, in millions.
        sizes: active parameters of the models that were measured, in millions.
        rates: by what trains.
        derived: of what trains, that which was not swept at these sizes: its rate is that of `moe` times the ratio that they
            have in the row before.
    """

    below: float
    sizes: tuple[float, ...]
    rates: dict[str, float]
    derived: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """The sizes, in words."""
        return f"{' to '.join(f'{size:g}' for size in self.sizes)} M"


# Sizes part at the geometric mean of the nearest ones that were measured.
MEASURED = (
    MeasuredRates(
        18, (2.1,), {"moe": 1e-3, "experts": 1e-3, "ffn": 1e-3, "all": 3e-4, "expert_lora": 3e-3, "router": 1e-3}
    ),
    MeasuredRates(
        float("inf"),
        (161,),
        {"moe": 3e-4, "experts": 3e-4, "ffn": 3e-4, "all": 1e-4, "expert_lora": 1e-3, "router": 3e-4},
        derived=("experts", "all", "expert_lora", "router"),
    ),
)
# A model that has more than this many times the parameters of the largest one is said to be beyond what was measured.
BEYOND = 3


@dataclass(frozen=True)
class DefaultRate:
    """A rate, what it was measured for, and a sentence that says both."""

    rate: float
    part: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def default_learning_rate(model: nn.Module, scope: str | None = None, share: float = 1.0) -> DefaultRate:
    """The rate for a run in which nobody named one.

    Args:
        model (`nn.Module`): a MoE or a dense model, also inside of PEFT's adapters.
        scope (`str`, *optional*): what trains of it; by default what requires gradients.
        share (`float`): part of the measured rate to take, for objectives that move a model faster than the loss of text.
    """
    size, part = active_parameters(model) / 1e6, PARTS[scope] if scope is not None else trained_part(model)
    row = next(row for row in MEASURED if size < row.below)
    rate = float(f"{share * row.rates[part]:.2g}")
    what = "adapters" if part == ADAPTERS else f"scope {part}"
    how = "derived from scope moe" if part in row.derived else "measured"
    of = "" if share == 1 else f"{share:g} of what was "
    sentence = f"learning rate {rate:g}: {of}{how} for {what} at {row.described} active parameters, docs/training.md"
    if size > BEYOND * row.sizes[-1]:
        sentence += f"; this model has {size:,.0f} M, which was not measured: try a third of it too"
    return DefaultRate(rate, part, sentence)


def trained_part(model: nn.Module) -> str:
    """What of `model` requires gradients, as one of the names in `MeasuredRates.rates`."""
    model = inner_model(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if all("lora_" in name for name in trained):
        return ADAPTERS
    return next((part for part in NARROW_TO_WIDE if trained <= _names(model, part)), "all")


def _names(model: nn.Module, scope: str) -> set[str]:
    try:
        return set(scope_parameter_names(model, scope))
    except MoEError:  # it has no such part
        return set()


def active_parameters(model: nn.Module) -> float:
    """Parameters that one token uses, those that lie on other processes too."""
    model = inner_model(model)
    used = used_shares(model) if find_moe_blocks(model) else {}
    return sum(whole_shape(p).numel() * min(1.0, used.get(name, 1.0)) for name, p in model.named_parameters())
