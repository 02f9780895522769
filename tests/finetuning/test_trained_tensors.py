"""What a save would lose: nothing of a model that is as its configuration says, whatever its family."""

import pytest
import torch
from torch import nn

import moe_hf
from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.finetuning.trained_tensors import lost_names, trained_tensors
from tests.families import FAMILIES, SLICE
from tests.tiny_models import tiny_config, tiny_dense, tiny_native_moe


EVERY = [pytest.param(name, marks=[] if name in SLICE else pytest.mark.slow) for name in FAMILIES]
NATIVE = ("mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe", "granitemoe", "gpt_oss")


@pytest.mark.parametrize("family", EVERY)
def test_a_model_of_any_family_and_the_moe_made_of_it_lose_nothing(family):
    dense = tiny_dense(family)
    assert lost_names(dense) == [] and lost_names(moe_hf.upcycle(dense, num_experts=2)) == []


@pytest.mark.parametrize("family", NATIVE)
def test_a_native_moe_loses_nothing(family):
    assert lost_names(tiny_native_moe(family)) == []


@pytest.mark.parametrize("preset", MoEConfig.presets())
def test_a_moe_of_a_paper_loses_nothing(preset):
    assert lost_names(MoEForCausalLM(MoEConfig.from_preset(preset, tiny_config("llama", num_hidden_layers=4)))) == []


def test_what_the_configuration_does_not_say_is_lost():
    model = moe_hf.upcycle(tiny_dense("llama"), num_experts=2)
    model.lm_head = nn.Linear(48, 7, bias=False)  # another width than vocab_size
    model.model.layers[0].mlp.register_parameter("scale", nn.Parameter(torch.ones(48)))
    assert lost_names(model) == ["lm_head.weight", "model.layers.0.mlp.scale"]


@pytest.mark.parametrize("scope", ["router", "experts"])
def test_a_correction_bias_is_kept_where_its_router_trains(scope):
    model = moe_hf.upcycle(tiny_dense("llama"), num_experts=2, balance_strategy="bias")
    moe_hf.apply_scope(model, scope)
    assert any("e_score_correction_bias" in name for name in trained_tensors(model)) == (scope == "router")
