"""How router losses enter the model's loss: layers, scopes, coefficients, accumulation and padding."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle
from moe_hf.modeling.losses import loss_coefficients
from moe_hf.modeling.outputs import losses_by_name
from moe_hf.modeling.router import Router
from moe_hf.modeling.routing_pass import RoutingPass
from tests.modeling.decided import decided
from tests.tiny_models import random_ids, tiny_config, tiny_dense


def make_model(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=4, **fields)
    return MoEForCausalLM(config)


def test_layers_are_scored_one_by_one():
    # Each layer collapses onto two experts of its own: f P is 2 in each, and pooled over layers it would be 1.
    layers = []
    for first in (0, 2):
        logits = torch.full((6, 4), -100.0)
        logits[:, first : first + 2] = 100.0
        layers.append(decided(logits))
    losses = losses_by_name(RoutingPass(record=True, layers=layers), make_model().config, training=True, report=False)
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


EVERY_LOSS = {
    "importance_loss": 0.1,
    "load_loss": 0.2,
    "local_entropy_loss": 0.3,
    "global_entropy_loss": 0.4,
    "device_balance_loss": 0.5,
}


def test_further_losses_enter_with_their_coefficients_and_survive_a_checkpoint(tmp_path):
    model = make_model(
        router_noise="gaussian", router_loss_coefs=EVERY_LOSS, router_loss_kwargs={"num_device_groups": 2}
    )
    model.save_pretrained(tmp_path)
    model = MoEForCausalLM.from_pretrained(tmp_path).train()
    assert loss_coefficients(model.config) == {
        "load_balancing_loss": 0.01,
        "router_z_loss": 1e-3,
        **EVERY_LOSS,
    }
    ids = random_ids()
    output = model(ids, labels=ids)
    assert output.router_losses.keys() == loss_coefficients(model.config).keys()
    expected = sum(loss_coefficients(model.config)[name] * loss for name, loss in output.router_losses.items())
    assert torch.equal(output.aux_loss, expected)
    # Every layer's router learns from each of them.
    routers = [module.weight for module in model.modules() if isinstance(module, Router)]
    for name, loss in output.router_losses.items():
        gradients = torch.autograd.grad(loss, routers, retain_graph=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients), name
    # Nothing is noisy in evaluation, so there is no load to estimate.
    reported = model.eval()(ids, output_router_logits=True).router_losses
    assert reported.keys() == expected_names(without="load_loss")


def expected_names(without: str) -> set[str]:
    return {"load_balancing_loss", "router_z_loss", *EVERY_LOSS} - {without}


def test_a_loss_of_weight_zero_is_reported_and_not_computed_otherwise():
    model = make_model(router_aux_loss_coef=0.0, router_loss_coefs={"local_entropy_loss": 0.0}).train()
    ids = random_ids()
    assert model(ids, labels=ids).router_losses.keys() == {"router_z_loss"}
    reported = model(ids, labels=ids, output_router_logits=True)
    assert reported.router_losses.keys() == {"router_z_loss", "load_balancing_loss", "local_entropy_loss"}
    assert torch.equal(reported.aux_loss, 1e-3 * reported.router_losses["router_z_loss"])


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_packed_documents_are_scored_alone_only_in_the_scope_of_sequences(scope):
    model = make_model(balance_loss_scope=scope, router_z_loss_coef=0.0).train()
    documents = [random_ids(1, length, seed=length) for length in (5, 9, 2)]
    row = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    packed = model(row, position_ids=positions, use_cache=False).router_losses["load_balancing_loss"]
    alone = [model(document).router_losses["load_balancing_loss"] for document in documents]
    mean = sum(loss * document.shape[1] for loss, document in zip(alone, documents, strict=True)) / row.shape[1]
    assert torch.allclose(packed, mean, rtol=1e-5) == (scope == "sequence")


@pytest.mark.parametrize(
    "fields",
    [
        {"router_aux_loss_coef": 1.0, "balance_loss_scope": "sequence"},
        {"router_z_loss_coef": 1.0},
        {"router_loss_coefs": {"local_entropy_loss": 1.0}},
    ],
    ids=["sequence", "z", "local_entropy"],
)
def test_means_over_tokens_and_sequences_are_the_same_for_one_micro_batch_and_for_many(fields):
    model = make_model(**{"router_z_loss_coef": 0.0, "router_aux_loss_coef": 0.0} | fields).double()
    model.set_experts_implementation("eager")
    ids = random_ids(4, 10)
    items = torch.tensor(4 * 9)
    one = router_gradient(model.train(), [{"input_ids": ids, "labels": ids}], items)
    for size in (1, 2):
        batches = [{"input_ids": part, "labels": part} for part in ids.split(size)]
        many = router_gradient(model, batches, items)
        # transformers computes the cross-entropy in float32, whatever the model's dtype.
        assert float((many - one).norm() / one.norm()) <= 1e-6


def test_global_batch_counts_all_micro_batches_of_a_step_where_counts_are_kept():
    model = make_model(balance_loss_scope="global_batch").train()
    first, second = random_ids(2, 10, seed=1), random_ids(2, 10, seed=2)
    alone = model(second).router_losses["load_balancing_loss"]
    whole = model(torch.cat([first, second])).router_losses["load_balancing_loss"]
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert all(router.step_counts is None for router in routers), "nothing says when a step ends"
    for router in routers:
        router.step_counts = torch.zeros(4, dtype=torch.long)
    early = model(first).router_losses["load_balancing_loss"]
    late = model(second).router_losses["load_balancing_loss"]
    assert not torch.equal(late, alone)
    assert all(int(router.step_counts.sum()) == 40 * 2 for router in routers)
    # With the counts of the whole, the mean over micro-batches is the loss of the whole.
    for router in routers:
        router.step_counts -= router.step_counts
    model(second)
    assert torch.allclose((model(first).router_losses["load_balancing_loss"] + late) / 2, whole, rtol=1e-5)
    assert not torch.allclose((early + alone) / 2, whole, rtol=1e-5)
    # Evaluation neither counts nor reads.
    counts = [router.step_counts.clone() for router in routers]
    model.eval()(first, output_router_logits=True)
    assert all(torch.equal(r.step_counts, c) for r, c in zip(routers, counts, strict=True))


def router_gradient(model, batches, num_items=None) -> torch.Tensor:
    model.zero_grad()
    for batch in batches:
        model(**batch, num_items_in_batch=num_items).loss.backward()
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n.endswith("gate.weight")])


# A trainer that adds the router losses of each micro-batch unweighted multiplies them by `steps`.
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


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["nothing", "empty", "other", "none", "selective", "kbit"])
def test_checkpointing_is_not_reentrant_unless_it_is_asked_for(way):
    seen = []

    def selective():
        seen.append(way)
        return create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE)

    given = {"empty": {}, "other": {"preserve_rng_state": False}, "none": {"use_reentrant": None}}
    given |= {"selective": {"use_reentrant": False, "context_fn": selective}, "nothing": None}
    gradients = []
    for is_checkpointed in (False, True):
        model = make_model().train()
        if way == "kbit":
            model.is_loaded_in_4bit = True
            peft = pytest.importorskip("peft")
            peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=is_checkpointed)
            model.requires_grad_(True)
        elif is_checkpointed:
            model.gradient_checkpointing_enable(given[way])
        ids = random_ids(2, 12)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)
    assert bool(seen) == (way == "selective"), "what is given acts"


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_padding_changes_neither_the_losses_nor_the_logits_of_real_tokens(scope):
    coefs = {name: 1.0 for name in EVERY_LOSS if name != "load_loss"}
    model = make_model(
        balance_loss_scope=scope, router_loss_coefs=coefs, router_loss_kwargs={"num_device_groups": 2}
    ).train()
    ids = random_ids(2, 10)
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
    mask = (torch.arange(13) >= 3).long().expand(2, 13)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    plain = model(ids, labels=ids)
    left = model(padded, attention_mask=mask, position_ids=positions, labels=padded.masked_fill(mask == 0, -100))
    for name, value in plain.router_losses.items():
        assert torch.allclose(value, left.router_losses[name], atol=1e-6), name
    assert torch.allclose(plain.logits, left.logits[:, 3:], atol=1e-5)
