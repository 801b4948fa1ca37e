"""Rules that keep some pairs of a query block and a key block, by their scores.

All rules look at one row of scores at a time: the key blocks of one query block, of one head and
sample. Selections have no gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from diffattn.routing.choosing import choose
from diffattn.selected.by_kernels import selection_kernels

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
def top(
    scores: torch.Tensor,
    count: int | torch.Tensor,
    candidates: torch.Tensor | None = None,
    *,
    ruled_out: bool = False,
) -> torch.Tensor:
    """The best candidates of each row; of equal scores the first.

    Args:
        scores: (batch, heads, rows, columns).
        count: blocks to keep in a row, or int32 (rows,), their number for each row. A row with
            fewer candidates keeps all of them.
        candidates: bool, broadcastable to `scores`; None if every block is a candidate.
        ruled_out: whether scores of -inf and NaN rule blocks out.

    Returns:
        bool, in the shape of `scores`.
    """
    kernels = selection_kernels(scores)
    if (
        kernels is not None
        and scores.dtype == torch.float32
        and scores.shape[-1] <= kernels.MOST_COLUMNS
    ):
        best: torch.Tensor = kernels.best_of_rows(scores, count, candidates, ruled_out=ruled_out)
        return best
    if ruled_out:
        there = scores > -torch.inf
        candidates = there if candidates is None else candidates & there
        # A score of -inf among the ranked ones would leave no order among the others.
        scores = scores.nan_to_num(0, neginf=0)
    pools = scores.flatten(0, 2)
    ranked = None
    if candidates is not None:
        ranked = candidates.expand(scores.shape).flatten(0, 2)
    if isinstance(count, torch.Tensor):
        count = count.expand(scores.shape[:3]).flatten()
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
        mean = scores.mean(-1, keepdim=True)
        if variance == "exact":
            spread = scores.var(-1, correction=0, keepdim=True)
        else:
            of_channel = key_means.var(1, correction=0)  # (batch, heads, head_dim)
    else:
        counts = counted.to(scores.dtype)
        shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        seen = scores.masked_fill(~counted[:, None, None], 0)
        mean = (seen * shares[:, None, None]).sum(-1, keepdim=True)
        if variance == "exact":
            square = (seen - mean).square() * shares[:, None, None]
            spread = square.sum(-1, keepdim=True)
        else:
            weight = shares[:, :, None, None]
            centre = (key_means * weight).sum(1, keepdim=True)
            of_channel = ((key_means - centre).square() * weight).sum(1)
    if variance == "diagonal":
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
