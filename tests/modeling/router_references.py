"""Naive references of the routers, one per way to choose: through tokens and experts one by one, in float64.

`reference(scores, groups, config) -> [[(expert, weight), ...] per token]` from the scores (T, E) and the tokens of each
sequence.
"""

import math

import torch

from moe_hf import MoEConfig


# The correction bias, and the state, that every router has which can have one.
BIAS = torch.tensor([0.3, -0.2, 0.1, 0.0, -0.3, 0.2, -0.1, 0.05])
Choices = list[list[tuple[int, torch.Tensor]]]


def _open_experts(scores: list[float], config: MoEConfig) -> list[int]:
    """The experts of the best groups; without groups all that the token's ids do not close, which scores exactly 0."""
    if config.n_group is None:
        return [e for e, score in enumerate(scores) if score > 0 or not config.expert_groups]
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
        slots = [len(scores)] * scores.shape[-1]
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


def segments(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """Every expert, by the mean logits of the previous segment; the logarithms of softmax scores do for logits."""
    experts, length = range(config.num_experts), config.router_kwargs["segment_length"]
    result: Choices = [[] for _ in scores]
    for group in groups:
        mixture = torch.full_like(scores[0], 1 / config.num_experts)
        for first in range(0, len(group), length):
            segment = group[first : first + length]
            for token in segment:
                result[token] = [(e, mixture[e]) for e in experts]
            # Softmax takes no notice of the constant that a logarithm of scores differs from a logit by.
            mixture = torch.stack([scores[token].log() for token in segment]).mean(0).softmax(0)
    return result


def prioritized(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """First choices before second ones, and among them those of tokens with a higher best score first."""
    best = scores.max(-1).values.tolist()
    return choice_major(scores, [sorted(group, key=best.__getitem__, reverse=True) for group in groups], config)


def expert_choice(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """Every expert takes its best tokens of each group."""
    result: Choices = [[] for _ in scores]
    for group in groups:
        capacity = math.ceil(config.num_experts_per_tok * len(group) / config.num_experts)
        for expert in range(config.num_experts):
            column = scores[:, expert].tolist()
            for token in sorted(group, key=column.__getitem__, reverse=True)[:capacity]:
                result[token].append((expert, scores[token, expert]))
    return result


def expert_threshold(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """Every expert takes the tokens that score at least its threshold."""
    bars = (BIAS + 1 / config.num_experts).tolist()
    return [[(e, row[e]) for e, bar in enumerate(bars) if row[e] >= bar] for row in scores]


def load_aware(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """The K highest of logit - strength * E * surplus; logarithms of softmax scores do for logits."""
    result: Choices = []
    for row in scores:
        lowered = (row.log() - config.router_kwargs["strength"] * config.num_experts * BIAS).tolist()
        chosen = sorted(range(len(lowered)), key=lowered.__getitem__, reverse=True)[: config.num_experts_per_tok]
        result.append(_weigh(chosen, chosen, row, config))
    return result


def dense(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """Every expert; with a margin, those that did not have more than the mean by it."""
    over = BIAS - BIAS.mean()
    margin = config.router_kwargs.get("margin", math.inf)
    chosen = [e for e in range(config.num_experts) if over[e] <= margin]
    return [_weigh(chosen, chosen, row, config) for row in scores]


def open_gates(scores: torch.Tensor, groups: list[list[int]], config: MoEConfig) -> Choices:
    """Every expert whose gate is more likely open than closed, unweighted."""
    return [[(e, torch.ones(())) for e in range(config.num_experts) if row[e] > 0.5] for row in scores]
