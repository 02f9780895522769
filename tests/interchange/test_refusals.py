"""What cannot be exchanged exactly is refused by name and reason, before anything is written."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

import moe_hf
from moe_hf.errors import MoEError
from moe_hf.interchange import exact_targets, export_native, import_native
from moe_hf.interchange.configs import warnings_for
from moe_hf.interchange.description import UNUSED
from moe_hf.interchange.families import FAMILIES, WITHOUT_TARGET, WITHOUT_TWIN
from moe_hf.modeling.routers import ROUTERS
from moe_hf.modeling.routing import RouterSpec
from moe_hf.saving import verify_manifest
from tests.interchange.cases import GATED, REFUSED, SIGMOID, Case, upcycled
from tests.tiny_models import random_ids, tiny_config, tiny_dense


def moe_config(case: Case) -> moe_hf.MoEConfig:
    """The config of a case without a model."""
    text_config = case.dense_model().config
    return moe_hf.MoEConfig(text_config=text_config, **{"num_experts": 4, "num_experts_per_tok": 2, **case.moe})


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals") / "ours"
    upcycled(Case("llama", "mixtral"))[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def native(ours):
    return export_native(ours, ours.parent / "native", "mixtral")


def edited(source, target, **fields):
    """A copy of a checkpoint with other fields in its config."""
    target.mkdir()
    for file in source.glob("model*"):
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_inexact_pair_is_refused_with_its_reason(case):
    config = moe_config(case)
    reason = exact_targets(config)[case.target]
    assert reason is not None
    with pytest.raises(AssertionError, match="did not match"), pytest.raises(MoEError, match="never this"):
        raise MoEError(reason)
    with pytest.raises(MoEError, match=case.says):
        raise MoEError(reason)


def test_refused_export_writes_nothing_and_names_the_exact_targets(ours, tmp_path):
    with pytest.raises(
        MoEError, match=r"glm4_moe cannot hold this model exactly: scoring_func.*Exact targets are \['mixtral'"
    ):
        export_native(ours, tmp_path / "out", "glm4_moe")
    assert list(tmp_path.iterdir()) == []


def test_auto_without_an_exact_family_says_why(tmp_path):
    upcycled(Case("gpt2", ""))[1].save_pretrained(tmp_path / "ours")
    with pytest.raises(MoEError, match="No native MoE family.*LayerNorm with biases"):
        export_native(tmp_path / "ours", tmp_path / "out")
    upcycled(Case("llama-biases", ""))[1].save_pretrained(tmp_path / "biases")
    with pytest.raises(MoEError, match="mixtral: attention_bias=True.*granitemoe: mlp_bias=True"):
        export_native(tmp_path / "biases", tmp_path / "out")


@pytest.mark.parametrize(
    ("dense", "moe", "target"),
    [
        ("llama", {}, "mixtral"),
        ("mistral-window", {}, "mixtral"),
        ("qwen2", {}, "qwen2_moe"),
        ("qwen3", {}, "qwen3_moe"),
        ("granite", {}, "granitemoe"),
        ("granite", {"shared_expert_intermediate_size": 24}, "granitemoeshared"),
        ("llama", GATED, "qwen2_moe"),
        ("qwen3", SIGMOID, "glm4_moe"),
        ("ernie4_5", {}, "ernie4_5_moe"),
    ],
)
def test_auto_takes_the_family_that_adds_least(dense, moe, target):
    reasons = exact_targets(moe_config(Case(dense, "", moe=moe)))
    assert next(name for name, reason in reasons.items() if reason is None) == target


def test_config_alone_says_what_is_exact():
    # Neither a model nor the width of the experts, which a model would fill in.
    config = moe_hf.MoEConfig(text_config=tiny_config("lfm2", block_auto_adjust_ff_dim=True), **SIGMOID)
    assert config.moe_intermediate_size is None
    assert [name for name, reason in exact_targets(config).items() if reason is None] == ["lfm2_moe"]


def test_own_routing_function_has_no_native_counterpart(monkeypatch):
    monkeypatch.setitem(ROUTERS, "mine", RouterSpec(lambda logits, context: None))
    config = moe_config(Case("llama", "mixtral", moe={"router_type": "mine"}))
    assert set(map(bool, exact_targets(config).values())) == {True}
    assert "router_type='mine'" in exact_targets(config)["mixtral"]


@pytest.mark.parametrize(
    ("target", "normalised", "warns"),
    [("qwen2_moe", True, True), ("qwen2_moe", False, False), ("qwen3_moe", True, False), ("qwen3_moe", False, True)],
)
def test_normalisation_that_llama_cpp_ignores_is_warned_of(target, normalised, warns):
    case = Case(target.removesuffix("_moe"), target, moe={"norm_topk_prob": normalised})
    assert any("takes norm_topk_prob" in text for text in warnings_for(moe_config(case), target)) == warns


@pytest.mark.parametrize(
    ("target", "shared", "warns"), [("qwen2_moe", 0, True), ("qwen2_moe", 32, False), ("qwen3_moe", 0, False)]
)
def test_shared_expert_of_zeros_of_which_llama_cpp_makes_nan_is_warned_of(target, shared, warns):
    gated = {"shared_expert_intermediate_size": shared, "shared_expert_gate": True} if shared else {}
    case = Case(target.removesuffix("_moe"), target, moe=gated)
    assert any("would compute NaN" in text for text in warnings_for(moe_config(case), target)) == warns


@pytest.mark.parametrize(
    ("target", "head_dim", "warns"),
    [("qwen2_moe", 16, True), ("qwen2_moe", 8, False), ("granitemoe", 16, True), ("mixtral", 16, False)],
)
def test_size_of_heads_that_servers_ignore_is_warned_of(target, head_dim, warns):
    case = Case("llama", target, {"head_dim": head_dim}, {"norm_topk_prob": target != "qwen2_moe"})
    said = warnings_for(moe_config(case), target)
    assert any(f"for the size of a head of {target}, and this model's is 16" in text for text in said) == warns


def test_sources_that_are_none_are_refused(ours, native, tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    for source, says in (
        (tmp_path / "nowhere", "is no folder"),
        (ours / "config.json", "is no folder"),
        (tmp_path / "empty", "has no config.json"),
        (native, "is a native MoE already"),
        (tmp_path / "dense", "upcycle it first"),
    ):
        with pytest.raises(MoEError, match=says):
            export_native(source, tmp_path / "out")
    with pytest.raises(MoEError, match="is a moe_hf model already"):
        import_native(ours, tmp_path / "out")
    with pytest.raises(MoEError, match="no target 'llama'; it is 'auto' or one of .*mixtral"):
        export_native(ours, tmp_path / "out", "llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "empty"]


def test_output_that_exists_is_refused(ours, native, tmp_path):
    for call in (export_native, import_native):
        with pytest.raises(MoEError, match="exists"):
            call(native if call is import_native else ours, tmp_path)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "phimoe", "gpt_oss"])
def test_native_family_without_a_dense_twin_is_refused_by_name(family, tmp_path):
    CONFIG_MAPPING[family]().save_pretrained(tmp_path / "native")
    with pytest.raises(MoEError, match=f"{family} cannot be imported: .*{WITHOUT_TWIN[family][:30]}"):
        import_native(tmp_path / "native", tmp_path / "out")


@pytest.mark.parametrize(
    ("target", "fields", "says"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("mixtral", {"num_experts_per_tok": 1}, "never learns"),
        ("mixtral", {"num_local_experts": 3}, "are missing|are not known"),
        ("glm4_moe", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
        (
            "mixtral",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        ("glm4_moe", {"n_group": 2}, "n_group=2"),
        ("cohere2_moe", {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ("cohere2_moe", {"num_shared_experts": 1}, "shared_expert_combination_strategy='average'"),
    ],
)
def test_what_our_model_has_no_place_for_is_not_dropped(target, fields, says, tmp_path):
    moe = SIGMOID if target == "glm4_moe" else {}
    upcycled(Case("cohere2" if target.startswith("cohere") else "llama", target, moe=moe))[1].save_pretrained(
        tmp_path / "ours"
    )
    native = export_native(tmp_path / "ours", tmp_path / "native", target)
    other = edited(native, tmp_path / "other", **fields)
    with pytest.raises(MoEError, match=says):
        import_native(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bias_for_choosing_is_ours_where_it_is_not_zero(tmp_path):
    upcycled(Case("llama", "glm4_moe", moe=SIGMOID))[1].save_pretrained(tmp_path / "ours")
    native = export_native(tmp_path / "ours", tmp_path / "native", "glm4_moe")
    tensors = load_file(native / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert tensors[name].dtype == torch.float32
    tensors[name][2] = 0.5
    save_file(tensors, native / "model.safetensors", {"format": "pt"})
    back = import_native(native, tmp_path / "back")
    assert moe_hf.MoEConfig.from_pretrained(back).balance_strategy == "bias"
    again = load_file(export_native(back, tmp_path / "again", "glm4_moe") / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in again)
    ids = random_ids()
    with torch.no_grad():
        expected, actual = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (native, back))
    assert float((actual - expected).norm() / expected.norm()) <= 1e-6


def test_shared_expert_of_zeros_is_dropped_only_where_an_export_would_add_it_again(tmp_path):
    upcycled(Case("qwen2", "qwen2_moe"))[1].save_pretrained(tmp_path / "ours")
    native = export_native(tmp_path / "ours", tmp_path / "native")
    tensors = load_file(native / "model.safetensors")
    assert tensors["model.layers.0.mlp.shared_expert.up_proj.weight"].shape == (32, 48)
    tensors["model.layers.2.mlp.shared_expert_gate.weight"][0, 0] = 1.0
    save_file(tensors, native / "model.safetensors", {"format": "pt"})
    back = import_native(native, tmp_path / "back")
    assert moe_hf.MoEConfig.from_pretrained(back).shared_expert_intermediate_size == 32


def test_carried_facts_that_contradict_the_config_are_not_believed(native, tmp_path):
    lie = {"text_config": {"model_type": "llama", "hidden_size": 99, "rms_norm_eps": 0.5}, "num_experts": 7}
    other = edited(native, tmp_path / "other", moe_hf=lie | {"auto_map": {"AutoConfig": "x.Y"}})
    config = moe_hf.MoEConfig.from_pretrained(import_native(other, tmp_path / "out"))
    assert (config.hidden_size, config.num_experts) == (48, 4)
    assert config.auto_map["AutoConfig"] == "configuration_moe.MoEConfig"


def test_config_as_older_versions_wrote_it_is_read(tmp_path):
    upcycled(Case("qwen3", "qwen3_moe"))[1].save_pretrained(tmp_path / "ours")
    native = export_native(tmp_path / "ours", tmp_path / "native")
    older = {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32", "max_window_layers": 48}
    other = edited(native, tmp_path / "other", **older, num_experts=4)
    fields = json.loads((other / "config.json").read_text())
    for name in ("moe_hf", "rope_parameters", "dtype", "num_local_experts"):
        del fields[name]
    (other / "config.json").write_text(json.dumps(fields))
    again = export_native(import_native(other, tmp_path / "again"), tmp_path / "native_again")
    written, first = (json.loads((folder / "config.json").read_text()) for folder in (again, native))
    assert {name for name in first if first[name] != written.get(name)} == {"moe_hf"}
    assert first["rope_theta"] == 10000.0


def test_tensors_that_the_config_does_not_tell_are_refused(ours, native, tmp_path):
    for source, call in ((ours, export_native), (native, import_native)):
        other = edited(source, tmp_path / source.name)
        tensors = load_file(source / "model.safetensors")
        more = tensors | {"model.layers.0.extra.weight": torch.ones(2)}
        save_file(more, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(MoEError, match=r"1 are not known \['model.layers.0.extra.weight'\]"):
            call(other, tmp_path / "out")
        del tensors["model.norm.weight"]
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(MoEError, match=r"1 are missing \['model.norm.weight'\]"):
            call(other, tmp_path / "out")


def test_shards_dtype_and_small_files_go_along(tmp_path):
    _, moe = upcycled(Case("qwen3", "qwen3_moe"))
    moe.to(torch.bfloat16).save_pretrained(tmp_path / "ours", max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training_args.bin"):
        (tmp_path / "ours" / name).write_text("{}")
    native = export_native(tmp_path / "ours", tmp_path / "native", max_shard_size="40KB")
    assert len(list(native.glob("model-*.safetensors"))) > 3
    verify_manifest(native)
    names = {path.name for path in native.iterdir() if not path.name.startswith("model")}
    assert names == {"config.json", "generation_config.json", "moe_hf_manifest.json"} | {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    model = AutoModelForCausalLM.from_pretrained(native, dtype="auto")
    assert model.dtype == torch.bfloat16
    back = import_native(native, tmp_path / "back", max_shard_size="60KB")
    again = moe_hf.MoEForCausalLM.from_pretrained(back, dtype="auto").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in moe.state_dict().items())


def test_every_field_of_our_config_is_thought_of():
    own = {field.name for field in dataclasses.fields(moe_hf.MoEConfig)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    # A new field changes what a model computes, or it does not: then it belongs in the second line.
    computed = (
        "text_config router_type router_kwargs num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob "
    )
    computed += "scoring_func routed_scaling_factor shared_expert_intermediate_size shared_expert_gate "
    computed += "first_k_dense_replace decoder_sparse_step mlp_only_layers n_group topk_group balance_strategy "
    computed += "eval_capacity_factor router_noise router_arch routing_level num_tasks router_per_task expert_groups "
    computed += (
        "num_experts_per_layer expert_intermediate_sizes extra_experts num_moe_heads moe_dense_ffn output_mixture"
    )
    others = (
        "router_aux_loss_coef router_z_loss_coef router_jitter_noise output_router_logits upcycling format_version "
    )
    others += "bias_update_rate balance_loss_scope router_loss_coefs router_loss_kwargs router_noise_scale "
    others += "router_noise_affects capacity_factor min_expert_capacity overflow_policy capacity_order "
    others += "allow_noncausal_routing router_arch_kwargs expert_group_prior"
    assert own == set(computed.split()) | set(others.split())


@pytest.mark.parametrize("target", FAMILIES)
def test_every_field_of_a_twin_is_thought_of(target):
    native = {field.name for field in dataclasses.fields(CONFIG_MAPPING[target])}
    for dense, twin in FAMILIES[target].twins.items():
        fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[dense])}
        known = native | UNUSED | twin.requires.keys() | twin.sets.keys() | {"intermediate_size", "head_dim"}
        assert fields - known - {name for check in twin.checks for name in check.fields} == set(), dense
        assert dense not in WITHOUT_TARGET
    assert target not in WITHOUT_TWIN
    assert not {*WITHOUT_TARGET, *WITHOUT_TWIN} - set(CONFIG_MAPPING.keys())
