"""Classifiers: a MoE decoder under the dense family's own head, or transformers' generic one, equals its dense twin."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from moe_hf import MoEConfig, MoEError, MoEForSequenceClassification, MoEForTokenClassification, upcycle
from tests.closeness import bitwise, close
from tests.families import FAMILIES
from tests.tiny_models import random_ids, randomise_, tiny_config, tiny_dense


SLICE = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "starcoder2", "olmo2", "granite")
# transformers has no classifier of these families, and no decoder that its generic heads fit.
REFUSED = ("bart", "trocr", "whisper")
REFUSED_CASES = [(cls, f) for cls in (MoEForSequenceClassification, MoEForTokenClassification) for f in REFUSED]
TASKS = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
LABELS = 5


def make_labels(task: str, ids: torch.Tensor) -> torch.Tensor:
    return ids[:, 0] % LABELS if task == "sequence" else ids % LABELS


def classifier_pair(family: str, task: str, folder, **fields) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A MoE classifier loaded from an upcycled causal LM, and the dense one with the same decoder and head."""
    dense = tiny_dense(family, pad_token_id=0)
    upcycle(dense, num_experts=3, **fields).save_pretrained(folder)
    moe = TASKS[task].from_pretrained(folder, num_labels=LABELS).eval()
    config = copy.deepcopy(dense.config)
    config.num_labels = LABELS
    twin = type(moe)._dense_class._from_config(config).eval()
    shared = {name: value for name, value in moe.state_dict().items() if name in twin.state_dict()}
    missing = twin.load_state_dict(dense.state_dict() | shared, strict=False).missing_keys
    assert missing == []
    return moe, twin


def check_equals_dense(family: str, task: str, folder) -> None:
    moe, twin = classifier_pair(family, task, folder)
    ids = random_ids(2, 9)
    ids[1, 6:] = 0  # padding
    mask = (ids != 0).long()
    with torch.no_grad():
        expected = twin(ids, attention_mask=mask, labels=make_labels(task, ids))
        result = moe(ids, attention_mask=mask, labels=make_labels(task, ids), output_router_logits=True)
    assert result.logits.shape == ((2, LABELS) if task == "sequence" else (2, 9, LABELS))
    assert (result.logits - expected.logits).norm() <= 2e-6 * expected.logits.norm()
    assert torch.allclose(result.loss, expected.loss, rtol=2e-6)
    assert len(result.router_logits) == len([m for m in moe.modules() if type(m).__name__ == "MoEBlock"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", SLICE)
def test_classifier_equals_the_dense_one(family, task, tmp_path):
    check_equals_dense(family, task, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task"),
    [
        (family, task)
        for family in FAMILIES
        for task in TASKS
        if family not in (*SLICE, *REFUSED) and (family, task) != ("recurrent_gemma", "sequence")
    ],
)
def test_classifier_equals_the_dense_one_in_every_family(family, task, tmp_path):
    check_equals_dense(family, task, tmp_path)


@pytest.mark.parametrize(("cls", "family"), [*REFUSED_CASES, (MoEForSequenceClassification, "recurrent_gemma")])
def test_families_without_a_head_are_refused_by_name(family, cls):
    with pytest.raises(MoEError, match=rf"(?i){family.replace('_', '_?')}"):
        cls(MoEConfig(text_config=tiny_config(family), num_experts=3))


def test_encoders_are_refused():
    config = MoEConfig(text_config=tiny_config("bert"), num_experts=3)
    with pytest.raises(MoEError, match="not a decoder"):
        MoEForSequenceClassification(config)


@pytest.mark.numerics
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["llama", "granite"])  # an own head; a generic one for both tasks
def test_labels_save_load_and_pickle(family, task, tmp_path):
    moe, _ = classifier_pair(family, task, tmp_path / "causal", noise=0.2)
    moe.config.id2label = {i: f"class {i}" for i in range(LABELS)}
    randomise_(moe, seed=3)
    moe.save_pretrained(tmp_path / "saved")
    again = TASKS[task].from_pretrained(tmp_path / "saved").eval()
    assert type(again) is type(moe)
    assert again.config.id2label[3] == "class 3"
    assert again.config.architectures == [type(moe).__name__]
    ids = random_ids(2, 9)
    with torch.no_grad():
        for copied in (again, pickle.loads(pickle.dumps(moe))):
            assert bitwise(copied.state_dict(), moe.state_dict()) and close(copied(ids).logits, moe(ids).logits)


@pytest.mark.parametrize("task", TASKS)
def test_router_losses_enter_once_in_training_and_reach_the_router(task, tmp_path):
    moe, twin = classifier_pair("llama", task, tmp_path)
    moe.config.router_aux_loss_coef, moe.config.router_z_loss_coef = 0.5, 0.25
    ids = random_ids(2, 9)
    labels = make_labels(task, ids)
    moe.train()
    result = moe(ids, labels=labels)
    for dropout in [m for m in (*moe.modules(), *twin.modules()) if isinstance(m, torch.nn.Dropout)]:
        dropout.p = 0.0
    result, expected = moe(ids, labels=labels), twin(ids, labels=labels)
    losses = result.router_losses
    aux_loss = 0.5 * losses["load_balancing_loss"] + 0.25 * losses["router_z_loss"]
    assert torch.allclose(result.aux_loss, aux_loss)
    assert torch.allclose(result.loss, expected.loss + aux_loss, rtol=1e-6)
    result.aux_loss.backward()
    assert all(block.gate.weight.grad.abs().sum() > 0 for block in moe.modules() if hasattr(block, "gate"))
    assert moe.eval()(ids, labels=labels).aux_loss is None


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accumulation_does_not_change_the_gradient(accumulation, tmp_path):
    moe, _ = classifier_pair("llama", "sequence", tmp_path / "model")
    row = random_ids(1, 8)[0]
    rows = [{"input_ids": row, "labels": torch.tensor(2)} for _ in range(4)]
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    before = {name: p.detach().clone() for name, p in moe.named_parameters()}
    expected = copy.deepcopy(moe).train()
    expected(torch.stack([row] * 4), labels=torch.full((4,), 2)).loss.backward()
    Trainer(moe, args, train_dataset=rows).train()
    for name, parameter in expected.named_parameters():
        step = before[name] - dict(moe.named_parameters())[name]
        assert torch.allclose(step, parameter.grad, rtol=1e-4, atol=1e-6), name


def test_a_policy_gradient_is_refused():
    config = MoEConfig(
        text_config=tiny_config("llama"),
        num_experts=3,
        num_experts_per_tok=1,
        router_type="bernoulli",
        router_loss_coefs={"policy_gradient_loss": 0.1},
    )
    with pytest.raises(MoEError, match="policy_gradient_loss"):
        MoEForSequenceClassification(config)
