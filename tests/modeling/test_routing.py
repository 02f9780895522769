"""Token choice: golden numbers with their derivation, the frequencies of what is drawn, and the register of routers."""

import math

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, register_router
from moe_hf.finetuning.scopes import scope_parameter_names
from moe_hf.modeling.routers import ROUTERS
from moe_hf.modeling.routing import Argument, Routing
from moe_hf.modeling.token_choice import choosing_scores
from tests.modeling.reference import make_block
from tests.modeling.routed import context_of, kept, preferring, route
from tests.tiny_models import random_ids, tiny_config


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def within_three_sigma(frequency: float, probability: float, draws: int) -> bool:
    return abs(frequency - probability) <= 3 * math.sqrt(probability * (1 - probability) / draws) + 1e-12


def test_weights_of_the_top_two_of_1_2_3_0():
    # 1 / (1 + e^-1) and 1 / (1 + e): a softmax over the two best logits, 3 and 2.
    routing = route(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    assert routing.top_k_index.tolist() == [[2, 1]]
    assert routing.top_k_weights[0].tolist() == pytest.approx([0.7310586, 0.2689414], abs=1e-6)


def test_one_expert_per_token_learns_from_its_raw_probability_and_not_from_a_normalised_one():
    # p = softmax(1, .5, -.2) = (.5242, .3179, .1579) and dL/dp_1 = 3: 3 p_1 (1 - p_1), -3 p_1 p_2, -3 p_1 p_3.
    for normalised, expected in ((False, [0.748, -0.500, -0.248]), (True, [0.0, 0.0, 0.0])):
        logits = torch.tensor([[1.0, 0.5, -0.2]], requires_grad=True)
        spec, context = context_of(logits, num_experts_per_tok=1)
        context.config.norm_topk_prob = normalised  # refused in a configuration, for this very reason
        (3 * spec.function(logits, context).top_k_weights).sum().backward()
        assert logits.grad[0].tolist() == pytest.approx(expected, abs=5e-4 if not normalised else 2e-7)


def test_a_bfloat16_model_routes_by_logits_that_bfloat16_cannot_hold():
    # 128.5 among ten 128: e^.5 / (e^.5 + 10) = .141537. Rounded to bfloat16 all are 128: 1 / 11 = .090909.
    block = make_block("gated", num_experts=11, num_experts_per_tok=1).bfloat16()
    with torch.no_grad():
        block.gate.weight.zero_()[:, 0] = 1.0
        block.gate.weight[0, 1] = 1.0
    tokens = torch.zeros(1, 48, dtype=torch.bfloat16)
    tokens[0, 0], tokens[0, 1] = 128.0, 0.5
    _, weights, index = block.gate(tokens)
    assert index.item() == 0 and weights.item() == pytest.approx(0.141537, abs=1e-6)
    assert (tokens @ block.gate.weight.T).softmax(-1)[0, 0].item() == pytest.approx(0.090909, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "probability"),
    [
        # g = (.5, .3) / .8 = (.625, .375). GShard draws with probability 2 g_2, fairseq with the raw 2 * .3, and Mesh
        # TensorFlow with g_2 / .2, which is more than 1.
        ({"threshold": 0.5}, 0.75),
        ({"threshold": 0.5, "renormalise": "after"}, 0.60),
        ({"threshold": 0.2}, 1.0),
    ],
    ids=["normalised", "raw", "mesh_tensorflow"],
)
def test_the_second_expert_is_used_as_often_as_its_share_says(settings, probability):
    draws = 20_000
    logits = log(0.5, 0.3, 0.2).expand(draws, 3)
    fields = {"router_type": "stochastic_top_k", "router_kwargs": settings}
    routing = route(logits, training=True, **fields)
    used = (routing.top_k_weights > 0).float().mean(0)
    assert used[0] == 1 and within_three_sigma(float(used[1]), probability, draws)
    # Alone, the best expert weighs its share of the two; normalised after the drop, it weighs everything.
    alone = 0.625 if "renormalise" not in settings else 1.0
    first, second = routing.top_k_weights.T
    assert torch.allclose(first[second == 0], torch.tensor(alone)) and torch.allclose(
        first[second > 0], torch.tensor(0.625)
    )
    evaluated = route(logits[:3], **fields)
    assert torch.allclose(evaluated.top_k_weights, torch.tensor([0.625, 0.375]))


def test_sampled_experts_are_draws_without_replacement():
    # After the best expert, p = .5, expert j is the second with probability p_j / (1 - .5).
    draws = 20_000
    logits = log(0.5, 0.3, 0.15, 0.05).expand(draws, 4)
    fields = {"router_type": "stochastic_top_k", "router_kwargs": {"policy": "sampling"}}
    index = route(logits, training=True, **fields).top_k_index
    assert (index[:, 0] == 0).all()
    for expert, probability in ((1, 0.6), (2, 0.3), (3, 0.1)):
        assert within_three_sigma(float((index[:, 1] == expert).float().mean()), probability, draws)
    # Of three, the third after (0, 1): .6 * .15 / .2 + .3 * 0 + .1 * .15 / .45, for expert 2.
    index = route(logits, training=True, num_experts_per_tok=3, **fields).top_k_index
    expected = 0.6 * 0.15 / 0.2 + 0.1 * 0.15 / 0.45
    assert within_three_sigma(float((index[:, 2] == 2).float().mean()), expected, draws)
    assert route(logits[:1], **fields).top_k_index.tolist() == [[0, 1]]


def test_top_p_takes_experts_until_the_probabilities_reach_p():
    # Sums: .5 | .3 + .3 | .25 + .25 | .97. The expert that crosses p counts, and reaching p is enough.
    rows = torch.cat(
        [log(0.5, 0.3, 0.1, 0.1), log(0.3, 0.3, 0.2, 0.2), torch.zeros(1, 4), log(0.97, 0.01, 0.01, 0.01)]
    )
    for p, counts in ((0.4, [1, 2, 2, 1]), (0.5, [1, 2, 2, 1]), (1e-6, [1, 1, 1, 1]), (1.0, [4, 4, 4, 4])):
        routing = route(rows, router_type="top_p", router_kwargs={"top_p": p})
        assert routing.token_index.bincount().tolist() == counts, p
        assert float(routing.stats["experts_per_token"]) == sum(counts) / 4
        assert len(routing.top_k_weights) == sum(counts), "only what is used is computed"
    # Weights are the probabilities, not normalised: .3 + .3 for the second token.
    routing = route(rows, router_type="top_p")
    assert float(routing.top_k_weights[routing.token_index == 1].sum()) == pytest.approx(0.6)
    everything = route(rows, router_type="top_p", router_kwargs={"top_p": 1.0})
    dense = torch.zeros(4, 4).index_put(
        (everything.token_index, everything.top_k_index[:, 0]), everything.top_k_weights[:, 0]
    )
    assert torch.allclose(dense, rows.softmax(-1)), "at p = 1 every expert takes part with its probability"


def test_outputs_have_the_figures_of_the_routers_as_means_over_layers():
    torch.manual_seed(0)
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=8, router_type="top_p")
    model, ids = MoEForCausalLM(config).eval(), random_ids(2, 9)
    assert model(ids).router_stats is None
    output = model(ids, output_router_logits=True)
    counts = []
    for logits in output.router_logits:
        probabilities = logits.softmax(-1).sort(-1, descending=True).values
        counts.append((probabilities.cumsum(-1) < 0.4).sum(-1).float().mean() + 1)
    assert output.router_stats["experts_per_token"] == pytest.approx(float(torch.stack(counts).mean()))
    assert model.model(ids, output_router_logits=True).router_stats == output.router_stats


def test_top_p_counts_padding_in_no_figure():
    rows = torch.cat([log(0.5, 0.3, 0.1, 0.1), torch.zeros(1, 4)])
    known = {"token_mask": torch.tensor([True, False])}
    assert float(route(rows, known=known, router_type="top_p").stats["experts_per_token"]) == 1


def test_groups_are_as_good_as_their_best_two_sigmoids_or_their_best_softmax():
    # Sigmoids: group (0, 1) has .9 + .1, group (2, 3) .6 + .6. The best expert is in the worse group.
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.6 - 1e-3]])
    fields = {"n_group": 2, "topk_group": 1}
    sigmoid = route(scores.logit(), scoring_func="sigmoid", **fields)
    assert sigmoid.top_k_index.tolist() == [[2, 3]]
    assert sigmoid.top_k_weights.sum().item() == pytest.approx(1)
    softmax = route(scores.log(), **fields)
    assert softmax.top_k_index.tolist() == [[0, 1]]


def test_correction_bias_changes_the_choice_and_not_the_weights():
    scores = torch.tensor([[0.8, 0.5, 0.4, 0.1]])
    fields = {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}
    bias = torch.tensor([0.0, -0.2, 0.0, 0.0])
    biased = route(scores.logit(), known={"correction_bias": bias}, **fields)
    assert biased.top_k_index.tolist() == [[0, 2]]
    assert biased.top_k_weights[0].tolist() == pytest.approx([2.5 * 0.8 / 1.2, 2.5 * 0.4 / 1.2])
    shifted = route(scores.logit(), known={"correction_bias": bias + 7}, **fields)
    assert torch.equal(shifted.top_k_index, biased.top_k_index) and torch.equal(
        shifted.top_k_weights, biased.top_k_weights
    )
    # All scores of the open group are negative, and the closed one must stay closed.
    groups = route(scores.logit(), known={"correction_bias": bias - 7}, n_group=2, topk_group=1, **fields)
    assert groups.top_k_index.tolist() == [[0, 1]]


@pytest.fixture
def registered():
    """Routers of ours by the name that a test gives them; they are gone afterwards."""
    before = dict(ROUTERS)
    yield register_router
    ROUTERS.clear()
    ROUTERS.update(before)


def scaled_top_k(router_logits, context):
    """Top-k of logits that a learned, per-expert temperature scales."""
    temperature = (context.parameters["log_temperature"] + context.arguments["offset"]).exp()
    choosing, weighing = choosing_scores(router_logits * temperature, context)
    index = choosing.topk(context.config.num_experts_per_tok, dim=-1).indices
    weights = weighing.gather(1, index)
    return Routing(index, weights / weights.sum(-1, keepdim=True))


def test_a_router_of_ones_own_has_arguments_and_parameters_that_train_and_travel(registered, tmp_path):
    offset = Argument(0.0, "a number", lambda value: isinstance(value, float))
    registered("scaled", scaled_top_k, {"offset": offset}, parameters={"log_temperature": ("E",)}, options=("noise",))
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=4, router_type="scaled", router_noise="gumbel")
    model = MoEForCausalLM(config).train()
    names = [n for n, _ in model.named_parameters() if n.endswith("gate.log_temperature")]
    assert len(names) == 3 and set(names) < set(scope_parameter_names(model, "router"))
    plain = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4))
    plain.load_state_dict(model.state_dict(), strict=False)
    ids = random_ids(2, 8)
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, plain.eval()(ids).logits), "parameters start without effect"
    model.train()(ids, labels=ids).loss.backward()
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in names)
    with torch.no_grad():
        model.get_parameter(names[0]).fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.get_parameter(n), model.get_parameter(n)) for n in names)


def test_what_a_router_does_not_serve_is_refused(registered):
    registered("mine", scaled_top_k, ("offset",))
    for fields in ({"router_noise": "gumbel"}, {"capacity_factor": 1.0}, {"n_group": 2, "topk_group": 1}):
        with pytest.raises(MoEError, match="'mine' has no use for"):
            make_block("gated", num_experts=8, router_type="mine", **fields)
    with pytest.raises(MoEError, match="'top_p' has no use for capacity_factor"):
        make_block("gated", router_type="top_p", capacity_factor=1.0)


def test_a_router_that_sees_later_tokens_needs_permission_and_cannot_generate(registered):
    def last_token(router_logits, context):
        rows = router_logits.unflatten(0, (context.batch_size, -1))
        return ROUTERS["top_k"].function(rows[:, -1:].expand_as(rows).flatten(0, 1), context)

    registered("last", last_token, ("renormalise",), causal=False)
    fields = {"text_config": tiny_config("llama"), "router_type": "last"}
    with pytest.raises(MoEError, match="allow_noncausal_routing=True"):
        MoEForCausalLM(MoEConfig(**fields))
    model = MoEForCausalLM(MoEConfig(**fields, allow_noncausal_routing=True)).eval()
    with pytest.raises(MoEError, match="cannot generate"):
        model.generate(random_ids(1, 4), max_new_tokens=2)
    past = model(random_ids(1, 4), use_cache=True).past_key_values
    with pytest.raises(MoEError, match="with a cache"):
        model(random_ids(1, 1), past_key_values=past)


BAD_ARGUMENTS = {
    "unknown": ("top_k", {"top_p": 0.3}, {}, "does not read"),
    "renormalise": ("top_k", {"renormalise": "never"}, {}, "'before' or 'after'"),
    "policy": ("stochastic_top_k", {"policy": "all"}, {}, "one of"),
    "threshold": ("stochastic_top_k", {"threshold": 0}, {}, r"\(0, 1\]"),
    "one_expert": ("stochastic_top_k", {}, {"num_experts_per_tok": 1}, "num_experts_per_tok >= 2"),
    "reroute": ("stochastic_top_k", {}, {"capacity_factor": 1.0, "overflow_policy": "reroute"}, "next best"),
    "top_p": ("top_p", {"top_p": 1.5}, {}, r"\(0, 1\]"),
    "min_above_max": ("top_p", {"min_experts": 3, "max_experts": 2}, {}, "in order"),
    "max_above_E": ("top_p", {"max_experts": 6}, {}, "num_experts=5"),
    "count": ("top_p", {"max_experts": 2.0}, {}, "whole number"),
    "sigmoid": ("top_p", {}, {"scoring_func": "sigmoid"}, "softmax"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_router_arguments_give_one_clear_error(case):
    router_type, arguments, fields, message = BAD_ARGUMENTS[case]
    with pytest.raises(MoEError, match=message):
        make_block("gated", router_type=router_type, router_kwargs=arguments, **fields)


BAD_FIELDS = {
    "one_of_two": ({"n_group": 2}, "both, or neither"),
    "indivisible": ({"n_group": 3, "topk_group": 1}, "divide num_experts = 8"),
    "too_many": ({"n_group": 4, "topk_group": 5}, "between 1 and n_group"),
    "too_few_experts": ({"n_group": 8, "topk_group": 1}, "fewer than"),
    "noise": ({"router_noise": "normal"}, "gaussian"),
    "scale": ({"router_noise_scale": -1.0}, "at least 0"),
    "affects": ({"router_noise_affects": "weights"}, "selection"),
    "learned": ({"router_noise": "learned"}, "router_noise_affects='both'"),
    "capacity": ({"capacity_factor": 0.0}, "above 0"),
    "eval_capacity": ({"eval_capacity_factor": math.inf}, "finite"),
    "least": ({"min_expert_capacity": 0}, "at least 1"),
    "overflow": ({"overflow_policy": "buffer"}, "reroute"),
    "order": ({"capacity_order": "random"}, "token_major"),
    "leaking_order": ({"capacity_order": "choice_major"}, "allow_noncausal_routing=True"),
    "leaking_reroute": (
        {"capacity_order": "choice_major", "allow_noncausal_routing": True, "overflow_policy": "reroute"},
        "token_major",
    ),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_fields_give_one_clear_error(case):
    fields, message = BAD_FIELDS[case]
    with pytest.raises(MoEError, match=message):
        MoEConfig(text_config=tiny_config("llama"), num_experts=8, **fields)


def test_helpers_of_these_tests_say_what_they_mean():
    assert kept(route(preferring((2, 0), (1, 3), num_experts=4))) == [(2, 0), (1, 3)]
