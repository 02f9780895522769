"""Quantized checkpoints and models as sources: dequantized by transformers, exactly, or refused in one sentence."""

import copy
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from typer.testing import CliRunner

from moe_hf import MoEError, upcycle, upcycle_checkpoint, verify
from moe_hf.cli import app
from moe_hf.planning import plan_upcycling
from moe_hf.upcycling.verification import EXACT_TOLERANCE, relative_error
from tests.closeness import bitwise
from tests.tiny_models import random_ids, tiny_dense


IDS = random_ids()
BLOCK = 16
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A llama whose projections are float8 with one scale per block of 16 x 16, as DeepSeek publishes its models."""
    folder = tmp_path_factory.mktemp("fp8")
    dense = tiny_dense("llama", **SIZES)
    dense.config.save_pretrained(folder)
    tensors = {}
    for name, tensor in dense.state_dict().items():
        if "_proj" not in name:
            tensors[name] = tensor.clone()
            continue
        blocks = tensor.view(tensor.shape[0] // BLOCK, BLOCK, tensor.shape[1] // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        tensors[f"{name}_scale_inv"] = scale
        tensors[name] = (blocks / scale[:, None, :, None]).view(tensor.shape).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_quantization(folder, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    expected = copy.deepcopy(dense)
    state = expected.state_dict()
    for name in state:
        if f"{name}_scale_inv" in tensors:
            scale = tensors[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            state[name].copy_(tensors[name].float() * scale)
    return folder, expected


def set_quantization(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def test_a_float8_checkpoint_gives_the_logits_of_the_dequantized_one(fp8, tmp_path):
    folder, expected = fp8
    moe = upcycle(folder, num_experts=4)
    upcycle_checkpoint(folder, tmp_path / "moe", num_experts=4)
    disk = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert bitwise(disk.state_dict(), moe.state_dict())
    assert relative_error(logits(moe), logits(expected)) <= EXACT_TOLERANCE
    assert moe.config.upcycling["quantized_as"] == disk.config.upcycling["quantized_as"] == "fp8"
    assert "quantization_config" not in (tmp_path / "moe" / "config.json").read_text()
    assert os.listdir(tmp_path) == ["moe"]
    assert verify(folder, tmp_path / "moe").exact
    assert CliRunner().invoke(app, ["verify", str(folder), str(tmp_path / "moe")]).exit_code == 0
    assert plan_upcycling(folder).dense_bytes == sum(parameter.nbytes for parameter in expected.parameters())


def test_a_model_that_was_dequantized_while_it_was_loaded_is_taken_as_it_is(fp8):
    folder, expected = fp8
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    moe = upcycle(model, num_experts=4)
    assert relative_error(logits(moe), logits(expected)) <= EXACT_TOLERANCE
    assert moe.config.upcycling["quantized_as"] == "fp8"
    assert not hasattr(moe.config, "quantization_config")


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_is_undone_in_memory_and_on_disk(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_dense("llama", **SIZES).save_pretrained(tmp_path / "dense")
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "quantized")
    expected = copy.deepcopy(model).dequantize(dtype=torch.float32)
    moe = upcycle(model, num_experts=4)
    assert relative_error(logits(moe), logits(expected)) <= EXACT_TOLERANCE
    assert model.is_quantized
    upcycle_checkpoint(tmp_path / "quantized", tmp_path / "moe", num_experts=4)
    disk = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert relative_error(logits(disk), logits(expected)) <= EXACT_TOLERANCE
    assert disk.config.upcycling["quantized_as"] == f"bitsandbytes_{bits}bit"


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "quanto", "torchao", "aqlm", "of the future"])
def test_what_cannot_be_undone_is_refused_in_each_way(method, tmp_path):
    folder = tmp_path / "dense"
    tiny_dense("llama").save_pretrained(folder)
    set_quantization(folder, {"quant_method": method, "bits": 4})
    model = tiny_dense("llama")
    model.config.quantization_config = {"quant_method": method, "bits": 4}
    ways = (
        lambda: upcycle(model, num_experts=2),
        lambda: upcycle(folder, num_experts=2),
        lambda: upcycle_checkpoint(folder, tmp_path / "moe", num_experts=2),
        lambda: plan_upcycling(folder),
    )
    for way in ways:
        with pytest.raises(MoEError, match=f"quantized by {method}.*Give the checkpoint that it was made from"):
            way()
    assert os.listdir(tmp_path) == ["dense"]


def test_a_quantization_that_cannot_be_undone_on_this_machine_is_refused(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ImportError("needs a package that is not here")

    tiny_dense("llama").save_pretrained(tmp_path / "dense")
    set_quantization(tmp_path / "dense", {"quant_method": "bitsandbytes", "load_in_4bit": True})
    monkeypatch.setattr(AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"], "validate_environment", broken)
    with pytest.raises(MoEError, match="undoing that failed here: needs a package that is not here"):
        upcycle(tmp_path / "dense")
    with pytest.raises(MoEError, match="undoing that failed here"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe")
    assert os.listdir(tmp_path) == ["dense"]


def test_a_model_in_memory_that_keeps_packed_weights_is_refused():
    model = tiny_dense("llama")
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "tiny.gguf"}
    model.hf_quantizer = SimpleNamespace(remove_quantization_config=lambda model: None)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(88, 27, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(MoEError, match="quantized by gguf.*dequantize=True"):
        upcycle(model, num_experts=2)


def test_quantized_tensors_that_nothing_tells_of_are_refused(fp8, tmp_path):
    folder, _ = fp8
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    os.link(folder / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(MoEError, match="no quantization_config"):
        upcycle(tmp_path, num_experts=2)
    with pytest.raises(MoEError, match="no quantization_config"):
        upcycle_checkpoint(tmp_path, tmp_path.with_name("moe"), num_experts=2)


def test_a_model_in_float8_is_refused():
    with pytest.raises(MoEError, match="float8"):
        upcycle(tiny_dense("llama").to(torch.float8_e4m3fn), num_experts=2)
