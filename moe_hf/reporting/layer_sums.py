"""Sums over the tokens of one router while batches stream by; their size depends on the number of experts alone.

Letters: T tokens (sub-tokens, where a router takes those), E experts, K experts per token, R rows, G groups.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from moe_hf.finetuning.router_watch import RouterDecision


def served_weights(decision: RouterDecision) -> torch.Tensor:
    """The weight that each expert has for each real token, (T, E) float32; 0 where it was not chosen or not served."""
    weights, token = decision.routing.top_k_weights.detach().float(), decision.routing.token_index
    index = decision.routing.top_k_index
    weights = weights * decision.real_choices()
    table = torch.zeros(decision.router_logits.shape, dtype=torch.float32, device=weights.device)
    if token is None:
        return table.scatter_add_(1, index, weights)
    place = token * table.shape[1] + index[:, 0]
    return table.view(-1).index_add_(0, place, weights[:, 0]).view_as(table)


class LayerSums:
    """What one router did, added up on the CPU."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts, self.num_tokens = num_experts, 0
        self.entropy = self.top_1 = 0.0
        self.choices, self.dropped = (torch.zeros(num_experts, dtype=torch.int64) for _ in range(2))
        self.weight = torch.zeros(num_experts, dtype=torch.float64)
        self.active = torch.zeros(num_experts + 1, dtype=torch.int64)
        self.together = torch.zeros(num_experts, num_experts, dtype=torch.int64)
        self.groups: dict[str, torch.Tensor] = {}

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """All sums by name, int64 or float64; `from_tensors` is the inverse."""
        counts = {"num_tokens": torch.tensor(self.num_tokens)}
        means = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("entropy", "top_1")}
        tables = {name: getattr(self, name) for name in ("choices", "dropped", "weight", "active", "together")}
        return counts | means | tables | {f"groups.{kind}": table for kind, table in self.groups.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "LayerSums":
        """The sums that these tensors are of."""
        sums = cls(len(tensors["choices"]))
        for name, tensor in tensors.items():
            kind = name.partition("groups.")[2]
            if kind:
                sums.groups[kind] = tensor
            else:
                setattr(sums, name, tensor if tensor.ndim else tensor.item())
        return sums

    @torch.no_grad()
    def add(
        self,
        decision: RouterDecision,
        log_scores: torch.Tensor,
        weights: torch.Tensor,
        labels: Mapping[str, torch.Tensor],
    ) -> None:
        """Add one forward pass.

        Args:
            log_scores: logarithms of each token's scores as parts of 1, (T, E).
            weights: of `served_weights`, (T, E).
            labels: by kind, the group of each token, (T,), from 0.
        """
        mask, index = decision.token_mask, decision.routing.top_k_index
        num_rows, experts = log_scores.shape
        real = torch.ones(num_rows, dtype=torch.bool, device=index.device) if mask is None else mask.to(index.device)
        chosen = decision.real_choices().bool()  # (T, K), or (R, 1)
        token = decision.routing.token_index
        rows = (torch.arange(num_rows, device=index.device) if token is None else token)[:, None].expand(index.shape)
        self.num_tokens += int(real.sum())
        self.choices += index[chosen].bincount(minlength=experts).cpu()
        unserved = chosen & (decision.routing.top_k_weights.detach() == 0)
        self.dropped += index[unserved].bincount(minlength=experts).cpu()
        probability = log_scores[real].exp()
        # A score of 0 adds nothing, though its logarithm is not finite.
        self.entropy += float(-torch.special.xlogy(probability, probability).sum(dtype=torch.float64))
        self.top_1 += float(probability.max(-1).values.sum(dtype=torch.float64)) if len(probability) else 0.0
        self.weight += weights.sum(0, dtype=torch.float64).cpu()
        used = (weights[real] != 0).float()
        self.active += used.sum(-1).long().bincount(minlength=experts + 1).cpu()
        self.together += (used.T @ used).round().long().cpu()
        for kind, group in labels.items():
            pair = group.to(index.device)[rows[chosen]] * experts + index[chosen]
            self._add_groups(kind, pair.bincount().cpu())

    def _add_groups(self, kind: str, counts: torch.Tensor) -> None:
        before = self.groups.get(kind)
        count = max(-(-len(counts) // self.num_experts), 0 if before is None else len(before))
        table = torch.zeros(count * self.num_experts, dtype=torch.int64)
        table[: len(counts)] = counts
        table = table.view(count, self.num_experts)
        if before is not None:
            table[: len(before)] += before
        self.groups[kind] = table


class ChangeSums:
    """How the choices of one router differ from those of another checkpoint's, on the same tokens."""

    def __init__(self, num_experts: int) -> None:
        self.same_choices = self.union = self.same_set = self.same_first = self.num_tokens = 0
        self.used, self.kept = (torch.zeros(num_experts, dtype=torch.int64) for _ in range(2))

    def add(self, own: torch.Tensor, other: torch.Tensor, real: torch.Tensor | None) -> None:
        """Add the served weights of both routers, (T, E), of the tokens that are `real`, (T,)."""
        if real is not None:
            own, other = own[real], other[real]
        ours, theirs = own != 0, other != 0
        both = ours & theirs
        self.num_tokens += len(own)
        self.same_choices += int(both.sum())
        self.union += int((ours | theirs).sum())
        self.same_set += int((ours == theirs).all(-1).sum())
        self.same_first += int((own.argmax(-1) == other.argmax(-1)).sum()) if len(own) else 0
        self.used += ours.sum(0).cpu()
        self.kept += both.sum(0).cpu()

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """All sums by name, int64; `from_tensors` is the inverse."""
        names = ("same_choices", "union", "same_set", "same_first", "num_tokens", "used", "kept")
        return {name: torch.as_tensor(getattr(self, name)) for name in names}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "ChangeSums":
        """The sums that these tensors are of."""
        sums = cls(len(tensors["used"]))
        for name, tensor in tensors.items():
            setattr(sums, name, tensor if tensor.ndim else tensor.item())
        return sums


def summed_over_processes(tensors: Mapping[Any, torch.Tensor], device: torch.device) -> dict[Any, torch.Tensor]:
    """The sum of each tensor over all processes, in one collective call for each of int64 and float64.

    A process may lack a tensor, or have fewer rows of it than others: what is missing counts as 0.

    Args:
        device: where the processes' backend sums.
    """
    shapes: list[dict[Any, tuple]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shapes, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    largest: dict[Any, tuple] = {}
    for name, (dtype, shape) in (item for own in shapes for item in own.items()):
        largest[name] = dtype, max(largest.get(name, (dtype, shape))[1], shape)
    result = {}
    for dtype in (torch.int64, torch.float64):
        wanted = {name: torch.zeros(shape, dtype=dtype) for name, (kind, shape) in largest.items() if kind == dtype}
        for name, whole in wanted.items():
            if name in tensors:
                (whole[: len(tensors[name])] if whole.ndim else whole).copy_(tensors[name])
        flat = torch.cat([whole.reshape(-1) for whole in wanted.values()] or [torch.zeros(0, dtype=dtype)]).to(device)
        dist.all_reduce(flat)
        parts = flat.cpu().split([whole.numel() for whole in wanted.values()])
        result |= {name: part.view(whole.shape) for (name, whole), part in zip(wanted.items(), parts, strict=True)}
    # In the order in which the first process that has them does.
    return {name: result[name] for name in largest}
