"""Compare three routers on one dense base: what the loss becomes, how even the load is, how many experts a token uses.

python examples/09_compare_routers.py [--steps 100]
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import moe_hf
from moe_hf.data import load_text, split_by_document, tokenize_and_pack, train_tokenizer


def train(model: PreTrainedModel, rows: Dataset, steps: int) -> None:
    """Train everything. The trainer also moves what a router follows the load with, once per step."""
    with tempfile.TemporaryDirectory() as folder:
        args = moe_hf.MoETrainingArguments(
            output_dir=folder,
            scope="all",
            max_steps=steps,
            learning_rate=3e-3,
            per_device_train_batch_size=8,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        moe_hf.MoETrainer(model=model, args=args, train_dataset=rows).train()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: Dataset) -> float:
    """Loss in nats/token, without the losses of the router."""
    return model.eval()(**rows[:], use_cache=False).loss.item()


def main() -> None:
    """Train a base, give it each router, train on the same text, and print what the routers do on held-out text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the base, and of each router")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    corpus = load_text("builtin")
    train_text, held_out_text = split_by_document(
        corpus.filter(lambda row: row["domain"] == "prose"), held_out_share=0.1
    )
    tokenizer = train_tokenizer(train_text, vocab_size=512)
    rows = tokenize_and_pack(train_text, tokenizer, block_size=128).shuffle(seed=0)
    held_out = tokenize_and_pack(held_out_text, tokenizer, block_size=128)
    held_out = held_out.select(range(min(len(held_out), 64)))

    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, **sizes))
    train(base, rows, arguments.steps)

    routers = {
        "plain top-k": {},
        # No loss balances the load here but a bias per expert, moved after each step.
        "sigmoid, groups, bias": {
            "scoring_func": "sigmoid",
            "n_group": 4,
            "topk_group": 2,
            "balance_strategy": "bias",
            "bias_update_rate": 3e-3,
        },
        # As many experts as it takes to have 40 % of the probability; weights that do not sum to 1 cannot be exact.
        "top-p": {
            "router_type": "top_p",
            "router_kwargs": {"top_p": 0.4},
            "router_loss_coefs": {"local_entropy_loss": 1e-4},
        },
    }
    lines = [f"{'held-out loss, nats/token':28}{'before':>9}{'after':>9}{'MaxVio':>9}{'experts/token':>15}"]
    for name, fields in routers.items():
        moe = moe_hf.upcycle(base, num_experts=8, num_experts_per_tok=2, allow_inexact=name == "top-p", **fields)
        before = held_out_loss(moe, held_out)
        train(moe, rows, arguments.steps)
        layers = moe_hf.routing_statistics(moe, [held_out[:]]).layers
        # How far the busiest expert of a layer is above the mean one.
        violation = sum(layer.max_violation for layer in layers) / len(layers)
        experts = sum(layer.mean_active for layer in layers) / len(layers)
        after = held_out_loss(moe, held_out)
        lines.append(f"{name:28}{before:9.3f}{after:9.3f}{violation:9.2f}{experts:15.2f}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
