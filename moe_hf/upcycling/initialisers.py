"""Initialisers: which neurons of the dense MLP each expert starts from.

An initialiser is a frozen dataclass whose fields are its options. `INITIALISERS` maps names to classes; where an
`init` is expected, a name stands for the class with its default options.

Letters: F expert width, E experts.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite
from moe_hf.upcycling.recipes import ExpertRecipe


@dataclass(frozen=True)
class DenseLayer:
    """What an initialiser may know of the layer whose MLP it turns into experts.

    Attributes:
        site: where the MLP is, its widths, whether it is gated.
        read: `read(piece, source=0) -> torch.Tensor`, a piece of the dense MLP (see `recipes`), loaded when asked for.
        width: F, of one expert.
        seed: of all random numbers; combine it with the layer's index.
    """

    site: MLPSite
    read: Callable[..., torch.Tensor]
    width: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Initialiser:
    """Base of the initialisers.

    `name` is what a user types, `equation` and `paper` go into a checkpoint's metadata.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    paper: ClassVar[str]

    @property
    def exact(self) -> bool:
        """Whether the experts compute the dense function when a token's weights sum to `routed_scaling_factor`."""
        return True

    @property
    def shards(self) -> int:
        """Experts that only together hold one dense MLP; they share a router row at the start."""
        return 1

    def expert_width(self, dense_width: int) -> int | None:
        """The expert width that this initialiser asks for, or None for the configured one."""
        return None

    def check(self, config: MoEConfig) -> None:
        """Refuse a configuration that this initialiser cannot fill.

        Raises:
            MoEError: with the field to change.
        """

    def experts(self, layer: DenseLayer, config: MoEConfig) -> list[ExpertRecipe]:
        """The E experts of one layer, without the scale, noise and key that all initialisers share."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Name, options, equation and source, for a checkpoint's metadata."""
        return {"name": self.name, **asdict(self), "equation": self.equation, "paper": self.paper}


@dataclass(frozen=True, kw_only=True)
class Copy(Initialiser):
    """Each expert is the dense MLP; wider experts are filled up with neurons of zeros, which stay zero in training."""

    name: ClassVar[str] = "copy"
    equation: ClassVar[str] = "E_i(x) = FFN(x)"
    paper: ClassVar[str] = "sparse upcycling, section 3 (https://huggingface.co/papers/2212.05055)"

    def experts(self, layer: DenseLayer, config: MoEConfig) -> list[ExpertRecipe]:
        """E recipes that take all neurons in order."""
        return [ExpertRecipe(neurons=padded(layer.site, layer.width))] * config.num_experts


INITIALISERS: dict[str, type[Initialiser]] = {"copy": Copy}


def padded(site: MLPSite, width: int) -> torch.Tensor | None:
    """All dense neurons in order, filled up to `width` with -1; None when nothing is to be filled up.

    Raises:
        MoEError: when the experts are narrower than the dense MLP.
    """
    dense_width = site.intermediate_size
    if width < dense_width:
        raise MoEError(
            f"moe_intermediate_size is {width}, less than the dense MLP of {site.layer} ({dense_width}): whole copies do "
            f'not fit. Leave it out, or use init="granular" or "split", which cut the MLP into narrower experts.'
        )
    if width == dense_width:
        return None
    return torch.cat([torch.arange(dense_width), torch.full((width - dense_width,), -1)])


def make_initialiser(init: str | Initialiser, options: dict[str, Any] | None = None) -> Initialiser:
    """The initialiser that `init` names, with its options; an instance is returned as it is.

    Raises:
        MoEError: for an unknown name or option, or a value outside its range.
    """
    if isinstance(init, Initialiser):
        return init
    if init not in INITIALISERS:
        raise MoEError(f"init is {init!r}; it must be one of {list(INITIALISERS)}, or an Initialiser.")
    cls = INITIALISERS[init]
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise MoEError(f"init={init!r} has no option {unknown}; it has {known or 'none'}.")
    return cls(**(options or {}))
