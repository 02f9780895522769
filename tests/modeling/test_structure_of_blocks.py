"""What a MoE layer is built of: fine segments, shared and residual experts, layers that differ, other kinds of experts.

That every combination is causal, equals a naive float64 reference and so on is in `test_router_properties.py`.
"""

import math

import pytest
import torch

from examples.convolution_expert import CausalConvolution
from moe_hf import MoEConfig, MoEError, MoEForCausalLM, inspect_model, register_expert, upcycle
from moe_hf.finetuning.scopes import scope_parameter_names
from moe_hf.modeling.extra_experts import EXTRA_EXPERTS, ExtraExpert
from moe_hf.modeling.losses import LayerRouting, load_balancing_loss
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.modeling.routing import Routing
from moe_hf.modeling.routing_pass import RoutingPass, routing_pass
from tests.closeness import close
from tests.modeling.isolated import logits_without_moe_hf
from tests.modeling.reference import KINDS, in_float64, make_block, reference_expert, reference_moe
from tests.tiny_models import random_ids, randomise_, tiny_config, tiny_dense


WIDTHS = [88, 40, 64, 24]


def config_of(**fields) -> MoEConfig:
    return MoEConfig(text_config=tiny_config("llama"), **fields)


def model_of(**fields) -> MoEForCausalLM:
    model = MoEForCausalLM(config_of(**fields))
    randomise_(model)
    for block in blocks_of(model):
        block.experts.zero_padding_()
    return model


def blocks_of(model: MoEForCausalLM) -> list[MoEBlock]:
    return [module for module in model.modules() if isinstance(module, MoEBlock)]


def tokens_of(count: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, count, 48, generator=torch.Generator().manual_seed(seed))


# Fine-grained segmentation and shared experts (DeepSeekMoE).


@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_a_wide_shared_expert_is_the_sum_of_its_slices(kind):
    block, tokens = make_block(kind, shared_expert_intermediate_size=64), tokens_of()
    shared = block.shared_expert
    total = torch.zeros_like(tokens)
    for neurons in torch.arange(64).split(16):
        hidden = tokens @ shared.up_proj.weight[neurons].T
        gate = None if shared.gate_proj is None else tokens @ shared.gate_proj.weight[neurons].T
        hidden = shared.act_fn(hidden) if gate is None else shared.act_fn(gate) * hidden
        total += hidden @ shared.down_proj.weight[:, neurons].T
    assert torch.allclose(shared(tokens), total, rtol=1e-5, atol=1e-5 * float(total.abs().max()))


def test_finer_segments_cost_the_same_and_can_be_combined_in_more_ways():
    def facts(segments: int):
        with torch.device("meta"):
            fields = {"num_experts": 4 * segments, "num_experts_per_tok": 2 * segments}
            return inspect_model(MoEForCausalLM(config_of(**fields, moe_intermediate_size=80 // segments)))

    routers = {m: 3 * 48 * 4 * m for m in (1, 2, 5)}
    assert len({facts(m).active_parameters - routers[m] for m in routers}) == 1
    assert len({facts(m).total_parameters - routers[m] for m in routers}) == 1
    # DeepSeekMoE, section 3.1: 16 experts of which 2 are used, and each of them in 4 segments.
    assert (math.comb(16, 2), math.comb(64, 8)) == (120, 4_426_165_368)


def test_without_routed_output_the_shared_expert_is_left():
    block, tokens = make_block("gated", shared_expert_intermediate_size=64), tokens_of()
    block.experts.down_proj.data.zero_()
    assert torch.equal(block(tokens), block.shared_expert(tokens))


# Residual MoE: a dense MLP beside the experts (DeepSpeed-MoE).


def test_coefficients_of_zeros_are_a_half_each():
    fields = {"shared_expert_intermediate_size": 88, "num_experts_per_tok": 1}
    block, tokens = make_block("gated", shared_expert_gate="softmax", **fields), tokens_of()
    for parameter in block.shared_expert_gate.parameters():
        parameter.data.zero_()
    gate, block.shared_expert_gate = block.shared_expert_gate, None
    added = block(tokens)
    block.shared_expert_gate = gate
    assert torch.allclose(block(tokens), 0.5 * added, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("gate", [False, True, "softmax"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_a_residual_mlp_upcycles_exactly(gate, share):
    dense = tiny_dense("gpt2")
    moe = upcycle(dense, shared_expert_intermediate_size=88, shared_expert_gate=gate, shared_share=share)
    ids = random_ids()
    with torch.no_grad():
        expected = dense(ids).logits
        assert float((moe(ids).logits - expected).norm() / expected.norm()) <= 1e-5


def test_experts_without_output_leave_the_dense_mlp_even_with_one_per_token():
    dense = tiny_dense("llama")
    fields = {"shared_expert_intermediate_size": 88, "num_experts_per_tok": 1}
    moe = upcycle(dense, **fields, shared_share=0.5, allow_inexact=True)
    for block in blocks_of(moe):
        block.experts.down_proj.data.zero_()
        block.shared_expert.down_proj.weight.data.mul_(2)
    with torch.no_grad():
        assert torch.allclose(moe(random_ids()).logits, dense(random_ids()).logits, atol=1e-4)


# Pyramid: as many experts per layer as a list says.


def test_layers_have_as_many_experts_as_the_list_says():
    model = model_of(num_experts=8, num_experts_per_layer=[4, 0, 8], balance_strategy="bias").train()
    assert [block.gate.layer_index for block in blocks_of(model)] == [0, 2]
    assert [len(block.experts.down_proj) for block in blocks_of(model)] == [4, 8]
    assert [len(block.gate.e_score_correction_bias) for block in blocks_of(model)] == [4, 8]
    output = model(random_ids(), labels=random_ids(), output_router_logits=True)
    assert [logits.shape[-1] for logits in output.router_logits] == [4, 8]
    # The mean over layers of losses that are 1 at balance in each.
    assert float(output.router_losses["load_balancing_loss"]) < 2


def test_balance_is_1_in_each_layer_whatever_its_number_of_experts():
    model = model_of(num_experts=8, num_experts_per_layer=[2, 4, 8]).train()
    for block in blocks_of(model):
        block.gate.weight.data.zero_()  # with equal scores it does not matter who is chosen
    losses = model(random_ids(), output_router_logits=True).router_losses
    assert float(losses["load_balancing_loss"]) == pytest.approx(1)
    # The mean of (ln 2)^2, (ln 4)^2 and (ln 8)^2.
    assert float(losses["router_z_loss"]) == pytest.approx(sum(math.log(e) ** 2 for e in (2, 4, 8)) / 3, rel=1e-5)


def test_capacity_counts_the_experts_of_the_layer():
    fields = {"capacity_factor": 1.0, "min_expert_capacity": 1, "num_experts_per_tok": 1}
    model = model_of(num_experts=8, num_experts_per_layer=[2, 4, 8], **fields).train()
    for block in blocks_of(model):
        block.gate.weight.data.zero_()  # all want the same expert, which has room for 1 / E of them
    stats = model(random_ids(2, 32), output_router_logits=True).router_stats
    assert float(stats["dropped_share"]) == pytest.approx(1 - (1 / 2 + 1 / 4 + 1 / 8) / 3)


def test_a_pyramid_compiles_as_one_graph():
    torch.compiler.reset()
    model = model_of(num_experts=8, num_experts_per_layer=[2, 0, 8]).train()
    model.set_experts_implementation("grouped_mm")
    ids = random_ids(2, 10)
    expected = model(ids, labels=ids)
    actual = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, labels=ids)
    assert torch.allclose(actual.loss, expected.loss, atol=1e-5)


# Experts of different widths in tensors of one shape.


def padding_of(block: MoEBlock):
    """The numbers of every tensor of the experts that belong to neurons which an expert does not have."""
    experts, largest = block.experts, max(WIDTHS)
    for expert, width in enumerate(WIDTHS):
        for name, tensor in experts.named_parameters(recurse=False):
            if name == "down_proj":
                yield tensor[expert, :, width:]
            elif name != "down_proj_bias":
                for start in range(0, tensor.shape[1], largest):
                    yield tensor[expert, start + width : start + largest]


def test_the_padding_starts_at_zero_and_only_the_padding():
    block = blocks_of(MoEForCausalLM(config_of(num_experts=4, expert_intermediate_sizes=WIDTHS)))[0]
    zeros = sum(int((tensor == 0).sum()) for tensor in block.experts.parameters())
    assert zeros == 3 * 48 * sum(88 - width for width in WIDTHS)
    assert all(bool((values == 0).all()) for values in padding_of(block))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_padding_stays_zero_under_adamw(kind, implementation):
    block = make_block(kind, num_experts=4, expert_intermediate_sizes=WIDTHS)
    block.experts.zero_padding_()
    block.gate.config._experts_implementation_internal = implementation
    before = {name: tensor.detach().clone() for name, tensor in block.experts.named_parameters()}
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(5):
        block(tokens_of(32, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool((values == 0).all()) for values in padding_of(block))
    for name, tensor in block.experts.named_parameters():
        assert not torch.equal(tensor, before[name])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_narrow_experts_equal_the_naive_reference_without_padding(kind, implementation):
    block, tokens = make_block(kind, num_experts=4, expert_intermediate_sizes=WIDTHS), tokens_of()[0]
    block.experts.zero_padding_()
    block.gate.config._experts_implementation_internal = implementation
    expected = reference_moe(in_float64(block), tokens.double())
    assert float((block(tokens).double() - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.numerics
def test_equal_widths_are_plain_experts():
    plain = model_of(num_experts=4)
    equal = MoEForCausalLM(config_of(num_experts=4, expert_intermediate_sizes=[88] * 4))
    equal.load_state_dict(plain.state_dict())
    ids = random_ids()
    assert equal.config.moe_intermediate_size == 88
    assert close(equal(ids).logits, plain(ids).logits)


def test_padding_is_counted_as_the_arithmetic_that_it_costs():
    uneven, plain = (model_of(num_experts=4, **fields) for fields in ({"expert_intermediate_sizes": WIDTHS}, {}))
    assert inspect_model(uneven).flops_per_token == inspect_model(plain).flops_per_token


def test_an_activation_that_is_not_zero_at_zero_is_refused():
    dense = tiny_config("nemotron", hidden_act="sigmoid")
    with pytest.raises(MoEError, match="0 at 0"):
        MoEForCausalLM(MoEConfig(text_config=dense, num_experts=4, expert_intermediate_sizes=WIDTHS))


# Zero, copy, constant experts, and one's own.


def block_with(*kinds: str, **fields) -> MoEBlock:
    """A block of one MLP and the extra experts, whose router sends every token to the last of them alone."""
    fields = {"num_experts": 1, "num_experts_per_tok": 1, "routed_scaling_factor": 1.0, **fields}
    block = make_block("gated", extra_experts=list(kinds), **fields)
    block.gate.weight.data.zero_()
    block.gate.weight.data[-1, 0] = 1e4
    return block


def first_channel_positive(tokens: torch.Tensor) -> torch.Tensor:
    tokens = tokens.clone()
    tokens[..., 0] = tokens[..., 0].abs() + 1
    return tokens


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_zero_copy_and_constant_experts_are_what_they_are_called(implementation):
    tokens = first_channel_positive(tokens_of())
    outputs = {}
    for kind in ("zero", "copy", "constant"):
        block = block_with(kind)
        block.gate.config._experts_implementation_internal = implementation
        if kind == "constant":
            block.extra_experts[0].mix_weight.data.zero_()
            value = block.extra_experts[0].value
        outputs[kind] = block(tokens)
    assert torch.equal(outputs["zero"], torch.zeros_like(tokens))
    assert torch.equal(outputs["copy"], tokens)
    assert torch.allclose(outputs["constant"], 0.5 * tokens + 0.5 * value)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_extra_experts_go_beside_every_kind_of_mlp(kind, implementation):
    block, tokens = make_block(kind, num_experts=3, extra_experts=["copy", "zero"]), tokens_of(24)[0]
    block.gate.config._experts_implementation_internal = implementation
    truth, expected = in_float64(block), []
    for token in tokens.double():
        weights, chosen = (truth.gate.weight @ token).softmax(-1).topk(2)
        terms = [token, torch.zeros_like(token)]  # copy and zero
        values = [terms[e - 3] if e >= 3 else reference_expert(truth.experts, e, token) for e in chosen.tolist()]
        expected.append(sum(w * value for w, value in zip(weights / weights.sum(), values, strict=True)))
    expected = torch.stack(expected)
    assert float((block(tokens).double() - expected).norm() / expected.norm()) <= 1e-5


def test_choices_of_extra_experts_run_no_mlp(monkeypatch):
    block, rows = block_with("copy"), []
    apply_gate = block.experts._apply_gate
    monkeypatch.setattr(block.experts, "_apply_gate", lambda hidden: rows.append(len(hidden)) or apply_gate(hidden))
    block(first_channel_positive(tokens_of())).sum().backward()
    assert sum(rows) == 0
    # With many processes each of them must have a gradient to reduce.
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_extra_experts_train_with_the_scope_moe_and_start_finite():
    with torch.device("meta"):
        model = MoEForCausalLM(config_of(num_experts=4, extra_experts=["constant", "causal_convolution"]))
    chosen = set(scope_parameter_names(model, "moe"))
    assert {n for n, _ in model.named_parameters() if ".extra_experts." in n} <= chosen
    model = MoEForCausalLM(config_of(num_experts=4, extra_experts=["constant", "causal_convolution"]))
    for block in blocks_of(model):
        constant, convolution = block.extra_experts
        assert float(constant.value.std()) == pytest.approx(1, abs=0.4)
        assert 0 < float(constant.mix_weight.abs().max()) <= 48**-0.5
        assert float(convolution.weight.std()) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_balance_gives_extra_experts_the_share_that_their_penalty_says(scope):
    # Three routed experts and one extra: with c = 1/2 the extra one should get twice the tokens, 2 of 5.
    fields = {"extra_experts": ["zero"], "num_experts_per_tok": 1, "balance_loss_scope": scope}
    fields["router_loss_kwargs"] = {"extra_expert_penalty": 0.5}
    shares = torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64)

    def loss(counts: list[int]) -> float:
        index = torch.arange(4).repeat_interleave(torch.tensor(counts))[:, None]
        scores = shares.log().expand(len(index), 4)
        routing = Routing(index, torch.ones(index.shape))
        return float(load_balancing_loss(LayerRouting(config_of(num_experts=3, **fields), 0, scores, routing)))

    assert loss([2, 2, 2, 4]) == pytest.approx(1)
    # (3 + 1 / 0.5) * (share of a routed expert * 0.2), or * 0.5 * 0.4 for the extra one: both are 1.
    assert loss([10, 0, 0, 0]) == loss([0, 0, 0, 10]) == pytest.approx(1)
    # Equal scores are not the optimum any more: 5 * (3 * 0.25 + 0.5 * 0.25) / 4 = 1.09375 for equal shares.
    shares = torch.full((4,), 0.25, dtype=torch.float64)
    assert loss([3, 3, 3, 3]) == pytest.approx(1.09375)


def test_a_convolution_keeps_to_its_sequence_and_out_of_the_padding():
    block, tokens = block_with("causal_convolution"), first_channel_positive(tokens_of(8))
    alone = block(tokens[:, 4:])
    documents = torch.tensor([0, 0, 0, 0, 4, 4, 4, 4])
    with routing_pass(RoutingPass(1, 8, document_ids=documents)):
        assert torch.allclose(block(tokens)[:, 4:], alone, atol=1e-6)
    with routing_pass(RoutingPass(1, 8, token_mask=documents > 0)):
        assert torch.allclose(block(tokens)[:, 4:], alone, atol=1e-6)
    assert not torch.allclose(block(tokens)[:, 4:], alone, atol=1e-2)


def test_an_expert_of_ones_own_travels_with_the_model(tmp_path):
    model, ids = model_of(num_experts=4, extra_experts=["causal_convolution", "constant"]).eval(), random_ids(2, 9)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.allclose(logits_without_moe_hf(tmp_path, ids), model(ids).logits, atol=1e-5)


def test_registering_is_refused_twice_and_for_what_is_no_expert():
    with pytest.raises(MoEError, match="already registered"):
        register_expert("causal_convolution", CausalConvolution)
    with pytest.raises(MoEError, match="subclass of ExtraExpert"):
        register_expert("linear", torch.nn.Linear)
    assert "linear" not in EXTRA_EXPERTS
    with pytest.raises(NotImplementedError):
        ExtraExpert(config_of(), 48)(tokens_of()[0], torch.zeros(12))
    with pytest.raises(MoEError, match="trust_remote_code=True"):
        MoEForCausalLM(config_of(extra_experts=["unheard_of"]))


# What does not go together.


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_experts_per_layer": [4, 8]}, "3 decoder layers"),
        ({"num_experts_per_layer": [4, 4, 4]}, "largest must be num_experts"),
        ({"num_experts_per_layer": [1, 4, 8]}, "fewer than num_experts_per_tok"),
        ({"num_experts_per_layer": [4, 4, 8], "mlp_only_layers": [1]}, "give it 0"),
        ({"num_experts_per_layer": [4, 4, 8], "n_group": 2, "topk_group": 1}, "leave one of them out"),
        ({"num_experts_per_layer": [4, 4, 8], "expert_intermediate_sizes": [8] * 8}, "leave one of them out"),
        ({"expert_intermediate_sizes": [8] * 7}, "each of num_experts"),
        ({"expert_intermediate_sizes": [8] * 7 + [0]}, "at least 1"),
        ({"expert_intermediate_sizes": [8] * 8, "moe_intermediate_size": 16}, "leave moe_intermediate_size out"),
        ({"extra_experts": ["copy"], "capacity_factor": 1.0}, "capacity_factor"),
        ({"extra_experts": ["copy"], "router_loss_kwargs": {"extra_expert_penalty": 0}}, "above 0"),
        ({"router_loss_kwargs": {"extra_expert_penalty": 0.5}}, "which no loss"),
        ({"extra_experts": ["copy"], "num_moe_heads": 2}, "num_moe_heads"),
        ({"extra_experts": ["copy"], "n_group": 2, "topk_group": 1}, "n_group"),
        ({"shared_expert_gate": "softmax"}, "needs a shared expert"),
        ({"shared_expert_gate": "tanh", "shared_expert_intermediate_size": 8}, "softmax"),
    ],
)
def test_what_does_not_fit_is_refused(fields, match):
    with pytest.raises(MoEError, match=match):
        config_of(**fields)


@pytest.mark.parametrize("field", ["num_experts_per_layer", "expert_intermediate_sizes", "extra_experts"])
def test_routers_that_do_not_know_uneven_layers_refuse_them(field):
    value = {"num_experts_per_layer": [4, 4, 8], "expert_intermediate_sizes": [8] * 8, "extra_experts": ["copy"]}[
        field
    ]
    fields = {"router_type": "segment_merge", "num_experts_per_tok": 8} if field != "num_experts_per_layer" else {}
    fields = fields or {"router_type": "expert_choice", "allow_noncausal_routing": True}
    with pytest.raises(MoEError, match="has no use for num_experts_per_layer"):
        MoEForCausalLM(config_of(**fields, **{field: value}))


@pytest.mark.parametrize("field", ["expert_intermediate_sizes", "extra_experts"])
def test_experts_that_are_not_the_dense_mlp_are_not_upcycled(field):
    value = {"expert_intermediate_sizes": [88, 8] * 4, "extra_experts": ["zero"]}[field]
    with pytest.raises(MoEError, match="differ from the dense model's"):
        upcycle(tiny_dense("llama"), **{field: value})
