"""The activation between the two maps, times the routing weight, in pieces that stay in a cache.

Whole-tensor operations on (R, 2F) are bound by memory; and the backward pass computes the activation again from its
inputs instead of keeping it. Letters: R rows, F expert width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import _default_apply_gate

from moe_hf.kernels.description import ExpertsDescription


# Elements of the first map's output in one piece: a share of a CPU core's cache; on a device, few launches.
PIECE_CPU, PIECE_DEVICE = 2**17, 2**25


def weighted_activation(
    description: ExpertsDescription, hidden: torch.Tensor, row_weights: torch.Tensor
) -> torch.Tensor:
    """act(hidden) * weight: (R, 2F or F) and (R,) -> (R, F), in hidden's dtype."""
    output = hidden.new_empty(hidden.shape[0], _width(description, hidden))
    for piece in _pieces(hidden):
        torch.mul(description.activation(_wide(hidden[piece])), row_weights[piece, None], out=output[piece])
    return output


def weighted_activation_backward(
    description: ExpertsDescription,
    hidden: torch.Tensor,  # (R, 2F or F)
    row_weights: torch.Tensor,  # (R,)
    grad: torch.Tensor,  # (R, F), of the weighted activation
    start: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the gradients of `hidden`, (R, 2F or F), and of the routing weights, (R,); and, unless `start` is None, the
    weighted activation itself of the rows from `start` on, (R - start, F).
    """
    grad_hidden = torch.empty_like(hidden)
    grad_weights = torch.empty_like(row_weights)
    num_kept = 0 if start is None else hidden.shape[0] - start
    kept = None if start is None else hidden.new_empty(num_kept, _width(description, hidden))
    backward = _silu_gate_backward if _is_silu_gate(description.activation) else _any_backward
    for piece in _pieces(hidden):
        incoming, weights = _wide(grad[piece]), row_weights[piece, None]
        activated = backward(description.activation, _wide(hidden[piece]), incoming, weights, grad_hidden[piece])
        torch.sum(incoming * activated, dim=1, out=grad_weights[piece])
        if num_kept and piece.stop > start:
            skip = max(0, start - piece.start)
            where = slice(piece.start + skip - start, piece.stop - start)
            torch.mul(activated[skip:], weights[skip:], out=kept[where])
    return grad_hidden, grad_weights, kept


def _width(description: ExpertsDescription, hidden: torch.Tensor) -> int:
    return hidden.shape[1] // 2 if description.gated else hidden.shape[1]


def _pieces(hidden: torch.Tensor) -> Iterator[slice]:
    budget = PIECE_CPU if hidden.device.type == "cpu" else PIECE_DEVICE
    size = max(1, budget // hidden.shape[1])
    for begin in range(0, hidden.shape[0], size):
        yield slice(begin, min(begin + size, hidden.shape[0]))


def _wide(piece: torch.Tensor) -> torch.Tensor:
    """At least float32: a piece is small, and each operation in 16 bits would round."""
    return piece.float() if piece.element_size() < 4 else piece


def _is_silu_gate(activation: Callable) -> bool:
    if getattr(activation, "__func__", None) is not _default_apply_gate:
        return False
    act_fn = activation.__self__.act_fn
    return act_fn is F.silu or isinstance(act_fn, nn.SiLU) or type(act_fn).__name__ == "SiLUActivation"


def _silu_gate_backward(
    activation: Callable, hidden: torch.Tensor, grad: torch.Tensor, weights: torch.Tensor, grad_hidden: torch.Tensor
) -> torch.Tensor:
    """Write the gradient of silu(gate) * up, times the weight, into `grad_hidden`; return silu(gate) * up."""
    gate, up = hidden.chunk(2, dim=1)
    grad_gate, grad_up = grad_hidden.chunk(2, dim=1)
    activated, weighted = F.silu(gate), grad * weights
    torch.mul(weighted, activated, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(weighted.mul_(up), gate))
    return activated.mul_(up)


def _any_backward(
    activation: Callable, hidden: torch.Tensor, grad: torch.Tensor, weights: torch.Tensor, grad_hidden: torch.Tensor
) -> torch.Tensor:
    with torch.enable_grad():
        inputs = hidden.detach().requires_grad_()
        activated = activation(inputs)
    grad_hidden.copy_(torch.autograd.grad(activated, inputs, (grad * weights).to(activated.dtype))[0])
    return activated.detach()
