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
    merge_expert_lora,
    remove_expert_lora,
    unmerge_expert_lora,
)
from tests.kernels.experts_modules import E, make_experts, reference, routed
from tests.kernels.test_grouped_experts import outcome, relative_error
from tests.tiny_models import random_ids, tiny_native_moe


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"*.1": 5, "0.4": 1}},
    "chosen": {"experts": {"0": [4, 1]}},
    "down_only": {"target": ("down_proj",)},
    "first_only": {"target": ("gate_up_proj", "up_proj")},
    "dora": {"use_dora": True},
    "dora_chosen_ranks": {"use_dora": True, "experts": {"0": [5, 0, 2]}, "rank_pattern": {"*.0": 2}, "use_rslora": True},
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
                    parameter[slot, :, :rank] = 0.3 * noise[slot, :, :rank]
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
        up = getattr(adapter, f"{name}_B")[slot, :, :rank]
        weight = getattr(experts, name)[expert]
        weight = weight.t() if experts.is_transposed else weight
        whole = weight + config.alpha / (rank**0.5 if config.use_rslora else rank) * up @ down
        if config.use_dora:
            factor = getattr(adapter, f"{name}_magnitude")[slot] / whole.norm(dim=1).detach()
            whole = factor[:, None] * whole
        return x @ (whole - weight).t()

    return reference(experts, tokens, index, weights, extra)


@pytest.mark.parametrize("layout", ["gated", "plain_biased", "interleaved", "normed"])
@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_gradients_are_those_of_the_definition(option, layout):
    experts = adapted(layout, OPTIONS[option])
    # Expert 2 gets no token.
    inputs = routed(30, experts=[0, 1, 3, 4, 5])
    expected = outcome(adapted_reference, experts, *inputs)
    actual = outcome(lambda e, *args: e(*args), experts, *inputs)
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None or actual[name].count_nonzero() == 0, name
        else:
            assert relative_error(value, actual[name]) <= 1e-12, name
    trained = {name for name, value in actual.items() if value is not None} - {"output", "tokens", "weights"}
    assert trained == {name for name, _ in experts.named_parameters() if "lora" in name}
