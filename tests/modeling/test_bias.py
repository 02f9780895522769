"""The correction bias of a router: it changes the choice and nothing else, and keeps its float32 values everywhere."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle
from moe_hf.modeling.router import Router
from moe_hf.trainer.expert_balance import bias_update
from tests.modeling.decided import config_of
from tests.modeling.routed import context_of, route
from tests.tiny_models import random_ids, tiny_config, tiny_dense


BIAS = "e_score_correction_bias"


def biased_model(**dense_fields) -> MoEForCausalLM:
    """A model whose biases are large enough to change choices, and not numbers that bfloat16 has."""
    model = upcycle(tiny_dense("llama", **dense_fields), num_experts=4, noise=0.5, balance_strategy="bias")
    for name, buffer in model.named_buffers():
        if name.endswith(BIAS):
            buffer.copy_(torch.tensor([0.1001, -0.1002, 0.0503, 0.0]))
    return model


def biases(model: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith(BIAS)]


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_bias_changes_the_choice_and_not_the_weights(scoring_func):
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    fields = {"balance_strategy": "bias", "scoring_func": scoring_func}
    bias = torch.linspace(-0.3, 0.3, 8)
    plain, biased = route(logits, **fields), route(logits, known={"correction_bias": bias}, **fields)
    assert not torch.equal(plain.top_k_index, biased.top_k_index)
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    assert torch.equal(biased.top_k_index, (scores + bias).topk(2).indices)
    chosen = scores.gather(1, biased.top_k_index)
    assert torch.allclose(biased.top_k_weights, chosen / chosen.sum(-1, keepdim=True))
    # One number for all experts changes no choice.
    shifted = route(logits, known={"correction_bias": bias + 0.25}, **fields)
    assert torch.equal(shifted.top_k_index, biased.top_k_index)
    assert torch.equal(shifted.top_k_weights, biased.top_k_weights)


def test_a_bias_that_makes_every_score_negative_still_limits_to_groups():
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    fields = {"balance_strategy": "bias", "scoring_func": "sigmoid", "n_group": 4, "topk_group": 1}
    low = route(logits, known={"correction_bias": torch.full((8,), -5.0)}, **fields)
    plain = route(logits, **fields)
    assert torch.equal(low.top_k_index, plain.top_k_index)
    assert torch.equal(low.top_k_index[:, 0] // 2, low.top_k_index[:, 1] // 2)


def test_updates_balance_a_skewed_router():
    # 1000 updates by 0.001, each from 4096 tokens with logits N(0, 1) + linspace(-1, 1). MaxVio, (max - mean) / mean of
    # the choices per expert, falls from 1.35 to what is left of chance (an expert has 1024 +- 30) and of the step.
    torch.manual_seed(0)
    spec, context = context_of(torch.zeros(4096, 8), balance_strategy="bias", scoring_func="sigmoid")
    bias, violations = torch.zeros(8), []
    for _ in range(1000):
        logits = torch.randn(4096, 8) + torch.linspace(-1, 1, 8)
        index = spec.function(logits, replace(context, correction_bias=bias)).top_k_index
        counts = torch.bincount(index.flatten(), minlength=8)
        violations.append(float(counts.max() / counts.float().mean() - 1))
        bias += bias_update(counts, 1e-3)
    assert violations[0] == pytest.approx(1.35, abs=0.005)
    assert sum(violations[-20:]) / 20 < 0.06
    assert torch.all(bias.diff() < 0)
    assert bias[[0, -1]].tolist() == pytest.approx([0.205, -0.205], abs=0.005)


def test_bias_is_a_float32_buffer_of_models_that_ask_for_it_alone():
    plain = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4))
    assert biases(plain) == [] and not any(BIAS in name for name in plain.state_dict())
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4, balance_strategy="bias"))
    assert [bias.tolist() for bias in biases(model)] == [[0.0] * 4] * 3
    assert sum(BIAS in name for name in model.state_dict()) == 3
    assert not any(BIAS in name for name, _ in model.named_parameters()), "an optimizer would decay it"
    assert (model.config.router_aux_loss_coef, plain.config.router_aux_loss_coef) == (0.0, 0.01)
    assert MoEConfig(text_config=tiny_config("llama"), balance_strategy="bias", router_aux_loss_coef=1e-4).to_dict()[
        "router_aux_loss_coef"
    ] == pytest.approx(1e-4)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_bias_stays_in_float32_when_the_model_is_cast(cast):
    model = biased_model()
    before = copy.deepcopy(biases(model))
    getattr(model, cast)()
    model.to(dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert all(b.dtype == torch.float32 and torch.equal(b, a) for b, a in zip(biases(model), before, strict=True))
    model.to("meta")
    assert all(bias.is_meta for bias in biases(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel], ids=["causal_lm", "base"])
def test_bias_is_saved_and_loaded_in_float32(auto, dtype, tmp_path):
    model = biased_model()
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path, dtype=dtype)
    assert next(loaded.parameters()).dtype == dtype
    assert all(b.dtype == torch.float32 for b in biases(loaded))
    assert all(torch.equal(b, a) for b, a in zip(biases(loaded), biases(model), strict=True))
    if auto is AutoModelForCausalLM and dtype == torch.float32:
        ids = random_ids()
        assert torch.allclose(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
        for bias in biases(loaded):
            bias.zero_()
        assert not torch.allclose(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-3)


def test_a_checkpoint_without_bias_starts_at_zero_in_a_model_with_one(tmp_path):
    upcycle(tiny_dense("llama"), num_experts=4).save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path, balance_strategy="bias")
    assert [bias.tolist() for bias in biases(loaded)] == [[0.0] * 4] * 3


@pytest.mark.parametrize("router_type", ["stochastic_top_k", "top_p"])
def test_routers_without_a_use_for_the_bias_refuse_it(router_type):
    config = config_of(4, balance_strategy="bias", router_type=router_type)
    with pytest.raises(MoEError, match="balance_strategy"):
        MoEForCausalLM(config)


def test_upcycling_with_a_bias_is_as_exact_as_without():
    dense, ids = tiny_dense("llama"), random_ids()
    model = upcycle(dense, num_experts=4, balance_strategy="bias")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-4)
        # Copies of one expert: whichever are chosen, their weights add up to 1.
        for bias in biases(model):
            bias.copy_(torch.tensor([0.3, -0.3, 0.1, 0.0]))
        assert torch.allclose(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-4)


def routers(model: torch.nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def test_counts_are_of_real_tokens_in_training_forwards_with_gradients():
    model, ids = biased_model(), random_ids(2, 10)
    model.eval()(ids)
    with torch.no_grad():
        model.train()(ids)
    assert all(router.step_counts is None for router in routers(model))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    output = model(ids, attention_mask=mask, output_router_logits=True)
    for router, logits in zip(routers(model), output.router_logits, strict=True):
        index = (logits.softmax(-1) + router.e_score_correction_bias).topk(2).indices[mask.flatten().bool()]
        assert router.step_counts.tolist() == torch.bincount(index.flatten(), minlength=4).tolist()
    once = [router.step_counts.clone() for router in routers(model)]
    model(ids, attention_mask=mask)
    assert all(torch.equal(router.step_counts, 2 * count) for router, count in zip(routers(model), once, strict=True))


def test_gradient_checkpointing_and_compilation_do_not_count_twice():
    ids = random_ids(2, 10)
    counts = []
    for prepare in ("plain", "checkpointed", "compiled"):
        model = biased_model(num_hidden_layers=1).train()
        if prepare == "checkpointed":
            model.activation_checkpointing_enable()
        run = torch.compile(model, backend="eager", fullgraph=True) if prepare == "compiled" else model
        for _ in range(2):
            run(ids, labels=ids, use_cache=False).loss.backward()
        counts.append([router.step_counts.tolist() for router in routers(model)])
    assert counts[0] == counts[1] == counts[2]
    assert all(sum(count) == 2 * 20 * 2 for count in counts[0])
