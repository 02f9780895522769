"""Router losses enter a loss once, at the strength that their coefficient says, whoever computes that loss."""

import types

import pytest
import torch
from torch import nn
from transformers import AutoConfig, Trainer
from transformers.modeling_outputs import CausalLMOutput

import moe_hf
from moe_hf import MoEError
from moe_hf.finetuning.router_watch import RouterWatch
from tests.closeness import close
from tests.sampling import sampled
from tests.tiny_models import random_ids, tiny_native_moe
from tests.trainer.multiplier import (
    ACCUMULATIONS,
    COEFFICIENT,
    HAS_TRL,
    MODELS,
    WAYS,
    expected_gradient,
    model_with,
    multipliers,
    router_gradient,
)
from tests.trainer.runs import GradientRecorder, arguments, rows, tiny_moe


ONE_GROUP = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
# How each scores its experts.
NATIVE = {
    "mixtral": ("softmax", {}),
    "qwen3_moe": ("softmax", {}),
    "olmoe": ("softmax", {}),
    "gpt_oss": ("softmax", {}),
    "ernie4_5_moe": ("softmax", {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "glm4_moe": ("sigmoid", ONE_GROUP),
    "deepseek_v3": ("sigmoid", ONE_GROUP),
}


def native(family: str, **fields) -> nn.Module:
    return tiny_native_moe(family, **(NATIVE[family][1] | fields)).train()


def step_gradient(model: nn.Module, folder, trainer: dict | None = None, **fields) -> torch.Tensor:
    """The routers' gradient of one step of a `MoETrainer` on one row."""
    recorder = GradientRecorder()
    args = arguments(folder, max_steps=1, per_device_train_batch_size=1, **fields)
    moe_hf.MoETrainer(model, args, train_dataset=rows(1), callbacks=[recorder], **(trainer or {})).train()
    return router_gradient(recorder.gradients)


def assert_adds(kind: str, added: torch.Tensor) -> None:
    expected = expected_gradient(kind, {"input_ids": torch.tensor(rows(1)["input_ids"])})
    assert float(added @ expected / (expected @ expected)) == pytest.approx(1.0, abs=1e-3)
    assert float((added - expected).norm() / expected.norm()) <= 1e-3


# TRL uses names that transformers deprecates.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("way", "kind"), sampled(WAYS, MODELS, share=2))
def test_router_losses_count_once_whatever_the_accumulation(way, kind, tmp_path):
    if way.endswith(("sft_trainer", "dpo_trainer")) and not HAS_TRL:
        pytest.skip("trl is not installed")
    for accumulation, (multiplier, error) in multipliers(way, kind, ACCUMULATIONS, tmp_path).items():
        assert multiplier == pytest.approx(1.0, abs=1e-3), accumulation
        assert error <= 1e-3, accumulation


@pytest.mark.parametrize(("taken", "kind"), sampled(["label_smoothing_factor", "compute_loss_func"], MODELS, share=2))
def test_what_takes_the_labels_away_keeps_the_router_losses(taken, kind, tmp_path):
    def own_loss(outputs, labels, num_items_in_batch):
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), shifted.flatten(), reduction="sum") / (
            num_items_in_batch
        )

    fields = {"label_smoothing_factor": 0.1} if taken == "label_smoothing_factor" else {}
    trainer = {} if fields else {"compute_loss_func": own_loss}
    with_losses, without = (
        step_gradient(model_with(kind, coefficient), tmp_path, trainer, **fields) for coefficient in (COEFFICIENT, 0.0)
    )
    assert_adds(kind, with_losses - without)


@pytest.mark.parametrize("kind", MODELS)
def test_a_fused_head_that_returns_the_loss_alone_keeps_the_router_losses(kind, tmp_path):
    def fused(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        hidden = self.model(input_ids, use_cache=False).last_hidden_state[:, :-1]
        logits = nn.functional.linear(hidden, self.lm_head.weight)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return CausalLMOutput(loss=loss / num_items_in_batch)

    gradients = []
    for coefficient in (COEFFICIENT, 0.0):
        model = model_with(kind, coefficient)
        model.forward = types.MethodType(fused, model)
        gradients.append(step_gradient(model, tmp_path))
    assert_adds(kind, gradients[0] - gradients[1])


@pytest.mark.numerics
def test_the_model_s_own_loss_is_off_while_it_trains_and_back_afterwards(tmp_path):
    model = model_with("mixtral", COEFFICIENT)
    model.config.output_router_logits = True
    with_own = step_gradient(model, tmp_path / "own")
    without_own = step_gradient(model_with("mixtral", COEFFICIENT), tmp_path / "other")
    assert close(with_own, without_own), "pooled and per-layer losses both acted"
    assert model.router_aux_loss_coef == model.config.router_aux_loss_coef == COEFFICIENT
    model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").router_aux_loss_coef == COEFFICIENT
    assert not model._forward_pre_hooks and not model._forward_hooks, "training leaves no hook"
    losses = moe_hf.RouterLosses(model)
    model.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(random_ids())
    assert model.router_aux_loss_coef == COEFFICIENT
    losses.stop()
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_losses_that_nobody_takes_are_an_error_before_memory_is():
    model = model_with("mixtral", 1.0).train()
    moe_hf.RouterLosses(model)
    for _ in range(64):
        model(random_ids(1, 2))
    with pytest.raises(MoEError, match="never taken"):
        model(random_ids(1, 2))


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_is_the_language_modelling_loss_alone(kind, tmp_path):
    evaluated = []
    for coefficient in (10.0, 0.0):
        model = model_with(kind, coefficient)
        model.config.output_router_logits = True
        trainer = moe_hf.MoETrainer(model, arguments(tmp_path), eval_dataset=rows(4))
        evaluated.append(trainer.evaluate()["eval_loss"])
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-6)


def test_four_layers_that_collapsed_on_different_experts_lose_four_each():
    model = native("mixtral", num_hidden_layers=4, num_experts_per_tok=1, router_aux_loss_coef=1.0)
    for layer, decoder in enumerate(model.model.layers):
        gate = decoder.mlp.gate
        gate.register_forward_hook(_choose(layer))
    ids = random_ids()
    losses = moe_hf.RouterLosses(model)
    pooled = model(ids, output_router_logits=True).aux_loss
    assert float(pooled) == pytest.approx(1.0, abs=1e-3), "transformers' own loss sees perfect balance"
    assert float(losses.loss()) == pytest.approx(4.0, abs=1e-3)
    assert float(losses.reported["load_balancing_loss"]) == pytest.approx(4.0, abs=1e-3)
    assert losses.loss() == 0.0, "taken once"


def _choose(expert: int):
    def hook(gate: nn.Module, args: tuple, output: tuple) -> tuple:
        logits = torch.full_like(output[0], -20.0)
        logits[:, expert] = 20.0
        return logits, torch.ones_like(output[1]), torch.full_like(output[2], expert)

    return hook


def naive_losses(logits: torch.Tensor, index: torch.Tensor, real: torch.Tensor, scoring: str) -> tuple[float, float]:
    """Load-balancing and z-loss of one layer by loops, in float64."""
    num_experts, choices = logits.shape[1], 0
    counts, sums, z = [0.0] * num_experts, [0.0] * num_experts, 0.0
    tokens = [t for t in range(len(logits)) if real[t]]
    for t in tokens:
        row = logits[t].detach().double()
        scores = row.softmax(-1) if scoring == "softmax" else row.sigmoid() / row.sigmoid().sum()
        for expert in range(num_experts):
            sums[expert] += float(scores[expert])
        for expert in index[t].tolist():
            counts[expert] += 1
            choices += 1
        z += float(row.logsumexp(-1) ** 2) if scoring == "softmax" else float(row.square().mean())
    balance = num_experts * sum(c / choices * s / len(tokens) for c, s in zip(counts, sums, strict=True))
    return balance, z / len(tokens)


@pytest.mark.parametrize("family", NATIVE)
def test_losses_of_native_moes_equal_a_naive_reference_per_layer(family):
    model = native(family).requires_grad_(True)
    losses = moe_hf.RouterLosses(model, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    seen = []
    watch = RouterWatch(model, lambda watch, outputs: seen.extend(watch.decisions))
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    model(ids, attention_mask=mask)
    assert watch.scoring_func == NATIVE[family][0]
    layers = [naive_losses(d.router_logits, d.routing.top_k_index, mask.flatten(), NATIVE[family][0]) for d in seen]
    assert len(layers) in (2, 3)
    balance, z = (sum(values) / len(layers) for values in zip(*layers, strict=True))
    assert losses.reported["load_balancing_loss"].item() == pytest.approx(balance, rel=1e-5)
    assert losses.reported["router_z_loss"].item() == pytest.approx(z, rel=1e-5)
    # The coefficient has the strength that it has in transformers, whose loss is K at balance.
    weight = 0.3  # 3 of 10 labels
    expected = weight * (0.5 * 2 * balance + 0.25 * z)
    labels = torch.tensor([[-100, 5, -100, 5, 5]])
    assert float(losses.loss(labels, 10)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_native_losses_are_on_with_the_model_s_own_coefficient_alone(family):
    losses = moe_hf.RouterLosses(native(family))
    model = losses.model
    model(random_ids())
    expected = 0.001 * 2 if family == "mixtral" else 0.0
    assert losses.coefficients["load_balancing_loss"] == pytest.approx(expected)
    assert (losses.loss() == 0.0) == (family == "deepseek_v3")


def test_sequence_scope_is_the_same_however_rows_are_spread():
    ids = random_ids(4, 12)
    values = []
    for batches in ([ids], ids.split(2)):
        losses = moe_hf.RouterLosses(native("qwen3_moe"), router_aux_loss_coef=1.0, balance_loss_scope="sequence")
        total = 0.0
        for batch in batches:
            losses.model(batch)
            total += float(losses.loss(batch, ids[:, 1:].numel()))
        values.append(total)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_checkpointing_changes_no_gradient_and_the_reentrant_form_is_refused(tmp_path):
    plain, checkpointed = (
        step_gradient(model_with("mixtral", 1.0), tmp_path, activation_checkpointing=flag) for flag in (False, True)
    )
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)
    with pytest.raises(MoEError, match="use_reentrant"):
        step_gradient(
            model_with("mixtral", 1.0),
            tmp_path,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": True},
        )


@pytest.mark.parametrize("kind", MODELS)
def test_joint_statistics_follow_the_micro_batches_of_one_step(kind):
    model = model_with(kind, 1.0).train()
    losses = moe_hf.RouterLosses(model, balance_loss_scope="global_batch")

    def balance(batch: torch.Tensor) -> float:
        model(batch)
        return float(losses.loss())

    first, second = random_ids(2, 12, seed=1), random_ids(2, 12, seed=2)
    values = [balance(first), balance(second)]
    losses.next_step()
    assert balance(second) != pytest.approx(values[1], rel=1e-6)
    losses.next_step()
    assert balance(first) == pytest.approx(values[0], rel=1e-6)


def test_what_cannot_be_right_is_refused(tmp_path):
    with pytest.raises(MoEError, match="at least 0"):
        moe_hf.RouterLosses(tiny_moe(), router_z_loss_coef=-1.0)
    with pytest.raises(MoEError, match="balance_loss_scope"):
        moe_hf.RouterLosses(tiny_moe(), balance_loss_scope="layer")
    trainer = moe_hf.MoETrainer(tiny_moe(), arguments(tmp_path), train_dataset=rows(4))
    with pytest.raises(MoEError, match="already"):
        moe_hf.add_router_losses(trainer)
    # Its routers return scores for all experts in the place of choices.
    llama4 = tiny_native_moe("llama4_text")
    with pytest.raises(MoEError, match="routing_telemetry='off'"):
        moe_hf.MoETrainer(llama4, arguments(tmp_path), train_dataset=rows(4)).train()
    args = arguments(tmp_path, max_steps=1, router_aux_loss_coef=0.0, routing_telemetry="off")
    moe_hf.MoETrainer(tiny_native_moe("llama4_text"), args, train_dataset=rows(4)).train()


def test_a_loss_that_is_not_the_model_s_is_refused(tmp_path):
    other = tiny_moe()
    trainer = Trainer(model_with("mixtral", 1.0), arguments(tmp_path, max_steps=1), train_dataset=rows(4))
    trainer.compute_loss = lambda model, inputs, **kwargs: other(**inputs).loss
    moe_hf.add_router_losses(trainer)
    with pytest.raises(MoEError, match="computed no router losses"):
        trainer.train()


def test_arguments_set_the_coefficients_of_this_package_s_models_too(tmp_path):
    model = tiny_moe()
    args = arguments(tmp_path, router_aux_loss_coef=0.25, router_z_loss_coef=0.5, balance_loss_scope="sequence")
    moe_hf.MoETrainer(model, args, train_dataset=rows(4))
    config = model.config
    assert (config.router_aux_loss_coef, config.router_z_loss_coef, config.balance_loss_scope) == (
        0.25,
        0.5,
        "sequence",
    )


def test_policy_gradients_need_the_model_s_own_loss(tmp_path):
    model = tiny_moe(router_noise="gumbel", router_loss_coefs={"policy_gradient_loss": 0.1})
    with pytest.raises(MoEError, match="policy_gradient_loss"):
        step_gradient(model, tmp_path, label_smoothing_factor=0.1)


def test_unweighted_losses_of_native_moes_are_logged(tmp_path):
    trainer = moe_hf.MoETrainer(model_with("mixtral", 1.0), arguments(tmp_path, max_steps=2), train_dataset=rows(8))
    trainer.train()
    logged = [entry["load_balancing_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(0.9 < value < 4 for value in logged)
