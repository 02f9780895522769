"""Offloaded experts: memory is bounded by the cache, outputs are equal, and the experts used last stay."""

import copy
import gc
import json

import pytest
import torch

from moe_hf import MoEError
from moe_hf.finetuning import ExpertLoraConfig, add_expert_lora, find_moe_blocks
from moe_hf.inference import (
    cache_report,
    load_low_memory,
    model_bytes,
    offload_experts,
    quantize_experts,
    restore_experts,
    save_low_memory,
)
from moe_hf.inference.expert_cache import CachedMatrices, HostBacking
from moe_hf.inference.footprint import logits_of
from moe_hf.inference.quantize import expert_modules
from moe_hf.kernels import StoredExperts, run_in_place_of, stored_experts_forward, stored_maps
from moe_hf.saving import write_manifest
from tests.closeness import close
from tests.inference.test_quantize import tiny_upcycled
from tests.kernels.test_grouped_experts import relative_error
from tests.tiny_models import random_ids, tiny_native_moe


BUILDS = {"ours": tiny_upcycled, "mixtral": tiny_native_moe, "gpt_oss": lambda: tiny_native_moe("gpt_oss")}
BUILDS["other kinds beside"] = lambda: tiny_upcycled(extra_experts=["copy", "zero"], num_experts_per_layer=[4, 3, 4])
BUILDS["tied and biased"] = lambda: tiny_upcycled("gpt2")
CPU = torch.device("cpu")


def cached(capacity: int, num_experts: int = 3) -> CachedMatrices:
    weight = torch.randn(num_experts, 4, 5)
    backing = HostBacking({"matrix": weight}, CPU)
    return CachedMatrices(backing, None, (num_experts, 4, 5), torch.float32, CPU, capacity)


def sources(model) -> list[CachedMatrices]:
    blocks = find_moe_blocks(model).values()
    return [weight.source for block in blocks for weight in stored_maps(block.experts).values()]


def test_the_least_recently_used_expert_leaves():
    source = cached(2)
    order = []
    for expert in (0, 1, 0, 2, 1):
        assert torch.equal(source.matrix(expert), source.backing.parts["matrix"][expert])
        order.append((source.hits, source.misses))
    # 2 pushes out 1, whose last use was before that of 0; then 1 pushes out 0.
    assert order == [(0, 1), (0, 2), (1, 2), (1, 3), (1, 4)]
    assert set(source.at_hand()) == {1, 2}


def test_a_copy_that_fails_leaves_no_wrong_expert_behind(monkeypatch):
    source = cached(2)
    source.matrix(0), source.matrix(1)
    with monkeypatch.context() as patch:
        patch.setattr(source.backing, "copy", lambda *args: (_ for _ in ()).throw(OSError("no such file")))
        with pytest.raises(OSError, match="no such file"):
            source.matrix(2)
    for expert in (1, 2, 0, 1):
        assert torch.equal(source.matrix(expert), source.backing.parts["matrix"][expert])


@pytest.mark.numerics
@pytest.mark.parametrize("resident", [1, 2, 9])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_outputs_are_those_of_the_whole_model(build, resident):
    model, ids = build(), random_ids(2, 9)
    expected = logits_of(model, ids)
    double = copy.deepcopy(model).double()
    for experts in expert_modules(double).values():
        run_in_place_of(experts, stored_experts_forward)
    same_products = logits_of(double, ids)
    generated = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False)
    offload_experts(double, resident)
    offload_experts(model, resident)
    # In float64 both take one product per expert.
    assert close(logits_of(double, ids), same_products)
    assert relative_error(expected, logits_of(model, ids)) <= 1e-6
    assert torch.equal(model.generate(ids[:, :5], max_new_tokens=6, do_sample=False), generated)
    assert relative_error(expected, logits_of(restore_experts(model), ids)) <= 1e-6
    assert not any(isinstance(p, StoredExperts) for p in model.parameters())


def test_device_memory_is_bounded_by_the_resident_experts_whatever_the_text():
    model = tiny_native_moe("qwen3_moe", num_experts=8, num_local_experts=8)
    one_expert = sum(p[0].nbytes for p in next(iter(expert_modules(model).values())).parameters())
    whole, layers = model_bytes(model), len(find_moe_blocks(model))
    offload_experts(model, 3)
    held = [slots for source in sources(model) for slots in source.slots.values()]
    places = [slots.data_ptr() for slots in held]
    for seed in range(3):
        logits_of(model, random_ids(2, 30, seed=seed))
        assert sum(slots.nbytes for slots in held) == 3 * one_expert * layers
        assert [slots.data_ptr() for source in sources(model) for slots in source.slots.values()] == places
    # On a machine without a GPU the experts and the cache are in the same memory.
    assert model_bytes(model).experts == {"cpu": (8 + 3) * one_expert * layers}
    assert model_bytes(model).rest == whole.rest


def test_the_report_counts_hits_and_a_whole_cache_only_hits():
    model, ids = tiny_native_moe(), random_ids(2, 20)
    with pytest.raises(MoEError, match="not offloaded"):
        cache_report(model)
    offload_experts(model, 4)
    logits_of(model, ids)
    first = cache_report(model, reset=True)
    # All experts of all layers were chosen, each for both of its maps.
    assert sum(first.misses.values()) == 3 * 4 * 2 and first.hit_rate == 0
    logits_of(model, ids)
    assert cache_report(model).hit_rate == 1
    restore_experts(model)
    offload_experts(model, 2)
    for _ in range(3):
        logits_of(model, ids)
    # Those that are there come first: 2 of 4 hits from the second pass on, where the order of ids alone would have none.
    assert cache_report(model).hit_rate == pytest.approx(2 * 2 / (3 * 4))


@pytest.mark.numerics
@pytest.mark.parametrize("scheme", [None, "int8", "nf4"])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_folder_brings_the_model_back_whole_or_from_the_disk(build, scheme, tmp_path):
    model, ids = build(), random_ids(1, 9)
    if scheme is not None:
        quantize_experts(model, scheme)
    expected = logits_of(model, ids)
    folder = save_low_memory(model, tmp_path / "folder")
    with pytest.raises(OSError):
        type(model).from_pretrained(folder)
    with pytest.raises(MoEError, match="exists"):
        save_low_memory(model, folder)
    loaded = load_low_memory(folder)
    assert close(logits_of(loaded, ids), expected)
    assert model_bytes(loaded) == model_bytes(model)
    from_disk = load_low_memory(folder, resident_per_layer=2)
    assert relative_error(expected, logits_of(from_disk, ids)) <= 1e-6
    counted = model_bytes(from_disk).experts
    offload_experts(model, 2, from_disk=folder)
    assert relative_error(expected, logits_of(model, ids)) <= 1e-6
    assert model_bytes(model).experts == counted
    biases = sum(p.nbytes for m in expert_modules(model).values() for n, p in m.named_parameters() if "bias" in n)
    # Two experts of each layer are in memory, and all are on the disk.
    resident = sum(source.backing.nbytes()["disk"] * 2 // source.shape[0] for source in sources(model))
    assert counted["cpu"] - biases == resident < counted["disk"]
    in_host = load_low_memory(folder, resident_per_layer=1, from_disk=False)
    assert relative_error(expected, logits_of(in_host, ids)) <= 1e-6
    with pytest.raises(MoEError, match="Offloaded experts are not saved"):
        save_low_memory(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_plain_tensors_of_the_experts_are_freed_when_they_are_on_the_disk(tmp_path):
    model = tiny_upcycled()
    model.save_pretrained(tmp_path / "checkpoint")
    size = model.model.layers[0].mlp.experts.down_proj.untyped_storage().nbytes()
    offload_experts(model, 1, from_disk=tmp_path / "checkpoint")
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.ndim == 3]
    assert all(t.untyped_storage().nbytes() != size for t in alive if t.shape == (4, 48, 88))


def test_adapters_over_offloaded_experts_have_the_gradients_of_the_plain_model():
    ids, grads = random_ids(2, 9), []
    for offloaded in (True, False):
        model = tiny_native_moe()
        if offloaded:
            quantize_experts(model, "nf4")
            offload_experts(model, 1)
        else:
            quantize_experts(model, "nf4")
            restore_experts(model)
        add_expert_lora(model, ExpertLoraConfig(r=2))
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 0
    assert all(relative_error(grads[1][n], grads[0][n]) <= 1e-6 for n in grads[0])


def test_what_cannot_be_is_refused_and_leaves_the_model_alone(tmp_path):
    model, ids = tiny_native_moe(), random_ids(1, 5)
    expected = logits_of(model, ids)
    for resident in (0, 1.5, True):
        with pytest.raises(MoEError, match="resident_per_layer"):
            offload_experts(model, resident)
    model.save_pretrained(tmp_path / "per_expert_names")
    with pytest.raises(MoEError, match="save_low_memory"):
        offload_experts(model, 1, from_disk=tmp_path / "per_expert_names")
    save_low_memory(tiny_native_moe(seed=1), tmp_path / "another")
    with pytest.raises(MoEError, match="another model"):
        offload_experts(model, 1, from_disk=tmp_path / "another")
    assert torch.equal(logits_of(model, ids), expected)
    file = tmp_path / "another" / "weights" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(MoEError, match="truncated"):
        load_low_memory(tmp_path / "another")
    with pytest.raises(MoEError, match="low_memory|manifest"):
        load_low_memory(tmp_path / "per_expert_names")
    save_low_memory(model, tmp_path / "own")
    facts_file = tmp_path / "own" / "low_memory.json"
    facts = json.loads(facts_file.read_text())
    name = next(iter(facts["experts"]))
    for change, words in {
        "format_version": (2, "update it"),
        "class": ("AutoTokenizer", "neither moe_hf nor transformers"),
        "experts": ({name: facts["experts"][name] | {"shape": [4, 1, 1]}}, "do not fit"),
        "no experts": (None, "damaged"),
    }.items():
        changed = {} if change == "no experts" else facts | {change: words[0]}
        facts_file.write_text(json.dumps(changed))
        write_manifest(tmp_path / "own")
        with pytest.raises(MoEError, match=words[1]):
            load_low_memory(tmp_path / "own")
    offload_experts(model, 1)
    with pytest.raises(MoEError, match="offloaded already"):
        offload_experts(model, 1)
    with pytest.raises(MoEError, match="in their dtype"):
        model.double()
