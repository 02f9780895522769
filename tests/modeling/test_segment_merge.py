"""Segment routing with soft merging: what leaks where, what merging means, and what is refused."""

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM
from moe_hf.modeling.experts import Experts
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.modeling.routing_pass import RoutingPass, routing_pass
from tests.modeling.reference import make_block
from tests.tiny_models import random_ids, randomise_, tiny_config


def fields_of(segment_length: int, num_experts: int = 5, **arguments) -> dict:
    return {
        "router_type": "segment_merge",
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts,
        "router_kwargs": {"segment_length": segment_length, **arguments},
    }


def self_routed(segment_length: int) -> dict:
    return fields_of(segment_length, first_segment="self") | {"allow_noncausal_routing": True}


def tokens_of(length: int) -> torch.Tensor:
    return torch.randn(1, length, 48, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(block: MoEBlock, tokens: torch.Tensor) -> torch.Tensor:
    with routing_pass(RoutingPass(*tokens.shape[:2])):
        return block(tokens)


def change(block: MoEBlock, length: int, place: int) -> torch.Tensor:
    """How far the output at each of `length` tokens moves when the one at `place` changes, (length,)."""
    tokens = tokens_of(length)
    changed = tokens.clone()
    changed[0, place] += 1
    return (outputs(block, changed) - outputs(block, tokens))[0].abs().amax(-1)


def test_a_segment_that_decides_for_itself_leaks_and_no_gradient_hides_it():
    assert change(make_block("gated", **self_routed(4)), 8, 3)[:3].min() > 0.1
    assert not change(make_block("gated", **fields_of(4)), 8, 3)[:3].any()


@pytest.mark.parametrize("fields", [fields_of(4), self_routed(4)], ids=["uniform", "self"])
def test_nothing_leaks_back_over_the_border_of_a_segment_and_the_next_one_is_decided(fields):
    moved = change(make_block("gated", **fields), 12, 5)
    assert not moved[:4].any() and (moved[8:] > 0).all()
    # Within a segment that an earlier one decides, other tokens do not matter.
    assert not moved[[4, 6, 7]].any()


def test_a_segment_that_decides_for_itself_gives_the_router_no_gradient():
    for length, learns in ((4, False), (5, True)):
        block = make_block("gated", **self_routed(4))
        with routing_pass(RoutingPass(1, length)):
            block(tokens_of(length)).sum().backward()
        assert bool(block.gate.weight.grad.any()) is learns


def test_a_row_shorter_than_a_segment_is_the_mean_of_the_experts_weights():
    block, tokens = make_block("plain_biased", **fields_of(256)), tokens_of(6)
    experts = block.experts
    hidden = experts.act_fn(tokens @ experts.up_proj.mean(0).T + experts.up_proj_bias.mean(0))
    expected = hidden @ experts.down_proj.mean(0).T + experts.down_proj_bias.mean(0)
    assert torch.allclose(outputs(block, tokens), expected, atol=1e-5)


def test_merging_linear_experts_is_mixing_their_outputs_and_merging_others_is_not():
    block, tokens = make_block("plain", **fields_of(3, num_experts=4)), tokens_of(9)
    with routing_pass(RoutingPass(1, 9)):
        _, weights, index, _, _ = block.gate(tokens[0])
        mixed = Experts.forward(block.experts, tokens[0], index, weights)
    assert not torch.allclose(outputs(block, tokens)[0], mixed, atol=1e-2)
    block.experts.up_proj.data.copy_(block.experts.up_proj.data[:1].expand_as(block.experts.up_proj))
    block.experts.act_fn = torch.nn.Identity()
    with routing_pass(RoutingPass(1, 9)):
        mixed = Experts.forward(block.experts, tokens[0], index, weights)
    assert torch.allclose(outputs(block, tokens)[0], mixed, atol=1e-3)


def test_two_equal_segments_each_keep_their_gradient():
    # A router of zeros gives all segments one mixture; each must still learn from its own tokens.
    block, tokens = make_block("gated", **fields_of(2)), tokens_of(8)
    torch.nn.init.zeros_(block.gate.weight)
    gradients = []
    for keep in range(1, 4):
        block.zero_grad()
        with routing_pass(RoutingPass(1, 8)):
            block(tokens)[0, 2 * keep : 2 * keep + 2].sum().backward()
        gradients.append(block.gate.weight.grad.clone())
    block.zero_grad()
    with routing_pass(RoutingPass(1, 8)):
        block(tokens).sum().backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert torch.allclose(sum(gradients), block.gate.weight.grad, rtol=1e-4, atol=1e-4)


def test_autocast_merges_in_full_precision():
    block, tokens = make_block("gated", **fields_of(3, num_experts=2)), tokens_of(3)
    # Two experts whose large parts cancel when they are merged in equal parts.
    for parameter in block.experts.parameters():
        parameter.data[1] = parameter.data[0] - 200
        parameter.data[0] += 200
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = outputs(block, tokens)
    assert half.dtype == torch.float32
    whole = outputs(block, tokens)
    assert 0 < float((half - whole).norm() / whole.norm()) < 0.02


def test_the_paper_s_first_segment_is_not_causal_and_refuses_to_generate():
    fields = fields_of(4, first_segment="self")
    with pytest.raises(MoEError, match="allow_noncausal_routing=True"):
        MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), **fields))
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), **self_routed(4)))
    randomise_(model)
    with pytest.raises(MoEError, match="cannot generate"):
        model.generate(random_ids(1, 4), use_cache=False)


def test_balance_losses_are_off_and_the_z_loss_is_on():
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), **fields_of(4))).train()
    ids = random_ids(2, 12)
    assert model.config.router_aux_loss_coef == 0
    assert set(model(ids, labels=ids).router_losses) == {"router_z_loss"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_experts_per_tok": 2}, "set num_experts_per_tok to num_experts, 5; it is 2"),
        ({"scoring_func": "sigmoid"}, "scoring_func='softmax'"),
        ({"routed_scaling_factor": 2.0}, "routed_scaling_factor=1"),
        ({"num_moe_heads": 2}, "leave num_moe_heads out"),
        ({"router_aux_loss_coef": 0.01}, "balance losses are constant"),
        ({"router_noise": "gumbel"}, "has no use for router_noise"),
        ({"capacity_factor": 1.0}, "has no use for capacity_factor"),
        ({"balance_strategy": "bias"}, "has no use for balance_strategy"),
        ({"router_kwargs": {"segment_length": 0}}, "must be a whole number >= 1"),
        ({"router_kwargs": {"first_segment": "learned"}}, "must be 'uniform' or 'self'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(more, message):
    with pytest.raises(MoEError, match=message):
        MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), **(fields_of(4) | more)))
