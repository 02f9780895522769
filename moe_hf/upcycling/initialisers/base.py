"""What an initialiser is: it says, per layer, which neurons of the dense MLP each expert starts from.

Letters: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite
from moe_hf.modeling.routing import wide
from moe_hf.upcycling.choices import Choice
from moe_hf.upcycling.recipes import BLOCK_BYTES, ExpertRecipe, random_generator


@dataclass(frozen=True)
class DenseLayer:
    """What an initialiser may know of the layer whose MLP it turns into experts.

    Attributes:
        site: where the MLP is, its widths, whether it is gated.
        read: `read(piece, source=0) -> torch.Tensor`, a piece of the dense MLP (see `recipes`), loaded when asked for.
        width: F, of one expert.
        seed: of all random numbers.
        dense_widths: of this layer's MLP in each dense checkpoint; the first is that of `site`.
        hidden_states: the MLP's inputs on the user's tokens, (T, D); None when there are no tokens.
        act_fn: the MLP's activation; only asked for together with `hidden_states`.
    """

    site: MLPSite
    read: Callable[..., torch.Tensor]
    width: int
    seed: int
    dense_widths: tuple[int, ...]
    hidden_states: torch.Tensor | None = None
    act_fn: Callable[[torch.Tensor], torch.Tensor] | None = None

    def generator(self, *key: int | str) -> torch.Generator:
        """Random numbers of this layer alone, one stream for each `key`."""
        return random_generator(self.seed, self.site.layer_index, *key)

    @torch.no_grad()
    def activations(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the dense neurons put out on the user's tokens, in chunks of tokens.

        Yields:
            the chunk's hidden states (T, D) and its activations act(x gate) * (x up), or act(x up), (T, F), float32.
        """
        names = ("gate", "up") if self.site.gated else ("up",)
        weights = [self.read(name) for name in names]
        biases = [self.read(f"{name}_bias") if self.site.has_bias else None for name in names]
        step = max(1, BLOCK_BYTES // (4 * self.site.intermediate_size))
        for hidden in self.hidden_states.split(step):
            hidden = hidden.to(weights[0].device, weights[0].dtype)
            rows = [functional.linear(hidden, *pair) for pair in zip(weights, biases, strict=True)]
            rows[0] = self.act_fn(rows[0])
            yield wide(hidden), wide(rows[0] * rows[1] if self.site.gated else rows[0])


@dataclass(frozen=True, kw_only=True)
class Initialiser(Choice, ABC):
    """Base of the initialisers: a frozen dataclass whose fields are its options."""

    @property
    def exact(self) -> bool:
        """Whether the experts compute the dense function when a token's weights sum to `routed_scaling_factor`."""
        return True

    def cost_at_start(self, config: MoEConfig) -> str:
        """What the MoE loses at its start, and what to do about it; empty for an exact one."""
        return ""

    @property
    def shards(self) -> int:
        """Neighbouring experts that only together hold one dense MLP; they share a router row at the start."""
        return 1

    @property
    def makes_shared_expert(self) -> bool:
        """Whether a shared expert comes last in `experts`, instead of being a share of the whole dense MLP."""
        return False

    def needs_inputs(self, config: MoEConfig) -> bool:
        """Whether it looks at hidden states of the user's tokens."""
        return False

    def expert_width(self, dense_widths: tuple[int, ...], config: MoEConfig) -> int:
        """The least F that holds what an expert takes of a dense MLP; of its widths the first is the upcycled model's.

        Raises:
            MoEError: when the dense MLP cannot be cut as asked for.
        """
        return dense_widths[0]

    def output_scale(self, config: MoEConfig) -> float:
        """Factor on the routed experts' `down_proj`, for weights that sum to 1; their biases are not scaled."""
        return 1.0

    def settled(self, config: MoEConfig) -> "Initialiser":
        """With options that were left to the configuration written out, for the metadata."""
        return self

    def averaged(self, config: MoEConfig) -> tuple[int, ...]:
        """The dense checkpoints whose parameters outside of the MLPs are averaged; 0 is the one that is upcycled."""
        return (0,)

    def check(self, config: MoEConfig) -> None:
        """Refuse a configuration that this initialiser cannot fill.

        Raises:
            MoEError: with the field to change.
        """

    @abstractmethod
    def experts(self, layer: DenseLayer, config: MoEConfig) -> list[ExpertRecipe]:
        """The E experts of one layer, followed by a shared expert if the initialiser makes it.

        Scales, noise and the stream of random numbers are added by `UpcyclingMethod.recipes`.
        """


def check_ratio(name: str, ratio: float) -> None:
    """Refuse a part of the neurons that is not in [0, 1].

    Raises:
        MoEError: naming the initialiser.
    """
    if not 0 <= ratio <= 1:
        raise MoEError(f"ratio of init={name!r} is {ratio}; it must be in [0, 1], the part of the neurons drawn anew.")


def redrawn(layer: DenseLayer, expert: int, count: int, ratio: float, shared_indices: bool) -> dict[str, torch.Tensor]:
    """Which of an expert's first `count` neurons are drawn anew: piece to sorted positions, floor(ratio * count) of them.

    Args:
        shared_indices (`bool`): one set for all projections, so that a neuron is new or intact as a whole; otherwise
            one set for each.
    """
    amount = int(ratio * count)
    if amount == 0:
        return {}
    positions = {}
    for projection in ("gate", "up", "down") if layer.site.gated else ("up", "down"):
        generator = layer.generator(expert, "redrawn", "all" if shared_indices else projection)
        positions[projection] = torch.randperm(count, generator=generator)[:amount].sort().values
    # A bias belongs to its neuron; down_proj has one bias for all neurons.
    return positions | {f"{name}_bias": rows for name, rows in positions.items() if name != "down"}


def fill_up(neurons: torch.Tensor, width: int) -> torch.Tensor:
    """`neurons`, followed by neurons of zeros up to `width`."""
    return torch.cat([neurons, torch.full((width - len(neurons),), -1)])


def all_neurons(dense_width: int, width: int) -> torch.Tensor | None:
    """All dense neurons in order, filled up to `width` with neurons of zeros; None when nothing is to be filled up."""
    return None if width == dense_width else fill_up(torch.arange(dense_width), width)
