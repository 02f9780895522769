"""What is decided before a number is made: method, configuration, the MLPs that become experts, the MoE without numbers.

`upcycle`, `upcycle_checkpoint` and `plan_upcycling` begin with `prepare`; they differ in how a source is opened.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite, find_mlp_sites
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.upcycling.fill import outside_mlps
from moe_hf.upcycling.initialisers import Initialiser, make_initialiser
from moe_hf.upcycling.initialisers.mix import check_same_family, check_same_tensors, check_same_vocabulary
from moe_hf.upcycling.method import UpcyclingMethod
from moe_hf.upcycling.router_init import RouterInit, make_router_init


Source = PreTrainedModel | str | os.PathLike


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
    num_experts: int,
    num_experts_per_tok: int,
    init: str | Initialiser,
    router_init: str | RouterInit,
    noise: float,
    shared_share: float,
    seed: int,
    config_fields: dict,
) -> Preparation:
    """Check all that can be checked without numbers.

    Args:
        source (`PreTrainedModel`, `str` or `os.PathLike`): the dense model that is upcycled.
        open_source (`Callable`): gives the name and the model, on any device, of `source`, and of each of the checkpoints
            that `init` takes experts from.
        num_experts, num_experts_per_tok, init, router_init, noise, shared_share, seed, config_fields: of `upcycle`.

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
    config = moe_config(dense, num_experts, num_experts_per_tok, config_fields)
    method = method.settled(config)
    method.check(config, dense.dtype)
    models = [dense]
    for given in getattr(method.init, "sources", ()):
        other, model = open_source(given)
        check_source(dense, name, model, other, config)
        models.append(model)
    sites = [sites_of_experts(model, config) for model in models]
    widths = [tuple(site.intermediate_size for site in layer) for layer in zip(*sites, strict=True)]
    method.set_width(config, sites[0], widths)
    config.dtype = dense.dtype
    with torch.device("meta"):
        moe = MoEForCausalLM._from_config(config)
    moe.generation_config = copy.deepcopy(dense.generation_config)
    return Preparation(name, method, config, models, sites, moe)


def moe_config(model: PreTrainedModel, num_experts: int, num_experts_per_tok: int, fields: dict) -> MoEConfig:
    """The configuration of a MoE made from a dense model.

    Raises:
        MoEError: for a model that is not transformers' own, or fields that are not valid.
    """
    if type(model).__module__.split(".")[0] != "transformers":
        raise MoEError(
            f"{type(model).__name__} is defined outside of transformers (remote code); only its own decoders can be "
            "turned into experts."
        )
    text_config = copy.deepcopy(model.config)
    text_config.name_or_path = ""
    config = MoEConfig(
        text_config=text_config, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok, **fields
    )
    config._attn_implementation = model.config._attn_implementation
    return config


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
