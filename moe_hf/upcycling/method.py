"""How a dense checkpoint becomes a MoE: initialiser, router, noise, shared expert, seed; one object for both ways.

Letters: D model width, F expert width, E experts, K experts per token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite
from moe_hf.modeling.router import Router
from moe_hf.upcycling.expected_weight import expected_weight, gaussian_states, router_of
from moe_hf.upcycling.initialisers import Copy, DenseLayer, Initialiser, make_initialiser
from moe_hf.upcycling.recipes import ExpertRecipe, random_generator
from moe_hf.upcycling.router_init import (
    NormalRouter,
    RouterInit,
    RouterLayer,
    ZeroRouter,
    make_router_init,
    spreads_no_ties,
)


@dataclass(frozen=True)
class LayerStates:
    """What the dense model tells of one layer.

    Attributes:
        tokens: what its MLP sees on the user's tokens, (T, D).
        prompts: what it sees on each of the router's prompts, (T, D) each.
        expected_weight: the mean sum of a token's weights at the start; `routed_scaling_factor` if None.
    """

    tokens: torch.Tensor | None = None
    prompts: tuple[torch.Tensor, ...] = ()
    expected_weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class UpcyclingMethod:
    """What decides the numbers of a MoE, besides its configuration, the dense weights and the user's tokens.

    Attributes:
        init: how the experts start.
        router_init: how the routers start.
        noise: Gaussian noise on each expert, in standard deviations of each projection.
        shared_share: the share of the output that a shared expert as wide as the dense MLP takes; the routed experts
            have the rest.
        seed: of all random numbers.
    """

    init: Initialiser = field(default_factory=Copy)
    router_init: RouterInit = field(default_factory=NormalRouter)
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
        """Whether the MoE computes the dense function, given weights whose sum is the same for all tokens."""
        return self.init.exact and self.noise == 0

    def needs_inputs(self, config: MoEConfig) -> bool:
        """Whether the user's tokens are required."""
        return self.init.needs_inputs(config) or self.router_init.needs_inputs

    def uses_inputs(self, config: MoEConfig) -> bool:
        """Whether the user's tokens, where they are given, change a number."""
        return self.init.needs_inputs(config) or self.router_init.uses_inputs

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
        if config.num_experts_per_layer and (self.init.shards > 1 or self.init.makes_shared_expert):
            raise MoEError(
                f"init={self.init.name!r} cuts the dense MLP into num_experts parts, and num_experts_per_layer gives layers "
                "fewer: leave one of them out."
            )
        if config.router_arch != "linear" and not isinstance(self.router_init, NormalRouter):
            raise MoEError(
                f"router_init={self.router_init.name!r} gives the rows of a linear router, and router_arch is "
                f"{config.router_arch!r}: leave one of them out."
            )
        self.init.check(config)
        self.router_init.check(config, config.num_experts // self.init.shards)
        resolution = torch.finfo(dtype).eps
        if 0 < self.noise < resolution:
            raise MoEError(
                f"noise is {self.noise}, below the resolution of {dtype} ({resolution:.1e}): most experts would stay equal. "
                "Use more noise, or a wider dtype."
            )
        if self.shared_share == type(self).shared_share:
            return
        if self.init.makes_shared_expert or config.shared_expert_intermediate_size == 0:
            reason = (
                f"init={self.init.name!r} makes the shared expert of neurons of its own"
                if self.init.makes_shared_expert
                else "there is no shared expert (shared_expert_intermediate_size=0)"
            )
            raise MoEError(f"shared_share is {self.shared_share}, and {reason}: leave shared_share out.")

    def cost_at_start(self, config: MoEConfig, why_inexact: str | None) -> str:
        """Why the MoE starts worse than the dense model, and what to do about it; `why_inexact` is what that says."""
        reasons = [self.init.cost_at_start(config)]
        if self.noise:
            reasons.append(
                f"noise={self.noise:g} hides the weights of each expert under noise of {self.noise:g} standard deviations: "
                "use less, such as 0.05, or none."
            )
        if why_inexact:
            reasons.append(f"{why_inexact[0].upper()}{why_inexact[1:]}.")
        return " ".join(filter(None, reasons)) or "Look at the first layer that differs, which the verification names."

    def settled(self, config: MoEConfig) -> "UpcyclingMethod":
        """With options that were left to the configuration written out, for the metadata."""
        return replace(self, init=self.init.settled(config))

    def set_width(
        self, config: MoEConfig, sites: Sequence[MLPSite], dense_widths: Sequence[tuple[int, ...]] | None = None
    ) -> None:
        """Set `config.moe_intermediate_size`, where none was given, to what the widest dense MLP of `sites` asks for.

        It stays None when experts have their dense MLP's width, which may differ between layers. To be called before a
        model is made from `config`.

        Args:
            config (`MoEConfig`): of the MoE, changed in place.
            sites (`Sequence[MLPSite]`): the dense MLPs that become experts.
            dense_widths (`Sequence[tuple[int]]`, *optional*): of each of them in each checkpoint, when there are several.

        Raises:
            MoEError: when a dense MLP cannot be cut, or the given width is too small.
        """
        dense_widths = dense_widths or [(site.intermediate_size,) for site in sites]
        widths = [self._least_width(config, *pair) for pair in zip(sites, dense_widths, strict=True)]
        if config.moe_intermediate_size is None and widths != [site.intermediate_size for site in sites]:
            config.moe_intermediate_size = max(widths)

    def _least_width(self, config: MoEConfig, site: MLPSite, dense_widths: tuple[int, ...]) -> int:
        least = self.init.expert_width(dense_widths, config)
        given = config.moe_intermediate_size
        if given is not None and given < least:
            raise MoEError(
                f"moe_intermediate_size is {given}, and init={self.init.name!r} puts {least} neurons of the dense MLP of "
                f"{site.layer} (width {max(dense_widths)}) into an expert, so they do not fit. Leave it out, or use "
                'init="granular" or "split", which cut the MLP into narrower experts.'
            )
        return least

    def constant_weight(self, config: MoEConfig, site: MLPSite) -> float | None:
        """The sum of a token's weights at the start, where it is the same for all tokens; or else None."""
        # Rows of zeros make any weights constant; of all others, normal ones say what the configuration makes of them.
        method = self if isinstance(self.router_init, ZeroRouter) else replace(self, router_init=NormalRouter())
        router = router_of(config, site)
        tensors = method.router_tensors(router, site, config)
        weight, is_constant = expected_weight(router, tensors, gaussian_states(site.hidden_size, self.seed))
        return weight if is_constant else None

    def why_inexact(self, config: MoEConfig, sites: Sequence[MLPSite], dtype: torch.dtype) -> str | None:
        """Why a MoE of this configuration differs from the dense model although the method is exact, or None.

        Two things do: weights of a token whose sum depends on the router, and factors that the dtype rounds.
        """
        weights = {site: self.constant_weight(config, site) for site in sites}
        if None in weights.values():
            exact = "" if spreads_no_ties(config) else " (with a router of zeros, ZeroRouter(noise=0), it is exact)"
            return (
                f"router_type={config.router_type!r}, num_experts_per_tok={config.num_experts_per_tok}, "
                f"norm_topk_prob={config.norm_topk_prob} and scoring_func={config.scoring_func!r} do not give weights that "
                f"sum to 1 for each token, so that the experts' mixture is the dense MLP on average only{exact}"
            )
        factors = {factor for site in sites for factor in self._factors(config, site, weights[site])}
        rounded = sorted(factor for factor in factors if factor and math.frexp(factor)[0] != 0.5)
        if rounded and torch.finfo(dtype).bits < 32:
            return (
                f"output weights are multiplied by {', '.join(f'{factor:.6g}' for factor in rounded)}, which is no power "
                f"of two, so that {dtype} rounds the products. Choose powers of two (shared_share=0.5, or "
                "routed_scaling_factor equal to the number of shards), or convert in float32"
            )
        return None

    def _factors(self, config: MoEConfig, site: MLPSite, expected: float) -> list[float]:
        """What output weights and biases are multiplied by."""
        shared = self._shared_share(config, site)
        routed = (1 - shared) / expected
        return [routed * self.init.output_scale(config), routed if site.has_bias else 0.0, shared]

    def _shared_share(self, config: MoEConfig, site: MLPSite) -> float:
        """The part of the dense output that the shared expert takes: none when it is too narrow for the whole MLP."""
        whole = config.shared_expert_intermediate_size >= site.intermediate_size
        return self.shared_share if whole and not self.init.makes_shared_expert else 0.0

    def recipes(
        self,
        site: MLPSite,
        config: MoEConfig,
        read: Callable[..., torch.Tensor],
        *,
        dense_widths: tuple[int, ...] | None = None,
        hidden_states: LayerStates | None = None,
        act_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[list[ExpertRecipe], ExpertRecipe | None]:
        """The routed experts of the layer at `site`, and its shared expert if it has one.

        Args:
            site (`MLPSite`): the dense MLP.
            config (`MoEConfig`): of the MoE; its width is set (`set_width`).
            read (`Callable`): `read(piece, source=0)`, a piece of the dense MLP.
            dense_widths (`tuple[int]`, *optional*): of this layer's MLP in each checkpoint, when there are several.
            hidden_states (`LayerStates`, *optional*): what the MLP sees, and what its experts will weigh; required when
                `needs_inputs`, and where weights do not sum to `routed_scaling_factor`.
            act_fn (`Callable`, *optional*): the MLP's activation; required with `hidden_states`.
        """
        dense_widths = dense_widths or (site.intermediate_size,)
        width = config.moe_intermediate_size or site.intermediate_size
        least = self._least_width(config, site, dense_widths)
        assert config.moe_intermediate_size or width == least, "set_width comes before recipes"
        layer = DenseLayer(
            site=site,
            read=read,
            width=width,
            seed=self.seed,
            dense_widths=dense_widths,
            hidden_states=None if hidden_states is None else hidden_states.tokens,
            act_fn=act_fn,
        )
        made = self.init.experts(layer, config)
        share = self._shared_share(config, site)
        made, shared = made[: config.experts_of_layer(site.layer_index)], made[config.num_experts :]
        shared = shared[0] if shared else self._shared(config, site, share)
        if shared is not None and config.shared_expert_gate:
            # A gate of zeros is sigmoid(0) = 0.5, or two coefficients of 0.5.
            shared = replace(shared, output_scale=2 * shared.output_scale, bias_scale=2 * shared.bias_scale)
        expected = None if hidden_states is None else hidden_states.expected_weight
        routed = (1 - share) / (config.routed_scaling_factor if expected is None else expected)
        if config.shared_expert_gate == "softmax":
            routed *= 2
        experts = [
            replace(
                recipe,
                output_scale=routed * self.init.output_scale(config),
                bias_scale=routed,
                noise=self.noise,
                key=(self.seed, site.layer_index, expert),
            )
            for expert, recipe in enumerate(made)
        ]
        return experts, shared

    def _shared(self, config: MoEConfig, site: MLPSite, share: float) -> ExpertRecipe | None:
        """The first neurons of the dense MLP, as many as the shared expert has, with `share` of their output."""
        width = config.shared_expert_intermediate_size
        if width == 0:
            return None
        neurons = torch.arange(width)
        neurons[site.intermediate_size :] = -1
        whole = width == site.intermediate_size
        return ExpertRecipe(neurons=None if whole else neurons, output_scale=share, bias_scale=share)

    def router_rows(self, site: MLPSite, config: MoEConfig, hidden_states: LayerStates | None = None) -> torch.Tensor:
        """The router's weight, (E, D) float32; the shards of a copy have one row."""
        seen = hidden_states or LayerStates()
        layer = RouterLayer(
            layer_index=site.layer_index,
            hidden_size=site.hidden_size,
            groups=config.experts_of_layer(site.layer_index) // self.init.shards,
            config=config,
            seed=self.seed,
            hidden_states=seen.tokens,
            prompt_states=seen.prompts,
        )
        return self.router_init.rows(layer).repeat_interleave(self.init.shards, 0)

    def router_tensors(
        self, router: Router, site: MLPSite, config: MoEConfig, hidden_states: LayerStates | None = None
    ) -> dict[str, torch.Tensor]:
        """All that a layer's router has, by name, float32: its rows, and what else it has with no effect or random.

        Args:
            router (`Router`): of the MoE, on any device; only its names and shapes are read.
        """
        tensors = {name: torch.zeros(tensor.shape) for name, tensor in router.state_dict().items()}
        for name in tensors.keys() & dict(router.named_parameters()).keys() - router.zero_parameters:
            if name == "weight" and router.shapes[name] == ("E", "D"):
                tensors[name] = self.router_rows(site, config, hidden_states)
                continue
            generator = random_generator(self.seed, site.layer_index, "router", name)
            # An embedding of tasks is read in place of a normalised hidden state.
            spread = 1.0 if name == "task_embedding" else tensors[name].shape[-1] ** -0.5
            tensors[name] = spread * torch.randn(tensors[name].shape, generator=generator)
        return tensors

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's metadata; `from_dict` reads them, and the same ones give the same bytes."""
        return {
            "init": self.init.to_dict(),
            "router_init": self.router_init.to_dict(),
            "noise": float(self.noise),
            "shared_share": float(self.shared_share),
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "UpcyclingMethod":
        """The method that a checkpoint's `config.upcycling` records."""
        init, router_init = facts["init"], facts["router_init"]
        return cls(
            init=make_initialiser(init["name"], init["options"]),
            router_init=make_router_init(router_init["name"], router_init["options"]),
            noise=facts["noise"],
            shared_share=facts["shared_share"],
            seed=facts["seed"],
        )
