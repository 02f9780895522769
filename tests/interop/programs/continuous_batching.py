"""Tokens of transformers' continuous batching: FOLDER ANSWERS OUT."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig


if __name__ == "__main__":
    folder, answers, out = sys.argv[1:]
    with open(answers) as file:
        expected = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    pages = ContinuousBatchingConfig(num_blocks=64, page_size=32, max_batch_tokens=64)
    length = len(expected["tokens"][0])
    outputs = model.generate_batch(expected["ids"], continuous_batching_config=pages, max_new_tokens=length)
    with open(out, "w") as file:
        json.dump([output.generated_tokens for output in outputs.values()], file)
