"""What a router decides on given logits in training, as the losses read it, without a model around it."""

from dataclasses import replace
from typing import Any

import torch

from moe_hf import MoEConfig
from moe_hf.modeling.losses import LayerRouting
from moe_hf.modeling.routing import RouterNoise, Routing
from tests.modeling.routed import context_of
from tests.tiny_models import tiny_config


def config_of(num_experts: int, **fields: Any) -> MoEConfig:
    """Return the configuration of a tiny model."""
    return MoEConfig(text_config=tiny_config("llama"), num_experts=num_experts, **fields)


def decided(
    logits: torch.Tensor | list,
    *,
    mask: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
    noise: RouterNoise | None = None,
    index: torch.Tensor | None = None,
    global_counts: torch.Tensor | None = None,
    **fields: Any,
) -> LayerRouting:
    """Return what a router decides on (T, E) logits, or the choice `index` (T, K) with equal weights."""
    logits = torch.as_tensor(logits)
    if index is not None:
        fields = {"num_experts_per_tok": index.shape[1], **fields}
    spec, context = context_of(logits, known={"token_mask": mask}, **fields)
    if index is None:
        routing = spec.function(logits, replace(context, training=True, noise=noise))
    else:
        routing = Routing(index, torch.full(index.shape, 1 / index.shape[1], dtype=logits.dtype))
    return LayerRouting(
        context.config,
        layer_index=0,
        router_logits=logits,
        routing=routing,
        token_mask=mask,
        sequence_ids=sequence_ids,
        noise=noise,
        global_counts=global_counts,
    )
