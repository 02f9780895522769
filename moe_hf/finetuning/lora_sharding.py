"""Adapters of experts that are spread over processes: each holds those of its own experts."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def slots_of(
    experts: nn.Module, weight: torch.Tensor, ids: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return the experts of `ids` that are here, their places in the module's tensors, and how many places to keep."""
    return ids, ids, len(ids)


def to_layout_of(parameter: nn.Parameter, weight: torch.Tensor, experts: nn.Module) -> nn.Parameter:
    """Return `parameter` as the part of this process of a tensor that is spread as `weight` is."""
    return parameter
