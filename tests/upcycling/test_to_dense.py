"""MoE -> dense: what was upcycled comes back, sums of MLPs are exact, and what is approximate says so."""

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle
from moe_hf.upcycling.initialisers import Granular, Permute
from moe_hf.upcycling.surgery.to_dense import to_dense
from moe_hf.upcycling.verification import relative_error
from tests.sampling import sampled
from tests.tiny_models import random_ids, randomise_, tiny_config, tiny_dense


FAMILIES = ["llama", "gpt2", "phi3", "starcoder2", "gemma2"]


def tiny_moe(family: str = "llama", **fields) -> MoEForCausalLM:
    """A random MoE whose experts, routers and biases all differ."""
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config(family), **({"num_experts": 4} | fields)))
    randomise_(model)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(random_ids()).logits


def blocks(model):
    return [model.base_model.get_submodule(site.block) for site in model.base_model._moe_sites]


def assert_same_bits(actual, expected):
    expected = expected.state_dict()
    assert list(actual.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.state_dict().items())


@pytest.mark.parametrize("method", ["average", "expert", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_upcycled_comes_back_bit_by_bit(family, method):
    dense = tiny_dense(family)
    dense.generation_config.max_new_tokens = 7
    back = to_dense(upcycle(dense, num_experts=4), method, expert=1 if method == "expert" else None)
    assert type(back) is type(dense)
    assert_same_bits(back, dense)
    assert back.generation_config.max_new_tokens == 7
    assert back.config.to_diff_dict() == dense.config.to_diff_dict()


EXACT_FORMS = {
    "shared": {"shared_expert_intermediate_size": 88},
    "gated shared": {"shared_expert_intermediate_size": 88, "shared_expert_gate": True, "shared_share": 0.25},
    "wide shared, scaled": {"shared_expert_intermediate_size": 104, "routed_scaling_factor": 2.5},
    "wide experts, dense layer": {"first_k_dense_replace": 1, "moe_intermediate_size": 120},
}


@pytest.mark.parametrize("num_experts", [3, 6, 7])
def test_average_of_equal_experts_is_that_expert_for_any_number(num_experts):
    dense = tiny_dense("llama").bfloat16()
    assert_same_bits(to_dense(upcycle(dense, num_experts=num_experts)), dense)


@pytest.mark.parametrize(("family", "fields"), sampled(FAMILIES, EXACT_FORMS, share=2))
def test_exact_forms_come_back_with_the_width_of_the_dense_model(family, fields):
    dense = tiny_dense(family)
    for method in ("average", "merged"):
        back = to_dense(upcycle(dense, num_experts=4, **fields), method)
        assert relative_error(logits(back), logits(dense)) <= 1e-6
        assert {n: t.shape for n, t in back.state_dict().items()} == {
            n: t.shape for n, t in dense.state_dict().items()
        }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "init",
    [Granular(shards=2), Granular(shards=2, permute=True), Permute()],
    ids=["shards", "permuted shards", "permuted"],
)
def test_shards_and_permuted_copies_are_put_together_again(family, init):
    dense = tiny_dense(family)
    model = upcycle(dense, num_experts=8, num_experts_per_tok=4, init=init)
    back = to_dense(model, "merged")
    assert relative_error(logits(back), logits(dense)) <= 1e-6
    assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"num_experts_per_tok": 4, "routed_scaling_factor": 1.5},
        {"num_experts_per_tok": 4, "shared_expert_intermediate_size": 24, "first_k_dense_replace": 1},
    ],
    ids=["one expert", "all experts", "all experts, shared, a dense layer"],
)
def test_merging_experts_of_constant_weight_is_exact(family, fields):
    model = tiny_moe(family, **fields)
    with torch.no_grad():
        for block in blocks(model):
            block.gate.weight.zero_()
    back = to_dense(model, "merged")
    assert relative_error(logits(back), logits(model)) <= 1e-6
    # Each neuron is there once: E experts and the shared one beside each other.
    width = fields.get("num_experts", 4) * 88 + fields.get("shared_expert_intermediate_size", 0)
    assert max(p.shape[0] for name, p in back.named_parameters() if "mlp" in name) >= width


def test_family_with_a_width_per_layer_gets_them_and_one_without_a_field_is_refused():
    model = tiny_moe("gemma3n_text", num_experts_per_tok=4)
    with torch.no_grad():
        for block in blocks(model):
            block.gate.weight.zero_()
    back = to_dense(model, "merged")
    assert relative_error(logits(back), logits(model)) <= 1e-6
    assert len(set(back.config.intermediate_size)) == 1
    with pytest.raises(MoEError, match="no field"):
        to_dense(tiny_moe("bloom"), "merged")


def test_methods_differ_from_the_model_where_weights_vary_and_measured_weights_are_nearer():
    model = tiny_moe(num_experts_per_tok=4)
    expected = logits(model)
    uniform = relative_error(logits(to_dense(model, "merged")), expected)
    measured = relative_error(logits(to_dense(model, "merged", inputs=random_ids())), expected)
    assert 1e-3 < measured < uniform


def test_shared_gate_that_varies_is_measured():
    model = tiny_moe(shared_expert_intermediate_size=24, shared_expert_gate=True)
    with pytest.raises(MoEError, match="gate of the shared expert"):
        to_dense(model)
    ids = random_ids()
    block = blocks(model)[0]
    seen = []
    handle = block.shared_expert_gate.register_forward_hook(
        lambda module, args, output: seen.append(output.sigmoid().mean())
    )
    logits(model)
    handle.remove()
    down = to_dense(model, "merged", inputs=ids).model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(down[:, -24:], block.shared_expert.down_proj.weight * seen[0])


def test_weights_without_a_known_sum_are_measured():
    model = tiny_moe(norm_topk_prob=False)
    with pytest.raises(MoEError, match="no known sum"):
        to_dense(model)
    with torch.no_grad():
        for block in blocks(model):
            block.gate.weight.zero_()
    # All scores are 1/4, and of equal scores the same two experts are always taken.
    down = to_dense(model, "merged", inputs=random_ids()).model.layers[0].mlp.down_proj.weight
    chosen = blocks(model)[0].gate(torch.zeros(1, 48))[2].flatten().sort().values
    assert len(chosen) == 2
    torch.testing.assert_close(down, torch.cat([0.25 * blocks(model)[0].experts.down_proj[e] for e in chosen], 1))


def test_usage_weights_the_average():
    model = tiny_moe()
    usage = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 2.0, 0], [1.0, 1, 1, 1]])
    mlps = [layer.mlp for layer in to_dense(model, usage=usage).model.layers]
    for mlp, block, weights in zip(mlps, blocks(model), usage, strict=True):
        weights = weights / weights.sum()
        expected = torch.einsum("e,eoi->oi", weights, block.experts.down_proj)
        torch.testing.assert_close(mlp.down_proj.weight, expected)
        gate, up = torch.einsum("e,eoi->oi", weights, block.experts.gate_up_proj).chunk(2)
        torch.testing.assert_close(mlp.gate_proj.weight, gate)
        torch.testing.assert_close(mlp.up_proj.weight, up)


def test_learned_activation_is_carried_and_a_different_one_of_the_shared_expert_refused():
    model = tiny_moe("apertus", num_experts=1, num_experts_per_tok=1)
    assert relative_error(logits(to_dense(model)), logits(model)) <= 1e-6
    with pytest.raises(MoEError, match="activations"):
        to_dense(tiny_moe("apertus", shared_expert_intermediate_size=24))


def test_bias_that_the_dense_mlp_has_no_place_for_is_refused():
    model = upcycle(tiny_dense("gpt2"), num_experts=2)
    back = to_dense(model)
    back.transformer.h[0].mlp.c_fc.bias = None
    from moe_hf.modeling.dense_mlp import find_mlp_sites
    from moe_hf.upcycling.surgery.to_dense import _routed_mlps, _write

    (site, *_), block = find_mlp_sites(back.transformer), blocks(model)[0]
    with pytest.raises(MoEError, match="c_fc"), torch.no_grad():
        _write(back.transformer.h[0].mlp, site, _routed_mlps(block)[0])


def test_the_given_model_is_unchanged(tmp_path):
    model = tiny_moe()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    back = to_dense(model, "merged")
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    back.save_pretrained(tmp_path)
    assert relative_error(logits(type(back).from_pretrained(tmp_path)), logits(back)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, "must be one of"),
        ({"method": "expert"}, "0 to 3"),
        ({"method": "expert", "expert": 4}, "0 to 3"),
        ({"expert": 1}, "does not read"),
        ({"usage": torch.ones(3)}, "usage must be"),
        ({"usage": torch.zeros(4)}, "usage must be"),
        ({"inputs": torch.ones(2, 3)}, "token ids"),
    ],
)
def test_mistakes_are_one_clear_error(arguments, message):
    with pytest.raises(MoEError, match=message):
        to_dense(tiny_moe(), **arguments)


def test_a_dense_model_is_refused():
    with pytest.raises(MoEError, match="MoEForCausalLM"):
        to_dense(tiny_dense("llama"))
