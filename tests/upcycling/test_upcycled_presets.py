"""Presets of papers serve upcycling: exact where they can be, refused before anything is made where they cannot."""

import json

import pytest

from moe_hf import MoEConfig, MoEError, plan_upcycling, upcycle, upcycle_checkpoint
from moe_hf.modeling.presets import PRESETS
from moe_hf.upcycling import fill
from tests.modeling.test_presets import SMALL
from tests.tiny_models import tiny_dense


EXACT = {"jacobs1991", "eigen2013", "shazeer2017", "gshard", "glam", "st_moe", "mixtral", "lory"}
# What the error has to name of those that give a token weights that do not sum to 1, or have no place for a dense MLP.
OFFENDING = {
    "bengio2013": "scoring_func='sigmoid'",
    "bengio2015": "scoring_func='sigmoid'",
    "switch": "num_experts_per_tok=1",
    "vmoe": "norm_topk_prob=False",
    "pr_moe": "num_experts_per_tok=1",
    "expert_choice": "norm_topk_prob=False",
    "deepseek_moe": "moe_intermediate_size=24",
    "dynamic_moe": "norm_topk_prob=False",
    "mh_moe": "num_moe_heads=2",
    "deepseek_v3": "moe_intermediate_size=8",
    "expert_threshold": "num_experts_per_tok=1",
}


@pytest.fixture(scope="module")
def dense():
    return tiny_dense("llama", num_hidden_layers=4)


def test_each_preset_is_exact_or_refused():
    assert EXACT.isdisjoint(OFFENDING) and EXACT | OFFENDING.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", sorted(EXACT))
def test_a_preset_that_keeps_the_dense_function_does(name, dense):
    moe = upcycle(dense, preset=name, **SMALL.get(name, {}))
    assert moe.config.upcycling["verification"]["relative_error"] <= 1e-5
    expected = MoEConfig.from_preset(name, dense.config, **SMALL.get(name, {}))
    own = [field for field in PRESETS[name].fields if field != "moe_intermediate_size"]
    assert all(getattr(moe.config, field) == getattr(expected, field) for field in own)


@pytest.mark.parametrize("name", OFFENDING)
def test_a_preset_that_does_not_is_refused_with_its_fields_before_anything_is_made(name, dense, monkeypatch, tmp_path):
    monkeypatch.setattr(fill, "slot_rows", None)
    with pytest.raises(MoEError, match=rf"preset='{name}' sets .*{OFFENDING[name]}"):
        upcycle(dense, preset=name, **SMALL.get(name, {}))


def test_fields_that_are_given_win_over_the_preset(dense, tmp_path):
    config = upcycle(dense, preset="switch", num_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0).config
    assert (config.num_experts, config.num_experts_per_tok, config.router_jitter_noise) == (4, 2, 0.0)
    assert (config.capacity_factor, config.decoder_sparse_step, config.norm_topk_prob) == (1.25, 2, True)
    assert upcycle(dense, preset="switch", num_experts=4, allow_inexact=True).config.num_experts_per_tok == 1
    with pytest.raises(MoEError, match="Did you mean 'switch'"):
        upcycle(dense, preset="swich")


def test_a_preset_on_disk_gives_what_it_gives_in_memory_or_nothing(dense, tmp_path):
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(MoEError, match="preset='switch' sets norm_topk_prob=False, num_experts_per_tok=1"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", preset="switch", num_experts=4)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", preset="mixtral", num_experts=4)
    file = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (file["num_experts"], file["num_experts_per_tok"], file["router_aux_loss_coef"]) == (4, 2, 0.002)
    assert "norm_topk_prob=False" in plan_upcycling(tmp_path / "dense", preset="switch").why_inexact
