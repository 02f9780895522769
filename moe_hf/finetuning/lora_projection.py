"""The low-rank term of one linear map of the experts, on the rows of the experts that have an adapter.

Letters: R rows, E experts, C experts with an adapter, r rank, I inputs, O outputs of a map, L low-rank columns of a row.
"""

from typing import Any

import torch

from moe_hf.kernels import ExpertRows, Projection, Tensors, rows_outer_experts, rows_times_experts


# Up to so many columns of all adapters together, a CPU multiplies them faster in one product than expert by expert.
_MOST_COLUMNS = 128


def adapter_dtype(weight: torch.Tensor, columns: int) -> torch.dtype:
    """In which dtype adapters of experts with this weight are multiplied.

    Args:
        columns (`int`): of all adapters together, C * r.
    """
    if weight.device.type != "cpu" or (weight.element_size() == 2 and columns <= _MOST_COLUMNS):
        return weight.dtype
    return torch.promote_types(weight.dtype, torch.float32)


class _ByExpert:
    """Adapters of each expert on its rows alone: L = r."""

    def __init__(self, part: ExpertRows, scales: tuple[float, ...]) -> None:
        self.part, self.scales = part, scales

    def reduce(self, x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """(R, I) and (C, r, I) -> (R, L), times the scale."""
        low = rows_times_experts(x, matrices, self.part)
        if len(set(self.scales)) <= 1:
            return low.mul_(self.scales[0]) if self.scales else low
        for adapter, start, end in self.part.slices():
            low[start:end] *= self.scales[adapter]
        return low

    def expand(self, low: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor) -> None:
        """Add the products of (R, L) and (C, r, O) to `out`, (R, O)."""
        rows_times_experts(low, matrices.transpose(1, 2), self.part, out=out, accumulate=True)

    def outer(self, low: torch.Tensor, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Sum low_r x_r^T over each adapter's rows: (R, L) and (R, I) -> (C, r, I), as `like`."""
        return rows_outer_experts(low, x, self.part, like)


class _SideBySide(_ByExpert):
    """All adapters on all rows, with 0 in the columns of other experts: L = C * r.

    This is C times the arithmetic, in one product of a fixed size instead of C small ones: on a CPU in 16 bits the faster
    way while C * r is small, as each new number of rows costs the making of a kernel there.
    """

    def reduce(self, x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        low = x @ matrices.flatten(0, 1).t()
        counts = torch.tensor((0, *self.part.bounds)).diff()
        own = torch.diag(torch.tensor(self.scales, dtype=x.dtype)).repeat_interleave(counts, 0, output_size=len(x))
        low.view(len(x), *matrices.shape[:2]).mul_(own[:, :, None])
        return low

    def expand(self, low: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor) -> None:
        out.addmm_(low, matrices.flatten(0, 1))

    def outer(self, low: torch.Tensor, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return (low.t() @ x).view(like.shape)


class LoraProjection(Projection):
    """y = W x + scale * B A dropout(x), with C adapters for the `last` experts of the rows, in that order.

    Tensors: W (E, O, I), A (C, r, I), B (C, r, O), the last two in W's dtype or a wider one. The product B A is never made: a
    row costs r * (I + O) multiplications, or C times as many where that is faster.

    Args:
        scales: of each adapter, (C).
        dropout (`float`): share of the inputs that is dropped.
    """

    def __init__(self, scales: tuple[float, ...], dropout: float = 0.0) -> None:
        self.scales, self.dropout = scales, dropout

    def forward(self, tensors: Tensors, x: torch.Tensor, rows: ExpertRows) -> tuple[torch.Tensor, Tensors]:
        base, down, up, *_ = tensors
        output = rows_times_experts(x, base, rows)
        own, part = x[rows.last_start :], rows.last_part()
        mask = ()
        if self.dropout:
            mask = (torch.empty_like(own, dtype=torch.bool).bernoulli_(1 - self.dropout),)
        adapters = self._adapters(x, down, part)
        low = adapters.reduce(self._dropped(own, mask), down)
        adapters.expand(low, up, output[rows.last_start :])
        return output, (low, *mask)

    def first_trained_row(self, needs: tuple[bool, ...], rows: ExpertRows) -> int | None:
        if needs[0]:
            return 0
        return rows.last_start if any(needs) else None

    def input_gradient(
        self, tensors: Tensors, kept: Tensors, grad: torch.Tensor, rows: ExpertRows, needed: bool
    ) -> tuple[torch.Tensor | None, Any]:
        base, down, up, *_ = tensors
        start, part, mask = rows.last_start, rows.last_part(), kept[1:]
        adapters = self._adapters(grad, up, part)
        grad_low = adapters.reduce(grad[start:], up)
        if not needed:
            return None, grad_low
        grad_x = rows_times_experts(grad, base.transpose(1, 2), rows)
        if self.dropout:
            through_adapters = torch.zeros_like(grad_x[start:])
            adapters.expand(grad_low, down, through_adapters)
            grad_x[start:] += self._dropped(through_adapters, mask)
        else:
            adapters.expand(grad_low, down, grad_x[start:])
        return grad_x, grad_low

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
        base, down, up, *_ = tensors
        part, low, mask = rows.last_part(), kept[0], kept[1:]
        grad_base = rows_outer_experts(grad, x, rows, base) if needs[0] else None
        own, adapters = x[len(x) - len(low) :], self._adapters(x, down, part)
        grad_down = adapters.outer(again, self._dropped(own, mask), down) if needs[1] else None
        grad_up = adapters.outer(low, grad[rows.last_start :], up) if needs[2] else None
        return grad_base, grad_down, grad_up

    def _adapters(self, x: torch.Tensor, matrices: torch.Tensor, part: ExpertRows) -> _ByExpert:
        """The way of computing for rows like `x`, the same in both passes."""
        is_one_product = x.device.type == "cpu" and x.element_size() == 2 and matrices.dtype == x.dtype
        return (_SideBySide if is_one_product else _ByExpert)(part, self.scales)

    def _dropped(self, values: torch.Tensor, mask: Tensors) -> torch.Tensor:
        return values * mask[0] / (1 - self.dropout) if mask else values


class DoraProjection(LoraProjection):
    """y = magnitude / norm * (W x + scale * B A dropout(x)), norm = |W + scale * B A| of each output, a constant.

    Tensors: those of `LoraProjection`, magnitude (C, O), and |W|^2 (C, O). The norm is found from |W|^2, W A^T (C, O, r) and
    A A^T (C, r, r), without the product B A.
    """

    def __init__(self, scales: tuple[float, ...], dropout: float, ids: tuple[int, ...]) -> None:
        super().__init__(scales, dropout)
        self.ids = ids

    def forward(self, tensors: Tensors, x: torch.Tensor, rows: ExpertRows) -> tuple[torch.Tensor, Tensors]:
        magnitude, part = tensors[3], rows.last_part()
        output, kept = super().forward(tensors, x, rows)
        norm = self._norms(tensors, part)
        own = output[rows.last_start :]
        plain = own.clone()
        factor = (magnitude / norm).to(output.dtype)
        for adapter, start, end in part.slices():
            own[start:end] *= factor[adapter]
        return output, (*kept, plain, norm)

    def input_gradient(
        self, tensors: Tensors, kept: Tensors, grad: torch.Tensor, rows: ExpertRows, needed: bool
    ) -> tuple[torch.Tensor | None, Any]:
        factor = (tensors[3] / kept[-1]).to(grad.dtype)
        plain_grad = grad.clone()
        own = plain_grad[rows.last_start :]
        for adapter, start, end in rows.last_part().slices():
            own[start:end] *= factor[adapter]
        grad_x, grad_low = super().input_gradient(tensors, kept[:-2], plain_grad, rows, needed)
        return grad_x, (plain_grad, grad_low)

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
        (plain_grad, grad_low), (*kept, plain, norm) = again, kept
        grads = super().tensor_gradients(tensors, tuple(kept), grad_low, x, plain_grad, rows, needs)
        grad_magnitude = None
        if needs[3]:
            grad_magnitude = torch.zeros_like(tensors[3])
            own = grad[rows.last_start :]
            for adapter, start, end in rows.last_part().slices():
                grad_magnitude[adapter] = (own[start:end] * plain[start:end]).sum(0) / norm[adapter]
        return *grads, grad_magnitude, None

    def _norms(self, tensors: Tensors, part: ExpertRows) -> torch.Tensor:
        """(C, O): the norm of each row of W + scale * B A, of the experts that have rows; 1 for the others."""
        base, down, up, magnitude, base_squared = tensors
        norms = torch.ones_like(magnitude)
        for adapter, _, _ in part.slices():
            a, b, scale = down[adapter].to(magnitude.dtype), up[adapter].to(magnitude.dtype).t(), self.scales[adapter]
            weight = base[self.ids[adapter]]
            with_base = (weight @ a.t().to(weight.dtype)).to(magnitude.dtype)
            squared = base_squared[adapter] + scale * (2 * with_base + scale * (b @ (a @ a.t()))).mul_(b).sum(1)
            norms[adapter] = squared.clamp_min_(torch.finfo(squared.dtype).tiny).sqrt_()
        return norms
