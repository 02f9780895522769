"""Fewer layers: the student of a distillation starts as its teacher without some of them.

Letters: L decoder layers.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from moe_hf.errors import MoEError
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.unwrapping import whole_model
from moe_hf.upcycling.verification import EXACT_TOLERANCE, relative_error, verify


def drop_layers(
    model: MoEForCausalLM,
    layers: int | Sequence[int],
    *,
    data: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> MoEForCausalLM:
    """A model without some of the decoder layers, which computes what `model` does when they are skipped.

    Args:
        model (`MoEForCausalLM`): not changed.
        layers (`int` or `Sequence[int]`): indices to leave out, or how many: they are then spread evenly, and the first and
            the last layer stay.
        data, tokenizer: text to measure the loss on before and after, and what reads it; see [`verify`].

    Returns:
        `MoEForCausalLM` in evaluation mode, in the dtype and on the device of `model`.

    Raises:
        MoEError: layers that do not exist, too many, no MoE layer left, or a family whose layers depend on their place
            in a way that its config does not list; the result is compared with skipping the layers.

    Source: Mixture-of-Students, DeepSpeed-MoE section 4.3 (https://huggingface.co/papers/2201.05596).
    """
    model = whole_model(model, "Dropping layers")
    if not isinstance(model, MoEForCausalLM):
        raise MoEError(f"The model is a {type(model).__name__}; it must be a MoEForCausalLM of moe_hf.")
    container = _layer_container(model)
    total = len(model.base_model.get_submodule(container))
    dropped = _checked(layers, total)
    kept = [i for i in range(total) if i not in dropped]
    config = _config_without(model, kept, total)
    new = MoEForCausalLM._from_config(config).to(model.device).eval()
    _copy_weights(model, new, f"{model.base_model_prefix}.{container}.", kept)
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    error = _error_against_skipping(model, new, container, dropped)
    if error > EXACT_TOLERANCE:
        raise MoEError(
            f"Without layers {dropped} the logits differ by {error:.1e} (relative) from skipping them: the layers of this "
            "family depend on their number. Drop others."
        )
    step = {"operation": "drop_layers", "layers": dropped, "num_hidden_layers": [total, len(kept)]}
    step["verification"] = verify(model, new, data=data, tokenizer=tokenizer).to_dict()
    recorded = copy.deepcopy(model.config.upcycling) or {}
    if "expected_weight" in recorded:
        recorded["expected_weight"] = [recorded["expected_weight"][i] for i in kept]
    config.upcycling = recorded | {"surgery": [*recorded.get("surgery", []), step]}
    return new


def spread_evenly(count: int, total: int) -> list[int]:
    """`count` of the inner indices of `total` layers, as far from each other and from both ends as they can be."""
    return [round((i + 1) * (total - 1) / (count + 1)) for i in range(count)]


def _checked(layers: int | Sequence[int], total: int) -> list[int]:
    if isinstance(layers, int):
        if not 1 <= layers <= total - 2:
            raise MoEError(f"{layers} of {total} layers cannot be dropped: 1 to {total - 2} can, the ends stay.")
        return spread_evenly(layers, total)
    dropped = sorted(set(layers))
    if not dropped or any(not 0 <= i < total for i in dropped) or len(dropped) == total:
        raise MoEError(f"layers is {list(layers)}; name some of 0 to {total - 1}, not all.")
    return dropped


def _layer_container(model: MoEForCausalLM) -> str:
    """The path of the list of decoder layers in the base model, such as `layers`."""
    return model.base_model._moe_sites[0].layer.rpartition(".")[0]


def _config_without(model: MoEForCausalLM, kept: list[int], total: int):
    config = copy.deepcopy(model.config)
    is_moe = [config.is_moe_layer(i) for i in kept]
    if not any(is_moe):
        raise MoEError(f"Layers {kept} would be left, and none of them has experts.")
    _shorten(config.text_config, kept, total)
    config.first_k_dense_replace, config.decoder_sparse_step = 0, 1
    config.mlp_only_layers = [new for new, moe in enumerate(is_moe) if not moe]
    if config.num_experts_per_layer is not None:
        config.num_experts_per_layer = [config.num_experts_per_layer[i] for i in kept]
        config.num_experts = max(config.num_experts_per_layer)
    config.dtype = model.dtype
    return config


def _shorten(config: PreTrainedConfig, kept: list[int], total: int) -> None:
    """Let lists with one entry per layer, such as `layer_types`, lose those of the dropped ones."""
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == total}
    config.num_hidden_layers = len(kept)
    for name, value in lists.items():
        setattr(config, name, [value[i] for i in kept])


@torch.no_grad()
def _copy_weights(model: nn.Module, new: nn.Module, prefix: str, kept: list[int]) -> None:
    own = model.state_dict()
    for name, tensor in new.state_dict(keep_vars=True).items():
        place = re.match(rf"{re.escape(prefix)}(\d+)\.", name)
        if place:
            name = f"{prefix}{kept[int(place[1])]}.{name[place.end() :]}"
        tensor.data = own[name].clone()
    new.tie_weights()


@torch.no_grad()
def _error_against_skipping(model: nn.Module, new: nn.Module, container: str, dropped: list[int]) -> float:
    vocab_size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocab_size, (2, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    layers = model.base_model.get_submodule(container)
    training = model.training
    model.eval()
    try:
        with _skipped([layers[i] for i in dropped]):
            expected = model(ids, use_cache=False).logits
    finally:
        model.train(training)
    return relative_error(new(ids, use_cache=False).logits, expected)


@contextmanager
def _skipped(layers: list[nn.Module]) -> Iterator[None]:
    handles = [layer.register_forward_hook(_pass_on, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_on(layer: nn.Module, args: tuple, kwargs: dict, output):
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states
