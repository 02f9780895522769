"""One MoE layer: router, routed experts and, if asked for, a shared expert, in the place of a dense MLP.

Letters: B batch, S sequence, T = B * S tokens, D model width, E experts, K experts per token, R rows.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .configuration_moe import MoEConfig
from .dense_mlp import MLPSite
from .experts import DenseFFN, SharedExpert, make_experts
from .extra_experts import ExtraExperts
from .multi_head import MultiHead
from .router import Router
from .routers import router_spec
from .routing import wide
from .routing_pass import RoutingPass, current_routing_pass
from .segment_merge import make_merged_experts


class MoEBlock(nn.Module):
    """Routes each token to K of E experts and returns the weighted sum of their outputs, plus the shared expert's."""

    def __init__(self, config: MoEConfig, site: MLPSite, act_fn):
        super().__init__()
        heads = config.num_moe_heads
        self.multi_head = None if heads == 1 else MultiHead(site.hidden_size, heads)
        # What is routed: tokens, or their sub-tokens.
        routed = replace(site, hidden_size=site.hidden_size // heads)
        self.gate = Router(config, routed)
        make = make_merged_experts if router_spec(config).merges_experts else make_experts
        self.experts = make(config, routed, act_fn)
        # With expert parallelism the module holds fewer.
        self.num_routed = self.experts.num_experts
        self.extra_experts = ExtraExperts(config, site.hidden_size) if config.extra_experts else None
        self.has_bias = site.has_bias
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size > 0:
            self.shared_expert = SharedExpert(config, site, act_fn)
            if config.shared_expert_gate:
                mixes = config.shared_expert_gate == "softmax"
                self.shared_expert_gate = nn.Linear(site.hidden_size, 2 if mixes else 1, bias=mixes)
        last = site.layer_index == config.num_hidden_layers - 1
        self.predicts_one_by_one = last and config.output_mixture is not None
        self.dense_ffn_place = config.moe_dense_ffn
        self.dense_ffn = None if config.moe_dense_ffn is None else DenseFFN(site, act_fn)
        self.dropout = nn.Dropout(site.dropout)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(..., D) -> (..., D). Families whose MLP adds the residual stream itself pass it as `residual`.

        The last layer of a mixture of predictions returns (E, ..., D): what is added to it, and done to it for each token
        alone, is then for each expert alone.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, D)
        if self.dense_ffn is None:
            output = self._experts_output(tokens)
        elif self.dense_ffn_place == "before":
            added = self.dense_ffn(tokens)
            output = added + self._experts_output(tokens + added)
        else:
            output = self._experts_output(tokens)
            output = output + self.dense_ffn(tokens + output)
        # (E, ...) where the experts are kept apart
        output = self.dropout(output.view(*output.shape[:-2], *hidden_states.shape))
        return output if residual is None else residual + output

    def _experts_output(self, tokens: torch.Tensor) -> torch.Tensor:
        """What routed and shared experts make of the tokens, (T, D) -> (T, D)."""
        routed = tokens if self.multi_head is None else self.multi_head.split(tokens)
        router_logits, top_k_weights, top_k_index, *more = self.gate(routed)
        token_index, segment_index = (*more, None, None)[:2]
        current = current_routing_pass()
        if self.predicts_one_by_one and current is not None and current.mixture is not None:
            output = self._run_one_by_one(tokens)  # (E, T, D)
            # After it, so that what fails before is not taken for the decoder's.
            current.mixture.log_weights = wide(router_logits).log_softmax(-1)
        elif segment_index is not None:
            output = self.experts(routed, top_k_index, top_k_weights, segment_index)  # (T, D)
            output = self._count_bias_once(output, top_k_index, top_k_weights)
        elif token_index is not None:
            rows = self._run_experts(routed[token_index], top_k_index, top_k_weights)  # (R, D)
            output = torch.zeros_like(routed).index_add(0, token_index, rows)
        else:
            output = self._run_experts(routed, top_k_index, top_k_weights)  # (T, D)
        if self.extra_experts is not None:
            output = output + self._run_extra_experts(tokens, top_k_index, top_k_weights, token_index)
        if self.multi_head is not None:
            output = self.multi_head.merge(output)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)  # (T, D)
            if self.shared_expert_gate is not None:
                coefficients = self.shared_expert_gate(tokens)  # (T, 1), or (T, 2) for the routed experts and this one
                if coefficients.shape[-1] == 1:
                    shared = shared * coefficients.sigmoid()
                else:
                    coefficients = coefficients.softmax(-1)
                    output, shared = output * coefficients[:, :1], shared * coefficients[:, 1:]
            output = output + shared
        return output

    def _run_one_by_one(self, tokens: torch.Tensor) -> torch.Tensor:
        """What each expert makes of each token, (T, D) -> (E, T, D)."""
        num_experts = self.experts.num_experts
        index = torch.arange(num_experts, device=tokens.device).repeat_interleave(len(tokens))[:, None]
        weights = torch.ones(index.shape, device=tokens.device)
        rows = self.experts(tokens.repeat(num_experts, 1), index, weights)
        return self._count_bias_once(rows, index, weights).view(num_experts, *tokens.shape)

    def _run_experts(
        self, tokens: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen routed experts, (R, D)."""
        if self.extra_experts is not None and self._is_sharded():
            # An id of E or above belongs to no rank, and its bias to no row. What such a choice costs there is one MLP.
            is_extra = top_k_index >= self.num_routed
            top_k_index = torch.where(is_extra, top_k_index % self.num_routed, top_k_index)
            top_k_weights = top_k_weights.masked_fill(is_extra, 0)
        output = self.experts(tokens, top_k_index, top_k_weights)
        return self._count_bias_once(output, top_k_index, top_k_weights)

    def _is_sharded(self) -> bool:
        """Whether this rank holds some of the experts, or slices of them."""
        return self.experts.num_experts != self.num_routed or _tensor_parallel_size(self._own_experts().down_proj) > 1

    def _run_extra_experts(
        self,
        tokens: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        token_index: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the chosen extra experts add, (T, D)."""
        current = current_routing_pass() or RoutingPass(sequence_length=len(tokens))
        sequence_ids = current.sequence_ids(len(tokens), tokens.device)
        if current.token_mask is not None:
            sequence_ids = sequence_ids.masked_fill(~current.token_mask.to(sequence_ids.device), -1)
        if token_index is None:
            token_index = torch.arange(len(tokens), device=tokens.device)
        weights = top_k_weights.new_zeros(len(tokens), self.num_routed + len(self.extra_experts))
        place = (token_index[:, None].expand_as(top_k_index), top_k_index)
        weights = weights.index_put(place, top_k_weights, accumulate=True)
        return self.extra_experts(tokens, weights[:, self.num_routed :], sequence_ids)

    def _own_experts(self) -> nn.Module:
        experts = self.experts
        while hasattr(experts, "base_layer"):
            experts = experts.base_layer  # adapters wrap the module
        return experts

    def _count_bias_once(
        self, output: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Under tensor parallelism each rank adds the whole bias of `down_proj` before the sum over ranks.

        The surplus is taken off here, with the bias detached: each rank's own addition already gives it its gradient.
        """
        if not self.has_bias:
            return output
        experts = self._own_experts()
        ranks = _tensor_parallel_size(experts.down_proj)
        if ranks == 1:
            return output
        bias = experts.down_proj_bias.detach()[top_k_index]  # (T, K, D)
        return output - (ranks - 1) * (bias * top_k_weights[..., None]).sum(1).to(output.dtype)


def _tensor_parallel_size(down_proj: torch.Tensor) -> int:
    """Ranks that hold slices of the width of each expert, the last dimension of (E, D, F)."""
    if isinstance(down_proj, DTensor):
        for placement, size in zip(down_proj.placements, down_proj.device_mesh.shape, strict=True):
            if placement.is_shard(2) or placement.is_shard(-1):
                return size
    return 1


def rows_are_aligned(module: nn.Module) -> bool:
    """Whether `grouped_mm`, the default, can read the experts: it refuses rows that are no multiples of 16 bytes."""
    blocks = [child for child in module.modules() if isinstance(child, MoEBlock)]
    weights = [weight for block in blocks for weight in block.experts.parameters() if weight.dim() == 3]
    return all(weight.shape[-1] * weight.element_size() % 16 == 0 for weight in weights)
