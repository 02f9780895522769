"""How a module of a model comes to run another computation of its experts: through transformers' experts interface."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


IMPLEMENTATION = "moe_hf"
ExpertsFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def run_in_place_of(experts: nn.Module, function: ExpertsFunction) -> None:
    """Make `experts` run `function(experts, hidden_states, top_k_index, top_k_weights)` as its forward.

    The module gets a copy of its config that asks for the implementation `moe_hf`, so that it also holds inside expert
    parallelism, which has taken hold of the module's forward already, and whatever `set_experts_implementation` says.
    `function` must be importable by name if the model is to be pickled. A function that runs already comes back with
    `restore`.
    """
    if is_replaced(experts):
        experts._functions_below = (*experts.__dict__.get("_functions_below", ()), experts._experts_function)
    else:
        experts._shared_config = experts.config
        own = copy.copy(experts.config)
        own._experts_implementation_internal = IMPLEMENTATION
        experts.config = own
    experts._experts_function = function


def restore(experts: nn.Module) -> None:
    """Give `experts` back the forward that it had before `run_in_place_of`."""
    below = experts.__dict__.pop("_functions_below", ())
    if below:
        experts._experts_function = below[-1]
        if below[:-1]:
            experts._functions_below = below[:-1]
        return
    experts.config = experts.__dict__.pop("_shared_config")
    del experts._experts_function


def is_replaced(experts: nn.Module) -> bool:
    """Whether `experts` runs something in place of its own forward."""
    return "_shared_config" in experts.__dict__


def _run(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    return experts._experts_function(experts, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _run)
