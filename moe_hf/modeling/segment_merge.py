"""Segment routing with soft merging: the tokens of a segment share one expert, whose weights are a mixture of all.

A segment is `segment_length` neighbouring tokens of a sequence (of a document, when packed), padding not counted. The
tokens of one segment decide the mixture of the next one, and the first segment has equal parts of all experts: a token
depends on earlier segments and its own alone, and nothing is dropped. The arithmetic is that of one dense MLP, plus
merging E experts once per segment of a forward pass: when decoding with a cache, once per token.

Letters: B batch, T tokens, D model width, E experts, N segments.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .configuration_moe import MoEConfig, MoEError
from .dense_mlp import MLPSite
from .experts import Experts
from .routing import Argument, RouterSpec, Routing, RoutingContext
from .routing_ids import in_first_document


# The paper's, in tokens.
SEGMENT_LENGTH = 256


def segment_merge(router_logits: torch.Tensor, context: RoutingContext) -> Routing:
    """e_n = softmax(mean of the logits of segment n - 1), and segment n runs through the expert sum_i e_n,i theta_i.

    With a linear router the mean of the logits is the logits of the mean hidden state. `first_segment` is `"uniform"`,
    or `"self"`: its own mean without a gradient, as in the paper, where early tokens see later ones of that segment.

    Source: Lory, section 3 (https://huggingface.co/papers/2405.03133); merging weights is SMEAR's
    (https://huggingface.co/papers/2306.03745).
    """
    num_experts = router_logits.shape[-1]
    spans = _segments(context, len(router_logits), router_logits.device)
    segment, real = spans.segment, spans.real
    # At most T segments: rows without tokens stay zero.
    total = torch.zeros_like(router_logits).index_add(0, segment, router_logits * real[:, None])
    count = torch.zeros_like(router_logits[:, 0]).index_add(0, segment, real.to(router_logits.dtype))
    carried = context.carried or {}
    if carried:
        first = segment.view(context.batch_size, -1)[:, 0]  # (B,), continued from the tokens before
        total = total.index_add(0, first, carried["segment_sum"].to(total))
        started = carried["tokens"] % context.arguments["segment_length"]
        count = count.index_add(0, first, started.to(count))
    mean = total / count.clamp_min(1)[:, None]  # (N, E)
    before = mean.roll(1, 0)  # of the segment before each, (N, E)
    if carried:
        before = before.index_copy(0, first, carried["mean_before"].to(before))
    if context.arguments["first_segment"] == "self":
        at_first = mean.detach()[segment].softmax(-1)
    else:
        at_first = torch.full_like(router_logits, 1 / num_experts)
    weights = torch.where(spans.is_first[:, None], at_first, before[segment].softmax(-1))  # (T, E)
    index = torch.arange(num_experts, device=router_logits.device).expand_as(weights)
    carry = {} if context.carried is None else _carry(spans, total, mean, before, context)
    return Routing(top_k_index=index, top_k_weights=weights, segment_index=segment, carry=carry)


def _carry(
    spans: "_Segments", total: torch.Tensor, mean: torch.Tensor, before: torch.Tensor, context: RoutingContext
) -> dict[str, torch.Tensor]:
    """What the segments after this forward pass need: the number of tokens of each row so far, the sum of the logits of
    its last segment when that is not full, and the mean logits of the full one before."""
    segment, place, real = (
        values.view(context.batch_size, -1)[:, -1] for values in (spans.segment, spans.place, spans.real)
    )
    tokens = place + real
    is_full = (real & (tokens % context.arguments["segment_length"] == 0))[:, None]
    return {
        "tokens": tokens,
        "segment_sum": total[segment].masked_fill(is_full, 0),
        "mean_before": torch.where(is_full, mean[segment], before[segment]),
    }


@dataclass(frozen=True)
class _Segments:
    """For each token, (T,): its segment, from 0 and not falling; the number of real tokens of its document before it;
    whether the segment is its document's first; whether the token is real."""

    segment: torch.Tensor
    place: torch.Tensor
    is_first: torch.Tensor
    real: torch.Tensor


def _segments(context: RoutingContext, num_tokens: int, device: torch.device) -> _Segments:
    sequence = context.document_ids
    if sequence is None:
        sequence = torch.arange(num_tokens, device=device) // context.sequence_length
    sequence = sequence.contiguous()
    real = context.token_mask
    real = torch.ones_like(sequence, dtype=torch.bool) if real is None else real.bool()
    before = real.cumsum(0) - real.long()
    place = before - before[torch.searchsorted(sequence, sequence)]
    if context.carried:
        earlier = context.carried["tokens"].repeat_interleave(num_tokens // context.batch_size)
        place = place + earlier * in_first_document(sequence, context.batch_size)
    number = place // context.arguments["segment_length"]
    starts = (number[1:] != number[:-1]) | (sequence[1:] != sequence[:-1])
    return _Segments(F.pad(starts.cumsum(0), (1, 0)), place, number == 0, real)


class MergedExperts(Experts):
    """Experts whose weights are mixed, once per segment, in place of their outputs."""

    def forward(
        self,
        hidden_states: torch.Tensor,  # (T, D)
        top_k_index: torch.Tensor,  # (T, K)
        top_k_weights: torch.Tensor,  # (T, K), equal in all rows of a segment
        segment_index: torch.Tensor,  # (T,), not falling
    ) -> torch.Tensor:
        """(T, D) -> (T, D). Biases are mixed as weights are."""
        counts = torch.unique_consecutive(segment_index, return_counts=True)[1]
        first = counts.cumsum(0) - counts
        mixtures = top_k_weights.new_zeros(len(first), self.num_experts)
        mixtures = mixtures.scatter(1, top_k_index[first], top_k_weights[first])  # (N, E)
        parts = hidden_states.split(counts.tolist())
        return torch.cat([self._run(part, mixture) for part, mixture in zip(parts, mixtures, strict=True)])

    def _run(self, hidden_states: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
        """All of `hidden_states` through the one expert of `mixture`, (E,)."""
        first = "gate_up_proj" if self.has_gate else "up_proj"
        weights, biases = {}, {}
        # Autocast would round the mixture, and the merged weights, before they are used.
        with torch.autocast(hidden_states.device.type, enabled=False):
            for name in (first, "down_proj"):
                weight = getattr(self, name)
                weights[name] = torch.tensordot(mixture.to(weight.dtype), weight, dims=1)
                bias = getattr(self, f"{name}_bias") if self.has_bias else None
                biases[name] = None if bias is None else mixture.to(bias.dtype) @ bias
        hidden = F.linear(hidden_states, weights[first], biases[first])
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        return F.linear(hidden, weights["down_proj"], biases["down_proj"]).to(hidden_states.dtype)


def make_merged_experts(config: MoEConfig, site: MLPSite, act_fn) -> MergedExperts:
    """Build the experts of the layer at `site`, to be merged."""
    experts = MergedExperts(config, site, act_fn)
    experts.has_gate, experts.has_bias = site.gated, site.has_bias
    return experts


def _is_causal(config: MoEConfig) -> bool:
    return config.router_kwargs.get("first_segment") != "self"


def _check(config: MoEConfig, arguments: dict[str, Any]) -> None:
    name = "router_type='segment_merge'"
    if config.num_experts_per_tok != config.num_experts:
        raise MoEError(
            f"{name} merges all experts: set num_experts_per_tok to num_experts, {config.num_experts}; it is "
            f"{config.num_experts_per_tok}."
        )
    if config.scoring_func != "softmax" or config.routed_scaling_factor != 1:
        raise MoEError(
            f"{name} mixes weights in parts that sum to 1: scoring_func='softmax', routed_scaling_factor=1."
        )
    if config.num_moe_heads > 1:
        raise MoEError(f"{name} merges the experts of whole tokens; leave num_moe_heads out.")
    if config.router_aux_loss_coef > 0 or config.router_loss_coefs.get("device_balance_loss", 0) > 0:
        raise MoEError(
            f"{name} gives every token to every expert, so balance losses are constant: set router_aux_loss_coef and "
            "device_balance_loss to 0."
        )


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


SEGMENT_MERGE = RouterSpec(
    segment_merge,
    arguments={
        "segment_length": Argument(SEGMENT_LENGTH, "a whole number >= 1", _is_length),
        "first_segment": Argument("uniform", "'uniform' or 'self'", lambda v: v in ("uniform", "self")),
    },
    causal=_is_causal,
    carries=True,
    merges_experts=True,
    check=_check,
)
