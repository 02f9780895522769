"""The same fine-tuning in a training loop of one's own, with Accelerate.

accelerate launch examples/03_accelerate_loop.py [--steps 30] [--accumulate 2]
"""

import argparse
from itertools import chain, repeat

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import moe_hf
from moe_hf.data import load_text, tokenize_and_pack, train_tokenizer
from moe_hf.finetuning import apply_scope


def main() -> None:
    """Freeze, prepare, and step; the order matters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    prose = load_text("builtin").filter(lambda row: row["domain"] == "prose")
    tokenizer = train_tokenizer(prose, vocab_size=512)
    blocks = tokenize_and_pack(prose, tokenizer, block_size=128)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, **sizes))
    model = moe_hf.upcycle(dense, num_experts=4, num_experts_per_tok=2, noise=0.1)

    # Freeze before `prepare`: DistributedDataParallel decides when it wraps the model which gradients it waits for.
    report = apply_scope(model, "moe")
    accelerator = Accelerator(gradient_accumulation_steps=arguments.accumulate)
    accelerator.print(report)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    loader = DataLoader(blocks, batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    batches = chain.from_iterable(repeat(loader))
    for step in range(1, arguments.steps + 1):
        micro_batches = [next(batches) for _ in range(arguments.accumulate)]
        # The model weights its losses, the routers' too, by labels over all labels of the step, so that cutting a
        # batch into pieces changes nothing. `backward` divides by the pieces, and the processes average their
        # gradients: both are undone here.
        count = sum((batch["labels"][..., 1:] != -100).sum() for batch in micro_batches)
        count = accelerator.reduce(count, "sum")
        scale = arguments.accumulate * accelerator.num_processes
        total = 0.0
        for batch in micro_batches:
            with accelerator.accumulate(model):
                outputs = model(**batch, num_items_in_batch=count, use_cache=False)
                accelerator.backward(outputs.loss * scale)
                total += accelerator.reduce(outputs.loss.detach(), "sum").item()
                optimizer.step()
                optimizer.zero_grad()
        if step % 10 == 0 or step == arguments.steps:
            accelerator.print(f"step {step}: loss {total:.3f} nats/token, router losses included")
    accelerator.end_training()


if __name__ == "__main__":
    main()
