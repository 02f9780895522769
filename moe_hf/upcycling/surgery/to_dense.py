"""A MoE model back into a dense one of its family: the average of the experts, one of them, or all side by side.

With fixed weights u_e a MoE layer is a sum of MLPs, sum_e u_e E_e(x) + s S(x), and a sum of MLPs is one MLP whose neurons
are those of all of them. A trained router's weights are not fixed: what is put in their place is the approximation.

Letters: B batch, S sequence, T tokens, D model width, F expert width, E experts, K experts per token, L MoE layers.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moe_hf.errors import MoEError
from moe_hf.modeling.dense_mlp import (
    MLPSite,
    activation_of,
    check_one_expert_reproduces,
    find_mlp_sites,
    holder_of,
)
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.upcycling.fill import check_same_names, outside_mlps
from moe_hf.upcycling.recipes import dense_pieces
from moe_hf.upcycling.surgery.expert_pools import moe_layers, surgery_model


METHODS = ("average", "expert", "merged")
# What the families call the width of their MLPs.
WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff", "shared_intermediate_size")

# An MLP in pieces: `gate` and `up` (F, D), `down` (D, F), and with biases `gate_bias`, `up_bias` (F,), `down_bias` (D,).
MLP = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Weights:
    """What a layer's outputs are multiplied by: the routed experts', (E,) float64, and the shared one's."""

    experts: torch.Tensor
    shared: float


def to_dense(
    model: MoEForCausalLM,
    method: str = "average",
    *,
    expert: int | None = None,
    usage: torch.Tensor | None = None,
    inputs: torch.Tensor | None = None,
) -> PreTrainedModel:
    """Make a dense model of the original family from a MoE model.

    - `"average"`: one MLP with the mean of the experts' weights. Of equal experts it is that expert.
    - `"expert"`: one MLP, that of one expert.
    - `"merged"`: one wide MLP with the neurons of all experts, each expert's output times its weight. Computes the MoE's
      function when the weights are the same for all tokens: K = E = 1, or K = E and a router of zeros; and when experts
      are equal, whatever the router does.

    In all three the weights of a token are replaced by fixed ones: equal for all experts, in proportion to `usage`, or the
    mean weights over `inputs`. Their sum is that of the routing. A shared expert is added exactly: its neurons stand beside
    the others, as wide as both. Neurons that have the same weights before the activation are one, with the sum of their
    outputs; those without output are left out. So the exact upcycling forms, shared experts and shards included, become
    the dense MLP that they were made of (`"merged"` for shards).

    Args:
        model (`MoEForCausalLM`): not changed.
        method (`str`): one of the three.
        expert (`int`, *optional*): id for `"expert"`.
        usage (`torch.Tensor`, *optional*): how much each expert counts, (E,) or (L, E); only proportions matter.
        inputs (`torch.Tensor`, *optional*): token ids (B, S) of your data, on which the mean weights of the experts and of
            a shared expert's gate are measured; required when these have no known sum.

    Returns:
        `PreTrainedModel` of the dense class, in the MoE's dtype, on its device, in evaluation mode. Its MLPs are wider than
        the original's where more neurons are needed.

    Raises:
        MoEError: for weights that must be measured, or an MLP that the family has no place for.
    """
    model = surgery_model(model)
    _check_choice(model, method, expert)
    layers = {}
    for (site, block), weights in zip(moe_layers(model), _weights(model, usage, inputs), strict=True):
        layers[site.layer_index] = _dense_mlp(block, weights, method, expert)
    config, changed = _dense_config(model, layers)
    dense = model._dense_class._from_config(config).to(model.device).eval()
    _fill(dense, model, layers, changed)
    dense.tie_weights()
    if model.can_generate():
        dense.generation_config = copy.deepcopy(model.generation_config)
    return dense


def _check_choice(model: MoEForCausalLM, method: str, expert: int | None) -> None:
    if method not in METHODS:
        raise MoEError(f"method is {method!r}; it must be one of {list(METHODS)}.")
    total = model.config.num_experts
    if method == "expert" and not (isinstance(expert, int) and 0 <= expert < total):
        raise MoEError(f'expert is {expert}; method="expert" needs an id from 0 to {total - 1}.')
    if method != "expert" and expert is not None:
        raise MoEError(f'expert is {expert}, which method={method!r} does not read; use method="expert".')


def _weights(model: MoEForCausalLM, usage: torch.Tensor | None, inputs: torch.Tensor | None) -> list[_Weights]:
    config, layers = model.config, moe_layers(model)
    measured = None if inputs is None else _mean_weights(model, inputs)
    if usage is not None:
        usage = torch.as_tensor(usage).detach().cpu().double()
        usage = usage.expand(len(layers), -1) if usage.dim() == 1 else usage
        shape = (len(layers), config.num_experts)
        if tuple(usage.shape) != shape or not bool((usage >= 0).all() and (usage.sum(-1) > 0).all()):
            raise MoEError(f"usage must be (E,) or (L, E) = {shape}, finite, at least 0, and not 0 for a whole layer.")
    found = []
    for index, (site, block) in enumerate(layers):
        if measured is not None:
            experts, shared = measured[index].experts, measured[index].shared
        else:
            _check_known_sum(model, site, block)
            experts = torch.full((config.num_experts,), config.routed_scaling_factor / config.num_experts).double()
            shared = 0.5 if block.shared_expert_gate is not None else 1.0
        if usage is not None:
            experts = experts.sum() * usage[index] / usage[index].sum()
        found.append(_Weights(experts, shared))
    return found


def _check_known_sum(model: MoEForCausalLM, site: MLPSite, block: MoEBlock) -> None:
    config = model.config
    is_known = config.norm_topk_prob or (
        config.scoring_func == "softmax" and config.num_experts_per_tok == config.num_experts
    )
    if config.router_type != "top_k" or not is_known:
        raise MoEError(
            f"The weights of a token's experts have no known sum (router_type={config.router_type!r}, "
            f"norm_topk_prob={config.norm_topk_prob}, scoring_func={config.scoring_func!r}): pass inputs, token ids (B, S) "
            "of your data, to measure them."
        )
    if block.shared_expert_gate is not None and bool(block.shared_expert_gate.weight.any()):
        raise MoEError(
            f"The gate of the shared expert in {site.block} differs from token to token: pass inputs, token ids (B, S) of "
            "your data, to measure its mean."
        )


@torch.no_grad()
def _mean_weights(model: MoEForCausalLM, inputs: torch.Tensor) -> list[_Weights]:
    """Mean over the tokens of each expert's weight, 0 where it is not chosen, and of the shared expert's gate."""
    if not isinstance(inputs, torch.Tensor) or inputs.dim() != 2 or inputs.is_floating_point():
        raise MoEError("inputs must be a (B, S) tensor of token ids.")
    layers = moe_layers(model)
    experts = [torch.zeros(model.config.num_experts, dtype=torch.float64) for _ in layers]
    shared = [1.0] * len(layers)
    handles = []
    for index, (_, block) in enumerate(layers):

        def add_up(module, args, output, index=index):
            experts[index].index_add_(0, output[2].flatten().cpu(), output[1].flatten().double().cpu())
            experts[index] /= len(output[0])

        def average(module, args, output, index=index):
            shared[index] = float(output.sigmoid().double().mean())

        handles.append(block.gate.register_forward_hook(add_up))
        if block.shared_expert_gate is not None:
            handles.append(block.shared_expert_gate.register_forward_hook(average))
    was_training = model.training
    model.eval()
    try:
        model(input_ids=inputs.to(model.device), use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [_Weights(*pair) for pair in zip(experts, shared, strict=True)]


@torch.no_grad()
def _dense_mlp(block: MoEBlock, weights: _Weights, method: str, expert: int | None) -> MLP:
    experts, total = _routed_mlps(block), float(weights.experts.sum())
    if method == "average":
        parts = [(_mean(experts, weights.experts), total)]
    elif method == "expert":
        parts = [(experts[expert], total)]
    else:
        parts = [(mlp, float(weight)) for mlp, weight in zip(experts, weights.experts, strict=True)]
    if block.shared_expert is not None:
        _check_one_activation(block)
        parts.append((_shared_mlp(block), weights.shared))
    return _sum_of_mlps(parts)


def _routed_mlps(block: MoEBlock) -> list[MLP]:
    """The routed experts, on the CPU."""
    tensors = {name: tensor.detach().cpu() for name, tensor in block.experts.named_parameters(recurse=False)}
    mlps = []
    for index in range(block.experts.num_experts):
        mlp = {}
        for name, rows in tensors.items():
            piece, ending = name.removesuffix("_bias").removesuffix("_proj"), "_bias" if name.endswith("_bias") else ""
            if piece == "gate_up":
                mlp["gate" + ending], mlp["up" + ending] = rows[index].chunk(2)
            else:
                mlp[piece + ending] = rows[index]
        mlps.append(mlp)
    return mlps


def _shared_mlp(block: MoEBlock) -> MLP:
    mlp = {}
    for piece in ("gate", "up", "down"):
        projection = getattr(block.shared_expert, f"{piece}_proj")
        if projection is not None:
            mlp[piece] = projection.weight.detach().cpu()
            if projection.bias is not None:
                mlp[f"{piece}_bias"] = projection.bias.detach().cpu()
    return mlp


def _check_one_activation(block: MoEBlock) -> None:
    own, shared = block.experts.act_fn, block.shared_expert.act_fn
    if isinstance(own, nn.Module):
        learned = shared.state_dict()
        if not all(torch.equal(tensor, learned[name]) for name, tensor in own.state_dict().items()):
            raise MoEError(
                "The routed experts and the shared expert have learned different activations, and a dense MLP has one."
            )


def _mean(mlps: Sequence[MLP], weights: torch.Tensor) -> MLP:
    """The weighted mean of MLPs, in float64, so that the mean of equal numbers is that number; in their dtype."""
    mean = {}
    for name, first in mlps[0].items():
        total = torch.zeros(first.shape, dtype=torch.float64)
        for mlp, weight in zip(mlps, weights / weights.max(), strict=True):
            total.add_(mlp[name].double(), alpha=float(weight))
        mean[name] = (total / float((weights / weights.max()).sum())).to(first.dtype)
    return mean


def _sum_of_mlps(parts: Sequence[tuple[MLP, float]]) -> MLP:
    """One MLP that computes sum_i scale_i MLP_i(x), exactly.

    Its neurons are those of all parts. Neurons that are equal before the activation are one, whose output weights are the
    sum; neurons without output weights are left out.
    """
    inputs = [name for name in parts[0][0] if name not in ("down", "down_bias")]
    rows = {name: torch.cat([mlp[name] for mlp, _ in parts]) for name in inputs}
    first, position = _distinct([tensor if tensor.dim() == 2 else tensor[:, None] for tensor in rows.values()])
    dtype, hidden = parts[0][0]["down"].dtype, parts[0][0]["down"].shape[0]
    down = torch.zeros(hidden, len(first), dtype=torch.float64)
    start = 0
    for mlp, scale in parts:
        width = mlp["down"].shape[1]
        down.index_add_(1, position[start : start + width], mlp["down"].double() * scale)
        start += width
    used = down.any(0)
    total = {name: tensor[first][used] for name, tensor in rows.items()} | {"down": down[:, used].to(dtype)}
    if "down_bias" in parts[0][0]:
        total["down_bias"] = sum(mlp["down_bias"].double() * scale for mlp, scale in parts).to(dtype)
    return total


def _distinct(columns: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows differ: the first of each kind, in order, and for each row the place of its kind among those."""
    first, places, position = [], {}, []
    arrays = [column.contiguous().view(torch.uint8).numpy() for column in columns]
    for row in range(len(arrays[0])):
        # Hashed, since the rows of all experts together are too large to be kept twice.
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(array[row])
        key = digest.digest()
        if key not in places:
            places[key] = len(first)
            first.append(row)
        position.append(places[key])
    return torch.tensor(first), torch.tensor(position)


def _dense_config(model: MoEForCausalLM, layers: dict[int, MLP]) -> tuple[PreTrainedConfig, bool]:
    """The dense configuration, and whether its MLPs are of another width than the original's."""
    config = copy.deepcopy(model.config.text_config)
    config.dtype = model.dtype
    sites = _sites(model, config)
    own = {site.layer_index: site.intermediate_size for site in sites}
    needed = {layer: mlp["down"].shape[1] for layer, mlp in layers.items()}
    if all(width <= own[layer] for layer, width in needed.items()):
        return config, False
    width = max(*own.values(), *needed.values())
    for name in WIDTH_FIELDS:
        if not hasattr(config, name):
            continue
        wide = copy.deepcopy(config)
        own_value = getattr(config, name)
        # A few families have one width per layer.
        setattr(wide, name, [width] * len(own_value) if isinstance(own_value, list) else width)
        if {site.intermediate_size for site in _sites(model, wide)} == {width}:
            return wide, True
    raise MoEError(
        f"The dense MLP needs width {width}, and {type(config).__name__} has no field of {list(WIDTH_FIELDS)} that gives all "
        'its layers this width: use method="average" or "expert" of a model without a shared expert.'
    )


def _sites(model: MoEForCausalLM, config: PreTrainedConfig) -> list[MLPSite]:
    with torch.device("meta"):
        return find_mlp_sites(model._dense_class(copy.deepcopy(config)).base_model)


@torch.no_grad()
def _fill(dense: PreTrainedModel, model: MoEForCausalLM, layers: dict[int, MLP], changed: bool) -> None:
    prefix = f"{model.base_model_prefix}."
    written = []
    for site in find_mlp_sites(dense.base_model):
        holder, mlp = holder_of(dense.base_model, site), layers.get(site.layer_index)
        if mlp is not None:
            activation = model.base_model.get_submodule(site.block).experts.act_fn
        elif changed:
            # A layer without experts gets neurons of zeros, as many as its new width asks for.
            original = holder_of(model.base_model, site)
            check_one_expert_reproduces(original, site)
            mlp, activation = dense_pieces(original, site), activation_of(original, site)
        else:
            continue
        written.append(site)
        _write(holder, site, mlp)
        if isinstance(activation, nn.Module):
            activation_of(holder, site).load_state_dict(activation.state_dict())
    target = outside_mlps(dense.state_dict(), written, prefix)
    blocks = tuple(f"{prefix}{site.block}." for site, _ in moe_layers(model))
    own = outside_mlps(model.state_dict(), [site for site in written if site.layer_index not in layers], prefix)
    own = {name: tensor for name, tensor in own.items() if not name.startswith(blocks)}
    check_same_names(target, own)
    for name, tensor in target.items():
        tensor.copy_(own[name])


def _write(holder: nn.Module, site: MLPSite, mlp: MLP) -> None:
    """Write an MLP into the projections at `site`, filled up with neurons of zeros."""
    missing = site.intermediate_size - mlp["down"].shape[1]
    full = {"down": functional.pad(mlp["down"], (0, missing))}
    for name, tensor in mlp.items():
        if not name.startswith("down"):
            full[name] = functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing))
    if "down_bias" in mlp:
        full["down_bias"] = mlp["down_bias"]
    groups = {site.down: ("down",), site.up: ("gate", "up") if site.fused else ("up",)}
    if site.gate is not None:
        groups[site.gate] = ("gate",)
    for attribute, pieces in groups.items():
        projection = getattr(holder, attribute)
        weight = projection.weight.t() if isinstance(projection, Conv1D) else projection.weight
        weight.copy_(torch.cat([full[piece] for piece in pieces]))
        if f"{pieces[0]}_bias" not in full:
            continue
        bias = torch.cat([full[f"{piece}_bias"] for piece in pieces])
        if projection.bias is not None:
            projection.bias.copy_(bias)
        elif bias.any():
            raise MoEError(
                f"The experts have learned a bias for {site.layer}.{attribute}, and the dense projection has none."
            )
