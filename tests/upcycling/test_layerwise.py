"""Models run layer by layer from the disk: the same logits, every tensor freed, memory of one layer, clear refusals."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_hf import MoEError, upcycle
from moe_hf.upcycling.on_disk.layerwise import load_layerwise
from tests.closeness import close
from tests.families import FAMILIES
from tests.tiny_models import random_ids, tiny_config, tiny_dense, tiny_native_moe


# Fused and inline MLPs, tied heads, names without a prefix, mixers whose children are read without being called, soft
# caps, experts that are stacked while they are loaded.
CASES = {
    "llama": {},
    "gpt2": {"tie_word_embeddings": True},
    "phi3": {},
    "gemma2": {"tie_word_embeddings": True},
    "opt": {},
    "falcon_h1": {},
    "jamba": {},
    "mixtral": {},
    "glm4_moe": {},
}


def model_of(family, **fields):
    return tiny_native_moe(family, **fields) if family in ("mixtral", "glm4_moe") else tiny_dense(family, **fields)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def check_equal(folder, dtype=None):
    ids = random_ids(2, 20)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval(), ids)
    model = load_layerwise(folder, dtype)
    first, again = logits_of(model, ids), logits_of(model, ids)
    assert close(first, expected) and close(again, expected)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.numerics
@pytest.mark.parametrize("family", CASES)
def test_logits_are_those_of_the_loaded_model(family, tmp_path):
    model = model_of(family, **CASES[family])
    model.save_pretrained(tmp_path, max_shard_size="90KB")
    layerwise = check_equal(tmp_path).layerwise
    # 3 layers and the embedding.
    assert 0 < layerwise.peak_bytes < 0.45 * sum(p.nbytes for p in model.parameters())


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_h1", "mixtral"])
def test_a_16_bit_checkpoint_runs_in_float32_too(family, tmp_path):
    model_of(family).bfloat16().save_pretrained(tmp_path)
    check_equal(tmp_path)
    check_equal(tmp_path, torch.float32)


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon_h1"])
def test_this_packages_models_run_layer_by_layer(family, tmp_path):
    moe = upcycle(tiny_dense(family), num_experts=4, shared_expert_intermediate_size=88, shared_expert_gate=True)
    moe.save_pretrained(tmp_path, max_shard_size="200KB")
    check_equal(tmp_path)


@pytest.mark.numerics
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_dense_family_runs_layer_by_layer(family, tmp_path):
    tiny_dense(family).save_pretrained(tmp_path)
    check_equal(tmp_path)


@pytest.mark.numerics
def test_a_checkpoint_without_the_heads_prefix_is_read(tmp_path):
    # As the original files of gpt2 are: `h.0...` in place of `transformer.h.0...`, and no head.
    dense = tiny_dense("gpt2", tie_word_embeddings=True)
    dense.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in dense.state_dict().items()}
    del tensors["lm_head.weight"]
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    check_equal(tmp_path)


def test_weights_are_freed_after_an_error_too(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path)
    model = load_layerwise(tmp_path)

    def fail(*_):
        raise RuntimeError("in a layer")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in a layer"):
        logits_of(model, random_ids(1, 4))
    assert all(parameter.is_meta for parameter in model.parameters())
    handle.remove()
    assert logits_of(model, random_ids(1, 4)).isfinite().all()


def broken(folder, how):
    tiny_dense("llama").save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if how == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif how == "shape":
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(88, 47)
    else:
        file.unlink()
        return
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no tensors for .*layers.1.mlp.up_proj"),
        ("shape", r"up_proj.weight \(88, 48\) cannot be made from .*\(88, 47\)"),
        ("file", "safetensors"),
    ],
)
def test_a_broken_checkpoint_is_refused(how, message, tmp_path):
    broken(tmp_path, how)
    with pytest.raises(MoEError, match=message):
        logits_of(load_layerwise(tmp_path), random_ids(1, 4))
    with pytest.raises(MoEError):
        load_layerwise(tmp_path / "nowhere")


PEAK_PROGRAM = """
import json, resource, sys
import torch
from moe_hf.upcycling.on_disk.layerwise import load_layerwise
import transformers.models.llama.modeling_llama

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
model = load_layerwise(sys.argv[1], getattr(torch, sys.argv[2]))
with torch.no_grad():
    logits = model(torch.arange(64).view(2, 32), use_cache=False).logits
print(json.dumps({"grown": peak() - before, "held": model.layerwise.peak_bytes, "norm": float(logits.float().norm())}))
"""


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_memory_is_that_of_one_layer_and_not_of_the_checkpoint(dtype, tmp_path):
    """12 layers, 258 MiB in float32; a bfloat16 checkpoint is run in float32."""
    sizes = {"hidden_size": 640, "intermediate_size": 1792, "head_dim": 64, "num_attention_heads": 10}
    config = tiny_config("llama", num_hidden_layers=12, num_key_value_heads=10, vocab_size=4000, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    total = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    command = [sys.executable, "-c", PEAK_PROGRAM, str(tmp_path), "float32"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert total > 250 << 20 and result["held"] < total / 10
    # Besides the layer: activations, packed weights of the matrix kernels, and what is read before it is cast.
    assert result["grown"] < result["held"] + (64 << 20) < total / 2.5
