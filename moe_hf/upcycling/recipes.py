"""How one expert is made from a dense MLP, as data, and the one place where its numbers are computed.

An `ExpertRecipe` says which neurons of which dense MLP an expert takes, which are drawn anew, how its output is scaled
and how much noise it gets. `block_tensors` lays the recipes of a layer out as the tensors of a checkpoint; `slot_rows`
yields the numbers in small blocks of rows. A model in memory is filled with these blocks, and files are written with
them, so that both ways give the same bytes for the same seed.

A dense MLP is read in pieces of one orientation: `gate` and `up` (F, D), `down` (D, F), and with biases `gate_bias`,
`up_bias` (F,), `down_bias` (D,). A neuron is a row of `gate` and `up` and a column of `down`.

Letters: D model width, F expert width, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite, expert_tensors
from moe_hf.modeling.routing import wide
from moe_hf.upcycling.gaussians import GaussianStream, key_to_seed


# Of the float32 numbers that are worked on at a time: less than the C library takes from the system and gives back with
# each tensor, which was measured to be three times as slow. Part of what makes random numbers reproducible.
BLOCK_BYTES = 1 << 19


@dataclass(frozen=True, eq=False)
class ExpertRecipe:
    """One expert, as a function of dense MLPs.

    Attributes:
        source: which of several dense checkpoints the expert comes from; 0 is the one that is upcycled.
        neurons: the dense neurons that the expert takes, in its own order, (F,) int64; -1 is a neuron of zeros. None
            for all, in order.
        redrawn: for pieces of which neurons are drawn anew, N(mean, std) of the values that they replace: piece to
            positions in the expert.
        output_scale: factor on `down`.
        bias_scale: factor on `down_bias`.
        noise: standard deviation of Gaussian noise, relative to the piece's own.
        key: names the expert's stream of random numbers: seed, layer, expert.
    """

    source: int = 0
    neurons: torch.Tensor | None = None
    redrawn: Mapping[str, torch.Tensor] = field(default_factory=dict)
    output_scale: float = 1.0
    bias_scale: float = 1.0
    noise: float = 0.0
    key: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> tuple | None:
        """Equal for experts whose numbers are equal bit by bit; None when they are random."""
        if self.noise > 0 or any(len(positions) for positions in self.redrawn.values()):
            return None
        neurons = None if self.neurons is None else self.neurons.numpy().tobytes()
        return self.source, neurons, self.output_scale, self.bias_scale


@dataclass(frozen=True)
class Slot:
    """A run of `rows` rows from row `start` of a destination tensor: one piece of one expert."""

    start: int
    rows: int
    piece: str
    recipe: ExpertRecipe


@dataclass(frozen=True)
class BlockTensor:
    """A tensor of a MoE block: its shape and the slots that fill it, each row once.

    Its rows are those of `tensor.view(-1, shape[-1])`, or of `tensor.view(-1)` when it is a bias.
    """

    shape: tuple[int, ...]
    slots: tuple[Slot, ...]

    @property
    def is_bias(self) -> bool:
        """Whether a row is one number."""
        return self.slots[0].piece.endswith("_bias")


class DensePiece:
    """One piece of a dense MLP with its moments, which several experts ask for.

    Args:
        tensor (`torch.Tensor`): the piece.
        mapped (`Callable`): what runs over its blocks, as `map` does.
    """

    def __init__(self, tensor: torch.Tensor, mapped: Callable[..., Iterable] = map):
        self.tensor, self._mapped = tensor, mapped

    @cached_property
    def std(self) -> float:
        """Standard deviation over all values."""
        return moments(self.tensor, mapped=self._mapped)[1]


def random_generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on all parts of its key alone, so that experts can be made in any order."""
    return torch.Generator().manual_seed(key_to_seed(*key) >> 1)


def dense_pieces(holder: nn.Module, site: MLPSite) -> dict[str, torch.Tensor]:
    """The pieces of a dense MLP in memory, as views where possible."""
    tensors = expert_tensors(holder, site)
    first = "gate_up_proj" if site.gated else "up_proj"
    pieces = {}
    for suffix, ending in (("", ""), ("_bias", "_bias")):
        if first + ending not in tensors:
            continue
        rows = tensors[first + ending]
        if site.gated:
            pieces["gate" + suffix], rows = rows.chunk(2)
        pieces["up" + suffix], pieces["down" + suffix] = rows, tensors["down_proj" + ending]
    return pieces


def block_tensors(
    recipes: list[ExpertRecipe], shared: ExpertRecipe | None, config: MoEConfig, site: MLPSite
) -> dict[str, BlockTensor]:
    """Lay out the experts of the layer at `site`: tensor names in its MoE block to what fills them.

    Args:
        recipes (`list[ExpertRecipe]`): of the E routed experts.
        shared (`ExpertRecipe` or `None`): of the shared expert.
    """
    width = config.moe_intermediate_size or site.intermediate_size
    tensors = {}
    for name, pieces, shape in _layout(site, width):
        slots, start = [], 0
        for recipe in recipes:
            for piece in pieces:
                rows = shape[0] // len(pieces)
                slots.append(Slot(start, rows, piece, recipe))
                start += rows
        tensors[f"experts.{name}"] = BlockTensor((len(recipes), *shape), tuple(slots))
    if shared is not None:
        tensors |= _dense_mlp("shared_expert", shared, config.shared_expert_intermediate_size, site)
    if config.moe_dense_ffn is not None:
        silent = ExpertRecipe(output_scale=0.0, bias_scale=0.0)
        tensors |= _dense_mlp("dense_ffn", silent, site.intermediate_size, site)
    return tensors


def _dense_mlp(part: str, recipe: ExpertRecipe, width: int, site: MLPSite) -> dict[str, BlockTensor]:
    """The tensors of one MLP that stands beside the routed experts."""
    shapes, tensors = _piece_shapes(site, width), {}
    for kind, ending in (("weight", ""), ("bias", "_bias")) if site.has_bias else (("weight", ""),):
        for projection in ("gate", "up", "down") if site.gated else ("up", "down"):
            shape = shapes[projection + ending]
            slot = Slot(0, shape[0], projection + ending, recipe)
            tensors[f"{part}.{projection}_proj.{kind}"] = BlockTensor(shape, (slot,))
    return tensors


def _piece_shapes(site: MLPSite, width: int) -> dict[str, tuple[int, ...]]:
    hidden = site.hidden_size
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return shapes | {"gate_bias": (width,), "up_bias": (width,), "down_bias": (hidden,)}


def _layout(site: MLPSite, width: int) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Name, pieces in order, and shape of one expert's part, of each tensor of the routed experts."""
    first, pieces = ("gate_up_proj", ("gate", "up")) if site.gated else ("up_proj", ("up",))
    layout = []
    for ending in ("", "_bias") if site.has_bias else ("",):
        shapes = _piece_shapes(site, width)
        names = tuple(piece + ending for piece in pieces)
        rows = (len(pieces) * width, *shapes["up" + ending][1:])
        layout.append((first + ending, names, rows))
        layout.append(("down_proj" + ending, ("down" + ending,), shapes["down" + ending]))
    return layout


@torch.no_grad()
def slot_rows(slot: Slot, piece: DensePiece, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The numbers of a slot as consecutive blocks of rows, each contiguous, on the CPU or where the piece is.

    Args:
        slot (`Slot`): what to make.
        piece (`DensePiece`): the slot's piece of the dense MLP that its recipe names.
        dtype (`torch.dtype`): of the result; random and scaled numbers are computed in float32 or wider.
    """
    recipe, tensor = slot.recipe, piece.tensor
    by_column, by_row = slot.piece == "down", slot.piece not in ("down", "down_bias")
    neurons = None if slot.piece == "down_bias" else recipe.neurons
    positions = recipe.redrawn.get(slot.piece)
    redraw = None
    if positions is not None and len(positions):
        redraw = _redraw(tensor, positions if neurons is None else neurons[positions], by_column)
    scale = {"down": recipe.output_scale, "down_bias": recipe.bias_scale}.get(slot.piece, 1.0)
    noise = recipe.noise * piece.std if recipe.noise > 0 else 0.0
    gaussians = GaussianStream(*recipe.key, slot.piece) if noise or redraw is not None else None
    columns = 1 if tensor.dim() == 1 else (tensor.shape[1] if neurons is None or by_row else len(neurons))
    step = max(1, BLOCK_BYTES // (4 * columns))
    for start in range(0, slot.rows, step):
        stop = min(start + step, slot.rows)
        kept = neurons[start:stop] if by_row and neurons is not None else neurons
        block = _gather(tensor, kept, start, stop, by_column)
        if redraw is not None:
            block = _replace(wide(block), positions, redraw, gaussians, start, by_column)
        if noise:
            drawn = gaussians.draw(block.shape, noise).to(block.device)
            block = drawn.to(torch.promote_types(block.dtype, torch.float32)).add_(block)
        elif scale != 1:
            block = wide(block)
        if scale != 1:
            block = block * scale
        if kept is not None:
            # Last, so that neurons of zeros stay zero.
            absent = (kept < 0).to(block.device)
            if absent.any():
                block = block.masked_fill(absent if by_column or block.dim() == 1 else absent[:, None], 0)
        yield block.to(dtype).contiguous()


def _gather(tensor: torch.Tensor, kept: torch.Tensor | None, start: int, stop: int, by_column: bool) -> torch.Tensor:
    if kept is None:
        return tensor[start:stop]
    kept = kept.clamp_min(0).to(tensor.device)
    return tensor[start:stop].index_select(1, kept) if by_column else tensor.index_select(0, kept)


def _redraw(tensor: torch.Tensor, neurons: torch.Tensor, by_column: bool) -> tuple[float, float]:
    """Mean and standard deviation of the values that are replaced."""
    return moments(tensor, neurons.to(tensor.device), by_column)


def _replace(
    block: torch.Tensor,
    positions: torch.Tensor,
    redraw: tuple[float, float],
    gaussians: GaussianStream,
    start: int,
    by_column: bool,
) -> torch.Tensor:
    """`block` with the neurons at `positions` drawn from N(mean, std)."""
    mean, std = redraw
    rows = block.shape[0]
    inside = positions if by_column else positions[(positions >= start) & (positions < start + rows)] - start
    inside = inside.to(block.device)
    axis = 1 if by_column else 0
    replaced = list(block.shape)
    replaced[axis] = len(inside)
    drawn = mean + std * gaussians.draw(replaced).to(block.device, block.dtype)
    return block.index_copy(axis, inside, drawn)


@torch.no_grad()
def moments(
    tensor: torch.Tensor,
    neurons: torch.Tensor | None = None,
    by_column: bool = False,
    mapped: Callable[..., Iterable] = map,
) -> tuple[float, float]:
    """Mean and standard deviation (of the whole population) of a tensor or of some of its rows or columns.

    Computed in float64, in blocks, so that a large tensor in a 16-bit dtype is not copied; `mapped` may run over the
    blocks with several threads.
    """
    columns = 1 if tensor.dim() == 1 else tensor.shape[1]
    step = max(1, BLOCK_BYTES // (8 * columns))
    row_neurons = None if by_column else neurons

    def sums(start: int) -> tuple[float, float, int]:
        if row_neurons is not None:
            block = tensor.index_select(0, row_neurons[start : start + step])
        else:
            block = tensor[start : start + step]
            block = block if neurons is None else block.index_select(1, neurons)
        flat = block.double().flatten()
        return float(flat.sum()), float(flat.dot(flat)), len(flat)

    rows = tensor.shape[0] if row_neurons is None else len(row_neurons)
    parts = list(mapped(sums, range(0, rows, step)))
    total, squares, count = (sum(part[index] for part in parts) for index in range(3))
    mean = total / max(count, 1)
    return mean, max(squares / max(count, 1) - mean**2, 0.0) ** 0.5
