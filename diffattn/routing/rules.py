"""Rules that keep some pairs of a query block and a key block, by their scores.

All rules look at one row of scores at a time: the key blocks of one query block, of one head and
sample. Selections have no gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from diffattn.routing.choosing import choose

# Shares such as 1 - 0.8 are not exact in binary: a count that is whole but for this is whole.
_ROUNDING = 1e-6
# Added to the variance of scores in units of log2, as the public code of Sol-Attn does.
_LEAST_VARIANCE = 1e-6 * math.log(2) ** 2


def kept_blocks(share: float, candidates: int) -> int:
    """The number of blocks that a share of the candidates is: rounded up, and at least 1.

    Raises:
        ValueError: if the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of blocks to keep is {share}, but must be above 0, at most 1")
    return min(candidates, max(1, math.ceil(share * candidates - _ROUNDING)))


@torch.no_grad()
def top(scores: torch.Tensor, count: int, candidates: torch.Tensor | None = None) -> torch.Tensor:
    """The `count` best candidates of each row; of equal scores the first.

    Args:
        scores: (batch, heads, rows, columns).
        count: blocks to keep in a row; a row with fewer candidates keeps all of them.
        candidates: bool, broadcastable to `scores`; None if every block is a candidate.

    Returns:
        bool, in the shape of `scores`.
    """
    pools = scores.flatten(0, 2)
    ranked = None
    if candidates is not None:
        ranked = candidates.expand(scores.shape).flatten(0, 2)
    none = torch.zeros_like(pools, dtype=torch.bool)
    return choose(pools, none, ranked=ranked, budget=count).view(scores.shape)


@torch.no_grad()
def mass(scores: torch.Tensor, share: float, least: int = 1) -> torch.Tensor:
    """The fewest blocks, best first, whose softmax weights exceed a share of the row's mass.

    Args:
        scores: (batch, heads, rows, columns), with the scale of the softmax.
        share: of the mass; 1 keeps all blocks.
        least: blocks to keep at least.

    Returns:
        bool, in the shape of `scores`.
    """
    if share >= 1:
        return torch.ones_like(scores, dtype=torch.bool)
    weights, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = weights.cumsum(-1) - weights
    place = torch.arange(scores.shape[-1], device=scores.device)
    kept = (before <= share) | (place < least)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


@torch.no_grad()
def row_threshold(
    scores: torch.Tensor,
    query_means: torch.Tensor,
    key_means: torch.Tensor,
    scale: float,
    tau: float,
    variance: Literal["diagonal", "exact"] = "diagonal",
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of each row's scores plus `tau` standard deviations (Sol-Attn, arXiv 2607.24027).

    Args:
        scores: `mean_scores` of the means, (batch, heads, rows, columns).
        query_means, key_means, scale: the arguments of `mean_scores`.
        tau: standard deviations above the mean; may be negative.
        variance: "exact" for the variance of the row; "diagonal" for an estimate that leaves out
            the covariance of channels.
        counted: bool (batch, columns): False for key blocks without a token, which do not count.

    Returns:
        (batch, heads, rows, 1).
    """
    if counted is None:
        # Made on the device: a copy from the CPU would wait for all work before.
        counted = torch.ones(
            scores.shape[0], scores.shape[-1], dtype=torch.bool, device=scores.device
        )
    counts = counted.to(scores.dtype)
    total = counts.sum(-1).clamp(min=1)
    shares = counts / total[:, None]
    seen = scores.masked_fill(~counted[:, None, None], 0)
    mean = (seen * shares[:, None, None]).sum(-1, keepdim=True)
    if variance == "exact":
        square = (seen - mean).square() * shares[:, None, None]
        spread = square.sum(-1, keepdim=True)
    else:
        weight = shares[:, :, None, None]
        centre = (key_means * weight).sum(1, keepdim=True)
        of_channel = ((key_means - centre).square() * weight).sum(1)  # (batch, heads, head_dim)
        squares = query_means.transpose(1, 2).square()
        spread = squares @ of_channel[..., None] * scale**2
    return mean + tau * (spread.clamp(min=0) + _LEAST_VARIANCE).sqrt()


@torch.no_grad()
def above(scores: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """The blocks whose score is above a threshold: bool, in the shape of `scores`."""
    return scores > threshold


def neighbours(
    rows: int, columns: int, distance: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The pairs of blocks at most `distance` apart in the sequence: bool (rows, columns)."""
    row, column = (torch.arange(n, device=device) for n in (rows, columns))
    return (row[:, None] - column).abs() <= distance
