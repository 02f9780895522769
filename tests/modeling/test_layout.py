"""The layout on disk is frozen: golden names and shapes for five families, and a golden checkpoint."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_hf import MoEConfig, MoEForCausalLM, upcycle
from tests.tiny_models import random_ids, tiny_config, tiny_dense


GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ["llama", "gpt2", "opt", "phi3", "falcon_h1"]


def saved_layout(family: str, folder: Path) -> dict[str, list[int]]:
    shared = {"shared_expert_intermediate_size": 24, "shared_expert_gate": True} if family in ("llama", "gpt2") else {}
    MoEForCausalLM(MoEConfig(text_config=tiny_config(family), num_experts=4, **shared)).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_on_disk_are_the_golden_ones(family, tmp_path):
    golden = json.loads((GOLDEN / "layouts.json").read_text())
    assert saved_layout(family, tmp_path) == golden[family]


@pytest.mark.numerics
def test_the_golden_checkpoint_loads_with_its_logits():
    model = MoEForCausalLM.from_pretrained(GOLDEN / "checkpoint")
    assert model.config.format_version == 1
    golden = load_file(GOLDEN / "logits.safetensors")
    with torch.no_grad():
        actual = model(golden["input_ids"]).logits
    assert float((actual - golden["logits"]).norm() / golden["logits"].norm()) <= 1e-5


def write_golden() -> None:
    """Write the golden files anew. A change of theirs breaks checkpoints that exist: raise `format_version` with it."""
    GOLDEN.mkdir(exist_ok=True)
    layouts = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            layouts[family] = saved_layout(family, Path(folder))
    (GOLDEN / "layouts.json").write_text(json.dumps(layouts, indent=1) + "\n")
    model = upcycle(
        tiny_dense("llama", num_hidden_layers=2), num_experts=3, noise=0.3, shared_expert_intermediate_size=24
    )
    model.save_pretrained(GOLDEN / "checkpoint")
    for code in (GOLDEN / "checkpoint").glob("*.py"):
        code.unlink()
    ids = random_ids(2, 9)
    with torch.no_grad():
        save_file({"input_ids": ids, "logits": model(ids).logits}, GOLDEN / "logits.safetensors")


if __name__ == "__main__":
    write_golden()
