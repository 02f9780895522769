"""The shapes that `fit_shape` chooses from: which layers get experts, how many, and of what width.

Letters: F width of the dense MLP, E experts, K experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_hf.upcycling.initialisers import make_initialiser


# The whole preference, in one place. Among shapes whose experts have equally many weights the first of SHARDS is taken, and
# more weights are taken before fewer.
#
# Parts that each copy of the MLP is cut into: with 1, whole copies, of which a token takes 2; with 2, experts of half the width,
# of which a token takes 2, so that it costs what it costs the dense model. These hold less at a time, and learn less from the same
# tokens, less than the dense model itself too (benchmarks/README.md).
SHARDS = (1, 2)
# Copies of the MLP in a layer with experts; one layer of so many has them.
COPIES = (4, 8, 16, 32)
EVERY = (3, 2, 1)
EXPERTS_PER_TOKEN = 2


@dataclass(frozen=True, order=True)
class Shape:
    """A shape of the ladder; a later one in the order is preferred.

    Attributes:
        weights: copies of the MLP in all layers together.
        preference: of shapes with equal weights, the higher one is preferred.
        copies: of the MLP, in each layer with experts.
        shards: parts of each copy.
        every: one layer of so many has experts.
    """

    weights: int
    preference: int
    copies: int
    shards: int
    every: int

    @property
    def num_experts(self) -> int:
        """E of a layer with experts."""
        return self.copies * self.shards

    def arguments(self) -> dict[str, Any]:
        """What `upcycle` is given for it."""
        return {
            "num_experts": self.num_experts,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "init": "copy" if self.shards == 1 else make_initialiser("granular", {"shards": self.shards}),
            "decoder_sparse_step": self.every,
        }

    def __str__(self) -> str:
        width = "F" if self.shards == 1 else f"F / {self.shards}"
        layers = {1: "each layer", 2: "each second layer", 3: "each third layer"}[self.every]
        return f"{self.num_experts} experts of width {width} in {layers}, {EXPERTS_PER_TOKEN} per token"


def ladder(num_layers: int) -> list[Shape]:
    """All shapes of a model, the least preferred one first."""
    return sorted(_shapes(num_layers))


def _shapes(num_layers: int) -> Iterator[Shape]:
    for every in EVERY:
        for copies in COPIES:
            for rank, shards in enumerate(reversed(SHARDS)):
                if weights := num_layers // every * copies:
                    yield Shape(weights, rank, copies, shards, every)
