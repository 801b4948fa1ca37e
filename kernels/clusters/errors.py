"""The sums that the errors of means in the place of keys are made of, over spans of keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from .devices import OF_TRITON


@dataclass(frozen=True)
class SpanSums:
    """Sums over the keys j of each span, for each row; x_j is the score of a key.

    Attributes:
        highest: the highest x_j, -inf for a span without keys.
        squares: the sum of exp(x_j - highest)^2 |v_j|^2.
        products: the sum of exp(x_j - highest) v_j . v, with the mean value v of the cluster.

    All are float32 (batch, heads, rows, spans), where each tile has the same number of spans.
    """

    highest: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor


def spans_at_most(tile: int, device: torch.device) -> int:
    """The most spans of a tile that `span_sums` makes on a device; a tile is a multiple of 16."""
    return tile // 16 if device.type in OF_TRITON else tile


def span_sums(
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mean_value: torch.Tensor,
    cluster: torch.Tensor,
    held: torch.Tensor,
    scale: float,
) -> SpanSums:
    """The sums over spans, which are as long as the device's kernels have them.

    Args:
        rows: float32 (batch, heads, rows, head_dim), whose products with keys are scores.
        key, value: (batch, places, heads, head_dim), in tiles; finite.
        mean_value: float32 (batch, heads, clusters, head_dim).
        cluster: int64 (batch, heads, tiles), the cluster of each tile; any number from 0 to the
            number of clusters where a tile holds nothing.
        held: int64 (batch, heads, tiles), the number of keys at the start of each tile.
        scale: factor of the scores.
    """
    if key.device.type in OF_TRITON and key.dtype != torch.float64:
        made: SpanSums = _of_gpu()(rows, key, value, mean_value, cluster, held, scale)
        return made
    return _of_keys(rows, key, value, mean_value, cluster, held, scale)


def _of_keys(
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mean_value: torch.Tensor,
    cluster: torch.Tensor,
    held: torch.Tensor,
    scale: float,
) -> SpanSums:
    """The sums over spans of one key."""
    k, v = (x.float().transpose(1, 2) for x in (key, value))
    tile = k.shape[2] // held.shape[2]
    there = (torch.arange(tile, device=held.device) < held[..., None]).flatten(2)
    highest = (rows @ k.mT * scale).masked_fill(~there[:, :, None], -torch.inf)
    last = mean_value.shape[2] - 1
    of_tile = cluster.clamp(max=last)[..., None].expand(-1, -1, -1, v.shape[3])
    own_mean = mean_value.gather(2, of_tile).repeat_interleave(tile, 2)
    squares, products = (x.sum(-1)[:, :, None].expand_as(highest) for x in (v * v, v * own_mean))
    return SpanSums(highest, squares, products)


@functools.cache
def _of_gpu() -> Any:
    # Imported late: there are platforms without Triton.
    from .triton_errors import span_sums

    return span_sums
