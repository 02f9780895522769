"""Capacity: the conventions, who gets a slot, where the others go, what is reported, and a factor that changes."""

import pytest
import torch

from moe_hf import MoEError, MoETrainer
from moe_hf.modeling.capacity import CAPACITY_CONVENTIONS, expert_capacity
from moe_hf.trainer.capacity_schedule import CapacitySchedule, CapacityScheduleCallback
from tests.modeling.routed import context_of, kept, preferring, route
from tests.trainer.runs import arguments, rows, tiny_moe


TRAIN = {"training": True}
# With one expert per token, two per group: C = ceil(factor * T * K / E).
ONE = {"num_experts_per_tok": 1, "min_expert_capacity": 1}
TWO = {"num_experts_per_tok": 2, "min_expert_capacity": 1}


def test_capacities_of_ten_tokens_four_experts_top_two_and_factor_1_25():
    # k T CF / E = 6.25 and T CF / E = 3.125, rounded and bounded as each code does it.
    expected = {
        "vmoe": 8,
        "deepspeed": 7,
        "megatron": 7,
        "megablocks": 6,
        "fairseq": 6,
        "flaxformer": 4,
        "mesh_tensorflow": 4,
        "lingvo": 4,
        "switch": 3,
    }
    assert {name: rule.capacity(10, 4, 2, 1.25) for name, rule in CAPACITY_CONVENTIONS.items()} == expected


@pytest.mark.parametrize("name", CAPACITY_CONVENTIONS)
def test_a_converted_factor_gives_the_same_capacity_up_to_rounding(name):
    rule = CAPACITY_CONVENTIONS[name]
    for tokens, experts, top_k, factor in ((4096, 64, 2, 1.25), (2048, 8, 1, 2.0), (1000, 16, 2, 1.0)):
        logits = torch.zeros(1, experts)
        _, context = context_of(logits, num_experts_per_tok=top_k)
        ours = int(expert_capacity(torch.tensor(tokens), context.config, rule.our_factor(factor, top_k)))
        # vmoe and lingvo round up to a multiple of 4.
        assert abs(ours - rule.capacity(tokens, experts, top_k, factor)) <= (2 * top_k if name == "fairseq" else 4)


def test_capacity_is_the_fair_share_times_the_factor_rounded_up_and_at_least_the_minimum():
    _, context = context_of(torch.zeros(1, 4), min_expert_capacity=2)
    tokens = torch.tensor([0, 1, 10, 8, 30])
    # 1.25 * T * 2 / 4 = 0, .6, 6.25, 5, 18.75
    assert expert_capacity(tokens, context.config, 1.25).tolist() == [2, 2, 7, 5, 19]
    # 1.2 * 25 * 2 / 4 = 15, a little more in float32.
    assert expert_capacity(torch.tensor(25), context.config, 1.2) == 15


def test_earlier_tokens_keep_their_slots():
    # C = 2 of 6 tokens and 2 experts with a factor of 2 / 3.
    logits = preferring((0,), (0,), (1,), (0,), (0,), (1,), num_experts=2)
    routing = route(logits, **TRAIN, capacity_factor=2 / 3, **ONE)
    assert kept(routing) == [(0,), (0,), (1,), (), (), (1,)]
    assert float(routing.stats["dropped_share"]) == pytest.approx(2 / 6)
    assert float(routing.stats["experts_per_token"]) == pytest.approx(4 / 6)


def test_a_later_first_choice_takes_an_earlier_second_choices_slot_in_choice_major_order_alone():
    # E = 2, K = 2, C = 1. Token 0 alone gets both experts; with token 1 behind it, choice-major order gives expert 1 to
    # token 1, whose first choice it is, and token-major order changes nothing.
    logits = preferring((0, 1), (1, 0), num_experts=2)
    leak = {"capacity_order": "choice_major", "allow_noncausal_routing": True}
    for order, both in (({}, [(0, 1), ()]), (leak, [(0,), (1,)])):
        alone = route(logits[:1], **TRAIN, capacity_factor=0.5, **TWO, **order)
        together = route(logits, **TRAIN, capacity_factor=0.5, **TWO, **order)
        assert kept(alone) == [(0, 1)] and kept(together) == both


def test_of_many_random_sequences_only_choice_major_order_leaks():
    generator = torch.Generator().manual_seed(0)
    leaks = {"token_major": 0, "choice_major": 0, "reroute": 0}
    for trial in range(60):
        logits = torch.randn(8, 4, generator=generator)
        for name in leaks:
            fields = {"capacity_factor": 0.01, "min_expert_capacity": 1 + trial % 3}
            if name == "choice_major":
                fields |= {"capacity_order": name, "allow_noncausal_routing": True}
            elif name == "reroute":
                fields |= {"overflow_policy": name}
            full = kept(route(logits, **TRAIN, **fields))
            leaks[name] += any(kept(route(logits[:cut], **TRAIN, **fields)) != full[:cut] for cut in (2, 4, 6))
    assert leaks["token_major"] == leaks["reroute"] == 0 and leaks["choice_major"] > 15


def test_overflow_goes_to_the_next_best_expert_with_a_free_slot():
    # Three tokens that all prefer 0 to 1, C = 2: drop keeps two, reroute sends the third to expert 1.
    logits = preferring((0,), (0,), (0,), num_experts=2)
    settings = {**TRAIN, "capacity_factor": 4 / 3, **ONE}
    dropped = route(logits, **settings)
    assert kept(dropped) == [(0,), (0,), ()] and dropped.preferred_index is None
    rerouted = route(logits, **settings, overflow_policy="reroute")
    assert kept(rerouted) == [(0,), (0,), (1,)] and float(rerouted.stats["dropped_share"]) == 0
    # The weight is the probability of the expert that is used; the choice itself stays known to the losses.
    assert float(rerouted.top_k_weights[2]) == pytest.approx(float(logits[2].softmax(-1)[1]))
    assert rerouted.preferred_index.flatten().tolist() == [0, 0, 0]


def test_rerouting_in_rounds_equals_going_through_the_tokens_one_by_one():
    generator = torch.Generator().manual_seed(1)
    for trial in range(60):
        experts, top_k = (5, 2) if trial % 2 else (7, 3)
        # Tokens of one taste, so that refusals come in chains.
        logits = torch.randn(24, experts, generator=generator) * 0.5 + torch.linspace(2, -2, experts)
        factor = (0.5, 0.8, 1.0, 1.3)[trial % 4]
        fields = {"num_experts_per_tok": top_k, "min_expert_capacity": 1, "capacity_factor": factor}
        routing = route(logits, **TRAIN, **fields, overflow_policy="reroute", norm_topk_prob=True)
        capacity = int(expert_capacity(torch.tensor(24), context_of(logits, **fields)[1].config, factor))
        free, expected = [capacity] * experts, []
        for row in logits:
            chosen = [e for e in row.argsort(descending=True).tolist() if free[e] > 0][:top_k]
            for expert in chosen:
                free[expert] -= 1
            expected.append(tuple(chosen))
        assert kept(routing) == expected


@pytest.mark.parametrize("policy", ["drop", "reroute"])
def test_enough_capacity_is_the_dropless_result_bit_by_bit(policy):
    logits = torch.randn(50, 6)
    plain = route(logits)
    ample = route(logits, **TRAIN, capacity_factor=3.0, overflow_policy=policy)
    assert torch.equal(plain.top_k_index, ample.top_k_index) and torch.equal(plain.top_k_weights, ample.top_k_weights)
    assert float(ample.stats["dropped_share"]) == 0


def test_groups_are_rows_and_documents_and_padding_takes_no_slot():
    logits = preferring(*[(0,)] * 8, num_experts=2)
    settings = {**TRAIN, "capacity_factor": 1.0, **ONE}
    # Two rows of 4: C = 2 in each.
    two_rows = {"batch_size": 2, "sequence_length": 4}
    assert [len(k) for k in kept(route(logits, known=two_rows, **settings))] == [1, 1, 0, 0] * 2
    # One row of documents with 2 and 6 tokens: C = 1 and 3.
    packed = {"document_ids": torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])}
    assert [len(k) for k in kept(route(logits, known=packed, **settings))] == [1, 0, 1, 1, 1, 0, 0, 0]
    # Rows of 4 whose first two tokens are padding: C = 1, for the first real token.
    padded = two_rows | {"token_mask": torch.tensor([False, False, True, True] * 2)}
    routing = route(logits, known=padded, **settings)
    assert [len(k) for k in kept(routing)][2:4] == [1, 0] and float(routing.stats["dropped_share"]) == 0.5


def test_evaluation_is_dropless_unless_it_has_a_factor_of_its_own():
    logits = preferring(*[(0,)] * 6, num_experts=2)
    assert all(kept(route(logits, capacity_factor=0.5, **ONE)))
    limited = route(logits, eval_capacity_factor=1.0, **ONE)
    assert [len(k) for k in kept(limited)] == [1, 1, 1, 0, 0, 0]
    assert all(kept(route(logits, **TRAIN, eval_capacity_factor=1.0, **ONE)))


def test_a_schedule_goes_from_start_to_end():
    for shape in ("linear", "cosine", "step"):
        schedule = CapacitySchedule(start=2.0, end=1.25, until=0.5, shape=shape)
        values = [schedule.at(i / 100) for i in range(101)]
        assert values[0] == 2.0 and values[50] == values[100] == 1.25
        assert all(a >= b for a, b in zip(values, values[1:], strict=False))
    assert CapacitySchedule(2.0, 1.0).at(0.25) == 1.75
    assert CapacitySchedule(2.0, 1.0, shape="cosine").at(0.5) == pytest.approx(1.5)
    assert CapacitySchedule(2.0, 1.0, until=0.5, shape="step").at(0.49) == 2.0
    for bad in ({"start": 0}, {"until": 0}, {"until": 1.5}, {"shape": "sudden"}):
        with pytest.raises(MoEError):
            CapacitySchedule(**{"start": 2.0, "end": 1.0, **bad})


def test_the_trainer_follows_a_schedule_and_logs_what_was_dropped(tmp_path):
    seen = []

    class Seen(CapacityScheduleCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            super().on_step_begin(args, state, control, model=model, **kwargs)
            seen.append(model.config.capacity_factor)

    model = tiny_moe(capacity_factor=1.0, min_expert_capacity=1)
    callback = Seen(CapacitySchedule(start=2.0, end=0.4))
    trainer = MoETrainer(model, arguments(tmp_path), train_dataset=rows(16), callbacks=[callback])
    trainer.train()
    assert seen == pytest.approx([2.0, 1.6, 1.2, 0.8])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    dropped = [entry["dropped_share"] for entry in logged]
    assert dropped[0] < 0.1 < 0.25 < dropped[-1] < 1
    assert all(entry["load_balancing_loss"] > 0.5 and entry["experts_per_token"] < 2 for entry in logged[1:])
    with pytest.raises(MoEError, match="capacity_factor"):
        MoETrainer(tiny_moe(), arguments(tmp_path / "b"), train_dataset=rows(4), callbacks=[callback]).train()
