"""Fills a MoE model in memory from the dense model, or models, that it is made from."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite, activation_of, holder_of
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.upcycling.initialisers.mix import average
from moe_hf.upcycling.method import LayerStates, UpcyclingMethod
from moe_hf.upcycling.recipes import BlockTensor, DensePiece, block_tensors, dense_pieces, slot_rows


@torch.no_grad()
def fill_blocks(
    dense_bases: Sequence[nn.Module],
    dense_sites: Sequence[Sequence[MLPSite]],
    moe_base: nn.Module,
    config: MoEConfig,
    method: UpcyclingMethod,
    hidden_states: Mapping[int, LayerStates] | None = None,
) -> None:
    """Fill each MoE block, its router too, from the dense MLP that it replaces.

    Args:
        dense_bases (`Sequence[nn.Module]`): the decoder without its head of each dense model; the first is upcycled.
        dense_sites (`Sequence[Sequence[MLPSite]]`): for each of them, the MLPs that become experts.
        moe_base (`nn.Module`): the MoE model's decoder, of the same family.
        config (`MoEConfig`): the MoE model's configuration.
        method (`UpcyclingMethod`): how.
        hidden_states (`Mapping[int, LayerStates]`, *optional*): by layer, what the MLP sees.
    """
    for sites in zip(*dense_sites, strict=True):
        site = sites[0]
        block: MoEBlock = moe_base.get_submodule(site.block)
        holders = [holder_of(base, site) for base, site in zip(dense_bases, sites, strict=True)]
        pieces = [
            {name: DensePiece(tensor) for name, tensor in dense_pieces(holder, site).items()}
            for holder, site in zip(holders, sites, strict=True)
        ]

        def read(piece: str, source: int = 0, pieces: list[dict[str, DensePiece]] = pieces) -> torch.Tensor:
            return pieces[source][piece].tensor

        hidden = (hidden_states or {}).get(site.layer_index)
        recipes, shared = method.recipes(
            site,
            config,
            read,
            dense_widths=tuple(site.intermediate_size for site in sites),
            hidden_states=hidden,
            act_fn=activation_of(holders[0], site),
        )
        for name, tensor in block_tensors(recipes, shared, config, site).items():
            _fill(block.get_parameter(name), tensor, pieces)
        if block.shared_expert_gate is not None:
            for parameter in block.shared_expert_gate.parameters():
                nn.init.zeros_(parameter)
        sources = method.init.averaged(config)
        _copy_activation([activation_of(holders[source], sites[source]) for source in sources], block)
        state = block.gate.state_dict()
        for name, tensor in method.router_tensors(block.gate, site, config, hidden).items():
            state[name].copy_(tensor)


def _fill(target: torch.Tensor, tensor: BlockTensor, pieces: Sequence[Mapping[str, DensePiece]]) -> None:
    flat = target.view(-1) if tensor.is_bias else target.view(-1, target.shape[-1])
    for slot in tensor.slots:
        start = slot.start
        for rows in slot_rows(slot, pieces[slot.recipe.source][slot.piece], target.dtype):
            flat[start : start + len(rows)].copy_(rows)
            start += len(rows)


def _copy_activation(activations: Sequence[object], block: MoEBlock) -> None:
    """Copy what activations have learned, where they are modules with parameters."""
    if not isinstance(activations[0], nn.Module):
        return
    learned = [activation.state_dict() for activation in activations]
    mean = {name: average([state[name] for state in learned]) for name in learned[0]}
    for part in (block.experts, block.shared_expert, block.dense_ffn):
        if part is not None:
            part.act_fn.load_state_dict(mean)


@torch.no_grad()
def copy_other_weights(
    models: Sequence[nn.Module], sites: Sequence[Sequence[MLPSite]], moe: nn.Module, prefix: str
) -> None:
    """Copy every parameter and buffer outside of the MLPs, averaged over `models` when there are several.

    Args:
        models (`Sequence[nn.Module]`): the dense models with their heads.
        sites (`Sequence[Sequence[MLPSite]]`): for each of them, the MLPs that become experts.
        moe (`nn.Module`): the MoE model, changed in place.
        prefix (`str`): of the base model's names in the whole model's.

    Raises:
        MoEError: naming tensors that one side lacks.
    """
    sources = [outside_mlps(model.state_dict(), own, prefix) for model, own in zip(models, sites, strict=True)]
    blocks = tuple(f"{prefix}{site.block}." for site in sites[0])
    target = {k: v for k, v in moe.state_dict().items() if not k.startswith(blocks)}
    for source in sources:
        check_same_names(source, target)
    for name, tensor in target.items():
        tensor.copy_(average([source[name] for source in sources]))


def check_same_names(dense: Collection[str], moe: Collection[str]) -> None:
    """Refuse models whose tensors outside of the MLPs are not the same ones.

    Raises:
        MoEError: naming tensors that one side lacks.
    """
    dense, moe = set(dense), set(moe)
    if dense != moe:
        raise MoEError(
            f"The dense model and the MoE model do not have the same tensors outside of the MLPs: only dense "
            f"{sorted(dense - moe)[:4]}, only MoE {sorted(moe - dense)[:4]}."
        )


def outside_mlps(tensors: Mapping[str, torch.Tensor], sites: Sequence[MLPSite], prefix: str) -> dict:
    """The entries of a dense model's state dict, or of any mapping by its names, outside of the MLPs at `sites`."""
    replaced = []
    for site in sites:
        holder = f"{prefix}{site.layer}." + (f"{site.attribute}." if site.attribute else "")
        names = [""] if site.attribute else [f"{n}." for n in (site.gate, site.up, site.down, site.activation) if n]
        replaced += [holder + name for name in names]
    return {name: value for name, value in tensors.items() if not name.startswith(tuple(replaced))}
