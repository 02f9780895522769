"""Expert choice: each expert takes the tokens that score best for it, so all of them are equally busy.

`expert_choice` looks at the whole sequence, so it is not causal. `expert_threshold` is its causal counterpart: an expert
takes the tokens that score above a threshold, which follows what would have been taken in earlier batches.

Letters: T tokens, T_g tokens of a group, E experts, K experts per token on average, C capacity, R rows.
"""

import math
from typing import Any

import torch

from .capacity import token_groups
from .configuration_moe import MoEConfig, MoEError
from .routing import Argument, RouterSpec, Routing, RoutingContext, router_scores
from .token_choice import used_rows


def expert_choice(router_logits: torch.Tensor, context: RoutingContext) -> Routing:
    """Each expert takes the C = ceil(K * T_g / E) tokens of a group that score best for it.

    A group is a sequence, or a document of a packed one. A token is used by 0 to E experts, K on average. The weights
    are the scores (divided by their sum with `norm_topk_prob=True`), times `routed_scaling_factor`.

    Whether a token is among the best depends on the tokens after it, so the loss of a causal language model means
    nothing: it is for encoders, embeddings, and the like.

    Source: Zhou et al., section 3.2 (https://huggingface.co/papers/2202.09368), with groups of one sequence, where the
    paper's are of a batch.
    """
    config = context.config
    scores = router_scores(router_logits, config.scoring_func)  # (T, E)
    groups = token_groups(context, len(scores), scores.device)
    capacity = (groups.size * config.num_experts_per_tok + scores.shape[-1] - 1) // scores.shape[-1]
    may = groups.real[:, None].expand_as(scores)
    if context.open_experts is not None:
        may = may & context.open_experts
    # What may not be taken comes last in its group.
    order = groups.ranking(scores.detach().masked_fill(~may, -torch.inf))
    rank = torch.arange(len(scores), device=scores.device)[:, None].expand_as(order)
    place = torch.empty_like(order).scatter(0, order, rank) - groups.first[:, None]
    return used_rows((place < capacity[:, None]) & may, scores, context)


def expert_threshold(router_logits: torch.Tensor, context: RoutingContext) -> Routing:
    """Each expert takes the tokens whose score for it is at least its threshold; a token's choice is its own.

    The thresholds start at 1 / E and follow, as moving averages, the lowest score with which a token would have been
    among the K / E of a batch that score best for the expert. They are saved with the model and move in training only,
    once per optimizer step (`update_router_state`, which `MoETrainer` calls). A token is used by 0 to E experts, K on
    average.

    Source: Sun et al., expert threshold routing (https://huggingface.co/papers/2603.11535).
    """
    config = context.config
    scores = router_scores(router_logits, config.scoring_func)  # (T, E)
    used = scores.detach() >= 1 / scores.shape[-1] + context.state["threshold_shift"]
    if context.open_experts is not None:
        used = used & context.open_experts
    observed = {}
    if context.training:
        real = scores.detach() if context.token_mask is None else scores.detach()[context.token_mask]
        capacity = math.ceil(len(real) * config.num_experts_per_tok / scores.shape[-1])
        lowest = real.topk(capacity, dim=0).values[-1:].sum(0).float()  # (E,), zeros without tokens
        observed = {"lowest_score": lowest * len(real), "tokens": torch.full_like(lowest, len(real))}
    return used_rows(used, scores, context, observed)


def _update_threshold(state: dict, observed: dict, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """threshold <- momentum * threshold + (1 - momentum) * the lowest score, averaged over the step's tokens."""
    shift, tokens = state["threshold_shift"], observed["tokens"]
    target = observed["lowest_score"] / tokens.clamp_min(1) - 1 / len(shift)
    return {"threshold_shift": torch.where(tokens > 0, shift.lerp(target, 1 - arguments["momentum"]), shift)}


def _check_softmax(config: MoEConfig, arguments: dict[str, Any]) -> None:
    if config.scoring_func != "softmax":
        raise MoEError(
            "router_type='expert_threshold' starts at a threshold of 1 / E: it needs scoring_func='softmax'."
        )


EXPERT_CHOICE = RouterSpec(expert_choice, causal=False)
EXPERT_THRESHOLD = RouterSpec(
    expert_threshold,
    arguments={"momentum": Argument(0.9, "in [0, 1)", lambda v: isinstance(v, int | float) and 0 <= v < 1)},
    check=_check_softmax,
    state=("threshold_shift",),
    update=_update_threshold,
)
