"""What the routers did between two logs of a run: their losses and figures, averaged."""

from collections.abc import Mapping

import torch

from moe_hf.modeling.losses import sum_over_ranks


class RoutingLogs:
    """Collects the losses and the figures of routers in forward passes without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, *figures: Mapping[str, torch.Tensor] | None) -> None:
        """Add the figures of one micro-batch by name; None adds nothing."""
        for name, value in (item for group in figures for item in (group or {}).items()):
            # Data-parallel replicas return one value each.
            value = value.detach().float().mean()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means over the micro-batches of all processes by name, and start anew."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        (totals,) = sum_over_ranks([torch.cat([sums, sums.new_tensor([self._counts[name] for name in names])])])
        self._sums, self._counts = {}, {}
        totals, counts = totals.view(2, -1).tolist()
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=True)}
