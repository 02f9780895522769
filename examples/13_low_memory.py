"""A MoE in a fraction of its memory: experts in nf4, adapters that train over them, two experts of each layer resident.

python examples/13_low_memory.py [--model FOLDER_OR_HUB_ID] [--output_dir OUT]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import moe_hf


def load(model: str | None) -> torch.nn.Module:
    """The checkpoint, or a small Mixtral from random weights."""
    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
    )
    return MixtralForCausalLM(config)


def mib(model: torch.nn.Module) -> str:
    """What the model's tensors take in memory."""
    return f"{moe_hf.model_bytes(model).in_memory / 2**20:.1f} MiB"


def main() -> None:
    """Quantize, save, load with two experts of each layer in memory, write; then train adapters over the codes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    output_dir = args.output_dir or Path(tempfile.mkdtemp())

    model = load(args.model).eval()
    text = torch.tensor([list(Path(__file__).read_bytes()[:128])])
    print(f"plain: {mib(model)}")
    report = moe_hf.quantize_experts(model, "nf4", double_quant=True, tokens=text)
    print(f"nf4: {mib(model)}; {report}")
    folder = moe_hf.save_low_memory(model, output_dir / "nf4")

    small = moe_hf.load_low_memory(folder, resident_per_layer=2)
    new = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    same = torch.equal(small.generate(text, **new), model.generate(text, **new))
    hit_rate = moe_hf.cache_report(small).hit_rate
    print(
        f"two experts of each layer, the others on the disk: {mib(small)}; same text: {same}; hit rate {hit_rate:.2f}"
    )

    moe_hf.add_expert_lora(model.train(), moe_hf.ExpertLoraConfig(r=4, alpha=8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(10):
        loss = model(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 9):
            print(f"step {step}: {loss.item():.3f} nats/token")
    moe_hf.save_expert_lora(model, output_dir / "adapter")
    print(f"Written: {output_dir}")


if __name__ == "__main__":
    main()
