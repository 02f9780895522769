"""llama.cpp: a native export becomes a GGUF file by its own converter, and computes the same logits and tokens."""

import json
from pathlib import Path

import numpy
import pytest
import torch

from tests.interop.environments import CACHE, ENVIRONMENTS, installed
from tests.interop.models import NATIVE
from tests.source_releases import fetch_files


pytestmark = pytest.mark.interop
PROGRAMS = Path(__file__).parent / "programs"
# What the converter or llama.cpp itself asks of a family beyond its layout, and how it says so.
NEEDS = {
    "glm4_moe": ("the special tokens of GLM's tokenizer", "[gMASK]"),
    "solar_open": ("the special tokens of Solar's tokenizer", "<unk>"),
    "ernie4_5_moe": ("Ernie's tokenizer.model", "tokenizer.model"),
    "flex_olmo": ("a family that it knows", "FlexOlmoForCausalLM is not supported"),
    "hunyuan_v1_moe": ("moe_intermediate_size for each layer", "moe_intermediate_size"),
    "qwen3_5_moe_text": ("a head that predicts several tokens", "opt_num_mtp_layers"),
}
CONVERTER = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    """The converter's folder, of the release that is installed."""
    (version,) = (text.split("==")[1] for text in ENVIRONMENTS["llama_cpp"].requirements if "==" in text)
    target = CACHE / f"llama_cpp_python-{version}"
    return fetch_files("llama_cpp_python", version, "vendor/llama.cpp", target, CONVERTER)


@pytest.mark.parametrize("family", NATIVE)
def test_a_converted_export_computes_the_same(family, native, llama_cpp, record, tmp_path):
    environment, checkpoint = installed("llama_cpp"), native(family)
    gguf, answers = tmp_path / "model.gguf", checkpoint.write_answers(tmp_path / "answers.json")
    convert = ("python", PROGRAMS / "convert_to_gguf.py", llama_cpp, checkpoint.folder, "--outfile", gguf)
    if family in NEEDS:
        needs, said = NEEDS[family]
        assert said in environment.run(*convert, "--outtype", "f32").stderr
        record(environment, f"export to {family}", f"not converted here: it needs {needs}")
        return
    environment.output(*convert, "--outtype", "f32")
    run = ("python", PROGRAMS / "llama_cpp_logits.py", gguf, answers, tmp_path / "out")
    environment.output(*run)
    with numpy.load(tmp_path / "out.npz") as file:
        logits = torch.cat([torch.from_numpy(file[name]) for name in sorted(file)])
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["ids"] == checkpoint.answers.ids
    assert said["tokens"] == checkpoint.answers.tokens
    expected = torch.cat(checkpoint.answers.logits)
    difference = float((logits - expected).norm() / expected.norm())
    assert difference <= 1e-5
    record(environment, f"export to {family}, converted to GGUF in float32", f"logits {difference:.1e}; tokens equal")
