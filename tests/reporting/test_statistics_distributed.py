"""Two processes on a part of the text each report what one does on all of it: counts exactly, means to their last bits."""

import pytest

from moe_hf import MoEError
from moe_hf.reporting.routing_statistics import routing_statistics
from tests.processes import Cases
from tests.reporting.statistics_in_processes import batches
from tests.tiny_models import tiny_native_moe


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return Cases("tests.reporting.statistics_in_processes", tmp_path_factory.mktemp("statistics"))


def _assert_same(found, expected, where: str = "") -> None:
    """Equal in all but the order in which floating-point numbers were added."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            _assert_same(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, value in enumerate(expected):
            _assert_same(found[place], value, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-15), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("case", ["union", "nothing in one"])
def test_two_processes_report_what_one_does_on_all_the_text(cases, case):
    found = cases[case]
    assert found["both"][0] == found["both"][1]
    _assert_same(found["both"][0], found["one"])
    assert all(isinstance(count, int) for layer in found["one"]["layers"] for count in layer["choices"])


def test_what_one_process_cannot_count_is_an_error_in_both(cases):
    first, second = cases["failures"]
    assert (
        "has no input_ids" in first[0] and "Process 0 could not count its text: A batch has no input_ids" in second[0]
    )
    assert (
        "Process 1 could not count its text: it has the domains ['domain 1']" in first[1] and "Process 0" in second[1]
    )
    assert "No token was counted" in first[2] and first[2] == second[2]


def test_one_process_alone_is_told_that_there_are_no_others():
    with pytest.raises(MoEError, match="start the program with torchrun"):
        routing_statistics(tiny_native_moe("mixtral"), batches(range(1)), all_processes=True)
