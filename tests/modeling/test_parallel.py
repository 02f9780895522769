"""Gloo ranks: in each layout each kind of block has one process's logits, gradients and saved weights, or is refused."""

import pytest
import torch

from moe_hf import MoEConfig, MoEModel
from tests.modeling.parallel_worker import FOUR, LAYOUTS, MODELS
from tests.processes import Cases, shared_folder
from tests.tiny_models import tiny_config


# What cannot be, and what the refusal says.
REFUSED = {
    **{f"{layout}-{kind}": "mixes the weights of all experts" for layout in ("tp_ep", "ep_fsdp")
       for kind in ("merged", "merged_biased")},
    **{f"{layout}-gpt2": "no tensor-parallel plan for 'gpt2'" for layout in ("tp", "tp_ep")},
}  # fmt: skip
TWO = [f"{layout}-{kind}" for layout in LAYOUTS for kind in MODELS]
QUICK_KINDS = ("gated", "biased", "tied", "residual", "extra_biased", "merged_biased", "gpt2", "qwen3_moe")
QUICK = [f"{layout}-{kind}" for layout in ("tp", "ep_fsdp") for kind in QUICK_KINDS]
QUICK += ["fsdp-gated", "fsdp-extra_biased", "tp_ep-gated", "tp_ep-extra_biased"]
ON_FOUR = [f"{layout}-{kind}" for layout in FOUR for kind in ("gated", "extra_biased", "qwen3_moe")]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The cases of `make test`, the other ones on two processes, and those on four: three launches."""
    lists = {"quick": (2, QUICK), "slow": (2, [name for name in TWO if name not in QUICK]), "four": (4, ON_FOUR)}
    launches = {}
    for name, (processes, arguments) in lists.items():
        folder = shared_folder(tmp_path_factory, f"parallel-{name}")
        launches[name] = Cases("tests.modeling.parallel_worker", folder, processes, arguments)
    return launches


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in QUICK else SLOW) for case in TWO])
def test_sharded_block_equals_the_whole_one(case, cases):
    found = cases["quick" if case in QUICK else "slow"][case]
    if case in REFUSED:
        assert REFUSED[case] in found["refused"]
        return
    assert_equal(found, is_fsdp="fsdp" in case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_FOUR)
def test_block_on_four_processes_equals_the_whole_one(case, cases):
    assert_equal(cases["four"][case], is_fsdp=True)


def assert_equal(found: dict, is_fsdp: bool) -> None:
    assert found["expert_is_sharded"] and found["is_fsdp"] == is_fsdp
    assert found["logits"] <= 2e-6
    assert found["without_gradient"] == []
    worst = max(found["gradients"], key=found["gradients"].get)
    assert found["gradients"][worst] <= 5e-6, worst
    assert found["saved_is_equal"] and found["auto_map_is_equal"] and found["code_is_equal"]


@pytest.mark.parametrize("family", ["llama", "phi3", "nemotron", "starcoder2", "gpt2"])
def test_a_configuration_alone_answers_the_plan_of_its_model_s_experts(family):
    config = MoEConfig(text_config=tiny_config(family), num_experts=4)
    with torch.device("meta"):
        model = MoEModel(config)
    of_model = {name: style for name, style in model.ep_plan.items() if not name.endswith("_bias")}
    assert config.base_model_ep_plan == (None if family == "gpt2" else of_model)
    assert MoEConfig(text_config=tiny_config(family), router_type="segment_merge").base_model_ep_plan is None
