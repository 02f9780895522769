"""Upcycling: exact, verified, without touching the source, and refused with a reason otherwise."""

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaModel, T5Config, T5ForConditionalGeneration

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle, upcycle_checkpoint, verify
from moe_hf.upcycling.prepare import moe_config
from moe_hf.upcycling.router_init import NormalRouter
from tests.tiny_models import random_ids, tiny_dense, tiny_native_moe


pytestmark = pytest.mark.numerics


EXACT_FIELDS = {
    "plain": {},
    "sigmoid": {"scoring_func": "sigmoid"},
    "one_expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "all_experts": {"num_experts_per_tok": 4},
    "shared_half": {"shared_expert_intermediate_size": 88},
    "shared_gated": {"shared_expert_intermediate_size": 88, "shared_expert_gate": True},
    "shared_narrow": {"shared_expert_intermediate_size": 24},
    "every_second_layer": {"decoder_sparse_step": 2},
    "first_dense": {"first_k_dense_replace": 1},
    "listed_dense": {"mlp_only_layers": [0, 2]},
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("fields", EXACT_FIELDS)
def test_copied_experts_give_the_dense_logits(family, fields):
    dense = tiny_dense(family)
    moe = upcycle(dense, **{"num_experts": 4, **EXACT_FIELDS[fields]})
    facts = moe.config.upcycling
    assert facts["verification"]["relative_error"] <= 1e-5
    ids = random_ids(2, 20, seed=9)
    with torch.no_grad():
        expected, actual = dense.eval()(ids).logits, moe(ids).logits
    assert float((actual - expected).norm() / expected.norm()) <= 1e-5
    assert facts["init"]["name"] == "copy" and facts["seed"] == 0


def test_the_source_is_neither_changed_nor_aliased():
    dense = tiny_dense("gpt2").train()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    config = dense.config.to_dict()
    moe = upcycle(dense, num_experts=4)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(1)
    assert dense.config.to_dict() == config and dense.training
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())
    assert moe.config.text_config is not dense.config


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    dense = tiny_dense("llama")
    first, again, other = (upcycle(dense, num_experts=4, noise=0.1, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["model.layers.0.mlp.gate.weight"], other["model.layers.0.mlp.gate.weight"])


def test_noise_is_relative_and_its_error_is_recorded():
    dense = tiny_dense("llama")
    moe = upcycle(dense, num_experts=4, noise=0.1)
    source = dense.model.layers[0].mlp.down_proj.weight
    difference = moe.model.layers[0].mlp.experts.down_proj - source
    assert float((difference.std() / source.std()).detach()) == pytest.approx(0.1, rel=0.02)
    assert 1e-4 < moe.config.upcycling["verification"]["relative_error"] < 1


def test_bfloat16_is_verified_in_float32_and_its_rounding_reported():
    moe = upcycle(tiny_dense("llama").bfloat16(), num_experts=4)
    result = moe.config.upcycling["verification"]
    assert moe.dtype == torch.bfloat16
    assert result["relative_error"] <= 1e-5 < 1e-4 < result["rounding_error"] < 0.1


def test_one_expert_per_token_needs_consent_and_stores_its_error():
    dense = tiny_dense("llama")
    with pytest.raises(MoEError, match="do not give weights that sum to 1.*allow_inexact=True"):
        upcycle(dense, num_experts=4, num_experts_per_tok=1)
    moe = upcycle(dense, num_experts=4, num_experts_per_tok=1, allow_inexact=True)
    assert moe.config.upcycling["verification"]["relative_error"] > 1e-3


def test_what_the_routers_do_is_recorded():
    dense = tiny_dense("llama")
    fair, saturated = (
        upcycle(dense, num_experts=4, router_init=NormalRouter(std=std)).config.upcycling for std in (0.1, 100)
    )
    assert fair["router_init"]["options"] == {"std": 0.1}
    assert max(fair["routing"]["top_1_probability"]) < 0.4 < 0.9 < min(saturated["routing"]["top_1_probability"])
    assert fair["routing"]["num_tokens"] == 2 * 64


def test_verification_names_the_first_layer_that_differs():
    dense = tiny_dense("llama")
    moe = upcycle(dense, num_experts=4)
    with torch.no_grad():
        moe.model.layers[1].mlp.experts.down_proj.mul_(1.1)
    result = verify(dense, moe)
    assert not result.exact and result.first_difference == "layers.1"


def test_verification_runs_on_the_users_tokens_too():
    dense = tiny_dense("llama")
    moe = upcycle(dense, num_experts=4, verify_inputs=random_ids(3, 10))
    assert moe.config.upcycling["verification"]["num_tokens"] == 2 * 64 + 30
    with pytest.raises(MoEError, match="token ids"):
        upcycle(dense, num_experts=4, verify_inputs=torch.randn(2, 3))


def test_generation_config_and_dtype_come_from_the_source(tmp_path):
    dense = tiny_dense("llama").bfloat16()
    dense.generation_config.max_new_tokens = 7
    dense.save_pretrained(tmp_path / "dense")
    moe = upcycle(tmp_path / "dense", num_experts=4)
    assert moe.generation_config.max_new_tokens == 7 and moe.dtype == torch.bfloat16
    assert not moe.training


def refused_sources(tmp_path):
    encoder = BertLMHeadModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, vocab_size=60)
    )
    both = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=40, num_layers=1, num_heads=2, vocab_size=60))
    llama = tiny_dense("llama")
    return {
        "native_moe": (tiny_native_moe("mixtral"), "already has experts"),
        "our_moe": (upcycle(llama, num_experts=2), "already has experts"),
        "encoder": (encoder, "not a decoder"),
        "encoder_decoder": (both, "not a decoder"),
        "no_head": (LlamaModel(llama.config), "no language-modelling head"),
        "missing_folder": (tmp_path / "nowhere", "not a folder"),
        "missing_path": ("./nowhere", "not a folder"),
        "bitnet": (tiny_dense("bitnet"), "no place for.*ffn_sub_norm"),
    }


@pytest.mark.parametrize(
    "case",
    ["native_moe", "our_moe", "encoder", "encoder_decoder", "no_head", "missing_folder", "missing_path", "bitnet"],
)
def test_a_source_that_cannot_be_upcycled_is_refused_with_the_reason(case, tmp_path):
    source, message = refused_sources(tmp_path)[case]
    with pytest.raises(MoEError, match=message):
        upcycle(source)


def broken_folder(folder, how):
    tiny_dense("llama").save_pretrained(folder, max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))


@pytest.mark.parametrize("how", ["missing", "truncated", "outside"])
def test_a_folder_with_broken_shards_is_refused(how, tmp_path):
    broken_folder(tmp_path / "dense", how)
    with pytest.raises(MoEError, match="model-00002|outside"):
        upcycle(tmp_path / "dense")


BAD_ARGUMENTS = {
    "init": ({"init": "magic"}, "must be one of .*copy"),
    "noise": ({"noise": -0.1}, "at least 0"),
    "noise_nan": ({"noise": float("nan")}, "finite"),
    "k": ({"num_experts_per_tok": 9}, "between 1 and"),
    "width": ({"moe_intermediate_size": 24}, "so they do not fit"),
    "typo": ({"router_zloss_coef": 0.1}, "nearest is 'router_z_loss_coef'"),
    "activation": ({"scoring_func": "relu"}, "softmax"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_gives_one_clear_error(case):
    fields, message = BAD_ARGUMENTS[case]
    with pytest.raises(MoEError, match=message):
        upcycle(tiny_dense("llama"), **fields)


def test_an_unknown_activation_is_named():
    config = MoEConfig(text_config=tiny_dense("llama").config)
    config.text_config.hidden_act = "wobble"
    with pytest.raises(MoEError, match="wobble"):
        MoEForCausalLM(config)


DENSE_FIELDS = {
    "layers": {"num_hidden_layers": 7},
    "vocabulary": {"vocab_size": 200},
    "rope": {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
    "dtype": {"dtype": "bfloat16"},
    "attention": {"attn_implementation": "eager"},
    "ties": {"tie_word_embeddings": True},
    "dropout": {"attention_dropout": 0.5},
    "another kind of model": {"is_encoder_decoder": True},
}


@pytest.mark.parametrize("case", DENSE_FIELDS)
def test_what_the_dense_model_decides_is_refused_with_the_way_to_change_it(case):
    dense = tiny_dense("llama")
    ((name, value),) = DENSE_FIELDS[case].items()
    with pytest.raises(MoEError, match=f"upcycle keeps the dense model's {name}.*from_pretrained"):
        upcycle(dense, **{name: value})
    same = dense.config._attn_implementation if name == "attn_implementation" else getattr(dense.config, name)
    same = dense.dtype if name == "dtype" else same
    assert (
        moe_config(dense, None, {name: same}).text_config.to_dict()
        == moe_config(dense, None, {}).text_config.to_dict()
    )


@pytest.mark.parametrize("name", ["text_config", "upcycling", "architectures", "name_or_path"])
def test_what_upcycling_writes_itself_is_refused(name):
    with pytest.raises(MoEError, match=f"upcycle writes {name} itself"):
        upcycle(tiny_dense("llama"), **{name: {}})


def test_ids_of_special_tokens_act_in_memory_and_on_disk(tmp_path):
    dense = tiny_dense("llama")
    dense.save_pretrained(tmp_path / "dense")
    moe = upcycle(dense, num_experts=2, pad_token_id=9, eos_token_id=[2, 5])
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=2, pad_token_id=9, eos_token_id=[2, 5])
    for model in (moe, MoEForCausalLM.from_pretrained(tmp_path / "moe")):
        assert (model.config.pad_token_id, model.config.eos_token_id) == (9, [2, 5])
        assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (9, [2, 5])
    assert dense.config.pad_token_id == 0
