"""How far experts have moved since they were made from a dense model.

Letters: E experts.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.modeling.dense_mlp import MLPSite, activation_of, holder_of
from moe_hf.unwrapping import whole_model
from moe_hf.upcycling.expected_weight import recorded_weight
from moe_hf.upcycling.initialisers.mix import Mix
from moe_hf.upcycling.method import LayerStates, UpcyclingMethod
from moe_hf.upcycling.prepare import sites_of_experts
from moe_hf.upcycling.recipes import BlockTensor, DensePiece, block_tensors, dense_pieces, slot_rows


@torch.no_grad()
def drift_from_origin(model: PreTrainedModel, origin: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    """The distance of each expert from how it was made: |W - W0| / |W0| over all its weights, by MoE layer (E,) float64.

    W0 is what the recorded method makes of `origin` for this expert, its neurons, scale and noise included; so 0 is an expert
    that never trained, in the dtype of `model`.

    Args:
        model (`PreTrainedModel`): of this package, with `config.upcycling` of [`upcycle`].
        origin (`PreTrainedModel`): the dense model that it was upcycled from.

    Raises:
        MoEError: the model does not say how it was made, or by what cannot be made again from `origin` alone (other dense
            models, the user's tokens, surgery), or `origin` has other MLPs.
    """
    model, origin = whole_model(model, "The drift of experts"), whole_model(origin, "The drift of experts")
    config = model.config
    facts = getattr(config, "upcycling", None)
    if not facts or "init" not in facts:
        raise MoEError(
            f"{type(model).__name__} does not record how it was upcycled (config.upcycling), so there is no dense origin to "
            "measure the drift from: leave origin out."
        )
    method = UpcyclingMethod.from_dict(facts)
    reasons = {
        "its experts were changed by surgery": "surgery" in facts,
        "its experts come from several dense models": isinstance(method.init, Mix),
        "its experts were cut by what the MLPs did on the user's tokens": method.init.needs_inputs(config),
    }
    for reason, holds in reasons.items():
        if holds:
            raise MoEError(
                f"The experts' start cannot be made again from the dense origin: {reason}. Leave origin out."
            )
    sites = sites_of_experts(origin, config)
    made_from, given = ([_shape_of(site) for site in of] for of in (model.base_model._moe_sites, sites))
    if made_from != given:
        raise MoEError(
            f"The origin ({type(origin).__name__}) does not have the MLPs that the experts were made from: it is not the dense "
            "model that was upcycled."
        )
    return tuple(_layer_drift(origin, model, site, method) for site in sites)


def _shape_of(site: MLPSite) -> tuple[str, int, int, bool]:
    return site.block, site.hidden_size, site.intermediate_size, site.has_bias


def _layer_drift(
    origin: PreTrainedModel, model: PreTrainedModel, site: MLPSite, method: UpcyclingMethod
) -> torch.Tensor:
    holder, config = holder_of(origin.base_model, site), model.config
    block: nn.Module = model.base_model.get_submodule(site.block)
    pieces = {name: DensePiece(tensor) for name, tensor in dense_pieces(holder, site).items()}
    recipes, _ = method.recipes(
        site,
        config,
        lambda piece, source=0: pieces[piece].tensor,
        hidden_states=LayerStates(expected_weight=recorded_weight(config, site.layer_index)),
        act_fn=activation_of(holder, site),
    )
    distance, size = (torch.zeros(len(recipes), dtype=torch.float64) for _ in range(2))
    place = {id(recipe): expert for expert, recipe in enumerate(recipes)}
    for name, tensor in block_tensors(recipes, None, config, site).items():
        target = block.get_parameter(name)
        _add_distances(target.detach(), tensor, pieces, place, distance, size)
    return (distance / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def _add_distances(
    target: torch.Tensor,
    tensor: BlockTensor,
    pieces: Mapping[str, DensePiece],
    place: Mapping[int, int],
    distance: torch.Tensor,
    size: torch.Tensor,
) -> None:
    flat = target.view(-1) if tensor.is_bias else target.view(-1, target.shape[-1])
    for slot in tensor.slots:
        start, expert = slot.start, place[id(slot.recipe)]
        for rows in slot_rows(slot, pieces[slot.piece], target.dtype):
            now = flat[start : start + len(rows)].double().cpu()
            first = rows.double().cpu()
            distance[expert] += (now - first).square().sum()
            size[expert] += first.square().sum()
            start += len(rows)
