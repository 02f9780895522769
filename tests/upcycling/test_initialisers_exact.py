"""Exact ways to upcycle: the dense logits to 1e-6 in float32, for each family; and what 16 bits do to them."""

import pytest
import torch

from moe_hf import MoEError, upcycle
from moe_hf.upcycling.initialisers import Granular, Permute
from tests.sampling import sampled
from tests.tiny_models import tiny_dense
from tests.upcycling.exactness_table import EXACT_MODES, FAMILIES, WIDTH, float32_error, logits, wide_dense


@pytest.mark.parametrize(("family", "mode"), sampled(FAMILIES, EXACT_MODES.keys()))
def test_an_exact_mode_gives_the_dense_logits(family, mode):
    assert float32_error(family, mode) <= 1e-6


@pytest.mark.parametrize("init", ["copy", "drop", "permute", Granular(shards=2), "split"], ids=str)
@pytest.mark.parametrize(
    "layers", [{"decoder_sparse_step": 2}, {"first_k_dense_replace": 2}, {"mlp_only_layers": [1]}]
)
def test_layers_that_stay_dense_keep_their_bytes(init, layers):
    dense = wide_dense("gpt2")
    moe = upcycle(dense, num_experts=4, init=init, **layers)
    kept, before = moe.state_dict(), dense.state_dict()
    untouched = [name for name in before if name in kept]
    assert all(torch.equal(kept[name], before[name]) for name in untouched)
    mlps = {name.split(".")[2] for name in untouched if "mlp.c_fc" in name}
    assert mlps == {str(i) for i in range(3) if not moe.config.is_moe_layer(i)}


def megatron_ffn(gate, up, down, inputs, shards):
    """The rule of Megatron-Core's upcycling_utils: the cube root of G on each of the three projections."""
    scale = shards ** (1 / 3)
    hidden = torch.nn.functional.silu(inputs @ (scale * gate).t()) * (inputs @ (scale * up).t())
    return hidden @ (scale * down).t() / shards


@pytest.mark.parametrize(("shards", "megatron"), [(2, 0.06), (4, 0.13), (8, 0.21)])
def test_granular_is_exact_where_the_cube_root_rule_is_not(shards, megatron):
    dense = wide_dense("llama")
    fields = {"num_experts": 2 * shards, "num_experts_per_tok": shards}
    moe = upcycle(dense, init=Granular(shards=shards), **fields)
    mlp, block = dense.model.layers[0].mlp, moe.model.layers[0].mlp
    inputs = torch.randn(256, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = mlp(inputs), block(inputs)
        other = megatron_ffn(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, inputs, shards)
    assert float((actual - expected).norm() / expected.norm()) <= 5e-7
    assert float((other - expected).norm() / expected.norm()) == pytest.approx(megatron, abs=0.015)


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_granular_with_a_routed_scaling_factor_of_g_changes_no_weight(family):
    dense = wide_dense(family)
    moe = upcycle(dense, init=Granular(shards=4), num_experts=8, num_experts_per_tok=4, routed_scaling_factor=4.0)
    mlp = dense.model.layers[1].mlp
    down = mlp.down_proj.weight if family == "llama" else mlp.c_proj.weight
    experts = moe.model.layers[1].mlp.experts
    for expert in range(8):
        part = slice(112 * (expert % 4), 112 * (expert % 4 + 1))
        assert torch.equal(experts.down_proj[expert], down[:, part])
        if family == "starcoder2":
            assert torch.equal(experts.up_proj[expert], mlp.c_fc.weight[part])
            assert torch.equal(experts.up_proj_bias[expert], mlp.c_fc.bias[part])


def test_shards_of_a_copy_are_neighbours_with_one_router_row_and_are_chosen_together():
    moe = upcycle(wide_dense("llama"), init=Granular(shards=4), num_experts=12, num_experts_per_tok=8)
    gate = moe.model.layers[0].mlp.gate
    rows = gate.weight.view(3, 4, -1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and not torch.equal(rows[0, 0], rows[1, 0])
    with torch.no_grad():
        _, _, chosen = gate(torch.randn(64, 48))
    copies = (chosen // 4).sort(-1).values.view(64, 2, 4)
    assert (copies == copies[..., :1]).all() and (copies[:, 0] != copies[:, 1]).all()


def test_dense_widths_that_differ_between_layers_are_filled_up():
    dense = tiny_dense("gemma3n_text", intermediate_size=[96, 64, 32])
    copied = upcycle(dense, num_experts=4)
    assert copied.config.moe_intermediate_size is None
    assert [layer.mlp.experts.down_proj.shape[-1] for layer in copied.model.layers] == [96, 64, 32]
    cut = upcycle(dense, init=Granular(shards=2), num_experts=4)
    assert cut.config.moe_intermediate_size == 48 and cut.config.upcycling["verification"]["relative_error"] <= 1e-6
    narrow = cut.model.layers[2].mlp.experts.down_proj
    assert (narrow[..., :16] != 0).all() and (narrow[..., 16:] == 0).all()
    split = upcycle(dense, init="split", num_experts=4)
    assert split.config.moe_intermediate_size == 24
    assert (split.model.layers[2].mlp.experts.down_proj[..., 8:] == 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neurons_of_zeros_stay_zero_in_training(family):
    dense = wide_dense(family)
    moe = upcycle(dense, init=Permute(), num_experts=4, moe_intermediate_size=WIDTH + 16, noise=0.05).train()
    before = logits(moe).detach()
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        ids = torch.randint(3, 113, (4, 24))
        moe(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    experts = (moe.model if family == "llama" else moe.transformer).get_submodule(
        "layers.1.mlp.experts" if family == "llama" else "h.1.mlp.experts"
    )
    assert (experts.down_proj[..., :WIDTH] != 0).any() and (experts.down_proj[..., WIDTH:] == 0).all()
    first = experts.gate_up_proj.view(4, 2, -1, 48) if family == "llama" else experts.up_proj.view(4, 1, -1, 48)
    assert (first[:, :, WIDTH:] == 0).all()
    if family == "gpt2":
        assert (experts.up_proj_bias[:, WIDTH:] == 0).all()
    assert not torch.allclose(logits(moe), before, atol=1e-2)


def test_factors_that_16_bits_round_are_refused_with_both_errors():
    dense = tiny_dense("llama").bfloat16()
    fields = {"num_experts": 4, "shared_expert_intermediate_size": 88, "shared_share": 0.3}
    with pytest.raises(MoEError, match=r"own dtype makes \S+e-0[23].*0\.3, 0\.7.*bfloat16 rounds.*allow_inexact=True"):
        upcycle(dense, **fields)
    moe = upcycle(dense, allow_inexact=True, **fields)
    measured = moe.config.upcycling["verification"]
    assert 1e-5 < measured["relative_error"] < measured["rounding_error"]


@pytest.mark.parametrize("shards", [2, 4])
def test_powers_of_two_are_exact_in_16_bits(shards):
    dense = tiny_dense("llama", intermediate_size=WIDTH).half()
    moe = upcycle(dense, init=Granular(shards=shards), num_experts=8, num_experts_per_tok=shards)
    assert moe.dtype == torch.float16 and moe.config.upcycling["verification"]["relative_error"] <= 1e-6
