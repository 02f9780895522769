"""Experts that are not there as one tensor: each expert's matrix is made, or fetched, when a pass needs it.

A `StoredExperts` stands where a module has its weights (E, O, I), with their shape, dtype and device, and whatever runs over a
frozen base expert by expert (adapters among it) runs over it. Letters: E experts, O outputs, I inputs of a map.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import nn

from moe_hf.errors import MoEError


# What DistributedDataParallel looks for on the model that it wraps. It would send the numbers of all else to each process.
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


class MatrixSource(ABC):
    """Where the matrices of one map are: `shape` is (E, O, I); matrices come in `dtype`, on `device`, without autograd."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def matrix(self, expert: int) -> torch.Tensor:
        """(O, I) of one expert; it is valid until the next call."""

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> "MatrixSource":
        """The same matrices on another device, or in another dtype."""

    @abstractmethod
    def nbytes(self) -> dict[str, int]:
        """Bytes that are held, by the kind of memory (`cpu`, `cuda`)."""

    def at_hand(self) -> Collection[int]:
        """Experts that should be asked for first, since they are there already and others may push them out."""
        return ()


class StoredExperts(torch.Tensor):
    """A frozen weight (E, O, I), or (E, I, O) when `swapped`, of which one expert at a time can be looked at.

    `weight[e]` with an integer is a plain tensor; every other operation on the numbers is a `MoEError`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, source: MatrixSource, swapped: bool = False) -> "StoredExperts":
        experts, outputs, inputs = source.shape
        shape = (experts, inputs, outputs) if swapped else source.shape
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=source.dtype, device=source.device)

    def __init__(self, source: MatrixSource, swapped: bool = False) -> None:
        self.source, self.swapped = source, swapped

    def requires_grad_(self, requires_grad: bool = True) -> "StoredExperts":
        if requires_grad:
            raise MoEError(
                "Quantized or offloaded experts stay frozen. Train adapters beside them (add_expert_lora), or bring the "
                "weights back first (restore_experts)."
            )
        return self

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise MoEError("Quantized or offloaded experts are saved with save_low_memory, not pickled.")

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        return nn.Parameter(StoredExperts(copy.deepcopy(self.source, memo), self.swapped), requires_grad=False)

    # Modules exchange parameters that have this when they are moved, instead of copying the data into the old ones.
    def __tensor_flatten__(self) -> NoReturn:
        raise MoEError("Quantized or offloaded experts are neither compiled nor sharded.")

    @staticmethod
    def __tensor_unflatten__(*args: Any) -> NoReturn:
        raise MoEError("Quantized or offloaded experts are neither compiled nor sharded.")

    def __repr__(self, **kwargs: Any) -> str:
        return f"StoredExperts({tuple(self.shape)}, {self.dtype}, {type(self.source).__name__})"

    # Whoever writes files asks for the memory.
    def untyped_storage(self) -> NoReturn:
        raise MoEError(
            "Quantized or offloaded experts are saved with save_low_memory, and loaded with load_low_memory; "
            "restore_experts(model) makes a plain model of it, for save_pretrained."
        )

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        own = args[0] if args and isinstance(args[0], StoredExperts) else None
        if own is not None:
            if function is aten.select.int and args[1] == 0:
                matrix = own.source.matrix(range(len(own))[args[2]])
                return matrix.t() if own.swapped else matrix
            if function is aten.transpose.int and {d % 3 for d in args[1:3]} == {1, 2}:
                return StoredExperts(own.source, not own.swapped)
            if function in (aten.detach.default, aten.clone.default, aten.alias.default):
                return StoredExperts(own.source, own.swapped)
            if function is aten._to_copy.default:
                device, dtype = kwargs.get("device") or own.device, kwargs.get("dtype") or own.dtype
                return StoredExperts(own.source.to(torch.device(device), dtype), own.swapped)
            if function is aten.new_empty.default:
                return torch.empty(args[1], **{"dtype": own.dtype, "device": own.device} | kwargs)
        raise MoEError(
            f"{function} cannot run on quantized or offloaded experts, whose matrices are there one at a time: "
            "restore_experts(model) brings the weights back."
        )


def stored_maps(experts: nn.Module) -> dict[str, StoredExperts]:
    """The weights of an experts module that are stored, by name."""
    return {name: p for name, p in experts.named_parameters(recurse=False) if isinstance(p, StoredExperts)}


def has_stored(model: nn.Module) -> bool:
    """Whether experts of `model` are quantized or offloaded."""
    return bool(stored_names(model))


def stored_names(model: nn.Module) -> set[str]:
    """Names of the parameters of `model` that are quantized or offloaded experts."""
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, StoredExperts)}


def leave_to_each_process(model: nn.Module, restored: Collection[str] = ()) -> None:
    """Let DDP leave stored experts alone: each process has them from the same checkpoint.

    Args:
        restored (`Collection[str]`): parameters that were stored, and are DDP's again.
    """
    ignored = {*getattr(model, _IGNORED_BY_DDP, ())} - {*restored} | stored_names(model)
    setattr(model, _IGNORED_BY_DDP, sorted(ignored))


def refuse_stored(name: str, experts: nn.Module) -> None:
    """Refuse experts whose numbers cannot be written to.

    Raises:
        MoEError: the experts of the block `name` are quantized or offloaded.
    """
    if stored_maps(experts):
        raise MoEError(
            f"The experts of {name} are quantized or offloaded, and cannot be changed in place: restore_experts(model) "
            "first."
        )
