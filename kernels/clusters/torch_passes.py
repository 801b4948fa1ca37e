"""The passes of k-means in torch: matrix products, and additions by index."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Distances at a time: 16 MB all but stay in the cache of a CPU.
_DISTANCES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class TorchPasses:
    """The passes over tokens on any device; see `Passes`.

    Attributes:
        points: float32 (batch, heads, tokens, head_dim), 0 for tokens that do not count.
        weights: int64 (batch, heads, tokens), 1 for tokens that count, else 0.
    """

    points: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, counted: torch.Tensor | None) -> TorchPasses:
        """The passes over `x` (batch, tokens, heads, head_dim)."""
        points = x.transpose(1, 2).float().nan_to_num(0, 0, 0)
        weights = torch.ones(x.shape[0], 1, x.shape[1], dtype=torch.int64, device=x.device)
        if counted is not None:
            weights = counted[:, None].long()
            points = points * weights[..., None]
        return cls(points, weights.expand(points.shape[:3]))

    def largest(self) -> torch.Tensor:
        return self.points.abs().amax((2, 3))

    def nearest(self, centroids: torch.Tensor) -> torch.Tensor:
        batch, heads, clusters, _ = centroids.shape
        centroids = centroids.float()
        # Half of the squared distance, but for the part that is the same for all centroids.
        half = centroids.square().sum(-1)[:, :, None] / 2
        step = max(1, _DISTANCES_AT_ONCE // (batch * heads * clusters))
        parts = self.points.split(step, 2)
        return torch.cat([(part @ centroids.mT).sub_(half).argmax(-1) for part in parts], 2)

    def sums(
        self, labels: torch.Tensor, clusters: int, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, _, head_dim = self.points.shape
        fixed = (self.points * factor[..., None, None]).round_().long().flatten(0, 2)
        first = torch.arange(batch * heads, device=labels.device).view(batch, heads, 1) * clusters
        slot = (labels + first).flatten()
        sums = fixed.new_zeros(batch * heads * clusters, head_dim).index_add_(0, slot, fixed)
        sizes = sums.new_zeros(batch * heads * clusters)
        sizes.index_add_(0, slot, self.weights.flatten())
        shape = batch, heads, clusters
        return sums.view(*shape, head_dim), sizes.view(shape)
