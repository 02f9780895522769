"""Grow a MoE, remove the expert that is used least, add one, and go back to a dense model; each step says what it changes.

python examples/07_surgery.py                    a tiny random Llama, upcycled on the spot
python examples/07_surgery.py PATH               a moe_hf checkpoint of yours
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moe_hf
from moe_hf.upcycling import add_experts, grow_experts, remove_experts, to_dense


def main() -> None:
    """Operate on the experts, one step after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moe", nargs="?", help="a folder; a tiny random model if not given")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.moe is None:
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
        dense = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=3, **sizes))
        moe = moe_hf.upcycle(dense, num_experts=4, num_experts_per_tok=2, noise=0.3)
    else:
        moe = AutoModelForCausalLM.from_pretrained(arguments.moe, dtype="auto")
    ids = torch.randint(0, moe.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))

    # Every expert twice, and twice as many per token: the same function. The noise on the copies cancels, and lets
    # training tell them apart.
    grown = grow_experts(moe, copies=2, noise=0.1)
    report("grown", grown)

    # In each layer the expert that the tokens choose least. Tokens that never chose it do not notice.
    found = moe_hf.routing_statistics(grown, [{"input_ids": ids}])
    layers = [site.layer_index for site in grown.base_model._moe_sites]
    least = {index: [int(layer.load.argmin())] for index, layer in zip(layers, found.layers, strict=True)}
    smaller = remove_experts(grown, least, inputs=ids)
    report("least used expert removed", smaller)

    # An expert for a new domain starts as a copy of expert 0. Without noise its router row would tie with expert 0's.
    larger = add_experts(smaller, [0], router_noise=0.1, inputs=ids)
    report("expert added", larger)

    # Back to the dense family. Fixed weights take the router's place: here their means over `ids`.
    for method in ("average", "merged"):
        dense = to_dense(moe, method, inputs=ids)
        error = moe_hf.verify(moe, dense, ids).relative_error
        parameters = sum(parameter.numel() for parameter in dense.parameters())
        print(
            f"{type(dense).__name__}, {method}: {parameters:,} parameters, logits differ from the MoE's by {error:.1e}"
        )


def report(name: str, model: moe_hf.MoEForCausalLM) -> None:
    """Print what the last operation recorded about itself."""
    step = model.config.upcycling["surgery"][-1]
    error = step["verification"]["relative_error"]
    print(
        f"{name}: {model.config.num_experts} experts, {model.config.num_experts_per_tok} per token, changed by {error:.1e}"
    )


if __name__ == "__main__":
    main()
