"""Two gloo processes take the steps that one does: router losses, biases, telemetry, the guard. One torchrun for all."""

from typing import Any

import pytest
import torch

from tests.processes import launch_once, shared_folder, torchrun
from tests.trainer.multiplier import ACCUMULATIONS, HAS_TRL, MODELS, WAYS
from tests.trainer.step_runs import WITH_BIAS, joint_gradient, native_biases, telemetry
from tests.trainer.unlabelled import SHARED, run


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[Any, Any]:
    folder = shared_folder(tmp_path_factory, "steps")
    launch_once(torchrun("tests.trainer.step_runs", str(folder)), folder / "steps.pt")
    loaded = torch.load(folder / "steps.pt", weights_only=False)
    assert loaded["world_size"] == 2 and loaded["backend"] == "gloo"
    return loaded


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_router_losses_of_two_processes_count_once(way, kind, results):
    if way.endswith(("sft_trainer", "dpo_trainer")) and not HAS_TRL:
        pytest.skip("trl is not installed")
    found = results[way, kind]
    assert set(found) == set(ACCUMULATIONS)
    for accumulation, (multiplier, error) in found.items():
        assert multiplier == pytest.approx(1.0, abs=1e-3), accumulation
        assert error <= 1e-3, accumulation


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_joint_statistics_of_two_processes_are_those_of_the_union(kind, accumulation, results, tmp_path):
    two = results[f"joint_{kind}_{accumulation}"]
    one = joint_gradient(kind, tmp_path, 16 // accumulation, accumulation)
    assert float((two - one).norm() / one.norm()) <= 1e-6
    # Statistics of other micro-batches are something else.
    other = joint_gradient(kind, tmp_path / "other", 8 // accumulation, 2 * accumulation)
    assert float((other - one).norm() / one.norm()) > 1e-3


@pytest.mark.parametrize("family", WITH_BIAS)
def test_native_correction_biases_are_bitwise_equal_in_all_processes(family, results, tmp_path):
    first, second = results[family]
    one = native_biases(family, tmp_path, per_device_batch=8)
    assert len(one) == 2 and all(bias.abs().max() > 0.01 for bias in one.values())
    for name, bias in one.items():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], bias)


@pytest.mark.parametrize("kind", MODELS)
def test_telemetry_covers_all_processes(kind, results, tmp_path):
    one = telemetry(kind, tmp_path, per_device_batch=8)
    assert len(one) > 20
    assert results[f"telemetry_{kind}"] == pytest.approx(one, abs=1e-6)


def test_a_gradient_that_is_not_finite_in_one_process_stops_both(results):
    for message in results["stopped"]:
        assert message.startswith("The gradient of model.layers.1.mlp.gate.weight is not finite at step 1")


@pytest.mark.parametrize("name", SHARED)
def test_a_process_without_labels_and_a_step_without_any_are_those_of_one_process(name, results, tmp_path):
    two, one = results[f"unlabelled {name}"], run(name, tmp_path)
    assert two["largest"][0] == 0.0 and min(two["largest"][1:]) > 1e-3 and two["warnings"] == 1
    for parameter, tensor in one["weights"].items():
        torch.testing.assert_close(two["weights"][parameter], tensor, rtol=0, atol=1e-6)


def test_shares_of_a_step_add_up(results):
    (alone, joint, without), (alone_2, joint_2, without_2) = results["shares"]
    assert [alone, alone_2] == pytest.approx([2 / 6, 1 / 6])
    # 3 labels of 6, shared by 3 and 5 tokens; without labels the mean over processes is that over tokens.
    assert [joint, joint_2] == pytest.approx([3 / 6 * 3 / 8, 3 / 6 * 5 / 8])
    assert [without, without_2] == pytest.approx([2 * 3 / 8, 2 * 5 / 8])
