"""GGUF files as sources: each way in gives the file's model, all of it, and the MoE trains, saves and exports."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typer.testing import CliRunner

import moe_hf
from moe_hf import conversion, source_folders, streaming
from moe_hf.cli import app
from moe_hf.dense_sources import load_dense, load_dense_tokenizer
from moe_hf.errors import MoEError
from moe_hf.gguf_files import read_gguf
from moe_hf.hub import save_model
from moe_hf.streaming import upcycle_checkpoint
from moe_hf.upcycling.verification import EXACT_TOLERANCE, relative_error
from tests.closeness import close
from tests.tiny_gguf import CHAT_TEMPLATE, SIZES, write_tiny_gguf
from tests.tiny_models import random_ids, tiny_dense


IDS = random_ids(vocab=SIZES["vocab_size"])
TEXT = "This License does not grant 1234 permissions,  12 of 3."


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def plain(gguf):
    """What transformers itself reads."""
    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("way", ["file", "folder", "model", "disk", "command"])
def test_each_way_in_gives_the_logits_of_the_file_and_says_that_it_was_quantized(gguf, plain, way, tmp_path, caplog):
    if way in ("file", "folder"):
        moe = moe_hf.upcycle(gguf if way == "file" else str(gguf.parent), num_experts=4)
    elif way == "model":
        moe = moe_hf.upcycle(plain, num_experts=4)
        assert plain.hf_quantizer is not None
        assert plain.config.quantization_config is not None
    else:
        if way == "disk":
            upcycle_checkpoint(gguf, tmp_path / "moe", num_experts=4)
        else:
            result = command("upcycle", gguf, tmp_path / "moe", "--num-experts", 4)
            assert result.exit_code == 0, result.output
            assert "Q4_1" in result.output
        moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
        assert os.listdir(tmp_path) == ["moe"]
        assert "quantization_config" not in (tmp_path / "moe" / "config.json").read_text()
        assert "license: apache-2.0" in (tmp_path / "moe" / "README.md").read_text()
        assert "Q4_1 (21 tensors)" in (tmp_path / "moe" / "README.md").read_text()
    assert relative_error(logits(moe), logits(plain)) <= EXACT_TOLERANCE
    assert moe.dtype == torch.float32
    assert "are quantized (GGUF, Q4_1 (21 tensors)" in caplog.text
    assert moe.config.upcycling["quantized_as"] == "GGUF, Q4_1 (21 tensors), F32 (7 tensors), Q8_0 (1 tensors)"
    assert not hasattr(moe.config, "quantization_config")


def test_in_memory_and_on_disk_give_the_same_weights(gguf, tmp_path):
    upcycle_checkpoint(gguf, tmp_path / "moe", num_experts=4)
    disk, memory = AutoModelForCausalLM.from_pretrained(tmp_path / "moe"), moe_hf.upcycle(gguf, num_experts=4)
    assert all(torch.equal(tensor, memory.state_dict()[name]) for name, tensor in disk.state_dict().items())


@pytest.mark.numerics
def test_the_moe_trains_saves_reloads_and_exports(gguf, tmp_path):
    moe = moe_hf.upcycle(gguf, num_experts=4)
    before = moe(input_ids=IDS, labels=IDS).loss.item()
    optimizer = torch.optim.AdamW(moe.train().parameters(), lr=1e-3)
    for _ in range(2):
        moe(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moe.eval()(input_ids=IDS, labels=IDS).loss.item() < before
    save_model(moe, load_dense_tokenizer(gguf), tmp_path / "moe")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert close(logits(again), logits(moe))
    moe_hf.export_native(tmp_path / "moe", tmp_path / "native")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert relative_error(logits(native), logits(moe)) <= EXACT_TOLERANCE


def test_tokenizer_template_and_ends_of_answers_come_along(tmp_path):
    gguf = write_tiny_gguf(
        tmp_path, fields=lambda writer: (writer.add_eot_token_id(5), writer.add_float32("general.sampling.temp", 0.5))
    )
    made = moe_hf.convert_source(gguf, tmp_path / "dense")
    assert (made.license, made.dtype, made.has_tokenizer) == ("apache-2.0", "float32", True)
    theirs, ours = (
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf.name),
        AutoTokenizer.from_pretrained(tmp_path / "dense"),
    )
    assert ours.chat_template == CHAT_TEMPLATE
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    words = "This License does not grant permissions."
    assert ours(words).input_ids == theirs(words).input_ids
    assert ours.decode(ours(TEXT).input_ids) == TEXT
    # The rule "smollm" cuts at each digit, and leaves the spaces before it together.
    assert ours.tokenize("x  12") == ["x", "\u0120\u0120", "1", "2"]
    generation = GenerationConfig.from_pretrained(tmp_path / "dense")
    assert (generation.eos_token_id, generation.temperature, generation.do_sample) == ([2, 5], 0.5, True)


def test_scaled_rotary_frequencies_are_read(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 10000.0}
    dense = tiny_dense("llama", **SIZES | {"max_position_embeddings": 16384, "rope_parameters": rope})
    scaled = ROPE_INIT_FUNCTIONS["llama3"](dense.config, "cpu")[0]
    factors = 10000.0 ** -(torch.arange(0, 32, 2) / 32) / scaled
    assert factors.max() > 1
    gguf = write_tiny_gguf(
        tmp_path,
        matrices="F32",
        embedding="F32",
        tensors={"rope_freqs.weight": factors.numpy()},
    )
    assert relative_error(logits(load_dense(gguf)[0]), logits(dense)) <= EXACT_TOLERANCE
    lost = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name)
    with pytest.raises(MoEError, match="left out of the configuration"):
        moe_hf.upcycle(lost, num_experts=4)
    wrong = write_tiny_gguf(tmp_path / "wrong", tensors={"rope_freqs.weight": factors.numpy()[::-1].copy()})
    with pytest.raises(MoEError, match="rope_freqs.weight"):
        moe_hf.upcycle(wrong, num_experts=4)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("F32", torch.float32), ("F16", torch.float32), ("Q8_0", torch.float32)]
)
def test_a_file_is_loaded_in_the_narrowest_dtype_that_holds_it(tmp_path, stored, dtype):
    # The norms of the tiny model are no numbers of 16 bits.
    assert load_dense(write_tiny_gguf(tmp_path, matrices=stored, embedding=stored))[0].dtype == dtype


def test_a_file_of_16_bits_stays_so(tmp_path):
    norms = {f"blk.{i}.{kind}_norm.weight": np.full(96, 1.5, np.float32) for i in range(3) for kind in ("attn", "ffn")}
    norms["output_norm.weight"] = np.full(96, 0.5, np.float32)
    gguf = write_tiny_gguf(tmp_path, matrices="F16", embedding="F16", tensors=norms)
    assert read_gguf(gguf).quantized_as is None
    moe = moe_hf.upcycle(gguf, num_experts=4)
    assert moe.dtype == torch.float16
    assert "quantized_as" not in moe.config.upcycling


def cut(folder):
    gguf = write_tiny_gguf(folder)
    os.truncate(gguf, gguf.stat().st_size // 2)
    return gguf


def cut_head(folder):
    gguf = write_tiny_gguf(folder)
    os.truncate(gguf, 700)
    return gguf


def no_gguf(folder):
    folder.mkdir(exist_ok=True)
    (folder / "model.gguf").write_bytes(b"not a model" * 9)
    return folder / "model.gguf"


def several(folder):
    write_tiny_gguf(folder, "one.gguf")
    shutil.copy(folder / "one.gguf", folder / "two.gguf")
    return folder


def split(folder):
    return write_tiny_gguf(folder, "model-00001-of-00002.gguf").parent


def with_number(name, value):
    return lambda folder: write_tiny_gguf(
        folder, fields=lambda writer: writer.add_key_value(name, value, KIND[type(value)])
    )


def with_tensor(name, values):
    return lambda folder: write_tiny_gguf(folder, tensors={name: values})


def foreign(folder):
    import gguf

    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", "whisper")
    writer.add_tensor("encoder.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def _kinds():
    import gguf

    return {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}


KIND = _kinds()
REFUSED = {
    "cut off": (cut, "cut off"),
    "cut off in its head": (cut_head, "damaged or cut off"),
    "something else": (no_gguf, "is no GGUF file"),
    "absent": (lambda folder: folder / "absent.gguf", "does not exist"),
    "several": (several, "one.gguf, two.gguf"),
    "one part": (split, "split into 2 files"),
    "a part by its count": (with_number("split.count", 3), "split into 3 files"),
    "experts": (with_number("llama.expert_count", 8), "has 8 experts already"),
    "another architecture": (foreign, "whisper"),
    "scaled positions": (with_number("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type = yarn"),
    "scaled logits": (with_number("llama.logit_scale", 0.0625), "llama.logit_scale = 0.0625"),
    "a tensor too many": (
        with_tensor("blk.0.attn_q_norm.weight", np.ones(32, np.float32)),
        "blk.0.attn_q_norm.weight",
    ),
    "a tensor too few": (with_tensor("blk.1.ffn_up.weight", None), "would be random"),
    "a tensor of another shape": (with_tensor("blk.1.ffn_up.weight", np.ones((64, 96), np.float32)), "cannot read"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("way", ["memory", "disk"])
def test_what_cannot_be_read_whole_is_refused_in_a_sentence_and_nothing_is_written(case, way, tmp_path):
    make, message = REFUSED[case]
    source = make(tmp_path / "source")
    arguments = (source,) if way == "memory" else (source, tmp_path / "moe")
    with pytest.raises(MoEError, match=message) as raised:
        {"memory": moe_hf.upcycle, "disk": upcycle_checkpoint}[way](*arguments, num_experts=4)
    assert "\n" not in str(raised.value)
    assert set(os.listdir(tmp_path)) <= {"source"}


def test_without_the_package_gguf_one_sentence_says_how_to_get_it(gguf, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    copy = shutil.copy(gguf, tmp_path / "copy.gguf")
    with pytest.raises(MoEError, match=r"pip install 'moe-hf\[gguf\]'"):
        moe_hf.upcycle(copy)


def test_a_folder_with_a_config_is_an_ordinary_one(gguf, tmp_path):
    moe_hf.convert_source(gguf, tmp_path / "dense")
    shutil.copy(gguf, tmp_path / "dense")
    moe = moe_hf.upcycle(tmp_path / "dense", num_experts=4)
    assert moe.config.upcycling["source"] == str(tmp_path / "dense")
    assert moe.config.upcycling["quantized_as"].startswith("GGUF")
    with pytest.raises(MoEError, match="needs no conversion"):
        moe_hf.convert_source(tmp_path / "dense", tmp_path / "again")


def test_a_full_disk_is_noticed_before_anything_is_written(gguf, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    for call in (moe_hf.convert_source, upcycle_checkpoint):
        with pytest.raises(MoEError, match="GB free"):
            call(gguf, tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_a_killed_run_goes_on_with_what_was_converted(gguf, tmp_path, monkeypatch):
    def kill(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streaming._Job, "write_other_files", kill)
        with pytest.raises(KeyboardInterrupt):
            upcycle_checkpoint(gguf, tmp_path / "moe", num_experts=4)
    assert (tmp_path / ".moe.partial" / "dense-0" / "config.json").is_file()
    monkeypatch.setattr(source_folders, "convert_source", kill)
    upcycle_checkpoint(gguf, tmp_path / "moe", num_experts=4)
    assert os.listdir(tmp_path) == ["moe"]


def test_a_plan_and_the_facts_of_a_file_need_no_weights(gguf):
    plan = moe_hf.plan_upcycling(gguf, num_experts=4)
    facts = json.loads(command("inspect", gguf, "--json").stdout)
    assert plan.dense.total_parameters == facts["total_parameters"] == read_gguf(gguf).num_parameters
    assert "in float32" in command("upcycle", gguf, "--dry-run").output


def test_verify_compares_a_file_with_its_moe(gguf, tmp_path):
    upcycle_checkpoint(gguf, tmp_path / "moe", num_experts=4)
    result = command("verify", gguf, tmp_path / "moe")
    assert result.exit_code == 0, result.output
    assert moe_hf.verify(gguf, tmp_path / "moe").exact
    other = write_tiny_gguf(tmp_path / "other", matrices="Q8_0")
    assert command("verify", other, tmp_path / "moe").exit_code == 1


def test_an_unknown_rule_of_cutting_text_is_told(tmp_path, caplog):
    gguf = write_tiny_gguf(tmp_path, fields=lambda writer: None)
    data = gguf.read_bytes().replace(b"smollm", b"smullm")
    gguf.write_bytes(data)
    load_dense_tokenizer(gguf)
    assert "smullm" in caplog.text
