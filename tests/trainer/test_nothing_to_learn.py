"""A step whose labels are all ignored counts 0, wherever it appears; training goes on, and it is said once."""

import math

import pytest
import torch
from transformers import TrainingArguments

import moe_hf
from moe_hf.trainer.distillation import DistillationArguments, DistillationTrainer
from tests.tiny_models import tiny_dense
from tests.trainer.multiplier import HAS_TRL
from tests.trainer.runs import arguments, losses, tiny_moe
from tests.trainer.unlabelled import RUNS, Warned, model_of, packed, run, trainer_of, unlabelled_rows


@pytest.mark.parametrize("name", RUNS)
def test_a_step_without_labels_counts_0_and_training_goes_on(name, tmp_path):
    found = run(name, tmp_path)
    assert found["losses"][0] == found["largest"][0] == 0.0, "router losses too"
    assert all(0.1 < loss < 10 for loss in found["losses"][1:]) and min(found["largest"][1:]) > 1e-3
    assert all(tensor.isfinite().all() for tensor in found["weights"].values())
    assert found["warnings"] == 1


@pytest.mark.skipif(not HAS_TRL, reason="needs trl")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("way", "kind"), [("moe_trainer", "ours"), ("added", "mixtral")])
def test_a_packed_step_without_labels_counts_0_in_trl_s_trainers(way, kind, tmp_path):
    found = packed(way, kind, tmp_path)
    assert found["losses"][0] == found["largest"][0] == 0.0
    assert all(0.1 < loss < 10 for loss in found["losses"][1:]) and found["warnings"] == 1


def test_what_a_loss_of_one_s_own_divides_by_is_not_0(tmp_path):
    def own(outputs, labels, num_items_in_batch):
        scored = (labels[:, 1:] != -100).float()
        log_p = outputs.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp_min(0))[..., 0]
        return -(log_p * scored).sum() / num_items_in_batch

    model, args = tiny_moe(), arguments(tmp_path, max_steps=1)
    trainer = moe_hf.MoETrainer(model, args, train_dataset=unlabelled_rows((0, 0, 0, 0)), compute_loss_func=own)
    trainer.train()
    assert losses(trainer) == [0.0] and all(p.isfinite().all() for p in model.parameters())


def test_a_teacher_says_nothing_where_there_are_no_labels(tmp_path):
    args = DistillationArguments(**arguments(tmp_path, max_steps=1).to_dict() | {"scope": "all"})
    data = unlabelled_rows((0, 0, 0, 0))
    trainer = DistillationTrainer(tiny_moe(), args, teacher=tiny_dense("llama", seed=5), train_dataset=data)
    trainer.train()
    assert losses(trainer) == [0.0]


def test_a_pass_of_our_model_alone_has_a_loss_of_0_and_no_gradient():
    model = tiny_moe(router_aux_loss_coef=1.0).train()
    batch = {"input_ids": torch.tensor(unlabelled_rows((1,))["input_ids"]), "labels": torch.full((1, 16), -100)}
    with Warned() as warned:
        for count in (None, 0, torch.tensor(0)):
            outputs = model(**batch, num_items_in_batch=count)
            outputs.loss.backward()
            assert outputs.loss == outputs.aux_loss == 0.0
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert warned.count == 1
    assert model.eval()(**batch).loss.isnan(), "in evaluation the mean over no labels is none, as in the dense model"


@pytest.mark.parametrize("kind", ["ours", "mixtral", "dense", "ours in a stock Trainer"])
def test_an_evaluation_leaves_batches_without_labels_out(kind, tmp_path):
    kind, _, stock = kind.partition(" in a ")
    args = arguments(tmp_path, per_device_eval_batch_size=1)
    if stock:
        args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, report_to="none", use_cpu=True)
    trainer = trainer_of("stock" if stock else "moe_trainer", model_of(kind), args)
    data = unlabelled_rows((0, 1, 0, 1))
    mixed = trainer.evaluate(data)["eval_loss"]
    assert mixed == pytest.approx(trainer.evaluate(data.select([1, 3]))["eval_loss"], abs=1e-6)
    assert math.isnan(trainer.evaluate(data.select([0, 2]))["eval_loss"])


def test_an_evaluation_that_is_lost_is_not_left_out(tmp_path):
    model, data = tiny_moe(), unlabelled_rows((1, 1, 0))
    only_in_first = (set(data["input_ids"][0]) - set(data["input_ids"][1])).pop()
    with torch.no_grad():
        model.model.embed_tokens.weight[only_in_first] = float("inf")
    trainer = moe_hf.MoETrainer(model, arguments(tmp_path, per_device_eval_batch_size=1))
    assert math.isfinite(trainer.evaluate(data.select([1, 2]))["eval_loss"])
    assert math.isnan(trainer.evaluate(data)["eval_loss"])


def test_a_loss_that_is_not_finite_for_another_reason_still_ends_the_run(tmp_path):
    model = tiny_moe()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    trainer = moe_hf.MoETrainer(model, arguments(tmp_path), train_dataset=unlabelled_rows((1,) * 16))
    with pytest.raises(moe_hf.MoEError, match="loss is nan at step 1"):
        trainer.train()
