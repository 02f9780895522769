"""Quantized folders: what of the experts is in full precision, which routers are quantized, and what nothing can decode.

Letters: E experts.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from moe_hf.dense_sources import quantization_settings
from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report
from moe_hf.doctor.matching import Verdict
from moe_hf.doctor.names import listed
from moe_hf.doctor.opening import Opened
from moe_hf.doctor.pieces import Block
from moe_hf.doctor.quantized_tensors import QuantizedTensors


# Where a quantizer's settings list what stays in full precision.
SKIPPED = ("ignore", "exclude", "exclude_modules", "modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers")
# Of these the list is what a server goes by: what is not on it is expected in codes.
STRICT = ("compressed-tensors", "modelopt", "quark")
LOST_COSINE, USUAL_COSINE = 0.5, 0.9


def look_at_quantized(report: Report, opened: Opened) -> None:
    """Add what the names and dtypes of a quantized folder tell; nothing for one in full precision."""
    tensors = opened.tensors
    settings = None if opened.config is None else quantization_settings(opened.config)
    if not isinstance(tensors, QuantizedTensors):
        return
    quantized = [weight for weight in tensors.parts if tensors.is_quantized(weight)]
    if quantized and settings is None:
        report.add_by_name(
            ERROR,
            "quantization-untold",
            quantized,
            f"{listed(quantized)} are stored in codes, and config.json has no quantization_config: a loader takes the codes for "
            "weights, or leaves them out. Take over the quantizer's config.json.",
        )
    _look_at_scales(report, tensors, quantized)
    skipped = skipped_names(settings or {})
    for block in opened.blocks:
        _look_at_block(report, block, tensors, skipped, bool(quantized) or settings is not None)
    if settings is not None and str(settings.get("quant_method")) in STRICT and skipped:
        _look_at_list(report, opened.blocks, tensors, skipped)


def skipped_names(settings: Mapping[str, Any]) -> list[str]:
    """Names and patterns that a quantizer's settings leave in full precision."""
    found: list[str] = []
    for part in (settings, settings.get("quantization") or {}):
        for field in SKIPPED:
            value = part.get(field) if isinstance(part, Mapping) else None
            found += [str(name) for name in value] if isinstance(value, list | tuple) else []
    return found


def is_skipped(weight: str, patterns: Iterable[str]) -> bool:
    """Whether one of a quantizer's patterns names the module of a weight, or one above it."""
    module = weight.removesuffix(".weight")
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                if re.search(pattern[3:], module):
                    return True
            except re.error:
                continue
        elif pattern in module or fnmatch.fnmatch(module, pattern):
            return True
    return False


def _look_at_scales(report: Report, tensors: QuantizedTensors, quantized: list[str]) -> None:
    lacking = [weight for weight in quantized if tensors.lacks(weight)]
    if lacking:
        experts = sorted({int(m[1]) for m in (re.search(r"experts\.(\d+)\.", weight) for weight in lacking) if m})
        report.add_by_name(
            ERROR,
            "scales-missing",
            lacking,
            f"{listed(lacking)} lack their scales: what loads is codes, or 1 is taken for the scale. Quantize again.",
            experts=experts,
        )


def _look_at_block(
    report: Report, block: Block, tensors: QuantizedTensors, skipped: list[str], is_quantized: bool
) -> None:
    plain, codes = set(), set()
    names = set()
    for (expert, _), piece in block.pieces.items():
        (codes if tensors.is_quantized(piece.stored) else plain).add(expert)
        if not tensors.is_quantized(piece.stored):
            names.add(piece.stored)
    meant = bool(names) and all(is_skipped(name, skipped) for name in names)
    if plain and not codes and is_quantized:
        report.add(
            NOTE if meant else WARNING,
            "experts-not-quantized",
            "All experts of this layer are in full precision in a quantized folder"
            + (
                ", as its settings say."
                if meant
                else ": the quantizer found no nn.Linear there, so most of the weights are as large "
            )
            + (
                ""
                if meant
                else "as before. Quantize with a tool that knows stacked experts (moe_hf.quantize_experts)."
            ),
            layers=[block.layer],
            figure=len(plain),
        )
    elif plain:
        report.add(
            NOTE if meant else WARNING,
            "quantized-unevenly",
            f"{listed(names)} are in full precision, and other experts of the layer are not: they were perhaps skipped for want of "
            "tokens in calibration.",
            layers=[block.layer],
            experts=sorted(plain),
            figure=len(plain),
        )
    if block.router is not None and tensors.is_quantized(block.router):
        report.add(
            WARNING,
            "router-quantized",
            "The router is quantized: a small error in its logits sends tokens to other experts. Keep it in full precision; it is a "
            "small part of the weights.",
            layers=[block.layer],
            part="router",
        )


def _look_at_list(report: Report, blocks: list[Block], tensors: QuantizedTensors, skipped: list[str]) -> None:
    unlisted = [
        b for b in blocks if b.router and not tensors.is_quantized(b.router) and not is_skipped(b.router, skipped)
    ]
    if unlisted:
        report.add(
            WARNING,
            "router-not-listed",
            f"Routers ({unlisted[0].router}) are in full precision, and the list of what is not quantized in config.json does not name "
            "them: servers that go by the list look for codes and scales, and fail or take wrong ones. Add them.",
            layers=[block.layer for block in unlisted],
            part="config.json",
        )


def look_at_errors(report: Report, verdicts: Mapping[int, Mapping[int, Verdict]]) -> None:
    """Add how far quantized experts are from the base's, and those that are not the base's at all."""
    cosines = {(layer, e): v.cosine for layer, of in verdicts.items() for e, v in of.items()}
    if not cosines:
        return
    usual = median(cosines.values())
    lost: dict[int, list[int]] = {}
    for (layer, expert), cos in cosines.items():
        if cos < LOST_COSINE and usual > USUAL_COSINE:
            lost.setdefault(layer, []).append(expert)
    if lost:
        report.add_by_layer(
            ERROR,
            "quantization-broken",
            lost,
            f"Decoded, these experts have nothing of the base's (cosine {min(cosines.values()):.2f}, of the others {usual:.3f}): codes or "
            "scales are those of something else. Quantize again.",
            figure=min(cosines.values()),
        )
    (layer, expert), worst = min(cosines.items(), key=lambda item: item[1])
    report.add(
        NOTE,
        "quantization-error",
        f"Beside the base's, decoded experts have a cosine of {usual:.5f} in the middle and {worst:.5f} at worst.",
        layers=[layer],
        experts=[expert],
        figure=worst,
    )
