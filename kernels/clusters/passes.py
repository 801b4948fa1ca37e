"""The passes of k-means: the nearest centroid of each token, and the sums of clusters.

Sums are taken in fixed-point numbers. They are exact in any order, so that atomic additions give
the same sums every time.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch

from .devices import OF_TRITON
from .torch_passes import TorchPasses

# The largest coordinate of a head has this many bits.
_POINT_BITS = 30
# Coordinates smaller than 2 to this power count as 0; a factor beyond would overflow float32.
_LEAST_EXPONENT = -90


class Passes(Protocol):
    """The passes over one tensor of tokens. NaN and infinite coordinates count as 0."""

    def largest(self) -> torch.Tensor:
        """The largest absolute coordinate of a token that counts, float32 (batch, heads)."""

    def nearest(self, centroids: torch.Tensor) -> torch.Tensor:
        """The nearest centroid of each token, of equal distances the first.

        Args:
            centroids: (batch, heads, clusters, head_dim), in float32 or in the dtype of the tokens.

        Returns:
            int64 (batch, heads, tokens).
        """

    def sums(
        self, labels: torch.Tensor, clusters: int, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums over the tokens of each cluster that count, and their numbers.

        Args:
            labels: int64 (batch, heads, tokens).
            clusters: number of clusters.
            factor: of the coordinates, float32 (batch, heads), from `fixed_point`.

        Returns:
            sums: int64 (batch, heads, clusters, head_dim), of coordinates times the factor, each
                rounded to a whole number.
            sizes: int64 (batch, heads, clusters).
        """


def passes(x: torch.Tensor, counted: torch.Tensor | None) -> Passes:
    """The passes over tokens, by the kernels of their device.

    Args:
        x: (batch, tokens, heads, head_dim), of any strides.
        counted: bool (batch, tokens), False for tokens that no sum depends on.
    """
    if x.dtype == torch.float64:
        x = x.float()
    if x.device.type in OF_TRITON:
        made: Passes = _of_gpu()(x, counted)
        return made
    return TorchPasses(x, counted)


def fixed_point(largest: torch.Tensor) -> torch.Tensor:
    """The powers of 2 that coordinates are multiplied by, float32, from the largest coordinates."""
    exponent = largest.frexp().exponent.clamp(min=_LEAST_EXPONENT)
    return torch.ldexp(torch.ones_like(largest), _POINT_BITS - exponent)


@functools.cache
def _of_gpu() -> Any:
    # Imported late: there are platforms without Triton.
    from .triton_passes import TritonPasses

    return TritonPasses
