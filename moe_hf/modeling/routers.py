"""The routing functions by name, `register_router` for one's own, and the checks of a configuration against them."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .configuration_moe import MoEConfig, MoEError
from .expert_choice import EXPERT_CHOICE, EXPERT_THRESHOLD
from .extra_experts import BUILT_IN_EXPERTS, EXTRA_EXPERTS, extra_expert
from .routing import Argument, RouterSpec, RoutingFunction
from .segment_merge import SEGMENT_MERGE
from .soft_gates import BERNOULLI, DENSE, DENSE_MARGIN
from .token_choice import STOCHASTIC_TOP_K, TOP_K, TOP_P


ROUTERS: dict[str, RouterSpec] = {
    "top_k": TOP_K,
    "stochastic_top_k": STOCHASTIC_TOP_K,
    "top_p": TOP_P,
    "segment_merge": SEGMENT_MERGE,
    "expert_choice": EXPERT_CHOICE,
    "expert_threshold": EXPERT_THRESHOLD,
    "dense": DENSE,
    "dense_margin": DENSE_MARGIN,
    "bernoulli": BERNOULLI,
}
BUILT_IN = frozenset(ROUTERS)

logger = logging.get_logger(__name__)


def register_router(
    name: str,
    function: RoutingFunction,
    arguments: tuple[str, ...] | dict[str, Argument] = (),
    *,
    parameters: dict[str, tuple[str, ...]] | None = None,
    options: tuple[str, ...] = (),
    causal: bool = True,
    cacheable: bool = True,
    carries: bool = False,
    check: Callable | None = None,
    state: tuple[str, ...] = (),
    update: Callable[[dict, dict, dict[str, Any]], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Add a routing function under `name`, for `MoEConfig(router_type=name)`.

    A function in a file of its own that calls this when it is imported travels with the models that are saved. Beside a
    saved model the file finds this function as `.routers.register_router`, elsewhere as `moe_hf.register_router`.

    Args:
        name (`str`): a name that is not taken.
        function (`Callable`): `fn(router_logits (T, E), context) -> Routing`.
        arguments (`tuple[str]` or `dict[str, Argument]`): the keys of `router_kwargs` that the function reads, with a
            default and a test each, or names alone. It finds them in `context.arguments`.
        parameters, options, causal, cacheable, carries, check: as `RouterSpec` has them.
        state (`tuple[str]`): names of what the router knows from earlier batches, (E,) float32 buffers that start at zero,
            are saved with the model, and are found in `context.state`.
        update (`Callable`): `update(state, observed, arguments) -> state`, called once per optimizer step with the sums,
            over passes and processes, of what the function returned as `Routing.observed` in training. `MoETrainer` sees to
            it; in a loop of your own call `moe_hf.update_router_state(model)` after `optimizer.step()`.

    Raises:
        MoEError: when `name` is taken, or one of `state` and `update` is given without the other.
    """
    if name in ROUTERS:
        raise MoEError(f"A router named {name!r} is already registered; choose another name.")
    if bool(state) != (update is not None):
        raise MoEError(
            f"register_router({name!r}) got state={tuple(state)} and update={update}: buffers need a rule that moves them, "
            "and a rule needs buffers. Give both, or neither."
        )
    ROUTERS[name] = RouterSpec(
        function,
        arguments if isinstance(arguments, dict) else {key: Argument() for key in arguments},
        parameters=dict(parameters or {}),
        options=frozenset(options),
        causal=causal,
        cacheable=cacheable,
        carries=carries,
        check=check,
        state=tuple(state),
        update=update,
    )


def router_spec(config: MoEConfig) -> RouterSpec:
    """The router that `config.router_type` names.

    Raises:
        MoEError: for an unknown name, or a router that sees later tokens when `allow_noncausal_routing` is not set.
    """
    spec = ROUTERS.get(config.router_type)
    if spec is None:
        raise MoEError(
            f"router_type is {config.router_type!r}; it must be one of {sorted(ROUTERS)}. Import the file that registers "
            "a router of your own first; one that was saved with a model needs trust_remote_code=True."
        )
    if not spec.is_causal(config) and not config.allow_noncausal_routing:
        raise MoEError(
            f"router_type={config.router_type!r} lets a token's experts depend on later tokens, so a causal language "
            "model's loss would mean nothing. Set allow_noncausal_routing=True if that is what you want."
        )
    return spec


def check_generation(config: MoEConfig) -> None:
    """Refuse to generate with a router that sees later tokens: there are none yet.

    Raises:
        MoEError: the router is not causal.
    """
    if not ROUTERS[config.router_type].is_causal(config):
        raise MoEError(f"router_type={config.router_type!r} chooses with later tokens in view, so it cannot generate.")
    if config.routing_level == "sequence":
        raise MoEError("routing_level='sequence' chooses with later tokens in view, so it cannot generate.")


def why_no_cache(config: MoEConfig) -> str | None:
    """Why decoding step by step is not what a full forward pass computes; None where it is."""
    spec = ROUTERS[config.router_type]
    if not spec.is_causal(config):
        return f"router_type={config.router_type!r} looks at the whole sequence, and with a cache it has only its end."
    if config.routing_level == "sequence":
        return "routing_level='sequence' takes a mean over the sequence, and with a cache it has only the new tokens."
    if not spec.cacheable:
        return (
            f"router_type={config.router_type!r} decides by earlier tokens of the sequence, and with a cache it has only "
            "the new ones. Generate with use_cache=False."
        )
    for name in config.extra_experts:
        if not extra_expert(name).cacheable:
            return (
                f"extra_experts has {name!r}, which reads earlier tokens of the sequence, and with a cache it has only the "
                "new ones. Generate with use_cache=False."
            )
    if config.eval_capacity_factor is not None:
        return (
            "eval_capacity_factor limits how many tokens of a sequence an expert takes, and with a cache only the new "
            "ones are counted: results would differ from a full forward pass. Set eval_capacity_factor to None, or "
            "generate with use_cache=False."
        )
    return None


def carries_on(config: MoEConfig) -> bool:
    """Whether its routers need to know something about earlier tokens when they decode with a cache."""
    return config.routing_level == "prefix" or ROUTERS[config.router_type].carries


def save_custom_code(config: MoEConfig, folder: str | Path) -> None:
    """Copy the files of a router and of experts that are not built in to a saved model, whose code then imports them.

    Raises:
        MoEError: a file has the name of one of the model's own.
    """
    own = (
        []
        if config.router_type in BUILT_IN
        else [("router", config.router_type, ROUTERS[config.router_type].function)]
    )
    kinds = dict.fromkeys(config.extra_experts)
    own += [("expert", name, EXTRA_EXPERTS[name]) for name in kinds if name not in BUILT_IN_EXPERTS]
    folder, imports = Path(folder), {}
    for what, name, definition in own:
        source = getattr(sys.modules.get(definition.__module__), "__file__", None)
        if source is None or definition.__module__ == "__main__":
            logger.warning(
                f"The {what} {name!r} is defined in no file that can be imported, so its code does not travel with the "
                f"model: whoever loads it has to register the {what} first."
            )
            continue
        source, target = Path(source), folder / Path(source).name
        is_copied = source.stem in imports.values() or source.resolve() == target.resolve()
        if source.resolve().parent != Path(__file__).resolve().parent and target.exists() and not is_copied:
            raise MoEError(f"The file of the {what} {name!r} is called {source.name}, as one of the model's own.")
        if not is_copied:
            shutil.copyfile(source, target)
        imports[definition.__name__] = source.stem
    if imports:
        lines = "".join(f"from .{stem} import {name}\n" for name, stem in imports.items())
        names = "".join(f"{name}, " for name in imports).rstrip()
        (folder / "custom_code.py").write_text(
            f'"""Imports the router and the experts of its own that this model uses, which registers them."""\n\n{lines}'
            f"\n\nCUSTOM_CODE = ({names})\n"
        )
