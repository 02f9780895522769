"""Where tensors are read from: the files of a folder, or a model in memory, with one way to ask for a few rows.

Letters: E experts.
"""

from typing import Protocol

import torch
from torch import nn

from moe_hf.kernels import StoredExperts
from moe_hf.weight_files import TensorSpec


class Tensors(Protocol):
    """Named tensors of which a few rows can be read."""

    tensors: dict[str, TensorSpec]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of the first dimension of a tensor, or all, on the CPU."""


class ModelTensors:
    """The state of a model in memory as a [`Tensors`]; what has no numbers (on the meta device) is left out.

    Experts that are quantized or offloaded are decoded or fetched one at a time.

    Args:
        model (`nn.Module`): the model, without wrappers.
    """

    def __init__(self, model: nn.Module):
        state = model.state_dict(keep_vars=True)
        self._state = {n: t.detach() for n, t in state.items() if isinstance(t, StoredExperts) or not t.is_meta}
        self.tensors = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._state.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of the first dimension of a tensor, or all, on the CPU."""
        tensor = self._state[name]
        if isinstance(tensor, StoredExperts):
            stop = len(tensor) if stop is None else stop
            return torch.stack([tensor[expert].cpu() for expert in range(start, stop)])
        return (tensor[start:stop] if tensor.ndim else tensor).cpu()
