"""A saved model carries its code: it runs, saves again and reloads where moe_hf cannot be imported."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import moe_hf.modeling
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
    upcycle(tiny_dense("llama"), num_experts=2).save_pretrained(tmp_path)
    source = Path(moe_hf.modeling.__file__).parent
    for path in source.glob("*.py"):
        if path.name != "__init__.py":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


SUBCLASS = """
{imports}


class Mine(MoEForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        return type(outputs)(outputs, logits=2 * outputs.logits)
"""
RELOADED = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
model.save_pretrained(again)
second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
torch.save({"class": type(second).__name__, "logits": second(ids).logits.detach()}, again + "/result.pt")
"""


@pytest.mark.parametrize("place", ["a module", "__main__"])
def test_a_subclass_whose_code_cannot_travel_is_saved_as_ours_with_a_warning(place, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("moe_hf.modeling.travelling_code.logger.warning", said.append)
    source = SUBCLASS.format(imports="from moe_hf import MoEForCausalLM")
    if place == "__main__":
        namespace = {"__name__": "__main__"}
        exec(source, namespace)
        cls = namespace["Mine"]
    else:
        (tmp_path / "users_module.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        cls = importlib.import_module("users_module").Mine
    model = cls(upcycle(tiny_dense("llama"), num_experts=2).config).eval()
    ids = random_ids(2, 9)
    model.save_pretrained(tmp_path / "saved")
    assert "Mine" in said[0] and "does not travel" in said.pop()
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert all((tmp_path / "saved" / f"{name.split('.')[0]}.py").is_file() for name in auto_map.values())
    assert not (tmp_path / "saved" / "users_module.py").exists()
    if place == "__main__":
        return  # the same files
    result = torch.load(run_without_moe_hf(RELOADED, tmp_path, ids) / "result.pt")
    assert result["class"] == "MoEForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(2 * result["logits"], model(ids).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(cls.from_pretrained(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_a_subclass_beside_our_files_takes_its_own_along(tmp_path, monkeypatch):
    package = tmp_path / "users_package"
    shutil.copytree(Path(moe_hf.modeling.__file__).parent, package)
    (package / "mine.py").write_text(SUBCLASS.format(imports="from .modeling_moe import MoEForCausalLM"))
    monkeypatch.syspath_prepend(tmp_path)
    cls = importlib.import_module("users_package.mine").Mine
    dense, ids = tiny_dense("llama"), random_ids(2, 9)
    config = importlib.import_module("users_package.configuration_moe").MoEConfig
    model = cls(config(text_config=dense.config, num_experts=2)).eval()
    model.save_pretrained(tmp_path / "saved")
    result = torch.load(run_without_moe_hf(RELOADED, tmp_path, ids) / "result.pt")
    assert result["class"] == "Mine"
    with torch.no_grad():
        torch.testing.assert_close(result["logits"], model(ids).logits, rtol=0, atol=1e-5)
