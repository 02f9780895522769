"""lm-evaluation-harness: the perplexity of a task of one's own equals what the model's logits say."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.interop.environments import installed
from tests.interop.models import Checkpoint, documents


pytestmark = pytest.mark.interop
TASK = """
task: python_reference
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A folder with a task: documents that fit into the model's window."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(16)))
    (folder / "python_reference.yaml").write_text(TASK.replace("FILE", str(folder / "documents.jsonl")))
    return folder


@torch.no_grad()
def bits_per_byte(checkpoint: Checkpoint, texts: list[str]) -> float:
    """Of all tokens of each text, the first one after the end-of-text token, as the harness does it."""
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[checkpoint.tokenizer.eos_token_id, *checkpoint.tokenizer(text)["input_ids"]]])
        log_probabilities = checkpoint.model(ids[:, :-1]).logits.double().log_softmax(-1)
        nats -= log_probabilities.gather(-1, ids[:, 1:, None]).sum().item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    ("what", "more"), [("our folder", "trust_remote_code=True"), ("its export to mixtral", "trust_remote_code=False")]
)
def test_perplexity_is_the_one_of_the_logits(what, more, llama, native, task, record, tmp_path):
    environment = installed("lm_eval")
    checkpoint = llama if what == "our folder" else native("mixtral")
    arguments = ("--model_args", f"pretrained={checkpoint.folder},dtype=float32,{more}", "--device", "cpu")
    tasks = ("--include_path", task, "--tasks", "python_reference", "--batch_size", "4")
    environment.output("lm_eval", "run", "--model", "hf", *arguments, *tasks, "--output_path", tmp_path)
    (file,) = tmp_path.rglob("results_*.json")
    reported = json.loads(file.read_text())["results"]["python_reference"]["bits_per_byte,none"]
    expected = bits_per_byte(checkpoint, documents(16))
    difference = abs(reported - expected) / expected
    assert difference <= 1e-6, f"{reported}, expected {expected}"
    record(environment, f"{what}, perplexity of 16 documents", f"bits per byte differ by {difference:.1e}, relative")
