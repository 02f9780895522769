"""What trains is what is kept: the one description of it, which every way to keep a model asks.

Names are those of the model itself, without what `PeftModel` puts before them. PEFT's own files are described by what
`get_peft_model_state_dict` returns: the parameters themselves, under other names.
"""

import copy
from collections.abc import Collection
from functools import lru_cache

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_lora import CHILD as LORA_CHILD
from moe_hf.finetuning.expert_lora import lora_adapters
from moe_hf.finetuning.lora_sharding import is_sharded, local
from moe_hf.finetuning.moe_blocks import CORRECTION_BIAS, whole_shape
from moe_hf.finetuning.peft_files import PREFIX as PEFT_PREFIX
from moe_hf.finetuning.selected_experts import CHILD as SELECTED_CHILD
from moe_hf.finetuning.selected_experts import selected_modules
from moe_hf.unwrapping import is_peft_model


# Where PEFT keeps the tokens of prompt tuning and its relatives, whose files hold them in another form.
PROMPT_ENCODER = "prompt_encoder."


def inner_model(model: nn.Module) -> nn.Module:
    """The model of transformers in a `PeftModel`, or `model` itself."""
    return model.get_base_model() if is_peft_model(model) else model


def has_peft(model: nn.Module) -> bool:
    """Whether `model` has adapters of PEFT, wrapped around it or put in place by `add_adapter`."""
    return is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and lasting buffers by name; a tensor with two names has the first."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        lasting = set(module._buffers) - module._non_persistent_buffers_set
        own = {name: buffer for name, buffer in module._buffers.items() if name in lasting and buffer is not None}
        tensors |= {f"{prefix}.{name}" if prefix else name: buffer for name, buffer in own.items()}
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes in `model`, and what a copy of its base would not have, by name.

    These are the parameters that require gradients; adapters, also while they are frozen, but not those of experts that are
    merged, which are in the weights; and what is learned without gradients: correction biases, and lasting buffers of
    modules that train.
    """
    merged = tuple(
        f"{name}.experts.{LORA_CHILD}." for name, a in lora_adapters(inner_model(model)).items() if a.merged
    )
    adapters = written_by_peft(model) if has_peft(model) else frozenset()
    learning = {name.removeprefix(PEFT_PREFIX) for name, module in model.named_modules() if _learns_unseen(module)}
    return {
        name: tensor
        for name, tensor in named_tensors(model).items()
        if not (merged and name.startswith(merged))
        and (
            tensor.requires_grad
            or f".experts.{LORA_CHILD}." in name
            or name in adapters
            or (_is_no_weight(name, tensor) and name.rpartition(".")[0] in learning)
        )
    }


def _is_no_weight(name: str, tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter) or name.endswith(CORRECTION_BIAS)


def _learns_unseen(module: nn.Module) -> bool:
    """Whether the buffers and the correction bias of `module` move in training: a frozen router keeps them."""
    own = list(module.parameters(recurse=False))
    # Where the bias is alone in its module, counts of choices say that somebody moves it.
    alone = "step_counts" in vars(module) and not hasattr(module, "weight")
    return alone or any(parameter.requires_grad for parameter in own)


def _identity(tensor: torch.Tensor) -> tuple:
    return local(tensor).data_ptr(), whole_shape(tensor)


def names_in_peft_files(model: nn.Module) -> dict[str, dict[str, str]]:
    """For each adapter of PEFT, by its name: which tensor of `model` each entry of its file is."""
    # It takes long to import, and a model that comes here has it already.
    from peft import get_peft_model_state_dict

    places = {_identity(tensor): name for name, tensor in named_tensors(model).items() if local(tensor).numel()}
    files = {}
    for adapter in model.peft_config:
        entries = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        found = {entry: places.get(_identity(tensor)) for entry, tensor in entries.items()}
        files[adapter] = {entry: name for entry, name in found.items() if name is not None}
    return files


def written_by_peft(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that PEFT's own files hold."""
    names = {name for entries in names_in_peft_files(model).values() for name in entries.values()}
    return frozenset(names | {name for name in named_tensors(model) if name.startswith(PROMPT_ENCODER)})


def plain_class(model: nn.Module) -> type:
    """The class of a model without what `fully_shard` adds to it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def names_that_load(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Names and shapes that `from_pretrained` looks for: those of a new model of the same class and configuration."""
    return _shapes_of(plain_class(model), _Config(model.config))


class _Config:
    """A configuration that can be a key: equal where its JSON is."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config, self.json = config, config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self.json == other.json

    def __hash__(self) -> int:
        return hash(self.json)


@lru_cache(maxsize=16)
def _shapes_of(cls: type, config: _Config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = cls(copy.deepcopy(config.config))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def lost_names(model: nn.Module) -> list[str]:
    """Names of what trains in `model` and would be lost by `save_pretrained` and a later load; [] is as it should be."""
    trained = trained_tensors(model)
    if has_peft(model):
        return sorted(trained.keys() - written_by_peft(model))
    if not isinstance(model, PreTrainedModel) or is_sharded(model):
        # Not transformers' business, or gathered under the names that each process has a part of.
        return []
    shapes = names_that_load(model)
    chosen = tuple(f"{name}.{SELECTED_CHILD}." for name in selected_modules(model))
    # Chosen experts are written in the places that they came from.
    return sorted(
        name
        for name, tensor in trained.items()
        if not name.startswith(chosen or "\0") and shapes.get(name) != whole_shape(tensor)
    )


def refuse_lost(model: nn.Module, names: Collection[str]) -> None:
    """Refuse to keep `model` in a form that would lose `names`.

    Raises:
        MoEError: there are such names; it says which, and how they are kept.
    """
    if not names:
        return
    shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    remedy = "moe_hf.save_trained(model, folder) keeps all that trains, and moe_hf.load_trained brings it back"
    if lora_adapters(inner_model(model)):
        remedy += "; moe_hf.hub.save_model writes the merged model, as merge_expert_lora(model) makes it"
    raise MoEError(
        f"Not saved: {shown} of {type(inner_model(model)).__name__} would be lost, since what is written this way does "
        f"not hold them or from_pretrained does not load them. {remedy}; MoETrainer's checkpoints hold it too."
    )
