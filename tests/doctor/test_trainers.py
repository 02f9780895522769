"""What a run would lose, found in a step that changes nothing: bugs of public issues in trainers and routers."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import moe_hf
from moe_hf.doctor import examine_trainer
from moe_hf.errors import MoEError
from tests.closeness import bitwise
from tests.doctor.faults import found, is_silent, learnt
from tests.tiny_models import random_ids, tiny_dense


def rows(labels=None, **columns):
    ids = random_ids(8, 16, vocab=61)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "labels": (ids if labels is None else labels).tolist(), **columns}
    )


def moe(**fields):
    return moe_hf.upcycle(
        tiny_dense("llama", vocab_size=61), **({"num_experts": 4, "num_experts_per_tok": 2} | fields)
    )


def ours(tmp_path, model=None, data=None, **settings):
    settings = {
        "scope": "moe",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "report_to": "none",
    } | settings
    args = moe_hf.MoETrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **settings)
    return moe_hf.MoETrainer(model=moe() if model is None else model, args=args, train_dataset=data or rows())


def stock(tmp_path, model, data=None, **settings):
    settings = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "report_to": "none"} | settings
    args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **settings)
    return Trainer(model=model, args=args, train_dataset=data or rows())


def test_a_step_that_leaves_no_trace(tmp_path):
    trainer = ours(tmp_path, moe(balance_strategy="bias"), gradient_accumulation_steps=2)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    report = examine_trainer(trainer)
    assert is_silent(report)
    assert bitwise(trainer.model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert trainer.optimizer is None
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert [f.figure for f in found(report, "router-losses", "note") if "balancing" in f.message] == [
        trainer.router_losses.coefficients["load_balancing_loss"]
    ]


def test_an_examined_run_gives_the_weights_of_one_that_was_not(tmp_path):
    runs = []
    for examined in (False, True):
        trainer = ours(tmp_path / str(examined), max_steps=2, save_strategy="no")
        if examined:
            examine_trainer(trainer)
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert bitwise(*runs)


def test_a_balance_loss_that_a_native_moe_does_not_compute(tmp_path):
    """huggingface/transformers#44242: output_router_logits is false, and router_aux_loss_coef has no effect."""
    trainer = stock(tmp_path, learnt("mixtral", vocab_size=61, router_aux_loss_coef=0.02))
    assert found(examine_trainer(trainer), "balance-loss-silent", "warning")[0].layers == (0, 1, 2)


def test_a_router_whose_logits_are_probabilities(tmp_path, monkeypatch):
    """huggingface/transformers#45120: a softmax of a softmax balances next to nothing."""
    model = learnt("mixtral", vocab_size=61)
    for layer in model.model.layers:
        forward = layer.mlp.gate.forward
        layer.mlp.gate.forward = lambda x, f=forward: (lambda logits, *rest: (logits.softmax(-1), *rest))(*f(x))
    assert "probabilities" in found(examine_trainer(ours(tmp_path, model)), "balance-loss-silent")[0].message


def test_a_router_that_the_loss_cannot_reach(tmp_path):
    """jingyaogong/minimind#858: one expert per token, whose weight is divided by itself."""
    model = learnt("qwen3_moe", vocab_size=61, num_experts_per_tok=1, norm_topk_prob=True)
    assert found(examine_trainer(ours(tmp_path, model)), "router-untrainable", "warning")[0].layers == (0, 1, 2)


def test_nothing_and_something_that_does_not_train(tmp_path):
    """deepspeedai/DeepSpeed#2413 and its kind: what trains, what gets a gradient, what the optimizer holds."""
    model = moe()
    trainer = stock(tmp_path, model.requires_grad_(False))
    assert found(examine_trainer(trainer), "nothing-trains")
    model.requires_grad_(True)
    # unslothai/unsloth#6936: a parameter that nothing computes with.
    model.model.layers[0].register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    report = examine_trainer(stock(tmp_path, model))
    assert "spare" in found(report, "no-gradient", "warning")[0].message
    assert found(report, "trained-not-saved")
    late = stock(tmp_path, moe().requires_grad_(False))
    late.model.lm_head.requires_grad_(True)
    late.create_optimizer()
    late.model.requires_grad_(True)
    assert "experts" in found(examine_trainer(late), "not-in-optimizer")[0].message


def test_steps_that_round_to_nothing(tmp_path):
    """Rates of fine-tuning are below what bfloat16 holds of a weight."""
    trainer = stock(tmp_path, moe().to(torch.bfloat16), learning_rate=1e-6)
    assert found(examine_trainer(trainer), "update-below-resolution", "warning")[0].figure > 0.5
    assert not examine_trainer(ours(tmp_path, moe(), learning_rate=1e-6)).warnings


def test_labels_that_are_all_ignored(tmp_path):
    ignored = torch.full((8, 16), -100)
    assert found(examine_trainer(ours(tmp_path, data=rows(ignored))), "labels-ignored")
    half = random_ids(8, 16, vocab=61)
    half[::2] = -100
    assert found(examine_trainer(ours(tmp_path, data=rows(half))), "labels-ignored", "warning")


def test_packed_documents_that_see_each_other(tmp_path):
    """Families whose positions do not follow position_ids leak between packed documents."""
    positions = [list(range(8)) * 2] * 8
    model = moe_hf.upcycle(tiny_dense("opt", vocab_size=61), num_experts=4, num_experts_per_tok=2)
    leaking = ours(tmp_path, model, rows(position_ids=positions))
    assert found(examine_trainer(leaking), "documents-leak", "warning")
    assert is_silent(examine_trainer(ours(tmp_path, data=rows(position_ids=positions))))


def test_scopes_and_adapters_are_silent(tmp_path):
    for settings in ({"scope": "experts"}, {"scope": "router"}, {"scope": "all"}, {"scope": "expert_lora"}):
        assert is_silent(examine_trainer(ours(tmp_path, **settings)))


def test_what_is_no_trainer_is_refused(tmp_path):
    with pytest.raises(MoEError, match="is no Trainer"):
        examine_trainer(moe())
