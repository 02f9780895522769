"""How one linear map of the experts is computed and differentiated: the part that a kind of fine-tuning replaces.

Letters: R rows, E experts, C experts with parameters of their own, I inputs, O outputs of a map.
"""

from typing import Any

import torch

from moe_hf.kernels.matmul import rows_outer_experts, rows_times_experts
from moe_hf.kernels.rows import ExpertRows


Tensors = tuple[torch.Tensor, ...]


class Projection:
    """A map (R, I) -> (R, O) that depends on each row's expert; this one has the weight (E, O, I), frozen or trained.

    Tensors are handed to the methods, which run without autograd: an object holds no tensor. Biases are not its affair.
    """

    def forward(self, tensors: Tensors, x: torch.Tensor, rows: ExpertRows) -> tuple[torch.Tensor, Tensors]:
        """Return the outputs, and what is kept for the backward pass beside `tensors`."""
        return rows_times_experts(x, tensors[0], rows), ()

    def first_trained_row(self, needs: tuple[bool, ...], rows: ExpertRows) -> int | None:
        """From which row on `tensor_gradients` needs the inputs; None when no tensor trains."""
        return 0 if any(needs) else None

    def input_gradient(
        self, tensors: Tensors, kept: Tensors, grad: torch.Tensor, rows: ExpertRows, needed: bool
    ) -> tuple[torch.Tensor | None, Any]:
        """Return the gradient of the inputs (None unless `needed`), and what `tensor_gradients` can use again."""
        return (rows_times_experts(grad, tensors[0].transpose(1, 2), rows) if needed else None), None

    def tensor_gradients(
        self,
        tensors: Tensors,
        kept: Tensors,
        again: Any,
        x: torch.Tensor,  # the inputs from `first_trained_row` on
        grad: torch.Tensor,  # (R, O)
        rows: ExpertRows,
        needs: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """Return one gradient per tensor, None where it does not train."""
        return (rows_outer_experts(grad, x, rows, tensors[0]) if needs[0] else None,)


class ChosenProjection(Projection):
    """Tensors: the frozen weight (E, O, I), and (C, O, I) of the chosen experts, which takes the place of theirs.

    The chosen experts are the `last` of the rows, in that order.
    """

    def forward(self, tensors: Tensors, x: torch.Tensor, rows: ExpertRows) -> tuple[torch.Tensor, Tensors]:
        return self._multiply(tensors[0], tensors[1], x, rows), ()

    def first_trained_row(self, needs: tuple[bool, ...], rows: ExpertRows) -> int | None:
        return rows.last_start if needs[1] else None

    def input_gradient(
        self, tensors: Tensors, kept: Tensors, grad: torch.Tensor, rows: ExpertRows, needed: bool
    ) -> tuple[torch.Tensor | None, Any]:
        if not needed:
            return None, None
        return self._multiply(tensors[0].transpose(1, 2), tensors[1].transpose(1, 2), grad, rows), None

    def tensor_gradients(
        self,
        tensors: Tensors,
        kept: Tensors,
        again: Any,
        x: torch.Tensor,
        grad: torch.Tensor,
        rows: ExpertRows,
        needs: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        if not needs[1]:
            return None, None
        return None, rows_outer_experts(grad[rows.last_start :], x, rows.last_part(), tensors[1])

    @staticmethod
    def _multiply(base: torch.Tensor, chosen: torch.Tensor, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        start = rows.last_start
        output = x.new_empty(x.shape[0], base.shape[1])
        parts = ((base, rows.first_part(), slice(None, start)), (chosen, rows.last_part(), slice(start, None)))
        for weight, part, where in parts:
            if part.order.numel():
                rows_times_experts(x[where], weight, part, out=output[where])
        return output
