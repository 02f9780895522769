"""One MoE layer: router, routed experts and, if asked for, a shared expert, in the place of a dense MLP.

Letters: B batch, S sequence, T = B * S tokens, D model width, E experts, K experts per token, R rows.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils.output_capturing import CompileableContextVar

from .configuration_moe import MoEConfig, MoEError
from .dense_mlp import MLPSite
from .experts import SharedExpert, make_experts
from .extra_experts import ExtraExperts
from .losses import LayerRouting
from .multi_head import MultiHead
from .router_arch import router_architecture
from .router_noise import draw_noise, noise_parameters
from .routers import router_spec
from .routing import RoutingContext, wide
from .routing_ids import decider_parameters, limit_logits, own_task_logits, prefix_mean, sequence_mean
from .segment_merge import make_merged_experts


# Fields of a `RoutingPass` that have one value per token, (T,).
PER_TOKEN = ("token_mask", "document_ids", "open_experts")


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
    ids: dict[str, torch.Tensor] = field(default_factory=dict)
    open_experts: torch.Tensor | None = None
    record: bool = False
    has_model: bool = False
    layers: list[LayerRouting] = field(default_factory=list)

    def for_sub_tokens(self, heads: int) -> "RoutingPass":
        """The same pass as routers see it that route `heads` sub-tokens of each token; it records in the same list."""
        if heads == 1:
            return self
        per_token = {name: getattr(self, name) for name in PER_TOKEN if getattr(self, name) is not None}
        repeated = {name: values.repeat_interleave(heads, dim=0) for name, values in per_token.items()}
        repeated["ids"] = {kind: ids.repeat_interleave(heads) for kind, ids in self.ids.items()}
        return replace(self, sequence_length=self.sequence_length * heads, **repeated)

    def num_tokens(self) -> torch.Tensor | int:
        """Real tokens of the pass."""
        return self.batch_size * self.sequence_length if self.token_mask is None else self.token_mask.sum()

    def id_of(self, kind: str) -> torch.Tensor:
        """The id of each token, (T,).

        Raises:
            MoEError: the pass has none: the block was called outside of its model.
        """
        if kind not in self.ids:
            raise MoEError(
                f"The router needs {kind}_ids, which it gets from the model: call the model, not the block."
            )
        return self.ids[kind]

    def open_to_tokens(self) -> torch.Tensor:
        """Which experts are in the group of each token, (T, E) bool.

        Raises:
            MoEError: the pass does not say: the block was called outside of its model.
        """
        if self.open_experts is None:
            raise MoEError("The router needs the ids of expert_groups, which it gets from the model: call the model.")
        return self.open_experts

    def sequence_ids(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Which sequence (which document, when packed) each token belongs to, (T,), in [0, T)."""
        if self.document_ids is not None:
            return self.document_ids
        return torch.arange(num_tokens, device=device) // self.sequence_length


def packed_documents(position_ids: torch.Tensor) -> torch.Tensor:
    """Which document each token of packed rows belongs to, (B, S) positions -> (B * S,): one starts where they do."""
    starts = nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    row = torch.arange(len(starts), device=starts.device)[:, None] * starts.shape[1]
    return (starts.cumsum(-1) + row).reshape(-1)


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
        architecture = router_architecture(config)
        self.compute_logits, self.arch_arguments = architecture.function, architecture.resolve_arguments(config)
        num_experts = config.experts_of_layer(site.layer_index) + len(config.extra_experts)
        sizes = {"E": num_experts, "D": site.hidden_size, "H": self.arch_arguments.get("hidden_size"), "1": 1}
        sizes["N"] = config.num_tasks
        shapes = spec.parameters | noise_parameters(config)
        # Those start at zero, the others as the weight does.
        self.zero_parameters = frozenset(shapes) | architecture.zeros
        self.zero_parameters |= {"task_weight"}
        shapes = {"weight": architecture.weight} | shapes | architecture.parameters | decider_parameters(config)
        for name, letters in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty([sizes[letter] for letter in letters])))
        self.shapes = shapes
        self.parameter_names = tuple(name for name in shapes if name != "weight")
        has_bias = config.balance_strategy == "bias"
        # Loading keeps a dtype that is given here, whatever dtype is asked for the model.
        bias = torch.zeros(num_experts, dtype=torch.float32) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.state_names, self.update_rule = spec.state, spec.update
        for name in spec.state:
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.float32))
        # Sums since the last update of the state, (E,) each.
        self.observed: dict[str, torch.Tensor] = {}
        # Choices per expert since the last optimizer step, (E,) int64, or None. Not a buffer: in distributed training
        # those are overwritten with the first process's.
        self.step_counts: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(T, D) -> router_logits (T, E), top_k_weights (T, K), top_k_index (T, K), with T sub-tokens where it routes those.

        With a varying number of experts per token: weights and index are (R, 1), followed by token_index (R,). Where
        experts are merged: followed by None and segment_index (T,).
        """
        current = current_routing_pass()
        if current is None:
            current = RoutingPass(sequence_length=hidden_states.shape[0])
        else:
            current = current.for_sub_tokens(self.config.num_moe_heads)
        inputs = self._inputs(wide(hidden_states), current)
        if self.training and self.config.router_jitter_noise > 0:
            noise = self.config.router_jitter_noise
            inputs = inputs * torch.empty_like(inputs).uniform_(1 - noise, 1 + noise)
        # Autocast would cast the operands of matrix products back to bfloat16.
        with torch.autocast(hidden_states.device.type, enabled=False):
            parameters = {name: getattr(self, name).to(inputs.dtype) for name in self.parameter_names}
            router_logits = self.compute_logits(inputs, self.weight.to(inputs.dtype), parameters, self.arch_arguments)
            if self.config.router_per_task:
                router_logits = router_logits + own_task_logits(
                    inputs, parameters["task_weight"], current.id_of("task")
                )
            if self.config.expert_groups:
                is_open = current.open_to_tokens().to(router_logits.device)
                router_logits = limit_logits(router_logits, is_open, self.config.expert_group_prior)
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
            if self.training and torch.is_grad_enabled():
                for name, value in routing.observed.items():
                    self.observed[name] = value + self.observed.get(name, 0)
            current.layers.append(layer)
        result = (router_logits, routing.top_k_weights, routing.top_k_index)
        if routing.segment_index is not None:
            return (*result, None, routing.segment_index)
        return result if routing.token_index is None else (*result, routing.token_index)

    def _inputs(self, hidden_states: torch.Tensor, current: RoutingPass) -> torch.Tensor:
        """What the logits are computed from, (T, D), for (T, D) tokens in float32 or wider."""
        level, num_tokens, device = self.config.routing_level, len(hidden_states), hidden_states.device
        if level == "token":
            return hidden_states
        if level == "task":
            return self.task_embedding.to(hidden_states.dtype)[current.id_of("task").to(device)]
        sequence_ids, mask = current.sequence_ids(num_tokens, device).to(device), current.token_mask
        mask = None if mask is None else mask.to(device)
        if level == "sequence":
            return sequence_mean(hidden_states, sequence_ids, mask)
        return prefix_mean(hidden_states, sequence_ids, mask, longest=current.sequence_length)

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
            ids=current.ids,
            open_experts=None if self.config.expert_group_prior is not None else current.open_experts,
            correction_bias=self.e_score_correction_bias,
            noise=draw_noise(router_logits, self.config, inputs, parameters) if self.training else None,
            arguments=self.arguments,
            parameters=parameters,
            state={name: getattr(self, name) for name in self.state_names},
        )

    def update_state(self, observed: dict[str, torch.Tensor]) -> None:
        """Move the state by what was `observed` since the last update, which starts anew; nothing observed, no move."""
        if observed:
            state = {name: getattr(self, name) for name in self.state_names}
            for name, value in self.update_rule(state, observed, self.arguments).items():
                getattr(self, name).copy_(value)
        self.observed = {}

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
        """As in torch; the buffers move along and stay in float32: their steps would be lost in bfloat16."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, moved.float() if buffer.is_meta else buffer.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.config.router_type}, experts={self.weight.shape[0]}, per_token={self.config.num_experts_per_tok}"
        )


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
        self.extra_experts = ExtraExperts(config, site.hidden_size) if config.extra_experts else None
        self.has_bias = site.has_bias
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size > 0:
            self.shared_expert = SharedExpert(config, site, act_fn)
            if config.shared_expert_gate:
                mixes = config.shared_expert_gate == "softmax"
                self.shared_expert_gate = nn.Linear(site.hidden_size, 2 if mixes else 1, bias=mixes)
        self.dropout = nn.Dropout(site.dropout)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(..., D) -> (..., D). Families whose MLP adds the residual stream itself pass it as `residual`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, D)
        routed = tokens if self.multi_head is None else self.multi_head.split(tokens)
        _, top_k_weights, top_k_index, *more = self.gate(routed)
        token_index, segment_index = (*more, None, None)[:2]
        if segment_index is not None:
            output = self.experts(routed, top_k_index, top_k_weights, segment_index)  # (T, D)
        elif token_index is not None:
            rows = self.experts(routed[token_index], top_k_index, top_k_weights)  # (R, D)
            rows = self._count_bias_once(rows, top_k_index, top_k_weights)
            output = torch.zeros_like(routed).index_add(0, token_index, rows)
        else:
            output = self.experts(routed, top_k_index, top_k_weights)  # (T, D)
            output = self._count_bias_once(output, top_k_index, top_k_weights)
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
        output = self.dropout(output.view_as(hidden_states))
        return output if residual is None else residual + output

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
        num_routed = self.experts.num_experts
        weights = top_k_weights.new_zeros(len(tokens), num_routed + len(self.extra_experts))
        place = (token_index[:, None].expand_as(top_k_index), top_k_index)
        weights = weights.index_put(place, top_k_weights, accumulate=True)
        return self.extra_experts(tokens, weights[:, num_routed:], sequence_ids)

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


def rows_are_aligned(module: nn.Module) -> bool:
    """Whether `grouped_mm`, the default, can read the experts: it refuses rows that are no multiples of 16 bytes."""
    blocks = [child for child in module.modules() if isinstance(child, MoEBlock)]
    weights = [weight for block in blocks for weight in block.experts.parameters() if weight.dim() == 3]
    return all(weight.shape[-1] * weight.element_size() % 16 == 0 for weight in weights)
