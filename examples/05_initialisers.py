"""Ways to start the experts: what each keeps of the dense model, and what it costs.

python examples/05_initialisers.py                    a tiny random Llama, built on the spot
python examples/05_initialisers.py PATH_OR_HUB_ID     a dense checkpoint of yours
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moe_hf
from moe_hf.upcycling.initialisers import Drop, Granular, Split


def main() -> None:
    """Upcycle in each way, and print the measured difference to the dense model, parameters and arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", nargs="?", help="a folder or a Hub id; a tiny random model if not given")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.dense is None:
        sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
        dense = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=3, **sizes)).eval()
    else:
        dense = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32).eval()
    width = dense.config.get_text_config().intermediate_size

    # A name stands for an initialiser with its default options, an instance for one with yours. The first three compute
    # the dense function; the others start somewhere near, where training may find experts that differ more.
    ways = {
        "copy": {"init": "copy", "num_experts": 8, "num_experts_per_tok": 2},
        # Experts of half the width, twice as many: finer choices for the same parameters and arithmetic.
        "granular": {"init": Granular(shards=2), "num_experts": 16, "num_experts_per_tok": 4},
        # Each token gets one expert that all share and one of its own; each has half of the output.
        "shared expert": {"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": width},
        # Copies grow apart only through the tokens that each gets; noise tells them apart from the start.
        "noise": {"init": "copy", "noise": 0.1, "num_experts": 8, "num_experts_per_tok": 2},
        # A quarter of each expert's neurons is drawn anew, with the moments of those that they replace.
        "drop": {"init": Drop(ratio=0.25), "num_experts": 8, "num_experts_per_tok": 2},
        # No copies: each expert has an eighth of the neurons. Less arithmetic than the dense model, and much to relearn.
        "split": {"init": Split(by="random"), "num_experts": 8, "num_experts_per_tok": 2},
    }
    facts = moe_hf.inspect_model(dense)
    print(f"{'':16}{'difference of logits':>22}{'parameters':>14}{'per token':>14}{'FLOPs/token':>14}")
    print(f"{'dense':16}{'':22}{facts.total_parameters:14,}{facts.active_parameters:14,}{facts.flops_per_token:14,}")
    for name, method in ways.items():
        # What should be exact and is not raises an error; of the rest the difference is measured and recorded.
        moe = moe_hf.upcycle(dense, **method)
        facts, error = moe_hf.inspect_model(moe), moe.config.upcycling["verification"]["relative_error"]
        print(
            f"{name:16}{error:22.1e}{facts.total_parameters:14,}{facts.active_parameters:14,}{facts.flops_per_token:14,}"
        )


if __name__ == "__main__":
    main()
