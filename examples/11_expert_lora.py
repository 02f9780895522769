"""Low-rank adapters for chosen experts of a native Mixtral: train, save, read with PEFT, merge.

python examples/11_expert_lora.py [--model FOLDER_OR_HUB_ID] [--output_dir OUT]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moe_hf.finetuning import ExpertLoraConfig, add_expert_lora, merge_expert_lora, save_expert_lora


def load(model: str | None) -> torch.nn.Module:
    """The checkpoint, or a small Mixtral from random weights, the same on each call."""
    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config)


def main() -> None:
    """Train, save, compare with PEFT, merge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    output_dir = args.output_dir or Path(tempfile.mkdtemp())

    model = load(args.model)
    # Three experts of the last two layers, one of them with a larger rank.
    config = ExpertLoraConfig(r=4, alpha=8, experts={"1": [0, 2], "2": [1]}, rank_pattern={"2.1": 8}, use_rslora=True)
    add_expert_lora(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{sum(parameter.numel() for parameter in trained):,} of {total:,} parameters train")

    text = torch.tensor([list(Path(__file__).read_bytes()[:512])])
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step in range(20):
        loss = model(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 19):
            print(f"step {step}: {loss.item():.3f} nats/token")

    model.eval()
    with torch.no_grad():
        logits = model(input_ids=text).logits
        save_expert_lora(model, output_dir / "adapter")
        save_expert_lora(model, output_dir / "for_peft", file_format="peft")
        peft_model = PeftModel.from_pretrained(load(args.model), output_dir / "for_peft").eval()
        print(f"PEFT's logits differ by {(peft_model(input_ids=text).logits - logits).abs().max():.1e}")
        merge_expert_lora(model, unload=True)
        print(f"the merged model's by {(model(input_ids=text).logits - logits).abs().max():.1e}")
    model.save_pretrained(output_dir / "merged")
    print(f"Written: {output_dir}")


if __name__ == "__main__":
    main()
