"""Engines that compute tokens of several sequences in one row, and the models for which they would do so wrongly.

transformers' continuous batching and vLLM's Transformers backend keep keys and values in pages of their own: what a router
knows about the earlier tokens of a sequence has no place there. vLLM also computes the experts by itself.
"""

from collections.abc import Callable, Iterator
from functools import wraps

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin

from .configuration_moe import MoEConfig, MoEError
from .dense_mlp import MLPSite, activation_of, holder_of
from .routers import carries_on, check_generation, why_no_cache
from .routing_ids import id_counts


# Name of the attention that vLLM asks the model for.
VLLM_ATTENTION = "vllm"


def check_continuous_batching(config: MoEConfig) -> None:
    """Refuse a model whose routers need more than a token in a row of tokens of several sequences.

    Raises:
        MoEError: with the reason, and what does generate with it.
    """
    check_generation(config)
    for reason in _reasons_against_one_row(config):
        raise MoEError(f"Continuous batching would not compute what generate does: {reason} Use generate.")


class CheckedGeneration:
    """Goes before `GenerationMixin`: refuses generation where it would not be what the model computes."""

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        check_generation(self.config)
        return super().generate(*args, **kwargs)

    @wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args, **kwargs):
        check_continuous_batching(self.config)
        return super().init_continuous_batching(*args, **kwargs)


def check_vllm(config: MoEConfig, base_model: nn.Module, sites: list[MLPSite]) -> None:
    """Refuse a model of which vLLM's Transformers backend would make another one; it asks for a special attention.

    Args:
        config: of the model.
        base_model: the dense decoder.
        sites: its MLPs that are about to become experts.

    Raises:
        MoEError: with the reason, and the ways out.
    """
    if config._attn_implementation != VLLM_ATTENTION:
        return
    for reason in (*_reasons_against_one_row(config), *_reasons_against_vllm(config, base_model, sites)):
        raise MoEError(
            f"vLLM would not compute what this model does: {reason} Serve it with transformers (moe-hf serve), or export "
            "it to a native family (moe-hf export) where one can hold it."
        )


def _reasons_against_one_row(config: MoEConfig) -> Iterator[str]:
    if (reason := why_no_cache(config)) is not None:
        yield reason
    if carries_on(config):
        yield "its routers decide by earlier tokens of the sequence, which are not in the row when it decodes."
    if counts := id_counts(config):
        yield f"its routers need ids ({', '.join(counts)}), which a request cannot give."


def _reasons_against_vllm(config: MoEConfig, base_model: nn.Module, sites: list[MLPSite]) -> Iterator[str]:
    if config.output_mixture is not None:
        yield f"output_mixture={config.output_mixture!r} mixes predictions after the head, and the head is vLLM's."
    if config.extra_experts:
        yield f"it has num_experts experts to choose from, and extra_experts adds {config.extra_experts}."
    if config.num_moe_heads > 1:
        yield f"it takes the experts for as wide as the model, and num_moe_heads is {config.num_moe_heads}."
    if not all(site.gated and not site.has_bias for site in sites):
        yield "it takes the experts for gated and without biases, and they are not."
    if not all(_is_silu(activation_of(holder_of(base_model, site), site)) for site in sites):
        yield "it gives the experts a SiLU, and they have another activation."


def _is_silu(activation: Callable | nn.Module) -> bool:
    """Whether it is x * sigmoid(x): asked of numbers, since transformers and torch have several classes for it."""
    # Both signs: at 1 a sigmoid has the same value. Kernels round, so the values need not be equal bit by bit.
    numbers = torch.tensor([-2.0, -0.5, 0.5, 1.0, 3.0], dtype=torch.float32, device="cpu")
    values = activation(numbers)
    # Where modules are built without numbers their names must do.
    return type(activation).__name__.startswith("SiLU") if values.is_meta else torch.allclose(values, F.silu(numbers))
