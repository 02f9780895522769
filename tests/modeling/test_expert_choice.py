"""Expert choice, its causal counterpart with thresholds, batch-prioritised slots, and the state that routers keep."""

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, MoETrainer
from moe_hf.modeling.router import Router
from moe_hf.modeling.routing import Routing
from moe_hf.trainer import update_router_state
from tests.modeling.routed import context_of, kept, route
from tests.tiny_models import random_ids, tiny_config
from tests.trainer.runs import arguments, rows, tiny_moe


CHOICE = {"router_type": "expert_choice", "allow_noncausal_routing": True}
THRESHOLD = {"router_type": "expert_threshold"}


def chosen(routing: Routing, num_experts: int) -> list[set[int]]:
    """The tokens of each expert."""
    pairs = list(zip(routing.top_k_index[:, 0].tolist(), routing.token_index.tolist(), strict=True))
    return [{token for expert, token in pairs if expert == e} for e in range(num_experts)]


def test_a_later_token_takes_an_earlier_ones_place():
    # Two experts that take two tokens each: expert 0 scores .6 .7 .2 .9, so token 3 drives token 0 out.
    logits = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.9, 0.1]]).log()
    assert chosen(route(logits, **CHOICE, num_experts_per_tok=1), 2) == [{3, 1}, {2, 0}]
    assert chosen(route(logits[:3], **CHOICE, num_experts_per_tok=1), 2) == [{1, 0}, {2, 0}]


def test_every_expert_takes_its_share_of_each_sequence_and_document_and_no_padding():
    logits = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    # ceil(2 * 12 / 6) = 4 of a row of 12; of documents with 5 and 19 tokens ceil(10 / 6) = 2 and ceil(38 / 6) = 7.
    for known, groups in (
        ({"batch_size": 2, "sequence_length": 12}, [(range(12), 4), (range(12, 24), 4)]),
        ({"document_ids": torch.tensor([0] * 5 + [7] * 19)}, [(range(5), 2), (range(5, 24), 7)]),
        ({"token_mask": torch.arange(24) >= 18}, [(range(18), 0), (range(18, 24), 2)]),
    ):
        routing = route(logits, known=known, **CHOICE)
        for tokens in chosen(routing, 6):
            assert [len(tokens & set(group)) for group, _ in groups] == [size for _, size in groups]
    unserved = 1 - len(set(routing.token_index.tolist())) / 6
    assert float(routing.stats["unserved_share"]) == pytest.approx(unserved)


def test_weights_are_scores_and_ties_go_to_earlier_tokens():
    routing = route(torch.zeros(4, 2), **CHOICE, num_experts_per_tok=1)
    assert chosen(routing, 2) == [{0, 1}, {0, 1}]
    assert routing.top_k_weights.unique().tolist() == [0.5]
    halves = route(torch.zeros(4, 2), **CHOICE, num_experts_per_tok=1, routed_scaling_factor=3.0)
    assert halves.top_k_weights.unique().tolist() == [1.5]
    normalised = route(torch.zeros(4, 4), **CHOICE, num_experts_per_tok=2, norm_topk_prob=True)
    assert torch.zeros(4).index_add(0, normalised.token_index, normalised.top_k_weights[:, 0]).tolist() == [1, 1, 0, 0]


def test_a_token_takes_the_experts_whose_threshold_it_reaches():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]).log()
    # Thresholds 1/3 + shift = .4 .25 .65: nothing is left for token 1.
    known = {"state": {"threshold_shift": torch.tensor([0.4, 0.25, 0.65]) - 1 / 3}}
    routing = route(logits, known=known, **THRESHOLD)
    assert chosen(routing, 3) == [{0}, {0}, set()]
    assert routing.top_k_weights[:, 0].tolist() == pytest.approx([0.5, 0.3])
    none = route(logits, known={"state": {"threshold_shift": torch.ones(3)}}, **THRESHOLD)
    assert none.top_k_weights.tolist() == [[0.0]] and float(none.stats["unserved_share"]) == 1


@pytest.mark.parametrize("fields", [CHOICE, THRESHOLD])
def test_closed_experts_take_nothing(fields):
    known = {"open_experts": torch.tensor([[True, False, True], [False, True, True]] * 3)}
    routing = route(torch.zeros(6, 3), known=known, **fields)
    found = chosen(routing, 3)
    assert found[0] <= {0, 2, 4} and found[1] <= {1, 3, 5} and len(found[0]) == len(found[1]) == 3
    assert found[2]


def test_thresholds_follow_the_lowest_score_that_would_have_been_taken():
    logits = torch.tensor([[0.5, 0.5], [0.7, 0.3], [0.1, 0.9], [0.8, 0.2]]).log()
    fields = {**THRESHOLD, "num_experts_per_tok": 1, "router_kwargs": {"momentum": 0.75}}
    spec, context = context_of(logits, training=True, **fields)
    observed = spec.function(logits, context).observed
    # Two of four tokens: the second highest scores are .7 and .5, times 4 tokens.
    assert observed["lowest_score"].tolist() == pytest.approx([2.8, 2.0]) and observed["tokens"].tolist() == [4, 4]
    state = spec.update(context.state, observed, context.arguments)
    # 1/2 + (.7 - 1/2) / 4 = .55, and .5 stays.
    assert state["threshold_shift"].tolist() == pytest.approx([0.05, 0.0], abs=1e-6)


def test_experts_of_unequal_appeal_come_to_take_equally_many_tokens():
    # Logits N(0, 1) + linspace(-1, 1): under the first thresholds, 1 / E each, the loads are far apart.
    generator, first = torch.Generator().manual_seed(0), None
    spec, context = context_of(torch.zeros(2048, 8), training=True, **THRESHOLD)
    state = context.state
    for _ in range(60):
        logits = torch.randn(2048, 8, generator=generator) + torch.linspace(-1, 1, 8)
        context.state.update(state)
        routing = spec.function(logits, context)
        loads = routing.top_k_index.flatten().bincount(minlength=8).float()
        first = loads if first is None else first
        state = spec.update(state, routing.observed, context.arguments)
    assert float(first.std() / first.mean()) > 0.5 > 0.1 > float(loads.std() / loads.mean())
    assert float(routing.stats["experts_per_token"]) == pytest.approx(2, abs=0.1)


def routers(model: torch.nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def test_state_moves_once_per_step_by_all_training_forwards_of_the_step():
    model, ids = tiny_moe(**THRESHOLD), random_ids(2, 10)
    model.eval()(ids, labels=ids)
    with torch.no_grad():
        model.train()(ids, labels=ids)
    assert all(router.observed == {} for router in routers(model))
    model(ids, labels=ids)
    once = [router.observed["lowest_score"].clone() for router in routers(model)]
    assert all(float(router.threshold_shift.abs().max()) == 0 for router in routers(model))
    model(ids, labels=ids)
    assert all(torch.equal(r.observed["lowest_score"], 2 * o) for r, o in zip(routers(model), once, strict=True))
    routers(model)[0].weight.requires_grad = False
    update_router_state(model)
    shifts = [router.threshold_shift for router in routers(model)]
    assert float(shifts[0].abs().max()) == 0 and all(float(shift.abs().max()) > 0 for shift in shifts[1:])
    assert all(router.observed == {} for router in routers(model))
    before = [shift.clone() for shift in shifts]
    update_router_state(model)
    assert all(torch.equal(a, b) for a, b in zip(before, shifts, strict=True))


def test_gradient_checkpointing_observes_once():
    ids, seen = random_ids(2, 10), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = tiny_moe(**THRESHOLD).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        seen.append([router.observed["tokens"].tolist() for router in routers(model)])
    assert seen[0] == seen[1] and seen[0][0][0] == 20


def test_the_trainer_moves_the_state_which_is_saved_in_float32(tmp_path):
    model = tiny_moe(**THRESHOLD)
    MoETrainer(model, arguments(tmp_path), train_dataset=rows(8)).train()
    shifts = [router.threshold_shift.clone() for router in routers(model)]
    assert all(float(shift.abs().max()) > 0 for shift in shifts)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    loaded = MoEForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    for router, shift in zip(routers(loaded), shifts, strict=True):
        assert router.threshold_shift.dtype == torch.float32 and torch.equal(router.threshold_shift, shift)


def test_tokens_of_higher_scores_get_the_slots_first():
    # All three prefer expert 0, with .6, .9 and .8; C = 2.
    logits = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2]]).log()
    fields = {"training": True, "num_experts_per_tok": 1, "capacity_factor": 1.0, "min_expert_capacity": 2}
    first = {"capacity_order": "batch_prioritized", "allow_noncausal_routing": True}
    assert kept(route(logits, **fields)) == [(0,), (0,), ()]
    assert kept(route(logits, **fields, **first)) == [(), (0,), (0,)]
    two_rows = {"batch_size": 2, "sequence_length": 3}
    twice = route(torch.cat([logits, logits.flip(0)]), known=two_rows, **fields, **first)
    assert kept(twice) == [(), (0,), (0,), (0,), (0,), ()]
    ample = fields | {"capacity_factor": 2.0}
    assert torch.equal(route(logits, **ample, **first).top_k_weights, route(logits, **ample).top_k_weights)


@pytest.mark.parametrize(
    ("fields", "message"),
    {
        "unallowed": ({"router_type": "expert_choice"}, "allow_noncausal_routing=True"),
        "unallowed_priority": ({"capacity_order": "batch_prioritized"}, "allow_noncausal_routing=True"),
        "capacity": ({**CHOICE, "capacity_factor": 1.0}, "no use for capacity_factor"),
        "noise": ({**THRESHOLD, "router_noise": "gumbel"}, "no use for router_noise"),
        "bias": ({**THRESHOLD, "balance_strategy": "bias"}, "no use for balance_strategy"),
        "momentum": ({**THRESHOLD, "router_kwargs": {"momentum": 1.0}}, "in \\[0, 1\\)"),
        "sigmoid": ({**THRESHOLD, "scoring_func": "sigmoid"}, "scoring_func='softmax'"),
    }.values(),
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(MoEError, match=message):
        MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4, **fields))
