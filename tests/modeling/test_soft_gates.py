"""Dense gates, the margin, Bernoulli gates, and routers that are trained by rewards."""

import itertools
import math

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM
from moe_hf.modeling.losses import LOSSES, LayerRouting, policy_gradient_loss, reward_predictions
from moe_hf.modeling.routing import Routing
from moe_hf.modeling.token_choice import order_log_prob
from tests.modeling.decided import config_of, decided
from tests.modeling.reference import make_block, reference_expert
from tests.modeling.routed import context_of, route
from tests.tiny_models import random_ids, tiny_config


pytestmark = pytest.mark.numerics


DENSE = {"router_type": "dense", "num_experts_per_tok": 4}
MARGIN = {"router_type": "dense_margin", "num_experts_per_tok": 4}
GATES = {"router_type": "bernoulli", "scoring_func": "sigmoid"}
POLICY = {"router_noise": "gumbel", "router_loss_coefs": {"policy_gradient_loss": 1.0}}


def test_a_router_of_zeros_averages_all_experts():
    block, tokens = make_block("gated", num_experts=4, **DENSE), torch.randn(6, 48)
    block.gate.weight.data.zero_()
    means = [sum(reference_expert(block.experts, e, token) for e in range(4)) / 4 for token in tokens]
    assert torch.allclose(block(tokens), torch.stack(means), rtol=1e-5, atol=1e-5)


def test_dense_is_top_k_with_all_experts():
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    every, top = route(logits, **DENSE), route(logits, num_experts_per_tok=4)
    assert torch.allclose(every.top_k_weights.gather(1, top.top_k_index), top.top_k_weights)


def test_experts_that_are_ahead_by_more_than_the_margin_are_left_out_in_training():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    known = {"state": {"gate_total": torch.tensor([10.0, 0.0, 0.0, 0.0])}}
    # The mean of 10 0 0 0 is 2.5, so expert 0 is ahead by 7.5.
    fields = {"known": known, **MARGIN}
    masked = route(logits, training=True, router_kwargs={"margin": 5}, **fields)
    expected = torch.tensor([-math.inf, 0.0, 1.0, -1.0]).softmax(0)
    assert torch.allclose(masked.top_k_weights[0], expected) and float(masked.stats["dropped_share"]) == 0.25
    for free in (
        route(logits, training=True, router_kwargs={"margin": 8}, **fields),
        route(logits, router_kwargs={"margin": 5}, **fields),
    ):
        assert torch.equal(free.top_k_weights, route(logits, **DENSE).top_k_weights)


def test_the_totals_are_mean_weights_added_up_and_hold_every_expert_near_the_mean():
    generator = torch.Generator().manual_seed(0)
    fields = {**MARGIN, "router_kwargs": {"margin": 1.0}}
    spec, context = context_of(torch.zeros(64, 4), training=True, **fields)
    state, free = context.state, torch.zeros(4)
    for step in range(1, 41):
        # An expert that gets most of the weight when it may.
        logits = torch.randn(64, 4, generator=generator) + torch.tensor([3.0, 0.0, 0.0, 0.0])
        context.state.update(state)
        routing = spec.function(logits, context)
        free += logits.softmax(-1).mean(0)
        state = spec.update(state, routing.observed, context.arguments)
        assert float(state["gate_total"].sum()) == pytest.approx(step, rel=1e-5)
        # A step adds at most 1 to an expert that was not ahead by more than the margin.
        assert float((state["gate_total"] - state["gate_total"].mean()).max()) <= 2
    assert float((free - free.mean()).max()) > 10


def test_padding_is_not_in_the_totals():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, True, False, True, False, False])
    padded = route(logits, training=True, known={"token_mask": mask}, **MARGIN).observed
    alone = route(logits[mask], training=True, **MARGIN).observed
    assert all(torch.allclose(padded[name], alone[name]) for name in alone)


def test_gates_open_with_their_probability_and_those_above_a_half_in_evaluation():
    logits = torch.tensor([-2.0, -0.1, 0.0, 0.1, 3.0]).expand(4000, 5)
    torch.manual_seed(0)
    routing = route(logits, training=True, **GATES)
    share = routing.top_k_index.flatten().bincount(minlength=5) / 4000
    p = logits[0].sigmoid()
    assert torch.all((share - p).abs() <= 3 * (p * (1 - p) / 4000).sqrt())
    assert routing.top_k_weights.unique().tolist() == [1.0]
    evaluated = route(logits[:1], **GATES)
    assert evaluated.top_k_index.flatten().tolist() == [3, 4] and evaluated.top_k_weights.unique().tolist() == [1.0]


def test_the_straight_through_gradient_is_that_of_the_probability_for_open_gates():
    logits = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    routing = route(logits, training=True, **GATES)
    upstream = torch.randn(len(routing.token_index), dtype=torch.float64)
    (routing.top_k_weights[:, 0] * upstream).sum().backward()
    p, place = logits.detach().sigmoid(), (routing.token_index, routing.top_k_index[:, 0])
    expected = torch.zeros_like(p).index_put(place, upstream * (p * (1 - p))[place])
    assert torch.allclose(logits.grad, expected, rtol=1e-12)


def test_losses_of_gates():
    # p = .5 .25 and .25 .5 with tau = K / E = 1 / 2: means over tokens .375, over experts .375.
    p = torch.tensor([[0.5, 0.25], [0.25, 0.5]])
    layer = decided(torch.logit(p), num_experts_per_tok=1, **GATES)
    assert float(LOSSES["sparsity_loss"](layer)) == pytest.approx(2 * 0.125**2 + 0.125**2)
    assert float(LOSSES["gate_variance_loss"](layer)) == pytest.approx(-2 * 0.125**2)
    even = decided(torch.zeros(3, 2), num_experts_per_tok=1, **GATES)
    assert float(LOSSES["sparsity_loss"](even)) == 0 and float(LOSSES["gate_variance_loss"](even)) == 0
    masked = decided(
        torch.logit(torch.cat([p, p[:1]])), mask=torch.tensor([True, True, False]), num_experts_per_tok=1, **GATES
    )
    assert float(LOSSES["sparsity_loss"](masked)) == pytest.approx(float(LOSSES["sparsity_loss"](layer)))


def test_the_probability_of_an_order_is_that_of_drawing_without_replacement():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    # ln .5 + ln(.3 / .5)
    assert float(order_log_prob(logits, torch.tensor([[0, 1]]))) == pytest.approx(-1.2039728)
    orders = torch.tensor(list(itertools.permutations(range(3), 2)))
    chances = order_log_prob(logits.expand(6, 3), orders).exp()
    assert float(chances.sum()) == pytest.approx(1)
    # Top-k of logits with gumbel noise draws so.
    torch.manual_seed(1)
    drawn = route(logits.expand(20000, 3), training=True, **POLICY)
    for order, chance in zip(orders, chances, strict=True):
        share = (drawn.top_k_index == order).all(-1).float().mean()
        assert float((share - chance).abs()) <= 3 * math.sqrt(chance * (1 - chance) / 20000)
    assert torch.allclose(drawn.log_prob, order_log_prob(logits.expand(20000, 3), drawn.top_k_index))


def policy_layer(logits: torch.Tensor, index: torch.Tensor, rewards: torch.Tensor) -> LayerRouting:
    routing = Routing(index, torch.ones(index.shape), log_prob=order_log_prob(logits, index))
    return LayerRouting(config_of(logits.shape[-1], **POLICY), 0, logits, routing, rewards=rewards)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_the_expected_policy_gradient_is_that_of_the_expected_reward(shift):
    # p = (.5, .5), r = (1, 0): d E[r] / d l_i = p_i (r_i - E[r]) = (.25, -.25), whatever is added to all rewards.
    total = torch.zeros(2, 2, dtype=torch.float64)
    for choices in itertools.product(range(2), repeat=2):
        logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        index = torch.tensor(choices)[:, None]
        rewards = (index[:, 0] == 0).double() + shift
        policy_gradient_loss(policy_layer(logits, index, rewards)).backward()
        total -= logits.grad / 4
    # The mean over two tokens.
    assert torch.allclose(total, torch.tensor([[0.125, -0.125]] * 2, dtype=torch.float64), atol=1e-12)


def test_a_policy_learns_which_expert_is_rewarded():
    torch.manual_seed(0)
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(100):
        index = torch.multinomial(logits.detach().softmax(0), 32, replacement=True)[:, None]
        rewards = torch.tensor([0.0, 1.0, 0.5])[index[:, 0]] - 7
        optimizer.zero_grad()
        policy_gradient_loss(policy_layer(logits.expand(32, 3), index, rewards)).backward()
        optimizer.step()
    assert float(logits.detach().softmax(0)[1]) > 0.9


def test_rewards_are_the_log_probabilities_of_the_next_tokens():
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[1, 2, -100, 3], [4, -100, 5, 6]])
    layer = decided(torch.zeros(8, 4))
    reward_predictions([layer], logits, labels, None)
    log_probs = logits.log_softmax(-1)
    nan = torch.nan
    expected = [log_probs[0, 0, 2], nan, log_probs[0, 2, 3], nan, nan, log_probs[1, 1, 5], log_probs[1, 2, 6], nan]
    assert torch.allclose(layer.rewards, torch.tensor(expected), equal_nan=True)
    shifted = decided(torch.zeros(16, 4))
    reward_predictions([shifted], logits, None, torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100))
    # A router of sub-tokens has two rows per token.
    assert torch.equal(shifted.rewards[::2].nan_to_num(), layer.rewards.nan_to_num())


@pytest.mark.parametrize("fields", [POLICY, GATES | {"router_loss_coefs": {"policy_gradient_loss": 1.0}}])
def test_a_model_learns_from_rewards_in_training_alone(fields):
    torch.manual_seed(0)
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=4, router_aux_loss_coef=0.0, **fields)
    model, ids = MoEForCausalLM(config), random_ids(2, 12)
    trained = model.train()(ids, labels=ids)
    assert "policy_gradient_loss" in trained.router_losses
    trained.loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("gate.weight"))
    assert "policy_gradient_loss" not in model(ids).router_losses
    evaluated = model.eval()(ids, labels=ids, output_router_logits=True)
    assert "policy_gradient_loss" not in evaluated.router_losses


@pytest.mark.parametrize(
    ("fields", "message"),
    {
        "few": ({"router_type": "dense"}, "num_experts_per_tok"),
        "dense_sigmoid": ({**DENSE, "scoring_func": "sigmoid"}, "softmax"),
        "margin": ({**MARGIN, "router_kwargs": {"margin": -1}}, "at least 0|>= 0"),
        "softmax_gates": ({"router_type": "bernoulli"}, "scoring_func='sigmoid'"),
        "estimator": ({**GATES, "router_kwargs": {"estimator": "guess"}}, "one of"),
        "unrewarded": ({**GATES, "router_kwargs": {"estimator": "reinforce"}}, "never learns"),
        "undrawn": ({"router_loss_coefs": {"policy_gradient_loss": 1.0}}, "drawn choice"),
        "softmax_sparsity": ({"router_loss_coefs": {"sparsity_loss": 1.0}}, "scoring_func='sigmoid'"),
    }.values(),
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(MoEError, match=message):
        MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4, **fields))
