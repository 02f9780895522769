"""Every exact way to upcycle, on eight dense families: `python -m tests.upcycling.exactness_table` prints the figures.

The dense MLP is 448 wide, so that it can be cut into 8 parts whose width the CPU's `grouped_mm` takes in 16 bits.
"""

from functools import cache

import torch
from transformers import PreTrainedModel

from moe_hf import upcycle
from moe_hf.upcycling.initialisers import Granular, Permute
from moe_hf.upcycling.verification import relative_error
from tests.tiny_models import random_ids, tiny_dense


FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "starcoder2", "olmo2")
WIDTH = 448
GRANULAR = {"num_experts": 16, "num_experts_per_tok": 8}
EXACT_MODES = {
    "copy": {},
    "permute": {"init": Permute()},
    "granular, G = 2": {"init": Granular(shards=2), "num_experts": 6, "num_experts_per_tok": 4},
    "granular, G = 4, permuted": {
        "init": Granular(shards=4, permute=True),
        "num_experts": 8,
        "num_experts_per_tok": 4,
    },
    "granular, G = 8": {"init": Granular(shards=8), **GRANULAR},
    "granular, G = 8 = routed_scaling_factor": {"init": Granular(shards=8), "routed_scaling_factor": 8.0, **GRANULAR},
    "shared 0.5, gated": {"shared_expert_intermediate_size": WIDTH, "shared_expert_gate": True},
    "shared 0.25": {"shared_expert_intermediate_size": WIDTH, "shared_share": 0.25},
    "shared 0.3, routed_scaling_factor 2.5": {
        "shared_expert_intermediate_size": WIDTH,
        "shared_share": 0.3,
        "routed_scaling_factor": 2.5,
    },
    "shared 0.5, wider": {"shared_expert_intermediate_size": WIDTH + 16},
    "shared, narrow, no output": {"shared_expert_intermediate_size": 40, "shared_expert_gate": True},
    "wider experts": {"moe_intermediate_size": WIDTH + 8},
    "sigmoid, K = 3, routed_scaling_factor 2": {
        "scoring_func": "sigmoid",
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.0,
    },
    "granular, shared, gated, sigmoid, scaled, wider, partial": {
        "init": Granular(shards=2, permute=True),
        "num_experts": 6,
        "num_experts_per_tok": 4,
        "shared_expert_intermediate_size": WIDTH + 16,
        "shared_expert_gate": True,
        "shared_share": 0.3,
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "moe_intermediate_size": WIDTH // 2 + 8,
        "first_k_dense_replace": 1,
    },
    "every second layer": {"decoder_sparse_step": 2},
    "first layer dense": {"first_k_dense_replace": 1},
    "layers 0 and 2 dense": {"mlp_only_layers": [0, 2]},
}


@cache
def wide_dense(family: str) -> PreTrainedModel:
    """A tiny dense model whose MLPs are 448 wide; not to be changed."""
    return tiny_dense(family, **{"n_inner" if family == "gpt2" else "intermediate_size": WIDTH})


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of 2 x 40 fixed tokens, (2, 40, V) float32."""
    return model(random_ids(2, 40, seed=9)).logits.float()


def bfloat16_errors(family: str, mode: str) -> tuple[float, float, float]:
    """Relative errors of the logits: of the conversion, of the MoE run in bfloat16, of the dense model run in bfloat16."""
    dense = tiny_dense(family, **{"n_inner" if family == "gpt2" else "intermediate_size": WIDTH}).bfloat16()
    moe = upcycle(dense, **{"num_experts": 4, "allow_inexact": True, **EXACT_MODES[mode]})
    conversion = moe.config.upcycling["verification"]["relative_error"]
    own, parent = logits(moe), logits(dense)
    exact = logits(dense.float())
    return conversion, relative_error(own, exact), relative_error(parent, exact)


def float32_error(family: str, mode: str) -> float:
    """Relative error of the logits in float32."""
    dense = wide_dense(family)
    moe = upcycle(dense, **{"num_experts": 4, **EXACT_MODES[mode]})
    return relative_error(logits(moe), logits(dense))


def main() -> None:
    """Print two Markdown tables."""
    print("| float32 | " + " | ".join(FAMILIES) + " |")
    print("|---" * (len(FAMILIES) + 1) + "|")
    for mode in EXACT_MODES:
        print(f"| {mode} | " + " | ".join(f"{float32_error(family, mode):.1e}" for family in FAMILIES) + " |")
    print("\n| bfloat16 (conversion; run: MoE / dense) | " + " | ".join(FAMILIES) + " |")
    print("|---" * (len(FAMILIES) + 1) + "|")
    for mode in EXACT_MODES:
        cells = ["{:.0e}; {:.3f} / {:.3f}".format(*bfloat16_errors(family, mode)) for family in FAMILIES]
        print(f"| {mode} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
