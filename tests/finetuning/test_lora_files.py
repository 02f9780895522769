"""Adapters of experts come back from files as they were, and PEFT reads and writes them with equal logits."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moe_hf import MoEError
from moe_hf.finetuning import ExpertLoraConfig, add_expert_lora, load_expert_lora, lora_adapters, save_expert_lora
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
