"""One MoE layer: router, routed experts and, if asked for, a shared expert, in the place of a dense MLP.

Letters: B batch, S sequence, T = B * S tokens, D model width, E experts, K experts per token, R rows.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.utils.output_capturing import CompileableContextVar

from .configuration_moe import MoEConfig
from .dense_mlp import MLPSite
from .experts import SharedExpert, make_experts
from .losses import LayerRouting
from .router_noise import draw_noise, noise_parameters
from .routers import router_spec
from .routing import RoutingContext, wide


@dataclass
class RoutingPass:
    """What one forward pass of the model tells its routers, and, when `record`, what they answer.

    A dense decoder layer calls its MLP with the hidden states alone, so this reaches the routers through a context
    variable, which also survives the threads of data-parallel replicas and of the autograd engine.
    """

    batch_size: int = 1
    sequence_length: int = 1
    token_mask: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    record: bool = False
    has_model: bool = False
    layers: list[LayerRouting] = field(default_factory=list)

    def sequence_ids(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Which sequence (which document, when packed) each token belongs to, (T,), in [0, T)."""
        if self.document_ids is not None:
            return self.document_ids
        return torch.arange(num_tokens, device=device) // self.sequence_length


_ROUTING_PASS = CompileableContextVar("moe_hf_routing_pass")


def current_routing_pass() -> RoutingPass | None:
    """The forward pass that is running, or None outside one."""
    holder = _ROUTING_PASS.get()
    return None if holder is None else holder["routing_pass"]


@contextmanager
def routing_pass(value: RoutingPass):
    """Make `value` the forward pass that the routers inside see."""
    # A dict, as transformers' own values of such variables are: its model tests look at the keys.
    token = _ROUTING_PASS.set({"routing_pass": value})
    try:
        yield value
    finally:
        _ROUTING_PASS.reset(token)


def recompute_contexts():
    """Contexts for a checkpointed forward and its recomputation, which sees the same pass and records nothing."""
    outer = current_routing_pass() or RoutingPass()
    return routing_pass(outer), routing_pass(replace(outer, record=False, layers=[]))


class Router(nn.Module):
    """Scores the experts for each token and chooses among them; computed in float32 whatever the model's dtype."""

    def __init__(self, config: MoEConfig, site: MLPSite):
        super().__init__()
        self.config = config
        self.layer_index = site.layer_index
        spec = router_spec(config)
        self.function, self.arguments = spec.function, spec.resolve_arguments(config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, site.hidden_size))
        sizes = {"E": config.num_experts, "D": site.hidden_size}
        self.parameter_names = tuple(shapes := spec.parameters | noise_parameters(config))
        for name, letters in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty([sizes[letter] for letter in letters])))
        has_bias = config.balance_strategy == "bias"
        # Loading keeps a dtype that is given here, whatever dtype is asked for the model.
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        # Choices per expert since the last optimizer step, (E,) int64, or None. Not a buffer: in distributed training
        # those are overwritten with the first process's.
        self.step_counts: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(T, D) -> router_logits (T, E), top_k_weights (T, K), top_k_index (T, K).

        With a varying number of experts per token: weights and index are (R, 1), followed by token_index (R,).
        """
        inputs = wide(hidden_states)
        if self.training and self.config.router_jitter_noise > 0:
            noise = self.config.router_jitter_noise
            inputs = inputs * torch.empty_like(inputs).uniform_(1 - noise, 1 + noise)
        # Autocast would cast the operands of F.linear back to bfloat16.
        with torch.autocast(hidden_states.device.type, enabled=False):
            router_logits = F.linear(inputs, self.weight.to(inputs.dtype))  # (T, E)
            current = current_routing_pass() or RoutingPass(sequence_length=hidden_states.shape[0])
            context = self._context(router_logits, inputs, hidden_states, current)
            routing = self.function(router_logits, context)
        if current.record:
            layer = LayerRouting(
                config=self.config,
                layer_index=self.layer_index,
                router_logits=router_logits,
                routing=routing,
                token_mask=current.token_mask,
                sequence_ids=current.sequence_ids(router_logits.shape[0], router_logits.device),
                noise=context.noise,
            )
            self._count_choices(layer)
            current.layers.append(layer)
        result = (router_logits, routing.top_k_weights, routing.top_k_index)
        return result if routing.token_index is None else (*result, routing.token_index)

    def _context(
        self, router_logits: torch.Tensor, inputs: torch.Tensor, hidden_states: torch.Tensor, current: RoutingPass
    ) -> RoutingContext:
        parameters = {name: getattr(self, name) for name in self.parameter_names}
        return RoutingContext(
            config=self.config,
            layer_index=self.layer_index,
            hidden_states=hidden_states,
            training=self.training,
            batch_size=current.batch_size,
            sequence_length=current.sequence_length,
            token_mask=current.token_mask,
            document_ids=current.document_ids,
            correction_bias=self.e_score_correction_bias,
            noise=draw_noise(router_logits, self.config, inputs, parameters) if self.training else None,
            arguments=self.arguments,
            parameters=parameters,
        )

    def _count_choices(self, layer: LayerRouting) -> None:
        """Add up the choices of training passes: for the correction bias, or where `step_counts` was set to zeros."""
        wanted = self.e_score_correction_bias is not None or self.step_counts is not None
        if not (wanted and self.training and torch.is_grad_enabled()):
            return
        counts = layer.choice_counts()
        if self.step_counts is None:
            self.step_counts = torch.zeros_like(counts)
        self.step_counts += counts.to(self.step_counts.device)
        layer.step_counts = self.step_counts

    def _apply(self, fn, recurse: bool = True):
        """As in torch; the correction bias moves along and stays in float32, whose steps bfloat16 would lose."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = moved.float() if bias.is_meta else bias.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.config.router_type}, experts={self.weight.shape[0]}, per_token={self.config.num_experts_per_tok}"
        )


class MoEBlock(nn.Module):
    """Routes each token to K of E experts and returns the weighted sum of their outputs, plus the shared expert's."""

    def __init__(self, config: MoEConfig, site: MLPSite, act_fn):
        super().__init__()
        self.gate = Router(config, site)
        self.experts = make_experts(config, site, act_fn)
        self.has_bias = site.has_bias
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size > 0:
            self.shared_expert = SharedExpert(config, site, act_fn)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(site.hidden_size, 1, bias=False)
        self.dropout = nn.Dropout(site.dropout)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(..., D) -> (..., D). Families whose MLP adds the residual stream itself pass it as `residual`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, D)
        _, top_k_weights, top_k_index, *token_index = self.gate(tokens)
        if token_index:
            rows = self.experts(tokens[token_index[0]], top_k_index, top_k_weights)  # (R, D)
            rows = self._count_bias_once(rows, top_k_index, top_k_weights)
            output = torch.zeros_like(tokens).index_add(0, token_index[0], rows)
        else:
            output = self.experts(tokens, top_k_index, top_k_weights)  # (T, D)
            output = self._count_bias_once(output, top_k_index, top_k_weights)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)  # (T, D)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(tokens).sigmoid()
            output = output + shared
        output = self.dropout(output.view_as(hidden_states))
        return output if residual is None else residual + output

    def _count_bias_once(
        self, output: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Under tensor parallelism each rank adds the whole bias of `down_proj` before the sum over ranks.

        The surplus is taken off here, with the bias detached: each rank's own addition already gives it its gradient.
        """
        if not self.has_bias:
            return output
        experts = self.experts
        while hasattr(experts, "base_layer"):
            experts = experts.base_layer  # adapters wrap the module
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
