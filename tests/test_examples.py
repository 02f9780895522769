"""Each example runs as its first lines say, and prints what it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import convolution_expert, load_aware_router  # noqa: F401 - importing registers them
from moe_hf import MoEConfig, MoEForCausalLM, update_router_state
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


def test_05_initialisers_that_promise_the_dense_function_keep_it():
    output = run("05_initialisers.py")
    rows = {line[:16].strip(): line[16:].split() for line in output.splitlines()[1:]}
    errors = {name: float(cells[0]) for name, cells in rows.items() if name != "dense"}
    assert all(errors[name] <= 1e-5 for name in ("copy", "granular", "shared expert"))
    assert all(errors[name] > 1e-2 for name in ("noise", "drop", "split"))
    assert int(rows["split"][-1].replace(",", "")) < int(rows["dense"][-1].replace(",", ""))


def test_06_exported_model_is_a_native_one_and_comes_back():
    output = run("06_export_to_native.py")
    assert "exported as MixtralForCausalLM" in output
    assert float(re.search(r"logits: (\S+)", output).group(1)) <= 1e-6
    assert "every number is the same" in output


def test_07_growing_is_exact_and_the_rest_is_measured():
    output = run("07_surgery.py")
    changed = dict(re.findall(r"^(.+): .* changed by (\S+)$", output, re.MULTILINE))
    assert float(changed["grown"]) <= 1e-6
    assert float(changed["expert added"]) > 1e-3
    differ = dict(re.findall(r"(average|merged): .* by (\S+)$", output, re.MULTILINE))
    assert float(differ["merged"]) < float(differ["average"])


def test_08_mixed_specialists_know_what_both_know():
    output = run("08_mixing_specialists.py", "--steps", "30")
    rows = {line[:28].strip(): [float(cell) for cell in line[28:].split()] for line in output.splitlines()[1:]}
    code, prose = 0, 1
    for domain, name in ((code, "code specialist"), (prose, "prose specialist")):
        assert rows[name][domain] < rows["base"][domain]
    assert rows["mix, untrained"][-1] < rows["base"][-1]
    assert rows["mix, trained on both"][-1] < min(rows["code specialist"][-1], rows["prose specialist"][-1])


def test_09_compared_routers_all_learn_and_keep_to_their_number_of_experts():
    output = run("09_compare_routers.py", "--steps", "20")
    rows = {line[:28].strip(): line[28:].split() for line in output.split("held-out loss", 1)[1].splitlines()[1:]}
    assert list(rows) == ["plain top-k", "sigmoid, groups, bias", "top-p"]
    cells = {name: [float(cell) for cell in row] for name, row in rows.items()}
    for before, after, violation, _ in cells.values():
        assert after < before
        assert violation >= 0
    assert cells["plain top-k"][0] == cells["sigmoid, groups, bias"][0]
    assert [row[-1] for row in cells.values()][:2] == [2.0, 2.0]
    assert 1 <= cells["top-p"][-1] < 8


def test_12_two_processes_and_one_reach_the_same_loss(tmp_path):
    output = run("12_two_processes.py", str(tmp_path))
    assert "2 processes, 2 of 4 experts in each" in output
    two, one = (float(loss) for loss in re.findall(r"loss (\d\.\d{4})$", output, re.MULTILINE))
    assert abs(two - one) <= 2e-3
    assert (tmp_path / "checkpoint-6" / "optimizer" / ".metadata").is_file()


def test_10_chosen_experts_learn_and_their_deltas_merge():
    output = run("10_select_experts.py", "--steps", "20")
    rows = {line[:28].strip(): line[28:].split() for line in output.splitlines()[-3:]}
    assert float(rows["chosen experts trained"][1]) < float(rows["base"][1])
    assert rows["base with deltas merged"] == rows["chosen experts trained"]
    chosen, of = map(int, re.search(r"chosen: (\d+) of (\d+)", output).groups())
    assert 0 < chosen < of / 2 and int(re.search(r"deltas: (\d+)%", output).group(1)) < 100 * chosen / of


def test_the_load_aware_router_follows_the_load():
    assert run("load_aware_router.py") == ""
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4, router_type="load_aware"))
    model.train()(random_ids())
    update_router_state(model)
    assert all(layer.mlp.gate.surplus.abs().max() > 0 for layer in model.model.layers)


def test_the_convolution_expert_can_be_chosen():
    assert run("convolution_expert.py") == ""
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=4, extra_experts=["causal_convolution"])
    assert torch.isfinite(MoEForCausalLM(config)(random_ids()).logits).all()


def test_13_low_memory_writes_the_same_text_in_less_and_adapters_lower_the_loss():
    output = run("13_low_memory.py")
    plain, quantized, resident = map(float, re.findall(r"(\S+) MiB", output))
    assert plain / 4 > quantized > resident
    assert "same text: True" in output
    losses = [float(loss) for loss in re.findall(r"step .*: (\S+) nats", output)]
    assert losses[-1] < losses[0]


def test_11_adapters_lower_the_loss_and_peft_and_the_merged_model_agree():
    output = run("11_expert_lora.py")
    losses = [float(loss) for loss in re.findall(r"step .*: (\S+) nats", output)]
    assert losses[-1] < losses[0]
    assert float(re.search(r"PEFT's logits differ by (\S+)", output).group(1)) <= 1e-5
    assert float(re.search(r"merged model's by (\S+)", output).group(1)) <= 1e-5
