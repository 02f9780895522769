"""The choices of a batch as rows sorted by expert, and the way from tokens to rows and back.

Letters: T tokens, K experts per token, R rows (T * K less what goes to experts elsewhere), D width, E experts.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class ExpertRows:
    """Rows of one forward pass, sorted so that each expert's rows are one slice.

    `order` (R,) is the position of each row in the flattened (T, K) choices. `groups` is the order of the experts: those
    of `last` come at the end. `ends` (E,) int32, on the rows' device, is where the group at each place ends. `inverse`
    (T, K) is the row of each choice.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    ends: torch.Tensor
    groups: tuple[int, ...]
    num_last: int
    num_choices: int
    num_tail: int
    host_ends: tuple[int, ...] | None = None

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where each group ends, in host memory; on an accelerator the first use waits for the device."""
        return self.host_ends if self.host_ends is not None else tuple(self.ends.tolist())

    @cached_property
    def token(self) -> torch.Tensor:
        """(R,): the token of each row."""
        return self.order // self.num_choices

    @property
    def last_start(self) -> int:
        """The first row of the experts in `last`."""
        place = len(self.groups) - self.num_last
        if not self.num_last:
            return self.order.numel()
        return self.bounds[place - 1] if place else 0

    def slices(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end) of the experts that have rows, in the order of the rows."""
        starts = (0, *self.bounds)[: len(self.groups)]
        return [(e, a, b) for e, a, b in zip(self.groups, starts, self.bounds, strict=True) if b > a]

    def ascending_runs(self) -> list["ExpertRows"]:
        """The rows in parts within which the ids of the experts rise; their ids are kept."""
        breaks = [place for place in range(1, len(self.groups)) if self.groups[place] < self.groups[place - 1]]
        if not breaks:
            return [self]
        edges = [0, *breaks, len(self.groups)]
        return [self._part(begin, end) for begin, end in zip(edges[:-1], edges[1:], strict=True)]

    def first_part(self) -> "ExpertRows":
        """The rows of experts that are not in `last`."""
        place = len(self.groups) - self.num_last
        return self._part(0, place)

    def last_part(self) -> "ExpertRows":
        """The rows of the experts in `last`, as groups 0, 1, ... of their own, starting at row 0."""
        if self.num_last == len(self.groups):
            return replace(self, groups=tuple(range(self.num_last)))
        part = self._part(len(self.groups) - self.num_last, len(self.groups))
        return replace(part, groups=tuple(range(self.num_last)))

    def _part(self, begin: int, end: int) -> "ExpertRows":
        start = self.bounds[begin - 1] if begin else 0
        stop = self.bounds[end - 1] if end > begin else start
        return replace(
            self,
            order=self.order[start:stop],
            ends=self.ends[begin:end] - start,
            groups=self.groups[begin:end],
            host_ends=tuple(bound - start for bound in self.bounds[begin:end]),
            num_last=0,
        )

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (R, D): the token of each row."""
        return tokens.index_select(0, self.token)

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, D) -> (T, D): the sum over each token's rows, the same on every run."""
        if self.num_tail:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        if rows.shape[0] == 0:
            return rows.new_zeros(self.inverse.shape[0], rows.shape[1])
        if self.num_choices == 1:
            return rows.index_select(0, self.inverse.flatten())
        if rows.device.type == "cpu":
            return F.embedding_bag(self.inverse, rows, mode="sum")
        return rows.index_select(0, self.inverse.flatten()).unflatten(0, self.inverse.shape).sum(1)

    def take(self, choices: torch.Tensor) -> torch.Tensor:
        """(T, K) -> (R,): one value per choice, in the order of the rows."""
        return choices.flatten().index_select(0, self.order)

    def put_back(self, values: torch.Tensor) -> torch.Tensor:
        """(R,) -> (T, K): the inverse of `take`; 0 for choices without a row."""
        choices = values.new_zeros(self.inverse.numel())
        return choices.index_copy_(0, self.order, values).view(self.inverse.shape)


@torch.no_grad()
def sort_rows(
    top_k_index: torch.Tensor, num_experts: int, *, last: Collection[int] = (), may_leave_out: bool = False
) -> ExpertRows:
    """Sort the choices of a batch by expert, once for both maps of a layer.

    Args:
        top_k_index (`torch.Tensor`): chosen experts, `(T, K)` integers in [0, num_experts).
        num_experts (`int`): E.
        last: experts whose rows come after all others (those with parameters of their own), in this order.
        may_leave_out (`bool`): ids of E and above may occur, which stand for experts elsewhere; they get no row. On an
            accelerator this costs one wait for the device.
    """
    ids, device = top_k_index.reshape(-1), top_k_index.device
    groups = tuple(e for e in range(num_experts) if e not in set(last)) + tuple(last)
    if groups != tuple(range(num_experts)):
        place = torch.empty(num_experts, dtype=torch.long)
        place[list(groups)] = torch.arange(num_experts)
        place = torch.cat([place, place.new_full((1,), num_experts)]).to(device, non_blocking=True)
        ids = place[ids.clamp(max=num_experts)]
    ids, order = torch.sort(ids, stable=True)
    bounds = torch.arange(num_experts, device=device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, bounds, right=True, out_int32=True)
    host_ends = tuple(ends.tolist()) if device.type == "cpu" or may_leave_out else None
    num_rows = host_ends[-1] if may_leave_out and host_ends else ids.numel()
    # A choice without a row points at one row of zeros behind the others.
    inverse = torch.full_like(order, num_rows)
    order = order[:num_rows]
    inverse[order] = torch.arange(num_rows, device=device)
    return ExpertRows(
        order=order,
        inverse=inverse.view(top_k_index.shape),
        ends=ends,
        groups=groups,
        num_last=len(last),
        num_choices=top_k_index.shape[1],
        num_tail=ids.numel() - num_rows,
        host_ends=host_ends,
    )
