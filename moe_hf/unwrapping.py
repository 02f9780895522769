"""The model of transformers in what a user has in hand: compiled, parallel, prepared by Accelerate, or wrapped by PEFT.

Every function that takes a model begins here, so that all of them take the same things, and refuse the rest in one sentence.
"""

import copy
import os
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.kernels import is_replaced, stored_experts_forward


def transformer_of(model: nn.Module) -> nn.Module:
    """What is inside `model`'s wrappers, whatever they have made of its parameters: to put hooks on, not to read weights."""
    *_, innermost = with_inside(model)
    return innermost


def with_inside(model: nn.Module) -> Iterator[nn.Module]:
    """`model`, and what is inside each of its wrappers, from the outside in."""
    while model is not None:
        yield model
        model = _inside(model)


def unwrapped(model: Any, *, or_path: bool = False, changes_parameters: bool = False, keep_peft: bool = False) -> Any:
    """The model of transformers inside what wraps it; the adapters of a PeftModel stay in their places in it.

    Takes off `torch.compile`, `DataParallel`, `DistributedDataParallel`, DeepSpeed's engine, and PEFT, in any order. What
    Accelerate prepared and FSDP2 sharded is the model itself.

    Args:
        model (`Any`): what the user gave.
        or_path (`bool`): a `str` or a path is given back as it is; anything else must be a model of transformers, which such
            a caller would take for a path otherwise.
        changes_parameters (`bool`): the caller adds, removes or freezes parameters, which DistributedDataParallel and
            DeepSpeed have taken hold of.
        keep_peft (`bool`): a PeftModel is given back as it is, to be saved with its adapters.

    Raises:
        MoEError: there is no plain model inside: FSDP1 has made its parameters flat, a prompt of PEFT is beside the model, a
            part of it was compiled apart; or it is no model at all.
    """
    if or_path and isinstance(model, str | os.PathLike):
        return model
    if not isinstance(model, nn.Module):
        path = ", or its folder or Hub id" if or_path else ""
        raise MoEError(f"{model!r:.80} of type {type(model).__name__} was given: give the model itself{path}.")
    while (inside := _inside(model)) is not None and not (keep_peft and is_peft_model(model)):
        if changes_parameters and _holds_parameters(model):
            raise MoEError(
                f"The model is wrapped in {type(model).__name__} already, which has decided which gradients it waits for. "
                "Do this before it is wrapped."
            )
        if _is_prompt(model):
            raise MoEError(
                f"The {type(model).__name__} puts a prompt before the text, which is no part of the model inside: give "
                "its get_base_model(), without the prompt."
            )
        if isinstance(model, FullyShardedDataParallel):
            break
        model = inside
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise MoEError(
                f"{name or 'The model'} is wrapped in FSDP1, which has made its parameters flat: use FSDP2, give the "
                "model before it is wrapped, or load a saved copy of it."
            )
        if _is_compiled(module):
            raise MoEError(
                f"{name} was compiled apart, which changes the names of its weights: compile it in place, with "
                "module.compile() instead of torch.compile(module)."
            )
    if or_path and not isinstance(model, PreTrainedModel):
        raise MoEError(
            f"A {type(model).__name__} was given, which is no model of transformers: give one, or its folder."
        )
    return model


def whole_model(model: Any, purpose: str, *, or_path: bool = False) -> Any:
    """[`unwrapped`], of a model that its own parameters describe: without adapters, chosen experts or shards.

    Args:
        purpose (`str`): what the caller does with the weights, as the subject of a sentence: `"Upcycling"`.

    Raises:
        MoEError: something of it would be lost; names the call that keeps it.
    """
    model = unwrapped(model, or_path=or_path)
    if not isinstance(model, nn.Module):
        return model
    if has_peft_layers(model):
        raise MoEError(
            f"{purpose} takes the model's own weights, and would lose the adapters of PEFT in it: call "
            "merge_and_unload() of the PeftModel first, and give what it returns. (Adapters that add_adapter put in place: "
            "save_pretrained writes them, and PeftModel.from_pretrained loads them onto the base model.)"
        )
    for name, module in model.named_modules():
        if is_replaced(module) and module._experts_function is not stored_experts_forward:
            raise MoEError(
                f"{purpose} takes the model's own weights, and {name} has adapters or chosen experts beside them: call "
                "merge_expert_lora(model, unload=True) or merge_selected_experts(model) first."
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise MoEError(f"{name} is spread over processes: load the whole model on one device first.")
    return in_own_precision(model)


def in_own_precision(model: Any) -> Any:
    """`model` without the mixed precision that Accelerate's `prepare` sets on the object: same weights, its own arithmetic.

    The model that was given stays as it is. A path is given back as it is.
    """
    if "_original_forward" not in getattr(model, "__dict__", ()):
        return model
    model = copy.copy(model)
    del vars(model)["forward"], vars(model)["_original_forward"]
    return model


def is_peft_model(model: nn.Module) -> bool:
    """Whether PEFT is wrapped around `model`; adapters that are in place without a wrapper are found by `has_peft_layers`."""
    return _is(model, "peft.peft_model", "PeftModel")


def path_of(source: Any, instead: str) -> str | os.PathLike:
    """`source`, a folder or a Hub id; a model is refused.

    Args:
        instead (`str`): what to do with a model, as the end of a sentence.

    Raises:
        MoEError: it is something else.
    """
    if not isinstance(source, str | os.PathLike):
        raise MoEError(f"A {type(source).__name__} was given where a folder or a Hub id is read: {instead}.")
    return source


def has_peft_layers(model: nn.Module) -> bool:
    """Whether PEFT has put layers of its own into `model`: adapters, or copies of modules that train (`modules_to_save`)."""
    return any(
        _is(module, "peft.tuners.tuners_utils", "BaseTunerLayer")
        or _is(module, "peft.utils.other", "AuxiliaryTrainingWrapper")
        for module in model.modules()
    )


def _inside(model: nn.Module) -> nn.Module | None:
    """What `model` wraps, or None if it is no wrapper."""
    # Accelerate's compiled regions keep the model beside their modules, torch.compile among them.
    if (compiled := vars(model).get("_orig_mod")) is not None:
        return compiled
    if _is_compiled(model):
        return model._orig_mod
    if isinstance(model, DataParallel | FullyShardedDataParallel) or _holds_parameters(model):
        return model.module
    if _is_prompt(model):
        return model.base_model
    is_peft = is_peft_model(model) or _is(model, "peft.mixed_model", "PeftMixedModel")
    return model.base_model.model if is_peft else None


def _is_compiled(model: nn.Module) -> bool:
    return _is(model, "torch._dynamo.eval_frame", "OptimizedModule")


def _is_prompt(model: nn.Module) -> bool:
    return is_peft_model(model) and model.active_peft_config.is_prompt_learning


def _holds_parameters(model: nn.Module) -> bool:
    return isinstance(model, DistributedDataParallel) or _is(model, "deepspeed", "DeepSpeedEngine")


def _is(model: nn.Module, module: str, name: str) -> bool:
    """Whether `model` is of a class of a module that takes long to import; if nobody imported it, it is not."""
    return module in sys.modules and isinstance(model, getattr(sys.modules[module], name))
