"""DDP trains adapters over quantized experts: two processes, each on a half of every batch, as one on the whole."""

import pytest

from tests.inference.stored_in_processes import CASES
from tests.processes import Cases


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return Cases("tests.inference.stored_in_processes", tmp_path_factory.mktemp("stored"))


@pytest.mark.parametrize("case", [name for name in CASES if name != "restored"])
def test_adapters_over_quantized_experts_train_under_ddp_as_in_one_process(cases, case):
    found = cases[case]
    assert found["moved"] > 1e-3
    # Sums over processes are made in another order.
    assert found["difference"] < 1e-6


def test_experts_that_were_restored_are_plain_parameters_for_ddp(cases):
    assert cases["restored"]
