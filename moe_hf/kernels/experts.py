"""The experts of one layer: rows sorted once, two grouped maps, their sum per token.

Letters: T tokens, K experts per token, R rows, D model width, F expert width, E experts, I inputs, O outputs of a map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from moe_hf.kernels.activation import weighted_activation, weighted_activation_backward
from moe_hf.kernels.description import ExpertsDescription, describe_experts
from moe_hf.kernels.projections import Projection
from moe_hf.kernels.rows import ExpertRows, sort_rows


@dataclass(frozen=True)
class LinearMap:
    """One of the two maps: how it is computed, on which tensors, and the bias (E, O) of all experts, if any.

    Gradients reach the tensors through autograd, so that they may be results of operations: a cast, a slice.
    """

    projection: Projection
    tensors: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None = None


def base_map(experts: nn.Module, description: ExpertsDescription, name: str) -> LinearMap:
    """The module's own map `name` (`description.first` or `.second`): weight (E, O, I), whatever its layout."""
    weight = getattr(experts, name)
    weight = weight.transpose(1, 2) if description.transposed else weight
    return LinearMap(Projection(), (weight,), getattr(experts, f"{name}_bias") if description.has_bias else None)


def grouped_experts(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    first: LinearMap | None = None,
    second: LinearMap | None = None,
    last: Sequence[int] = (),
) -> torch.Tensor:
    """Compute what `experts.forward` computes, with other maps where they are given.

    Args:
        experts (`nn.Module`): any module behind transformers' experts interface.
        hidden_states (`torch.Tensor`): `(T, D)`; computed in the dtype of the weights.
        top_k_index (`torch.Tensor`): `(T, K)`; ids of E and above are of experts elsewhere, where the module says so.
        top_k_weights (`torch.Tensor`): `(T, K)`.
        first, second (`LinearMap`, *optional*): in place of the module's own maps.
        last: experts whose rows come last, in this order, for maps that treat some experts apart.

    Returns:
        `(T, D)`, in the dtype of `hidden_states`.

    Raises:
        MoEError: the module is not behind the experts interface, or its weights are quantized.
    """
    description = describe_experts(experts)
    first = first or base_map(experts, description, description.first)
    second = second or base_map(experts, description, description.second)
    weight = first.tensors[0]
    rows = sort_rows(top_k_index, weight.shape[0], last=last, may_leave_out=experts._is_expert_parallel)
    x = hidden_states.to(weight.dtype)
    with torch.autocast(hidden_states.device.type, enabled=False):
        if description.foldable:
            plan = _Plan(description, rows, first.projection, second.projection, len(first.tensors))
            output = _FoldedExperts.apply(
                plan, x, top_k_weights, first.bias, second.bias, *first.tensors, *second.tensors
            )
        else:
            output = _composed_experts(description, rows, x, top_k_weights, first, second)
    return output.to(hidden_states.dtype)


# Sizes of groups depend on the data, and matrices are made on the way: one break of a compiled graph per layer.
@torch.compiler.disable(
    reason="quantized and offloaded experts are decoded one at a time, outside of a graph: compile without fullgraph=True, "
    "or restore_experts(model) first"
)
def stored_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """(T, D), (T, K), (T, K) -> (T, D): the experts, one after the other."""
    return grouped_experts(experts, hidden_states, top_k_index, top_k_weights)


def _composed_experts(
    description: ExpertsDescription,
    rows: ExpertRows,
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    first: LinearMap,
    second: LinearMap,
) -> torch.Tensor:
    """The same through autograd, for an activation with parameters or a norm after the second map."""
    hidden = _Map.apply(first.projection, rows, _Gather.apply(rows, x), first.bias, *first.tensors)
    hidden = description.activation(hidden).to(x.dtype)
    output = _Map.apply(second.projection, rows, hidden, second.bias, *second.tensors)
    if description.post_norm is not None:
        output = description.post_norm(output)
    weighted = output * rows.take(top_k_weights)[:, None]
    return _Combine.apply(rows, weighted)


@dataclass(frozen=True)
class _Plan:
    description: ExpertsDescription
    rows: ExpertRows
    first: Projection
    second: Projection
    num_first: int


class _FoldedExperts(torch.autograd.Function):
    """Keeps (T, D) inputs and (R, 2F) outputs of the first map; the routing weight is folded in before the second map,
    so that its gradient is a product of two rows of width F, and (R, D) outputs are not kept.
    """

    @staticmethod
    def forward(ctx, plan, x, top_k_weights, first_bias, second_bias, *tensors):
        rows, first, second = plan.rows, tensors[: plan.num_first], tensors[plan.num_first :]
        row_weights = rows.take(top_k_weights)
        hidden, kept_first = plan.first.forward(first, rows.gather(x), rows)
        _add_bias(hidden, first_bias, rows)
        activated = weighted_activation(plan.description, hidden, row_weights)
        output, kept_second = plan.second.forward(second, activated, rows)
        _add_bias(output, second_bias, rows, row_weights)
        ctx.plan, ctx.num_kept_first = plan, len(kept_first)
        ctx.save_for_backward(x, hidden, row_weights, first_bias, second_bias, *tensors, *kept_first, *kept_second)
        return rows.combine(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        plan, rows, needs = ctx.plan, ctx.plan.rows, ctx.needs_input_grad
        x, hidden, row_weights, first_bias, second_bias, *others = ctx.saved_tensors
        tensors, kept = others[: len(needs) - 5], others[len(needs) - 5 :]
        first, second = tuple(tensors[: plan.num_first]), tuple(tensors[plan.num_first :])
        kept_first, kept_second = tuple(kept[: ctx.num_kept_first]), tuple(kept[ctx.num_kept_first :])
        need_first, need_second = needs[5 : 5 + plan.num_first], needs[5 + plan.num_first :]

        grad = rows.gather(grad_output)
        bias_grad = _bias_gradient(grad, second_bias, rows, row_weights) if needs[4] else None
        grad_activated, again = plan.second.input_gradient(second, kept_second, grad, rows, True)
        start = plan.second.first_trained_row(need_second, rows)
        grad_hidden, grad_weights, activated = weighted_activation_backward(
            plan.description, hidden, row_weights, grad_activated, start
        )
        del grad_activated
        if second_bias is not None and needs[2]:
            _add_bias_to_weights(grad_weights, grad, second_bias, rows)
        grads_second = (None,) * len(second)
        if start is not None:
            grads_second = plan.second.tensor_gradients(second, kept_second, again, activated, grad, rows, need_second)
        del activated
        del grad

        first_bias_grad = _bias_gradient(grad_hidden, first_bias, rows) if needs[3] else None
        grad_x, again = plan.first.input_gradient(first, kept_first, grad_hidden, rows, needs[1])
        grads_first = (None,) * len(first)
        start = plan.first.first_trained_row(need_first, rows)
        if start is not None:
            inputs = x.index_select(0, rows.token[start:])
            grads_first = plan.first.tensor_gradients(first, kept_first, again, inputs, grad_hidden, rows, need_first)
        grad_x = rows.combine(grad_x) if needs[1] else None
        grad_weights = rows.put_back(grad_weights) if needs[2] else None
        return (None, grad_x, grad_weights, first_bias_grad, bias_grad, *grads_first, *grads_second)


class _Map(torch.autograd.Function):
    """One map of sorted rows; keeps the inputs of the rows whose tensors train."""

    @staticmethod
    def forward(ctx, projection, rows, x, bias, *tensors):
        output, kept = projection.forward(tensors, x, rows)
        _add_bias(output, bias, rows)
        start = projection.first_trained_row(ctx.needs_input_grad[4:], rows)
        ctx.projection, ctx.rows, ctx.num_tensors = projection, rows, len(tensors)
        ctx.save_for_backward(None if start is None else x[start:], bias, *tensors, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, bias, *others = ctx.saved_tensors
        tensors, kept, needs = tuple(others[: ctx.num_tensors]), tuple(others[ctx.num_tensors :]), ctx.needs_input_grad
        grad_x, again = ctx.projection.input_gradient(tensors, kept, grad, ctx.rows, needs[2])
        grads = (None,) * len(tensors)
        if x is not None:
            grads = ctx.projection.tensor_gradients(tensors, kept, again, x, grad, ctx.rows, needs[4:])
        return (None, None, grad_x, _bias_gradient(grad, bias, ctx.rows) if needs[3] else None, *grads)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, tokens):
        ctx.rows = rows
        return rows.gather(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, ctx.rows.combine(grad)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, values):
        ctx.rows = rows
        return rows.combine(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, ctx.rows.gather(grad)


def _add_bias(
    output: torch.Tensor, bias: torch.Tensor | None, rows: ExpertRows, row_weights: torch.Tensor | None = None
) -> None:
    """Add each row's bias to `output` in place, times the routing weight where it is folded in."""
    if bias is None:
        return
    for expert, start, end in rows.slices():
        if row_weights is None:
            output[start:end].add_(bias[expert])
        else:
            output[start:end].addr_(row_weights[start:end].to(output.dtype), bias[expert].to(output.dtype))


def _bias_gradient(
    grad: torch.Tensor, bias: torch.Tensor, rows: ExpertRows, row_weights: torch.Tensor | None = None
) -> torch.Tensor:
    result = torch.zeros_like(bias)
    for expert, start, end in rows.slices():
        piece = grad[start:end] if row_weights is None else grad[start:end] * row_weights[start:end, None]
        result[expert] = piece.sum(0)
    return result


def _add_bias_to_weights(grad_weights: torch.Tensor, grad: torch.Tensor, bias: torch.Tensor, rows: ExpertRows) -> None:
    for expert, start, end in rows.slices():
        grad_weights[start:end] += grad[start:end] @ bias[expert].to(grad.dtype)
