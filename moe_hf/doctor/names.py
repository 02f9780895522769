"""What the names, the shapes and the counts of a checkpoint tell before a number is read.

Letters: E experts, K experts per token, D model width, F expert width.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedConfig

from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report
from moe_hf.doctor.layout import BIAS_NAMES, Layout, inner_experts, is_of_experts, is_transposed
from moe_hf.doctor.pieces import DOWN, GATE, UP, WHOLE, Block
from moe_hf.finetuning.moe_blocks import find_moe_blocks, whole_shape
from moe_hf.inspection import EXPERTS_PER_TOKEN_NAMES
from moe_hf.router_outputs import ROUTER_NAMES
from moe_hf.weight_files import TensorSpec


NAMED = 4
DRAWN = "from_pretrained draws them at random, with a warning at most, or refuses the file"
AGAIN = "Save or convert the model again, and compare the list of names."


def look_at_names(report: Report, layout: Layout, tensors: Mapping[str, TensorSpec]) -> None:
    """Add what is missing, left over, or of another shape."""
    _look_at_missing(report, layout)
    _look_at_unmapped(report, layout)
    for block in layout.blocks:
        _look_at_experts(report, block)
        _look_at_shapes(report, layout, block, tensors)
    _look_at_other_shapes(report, layout)
    _look_at_dtypes(report, layout, tensors)


def listed(names: Iterable[str]) -> str:
    """A few names in words."""
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _look_at_missing(report: Report, layout: Layout) -> None:
    experts = [name for name in layout.missing if ".experts." in name]
    blocks = tuple(f"{block.name}.{router}." for block in layout.blocks for router in ROUTER_NAMES)
    routers = [n for n in layout.missing if n not in experts and (n.startswith(blocks) or n.endswith(BIAS_NAMES))]
    rest = [name for name in layout.missing if name not in {*experts, *routers}]
    if experts:
        report.add_by_name(
            ERROR,
            "experts-missing",
            experts,
            f"The file has no tensors for {listed(experts)}: {DRAWN}. {AGAIN}",
        )
    if routers:
        report.add_by_name(
            ERROR,
            "router-missing",
            routers,
            f"The file has no tensors for {listed(routers)}: {DRAWN}, so tokens go to other experts. {AGAIN}",
        )
    if rest:
        report.add_by_name(
            ERROR,
            "weights-missing",
            rest,
            f"The file has no tensors for {listed(rest)}: {DRAWN}. {AGAIN}",
        )


def _look_at_unmapped(report: Report, layout: Layout) -> None:
    experts = [name for name in layout.unmapped if is_of_experts(name)]
    rest = [name for name in layout.unmapped if name not in experts]
    if experts:
        report.add_by_name(
            ERROR,
            "experts-unmapped",
            experts,
            f"No name of {type(layout.model).__name__} fits {listed(experts)}: they are left out while loading. Rename them as the "
            "family has them, or correct the configuration.",
            experts=_expert_numbers(experts),
        )
    if rest:
        # Where nothing is missing they replace nothing.
        severity = WARNING if layout.missing else NOTE
        report.add_by_name(
            severity,
            "weights-unmapped",
            rest,
            f"No name of {type(layout.model).__name__} fits {listed(rest)}: they are left out while loading.",
        )
    if layout.ignored:
        report.add_by_name(
            NOTE,
            "weights-unmapped",
            layout.ignored,
            f"The family's loader leaves out {listed(layout.ignored)} on purpose.",
        )


def _expert_numbers(names: Iterable[str]) -> list[int]:
    found = (re.search(r"experts\.(\d+)\.", name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def _look_at_experts(report: Report, block: Block) -> None:
    if not block.pieces:
        return
    there = {expert for expert, _ in block.pieces}
    beyond = [expert for expert in there if expert >= block.num_experts]
    lacking = {
        expert: [name for name in block.projections() if (expert, name) not in block.pieces]
        for expert in range(block.num_experts)
    }
    lacking = {expert: names for expert, names in lacking.items() if names}
    if beyond:
        report.add(
            ERROR,
            "config-contradicts-weights",
            f"The configuration has {block.num_experts} experts in this layer, and the file has {max(there) + 1}: it does not load, "
            "or loads without them. Correct the number of experts in config.json.",
            layers=[block.layer],
            experts=beyond,
            figure=max(there) + 1,
        )
    if lacking:
        parts = sorted({name for names in lacking.values() for name in names})
        report.add(
            ERROR,
            "experts-missing",
            f"The file lacks the {', '.join(parts)} of these experts, of {block.num_experts}: the ones behind them move up, or loading "
            f"fails. {AGAIN}",
            layers=[block.layer],
            experts=list(lacking),
            figure=len(lacking),
        )


def expected_shapes(experts: nn.Module, width: int) -> dict[str, tuple[int, int]]:
    """The canonical shapes of the projections, from the stacked parameters of a module of the model."""
    transposed, shapes = is_transposed(experts, width), {}
    for name, parameter in experts.named_parameters(recurse=False):
        shape = tuple(whole_shape(parameter))
        if len(shape) != 3 or name not in ("gate_up_proj", "up_proj", "down_proj"):
            continue
        rows, columns = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        if name == "gate_up_proj":
            shapes |= {GATE: (rows // 2, columns), UP: (rows // 2, columns)}
        else:
            shapes[UP if name == "up_proj" else DOWN] = (rows, columns)
    return shapes


def _look_at_shapes(report: Report, layout: Layout, block: Block, tensors: Mapping[str, TensorSpec]) -> None:
    width = layout.model.config.get_text_config().hidden_size
    expected = expected_shapes(inner_experts(find_moe_blocks(layout.model)[block.name]), width)
    turned, wrong, found = [], [], None
    for (expert, name), piece in block.pieces.items():
        shape, other = tensors[piece.stored].shape, expected.get(name)
        if other is None or piece.rows != WHOLE and piece.expert is None:
            continue
        if piece.expert is None:
            right, swapped = other, other[::-1]
        else:
            of_all = layout.misshaped.get(piece.stored)
            if of_all is None:
                continue
            right, swapped = of_all[1], (of_all[1][0], *of_all[1][:0:-1])
        if shape != right:
            (turned if shape == swapped and right != swapped else wrong).append(expert)
            found = shape, right, piece.stored
    for code, experts, what in (
        ("transposed", turned, "Its matrices lie with inputs and outputs exchanged: transpose them."),
        ("wrong-shape", wrong, "The configuration and the weights are of different models, or a save was cut."),
    ):
        if experts:
            report.add(
                ERROR,
                code,
                f"{found[2]} is {list(found[0])}, and the model has {list(found[1])}: it does not load, or loads at random. {what}",
                layers=[block.layer],
                experts=experts,
            )
    if turned or wrong:
        block.opaque = "its shapes are not those of the model"


def _look_at_other_shapes(report: Report, layout: Layout) -> None:
    of_experts = {piece.stored for block in layout.blocks for piece in block.pieces.values()}
    routers = {block.router: block for block in layout.blocks if block.router is not None}
    rest = {}
    for stored, (shape, right) in layout.misshaped.items():
        if stored in of_experts:
            continue
        if stored in routers:
            block = routers[stored]
            report.add(
                ERROR,
                "config-contradicts-weights",
                f"The router {stored} is {list(shape)}, and the configuration tells {list(right)}: experts and router are not of one "
                "model, or config.json is of another one.",
                layers=[block.layer],
                figure=shape[0] if shape else 0,
            )
        else:
            rest[stored] = shape, right
    if rest:
        name, (shape, right) = next(iter(sorted(rest.items())))
        report.add_by_name(
            ERROR,
            "wrong-shape",
            rest,
            f"{listed(rest)}: {name} is {list(shape)}, and the configuration tells {list(right)}. It does not load, or loads at random: "
            "the configuration is of another model, or a save was cut.",
        )


def _look_at_dtypes(report: Report, layout: Layout, tensors: Mapping[str, TensorSpec]) -> None:
    state = layout.model.state_dict()
    wrong = [
        stored
        for name, names in layout.found.items()
        for stored in names
        if state[name].is_floating_point() and not tensors[stored].dtype.is_floating_point
    ]
    if wrong and not getattr(layout.model.config, "quantization_config", None):
        report.add_by_name(
            ERROR,
            "wrong-dtype",
            wrong,
            f"{listed(wrong)} are stored as {str(tensors[wrong[0]].dtype).removeprefix('torch.')}, and no quantization_config says how "
            "to read them: they are taken for weights as they are.",
        )


def look_at_counts(report: Report, config: PreTrainedConfig, blocks: list[Block]) -> None:
    """Add what no routing can be: more experts per token than there are, groups that do not divide."""
    text = config.get_text_config()
    per_token = next((v for n in EXPERTS_PER_TOKEN_NAMES if isinstance(v := getattr(text, n, None), int)), None)
    for block in blocks:
        if per_token is not None and per_token > block.num_experts:
            report.add(
                ERROR,
                "config-contradicts-weights",
                f"A token shall use {per_token} experts, and this layer has {block.num_experts}: a forward pass fails. Correct "
                "config.json.",
                layers=[block.layer],
                figure=per_token,
            )
    groups, chosen = getattr(text, "n_group", None), getattr(text, "topk_group", None)
    counts = {block.num_experts for block in blocks}
    if isinstance(groups, int) and groups > 1:
        bad = [count for count in counts if count % groups]
        room = [c for c in counts if isinstance(chosen, int) and per_token and per_token > c // groups * chosen]
        if bad or room or (isinstance(chosen, int) and chosen > groups):
            report.add(
                ERROR,
                "config-contradicts-weights",
                f"n_group={groups}, topk_group={chosen} and {per_token} experts per token do not go with {sorted(counts)} experts: groups "
                "must divide them, and the chosen groups must hold enough. Correct config.json.",
                figure=groups,
            )


def is_plain(spec: TensorSpec) -> bool:
    """Whether a tensor's numbers are what they look like: floats of 16 bits and more."""
    return spec.dtype.is_floating_point and spec.dtype.itemsize >= 2 and spec.dtype != torch.float8_e8m0fnu
