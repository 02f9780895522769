"""Dropout inside the experts alone, while a model trains.

Letters: F expert width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback

from moe_hf.errors import MoEError
from moe_hf.finetuning.moe_blocks import find_moe_blocks, whole_shape


# Kernels that compute an expert without calling its activation have no place for a dropout.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@torch.no_grad()
def add_expert_dropout(model: nn.Module, rate: float) -> list[RemovableHandle]:
    """Drop each of the F hidden activations of a routed expert with a chance of `rate`, in training mode.

    The rest is scaled by 1 / (1 - rate). It acts on the expert's activation function, which in a gated expert is as
    good as on its product with the other half. Weights, their names and the saved model do not change.

    Args:
        model (`nn.Module`): a MoE, this package's or one of transformers.
        rate (`float`): in [0, 1).

    Returns:
        The hooks' handles; `handle.remove()` takes it off.

    Raises:
        MoEError: a rate outside its range, or experts without an activation module that their kernels call.

    Source: Switch Transformer, section 2.4 (https://huggingface.co/papers/2101.03961); ST-MoE, figure 4
    (https://huggingface.co/papers/2202.08906).
    """
    if not 0 <= rate < 1:
        raise MoEError(f"The rate of expert dropout is {rate}; it must be in [0, 1).")
    blocks = find_moe_blocks(model)
    if not blocks:
        raise MoEError(f"{type(model).__name__} has no MoE block, so there is no expert to drop from.")
    activations = [_activation(name, block.experts) for name, block in blocks.items()]

    def drop(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, training=module.training)

    return [activation.register_forward_hook(drop) for activation in activations]


def _activation(name: str, experts: nn.Module) -> nn.Module:
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer  # adapters wrap the module
    activation = experts._modules.get("act_fn")
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", "eager")
    if activation is None or isinstance(experts, nn.ModuleList):
        raise MoEError(f"The experts of {name!r} ({type(experts).__name__}) have no act_fn to put a dropout on.")
    if implementation not in IMPLEMENTATIONS:
        raise MoEError(
            f"experts_implementation={implementation!r} computes an expert in one kernel, without dropout. Use one of "
            f"{', '.join(IMPLEMENTATIONS)}."
        )
    if getattr(experts, "has_gate", False):
        weight = next(parameter for parameter in experts.parameters() if len(whole_shape(parameter)) == 3)
        width = whole_shape(weight)[1] // 2 * 2
        calls: list[bool] = []
        handle = activation.register_forward_hook(lambda *_: calls.append(True))
        experts._apply_gate(torch.zeros(1, width, device=weight.device, dtype=weight.dtype))
        handle.remove()
        if not calls:
            raise MoEError(f"The experts of {name!r} ({type(experts).__name__}) have a gate that calls no act_fn.")
    return activation


class ExpertDropoutCallback(TrainerCallback):
    """Expert dropout for the time of a training run, in any `Trainer`; `MoETrainingArguments(expert_dropout=...)`.

    Args:
        rate (`float`): as `add_expert_dropout` takes it.
    """

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise MoEError(f"The rate of expert dropout is {rate}; it must be in [0, 1).")
        self.rate = rate
        self._handles: list[RemovableHandle] = []

    def on_train_begin(self, args, state, control, model: PreTrainedModel | None = None, **kwargs) -> None:
        """Put it on."""
        self._remove()
        self._handles = add_expert_dropout(model, self.rate)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Take it off."""
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
