"""Matrix products whose right-hand side depends on the row's expert.

torch's `grouped_mm` where it takes the tensors: one kernel on CUDA, a loop in C++ on a CPU. Elsewhere, in float64 among
others, one product per expert that has rows. Letters: R rows, E experts, I inputs, O outputs of a map.
"""

import torch
from torch.nn import functional as F

from moe_hf.kernels.rows import ExpertRows
from moe_hf.kernels.stored import StoredExperts


GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rows_times_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: ExpertRows,
    *,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """Multiply each row by its expert's matrix: (R, I) and (E, O, I) -> (R, O), in the dtype of the matrices.

    Args:
        x (`torch.Tensor`): of another dtype, it is converted expert by expert: on a CPU small products in 16 bits are slower
            than in float32, and each new number of rows costs the making of a kernel.
        out (`torch.Tensor`, *optional*): `(R, O)`, where the products go, and which is returned.
        accumulate (`bool`): add to `out` instead of overwriting it.
    """
    # Into a part of a larger tensor, products in float32 go directly; a CPU's in 16 bits are faster made apart.
    in_place = out is not None and x.device.type == "cpu" and x.element_size() >= 4
    if _has_grouped_kernel(x, weight) and not in_place:
        runs = rows.ascending_runs()
        if len(runs) > 1:
            return _run_by_run(
                x, weight, runs, weight.new_empty(len(x), weight.shape[1]) if out is None else out, accumulate
            )
        product = F.grouped_mm(x, weight.transpose(1, 2), offs=_ends_of_all(rows, weight.shape[0]))
        if out is None:
            return product
        return out.add_(product) if accumulate else out.copy_(product)
    output = weight.new_empty(x.shape[0], weight.shape[1]) if out is None else out
    slices = rows.slices()
    if isinstance(weight, StoredExperts):
        at_hand = set(weight.source.at_hand())
        slices.sort(key=lambda part: part[0] not in at_hand)
    # One piece of memory for all experts: new memory costs more than a small product.
    scratch = None
    if output.dtype != weight.dtype and slices:
        scratch = weight.new_empty(max(end - start for _, start, end in slices), weight.shape[1])
    for expert, start, end in slices:
        piece, target = x[start:end].to(weight.dtype), output[start:end]
        if scratch is not None:
            product = torch.mm(piece, weight[expert].t(), out=scratch[: end - start])
            target.copy_(product.add_(target) if accumulate else product)
        elif accumulate:
            target.addmm_(piece, weight[expert].t())
        else:
            torch.mm(piece, weight[expert].t(), out=target)
    return output


def rows_outer_experts(grad: torch.Tensor, x: torch.Tensor, rows: ExpertRows, like: torch.Tensor) -> torch.Tensor:
    """Sum grad_r x_r^T over each expert's rows: (R, O) and (R, I) -> (E, O, I), as `like` in layout and dtype; 0 without
    rows.
    """
    is_ascending = len(rows.ascending_runs()) == 1
    if grad.dtype == x.dtype and is_ascending and _has_grouped_kernel(x, like) and _aligned(grad):
        return F.grouped_mm(grad.t(), x, offs=_ends_of_all(rows, like.shape[0]))
    output = torch.empty_like(like)
    slices = rows.slices()
    for expert in set(range(like.shape[0])).difference(expert for expert, _, _ in slices):
        output[expert].zero_()
    for expert, start, end in slices:
        torch.mm(grad[start:end].to(like.dtype).t(), x[start:end].to(like.dtype), out=output[expert])
    return output


def _run_by_run(
    x: torch.Tensor, weight: torch.Tensor, runs: list[ExpertRows], out: torch.Tensor, accumulate: bool
) -> torch.Tensor:
    """The kernel wants the groups in the order of the weights: one call for each part in which they are."""
    start = 0
    for run in runs:
        end = start + run.order.numel()
        rows_times_experts(x[start:end], weight, run, out=out[start:end], accumulate=accumulate)
        start = end
    return out


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, which the kernel wants."""
    return max(tensor.stride()) * tensor.element_size() % 16 == 0 and 1 in tensor.stride()


def _has_grouped_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if isinstance(weight, StoredExperts):
        return False
    if x.device.type not in ("cpu", "cuda") or x.dtype not in GROUPED_DTYPES:
        return False
    if x.dtype != weight.dtype or not x.shape[0]:
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
