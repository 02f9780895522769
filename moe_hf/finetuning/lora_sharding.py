"""Adapters of experts that are spread over processes: each process holds those of its own experts.

Under expert parallelism adapters are added after the model was distributed, as tensors sharded over the expert-parallel
processes alone. The rows of an expert come from every process of that group, so the gradient is divided by the number of
batches, as transformers does for the experts' own weights, and summed over the copies of an expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard

from moe_hf.errors import MoEError


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of `tensor`; a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the parameters of `model`."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@dataclass(frozen=True)
class ExpertPlacement:
    """Where the experts of one module are.

    `mesh` is that of the expert-parallel processes, None where each process has all experts; `groups` are those over which
    gradients are summed, and `batches` what they are divided by.
    """

    mesh: Any = None
    groups: tuple[Any, ...] = ()
    batches: int = 1

    @property
    def num_parts(self) -> int:
        """Over how many processes the experts are spread."""
        return 1 if self.mesh is None else self.mesh.size()

    def split(self, ids: tuple[int, ...], num_experts: int) -> list[tuple[int, ...]]:
        """`ids` by the process that has them, of E experts in all."""
        size = num_experts // self.num_parts
        return [tuple(i for i in ids if i // size == part) for part in range(self.num_parts)]

    def part(self) -> int:
        """Which part this process has."""
        return 0 if self.mesh is None else self.mesh.get_local_rank()

    def parameter(self, values: torch.Tensor) -> nn.Parameter:
        """Make a parameter of this process's `values`, whose gradient is that of all batches together."""
        if self.mesh is not None:
            values = DTensor.from_local(values, self.mesh, [Shard(0)], run_check=False)
        parameter = nn.Parameter(values)
        if self.groups or self.batches > 1:
            parameter.register_hook(self._reduce)
        return parameter

    def _reduce(self, grad: torch.Tensor) -> torch.Tensor:
        values = local(grad) / self.batches
        for group in self.groups:
            distributed.all_reduce(values, group=group)
        return values if self.mesh is None else DTensor.from_local(values, self.mesh, [Shard(0)], run_check=False)


def placement_of(name: str, weight: torch.Tensor, batches: int) -> ExpertPlacement:
    """Where the experts of the block `name` are, from one of their weights (E, ...).

    Args:
        batches (`int`): how many processes, or groups of them, see a batch of their own.

    Raises:
        MoEError: each expert is cut in pieces, as by tensor parallelism.
    """
    if not isinstance(weight, DTensor):
        return ExpertPlacement()
    mesh = weight.device_mesh
    axes = mesh.mesh_dim_names or ()
    if any(getattr(placement, "dim", 0) != 0 for placement in weight.placements) or not axes:
        raise MoEError(
            f"The experts of {name} are cut in pieces by tensor parallelism, which adapters do not follow. Use expert "
            "parallelism (ep_size) or FSDP."
        )
    others = tuple(mesh.get_group(axis) for axis in axes if axis != "ep" and mesh[axis].size() > 1)
    return ExpertPlacement(mesh["ep"] if "ep" in axes else None, others, batches)
