"""Adapters merged into the weights, and a vocabulary that was resized: config and weights agree, and all files load."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import moe_hf
from moe_hf import MoEError
from moe_hf.trainer import MoETrainer
from tests.tiny_models import random_ids
from tests.trainer.runs import KINDS, arguments, losses, rows, tiny_moe


# PEFT's own call into transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
IDS = random_ids(2, 9, vocab=90)
EXPERTS = {"r": 2, "alpha": 4.0}
ON_ATTENTION = {"target_modules": ["q_proj"]}
ON_EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def with_expert_lora(model):
    moe_hf.add_expert_lora(model, moe_hf.ExpertLoraConfig(**EXPERTS))
    for name, parameter in model.named_parameters():
        if "lora_adapter" in name and name.endswith("_B"):
            nn.init.normal_(parameter, std=0.3)
    return model


def merged(model, order):
    """`model` with adapters in its weights, and the logits that it had with the adapters beside them."""
    lora = ON_EXPERTS if order == "PEFT on experts" else ON_ATTENTION
    peft_model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **lora))
    if order != "PEFT on experts":
        with_expert_lora(peft_model)
    expected = logits(peft_model)
    if order == "ours first":
        moe_hf.merge_expert_lora(peft_model, unload=True)
    plain = peft_model.merge_and_unload()
    return moe_hf.merge_expert_lora(plain, unload=True) if order == "PEFT first" else plain, expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["PEFT first", "ours first", "PEFT on experts"])
def test_merged_adapters_leave_a_plain_model_that_is_kept(kind, order, tmp_path):
    base = tiny_moe(kind)
    model, expected = merged(copy.deepcopy(base), order)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
    assert (logits(model) - logits(base)).norm() > 0.1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(base)
    assert loaded.state_dict().keys() == base.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [130, 97])
def test_a_resized_vocabulary_is_kept_in_every_file(kind, size, tmp_path):
    model = tiny_moe(kind)
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.get_text_config().vocab_size == loaded.config.vocab_size == size
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded(IDS, labels=IDS).loss.isfinite()

    adapted = with_expert_lora(copy.deepcopy(model))
    moe_hf.save_expert_lora(adapted, tmp_path / "lora")
    torch.testing.assert_close(logits(moe_hf.load_expert_lora(loaded, tmp_path / "lora")), logits(adapted))
    with pytest.raises(MoEError, match=f"vocabulary has {size} tokens, and this one's 113"):
        moe_hf.load_expert_lora(tiny_moe(kind), tmp_path / "lora")

    chosen = copy.deepcopy(model)
    moe_hf.apply_scope(chosen, "selected", expert_selection={"experts": {"1": [0, 2]}})
    for parameter in chosen.parameters():
        parameter.data += 0.1 if parameter.requires_grad else 0.0
    moe_hf.save_expert_deltas(chosen, tmp_path / "deltas")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    moe_hf.load_expert_deltas(loaded, tmp_path / "deltas")
    torch.testing.assert_close(logits(loaded), logits(chosen), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope", ["all", "expert_lora"])
def test_a_run_with_a_resized_vocabulary_is_resumed(scope, tmp_path):
    def trainer(model):
        args = arguments(tmp_path / "run", scope=scope, learning_rate=0.05, save_strategy="steps", save_steps=1)
        return MoETrainer(model, args, train_dataset=rows())

    model = tiny_moe()
    model.resize_token_embeddings(130)
    again, first = trainer(copy.deepcopy(model)), trainer(model)
    first.train()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(again) == pytest.approx(losses(first), rel=1e-4)
    assert abs(losses(first)[-1] / losses(first)[0] - 1) > 1e-3
