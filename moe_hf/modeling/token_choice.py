"""Token choice: each token takes the experts that score best for it.

A token's choice depends on that token alone, so every router here is causal. `top_k` with its options is Switch (K = 1,
weights as they are), GLaM, Mixtral, V-MoE and Shazeer's noisy top-k (`router_noise`), and DeepSeek-V3 (sigmoid scores,
`n_group`, a correction bias); `stochastic_top_k` is GShard and ST-MoE; `top_p` is dynamic routing.

Letters: T tokens, E experts, K experts per token, R rows.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from .capacity import capacity_factor_in_force, fit_capacity
from .configuration_moe import MoEConfig, MoEError
from .routing import Argument, RouterSpec, Routing, RoutingContext, router_scores, wide


def choosing_scores(router_logits: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores to choose experts by, and those to weight them by, (T, E) each.

    They differ in what is for choosing only: noise (unless `router_noise_affects="both"`), the correction bias
    (https://huggingface.co/papers/2408.15664), and the limits to groups of experts, which rule experts out with
    -inf: after the bias all scores may be negative.
    """
    config = context.config
    weighing = choosing = router_scores(router_logits, config.scoring_func)
    if context.noise is not None:
        choosing = router_scores(context.noise.logits, config.scoring_func)
        if config.router_noise_affects == "both":
            weighing = choosing
    if context.correction_bias is not None:
        choosing = choosing + context.correction_bias
    if context.open_experts is not None:
        choosing = choosing.masked_fill(~context.open_experts, -torch.inf)
    if config.n_group is not None:
        choosing = _limited_to_groups(choosing, config)
    return choosing, weighing


def _limited_to_groups(scores: torch.Tensor, config: MoEConfig) -> torch.Tensor:
    """Scores with -inf outside the best `topk_group` of `n_group` groups of neighbouring experts.

    A group is as good as the sum of its two best sigmoid scores, or as its best softmax score.

    Source: DeepSeek-V3, section 2.1.2 (https://huggingface.co/papers/2412.19437), and for softmax scores DeepSeek-V2,
    section 2.2.2 (https://huggingface.co/papers/2405.04434).
    """
    groups = scores.detach().unflatten(-1, (config.n_group, -1))  # (T, n_group, E / n_group)
    best = min(2, groups.shape[-1]) if config.scoring_func == "sigmoid" else 1
    chosen = groups.topk(best, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
    allowed = torch.zeros(groups.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, chosen, True)
    return scores.masked_fill(~allowed.repeat_interleave(groups.shape[-1], dim=-1), -torch.inf)


def top_k(router_logits: torch.Tensor, context: RoutingContext) -> Routing:
    """Each token takes the K experts with the highest scores.

    The weights are the scores, divided by their sum with `norm_topk_prob`, times `routed_scaling_factor`. With
    `weight_gradient=False` the router does not learn through them in training, only through its losses, as a policy does that is
    trained by `policy_gradient_loss` and drawn from with `router_noise="gumbel"`. With `spread_ties=True` a token that all
    experts score alike takes those whose turn it is by its place in the sequence, not the first K: so a router of zeros
    gives each expert its share of any text.

    Source: Mixtral, section 2.1 (https://huggingface.co/papers/2401.04088); Switch Transformer, eq. 1-2
    (https://huggingface.co/papers/2101.03961); with sigmoid scores DeepSeek-V3, eq. 12-16
    (https://huggingface.co/papers/2412.19437).
    """
    choosing, weighing = choosing_scores(router_logits, context)
    index = choosing.topk(context.config.num_experts_per_tok, dim=-1).indices  # (T, K)
    if context.arguments.get("spread_ties"):
        index = _spread_ties(index, choosing, context)
    routing = _weighted(index, None, choosing, weighing, context)
    if context.training and not context.arguments.get("weight_gradient", True):
        routing = replace(routing, top_k_weights=routing.top_k_weights.detach())
    if context.noise is not None and "policy_gradient_loss" in context.config.router_loss_coefs:
        logits = wide(router_logits) / context.config.router_noise_scale
        routing = replace(routing, log_prob=order_log_prob(logits, index))
    return routing


def _spread_ties(index: torch.Tensor, choosing: torch.Tensor, context: RoutingContext) -> torch.Tensor:
    """The choices (T, K), of tokens with equal scores for all experts in turn: token 0 has the first K, 1 the next, ..."""
    num_experts, count = choosing.shape[-1], index.shape[-1]
    turns = torch.arange(count, device=index.device) + context.positions[:, None] * count
    is_tied = (choosing == choosing[:, :1]).all(-1, keepdim=True)
    return torch.where(is_tied, turns % num_experts, index)


def order_log_prob(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability to draw experts in this order without replacement, (T,): Plackett and Luce.

    Each is drawn from the softmax of those that are left, which is what the K highest of logits with gumbel noise are
    (https://huggingface.co/papers/1903.06059).

    Args:
        logits (`torch.Tensor`): (T, E).
        index (`torch.Tensor`): the experts, first drawn first, (T, K).
    """
    total = logits.new_zeros(len(logits))
    for choice in index.split(1, dim=1):
        total = total + (logits.gather(1, choice) - logits.logsumexp(-1, keepdim=True)).squeeze(1)
        logits = logits.scatter(1, choice, -torch.inf)
    return total


def stochastic_top_k(router_logits: torch.Tensor, context: RoutingContext) -> Routing:
    """Each token takes its best expert, and up to K - 1 others according to `policy`.

    With g the scores of a token's K experts, divided by their sum where that happens before the drop:

    - `"random"`: each other expert is used with probability min(1, g / threshold).
    - `"threshold"`: each other expert is used when g > threshold; in evaluation too, as nothing is drawn.
    - `"sampling"`: the others are drawn without replacement, in proportion to the scores.

    Nothing is drawn in evaluation: `"random"` and `"sampling"` then use the K best.

    Source: GShard, section 2.2, random routing (https://huggingface.co/papers/2006.16668), which is `"random"` with
    threshold 0.5; ST-MoE, appendix G (https://huggingface.co/papers/2202.08906), threshold 0.2.
    """
    config, arguments = context.config, context.arguments
    choosing, weighing = choosing_scores(router_logits, context)
    index = choosing.topk(config.num_experts_per_tok, dim=-1).indices  # (T, K)
    policy, threshold = arguments["policy"], arguments["threshold"]
    if policy == "sampling" and context.training:
        gumbel = -torch.empty_like(choosing).exponential_().log()
        draws = (choosing.detach().log() + gumbel).scatter(1, index[:, :1], torch.inf)
        index = draws.topk(config.num_experts_per_tok, dim=-1).indices
    wanted = None
    if policy == "threshold" or (policy == "random" and context.training):
        share = weighing.detach().gather(1, index)
        if config.norm_topk_prob and arguments["renormalise"] == "before":
            share = share / share.sum(-1, keepdim=True).clamp_min(1e-20)
        bar = threshold * torch.rand_like(share) if policy == "random" else threshold
        wanted = share > bar
        wanted = torch.cat([torch.ones_like(wanted[:, :1]), wanted[:, 1:]], 1)
    return _weighted(index, wanted, choosing, weighing, context)


def top_p(router_logits: torch.Tensor, context: RoutingContext) -> Routing:
    """Each token takes its best experts until their probabilities add up to `top_p`, the crossing one included.

    The weights are the probabilities (divided by their sum with `norm_topk_prob=True`), times `routed_scaling_factor`.
    Only chosen pairs are computed: the result is rows of one expert each.

    Source: Huang et al., dynamic routing (https://huggingface.co/papers/2403.07652).
    """
    config, arguments = context.config, context.arguments
    choosing, weighing = choosing_scores(router_logits, context)
    most = min(arguments["max_experts"] or config.num_experts, router_logits.shape[-1])
    probabilities, index = choosing.detach().topk(most, dim=-1)  # descending
    # An expert is used when those before it do not reach p.
    before = F.pad(probabilities.cumsum(-1)[:, :-1], (1, 0))
    used = before < arguments["top_p"]
    used[:, : arguments["min_experts"]] = True
    weights = weighing.gather(1, index) * used
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    token, choice = used.nonzero(as_tuple=True)
    return Routing(
        top_k_index=index[token, choice][:, None],
        top_k_weights=weights[token, choice][:, None] * config.routed_scaling_factor,
        token_index=token,
        stats={"experts_per_token": mean_count(used, context)},
    )


def used_rows(
    used: torch.Tensor,
    weights: torch.Tensor,
    context: RoutingContext,
    observed: dict[str, torch.Tensor] | None = None,
    log_prob: torch.Tensor | None = None,
) -> Routing:
    """Rows of one expert each from who uses whom, (T, E), and the experts' weights, (T, E).

    The weights are divided by their sum over the used ones with `norm_topk_prob=True`, and multiplied by
    `routed_scaling_factor`. The figures are of real tokens; padding may use experts too.
    """
    config = context.config
    if config.norm_topk_prob:
        weights = weights / (weights * used).sum(-1, keepdim=True).clamp_min(1e-20)
    # Where no expert is used at all one is called for nothing, so that the parameters get a gradient, of zero.
    at_first = torch.zeros_like(used)
    at_first[0, 0] = True
    token, expert = (used | (at_first & ~used.any())).nonzero(as_tuple=True)
    weights = weights * used
    unused = mean_count(~used.any(-1, keepdim=True), context)
    return Routing(
        top_k_index=expert[:, None],
        top_k_weights=weights[token, expert][:, None] * config.routed_scaling_factor,
        token_index=token,
        stats={"experts_per_token": mean_count(used, context), "unserved_share": unused},
        log_prob=log_prob,
        observed=observed or {},
    )


def _weighted(
    index: torch.Tensor,
    wanted: torch.Tensor | None,
    choosing: torch.Tensor,
    weighing: torch.Tensor,
    context: RoutingContext,
) -> Routing:
    """Fit the choices (T, K) into the experts' capacity and weight them; what is not `wanted` or has no slot weighs 0."""
    config, kept, stats, preferred = context.config, wanted, {}, None
    if capacity_factor_in_force(context) is not None:
        preferred = index if config.overflow_policy == "reroute" else None
        index, kept = fit_capacity(index, wanted, choosing, context)
        asked = mean_count(torch.ones_like(kept) if wanted is None else wanted, context)
        stats["dropped_share"] = 1 - mean_count(kept, context) / asked
    scores = used = weighing.gather(1, index)  # (T, K)
    if kept is not None:
        used = scores * kept
        stats["experts_per_token"] = mean_count(kept, context)
    weights = used
    if config.norm_topk_prob:
        # An expert that takes over from a full one is among those that the sum is about.
        is_before = context.arguments["renormalise"] == "before" and config.overflow_policy == "drop"
        weights = used / (scores if is_before else used).sum(-1, keepdim=True).clamp_min(1e-20)
    weights = weights * config.routed_scaling_factor
    return Routing(top_k_index=index, top_k_weights=weights, preferred_index=preferred, stats=stats)


def mean_count(used: torch.Tensor, context: RoutingContext) -> torch.Tensor:
    """How many of (T, K) choices are used per real token, a scalar."""
    count = used.sum(-1).float()
    mask = context.token_mask
    return count.mean() if mask is None else (count * mask).sum() / mask.sum().clamp_min(1)


def _check_stochastic(config: MoEConfig, arguments: dict[str, Any]) -> None:
    if config.num_experts_per_tok < 2:
        raise MoEError("router_type='stochastic_top_k' decides about the second expert: num_experts_per_tok >= 2.")
    if config.overflow_policy == "reroute":
        raise MoEError(
            "overflow_policy='reroute' sends a choice to the next best expert, and router_type='stochastic_top_k' does "
            "not choose the best ones: use 'drop', or router_type='top_k'."
        )


def _check_top_p(config: MoEConfig, arguments: dict[str, Any]) -> None:
    if config.scoring_func != "softmax":
        raise MoEError("router_type='top_p' adds up probabilities: it needs scoring_func='softmax'.")
    most = arguments["max_experts"] or config.num_experts
    if not arguments["min_experts"] <= most <= config.num_experts:
        raise MoEError(
            f"router_kwargs: min_experts={arguments['min_experts']} and max_experts={most} must be in order, and at "
            f"most num_experts={config.num_experts}."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


RENORMALISE = Argument("before", "'before' or 'after' the drop", lambda v: v in ("before", "after"))
POLICIES = ("random", "threshold", "sampling")
# A share is at most 1, and a threshold of 0 would use every expert.
THRESHOLD = Argument(0.2, "in (0, 1]", lambda v: isinstance(v, int | float) and 0 < v <= 1)

TOP_K = RouterSpec(
    top_k,
    arguments={
        "renormalise": RENORMALISE,
        "weight_gradient": Argument(True, "True or False", lambda v: isinstance(v, bool)),
        "spread_ties": Argument(False, "True or False", lambda v: isinstance(v, bool)),
    },
    options=frozenset({"noise", "groups", "capacity", "correction_bias", "expert_groups", "structure"}),
)
STOCHASTIC_TOP_K = RouterSpec(
    stochastic_top_k,
    arguments={
        "policy": Argument("random", f"one of {list(POLICIES)}", lambda v: v in POLICIES),
        "threshold": THRESHOLD,
        "renormalise": RENORMALISE,
    },
    options=frozenset({"noise", "capacity", "structure"}),
    check=_check_stochastic,
)
TOP_P = RouterSpec(
    top_p,
    arguments={
        "top_p": Argument(0.4, "in (0, 1]", lambda v: isinstance(v, int | float) and 0 < v <= 1),
        "min_experts": Argument(1, "a whole number >= 1", _is_count),
        "max_experts": Argument(None, "a whole number >= 1, or None for all", lambda v: v is None or _is_count(v)),
    },
    options=frozenset({"noise", "structure"}),
    check=_check_top_p,
)
