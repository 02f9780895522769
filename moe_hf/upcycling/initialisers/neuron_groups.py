"""Cuts the neurons of a dense MLP into equal groups: at random, by their weights, or by what they do on tokens.

Letters: T tokens, D model width, F neurons, E groups.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from moe_hf.modeling.routing import wide
from moe_hf.upcycling.initialisers.base import DenseLayer
from moe_hf.upcycling.recipes import BLOCK_BYTES
from moe_hf.upcycling.router_init.rows import spherical_kmeans


ITERATIONS = 10
# Of the activation patterns that are compared; more tokens are projected onto this many random directions.
PATTERN_SIZE = 256


def random_groups(layer: DenseLayer, neurons: torch.Tensor, count: int) -> torch.Tensor:
    """Groups of equal size at random."""
    labels = torch.arange(len(neurons)) % count
    return labels[torch.randperm(len(neurons), generator=layer.generator("groups"))]


def contiguous_groups(layer: DenseLayer, neurons: torch.Tensor, count: int) -> torch.Tensor:
    """Neighbours together."""
    return torch.arange(len(neurons)) // (len(neurons) // count)


def weight_groups(layer: DenseLayer, neurons: torch.Tensor, count: int) -> torch.Tensor:
    """Neurons that read in similar directions: balanced k-means of the rows of `gate`, or of `up` in a plain MLP."""
    rows = layer.read("gate" if layer.site.gated else "up")
    if len(neurons) < len(rows):
        rows = rows.index_select(0, neurons.to(rows.device))
    return kmeans(rows, count, layer.generator("groups"))[0]


def coactivation_groups(layer: DenseLayer, neurons: torch.Tensor, count: int) -> torch.Tensor:
    """Neurons that are active on the same tokens: balanced k-means of their |activation| over the tokens, normalised."""
    tokens = len(layer.hidden_states)
    generator = layer.generator("directions")
    patterns, start = 0, 0
    for _, activations in layer.activations():
        size = len(activations)
        if tokens > PATTERN_SIZE:
            directions = torch.randn(size, PATTERN_SIZE, generator=generator)
        else:
            directions = torch.eye(tokens)[start : start + size]
        patterns = patterns + activations.abs().t() @ directions.to(activations.device)  # (F, tokens or PATTERN_SIZE)
        start += size
    patterns = functional.normalize(patterns.index_select(0, neurons.to(patterns.device)), dim=-1)
    return kmeans(patterns, count, layer.generator("groups"))[0]


def importance_groups(layer: DenseLayer, neurons: torch.Tensor, count: int) -> torch.Tensor:
    """Neurons that matter on the same kind of token: tokens are clustered, and each neuron goes where it matters most.

    The clusters are those of `KMeansRouter` for as many experts, in its order: with that router each expert gets the
    tokens that its neurons matter for.
    """
    centres = spherical_kmeans(layer.hidden_states, count, layer.generator("router", "kmeans"))
    kinds = (functional.normalize(wide(layer.hidden_states.cpu()), dim=-1) @ centres.t()).argmax(-1)
    matters = importance(layer, kinds, count).index_select(1, neurons)  # (E, F)
    relative = matters / matters.sum(0).clamp_min(1e-30)
    return assign_evenly(-relative.t())


NEURON_GROUPS: dict[str, Callable[[DenseLayer, torch.Tensor, int], torch.Tensor]] = {
    "random": random_groups,
    "contiguous": contiguous_groups,
    "kmeans": weight_groups,
    "coactivation": coactivation_groups,
    "importance": importance_groups,
}
# Those that look at the user's tokens.
DATA_DRIVEN = frozenset({"coactivation", "importance"})


def importance(layer: DenseLayer, kinds: torch.Tensor | None = None, count: int = 1) -> torch.Tensor:
    """How much each neuron adds to the MLP's output: the mean over tokens of |activation| times the norm of its output row.

    Args:
        layer (`DenseLayer`): with hidden states.
        kinds (`torch.Tensor`, *optional*): the kind of each token, (T,), in [0, count); all are of one kind if not given.
        count (`int`): of kinds.

    Returns:
        float32, (count, F), on the CPU.
    """
    kinds = torch.zeros(len(layer.hidden_states), dtype=torch.long) if kinds is None else kinds
    sums, start = 0, 0
    for _, activations in layer.activations():
        members = functional.one_hot(kinds[start : start + len(activations)], count).to(activations)
        sums = sums + members.t() @ activations.abs()
        start += len(activations)
    down = layer.read("down")
    step = max(1, BLOCK_BYTES // (4 * down.shape[1]))
    norms = sum(wide(rows).square().sum(0) for rows in down.split(step)).sqrt()
    tokens = torch.bincount(kinds, minlength=count).clamp_min(1)
    return (sums * norms).float().cpu() / tokens[:, None]


def kmeans(points: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced k-means: clusters of equal size, or one less where the number of points is no multiple.

    Lloyd's iterations from `count` random points, with an assignment under a capacity; the best of them is kept.

    Args:
        points (`torch.Tensor`): (n, d), any float dtype; worked on in blocks, in float32 or wider.
        count (`int`): of clusters, at most n.
        generator (`torch.Generator`): on the CPU.

    Returns:
        The cluster of each point, (n,) int64 on the CPU, and the centroids, (count, d).
    """
    chosen = torch.randperm(len(points), generator=generator)[:count].to(points.device)
    centroids = wide(points.index_select(0, chosen))
    step = max(1, BLOCK_BYTES // (4 * points.shape[1]))
    best = None
    for _ in range(ITERATIONS):
        # Squared distances less the points' own squared norms, which are the same for each centroid.
        half = centroids.square().sum(-1) / 2
        cost = torch.cat([half - wide(block) @ centroids.t() for block in points.split(step)])  # (n, count)
        labels = assign_evenly(cost)
        members = functional.one_hot(labels, count).to(centroids)
        sums = sum(m.t() @ wide(block) for m, block in zip(members.split(step), points.split(step), strict=True))
        centroids = sums / members.sum(0).clamp_min(1)[:, None]
        # What the sum of squared distances to the members' mean leaves out is the same for each assignment.
        spread = -float((members.sum(0) * centroids.square().sum(-1)).sum())
        if best is None or spread < best[0]:
            best = (spread, labels, centroids)
    return best[1], best[2]


def assign_evenly(cost: torch.Tensor) -> torch.Tensor:
    """Give each point a cheap cluster, with at most ceil(n / count) points per cluster.

    Points propose to their cheapest cluster that has room, and it takes the cheapest proposals, until all have a place.

    Args:
        cost (`torch.Tensor`): (n, count).

    Returns:
        The cluster of each point, (n,) int64 on the CPU.
    """
    cost = cost.cpu()
    size, count = cost.shape
    room = [-(-size // count)] * count
    labels = torch.full((size,), -1)
    waiting = torch.arange(size)
    while len(waiting):
        full = torch.tensor([places == 0 for places in room])
        value, choice = cost[waiting].masked_fill(full, float("inf")).min(-1)
        for cluster in range(count):
            proposals = torch.where(choice == cluster)[0]
            taken = proposals[value[proposals].argsort(stable=True)[: room[cluster]]]
            labels[waiting[taken]] = cluster
            room[cluster] -= len(taken)
        waiting = waiting[labels[waiting] < 0]
    return labels
