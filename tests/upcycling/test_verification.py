"""Verification: models and folders give the same figures, in float32, one model after the other."""

from dataclasses import asdict

import pytest
import torch

from moe_hf import MoEError, upcycle, verify
from moe_hf.upcycling import verification
from moe_hf.upcycling.on_disk import layerwise
from moe_hf.upcycling.probe import RoutingRecorder, probe_routing
from tests.sampling import sampled
from tests.tiny_models import random_ids, tiny_dense, tiny_native_moe


pytestmark = pytest.mark.numerics


def save(folder, **models):
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return [folder / name for name in models]


@pytest.mark.parametrize(
    ("family", "dtype"),
    sampled(["llama", "gpt2", "opt", "falcon_h1"], {"float32": torch.float32, "bfloat16": torch.bfloat16}, share=2),
)
def test_folders_are_verified_as_models_are(family, dtype, tmp_path):
    dense = tiny_dense(family).to(dtype)
    moe = upcycle(dense, num_experts=4, noise=0.1)
    in_memory = verify(dense, moe, random_ids(1, 9))
    folders = save(tmp_path, dense=dense, moe=moe)
    on_disk = verify(*folders, random_ids(1, 9))
    assert on_disk.num_tokens == 2 * 64 + 9 and on_disk.first_difference == in_memory.first_difference is not None
    assert on_disk.relative_error == pytest.approx(in_memory.relative_error, rel=1e-4)
    assert on_disk.max_abs_error == pytest.approx(in_memory.max_abs_error, rel=1e-3)
    assert on_disk.rounding_error == pytest.approx(in_memory.rounding_error, rel=0.05)
    assert (on_disk.rounding_error > 1e-4) == (dtype == torch.bfloat16)
    assert verify(dense, str(folders[1])).relative_error == pytest.approx(verify(dense, moe).relative_error, rel=1e-4)


def test_an_exact_folder_is_exact_and_a_changed_one_names_its_layer(tmp_path):
    dense = tiny_dense("llama")
    moe = upcycle(dense, num_experts=4)
    folders = save(tmp_path, dense=dense, moe=moe)
    result = verify(*folders)
    assert result.exact and result.first_difference is None and result.rounding_error == 0
    with torch.no_grad():
        moe.model.layers[2].mlp.experts.down_proj.mul_(1.1)
    moe.save_pretrained(folders[1])
    result = verify(*folders)
    assert not result.exact and result.first_difference == "layers.2"


def test_the_first_different_layer_is_found_where_the_two_are_of_different_classes():
    moe = tiny_native_moe("mixtral")
    other = tiny_native_moe("mixtral")
    with torch.no_grad():
        other.model.layers[1].mlp.gate.weight.neg_()
    assert verify(moe, other).first_difference == "layers.1"
    dense = tiny_dense("llama")
    assert verify(dense, moe).first_difference == "layers.0"
    assert verify(dense, dense).first_difference is None


def test_two_models_are_never_in_memory_together(tmp_path, monkeypatch):
    """The weights of the dense model are all freed before the first of the MoE's are read."""
    dense = tiny_dense("llama").bfloat16()
    folders = save(tmp_path, dense=dense, moe=upcycle(dense, num_experts=4))
    opened = []

    def load_layerwise(folder, dtype=None):
        for _, model in opened:
            assert all(parameter.is_meta for parameter in model.parameters())
        opened.append((folder.name, layerwise.load_layerwise(folder, dtype)))
        return opened[-1][1]

    monkeypatch.setattr(verification, "load_layerwise", load_layerwise)
    assert verify(*folders).exact
    assert [(name, model.dtype) for name, model in opened] == [
        ("dense", torch.float32),
        ("dense", torch.bfloat16),
        ("moe", torch.float32),
    ]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_last_batch_of_the_moe_is_observed(where, tmp_path):
    dense = tiny_dense("llama")
    moe = upcycle(dense, num_experts=4)
    pair = save(tmp_path, dense=dense, moe=moe) if where == "disk" else (dense, moe)
    ids = random_ids(3, 11)
    recorder = RoutingRecorder()
    verify(*pair, ids, observe=recorder.watch)
    expected, found = probe_routing(moe, ids), recorder.result()
    assert found.num_tokens == 33 and all(map(torch.equal, found.tokens_per_expert, expected.tokens_per_expert))
    assert found.top_1_probability == pytest.approx(expected.top_1_probability, rel=1e-5)
    alone = RoutingRecorder()
    verify(*pair, observe=alone.watch)
    assert alone.result().num_tokens == 128


def test_models_are_put_back_as_they_were():
    dense = tiny_dense("llama").bfloat16().train()
    moe = upcycle(dense, num_experts=4).train()
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    verify(dense, moe)
    assert dense.training and moe.training and moe.dtype == dense.dtype == torch.bfloat16
    assert all(torch.equal(before[name], tensor) for name, tensor in moe.state_dict().items())
    assert not any(module._forward_hooks for module in [*dense.modules(), *moe.modules()])


def test_what_cannot_be_compared_is_refused(tmp_path):
    dense = tiny_dense("llama")
    with pytest.raises(MoEError, match="113 tokens and the MoE model 127"):
        verify(dense, tiny_dense("llama", vocab_size=127))
    with pytest.raises(MoEError, match="not a folder with a config.json"):
        verify(dense, tmp_path)
    with pytest.raises(MoEError, match="token ids"):
        verify(dense, dense, torch.randn(2, 3))


def test_figures_are_plain_values_for_the_metadata():
    result = verify(tiny_dense("llama"), tiny_dense("llama", seed=1))
    assert result.to_dict() == asdict(result) and result.relative_error > 0.1
