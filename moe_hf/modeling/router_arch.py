"""Router architectures: how a token becomes one logit per expert.

Each looks at one token at a time, so all of them are causal and decode with a cache. `weight` is the last matrix before
the logits in each of them, so that it has a row per expert; the other parameters are named here.

Letters: T tokens, D model width, E experts, H router width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from .configuration_moe import MoEConfig, MoEError
from .routing import Argument, resolve


Parameters = dict[str, torch.Tensor]
# Norms below it are not scaled up to 1, and a cosine is not multiplied by more than its inverse.
LEAST_NORM, LEAST_TEMPERATURE = 1e-4, 1e-2


@dataclass(frozen=True)
class RouterArchitecture:
    """How logits are computed from the router's input.

    Attributes:
        function: `fn(inputs (T, D), weight, parameters, arguments) -> (T, E)`, all tensors of one dtype.
        weight: shape of the router's `weight`, in the letters "E", "D" and "H".
        parameters: shapes of its other parameters, by name, in the same letters and "1".
        zeros: those of them that start at zero; the others start as `weight` does.
        arguments: the keys of `router_arch_kwargs` that it reads.
    """

    function: Callable[[torch.Tensor, torch.Tensor, Parameters, dict[str, Any]], torch.Tensor]
    weight: tuple[str, ...] = ("E", "D")
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    zeros: frozenset[str] = frozenset()
    arguments: dict[str, Argument] = field(default_factory=dict)

    def resolve_arguments(self, config: MoEConfig) -> dict[str, Any]:
        """`config.router_arch_kwargs`, completed with defaults.

        Raises:
            MoEError: a key that it does not read, or a value that it does not allow.
        """
        owner = f"router_arch={config.router_arch!r}"
        return resolve(config.router_arch_kwargs, self.arguments, "router_arch_kwargs", owner)


def linear(inputs: torch.Tensor, weight: torch.Tensor, parameters: Parameters, arguments: dict) -> torch.Tensor:
    """l = W x (Shazeer et al., https://huggingface.co/papers/1701.06538)."""
    return F.linear(inputs, weight)


def mlp(inputs: torch.Tensor, weight: torch.Tensor, parameters: Parameters, arguments: dict) -> torch.Tensor:
    """l = W silu(W_h x): boundaries between experts that are not hyperplanes."""
    return F.linear(F.silu(F.linear(inputs, parameters["hidden_weight"])), weight)


def cosine(inputs: torch.Tensor, weight: torch.Tensor, parameters: Parameters, arguments: dict) -> torch.Tensor:
    """l_e = cos(W_h x, w_e) exp(s) / temperature, the scale s learned, its factor at most 1 / `LEAST_TEMPERATURE`.

    On the sphere neither a token's length nor an expert's decides.

    Source: X-MoE, section 3.2 (https://huggingface.co/papers/2204.09179).
    """
    tokens = F.normalize(F.linear(inputs, parameters["hidden_weight"]), dim=-1, eps=LEAST_NORM)
    scale = (parameters["log_scale"].exp() / arguments["temperature"]).clamp_max(1 / LEAST_TEMPERATURE)
    return F.linear(tokens, F.normalize(weight, dim=-1, eps=LEAST_NORM)) * scale


def attention(inputs: torch.Tensor, weight: torch.Tensor, parameters: Parameters, arguments: dict) -> torch.Tensor:
    """l = softmax(q k^T) v with q, k, v one number per expert, from the token: experts attend to one another.

    Where queries or keys are large, experts that attend to the same one have equal logits.

    Source: Yuan 2.0-M32, attention router (https://huggingface.co/papers/2405.17976), without a 1 / sqrt factor, as
    its code has it.
    """
    queries, keys = (F.linear(inputs, parameters[name]) for name in ("query_weight", "key_weight"))
    values = F.linear(inputs, weight)
    return ((queries[:, :, None] * keys[:, None]).softmax(-1) @ values[..., None]).squeeze(-1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_temperature(value: Any) -> bool:
    return isinstance(value, int | float) and LEAST_TEMPERATURE <= value < float("inf")


ROUTER_WIDTH = Argument(16, "a whole number >= 1", _is_count)

ROUTER_ARCHITECTURES: dict[str, RouterArchitecture] = {
    "linear": RouterArchitecture(linear),
    "mlp": RouterArchitecture(
        mlp, weight=("E", "H"), parameters={"hidden_weight": ("H", "D")}, arguments={"hidden_size": ROUTER_WIDTH}
    ),
    "cosine": RouterArchitecture(
        cosine,
        weight=("E", "H"),
        parameters={"hidden_weight": ("H", "D"), "log_scale": ("1",)},
        zeros=frozenset({"log_scale"}),
        arguments={
            "hidden_size": ROUTER_WIDTH,
            "temperature": Argument(0.5, f"a number >= {LEAST_TEMPERATURE}", _is_temperature),
        },
    ),
    "attention": RouterArchitecture(attention, parameters={"query_weight": ("E", "D"), "key_weight": ("E", "D")}),
}


def router_architecture(config: MoEConfig) -> RouterArchitecture:
    """The architecture that `config.router_arch` names.

    Raises:
        MoEError: for an unknown name.
    """
    architecture = ROUTER_ARCHITECTURES.get(config.router_arch)
    if architecture is None:
        raise MoEError(f"router_arch is {config.router_arch!r}; it must be one of {list(ROUTER_ARCHITECTURES)}.")
    return architecture
