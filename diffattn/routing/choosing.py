"""choose(): the best entries of pools of scores, the same ones on every device.

Scores become fixed-point numbers of 24 bits, from the lowest to the highest score of their pool.
Sums of such numbers are exact in any order: the same scores always give the same entries. Of equal
scores the first is the best.
"""

from __future__ import annotations

from typing import TypeGuard

import torch

_LEVEL_BITS = 12
_LEVELS = 1 << _LEVEL_BITS
_HIGHEST = (1 << 2 * _LEVEL_BITS) - 1
# Scores that differ by less, relative to the largest, are equal up to rounding.
_SMALLEST_SPREAD = 1e-5
# The most pairs of a pool that is sorted; larger pools are counted in histograms. A histogram takes
# as much memory as a pool of as many pairs as it has levels.
_LONGEST_SORTED = _LEVELS
# Copies of a histogram on a GPU: threads that add to different copies do not wait for each other.
_COPIES = 32
# Pairs of query and block to process at once, at some 40 bytes each, if pools are no larger. The
# numbers fit into the caches of a CPU, and keep a whole GPU busy.
_PAIRS_AT_ONCE = {"cpu": 1 << 18}
_PAIRS_AT_ONCE_ELSEWHERE = 1 << 24


def choose(
    scores: torch.Tensor,
    own: torch.Tensor,
    *,
    ranked: torch.Tensor | None = None,
    tau: float | None = None,
    budget: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The best entries of each pool: the fewest that reach a share of the similarity, or a number.

    Args:
        scores: (pools, entries).
        own: bool (pools, entries): True for entries that are chosen in any case and count.
        ranked: bool (pools, entries): False for entries that do not count, and are chosen only if
            they are in `own`; None if all entries count.
        tau: the share to reach of the sum of similarities. The similarity of an entry goes from 0
            for the pool's lowest score to 1 for the highest. A pool of equal scores has no
            similarity, and nothing to reach.
        budget: the number of entries to reach if `tau` is None, the same in all pools; or
            int (pools,), their number for each pool.

    Returns:
        bool (pools, entries).
    """
    step = max(1, pairs_at_once(scores.device) // scores.shape[1])
    if len(scores) > step:
        parts = [slice(start, start + step) for start in range(0, len(scores), step)]
        return torch.cat(
            [
                choose(
                    scores[part],
                    own[part],
                    ranked=None if ranked is None else ranked[part],
                    tau=tau,
                    budget=budget[part] if _is_of_pools(budget) else budget,
                )
                for part in parts
            ]
        )
    points = _fixed_point(scores, ranked)
    candidate = ~own if ranked is None else ranked & ~own
    if tau is None:
        assert budget is not None
        need = budget - (own if ranked is None else own & ranked).sum(1)
        weight = None
    else:
        total = points.sum(1, dtype=torch.int64)
        need = (total.double() * tau).ceil().long() - (points * own).sum(1, dtype=torch.int64)
        weight = (points * candidate).to(torch.int64)
    best = _by_sorting if scores.shape[1] <= _LONGEST_SORTED else _by_counting
    return own | best(points, candidate, weight, need)


def _is_of_pools(budget: int | torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    return isinstance(budget, torch.Tensor) and budget.ndim == 1


def pairs_at_once(device: torch.device) -> int:
    """Pairs of query and block to process at once on a device."""
    return _PAIRS_AT_ONCE.get(device.type, _PAIRS_AT_ONCE_ELSEWHERE)


def _fixed_point(scores: torch.Tensor, ranked: torch.Tensor | None) -> torch.Tensor:
    """Scores as int32 from 0, the lowest of a pool, to `_HIGHEST`, the highest.

    Unranked entries, and all entries of a pool of equal scores, are 0.
    """
    lowest = highest = scores
    if ranked is not None:
        lowest = scores.masked_fill(~ranked, torch.inf)
        highest = scores.masked_fill(~ranked, -torch.inf)
    low, high = lowest.amin(1, keepdim=True), highest.amax(1, keepdim=True)
    spread = high - low
    differ = spread > _SMALLEST_SPREAD * torch.maximum(low.abs(), high.abs())
    factor = torch.where(differ, _HIGHEST / spread, 0)
    points = torch.where(differ, (scores - low) * factor, 0).round_()
    if ranked is not None:
        points = points.masked_fill_(~ranked, 0)
    return points.nan_to_num_(0).clamp_(0, _HIGHEST).to(torch.int32)


def _by_sorting(
    points: torch.Tensor, candidate: torch.Tensor, weight: torch.Tensor | None, need: torch.Tensor
) -> torch.Tensor:
    """The fewest candidates, best first, whose weights reach `need`; all if the sum is less.

    Without weights a candidate weighs 1.
    """
    entries = points.shape[1]
    # All numbers differ: of equal points the first gets the higher number.
    place = torch.arange(entries - 1, -1, -1, device=points.device)
    number = points.long().mul_(entries).add_(place).masked_fill_(~candidate, -1)
    ordered, order = number.sort(1, descending=True)
    if weight is None:
        # Candidates come first: the last one taken has a place of its own.
        count = torch.minimum(need, candidate.sum(1)).clamp(min=0)[:, None]
        last = ordered.gather(1, (count - 1).clamp(min=0))
        return number >= last.masked_fill(count == 0, torch.iinfo(torch.int64).max)
    weight = weight.gather(1, order)
    before = weight.cumsum(1) - weight
    taken = (ordered >= 0) & (before < need[:, None])
    last = ordered.masked_fill_(~taken, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
    return number >= last


def _by_counting(
    points: torch.Tensor, candidate: torch.Tensor, weight: torch.Tensor | None, need: torch.Tensor
) -> torch.Tensor:
    """The result of `_by_sorting`, by histograms of the upper and of the lower bits."""
    if weight is None:
        weight = candidate.to(torch.int64)
    upper, lower = points >> _LEVEL_BITS, points & (_LEVELS - 1)
    high, need = _last_level(upper, weight, need)
    low, need = _last_level(lower, weight * (upper == high[:, None]), need)
    last = (high * _LEVELS + low)[:, None]
    # Candidates at the last level have equal points and weights: the first ones are taken, as many
    # as are still needed.
    tied = candidate & (points == last)
    each = (weight * tied).amax(1).clamp(min=1)
    wanted = (need + each - 1) // each
    return candidate & (points > last) | tied & (
        tied.cumsum(1, dtype=torch.int32) <= wanted[:, None]
    )


def _last_level(
    level: torch.Tensor, weight: torch.Tensor, need: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last level to take, counted from the top, and the weight that this level must still give.

    Args:
        level: int (pools, entries), from 0 to `_LEVELS` - 1.
        weight: int64 (pools, entries).
        need: int64 (pools,), the sum of weights to reach.

    Returns:
        The highest level such that all entries at or above the level reach `need`, int64 (pools,):
        -1 if the weights never reach `need`, `_LEVELS` if nothing is needed. The part of `need`
        that the levels above leave to this level, int64 (pools,).
    """
    pools, entries = level.shape
    copies = _COPIES if level.is_cuda else 1
    histogram = weight.new_zeros(pools * _LEVELS * copies)
    bin_ = level.long() + torch.arange(pools, device=level.device)[:, None] * _LEVELS
    if copies > 1:
        bin_ = bin_ * copies + torch.arange(entries, device=level.device) % copies
    histogram.scatter_add_(0, bin_.flatten(), weight.flatten())
    per_level = histogram.view(pools, _LEVELS, copies).sum(2)
    reached = torch.nn.functional.pad(per_level.flip(1).cumsum(1).flip(1), (0, 2))
    last = (reached[:, : _LEVELS + 1] >= need[:, None]).sum(1) - 1
    return last, need - reached.gather(1, last[:, None] + 1)[:, 0]
