"""The router of one MoE layer: logits from the tokens, and the routing function's choice.

Letters: B batch, S sequence, T = B * S tokens, D model width, E experts, K experts per token, R rows.
"""

import torch
from torch import nn

from .configuration_moe import MoEConfig
from .dense_mlp import MLPSite
from .losses import LayerRouting
from .router_arch import router_architecture
from .router_noise import draw_noise, noise_parameters
from .routers import router_spec
from .routing import RoutingContext, wide
from .routing_cache import Carry
from .routing_ids import (
    add_to_first_document,
    decider_parameters,
    limit_logits,
    own_task_logits,
    prefix_sums,
    sequence_mean,
)
from .routing_pass import RoutingPass, current_routing_pass


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
        carried = None if current.carried is None else current.carried.get(self.layer_index, {})
        inputs, carry = self._inputs(wide(hidden_states), current, carried)
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
            context = self._context(router_logits, inputs, hidden_states, current, carried)
            routing = self.function(router_logits, context)
        if carried is not None:
            current.carry[self.layer_index] = {name: v.detach() for name, v in (carry | routing.carry).items()}
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

    def _inputs(
        self, hidden_states: torch.Tensor, current: RoutingPass, carried: Carry | None
    ) -> tuple[torch.Tensor, Carry]:
        """What the logits are computed from, (T, D), for (T, D) tokens in float32 or wider; what the next tokens need."""
        level, num_tokens, device = self.config.routing_level, len(hidden_states), hidden_states.device
        if level == "token":
            return hidden_states, {}
        if level == "task":
            return self.task_embedding.to(hidden_states.dtype)[current.id_of("task").to(device)], {}
        sequence_ids, mask = current.sequence_ids(num_tokens, device).to(device), current.token_mask
        mask = None if mask is None else mask.to(device)
        if level == "sequence":
            return sequence_mean(hidden_states, sequence_ids, mask), {}
        sums = prefix_sums(hidden_states, sequence_ids, mask, longest=current.sequence_length)
        if carried is not None:
            sums = add_to_first_document(sums, carried.get("prefix_sum"), sequence_ids, current.batch_size)
        carry = {} if carried is None else {"prefix_sum": sums.view(current.batch_size, -1, sums.shape[-1])[:, -1]}
        return sums[:, :-1] / sums[:, -1:].clamp_min(1), carry

    def _context(
        self,
        router_logits: torch.Tensor,
        inputs: torch.Tensor,
        hidden_states: torch.Tensor,
        current: RoutingPass,
        carried: Carry | None,
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
            positions=self._positions(current, router_logits),
            document_ids=current.document_ids,
            ids=current.ids,
            open_experts=None if self.config.expert_group_prior is not None else current.open_experts,
            correction_bias=self.e_score_correction_bias,
            noise=draw_noise(router_logits, self.config, inputs, parameters) if self.training else None,
            arguments=self.arguments,
            parameters=parameters,
            state={name: getattr(self, name) for name in self.state_names},
            carried=carried,
        )

    def _positions(self, current: RoutingPass, router_logits: torch.Tensor) -> torch.Tensor | None:
        if not self.arguments.get("spread_ties"):
            return None
        return current.positions_of_tokens(len(router_logits), router_logits.device)

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
