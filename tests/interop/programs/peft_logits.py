"""Logits of a model with an adapter, loaded by PEFT without moe_hf: FOLDER ADAPTER ANSWERS OUT."""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


if __name__ == "__main__":
    folder, adapter, answers, out = sys.argv[1:]
    with open(answers) as file:
        ids = json.load(file)["ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        torch.save([model(input_ids=torch.tensor([row])).logits[0] for row in ids], out)
    assert "moe_hf" not in sys.modules
