"""Initialisers that keep whole copies: which neurons are new, what is recorded, and what is refused."""

import json

import pytest
import torch

from moe_hf import MoEConfig, MoEError, upcycle
from moe_hf.modeling.dense_mlp import find_mlp_sites
from moe_hf.upcycling.initialisers import (
    INITIALISERS,
    Drop,
    Granular,
    Initialiser,
    Mix,
    Permute,
    Split,
    make_initialiser,
)
from moe_hf.upcycling.initialisers.base import DenseLayer
from moe_hf.upcycling.method import UpcyclingMethod
from moe_hf.upcycling.router_init import EntropyRouter, PromptRouter
from tests.tiny_models import random_ids, tiny_dense


def intact_neurons(dense_mlp, experts, expert):
    """For each projection, which of the dense neurons an expert has in their place, (F,) bool."""
    gate, up = experts.gate_up_proj[expert].chunk(2)
    return torch.stack(
        [
            (gate == dense_mlp.gate_proj.weight).all(1),
            (up == dense_mlp.up_proj.weight).all(1),
            (experts.down_proj[expert] == dense_mlp.down_proj.weight).all(0),
        ]
    )


@pytest.mark.parametrize(("shared", "whole"), [(True, 0.5), (False, 0.125)], ids=["shared", "independent"])
def test_drop_keeps_half_of_the_neurons_or_half_of_each_projections(shared, whole):
    dense = tiny_dense("llama", intermediate_size=800)
    moe = upcycle(dense, init=Drop(ratio=0.5, shared_indices=shared), num_experts=4)
    fractions = []
    for layer, source in zip(moe.model.layers, dense.model.layers, strict=True):
        intact = [intact_neurons(source.mlp, layer.mlp.experts, expert) for expert in range(4)]
        assert all(part.sum() == 400 for one in intact for part in one)
        fractions += [float(one.all(0).float().mean()) for one in intact]
        assert len({tuple(one[0].tolist()) for one in intact}) == 4
    assert torch.tensor(fractions).mean() == pytest.approx(whole, abs=0 if shared else 0.01)
    assert not moe.config.upcycling["verification"]["relative_error"] < 0.1


def test_drop_draws_from_the_moments_of_what_it_replaces():
    dense = tiny_dense("llama", intermediate_size=800)
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight.mul_(3).add_(0.5)
    moe = upcycle(dense, init="drop", num_experts=2)
    mlp, experts = dense.model.layers[0].mlp, moe.model.layers[0].mlp.experts
    new = ~intact_neurons(mlp, experts, 0)[1]
    replaced, drawn = mlp.up_proj.weight[new].double(), experts.gate_up_proj[0].chunk(2)[1][new].double()
    # 400 x 48 values: standard errors of the mean and of the spread.
    assert abs(float((drawn.mean() - replaced.mean()).detach() / replaced.std().detach())) < 4 / 19200**0.5
    assert abs(float((drawn.std() / replaced.std() - 1).detach())) < 4 / 38400**0.5


def test_a_bias_is_new_with_its_neuron():
    dense = tiny_dense("gpt2")
    moe = upcycle(dense, init=Drop(ratio=0.25), num_experts=2)
    mlp, experts = dense.transformer.h[0].mlp, moe.transformer.h[0].mlp.experts
    weights = (experts.up_proj[1] == mlp.c_fc.weight.t()).all(1)
    biases = experts.up_proj_bias[1] == mlp.c_fc.bias
    assert torch.equal(weights, biases) and weights.sum() == 66
    assert torch.equal(experts.down_proj_bias[1], mlp.c_proj.bias)


@pytest.mark.parametrize("init", [Drop(ratio=0), Drop(ratio=0, shared_indices=False)], ids=str)
def test_drop_of_nothing_is_copy(init):
    dense = tiny_dense("llama")
    copied, dropped = upcycle(dense, num_experts=4).state_dict(), upcycle(dense, init=init, num_experts=4).state_dict()
    assert all(torch.equal(copied[name], dropped[name]) for name in copied)


def test_permute_gives_each_expert_an_order_of_its_own():
    dense = tiny_dense("llama")
    moe = upcycle(dense, init="permute", num_experts=4)
    down, experts = dense.model.layers[0].mlp.down_proj.weight, moe.model.layers[0].mlp.experts
    orders = [(one.t()[:, None] == down.t()[None]).all(-1).float().argmax(-1) for one in experts.down_proj]
    assert all(sorted(order.tolist()) == list(range(88)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4


@pytest.mark.parametrize("init", [Permute(ratio=0.5), Granular(shards=2, permute=True, ratio=0.5)], ids=str)
def test_permuted_neurons_are_drawn_anew_in_part(init):
    dense = tiny_dense("llama", intermediate_size=96)
    moe = upcycle(dense, init=init, num_experts=4)
    down, experts = dense.model.layers[0].mlp.down_proj.weight * init.shards, moe.model.layers[0].mlp.experts
    for one in experts.down_proj:
        kept = (one.t()[:, None] == down.t()[None]).all(-1).any(-1)
        assert kept.sum() == len(kept) / 2 == 48 / init.shards


def test_noise_below_the_resolution_of_the_dtype_is_refused():
    dense = tiny_dense("llama")
    with pytest.raises(MoEError, match=r"noise is 0\.005, below the resolution of torch\.bfloat16 \(7\.8e-03\)"):
        upcycle(tiny_dense("llama").bfloat16(), noise=0.005, num_experts=4)
    assert upcycle(dense, noise=0.005, num_experts=4).config.upcycling["noise"] == 0.005
    noisy = upcycle(tiny_dense("llama").bfloat16(), noise=0.02, num_experts=4)
    source, experts = dense.bfloat16().model.layers[0].mlp, noisy.model.layers[0].mlp.experts
    assert (experts.down_proj[0] != source.down_proj.weight).float().mean() > 0.5


def letters(text):
    return {"input_ids": [3 + ord(letter) % 100 for letter in text]}


METHODS = {
    "drop": {"init": "drop", "shared_expert_intermediate_size": 96, "shared_expert_gate": True},
    "permute and noise": {"init": Permute(ratio=0.1), "noise": 0.01, "seed": 5},
    "granular": {
        "init": Granular(shards=2, permute=True),
        "shared_expert_intermediate_size": 96,
        "shared_share": 0.25,
    },
    "split": {"init": Split(by="importance"), "shared_expert_intermediate_size": 32},
    "split by co-activation": {"init": Split(by="coactivation", scale=2)},
    "split by weights": {"init": Split(by="kmeans"), "router_init": "kmeans"},
    "shards with a router": {"init": Granular(shards=2), "router_init": EntropyRouter(target=0.7)},
    "prompts": {"router_init": PromptRouter(positive=[["ab"], ["c d", "e"], ["fgh"], ["i"]]), "tokenizer": letters},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_metadata_alone_gives_the_same_bytes(name):
    dense, ids = tiny_dense("llama", intermediate_size=96), random_ids(4, 32)
    first = upcycle(dense, num_experts=4, inputs=ids, **METHODS[name])
    facts = json.loads(json.dumps(first.config.upcycling))
    method = UpcyclingMethod.from_dict(facts)
    fields = {f: v for f, v in METHODS[name].items() if f.startswith(("shared_expert", "tokenizer"))}
    parts = {f: getattr(method, f) for f in ("init", "router_init", "noise", "shared_share", "seed")}
    again = upcycle(dense, num_experts=4, inputs=ids, **parts, **fields)
    assert again.config.upcycling == first.config.upcycling
    before, after = first.state_dict(), again.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert ("inputs" in facts) == method.uses_inputs(first.config)


@pytest.mark.parametrize("name", INITIALISERS)
def test_each_initialiser_names_its_equation_and_its_paper(name):
    cls = INITIALISERS[name]
    assert cls.name == name and "(x)" in cls.equation and "https://" in cls.paper
    assert issubclass(cls, Initialiser) and cls.__dataclass_params__.frozen


def test_shards_share_the_rows_that_the_router_initialiser_makes():
    dense, ids = tiny_dense("llama", intermediate_size=96), random_ids(4, 32)
    fields = {"router_init": "kmeans", "inputs": ids, "num_experts_per_tok": 2}
    whole = upcycle(dense, num_experts=3, **fields)
    cut = upcycle(dense, init=Granular(shards=2), num_experts=6, **fields)
    rows, halves = (moe.model.layers[1].mlp.gate.weight for moe in (whole, cut))
    assert torch.equal(halves, rows.repeat_interleave(2, 0))
    assert cut.config.upcycling["verification"]["relative_error"] <= 1e-6


def test_random_numbers_differ_between_layers_experts_and_seeds():
    dense = tiny_dense("llama")
    site, other, _ = find_mlp_sites(dense.model)
    config = MoEConfig(text_config=dense.config, num_experts=2)
    orders = []
    for where, seed in ((site, 0), (other, 0), (site, 1)):
        layer = DenseLayer(site=where, read=None, width=88, seed=seed, dense_widths=(88,))
        orders += [tuple(recipe.neurons.tolist()) for recipe in Permute().experts(layer, config)]
    assert len(set(orders)) == 6


GRANULAR = {"init": Granular(shards=4), "num_experts": 8, "num_experts_per_tok": 4}
REFUSED = {
    "unknown": ({"init": "magic"}, "must be one of .*'copy', 'drop', 'permute', 'granular', 'split', 'mix'"),
    "experts": (GRANULAR | {"num_experts": 6}, "num_experts is 6; .* multiple of 4"),
    "per token": (GRANULAR | {"num_experts_per_tok": 2}, "num_experts_per_tok is 2; .* multiple of 4"),
    "width": (
        GRANULAR | {"init": Granular(shards=5), "num_experts": 10, "num_experts_per_tok": 5},
        r"divisors .*\[2, 4, 8",
    ),
    "shard too wide": (GRANULAR | {"moe_intermediate_size": 8}, "moe_intermediate_size is 8, .* 22 neurons"),
    "copy too wide": ({"moe_intermediate_size": 24}, "puts 88 neurons .* do not fit"),
    "split width": ({"init": "split", "num_experts": 5}, "cannot cut 88 neurons .* num_experts=5 .* be 3 or"),
    "split shared": (
        {"init": "split", "shared_expert_intermediate_size": 88, "inputs": random_ids()},
        "takes the shared expert's neurons from the dense MLP, which has 88",
    ),
    "split share": ({"init": "split", "shared_share": 0.25}, "leave shared_share out"),
    "no shared expert": ({"shared_share": 0.25}, "there is no shared expert"),
    "split data": ({"init": Split(by="importance")}, "pass inputs"),
    "split shared data": ({"init": "split", "shared_expert_intermediate_size": 8}, "pass inputs"),
    "router data": ({"router_init": "kmeans"}, "pass inputs"),
    "router": ({"router_init": "magic"}, "router_init is 'magic'"),
    "prompts": ({"router_init": PromptRouter(positive=[["a"], ["b"]])}, "prompts for 2 experts, and the model has 8"),
    "no tokenizer": (
        {"router_init": PromptRouter(positive=[["a"], ["b"]]), "num_experts": 2},
        "pass the dense model's tokenizer",
    ),
    "no ids": ({"init": Split(by="importance"), "inputs": torch.randn(2, 3)}, "token ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_cannot_be_filled_is_refused(case):
    fields, message = REFUSED[case]
    with pytest.raises(MoEError, match=message):
        upcycle(tiny_dense("llama"), **({"num_experts": 8} | fields))


BAD_OPTIONS = {
    "drop": (Drop, {"ratio": 1.5}, r"ratio of init='drop' is 1\.5"),
    "permute": (Permute, {"ratio": float("nan")}, "in \\[0, 1\\]"),
    "granular": (Granular, {"shards": 0}, "at least 1"),
    "granular ratio": (Granular, {"ratio": -0.1}, "init='granular'"),
    "split": (Split, {"by": "colour"}, "must be one of .*'coactivation'"),
    "split scale": (Split, {"scale": 0}, "above 0"),
    "mix": (Mix, {}, "needs sources"),
    "mix string": (Mix, {"sources": "a"}, "needs sources"),
    "mix rest": (Mix, {"sources": ["a"], "rest": "median"}, "'average' or 'base'"),
    "mix assignment": (Mix, {"sources": ["a"], "assignment": [0, 2]}, "in 0 to 1"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_outside_its_range_is_refused(case):
    cls, options, message = BAD_OPTIONS[case]
    with pytest.raises(MoEError, match=message):
        make_initialiser(cls.name, options)


def test_options_come_by_name_or_in_an_instance():
    assert make_initialiser("drop", {"ratio": 0.25}) == Drop(ratio=0.25)
    with pytest.raises(MoEError, match="no option \\['rate'\\]; it has \\['ratio', 'shared_indices'\\]"):
        make_initialiser("drop", {"rate": 0.25})
    with pytest.raises(MoEError, match="has its options already"):
        make_initialiser(Drop(), {"ratio": 0.25})
