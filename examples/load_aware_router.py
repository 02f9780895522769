"""A router of one's own that learns from earlier batches: experts with a high load so far are chosen less readily.

Import this file, then `MoEConfig(text_config=..., router_type="load_aware", router_kwargs={"strength": 2.0})`. As it is a
file of its own it travels with the models that are saved, and its state is saved with their weights.
"""

import torch


try:
    from .routers import register_router
    from .routing import Argument, Routing
except ImportError:
    from moe_hf import register_router
    from moe_hf.modeling.routing import Argument, Routing

MOMENTUM = 0.9


def load_aware(router_logits, context):
    """The K highest of logit - strength * (E * load - 1), weighted by the softmax over the K logits themselves.

    `load` is the share of the choices that an expert had in earlier optimizer steps, 1 / E for each at first: a token's
    choice depends on itself and on the past of the training, never on its neighbours, so the router is causal.
    """
    num_experts = router_logits.shape[-1]
    surplus = num_experts * context.state["surplus"]  # (E,), E * load - 1
    index = (router_logits - context.arguments["strength"] * surplus).topk(context.config.num_experts_per_tok).indices
    weights = router_logits.gather(1, index).softmax(-1)
    observed = {}
    if context.training:
        real = (
            torch.ones_like(weights) if context.token_mask is None else context.token_mask[:, None].expand(index.shape)
        )
        # What is observed is added up over micro-batches and processes: counts, since shares would not add up.
        counts = torch.zeros_like(surplus).scatter_add(0, index.flatten(), real.flatten().to(surplus))
        observed = {"choices": counts}
    return Routing(index, weights, observed=observed)


def follow_load(state, observed, arguments):
    """Move `surplus`, load - 1 / E, towards that of the step by 1 - `MOMENTUM`."""
    choices = observed["choices"]
    surplus = choices / choices.sum().clamp_min(1) - 1 / len(choices)
    return {"surplus": state["surplus"].lerp(surplus, 1 - MOMENTUM)}


register_router(
    "load_aware",
    load_aware,
    {"strength": Argument(1.0, "a number >= 0", lambda value: isinstance(value, int | float) and value >= 0)},
    state=("surplus",),
    update=follow_load,
)
