"""Fine-tune one dense model on two kinds of text, and make the specialists experts of one MoE (Branch-Train-MiX).

python examples/08_mixing_specialists.py [--steps 150]
"""

import argparse
import copy

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import moe_hf
from moe_hf.data import load_text, split_by_document, tokenize_and_pack, train_tokenizer
from moe_hf.upcycling.initialisers import Mix


def train(model: PreTrainedModel, rows: Dataset, steps: int) -> None:
    """Train what has gradients on rows in random order."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    model.train()
    order = torch.randint(len(rows), (steps, 8), generator=torch.Generator().manual_seed(0))
    for batch in DataLoader(rows, batch_sampler=order.tolist()):
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out_losses(model: PreTrainedModel, held_out: dict[str, Dataset]) -> dict[str, float]:
    """Loss in nats/token by domain."""
    model.eval()
    return {domain: model(**rows[:], use_cache=False).loss.item() for domain, rows in held_out.items()}


def main() -> None:
    """Train a base, branch it, mix the branches, teach the routers whom to ask.

    The mix has had more training than any of the others: this shows the steps, not that they are worth it.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of the base, and of each specialist")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    train_text, held_out_text = split_by_document(load_text("builtin"), held_out_share=0.1)
    train_text = train_text.shuffle(seed=0).select(range(400))
    tokenizer = train_tokenizer(train_text, vocab_size=512)

    def blocks(text: Dataset, domain: str, count: int) -> Dataset:
        documents = text.filter(lambda row: row["domain"] == domain).shuffle(seed=0)
        packed = tokenize_and_pack(documents.select(range(min(len(documents), 150))), tokenizer, block_size=128)
        return packed.select(range(min(len(packed), count)))

    rows = {domain: blocks(train_text, domain, 2000) for domain in ("code", "prose")}
    held_out = {domain: blocks(held_out_text, domain, 48) for domain in rows}
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, **sizes))
    both = concatenate_datasets(list(rows.values())).with_format("torch")
    train(base, both, arguments.steps)
    specialists = {domain: copy.deepcopy(base) for domain in rows}
    for domain, specialist in specialists.items():
        train(specialist, rows[domain], arguments.steps)

    # One expert from each checkpoint: 0 is the base, then the sources in order. All that is no expert is their average.
    # The function is a new one, so nothing is promised of the logits; the routers know nothing yet.
    mix = moe_hf.upcycle(base, init=Mix(sources=list(specialists.values())), num_experts=3, num_experts_per_tok=2)
    losses = {"base": held_out_losses(base, held_out)}
    losses |= {f"{domain} specialist": held_out_losses(model, held_out) for domain, model in specialists.items()}
    losses["mix, untrained"] = held_out_losses(mix, held_out)
    train(mix, both, arguments.steps)
    losses["mix, trained on both"] = held_out_losses(mix, held_out)

    print(f"{'held-out loss, nats/token':28}{'code':>8}{'prose':>8}{'mean':>8}")
    for name, values in losses.items():
        print(f"{name:28}{values['code']:8.3f}{values['prose']:8.3f}{sum(values.values()) / 2:8.3f}")


if __name__ == "__main__":
    main()
