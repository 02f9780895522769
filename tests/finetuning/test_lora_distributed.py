"""Two gloo processes give the loss and the adapters' gradients of one: DDP, FSDP2, expert parallelism with FSDP2."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_hf.finetuning import add_expert_lora, lora_adapters, save_expert_lora
from tests.finetuning.lora_worker import LAYOUTS, OPTIONS, adapters_of, config, gradients
from tests.finetuning.test_expert_lora import randomise_adapters_
from tests.kernels.test_grouped_experts import relative_error
from tests.processes import launch, torchrun
from tests.tiny_models import random_ids, tiny_native_moe


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("lora")
    for option in OPTIONS:
        model = add_expert_lora(tiny_native_moe("qwen3_moe"), config(option))
        randomise_adapters_(model)
        save_expert_lora(model, folder / option)
    launch(torchrun("tests.finetuning.lora_worker", str(folder)))
    loaded = torch.load(folder / "results.pt", weights_only=False)
    assert loaded["world_size"] == 2 and loaded["backend"] == "gloo"
    return loaded | {"folder": folder}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_two_processes_equal_one(layout, option, results):
    one = adapters_of(option, results["folder"])
    expected = gradients(one, [random_ids(2, seed=0), random_ids(2, seed=1)])
    two = results[layout, option]
    assert relative_error(expected["loss"], two["loss"]) <= 1e-6
    assert bool(two["sharded"]) == (layout == "ep_fsdp")
    actual = load_file(results["folder"] / f"{layout}_{option}/expert_lora.safetensors")
    assert actual.keys() == {f"{b}.{n}" for b, a in lora_adapters(one).items() for n, _ in a.named_parameters()}
    for name, grad in actual.items():
        block, _, parameter = name.rpartition(".")
        assert relative_error(expected["grads"][f"{block}.experts.lora_adapter.{parameter}"], grad) <= 1e-6, name
