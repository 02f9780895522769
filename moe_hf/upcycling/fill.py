"""Fills a MoE model in memory from the dense model that it is made from."""

import torch
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite, activation_of, holder_of
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.upcycling.method import UpcyclingMethod
from moe_hf.upcycling.recipes import BlockTensor, DensePiece, block_tensors, dense_pieces, random_generator, slot_rows


@torch.no_grad()
def fill_blocks(dense_base: nn.Module, moe_base: nn.Module, config: MoEConfig, method: UpcyclingMethod) -> None:
    """Fill each MoE block from the dense MLP that it replaces, and draw the routers.

    Router rows are N(0, 1 / D), so that logits have a spread of about 1 on a normalised input, whatever the width.

    Args:
        dense_base, moe_base (`nn.Module`): the decoders without heads, of the same family.
        config (`MoEConfig`): the MoE model's configuration.
        method (`UpcyclingMethod`): how.
    """
    for site in moe_base._moe_sites:
        block: MoEBlock = moe_base.get_submodule(site.block)
        holder = holder_of(dense_base, site)
        pieces = {name: DensePiece(tensor) for name, tensor in dense_pieces(holder, site).items()}

        def read(piece: str, source: int = 0, pieces: dict[str, DensePiece] = pieces) -> torch.Tensor:
            return pieces[piece].tensor

        recipes, shared = method.recipes(site, config, read)
        for name, tensor in block_tensors(recipes, shared, config, site).items():
            _fill(block.get_parameter(name), tensor, pieces)
        if block.shared_expert_gate is not None:
            for parameter in block.shared_expert_gate.parameters():
                nn.init.zeros_(parameter)
        _copy_activation(activation_of(holder, site), block)
        generator = random_generator(method.seed, site.layer_index, "router")
        rows = torch.randn(block.gate.weight.shape, generator=generator, dtype=torch.float32)
        block.gate.weight.copy_(rows / site.hidden_size**0.5)


def _fill(target: torch.Tensor, tensor: BlockTensor, pieces: dict[str, DensePiece]) -> None:
    flat = target.view(-1) if tensor.is_bias else target.view(-1, target.shape[-1])
    for slot in tensor.slots:
        start = slot.start
        for rows in slot_rows(slot, pieces[slot.piece], target.dtype):
            flat[start : start + len(rows)].copy_(rows)
            start += len(rows)


def _copy_activation(activation: object, block: MoEBlock) -> None:
    """Copy what an activation has learned, where it is a module with parameters."""
    for part in (block.experts, block.shared_expert):
        if part is not None and isinstance(activation, nn.Module):
            part.act_fn.load_state_dict(activation.state_dict())


def copy_shared_weights(dense: nn.Module, moe: nn.Module, sites: list[MLPSite], prefix: str) -> None:
    """Copy every parameter and buffer outside of the replaced MLPs; each must exist on both sides, in one shape.

    Raises:
        MoEError: naming tensors that one side lacks.
    """
    replaced = set()
    for site in sites:
        holder = f"{prefix}{site.layer}." + (f"{site.attribute}." if site.attribute else "")
        names = [""] if site.attribute else [f"{n}." for n in (site.up, site.down, site.activation) if n]
        replaced |= {holder + name for name in names}
    blocks = tuple(f"{prefix}{site.block}." for site in sites)
    source = {k: v for k, v in dense.state_dict().items() if not k.startswith(tuple(replaced))}
    target = {k: v for k, v in moe.state_dict().items() if not k.startswith(blocks)}
    if source.keys() != target.keys():
        raise MoEError(
            f"The dense model and the MoE model do not have the same tensors outside of the MLPs: only dense "
            f"{sorted(source.keys() - target.keys())[:4]}, only MoE {sorted(target.keys() - source.keys())[:4]}."
        )
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)
