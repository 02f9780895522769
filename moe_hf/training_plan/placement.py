"""Where experts should lie, and which hot ones every device should hold, from a measured load.

Letters: E experts, N devices, L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from moe_hf.errors import MoEError


# Up to so many experts the best placement is found by trying all.
MOST_TRIED = 10


@dataclass(frozen=True)
class LayerPlacement:
    """A proposal for one layer.

    Attributes:
        layer: number of the MoE layer.
        device_of: the device of each expert, E / N on each.
        shadowed: experts that every device holds too, so that their tokens stay where they are.
        imbalance_before: rows of the busiest device over the mean, with the experts in order.
        imbalance_after: the same as proposed.
        bytes_saved: that the busiest device sends and receives less per step, the gradients of `shadowed` deducted.
    """

    layer: int
    device_of: tuple[int, ...]
    shadowed: tuple[int, ...]
    imbalance_before: float
    imbalance_after: float
    bytes_saved: int


@dataclass(frozen=True)
class TrafficPrices:
    """Bytes per step of one device.

    Attributes:
        row: of one (token, expert) pair of a step, to its expert's device and back, forward and backward.
        shadow: of summing one shadowed expert's gradients over all devices.
    """

    row: float
    shadow: float


def propose(
    counts: Sequence[Sequence[float]], gpus: int, rows_per_step: float, prices: TrafficPrices
) -> list[LayerPlacement]:
    """Propose a placement, and shadows, for each layer.

    Experts are placed so that the busiest device has the fewest rows (the static form of SmartMoE's placement,
    https://www.usenix.org/conference/atc23/presentation/zhai). An expert is shadowed when the all-to-all of the busiest
    device falls by more than summing its gradients costs (FasterMoE, https://doi.org/10.1145/3503221.3508418), hottest
    first, and the imbalance does not grow.

    Args:
        counts (`Sequence[Sequence[float]]`): (L, E), measured choices of each expert.
        gpus (`int`): N, which divides E.
        rows_per_step (`float`): (token, expert) pairs of one layer in one step on all devices together.
        prices (`TrafficPrices`): what traffic costs.

    Raises:
        MoEError: for counts that are no table of numbers from 0 on, or an E that N does not divide.
    """
    for layer in counts:
        if not layer or len(layer) != len(counts[0]) or min(layer) < 0 or sum(layer) <= 0:
            raise MoEError(
                "The load must be a table of layers by experts, numbers from 0 on, and no layer without any."
            )
        if len(layer) % gpus:
            raise MoEError(f"{len(layer)} experts cannot be divided among {gpus} devices.")
    return [
        _propose([count * rows_per_step / sum(layer) for count in layer], gpus, prices, number)
        for number, layer in enumerate(counts)
    ]


def _propose(rows: list[float], gpus: int, prices: TrafficPrices, layer: int) -> LayerPlacement:
    in_order = [expert * gpus // len(rows) for expert in range(len(rows))]
    before = _busiest(rows, in_order, gpus)
    device_of, shadowed = place(rows, gpus), []
    sent, computed = _busiest(rows, device_of, gpus), _busiest(rows, device_of, gpus)
    saved = prices.row * (before - sent)
    for expert in sorted(range(len(rows)), key=lambda one: -rows[one]):
        alone = [0.0 if one in (*shadowed, expert) else row for one, row in enumerate(rows)]
        spread = sum(rows[one] for one in (*shadowed, expert)) / gpus
        tried = place(alone, gpus)
        fewer = _busiest(alone, tried, gpus)
        gain = prices.row * (sent - fewer) - prices.shadow
        if gain <= 0 or fewer + spread > computed:
            break
        shadowed.append(expert)
        device_of, sent, computed, saved = tried, fewer, fewer + spread, saved + gain
    mean = sum(rows) / gpus
    return LayerPlacement(layer, tuple(device_of), tuple(shadowed), before / mean, computed / mean, round(saved))


def place(rows: Sequence[float], gpus: int) -> list[int]:
    """The device of each expert, E / N on each, so that the busiest device has few rows; never more than in order.

    The best of all for up to 10 experts; else the heaviest first to the device that has least, then exchanges of two
    experts for as long as one helps.
    """
    in_order = [expert * gpus // len(rows) for expert in range(len(rows))]
    if len(rows) <= MOST_TRIED:
        tried = _best(list(range(len(rows))), rows, gpus)
    else:
        tried = _exchanged(_heaviest_first(rows, gpus), rows, gpus)
    return min((in_order, tried), key=lambda devices: _busiest(rows, devices, gpus))


def _busiest(rows: Sequence[float], device_of: Sequence[int], gpus: int) -> float:
    return max(_loads(rows, device_of, gpus))


def _loads(rows: Sequence[float], device_of: Sequence[int], gpus: int) -> list[float]:
    loads = [0.0] * gpus
    for row, device in zip(rows, device_of, strict=True):
        loads[device] += row
    return loads


def _best(experts: list[int], rows: Sequence[float], gpus: int) -> list[int]:
    """Try each division; the first expert that is left fixes the device, so that none is tried twice."""
    size, best = len(rows) // gpus, [float("inf"), []]

    def divide(left: list[int], device_of: dict[int, int], device: int, most: float) -> None:
        if most >= best[0]:
            return
        if not left:
            best[:] = most, [device_of[expert] for expert in experts]
            return
        first, *others = left
        for mates in combinations(others, size - 1):
            group = (first, *mates)
            divided = device_of | dict.fromkeys(group, device)
            load = sum(rows[expert] for expert in group)
            divide([one for one in others if one not in mates], divided, device + 1, max(most, load))

    divide(experts, {}, 0, 0.0)
    return best[1]


def _heaviest_first(rows: Sequence[float], gpus: int) -> list[int]:
    loads, free, device_of = [0.0] * gpus, [len(rows) // gpus] * gpus, [0] * len(rows)
    for expert in sorted(range(len(rows)), key=lambda one: -rows[one]):
        device = min((one for one in range(gpus) if free[one]), key=lambda one: loads[one])
        device_of[expert] = device
        loads[device], free[device] = loads[device] + rows[expert], free[device] - 1
    return device_of


def _exchanged(device_of: list[int], rows: Sequence[float], gpus: int) -> list[int]:
    """Exchange an expert of the busiest device with one of another, for as long as the busier of both gets lighter."""
    device_of = list(device_of)
    while True:
        loads = _loads(rows, device_of, gpus)
        worst = max(range(gpus), key=lambda one: loads[one])
        best, pair = loads[worst], None
        for mine in (one for one, device in enumerate(device_of) if device == worst):
            for other in (one for one, device in enumerate(device_of) if device != worst):
                moved = rows[mine] - rows[other]
                most = max(loads[worst] - moved, loads[device_of[other]] + moved)
                if most < best * (1 - 1e-12):
                    best, pair = most, (mine, other)
        if pair is None:
            return device_of
        mine, other = pair
        device_of[mine], device_of[other] = device_of[other], device_of[mine]
