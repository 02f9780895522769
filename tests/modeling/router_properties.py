"""Every router with every option, one row each: how it is configured, what it declares, and its naive reference.

A router joins `test_router_properties.py` by one row of `CASES`. A reference goes through tokens and experts one by one:
`reference(scores, groups, config) -> [[(expert, weight), ...] per token]` from the scores (T, E) in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.modeling.moe_block import Router
from tests.tiny_models import randomise_, tiny_config


NUM_EXPERTS = 8
# The correction bias that every router has which can have one.
BIAS = torch.tensor([0.3, -0.2, 0.1, 0.0, -0.3, 0.2, -0.1, 0.05])
Choices = list[list[tuple[int, torch.Tensor]]]


def one(total: torch.Tensor, config: MoEConfig) -> bool:
    """The weights of a token sum to `routed_scaling_factor`."""
    return torch.allclose(total, torch.full_like(total, config.routed_scaling_factor), atol=1e-5)


def at_most_one(total: torch.Tensor, config: MoEConfig) -> bool:
    """The weights of a token sum to less than 1 for some token, and to more for none."""
    return bool((total <= 1 + 1e-5).all() and (total < 0.999).any() and (total >= 0).all())


def one_or_none(total: torch.Tensor, config: MoEConfig) -> bool:
    """The weights of a token sum to 1, or, when all of its choices were dropped, to 0."""
    return bool(((total - 1).abs() < 1e-5).logical_or(total == 0).all())


@dataclass(frozen=True)
class RouterCase:
    """One router with one set of options.

    Attributes:
        fields: fields of `MoEConfig`.
        reference: naive choices and weights from float64 scores; in training mode, unless it draws there.
        draws: whether training draws random numbers; evaluation never does.
        counts_tokens: whether, in training, a token's experts depend on how many tokens its sequence has.
        leaks_in_training: whether, in training, later tokens change earlier ones; then `allow_noncausal_routing` is set.
        refuses_cache: whether decoding with a cache is refused.
        weights_sum: what the weights of a token sum to, in training.
        compiles: whether the model compiles as one graph.
        upcycles_exactly: whether copies of a dense MLP give the dense model, in evaluation.
    """

    fields: dict[str, Any]
    reference: Callable[[torch.Tensor, list[list[int]], MoEConfig], Choices]
    draws: bool = False
    counts_tokens: bool = False
    leaks_in_training: bool = False
    refuses_cache: bool = False
    weights_sum: Callable[[torch.Tensor, MoEConfig], bool] = one
    compiles: bool = False
    upcycles_exactly: bool = True

    def config(self, layers: int = 3) -> MoEConfig:
        """The configuration of a tiny llama with this router."""
        dense = tiny_config("llama", num_hidden_layers=layers)
        return MoEConfig(text_config=dense, **{"num_experts": NUM_EXPERTS, **self.fields})

    def model(self, layers: int = 3) -> MoEForCausalLM:
        """A tiny model with random weights, router parameters included."""
        model = MoEForCausalLM(self.config(layers))
        randomise_(model)
        return set_bias(model)


def set_bias(model: nn.Module) -> nn.Module:
    """Give the routers in `model` the correction bias `BIAS`, where their configuration asks for one."""
    for router in model.modules():
        if isinstance(router, Router) and router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(BIAS)
    return model


def _open_experts(scores: list[float], config: MoEConfig) -> list[int]:
    """The experts of the best groups; all without groups."""
    if config.n_group is None:
        return list(range(len(scores)))
    size = len(scores) // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]

    def quality(group: list[int]) -> float:
        best = sorted((scores[e] for e in group), reverse=True)
        return sum(best[:2]) if config.scoring_func == "sigmoid" else best[0]

    return [e for group in sorted(groups, key=quality, reverse=True)[: config.topk_group] for e in group]


def _capacity(group: list[int], config: MoEConfig) -> int:
    fair = config.capacity_factor * len(group) * config.num_experts_per_tok / config.num_experts
    return max(math.ceil(fair - 1e-9), config.min_expert_capacity)


def _weigh(
    chosen: list[int], counted: list[int], scores: torch.Tensor, config: MoEConfig
) -> list[tuple[int, torch.Tensor]]:
    """Weights of the `chosen` experts of one token; with normalisation their sum is over the `counted` ones."""
    total = sum(scores[e] for e in counted) if config.norm_topk_prob else 1.0
    return [(e, scores[e] / total * config.routed_scaling_factor) for e in chosen]


def top_k(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """Top-k with a correction bias, groups of experts and capacity, token by token."""
    result: Choices = [[] for _ in scores]
    after = config.router_kwargs.get("renormalise") == "after" or config.overflow_policy == "reroute"
    for group in groups:
        slots = [len(scores)] * config.num_experts
        if config.capacity_factor is not None:
            slots = [_capacity(group, config)] * config.num_experts
        for token in group:
            values = scores[token].tolist()
            if config.balance_strategy == "bias":
                values = [score + bias for score, bias in zip(values, BIAS.tolist(), strict=True)]
            ranked = sorted(_open_experts(values, config), key=values.__getitem__, reverse=True)
            wanted = ranked[: config.num_experts_per_tok]
            if config.overflow_policy == "reroute":
                wanted = [e for e in ranked if slots[e] > 0][: config.num_experts_per_tok]
            kept = [e for e in wanted if slots[e] > 0]
            for expert in kept:
                slots[expert] -= 1
            result[token] = _weigh(kept, kept if after else wanted, scores[token], config)
    return result


def choice_major(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """Top-k where all first choices of a group are served before all second ones."""
    order = scores.argsort(-1, descending=True).tolist()
    kept: list[list[int]] = [[] for _ in order]
    for group in groups:
        slots = [_capacity(group, config)] * config.num_experts
        for rank in range(config.num_experts_per_tok):
            for token in group:
                expert = order[token][rank]
                if slots[expert] > 0:
                    slots[expert] -= 1
                    kept[token].append(expert)
    wanted = [row[: config.num_experts_per_tok] for row in order]
    return [_weigh(kept[t], wanted[t], scores[t], config) for t in range(len(order))]


def threshold(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """The best expert always, the others of the top K where their share of the K is above a threshold."""
    result: Choices = []
    bar, after = config.router_kwargs["threshold"], config.router_kwargs.get("renormalise") == "after"
    for row, values in zip(scores, scores.tolist(), strict=True):
        wanted = sorted(range(len(values)), key=values.__getitem__, reverse=True)[: config.num_experts_per_tok]
        total = 1.0 if after else sum(values[e] for e in wanted)
        kept = [e for rank, e in enumerate(wanted) if rank == 0 or values[e] / total > bar]
        result.append(_weigh(kept, kept if after else wanted, row, config))
    return result


def top_p(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """Experts from the best on, until their probabilities reach p."""
    arguments = {"top_p": 0.4, "min_experts": 1, "max_experts": config.num_experts} | config.router_kwargs
    result: Choices = []
    for row, values in zip(scores, scores.tolist(), strict=True):
        chosen, mass = [], 0.0
        for expert in sorted(range(len(values)), key=values.__getitem__, reverse=True)[: arguments["max_experts"]]:
            if mass >= arguments["top_p"] and len(chosen) >= arguments["min_experts"]:
                break
            chosen.append(expert)
            mass += values[expert]
        result.append(_weigh(chosen, chosen, row, config))
    return result


TIGHT = {"capacity_factor": 0.6, "min_expert_capacity": 1}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
STOCHASTIC = {"router_type": "stochastic_top_k"}

CASES: dict[str, RouterCase] = {
    "top_k": RouterCase({}, top_k, compiles=True),
    "switch": RouterCase({"num_experts_per_tok": 1}, top_k, weights_sum=at_most_one, upcycles_exactly=False),
    "unnormalised": RouterCase(
        {"norm_topk_prob": False, "num_experts_per_tok": 3}, top_k, weights_sum=at_most_one, upcycles_exactly=False
    ),
    "sigmoid": RouterCase({"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}, top_k),
    "groups_sigmoid": RouterCase({"scoring_func": "sigmoid", **GROUPS}, top_k, compiles=True),
    "groups_softmax": RouterCase(GROUPS, top_k),
    "bias": RouterCase({"balance_strategy": "bias"}, top_k),
    "deepseek_v3": RouterCase(
        {"scoring_func": "sigmoid", "balance_strategy": "bias", "routed_scaling_factor": 2.5, **GROUPS}, top_k
    ),
    "jitter": RouterCase({"router_jitter_noise": 0.3}, top_k, draws=True),
    "gaussian": RouterCase({"router_noise": "gaussian", "router_noise_scale": 8.0}, top_k, draws=True),
    "uniform": RouterCase({"router_noise": "uniform"}, top_k, draws=True),
    "gumbel": RouterCase({"router_noise": "gumbel"}, top_k, draws=True),
    "shazeer": RouterCase({"router_noise": "learned", "router_noise_affects": "both"}, top_k, draws=True),
    "drop": RouterCase(TIGHT, top_k, counts_tokens=True, weights_sum=at_most_one, compiles=True),
    "drop_after": RouterCase(
        TIGHT | {"router_kwargs": {"renormalise": "after"}}, top_k, counts_tokens=True, weights_sum=one_or_none
    ),
    "drop_three": RouterCase(TIGHT | {"num_experts_per_tok": 3}, top_k, counts_tokens=True, weights_sum=at_most_one),
    "drop_fixed_capacity": RouterCase(
        {"capacity_factor": 0.01, "min_expert_capacity": 3}, top_k, weights_sum=at_most_one
    ),
    "drop_groups": RouterCase(TIGHT | GROUPS, top_k, counts_tokens=True, weights_sum=at_most_one),
    "reroute": RouterCase(TIGHT | {"overflow_policy": "reroute", "capacity_factor": 1.1}, top_k, counts_tokens=True),
    "reroute_scarce": RouterCase(
        TIGHT | {"overflow_policy": "reroute"}, top_k, counts_tokens=True, weights_sum=one_or_none
    ),
    "reroute_groups": RouterCase(
        TIGHT | GROUPS | {"overflow_policy": "reroute"}, top_k, counts_tokens=True, weights_sum=one_or_none
    ),
    "choice_major": RouterCase(
        TIGHT | {"capacity_order": "choice_major", "allow_noncausal_routing": True},
        choice_major,
        counts_tokens=True,
        leaks_in_training=True,
        weights_sum=at_most_one,
    ),
    "eval_capacity": RouterCase(
        TIGHT | {"eval_capacity_factor": 0.6},
        top_k,
        counts_tokens=True,
        refuses_cache=True,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
    "gshard": RouterCase(
        {**STOCHASTIC, "router_kwargs": {"policy": "random", "threshold": 0.5}},
        top_k,
        draws=True,
        weights_sum=at_most_one,
    ),
    "st_moe": RouterCase({**STOCHASTIC, "num_experts_per_tok": 3}, top_k, draws=True, weights_sum=at_most_one),
    "threshold": RouterCase(
        {**STOCHASTIC, "num_experts_per_tok": 3, "router_kwargs": {"policy": "threshold", "threshold": 0.3}},
        threshold,
        weights_sum=at_most_one,
        compiles=True,
        upcycles_exactly=False,
    ),
    "threshold_after": RouterCase(
        {**STOCHASTIC, "router_kwargs": {"policy": "threshold", "threshold": 0.25, "renormalise": "after"}}, threshold
    ),
    "sampling": RouterCase({**STOCHASTIC, "router_kwargs": {"policy": "sampling"}}, top_k, draws=True),
    "gshard_capacity": RouterCase(
        TIGHT | STOCHASTIC | {"router_kwargs": {"threshold": 0.5}},
        top_k,
        draws=True,
        counts_tokens=True,
        weights_sum=at_most_one,
    ),
    "top_p": RouterCase({"router_type": "top_p"}, top_p, weights_sum=at_most_one, upcycles_exactly=False),
    "top_p_limits": RouterCase(
        {"router_type": "top_p", "router_kwargs": {"top_p": 0.7, "min_experts": 2, "max_experts": 3}},
        top_p,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
    "top_p_normalised": RouterCase({"router_type": "top_p", "norm_topk_prob": True}, top_p),
    "top_p_gumbel": RouterCase(
        {"router_type": "top_p", "router_noise": "gumbel"},
        top_p,
        draws=True,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
}
