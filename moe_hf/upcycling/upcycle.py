"""`upcycle`: a dense causal language model in, a verified MoE model out."""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_hf.modeling.configuration_moe import MoEConfig, MoEError
from moe_hf.modeling.modeling_moe import MoEForCausalLM, MoEPreTrainedModel
from moe_hf.upcycling.fill import copy_shared_weights, fill_blocks
from moe_hf.upcycling.initialisers import Initialiser, make_initialiser
from moe_hf.upcycling.method import UpcyclingMethod
from moe_hf.upcycling.verification import EXACT_TOLERANCE, verify


def upcycle(
    dense: PreTrainedModel | str | Path,
    *,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    init: str | Initialiser = "copy",
    noise: float = 0.0,
    shared_share: float = 0.5,
    seed: int = 0,
    verify_inputs: torch.Tensor | None = None,
    allow_inexact: bool = False,
    **config_fields,
) -> MoEForCausalLM:
    """Turn a dense causal language model into a MoE model that computes the same function, and check that it does.

    Each MLP becomes `num_experts` copies behind a router. Whatever the router chooses, the weights of a token's
    experts sum to 1, so the logits are the dense model's.

    Args:
        dense (`PreTrainedModel`, `str` or `Path`): the model, a folder, or a Hub id. Never changed, nor aliased.
        num_experts (`int`): E, experts per layer.
        num_experts_per_tok (`int`): K, experts per token. K = 1 cannot be exact: the weight of one expert is below 1.
        init (`str` or `Initialiser`): how the experts start; a name of `INITIALISERS`, or an instance with options.
        noise (`float`): relative Gaussian noise on each expert, in standard deviations of each projection; makes the
            model differ from the dense one by design, and the difference is measured.
        shared_share (`float`): share of the output that a shared expert as wide as the dense MLP starts with.
        seed (`int`): of all random numbers, and of the tokens of the check.
        verify_inputs (`torch.Tensor`, *optional*): token ids (B, S) to check on, besides 2 x 64 random ones.
        allow_inexact (`bool`): accept a model that is not the dense one's equal; the measured error is stored.
        **config_fields: further fields of [`MoEConfig`].

    Returns:
        `MoEForCausalLM` in the dense model's dtype, on its device, in evaluation mode;
        `model.config.upcycling` records the source, the method and the measured error.

    Raises:
        MoEError: for a source that is no dense decoder, or a result that should be exact and is not.
    """
    method = UpcyclingMethod(init=make_initialiser(init), noise=noise, shared_share=shared_share, seed=seed)
    source, model = _load_dense(dense)
    config = _moe_config(model, num_experts, num_experts_per_tok, config_fields)
    method.check(config, model.dtype)
    with torch.device("meta"):
        # On the meta device first: a mistake in the fields costs nothing.
        MoEForCausalLM(copy.deepcopy(config))
    config.dtype = model.dtype
    moe = MoEForCausalLM._from_config(config).to(model.device).eval()
    sites = moe.base_model._moe_sites
    prefix = f"{moe.base_model_prefix}."
    copy_shared_weights(model, moe, sites, prefix)
    fill_blocks(model.base_model, moe.base_model, config, method)
    moe.tie_weights()
    if model.can_generate():
        moe.generation_config = copy.deepcopy(model.generation_config)
    result = verify(model, moe, verify_inputs, seed=seed)
    config.upcycling = {"source": source, **method.to_dict(), "verification": result.to_dict()}
    if method.exact and not allow_inexact and not result.exact:
        raise MoEError(_inexact_message(config, result.relative_error, result.first_difference))
    return moe


def _load_dense(dense: PreTrainedModel | str | Path) -> tuple[str, PreTrainedModel]:
    if isinstance(dense, PreTrainedModel):
        if isinstance(dense, MoEPreTrainedModel):
            raise MoEError(f"The source is a {type(dense).__name__}, which already has experts; give a dense model.")
        if not dense.can_generate():
            raise MoEError(
                f"The source is a {type(dense).__name__}, which has no language-modelling head: load it with "
                "AutoModelForCausalLM."
            )
        return dense.name_or_path or type(dense).__name__, dense
    name = str(dense)
    looks_like_path = isinstance(dense, Path) or name.startswith((".", "/", "~"))
    if looks_like_path and not Path(name).expanduser().is_dir():
        raise MoEError(f"{name} is not a folder; give a folder that save_pretrained wrote, or a Hub id.")
    if Path(name).expanduser().is_dir():
        from moe_hf.saving import check_shard_index

        name = str(Path(name).expanduser())
        check_shard_index(name)
    config = AutoConfig.from_pretrained(name)
    if isinstance(config, MoEConfig):
        raise MoEError(f"{name} is a moe_hf model already; give a dense model.")
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return str(dense), model


def _moe_config(model: PreTrainedModel, num_experts: int, num_experts_per_tok: int, fields: dict) -> MoEConfig:
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


def _inexact_message(config: MoEConfig, error: float, layer: str | None) -> str:
    if not config.norm_topk_prob or config.routed_scaling_factor != 1:
        reason = (
            f"num_experts_per_tok={config.num_experts_per_tok}, norm_topk_prob={config.norm_topk_prob} and "
            f"routed_scaling_factor={config.routed_scaling_factor} do not give weights that sum to 1, so the experts' "
            "mixture cannot equal the dense MLP"
        )
    else:
        reason = f"the first layer that differs is {layer}"
    return (
        f"The MoE model's logits differ from the dense model's by {error:.2e} (relative), allowed {EXACT_TOLERANCE:.0e}: "
        f"{reason}. Pass allow_inexact=True to accept that; the measured error is then stored in the config."
    )
