"""Where the experts of an operation come from: the model itself, other MoEs, dense models; and their router rows.

Letters: D model width, F expert width, E experts, L MoE layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.modeling.config_checks import beyond_plain_blocks
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import (
    MLPSite,
    activation_of,
    check_one_expert_reproduces,
    expert_tensors,
    find_mlp_sites,
    holder_of,
)
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.modeling.routing import wide
from moe_hf.unwrapping import unwrapped, whole_model
from moe_hf.upcycling.expected_weight import recorded_weight
from moe_hf.upcycling.recipes import random_generator
from moe_hf.upcycling.sources import check_dense_weights


# Experts of one layer: the names of tensors in its block to one row per expert. Besides the parameters of `experts` these
# are the router's rows.
Pool = dict[str, torch.Tensor]
ROUTER = "gate.weight"
# An expert of the model itself, an expert of another MoE of the same shape, or the MLPs of a dense model.
ExpertSource = int | tuple[MoEForCausalLM, int] | PreTrainedModel


def surgery_model(model: MoEForCausalLM) -> MoEForCausalLM:
    """The whole `MoEForCausalLM` in memory that a user gave.

    Raises:
        MoEError: saying what it is instead.
    """
    model = whole_model(model, "Surgery")
    if not isinstance(model, MoEForCausalLM):
        raise MoEError(
            f"The model is a {type(model).__name__}; it must be a MoEForCausalLM of moe_hf. Load checkpoints with moe_hf "
            "imported and without trust_remote_code."
        )
    config = model.config
    more = [field for field in beyond_plain_blocks(config) if not field.startswith("router_type")]
    more += ["balance_strategy='bias'"] * (config.balance_strategy == "bias")
    more += ["router_noise='learned'"] * (config.router_noise == "learned")
    if more:
        raise MoEError(
            f"The model has {', '.join(more)}: its routers or blocks hold more than equal experts and a row for each, which "
            "these operations do not move along."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise MoEError(f"{name} is offloaded: load the whole model on one device first.")
    return model


def moe_layers(model: MoEForCausalLM) -> list[tuple[MLPSite, MoEBlock]]:
    """The places and the blocks of the MoE layers, in order."""
    base = model.base_model
    return [(site, base.get_submodule(site.block)) for site in base._moe_sites]


def pool_of(block: MoEBlock) -> Pool:
    """The experts of a block, as they are."""
    experts = {f"experts.{name}": tensor for name, tensor in block.experts.named_parameters(recurse=False)}
    return {ROUTER: block.gate.weight, **experts}


def checked_ids(ids: Sequence[int], num_experts: int) -> list[int]:
    """`ids`, sorted.

    Raises:
        MoEError: when one does not exist or comes twice.
    """
    outside = [expert for expert in ids if not (isinstance(expert, int) and 0 <= expert < num_experts)]
    if outside or len(set(ids)) < len(ids):
        problem = f"has {outside}" if outside else "names one twice"
        raise MoEError(f"The list of experts {list(ids)} {problem}; ids are 0 to {num_experts - 1}, each once.")
    return sorted(ids)


def source_name(source: ExpertSource) -> str:
    """What the metadata say of a source."""
    if isinstance(source, int):
        return f"expert {source}"
    model, suffix = (source[0], f", expert {source[1]}") if isinstance(source, tuple) else (source, "")
    model = unwrapped(model)
    return f"{model.name_or_path or type(model).__name__}{suffix}"


def pools_of_sources(model: MoEForCausalLM, sources: Sequence[ExpertSource]) -> list[Pool]:
    """For each MoE layer of `model`, one expert per source; without router rows if a source has none.

    Raises:
        MoEError: for a source of another shape, or with another activation.
    """
    of_source = [_pools_of_source(model, source) for source in sources]
    pools = []
    for (_, block), layer in zip(moe_layers(model), zip(*of_source, strict=True), strict=True):
        own = {name: rows for name, rows in pool_of(block).items() if all(name in pool for pool in layer)}
        pools.append({name: torch.cat([pool[name].to(rows) for pool in layer]) for name, rows in own.items()})
    return pools


def _pools_of_source(model: MoEForCausalLM, source: ExpertSource) -> list[Pool]:
    if isinstance(source, int):
        (expert,) = checked_ids([source], model.config.num_experts)
        return [_picked(block, expert) for _, block in moe_layers(model)]
    if isinstance(source, tuple) and len(source) == 2:
        other = surgery_model(source[0])
        (expert,) = checked_ids([source[1]], other.config.num_experts)
        layers = moe_layers(other)
        found = [(site, _picked(block, expert), block.experts.act_fn) for site, block in layers]
    elif isinstance(source, nn.Module) and not isinstance(dense := whole_model(source, "Surgery"), MoEForCausalLM):
        found = _dense_experts(dense, model)
    else:
        raise MoEError(
            f"{source!r} is no source of an expert; give an id, (moe, id), or a dense model. An expert of a MoE needs its id."
        )
    _check_fit(model, found, source_name(source))
    return [pool for _, pool, _ in found]


def _picked(block: MoEBlock, expert: int) -> Pool:
    return {name: rows[expert : expert + 1].detach() for name, rows in pool_of(block).items()}


def _dense_experts(source: PreTrainedModel, model: MoEForCausalLM) -> list[tuple[MLPSite, Pool, Any]]:
    check_dense_weights(source, source_name(source))
    base, found = source.base_model, []
    for site in find_mlp_sites(base):
        if not model.config.is_moe_layer(site.layer_index):
            continue
        holder = holder_of(base, site)
        check_one_expert_reproduces(holder, site)
        scale = dense_scale(model.config, site)
        pool = {f"experts.{name}": tensor.detach()[None] for name, tensor in expert_tensors(holder, site).items()}
        for name, rows in pool.items():
            if "down_proj" in name:
                pool[name] = (wide(rows) * scale).to(rows.dtype)
        found.append((site, pool, activation_of(holder, site)))
    return found


def dense_scale(config: MoEConfig, site: MLPSite) -> float:
    """The factor on the output of a dense MLP that becomes one of a model's experts, as upcycling has it.

    The weights of a token sum to `routed_scaling_factor`, or to what was measured when the model was made, and a shared expert made of the whole MLP has its share.
    """
    recorded = config.upcycling or {}
    is_whole = config.shared_expert_intermediate_size >= site.intermediate_size
    share = recorded.get("shared_share", 0.0) if is_whole else 0.0
    return (1 - share) / recorded_weight(config, site.layer_index)


def _check_fit(model: MoEForCausalLM, found: list[tuple[MLPSite, Pool, Any]], name: str) -> None:
    layers = moe_layers(model)
    theirs, ours = ([site.layer_index for site, *_ in rows] for rows in (found, layers))
    if theirs != ours:
        raise MoEError(f"{name} has MLPs or experts in layers {theirs}, and the model's MoE layers are {ours}.")
    for (site, block), (_, pool, act_fn) in zip(layers, found, strict=True):
        own = {key: tuple(rows.shape[1:]) for key, rows in pool_of(block).items() if key != ROUTER}
        their = {key: tuple(rows.shape[1:]) for key, rows in pool.items() if key != ROUTER}
        if own != their:
            raise MoEError(f"{name} does not fit in {site.block}: its expert is {their}, and the model's are {own}.")
        if not _same_activation(block.experts.act_fn, act_fn):
            raise MoEError(
                f"{name} has another activation in {site.block} than the model, {act_fn} instead of "
                f"{block.experts.act_fn}, or has trained it: all experts of a layer share one."
            )


def _same_activation(own: Any, their: Any) -> bool:
    if not isinstance(own, nn.Module) or not isinstance(their, nn.Module):
        return getattr(own, "__name__", own) == getattr(their, "__name__", their)
    first, second = own.state_dict(), their.state_dict()
    return type(own).__name__ == type(their).__name__ and all(torch.equal(first[n], second[n]) for n in first)


class RouterRows:
    """The router rows of experts that come from elsewhere.

    Args:
        rows (`str` or `torch.Tensor`): one of `allowed`, or the rows, (L, number of experts, D).
        noise (`float`): Gaussian noise on each row, in standard deviations of the row.
        seed (`int`): of all random numbers.
        allowed (`tuple[str, ...]`): the names that the operation knows.
    """

    def __init__(self, rows: str | torch.Tensor, noise: float, seed: int, allowed: tuple[str, ...]):
        if not isinstance(rows, torch.Tensor) and rows not in allowed:
            raise MoEError(f"router_rows is {rows!r}; it must be one of {list(allowed)}, or a tensor (L, n, D).")
        if not 0 <= noise < float("inf"):
            raise MoEError(f"router_noise is {noise}; it must be finite and at least 0.")
        self.rows, self.noise, self.seed = rows, noise, seed

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the metadata."""
        return {"router_rows": self.rows if isinstance(self.rows, str) else "given", "router_noise": float(self.noise)}

    def fill(self, pools: list[Pool], model: MoEForCausalLM) -> list[Pool]:
        """`pools`, one per MoE layer of `model`, with their router rows.

        Raises:
            MoEError: when the rows have another shape, or those of a dense model are asked for.
        """
        layers = moe_layers(model)
        count = len(pools[0]["experts.down_proj"])
        expected = (len(layers), count, layers[0][0].hidden_size)
        if isinstance(self.rows, torch.Tensor) and tuple(self.rows.shape) != expected:
            raise MoEError(f"router_rows has shape {tuple(self.rows.shape)}; it must be (L, n, D) = {expected}.")
        if isinstance(self.rows, str) and self.rows != "normal" and ROUTER not in pools[0]:
            raise MoEError('A dense model has no router rows: pass router_rows="normal", or the rows.')
        filled = []
        for index, (pool, (site, block)) in enumerate(zip(pools, layers, strict=True)):
            generator = random_generator(self.seed, site.layer_index, "surgery", "router")
            if isinstance(self.rows, torch.Tensor):
                rows = self.rows[index].to(block.gate.weight.device)
            elif self.rows == "normal":
                rows = torch.randn(count, site.hidden_size, generator=generator) / site.hidden_size**0.5
            else:
                rows = wide(pool[ROUTER])
            if self.noise > 0:
                drawn = torch.randn(rows.shape, generator=generator).to(rows)
                rows = rows + self.noise * rows.std(-1, keepdim=True) * drawn
            filled.append(pool | {ROUTER: rows.detach().to(block.gate.weight)})
        return filled
