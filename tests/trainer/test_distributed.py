"""Two gloo processes do what one does. One torchrun makes all runs, since most of its time is imports."""

from typing import Any

import pytest
import torch

from tests.processes import launch_once, shared_folder, torchrun
from tests.trainer.runs import BIASED, GLOBAL_BATCH, KINDS, WITH_STATE, correction_biases, four_steps, router_states


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    folder = shared_folder(tmp_path_factory, "two_processes")
    launch_once(torchrun("tests.trainer.runs", str(folder)), folder / "results.pt")
    loaded = torch.load(folder / "results.pt", weights_only=False)
    assert loaded["world_size"] == 2 and loaded["backend"] == "gloo"
    return loaded


def relative(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of two sets of tensors, each against its own norm."""
    assert actual.keys() == expected.keys()
    return max(float((actual[k] - v).norm() / v.norm().clamp_min(1e-12)) for k, v in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one_in_scope_moe(kind, results, tmp_path):
    two, one = results[f"four_steps_{kind}"], four_steps(kind, tmp_path, per_device_batch=8)
    assert (two["num_processes"], two["ddp"]) == (2, "DistributedDataParallel")
    assert one["num_processes"] == 1
    assert relative(two["gradients"], one["gradients"]) <= 1e-6
    assert relative(two["weights"], one["weights"]) <= 2e-6
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)


def test_two_processes_with_accumulation_equal_one_without(results, tmp_path):
    two, one = results["four_steps_accumulated"], four_steps("ours", tmp_path, per_device_batch=8)
    assert two["num_processes"] == 2
    assert relative(two["gradients"], one["gradients"]) <= 1e-6
    assert relative(two["weights"], one["weights"]) <= 2e-6


def test_resume_in_two_processes_is_bitwise(results):
    (weights, losses), (weights_again, losses_again) = results["resume"]
    assert losses == losses_again
    assert all(torch.equal(weights_again[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("run", ["biased", "biased_accumulated"])
def test_correction_biases_of_two_processes_are_those_of_one(run, results, tmp_path):
    two, one = results[run], four_steps("ours", tmp_path, per_device_batch=8, **BIASED)
    assert (two["num_processes"], one["num_processes"]) == (2, 1)
    biases = correction_biases(one["weights"])
    assert len(biases) == 3 and all(bias.abs().max() > 0.01 for bias in biases.values())
    assert all(torch.equal(two["weights"][name], bias) for name, bias in biases.items())
    assert relative(two["weights"], one["weights"]) <= 2e-6


def test_correction_biases_are_equal_in_all_processes(results):
    first, second = results["biases"]
    assert len(first) == 3
    assert all(torch.equal(second[name], bias) for name, bias in first.items())


def test_the_state_of_routers_follows_the_batches_of_all_processes(results, tmp_path):
    two, one = results["router_state"], four_steps("ours", tmp_path, per_device_batch=8, **WITH_STATE)
    assert (two["num_processes"], one["num_processes"]) == (2, 1)
    states = router_states(one["weights"])
    # Four steps that add the mean weights, which sum to 1; the margin was passed, so some experts were left out.
    assert len(states) == 3 and all(state.sum() == pytest.approx(4, abs=1e-4) for state in states.values())
    assert all((state - state.mean()).max() > 0.02 for state in states.values())
    assert relative(router_states(two["weights"]), states) <= 1e-6
    assert relative(two["weights"], one["weights"]) <= 2e-6
    first, second = results["router_states"]
    assert all(torch.equal(second[name], state) for name, state in first.items())


def test_global_batch_loss_of_two_processes_is_that_of_one(results, tmp_path):
    two, one = results["global_batch"], four_steps("ours", tmp_path / "one", per_device_batch=8, **GLOBAL_BATCH)
    assert (two["num_processes"], one["num_processes"]) == (2, 1)
    assert relative(two["gradients"], one["gradients"]) <= 1e-6
    assert relative(two["weights"], one["weights"]) <= 2e-6
    # Statistics of each half alone are something else.
    local = four_steps("ours", tmp_path / "local", per_device_batch=4, accumulation=2, router_aux_loss_coef=1.0)
    assert relative(local["gradients"], one["gradients"]) > 1e-3
