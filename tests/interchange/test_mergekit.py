"""The same MoE from mergekit, where it is installed: an independent judge of upcycling and export together.

mergekit has requirements of its own, so it lives in an environment of its own:

    python -m venv elsewhere && elsewhere/bin/pip install mergekit
    MERGEKIT=elsewhere/bin/mergekit-moe pytest tests/interchange/test_mergekit.py
"""

import os
import subprocess

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import moe_hf
from moe_hf.data import train_tokenizer
from moe_hf.interchange import export_native
from tests.tiny_models import random_ids, tiny_dense


COMMAND = os.environ.get("MERGEKIT")
pytestmark = pytest.mark.skipif(not COMMAND, reason="MERGEKIT does not name the command mergekit-moe")


@torch.no_grad()
@pytest.mark.parametrize(("family", "target"), [("llama", "mixtral"), ("qwen3", "qwen3_moe")])
def test_same_experts_give_the_same_native_model_as_mergekit(family, target, tmp_path):
    from datasets import Dataset

    source, theirs, ours = tmp_path / "dense", tmp_path / "theirs", tmp_path / "ours"
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["one two three"] * 3}), vocab_size=257 + 8)
    dense = tiny_dense(family, vocab_size=len(tokenizer))
    dense.save_pretrained(source)
    tokenizer.save_pretrained(source)
    expert = {"source_model": str(source), "positive_prompts": ["one"]}
    recipe = {"base_model": str(source), "gate_mode": "random", "dtype": "float32", "experts": [expert] * 4}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    # The flag says that four copies of one model are meant.
    flag = "--i-understand-this-is-not-useful-without-training"
    command = [COMMAND, str(tmp_path / "recipe.yml"), str(theirs), flag]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]

    moe_hf.upcycle(source, num_experts=4, num_experts_per_tok=2).save_pretrained(ours)
    native = AutoModelForCausalLM.from_pretrained(export_native(ours, tmp_path / "native", target)).eval()
    merged, loading = AutoModelForCausalLM.from_pretrained(theirs, output_loading_info=True)
    assert {key: value for key, value in loading.items() if value} == {}
    assert type(native) is type(merged)

    expected, actual = merged.state_dict(), native.state_dict()
    assert expected.keys() == actual.keys()
    routers = {name for name in expected if name.endswith("mlp.gate.weight")}
    assert len(routers) == 3
    assert [name for name in expected.keys() - routers if not torch.equal(expected[name], actual[name])] == []

    ids = random_ids(vocab=len(tokenizer))
    logits = dense(ids).logits
    for name, model in {"mergekit": merged.eval(), "moe_hf": native}.items():
        error = float((model(ids).logits - logits).norm() / logits.norm())
        print(f"{target} by {name}: relative error of the logits {error:.1e}")
        assert error <= 1e-6, name
