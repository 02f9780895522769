"""Laws of the routing statistics: each figure is that of a naive count over real tokens, for any MoE, in flat memory."""

import gc
import math
from collections import Counter

import pytest
import torch
from datasets import Dataset

import moe_hf
from moe_hf import MoEConfig, MoEError, MoEForCausalLM, routing_statistics
from moe_hf.data import train_tokenizer
from moe_hf.reporting.statistics import group_lift, relative_load, specialisation
from moe_hf.reporting.token_groups import (
    TOKEN_CLASSES,
    position_bins,
    position_names,
    positions_in_documents,
    token_classes,
)
from tests.tiny_models import random_ids, tiny_config, tiny_dense, tiny_native_moe


def ours(**fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4, **fields)).eval()


@pytest.fixture(scope="module")
def padded():
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:], mask[2, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def decisions_of(model, batch) -> dict[str, list[tuple[int, int, float]]]:
    """By router: (row of the batch, expert, weight) of every choice, read from what each router returns."""
    found, handles = {}, []
    for name, module in model.named_modules():
        gate = dict(module.named_children()).get("gate") or dict(module.named_children()).get("router")
        if "experts" in dict(module.named_children()) and gate is not None:

            def note(router, args, output, name=name):
                weights, index = output[1], output[2]
                token = output[3].tolist() if len(output) > 3 else range(len(index))
                rows = zip(token, index.tolist(), weights.tolist(), strict=True)
                found[name] = [(t, e, w) for t, experts, ws in rows for e, w in zip(experts, ws, strict=True)]

            handles.append(gate.register_forward_hook(note))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


MODELS = {
    "ours": lambda: ours(),
    "top_p": lambda: ours(router_type="top_p"),
    "capacity": lambda: ours(capacity_factor=0.5, eval_capacity_factor=0.5),
    "mixtral": lambda: tiny_native_moe("mixtral"),
    "qwen3_moe": lambda: tiny_native_moe("qwen3_moe"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_figures_are_those_of_a_naive_count_of_real_tokens(kind, padded):
    model = MODELS[kind]()
    statistics = routing_statistics(model, [padded])
    real = padded["attention_mask"].flatten().tolist()
    expected = decisions_of(model, padded)
    assert [layer.name for layer in statistics.layers] == list(expected) and statistics.num_tokens == sum(real) == 27
    for layer, choices in zip(statistics.layers, expected.values(), strict=True):
        choices = [choice for choice in choices if real[choice[0]]]
        counts = Counter(expert for _, expert, _ in choices)
        served = [(token, expert, weight) for token, expert, weight in choices if weight != 0]
        assert layer.choices.tolist() == [counts[e] for e in range(4)]
        assert layer.load.tolist() == pytest.approx([counts[e] * 4 / len(choices) for e in range(4)])
        assert layer.max_violation == pytest.approx(max(counts.values()) * 4 / len(choices) - 1)
        assert layer.dropped_share == pytest.approx(1 - len(served) / len(choices))
        sets = {token: {e for t, e, _ in served if t == token} for token in range(len(real)) if real[token]}
        assert layer.mean_active == pytest.approx(sum(map(len, sets.values())) / 27)
        assert layer.active.tolist() == [sum(len(s) == n for s in sets.values()) for n in range(5)]
        for a in range(4):
            for b in range(4):
                assert int(layer.together[a, b]) == sum({a, b} <= s for s in sets.values())
            weights = [weight for _, expert, weight in served if expert == a]
            assert float(layer.mean_weight[a]) == pytest.approx(sum(weights) / max(len(weights), 1), rel=1e-5)
    assert (statistics.layers[0].dropped_share > 0) == (kind == "capacity")
    assert (statistics.layers[0].active.count_nonzero() > 1) == (kind in ("top_p", "capacity"))


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_entropy_and_top_1_are_those_of_the_softmax(kind, padded):
    model = MODELS[kind]()
    real = padded["attention_mask"].flatten().bool()
    with torch.no_grad():
        logits = model(**padded, use_cache=False, output_router_logits=True).router_logits
    for layer, of_layer in zip(routing_statistics(model, [padded]).layers, logits, strict=True):
        p = of_layer.reshape(-1, 4)[real].double().softmax(-1)
        assert layer.entropy == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
        assert layer.top_1_probability == pytest.approx(float(p.amax(-1).mean()), rel=1e-5)


def test_batches_add_up_and_packed_documents_count_as_rows():
    model, ids = ours(), random_ids(2, 8)
    rows = routing_statistics(model, [{"input_ids": row} for row in ids])
    packed = {"input_ids": ids.view(1, -1), "position_ids": torch.arange(8).repeat(2)[None]}
    for other in (routing_statistics(model, [{"input_ids": ids}]), routing_statistics(model, [packed])):
        assert other.groups == rows.groups
        for one, two in zip(rows.layers, other.layers, strict=True):
            assert torch.equal(one.choices, two.choices) and torch.equal(one.together, two.together)
            assert torch.equal(one.groups["position"], two.groups["position"])


def test_groups_are_domains_positions_classes_and_ids(padded):
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["ab 12 , ab"] * 9}), vocab_size=265)
    model = tiny_native_moe("mixtral", vocab_size=len(tokenizer))
    languages = torch.tensor([0, 2, 0])
    batch = padded | {"language_ids": languages}
    statistics = routing_statistics(model, {"a": [batch], "b": [{"input_ids": random_ids(1, 4)}]}, tokenizer=tokenizer)
    assert statistics.groups["domain"] == ("a", "b") and statistics.groups["language"] == ("0", "2")
    layer, choices = statistics.layers[0], decisions_of(model, padded)["model.layers.0.mlp"]
    row_of = [languages[token // 12].item() for token, _, _ in choices]
    real = padded["attention_mask"].flatten().tolist()
    expected = torch.zeros(2, 4, dtype=torch.long)
    for (token, expert, _), language in zip(choices, row_of, strict=True):
        expected[language // 2, expert] += real[token]
    assert torch.equal(layer.groups["language"], expected)
    for kind in ("domain", "position", "token class"):
        assert torch.equal(layer.groups[kind].sum(0), layer.choices)
        assert len(layer.groups[kind]) == len(statistics.groups[kind])


def test_positions_start_anew_in_each_document_and_behind_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert positions_in_documents({"attention_mask": mask}, mask.shape).tolist() == [[0, 0, 0, 1, 2]]
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert positions_in_documents({"position_ids": packed}, packed.shape).tolist() == packed.tolist()
    bins = position_bins(torch.tensor([0, 1, 2, 3, 4, 7, 8, 16383, 16384, 10**6])).tolist()
    assert bins == [0, 1, 2, 2, 3, 3, 4, 14, 15, 15]
    names = position_names()
    assert [names[place] for place in (0, 1, 2, 14, 15)] == ["0", "1", "2-3", "8192-16383", "16384 and on"]


def test_token_classes_go_by_characters_alone():
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["word word 12 12 ,, ,,"] * 20}), vocab_size=290)
    classes = token_classes(tokenizer, 300)
    named = {
        token: TOKEN_CLASSES[classes[tokenizer.convert_tokens_to_ids(token)]]
        for token in ("\u0120word", "w", "12", ",", "\u0120", "\u010a", tokenizer.eos_token, "\u00e2")
    }
    assert list(named.values()) == [
        *("word start", "inside a word", "digits", "punctuation", "white space", "white space", "special", "other")
    ]
    assert classes[299] == TOKEN_CLASSES.index("other")


def test_specialisation_is_0_without_and_1_with_a_perfect_split():
    assert specialisation(torch.tensor([[10, 10], [30, 30]]))["share"] == pytest.approx(0, abs=1e-12)
    split = specialisation(torch.tensor([[20, 0], [0, 20]]))
    assert split["share"] == pytest.approx(1) and split["information"] == pytest.approx(math.log(2))
    assert split["chance"] == pytest.approx(1 / 80 / math.log(2))
    drawn = torch.randint(0, 24, (4000, 600), generator=torch.Generator().manual_seed(0))
    tables = torch.stack([(drawn == cell).sum(1) for cell in range(24)], 1).view(4000, 3, 8)
    found = [specialisation(table) for table in tables[:400]]
    means = [sum(one[name] for one in found) / 400 for name in ("share", "chance")]
    assert means[0] == pytest.approx(means[1], rel=0.1)
    assert group_lift(torch.tensor([[3, 1], [1, 3]])).tolist() == [[1.5, 0.5], [0.5, 1.5]]
    assert relative_load(torch.tensor([0, 4, 2])).tolist() == [0, 2, 1]


def test_dead_and_saturated_experts_are_named():
    model = ours(balance_strategy="bias")
    for layer in model.base_model.layers:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 0.0, 0.0, -9.0]))
    for layer in routing_statistics(model, [{"input_ids": random_ids()}]).layers:
        assert layer.saturated == [0] and layer.dead == [3] and float(layer.usage[0]) == 1
    everything = routing_statistics(ours(num_experts_per_tok=4), [{"input_ids": random_ids()}]).layers[0]
    assert everything.saturated == [] and everything.mean_active == 4 and everything.max_violation == 0


def test_change_is_none_against_itself_and_naive_against_another(padded):
    model, other = tiny_native_moe("mixtral"), tiny_native_moe("mixtral", seed=1)
    same = routing_statistics(model, [padded], against=model).changes
    assert all(change.overlap == change.same_set == change.same_first == 1 for change in same)
    real = padded["attention_mask"].flatten().tolist()
    of_both = [decisions_of(one, padded) for one in (model, other)]
    changes = routing_statistics(model, [padded], against=other).changes
    for name, change in zip(of_both[0], changes, strict=True):
        sets = [
            [{e for t, e, _ in choices[name] if t == token} for token in range(36) if real[token]]
            for choices in of_both
        ]
        pairs = list(zip(*sets, strict=True))
        assert change.overlap == pytest.approx(sum(len(a & b) for a, b in pairs) / sum(len(a | b) for a, b in pairs))
        assert change.same_set == pytest.approx(sum(a == b for a, b in pairs) / 27)
        for expert in range(4):
            kept = [expert in b for a, b in pairs if expert in a]
            assert float(change.kept[expert]) == pytest.approx(sum(kept) / len(kept))
    with pytest.raises(MoEError, match="the same layers"):
        routing_statistics(model, [padded], against=tiny_native_moe("mixtral", num_experts=6, num_local_experts=6))


@pytest.mark.parametrize("init", ["copy", "granular", "permute"])
def test_drift_is_0_at_the_start_and_the_relative_distance_after(init, padded):
    dense = tiny_dense("llama")
    fields = {"num_experts_per_tok": 4} if init == "granular" else {"noise": 0.1}
    moe = moe_hf.upcycle(dense, num_experts=8 if init == "granular" else 4, init=init, allow_inexact=True, **fields)
    assert all(float(row.max()) == 0 for row in routing_statistics(moe, [padded], origin=dense).drift)
    experts = moe.base_model.layers[1].mlp.experts
    with torch.no_grad():
        before = [experts.gate_up_proj[2].clone(), experts.down_proj[2].clone()]
        experts.down_proj[2] *= 1.5
    statistics = routing_statistics(moe, [padded], origin=dense)
    size = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in before))
    expected = 0.5 * float(before[1].double().norm()) / size
    assert float(statistics.drift[1][2]) == pytest.approx(expected, rel=1e-5)
    assert sum(float(row.sum()) for row in statistics.drift) == pytest.approx(expected, rel=1e-5)
    assert statistics.origin == "LlamaForCausalLM" and statistics.summary()["largest drift"] == pytest.approx(expected)


def test_drift_without_a_known_start_is_refused(padded):
    dense = tiny_dense("llama")
    with pytest.raises(MoEError, match="does not record how"):
        routing_statistics(tiny_native_moe("mixtral"), [padded], origin=dense)
    moe = moe_hf.upcycle(dense, num_experts=4)
    with pytest.raises(MoEError, match="does not have the MLPs"):
        routing_statistics(moe, [padded], origin=tiny_dense("llama", intermediate_size=96))
    with pytest.raises(MoEError, match="surgery"):
        routing_statistics(moe_hf.grow_experts(moe, copies=2), [padded], origin=dense)


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_memory_does_not_grow_with_the_text(kind):
    model, sizes = MODELS[kind](), []

    def batches(count):
        for step in range(count):
            if step in (3, count - 1):
                gc.collect()
                # Not those without numbers, which a test of plans may have left: they have no size to ask for.
                kinds = (torch.Tensor, torch.nn.Parameter)
                sizes.append(sum(t.nbytes for t in gc.get_objects() if type(t) in kinds))
            yield {"input_ids": random_ids(2, 16, seed=step)}

    statistics = routing_statistics(model, batches(40), against=model, sample_tokens=20)
    assert statistics.num_tokens == 40 * 32 and sizes[1] <= sizes[0]


def test_samples_are_the_first_tokens_and_their_expert_of_largest_weight(padded):
    model = ours()
    (sample,) = routing_statistics(model, {"a": [padded]}, sample_tokens=9).samples
    ids, mask = (padded[name].flatten() for name in ("input_ids", "attention_mask"))
    assert sample.token_ids == ids[mask.bool()][:9].tolist() and sample.experts.shape == (3, 9)
    for row, choices in zip(sample.experts, decisions_of(model, padded).values(), strict=True):
        first = [max((w, e) for t, e, w in choices if t == token)[1] for token in range(9)]
        assert row.tolist() == first


def test_the_mode_comes_back_hooks_go_and_max_tokens_stops(padded):
    model = ours().train()
    statistics = routing_statistics(model, {"a": [padded] * 5, "b": [padded] * 5}, max_tokens=28)
    assert statistics.num_tokens == 4 * 27 and model.training
    with pytest.raises(MoEError, match="no MoE block"):
        routing_statistics(model, [padded], against=tiny_dense("llama"))
    with pytest.raises(MoEError, match="no input_ids"):
        routing_statistics(model, [{"labels": padded["input_ids"]}])
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dense_models_and_no_tokens_are_refused(padded):
    with pytest.raises(MoEError, match="no MoE block"):
        routing_statistics(tiny_dense("llama"), [padded])
    for nothing in ([], {"a": []}, {}):
        with pytest.raises(MoEError, match="No token was counted"):
            routing_statistics(ours(), nothing)
    with pytest.raises(MoEError, match="whole numbers from 0 to 1023"):
        routing_statistics(ours(), [padded | {"task_ids": torch.tensor([0, 1, -1])}])
