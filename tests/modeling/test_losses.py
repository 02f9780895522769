"""Router losses: their values, their masks, and how they enter the model's loss."""

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle
from moe_hf.modeling.losses import load_balancing_loss, router_z_loss
from moe_hf.modeling.moe_block import LayerRouting, RoutingPass
from tests.tiny_models import random_ids, tiny_config, tiny_dense


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_load_balancing_loss_is_one_at_balance_and_E_over_K_at_collapse(top_k, scoring_func):
    experts, tokens = 8, 16
    index = (torch.arange(tokens * top_k) % experts).view(tokens, top_k)
    balanced = load_balancing_loss(torch.zeros(tokens, experts), index, scoring_func=scoring_func)
    assert balanced == pytest.approx(1, abs=1e-6)
    logits = torch.full((tokens, experts), -100.0)
    logits[:, :top_k] = 100.0
    collapsed = load_balancing_loss(logits, logits.topk(top_k).indices, scoring_func=scoring_func)
    assert collapsed == pytest.approx(experts / top_k, rel=1e-6)


def test_losses_equal_loops_in_float64_and_ignore_padding():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    index = logits.topk(2).indices
    counts, scores, squares, real = [0.0] * 4, [0.0] * 4, 0.0, int(mask.sum())
    for token in torch.where(mask)[0].tolist():
        for expert in index[token].tolist():
            counts[expert] += 1 / (real * 2)
        for expert in range(4):
            scores[expert] += float(logits[token].softmax(-1)[expert]) / real
        squares += float(logits[token].exp().sum().log() ** 2) / real
    expected = 4 * sum(c * s for c, s in zip(counts, scores, strict=True))
    assert float(load_balancing_loss(logits, index, mask)) == pytest.approx(expected, rel=1e-12)
    assert float(router_z_loss(logits, mask)) == pytest.approx(squares, rel=1e-12)
    moved = torch.where(mask[:, None], logits, 100 * logits)
    assert torch.equal(load_balancing_loss(moved, index, mask), load_balancing_loss(logits, index, mask))


def make_model(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=4, **fields)
    return MoEForCausalLM(config)


def test_layers_are_scored_one_by_one():
    # Each layer collapses onto two experts of its own; pooled over layers that looks balanced.
    layers = []
    for first in (0, 2):
        logits = torch.full((6, 4), -100.0)
        logits[:, first : first + 2] = 100.0
        layers.append(LayerRouting(0, logits, logits.topk(2).indices))
    losses = make_model()._router_losses(RoutingPass(record=True, layers=layers))
    assert float(losses["load_balancing_loss"]) == pytest.approx(2, rel=1e-6)


def test_losses_enter_in_training_only_once_and_whatever_output_router_logits_says():
    model = make_model()
    ids = random_ids()
    evaluated = model.eval()(ids, labels=ids)
    assert evaluated.aux_loss is None and evaluated.router_losses is None
    reported = model(ids, labels=ids, output_router_logits=True)
    assert torch.equal(reported.loss, evaluated.loss)
    assert reported.aux_loss > 0
    model.train()
    silent, spoken = model(ids, labels=ids), model(ids, labels=ids, output_router_logits=True)
    assert torch.equal(silent.loss, spoken.loss) and silent.router_logits is None
    losses = silent.router_losses
    expected = 0.01 * losses["load_balancing_loss"] + 1e-3 * losses["router_z_loss"]
    assert torch.allclose(silent.aux_loss, expected)
    assert torch.allclose(silent.loss, evaluated.loss + expected)
    assert [tuple(t.shape) for t in spoken.router_logits] == [(64, 4)] * 3
    tuple_loss = model(ids, labels=ids, return_dict=False)[0]
    assert torch.equal(tuple_loss, silent.loss)


def test_zero_coefficients_record_nothing():
    model = make_model(router_aux_loss_coef=0.0, router_z_loss_coef=0.0).train()
    output = model(random_ids(), labels=random_ids())
    assert output.aux_loss is None and output.router_losses is None


def router_gradient(model, batches, num_items=None) -> torch.Tensor:
    model.zero_grad()
    for batch in batches:
        model(**batch, num_items_in_batch=num_items).loss.backward()
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n.endswith("gate.weight")])


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_accumulating_identical_batches_does_not_change_the_router_gradient(steps, checkpointing):
    # Copies of one expert: the language-modelling loss gives the router no gradient, so this is the router losses'.
    model = upcycle(tiny_dense("llama"), num_experts=4, router_aux_loss_coef=0.5, router_z_loss_coef=0.1).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = random_ids(2, 8)
    batch = {"input_ids": ids, "labels": ids}
    one = router_gradient(model, [batch], torch.tensor((ids.shape[1] - 1) * ids.shape[0]))
    many = router_gradient(model, [batch] * steps, torch.tensor((ids.shape[1] - 1) * ids.shape[0] * steps))
    assert float(many.norm() / one.norm()) == pytest.approx(1, abs=1e-3)
    assert float((many - one).norm() / one.norm()) <= 1e-4


def test_accumulated_router_loss_is_the_token_weighted_mean_in_float64():
    model = make_model(router_z_loss_coef=0.1).double().train()
    model.set_experts_implementation("eager")
    batches, counts = [], []
    for size, seed in ((3, 0), (1, 1), (2, 2)):
        ids = random_ids(size, 12, seed=seed)
        labels, mask = ids.clone(), torch.ones_like(ids)
        mask[0, 8:] = 0
        labels[mask == 0] = -100
        labels[:, : 2 * seed] = -100
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
        counts.append(int((labels[:, 1:] != -100).sum()))
    actual = router_gradient(model, batches, sum(counts))
    expected = torch.zeros_like(actual)
    for batch, count in zip(batches, counts, strict=True):
        expected += router_gradient(model, [batch]) * count / sum(counts)
    # transformers computes the cross-entropy in float32, whatever the model's dtype.
    assert float((actual - expected).norm() / expected.norm()) <= 1e-6


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(MoEError, match="use_reentrant"):
        make_model().activation_checkpointing_enable({"use_reentrant": True})


def test_padding_changes_neither_the_losses_nor_the_logits_of_real_tokens():
    model = make_model().train()
    ids = random_ids(2, 10)
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
    mask = (torch.arange(13) >= 3).long().expand(2, 13)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    plain = model(ids, labels=ids)
    left = model(padded, attention_mask=mask, position_ids=positions, labels=padded.masked_fill(mask == 0, -100))
    for name, value in plain.router_losses.items():
        assert torch.allclose(value, left.router_losses[name], atol=1e-6), name
    assert torch.allclose(plain.logits, left.logits[:, 3:], atol=1e-5)
