"""Rates that are tried and chosen, and what the differences of some seeds say."""

import math

import pytest

from moe_hf import MoEError
from moe_hf.trainer.fair_comparison import choose_rate, paired_interval, rate_beyond, rate_grid, student_t, verdict


def test_rates_lie_around_the_one_that_is_given_two_per_decade():
    assert rate_grid(1e-3, 3) == [3.2e-4, 1e-3, 3.2e-3]
    assert rate_grid(1e-3, 2) == [3.2e-4, 1e-3]
    assert rate_grid(1.234e-5, 1) == [1.234e-5]
    grid = rate_grid(5e-4, 5)
    assert all(b / a == pytest.approx(math.sqrt(10), rel=0.05) for a, b in zip(grid, grid[1:], strict=False))
    for center, count in ((0.0, 3), (-1.0, 3), (math.inf, 3), (math.nan, 3), (1e-3, 0)):
        with pytest.raises(MoEError):
            rate_grid(center, count)


def test_lowest_finite_loss_wins_and_an_edge_is_said():
    assert choose_rate({1e-4: 2.0, 1e-3: 1.0, 1e-2: 3.0}) == (1e-3, False)
    assert choose_rate({1e-3: 2.0, 1e-4: 1.0}) == (1e-4, True)
    # A run that diverged was tried all the same, so that the rate below it lies inside.
    assert choose_rate({1e-4: 2.0, 1e-3: 1.0, 1e-2: math.inf, 3e-2: math.nan}) == (1e-3, False)
    assert choose_rate({1e-3: 1.0, 1e-4: 1.0, 1e-5: 1.0}) == (1e-5, True)
    assert choose_rate({1e-3: 1.0}) == (1e-3, True)
    with pytest.raises(MoEError, match="lower"):
        choose_rate({1e-3: math.nan})


def test_grid_goes_on_beyond_its_edge():
    assert rate_beyond([3.2e-4, 1e-3, 3.2e-3], 3.2e-3) == 1e-2
    assert rate_beyond([3.2e-4, 1e-3, 3.2e-3], 3.2e-4) == 1e-4
    assert rate_beyond([1e-3], 1e-3) == 3.2e-4


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (30, 2.04227), (1000, 1.96234)]
)
def test_quantiles_are_those_of_students_tables(degrees, expected):
    assert student_t(0.95, degrees) == pytest.approx(expected, abs=5e-5)


def test_quantile_of_another_confidence():
    assert student_t(0.99, 4) == pytest.approx(4.60409, abs=5e-5)
    for confidence, degrees in ((0, 2), (1, 2), (0.95, 0)):
        with pytest.raises(MoEError):
            student_t(confidence, degrees)


def test_interval_is_the_mean_and_its_t_quantile_times_the_standard_error():
    mean, low, high = paired_interval([0.01, 0.02, 0.03])
    assert (mean, high - mean) == pytest.approx((0.02, 4.30265 * 0.01 / math.sqrt(3)), rel=1e-4)
    assert mean - low == pytest.approx(high - mean)
    for differences in ([], [0.1], [0.1, math.nan]):
        with pytest.raises(MoEError):
            paired_interval(differences)


@pytest.mark.parametrize(
    ("differences", "start", "parts"),
    [
        ([-0.1], "one seed proves nothing", ["-0.1000", "no interval"]),
        ([-0.1, 0.1, 0.02], "no difference", ["contains 0", "3 seeds"]),
        ([0.0, 0.0], "the loss of the MoE minus that of its control is +0.0000 with each of 2 seeds", ["no interval"]),
        ([-0.020, -0.021, -0.019], "the MoE is better", ["[-0.0225, -0.0175]"]),
        ([0.020, 0.021, 0.019], "its control is better", ["[+0.0175, +0.0225]"]),
    ],
)
def test_verdict_names_a_winner_only_where_the_interval_leaves_0_out(differences, start, parts):
    sentence = verdict(differences)
    assert sentence.startswith(start) and all(part in sentence for part in parts)


def test_verdict_of_nothing_is_an_error():
    for differences in ([], [math.inf]):
        with pytest.raises(MoEError, match="finite"):
            verdict(differences)
