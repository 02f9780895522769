"""The experts of one layer as two grouped linear maps over rows sorted by expert, for any transformers experts module.

    from moe_hf.kernels import grouped_experts

    output = grouped_experts(experts, hidden_states, top_k_index, top_k_weights)

computes what `experts.forward` does: gated or plain, transposed, biased, any activation or limit, a norm after the second
map, ids of experts elsewhere. A kind of fine-tuning replaces one or both maps (`first`, `second`) by a `LinearMap`:

- `Projection` is the computation, without tensors: forward, gradient of the inputs, gradients of the tensors.
  `Projection()` has the weight (E, O, I); no gradient of a weight is computed that does not train.
- `ChosenProjection()` has tensors (weight, chosen): the chosen experts, `last` of the call and in that order, have
  parameters (C, O, I) of their own, and only their gradient is computed; the rest is frozen.
- `base_map(experts, description, name)` is the module's own map; `describe_experts` says what the module is.

    description = describe_experts(experts)
    base = base_map(experts, description, description.first)
    first = LinearMap(ChosenProjection(), (base.tensors[0], chosen.to(base.tensors[0].dtype)), base.bias)
    grouped_experts(experts, hidden_states, top_k_index, top_k_weights, first=first, second=..., last=[3, 5])

Weights are (E, O, I) here whatever the module's layout: for a transposed module give `chosen.transpose(1, 2)`. Tensors
get their gradients through autograd, so casts, slices and views of parameters may be handed in; a bias of chosen experts
is one (E, O) tensor, e.g. `base.bias.index_copy(0, ids, chosen_bias)`.

`run_in_place_of(experts, function)` makes the module run `function(experts, hidden_states, top_k_index, top_k_weights)`,
under expert parallelism too, and `restore(experts)` undoes it.

Where the numbers are not one tensor (quantized, offloaded), a `StoredExperts` stands in the module for the weight: its
`MatrixSource` gives one expert's matrix at a time, and all of the above runs over it as over any frozen weight.

Backward keeps (T, D) inputs and (R, 2F) outputs of the first map, and computes the activation again. Sums over rows are in
a fixed order: runs are the same bit by bit on a CPU. All floating-point dtypes; float64 for checks.
"""

from moe_hf.kernels.description import ExpertsDescription, describe_experts
from moe_hf.kernels.dispatch import is_replaced, restore, run_in_place_of
from moe_hf.kernels.experts import LinearMap, base_map, grouped_experts, stored_experts_forward
from moe_hf.kernels.matmul import rows_outer_experts, rows_times_experts
from moe_hf.kernels.projections import ChosenProjection, Projection, Tensors
from moe_hf.kernels.rows import ExpertRows, sort_rows
from moe_hf.kernels.stored import (
    MatrixSource,
    StoredExperts,
    has_stored,
    leave_to_each_process,
    refuse_stored,
    stored_maps,
    stored_names,
)


__all__ = [
    "ChosenProjection",
    "ExpertRows",
    "ExpertsDescription",
    "LinearMap",
    "MatrixSource",
    "Projection",
    "StoredExperts",
    "Tensors",
    "base_map",
    "describe_experts",
    "grouped_experts",
    "has_stored",
    "is_replaced",
    "leave_to_each_process",
    "refuse_stored",
    "restore",
    "rows_outer_experts",
    "rows_times_experts",
    "run_in_place_of",
    "sort_rows",
    "stored_experts_forward",
    "stored_maps",
    "stored_names",
]
