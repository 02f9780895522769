"""Experts beside those of a base: what changed by part and expert, what stayed, and what went somewhere else.

Letters: E experts, D model width, F expert width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report, ranges
from moe_hf.doctor.matching import CLOSER, Verdict
from moe_hf.doctor.sketches import cosine, distance, significant


MESSAGES = {
    "gate-up-swapped": "Gate and up lie in each other's place, beside the base's: the expert computes something else. Exchange them, or "
    "convert again.",
    "transposed": "Square matrices ({parts}) are the base's transposed: the shapes fit, and the numbers do not. Transpose them, or "
    "convert again.",
    "interleaved": "The rows of gate and up lie in turns where the base's follow one another, or the other way round. Convert again "
    "with the layout of this family.",
    "neurons-reordered": "The neurons of {parts} are in another order than those of the other matrices, beside the base's: what belongs "
    "together is apart. Put gate, up and down into one order.",
    "scaled": "{parts} are the base's times a constant, to the last digit: a scale was applied twice, or not at all. Divide by it, or "
    "convert again.",
}


@dataclass
class BaseExperts:
    """What was seen of the experts of a model beside those of its base.

    Attributes:
        verdicts: by layer and expert, the expert beside the base's of the same number.
        signatures, base_signatures: by layer, (E, n), one row per expert.
        routers, base_routers: by layer, the weights of the routers, (E, D).
        biases, base_biases: by layer, the correction biases, (E,).
        equal: by layer, the groups of equal experts.
    """

    verdicts: dict[int, dict[int, Verdict]] = field(default_factory=dict)
    signatures: dict[int, torch.Tensor] = field(default_factory=dict)
    base_signatures: dict[int, torch.Tensor] = field(default_factory=dict)
    routers: dict[int, torch.Tensor] = field(default_factory=dict)
    base_routers: dict[int, torch.Tensor] = field(default_factory=dict)
    biases: dict[int, torch.Tensor] = field(default_factory=dict)
    base_biases: dict[int, torch.Tensor] = field(default_factory=dict)
    equal: dict[int, list[list[int]]] = field(default_factory=dict)


def look_at_verdicts(report: Report, seen: BaseExperts, moved: Mapping[int, Mapping[int, int]]) -> None:
    """Add what each expert's own numbers tell, but of those that are another expert's."""
    found: dict[tuple[str, tuple[str, ...]], dict[int, list[int]]] = {}
    figures: dict[tuple[str, tuple[str, ...]], float | None] = {}
    for layer, verdicts in seen.verdicts.items():
        for expert, verdict in verdicts.items():
            if verdict.code is not None and expert not in moved.get(layer, {}):
                key = verdict.code, verdict.parts
                found.setdefault(key, {}).setdefault(layer, []).append(expert)
                figures.setdefault(key, verdict.figure)
    for (code, parts), layers in found.items():
        message = MESSAGES[code].format(parts=", ".join(parts))
        report.add_by_layer(ERROR, code, layers, message, figure=figures[code, parts])


def assignment(mine: torch.Tensor, base: torch.Tensor) -> dict[int, int]:
    """Which row of the base each of my rows is, where that is clear: much closer to it than to all others.

    Args:
        mine, base (`torch.Tensor`): (E, n) and (E', n), float32.
    """
    if not len(mine) or not len(base):
        return {}
    one, other = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (mine, base))
    cosines = one @ other.t()
    chance = significant(mine.shape[1])
    found = {}
    for row in range(len(mine)):
        order = cosines[row].argsort(descending=True).tolist()
        best = order[0]
        second = float(cosines[row, order[1]]) if len(order) > 1 else 0.0
        near, far = distance(float(cosines[row, best])), distance(second)
        if cosines[row, best] > chance and near < CLOSER * far:
            found[row] = best
    return found


def look_at_places(report: Report, seen: BaseExperts) -> dict[int, dict[int, int]]:
    """Add experts that are others than their router believes; gives back those that lie elsewhere than in the base."""
    moved: dict[int, dict[int, int]] = {}
    layers = _swapped_layers(report, seen)
    for layer, mine in seen.signatures.items():
        if layer in layers or layer not in seen.base_signatures:
            continue
        base = seen.base_signatures[layer]
        experts = assignment(mine, base)
        same_count = len(mine) == len(base)
        rows = _rows_of(seen, layer, same_count)
        elsewhere = {e: f for e, f in experts.items() if e != f or not same_count}
        if elsewhere:
            moved[layer] = elsewhere
        wrong = {e: f for e, f in experts.items() if e in rows and rows[e] != f}
        if not wrong:
            if same_count and any(e != f for e, f in experts.items()):
                report.add(
                    NOTE,
                    "changed",
                    "Experts and rows of the router are in another order than the base's, both alike: the layer computes the same.",
                    layers=[layer],
                    experts=[e for e, f in experts.items() if e != f],
                )
            continue
        _add_wrong(report, layer, wrong, experts)
    return moved


def _rows_of(seen: BaseExperts, layer: int, same_count: bool) -> dict[int, int]:
    """Which row of the base's router each row is; where that is not clear and the counts agree, the one of its number."""
    mine, base = seen.routers.get(layer), seen.base_routers.get(layer)
    if mine is None or base is None or mine.shape[1] != base.shape[1]:
        return {}
    rows = assignment(mine, base)
    if same_count:
        # A router that was trained until its rows resemble none of the base's says nothing of its order.
        itself = {row: row for row in range(len(mine)) if cosine(mine[row], base[row]) > significant(mine.shape[1])}
        rows = itself | rows
    bias, base_bias = seen.biases.get(layer), seen.base_biases.get(layer)
    if bias is not None and base_bias is not None and same_count and torch.equal(bias, base_bias):
        # A bias that stayed where it was says whose it is, even where the rows moved.
        distinct = len(set(bias.tolist())) == len(bias)
        rows = {row: row for row in rows} if distinct and any(a != b for a, b in rows.items()) else rows
    return rows


def _add_wrong(report: Report, layer: int, wrong: Mapping[int, int], experts: Mapping[int, int]) -> None:
    pairs = ", ".join(f"{e} is the base's {f}" for e, f in sorted(wrong.items())[:6])
    several = [f for f in set(experts.values()) if list(experts.values()).count(f) > 1]
    if several:
        report.add(
            ERROR,
            "experts-overwritten",
            f"Experts hold the numbers of others of the base ({pairs}), and expert{'s' if len(several) > 1 else ''} {ranges(several)} "
            "lie there several times: the others are lost, as by a save of one rank of several. Take another checkpoint.",
            layers=[layer],
            experts=list(wrong),
            figure=len(wrong),
        )
        return
    report.add(
        ERROR,
        "experts-permuted",
        f"Experts are in another order than the router's rows ({pairs}): tokens go to the wrong ones. Put both into one order, the "
        "correction bias too.",
        layers=[layer],
        experts=list(wrong),
        figure=len(wrong),
    )


def _swapped_layers(report: Report, seen: BaseExperts) -> set[int]:
    """Layers whose experts are those of another layer of the base, whatever their order within it."""
    common = [layer for layer in seen.signatures if layer in seen.base_signatures]
    wrong = {}
    for layer in common:
        mine = seen.signatures[layer]
        if not seen.verdicts.get(layer) or all(not v.changed for v in seen.verdicts[layer].values()):
            continue
        best = {
            other: float(_unit(mine).matmul(_unit(base).t()).max(1).values.median())
            for other, base in seen.base_signatures.items()
            if base.shape[1] == mine.shape[1]
        }
        other = max(best, key=best.get)
        chance = significant(mine.shape[1])
        if other != layer and best[other] > chance and distance(best[other]) < CLOSER * distance(best[layer]):
            wrong[layer] = other
    for layer, other in wrong.items():
        report.add(
            ERROR,
            "layers-swapped",
            f"The experts of layer {layer} are the base's of layer {other}: names were numbered otherwise. Convert again.",
            layers=[layer],
            figure=other,
        )
    return set(wrong)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1)


def look_at_equal_against_base(
    report: Report, seen: BaseExperts, base_equal: Mapping[int, list[list[int]]]
) -> set[int]:
    """Add experts that are equal where the base's differ; gives back their layers.

    Copies of experts whose router rows are copies too are a grown model, and were explained before.
    """
    found = {}
    for layer, groups in seen.equal.items():
        same_count = layer in seen.base_signatures and len(seen.base_signatures[layer]) == len(seen.signatures[layer])
        if not same_count:
            continue
        together = [set(group) for group in base_equal.get(layer, [])]
        lost = [e for group in groups if not any(set(group) <= other for other in together) for e in group]
        if lost:
            found[layer] = lost
    if found:
        report.add_by_layer(
            ERROR,
            "experts-alike",
            found,
            "These experts are bitwise equal, and the base's differ: all but one of them are lost. Take another checkpoint, or load the "
            "base again.",
        )
    return set(found)


def look_at_zero_against_base(report: Report, zeros: Mapping[int, list[int]]) -> None:
    """Add experts that are one number everywhere, where the base's are not."""
    if zeros:
        report.add_by_layer(
            ERROR,
            "experts-zero",
            zeros,
            "These experts hold one number everywhere, and the base's do not: they were lost. Take another checkpoint.",
        )


def look_at_bias_against_base(report: Report, seen: BaseExperts) -> None:
    """Add correction biases that are zero where the base's are not."""
    lost = [layer for layer, bias in seen.biases.items() if layer in seen.base_biases and not bias.any()]
    lost = [layer for layer in lost if seen.base_biases[layer].any()]
    if lost:
        report.add(
            ERROR,
            "bias-lost",
            "The correction bias is zero, and the base's is not: experts are chosen by other scores than in training. Copy it from the "
            "base.",
            layers=lost,
            part="correction bias",
        )


def look_at_changes(report: Report, seen: BaseExperts, *, trained: bool, parts: Mapping[str, tuple[int, int]]) -> None:
    """Add what changed and what did not.

    Args:
        trained: whether something says that this is the result of training.
        parts: by the name of a part that is no expert, how many of its tensors changed, and of how many.
    """
    changed, still, rounding = {}, {}, 0
    for layer, verdicts in seen.verdicts.items():
        for expert, verdict in verdicts.items():
            (changed if verdict.changed else still).setdefault(layer, []).append(expert)
            rounding += verdict.rounding
    total = sum(map(len, changed.values())) + sum(map(len, still.values()))
    others = {name: counts for name, counts in parts.items() if counts[0]}
    text = ", ".join(f"{name} ({a} of {b} tensors)" for name, (a, b) in others.items()) or "nothing else"
    if total and not changed and not others:
        report.add(
            WARNING if trained else NOTE,
            "nothing-changed",
            "Every tensor is bitwise the base's"
            + (
                ": the training or the merge that this folder speaks of left no trace. Look at what was saved."
                if trained
                else "."
            ),
        )
        return
    if changed and still:
        report.add_by_layer(
            NOTE,
            "experts-unchanged",
            still,
            "These experts are bitwise the base's, and others are not: they were not chosen to train, or got no token.",
        )
    elif total and not changed:
        report.add(
            NOTE,
            "experts-unchanged",
            f"All experts are bitwise the base's; changed were {text}. If experts were to train, they did not, or were not saved.",
            figure=total,
        )
    if changed:
        number = sum(map(len, changed.values()))
        report.add(NOTE, "changed", f"{number} of {total} experts changed, and {text}.", figure=number)
    if rounding and rounding == sum(map(len, changed.values())):
        report.add(
            NOTE,
            "rounding-only",
            "What changed of the experts is what a cast to another dtype makes.",
            figure=rounding,
        )
    _look_at_uneven_changes(report, seen)


def _look_at_uneven_changes(report: Report, seen: BaseExperts) -> None:
    patterns: dict[tuple[str, ...], dict[int, list[int]]] = {}
    for layer, verdicts in seen.verdicts.items():
        for expert, verdict in verdicts.items():
            if verdict.changed and verdict.code is None and not verdict.rounding:
                patterns.setdefault(tuple(sorted(verdict.changed)), {}).setdefault(layer, []).append(expert)
    for pattern, layers in patterns.items():
        half = ("gate" in pattern) != ("up" in pattern) and any("gate" in other for other in patterns)
        rarer = len(patterns) > 1 and set(pattern) < set().union(*patterns)
        if half or rarer:
            report.add_by_layer(
                WARNING,
                "changed-unevenly",
                layers,
                f"Of these experts only {', '.join(pattern)} changed"
                + (", one half of what is one matrix in memory" if half else ", of others more")
                + ": a merge perhaps fell back to the base for the rest. Merge again, and compare the logits.",
            )
