"""Fine-tune the experts and routers of a MoE alone, with `MoETrainer`, on the text that comes with Python.

python examples/02_expert_only_trainer.py [--steps 30]
"""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moe_hf
from moe_hf.data import load_text, split_by_document, tokenize_and_pack, train_tokenizer


def main() -> None:
    """Prepare text, upcycle, train in scope `moe`, evaluate on documents that were held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    corpus = load_text("builtin")
    prose = corpus.filter(lambda row: row["domain"] == "prose")
    # Whole documents are held out: lines of one document resemble each other too much to test on.
    train_text, held_out_text = split_by_document(prose, held_out_share=0.1)
    tokenizer = train_tokenizer(train_text, vocab_size=512)
    train = tokenize_and_pack(train_text, tokenizer, block_size=128)
    held_out = tokenize_and_pack(held_out_text, tokenizer, block_size=128)

    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, **sizes))
    # Copies grow apart only through the tokens that each gets; a little noise tells them apart from the start.
    moe = moe_hf.upcycle(dense, num_experts=4, num_experts_per_tok=2, noise=0.1)

    with tempfile.TemporaryDirectory() as folder:
        trainer = moe_hf.MoETrainer(
            model=moe,
            args=moe_hf.MoETrainingArguments(
                output_dir=folder,
                scope="moe",
                max_steps=arguments.steps,
                learning_rate=3e-3,
                per_device_train_batch_size=8,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=train,
            eval_dataset=held_out.select(range(min(32, len(held_out)))),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    trained = sum(p.numel() for p in moe.parameters() if p.requires_grad)
    print(f"trained {trained:,} of {sum(p.numel() for p in moe.parameters()):,} parameters")
    print(f"held-out loss {before:.3f} -> {after:.3f} nats/token")


if __name__ == "__main__":
    main()
