"""Models of other libraries' classes ask before they are saved whether anything that trains would be lost."""

from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from moe_hf.modeling.modeling_moe import MoEPreTrainedModel
from moe_hf.unwrapping import with_inside


def guard_saving(model: nn.Module) -> None:
    """Let `save_pretrained` and `push_to_hub` of `model`, in place, refuse what they would lose.

    This package's own classes ask by themselves (`MoEPreTrainedModel.save_check`).
    """
    for module in with_inside(model):
        if isinstance(module, MoEPreTrainedModel):
            continue
        for name in ("save_pretrained", "push_to_hub"):
            if hasattr(type(module), name):
                # Picklable, and copied along with the model.
                setattr(module, name, partial(_checked, module, name))


def _checked(model: nn.Module, method: str, *args: Any, **kwargs: Any):
    # Named, not imported: what is asked knows the modules that set the guard.
    import_module("moe_hf.finetuning.model_to_save").check_save(model)
    return getattr(type(model), method)(model, *args, **kwargs)
