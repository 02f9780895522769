"""Routing: which experts each token uses, and with what weights.

A routing function is pure: `fn(router_logits, context) -> Routing`. `ROUTERS` maps names to functions, and
`register_router` adds one.

Letters: B batch, S sequence, T = B * S tokens, E experts, K experts per token, R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .configuration_moe import MoEConfig, MoEError


@dataclass(frozen=True)
class RoutingContext:
    """What a routing function may know besides the logits.

    Attributes:
        config: the model's configuration.
        layer_index: the decoder layer, from 0.
        hidden_states: the tokens, (T, D).
        training: whether the model is in training mode.
        batch_size, sequence_length: B and S of the batch in this forward pass.
        token_mask: (T,), True for real tokens, or None when there is no padding.
        document_ids: (T,), equal for tokens of one document in one row; None when rows are not packed.
    """

    config: MoEConfig
    layer_index: int
    hidden_states: torch.Tensor
    training: bool
    batch_size: int
    sequence_length: int
    token_mask: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """The choice of a routing function.

    Attributes:
        top_k_index: expert ids, (T, K); always valid ids: a dropped choice has weight 0.
        top_k_weights: mixing weights, (T, K), float32 or wider.
        token_index: for a varying number of experts per token, the token of each of R rows, (R,); the other two are
            then (R, 1).
        stats: figures to report, by name.
    """

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    token_index: torch.Tensor | None = None
    stats: dict[str, torch.Tensor] = field(default_factory=dict)


RoutingFunction = Callable[[torch.Tensor, RoutingContext], Routing]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or in float64 when it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def router_scores(router_logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Scores of the experts per token, (T, E), in float32 or wider: softmax over the experts, or sigmoids."""
    logits = wide(router_logits)
    return logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()


def top_k(router_logits: torch.Tensor, context: RoutingContext) -> Routing:
    """Token choice: each token takes the K experts with the highest scores.

    The weights are the scores, divided by their sum with `norm_topk_prob`, times `routed_scaling_factor`. A token's
    choice depends on that token alone, so it is causal, and nothing is dropped.

    Source: Mixtral, section 2.1 (https://huggingface.co/papers/2401.04088); with sigmoid scores DeepSeek-V3, eq.
    12-16 (https://huggingface.co/papers/2412.19437).
    """
    config = context.config
    scores = router_scores(router_logits, config.scoring_func)  # (T, E)
    weights, index = scores.topk(config.num_experts_per_tok, dim=-1)  # (T, K)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return Routing(top_k_index=index, top_k_weights=weights * config.routed_scaling_factor)


ROUTERS: dict[str, RoutingFunction] = {"top_k": top_k}

# The arguments in `router_kwargs` that each routing function reads.
ROUTER_ARGUMENTS: dict[str, frozenset[str]] = {"top_k": frozenset()}


def register_router(name: str, function: RoutingFunction, arguments: tuple[str, ...] = ()) -> None:
    """Add a routing function under `name`, for `MoEConfig(router_type=name)`.

    Args:
        name (`str`): a name that is not taken.
        function (`Callable`): `fn(router_logits (T, E), context) -> Routing`.
        arguments (`tuple[str]`): the keys of `router_kwargs` that the function reads.

    Raises:
        MoEError: when `name` is taken.
    """
    if name in ROUTERS:
        raise MoEError(f"A router named {name!r} is already registered; choose another name.")
    ROUTERS[name] = function
    ROUTER_ARGUMENTS[name] = frozenset(arguments)


def routing_function(config: MoEConfig) -> RoutingFunction:
    """The function that `config.router_type` names.

    Raises:
        MoEError: for an unknown name, or `router_kwargs` that the function does not read.
    """
    if config.router_type not in ROUTERS:
        raise MoEError(f"router_type is {config.router_type!r}; it must be one of {sorted(ROUTERS)}.")
    known = ROUTER_ARGUMENTS[config.router_type]
    unknown = sorted(set(config.router_kwargs) - known)
    if unknown:
        raise MoEError(
            f"router_kwargs has {unknown}, which router_type={config.router_type!r} does not read; "
            f"it reads {sorted(known) or 'none'}."
        )
    return ROUTERS[config.router_type]
