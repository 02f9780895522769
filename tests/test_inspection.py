"""Facts of models against counts made by hand."""

import pytest
from transformers import AutoConfig

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, inspect_model
from tests.tiny_models import tiny_config, tiny_dense, tiny_native_moe


def moe(**fields):
    return MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), **fields))


def test_parts_add_up_to_the_total_and_active_is_all_but_the_idle_experts():
    facts = inspect_model(moe(num_experts=5, num_experts_per_tok=2))
    # D 48, F 88, 3 layers: gate, up and down of one expert are 3 * 48 * 88 weights.
    expert = 3 * 48 * 88
    assert sum(facts.parameters_per_part.values()) == facts.total_parameters
    assert facts.parameters_per_part["routed experts"] == 3 * 5 * expert
    assert facts.parameters_per_part["routers"] == 3 * 5 * 48
    assert facts.total_parameters - facts.active_parameters == 3 * (5 - 2) * expert
    assert (facts.num_layers, facts.num_moe_layers, facts.num_experts, facts.num_experts_per_tok) == (3, 3, 5, 2)


def test_shared_experts_and_dense_layers_are_counted_apart():
    facts = inspect_model(moe(num_experts=4, shared_expert_intermediate_size=24, mlp_only_layers=[1]))
    assert facts.parameters_per_part["shared experts"] == 2 * 3 * 48 * 24
    assert facts.parameters_per_part["dense MLPs"] == 3 * 48 * 88
    assert facts.num_moe_layers == 2


def test_flops_are_two_per_weight_that_a_token_meets():
    dense = tiny_dense("llama", tie_word_embeddings=False)
    matrices = [p.numel() for name, p in dense.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert inspect_model(dense).flops_per_token == 2 * sum(matrices)
    tied = tiny_dense("llama", tie_word_embeddings=True)
    assert inspect_model(tied).flops_per_token == inspect_model(dense).flops_per_token
    assert inspect_model(tied).embedding_parameters == inspect_model(dense).embedding_parameters // 2


def test_one_expert_costs_the_dense_arithmetic_and_its_router():
    dense = inspect_model(tiny_dense("llama"))
    single = inspect_model(moe(num_experts=4, num_experts_per_tok=1))
    assert single.flops_per_token - dense.flops_per_token == 2 * 3 * 4 * 48


def arithmetic(**fields) -> int:
    return inspect_model(
        MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=8, **fields))
    ).flops_per_token


def test_sub_tokens_use_their_experts_one_by_one_and_a_merged_expert_costs_its_merging():
    plain, matrices = arithmetic(), 3 * 48 * 88
    # Three layers with two projections more; two experts for each of three sub-tokens, a third as wide; a router too.
    assert arithmetic(num_moe_heads=3) - plain == 2 * 3 * (2 * 48 * 48 - 8 * 48 * 2 // 3)
    merged = arithmetic(router_type="segment_merge", num_experts_per_tok=8, router_kwargs={"segment_length": 32})
    assert merged - plain == 2 * 3 * (matrices + matrices * 8 / 32 - 2 * matrices)


def test_memory_follows_the_dtype():
    facts = inspect_model(tiny_dense("llama"))
    assert facts.memory_bytes["float32"] == 4 * facts.total_parameters
    assert facts.memory_bytes["bfloat16"] == 2 * facts.total_parameters


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_native_moes_are_inspected_too(family):
    facts = inspect_model(tiny_native_moe(family))
    assert (facts.num_experts, facts.num_experts_per_tok, facts.num_moe_layers) == (4, 2, 3)
    assert facts.active_parameters == facts.total_parameters - facts.parameters_per_part["routed experts"] // 2


def test_dense_models_have_no_routing():
    facts = inspect_model(tiny_dense("gpt2"))
    assert facts.active_parameters == facts.total_parameters
    assert (facts.num_experts, facts.routing) == (0, {})


def test_a_folder_and_the_model_in_memory_have_the_same_facts(tmp_path):
    model = moe(num_experts=4)
    model.config.save_pretrained(tmp_path)
    from_folder, in_memory = inspect_model(tmp_path).to_dict(), inspect_model(model).to_dict()
    del from_folder["name"], in_memory["name"]
    assert from_folder == in_memory


def test_something_else_than_a_causal_model_is_refused(tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(MoEError, match="no causal language model"):
        inspect_model(tmp_path)
