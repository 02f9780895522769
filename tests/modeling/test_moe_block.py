"""The block against a double loop in float64, its routing contract, and its place in a model."""

import pytest
import torch
from torch.autograd import gradcheck

from moe_hf import MoEConfig, MoEError, register_router
from moe_hf.modeling.routers import ROUTERS
from moe_hf.modeling.routing import Routing
from tests.modeling.reference import KINDS, in_float64, make_block, reference_moe
from tests.tiny_models import tiny_config


pytestmark = pytest.mark.numerics


IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_tokens", [1, 7, 64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_experts_implementation_equals_the_double_loop(kind, implementation, num_tokens):
    block = make_block(kind)
    block.gate.config._experts_implementation_internal = implementation
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(num_tokens, 48, generator=generator)
    # One direction that all tokens share and the last expert dislikes: it gets none.
    tokens[:, 0] = 3.0
    with torch.no_grad():
        block.gate.weight[-1, 0] = -50.0
    upstream = torch.randn(num_tokens, 48, generator=generator)

    truth = in_float64(block)
    wide_tokens = tokens.double().requires_grad_()
    expected = reference_moe(truth, wide_tokens)
    (expected * upstream.double()).sum().backward()

    tokens.requires_grad_()
    actual = block(tokens[None])[0]
    (actual * upstream).sum().backward()

    assert relative(actual, expected) <= 1e-5
    assert relative(tokens.grad, wide_tokens.grad) <= 1e-5
    for (name, parameter), true in zip(block.named_parameters(), truth.parameters(), strict=True):
        if name.startswith("experts"):
            assert parameter.grad[-1].abs().sum() == 0, f"{name} of the expert without tokens"
        if true.grad.norm() > 1e-12:
            assert relative(parameter.grad, true.grad) <= 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_block_are_those_of_finite_differences(kind):
    block = make_block(kind, num_experts=3).double()
    tokens = torch.randn(1, 3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits = tokens[0] @ block.gate.weight.T
    top = logits.sort(-1, descending=True).values
    assert (top[:, 1] - top[:, 2]).min() > 1e-2, "a tie would make the function discontinuous"
    assert gradcheck(lambda x: block(x), tokens.requires_grad_(), eps=1e-6, atol=1e-6)


def test_router_computes_in_float32_under_autocast_and_in_a_bfloat16_model():
    block = make_block("gated")
    tokens = torch.randn(16, 48)
    expected = block.gate(tokens)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, weights, _ = block.gate(tokens)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(logits, expected)
    low = block.bfloat16()
    logits, weights, _ = low.gate(tokens.bfloat16())
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.allclose(weights.sum(-1), torch.ones(16), atol=1e-6)
    assert low(tokens.bfloat16()[None]).dtype == torch.bfloat16


def test_jitter_changes_the_routers_input_and_not_the_experts():
    block = make_block("gated", router_jitter_noise=0.5, num_experts=1, num_experts_per_tok=1)
    tokens = torch.randn(1, 6, 48)
    quiet = block.eval()(tokens)
    kept = tokens.clone()
    noisy = block.train()(tokens)
    # One expert of weight 1: the logits moved, and the output must not.
    assert torch.equal(quiet, noisy)
    assert torch.equal(tokens, kept)
    assert not torch.equal(block.gate(tokens[0])[0], block.eval().gate(tokens[0])[0])


def test_sigmoid_scores_are_normalised_and_scaled():
    block = make_block("gated", scoring_func="sigmoid", routed_scaling_factor=2.5)
    logits, weights, index = block.gate(torch.randn(9, 48))
    scores = logits.sigmoid().gather(-1, index)
    assert torch.allclose(weights, 2.5 * scores / scores.sum(-1, keepdim=True))


def test_unnormalised_weights_are_the_probabilities_themselves():
    block = make_block("gated", norm_topk_prob=False)
    logits, weights, index = block.gate(torch.randn(9, 48))
    assert torch.equal(weights, logits.softmax(-1).gather(-1, index))


def test_shared_expert_adds_its_gated_output():
    block = make_block("plain_biased", shared_expert_intermediate_size=24, shared_expert_gate=True)
    tokens = torch.randn(1, 5, 48)
    shared = block.shared_expert(tokens) * block.shared_expert_gate(tokens).sigmoid()
    with_shared = block.eval()(tokens)
    block.shared_expert = None
    assert torch.allclose(with_shared, block(tokens) + shared, atol=1e-6)


@pytest.fixture
def every_other_router():
    """A router of ours: tokens at even places use experts 0 and 1, the others expert 2 alone, as flat rows."""

    def route(router_logits, context):
        token = torch.arange(router_logits.shape[0])
        even = token[token % 2 == 0]
        rows = torch.cat([even, even, token[token % 2 == 1]])
        expert = torch.cat([torch.zeros_like(even), torch.ones_like(even), 2 + 0 * token[token % 2 == 1]])
        weights = router_logits.softmax(-1)[rows, expert]
        return Routing(expert[:, None], weights[:, None], token_index=rows, stats={"rows": torch.tensor(len(rows))})

    register_router("every_other", route, arguments=("unused",))
    yield
    del ROUTERS["every_other"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_router_with_a_varying_number_of_experts_per_token(every_other_router, implementation):
    block = make_block("gated", router_type="every_other").eval()
    block.gate.config._experts_implementation_internal = implementation
    tokens = torch.randn(1, 5, 48)
    logits = block.gate(tokens[0])[0].softmax(-1)
    output = block(tokens)[0]
    for place in range(5):
        used = [0, 1] if place % 2 == 0 else [2]
        index = torch.tensor([used])
        expected = block.experts(tokens[0, place : place + 1], index, logits[place, used][None])
        assert torch.allclose(output[place], expected[0], atol=1e-5)


def test_a_router_name_is_taken_once_and_its_arguments_are_checked(every_other_router):
    with pytest.raises(MoEError, match="already registered"):
        register_router("every_other", ROUTERS["top_k"].function)
    with pytest.raises(MoEError, match="router_kwargs has .*'tempo'.* reads"):
        make_block("gated", router_type="every_other", router_kwargs={"tempo": 1})
    with pytest.raises(MoEError, match="router_type is 'topk'; it must be one of .*top_k"):
        make_block("gated", router_type="topk")


BAD_CONFIGS = {
    "k_above_E": ({"num_experts": 4, "num_experts_per_tok": 5}, "between 1 and num_experts = 4"),
    "k_zero": ({"num_experts_per_tok": 0}, "between 1 and"),
    "no_experts": ({"num_experts": 0}, "at least 1"),
    "k1_normalised": ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "never learns"),
    "scoring": ({"scoring_func": "tanh"}, "softmax"),
    "scaling": ({"routed_scaling_factor": float("inf")}, "finite"),
    "jitter": ({"router_jitter_noise": 1.0}, r"\[0, 1\)"),
    "aux_nan": ({"router_aux_loss_coef": float("nan")}, "finite"),
    "z_negative": ({"router_z_loss_coef": -1.0}, "at least 0"),
    "width": ({"moe_intermediate_size": 0}, "at least 1"),
    "shared_negative": ({"shared_expert_intermediate_size": -1}, "at least 0"),
    "gate_alone": ({"shared_expert_gate": True}, "needs a shared expert"),
    "first_k": ({"first_k_dense_replace": 3}, "none of the 3 layers"),
    "step_zero": ({"decoder_sparse_step": 0}, "at least 1"),
    "layers_outside": ({"mlp_only_layers": [3]}, "layers 0 to 2"),
    "type": ({"num_experts": "8"}, "num_experts"),
    "typo": ({"num_expert_per_tok": 2}, "nearest is 'num_experts_per_tok'"),
    "format": ({"format_version": 99}, "upgrade"),
    "no_text_config": ({"text_config": None}, "needs text_config"),
    "untyped_text_config": ({"text_config": {"hidden_size": 8}}, "model_type"),
    "remote_text_config": ({"text_config": {"model_type": "llama", "auto_map": {}}}, "remote code"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_gives_one_clear_error(case):
    fields, message = BAD_CONFIGS[case]
    with pytest.raises(MoEError, match=message):
        MoEConfig(**{"text_config": tiny_config("llama"), **fields})


def test_config_answers_for_the_dense_fields_and_writes_them_through():
    config = MoEConfig(text_config=tiny_config("gpt2"))
    assert config.hidden_size == config.text_config.n_embd == 48
    config.vocab_size = 200
    assert config.text_config.vocab_size == 200
    assert config.get_text_config() is config
    assert MoEConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.to_diff_dict()["text_config"] == config.to_dict()["text_config"]
    assert not hasattr(config, "no_such_field")
