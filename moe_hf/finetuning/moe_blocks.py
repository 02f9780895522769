"""Where the experts of a model are."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


# Added to an expert's score when experts are chosen; a buffer or a frozen parameter, moved without gradients.
CORRECTION_BIAS = "e_score_correction_bias"


def find_moe_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have a child `experts` whose matrices are stacked over experts, by name."""
    return {name: module for name, module in model.named_modules() if _holds_experts(module)}


def _holds_experts(module: nn.Module) -> bool:
    experts = dict(module.named_children()).get("experts")
    if experts is None:
        return False
    if isinstance(experts, nn.ModuleList):
        return len(experts) > 0
    return any(len(whole_shape(parameter)) >= 3 for parameter in experts.parameters())


def experts_in(experts: nn.Module) -> int:
    """E of an experts module with stacked matrices, those on other processes too; 0 where they are not stacked."""
    shapes = map(whole_shape, experts.parameters(recurse=False))
    return max((shape[0] for shape in shapes if len(shape) >= 3), default=0)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also between the uses of one that DeepSpeed's ZeRO-3 leaves empty there."""
    return getattr(parameter, "ds_shape", parameter.shape)


def return_to_shards(model: nn.Module) -> None:
    """Bring back into shards what a forward pass of FSDP2 left whole, in place.

    Whole parameters are other objects than the shards: what is set on them, such as `requires_grad`, ends with them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
