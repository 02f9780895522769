"""Correction biases in training: which choices move them, when, and that the load evens out."""

import copy

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback

import moe_hf
from moe_hf import MoEError, MoETrainer
from moe_hf.trainer.expert_balance import (
    BIAS,
    ExpertBalanceCallback,
    bias_update,
    reset_step_counts,
    start_counting,
    stop_counting,
    update_correction_bias,
)
from tests.tiny_models import random_ids, tiny_config, tiny_native_moe
from tests.trainer.runs import arguments, correction_biases, resumed, rows, tiny_moe


# Fields that give the tiny model experts in two of three layers.
NATIVE = {
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 2,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_intermediate_size": 40,
    },
}


def owners(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if BIAS in m._buffers or BIAS in m._parameters]


def snapshot(model: nn.Module) -> list[torch.Tensor]:
    return [getattr(owner, BIAS).detach().clone() for owner in owners(model)]


class CountRecorder(TrainerCallback):
    """Keeps each step's choices per expert and layer, (layers, E), before they are forgotten."""

    def __init__(self) -> None:
        self.counts: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.counts.append(torch.stack([m.step_counts.clone() for m in model.modules() if "step_counts" in vars(m)]))


def hooks(model: nn.Module) -> int:
    """The number of forward hooks; transformers has some of its own."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def biased(**fields) -> nn.Module:
    return tiny_moe(**{"balance_strategy": "bias", "bias_update_rate": 0.02} | fields)


def test_update_moves_by_the_sign_of_what_is_missing_to_the_mean():
    # Mean 4: one above it, one below, two at it.
    update = bias_update(torch.tensor([6, 2, 4, 4]), 1e-3)
    assert update.tolist() == pytest.approx([-1e-3, 1e-3, 0, 0], rel=1e-6)
    # Means that are no whole numbers, and that float32 does not tell from the counts.
    assert bias_update(torch.tensor([1, 1, 2]), 1.0).tolist() == [1, 1, -1]
    large = 2**30
    assert bias_update(torch.tensor([large + 1, large, large]), 1.0).tolist() == [-1, 1, 1]


def test_bfloat16_would_lose_the_update():
    bias = torch.tensor(0.5)
    assert bias.bfloat16() + 1e-3 == 0.5
    assert float(bias + 1e-3) == pytest.approx(0.501)
    model = tiny_native_moe("deepseek_v3", **NATIVE["deepseek_v3"]).train()
    for owner in owners(model):
        getattr(owner, BIAS).fill_(0.5)
    # Unlike this package's models those of transformers let the bias be cast.
    model.bfloat16()
    start_counting(model)
    model(random_ids())
    update_correction_bias(model)
    for bias in snapshot(model):
        assert bias.dtype == torch.float32
        assert (bias - 0.5).abs().max() == pytest.approx(1e-3, rel=1e-4)


def test_a_loop_of_ones_own_updates_once_per_optimizer_step():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = biased()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    batches = random_ids(8, 12).split(2)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch, labels=batch).loss)
            optimizer.step()
            if accelerator.sync_gradients:
                update_correction_bias(model)
            optimizer.zero_grad()
    expected = biased().train()
    for two in (torch.cat(batches[:2]), torch.cat(batches[2:])):
        expected(two, labels=two)
        update_correction_bias(expected)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model), snapshot(expected), strict=True))
    assert all(bias.abs().max() > 0 for bias in snapshot(model))
    before = snapshot(expected)
    update_correction_bias(expected)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(expected), before, strict=True)), "nothing was counted"


def test_a_model_without_bias_is_told_how_to_get_one():
    with pytest.raises(MoEError, match="balance_strategy"):
        update_correction_bias(tiny_moe())


def test_an_update_without_counts_is_refused():
    model = tiny_native_moe("glm4_moe", **NATIVE["glm4_moe"]).train()
    model(random_ids())
    with pytest.raises(MoEError, match="start_counting"):
        update_correction_bias(model)


def test_a_frozen_router_keeps_its_bias_and_the_rate_can_be_given():
    model, ids = biased().train(), random_ids()
    first, *others = owners(model)
    first.weight.requires_grad_(False)
    model(ids, labels=ids)
    update_correction_bias(model, rate=0.5)
    assert first.e_score_correction_bias.tolist() == [0.0] * 4
    assert all(owner.e_score_correction_bias.abs().max() == 0.5 for owner in others)


def test_trainer_updates_once_per_step_whatever_the_accumulation(tmp_path):
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        recorder = CountRecorder()
        args = arguments(
            tmp_path,
            max_steps=3,
            scope="moe",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        model = biased()
        MoETrainer(model, args, train_dataset=rows(24), callbacks=[recorder]).train()
        results.append((recorder.counts, snapshot(model)))
    (counts, biases), (counts_again, biases_again) = results
    assert len(counts) == 3 and all(torch.equal(a, b) for a, b in zip(counts, counts_again, strict=True))
    assert all(int(count.sum()) == 3 * 8 * 16 * 2 for count in counts)
    expected = [sum(bias_update(count[layer], 0.02) for count in counts) for layer in range(3)]
    assert all(torch.allclose(bias, truth) for bias, truth in zip(biases, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(biases, biases_again, strict=True))


def test_evaluation_neither_counts_nor_updates(tmp_path):
    ends = []
    for strategy in ("no", "steps"):
        model = biased()
        args = arguments(
            tmp_path / strategy, max_steps=3, eval_strategy=strategy, eval_steps=1, prediction_loss_only=True
        )
        MoETrainer(model, args, train_dataset=rows(12), eval_dataset=rows(4)).train()
        ends.append(snapshot(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    model = biased()
    trainer = MoETrainer(model, arguments(tmp_path / "eval"), eval_dataset=rows(4))
    trainer.evaluate()
    assert all(bias.abs().max() == 0 for bias in snapshot(model))


def test_scopes_without_the_router_keep_its_bias(tmp_path):
    model = biased()
    MoETrainer(model, arguments(tmp_path, scope="experts", max_steps=2), train_dataset=rows(8)).train()
    assert all(bias.abs().max() == 0 for bias in snapshot(model))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, 0), ({"balance_strategy": "bias"}, 1), ({"balance_loss_scope": "global_batch"}, 1)],
    ids=["default", "bias", "global_batch"],
)
def test_trainer_adds_the_callback_where_the_configuration_asks(fields, expected, tmp_path):
    def count(trainer: MoETrainer) -> int:
        return sum(isinstance(callback, ExpertBalanceCallback) for callback in trainer.callback_handler.callbacks)

    assert count(MoETrainer(tiny_moe(**fields), arguments(tmp_path))) == expected
    given = MoETrainer(tiny_moe(**fields), arguments(tmp_path), callbacks=[ExpertBalanceCallback()])
    assert count(given) == 1


def test_global_batch_loss_in_a_trainer_counts_the_micro_batches_of_a_step_only(tmp_path):
    recorder = CountRecorder()
    model = tiny_moe(balance_loss_scope="global_batch")
    args = arguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3, scope="router"
    )
    MoETrainer(model, args, train_dataset=rows(12), callbacks=[recorder]).train()
    assert [int(count.sum()) for count in recorder.counts] == [3 * 6 * 16 * 2] * 2
    assert all(m.step_counts is None for m in model.modules() if "step_counts" in vars(m))


def test_resume_restores_the_bias(tmp_path):
    fields = {"balance_strategy": "bias", "bias_update_rate": 0.02}
    whole = resumed("ours", tmp_path / "whole", **fields)
    again = resumed("ours", tmp_path / "again", tmp_path / "whole" / "checkpoint-3", **fields)
    biases, biases_again = correction_biases(whole.model.state_dict()), correction_biases(again.model.state_dict())
    assert len(biases) == 3 and all(bias.abs().max() > 0 for bias in biases.values())
    assert all(torch.equal(biases_again[name], bias) for name, bias in biases.items())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", NATIVE)
def test_models_of_transformers_are_counted_too(family, checkpointing):
    model, ids = tiny_native_moe(family, **NATIVE[family]).train(), random_ids(2, 10)
    if checkpointing:
        model.activation_checkpointing_enable()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    chosen: dict[nn.Module, list[torch.Tensor]] = {}
    watched = [
        module.register_forward_hook(lambda module, args, output: chosen.setdefault(module, []).append(output[2]))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    before = hooks(model)
    handles = start_counting(model)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    with torch.no_grad():
        model(ids)
    model.eval()(ids)
    assert len(owners(model)) == len(chosen) == 2
    for owner, indices in zip(owners(model), chosen.values(), strict=True):
        expected = torch.bincount(indices[0][mask.flatten().bool()].flatten(), minlength=4)
        assert torch.equal(owner.step_counts, expected)
        # The gate did run again.
        assert not checkpointing or len(indices) == 4
    biases, counts = snapshot(model), [owner.step_counts.clone() for owner in owners(model)]
    update_correction_bias(model)
    for old, new, count in zip(biases, snapshot(model), counts, strict=True):
        assert torch.allclose(new - old, bias_update(count, 1e-3).view_as(old), atol=1e-6)
    stop_counting(model, handles)
    assert hooks(model) == before
    for hook in watched:
        hook.remove()


@pytest.mark.parametrize("trainer_class", [Trainer, MoETrainer])
def test_callback_serves_models_of_transformers_in_any_trainer(trainer_class, tmp_path):
    model = tiny_native_moe("glm4_moe", **NATIVE["glm4_moe"])
    start, hooks_before = snapshot(model), hooks(model)
    args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    callback = ExpertBalanceCallback(rate=0.25)
    trainer_class(model, args, train_dataset=rows(12), callbacks=[callback]).train()
    for before, after in zip(start, snapshot(model), strict=True):
        steps = (after - before) / 0.25
        assert torch.allclose(steps, steps.round(), atol=1e-5) and 1 <= steps.abs().max() <= 3
    assert hooks(model) == hooks_before


def test_reset_forgets_the_counts():
    model, ids = biased().train(), random_ids()
    model(ids)
    reset_step_counts(model)
    assert all(int(owner.step_counts.sum()) == 0 for owner in owners(model))
    # A copy counts for itself.
    twin = copy.deepcopy(model)
    twin(ids)
    assert all(int(owner.step_counts.sum()) == 0 for owner in owners(model))


def test_training_with_updates_evens_out_the_load(tmp_path):
    # Zipf's law over 113 words: few words make most of the text, and so do their favourite experts.
    generator = torch.Generator().manual_seed(0)
    words = torch.multinomial(1 / torch.arange(1.0, 111.0), 200 * 4 * 16, replacement=True, generator=generator)
    ids = (words + 3).view(-1, 16).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    violation = {}
    for rate in (0.0, 3e-3):
        torch.manual_seed(0)
        model = moe_hf.MoEForCausalLM(
            moe_hf.MoEConfig(
                text_config=tiny_config("llama", num_hidden_layers=2),
                num_experts=8,
                moe_intermediate_size=16,
                scoring_func="sigmoid",
                balance_strategy="bias",
                bias_update_rate=rate,
                router_z_loss_coef=0.0,
            )
        )
        recorder = CountRecorder()
        args = arguments(tmp_path, max_steps=200, logging_steps=100)
        MoETrainer(model, args, train_dataset=dataset, callbacks=[recorder]).train()
        counts = sum(recorder.counts[-50:]).float()  # (layers, E)
        violation[rate] = float((counts.max(-1).values / counts.mean(-1) - 1).mean())
    assert violation[0.0] > 0.5
    assert violation[3e-3] < 0.5 * violation[0.0]
