"""The noise family: what is drawn has the distribution that its name says, in training only, and on the right tensor."""

import math

import pytest
import torch

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.modeling.config_checks import ROUTER_NOISES
from moe_hf.modeling.router_noise import NOISES, draw_noise
from tests.closeness import close
from tests.modeling.reference import make_block
from tests.modeling.routed import context_of, route
from tests.tiny_models import random_ids, tiny_config


DRAWS = 100_000


def config_of(name: str, **fields) -> MoEConfig:
    return MoEConfig(text_config=tiny_config("llama"), router_noise=name, router_noise_affects="both", **fields)


def test_the_configuration_knows_every_noise():
    assert set(ROUTER_NOISES) == {"none", *NOISES}


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("name", NOISES)
def test_noise_has_the_mean_and_the_standard_deviation_it_states(name, scale):
    logits, inputs = torch.randn(DRAWS // 4, 4), torch.ones(DRAWS // 4, 3)
    parameters = {"noise_weight": torch.tensor([[0.0, 0, 0], [1, 0, 0], [-3, 0, 0], [0, 2, 0]])}
    noise = draw_noise(logits, config_of(name, num_experts=4, router_noise_scale=scale), inputs, parameters)
    sample = noise.logits - logits
    std = noise.std.expand_as(sample)
    # Gumbel's mean is Euler's constant.
    mean = 0.5772157 * scale if name == "gumbel" else 0.0
    assert torch.allclose(sample.mean(0), torch.full((4,), mean), atol=4 * float(std.max()) / len(sample) ** 0.5)
    assert torch.allclose(sample.std(0), std[0], rtol=0.03)
    expected = {"gaussian": 1 / 4, "uniform": 1 / 3**0.5, "gumbel": math.pi / 6**0.5}
    if name in expected:
        assert float(noise.std) == pytest.approx(scale * expected[name])
    if name == "uniform":
        assert sample.abs().max() <= scale


def test_learned_noise_starts_at_softplus_of_zero_plus_a_hundredth():
    # ln 2 + 0.01.
    noise = draw_noise(
        torch.zeros(1, 4), config_of("learned", num_experts=4), torch.randn(1, 3), {"noise_weight": torch.zeros(4, 3)}
    )
    assert noise.std[0].tolist() == pytest.approx([0.7031472] * 4)


def test_gumbel_noise_draws_experts_from_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(DRAWS, 4)
    index = route(logits, training=True, num_experts_per_tok=1, router_noise="gumbel").top_k_index
    expected = logits[0].softmax(-1) * DRAWS
    chi_square = ((index.flatten().bincount(minlength=4) - expected).square() / expected).sum()
    # The 99.9 % quantile with 3 degrees of freedom.
    assert chi_square < 16.27


def test_learned_noise_on_both_is_the_softmax_over_the_kept_noisy_logits():
    # Shazeer et al., eq. 3-5: Softmax(KeepTopK(x W + N(0, 1) Softplus(x W_noise), K)).
    block = make_block("gated", router_noise="learned", router_noise_affects="both").train()
    tokens = torch.randn(7, 48)
    torch.manual_seed(4)
    _, weights, index = block.gate(tokens)
    torch.manual_seed(4)
    clean, width = tokens @ block.gate.weight.T, tokens @ block.gate.noise_weight.T
    noisy = clean + torch.randn_like(clean) * (torch.nn.functional.softplus(width) + 0.01)
    kept = torch.full_like(noisy, -torch.inf).scatter(1, noisy.topk(2).indices, noisy.topk(2).values)
    assert torch.allclose(weights, kept.softmax(-1).gather(1, index), atol=1e-6)
    assert torch.equal(index, noisy.topk(2).indices)


@pytest.mark.parametrize("name", ["gaussian", "uniform", "gumbel"])
def test_noise_changes_the_choice_alone_or_the_weights_too(name):
    logits = torch.randn(200, 6)
    clean = route(logits)
    for affects in ("selection", "both"):
        spec, context = context_of(
            logits, training=True, router_noise=name, router_noise_scale=4.0, router_noise_affects=affects
        )
        routing = spec.function(logits, context)
        assert not torch.equal(routing.top_k_index, clean.top_k_index)
        scores = (
            (logits if affects == "selection" else context.noise.logits).softmax(-1).gather(1, routing.top_k_index)
        )
        assert torch.allclose(routing.top_k_weights, scores / scores.sum(-1, keepdim=True))


@pytest.mark.numerics
@pytest.mark.parametrize("name", NOISES)
def test_noise_of_scale_zero_and_in_evaluation_is_none(name):
    fields = {"router_noise": name, "router_noise_affects": "both"}
    noisy, silent = make_block("gated", **fields), make_block("gated", **fields, router_noise_scale=0.0)
    silent.load_state_dict(noisy.state_dict())
    plain = make_block("gated")
    plain.load_state_dict(noisy.state_dict(), strict=False)
    tokens = torch.randn(1, 20, 48)
    expected = plain.eval()(tokens)
    assert close(noisy.eval()(tokens), expected)
    assert close(silent.train()(tokens), expected)
    assert not close(noisy.train()(tokens), expected)


def test_jitter_has_mean_one_and_stays_in_its_bounds():
    block = make_block("gated", router_jitter_noise=0.3, num_experts=48).train()
    with torch.no_grad():
        block.gate.weight.copy_(torch.eye(48))
    factors = block.gate(torch.ones(4000, 48))[0].detach()
    assert 0.7 <= factors.min() < 0.71 and 1.29 < factors.max() <= 1.3
    # Uniform in 1 +- .3: standard deviation .3 / sqrt(3).
    assert abs(float(factors.mean()) - 1) <= 3 * 0.3 / 3**0.5 / factors.numel() ** 0.5


def test_noise_reaches_neither_the_raw_logits_nor_the_z_loss():
    torch.manual_seed(0)
    model = MoEForCausalLM(config_of("gumbel", num_experts=4)).train()
    ids = random_ids(2, 8)
    first, second = (model.model.layers[0].mlp.gate(model.model.embed_tokens(ids).flatten(0, 1)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
