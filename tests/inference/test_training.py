"""MoETrainer trains adapters over quantized experts: resuming is exact, and the final folder has the adapters alone."""

import torch

from moe_hf.finetuning import load_expert_lora
from moe_hf.finetuning.lora_files import LORA_NAME
from moe_hf.inference import quantize_experts
from moe_hf.inference.footprint import logits_of
from moe_hf.trainer import MoETrainer
from tests.closeness import bitwise
from tests.tiny_models import random_ids
from tests.trainer.runs import arguments, rows, tiny_moe


def quantized() -> torch.nn.Module:
    model = tiny_moe("mixtral")
    quantize_experts(model, "nf4")
    return model


def train(output_dir, resume=None) -> MoETrainer:
    args = arguments(
        output_dir,
        scope="expert_lora",
        expert_lora_r=3,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.1,
    )
    trainer = MoETrainer(quantized(), args, train_dataset=rows(16))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def adapters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_adapters_over_quantized_experts_train_resume_and_load(tmp_path):
    whole = train(tmp_path / "whole")
    again = train(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-2"))
    ids = random_ids(1, 8)
    expected = logits_of(whole.model, ids)
    assert not torch.equal(expected, logits_of(quantized(), ids))
    assert bitwise(adapters(again.model), adapters(whole.model))
    whole.save_model()
    final = tmp_path / "whole" / "final"
    assert (final / LORA_NAME).is_file() and not list(final.glob("model*.safetensors"))
    assert bitwise(adapters(load_expert_lora(quantized(), final)), adapters(whole.model))
