"""PEFT: an adapter of experts that moe_hf wrote is loaded where moe_hf is not installed, with the same logits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_hf.finetuning import ExpertLoraConfig, add_expert_lora, lora_adapters, save_expert_lora
from tests.interop.environments import installed


pytestmark = pytest.mark.interop
PROGRAM = Path(__file__).parent / "programs" / "peft_logits.py"


@torch.no_grad()
@pytest.mark.parametrize("what", ["our folder", "its export to mixtral"])
def test_an_adapter_of_experts_has_the_same_logits(what, llama, native, record, tmp_path):
    environment = installed("peft")
    checkpoint = llama if what == "our folder" else native("mixtral")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    add_expert_lora(model, ExpertLoraConfig(r=4, experts={"0": [1, 3], "2": [0, 1, 2, 3]}))
    for adapter in lora_adapters(model).values():
        for name, parameter in adapter.named_parameters():
            if name.endswith("_B"):
                parameter.normal_(std=0.3)
    save_expert_lora(model, tmp_path / "adapter", file_format="peft")
    answers = checkpoint.write_answers(tmp_path / "answers.json")
    environment.output("python", PROGRAM, checkpoint.folder, tmp_path / "adapter", answers, tmp_path / "logits.pt")
    expected = torch.cat([model(torch.tensor([ids])).logits[0] for ids in checkpoint.answers.ids])
    actual, without = torch.cat(torch.load(tmp_path / "logits.pt")), torch.cat(checkpoint.answers.logits)
    difference = float((actual - expected).norm() / expected.norm())
    assert difference <= 1e-6
    assert float((without - expected).norm() / expected.norm()) > 1e-2, "the adapter does nothing"
    record(environment, f"adapter of chosen experts of {what}", f"logits {difference:.1e}")
