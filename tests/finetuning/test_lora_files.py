"""Adapters of experts come back from files as they were, and PEFT reads and writes them with equal logits."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moe_hf import MoEError, quantize_experts
from moe_hf.finetuning import (
    ExpertLoraConfig,
    add_expert_lora,
    load_expert_lora,
    lora_adapters,
    merge_expert_lora,
    save_expert_lora,
    unmerge_expert_lora,
)
from tests.closeness import close
from tests.finetuning.test_expert_lora import logits, model_with_adapters, native
from tests.kernels.test_grouped_experts import relative_error
from tests.tiny_models import random_ids, tiny_native_moe


# PEFT's own call into transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
CHOSEN = {"experts": {"1": [2, 0], "2": [3]}, "rank_pattern": {"1.2": 3}}


@pytest.mark.numerics
@pytest.mark.parametrize("options", [{}, CHOSEN, CHOSEN | {"use_dora": True, "use_rslora": True}])
def test_own_files_bring_back_every_bit(options, tmp_path):
    model, ids = model_with_adapters(**options), random_ids()
    save_expert_lora(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["expert_lora.safetensors"]
    loaded = load_expert_lora(tiny_native_moe(), tmp_path)
    assert close(logits(loaded, ids), logits(model, ids))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
        assert parameter.requires_grad == loaded.get_parameter(name).requires_grad == ("lora_" in name)
    # Onto a model that has the adapters already, as in a resumed run.
    fresh = add_expert_lora(tiny_native_moe(), ExpertLoraConfig(r=4, alpha=8.0, seed=1, **options))
    assert close(logits(load_expert_lora(fresh, tmp_path), ids), logits(model, ids))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, CHOSEN, CHOSEN | {"use_rslora": True}, {"target": "down_proj"}])
def test_peft_loads_our_files_with_equal_logits(family, options, tmp_path):
    model, ids = model_with_adapters(family, **options), random_ids()
    save_expert_lora(model, tmp_path, file_format="peft")
    peft_model = PeftModel.from_pretrained(native(family), tmp_path).eval()
    assert relative_error(logits(model, ids), logits(peft_model, ids)) <= 1e-6
    assert relative_error(logits(native(family), ids), logits(peft_model, ids)) > 1e-3
    again = load_expert_lora(native(family), tmp_path)
    assert relative_error(logits(model, ids), logits(again, ids)) <= 1e-6


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_load_the_files_of_peft_with_equal_logits(family, use_rslora, tmp_path):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=9, use_rslora=use_rslora, target_modules=[], target_parameters=targets)
    peft_model, ids = get_peft_model(native(family), config).eval(), random_ids()
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft_model.save_pretrained(tmp_path)
    model = load_expert_lora(native(family), tmp_path)
    assert relative_error(logits(peft_model, ids), logits(model, ids)) <= 1e-6
    assert relative_error(logits(native(family), ids), logits(model, ids)) > 1e-3


def files_of_peft(folder, family="mixtral", **changes):
    """Write PEFT's files of all experts as the installed PEFT does; returns the model and its logits."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=3, lora_alpha=9, target_modules=[], target_parameters=targets)
    model = get_peft_model(tiny_native_moe(family, **changes), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return logits(model, random_ids())


def rewrite(folder, change, **fields):
    """Pass each pair (lora_A, lora_B) of PEFT's files through `change`, and set fields of the config."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name], tensors[other] = (t.contiguous() for t in change(tensors[name], tensors[other]))
    save_file(tensors, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def expert_major(first, second, experts=4, rank=3):
    return first, second.reshape(-1, rank, experts).transpose(1, 2).reshape(second.shape)


def other_order(first, second, experts=4, rank=3):
    """As PEFT has a weight whose inputs it takes for outputs: B^T in the place of A, and A^T in that of B."""
    down, up = first.reshape(experts, rank, -1), second.reshape(-1, rank, experts).permute(2, 1, 0)
    return up.reshape(experts * rank, -1), down.permute(2, 1, 0).reshape(-1, rank * experts)


UNSLOTH = {"auto_mapping": {"base_model_class": "MixtralForCausalLM", "unsloth_fixed": True}}


def test_columns_of_experts_are_read_as_the_file_says_or_refused(tmp_path):
    expected, ids = files_of_peft(tmp_path), random_ids()

    def error(**options):
        return relative_error(logits(load_expert_lora(tiny_native_moe(), tmp_path, **options), ids), expected)

    assert error() <= 1e-6
    assert error(lora_B_layout="rank_major") <= 1e-6
    rewrite(tmp_path, expert_major)
    # What PEFT itself makes of such a file, silently.
    assert error() > 0.1
    assert error(lora_B_layout="expert_major") <= 1e-6
    rewrite(tmp_path, lambda *pair: pair, **UNSLOTH)
    model = tiny_native_moe()
    with pytest.raises(MoEError, match='lora_B_layout="expert_major"'):
        load_expert_lora(model, tmp_path)
    assert not lora_adapters(model) and all(p.requires_grad for p in model.parameters())
    assert error(lora_B_layout="expert_major") <= 1e-6
    rewrite(tmp_path, lambda *pair: pair, lora_B_layout="grouped_by_expert")
    assert error() <= 1e-6
    for options, field, message in (
        ({"lora_B_layout": "rank_major"}, "grouped_by_expert", "leave it out"),
        ({"lora_B_layout": "by_rank"}, "grouped_by_expert", "must be one of"),
        ({}, "diagonal", "are known"),
    ):
        rewrite(tmp_path, lambda *pair: pair, lora_B_layout=field)
        with pytest.raises(MoEError, match=message):
            error(**options)
    save_expert_lora(model_with_adapters(), tmp_path / "own")
    with pytest.raises(MoEError, match="for files of PEFT"):
        load_expert_lora(tiny_native_moe(), tmp_path / "own", lora_B_layout="rank_major")


@pytest.mark.parametrize(("family", "version"), [("mixtral", "0.18.1"), ("mixtral", "0.19.0"), ("gpt_oss", "0.19.0")])
@pytest.mark.parametrize("square", [False, True])
def test_files_of_earlier_versions_of_peft_are_read_in_their_order(family, version, square, tmp_path):
    changes = {"intermediate_size": 48} if square else {}
    expected, ids = files_of_peft(tmp_path, family, **changes), random_ids()
    rewrite(tmp_path, other_order, peft_version=version)
    model = load_expert_lora(tiny_native_moe(family, **changes), tmp_path)
    assert relative_error(logits(model, ids), expected) <= 1e-6
    # A file of nobody knows whom: neither its packing nor, where a map is square, its order can be told.
    rewrite(tmp_path, lambda *pair: pair, peft_version=None)
    with pytest.raises(MoEError, match='names no peft_version.*lora_B_layout="expert_major"'):
        load_expert_lora(tiny_native_moe(family, **changes), tmp_path)
    if square:
        with pytest.raises(MoEError, match='add "peft_version"'):
            load_expert_lora(tiny_native_moe(family, **changes), tmp_path, lora_B_layout="rank_major")
    else:
        model = load_expert_lora(tiny_native_moe(family, **changes), tmp_path, lora_B_layout="rank_major")
        assert relative_error(logits(model, ids), expected) <= 1e-6


@pytest.mark.parametrize("file_format", ["moe_hf", "peft"])
def test_adapters_go_onto_the_model_that_they_were_trained_on(file_format, tmp_path):
    model, ids = model_with_adapters(), random_ids()
    model.get_parameter("model.layers.0.mlp.gate.weight").requires_grad_(True)
    model.get_parameter("model.layers.0.mlp.gate.weight").data.add_(1)
    save_expert_lora(merge_expert_lora(model), tmp_path, file_format=file_format)
    unmerge_expert_lora(model)

    trained_on = tiny_native_moe()
    rounded = copy.deepcopy(trained_on).to(torch.bfloat16)
    for same in (trained_on, rounded, copy.deepcopy(trained_on).to(torch.float16)):
        load_expert_lora(copy.deepcopy(same), tmp_path)
    load_expert_lora(get_peft_model(tiny_native_moe(), LoraConfig(target_modules=["q_proj"])), tmp_path)
    quantized = tiny_native_moe()
    quantize_experts(quantized, "int8")
    load_expert_lora(quantized, tmp_path)
    for part in ("experts.down_proj", "self_attn.q_proj.weight", "gate.weight"):
        other = tiny_native_moe()
        name = next(name for name, _ in other.named_parameters() if name.endswith(part) and "layers.2" in name)
        other.get_parameter(name).data.flatten()[-1] += 1e-3
        before = logits(other, ids)
        with pytest.raises(MoEError, match="allow_other_base=True"):
            load_expert_lora(other, tmp_path)
        assert not lora_adapters(other) and relative_error(logits(other, ids), before) <= 1e-6
        load_expert_lora(other, tmp_path, allow_other_base=True)
        assert relative_error(logits(other, ids), before) > 1e-3


def test_a_file_that_does_not_say_its_base_is_loaded_with_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("moe_hf.finetuning.base_record.logger.warning", said.append)
    files_of_peft(tmp_path)
    load_expert_lora(tiny_native_moe(), tmp_path)
    assert "has no fingerprint" in said.pop()
    rewrite(tmp_path, lambda *pair: pair, base_model_name_or_path="me/base")
    model = tiny_native_moe()
    model.config.name_or_path = "me/base"
    load_expert_lora(model, tmp_path)
    assert said == []


def test_files_that_do_not_fit_are_refused_and_the_model_is_unchanged(tmp_path):
    save_expert_lora(model_with_adapters(**CHOSEN), tmp_path / "own")
    path = tmp_path / "own/expert_lora.safetensors"
    whole = path.read_bytes()
    for family, change, message in (
        ("mixtral", lambda: path.write_bytes(whole[:-50]), "cannot be read"),
        ("qwen3_moe", lambda: path.write_bytes(whole), "shape"),
    ):
        change()
        model = native(family)
        with pytest.raises(MoEError, match=message):
            load_expert_lora(model, tmp_path / "own")
        assert not lora_adapters(model) and all(p.requires_grad for p in model.parameters())
    other = add_expert_lora(tiny_native_moe(), ExpertLoraConfig(r=4, alpha=8.0, experts={"1": [1, 0], "2": [3]}))
    with pytest.raises(MoEError, match="another config"):
        load_expert_lora(other, tmp_path / "own")
    with pytest.raises(MoEError, match="neither"):
        load_expert_lora(tiny_native_moe(), tmp_path)
    with pytest.raises(MoEError, match="DoRA"):
        save_expert_lora(model_with_adapters(use_dora=True), tmp_path / "dora", file_format="peft")
    with pytest.raises(MoEError, match="file_format"):
        save_expert_lora(model_with_adapters(), tmp_path / "x", file_format="gguf")
    assert not (tmp_path / "dora").exists()


def test_peft_files_of_attention_are_left_to_peft(tmp_path):
    save_expert_lora(model_with_adapters(), tmp_path, file_format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": []}))
    with pytest.raises(MoEError, match="PeftModel"):
        load_expert_lora(tiny_native_moe(), tmp_path)
