"""Gaussian numbers: close to the normal distribution, and the same bits on every machine."""

import hashlib

import pytest
import torch

from moe_hf.upcycling.gaussians import LEVELS, GaussianStream, quantiles


GOLDEN = "e71a0350913c92a2ceac02c7ad2c7734f07a69801e007cfc1b3133d7f3786395"


def test_the_values_are_quantiles_of_the_normal_distribution():
    values = quantiles().double()
    assert len(values) == LEVELS and (values.diff() > 0).all() and torch.equal(values, -values.flip(0))
    assert abs(float(values.square().mean()) - 1) < 1e-7
    # Steps of the distribution function around the exact one, and what scaling to variance 1 moves.
    ranks = (torch.arange(LEVELS) + 0.5) / LEVELS
    distance = (torch.special.ndtr(values) - ranks).abs().max()
    assert distance < 1 / LEVELS
    assert abs(float(values.pow(4).mean()) - 3) < 2e-3


def test_a_stream_has_the_moments_of_independent_numbers():
    drawn = GaussianStream("moments").draw((1000, 1000), 2.0).double() / 2
    assert abs(float(drawn.mean())) < 4e-3 and abs(float(drawn.var()) - 1) < 6e-3
    for shift in (1, 2, 3, 4, 1000):
        flat = drawn.flatten()
        assert abs(float((flat[shift:] * flat[:-shift]).mean())) < 4e-3
    counts = torch.bucketize(drawn.flatten(), quantiles()[:: LEVELS // 64].double()).bincount(minlength=65)[1:]
    expected = drawn.numel() / 64
    # Chi-square with 63 degrees of freedom: mean 63, standard deviation 11.
    assert float((counts - expected).square().sum() / expected) < 120


def test_the_bits_are_these_on_every_machine():
    drawn = GaussianStream(0, 3, 1, "up").draw((37, 41))
    assert hashlib.sha256(drawn.numpy().tobytes()).hexdigest() == GOLDEN


def test_a_stream_depends_on_its_whole_key_and_goes_on_where_it_was():
    whole = GaussianStream(1, 2).draw((8, 6))
    stream = GaussianStream(1, 2)
    assert torch.equal(torch.cat([stream.draw((2, 6)), stream.draw((6, 6), 0.5) * 2]), whole)
    assert not any(
        torch.equal(GaussianStream(*key).draw((8, 6)), whole) for key in ((1, 3), (2, 2), (1, 2, 0), ("12",))
    )


@pytest.mark.parametrize("shape", [(0,), (0, 5), (1,), (3, 7)])
def test_any_shape_is_drawn(shape):
    assert GaussianStream(0).draw(shape).shape == shape
