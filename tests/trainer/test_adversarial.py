"""Adversarial training in turns: the attack is bounded and works, and each turn moves its own parameters alone."""

import copy

import pytest
import torch

from moe_hf import MoEError
from moe_hf.finetuning.scopes import scope_parameter_names
from moe_hf.trainer.adversarial import AdversarialArguments, AdversarialTrainer, attack, divergence, perturbed_inputs
from tests.tiny_models import random_ids, tiny_dense
from tests.trainer.runs import rows, tiny_moe
from tests.trainer.test_distillation import QUIET


def changed(model, before: dict) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def train(model, folder, **fields):
    args = AdversarialArguments(
        output_dir=str(folder),
        **(QUIET | {"scope": "moe", "per_device_train_batch_size": 4, "weight_decay": 0.1} | fields),
    )
    trainer = AdversarialTrainer(model, args, train_dataset=rows(24), eval_dataset=rows(4))
    trainer.train()
    return trainer


def measured(model, inputs, delta):
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    given = perturbed_inputs(model, inputs)
    with torch.no_grad():
        clean = model(**given, inputs_embeds=embeddings)
        return divergence(model(**given, inputs_embeds=embeddings + delta), clean)


@pytest.mark.parametrize("kind", ["ours", "mixtral", "dense"])
def test_attack_stays_within_its_bound_and_changes_more_than_noise_of_that_size(kind):
    model = tiny_dense("llama") if kind == "dense" else tiny_moe(kind)
    ids = random_ids(2, 9)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    delta = attack(model.train(), inputs, eps=0.2, steps=3)
    limit = 0.2 * model.get_input_embeddings()(ids).square().mean().sqrt()
    assert delta.abs().max() <= limit * (1 + 1e-6)
    noise = limit * torch.sign(torch.randn(delta.shape, generator=torch.Generator().manual_seed(1)))
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()
    attacked, random = measured(model, inputs, delta), measured(model, inputs, noise)
    assert attacked[0] > 1.5 * random[0]
    assert kind == "dense" or attacked[1] > random[1] > 0
    assert torch.equal(attack(model, inputs, eps=0.2, steps=3), delta)


def test_without_an_adversary_nothing_is_added(tmp_path):
    model = tiny_moe()
    ids = random_ids(2, 9)
    trainer = train(copy.deepcopy(model), tmp_path, adv_eps=0.0)
    trainer.model.train()
    with_adversary = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids})
    assert torch.allclose(with_adversary, trainer.model(ids, labels=ids).loss)
    assert all(float(x) == pytest.approx(0, abs=1e-9) for x in measured(model, {"input_ids": ids}, 0.0))


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_turns_move_experts_then_routers_and_never_both(kind, tmp_path):
    model = tiny_moe(kind)
    routers = set(scope_parameter_names(model, "router"))
    moe = set(scope_parameter_names(model, "moe"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = train(copy.deepcopy(model), tmp_path / "1", max_steps=1)
    assert changed(first.model, before) == moe - routers
    second = train(copy.deepcopy(model), tmp_path / "2", max_steps=2, lr_scheduler_type="constant")
    after_first = {name: parameter.detach() for name, parameter in first.model.named_parameters()}
    # The first step of both runs is the same but for the schedule's length.
    first = train(copy.deepcopy(model), tmp_path / "3", max_steps=1, lr_scheduler_type="constant")
    after_first = {name: parameter.detach() for name, parameter in first.model.named_parameters()}
    assert changed(second.model, after_first) == routers


def test_a_dense_model_trains_at_every_step_and_evaluation_reports_the_attacked_loss(tmp_path):
    trainer = train(tiny_dense("llama"), tmp_path, scope="ffn", max_steps=2)
    metrics = trainer.evaluate()
    assert abs(metrics["eval_loss_attacked"] - metrics["eval_loss"]) > 1e-3
    trainer.args.adv_eps = 0.0
    assert trainer.evaluate()["eval_loss_attacked"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_one_part_alone_cannot_take_turns(tmp_path):
    with pytest.raises(MoEError, match="in turns"):
        train(tiny_moe(), tmp_path, scope="experts")


def test_training_under_attack_lowers_the_change_under_attack(tmp_path):
    model, ids = tiny_moe(router_aux_loss_coef=0.0, router_z_loss_coef=0.0), torch.tensor(rows(8)["input_ids"])
    inputs = {"input_ids": ids, "labels": ids}
    trainer = train(copy.deepcopy(model), tmp_path, max_steps=12, adv_expert_beta=10.0, adv_router_beta=10.0)
    plain = train(copy.deepcopy(model), tmp_path / "plain", max_steps=12, adv_expert_beta=0.0, adv_router_beta=0.0)
    changes = []
    for trained in (trainer.model.eval(), plain.model.eval()):
        changes.append(measured(trained, inputs, attack(trained, inputs, eps=0.1, steps=3)))
    assert changes[0][0] < changes[1][0]
