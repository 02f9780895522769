"""Splitting one MLP into experts without copies: every neuron once, the scale of the output, groups that make sense."""

import pytest
import torch
from torch.nn import functional

from moe_hf import MoEConfig, upcycle
from moe_hf.modeling.dense_mlp import find_mlp_sites
from moe_hf.upcycling.initialisers import Split
from moe_hf.upcycling.initialisers.base import DenseLayer
from moe_hf.upcycling.initialisers.neuron_groups import NEURON_GROUPS, assign_evenly, importance, kmeans
from moe_hf.upcycling.router_init import KMeansRouter, RouterLayer
from tests.tiny_models import random_ids, tiny_dense


@pytest.mark.parametrize("by", NEURON_GROUPS)
@pytest.mark.parametrize("shared", [0, 32], ids=["routed", "shared"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_neuron_goes_to_one_expert_and_all_experts_together_are_the_dense_mlp(family, shared, by):
    dense = tiny_dense(family, **{"intermediate_size" if family == "llama" else "n_inner": 96})
    fields = {"num_experts_per_tok": 4, "shared_expert_intermediate_size": shared}
    moe = upcycle(dense, init=Split(by=by), num_experts=4, inputs=random_ids(4, 40), **fields)
    assert moe.config.moe_intermediate_size == (96 - shared) // 4
    name = "layers.1.mlp" if family == "llama" else "h.1.mlp"
    block, mlp = moe.base_model.get_submodule(name), dense.base_model.get_submodule(name)
    inputs = torch.randn(20, 48)
    weights = torch.full((20, 4), 0.25)
    with torch.no_grad():
        output = block.experts(inputs, torch.arange(4).expand(20, 4), weights)
        output = output + block.shared_expert(inputs) if shared else output
        expected = mlp(inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def outputs_of_pairs(dense, scale):
    """The output without bias of each pair of 6 parts with equal weights, (15, T, D), and the dense one, (T, D)."""
    moe = upcycle(dense, init=Split(scale=scale), num_experts=6, num_experts_per_tok=2, routed_scaling_factor=2.0)
    block, mlp = moe.model.layers[0].mlp, dense.model.layers[0].mlp
    inputs = torch.randn(200, 48, generator=torch.Generator().manual_seed(0))
    pairs = torch.combinations(torch.arange(6), 2)
    with torch.no_grad():
        outputs = [block.experts(inputs, pair.expand(200, 2), torch.ones(200, 2)) for pair in pairs]
        return torch.stack(outputs) - mlp.c_proj.bias, mlp(inputs) - mlp.c_proj.bias, moe


@pytest.mark.parametrize(
    ("scale", "kept"),
    [(None, 12**0.5 / 6), (2.0, 1 / 3), (6.0, 1.0), (3.0, 0.5)],
    ids=["default", "sum", "mean", "LLaMA-MoE"],
)
def test_the_mean_over_choices_is_the_part_of_the_dense_output_that_the_scale_keeps(scale, kept):
    outputs, expected, moe = outputs_of_pairs(tiny_dense("starcoder2", intermediate_size=96), scale)
    torch.testing.assert_close(outputs.mean(0), kept * expected, rtol=1e-4, atol=1e-5)
    assert moe.config.upcycling["init"]["options"]["scale"] == (12**0.5 if scale is None else scale)


def test_at_scale_k_the_chosen_parts_add_up_as_in_the_dense_mlp():
    """Pairs that share no part are the whole MLP together."""
    outputs, expected, _ = outputs_of_pairs(tiny_dense("starcoder2", intermediate_size=96), 2.0)
    pairs = torch.combinations(torch.arange(6), 2).tolist()
    three = [pairs.index(pair) for pair in ([0, 1], [2, 3], [4, 5])]
    torch.testing.assert_close(outputs[three].sum(0), expected, rtol=1e-4, atol=1e-5)


def test_of_uncorrelated_parts_scale_k_is_nearest_and_the_default_nearer_than_scale_e():
    """Neurons of random weights are nearly uncorrelated; scale E has E / K times the squared error of scale K."""
    dense = tiny_dense("starcoder2", intermediate_size=96)
    errors = {}
    for scale in (1.0, 2.0, None, 6.0):
        outputs, expected, _ = outputs_of_pairs(dense, scale)
        errors[scale] = float((outputs - expected).square().mean())
    assert errors[2.0] < errors[None] < errors[6.0] and errors[2.0] < errors[1.0]
    assert errors[6.0] / errors[2.0] == pytest.approx(6 / 2, rel=0.2)


@pytest.mark.parametrize("gate", [False, True])
def test_shared_neurons_are_those_that_matter_most(gate):
    dense = tiny_dense("llama", intermediate_size=96)
    loud = list(range(1, 96, 6))
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight[:, loud] *= 30
    fields = {"shared_expert_intermediate_size": 16, "shared_expert_gate": gate, "num_experts": 4}
    moe = upcycle(dense, init="split", inputs=random_ids(4, 40), **fields)
    shared = moe.model.layers[0].mlp.shared_expert.down_proj.weight
    expected = dense.model.layers[0].mlp.down_proj.weight[:, loud]
    assert torch.equal(shared, expected * (2 if gate else 1))


def layer_of(dense, hidden_states):
    (site, *_) = find_mlp_sites(dense.model)
    mlp = dense.model.layers[0].mlp
    pieces = {"gate": mlp.gate_proj.weight, "up": mlp.up_proj.weight, "down": mlp.down_proj.weight}
    return DenseLayer(
        site=site,
        read=lambda piece: pieces[piece].detach(),
        width=site.intermediate_size,
        seed=0,
        dense_widths=(site.intermediate_size,),
        hidden_states=hidden_states,
        act_fn=functional.silu,
    )


def test_importance_is_the_mean_norm_of_what_a_neuron_adds():
    dense, hidden = tiny_dense("llama"), torch.randn(30, 48)
    mlp, kinds = dense.model.layers[0].mlp, torch.arange(30) % 3
    expected = torch.zeros(3, 88, dtype=torch.float64)
    gate, up, down = (getattr(mlp, f"{name}_proj").weight.detach().double() for name in ("gate", "up", "down"))
    for token, kind in zip(hidden.double(), kinds, strict=True):
        for neuron in range(88):
            activation = functional.silu(gate[neuron] @ token) * (up[neuron] @ token)
            expected[kind, neuron] += (activation * down[:, neuron]).norm() / 10
    actual = importance(layer_of(dense, hidden), kinds, 3)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_experts_of_important_neurons_get_the_tokens_that_a_kmeans_router_sends_them():
    dense, hidden = tiny_dense("llama", intermediate_size=96), planted()[0]
    layer = layer_of(dense, hidden)
    config = MoEConfig(text_config=dense.config, num_experts=4)
    place = {"layer_index": 0, "hidden_size": 48, "groups": 4, "config": config, "seed": 0}
    rows = KMeansRouter().rows(RouterLayer(hidden_states=hidden, **place))
    matters = importance(layer, (hidden @ rows.t()).argmax(-1), 4)
    expected = assign_evenly(-(matters / matters.sum(0)).t())
    assert torch.equal(NEURON_GROUPS["importance"](layer, torch.arange(96), 4), expected)
    assert len(set(expected.tolist())) == 4


def planted(count=4, size=24, width=48):
    """Rows around `count` directions, shuffled, with the direction of each."""
    generator = torch.Generator().manual_seed(0)
    centres = functional.normalize(torch.randn(count, width, generator=generator), dim=-1) * 4
    labels = torch.arange(count).repeat_interleave(size)[torch.randperm(count * size, generator=generator)]
    return centres[labels] + 0.1 * torch.randn(count * size, width, generator=generator), labels, centres


def same_partition(a, b):
    return torch.equal(a[:, None] == a[None], b[:, None] == b[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kmeans_finds_planted_groups(dtype):
    points, labels, _ = planted()
    # Lloyd's iterations depend on where they start; most starts find the groups.
    found = [kmeans(points.to(dtype), 4, torch.Generator().manual_seed(seed))[0] for seed in range(6)]
    assert sum(same_partition(labels, one) for one in found) >= 3


def test_kmeans_is_balanced_seeded_and_no_worse_than_random_groups():
    points = torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
    labels, centroids = kmeans(points, 7, torch.Generator().manual_seed(0))
    assert torch.bincount(labels).max() <= 15 and torch.bincount(labels).sum() == 100
    again, _ = kmeans(points, 7, torch.Generator().manual_seed(0))
    assert torch.equal(labels, again)
    means = torch.stack([points[labels == cluster].mean(0) for cluster in range(7)])
    torch.testing.assert_close(centroids, means)
    inertia = (points - centroids[labels]).square().sum()
    for seed in range(20):
        other = torch.arange(100)[torch.randperm(100, generator=torch.Generator().manual_seed(seed))] % 7
        means = torch.stack([points[other == cluster].mean(0) for cluster in range(7)])
        assert inertia < 0.9 * (points - means[other]).square().sum()


def test_points_get_their_cheapest_cluster_while_there_is_room():
    cost = torch.tensor([[0.0, 1.0], [0.1, 9.0], [0.2, 9.0], [5.0, 0.0]])
    assert assign_evenly(cost).tolist() == [0, 0, 1, 1]
    assert torch.bincount(assign_evenly(torch.zeros(7, 3)), minlength=3).tolist() == [3, 3, 1]


def test_neurons_with_similar_gates_go_together():
    dense = tiny_dense("llama", intermediate_size=96)
    rows, labels, _ = planted()
    with torch.no_grad():
        dense.model.layers[0].mlp.gate_proj.weight.copy_(rows)
    layer = layer_of(dense, None)
    found = NEURON_GROUPS["kmeans"](layer, torch.arange(96), 4)
    assert same_partition(found, labels)
    part = torch.arange(0, 96, 2)
    assert len(NEURON_GROUPS["kmeans"](layer, part, 4)) == 48


@pytest.mark.parametrize("by", ["coactivation", "importance"])
@pytest.mark.parametrize("tokens", [200, 400], ids=["as they are", "projected"])
def test_neurons_that_fire_on_the_same_tokens_go_together(by, tokens):
    dense = tiny_dense("llama", intermediate_size=96)
    rows, labels, centres = planted()
    kinds = torch.arange(tokens) % 4
    hidden = centres[kinds] + 0.05 * torch.randn(tokens, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        # A neuron's gate is open on tokens of its own direction alone.
        dense.model.layers[0].mlp.gate_proj.weight.copy_(rows - 1.5 * centres.mean(0))
        dense.model.layers[0].mlp.up_proj.weight.copy_(rows)
    found = NEURON_GROUPS[by](layer_of(dense, hidden), torch.arange(96), 4)
    agreement = (found[:, None] == found[None]) == (labels[:, None] == labels[None])
    assert agreement.float().mean() > 0.8
