"""Placement and shadows: the best on small cases, and never a worse imbalance than experts in order."""

from itertools import permutations

import pytest
import torch

from moe_hf import MoEError
from moe_hf.training_plan.placement import TrafficPrices, place, propose


FREE, DEAR = TrafficPrices(row=100.0, shadow=1.0), TrafficPrices(row=1.0, shadow=1e12)


def busiest(rows, device_of, gpus):
    return max(sum(row for row, device in zip(rows, device_of, strict=True) if device == one) for one in range(gpus))


def load(experts, seed, skew=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(experts, generator=generator) * skew).exp().tolist()


@pytest.mark.parametrize(("experts", "gpus"), [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_small_cases_are_placed_as_a_search_over_all_permutations_places_them(experts, gpus, seed):
    rows = load(experts, seed)
    in_order = [expert * gpus // experts for expert in range(experts)]
    least = min(busiest(rows, chosen, gpus) for chosen in set(permutations(in_order)))
    device_of = place(rows, gpus)
    assert busiest(rows, device_of, gpus) == pytest.approx(least, rel=1e-12)
    assert [device_of.count(device) for device in range(gpus)] == [experts // gpus] * gpus


@pytest.mark.parametrize(("experts", "gpus"), [(16, 4), (64, 8), (128, 16)])
@pytest.mark.parametrize("prices", [FREE, DEAR], ids=["cheap shadows", "dear shadows"])
def test_large_cases_are_never_worse_than_in_order_and_near_even(experts, gpus, prices):
    counts = [load(experts, seed, skew=0.5) for seed in range(5)]
    for one, rows in zip(propose(counts, gpus, 1000.0, prices), counts, strict=True):
        assert one.imbalance_after <= one.imbalance_before
        assert sorted(one.device_of) == [device for device in range(gpus) for _ in range(experts // gpus)]
        # No placement can part one expert.
        assert one.imbalance_after < max(1.1, 1.02 * max(rows) * gpus / sum(rows))
        assert (one.shadowed == ()) or prices is FREE


def test_a_hot_expert_is_shadowed_when_that_sends_less():
    counts = [[100.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    (free,) = propose(counts, 4, 107.0, FREE)
    assert free.shadowed == (0,) and free.imbalance_after < 1.1 < 3.7 < free.imbalance_before
    # The busiest device had 101 rows, and has 2 without the hot expert.
    assert free.bytes_saved == round(100 * 99 - 1)
    (dear,) = propose(counts, 4, 107.0, DEAR)
    assert dear.shadowed == () and dear.imbalance_after == pytest.approx(dear.imbalance_before)


@pytest.mark.parametrize("seed", range(20))
def test_imbalance_and_traffic_are_never_predicted_worse(seed):
    counts = [load(8, 100 + seed, skew) for skew in (0.0, 1.0, 3.0)]
    for one in propose(counts, 4, 1000.0, TrafficPrices(row=1.0, shadow=50.0)):
        assert one.imbalance_after <= one.imbalance_before * (1 + 1e-12) and one.bytes_saved >= 0


def test_what_is_no_load_is_refused():
    with pytest.raises(MoEError, match="cannot be divided among 3"):
        propose([[1.0] * 4], 3, 10.0, FREE)
    for counts in ([[1.0, -1.0]], [[0.0, 0.0]], [[1.0, 1.0], [1.0]], [[]]):
        with pytest.raises(MoEError, match="table of layers by experts"):
            propose(counts, 1, 10.0, FREE)
