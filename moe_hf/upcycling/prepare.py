"""What is decided before a number is made: method, configuration, the MLPs that become experts, the MoE without numbers.

`upcycle`, `upcycle_checkpoint` and `plan_upcycling` begin with `prepare`; they differ in how a source is opened.
"""

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.modeling.config_fields import field_names, refuse_unknown, sort_fields
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_classes import decoder_class
from moe_hf.modeling.dense_mlp import MLPSite, find_mlp_sites
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.modeling.presets import preset_fields
from moe_hf.upcycling.fill import outside_mlps
from moe_hf.upcycling.initialisers import Initialiser, make_initialiser
from moe_hf.upcycling.initialisers.mix import check_same_family, check_same_tensors, check_same_vocabulary
from moe_hf.upcycling.method import UpcyclingMethod
from moe_hf.upcycling.router_init import RouterInit, ZeroRouter, make_router_init


Source = PreTrainedModel | str | os.PathLike
# Arguments of `upcycle` that are no fields of a configuration.
# fmt: off
ARGUMENTS = {
    "preset", "init", "router_init", "noise", "shared_share", "seed", "inputs", "tokenizer", "data", "verify_inputs",
    "allow_inexact",
}
# What a MoE may have otherwise than its dense model: labels, what a forward pass returns, what computes the experts.
FREE = {
    "id2label", "label2id", "num_labels", "problem_type", "output_hidden_states", "return_dict", "experts_implementation",
    "tie_last_hidden_states",
}
WRITTEN = {
    "text_config", "upcycling", "format_version", "model_type", "architectures", "auto_map", "name_or_path", "_name_or_path",
    "transformers_version",
}
# fmt: on


@dataclass(frozen=True)
class Preparation:
    """A conversion that is checked and not begun.

    Attributes:
        source: name of the dense model that is upcycled.
        method: how, with what was left to the configuration written out.
        config: of the MoE, with the experts' width set.
        models: the dense models, the one that is upcycled first.
        sites: for each of them, the MLPs that become experts.
        moe: on the meta device.
    """

    source: str
    method: UpcyclingMethod
    config: MoEConfig
    models: list[PreTrainedModel]
    sites: list[list[MLPSite]]
    moe: MoEForCausalLM


def prepare(
    source: Source,
    open_source: Callable[[Source], tuple[str, PreTrainedModel]],
    *,
    num_experts: int | None,
    num_experts_per_tok: int | None,
    preset: str | None,
    init: str | Initialiser,
    router_init: str | RouterInit,
    noise: float,
    shared_share: float,
    seed: int,
    allow_inexact: bool,
    config_fields: dict,
) -> Preparation:
    """Check all that can be checked without numbers.

    Args:
        source (`PreTrainedModel`, `str` or `os.PathLike`): the dense model that is upcycled.
        open_source (`Callable`): gives the name and the model, on any device, of `source`, and of each of the checkpoints
            that `init` takes experts from.
        num_experts, num_experts_per_tok, preset, init, router_init, noise, shared_share, seed, allow_inexact, config_fields:
            of `upcycle`.

    Raises:
        MoEError: for options that do not fit, with each other or with the dense models.
    """
    method = UpcyclingMethod(
        init=make_initialiser(init),
        router_init=make_router_init(router_init),
        noise=noise,
        shared_share=shared_share,
        seed=seed,
    )
    name, dense = open_source(source)
    counts = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
    fields = {count: value for count, value in counts.items() if value is not None} | config_fields
    config = moe_config(dense, preset, fields)
    method = method.settled(config)
    with _naming_fields(preset, config, fields):
        method.check(config, dense.dtype)
    if isinstance(method.router_init, ZeroRouter) and method.router_init.spreads_ties(config):
        config.router_kwargs["spread_ties"] = True
    models = [dense]
    for given in getattr(method.init, "sources", ()):
        other, model = open_source(given)
        check_source(dense, name, model, other, config)
        models.append(model)
    sites = [sites_of_experts(model, config) for model in models]
    widths = [tuple(site.intermediate_size for site in layer) for layer in zip(*sites, strict=True)]
    with _naming_fields(preset, config, fields):
        method.set_width(config, sites[0], widths)
        reason = method.why_inexact(config, sites[0], dense.dtype)
        if preset is not None and method.exact and not allow_inexact and reason is not None:
            raise MoEError(
                f"The MoE would not compute the dense model's function: {reason}. Give these fields other values, or pass "
                "allow_inexact=True to accept that; the error is then measured and stored in the config."
            )
    config.dtype = dense.dtype
    with torch.device("meta"):
        moe = MoEForCausalLM._from_config(config)
    moe.generation_config = copy.deepcopy(dense.generation_config)
    for field in filter(_is_token_id, config_fields):
        setattr(moe.generation_config, field, config_fields[field])
    return Preparation(name, method, config, models, sites, moe)


def moe_config(model: PreTrainedModel, preset: str | None, fields: dict[str, Any]) -> MoEConfig:
    """The configuration of a MoE made from a dense model, as the preset and the fields say, which win.

    Raises:
        MoEError: for a model that is not transformers' own, or no decoder, or fields that are not valid, not known, or the
            dense model's.
    """
    if type(model).__module__.split(".")[0] != "transformers":
        raise MoEError(
            f"{type(model).__name__} is defined outside of transformers (remote code); only its own decoders can be "
            "turned into experts."
        )
    decoder_class(model.config, MODEL_FOR_CAUSAL_LM_MAPPING)  # refuses what is no decoder
    check_fields(model, fields)
    if preset is None:
        config = MoEConfig(text_config=model.config, **fields)
    else:
        config = MoEConfig.from_preset(preset, model.config, **fields)
    config.text_config.name_or_path = ""
    config._attn_implementation = model.config._attn_implementation
    return config


def check_fields(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Refuse names that nothing knows, and other values for what the MoE has from the dense model.

    Raises:
        MoEError: with the nearest name, or what the dense model says and where it can be changed.
    """
    own, dense = field_names(MoEConfig), model.config
    unknown = sort_fields(fields, own, dense)[2]
    refuse_unknown(unknown, own | ARGUMENTS, dense, "upcycle")
    of_moe = own - field_names(PreTrainedConfig) - WRITTEN | FREE
    for name, value in fields.items():
        if name in WRITTEN:
            raise MoEError(f"upcycle writes {name} itself: leave it out.")
        if name in of_moe or _is_token_id(name):
            continue
        kept = _of_dense(model, name)
        if value != kept and str(value) != str(kept).removeprefix("torch."):
            raise MoEError(
                f"upcycle keeps the dense model's {name}, {kept!r}, and got {value!r}. Set it in the dense model first: "
                f"AutoModelForCausalLM.from_pretrained(..., {name}={value!r}), or config.json of its folder."
            )


def _of_dense(model: PreTrainedModel, name: str) -> Any:
    if name in ("dtype", "torch_dtype"):
        return model.dtype
    try:
        return getattr(model.config, f"_{name}" if name == "attn_implementation" else name, None)
    except RuntimeError:  # a field whose value differs between layers
        return None


def _is_token_id(name: str) -> bool:
    return name.endswith("_token_id")


@contextmanager
def _naming_fields(preset: str | None, config: MoEConfig, given: Mapping[str, Any]) -> Iterator[None]:
    """Say of an error which fields that it is about come from the preset and not from the user."""
    try:
        yield
    except MoEError as error:
        # What norm_topk_prob is follows from the others where it is not given.
        names = () if preset is None else preset_fields(preset, config.text_config, {}).keys() | {"norm_topk_prob"}
        meant = [n for n in sorted(names) if n not in given and re.search(rf"\b{n}\b", str(error))]
        if not meant:
            raise
        fields = ", ".join(f"{name}={getattr(config, name)!r}" for name in meant)
        raise MoEError(f"preset={preset!r} sets {fields}: {error}") from error


def sites_of_experts(model: PreTrainedModel, config: MoEConfig) -> list[MLPSite]:
    """The MLPs of a dense model that become experts."""
    return [site for site in find_mlp_sites(model.base_model) if config.is_moe_layer(site.layer_index)]


def check_source(base: PreTrainedModel, base_name: str, model: PreTrainedModel, name: str, config: MoEConfig) -> None:
    """Refuse a dense model that is not of the base's architecture and vocabulary.

    Raises:
        MoEError: naming what differs.
    """
    sites, shapes = [], []
    for one in (base, model):
        sites.append(sites_of_experts(one, config))
        others = outside_mlps(one.state_dict(), sites[-1], f"{one.base_model_prefix}.")
        shapes.append({key: tuple(tensor.shape) for key, tensor in others.items()})
    check_same_family(base.config, model.config, *sites, name)
    check_same_tensors(*shapes, name)
    check_same_vocabulary(base_name, name)
