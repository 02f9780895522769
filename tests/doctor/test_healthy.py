"""Models that are as they should be have neither errors nor warnings, however unusual they look."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_hf
from moe_hf.doctor import examine
from tests.doctor.faults import is_silent, learnt, rewrite, saved, trained
from tests.tiny_models import tiny_dense, tiny_native_moe


ROUTED = {"moe_intermediate_size": 56}
FAMILIES = {
    "mixtral": {},
    "qwen2_moe": ROUTED,
    "qwen3_moe": ROUTED,
    "olmoe": {},
    "deepseek_v3": ROUTED | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "gpt_oss": {},
    "granitemoe": {},
    "phimoe": {},
    "llama4_text": {},
    "ernie4_5_moe": ROUTED,
    "glm4_moe": ROUTED,
    "minimax": {},
    "gemma4_text": ROUTED | {"enable_moe_block": True, "top_k_experts": 2},
    "jamba": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family_and_what_was_trained_from_it(family, tmp_path):
    make = lambda: learnt(family, **FAMILIES[family])  # noqa: E731
    base = saved(make(), tmp_path / "base")
    assert is_silent(examine(base))
    model = trained(make(), by=0.3)
    assert is_silent(examine(model, base=base))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_random_numbers_that_learnt_nothing_yet(family):
    assert is_silent(examine(tiny_native_moe(family)))


def test_experts_that_resemble_their_base_no_more(tmp_path):
    """No finding follows from the size of a difference alone."""
    base = saved(learnt(), tmp_path / "base")
    model = trained(learnt(), by=2.5, only=".experts.")
    for layer, other in zip(model.model.layers, learnt().model.layers, strict=True):
        one, two = (x.mlp.experts.gate_up_proj.flatten() for x in (layer, other))
        assert torch.nn.functional.cosine_similarity(one, two, dim=0) < 0.5
    assert is_silent(examine(model, base=base))


def test_parts_that_did_not_train(tmp_path):
    base = saved(learnt(), tmp_path / "base")
    for part in ("self_attn", "mlp.gate", ".experts."):
        assert is_silent(examine(trained(learnt(), only=part), base=base))


def test_a_cast_to_16_bits(tmp_path):
    base = saved(learnt(), tmp_path / "base")
    assert is_silent(examine(learnt().to(torch.bfloat16), base=base))


@pytest.fixture(scope="module")
def dense():
    return tiny_dense("llama", vocab_size=61)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "drop"},
        {"init": "permute"},
        {"init": "granular", "num_experts": 8, "num_experts_per_tok": 4},
        {"noise": 0.01},
        {"router_init": "zero"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "copies",
)
def test_fresh_upcycled_copies(dense, options):
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "allow_inexact": True} | options
    model = moe_hf.upcycle(dense, **settings)
    assert is_silent(examine(model))
    assert is_silent(examine(model, base=dense))
    assert is_silent(examine(trained(model, only=".experts."), base=dense))


def test_grown_pruned_and_merged_models(dense, tmp_path):
    moe = trained(moe_hf.upcycle(dense, num_experts=4, num_experts_per_tok=2), only="mlp.")
    base = saved(moe, tmp_path / "base")
    grown = moe_hf.grow_experts(AutoModelForCausalLM.from_pretrained(base), 2)
    assert is_silent(examine(grown)) and is_silent(examine(grown, base=base))
    pruned = moe_hf.remove_experts(AutoModelForCausalLM.from_pretrained(base), [1])
    assert is_silent(examine(pruned)) and is_silent(examine(pruned, base=base))
    other = trained(AutoModelForCausalLM.from_pretrained(base), seed=9, only="mlp.")
    with torch.no_grad():
        for one, two in zip(other.parameters(), moe.parameters(), strict=True):
            one.copy_((one + two) / 2)
    assert is_silent(examine(other, base=base))


def test_a_native_export_and_its_low_memory_folder(dense, tmp_path):
    moe = trained(moe_hf.upcycle(dense, num_experts=4, num_experts_per_tok=2), only="mlp.")
    base = saved(moe, tmp_path / "moe")
    moe_hf.export_native(base, tmp_path / "native", target="mixtral")
    assert is_silent(examine(tmp_path / "native"))
    small = AutoModelForCausalLM.from_pretrained(base)
    moe_hf.quantize_experts(small, "int8")
    assert is_silent(examine(small, base=base))
    moe_hf.save_low_memory(small, tmp_path / "small")
    report = examine(tmp_path / "small", base=base)
    assert is_silent(report)
    assert report.kind == "low-memory folder"
    assert any(finding.code == "quantization-error" for finding in report.findings)


def test_names_one_by_one_and_stacked_are_read_alike(tmp_path):
    """A folder with stacked names, as transformers has them in memory, and one with a tensor for each expert."""
    model = learnt()
    folder = saved(model, tmp_path / "m")
    stacked = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    other = rewrite(saved(model, tmp_path / "stacked"), lambda tensors: stacked)
    assert is_silent(examine(other, base=folder))
    assert any(finding.code == "nothing-changed" for finding in examine(other, base=folder).findings)
