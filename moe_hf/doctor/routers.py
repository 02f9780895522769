"""Routers looked at by their weights: zeros, equal rows, saturation, correction biases.

Letters: E experts, K experts per token, D model width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report, ranges
from moe_hf.doctor.pieces import Block
from moe_hf.doctor.tensors import Tensors
from moe_hf.inspection import EXPERTS_PER_TOKEN_NAMES


# Of the logits of inputs of size 1: a trained router's are a few.
SATURATED_SPREAD, SATURATED_SHARE = 20.0, 0.99
ROW_TOLERANCE = 1e-6


def look_at_router(
    report: Report, block: Block, tensors: Tensors, equal_experts: list[list[int]], record: Mapping[str, Any] | None
) -> tuple[torch.Tensor | None, list[list[int]]]:
    """Add what the rows of one router tell.

    Args:
        equal_experts: the groups of equal experts of the layer.
        record: what an upcycling recorded, or None.

    Returns:
        its weight (E, D) float32 if it has one, and the groups of equal rows.
    """
    if block.router is None:
        return None, []
    weight = tensors.read(block.router).float()
    if not torch.isfinite(weight).all():
        rows = torch.where(~torch.isfinite(weight).all(1))[0].tolist()
        report.add(
            ERROR,
            "not-finite",
            "NaN or infinity in the router: every token of this layer becomes NaN. Take an earlier checkpoint.",
            layers=[block.layer],
            experts=rows,
            part="router",
        )
        return None, []
    norms = weight.norm(dim=1)
    if not norms.any():
        meant = (record or {}).get("router_init", {}).get("name") == "zero"
        report.add(
            NOTE if meant else WARNING,
            "router-zero",
            "All rows of the router are zeros, so that all experts tie and the first ones get every token"
            + (
                ": that is how it was asked for, and training moves it." if meant else ". It was perhaps never filled."
            ),
            layers=[block.layer],
            part="router",
        )
        return weight, []
    zero = torch.where(norms == 0)[0].tolist()
    if zero:
        report.add(
            WARNING,
            "router-row-zero",
            "These rows of the router are zeros: the experts are chosen where all others' logits are negative, and for nothing that "
            "the tokens say. Compare with --base.",
            layers=[block.layer],
            experts=zero,
            part="router",
        )
    groups = _equal_rows(weight, set(zero))
    _look_at_equal_rows(report, block, groups, equal_experts, record)
    _look_at_spread(report, block, weight)
    return weight, groups


def _equal_rows(weight: torch.Tensor, without: set[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    unit = torch.nn.functional.normalize(weight, dim=1)
    norms = weight.norm(dim=1)
    for row in range(len(weight)):
        if row in without:
            continue
        for group in groups:
            first = group[0]
            near = (weight[row] - weight[first]).norm() <= ROW_TOLERANCE * norms[first]
            if unit[row] @ unit[first] > 0.999 and near:
                group.append(row)
                break
        else:
            groups.append([row])
    return [group for group in groups if len(group) > 1]


def _look_at_equal_rows(
    report: Report,
    block: Block,
    groups: list[list[int]],
    equal_experts: list[list[int]],
    record: Mapping[str, Any] | None,
) -> None:
    if not groups:
        return
    sizes = {len(group) for group in groups}
    every_row = sum(map(len, groups)) == block.num_experts
    with_experts = all(any(set(group) <= set(equal) for equal in equal_experts) for group in groups)
    shards = (record or {}).get("init", {}).get("name") in ("granular", "split")
    # Copies repeat with their rows, all of them equally often; shards of one expert share a row.
    meant = (every_row and len(sizes) == 1 and (with_experts or shards)) or (record is not None and shards)
    meant = meant or (record is not None and "surgery" in record and with_experts)
    report.add(
        NOTE if meant else WARNING,
        "router-rows-alike",
        f"Equal rows ({'; '.join(map(ranges, groups))}): these experts are always chosen together"
        + (
            ", as copies and shards are."
            if meant
            else ", or one by its number alone. A row was perhaps written twice."
        ),
        layers=[block.layer],
        experts=[row for group in groups for row in group],
        part="router",
    )


def _look_at_spread(report: Report, block: Block, weight: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(256, weight.shape[1], generator=generator)
    logits = states @ weight.t()
    spread, first = float(logits.std()), float(logits.softmax(-1).max(-1).values.mean())
    if spread > SATURATED_SPREAD and first > SATURATED_SHARE and len(weight) > 1:
        report.add(
            WARNING,
            "router-saturated",
            f"For inputs of size 1 its logits spread by {spread:.3g}, so that the first choice gets {first:.1%}: the other experts and "
            "the router itself hardly learn. Scale the router down, or look for a scale that was applied twice.",
            layers=[block.layer],
            part="router",
            figure=spread,
        )


def look_at_bias(report: Report, block: Block, tensors: Tensors, config: PreTrainedConfig) -> torch.Tensor | None:
    """Add what a correction bias tells; gives it back, (E,) float32, where there is one."""
    if block.bias is None:
        return None
    bias = tensors.read(block.bias).float().flatten()
    if not torch.isfinite(bias).all():
        report.add(
            ERROR,
            "not-finite",
            "NaN or infinity in the correction bias of the router.",
            layers=[block.layer],
            experts=torch.where(~torch.isfinite(bias))[0].tolist(),
            part="correction bias",
        )
        return None
    text = config.get_text_config()
    if not bias.any():
        report.add(
            NOTE,
            "bias-still",
            "The correction bias is zero, as before any training with it. With --base it is told whether it was lost.",
            layers=[block.layer],
            part="correction bias",
        )
    per_token = next((v for n in EXPERTS_PER_TOKEN_NAMES if isinstance(v := getattr(text, n, None), int)), None)
    if per_token is None or per_token >= len(bias) or (getattr(text, "n_group", None) or 1) > 1:
        return bias
    # Scores lie between 0 and 1, so K others that are ahead by 1 are always ahead.
    barred = torch.where(bias + 1 < bias.sort(descending=True).values[per_token - 1])[0].tolist()
    if barred:
        report.add(
            WARNING,
            "bias-bars-expert",
            "The correction bias is so far below the others' that these experts can never be chosen: they are dead weight.",
            layers=[block.layer],
            experts=barred,
            part="correction bias",
            figure=float(bias.max() - bias.min()),
        )
    return bias
