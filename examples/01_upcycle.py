"""Turn a dense model into a Mixture-of-Experts model that computes the same function.

python examples/01_upcycle.py                    a tiny random Llama, built on the spot
python examples/01_upcycle.py PATH_OR_HUB_ID     a dense checkpoint of yours
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moe_hf


def main() -> None:
    """Upcycle, compare the logits, and say what it costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", nargs="?", help="a folder or a Hub id; a tiny random model if not given")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.dense is None:
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
        dense = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=3, **sizes)).eval()
    else:
        dense = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype="auto").eval()

    # Every MLP becomes 8 copies behind a router that picks 2 of them per token and mixes them with weights that sum
    # to 1: the copies are equal, so the mixture is the dense MLP. `upcycle` checks that and raises if it is not so.
    moe = moe_hf.upcycle(dense, num_experts=8, num_experts_per_tok=2)

    result = moe_hf.verify(dense, moe)
    print(f"relative difference of the logits: {result.relative_error:.1e} over {result.num_tokens} tokens")
    for name, model in (("dense", dense), ("MoE", moe)):
        facts = moe_hf.inspect_model(model)
        print(
            f"{name}: {facts.total_parameters:,} parameters, {facts.active_parameters:,} used per token, "
            f"{facts.flops_per_token:,} FLOPs per token"
        )


if __name__ == "__main__":
    main()
