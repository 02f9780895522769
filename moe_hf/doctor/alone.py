"""Experts looked at without a base: numbers that are none, equal experts, fresh ones, and what its siblings tell of an expert.

Letters: E experts, D model width, F expert width.
"""

import math
from collections.abc import Mapping
from statistics import median

import torch

from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report, ranges
from moe_hf.doctor.pieces import DOWN, GATE, UP, Block
from moe_hf.doctor.sketches import SAMPLED_ROWS, Sketch, correlation, evenly
from moe_hf.doctor.tensors import Tensors


Sketches = dict[int, dict[str, Sketch]]
# In units of what chance can do; trained matrices of real models have tens to thousands.
LEARNT = 2.5
OUTLIER = 16.0
# In units of chance; a matrix of neurons without order has 1.
MIXED = 4.0
# Of the rows or columns of a matrix.
ZERO_PART = 0.1
# In standard errors of a correlation of D numbers.
MARGIN = 4.5
MIXED_UP = "What runs is not what was trained. Convert the checkpoint again with a fixed tool, or put the rows back."


def look_at_numbers(report: Report, block: Block, sketches: Sketches) -> None:
    """Add what is not finite, zero, or out of scale in one layer."""
    bad = [e for e, parts in sketches.items() if not all(part.finite for part in parts.values())]
    if bad:
        report.add(
            ERROR,
            "not-finite",
            "NaN or infinity in these experts: every token that is sent to them becomes NaN. Take an earlier checkpoint.",
            layers=[block.layer],
            experts=bad,
        )
    constant = {e: [n for n, part in parts.items() if part.constant is not None] for e, parts in sketches.items()}
    zeros = {e: names for e, names in constant.items() if names}
    if zeros:
        names = sorted({name for of in zeros.values() for name in of})
        report.add(
            WARNING,
            "experts-zero",
            f"One number everywhere in {', '.join(names)}: these experts add nothing, or were never filled. Look at what wrote "
            "the file; with --base it is told whether they were so before.",
            layers=[block.layer],
            experts=list(zeros),
        )
    _look_at_zero_parts(report, block, {e: p for e, p in sketches.items() if e not in bad and e not in zeros})
    usable = {e: p for e, p in sketches.items() if e not in bad and e not in zeros}
    for name in block.projections():
        scales = {e: math.sqrt(parts[name].mean_square) for e, parts in usable.items() if name in parts}
        if len(scales) < 3:
            continue
        middle = median(scales.values())
        far = {e: s / middle for e, s in scales.items() if middle > 0 and not 1 / OUTLIER < s / middle < OUTLIER}
        if far and len(far) * 2 < len(scales):
            report.add(
                WARNING,
                "scale-outlier",
                f"The {name} matrix is {max(far.values(), key=lambda r: abs(math.log(r))):.3g} times its siblings' size: a scale "
                "was perhaps applied twice, or not at all. Compare with --base.",
                layers=[block.layer],
                experts=list(far),
                figure=max(far.values(), key=lambda r: abs(math.log(r))),
            )


def _look_at_zero_parts(report: Report, block: Block, sketches: Sketches) -> None:
    """Add matrices with many rows or columns of zeros, but for neurons that are zero in all of them, as pruning and padding make."""
    found: dict[int, list[str]] = {}
    for expert, parts in sketches.items():
        neurons = [part.zeros[1] if name == DOWN else part.zeros[0] for name, part in parts.items()]
        together = max(neurons) - min(neurons) < ZERO_PART / 2
        for name, part in parts.items():
            of_neurons, of_model = part.zeros[::-1] if name == DOWN else part.zeros
            if of_model > ZERO_PART or (of_neurons > ZERO_PART and not together):
                found.setdefault(expert, []).append(name)
    if found:
        names = sorted({name for of in found.values() for name in of})
        report.add(
            WARNING,
            "experts-zero",
            f"Many rows or columns of {', '.join(names)} are zeros, and what belongs to them in the other matrices is not: a part of the "
            "matrix was perhaps never filled, as by a save of one rank of several.",
            layers=[block.layer],
            experts=list(found),
        )


def equal_groups(block: Block, sketches: Sketches, tensors: Tensors) -> list[list[int]]:
    """Experts that are bitwise equal in all projections, as groups of two and more."""
    groups: dict[tuple, list[int]] = {}
    for expert, parts in sketches.items():
        if len(parts) == len(block.projections()) and all(part.finite for part in parts.values()):
            key = tuple(tuple(part.signature.tolist()) for part in parts.values())
            groups.setdefault(key, []).append(expert)
    found = []
    for members in groups.values():
        first = block.matrices(tensors, members[0]) if len(members) > 1 else {}
        same = [e for e in members[1:] if _all_equal(first, block.matrices(tensors, e))]
        if same:
            found.append([members[0], *same])
    return found


def _all_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def look_at_equal_experts(
    report: Report,
    groups: Mapping[int, list[list[int]]],
    counts: Mapping[int, int],
    router_groups,
    record: dict | None,
) -> None:
    """Add experts that are equal.

    Equal experts are right in a fresh upcycled copy, and in a grown model, whose routers repeat with them. They are not where
    a part of the experts repeats and the router tells them apart.

    Args:
        groups: by layer, the groups of equal experts.
        counts: by layer, E.
        router_groups: by layer, the groups of equal rows of its router.
        record: what an upcycling recorded in the configuration, or None.
    """
    odd, plain = {}, {}
    for layer, found in groups.items():
        if not found:
            continue
        together = [group for group in found if any(set(group) <= set(rows) for rows in router_groups.get(layer, []))]
        rest = [group for group in found if group not in together]
        all_alike = len(found) == 1 and len(found[0]) == counts[layer]
        untouched = record is not None and (len(rest) == 1 or "surgery" in record or _mixes(record))
        explained = not rest or all_alike or untouched
        (plain if explained else odd)[layer] = [e for group in (found if explained else rest) for e in group]
    if plain:
        report.add_by_layer(
            NOTE,
            "experts-alike",
            plain,
            "These experts are bitwise equal, as those of a fresh or grown copy are. Training tells them apart.",
        )
    # All of some layers and none of others: no method makes that.
    for layer, experts in odd.items():
        pairs = "; ".join(ranges(group) for group in groups[layer])
        report.add(
            WARNING,
            "experts-alike",
            f"Bitwise equal experts ({pairs}) with different rows of the router: one was perhaps written over the others, as by a "
            "save of one rank of several. Compare with --base, and save again.",
            layers=[layer],
            experts=experts,
        )


def _mixes(record: Mapping) -> bool:
    init = record.get("init")
    return isinstance(init, Mapping) and init.get("name") not in ("copy", "drop", "permute")


def look_for_fresh(report: Report, by_layer: Mapping[int, Sketches], others: list[float]) -> None:
    """Add experts that look drawn at random beside siblings, or beside the rest of the model, that have learnt.

    Args:
        others: how far beyond chance matrices that are no experts are.
    """
    orders = {
        layer: {e: max(p.learnt for p in parts.values()) for e, parts in sketches.items() if parts}
        for layer, sketches in by_layer.items()
    }
    fresh = {
        layer: [e for e, parts in sketches.items() if parts and all(p.looks_fresh for p in parts.values())]
        for layer, sketches in by_layer.items()
    }
    learnt = [order for of in orders.values() for order in of.values()]
    learnt = [order for order in learnt if order > LEARNT]
    all_experts = sum(map(len, orders.values()))
    found = {layer: experts for layer, experts in fresh.items() if experts}
    if not found:
        return
    beside_experts = len(learnt) * 2 > all_experts or any(
        len([o for o in orders[layer].values() if o > LEARNT]) * 2 > len(orders[layer]) for layer in found
    )
    beside_others = len(others) > 2 and median(others) > LEARNT
    if not beside_experts and not beside_others:
        return
    rest = "their siblings" if beside_experts else "the rest of the model"
    report.add_by_layer(
        WARNING,
        "experts-fresh",
        found,
        f"These experts look drawn at random, and {rest} have learnt: a loader or a converter perhaps did not fill them. Compare "
        "with the checkpoint that they come from (--base), and load that again.",
        figure=min(orders[layer][e] for layer, experts in found.items() for e in experts),
    )


def look_at_siblings(report: Report, block: Block, sketches: Sketches, width: int) -> None:
    """Add what the siblings of an expert tell: gate and up exchanged, square matrices transposed.

    The columns of gate and up, and the rows of down, are the D inputs and outputs of the layer, which experts share, so their
    sizes are alike among siblings wherever experts have learnt anything.
    """
    usable = {e: p for e, p in sketches.items() if all(s.finite and s.constant is None for s in p.values())}
    if len(usable) < 3:
        return
    margin = MARGIN / math.sqrt(width)
    if all(GATE in parts and UP in parts for parts in usable.values()):
        scores = {e: _swap_score(e, usable) for e in usable}
        _add_odd_ones(
            report,
            block,
            scores,
            2 * margin,
            "gate-up-swapped",
            f"Gate and up of these experts look like each other's of their siblings. {MIXED_UP}",
        )
    for name in block.projections():
        if not all(name in parts and _is_square(parts[name]) for parts in usable.values()):
            continue
        scores = {e: _turn_score(e, name, usable) for e in usable}
        of_one = MARGIN / math.sqrt(min(width, SAMPLED_ROWS))
        _add_odd_ones(
            report,
            block,
            scores,
            math.sqrt(2) * of_one,
            "transposed",
            f"The square {name} matrices of these experts look transposed beside their siblings'. {MIXED_UP}",
        )


def look_at_order_of_rows(report: Report, block: Block, sketches: Sketches) -> None:
    """Add experts whose gate and up lie the other way than the family reads them: told by one expert alone.

    The neurons of a matrix have no order, so its even rows are like its odd ones, and its first like its last. Gate and up differ
    where they have learnt something. Where what is read as the gate consists of two kinds of rows, in turns or one after the other,
    and what is read as the up of the same two, they are not where the family looks for them.
    """
    usable = [
        p
        for p in sketches.values()
        if GATE in p and UP in p and all(s.finite and s.constant is None for s in p.values())
    ]
    for kind, how in (("parity", "in turns"), ("halves", "one after the other")):
        mixed = [min(getattr(p[GATE], kind), getattr(p[UP], kind)) for p in usable]
        between = [_gate_against_up(p) for p in usable]
        count = sum(m > MIXED and m > 3 * b for m, b in zip(mixed, between, strict=True))
        if usable and count * 2 > len(usable):
            report.add(
                ERROR,
                "interleaved",
                f"What is read as gate holds two kinds of rows {how}, and what is read as up the same two: gate and up are stored the "
                f"other way than this family reads them. {MIXED_UP}",
                layers=[block.layer],
                figure=median(mixed),
            )


def _gate_against_up(parts: Mapping[str, Sketch]) -> float:
    difference = parts[GATE].columns - parts[UP].columns
    # Of two groups of S rows of numbers with light tails.
    expected = 2 * 2 / len(parts[GATE].rows)
    return float((difference - difference.mean()).square().mean()) / expected


def _add_odd_ones(
    report: Report, block: Block, scores: dict[int, float], margin: float, code: str, message: str
) -> None:
    odd = [e for e, score in scores.items() if score > margin]
    straight = [e for e, score in scores.items() if score < -margin]
    # The majority says which way is right.
    if odd and len(straight) > len(odd) and len(straight) + len(odd) > len(scores) * 0.75:
        report.add(ERROR, code, message, layers=[block.layer], experts=odd, figure=max(scores[e] for e in odd))


def _is_square(part: Sketch) -> bool:
    return part.shape[0] == part.shape[1]


def _mean_of_others(expert: int, name: str, side: str, sketches: Sketches) -> torch.Tensor:
    others = torch.stack([getattr(parts[name], side) for e, parts in sketches.items() if e != expert])
    # The median, so that a few odd ones among many say nothing.
    return others.median(0).values


def _swap_score(expert: int, sketches: Sketches) -> float:
    gate, up = (_mean_of_others(expert, name, "columns", sketches) for name in (GATE, UP))
    own_gate, own_up = sketches[expert][GATE].columns, sketches[expert][UP].columns
    crossed = correlation(own_gate, up) + correlation(own_up, gate)
    straight = correlation(own_gate, gate) + correlation(own_up, up)
    return crossed - straight


def _turn_score(expert: int, name: str, sketches: Sketches) -> float:
    side, other = ("rows", "columns") if name == DOWN else ("columns", "rows")
    model_side = _mean_of_others(expert, name, side, sketches)
    own = sketches[expert][name]
    places = evenly(own.shape[0], SAMPLED_ROWS)
    sides = {"rows": own.rows, "columns": own.columns[places]}
    model_side = model_side if side == "rows" else model_side[places]
    return correlation(sides[other], model_side) - correlation(sides[side], model_side)
