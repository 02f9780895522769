"""The presets: each builds, trains, and has the layers, experts and active parameters that its paper says."""

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.modeling.presets import PRESETS
from tests.tiny_models import random_ids, tiny_config


LAYERS = 12
# With fewer and narrower experts than the papers', so that all of them can run here.
SMALL = {
    "switch": {"num_experts": 8},
    "glam": {"num_experts": 8},
    "st_moe": {"num_experts": 8},
    "expert_choice": {"num_experts": 8},
    "deepseek_moe": {"num_experts": 8},
    "dynamic_moe": {"num_experts": 8},
    "deepseek_v3": {"num_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    "lory": {"router_kwargs": {"segment_length": 4}},
    "mh_moe": {"num_experts": 8},
    "pr_moe": {"num_experts": 4, "num_experts_per_layer": [0, 2, 0, 4]},
}
# MoE layers of 12, routed experts, experts per token.
NUMBERS = {
    "jacobs1991": (12, 8, 8),
    "eigen2013": (12, 8, 8),
    "bengio2013": (12, 8, 2),
    "bengio2015": (12, 8, 2),
    "shazeer2017": (12, 8, 4),
    "gshard": (6, 8, 2),
    "switch": (6, 128, 1),
    "vmoe": (12, 8, 2),
    "glam": (6, 64, 2),
    "pr_moe": (6, 64, 1),
    "st_moe": (3, 64, 2),
    "expert_choice": (6, 64, 2),
    "deepseek_moe": (11, 64, 6),
    "mixtral": (12, 8, 2),
    "dynamic_moe": (6, 16, 2),
    "lory": (12, 8, 8),
    "mh_moe": (12, 40, 2),
    "deepseek_v3": (9, 256, 8),
    "expert_threshold": (12, 16, 1),
}


def test_every_preset_is_listed_with_its_source_and_what_differs_in_a_decoder():
    listed = MoEConfig.presets()
    assert listed.keys() == PRESETS.keys() == NUMBERS.keys()
    assert all(". In a decoder: " in text and len(text) > 60 for text in listed.values())
    for name, preset in PRESETS.items():
        assert set(preset.not_read) <= set(preset.fields)
        assert (f"Not read in the source itself: {', '.join(preset.not_read)}." in listed[name]) == bool(
            preset.not_read
        )


@pytest.mark.parametrize("name", PRESETS)
def test_layers_experts_and_experts_per_token_are_those_of_the_source(name):
    config = MoEConfig.from_preset(name, tiny_config("llama", num_hidden_layers=LAYERS))
    layers = [i for i in range(LAYERS) if config.is_moe_layer(i)]
    assert (len(layers), config.num_experts, config.num_experts_per_tok) == NUMBERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_builds_trains_and_survives_a_save(name, tmp_path):
    torch.manual_seed(0)
    config = MoEConfig.from_preset(name, tiny_config("llama", num_hidden_layers=4), **SMALL.get(name, {}))
    model, ids = MoEForCausalLM(config).train(), random_ids(2, 12)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    blocks = [module for module in model.modules() if isinstance(module, MoEBlock)]
    assert blocks and all(torch.isfinite(block.experts.down_proj.grad).all() for block in blocks)
    assert any(block.gate.weight.grad is not None and block.gate.weight.grad.abs().max() > 0 for block in blocks)
    config.save_pretrained(tmp_path)
    again = MoEConfig.from_pretrained(tmp_path)
    own = PRESETS[name].fields | SMALL.get(name, {})
    assert all(getattr(again, field) == getattr(config, field) for field in own)


def active_expert_parameters(config: MoEConfig) -> int:
    """Parameters of the gated experts, routed and shared, that a token uses in one MoE layer; D = 48, F = 288."""
    width = config.moe_intermediate_size or 288
    return 3 * 48 * (config.num_experts_per_tok * width + config.shared_expert_intermediate_size)


@pytest.mark.parametrize(
    ("name", "in_units_of_the_dense_mlp"),
    [("mixtral", 2), ("switch", 1), ("glam", 2), ("deepseek_moe", 2), ("pr_moe", 2), ("deepseek_v3", 1)],
)
def test_active_parameters_of_a_moe_layer(name, in_units_of_the_dense_mlp):
    # DeepSeekMoE: 6 + 2 quarters; DeepSeek-V3: 8 + 1 ninths.
    dense = tiny_config("llama", num_hidden_layers=LAYERS, intermediate_size=288)
    config = MoEConfig.from_preset(name, dense)
    assert active_expert_parameters(config) == in_units_of_the_dense_mlp * 3 * 48 * 288


def test_mixtral_8x7b_has_its_published_number_of_parameters():
    # 46,702,792,704 in all and 12,879,925,248 active, of which 32 layers have 8 experts (2 of them active) of 3 D F.
    text_config = tiny_config("mistral", num_hidden_layers=32, hidden_size=4096, intermediate_size=14336)
    config = MoEConfig.from_preset("mixtral", text_config)
    expert = 3 * 4096 * 14336
    idle = config.num_experts - config.num_experts_per_tok
    assert 32 * idle * expert == 46_702_792_704 - 12_879_925_248


def test_sizes_follow_the_dense_model():
    dense = tiny_config("llama", hidden_size=768, num_attention_heads=12, intermediate_size=2048, num_hidden_layers=24)
    assert MoEConfig.from_preset("mh_moe", dense).moe_intermediate_size == 768
    pyramid = MoEConfig.from_preset("pr_moe", dense)
    assert pyramid.num_experts_per_layer == [0, 32] * 10 + [0, 64] * 2
    assert MoEConfig.from_preset("deepseek_v3", dense).first_k_dense_replace == 3


def test_coefficients_of_papers_that_add_up_layers_are_converted_to_the_mean():
    dense = tiny_config("llama", num_hidden_layers=LAYERS)
    assert MoEConfig.from_preset("switch", dense).router_aux_loss_coef == pytest.approx(6 * 0.01)
    st_moe = MoEConfig.from_preset("st_moe", dense)
    assert (st_moe.router_aux_loss_coef, st_moe.router_z_loss_coef) == pytest.approx((3 * 0.01, 3 * 0.001))
    assert MoEConfig.from_preset("switch", dense, router_aux_loss_coef=0.5).router_aux_loss_coef == 0.5


def test_overrides_win_dicts_work_and_mistakes_are_errors():
    dense = tiny_config("llama")
    assert MoEConfig.from_preset("mixtral", dense.to_dict(), num_experts=4).num_experts == 4
    with pytest.raises(MoEError, match="no preset 'mixtrall'"):
        MoEConfig.from_preset("mixtrall", dense)
    with pytest.raises(MoEError, match="num_experts_per_tok"):
        MoEConfig.from_preset("mixtral", dense, num_experts_per_tok=9)
    with pytest.raises(MoEError, match="width of the dense MLP"):
        MoEConfig.from_preset("mh_moe", tiny_config("bloom"))
