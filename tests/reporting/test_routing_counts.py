"""Counting and drawing the routing."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import moe_hf
from moe_hf.errors import MoEError
from moe_hf.reporting.plots import plot_routing
from moe_hf.reporting.routing_counts import RoutingCounts, count_routing


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def _ours() -> torch.nn.Module:
    torch.manual_seed(0)
    return moe_hf.upcycle(LlamaForCausalLM(LlamaConfig(**SIZES)), num_experts=4)


def _mixtral() -> torch.nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def _counts_from_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One token and one layer at a time, from the router logits that the model returns; (L, E)."""
    with torch.no_grad():
        layers = model(**batch, output_router_logits=True, use_cache=False).router_logits
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).reshape(-1)
    counts = torch.zeros(len(layers), layers[0].shape[-1], dtype=torch.int64)
    for layer, logits in enumerate(layers):
        for token, scores in enumerate(logits.reshape(mask.numel(), -1)):
            for expert in scores.topk(2).indices.tolist():
                counts[layer, expert] += int(mask[token])
    return counts


@pytest.mark.parametrize("build", [_ours, _mixtral], ids=["ours", "native mixtral"])
def test_counts_equal_a_naive_count_of_the_router_logits(build):
    model = build().eval()
    first = {"input_ids": torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))}
    second = {"input_ids": torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(2))}
    counts = count_routing(model, {"a": [first, second], "b": [second]})
    expected = [_counts_from_logits(model, batch) for batch in (first, second)]
    assert counts.domains == ("a", "b")
    assert torch.equal(counts.counts, torch.stack([expected[0] + expected[1], expected[1]]))


def test_padding_is_not_counted_and_labels_are_not_passed_on():
    model = _ours()
    ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    counts = count_routing(model, {"a": [{"input_ids": ids, "attention_mask": mask, "labels": ids}]})
    expected = _counts_from_logits(model, {"input_ids": ids, "attention_mask": mask})
    assert torch.equal(counts.counts[0], expected)
    assert counts.counts.sum(-1).tolist() == [[2 * 13, 2 * 13]]


def test_counting_leaves_the_mode_and_no_hooks_behind():
    model = _ours().train()
    count_routing(model, {"a": [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}]})
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_load_is_one_everywhere_when_the_experts_share_evenly():
    counts = RoutingCounts(("a", "b"), ("x",), torch.tensor([[[3, 3, 3]], [[0, 4, 2]]]))
    assert counts.load_by_domain()[0].tolist() == [[1.0, 1.0, 1.0]]
    assert counts.load_by_domain()[1].tolist() == [[0.0, 2.0, 1.0]]
    assert counts.load().tolist() == [[0.6, 1.4, 1.0]]


def test_dense_model_and_no_domain_are_refused():
    with pytest.raises(MoEError, match="no MoE block"):
        count_routing(LlamaForCausalLM(LlamaConfig(**SIZES)), {"a": []})
    with pytest.raises(MoEError, match="No domain"):
        count_routing(_ours(), {})


def test_plot_is_a_png_of_load_by_layer_and_by_domain(tmp_path):
    counts = RoutingCounts(("a", "b"), ("x", "y"), torch.randint(0, 9, (2, 2, 4)))
    path = plot_routing(counts, tmp_path / "routing.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
