"""Capacity: how many tokens of one group an expert may take, and what happens to those that come too late.

An expert takes at most C = max(ceil(capacity_factor * T_g * K / E), min_expert_capacity) of the T_g real tokens of a
group. A group is a sequence, or a document of a packed one, so that nothing depends on the rest of the batch. Slots are
given out token by token: with K > 1 the order of GShard and its successors, first all first choices and then all second
ones, lets a later token take the slot of an earlier one.

Processing overflow "later" has one meaning in a feed-forward layer, further rounds over the experts; their sum is the
dropless result, which is what `capacity_factor=None` computes.

Letters: T tokens, T_g tokens of a group, E experts, K experts per token, C capacity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .configuration_moe import MoEConfig
from .routing import RoutingContext


@dataclass(frozen=True)
class CapacityConvention:
    """How a code base or paper turns a capacity factor into a capacity.

    Attributes:
        capacity: C from (tokens, num_experts, experts_per_token, capacity_factor).
        our_factor: the `capacity_factor` of `MoEConfig` for the same C, up to rounding and minima, from
            (capacity_factor, experts_per_token).
    """

    capacity: Callable[[int, int, int, float], int]
    our_factor: Callable[[float, int], float]


def _same(factor: float, top_k: int) -> float:
    return factor


def _per_token(factor: float, top_k: int) -> float:
    """From a factor of tokens / E to one of choices / E: "top-2 with 1.25" there has slots for 62.5 % of the choices."""
    return factor / top_k


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


CAPACITY_CONVENTIONS: dict[str, CapacityConvention] = {
    "vmoe": CapacityConvention(lambda t, e, k, f: _round_up(math.ceil(t * k * f / e), 4), _same),
    "deepspeed": CapacityConvention(lambda t, e, k, f: max(math.ceil(t / e * k * f), 4), _same),
    "megatron": CapacityConvention(lambda t, e, k, f: math.ceil(t * k / e * f), _same),
    "megablocks": CapacityConvention(lambda t, e, k, f: int(f * k * t / e), _same),
    "fairseq": CapacityConvention(lambda t, e, k, f: 2 * math.ceil(t / e), lambda f, k: 2 / k),
    "flaxformer": CapacityConvention(lambda t, e, k, f: max(round(f * t / e), 4), _per_token),
    "mesh_tensorflow": CapacityConvention(lambda t, e, k, f: max(min(t, int(t * f / e)), 4), _per_token),
    "lingvo": CapacityConvention(lambda t, e, k, f: _round_up(int(t * f / e), 4), _per_token),
    "switch": CapacityConvention(lambda t, e, k, f: int(t / e * f), _per_token),
}


def expert_capacity(
    num_tokens: torch.Tensor, config: MoEConfig, factor: float, num_experts: int | None = None
) -> torch.Tensor:
    """Slots of each expert in a group of `num_tokens` real tokens, in whole tokens, in the shape of `num_tokens`.

    `num_experts` is that of the layer, where layers differ.
    """
    share = num_tokens.float() * (factor * config.num_experts_per_tok / (num_experts or config.num_experts))
    # Less a millionth: 1.2 * 25 * 2 / 4 is a little more than 15 in float32.
    return torch.ceil(share * (1 - 1e-6)).long().clamp_min(config.min_expert_capacity)


def capacity_factor_in_force(context: RoutingContext) -> float | None:
    """The factor of this pass: evaluation is dropless unless it has a factor of its own."""
    config = context.config
    return config.capacity_factor if context.training else config.eval_capacity_factor


@dataclass(frozen=True)
class TokenGroups:
    """The first and last token of each token's group, which tokens are real, and how many of its group are, (T,) each."""

    first: torch.Tensor
    last: torch.Tensor
    real: torch.Tensor
    size: torch.Tensor

    def earlier(self, taken: torch.Tensor) -> torch.Tensor:
        """How many earlier tokens of the group ask for each expert, from who asks for what, both (T, E)."""
        before = taken.cumsum(0) - taken.long()
        return before - before[self.first]

    def total(self, taken: torch.Tensor) -> torch.Tensor:
        """How many tokens of the group ask for each expert, (T, E)."""
        up_to = taken.cumsum(0)
        return up_to[self.last] - up_to[self.first] + taken[self.first].long()

    def ranking(self, scores: torch.Tensor) -> torch.Tensor:
        """The tokens group by group, best first, for each column of `scores` (T, N); earlier ones first among equals."""
        best_first = scores.argsort(dim=0, descending=True, stable=True)
        return best_first.gather(0, self.first[best_first].argsort(dim=0, stable=True))


def token_groups(context: RoutingContext, num_tokens: int, device: torch.device) -> TokenGroups:
    """The sequences of a pass, or the documents of packed ones, as groups of its T tokens."""
    ids = context.document_ids
    if ids is None:
        ids = torch.arange(num_tokens, device=device) // context.sequence_length
    ids = ids.contiguous()
    first, last = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True) - 1
    real = context.token_mask
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
    up_to = real.cumsum(0)
    size = up_to[last] - up_to[first] + real[first].long()
    return TokenGroups(first, last, real, size)


def fit_capacity(
    top_k_index: torch.Tensor, wanted: torch.Tensor | None, scores: torch.Tensor, context: RoutingContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give out the slots of the experts.

    `overflow_policy="drop"`: a choice that finds no free slot is dropped (Switch Transformer, section 2.2,
    https://huggingface.co/papers/2101.03961). `"reroute"`: it goes to the token's next best expert with a free slot; it
    is dropped when none is left.

    Args:
        top_k_index (`torch.Tensor`): choices, best first, (T, K).
        wanted (`torch.Tensor`, *optional*): which of them ask for a slot, (T, K); all when None.
        scores (`torch.Tensor`): what the choice was made by, (T, E); -inf rules an expert out.

    Returns:
        The choices and which of them have a slot, (T, K) each. Padding takes no slot and loses none.
    """
    factor = capacity_factor_in_force(context)
    groups = token_groups(context, len(scores), scores.device)
    capacity = expert_capacity(groups.size, context.config, factor, scores.shape[-1])[:, None]
    if context.config.overflow_policy == "reroute":
        return _reroute(top_k_index, scores, groups, capacity)
    asks = groups.real[:, None].expand(top_k_index.shape) if wanted is None else wanted & groups.real[:, None]
    order = context.config.capacity_order
    if order == "batch_prioritized":
        places = _prioritized_places(top_k_index, asks, scores, groups)
    else:
        place = _choice_major_places if order == "choice_major" else _token_major_places
        places = place(top_k_index, asks, scores.shape[-1], groups)
    kept = places < capacity
    return top_k_index, kept if wanted is None else kept & wanted


def _asked(top_k_index: torch.Tensor, asks: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Which experts each token asks for, (T, E), from its choices and which of them ask, (T, K)."""
    table = torch.zeros(len(top_k_index), num_experts, dtype=torch.bool, device=top_k_index.device)
    return table.scatter(1, top_k_index, asks)


def _token_major_places(top_k_index, asks, num_experts, groups: TokenGroups) -> torch.Tensor:
    """The place of each choice in its expert's queue, from 0, (T, K), when tokens queue one after the other."""
    return groups.earlier(_asked(top_k_index, asks, num_experts)).gather(1, top_k_index)


def _choice_major_places(top_k_index, asks, num_experts, groups: TokenGroups) -> torch.Tensor:
    """The same when all first choices of a group queue before all second ones."""
    places, queued = [], 0
    for index, ask in zip(top_k_index.split(1, dim=1), asks.split(1, dim=1), strict=True):
        taken = _asked(index, ask, num_experts)
        places.append((groups.earlier(taken) + queued).gather(1, index))
        queued = queued + groups.total(taken)
    return torch.cat(places, 1)


def _prioritized_places(top_k_index, asks, scores: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
    """The same in choice-major order when tokens with a higher best score queue first: batch-prioritised routing.

    Source: V-MoE, section 4.1 (https://huggingface.co/papers/2106.05974).
    """
    order = groups.ranking(scores.detach().amax(-1, keepdim=True)).squeeze(1)
    # Tokens change places within their group alone, so its bounds stay.
    places = _choice_major_places(top_k_index[order], asks[order], scores.shape[-1], groups)
    return places[order.argsort()]


def _reroute(
    top_k_index: torch.Tensor, scores: torch.Tensor, groups: TokenGroups, capacity: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token in turn takes the K best experts that have a free slot, computed in rounds over all tokens at once.

    In each round tokens ask for the best experts that have not turned them down, and an expert turns down all but the
    earliest C. This is deferred acceptance (Gale and Shapley 1962, https://doi.org/10.2307/2312726); as all experts
    prefer earlier tokens, its only stable outcome is that of going through the tokens in order.
    """
    scores = scores.detach()
    candidate = scores > -torch.inf  # (T, E)
    while True:
        asks = candidate.gather(1, top_k_index) & groups.real[:, None]  # (T, K)
        asked = _asked(top_k_index, asks, scores.shape[-1])
        refused = asked & (groups.earlier(asked) >= capacity)
        if not refused.any():
            return top_k_index, asks | ~groups.real[:, None]
        candidate = candidate & ~refused
        top_k_index = scores.masked_fill(~candidate, -torch.inf).topk(top_k_index.shape[1], dim=-1).indices
