"""Clusters chosen by the error of their means, as SVG-EAR does (arXiv 2603.08982)."""

from __future__ import annotations

import torch

from diffattn.kernels.clusters import span_sums
from diffattn.routing.filled import FilledClusters

# Errors are differences of sums. Below this share of the sums a difference is rounding.
_ROUNDING = 1e-6
# Logarithms that rank behind all others: clusters whose mean is exact, and those chosen before.
_EXACT = -1e8
_GUARANTEED = -1e10


@torch.no_grad()
def log_errors(
    centroids: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: FilledClusters,
    scale: float,
) -> torch.Tensor:
    """The error of a key cluster's mean in the place of its keys, for the mean of a query cluster.

    The error is the sum over keys j of the cluster of |exp(x_j) v_j - exp(x) v|^2. x_j is the score
    of the key, x the score of the mean key, and v the mean value.

    Args:
        centroids: float32 (batch, heads, query clusters, head_dim).
        key, value: (batch, places, heads, head_dim), from `keys.filled`.
        keys: the clusters.
        scale: factor of the scores.

    Returns:
        float32 (batch, heads, query clusters, key clusters), the logarithms. A cluster of one key
        or none has no error, and a logarithm far below all others.
    """
    mean_k, mean_v = (keys.means(x).float().transpose(1, 2) for x in (key, value))
    spans = span_sums(centroids, key, value, mean_v, keys.cluster, keys.held, scale)
    # Each (batch, heads, rows, tiles, spans of a tile).
    tiles = keys.held.shape[2]
    top, squares, products = (
        x.unflatten(3, (tiles, -1)) for x in (spans.highest, spans.squares, spans.products)
    )
    highest = _highest(top.amax(-1), keys)
    weights = (top - keys.of_clusters(highest)[..., None]).exp()
    # The score of the mean key is a mean of scores, and no higher than the highest.
    of_mean = (centroids @ mean_k.mT * scale - highest).exp()
    own = keys.sums((weights.square() * squares).sum(-1))
    mean = (keys.sizes * mean_v.square().sum(-1))[:, :, None] * of_mean.square()
    error = own - 2 * of_mean * keys.sums((weights * products).sum(-1)) + mean
    floor = ((own + mean) * _ROUNDING).clamp(min=torch.finfo(error.dtype).tiny)
    logarithms = 2 * highest + torch.maximum(error, floor).log()
    return logarithms.masked_fill(keys.sizes[:, :, None] <= 1, _EXACT)


def _highest(of_tiles: torch.Tensor, keys: FilledClusters) -> torch.Tensor:
    """The highest score of each cluster, 0 for an empty one, from the highest of each tile."""
    batch, heads, rows, _ = of_tiles.shape
    clusters = keys.sizes.shape[2]
    lowest = of_tiles.new_full((batch, heads, rows, clusters + 1), -torch.inf)
    cluster = keys.cluster[:, :, None].expand_as(of_tiles)
    highest = lowest.scatter_reduce_(3, cluster, of_tiles, "amax")[..., :clusters]
    return highest.masked_fill(highest == -torch.inf, 0)


@torch.no_grad()
def by_error(
    scores: torch.Tensor,
    errors: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    share: float,
    least_share: float,
    gamma: float = 1,
) -> torch.Tensor:
    """The clusters of the largest errors, for as many token pairs as a share of the mass takes.

    Args:
        scores: (batch, heads, rows, columns), whose softmax is the mass.
        errors: the result of `log_errors`, in the same shape.
        query_sizes: int64 (batch, heads, rows), tokens of the query clusters.
        key_sizes: int64 (batch, heads, columns), tokens of the key clusters.
        share: of the mass: its clusters are the budget.
        least_share: of the clusters of the largest mass, which are chosen in any case; at least
            one cluster unless the share is 0. The budget holds at least twice as many.
        gamma: power of the number of pairs that errors are divided by.

    Returns:
        bool, in the shape of `scores`. The last cluster that is chosen may exceed the budget.
    """
    columns = scores.shape[-1]
    area = query_sizes[..., None] * key_sizes[:, :, None]
    weights, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    place = torch.arange(columns, device=scores.device)
    within = (weights.cumsum(-1) - weights <= share) | (place == 0)
    first = place < 0
    if least_share > 0:
        first = place < max(1, int(least_share * columns))
        within |= place < max(1, int(2 * least_share * columns))
    area_of_place = area.gather(-1, order)
    rest = ((within & ~first) * area_of_place).sum(-1, keepdim=True)
    guaranteed = torch.zeros_like(within).scatter_(-1, order, first.expand_as(within))
    rank = (errors - gamma * area.clamp(min=1).log()).masked_fill(guaranteed, _GUARANTEED)
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    area_of_rank = area.gather(-1, order)
    taken = area_of_rank.cumsum(-1) - area_of_rank < rest
    return torch.zeros_like(taken).scatter_(-1, order, taken) | guaranteed
