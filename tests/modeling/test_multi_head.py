"""Multi-head MoE: what it computes next to a plain one, and the sizes at which both cost the same."""

import copy

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM
from moe_hf.modeling.multi_head import parity_experts, parity_width
from moe_hf.modeling.routing_pass import RoutingPass, routing_pass
from moe_hf.reporting.routing_statistics import routing_statistics
from tests.closeness import close
from tests.modeling.reference import make_block
from tests.tiny_models import random_ids, tiny_config


pytestmark = pytest.mark.numerics


def test_sizes_of_equal_cost_are_the_golden_ones():
    # SwiGLU: 3 * 2048 - 2 * 768 = 3 F' K'.
    assert parity_width(768, 2048, multi_head_experts=2) == 768
    assert parity_width(768, 2048, multi_head_experts=3) == 512
    # ReLU with F = 4 D: 8 D - 2 D = 2 F', and 8 D E - 2 D = (2 / 3) 3 D E' for 3 heads.
    assert parity_width(512, 2048, gated=False) == 3 * 512
    assert parity_experts(512, 2048, 8, heads=3, multi_head_width=3 * 512, gated=False) == 4 * 8 - 1
    with pytest.raises(MoEError, match="use wider ones"):
        parity_width(768, 200)


@pytest.mark.parametrize("gated", [True, False])
def test_multiplications_and_parameters_are_those_of_the_plain_one(gated):
    hidden, width, heads, matrices = 96, 384, 4, 3 if gated else 2
    narrow = parity_width(hidden, width, 2, multi_head_experts=3, gated=gated, multiple_of=1)
    assert 0 <= narrow - parity_width(hidden, width, 2, multi_head_experts=3, gated=gated) < 8
    plain, multi = matrices * hidden * width * 2, 2 * hidden**2 + heads * 3 * matrices * (hidden // heads) * narrow
    assert 0.99 * plain <= multi <= plain
    experts = parity_experts(hidden, width, 8, heads, narrow, gated=gated)
    plain, multi = matrices * hidden * width * 8, 2 * hidden**2 + experts * matrices * (hidden // heads) * narrow
    assert plain - matrices * (hidden // heads) * narrow < multi <= plain


def with_identities(heads: int):
    """A block whose two projections change nothing."""
    block = make_block("gated", num_moe_heads=heads)
    for projection in (block.multi_head.head_proj, block.multi_head.merge_proj):
        torch.nn.init.eye_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    return block


def test_with_projections_of_identity_it_is_a_plain_moe_over_parts_of_tokens():
    block = with_identities(3)
    plain = copy.deepcopy(block)
    plain.multi_head = None
    plain.gate.config = plain.experts.config = MoEConfig.from_dict(block.gate.config.to_dict() | {"num_moe_heads": 1})
    tokens = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0))
    # The parts of a token stand next to each other, in order.
    parts = torch.stack([part for token in tokens.flatten(0, 1) for part in token.chunk(3)])
    assert close(block(tokens).reshape(-1, 16), plain(parts))


def test_experts_that_change_nothing_leave_the_two_projections():
    block = make_block("plain", num_moe_heads=2, num_experts=4, moe_intermediate_size=24)
    torch.nn.init.zeros_(block.experts.up_proj)
    block.experts.up_proj.data += torch.eye(24)
    torch.nn.init.zeros_(block.experts.down_proj)
    block.experts.down_proj.data += torch.eye(24)
    block.experts.act_fn = torch.nn.Identity()
    tokens = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    expected = block.multi_head.merge_proj(block.multi_head.head_proj(tokens))
    assert torch.allclose(block(tokens), expected, atol=1e-4)


def test_padding_and_documents_reach_every_part_of_a_token():
    block, tokens = with_identities(3), torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0]).bool()
    documents = torch.tensor([0, 0, 1, 1, 4, 5, 5, 5])
    with routing_pass(RoutingPass(2, 4, token_mask=mask, document_ids=documents, record=True)) as current:
        block(tokens)
    (layer,) = current.layers
    assert layer.router_logits.shape == (24, 5)
    assert layer.token_mask.tolist() == [bool(real) for real in mask for _ in range(3)]
    assert layer.sequence_ids.tolist() == [int(document) for document in documents for _ in range(3)]
    assert int(layer.choice_counts().sum()) == 5 * 3 * 2


def tiny_multi_head(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=6, num_moe_heads=2, **fields))


def test_projections_start_as_in_the_paper_s_code_and_experts_are_as_wide_as_a_part():
    block = tiny_multi_head().base_model.layers[1].mlp
    assert tuple(block.experts.gate_up_proj.shape) == (6, 2 * 88, 24) and tuple(block.gate.weight.shape) == (6, 24)
    # Xavier's uniform bound is gain * sqrt(6 / (fan_in + fan_out)).
    bound = (6 / 96) ** 0.5
    assert 0.95 * bound / 2**0.5 < float(block.multi_head.head_proj.weight.detach().abs().max()) <= bound / 2**0.5
    assert 0.95 * bound < float(block.multi_head.merge_proj.weight.detach().abs().max()) <= bound
    assert not block.multi_head.head_proj.bias.any() and not block.multi_head.merge_proj.bias.any()


def test_counts_of_choices_leave_padding_out():
    model, ids = tiny_multi_head().eval(), random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    layers = routing_statistics(model, [{"input_ids": ids, "attention_mask": mask}]).layers
    assert [int(layer.choices.sum()) for layer in layers] == [13 * 2 * 2] * 3


def test_widths_that_do_not_divide_and_dense_sources_are_refused():
    with pytest.raises(MoEError, match="num_moe_heads is 5; it must divide the model's width, 48"):
        MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_moe_heads=5))
    with pytest.raises(MoEError, match="num_moe_heads is 0; it must be at least 1"):
        MoEConfig(text_config=tiny_config("llama"), num_moe_heads=0)
