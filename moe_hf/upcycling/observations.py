"""What a method looks at besides the weights: the dense model's hidden states on the user's tokens and prompts.

Letters: B batch, S sequence, T tokens, D model width.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.upcycling.method import LayerStates, UpcyclingMethod
from moe_hf.upcycling.router_init.hidden_states import check_token_ids, collect_hidden_states, collect_prompt_states


@dataclass(frozen=True)
class Observations:
    """Hidden states by the index of their layer, and the entries of the metadata that say where they come from."""

    layers: Mapping[int, LayerStates] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def observe(
    method: UpcyclingMethod,
    config: MoEConfig,
    model: Callable[[], PreTrainedModel],
    inputs: torch.Tensor | None = None,
    tokenizer: Callable[[], PreTrainedTokenizerBase | None] = lambda: None,
) -> Observations:
    """Run the dense model on what `method` looks at; nothing is loaded or run when that is nothing.

    Args:
        method (`UpcyclingMethod`): how the MoE is made.
        config (`MoEConfig`): of the MoE.
        model (`Callable`): gives the dense model, in memory or from `load_layerwise`.
        inputs (`torch.Tensor`, *optional*): token ids of the user's data, (B, S), without padding.
        tokenizer (`Callable`): gives the dense model's tokenizer, for prompts.

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
        facts = {"inputs": {"shape": list(inputs.shape), "sha256": sha256(inputs)}}
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
    return Observations(layers=layers, facts=facts)


def sha256(inputs: torch.Tensor) -> str:
    """Hexadecimal digest of token ids, whatever their integer type."""
    return hashlib.sha256(inputs.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()
