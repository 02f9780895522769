"""Laws of `upcycle_checkpoint`: the bytes of `upcycle` and `save_model`, without a whole model in memory."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import logging
from typer.testing import CliRunner

from moe_hf import MoEError, MoEForCausalLM, streaming, upcycle
from moe_hf.cli import app
from moe_hf.hub import save_model
from moe_hf.saving import verify_manifest
from moe_hf.streaming import upcycle_checkpoint
from moe_hf.upcycling.initialisers import INITIALISERS, Drop, Granular, Mix, Permute, Split
from moe_hf.upcycling.on_disk.dense_checkpoint import NotStreamableError
from moe_hf.upcycling.on_disk.weight_stream import _WORKERS
from moe_hf.weight_files import CheckpointReader
from moe_hf.weight_writer import FileWriter
from tests.hub.clients import tiny_tokenizer
from tests.sampling import sampled
from tests.tiny_models import random_ids, tiny_dense


FAMILIES = {
    "llama": {},
    "gpt2": {},
    "phi3": {},
    "gemma2": {},
    "qwen2": {"tie_word_embeddings": True},
    "falcon_h1": {},
    "opt": {},
    "apertus": {},
}
INITS = {
    "drop": Drop(ratio=0.3),
    "drop, own indices": Drop(shared_indices=False),
    "permute": Permute(ratio=0.1),
    "granular": Granular(shards=2, permute=True),
    "split": Split(),
    "split, k-means": Split(by="kmeans"),
}
FIELDS = {
    "cosine router": {"router_arch": "cosine"},
    "fewer experts below, gated by softmax": {
        "num_experts_per_layer": [2, 4, 4],
        "shared_expert_intermediate_size": 88,
        "shared_expert_gate": "softmax",
    },
    "tasks": {"routing_level": "task", "num_tasks": 3},
    "bias and learned noise": {"balance_strategy": "bias", "router_noise": "learned", "router_noise_affects": "both"},
    "shared expert": {"shared_expert_intermediate_size": 88, "shared_expert_gate": True, "shared_share": 0.25},
    "narrow shared expert, noise": {"shared_expert_intermediate_size": 40, "noise": 0.1},
    "first layer dense": {"first_k_dense_replace": 1, "noise": 0.05},
    "wider experts": {"moe_intermediate_size": 104, "noise": 0.05},
    "dense layer before": {"moe_dense_ffn": "before", "noise": 0.05},
    "dense layer after, fewer experts below": {"moe_dense_ffn": "after", "num_experts_per_layer": [2, 4, 4]},
    "predictions mixed": {"router_type": "dense", "num_experts_per_tok": 4, "output_mixture": "likelihood"},
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
}


def _files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _assert_equal_to_memory(source, tmp_path, tokenizer=None, max_shard_size="60KB", **arguments) -> Path:
    """Each file that both ways write has the same bytes, the card and the figures of the verification included."""
    save_model(upcycle(source, **arguments), tokenizer, tmp_path / "memory", max_shard_size=max_shard_size)
    path = upcycle_checkpoint(source, tmp_path / "streamed", max_shard_size=max_shard_size, **arguments)
    expected, actual = _files(tmp_path / "memory"), _files(path)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if actual[name] != expected[name]] == []
    verify_manifest(path)
    assert sorted(entry.name for entry in tmp_path.iterdir() if "partial" in entry.name) == []
    return path


def _saved(tmp_path: Path, family: str = "llama", dtype=torch.float32, **overrides) -> Path:
    tiny_dense(family, **overrides).to(dtype).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("family", "arguments"),
    sampled(FAMILIES.keys(), {"copy, one file": {"max_shard_size": "5GB"}, "noise, shards": {"noise": 0.1}}, share=2),
)
def test_each_family_has_the_bytes_of_the_model_in_memory(tmp_path, family, arguments):
    _assert_equal_to_memory(_saved(tmp_path, family, **FAMILIES[family]), tmp_path, num_experts=4, **arguments)


@pytest.mark.parametrize(("init", "family"), sampled(INITS.keys(), ["llama", "gpt2"], share=2))
def test_each_initialiser_has_the_bytes_of_the_model_in_memory(tmp_path, family, init):
    # A width whose quarters the CPU's grouped_mm takes in 16 bits.
    source = _saved(tmp_path, family, torch.bfloat16, **{"n_inner" if family == "gpt2" else "intermediate_size": 96})
    _assert_equal_to_memory(source, tmp_path, num_experts=4, init=INITS[init], allow_inexact=True)


def test_no_initialiser_is_left_out():
    assert {init.name for init in INITS.values()} | {"copy", "mix"} == set(INITIALISERS)


@pytest.mark.parametrize("init", [Split(by="coactivation"), Split(by="importance")], ids=lambda init: init.by)
def test_methods_that_look_at_data_see_the_same_hidden_states(tmp_path, init):
    source = _saved(tmp_path, intermediate_size=96)
    _assert_equal_to_memory(source, tmp_path, num_experts=4, init=init, inputs=random_ids(4, 40))


@pytest.mark.parametrize(("rest", "family"), sampled(["average", "base"], ["llama", "apertus"], share=2))
def test_experts_of_several_checkpoints_have_the_bytes_of_the_model_in_memory(tmp_path, family, rest):
    source = _saved(tmp_path, family, torch.bfloat16)
    tiny_dense(family, seed=1).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    _assert_equal_to_memory(source, tmp_path, num_experts=4, init=Mix(sources=[tmp_path / "other"], rest=rest))


@pytest.mark.parametrize(("fields", "family"), sampled(FIELDS.keys(), ["llama", "starcoder2"], share=2))
def test_each_layout_of_a_block_has_the_bytes_of_the_model_in_memory(tmp_path, family, fields):
    arguments = {"num_experts": 4, **FIELDS[fields]}
    _assert_equal_to_memory(_saved(tmp_path, family), tmp_path, allow_inexact=True, **arguments)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_checkpoint_stored_in_another_dtype_than_its_config_names_is_cast_as_in_memory(tmp_path, dtype):
    source = _saved(tmp_path, "gemma2")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    _assert_equal_to_memory(source, tmp_path, num_experts=2)


def test_old_names_on_the_disk_are_read_as_transformers_reads_them(tmp_path):
    source = _saved(tmp_path, "gpt2")
    file = source / "model.safetensors"
    old = {}
    for name, tensor in load_file(file).items():
        old[name.removeprefix("transformer.")] = tensor
    # The mask is a tensor that old versions stored, and that the model has no place for.
    save_file(old | {"h.0.attn.bias": torch.ones(4)}, file, metadata={"format": "pt"})
    _assert_equal_to_memory(source, tmp_path, num_experts=2)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_weights_are_read_under_either_name(tmp_path, kept):
    source = _saved(tmp_path, "qwen2", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    embeddings = tensors.pop("model.embed_tokens.weight")
    names = ["model.embed_tokens.weight", "lm_head.weight"] if kept == "both" else [kept]
    tensors |= {name: embeddings.clone() for name in names}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    _assert_equal_to_memory(source, tmp_path, num_experts=2)


def test_the_tokenizer_comes_along_and_must_fit(tmp_path):
    tokenizer = tiny_tokenizer()
    source = _saved(tmp_path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    path = _assert_equal_to_memory(source, tmp_path, tokenizer, num_experts=2)
    assert AutoTokenizer.from_pretrained(path).get_vocab() == tokenizer.get_vocab()
    tokenizer.add_tokens(["unheard", "of"])
    tokenizer.save_pretrained(source)
    with pytest.raises(MoEError, match="it is not this model's"):
        upcycle_checkpoint(source, tmp_path / "other", num_experts=2)
    assert not (tmp_path / "other").exists()


def test_exact_copies_are_made_without_reading_the_experts(tmp_path, monkeypatch):
    source = _saved(tmp_path, dtype=torch.bfloat16)
    read, asked = CheckpointReader.read, []

    def watched(self, name, *rows):
        asked.append(name)
        return read(self, name, *rows)

    monkeypatch.setattr(CheckpointReader, "read", watched)
    path = upcycle_checkpoint(source, tmp_path / "moe", num_experts=4, verify=False)
    assert asked == []
    dense, moe = load_file(source / "model.safetensors"), load_file(path / "model.safetensors")
    gate = moe["model.layers.1.mlp.experts.gate_up_proj"][3, :88]
    assert torch.equal(gate, dense["model.layers.1.mlp.gate_proj.weight"])


def test_two_files_at_most_are_unfinished_so_that_a_kill_loses_no_more(tmp_path, monkeypatch):
    source, unfinished, most, read = _saved(tmp_path), set(), [], os.preadv

    class Counted(FileWriter):
        def __init__(self, *args):
            super().__init__(*args)
            unfinished.add(self.path)
            most.append(len(unfinished))

        def close(self):
            super().close()
            unfinished.discard(self.path)

    def slowly(*args):
        time.sleep(0.005)
        return read(*args)

    monkeypatch.setattr(streaming, "FileWriter", Counted)
    monkeypatch.setattr(os, "preadv", slowly)
    upcycle_checkpoint(source, tmp_path / "moe", num_experts=4, max_shard_size="20KB", verify=False)
    assert len(most) > 4 and max(most) == 2


def test_figures_are_in_the_config_only_when_it_was_verified(tmp_path):
    source = _saved(tmp_path)
    path = upcycle_checkpoint(source, tmp_path / "verified", num_experts=2)
    figures = MoEForCausalLM.from_pretrained(path).config.upcycling["verification"]
    assert figures["relative_error"] <= 1e-6 and figures["num_tokens"] == 128
    path = upcycle_checkpoint(source, tmp_path / "unverified", num_experts=2, verify=False)
    assert json.loads((path / "config.json").read_text())["upcycling"]["verification"] is None


def test_a_result_that_should_be_exact_and_is_not_is_not_published(tmp_path):
    source = _saved(tmp_path)
    arguments = {"num_experts": 4, "norm_topk_prob": False}
    with pytest.raises(MoEError, match="Pass allow_inexact=True"):
        upcycle_checkpoint(source, tmp_path / "moe", **arguments)
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]
    path = upcycle_checkpoint(source, tmp_path / "moe", allow_inexact=True, **arguments)
    figures = json.loads((path / "config.json").read_text())["upcycling"]["verification"]
    assert figures["relative_error"] > 1e-3


def test_progress_is_told_in_bytes_up_to_the_total(tmp_path):
    told = []
    path = upcycle_checkpoint(
        _saved(tmp_path),
        tmp_path / "moe",
        num_experts=4,
        noise=0.1,
        verify=False,
        max_shard_size="60KB",
        progress=lambda done, total: told.append((done, total)),
    )
    index = json.loads((path / "model.safetensors.index.json").read_text())
    done, total = zip(*told, strict=True)
    assert set(total) == {index["metadata"]["total_size"]}
    assert list(done) == sorted(set(done)) and done[-1] == total[-1]


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_is_shown_as_transformers_progress_bars_are(tmp_path, capsys, shown):
    source = _saved(tmp_path)
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    capsys.readouterr()
    try:
        upcycle_checkpoint(source, tmp_path / "moe", num_experts=2, verify=False)
    finally:
        logging.enable_progress_bar()
    captured = capsys.readouterr()
    assert ("Writing experts: 100%" in captured.err) == shown
    assert captured.out == ""


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        ("falcon_h1", {"mlp_multipliers": [0.7, 1.3]}, "computes something that one expert does not"),
        ("gemma3n_text", {"activation_sparsity_pattern": [0.95, 0.0, 0.0]}, "one expert does not"),
        ("bitnet", {}, "an expert has no place for"),
        ("mixtral", {}, "already has experts"),
    ],
)
def test_what_upcycle_refuses_is_refused_without_reading_numbers(tmp_path, family, overrides, said):
    source = _saved(tmp_path, family, **overrides)
    with pytest.raises(MoEError, match=said):
        upcycle_checkpoint(source, tmp_path / "moe", verify=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]


def _without(tensors, name):
    del tensors[name]


def _of_another_shape(tensors, name):
    tensors[name] = tensors[name][1:].clone()


@pytest.mark.parametrize(
    ("change", "said"),
    [(_without, "no tensor for"), (_of_another_shape, r"is \(87, 48\), and the config asks for \(88, 48\)")],
    ids=["missing", "other shape"],
)
def test_files_that_do_not_fit_the_config_are_named(tmp_path, change, said):
    source = _saved(tmp_path)
    tensors = load_file(source / "model.safetensors")
    change(tensors, "model.layers.1.mlp.up_proj.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoEError, match=said):
        upcycle_checkpoint(source, tmp_path / "moe")


def test_a_layout_that_is_converted_while_loading_is_refused_with_advice(tmp_path, monkeypatch):
    from transformers.core_model_loading import Transpose, WeightConverter

    converter = WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", operations=[Transpose(0, 1)])
    monkeypatch.setattr(
        "moe_hf.upcycling.on_disk.dense_checkpoint.get_model_conversion_mapping", lambda model: [converter]
    )
    source = _saved(tmp_path)
    with pytest.raises(NotStreamableError, match="in another layout .* moe_hf.upcycle"):
        upcycle_checkpoint(source, tmp_path / "moe")
    result = CliRunner().invoke(app, ["upcycle", str(source), str(tmp_path / "moe"), "--num-experts", "2"])
    assert result.exit_code == 0 and "converted in memory" in result.stderr
    assert MoEForCausalLM.from_pretrained(tmp_path / "moe").config.upcycling["verification"]["relative_error"] <= 1e-6


def test_quantized_and_moe_sources_are_refused(tmp_path):
    source = _saved(tmp_path)
    path = upcycle_checkpoint(source, tmp_path / "moe", num_experts=2, verify=False)
    with pytest.raises(MoEError, match="is a moe_hf model already"):
        upcycle_checkpoint(path, tmp_path / "twice")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(MoEError, match="is quantized by gptq"):
        upcycle_checkpoint(source, tmp_path / "other")


def test_a_hub_id_is_fetched_first_and_a_path_is_not(tmp_path, monkeypatch):
    source = _saved(tmp_path)
    asked = []
    monkeypatch.setattr(
        "moe_hf.source_folders.snapshot_download", lambda name, **options: asked.append(name) or source
    )
    path = upcycle_checkpoint("somebody/dense", tmp_path / "moe", num_experts=2, verify=False)
    assert asked == ["somebody/dense"]
    assert json.loads((path / "config.json").read_text())["upcycling"]["source"] == "somebody/dense"
    with pytest.raises(MoEError, match="is not a folder"):
        upcycle_checkpoint(tmp_path / "absent", tmp_path / "other")


MEMORY_PROGRAM = r"""
import re, sys, torch
from moe_hf.streaming import upcycle_checkpoint
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
# The first product takes some megabytes for good, whatever it multiplies.
torch.ones(40, 40, dtype=torch.float64) @ torch.ones(40, 40, dtype=torch.float64)
before = peak()
upcycle_checkpoint(sys.argv[1], sys.argv[2], num_experts=int(sys.argv[3]), noise=float(sys.argv[4]), verify=False)
print(peak() - before)
"""


@pytest.mark.parametrize("noise", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_memory_is_that_of_one_tensor_whatever_the_number_of_experts(tmp_path, noise):
    # One projection has 16 MiB, and the MoE of 8 experts 0.4 GiB.
    source = _saved(tmp_path, hidden_size=960, intermediate_size=4352, num_hidden_layers=1)
    grown = {}
    for num_experts in (2, 8):
        output = tmp_path / f"moe-{num_experts}"
        program = [sys.executable, "-c", MEMORY_PROGRAM, str(source), str(output), str(num_experts), str(noise)]
        result = subprocess.run(program, capture_output=True, text=True, check=True)
        grown[num_experts] = int(re.findall(r"\d+", result.stdout)[-1])
    # What each thread has in hand comes on top.
    assert max(grown.values()) <= (64 + 8 * _WORKERS) << 20
    # One projection more or less is at hand when the threads take turns differently.
    assert grown[8] <= grown[2] + ((16 + 8) << 20)
