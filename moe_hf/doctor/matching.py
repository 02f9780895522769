"""How an expert lies beside the base's: as it was, exchanged, transposed, in turns, reordered, or a multiple.

Each is a hypothesis about where the base's numbers went, and one is taken only where it brings the two much closer than the
straight reading does. How far they are from each other plays no part, so an expert that was trained until it resembles its base no
more is none of them.

Letters: D model width, F expert width, S sampled rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moe_hf.doctor.pieces import DOWN, GATE, UP
from moe_hf.doctor.sketches import SAMPLED_ROWS, cosine, distance, evenly, significant


Matrices = Mapping[str, torch.Tensor]
# A hypothesis must bring the two this much closer.
CLOSER = 0.5
MATCHED_ROWS = 24
FEW_ROWS = 8
# Above this no neuron lies elsewhere.
IN_PLACE = 0.98
EXACT = 1e-6


@dataclass(frozen=True)
class Verdict:
    """What became of an expert of the base.

    Attributes:
        changed: the projections that are not bitwise the base's.
        code: what is wrong, of `CODES`, or None.
        figure: the cosine under the hypothesis, or the constant of `scaled`.
        parts: the projections that it is about.
        rounding: whether what changed is what a cast to another dtype makes.
        cosine: of the straight reading over all projections.
    """

    changed: tuple[str, ...]
    code: str | None = None
    figure: float | None = None
    parts: tuple[str, ...] = ()
    rounding: bool = False
    cosine: float = 1.0


def compare(mine: Matrices, base: Matrices) -> Verdict:
    """Compare an expert with one of a base, both as canonical matrices of the same shapes."""
    changed = tuple(name for name in mine if not _same(mine[name], base[name]))
    if not changed:
        return Verdict(())
    if _is_cast(mine, base, changed):
        return Verdict(changed, rounding=True)
    straight = {name: cosine(_rows(mine[name]), _rows(base[name])) for name in mine}
    overall = sum(straight.values()) / len(straight)
    found = (
        _exchanged(mine, base, straight)
        or _turned(mine, base, straight)
        or _interleaved(mine, base, straight)
        or _scaled(mine, base, straight)
        or _reordered(mine, base, straight)
    )
    code, figure, parts = found or (None, None, ())
    return Verdict(changed, code, figure, parts, cosine=overall)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _is_cast(mine: Matrices, base: Matrices, changed: tuple[str, ...]) -> bool:
    """Whether one is the other in another dtype, or the other after a way through a narrower one."""
    # A few rows refuse most, before all are cast.
    few = {name: evenly(len(mine[name]), FEW_ROWS) for name in changed}
    if not all(_is_cast_of(mine[name][rows], base[name][rows]) for name, rows in few.items()):
        return False
    return all(_is_cast_of(mine[name], base[name]) for name in changed)


def _is_cast_of(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype:
        narrow = min((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).bits)
        return torch.equal(one.to(narrow), other.to(narrow))
    narrower = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype != one.dtype]
    return any(torch.equal(one, other.to(narrow).to(one.dtype)) for narrow in narrower)


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[evenly(len(matrix), SAMPLED_ROWS)].float()


def _wins(new: float, old: float, numbers: int) -> bool:
    return new > significant(numbers) and distance(new) < CLOSER * distance(min(old, 1.0))


def _exchanged(mine: Matrices, base: Matrices, straight: dict[str, float]) -> tuple | None:
    if GATE not in mine or UP not in mine:
        return None
    crossed = [cosine(_rows(mine[one]), _rows(base[other])) for one, other in ((GATE, UP), (UP, GATE))]
    numbers = _rows(mine[GATE]).numel()
    if all(_wins(new, straight[name], numbers) for new, name in zip(crossed, (GATE, UP), strict=True)):
        return "gate-up-swapped", min(crossed), (GATE, UP)
    return None


def _turned(mine: Matrices, base: Matrices, straight: dict[str, float]) -> tuple | None:
    found = {}
    for name, matrix in mine.items():
        if matrix.shape[0] == matrix.shape[1]:
            turned = cosine(_rows(matrix), base[name].t()[evenly(len(matrix), SAMPLED_ROWS)].float())
            if _wins(turned, straight[name], _rows(matrix).numel()):
                found[name] = turned
    return ("transposed", min(found.values()), tuple(found)) if found else None


def _interleaved(mine: Matrices, base: Matrices, straight: dict[str, float]) -> tuple | None:
    if GATE not in mine or UP not in mine:
        return None
    half = len(mine[GATE])
    places = evenly(half, SAMPLED_ROWS)
    for source, target in ((_joined, _woven), (_woven, _joined)):
        # My rows as they would lie in the file, read the other way.
        gate, up = (_read_back(mine, source, target, kind, places) for kind in (0, 1))
        both = [cosine(gate, base[GATE][places].float()), cosine(up, base[UP][places].float())]
        if all(_wins(new, straight[name], gate.numel()) for new, name in zip(both, (GATE, UP), strict=True)):
            return "interleaved", min(both), (GATE, UP)
    return None


def _joined(kind: int, row: torch.Tensor, half: int) -> torch.Tensor:
    """Where row `row` of gate (0) or up (1) lies among 2F rows, one after the other."""
    return kind * half + row


def _woven(kind: int, row: torch.Tensor, half: int) -> torch.Tensor:
    """The same where they take turns."""
    return 2 * row + kind


def _read_back(mine: Matrices, source, target, kind: int, places: torch.Tensor) -> torch.Tensor:
    """The rows `places` of gate or up, were the file read by `target` and not by `source`."""
    half = len(mine[GATE])
    lies = target(kind, places, half)
    # Which of my rows lies there, as I read it.
    if source is _joined:
        of_up, row = lies >= half, lies % half
    else:
        of_up, row = lies % 2 == 1, lies // 2
    return torch.where(of_up[:, None], mine[UP][row].float(), mine[GATE][row].float())


def _scaled(mine: Matrices, base: Matrices, straight: dict[str, float]) -> tuple | None:
    factors = {}
    for name, matrix in mine.items():
        one, other = _rows(matrix), _rows(base[name])
        size = other.double().norm()
        if size == 0:
            return None
        factor = float((one.double().flatten() @ other.double().flatten()) / size.square())
        rounding = torch.finfo(matrix.dtype).eps
        if abs(abs(straight[name]) - 1) > max(EXACT, rounding**2) or abs(factor) < EXACT:
            return None
        factors[name] = factor
    # What is multiplied into up and divided out of down changes nothing.
    product = factors[UP] * factors[DOWN] if UP in factors and DOWN in factors else 1.0
    gate = factors.get(GATE, 1.0)
    off = [f for f in (gate, product) if abs(f - 1) > 1e-3]
    if not off:
        return None
    return "scaled", off[0], tuple(name for name, f in factors.items() if abs(f - 1) > 1e-3)


def _reordered(mine: Matrices, base: Matrices, straight: dict[str, float]) -> tuple | None:
    """Neurons in another order: of gate's and up's rows and of down's columns alike it changes nothing."""
    if min(straight.values()) > IN_PLACE:
        return None
    of_neurons = _moved(mine, base, straight, lambda name, matrix: matrix.t() if name == DOWN else matrix)
    if of_neurons or max(straight.values()) < 0.5:
        return of_neurons
    # The model's side of all three in one order may be that of the whole model.
    return _moved(mine, base, straight, lambda name, matrix: matrix if name == DOWN else matrix.t())


def _moved(
    mine: Matrices,
    base: Matrices,
    straight: dict[str, float],
    side: Callable[[str, torch.Tensor], torch.Tensor],
) -> tuple | None:
    """Whether the rows that `side` makes of the matrices are in orders that do not go together."""
    orders = {}
    for name in mine:
        order = _order_of_rows(side(name, mine[name]), side(name, base[name]))
        if order is not None:
            orders[name] = order
    moved = tuple(name for name, order in orders.items() if not _is_identity(order))
    if not moved:
        return None
    still = [name for name in mine if name not in orders and straight[name] > 0.5]
    first, *rest = orders.values()
    if len(orders) < 2:
        return ("neurons-reordered", None, moved) if still else None
    if all(torch.equal(first, order) for order in rest):
        return None
    return "neurons-reordered", straight[moved[0]], moved


def _is_identity(order: torch.Tensor) -> bool:
    return torch.equal(order[0], order[1])


def _order_of_rows(mine: torch.Tensor, base: torch.Tensor) -> torch.Tensor | None:
    """(2, N): which rows were looked at, and which of the base each of them is; None where that cannot be told."""
    places = evenly(len(mine), MATCHED_ROWS)
    own = torch.nn.functional.normalize(mine[places].float(), dim=1)
    chance = significant(own.shape[1])
    best, where, second = torch.full((len(places),), -1.0), torch.zeros(len(places), dtype=torch.long), None
    second = torch.full((len(places),), -1.0)
    for start in range(0, len(base), 512):
        other = torch.nn.functional.normalize(base[start : start + 512].float(), dim=1)
        top = (own @ other.t()).topk(min(2, len(other)), dim=1)
        value, index = top.values[:, 0], top.indices[:, 0] + start
        next_best = top.values[:, 1] if top.values.shape[1] > 1 else torch.full_like(value, -1.0)
        second = torch.where(value > best, torch.maximum(best, next_best), torch.maximum(second, value))
        best, where = torch.where(value > best, value, best), torch.where(value > best, index, where)
    clear = (best > chance) & ((1 - best) < CLOSER**2 * (1 - second).clamp_min(1e-12))
    if clear.float().mean() < 0.9:
        return None
    where = torch.where(clear, where, places)
    return torch.stack([places, where])
