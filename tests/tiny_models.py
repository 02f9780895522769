"""Tiny random models of many families, shared by the tests: every size differs, norms are not ones, biases not zeros.

A model whose widths coincide, whose norms are ones or whose biases are zeros hides transposed, swapped and lost tensors.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.family_fields import FAMILY_FIELDS


# Asked for by the names that most families share; a family that has no such field ignores it.
# All differ where they can become a tensor's size: D 48, F 88, V 113, 3 layers, 6 heads of 16, 2 key-value heads.
# F is a multiple of 8: on a CPU `grouped_mm` wants rows of a multiple of 16 bytes.
SIZES = {
    "vocab_size": 113,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 80,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEED_FORWARD_NAMES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
FEED_FORWARD_SIZE = 88


def tiny_config(family: str, **overrides) -> PreTrainedConfig:
    """Return the smallest useful config of `family` (a `model_type` of transformers); `overrides` win."""
    defaults = AutoConfig.for_model(family)
    shared = SIZES | dict.fromkeys(FEED_FORWARD_NAMES, FEED_FORWARD_SIZE)
    names = set(defaults.to_dict()) | set(defaults.attribute_map)
    fields = {name: value for name, value in shared.items() if name in names}
    # Dropout would make two runs of one model differ in training mode.
    fields |= {name: 0.0 for name in names if "drop" in name and isinstance(getattr(defaults, name), float)}
    return AutoConfig.for_model(family, **(fields | FAMILY_FIELDS.get(family, {}) | overrides))


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> None:
    """Redraw the parameters of `model` in place: no norm stays one, no bias zero, and no layer is negligible."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
            else:
                inputs = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter[0].numel()
                parameter.copy_(noise * (inputs if parameter.ndim == 2 else parameter.shape[-1]) ** -0.5)


def tiny_dense(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """Return a tiny random dense causal LM of `family`, float32, in eval mode, without touching the global RNG.

    Args:
        family (`str`): `model_type` of transformers, e.g. `"llama"`.
        seed (`int`): of the weights.
        overrides: config fields, e.g. `tie_word_embeddings=True`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    randomise_(model, seed)
    return model.eval()


def tiny_native_moe(family: str = "mixtral", seed: int = 0, **overrides) -> PreTrainedModel:
    """Return a tiny random native MoE of transformers (`mixtral`, `qwen3_moe`, `olmoe`, ...): 4 experts, 2 per token."""
    counts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    defaults = AutoConfig.for_model(family)
    names = set(defaults.to_dict()) | set(defaults.attribute_map)
    return tiny_dense(family, seed, **({name: v for name, v in counts.items() if name in names} | overrides))


def random_ids(batch: int = 2, length: int = 32, vocab: int = 113, seed: int = 0) -> torch.Tensor:
    """Return seeded token ids `(batch, length)` in [3, vocab): none is a special token."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
