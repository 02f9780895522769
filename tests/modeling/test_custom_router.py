"""A router in a file of its own travels with the model: it loads, routes and is saved again without moe_hf."""

import importlib.util
import sys

import pytest
import torch

from examples import load_aware_router  # noqa: F401 - importing it registers the router
from moe_hf import MoEConfig, MoEError, MoEForCausalLM, register_router, update_router_state
from moe_hf.modeling.router import Router
from moe_hf.modeling.routers import ROUTERS
from tests.modeling.isolated import logits_without_moe_hf
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


@torch.no_grad()
def test_a_router_in_its_own_file_travels(own_router, tmp_path):
    model, ids = model_with("by_sign"), random_ids(2, 9)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / own_router.name).read_text() == OWN_FILE
    assert torch.allclose(logits_without_moe_hf(tmp_path, ids), model(ids).logits, atol=1e-5)


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


def test_state_and_its_rule_come_together():
    for fields in ({"state": ("total",)}, {"update": lambda state, observed, arguments: state}):
        with pytest.raises(MoEError, match="Give both, or neither"):
            register_router("half", lambda router_logits, context: None, **fields)
    assert "half" not in ROUTERS


@torch.no_grad()
def test_what_a_router_of_ones_own_has_learned_is_saved_and_travels(tmp_path):
    model, ids = model_with("load_aware"), random_ids(2, 9)
    gates = [module for module in model.modules() if isinstance(module, Router)]
    fresh = model(ids).logits
    for layer, gate in enumerate(gates):
        gate.surplus.copy_(torch.tensor([0.2, -0.2, 0.1, -0.1]).roll(layer))
    assert not torch.allclose(model(ids).logits, fresh, atol=1e-2)
    model.save_pretrained(tmp_path / "saved")
    loaded = MoEForCausalLM.from_pretrained(tmp_path / "saved")
    assert [name for name in loaded.state_dict() if name.endswith("surplus")]
    assert torch.allclose(loaded.eval()(ids).logits, model(ids).logits, atol=1e-5)
    assert torch.allclose(logits_without_moe_hf(tmp_path, ids), model(ids).logits, atol=1e-5)


def test_state_moves_once_per_update_by_the_choices_of_training_and_by_real_tokens_alone():
    model, ids = model_with("load_aware").train(), random_ids(2, 9)
    gate = next(module for module in model.modules() if isinstance(module, Router))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    chosen = []
    handle = gate.register_forward_hook(lambda module, args, output: chosen.append(output[2][mask.flatten().bool()]))
    for _ in range(2):  # two micro-batches of one step
        model(ids, attention_mask=mask)
    handle.remove()
    counts = torch.cat(chosen).flatten().bincount(minlength=4)
    assert int(counts.sum()) == 2 * 14 * 2
    assert torch.equal(gate.surplus, torch.zeros(4))
    update_router_state(model)
    assert torch.allclose(gate.surplus, 0.1 * (counts / counts.sum() - 0.25), atol=1e-7)
    before = gate.surplus.clone()
    model.eval()(ids)
    update_router_state(model)
    assert torch.equal(gate.surplus, before)
    assert model.to(torch.bfloat16).model.layers[0].mlp.gate.surplus.dtype == torch.float32
