"""The shipped settings of ZeRO-2 and ZeRO-3 on two gloo processes: needs DeepSpeed, which moe_hf does not install.

`DS_BUILD_OPS=0 pip install deepspeed`: nothing is compiled, and its AdamW is torch's.
"""

import pytest
import torch

from tests.processes import Cases
from tests.trainer.deepspeed_runs import STAGES
from tests.trainer.layout_runs import LORA, build, steps, trainer_of
from tests.trainer.runs import losses
from tests.trainer.test_layouts import bitwise, relative


pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Cases:
    return Cases("tests.trainer.deepspeed_runs", tmp_path_factory.mktemp("deepspeed"), timeout=1200)


@pytest.fixture(scope="module", params=["ours", "mixtral"])
def alone(request, tmp_path_factory) -> tuple[str, dict]:
    """Four clipped steps of one process without DeepSpeed."""
    return request.param, steps(request.param, "alone", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("stage", STAGES)
def test_steps_are_those_of_one_process(stage, alone, cases):
    kind, one = alone
    two = cases[f"steps-{stage}-{kind}"]
    assert (two["num_processes"], two["type"], two["wrapper"]) == (2, "DEEPSPEED", "DeepSpeedEngine")
    assert f"zero{two['stage']}" == stage
    assert relative(two["weights"], one["weights"]) <= 5e-7
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_three_plus_three_steps_are_six(stage, cases):
    found = cases[f"resume-{stage}"]
    assert found["again"]["losses"] == found["whole"]["losses"] and len(found["whole"]["losses"]) == 6
    assert bitwise(found["again"]["weights"], found["whole"]["weights"])
    assert found["saved_is_equal"]


@pytest.mark.parametrize("stage", STAGES)
def test_model_that_is_loaded_under_the_settings_trains_alike_and_is_saved_whole(stage, cases):
    found, usual = cases[f"loaded-{stage}"], cases[f"steps-{stage}-ours"]
    assert found["losses"] == usual["losses"] and bitwise(found["weights"], usual["weights"])
    assert bitwise(found["final"], found["weights"])
    trained = [name for name in found["weights"] if ".mlp." in name]
    assert found["trainable"] == sum(found["weights"][name].numel() for name in trained)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_model_has_masters_of_deepspeed_and_is_saved_in_bfloat16(stage, cases):
    found, usual = cases[f"bfloat16-{stage}"], cases[f"loaded-{stage}"]
    assert {tensor.dtype for tensor in found["final"].values()} == {torch.bfloat16}
    assert bitwise(found["final"], {name: tensor.bfloat16() for name, tensor in found["weights"].items()})
    assert found["losses"] == pytest.approx(usual["losses"], rel=2e-2)


def test_adapters_of_experts_train_with_zero_2_as_in_one_process(cases, tmp_path):
    trainer = trainer_of(build("ours"), tmp_path, "alone", max_grad_norm=0.05, **LORA)
    trainer.train()
    assert cases["lora-zero2"]["losses"] == pytest.approx(losses(trainer), rel=1e-6)


REFUSED = {
    "layout": "both spread the model",
    "async": "async_save",
    "idle": "skip_idle_experts",
    "selected": "trains in one process or with DDP",
    "adapters": "not with ZeRO-3",
    "bfloat16": "set bf16=True",
    "built in parts": "loaded_whole",
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistake_is_refused_in_a_sentence(mistake, cases):
    assert REFUSED[mistake] in cases["refusals"][mistake]
