"""Each router loss by itself: known values, balance and collapse, and loops in float64 with their gradients."""

import math

import pytest
import torch

from moe_hf import MoEError
from moe_hf.modeling.config_checks import FURTHER_LOSSES
from moe_hf.modeling.losses import (
    LOSSES,
    LayerRouting,
    chance_of_choice,
    device_balance_loss,
    global_entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    local_entropy_loss,
    router_z_loss,
    squared_variation,
)
from moe_hf.modeling.router_noise import draw_noise
from moe_hf.modeling.routing import RouterNoise
from tests.modeling.decided import config_of, decided


pytestmark = pytest.mark.numerics


# Fields that each loss needs besides the number of experts, here 8 with 2 per token.
FIELDS = {
    "load_balancing_loss": {},
    "router_z_loss": {},
    "importance_loss": {},
    "importance_loss_vmoe": {
        "router_loss_coefs": {"importance_loss": 1.0},
        "router_loss_kwargs": {"load_estimator": "vmoe"},
    },
    "load_loss": {"router_noise": "gaussian", "router_loss_coefs": {"load_loss": 1.0}},
    "load_loss_vmoe": {
        "router_noise": "gaussian",
        "router_loss_coefs": {"load_loss": 1.0},
        "router_loss_kwargs": {"load_estimator": "vmoe"},
    },
    "local_entropy_loss": {},
    "global_entropy_loss": {},
    "device_balance_loss": {
        "router_loss_coefs": {"device_balance_loss": 1.0},
        "router_loss_kwargs": {"num_device_groups": 4},
    },
}


def loss_named(name: str):
    return LOSSES[name.removesuffix("_vmoe")]


def noise_of(logits: torch.Tensor, scale: float, std: float = 1.0) -> RouterNoise:
    sample = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7), dtype=logits.dtype)
    return RouterNoise(logits=logits.detach() + scale * sample, std=torch.full_like(logits, std))


# Known values, each derived in its comment.


def test_squared_variation_is_of_the_population():
    # (3, 1): mean 2, deviations 1, var / mean^2 = 1 / 4; the sample's variance would give 1 / 2.
    assert float(squared_variation(torch.tensor([3.0, 1.0]))) == pytest.approx(0.25, rel=1e-6)
    # (4, 0, 0, 0): E - 1.
    assert float(squared_variation(torch.tensor([4.0, 0, 0, 0]))) == pytest.approx(3.0, rel=1e-6)
    assert float(squared_variation(torch.full((4,), 0.7))) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Thresholds 0 for the chosen expert, the second best, and 1 for the others: Phi(1), Phi(-1), Phi(-2).
        ("shazeer", (0.841345, 0.158655, 0.022750)),
        # The threshold is the best for all: Phi(0), Phi(-1), Phi(-2).
        ("vmoe", (0.5, 0.158655, 0.022750)),
    ],
)
def test_chance_of_choice_compares_with_the_right_threshold(estimator, expected):
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    layer = decided(
        logits,
        noise=RouterNoise(logits, torch.tensor(1.0)),
        num_experts_per_tok=1,
        router_noise="gaussian",
        router_loss_coefs={"load_loss": 1.0},
        router_loss_kwargs={"load_estimator": estimator},
    )
    assert chance_of_choice(layer)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_learned_noise_starts_with_softplus_of_zero():
    # ln 2 + 0.01.
    config = config_of(4, router_noise="learned", router_noise_affects="both")
    noise = draw_noise(torch.zeros(2, 4), config, torch.ones(2, 3), {"noise_weight": torch.zeros(4, 3)})
    assert noise.std.flatten().tolist() == pytest.approx([0.7031472] * 8, abs=1e-7)


def test_load_balancing_loss_of_switch_and_one_below_balance():
    # f = (.75, .25), P = (.690399, .309601): 2 (.517799 + .077400).
    layer = decided([[2.0, 0.0]] * 3 + [[0.0, 2.0]], num_experts_per_tok=1)
    assert float(load_balancing_loss(layer)) == pytest.approx(1.190398, abs=1e-6)
    # P = (.3825, .6175), f = (.75, .25): 2 (.286875 + .154375): balance is no lower bound.
    scores = torch.tensor([[0.51, 0.49]] * 3 + [[0.0, 1.0]])
    layer = decided(scores.log().clamp_min(-1e4), num_experts_per_tok=1)
    assert float(load_balancing_loss(layer)) == pytest.approx(0.8825, abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "expected"),
    # (ln 4)^2; (ln 8)^2; ln(3 + 1)^2.
    [([0.0] * 4, 1.921812), ([0.0] * 8, 4.324077), ([math.log(3), 0.0], 1.921812)],
)
def test_z_loss_values(logits, expected):
    logits = torch.tensor([logits] * 3, requires_grad=True)
    loss = router_z_loss(decided(logits, num_experts_per_tok=1))
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    # It pins the logsumexp, not the logits: shifted by it, the loss is 0.
    shifted = logits.detach() - logits.detach().logsumexp(-1, keepdim=True)
    assert float(router_z_loss(decided(shifted, num_experts_per_tok=1))) == pytest.approx(0, abs=1e-12)
    loss.backward()
    if logits.shape[1] == 4:
        # 2 ln(4) / 4 for each logit of a token; the loss is the mean over 3 tokens.
        assert (3 * logits.grad).flatten().tolist() == pytest.approx([0.6931472] * 12, abs=1e-6)


def test_z_loss_of_padding_is_not_that_of_zero_logits():
    # Real tokens have logsumexp 0; half of the tokens are padding, which as zeros would add (ln 8)^2 / 2 = 2.162039.
    logits = torch.full((6, 8), -math.log(8))
    logits[3:] = 0
    mask = torch.arange(6) < 3
    assert float(router_z_loss(decided(logits, mask=mask))) == pytest.approx(0, abs=1e-12)
    assert float(router_z_loss(decided(logits))) == pytest.approx(2.162039, abs=1e-6)


def test_z_loss_of_sigmoid_scores_is_the_mean_square_of_the_logits():
    logits = torch.tensor([[1.0, -2.0, 0.0, 3.0]])
    layer = decided(logits, scoring_func="sigmoid")
    assert float(router_z_loss(layer)) == pytest.approx(14 / 4, rel=1e-6)
    assert float(router_z_loss(decided(0 * logits, scoring_func="sigmoid"))) == 0


def test_sequence_loss_of_deepseek_v3():
    sequence = {"balance_loss_scope": "sequence"}
    index = torch.tensor([[0, 1]] * 4)
    # f = E / (K T) * counts = (2, 2, 0, 0): 2 * .4 + 2 * .4.
    skewed = torch.tensor([[0.4, 0.4, 0.1, 0.1]] * 4).log()
    assert float(load_balancing_loss(decided(skewed, index=index, **sequence))) == pytest.approx(1.6, abs=1e-6)
    # Whatever f is, equal scores make it 1.
    assert float(load_balancing_loss(decided(0 * skewed, index=index, **sequence))) == pytest.approx(1, abs=1e-6)


def test_two_collapsed_sequences_are_balanced_for_the_batch_only():
    # One sequence uses expert 0 alone, the other expert 1 alone.
    logits = torch.tensor([[50.0, 0.0]] * 3 + [[0.0, 50.0]] * 3)
    ids = torch.tensor([0] * 3 + [3] * 3)
    values = {
        scope: float(
            load_balancing_loss(decided(logits, sequence_ids=ids, num_experts_per_tok=1, balance_loss_scope=scope))
        )
        for scope in ("micro_batch", "sequence")
    }
    assert values == pytest.approx({"micro_batch": 1.0, "sequence": 2.0}, abs=1e-6)


def test_entropies_of_limoe():
    # Of .9 and .1: -.9 ln .9 - .1 ln .1 = .325083; of their mean, one half each: ln 2.
    apart = decided(torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log())
    alike = decided(torch.tensor([[0.9, 0.1]] * 2).log())
    for layer in (apart, alike):
        assert float(local_entropy_loss(layer)) == pytest.approx(0.325083, abs=1e-6)
    # The threshold is ln 2, which is what the losses without it, -ln 2 and -.325083, lack.
    assert float(global_entropy_loss(apart)) == pytest.approx(0, abs=1e-6)
    assert float(global_entropy_loss(alike)) == pytest.approx(0.368064, abs=1e-6)
    assert float(global_entropy_loss(alike)) - math.log(2) == pytest.approx(-0.325083, abs=1e-6)


def test_entropies_of_dynamic_routing():
    # The rows' entropies, by hand.
    rows = {(0.5, 0.3, 0.1, 0.1): 1.168283, (0.25,) * 4: 1.386294, (0.97, 0.01, 0.01, 0.01): 0.167700}
    for row, expected in rows.items():
        layer = decided(torch.tensor([row]).log())
        assert float(local_entropy_loss(layer)) == pytest.approx(expected, abs=1e-6)


def test_global_entropy_loss_is_satisfied_by_its_least_number_of_experts():
    # Half of the tokens on each of two experts of four: spread over 2, not over 4.
    logits = torch.tensor([[60.0, 0, 0, 0], [0, 60.0, 0, 0]])
    coefs = {"router_loss_coefs": {"global_entropy_loss": 1.0}}
    for least, expected in ((2, 0.0), (4, math.log(2))):
        layer = decided(logits, **coefs, router_loss_kwargs={"global_entropy_min_experts": least})
        assert float(global_entropy_loss(layer)) == pytest.approx(expected, abs=1e-6)


def test_device_loss_lets_experts_of_one_device_differ():
    # Each device's favourite expert takes all of the device's half.
    logits = torch.tensor([[50.0, 0, 0, 0], [0, 0, 50.0, 0]])
    fields = {"router_loss_coefs": {"device_balance_loss": 1.0}, "router_loss_kwargs": {"num_device_groups": 2}}
    layer = decided(logits, num_experts_per_tok=1, **fields)
    assert float(device_balance_loss(layer)) == pytest.approx(1, abs=1e-6)
    assert float(load_balancing_loss(layer)) == pytest.approx(2, abs=1e-6)


# Balance and collapse.

COLLAPSED = {  # for E = 8 experts of which K = 2 take all
    "load_balancing_loss": 8 / 2,
    "router_z_loss": (100 + math.log(2)) ** 2,
    "importance_loss": 8 / 2 - 1,
    "importance_loss_vmoe": 8 / 2 - 1,
    "load_loss": 8 / 2 - 1,
    "load_loss_vmoe": 8 / 2 - 1,
    "local_entropy_loss": math.log(2),
    "global_entropy_loss": math.log(8) - math.log(2),
    "device_balance_loss": 4.0,
}
BALANCED = dict.fromkeys(FIELDS, 0.0) | {"load_balancing_loss": 1.0, "device_balance_loss": 1.0}


@pytest.mark.parametrize("name", FIELDS)
def test_values_at_balance_and_at_collapse(name):
    collapsed = torch.full((16, 8), -100.0)
    collapsed[:, :2] = 100.0
    # The two experts of each token are as likely as each other, and each expert has its turn.
    balanced = torch.full((16, 8), -100.0)
    balanced[torch.arange(16)[:, None], torch.arange(32).view(16, 2) % 8] = 100.0
    noises = (noise_of(logits, 0.1, 0.1) for logits in (collapsed, balanced))
    at_collapse, at_balance = (
        float(loss_named(name)(decided(logits, noise=noise, **FIELDS[name])))
        for logits, noise in zip((collapsed, balanced), noises, strict=True)
    )
    # Which of the two has the lower threshold is the noise's.
    tolerance = 0.1 if name.startswith("load_loss") else 1e-5
    assert at_collapse == pytest.approx(COLLAPSED[name], rel=tolerance)
    if name == "router_z_loss":
        assert at_balance == pytest.approx(COLLAPSED[name], rel=1e-5)
    elif name == "local_entropy_loss":
        assert at_balance == pytest.approx(math.log(2), rel=1e-5)
    else:
        assert at_balance == pytest.approx(BALANCED[name], abs=0.1 if name.startswith("load_loss") else 1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_load_balancing_loss_is_one_at_balance_and_E_over_K_at_collapse(top_k, scoring_func, scope):
    experts, tokens = 8, 16
    fields = {"scoring_func": scoring_func, "balance_loss_scope": scope}
    index = (torch.arange(tokens * top_k) % experts).view(tokens, top_k)
    balanced = load_balancing_loss(decided(torch.zeros(tokens, experts), index=index, **fields))
    assert balanced == pytest.approx(1, abs=1e-6)
    logits = torch.full((tokens, experts), -100.0)
    logits[:, :top_k] = 100.0
    collapsed = load_balancing_loss(decided(logits, num_experts_per_tok=top_k, **fields))
    assert collapsed == pytest.approx(experts / top_k, rel=1e-6)


# Loops in float64. Each takes the logits and the choice, goes through tokens and experts one by one, and stays in the
# graph, so that gradients are compared too.


def loop_scores(row: torch.Tensor, scoring_func: str) -> list[torch.Tensor]:
    raw = [1 / (1 + (-x).exp()) if scoring_func == "sigmoid" else x.exp() for x in row]
    return [x / sum(raw) for x in raw]


def loop_variation(values: list[torch.Tensor]) -> torch.Tensor:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def loop_balance(tokens: list[int], layer: LayerRouting, groups: int) -> torch.Tensor:
    num_experts = layer.router_logits.shape[1]
    counts, scores = [0.0] * groups, [0.0] * groups
    for t in tokens:
        for expert in layer.routing.top_k_index[t].tolist():
            counts[expert * groups // num_experts] += 1
        for expert, score in enumerate(loop_scores(layer.router_logits[t], layer.config.scoring_func)):
            scores[expert * groups // num_experts] += score / len(tokens)
    return groups * sum(c / sum(counts) * s for c, s in zip(counts, scores, strict=True))


def loop_load(tokens: list[int], layer: LayerRouting, estimator: str) -> torch.Tensor:
    load = [0.0] * layer.router_logits.shape[1]
    top_k = layer.config.num_experts_per_tok
    for t in tokens:
        noisy = layer.noise.logits[t].tolist()
        for expert in range(len(load)):
            others = noisy if estimator == "vmoe" else noisy[:expert] + noisy[expert + 1 :]
            threshold = sorted(others, reverse=True)[top_k - 1]
            z = (layer.router_logits[t, expert] - threshold) / layer.noise.std[t, expert]
            load[expert] = load[expert] + 0.5 * (1 + torch.erf(z / 2**0.5))
    return loop_variation(load)


def loop(name: str, layer: LayerRouting, tokens: list[int]) -> torch.Tensor:
    logits, scoring_func = layer.router_logits, layer.config.scoring_func
    rows = {t: loop_scores(logits[t], scoring_func) for t in tokens}
    num_experts = logits.shape[1]
    mean = [sum(rows[t][e] for t in tokens) / len(tokens) for e in range(num_experts)]
    if name == "load_balancing_loss":
        return loop_balance(tokens, layer, num_experts)
    if name == "device_balance_loss":
        return loop_balance(tokens, layer, 4)
    if name == "router_z_loss":
        if scoring_func == "sigmoid":
            return sum(x**2 for t in tokens for x in logits[t]) / len(tokens) / num_experts
        return sum(sum(x.exp() for x in logits[t]).log() ** 2 for t in tokens) / len(tokens)
    if name == "importance_loss_vmoe":
        return loop_variation(mean)
    if name == "importance_loss":
        weights = [0.0] * num_experts
        for t in tokens:
            chosen = layer.routing.top_k_index[t].tolist()
            for expert in chosen:
                weights[expert] += rows[t][expert] / sum(rows[t][e] for e in chosen)
        return loop_variation(weights)
    if name.startswith("load_loss"):
        return loop_load(tokens, layer, "vmoe" if name.endswith("vmoe") else "shazeer")
    if name == "local_entropy_loss":
        return sum(-p * p.log() for t in tokens for p in rows[t]) / len(tokens)
    assert name == "global_entropy_loss"
    return math.log(num_experts) - sum(-p * p.log() for p in mean)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", FIELDS)
def test_each_loss_equals_loops_in_float64_with_gradients_and_ignores_padding(name, scoring_func):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 8, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    fields = FIELDS[name] | {"scoring_func": scoring_func}
    layer = decided(logits, mask=mask, noise=noise_of(logits, 0.5), **fields)
    expected = loop(name, layer, torch.where(mask)[0].tolist())
    actual = loss_named(name)(layer)
    assert actual.dtype == torch.float64
    # The squared variation adds 1e-10 to a squared mean of the scale 1 / E^2.
    assert float(actual.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    (gradient,) = torch.autograd.grad(actual, logits, retain_graph=True)
    (truth,) = torch.autograd.grad(expected, logits)
    assert float((gradient - truth).norm() / truth.norm()) <= 1e-7
    assert torch.all(gradient[~mask] == 0) and torch.all(gradient[mask].abs().sum(-1) > 0)
    moved = torch.where(mask[:, None], logits, 100 * logits)
    again = decided(moved, mask=mask, noise=noise_of(logits, 0.5), **fields)
    assert torch.equal(loss_named(name)(again), actual)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_sequence_loss_is_that_of_each_sequence_weighted_by_tokens(scoring_func):
    logits = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    mask = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    # Sequences of 3, 4, 1 and 1 real tokens, with padding inside: those of one token are left out.
    ids = torch.tensor([0, 0, 0, 0, 4, 4, 4, 4, 4, 9, 9, 11])
    layer = decided(logits, mask=mask, sequence_ids=ids, scoring_func=scoring_func, balance_loss_scope="sequence")
    expected = (3 * loop_balance([0, 1, 2], layer, 8) + 4 * loop_balance([5, 6, 7, 8], layer, 8)) / 7
    actual = load_balancing_loss(layer)
    assert float(actual.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(actual, logits)
    (truth,) = torch.autograd.grad(expected, logits)
    assert float((gradient - truth).norm() / truth.norm()) <= 1e-12


def test_sequences_of_one_token_have_no_sequence_loss():
    # As when decoding.
    layer = decided(torch.randn(3, 4), sequence_ids=torch.arange(3), balance_loss_scope="sequence")
    assert float(load_balancing_loss(layer)) == 0


def test_sequence_loss_beside_a_correction_bias_counts_the_choices_without_it():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    fields = {"scoring_func": "sigmoid", "balance_loss_scope": "sequence"}
    plain = load_balancing_loss(decided(logits, **fields))
    pushed = decided(logits, index=torch.tensor([[2, 3]] * 6), **fields)
    assert float(load_balancing_loss(pushed)) != pytest.approx(float(plain))
    pushed.config.balance_strategy = "bias"
    assert torch.equal(load_balancing_loss(pushed), plain)


def test_global_batch_terms_of_the_parts_add_up_to_the_loss_of_the_whole():
    # f of all tokens, P of each part, weighted by the part's tokens.
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits[:, 0] += 1
    logits.requires_grad_()
    whole = load_balancing_loss(decided(logits))
    counts = decided(logits).choice_counts()
    parts = [
        load_balancing_loss(decided(part, global_counts=counts, balance_loss_scope="global_batch"))
        for part in (logits[:3], logits[3:])
    ]
    together = 0.3 * parts[0] + 0.7 * parts[1]
    assert float(together.detach()) == pytest.approx(float(whole.detach()), rel=1e-12)
    gradient, truth = (torch.autograd.grad(value, logits)[0] for value in (together, whole))
    assert float((gradient - truth).norm() / truth.norm()) <= 1e-12


def test_dropped_choices_count_as_load():
    # A capacity of 1: all but one token lose their choice, and f is what tokens asked for.
    logits = torch.tensor([[5.0, 0, 0, 0]] * 6)
    full = decided(logits, num_experts_per_tok=1, capacity_factor=0.1, min_expert_capacity=1)
    assert full.routing.top_k_weights.count_nonzero() == 1
    assert full.choice_counts().tolist() == [6, 0, 0, 0]


def test_load_has_a_gradient_for_experts_that_were_not_chosen():
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    noise = noise_of(logits, 0.5)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return load_loss(decided(logits, noise=noise, num_experts_per_tok=1, **FIELDS["load_loss"]))

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    chosen = decided(logits, noise=noise, num_experts_per_tok=1, **FIELDS["load_loss"]).routing.top_k_index
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, chosen, False)
    assert torch.all(gradient[others] != 0)
    # The weight of what was chosen says nothing about the others.
    (gradient,) = torch.autograd.grad(importance_loss(decided(logits, norm_topk_prob=False)), logits)
    assert gradient.abs().sum() > 0
    step = torch.zeros_like(logits)
    step[0, int(others[0].nonzero()[0])] = 1e-6
    difference = (loss(logits + step) - loss(logits - step)) / 2e-6
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert float(difference.detach()) == pytest.approx(float((gradient * step).sum() / 1e-6), rel=1e-6)


def test_load_of_all_experts_is_even_and_there_is_none_without_noise():
    logits = torch.randn(6, 4)
    fields = FIELDS["load_loss"] | {"num_experts_per_tok": 4}
    assert float(load_loss(decided(logits, noise=noise_of(logits, 1.0), **fields))) == 0
    assert load_loss(decided(logits, **fields)) is None


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_logits_in_low_precision_give_finite_losses_in_float32(name, dtype):
    logits = torch.randn(6, 8) * (65_000 if dtype == torch.float16 else 70_000) / 4
    logits = logits.to(dtype).requires_grad_()
    layer = decided(logits, noise=noise_of(logits.float(), 1.0), **FIELDS[name])
    loss = loss_named(name)(layer)
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert logits.grad.isfinite().all()


def test_the_table_of_losses_is_what_configurations_may_name():
    assert set(LOSSES) == {"load_balancing_loss", "router_z_loss", *FURTHER_LOSSES}


WRONG = {
    "strategy": ({"balance_strategy": "cv"}, "balance_strategy"),
    "scope": ({"balance_loss_scope": "batch"}, "balance_loss_scope"),
    "rate": ({"bias_update_rate": -1.0}, "bias_update_rate"),
    "both": ({"balance_strategy": "bias", "balance_loss_scope": "global_batch"}, "already"),
    "name": ({"router_loss_coefs": {"importance": 0.1}}, "importance_loss"),
    "negative": ({"router_loss_coefs": {"importance_loss": -0.1}}, "at least 0"),
    "infinite": ({"router_loss_coefs": {"importance_loss": float("inf")}}, "finite"),
    "unread": ({"router_loss_kwargs": {"load_estimator": "vmoe"}}, "load_estimator"),
    "estimator": (
        {"router_loss_coefs": {"importance_loss": 0.1}, "router_loss_kwargs": {"load_estimator": "v"}},
        "vmoe",
    ),
    "noiseless": ({"router_loss_coefs": {"load_loss": 0.1}}, "router_noise"),
    "uniform": ({"router_loss_coefs": {"load_loss": 0.1}, "router_noise": "uniform"}, "router_noise"),
    "still": (
        {"router_loss_coefs": {"load_loss": 0.1}, "router_noise": "gaussian", "router_noise_scale": 0.0},
        "router_noise",
    ),
    "biased_load": (
        {"router_loss_coefs": {"load_loss": 0.1}, "router_noise": "gaussian", "balance_strategy": "bias"},
        "load_loss",
    ),
    "experts": (
        {
            "router_loss_coefs": {"global_entropy_loss": 0.1},
            "router_loss_kwargs": {"global_entropy_min_experts": 9},
        },
        "between 1",
    ),
    "no_devices": ({"router_loss_coefs": {"device_balance_loss": 0.1}}, "num_device_groups"),
    "devices": (
        {"router_loss_coefs": {"device_balance_loss": 0.1}, "router_loss_kwargs": {"num_device_groups": 3}},
        "divide",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_balance_fields_are_refused(case):
    fields, message = WRONG[case]
    with pytest.raises(MoEError, match=message):
        config_of(8, **fields)
