"""Clusters of tokens by k-means, the same ones at every call and without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Distances at a time: 16 MB stay in the cache of a GPU and, all but, of a CPU.
_DISTANCES_AT_ONCE = 1 << 22
# Sums are taken in fixed-point numbers: the largest coordinate of a head has this many bits.
_POINT_BITS = 30
# Coordinates smaller than 2 to this power count as 0; a factor beyond would overflow float32.
_LEAST_EXPONENT = -90


@dataclass(frozen=True)
class Clusters:
    """Clusters of the tokens of each sample and head.

    Attributes:
        labels: int64 (batch, heads, tokens), the cluster of each token.
        sizes: int64 (batch, heads, clusters), the number of tokens that count in each cluster.
        centroids: float32 (batch, heads, clusters, head_dim), the means of the clusters. An empty
            cluster has the centroid that no token was nearest to.
    """

    labels: torch.Tensor
    sizes: torch.Tensor
    centroids: torch.Tensor


def first_tokens(tokens: int, clusters: int, device: torch.device) -> torch.Tensor:
    """The tokens that k-means starts from, evenly spread over the sequence: int64 (clusters,)."""
    return (torch.arange(clusters, device=device) * 2 + 1) * tokens // (2 * clusters)


@torch.no_grad()
def k_means(
    x: torch.Tensor,
    centroids: torch.Tensor,
    iterations: int,
    counted: torch.Tensor | None = None,
) -> Clusters:
    """Lloyd's algorithm with Euclidean distances and a fixed number of iterations.

    An iteration gives each token the label of the nearest centroid, of equal distances the first,
    and then moves each centroid to the mean of its tokens. Labels and sizes are those of the last
    iteration. Sums are exact in any order, so that atomic additions give the same sums every time.

    Args:
        x: (batch, tokens, heads, head_dim).
        centroids: (batch, heads, clusters, head_dim), to start from.
        iterations: at least 1.
        counted: bool (batch, tokens): False for tokens that no centroid depends on.
    """
    points = x.transpose(1, 2).float().nan_to_num(0, 0, 0)  # (batch, heads, tokens, head_dim)
    batch, heads, tokens, _ = points.shape
    clusters = centroids.shape[2]
    weights = torch.ones(batch, 1, tokens, dtype=torch.int64, device=x.device)
    if counted is not None:
        weights = counted[:, None].long()
        points = points * weights[..., None]
    exponent = points.abs().amax((2, 3), keepdim=True).frexp().exponent.clamp(min=_LEAST_EXPONENT)
    factor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), _POINT_BITS - exponent)
    fixed = (points * factor).round_().long().flatten(0, 2)
    start = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * clusters
    centroids = centroids.float()
    weights = weights.expand(batch, heads, tokens).flatten()
    for _ in range(iterations):
        labels = _nearest(points, centroids)
        slot = (labels + start).flatten()
        sums = fixed.new_zeros(batch * heads * clusters, fixed.shape[1]).index_add_(0, slot, fixed)
        sizes = fixed.new_zeros(batch * heads * clusters).index_add_(0, slot, weights)
        sizes = sizes.view(batch, heads, clusters)
        means = sums.view(centroids.shape).double() / sizes.clamp(min=1)[..., None]
        centroids = torch.where(sizes[..., None] > 0, (means / factor).float(), centroids)
    return Clusters(labels, sizes, centroids)


def _nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of each point, int64 (batch, heads, tokens)."""
    batch, heads, clusters, _ = centroids.shape
    # Half of the squared distance, but for the part that is the same for all centroids.
    half = centroids.square().sum(-1)[:, :, None] / 2
    step = max(1, _DISTANCES_AT_ONCE // (batch * heads * clusters))
    parts = points.split(step, 2)
    return torch.cat([(part @ centroids.mT).sub_(half).argmax(-1) for part in parts], 2)
