"""A model as a folder that others load: `save_pretrained` where it keeps all that trains, the merged model otherwise."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.utils import logging

from moe_hf.finetuning.expert_lora import lora_adapters, merge_expert_lora, unmerge_expert_lora
from moe_hf.finetuning.trained_tensors import has_peft, inner_model, lost_names, refuse_lost
from moe_hf.unwrapping import is_peft_model


logger = logging.get_logger(__name__)


@contextmanager
def model_to_save(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what `save_pretrained` is to be called on, so that nothing which trains in `model` is lost.

    A model without adapters, and one where adapters of PEFT alone train, is yielded as it is; PEFT then writes its adapters,
    as its users expect. Adapters of experts are merged for the time of the save. Where adapters of PEFT are not all that
    trains, everything is merged into a copy, which takes the memory of the model once more.

    Raises:
        MoEError: something would be lost all the same; it says what, and how it is kept.
    """
    adapters = [adapter for adapter in lora_adapters(inner_model(model)).values() if not adapter.merged]
    lost = lost_names(model) if has_peft(model) or not adapters else []
    if is_peft_model(model) and (lost or adapters):
        yield _merged_copy(model)
        return
    refuse_lost(model, lost)
    if not adapters:
        if has_peft(model) and not inner_model(model).name_or_path:
            logger.warning(
                f"The adapters of PEFT are written without the {type(inner_model(model)).__name__} below them, which was never "
                "saved and has no name: save it too, or nothing can load them. Adapters of a model that was saved and loaded "
                "name it."
            )
        yield model
        return
    merge_expert_lora(model)
    try:
        refuse_lost(model, lost_names(model))
        yield model
    finally:
        unmerge_expert_lora(model)


def _merged_copy(model: nn.Module) -> nn.Module:
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        refuse_lost(model, lost_names(model))
    copied = copy.deepcopy(model)
    if lora_adapters(inner_model(copied)):
        merge_expert_lora(inner_model(copied), unload=True)
    merged = copied.merge_and_unload()
    refuse_lost(merged, lost_names(merged))
    return merged


def check_save(model: nn.Module) -> None:
    """Refuse a plain `save_pretrained` of `model` that would lose what trains.

    Raises:
        MoEError: see [`refuse_lost`].
    """
    refuse_lost(model, lost_names(model))
