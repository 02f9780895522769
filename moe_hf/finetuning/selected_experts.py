"""Chosen experts get parameters of their own, and the stacked tensors of all experts are frozen.

Memory, gradients and optimizer state grow with the chosen experts only, and no optimizer ever sees a frozen row. From the
outside the model stays what it was: its state dict has the stacked tensors under their own names, with the trained rows in
their places, and loads them.

Letters: D model width, F expert width, E experts, N chosen experts of a layer, T tokens, K experts per token.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_selection import ExpertSelection
from moe_hf.finetuning.moe_blocks import find_moe_blocks
from moe_hf.kernels import (
    ChosenProjection,
    ExpertsDescription,
    LinearMap,
    base_map,
    describe_experts,
    grouped_experts,
    refuse_stored,
    restore,
    run_in_place_of,
)
from moe_hf.unwrapping import unwrapped


logger = logging.get_logger(__name__)

CHILD = "selected"


class SelectedWeights(nn.Module):
    """Copies of the rows of N experts, under the names of the tensors that they are from: the parameters that train.

    They are no entries of a state dict: the experts module above puts them into its stacked tensors, and reads them there.
    """

    def __init__(self, experts: nn.Module, ids: tuple[int, ...], dtype: torch.dtype | None) -> None:
        super().__init__()
        self.ids = ids
        for name, tensor in stacked_parameters(experts).items():
            rows = tensor.detach()[list(ids)].to(dtype or tensor.dtype)
            self.register_parameter(name, nn.Parameter(rows))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass

    def extra_repr(self) -> str:
        return f"experts={list(self.ids)}"


class SelectedExpertsMixin:
    """What an experts module saves and loads while some of its experts have parameters of their own.

    `selected_experts_class` puts it before the module's own class.
    """

    plain_class: type[nn.Module]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        write_back(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        weights = self.get_submodule(CHILD)
        for name, parameter in weights.named_parameters():
            given = state_dict.get(prefix + name)
            if given is None or given.shape != getattr(self, name).shape:
                continue  # torch reports it for the stacked tensor
            if torch.promote_types(given.dtype, parameter.dtype) != given.dtype:
                logger.warning_once(
                    f"Selected experts are {parameter.dtype} and were loaded from {given.dtype}: their last digits are "
                    "lost. The checkpoints of MoETrainer and save_expert_deltas keep them."
                )
            parameter.data.copy_(given[list(weights.ids)])

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _rebuild, (self.plain_class,), self.__dict__


@cache
def selected_experts_class(plain_class: type[nn.Module]) -> type[nn.Module]:
    """The class of an experts module of `plain_class` some of whose experts train."""
    return type(f"Selected{plain_class.__name__}", (SelectedExpertsMixin, plain_class), {"plain_class": plain_class})


def _rebuild(plain_class: type[nn.Module]) -> nn.Module:
    cls = selected_experts_class(plain_class)
    return cls.__new__(cls)


def stacked_parameters(experts: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of an experts module that have a row for each expert, (E, ...), by name."""
    parameters = dict(experts.named_parameters(recurse=False))
    return {name: p for name, p in parameters.items() if p.ndim >= 2 and p.shape[0] == experts.num_experts}


def selected_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of which some experts train, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SelectedExpertsMixin)}


def split_selected_experts(
    model: nn.Module, selection: ExpertSelection, dtype: torch.dtype | None = torch.float32
) -> tuple[str, ...]:
    """Give the chosen experts of `model` parameters of their own, and freeze all others; in place.

    Args:
        selection (`ExpertSelection`): which; the choice may differ from layer to layer.
        dtype (`torch.dtype`, *optional*): of the new parameters, that of the model if None.

    Returns:
        names of the new parameters.

    Raises:
        MoEError: the selection does not fit the model, or its experts are of a kind whose rows cannot be told apart
            (separate modules, merged or sharded experts); the model is then unchanged.
    """
    chosen = selection.resolve(model)
    blocks = find_moe_blocks(model)
    for name in chosen:
        _check(name, blocks[name].experts)
    merge_selected_experts(model)
    for name, ids in chosen.items():
        experts = blocks[name].experts
        for parameter in experts.parameters():
            parameter.requires_grad_(False)
        experts.add_module(CHILD, SelectedWeights(experts, ids, dtype))
        experts.__class__ = selected_experts_class(type(experts))
        run_in_place_of(experts, selected_experts_forward)
    return selected_parameter_names(model)


def _check(name: str, experts: nn.Module) -> None:
    description = describe_experts(experts)
    stacked = stacked_parameters(experts)
    if not hasattr(type(experts).forward, "__wrapped__"):
        raise MoEError(f"The experts of {name} ({type(experts).__name__}) mix the weights of all: none can be chosen.")
    refuse_stored(name, experts)
    if "_experts_function" in vars(experts) and not isinstance(experts, SelectedExpertsMixin):
        raise MoEError(f"The experts of {name} have adapters. Merge or remove these before experts are chosen.")
    if any(isinstance(parameter, DTensor) for parameter in experts.parameters()):
        raise MoEError(f"The experts of {name} are sharded. Choose experts before the model is distributed.")
    left = [parameter for parameter, _ in experts.named_parameters() if parameter not in stacked]
    if description.first not in stacked or description.second not in stacked:
        raise MoEError(f"The experts of {name} ({type(experts).__name__}) are not stacked, one row for each.")
    if left and not isinstance(experts, SelectedExpertsMixin):
        # Parts that all experts share (an activation's parameters, a norm) stay frozen with the rest.
        logger.warning_once(f"{', '.join(left)} of {name} belong to all experts and stay frozen.")


# Sizes of groups depend on the data: one break of a compiled graph per layer, instead of one at each of them.
@torch.compiler.disable
def selected_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """(T, D), (T, K), (T, K) -> (T, D): what the plain module computes with the trained rows in their places.

    It is computed in the dtype of the stacked tensors; weight gradients are computed for the chosen experts alone.
    """
    weights, description = experts.get_submodule(CHILD), describe_experts(experts)
    first, second = (_chosen_map(experts, weights, description, n) for n in (description.first, description.second))
    return grouped_experts(
        experts, hidden_states, top_k_index, top_k_weights, first=first, second=second, last=weights.ids
    )


def _chosen_map(experts: nn.Module, weights: SelectedWeights, description: ExpertsDescription, name: str) -> LinearMap:
    base, chosen = base_map(experts, description, name), getattr(weights, name)
    chosen = chosen.to(base.tensors[0].dtype)
    chosen = chosen.transpose(1, 2) if description.transposed else chosen
    bias = base.bias
    if bias is not None:
        ids = torch.tensor(weights.ids, device=bias.device)
        bias = bias.index_copy(0, ids, getattr(weights, f"{name}_bias").to(bias.dtype))
    return LinearMap(ChosenProjection(), (base.tensors[0], chosen), bias)


def selected_parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that chosen experts have of their own, in the model's order."""
    prefixes = tuple(f"{name}.{CHILD}." for name in selected_modules(model))
    return tuple(name for name, _ in model.named_parameters() if prefixes and name.startswith(prefixes))


def merge_selected_experts(model: nn.Module) -> None:
    """Put the trained rows into the stacked tensors, and make `model` a plain one again; in place.

    Values are rounded to the dtype of the stacked tensors. A model without chosen experts is left as it is.
    """
    for experts in selected_modules(unwrapped(model, changes_parameters=True)).values():
        write_back(experts)
        restore(experts)
        delattr(experts, CHILD)
        experts.__class__ = experts.plain_class


@torch.no_grad()
def write_back(experts: nn.Module) -> None:
    """Copy the trained rows of an experts module into its stacked tensors, whose own rows nothing else reads."""
    weights = experts.get_submodule(CHILD)
    for name, parameter in weights.named_parameters():
        stacked = getattr(experts, name)
        ids = torch.tensor(weights.ids, device=stacked.device)
        # `.data`: a save between forward and backward must not look like a change of what the graph holds.
        stacked.data.index_copy_(0, ids, parameter.data.to(stacked.dtype))
