"""Clusters of tokens by k-means, the same ones at every call and without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.kernels.clusters import fixed_point, passes


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

    def of_heads(self, some: slice) -> Clusters:
        """The clusters of some heads."""
        return Clusters(self.labels[:, some], self.sizes[:, some], self.centroids[:, some])


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
        centroids: (batch, heads, clusters, head_dim), to start from. In the dtype of `x` they take
            a third of the products that they take in float32 on a GPU.
        iterations: at least 1.
        counted: bool (batch, tokens): False for tokens that no centroid depends on.
    """
    tokens = passes(x, counted)
    factor = fixed_point(tokens.largest())
    finite = centroids.nan_to_num(0, 0, 0)
    for _ in range(iterations):
        labels = tokens.nearest(finite)
        sums, sizes = tokens.sums(labels, finite.shape[2], factor)
        means = sums.double() / sizes.clamp(min=1)[..., None] / factor[..., None, None]
        finite = torch.where(sizes[..., None] > 0, means.float(), finite.float())
    return Clusters(labels, sizes, finite)
