"""MoETrainer with adapters of experts: checkpoints hold them alone, resuming is exact, the final model is a plain one."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_hf import MoEError
from moe_hf.finetuning import load_expert_lora, merge_expert_lora
from moe_hf.finetuning.lora_files import LORA_NAME
from moe_hf.trainer import MoETrainer
from tests.trainer.runs import KINDS, arguments, losses, rows, tiny_moe


CHOICE = {"0": [1], "2": [0, 3]}


def train(kind, output_dir, dtype=torch.float32, resume=None, **fields):
    """Six steps of rank 3 with dropout, saved at 3 and 6."""
    fields = {
        "scope": "expert_lora",
        "expert_lora_r": 3,
        "expert_lora_alpha": 6.0,
        "expert_lora_dropout": 0.1,
    } | fields
    fields = {"expert_selection": CHOICE, "max_steps": 6, "gradient_accumulation_steps": 2} | fields
    args = arguments(
        output_dir, save_strategy="steps", save_steps=3, per_device_train_batch_size=2, learning_rate=0.1, **fields
    )
    trainer = MoETrainer(tiny_moe(kind).to(dtype), args, train_dataset=rows(28))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_exact_and_checkpoints_hold_the_adapters_only(kind, dtype, tmp_path):
    whole = train(kind, tmp_path / "whole", dtype)
    again = train(kind, tmp_path / "again", dtype, resume=str(tmp_path / "whole" / "checkpoint-3"))
    mine, theirs = dict(whole.model.named_parameters()), dict(again.model.named_parameters())
    assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert losses(whole)[3:] == losses(again)[3:]
    base = tiny_moe(kind).to(dtype)
    frozen = dict(base.named_parameters())
    assert all(torch.equal(value, frozen[name]) for name, value in mine.items() if name in frozen)
    folder = tmp_path / "whole" / "checkpoint-6"
    assert not list(folder.glob("model*.safetensors"))
    trained = sum(p.nbytes for p in whole.model.parameters() if p.requires_grad)
    assert (folder / LORA_NAME).stat().st_size <= trained + 8192
    assert whole.scope_report.trainable_bytes == trained

    whole.save_model()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "final", dtype="auto")
    assert final.dtype == dtype and type(final) is type(whole.model)
    merge_expert_lora(load_expert_lora(base, tmp_path / "whole" / "final"), unload=True)
    expected = base.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in final.state_dict().items())
    assert final.state_dict().keys() == expected.keys()


def test_runs_with_and_without_adapters_do_not_resume_from_each_other(tmp_path):
    train("mixtral", tmp_path / "lora", max_steps=3)
    with pytest.raises(MoEError, match="with adapters"):
        train(
            "mixtral", tmp_path / "moe", resume=str(tmp_path / "lora/checkpoint-3"), scope="moe", expert_selection=None
        )
    train("mixtral", tmp_path / "all", max_steps=3, scope="moe", expert_selection=None)
    with pytest.raises(MoEError, match="without adapters"):
        train("mixtral", tmp_path / "again", resume=str(tmp_path / "all/checkpoint-3"))
