"""Noise on the router's logits in training: what it is drawn from, and how wide it is.

Noise on the router's input is `router_jitter_noise`; it multiplies. The clean logits stay what the losses see.

Letters: T tokens, D model width, E experts.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .configuration_moe import MoEConfig
from .routing import RouterNoise


# Keeps the standard deviation of learned noise above zero (Shazeer et al., `noise_epsilon`).
LEAST_LEARNED_STD = 1e-2


def _gaussian(logits: torch.Tensor, inputs: torch.Tensor, parameters: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """N(0, 1 / E^2), as in V-MoE, section 2 (https://huggingface.co/papers/2106.05974)."""
    std = torch.full_like(logits[:1, :1], 1 / logits.shape[-1]).squeeze()
    return torch.randn_like(logits) * std, std


def _uniform(logits: torch.Tensor, inputs: torch.Tensor, parameters: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform in [-1, 1]."""
    return 2 * torch.rand_like(logits) - 1, torch.full_like(logits[:1, :1], 3**-0.5).squeeze()


def _gumbel(logits: torch.Tensor, inputs: torch.Tensor, parameters: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel(0, 1): the top K are K draws from the softmax without replacement (https://huggingface.co/papers/1903.06059)."""
    std = torch.full_like(logits[:1, :1], math.pi / 6**0.5).squeeze()
    return -torch.empty_like(logits).exponential_().log(), std


def _learned(logits: torch.Tensor, inputs: torch.Tensor, parameters: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """N(0, softplus(x W)^2), as in Shazeer et al., eq. 4 (https://huggingface.co/papers/1701.06538)."""
    std = F.softplus(F.linear(inputs, parameters["noise_weight"].to(inputs.dtype))) + LEAST_LEARNED_STD  # (T, E)
    return torch.randn_like(logits) * std, std


# A sample and its standard deviation from (logits (T, E), the router's input (T, D), the router's parameters).
NOISES: dict[str, Callable] = {"gaussian": _gaussian, "uniform": _uniform, "gumbel": _gumbel, "learned": _learned}


def noise_parameters(config: MoEConfig) -> dict[str, tuple[str, ...]]:
    """Shapes of the parameters that `config.router_noise` needs, by name, in the letters "E" and "D"."""
    return {"noise_weight": ("E", "D")} if config.router_noise == "learned" else {}


def draw_noise(
    router_logits: torch.Tensor, config: MoEConfig, inputs: torch.Tensor, parameters: dict[str, torch.Tensor]
) -> RouterNoise | None:
    """Add noise to a copy of the logits; None without `router_noise`.

    Args:
        router_logits (`torch.Tensor`): clean logits, (T, E), float32 or wider.
        inputs (`torch.Tensor`): what the router read, (T, D).
        parameters (`dict`): the router's parameters besides its weight.
    """
    if config.router_noise == "none":
        return None
    sample, std = NOISES[config.router_noise](router_logits, inputs, parameters)
    scale = config.router_noise_scale
    return RouterNoise(logits=router_logits + scale * sample, std=scale * std)
