"""Adapters of experts compute W + scale * B A on the activations, train, merge, and leave everything else alone."""

import copy

import pytest
import torch
from torch import nn

from moe_hf import MoEError
from moe_hf.finetuning import (
    ExpertLoraConfig,
    add_expert_lora,
    apply_scope,
    lora_adapters,
    lora_projection,
    merge_expert_lora,
    remove_expert_lora,
    unmerge_expert_lora,
)
from tests.closeness import bitwise, close
from tests.kernels.experts_modules import make_experts, reference, routed
from tests.kernels.test_grouped_experts import outcome, relative_error
from tests.tiny_models import random_ids, tiny_native_moe


# PEFT's own call into transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"*.1": 5, "0.4": 1}},
    "chosen": {"experts": {"0": [4, 1]}},
    "down_only": {"target": ("down_proj",)},
    "first_only": {"target": ("gate_up_proj", "up_proj")},
    "dora": {"use_dora": True},
    "dora_chosen_ranks": {
        "use_dora": True,
        "experts": {"0": [5, 0, 2]},
        "rank_pattern": {"*.0": 2},
        "use_rslora": True,
    },
}


class Block(nn.Module):
    """A model of one layer, number 0."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].experts = experts


@torch.no_grad()
def randomise_adapters_(model: nn.Module, seed: int = 5) -> None:
    """B is 0 at first: make each adapter change its expert."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in lora_adapters(model).values():
        for name, parameter in adapter.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if name.endswith("_B"):
                for slot, rank in enumerate(adapter.ranks):
                    parameter[slot, :rank] = 0.3 * noise[slot, :rank]
            elif name.endswith("_magnitude"):
                parameter.mul_(1 + 0.2 * noise)


def adapted(layout: str, options: dict, dtype: torch.dtype = torch.float64):
    experts = make_experts(layout, dtype)
    add_expert_lora(Block(experts), ExpertLoraConfig(r=3, alpha=7.0, **options))
    randomise_adapters_(experts)
    return experts


def adapted_reference(experts, tokens, index, weights):
    """The double loop over tokens and choices with the adapters' definition: plain matrices, one expert at a time."""
    adapter = experts.lora_adapter

    def extra(name, expert, x):
        if expert not in adapter.ids or name not in adapter.targets:
            return 0
        slot = adapter.ids.index(expert)
        rank, config = adapter.ranks[slot], adapter.config
        down = getattr(adapter, f"{name}_A")[slot, :rank]
        up = getattr(adapter, f"{name}_B")[slot, :rank].t()
        weight = getattr(experts, name)[expert]
        weight = weight.t() if experts.is_transposed else weight
        whole = weight + config.alpha / (rank**0.5 if config.use_rslora else rank) * up @ down
        if config.use_dora:
            factor = getattr(adapter, f"{name}_magnitude")[slot] / whole.norm(dim=1).detach()
            whole = factor[:, None] * whole
        return x @ (whole - weight).t()

    return reference(experts, tokens, index, weights, extra)


# Every option on the common layout, the hardest on every layout.
CASES = [(option, "gated") for option in OPTIONS]
CASES += [("dora_chosen_ranks", layout) for layout in ("plain_biased", "interleaved", "normed")]


@pytest.mark.parametrize(("option", "layout"), CASES)
def test_outputs_and_gradients_are_those_of_the_definition(option, layout):
    experts = adapted(layout, OPTIONS[option])
    # Expert 2 gets no token.
    inputs = routed(12, experts=[0, 1, 3, 4, 5])
    expected = outcome(adapted_reference, experts, *inputs)
    actual = outcome(lambda e, *args: e(*args), experts, *inputs)
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None or actual[name].count_nonzero() == 0, name
        else:
            assert relative_error(value, actual[name]) <= 1e-12, name
    trained = {name for name, value in actual.items() if value is not None} - {"output", "tokens", "weights"}
    assert trained == {name for name, _ in experts.named_parameters() if "lora" in name}


@pytest.mark.parametrize("most_columns", [0, 128], ids=["expert by expert", "side by side"])
@pytest.mark.parametrize("option", ["plain", "ranks", "chosen", "dora_chosen_ranks"])
def test_in_16_bits_both_ways_are_the_definition_but_for_rounding(monkeypatch, option, most_columns):
    monkeypatch.setattr(lora_projection, "_MOST_COLUMNS", most_columns)
    experts = adapted("gated", OPTIONS[option], torch.bfloat16)
    tokens, index, weights = routed(40, experts=[0, 1, 3, 4, 5], dtype=torch.bfloat16)
    exact = copy.deepcopy(experts).double()
    expected = outcome(adapted_reference, exact, tokens.double(), index, weights.double())
    actual = outcome(lambda e, *args: e(*args), experts, tokens, index, weights)
    assert {p.dtype for name, p in experts.named_parameters() if "lora" in name} == {torch.float32}
    for name, value in expected.items():
        if value is not None and actual[name] is not None:
            assert relative_error(value, actual[name]) <= 1.2e-2, name
    assert {name for name in actual if "lora" in name and actual[name] is not None}


def test_dropout_drops_inputs_of_adapters_alone_and_only_in_training():
    experts = adapted("gated", {"dropout": 0.5})
    tokens, index, weights = routed(200)
    whole = experts.eval()(tokens, index, weights)
    assert relative_error(adapted_reference(experts, tokens, index, weights), whole) <= 1e-12
    experts.train()
    total = torch.zeros_like(whole)
    torch.manual_seed(0)
    experts.lora_adapter.targets = ("down_proj",)
    expected = adapted_reference(experts, tokens, index, weights)
    for _ in range(200):
        total += experts(tokens, index, weights).detach()
    # Inputs are scaled up by what is dropped: the mean is what evaluation computes.
    assert relative_error(expected, total / 200) <= 0.06
    assert relative_error(expected, experts(tokens, index, weights)) > 0.1


def test_gradients_with_dropout_equal_finite_differences():
    experts = adapted("gated", {"dropout": 0.4, "experts": {"0": [3, 1]}, "use_dora": False})
    tokens, index, weights = routed(3, experts=[1, 3])
    names, parameters = zip(*experts.lora_adapter.named_parameters(), strict=True)

    def function(tokens, weights, *values):
        torch.manual_seed(3)
        with torch.nn.utils.stateless._reparametrize_module(
            experts.lora_adapter, dict(zip(names, values, strict=True))
        ):
            return experts(tokens, index, weights)

    assert torch.autograd.gradcheck(
        function, (tokens.requires_grad_(), weights.requires_grad_(), *parameters), fast_mode=True
    )


def model_with_adapters(family: str = "mixtral", seed: int = 0, dtype: torch.dtype = torch.float32, **options):
    model = add_expert_lora(native(family, seed).to(dtype), ExpertLoraConfig(r=4, alpha=8.0, **options))
    randomise_adapters_(model)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


NATIVE = ["mixtral", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3", "gpt_oss"]


FIELDS = {
    "deepseek_v3": {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_routed_experts": 4},
    "glm4_moe": {"first_k_dense_replace": 1},
}


def native(family: str, seed: int = 0):
    """A native MoE of three layers and 4 experts, of which the first layer is dense where the family has such."""
    return tiny_native_moe(family, seed, **FIELDS.get(family, {}))


@pytest.mark.numerics
@pytest.mark.parametrize("family", NATIVE)
def test_merged_logits_are_equal_and_unmerging_restores_bits(family):
    options = {"experts": {"1": [0, 2], "2": [3]}, "rank_pattern": {"1.2": 7}}
    model = model_with_adapters(family, **options, use_dora=family in ("mixtral", "gpt_oss"))
    ids, plain = random_ids(), native(family)
    before, state = logits(model, ids), copy.deepcopy(plain.state_dict())
    assert relative_error(logits(plain, ids), before) > 1e-3
    merge_expert_lora(model)
    assert relative_error(before, logits(model, ids)) <= 1e-6
    assert model.state_dict().keys() == state.keys()
    unmerge_expert_lora(model)
    for name, value in state.items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert close(logits(model, ids), before)
    merge_expert_lora(model, unload=True)
    assert type(plain).forward is type(model).forward and not lora_adapters(model)
    assert relative_error(before, logits(model, ids)) <= 1e-6


@pytest.mark.numerics
def test_a_fresh_adapter_changes_nothing_and_removing_it_restores_the_model():
    model, ids = tiny_native_moe(), random_ids()
    before = logits(model, ids)
    add_expert_lora(model, ExpertLoraConfig(use_dora=True))
    assert relative_error(before, logits(model, ids)) <= 1e-6
    remove_expert_lora(model)
    assert close(logits(model, ids), before) and bitwise(model.state_dict(), tiny_native_moe().state_dict())


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_and_accumulation_give_the_same_gradients():
    model, ids = model_with_adapters(rank_pattern={"*.1": 2}, dropout=0.2).train(), random_ids(4)
    torch.manual_seed(0)
    expected = gradients(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    actual = gradients(model, ids)
    assert expected.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    for adapter in lora_adapters(model).values():
        adapter.config.dropout = 0.0
    expected = gradients(model, ids)
    model.zero_grad()
    for row in ids:
        (model(input_ids=row[None], labels=row[None]).loss / len(ids)).backward()
    for name, value in expected.items():
        assert relative_error(value, model.get_parameter(name).grad) <= 1e-5, name


def test_filled_up_ranks_stay_zero_under_training():
    model, ids = model_with_adapters(rank_pattern={"*.1": 2, "*.3": 1}, use_dora=True), random_ids()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(2):
        gradients(model, ids)
        optimizer.step()
    for name, value in before.items():
        assert torch.equal(value, model.get_parameter(name)) != ("lora_" in name), name
    for adapter in lora_adapters(model).values():
        for slot, rank in enumerate(adapter.ranks):
            assert adapter.gate_up_proj_A[slot, rank:].count_nonzero() == 0
            assert adapter.down_proj_B[slot, rank:].count_nonzero() == 0


def test_a_bf16_model_has_float32_adapters_and_agrees_with_float32():
    ids = random_ids()
    exact = model_with_adapters(dtype=torch.bfloat16).double()
    model = model_with_adapters(dtype=torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    expected, actual = gradients(exact, ids), gradients(model, ids)
    assert all(grad.dtype == torch.float32 for grad in actual.values())
    # Routers of 16 bits choose other experts for some tokens.
    errors = sorted(relative_error(value, actual[name]) for name, value in expected.items())
    assert errors[len(errors) // 2] <= 0.15


def test_adapters_compose_with_those_of_peft_on_attention():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_native_moe(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    add_expert_lora(model, ExpertLoraConfig(r=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(".q_proj.lora_A" in name for name in trained) and any("gate_up_proj_A" in name for name in trained)
    assert all("lora_" in name for name in trained)
    assert gradients(model, random_ids()).keys() == trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "whole number"),
        ({"dropout": 1.0}, "dropout"),
        ({"alpha": 0.0}, "alpha"),
        ({"target": ("q_proj",)}, "target"),
        ({"target": ("up_proj",)}, "gate_up_proj"),
        ({"experts": {"7": [0]}}, "layer '7'"),
        ({"experts": {"1": [4]}}, "expert 4"),
        ({"rank_pattern": {"*": 0}}, "rank_pattern"),
    ],
)
def test_configs_that_do_not_fit_are_refused_and_the_model_is_unchanged(options, message):
    model = tiny_native_moe()
    with pytest.raises(MoEError, match=message):
        add_expert_lora(model, ExpertLoraConfig(**options))
    assert not lora_adapters(model) and all(p.requires_grad for p in model.parameters())


def test_other_adapters_and_dense_models_are_refused():
    from tests.tiny_models import tiny_dense

    with pytest.raises(MoEError, match="no MoE block"):
        add_expert_lora(tiny_dense("llama"), ExpertLoraConfig())
    model = model_with_adapters()
    with pytest.raises(MoEError, match="already"):
        add_expert_lora(model, ExpertLoraConfig())
    with pytest.raises(MoEError, match="not merged"):
        unmerge_expert_lora(model)
    with pytest.raises(MoEError, match="no adapters"):
        merge_expert_lora(tiny_native_moe())
    selected = tiny_native_moe()
    apply_scope(selected, "selected", expert_selection={"0": [1]})
    with pytest.raises(MoEError, match="of their own already"):
        add_expert_lora(selected, ExpertLoraConfig())
