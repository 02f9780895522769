"""Where each number of a native checkpoint lies in ours. Nothing is computed: a tensor is pieces of others, or zeros.

So both directions are one plan, read forwards or backwards, and no number can change on the way.

Letters: D model width, F expert width, E experts.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moe_hf.interchange.description import Family, Twin
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.weight_files import TensorSpec


@dataclass(frozen=True)
class Span:
    """Consecutive numbers of a source tensor: `count` from number `start` on, in the order of the memory."""

    source: str
    start: int
    count: int


Plan = dict[str, list[Span]]


@dataclass(frozen=True)
class Exchange:
    """One model in both forms, without its numbers.

    Attributes:
        ours, native: the two models, on the meta device.
        our_tensors, native_tensors: what their `save_pretrained` writes, in order.
        plan: native names to spans of our tensors; no span for a tensor of zeros.
    """

    ours: PreTrainedModel
    native: PreTrainedModel
    our_tensors: dict[str, TensorSpec]
    native_tensors: dict[str, TensorSpec]
    plan: Plan


def make_exchange(config: MoEConfig, native: PreTrainedConfig, family: Family) -> Exchange:
    """Match our model of `config` with the native one of `native`, number by number.

    Asserts that each of our numbers has one place, and that the native names and sizes are transformers' own.
    """
    (ours_model, ours), (native_model, natives) = _skeleton(config), _skeleton(native)
    prefix = f"{ours_model.base_model_prefix}."
    sites = {prefix + site.block: prefix + site.layer for site in ours_model.base_model._moe_sites}
    plan = _outside(config, family.twins[config.text_config.model_type], tuple(sites), ours, natives)
    for block, layer in sites.items():
        for name, span in _block(config, family, block, ours):
            _append(plan[f"{layer}.{name}"], span)
        for name in _zeros(config, family):
            plan[f"{layer}.{name}"] = []
    _check(plan, ours, natives)
    return Exchange(ours_model, native_model, ours, natives, dict(plan))


def _skeleton(config: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, TensorSpec]]:
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    state = revert_weight_conversion(model, state)
    return model, {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def _outside(
    config: MoEConfig, twin: Twin, blocks: tuple[str, ...], ours: dict[str, TensorSpec], native: dict[str, TensorSpec]
) -> defaultdict[str, list[Span]]:
    """The tensors that are in no block: one by one, but for fused projections, and rows that are in another order."""
    plan: defaultdict[str, list[Span]] = defaultdict(list)
    inside = tuple(f"{block}." for block in blocks)
    for name in (name for name in ours if not name.startswith(inside)):
        if twin.rotates_neighbours and any(f".{projection}." in name for projection in ("q_proj", "k_proj")):
            for span in _halves(name, ours[name], config):
                _append(plan[name], span)
            continue
        suffix = next((suffix for suffix in twin.splits if name.endswith(f".{suffix}")), None)
        parts = [name] if suffix is None else [name.removesuffix(suffix) + part for part in twin.splits[suffix]]
        start = 0
        for part in parts:
            count = _size(native[part]) if part in native else 0
            plan[part].append(Span(name, start, count))
            start += count
    return plan


def _halves(name: str, spec: TensorSpec, config: MoEConfig) -> Iterator[Span]:
    """The rows of a projection to heads: of those that are rotated the even ones first, then the odd ones."""
    rows, row = spec.shape[0], _size(spec) // spec.shape[0]
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    rotated = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head_dim)]
    for head in range(0, rows, head_dim):
        yield from (Span(name, (head + index) * row, row) for index in order)


def inverse(plan: Plan) -> Plan:
    """The plan of the way back: what each of our tensors is made of, in native tensors."""
    pieces: defaultdict[str, list[tuple[int, Span]]] = defaultdict(list)
    for target, spans in plan.items():
        reached = 0
        for span in spans:
            pieces[span.source].append((span.start, Span(target, reached, span.count)))
            reached += span.count
    return {name: [span for _, span in sorted(parts, key=lambda part: part[0])] for name, parts in pieces.items()}


def _block(config: MoEConfig, family: Family, block: str, ours: dict[str, TensorSpec]) -> Iterator[tuple[str, Span]]:
    """Pairs of a native name within the layer and the span that comes next in it."""
    names = family.names
    yield names.router, _whole(f"{block}.gate.weight", ours)
    if config.balance_strategy == "bias":
        yield names.correction_bias, _whole(f"{block}.gate.e_score_correction_bias", ours)
    first, last = f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj"
    half = _size(ours[first]) // (2 * config.num_experts)
    whole = _size(ours[last]) // config.num_experts
    gate, up, down = names.experts
    for expert in range(config.num_experts):
        yield gate.format(e=expert), Span(first, 2 * expert * half, half)
        yield up.format(e=expert), Span(first, (2 * expert + 1) * half, half)
        yield down.format(e=expert), Span(last, expert * whole, whole)
    if config.shared_expert_intermediate_size:
        for native, part in zip(names.shared, ("gate_proj", "up_proj", "down_proj"), strict=True):
            yield native, _whole(f"{block}.shared_expert.{part}.weight", ours)
    if config.shared_expert_gate:
        yield names.shared_gate, _whole(f"{block}.shared_expert_gate.weight", ours)


def _zeros(config: MoEConfig, family: Family) -> list[str]:
    """Native names within a layer that our model has no numbers for."""
    names = family.names
    zeros = [] if config.balance_strategy == "bias" else [names.correction_bias]
    if not config.shared_expert_intermediate_size and family.shared is not None and family.shared.least:
        zeros += [*names.shared, names.shared_gate]
    return [name for name in zeros if name is not None]


def _append(spans: list[Span], span: Span) -> None:
    last = spans[-1] if spans else None
    if last is not None and last.source == span.source and last.start + last.count == span.start:
        spans[-1] = Span(last.source, last.start, last.count + span.count)
    else:
        spans.append(span)


def _check(plan: Plan, ours: dict[str, TensorSpec], native: dict[str, TensorSpec]) -> None:
    other = sorted(plan.keys() ^ native.keys())
    assert not other, f"{len(other)} names are not those that transformers writes: {other[:3]}"
    for name, spans in plan.items():
        assert not spans or sum(span.count for span in spans) == _size(native[name]), f"{name} has another size"
    back = inverse(plan)
    assert back.keys() == ours.keys(), f"not used: {sorted(back.keys() ^ ours.keys())}"
    reached: dict[str, int] = defaultdict(int)
    for span in sorted(
        (span for spans in plan.values() for span in spans), key=lambda span: (span.source, span.start)
    ):
        assert span.start == reached[span.source], f"{span.source} is used twice, or in part"
        reached[span.source] += span.count
    assert all(reached[name] == _size(spec) for name, spec in ours.items())


def _whole(name: str, tensors: dict[str, TensorSpec]) -> Span:
    return Span(name, 0, _size(tensors[name]))


def _size(spec: TensorSpec) -> int:
    return math.prod(spec.shape)
