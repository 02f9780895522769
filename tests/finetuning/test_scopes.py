"""Laws of the scopes: each names its part of the model and nothing else, on every kind of MoE."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moe_hf
from moe_hf import MoEError
from moe_hf.finetuning import SCOPES, apply_scope, find_moe_blocks, scope_parameter_names
from tests.tiny_models import tiny_dense, tiny_native_moe


def ours(**fields):
    fields = {"shared_expert_intermediate_size": 24, "shared_expert_gate": True, "first_k_dense_replace": 1, **fields}
    return moe_hf.upcycle(tiny_dense("llama"), num_experts=4, allow_inexact=True, **fields)


@pytest.fixture(scope="module")
def model():
    return ours()


def short(names: tuple[str, ...]) -> set[str]:
    """Names without the number of their layer."""
    return {".".join("N" if part.isdigit() else part for part in name.split(".")) for name in names}


EXPERTS = {"model.layers.N.mlp.experts.gate_up_proj", "model.layers.N.mlp.experts.down_proj"}
ROUTER = {"model.layers.N.mlp.gate.weight"}
SHARED = {f"model.layers.N.mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")} | {
    "model.layers.N.mlp.shared_expert_gate.weight"
}
ATTENTION = {f"model.layers.N.self_attn.{name}_proj.weight" for name in "qkvo"}
DENSE_MLP = {f"model.layers.N.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("moe", EXPERTS | ROUTER | SHARED),
        ("experts", EXPERTS),
        ("router", ROUTER),
        ("shared", SHARED),
        ("attention", ATTENTION),
        ("ffn", EXPERTS | ROUTER | SHARED | DENSE_MLP),
    ],
)
def test_scope_names_its_part_of_our_model(scope, expected, model):
    names = scope_parameter_names(model, scope)
    assert short(names) == expected
    first_layer = {name for name in names if ".layers.0." in name}
    assert short(tuple(first_layer)) == expected & (ATTENTION | DENSE_MLP)


def test_moe_and_non_moe_share_all_between_them(model):
    parts = [set(scope_parameter_names(model, scope)) for scope in ("moe", "non_moe", "all")]
    assert parts[0] | parts[1] == parts[2] and not parts[0] & parts[1]
    assert parts[2] == {name for name, _ in model.named_parameters()}
    thirds = [set(scope_parameter_names(model, scope)) for scope in ("experts", "router", "shared")]
    assert set.union(*thirds) == parts[0] and sum(map(len, thirds)) == len(parts[0])


@pytest.mark.parametrize(
    ("family", "shared"),
    [("mixtral", False), ("qwen3_moe", False), ("olmoe", False), ("qwen2_moe", True), ("glm4_moe", True)],
)
def test_scopes_work_on_native_moes(family, shared):
    native = tiny_native_moe(family)
    experts = set(scope_parameter_names(native, "experts"))
    assert experts and all(name.split(".")[-1] in ("gate_up_proj", "down_proj") for name in experts)
    assert all(parameter.ndim == 3 for name, parameter in native.named_parameters() if name in experts)
    router = scope_parameter_names(native, "router")
    assert all(".gate." in name for name in router) and len(router) == len(find_moe_blocks(native))
    moe = set(scope_parameter_names(native, "moe"))
    extra = set(scope_parameter_names(native, "shared")) if shared else set()
    assert moe == experts | set(router) | extra and (not shared or extra)
    assert not moe & set(scope_parameter_names(native, "attention"))
    assert moe <= set(scope_parameter_names(native, "ffn"))


def test_experts_beside_attention_in_one_layer_are_told_apart():
    config = AutoConfig.for_model(
        "gemma4_text", vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size_per_layer_input=64, hidden_size_per_layer_input=0,
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24,
    )  # fmt: skip
    native = AutoModelForCausalLM.from_config(config)
    moe = short(scope_parameter_names(native, "moe"))
    assert any("experts" in name for name in moe) and any("router" in name for name in moe)
    assert not any("self_attn" in name or "norm" in name.split(".")[3] for name in moe)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "falcon_h1", "bloom", "gptj", "phi"])
def test_attention_and_ffn_of_dense_models_are_found_and_disjoint(family):
    dense = tiny_dense(family)
    attention, ffn = (set(scope_parameter_names(dense, scope)) for scope in ("attention", "ffn"))
    assert attention and ffn and not attention & ffn
    layers = dense.config.num_hidden_layers
    upcycled = moe_hf.upcycle(dense, num_experts=2, allow_inexact=True)
    replaced = {name for name, _ in dense.named_parameters()} - {name for name, _ in upcycled.named_parameters()}
    assert ffn == replaced and len(ffn) % layers == 0


def test_report_counts_parameters_and_bytes_and_the_rest_is_frozen():
    upcycled = ours()
    report = apply_scope(upcycled, "experts")
    trained = {name: p for name, p in upcycled.named_parameters() if p.requires_grad}
    assert report.names == tuple(trained)
    assert report.trainable_parameters == sum(p.numel() for p in trained.values())
    assert report.total_parameters == sum(p.numel() for p in upcycled.parameters())
    assert report.trainable_bytes == 4 * report.trainable_parameters
    assert f"{report.trainable_parameters:,}" in str(report) and "MiB" in str(report)
    assert apply_scope(upcycled, "all").trainable_parameters == report.total_parameters


def test_trained_parameters_become_float32_masters_and_the_rest_keeps_its_dtype():
    upcycled = ours().to(torch.bfloat16)
    kept = {id(parameter) for parameter in upcycled.parameters()}
    apply_scope(upcycled, "moe")
    for parameter in upcycled.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert {id(parameter) for parameter in upcycled.parameters()} == kept
    other = ours().to(torch.bfloat16)
    apply_scope(other, "moe", master_dtype=None)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.bfloat16}


def test_tied_parameters_stay_tied():
    tied = moe_hf.upcycle(tiny_dense("llama", tie_word_embeddings=True), num_experts=2).to(torch.bfloat16)
    apply_scope(tied, "non_moe")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and tied.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("scope", ["moe", "experts", "router", "shared"])
def test_scope_that_matches_nothing_fails_and_changes_nothing(scope):
    dense = tiny_dense("llama")
    with pytest.raises(MoEError, match="matches no parameter"):
        apply_scope(dense, scope)
    assert all(parameter.requires_grad for parameter in dense.parameters())


def test_unknown_scope_is_refused_with_the_nearest_name(model):
    with pytest.raises(MoEError, match="Did you mean 'experts'"):
        apply_scope(model, "expert")
    assert set(SCOPES) == {"moe", "experts", "selected", "router", "shared", "non_moe", "attention", "ffn", "all"}
