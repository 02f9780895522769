"""One expert at a time, in one form whatever the family and the file: gate (F, D), up (F, D), down (D, F).

A piece says which tensor of the file holds a projection of an expert, and how it lies there. Nothing is read before it is asked
for, and no more than one expert of a stacked tensor.

Letters: E experts, D model width, F expert width.
"""

from dataclasses import dataclass, field

import torch

from moe_hf.doctor.tensors import Tensors


GATE, UP, DOWN = PROJECTIONS = ("gate", "up", "down")
# Which rows of a fused (2F, D) are one of its two projections.
WHOLE, FIRST, SECOND, EVEN, ODD = ("whole", "first", "second", "even", "odd")


@dataclass(frozen=True)
class Piece:
    """One projection of one expert in a file.

    Attributes:
        stored: name of the tensor.
        expert: the row of a stacked tensor (E, ...), or None for a tensor of its own.
        rows: which rows of the matrix, of `WHOLE`, `FIRST`, `SECOND`, `EVEN` and `ODD`.
        transposed: whether the matrix lies as (in, out).
    """

    stored: str
    expert: int | None = None
    rows: str = WHOLE
    transposed: bool = False

    def matrix(self, tensors: Tensors) -> torch.Tensor:
        """The matrix (out, in), in its own dtype, as a view of what was read where it can be one."""
        return self.of(self.raw(tensors))

    def raw(self, tensors: Tensors) -> torch.Tensor:
        """What lies in the file for this expert, which pieces of one fused matrix share."""
        if self.expert is None:
            return tensors.read(self.stored)
        return tensors.read(self.stored, self.expert, self.expert + 1)[0]

    def of(self, raw: torch.Tensor) -> torch.Tensor:
        """This piece of what [`raw`] read."""
        matrix = raw.t() if self.transposed else raw
        half = len(matrix) // 2
        views = {FIRST: slice(0, half), SECOND: slice(half, None), EVEN: slice(0, None, 2), ODD: slice(1, None, 2)}
        return matrix if self.rows == WHOLE else matrix[views[self.rows]]

    @property
    def place(self) -> tuple[str, int | None]:
        """The same for pieces that are read together."""
        return self.stored, self.expert


@dataclass
class Block:
    """The experts and the router of one layer, as they lie in a file.

    Attributes:
        name: of the block in the model, such as `model.layers.3.mlp`.
        layer: number of the decoder layer.
        num_experts: E, as the configuration has it.
        pieces: (expert, projection) to where it lies.
        router: name of the (E, D) weight of the router in the file, or None.
        bias: name of the correction bias (E,) in the file, or None.
        shared: names in the file of what stands beside the routed experts.
        expected: the projections that the family's experts have; empty where that is told by `pieces` alone.
        opaque: why the experts cannot be read one by one, or None.
    """

    name: str
    layer: int
    num_experts: int
    pieces: dict[tuple[int, str], Piece] = field(default_factory=dict)
    router: str | None = None
    bias: str | None = None
    shared: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()
    opaque: str | None = None

    def projections(self) -> tuple[str, ...]:
        """Those that its experts have: gated ones all three."""
        return self.expected or tuple(name for name in PROJECTIONS if any(key[1] == name for key in self.pieces))

    def whole_experts(self) -> list[int]:
        """The experts of which every projection lies in the file."""
        wanted = self.projections()
        return [e for e in range(self.num_experts) if wanted and all((e, name) in self.pieces for name in wanted)]

    def matrices(self, tensors: Tensors, expert: int) -> dict[str, torch.Tensor]:
        """The projections of one expert; what lies together is read once."""
        read: dict[tuple[str, int | None], torch.Tensor] = {}
        found = {}
        for name in self.projections():
            piece = self.pieces.get((expert, name))
            if piece is not None:
                if piece.place not in read:
                    read[piece.place] = piece.raw(tensors)
                found[name] = piece.of(read[piece.place])
        return found
