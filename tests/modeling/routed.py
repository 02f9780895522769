"""Calls a routing function on logits alone, without a model."""

from typing import Any

import torch

from moe_hf import MoEConfig
from moe_hf.modeling.router_noise import draw_noise
from moe_hf.modeling.routers import router_spec
from moe_hf.modeling.routing import Routing, RoutingContext
from tests.tiny_models import tiny_config


def context_of(logits: torch.Tensor, training: bool = False, known: dict[str, Any] | None = None, **fields):
    """The context of one sequence (or of what `known` says) for a configuration of `fields`."""
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=logits.shape[-1], **fields)
    spec = router_spec(config)
    known = {"batch_size": 1, "sequence_length": len(logits)} | (known or {})
    known.setdefault("state", {name: torch.zeros(logits.shape[-1]) for name in spec.state})
    context = RoutingContext(
        config=config,
        layer_index=0,
        hidden_states=logits,
        training=training,
        noise=draw_noise(logits, config, logits, {}) if training else None,
        arguments=spec.resolve_arguments(config),
        **known,
    )
    return spec, context


def route(logits: torch.Tensor, training: bool = False, known: dict[str, Any] | None = None, **fields) -> Routing:
    """The routing of (T, E) logits, one sequence unless `known` (fields of the context) says otherwise."""
    spec, context = context_of(logits, training, known, **fields)
    return spec.function(logits, context)


def kept(routing: Routing) -> list[tuple[int, ...]]:
    """The experts that each token ends up with, best first."""
    rows = zip(routing.top_k_index.tolist(), (routing.top_k_weights > 0).tolist(), strict=True)
    return [tuple(e for e, is_kept in zip(*row, strict=True) if is_kept) for row in rows]


def preferring(*choices: tuple[int, ...], num_experts: int) -> torch.Tensor:
    """Logits with which each token ranks experts as its tuple does; the others come after, in their order."""
    logits = torch.empty(len(choices), num_experts)
    for token, order in enumerate(choices):
        ranked = [*order, *(e for e in range(num_experts) if e not in order)]
        logits[token, ranked] = -torch.arange(num_experts, dtype=torch.float32)
    return logits
