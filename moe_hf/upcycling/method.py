"""How a dense checkpoint becomes a MoE: initialiser, router, noise, shared expert, seed; one object for both ways.

Letters: D model width, F expert width, E experts, K experts per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite
from moe_hf.upcycling.initialisers import Copy, DenseLayer, Initialiser
from moe_hf.upcycling.recipes import ExpertRecipe


@dataclass(frozen=True, kw_only=True)
class UpcyclingMethod:
    """What decides the numbers of a MoE, besides its configuration and the dense weights.

    Attributes:
        init: how the experts start.
        noise: Gaussian noise on each expert, in standard deviations of each projection.
        shared_share: the share of the output that a shared expert as wide as the dense MLP takes; the routed experts
            have the rest.
        seed: of all random numbers.
    """

    init: Initialiser = field(default_factory=Copy)
    noise: float = 0.0
    shared_share: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise MoEError(
                f"noise is {self.noise}; it must be finite and at least 0, relative to each tensor's spread."
            )
        if not 0 <= self.shared_share < 1:
            raise MoEError(f"shared_share is {self.shared_share}; it must be in [0, 1).")

    @property
    def exact(self) -> bool:
        """Whether the MoE computes the dense function, given weights that sum to `routed_scaling_factor`."""
        return self.init.exact and self.noise == 0

    def check(self, config: MoEConfig, dtype: torch.dtype) -> None:
        """Refuse what cannot be filled, and noise that the dtype rounds away.

        Raises:
            MoEError: with what to change.
        """
        if config.num_moe_heads > 1:
            raise MoEError(
                f"num_moe_heads={config.num_moe_heads} routes parts of tokens, and no dense MLP has experts of that width: "
                "the logits would differ from the dense model's. Train such a model from the start, or leave it out."
            )
        for name in ("expert_intermediate_sizes", "extra_experts"):
            if getattr(config, name):
                raise MoEError(
                    f"{name} gives experts that are not the dense MLP, so the logits would differ from the dense model's. "
                    "Train such a model from the start, or leave it out."
                )
        self.init.check(config)
        resolution = torch.finfo(dtype).eps
        if 0 < self.noise < resolution:
            raise MoEError(
                f"noise is {self.noise}, below the resolution of {dtype} ({resolution:.1e}): most experts would stay equal. "
                "Use more noise, or a wider dtype."
            )

    def recipes(
        self, site: MLPSite, config: MoEConfig, read: Callable[..., torch.Tensor]
    ) -> tuple[list[ExpertRecipe], ExpertRecipe | None]:
        """The routed experts of the layer at `site`, and its shared expert if it has one.

        Args:
            site (`MLPSite`): the dense MLP.
            config (`MoEConfig`): of the MoE.
            read (`Callable`): `read(piece, source=0)`, a piece of the dense MLP.
        """
        width = config.moe_intermediate_size or site.intermediate_size
        layer = DenseLayer(site=site, read=read, width=width, seed=self.seed)
        shared, share = self._shared(site, config)
        # A token's weights sum to the routed_scaling_factor, and each expert of a group of shards has a part of them.
        scale = share / config.routed_scaling_factor
        if config.shared_expert_gate == "softmax":
            scale *= 2  # two coefficients of zeros are 0.5 each
        experts = [
            replace(
                recipe,
                output_scale=recipe.output_scale * scale * self.init.shards,
                bias_scale=recipe.bias_scale * scale,
                noise=self.noise,
                key=(self.seed, site.layer_index, expert),
            )
            for expert, recipe in enumerate(
                self.init.experts(layer, config)[: config.experts_of_layer(site.layer_index)]
            )
        ]
        return experts, shared

    def _shared(self, site: MLPSite, config: MoEConfig) -> tuple[ExpertRecipe | None, float]:
        """The shared expert, and the share of the output that is left for the routed ones.

        As wide as the dense MLP or wider it takes `shared_share`; a gate of zeros is sigmoid(0) = 0.5, which its output
        weights make up for. A narrower one takes the first neurons and has no output at the start.
        """
        width = config.shared_expert_intermediate_size
        if width == 0:
            return None, 1.0
        neurons = torch.arange(width)
        neurons[site.intermediate_size :] = -1
        share = self.shared_share if width >= site.intermediate_size else 0.0
        scale = 2 * share if config.shared_expert_gate else share
        recipe = ExpertRecipe(
            neurons=None if width == site.intermediate_size else neurons, output_scale=scale, bias_scale=scale
        )
        return recipe, 1 - share

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's metadata; the same ones give the same bytes."""
        return {
            "init": self.init.to_dict(),
            "noise": float(self.noise),
            "shared_share": float(self.shared_share),
            "seed": self.seed,
        }
