"""A capacity factor that changes while a model trains.

No paper known to us trains with a falling capacity factor: in ST-MoE (https://huggingface.co/papers/2202.08906, table 8)
quality rises with it, and it is larger in evaluation than in training. Take a schedule as a way to spend less at the
end, and measure it.
"""

import math
from dataclasses import dataclass

from transformers import PreTrainedModel, TrainerCallback

from moe_hf.errors import MoEError
from moe_hf.modeling.router import Router


SHAPES = ("linear", "cosine", "step")


@dataclass(frozen=True)
class CapacitySchedule:
    """A capacity factor as a function of the fraction of training that is done.

    Attributes:
        start, end: the capacity factors before and after, above 0.
        until: the fraction of training, in (0, 1], at which `end` is reached.
        shape: `"linear"`, `"cosine"` (half a period), or `"step"`: `start`, and at `until` at once `end`.
    """

    start: float
    end: float
    until: float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if not (math.isfinite(value) and value > 0):
                raise MoEError(f"{name} of a capacity schedule is {value}; it must be finite and above 0.")
        if not 0 < self.until <= 1:
            raise MoEError(f"until is {self.until}; it is a fraction of training, in (0, 1].")
        if self.shape not in SHAPES:
            raise MoEError(f"shape is {self.shape!r}; it must be one of {list(SHAPES)}.")

    def at(self, fraction: float) -> float:
        """The capacity factor when `fraction` of training, in [0, 1], is done."""
        progress = min(1.0, fraction / self.until)
        if self.shape == "step":
            progress = float(progress == 1)
        elif self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


class CapacityScheduleCallback(TrainerCallback):
    """Sets `config.capacity_factor` before each optimizer step; a resumed run goes on where it was.

    The model ends with the last value in its configuration. Capacity only masks choices, so shapes stay what they are.
    A compiled model is compiled again when the factor changes: prefer `"step"` there.

    Args:
        schedule (`CapacitySchedule`): the factor over training.
    """

    def __init__(self, schedule: CapacitySchedule) -> None:
        self.schedule = schedule

    def on_train_begin(self, args, state, control, model: PreTrainedModel | None = None, **kwargs) -> None:
        """Refuse a model whose routers have no capacity."""
        configs = _router_configs(model)
        if not configs or any(config.capacity_factor is None for config in configs):
            raise MoEError(
                f"A capacity schedule changes the capacity_factor of a model, and {type(model).__name__} has none. Set "
                "capacity_factor in its MoEConfig."
            )

    def on_step_begin(self, args, state, control, model: PreTrainedModel | None = None, **kwargs) -> None:
        """Set the factor of this step."""
        for config in _router_configs(model):
            config.capacity_factor = self.schedule.at(state.global_step / state.max_steps)


def _router_configs(model: PreTrainedModel) -> list:
    """The configurations that the routers read; they are one object, unless somebody copied a block."""
    return [module.config for module in model.modules() if isinstance(module, Router)]
