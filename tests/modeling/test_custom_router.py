"""A router in a file of its own travels with the model: it loads, routes and is saved again without moe_hf."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, register_router
from moe_hf.modeling.routers import ROUTERS
from tests.tiny_models import random_ids, randomise_, tiny_config


OWN_FILE = '''
import torch

try:
    from .routers import register_router
    from .routing import Routing
except ImportError:
    from moe_hf import register_router
    from moe_hf.modeling.routing import Routing


def by_sign(router_logits, context):
    """The best two experts of the absolute logits, in equal parts."""
    index = router_logits.abs().topk(2, dim=-1).indices
    return Routing(index, torch.full_like(index, 0.5, dtype=router_logits.dtype))


register_router("by_sign", by_sign)
'''
ISOLATED = """
import sys, torch
from transformers import AutoModelForCausalLM

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moe_hf":
            raise ModuleNotFoundError("moe_hf is blocked")

sys.meta_path.insert(0, Blocked())
folder, again = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
ids = torch.load(folder + "/ids.pt")
torch.save(model(ids).logits.detach(), again + "/logits.pt")
"""


@pytest.fixture
def own_router(tmp_path):
    """Import a file that registers a router; afterwards both are gone."""
    before, path = dict(ROUTERS), tmp_path / "by_sign_router.py"
    path.write_text(OWN_FILE)
    spec = importlib.util.spec_from_file_location("by_sign_router", path)
    sys.modules["by_sign_router"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield path
    del sys.modules["by_sign_router"]
    ROUTERS.clear()
    ROUTERS.update(before)


def model_with(router_type: str) -> MoEForCausalLM:
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4, router_type=router_type))
    randomise_(model)
    return model.eval()


def test_a_router_in_its_own_file_travels(own_router, tmp_path):
    model, ids = model_with("by_sign"), random_ids(2, 9)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / own_router.name).read_text() == OWN_FILE
    torch.save(ids, tmp_path / "saved" / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED, str(tmp_path / "saved"), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        cwd=tmp_path / "saved",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        assert torch.allclose(torch.load(tmp_path / "again" / "logits.pt"), model(ids).logits, atol=1e-5)


def test_a_saved_router_that_nobody_registered_is_named_with_what_to_do(own_router, tmp_path):
    model_with("by_sign").save_pretrained(tmp_path / "saved")
    del ROUTERS["by_sign"]
    with pytest.raises(MoEError, match="trust_remote_code=True"):
        MoEForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_router_whose_file_would_replace_one_of_the_models_is_refused(own_router, tmp_path):
    path = own_router.rename(own_router.with_name("routing.py"))
    sys.modules["by_sign_router"].__file__ = str(path)
    with pytest.raises(MoEError, match=r"routing\.py"):
        model_with("by_sign").save_pretrained(tmp_path / "saved")


def test_a_router_without_a_file_is_saved_with_a_warning(own_router, tmp_path, caplog):
    def nowhere(router_logits, context):
        return ROUTERS["by_sign"].function(router_logits, context)

    nowhere.__module__ = "__main__"
    register_router("nowhere", nowhere)
    with caplog.at_level("WARNING"):
        model_with("nowhere").save_pretrained(tmp_path / "saved")
    assert "does not travel" in caplog.text
