"""A saved model carries its code: it runs, saves again and reloads where moe_hf cannot be imported."""

import json
from pathlib import Path

import pytest
import torch

from moe_hf import upcycle
from tests.modeling.isolated import run_without_moe_hf
from tests.tiny_models import random_ids, tiny_dense


ISOLATED = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
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
    ("family", "fields"),
    [
        ("llama", {"balance_strategy": "bias", "router_arch": "cosine"}),
        ("opt", {"routing_level": "prefix", "moe_dense_ffn": "after"}),
        ("qwen3", {"router_type": "dense", "num_experts_per_tok": 4, "output_mixture": "likelihood"}),
    ],
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
    result = torch.load(run_without_moe_hf(ISOLATED, tmp_path, ids) / "result.pt")
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
