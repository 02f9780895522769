"""Learning rate and weight decay of their own for routers and experts, and experts that saw no token left alone.

Letters: E experts.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.trainer_pt_utils import get_parameter_names

from moe_hf.errors import MoEError
from moe_hf.finetuning.scopes import find_moe_blocks, scope_parameter_names
from moe_hf.trainer.guard import local_part


PARTS = ("rest", "router", "experts")


@dataclass(frozen=True)
class PartRates:
    """Learning rates and weight decays of the routers and of the routed experts; None: those of the rest.

    Raises:
        MoEError: a value below 0 or not finite.
    """

    router_learning_rate: float | None = None
    expert_learning_rate: float | None = None
    router_weight_decay: float | None = None
    expert_weight_decay: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < float("inf"):
                raise MoEError(f"{name} is {value}; it must be at least 0 and finite.")

    def is_given(self) -> bool:
        """Whether any part differs from the rest."""
        return any(value is not None for value in vars(self).values())

    def of(self, part: str, learning_rate: float, weight_decay: float) -> tuple[float, float]:
        """`(learning rate, weight decay)` of a part, given those of the rest."""
        own = {
            "router": (self.router_learning_rate, self.router_weight_decay),
            "experts": (self.expert_learning_rate, self.expert_weight_decay),
        }.get(part, (None, None))
        return tuple(
            given if own is None else own for own, given in zip(own, (learning_rate, weight_decay), strict=True)
        )


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float = 0.0, **rates: float) -> list[dict]:
    """Parameter groups for an optimizer: routers, routed experts and the rest, each with and without weight decay.

    Biases and norms have no weight decay, as in `Trainer`. What is frozen is left out; every other parameter is in
    exactly one group, which is named by `"part"`. For a trainer of TRL, or any other:

        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-5, 0.01, router_learning_rate=1e-4))
        SFTTrainer(model, optimizers=(optimizer, None), ...)

    Args:
        model (`nn.Module`): a MoE; after sharding, if it is sharded.
        learning_rate, weight_decay (`float`): of the rest.
        rates: as `PartRates` takes them.

    Raises:
        MoEError: a rate that is not allowed, or one of a part that the model has not, or that is frozen.
    """
    decays = decayed_names(model)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = [
        {"params": [p for name, p in named.items() if (name in decays) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, weight_decay), (False, 0.0))
    ]
    groups = [group | {"lr": learning_rate} for group in plain if group["params"]]
    return split_groups(groups, model, PartRates(**rates), decays)


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay acts on: no norms, no biases; as `Trainer.get_decay_parameter_names`."""
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    return set(get_parameter_names(model, [nn.LayerNorm], forbidden))


def split_groups(groups: list[dict], model: nn.Module, rates: PartRates, decayed: Collection[str]) -> list[dict]:
    """Split parameter groups by part of the model, the rest first, with each part's own rate and decay.

    Args:
        groups: of an optimizer without a state, each with `lr` and `weight_decay`; what else they hold is kept.
        decayed: names of the parameters that weight decay acts on.

    Raises:
        MoEError: a rate is given for a part that nothing trains in.
    """
    part_of = {id(p): "rest" for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    for part in PARTS[1:]:
        for name in scope_parameter_names(model, part):
            part_of[id(parameters[name])] = part
    split = []
    for part in PARTS:
        for group in groups:
            members = [p for p in group["params"] if part_of[id(p)] == part]
            if not members:
                continue
            decays = names[id(members[0])] in decayed
            learning_rate, weight_decay = rates.of(part, group["lr"], group["weight_decay"])
            weight_decay = weight_decay if decays else group["weight_decay"]
            split.append(group | {"params": members, "lr": learning_rate, "weight_decay": weight_decay, "part": part})
    found = {group["part"] for group in split}
    for part, prefix in (("router", "router"), ("experts", "expert")):
        given = [name for name, value in vars(rates).items() if name.startswith(prefix) and value is not None]
        if given and part not in found:
            raise MoEError(
                f"{given[0]} is given, and no parameter of the {part} trains. Leave it out, or widen the scope."
            )
    return split


def leave_idle_experts_alone(optimizer: Optimizer, model: nn.Module) -> list[RemovableHandle]:
    """Keep an optimizer's steps from experts that saw no token: neither weight decay nor momentum moves them.

    The experts of a layer are one fused parameter, so that an optimizer steps all of them, at a gradient of zero too.
    An expert whose gradient is zero throughout gets its weights and its moments back after the step. AdamW's count of
    steps, one per parameter, goes on for all.

    Args:
        optimizer (`Optimizer`): of torch, or with its hooks; its states must be those of whole experts.
        model (`nn.Module`): a MoE whose experts `optimizer` trains.

    Returns:
        The handles of the optimizer's hooks.

    Raises:
        MoEError: the model has no fused experts; at a step, a state that is not by expert.
    """
    blocks = [block for block in find_moe_blocks(model).values() if not isinstance(block.experts, nn.ModuleList)]
    tensors = []
    for parameters in (list(block.experts.parameters()) for block in blocks):
        counts = {len(parameter) for parameter in parameters if parameter.dim() == 3}
        tensors += [p for p in parameters if p.requires_grad and p.dim() > 1 and len(p) in counts]
    if not tensors:
        raise MoEError("No fused experts train, so that none can be left alone when idle.")
    undo: list[Callable[[], None]] = []

    @torch.no_grad()
    def before(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        undo.clear()
        for parameter in tensors:
            if parameter.grad is None:
                continue
            idle = (local_part(parameter.grad).flatten(1) == 0).all(1).nonzero()[:, 0]
            if len(idle):
                held = [parameter, *_state_tensors(optimizer, parameter)]
                undo.extend(_restorer(local_part(tensor), idle) for tensor in held)

    @torch.no_grad()
    def after(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for restore in undo:
            restore()
        undo.clear()

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def _state_tensors(optimizer: Optimizer, parameter: nn.Parameter) -> list[torch.Tensor]:
    """The optimizer's tensors about each expert of `parameter`, (E, ...)."""
    found = [v for v in optimizer.state.get(parameter, {}).values() if isinstance(v, torch.Tensor) and v.dim() > 0]
    for tensor in found:
        if len(tensor) != len(parameter):
            raise MoEError(
                f"{type(optimizer).__name__} keeps a state of shape {tuple(tensor.shape)} for experts of shape "
                f"{tuple(parameter.shape)}, which no expert can be told apart in. Train without skip_idle_experts."
            )
    return found


def _restorer(tensor: torch.Tensor, rows: torch.Tensor) -> Callable[[], None]:
    kept = tensor[rows].clone()

    def restore() -> None:
        tensor[rows] = kept

    return restore
