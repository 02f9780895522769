"""The routing functions by name, `register_router` for one's own, and the checks of a configuration against them."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

from .configuration_moe import MoEConfig, MoEError
from .routing import Argument, RouterSpec, RoutingFunction
from .token_choice import STOCHASTIC_TOP_K, TOP_K, TOP_P


ROUTERS: dict[str, RouterSpec] = {
    "top_k": TOP_K,
    "stochastic_top_k": STOCHASTIC_TOP_K,
    "top_p": TOP_P,
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
    check: Callable | None = None,
) -> None:
    """Add a routing function under `name`, for `MoEConfig(router_type=name)`.

    A function in a file of its own that calls this when it is imported travels with the models that are saved. Beside a
    saved model the file finds this function as `.routers.register_router`, elsewhere as `moe_hf.register_router`.

    Args:
        name (`str`): a name that is not taken.
        function (`Callable`): `fn(router_logits (T, E), context) -> Routing`.
        arguments (`tuple[str]` or `dict[str, Argument]`): the keys of `router_kwargs` that the function reads, with a
            default and a test each, or names alone. It finds them in `context.arguments`.
        parameters, options, causal, check: as `RouterSpec` has them.

    Raises:
        MoEError: when `name` is taken.
    """
    if name in ROUTERS:
        raise MoEError(f"A router named {name!r} is already registered; choose another name.")
    arguments = arguments if isinstance(arguments, dict) else {key: Argument() for key in arguments}
    ROUTERS[name] = RouterSpec(function, arguments, dict(parameters or {}), frozenset(options), causal, check)


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
    if not spec.causal and not config.allow_noncausal_routing:
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
    if not ROUTERS[config.router_type].causal:
        raise MoEError(f"router_type={config.router_type!r} chooses with later tokens in view, so it cannot generate.")


def why_no_cache(config: MoEConfig) -> str | None:
    """Why decoding step by step is not what a full forward pass computes; None where it is."""
    if not ROUTERS[config.router_type].causal:
        return f"router_type={config.router_type!r} looks at the whole sequence, and with a cache it has only its end."
    if config.eval_capacity_factor is not None:
        return (
            "eval_capacity_factor limits how many tokens of a sequence an expert takes, and with a cache only the new "
            "ones are counted: results would differ from a full forward pass. Set eval_capacity_factor to None, or "
            "generate with use_cache=False."
        )
    return None


def save_custom_router(config: MoEConfig, folder: str | Path) -> None:
    """Copy the file of a router that is not built in to the folder of a saved model, whose code then imports it.

    Raises:
        MoEError: the file has the name of one of the model's own.
    """
    if config.router_type in BUILT_IN:
        return
    function, folder = ROUTERS[config.router_type].function, Path(folder)
    source = getattr(sys.modules.get(function.__module__), "__file__", None)
    if source is None or function.__module__ == "__main__":
        logger.warning(
            f"The router {config.router_type!r} is defined in no file that can be imported, so its code does not travel "
            "with the model: whoever loads it has to register the router first."
        )
        return
    source = Path(source)
    if source.resolve().parent != Path(__file__).resolve().parent and (folder / source.name).exists():
        raise MoEError(
            f"The file of the router {config.router_type!r} is called {source.name}, as one of the model's own."
        )
    if source.resolve() != (folder / source.name).resolve():
        shutil.copyfile(source, folder / source.name)
    (folder / "custom_routers.py").write_text(
        f'"""Imports the router that this model uses, which registers it."""\n\n'
        f"from .{source.stem} import {function.__name__}\n\n\n"
        f"CUSTOM_ROUTERS = ({function.__name__},)\n"
    )
