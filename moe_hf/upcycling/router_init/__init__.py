"""How routers start: `ROUTER_INITS`, by name. Where a `router_init` is expected, a name means its default options."""

from moe_hf.upcycling.router_init.rows import (
    ROUTER_INITS,
    EntropyRouter,
    KMeansRouter,
    NormalRouter,
    PromptRouter,
    RouterInit,
    RouterLayer,
    ZeroRouter,
    make_router_init,
    spreads_no_ties,
)


__all__ = [
    "ROUTER_INITS",
    "EntropyRouter",
    "KMeansRouter",
    "NormalRouter",
    "PromptRouter",
    "RouterInit",
    "RouterLayer",
    "ZeroRouter",
    "make_router_init",
    "spreads_no_ties",
]
