"""An orthogonal part of a product of cases is balanced, and the whole is left for `make test-all`."""

import collections

import pytest

from tests.sampling import sampled


@pytest.mark.parametrize("share", [2, 3])
@pytest.mark.parametrize("start", [0, 1])
def test_every_value_stays_as_often_as_the_others_and_all_combinations_are_there(share, start):
    axes = "abcdef", range(6), {"yes": True, "no": False}
    parameters = sampled(*axes, share=share, start=start)
    assert len({parameter.values for parameter in parameters}) == len(parameters) == 6 * 6 * 2
    stay = [parameter for parameter in parameters if not parameter.marks]
    assert len(stay) == len(parameters) // share and stay[0].id.count("-") == 2
    for axis in range(3):
        counts = collections.Counter(parameter.values[axis] for parameter in stay)
        assert len(counts) == len(axes[axis]) and len(set(counts.values())) == 1


def test_laws_over_the_same_cases_take_turns():
    turns = [{p.id for p in sampled(range(10), start=start) if not p.marks} for start in range(3)]
    assert sum(map(len, turns)) == len(set().union(*turns)) == 10
