"""Distillation: the loss is the textbook's, padding does not count, accumulation does not matter, and it stops in time."""

import copy

import pytest
import torch

from moe_hf import MoEError
from moe_hf.trainer.distillation import DistillationArguments, DistillationTrainer, distillation_loss
from tests.tiny_models import random_ids, tiny_dense
from tests.trainer.runs import GradientRecorder, rows, tiny_moe


pytestmark = pytest.mark.numerics


QUIET = {
    "scope": "all", "max_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "logging_steps": 1,
}  # fmt: skip


def test_loss_of_two_classes_is_the_golden_number():
    # T = 2: softmax((2, 0) / 2) = (.7311, .2689) against (.5, .5): KL = 0.1201145, times T^2 = 0.4804578.
    student, teacher = torch.tensor([[[2.0, 0.0], [0, 0]]]), torch.zeros(1, 2, 2)
    assert float(distillation_loss(student, teacher, torch.tensor([[0, 1]]), 2.0)) == pytest.approx(
        0.4804578, abs=1e-6
    )


def test_loss_counts_scored_tokens_alone_and_has_the_gradient_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([[3, 1, -100, 2, 0], [-100, -100, -100, 4, -100]])
    student.requires_grad_(True)
    expected = torch.zeros((), dtype=torch.float64)
    for b, i in ((0, 1), (0, 3), (0, 4), (1, 3)):
        p, q = (teacher[b, i - 1] / 3).softmax(-1), (student[b, i - 1] / 3).softmax(-1)
        expected = expected + 9 * (p * (p.log() - q.log())).sum()
    loss = distillation_loss(student, teacher, labels, 3.0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    own, wanted = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected))
    assert torch.allclose(own, wanted, atol=1e-6)
    assert float(distillation_loss(teacher, teacher, labels, 3.0)) == 0
    assert float(distillation_loss(student, teacher, torch.full_like(labels, -100)).detach()) == 0


def gradients(student, teacher, folder, count=4, **fields):
    recorder = GradientRecorder()
    args = DistillationArguments(output_dir=str(folder), **(QUIET | {"per_device_train_batch_size": 4} | fields))
    trainer = DistillationTrainer(student, args, teacher=teacher, train_dataset=rows(count), callbacks=[recorder])
    trainer.train()
    return recorder.gradients, trainer


def test_gradient_is_that_of_the_sum_of_both_losses_whatever_the_accumulation(tmp_path):
    teacher, data = tiny_dense("llama", seed=5), rows(4)
    student = tiny_moe(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    reference = copy.deepcopy(student).train()
    ids = torch.tensor(data["input_ids"])
    logits = reference(ids, labels=ids)
    with torch.no_grad():
        wanted = teacher(ids).logits
    total = distillation_loss(logits.logits, wanted, ids, 2.0) / ids[:, 1:].numel()
    (logits.loss + 0.5 * total).backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for accumulation in (1, 4):
        own, _ = gradients(
            copy.deepcopy(student),
            teacher,
            tmp_path / str(accumulation),
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            kd_beta=0.5,
            kd_temperature=2.0,
        )
        for name, gradient in expected.items():
            assert torch.allclose(own[name], gradient, rtol=1e-4, atol=1e-6), name


def test_teacher_is_not_heard_from_the_stop_step_on_nor_changed(tmp_path):
    teacher, student = tiny_dense("llama", seed=5), tiny_moe()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    stopped, _ = gradients(copy.deepcopy(student), teacher, tmp_path / "a", kd_stop_step=0)
    silent, _ = gradients(copy.deepcopy(student), teacher, tmp_path / "b", kd_beta=0.0)
    heard, trainer = gradients(copy.deepcopy(student), teacher, tmp_path / "c")
    assert all(torch.equal(stopped[name], silent[name]) for name in silent)
    assert any(not torch.allclose(heard[name], silent[name]) for name in silent)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.teacher.state_dict().items())
    assert not trainer.teacher.training


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    args = DistillationArguments(output_dir=str(tmp_path), **QUIET)
    with pytest.raises(MoEError, match="one vocabulary"):
        DistillationTrainer(tiny_moe(), args, teacher=tiny_dense("llama", vocab_size=99))


def test_evaluation_is_the_labels_loss(tmp_path):
    _, trainer = gradients(tiny_moe(), tiny_dense("llama", seed=5), tmp_path)
    ids = random_ids(2, 9)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), {"input_ids": ids, "labels": ids})
        assert torch.allclose(loss, trainer.model(ids, labels=ids).loss)
