"""What a family's loader would do with the names of a checkpoint: which tensor goes where, and what is left over or missing.

The names go through transformers' own conversion of the family, without a number being read. Per-expert and stacked tensors come
out as the same blocks.

Letters: E experts, D model width, F expert width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from moe_hf.doctor.pieces import DOWN, EVEN, FIRST, GATE, ODD, SECOND, UP, WHOLE, Block, Piece
from moe_hf.finetuning.moe_blocks import CORRECTION_BIAS, experts_in, find_moe_blocks
from moe_hf.finetuning.router_watch import layer_label
from moe_hf.router_outputs import ROUTER_NAMES
from moe_hf.weight_files import TensorSpec


# Names of correction biases in transformers' families.
BIAS_NAMES = (CORRECTION_BIAS, "expert_bias")
OF_EXPERTS = re.compile(r"(^|\.)(\w*experts?\w*|\w*router\w*|mlp\.gate|block_sparse_moe|w13_weight|w2_weight)(\.|$)")
# What old checkpoints hold and no model of today reads.
HARMLESS = re.compile(r"(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


@dataclass
class Layout:
    """What was found of the names.

    Attributes:
        blocks: of the layers with experts, in order.
        found: names of the model to the names in the file that they are made from.
        missing: names of the model that nothing in the file becomes.
        unmapped: names in the file that become nothing.
        ignored: those of them that the family's loader leaves out on purpose.
        misshaped: names in the file, with the shape there and the one that the model has.
    """

    model: PreTrainedModel
    blocks: list[Block] = field(default_factory=list)
    found: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unmapped: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def stored(self, name: str) -> str | None:
        """The name in the file of a tensor of the model that lies there as it is, or None."""
        names = self.found.get(name, [])
        return names[0] if len(names) == 1 else None


def layout_of(model: PreTrainedModel, tensors: Mapping[str, TensorSpec]) -> Layout:
    """Match the names of a file with those of a model, as `from_pretrained` would.

    Args:
        model (`PreTrainedModel`): on the meta device or in memory.
        tensors (`Mapping`): what the file holds, by name.
    """
    layout = Layout(model)
    state = model.state_dict(keep_vars=True)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    blocks = {name: _empty_block(name, module, state) for name, module in find_moe_blocks(model).items()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for stored in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        if target not in state and stored in state:
            target, pattern = rename_source_key(stored, [], [], prefix, state)
        if target not in state:
            harmless = HARMLESS.search(stored) or any(rule.search(stored) for rule in ignored)
            (layout.ignored if harmless else layout.unmapped).append(stored)
            continue
        converter = of_pattern.get(pattern)
        targets = [target] if converter is None else _targets(target, converter)
        for one in targets:
            layout.found.setdefault(one, []).append(stored)
        place = _block_of(target, blocks)
        if place is not None:
            _add_pieces(place[0], place[1], place[2], stored, converter, pattern, tensors[stored], model)
        expected = tuple(state[target].shape)
        is_packed = not tensors[stored].dtype.is_floating_point and state[target].is_floating_point()
        if converter is None and not is_packed and tensors[stored].shape != expected:
            layout.misshaped[stored] = (tensors[stored].shape, expected)
    layout.missing = _missing(model, state, layout.found)
    layout.blocks = sorted((block for block, _ in blocks.values()), key=lambda block: block.layer)
    for block, module in blocks.values():
        _note_router(block, module, layout)
    return layout


def _targets(target: str, converter: WeightConverter) -> list[str]:
    # Of a conversion with several results, transformers names the first.
    first = converter.target_patterns[0]
    return [target.replace(first, other) for other in converter.target_patterns]


def _missing(model: PreTrainedModel, state: Mapping[str, torch.Tensor], found: Mapping[str, list[str]]) -> list[str]:
    rules = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    # Tied names are one tensor.
    names_of: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names_of.setdefault(id(tensor), []).append(name)
    tied = model.all_tied_weights_keys
    missing = []
    for names in names_of.values():
        group = {*names, *(tied[name] for name in names if name in tied)}
        group |= {other for other, source in tied.items() if source in group}
        if not group & found.keys() and not any(rule.search(name) for rule in rules for name in group):
            missing.append(names[0])
    return missing


def _empty_block(name: str, module: nn.Module, state: Mapping[str, torch.Tensor]) -> tuple[Block, nn.Module]:
    label = layer_label(name)
    experts = inner_experts(module)
    count = len(experts) if isinstance(experts, nn.ModuleList) else experts_in(experts)
    # Experts that compute nothing of their own have no row of the second matrix (longcat_flash).
    down = getattr(experts, "down_proj", None)
    count = down.shape[0] if isinstance(down, torch.Tensor) and down.ndim == 3 else count
    names = {parameter for parameter, _ in experts.named_parameters(recurse=False)}
    kinds = (GATE, UP, DOWN) if "gate_up_proj" in names else (UP, DOWN)
    expected = kinds if "down_proj" in names else ()
    return Block(name, int(label) if label.isdigit() else 0, count, expected=expected), module


def _block_of(target: str, blocks: Mapping[str, tuple[Block, nn.Module]]) -> tuple[Block, nn.Module, str] | None:
    for name, (block, module) in blocks.items():
        start = f"{name}.experts."
        if target.startswith(start):
            return block, module, target.removeprefix(start)
    return None


def _add_pieces(
    block: Block,
    module: nn.Module,
    leaf: str,
    stored: str,
    converter: WeightConverter | None,
    pattern: str | None,
    spec: TensorSpec,
    model: PreTrainedModel,
) -> None:
    """Note which experts' projections a tensor of the file holds."""
    experts = inner_experts(module)
    leaf = leaf.replace("base_layer.", "")
    if leaf not in ("gate_up_proj", "up_proj", "down_proj"):
        return
    operations = [] if converter is None else [type(operation).__name__ for operation in converter.operations]
    if converter is not None and set(operations) <= {"MergeModulelist", "Concatenate"} and operations:
        number = re.search(r"experts\.(\d+)\.", stored)
        if number is None:
            block.opaque = f"{stored} names no expert"
            return
        part = list(converter.source_patterns).index(pattern)
        kind = DOWN if leaf == "down_proj" else UP if leaf == "up_proj" else (GATE, UP)[part]
        block.pieces[int(number[1]), kind] = Piece(stored)
        return
    if len(spec.shape) != 3:
        block.opaque = f"{stored} is no stack of matrices"
        return
    interleaved = "Interleave" in operations
    if converter is not None and not interleaved:
        block.opaque = f"{stored} is converted by {', '.join(operations)} while it is loaded"
        return
    _add_stacked(block, experts, leaf, stored, spec.shape, interleaved, model)


def _add_stacked(
    block: Block,
    experts: nn.Module,
    leaf: str,
    stored: str,
    shape: tuple[int, ...],
    interleaved: bool,
    model: PreTrainedModel,
) -> None:
    transposed = is_transposed(experts, model.config.get_text_config().hidden_size)
    halves = (EVEN, ODD) if interleaved != (not is_concatenated(experts)) else (FIRST, SECOND)
    kinds = {"gate_up_proj": ((GATE, halves[0]), (UP, halves[1]))}.get(leaf, ((leaf.removesuffix("_proj"), WHOLE),))
    for expert in range(min(shape[0], block.num_experts)):
        for kind, rows in kinds:
            block.pieces[expert, kind] = Piece(stored, expert, rows, transposed)


def inner_experts(block: nn.Module) -> nn.Module:
    """The experts of a block, inside of what adapters of PEFT put around them."""
    experts = block.experts
    while isinstance(inner := getattr(experts, "base_layer", None), nn.Module):
        experts = inner
    return experts


def is_transposed(experts: nn.Module, width: int) -> bool:
    """Whether the stacked matrices of a module lie as (in, out); families without the mark are told by their shapes."""
    mark = getattr(experts, "is_transposed", None)
    if mark is not None:
        return bool(mark)
    weight = getattr(experts, "gate_up_proj", None)
    weight = getattr(experts, "up_proj", None) if weight is None else weight
    return isinstance(weight, torch.Tensor) and weight.ndim == 3 and weight.shape[2] != width == weight.shape[1]


def is_concatenated(experts: nn.Module) -> bool:
    """Whether gate and up follow one another in a fused matrix, or take turns: told by the gate, or by what it computes."""
    mark = getattr(experts, "is_concatenated", True)
    function = getattr(experts, "_apply_gate", None)
    if function is None or not mark:
        return bool(mark)
    rows = torch.linspace(-1, 1, 8).repeat(2, 1)
    rows[1, 1] += 1
    with torch.no_grad():
        try:
            first, second = function(rows)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return True
    # The second column is the first neuron's up where they take turns, and the second neuron's gate where they do not.
    return not bool((first - second).abs().argmax() == 0)


def _note_router(block: Block, module: nn.Module, layout: Layout) -> None:
    children = dict(module.named_children())
    router = next((child for child in ROUTER_NAMES if child in children), None)
    start = f"{block.name}."
    rows = [
        f"{start}{router}.{leaf}"
        for leaf, parameter in (children[router].named_parameters() if router else ())
        if parameter.ndim == 2 and parameter.shape[0] >= block.num_experts and not leaf.endswith(BIAS_NAMES)
    ]
    # A router that is a network of its own has no row for an expert.
    if len(rows) == 1:
        block.router = layout.stored(rows[0])
    for name in layout.found:
        if name.startswith(start) and name.rsplit(".", 1)[-1] in BIAS_NAMES:
            block.bias = layout.stored(name)
        if name.startswith(start) and "shared" in name.removeprefix(start):
            block.shared += layout.found[name]


def is_of_experts(name: str) -> bool:
    """Whether a tensor looks by its name like one of experts or routers."""
    return OF_EXPERTS.search(name) is not None
