"""The grouped computation of experts is the double loop over tokens and choices, with its gradients."""

import pytest
import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from moe_hf.errors import MoEError
from moe_hf.kernels import (
    ChosenProjection,
    LinearMap,
    base_map,
    describe_experts,
    grouped_experts,
    restore,
    run_in_place_of,
    sort_rows,
)
from tests.kernels.experts_modules import LAYOUTS, D, E, make_experts, reference, routed


pytestmark = pytest.mark.numerics


LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    scale = expected.double().norm().item() or 1.0
    return (expected.double() - actual.double()).norm().item() / scale


def outcome(function, experts: nn.Module, tokens, index, weights) -> dict[str, torch.Tensor]:
    """The output and the gradient of everything that has one, of a seeded sum."""
    tokens, weights = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad(set_to_none=True)
    output = function(experts, tokens, index, weights)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (output * direction.to(output.dtype)).sum().backward()
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"output": output.detach(), "tokens": tokens.grad, "weights": weights.grad} | grads


def assert_same(expected: dict, actual: dict, limit: float) -> None:
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        got = actual[name]
        value = torch.zeros_like(got) if value is None else value
        assert relative_error(value, got) <= limit, f"{name}: {relative_error(value, got)} > {limit}"


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_double_loop_and_its_gradients_in_float64(layout, num_tokens):
    experts = make_experts(layout)
    # Expert 2 gets no token.
    inputs = routed(num_tokens, experts=[0, 1, 3, 4, 5])
    assert_same(
        outcome(reference, experts, *inputs), outcome(grouped_experts, experts, *inputs), LIMITS[torch.float64]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["gated", "plain_biased", "transposed", "normed"])
def test_other_dtypes_are_as_close_as_their_rounding(layout, dtype):
    experts = make_experts(layout, dtype)
    inputs = routed(30, dtype=dtype, experts=[0, 1, 3, 4])
    exact = outcome(reference, experts.double(), *(x.double() if x.is_floating_point() else x for x in inputs))
    actual = outcome(grouped_experts, experts.to(dtype), *inputs)
    assert actual["output"].dtype == dtype
    assert_same(exact, actual, LIMITS[dtype])


@pytest.mark.parametrize("layout", ["gated", "interleaved"])
def test_gradients_equal_finite_differences(layout):
    experts = make_experts(layout)
    tokens, index, weights = routed(3)
    names, parameters = zip(*experts.named_parameters(), strict=True)

    def function(tokens, weights, *values):
        with torch.nn.utils.stateless._reparametrize_module(experts, dict(zip(names, values, strict=True))):
            return grouped_experts(experts, tokens, index, weights)

    inputs = (tokens.requires_grad_(), weights.requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", ["gated", "interleaved", "normed"])
def test_chosen_experts_use_their_own_parameters_and_only_these_train(layout):
    chosen, experts, tuned = [4, 1], make_experts(layout), make_experts(layout)
    tokens, index, weights = routed(40)
    description = describe_experts(experts)
    generator = torch.Generator().manual_seed(3)
    small = {}
    with torch.no_grad():
        for name in (description.first, description.second):
            weight = getattr(tuned, name)
            small[name] = torch.randn(2, *weight.shape[1:], generator=generator, dtype=torch.float64) * 0.2
            weight[chosen] = small[name]
    small = {name: nn.Parameter(value) for name, value in small.items()}
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_("norm" in name)

    def with_chosen(experts, tokens, index, weights):
        maps = []
        for name in (description.first, description.second):
            base = base_map(experts, description, name)
            own = small[name].transpose(1, 2) if description.transposed else small[name]
            maps.append(LinearMap(ChosenProjection(), (base.tensors[0], own), base.bias))
        return grouped_experts(experts, tokens, index, weights, first=maps[0], second=maps[1], last=chosen)

    actual = outcome(with_chosen, experts, tokens, index, weights)
    expected = outcome(reference, tuned, tokens, index, weights)
    for name in ("output", "tokens", "weights"):
        assert relative_error(expected[name], actual[name]) <= 1e-13
    for name, value in small.items():
        assert relative_error(expected[name][chosen], value.grad) <= 1e-13
        assert actual[name] is None


def test_a_chosen_expert_without_tokens_gets_a_zero_gradient():
    experts = make_experts("gated").requires_grad_(False)
    tokens, index, weights = routed(12, experts=[0, 1, 2])
    small = [nn.Parameter(getattr(experts, name)[[5, 1]]) for name in ("gate_up_proj", "down_proj")]
    maps = [
        LinearMap(ChosenProjection(), (getattr(experts, name), value))
        for name, value in zip(("gate_up_proj", "down_proj"), small, strict=True)
    ]
    grouped_experts(experts, tokens, index, weights, first=maps[0], second=maps[1], last=[5, 1]).sum().backward()
    for value in small:
        assert value.grad[0].count_nonzero() == 0 and value.grad[1].count_nonzero() > 0


def test_frozen_experts_keep_only_inputs_and_outputs_of_the_first_map():
    experts, (tokens, index, weights) = make_experts("gated").requires_grad_(False), routed(32)
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_experts(experts, tokens.requires_grad_(), index, weights)
    rows = index.numel()
    activations = [tuple(t.shape) for t in saved if t.shape[0] in (32, rows)]
    assert sorted(activations) == sorted([(32, D), (rows, 2 * 40), (rows,)])


@pytest.mark.parametrize("layout", ["gated", "biased", "normed"])
def test_ids_of_experts_elsewhere_add_nothing(layout):
    experts = make_experts(layout)
    experts._is_expert_parallel = True
    # Ids of E and above stand for experts of other ranks, of any number.
    inputs = routed(20, num_choices=3, experts=[0, 2, 3, 4, E, E + 4])
    assert_same(outcome(reference, experts, *inputs), outcome(grouped_experts, experts, *inputs), 1e-13)


def test_a_batch_in_which_every_expert_is_elsewhere_gives_zeros():
    experts = make_experts("gated")
    experts._is_expert_parallel = True
    tokens, index, weights = routed(5, experts=[E, E + 1])
    result = outcome(grouped_experts, experts, tokens, index, weights)
    assert all(value.count_nonzero() == 0 for value in result.values())


def test_rows_are_sorted_by_expert_and_combine_is_the_transpose_of_gather():
    tokens, index, _ = routed(17, num_choices=3)
    rows = sort_rows(index, E, last=[3, 0])
    experts = index.flatten()[rows.order].tolist()
    assert experts == sorted(experts, key=rows.groups.index) and rows.groups == (1, 2, 4, 5, 3, 0)
    assert [expert for expert, start, end in rows.slices() for _ in range(start, end)] == experts
    values = torch.randn(rows.order.numel(), D, dtype=torch.float64)
    torch.testing.assert_close((rows.gather(tokens) * values).sum(), (tokens * rows.combine(values)).sum())


def test_a_module_runs_another_computation_until_it_is_restored():
    experts = make_experts("gated")
    tokens, index, weights = routed(4)
    before = experts(tokens, index, weights)
    run_in_place_of(experts, doubled)
    torch.testing.assert_close(experts(tokens, index, weights), 2 * before)
    restore(experts)
    assert torch.equal(experts(tokens, index, weights), before)


def doubled(experts, tokens, index, weights):
    return 2 * grouped_experts(experts, tokens, index, weights)


def test_other_modules_are_refused():
    with pytest.raises(MoEError, match="not an experts module"):
        describe_experts(nn.ModuleList([nn.Linear(3, 3)]))
    quantized = make_experts("gated")
    quantized.down_proj = nn.Parameter(quantized.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(MoEError, match="Quantized"):
        describe_experts(quantized)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["gated", "interleaved"])
def test_on_cuda_grouped_kernels_give_the_same(layout, dtype, monkeypatch):
    experts = make_experts(layout, dtype)
    inputs = routed(64, dtype=dtype, experts=[0, 1, 3, 5])
    exact = outcome(reference, experts.double(), *(x.double() if x.is_floating_point() else x for x in inputs))
    experts = experts.to(dtype).cuda()
    calls, grouped_mm = [], torch.nn.functional.grouped_mm

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    actual = outcome(grouped_experts, experts, *(x.cuda() for x in inputs))
    assert len(calls) == 6, "two maps, the gradients of their inputs and of their weights"
    assert_same(exact, {name: value.cpu() for name, value in actual.items()}, LIMITS[dtype])
    if dtype == torch.bfloat16:
        with torch.no_grad():
            peer = grouped_mm_experts_forward(experts, *(x.cuda() for x in inputs))
        assert relative_error(peer.cpu(), actual["output"].cpu()) <= LIMITS[dtype]
