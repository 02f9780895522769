"""Router initialisers: how sharp they start, whatever the width; what clusters and prompts do; seeds; refusals."""

import math

import pytest
import torch
from torch.nn import functional

from moe_hf import MoEConfig, MoEError, upcycle
from moe_hf.upcycling.initialisers import Copy
from moe_hf.upcycling.on_disk.layerwise import load_layerwise
from moe_hf.upcycling.recipes import random_generator
from moe_hf.upcycling.router_init import (
    ROUTER_INITS,
    EntropyRouter,
    KMeansRouter,
    NormalRouter,
    PromptRouter,
    RouterLayer,
    ZeroRouter,
    make_router_init,
)
from moe_hf.upcycling.router_init.entropy import mean_entropy
from moe_hf.upcycling.router_init.hidden_states import collect_hidden_states, collect_prompt_states
from moe_hf.upcycling.router_init.rows import spherical_kmeans
from tests.tiny_models import random_ids, tiny_config, tiny_dense


def unit_states(tokens: int = 2000, width: int = 64, seed: int = 1) -> torch.Tensor:
    states = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return states / states.square().mean(-1, keepdim=True).sqrt()


def layer_of(groups: int = 8, width: int = 64, seed: int = 0, index: int = 3, **fields) -> RouterLayer:
    names = ("scoring_func", "num_experts", "num_experts_per_tok", "router_type")
    config = {"num_experts": groups} | {name: fields.pop(name) for name in names if name in fields}
    return RouterLayer(
        layer_index=index,
        hidden_size=width,
        groups=groups,
        config=MoEConfig(text_config=tiny_config("llama"), **config),
        seed=seed,
        **fields,
    )


def top_one(logits: torch.Tensor) -> float:
    return float(logits.softmax(-1).max(-1).values.mean())


# Mean over 2000 tokens with a root mean square of 1, 8 experts, width 2048: entropy in nats, mean top-1 probability.
STARTS = {
    "mergekit random, N(0, 1)": (lambda g: torch.randn(8, 2048, generator=g), 0.050, 0.980),
    "Drop-Upcycling, U(0, 1)": (lambda g: torch.rand(8, 2048, generator=g), 0.185, 0.926),
    "N(0, 0.02)": (lambda g: 0.02 * torch.randn(8, 2048, generator=g), 1.778, 0.337),
    "U(+-1/sqrt D)": (lambda g: (2 * torch.rand(8, 2048, generator=g) - 1) / 2048**0.5, 1.942, 0.253),
}


@pytest.mark.parametrize("start", STARTS)
def test_the_starts_of_other_tools_have_the_entropy_that_was_measured(start):
    draw, entropy, top = STARTS[start]
    logits = unit_states(width=2048) @ draw(torch.Generator().manual_seed(0)).t()
    assert mean_entropy(logits) * math.log(8) == pytest.approx(entropy, abs=0.04)
    assert top_one(logits) == pytest.approx(top, abs=0.02)


@pytest.mark.parametrize("groups", [4, 8, 64])
def test_normal_rows_start_alike_at_each_width_and_not_saturated(groups):
    found = []
    for width in (64, 1024):
        logits = unit_states(width=width) @ NormalRouter().rows(layer_of(groups, width)).t()
        assert float(logits.std(0).mean()) == pytest.approx(1, abs=0.1)
        found.append((mean_entropy(logits), top_one(logits)))
    (narrow, narrow_top), (wide, wide_top) = found
    assert narrow == pytest.approx(wide, abs=0.06) and narrow_top == pytest.approx(wide_top, abs=0.06)
    assert 0.7 < wide < 0.95 and wide_top < 0.6


def test_normal_is_the_default_stream_of_random_numbers():
    generator = random_generator(5, 3, "router")
    expected = torch.randn(8, 64, generator=generator, dtype=torch.float32) / 64**0.5
    assert torch.equal(NormalRouter().rows(layer_of(seed=5)), expected)


@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("width", [64, 1024])
def test_target_entropy_is_reached_on_fresh_tokens(width, target):
    rows = EntropyRouter(target=target).rows(layer_of(width=width))
    assert mean_entropy(unit_states(20_000, width) @ rows.t()) == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_target_entropy_is_reached_on_the_users_tokens(scoring_func):
    # Far from unit root mean square, with one large common direction.
    states = 7 * unit_states(500) + 30
    rows = EntropyRouter().rows(layer_of(hidden_states=states, scoring_func=scoring_func))
    assert mean_entropy(states @ rows.t(), scoring_func) == pytest.approx(0.9, abs=1e-4)
    other = EntropyRouter().rows(layer_of(scoring_func=scoring_func))
    assert mean_entropy(states @ other.t(), scoring_func) < 0.9


def test_an_entropy_that_sigmoids_cannot_have_is_refused_with_the_least():
    with pytest.raises(MoEError, match="no scale of the router gives an entropy of 0.1; the least is 0"):
        EntropyRouter(target=0.1).rows(layer_of(scoring_func="sigmoid"))


def clusters(count: int = 6, each: int = 40, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states around `count` directions beside one that all share, and the cluster of each."""
    generator = torch.Generator().manual_seed(2)
    centres = functional.normalize(torch.randn(count, width, generator=generator), dim=-1)
    common = functional.normalize(torch.randn(width, generator=generator), dim=-1)
    labels = torch.arange(count).repeat_interleave(each)
    noise = 0.03 * torch.randn(count * each, width, generator=generator)
    order = torch.randperm(count * each, generator=generator)
    return (5 * (centres[labels] + 2 * common + noise))[order], labels[order]


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_sends_each_cluster_to_its_own_expert(seed):
    states, labels = clusters()
    rows = KMeansRouter().rows(layer_of(6, seed=seed, hidden_states=states))
    logits = states @ rows.t()
    chosen = logits.argmax(-1)
    experts = [set(chosen[labels == label].tolist()) for label in range(6)]
    assert all(len(expert) == 1 for expert in experts) and len(set.union(*experts)) == 6
    assert mean_entropy(logits) == pytest.approx(0.9, abs=1e-4)
    assert float(rows.mean(0).abs().max()) < 1e-6


def test_kmeans_needs_as_many_distinct_tokens_as_experts():
    few = unit_states(5).repeat(10, 1)
    assert spherical_kmeans(few, 5, torch.Generator().manual_seed(0)).shape == (5, 64)
    with pytest.raises(MoEError, match="50 tokens have 5 distinct hidden states, fewer than the 8"):
        KMeansRouter().rows(layer_of(hidden_states=few))
    with pytest.raises(MoEError, match="pass inputs"):
        KMeansRouter().rows(layer_of())


class LetterTokenizer:
    """One token per letter: a = 10, b = 11, ..."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) - 87 for letter in text if letter.islower()]}

    def __len__(self):
        return 36


POSITIVE = (("abcabdcab", "bcadbacd"), ("mnomnopmn", "opmnmopn"), ("uvwuvxw", "xwvuvwxu"))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_prompts_send_their_own_text_to_their_expert(pooling):
    dense = tiny_dense("llama")
    router = PromptRouter(positive=POSITIVE, pooling=pooling)
    states = collect_prompt_states(dense, LetterTokenizer(), router.prompts)
    for index, prompt_states in states.items():
        rows = router.rows(layer_of(3, 48, index=index, prompt_states=prompt_states))
        text = [torch.cat(prompt_states[2 * expert : 2 * expert + 2]) for expert in range(3)]
        logits = torch.cat(text) @ rows.t()
        assert mean_entropy(logits) == pytest.approx(0.9, abs=1e-4)
        for expert in range(3):
            pooled = [s[-1] if pooling == "last" else s.mean(0) for s in prompt_states[2 * expert : 2 * expert + 2]]
            assert ((torch.stack(pooled) @ rows.t()).argmax(-1) == expert).all(), (index, expert)
            if pooling == "mean":
                assert float(((text[expert] @ rows.t()).argmax(-1) == expert).float().mean()) > 0.6


def test_prompt_rows_are_mergekits_formula_up_to_scale_and_a_common_vector():
    states = [unit_states(4, seed=seed) for seed in range(5)]
    router = PromptRouter(positive=[["a", "b"], ["c"]], negative=[[], ["d", "e"]], pooling="mean")
    assert router.prompts == ("a", "b", "c", "d", "e")
    rows = router.rows(layer_of(2, prompt_states=states))
    a, b, c, d, e = (s.mean(0) for s in states)
    expected = functional.normalize(torch.stack([(a + b) / 2, c - (d + e) / 2]), dim=-1)
    assert functional.cosine_similarity(rows[1] - rows[0], expected[1] - expected[0], dim=0) > 1 - 1e-6


def test_zero_rows_are_nearly_indifferent_and_break_ties():
    rows = ZeroRouter().rows(layer_of())
    logits = unit_states() @ rows.t()
    assert mean_entropy(logits) > 1 - 1e-5
    assert logits.argmax(-1).bincount(minlength=8).min() > 100
    with pytest.raises(MoEError, match="the same experts, so that the others get no gradient"):
        ZeroRouter(noise=0).check(layer_of(router_type="top_p").config, 8)
    ZeroRouter(noise=0).check(layer_of().config, 8)
    ZeroRouter(noise=0).check(layer_of(4, num_experts_per_tok=4).config, 4)


ALL = {
    "normal": NormalRouter(),
    "entropy": EntropyRouter(),
    "kmeans": KMeansRouter(),
    "prompts": PromptRouter(positive=[["a"], ["b"], ["c"], ["d"]]),
    "zero": ZeroRouter(),
}


@pytest.mark.parametrize("name", ROUTER_INITS)
def test_the_same_seed_gives_the_same_bytes_and_metadata_the_same_rows(name):
    router = ALL[name]
    data = {"hidden_states": unit_states(99), "prompt_states": [unit_states(3, seed=s) for s in range(4)]}
    first, again, other, deeper = (
        router.rows(layer_of(4, seed=seed, index=index, **data)) for seed, index in ((0, 3), (0, 3), (1, 3), (0, 4))
    )
    assert first.shape == (4, 64) and first.dtype == torch.float32 and first.is_contiguous()
    assert torch.equal(first, again)
    if name != "prompts":
        assert not torch.equal(first, other) and not torch.equal(first, deeper)
    facts = router.to_dict()
    assert facts["name"] == name and facts["equation"] and facts["paper"]
    assert make_router_init(facts["name"], facts["options"]) == router
    assert make_router_init(router) is router


BAD = {
    "name": (lambda: make_router_init("random"), "router_init is 'random'; it must be one of .*kmeans"),
    "kind": (lambda: make_router_init(Copy()), "must be one of .*or a RouterInit"),
    "option": (lambda: make_router_init("normal", {"scale": 1}), "no option .*scale.*it has .*std"),
    "required": (lambda: make_router_init("prompts"), "needs the option .*positive"),
    "both": (lambda: make_router_init(NormalRouter(), {"std": 1}), "has its options already"),
    "std": (lambda: NormalRouter(std=0), "above 0"),
    "std_nan": (lambda: NormalRouter(std=float("nan")), "above 0"),
    "entropy": (lambda: EntropyRouter(target=1.0), "below 1"),
    "entropy_kmeans": (lambda: KMeansRouter(entropy=0), "above 0"),
    "noise": (lambda: ZeroRouter(noise=-1), "at least 0"),
    "no_prompts": (lambda: PromptRouter(positive=[["a"], []]), "at least one positive"),
    "one_list": (lambda: PromptRouter(positive=["a", "b"]), "a list of prompts for each"),
    "negative": (
        lambda: PromptRouter(positive=[["a"], ["b"]], negative=[["c"]]),
        "for 2 experts and negative ones for 1",
    ),
    "twice": (lambda: PromptRouter(positive=[["a"], ["b"], ["a"]]), "expert 2 has the prompts of one before"),
    "pooling": (lambda: PromptRouter(positive=[["a"]], pooling="max"), "must be one of"),
    "count": (lambda: ALL["prompts"].check(layer_of().config, 8), "for 4 experts, and the model has 8: give"),
    "copies": (lambda: ALL["prompts"].check(layer_of().config, 2), "has 2 copies of 4 shards"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_with_what_to_do(case):
    function, message = BAD[case]
    with pytest.raises(MoEError, match=message):
        function()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "falcon_h1"])
def test_hidden_states_are_what_the_mlp_sees_without_padding(family):
    dense = tiny_dense(family)
    ids, mask = random_ids(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[1, 7:] = 0
    states = collect_hidden_states(dense, ids, mask)
    assert sorted(states) == [0, 1, 2] and all(s.shape == (27, 48) for s in states.values())
    alone = collect_hidden_states(dense, ids[1:2, :7])
    assert torch.allclose(states[2][10:17], alone[2], atol=2e-5)
    few = collect_hidden_states(dense, ids, mask, max_tokens=5, seed=1)
    place = torch.cdist(few[0], states[0]).argmin(-1)
    assert len(place) == 5 and (place.diff() > 0).all()
    assert all(torch.allclose(few[index], states[index][place], atol=2e-5) for index in states)


def test_hidden_states_do_not_depend_on_how_many_rows_run_at_once(monkeypatch):
    dense, ids = tiny_dense("llama"), random_ids(5, 8)
    whole = collect_hidden_states(dense, ids, max_tokens=30)
    monkeypatch.setattr("moe_hf.upcycling.router_init.hidden_states.TOKENS_PER_PASS", 16)
    parts = collect_hidden_states(dense, ids, max_tokens=30)
    assert all(torch.allclose(whole[index], parts[index], atol=1e-5) for index in whole)
    with pytest.raises(MoEError, match="token ids"):
        collect_hidden_states(dense, torch.randn(2, 3))
    with pytest.raises(MoEError, match="padding"):
        collect_hidden_states(dense, ids, torch.zeros_like(ids))


def test_hidden_states_of_a_model_on_the_disk_are_the_same(tmp_path):
    dense, ids = tiny_dense("llama"), random_ids(2, 9)
    dense.save_pretrained(tmp_path)
    expected, found = collect_hidden_states(dense, ids), collect_hidden_states(load_layerwise(tmp_path), ids)
    assert expected.keys() == found.keys() and all(torch.allclose(expected[i], found[i], atol=1e-5) for i in found)


DATA = {
    "kmeans": {"router_init": "kmeans", "inputs": random_ids(4, 40)},
    "entropy": {"router_init": EntropyRouter(target=0.8), "inputs": random_ids(4, 40)},
    "prompts": {"router_init": PromptRouter(positive=POSITIVE, pooling="mean"), "tokenizer": LetterTokenizer()},
    "zero": {"router_init": "zero"},
}


@pytest.mark.parametrize("case", DATA)
def test_upcycling_starts_the_routers_as_asked_for_and_records_it(case):
    dense, arguments = tiny_dense("llama"), DATA[case]
    moe = upcycle(dense, num_experts=3, seed=5, **arguments)
    router = make_router_init(arguments["router_init"])
    tokens = collect_hidden_states(dense, arguments["inputs"], seed=5) if "inputs" in arguments else {}
    texts = collect_prompt_states(dense, LetterTokenizer(), router.prompts) if router.prompts else {}
    for index in range(3):
        data = {"hidden_states": tokens.get(index), "prompt_states": texts.get(index, ())}
        expected = router.rows(layer_of(3, 48, seed=5, index=index, **data))
        assert torch.equal(moe.model.layers[index].mlp.gate.weight.detach(), expected)
    facts = moe.config.upcycling
    assert facts["router_init"] == router.to_dict() and ("inputs" in facts) == ("inputs" in arguments)
    assert facts["verification"]["relative_error"] <= 1e-5


def test_shards_of_one_copy_share_a_row_and_data_that_is_missing_is_asked_for():
    dense = tiny_dense("llama")
    moe = upcycle(
        dense, num_experts=8, num_experts_per_tok=4, init="granular", router_init="kmeans", inputs=random_ids(4, 40)
    )
    rows = moe.model.layers[0].mlp.gate.weight.detach()
    shards = len(rows) // len(rows.unique(dim=0))
    assert shards > 1 and torch.equal(rows, rows[::shards].repeat_interleave(shards, 0))
    with pytest.raises(MoEError, match="pass inputs"):
        upcycle(dense, router_init="kmeans")
    with pytest.raises(MoEError, match="tokenizer"):
        upcycle(dense, num_experts=3, router_init=DATA["prompts"]["router_init"])
    with pytest.raises(MoEError, match="for 3 experts, and the model has 8"):
        upcycle(dense, router_init=DATA["prompts"]["router_init"])


def test_a_saturated_start_is_warned_of(caplog):
    upcycle(tiny_dense("llama"), num_experts=4, router_init=NormalRouter(std=60))
    assert "saturated" in caplog.text
    caplog.clear()
    facts = upcycle(
        tiny_dense("llama"), num_experts=4, router_init="entropy", inputs=random_ids(4, 40)
    ).config.upcycling
    assert "saturated" not in caplog.text and max(facts["routing"]["top_1_probability"]) < 0.7
