"""Each example runs as its first lines say, and prints what it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import convolution_expert  # noqa: F401 - importing it registers the expert
from moe_hf import MoEConfig, MoEForCausalLM
from tests.tiny_models import random_ids, tiny_config, tiny_dense


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *launcher, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    assert all(path.name in text for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("has_argument", [False, True], ids=["built on the spot", "a folder"])
def test_01_upcycled_model_equals_the_dense_one(has_argument, tmp_path):
    if has_argument:
        tiny_dense("gpt2").save_pretrained(tmp_path)
    output = run("01_upcycle.py", *([str(tmp_path)] if has_argument else []))
    assert float(re.search(r"logits: (\S+) over", output).group(1)) <= 1e-5


def test_02_expert_only_training_lowers_the_held_out_loss():
    output = run("02_expert_only_trainer.py", "--steps", "8")
    before, after = map(float, re.search(r"loss (\S+) -> (\S+) nats", output).groups())
    assert after < before


def test_03_own_loop_lowers_the_loss():
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no")
    output = run("03_accelerate_loop.py", "--steps", "20", launcher=launcher)
    losses = [float(loss) for loss in re.findall(r"loss (\S+) nats", output)]
    assert losses[-1] < losses[0]
    assert "scope moe" in output


def test_04_loaded_model_equals_the_saved_one():
    output = run("04_save_push_load.py")
    assert "model.safetensors" in output
    assert "modeling_moe.py" in output
    assert float(re.search(r"loading: (\S+)", output).group(1)) <= 1e-6


def test_the_convolution_expert_can_be_chosen():
    assert run("convolution_expert.py") == ""
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=4, extra_experts=["causal_convolution"])
    assert torch.isfinite(MoEForCausalLM(config)(random_ids()).logits).all()
