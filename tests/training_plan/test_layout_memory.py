"""What one of two processes needs is what the plan says of its layout."""

import pytest
import torch

from moe_hf.finetuning import scope_parameter_names
from moe_hf.training_plan.layouts import LAYOUTS, model_sizes, plan_layout
from moe_hf.training_plan.step_memory import step_memory
from tests.processes import Cases
from tests.training_plan.models import BATCH, LAYOUT_CASES, SEQUENCE, build


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Cases:
    return Cases("tests.training_plan.measured_layouts", tmp_path_factory.mktemp("measured"), timeout=2400)


def planned(layout: str, family: str, scope: str, checkpointing: bool, accumulation: int):
    def make():
        return build(family, torch.float32)

    how = {"checkpointing": checkpointing, "accumulation": accumulation}
    memory = step_memory(make, batch=BATCH, sequence=SEQUENCE, scope=scope, optimizer="adamw", devices=(2,), **how)
    sizes = model_sizes(make(), dict.fromkeys(scope_parameter_names(make(), scope), 4))
    return plan_layout(layout, memory, sizes, gpus=2, tokens=BATCH * SEQUENCE, value_bytes=4, **how)


@pytest.mark.parametrize("name", LAYOUT_CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_peak_of_two_processes_is_planned(layout, name, measured):
    plan, real = planned(layout, *LAYOUT_CASES[name]), measured[f"{layout}, {name}"]
    # Routers and norms whose sizes two does not divide, and counts of steps, are whole on each.
    assert plan.weights == pytest.approx(real["weights"], rel=1e-3)
    assert plan.optimizer == pytest.approx(real["optimizer"], rel=1e-3)
    assert plan.total == pytest.approx(real["peak"], rel=0.03 if layout == "DDP" else 0.15)
