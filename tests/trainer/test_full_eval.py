"""`bf16_full_eval` and `fp16_full_eval` evaluate in 16 bits, and leave the weights and the run as they are."""

import pytest
import torch

from moe_hf.trainer import MoETrainer
from tests.tiny_models import tiny_native_moe
from tests.trainer.runs import arguments, rows, tiny_moe


FLAGS = ("bf16_full_eval", "fp16_full_eval")
KINDS = {
    "masters of a bfloat16 model": {"scope": "moe"},
    "adapters": {"scope": "expert_lora"},
    "selected": {"scope": "selected", "expert_selection": {"experts": {"1": [0, 2]}}},
    "all in float32": {"scope": "all"},
}


def model_of(kind):
    model = tiny_moe(balance_strategy="bias") if kind != "adapters" else tiny_native_moe()
    return model if kind == "all in float32" else model.to(torch.bfloat16)


def trainer_of(kind, folder, **fields):
    return MoETrainer(
        model_of(kind),
        arguments(folder, max_steps=2, **KINDS[kind], **fields),
        train_dataset=rows(),
        eval_dataset=rows(8),
    )


def state(model):
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def dtypes_of(model):
    return {parameter.dtype for parameter in model.parameters()}


def assert_same(model, tensors):
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_in_16_bits_leaves_every_bit_and_the_run_as_it_is(kind, flag, tmp_path, monkeypatch):
    trainer = trainer_of(kind, tmp_path / "full", **{flag: True}, eval_strategy="steps", eval_steps=1)
    before, parameters = state(trainer.model), [id(p) for p in trainer.model.parameters()]
    seen, own = set(), {torch.bfloat16 if flag == "bf16_full_eval" else torch.float16}
    trainer.model.register_forward_pre_hook(lambda m, args: None if m.training else seen.update(dtypes_of(m)))
    first = trainer.evaluate()["eval_loss"]
    trainer.predict(rows(4))
    assert_same(trainer.model, before)
    assert [id(p) for p in trainer.model.parameters()] == parameters
    rounds, plain_loop = [], trainer.evaluation_loop

    def watched(*args, **kwargs):
        before = state(trainer.model)
        output = plain_loop(*args, **kwargs)
        assert_same(trainer.model, before)
        rounds.append(trainer.is_in_train)
        return output

    monkeypatch.setattr(trainer, "evaluation_loop", watched)
    trainer.train()
    assert rounds == [True, True]
    assert trainer.evaluate()["eval_loss"] < first
    assert seen == own
    assert getattr(trainer.args, flag)
    trained = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {p for p in trainer.model.parameters() if p.requires_grad}
