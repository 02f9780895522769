"""The probe of the routers: its figures against a loop over tokens, when it warns, and when it cannot tell."""

import math
from dataclasses import replace

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle
from moe_hf.reporting.routing_statistics import routing_statistics
from moe_hf.upcycling.probe import RoutingProbe, RoutingRecorder, probe_routing
from tests.tiny_models import random_ids, tiny_dense, tiny_native_moe


def probe_of(counts, num_tokens, top=0.5, layers=1) -> RoutingProbe:
    names = tuple(f"layers.{index}.mlp" for index in range(layers))
    tokens = torch.tensor(counts).expand(layers, -1)
    return RoutingProbe(num_tokens, names, (top,) * layers, (0.5,) * layers, tokens, (frozenset(),) * layers)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_figures_equal_a_loop_over_tokens(scoring_func):
    moe = upcycle(tiny_dense("llama"), num_experts=5, scoring_func=scoring_func)
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 8:] = 0
    probe = probe_routing(moe, ids, mask)
    with torch.no_grad():
        logits = moe(ids, attention_mask=mask, output_router_logits=True).router_logits
    assert probe.num_tokens == 32 and probe.layers == tuple(f"model.layers.{i}.mlp" for i in range(3))
    for layer, raw in enumerate(logits):
        top, entropy, counts = 0.0, 0.0, [0] * 5
        for row in raw[mask.flatten().bool()].double():
            scores = row.softmax(-1) if scoring_func == "softmax" else row.sigmoid() / row.sigmoid().sum()
            top += float(scores.max()) / 32
            entropy -= sum(float(p) * math.log(p) for p in scores) / math.log(5) / 32
            for expert in row.topk(2).indices.tolist():
                counts[expert] += 1
        assert probe.top_1_probability[layer] == pytest.approx(top, rel=1e-5)
        assert probe.entropy[layer] == pytest.approx(entropy, rel=1e-5)
        assert probe.tokens_per_expert[layer].tolist() == counts


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_native_models_are_probed_too(family):
    probe = probe_routing(tiny_native_moe(family), random_ids(2, 16))
    assert probe.num_tokens == 32 and [int(row.sum()) for row in probe.tokens_per_expert] == [64] * len(probe.layers)
    assert all(0.25 < top < 1 for top in probe.top_1_probability) and all(0 < e < 1 for e in probe.entropy)


def test_shards_of_one_copy_count_together():
    moe = upcycle(tiny_dense("llama"), num_experts=4)
    with torch.no_grad():
        for layer in moe.model.layers:
            rows = 50 * torch.randn(2, 48)
            layer.mlp.gate.weight.copy_(rows.repeat_interleave(2, 0))
    assert min(probe_routing(moe, random_ids(2, 16)).top_1_probability) > 0.95


def test_a_saturated_router_is_named():
    assert probe_of([4, 4], 4, top=0.9).warnings() == []
    message = probe_of([4, 4], 4, top=0.91, layers=6).warnings()[0]
    assert "layers.0.mlp, layers.1.mlp, layers.2.mlp, layers.3.mlp and 2 more layers is saturated" in message
    assert "0.91" in message and 'router_init="entropy"' in message
    assert probe_of([4], 4, top=1.0).warnings() == []


def test_experts_that_get_no_token_are_named_when_the_tokens_are_enough_to_tell():
    assert probe_of([64, 64, 128, 0], 128).never_reached == {"layers.0.mlp": [3]}
    message = probe_of([64, 64, 128, 0], 128, layers=2).warnings()[0]
    assert message.startswith("2 of 8 experts got none of the probe's 128 tokens: layers.0.mlp [3], layers.1.mlp [3].")
    # 4 experts, 2 per token: with 5 tokens an even router misses one of them in 4 / 2^5 of the probes.
    few = probe_of([5, 5, 0, 0], 5)
    assert not few.is_large_enough and few.never_reached == {} and few.warnings() == []


def test_random_tokens_accuse_no_router():
    """They reach other experts than any text does; what they say of a saturated router holds."""
    random = replace(probe_of([64, 64, 128, 0], 128, top=0.95), is_text=False)
    assert random.is_large_enough and not random.can_tell_unreached and random.never_reached == {}
    assert len(random.warnings()) == 1 and "saturated" in random.warnings()[0]
    dense = tiny_dense("llama")
    without_text = upcycle(dense, num_experts=4).config.upcycling["routing"]
    on_text = upcycle(dense, num_experts=4, inputs=random_ids(4, 64)).config.upcycling["routing"]
    assert not without_text["can_tell_unreached"] and on_text["can_tell_unreached"]
    assert (without_text["num_tokens"], on_text["num_tokens"]) == (2 * 64, 4 * 64)


@pytest.mark.parametrize(
    ("num_experts", "layers", "enough"), [(8, 32, True), (16, 32, True), (32, 32, False), (128, 1, False)]
)
def test_how_many_experts_128_tokens_can_tell(num_experts, layers, enough):
    counts = [256 // num_experts] * num_experts
    assert probe_of(counts, 128, layers=layers).is_large_enough is enough


def test_even_routers_are_not_accused():
    """Over 300 even routers of 16 experts, 2 per token, the rule holds its 1%."""
    generator = torch.Generator().manual_seed(0)
    accused = 0
    for _ in range(300):
        choices = torch.rand(80, 16, generator=generator).topk(2).indices
        counts = choices.flatten().bincount(minlength=16)
        probe = RoutingProbe(80, ("layer",), (0.5,), (0.5,), counts[None], (frozenset(),))
        assert probe.is_large_enough
        accused += bool(probe.never_reached)
    assert accused <= 6


def test_experts_closed_by_design_are_not_missed():
    dense, ids = tiny_dense("llama"), random_ids(8, 64)
    closed = upcycle(dense, num_experts=6, expert_groups={"language": [[0, 1, 2], [3, 4, 5]]}, verify_inputs=ids)
    assert closed.config.upcycling["routing"]["can_tell_unreached"]
    assert closed.config.upcycling["routing"]["never_reached"] == {}
    with torch.no_grad():
        closed.model.layers[1].mlp.gate.weight[1] = 0
        closed.model.layers[1].mlp.gate.weight[[0, 2]] = torch.randn(1, 48).expand(2, -1).mul(9)
    recorder = RoutingRecorder()
    with torch.no_grad(), recorder.watch(closed):
        closed(ids, language_ids=torch.zeros(8, dtype=torch.long))
    probe = recorder.result()
    assert probe.closed == (frozenset({3, 4, 5}),) * 3
    assert all(set(experts) <= {0, 1, 2} for experts in probe.never_reached.values())


def test_a_router_without_preference_is_not_saturated():
    moe = upcycle(tiny_dense("llama"), num_experts=4)
    with torch.no_grad():
        for layer in moe.model.layers:
            layer.mlp.gate.weight.zero_()
    probe = probe_routing(moe, random_ids(2, 30))
    assert probe.top_1_probability == pytest.approx((0.25,) * 3) and not probe.saturated


def test_the_recorder_adds_up_passes_and_leaves_no_hooks():
    moe = upcycle(tiny_dense("gpt2"), num_experts=4).train()
    ids = random_ids(4, 10)
    recorder = RoutingRecorder()
    moe.eval()
    with torch.no_grad(), recorder.watch(moe):
        moe(ids[:1])
        moe(ids[1:])
    whole = probe_routing(moe.train(), ids)
    assert moe.training and not any(module._forward_hooks for module in moe.modules())
    assert all(map(torch.equal, recorder.result().tokens_per_expert, whole.tokens_per_expert))
    assert recorder.result().entropy == pytest.approx(whole.entropy, rel=1e-6)
    facts = whole.to_dict()
    assert len(facts["entropy"]) == 3 and facts["num_tokens"] == 40 and isinstance(facts["never_reached"], dict)


def test_what_has_no_routing_is_refused():
    with pytest.raises(MoEError, match="no MoE block"):
        probe_routing(tiny_dense("llama"), random_ids(1, 4))
    with pytest.raises(MoEError, match="token ids"):
        probe_routing(upcycle(tiny_dense("llama"), num_experts=2), torch.randn(1, 4))
    with pytest.raises(MoEError, match="No forward pass"):
        RoutingRecorder().result()


def test_warnings_are_logged(caplog):
    probe_of([64, 64, 128, 0], 128, top=0.95).warn()
    assert "saturated" in caplog.text and "got none" in caplog.text


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"router_type": "segment_merge", "num_experts_per_tok": 4, "router_kwargs": {"segment_length": 3}}, 1),
        ({"num_moe_heads": 4, "moe_intermediate_size": 16}, 4),
        ({"router_type": "top_p"}, 1),
    ],
    ids=["merged segments", "sub-tokens", "flat rows"],
)
def test_padding_is_left_out_whatever_the_router_returns(fields, rows):
    torch.manual_seed(0)
    config = MoEConfig(text_config=tiny_dense("llama").config, num_experts=4, **fields)
    moe = MoEForCausalLM(config).eval()
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    probe = probe_routing(moe, ids, mask)
    layers = routing_statistics(moe, [{"input_ids": ids, "attention_mask": mask}]).layers
    assert probe.num_tokens == rows * 19
    assert torch.equal(torch.stack(probe.tokens_per_expert), torch.stack([layer.choices for layer in layers]))
    with torch.no_grad():
        logits = moe(ids, attention_mask=mask, output_router_logits=True).router_logits
    real = mask.flatten().bool().repeat_interleave(rows)
    for layer, raw in enumerate(logits):
        scores = raw[real].softmax(-1)
        assert probe.top_1_probability[layer] == pytest.approx(float(scores.max(-1).values.mean()), rel=1e-5)
    if fields.get("router_type") != "top_p":
        # K choices of each row: all of its experts, or two of them.
        per_row = 4 if "router_type" in fields else 2
        assert [int(layer.choices.sum()) for layer in layers] == [rows * 19 * per_row] * len(probe.layers)
