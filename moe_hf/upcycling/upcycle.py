"""`upcycle`: a dense causal language model in, a verified MoE model out."""

import copy
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from moe_hf.dense_sources import (
    load_dense,
    plain_model,
    quantized_as,
    read_dense_config,
    tell_quantized,
)
from moe_hf.gguf_files import gguf_file_of
from moe_hf.modeling.configuration_moe import MoEConfig, MoEError
from moe_hf.modeling.dense_mlp import MLPSite
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.unwrapping import whole_model
from moe_hf.upcycling.fill import copy_other_weights, fill_blocks
from moe_hf.upcycling.initialisers import Initialiser
from moe_hf.upcycling.method import UpcyclingMethod
from moe_hf.upcycling.observations import Observations, observe
from moe_hf.upcycling.prepare import Preparation, prepare
from moe_hf.upcycling.probe import RoutingRecorder
from moe_hf.upcycling.router_init import RouterInit
from moe_hf.upcycling.sample_text import SampleText, sample_text, tokenizer_of
from moe_hf.upcycling.sources import check_all_loaded, check_dense_config, check_dense_model, check_dense_weights
from moe_hf.upcycling.verification import EXACT_TOLERANCE, VerificationResult, compare


logger = logging.get_logger(__name__)


def upcycle(
    dense: PreTrainedModel | str | Path,
    *,
    num_experts: int | None = None,
    num_experts_per_tok: int | None = None,
    preset: str | None = None,
    init: str | Initialiser = "copy",
    router_init: str | RouterInit = "normal",
    noise: float = 0.0,
    shared_share: float = 0.5,
    seed: int = 0,
    inputs: torch.Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | Path | None = None,
    verify_inputs: torch.Tensor | None = None,
    allow_inexact: bool = False,
    **config_fields,
) -> MoEForCausalLM:
    """Turn a dense causal language model into a MoE model that computes the same function, and check that it does.

    Each MLP becomes `num_experts` experts behind a router. With `init` copy, permute or granular the logits are the dense
    model's, whatever the router chooses; the others change the function at the start, by an amount that is measured.

    Args:
        dense (`PreTrainedModel`, `str` or `Path`): the model, a folder, a GGUF file, or a Hub id. Never changed, nor aliased. Quantized
            ones are dequantized, see `convert_source`.
        num_experts (`int`, *optional*): E, experts per layer; 8, or the preset's.
        num_experts_per_tok (`int`, *optional*): K, experts per token; 2, or the preset's. K = 1 is exact with a router of
            zeros, `ZeroRouter(noise=0)`; with others the outputs are right on average.
        preset (`str`, *optional*): the MoE of a paper, a name of `MoEConfig.presets()`; fields that are given win over its
            own. One that cannot keep the dense function is refused before anything is made, unless `allow_inexact`.
        init (`str` or `Initialiser`): how the experts start; a name of `INITIALISERS`, or an instance with options.
        router_init (`str` or `RouterInit`): how the routers start; a name of `ROUTER_INITS`, or an instance with options.
        noise (`float`): relative Gaussian noise on each expert, in standard deviations of each projection; makes the
            model differ from the dense one by design, and the difference is measured.
        shared_share (`float`): share of the output that a shared expert as wide as the dense MLP starts with.
        seed (`int`): of all random numbers, and of the tokens of the check.
        inputs (`torch.Tensor`, *optional*): token ids (B, S) of the user's data, without padding, for methods that look
            at what the dense model does on them; their sha256 is recorded.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for methods with prompts, and for text; the source's own when it
            has one.
        data (`str` or `Path`, *optional*): text to measure the loss on before and after: a file, a folder, or a dataset of
            the Hub, of which 4 x 256 tokens or so are taken. `inputs` if not given, or else prose that every Python
            carries; no loss is measured where there is neither a tokenizer nor token ids.
        verify_inputs (`torch.Tensor`, *optional*): token ids (B, S) whose logits are compared, besides 2 x 64 random ones
            and 2 x 64 of the text.
        allow_inexact (`bool`): accept a model that is not the dense one's equal; the measured error is told and stored.
        **config_fields: further fields of [`MoEConfig`], and ids of special tokens. Other dense fields are the dense model's.

    Returns:
        `MoEForCausalLM` in the dense model's dtype, on its device, in evaluation mode;
        `model.config.upcycling` records the source, the method, the measured error, the loss on text before and after, and
        what the routers do on that text.

    Raises:
        MoEError: for a source that is no dense decoder, a name that is no field, a field that is the dense model's, or a
            result that should be exact and is not.
    """
    dense = whole_model(dense, "Upcycling", or_path=True)
    if isinstance(dense, PreTrainedModel):
        dense, how = plain_model(dense, dense.name_or_path or type(dense).__name__)
    else:
        how = quantized_as(dense)
    ready = prepare(
        dense,
        _load_dense,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        preset=preset,
        init=init,
        router_init=router_init,
        noise=noise,
        shared_share=shared_share,
        seed=seed,
        allow_inexact=allow_inexact,
        config_fields=config_fields,
    )
    method, config, model, sites = ready.method, ready.config, ready.models[0], ready.sites

    @cache
    def find_tokenizer() -> PreTrainedTokenizerBase | None:
        return tokenizer or tokenizer_of(dense)

    @cache
    def text() -> SampleText | None:
        return sample_text(model.config, find_tokenizer, inputs=inputs)

    # Before the work begins, since data may not be there.
    checked = text() if data is None else sample_text(model.config, find_tokenizer, data)
    seen = observe(method, config, lambda: model, sites[0], inputs, find_tokenizer, text)
    moe = _filled(ready, seen)
    config.upcycling = {
        **source_facts(ready.source, how),
        **revision_of(model.config),
        **method.to_dict(),
        **seen.facts,
    }
    check_result(model, moe, config, moe.dtype, method, sites[0], verify_inputs, checked, allow_inexact)
    return moe


def _filled(ready: Preparation, seen: Observations) -> MoEForCausalLM:
    """The MoE with its weights, on the device of the dense model."""
    method, config, models, sites = ready.method, ready.config, ready.models, ready.sites
    moe = MoEForCausalLM._from_config(config).to(models[0].device).eval()
    averaged = method.init.averaged(config)
    copy_other_weights(
        [models[index] for index in averaged], [sites[index] for index in averaged], moe, f"{moe.base_model_prefix}."
    )
    fill_blocks([model.base_model for model in models], sites, moe.base_model, config, method, seen.layers)
    moe.tie_weights()
    moe.generation_config = copy.deepcopy(ready.moe.generation_config)
    return moe


def source_facts(source: str, quantized: str | None) -> dict[str, str]:
    """Where the dense weights came from, for the metadata, and how they were quantized if they were."""
    return {"source": source} | ({"quantized_as": quantized} if quantized is not None else {})


def revision_of(config: PreTrainedConfig) -> dict[str, str]:
    """The commit of the Hub that a configuration was loaded from, for the metadata; empty for a folder."""
    commit = getattr(config, "_commit_hash", None)
    return {"revision": commit} if commit else {}


def check_result(
    dense: PreTrainedModel | str | Path,
    moe: PreTrainedModel | str | Path,
    config: MoEConfig,
    dtype: torch.dtype,
    method: UpcyclingMethod,
    sites: Sequence[MLPSite],
    verify_inputs: torch.Tensor | None,
    text: SampleText | None,
    allow_inexact: bool,
) -> None:
    """Run the dense model and the MoE made from it, record in `config.upcycling` what differs and what the routers do.

    `dtype` is the weights': saving a configuration leaves a name in the place of its own. Warns, in the log and in the
    record, of a loss on text that rose far, and of routers that are saturated or reach no token for some expert.

    Raises:
        MoEError: when the method is exact and the result is not.
    """
    recorder = RoutingRecorder(is_text=text is not None or verify_inputs is not None)
    result = compare(dense, moe, verify_inputs, text, seed=method.seed, observe=recorder.watch)
    routing = recorder.result()
    config.upcycling |= {"verification": result.to_dict(), "routing": routing.to_dict()}
    reason = method.why_inexact(config, sites, dtype)
    warnings = []
    if method.exact and not result.exact:
        message = _inexact_message(result, reason)
        if not allow_inexact:
            raise MoEError(
                f"{message} Pass allow_inexact=True to accept that; the measured error is then stored in the config."
            )
        warnings.append(message)
    if result.loss_warning:
        warnings.append(f"{result.loss_warning} {method.cost_at_start(config, reason)}")
    warnings += routing.warnings()
    if warnings:
        config.upcycling["warnings"] = warnings
    for message in warnings:
        logger.warning(message)


def _load_dense(dense: PreTrainedModel | str | os.PathLike) -> tuple[str, PreTrainedModel]:
    dense = whole_model(dense, "Upcycling", or_path=True)
    if isinstance(dense, PreTrainedModel):
        name = dense.name_or_path or type(dense).__name__
        dense, _ = plain_model(dense, name)
        check_dense_model(dense, name)
        check_dense_weights(dense, name)
        return name, dense
    name = str(dense)
    folder = Path(name).expanduser()
    if folder.is_dir() and gguf_file_of(folder) is None:
        from moe_hf.saving import check_shard_index

        check_shard_index(folder)
    # With all its parts, of which AutoModelForCausalLM may leave some out.
    check_dense_config(read_dense_config(name), name)
    tell_quantized(name, quantized_as(name))
    model, report = load_dense(name)
    check_dense_model(model, name)
    check_all_loaded(model, report, name)
    check_dense_weights(model, name)
    return name, model


def _inexact_message(result: VerificationResult, reason: str | None) -> str:
    return (
        f"The MoE model's logits differ from the dense model's by {result.relative_error:.2e} (relative), allowed "
        f"{EXACT_TOLERANCE:.0e}; the dense model's own dtype makes {result.rounding_error:.2e}. The reason: "
        f"{reason or f'the first layer that differs is {result.first_difference}'}."
    )
