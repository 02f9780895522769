"""What a method looks at besides the weights: the dense model's hidden states on the user's tokens and prompts.

Letters: B batch, S sequence, T tokens, D model width.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite
from moe_hf.upcycling.expected_weight import expected_weight, router_of, tokens_to_weigh
from moe_hf.upcycling.method import LayerStates, UpcyclingMethod
from moe_hf.upcycling.router_init.hidden_states import check_token_ids, collect_hidden_states, collect_prompt_states
from moe_hf.upcycling.sample_text import GIVEN_IDS, SampleText


@dataclass(frozen=True)
class Observations:
    """Hidden states by the index of their layer, and the entries of the metadata that say where they come from."""

    layers: Mapping[int, LayerStates] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def observe(
    method: UpcyclingMethod,
    config: MoEConfig,
    model: Callable[[], PreTrainedModel],
    sites: Sequence[MLPSite],
    inputs: torch.Tensor | None = None,
    tokenizer: Callable[[], PreTrainedTokenizerBase | None] = lambda: None,
    text: Callable[[], SampleText | None] = lambda: None,
) -> Observations:
    """Run the dense model on what `method` looks at; nothing is loaded or run when that is nothing.

    Args:
        method (`UpcyclingMethod`): how the MoE is made.
        config (`MoEConfig`): of the MoE.
        model (`Callable`): gives the dense model, in memory or from `load_layerwise`.
        sites (`Sequence[MLPSite]`): the MLPs that become experts.
        inputs (`torch.Tensor`, *optional*): token ids of the user's data, (B, S), without padding.
        tokenizer (`Callable`): gives the dense model's tokenizer, for prompts.
        text (`Callable`): gives a text, for what the routers' weights sum to where there are no `inputs`.

    Raises:
        MoEError: what the method looks at is missing, or is no token ids.
    """
    if inputs is not None:
        check_token_ids("inputs", inputs)
    elif method.needs_inputs(config):
        raise MoEError(
            f"init={method.init.name!r} with router_init={method.router_init.name!r} looks at the user's data: pass inputs, "
            "token ids (B, S)."
        )
    prompts, tokens, texts, facts = method.router_init.prompts, {}, {}, {}
    if inputs is not None and method.uses_inputs(config):
        tokens = collect_hidden_states(model(), inputs, seed=method.seed)
        facts = _facts_of(inputs)
    if prompts:
        words = tokenizer()
        if words is None:
            raise MoEError(
                f"router_init={method.router_init.name!r} has prompts: pass the dense model's tokenizer, or a folder that "
                "has one."
            )
        texts = collect_prompt_states(model(), words, prompts)
    layers = {
        index: LayerStates(tokens=tokens.get(index), prompts=tuple(texts.get(index, ())))
        for index in tokens.keys() | texts.keys()
    }
    weights, words = _expected_weights(method, config, model, sites, inputs, text, layers)
    if any(weight != config.routed_scaling_factor for weight in weights.values()):
        layers = {
            index: replace(layers.get(index, LayerStates()), expected_weight=weights[index]) for index in weights
        }
        facts["expected_weight"] = [weights.get(index) for index in range(config.num_hidden_layers)]
        facts["expected_weight_text"] = words
        if inputs is not None:
            facts |= _facts_of(inputs)
    return Observations(layers=layers, facts=facts)


def _expected_weights(
    method: UpcyclingMethod,
    config: MoEConfig,
    model: Callable[[], PreTrainedModel],
    sites: Sequence[MLPSite],
    inputs: torch.Tensor | None,
    text: Callable[[], SampleText | None],
    layers: Mapping[int, LayerStates],
) -> tuple[dict[int, float], str | None]:
    """By layer, the mean sum of a token's weights at the start; and on which text the dense model ran, where it had to."""
    weights = {site.layer_index: method.constant_weight(config, site) for site in sites}
    unknown = [site for site in sites if weights[site.layer_index] is None]
    if not unknown:
        return weights, None
    dense, sample = model(), text() if inputs is None else None
    ids = tokens_to_weigh(dense.config, inputs, sample, method.seed)
    states = collect_hidden_states(dense, ids)
    for site in unknown:
        router, index = router_of(config, site), site.layer_index
        tensors = method.router_tensors(router, site, config, layers.get(index))
        weights[index], _ = expected_weight(router, tensors, states[index].view(*ids.shape, -1))
    return weights, sample.name if sample else GIVEN_IDS if inputs is not None else "random token ids"


def _facts_of(inputs: torch.Tensor) -> dict[str, Any]:
    return {"inputs": {"shape": list(inputs.shape), "sha256": sha256(inputs)}}


def sha256(inputs: torch.Tensor) -> str:
    """Hexadecimal digest of token ids, whatever their integer type."""
    return hashlib.sha256(inputs.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()
