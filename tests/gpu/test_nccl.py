"""Layouts over NCCL, one process per GPU. `make test-gpu`; skipped with fewer than two GPUs."""

import pytest
import torch

from tests.modeling.parallel_worker import LAYOUTS
from tests.processes import Cases
from tests.trainer.layout_runs import MODES


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
BLOCKS = [f"{layout}-{kind}" for layout in LAYOUTS for kind in ("gated", "extra_biased", "qwen3_moe")]
RUNS = [f"resume-{mode}-{kind}" for mode in MODES for kind in ("ours", "mixtral")]
RUNS += [f"async-{mode}" for mode in MODES] + [f"masters-{mode}" for mode in MODES if mode != "ddp"]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> Cases:
    folder = tmp_path_factory.mktemp("blocks")
    return Cases("tests.modeling.parallel_worker", folder, arguments=BLOCKS, timeout=1200, backend="nccl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Cases:
    folder = tmp_path_factory.mktemp("runs")
    return Cases("tests.trainer.layout_runs", folder, arguments=RUNS, timeout=1800, backend="nccl")


@pytest.mark.parametrize("case", BLOCKS)
def test_sharded_block_equals_the_whole_one(case, blocks):
    found = blocks[case]
    assert found["expert_is_sharded"] and found["is_fsdp"] == ("fsdp" in case)
    assert found["logits"] <= 2e-5
    assert max(found["gradients"].values()) <= 1e-4
    assert found["saved_is_equal"]


@pytest.mark.parametrize("case", RUNS)
def test_three_plus_three_steps_are_six(case, runs):
    found = runs[case]
    whole, again = found["whole"], found["again"]
    assert whole["num_processes"] == 2 and whole["is_sharded"] == ("ddp" not in case)
    # Sums in grouped matrix products and index_add are not ordered on a GPU.
    assert again["losses"][-3:] == pytest.approx(whole["losses"][-3:], rel=1e-3)
    worst = max(
        float((again["weights"][name] - tensor).norm() / tensor.norm().clamp_min(1e-6))
        for name, tensor in whole["weights"].items()
    )
    assert worst <= 1e-3
