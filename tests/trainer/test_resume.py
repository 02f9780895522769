"""Resuming: bitwise where the checkpoint is whole, refused or an older one where it is not."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from moe_hf import MoEError
from moe_hf.saving import MANIFEST_NAME, verify_manifest
from moe_hf.trainer import MoETrainer
from moe_hf.trainer.checkpoints import load_weights_, newest_whole_checkpoint
from tests.tiny_models import tiny_native_moe
from tests.trainer.runs import KINDS, arguments, losses, resumed, rows, tiny_moe


@pytest.fixture(scope="module", params=KINDS)
def six_steps(request, tmp_path_factory):
    """The kind of model, its folder with checkpoints 3 and 6, and its trainer."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, resumed(request.param, folder)


def assert_same(actual, expected) -> None:
    """Compare nested containers of tensors, arrays and numbers bit by bit."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    else:
        assert bool((actual == expected) if not hasattr(expected, "all") else (actual == expected).all())


def test_three_plus_three_steps_equal_six_bitwise(six_steps, tmp_path):
    kind, folder, whole = six_steps
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    again = resumed(kind, tmp_path, tmp_path / "checkpoint-3")
    assert_same(again.model.state_dict(), whole.model.state_dict())
    assert losses(again) == losses(whole) and len(losses(whole)) == 6
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        first, second = (torch.load(f / "checkpoint-6" / name, weights_only=False) for f in (folder, tmp_path))
        assert_same(second, first)


def test_resume_takes_the_newest_checkpoint_whose_manifest_holds(six_steps, tmp_path, capsys):
    kind, folder, whole = six_steps
    for step in (3, 6):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    weights = tmp_path / "checkpoint-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    args = whole.args.__class__(**{**whole.args.to_dict(), "output_dir": str(tmp_path), "report_to": "none"})
    fields = {"router_jitter_noise": 0.1} if kind == "ours" else {}
    trainer = MoETrainer(tiny_moe(kind, dropout=0.2, **fields), args, train_dataset=rows(28))
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-3" in capsys.readouterr().out
    assert_same(trainer.model.state_dict(), whole.model.state_dict())
    # The damaged folder has been written anew.
    verify_manifest(tmp_path / "checkpoint-6")


def test_run_resumed_at_its_end_trains_no_further_step(six_steps, tmp_path):
    kind, folder, whole = six_steps
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    again = resumed(kind, tmp_path, tmp_path / "checkpoint-6")
    assert again.state.global_step == 6
    assert_same(again.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("fault", ["truncated", "missing", "no manifest"])
def test_damaged_checkpoint_is_refused(fault, six_steps, tmp_path):
    kind, folder, _ = six_steps
    copy = shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    if fault == "truncated":
        (copy / "optimizer.pt").write_bytes((copy / "optimizer.pt").read_bytes()[:-10])
    else:
        (copy / (MANIFEST_NAME if fault == "no manifest" else "model.safetensors")).unlink()
    assert newest_whole_checkpoint(tmp_path) is None
    trainer = MoETrainer(tiny_moe(kind), arguments(tmp_path), train_dataset=rows(4))
    with pytest.raises(MoEError, match="optimizer.pt|manifest|model.safetensors"):
        trainer.train(resume_from_checkpoint=str(copy))
    with pytest.raises(MoEError, match="No whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_fresh_start_among_checkpoints_of_an_earlier_run_is_refused(six_steps):
    kind, folder, _ = six_steps
    with pytest.raises(MoEError, match="earlier run"):
        MoETrainer(tiny_moe(kind), arguments(folder), train_dataset=rows(4)).train()


def test_checkpoint_without_optimizer_is_refused(tmp_path):
    args = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer = MoETrainer(tiny_moe(), args, train_dataset=rows(4))
    trainer.train()
    with pytest.raises(MoEError, match=r"optimizer\.pt"):
        trainer.train(resume_from_checkpoint=True)


def test_failed_save_leaves_no_folder(tmp_path, monkeypatch):
    args = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer = MoETrainer(tiny_moe(), args, train_dataset=rows(4))

    def full_disk(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer, "_save_rng_state", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(kind, tmp_path):
    tiny_moe(kind).save_pretrained(tmp_path)
    if kind == "ours":
        other = tiny_moe(shared_expert_intermediate_size=24, allow_inexact=True)
    else:
        other = tiny_native_moe(kind, intermediate_size=72)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(MoEError, match="do not fit"):
        load_weights_(other, tmp_path)
    assert_same(other.state_dict(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_that_lacks_one_tensor_is_refused(kind, tmp_path):
    model = tiny_moe(kind)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(tensors) if "experts" in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MoEError, match="do not fit|Could not load the weights"):
        load_weights_(model, tmp_path)
    assert_same(model.state_dict(), before)


def test_float32_masters_come_back_bit_by_bit(tmp_path):
    model = tiny_moe().to(torch.bfloat16)
    args = arguments(
        tmp_path, scope="moe", max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-5, warmup_steps=0
    )
    trainer = MoETrainer(model, args, train_dataset=rows(8))
    trainer.train()
    other = tiny_moe().to(torch.bfloat16)
    again = MoETrainer(other, args, train_dataset=rows(8))
    load_weights_(other, tmp_path / "checkpoint-2")
    assert_same(again.model.state_dict(), trainer.model.state_dict())
    assert {p.dtype for p in other.parameters()} == {torch.float32, torch.bfloat16}


def test_stock_trainer_still_loses_experts_on_resume(tmp_path):
    """When this fails, transformers converts checkpoints on resume and `MoETrainer._load_from_checkpoint` can go."""
    fields = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).to_dict()
    names = set(TrainingArguments.__dataclass_fields__)
    fields = {name: value for name, value in fields.items() if name in names and value is not None}
    stock = Trainer(tiny_moe("mixtral"), TrainingArguments(**fields), train_dataset=rows(8))
    stock.train()
    other = tiny_native_moe("mixtral", seed=5)
    stock._load_from_checkpoint(str(tmp_path / "checkpoint-2"), other)
    expert = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(other.state_dict()[expert], stock.model.state_dict()[expert])
