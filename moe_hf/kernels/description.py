"""What an experts module of transformers computes: its tensors, their layout, its activation.

Letters: D model width, F expert width, E experts that the module holds (on this rank).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from moe_hf.errors import MoEError


MARKS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")


@dataclass(frozen=True)
class ExpertsDescription:
    """An experts module as two linear maps with an activation between.

    `first` and `second` name the weights, `(E, out, in)`, or `(E, in, out)` when `transposed`; a bias is named after its
    weight with `_bias`. `activation` maps rows of the first map, (R, 2F) when `gated` and (R, F) when not, to (R, F).
    `foldable` says that the routing weight may be multiplied in before the second map instead of after it: nothing
    non-linear follows.
    """

    first: str
    second: str
    gated: bool
    transposed: bool
    has_bias: bool
    foldable: bool
    activation: Callable[[torch.Tensor], torch.Tensor]
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None


def describe_experts(experts: nn.Module) -> ExpertsDescription:
    """Describe an experts module that is decorated with transformers' `use_experts_implementation`.

    Raises:
        MoEError: the module is not of that kind (a list of MLPs, quantized weights, code of another library).
    """
    missing = [name for name in MARKS if not hasattr(experts, name)]
    if missing:
        raise MoEError(
            f"{type(experts).__name__} is not an experts module of transformers' experts interface (it has no "
            f"{missing[0]}). The grouped computation needs stacked weights behind `use_experts_implementation`."
        )
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    for name in (first, "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 3 or not weight.is_floating_point():
            raise MoEError(
                f"{type(experts).__name__}.{name} is not a floating-point tensor (experts, out, in). "
                "Quantized experts cannot be computed here; load the model in bfloat16."
            )
    activation = experts._apply_gate if experts.has_gate else experts.act_fn
    function = vars(experts).get("act_fn", experts._modules.get("act_fn"))
    has_parameters = isinstance(function, nn.Module) and any(True for _ in function.parameters())
    return ExpertsDescription(
        first=first,
        second="down_proj",
        gated=experts.has_gate,
        transposed=experts.is_transposed,
        has_bias=experts.has_bias,
        foldable=not experts.has_post_expert_norm and not has_parameters,
        activation=activation,
        post_norm=experts.post_expert_norm if experts.has_post_expert_norm else None,
    )
