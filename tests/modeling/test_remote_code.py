"""A saved model carries its code: it runs, saves again and reloads where moe_hf cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_hf import upcycle
from tests.tiny_models import random_ids, tiny_dense


ISOLATED = """
import importlib.util, json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moe_hf":
            raise ModuleNotFoundError("moe_hf is blocked")

sys.meta_path.insert(0, Blocked())
folder, again = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.load(folder + "/ids.pt")
generated = model.generate(ids[:1, :4], max_new_tokens=6, do_sample=False)
model.save_pretrained(again)
second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(again, trust_remote_code=True)
classifier = AutoModelForSequenceClassification.from_pretrained(again, trust_remote_code=True, num_labels=3)
model.train()
loss = model(ids, labels=ids)
with torch.no_grad():
    torch.save({
        "logits": second(ids).logits, "generated": generated, "aux": loss.aux_loss.detach(),
        "classes": [type(model).__name__, type(base).__name__, type(classifier).__name__, type(AutoConfig.from_pretrained(again, trust_remote_code=True)).__name__],
        "implementation": second.config._experts_implementation, "local": "moe_hf" in sys.modules,
    }, again + "/result.pt")
"""


@pytest.mark.parametrize(
    ("family", "fields"), [("llama", {"balance_strategy": "bias", "router_arch": "cosine"}), ("opt", {})]
)
def test_code_travels_with_the_model(family, fields, tmp_path):
    model = upcycle(tiny_dense(family), num_experts=4, noise=0.3, **fields)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, 4))
    ids = random_ids(2, 9)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
    torch.save(ids, tmp_path / "saved" / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED, str(tmp_path / "saved"), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "again" / "result.pt")
    assert not result["local"]
    assert result["classes"] == ["MoEForCausalLM", "MoEModel", "MoEForSequenceClassification", "MoEConfig"]
    assert result["implementation"] == "grouped_mm"
    with torch.no_grad():
        # A kernel's last bit depends on where in memory the weights lie.
        assert torch.allclose(result["logits"], model(ids).logits, rtol=0, atol=1e-5)
    expected = model.generate(ids[:1, :4], max_new_tokens=6, do_sample=False)
    assert torch.equal(result["generated"], expected)


def test_every_modeling_file_travels(tmp_path):
    import moe_hf.modeling

    upcycle(tiny_dense("llama"), num_experts=2).save_pretrained(tmp_path)
    source = Path(moe_hf.modeling.__file__).parent
    for path in source.glob("*.py"):
        if path.name != "__init__.py":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
