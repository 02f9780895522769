"""The plan of an upcycling: it says what the upcycling then makes, from the config alone."""

import json

import pytest
import torch
from safetensors import safe_open

from moe_hf import MoEError, inspect_model, upcycle
from moe_hf.finetuning import apply_scope
from moe_hf.planning import FINDINGS, plan_upcycling
from moe_hf.upcycling.initialisers import Drop, Granular, Mix
from tests.tiny_models import tiny_config, tiny_dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    tiny_dense("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def config_only(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("config")
    (path / "config.json").write_text((folder / "config.json").read_text())
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_experts": 4},
        {"num_experts": 6, "num_experts_per_tok": 4, "init": Granular(shards=2)},
        {
            "num_experts": 3,
            "first_k_dense_replace": 1,
            "shared_expert_intermediate_size": 88,
            "shared_expert_gate": True,
        },
    ],
    ids=["copy", "granular", "shared expert"],
)
def test_plan_says_what_is_then_made(arguments, folder, config_only, tmp_path):
    plan = plan_upcycling(config_only, **arguments)
    model = upcycle(folder, **arguments)
    made = inspect_model(model)
    for name in ("total_parameters", "active_parameters", "parameters_per_part", "flops_per_token", "routing"):
        assert getattr(plan.moe, name) == getattr(made, name)
    assert plan.dense.total_parameters == inspect_model(folder).total_parameters
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert plan.moe_bytes == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert (plan.why_inexact is None) == (model.config.upcycling["verification"]["relative_error"] <= 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_tied_weights_count_once(family, tmp_path):
    tiny_dense(family).bfloat16().save_pretrained(tmp_path)
    plan = plan_upcycling(tmp_path)
    assert plan.dtype == "bfloat16"
    assert plan.dense_bytes == 2 * plan.dense.total_parameters
    assert plan.moe_bytes == 2 * plan.moe.total_parameters


def test_training_memory_is_that_of_the_scope(folder, config_only):
    plan = plan_upcycling(config_only, num_experts=4)
    model = upcycle(folder, num_experts=4)
    for scope in ("moe", "all"):
        report = apply_scope(model, scope)
        frozen = report.total_parameters - report.trainable_parameters
        assert plan.training_bytes[scope] == 16 * report.trainable_parameters + 4 * frozen


def test_dtype_comes_from_the_files_where_the_config_has_none(folder, tmp_path):
    tiny_dense("llama").bfloat16().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan_upcycling(tmp_path).dtype == "bfloat16"


def test_no_weights_are_read(config_only, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    assert plan_upcycling(config_only).moe.num_experts == 8


def test_a_large_model_is_planned_without_its_memory(tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    tiny_config("llama", **sizes, **heads, dtype="bfloat16", tie_word_embeddings=False).save_pretrained(tmp_path)
    plan = plan_upcycling(tmp_path, num_experts=8)
    # Llama-3 70B has 70.55 B parameters; 7 more copies of 80 MLPs of 3 x 8192 x 28672 are 394.6 B.
    assert plan.dense.total_parameters == 70_553_706_496
    assert plan.moe.total_parameters == 70_553_706_496 + 80 * (7 * 3 * 8192 * 28672 + 8 * 8192)


def test_relative_cost_is_the_ratio_of_the_arithmetic_and_advice_names_its_sources(config_only):
    plan = plan_upcycling(config_only)
    assert plan.relative_cost == plan.moe.flops_per_token / plan.dense.flops_per_token > 1
    advice = plan.advice()
    assert f"{2 / plan.relative_cost:.2f} times the tokens" in advice[0]
    assert all(any(address in line for line in advice) for _, address in FINDINGS)
    assert json.loads(json.dumps(plan.to_dict()))["advice"] == advice


def test_reasons_for_a_difference_are_told(config_only):
    assert "norm_topk_prob" in plan_upcycling(config_only, norm_topk_prob=False).why_inexact
    assert "drop" in plan_upcycling(config_only, init=Drop()).why_inexact
    assert "noise" in plan_upcycling(config_only, noise=0.1).why_inexact
    assert plan_upcycling(config_only, init=Drop(ratio=0.0)).why_inexact is None


def test_export_targets_are_those_of_the_interchange_and_may_be_required(config_only, tmp_path):
    plan = plan_upcycling(config_only)
    assert "mixtral" in plan.exact_targets
    plan.require_export("mixtral")
    plan.require_export("auto")
    with pytest.raises(MoEError, match="no native family 'nonsense'"):
        plan.require_export("nonsense")
    tiny_config("gpt2").save_pretrained(tmp_path)
    plan = plan_upcycling(tmp_path)
    assert plan.exact_targets == []
    for target in ("mixtral", "auto"):
        with pytest.raises(MoEError, match="hold this MoE exactly"):
            plan.require_export(target)


def test_mix_of_specialists_is_planned_from_their_configs(folder, config_only):
    plan = plan_upcycling(config_only, num_experts=2, init=Mix(sources=(str(config_only),)))
    assert plan.moe.num_experts == 2
    assert plan.why_inexact is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"init": Granular(shards=3)}, "shards"),
        ({"init": "magic"}, "init"),
        ({"router_init": "magic"}, "router_init"),
        ({"router_typ": "top_k"}, "router_typ"),
        ({"router_type": "magic"}, "router_type"),
        ({"moe_intermediate_size": 8}, "moe_intermediate_size"),
    ],
)
def test_what_upcycling_would_refuse_is_refused(config_only, arguments, message):
    with pytest.raises(MoEError, match=message):
        plan_upcycling(config_only, **arguments)


def test_sources_that_are_no_dense_models_are_refused(folder, tmp_path):
    upcycle(folder, num_experts=2).save_pretrained(tmp_path / "moe")
    with pytest.raises(MoEError, match="already"):
        plan_upcycling(tmp_path / "moe")
    with pytest.raises(MoEError, match="not a folder"):
        plan_upcycling(tmp_path / "nowhere")
