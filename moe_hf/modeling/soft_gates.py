"""The routers that came before top-k: a weight for every expert, or an independent gate for each.

Letters: T tokens, E experts, R rows.
"""

from typing import Any

import torch
from torch.nn import functional as F

from .configuration_moe import MoEConfig, MoEError
from .routing import Argument, RouterSpec, Routing, RoutingContext, router_scores, wide
from .token_choice import used_rows


def dense(router_logits: torch.Tensor, context: RoutingContext) -> Routing:
    """Every token uses every expert; the weights are the softmax of the logits, times `routed_scaling_factor`.

    It costs E experts per token, and is what sparse routers are measured against.

    Source: Jacobs, Jordan, Nowlan and Hinton, Adaptive Mixtures of Local Experts (Neural Computation 3(1), 1991,
    https://doi.org/10.1162/neco.1991.3.1.79), with the experts' outputs mixed inside the network; for a mixture of
    their likelihoods see `output_mixture`.
    """
    return _every_expert(wide(router_logits), context)


def dense_margin(router_logits: torch.Tensor, context: RoutingContext) -> Routing:
    """`dense`, where in training experts that had more than the others so far are left out.

    With G the mean weights of earlier optimizer steps added up (so a step adds 1 in all), an expert whose G is above the
    mean of G by more than `margin` gets no weight; the others' weights are the softmax over those. As no G is above the
    mean for all experts, one is always open. G moves once per optimizer step (`update_router_state`, which `MoETrainer`
    calls) and is not looked at in evaluation. Set `margin` to a large value for the second phase of the paper.

    Source: Eigen, Ranzato and Sutskever (https://huggingface.co/papers/1312.4314), where G moves with each example.
    """
    logits, observed, stats = wide(router_logits), {}, {}
    if context.training:
        total = context.state["gate_total"]
        closed = total - total.mean() > context.arguments["margin"]
        logits = logits.masked_fill(closed, -torch.inf)
        weights = logits.detach().softmax(-1).float()
        weights = weights if context.token_mask is None else weights[context.token_mask]
        observed = {"gate_sum": weights.sum(0), "tokens": torch.full_like(total, len(weights))}
        stats = {"dropped_share": closed.float().mean(), "experts_per_token": (~closed).float().sum()}
    return _every_expert(logits, context, observed, stats)


def _every_expert(logits: torch.Tensor, context: RoutingContext, observed=None, stats=None) -> Routing:
    index = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
    weights = logits.softmax(-1) * context.config.routed_scaling_factor
    return Routing(top_k_index=index, top_k_weights=weights, stats=stats or {}, observed=observed or {})


def _update_total(state: dict, observed: dict, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"gate_total": state["gate_total"] + observed["gate_sum"] / observed["tokens"].clamp_min(1)}


def bernoulli(router_logits: torch.Tensor, context: RoutingContext) -> Routing:
    """Each expert has a gate of its own, open with the probability p = sigmoid(logit); an open one has weight 1.

    In training gates are drawn; in evaluation those with p > 1/2 are open. A token may use no expert at all. Nothing
    holds the number of open gates but the losses `sparsity_loss` and `gate_variance_loss`. The gradient of a gate is, by
    `estimator`:

    - `"straight_through"`: that of p in place of the drawn 0 or 1. A closed gate's expert is not computed, so such a
      gate gets none: the estimate is biased.
    - `"reinforce"`: none here; the router learns from `policy_gradient_loss` alone, without bias.

    Source: Bengio, Leonard and Courville (https://huggingface.co/papers/1308.3432); Bengio, Bacon, Pineau and Precup
    (https://huggingface.co/papers/1511.06297).
    """
    logits = wide(router_logits)
    opening = router_scores(router_logits, "sigmoid")
    gates = torch.ones_like(opening)
    log_prob = None
    if context.training:
        used = torch.rand_like(opening) < opening.detach()
        if context.arguments["estimator"] == "straight_through":
            gates = gates + (opening - opening.detach())
        log_prob = torch.where(used, F.logsigmoid(logits), F.logsigmoid(-logits)).sum(-1)
    else:
        used = opening > 0.5
    return used_rows(used, gates, context, log_prob=log_prob)


def _check_dense(config: MoEConfig, arguments: dict[str, Any]) -> None:
    if config.num_experts_per_tok != config.num_experts:
        raise MoEError(
            f"router_type={config.router_type!r} uses every expert for every token: set num_experts_per_tok to "
            f"num_experts = {config.num_experts}, and it is {config.num_experts_per_tok}."
        )
    if config.scoring_func != "softmax":
        raise MoEError(f"router_type={config.router_type!r} weights by a softmax: it needs scoring_func='softmax'.")


def _check_bernoulli(config: MoEConfig, arguments: dict[str, Any]) -> None:
    if config.scoring_func != "sigmoid" or config.norm_topk_prob:
        raise MoEError(
            "router_type='bernoulli' has a gate per expert that is open or closed: it needs scoring_func='sigmoid' and "
            "norm_topk_prob=False."
        )
    if arguments["estimator"] == "reinforce" and not config.router_loss_coefs.get("policy_gradient_loss"):
        raise MoEError(
            "estimator='reinforce' gives the router no gradient through its weights: set "
            "router_loss_coefs={'policy_gradient_loss': ...}, or it never learns."
        )


ESTIMATORS = ("straight_through", "reinforce")

DENSE = RouterSpec(dense, options=frozenset({"output_mixture"}), check=_check_dense)
DENSE_MARGIN = RouterSpec(
    dense_margin,
    arguments={"margin": Argument(1.0, "a number >= 0", lambda v: isinstance(v, int | float) and v >= 0)},
    check=_check_dense,
    state=("gate_total",),
    update=_update_total,
)
BERNOULLI = RouterSpec(
    bernoulli,
    arguments={"estimator": Argument("straight_through", f"one of {list(ESTIMATORS)}", lambda v: v in ESTIMATORS)},
    check=_check_bernoulli,
)
