"""Parameter groups, idle experts, the guard, expert dropout and early stopping: each with the law that it keeps."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import moe_hf
from moe_hf import MoEError
from moe_hf.trainer.parameter_groups import decayed_names
from tests.tiny_models import random_ids, tiny_dense, tiny_native_moe
from tests.trainer.multiplier import HAS_TRL, trainer_of
from tests.trainer.runs import arguments, losses, rows, tiny_moe


pytestmark = pytest.mark.numerics


KINDS = ("ours", "mixtral")


class Recorder(TrainerCallback):
    """Keeps the parameter groups and copies of all weights before the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if state.global_step == 0:
            self.groups = [dict(group) for group in optimizer.param_groups]
            self.before = {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_each_parameter_is_in_one_group_with_the_rate_of_its_part(kind, tmp_path):
    model, recorder = tiny_moe(kind), Recorder()
    args = arguments(
        tmp_path,
        max_steps=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        router_learning_rate=5e-3,
        expert_weight_decay=0.02,
        lr_scheduler_type="linear",
    )
    trainer = moe_hf.MoETrainer(model, args, train_dataset=rows(16), callbacks=[recorder])
    trainer.train()
    where = {id(p): group for group in recorder.groups for p in group["params"]}
    assert sum(len(group["params"]) for group in recorder.groups) == len(where) == len(list(model.parameters()))
    decays = decayed_names(model)
    assert decays == set(trainer.get_decay_parameter_names(model))
    for name, parameter in model.named_parameters():
        group = where[id(parameter)]
        part = "experts" if ".experts." in name else "router" if name.endswith("gate.weight") else "rest"
        rate, decay = {"rest": (1e-3, 0.1), "router": (5e-3, 0.1), "experts": (1e-3, 0.02)}[part]
        assert (group["part"], group["initial_lr"]) == (part, rate), name
        assert group["weight_decay"] == (decay if name in decays else 0.0), name
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries[0]["learning_rate"] == pytest.approx(1e-3)
    assert [entry["learning_rate_router"] for entry in entries] == pytest.approx([2.5e-3, 0.0])


def test_groups_serve_any_optimizer_and_refuse_parts_that_do_not_train(tmp_path):
    model = tiny_moe()
    groups = moe_hf.parameter_groups(model, 1e-3, 0.1, expert_learning_rate=1e-4)
    assert {group["part"]: group["lr"] for group in groups} == {"rest": 1e-3, "router": 1e-3, "experts": 1e-4}
    optimizer = torch.optim.AdamW(groups)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    args = arguments(tmp_path, scope="experts", router_learning_rate=1e-3)
    with pytest.raises(MoEError, match="router_learning_rate is given, and no parameter"):
        moe_hf.MoETrainer(model, args, train_dataset=rows(4)).train()
    with pytest.raises(MoEError, match="expert_weight_decay is -1"):
        arguments(tmp_path, expert_weight_decay=-1.0)


def starved(kind: str = "ours") -> tuple[nn.Module, list[int], list[int]]:
    """A model, and which experts of its layer 1 get tokens and which none: all logits there are equal."""
    model = tiny_moe(kind, router_aux_loss_coef=0.0)
    gate = model.model.layers[1].mlp.gate
    with torch.no_grad():
        gate.weight.zero_()
        chosen = sorted(gate(torch.randn(64, 48))[2].unique().tolist())
    assert len(chosen) == 2
    return model, chosen, [expert for expert in range(4) if expert not in chosen]


@pytest.mark.parametrize(
    ("optim", "skip"), [("adamw_torch", False), *((o, True) for o in ("adamw_torch", "sgd", "adafactor"))]
)
def test_idle_experts_keep_their_weights_bit_by_bit(skip, optim, tmp_path):
    model, busy, idle = starved()
    experts = model.model.layers[1].mlp.experts
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    args = arguments(tmp_path, scope="experts", weight_decay=0.5, optim=optim, skip_idle_experts=skip)
    moe_hf.MoETrainer(model, args, train_dataset=rows(16)).train()
    for name, parameter in experts.named_parameters():
        assert not torch.equal(parameter[busy], before[name][busy])
        assert torch.equal(parameter[idle], before[name][idle]) == skip


def test_an_expert_that_rests_keeps_its_momentum():
    model, busy, idle = starved("mixtral")
    experts = model.train().model.layers[1].mlp.experts
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1, weight_decay=0.1)
    ids = random_ids()
    model(ids, labels=ids).loss.backward()
    for parameter in experts.parameters():
        parameter.grad[idle] = 1.0
    optimizer.step()
    handles = moe_hf.leave_idle_experts_alone(optimizer, model)
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in experts.named_parameters()}
    weights = {name: p.detach().clone() for name, p in experts.named_parameters()}
    for parameter in experts.parameters():
        parameter.grad[idle] = 0.0
    optimizer.step()
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter[idle], weights[name][idle])
        assert torch.equal(optimizer.state[parameter]["exp_avg"][idle], moments[name][idle])
        assert not torch.equal(optimizer.state[parameter]["exp_avg"][busy], moments[name][busy])
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert all(not torch.equal(p[idle], weights[name][idle]) for name, p in experts.named_parameters())
    with pytest.raises(MoEError, match="No fused experts"):
        moe_hf.leave_idle_experts_alone(optimizer, tiny_dense("llama"))


@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_is_named_before_the_step(kind, clip, tmp_path):
    model = tiny_moe(kind)
    layer = model.model.layers[1]
    steps = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        return gradient * (math.nan if len(steps) == 2 else 1.0)

    layer.mlp.experts.down_proj.register_hook(spoil)
    recorder = Weights()
    trainer = moe_hf.MoETrainer(
        model, arguments(tmp_path, max_grad_norm=clip), train_dataset=rows(16), callbacks=[recorder]
    )
    with pytest.raises(MoEError, match=r"gradient of model.layers.1.mlp.experts.down_proj is not finite at step 2"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert all(torch.equal(p, recorder.weights[name]) for name, p in model.named_parameters())


class Weights(TrainerCallback):
    """Keeps the weights after the last step."""

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_weights(tmp_path):
    model = tiny_moe()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = moe_hf.MoETrainer(model, arguments(tmp_path, scope="moe"), train_dataset=rows(4))
    with pytest.raises(MoEError, match="loss is nan at step 1; the weights of lm_head.weight are not finite"):
        trainer.train()
    assert all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["trainer", "sft_trainer"])
def test_the_guard_serves_other_trainers(way, tmp_path):
    if way == "sft_trainer" and not HAS_TRL:
        pytest.skip("trl is not installed")
    model = tiny_moe("mixtral")
    model.model.layers[0].mlp.gate.weight.register_hook(lambda gradient: gradient * math.inf)
    if way == "trainer":
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(4))
    else:
        trainer = trainer_of(way, model, tmp_path, accumulation=1, rows=1)
    trainer.add_callback(moe_hf.FiniteGuardCallback())
    with pytest.raises(MoEError, match="model.layers.0.mlp.gate.weight is not finite at step 1"):
        trainer.train()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_expert_dropout_drops_hidden_activations_at_its_rate(kind, implementation, tmp_path):
    model = tiny_moe(kind) if kind != "gpt2" else moe_hf.upcycle(tiny_dense("gpt2"), num_experts=4)
    model.set_experts_implementation(implementation)
    model.train()
    block = next(module for module in model.modules() if getattr(module, "experts", None) is not None)
    tokens = torch.randn(1, 400, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = block(tokens)
        handles = moe_hf.add_expert_dropout(model, 0.25)
        torch.manual_seed(0)
        dropped = torch.stack([block(tokens) for _ in range(60)])
        assert torch.equal(block.eval()(tokens), plain), "evaluation is as before"
        block.train()
        error = (dropped.mean(0) - plain).norm() / plain.norm()
        spread = (dropped - plain).flatten(1).norm(dim=1).mean() / plain.norm()
        for handle in handles:
            handle.remove()
        assert torch.equal(block(tokens), plain)
    # Unbiased: the mean of 60 draws is sqrt(60) times as near as one.
    assert 0.2 < float(spread) < 1.5 and float(error) < 2 * float(spread) / math.sqrt(60)


def test_expert_dropout_lasts_for_the_run_and_is_not_saved(tmp_path):
    torch.manual_seed(0)
    runs = []
    for rate in (0.0, 0.4):
        model = tiny_moe("mixtral")
        trainer = moe_hf.MoETrainer(model, arguments(tmp_path, expert_dropout=rate), train_dataset=rows(16))
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] != runs[1]
    hooks = [len(block.mlp.experts.act_fn._forward_hooks) for block in model.model.layers]
    assert hooks == [0, 0, 0]
    assert not any("drop" in name for name in model.state_dict())


def test_expert_dropout_refuses_what_it_cannot_do():
    with pytest.raises(MoEError, match=r"\[0, 1\)"):
        moe_hf.add_expert_dropout(tiny_moe(), 1.0)
    with pytest.raises(MoEError, match="no MoE block"):
        moe_hf.add_expert_dropout(tiny_dense("llama"), 0.1)
    with pytest.raises(MoEError, match="no act_fn"):
        moe_hf.add_expert_dropout(tiny_native_moe("gpt_oss"), 0.1)


def judge(callback: moe_hf.HeldOutGapCallback, *evaluations: tuple[float, float]) -> list[bool]:
    """Whether training stops after each pair of training and held-out loss, until it does."""
    stops = []
    for step, (train, held_out) in enumerate(evaluations, 1):
        control = SimpleNamespace(should_training_stop=False)
        state = SimpleNamespace(global_step=step)
        callback.on_log(None, state, control, {callback.train_metric: train})
        callback.on_log(None, state, control, {callback.held_out_metric: held_out})
        stops.append(control.should_training_stop)
    return stops


def test_training_stops_when_the_gap_has_grown_often_enough():
    pairs = [(4.0, 4.2), (3.0, 3.1), (2.5, 2.8), (2.4, 2.55), (2.0, 2.6), (1.5, 2.5), (1.0, 2.4)]
    # Gaps 0.2, 0.1, 0.3, 0.15, 0.6, 1.0, 1.4: the smallest is 0.1.
    assert judge(moe_hf.HeldOutGapCallback(patience=2, min_growth=0.1), *pairs) == [False] * 5 + [True, True]
    assert judge(moe_hf.HeldOutGapCallback(patience=3), *pairs) == [False] * 4 + [True, True, True]
    # A held-out loss that falls as fast as the training loss never stops.
    assert not any(judge(moe_hf.HeldOutGapCallback(1), *[(x, x + 0.1) for x in (4.0, 3.5, 3.0, 2.0)]))


def test_two_evaluation_sets_are_judged_once_per_evaluation():
    names = {"train_metric": "eval_train_loss", "held_out_metric": "eval_test_loss"}
    callback = moe_hf.HeldOutGapCallback(patience=1, min_growth=0.1, **names)
    assert judge(callback, (2.0, 2.1), (1.5, 2.0)) == [False, True]
    again = moe_hf.HeldOutGapCallback.from_state(callback.state())
    assert (again.smallest_gap, again.patience, again.train_metric) == (callback.smallest_gap, 1, "eval_train_loss")


def test_an_overfitting_run_is_stopped(tmp_path):
    args = arguments(tmp_path, max_steps=60, learning_rate=1e-2, eval_strategy="steps", eval_steps=5, logging_steps=5)
    callback = moe_hf.HeldOutGapCallback(patience=2, min_growth=0.5)
    trainer = moe_hf.MoETrainer(
        tiny_moe(), args, train_dataset=rows(4), eval_dataset=rows(12).select(range(8, 12)), callbacks=[callback]
    )
    trainer.train()
    assert 10 <= trainer.state.global_step < 60
    late = arguments(tmp_path / "late", max_steps=4, eval_strategy="steps", eval_steps=1, logging_steps=3)
    trainer = moe_hf.MoETrainer(
        tiny_moe(), late, train_dataset=rows(4), eval_dataset=rows(4), callbacks=[moe_hf.HeldOutGapCallback()]
    )
    with pytest.raises(MoEError, match="logging_steps"):
        trainer.train()
    with pytest.raises(MoEError, match="patience"):
        moe_hf.HeldOutGapCallback(patience=0)
