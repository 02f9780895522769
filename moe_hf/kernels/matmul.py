"""Matrix products whose right-hand side depends on the row's expert.

torch's `grouped_mm` where it takes the tensors: one kernel on CUDA, a loop in C++ on a CPU. Elsewhere, in float64 among
others, one product per expert that has rows. Letters: R rows, E experts, I inputs, O outputs of a map.
"""

import torch
from torch.nn import functional as F

from moe_hf.kernels.rows import ExpertRows


GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rows_times_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: ExpertRows,
    *,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """Multiply each row by its expert's matrix: (R, I) and (E, O, I) of one dtype -> (R, O).

    Args:
        out (`torch.Tensor`, *optional*): `(R, O)`, where the products go, and which is returned.
        accumulate (`bool`): add to `out` instead of overwriting it.
    """
    # Into a part of a larger tensor, products in float32 go directly; a CPU's in 16 bits are faster made apart.
    in_place = out is not None and x.device.type == "cpu" and x.element_size() >= 4
    if _has_grouped_kernel(x, weight) and not in_place:
        product = F.grouped_mm(x, weight.transpose(1, 2), offs=_ends_of_all(rows, weight.shape[0]))
        if out is None:
            return product
        return out.add_(product) if accumulate else out.copy_(product)
    output = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
    for expert, start, end in rows.slices():
        if accumulate:
            output[start:end].addmm_(x[start:end], weight[expert].t())
        else:
            torch.mm(x[start:end], weight[expert].t(), out=output[start:end])
    return output


def rows_outer_experts(grad: torch.Tensor, x: torch.Tensor, rows: ExpertRows, like: torch.Tensor) -> torch.Tensor:
    """Sum grad_r x_r^T over each expert's rows: (R, O) and (R, I) -> (E, O, I), laid out as `like`, 0 without rows."""
    if _has_grouped_kernel(x, like) and _aligned(grad):
        return F.grouped_mm(grad.t(), x, offs=_ends_of_all(rows, like.shape[0]))
    output = torch.empty_like(like)
    slices = rows.slices()
    for expert in set(range(like.shape[0])).difference(expert for expert, _, _ in slices):
        output[expert].zero_()
    for expert, start, end in slices:
        torch.mm(grad[start:end].t(), x[start:end], out=output[expert])
    return output


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, which the kernel wants."""
    return max(tensor.stride()) * tensor.element_size() % 16 == 0 and 1 in tensor.stride()


def _has_grouped_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.device.type not in ("cpu", "cuda") or x.dtype not in GROUPED_DTYPES or not x.shape[0]:
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    outputs_aligned = weight.shape[1] * weight.element_size() % 16 == 0
    return outputs_aligned and _aligned(x) and _aligned(weight[0])


def _ends_of_all(rows: ExpertRows, num_experts: int) -> torch.Tensor:
    """`rows.ends` with a place for each expert of the weight, empty for those that are not in `rows.groups`."""
    if len(rows.groups) == num_experts:
        return rows.ends
    ends, end = [], 0
    own_ends = dict(zip(rows.groups, rows.bounds, strict=True))
    for expert in range(num_experts):
        end = own_ends.get(expert, end)
        ends.append(end)
    return torch.tensor(ends, dtype=torch.int32).to(rows.ends.device, non_blocking=True)
