"""Find the experts that one kind of text uses, train these alone, and keep what changed as a small file (ESFT).

python examples/10_select_experts.py [--steps 60]

The model is a Mixtral of transformers: scores, selections and deltas work on every MoE.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import moe_hf
from moe_hf.data import load_text, split_by_document, tokenize_and_pack, train_tokenizer


def train(model: PreTrainedModel, rows: Dataset, output_dir: Path, steps: int, **scope) -> moe_hf.MoETrainer:
    """Train with `MoETrainer`."""
    arguments = moe_hf.MoETrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        **scope,
    )
    trainer = moe_hf.MoETrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return trainer


@torch.no_grad()
def held_out_losses(model: PreTrainedModel, held_out: dict[str, Dataset]) -> dict[str, float]:
    """Loss in nats/token by domain."""
    model.eval()
    return {domain: model(**rows[:], use_cache=False).loss.item() for domain, rows in held_out.items()}


def main() -> None:
    """Train a base on two kinds of text, score its experts on one of them, train the chosen ones, merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the base, and of the chosen experts")
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    train_text, held_out_text = split_by_document(load_text("builtin"), held_out_share=0.1)
    train_text = train_text.shuffle(seed=0).select(range(400))
    tokenizer = train_tokenizer(train_text, vocab_size=512)

    def blocks(text: Dataset, domain: str | None, count: int) -> Dataset:
        documents = text.filter(lambda row: domain in (None, row["domain"])).shuffle(seed=0)
        packed = tokenize_and_pack(documents.select(range(min(len(documents), 150))), tokenizer, block_size=128)
        return packed.select(range(min(len(packed), count)))

    prose = blocks(train_text, "prose", 1000)
    held_out = {domain: blocks(held_out_text, domain, 48) for domain in ("code", "prose")}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(
        vocab_size=len(tokenizer), num_hidden_layers=3, num_local_experts=16, num_experts_per_tok=4, **sizes
    )
    base = MixtralForCausalLM(config)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        train(base, blocks(train_text, None, 2000), path / "base", steps)
        losses = {"base": held_out_losses(base, held_out)}

        # Which experts does prose use? The fewest that have half of each layer's tokens will train.
        scores = moe_hf.score_experts(base, [prose[:32]])
        selection = moe_hf.select_experts(scores, top_p=0.5)
        print(f"chosen: {selection.num_experts} of {sum(scores.num_experts)} experts")
        for name, ids in selection.experts.items():
            print(f"  {name}: {sorted(ids)}")

        base.save_pretrained(path / "saved_base")
        trainer = train(base, prose, path / "run", steps, scope="selected", expert_selection=selection.to_dict())
        losses["chosen experts trained"] = held_out_losses(trainer.model, held_out)

        # What changed is a small file, which goes onto this base and no other.
        deltas = moe_hf.save_expert_deltas(trainer.model, path / "prose.safetensors")
        whole = sum(parameter.nbytes for parameter in MixtralForCausalLM(config).parameters())
        print(f"deltas: {deltas.stat().st_size / whole:.0%} of the model's bytes")
        merged = MixtralForCausalLM.from_pretrained(path / "saved_base")
        moe_hf.load_expert_deltas(merged, deltas)
        losses["base with deltas merged"] = held_out_losses(merged, held_out)

    print(f"{'held-out loss, nats/token':28}{'code':>8}{'prose':>8}")
    for name, values in losses.items():
        print(f"{name:28}{values['code']:8.3f}{values['prose']:8.3f}")


if __name__ == "__main__":
    main()
