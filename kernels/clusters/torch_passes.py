"""The passes of k-means in torch: matrix products, and additions by index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Numbers at a time: 16 MB all but stay in the cache of a CPU.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class TorchPasses:
    """The passes over tokens on any device; see `Passes`.

    Attributes:
        x: (batch, tokens, heads, head_dim), of any strides.
        counted: bool (batch, tokens), False for tokens that do not count; None if all count.
    """

    x: torch.Tensor
    counted: torch.Tensor | None

    def largest(self) -> torch.Tensor:
        parts = [part.abs().amax((2, 3)) for _, part in self._parts(self.x.shape[3])]
        return torch.stack(parts).amax(0)

    def nearest(self, centroids: torch.Tensor) -> torch.Tensor:
        centroids = centroids.float()
        # Half of the squared distance, but for the part that is the same for all centroids.
        half = centroids.square().sum(-1)[:, :, None] / 2
        parts = self._parts(centroids.shape[2])
        return torch.cat([(part @ centroids.mT).sub_(half).argmax(-1) for _, part in parts], 2)

    def sums(
        self, labels: torch.Tensor, clusters: int, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, _, heads, head_dim = self.x.shape
        first = torch.arange(batch * heads, device=labels.device).view(batch, heads, 1) * clusters
        slot = labels + first
        sums = labels.new_zeros(batch * heads * clusters, head_dim)
        for some, part in self._parts(head_dim):
            fixed = (part * factor[..., None, None]).round_().long()
            sums.index_add_(0, slot[:, :, some].flatten(), fixed.flatten(0, 2))
        weights = torch.ones_like(labels)
        if self.counted is not None:
            weights = weights * self.counted[:, None]
        sizes = labels.new_zeros(batch * heads * clusters)
        sizes.index_add_(0, slot.flatten(), weights.flatten())
        shape = batch, heads, clusters
        return sums.view(*shape, head_dim), sizes.view(shape)

    def _parts(self, numbers: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some tokens at a time, for each of which so many numbers are made.

        Yields:
            The tokens, and their coordinates, float32 (batch, heads, tokens, head_dim), 0 for
            tokens that do not count.
        """
        batch, tokens, heads, _ = self.x.shape
        step = max(1, _AT_ONCE // (batch * heads * numbers))
        for first in range(0, tokens, step):
            some = slice(first, first + step)
            part = self.x[:, some].transpose(1, 2).float().nan_to_num(0, 0, 0)
            if self.counted is not None:
                part = part * self.counted[:, None, some, None]
            yield some, part
