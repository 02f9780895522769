"""A checkpoint that is said to hold an adapter: is what the adapter adds in it, where it belongs?

Letters: E experts, r rank, O outputs, I inputs.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from moe_hf.doctor.adapter_files import AdapterFile, read_adapter
from moe_hf.doctor.findings import ERROR, NOTE, Report
from moe_hf.doctor.opening import Opened
from moe_hf.doctor.pieces import DOWN, UP, WHOLE, Block
from moe_hf.doctor.sketches import cosine
from moe_hf.errors import MoEError
from moe_hf.finetuning.lora_config import ExpertLoraConfig
from moe_hf.finetuning.peft_files import PREFIX, from_peft, layout_of


# Of what a merge in 16 bits leaves of a small addition.
ALIKE = 0.5


def look_at_merge(report: Report, opened: Opened, base: Opened, folder: Path) -> None:
    """Add experts whose weights are the base's, or moved otherwise, where the adapter changes them."""
    try:
        adapter = read_adapter(folder)
        parts = dict(_expert_parts(adapter, base))
    except MoEError as error:
        report.add(NOTE, "not-examined", f"What the adapter adds could not be told: {error}")
        return
    bases = {block.name: block for block in base.blocks}
    lost: dict[int, list[int]] = {}
    other: dict[int, list[int]] = {}
    for block in opened.blocks:
        for leaf, (first, second, ids, scales) in parts.get(block.name, {}).items():
            for row, expert in enumerate(ids):
                added = scales[row] * second[row].float().t() @ first[row].float()
                if not added.any():
                    continue
                found = _moved(block, bases[block.name], opened, base, expert, leaf)
                if found is None:
                    continue
                if not found.any():
                    lost.setdefault(block.layer, []).append(expert)
                elif cosine(found, added) < ALIKE:
                    other.setdefault(block.layer, []).append(expert)
    if lost:
        report.add_by_layer(
            ERROR,
            "adapter-not-merged",
            lost,
            "The adapter changes these experts, and in the merged checkpoint they are bitwise the base's: the merge left them out. Merge "
            "with moe_hf.merge_expert_lora, or serve base and adapter apart.",
        )
    if other:
        report.add_by_layer(
            ERROR,
            "adapter-not-merged",
            other,
            "The adapter changes these experts, and they moved in another direction: columns of others were added, or one half in the place "
            "of the other. Merge with moe_hf.merge_expert_lora, and compare the logits.",
        )


def _expert_parts(adapter: AdapterFile, base: Opened) -> Iterator[tuple[str, dict[str, tuple]]]:
    """By block, by leaf: A (C, r, I), B (C, r, O), the experts' ids and their scales."""
    if base.model is None:
        raise MoEError("the base is a GGUF file.")
    if adapter.is_peft:
        layout = layout_of(adapter.config, adapter.facts.get("lora_B_layout"), None)
        tensors = {
            f"{PREFIX}{n}.lora_{h}.weight": t
            for n, hs in adapter.halves.items()
            if ".experts" in n
            for h, t in hs.items()
        }
        config, matrices = from_peft(base.model, adapter.config, tensors, layout)
    else:
        config = ExpertLoraConfig.from_dict(adapter.config)
        matrices = {f"{n.replace('.experts.', '.')}_{h}": t for n, hs in adapter.halves.items() for h, t in hs.items()}
    recorded = adapter.facts.get("experts") or {}
    for block in base.blocks:
        found = {}
        for leaf in config.target:
            first, second = matrices.get(f"{block.name}.{leaf}_A"), matrices.get(f"{block.name}.{leaf}_B")
            if first is None or second is None:
                continue
            ids = list(recorded.get(block.name, range(len(first))))
            scales = [config.scale_of(config.rank_of(str(block.layer), expert)) for expert in ids]
            found[leaf] = first, second, ids, scales
        yield block.name, found


def _moved(block: Block, beside: Block, opened: Opened, base: Opened, expert: int, leaf: str) -> torch.Tensor | None:
    """How a map of an expert differs from the base's, (O, I) in the order of the module, or None where it is not there."""
    pieces = [_map(one, source, expert, leaf) for one, source in ((block, opened), (beside, base))]
    if any(piece is None for piece in pieces) or pieces[0].shape != pieces[1].shape:
        return None
    return pieces[0] - pieces[1]


def _map(block: Block, opened: Opened, expert: int, leaf: str) -> torch.Tensor | None:
    names = {"down_proj": (DOWN,), "up_proj": (UP,), "gate_up_proj": ("gate", UP)}[leaf]
    matrices = block.matrices(opened.tensors, expert)
    if any(name not in matrices for name in names):
        return None
    if len(names) == 1:
        return matrices[names[0]].float()
    parts = [matrices[name].float() for name in names]
    piece = block.pieces[expert, names[0]]
    takes_turns = piece.rows not in (WHOLE, "first")
    return torch.stack(parts, 1).flatten(0, 1) if takes_turns else torch.cat(parts)
