"""Surgery on a MoE model in memory: add, remove and replace experts, or grow all of them; each gives a new model.

An operation is a pool of experts per layer, the model's own and those that come from elsewhere, and an order that says
which of the pool the new model has. Router rows go with their experts. What the operation changes is measured on the
logits and recorded in `config.upcycling["surgery"]`.

Letters: B batch, S sequence, D model width, F expert width, E experts, K experts per token, L MoE layers.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.modeling.dense_mlp import MLPSite
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.modeling.routing import wide
from moe_hf.upcycling.recipes import random_generator
from moe_hf.upcycling.surgery.expert_pools import (
    ROUTER,
    ExpertSource,
    Pool,
    RouterRows,
    checked_ids,
    moe_layers,
    pool_of,
    pools_of_sources,
    source_name,
    surgery_model,
)
from moe_hf.upcycling.verification import EXACT_TOLERANCE, VerificationResult, verify


# What to do where an operation made a model worse.
MEND = "Choose other experts, or train the new model before it is used."

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Check:
    """What a change is measured on: arguments of `verify`."""

    inputs: torch.Tensor | None
    data: str | Path | None
    tokenizer: PreTrainedTokenizerBase | None
    seed: int


def add_experts(
    model: MoEForCausalLM,
    sources: Sequence[ExpertSource],
    *,
    router_rows: str | torch.Tensor = "source",
    router_noise: float = 0.0,
    num_experts_per_tok: int | None = None,
    inputs: torch.Tensor | None = None,
    data: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> MoEForCausalLM:
    """Add one expert per source to each MoE layer, after those that are there.

    Tokens that choose a new expert change their output, so this is not exact, except where all experts compute the same.
    A copy whose router row equals its source's is chosen together with it, always, and the two stay equal in training:
    give `router_noise`.

    Args:
        model (`MoEForCausalLM`): not changed.
        sources (`Sequence`): each the id of an expert to copy, `(moe, id)` for an expert of another MoE of the same shape,
            or a dense model of the family, whose MLP becomes the expert, scaled as upcycling scales it.
        router_rows (`str` or `torch.Tensor`): rows of the new experts: `"source"` for those of the experts that they come
            from (a dense model has none), `"normal"` for N(0, 1 / D), or a tensor (L, number of sources, D).
        router_noise (`float`): Gaussian noise on each new row, in standard deviations of the row.
        num_experts_per_tok (`int`, *optional*): K of the new model; unchanged if not given.
        inputs (`torch.Tensor`, *optional*): token ids (B, S) of your text, on which the change is measured, besides random
            ones.
        data, tokenizer: text to measure the loss on before and after, and what reads it; see [`verify`].
        seed (`int`): of all random numbers.

    Returns:
        `MoEForCausalLM` in evaluation mode, with the dtypes, device and frozen parameters of `model`.

    Raises:
        MoEError: for a source that does not fit.

    Source: DEMix layers, which add an expert per new domain (https://huggingface.co/papers/2108.05036).
    """
    model = surgery_model(model)
    if not sources:
        raise MoEError("sources is empty: name at least one expert to add.")
    rows = RouterRows(router_rows, router_noise, seed, allowed=("source", "normal"))
    extra = rows.fill(pools_of_sources(model, sources), model)
    total = model.config.num_experts + len(sources)
    step = {"operation": "add_experts", "sources": [source_name(source) for source in sources], **rows.to_dict()}
    return _operate(
        model, [range(total)] * len(extra), extra, step, num_experts_per_tok, _Check(inputs, data, tokenizer, seed)
    )


def remove_experts(
    model: MoEForCausalLM,
    experts: Sequence[int] | Mapping[int, Sequence[int]],
    *,
    num_experts_per_tok: int | None = None,
    inputs: torch.Tensor | None = None,
    data: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> MoEForCausalLM:
    """Remove experts and their router rows; the others move up in order.

    Exact for tokens that choose none of them, when weights do not depend on experts that are not chosen: with
    `norm_topk_prob`, or sigmoid scores.

    Args:
        model (`MoEForCausalLM`): not changed.
        experts (`Sequence[int]` or `Mapping[int, Sequence[int]]`): ids to remove from each MoE layer, or decoder layer to
            ids; each MoE layer must be named then, and lose as many.
        num_experts_per_tok (`int`, *optional*): K of the new model; required when fewer than K experts would be left.
        inputs, data, tokenizer, seed: as in [`add_experts`].

    Raises:
        MoEError: for ids that do not exist, layers that would keep different numbers, or too few experts left.
    """
    model = surgery_model(model)
    layers = [site.layer_index for site, _ in moe_layers(model)]
    if not isinstance(experts, Mapping):
        experts = dict.fromkeys(layers, list(experts))
    if sorted(experts) != layers:
        raise MoEError(f"experts names layers {sorted(experts)}; the MoE layers are {layers}, and each must be named.")
    removed = {layer: checked_ids(ids, model.config.num_experts) for layer, ids in experts.items()}
    counts = {layer: len(ids) for layer, ids in removed.items()}
    if len(set(counts.values())) > 1:
        raise MoEError(f"Every layer must keep the same number of experts; to be removed are, by layer, {counts}.")
    left = model.config.num_experts - counts[layers[0]]
    wanted = model.config.num_experts_per_tok if num_experts_per_tok is None else num_experts_per_tok
    if left < wanted:
        raise MoEError(
            f"{left} of {model.config.num_experts} experts would be left, fewer than num_experts_per_tok={wanted}: remove "
            "fewer, or pass a smaller num_experts_per_tok."
        )
    orders = [[e for e in range(model.config.num_experts) if e not in removed[layer]] for layer in layers]
    step = {"operation": "remove_experts", "experts": {str(layer): ids for layer, ids in removed.items()}}
    return _operate(model, orders, None, step, num_experts_per_tok, _Check(inputs, data, tokenizer, seed))


def replace_experts(
    model: MoEForCausalLM,
    sources: Mapping[int, ExpertSource],
    *,
    router_rows: str | torch.Tensor = "kept",
    router_noise: float = 0.0,
    inputs: torch.Tensor | None = None,
    data: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> MoEForCausalLM:
    """Put other experts in the places of some, in each MoE layer.

    Args:
        model (`MoEForCausalLM`): not changed.
        sources (`Mapping[int, ExpertSource]`): id to what takes its place; see [`add_experts`].
        router_rows (`str` or `torch.Tensor`): `"kept"` for the rows of the experts that are replaced, or as in
            [`add_experts`].
        router_noise, inputs, data, tokenizer, seed: as in [`add_experts`].

    Raises:
        MoEError: for an id that does not exist, or a source that does not fit.
    """
    model = surgery_model(model)
    if not sources:
        raise MoEError("sources is empty: name at least one expert to replace.")
    total = model.config.num_experts
    ids = checked_ids(list(sources), total)
    rows = RouterRows(router_rows, router_noise, seed, allowed=("kept", "source", "normal"))
    extra = pools_of_sources(model, [sources[expert] for expert in ids])
    if router_rows == "kept":
        extra = [
            pool | {ROUTER: block.gate.weight[ids]} for pool, (_, block) in zip(extra, moe_layers(model), strict=True)
        ]
    extra = rows.fill(extra, model)
    order = [total + ids.index(expert) if expert in sources else expert for expert in range(total)]
    named = {str(expert): source_name(sources[expert]) for expert in ids}
    step = {"operation": "replace_experts", "sources": named, **rows.to_dict()}
    return _operate(model, [order] * len(extra), extra, step, None, _Check(inputs, data, tokenizer, seed))


def grow_experts(
    model: MoEForCausalLM,
    copies: int = 2,
    *,
    noise: float = 0.0,
    num_experts_per_tok: int | None = None,
    allow_inexact: bool = False,
    inputs: torch.Tensor | None = None,
    data: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> MoEForCausalLM:
    """Make a bigger MoE that computes the same: every expert m times, and m times as many experts per token.

    Copy c of expert e gets id c * E + e and e's router row, so that all copies of a token's K experts, and no others, are
    its m K experts. The copies of one share its weight: softmax scores are divided by m as the sum over E m experts
    grows, normalised ones by the sum over m K; sigmoid scores that are not normalised need `routed_scaling_factor` / m.

    Copies that are equal stay equal in training, since they are always chosen together with equal weights. `noise` makes
    them differ without changing the model: what is added to `down_proj` sums to zero over the copies of an expert.

    Args:
        model (`MoEForCausalLM`): not changed.
        copies (`int`): m, at least 2.
        noise (`float`): standard deviation of the Gaussian noise on `down_proj`, relative to the projection's own. Exact
            in float32; 16-bit dtypes round each copy.
        num_experts_per_tok (`int`, *optional*): K of the new model, m K if not given. Any other value is not exact: equal
            copies push other experts out of the top K.
        allow_inexact (`bool`): accept logits that differ although they should not; the measured error is stored.
        inputs, data, tokenizer, seed: as in [`add_experts`].

    Raises:
        MoEError: for fewer than 2 copies, or logits that should be equal and are not.

    Source: expert upcycling (https://huggingface.co/papers/2604.19835) with K held fixed; the exact form follows from the
        weights of equal router rows, the noise is Net2Net's (https://huggingface.co/papers/1511.05641) made to cancel.
    """
    model = surgery_model(model)
    if copies < 2:
        raise MoEError(f"copies is {copies}; it must be at least 2.")
    if not 0 <= noise < float("inf"):
        raise MoEError(f"noise is {noise}; it must be finite and at least 0.")
    config = model.config
    exact_count = copies * config.num_experts_per_tok
    step = {"operation": "grow_experts", "copies": copies, "noise": float(noise)}
    factor = config.routed_scaling_factor
    if config.scoring_func == "sigmoid" and not config.norm_topk_prob:
        factor = factor / copies
    order = list(range(config.num_experts)) * copies

    def differ(pool: Pool, site: MLPSite) -> Pool:
        generator = random_generator(seed, site.layer_index, "grow")
        return pool | {
            "experts.down_proj": _with_cancelling_noise(pool["experts.down_proj"], copies, noise, generator)
        }

    return _operate(
        model,
        [order] * len(moe_layers(model)),
        None,
        step,
        exact_count if num_experts_per_tok is None else num_experts_per_tok,
        _Check(inputs, data, tokenizer, seed),
        routed_scaling_factor=factor,
        finish=differ if noise > 0 else None,
        must_be_exact=not allow_inexact and num_experts_per_tok in (None, exact_count),
    )


def _operate(
    model: MoEForCausalLM,
    orders: Sequence[Sequence[int]],
    extra: Sequence[Pool] | None,
    step: dict[str, Any],
    num_experts_per_tok: int | None,
    check: _Check,
    *,
    routed_scaling_factor: float | None = None,
    finish: Callable[[Pool, MLPSite], Pool] | None = None,
    must_be_exact: bool = False,
) -> MoEForCausalLM:
    """The new model: per layer, the experts that its order picks from the model's own followed by the extra ones."""
    before = model.config
    config = copy.deepcopy(before)
    config.num_experts = len(orders[0])
    if num_experts_per_tok is not None:
        config.num_experts_per_tok = num_experts_per_tok
    if routed_scaling_factor is not None:
        config.routed_scaling_factor = routed_scaling_factor
    config.validate_routing()
    config.dtype = model.dtype
    new = MoEForCausalLM._from_config(config).to(model.device).eval()
    _fill(new, model, orders, extra, finish)
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    result = verify(model, new, **vars(check))
    if must_be_exact and not result.exact:
        raise MoEError(_inexact_message(result, step))
    for name in ("num_experts", "num_experts_per_tok"):
        step[name] = [getattr(before, name), getattr(config, name)]
    step |= {"seed": check.seed, "verification": result.to_dict()}
    if result.loss_warning:
        logger.warning(f"{step['operation']}: {result.loss_warning} {MEND}")
    recorded = copy.deepcopy(before.upcycling) or {}
    config.upcycling = recorded | {"surgery": [*recorded.get("surgery", []), step]}
    return new


@torch.no_grad()
def _fill(
    new: MoEForCausalLM,
    model: MoEForCausalLM,
    orders: Sequence[Sequence[int]],
    extra: Sequence[Pool] | None,
    finish: Callable[[Pool, MLPSite], Pool] | None,
) -> None:
    """Give `new` the tensors of `model`, in their own dtypes, with other experts in its blocks."""
    tensors = new.state_dict(keep_vars=True)
    for index, ((site, block), order) in enumerate(zip(moe_layers(model), orders, strict=True)):
        pool = pool_of(block)
        if extra is not None:
            pool = {name: torch.cat([rows, extra[index][name]]) for name, rows in pool.items()}
        pool = {name: rows[torch.tensor(list(order), device=rows.device)] for name, rows in pool.items()}
        pool = pool if finish is None else finish(pool, site)
        for name, rows in pool.items():
            tensors.pop(f"{model.base_model_prefix}.{site.block}.{name}").data = rows
    own = model.state_dict()
    for name, tensor in tensors.items():
        tensor.data = own[name].clone()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(name in trained)


def _inexact_message(result: VerificationResult, step: dict[str, Any]) -> str:
    reason = (
        "16-bit weights round the noise of each copy, so that it does not cancel; use noise=0, or float32"
        if step["noise"] > 0
        else "different experts tie for a token, so that the top K has copies of more than K of them; or the routing "
        "function does not share a weight equally among copies"
    )
    return (
        f"The bigger model's logits differ by {result.relative_error:.2e} (relative), allowed {EXACT_TOLERANCE:.0e}. "
        f"Perhaps {reason}. Pass allow_inexact=True to accept that; the measured error is then stored in the config."
    )


def _with_cancelling_noise(
    down_proj: torch.Tensor, copies: int, noise: float, generator: torch.Generator
) -> torch.Tensor:
    """`down_proj` (m E, D, F), copies E apart, plus noise that sums to zero over the copies of an expert."""
    experts = down_proj.shape[0] // copies
    result = down_proj.clone()
    for expert in range(experts):
        rows = wide(down_proj[expert::experts])  # (m, D, F)
        drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float32).to(rows)
        drawn = (drawn - drawn.mean(0)) * (copies / (copies - 1)) ** 0.5
        result[expert::experts] = (rows + noise * rows[0].std() * drawn).to(result.dtype)
    return result
