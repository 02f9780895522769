"""Models that are large enough for their tensors to be what a training step holds, and small enough for a test."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_hf import MoEConfig, MoEForCausalLM
from tests.tiny_models import tiny_config, tiny_native_moe


SIZES = {"hidden_size": 240, "vocab_size": 2000, "intermediate_size": 512}
CASES = {
    "llama, all": ("llama", "all", False, 1, torch.float32),
    "llama, moe, checkpointing": ("llama", "moe", True, 1, torch.float32),
    "llama, moe, bfloat16": ("llama", "moe", False, 1, torch.bfloat16),
    "gemma2, all, accumulation": ("gemma2", "all", False, 2, torch.float32),
    "gpt2, moe": ("gpt2", "moe", False, 1, torch.float32),
    "mixtral, all, bfloat16": ("mixtral", "all", False, 1, torch.bfloat16),
    "mixtral, experts, checkpointing": ("mixtral", "experts", True, 1, torch.float32),
}
# On two processes, in float32: family, scope, checkpointing, micro-batches.
LAYOUT_CASES = {
    "llama, all": ("llama", "all", False, 1),
    "llama, moe, accumulation": ("llama", "moe", False, 2),
    "mixtral, experts, checkpointing": ("mixtral", "experts", True, 1),
}
BATCH, SEQUENCE = 8, 128


def build(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """An upcycled model's shape of a dense family, or a native MoE, with random numbers."""
    if family == "mixtral":
        config = tiny_native_moe("mixtral", max_position_embeddings=SEQUENCE, **SIZES).config
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    sizes = SIZES | {"max_position_embeddings": SEQUENCE}
    sizes |= {"n_embd": 240, "n_inner": 512, "n_positions": SEQUENCE} if family == "gpt2" else {}
    config = MoEConfig(text_config=tiny_config(family, **sizes), num_experts=4)
    config.dtype = dtype
    return MoEForCausalLM._from_config(config)
